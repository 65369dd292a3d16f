// What the ops of the engine have in common, as tensors: forms, masks, and gradients.
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

// Two sides and the logits of their pairs: s_ij = row_scale_i col_scale_j <x_i, y_j> + row_bias_i + col_bias_j.
struct Form {
  at::Tensor x;                 // [N, D]
  std::optional<at::Tensor> y;  // [M, D], or [M, P, D] with `span`; none is self-similarity
  std::optional<Span> span;
  std::optional<at::Tensor> row_scale;  // [N]
  std::optional<at::Tensor> col_scale;  // [M]
  std::optional<at::Tensor> row_bias;   // [N]
  std::optional<at::Tensor> col_bias;   // [M]
};

struct Problem {
  Form pairs;
  // a second form in the tile, in self-similarity where the first is, of vectors of any length: with one of these names
  std::optional<Form> guide;              // of masks, without scales and biases
  std::optional<Form> teacher;            // of expectations
  std::optional<at::Tensor> exclude;      // [N] int64
  std::optional<at::Tensor> row_ids;      // [N] int64
  std::optional<at::Tensor> col_ids;      // [M] int64
  std::optional<at::Tensor> ceiling;      // [N] of the guide, or else of the logits; in self-similarity of both sides
  std::optional<at::Tensor> col_ceiling;  // [M]
  bool restrict_to_ids = false;
  bool above = false;   // only pairs above a ceiling take part, not those below
  bool mutual = false;  // pairs with exclude[j] == i are out, too, as always in self-similarity: x and y are the same
  bool rows = true;
  bool cols = true;
};

struct Needs {
  bool x = false;
  bool y = false;
  bool row_scale = false;
  bool col_scale = false;
  bool row_bias = false;
  bool col_bias = false;

  bool any() const {
    return x || y || row_scale || col_scale || row_bias || col_bias;
  }
};

// Of a form. A gradient that is not needed is empty. With `span`, y is the moments [M, P, D] that the caller makes the
// gradient of the tuples of: with q the gradient of the pair over its distance, sum_i q_ij y_ijt x_i for the
// coordinates y.
struct Gradients {
  at::Tensor x;
  at::Tensor y;
  at::Tensor row_scale;
  at::Tensor col_scale;
  at::Tensor row_bias;
  at::Tensor col_bias;
};

}  // namespace contrastive_ops
