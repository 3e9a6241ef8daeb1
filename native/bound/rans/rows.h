// How a vector path walks a segment: rows in groups of 32 lanes, the last of a row maybe shorter,
// words near the end from a padded copy. What a group does is the path's own. Included by vector
// paths only, each of which gets its own copy.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bound/rans/coder.h"

namespace moebound {
namespace {

constexpr size_t kLanes = 32;
// A group reads at most 32 words, and its loads reach at most 32 bytes beyond the last.
constexpr size_t kReach = 2 * kLanes + 32;

// Calls group(offsets, n_active, all_active, word, planes, steps, to) for each group: decode n_active
// lanes (all of them if all_active is std::true_type) with the tables at `offsets` (none: nullptr),
// move `word` past the words used, write 32 values to `to`, with 32 steps if kScaled. Returns whether
// the words came out even.
template <bool kScaled, class Value, class Group>
__attribute__((always_inline)) inline bool walk_rows(const DecodeSetup& setup, const SegmentBytes& segment,
                                                     size_t first, size_t last, Value* out, const Group& group) {
  const Layout& layout = *setup.layout;
  const size_t plane_bytes = 4 * size_t(layout.low_bits);
  const uint8_t* word = segment.words;
  const uint8_t* const words_end = word + 2 * size_t(segment.n_words);
  const uint8_t* plane = segment.planes;

  const auto step = [&](const uint32_t* offsets, size_t n_active, auto all_active, const float* steps, Value* to)
                        __attribute__((always_inline)) {
    // One call of group, from the words or from the copy: two would be too much code for the cache.
    const size_t left = size_t(words_end - word);
    alignas(64) uint8_t tail[kReach];
    const uint8_t* from = word;
    if (left < kReach) [[unlikely]] {
      std::memset(tail, 0, kReach);
      std::memcpy(tail, word, left);
      from = tail;
    }
    const uint8_t* const start = from;
    group(offsets, n_active, all_active, from, plane, steps, to);
    const size_t used = size_t(from - start);
    if (used > left) return false;
    word += used;
    plane += plane_bytes;
    return true;
  };

  [[maybe_unused]] float of_row[kLanes];
  for (size_t row = first; row < last; ++row) {
    const uint32_t* offsets = setup.offsets(row);
    if (kScaled && setup.by_row) std::fill_n(of_row, kLanes, setup.steps[row]);
    const auto steps = [&](size_t j) -> const float* {
      return !kScaled ? nullptr : setup.by_row ? of_row : setup.steps.data() + j;
    };
    const size_t columns = std::min<size_t>(layout.columns, setup.n - row * layout.columns);
    size_t j = 0;
    for (; j + kLanes <= columns; j += kLanes, out += kLanes) {
      if (!step(offsets ? offsets + j : nullptr, kLanes, std::true_type{}, steps(j), out)) return false;
    }
    if (j < columns) {
      Value some[kLanes];
      if (!step(offsets ? offsets + j : nullptr, columns - j, std::false_type{}, steps(j), some)) return false;
      std::copy_n(some, columns - j, out);
      out += columns - j;
    }
  }
  return word == words_end;
}

}  // namespace
}  // namespace moebound
