// The functions of csrc/cuda/sweep.h on small problems, compared with plain loops in float64. For sanitizers: no torch.
//
//     check [CASE [SEED [eager]]]   all cases on three seeds and with both modes of copies, or one; prints what is
//                                   wrong, or the wavefronts of shared memory that all took
//
// Buffers are as large as they must be and no larger, and what the kernels write is NaN before.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "device.cuh"
#include "sweep.h"

using namespace contrastive_ops::cuda;

namespace {

constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr float UNWRITTEN = std::numeric_limits<float>::quiet_NaN();

struct Case {
  const char* name;
  Dtype dtype;
  int features;
  int members = 0;
  bool scales = false, biases = false, exclude = false, ids = false, equal = false;
  bool mirrored = false;
  bool tf32 = false;
  bool rows = true, cols = true;  // the directions that are asked for
  bool small = false;             // less than a tile
  bool misaligned = false;        // x and y begin where no 16 bytes do
  bool no_gradient = false;       // of the features: sums only
  Reduction reduction = Reduction::logsumexp;
  Function function = Function::identity;
  bool second = false, ceilings = false, above = false;
};

const Case CASES[] = {
    {.name = "float32", .dtype = Dtype::float32, .features = 20},
    {.name = "float32 rows", .dtype = Dtype::float32, .features = 8, .cols = false},
    {.name = "float32 odd", .dtype = Dtype::float32, .features = 37, .scales = true, .rows = false},
    {.name = "float32 all",
     .dtype = Dtype::float32,
     .features = 24,
     .scales = true,
     .biases = true,
     .exclude = true,
     .ids = true},
    {.name = "float32 self",
     .dtype = Dtype::float32,
     .features = 20,
     .scales = true,
     .exclude = true,
     .mirrored = true},
    {.name = "tf32", .dtype = Dtype::float32, .features = 40, .scales = true, .tf32 = true},
    {.name = "bfloat16", .dtype = Dtype::bfloat16, .features = 64},
    {.name = "bfloat16 steps", .dtype = Dtype::bfloat16, .features = 200, .exclude = true},
    {.name = "bfloat16 odd", .dtype = Dtype::bfloat16, .features = 33, .biases = true},
    {.name = "bfloat16 misaligned", .dtype = Dtype::bfloat16, .features = 32, .scales = true, .misaligned = true},
    {.name = "bfloat16 small", .dtype = Dtype::bfloat16, .features = 16, .exclude = true, .small = true},
    {.name = "bfloat16 cols", .dtype = Dtype::bfloat16, .features = 16, .ids = true, .equal = true, .rows = false},
    {.name = "bfloat16 self",
     .dtype = Dtype::bfloat16,
     .features = 48,
     .scales = true,
     .biases = true,
     .exclude = true,
     .ids = true,
     .mirrored = true},
    {.name = "float16 all",
     .dtype = Dtype::float16,
     .features = 72,
     .scales = true,
     .biases = true,
     .exclude = true,
     .ids = true},
    {.name = "float16 equal",
     .dtype = Dtype::float16,
     .features = 20,
     .scales = true,
     .exclude = true,
     .ids = true,
     .equal = true},
    {.name = "float16 sums", .dtype = Dtype::float16, .features = 16, .scales = true, .no_gradient = true},
    {.name = "float32 guide",
     .dtype = Dtype::float32,
     .features = 20,
     .scales = true,
     .exclude = true,
     .second = true,
     .ceilings = true},
    {.name = "bfloat16 guide self",
     .dtype = Dtype::bfloat16,
     .features = 40,
     .ids = true,
     .mirrored = true,
     .second = true,
     .ceilings = true,
     .above = true},
    {.name = "float16 ceilings", .dtype = Dtype::float16, .features = 24, .cols = false, .ceilings = true},
    {.name = "float32 softplus",
     .dtype = Dtype::float32,
     .features = 20,
     .scales = true,
     .biases = true,
     .exclude = true,
     .ids = true,
     .reduction = Reduction::sum,
     .function = Function::softplus},
    {.name = "bfloat16 sigmoid self",
     .dtype = Dtype::bfloat16,
     .features = 48,
     .exclude = true,
     .mirrored = true,
     .reduction = Reduction::sum,
     .function = Function::sigmoid},
    {.name = "float16 square guide",
     .dtype = Dtype::float16,
     .features = 33,
     .biases = true,
     .reduction = Reduction::sum,
     .function = Function::square,
     .second = true,
     .ceilings = true},
    {.name = "bfloat16 relu small",
     .dtype = Dtype::bfloat16,
     .features = 16,
     .cols = false,
     .small = true,
     .reduction = Reduction::sum,
     .function = Function::relu},
    {.name = "float32 expectation",
     .dtype = Dtype::float32,
     .features = 20,
     .scales = true,
     .biases = true,
     .exclude = true,
     .ids = true,
     .reduction = Reduction::expectation,
     .second = true},
    {.name = "bfloat16 expectation self",
     .dtype = Dtype::bfloat16,
     .features = 40,
     .exclude = true,
     .mirrored = true,
     .reduction = Reduction::expectation,
     .second = true},
    {.name = "bfloat16 expectation cols",
     .dtype = Dtype::bfloat16,
     .features = 24,
     .scales = true,
     .rows = false,
     .reduction = Reduction::expectation},
    {.name = "float16 expectation",
     .dtype = Dtype::float16,
     .features = 37,
     .scales = true,
     .misaligned = true,
     .reduction = Reduction::expectation,
     .second = true},
    {.name = "volume 1", .dtype = Dtype::float32, .features = 20, .members = 1, .scales = true},
    {.name = "volume 2", .dtype = Dtype::bfloat16, .features = 40, .members = 2, .scales = true, .exclude = true},
    {.name = "volume 2 tf32", .dtype = Dtype::float32, .features = 36, .members = 2, .tf32 = true},
    {.name = "volume 3", .dtype = Dtype::float16, .features = 21, .members = 3, .rows = false},
    {.name = "volume 4", .dtype = Dtype::float32, .features = 33, .members = 4, .exclude = true, .cols = false},
    {.name = "volume 4 half", .dtype = Dtype::bfloat16, .features = 24, .members = 4, .small = true},
};

// An order of threads and blocks, and a mode of copies.
struct Run {
  uint64_t seed;
  bool eager;
};

std::string current;

void begin(const char* name, const Run& run) {
  current = std::string(name) + ", seed " + std::to_string(run.seed) + (run.eager ? ", eager" : "");
  contrastive_ops_host_configure(run.seed, run.eager);
}

[[noreturn]] void stop(const std::string& what) {
  std::printf("%s: %s\n", current.c_str(), what.c_str());
  std::exit(1);
}

void succeed(const char* what, const char* error) {
  if (error != nullptr) {
    stop(std::string(what) + ": " + error);
  }
}

// A sum, and the size of its terms: what errors are measured by.
struct Sum {
  double value = 0;
  double size = 0;

