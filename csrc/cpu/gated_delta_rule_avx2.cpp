#include <immintrin.h>

#include <cstdlib>

#include "cpu/gated_delta_rule.h"
#include "cpu/parallel.h"

namespace icrl::avx2 {
// clang-format off: each needs the one before
#include "cpu/vec.h"
#include "cpu/gemm.h"
#include "cpu/chunk.inl"
#include "cpu/gated_delta_rule.inl"
// clang-format on
}  // namespace icrl::avx2
