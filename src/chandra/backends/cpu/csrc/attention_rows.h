// The rows of the KV cache, and what happens to a token before attention; part of attention_kernels.cpp.
#pragma once

#include "attention.h"
#include "simd.h"

#include <cmath>
#include <stdexcept>

namespace chandra {
namespace {

// ---- cache rows

// Vectors of a row that are loaded together: two with the same scale.
constexpr int together(KvType type) { return type == KvType::q8_0 || type == KvType::q4_0 ? 2 : 1; }

template <KvType T>
CHANDRA_INLINE void load_kv(const uint8_t* row, int unit, vec* to) {  // vectors [unit, unit + 1) * together(T)
  if constexpr (T == KvType::f32) {
    *to = load(reinterpret_cast<const float*>(row) + unit * W);
  } else if constexpr (T == KvType::f16) {
    *to = load_f16(row + unit * W * 2);
  } else if constexpr (T == KvType::bf16) {
    *to = load_bf16(row + unit * W * 2);
  } else {
    constexpr int units = 16 / W;  // of a block
    const uint8_t* block = row + unit / units * (T == KvType::q8_0 ? 34 : 18);
    const vec scale = splat_f16(block);
    for (int i = 0; i < 2; ++i) {
      const int part = unit % units * 2 + i;
      const vec x = T == KvType::q8_0 ? load_i8(block + 2 + part * W)
                                      : load_nibbles(block + 2 + part % (16 / W) * W, part >= 16 / W);
      to[i] = mul(x, scale);
    }
  }
}

void write_row(KvType type, const float* x, int n, uint8_t* row) {
  constexpr float f16_max = 65504.0f;  // saturate: an infinity in the cache would turn into NaN
  if (type == KvType::f32) {
    std::memcpy(row, x, static_cast<size_t>(n) * 4);
  } else if (type == KvType::f16) {
    int i = 0;
    for (; i + W <= n; i += W) store_f16(row + i * 2, max(min(load(x + i), set1(f16_max)), set1(-f16_max)));
    for (; i < n; ++i) {
      const uint16_t half = f32_to_f16(x[i] > f16_max ? f16_max : x[i] < -f16_max ? -f16_max : x[i]);
      std::memcpy(row + i * 2, &half, 2);
    }
  } else if (type == KvType::bf16) {
    for (int i = 0; i < n; ++i) {
      const uint16_t half = f32_to_bf16(x[i]);
      std::memcpy(row + i * 2, &half, 2);
    }
  } else {
    for (int b = 0; b < n / 32; ++b, x += 32) {  // GGUF blocks: f16 scale, then the quants
      float extreme = 0;                         // the value of largest magnitude
      for (int i = 0; i < 32; ++i) extreme = std::fabs(x[i]) > std::fabs(extreme) ? x[i] : extreme;
      const bool q8 = type == KvType::q8_0;
      const float d = q8 ? std::fabs(extreme) / 127.0f : extreme / -8.0f;
      const float inverse = d != 0 ? 1.0f / d : 0.0f;
      uint8_t* block = row + b * (q8 ? 34 : 18);
      const uint16_t scale = f32_to_f16(d);
      std::memcpy(block, &scale, 2);
      if (q8) {
        for (int i = 0; i < 32; ++i) {
          const auto q = static_cast<int8_t>(std::round(x[i] * inverse));
          std::memcpy(block + 2 + i, &q, 1);
        }
      } else {
        for (int i = 0; i < 16; ++i) {
          const int low = static_cast<int>(x[i] * inverse + 8.5f), high = static_cast<int>(x[i + 16] * inverse + 8.5f);
          block[2 + i] = static_cast<uint8_t>((low > 15 ? 15 : low) | (high > 15 ? 15 : high) << 4);
        }
      }
    }
  }
}

// Where the keys of one sequence and kv head are.
struct Pages {
  const KvCache& cache;
  const int32_t* table;
  int64_t blocks;
  int kv_head, num_kv_heads;

