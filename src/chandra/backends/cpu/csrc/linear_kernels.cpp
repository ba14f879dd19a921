// The kernels of one instruction set; compiled once for each. Everything is a template of the vector class, so that no
// code compiled for one set can end up in another.
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "pack_panel.h"
#include "panel_simd_x86.h"
#include "panels.h"

namespace chandra {
namespace {

using panels::Decoded;

// Products

// acc[t] += the product of 32 columns with token t.
template <class S, class P, int kTokens>
CHANDRA_INLINE void add_products(const Decoded<S>& d, const ActBlock* x, typename S::F* acc) {
  using I = typename S::I;
  constexpr int n = 8 / P::groups;
#pragma GCC unroll 2
  for (int g = 0; g < P::groups; ++g) {
    I dots[kTokens] = {};
#pragma GCC unroll 8
    for (int t = 0; t < kTokens && P::offset_bits >= 0; ++t) {
      const int32_t nsum = P::groups == 1 ? x[t].nsum : g ? x[t].nsum_hi : x[t].nsum_lo;
      dots[t] = S::splat(nsum) << (P::offset_bits < 0 ? 0 : P::offset_bits);
    }
    S::template dot<P::top, kTokens>(dots, d.w + n * g, x->q + 4 * n * g, sizeof(ActBlock), n);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      acc[t] = S::fma(S::to_float(dots[t]), d.scale[g] * x[t].scale, acc[t]);
      const float sum = P::groups == 1 ? x[t].sum : g ? x[t].sum_hi : x[t].sum_lo;
      if constexpr (P::minimums) acc[t] = S::fma(d.shift[g], S::splat(sum), acc[t]);
    }
  }
}

// f(run, step) for every 32 columns of a block; the step within a run is a constant, for its shifts to be constants too.
template <class P, class Fn>
CHANDRA_INLINE void each_run(Fn&& f) {
  for (int run = 0; run < P::size.columns / kBlock / P::steps; ++run) {
    [&]<int... step>(std::integer_sequence<int, step...>) CHANDRA_LAMBDA {
      (f(run, std::integral_constant<int, step>{}), ...);
    }(std::make_integer_sequence<int, P::steps>{});
  }
}

// Asks for the panel well before it is needed, a few lines at a time.
template <int kBytes>
CHANDRA_INLINE void prefetch(const uint8_t* p) {
  constexpr int kAhead = 4096;
#pragma GCC unroll 16
  for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(p + kAhead + i, 0, 2);
}

template <class S, class P, int kTokens>
void tile(const uint8_t* panel, int64_t blocks, const void* activations, float* out) {
  using F = typename S::F;
  for (int part = 0; part < kPanelRows / S::lanes; ++part) {
    const ActBlock* x = static_cast<const ActBlock*>(activations);
    const uint8_t* p = panel + P::size.header;
    F acc[kTokens] = {};
    for (int64_t b = 0; b < blocks; ++b, p += P::size.bytes) {
      each_run<P>([&](int run, auto step) CHANDRA_LAMBDA {
        constexpr int kBytes = P::size.bytes * kBlock / P::size.columns;
        prefetch<kBytes>(p + (run * P::steps + step()) * kBytes);
        Decoded<S> d;
        P::template decode<S, step()>(panel, p, run, part, d);
        constexpr int kAtOnce = kTokens <= S::at_once ? kTokens : kTokens % S::at_once ? 1 : S::at_once;
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; t += kAtOnce) add_products<S, P, kAtOnce>(d, x + t, acc + t);
        x += kTokens;
      });
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) S::store(out + t * kPanelRows + part * S::lanes, acc[t]);
  }
}

