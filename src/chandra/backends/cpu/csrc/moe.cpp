// Mixture of experts: tokens are gathered by expert, every expert's weights are read once, and the outputs are added up
// token by token in the order of the router's choice, whoever else is in the batch.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "activations.h"
#include "linear.h"
#include "pool.h"
#include "scratch.h"

namespace chandra {
namespace {

constexpr int kTileFloats = kMaxTile * kPanelRows;
thread_local Buffer normed_scratch, router_scratch, hidden_scratch, output_scratch;

// The choice of all tokens. A slot is one token at one expert; slots are sorted by expert, then token.
struct Routing {
  std::vector<int32_t> slot_token;    // (n * top_k)
  std::vector<int64_t> expert_end;    // (experts): end of the expert's slots
  std::vector<int64_t> choice_slot;   // (n, top_k): where token i's choices went
  std::vector<float> choice_weight;   // (n, top_k)
};

// The top_k largest logits of one token, largest first, lower index first among equals, and their weights.
void choose(const float* logits, int64_t experts, int64_t top_k, bool normalize, int32_t* chosen, float* weights) {
  std::vector<int32_t> order(static_cast<size_t>(experts));
  for (int64_t e = 0; e < experts; ++e) order[static_cast<size_t>(e)] = static_cast<int32_t>(e);
  std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [&](int32_t a, int32_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  });
  const float top = logits[order[0]];
  float sum = 0.0f;
  for (int64_t e = 0; e < (normalize ? top_k : experts); ++e)
    sum += std::exp(logits[normalize ? order[static_cast<size_t>(e)] : e] - top);
  for (int64_t k = 0; k < top_k; ++k) {
    chosen[k] = order[static_cast<size_t>(k)];
    weights[k] = std::exp(logits[chosen[k]] - top) / sum;
  }
}

Routing route(const float* logits, int64_t n, const Experts& experts) {
  const int64_t count = experts.router.weight->rows(), top_k = experts.top_k;
  const auto slots = static_cast<size_t>(n * top_k);
  Routing r{std::vector<int32_t>(slots), std::vector<int64_t>(static_cast<size_t>(count)),
            std::vector<int64_t>(slots), std::vector<float>(slots)};
  std::vector<int32_t> chosen(slots);
  for (int64_t i = 0; i < n; ++i) {
    choose(logits + i * count, count, top_k, experts.normalize, chosen.data() + i * top_k,
           r.choice_weight.data() + i * top_k);
  }
  for (int32_t e : chosen) ++r.expert_end[static_cast<size_t>(e)];
  int64_t before = 0;
  for (int64_t& end : r.expert_end) before += std::exchange(end, before);  // now the beginnings
  for (size_t c = 0; c < slots; ++c) {
    const int64_t slot = r.expert_end[static_cast<size_t>(chosen[c])]++;
    r.choice_slot[c] = slot;
    r.slot_token[static_cast<size_t>(slot)] = static_cast<int32_t>(static_cast<int64_t>(c) / top_k);
  }
  return r;
}

// f(expert, panel, first_tile, end_tile) for the experts that have tokens.
template <class Fn>
void for_experts(const Weight& w, const Activations& x, Fn&& f) {
  std::vector<int64_t> active;
  for (int64_t e = 0; e < w.experts(); ++e)
    if (x.first_tile(e) < x.first_tile(e + 1)) active.push_back(e);
  const int64_t chunk = std::clamp<int64_t>((16 << 10) / w.panel_bytes(), 1, w.panels());
  const int64_t chunks = (w.panels() + chunk - 1) / chunk;
  Pool::shared().run(static_cast<int64_t>(active.size()) * chunks, [&](int64_t task, int) {
    const int64_t e = active[static_cast<size_t>(task / chunks)], first = task % chunks * chunk;
    for (int64_t p = first; p < std::min(w.panels(), first + chunk); ++p) f(e, p, x.first_tile(e), x.first_tile(e + 1));
  });
}

// Products of one expert's panel with its tiles; f(out of the panel's row, values, count of rows) for every slot.
template <class Fn>
void multiply(const Activations& x, const Weight& w, int64_t expert, int64_t panel, int64_t tile, int64_t end, Fn&& f) {
  alignas(64) float values[kTileFloats];
  const uint8_t* data = w.panel(expert, panel);
  const int64_t row = panel * kPanelRows, count = std::min<int64_t>(kPanelRows, w.rows() - row);
  for (; tile < end; ++tile) {
    const Tile& at = x.tiles()[static_cast<size_t>(tile)];
    x.multiply(w, data, at, values);
    for (int t = 0; t < at.count; ++t) f((at.first + t) * w.rows() + row, values + t * kPanelRows, count);
  }
}

}  // namespace

