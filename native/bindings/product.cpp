// Matrices of codes: decoded to, computed with, and their weights. Products of plain weights.
#include "bindings/shared.h"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>

#include "product/product.h"

namespace {

template <class T>
using Flat = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A matrix that holds what it is made of.
class Codes {
 public:
  Codes(const Codes&) = delete;
  Codes(Flat<uint8_t> codes, unsigned bits, size_t rows, size_t columns, unsigned dtype, Flat<float> table, Flat<float> steps,
        bool by_row, Flat<float> factors, int32_t first, uint8_t zero, Flat<uint32_t> patched, Flat<float> patch_weights)
      : codes_(codes), steps_(steps), factors_(factors), patched_(patched), patch_weights_(patch_weights) {
    const bool scaled = table.size() == 0;
    std::copy_n(table.data(), std::min(table.size(), moebound::kCodeTable), table_);
    if (bits != 8 && bits != 4) throw nb::value_error("bits");
    const size_t row_bytes = columns ? (columns - 1) / (8 / bits) + 1 : 0;
    if (rows == 0 || columns == 0 || codes.size() / row_bytes != rows || codes.size() % row_bytes) {
      throw nb::value_error("codes");
    }
    const size_t n = rows * columns;
    if (zero >= 1u << bits) throw nb::value_error("zero");
    if (table.size() > 1u << bits) throw nb::value_error("table");
    if (scaled && steps.size() != (by_row ? rows : columns)) throw nb::value_error("steps");
    if (factors.size() && (!scaled || by_row || factors.size() != rows)) throw nb::value_error("factors");
    if (patch_weights.size() != patched.size()) throw nb::value_error("patch_weights");
    const uint32_t* const at = patched.data();
    for (size_t i = 0; i < patched.size(); ++i) {
      if (at[i] >= n || (i && at[i] <= at[i - 1])) throw nb::value_error("patched");
    }
    matrix_ = {codes.data(), bits, rows, columns, dtype_from(dtype), scaled ? nullptr : table_, table.size(), steps.data(), by_row,
               factors.size() ? factors.data() : nullptr, first, zero, at, patch_weights.data(), patched.size()};
  }
  const moebound::CodeMatrix& matrix() const { return matrix_; }

 private:
  Flat<uint8_t> codes_;
  float table_[moebound::kCodeTable] = {};
  Flat<float> steps_, factors_;
  Flat<uint32_t> patched_;
  Flat<float> patch_weights_;
  moebound::CodeMatrix matrix_;
};

// One of several products: matrix, first value of x, tokens, first value of out, values between tokens.
using Job = std::tuple<const Codes*, size_t, size_t, size_t, size_t>;

// One of several gated experts: gate, up or None, down, first value of x, tokens, first value of out.
using GatedJob = std::tuple<const Codes*, const Codes*, const Codes*, size_t, size_t, size_t>;

bool fits(size_t size, size_t first, size_t n_tokens, size_t row, size_t stride) {
  return first <= size && size - first >= row && stride >= row && (size - first - row) / stride >= n_tokens - 1;
}

}  // namespace

