// The kernels of the capability that this translation unit is compiled for.
#pragma once

#include "kernels.h"

namespace cet::CET_CAPABILITY {

void gate(const GateArguments&);
int64_t exit_gate(const ExitGateArguments&);
void pool(const PoolArguments&);
int64_t order_rows(const bool* exit_mask, int64_t rows, int64_t* order);
void gather_rows(const GatherArguments&);
void scatter_rows(const ScatterArguments&);
void consistent_exit_loss(const LossArguments&);

}  // namespace cet::CET_CAPABILITY
