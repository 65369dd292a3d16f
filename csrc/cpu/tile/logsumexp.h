// Log-sum-exps: maxima and sums, and what they give to the coefficients of backward.
#pragma once

#include "coefficients.h"
#include "vectors.h"

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

// The shift of a set with maximum m: an empty set (m = -inf) is shifted by 0, as (-inf) - (-inf) would be NaN.
template <typename T>
inline T shift_of(T max) {
  return max == -kInfinity<T> ? T(0) : max;
}

template <typename T>
inline Vec<T> shift_of(Vec<T> max) {
  return Vec<T>::blendv(max, Vec<T>(T(0)), max == Vec<T>(-kInfinity<T>));
}

template <bool Stored, typename T>
void sum_rows(const Tile<T>& tile, MaxSum<T> rows) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const LogitRow<Stored, T> row(tile, i);
    const Vec<T> shift(shift_of(rows.max[i]));
    Vec<T> sum(T(0));
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      sum = sum + exp(row.at(j) - shift);
    }
    rows.sum[i] = sum_of(sum);
  }
}

template <bool Stored, typename T>
void sum_cols(const Tile<T>& tile, MaxSum<T> cols) {
  for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
    const Vec<T> shift = shift_of(Vec<T>::loadu(cols.max + j));
    Vec<T> sum(T(0));
    for (int64_t i = 0; i < tile.rows; ++i) {
      sum = sum + exp(LogitRow<Stored, T>(tile, i).at(j) - shift);
    }
    sum.store(cols.sum + j);
  }
}

// The range within which one shift serves all rows and columns of a tile: with a set's maximum at most this far below
// the shift, its terms down to 2^-24 of the largest stay above the smallest normal number.
template <typename T>
constexpr T kSharedShift = T(40);

// The highest of the maxima of a tile, and whether it may be the shift of all: not where they are too far apart.
template <typename T>
bool shared_shift(int64_t row_count, const T* row_max, const T* col_max, T& highest) {
  T lowest = kInfinity<T>;
  highest = -kInfinity<T>;
  const auto extend = [&](T max) {
    highest = std::max(highest, max);
    lowest = max == -kInfinity<T> ? lowest : std::min(lowest, max);
  };
  std::for_each(row_max, row_max + row_count, extend);
  std::for_each(col_max, col_max + kTile, extend);
  // written so that NaN and an infinite maximum go the other road
  return highest - lowest <= kSharedShift<T>;
}

// Both directions from one exponential per pair: sums relative to the maximum of the tile, then rescaled to the
// maximum of each row and column. Returns false, with nothing done, where the maxima are too far apart.
template <bool Stored, typename T>
bool sum_both(const Tile<T>& tile, MaxSum<T> rows, MaxSum<T> cols) {
  T highest;
  if (!shared_shift(tile.rows, rows.max, cols.max, highest)) {
    return false;
  }
  const Vec<T> shift(highest);
  std::fill_n(cols.sum, kTile, T(0));
  for_each_row_group(tile.rows, [&](int64_t i, auto group) {
    constexpr int kRows = group;
    Vec<T> sum[kRows];
    std::fill_n(sum, kRows, Vec<T>(T(0)));
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      Vec<T> col_sum = Vec<T>::loadu(cols.sum + j);
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> term = exp(LogitRow<Stored, T>(tile, i + r).at(j) - shift);
        sum[r] = sum[r] + term;
        col_sum = col_sum + term;
      }
      col_sum.store(cols.sum + j);
    }
    for (int r = 0; r < kRows; ++r) {
      rows.sum[i + r] = sum_of(sum[r]);
    }
  });
  const auto rescale = [&](int64_t n, MaxSum<T> set) {
    for_each_vector<T>(n, [&](int64_t i, int64_t count) {
      const Vec<T> max = Vec<T>::loadu(set.max + i, count);
      const Vec<T> sum = Vec<T>::loadu(set.sum + i, count) * exp(shift - max);
      // an empty set is infinitely far below the shift
      Vec<T>::blendv(sum, Vec<T>(T(0)), max == Vec<T>(-kInfinity<T>)).store(set.sum + i, count);
    });
  };
  rescale(tile.rows, rows);
  rescale(kTile, cols);
  return true;
}

template <bool Stored, typename T>
void reduce_logits(const Tile<T>& tile, MaxSum<T> rows, MaxSum<T> cols) {
  if (cols.max != nullptr) {
    std::fill_n(cols.max, kTile, -kInfinity<T>);
  }
  for_each_row_group(tile.rows, [&](int64_t i, auto group) {
    constexpr int kRows = group;
    Vec<T> row_max[kRows];
    std::fill_n(row_max, kRows, Vec<T>(-kInfinity<T>));
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      Vec<T> col_max(-kInfinity<T>);
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> logit = LogitRow<Stored, T>(tile, i + r).at(j);
        row_max[r] = at::vec::maximum(row_max[r], logit);
        col_max = at::vec::maximum(col_max, logit);
      }
      if (cols.max != nullptr) {
        at::vec::maximum(Vec<T>::loadu(cols.max + j), col_max).store(cols.max + j);
      }
    }
    for (int r = 0; r < kRows && rows.max != nullptr; ++r) {
      rows.max[i + r] = max_of(row_max[r]);
    }
  });
  if (rows.max != nullptr && cols.max != nullptr && sum_both<Stored>(tile, rows, cols)) {
    return;
  }
  if (rows.max != nullptr) {
    sum_rows<Stored>(tile, rows);
  }
  if (cols.max != nullptr) {
    sum_cols<Stored>(tile, cols);
  }
}

