#include <cstdint>

#include "cpu/policy_iteration.h"

namespace icrl::generic {
#include "cpu/value_iteration.inl"
}  // namespace icrl::generic
