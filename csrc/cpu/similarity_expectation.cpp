// Expectations E of the logits s over rows and columns, under the softmax t of a teacher's logits z, or of their own,
// and the log-sum-exps of s. With p the softmax of s, dL/ds = grad_mean t + grad_lse p, and for the teacher
// dL/dz = grad_mean t (s - E); where z is s, dL/ds is the sum of both: t (grad_lse + grad_mean (1 + s - E)).

#include "choose_products.h"
#include "ops.h"
#include "plane.h"
#include "sides.h"
#include "softmax.h"
#include "totals.h"

#include <ATen/ops/add.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/irange.h>

#include <optional>

namespace contrastive_ops {
namespace {

using at::Tensor;

// The tile with its logits stored.
template <typename T>
Tile<T> stored(const TileKernels<T>& kernels, Tile<T> tile, T* logits) {
  if (tile.logits == nullptr) {
    kernels.logits(tile, logits);
    tile.logits = logits;
  }
  return tile;
}

template <typename T>
class Forward {
 public:
  template <typename Products>
  explicit Forward(const Plane<Products>& plane)
      : kernels_(plane.kernels()), partials_(plane.partials(plane.taught() ? 5 : 3)), sums_(plane), means_(plane) {
    if (plane.taught()) {
      teacher_.emplace(plane);
    }
  }

  void begin(const Block& block) {
    partials_.begin(block);
  }

  void reduce(int64_t tile, const TileAt<T>& at) {
    const auto rows = [&](int64_t max, int64_t sum) { return MaxSums<T>::rows_of(partials_, tile, max, sum); };
    const auto cols = [&](int64_t max, int64_t sum) {
      return MaxSums<T>::cols_of(partials_, tile, max, sum, at.to_cols);
    };
    const Tile<T> pairs = stored(kernels_, at.pairs, at.pair_logits);
    kernels_.reduce(pairs, rows(kMax, kSum), cols(kMax, kSum));
    Tile<T> weights = pairs;
    if (teacher_) {
      weights = stored(kernels_, at.teacher, at.teacher_logits);
      kernels_.reduce(weights, rows(kTeacherMax, kTeacherSum), cols(kTeacherMax, kTeacherSum));
    }
    const int64_t max = teacher_ ? kTeacherMax : kMax;
    kernels_.means(
        weights, pairs.logits, rows(max, max).max, cols(max, max).max, rows(kMean, kMean).max, cols(kMean, kMean).max);
  }

  void end(const Block& block) {
    if (teacher_) {
      sums_.fold(block, partials_, kMax, kSum);
      fold_means(block, *teacher_, kTeacherMax, kTeacherSum);
    } else {
      fold_means(block, sums_, kMax, kSum);
    }
  }

  Expectations result(const Tensor& kept) const {
    const auto none = [] { return full(0, T(0)); };  // each result of an op is a tensor of its own
    return {
        sums_.finish(),
        teacher_ ? teacher_->finish() : SoftmaxStatistics{none(), none(), none(), none(), none(), none()},
        kept,
        means_.rows(),
        means_.cols()};
  }

 private:
  enum : int64_t { kMax, kSum, kMean, kTeacherMax, kTeacherSum };

  void fold_means(const Block& block, const MaxSums<T>& weights, int64_t max, int64_t sum) {
    const auto fold = [&](MaxSum<T> running, MaxSum<T> part, Range range, int64_t tile, bool cols) {
      const T* means = cols ? partials_.cols(tile, kMean) : partials_.rows(tile, kMean);
      kernels_.fold_means(range.size(), running, part, means, means_.at(range, cols));
    };
    weights.for_each_part(block, partials_, max, sum, fold);
  }

