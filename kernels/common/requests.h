// What the schedules (schedule.h, parts.h) are made of: requests as their lengths say, in tiles. For the host and the device alike.
#pragma once

#include <cstring>
#include <type_traits>

#include "plan_view.h"

namespace mla::schedule {

// Longer requests count as this long, so that the number of a token past the end of the last tile still fits 31 bits.
constexpr int64_t kMaxLen = (int64_t{1} << 31) - 4096;

constexpr int kMaxGroupSize = 8;

struct Shape {  // of the tile that a variant computes: powers of two
  int32_t block_rows, block_n;
  int32_t merges_pairs;  // whether the pipeline merges pairs (PlanWorker); if not, the combine kernel does
};

// Of a >= 0 and b > 0: signed division takes longer, and so does one that minds zero.
template <class T>
MLA_HD T quotient(T a, T b) {
  using Unsigned = std::make_unsigned_t<T>;
  if (b == 0) __builtin_unreachable();
  return static_cast<T>(static_cast<Unsigned>(a) / static_cast<Unsigned>(b));
}
template <class T>
MLA_HD T ceil_div(T a, T b) {
  return quotient<T>(a + b - 1, b);
}
// The same of units (schedule.h). Quotients of those of 32 bits are at most this (plan_sizes.h), so that a float tells them: next to 2^23,
// where floats are whole numbers, comes out the one nearest to a quotient that rounding has made up to 2^-2 larger or smaller. That is at
// most one too large.
constexpr int64_t kMaxQuotient = 1 << 20;
MLA_HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.f / x;
#endif
}
MLA_HD int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
template <class Unit>
MLA_HD Unit quotient_of_units(Unit a, Unit b) {
  if constexpr (sizeof(Unit) > sizeof(float)) {
    return quotient(a, b);
  } else {
    constexpr float whole = 1 << 23;
    const int32_t nearest = bits_of(static_cast<float>(a) * reciprocal(static_cast<float>(b)) + whole) - bits_of(whole);
    return nearest + ((a - nearest * b) >> 31);
  }
}
template <class Unit>
MLA_HD Unit ceil_div_of_units(Unit a, Unit b) {
  return quotient_of_units<Unit>(a + b - 1, b);
}
MLA_HD int32_t log2_of(int32_t x) {  // rounded down, x > 0
#ifdef __CUDA_ARCH__
  return 31 - __clz(x);
#else
  return 31 - __builtin_clz(static_cast<unsigned>(x));
#endif
}
// ceil_div where the divisor is a power of two.
template <class T>
MLA_HD T blocks_of(T a, int32_t size) {
  return (a + (size - 1)) >> log2_of(size);
}
template <class T>
MLA_HD T clamp(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

struct Request {
  int32_t first_token;  // of its query tokens, in the whole query
  int32_t num_tokens;
  int32_t len;  // KV tokens
  int32_t row_blocks;
};

MLA_HD int32_t max_len_of(const Lengths& lengths) {
  return static_cast<int32_t>(lengths.max_len < kMaxLen ? lengths.max_len : kMaxLen);
}
MLA_HD int32_t row_blocks_of(const Lengths& lengths, Shape shape, int32_t num_tokens) {
  return static_cast<int32_t>(blocks_of(int64_t{num_tokens} * lengths.h_q, shape.block_rows));
}

// Whatever `seq_lens` says of KV tokens, and two neighbours in `cu_seqlens_q` of query tokens.
MLA_HD int32_t len_of(const Lengths& lengths, int32_t given) { return clamp(given, 0, max_len_of(lengths)); }
struct QueryTokens {
  int32_t first, number;
};
MLA_HD QueryTokens query_tokens_of(const Lengths& lengths, int32_t begin, int32_t end) {
  const int32_t first = clamp(begin, 0, lengths.total_q);
  return {first, clamp(end, first, lengths.total_q) - first};
}
// Whatever the caller's lengths say, what comes out lies inside the caller's tensors.
MLA_HD Request request_at(const Lengths& lengths, Shape shape, int32_t i) {
  Request r;
  if (lengths.cu_seqlens_q) {
    const QueryTokens tokens = query_tokens_of(lengths, lengths.cu_seqlens_q[i], lengths.cu_seqlens_q[i + 1]);
    r.first_token = tokens.first;
    r.num_tokens = tokens.number;
  } else {
    r.first_token = 0;  // a uniform query is addressed by its batch stride
    r.num_tokens = lengths.s_q;
  }
  r.len = len_of(lengths, lengths.seq_lens[i]);
  r.row_blocks = row_blocks_of(lengths, shape, r.num_tokens);
  return r;
}

// Of `group_size` row blocks each, the last one may have fewer. With units of 32 bits there are as few row blocks.
template <class Unit = int64_t>
MLA_HD int32_t bundles(int32_t row_blocks, int32_t group_size) {
  if (row_blocks <= group_size) return row_blocks > 0;
  if constexpr (sizeof(Unit) == sizeof(row_blocks)) return ceil_div_of_units(row_blocks, group_size);
  else return ceil_div(row_blocks, group_size);
}

// The group size that leaves the busiest group the least work, as `units` in bundles of `group_size` cost. Larger groups win ties, as
// they read KV from memory fewer times.
MLA_HD int32_t largest_group_size(int32_t max_row_blocks, int32_t num_workers) {
  return clamp(max_row_blocks < num_workers ? max_row_blocks : num_workers, 1, kMaxGroupSize);
}
MLA_HD int32_t groups_of(int32_t workers, int32_t group_size) {
  return group_size == 1 ? workers : quotient_of_units(workers, group_size);  // most batches have one row block each
}
template <class Unit>
MLA_HD Unit busiest_group(Unit units, int32_t groups) {
  return ceil_div_of_units<Unit>(units, groups);
}
inline int32_t best_group_size(const int64_t (&units)[kMaxGroupSize], int32_t max_row_blocks, int32_t num_workers) {
  int32_t best = 1;
  int64_t least = busiest_group<int64_t>(units[0], num_workers);
  for (int32_t size = 2; size <= largest_group_size(max_row_blocks, num_workers); ++size) {
    const int64_t cost = busiest_group<int64_t>(units[size - 1], groups_of(num_workers, size));
    if (cost <= least) best = size, least = cost;
  }
  return best;
}

}  // namespace mla::schedule
