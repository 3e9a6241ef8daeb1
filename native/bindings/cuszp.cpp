// cuSZp's stream, for Python.
#include "bindings/shared.h"
#include "cuszp/codec.h"

namespace {

moebound::CuszpMode cuszp_mode(unsigned code) {
  if (code > 2) throw nb::value_error("mode code: expected 0 (fixed), 1 (plain) or 2 (outlier)");
  return moebound::CuszpMode(code);
}

float cuszp_bound(float bound) {
  if (!(bound >= 0x1p-126f && bound <= 0x1p125f)) throw nb::value_error("bound");
  return bound;
}

}  // namespace

void bind_cuszp(nb::module_& m) {
  m.def("cuszp_encode", [](AnyArray array, float bound, unsigned mode, bool whole_chunks, unsigned threads) {
    const auto source = dtype_of(array);
    const auto code = cuszp_mode(mode);
    const auto table = moebound::CuszpTable(whole_chunks);
    const float epsilon = cuszp_bound(bound);
    std::vector<uint8_t> stream;
    {
      const Away away;
      stream = moebound::encode_cuszp(source, array.data(), array.shape(0), epsilon, code, table, threads);
    }
    return nb::bytes(stream.data(), stream.size());
  }, "array"_a, "bound"_a, "mode"_a, "whole_chunks"_a, "threads"_a);

  m.def("cuszp_decode", [](nb::handle stream, WritableArray out, float bound, unsigned mode, bool whole_chunks,
                           unsigned threads) {
    const Buffer buffer(stream);
    const auto output = dtype_of(out);
    const auto code = cuszp_mode(mode);
    const auto table = moebound::CuszpTable(whole_chunks);
    const float epsilon = cuszp_bound(bound);
    const Away away;
    moebound::decode_cuszp(buffer.data(), buffer.size(), output, out.data(), out.shape(0), epsilon, code, table,
                           threads);
  }, "stream"_a, "out"_a, "bound"_a, "mode"_a, "whole_chunks"_a, "threads"_a);
}
