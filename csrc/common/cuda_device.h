// What every launcher needs: errors of the runtime as exceptions, and the device of its tensors as the current one.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace icrl {

inline void check(cudaError_t e, const char* what) {
  if (e != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(e));
}

// The device that was current is so again at the end.
struct Guard {
  int before = 0;
  explicit Guard(int device) {
    check(cudaGetDevice(&before), "current device");
    check(cudaSetDevice(device), "choosing the device");
  }
  ~Guard() { cudaSetDevice(before); }
};

}  // namespace icrl
