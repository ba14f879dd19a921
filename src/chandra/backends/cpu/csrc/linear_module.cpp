// The Python face of the products. Weights, norms and experts are read from the dataclasses of chandra.ops.contracts.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <array>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "array.h"
#include "linear.h"

namespace nb = nanobind;

namespace chandra {
namespace {

constexpr size_t kMaxLinears = 8;  // of one op

struct Shape {
  int64_t experts, rows, columns;
};

Shape read_shape(const nb::tuple& shape) {
  if (shape.size() != 2 && shape.size() != 3) throw std::invalid_argument("a weight has two or three dimensions");
  const bool three = shape.size() == 3;
  const Shape s{three ? nb::cast<int64_t>(shape[0]) : 1, nb::cast<int64_t>(shape[three ? 1 : 0]),
                nb::cast<int64_t>(shape[three ? 2 : 1])};
  if (s.experts < 1 || s.rows < 1 || s.columns < 1) throw std::invalid_argument("a weight has no empty dimensions");
  return s;
}

// A stored part, of the size its format and shape ask for.
const void* read_part(const nb::dict& parts, const char* name, int64_t bytes) {
  if (!parts.contains(name)) throw std::invalid_argument(std::string("the weight has no part ") + name);
  const Array part(parts[name]);
  if (!part.contiguous() || part.size() * part.itemsize() != bytes)
    throw std::invalid_argument(std::string("a part of the weight has the wrong size: ") + name);
  return part.data();
}

Source read_source(const std::string& format, const Shape& s, const nb::dict& parts) {
  const Layout layout = Weight::layout_of(format, s.columns);
  const int64_t rows = s.experts * s.rows, values = rows * s.columns;
  Source source{.layout = layout, .rows = rows, .columns = s.columns};
  const bool nf4 = format == "nf4" || format == "nf4-dq";
  const auto data = [&](int64_t bytes) { source.data = static_cast<const uint8_t*>(read_part(parts, "data", bytes)); };
  if (nf4) {
    const int64_t blocks = (values + 63) / 64;
    data((values + 1) / 2);
    source.unaligned_nf4 = layout != Layout::nf4;
    source.absmax = read_part(parts, "absmax", blocks * (format == "nf4" ? 4 : 1));
    if (format == "nf4-dq") {
      source.nested_absmax = static_cast<const float*>(read_part(parts, "nested_absmax", (blocks + 255) / 256 * 4));
      source.nested_offset = static_cast<const float*>(read_part(parts, "nested_offset", 4));
    }
  } else if (layout == Layout::int8) {
    data(values);
    source.scales = read_part(parts, "scales", rows * 4);
  } else if (layout >= Layout::int4_g32) {
    data(values / 2);
    source.scales = read_part(parts, "scales", values / panel_size(layout).columns * 2);
    source.zeros = read_part(parts, "zeros", values / panel_size(layout).columns * 2);
  } else {
    data(values / panel_size(layout).columns * stored_block_bytes(layout));
  }
  return source;
}

// The bytes of a uint8 array that is to hold the panels of a weight.
uint8_t* read_panels(nb::handle array, int64_t bytes) {
  const Array memory(array);
  uint8_t* data = memory.as<uint8_t>(bytes);
  if (reinterpret_cast<uintptr_t>(data) % 64) throw std::invalid_argument("panels begin at multiples of 64 bytes");
  return data;
}

int64_t repacked_nbytes(const std::string& format, const nb::tuple& shape) {
  const Shape s = read_shape(shape);
  return Weight::repacked_bytes(Weight::layout_of(format, s.columns), s.experts, s.rows, s.columns);
}

void bind_pack_weight(const std::string& format, const nb::tuple& shape, const nb::dict& parts, nb::handle out) {
  const Shape s = read_shape(shape);
  const Source source = read_source(format, s, parts);
  uint8_t* to = read_panels(out, repacked_nbytes(format, shape));
  nb::gil_scoped_release release;
  Weight::pack(source, s.experts, s.rows, to, false);
}

// The weight and the arrays it reads: the stored parts, or panels in memory of others.
struct Handle {
  Handle(const std::string& format, const nb::tuple& shape, const nb::dict& parts, bool repack, bool mapped)
      : Handle(read_source(format, read_shape(shape), parts), format, shape, parts,
               repack ? (mapped ? Repack::later : Repack::now) : mapped ? Repack::lookup : Repack::never) {}

