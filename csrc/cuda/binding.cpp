// The operators contrastive_ops_cuda::*, the functions of sweep.h on tensors, by headers of torch's stable ABI alone:
// one library for every torch from 2.11 on, with or without CUDA. contrastive_ops/backends/cuda.py calls them.
//
// A struct of sweep.h is a list of optional tensors in the order of its fields. Whatever calls the operators, sizes and
// types are checked before a kernel starts, and no kernel reads or writes beyond a tensor.

#include "sweep.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#ifndef CONTRASTIVE_OPS_CUDA_HOST
#include <dlfcn.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#ifdef CONTRASTIVE_OPS_CUDA_HOST
#define CONTRASTIVE_OPS_LIBRARY contrastive_ops_cuda_host
#define CONTRASTIVE_OPS_KEY CPU
#else
#define CONTRASTIVE_OPS_LIBRARY contrastive_ops_cuda
#define CONTRASTIVE_OPS_KEY CUDA
#endif

namespace contrastive_ops::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<OptionalTensor>;
using Shape = std::initializer_list<int64_t>;

// Indices of rows and columns are int, also those of the rest of a tile beyond the last one.
constexpr int64_t kLargestSize = std::numeric_limits<int>::max() / 2;
constexpr int64_t kMembers = 4;

template <typename Sizes>
std::string text_of(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "(";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << (sizes.size() == 0 ? "()" : ")");
  return text.str();
}

int64_t parts_of(int64_t size, int64_t part) {
  return (size + part - 1) / part;
}

template <typename T>
constexpr ScalarType kScalarType = torch::headeronly::CppTypeToScalarType<std::remove_const_t<T>>::value;

template <typename... Parts>
void check(bool holds, const char* operator_name, const Parts&... sentence) {
  if (!holds) {
    std::ostringstream text;
    text << operator_name << ": ";
    (text << ... << sentence);
    throw std::invalid_argument(text.str());
  }
}

#ifndef CONTRASTIVE_OPS_CUDA_HOST
// The stream that torch computes on. The function is in libtorch_cuda.so, which a torch without CUDA does not have and
// whose symbols the others do not share: it is looked up there when the first kernel starts.
cudaStream_t current_stream(int32_t device_index) {
  using Get = int32_t (*)(int32_t device_index, void** stream);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (get == nullptr) {
    throw std::runtime_error("the libtorch_cuda.so of this torch has no aoti_torch_get_current_cuda_stream");
  }
  void* stream = nullptr;
  if (get(device_index, &stream) != 0) {
    throw std::runtime_error("torch does not say what its current stream is");
  }
  return static_cast<cudaStream_t>(stream);
}
#endif

// One call of an operator: its tensors are contiguous, on one device, which is the current one as long as this lives.
class Call {
 public:
  Call(const char* name, const Tensor& tensor)
      : name_(name),
        device_(tensor.device())
#ifndef CONTRASTIVE_OPS_CUDA_HOST
        ,
        guard_(device_.index())
#endif
  {
  }

  template <typename... Parts>
  void check(bool holds, const Parts&... sentence) const {
    cuda::check(holds, name_, sentence...);
  }

  const char* name() const {
    return name_;
  }

  int size(const char* name, int64_t value) const {
    check(1 <= value && value <= kLargestSize, name, " must be from 1 to ", kLargestSize, ", got ", value);
    return static_cast<int>(value);
  }

  // Null where no tensor is given.
  template <typename T>
  T* pointer(const char* name, const OptionalTensor& tensor, Shape shape, ScalarType dtype = kScalarType<T>) const {
    if (!tensor.has_value()) {
      return nullptr;
    }
    const auto sizes = tensor->sizes();
    check(
        std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()),
        name,
        " must have shape ",
        text_of(shape),
        ", got ",
        text_of(sizes));
    check(
        tensor->scalar_type() == dtype,
        name,
        " must be of type ",
        torch::headeronly::toString(dtype),
        ", got ",
        torch::headeronly::toString(tensor->scalar_type()));
    check(tensor->device() == device_, name, " must be on the device of the other tensors");
    check(tensor->is_contiguous(), name, " must be contiguous");
    if constexpr (std::is_const_v<T>) {
      return static_cast<T*>(tensor->const_data_ptr());
    } else {
      return static_cast<T*>(tensor->mutable_data_ptr());
    }
  }

  cudaStream_t stream() const {
#ifdef CONTRASTIVE_OPS_CUDA_HOST
    return nullptr;
#else
    return current_stream(device_.index());
#endif
  }

  // Takes what a function of sweep.h returns.
  void finish(const char* error) const {
    if (error != nullptr) {
      throw std::runtime_error(std::string(name_) + ": " + error);
    }
  }

 private:
  const char* name_;
  torch::stable::Device device_;
