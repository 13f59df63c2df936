#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace icrl {
namespace {

Isa detect() {
  __builtin_cpu_init();
  Isa best = Isa::generic;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    best = Isa::avx512;
  const char* wanted = std::getenv("ICRL_ISA");
  if (!wanted || !*wanted) return best;
  const std::string w = wanted;
  const Isa isa = w == "avx512" ? Isa::avx512 : w == "avx2" ? Isa::avx2 : Isa::generic;
  if (isa == Isa::generic && w != "generic")
    throw std::invalid_argument("ICRL_ISA must be generic, avx2 or avx512, got '" + w + "'");
  if (isa > best) throw std::invalid_argument("ICRL_ISA=" + w + ", but this processor does not have it");
  return isa;
}

}  // namespace

Isa isa() {
  static const Isa value = detect();
  return value;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "generic";
  }
}

}  // namespace icrl
