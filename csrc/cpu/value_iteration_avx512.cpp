#include <immintrin.h>

#include <cstdint>

#include "cpu/policy_iteration.h"

namespace icrl::avx512 {
#include "cpu/value_iteration.inl"
}  // namespace icrl::avx512