  void add(double term) {
    value += term;
    size += std::fabs(term);
  }

  void add(const Sum& term, double factor) {
    value += term.value * factor;
    size += term.size * std::fabs(factor);
  }
};

void expect(const char* what, size_t index, double value, double expected, double allowed) {
  const bool right = std::isfinite(expected) ? std::fabs(value - expected) <= allowed : value == expected;
  if (!right) {
    char text[256];
    std::snprintf(
        text,
        sizeof(text),
        "%s[%zu] is %.9g instead of %.9g, off by %.2g where %.2g is allowed",
        what,
        index,
        value,
        expected,
        std::fabs(value - expected),
        allowed);
    stop(text);
  }
}

// Elements of a dtype, in memory of their own, which begins one element late if `misaligned`.
class Features {
 public:
  Features(Dtype dtype, size_t size, bool misaligned = false)
      : dtype_(dtype), first_(misaligned), bytes_((size + first_) * width(), 0xff) {}

  size_t width() const {
    return dtype_ == Dtype::float32 ? 4 : 2;
  }

  void* data() {
    return bytes_.data() + first_ * width();
  }

  void set(size_t index, float value) {
    unsigned char* place = bytes_.data() + (first_ + index) * width();
    if (dtype_ == Dtype::float32) {
      std::memcpy(place, &value, 4);
    } else if (dtype_ == Dtype::bfloat16) {
      const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
      std::memcpy(place, &rounded, 2);
    } else {
      const __half rounded = __float2half_rn(value);
      std::memcpy(place, &rounded, 2);
    }
  }

  double operator[](size_t index) const {
    const unsigned char* place = bytes_.data() + (first_ + index) * width();
    if (dtype_ == Dtype::float32) {
      float value;
      std::memcpy(&value, place, 4);
      return value;
    }
    if (dtype_ == Dtype::bfloat16) {
      __nv_bfloat16 value;
      std::memcpy(&value, place, 2);
      return __bfloat162float(value);
    }
    __half value;
    std::memcpy(&value, place, 2);
    return __half2float(value);
  }

 private:
  Dtype dtype_;
  size_t first_;
  std::vector<unsigned char> bytes_;
};

double rounding_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 0x1p-24 : dtype == Dtype::bfloat16 ? 0x1p-8 : 0x1p-11;
}

using Floats = std::vector<float>;
using Ints = std::vector<int>;

