// The Python face of the CPU kernels.
#include <nanobind/nanobind.h>

#include "array.h"
#include "isa.h"
#include "pool.h"
#include "scratch.h"

namespace nb = nanobind;

namespace chandra {
void register_attention(nb::module_& m);
void register_guard(nb::module_& m);
void register_linear(nb::module_& m);
void register_strings(nb::module_& m);
}

NB_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of Chandra";
  chandra::Array::type();
  m.def("set_threads", [](int n) { chandra::Pool::shared().resize(n); }, nb::arg("n"),
        nb::call_guard<nb::gil_scoped_release>(),
        "Threads of the pool, the caller included; 0: one for each physical core this process may use.");
  m.def("set_isa", &chandra::set_isa, nb::arg("name"),
        "Use these instructions: auto, portable, avx2 or avx512. Raises ValueError if this CPU lacks them.");
  m.def("isa", [] { return chandra::isa_name(chandra::current_isa()); }, "The instruction set in use.");
  m.def("best_isa", [] { return chandra::isa_name(chandra::best_isa()); }, "The best instruction set of this CPU.");
  m.def("threads", [] { return chandra::Pool::shared().size(); }, "Threads of the pool, the caller included.");
  m.def("scratch_held", &chandra::scratch_held, "Bytes of scratch memory that all threads keep.");
  chandra::register_attention(m);
  chandra::register_guard(m);
  chandra::register_linear(m);
  chandra::register_strings(m);
}
