// The Python module contrastive_ops._C: registers the operators of the CPU engine, and describes the build.

#include "cpu/ops.h"
#include "cpu/rowwise.h"
#include "cpu/tile.h"

#include <ATen/Version.h>
#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
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

// The arguments of a call, taken one by one in the order of its schema.
class Arguments {
 public:
  Arguments(const torch::jit::Stack& stack, size_t count) : next_(stack.end() - static_cast<int64_t>(count)) {}

  Tensor tensor() {
    return (next_++)->toTensor();
  }
  OptionalTensor optional_tensor() {
    return (next_++)->toOptional<Tensor>();
  }
  std::optional<int64_t> optional_integer() {
    return (next_++)->toOptional<int64_t>();
  }
  bool flag() {
    return (next_++)->toBool();
  }
  int64_t integer() {
    return (next_++)->toInt();
  }
  std::string text() {
    return (next_++)->toStringRef();
  }
  std::vector<bool> flags() {
    const c10::List<bool> list = (next_++)->toBoolList();
    return {list.begin(), list.end()};
  }

 private:
  torch::jit::Stack::const_iterator next_;
};

using Results = std::vector<Tensor>;

// An operator of the dispatcher, from a function of its arguments.
template <Results (*function)(Arguments&)>
void boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  Arguments arguments(*stack, count);
  const Results results = function(arguments);
  torch::jit::drop(*stack, count);
  for (const Tensor& result : results) {
    stack->emplace_back(result);
  }
}

Needs needs_of(const std::vector<bool>& flags, size_t first) {
  const auto need = [&](size_t i) { return first + i < flags.size() && flags[first + i]; };
  return {need(0), need(1), need(2), need(3), need(4), need(5)};
}

// What follows is the second line behind the checks in Python: whatever calls the operators, no pointer leaves its
// tensor. Sizes that a direction does not ask for are 0.
struct Sizes {
  int64_t n;
  int64_t m;
  int64_t rows;
  int64_t cols;
  int64_t excluded;

  explicit Sizes(const Problem& problem)
      : n(problem.pairs.x.size(0)),
        m(problem.pairs.y.has_value() ? problem.pairs.y->size(0) : n),
        rows(problem.rows ? n : 0),
        cols(problem.cols ? m : 0),
        excluded(problem.exclude.has_value() ? n : 0) {}
};

void check_sides(const Tensor& x, const OptionalTensor& y) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) > 0, "x must have shape (N, D) with D >= 1, got ", x.sizes());
  TORCH_CHECK_VALUE(
      !y.has_value() || (y->dim() == 2 && y->size(1) == x.size(1) && y->scalar_type() == x.scalar_type()),
      "y must have shape (M, ",
      x.size(1),
      ") and the dtype of x");
}

void check_form(const Form& form, int64_t n, int64_t m) {
  check_vector("row_scale", form.row_scale, n, false);
  check_vector("col_scale", form.col_scale, m, false);
  check_vector("row_bias", form.row_bias, n, false);
  check_vector("col_bias", form.col_bias, m, false);
}

void check_second(const char* name, const Form& second, const Problem& problem) {
  const Sizes sizes(problem);
  check_sides(second.x, second.y);
  TORCH_CHECK_VALUE(
      second.x.size(0) == sizes.n && second.x.scalar_type() == problem.pairs.x.scalar_type() &&
          second.y.has_value() == problem.pairs.y.has_value() &&
          (!second.y.has_value() || second.y->size(0) == sizes.m),
      name,
      " must have the rows, the sides and the dtype of x and y");
  check_form(second, sizes.n, sizes.m);
}

Form form_of(Arguments& arguments) {
  Form form;
  form.x = arguments.tensor();
  form.y = arguments.optional_tensor();
  form.row_scale = arguments.optional_tensor();
  form.col_scale = arguments.optional_tensor();
  form.row_bias = arguments.optional_tensor();
  form.col_bias = arguments.optional_tensor();
  return form;
}

void read_exclude_and_ids(Arguments& arguments, Problem& problem) {
  problem.exclude = arguments.optional_tensor();
  problem.row_ids = arguments.optional_tensor();
  problem.col_ids = arguments.optional_tensor();
}

