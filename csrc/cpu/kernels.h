// The CPU kernels. Each is compiled once per capability, a set of instructions, and the table of the best one that the
// machine has is used.
#pragma once

#include <cstdint>

#include "../softmax_stats.h"

namespace cet {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Strides count elements, where nothing else is said.

struct Decision {
  Score score;
  float threshold;
  float temperature;
  float* scores;    // (rows,)
  bool* exit_mask;  // (rows,)
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

// Where the features of the kept rows go while they are in cache, or null. The rows of the features must each be one piece
// of memory, and are so in the destination, (capacity, ...), of which the first are filled; where more are kept, what it
// holds means nothing.
struct KeptRows {
  char* to;
  int64_t capacity;
  int64_t* order;  // (rows,), as order_rows() writes it
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

struct LossConfig {
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

// What each kernel takes.

struct GateArguments {
  Logits logits;
  Decision decision;
  int threads;
};

struct ExitGateArguments {
  Features features;
  Head head;
  Decision decision;
  const KeptRows* kept_rows;  // or null
  int threads;
};

struct PoolArguments {
  Features features;
  void* pooled;  // (rows, channels) in the dtype of the features
  int threads;
};

struct GatherArguments {
  const RowTensor* tensors;
  int64_t num_tensors;
  const int64_t* index;
  int threads;
};

// to[positions[index[i]]] = from[index[i]]; positions may be null, for the identity.
struct ScatterArguments {
  const char* from;
  char* to;
  int64_t row_bytes;
  const int64_t* index;
  int64_t num_rows;  // that move
  const int64_t* positions;
};

struct LossArguments {
  LossConfig config;
  const ExitLogits* exits;
  ExitTerms* terms;
  int threads;
};

struct Kernels {
  const char* name;
  void (*gate)(const GateArguments&);
  int64_t (*exit_gate)(const ExitGateArguments&);  // the number kept, where there are kept_rows
  void (*pool)(const PoolArguments&);
  // Writes the positions of the kept rows to the front of order (rows,), the others behind; returns the number kept.
  int64_t (*order_rows)(const bool* exit_mask, int64_t rows, int64_t* order);
  void (*gather_rows)(const GatherArguments&);
  void (*scatter_rows)(const ScatterArguments&);
  void (*consistent_exit_loss)(const LossArguments&);
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
