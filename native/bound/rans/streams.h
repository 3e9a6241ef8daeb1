// How vector paths walk segments: several in lock step, because a state depends on the one before it
// and a single segment leaves the CPU waiting; each in rows of groups of 32 lanes, the last of a row
// maybe shorter. Included by these paths only, each of which gets its own copy.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bound/rans/coder.h"

namespace moebound {
namespace {

constexpr size_t kLanes = 32;
// Symbols become values, and whether enough words are left is asked, once for so many groups.
constexpr size_t kChunkGroups = 16;
// A group reads at most 32 words, and its loads reach at most 32 bytes beyond the last.
constexpr size_t kReach = kChunkGroups * 2 * kLanes + 32;

// The values of n symbols (words, or bytes, as the path writes them), planes and steps beginning at the first's: what comes out of a chunk. steps:
// one for all if they are by row, nothing where nothing is scaled.
using Emit = void (*)(const DecodeSetup&, const uint16_t* symbols, const uint8_t* planes, const float* steps, size_t n,
                      uint8_t* out);

// One segment under way: what it reads next, where it writes next.
struct Stream {
  const uint8_t* word;
  const uint8_t* words_end;
  const uint8_t* plane;
  uint8_t* out;
  size_t row, last_row;
  bool in_tail = false;
  // The last words, in front of zeros that a damaged segment may read instead of what is not its own.
  alignas(64) uint8_t tail[2 * kReach];
  alignas(64) uint16_t symbols[kChunkGroups * kLanes];

  Stream() = default;
  Stream(const Stream&) = delete;  // `word` may point into `tail`

  void begin(const SegmentJob& job) {
    word = job.bytes->words;
    words_end = word + 2 * size_t(job.bytes->n_words);
    plane = job.bytes->planes;
    out = static_cast<uint8_t*>(job.out);
    row = job.first;
    last_row = job.last;
  }
  // Before a chunk: makes it safe to read kReach bytes at `word`. False if more were read than are.
  bool has_room() {
    if (words_end - word >= std::ptrdiff_t(kReach)) [[likely]] return true;
    if (in_tail) return word <= words_end;
    const size_t left = size_t(words_end - word);
    std::memcpy(tail, word, left);
    std::memset(tail + left, 0, sizeof tail - left);
    word = tail;
    words_end = tail + left;
    in_tail = true;
    return true;
  }
};

// How many whole rows all K have ahead; the row behind these may be shorter.
template <size_t K>
size_t common_rows(const DecodeSetup& setup, const Stream* streams) {
  const size_t whole = setup.n / setup.layout->columns;
  size_t n_rows = SIZE_MAX;
  for (size_t k = 0; k < K; ++k) {
    n_rows = std::min(n_rows, std::min(whole, streams[k].last_row) - std::min(whole, streams[k].row));
  }
  return n_rows;
}

// Walks K streams through n_rows rows of `columns` weights. start_row(k) comes before a row of
// stream k; group(j, active, g) decodes, in every stream, the lanes of `active` from column j on,
// moves `word`, and writes 32 symbols, the chunk's g-th. False if a stream has run out of words.
template <size_t K, class StartRow, class Group>
__attribute__((always_inline)) inline bool walk(const DecodeSetup& setup, Stream* streams, size_t n_rows,
                                                size_t columns, Emit emit, const StartRow& start_row,
                                                const Group& group) {
  const size_t plane_bytes = 4 * size_t(setup.layout->low_bits), value_bytes = setup.value_bytes();
  alignas(64) float scaled[kChunkGroups * kLanes];
  for (size_t i = 0; i < n_rows; ++i) {
    for (size_t k = 0; k < K; ++k) start_row(k);
    for (size_t j = 0; j < columns;) {
      for (size_t k = 0; k < K; ++k) {
        if (!streams[k].has_room()) return false;
      }
      const size_t n = std::min(kChunkGroups * kLanes, columns - j);
      const size_t n_full = n / kLanes, n_groups = (n + kLanes - 1) / kLanes;
      for (size_t g = 0; g < n_groups; ++g) {
        group(j + g * kLanes, g < n_full ? ~0u : (1u << n % kLanes) - 1, g);
      }
      for (size_t k = 0; k < K; ++k) {
        const float* steps = setup.scaled ? setup.steps.data() + (setup.by_row ? streams[k].row : j) : nullptr;
        if (!setup.row_factors.empty()) {
          const float factor = setup.row_factors[streams[k].row];
          for (size_t i = 0; i < n_groups * kLanes; ++i) scaled[i] = steps[i] * factor;
          steps = scaled;
        }
        emit(setup, streams[k].symbols, streams[k].plane, steps, n, streams[k].out);
        streams[k].plane += n_groups * plane_bytes;
        streams[k].out += n * value_bytes;
      }
      j += n;
    }
    for (size_t k = 0; k < K; ++k) ++streams[k].row;
  }
  return true;
}

}  // namespace
}  // namespace moebound