void check(const Problem& problem) {
  const Form& pairs = problem.pairs;
  check_sides(pairs.x, pairs.y);
  const Sizes sizes(problem);
  check_form(pairs, sizes.n, sizes.m);
  TORCH_CHECK_VALUE(pairs.y.has_value() || (problem.rows && !problem.cols), "self-similarity has rows only");
  TORCH_CHECK_VALUE(
      !pairs.y.has_value() || problem.row_ids.has_value() == problem.col_ids.has_value(),
      "row_ids and col_ids must be given together");
  TORCH_CHECK_VALUE(!problem.restrict_to_ids || problem.row_ids.has_value(), "restrict needs row_ids");
  check_vector("exclude", problem.exclude, sizes.n, true);
  check_vector("row_ids", problem.row_ids, sizes.n, true);
  check_vector("col_ids", problem.col_ids, sizes.m, true);
  check_vector("ceiling", problem.ceiling, sizes.n, false);
  check_vector("col_ceiling", problem.col_ceiling, sizes.m, false);
  if (problem.guide.has_value()) {
    check_second("guide", *problem.guide, problem);
  }
  if (problem.teacher.has_value()) {
    check_second("teacher", *problem.teacher, problem);
  }
}

// kGuided in the schemas below.
Problem guided_problem(Arguments& arguments) {
  Problem problem;
  problem.pairs = form_of(arguments);
  read_exclude_and_ids(arguments, problem);
  const OptionalTensor guide_x = arguments.optional_tensor();
  const OptionalTensor guide_y = arguments.optional_tensor();
  if (guide_x.has_value()) {
    problem.guide.emplace().x = *guide_x;
    problem.guide->y = guide_y;
  }
  problem.ceiling = arguments.optional_tensor();
  problem.col_ceiling = arguments.optional_tensor();
  problem.restrict_to_ids = arguments.flag();
  problem.above = arguments.flag();
  problem.rows = arguments.flag();
  problem.cols = arguments.flag();
  check(problem);
  return problem;
}

// kTaught in the schemas below.
Problem taught_problem(Arguments& arguments) {
  Problem problem;
  problem.pairs = form_of(arguments);
  const OptionalTensor u = arguments.optional_tensor();
  Form teacher;
  teacher.y = arguments.optional_tensor();
  teacher.row_scale = arguments.optional_tensor();
  teacher.col_scale = arguments.optional_tensor();
  teacher.row_bias = arguments.optional_tensor();
  teacher.col_bias = arguments.optional_tensor();
  if (u.has_value()) {
    teacher.x = *u;
    problem.teacher = teacher;
  }
  read_exclude_and_ids(arguments, problem);
  problem.restrict_to_ids = arguments.flag();
  problem.rows = arguments.flag();
  problem.cols = arguments.flag();
  check(problem);
  return problem;
}

// kVolume in the schemas below, but for `totals`.
Problem volume_problem(Arguments& arguments) {
  Problem problem;
  Form& pairs = problem.pairs;
  pairs.x = arguments.tensor();
  const Tensor tuples = arguments.tensor();
  const Tensor basis = arguments.tensor();
  const Tensor anchor_square = arguments.tensor();
  pairs.y = tuples;
  pairs.span = Span{basis, anchor_square};
  pairs.row_scale = arguments.optional_tensor();
  pairs.col_scale = arguments.optional_tensor();
  problem.exclude = arguments.optional_tensor();
  problem.rows = arguments.flag();
  problem.cols = arguments.flag();
  const Tensor& anchor = pairs.x;
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
  TORCH_CHECK_VALUE(problem.rows || problem.cols, "rows or cols must be true");
  check_vector("anchor_square", anchor_square, anchor.size(0), false);
  check_form(pairs, anchor.size(0), tuples.size(0));
  check_vector("exclude", problem.exclude, anchor.size(0), true);
  return problem;
}

// kMaxLogs in the schemas below.
SoftmaxStatistics softmax_of(Arguments& arguments) {
  SoftmaxStatistics statistics;
  statistics.row_max = arguments.tensor();
  statistics.col_max = arguments.tensor();
  statistics.row_log_sum = arguments.tensor();
  statistics.col_log_sum = arguments.tensor();
  return statistics;
}

