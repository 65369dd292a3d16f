// The choice of what multiplies the tiles of a problem, on this processor.
#pragma once

#include "plane.h"
#include "problem.h"
#include "products.h"

namespace contrastive_ops {

enum class Unit : uint8_t { float64, float32, bfloat16_vectors, bfloat16_matrix, float16_matrix, float32_matrix };

Unit choose_unit(const Problem& problem);

// f(plane) with the plane of a problem.
template <typename F>
auto with_plane(const Problem& problem, const F& f) {
  const auto with = [&](auto plane) { return f(plane); };
  switch (choose_unit(problem)) {
#ifdef CONTRASTIVE_OPS_MATRIX_UNIT
    case Unit::bfloat16_vectors:
      return with(Plane<BFloat16Products<1, BFloat16Unit::vectors>>(problem));
    case Unit::bfloat16_matrix:
      return with(Plane<BFloat16Products<1, BFloat16Unit::matrix>>(problem));
    case Unit::float16_matrix:
      return with(Plane<BFloat16Products<2, BFloat16Unit::matrix>>(problem));
    case Unit::float32_matrix:
      return with(Plane<BFloat16Products<3, BFloat16Unit::matrix>>(problem));
#endif
    case Unit::float64:
      return with(Plane<VectorProducts<double>>(problem));
    default:
      return with(Plane<VectorProducts<float>>(problem));
  }
}

}  // namespace contrastive_ops
