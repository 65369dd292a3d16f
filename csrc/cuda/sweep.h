// The CUDA engine as its binding sees it: sweeps over the tiles of the N x M plane that serve similarity_logsumexp,
// similarity_sum, similarity_expectation and volume_logsumexp. Plain pointers to memory of the device, sizes and a
// stream; no header of torch.
//
//   s_ij = a_i b_j pair_ij + c_i + d_j
//   pair_ij = <x_i, y_j>, or for volumes minus the distance of x_i from the span of the vectors y_j1 .. y_jP
//   z_ij, of a second form <u_i, v_j>: a teacher's logit, or a guide's similarity
//
// contrastive_ops/backends/sweep.py says which kernel runs when. A null pointer is an option that was not given. Every
// function returns the error in words, or null.
#pragma once

#include <cuda_runtime_api.h>
#include <cstdint>

namespace contrastive_ops::cuda {

enum class Dtype { float32, bfloat16, float16 };

// What is made of the pairs of a row, or column, that take part: the logarithm of the sum of e^s, the sum of a function
// of s, or the mean of s under the softmax of z.
enum class Reduction { logsumexp, sum, expectation };
enum class Function { identity, softplus, relu, sigmoid, square, step };

// What the options of the op say of every row and every column.
struct Vectors {
  const float* row_scale;
  const float* col_scale;
  const float* row_bias;
  const float* col_bias;
  const int* row_exclude;  // the column that a row leaves out, -1 for none
  const int* col_exclude;  // the row that a column leaves out: in self-similarity a pair has two sides
  const int* row_ids;      // not negative
  const int* col_ids;
};

// What distances need beside the vectors.
struct Span {
  const float* inverse;  // [P (P + 1) / 2, M], the lower triangles of L^-1
  const float* square;   // [N], |x_i|^2
};

// What pairs are products of.
struct Form {
  const void* x;  // [N, D]
  const void* y;  // [M, D]
  int features;
};

// A second form of every pair, its x and y null where it is the logit itself: the logit of a teacher, with scales and
// biases of its own, or the similarity of a guide. Pairs above the ceiling of their row or their column take no part.
struct Second {
  Form form;
  const float* row_scale;
  const float* col_scale;
  const float* row_bias;
  const float* col_bias;
  const float* row_ceiling;
  const float* col_ceiling;
  bool above;  // they alone take part
};

struct Problem {
  Dtype dtype;
  Reduction reduction;
  Function function;  // of sums
  const void* x;      // [N, D]
  const void* y;      // [M, D], for volumes [M, P, D]
  int n, m, features;
  int members;  // P of volumes, 1 to 4; 0 of pairs
  Vectors vectors;
  Span span;
  Second second;
  bool mirrored;  // self-similarity, y is x: forward visits the tiles on and above the diagonal
  bool equal;     // pairs of equal ids take part, rather than those of unequal ones
  bool tf32;      // float32 products in TF32; else in three of them, as accurate as in float32 where values are finite
};

// Gradients of what the op returned, and the maxima that go with those of the log-sum-exps.
//   dL/dlse_i e^(s - lse_i) = row_weight_i e^(s - row_max_i), row_weight_i = dL/dlse_i e^-log_sum_i
//   dL/dmean_i t_ij = row_share_i e^(z - teacher_row_max_i)
struct Incoming {
  const float* row_weight;  // of sums dL/dsum_i, without a maximum
  const float* col_weight;
  const float* row_max;  // inf for an empty set: e^(s - max) = 0
  const float* col_max;
  const float* row_excluded;
  const float* col_excluded;
  const float* row_total;
  const float* col_total;
  const float* row_share;
  const float* col_share;
  const float* teacher_row_max;  // null where the teacher's are those of the logits
  const float* teacher_col_max;
  const float* row_mean;
  const float* col_mean;
};

// Partial statistics of one direction, [parts, size].
struct Part {
  float* maximum;
  float* sum;    // of e^(s - maximum)
  float* total;  // of volumes: of s
  float* teacher_maximum;
  float* teacher_sum;  // of e^(z - teacher_maximum)
  float* moment;       // of e^(z - teacher_maximum) s; where z is s of e^(s - maximum) s
  double* values;      // of sums, which have nothing else: of f(s)
};

// Partial sums of the gradients of one direction, [parts, size].
struct Sums {
  float* scale;
  float* bias;
  float* along;  // of volumes: what x_i itself has of its gradient
  float* teacher_scale;
  float* teacher_bias;
};

// A block of the plane, of whole tiles or as far as the plane goes, and the coefficients' rows in the workspace:
// `stride` elements, a multiple of 16.
struct Block {
  int first_row, first_col, rows, cols, stride;
};

// Rows and columns of a tile of `forward` and `block`.
struct Tiling {
  int rows, cols;
};
Tiling tiling(Reduction reduction, int members);
// Rows and columns of a tile of `rows`; {0, 0} where it takes no such problem.
Tiling rows_tiling(Dtype dtype, int features);

// Partials of the statistics, of rows [strips, N] and of columns [groups, M]; either may be missing. Groups of rows and
// strips of columns are whole tiles.
const char* forward(
    const Problem& problem,
    const Part& row,
    const Part& col,
    int rows_per_group,
    int cols_per_strip,
    cudaStream_t stream);

// The logit of every row with the column that it leaves out; -inf where it leaves out none.
const char* excluded(const Problem& problem, float* logits, cudaStream_t stream);

// Joins the partials [parts, size], and those of the mirror [mirrors, size], in their order: maxima, sums, and moments
// where there is a mean.
const char* merge(
    const Part& part,
    int parts,
    const Part& mirror,
    int mirrors,
    float* maximum,
    float* log_sum,
    float* mean,
    int size,
    cudaStream_t stream);

// Coefficients g a b / unit, at most 2^14 in float16, of a block in the dtype of the features, [planes, rows, stride],
// and the partial sums of its tiles. Of volumes P planes; of pairs one, and a second one of a teacher with gradients.
const char* block(
    const Problem& problem,
    const Incoming& incoming,
    const float* unit,  // [planes], or of volumes one
    void* coefficients,
    int planes,
    const Sums& row,
    const Sums& col,
    const Block& block,
    cudaStream_t stream);

// Gradients of all rows, of 16-bit features, by strips of columns: [strips, N, D], float32 or in the dtype of x.
const char* rows(
    const Problem& problem,
    const Incoming& incoming,
    const float* unit,
    void* gradient,
    bool gradient_is_float,
    const Sums& sums,
    int cols_per_strip,
    cudaStream_t stream);

// Where forward computes the gradients, too: of rows alone, d lse_i / dx_i and d lse_i / d row_scale_i of every strip.
struct Slopes {
  float* x;      // [strips, N, D]
  float* scale;  // [strips, N]
};

// Of rows, the partials of the statistics [strips, N] and the slopes; for what `rows` takes.
const char* attention(
    const Problem& problem,
    const float* unit,
    const Part& row,
    const Slopes& slopes,
    int cols_per_strip,
    cudaStream_t stream);

// For each of `count` sets of `members` <= 5 vectors [count, members, D]: L^-1 [count, members, members] and the volume
// [count], L L^T being the Gram matrix, as contrastive_ops/backends/tuples.py defines them.
const char* factor(
    const void* vectors,
    Dtype dtype,
    int64_t count,
    int members,
    int features,
    double* inverse,
    double* volume,
    cudaStream_t stream);

}  // namespace contrastive_ops::cuda
