// The table of the kernels of one capability.
#include "kernels_of_capability.h"

#define CET_STRING_OF(x) #x
#define CET_STRING(x) CET_STRING_OF(x)

namespace cet::CET_CAPABILITY {

const Kernels kernels = {
    CET_STRING(CET_CAPABILITY), gate, exit_gate, pool, order_rows, gather_rows, scatter_rows, consistent_exit_loss,
};

}  // namespace cet::CET_CAPABILITY
