// Softmaxes over rows and columns: running maxima and sums in forward, and the two directions in backward.
#pragma once

#include "block.h"
#include "ops.h"
#include "plane.h"
#include "ranges.h"
#include "sides.h"
#include "tile.h"

#include <ATen/ops/empty.h>
#include <c10/util/irange.h>

#include <cmath>
#include <limits>

namespace contrastive_ops {

// Sums of e^s relative to the maximum of s, over rows and over columns. In self-similarity the columns of a tile above
// the diagonal are rows of its mirror image.
template <typename T>
class MaxSums {
 public:
  template <typename Products>
  explicit MaxSums(const Plane<Products>& plane)
      : kernels_(plane.kernels()),
        row_max_(full(plane.rows() ? plane.n() : 0, -kInfinity)),
        row_sum_(full(plane.rows() ? plane.n() : 0, T(0))),
        col_max_(full(plane.cols() ? plane.m() : 0, -kInfinity)),
        col_sum_(full(plane.cols() ? plane.m() : 0, T(0))),
        of_cols_max_(plane.mirrored() ? row_max_ : col_max_),
        of_cols_sum_(plane.mirrored() ? row_sum_ : col_sum_) {}

  // Of a tile: which of the partials they are.
  static MaxSum<T> rows_of(Partials<T>& partials, int64_t tile, int64_t max, int64_t sum) {
    return {partials.rows(tile, max), partials.rows(tile, sum)};
  }
  static MaxSum<T> cols_of(Partials<T>& partials, int64_t tile, int64_t max, int64_t sum, bool to_cols) {
    return {to_cols ? partials.cols(tile, max) : nullptr, to_cols ? partials.cols(tile, sum) : nullptr};
  }

  // fold(running, part, range, tile, whether they are columns) for what each tile gives, in the order of the tiles. In
  // this thread: for a whole block it is some 20 us.
  template <typename Fold>
  void for_each_part(const Block& block, Partials<T>& partials, int64_t max, int64_t sum, const Fold& fold) const {
    const auto visit = [&](const at::Tensor& all_max,
                           const at::Tensor& all_sum,
                           Range range,
                           MaxSum<T> part,
                           int64_t tile,
                           bool cols) {
      if (part.max != nullptr) {
        const MaxSum<T> running{values_of<T>(all_max, range.begin), values_of<T>(all_sum, range.begin)};
        fold(running, part, range, tile, cols);
      }
    };
    block.for_each_contribution(
        [&](Range rows, int64_t tile) {
          visit(row_max_, row_sum_, rows, rows_of(partials, tile, max, sum), tile, false);
        },
        [&](Range cols, int64_t tile) {
          visit(of_cols_max_, of_cols_sum_, cols, cols_of(partials, tile, max, sum, true), tile, true);
        });
  }

  void fold(const Block& block, Partials<T>& partials, int64_t max, int64_t sum) const {
    for_each_part(block, partials, max, sum, [&](MaxSum<T> running, MaxSum<T> part, Range range, int64_t, bool) {
      kernels_.fold(range.size(), running, part);
    });
  }

  // The logs go where the sums were.
  SoftmaxStatistics finish() const {
    const at::Tensor row_lse = log_sum_exp(row_max_, row_sum_);
    const at::Tensor col_lse = log_sum_exp(col_max_, col_sum_);
    return {row_max_, col_max_, row_sum_, col_sum_, row_lse, col_lse};
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  static at::Tensor log_sum_exp(const at::Tensor& max, const at::Tensor& sum) {
    const at::Tensor lse = at::empty({max.size(0)}, max.options());
    const T* of_max = max.const_data_ptr<T>();
    T* of_sum = sum.mutable_data_ptr<T>();
    T* of_lse = lse.mutable_data_ptr<T>();
    for (const auto i : c10::irange(max.size(0))) {
      of_sum[i] = std::log(of_sum[i]);
      of_lse[i] = of_max[i] + of_sum[i];
    }
    return lse;
  }

  const TileKernels<T>& kernels_;
  at::Tensor row_max_;
  at::Tensor row_sum_;
  at::Tensor col_max_;
  at::Tensor col_sum_;
  at::Tensor of_cols_max_;
  at::Tensor of_cols_sum_;
};

// The two directions of a softmax with the gradients of its log-sum-exps, see Direction.
template <typename T>
class Directions {
 public:
  template <typename Products>
  Directions(const Plane<Products>& plane, const SoftmaxStatistics& statistics, Sides<T> grad_lse, Sides<T> grad_total)
      : grad_lse_(std::move(grad_lse)),
        grad_total_(std::move(grad_total)),
        max_(plane, statistics.row_max, statistics.col_max),
        log_sum_(plane, statistics.row_log_sum, statistics.col_log_sum) {
    // an empty set gives nothing: e^(-inf - inf) = 0; and so does the padding
    clear_empty(statistics.row_max.size(0), max_.own_rows(), log_sum_.own_rows(), grad_lse_.own_rows());
    clear_empty(statistics.col_max.size(0), max_.own_cols(), log_sum_.own_cols(), grad_lse_.own_cols());
  }

  Direction<T> rows(int64_t offset) const {
    return {grad_lse_.rows(offset), max_.rows(offset), log_sum_.rows(offset), grad_total_.rows(offset)};
  }
  Direction<T> cols(int64_t offset) const {
    return {grad_lse_.cols(offset), max_.cols(offset), log_sum_.cols(offset), grad_total_.cols(offset)};
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  static void clear_empty(int64_t n, Vector<T>& max, Vector<T>& log_sum, Vector<T>& grad_lse) {
    if (max.at(0) == nullptr) {
      return;
    }
    for (const auto i : c10::irange(round_up(n, kTile))) {
      if (i >= n || *max.at(i) == -kInfinity) {
        *max.at(i) = kInfinity;
        *log_sum.at(i) = T(0);
        *grad_lse.at(i) = T(0);
      }
    }
  }

  Sides<T> grad_lse_;
  Sides<T> grad_total_;
  Sides<T> max_;
  Sides<T> log_sum_;
};

}  // namespace contrastive_ops
