// The streaming reductions of the CPU engine as functions of tensors. Arguments are checked in Python, see ops/, and in
// extension.cpp.
//
// A direction that was not asked for is empty, and so are the excluded logits without `exclude`. With `keep`, a bounded
// part of the dots is kept for a backward.
#pragma once

#include "problem.h"
#include "tile.h"

#include <optional>

namespace contrastive_ops {

// Log-sum-exps as a maximum and the log of the sum relative to it; -inf, both, for an empty set.
struct SoftmaxStatistics {
  at::Tensor row_max;      // [N]
  at::Tensor col_max;      // [M]
  at::Tensor row_log_sum;  // [N]
  at::Tensor col_log_sum;  // [M]
  at::Tensor row_lse;      // [N] the maximum and the log, added: for losses, where backward takes them apart
  at::Tensor col_lse;      // [M]
};

struct LogSumExps {
  SoftmaxStatistics softmax;
  at::Tensor kept;
  at::Tensor excluded;   // [N] logits of the pairs (i, exclude[i]); -inf for an index outside [0, M)
  at::Tensor row_total;  // [N] with `totals`, sums of the logits that take part
  at::Tensor col_total;  // [M]
};

struct LogSumExpGradients {
  at::Tensor row_lse;
  at::Tensor col_lse;
  at::Tensor excluded;
  at::Tensor row_total;
  at::Tensor col_total;
};

LogSumExps similarity_logsumexp(const Problem& problem, bool totals, bool keep);
Gradients similarity_logsumexp_backward(
    const Problem& problem,
    const SoftmaxStatistics& statistics,
    const at::Tensor& kept,
    const LogSumExpGradients& incoming,
    bool totals,
    Needs needs);

struct Sums {
  at::Tensor kept;
  at::Tensor excluded;
  at::Tensor row_sum;  // [N]
  at::Tensor col_sum;  // [M]
};

struct SumGradients {
  at::Tensor row_sum;
  at::Tensor col_sum;
  at::Tensor excluded;
};

Sums similarity_sum(const Problem& problem, Function function, bool keep);
Gradients similarity_sum_backward(
    const Problem& problem, Function function, const at::Tensor& kept, const SumGradients& incoming, Needs needs);

// The statistics of the teacher are empty without one: then its softmax is that of the logits.
struct Expectations {
  SoftmaxStatistics softmax;
  SoftmaxStatistics teacher;
  at::Tensor kept;
  at::Tensor row_mean;  // [N]
  at::Tensor col_mean;  // [M]
};

struct ExpectationGradients {
  at::Tensor row_mean;
  at::Tensor col_mean;
  at::Tensor row_lse;
  at::Tensor col_lse;
};

struct FormsGradients {
  Gradients pairs;
  Gradients teacher;
};

Expectations similarity_expectation(const Problem& problem, bool keep);
FormsGradients similarity_expectation_backward(
    const Problem& problem,
    const Expectations& statistics,
    const ExpectationGradients& incoming,
    Needs needs,
    Needs teacher_needs);

struct Best {
  at::Tensor values;   // [N, k] -inf where fewer take part, with `largest`, +inf without
  at::Tensor indices;  // [N, k] int64, then -1
};

// The k pairs of each row with the largest or smallest logits, in order, and equal ones by column. With noise, of that
// seed, they are chosen by logits plus noise.
Best similarity_topk(const Problem& problem, int64_t k, bool largest, std::optional<int64_t> noise);

// FLOP/s of the tile products of x and y alone, measured over `seconds`.
double tile_product_rate(const at::Tensor& x, const at::Tensor& y, double seconds);

}  // namespace contrastive_ops
