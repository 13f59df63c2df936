#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "cpu/anymdp.h"

namespace icrl::avx512 {
#include "common/tiles.inl"
#include "cpu/anymdp_numbers.inl"
#include "cpu/anymdp.inl"
}  // namespace icrl::avx512
