// Stable compaction: which rows are kept, and the move of their bytes.
#include "copy.h"
#include "kernels_of_capability.h"
#include "parallel.h"

namespace cet::CET_CAPABILITY {

namespace {

template <class Copy>
void copy_range(const RowTensor& t, const int64_t* index, int dim, const char* from, char* to, int64_t begin, int64_t end,
                const Copy& copy) {
  for (int64_t i = begin; i < end; ++i) {
    const char* source = from + (dim == t.row_dim ? index[i] : i) * t.from_stride[dim];
    char* target = to + i * t.to_stride[dim];
    if (dim == t.dims - 1) {
      copy(target, source);
    } else {
      copy_range(t, index, dim + 1, source, target, 0, t.size[dim + 1], copy);
    }
  }
}

void copy_slices(const RowTensor& t, const int64_t* index, int64_t begin, int64_t end, bool streaming) {
  const auto run = [&](const auto& copy) { copy_range(t, index, 0, t.from, t.to, begin, end, copy); };
  switch (t.chunk) {
    case 1: return run([](char* to, const char* from) { std::memcpy(to, from, 1); });
    case 2: return run([](char* to, const char* from) { std::memcpy(to, from, 2); });
    case 4: return run([](char* to, const char* from) { std::memcpy(to, from, 4); });
    case 8: return run([](char* to, const char* from) { std::memcpy(to, from, 8); });
  }
  if (streaming && t.chunk >= 4 * kLine) {
    run([&](char* to, const char* from) { stream(to, from, t.chunk); });
    finish_streams();
  } else {
    run([&](char* to, const char* from) { std::memcpy(to, from, t.chunk); });
  }
}

int64_t slice_bytes(const RowTensor& t) {
  int64_t bytes = t.chunk;
  for (int d = 1; d < t.dims; ++d) bytes *= t.size[d];
  return bytes;
}

int64_t slices_per_task(const RowTensor& t) {
  const int64_t bytes = slice_bytes(t);
  return bytes < kTaskBytes ? kTaskBytes / (bytes > 0 ? bytes : 1) : 1;
}

int64_t tasks_of(const RowTensor& t) {
  const int64_t slices = slices_per_task(t);
  return (t.size[0] + slices - 1) / slices;
}

}  // namespace

int64_t order_rows(const bool* exit_mask, int64_t rows, int64_t* order) {
  int64_t num_exited = 0;
  // As bytes: those of a bool tensor that views another dtype may hold more than 0 and 1.
  const auto* flags = reinterpret_cast<const unsigned char*>(exit_mask);
  for (int64_t row = 0; row < rows; ++row) num_exited += flags[row] != 0;
  int64_t next[2] = {0, rows - num_exited};
  for (int64_t row = 0; row < rows; ++row) order[next[flags[row] != 0]++] = row;
  return rows - num_exited;
}

void gather_rows(const GatherArguments& a) {
  const RowTensor* const tensors = a.tensors;
  int64_t bytes = 0, tasks = 0;
  for (const RowTensor* t = tensors; t != tensors + a.num_tensors; ++t) {
    const int64_t size = t->size[0] * slice_bytes(*t);
    advise_huge_pages(t->to, size);
    bytes += size;
    tasks += tasks_of(*t);
  }
  const bool streaming = exceeds_cache(bytes);
  for_each_task(workers_for(bytes, a.threads), tasks, [&](int, int64_t task) {
    const RowTensor* t = tensors;
    for (; task >= tasks_of(*t); ++t) task -= tasks_of(*t);
    const int64_t begin = task * slices_per_task(*t), end = begin + slices_per_task(*t);
    copy_slices(*t, a.index, begin, end < t->size[0] ? end : t->size[0], streaming);
  });
}

void scatter_rows(const ScatterArguments& a) {
  for (int64_t i = 0; i < a.num_rows; ++i) {
    const int64_t row = a.index[i];
    std::memcpy(a.to + (a.positions ? a.positions[row] : row) * a.row_bytes, a.from + row * a.row_bytes, a.row_bytes);
  }
}

}  // namespace cet::CET_CAPABILITY
