// csrc/cuda/switch_graph.cu on the CPU: a runtime that keeps graphs of kernel, child and SWITCH nodes, refuses what the
// documentation forbids, and runs them by their edges alone, the node that was added last first where these allow it.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>

#undef __global__
#define __global__
#undef __grid_constant__
#define __grid_constant__

namespace {
std::map<cudaGraphConditionalHandle, unsigned> conditions;
}
static void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) { conditions.at(handle) = value; }

#include "../../csrc/cuda/switch_graph.cu"

namespace {

void require(bool holds, const char* rule) {
  if (holds) return;
  std::printf("broken: %s\n", rule);
  std::exit(1);
}

struct Graph;

struct Node {
  std::vector<size_t> after;
  cudaGraphConditionalHandle handle = 0;
  int32_t* counts = nullptr;  // of a kernel node
  cet::cuda::Buckets buckets = {};
  std::vector<std::shared_ptr<Graph>> bodies;  // of a SWITCH node; or the one child
  bool is_child = false;
};

struct Graph {
  std::deque<Node> nodes;
  int id = -1;
};

std::map<cudaGraph_t, std::shared_ptr<Graph>> graphs;  // by handle; bodies belong to their nodes too
std::map<cudaGraphExec_t, std::shared_ptr<Graph>> execs;
std::map<cudaGraphConditionalHandle, cudaGraph_t> owners;
std::vector<std::unique_ptr<cudaGraph_t[]>> body_handles;
uintptr_t next_handle = 1000;
int owned_graphs = 0;

template <class T>
T new_handle() {
  return reinterpret_cast<T>(++next_handle);
}

Node& add(cudaGraph_t graph, cudaGraphNode_t* made, const cudaGraphNode_t* after, size_t num_after) {
  auto& nodes = graphs.at(graph)->nodes;
  *made = reinterpret_cast<cudaGraphNode_t>(nodes.size() + 1);
  Node& node = nodes.emplace_back();
  for (size_t i = 0; i < num_after; ++i) node.after.push_back(reinterpret_cast<size_t>(after[i]) - 1);
  return node;
}

std::vector<int> ran;
void (*on_run)(int) = nullptr;

void run(const Graph& graph) {
  if (graph.id >= 0) {
    ran.push_back(graph.id);
    on_run(graph.id);
  }
  std::vector<bool> done(graph.nodes.size());
  for (size_t left = graph.nodes.size(); left > 0; --left) {
    size_t i = graph.nodes.size();
    while (i-- > 0) {
      const auto& after = graph.nodes[i].after;
      if (!done[i] && std::all_of(after.begin(), after.end(), [&](size_t other) { return done[other]; })) break;
    }
    require(i < graph.nodes.size(), "edges make no circle");
    const Node& node = graph.nodes[i];
    if (node.counts != nullptr) {
      cet::cuda::select_bucket(node.handle, node.counts, node.buckets);
    } else {
      const unsigned chosen = node.is_child ? 0 : conditions.at(node.handle);
      if (chosen < node.bodies.size()) run(*node.bodies[chosen]);
    }
    done[i] = true;
  }
}

}  // namespace

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "refused"; }
cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned flags) {
  require(flags == 0, "flags are 0");
  *graph = new_handle<cudaGraph_t>();
  graphs[*graph] = std::make_shared<Graph>();
  ++owned_graphs;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  require(graphs.erase(graph) == 1, "a graph is destroyed once");
  --owned_graphs;
  return cudaSuccess;
}
cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph, unsigned, unsigned) {
  *handle = ++next_handle;
  conditions[*handle] = 0;
  owners[*handle] = graph;
  return cudaSuccess;
}
cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* made, cudaGraph_t graph, const cudaGraphNode_t* after, size_t num_after,
                                   const cudaKernelNodeParams* params) {
  Node& node = add(graph, made, after, num_after);
  node.handle = *static_cast<cudaGraphConditionalHandle*>(params->kernelParams[0]);
  node.counts = *static_cast<int32_t**>(params->kernelParams[1]);
  node.buckets = *static_cast<cet::cuda::Buckets*>(params->kernelParams[2]);
  require(owners.at(node.handle) == graph, "a handle is of the graph whose node sets it");
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaGraphAddNode(cudaGraphNode_t* made, cudaGraph_t graph, const cudaGraphNode_t* after,
                             const cudaGraphEdgeData* edges, size_t num_after, cudaGraphNodeParams* params) {
  require(edges == nullptr, "edges are plain");
#else
cudaError_t cudaGraphAddNode(cudaGraphNode_t* made, cudaGraph_t graph, const cudaGraphNode_t* after, size_t num_after,
                             cudaGraphNodeParams* params) {
#endif
  require(params->type == cudaGraphNodeTypeConditional, "the node is conditional");
  auto& conditional = params->conditional;
  require(conditional.type == cudaGraphCondTypeSwitch && conditional.size > 0, "it is a SWITCH with bodies");
  require(owners.at(conditional.handle) == graph, "its handle is of the same graph");
  for (const int reserved : params->reserved0) require(reserved == 0, "what is reserved is 0");
  Node& node = add(graph, made, after, num_after);
  node.handle = conditional.handle;
  body_handles.push_back(std::make_unique<cudaGraph_t[]>(conditional.size));
  for (unsigned i = 0; i < conditional.size; ++i) {
    body_handles.back()[i] = new_handle<cudaGraph_t>();
    node.bodies.push_back(graphs[body_handles.back()[i]] = std::make_shared<Graph>());
  }
  conditional.phGraph_out = body_handles.back().get();
  return cudaSuccess;
}
cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* made, cudaGraph_t graph, const cudaGraphNode_t* after,
                                       size_t num_after, cudaGraph_t child) {
  Node& node = add(graph, made, after, num_after);
  node.is_child = true;
  node.bodies.push_back(std::make_shared<Graph>(*graphs.at(child)));  // a copy
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new_handle<cudaGraphExec_t>();
  execs[*exec] = graphs.at(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  require(execs.erase(exec) == 1, "what was instantiated is destroyed once");
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  run(*execs.at(exec));
  return cudaSuccess;
}
}

namespace {
std::mt19937 draw(3);
int32_t counts[6];
std::vector<std::vector<int32_t>> buckets;

// A segment: checks that it is the right one, and says how many rows go on.
void segment(int id) {
  const int index = id / 100, bucket = id % 100;
  const int32_t rows = counts[index];
  require(rows > 0, "nothing runs for no rows");
  require(buckets[index][bucket] >= rows, "the bucket holds the rows");
  require(bucket == 0 || buckets[index][bucket - 1] < rows, "it is the least that does");
  counts[index + 1] = draw() % 3 ? draw() % (rows + 1) : 0;
}
}  // namespace

int main() {
  on_run = segment;
  int launches = 0;
  for (int trial = 0; trial < 100; ++trial) {
    const int segments = 1 + draw() % 4;
    const int32_t capacity = 1 + draw() % 64;
    std::vector<std::vector<cudaGraph_t>> children(segments);
    buckets.assign(segments, {});
    for (int i = 0; i < segments; ++i) {
      for (int k = draw() % 8; k >= 0; --k) buckets[i].push_back(1 + draw() % capacity);
      buckets[i].push_back(capacity);
      std::sort(buckets[i].begin(), buckets[i].end());
      buckets[i].erase(std::unique(buckets[i].begin(), buckets[i].end()), buckets[i].end());
      for (size_t k = 0; k < buckets[i].size(); ++k) {
        cudaGraph_t child;
        cudaGraphCreate(&child, 0);
        graphs.at(child)->id = 100 * i + static_cast<int>(k);
        children[i].push_back(child);
      }
    }
    const cet::cuda::SwitchGraph whole(children, buckets, counts);
    for (const auto& of_segment : children) {
      for (const cudaGraph_t child : of_segment) cudaGraphDestroy(child);  // the whole has copies
    }
    for (int launch = 0; launch < 20; ++launch, ++launches) {
      for (int32_t& count : counts) count = draw() % (capacity + 1);  // stale ones
      counts[0] = draw() % (capacity + 1);
      ran.clear();
      whole.launch(nullptr);
      int running = 0;
      while (running < segments && counts[running] > 0) ++running;
      require(static_cast<int>(ran.size()) == running, "segments run until no row is left");
      for (int i = 0; i < running; ++i) require(ran[i] / 100 == i, "they run in turn");
    }
  }
  require(owned_graphs == 0 && execs.empty(), "nothing is left");
  std::printf("%d launches\n", launches);
}
