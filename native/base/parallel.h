// Independent pieces of work over a few threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <functional>

namespace moebound {

// Calls run on this thread and at once on up to n_threads - 1 others; returns when all have. The
// others belong to a pool that lives as long as the process: a thread started for a job of a few
// milliseconds may wait as long for its first turn. A forked child gets a pool of its own.
void run_together(size_t n_threads, const std::function<void()>& run);

// Calls work(i) once for each i below n, in no order. work must not throw.
template <class Work>
void for_each_index(size_t n, unsigned threads, Work&& work) {
  std::atomic<size_t> next{0};
  run_together(std::min<size_t>(threads ? threads : 1, n), [&] {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
  });
}

}  // namespace moebound
