// The best k pairs of each row. A tile gives the pairs above the thresholds of its rows, which are the worst of the
// best so far, and after a block they go into heaps, one for each row. Columns come in order, so that of equal logits
// the first stays.

#include "choose_products.h"
#include "ops.h"
#include "plane.h"
#include "tasks.h"

#include <ATen/ops/full.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace contrastive_ops {
namespace {

using at::Tensor;

template <typename T>
struct Entry {
  using Order = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Order order;  // of the key: larger is better
  int32_t col;
  T value;

  bool better_than(const Entry& other) const {
    return order != other.order ? order > other.order : col < other.col;
  }
};

// An integer in the order of keys; NaN is above all numbers, or below them where the keys are negative logits.
template <typename T>
typename Entry<T>::Order order_of(T key, bool largest) {
  using Order = typename Entry<T>::Order;
  using Limits = std::numeric_limits<Order>;
  if (std::isnan(key)) {
    return largest ? Limits::max() : Limits::min();
  }
  const T value = key + T(0);  // no negative zero
  Order bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits < 0 ? bits ^ Limits::max() : bits;
}

template <typename T>
class Forward {
 public:
  template <typename Products>
  Forward(const Plane<Products>& plane, int64_t k, bool largest, std::optional<int64_t> noise)
      : kernels_(plane.kernels()),
        k_(std::min(k, plane.m())),
        largest_(largest),
        noise_(noise),
        values_(at::full({plane.n(), k}, largest ? -kInfinity : kInfinity, c10::CppTypeToScalarType<T>::value)),
        indices_(at::full({plane.n(), k}, -1, at::kLong)) {}

  void begin(const Block& block) {
    if (!(block.rows == rows_)) {
      finish_rows();
      rows_ = block.rows;
      best_.resize(rows_.size() * k_);
      counts_.assign(rows_.size(), 0);
      thresholds_.assign(rows_.size(), -kInfinity);
    }
    const int64_t pairs = block.tiles() * kTileSize;
    if (pairs > candidate_values_.numel()) {
      constexpr c10::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
      candidate_values_ = at::empty({pairs}, dtype);
      candidate_keys_ = noise_ || !largest_ ? at::empty({pairs}, dtype) : candidate_values_;
      candidate_cols_ = at::empty({pairs}, at::kByte);
      candidate_ends_ = at::empty({block.tiles() * kTile}, at::kInt);
    }
  }

  void reduce(int64_t tile, const TileAt<T>& at) {
    const T* thresholds = thresholds_.data() + (at.rows.begin - rows_.begin);
    const Noise noise{static_cast<uint64_t>(noise_.value_or(0)), at.rows.begin, at.cols.begin};
    kernels_.candidates(at.pairs, thresholds, largest_, noise_ ? &noise : nullptr, candidates_of(tile));
  }

  void end(const Block& block) {
    constexpr int64_t kRows = 16;  // of a task
    int64_t count = 0;
    for (const auto tile : c10::irange(block.tiles())) {
      count += block.part[tile] == Part::nothing ? 0 : candidates_of(tile).ends[block.rows_of(tile).size() - 1];
    }
    for_each_task((rows_.size() + kRows - 1) / kRows, kMoveCost * count, [&](int64_t task) {
      for (int64_t row = task * kRows; row < std::min(rows_.size(), (task + 1) * kRows); ++row) {
        const int64_t first = row / kTile * block.cols.tiles();
        for (const auto c : c10::irange(block.cols.tiles())) {
          if (block.part[first + c] != Part::nothing) {
            take(row, candidates_of(first + c), row % kTile, block.cols.tile(c));
          }
        }
      }
    });
  }