#ifndef CONTRASTIVE_OPS_CUDA_HOST
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// The fields of a struct, one after another.
class Fields {
 public:
  Fields(const Call& call, const char* name, const Tensors& tensors, size_t count) : call_(call), tensors_(tensors) {
    call.check(tensors.size() == count, name, " must be ", count, " optional tensors, got ", tensors.size());
  }

  template <typename T>
  T* next(const char* name, Shape shape) {
    return call_.pointer<T>(name, tensors_[position_++], shape);
  }

  template <typename T>
  T* next(const char* name, Shape shape, ScalarType dtype) {
    return call_.pointer<T>(name, tensors_[position_++], shape, dtype);
  }

 private:
  const Call& call_;
  const Tensors& tensors_;
  size_t position_ = 0;
};

Dtype dtype_of(const char* operator_name, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      check(
          type == ScalarType::Half,
          operator_name,
          name,
          " must be of type Float, BFloat16 or Half, got ",
          torch::headeronly::toString(type));
      return Dtype::float16;
  }
}

// A log-sum-exp of all pairs that the options leave.
bool is_plain(const Problem& problem) {
  const Second& second = problem.second;
  return problem.reduction == Reduction::logsumexp && second.row_ceiling == nullptr && second.col_ceiling == nullptr;
}

ScalarType type_of(Dtype dtype) {
  return dtype == Dtype::float32    ? ScalarType::Float
         : dtype == Dtype::bfloat16 ? ScalarType::BFloat16
                                    : ScalarType::Half;
}

// "logsumexp", "expectation", or the function of a sum.
void choose_reduction(const Call& call, const std::string& name, Problem& problem) {
  static const std::vector<std::string> functions = {"identity", "softplus", "relu", "sigmoid", "square", "step"};
  if (name == "logsumexp" || name == "expectation") {
    problem.reduction = name == "logsumexp" ? Reduction::logsumexp : Reduction::expectation;
    return;
  }
  const auto found = std::find(functions.begin(), functions.end(), name);
  call.check(found != functions.end(), "there is no reduction ", name);
  problem.reduction = Reduction::sum;
  problem.function = static_cast<Function>(found - functions.begin());
}

Second second_of(const Call& call, const Tensors& second, const Problem& problem) {
  const int64_t n = problem.n, m = problem.m;
  Fields given(call, "second", second, 8);
  Second result{};
  if (second[0].has_value()) {
    call.check(second[0]->dim() == 2, "u must have shape (N, D), got ", text_of(second[0]->sizes()));
    result.form.features = call.size("D of u", second[0]->size(1));
  }
  const int64_t features = result.form.features;
  result.form.x = given.next<const void>("u", {n, features}, type_of(problem.dtype));
  result.form.y = given.next<const void>("v", {m, features}, type_of(problem.dtype));
  call.check((result.form.x == nullptr) == (result.form.y == nullptr), "u and v must be given together");
  result.row_scale = given.next<const float>("teacher_row_scale", {n});
  result.col_scale = given.next<const float>("teacher_col_scale", {m});
  result.row_bias = given.next<const float>("teacher_row_bias", {n});
  result.col_bias = given.next<const float>("teacher_col_bias", {m});
  result.row_ceiling = given.next<const float>("ceiling", {n});
  result.col_ceiling = given.next<const float>("col_ceiling", {m});
  const bool guided = result.row_ceiling != nullptr || result.col_ceiling != nullptr;
  call.check(!guided || problem.reduction != Reduction::expectation, "expectations have no guide");
  return result;
}

