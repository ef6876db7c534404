// A hash of memory, for tables in this process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mla {

// Continues the hash `before`. Four sums side by side, as each multiplication waits for the one before it in its sum.
inline uint64_t hash_bytes(const void* data, size_t bytes, uint64_t before) {
  constexpr uint64_t kFactor = 0x9E3779B97F4A7C15;
  constexpr size_t kWord = sizeof(uint64_t);
  const auto* at = static_cast<const unsigned char*>(data);
  uint64_t sums[4] = {1, 2, 3, 4}, words[4];
  const auto add = [&](int i) { sums[i] = (sums[i] ^ words[i]) * kFactor; };
  size_t left = bytes;
  for (; left >= sizeof words; left -= sizeof words, at += sizeof words) {
    std::memcpy(words, at, sizeof words);
    for (int i = 0; i < 4; ++i) add(i);
  }
  for (int i = 0; left > 0; ++i) {
    const size_t some = left < kWord ? left : kWord;
    words[i] = 0;
    std::memcpy(&words[i], at, some);
    add(i);
    left -= some, at += some;
  }
  uint64_t all = before ^ bytes;
  for (const uint64_t sum : sums) all = (all ^ sum ^ sum >> 32) * kFactor;
  return all ^ all >> 32;
}

}  // namespace mla
