// A weight as the CPU kernels see it: panels, made once when it is loaded or anew in every call, or brought by others.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "linear_kernels.h"

namespace chandra {

// The stored arrays of one weight, as chandra.quant describes them. Rows are counted over all experts.
struct Source {
  Layout layout;
  int64_t rows, columns;
  const uint8_t* data = nullptr;
  const void* scales = nullptr;  // f32 of int8, f16 of int4
  const void* zeros = nullptr;   // f16 of int4
  const void* absmax = nullptr;  // f32 of nf4, u8 of nf4-dq
  const float* nested_absmax = nullptr;  // of nf4-dq only
  const float* nested_offset = nullptr;
  bool unaligned_nf4 = false;  // nf4 blocks do not begin with the rows: the panels are those of f32
};

// Bytes of a stored block of panel_size().columns values, of the formats that have one part.
int stored_block_bytes(Layout layout);

// Writes rows [first, first + count) of the source as rows [at, at + count) of a panel.
void pack_rows(const Source& source, int64_t first, int64_t count, int at, uint8_t* panel);

// When the panels of a weight are made. `later`: before its second product, so that a model answers as soon as its file
// is mapped; then the file's pages leave the process. `lookup`: never, and pages are dropped now and then, since each row
// brings its neighbours along. For both the source must be a file mapped privately and never written.
enum class Repack { never, now, later, lookup };

class Weight {
 public:
  // The layout a format of chandra.quant has for rows of so many columns. Throws std::invalid_argument if none.
  static Layout layout_of(std::string_view format, int64_t columns);
  static int64_t panel_bytes(Layout layout, int64_t columns);
  // Bytes of all panels.
  static int64_t repacked_bytes(Layout layout, int64_t experts, int64_t rows, int64_t columns);

  // Writes all panels of a source to memory that `zeroed` says to hold zeros already.
  static void pack(const Source& source, int64_t experts, int64_t rows, uint8_t* out, bool zeroed);

  // Rows of `source` are experts * rows. With Repack::now the source is not needed any more.
  Weight(const Source& source, int64_t experts, int64_t rows, Repack when);
  // Over repacked_bytes() of memory of the caller's that will hold panels when the weight is used.
  Weight(Layout layout, int64_t experts, int64_t rows, int64_t columns, uint8_t* panels);
  Weight(const Weight&) = delete;
  Weight& operator=(const Weight&) = delete;
  ~Weight();

  Layout layout() const { return source_.layout; }
  int64_t experts() const { return experts_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return source_.columns; }
  int64_t blocks() const { return blocks_; }  // of a panel
  int64_t panels() const { return (rows_ + kPanelRows - 1) / kPanelRows; }  // of an expert
  int64_t panel_bytes() const { return panel_bytes_; }
  int64_t repacked_bytes() const { return experts_ * panels() * panel_bytes_; }
  bool in_place() const { return !panels_.load(std::memory_order_acquire); }
  bool repacks() const { return when_ == Repack::now || when_ == Repack::later; }

  // To be asked once before each product: whether `repack` is to be called now.
  bool due() const {
    return when_ == Repack::later && (in_place() || products_.load(std::memory_order_relaxed) < 3) &&
           products_.fetch_add(1, std::memory_order_relaxed) > 0;
  }
  // Others may compute with the weight meanwhile. Where there is no memory, it stays in place. The second call drops the
  // pages that it shares with others in the file, which they no longer read by then.
  void repack() const;

  // A panel, made in this thread's scratch memory if need be: good until the next call in this thread.
  const uint8_t* panel(int64_t expert, int64_t index) const;
  // To be told after so many rows have been looked up.
  void looked_up(int64_t rows) const;
  // One row as floats.
  void unpack_row(int64_t row, float* out) const;

 private:
  int64_t row_bytes() const;  // stored

  Source source_;
  int64_t experts_, rows_, blocks_, panel_bytes_;
  Repack when_;
  mutable std::mutex repacking_;
  mutable std::atomic<int> products_{0};
  mutable std::atomic<int64_t> looked_up_{0};
  mutable std::shared_ptr<uint8_t> memory_;
  mutable std::atomic<const uint8_t*> panels_{nullptr};  // set once, when they are whole
};

}  // namespace chandra
