// How large a head may be, as the Python side checks it (linear_attention/common.py). A step keeps a token on its
// stack.
#pragma once

#include <cstdint>

namespace icrl {

constexpr int64_t kMostChannels = 512;  // of a key, or slots
constexpr int64_t kMostValues = 4096;   // channels of a value

inline bool channels(int64_t n) { return n >= 1 && n <= kMostChannels; }
inline bool value_channels(int64_t n) { return n >= 1 && n <= kMostValues; }

}  // namespace icrl
