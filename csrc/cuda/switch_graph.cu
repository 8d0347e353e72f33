// A network with early exits as one graph: conditional nodes pick the bucket of each segment on the device.
#include "kernels.h"

#if CUDART_VERSION >= 12080

#include <algorithm>

namespace cet::cuda {

namespace {

constexpr int kMaxBuckets = 32;

struct Buckets {
  int32_t rows[kMaxBuckets];
  int count;
};

__global__ void select_bucket(cudaGraphConditionalHandle handle, int32_t* counts, const __grid_constant__ Buckets buckets) {
  const int32_t rows = counts[0];
  int bucket = 0;
  while (bucket < buckets.count && buckets.rows[bucket] < rows) ++bucket;
  if (rows == 0) {
    counts[1] = 0;           // which no graph is going to write
    bucket = buckets.count;  // and no body has this number
  }
  cudaGraphSetConditional(handle, bucket);
}

// The nodes of one segment, behind `after`; the last of them.
cudaGraphNode_t add_segment(cudaGraph_t graph, const cudaGraphNode_t* after, const std::vector<cudaGraph_t>& bodies,
                            const std::vector<int32_t>& rows, int32_t* counts) {
  if (bodies.size() != rows.size() || rows.empty() || rows.size() > kMaxBuckets) {
    throw std::runtime_error("SwitchGraph: each segment needs 1 to 32 buckets and a graph for each");
  }
  cudaGraphConditionalHandle handle;
  check(cudaGraphConditionalHandleCreate(&handle, graph, 0, 0), "cudaGraphConditionalHandleCreate");

  Buckets buckets = {{}, static_cast<int>(rows.size())};
  std::copy(rows.begin(), rows.end(), buckets.rows);
  void* arguments[] = {&handle, &counts, &buckets};
  cudaKernelNodeParams select = {};
  select.func = reinterpret_cast<void*>(select_bucket);
  select.gridDim = select.blockDim = dim3(1, 1, 1);
  select.kernelParams = arguments;
  cudaGraphNode_t selected;
  check(cudaGraphAddKernelNode(&selected, graph, after, after ? 1 : 0, &select), "cudaGraphAddKernelNode");

  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = cudaGraphCondTypeSwitch;
  params.conditional.size = static_cast<unsigned>(bodies.size());
  cudaGraphNode_t switched;
#if CUDART_VERSION >= 13000
  check(cudaGraphAddNode(&switched, graph, &selected, nullptr, 1, &params), "cudaGraphAddNode");
#else
  check(cudaGraphAddNode(&switched, graph, &selected, 1, &params), "cudaGraphAddNode");
#endif
  for (size_t i = 0; i < bodies.size(); ++i) {
    cudaGraphNode_t child;
    check(cudaGraphAddChildGraphNode(&child, params.conditional.phGraph_out[i], nullptr, 0, bodies[i]),
          "cudaGraphAddChildGraphNode");
  }
  return switched;
}

class OwnedGraph {
 public:
  OwnedGraph() { check(cudaGraphCreate(&graph, 0), "cudaGraphCreate"); }
  ~OwnedGraph() { cudaGraphDestroy(graph); }
  OwnedGraph(const OwnedGraph&) = delete;
  OwnedGraph& operator=(const OwnedGraph&) = delete;
  cudaGraph_t graph = nullptr;
};

}  // namespace

SwitchGraph::SwitchGraph(const std::vector<std::vector<cudaGraph_t>>& graphs,
                         const std::vector<std::vector<int32_t>>& buckets, int32_t* counts) {
  if (graphs.size() != buckets.size()) throw std::runtime_error("SwitchGraph: give the buckets of every segment");
  const OwnedGraph whole;
  cudaGraphNode_t last;
  for (size_t segment = 0; segment < graphs.size(); ++segment) {
    last = add_segment(whole.graph, segment ? &last : nullptr, graphs[segment], buckets[segment], counts + segment);
  }
  check(cudaGraphInstantiate(&exec_, whole.graph, 0), "cudaGraphInstantiate");
}

SwitchGraph::~SwitchGraph() { cudaGraphExecDestroy(exec_); }

void SwitchGraph::launch(cudaStream_t stream) const { check(cudaGraphLaunch(exec_, stream), "cudaGraphLaunch"); }

}  // namespace cet::cuda

#endif
