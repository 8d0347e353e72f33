// What a row's exit score needs to know of its logits, gathered block by block (Milakov and Gimelshein 2018, arXiv
// 1805.02867), and the scores. kernels/scores.py is the same in Triton.
#pragma once

#include <cstdint>

#include <math.h>

namespace cet {

// In the order of SCORES in cet.ops.definitions.
enum class Score : int { entropy, confidence, margin };

struct ScoreRule {
  const char* name;
  bool is_low_when_sure;  // a row leaves at or below the threshold, else at or above it
  bool needs_second;      // of SoftmaxStats
};

constexpr ScoreRule kScoreRules[] = {{"entropy", true, false}, {"confidence", false, false}, {"margin", false, true}};

static inline const ScoreRule& rule_of(Score score) { return kScoreRules[static_cast<int>(score)]; }

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

static inline float larger(float a, float b) { return a > b ? a : b; }
static inline float smaller(float a, float b) { return a < b ? a : b; }

// Below, expf is as good as 0, and a difference of logits may be infinite.
constexpr float kFarBelow = -87.3f;

// Adds a part's sums to those of a block with at least its max. A part whose logits are all -Inf has sum 0; NaN spreads.
static inline void add_rescaled(const SoftmaxStats& part, float temperature, SoftmaxStats* to) {
  if (part.sum == 0.0f) return;
  const float shift = (part.max - to->max) / temperature;
  const float scale = expf(shift);
  to->sum += part.sum * scale;
  to->weighted += (part.weighted + larger(shift, kFarBelow) * part.sum) * scale;
}

// Of two blocks together.
static inline SoftmaxStats merge(const SoftmaxStats& a, const SoftmaxStats& b, float temperature) {
  SoftmaxStats both = {larger(a.max, b.max), larger(smaller(a.max, b.max), larger(a.second, b.second)), 0.0f, 0.0f};
  add_rescaled(a, temperature, &both);
  add_rescaled(b, temperature, &both);
  return both;
}

// A score may depend on the statistics, the temperature and the number of classes.
static inline float score_of(const SoftmaxStats& s, int64_t /* classes */, float temperature, Score score) {
  if (!(s.sum >= 1.0f)) return NAN;  // the largest adds 1, unless one is NaN or +Inf or all are -Inf
  switch (score) {
    case Score::entropy: return logf(s.sum) - s.weighted / s.sum;
    case Score::confidence: return 1.0f / s.sum;
    case Score::margin: return (1.0f - expf((s.second - s.max) / temperature)) / s.sum;
  }
  return NAN;
}

// Every comparison with NaN is false, so a row whose score is NaN goes on.
static inline bool exits(float score_value, Score score, float threshold) {
  return rule_of(score).is_low_when_sure ? score_value <= threshold : score_value >= threshold;
}

}  // namespace cet
