// The tile functions of tile.h, written once over at::vec::Vectorized and compiled per instruction set.
//
// Everything is in the namespace CPU_CAPABILITY: the linker must never take code of one instruction set for another.

#include "tile.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cmath>
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

// Register tile of the product: kRegisterRows x kRegisterVectors accumulators, with one vector for a broadcast of a and
// kRegisterVectors for b, fit the 32 vector registers of AVX-512 and the 16 of AVX2 and NEON.
constexpr int kRegisterRows = 6;
#ifdef CPU_CAPABILITY_AVX512
constexpr int kRegisterVectors = 4;
#else
constexpr int kRegisterVectors = 2;
#endif
template <typename T>
constexpr int64_t kPanel = kRegisterVectors * Vec<T>::size();

template <typename T, int Rows>
inline void multiply_rows(int64_t k, const T* a, int64_t lda, const T* b, T* c, int64_t ldc, bool accumulate) {
  Vec<T> sum[Rows][kRegisterVectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kRegisterVectors; ++v) {
      sum[i][v] = Vec<T>(T(0));
    }
  }
  for (int64_t l = 0; l < k; ++l, b += kPanel<T>) {
    Vec<T> row_of_b[kRegisterVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kRegisterVectors; ++v) {
      row_of_b[v] = Vec<T>::loadu(b + v * Vec<T>::size());
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vec<T> broadcast(a[i * lda + l]);
#pragma GCC unroll 4
      for (int v = 0; v < kRegisterVectors; ++v) {
        sum[i][v] = at::vec::fmadd(broadcast, row_of_b[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kRegisterVectors; ++v) {
      T* target = c + i * ldc + v * Vec<T>::size();
      (accumulate ? Vec<T>::loadu(target) + sum[i][v] : sum[i][v]).store(target);
    }
  }
}

template <typename T>
void multiply(
    int64_t m, int64_t k, const T* a, int64_t lda, int64_t a_block, const T* b, T* c, int64_t ldc, bool accumulate) {
  // what is left of the rows after the full register tiles
  constexpr auto rest = std::array{
      multiply_rows<T, 1>, multiply_rows<T, 2>, multiply_rows<T, 3>, multiply_rows<T, 4>, multiply_rows<T, 5>};
  // 128 deep, so that a panel of b, 32 KB, stays in the first-level cache for all rows of a tile
  for (int64_t begin = 0; begin < k; begin += kTile) {
    const int64_t depth = std::min(kTile, k - begin);
    const T* a_part = a + begin / kTile * a_block;
    const T* b_part = b + begin * kPanel<T>;
    const bool add = accumulate || begin > 0;
    int64_t i = 0;
    for (; i + kRegisterRows <= m; i += kRegisterRows) {
      multiply_rows<T, kRegisterRows>(depth, a_part + i * lda, lda, b_part, c + i * ldc, ldc, add);
    }
    if (i < m) {
      rest[m - i - 1](depth, a_part + i * lda, lda, b_part, c + i * ldc, ldc, add);
    }
  }
}

template <typename T>
void transpose(int64_t rows, int64_t cols, const T* source, int64_t ld_source, T* destination, int64_t ld) {
  constexpr int64_t kBlock = 16;
  for (int64_t i = 0; i < rows; i += kBlock) {
    for (int64_t j = 0; j < cols; j += kBlock) {
      at::vec::transpose_mxn<T>(
          source + j * ld_source + i,
          ld_source,
          destination + i * ld + j,
          ld,
          static_cast<int>(std::min(kBlock, cols - j)),
          static_cast<int>(std::min(kBlock, rows - i)));
    }
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

template <typename T>
void logits(const Tile<T>& tile, T* logits) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const LogitRow<false, T> row(tile, i);
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      row.at(j).store(logits + i * kTile + j);
    }
  }
}

template <typename T>
void mask_ids(int64_t rows, const int64_t* row_ids, const int64_t* col_ids, bool restrict, T* logits) {
  for (int64_t i = 0; i < rows; ++i, logits += kTile) {
    for (int64_t j = 0; j < kTile; ++j) {
      logits[j] = ((row_ids[i] == col_ids[j]) != restrict) ? -kInfinity<T> : logits[j];
    }
  }
}

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

// Both directions from one exponential per pair: sums relative to the maximum of the tile, then rescaled to the
// maximum of each row and column. Returns false, with nothing done, where the maxima are too far apart.
template <bool Stored, typename T>
bool sum_both(const Tile<T>& tile, MaxSum<T> rows, MaxSum<T> cols) {
  T lowest = kInfinity<T>;
  T highest = -kInfinity<T>;
  const auto extend = [&](T max) {
    highest = std::max(highest, max);
    lowest = max == -kInfinity<T> ? lowest : std::min(lowest, max);
  };
  std::for_each(rows.max, rows.max + tile.rows, extend);
  std::for_each(cols.max, cols.max + kTile, extend);
  // written so that NaN and an infinite maximum go the other road
  if (!(highest - lowest <= kSharedShift<T>)) {
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

template <bool Stored, typename T>
void totals_of(const Tile<T>& tile, T* rows, T* cols) {
  if (cols != nullptr) {
    std::fill_n(cols, kTile, T(0));
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    const LogitRow<Stored, T> logits(tile, i);
    Vec<T> row(T(0));
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      const Vec<T> logit = logits.at(j);
      const Vec<T> value = Vec<T>::blendv(logit, Vec<T>(T(0)), logit == Vec<T>(-kInfinity<T>));
      row = row + value;
      if (cols != nullptr) {
        (Vec<T>::loadu(cols + j) + value).store(cols + j);
      }
    }
    if (rows != nullptr) {
      rows[i] = sum_of(row);
    }
  }
}

template <typename T>
void totals(const Tile<T>& tile, T* rows, T* cols) {
  with_stored(tile, [&](auto stored) { totals_of<stored.value>(tile, rows, cols); });
}

template <typename T>
void fold(int64_t n, MaxSum<T> running, MaxSum<T> part) {
  for_each_vector<T>(n, [&](int64_t i, int64_t count) {
    const Vec<T> old_max = Vec<T>::loadu(running.max + i, count);
    const Vec<T> part_max = Vec<T>::loadu(part.max + i, count);
    const Vec<T> max = at::vec::maximum(old_max, part_max);
    const Vec<T> shift = shift_of(max);
    const Vec<T> old_sum = Vec<T>::loadu(running.sum + i, count) * exp(old_max - shift);
    const Vec<T> sum = at::vec::fmadd(Vec<T>::loadu(part.sum + i, count), exp(part_max - shift), old_sum);
    max.store(running.max + i, count);
    sum.store(running.sum + i, count);
  });
}

// The loop of `coefficients`; softmax(i, j, logit) is the vector of what the log-sum-exps give to pairs, to which the
// gradients of the totals are added where given.
template <bool Stored, bool Sums, typename T, typename Softmax>
inline void coefficients_loop(
    const Tile<T>& tile,
    Direction<T> rows,
    Direction<T> cols,
    ScaleBiasSums<T> row_sums,
    ScaleBiasSums<T> col_sums,
    T* coefficients,
    const Softmax& softmax) {
  const auto pair = [&](int64_t i, int64_t j, Vec<T> logit) {
    const Vec<T> value = softmax(i, j, logit);
    if (rows.grad_total == nullptr) {
      return value;
    }
    const Vec<T> with_totals = value + (Vec<T>(rows.grad_total[i]) + Vec<T>::loadu(cols.grad_total + j));
    return Vec<T>::blendv(with_totals, Vec<T>(T(0)), logit == Vec<T>(-kInfinity<T>));
  };
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
        const Vec<T> coefficient = pair(i + r, j, LogitRow<Stored, T>(tile, i + r).at(j));
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

template <bool Stored, bool Sums, typename T>
void coefficients_of(
    const Tile<T>& tile,
    Direction<T> rows,
    Direction<T> cols,
    ScaleBiasSums<T> row_sums,
    ScaleBiasSums<T> col_sums,
    T* coefficients) {
  const auto loop = [&](const auto& softmax) {
    coefficients_loop<Stored, Sums>(tile, rows, cols, row_sums, col_sums, coefficients, softmax);
  };
  const auto row_term = [&](int64_t i, Vec<T> logit) {
    return Vec<T>(rows.grad_lse[i]) * exp((logit - Vec<T>(rows.max[i])) - Vec<T>(rows.log_sum[i]));
  };
  const auto col_term = [&](int64_t j, Vec<T> logit) {
    return Vec<T>::loadu(cols.grad_lse + j) *
           exp((logit - Vec<T>::loadu(cols.max + j)) - Vec<T>::loadu(cols.log_sum + j));
  };
  if (cols.max == nullptr) {
    loop([&](int64_t i, int64_t, Vec<T> logit) { return row_term(i, logit); });
    return;
  }
  if (rows.max == nullptr) {
    loop([&](int64_t, int64_t j, Vec<T> logit) { return col_term(j, logit); });
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
  std::for_each(rows.max, rows.max + tile.rows, extend);
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
    factors(tile.rows, rows, row_factor);
    factors(kTile, cols, col_factor);
    loop([&](int64_t i, int64_t j, Vec<T> logit) {
      return exp(logit - shift) * (Vec<T>(row_factor[i]) + Vec<T>::loadu(col_factor + j));
    });
    return;
  }
  loop([&](int64_t i, int64_t j, Vec<T> logit) { return row_term(i, logit) + col_term(j, logit); });
}

template <typename T>
void coefficients(
    const Tile<T>& tile,
    Direction<T> rows,
    Direction<T> cols,
    ScaleBiasSums<T> row_sums,
    ScaleBiasSums<T> col_sums,
    T* coefficients) {
  with_stored(tile, [&](auto stored) {
    if (row_sums.scale != nullptr) {
      coefficients_of<stored.value, true>(tile, rows, cols, row_sums, col_sums, coefficients);
    } else {
      coefficients_of<stored.value, false>(tile, rows, cols, row_sums, col_sums, coefficients);
    }
  });
}

constexpr int kLanes = 16;  // sums side by side, for vector instructions

template <typename T>
inline double dot_product(int64_t depth, const T* a, const T* b) {
  double sums[kLanes] = {};
  int64_t l = 0;
  for (; l + kLanes <= depth; l += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += static_cast<double>(a[l + lane]) * static_cast<double>(b[l + lane]);
    }
  }
  double sum = 0.0;
  for (; l < depth; ++l) {
    sum += static_cast<double>(a[l]) * static_cast<double>(b[l]);
  }
  for (const double part : sums) {
    sum += part;
  }
  return sum;
}

template <typename T>
void dot_products(
    int64_t s_count,
    int64_t t_count,
    int64_t depth,
    const T* const* a,
    const T* const* b,
    bool symmetric,
    double* products) {
  for (int64_t s = 0; s < s_count; ++s) {
    for (int64_t t = 0; t < t_count; ++t) {
      const bool known = symmetric && t < s;
      products[s * t_count + t] = known ? products[t * t_count + s] : dot_product(depth, a[s], b[t]);
    }
  }
}

template <typename T>
void combine(
    int64_t s_count, int64_t t_count, int64_t depth, const double* weights, const T* const* vectors, T* const* result) {
  for (int64_t s = 0; s < s_count; ++s, weights += t_count) {
    int64_t l = 0;
    for (; l + kLanes <= depth; l += kLanes) {
      double sums[kLanes] = {};
      for (int64_t t = 0; t < t_count; ++t) {
        if (weights[t] == 0.0) {
          continue;
        }
        for (int lane = 0; lane < kLanes; ++lane) {
          sums[lane] += weights[t] * static_cast<double>(vectors[t][l + lane]);
        }
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        result[s][l + lane] = static_cast<T>(sums[lane]);
      }
    }
    for (; l < depth; ++l) {
      double sum = 0.0;
      for (int64_t t = 0; t < t_count; ++t) {
        sum += weights[t] == 0.0 ? 0.0 : weights[t] * static_cast<double>(vectors[t][l]);
      }
      result[s][l] = static_cast<T>(sum);
    }
  }
}

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

#define CONTRASTIVE_OPS_STRING_(x) #x
#define CONTRASTIVE_OPS_STRING(x) CONTRASTIVE_OPS_STRING_(x)

template <typename T>
constexpr TileKernels<T> kKernels = {
    CONTRASTIVE_OPS_STRING(CPU_CAPABILITY),
    kPanel<T>,
    multiply<T>,
    transpose<T>,
    logits<T>,
    mask_ids<T>,
    reduce<T>,
    totals<T>,
    fold<T>,
    coefficients<T>,
    dot_products<T>,
    combine<T>,
    distances<T>,
    spread<T>,
};

}  // namespace

extern const TileKernels<float> float_kernels = kKernels<float>;
extern const TileKernels<double> double_kernels = kKernels<double>;

}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