Problem problem_of(
    const Call& call,
    const Tensor& x,
    const Tensor& y,
    const Tensors& vectors,
    const Tensors& span,
    const Tensors& second,
    const std::string& reduction,
    bool mirrored,
    bool equal,
    bool above,
    bool tf32) {
  call.check(x.dim() == 2, "x must have shape (N, D), got ", text_of(x.sizes()));
  call.check(y.dim() == 2 || y.dim() == 3, "y must have shape (M, D) or (M, P, D), got ", text_of(y.sizes()));
  Problem problem{};
  problem.dtype = dtype_of(call.name(), "x", x.scalar_type());
  choose_reduction(call, reduction, problem);
  const int64_t n = problem.n = call.size("N", x.size(0));
  const int64_t m = problem.m = call.size("M", y.size(0));
  const int64_t features = problem.features = call.size("D", x.size(1));
  problem.x = call.pointer<const void>("x", x, {n, features}, x.scalar_type());
  if (y.dim() == 2) {
    problem.y = call.pointer<const void>("y", y, {m, features}, x.scalar_type());
  } else {
    const int64_t members = y.size(1);
    call.check(1 <= members && members <= kMembers, "P must be from 1 to ", kMembers, ", got ", members);
    problem.members = static_cast<int>(members);
    problem.y = call.pointer<const void>("y", y, {m, members, features}, x.scalar_type());
  }

  Fields given(call, "vectors", vectors, 8);
  problem.vectors = {
      given.next<const float>("row_scale", {n}),
      given.next<const float>("col_scale", {m}),
      given.next<const float>("row_bias", {n}),
      given.next<const float>("col_bias", {m}),
      given.next<const int>("row_exclude", {n}),
      given.next<const int>("col_exclude", {m}),
      given.next<const int>("row_ids", {n}),
      given.next<const int>("col_ids", {m})};
  const bool ids = problem.vectors.row_ids != nullptr;
  call.check(ids == (problem.vectors.col_ids != nullptr), "row_ids and col_ids must be given together");
  call.check(ids || !equal, "equal needs row_ids and col_ids");

  const int64_t triangle = problem.members * (problem.members + 1) / 2;
  Fields distances(call, "span", span, 2);
  problem.span = {distances.next<const float>("inverse", {triangle, m}), distances.next<const float>("square", {n})};
  const bool has_span = problem.span.inverse != nullptr && problem.span.square != nullptr;
  call.check(has_span || problem.members == 0, "volumes need inverse and square");

  problem.second = second_of(call, second, problem);
  call.check(is_plain(problem) || problem.members == 0, "volumes have a log-sum-exp, and no second form");
  call.check(!mirrored || (n == m && problem.members == 0), "mirrored needs y to be x");
  problem.mirrored = mirrored;
  problem.equal = equal;
  problem.second.above = above;
  problem.tf32 = tf32;
  return problem;
}

// An operator whose first arguments are a Problem: Operator::run(call, problem, the others...).
template <typename Operator, typename Run = decltype(&Operator::run)>
struct OfProblem;

template <typename Operator, typename... Others>
struct OfProblem<Operator, void (*)(const Call&, const Problem&, Others...)> {
  static void run(
      const Tensor& x,
      const Tensor& y,
      const Tensors& vectors,
      const Tensors& span,
      const Tensors& second,
      std::string reduction,
      bool mirrored,
      bool equal,
      bool above,
      bool tf32,
      Others... others) {
    const Call call(Operator::name, x);
    const Problem problem = problem_of(call, x, y, vectors, span, second, reduction, mirrored, equal, above, tf32);
    Operator::run(call, problem, others...);
  }
};

Incoming incoming_of(const Call& call, const Tensors& incoming, const Problem& problem) {
  const int64_t n = problem.n, m = problem.m;
  Fields given(call, "incoming", incoming, 14);
  const Incoming result{
      given.next<const float>("row_weight", {n}),
      given.next<const float>("col_weight", {m}),
      given.next<const float>("row_max", {n}),
      given.next<const float>("col_max", {m}),
      given.next<const float>("row_excluded", {n}),
      given.next<const float>("col_excluded", {m}),
      given.next<const float>("row_total", {n}),
      given.next<const float>("col_total", {m}),
      given.next<const float>("row_share", {n}),
      given.next<const float>("col_share", {m}),
      given.next<const float>("teacher_row_max", {n}),
      given.next<const float>("teacher_col_max", {m}),
      given.next<const float>("row_mean", {n}),
      given.next<const float>("col_mean", {m})};
  const auto go_together = [&](const float* one, const float* other) { return (one == nullptr) == (other == nullptr); };
  if (problem.reduction != Reduction::sum) {
    call.check(go_together(result.row_weight, result.row_max), "row_weight and row_max go together");
    call.check(go_together(result.col_weight, result.col_max), "col_weight and col_max go together");
  }
  call.check(go_together(result.row_share, result.row_mean), "row_share and row_mean go together");
  call.check(go_together(result.col_share, result.col_mean), "col_share and col_mean go together");
  return result;
}

