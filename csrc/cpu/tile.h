// The elementwise and product work on one tile of the N x M plane, as a table of plain functions.
//
// tile.cpp is compiled once per instruction set (default, AVX2, AVX-512); each object provides one table for float and
// one for double, and the engine takes the best that the processor runs. Nothing here knows of tensors or threads.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace contrastive_ops {

// Rows and columns of a tile. 128 x 128 floats are 64 KB: dots and logits stay in the second-level cache.
constexpr int64_t kTile = 128;

// A tile: `rows` x 128 values with leading dimension 128. The engine pads vectors over columns to whole tiles, with a
// bias of -inf in the padding: its logits are -inf, so no function below has a tail of columns.
template <typename T>
struct Tile {
  int64_t rows;
  const T* dots;  // <x_i, y_j>
  T* logits;      // s_ij, then overwritten by what the function computes
  const T* row_scale;
  const T* col_scale;
  const T* row_bias;
  const T* col_bias;
};

// Maximum of the logits and sum of exp(logit - maximum), of one tile or running over many. An empty set is (-inf, 0).
template <typename T>
struct MaxSum {
  T* max;
  T* sum;
};

// One direction of the backward: u = dL/d lse, and lse as maximum and log of the sum relative to it. They stay apart,
// as the rounding of their sum is as large as the logits are. An empty set has the maximum +inf and a log of 0.
template <typename T>
struct Direction {
  const T* grad_lse;
  const T* max;
  const T* log_sum;
};

// Sums over one tile, of 128 values each: the gradients of scale and bias.
template <typename T>
struct ScaleBiasSums {
  T* scale;
  T* bias;
};

template <typename T>
struct TileKernels {
  const char* instruction_set;

  // Columns of a packed panel: what a register tile of `multiply` covers.
  int64_t panel;

  // c[m, panel] = (accumulate ? c : 0) + a[m, k] b[k, panel], where a(i, l) is at
  // a[(l / 128) * a_block + i * lda + l % 128]: rows of tiles (lda = 128, a_block = 128 * 128), or plain rows (a_block
  // = 128)
  void (*multiply)(
      int64_t m, int64_t k, const T* a, int64_t lda, int64_t a_block, const T* b, T* c, int64_t ldc, bool accumulate);

  // destination[rows, cols] = source[cols, rows]^T
  void (*transpose)(int64_t rows, int64_t cols, const T* source, int64_t ld_source, T* destination, int64_t ld);

  // Round to bfloat16, the operand of matrix units; null for double.
  void (*round)(int64_t n, const T* source, c10::BFloat16* destination);

  // logits = row_scale col_scale dots + row_bias + col_bias
  void (*logits)(const Tile<T>& tile);

  // logits = -inf where the ids are equal, or with `restrict` where they are not
  void (*mask_ids)(const Tile<T>& tile, const int64_t* row_ids, const int64_t* col_ids, bool restrict);

  // Maxima and sums over the rows and over the columns of the logits; a null direction is skipped.
  void (*reduce)(const Tile<T>& tile, MaxSum<T> rows, MaxSum<T> cols);

  // Fold `part` into the running statistics of n rows (columns).
  void (*fold)(int64_t n, MaxSum<T> running, MaxSum<T> part);

  // logits = (u_i e^(s - row_lse_i) + v_j e^(s - col_lse_j)) row_scale_i col_scale_j, the weight of y_j in the gradient
  // of x_i and of x_i in that of y_j; a null direction is skipped. Sums are skipped where null.
  void (*coefficients)(
      const Tile<T>& tile, Direction<T> rows, Direction<T> cols, ScaleBiasSums<T> row_sums, ScaleBiasSums<T> col_sums);
};

// The table of the best instruction set of this processor, or the one that ATEN_CPU_CAPABILITY names.
template <typename T>
const TileKernels<T>& tile_kernels();

// One per object compiled from tile.cpp.
#define CONTRASTIVE_OPS_DECLARE_VARIANT(name)      \
  namespace name {                                 \
  extern const TileKernels<float> float_kernels;   \
  extern const TileKernels<double> double_kernels; \
  }
CONTRASTIVE_OPS_DECLARE_VARIANT(DEFAULT)
CONTRASTIVE_OPS_DECLARE_VARIANT(AVX2)
CONTRASTIVE_OPS_DECLARE_VARIANT(AVX512)
#undef CONTRASTIVE_OPS_DECLARE_VARIANT

}  // namespace contrastive_ops
