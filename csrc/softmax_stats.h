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

// Of logits x at temperature t. Differences are divided by t, never the logits: where these are large, quotients lose the
// digits that differ.
struct SoftmaxStats {
  float max;
  float second;    // the second largest, which equals max where two are the same
  float sum;       // of exp((x - max) / t)
  float weighted;  // of (x - max) / t exp((x - max) / t)
};

// The functions have internal linkage: each translation unit is compiled for another instruction set, and the linker
// must not let one of them serve all.

CET_HOST_DEVICE static inline float larger(float a, float b) { return a > b ? a : b; }
CET_HOST_DEVICE static inline float smaller(float a, float b) { return a < b ? a : b; }

// Adds a part's sums to those of a block with at least its max. A part whose logits are all -Inf has sum 0; NaN spreads.
CET_HOST_DEVICE static inline void add_rescaled(const SoftmaxStats& part, float temperature, SoftmaxStats* to) {
  if (part.sum == 0.0f) return;
  const float shift = (part.max - to->max) / temperature;
  const float scale = expf(shift);
  to->sum += part.sum * scale;
  to->weighted += (part.weighted + shift * part.sum) * scale;
}

// Of two blocks together.
CET_HOST_DEVICE static inline SoftmaxStats merge(const SoftmaxStats& a, const SoftmaxStats& b, float temperature) {
  SoftmaxStats both = {larger(a.max, b.max), larger(smaller(a.max, b.max), larger(a.second, b.second)), 0.0f, 0.0f};
  add_rescaled(a, temperature, &both);
  add_rescaled(b, temperature, &both);
  return both;
}

CET_HOST_DEVICE static inline float score_of(const SoftmaxStats& s, float temperature, Score score) {
  if (!(s.sum >= 1.0f)) return NAN;  // the largest adds 1, unless one is NaN or +Inf or all are -Inf
  if (score == Score::entropy) return logf(s.sum) - s.weighted / s.sum;
  if (score == Score::confidence) return 1.0f / s.sum;
  return (1.0f - expf((s.second - s.max) / temperature)) / s.sum;
}

// Every comparison with NaN is false, so a row whose score is NaN stays.
CET_HOST_DEVICE static inline bool leaves(float score_value, Score score, float threshold) {
  return score == Score::entropy ? score_value <= threshold : score_value >= threshold;
}

}  // namespace cet
