// Which instruction set the CPU kernels use: the best that was compiled and that this processor has.
#pragma once

namespace icrl {

enum class Isa { generic, avx2, avx512 };

Isa isa();  // ICRL_ISA=generic|avx2|avx512 lowers it (for tests); decided once
const char* isa_name();

}  // namespace icrl

// Declarations, the same in the namespace of each instruction set.
#define ICRL_IN_EACH_ISA(declarations) \
  namespace generic {                  \
  declarations                         \
  }                                    \
  namespace avx2 {                     \
  declarations                         \
  }                                    \
  namespace avx512 {                   \
  declarations                         \
  }

// Defines name(args...) as a call of the same function in namespace avx512, avx2 or generic.
#define ICRL_DISPATCH(name, ...)                                    \
  (::icrl::isa() == ::icrl::Isa::avx512 ? avx512::name(__VA_ARGS__) \
   : ::icrl::isa() == ::icrl::Isa::avx2 ? avx2::name(__VA_ARGS__)   \
                                        : generic::name(__VA_ARGS__))
