// Gradients of the logits of a tile, dL/ds.
//
//   g_ij = u_i e^(s_ij - row_max_i) + v_j e^(s_ij - col_max_j)      u, v: the weights of `Incoming`
//        + what the totals of row i and column j have, where the pair takes part;
//   of a pair that is left out by index it is that of its own logit instead
#pragma once

#include "logits.cuh"

namespace contrastive_ops::cuda {

// What `Incoming` says of the rows or columns of a tile, in shared memory. What was not given adds nothing.
template <int SIZE>
struct Weights {
  float weight[SIZE];
  float maximum[SIZE];
  float excluded[SIZE];
  float total[SIZE];

  __device__ void load(
      const float* weights, const float* maxima, const float* of_excluded, const float* totals, int first, int last) {
    for (int i = thread_index(); i < SIZE; i += blockDim.x) {
      const int index = first + i;
      const bool inside = index < last;
      weight[i] = inside && weights != nullptr ? weights[index] : 0.0f;
      maximum[i] = inside && maxima != nullptr ? maxima[index] : INF;
      excluded[i] = inside && of_excluded != nullptr ? of_excluded[index] : 0.0f;
      total[i] = inside && totals != nullptr ? totals[index] : 0.0f;
    }
  }

  __device__ void load_rows(const Incoming& incoming, int first, int last) {
    load(incoming.row_weight, incoming.row_max, incoming.row_excluded, incoming.row_total, first, last);
  }

  __device__ void load_cols(const Incoming& incoming, int first, int last) {
    load(incoming.col_weight, incoming.col_max, incoming.col_excluded, incoming.col_total, first, last);
  }
};

// The gradients of a warp's part of a tile, element by element: what rows and columns have in them is prepared once.
// One shift serves all maxima within SPREAD, and then a pair takes one exponential.
template <typename Place>
struct Gradient {
  float of_row[Place::row_count], of_col[Place::col_count];
  float shift;
  bool common;

  template <int ROWS, int COLS>
  __device__ __forceinline__ Gradient(const Weights<ROWS>& rows, const Weights<COLS>& cols, const Place& place) {
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
    for (int k = 0; k < Place::row_count; ++k) {
      const int i = place.row_of(k);
      of_row[k] = rows.weight[i] * (common ? exponential(shift - rows.maximum[i]) : 1.0f);
    }
#pragma unroll
    for (int l = 0; l < Place::col_count; ++l) {
      const int j = place.col_of(l);
      of_col[l] = cols.weight[j] * (common ? exponential(shift - cols.maximum[j]) : 1.0f);
    }
  }

  // Of the pair (i, j) of the tile, which is the thread's (k, l); its logit is -inf where it does not take part.
  template <int ROWS, int COLS>
  __device__ __forceinline__ float of_pair(
      float logit, const Weights<ROWS>& rows, const Weights<COLS>& cols, int i, int j, int k, int l) const {
    if (common) {
      return (of_row[k] + of_col[l]) * exponential(logit - shift);
    }
    return of_row[k] * exponential(logit - rows.maximum[i]) + of_col[l] * exponential(logit - cols.maximum[j]);
  }
};

// What the options and `Incoming` say of the rows or of the columns of a tile.
template <int SIZE>
struct Side {
  Options<SIZE> options;
  Weights<SIZE> weights;
};

// dL/ds of the pair (i, j) of a tile from its pair_ij.
template <bool VOLUMES, int ROWS, int COLS, typename Place>
__device__ __forceinline__ float gradient_of_pair(
    float pair,
    const Gradient<Place>& gradient,
    const Side<ROWS>& row,
    const Side<COLS>& col,
    const Mask& mask,
    int i,
    int j,
    int k,
    int l) {
  const float logit = logit_of_pair<VOLUMES>(pair, row.options, col.options, mask, i, j);
  float g = gradient.of_pair(logit, row.weights, col.weights, i, j, k, l);
  if constexpr (VOLUMES) {
    g += logit == -INF ? 0.0f : row.weights.total[i] + col.weights.total[j];
  }
  if (mask.excludes) {
    const bool by_row = mask.excluded_by_row(row.options, i, j), by_col = mask.excluded_by_col(col.options, i, j);
    if (by_row || by_col) {
      g = (by_row ? row.weights.excluded[i] : 0.0f) + (by_col ? col.weights.excluded[j] : 0.0f);
    }
  }
  return g;
}

// Two neighbouring elements in the dtype of the features, rounded to nearest.
__device__ __forceinline__ uint32_t packed(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t packed(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace contrastive_ops::cuda