Part part_of(
    const Call& call, const char* name, const Tensors& part, int64_t parts, int64_t size, bool in_double = false) {
  Fields given(call, name, part, 6);
  Part result{};
  result.maximum = given.next<float>("maximum", {parts, size});
  if (in_double) {
    result.values = given.next<double>("sum", {parts, size});
  } else {
    result.sum = given.next<float>("sum", {parts, size});
  }
  result.total = given.next<float>("total", {parts, size});
  result.teacher_maximum = given.next<float>("teacher_maximum", {parts, size});
  result.teacher_sum = given.next<float>("teacher_sum", {parts, size});
  result.moment = given.next<float>("moment", {parts, size});
  const bool statistics = result.maximum != nullptr;
  call.check(in_double || statistics == (result.sum != nullptr), name, " must have maximum and sum, or neither");
  call.check(statistics || result.total == nullptr, name, " has a total, but no maximum");
  call.check(
      (result.teacher_maximum == nullptr) == (result.teacher_sum == nullptr),
      name,
      " must have teacher_maximum and teacher_sum, or neither");
  return result;
}

// What forward folds: all that the reduction has, or nothing.
Part folded(
    const Call& call, const char* name, const Tensors& part, int64_t parts, const Problem& problem, int64_t size) {
  const bool is_sum = problem.reduction == Reduction::sum, is_mean = problem.reduction == Reduction::expectation;
  const Part result = part_of(call, name, part, parts, size, is_sum);
  const bool given = result.maximum != nullptr, teaches = is_mean && problem.second.form.x != nullptr;
  call.check(!is_sum || !given, name, " of a sum has a sum alone");
  call.check((result.moment != nullptr) == (given && is_mean), name, " must have a moment, if it is of means");
  call.check(
      (result.teacher_maximum != nullptr) == (given && teaches), name, " must have a teacher's, where there is one");
  return result;
}

Sums sums_of(const Call& call, const char* name, const Tensors& sums, int64_t parts, int64_t size) {
  Fields given(call, name, sums, 5);
  return {
      given.next<float>("scale", {parts, size}),
      given.next<float>("bias", {parts, size}),
      given.next<float>("along", {parts, size}),
      given.next<float>("teacher_scale", {parts, size}),
      given.next<float>("teacher_bias", {parts, size})};
}

void check_tiles(const Call& call, const char* name, int64_t value, int tile) {
  call.check(value % tile == 0, name, " must be a multiple of ", tile, ", got ", value);
}

struct Forward {
  static constexpr const char* name = "forward";

  static void run(
      const Call& call,
      const Problem& problem,
      const Tensors& row,
      const Tensors& col,
      int64_t rows_per_group,
      int64_t cols_per_strip) {
    const Tiling tile = tiling(problem.reduction, problem.members);
    const int group = call.size("rows_per_group", rows_per_group), strip = call.size("cols_per_strip", cols_per_strip);
    check_tiles(call, "rows_per_group", group, tile.rows);
    check_tiles(call, "cols_per_strip", strip, tile.cols);
    const Part rows = folded(call, "row", row, parts_of(problem.m, strip), problem, problem.n);
    const Part cols = folded(call, "col", col, parts_of(problem.n, group), problem, problem.m);
    const auto given = [](const Part& part) { return part.maximum != nullptr || part.values != nullptr; };
    call.check(given(rows) || given(cols), "row or col must be given");
    call.check(!problem.mirrored || given(cols), "mirrored needs col");
    call.finish(cuda::forward(problem, rows, cols, group, strip, call.stream()));
  }
};

struct Excluded {
  static constexpr const char* name = "excluded";

