#include "chain.h"

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "graph.h"
#include "hash.h"

namespace mla {
namespace {

// Streams come and go, and graphs stay. Each takes about 100 KB of the device (H200) and 3 KB of the host.
constexpr size_t kMaxFamilies = 128;  // each has one graph or more
constexpr size_t kMaxOwn = 256;  // of those: graphs for launches that came again; 61 layers with four sets of kernels
// Launches that were not made for so many calls may have lost their graph to others that come again.
constexpr uint64_t kStaleCalls = 1024;
constexpr size_t kBuckets = 512;

// What graphs of a family are alike in: device, stream, kernels. How one starts follows from its kernel and the one before.
using Key = std::tuple<int, uintptr_t, std::array<const Kernel*, Chain::kMaxLaunches>>;

struct Kept {
  Graph graph;
  uint64_t hash = 0;
  uint64_t last_call = 0;
  Kept* next = nullptr;  // in its bucket
};

struct Family {
  std::deque<Kept> graphs;  // the first is for launches without one of their own
  size_t candidate = 0;     // the last one that was asked whether it is stale
  bool grows = driver().add_graph_dependencies.function;
};

// Equal for equal launches. What a launch shares with the one before counts once.
uint64_t hash_of(const Chain& chain, int device, uintptr_t stream) {
  uint64_t hash = stream ^ static_cast<uint64_t>(device);
  const KernelLaunch* before = nullptr;
  for (const KernelLaunch& each : chain) {
    const bool shares = before && before->arguments[0] == each.arguments[0] && before->sizes[0] == each.sizes[0];
    for (int i = shares; i < KernelLaunch::kMaxArguments && each.sizes[i]; ++i)
      hash = hash_bytes(each.arguments[i], each.sizes[i], hash);
    before = &each;
  }
  return hash;
}

class Graphs {
 public:
  // One that is these launches. Null where they have to be made one by one.
  const Graph* find(const Chain& chain, int device, uintptr_t stream) {
    const uint64_t hash = hash_of(chain, device, stream);
    ++calls_;
    for (Kept* kept = bucket(hash); kept; kept = kept->next)
      if (kept->hash == hash && kept->graph.is(chain, device, stream)) return use(*kept);
    Family* const family = find_family(chain, device, stream);
    if (!family) return nullptr;
    const bool again = comes_again(hash);
    Kept* kept = make(*family, again, chain, device, stream);
    if (!kept) kept = set(*family, again, chain);
    if (!kept) return nullptr;
    move(*kept, hash);
    return use(*kept);
  }

 private:
  Kept*& bucket(uint64_t hash) { return buckets_[hash % kBuckets]; }

  const Graph* use(Kept& kept) {
    kept.last_call = calls_;
    return &kept.graph;
  }

  void move(Kept& kept, uint64_t hash) {
    Kept** at = &bucket(kept.hash);
    while (*at && *at != &kept) at = &(*at)->next;
    if (*at) *at = kept.next;
    kept.hash = hash;
    kept.next = std::exchange(bucket(hash), &kept);
  }

  // Whether it is remembered, as it is from now on.
  bool comes_again(uint64_t hash) {
    auto& some = remembered_[hash % remembered_.size()];
    if (std::find(some.begin(), some.end(), hash) != some.end()) return true;
    std::copy_backward(some.begin(), some.end() - 1, some.end());
    some[0] = hash;
    return false;
  }

  Family* find_family(const Chain& chain, int device, uintptr_t stream) {
    Key key{device, stream, {}};
    int size = 0;
    for (const KernelLaunch& launch : chain) std::get<2>(key)[size++] = launch.kernel;
    if (const auto found = families_.find(key); found != families_.end()) return &found->second;
    return families_.size() < kMaxFamilies ? &families_[key] : nullptr;
  }

  // Null where there is to be no other.
  Kept* make(Family& family, bool again, const Chain& chain, int device, uintptr_t stream) {
    const bool first = family.graphs.empty();
    if (!family.grows || !(first || (again && num_own_ < kMaxOwn))) return nullptr;
    try {
      family.graphs.push_back({Graph(chain, device, stream)});
    } catch (const CudaError&) {  // as of a driver that has no graphs of such kernels
      family.grows = false;
      return nullptr;
    }
    num_own_ += !first;
    return &family.graphs.back();
  }

  // Null if there is none to set.
  Kept* set(Family& family, bool again, const Chain& chain) {
    auto& graphs = family.graphs;
    if (graphs.empty()) return nullptr;
    Kept* chosen = &graphs.front();
    if (again) {
      family.candidate = (family.candidate + 1) % graphs.size();
      Kept& candidate = graphs[family.candidate];
      if (calls_ - candidate.last_call > kStaleCalls) chosen = &candidate;
    }
    chosen->graph.set(chain);
    return chosen;
  }

  std::map<Key, Family> families_;
  std::array<Kept*, kBuckets> buckets_{};
  // Hashes of launches that no graph was for: the last 8 of each remainder.
  std::array<std::array<uint64_t, 8>, 256> remembered_{};
  uint64_t calls_ = 0;
  size_t num_own_ = 0;
};

}  // namespace

void queue_chain(const Chain& chain, int device, uintptr_t stream, bool captured) {
  static std::mutex mutex;
  static Graphs graphs;
  const std::lock_guard<std::mutex> lock(mutex);  // from the parameters to the launch
  const Graph* const graph = captured ? nullptr : graphs.find(chain, device, stream);
  if (graph) return graph->launch();
  for (const KernelLaunch& each : chain) launch(each, stream);
}

}  // namespace mla
