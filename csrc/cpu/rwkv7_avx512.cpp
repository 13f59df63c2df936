// GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdlib>

#include "cpu/rwkv7.h"
#include "common/parallel.h"

namespace icrl::avx512 {
// clang-format off: each needs the one before
#include "common/vec.h"
#include "common/gemm.h"
#include "cpu/chunk.inl"
#include "cpu/rwkv7.inl"
// clang-format on
}  // namespace icrl::avx512
