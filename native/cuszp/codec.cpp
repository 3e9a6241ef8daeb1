#include "cuszp/codec.h"

#include <algorithm>
#include <string>

#include "base/cpu.h"
#include "base/parallel.h"
#include "base/status.h"
#include "cuszp/paths.h"

namespace moebound {
namespace {

// With AVX2 the decoder writes about as fast as memory takes it: AVX-512 would have little to add.
CuszpPath path() {
#ifdef MOEBOUND_X86
  if (isa() != Isa::kScalar && can_run(Isa::kAvx2)) return cuszp_avx2();
#endif
  return cuszp_scalar();
}

size_t ceil_divide(size_t a, size_t b) { return a / b + (a % b ? 1 : 0); }

// Values of chunk c.
size_t values_in(size_t n, size_t c) { return std::min(kCuszpChunk, n - c * kCuszpChunk); }

// Bytes of the table of rates.
size_t table_bytes(size_t n, CuszpTable table) {
  return table == CuszpTable::kOfChunks ? ceil_divide(n, kCuszpChunk) * kCuszpChunkBlocks : ceil_divide(n, kCuszpBlock);
}

// Turns sizes into begins, the first of them `begin`; returns the end.
size_t begins_from(std::vector<size_t>& sizes, size_t begin) {
  for (size_t& size : sizes) {
    const size_t end = begin + size;
    size = begin;
    begin = end;
  }
  return begin;
}

// Bytes of the payload of blocks with these codes. Throws Corrupt on codes that no encoder writes.
size_t payload_bytes(const uint8_t* codes, size_t n_blocks, CuszpMode mode) {
  size_t n_bytes = 0;
  for (size_t b = 0; b < n_blocks; ++b) {
    const uint8_t code = codes[b];
    const bool known = code < 32 || (mode == CuszpMode::kOutlier && code >= 0x80);
    if (!known) throw Corrupt("rate byte " + std::to_string(code) + ", which no block of this mode has");
    n_bytes += CuszpRate::from_code(code).n_bytes();
  }
  return n_bytes;
}

}  // namespace

std::vector<uint8_t> encode_cuszp(DType source, const void* values, size_t n, float bound, CuszpMode mode,
                                  CuszpTable table, unsigned threads) {
  const CuszpPath run = path();
  const CuszpCoding coding(bound, mode);
  const size_t n_chunks = ceil_divide(n, kCuszpChunk), n_table = table_bytes(n, table);
  const auto* const bytes = static_cast<const uint8_t*>(values);
  const size_t stride = kCuszpChunk * item_size(source);
  std::vector<uint8_t> stream(n_table);
  std::vector<size_t> begins(n_chunks);
  for_each_index(n_chunks, threads, [&](size_t c) {
    begins[c] = run.measure(source, bytes + c * stride, values_in(n, c), coding, &stream[c * kCuszpChunkBlocks]);
  });
  stream.resize(begins_from(begins, n_table));
  for_each_index(n_chunks, threads, [&](size_t c) {
    run.write(source, bytes + c * stride, values_in(n, c), coding, &stream[c * kCuszpChunkBlocks],
              stream.data() + begins[c]);
  });
  return stream;
}

void decode_cuszp(const uint8_t* stream, size_t n_bytes, DType output, void* out, size_t n, float bound, CuszpMode mode,
                  CuszpTable table, unsigned threads) {
  const size_t n_chunks = ceil_divide(n, kCuszpChunk), n_table = table_bytes(n, table);
  if (n_bytes < n_table) {
    throw Corrupt(std::to_string(n_bytes) + " bytes, where the table of rates alone has " + std::to_string(n_table));
  }
  std::vector<size_t> begins(n_chunks);
  for (size_t c = 0; c < n_chunks; ++c) {
    begins[c] = payload_bytes(stream + c * kCuszpChunkBlocks, ceil_divide(values_in(n, c), kCuszpBlock), mode);
  }
  const auto not_zero = [](uint8_t code) { return code != 0; };
  if (std::any_of(stream + ceil_divide(n, kCuszpBlock), stream + n_table, not_zero)) {
    throw Corrupt("a rate other than 0 behind the last block");
  }
  const size_t end = begins_from(begins, n_table);
  if (end != n_bytes) {
    throw Corrupt(std::to_string(n_bytes) + " bytes, where the rates say " + std::to_string(end));
  }
  const CuszpPath run = path();
  const CuszpCoding coding(bound, mode);
  const size_t stride = kCuszpChunk * item_size(output);
  for_each_index(n_chunks, threads, [&](size_t c) {
    run.decode(output, static_cast<uint8_t*>(out) + c * stride, values_in(n, c), coding,
               stream + c * kCuszpChunkBlocks, stream + begins[c]);
  });
}

}  // namespace moebound
