#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own header
#include <immintrin.h>

#include "cpu/rollout_core.h"

namespace icrl::avx512 {
#include "cpu/rollout.inl"
}  // namespace icrl::avx512
