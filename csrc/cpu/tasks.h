// Independent tasks on the threads of PyTorch.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace contrastive_ops {

// Multiply-adds that are worth another thread: waking one takes as long as 10^5 of them, and where other programs have
// the processors, a time slice.
constexpr int64_t kWorthAThread = int64_t(1) << 20;
constexpr int64_t kMoveCost = 8;  // of a number that is read and written elsewhere, in multiply-adds

// Calls work(task, state) for every task in [0, count), tasks taken in turn by whoever is free; each thread makes its
// own state. Tasks write to separate places, so the result does not depend on who ran them. `total` is what all of them
// take, in multiply-adds.
template <typename MakeState, typename Work>
void for_each_task(int64_t count, int64_t total, const MakeState& make_state, const Work& work) {
  if (count == 0) {
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min({static_cast<int64_t>(at::get_num_threads()), count, 1 + total / kWorthAThread});
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    [[maybe_unused]] const auto state = make_state();
    for (int64_t task = next.fetch_add(1); task < count; task = next.fetch_add(1)) {
      work(task, state);
    }
  });
}

template <typename Work>
void for_each_task(int64_t count, int64_t total, const Work& work) {
  for_each_task(count, total, [] { return nullptr; }, [&](int64_t task, std::nullptr_t) { work(task); });
}

}  // namespace contrastive_ops