void bind_product(nb::module_& m) {
  m.def("bound_codes", [](nb::handle payload, nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> out,
                          unsigned source, unsigned output, double bound, unsigned threads) {
    const Buffer buffer(payload);
    const auto info = array_info(dtype_from(source), dtype_from(output), bound, out.shape(0), 1);
    moebound::CodeValues found;
    {
      const Away away;
      found = moebound::decode_codes(info, buffer.data(), buffer.size(), out.data(), threads);
    }
    return nb::make_tuple(found.n_codes, found.first, to_array(std::move(found.values)), found.by_row,
                          to_array(std::move(found.steps)), to_array(std::move(found.factors)));
  }, "payload"_a, "out"_a, "source"_a, "output"_a, "bound"_a, "threads"_a);

  nb::class_<Codes>(m, "Codes")
      .def(nb::init<Flat<uint8_t>, unsigned, size_t, size_t, unsigned, Flat<float>, Flat<float>, bool, Flat<float>, int32_t,
                    uint8_t, Flat<uint32_t>, Flat<float>>(),
           "codes"_a, "bits"_a, "rows"_a, "columns"_a, "dtype"_a, "table"_a, "steps"_a, "by_row"_a, "factors"_a, "first"_a,
           "zero"_a, "patched"_a, "patch_weights"_a)
      .def("weights", [](const Codes& self, WritableArray out, size_t first_row, unsigned threads) {
        const auto& matrix = self.matrix();
        const size_t n_rows = out.shape(0) / matrix.columns;
        if (first_row > matrix.rows || n_rows > matrix.rows - first_row) throw nb::value_error("first_row");
        if (dtype_of(out) != matrix.dtype || out.shape(0) % matrix.columns) throw nb::value_error("out");
        const Away away;
        moebound::weights_of_codes(matrix, first_row, first_row + n_rows, out.data(), threads);
      }, "out"_a, "first_row"_a, "threads"_a);

  // jobs: (matrix, x_first, n_tokens, out_first, stride); x: [n_tokens · columns] from x_first on; out: the first
  // token's from out_first on, tokens `stride` apart. No two may write to one place.
  m.def("products", [](const std::vector<Job>& jobs, AnyArray x, WritableArray out, unsigned threads) {
    const auto dtype = dtype_of(x);
    if (dtype_of(out) != dtype) throw nb::value_error("out");
    const size_t size = moebound::item_size(dtype);
    std::vector<moebound::Product> products;
    products.reserve(jobs.size());
    for (const auto& [codes, x_first, n_tokens, out_first, stride] : jobs) {
      if (!codes) throw nb::type_error("expected a matrix");
      const auto& matrix = codes->matrix();
      if (n_tokens == 0) continue;
      if (!fits(x.shape(0), x_first, n_tokens, matrix.columns, matrix.columns)) throw nb::value_error("x");
      if (!fits(out.shape(0), out_first, n_tokens, matrix.rows, stride)) throw nb::value_error("out");
      products.push_back({&matrix, static_cast<const uint8_t*>(x.data()) + x_first * size, n_tokens,
                          static_cast<uint8_t*>(out.data()) + out_first * size, stride});
    }
    const Away away;
    moebound::multiply(products.data(), products.size(), dtype, threads);
  }, "jobs"_a, "x"_a, "out"_a, "threads"_a);

  // jobs: (gate, up, down, x_first, n_tokens, out_first), as GatedExpert; x: [n_tokens · gate's columns] from x_first on;
  // out: [n_tokens · down's rows] from out_first on. No two may write to one place.
  m.def("gated_experts", [](const std::vector<GatedJob>& jobs, AnyArray x, WritableArray out, unsigned threads) {
    const auto dtype = dtype_of(x);
    if (dtype_of(out) != dtype) throw nb::value_error("out");
    const size_t size = moebound::item_size(dtype);
    std::vector<moebound::GatedExpert> experts;
    experts.reserve(jobs.size());
    for (const auto& [of_gate, of_up, of_down, x_first, n_tokens, out_first] : jobs) {
      if (!of_gate || !of_down) throw nb::type_error("gate and down: expected matrices");
      const auto &gate = of_gate->matrix(), &down = of_down->matrix();
      const auto* const up = of_up ? &of_up->matrix() : nullptr;
      if (up && (up->rows != gate.rows || up->columns != gate.columns)) throw nb::value_error("up");
      if (up ? gate.rows != down.columns : gate.rows % 2 || gate.rows / 2 != down.columns) throw nb::value_error("down");
      if (n_tokens == 0) continue;
      if (!fits(x.shape(0), x_first, n_tokens, gate.columns, gate.columns)) throw nb::value_error("x");
      if (!fits(out.shape(0), out_first, n_tokens, down.rows, down.rows)) throw nb::value_error("out");
      experts.push_back({&gate, up, &down, static_cast<const uint8_t*>(x.data()) + x_first * size, n_tokens,
                         static_cast<uint8_t*>(out.data()) + out_first * size});
    }
    const Away away;
    moebound::compute_gated(experts.data(), experts.size(), dtype, threads);
  }, "jobs"_a, "x"_a, "out"_a, "threads"_a);

  // Plain weights of bfloat16, [rows · columns], patterns, as is bias: [rows] or nothing. x: [n_tokens · columns], out:
  // [n_tokens · rows], both of one dtype.
  m.def("linear", [](Flat<uint16_t> weights, Flat<uint16_t> bias, AnyArray x, WritableArray out, size_t columns,
                     unsigned threads) {
    if (columns == 0 || weights.size() == 0 || weights.size() % columns) throw nb::value_error("weights");
    const auto matrix = moebound::plain_matrix(weights.data(), weights.size() / columns, columns);
    if (bias.size() && bias.size() != matrix.rows) throw nb::value_error("bias");
    if (x.shape(0) % columns) throw nb::value_error("x");
    const size_t n_tokens = x.shape(0) / columns;
    if (out.shape(0) / matrix.rows != n_tokens || out.shape(0) % matrix.rows) throw nb::value_error("out");
    const auto dtype = dtype_of(x);
    if (dtype_of(out) != dtype) throw nb::value_error("out");
    if (!n_tokens) return;
    const moebound::Product product{&matrix, x.data(), n_tokens, out.data(), matrix.rows, bias.size() ? bias.data() : nullptr};
    const Away away;
    moebound::multiply(&product, 1, dtype, threads);
  }, "weights"_a, "bias"_a, "x"_a, "out"_a, "columns"_a, "threads"_a);
}
