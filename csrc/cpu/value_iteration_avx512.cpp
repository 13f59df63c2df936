#include <immintrin.h>

#include <cstdint>

#include "cpu/policy_iteration.h"
#include "cpu/value_iteration_lanes.h"

namespace icrl::avx512 {
#include "common/tiles.inl"
#include "cpu/value_iteration.inl"
#include "cpu/value_iteration_lanes.inl"
}  // namespace icrl::avx512
