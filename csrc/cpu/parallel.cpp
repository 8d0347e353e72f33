// Threads for the kernels.
#include "parallel.h"

#include <dlfcn.h>

#include <new>

// The kernels run on the OpenMP runtime that torch has loaded, found by name in the process rather than linked: a torch
// wheel brings its own copy of libgomp, in some wheels under another name, and a second copy is a second pool of threads.
// The threads of a pool spin for a while after their work, so two pools that take turns steal each other's cores.
// GOMP_parallel is the stable entry point of compiled `#pragma omp parallel`; GNU's, LLVM's and Intel's runtimes have it.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

namespace cet {

namespace {

struct Region {
  void (*body)(void* context, int worker);
  void* context;
  std::atomic<int> next{0};
};

}  // namespace

void run_workers(int workers, void* context, void (*body)(void* context, int worker)) {
  static const auto parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel == nullptr) {
    body(context, 0);
    return;
  }
  Region region{body, context};
  parallel(
      [](void* pointer) {
        auto& r = *static_cast<Region*>(pointer);
        r.body(r.context, r.next.fetch_add(1, std::memory_order_relaxed));
      },
      &region, static_cast<unsigned>(workers), 0);
}

void* allocate(int64_t bytes) { return ::operator new(static_cast<size_t>(bytes), std::align_val_t{64}); }

void release(void* memory) { ::operator delete(memory, std::align_val_t{64}); }

}  // namespace cet
