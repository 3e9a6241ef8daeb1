// What the bindings share. Arrays come in flat, contiguous and on the CPU; bfloat16 comes as its
// uint16 bits. Everything long runs without the GIL.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <limits>
#include <vector>

#include "base/float_env.h"
#include "bound/codec.h"
#include "bound/layout.h"

namespace nb = nanobind;
using namespace nb::literals;

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

inline void same_length(const AnyArray& a, const AnyArray& b) {
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

inline moebound::ArrayInfo array_info(moebound::DType source, moebound::DType output, double bound, size_t n,
                               uint32_t columns) {
  if (!(bound >= 0) || bound > std::numeric_limits<double>::max()) throw nb::value_error("bound");
  if (bound == 0 && (source != output || source == moebound::DType::kF32)) {
    throw nb::value_error("an exact copy: expected one 16-bit dtype");
  }
  if (n == 0 || columns == 0 || columns > moebound::kMaxColumns) throw nb::value_error("size");
  return {source, output, bound, n, columns};
}

inline moebound::DType dtype_from(unsigned code) {
  if (code > 2) throw nb::value_error("dtype code: expected 0 (BF16), 1 (F16) or 2 (F32)");
  return moebound::DType(code);
}

template <class T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> to_array(std::vector<T> values) {
  auto* kept = new std::vector<T>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::ndarray<nb::numpy, T, nb::ndim<1>>(kept->data(), {kept->size()}, owner);
}

// The bindings of one file each: attention of single tokens in attend.cpp, cuszp.cpp, what a GPU needs in
// device.cpp, whole envelopes in envelope.cpp, matrices of codes in product.cpp.
void bind_attend(nb::module_& m);
void bind_cuszp(nb::module_& m);
void bind_device(nb::module_& m);
void bind_envelope(nb::module_& m);
void bind_product(nb::module_& m);
