// Pool, linear layer, softmax statistics, score and exit mask, row by row while the row's features are in registers and cache.
#include <cmath>

#include "copy.h"
#include "kernels_of_capability.h"
#include "parallel.h"
#include "vec.h"

namespace cet::CET_CAPABILITY {

namespace {

constexpr int64_t kBlock = 1024;       // logits whose statistics are taken at once
constexpr int kRows = 4;               // rows whose dot products share the loads of the weights

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The logits as floats, padded with -Inf to whole registers.
template <class T>
void widen_block(const T* logits, int64_t stride, int64_t n, float* block) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store(block + i, load(logits + i));
    if (i < n) store(block + i, load_partial(logits + i, n - i, -INFINITY));
    return;
  }
  for (; i < n; ++i) block[i] = to_float(logits[i * stride]);
  for (; i % kLanes != 0; ++i) block[i] = -INFINITY;
}

SoftmaxStats block_stats(const float* block, int64_t n, float temperature, bool needs_second) {
  Vec first = splat(-INFINITY), second = first;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec x = load(block + i);
    if (needs_second) second = max(second, min(x, first));
    first = max(x, first);
  }
  const float largest = max(first);
  const float offset = largest == -INFINITY ? 0.0f : largest;
  Vec exps = {}, weighted = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec shifted = (load(block + i) - offset) / temperature;
    const Vec e = exp(shifted);
    exps += e;
    weighted += e * (shifted < kExpUnderflow ? splat(kExpUnderflow) : shifted);
  }
  SoftmaxStats stats = {largest, -INFINITY, sum(exps), sum(weighted)};
  if (needs_second) {
    float top = -INFINITY;
    for (int lane = 0; lane < kLanes; ++lane) {
      stats.second = larger(larger(stats.second, second[lane]), smaller(top, first[lane]));
      top = larger(top, first[lane]);
    }
  }
  return stats;
}

template <class T>
void gate_row(const T* logits, int64_t stride, int64_t classes, const Decision& decision, int64_t row) {
  alignas(64) float block[kBlock];
  const bool needs_second = rule_of(decision.score).needs_second;
  SoftmaxStats stats;
  for (int64_t k = 0; k < classes; k += kBlock) {
    const int64_t n = classes - k < kBlock ? classes - k : kBlock;
    widen_block(logits + k * stride, stride, n, block);
    const SoftmaxStats part = block_stats(block, n, decision.temperature, needs_second);
    stats = k == 0 ? part : merge(stats, part, decision.temperature);
  }
  const float score = score_of(stats, classes, decision.temperature, decision.score);
  decision.scores[row] = score;
  decision.exit_mask[row] = exits(score, decision.score, decision.threshold);
}

// sums[c] += the channels (contiguous) of N positions that lie `stride` apart.
template <int N, class T>
void add_positions(const T* from, int64_t stride, int64_t channels, float* sums) {
  const auto step = [&](int64_t c, const auto& load_channels) {
    Vec total = load_channels(from + c);
    for (int p = 1; p < N; ++p) total += load_channels(from + p * stride + c);
    store(sums + c, load(sums + c) + total);
  };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) step(c, [](const T* x) { return load(x); });
  if (c < channels) step(c, [&](const T* x) { return load_partial(x, channels - c); });
}

// Over the end of the page, which the processor's own prefetchers do not cross.
template <class T>
void prefetch_next_page(const T* from) {
  __builtin_prefetch(reinterpret_cast<const char*>(from) + 4096);
}

