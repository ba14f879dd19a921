// The Python face of the CPU kernels.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

NB_MODULE(_cpu, m) { m.doc() = "CPU kernels of Chandra"; }
