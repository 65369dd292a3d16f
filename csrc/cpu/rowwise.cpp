#include "rowwise.h"
#include "memory.h"
#include "tasks.h"
#include "tile.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace contrastive_ops {
namespace {

using at::Tensor;

constexpr int64_t kRows = 64;     // of a task
constexpr int64_t kPiece = 4096;  // rows that are copied at a time, so that no copy of all of them is made

// Whether vectors can be read and written where they are.
template <typename T>
bool in_place(const Tensor& vectors) {
  return vectors.scalar_type() == c10::CppTypeToScalarType<T>::value && vectors.stride(2) == 1;
}

// The vectors of row n, behind those that `pointers` has.
template <typename T, typename Pointer>
void append_vectors(const Tensor& tensor, T* begin, int64_t n, std::vector<Pointer>& pointers) {
  for (const auto t : c10::irange(tensor.size(1))) {
    pointers.push_back(begin + n * tensor.stride(0) + t * tensor.stride(1));
  }
}

// work(n, state) for the rows [0, count), in parallel; `numbers` are those of a row that are read.
template <typename State, typename Work>
void for_each_row(int64_t count, int64_t numbers, const Work& work) {
  for_each_task((count + kRows - 1) / kRows, kMoveCost * count * numbers, [&](int64_t task) {
    State state;
    for (int64_t n = task * kRows; n < std::min(count, (task + 1) * kRows); ++n) {
      work(n, state);
    }
  });
}

template <typename T>
void products_of(const Tensor& a, const Tensor& b, const Tensor& products) {
  struct State {
    std::vector<const T*> a;
    std::vector<const T*> b;
  };
  const bool same = a.is_same(b);
  const Tensor left = with_dense_vectors<T>(a);
  const Tensor right = same ? left : with_dense_vectors<T>(b);
  const T* left_begin = left.template const_data_ptr<T>();
  const T* right_begin = right.template const_data_ptr<T>();
  double* target = products.mutable_data_ptr<double>();
  const int64_t numbers = (left.size(1) + (same ? 0 : right.size(1))) * left.size(2);
  for_each_row<State>(left.size(0), numbers, [&](int64_t n, State& state) {
    state.a.clear();
    state.b.clear();
    append_vectors(left, left_begin, n, state.a);
    append_vectors(right, right_begin, n, state.b);
    tile_kernels<T>().dot_products(
        left.size(1),
        right.size(1),
        left.size(2),
        state.a.data(),
        state.b.data(),
        same,
        target + n * products.stride(0));
  });
}

template <typename T>
void combine(const Tensor& weights, const std::vector<Tensor>& vectors, const Tensor& result) {
  struct State {
    std::vector<const T*> vectors;
    std::vector<T*> result;
  };
  std::vector<Tensor> sources;
  std::vector<const T*> begins;
  for (const Tensor& tensor : vectors) {
    sources.push_back(with_dense_vectors<T>(tensor));
    begins.push_back(sources.back().template const_data_ptr<T>());
  }
  const bool direct = in_place<T>(result);
  const Tensor target =
      direct ? result : at::empty(result.sizes(), result.options().dtype(c10::CppTypeToScalarType<T>::value));
  T* target_begin = target.template mutable_data_ptr<T>();
  const double* factors = weights.const_data_ptr<double>();
  for_each_row<State>(result.size(0), weights.size(2) * result.size(2), [&](int64_t n, State& state) {
    state.vectors.clear();
    state.result.clear();
    for (const auto i : c10::irange(sources.size())) {
      append_vectors(sources[i], begins[i], n, state.vectors);
    }
    append_vectors(target, target_begin, n, state.result);
    tile_kernels<T>().combine(
        weights.size(1),
        weights.size(2),
        result.size(2),
        factors + n * weights.stride(0),
        state.vectors.data(),
        state.result.data());
  });
  if (!direct) {
    result.copy_(target);
  }
}

// f(zero) with a zero of the dtype that vectors of this dtype are summed from.
template <typename F>
void with_zero(c10::ScalarType dtype, const F& f) {
  if (dtype == at::kDouble) {
    f(double());
  } else {
    f(float());
  }
}

// work(first row, number of rows) for all rows at once, or piece by piece where they are copied.
template <typename Work>
void for_each_piece(int64_t n, bool copied, const Work& work) {
  const int64_t piece = copied ? kPiece : std::max<int64_t>(1, n);
  for (int64_t begin = 0; begin < n; begin += piece) {
    work(begin, std::min(piece, n - begin));
  }
}

// c t^p and its derivative.
std::tuple<double, double> power_of(const std::optional<Tensor>& factor, double multiplier, double power) {
  if (!factor.has_value()) {
    return {multiplier, 0.0};
  }
  const double t = factor->to(at::kDouble).item<double>();
  return {multiplier * std::pow(t, power), multiplier * power * std::pow(t, power - 1.0)};
}

template <typename T>
std::vector<const T*> pointers_to(at::TensorList vectors, std::vector<Tensor>& kept) {
  std::vector<const T*> pointers;
  for (const Tensor& vector : vectors) {
    kept.push_back(vector.to(c10::CppTypeToScalarType<T>::value).contiguous());
    pointers.push_back(kept.back().const_data_ptr<T>());
  }
  return pointers;
}

}  // namespace