template <typename T>
const T* if_any(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

float* if_any(Floats& values) {
  return values.empty() ? nullptr : values.data();
}

std::mt19937 generator;

double normal() {
  return std::normal_distribution<double>()(generator);
}

int below(int bound) {
  return static_cast<int>(generator() % static_cast<unsigned>(bound));
}

Floats random_floats(int size, double mean, double deviation) {
  Floats values(size);
  for (float& value : values) {
    value = static_cast<float>(mean + deviation * normal());
  }
  return values;
}

// L^-1 and the volume of a set of vectors, by Gram and Schmidt: row t of L^-1 has what makes the t-th unit vector.
struct Factor {
  std::vector<double> inverse;  // [P, P]
  double volume = 1;
};

Factor factor_of(const Features& vectors, size_t set, int members, int features) {
  const auto element = [&](int t, int k) { return vectors[(set * members + t) * features + k]; };
  Factor result;
  result.inverse.assign(static_cast<size_t>(members) * members, 0);
  std::vector<std::vector<double>> units;
  for (int t = 0; t < members; ++t) {
    std::vector<double> rest(features), combination(members);
    combination[t] = 1;
    double square = 0;
    for (int k = 0; k < features; ++k) {
      rest[k] = element(t, k);
      square += rest[k] * rest[k];
    }
    for (int s = 0; s < t; ++s) {
      double dot = 0;
      for (int k = 0; k < features; ++k) {
        dot += units[s][k] * rest[k];
      }
      for (int k = 0; k < features; ++k) {
        rest[k] -= dot * units[s][k];
      }
      for (int r = 0; r <= s; ++r) {
        combination[r] -= dot * result.inverse[s * members + r];
      }
    }
    double length = 0;
    for (double value : rest) {
      length += value * value;
    }
    const bool inside = length <= 1e-12 * square;  // the share of contrastive_ops/backends/tuples.py
    length = inside ? 0 : std::sqrt(length);
    result.volume *= length;
    for (double& value : rest) {
      value = inside ? 0 : value / length;
    }
    for (int r = 0; r <= t; ++r) {
      result.inverse[t * members + r] = inside ? 0 : combination[r] / length;
    }
    units.push_back(rest);
  }
  return result;
}

struct Inputs {
  Case options;
  int n, m;
  Features x, y, u, v;
  Floats row_scale, col_scale, row_bias, col_bias, inverse, square;
  Floats teacher_row_scale, teacher_col_scale, teacher_row_bias, teacher_col_bias, row_ceiling, col_ceiling;
  Ints row_exclude, col_exclude, row_ids, col_ids;

  Inputs(const Case& options, int n, int m)
      : options(options),
        n(n),
        m(m),
        x(options.dtype, static_cast<size_t>(n) * options.features, options.misaligned),
        y(options.dtype, static_cast<size_t>(m) * columns() * options.features, options.misaligned),
        u(options.dtype, static_cast<size_t>(n) * second_features()),
        v(options.dtype, static_cast<size_t>(m) * second_features()) {
    for (size_t i = 0; i < static_cast<size_t>(n) * options.features; ++i) {
      x.set(i, static_cast<float>(normal()));
    }
    for (size_t j = 0; j < static_cast<size_t>(m) * columns() * options.features; ++j) {
      y.set(j, static_cast<float>(options.mirrored ? x[j] : normal()));
    }
    for (size_t i = 0; i < static_cast<size_t>(n) * second_features(); ++i) {
      u.set(i, static_cast<float>(below(3) - 1));  // small integers: no rounding moves a pair across its ceiling
    }
    for (size_t j = 0; j < static_cast<size_t>(m) * second_features(); ++j) {
      v.set(j, static_cast<float>(options.mirrored ? u[j] : below(3) - 1));
    }
    const double scale = 4 / std::sqrt(options.features);
    const bool teaches = options.reduction == Reduction::expectation && options.second;
    if (options.scales && teaches) {
      teacher_row_scale = random_floats(n, scale, 0.1);
      teacher_col_scale = random_floats(m, 1, 0.1);
    }
    if (options.biases && teaches) {
      teacher_row_bias = random_floats(n, 0, 1);
      teacher_col_bias = random_floats(m, 0, 1);
    }
    if (options.ceilings) {
      for (int i = 0; i < n; ++i) {
        row_ceiling.push_back(static_cast<float>(options.second ? below(4) - 0.5 : normal()));
      }
      for (int j = 0; j < m && options.cols; ++j) {
        col_ceiling.push_back(static_cast<float>(options.second ? below(4) + 0.5 : 1 + normal()));
      }
      if (options.mirrored) {
        col_ceiling = row_ceiling;
      }
    }
    if (options.scales) {
      row_scale = random_floats(n, scale, 0.1);
      col_scale = random_floats(m, 1, 0.1);
    }
    if (options.biases) {
      row_bias = random_floats(n, 0, 1);
      col_bias = random_floats(m, 0, 1);
    }
    if (options.exclude) {
      for (int i = 0; i < n; ++i) {
        row_exclude.push_back(below(4) == 0 ? -1 : below(3) == 0 ? below(m) : i % m);
      }
    }
    if (options.ids) {  // in order, so that tiles may be left out
      const int groups = 9;
      for (int i = 0; i < n; ++i) {
        row_ids.push_back(i == 0 ? groups : i * groups / n);  // the first is in no group
      }
      for (int j = 0; j < m; ++j) {
        col_ids.push_back(j * groups / m);
      }
    }
    if (options.mirrored) {
      col_scale = row_scale;
      col_bias = row_bias;
      col_exclude = row_exclude;
      col_ids = row_ids;
    }
    if (options.members > 0) {
      const int members = options.members;
      inverse.resize(static_cast<size_t>(members * (members + 1) / 2) * m);
      for (int j = 0; j < m; ++j) {
        const Factor factor = factor_of(y, j, members, options.features);
        for (int t = 0, place = 0; t < members; ++t) {
          for (int s = 0; s <= t; ++s, ++place) {
            inverse[static_cast<size_t>(place) * m + j] = static_cast<float>(factor.inverse[t * members + s]);
          }
        }
      }
      square.resize(n);
      for (int i = 0; i < n; ++i) {
        double sum = 0;
        for (int k = 0; k < options.features; ++k) {
          const double value = x[static_cast<size_t>(i) * options.features + k];
          sum += value * value;
        }
        square[i] = static_cast<float>(sum);
      }
    }
  }

  int columns() const {
    return options.members > 0 ? options.members : 1;
  }

  int second_features() const {
    return options.second ? options.features - 8 : 0;
  }

  bool teaches() const {
    return options.reduction == Reduction::expectation && options.second;
  }

  Problem problem() {
    return {
        options.dtype,
        options.reduction,
        options.function,
        x.data(),
        y.data(),
        n,
        m,
        options.features,
        options.members,
        {if_any(row_scale),
         if_any(col_scale),
         if_any(row_bias),
         if_any(col_bias),
         if_any(row_exclude),
         if_any(col_exclude),
         if_any(row_ids),
         if_any(col_ids)},
        {if_any(inverse), if_any(square)},
        {{options.second ? u.data() : nullptr, options.second ? v.data() : nullptr, second_features()},
         if_any(teacher_row_scale),
         if_any(teacher_col_scale),
         if_any(teacher_row_bias),
         if_any(teacher_col_bias),
         if_any(row_ceiling),
         if_any(col_ceiling),
         options.above},
        options.mirrored,
        options.equal,
        options.tf32};
  }
};

// Everything about a pair, in float64.
struct Pair {
  double value;  // <x, y>, or minus the distance
  double scale;  // a b
  double logit;
  bool takes_part;
  bool named_by_row, named_by_col;
  std::vector<double> coordinates;  // of volumes
  double second = 0;                // <u, v>
  double second_scale = 1;
  double teacher = 0;  // its logit
  double function = 0;
  double derivative = 1;
};

// A function that is summed, and its derivative.
void evaluate(Function function, double s, double& value, double& derivative) {
  const double sigmoid = 1 / (1 + std::exp(-s));
  switch (function) {
    case Function::identity:
      value = s, derivative = 1;
      break;
    case Function::softplus:
      value = std::fmax(s, 0) + std::log1p(std::exp(-std::fabs(s))), derivative = sigmoid;
      break;
    case Function::relu:
      value = std::fmax(s, 0), derivative = s > 0;
      break;
    case Function::sigmoid:
      value = sigmoid, derivative = sigmoid * (1 - sigmoid);
      break;
    case Function::square:
      value = s * s, derivative = 2 * s;
      break;
    case Function::step:
      value = s > 0, derivative = 0;
      break;
  }
}

// Log-sum-exps and means of a direction under the softmax of a logit.
struct Softmaxes {
  std::vector<double> maximum, log_sum;
  std::vector<Sum> mean;

  explicit Softmaxes(size_t size) : maximum(size, -INFINITE), log_sum(size), mean(size) {}
};

struct Truth {
  const Inputs& inputs;
  std::vector<Pair> pairs;
  std::vector<double> row_max, col_max, row_log_sum, col_log_sum;
  std::vector<Sum> row_total, col_total, row_values, col_values;
  Softmaxes row_teacher, col_teacher;

  explicit Truth(const Inputs& inputs)
      : inputs(inputs),
        row_max(inputs.n, -INFINITE),
        col_max(inputs.m, -INFINITE),
        row_log_sum(inputs.n),
        col_log_sum(inputs.m),
        row_total(inputs.n),
        col_total(inputs.m),
        row_values(inputs.n),
        col_values(inputs.m),
        row_teacher(inputs.n),
        col_teacher(inputs.m) {
    for (int i = 0; i < inputs.n; ++i) {
      for (int j = 0; j < inputs.m; ++j) {
        pairs.push_back(pair_of(i, j));
        const Pair& pair = pairs.back();
        if (pair.takes_part) {
          row_max[i] = std::fmax(row_max[i], pair.logit);
          col_max[j] = std::fmax(col_max[j], pair.logit);
          row_total[i].add(pair.logit);
          col_total[j].add(pair.logit);
          row_values[i].add(pair.function);
          col_values[j].add(pair.function);
          row_teacher.maximum[i] = std::fmax(row_teacher.maximum[i], pair.teacher);
          col_teacher.maximum[j] = std::fmax(col_teacher.maximum[j], pair.teacher);
        }
      }
    }
    for (int i = 0; i < inputs.n; ++i) {
      for (int j = 0; j < inputs.m; ++j) {
        if (at(i, j).takes_part) {
          row_log_sum[i] += std::exp(at(i, j).logit - row_max[i]);
          col_log_sum[j] += std::exp(at(i, j).logit - col_max[j]);
          row_teacher.log_sum[i] += std::exp(at(i, j).teacher - row_teacher.maximum[i]);
          col_teacher.log_sum[j] += std::exp(at(i, j).teacher - col_teacher.maximum[j]);
        }
      }
    }
    for (int i = 0; i < inputs.n; ++i) {
      for (int j = 0; j < inputs.m; ++j) {
        if (at(i, j).takes_part) {
          row_teacher.mean[i].add(at(i, j).logit * row_share(i, j));
          col_teacher.mean[j].add(at(i, j).logit * col_share(i, j));
        }
      }
    }
    for (std::vector<double>* sums : {&row_log_sum, &col_log_sum, &row_teacher.log_sum, &col_teacher.log_sum}) {
      for (double& sum : *sums) {
        sum = std::log(sum);
      }
    }
  }

  const Pair& at(int i, int j) const {
    return pairs[static_cast<size_t>(i) * inputs.m + j];
  }

 private:
  // Before the logarithms are taken.
  double row_share(int i, int j) const {
    return std::exp(at(i, j).teacher - row_teacher.maximum[i]) / row_teacher.log_sum[i];
  }

  double col_share(int i, int j) const {
    return std::exp(at(i, j).teacher - col_teacher.maximum[j]) / col_teacher.log_sum[j];
  }

  double dot(int i, size_t vector) const {
    double sum = 0;
    for (int k = 0; k < inputs.options.features; ++k) {
      sum += inputs.x[static_cast<size_t>(i) * inputs.options.features + k] *
             inputs.y[vector * inputs.options.features + k];
    }
    return sum;
  }

  Pair pair_of(int i, int j) const {
    const auto value_or = [](const Floats& values, int index, double otherwise) {
      return values.empty() ? otherwise : values[index];
    };
    const int members = inputs.options.members;
    Pair pair;
    if (members == 0) {
      pair.value = dot(i, j);
    } else {
      double outside = inputs.square[i];
      for (int t = 0, place = 0; t < members; ++t) {
        double coordinate = 0;
        for (int s = 0; s <= t; ++s, ++place) {
          coordinate += double{inputs.inverse[static_cast<size_t>(place) * inputs.m + j]} *
                        dot(i, static_cast<size_t>(j) * members + s);
        }
        pair.coordinates.push_back(coordinate);
        outside -= coordinate * coordinate;
      }
      pair.value = -std::sqrt(std::fmax(outside, 0));
    }
    pair.scale = value_or(inputs.row_scale, i, 1) * value_or(inputs.col_scale, j, 1);
    pair.logit = pair.value * pair.scale + value_or(inputs.row_bias, i, 0) + value_or(inputs.col_bias, j, 0);
    pair.named_by_row = !inputs.row_exclude.empty() && inputs.row_exclude[i] == j;
    pair.named_by_col = !inputs.col_exclude.empty() && inputs.col_exclude[j] == i;
    const bool by_ids = inputs.row_ids.empty() || (inputs.row_ids[i] == inputs.col_ids[j]) == inputs.options.equal;
    pair.takes_part = by_ids && !pair.named_by_row && !pair.named_by_col;
    for (int k = 0; k < inputs.second_features(); ++k) {
      pair.second += inputs.u[static_cast<size_t>(i) * inputs.second_features() + k] *
                     inputs.v[static_cast<size_t>(j) * inputs.second_features() + k];
    }
    if (inputs.options.ceilings) {
      const double similarity = inputs.options.second ? pair.second : pair.logit;
      const bool above = similarity > value_or(inputs.row_ceiling, i, INFINITE) ||
                         similarity > value_or(inputs.col_ceiling, j, INFINITE);
      pair.takes_part = pair.takes_part && above == inputs.options.above;
    }
    pair.second_scale = value_or(inputs.teacher_row_scale, i, 1) * value_or(inputs.teacher_col_scale, j, 1);
    pair.teacher = !inputs.teaches() ? pair.logit
                                     : pair.second * pair.second_scale + value_or(inputs.teacher_row_bias, i, 0) +
                                           value_or(inputs.teacher_col_bias, j, 0);
    evaluate(inputs.options.function, pair.logit, pair.function, pair.derivative);
    return pair;
  }
};

// Relative to the size of a logit's terms: of products in float32, or in TF32, whose operands have 11 bits.
double tolerance_of(const Case& options) {
  return (options.tf32 ? 2e-2 : 2e-5) * (options.members > 0 ? 5 : 1);
}

int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

struct Partials {
  Floats maximum, sum, total, teacher_maximum, teacher_sum, moment;
  std::vector<double> values;

  Partials(const Case& options, bool wanted, size_t size) {
    const Floats unwritten(wanted ? size : 0, UNWRITTEN);
    if (options.reduction == Reduction::sum) {
      values.assign(wanted ? size : 0, UNWRITTEN);
      return;
    }
    maximum = sum = unwritten;
    if (options.members > 0) {
      total = unwritten;
    }
    if (options.reduction == Reduction::expectation) {
      moment = unwritten;
      if (options.second) {
        teacher_maximum = teacher_sum = unwritten;
      }
    }
  }

  bool empty() const {
    return maximum.empty() && values.empty();
  }

  Part part() {
    return {
        if_any(maximum),
        if_any(sum),
        if_any(total),
        if_any(teacher_maximum),
        if_any(teacher_sum),
        if_any(moment),
        values.empty() ? nullptr : values.data()};
  }

  // The softmax that has the moments.
  Part of_mean() {
    const Part all = part();
    return {
        teacher_maximum.empty() ? all.maximum : all.teacher_maximum,
        teacher_sum.empty() ? all.sum : all.teacher_sum,
        nullptr,
        nullptr,
        nullptr,
        all.moment,
        nullptr};
  }
};

void expect_statistics(
    const char* what,
    const Case& options,
    const Floats& maximum,
    const Floats& log_sum,
    const std::vector<double>& true_maximum,
    const std::vector<double>& true_log_sum) {
  for (size_t i = 0; i < maximum.size(); ++i) {
    const double allowed = tolerance_of(options) * (5 + std::fabs(true_maximum[i]));
    expect((std::string(what) + "_max").c_str(), i, maximum[i], true_maximum[i], allowed);
    if (std::isfinite(true_maximum[i])) {
      const double lse = true_maximum[i] + true_log_sum[i];
      expect((std::string(what) + "_lse").c_str(), i, double{maximum[i]} + log_sum[i], lse, allowed);
    } else {
      expect((std::string(what) + "_log_sum").c_str(), i, log_sum[i], -INFINITE, 0);
    }
  }
}

void expect_totals(
    const char* what, const Case& options, const Floats& partials, int parts, const std::vector<Sum>& totals) {
  for (size_t i = 0; i < totals.size() && !partials.empty(); ++i) {
    double total = 0;
    for (int part = 0; part < parts; ++part) {
      total += partials[part * totals.size() + i];
    }
    expect(what, i, total, totals[i].value, tolerance_of(options) * (1 + totals[i].size));
  }
}

// What a direction of `forward` gave, joined: `true_values` of a sum, or the statistics.
void check_direction(
    const char* what,
    const Case& options,
    Partials& partials,
    int parts,
    Partials* mirror,
    int mirrors,
    const std::vector<double>& true_maximum,
    const std::vector<double>& true_log_sum,
    const std::vector<Sum>& true_totals,
    const std::vector<Sum>& true_values,
    const Softmaxes& of_teacher) {
  const size_t size = true_maximum.size();
  for (size_t i = 0; i < size && options.reduction == Reduction::sum; ++i) {
    double value = 0;
    for (int part = 0; part < parts; ++part) {
      value += partials.values[part * size + i];
    }
    for (int part = 0; part < mirrors; ++part) {
      value += mirror->values[part * size + i];
    }
    expect(what, i, value, true_values[i].value, tolerance_of(options) * (1 + true_values[i].size));
  }
  if (options.reduction == Reduction::sum) {
    return;
  }
  Floats maximum(size, UNWRITTEN), log_sum(size, UNWRITTEN), mean(size, UNWRITTEN);
  const auto join = [&](Part part, Part of_mirror, float* of_mean) {
    succeed(
        "merge",
        merge(
            part, parts, of_mirror, mirrors, maximum.data(), log_sum.data(), of_mean, static_cast<int>(size), nullptr));
  };
  join(partials.part(), mirror == nullptr ? Part{} : mirror->part(), nullptr);
  expect_statistics(what, options, maximum, log_sum, true_maximum, true_log_sum);
  expect_totals(what, options, partials.total, parts, true_totals);
  if (options.reduction == Reduction::expectation) {
    join(partials.of_mean(), mirror == nullptr ? Part{} : mirror->of_mean(), mean.data());
    expect_statistics(what, options, maximum, log_sum, of_teacher.maximum, of_teacher.log_sum);
    for (size_t i = 0; i < size; ++i) {
      expect(what, i, mean[i], of_teacher.mean[i].value, 2 * tolerance_of(options) * (5 + of_teacher.mean[i].size));
    }
  }
}

// `tiles` in a group of rows and in a strip of columns.
void check_forward(Inputs& inputs, const Truth& truth, int tiles) {
  const Case& options = inputs.options;
  const int n = inputs.n, m = inputs.m;
  const Tiling tile = tiling(options.reduction, options.members);
  const int rows_per_group = tiles * tile.rows, cols_per_strip = tiles * tile.cols;
  const int groups = divide_up(n, rows_per_group), strips = divide_up(m, cols_per_strip);
  Partials row(options, options.rows || options.mirrored, static_cast<size_t>(strips) * n);
  Partials col(options, options.cols || options.mirrored, static_cast<size_t>(groups) * m);
  succeed("forward", forward(inputs.problem(), row.part(), col.part(), rows_per_group, cols_per_strip, nullptr));
  if (!row.empty()) {
    check_direction(
        "row",
        options,
        row,
        strips,
        options.mirrored ? &col : nullptr,
        options.mirrored ? groups : 0,
        truth.row_max,
        truth.row_log_sum,
        truth.row_total,
        truth.row_values,
        truth.row_teacher);
  }
  if (!col.empty() && !options.mirrored) {
    check_direction(
        "col",
        options,
        col,
        groups,
        nullptr,
        0,
        truth.col_max,
        truth.col_log_sum,
        truth.col_total,
        truth.col_values,
        truth.col_teacher);
  }
}

void check_excluded(Inputs& inputs, const Truth& truth) {
  Floats logits(inputs.n, UNWRITTEN);
  succeed("excluded", excluded(inputs.problem(), logits.data(), nullptr));
  for (int i = 0; i < inputs.n; ++i) {
    const int j = inputs.row_exclude[i];
    const double expected = j < 0 ? -INFINITE : truth.at(i, j).logit;
    expect("excluded", i, logits[i], expected, 2e-5 * (5 + std::fabs(expected)));
  }
}

// Gradients that come in, and with them those of every logit.
struct Gradients {
  Floats row_weight, col_weight, row_max, col_max, row_excluded, col_excluded, row_total, col_total;
  Floats row_share, col_share, row_share_max, col_share_max, row_mean, col_mean;
  std::vector<Sum> of_logits, of_teacher;
  float unit[2] = {1, 1};
  bool teaches;

  explicit Gradients(const Truth& truth) {
    const Inputs& inputs = truth.inputs;
    const Case& options = inputs.options;
    teaches = inputs.teaches();
    const bool is_sum = options.reduction == Reduction::sum, is_mean = options.reduction == Reduction::expectation;
    if (is_sum) {
      row_weight = options.rows ? random_floats(inputs.n, 0, 1) : Floats();
      col_weight = options.mirrored ? row_weight : options.cols ? random_floats(inputs.m, 0, 1) : Floats();
    }
    if (options.rows && !is_sum) {
      weigh(truth.row_max, truth.row_log_sum, row_weight, row_max);
    }
    if (options.cols && !is_sum) {
      weigh(truth.col_max, truth.col_log_sum, col_weight, col_max);
    }
    if (options.rows && is_mean) {
      weigh(truth.row_teacher.maximum, truth.row_teacher.log_sum, row_share, row_share_max);
      row_mean = means(truth.row_teacher);
    }
    if (options.cols && is_mean) {
      weigh(truth.col_teacher.maximum, truth.col_teacher.log_sum, col_share, col_share_max);
      col_mean = means(truth.col_teacher);
    }
    if (options.exclude && options.members == 0 && !is_mean) {
      row_excluded = random_floats(inputs.n, 0, 0.1);
      col_excluded = options.mirrored ? row_excluded : Floats();
    }
    if (options.members > 0) {
      row_total = options.rows ? random_floats(inputs.n, 0, 0.01) : Floats();
      col_total = options.cols ? random_floats(inputs.m, 0, 0.01) : Floats();
    }
    double largest = 0, largest_of_teacher = 0;
    for (int i = 0; i < inputs.n; ++i) {
      for (int j = 0; j < inputs.m; ++j) {
        const Pair& pair = truth.at(i, j);
        of_logits.push_back(is_sum ? of_value(pair, i, j) : of_logit(pair, i, j));
        of_teacher.push_back(of_mean(pair, i, j, of_logits.back()));
        largest = std::fmax(largest, of_logits.back().size * std::fabs(pair.scale));
        largest_of_teacher = std::fmax(largest_of_teacher, of_teacher.back().size * std::fabs(pair.second_scale));
      }
    }
    if (options.dtype == Dtype::float16) {
      unit[0] = static_cast<float>(largest * 0x1p-14);
      unit[1] = static_cast<float>(largest_of_teacher * 0x1p-14);
    }
  }

  Incoming incoming() const {
    return {
        if_any(row_weight),
        if_any(col_weight),
        if_any(row_max),
        if_any(col_max),
        if_any(row_excluded),
        if_any(col_excluded),
        if_any(row_total),
        if_any(col_total),
        if_any(row_share),
        if_any(col_share),
        teaches ? if_any(row_share_max) : nullptr,
        teaches ? if_any(col_share_max) : nullptr,
        if_any(row_mean),
        if_any(col_mean)};
  }

 private:
  static Floats means(const Softmaxes& softmaxes) {
    Floats means;
    for (const Sum& mean : softmaxes.mean) {
      means.push_back(static_cast<float>(mean.value));
    }
    return means;
  }

  Sum of_value(const Pair& pair, int i, int j) const {
    Sum gradient;
    if (pair.named_by_row) {
      gradient.add(row_excluded[i]);
    }
    if (pair.named_by_col) {
      gradient.add(col_excluded[j]);
    }
    if (pair.takes_part) {
      for (const float weight : {row_weight.empty() ? 0 : row_weight[i], col_weight.empty() ? 0 : col_weight[j]}) {
        gradient.add(weight * pair.derivative);
        gradient.size += std::fabs(weight);  // a derivative has the error of its logit, which may be 0
      }
    }
    return gradient;
  }

  // Of means: what a pair has of them by its logit is added to its gradient; by that of the teacher, if it is another.
  Sum of_mean(const Pair& pair, int i, int j, Sum& of_logit) const {
    Sum of_teacher;
    const auto add = [&](const Floats& share, const Floats& maximum, const Floats& mean, int index) {
      if (!share.empty() && pair.takes_part) {
        const double weight = share[index] * std::exp(pair.teacher - maximum[index]);
        Sum& other = teaches ? of_teacher : of_logit;
        of_logit.add(weight);
        other.add(weight * (pair.logit - mean[index]));
        other.size += std::fabs(weight) * (1 + std::fabs(pair.logit) + std::fabs(mean[index]));
      }
    };
    add(row_share, row_share_max, row_mean, i);
    add(col_share, col_share_max, col_mean, j);
    return of_teacher;
  }

  static void weigh(
      const std::vector<double>& true_max, const std::vector<double>& log_sum, Floats& weight, Floats& maximum) {
    weight = random_floats(static_cast<int>(true_max.size()), 0, 1);
    for (size_t i = 0; i < weight.size(); ++i) {
      const bool empty = true_max[i] == -INFINITE;
      weight[i] = empty ? 0 : static_cast<float>(weight[i] * std::exp(-log_sum[i]));
      maximum.push_back(static_cast<float>(empty ? INFINITE : true_max[i]));
    }
  }

  Sum of_logit(const Pair& pair, int i, int j) const {
    Sum gradient;
    const auto add = [&](const Floats& values, int index, double factor) {
      gradient.add(values.empty() ? 0 : values[index] * factor);
    };
    if (pair.named_by_row) {
      add(row_excluded, i, 1);
    }
    if (pair.named_by_col) {
      add(col_excluded, j, 1);
    }
    if (pair.takes_part) {
      add(row_weight, i, row_max.empty() ? 0 : std::exp(pair.logit - row_max[i]));
      add(col_weight, j, col_max.empty() ? 0 : std::exp(pair.logit - col_max[j]));
      add(row_total, i, 1);
      add(col_total, j, 1);
    }
    return gradient;
  }
};

double scale_or_one(const Floats& scales, int index) {
  return scales.empty() ? 1 : scales[index];
}

void expect_sums(
    const char* what, const Case& options, const Floats& partials, int parts, const std::vector<Sum>& expected) {
  for (size_t i = 0; i < expected.size() && !partials.empty(); ++i) {
    double sum = 0;
    for (int part = 0; part < parts; ++part) {
      sum += partials[part * expected.size() + i];
    }
    expect(what, i, sum, expected[i].value, 5 * tolerance_of(options) * (1e-3 + expected[i].size));
  }
}

// A part of the plane: whole tiles, or as far as the plane goes.
void check_block(
    Inputs& inputs, const Truth& truth, const Gradients& gradients, int first_row, int first_col, int rows, int cols) {
  const Case& options = inputs.options;
  const Tiling tile = tiling(options.reduction, options.members);
  const int row_parts = divide_up(cols, tile.cols), col_parts = divide_up(rows, tile.rows);
  const int stride = divide_up(cols, 16) * 16;
  const bool volumes = options.members > 0, features = !options.no_gradient;
  const size_t matrix = static_cast<size_t>(rows) * stride;
  const int planes = inputs.teaches() ? 2 : inputs.columns();
  Features coefficients(options.dtype, features ? matrix * planes : 0);
  Floats row_scale(static_cast<size_t>(row_parts) * rows, UNWRITTEN), row_bias(volumes ? Floats() : row_scale);
  Floats along(volumes && features ? row_scale : Floats());
  Floats col_scale(static_cast<size_t>(col_parts) * cols, UNWRITTEN), col_bias(volumes ? Floats() : col_scale);
  Floats teacher_row_scale(inputs.teaches() ? row_scale : Floats()), teacher_row_bias(teacher_row_scale);
  Floats teacher_col_scale(inputs.teaches() ? col_scale : Floats()), teacher_col_bias(teacher_col_scale);
  succeed(
      "block",
      block(
          inputs.problem(),
          gradients.incoming(),
          options.dtype == Dtype::float16 ? gradients.unit : nullptr,
          features ? coefficients.data() : nullptr,
          planes,
          {row_scale.data(), if_any(row_bias), if_any(along), if_any(teacher_row_scale), if_any(teacher_row_bias)},
          {col_scale.data(), if_any(col_bias), nullptr, if_any(teacher_col_scale), if_any(teacher_col_bias)},
          {first_row, first_col, rows, cols, stride},
          nullptr));
  std::vector<Sum> row_scales(rows), row_biases(rows), alongs(rows), col_scales(cols), col_biases(cols);
  std::vector<Sum> teacher_row_scales(rows), teacher_row_biases(rows);
  std::vector<Sum> teacher_col_scales(cols), teacher_col_biases(cols);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      const Pair& pair = truth.at(first_row + i, first_col + j);
      const Sum& gradient = gradients.of_logits[static_cast<size_t>(first_row + i) * inputs.m + first_col + j];
      row_scales[i].add(gradient, pair.value * scale_or_one(inputs.col_scale, first_col + j));
      col_scales[j].add(gradient, pair.value * scale_or_one(inputs.row_scale, first_row + i));
      row_biases[i].add(gradient, 1);
      col_biases[j].add(gradient, 1);
      double factor = pair.scale;
      if (volumes) {
        factor /= -pair.value;  // no distance of a random x is at its minimum
        alongs[i].add(gradient, factor);
      }
      factor /= gradients.unit[0];
      for (int t = 0; t < inputs.columns() && features; ++t) {
        const double expected = gradient.value * factor * (volumes ? pair.coordinates[t] : 1);
        // a coordinate is at most |x|, and has its error
        const double size = gradient.size * std::fabs(factor) * (volumes ? std::sqrt(inputs.square[first_row + i]) : 1);
        const double allowed = rounding_of(options.dtype) * std::fabs(expected) + 5 * tolerance_of(options) * size;
        const double least = options.dtype == Dtype::float16 ? 0x1p-24 : 1e-9;
        const size_t place = t * matrix + static_cast<size_t>(i) * stride + j;
        expect("coefficients", place, coefficients[place], expected, allowed + least);
      }
      if (inputs.teaches()) {
        const Sum& of_pair = gradients.of_teacher[static_cast<size_t>(first_row + i) * inputs.m + first_col + j];
        const size_t place = matrix + static_cast<size_t>(i) * stride + j;
        const double teacher_factor = pair.second_scale / gradients.unit[1], expected = of_pair.value * teacher_factor;
        const double size = of_pair.size * std::fabs(teacher_factor);
        const double allowed = rounding_of(options.dtype) * std::fabs(expected) + 5 * tolerance_of(options) * size;
        const double least = options.dtype == Dtype::float16 ? 0x1p-24 : 1e-9;
        expect("coefficients", place, coefficients[place], expected, allowed + least);
        teacher_row_scales[i].add(of_pair, pair.second * scale_or_one(inputs.teacher_col_scale, first_col + j));
        teacher_col_scales[j].add(of_pair, pair.second * scale_or_one(inputs.teacher_row_scale, first_row + i));
        teacher_row_biases[i].add(of_pair, 1);
        teacher_col_biases[j].add(of_pair, 1);
      }
    }
  }
  expect_sums("row_sums.teacher_scale", options, teacher_row_scale, row_parts, teacher_row_scales);
  expect_sums("row_sums.teacher_bias", options, teacher_row_bias, row_parts, teacher_row_biases);
  expect_sums("col_sums.teacher_scale", options, teacher_col_scale, col_parts, teacher_col_scales);
  expect_sums("col_sums.teacher_bias", options, teacher_col_bias, col_parts, teacher_col_biases);
  expect_sums("row_sums.scale", options, row_scale, row_parts, row_scales);
  expect_sums("row_sums.bias", options, row_bias, row_parts, row_biases);
  expect_sums("row_sums.along", options, along, row_parts, alongs);
  expect_sums("col_sums.scale", options, col_scale, col_parts, col_scales);
  expect_sums("col_sums.bias", options, col_bias, col_parts, col_biases);
}

