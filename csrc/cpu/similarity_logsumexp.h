// The CPU engine as functions of tensors. Arguments are checked in Python; see ops/similarity_logsumexp.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace contrastive_ops {

// Pairs are dot products of rows of x and y, or, with `span`, minus the distances of rows of x from the spans of tuples
// of vectors in y.
struct Span {
  at::Tensor basis;       // [P (P + 1) / 2, M], see SpanTile
  at::Tensor row_square;  // [N]
};

struct SimilarityOptions {
  at::Tensor x;                 // [N, D]
  std::optional<at::Tensor> y;  // [M, D], or [M, P, D] with `span`; none is self-similarity
  std::optional<Span> span;
  std::optional<at::Tensor> row_scale;  // [N]
  std::optional<at::Tensor> col_scale;  // [M]
  std::optional<at::Tensor> row_bias;   // [N]
  std::optional<at::Tensor> col_bias;   // [M]
  std::optional<at::Tensor> exclude;    // [N] int64
  std::optional<at::Tensor> row_ids;    // [N] int64
  std::optional<at::Tensor> col_ids;    // [M] int64
  bool restrict_to_ids = false;
  bool rows = true;
  bool cols = true;
  bool totals = false;
};

// Log-sum-exps as a maximum and the log of the sum relative to it; -inf, both, for an empty set. A direction that was
// not asked for is empty, and so are the excluded logits without `exclude` and the totals without `totals`.
struct SimilarityStatistics {
  at::Tensor row_max;      // [N]
  at::Tensor col_max;      // [M]
  at::Tensor row_log_sum;  // [N]
  at::Tensor col_log_sum;  // [M]
  at::Tensor excluded;     // [N] logits of the pairs (i, exclude[i]); -inf for an index outside [0, M)
  at::Tensor row_total;    // [N] sums of the logits that take part
  at::Tensor col_total;    // [M]
  at::Tensor dots;         // what forward keeps for backward
  at::Tensor row_lse;      // [N] the maximum and the log, added: for losses, where backward takes them apart
  at::Tensor col_lse;      // [M]
};

// dL/d of what forward gave, in its shapes.
struct IncomingGradients {
  at::Tensor row_lse;
  at::Tensor col_lse;
  at::Tensor excluded;
  at::Tensor row_total;
  at::Tensor col_total;
};

struct Needs {
  bool x;
  bool y;
  bool row_scale;
  bool col_scale;
  bool row_bias;
  bool col_bias;
};

// A gradient that is not needed is empty. With `span`, y is the moments [M, P, D] that the caller makes the gradient of
// the tuples of: with q the gradient of the pair over its distance, sum_i q_ij y_ijt x_i for the coordinates y.
struct SimilarityGradients {
  at::Tensor x;
  at::Tensor y;
  at::Tensor row_scale;
  at::Tensor col_scale;
  at::Tensor row_bias;
  at::Tensor col_bias;
};

// With `keep`, a bounded part of the dots is kept for a backward.
SimilarityStatistics similarity_logsumexp(const SimilarityOptions& options, bool keep);

SimilarityGradients similarity_logsumexp_backward(
    const SimilarityOptions& options,
    const SimilarityStatistics& statistics,
    const IncomingGradients& incoming,
    Needs needs);

// FLOP/s of the tile products of x and y alone, measured over `seconds`.
double tile_product_rate(const at::Tensor& x, const at::Tensor& y, double seconds);

}  // namespace contrastive_ops
