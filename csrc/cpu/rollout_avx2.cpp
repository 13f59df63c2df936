#include <immintrin.h>

#include "cpu/rollout_core.h"

namespace icrl::avx2 {
#include "cpu/rollout.inl"
}  // namespace icrl::avx2