  Handle(const Source& source, const std::string& format, const nb::tuple& shape, const nb::dict& parts, Repack when)
      : shape(shape), format(format) {
    const Shape s = read_shape(shape);
    for (auto [name, part] : parts) stored_bytes += Array(part).size() * Array(part).itemsize();
    const bool grows = source.unaligned_nf4;  // a panel of floats for every four bits
    {
      nb::gil_scoped_release release;
      weight = std::make_unique<Weight>(source, s.experts, s.rows, grows ? Repack::never : when);
    }
    if (weight->in_place()) kept = parts;
  }

  Handle(const std::string& format, const nb::tuple& shape, nb::handle panels)
      : shape(shape), kept(nb::borrow(panels)), format(format) {
    const Shape s = read_shape(shape);
    weight = std::make_unique<Weight>(Weight::layout_of(format, s.columns), s.experts, s.rows, s.columns,
                                      read_panels(panels, repacked_nbytes(format, shape)));
  }

  int64_t nbytes() const {
    return weight->in_place() && !weight->repacks() ? stored_bytes : weight->repacked_bytes();
  }
  std::string kernel() const {
    return std::string(kernels().name) + " " + format + (weight->in_place() ? " in place" : " panels");
  }

  std::unique_ptr<Weight> weight;
  nb::tuple shape;
  nb::object kept;
  std::string format;
  int64_t stored_bytes = 0;
};

// Names of attributes, looked up once.
#define CHANDRA_NAME(name)                                                           \
  PyObject* name() {                                                                 \
    static PyObject* const interned = PyUnicode_InternFromString(#name);             \
    return interned;                                                                 \
  }
namespace names {
CHANDRA_NAME(weight)
CHANDRA_NAME(handle)
CHANDRA_NAME(bias)
CHANDRA_NAME(eps)
CHANDRA_NAME(kind)
CHANDRA_NAME(router)
CHANDRA_NAME(gate)
CHANDRA_NAME(up)
CHANDRA_NAME(down)
CHANDRA_NAME(top_k)
CHANDRA_NAME(normalize)
CHANDRA_NAME(activation)
}  // namespace names
#undef CHANDRA_NAME

nb::object get(nb::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw nb::python_error();
  return nb::steal(value);
}

float* floats(nb::handle array, int64_t n) { return Array(array).as<float>(n); }
const float* optional_floats(nb::handle array, int64_t n) { return array.is_none() ? nullptr : floats(array, n); }

// x (n, columns): the number of rows.
int64_t rows_of(const Array& x, int64_t columns) {
  if (x.ndim() != 2 || x.dim(1) != columns) throw std::invalid_argument("x has the wrong number of columns");
  return x.dim(0);
}

struct OptionalNorm {
  OptionalNorm(nb::handle object, int64_t width) : given(!object.is_none()) {
    if (!given) return;
    norm.weight = floats(get(object, names::weight()), width);
    norm.bias = optional_floats(get(object, names::bias()), width);
    norm.eps = static_cast<float>(nb::cast<double>(get(object, names::eps())));
    norm.layer = nb::cast<std::string_view>(get(object, names::kind())) == "layer";
  }
  const Norm* get_norm() const { return given ? &norm : nullptr; }

  bool given;
  Norm norm{};
};

const Weight* read_weight(nb::handle contract_weight) {
  const Weight* weight = nb::cast<Handle&>(get(contract_weight, names::handle())).weight.get();
  if (weight->due()) {
    nb::gil_scoped_release release;
    weight->repack();
  }
  return weight;
}
Linear read_linear(nb::handle linear) {
  const Weight* weight = read_weight(get(linear, names::weight()));
  if (weight->experts() != 1) throw std::invalid_argument("a linear has one weight, not one for each expert");
  return {weight, optional_floats(get(linear, names::bias()), weight->rows())};
}

Activation read_activation(std::string_view name) {
  constexpr std::pair<std::string_view, Activation> kNames[] = {
      {"silu", Activation::silu}, {"gelu", Activation::gelu}, {"gelu_tanh", Activation::gelu_tanh},
      {"relu", Activation::relu}, {"sigmoid", Activation::sigmoid}};
  for (const auto& [known, value] : kNames)
    if (known == name) return value;
  throw std::invalid_argument("unknown activation " + std::string(name));
}

void bind_embed(nb::handle ids, const Handle& table, double scale, nb::handle out) {
  const Array id_array(ids);
  const int64_t n = id_array.size();
  const int32_t* tokens = id_array.as<int32_t>(n);
  float* to = floats(out, n * table.weight->columns());
  nb::gil_scoped_release release;
  embed(tokens, n, *table.weight, static_cast<float>(scale), to);
}

void bind_norm_linear(nb::handle x, nb::handle norm, const nb::tuple& linears, const nb::tuple& outs) {
  std::array<Linear, kMaxLinears> read;
  std::array<float*, kMaxLinears> to;
  const size_t count = linears.size();
  if (count == 0 || count > kMaxLinears || outs.size() != count)
    throw std::invalid_argument("one to eight linears, and an out for each");
  const Array in(x);
  const int64_t columns = in.dim(-1), n = rows_of(in, columns);
  for (size_t i = 0; i < count; ++i) {
    read[i] = read_linear(linears[i]);
    if (read[i].weight->columns() != columns) throw std::invalid_argument("x has the wrong number of columns");
    to[i] = floats(outs[i], n * read[i].weight->rows());
  }
  const OptionalNorm norm_read(norm, columns);
  const float* from = in.as<float>(n * columns);
  nb::gil_scoped_release release;
  norm_linear(from, n, norm_read.get_norm(), {read.data(), count}, to.data());
}

void bind_gate_up(nb::handle x, nb::handle norm, nb::handle gate, nb::handle up, std::string_view activation,
                  nb::handle out) {
  const Linear up_read = read_linear(up);
  const Linear gate_read = gate.is_none() ? up_read : read_linear(gate);
  const int64_t columns = up_read.weight->columns(), rows = up_read.weight->rows();
  if (gate_read.weight->columns() != columns || gate_read.weight->rows() != rows)
    throw std::invalid_argument("gate and up have different shapes");
  const Array in(x);
  const int64_t n = rows_of(in, columns);
  const OptionalNorm norm_read(norm, columns);
  const Activation kind = read_activation(activation);
  const float* from = in.as<float>(n * columns);
  float* to = floats(out, n * rows);
  const bool gated = !gate.is_none();
  nb::gil_scoped_release release;
  gate_up(from, n, norm_read.get_norm(), gated ? &gate_read : nullptr, up_read, kind, to);
}

void bind_linear_add(nb::handle x, nb::handle linear, nb::handle post_norm, nb::handle residual) {
  const Linear read = read_linear(linear);
  const Array in(x);
  const int64_t columns = read.weight->columns(), rows = read.weight->rows(), n = rows_of(in, columns);
  const OptionalNorm norm_read(post_norm, rows);
  const float* from = in.as<float>(n * columns);
  float* to = floats(residual, n * rows);
  nb::gil_scoped_release release;
  linear_add(from, n, read, norm_read.get_norm(), to);
}

void bind_moe_add(nb::handle x, nb::handle norm, nb::handle experts, nb::handle post_norm, nb::handle residual) {
  Experts read{.router = read_linear(get(experts, names::router())),
               .gate = read_weight(get(experts, names::gate())),
               .up = read_weight(get(experts, names::up())),
               .down = read_weight(get(experts, names::down())),
               .top_k = nb::cast<int64_t>(get(experts, names::top_k())),
               .normalize = nb::cast<bool>(get(experts, names::normalize())),
               .activation = read_activation(nb::cast<std::string_view>(get(experts, names::activation())))};
  const Array in(x);
  const int64_t hidden = read.up->columns(), n = rows_of(in, hidden), count = read.router.weight->rows();
  const auto has = [&](const Weight* w, int64_t rows, int64_t columns) {
    return w->experts() == count && w->rows() == rows && w->columns() == columns;
  };
  const int64_t ff = read.up->rows();
  if (!has(read.gate, ff, hidden) || !has(read.up, ff, hidden) || !has(read.down, hidden, ff) ||
      read.router.weight->columns() != hidden)
    throw std::invalid_argument("router, gate, up and down do not fit together");
  if (read.top_k < 1 || read.top_k > count) throw std::invalid_argument("top_k is not between 1 and the experts");
  const OptionalNorm norm_read(norm, hidden), post_read(post_norm, hidden);
  const float* from = in.as<float>(n * hidden);
  float* to = floats(residual, n * hidden);
  nb::gil_scoped_release release;
  moe_add(from, n, norm_read.get_norm(), read, post_read.get_norm(), to);
}

void bind_logits(nb::handle x, nb::handle rows, nb::handle norm, nb::handle head, double scale, nb::handle softcap,
                 nb::handle out) {
  const Linear read = read_linear(head);
  const Array in(x), row_array(rows);
  const int64_t columns = read.weight->columns(), n = row_array.size(), total = rows_of(in, columns);
  const int32_t* wanted = row_array.as<int32_t>(n);
  for (int64_t i = 0; i < n; ++i)
    if (wanted[i] < 0 || wanted[i] >= total) throw std::out_of_range("a row of the logits is not in x");
  const OptionalNorm norm_read(norm, columns);
  if (!norm_read.given) throw std::invalid_argument("the logits need a norm");
  const float* from = in.as<float>(total * columns);
  float* to = floats(out, n * read.weight->rows());
  const double cap = softcap.is_none() ? 0.0 : nb::cast<double>(softcap);
  nb::gil_scoped_release release;
  logits(from, wanted, n, norm_read.norm, read, static_cast<float>(scale), static_cast<float>(cap), to);
}

}  // namespace

void register_linear(nb::module_& m) {
  nb::class_<Handle>(m, "Weight", "A weight the kernels can multiply with: repacked into panels, or read in place.")
      .def(nb::init<const std::string&, const nb::tuple&, const nb::dict&, bool, bool>(), nb::arg("format"),
           nb::arg("shape"), nb::arg("parts"), nb::arg("repack") = true, nb::arg("mapped") = false,
           "`parts` are numpy arrays as `Format.parts(shape)` describes them; `mapped`: in a file mapped privately and never "
           "written, to be repacked before the second product. They are kept unless they are repacked at once. "
           "Raises ValueError if they do not fit or the CPU has no kernel for the format.")
      .def(nb::init<const std::string&, const nb::tuple&, nb::handle>(), nb::arg("format"), nb::arg("shape"),
           nb::arg("panels"),
           "Over `panels`, a uint8 array of repacked_nbytes() aligned to 64 that pack_weight fills or has filled; it is "
           "kept. Raises ValueError.")
      .def_prop_ro("nbytes", &Handle::nbytes, "Bytes of the panels, or of the parts if they are read in place.")
      .def_prop_ro("in_place", [](const Handle& h) { return h.weight->in_place(); }, "Whether the parts are still read.")
      .def_prop_ro("kernel", &Handle::kernel, "What computes with it.")
      .def_prop_ro("shape", [](const Handle& h) { return h.shape; });
  m.def("repacked_nbytes", &repacked_nbytes, nb::arg("format"), nb::arg("shape"),
        "Bytes a weight takes once it is repacked.");
  m.def("pack_weight", &bind_pack_weight, nb::arg("format"), nb::arg("shape"), nb::arg("parts"), nb::arg("out"),
        "Repacks into `out`, a uint8 array of repacked_nbytes() aligned to 64.");
  m.def("embed", &bind_embed, nb::arg("ids"), nb::arg("table"), nb::arg("scale"), nb::arg("out"));
  m.def("norm_linear", &bind_norm_linear, nb::arg("x"), nb::arg("norm").none(), nb::arg("linears"), nb::arg("outs"));
  m.def("gate_up", &bind_gate_up, nb::arg("x"), nb::arg("norm").none(), nb::arg("gate").none(), nb::arg("up"),
        nb::arg("activation"), nb::arg("out"));
  m.def("linear_add", &bind_linear_add, nb::arg("x"), nb::arg("linear"), nb::arg("post_norm").none(),
        nb::arg("residual"));
  m.def("moe_add", &bind_moe_add, nb::arg("x"), nb::arg("norm").none(), nb::arg("experts"),
        nb::arg("post_norm").none(), nb::arg("residual"));
  m.def("logits", &bind_logits, nb::arg("x"), nb::arg("rows"), nb::arg("norm"), nb::arg("head"), nb::arg("scale"),
        nb::arg("softcap").none(), nb::arg("out"));
  m.def("probe_read", [](nb::handle array) {
    const Array bytes(array);
    const auto* p = static_cast<const uint8_t*>(bytes.data());
    const int64_t n = bytes.size() * bytes.itemsize();
    nb::gil_scoped_release release;
    probe_read(p, n);
  }, nb::arg("array"), "Reads an array once with all threads: to be timed.");
  m.def("probe_dot", &probe_dot, nb::arg("rounds"), nb::call_guard<nb::gil_scoped_release>(),
        "Multiplies bytes in registers with all threads; returns how many operations that were: to be timed.");
  m.def("multiplies_floats", [](const std::string& format, const nb::tuple& shape) {
    return is_float(Weight::layout_of(format, read_shape(shape).columns));
  }, nb::arg("format"), nb::arg("shape"), "Whether activations are floats for a weight, rather than bytes.");
  m.def("linear_scratch_bytes", &scratch_bytes, nb::arg("n"), nb::arg("columns"), nb::arg("rows"), nb::arg("floats"),
        "Most bytes of scratch memory that the ops on n rows keep: `columns` of the widest input, `rows` of the widest "
        "output in front of a post-norm; `floats`: some weights are multiplied as floats.");
  m.def("moe_scratch_bytes", &moe_scratch_bytes, nb::arg("n"), nb::arg("hidden"), nb::arg("intermediate"),
        nb::arg("num_experts"), nb::arg("top_k"), "The same for a mixture of experts.");
}

}  // namespace chandra