void check_rows(Inputs& inputs, const Truth& truth, const Gradients& gradients, int cols_per_strip) {
  const Case& options = inputs.options;
  const int n = inputs.n, depth = options.features;
  const int strips = divide_up(inputs.m, cols_per_strip);
  const bool is_float = strips > 1, features = !options.no_gradient;
  const size_t size = static_cast<size_t>(n) * depth;
  Features gradient(is_float ? Dtype::float32 : options.dtype, features ? strips * size : 0);
  Floats scale(static_cast<size_t>(strips) * n, UNWRITTEN), bias(scale);
  succeed(
      "rows",
      rows(
          inputs.problem(),
          gradients.incoming(),
          options.dtype == Dtype::float16 ? gradients.unit : nullptr,
          features ? gradient.data() : nullptr,
          is_float,
          {scale.data(), bias.data(), nullptr, nullptr, nullptr},
          cols_per_strip,
          nullptr));
  std::vector<Sum> scales(n), biases(n), of_features(features ? size : 0);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < inputs.m; ++j) {
      const Pair& pair = truth.at(i, j);
      const Sum& of_logit = gradients.of_logits[static_cast<size_t>(i) * inputs.m + j];
      scales[i].add(of_logit, pair.value * scale_or_one(inputs.col_scale, j));
      biases[i].add(of_logit, 1);
      for (int k = 0; k < depth && features; ++k) {
        of_features[static_cast<size_t>(i) * depth + k].add(
            of_logit, pair.scale * inputs.y[static_cast<size_t>(j) * depth + k]);
      }
    }
  }
  for (size_t place = 0; place < of_features.size(); ++place) {
    double sum = 0;
    for (int strip = 0; strip < strips; ++strip) {
      sum += gradient[strip * size + place];
    }
    // once for the coefficients, and once for the result
    const double relative = 2 * rounding_of(options.dtype) + 5 * tolerance_of(options);
    expect("gradient", place, sum, of_features[place].value, relative * (1e-3 + of_features[place].size));
  }
  expect_sums("sums.scale", options, scale, strips, scales);
  expect_sums("sums.bias", options, bias, strips, biases);
}

