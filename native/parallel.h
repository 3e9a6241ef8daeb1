// Independent pieces of work over a few threads that live for one call.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace moebound {

// Calls work(i) once for each i below n, in no order. work must not throw.
template <class Work>
void for_each_index(size_t n, unsigned threads, Work&& work) {
  const size_t n_threads = std::min<size_t>(threads ? threads : 1, n);
  if (n_threads <= 1) {
    for (size_t i = 0; i < n; ++i) work(i);
    return;
  }
  std::atomic<size_t> next{0};
  const auto run = [&] {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
  };
  std::vector<std::jthread> others;
  for (size_t t = 1; t < n_threads; ++t) {
    try {
      others.emplace_back(run);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: the ones there are do all the work
    }
  }
  run();
}

}  // namespace moebound
