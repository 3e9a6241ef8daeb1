// Holds codec `bound` and the judge on this machine against what another machine wrote, byte for byte.
//
//   check_frozen FILE
//
// FILE, of tests/native/frozen.py, is records of little-endian 64-bit words, then bytes:
//
//   source, output, n, columns, bits of the bound, weights of a segment
//   bytes of the originals (0: decode only), of the payload, of the decoded values
//   originals, payload, decoded values, and with originals: n_misses, the misses, 9 words of the judge
//
// With every instruction set: originals encode to the payload and the misses, the payload decodes to the
// values, and to codes that stand for them, and the judge says the same of both. Exit code 1 and a line on stderr at the first difference.
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/cpu.h"
#include "base/status.h"
#include "bound/codec.h"
#include "measure/compare.h"

using namespace moebound;

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "check_frozen: %s\n", what.c_str());
  std::exit(1);
}

class Reader {
 public:
  explicit Reader(std::vector<uint8_t> bytes) : bytes_(std::move(bytes)) {}
  bool at_end() const { return at_ == bytes_.size(); }
  uint64_t word() { return load<uint64_t>(take(8).data()); }
  std::vector<uint8_t> take(size_t n) {
    if (n > bytes_.size() - at_) fail("the file ends early");
    const auto from = bytes_.begin() + std::ptrdiff_t(at_);
    at_ += n;
    return {from, from + std::ptrdiff_t(n)};
  }
  std::vector<uint64_t> words(size_t n) {
    std::vector<uint64_t> found;
    for (size_t i = 0; i < n; ++i) found.push_back(word());
    return found;
  }

 private:
  std::vector<uint8_t> bytes_;
  size_t at_ = 0;
};

std::vector<uint64_t> judged(const ArrayInfo& info, const uint8_t* originals, const uint8_t* decoded) {
  const Comparison c = compare(info.source, originals, info.output, decoded, info.n, info.bound);
  const Stats s = stats(info.source, originals, info.n);
  const auto bits = [](double x) { return std::bit_cast<uint64_t>(x); };
  return {bits(c.max_abs_error), bits(c.square_sum), c.n_finite, c.n_broken, s.n_finite,
          bits(s.abs_sum),       bits(s.square_sum), bits(s.lowest), bits(s.highest)};
}

// Whether the payload decodes to codes that stand for these values. One of more codes than a byte has is
// refused, and says nothing.
bool codes_stand_for(const ArrayInfo& info, const std::vector<uint8_t>& payload, const std::vector<uint8_t>& decoded) {
  std::vector<uint8_t> codes(info.n);
  CodeValues stand_for;
  try {
    stand_for = decode_codes(info, payload.data(), payload.size(), codes.data(), 2);
  } catch (const Corrupt&) {
    return true;
  }
  return with_dtype(info.output, [&](auto t) {
    using T = decltype(t);
    for (size_t i = 0; i < info.n; ++i) {
      typename T::Bits value;
      if (stand_for.steps.empty()) {
        value = typename T::Bits(stand_for.values[codes[i]]);
      } else {
        const size_t row = i / info.columns;
        float step = stand_for.steps[stand_for.by_row ? row : i % info.columns];
        if (!stand_for.factors.empty()) step *= stand_for.factors[row];
        value = pattern_of<T>(float(int32_t(codes[i]) + stand_for.first) * step);
      }
      if (value != load<typename T::Bits>(decoded.data() + i * sizeof value)) return false;
    }
    return true;
  });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) fail("usage: check_frozen FILE");
  std::ifstream file(argv[1], std::ios::binary);
  if (!file) fail(std::string("cannot read ") + argv[1]);
  Reader reader({std::istreambuf_iterator<char>(file), {}});
  std::vector<Isa> isas;
  for (const Isa isa : all_isas()) {
    if (can_run(isa)) isas.push_back(isa);
  }
  size_t n_encoded = 0, n_decoded = 0;
  for (size_t record = 0; !reader.at_end(); ++record) {
    ArrayInfo info;
    info.source = DType(reader.word());
    info.output = DType(reader.word());
    info.n = reader.word();
    info.columns = uint32_t(reader.word());
    info.bound = std::bit_cast<double>(reader.word());
    EncodeOptions options;
    options.segment_weights = reader.word();
    const std::vector<uint64_t> sizes = reader.words(3);
    const auto originals = reader.take(sizes[0]), payload = reader.take(sizes[1]), decoded = reader.take(sizes[2]);
    const bool encodes = !originals.empty();
    const std::vector<uint64_t> misses = reader.words(encodes ? reader.word() : 0);
    const std::vector<uint64_t> judgement = reader.words(encodes ? 9 : 0);
    if (decoded.size() != info.n * item_size(info.output)) fail("sizes disagree");
    if (encodes && originals.size() != info.n * item_size(info.source)) fail("sizes disagree");
    for (const Isa isa : isas) {
      use_isa(isa_name(isa));
      const std::string where = std::string(isa_name(isa)) + ", record " + std::to_string(record);
      std::vector<uint8_t> out(decoded.size());
      decode_bound(info, payload.data(), payload.size(), out.data(), 2);
      if (out != decoded) fail(where + ": other values");
      if (!codes_stand_for(info, payload, decoded)) fail(where + ": codes of other values");
      ++n_decoded;
      if (!encodes) continue;
      const EncodedBound encoded = encode_bound(info, originals.data(), options);
      if (encoded.payload != payload) fail(where + ": other bytes");
      if (encoded.misses != misses) fail(where + ": other misses");
      if (judged(info, originals.data(), decoded.data()) != judgement) fail(where + ": judged differently");
      ++n_encoded;
    }
  }
  std::printf("%zu encoded to the same bytes, %zu decoded to the same values; paths:", n_encoded, n_decoded);
  for (const Isa isa : isas) std::printf(" %s", isa_name(isa));
  std::printf("\n");
}