std::tuple<Tensor, Tensor> scale(
    const Tensor& x, const std::optional<Tensor>& factor, double multiplier, double power) {
  const Tensor rows = x.unsqueeze(1);
  const Tensor inverse = row_products(rows, rows).view({x.size(0)});
  const double value = std::get<0>(power_of(factor, multiplier, power));
  const Tensor result = at::empty({x.size(0)}, x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  double* length = inverse.mutable_data_ptr<double>();
  with_zero(result.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* scales = result.mutable_data_ptr<T>();
    for (const auto i : c10::irange(x.size(0))) {
      // 0 where 1 / |x| is no number of the dtype, as of a zero row
      const double reciprocal = 1.0 / std::sqrt(length[i]);
      length[i] = reciprocal > static_cast<double>(std::numeric_limits<T>::max()) ? 0.0 : reciprocal;
      scales[i] = static_cast<T>(value * length[i]);
    }
  });
  return {result, inverse};
}

std::tuple<Tensor, Tensor> scale_backward(
    const Tensor& x,
    const Tensor& inverse,
    const std::optional<Tensor>& grad,
    const Tensor& grad_scale,
    const std::optional<Tensor>& factor,
    double multiplier,
    double power,
    bool need_x,
    bool need_factor) {
  const int64_t n = x.size(0);
  const auto [value, derivative] = power_of(factor, multiplier, power);
  const Tensor weights = at::empty({n, 1, grad.has_value() ? 2 : 1}, at::kDouble);
  const Tensor incoming = grad_scale.to(at::kDouble).contiguous();
  const double* length = inverse.const_data_ptr<double>();
  const double* of_scale = incoming.const_data_ptr<double>();
  double* weight = weights.mutable_data_ptr<double>();
  double total = 0.0;
  for (const auto i : c10::irange(n)) {
    total += of_scale[i] * length[i];
    if (grad.has_value()) {
      *weight++ = 1.0;
    }
    *weight++ = -value * of_scale[i] * length[i] * length[i] * length[i];
  }
  const Tensor grad_x = at::empty(need_x ? x.sizes() : at::IntArrayRef({0}), x.options());
  if (need_x) {
    std::vector<Tensor> vectors;
    if (grad.has_value()) {
      vectors.push_back(grad->unsqueeze(1));
    }
    vectors.push_back(x.unsqueeze(1));
    combine_rows(weights, vectors, grad_x.unsqueeze(1));
  }
  return {grad_x, at::full({need_factor ? 1 : 0}, total * derivative, grad_scale.options())};
}

Tensor contrast(
    const Tensor& positive, at::TensorList lse, at::TensorList totals, double factor, double slope, double share) {
  const Tensor result = at::empty({}, positive.options());
  with_zero(positive.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<Tensor> kept;
    const T* s = pointers_to<T>(positive, kept).front();
    const std::vector<const T*> negatives = pointers_to<T>(lse, kept);
    const std::vector<const T*> all = pointers_to<T>(totals, kept);
    double sum = 0.0;
    for (const auto i : c10::irange(positive.size(0))) {
      for (const T* of_direction : negatives) {
        const T z = of_direction[i] - s[i];
        sum += std::max(z, T(0)) + std::log1p(std::exp(-std::abs(z)));
      }
      for (const T* of_direction : all) {
        sum += slope * s[i] - share * of_direction[i];
      }
    }
    *result.mutable_data_ptr<T>() = static_cast<T>(factor * sum);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> contrast_backward(
    const Tensor& grad,
    const Tensor& positive,
    at::TensorList lse,
    bool totals,
    double factor,
    double slope,
    double share) {
  const int64_t n = positive.size(0);
  const auto directions = static_cast<int64_t>(lse.size());
  const double unit = grad.to(at::kDouble).item<double>() * factor;
  const Tensor grad_positive = at::empty({n}, positive.options());
  const Tensor grad_lse = at::empty({directions, n}, positive.options());
  with_zero(positive.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<Tensor> kept;
    const T* s = pointers_to<T>(positive, kept).front();
    const std::vector<const T*> negatives = pointers_to<T>(lse, kept);
    T* of_positive = grad_positive.mutable_data_ptr<T>();
    T* of_lse = grad_lse.mutable_data_ptr<T>();
    for (const auto i : c10::irange(n)) {
      double own = totals ? static_cast<double>(directions) * slope * unit : 0.0;
      for (const auto d : c10::irange(directions)) {
        const double slope_of_softplus = unit / (T(1) + std::exp(s[i] - negatives[d][i]));
        of_lse[d * n + i] = static_cast<T>(slope_of_softplus);
        own -= slope_of_softplus;
      }
      of_positive[i] = static_cast<T>(own);
    }
  });
  return {grad_positive, grad_lse, at::full({totals ? n : 0}, -share * unit, positive.options())};
}

Tensor row_products(const Tensor& a, const Tensor& b) {
  const bool same = a.is_same(b);
  const Tensor products = at::empty({a.size(0), a.size(1), b.size(1)}, a.options().dtype(at::kDouble));
  with_zero(a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for_each_piece(a.size(0), !in_place<T>(a) || !in_place<T>(b), [&](int64_t begin, int64_t count) {
      const Tensor left = a.narrow(0, begin, count);
      const Tensor right = same ? left : b.narrow(0, begin, count);
      products_of<T>(left, right, products.narrow(0, begin, count));
    });
  });
  return products;
}

void combine_rows(const Tensor& weights, at::TensorList vectors, const Tensor& result) {
  const Tensor factors = weights.contiguous();
  with_zero(vectors.front().scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const bool copied = !in_place<T>(result) || !std::all_of(vectors.begin(), vectors.end(), in_place<T>);
    for_each_piece(result.size(0), copied, [&](int64_t begin, int64_t count) {
      std::vector<Tensor> parts;
      for (const Tensor& tensor : vectors) {
        parts.push_back(tensor.narrow(0, begin, count));
      }
      combine<T>(factors.narrow(0, begin, count), parts, result.narrow(0, begin, count));
    });
  });
}

}  // namespace contrastive_ops
