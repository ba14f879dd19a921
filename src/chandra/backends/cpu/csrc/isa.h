// Which instruction set the kernels use: the best this CPU has, unless told otherwise.
#pragma once

namespace chandra {

enum class Isa {
  portable,  // plain C++
  avx2,      // AVX2, FMA and F16C
  avx512,    // AVX-512 F, BW, DQ, VL and VNNI
};

Isa best_isa();
Isa current_isa();
const char* isa_name(Isa isa);

// "portable", "avx2", "avx512" or "auto" (the best). Throws std::invalid_argument for another name or one this CPU
// cannot run.
void set_isa(const char* name);

}  // namespace chandra
