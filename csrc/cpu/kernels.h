// The CPU kernels. Each is compiled once per capability, a set of instructions, and the table of the best one that the
// machine has is used.
#pragma once

#include <cstdint>

#include "../softmax_stats.h"

namespace cet {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Strides count elements throughout.

struct Decision {
  Score score;
  float threshold;
  float temperature;
  float* scores;  // (rows,)
  bool* leaves;   // (rows,)
};

struct Logits {
  const void* data;
  DType dtype;
  int64_t rows, classes;
  int64_t row_stride, class_stride;
};

// Channels at positions: what a row is pooled over. Where one position is taken, there are no position dimensions.
struct Features {
  const void* data;
  DType dtype;
  int64_t rows, channels;
  int64_t row_stride, channel_stride;
  int position_dims;
  const int64_t *position_size, *position_stride;
};

// Contiguous, in the dtype of the features.
struct Head {
  const void* weight;  // (classes, channels)
  const void* bias;    // (classes,) or null
  void* logits;        // (rows, classes)
  int64_t classes;
};

// Where the features of the rows that stay go while they are in cache, or null. The rows of the features must each be one
// piece of memory, and are so in the destination, (capacity, ...), of which the first are filled; where more rows stay, what
// it holds means nothing.
struct Survivors {
  char* to;
  int64_t capacity;
  int64_t* order;  // (rows,), as partition() writes it
};

// One tensor whose rows move. Dimensions in descending order of destination stride.
struct RowTensor {
  const char* from;
  char* to;
  int64_t chunk;  // bytes that lie together in both
  int dims;
  int row_dim;
  const int64_t *size, *from_stride, *to_stride;  // of the destination; strides in bytes
};

// Logits of one exit and their gradients, in the dtype of the logits; the gradients are contiguous, or null.
struct ExitLogits {
  const void *clean, *perturbed;
  int64_t clean_stride, perturbed_stride;  // of rows; classes are contiguous
  void *clean_grad, *perturbed_grad;
  float weight;
};

constexpr int64_t kUnlabelled = -100;

// Gradients in float16 are differences of probabilities times this: the largest power of two that keeps them finite. The
// caller multiplies by the weight, divides by the rows and by this, and by then knows the loss scale, in float32.
constexpr float kHalfGradientScale = 32768.0f;

struct LossSwitches {
  DType dtype;
  int64_t exits, rows, classes;
  const int64_t* labels;  // (rows,)
  float consistency_weight, min_confidence;
  bool hard_target, final_teacher;
};

// Means over the rows, the supervised term's over the labelled ones.
struct ExitTerms {
  double supervised, consistency, confident;
};

struct Kernels {
  const char* name;
  void (*gate)(const Logits&, const Decision&, int threads);
  // `survivors` may be null. Returns how many rows stay where it is not.
  int64_t (*exit_gate)(const Features&, const Head&, const Decision&, const Survivors* survivors, int threads);
  void (*pool)(const Features&, void* pooled, int threads);  // pooled: (rows, channels) in the dtype of the features
  // Writes the indices of the rows that stay to the front of order (rows,), those that leave behind; returns how many stay.
  int64_t (*partition)(const bool* leaves, int64_t rows, int64_t* order);
  void (*take_rows)(const RowTensor* tensors, int64_t count, const int64_t* index, int threads);
  // to[positions[index[i]]] = from[index[i]] for rows of so many bytes; positions may be null, for the identity.
  void (*put_rows)(const char* from, char* to, int64_t row_bytes, const int64_t* index, int64_t count,
                   const int64_t* positions);
  void (*consistent_exit_loss)(const LossSwitches&, const ExitLogits* exits, ExitTerms* terms, int threads);
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace cet
