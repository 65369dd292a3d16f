// How the operands of the three products of a tile are stored and multiplied:
//
//   dots = X Y^T        a: rows of x                 b: depth panels of y    (transposed: the depth is the features)
//   dX  += G Y          a: coefficients              b: feature panels of y
//   dY  += G^T X        a: transposed coefficients   b: feature panels of x
//
// A panel holds the columns [p W, (p + 1) W) of b, contiguous by depth, zero beyond the last column. VectorProducts
// runs on vector instructions in the dtype of the statistics, MatrixUnitProducts on a bfloat16 matrix unit (AMX).
#pragma once

#include "tile.h"

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/constant_pad_nd.h>

#include <algorithm>
#include <cstring>

namespace contrastive_ops {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <typename T>
class VectorProducts {
 public:
  using Statistic = T;
  using Operand = T;

  int64_t panel() const {
    return kernels_.panel;
  }

  const TileKernels<T>& kernels() const {
    return kernels_;
  }

  // Rows of an embedding as the a of the first product, [n, depth(features)].
  at::Tensor rows(const at::Tensor& x) const {
    return x.to(c10::CppTypeToScalarType<T>::value).contiguous();
  }

  int64_t depth(int64_t n) const {
    return n;
  }

  void pack_depth_panel(int64_t cols, int64_t depth, const T* rows, T* panel) const {
    if (cols < this->panel()) {
      std::fill_n(panel, depth * this->panel(), T(0));
    }
    kernels_.transpose(depth, cols, rows, depth, panel, this->panel());
  }

  void pack_feature_panel(int64_t depth, int64_t cols, const T* rows, int64_t ld, T* panel) const {
    for (int64_t l = 0; l < depth; ++l) {
      T* target = panel + l * this->panel();
      std::copy_n(rows + l * ld, cols, target);
      std::fill(target + cols, target + this->panel(), T(0));
    }
  }

  void multiply(
      int64_t m, int64_t k, const T* a, int64_t lda, int64_t a_block, const T* b, T* c, int64_t ldc, bool accumulate)
      const {
    kernels_.multiply(m, k, a, lda, a_block, b, c, ldc, accumulate);
  }

  // Where the tile of coefficients is computed: in its place in the workspace.
  T* coefficients_place(T*, T* stored) const {
    return stored;
  }

  void store_coefficients(int64_t, const T*, T*) const {}

  void store_transposed(int64_t rows, T* tile, T*, T* stored) const {
    kernels_.transpose(kTile, rows, tile, kTile, stored, kTile);
  }

  void release() const {}

 private:
  const TileKernels<T>& kernels_ = tile_kernels<T>();
};

// bfloat16 x bfloat16 -> float32. Panels interleave pairs along the depth, as the instructions read them, so that a
// depth is even and padded with zeros.
class MatrixUnitProducts {
 public:
  using Statistic = float;
  using Operand = c10::BFloat16;

  static bool available() {
    return std::strcmp(tile_kernels<float>().instruction_set, "AVX512") == 0 &&
           at::native::cpublas::could_pack(at::kBFloat16);
  }

  int64_t panel() const {
    return 64;
  }

  const TileKernels<float>& kernels() const {
    return kernels_;
  }

  at::Tensor rows(const at::Tensor& x) const {
    const at::Tensor even = x.size(1) % 2 == 0 ? x : at::constant_pad_nd(x, {0, 1});
    return even.to(at::kBFloat16).contiguous();
  }

  int64_t depth(int64_t n) const {
    return round_up(n, 2);
  }

  // A pair is 32 bits wide: transposing pairs is transposing floats, bit by bit.
  void pack_depth_panel(int64_t cols, int64_t depth, const Operand* rows, Operand* panel) const {
    if (cols < this->panel()) {
      std::fill_n(panel, depth * this->panel(), Operand(0.0f));
    }
    kernels_.transpose(
        depth / 2,
        cols,
        reinterpret_cast<const float*>(rows),
        depth / 2,
        reinterpret_cast<float*>(panel),
        this->panel());
  }

  void pack_feature_panel(int64_t depth, int64_t cols, const Operand* rows, int64_t ld, Operand* panel) const {
    if (cols < this->panel() || depth % 2 != 0) {
      std::fill_n(panel, this->depth(depth) * this->panel(), Operand(0.0f));
    }
    for (int64_t l = 0; l < depth; ++l) {
      Operand* target = panel + l / 2 * 2 * this->panel() + l % 2;
      for (int64_t j = 0; j < cols; ++j) {
        target[2 * j] = rows[l * ld + j];
      }
    }
  }

  void multiply(
      int64_t m,
      int64_t k,
      const Operand* a,
      int64_t lda,
      int64_t a_block,
      const Operand* b,
      float* c,
      int64_t ldc,
      bool accumulate) const {
    const int64_t step = a_block == kTile ? k : kTile;
    for (int64_t l = 0; l < k; l += step) {
      at::native::cpublas::brgemm(
          m,
          panel(),
          depth(std::min(step, k - l)),
          lda,
          panel(),
          ldc,
          accumulate || l > 0,
          a + l / kTile * a_block,
          b + l * panel(),
          c,
          /*is_vnni=*/true);
    }
  }

  float* coefficients_place(float* scratch, Operand*) const {
    return scratch;
  }

  void store_coefficients(int64_t rows, const float* tile, Operand* stored) const {
    kernels_.round(rows * kTile, tile, stored);
  }

  void store_transposed(int64_t rows, float* tile, float* scratch, Operand* stored) const {
    std::fill(tile + rows * kTile, tile + depth(rows) * kTile, 0.0f);
    kernels_.transpose(kTile, depth(rows), tile, kTile, scratch, kTile);
    kernels_.round(kTile * kTile, scratch, stored);
  }

  // The unit's configuration belongs to the thread and must not outlive the task.
  void release() const {
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);
  }

 private:
  const TileKernels<float>& kernels_ = tile_kernels<float>();
};

}  // namespace contrastive_ops
