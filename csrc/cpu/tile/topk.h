// The pairs of a tile that may be among the best of their rows: most logits are turned away by one comparison of a row.
#pragma once

#include "vectors.h"

namespace contrastive_ops {
namespace CPU_CAPABILITY {
namespace {

// The finalizer of splitmix64.
inline uint64_t mixed(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return bits ^ (bits >> 31);
}

// keys = logits + Gumbel noise of the pairs, drawn by a counter: the same in any order of tiles.
template <typename T>
inline void add_noise(const Noise& noise, int64_t i, T* keys) {
  const uint64_t state = mixed(noise.seed);
  const uint64_t first = (static_cast<uint64_t>(noise.row + i) << 32) + static_cast<uint64_t>(noise.col) + 1;
  alignas(64) T uniform[kTile];
  for (int64_t j = 0; j < kTile; ++j) {
    const uint64_t hash = mixed(state + 0x9E3779B97F4A7C15u * (first + static_cast<uint64_t>(j)));
    uniform[j] = (static_cast<T>(static_cast<int32_t>(hash >> 40)) + T(0.5)) * T(0x1p-24);
  }
  for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
    const Vec<T> exponential = Vec<T>::loadu(uniform + j).log().neg();
    (Vec<T>::loadu(keys + j) - exponential.log()).store(keys + j);
  }
}

template <bool Stored, typename T>
void candidates_of(const Tile<T>& tile, const T* thresholds, const Noise* noise, const Candidates<T>& candidates) {
  alignas(64) T values[kTile];
  alignas(64) T keys[kTile];
  int32_t count = 0;
  for (int64_t i = 0; i < tile.rows; candidates.ends[i++] = count) {
    const LogitRow<Stored, T> row(tile, i);
    Vec<T> highest(-kInfinity<T>);
    for (int64_t j = 0; j < kTile; j += Vec<T>::size()) {
      const Vec<T> value = row.at(j);
      value.store(values + j);
      highest = at::vec::maximum(highest, value);
    }
    const T* of_row = values;
    if (noise != nullptr) {
      std::copy_n(values, kTile, keys);
      add_noise(*noise, i, keys);
      of_row = keys;
    } else if ((highest <= Vec<T>(thresholds[i])).zero_mask() == 0) {
      continue;
    }
    // written so that NaN is one of them
    for (int64_t j = 0; j < kTile; ++j) {
      if (!(of_row[j] <= thresholds[i])) {
        candidates.values[count] = values[j];
        candidates.keys[count] = of_row[j];
        candidates.cols[count] = static_cast<uint8_t>(j);
        ++count;
      }
    }
  }
}

template <typename T>
void candidates(const Tile<T>& tile, const T* thresholds, const Noise* noise, const Candidates<T>& candidates) {
  with_stored(tile, [&](auto stored) { candidates_of<stored.value>(tile, thresholds, noise, candidates); });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace contrastive_ops
