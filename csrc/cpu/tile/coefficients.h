// The coefficients of backward: from the gradient of each logit to the weights of the products and the sums for scales
// and biases.
#pragma once

#include "vectors.h"

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

template <bool Stored, bool Sums, typename T, typename Gradient>
inline void coefficients_loop(
    const Tile<T>& tile,
    ScaleBiasSums<T> row_sums,
    ScaleBiasSums<T> col_sums,
    T* coefficients,
    const Gradient& gradient) {
  if constexpr (Sums) {
    std::fill_n(col_sums.scale, kTile, T(0));
    std::fill_n(col_sums.bias, kTile, T(0));
  }
  for_each_row_group(tile.rows, [&](int64_t i, auto group) {
    constexpr int kRows = group;
    Vec<T> scale_sum[kRows];
    Vec<T> bias_sum[kRows];
    std::fill_n(scale_sum, kRows, Vec<T>(T(0)));
    std::fill_n(bias_sum, kRows, Vec<T>(T(0)));
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      const Vec<T> col_scale = Vec<T>::loadu(tile.col_scale + j);
      Vec<T> col_scale_sum(T(0));
      Vec<T> col_bias_sum(T(0));
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> row_scale(tile.row_scale[i + r]);
        const Vec<T> coefficient = gradient(i + r, j, LogitRow<Stored, T>(tile, i + r).at(j));
        if constexpr (Sums) {
          const Vec<T> with_pair = coefficient * Vec<T>::loadu(tile.pairs + (i + r) * kTile + j);
          scale_sum[r] = at::vec::fmadd(with_pair, col_scale, scale_sum[r]);
          bias_sum[r] = bias_sum[r] + coefficient;
          col_scale_sum = at::vec::fmadd(with_pair, row_scale, col_scale_sum);
          col_bias_sum = col_bias_sum + coefficient;
        }
        (coefficient * (row_scale * col_scale)).store(coefficients + (i + r) * kTile + j);
      }
      if constexpr (Sums) {
        (Vec<T>::loadu(col_sums.scale + j) + col_scale_sum).store(col_sums.scale + j);
        (Vec<T>::loadu(col_sums.bias + j) + col_bias_sum).store(col_sums.bias + j);
      }
    }
    for (int r = 0; Sums && r < kRows; ++r) {
      row_sums.scale[i + r] = sum_of(scale_sum[r]);
      row_sums.bias[i + r] = sum_of(bias_sum[r]);
    }
  });
}

// gradient(i, j, logits) is a vector of gradients of logits.
template <typename T, typename Gradient>
inline void store_coefficients(
    const Tile<T>& tile, const CoefficientSums<T>& sums, T* coefficients, const Gradient& gradient) {
  with_stored(tile, [&](auto stored) {
    if (sums.rows.scale != nullptr) {
      coefficients_loop<stored.value, true>(tile, sums.rows, sums.cols, coefficients, gradient);
    } else {
      coefficients_loop<stored.value, false>(tile, sums.rows, sums.cols, coefficients, gradient);
    }
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
