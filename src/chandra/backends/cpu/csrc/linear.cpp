#include "linear.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

#include "activations.h"
#include "pool.h"
#include "scratch.h"

namespace chandra {
namespace {

constexpr int kTileFloats = kMaxTile * kPanelRows;
thread_local Buffer output_scratch, embed_scratch;

// f(token, row, values, count) for the rows of one panel of every token of a tile.
template <class Fn>
inline void for_tokens(const Weight& w, int64_t panel, const Tile& tile, const float* values, Fn&& f) {
  const int64_t row = panel * kPanelRows, count = std::min<int64_t>(kPanelRows, w.rows() - row);
  for (int t = 0; t < tile.count; ++t) f(tile.first + t, row, values + t * kPanelRows, count);
}

void add_bias(const Linear& linear, int64_t panel, const Tile& tile, float* values) {
  if (!linear.bias) return;
  for_tokens(*linear.weight, panel, tile, values, [&](int64_t, int64_t row, const float* v, int64_t count) {
    float* sums = const_cast<float*>(v);
    for (int64_t r = 0; r < count; ++r) sums[r] += linear.bias[row + r];
  });
}

void store(const Weight& w, int64_t panel, const Tile& tile, const float* values, float* out) {
  for_tokens(w, panel, tile, values, [&](int64_t token, int64_t row, const float* v, int64_t count) {
    float* to = out + token * w.rows() + row;
    if (count == kPanelRows) {
      std::memcpy(to, v, kPanelRows * sizeof(float));
    } else {
      std::memcpy(to, v, static_cast<size_t>(count) * sizeof(float));
    }
  });
}

// One linear's panels: f(panel, tile, values) once the values of a tile are there, with the bias.
template <class Fn>
void multiply(const Activations& x, const Linear& linear, int64_t panel, int64_t tile, int64_t end, Fn&& f) {
  alignas(64) float values[kTileFloats];
  const uint8_t* data = linear.weight->panel(0, panel);
  for (; tile < end; ++tile) {
    const Tile& at = x.tiles()[static_cast<size_t>(tile)];
    x.multiply(*linear.weight, data, at, values);
    add_bias(linear, panel, at, values);
    f(at, values);
  }
}

bool wants_floats(const Linear& linear) { return is_float(linear.weight->layout()); }

}  // namespace

void embed(const int32_t* ids, int64_t n, const Weight& table, float scale, float* out) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= table.rows()) throw std::out_of_range("a token id is not in the embedding table");
  const int64_t columns = table.columns(), padded = (columns + kBlock - 1) / kBlock * kBlock;
  constexpr int64_t kChunk = 8, kPiece = 128;
  if (n > kPiece) {  // few of the table's pages at a time
    embed(ids, kPiece, table, scale, out);
    return embed(ids + kPiece, n - kPiece, table, scale, out + kPiece * columns);
  }
  Pool::shared().run((n + kChunk - 1) / kChunk, [&](int64_t task, int) {
    float* row = embed_scratch.reserve<float>(padded);
    for (int64_t i = task * kChunk; i < std::min(n, (task + 1) * kChunk); ++i) {
      table.unpack_row(ids[i], row);
      for (int64_t c = 0; c < columns; ++c) out[i * columns + c] = row[c] * scale;
    }
  });
  table.looked_up(n);
}

void norm_linear(const float* x, int64_t n, const Norm* norm, std::span<const Linear> linears, float* const* outs) {
  if (n == 0 || linears.empty()) return;
  bool floats = false, quantized = false;
  int64_t panels = 0, bytes = 1;
  for (const Linear& linear : linears) {
    (wants_floats(linear) ? floats : quantized) = true;
    panels += linear.weight->panels();
    bytes = std::max(bytes, linear.weight->panel_bytes());
  }
  const Activations in(x, nullptr, n, linears[0].weight->columns(), norm, quantized, floats);
  for_panels(panels, bytes, in, [&](int64_t panel, int64_t tile, int64_t end) {
    size_t i = 0;
    for (; panel >= linears[i].weight->panels(); ++i) panel -= linears[i].weight->panels();
    multiply(in, linears[i], panel, tile, end, [&](const Tile& at, const float* values) {
      store(*linears[i].weight, panel, at, values, outs[i]);
    });
  });
}

