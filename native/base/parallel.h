// Independent pieces of work over a few threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <functional>

namespace moebound {

// Calls run on this thread and at once on up to n_threads - 1 others; returns when all have. The
// others belong to a pool that lives as long as the process: a thread started for a job of a few
// milliseconds may wait as long for its first turn. A forked child gets a pool of its own.
void run_together(size_t n_threads, const std::function<void()>& run);

// Calls work(i) once for each i below n, in no order. If one throws, as where there is no memory, no
// others begin, and the first exception comes out when all that had begun are done: never out of a
// thread of the pool, which would end the process.
template <class Work>
void for_each_index(size_t n, unsigned threads, Work&& work) {
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  run_together(std::min<size_t>(threads ? threads : 1, n), [&] {
    try {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      next = n;
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace moebound
