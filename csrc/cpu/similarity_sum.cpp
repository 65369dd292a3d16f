// Row and column sums of a function f of the logits. The gradient of a logit is (u_i + v_j) f'(s).

#include "choose_products.h"
#include "ops.h"
#include "plane.h"
#include "sides.h"
#include "totals.h"

namespace contrastive_ops {
namespace {

using at::Tensor;

template <typename T>
class Forward {
 public:
  template <typename Products>
  Forward(const Plane<Products>& plane, Function function)
      : kernels_(plane.kernels()), function_(function), partials_(plane.partials(1)), totals_(plane) {}

  void begin(const Block& block) {
    partials_.begin(block);
  }
  void reduce(int64_t tile, const TileAt<T>& at) {
    kernels_.sum(at.pairs, function_, partials_.rows(tile, 0), at.to_cols ? partials_.cols(tile, 0) : nullptr);
  }
  void end(const Block& block) {
    totals_.add(block, partials_, 0);
  }
  Sums result(const Tensor& kept, const Tensor& excluded) const {
    return {kept, excluded, totals_.rows(), totals_.cols()};
  }

 private:
  const TileKernels<T>& kernels_;
  Function function_;
  Partials<T> partials_;
  Totals<T> totals_;
};

template <typename T>
class Backward {
 public:
  template <typename Products>
  Backward(const Plane<Products>& plane, Function function, const SumGradients& incoming)
      : kernels_(plane.kernels()),
        function_(function),
        grads_(Sides<T>::or_zeros(plane, incoming.row_sum, incoming.col_sum)) {}

  void coefficients(const TileAt<T>& at, const Places<T>& pairs, const Places<T>&) const {
    kernels_.sum_coefficients(
        at.pairs, function_, grads_.rows(at.rows.begin), grads_.cols(at.cols.begin), pairs.sums, pairs.coefficients);
  }

 private:
  const TileKernels<T>& kernels_;
  Function function_;
  Sides<T> grads_;
};

}  // namespace

Sums similarity_sum(const Problem& problem, Function function, bool keep) {
  return with_plane(problem, [&](auto& plane) {
    using T = typename std::decay_t<decltype(plane)>::T;
    Forward<T> reduction(plane, function);
    const Tensor excluded = plane.new_excluded();
    const Tensor kept = plane.forward(reduction, keep, excluded);
    return reduction.result(kept, excluded);
  });
}

Gradients similarity_sum_backward(
    const Problem& problem, Function function, const Tensor& kept, const SumGradients& incoming, Needs needs) {
  return with_plane(problem, [&](auto& plane) {
    using T = typename std::decay_t<decltype(plane)>::T;
    Backward<T> reduction(plane, function, incoming);
    return plane.backward(reduction, kept, incoming.excluded, needs, {}).first;
  });
}

}  // namespace contrastive_ops
