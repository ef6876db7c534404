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
// A model has one for each layer. When there are more than this, most are no more.
constexpr size_t kMaxCaches = 512;

// As many as divide a page and a tile into whole boxes; 0 when these would be too small.
int32_t choose_box_rows(int32_t page_size, int32_t block_n) {
  const int32_t all = page_size | block_n | kMaxBoxRows;
  const int32_t rows = all & -all;  // the largest power of two that divides all three
  return rows < kMinBoxRows ? 0 : rows;
}

// What a map depends on and does not share with the other of its cache.
struct Boxes {
  const void* address = nullptr;
  std::array<cuuint64_t, 3> dims{};     // columns, slots of a page, pages
  std::array<cuuint64_t, 2> strides{};  // in bytes, of slots and of pages

  bool operator==(const Boxes& other) const {
    return std::tie(address, dims, strides) == std::tie(other.address, other.dims, other.strides);
  }
};

// All that the two maps of a cache depend on. It may have no rope.
struct Cache {
  Boxes latent, rope;
  cuuint32_t rows;  // of a box
  Dtype dtype;

  bool operator==(const Cache& other) const {
    return std::tie(latent, rope, rows, dtype) == std::tie(other.latent, other.rope, other.rows, other.dtype);
  }
};

// Caches differ in their addresses, and hardly in anything else.
struct HashCache {
  size_t operator()(const Cache& cache) const { return std::hash<const void*>()(cache.latent.address); }
};

Boxes boxes_of(const void* address, int columns, CacheStrides strides, const DecodeParams& params) {
  return {address,
          {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(params.page_size),
           static_cast<cuuint64_t>(params.num_pages)},
          {2 * static_cast<cuuint64_t>(strides.token), 2 * static_cast<cuuint64_t>(strides.page)}};
}

// False where the driver has no such map.
bool encode(const Cache& cache, const Boxes& boxes, TensorMap& map) {
  const auto encode_tiled = driver().cuTensorMapEncodeTiled.function;
  if (!encode_tiled) return false;
  for (const cuuint64_t stride : boxes.strides)
    if (stride % kStrideMultiple != 0 || stride >= kStrideLimit) return false;
  const CUtensorMapDataType type =
      cache.dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint32_t box[] = {kBoxColumns, cache.rows, 1}, every_element[] = {1, 1, 1};
  CUtensorMap encoded;
  const CUresult result =
      encode_tiled(&encoded, type, 3, const_cast<void*>(boxes.address), boxes.dims.data(), boxes.strides.data(), box,
                   every_element, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return false;
  std::memcpy(&map, &encoded, sizeof map);
  return true;
}

// encode(), but once for all calls. Maps depend on the cache alone, so what is kept is never stale.
bool find_maps(const Cache& cache, TensorMap& latent, TensorMap& rope) {
  struct Kept {
    TensorMap latent, rope;
    bool exist;
  };
  static std::mutex mutex;
  static std::unordered_map<Cache, Kept, HashCache> all;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = all.find(cache);
  if (found == all.end()) {
    if (all.size() >= kMaxCaches) all.clear();
    Kept made{};
    made.exist =
        encode(cache, cache.latent, made.latent) && (!cache.rope.address || encode(cache, cache.rope, made.rope));
    found = all.emplace(cache, made).first;
  }
  latent = found->second.latent;
  rope = found->second.rope;
  return found->second.exist;
}

}  // namespace

void add_tensor_maps(const Variant& variant, Dtype dtype, DecodeParams& params) {
  params.box_rows = 0;
  const int32_t rows = choose_box_rows(params.page_size, variant.block_n);
  if (rows == 0) return;
  Cache cache{
      boxes_of(params.latent, variant.d_v, params.latent_strides, params), {}, static_cast<cuuint32_t>(rows), dtype};
  if (const int columns = variant.d_qk - variant.d_v; columns > 0)
    cache.rope = boxes_of(params.rope, columns, params.rope_strides, params);
  if (find_maps(cache, params.latent_map, params.rope_map)) params.box_rows = rows;
}

}  // namespace mla