template <typename T>
void reduce(const Tile<T>& tile, MaxSum<T> rows, MaxSum<T> cols) {
  with_stored(tile, [&](auto stored) { reduce_logits<stored.value>(tile, rows, cols); });
}

// The factors by which the sums shrink where the running maxima and those of a part become one.
template <typename T>
struct Shrinking {
  Vec<T> max;
  Vec<T> running;
  Vec<T> part;

  Shrinking(MaxSum<T> running_sums, MaxSum<T> part_sums, int64_t i, int64_t count) {
    const Vec<T> old_max = Vec<T>::loadu(running_sums.max + i, count);
    const Vec<T> part_max = Vec<T>::loadu(part_sums.max + i, count);
    max = at::vec::maximum(old_max, part_max);
    const Vec<T> shift = shift_of(max);
    running = exp(old_max - shift);
    part = exp(part_max - shift);
  }
};

template <typename T>
void fold(int64_t n, MaxSum<T> running, MaxSum<T> part) {
  for_each_vector<T>(n, [&](int64_t i, int64_t count) {
    const Shrinking<T> factors(running, part, i, count);
    const Vec<T> old_sum = Vec<T>::loadu(running.sum + i, count) * factors.running;
    const Vec<T> sum = at::vec::fmadd(Vec<T>::loadu(part.sum + i, count), factors.part, old_sum);
    factors.max.store(running.max + i, count);
    sum.store(running.sum + i, count);
  });
}

// Weights of a pair's exponentials, in its row and in its column: those of the directions as they are.
struct Unweighted {
  template <typename T>
  Vec<T> row(int64_t, int64_t, Vec<T> weight) const {
    return weight;
  }
  template <typename T>
  Vec<T> col(int64_t, int64_t, Vec<T> weight) const {
    return weight;
  }
  template <typename T>
  Vec<T> times(Vec<T> weight, Vec<T> exponential) const {
    return weight * exponential;
  }
};

// f(softmax), where softmax(i, j, logits) is a vector of u_i e^(s - row_lse_i) + v_j e^(s - col_lse_j).
template <typename T, typename Weights, typename F>
inline void with_softmax(int64_t row_count, Direction<T> rows, Direction<T> cols, const Weights& weights, const F& f) {
  const auto row_term = [&](int64_t i, int64_t j, Vec<T> logit) {
    return weights.times(
        weights.row(i, j, Vec<T>(rows.grad_lse[i])), exp((logit - Vec<T>(rows.max[i])) - Vec<T>(rows.log_sum[i])));
  };
  const auto col_term = [&](int64_t i, int64_t j, Vec<T> logit) {
    return weights.times(
        weights.col(i, j, Vec<T>::loadu(cols.grad_lse + j)),
        exp((logit - Vec<T>::loadu(cols.max + j)) - Vec<T>::loadu(cols.log_sum + j)));
  };
  if (cols.max == nullptr) {
    f(row_term);
    return;
  }
  if (rows.max == nullptr) {
    f(col_term);
    return;
  }

  // One exponential per pair: e^(s - c) (u_i e^(c - row_lse_i) + v_j e^(c - col_lse_j)) with c the largest of the
  // maxima, where they lie close enough together that no factor overflows and no term that counts underflows.
  T lowest = kInfinity<T>;
  T highest = -kInfinity<T>;
  const auto extend = [&](T max) {
    lowest = std::min(lowest, max);
    highest = max == kInfinity<T> ? highest : std::max(highest, max);
  };
  std::for_each(rows.max, rows.max + row_count, extend);
  std::for_each(cols.max, cols.max + kTile, extend);
  if (highest - lowest <= kSharedShift<T>) {
    alignas(64) T row_factor[kTile];
    alignas(64) T col_factor[kTile];
    const Vec<T> shift(shift_of(highest));
    const auto factors = [&](int64_t n, Direction<T> direction, T* factor) {
      for_each_vector<T>(n, [&](int64_t i, int64_t count) {
        const Vec<T> relative = shift - Vec<T>::loadu(direction.max + i, count);
        const Vec<T> log_sum = Vec<T>::loadu(direction.log_sum + i, count);
        (Vec<T>::loadu(direction.grad_lse + i, count) * exp(relative - log_sum)).store(factor + i, count);
      });
    };
    factors(row_count, rows, row_factor);
    factors(kTile, cols, col_factor);
    f([&](int64_t i, int64_t j, Vec<T> logit) {
      const Vec<T> weight = weights.row(i, j, Vec<T>(row_factor[i])) + weights.col(i, j, Vec<T>::loadu(col_factor + j));
      return weights.times(weight, exp(logit - shift));
    });
    return;
  }
  f([&](int64_t i, int64_t j, Vec<T> logit) { return row_term(i, j, logit) + col_term(i, j, logit); });
}

template <typename T>
void coefficients(
    const Tile<T>& tile, Direction<T> rows, Direction<T> cols, const CoefficientSums<T>& sums, T* coefficients) {
  with_softmax(tile.rows, rows, cols, Unweighted(), [&](const auto& softmax) {
    store_coefficients(tile, sums, coefficients, [&](int64_t i, int64_t j, Vec<T> logit) {
      const Vec<T> value = softmax(i, j, logit);
      if (rows.grad_total == nullptr) {
        return value;
      }
      const Vec<T> with_totals = value + (Vec<T>(rows.grad_total[i]) + Vec<T>::loadu(cols.grad_total + j));
      return Vec<T>::blendv(with_totals, Vec<T>(T(0)), logit == Vec<T>(-kInfinity<T>));
    });
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
