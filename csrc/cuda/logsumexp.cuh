// The logarithm of the sum of e^s, of rows and columns.
//
//   forward: maxima and sums of e^(s - maximum), folded tile by tile
//   g_ij = u_i e^(s_ij - row_max_i) + v_j e^(s_ij - col_max_j)      u, v: the weights of `Incoming`
//        + what the totals of row i and column j have, where the pair takes part
#pragma once

#include "logits.cuh"

namespace contrastive_ops::cuda {

// One shift serves all sets of a tile if their maxima lie within this of it: a term of 2^-24 of the largest of its set
// is e^-57 then, a normal number, as is the sum of 2^30 largest ones.
constexpr float SPREAD = 40.0f;

// What is added up beside e^s: nothing, the logits of volumes, or other values times e^s.
enum class Totals { nothing, logits, weighted };

// Maxima and sums of the rows and columns of a tile, of each warp's part of it.
template <typename Shape, Totals TOTALS>
struct Softmax {
  using Place = typename Shape::Place;
  using Dots = typename Shape::Dots;

  // Statistics of a set: an empty one is (-inf, 0). NaN shows in the sum; the maxima pass it over.
  struct Statistics {
    float maximum = -INF, sum = 0.0f, total = 0.0f;
  };

  // What the warps found of `SIZE` rows, or columns, in the `PARTS` parts of the tile.
  template <int PARTS, int SIZE>
  struct Partials {
    float maximum[PARTS][SIZE];
    float sum[PARTS][SIZE];
    float total[PARTS][SIZE];
  };

  Partials<Shape::warps_of_cols, Shape::rows> of_rows;
  Partials<Shape::warps_of_rows, Shape::cols> of_cols;
  float shift[Shape::warps_of_rows][Shape::warps_of_cols];  // NaN where a warp's sums are relative to their own maxima

  // Of a warp's part of the tile, with one exponential per pair where it is exact.
  __device__ __forceinline__ void reduce(
      const Dots& logits, const Dots& values, const Place& place, bool rows, bool cols, bool totals) {
    float row_max[Place::row_count], col_max[Place::col_count];
#pragma unroll
    for (int k = 0; k < Place::row_count; ++k) {
      row_max[k] = -INF;
    }
#pragma unroll
    for (int l = 0; l < Place::col_count; ++l) {
      col_max[l] = -INF;
    }
    Place::for_each([&](int mi, int nj, int e, int k, int l) {
      row_max[k] = fmaxf(row_max[k], logits[nj][mi][e]);
      col_max[l] = fmaxf(col_max[l], logits[nj][mi][e]);
    });
    const int thread = thread_index(), lane = thread % 32, of_row = Shape::warp_col(thread),
              of_col = Shape::warp_row(thread);
    float high = -INF, low = INF;
#pragma unroll
    for (int k = 0; k < Place::row_count; ++k) {
      row_max[k] = over_cols(row_max[k], Maximum());
      high = fmaxf(high, row_max[k]);
      low = fminf(low, row_max[k] == -INF ? INF : row_max[k]);
      if (lane % 4 == 0) {
        of_rows.maximum[of_row][place.row_of(k)] = row_max[k];
      }
    }
#pragma unroll
    for (int l = 0; l < Place::col_count; ++l) {
      col_max[l] = over_rows(col_max[l], Maximum());
      low = fminf(low, col_max[l] == -INF ? INF : col_max[l]);
      if (lane / 4 == 0) {
        of_cols.maximum[of_col][place.col_of(l)] = col_max[l];
      }
    }
    high = over_warp(high, Maximum());
    low = over_warp(low, Minimum());
    // a mean takes a term of e^0 where a pair has all the weight: then it is that value, to the last bit
    const bool common = TOTALS != Totals::weighted && rows && cols && high - low <= SPREAD;
    const float common_shift = shift_of(high);
    if (lane == 0) {
      shift[of_col][of_row] = common ? common_shift : NAN;
    }
    // a shift for all of the warp's part leaves no maximum in a register
    float row_sum[Place::row_count] = {}, col_sum[Place::col_count] = {};
    float row_total[Place::row_count] = {}, col_total[Place::col_count] = {};
    const auto weighted = [&](float term, int mi, int nj, int e) {
      return TOTALS != Totals::weighted || term == 0.0f ? 0.0f : term * values[nj][mi][e];
    };
    if (common) {
      Place::for_each([&](int mi, int nj, int e, int k, int l) {
        const float term = exponential(logits[nj][mi][e] - common_shift);
        row_sum[k] += term;
        col_sum[l] += term;
      });
    } else {
      Place::for_each([&](int mi, int nj, int e, int k, int l) {
        const float of_row = rows ? exponential(logits[nj][mi][e] - shift_of(row_max[k])) : 0.0f;
        const float of_col = cols ? exponential(logits[nj][mi][e] - shift_of(col_max[l])) : 0.0f;
        row_sum[k] += of_row;
        col_sum[l] += of_col;
        row_total[k] += weighted(of_row, mi, nj, e);
        col_total[l] += weighted(of_col, mi, nj, e);
      });
    }
    store_sums<Shape>(of_rows.sum, of_cols.sum, row_sum, col_sum, place);
    if constexpr (TOTALS == Totals::weighted) {
      store_sums<Shape>(of_rows.total, of_cols.total, row_total, col_total, place);
    }
    if (TOTALS == Totals::logits && totals) {
      Place::for_each([&](int mi, int nj, int e, int k, int l) {
        const float logit = logits[nj][mi][e] == -INF ? 0.0f : logits[nj][mi][e];
        row_total[k] += logit;
        col_total[l] += logit;
      });
      store_sums<Shape>(of_rows.total, of_cols.total, row_total, col_total, place);
    }
  }

