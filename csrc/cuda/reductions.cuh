// The reductions there are, each with the tile that it takes.
#pragma once

#include "expectation.cuh"
#include "logsumexp.cuh"
#include "sum.cuh"

namespace contrastive_ops::cuda {

// Calls run with a value of the type of a problem's reduction.
template <typename Run>
const char* for_reduction(const Problem& problem, Run run) {
  switch (problem.reduction) {
    case Reduction::sum:
      return run(Sum());
    case Reduction::expectation:
      return run(Expectation());
    default:
      break;
  }
  const bool guided = problem.second.row_ceiling != nullptr || problem.second.col_ceiling != nullptr;
  if (guided) {
    return run(LogSumExp<Tile<0>, true>());
  }
  switch (problem.members) {
    case 0:
      return run(LogSumExp<Tile<0>>());
    case 1:
      return run(LogSumExp<Tile<1>>());
    case 2:
      return run(LogSumExp<Tile<2>>());
    case 3:
      return run(LogSumExp<Tile<3>>());
    case 4:
      return run(LogSumExp<Tile<4>>());
    default:
      return "the volumes are of 1 to 4 vectors and an anchor";
  }
}

}  // namespace contrastive_ops::cuda
