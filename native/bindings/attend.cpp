// Attention of one token a text. Queries, keys and values are patterns of bfloat16, whose last axis alone has to be
// dense; `out` is flat, and of patterns or float32.
#include "bindings/shared.h"

#include <nanobind/stl/vector.h>

#include "attend/attend.h"

namespace {

using moebound::PlainRows;
using Matrix = nb::ndarray<const uint16_t, nb::ndim<2>, nb::device::cpu>;
using Cube = nb::ndarray<const uint16_t, nb::ndim<3>, nb::device::cpu>;

// Rows of the last two axes.
template <class SomeArray>
PlainRows rows_of(const SomeArray& a, const char* what) {
  const size_t n = a.ndim();
  if (a.shape(n - 1) == 0 || a.shape(n - 1) % moebound::kAttendGroup || a.stride(n - 1) != 1) throw nb::value_error(what);
  return {a.data(), ptrdiff_t(a.stride(n - 2)), a.shape(n - 1)};
}

moebound::Queries queries_of(const Cube& a) {
  rows_of(a, "queries");
  return {a.data(), ptrdiff_t(a.stride(0)), ptrdiff_t(a.stride(1)), a.shape(0), a.shape(1)};
}

moebound::DType checked(const WritableArray& out, size_t size) {
  const auto dtype = dtype_of(out);
  if (dtype == moebound::DType::kF16 || out.shape(0) != size) throw nb::value_error("out");
  return dtype;
}

}  // namespace

void bind_attend(nb::module_& m) {
  // queries: [n, heads, D]; of each text keys [shared, tokens, D] and values [shared, tokens, V]; out: [n · heads · V].
  m.def("attend", [](Cube queries, const std::vector<Cube>& keys, const std::vector<Cube>& values, WritableArray out,
                     float scale, unsigned threads) {
    const auto asked = queries_of(queries);
    const size_t n = asked.texts;
    if (keys.size() != n || values.size() != n || n == 0) throw nb::value_error("texts");
    const size_t shared = keys[0].shape(0);
    if (shared == 0 || asked.heads == 0 || asked.heads % shared) throw nb::value_error("heads");
    std::vector<moebound::Text> texts;
    for (size_t i = 0; i < n; ++i) {
      const auto key = rows_of(keys[i], "keys"), value = rows_of(values[i], "values");
      const size_t tokens = keys[i].shape(1);
      if (key.width != queries.shape(2) || keys[i].shape(0) != shared || tokens == 0) throw nb::value_error("keys");
      if (value.width != values[0].shape(2) || values[i].shape(0) != shared || values[i].shape(1) != tokens) {
        throw nb::value_error("values");
      }
      texts.push_back({{key, ptrdiff_t(keys[i].stride(0))}, {value, ptrdiff_t(values[i].stride(0))}, tokens});
    }
    const auto dtype = checked(out, n * asked.heads * values[0].shape(2));
    const Away away;
    moebound::attend(asked, texts, shared, scale, dtype, out.data(), threads);
  }, "queries"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(), "out"_a.noconvert(), "scale"_a, "threads"_a);

  // queries: [n, heads, nope + R]; of each text latents [tokens, rank] and turned [tokens, R]; weights:
  // [heads · (nope + V), rank], dense; out: [n · heads · V].
  m.def("attend_latent", [](Cube queries, const std::vector<Matrix>& latents, const std::vector<Matrix>& turned,
                            Matrix weights, WritableArray out, float scale, unsigned threads) {
    const auto asked = queries_of(queries);
    const size_t n = asked.texts;
    if (latents.size() != n || turned.size() != n || n == 0 || asked.heads == 0) throw nb::value_error("texts");
    const size_t rank = weights.shape(1), width = queries.shape(2), turn = turned[0].shape(1);
    if (rows_of(weights, "weights").stride != ptrdiff_t(rank) || weights.shape(0) % asked.heads) throw nb::value_error("weights");
    const size_t each = weights.shape(0) / asked.heads;
    if (turn >= width || width - turn >= each) throw nb::value_error("weights");
    std::vector<moebound::LatentText> texts;
    for (size_t i = 0; i < n; ++i) {
      const auto latent = rows_of(latents[i], "latents"), other = rows_of(turned[i], "turned");
      const size_t tokens = latents[i].shape(0);
      if (latent.width != rank || tokens == 0) throw nb::value_error("latents");
      if (other.width != turn || turned[i].shape(0) != tokens) throw nb::value_error("turned");
      texts.push_back({latent, other, tokens});
    }
    const size_t nope = width - turn, values = each - nope;
    const auto dtype = checked(out, n * asked.heads * values);
    const Away away;
    moebound::attend_latent(asked, texts, weights.data(), nope, values, scale, dtype, out.data(), threads);
  }, "queries"_a.noconvert(), "latents"_a.noconvert(), "turned"_a.noconvert(), "weights"_a.noconvert(),
     "out"_a.noconvert(), "scale"_a, "threads"_a);
}