  __device__ __forceinline__ void fold_row(Statistics& into, int row, bool totals) const {
    fold(into, of_rows, row, totals, [&](int part) { return shift[row / Shape::warp_rows][part]; });
  }

  __device__ __forceinline__ void fold_col(Statistics& into, int col, bool totals) const {
    fold(into, of_cols, col, totals, [&](int part) { return shift[part][col / Shape::warp_cols]; });
  }

  static __device__ __forceinline__ void write(
      float* maximum, float* sum, float* total, int64_t index, const Statistics& statistics) {
    maximum[index] = statistics.maximum;
    sum[index] = statistics.sum;
    if (total != nullptr) {
      total[index] = statistics.total;
    }
  }

  static __device__ __forceinline__ Statistics
  read(const float* maximum, const float* sum, const float* total, int64_t index) {
    return {maximum[index], sum[index], total == nullptr ? 0.0f : total[index]};
  }

 private:
  // A sum relative to `from` as one relative to the maximum `to`, and what goes with it.
  static __device__ __forceinline__ Statistics rescaled(float sum, float total, float from, float to) {
    if (sum == 0.0f) {  // shift and maximum of an empty part lie far apart
      return {to, 0.0f, 0.0f};
    }
    const float factor = exponential(from - shift_of(to));
    return {to, sum * factor, TOTALS != Totals::weighted || factor == 0.0f ? 0.0f : total * factor};
  }

  template <int PARTS, int SIZE, typename Shift>
  static __device__ __forceinline__ void fold(
      Statistics& into, const Partials<PARTS, SIZE>& partials, int i, bool totals, Shift shift) {
    const float before = into.maximum, total = into.total;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      into.maximum = fmaxf(into.maximum, partials.maximum[part][i]);
    }
    into = rescaled(into.sum, into.total, before, into.maximum);
    if constexpr (TOTALS == Totals::logits) {
      into.total = total;
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const float common = shift(part);
      const float from = common != common ? shift_of(partials.maximum[part][i]) : common;
      const Statistics of_part = rescaled(partials.sum[part][i], partials.total[part][i], from, into.maximum);
      into.sum += of_part.sum;
      if constexpr (TOTALS == Totals::weighted) {
        into.total += of_part.total;
      } else {
        into.total += totals ? partials.total[part][i] : 0.0f;
      }
    }
  }
};

// What `Incoming` says of e^s in the rows or columns of a tile, in shared memory. What was not given adds nothing.
template <int SIZE>
struct SoftmaxWeights {
  float weight[SIZE];
  float maximum[SIZE];

  __device__ __forceinline__ void set(int i, int index, bool inside, const float* weights, const float* maxima) {
    weight[i] = inside && weights != nullptr ? weights[index] : 0.0f;
    maximum[i] = inside && maxima != nullptr ? maxima[index] : INF;
  }
};

// The gradients of a warp's part of a tile, element by element, row after row: what columns have in them is prepared
// once, and what a row has when it begins. One shift serves all maxima within SPREAD, and then a pair takes one
// exponential.
template <typename Place>
struct SoftmaxGradient {
  float of_row, of_col[Place::col_count];
  float shift;
  bool common;

  template <int ROWS, int COLS>
  __device__ __forceinline__
  SoftmaxGradient(const SoftmaxWeights<ROWS>& rows, const SoftmaxWeights<COLS>& cols, const Place& place) {
    float high = -INF, low = INF;
    const auto include = [&](float maximum) {
      high = fmaxf(high, maximum == INF ? -INF : maximum);
      low = fminf(low, maximum);
    };
#pragma unroll
    for (int k = 0; k < Place::row_count; ++k) {
      include(rows.maximum[place.row_of(k)]);
    }
#pragma unroll
    for (int l = 0; l < Place::col_count; ++l) {
      include(cols.maximum[place.col_of(l)]);
    }
    high = over_warp(high, Maximum());
    low = over_warp(low, Minimum());
    common = high - low <= SPREAD;
    shift = shift_of(high);
#pragma unroll
    for (int l = 0; l < Place::col_count; ++l) {
      of_col[l] = of_side(cols, place.col_of(l));
    }
  }

