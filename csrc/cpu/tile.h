// The elementwise and product work on one tile of the N x M plane, and on vectors of one row, as a table of plain
// functions.
//
// tile.cpp, with the functions in tile/, is compiled once per instruction set (default, AVX2, AVX-512); each object
// provides one table for float and one for double, and the engine takes the best that the processor runs. Nothing here
// knows of tensors or threads.
#pragma once

#include <cstdint>

namespace contrastive_ops {

// Rows and columns of a tile. 128 x 128 floats are 64 KB: dots and logits stay in the second-level cache.
constexpr int64_t kTile = 128;

// A tile: `rows` x 128 values with leading dimension 128. The engine pads vectors over columns to whole tiles, with a
// bias of -inf in the padding: its logits are -inf, so no function below has a tail of columns.
template <typename T>
struct Tile {
  int64_t rows;
  const T* pairs;   // of x_i and y_j: their dot product, or minus the distance of x_i from the span of the tuple y_j
  const T* logits;  // s_ij, -inf where a pair does not take part; null where all do: s_ij is then made from the pairs
  const T* row_scale;
  const T* col_scale;
  const T* row_bias;
  const T* col_bias;
};

// What is summed over the rows and columns of similarity_sum.
enum class Function : uint8_t { identity, softplus, relu, sigmoid, square, step };

// Maximum of the logits and sum of exp(logit - maximum), of one tile or running over many. An empty set is (-inf, 0).
template <typename T>
struct MaxSum {
  T* max;
  T* sum;
};

// One direction of the backward: u = dL/d lse, and lse as maximum and log of the sum relative to it. They stay apart,
// as the rounding of their sum is as large as the logits are. An empty set has the maximum +inf and a log of 0.
// grad_total = dL/d sum of the logits is null, in both directions, where there are no totals.
template <typename T>
struct Direction {
  const T* grad_lse;
  const T* max;
  const T* log_sum;
  const T* grad_total;
};

// The most vectors that a tuple may have.
constexpr int64_t kMembers = 4;

// Rows x_i against tuples (m_j1 .. m_jP). With L L^T the Gram matrix of tuple j, y = L^-1 (<x_i, m_j1> .. <x_i, m_jP>)
// are the coordinates of x_i in the span of the tuple, and its distance from the span is sqrt(|x_i|^2 - |y|^2).
template <typename T>
struct SpanTile {
  int64_t rows;
  int64_t members;  // P
  const T* dots;    // P tiles <x_i, m_jt>
  const T* basis;   // P (P + 1) / 2 rows of values over the columns: the lower triangle of L^-1
  int64_t ld_basis;
  const T* row_square;  // |x_i|^2
};

// What the products of a tuple's backward take, P tiles each.
template <typename T>
struct SpanCoefficients {
  T* of_x[kMembers];  // weight of m_jt in the gradient of x_i
  T* of_y[kMembers];  // weight of x_i in moment t of tuple j
  T* row_sum;         // 128 values: minus the weight of x_i in its own gradient
};

// Sums over one tile, of 128 values each: the gradients of scale and bias. All are null where none are needed.
template <typename T>
struct ScaleBiasSums {
  T* scale;
  T* bias;
};
template <typename T>
struct CoefficientSums {
  ScaleBiasSums<T> rows;
  ScaleBiasSums<T> cols;
};

// Of one direction: the weight constant + slope (s - mean) of a pair in the backward of an expectation.
template <typename T>
struct Tilt {
  const T* constant;
  const T* slope;
  const T* mean;
};

// Noise of pairs: the seed, and the place of the first pair of a tile in the plane.
struct Noise {
  uint64_t seed;
  int64_t row;
  int64_t col;
};

// Pairs of a tile, row by row and in the order of the columns; there is room for all. The keys are what they are
// compared by.
template <typename T>
struct Candidates {
  T* values;
  T* keys;
  uint8_t* cols;
  int32_t* ends;  // [128] where those of a row end
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

  // logits = row_scale col_scale pairs + row_bias + col_bias, from a tile without logits
  void (*logits)(const Tile<T>& tile, T* logits);

  // logits = -inf where the ids are equal, or with `restrict` where they are not
  void (*mask_ids)(int64_t rows, const int64_t* row_ids, const int64_t* col_ids, bool restrict, T* logits);

  // logits = -inf where the guide is above a ceiling of the row or of the column, or with `above` where it is not. The
  // guide may be the logits.
  void (*mask_ceilings)(int64_t rows, const T* guide, const T* ceiling, const T* col_ceiling, bool above, T* logits);

