#include "bound/envelope.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <exception>
#include <optional>
#include <string_view>

#include "base/bytes.h"
#include "base/xxh64.h"
#include "bound/layout.h"

namespace moebound {
namespace {

constexpr uint8_t kVersion = 1, kNewestPayload = 3, kTorch = 1;
constexpr size_t kMostDims = 8;
constexpr uint64_t kMostValues = uint64_t(1) << 40;
constexpr std::string_view kMagic = "MOEB", kCodec = "bound";

struct Envelope {
  ArrayInfo info;
  const uint8_t* payload = nullptr;
  size_t payload_bytes = 0;
  std::vector<uint64_t> patched;
  const uint8_t* values = nullptr;
};

// A cursor that stays within its bytes. What is not there is nothing, and all behind it.
class Reader {
 public:
  Reader(const uint8_t* data, size_t n_bytes) : at_(data), left_(n_bytes) {}
  const uint8_t* take(uint64_t n_bytes) {
    if (bad_ || n_bytes > left_) {
      bad_ = true;
      return nullptr;
    }
    at_ += n_bytes;
    left_ -= size_t(n_bytes);
    return at_ - n_bytes;
  }
  uint8_t byte() {
    const uint8_t* const p = take(1);
    return p ? *p : 0;
  }
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 63; shift += 7) {
      const uint8_t some = byte();
      value |= uint64_t(some & 0x7F) << shift;
      if (some < 0x80) return value;
    }
    bad_ = true;
    return 0;
  }
  bool bad() const { return bad_; }
  size_t left() const { return left_; }

 private:
  const uint8_t* at_;
  size_t left_;
  bool bad_ = false;
};

// `count` bits from bit `at` on, at most 40.
uint64_t bits_at(const uint8_t* data, size_t n_bytes, size_t at, uint32_t count) {
  uint64_t found = 0;
  const size_t first = at / 8;
  std::memcpy(&found, data + first, std::min<size_t>(8, n_bytes - first));
  return found >> (at & 7) & ((uint64_t(1) << count) - 1);
}

// The positions of a patch by Elias and Fano. False unless they are `count`, ascending and below n.
bool read_positions(Reader& read, uint64_t n, uint64_t count, std::vector<uint64_t>& positions) {
  const auto low = uint32_t(std::bit_width(n / count) - 1);
  const uint64_t low_bytes = (count * low + 7) / 8, high_bytes = (count + (n >> low) + 8) / 8;
  const uint8_t* const lows = read.take(low_bytes);
  const uint8_t* const highs = read.take(high_bytes);
  if (!highs) return false;
  positions.reserve(size_t(count));
  for (size_t at = 0; at < high_bytes; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, highs + at, std::min<size_t>(8, size_t(high_bytes) - at));
    for (; word; word &= word - 1) {
      const size_t i = positions.size();
      if (i == count) return false;
      const uint64_t high = 8 * at + size_t(std::countr_zero(word)) - i;
      const uint64_t position = high << low | (low ? bits_at(lows, size_t(low_bytes), i * low, low) : 0);
      if (position >= n || (i && position <= positions.back())) return false;
      positions.push_back(position);
    }
  }
  return positions.size() == count;
}

std::optional<Envelope> read_envelope(const ExpectedEnvelope& expected) {
  const uint8_t* const data = expected.data;
  if (expected.n_bytes < 9 || expected.shape.size() > kMostDims) return {};
  const size_t body = expected.n_bytes - 4;
  Reader read(data, body);
  if (std::memcmp(read.take(4), kMagic.data(), 4) || read.byte() != kVersion) return {};
  const uint8_t flags = read.byte(), dtype = read.byte(), source = read.byte();
  if (flags & ~kTorch || dtype != uint8_t(expected.dtype) || source > uint8_t(DType::kF32)) return {};
  if (read.byte() != kCodec.size()) return {};
  const uint8_t* const codec = read.take(kCodec.size());
  if (!codec || std::memcmp(codec, kCodec.data(), kCodec.size())) return {};
  const uint8_t version = read.byte();
  if (version > kNewestPayload || read.byte() != expected.shape.size()) return {};
  uint64_t n = 1;
  for (const uint64_t extent : expected.shape) {
    if (read.varint() != extent || extent == 0 || n > kMostValues / extent) return {};
    n *= extent;
  }
  const uint8_t* const bound = read.take(8);
  if (!bound) return {};
  Envelope found{{DType(source), expected.dtype, load<double>(bound), size_t(n), 1}, {}, {}, {}, {}};
  if (!(found.info.bound > 0) || !std::isfinite(found.info.bound)) return {};
  const uint64_t count = read.varint();
  if (count > n) return {};
  if (count) {
    if (!read_positions(read, n, count, found.patched)) return {};
    found.values = read.take(count * item_size(expected.dtype));
  }
  found.payload_bytes = size_t(read.varint());
  found.payload = read.take(found.payload_bytes);
  if (read.bad() || read.left() || !found.payload_bytes || found.payload[0] == 0) return {};
  if (load<uint32_t>(data + body) != uint32_t(xxh64(data, body))) return {};
  return found;
}

}  // namespace