  static void run(const Call& call, const Problem& problem, const Tensor& logits) {
    call.check(problem.members == 0, "y must have shape (M, D)");
    call.check(problem.vectors.row_exclude != nullptr, "row_exclude must be given");
    float* out = call.pointer<float>("logits", logits, {problem.n});
    call.finish(cuda::excluded(problem, out, call.stream()));
  }
};

void merge(
    const Tensors& part,
    const Tensors& mirror,
    const Tensor& maximum,
    const Tensor& log_sum,
    const OptionalTensor& mean) {
  const Call call("merge", maximum);
  const auto parts_in = [](const Tensors& given) -> int64_t {
    return given.empty() || !given[0].has_value() || given[0]->dim() == 0 ? 0 : given[0]->size(0);
  };
  call.check(maximum.dim() == 1, "maximum must have shape (N,), got ", text_of(maximum.sizes()));
  const int size = call.size("N", maximum.size(0));
  const int64_t parts = parts_in(part), mirrors = parts_in(mirror);
  const Part rows = part_of(call, "part", part, parts, size), cols = part_of(call, "mirror", mirror, mirrors, size);
  call.check(mirrors <= kLargestSize, "mirror has too many parts: ", mirrors);
  float* out_maximum = call.pointer<float>("maximum", maximum, {size});
  float* out_log_sum = call.pointer<float>("log_sum", log_sum, {size});
  float* out_mean = call.pointer<float>("mean", mean, {size});
  call.check(out_mean == nullptr || rows.moment != nullptr, "a mean needs moments");
  call.check(mirrors == 0 || (rows.moment == nullptr) == (cols.moment == nullptr), "part and mirror must be alike");
  call.finish(
      cuda::merge(
          rows,
          call.size("parts", parts),
          cols,
          static_cast<int>(mirrors),
          out_maximum,
          out_log_sum,
          out_mean,
          size,
          call.stream()));
}

struct OfBlock {
  static constexpr const char* name = "block";

  static void run(
      const Call& call,
      const Problem& problem,
      const Tensors& incoming,
      const OptionalTensor& unit,
      const OptionalTensor& coefficients,
      const Tensors& row_sums,
      const Tensors& col_sums,
      int64_t first_row,
      int64_t first_col,
      int64_t rows,
      int64_t cols,
      int64_t stride) {
    const Tiling tile = tiling(problem.reduction, problem.members);
    const auto inside = [&](int64_t first, int64_t count, int64_t size) { return 0 <= first && first <= size - count; };
    const Block where{
        static_cast<int>(first_row),
        static_cast<int>(first_col),
        call.size("rows", rows),
        call.size("cols", cols),
        call.size("stride", stride)};
    call.check(inside(first_row, rows, problem.n), "rows from ", first_row, " to ", first_row + rows, " are not in x");
    call.check(
        inside(first_col, cols, problem.m), "columns from ", first_col, " to ", first_col + cols, " are not in y");
    const auto whole = [](int64_t first, int64_t count, int64_t all, int part) {
      return count % part == 0 || first + count == all;
    };
    call.check(whole(first_row, rows, problem.n, tile.rows), "rows must be whole tiles of ", tile.rows, ", got ", rows);
    call.check(whole(first_col, cols, problem.m, tile.cols), "cols must be whole tiles of ", tile.cols, ", got ", cols);
    call.check(stride >= cols, "stride must be at least the columns, ", cols, ", got ", stride);
    check_tiles(call, "stride", stride, 16);
    const bool teaches = problem.reduction == Reduction::expectation && problem.second.form.x != nullptr;
    const bool of_teacher =
        teaches && coefficients.has_value() && coefficients->dim() > 0 && coefficients->size(0) == 2;
    const int planes = of_teacher ? 2 : problem.members == 0 ? 1 : problem.members;
    void* out = call.pointer<void>("coefficients", coefficients, {planes, rows, stride}, type_of(problem.dtype));
    // they are stored 16 bytes at a time
    call.check(reinterpret_cast<uintptr_t>(out) % 16 == 0, "coefficients must be aligned to 16 bytes");
    const Sums of_rows = sums_of(call, "row_sums", row_sums, parts_of(cols, tile.cols), rows);
    const Sums of_cols = sums_of(call, "col_sums", col_sums, parts_of(rows, tile.rows), cols);
    const bool has_along = of_cols.along != nullptr || (of_rows.along != nullptr && problem.members == 0);
    call.check(!has_along, "along is of the rows of volumes alone");
    call.finish(
        cuda::block(
            problem,
            incoming_of(call, incoming, problem),
            call.pointer<const float>("unit", unit, {teaches ? 2 : 1}),
            out,
            planes,
            of_rows,
            of_cols,
            where,
            call.stream()));
  }
};

