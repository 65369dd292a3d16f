// Expectations of logits s under the softmax of other logits z, a teacher's or s themselves. Logits are stored.
#pragma once

#include "coefficients.h"
#include "logsumexp.h"
#include "vectors.h"

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

// A pair without weight counts nothing, whatever the value is.
template <typename T>
inline Vec<T> weighted(Vec<T> value, Vec<T> weight) {
  return counted(value, weight) * weight;
}

template <typename T>
void moments(const Tile<T>& tile, const T* values, MaxSum<T> rows, MaxSum<T> cols) {
  sum_terms<true>(tile, rows, cols, [&](int64_t i, int64_t j, Vec<T> exponential) {
    return weighted(Vec<T>::loadu(values + i * kTile + j), exponential);
  });
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