void check_attention(Inputs& inputs, const Truth& truth, int cols_per_strip) {
  const Case& options = inputs.options;
  const int n = inputs.n, depth = options.features, strips = divide_up(inputs.m, cols_per_strip);
  float unit = 0;
  for (const Pair& pair : truth.pairs) {
    unit = std::fmax(unit, static_cast<float>(std::fabs(pair.scale) * 0x1p-14));
  }
  Partials row(options, true, static_cast<size_t>(strips) * n);
  Floats of_x(static_cast<size_t>(strips) * n * depth, UNWRITTEN), of_scale(static_cast<size_t>(strips) * n, UNWRITTEN);
  succeed(
      "attention",
      attention(
          inputs.problem(),
          options.dtype == Dtype::float16 ? &unit : nullptr,
          row.part(),
          {of_x.data(), of_scale.data()},
          cols_per_strip,
          nullptr));
  Floats maximum(n, UNWRITTEN), log_sum(n, UNWRITTEN);
  succeed("merge", merge(row.part(), strips, Part{}, 0, maximum.data(), log_sum.data(), nullptr, n, nullptr));
  expect_statistics("row", options, maximum, log_sum, truth.row_max, truth.row_log_sum);
  for (size_t place = 0; place < of_scale.size(); ++place) {
    const int i = static_cast<int>(place) % n, first = static_cast<int>(place) / n * cols_per_strip;
    const int last = std::min(first + cols_per_strip, inputs.m);
    double sum = 0;  // relative to the maximum of the whole row
    Sum scale;
    std::vector<Sum> x(depth);
    for (int j = first; j < last; ++j) {
      const Pair& pair = truth.at(i, j);
      const double term = pair.takes_part ? std::exp(pair.logit - truth.row_max[i]) : 0;
      sum += term;
      scale.add(term * pair.value * scale_or_one(inputs.col_scale, j));
      for (int k = 0; k < depth; ++k) {
        x[k].add(term * pair.scale * inputs.y[static_cast<size_t>(j) * depth + k]);
      }
    }
    const double share = sum == 0 ? 1 : 1 / sum, error = 5 * tolerance_of(options);
    expect("slopes.scale", place, of_scale[place], scale.value * share, error * (1e-3 + scale.size * share));
    for (int k = 0; k < depth; ++k) {
      const double allowed = (rounding_of(options.dtype) + error) * (1e-3 + x[k].size * share);
      expect("slopes.x", place * depth + k, of_x[place * depth + k], x[k].value * share, allowed);
    }
  }
}