// Columns of a strip, and how many strips there are, of what `rows` and `attention` take.
struct Strips {
  int cols;
  int64_t count;
};

Strips strips_of(const Call& call, const Problem& problem, int64_t cols_per_strip) {
  call.check(problem.members == 0, "y must have shape (M, D)");
  call.check(is_plain(problem), "there is no such kernel for this reduction or with a guide");
  const Tiling tile = rows_tiling(problem.dtype, problem.features);
  call.check(tile.rows > 0, "there is no such kernel for D = ", problem.features, " and the type of x");
  const int cols = call.size("cols_per_strip", cols_per_strip);
  check_tiles(call, "cols_per_strip", cols, tile.cols);
  return {cols, parts_of(problem.m, cols)};
}

struct Rows {
  static constexpr const char* name = "rows";

  static void run(
      const Call& call,
      const Problem& problem,
      const Tensors& incoming,
      const OptionalTensor& unit,
      const OptionalTensor& gradient,
      const Tensors& sums,
      int64_t cols_per_strip) {
    const Strips strips = strips_of(call, problem, cols_per_strip);
    const bool in_float = gradient.has_value() && gradient->scalar_type() == ScalarType::Float;
    void* out = call.pointer<void>(
        "gradient",
        gradient,
        {strips.count, problem.n, problem.features},
        in_float ? ScalarType::Float : type_of(problem.dtype));
    call.finish(
        cuda::rows(
            problem,
            incoming_of(call, incoming, problem),
            call.pointer<const float>("unit", unit, {1}),
            out,
            in_float,
            sums_of(call, "sums", sums, strips.count, problem.n),
            strips.cols,
            call.stream()));
  }
};

struct Attention {
  static constexpr const char* name = "attention";

  static void run(
      const Call& call,
      const Problem& problem,
      const OptionalTensor& unit,
      const Tensors& row,
      const Tensors& slopes,
      int64_t cols_per_strip) {
    const Strips strips = strips_of(call, problem, cols_per_strip);
    const Part part = part_of(call, "row", row, strips.count, problem.n);
    Fields given(call, "slopes", slopes, 2);
    const Slopes found{
        given.next<float>("slopes.x", {strips.count, problem.n, problem.features}),
        given.next<float>("slopes.scale", {strips.count, problem.n})};
    call.check(part.maximum != nullptr, "row must be given");
    call.check(found.x != nullptr && found.scale != nullptr, "slopes must be given");
    const float* size = call.pointer<const float>("unit", unit, {1});
    call.finish(cuda::attention(problem, size, part, found, strips.cols, call.stream()));
  }
};

void factor(const Tensor& vectors, const Tensor& inverse, const Tensor& volume) {
  const Call call("factor", vectors);
  call.check(vectors.dim() == 3, "vectors must have shape (count, K, D), got ", text_of(vectors.sizes()));
  const int64_t count = vectors.size(0), members = vectors.size(1);
  const int features = call.size("D", vectors.size(2));
  call.check(count >= 1, "vectors must have at least one set");
  call.check(1 <= members && members <= kMembers + 1, "K must be from 1 to ", kMembers + 1, ", got ", members);
  call.finish(
      cuda::factor(
          call.pointer<const void>("vectors", vectors, {count, members, features}, vectors.scalar_type()),
          dtype_of(call.name(), "vectors", vectors.scalar_type()),
          count,
          static_cast<int>(members),
          features,
          call.pointer<double>("inverse", inverse, {count, members, members}),
          call.pointer<double>("volume", volume, {count}),
          call.stream()));
}

