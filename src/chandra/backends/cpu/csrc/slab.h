// Memory for panels: bump-allocated from large regions, so that many small weights share huge pages. A page fault costs
// as much as packing what goes into the page; huge pages make loading several times faster and reading free of TLB misses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace chandra {

// Bytes aligned to 64, zero at first. Whole pages go back to the system with each piece, the region with the last.
std::shared_ptr<uint8_t> allocate_panels(size_t bytes);

// Note that so many bytes more (or less) will be asked for: a region that fits them has no huge page left half empty.
void expect_panels(int64_t bytes);

}  // namespace chandra
