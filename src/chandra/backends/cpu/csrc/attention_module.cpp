// Python bindings of attention: `Rope`, `HeadNorm` and `Attention`.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <string_view>

#include "array.h"
#include "attention.h"
#include "rope.h"

namespace nb = nanobind;

namespace chandra {
namespace {

struct PyHeadNorm {
  nb::object weight, bias;  // keep the arrays alive
  HeadNorm norm;
};

KvType kv_type(std::string_view name) {
  if (name == "f16") return KvType::f16;
  if (name == "bf16") return KvType::bf16;
  if (name == "q8_0") return KvType::q8_0;
  if (name == "q4_0") return KvType::q4_0;
  if (name == "f32") return KvType::f32;
  throw std::invalid_argument("no KV cache type is called " + std::string(name));
}

Rows rows_of(nb::handle object, int64_t n, int64_t width) {
  const Array array(object);
  if (array.ndim() != 2 || array.dim(0) != n || array.dim(1) != width)
    throw std::invalid_argument("q, k, v or out has the wrong shape");
  return {array.as<float>(), array.stride(0) / static_cast<int64_t>(sizeof(float))};
}

uint8_t* cache_of(nb::handle object, const AttentionShape& shape, const KvCache& cache) {
  const Array array(object);
  if (!array.contiguous() || array.ndim() != 4 || array.dim(0) != cache.num_blocks ||
      array.dim(1) != shape.num_kv_heads || array.dim(2) != cache.block_size ||
      array.dim(3) * array.itemsize() != cache.row_bytes)
    throw std::invalid_argument("the cache has the wrong shape or type");
  return static_cast<uint8_t*>(array.data());
}

// The attention of one layer, bound to its parameters.
class PyAttention {
 public:
  PyAttention(int num_heads, int num_kv_heads, int head_dim, float scale, std::optional<int64_t> window,
              std::optional<float> softcap, nb::object rope, std::optional<PyHeadNorm> q_norm,
              std::optional<PyHeadNorm> k_norm)
      : rope_object_(std::move(rope)),
        rope_(rope_object_.is_none() ? nullptr : nb::cast<Rope*>(rope_object_)),
        norms_{q_norm.value_or(PyHeadNorm()), k_norm.value_or(PyHeadNorm())} {
    shape_.num_heads = num_heads;
    shape_.num_kv_heads = num_kv_heads;
    shape_.head_dim = head_dim;
    shape_.scale = scale;
    shape_.window = window.value_or(0);
    shape_.softcap = softcap.value_or(0.0f);
    shape_.q_norm = norms_[0].norm;
    shape_.k_norm = norms_[1].norm;
    if (num_kv_heads <= 0 || num_heads <= 0 || head_dim <= 0 || num_heads % num_kv_heads)
      throw std::invalid_argument("heads that cannot be");
    if (rope_) {
      shape_.rotary_dim = rope_->rotary_dim();
      shape_.interleaved = rope_->interleaved();
    }
    if (shape_.rotary_dim > head_dim) throw std::invalid_argument("rotary_dim is larger than head_dim");
    if ((shape_.q_norm.weight && num_heads * head_dim % shape_.q_norm.width) ||
        (shape_.k_norm.weight && num_kv_heads * head_dim % shape_.k_norm.width))
      throw std::invalid_argument("a head norm's width does not divide its heads");
  }