  Pages(const AttentionCall& call, int64_t sequence, int head)
      : cache(call.cache),
        table(call.block_table + sequence * call.blocks_per_sequence),
        blocks(call.blocks_per_sequence),
        kv_head(head),
        num_kv_heads(call.shape->num_kv_heads) {}

  int64_t offset(int64_t position) const {  // bytes from the start of k or v
    const int64_t index = position / cache.block_size;
    const int64_t block = index < blocks ? table[index] : -1;
    if (block < 0 || block >= cache.num_blocks) throw std::out_of_range("a key is in no block of the cache");
    return ((block * num_kv_heads + kv_head) * cache.block_size + position % cache.block_size) * cache.row_bytes;
  }
};

// ---- norm, rope and the write to the cache

void norm_heads(const HeadNorm& norm, float* x, int total) {
  const int width = norm.width;
  for (int start = 0; start < total; start += width, x += width) {
    float mean = 0, squares = 0;
    vec sum = zero();
    int i = 0;
    if (norm.layer) {
      for (; i + W <= width; i += W) sum = add(sum, load(x + i));
      mean = sum_lanes(sum);
      for (; i < width; ++i) mean += x[i];
      mean /= static_cast<float>(width);
    }
    sum = zero();
    for (i = 0; i + W <= width; i += W) {
      const vec centered = sub(load(x + i), set1(mean));
      sum = fma(centered, centered, sum);
    }
    squares = sum_lanes(sum);
    for (; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(width) + norm.eps);
    for (i = 0; i + W <= width; i += W) {
      const vec y = mul(mul(sub(load(x + i), set1(mean)), set1(inverse)), load(norm.weight + i));
      store(x + i, norm.bias ? add(y, load(norm.bias + i)) : y);
    }
    for (; i < width; ++i) x[i] = (x[i] - mean) * inverse * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.0f);
  }
}

// STEP 1: the pairs are half of the rotated dims apart, 2: they are neighbours.
template <int STEP>
void rotate_head(float* x, const float* cos, const float* sin, int half) {
  const int gap = STEP == 2 ? 1 : half;
  int i = 0;
  if constexpr (STEP == 1) {
    for (; i + W <= half; i += W) {
      const vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
      store(x + i, sub(mul(a, c), mul(b, s)));
      store(x + half + i, add(mul(b, c), mul(a, s)));
    }
  }
  for (; i < half; ++i) {
    const float a = x[i * STEP], b = x[i * STEP + gap];
    x[i * STEP] = a * cos[i] - b * sin[i];
    x[i * STEP + gap] = b * cos[i] + a * sin[i];
  }
}

void prepare(const AttentionCall& call, int64_t row) {
  const AttentionShape& shape = *call.shape;
  const KvCache& cache = call.cache;
  const int d = shape.head_dim, half = shape.rotary_dim / 2;
  float* q = call.q.data + row * call.q.stride;
  float* k = call.k.data + row * call.k.stride;
  const float* v = call.v.data + row * call.v.stride;
  if (shape.q_norm.weight) norm_heads(shape.q_norm, q, shape.num_heads * d);
  if (shape.k_norm.weight) norm_heads(shape.k_norm, k, shape.num_kv_heads * d);
  if (half) {
    const float *cos = call.cos + row * half, *sin = call.sin + row * half;
    const auto rotate = shape.interleaved ? rotate_head<2> : rotate_head<1>;
    for (int head = 0; head < shape.num_heads; ++head) rotate(q + head * d, cos, sin, half);
    for (int head = 0; head < shape.num_kv_heads; ++head) rotate(k + head * d, cos, sin, half);
  }
  const int64_t slot = call.slots[row];
  if (slot < 0 || slot >= cache.num_blocks * cache.block_size) throw std::out_of_range("a slot is outside the cache");
  const int64_t block = slot / cache.block_size, within = slot % cache.block_size;
  for (int head = 0; head < shape.num_kv_heads; ++head) {
    const int64_t at = ((block * shape.num_kv_heads + head) * cache.block_size + within) * cache.row_bytes;
    write_row(cache.type, k + head * d, d, cache.k + at);
    write_row(cache.type, v + head * d, d, cache.v + at);
  }
}

}  // namespace
}  // namespace chandra
