// The kernels of the capability that this translation unit is compiled for.
#pragma once

#include "kernels.h"

namespace cet::CET_CAPABILITY {

void gate(const Logits&, const Decision&, int threads);
int64_t exit_gate(const Features&, const Head&, const Decision&, const Survivors* survivors, int threads);
void pool(const Features&, void* pooled, int threads);
int64_t partition(const bool* leaves, int64_t rows, int64_t* order);
void take_rows(const RowTensor* tensors, int64_t count, const int64_t* index, int threads);
void put_rows(const char* from, char* to, int64_t row_bytes, const int64_t* index, int64_t count,
              const int64_t* positions);
void consistent_exit_loss(const LossSwitches&, const ExitLogits* exits, ExitTerms* terms, int threads);

}  // namespace cet::CET_CAPABILITY
