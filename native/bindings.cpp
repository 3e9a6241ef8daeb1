// The one file that knows Python. Arrays come in flat, contiguous and on the CPU; bfloat16 comes
// as its uint16 bits. Everything long runs without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <limits>

#include "bound.h"
#include "bound_layout.h"
#include "compare.h"
#include "cpu.h"
#include "cuszp.h"
#include "float_env.h"
#include "grid.h"
#include "status.h"
#include "xxh64.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using AnyArray = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WritableArray = nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class SomeArray>
moebound::DType dtype_of(const SomeArray& a) {
  using Code = nb::dlpack::dtype_code;
  const auto type = a.dtype();
  if (type.code == uint8_t(Code::UInt) && type.bits == 16) return moebound::DType::kBF16;
  if (type.code == uint8_t(Code::Float) && type.bits == 16) return moebound::DType::kF16;
  if (type.code == uint8_t(Code::Float) && type.bits == 32) return moebound::DType::kF32;
  throw nb::type_error("expected uint16 (bfloat16 bits), float16 or float32");
}

void same_length(const AnyArray& a, const AnyArray& b) {
  if (a.shape(0) != b.shape(0)) throw nb::value_error("arrays of different length");
}

// For the length of a kernel call: no GIL, and the default floating-point environment.
struct Away {
  nb::gil_scoped_release release;
  moebound::DefaultFloatEnvironment environment;
};

// Holds a Py_buffer of bytes, bytearray or memoryview.
class Buffer {
 public:
  explicit Buffer(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { PyBuffer_Release(&view_); }
  const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
  size_t size() const { return size_t(view_.len); }

 private:
  Py_buffer view_;
};

moebound::ArrayInfo array_info(moebound::DType source, moebound::DType output, double bound, size_t n,
                               uint32_t columns) {
  if (!(bound >= 0) || bound > std::numeric_limits<double>::max()) throw nb::value_error("bound");
  if (bound == 0 && (source != output || source == moebound::DType::kF32)) {
    throw nb::value_error("an exact copy: expected one 16-bit dtype");
  }
  if (n == 0 || columns == 0 || columns > moebound::kMaxColumns) throw nb::value_error("size");
  return {source, output, bound, n, columns};
}

moebound::DType dtype_from(unsigned code) {
  if (code > 2) throw nb::value_error("dtype code: expected 0 (BF16), 1 (F16) or 2 (F32)");
  return moebound::DType(code);
}

moebound::CuszpMode cuszp_mode(unsigned code) {
  if (code > 2) throw nb::value_error("mode code: expected 0 (fixed), 1 (plain) or 2 (outlier)");
  return moebound::CuszpMode(code);
}

float cuszp_bound(float bound) {
  if (!(bound >= 0x1p-126f && bound <= 0x1p125f)) throw nb::value_error("bound");
  return bound;
}

template <class T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> to_array(std::vector<T> values) {
  auto* kept = new std::vector<T>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::ndarray<nb::numpy, T, nb::ndim<1>>(kept->data(), {kept->size()}, owner);
}

}  // namespace

NB_MODULE(_native, m) {
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

  m.def("bound_decode", [](nb::handle payload, WritableArray out, unsigned source, double bound, unsigned threads) {
    const Buffer buffer(payload);
    const auto info = array_info(dtype_from(source), dtype_of(out), bound, out.shape(0), 1);
    const Away away;
    moebound::decode_bound(info, buffer.data(), buffer.size(), out.data(), threads);
  }, "payload"_a, "out"_a, "source"_a, "bound"_a, "threads"_a);

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
