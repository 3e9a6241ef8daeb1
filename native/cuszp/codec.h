// Codec `cuszp`: the published 1-D stream of cuSZp (docs/format-cuszp.md), written anew.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/dtype.h"

namespace moebound {

// The numbers are those of the published library.
enum class CuszpMode : uint8_t { kFixed = 0, kPlain = 1, kOutlier = 2 };

// Whether the table of rates is filled up with zeros to whole chunks of 1024 blocks, as published.
enum class CuszpTable : bool { kOfBlocks = false, kOfChunks = true };

// The stream of n patterns of dtype source. bound: ε, 2^-126 to 2^125. NaN and ±Inf are coded as 0,
// what is far out as the last bin. The same bytes on every machine and for any thread count.
std::vector<uint8_t> encode_cuszp(DType source, const void* values, size_t n, float bound, CuszpMode mode,
                                  CuszpTable table, unsigned threads);

// Writes n patterns of dtype output, rounded to the nearest. Throws Corrupt on bytes that no encoder
// makes; checks the sum of all rates against n_bytes before it reads what they stand for.
void decode_cuszp(const uint8_t* stream, size_t n_bytes, DType output, void* out, size_t n, float bound,
                  CuszpMode mode, CuszpTable table, unsigned threads);

}  // namespace moebound
