// Reads numpy arrays without ceremony: a kernel call takes a dozen of them and may not spend microseconds on that.
//
// Only struct fields of numpy's ABI (2.0 and later) are touched; no function of its C API is needed.
#pragma once

#include <nanobind/nanobind.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/ndarraytypes.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace chandra {

// A borrowed numpy array whose last dimension is contiguous.
class Array {
 public:
  explicit Array(nanobind::handle object) : array_(reinterpret_cast<PyArrayObject*>(object.ptr())) {
    if (!PyObject_TypeCheck(object.ptr(), type())) throw nanobind::type_error("expected a numpy array");
    if (!(PyArray_FLAGS(array_) & NPY_ARRAY_ALIGNED) || (ndim() > 0 && dim(-1) > 1 && stride(-1) != itemsize()))
      throw std::invalid_argument("expected an aligned array whose last dimension is contiguous");
  }

  // numpy.ndarray. The module asks for it first: an import by two threads at once could wait for each other.
  static PyTypeObject* type() {
    static const nanobind::handle found =
        nanobind::object(nanobind::module_::import_("numpy").attr("ndarray")).release();
    return reinterpret_cast<PyTypeObject*>(found.ptr());
  }

  int ndim() const { return PyArray_NDIM(array_); }
  int64_t dim(int i) const { return PyArray_DIM(array_, i < 0 ? i + ndim() : i); }
  int64_t stride(int i) const { return PyArray_STRIDE(array_, i < 0 ? i + ndim() : i); }  // bytes
  int64_t itemsize() const { return PyArray_DESCR(array_)->elsize; }
  char kind() const { return PyArray_DESCR(array_)->kind; }  // 'f', 'i', 'u'
  bool contiguous() const { return PyArray_FLAGS(array_) & NPY_ARRAY_C_CONTIGUOUS; }
  void* data() const { return PyArray_DATA(array_); }

  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim(); ++i) n *= dim(i);
    return n;
  }

  // The elements as T; throws std::invalid_argument if they are of another type.
  template <class T>
  T* as() const {
    constexpr char wanted = std::is_floating_point_v<T> ? 'f' : std::is_signed_v<T> ? 'i' : 'u';
    if (kind() != wanted || itemsize() != sizeof(T)) throw std::invalid_argument("an array has the wrong dtype");
    return static_cast<T*>(data());
  }

  // The same for a C-contiguous array of exactly this many elements.
  template <class T>
  T* as(int64_t elements) const {
    if (!contiguous() || size() != elements) throw std::invalid_argument("an array has the wrong shape");
    return as<T>();
  }

 private:
  PyArrayObject* array_;
};

}  // namespace chandra
