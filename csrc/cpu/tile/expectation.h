// Expectations of logits s under the softmax of other logits z, a teacher's or s themselves. Logits are stored.
#pragma once

#include "coefficients.h"
#include "logsumexp.h"
#include "vectors.h"

#include <cmath>

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

// A pair without weight counts nothing, whatever the value is.
template <typename T>
inline Vec<T> weighted(Vec<T> value, Vec<T> weight) {
  return Vec<T>::blendv(value, Vec<T>(T(0)), weight == Vec<T>(T(0))) * weight;
}

// Values of pairs relative to one of their row and one of their column, times the exponentials.
template <typename T>
struct Moments {
  const T* values;
  const T* row_origins;
  const T* col_origins;

  Vec<T> row(int64_t i, int64_t j, Vec<T> exponential) const {
    return weighted(Vec<T>::loadu(values + i * kTile + j) - Vec<T>(row_origins[i]), exponential);
  }
  Vec<T> col(int64_t i, int64_t j, Vec<T> exponential) const {
    return weighted(Vec<T>::loadu(values + i * kTile + j) - Vec<T>::loadu(col_origins + j), exponential);
  }
};

// Sums of values relative to the largest ones are small where the values are alike, and exact for a single one: in
// s - mean nothing else is left.
template <typename T>
void means(const Tile<T>& tile, const T* values, MeanOf<T> rows, MeanOf<T> cols) {
  alignas(64) T row_origins[kTile];
  alignas(64) T col_origins[kTile];
  const auto find_origins = [](int64_t n, const T* largest, T* origins) {
    for (int64_t i = 0; largest != nullptr && i < n; ++i) {
      origins[i] = std::abs(largest[i]) < kInfinity<T> ? largest[i] : T(0);
    }
  };
  find_origins(tile.rows, rows.largest, row_origins);
  find_origins(kTile, cols.largest, col_origins);
  sum_terms<true>(
      tile,
      MaxSum<T>{rows.weights.max, rows.mean},
      MaxSum<T>{cols.weights.max, cols.mean},
      Moments<T>{values, row_origins, col_origins});
  const auto divide = [](int64_t n, MeanOf<T> set, const T* origins) {
    for (int64_t i = 0; set.mean != nullptr && i < n; ++i) {
      const T sum = set.weights.sum[i];
      set.mean[i] = sum == T(0) ? T(0) : origins[i] + set.mean[i] / sum;
    }
  };
  divide(tile.rows, rows, row_origins);
  divide(kTile, cols, col_origins);
}

template <typename T>
void fold_means(int64_t n, MaxSum<T> running, MaxSum<T> part, const T* part_means, double* means) {
  alignas(64) T shares[kTile];
  for_each_vector<T>(n, [&](int64_t i, int64_t count) {
    const Shrinking<T> factors(running, part, i, count);
    const Vec<T> part_sum = Vec<T>::loadu(part.sum + i, count) * factors.part;
    const Vec<T> sum = at::vec::fmadd(Vec<T>::loadu(running.sum + i, count), factors.running, part_sum);
    factors.max.store(running.max + i, count);
    sum.store(running.sum + i, count);
    Vec<T>::blendv(part_sum / sum, Vec<T>(T(0)), sum == Vec<T>(T(0))).store(shares + i, count);
  });
  for (int64_t i = 0; i < n; ++i) {
    const auto share = static_cast<double>(shares[i]);
    const double old = share == 1.0 ? 0.0 : (1.0 - share) * means[i];
    means[i] = old + (share == 0.0 ? 0.0 : share * static_cast<double>(part_means[i]));
  }
}

template <typename T>
void softmax(const Tile<T>& tile, Direction<T> rows, Direction<T> cols, T* result) {
  with_softmax(tile.rows, rows, cols, Unweighted(), [&](const auto& softmax) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      const LogitRow<true, T> row(tile, i);
      for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
        softmax(i, j, row.at(j)).store(result + i * kTile + j);
      }
    }
  });
}

template <typename T>
void mixed_coefficients(
    const Tile<T>& tile,
    Direction<T> rows,
    Direction<T> cols,
    const T* more,
    const CoefficientSums<T>& sums,
    T* coefficients) {
  with_softmax(tile.rows, rows, cols, Unweighted(), [&](const auto& softmax) {
    store_coefficients(tile, sums, coefficients, [&](int64_t i, int64_t j, Vec<T> logit) {
      return softmax(i, j, logit) + Vec<T>::loadu(more + i * kTile + j);
    });
  });
}

// The weight a + b (s - mean) of a pair's exponential, of its row and of its column.
template <typename T>
struct Tilted {
  const T* values;
  Tilt<T> rows;
  Tilt<T> cols;

  Vec<T> row(int64_t i, int64_t j, Vec<T> weight) const {
    const Vec<T> deviation = Vec<T>::loadu(values + i * kTile + j) - Vec<T>(rows.mean[i]);
    return weight * at::vec::fmadd(Vec<T>(rows.slope[i]), deviation, Vec<T>(rows.constant[i]));
  }
  Vec<T> col(int64_t i, int64_t j, Vec<T> weight) const {
    const Vec<T> deviation = Vec<T>::loadu(values + i * kTile + j) - Vec<T>::loadu(cols.mean + j);
    return weight * at::vec::fmadd(Vec<T>::loadu(cols.slope + j), deviation, Vec<T>::loadu(cols.constant + j));
  }
  Vec<T> times(Vec<T> weight, Vec<T> exponential) const {
    return weighted(weight, exponential);
  }
};

template <typename T>
void tilted_coefficients(
    const Tile<T>& tile,
    const T* values,
    Direction<T> rows,
    Direction<T> cols,
    Tilt<T> row_tilt,
    Tilt<T> col_tilt,
    const CoefficientSums<T>& sums,
    T* coefficients) {
  const Tilted<T> weights{values, row_tilt, col_tilt};
  with_softmax(tile.rows, rows, cols, weights, [&](const auto& softmax) {
    store_coefficients(tile, sums, coefficients, softmax);
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
