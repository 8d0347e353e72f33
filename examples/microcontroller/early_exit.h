/* The loop over the stages of a model that cet.export wrote as .tflm: a row leaves at the first exit that is sure.

   Nothing is allocated and nothing kept: all memory is the caller's, so that several rows may be on their way at once.
   C99; compile it with the folder's model.c, and the folder among the directories of headers. */
#ifndef CET_EARLY_EXIT_H
#define CET_EARLY_EXIT_H

#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Runs a stage, index of cet_stages: copies `inputs` into the interpreter's input tensors, invokes it, and copies its
   output tensors to `outputs`, both in the order of the file. outputs[0] takes CET_CLASSES logits, outputs[1] the score,
   all float; how many bytes the others have, cet_tensors says, at the stage's own `inputs` and `outputs`.
   Returns 0, or another number of the firmware's own, with which cet_predict stops. */
typedef int (*CetRun)(void *context, int stage, const void *const *inputs, void *const *outputs);

typedef struct {
  int label;      /* the class with the largest logit */
  int exit_index; /* of all exits, closed ones counted */
  float score;
  float logits[CET_CLASSES];
} CetAnswer;

/* Answers one row.

   inputs: CET_INPUTS tensors, as the comments in model.h name them.
   scratch: CET_SCRATCH_BYTES bytes, aligned to 16.
   thresholds: CET_EXITS - 1 numbers, NAN for an exit that is closed; NULL for those of the model.

   Returns 0, or what `run` returned when it failed. A NaN never leaves early. */
int cet_predict(CetRun run, void *context, const void *const *inputs, void *scratch, const float *thresholds,
                CetAnswer *answer);

#ifdef __cplusplus
}
#endif
#endif
