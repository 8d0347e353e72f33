// What the CUDA files offer to the bindings. Pointers are device memory unless said otherwise; calls are asynchronous on
// the given stream of the current device and throw std::runtime_error with the name of what failed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace cet::cuda {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

// Makes a device current for a scope. Where it is current already nothing is set: that would make a context on a device
// which the process does not use.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    is_other_ = before_ != device;
    if (is_other_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (is_other_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool is_other_ = false;
};

#if CUDART_VERSION >= 12080
// A graph that runs, for each segment in turn, the one of its graphs whose bucket is the least that holds counts[segment]
// rows. No graph runs for 0 rows, and the next count becomes 0 then.
class SwitchGraph {
 public:
  // Copies the graphs. `buckets` ascend; counts has one entry more than there are segments and outlives this.
  SwitchGraph(const std::vector<std::vector<cudaGraph_t>>& graphs, const std::vector<std::vector<int32_t>>& buckets,
              int32_t* counts);
  ~SwitchGraph();
  SwitchGraph(const SwitchGraph&) = delete;
  SwitchGraph& operator=(const SwitchGraph&) = delete;

  void launch(cudaStream_t stream) const;

 private:
  cudaGraphExec_t exec_ = nullptr;
};
#endif

}  // namespace cet::cuda