// The sum of n contiguous elements, still spread over the lanes.
template <class T>
Vec sum_in_lanes(const T* from, int64_t n) {
  constexpr int64_t kTwo = 2 * kLanes;
  Vec even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * kTwo <= n; i += 2 * kTwo) {
    for (int j = 0; j < 2 * kTwo; j += 64 / int{sizeof(T)}) prefetch_next_page(from + i + j);
    even += sum_of_two(from + i);
    odd += sum_of_two(from + i + kTwo);
  }
  if (i + kTwo <= n) {
    prefetch_next_page(from + i);
    even += sum_of_two(from + i);
    i += kTwo;
  }
  if (i + kLanes <= n) {
    odd += load(from + i);
    i += kLanes;
  }
  if (i < n) even += load_partial(from + i, n - i);
  return even + odd;
}

int64_t num_positions(const Features& f) {
  int64_t positions = 1;
  for (int d = 0; d < f.position_dims; ++d) positions *= f.position_size[d];
  return positions;
}

// Where the `index`th combination of the position dimensions but the last begins.
int64_t outer_offset(const Features& f, int64_t index) {
  int64_t offset = 0;
  for (int d = f.position_dims - 2; d >= 0; --d) {
    offset += index % f.position_size[d] * f.position_stride[d];
    index /= f.position_size[d];
  }
  return offset;
}

// The mean over the positions of one row, (channels,), with zeros behind it up to a whole register. `partial` is scratch
// of the same size.
template <class T>
void pool_row(const Features& f, const T* row, float* pooled, float* partial) {
  const int64_t padded = ceil_div(f.channels, kLanes) * kLanes;
  for (int64_t c = 0; c < padded; ++c) pooled[c] = 0.0f;
  const int last = f.position_dims - 1;
  const int64_t inner = f.position_dims == 0 ? 1 : f.position_size[last];
  const int64_t stride = f.position_dims == 0 ? 0 : f.position_stride[last];
  const int64_t positions = num_positions(f);
  for (int64_t outer = 0; outer * inner < positions; ++outer) {
    const T* from = row + outer_offset(f, outer);
    if (f.channel_stride == 1) {
      constexpr int64_t kPositions = 256;  // partial sums, or rounding errors would grow with the positions
      for (int64_t begin = 0; begin < inner; begin += kPositions) {
        const int64_t end = begin + kPositions < inner ? begin + kPositions : inner;
        float* sums = inner <= kPositions ? pooled : partial;
        if (sums == partial) {
          for (int64_t c = 0; c < padded; ++c) partial[c] = 0.0f;
        }
        int64_t p = begin;
        for (; p + 4 <= end; p += 4) add_positions<4>(from + p * stride, stride, f.channels, sums);
        for (; p < end; ++p) add_positions<1>(from + p * stride, stride, f.channels, sums);
        if (sums == partial) {
          for (int64_t c = 0; c < padded; ++c) pooled[c] += partial[c];
        }
      }
    } else if (stride == 1) {
      int64_t c = 0;
      for (; c + kLanes <= f.channels; c += kLanes) {
        Vec sums[kLanes];
        for (int j = 0; j < kLanes; ++j) sums[j] = sum_in_lanes(from + (c + j) * f.channel_stride, inner);
        store(pooled + c, load(pooled + c) + sum_each(sums));
      }
      for (; c < f.channels; ++c) pooled[c] += sum(sum_in_lanes(from + c * f.channel_stride, inner));
    } else {
      for (int64_t c = 0; c < f.channels; ++c) {
        double total = 0.0;
        for (int64_t p = 0; p < inner; ++p) total += to_float(from[c * f.channel_stride + p * stride]);
        pooled[c] += static_cast<float>(total);
      }
    }
  }
  if (positions == 1) return;
  const float divisor = static_cast<float>(positions);
  for (int64_t c = 0; c < f.channels; ++c) pooled[c] /= divisor;
}

