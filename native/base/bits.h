// Bit strings, lowest bit first, for the small parts of a payload.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/status.h"

namespace moebound {

class BitWriter {
 public:
  explicit BitWriter(std::vector<uint8_t>& out) : out_(out) {}
  void put(uint32_t value, uint32_t n_bits) {
    for (uint32_t i = 0; i < n_bits; ++i) {
      if (used_ == 0) out_.push_back(0);
      out_.back() = uint8_t(out_.back() | ((value >> i & 1u) << used_));
      used_ = (used_ + 1) & 7;
    }
  }
  // n ones and a zero.
  void put_unary(uint32_t n) {
    for (uint32_t i = 0; i < n; ++i) put(1, 1);
    put(0, 1);
  }

 private:
  std::vector<uint8_t>& out_;
  uint32_t used_ = 0;
};

class BitReader {
 public:
  BitReader(const uint8_t* data, size_t n_bytes) : data_(data), n_bits_(n_bytes * 8) {}
  uint32_t take(uint32_t n_bits) {
    if (n_bits > n_bits_ - at_) throw Corrupt("bits end early");
    uint32_t value = 0;
    for (uint32_t i = 0; i < n_bits; ++i, ++at_) value |= uint32_t(data_[at_ / 8] >> (at_ & 7) & 1) << i;
    return value;
  }
  uint32_t take_unary(uint32_t at_most) {
    uint32_t n = 0;
    while (take(1)) {
      if (++n > at_most) throw Corrupt("a unary code is too long");
    }
    return n;
  }
  size_t bytes_used() const { return (at_ + 7) / 8; }

 private:
  const uint8_t* data_;
  size_t n_bits_, at_ = 0;
};

inline uint32_t zigzag(int32_t v) { return (uint32_t(v) << 1) ^ uint32_t(v >> 31); }
inline int32_t unzigzag(uint32_t v) { return int32_t(v >> 1) ^ -int32_t(v & 1); }
inline uint32_t bit_length(uint32_t v) { return uint32_t(std::bit_width(v)); }

}  // namespace moebound
