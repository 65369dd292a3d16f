// Ranges of rows and columns, and vectors over them.
#pragma once

#include "tile.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace contrastive_ops {

constexpr int64_t kTileSize = kTile * kTile;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A range of rows or columns, cut into tiles.
struct Range {
  int64_t begin;
  int64_t end;

  int64_t size() const {
    return end - begin;
  }
  int64_t tiles() const {
    return (size() + kTile - 1) / kTile;
  }
  Range tile(int64_t t) const {
    return {begin + t * kTile, std::min(begin + (t + 1) * kTile, end)};
  }
  bool contains(int64_t i) const {
    return i >= begin && i < end;
  }
  bool operator==(const Range& other) const {
    return begin == other.begin && end == other.end;
  }
};

inline std::vector<Range> blocks_of(int64_t n, int64_t block) {
  std::vector<Range> blocks;
  for (int64_t begin = 0; begin < n; begin += block) {
    blocks.push_back({begin, std::min(begin + block, n)});
  }
  return blocks;
}

// A vector of our own: for small problems the price of a tensor counts.
template <typename T>
class Vector {
 public:
  Vector() = default;
  Vector(int64_t n, T value) : values_(n, value) {}

  // The values of a tensor, or `absent` where there is none, padded to whole tiles.
  Vector(const std::optional<at::Tensor>& tensor, int64_t n, T absent, T padding)
      : values_(round_up(n, kTile), padding) {
    if (!tensor.has_value()) {
      std::fill_n(values_.begin(), n, absent);
      return;
    }
    const at::Tensor contiguous = tensor->to(c10::CppTypeToScalarType<T>::value).contiguous();
    std::copy_n(contiguous.template const_data_ptr<T>(), n, values_.begin());
  }

  // Null for a vector that is not there.
  T* at(int64_t offset) {
    return values_.empty() ? nullptr : values_.data() + offset;
  }
  const T* at(int64_t offset) const {
    return values_.empty() ? nullptr : values_.data() + offset;
  }

 private:
  std::vector<T> values_;
};

template <typename T>
at::Tensor full(int64_t n, T value) {
  return at::full({n}, value, c10::CppTypeToScalarType<T>::value);
}

// The values of a statistic from an offset on; null for one that is empty.
template <typename T>
T* values_of(const at::Tensor& statistic, int64_t offset) {
  return statistic.numel() == 0 ? nullptr : statistic.mutable_data_ptr<T>() + offset;
}

}  // namespace contrastive_ops
