// The ops built around products with weights. Contracts: chandra.ops.contracts. Rows of float arrays are contiguous.
#pragma once

#include <cstdint>
#include <span>

#include "linear_kernels.h"
#include "weight.h"

namespace chandra {

struct Linear {
  const Weight* weight;
  const float* bias;  // may be null
};

struct Experts {
  Linear router;
  const Weight *gate, *up, *down;
  int64_t top_k;
  bool normalize;
  Activation activation;
};

// Throws std::out_of_range for an id that is no row of the table.
void embed(const int32_t* ids, int64_t n, const Weight& table, float scale, float* out);

// `norm` and `post_norm` may be null.
void norm_linear(const float* x, int64_t n, const Norm* norm, std::span<const Linear> linears, float* const* outs);
// `gate` may be null.
void gate_up(const float* x, int64_t n, const Norm* norm, const Linear* gate, const Linear& up, Activation activation,
             float* out);
void linear_add(const float* x, int64_t n, const Linear& linear, const Norm* post_norm, float* residual);
// residual += norm(x), x (n, columns) is overwritten.
void add_normed(const Norm& norm, float* x, int64_t n, int64_t columns, float* residual);
void moe_add(const float* x, int64_t n, const Norm* norm, const Experts& experts, const Norm* post_norm,
             float* residual);
// `rows` of x; softcap 0: none.
void logits(const float* x, const int32_t* rows, int64_t n, const Norm& norm, const Linear& head, float scale,
            float softcap, float* out);

// What the machine can do, with all threads of the pool: reads the memory once; does products of bytes in registers and
// returns how many operations.
void probe_read(const uint8_t* p, int64_t bytes);
int64_t probe_dot(int64_t rounds);

// Most bytes of scratch memory that the ops keep for n rows: `columns` of the widest input, `rows` of the widest output
// in front of a post_norm; `floats`: some weights are multiplied as floats.
int64_t scratch_bytes(int64_t n, int64_t columns, int64_t rows, bool floats);
int64_t moe_scratch_bytes(int64_t n, int64_t hidden, int64_t intermediate, int64_t num_experts, int64_t top_k);

}  // namespace chandra
