#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
#include "cpu/rollout_core.h"

namespace icrl::generic {
#include "cpu/rollout.inl"
}  // namespace icrl::generic