  template <int ROWS>
  __device__ __forceinline__ void begin_row(const SoftmaxWeights<ROWS>& rows, int i) {
    of_row = of_side(rows, i);
  }

  // Of the pair (i, j) of the tile, in the thread's column l; its logit is -inf where it does not take part.
  template <int ROWS, int COLS>
  __device__ __forceinline__ float of_pair(
      float logit, const SoftmaxWeights<ROWS>& rows, const SoftmaxWeights<COLS>& cols, int i, int j, int l) const {
    if (common) {
      return (of_row + of_col[l]) * exponential(logit - shift);
    }
    return of_row * exponential(logit - rows.maximum[i]) + of_col[l] * exponential(logit - cols.maximum[j]);
  }

  // What the row and what the column have in it.
  template <int ROWS, int COLS>
  __device__ __forceinline__ void terms(
      float logit,
      const SoftmaxWeights<ROWS>& rows,
      const SoftmaxWeights<COLS>& cols,
      int i,
      int j,
      int l,
      float& row_term,
      float& col_term) const {
    const float term = common ? exponential(logit - shift) : 0.0f;
    row_term = of_row * (common ? term : exponential(logit - rows.maximum[i]));
    col_term = of_col[l] * (common ? term : exponential(logit - cols.maximum[j]));
  }

 private:
  // The error of this is that of all pairs of the row or column, so it may not grow with the exponent.
  template <int SIZE>
  __device__ __forceinline__ float of_side(const SoftmaxWeights<SIZE>& side, int i) const {
    return side.weight[i] * (common ? expf(shift - side.maximum[i]) : 1.0f);
  }
};

// The reduction. `GUIDED`: pairs that a guide leaves out take no part.
template <typename Shape_, bool GUIDED = false>
struct LogSumExp {
  using Shape = Shape_;
  static constexpr With with = GUIDED ? With::guide : With::nothing;
  static constexpr float nothing = -INF;  // the value of a pair that takes no part

  using Reduced = Softmax<Shape, Shape::volumes ? Totals::logits : Totals::nothing>;
  using Statistics = typename Reduced::Statistics;

  static __device__ __forceinline__ bool asked(const Part& part) {
    return part.maximum != nullptr;
  }

  // Whether totals are.
  static __device__ __forceinline__ bool more(const Part& row, const Part& col) {
    return Shape::volumes && (row.total != nullptr || col.total != nullptr);
  }

  static __device__ __forceinline__ void evaluate(const Problem&, typename Shape::Dots&) {}

  static __device__ __forceinline__ void reduce(
      Reduced& reduced,
      const typename Shape::Dots& logits,
      const SecondValues<Shape, with>&,
      const typename Shape::Place& place,
      bool rows,
      bool cols,
      bool totals) {
    reduced.reduce(logits, logits, place, rows, cols, totals);
  }

  static __device__ __forceinline__ void write(const Part& part, int64_t index, const Statistics& statistics) {
    Reduced::write(part.maximum, part.sum, part.total, index, statistics);
  }

  static __device__ __forceinline__ Statistics read(const Part& part, int64_t index) {
    return Reduced::read(part.maximum, part.sum, part.total, index);
  }

  // backward

  template <int SIZE>
  struct Weights : SoftmaxWeights<SIZE> {
    float excluded[SIZE];
    float total[SIZE];

    __device__ void load_rows(const Incoming& incoming, int first, int last) {
      load(incoming.row_weight, incoming.row_max, incoming.row_excluded, incoming.row_total, first, last);
    }

    __device__ void load_cols(const Incoming& incoming, int first, int last) {
      load(incoming.col_weight, incoming.col_max, incoming.col_excluded, incoming.col_total, first, last);
    }

    __device__ void load(
        const float* weights, const float* maxima, const float* of_excluded, const float* totals, int first, int last) {
      for_side<SIZE>(first, last, [&](int i, int index, bool inside) {
        this->set(i, index, inside, weights, maxima);
        excluded[i] = inside && of_excluded != nullptr ? of_excluded[index] : 0.0f;
        total[i] = inside && totals != nullptr ? totals[index] : 0.0f;
      });
    }
  };

  template <typename Place>
  struct Gradient : SoftmaxGradient<Place> {
    template <int ROWS, int COLS>
    __device__ __forceinline__
    Gradient(const Problem&, const Weights<ROWS>& rows, const Weights<COLS>& cols, const Place& place)
        : SoftmaxGradient<Place>(rows, cols, place) {}

    template <int ROWS, int COLS>
    __device__ __forceinline__ float of_pair(
        float logit, bool takes_part, const Weights<ROWS>& rows, const Weights<COLS>& cols, int i, int j, int l) const {
      float g = SoftmaxGradient<Place>::of_pair(logit, rows, cols, i, j, l);
      if constexpr (Shape::volumes) {
        g += rows.total[i] + cols.total[j];
      }
      return takes_part ? g : 0.0f;
    }
  };
};

}  // namespace contrastive_ops::cuda