// Dot products of R pooled rows with N rows of the weight.
template <int R, int N, class T>
void dot(const float* pooled, int64_t padded, const T* weight, int64_t channels, float (&out)[R][N]) {
  Vec acc[R][N] = {};
  const auto step = [&](int64_t c, const Vec (&w)[N]) {
    for (int r = 0; r < R; ++r) {
      const Vec x = load(pooled + r * padded + c);
      for (int k = 0; k < N; ++k) acc[r][k] += x * w[k];
    }
  };
  int64_t c = 0;
  Vec w[N];
  for (; c + kLanes <= channels; c += kLanes) {
    for (int k = 0; k < N; ++k) w[k] = load(weight + k * channels + c);
    step(c, w);
  }
  if (c < channels) {
    for (int k = 0; k < N; ++k) w[k] = load_partial(weight + k * channels + c, channels - c);
    step(c, w);
  }
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < N; ++k) out[r][k] = sum(acc[r][k]);
  }
}

template <int R, class T>
void linear(const float* pooled, int64_t padded, const Head& head, int64_t channels, T* logits) {
  const auto* weight = static_cast<const T*>(head.weight);
  const auto* bias = static_cast<const T*>(head.bias);
  const auto put = [&](int r, int64_t k, float value) {
    store(logits + r * head.classes + k, value + (bias ? to_float(bias[k]) : 0.0f));
  };
  int64_t k = 0;
  for (; k + 4 <= head.classes; k += 4) {
    float out[R][4];
    dot<R, 4>(pooled, padded, weight + k * channels, channels, out);
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < 4; ++j) put(r, k + j, out[r][j]);
    }
  }
  for (; k < head.classes; ++k) {
    float out[R][1];
    dot<R, 1>(pooled, padded, weight + k * channels, channels, out);
    for (int r = 0; r < R; ++r) put(r, k, out[r][0]);
  }
}

int64_t row_bytes(const Features& f) { return f.channels * num_positions(f) * size_of(f.dtype); }

// Calls f(worker, task, begin, end) for ranges of rows, multiples of kRows, that hold about kTaskBytes.
template <class F>
void for_row_ranges(int64_t rows, int64_t bytes_per_row, int workers, const F& f) {
  if (rows == 0) return;
  const int64_t wanted = kTaskBytes / (bytes_per_row > 0 ? bytes_per_row : 1);
  const int64_t share = ceil_div(rows, workers);
  const int64_t range = ceil_div(wanted < share ? (wanted > 0 ? wanted : 1) : share, kRows) * kRows;
  for_each_task(workers, ceil_div(rows, range), [&](int worker, int64_t task) {
    const int64_t begin = task * range;
    f(worker, task, begin, begin + range < rows ? begin + range : rows);
  });
}

template <class T>
void gate_rows(const GateArguments& a) {
  const Logits& x = a.logits;
  const auto* data = static_cast<const T*>(x.data);
  const int64_t bytes = x.classes * int64_t{sizeof(T)} * 4;  // an exponential costs more than a byte read
  for_row_ranges(x.rows, bytes, workers_for(x.rows * bytes, a.threads), [&](int, int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      gate_row(data + row * x.row_stride, x.class_stride, x.classes, a.decision, row);
    }
  });
}

// Moves the kept rows of a task behind those of the tasks before it.
void move_kept_rows(const char* from, int64_t row_stride, int64_t row_bytes, const bool* exit_mask, int64_t begin,
                    int64_t end, char* to, bool streaming) {
  for (int64_t row = begin; row < end; ++row) {
    if (exit_mask[row]) continue;
    if (streaming) {
      stream(to, from + row * row_stride, row_bytes);
    } else {
      std::memcpy(to, from + row * row_stride, row_bytes);
    }
    to += row_bytes;
  }
  if (streaming) finish_streams();
}