  // Maxima and sums over the rows and over the columns of the logits; a null direction is skipped.
  void (*reduce)(const Tile<T>& tile, MaxSum<T> rows, MaxSum<T> cols);

  // Sums of a function of the logits over the rows and over the columns, of the pairs that take part; a null direction
  // is skipped.
  void (*sum)(const Tile<T>& tile, Function function, T* rows, T* cols);

  // Means of the values under the softmax of stored logits, given its maxima, over rows and columns; 0 of an empty set.
  // Those that are null are skipped.
  void (*means)(const Tile<T>& tile, const T* values, const T* row_max, const T* col_max, T* row_means, T* col_means);

  // The pairs whose keys are above the thresholds of their rows, or NaN. Without noise the keys are the logits, or to
  // find the smallest their negatives, and those of pairs that do not take part are -inf.
  void (*candidates)(
      const Tile<T>& tile, const T* thresholds, bool largest, const Noise* noise, const Candidates<T>& candidates);

  // Fold `part` into the running statistics of n rows (columns).
  void (*fold)(int64_t n, MaxSum<T> running, MaxSum<T> part);

  // The same, and the means of the part into the running ones, for at most 128 rows.
  void (*fold_means)(int64_t n, MaxSum<T> running, MaxSum<T> part, const T* part_means, double* means);

  // coefficients = (u_i e^(s - row_lse_i) + v_j e^(s - col_lse_j) + the gradients of the totals) row_scale_i
  // col_scale_j, the gradient of the pair: for dot products the weight of y_j in the gradient of x_i, and of x_i in
  // that of y_j. A direction whose max is null is skipped. Sums are skipped where null. May overwrite the logits.
  void (*coefficients)(
      const Tile<T>& tile, Direction<T> rows, Direction<T> cols, const CoefficientSums<T>& sums, T* coefficients);

  // The same where the gradient of a logit is (row_grad_i + col_grad_j) times the derivative of the function.
  void (*sum_coefficients)(
      const Tile<T>& tile,
      Function function,
      const T* row_grads,
      const T* col_grads,
      const CoefficientSums<T>& sums,
      T* coefficients);

  // result = u_i e^(s - row_lse_i) + v_j e^(s - col_lse_j), of stored logits.
  void (*softmax)(const Tile<T>& tile, Direction<T> rows, Direction<T> cols, T* result);

  // `coefficients` where the gradient of a logit has `more` added.
  void (*mixed_coefficients)(
      const Tile<T>& tile,
      Direction<T> rows,
      Direction<T> cols,
      const T* more,
      const CoefficientSums<T>& sums,
      T* coefficients);

  // `coefficients` where u_i and v_j are multiplied by a pair's weight, from the tilts of its row and its column.
  void (*tilted_coefficients)(
      const Tile<T>& tile,
      const T* values,
      Direction<T> rows,
      Direction<T> cols,
      Tilt<T> row_tilt,
      Tilt<T> col_tilt,
      const CoefficientSums<T>& sums,
      T* coefficients);

  // products[s, t] = <a_s, b_t> of vectors, in float64; `symmetric` where a and b are the same
  void (*dot_products)(
      int64_t s_count,
      int64_t t_count,
      int64_t depth,
      const T* const* a,
      const T* const* b,
      bool symmetric,
      double* products);

  // result_s = sum over t of weights[s, t] vectors_t, in float64, without those whose weight is 0
  void (*combine)(
      int64_t s_count,
      int64_t t_count,
      int64_t depth,
      const double* weights,
      const T* const* vectors,
      T* const* result);

  // pairs = minus the distances of the rows from the spans
  void (*distances)(const SpanTile<T>& tile, T* pairs);

  // From the gradients of the pairs to the coefficients of the products: with q = gradient / distance, of_x_t = q b_t
  // for b = L^-T y, of_y_t = q y_t, row_sum = sum of q. q is 0 where the distance is 0 to within its rounding: there it
  // has a minimum.
  void (*spread)(const SpanTile<T>& tile, const T* pairs, const T* gradients, const SpanCoefficients<T>& coefficients);
};

// The table of the best instruction set of this processor, or the one that ATEN_CPU_CAPABILITY names.
template <typename T>
const TileKernels<T>& tile_kernels();

// What of this processor multiplies bfloat16, see matrix_unit.h: a matrix unit, which takes float32 as well, vector
// units, or nothing. The environment's CONTRASTIVE_OPS_BFLOAT16_UNIT names the most that is taken.
enum class BFloat16Unit { none, vectors, matrix };
BFloat16Unit bfloat16_unit();

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
