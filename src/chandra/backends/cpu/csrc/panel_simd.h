// Vectors of one float lane per panel row: what GCC's and Clang's vector extensions give on every machine. The
// instruction sets inherit it and replace what they do better.
//
// Each instruction set's code must be instantiated with its own vector class only, never called from another's
// translation unit: the linker would keep one copy, compiled for some other machine.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define CHANDRA_INLINE inline __attribute__((always_inline))
#define CHANDRA_LAMBDA __attribute__((always_inline))

namespace chandra {

// (Spelled out, since GCC does not take a vector size that depends on a template parameter for a vector everywhere.)
template <int kLanes>
struct Vectors;
template <>
struct Vectors<8> {
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));
  typedef uint16_t B __attribute__((vector_size(32)));
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  typedef uint16_t U16 __attribute__((vector_size(16)));
  typedef uint8_t U8 __attribute__((vector_size(8)));
  typedef int8_t I8 __attribute__((vector_size(8)));
};
template <>
struct Vectors<16> {
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  typedef uint32_t U __attribute__((vector_size(64)));
  typedef uint16_t B __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(64)));
  typedef uint16_t U16 __attribute__((vector_size(32)));
  typedef uint8_t U8 __attribute__((vector_size(16)));
  typedef int8_t I8 __attribute__((vector_size(16)));
};

template <class Self, int kLanes>
struct Simd {
  static constexpr int lanes = kLanes;
  using F = typename Vectors<kLanes>::F;
  using I = typename Vectors<kLanes>::I;
  using U = typename Vectors<kLanes>::U;
  using B = typename Vectors<kLanes>::B;  // 4 bytes a lane; shifted as 16-bit values
  using Bytes = typename Vectors<kLanes>::Bytes;
  using U16 = typename Vectors<kLanes>::U16;
  using U8 = typename Vectors<kLanes>::U8;
  using I8 = typename Vectors<kLanes>::I8;

  template <class V>
  static CHANDRA_INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  template <class V>
  static CHANDRA_INLINE void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
  }
  static CHANDRA_INLINE F splat(float x) { return x - F{}; }
  static CHANDRA_INLINE I splat(int32_t x) { return x - I{}; }
  static CHANDRA_INLINE B mask(uint8_t x) { return static_cast<uint16_t>(x * 0x0101) - B{}; }

  // (v >> shift) & mask, and (v << shift) & mask, of every byte: the mask removes what crossed over.
  static CHANDRA_INLINE B field(B v, int shift, uint8_t bits) { return (v >> static_cast<uint16_t>(shift)) & mask(bits); }
  static CHANDRA_INLINE B field_up(B v, int shift, uint8_t bits) {
    return (v << static_cast<uint16_t>(shift)) & mask(bits);
  }
  static CHANDRA_INLINE B with_bits(B w, B v, uint8_t bits) { return w | (v & mask(bits)); }

  static CHANDRA_INLINE F to_float(I v) { return __builtin_convertvector(v, F); }
  // To the nearest integer, ties to even; for magnitudes below 2^22.
  static CHANDRA_INLINE F round(F v) { return (v + 12582912.0f) - 12582912.0f; }
  static CHANDRA_INLINE I to_int(F v) { return __builtin_convertvector(v, I); }
  static CHANDRA_INLINE F abs(F v) { return (F)((I)v & 0x7fffffff); }
  static CHANDRA_INLINE F max(F a, F b) { return a > b ? a : b; }
  static CHANDRA_INLINE F min(F a, F b) { return a < b ? a : b; }
  static CHANDRA_INLINE F fma(F a, F b, F c) { return a * b + c; }

  static CHANDRA_INLINE I load_u8(const uint8_t* p) { return __builtin_convertvector(load<U8>(p), I); }
  static CHANDRA_INLINE I load_i8(const uint8_t* p) { return __builtin_convertvector(load<I8>(p), I); }
  static CHANDRA_INLINE I load_u16(const uint8_t* p) { return __builtin_convertvector(load<U16>(p), I); }
  static CHANDRA_INLINE void store_i8(int8_t* p, I v) { store(p, __builtin_convertvector(v, I8)); }
  static CHANDRA_INLINE F load_bf16(const uint8_t* p) { return (F)(Self::load_u16(p) << 16); }
  static CHANDRA_INLINE F load_f16(const uint8_t* p) {
    const I bits = Self::load_u16(p);
    const I sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
    const F normal = (F)(rest + (112 << 23));
    const F infinite = (F)(rest + (224 << 23));
    const F small = to_float(bits & 0x3ff) * 5.9604644775390625e-8f;  // 2^-24
    const F value = rest < (1 << 23) ? small : (rest >= (31 << 23) ? infinite : normal);
    return (F)((I)value | sign);
  }

  // levels[nibble] of every byte, each below 16.
  static CHANDRA_INLINE B lookup(const uint8_t* levels, B nibbles) {
    Bytes v = (Bytes)nibbles;
    for (int i = 0; i < 4 * kLanes; ++i) v[i] = levels[v[i]];
    return (B)v;
  }
  // levels[(v >> shift) & 15] of every lane.
  static CHANDRA_INLINE F lookup(const float* levels, U v, int shift) {
    const U index = (v >> static_cast<uint32_t>(shift)) & 15u;
    F out;
    for (int i = 0; i < kLanes; ++i) out[i] = levels[index[i]];
    return out;
  }

  // Tokens whose products are made together, where there are registers for that: their sums do not wait for each other.
  static constexpr int at_once = 1;

  // acc[t] += the sums over the 4 bytes of each lane of w[i] * x[t * stride + 4 * i ...], i < n. The w are at most
  // `kTop`.
  template <int kTop, int kTokens>
  static CHANDRA_INLINE void dot(I* acc, const B* w, const int8_t* x, int64_t stride, int n) {
    for (int t = 0; t < kTokens; ++t, x += stride) {
      for (int i = 0; i < n; ++i) {
        const I even = splat((x[4 * i] & 0xffff) | x[4 * i + 2] * 0x10000);
        const I odd = splat((x[4 * i + 1] & 0xffff) | x[4 * i + 3] * 0x10000);
        const I p = (I)((w[i] & static_cast<uint16_t>(0xff)) * (B)even);
        const I q = (I)((w[i] >> static_cast<uint16_t>(8)) * (B)odd);
        acc[t] += ((I)((U)p << 16u) >> 16) + ((I)((U)q << 16u) >> 16);
        acc[t] += (p >> 16) + (q >> 16);
      }
    }
  }

  // Lane i of the result is lane i + kStep of v, counted round.
  template <int kStep, class V, int... i>
  static CHANDRA_INLINE V rotate(V v, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(v, v, ((i + kStep) % kLanes)...);
  }
  template <int kStep, class V, class Op>
  static CHANDRA_INLINE V reduce(V v, Op op) {
    v = op(v, rotate<kStep>(v, std::make_integer_sequence<int, kLanes>{}));
    if constexpr (kStep > 1) v = reduce<kStep / 2>(v, op);
    return v;
  }
  template <class V>
  static CHANDRA_INLINE auto sum(V v) {
    return reduce<kLanes / 2>(v, [](V a, V b) CHANDRA_LAMBDA { return a + b; })[0];
  }
  static CHANDRA_INLINE int32_t largest(I v) {
    return reduce<kLanes / 2>(v, [](I a, I b) CHANDRA_LAMBDA { return a > b ? a : b; })[0];
  }
};

}  // namespace chandra