template <class S, class P, int kTokens>
void float_tile(const uint8_t* panel, int64_t blocks, const void* activations, float* out) {
  using F = typename S::F;
  for (int part = 0; part < kPanelRows / S::lanes; ++part) {
    const float* x = static_cast<const float*>(activations);
    const uint8_t* p = panel;
    F acc[kTokens] = {};
    for (int64_t b = 0; b < blocks; ++b, p += P::size.bytes) {
      prefetch<P::size.bytes>(p);
      for (int j = 0; j < P::size.columns; ++j, x += kTokens) {
        const F w = P::template weight<S>(p, j, part);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) acc[t] = S::fma(w, S::splat(x[t]), acc[t]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) S::store(out + t * kPanelRows + part * S::lanes, acc[t]);
  }
}

// Rows back to floats

template <class S, class P>
void unpack(const uint8_t* panel, int64_t blocks, int row, float* out) {
  const int part = row / S::lanes, lane = row % S::lanes;
  const uint8_t* p = panel + P::size.header;
  for (int64_t b = 0; b < blocks; ++b, p += P::size.bytes) {
    each_run<P>([&](int run, auto step) {
      Decoded<S> d;
      P::template decode<S, step()>(panel, p, run, part, d);
      alignas(64) uint8_t w[8][4 * S::lanes];
      for (int i = 0; i < 8; ++i) S::store(w[i], d.w[i]);
      constexpr int offset = P::offset_bits < 0 ? 0 : 1 << (P::offset_bits < 0 ? 0 : P::offset_bits);
      for (int c = 0; c < kBlock; ++c) {
        const int g = P::groups == 1 ? 0 : c / 16;
        const float value = d.scale[g][lane] * static_cast<float>(w[c / 4][4 * lane + c % 4] - offset);
        out[c] = P::minimums ? value + d.shift[g][lane] : value;
      }
      out += kBlock;
    });
  }
}

template <class S, class P>
void float_unpack(const uint8_t* panel, int64_t blocks, int row, float* out) {
  for (int64_t b = 0; b < blocks; ++b, panel += P::size.bytes)
    for (int j = 0; j < P::size.columns; ++j) *out++ = P::template weight<S>(panel, j, row / S::lanes)[row % S::lanes];
}

// Activations

template <class S>
void quantize_block(const float* x, ActBlock& out) {
  using F = typename S::F;
  using I = typename S::I;
  constexpr int n = kBlock / S::lanes;
  F v[n];
  I top{};  // as integers, floats without sign compare alike, and NaN is the largest: it must reach the scale
  for (int i = 0; i < n; ++i) {
    v[i] = S::template load<F>(x + i * S::lanes);
    const I bits = (I)S::abs(v[i]);
    top = top > bits ? top : bits;
  }
  const int32_t top_bits = S::largest(top);
  float amax;
  std::memcpy(&amax, &top_bits, sizeof amax);
  const float inverse = amax > 1e-36f ? 127.0f / amax : 0.0f;
  I sums[2] = {};
  for (int i = 0; i < n; ++i) {
    const I q = S::to_int(S::round(S::max(v[i] * inverse, S::splat(-127.0f))));  // NaN becomes -127
    sums[2 * i / n] += q;
    S::store_i8(out.q + i * S::lanes, q);
  }
  const int32_t lo = S::sum(sums[0]), hi = S::sum(sums[1]);
  out.scale = amax / 127.0f;
  out.sum = out.scale * static_cast<float>(lo + hi);
  out.sum_lo = out.scale * static_cast<float>(lo);
  out.sum_hi = out.scale * static_cast<float>(hi);
  out.nsum = -lo - hi;
  out.nsum_lo = -lo;
  out.nsum_hi = -hi;
  out.unused = 0;
}

template <class S>
void quantize(const float* x, int64_t columns, ActBlock* out, int64_t stride) {
  int64_t c = 0;
  for (; c + kBlock <= columns; c += kBlock, out += stride) quantize_block<S>(x + c, *out);
  if (c == columns) return;
  alignas(64) float rest[kBlock] = {};
  std::memcpy(rest, x + c, static_cast<size_t>(columns - c) * sizeof(float));
  quantize_block<S>(rest, *out);
}

// Elementwise. f(offset, vector) for every vector of x; the last one is filled up with zeros.
template <class S, class Fn>
CHANDRA_INLINE void each(const float* x, int64_t n, Fn&& f) {
  using F = typename S::F;
  int64_t i = 0;
  for (; i + S::lanes <= n; i += S::lanes) f(i, S::template load<F>(x + i), S::lanes);
  if (i == n) return;
  float rest[S::lanes] = {};
  std::memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(float));
  f(i, S::template load<F>(rest), static_cast<int>(n - i));
}
template <class S>
CHANDRA_INLINE typename S::F load_some(const float* x, int n) {
  if (n == S::lanes) return S::template load<typename S::F>(x);
  float rest[S::lanes] = {};
  std::memcpy(rest, x, static_cast<size_t>(n) * sizeof(float));
  return S::template load<typename S::F>(rest);
}
template <class S>
CHANDRA_INLINE void store_some(float* x, typename S::F v, int n) {
  if (n == S::lanes) return S::store(x, v);
  float rest[S::lanes];
  S::store(rest, v);
  std::memcpy(x, rest, static_cast<size_t>(n) * sizeof(float));
}

template <class S>
void norm(const Norm& norm, const float* x, int64_t columns, float* out) {
  using F = typename S::F;
  float mean = 0.0f;
  F sum{};
  if (norm.layer) {
    each<S>(x, columns, [&](int64_t, F v, int) CHANDRA_LAMBDA { sum += v; });
    mean = S::sum(sum) / static_cast<float>(columns);
    sum = F{};
  }
  each<S>(x, columns, [&](int64_t, F v, int n) CHANDRA_LAMBDA {
    v -= mean;
    if (n < S::lanes)
      for (int i = n; i < S::lanes; ++i) v[i] = 0.0f;
    sum = S::fma(v, v, sum);
  });
  const float scale = 1.0f / __builtin_sqrtf(S::sum(sum) / static_cast<float>(columns) + norm.eps);
  each<S>(x, columns, [&](int64_t i, F v, int n) CHANDRA_LAMBDA {
    v = (v - mean) * scale * load_some<S>(norm.weight + i, n);
    if (norm.bias) v += load_some<S>(norm.bias + i, n);
    store_some<S>(out + i, v, n);
  });
}

