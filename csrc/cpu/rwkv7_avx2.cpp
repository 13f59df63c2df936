#include <immintrin.h>

#include <cstdlib>

#include "cpu/rwkv7.h"
#include "common/parallel.h"

namespace icrl::avx2 {
// clang-format off: each needs the one before
#include "common/vec.h"
#include "common/gemm.h"
#include "cpu/chunk.inl"
#include "cpu/rwkv7.inl"
// clang-format on
}  // namespace icrl::avx2
