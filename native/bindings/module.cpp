// The module `_native`. The files of this folder alone know Python.
#include "bindings/shared.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include "base/cpu.h"
#include "base/status.h"
#include "base/xxh64.h"
#include "bound/codec.h"
#include "bound/grid.h"
#include "measure/compare.h"

namespace {

using Levels = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

moebound::Steps to_steps(const Levels& levels, const Levels& factors, uint16_t kappa, bool by_row) {
  return {by_row, kappa, {levels.data(), levels.data() + levels.size()},
          {factors.data(), factors.data() + factors.size()}};
}

}  // namespace

NB_MODULE(_native, m) {
  bind_attend(m);
  bind_cuszp(m);
  bind_device(m);
  bind_envelope(m);
  bind_product(m);

  m.def("xxh64", [](nb::handle data, uint64_t seed) {
    const Buffer buffer(data);
    const Away away;
    return moebound::xxh64(buffer.data(), buffer.size(), seed);
  }, "data"_a, "seed"_a = 0);

  m.def("compare", [](AnyArray original, AnyArray decoded, double bound) {
    same_length(original, decoded);
    const auto w = dtype_of(original), d = dtype_of(decoded);
    moebound::Comparison c;
    {
      const Away away;
      c = moebound::compare(w, original.data(), d, decoded.data(), original.shape(0), bound);
    }
    return std::make_tuple(c.max_abs_error, c.square_sum, c.n_finite, c.n_broken);
  }, "original"_a, "decoded"_a, "bound"_a);

  m.def("violations", [](AnyArray original, AnyArray decoded, double bound) {
    same_length(original, decoded);
    const auto w = dtype_of(original), d = dtype_of(decoded);
    std::vector<uint64_t> found;
    {
      const Away away;
      found = moebound::violations(w, original.data(), d, decoded.data(), original.shape(0), bound);
    }
    return to_array(std::move(found));
  }, "original"_a, "decoded"_a, "bound"_a);

  m.def("stats", [](AnyArray array) {
    const auto dtype = dtype_of(array);
    moebound::Stats s;
    {
      const Away away;
      s = moebound::stats(dtype, array.data(), array.shape(0));
    }
    return std::make_tuple(s.n_finite, s.abs_sum, s.square_sum, s.lowest, s.highest);
  }, "array"_a);

  m.def("bound_encode", [](AnyArray array, unsigned output, double bound, uint32_t columns, size_t segment_weights,
                           unsigned threads) {
    const auto info = array_info(dtype_of(array), dtype_from(output), bound, array.shape(0), columns);
    if (segment_weights == 0 || segment_weights > moebound::kMaxSegmentWeights) {
      throw nb::value_error("segment_weights");
    }
    moebound::EncodedBound encoded;
    {
      const Away away;
      encoded = moebound::encode_bound(info, array.data(), {segment_weights, threads});
    }
    return nb::make_tuple(nb::bytes(encoded.payload.data(), encoded.payload.size()),
                          to_array(std::move(encoded.misses)));
  }, "array"_a, "output"_a, "bound"_a, "columns"_a, "segment_weights"_a, "threads"_a);

  m.def("bound_encode_scaled", [](AnyArray array, Codes codes, Levels levels, Levels factor_levels, uint16_t kappa,
                                  bool by_row, unsigned output, double bound, uint32_t columns, size_t segment_weights, unsigned threads) {
    const auto info = array_info(dtype_of(array), dtype_from(output), bound, array.shape(0), columns);
    const size_t n_rows = (info.n + columns - 1) / columns, n_levels = by_row ? n_rows : columns;
    if (bound == 0) throw nb::value_error("bound");
    if (codes.size() != info.n) throw nb::value_error("codes");
    if (levels.size() != n_levels) throw nb::value_error("levels");
    if (factor_levels.size() && factor_levels.size() != (by_row ? columns : n_rows)) throw nb::value_error("factor_levels");
    if (segment_weights == 0 || segment_weights > moebound::kMaxSegmentWeights) {
      throw nb::value_error("segment_weights");
    }
    const auto steps = to_steps(levels, factor_levels, kappa, by_row);
    moebound::EncodedBound encoded;
    {
      const Away away;
      encoded = moebound::encode_scaled(info, array.data(), codes.data(), steps, {segment_weights, threads});
    }
    return nb::make_tuple(nb::bytes(encoded.payload.data(), encoded.payload.size()),
                          to_array(std::move(encoded.misses)));
  }, "array"_a, "codes"_a, "levels"_a, "factor_levels"_a, "kappa"_a, "by_row"_a, "output"_a, "bound"_a, "columns"_a,
     "segment_weights"_a, "threads"_a);

  m.def("bound_steps", [](Levels levels, Levels factor_levels, uint16_t kappa, double bound) {
    const auto steps = to_steps(levels, factor_levels, kappa, false);
    const moebound::DefaultFloatEnvironment environment;
    return nb::make_tuple(to_array(moebound::step_sizes(steps, bound)), to_array(moebound::step_factors(steps)));
  }, "levels"_a, "factor_levels"_a, "kappa"_a, "bound"_a);

  m.def("bound_decode", [](nb::handle payload, WritableArray out, unsigned source, double bound, unsigned threads) {
    const Buffer buffer(payload);
    const auto info = array_info(dtype_from(source), dtype_of(out), bound, out.shape(0), 1);
    const Away away;
    moebound::decode_bound(info, buffer.data(), buffer.size(), out.data(), threads);
  }, "payload"_a, "out"_a, "source"_a, "bound"_a, "threads"_a);

  m.def("grid", [](unsigned source, unsigned output, double bound, size_t n_cells, uint32_t up_to_source) {
    const moebound::DefaultFloatEnvironment environment;
    auto grid = moebound::make_grid(dtype_from(source), dtype_from(output), bound, n_cells, up_to_source);
    return nb::make_tuple(to_array(std::move(grid.values)), to_array(std::move(grid.edges)));
  }, "source"_a, "output"_a, "bound"_a, "n_cells"_a, "up_to_source"_a = ~0u);

  m.def("isa", [] { return std::string(moebound::isa_name(moebound::isa())); });
  m.def("use_isa", &moebound::use_isa, "name"_a);
  m.def("runnable_isas", [] {
    nb::list names;
    for (const auto isa : moebound::all_isas()) {
      if (moebound::can_run(isa)) names.append(moebound::isa_name(isa));
    }
    return names;
  });

  nb::exception<moebound::Corrupt>(m, "Corrupt", PyExc_ValueError);
}
