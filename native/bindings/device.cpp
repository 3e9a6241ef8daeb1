// What a decoder and an encoder on a GPU need of the kernel: parsing and choosing.
#include "bindings/shared.h"

#include "bound/encode_model.h"
#include "bound/payload.h"

namespace {

nb::dict to_dict(moebound::Layout layout) {
  nb::dict found;
  found["table_log"] = layout.table_log;
  found["lanes_log"] = layout.lanes_log;
  found["low_bits"] = layout.low_bits;
  found["n_tables"] = layout.n_tables;
  found["columns"] = layout.columns;
  found["rows_per_segment"] = layout.rows_per_segment;
  found["symbol_low"] = layout.symbol_low;
  found["scaled"] = layout.scaled;
  found["kappa"] = layout.steps.kappa;
  found["by_row"] = layout.steps.by_row;
  found["n_symbols"] = layout.n_symbols;
  found["class_base"] = layout.class_base;
  found["row_classes"] = to_array(std::move(layout.row_classes));
  found["column_classes"] = to_array(std::move(layout.column_classes));
  found["frequencies"] = to_array(std::move(layout.frequencies));
  found["segment_words"] = to_array(std::move(layout.segment_words));
  return found;
}

template <class T>
using Flat = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
std::vector<T> to_vector(const Flat<T>& a) {
  return {a.data(), a.data() + a.size()};
}

void expect_size(size_t found, size_t expected, const char* what) {
  if (found != expected) throw nb::value_error(what);
}

void bind_encode_model(nb::module_& m) {
  using moebound::EncodeModel;
  nb::class_<EncodeModel>(m, "EncodeModel")
      .def("__init__", [](EncodeModel* self, unsigned source, unsigned output, double bound, size_t n,
                          uint32_t columns, uint16_t largest, size_t segment_weights) {
        const auto info = array_info(dtype_from(source), dtype_from(output), bound, n, columns);
        if (bound == 0 || info.source == moebound::DType::kF32) throw nb::value_error("a 16-bit source, a bound");
        if (segment_weights == 0 || segment_weights > moebound::kMaxSegmentWeights) throw nb::value_error("segment_weights");
        const moebound::DefaultFloatEnvironment environment;
        new (self) EncodeModel(info, largest, segment_weights);
      }, "source"_a, "output"_a, "bound"_a, "n"_a, "columns"_a, "largest"_a, "segment_weights"_a)
      .def("alphabet_rows", [](const EncodeModel& self) { return to_array(self.alphabet_rows()); })
      .def("class_rows", [](const EncodeModel& self) { return to_array(self.class_rows()); })
      .def("choose_alphabet", [](EncodeModel& self, Flat<uint32_t> pattern_counts) {
        expect_size(pattern_counts.size(), moebound::kPatterns, "pattern_counts");
        std::vector<uint32_t> codes;
        {
          const Away away;
          codes = self.choose_alphabet(pattern_counts.data());
        }
        return to_array(std::move(codes));
      }, "pattern_counts"_a)
      .def("choose_classes", [](EncodeModel& self, Flat<uint64_t> row_sums, Flat<uint64_t> column_sums,
                                Flat<uint8_t> symbols, size_t n) {
        expect_size(symbols.size(), n, "symbols");
        expect_size(row_sums.size(), self.layout().rows(n), "row_sums");
        expect_size(column_sums.size(), self.layout().columns, "column_sums");
        const Away away;
        self.choose_classes({to_vector(row_sums), to_vector(column_sums)}, symbols.data());
      }, "row_sums"_a, "column_sums"_a, "symbols"_a, "n"_a)
      .def("choose_tables", [](EncodeModel& self, Flat<uint32_t> counts) {
        expect_size(counts.size(), size_t(self.layout().n_tables) * self.layout().n_symbols, "counts");
        const Away away;
        self.choose_tables(to_vector(counts));
      }, "counts"_a)
      .def("layout", [](const EncodeModel& self) { return to_dict(self.layout()); })
      .def("header", [](const EncodeModel& self, Flat<uint32_t> segment_words) {
        expect_size(segment_words.size(), self.n_segments(), "segment_words");
        const auto bytes = self.header(to_vector(segment_words));
        return nb::bytes(bytes.data(), bytes.size());
      }, "segment_words"_a);
}

}  // namespace

void bind_device(nb::module_& m) {
  bind_encode_model(m);

  m.def("bound_plan", [](nb::handle payload, size_t n, unsigned source, unsigned output, double bound) {
    const Buffer buffer(payload);
    const auto info = array_info(dtype_from(source), dtype_from(output), bound, n, 1);
    moebound::ParsedPayload parsed;
    {
      const Away away;
      parsed = moebound::parse_payload(info, buffer.data(), buffer.size());
    }
    nb::dict found = to_dict(std::move(parsed.layout));
    found["segments"] = to_array(std::move(parsed.segments));
    found["values"] = to_array(std::move(parsed.values));
    found["steps"] = to_array(std::move(parsed.steps));
    found["factors"] = to_array(std::move(parsed.factors));
    return found;
  }, "payload"_a, "n"_a, "source"_a, "output"_a, "bound"_a);
}