template <class T>
int64_t exit_gate_rows(const ExitGateArguments& a) {
  const Features& f = a.features;
  const Head& head = a.head;
  const Decision& decision = a.decision;
  const KeptRows* const kept_rows = a.kept_rows;
  const auto* data = static_cast<const T*>(f.data);
  auto* logits = static_cast<T*>(head.logits);
  const int64_t padded = ceil_div(f.channels, kLanes) * kLanes;
  const int64_t bytes = row_bytes(f);
  const int64_t work = bytes + f.channels * head.classes / 4;
  const int workers = workers_for(f.rows * work, a.threads);
  const Buffer<float> scratch(workers * (kRows + 1) * padded);
  const bool streaming = exceeds_cache(f.rows * bytes);
  const bool moving = kept_rows && kept_rows->to;
  if (moving) advise_huge_pages(kept_rows->to, kept_rows->capacity * bytes);
  Chain kept_before;
  for_row_ranges(f.rows, work, workers, [&](int worker, int64_t task, int64_t begin, int64_t end) {
    float* partial = scratch.get() + worker * (kRows + 1) * padded;
    float* pooled = partial + padded;
    for (int64_t row = begin; row < end; row += kRows) {
      const int n = end - row < kRows ? static_cast<int>(end - row) : kRows;
      for (int r = 0; r < n; ++r) pool_row(f, data + (row + r) * f.row_stride, pooled + r * padded, partial);
      if (n == kRows) {
        linear<kRows>(pooled, padded, head, f.channels, logits + row * head.classes);
      } else {
        for (int r = 0; r < n; ++r) {
          linear<1>(pooled + r * padded, padded, head, f.channels, logits + (row + r) * head.classes);
        }
      }
      for (int r = 0; r < n; ++r) gate_row(logits + (row + r) * head.classes, 1, head.classes, decision, row + r);
    }
    if (moving) {
      int64_t num_kept = 0;
      for (int64_t row = begin; row < end; ++row) num_kept += !decision.exit_mask[row];
      const int64_t before = kept_before.add(task, num_kept);
      if (before + num_kept > kept_rows->capacity) return;
      char* to = kept_rows->to + before * bytes;
      const auto* from = static_cast<const char*>(f.data);
      move_kept_rows(from, f.row_stride * int64_t{sizeof(T)}, bytes, decision.exit_mask, begin, end, to, streaming);
    }
  });
  return kept_rows ? order_rows(decision.exit_mask, f.rows, kept_rows->order) : 0;
}

template <class T>
void pool_rows(const PoolArguments& a) {
  const Features& f = a.features;
  auto* pooled = static_cast<T*>(a.pooled);
  const auto* data = static_cast<const T*>(f.data);
  const int64_t padded = ceil_div(f.channels, kLanes) * kLanes;
  const int64_t bytes = row_bytes(f);
  const int workers = workers_for(f.rows * bytes, a.threads);
  const Buffer<float> scratch(workers * 2 * padded);
  for_row_ranges(f.rows, bytes, workers, [&](int worker, int64_t, int64_t begin, int64_t end) {
    float* means = scratch.get() + worker * 2 * padded;
    for (int64_t row = begin; row < end; ++row) {
      pool_row(f, data + row * f.row_stride, means, means + padded);
      for (int64_t c = 0; c < f.channels; ++c) store(pooled + row * f.channels + c, means[c]);
    }
  });
}

}  // namespace

void gate(const GateArguments& a) {
  switch (a.logits.dtype) {
    case DType::float32: return gate_rows<float>(a);
    case DType::bfloat16: return gate_rows<bfloat16>(a);
    case DType::float16: return gate_rows<float16>(a);
  }
}

int64_t exit_gate(const ExitGateArguments& a) {
  switch (a.features.dtype) {
    case DType::float32: return exit_gate_rows<float>(a);
    case DType::bfloat16: return exit_gate_rows<bfloat16>(a);
    case DType::float16: return exit_gate_rows<float16>(a);
  }
  return 0;
}

void pool(const PoolArguments& a) {
  switch (a.features.dtype) {
    case DType::float32: return pool_rows<float>(a);
    case DType::bfloat16: return pool_rows<bfloat16>(a);
    case DType::float16: return pool_rows<float16>(a);
  }
}

}  // namespace cet::CET_CAPABILITY
