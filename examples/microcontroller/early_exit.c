#include "early_exit.h"

#include <math.h>

#ifdef __FAST_MATH__
#error "compile without -ffast-math: a NaN must not leave early"
#endif

static void *made_at(void *scratch, int tensor) { return (unsigned char *)scratch + cet_tensors[tensor].offset; }

/* False for NaN, be it the score or the threshold. */
static int leaves(float score, float threshold) {
  return CET_LEAVES_AT_OR_BELOW ? score <= threshold : score >= threshold;
}

/* The first NaN if there is one, as in Python. */
static int largest(const float *logits) {
  int best = 0;
  for (int k = 0; k < CET_CLASSES; ++k) {
    if (isnan(logits[k])) return k;
    if (logits[k] > logits[best]) best = k;
  }
  return best;
}

int cet_predict(CetRun run, void *context, const void *const *inputs, void *scratch, const float *thresholds,
                CetAnswer *answer) {
  const void *taken[CET_MOST_TENSORS];
  void *made[CET_MOST_TENSORS];
  made[0] = answer->logits;
  made[1] = &answer->score;
  for (int index = 0; index < CET_STAGES; ++index) {
    const CetStage *stage = &cet_stages[index];
    for (int i = 0; i < stage->num_inputs; ++i) {
      const int tensor = stage->inputs[i];
      taken[i] = tensor < CET_INPUTS ? inputs[tensor] : made_at(scratch, tensor);
    }
    for (int i = 0; i < stage->num_outputs; ++i) made[2 + i] = made_at(scratch, stage->outputs[i]);
    const int failed = run(context, index, taken, made);
    if (failed) return failed;
    answer->exit_index = stage->exit_index;
    if (index + 1 == CET_STAGES) break;
    if (leaves(answer->score, thresholds ? thresholds[stage->exit_index] : stage->threshold)) break;
  }
  answer->label = largest(answer->logits);
  return 0;
}
