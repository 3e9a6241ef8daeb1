// Envelopes of codec `bound` in one call. Both return nothing for what the reference has to read instead.
#include "bindings/shared.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <functional>
#include <numeric>
#include <optional>

#include "base/status.h"
#include "bound/envelope.h"

namespace {

bool fits(const std::vector<uint64_t>& shape, size_t n) {
  return n && std::accumulate(shape.begin(), shape.end(), uint64_t(1), std::multiplies<>()) == n;
}

// Whether decoding into out would change what is being read.
bool overlap(const Buffer& data, const void* out, size_t n_bytes) {
  const std::less<const void*> before;
  const auto* const begin = static_cast<const uint8_t*>(out);
  return before(data.data(), begin + n_bytes) && before(begin, data.data() + data.size());
}

}  // namespace

void bind_envelope(nb::module_& m) {
  m.def("decode_envelope", [](nb::handle data, WritableArray out, const std::vector<uint64_t>& shape, unsigned threads) {
    const Buffer buffer(data);
    const auto dtype = dtype_of(out);
    if (!fits(shape, out.size()) || overlap(buffer, out.data(), out.nbytes())) return false;
    const Away away;
    return moebound::decode_envelope({buffer.data(), buffer.size(), shape, dtype}, out.data(), threads);
  }, "data"_a, "out"_a, "shape"_a, "threads"_a);

  m.def("decode_envelope_codes", [](nb::handle data, nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> out,
                                    const std::vector<uint64_t>& shape, unsigned dtype, unsigned bits,
                                    unsigned threads) -> nb::object {
    const Buffer buffer(data);
    const auto decoded = dtype_from(dtype);
    if (bits != 8 && bits != 4) throw nb::value_error("bits");
    if (shape.size() != 2 || !fits({shape[0], moebound::row_bytes(shape[1], bits)}, out.size())) return nb::none();
    if (overlap(buffer, out.data(), out.size())) return nb::none();
    moebound::EnvelopeCodes found;
    {
      const Away away;
      if (!moebound::decode_envelope_codes({buffer.data(), buffer.size(), shape, decoded}, bits, out.data(), threads,
                                           found)) {
        return nb::none();
      }
    }
    return nb::make_tuple(to_array(std::move(found.table)), to_array(std::move(found.values.steps)), found.values.by_row,
                          found.values.first, to_array(std::move(found.patched)), to_array(std::move(found.patch_weights)),
                          to_array(std::move(found.values.factors)));
  }, "data"_a, "out"_a, "shape"_a, "dtype"_a, "bits"_a, "threads"_a);

  // head: the first bytes of a payload of so many, of n weights. None where its tables do not say, or are further behind.
  m.def("bound_most_outside", [](nb::handle head, size_t n, size_t payload_bytes) -> std::optional<uint64_t> {
    const Buffer buffer(head);
    try {
      return moebound::most_outside(buffer.data(), buffer.size(), n, payload_bytes);
    } catch (const moebound::Corrupt&) {
      return {};
    }
  }, "head"_a, "n"_a, "payload_bytes"_a);
}
