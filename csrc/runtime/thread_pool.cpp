#include "thread_pool.h"

#include <algorithm>

namespace qat {
namespace {

// Looks at a value before a thread sleeps.
constexpr int32_t spins = 4096;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int32_t count) {
  try {
    for (int32_t i = 1; i < count; ++i) threads_.emplace_back([this, i] { work(i); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run_part(int64_t part) const {
  if (part >= job_.parts) return;
  const int64_t size = job_.end - job_.begin;
  const int64_t first = size / job_.parts * part + std::min(part, size % job_.parts);
  const int64_t count = size / job_.parts + (part < size % job_.parts ? 1 : 0);
  job_.task(job_.begin + first, job_.begin + first + count, job_.context);
}

void ThreadPool::work(int64_t part) {
  uint64_t seen = 0;
  for (;;) {
    for (int32_t i = 0; i < spins && calls_.load(std::memory_order_acquire) == seen; ++i) pause();
    if (calls_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return stopping_ || calls_.load(std::memory_order_acquire) != seen; });
      if (stopping_) return;
    }
    ++seen;
    run_part(part);
    pending_.fetch_sub(1, std::memory_order_release);
  }
}

void ThreadPool::run(void* pool, int64_t begin, int64_t end, int64_t grain, Task task, void* context) {
  if (begin >= end) return;
  auto& self = *static_cast<ThreadPool*>(pool);
  const auto threads = static_cast<int64_t>(self.threads_.size()) + 1;
  const int64_t most = std::max<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1);
  if (threads == 1 || most == 1) return task(begin, end, context);
  self.job_ = {begin, end, std::min(threads, most), task, context};
  self.pending_.store(threads - 1, std::memory_order_relaxed);
  {
    const std::lock_guard<std::mutex> lock(self.mutex_);
    self.calls_.fetch_add(1, std::memory_order_release);
  }
  self.wake_.notify_all();
  self.run_part(0);
  // the processor may have fewer free cores than there are threads
  for (int32_t i = 0; self.pending_.load(std::memory_order_acquire) != 0; ++i) {
    if (i < spins) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace qat
