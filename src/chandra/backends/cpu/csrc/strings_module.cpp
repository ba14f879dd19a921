#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "strings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace chandra {
namespace {

// Bytes of a Python object that are not copied; it cannot be resized or closed while they are held.
class Held {
 public:
  explicit Held(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_SIMPLE)) throw nb::python_error();
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { PyBuffer_Release(&buffer_); }
  const char* data() const { return static_cast<const char*>(buffer_.buf); }
  size_t size() const { return static_cast<size_t>(buffer_.len); }

 private:
  Py_buffer buffer_;
};

std::string_view view(const nb::bytes& bytes) { return {bytes.c_str(), bytes.size()}; }

struct HeldStrings {
  HeldStrings(nb::handle text, int64_t count) : held(text), strings(held.data(), held.size(), count) {}

  Held held;
  Strings strings;
};

}  // namespace

void register_strings(nb::module_& m) {
  nb::class_<HeldStrings>(m, "Strings", "Strings in one text, each after its length in 8 bytes (little-endian).")
      .def(nb::init<nb::handle, int64_t>(), "text"_a, "count"_a, "Raises ValueError if there are fewer in the text.")
      .def("__len__", [](const HeldStrings& s) { return s.strings.count(); })
      .def("__getitem__", [](const HeldStrings& s, int64_t index) {
        if (index < 0 || index >= s.strings.count()) throw nb::index_error("no such string");
        const std::string_view found = s.strings.at(index);
        return nb::bytes(found.data(), found.size());
      })
      .def("find", [](const HeldStrings& s, const nb::bytes& wanted) -> std::optional<int64_t> {
        const int64_t index = s.strings.find(view(wanted));
        if (index < 0) return std::nullopt;
        return index;
      }, "The position of the first that is equal, or None.")
      .def("holding", [](const HeldStrings& s, const nb::bytes& part) { return s.strings.holding(view(part)); },
           "The positions of those that hold these bytes behind their first byte.");
}

}  // namespace chandra
