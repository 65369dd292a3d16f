// Products and combinations of a few vectors, in float64.
#pragma once

#include "vectors.h"

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
inline double dot_product(int64_t depth, const T* a, const T* b) {
  double sums[kLanes] = {};
  int64_t l = 0;
  for (; l + kLanes <= depth; l += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += static_cast<double>(a[l + lane]) * static_cast<double>(b[l + lane]);
    }
  }
  double sum = 0.0;
  for (; l < depth; ++l) {
    sum += static_cast<double>(a[l]) * static_cast<double>(b[l]);
  }
  for (const double part : sums) {
    sum += part;
  }
  return sum;
}

template <typename T>
void dot_products(
    int64_t s_count,
    int64_t t_count,
    int64_t depth,
    const T* const* a,
    const T* const* b,
    bool symmetric,
    double* products) {
  for (int64_t s = 0; s < s_count; ++s) {
    for (int64_t t = 0; t < t_count; ++t) {
      const bool known = symmetric && t < s;
      products[s * t_count + t] = known ? products[t * t_count + s] : dot_product(depth, a[s], b[t]);
    }
  }
}

template <typename T>
void combine(
    int64_t s_count, int64_t t_count, int64_t depth, const double* weights, const T* const* vectors, T* const* result) {
  for (int64_t s = 0; s < s_count; ++s, weights += t_count) {
    int64_t l = 0;
    for (; l + kLanes <= depth; l += kLanes) {
      double sums[kLanes] = {};
      for (int64_t t = 0; t < t_count; ++t) {
        if (weights[t] == 0.0) {
          continue;
        }
        for (int lane = 0; lane < kLanes; ++lane) {
          sums[lane] += weights[t] * static_cast<double>(vectors[t][l + lane]);
        }
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        result[s][l + lane] = static_cast<T>(sums[lane]);
      }
    }
    for (; l < depth; ++l) {
      double sum = 0.0;
      for (int64_t t = 0; t < t_count; ++t) {
        sum += weights[t] == 0.0 ? 0.0 : weights[t] * static_cast<double>(vectors[t][l]);
      }
      result[s][l] = static_cast<T>(sum);
    }
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
