// The kernels of one instruction set, and the layouts they share with the code that calls them.
//
// A weight is computed on in panels: 16 rows, interleaved so that one vector holds the same columns of all of them.
// A product then needs no sums across a vector, and every format only has to say how 32 columns of a panel become bytes
// and scales (panels.h). The sum over the columns runs in the same order for one token as for many, so a token's result
// does not depend on the batch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace chandra {

constexpr int kPanelRows = 16;
constexpr int kBlock = 32;     // columns that share a scale of the activations
constexpr int kMaxTile = 8;    // tokens a kernel multiplies at once
constexpr int kTileWidths = 6;
constexpr int kTileWidth[kTileWidths] = {1, 2, 3, 4, 6, 8};

// Layouts of panels: one for each weight format but nf4-dq, which unpacks its absmax and then is nf4.
enum class Layout : int {
  f32, f16, bf16, nf4,  // multiplied with float activations
  q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, mxfp4,
  int8, int4_g32, int4_g64, int4_g128,
  count,
};
constexpr int kLayouts = static_cast<int>(Layout::count);
constexpr bool is_float(Layout layout) { return layout <= Layout::nf4; }

// 32 activations of one token as int8, x = scale * q, with the sums that the formats with offsets or minimums need.
struct alignas(64) ActBlock {
  int8_t q[kBlock];
  float scale;
  float sum, sum_lo, sum_hi;         // scale * sum of q: of all 32, of the first 16, of the last 16
  int32_t nsum, nsum_lo, nsum_hi;    // minus the sums of q
  int32_t unused;
};
static_assert(sizeof(ActBlock) == 64);

enum class Activation : int { silu, gelu, gelu_tanh, relu, sigmoid };

struct Norm {
  const float* weight;
  const float* bias;  // may be null; layer norms only
  float eps;
  bool layer;
};

struct PanelSize {
  int header;   // bytes before the blocks
  int columns;  // of a block; the last block of a panel may be padded
  int bytes;    // of a block
};
PanelSize panel_size(Layout layout);

// out[t * 16 + r] = product of row r of the panel and token t, for a tile of as many tokens as the function was made
// for. `activations`: ActBlock [columns / 32][tile] or float [columns][tile], columns padded to whole blocks.
using TileKernel = void (*)(const uint8_t* panel, int64_t blocks, const void* activations, float* out);

// Makes a panel of 16 stored rows that follow each other.
using PackKernel = void (*)(const uint8_t* rows, int64_t row_bytes, uint8_t* panel);

struct Kernels {
  const char* name;
  PackKernel pack[kLayouts];  // of GGUF's quantized formats, otherwise null
  TileKernel tile[kLayouts][kTileWidths];
  // The weights of one row of a panel, `blocks` times panel_size().columns of them.
  void (*unpack[kLayouts])(const uint8_t* panel, int64_t blocks, int row, float* out);
  // One row to blocks `stride` apart; columns past the end are zero.
  void (*quantize)(const float* x, int64_t columns, ActBlock* out, int64_t stride);
  void (*norm)(const Norm& norm, const float* x, int64_t columns, float* out);
  // gate = activation(gate) * up; up may be null: gate = activation(gate).
  void (*activate)(Activation activation, float* gate, const float* up, int64_t n);
  // x = x * scale, then cap * tanh(x / cap) unless cap is 0.
  void (*scale_cap)(float* x, int64_t n, float scale, float cap);
  // For measuring: what the products cannot beat. Reads memory; multiplies bytes in registers.
  int32_t (*probe_read)(const uint8_t* p, int64_t bytes);
  int32_t (*probe_dot)(int64_t rounds);
  int64_t probe_ops;  // additions and multiplications of one round
};

const Kernels& kernels();  // of current_isa()

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx2_vnni_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace chandra
