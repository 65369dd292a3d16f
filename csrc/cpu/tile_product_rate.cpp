#include "choose_products.h"
#include "ops.h"
#include "plane.h"

#include <c10/util/Exception.h>

#include <chrono>

namespace contrastive_ops {

double tile_product_rate(const at::Tensor& x, const at::Tensor& y, double seconds) {
  TORCH_CHECK_VALUE(x.numel() > 0 && y.numel() > 0, "x and y must not be empty");
  Problem problem;
  problem.pairs.x = x;
  problem.pairs.y = y;
  return with_plane(problem, [&](auto& plane) {
    return plane.with_products_alone([&](const auto& multiply) {
      const auto start = std::chrono::steady_clock::now();
      double flops = 0.0;
      double elapsed = 0.0;
      while (elapsed < seconds) {
        flops += 2.0 * static_cast<double>(multiply());
        elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      }
      return flops / elapsed;
    });
  });
}

}  // namespace contrastive_ops