void check_factor(Dtype dtype, int count, int members, int features) {
  Features vectors(dtype, static_cast<size_t>(count) * members * features);
  for (size_t i = 0; i < static_cast<size_t>(count) * members * features; ++i) {
    vectors.set(i, static_cast<float>(normal()));
  }
  for (int k = 0; k < features && members > 1; ++k) {  // in the first set, one vector is twice another
    const float value = static_cast<float>(vectors[k]);
    vectors.set(static_cast<size_t>(members - 1) * features + k, 2 * value);
  }
  const size_t matrix = static_cast<size_t>(members) * members;
  std::vector<double> inverse(count * matrix, UNWRITTEN), volume(count, UNWRITTEN);
  succeed("factor", factor(vectors.data(), dtype, count, members, features, inverse.data(), volume.data(), nullptr));
  for (int set = 0; set < count; ++set) {
    const Factor expected = factor_of(vectors, set, members, features);
    expect("volume", set, volume[set], expected.volume, 1e-9 * (1e-3 + expected.volume));
    for (size_t entry = 0; entry < matrix; ++entry) {
      expect("inverse", set * matrix + entry, inverse[set * matrix + entry], expected.inverse[entry], 1e-9);
    }
  }
}

void check(const Case& options, const std::vector<Run>& runs) {
  generator.seed(1);
  // tiles of rows and columns, with tails
  const Tiling tile = tiling(options.reduction, options.members);
  const int n = options.small ? 5 : tile.rows + 7;
  const int m = options.mirrored ? n : options.small ? 3 : 2 * tile.cols + 5;
  Inputs inputs(options, n, m);
  const Truth truth(inputs);
  const Gradients gradients(truth);
  const Tiling of_rows = rows_tiling(options.dtype, options.features);
  for (const Run& run : runs) {
    begin(options.name, run);
    check_forward(inputs, truth, 1);
    check_forward(inputs, truth, 2);
    if (options.exclude && options.members == 0 && options.reduction != Reduction::expectation) {
      check_excluded(inputs, truth);
    }
    check_block(inputs, truth, gradients, 0, 0, n, m);
    if (!options.small) {
      check_block(inputs, truth, gradients, 0, tile.cols, tile.rows, std::min(tile.cols, m - tile.cols));
      check_block(inputs, truth, gradients, tile.rows, tile.cols, n - tile.rows, m - tile.cols);
    }
    const bool plain = options.reduction == Reduction::logsumexp && !options.ceilings;
    if (options.members == 0 && of_rows.rows > 0 && plain) {
      check_rows(inputs, truth, gradients, of_rows.cols);
      check_rows(inputs, truth, gradients, divide_up(m, of_rows.cols) * of_rows.cols);
      check_attention(inputs, truth, 3 * of_rows.cols);
    }
  }
}

void check_factors(const std::vector<Run>& runs) {
  const Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  for (const Run& run : runs) {
    begin("factor", run);
    generator.seed(2);
    for (int members = 1; members <= 5; ++members) {
      check_factor(dtypes[members % 3], 35, members, 16 + members);
    }
    check_factor(Dtype::bfloat16, 3, 3, 72);
  }
}

}  // namespace

int main(int count, char** values) {
  const std::string wanted = count > 1 ? values[1] : "";
  std::vector<Run> runs;
  if (count > 2) {
    runs.push_back({std::strtoull(values[2], nullptr, 10), count > 3});
  } else {
    runs = {{0, false}, {1, true}, {2, false}};
  }
  for (const Case& options : CASES) {
    if (wanted.empty() || wanted == options.name) {
      check(options, runs);
    }
  }
  if (wanted.empty() || wanted == "factor") {
    check_factors(runs);
  }
  if (current.empty()) {
    stop("there is no such case: " + wanted);
  }
  std::printf("ok\n%s", contrastive_ops_host_wavefronts());
}
