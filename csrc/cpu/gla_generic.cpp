#include <immintrin.h>

#include <cstdlib>

#include "cpu/gla.h"
#include "common/parallel.h"

namespace icrl::generic {
// clang-format off: each needs the one before
#include "common/vec.h"
#include "common/gemm.h"
#include "cpu/chunk.inl"
#include "cpu/gla.inl"
// clang-format on
}  // namespace icrl::generic
