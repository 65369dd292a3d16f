// Sums of a function of the logits, and its derivative for backward. Each function is 0 where the logit is -inf: that
// pair takes no part.
#pragma once

#include "coefficients.h"
#include "vectors.h"

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
inline Vec<T> zero_where_absent(Vec<T> logit, Vec<T> value) {
  return Vec<T>::blendv(value, Vec<T>(T(0)), logit == Vec<T>(-kInfinity<T>));
}

template <typename T>
inline Vec<T> one_where_positive(Vec<T> logit) {
  return Vec<T>::blendv(Vec<T>(T(0)), Vec<T>(T(1)), logit > Vec<T>(T(0)));
}

// log(1 + t) for 0 <= t <= 1, to about 1 ulp: t (1 + t p(t)) with p by Remez's algorithm. Only t itself may be tiny,
// not its powers: the processor takes a hundred cycles for numbers below the normal ones.
inline Vec<float> log1p(Vec<float> t) {
  Vec<float> p(-0.00324402517f);
  p = at::vec::fmadd(p, t, Vec<float>(0.0198514623f));
  p = at::vec::fmadd(p, t, Vec<float>(-0.0569595342f));
  p = at::vec::fmadd(p, t, Vec<float>(0.106036549f));
  p = at::vec::fmadd(p, t, Vec<float>(-0.153055926f));
  p = at::vec::fmadd(p, t, Vec<float>(0.196759393f));
  p = at::vec::fmadd(p, t, Vec<float>(-0.249541337f));
  p = at::vec::fmadd(p, t, Vec<float>(0.333299624f));
  p = at::vec::fmadd(p, t, Vec<float>(-0.499999024f));
  return t * at::vec::fmadd(p, t, Vec<float>(1.0f));
}

inline Vec<double> log1p(Vec<double> t) {
  return t.log1p();
}

struct Identity {
  template <typename T>
  static Vec<T> value(Vec<T> s) {
    return zero_where_absent(s, s);
  }
  template <typename T>
  static Vec<T> slope(Vec<T> s) {
    return zero_where_absent(s, Vec<T>(T(1)));
  }
};

struct Sigmoid {
  template <typename T>
  static Vec<T> value(Vec<T> s) {
    const Vec<T> small = exp(s.abs().neg());
    const Vec<T> large = Vec<T>(T(1)) / (small + Vec<T>(T(1)));
    return Vec<T>::blendv(large, large * small, s < Vec<T>(T(0)));
  }
  template <typename T>
  static Vec<T> slope(Vec<T> s) {
    const Vec<T> small = exp(s.abs().neg());
    const Vec<T> large = Vec<T>(T(1)) / (small + Vec<T>(T(1)));
    return large * (large * small);
  }
};

struct Softplus {
  template <typename T>
  static Vec<T> value(Vec<T> s) {
    return at::vec::maximum(s, Vec<T>(T(0))) + log1p(exp(s.abs().neg()));
  }
  template <typename T>
  static Vec<T> slope(Vec<T> s) {
    return Sigmoid::value(s);
  }
};

struct Relu {
  template <typename T>
  static Vec<T> value(Vec<T> s) {
    return at::vec::maximum(s, Vec<T>(T(0)));
  }
  template <typename T>
  static Vec<T> slope(Vec<T> s) {
    return one_where_positive(s);
  }
};

struct Square {
  template <typename T>
  static Vec<T> value(Vec<T> s) {
    return zero_where_absent(s, s * s);
  }
  template <typename T>
  static Vec<T> slope(Vec<T> s) {
    return zero_where_absent(s, s + s);
  }
};

struct Step {
  template <typename T>
  static Vec<T> value(Vec<T> s) {
    return one_where_positive(s);
  }
  template <typename T>
  static Vec<T> slope(Vec<T>) {
    return Vec<T>(T(0));
  }
};

template <typename F>
inline void with_function(Function function, const F& f) {
  switch (function) {
    case Function::identity:
      return f(Identity());
    case Function::softplus:
      return f(Softplus());
    case Function::relu:
      return f(Relu());
    case Function::sigmoid:
      return f(Sigmoid());
    case Function::square:
      return f(Square());
    case Function::step:
      return f(Step());
  }
}

template <bool Stored, typename Of, typename T>
void sums_of(const Tile<T>& tile, T* rows, T* cols) {
  if (cols != nullptr) {
    std::fill_n(cols, kTile, T(0));
  }
  for_each_row_group(tile.rows, [&](int64_t i, auto group) {
    constexpr int kRows = group;
    Vec<T> sum[kRows];
    std::fill_n(sum, kRows, Vec<T>(T(0)));
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      Vec<T> col_sum = cols == nullptr ? Vec<T>(T(0)) : Vec<T>::loadu(cols + j);
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> value = Of::value(LogitRow<Stored, T>(tile, i + r).at(j));
        sum[r] = sum[r] + value;
        col_sum = col_sum + value;
      }
      if (cols != nullptr) {
        col_sum.store(cols + j);
      }
    }
    for (int r = 0; r < kRows && rows != nullptr; ++r) {
      rows[i + r] = sum_of(sum[r]);
    }
  });
}

template <typename T>
void sum(const Tile<T>& tile, Function function, T* rows, T* cols) {
  with_function(function, [&](auto of) {
    with_stored(tile, [&](auto stored) { sums_of<stored.value, decltype(of)>(tile, rows, cols); });
  });
}

template <typename T>
void sum_coefficients(
    const Tile<T>& tile,
    Function function,
    const T* row_grads,
    const T* col_grads,
    const CoefficientSums<T>& sums,
    T* coefficients) {
  with_function(function, [&](auto of) {
    store_coefficients(tile, sums, coefficients, [&](int64_t i, int64_t j, Vec<T> logit) {
      return (Vec<T>(row_grads[i]) + Vec<T>::loadu(col_grads + j)) * decltype(of)::slope(logit);
    });
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
