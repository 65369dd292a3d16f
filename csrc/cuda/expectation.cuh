// The means of s under the softmax of z over rows and columns, and the log-sum-exps of s.
//
//   forward: the statistics of the log-sum-exps of z, and sums of e^(z - maximum) s beside them; those of s
//   dL/ds_ij = u_i t_ij + p_ij,  dL/dz_ij = u_i t_ij (s_ij - mean_i), and the same of column j
//       t_ij = e^(z_ij - lse of z), u: the gradients of the means;  p_ij: the gradient of the log-sum-exp of s
//
// Where z is s, forward has one softmax, and dL/ds the sum of both.
#pragma once

#include "logsumexp.cuh"

namespace contrastive_ops::cuda {

struct Expectation {
  using Shape = Tile<0, 2>;
  static constexpr With with = With::teacher;
  static constexpr float nothing = -INF;

  using Mean = Softmax<Shape, Totals::weighted>;
  using Logits = Softmax<Shape, Totals::nothing>;

  struct Statistics {
    Mean::Statistics mean;
    Logits::Statistics logits;
  };

  struct Reduced {
    Mean mean;
    Logits logits;

    __device__ __forceinline__ void fold_row(Statistics& into, int row, bool taught) const {
      mean.fold_row(into.mean, row, false);
      if (taught) {
        logits.fold_row(into.logits, row, false);
      }
    }

    __device__ __forceinline__ void fold_col(Statistics& into, int col, bool taught) const {
      mean.fold_col(into.mean, col, false);
      if (taught) {
        logits.fold_col(into.logits, col, false);
      }
    }
  };

  static __device__ __forceinline__ bool asked(const Part& part) {
    return part.maximum != nullptr;
  }

  // Whether z is not s.
  static __device__ __forceinline__ bool more(const Part& row, const Part& col) {
    return row.teacher_maximum != nullptr || col.teacher_maximum != nullptr;
  }

  static __device__ __forceinline__ void evaluate(const Problem&, Shape::Dots&) {}

  static __device__ __forceinline__ void reduce(
      Reduced& reduced,
      const Shape::Dots& logits,
      const SecondValues<Shape, with>& teacher,
      const Shape::Place& place,
      bool rows,
      bool cols,
      bool taught) {
    if (taught) {
      reduced.logits.reduce(logits, logits, place, rows, cols, false);
    }
    reduced.mean.reduce(teacher.dots, logits, place, rows, cols, false);
  }

  static __device__ __forceinline__ void write(const Part& part, int64_t index, const Statistics& statistics) {
    if (part.teacher_maximum == nullptr) {
      Mean::write(part.maximum, part.sum, part.moment, index, statistics.mean);
    } else {
      Mean::write(part.teacher_maximum, part.teacher_sum, part.moment, index, statistics.mean);
      Logits::write(part.maximum, part.sum, nullptr, index, statistics.logits);
    }
  }

  static __device__ __forceinline__ Statistics read(const Part& part, int64_t index) {
    if (part.teacher_maximum == nullptr) {
      return {Mean::read(part.maximum, part.sum, part.moment, index), {}};
    }
    return {
        Mean::read(part.teacher_maximum, part.teacher_sum, part.moment, index),
        Logits::read(part.maximum, part.sum, nullptr, index)};
  }

  // backward

  template <int SIZE>
  struct Weights {
    SoftmaxWeights<SIZE> of_lse, of_mean;
    float mean[SIZE];

    __device__ void load_rows(const Incoming& incoming, int first, int last) {
      const float* teacher_max = incoming.teacher_row_max == nullptr ? incoming.row_max : incoming.teacher_row_max;
      load(incoming.row_weight, incoming.row_max, incoming.row_share, teacher_max, incoming.row_mean, first, last);
    }

    __device__ void load_cols(const Incoming& incoming, int first, int last) {
      const float* teacher_max = incoming.teacher_col_max == nullptr ? incoming.col_max : incoming.teacher_col_max;
      load(incoming.col_weight, incoming.col_max, incoming.col_share, teacher_max, incoming.col_mean, first, last);
    }

    __device__ void load(
        const float* weights,
        const float* maxima,
        const float* shares,
        const float* teacher_maxima,
        const float* means,
        int first,
        int last) {
      for_side<SIZE>(first, last, [&](int i, int index, bool inside) {
        of_lse.set(i, index, inside, weights, maxima);
        of_mean.set(i, index, inside, shares, teacher_maxima);
        mean[i] = inside && means != nullptr ? means[index] : 0.0f;
      });
    }
  };

  template <typename Place>
  struct Gradient {
    SoftmaxGradient<Place> of_lse, of_mean;

    template <int ROWS, int COLS>
    __device__ __forceinline__
    Gradient(const Problem&, const Weights<ROWS>& rows, const Weights<COLS>& cols, const Place& place)
        : of_lse(rows.of_lse, cols.of_lse, place), of_mean(rows.of_mean, cols.of_mean, place) {}

    template <int ROWS>
    __device__ __forceinline__ void begin_row(const Weights<ROWS>& rows, int i) {
      of_lse.begin_row(rows.of_lse, i);
      of_mean.begin_row(rows.of_mean, i);
    }

    // dL/ds, and dL/dz in `of_teacher`.
    template <int ROWS, int COLS>
    __device__ __forceinline__ float of_pair(
        float logit,
        float teacher,
        bool takes_part,
        const Weights<ROWS>& rows,
        const Weights<COLS>& cols,
        int i,
        int j,
        int l,
        float& of_teacher) const {
      of_teacher = 0.0f;
      if (!takes_part) {
        return 0.0f;
      }
      float of_row, of_col;
      of_mean.terms(teacher, rows.of_mean, cols.of_mean, i, j, l, of_row, of_col);
      // a pair without a share adds nothing, whatever its logit is
      of_teacher += of_row == 0.0f ? 0.0f : of_row * (logit - rows.mean[i]);
      of_teacher += of_col == 0.0f ? 0.0f : of_col * (logit - cols.mean[j]);
      return of_row + of_col + of_lse.of_pair(logit, rows.of_lse, cols.of_lse, i, j, l);
    }
  };
};

}  // namespace contrastive_ops::cuda
