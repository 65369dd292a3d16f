// Sums and means over rows and columns of the plane, in float64: of 10^8 terms they keep the digits of float32.
#pragma once

#include "block.h"
#include "plane.h"
#include "ranges.h"

namespace contrastive_ops {

template <typename T>
class Totals {
 public:
  template <typename Products>
  explicit Totals(const Plane<Products>& plane)
      : rows_(full(plane.rows() ? plane.n() : 0, 0.0)),
        cols_(full(plane.cols() ? plane.m() : 0, 0.0)),
        of_cols_(plane.mirrored() ? rows_ : cols_) {}

  // Those that a tile's rows, or its columns, are part of.
  double* at(Range range, bool cols) const {
    return values_of<double>(cols ? of_cols_ : rows_, range.begin);
  }

  // Adds number k of the partials, in the order of the tiles.
  void add(const Block& block, Partials<T>& partials, int64_t k) const {
    const auto add_to = [](double* totals, Range range, const T* part) {
      for (int64_t i = 0; part != nullptr && i < range.size(); ++i) {
        totals[i] += static_cast<double>(part[i]);
      }
    };
    block.for_each_contribution(
        [&](Range rows, int64_t tile) { add_to(at(rows, false), rows, partials.rows(tile, k)); },
        [&](Range cols, int64_t tile) { add_to(at(cols, true), cols, partials.cols(tile, k)); });
  }

  at::Tensor rows() const {
    return rows_.to(c10::CppTypeToScalarType<T>::value);
  }
  at::Tensor cols() const {
    return cols_.to(c10::CppTypeToScalarType<T>::value);
  }

 private:
  at::Tensor rows_;
  at::Tensor cols_;
  at::Tensor of_cols_;
};

}  // namespace contrastive_ops
