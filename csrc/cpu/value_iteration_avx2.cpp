#include <cstdint>

#include "cpu/policy_iteration.h"

namespace icrl::avx2 {
#include "cpu/value_iteration.inl"
}  // namespace icrl::avx2
