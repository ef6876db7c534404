#include "tensor_map.h"

#include <array>
#include <cstring>
#include <functional>
#include <mutex>
#include <tuple>
#include <unordered_map>

#include "driver.h"

namespace mla {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

constexpr cuuint32_t kBoxColumns = 64;  // 128 bytes, the width of the swizzle
constexpr int32_t kMaxBoxRows = 64;
// What the hardware can address.
constexpr cuuint64_t kStrideMultiple = 16, kStrideLimit = cuuint64_t{1} << 40;
// A model has a cache for each layer. When there are more maps than this, they belong to caches that are no more.
constexpr size_t kMaxMaps = 1024;

// As many as divide a page and a tile into whole boxes; 0 when these would be too small.
int32_t choose_box_rows(int32_t page_size, int32_t block_n) {
  const int32_t all = page_size | block_n | kMaxBoxRows;
  const int32_t rows = all & -all;  // the largest power of two that divides all three
  return rows < kMinBoxRows ? 0 : rows;
}

// All that a map depends on.
struct Boxes {
  const void* address;
  std::array<cuuint64_t, 3> dims;     // columns, slots of a page, pages
  std::array<cuuint64_t, 2> strides;  // in bytes, of slots and of pages
  cuuint32_t rows;                    // of a box
  Dtype dtype;

  bool operator==(const Boxes& other) const {
    return std::tie(address, dims, strides, rows, dtype) ==
           std::tie(other.address, other.dims, other.strides, other.rows, other.dtype);
  }
};

// Caches differ in their addresses, and hardly in anything else.
struct HashBoxes {
  size_t operator()(const Boxes& boxes) const { return std::hash<const void*>()(boxes.address); }
};

Boxes boxes_of(const void* address, int columns, CacheStrides strides, int32_t rows, Dtype dtype,
               const DecodeParams& params) {
  return {address,
          {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(params.page_size),
           static_cast<cuuint64_t>(params.num_pages)},
          {2 * static_cast<cuuint64_t>(strides.token), 2 * static_cast<cuuint64_t>(strides.page)},
          static_cast<cuuint32_t>(rows),
          dtype};
}

// False where the driver has no such map.
bool encode(const Boxes& boxes, TensorMap& map) {
  const auto encode_tiled = driver().cuTensorMapEncodeTiled.function;
  if (!encode_tiled) return false;
  for (const cuuint64_t stride : boxes.strides)
    if (stride % kStrideMultiple != 0 || stride >= kStrideLimit) return false;
  const CUtensorMapDataType type =
      boxes.dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint32_t box[] = {kBoxColumns, boxes.rows, 1}, every_element[] = {1, 1, 1};
  CUtensorMap encoded;
  const CUresult result =
      encode_tiled(&encoded, type, 3, const_cast<void*>(boxes.address), boxes.dims.data(), boxes.strides.data(), box,
                   every_element, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return false;
  std::memcpy(&map, &encoded, sizeof map);
  return true;
}

// encode(), but once for all calls. A map depends on the boxes alone, so what is kept is never stale.
bool find_map(const Boxes& boxes, TensorMap& map) {
  struct Kept {
    bool exists;
    TensorMap map;
  };
  static std::mutex mutex;
  static std::unordered_map<Boxes, Kept, HashBoxes> all;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = all.find(boxes);
  if (found == all.end()) {
    if (all.size() >= kMaxMaps) all.clear();
    Kept made{};
    made.exists = encode(boxes, made.map);
    found = all.emplace(boxes, made).first;
  }
  map = found->second.map;
  return found->second.exists;
}

}  // namespace

void add_tensor_maps(const Variant& variant, Dtype dtype, DecodeParams& params) {
  params.box_rows = 0;
  const int32_t rows = choose_box_rows(params.page_size, variant.block_n);
  if (rows == 0) return;
  const Boxes latent = boxes_of(params.latent, variant.d_v, params.latent_strides, rows, dtype, params);
  if (!find_map(latent, params.latent_map)) return;
  if (const int columns = variant.d_qk - variant.d_v; columns > 0) {
    const Boxes rope = boxes_of(params.rope, columns, params.rope_strides, rows, dtype, params);
    if (!find_map(rope, params.rope_map)) return;
  }
  params.box_rows = rows;
}

}  // namespace mla
