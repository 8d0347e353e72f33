// What a row's exit score needs to know of its logits, gathered block by block (Milakov and Gimelshein 2018, arXiv
// 1805.02867), and the scores. Shared by CPU and GPU.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define CET_HOST_DEVICE __host__ __device__
#else
#define CET_HOST_DEVICE
#endif

namespace cet {

enum class Score : int { entropy = 0, confidence = 1, margin = 2 };

// Of the logits x, divided by the temperature.
struct SoftmaxStats {
  float max;
  float second;    // the second largest, which equals max where two are the same
  float sum;       // of exp(x - max)
  float weighted;  // of (x - max) exp(x - max)
};

// The functions have internal linkage: each translation unit is compiled for another instruction set, and the linker
// must not let one of them serve all.

CET_HOST_DEVICE static inline float larger(float a, float b) { return a > b ? a : b; }
CET_HOST_DEVICE static inline float smaller(float a, float b) { return a < b ? a : b; }

// Adds a part's sums to those of a block with at least its max. A part whose logits are all -Inf adds nothing; NaN spreads.
CET_HOST_DEVICE static inline void add_rescaled(const SoftmaxStats& part, SoftmaxStats* to) {
  const float shift = part.max - to->max;
  if (shift == -INFINITY && part.sum == part.sum) return;
  const float scale = expf(shift);
  to->sum += part.sum * scale;
  to->weighted += (part.weighted + shift * part.sum) * scale;
}

// Of two blocks together.
CET_HOST_DEVICE static inline SoftmaxStats merge(const SoftmaxStats& a, const SoftmaxStats& b) {
  SoftmaxStats both = {larger(a.max, b.max), larger(smaller(a.max, b.max), larger(a.second, b.second)), 0.0f, 0.0f};
  add_rescaled(a, &both);
  add_rescaled(b, &both);
  return both;
}

CET_HOST_DEVICE static inline float score_of(const SoftmaxStats& s, Score score) {
  if (score == Score::entropy) return logf(s.sum) - s.weighted / s.sum;
  if (score == Score::confidence) return 1.0f / s.sum;
  return (1.0f - expf(s.second - s.max)) / s.sum;
}

// Every comparison with NaN is false, so a row whose score is NaN stays.
CET_HOST_DEVICE static inline bool leaves(float score_value, Score score, float threshold) {
  return score == Score::entropy ? score_value <= threshold : score_value >= threshold;
}

}  // namespace cet
