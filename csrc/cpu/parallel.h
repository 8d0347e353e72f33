// Threads for the kernels.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace cet {

// Calls body(context, worker) for worker = 0 .. workers - 1, each on a thread of its own, the caller's among them. Fewer
// calls are made where no further threads are to be had.
void run_workers(int workers, void* context, void (*body)(void* context, int worker));

constexpr int64_t kTaskBytes = 1 << 16;

// How many of `threads` so much work repays: fewer bytes each cost more to hand out than they save.
static inline int workers_for(int64_t bytes, int threads) {
  const int64_t useful = bytes >> 17;
  return useful < threads ? (useful > 1 ? static_cast<int>(useful) : 1) : threads;
}

// Calls f(worker, task) once for every task, in ascending order on each worker. `f` must not throw.
template <class F>
static inline void for_each_task(int workers, int64_t tasks, const F& f) {
  if (workers > tasks) workers = static_cast<int>(tasks);
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(0, task);
    return;
  }
  struct Context {
    const F& f;
    int64_t tasks;
    std::atomic<int64_t> next{0};
  } context{f, tasks};
  run_workers(workers, &context, [](void* pointer, int worker) {
    auto& c = *static_cast<Context*>(pointer);
    for (int64_t task; (task = c.next.fetch_add(1, std::memory_order_relaxed)) < c.tasks;) c.f(worker, task);
  });
}

// A running total over tasks: each adds its part behind the tasks before it, which for_each_task has handed out earlier.
class Chain {
 public:
  // Waits until all tasks before `task` have added theirs; returns their total.
  int64_t add(int64_t task, int64_t part) {
    while (turn_.load(std::memory_order_acquire) != task) sched_yield();
    const int64_t before = total_;
    total_ += part;
    turn_.store(task + 1, std::memory_order_release);
    return before;
  }

 private:
  std::atomic<int64_t> turn_{0};
  int64_t total_ = 0;  // written by the task whose turn it is
};

void* allocate(int64_t bytes);  // aligned to a cache line
void release(void* memory);

// Uninitialised memory for `size` elements.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(allocate(size * static_cast<int64_t>(sizeof(T))))) {}
  ~Buffer() { release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace cet