void check_directions(const char* name, const Tensor& of_rows, const Tensor& of_cols, const Sizes& sizes) {
  check_vector(name, of_rows, sizes.rows, false);
  check_vector(name, of_cols, sizes.cols, false);
}

void check_softmax(const SoftmaxStatistics& statistics, const Sizes& sizes) {
  check_directions("row_max and col_max", statistics.row_max, statistics.col_max, sizes);
  check_directions("row_log_sum and col_log_sum", statistics.row_log_sum, statistics.col_log_sum, sizes);
}

Results logsumexp(Arguments& arguments) {
  const Problem problem = guided_problem(arguments);
  const LogSumExps result = similarity_logsumexp(problem, false, arguments.flag());
  const SoftmaxStatistics& softmax = result.softmax;
  return {
      softmax.row_max,
      softmax.col_max,
      softmax.row_log_sum,
      softmax.col_log_sum,
      result.kept,
      result.excluded,
      softmax.row_lse,
      softmax.col_lse};
}

Results of_form(const Gradients& grad) {
  return {grad.x, grad.y, grad.row_scale, grad.col_scale, grad.row_bias, grad.col_bias};
}

Results logsumexp_backward(Arguments& arguments) {
  LogSumExpGradients incoming;
  incoming.row_lse = arguments.tensor();
  incoming.col_lse = arguments.tensor();
  incoming.excluded = arguments.tensor();
  const SoftmaxStatistics softmax = softmax_of(arguments);
  const Tensor kept = arguments.tensor();
  const Problem problem = guided_problem(arguments);
  const Sizes sizes(problem);
  check_directions("grad_row_lse and grad_col_lse", incoming.row_lse, incoming.col_lse, sizes);
  check_vector("grad_excluded", incoming.excluded, sizes.excluded, false);
  check_softmax(softmax, sizes);
  const Needs needs = needs_of(arguments.flags(), 0);
  return of_form(similarity_logsumexp_backward(problem, softmax, kept, incoming, false, needs));
}

Results volume(Arguments& arguments) {
  const Problem problem = volume_problem(arguments);
  const bool totals = arguments.flag();
  const LogSumExps result = similarity_logsumexp(problem, totals, arguments.flag());
  const SoftmaxStatistics& softmax = result.softmax;
  return {
      softmax.row_max,
      softmax.col_max,
      softmax.row_log_sum,
      softmax.col_log_sum,
      result.kept,
      result.row_total,
      result.col_total,
      softmax.row_lse,
      softmax.col_lse};
}

Results volume_backward(Arguments& arguments) {
  LogSumExpGradients incoming;
  incoming.row_lse = arguments.tensor();
  incoming.col_lse = arguments.tensor();
  incoming.row_total = arguments.tensor();
  incoming.col_total = arguments.tensor();
  const SoftmaxStatistics softmax = softmax_of(arguments);
  const Tensor kept = arguments.tensor();
  const Problem problem = volume_problem(arguments);
  const bool totals = arguments.flag();
  const Sizes sizes(problem);
  check_directions("grad_row_lse and grad_col_lse", incoming.row_lse, incoming.col_lse, sizes);
  check_vector("grad_row_total", incoming.row_total, totals ? sizes.rows : 0, false);
  check_vector("grad_col_total", incoming.col_total, totals ? sizes.cols : 0, false);
  check_softmax(softmax, sizes);
  incoming.excluded = at::zeros({sizes.excluded}, softmax.row_max.options());
  const Needs needs = needs_of(arguments.flags(), 0);
  Results gradients = of_form(similarity_logsumexp_backward(problem, softmax, kept, incoming, totals, needs));
  gradients.resize(4);  // there are no biases
  return gradients;
}

Function function_of(const std::string& name) {
  constexpr std::array names{"identity", "softplus", "relu", "sigmoid", "square", "step"};
  const auto found = std::find(names.begin(), names.end(), name);
  TORCH_CHECK_VALUE(found != names.end(), "of must be the name of a function, got ", name);
  return static_cast<Function>(found - names.begin());
}

