// The Python module contrastive_ops._C: registers the operators of the CPU engine, and describes the build.

#include "cpu/rowwise.h"
#include "cpu/similarity_logsumexp.h"
#include "cpu/tile.h"

#include <ATen/Version.h>
#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

namespace contrastive_ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_vector(const char* name, const OptionalTensor& vector, int64_t size, bool integers) {
  if (!vector.has_value()) {
    return;
  }
  TORCH_CHECK_VALUE(
      vector->dim() == 1 && vector->size(0) == size, name, " must have shape (", size, ",), got ", vector->sizes());
  TORCH_CHECK_TYPE(
      integers ? vector->scalar_type() == at::kLong : vector->is_floating_point(),
      name,
      " must be ",
      integers ? "int64" : "floating-point",
      ", got ",
      vector->scalar_type());
}

// The second line behind the checks in Python: whatever calls the operators, no pointer leaves its tensor.
SimilarityOptions options_of(
    const Tensor& x,
    const OptionalTensor& y,
    const OptionalTensor& row_scale,
    const OptionalTensor& col_scale,
    const OptionalTensor& row_bias,
    const OptionalTensor& col_bias,
    const OptionalTensor& exclude,
    const OptionalTensor& row_ids,
    const OptionalTensor& col_ids,
    bool restrict_to_ids,
    bool rows,
    bool cols) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) > 0, "x must have shape (N, D) with D >= 1, got ", x.sizes());
  TORCH_CHECK_VALUE(
      !y.has_value() || (y->dim() == 2 && y->size(1) == x.size(1) && y->scalar_type() == x.scalar_type()),
      "y must have shape (M, ",
      x.size(1),
      ") and the dtype of x");
  TORCH_CHECK_VALUE(y.has_value() || (rows && !cols), "self-similarity has rows only");
  TORCH_CHECK_VALUE(
      !y.has_value() || row_ids.has_value() == col_ids.has_value(), "row_ids and col_ids must be given together");
  TORCH_CHECK_VALUE(!restrict_to_ids || row_ids.has_value(), "restrict needs row_ids");
  const int64_t n = x.size(0);
  const int64_t m = y.has_value() ? y->size(0) : n;
  check_vector("row_scale", row_scale, n, false);
  check_vector("col_scale", col_scale, m, false);
  check_vector("row_bias", row_bias, n, false);
  check_vector("col_bias", col_bias, m, false);
  check_vector("exclude", exclude, n, true);
  check_vector("row_ids", row_ids, n, true);
  check_vector("col_ids", col_ids, m, true);
  SimilarityOptions options;
  options.x = x;
  options.y = y;
  options.row_scale = row_scale;
  options.col_scale = col_scale;
  options.row_bias = row_bias;
  options.col_bias = col_bias;
  options.exclude = exclude;
  options.row_ids = row_ids;
  options.col_ids = col_ids;
  options.restrict_to_ids = restrict_to_ids;
  options.rows = rows;
  options.cols = cols;
  return options;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x,
    const OptionalTensor& y,
    const OptionalTensor& row_scale,
    const OptionalTensor& col_scale,
    const OptionalTensor& row_bias,
    const OptionalTensor& col_bias,
    const OptionalTensor& exclude,
    const OptionalTensor& row_ids,
    const OptionalTensor& col_ids,
    bool restrict_to_ids,
    bool rows,
    bool cols,
    bool keep) {
  const SimilarityStatistics result = similarity_logsumexp(
      options_of(
          x, y, row_scale, col_scale, row_bias, col_bias, exclude, row_ids, col_ids, restrict_to_ids, rows, cols),
      keep);
  return {
      result.row_max,
      result.col_max,
      result.row_log_sum,
      result.col_log_sum,
      result.dots,
      result.excluded,
      result.row_lse,
      result.col_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_row_lse,
    const Tensor& grad_col_lse,
    const Tensor& grad_excluded,
    const Tensor& row_max,
    const Tensor& col_max,
    const Tensor& row_log_sum,
    const Tensor& col_log_sum,
    const Tensor& dots,
    const Tensor& x,
    const OptionalTensor& y,
    const OptionalTensor& row_scale,
    const OptionalTensor& col_scale,
    const OptionalTensor& row_bias,
    const OptionalTensor& col_bias,
    const OptionalTensor& exclude,
    const OptionalTensor& row_ids,
    const OptionalTensor& col_ids,
    bool restrict_to_ids,
    bool rows,
    bool cols,
    std::array<bool, 6> needs) {
  const int64_t n = rows ? x.size(0) : 0;
  const int64_t m = cols ? (y.has_value() ? *y : x).size(0) : 0;
  check_vector("grad_row_lse", grad_row_lse, n, false);
  check_vector("grad_col_lse", grad_col_lse, m, false);
  check_vector("grad_excluded", grad_excluded, exclude.has_value() ? x.size(0) : 0, false);
  check_vector("row_max", row_max, n, false);
  check_vector("col_max", col_max, m, false);
  check_vector("row_log_sum", row_log_sum, n, false);
  check_vector("col_log_sum", col_log_sum, m, false);
  const SimilarityGradients grad = similarity_logsumexp_backward(
      options_of(
          x, y, row_scale, col_scale, row_bias, col_bias, exclude, row_ids, col_ids, restrict_to_ids, rows, cols),
      {row_max, col_max, row_log_sum, col_log_sum, {}, {}, {}, dots, {}, {}},
      {grad_row_lse, grad_col_lse, grad_excluded, {}, {}},
      {needs[0], needs[1], needs[2], needs[3], needs[4], needs[5]});
  return {grad.x, grad.y, grad.row_scale, grad.col_scale, grad.row_bias, grad.col_bias};
}

SimilarityOptions volume_options_of(
    const Tensor& anchor,
    const Tensor& tuples,
    const Tensor& basis,
    const Tensor& anchor_square,
    const OptionalTensor& row_scale,
    const OptionalTensor& col_scale,
    const OptionalTensor& exclude,
    bool rows,
    bool cols,
    bool totals) {
  TORCH_CHECK_VALUE(
      anchor.dim() == 2 && anchor.size(1) > 0, "anchor must have shape (N, D) with D >= 1, got ", anchor.sizes());
  TORCH_CHECK_VALUE(
      tuples.dim() == 3 && tuples.size(2) == anchor.size(1) && tuples.scalar_type() == anchor.scalar_type(),
      "tuples must have shape (M, P, ",
      anchor.size(1),
      ") and the dtype of anchor");
  const int64_t members = tuples.size(1);
  TORCH_CHECK_VALUE(1 <= members && members <= kMembers, "tuples must have 1 to 4 vectors, got ", members);
  TORCH_CHECK_VALUE(
      basis.dim() == 2 && basis.size(0) == members * (members + 1) / 2 && basis.size(1) == tuples.size(0),
      "basis must have shape (P (P + 1) / 2, M), got ",
      basis.sizes());
  TORCH_CHECK_VALUE(rows || cols, "rows or cols must be true");
  check_vector("anchor_square", anchor_square, anchor.size(0), false);
  check_vector("row_scale", row_scale, anchor.size(0), false);
  check_vector("col_scale", col_scale, tuples.size(0), false);
  check_vector("exclude", exclude, anchor.size(0), true);
  SimilarityOptions options;
  options.x = anchor;
  options.y = tuples;
  options.span = Span{basis, anchor_square};
  options.row_scale = row_scale;
  options.col_scale = col_scale;
  options.exclude = exclude;
  options.rows = rows;
  options.cols = cols;
  options.totals = totals;
  return options;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> volume_forward(
    const Tensor& anchor,
    const Tensor& tuples,
    const Tensor& basis,
    const Tensor& anchor_square,
    const OptionalTensor& row_scale,
    const OptionalTensor& col_scale,
    const OptionalTensor& exclude,
    bool rows,
    bool cols,
    bool totals,
    bool keep) {
  const SimilarityStatistics result = similarity_logsumexp(
      volume_options_of(anchor, tuples, basis, anchor_square, row_scale, col_scale, exclude, rows, cols, totals), keep);
  return {
      result.row_max,
      result.col_max,
      result.row_log_sum,
      result.col_log_sum,
      result.dots,
      result.row_total,
      result.col_total,
      result.row_lse,
      result.col_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> volume_backward(
    const Tensor& grad_row_lse,
    const Tensor& grad_col_lse,
    const Tensor& grad_row_total,
    const Tensor& grad_col_total,
    const Tensor& row_max,
    const Tensor& col_max,
    const Tensor& row_log_sum,
    const Tensor& col_log_sum,
    const Tensor& dots,
    const Tensor& anchor,
    const Tensor& tuples,
    const Tensor& basis,
    const Tensor& anchor_square,
    const OptionalTensor& row_scale,
    const OptionalTensor& col_scale,
    const OptionalTensor& exclude,
    bool rows,
    bool cols,
    bool totals,
    std::array<bool, 4> needs) {
  const SimilarityOptions options =
      volume_options_of(anchor, tuples, basis, anchor_square, row_scale, col_scale, exclude, rows, cols, totals);
  const int64_t n = rows ? anchor.size(0) : 0;
  const int64_t m = cols ? tuples.size(0) : 0;
  check_vector("grad_row_lse", grad_row_lse, n, false);
  check_vector("grad_col_lse", grad_col_lse, m, false);
  check_vector("grad_row_total", grad_row_total, totals ? n : 0, false);
  check_vector("grad_col_total", grad_col_total, totals ? m : 0, false);
  check_vector("row_max", row_max, n, false);
  check_vector("col_max", col_max, m, false);
  check_vector("row_log_sum", row_log_sum, n, false);
  check_vector("col_log_sum", col_log_sum, m, false);
  const Tensor grad_excluded = at::zeros({exclude.has_value() ? anchor.size(0) : 0}, row_max.options());
  const SimilarityGradients grad = similarity_logsumexp_backward(
      options,
      {row_max, col_max, row_log_sum, col_log_sum, {}, {}, {}, dots, {}, {}},
      {grad_row_lse, grad_col_lse, grad_excluded, grad_row_total, grad_col_total},
      {needs[0], needs[1], needs[2], needs[3], false, false});
  return {grad.x, grad.y, grad.row_scale, grad.col_scale};
}

void check_vectors(const char* name, const Tensor& vectors, const Tensor& like) {
  TORCH_CHECK_VALUE(
      vectors.dim() == 3 && vectors.size(0) == like.size(0) && vectors.size(2) == like.size(2) &&
          vectors.scalar_type() == like.scalar_type(),
      name,
      " must have shape (",
      like.size(0),
      ", K, ",
      like.size(2),
      ") and one dtype, got ",
      vectors.sizes());
  TORCH_CHECK_TYPE(vectors.is_floating_point(), name, " must be floating-point, got ", vectors.scalar_type());
}

Tensor products(const Tensor& a, const Tensor& b) {
  TORCH_CHECK_VALUE(a.dim() == 3, "a must have shape (N, S, D), got ", a.sizes());
  check_vectors("a", a, a);
  check_vectors("b", b, a);
  return row_products(a, b);
}

void combination(const Tensor& weights, at::TensorList vectors, const Tensor& result) {
  TORCH_CHECK_VALUE(!vectors.empty() && result.dim() == 3, "vectors and result must have shape (N, T, D)");
  int64_t count = 0;
  for (const Tensor& tensor : vectors) {
    TORCH_CHECK_VALUE(
        tensor.dim() == 3 && tensor.size(0) == result.size(0) && tensor.size(2) == result.size(2),
        "vectors must have shape (",
        result.size(0),
        ", T, ",
        result.size(2),
        "), got ",
        tensor.sizes());
    check_vectors("vectors", tensor, vectors.front());
    count += tensor.size(1);
  }
  TORCH_CHECK_VALUE(
      weights.scalar_type() == at::kDouble &&
          weights.sizes() == at::IntArrayRef({result.size(0), result.size(1), count}),
      "weights must be float64 of shape (",
      result.size(0),
      ", ",
      result.size(1),
      ", ",
      count,
      "), got ",
      weights.sizes());
  combine_rows(weights, vectors, result);
}

void check_rows(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have shape (N, D), got ", x.sizes());
  TORCH_CHECK_TYPE(x.is_floating_point(), "x must be floating-point, got ", x.scalar_type());
}

void check_factor(const OptionalTensor& factor) {
  TORCH_CHECK_VALUE(!factor.has_value() || factor->numel() == 1, "factor must have one element");
}

std::tuple<Tensor, Tensor> scale_rows(const Tensor& x, const OptionalTensor& factor, double multiplier, double power) {
  check_rows(x);
  check_factor(factor);
  return scale(x, factor, multiplier, power);
}

std::tuple<Tensor, Tensor> scale_rows_backward(
    const Tensor& x,
    const Tensor& inverse,
    const OptionalTensor& grad,
    const Tensor& grad_scale,
    const OptionalTensor& factor,
    double multiplier,
    double power,
    std::array<bool, 2> needs) {
  check_rows(x);
  check_factor(factor);
  check_vector("inverse", inverse, x.size(0), false);
  check_vector("grad_scale", grad_scale, x.size(0), false);
  TORCH_CHECK_TYPE(
      inverse.scalar_type() == at::kDouble && inverse.is_contiguous(), "inverse must be what `scale` gave");
  TORCH_CHECK_VALUE(!grad.has_value() || grad->sizes() == x.sizes(), "grad must have the shape of x");
  return scale_backward(x, inverse, grad, grad_scale, factor, multiplier, power, needs[0], needs[1]);
}

void check_directions(const Tensor& positive, at::TensorList lse, at::TensorList totals) {
  TORCH_CHECK_VALUE(positive.dim() == 1, "positive must have shape (N,), got ", positive.sizes());
  for (const at::TensorList vectors : {lse, totals}) {
    for (const Tensor& vector : vectors) {
      check_vector("lse and totals", vector, positive.size(0), false);
    }
  }
}

Tensor contrast_of(
    const Tensor& positive, at::TensorList lse, at::TensorList totals, double factor, double slope, double share) {
  check_directions(positive, lse, totals);
  return contrast(positive, lse, totals, factor, slope, share);
}

std::tuple<Tensor, Tensor, Tensor> contrast_of_backward(
    const Tensor& grad,
    const Tensor& positive,
    at::TensorList lse,
    bool totals,
    double factor,
    double slope,
    double share) {
  check_directions(positive, lse, {});
  TORCH_CHECK_VALUE(grad.numel() == 1, "grad must have one element, got ", grad.sizes());
  return contrast_backward(grad, positive, lse, totals, factor, slope, share);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names{DEFAULT::float_kernels.instruction_set};
#ifdef CONTRASTIVE_OPS_X86
  names.emplace_back(AVX2::float_kernels.instruction_set);
  names.emplace_back(AVX512::float_kernels.instruction_set);
#endif
  return names;
}

TORCH_LIBRARY(contrastive_ops_cpu, library) {
  const std::string options =
      "Tensor x, Tensor? y, Tensor? row_scale, Tensor? col_scale, Tensor? row_bias, Tensor? col_bias, "
      "Tensor? exclude, Tensor? row_ids, Tensor? col_ids, bool restrict, bool rows, bool cols";
  const std::string forward_schema = "similarity_logsumexp(" + options +
                                     ", bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
  const std::string backward_schema =
      "similarity_logsumexp_backward(Tensor grad_row_lse, Tensor grad_col_lse, Tensor grad_excluded, Tensor row_max, "
      "Tensor col_max, "
      "Tensor row_log_sum, Tensor col_log_sum, Tensor dots, " +
      options + ", bool[6] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
  library.def(forward_schema.c_str());
  library.def(backward_schema.c_str());
  const std::string volume_options =
      "Tensor anchor, Tensor tuples, Tensor basis, Tensor anchor_square, Tensor? row_scale, Tensor? col_scale, "
      "Tensor? exclude, bool rows, bool cols, bool totals";
  const std::string volume_forward_schema =
      "volume_logsumexp(" + volume_options +
      ", bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
  const std::string volume_backward_schema =
      "volume_logsumexp_backward(Tensor grad_row_lse, Tensor grad_col_lse, Tensor grad_row_total, "
      "Tensor grad_col_total, Tensor row_max, Tensor col_max, Tensor row_log_sum, Tensor col_log_sum, Tensor dots, " +
      volume_options + ", bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)";
  library.def(volume_forward_schema.c_str());
  library.def(volume_backward_schema.c_str());
  library.def("row_products(Tensor a, Tensor b) -> Tensor");
  library.def("combine_rows(Tensor weights, Tensor[] vectors, Tensor(a!) result) -> ()");
  library.def("scale(Tensor x, Tensor? factor, float multiplier, float power) -> (Tensor scale, Tensor inverse)");
  library.def(
      "scale_backward(Tensor x, Tensor inverse, Tensor? grad, Tensor grad_scale, Tensor? factor, float multiplier, "
      "float power, bool[2] needs) -> (Tensor x, Tensor factor)");
  library.def(
      "contrast(Tensor positive, Tensor[] lse, Tensor[] totals, float factor, float slope, float share) -> Tensor");
  library.def(
      "contrast_backward(Tensor grad, Tensor positive, Tensor[] lse, bool totals, float factor, float slope, "
      "float share) -> (Tensor positive, Tensor lse, Tensor total)");
}

TORCH_LIBRARY_IMPL(contrastive_ops_cpu, CPU, library) {
  library.impl("similarity_logsumexp", forward);
  library.impl("similarity_logsumexp_backward", backward);
  library.impl("volume_logsumexp", volume_forward);
  library.impl("volume_logsumexp_backward", volume_backward);
  library.impl("row_products", products);
  library.impl("combine_rows", combination);
  library.impl("scale", scale_rows);
  library.impl("scale_backward", scale_rows_backward);
  library.impl("contrast", contrast_of);
  library.impl("contrast_backward", contrast_of_backward);
}

}  // namespace
}  // namespace contrastive_ops

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  using namespace contrastive_ops;
  module.doc() = "The C++ engine of contrastive_ops: what was built, and what of it this processor runs.";
  module.attr("torch_version") = TORCH_VERSION;
#ifdef __clang__
  module.attr("compiler") = "clang " __clang_version__;
#else
  module.attr("compiler") = "g++ " __VERSION__;
#endif
  module.attr("instruction_sets") = instruction_sets();
  module.def("instruction_set", [] { return tile_kernels<float>().instruction_set; });
  module.def("bfloat16_unit", [] {
    constexpr std::array names{"none", "vectors", "matrix"};
    return names[static_cast<int>(bfloat16_unit())];
  });
  module.def(
      "tile_product_rate",
      &tile_product_rate,
      py::arg("x"),
      py::arg("y"),
      py::arg("seconds"),
      py::call_guard<py::gil_scoped_release>(),
      "FLOP/s of the tile products of x [N, D] and y [M, D] alone, on all threads, measured over `seconds`.");
}
