// Sums of a function of s over rows and columns.
//
//   forward: in float32 within a tile, in float64 beyond it
//   g_ij = (u_i + v_j) f'(s_ij), u and v the gradients of the sums
//
// Which function it is, is the same for all threads: one kernel has them all.
#pragma once

#include "logits.cuh"

namespace contrastive_ops::cuda {

template <Function OF>
__device__ __forceinline__ float value_of(float s) {
  if constexpr (OF == Function::softplus) {
    return fmaxf(s, 0.0f) + log1pf(exponential(-fabsf(s)));
  } else if constexpr (OF == Function::relu) {
    return s < 0.0f ? 0.0f : s;  // fmaxf would turn NaN into 0
  } else if constexpr (OF == Function::sigmoid) {
    const float e = exponential(-fabsf(s));
    return (s < 0.0f ? e : 1.0f) * reciprocal(1.0f + e);
  } else if constexpr (OF == Function::square) {
    return s * s;
  } else if constexpr (OF == Function::step) {
    return s > 0.0f ? 1.0f : 0.0f;
  } else {
    return s;
  }
}

// f of all of a thread's pairs.
template <typename Place, Function OF, typename Dots>
__device__ __forceinline__ void apply(Dots& dots) {
  Place::for_each([&](int mi, int nj, int e, int, int) { dots[nj][mi][e] = value_of<OF>(dots[nj][mi][e]); });
}

__device__ __forceinline__ float derivative_of(Function function, float s) {
  switch (function) {
    case Function::softplus:
      return value_of<Function::sigmoid>(s);
    case Function::relu:
      return s > 0.0f ? 1.0f : 0.0f;
    case Function::sigmoid: {
      const float e = exponential(-fabsf(s)), share = reciprocal(1.0f + e);
      return e * share * share;
    }
    case Function::square:
      return 2.0f * s;
    case Function::step:
      return 0.0f;
    default:
      return 1.0f;
  }
}

// The sums of each warp's part of a tile.
template <typename Shape>
struct SumsOfTile {
  struct Statistics {
    double value = 0.0;
  };

  float of_rows[Shape::warps_of_cols][Shape::rows];
  float of_cols[Shape::warps_of_rows][Shape::cols];

  __device__ __forceinline__ void fold_row(Statistics& into, int row, bool) const {
    fold(into, of_rows, row);
  }

  __device__ __forceinline__ void fold_col(Statistics& into, int col, bool) const {
    fold(into, of_cols, col);
  }

  template <int PARTS, int SIZE>
  static __device__ __forceinline__ void fold(Statistics& into, const float (&sums)[PARTS][SIZE], int i) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      into.value += static_cast<double>(sums[part][i]);
    }
  }
};

// The reduction, with a guide or without.
struct Sum {
  using Shape = Tile<0>;
  static constexpr With with = With::guide;
  static constexpr float nothing = 0.0f;

  using Reduced = SumsOfTile<Shape>;
  using Statistics = Reduced::Statistics;

  static __device__ __forceinline__ bool asked(const Part& part) {
    return part.values != nullptr;
  }

  static __device__ __forceinline__ bool more(const Part&, const Part&) {
    return false;
  }

  static __device__ __forceinline__ void evaluate(const Problem& problem, Shape::Dots& dots) {
    switch (problem.function) {
      case Function::softplus:
        return apply<Shape::Place, Function::softplus>(dots);
      case Function::relu:
        return apply<Shape::Place, Function::relu>(dots);
      case Function::sigmoid:
        return apply<Shape::Place, Function::sigmoid>(dots);
      case Function::square:
        return apply<Shape::Place, Function::square>(dots);
      case Function::step:
        return apply<Shape::Place, Function::step>(dots);
      case Function::identity:
        return;
    }
  }

  static __device__ __forceinline__ void reduce(
      Reduced& reduced,
      const Shape::Dots& values,
      const SecondValues<Shape, with>&,
      const Shape::Place& place,
      bool,
      bool,
      bool) {
    float row_sum[Shape::Place::row_count] = {}, col_sum[Shape::Place::col_count] = {};
    Shape::Place::for_each([&](int mi, int nj, int e, int k, int l) {
      row_sum[k] += values[nj][mi][e];
      col_sum[l] += values[nj][mi][e];
    });
    store_sums<Shape>(reduced.of_rows, reduced.of_cols, row_sum, col_sum, place);
  }

  static __device__ __forceinline__ void write(const Part& part, int64_t index, const Statistics& statistics) {
    part.values[index] = statistics.value;
  }

  static __device__ __forceinline__ Statistics read(const Part& part, int64_t index) {
    return {part.values[index]};
  }

  // backward

  template <int SIZE>
  struct Weights {
    float weight[SIZE];
    float excluded[SIZE];

    __device__ void load_rows(const Incoming& incoming, int first, int last) {
      load(incoming.row_weight, incoming.row_excluded, first, last);
    }

    __device__ void load_cols(const Incoming& incoming, int first, int last) {
      load(incoming.col_weight, incoming.col_excluded, first, last);
    }

    __device__ void load(const float* weights, const float* of_excluded, int first, int last) {
      for_side<SIZE>(first, last, [&](int i, int index, bool inside) {
        weight[i] = inside && weights != nullptr ? weights[index] : 0.0f;
        excluded[i] = inside && of_excluded != nullptr ? of_excluded[index] : 0.0f;
      });
    }
  };

  template <typename Place>
  struct Gradient {
    Function function;

    template <int ROWS, int COLS>
    __device__ __forceinline__
    Gradient(const Problem& problem, const Weights<ROWS>&, const Weights<COLS>&, const Place&)
        : function(problem.function) {}

    template <int ROWS>
    __device__ __forceinline__ void begin_row(const Weights<ROWS>&, int) {}

    template <int ROWS, int COLS>
    __device__ __forceinline__ float of_pair(
        float logit, bool takes_part, const Weights<ROWS>& rows, const Weights<COLS>& cols, int i, int j, int) const {
      return takes_part ? (rows.weight[i] + cols.weight[j]) * derivative_of(function, logit) : 0.0f;
    }
  };
};

}  // namespace contrastive_ops::cuda
