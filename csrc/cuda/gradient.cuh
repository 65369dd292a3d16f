// Gradients of the logits of a tile, dL/ds: of a pair what the reduction gives it, and of one that is left out by index
// that of its own logit instead.
#pragma once

#include "reductions.cuh"

namespace contrastive_ops::cuda {

// What the options and `Incoming` say of the rows or of the columns of a tile.
template <typename Reduction, int SIZE>
struct Side {
  Options<SIZE> options;
  typename Reduction::template Weights<SIZE> weights;
};

// dL/ds of the pair (i, j) of a tile, in the thread's column l, from its logit; `takes_part` if no index leaves it
// out.
template <typename Gradient, typename Row, typename Col>
__device__ __forceinline__ float gradient_of_pair(
    float logit,
    bool takes_part,
    const Gradient& gradient,
    const Row& row,
    const Col& col,
    const Mask& mask,
    int i,
    int j,
    int l) {
  float g = gradient.of_pair(logit, takes_part, row.weights, col.weights, i, j, l);
  if (mask.excludes) {
    const bool by_row = mask.excluded_by_row(row.options, i, j), by_col = mask.excluded_by_col(col.options, i, j);
    if (by_row || by_col) {
      g = (by_row ? row.weights.excluded[i] : 0.0f) + (by_col ? col.weights.excluded[j] : 0.0f);
    }
  }
  return g;
}

// Two neighbouring elements in the dtype of the features, rounded to nearest.
__device__ __forceinline__ uint32_t packed(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t packed(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace contrastive_ops::cuda