void gate_up(const float* x, int64_t n, const Norm* norm, const Linear* gate, const Linear& up, Activation activation,
             float* out) {
  if (n == 0) return;
  const bool floats = wants_floats(up) || (gate && wants_floats(*gate));
  const bool quantized = !wants_floats(up) || (gate && !wants_floats(*gate));
  const Activations in(x, nullptr, n, up.weight->columns(), norm, quantized, floats);
  const Kernels& k = kernels();
  const int64_t bytes = up.weight->panel_bytes() + (gate ? gate->weight->panel_bytes() : 0);
  for_panels(up.weight->panels(), bytes, in, [&](int64_t panel, int64_t tile, int64_t end) {
    if (!gate) {
      return multiply(in, up, panel, tile, end, [&](const Tile& at, float* values) {
        k.activate(activation, values, nullptr, at.count * kPanelRows);
        store(*up.weight, panel, at, values, out);
      });
    }
    // The gates wait in `out`: a weight read in place has scratch memory for one panel only.
    multiply(in, *gate, panel, tile, end,
             [&](const Tile& at, float* values) { store(*up.weight, panel, at, values, out); });
    multiply(in, up, panel, tile, end, [&](const Tile& at, float* values) {
      for_tokens(*up.weight, panel, at, values, [&](int64_t token, int64_t row, const float* v, int64_t count) {
        k.activate(activation, out + token * up.weight->rows() + row, v, count);
      });
    });
  });
}

void linear_add(const float* x, int64_t n, const Linear& linear, const Norm* post_norm, float* residual) {
  if (n == 0) return;
  const Weight& w = *linear.weight;
  const Activations in(x, nullptr, n, w.columns(), nullptr, !wants_floats(linear), wants_floats(linear));
  float* sums = post_norm ? output_scratch.reserve<float>(n * w.rows()) : nullptr;
  for_panels(w.panels(), w.panel_bytes(), in, [&](int64_t panel, int64_t tile, int64_t end) {
    multiply(in, linear, panel, tile, end, [&](const Tile& at, const float* values) {
      if (sums) return store(w, panel, at, values, sums);
      for_tokens(w, panel, at, values, [&](int64_t token, int64_t row, const float* v, int64_t count) {
        float* to = residual + token * w.rows() + row;
        for (int64_t r = 0; r < count; ++r) to[r] += v[r];
      });
    });
  });
  if (post_norm) add_normed(*post_norm, sums, n, w.rows(), residual);
}

void add_normed(const Norm& norm, float* x, int64_t n, int64_t columns, float* residual) {
  const Kernels& k = kernels();
  constexpr int64_t kWorthwhile = 1 << 14;  // values
  const int64_t chunk = std::max<int64_t>(1, kWorthwhile / columns);
  Pool::shared().run((n + chunk - 1) / chunk, [&](int64_t task, int) {
    for (int64_t i = task * chunk; i < std::min(n, (task + 1) * chunk); ++i) {
      float* row = x + i * columns;
      k.norm(norm, row, columns, row);
      for (int64_t c = 0; c < columns; ++c) residual[i * columns + c] += row[c];
    }
  });
}

void logits(const float* x, const int32_t* rows, int64_t n, const Norm& norm, const Linear& head, float scale,
            float softcap, float* out) {
  if (n == 0) return;
  const Weight& w = *head.weight;
  const Activations in(x, rows, n, w.columns(), &norm, !wants_floats(head), wants_floats(head));
  const Kernels& k = kernels();
  for_panels(w.panels(), w.panel_bytes(), in, [&](int64_t panel, int64_t tile, int64_t end) {
    multiply(in, head, panel, tile, end, [&](const Tile& at, float* values) {
      if (scale != 1.0f || softcap != 0.0f) k.scale_cap(values, at.count * kPanelRows, scale, softcap);
      store(w, panel, at, values, out);
    });
  });
}

void probe_read(const uint8_t* p, int64_t bytes) {
  constexpr int64_t kChunk = 1 << 20;
  std::atomic<int32_t> sink{0};  // or the compiler leaves the reading out
  Pool::shared().run((bytes + kChunk - 1) / kChunk, [&](int64_t task, int) {
    sink += kernels().probe_read(p + task * kChunk, std::min(kChunk, bytes - task * kChunk));
  });
}

int64_t probe_dot(int64_t rounds) {
  std::atomic<int32_t> sink{0};
  const int tasks = Pool::shared().size();
  Pool::shared().run(tasks, [&](int64_t, int) { sink += kernels().probe_dot(rounds); });
  return tasks * rounds * kernels().probe_ops;
}

int64_t scratch_bytes(int64_t n, int64_t columns, int64_t rows, bool floats) {
  const int64_t row = (columns + kBlock - 1) / kBlock * kBlock * 4, panel = kPanelRows * row / (floats ? 1 : 3);
  const int64_t thread = 2 * row + panel;  // normed, of the embedding, and of a weight that is used where it lies
  return Activations::bytes(n, columns, true, floats) + n * rows * 4 + Pool::shared().size() * thread;
}

}  // namespace chandra
