// A call of mla.decode as the extension reads it: what may differ between calls that are alike, and a key for all else.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "planned.h"
#include "settings.h"
#include "torch.h"

namespace mla {

// The tensors of a call: what is read, then what is written.
enum Slot { kQ, kQRope, kKv, kKvRope, kBlockTable, kSeqLens, kCuSeqlensQ, kOut, kLse, kWorkspace, kNumSlots };
constexpr int kFirstWritten = kOut;

// What the choice of a variant goes by where a caller says how long requests are at most: a few of its bits, rounded up, so that a
// length that grows with every step makes a new call every eighth to sixteenth of it.
int32_t rounded_length(int32_t length);

// Calls of equal keys differ in addresses, `scale` and what their tensors hold, and in nothing else.
class Key {
 public:
  // Where the next words go. They count once taken.
  int64_t* room() { return words_.data() + size_; }
  void take(int num_words) { size_ += num_words; }
  void add(int64_t word) { words_[size_++] = word; }
  bool add_text(std::string_view text);  // false: too long

  bool operator==(const Key& other) const;
  size_t hash() const;

 private:
  static constexpr int kMaxTextBytes = 64, kFlagWords = 2;
  std::array<int64_t, kNumSlots * kMaxTensorWords + kMaxTextBytes / 8 + 1 + kPlanWords + kFlagWords> words_;
  int size_ = 0;
};

struct Arguments {
  nanobind::handle q, kv_cache, block_table, seq_lens, cu_seqlens_q, out, lse, workspace, plan;
  nanobind::handle scale, causal, d_v, return_lse, batch_invariant, max_seq_len;
  std::string_view forced;  // the name in force, empty if none is
  Settings settings;
};

struct Call {
  std::array<TensorView, kNumSlots> tensors;
  nanobind::handle out, lse;  // None where they are to be made
  PlannedSchedule* plan = nullptr;
  double scale = 0;
  bool causal = false, return_lse = false, batch_invariant = false;
  int32_t max_seq_len = -1;  // rounded; -1: not said, or of no account, as the plan has the variant
  int64_t options = 0;       // the flags, d_v and what else has no tensor
  Key key;
};

// False for a call that may be wrong, or is too unusual to have a key: one that Python has to look at.
bool recognise(const Arguments& arguments, Call& call);

// The call when Python has checked it and made plain values of its numbers and flags. Throws what reading a tensor throws.
void read_checked(const Arguments& arguments, Call& call);

}  // namespace mla
