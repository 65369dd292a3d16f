// What is done row by row: dot products of vectors that belong together, and their linear combinations. O(N D).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace contrastive_ops {

// products[n, s, t] = <a[n, s], b[n, t]> of a [N, S, D] and b [N, T, D], in float64.
at::Tensor row_products(const at::Tensor& a, const at::Tensor& b);

// result[n, s] = sum_t weights[n, s, t] vectors[n, t], summed in float64: weights [N, S, T] in float64, vectors the
// tensors [N, T_i, D] side by side, result [N, S, D]. A weight of 0 leaves its vector out, even one that is not finite.
void combine_rows(const at::Tensor& weights, at::TensorList vectors, const at::Tensor& result);

// a_i = c t^p / |x_i| of x [N, D], in the dtype of the statistics, and 1 / |x_i| in float64; both are 0 for a zero row.
// t is a tensor of one element, or none for 1.
std::tuple<at::Tensor, at::Tensor> scale(
    const at::Tensor& x, const std::optional<at::Tensor>& factor, double multiplier, double power);

// dX - da_i a_i / |x_i|^2 x_i, where dX is what else comes to x, and dt; empty where they are not needed.
std::tuple<at::Tensor, at::Tensor> scale_backward(
    const at::Tensor& x,
    const at::Tensor& inverse,
    const std::optional<at::Tensor>& grad,
    const at::Tensor& grad_scale,
    const std::optional<at::Tensor>& factor,
    double multiplier,
    double power,
    bool need_x,
    bool need_factor);

// factor * the sum over rows i and directions d of softplus(lse_di - s_i), and with totals of slope s_i - share
// total_di.
at::Tensor contrast(
    const at::Tensor& positive, at::TensorList lse, at::TensorList totals, double factor, double slope, double share);

// The gradients of s [N], of lse [directions, N], and of any direction's totals [N], which is empty without totals.
std::tuple<at::Tensor, at::Tensor, at::Tensor> contrast_backward(
    const at::Tensor& grad,
    const at::Tensor& positive,
    at::TensorList lse,
    bool totals,
    double factor,
    double slope,
    double share);

}  // namespace contrastive_ops
