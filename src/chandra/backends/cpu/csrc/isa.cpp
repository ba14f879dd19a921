#include "isa.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace chandra {
namespace {

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa current_isa() { return selected().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

void set_isa(const char* name) {
  const std::string wanted = name;
  if (wanted == "auto") return selected().store(best_isa());
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (wanted != isa_name(isa)) continue;
    if (isa > best_isa()) throw std::invalid_argument("this CPU has no " + wanted);
    return selected().store(isa);
  }
  throw std::invalid_argument("no instruction set is called " + wanted);
}

}  // namespace chandra