bool decode_envelope(const ExpectedEnvelope& expected, void* out, unsigned threads) try {
  const auto found = read_envelope(expected);
  if (!found) return false;
  decode_bound(found->info, found->payload, found->payload_bytes, out, threads);
  const size_t size = item_size(expected.dtype);
  for (size_t i = 0; i < found->patched.size(); ++i) {
    std::memcpy(static_cast<uint8_t*>(out) + found->patched[i] * size, found->values + i * size, size);
  }
  return true;
} catch (const std::exception&) {
  return false;
}

bool decode_envelope_codes(const ExpectedEnvelope& expected, uint32_t bits, uint8_t* out, unsigned threads,
                           EnvelopeCodes& codes) try {
  if (expected.shape.size() != 2 || expected.shape[1] > kMaxColumns) return false;
  if (expected.shape[0] >= kMostCoded / expected.shape[1]) return false;
  auto found = read_envelope(expected);
  if (!found) return false;
  const auto columns = uint32_t(expected.shape[1]);
  found->info.columns = columns;
  Outside outside;
  codes.values = bits == 4 ? decode_packed_codes(found->info, found->payload, found->payload_bytes, out, threads, outside)
                           : decode_codes(found->info, found->payload, found->payload_bytes, out, threads);
  CodeValues& values = codes.values;
  if (values.first > 0 || values.first <= -int32_t(kMostCodes)) return false;
  if (values.steps.empty() && values.values.size() != values.n_codes) return false;
  if (!values.steps.empty() && values.steps.size() != expected.shape[values.by_row ? 0 : 1]) return false;
  const auto zero = uint32_t(-values.first);
  const Window window(bits == 4 ? zero : 0);
  const auto put_zero = [&](uint64_t place) {
    if (bits == 8) {
      out[place] = uint8_t(zero);
      return;
    }
    const size_t column = size_t(place % columns), shift = column % 2 * 4;
    uint8_t& pair = out[place / columns * row_bytes(columns, 4) + column / 2];
    pair = uint8_t((pair & ~(15 << shift)) | window.zero << shift);
  };
  with_dtype(expected.dtype, [&](auto t) {
    using T = decltype(t);
    if (values.steps.empty()) {
      std::vector<float>& table = codes.table;
      table.assign(std::max<size_t>(values.n_codes, zero + 1), 0.0f);
      std::transform(values.values.begin(), values.values.end(), table.begin(),
                     [](uint32_t pattern) { return T::value(typename T::Bits(pattern)); });
      if (bits == 4) {
        table.erase(table.begin(), table.begin() + window.start);
        table.resize(kWindow);
      }
    }
    // Both ascend; where the payload's patch has a place, its weight is the one.
    const size_t n_patches = found->patched.size() + outside.places.size();
    codes.patched.reserve(n_patches);
    codes.patch_weights.reserve(n_patches);
    size_t next = 0;
    const auto outside_before = [&](uint64_t place) {
      for (; next < outside.places.size() && outside.places[next] < place; ++next) {
        codes.patched.push_back(uint32_t(outside.places[next]));
        codes.patch_weights.push_back(values.template weight<T>(outside.codes[next], size_t(outside.places[next]), columns));
      }
    };
    for (size_t i = 0; i < found->patched.size(); ++i) {
      const uint64_t place = found->patched[i];
      outside_before(place);
      if (next < outside.places.size() && outside.places[next] == place) ++next;
      put_zero(place);
      codes.patched.push_back(uint32_t(place));
      codes.patch_weights.push_back(T::value(load<typename T::Bits>(found->values + i * sizeof(typename T::Bits))));
    }
    outside_before(~uint64_t(0));
  });
  values.first += window.start;
  return true;
} catch (const std::exception&) {
  return false;
}

}  // namespace moebound
