// Row and column log-sum-exps of the logits, and with totals their sums. The gradient of a logit is
// u_i e^(s - row_lse_i) + v_j e^(s - col_lse_j).

#include "choose_products.h"
#include "ops.h"
#include "plane.h"
#include "sides.h"
#include "softmax.h"
#include "totals.h"

#include <limits>
#include <optional>

namespace contrastive_ops {
namespace {

using at::Tensor;

template <typename T>
class Forward {
 public:
  template <typename Products>
  Forward(const Plane<Products>& plane, bool with_totals)
      : kernels_(plane.kernels()), partials_(plane.partials(with_totals ? 3 : 2)), sums_(plane) {
    if (with_totals) {
      totals_.emplace(plane);
    }
  }

  void begin(const Block& block) {
    partials_.begin(block);
  }

  void reduce(int64_t tile, const TileAt<T>& at) {
    kernels_.reduce(
        at.pairs,
        MaxSums<T>::rows_of(partials_, tile, kMax, kSum),
        MaxSums<T>::cols_of(partials_, tile, kMax, kSum, at.to_cols));
    if (totals_) {
      T* cols = at.to_cols ? partials_.cols(tile, kTotal) : nullptr;
      kernels_.sum(at.pairs, Function::identity, partials_.rows(tile, kTotal), cols);
    }
  }

  void end(const Block& block) {
    sums_.fold(block, partials_, kMax, kSum);
    if (totals_) {
      totals_->add(block, partials_, kTotal);
    }
  }

  LogSumExps result(const Tensor& kept, const Tensor& excluded) const {
    // each result of an op is a tensor of its own, also those with nothing in them
    return {
        sums_.finish(),
        kept,
        excluded,
        totals_ ? totals_->rows() : full(0, T(0)),
        totals_ ? totals_->cols() : full(0, T(0))};
  }

 private:
  enum : int64_t { kMax, kSum, kTotal };
  const TileKernels<T>& kernels_;
  Partials<T> partials_;
  MaxSums<T> sums_;
  std::optional<Totals<T>> totals_;
};

template <typename T>
class Backward {
 public:
  template <typename Products>
  Backward(
      const Plane<Products>& plane,
      const SoftmaxStatistics& statistics,
      const LogSumExpGradients& incoming,
      bool with_totals)
      : kernels_(plane.kernels()),
        directions_(
            plane,
            statistics,
            Sides<T>(plane, incoming.row_lse, incoming.col_lse),
            with_totals ? Sides<T>::or_zeros(plane, incoming.row_total, incoming.col_total) : Sides<T>()) {}

  void coefficients(const TileAt<T>& at, const Places<T>& pairs, const Places<T>&) const {
    kernels_.coefficients(
        at.pairs, directions_.rows(at.rows.begin), directions_.cols(at.cols.begin), pairs.sums, pairs.coefficients);
  }

 private:
  const TileKernels<T>& kernels_;
  Directions<T> directions_;
};

}  // namespace

LogSumExps similarity_logsumexp(const Problem& problem, bool totals, bool keep) {
  return with_plane(problem, [&](auto& plane) {
    using T = typename std::decay_t<decltype(plane)>::T;
    Forward<T> reduction(plane, totals);
    const Tensor excluded = plane.new_excluded();
    const Tensor kept = plane.forward(reduction, keep, excluded);
    return reduction.result(kept, excluded);
  });
}

Gradients similarity_logsumexp_backward(
    const Problem& problem,
    const SoftmaxStatistics& statistics,
    const Tensor& kept,
    const LogSumExpGradients& incoming,
    bool totals,
    Needs needs) {
  return with_plane(problem, [&](auto& plane) {
    using T = typename std::decay_t<decltype(plane)>::T;
    Backward<T> reduction(plane, statistics, incoming, totals);
    return plane.backward(reduction, kept, incoming.excluded, needs, {}).first;
  });
}

}  // namespace contrastive_ops