  Best result() {
    finish_rows();
    return {values_, indices_};
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  Candidates<T> candidates_of(int64_t tile) const {
    const int64_t first = tile * kTileSize;
    return {
        candidate_values_.template mutable_data_ptr<T>() + first,
        candidate_keys_.template mutable_data_ptr<T>() + first,
        candidate_cols_.template mutable_data_ptr<uint8_t>() + first,
        candidate_ends_.template mutable_data_ptr<int32_t>() + tile * kTile};
  }

  // The candidates of one row of a tile. In the padding there may be NaN.
  void take(int64_t row, const Candidates<T>& candidates, int64_t row_of_tile, Range cols) {
    Entry<T>* best = best_.data() + row * k_;
    const auto worse = [](const Entry<T>& a, const Entry<T>& b) { return a.better_than(b); };
    for (int32_t c = row_of_tile == 0 ? 0 : candidates.ends[row_of_tile - 1]; c < candidates.ends[row_of_tile]; ++c) {
      const int64_t col = cols.begin + candidates.cols[c];
      if (col >= cols.end) {
        break;
      }
      const Entry<T> entry{order_of(candidates.keys[c], largest_), static_cast<int32_t>(col), candidates.values[c]};
      if (counts_[row] < k_) {
        best[counts_[row]++] = entry;
        std::push_heap(best, best + counts_[row], worse);
      } else if (entry.better_than(best[0])) {
        replace_worst(best, entry);
      } else {
        continue;
      }
      if (counts_[row] == k_) {
        thresholds_[row] = key_of(best[0]);
      }
    }
  }

  // The first of a heap is the worst: it goes, and what is worse than others moves up.
  void replace_worst(Entry<T>* best, const Entry<T>& entry) const {
    int64_t place = 0;
    for (int64_t child = 1; child < k_; child = 2 * place + 1) {
      child += child + 1 < k_ && best[child].better_than(best[child + 1]);
      if (!entry.better_than(best[child])) {
        break;
      }
      best[place] = best[child];
      place = child;
    }
    best[place] = entry;
  }

  // The key of an order, the inverse of order_of. Only NaN is above infinity, and no key that counts below.
  T key_of(const Entry<T>& entry) const {
    using Limits = std::numeric_limits<typename Entry<T>::Order>;
    if (entry.order == Limits::max() || entry.order == Limits::min()) {
      return entry.order > 0 ? kInfinity : -kInfinity;
    }
    const auto bits = entry.order < 0 ? entry.order ^ Limits::max() : entry.order;
    T key;
    std::memcpy(&key, &bits, sizeof(key));
    return key;
  }

  // What is left in the heaps, in order.
  void finish_rows() {
    const int64_t stride = values_.size(1);
    T* values = values_.template mutable_data_ptr<T>();
    int64_t* indices = indices_.template mutable_data_ptr<int64_t>();
    for_each_task(rows_.size(), kMoveCost * rows_.size() * k_, [&](int64_t row) {
      Entry<T>* best = best_.data() + row * k_;
      std::sort(best, best + counts_[row], [](const Entry<T>& a, const Entry<T>& b) { return a.better_than(b); });
      for (const auto rank : c10::irange(counts_[row])) {
        const int64_t place = (rows_.begin + row) * stride + rank;
        values[place] = best[rank].value;
        indices[place] = best[rank].col;
      }
    });
  }

  const TileKernels<T>& kernels_;
  int64_t k_;
  bool largest_;
  std::optional<int64_t> noise_;
  Tensor values_;
  Tensor indices_;
  Range rows_{};                 // of the blocks that are under way
  std::vector<Entry<T>> best_;   // [rows, k] heaps
  std::vector<int64_t> counts_;  // of entries in them
  std::vector<T> thresholds_;    // [rows] what a key must be above
  Tensor candidate_values_;      // of the tiles of a block, see Candidates
  Tensor candidate_keys_;
  Tensor candidate_cols_;
  Tensor candidate_ends_;
};

}  // namespace

Best similarity_topk(const Problem& problem, int64_t k, bool largest, std::optional<int64_t> noise) {
  Problem walked = problem;
  Form& form = walked.pairs;
  if (!form.y.has_value()) {  // rows need all of their columns: no tile stands for its mirror image
    form.y = form.x;
    form.col_scale = form.row_scale;
    form.col_bias = form.row_bias;
    walked.col_ids = walked.row_ids;
    walked.mutual = true;
  }
  return with_plane(walked, [&](auto& plane) {
    using T = typename std::decay_t<decltype(plane)>::T;
    Forward<T> reduction(plane, k, largest, noise);
    plane.forward(reduction, false, full(0, T(0)));
    return reduction.result();
  });
}

}  // namespace contrastive_ops