  const TileKernels<T>& kernels_;
  Partials<T> partials_;
  MaxSums<T> sums_;
  Totals<T> means_;
  std::optional<MaxSums<T>> teacher_;
};

template <typename T>
class Backward {
 public:
  template <typename Products>
  Backward(const Plane<Products>& plane, const Expectations& statistics, const ExpectationGradients& incoming)
      : kernels_(plane.kernels()),
        taught_(plane.taught()),
        grad_mean_(plane, incoming.row_mean, incoming.col_mean),
        mean_(plane, statistics.row_mean, statistics.col_mean),
        constant_(
            taught_ ? Sides<T>(plane, at::zeros_like(incoming.row_mean), at::zeros_like(incoming.col_mean))
                    : Sides<T>(
                          plane,
                          at::add(incoming.row_lse, incoming.row_mean),
                          at::add(incoming.col_lse, incoming.col_mean))),
        softmax_(plane, statistics.softmax, Sides<T>(plane, incoming.row_lse, incoming.col_lse), {}),
        teacher_softmax_(plane, weights_of(statistics), grad_mean_, {}),
        shares_(
            plane,
            weights_of(statistics),
            Sides<T>(plane, at::ones_like(statistics.row_mean), at::ones_like(statistics.col_mean)),
            {}) {}

  void coefficients(const TileAt<T>& at, const Places<T>& pairs, const Places<T>& teacher) const {
    const Tile<T> of_pairs = stored(kernels_, at.pairs, at.pair_logits);
    if (!taught_) {
      tilted(at, of_pairs, of_pairs, pairs);
      return;
    }
    const Tile<T> of_teacher = stored(kernels_, at.teacher, at.teacher_logits);
    kernels_.softmax(of_teacher, teacher_softmax_.rows(at.rows.begin), teacher_softmax_.cols(at.cols.begin), at.spare);
    if (teacher.coefficients != nullptr) {
      tilted(at, of_teacher, of_pairs, teacher);
    }
    kernels_.mixed_coefficients(
        of_pairs, softmax_.rows(at.rows.begin), softmax_.cols(at.cols.begin), at.spare, pairs.sums, pairs.coefficients);
  }

 private:
  const SoftmaxStatistics& weights_of(const Expectations& statistics) const {
    return taught_ ? statistics.teacher : statistics.softmax;
  }

  void tilted(const TileAt<T>& at, const Tile<T>& weights, const Tile<T>& values, const Places<T>& places) const {
    const int64_t row = at.rows.begin;
    const int64_t col = at.cols.begin;
    kernels_.tilted_coefficients(
        weights,
        values.logits,
        shares_.rows(row),
        shares_.cols(col),
        {constant_.rows(row), grad_mean_.rows(row), mean_.rows(row)},
        {constant_.cols(col), grad_mean_.cols(col), mean_.cols(col)},
        places.sums,
        places.coefficients);
  }

  const TileKernels<T>& kernels_;
  bool taught_;
  Sides<T> grad_mean_;
  Sides<T> mean_;
  Sides<T> constant_;
  Directions<T> softmax_;          // with the gradients of the log-sum-exps
  Directions<T> teacher_softmax_;  // with those of the means
  Directions<T> shares_;           // of pairs in the means
};

}  // namespace

Expectations similarity_expectation(const Problem& problem, bool keep) {
  return with_plane(problem, [&](auto& plane) {
    using T = typename std::decay_t<decltype(plane)>::T;
    Forward<T> reduction(plane);
    const Tensor kept = plane.forward(reduction, keep, full(0, T(0)));
    return reduction.result(kept);
  });
}

FormsGradients similarity_expectation_backward(
    const Problem& problem,
    const Expectations& statistics,
    const ExpectationGradients& incoming,
    Needs needs,
    Needs teacher_needs) {
  return with_plane(problem, [&](auto& plane) {
    using T = typename std::decay_t<decltype(plane)>::T;
    Backward<T> reduction(plane, statistics, incoming);
    const auto [pairs, teacher] = plane.backward(reduction, statistics.kept, full(0, T(0)), needs, teacher_needs);
    return FormsGradients{pairs, teacher};
  });
}

}  // namespace contrastive_ops
