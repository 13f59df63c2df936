#include <immintrin.h>

#include <cstdlib>

#include "cpu/gsa.h"
#include "common/parallel.h"

namespace icrl::avx2 {
// clang-format off: each needs the one before
#include "common/vec.h"
#include "common/gemm.h"
#include "cpu/chunk.inl"
#include "cpu/gsa.inl"
// clang-format on
}  // namespace icrl::avx2
