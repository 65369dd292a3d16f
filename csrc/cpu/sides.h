// What a reduction is given of the rows and of the columns.
#pragma once

#include "plane.h"
#include "ranges.h"

#include <ATen/core/Tensor.h>

namespace contrastive_ops {

// A pair of vectors over the rows and over the columns, padded; in self-similarity one serves both. A direction that is
// not asked for is empty.
template <typename T>
class Sides {
 public:
  Sides() = default;
  template <typename Products>
  Sides(const Plane<Products>& plane, const at::Tensor& of_rows, const at::Tensor& of_cols)
      : mirrored_(plane.mirrored()),
        rows_(plane.rows() ? Vector<T>(of_rows, plane.n(), T(0), T(0)) : Vector<T>()),
        cols_(plane.cols() && !mirrored_ ? Vector<T>(of_cols, plane.m(), T(0), T(0)) : Vector<T>()) {}

  // The same with zeros for a direction that is not asked for.
  template <typename Products>
  static Sides or_zeros(const Plane<Products>& plane, const at::Tensor& of_rows, const at::Tensor& of_cols) {
    Sides sides(plane, of_rows, of_cols);
    if (!plane.rows()) {
      sides.rows_ = Vector<T>(round_up(plane.n(), kTile), T(0));
    }
    if (!plane.cols() && !plane.mirrored()) {
      sides.cols_ = Vector<T>(round_up(plane.m(), kTile), T(0));
    }
    return sides;
  }

  const T* rows(int64_t offset) const {
    return rows_.at(offset);
  }
  const T* cols(int64_t offset) const {
    return (mirrored_ ? rows_ : cols_).at(offset);
  }
  Vector<T>& own_rows() {
    return rows_;
  }
  Vector<T>& own_cols() {
    return cols_;
  }

 private:
  bool mirrored_ = false;
  Vector<T> rows_;
  Vector<T> cols_;
};

}  // namespace contrastive_ops
