// Which pairs take part: not those that `exclude` names, or that ids or a ceiling leave out.
#pragma once

#include "problem.h"
#include "ranges.h"
#include "tile.h"

#include <c10/util/irange.h>

#include <limits>
#include <optional>
#include <vector>

namespace contrastive_ops {

struct IdRange {
  int64_t min;
  int64_t max;

  bool disjoint(const IdRange& other) const {
    return max < other.min || other.max < min;
  }
};

// Group ids, padded to whole tiles, and their range in each tile: with sorted ids most tiles need no look at the pairs.
struct Ids {
  Vector<int64_t> values;
  std::vector<IdRange> ranges;

  Ids(const std::optional<at::Tensor>& ids, int64_t n) {
    if (!ids.has_value()) {
      return;
    }
    values = Vector<int64_t>(ids, n, 0, 0);
    const int64_t* id = values.at(0);
    for (int64_t begin = 0; begin < n; begin += kTile) {
      const auto [low, high] = std::minmax_element(id + begin, id + std::min(begin + kTile, n));
      ranges.push_back({*low, *high});
    }
  }
  bool given() const {
    return values.at(0) != nullptr;
  }
};

template <typename T>
class Masks {
 public:
  Masks(const Problem& problem, int64_t n, int64_t m)
      : m_(m),
        mirrored_(!problem.pairs.y.has_value()),
        mutual_(mirrored_ || problem.mutual),
        restrict_(problem.restrict_to_ids),
        ceilings_(problem.ceiling.has_value() || problem.col_ceiling.has_value()),
        above_(problem.above),
        row_ids_(problem.row_ids, n),
        col_ids_(mirrored_ ? row_ids_ : Ids(problem.col_ids, m)) {
    if (ceilings_) {
      ceiling_ = Vector<T>(problem.ceiling, n, kInfinity, kInfinity);
      col_ceiling_ = mirrored_ ? ceiling_ : Vector<T>(problem.col_ceiling, m, kInfinity, kInfinity);
    }
    if (problem.exclude.has_value()) {
      exclude_ = problem.exclude->contiguous();
    }
    if (exclude_.defined() && restrict_) {
      find_excluded_tiles(n);
    }
  }

  bool excludes() const {
    return exclude_.defined();
  }

  // Whether the guide decides over pairs.
  bool have_ceilings() const {
    return ceilings_;
  }

  // Whether no pair of a tile takes part, and no logit of an excluded pair is in it.
  bool leave_out(Range rows, Range cols) {
    return restrict_ && row_ids_.ranges[rows.begin / kTile].disjoint(col_ids_.ranges[cols.begin / kTile]) &&
           !(exclude_.defined() && excluded_tile(rows.begin, cols.begin));
  }

  // f(row, place in the tile) for the pairs (row, exclude[row]) of a tile. In self-similarity the row may be either
  // side of the pair; on the diagonal both places of a pair are in the tile.
  template <typename F>
  void for_each_excluded(Range rows, Range cols, const F& f) const {
    if (!exclude_.defined()) {
      return;
    }
    const int64_t* exclude = exclude_.const_data_ptr<int64_t>();
    for (const auto i : c10::irange(rows.begin, rows.end)) {
      if (cols.contains(exclude[i])) {
        f(i, (i - rows.begin) * kTile + exclude[i] - cols.begin);
      }
    }
    for (int64_t j = cols.begin; mutual_ && j < cols.end; ++j) {
      if (rows.contains(exclude[j])) {
        f(j, (exclude[j] - rows.begin) * kTile + j - cols.begin);
      }
    }
  }

  // Stores the logits of a tile only where a pair does not take part, with -inf for it. Those that `exclude` names go
  // to excluded[row], unless it is null. Without a guide the logits are it.
  void apply(
      const TileKernels<T>& kernels, Range rows, Range cols, const T* guide, T* logits, T* excluded, Tile<T>& tile)
      const {
    const auto store = [&] {
      if (tile.logits == nullptr) {
        kernels.logits(tile, logits);
        tile.logits = logits;
      }
    };
    for_each_excluded(rows, cols, [&](int64_t row, int64_t place) {
      store();
      if (excluded != nullptr) {  // all are read before any is masked: two rows may name each other
        excluded[row] = logits[place];
      }
    });
    for_each_excluded(rows, cols, [&](int64_t, int64_t place) { logits[place] = -kInfinity; });
    if (row_ids_.given() && may_mask_ids(rows, cols)) {
      store();
      kernels.mask_ids(rows.size(), row_ids_.values.at(rows.begin), col_ids_.values.at(cols.begin), restrict_, logits);
    }
    if (ceilings_) {
      store();
      kernels.mask_ceilings(
          rows.size(),
          guide == nullptr ? logits : guide,
          ceiling_.at(rows.begin),
          col_ceiling_.at(cols.begin),
          above_,
          logits);
    }
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  // Whether ids may take a pair of a tile out.
  bool may_mask_ids(Range rows, Range cols) const {
    const IdRange& of_rows = row_ids_.ranges[rows.begin / kTile];
    const IdRange& of_cols = col_ids_.ranges[cols.begin / kTile];
    const bool all_equal = of_rows.min == of_cols.max && of_cols.min == of_rows.max;
    return restrict_ ? !all_equal : !of_rows.disjoint(of_cols);
  }

  std::vector<bool>::reference excluded_tile(int64_t row, int64_t col) {
    return excluded_tiles_[row / kTile * (round_up(m_, kTile) / kTile) + col / kTile];
  }

  // A tile without a pair of equal ids is visited all the same when the logit of an excluded pair is in it.
  void find_excluded_tiles(int64_t n) {
    excluded_tiles_.assign(round_up(n, kTile) / kTile * (round_up(m_, kTile) / kTile), false);
    const int64_t* exclude = exclude_.const_data_ptr<int64_t>();
    for (const auto i : c10::irange(n)) {
      if (Range{0, m_}.contains(exclude[i])) {
        excluded_tile(i, exclude[i]) = true;
        excluded_tile(mirrored_ ? exclude[i] : i, mirrored_ ? i : exclude[i]) = true;
      }
    }
  }

  int64_t m_;
  bool mirrored_;
  bool mutual_;
  bool restrict_;
  bool ceilings_;
  bool above_;
  Ids row_ids_;
  Ids col_ids_;
  Vector<T> ceiling_;
  Vector<T> col_ceiling_;
  at::Tensor exclude_;
  std::vector<bool> excluded_tiles_;  // of the whole plane; only where ids restrict
};

}  // namespace contrastive_ops
