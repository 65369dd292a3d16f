// What the tile functions share: vectors, the exponential, and walks over the rows of a tile.
#pragma once

#include "../tile.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <limits>
#include <type_traits>

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// e^x for x < 88, to about 1 ulp; below -87 it is 0. Inline, where the library's exp is a call.
// x = n ln 2 + r, |r| <= ln 2 / 2: a polynomial for e^r, and n added to the exponent.
inline Vec<float> exp(Vec<float> x) {
  const Vec<float> round(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const Vec<float> shifted = at::vec::fmadd(x, Vec<float>(1.44269504f), round);
  const Vec<float> n = shifted - round;
  Vec<float> r = at::vec::fmadd(n, Vec<float>(-0.693359375f), x);
  r = at::vec::fmadd(n, Vec<float>(2.12194440e-4f), r);
  Vec<float> p(1.9875691500e-4f);
  p = at::vec::fmadd(p, r, Vec<float>(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, Vec<float>(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(5.0000001201e-1f));
  p = at::vec::fmadd(p, r * r, r + Vec<float>(1.0f));
  const Vec<int32_t> exponent = at::vec::cast<int32_t>(shifted) << Vec<int32_t>(23);
  const Vec<float> result = at::vec::cast<float>(at::vec::cast<int32_t>(p) + exponent);
  return Vec<float>::blendv(result, Vec<float>(0.0f), x < Vec<float>(-87.0f));
}

inline Vec<double> exp(Vec<double> x) {
  return x.exp();
}

template <typename T>
inline T max_of(Vec<T> x) {
  return at::vec::vec_reduce_all<T>([](Vec<T>& a, Vec<T>& b) { return at::vec::maximum(a, b); }, x);
}

template <typename T>
inline T sum_of(Vec<T> x) {
  return at::vec::vec_reduce_all<T>([](Vec<T>& a, Vec<T>& b) { return a + b; }, x);
}

constexpr int kLanes = 16;  // sums of float64 side by side, for vector instructions

// f(i, count) for consecutive vectors of a range of n values; the last may hold fewer.
template <typename T, typename F>
inline void for_each_vector(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += Vec<T>::size()) {
    f(i, std::min<int64_t>(Vec<T>::size(), n - i));
  }
}

// f(i, number of rows) for the rows of a tile in groups of four, so that the sums over columns are loaded and stored
// once for four rows; what is left in groups of one.
template <typename F>
inline void for_each_row_group(int64_t rows, const F& f) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    f(i, std::integral_constant<int, 4>());
  }
  for (; i < rows; ++i) {
    f(i, std::integral_constant<int, 1>());
  }
}

// A row of logits: as they are stored, or else made of the pairs.
template <bool Stored, typename T>
class LogitRow {
 public:
  LogitRow(const Tile<T>& tile, int64_t i)
      : tile_(tile),
        values_((Stored ? tile.logits : tile.pairs) + i * kTile),
        scale_(tile.row_scale[i]),
        bias_(tile.row_bias[i]) {}

  Vec<T> at(int64_t j) const {
    const Vec<T> value = Vec<T>::loadu(values_ + j);
    if constexpr (Stored) {
      return value;
    }
    return at::vec::fmadd(
        value, scale_ * Vec<T>::loadu(tile_.col_scale + j), bias_ + Vec<T>::loadu(tile_.col_bias + j));
  }

 private:
  const Tile<T>& tile_;
  const T* values_;
  Vec<T> scale_;
  Vec<T> bias_;
};

// f(whether logits are stored), as a constant.
template <typename T, typename F>
inline auto with_stored(const Tile<T>& tile, const F& f) {
  return tile.logits == nullptr ? f(std::false_type()) : f(std::true_type());
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