// e^x to about one unit in the last place (the polynomial is that of Cephes); x is clamped to the normal floats.
template <class S>
CHANDRA_INLINE typename S::F exp(typename S::F x) {
  using F = typename S::F;
  x = S::min(S::max(x, S::splat(-87.3f)), S::splat(88.3f));
  const F n = S::round(x * 1.44269504f);
  const F r = S::fma(n, S::splat(2.12194440e-4f), S::fma(n, S::splat(-0.693359375f), x));
  F y = S::splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = S::fma(y, r, S::splat(c));
  y = S::fma(y, r * r, r + 1.0f);
  return y * (F)((S::to_int(n) + 127) << 23);
}
template <class S>
CHANDRA_INLINE typename S::F sigmoid(typename S::F x) {
  return 1.0f / (1.0f + exp<S>(-x));
}
template <class S>
CHANDRA_INLINE typename S::F tanh(typename S::F x) {
  return 1.0f - 2.0f / (1.0f + exp<S>(x + x));
}
// Abramowitz and Stegun 7.1.26, within 1.5e-7.
template <class S>
CHANDRA_INLINE typename S::F erf(typename S::F x) {
  using F = typename S::F;
  const F a = S::abs(x), t = 1.0f / (1.0f + 0.3275911f * a);
  F y = S::splat(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) y = S::fma(y, t, S::splat(c));
  y = 1.0f - y * t * exp<S>(-a * a);
  return x < 0.0f ? -y : y;
}

template <class S>
CHANDRA_INLINE typename S::F activation(Activation kind, typename S::F x) {
  switch (kind) {
    case Activation::silu: return x * sigmoid<S>(x);
    case Activation::gelu: return 0.5f * x * (1.0f + erf<S>(x * 0.70710678f));
    case Activation::gelu_tanh: return x * sigmoid<S>(1.5957691216f * (x + 0.044715f * x * x * x));
    case Activation::relu: return S::max(x, S::splat(0.0f));
    default: return sigmoid<S>(x);
  }
}

template <class S>
void activate(Activation kind, float* gate, const float* up, int64_t n) {
  using F = typename S::F;
  each<S>(gate, n, [&](int64_t i, F v, int count) CHANDRA_LAMBDA {
    F y = activation<S>(kind, v);
    if (up) y *= load_some<S>(up + i, count);
    store_some<S>(gate + i, y, count);
  });
}

template <class S>
void scale_cap(float* x, int64_t n, float scale, float cap) {
  using F = typename S::F;
  each<S>(x, n, [&](int64_t i, F v, int count) CHANDRA_LAMBDA {
    v *= scale;
    if (cap != 0.0f) v = cap * tanh<S>(v / cap);
    store_some<S>(x + i, v, count);
  });
}

// Probes

template <class S>
int32_t probe_read(const uint8_t* p, int64_t bytes) {
  using I = typename S::I;
  I sums[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    __builtin_prefetch(p + i + 4096, 0, 2);
    for (int part = 0; part < 64 / S::lanes; ++part)
      sums[part % 4] += S::template load<I>(p + i + 4 * S::lanes * part);
  }
  return S::sum(sums[0] + sums[1] + sums[2] + sums[3]);
}

constexpr int kChains = 8;  // sums that do not wait for each other

template <class S>
int32_t probe_dot(int64_t rounds) {
  alignas(64) int8_t x[4 * 8 * kChains];
  for (int i = 0; i < 4 * 8 * kChains; ++i) x[i] = static_cast<int8_t>(i % 15 - 7);
  typename S::I sums[kChains] = {};
  const typename S::B w[8] = {S::mask(1), S::mask(3), S::mask(5), S::mask(7), S::mask(2), S::mask(4), S::mask(6), S::mask(8)};
  for (int64_t r = 0; r < rounds; ++r) {
    asm volatile("" : : "r"(x) : "memory");  // or products that stay the same are made once
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) S::template dot<15, 1>(sums + c, w, x + 32 * c, 0, 8);
  }
  int32_t total = 0;
  for (int c = 0; c < kChains; ++c) total += S::sum(sums[c]);
  return total;
}

// The table

