// The CPU engine as functions of tensors. Arguments are checked in Python; see ops/similarity_logsumexp.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace contrastive_ops {

struct SimilarityOptions {
  at::Tensor x;                         // [N, D]
  std::optional<at::Tensor> y;          // [M, D]; none is self-similarity
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
};

// Log-sum-exps as a maximum and the log of the sum relative to it; -inf, both, for an empty set. A direction that was
// not asked for is empty, and so are the excluded logits without `exclude`.
struct SimilarityStatistics {
  at::Tensor row_max;      // [N]
  at::Tensor col_max;      // [M]
  at::Tensor row_log_sum;  // [N]
  at::Tensor col_log_sum;  // [M]
  at::Tensor excluded;     // [N] logits of the pairs (i, exclude[i]); -inf for an index outside [0, M)
  at::Tensor dots;         // what forward keeps for backward
};

// dL/d of what forward gave, in its shapes.
struct IncomingGradients {
  at::Tensor row_lse;
  at::Tensor col_lse;
  at::Tensor excluded;
};

struct Needs {
  bool x;
  bool y;
  bool row_scale;
  bool col_scale;
  bool row_bias;
  bool col_bias;
};

// A gradient that is not needed is empty.
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
