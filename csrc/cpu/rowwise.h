// What is done row by row: dot products of vectors that belong together, and their linear combinations. O(N D).
#pragma once

#include <ATen/core/Tensor.h>

namespace contrastive_ops {

// products[n, s, t] = <a[n, s], b[n, t]> of a [N, S, D] and b [N, T, D], in float64.
at::Tensor row_products(const at::Tensor& a, const at::Tensor& b);

// result[n, s] = sum_t weights[n, s, t] vectors[n, t], summed in float64: weights [N, S, T] in float64, vectors the
// tensors [N, T_i, D] side by side, result [N, S, D]. A weight of 0 leaves its vector out, even one that is not finite.
void combine_rows(const at::Tensor& weights, at::TensorList vectors, const at::Tensor& result);

}  // namespace contrastive_ops