template <class S, class P>
constexpr void add(Kernels& k, Layout layout) {
  const int i = static_cast<int>(layout);
  TileKernel tiles[kTileWidths] = {tile<S, P, 1>, tile<S, P, 2>, tile<S, P, 3>,
                                   tile<S, P, 4>, tile<S, P, 6>, tile<S, P, 8>};
  for (int w = 0; w < kTileWidths; ++w) k.tile[i][w] = tiles[w];
  k.unpack[i] = unpack<S, P>;
}
template <class S, class P>
constexpr void add_float(Kernels& k, Layout layout) {
  const int i = static_cast<int>(layout);
  TileKernel tiles[kTileWidths] = {float_tile<S, P, 1>, float_tile<S, P, 2>, float_tile<S, P, 3>,
                                   float_tile<S, P, 4>, float_tile<S, P, 6>, float_tile<S, P, 8>};
  for (int w = 0; w < kTileWidths; ++w) k.tile[i][w] = tiles[w];
  k.unpack[i] = float_unpack<S, P>;
}

template <class S>
constexpr Kernels make_kernels(const char* name) {
  Kernels k{};
  k.name = name;
  add_float<S, panels::F32>(k, Layout::f32);
  add_float<S, panels::F16>(k, Layout::f16);
  add_float<S, panels::Bf16>(k, Layout::bf16);
  add_float<S, panels::Nf4>(k, Layout::nf4);
  add<S, panels::Q4_0>(k, Layout::q4_0);
  k.pack[static_cast<int>(Layout::q4_0)] = pack_panel<rows::Q4_0>;
  add<S, panels::Q4_1>(k, Layout::q4_1);
  k.pack[static_cast<int>(Layout::q4_1)] = pack_panel<rows::Q4_1>;
  add<S, panels::Q5_0>(k, Layout::q5_0);
  k.pack[static_cast<int>(Layout::q5_0)] = pack_panel<rows::Q5_0>;
  add<S, panels::Q5_1>(k, Layout::q5_1);
  k.pack[static_cast<int>(Layout::q5_1)] = pack_panel<rows::Q5_1>;
  add<S, panels::Q8_0>(k, Layout::q8_0);
  k.pack[static_cast<int>(Layout::q8_0)] = pack_panel<rows::Q8_0>;
  add<S, panels::Q2_K>(k, Layout::q2_k);
  k.pack[static_cast<int>(Layout::q2_k)] = pack_panel<rows::Q2_K>;
  add<S, panels::Q3_K>(k, Layout::q3_k);
  k.pack[static_cast<int>(Layout::q3_k)] = pack_panel<rows::Q3_K>;
  add<S, panels::Q4_K>(k, Layout::q4_k);
  k.pack[static_cast<int>(Layout::q4_k)] = pack_panel<rows::Q4_K>;
  add<S, panels::Q5_K>(k, Layout::q5_k);
  k.pack[static_cast<int>(Layout::q5_k)] = pack_panel<rows::Q5_K>;
  add<S, panels::Q6_K>(k, Layout::q6_k);
  k.pack[static_cast<int>(Layout::q6_k)] = pack_panel<rows::Q6_K>;
  add<S, panels::Iq4Nl>(k, Layout::iq4_nl);
  k.pack[static_cast<int>(Layout::iq4_nl)] = pack_panel<rows::Q4_0>;
  add<S, panels::Iq4Xs>(k, Layout::iq4_xs);
  k.pack[static_cast<int>(Layout::iq4_xs)] = pack_panel<rows::Iq4Xs>;
  add<S, panels::Mxfp4>(k, Layout::mxfp4);
  k.pack[static_cast<int>(Layout::mxfp4)] = pack_panel<rows::Mxfp4>;
  add<S, panels::Int8>(k, Layout::int8);
  add<S, panels::Int4<32>>(k, Layout::int4_g32);
  add<S, panels::Int4<64>>(k, Layout::int4_g64);
  add<S, panels::Int4<128>>(k, Layout::int4_g128);
  k.quantize = quantize<S>;
  k.norm = norm<S>;
  k.activate = activate<S>;
  k.scale_cap = scale_cap<S>;
  k.probe_read = probe_read<S>;
  k.probe_dot = probe_dot<S>;
  k.probe_ops = int64_t{2} * 4 * S::lanes * 8 * kChains;
  return k;
}

struct Portable : Simd<Portable, 8> {};

}  // namespace

#if defined(__AVX512F__)
constinit const Kernels avx512_kernels = make_kernels<Avx512>("avx512");
#elif defined(__AVXVNNI__)
constinit const Kernels avx2_vnni_kernels = make_kernels<Avx2>("avx2 vnni");
#elif defined(__AVX2__)
constinit const Kernels avx2_kernels = make_kernels<Avx2>("avx2");
#else
constinit const Kernels portable_kernels = make_kernels<Portable>("portable");
#endif

}  // namespace chandra
