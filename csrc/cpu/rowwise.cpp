#include "rowwise.h"
#include "memory.h"
#include "tasks.h"
#include "tile.h"

#include <ATen/ops/empty.h>
#include <c10/util/irange.h>

#include <algorithm>
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

// work(n, state) for the rows [0, count), in parallel.
template <typename State, typename Work>
void for_each_row(int64_t count, const Work& work) {
  for_each_task((count + kRows - 1) / kRows, [&](int64_t task) {
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
  for_each_row<State>(left.size(0), [&](int64_t n, State& state) {
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
  for_each_row<State>(result.size(0), [&](int64_t n, State& state) {
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

}  // namespace

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