void moe_add(const float* x, int64_t n, const Norm* norm, const Experts& experts, const Norm* post_norm,
             float* residual) {
  if (n == 0) return;
  const Weight &gate = *experts.gate, &up = *experts.up, &down = *experts.down;
  const int64_t hidden = up.columns(), ff = up.rows(), top_k = experts.top_k, slots = n * top_k;
  const Kernels& k = kernels();
  if (norm) {
    float* normed = normed_scratch.reserve<float>(n * hidden);
    Pool::shared().run(n, [&](int64_t i, int) { k.norm(*norm, x + i * hidden, hidden, normed + i * hidden); });
    x = normed;
  }
  float* logits = router_scratch.reserve<float>(n * experts.router.weight->rows());
  norm_linear(x, n, nullptr, {&experts.router, 1}, &logits);
  const Routing routing = route(logits, n, experts);

  float* h = hidden_scratch.reserve<float>(slots * ff);
  const bool floats = is_float(up.layout()) || is_float(gate.layout());
  const Activations in(x, routing.slot_token.data(), routing.expert_end, hidden, nullptr,
                       !is_float(up.layout()) || !is_float(gate.layout()), floats);
  for_experts(up, in, [&](int64_t e, int64_t panel, int64_t tile, int64_t end) {
    multiply(in, gate, e, panel, tile, end,
             [&](int64_t at, const float* v, int64_t count) { std::copy_n(v, count, h + at); });
    multiply(in, up, e, panel, tile, end,
             [&](int64_t at, const float* v, int64_t count) { k.activate(experts.activation, h + at, v, count); });
  });

  float* y = output_scratch.reserve<float>((slots + n) * hidden);
  const Activations mid(h, nullptr, routing.expert_end, ff, nullptr, !is_float(down.layout()), is_float(down.layout()), 1);
  for_experts(down, mid, [&](int64_t e, int64_t panel, int64_t tile, int64_t end) {
    multiply(mid, down, e, panel, tile, end,
             [&](int64_t at, const float* v, int64_t count) { std::copy_n(v, count, y + at); });
  });

  float* sums = post_norm ? y + slots * hidden : residual;
  if (post_norm) std::fill_n(sums, n * hidden, 0.0f);
  Pool::shared().run(n, [&](int64_t i, int) {
    for (int64_t c = i * top_k; c < (i + 1) * top_k; ++c) {
      const float weight = routing.choice_weight[static_cast<size_t>(c)];
      const float* from = y + routing.choice_slot[static_cast<size_t>(c)] * hidden;
      for (int64_t j = 0; j < hidden; ++j) sums[i * hidden + j] += weight * from[j];
    }
  });
  if (post_norm) add_normed(*post_norm, sums, n, hidden, residual);
}

int64_t moe_scratch_bytes(int64_t n, int64_t hidden, int64_t intermediate, int64_t num_experts, int64_t top_k) {
  const int64_t slots = n * top_k, groups = std::min(slots, num_experts);  // each may fill up a tile
  return (n * hidden + n * num_experts + slots * intermediate + (slots + n) * hidden) * 4 +
         Activations::bytes(slots + groups, hidden, true, true) + Activations::bytes(slots + groups, intermediate, true, true);
}

}  // namespace chandra
