// Threads of a session whose caller gives none.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "../kernels/integer/view.h"

namespace qat {

// Part i of a call always runs on thread i, so that a thread finds in its cache what it wrote before. Idle threads look
// for work for some microseconds, as the operators of a network follow each other, and sleep then.
class ThreadPool {
 public:
  // The calling thread and count - 1 others. Throws std::system_error.
  explicit ThreadPool(int32_t count);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Threads::run, with the pool as its first argument; one call at a time.
  static void run(void* pool, int64_t begin, int64_t end, int64_t grain, Task task, void* context);

 private:
  struct Job {
    int64_t begin, end, parts;
    Task task;
    void* context;
  };

  void work(int64_t part);
  void run_part(int64_t part) const;
  void stop();

  Job job_{};
  std::atomic<uint64_t> calls_{0};   // a new value is a new job
  std::atomic<int64_t> pending_{0};  // threads that have not finished the job
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

}  // namespace qat