Results sum(Arguments& arguments) {
  const Problem problem = guided_problem(arguments);
  const Function function = function_of(arguments.text());
  const Sums result = similarity_sum(problem, function, arguments.flag());
  return {result.kept, result.excluded, result.row_sum, result.col_sum};
}

Results sum_backward(Arguments& arguments) {
  SumGradients incoming;
  incoming.row_sum = arguments.tensor();
  incoming.col_sum = arguments.tensor();
  incoming.excluded = arguments.tensor();
  const Tensor kept = arguments.tensor();
  const Problem problem = guided_problem(arguments);
  const Function function = function_of(arguments.text());
  const Sizes sizes(problem);
  check_directions("grad_row_sum and grad_col_sum", incoming.row_sum, incoming.col_sum, sizes);
  check_vector("grad_excluded", incoming.excluded, sizes.excluded, false);
  return of_form(similarity_sum_backward(problem, function, kept, incoming, needs_of(arguments.flags(), 0)));
}

Results expectation(Arguments& arguments) {
  const Problem problem = taught_problem(arguments);
  const Expectations result = similarity_expectation(problem, arguments.flag());
  const SoftmaxStatistics& softmax = result.softmax;
  const SoftmaxStatistics& teacher = result.teacher;
  return {
      softmax.row_max,
      softmax.col_max,
      softmax.row_log_sum,
      softmax.col_log_sum,
      teacher.row_max,
      teacher.col_max,
      teacher.row_log_sum,
      teacher.col_log_sum,
      result.kept,
      result.row_mean,
      result.col_mean,
      softmax.row_lse,
      softmax.col_lse};
}

Results expectation_backward(Arguments& arguments) {
  ExpectationGradients incoming;
  incoming.row_mean = arguments.tensor();
  incoming.col_mean = arguments.tensor();
  incoming.row_lse = arguments.tensor();
  incoming.col_lse = arguments.tensor();
  Expectations statistics;
  statistics.softmax = softmax_of(arguments);
  statistics.teacher = softmax_of(arguments);
  statistics.kept = arguments.tensor();
  statistics.row_mean = arguments.tensor();
  statistics.col_mean = arguments.tensor();
  const Problem problem = taught_problem(arguments);
  const Sizes sizes(problem);
  check_directions("grad_row_mean and grad_col_mean", incoming.row_mean, incoming.col_mean, sizes);
  check_directions("grad_row_lse and grad_col_lse", incoming.row_lse, incoming.col_lse, sizes);
  check_directions("row_mean and col_mean", statistics.row_mean, statistics.col_mean, sizes);
  check_softmax(statistics.softmax, sizes);
  if (problem.teacher.has_value()) {
    check_softmax(statistics.teacher, sizes);
  }
  const std::vector<bool> needs = arguments.flags();
  const FormsGradients grad =
      similarity_expectation_backward(problem, statistics, incoming, needs_of(needs, 0), needs_of(needs, 6));
  Results gradients = of_form(grad.pairs);
  const Results teacher = of_form(grad.teacher);
  gradients.insert(gradients.end(), teacher.begin(), teacher.end());
  return gradients;
}

