// How the operands of the three products of a tile are stored and multiplied:
//
//   dots = X Y^T        a: rows of x                 b: depth panels of y    (transposed: the depth is the features)
//   dX  += G Y          a: coefficients              b: feature panels of y
//   dY  += G^T X        a: transposed coefficients   b: feature panels of x
//
// A panel holds the columns [p W, (p + 1) W) of b, contiguous by depth, zero beyond the last column. VectorProducts
// runs on vector instructions in the dtype of the statistics, BFloat16Products on units for bfloat16, see
// matrix_unit.h.
#pragma once

#include "matrix_unit.h"
#include "memory.h"
#include "ranges.h"
#include "tasks.h"
#include "tile.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <type_traits>

namespace contrastive_ops {

template <typename T>
class VectorProducts {
 public:
  using Statistic = T;
  using Source = T;
  using Operand = T;
  struct Session {};

  int64_t panel() const {
    return kernels_.panel;
  }

  const TileKernels<T>& kernels() const {
    return kernels_;
  }

  // The length along a depth of n in operands.
  int64_t depth(int64_t n) const {
    return n;
  }

  // Rows of an embedding as they are: the a of the first product.
  at::Tensor rows(const at::Tensor& source) const {
    return source.contiguous();
  }

  void pack_depth_panel(int64_t cols, int64_t depth, const T* source, int64_t ld, T* panel) const {
    if (cols < this->panel()) {
      std::fill_n(panel, depth * this->panel(), T(0));
    }
    kernels_.transpose(depth, cols, source, ld, panel, this->panel());
  }

  void pack_feature_panel(int64_t depth, int64_t cols, const T* source, int64_t ld, T* panel) const {
    for (int64_t l = 0; l < depth; ++l) {
      T* target = panel + l * this->panel();
      std::copy_n(source + l * ld, cols, target);
      std::fill(target + cols, target + this->panel(), T(0));
    }
  }

  // c[m, panel] = a b, from the rows on that begin at a
  void multiply_dots(int64_t m, int64_t depth, const T* a, const T* b, T* c) const {
    kernels_.multiply(m, depth, a, depth, kTile, b, c, kTile, false);
  }

  // c[m, panel] = (accumulate ? c : 0) + a b, for a strip of coefficient tiles
  void multiply_strip(int64_t m, int64_t k, const T* a, const T* b, T* c, int64_t ldc, bool accumulate) const {
    kernels_.multiply(m, k, a, kTile, kTile * kTile, b, c, ldc, accumulate);
  }

  // A tile of coefficients with `rows` rows, or its transpose, as a tile of a strip.
  void pack_tile(int64_t rows, const T* tile, bool transposed, T* target) const {
    if (transposed) {
      kernels_.transpose(kTile, rows, tile, kTile, target, kTile);
    } else {
      std::copy_n(tile, rows * kTile, target);
    }
  }

 private:
  const TileKernels<T>& kernels_ = tile_kernels<T>();
};

#ifdef CONTRASTIVE_OPS_MATRIX_UNIT
// Embeddings of one part (bfloat16), two (float16) or three (float32); coefficients are rounded to as many.
template <int Parts, BFloat16Unit Unit>
class BFloat16Products {
 public:
  using Statistic = float;
  using Source = std::conditional_t<Parts == 1, c10::BFloat16, float>;
  using Operand = matrix_unit::Element<Parts>;

  // The unit is in use by this thread.
  class Session {
   public:
    Session() {
      if constexpr (Unit == BFloat16Unit::matrix) {
        matrix_unit::configure();
      }
    }
    ~Session() {
      if constexpr (Unit == BFloat16Unit::matrix) {
        matrix_unit::release();
      }
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  int64_t panel() const {
    return matrix_unit::kPanel;
  }

  const TileKernels<float>& kernels() const {
    return kernels_;
  }

  int64_t depth(int64_t n) const {
    return round_up(n, matrix_unit::kFragmentDepth);
  }

  at::Tensor rows(const at::Tensor& source) const {
    const int64_t n = source.size(0);
    const int64_t features = source.size(1);
    const int64_t width = depth(features);
    const int64_t bytes = round_up(n, matrix_unit::kFragmentRows) * width * static_cast<int64_t>(sizeof(Operand));
    const at::Tensor packed = empty_for_reuse({bytes}, at::kByte);
    const Source* values = source.const_data_ptr<Source>();
    const int64_t ld = source.stride(0);
    Operand* target = static_cast<Operand*>(packed.mutable_data_ptr());
    for_each_task((n + kTile - 1) / kTile, kMoveCost * n * features, [&](int64_t task) {
      const int64_t first = task * kTile;
      matrix_unit::pack_rows(
          std::min(kTile, n - first), features, values + first * ld, ld, width, target + first * width);
    });
    return packed;
  }

  void pack_depth_panel(int64_t cols, int64_t depth, const Source* source, int64_t ld, Operand* panel) const {
    matrix_unit::pack_depth_panel(cols, depth, source, ld, panel);
  }

  void pack_feature_panel(int64_t depth, int64_t cols, const Source* source, int64_t ld, Operand* panel) const {
    matrix_unit::pack_feature_panel(depth, cols, source, ld, panel);
  }

  void multiply_dots(int64_t m, int64_t depth, const Operand* a, const Operand* b, float* c) const {
    multiply(m, depth, a, kRows * depth, kRows * kTile, b, c, kTile, false);
  }

  void multiply_strip(
      int64_t m, int64_t k, const Operand* a, const Operand* b, float* c, int64_t ldc, bool accumulate) const {
    multiply(m, k, a, kRows * kTile, kTile * kTile, b, c, ldc, accumulate);
  }

  void pack_tile(int64_t rows, const float* tile, bool transposed, Operand* target) const {
    if (transposed) {
      matrix_unit::pack_transposed(rows, kTile, tile, kTile, kTile, target);
    } else {
      matrix_unit::pack_rows(rows, kTile, tile, kTile, kTile, target);
    }
  }

 private:
  template <typename... Arguments>
  static void multiply(Arguments... arguments) {
    if constexpr (Unit == BFloat16Unit::matrix) {
      matrix_unit::multiply(arguments...);
    } else {
      matrix_unit::multiply_on_vectors(arguments...);
    }
  }

  static_assert(matrix_unit::kBlockDepth == kTile);
  static constexpr int64_t kRows = matrix_unit::kFragmentRows;
  const TileKernels<float>& kernels_ = tile_kernels<float>();
};
#endif

}  // namespace contrastive_ops
