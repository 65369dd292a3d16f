// Distances from the spans of tuples, and what their gradients give to the products of backward.
#pragma once

#include "vectors.h"

#include <array>
#include <cmath>

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

// Coordinates y of rows in the spans of their columns' tuples, from the dot products of row i at the columns from j on.
template <int Members, typename T>
inline std::array<Vec<T>, Members> coordinates(const SpanTile<T>& tile, int64_t i, int64_t j) {
  std::array<Vec<T>, Members> dots;
  std::array<Vec<T>, Members> y;
  const T* basis = tile.basis + j;
#pragma GCC unroll 4
  for (int t = 0; t < Members; ++t) {
    dots[t] = Vec<T>::loadu(tile.dots + t * kTile * kTile + i * kTile + j);
    y[t] = Vec<T>::loadu(basis) * dots[0];
    basis += tile.ld_basis;
#pragma GCC unroll 4
    for (int s = 1; s <= t; ++s, basis += tile.ld_basis) {
      y[t] = at::vec::fmadd(Vec<T>::loadu(basis), dots[s], y[t]);
    }
  }
  return y;
}

template <int Members, typename T>
void distances_of(const SpanTile<T>& tile, T* pairs) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      Vec<T> square(tile.row_square[i]);
      for (const Vec<T>& y : coordinates<Members>(tile, i, j)) {
        square = at::vec::fmadd(y, y.neg(), square);
      }
      at::vec::maximum(square, Vec<T>(T(0))).sqrt().neg().store(pairs + i * kTile + j);
    }
  }
}

template <int Members, typename T>
void spread_of(const SpanTile<T>& tile, const T* pairs, const T* gradients, const SpanCoefficients<T>& coefficients) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    // |x|^2 - |y|^2 is off by about as many units in the last place of |x|^2
    const Vec<T> smallest(-std::sqrt(4 * std::numeric_limits<T>::epsilon() * tile.row_square[i]));
    Vec<T> row_sum(T(0));
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      const int64_t place = i * kTile + j;
      const Vec<T> pair = Vec<T>::loadu(pairs + place);
      const Vec<T> quotient = Vec<T>::loadu(gradients + place) / pair.neg();
      const Vec<T> q = Vec<T>::blendv(quotient, Vec<T>(T(0)), pair >= smallest);
      const std::array<Vec<T>, Members> y = coordinates<Members>(tile, i, j);
      row_sum = row_sum + q;
#pragma GCC unroll 4
      for (int t = 0; t < Members; ++t) {
        Vec<T> b(T(0));
#pragma GCC unroll 4
        for (int s = t; s < Members; ++s) {
          b = at::vec::fmadd(Vec<T>::loadu(tile.basis + (s * (s + 1) / 2 + t) * tile.ld_basis + j), y[s], b);
        }
        (q * b).store(coefficients.of_x[t] + place);
        (q * y[t]).store(coefficients.of_y[t] + place);
      }
    }
    coefficients.row_sum[i] = sum_of(row_sum);
  }
}

// The instance for the number of vectors in a tuple.
template <typename T>
void distances(const SpanTile<T>& tile, T* pairs) {
  constexpr auto of = std::array{distances_of<1, T>, distances_of<2, T>, distances_of<3, T>, distances_of<4, T>};
  of[tile.members - 1](tile, pairs);
}

template <typename T>
void spread(const SpanTile<T>& tile, const T* pairs, const T* gradients, const SpanCoefficients<T>& coefficients) {
  constexpr auto of = std::array{spread_of<1, T>, spread_of<2, T>, spread_of<3, T>, spread_of<4, T>};
  of[tile.members - 1](tile, pairs, gradients, coefficients);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