Results topk(Arguments& arguments) {
  Problem problem;
  problem.pairs = form_of(arguments);
  read_exclude_and_ids(arguments, problem);
  problem.restrict_to_ids = arguments.flag();
  problem.cols = false;
  check(problem);
  const int64_t k = arguments.integer();
  TORCH_CHECK_VALUE(k >= 1, "k must be at least 1, got ", k);
  const bool largest = arguments.flag();
  const std::optional<int64_t> noise = arguments.optional_integer();
  TORCH_CHECK_VALUE(largest || !noise.has_value(), "noise needs largest");
  const Best result = similarity_topk(problem, k, largest, noise);
  return {result.values, result.indices};
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

// The parts of the schemas that several operators have; the functions above take them in this order.
const std::string kForm =
    "Tensor x, Tensor? y, Tensor? row_scale, Tensor? col_scale, Tensor? row_bias, Tensor? col_bias, ";
const std::string kIds = "Tensor? exclude, Tensor? row_ids, Tensor? col_ids, ";
const std::string kGuided = kForm + kIds +
                            "Tensor? guide_x, Tensor? guide_y, Tensor? ceiling, Tensor? col_ceiling, "
                            "bool restrict, bool above, bool rows, bool cols";
const std::string kTaught = kForm +
                            "Tensor? u, Tensor? v, Tensor? teacher_row_scale, Tensor? teacher_col_scale, "
                            "Tensor? teacher_row_bias, Tensor? teacher_col_bias, " +
                            kIds + "bool restrict, bool rows, bool cols";
const std::string kVolume =
    "Tensor anchor, Tensor tuples, Tensor basis, Tensor anchor_square, Tensor? row_scale, Tensor? col_scale, "
    "Tensor? exclude, bool rows, bool cols, bool totals";
const std::string kMaxLogs = "Tensor row_max, Tensor col_max, Tensor row_log_sum, Tensor col_log_sum, ";
const std::string kTeacherMaxLogs =
    "Tensor teacher_row_max, Tensor teacher_col_max, Tensor teacher_row_log_sum, Tensor teacher_col_log_sum, ";

// " -> (Tensor, ..)" of so many.
std::string tensors(int count) {
  std::string returns = " -> (Tensor";
  for (int i = 1; i < count; ++i) {
    returns += ", Tensor";
  }
  return returns + ")";
}

TORCH_LIBRARY(contrastive_ops_cpu, library) {
  const auto define = [&](const std::string& schema) { library.def(schema.c_str()); };
  define("similarity_logsumexp(" + kGuided + ", bool keep)" + tensors(8));
  define(
      "similarity_logsumexp_backward(Tensor grad_row_lse, Tensor grad_col_lse, Tensor grad_excluded, " + kMaxLogs +
      "Tensor kept, " + kGuided + ", bool[6] needs)" + tensors(6));
  define("volume_logsumexp(" + kVolume + ", bool keep)" + tensors(9));
  define(
      "volume_logsumexp_backward(Tensor grad_row_lse, Tensor grad_col_lse, Tensor grad_row_total, "
      "Tensor grad_col_total, " +
      kMaxLogs + "Tensor kept, " + kVolume + ", bool[4] needs)" + tensors(4));
  define("similarity_sum(" + kGuided + ", str of, bool keep)" + tensors(4));
  define(
      "similarity_sum_backward(Tensor grad_row_sum, Tensor grad_col_sum, Tensor grad_excluded, Tensor kept, " +
      kGuided + ", str of, bool[6] needs)" + tensors(6));
  define("similarity_expectation(" + kTaught + ", bool keep)" + tensors(13));
  define(
      "similarity_expectation_backward(Tensor grad_row_mean, Tensor grad_col_mean, Tensor grad_row_lse, "
      "Tensor grad_col_lse, " +
      kMaxLogs + kTeacherMaxLogs + "Tensor kept, Tensor row_mean, Tensor col_mean, " + kTaught + ", bool[12] needs)" +
      tensors(12));
  define("similarity_topk(" + kForm + kIds + "bool restrict, int k, bool largest, int? noise)" + tensors(2));
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
  const auto implement = [&](const char* name, torch::CppFunction&& function) {
    library.impl(name, std::move(function));
  };
  implement("similarity_logsumexp", torch::CppFunction::makeFromBoxedFunction<&boxed<logsumexp>>());
  implement("similarity_logsumexp_backward", torch::CppFunction::makeFromBoxedFunction<&boxed<logsumexp_backward>>());
  implement("volume_logsumexp", torch::CppFunction::makeFromBoxedFunction<&boxed<volume>>());
  implement("volume_logsumexp_backward", torch::CppFunction::makeFromBoxedFunction<&boxed<volume_backward>>());
  implement("similarity_sum", torch::CppFunction::makeFromBoxedFunction<&boxed<sum>>());
  implement("similarity_sum_backward", torch::CppFunction::makeFromBoxedFunction<&boxed<sum_backward>>());
  implement("similarity_expectation", torch::CppFunction::makeFromBoxedFunction<&boxed<expectation>>());
  implement(
      "similarity_expectation_backward", torch::CppFunction::makeFromBoxedFunction<&boxed<expectation_backward>>());
  implement("similarity_topk", torch::CppFunction::makeFromBoxedFunction<&boxed<topk>>());
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
