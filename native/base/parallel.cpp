#include "base/parallel.h"

#include <pthread.h>

#include <cfenv>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace moebound {
namespace {

struct Task {
  const std::function<void()>& run;
  size_t n_running = 0;
};

class Pool {
 public:
  void run(size_t n_helpers, const std::function<void()>& run) {
    Task task{run};
    {
      const std::lock_guard lock(mutex_);
      grow(waiting_.size() + n_helpers);
      waiting_.insert(waiting_.end(), std::min(n_helpers, n_workers_), &task);
    }
    wake_.notify_all();
    run();
    std::unique_lock lock(mutex_);
    std::erase(waiting_, &task);  // helpers that came too late have nothing left to do
    done_.wait(lock, [&] { return task.n_running == 0; });
  }

 private:
  static constexpr size_t kMostWorkers = 256;

  void grow(size_t wanted) {
    while (n_workers_ < std::min(wanted, kMostWorkers)) {
      try {
        std::thread([this] { work(); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: the ones there are do all the work
      }
      ++n_workers_;
    }
  }

  void work() {
    std::fesetenv(FE_DFL_ENV);  // whatever the thread that needed this one had set
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return !waiting_.empty(); });
      Task& task = *waiting_.front();
      waiting_.pop_front();
      ++task.n_running;
      lock.unlock();
      task.run();
      lock.lock();
      // The task lives until its owner has the lock and sees 0.
      if (--task.n_running == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Task*> waiting_;
  size_t n_workers_ = 0;
};

// Never destroyed: workers may be waiting in it when the process ends.
std::atomic<Pool*>& pool() {
  static std::atomic<Pool*> instance = [] {
    pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
    return new Pool;
  }();
  return instance;
}

}  // namespace

void run_together(size_t n_threads, const std::function<void()>& run) {
  if (n_threads <= 1) {
    run();
  } else {
    pool().load()->run(n_threads - 1, run);
  }
}

}  // namespace moebound
