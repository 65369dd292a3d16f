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
  return Vec<T>::blendv(value, Vec<T>(T(0)), weight == Vec<T>(T(0))) * weight;
}

// Sums of weights and of weighted values, whose quotients are means. In float64: a gradient has little but the rounding
// of the mean in s - mean, and of a single pair nothing is left.
struct MeanSums {
  double weight = 0.0;
  double moment = 0.0;

  double mean() const {
    return weight == 0.0 ? 0.0 : moment / weight;
  }
};

template <typename T>
inline MeanSums row_sums(const T* weights, const T* values) {
  double weight[kLanes] = {};
  double moment[kLanes] = {};
  for (int64_t j = 0; j < kTile; j += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto w = static_cast<double>(weights[j + lane]);
      weight[lane] += w;
      moment[lane] += w * (w == 0.0 ? 0.0 : static_cast<double>(values[j + lane]));
    }
  }
  MeanSums sums;
  for (int lane = 0; lane < kLanes; ++lane) {
    sums.weight += weight[lane];
    sums.moment += moment[lane];
  }
  return sums;
}

template <typename T>
inline void add_to_cols(const T* weights, const T* values, double* weight, double* moment) {
  for (int64_t j = 0; j < kTile; ++j) {
    const auto w = static_cast<double>(weights[j]);
    weight[j] += w;
    moment[j] += w * (w == 0.0 ? 0.0 : static_cast<double>(values[j]));
  }
}

template <typename T>
void means(const Tile<T>& tile, const T* values, const T* row_max, const T* col_max, T* row_means, T* col_means) {
  alignas(64) T weights[kTile];
  alignas(64) double col_weight[kTile] = {};
  alignas(64) double col_moment[kTile] = {};
  // shift(j) is what the exponentials of a row are relative to
  const auto weigh = [&](int64_t i, const auto& shift) {
    const LogitRow<true, T> row(tile, i);
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      exp(row.at(j) - shift(j)).store(weights + j);
    }
  };
  T highest;
  const bool shared =
      row_means != nullptr && col_means != nullptr && shared_shift(tile.rows, row_max, col_max, highest);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const T* of_row = values + i * kTile;
    if (row_means != nullptr) {
      weigh(i, [&](int64_t) { return Vec<T>(shared ? highest : shift_of(row_max[i])); });
      row_means[i] = static_cast<T>(row_sums(weights, of_row).mean());
    }
    if (col_means != nullptr) {
      if (!shared) {
        weigh(i, [&](int64_t j) { return shift_of(Vec<T>::loadu(col_max + j)); });
      }
      add_to_cols(weights, of_row, col_weight, col_moment);
    }
  }
  for (int64_t j = 0; j < kTile && col_means != nullptr; ++j) {
    col_means[j] = static_cast<T>(MeanSums{col_weight[j], col_moment[j]}.mean());
  }
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
