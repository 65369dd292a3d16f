// Logits, and what takes pairs out of them.
#pragma once

#include "vectors.h"

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
void logits(const Tile<T>& tile, T* logits) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const LogitRow<false, T> row(tile, i);
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      row.at(j).store(logits + i * kTile + j);
    }
  }
}

template <typename T>
void mask_ids(int64_t rows, const int64_t* row_ids, const int64_t* col_ids, bool restrict, T* logits) {
  for (int64_t i = 0; i < rows; ++i, logits += kTile) {
    for (int64_t j = 0; j < kTile; ++j) {
      logits[j] = ((row_ids[i] == col_ids[j]) != restrict) ? -kInfinity<T> : logits[j];
    }
  }
}

template <typename T>
void mask_ceilings(int64_t rows, const T* guide, const T* ceiling, const T* col_ceiling, bool above, T* logits) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < kTile; ++j) {
      const int64_t place = i * kTile + j;
      const bool is_above = (guide[place] > ceiling[i]) | (guide[place] > col_ceiling[j]);
      logits[place] = is_above == above ? logits[place] : -kInfinity<T>;
    }
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