std::tuple<int64_t, int64_t> tiling_of_pairs_or_volumes(std::string reduction, int64_t members) {
  const bool is_mean = reduction == "expectation";
  const Tiling tile = tiling(is_mean ? Reduction::expectation : Reduction::logsumexp, static_cast<int>(members));
  return {tile.rows, tile.cols};
}

std::tuple<int64_t, int64_t> tiling_of_rows(ScalarType dtype, int64_t features) {
  const Tiling tile = rows_tiling(dtype_of("rows_tiling", "dtype", dtype), static_cast<int>(features));
  return {tile.rows, tile.cols};
}

#ifndef CONTRASTIVE_OPS_CUDA_HOST
#define CONTRASTIVE_OPS_TEXT(...) #__VA_ARGS__
#define CONTRASTIVE_OPS_TEXT_OF(...) CONTRASTIVE_OPS_TEXT(__VA_ARGS__)

// The version of nvcc, and what it made: code (sm_80) and PTX (compute_80).
std::tuple<std::string, std::string> build_info() {
  return {CONTRASTIVE_OPS_TEXT_OF(CONTRASTIVE_OPS_NVCC), CONTRASTIVE_OPS_TEXT_OF(CONTRASTIVE_OPS_ARCHITECTURES)};
}
#endif

STABLE_TORCH_LIBRARY(CONTRASTIVE_OPS_LIBRARY, library) {
  const std::string problem =
      "Tensor x, Tensor y, Tensor?[] vectors, Tensor?[] span, Tensor?[] second, str reduction, "
      "bool mirrored, bool equal, bool above, bool tf32, ";
  const std::string incoming = "Tensor?[] incoming, Tensor? unit, ";
  for (const std::string& schema : {
           "forward(" + problem + "Tensor(a!)?[] row, Tensor(b!)?[] col, int rows_per_group, int cols_per_strip) -> ()",
           "excluded(" + problem + "Tensor(a!) logits) -> ()",
           std::string(
               "merge(Tensor?[] part, Tensor?[] mirror, Tensor(a!) maximum, Tensor(b!) log_sum, "
               "Tensor(c!)? mean) -> ()"),
           "block(" + problem + incoming +
               "Tensor(a!)? coefficients, Tensor(b!)?[] row_sums, Tensor(c!)?[] col_sums, "
               "int first_row, int first_col, int rows, int cols, int stride) -> ()",
           "rows(" + problem + incoming + "Tensor(a!)? gradient, Tensor(b!)?[] sums, int cols_per_strip) -> ()",
           "attention(" + problem + "Tensor? unit, Tensor(a!)?[] row, Tensor(b!)?[] slopes, int cols_per_strip) -> ()",
           std::string("factor(Tensor vectors, Tensor(a!) inverse, Tensor(b!) volume) -> ()"),
           std::string("tiling(str reduction, int members) -> (int, int)"),
           std::string("rows_tiling(ScalarType dtype, int features) -> (int, int)"),
#ifndef CONTRASTIVE_OPS_CUDA_HOST
           std::string("build_info() -> (str, str)"),
#endif
       }) {
    library.def(schema.c_str());
  }
}

STABLE_TORCH_LIBRARY_IMPL(CONTRASTIVE_OPS_LIBRARY, CONTRASTIVE_OPS_KEY, library) {
  library.impl("forward", TORCH_BOX(&OfProblem<Forward>::run));
  library.impl("excluded", TORCH_BOX(&OfProblem<Excluded>::run));
  library.impl("merge", TORCH_BOX(&merge));
  library.impl("block", TORCH_BOX(&OfProblem<OfBlock>::run));
  library.impl("rows", TORCH_BOX(&OfProblem<Rows>::run));
  library.impl("attention", TORCH_BOX(&OfProblem<Attention>::run));
  library.impl("factor", TORCH_BOX(&factor));
}

STABLE_TORCH_LIBRARY_IMPL(CONTRASTIVE_OPS_LIBRARY, CompositeExplicitAutograd, library) {
  library.impl("tiling", TORCH_BOX(&tiling_of_pairs_or_volumes));
  library.impl("rows_tiling", TORCH_BOX(&tiling_of_rows));
#ifndef CONTRASTIVE_OPS_CUDA_HOST
  library.impl("build_info", TORCH_BOX(&build_info));
#endif
}

}  // namespace
}  // namespace contrastive_ops::cuda
