// The product of packed operands on vector instructions, and the transpose that packs them.
#pragma once

#include "vectors.h"

#include <array>

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

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

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
