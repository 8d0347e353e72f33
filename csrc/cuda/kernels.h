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

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// One tensor whose rows move. Strides and bytes of a row, which is one block of memory, are in bytes.
struct RowMove {
  const char* from;
  char* to;
  int64_t from_stride;  // 0 for a row that stands for all
  int64_t to_stride;
  int64_t row_bytes;
  bool is_exiting;  // rows that leave are scattered to their positions, kept rows are gathered
};

constexpr int kMaxMoves = 32;

// For j < *num_kept, and each move of kept rows: row order[j] to row j. For *num_kept <= j < *count, and each move of
// rows that leave: row order[j] to row positions[order[j]]. `rows` is the length of `order`, at least *count.
void gather_and_scatter_rows(const RowMove* moves, int num_moves, const int32_t* order, const int32_t* positions,
               const int32_t* num_kept, const int32_t* count, int64_t rows, cudaStream_t stream);

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