  void operator()(nb::handle q, nb::handle k, nb::handle v, nb::handle positions, nb::handle query_start,
                  nb::handle context_lens, nb::handle cache_k, nb::handle cache_v, const char* type,
                  int64_t block_size, nb::handle block_table, nb::handle slots, nb::handle out) {
    AttentionCall call{};
    call.shape = &shape_;
    const Array table(block_table), where(positions), keys(cache_k);
    call.n = where.size();
    call.sequences = Array(context_lens).size();
    call.positions = where.as<int32_t>(call.n);
    call.query_start = Array(query_start).as<int32_t>(call.sequences + 1);
    call.context_lens = Array(context_lens).as<int32_t>(call.sequences);
    call.slots = Array(slots).as<int32_t>(call.n);
    if (table.ndim() != 2 || table.dim(0) != call.sequences)
      throw std::invalid_argument("block_table has the wrong shape");
    call.blocks_per_sequence = table.dim(1);
    call.block_table = table.as<int32_t>(call.sequences * call.blocks_per_sequence);
    call.cache.type = kv_type(type);
    call.cache.num_blocks = keys.ndim() == 4 ? keys.dim(0) : 0;
    call.cache.block_size = block_size;
    call.cache.row_bytes = kv_row_bytes(call.cache.type, shape_.head_dim);
    call.cache.k = cache_of(cache_k, shape_, call.cache);
    call.cache.v = cache_of(cache_v, shape_, call.cache);
    call.q = rows_of(q, call.n, shape_.num_heads * shape_.head_dim);
    call.k = rows_of(k, call.n, shape_.num_kv_heads * shape_.head_dim);
    call.v = rows_of(v, call.n, shape_.num_kv_heads * shape_.head_dim);
    call.out = rows_of(out, call.n, shape_.num_heads * shape_.head_dim);
    const nb::gil_scoped_release release;
    std::shared_ptr<const RopeTable> rope;
    if (rope_) {
      rope = rope_->table(call.positions, call.n);
      call.cos = rope->cos.data();
      call.sin = rope->sin.data();
    }
    attention(call);
  }

 private:
  nb::object rope_object_;
  Rope* rope_;
  PyHeadNorm norms_[2];
  AttentionShape shape_{};
};

}  // namespace

void register_attention(nb::module_& m) {
  nb::class_<Rope>(m, "Rope", "Rotary embedding; keeps the cos and sin of the last positions.")
      .def(
          "__init__",
          [](Rope* self, nb::handle inv_freq, float scale, bool interleaved) {
            const Array array(inv_freq);
            const float* data = array.as<float>(array.size());
            new (self) Rope(std::vector<float>(data, data + array.size()), scale, interleaved);
          },
          nb::arg("inv_freq"), nb::arg("scale"), nb::arg("interleaved"));
  nb::class_<PyHeadNorm>(m, "HeadNorm", "A norm of every `len(weight)` values of a row.")
      .def(
          "__init__",
          [](PyHeadNorm* self, nb::object weight, nb::object bias, float eps, bool layer) {
            const Array array(weight);
            const int64_t width = array.size();
            if (width <= 0) throw std::invalid_argument("a head norm without weights");
            const float* bias_data = bias.is_none() ? nullptr : Array(bias).as<float>(width);
            const HeadNorm norm{array.as<float>(width), bias_data, static_cast<int>(width), eps, layer};
            new (self) PyHeadNorm{weight, bias, norm};
          },
          nb::arg("weight"), nb::arg("bias").none(), nb::arg("eps"), nb::arg("layer"));
  nb::class_<PyAttention>(m, "Attention", "The attention of one layer, bound to its parameters.")
      .def(nb::init<int, int, int, float, std::optional<int64_t>, std::optional<float>, nb::object,
                    std::optional<PyHeadNorm>, std::optional<PyHeadNorm>>(),
           nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("scale"),
           nb::arg("window").none(), nb::arg("softcap").none(), nb::arg("rope").none(), nb::arg("q_norm").none(),
           nb::arg("k_norm").none())
      .def("__call__", &PyAttention::operator());
  m.def("attention_scratch_bytes", &attention_scratch_bytes, nb::arg("num_heads"), nb::arg("num_kv_heads"),
        nb::arg("head_dim"), nb::arg("rows"), nb::arg("sequences"), nb::arg("context"),
        "Most bytes of scratch memory that attention keeps for batches of up to `rows` tokens of `sequences` sequences "
        "of `context` tokens, with the cos and sin of one set of rope parameters.");
}

}  // namespace chandra
