// Stable compaction on padded batches: several tensors in one launch, which rows and how many known on the device alone.
#include "kernels.h"

namespace cet::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // independent loads of a thread
constexpr uint32_t kTile = kThreads * kInFlight;
constexpr int kBlocksPerSm = 4;  // 64 registers a thread, and 64 KiB of loads in flight on an SM

struct Moves {
  RowMove move[kMaxMoves];
  int width[kMaxMoves];  // bytes that a thread moves at once: all pointers, strides and rows are multiples of it
  int count;
};

// The units of one tensor, numbered row by row; `first` is that of a tile of them.
template <class Unit>
__device__ __forceinline__ void copy_tile(const RowMove& move, const int32_t* __restrict__ order,
                                          const int32_t* __restrict__ positions, uint32_t row_units, uint32_t first,
                                          uint32_t units, int32_t first_row) {
  Unit loaded[kInFlight];
  char* target[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const uint32_t unit = first + i * kThreads + threadIdx.x;
    target[i] = nullptr;
    if (unit < units) {
      const uint32_t j = unit / row_units, offset = (unit - j * row_units) * sizeof(Unit);
      const int64_t row = order[first_row + j];
      const int64_t entry = move.is_exiting ? positions[row] : static_cast<int64_t>(j);
      loaded[i] = __ldg(reinterpret_cast<const Unit*>(move.from + row * move.from_stride + offset));
      target[i] = move.to + entry * move.to_stride + offset;
    }
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (target[i]) *reinterpret_cast<Unit*>(target[i]) = loaded[i];
  }
}

// As many blocks as the device holds at once go over the tiles of all tensors.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gather_and_scatter_rows_kernel(const __grid_constant__ Moves moves, const int32_t* __restrict__ order,
                     const int32_t* __restrict__ positions, const int32_t* __restrict__ num_kept_ptr,
                     const int32_t* __restrict__ count_ptr) {
  const int32_t num_kept = *num_kept_ptr, num_exited = *count_ptr - num_kept;
  uint32_t tile = blockIdx.x;
  for (int m = 0; m < moves.count; ++m) {
    const RowMove& move = moves.move[m];
    const int width = moves.width[m];
    const uint32_t row_units = static_cast<uint32_t>(move.row_bytes / width);
    const uint32_t units = static_cast<uint32_t>(move.is_exiting ? num_exited : num_kept) * row_units;
    const uint32_t tiles = units / kTile + (units % kTile != 0);
    const int32_t first_row = move.is_exiting ? num_kept : 0;
    for (; tile < tiles; tile += gridDim.x) {
      const uint32_t first = tile * kTile;
      switch (width) {
        case 16: copy_tile<uint4>(move, order, positions, row_units, first, units, first_row); break;
        case 8: copy_tile<uint2>(move, order, positions, row_units, first, units, first_row); break;
        case 4: copy_tile<uint32_t>(move, order, positions, row_units, first, units, first_row); break;
        case 2: copy_tile<uint16_t>(move, order, positions, row_units, first, units, first_row); break;
        default: copy_tile<uint8_t>(move, order, positions, row_units, first, units, first_row); break;
      }
    }
    tile -= tiles;
  }
}

int width_of(const RowMove& move) {
  const uint64_t together = reinterpret_cast<uintptr_t>(move.from) | reinterpret_cast<uintptr_t>(move.to) |
                            static_cast<uint64_t>(move.from_stride | move.to_stride | move.row_bytes);
  int width = 16;
  while (together % width != 0) width /= 2;
  return width;
}

}  // namespace

void gather_and_scatter_rows(const RowMove* moves, int num_moves, const int32_t* order, const int32_t* positions,
               const int32_t* num_kept, const int32_t* count, int64_t rows, cudaStream_t stream) {
  Moves wide = {};
  int64_t tiles = 0;
  for (int m = 0; m < num_moves; ++m) {
    if (moves[m].row_bytes == 0) continue;
    const int width = width_of(moves[m]);
    const int64_t units = rows * (moves[m].row_bytes / width);
    if (units >= INT64_C(1) << 32) throw std::runtime_error("gather_and_scatter_rows: a tensor has 2^32 units or more; use fewer rows");
    wide.move[wide.count] = moves[m];
    wide.width[wide.count++] = width;
    tiles += (units + kTile - 1) / kTile;
  }
  if (tiles == 0) return;
  int device = 0, sms = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  const int64_t resident = int64_t{sms} * kBlocksPerSm;
  const auto blocks = static_cast<unsigned>(tiles < resident ? tiles : resident);
  gather_and_scatter_rows_kernel<<<blocks, kThreads, 0, stream>>>(wide, order, positions, num_kept, count);
  check(cudaGetLastError(), "gather_and_scatter_rows");
}

}  // namespace cet::cuda
