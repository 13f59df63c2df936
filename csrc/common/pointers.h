// Addresses that Python hands over, as pointers.
#pragma once

#include <cstdint>

namespace icrl {

using Pointer = uintptr_t;

inline const void* in(Pointer p) { return reinterpret_cast<const void*>(p); }
inline void* out(Pointer p) { return reinterpret_cast<void*>(p); }
inline const float* floats(Pointer p) { return reinterpret_cast<const float*>(p); }
inline float* out_floats(Pointer p) { return reinterpret_cast<float*>(p); }

}  // namespace icrl
