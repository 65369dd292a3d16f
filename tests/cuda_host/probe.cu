// What the tests of the shim itself run: small kernels, each right or wrong in one way.
//
//     probe CASE [SEED [eager]]   prints "ok", or what launch() returned, or "wrong: ..."
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "device.cuh"

namespace cuda = contrastive_ops::cuda;

namespace {

constexpr int THREADS = 64;

__device__ __forceinline__ int thread() {
  return static_cast<int>(threadIdx.x);
}

__device__ __forceinline__ float* floats() {
  return reinterpret_cast<float*>(cuda::shared_memory());
}

__device__ __forceinline__ uint32_t lane() {
  return threadIdx.x % 32;
}

__global__ void indices(int* out) {
  const int block = blockIdx.y * gridDim.x + blockIdx.x;
  out[block * blockDim.x + thread()] += block * 1000 + thread();
}

__global__ void __launch_bounds__(THREADS) warp_operations(int* out) {
  const int value = thread() * 7 % 64;
  out[thread()] = __shfl_xor_sync(0xffffffff, value, 5);
  out[THREADS + thread()] = __shfl_sync(0xffffffff, value, 9);
  out[2 * THREADS + thread()] = __reduce_min_sync(0xffffffff, value);
  out[3 * THREADS + thread()] = __reduce_max_sync(0xffffffff, value);
  out[4 * THREADS + thread()] = static_cast<int>(__ballot_sync(0xffffffff, value < 9));
  out[5 * THREADS + thread()] = __any_sync(0xffffffff, value == 7);
  out[6 * THREADS + thread()] = __syncthreads_or(value == 7);
  out[7 * THREADS + thread()] = __syncthreads_or(false);
}

__global__ void barrier(float* out, bool waits) {
  floats()[thread()] = static_cast<float>(thread());
  if (waits) {
    __syncthreads();
  }
  out[thread()] = floats()[THREADS - 1 - thread()];
}

__global__ void warp_barrier(float* out, bool waits) {
  floats()[thread()] = static_cast<float>(thread());
  if (waits) {
    __syncwarp();
  }
  out[thread()] = floats()[thread() ^ 31];
}

// One thread runs on past the second barrier, while the other has yet to read what was there before.
__global__ void late_write(float* out) {
  if (thread() == 0) {
    floats()[0] = 1;
  }
  __syncthreads();
  if (thread() == 32) {
    out[0] = floats()[0];
  }
  if (thread() == 0) {
    floats()[0] = 2;
  }
  __syncthreads();
}

__global__ void early_exit(float* out) {
  floats()[thread()] = static_cast<float>(thread());
  if (thread() >= 32) {
    return;
  }
  __syncthreads();
  out[thread()] = floats()[31 - thread()];
}

__global__ void divergence(int* out) {
  if (lane() == 3) {
    out[thread()] = __shfl_xor_sync(0xffffffff, 1, 1);
  } else {
    out[thread()] = __shfl_xor_sync(0xffffffff, 2, 1);
  }
}

__global__ void different_masks(int* out) {
  out[thread()] = __shfl_xor_sync(lane() == 3 ? 0xfffffffe : 0xffffffff, 1, 1);
}

__global__ void foreign_lane(int* out) {
  if (lane() < 16) {
    out[thread()] = __shfl_sync(0xffff, 1, 20);
  }
}

__global__ void foreign_mask(int* out) {
  out[thread()] = __shfl_sync(0xffff, 1, 0);
}

__global__ void parted_barriers() {
  if (thread() == 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void deadlock(int* out) {
  if (thread() == 40) {
    __syncthreads();
  } else {
    out[thread()] = __shfl_xor_sync(0xffffffff, 1, 1);
  }
}

__global__ void poison(float* out) {
  out[thread()] = floats()[thread()];
}

__global__ void beyond(float* out, int distance) {
  floats()[thread() + distance] = 1;
  out[thread()] = floats()[thread()];
}

__global__ void beyond_global(float* out) {
  out[thread() + 1] = 1;
}

__global__ void misaligned(const float* x) {
  const float4 value = *reinterpret_cast<const float4*>(x + 1);
  floats()[thread()] = value.x;
}

// Rows of 16 bytes, one for each thread: of two buffers in turn, as a pipeline has them.
template <bool waits, bool in_time, bool guards>
__global__ void pipeline(const float4* x, int tiles, int rows, float* out) {
  float4* buffers = reinterpret_cast<float4*>(cuda::shared_memory());
  const auto begin = [&](int tile) {
    if (tile < tiles) {
      const int row = tile * THREADS + thread();
      cuda::copy_async(buffers + tile % 2 * THREADS + thread(), x + (row < rows ? row : 0), !guards || row < rows);
    }
    cuda::copy_async_commit();
  };
  begin(0);
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    begin(tile + 1);
    if (waits) {
      cuda::copy_async_wait<1>();
    }
    __syncthreads();
    const float4 other = buffers[tile % 2 * THREADS + THREADS - 1 - thread()];
    sum += other.x + other.y + other.z + other.w;
    if (in_time) {
      __syncthreads();
    }
  }
  out[thread()] = sum;
}

__global__ void misplaced_copy(const float4* x, int shared_offset, int global_offset) {
  cuda::copy_async(
      cuda::shared_memory() + shared_offset, reinterpret_cast<const unsigned char*>(x) + global_offset, true);
}

__global__ void misplaced_load(int offset) {
  uint32_t r[4];
  cuda::load_matrices(r, cuda::shared_memory() + offset);
}

// Each warp loads the rows that another wrote.
__global__ void load_of_others(uint32_t* out, bool waits) {
  float4* rows = reinterpret_cast<float4*>(cuda::shared_memory());
  rows[thread()] = make_float4(1, 1, 1, 1);
  if (waits) {
    __syncthreads();
  }
  uint32_t r[4];
  cuda::load_matrices(r, rows + (thread() ^ 32));
  out[thread()] = r[0];
}

// Copies and loads of 32 rows with a stride in bytes.
__global__ void strides(const float4* x, int stride) {
  unsigned char* row = cuda::shared_memory() + lane() * stride;
  cuda::copy_async(row, x, true);
  cuda::copy_async_commit();
  cuda::copy_async_wait<0>();
  __syncwarp();
  uint32_t r[4];
  cuda::load_matrices(r, row);
  cuda::load_matrices_transposed(r, row);
}

__global__ void not_tf32() {
  float d[4] = {};
  const uint32_t a[4] = {1, 1, 1, 1}, b[2] = {1, 1};
  cuda::multiply_add<float>(d, a, b);
}

__global__ void sum_of_blocks(float* total, bool same_place) {
  if (thread() == 0) {
    total[same_place ? 0 : blockIdx.x] += 1;
  }
}

__global__ void nothing() {}

__global__ void multiply(int dtype, const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t a_fragment[4], b_fragment[2];
  float d_fragment[4];
  for (int i = 0; i < 4; ++i) {
    a_fragment[i] = a[4 * thread() + i];
    d_fragment[i] = d[4 * thread() + i];
  }
  for (int i = 0; i < 2; ++i) {
    b_fragment[i] = b[2 * thread() + i];
  }
  if (dtype == 0) {
    cuda::multiply_add<float>(d_fragment, a_fragment, b_fragment);
  } else if (dtype == 1) {
    cuda::multiply_add<__nv_bfloat16>(d_fragment, a_fragment, b_fragment);
  } else {
    cuda::multiply_add<__half>(d_fragment, a_fragment, b_fragment);
  }
  for (int i = 0; i < 4; ++i) {
    d[4 * thread() + i] = d_fragment[i];
  }
}

__global__ void load(const uint4* rows, bool transposed, uint32_t* out) {
  uint4* shared = reinterpret_cast<uint4*>(cuda::shared_memory());
  shared[thread()] = rows[thread()];
  __syncwarp();
  uint32_t r[4];
  if (transposed) {
    cuda::load_matrices_transposed(r, shared + thread());
  } else {
    cuda::load_matrices(r, shared + thread());
  }
  for (int i = 0; i < 4; ++i) {
    out[4 * thread() + i] = r[i];
  }
}

bool wrong = false;

template <typename T>
void expect(const char* what, int index, T value, T expected) {
  if (!(value == expected) && !wrong) {
    std::printf("wrong: %s[%d] is %g instead of %g\n", what, index, double(value), double(expected));
    wrong = true;
  }
}

template <typename... Parameters, typename... Arguments>
const char* run(void (*kernel)(Parameters...), int blocks, int shared_bytes, Arguments... arguments) {
  return cuda::launch(kernel, dim3(blocks), THREADS, shared_bytes, nullptr, arguments...);
}

template <bool waits, bool in_time, bool guards>
const char* run_pipeline() {
  const int tiles = 5, rows = tiles * THREADS - 3;
  std::vector<float4> x(rows);
  for (int row = 0; row < rows; ++row) {
    x[row] = make_float4(1, 10, 100, static_cast<float>(row));
  }
  std::vector<float> out(THREADS);
  const char* error =
      run(pipeline<waits, in_time, guards>,
          1,
          2 * THREADS * sizeof(float4),
          static_cast<const float4*>(x.data()),
          tiles,
          rows,
          out.data());
  for (int i = 0; i < THREADS; ++i) {
    float expected = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      const int row = tile * THREADS + THREADS - 1 - i;
      expected += row < rows ? 111.f + static_cast<float>(row) : 0;
    }
    expect("out", i, out[i], expected);
  }
  return error;
}

const char* check_warp_operations() {
  std::vector<int> out(8 * THREADS);
  const char* error = run(warp_operations, 1, 0, out.data());
  for (int i = 0; i < THREADS; ++i) {
    const int warp = i / 32 * 32;
    uint32_t below = 0;
    int least = 64, most = 0;
    bool seven = false;
    for (int other = warp; other < warp + 32; ++other) {
      const int value = other * 7 % 64;
      below |= uint32_t{value < 9} << (other - warp);
      least = value < least ? value : least;
      most = value > most ? value : most;
      seven |= value == 7;
    }
    expect("xor", i, out[i], (i ^ 5) * 7 % 64);
    expect("shuffle", i, out[THREADS + i], (warp + 9) * 7 % 64);
    expect("min", i, out[2 * THREADS + i], least);
    expect("max", i, out[3 * THREADS + i], most);
    expect("ballot", i, out[4 * THREADS + i], static_cast<int>(below));
    expect("any", i, out[5 * THREADS + i], int{seven});
    expect("or", i, out[6 * THREADS + i], 1);
    expect("or", i, out[7 * THREADS + i], 0);
  }
  return error;
}

const char* check_indices() {
  const dim3 grid(5, 3);
  std::vector<int> out(5 * 3 * 48);
  const char* error = cuda::launch(indices, grid, 48, 0, nullptr, out.data());
  for (size_t i = 0; i < out.size(); ++i) {
    expect("out", static_cast<int>(i), out[i], static_cast<int>(i / 48 * 1000 + i % 48));
  }
  return error;
}

const char* check_mirror(void (*kernel)(float*, bool), bool waits, int size) {
  std::vector<float> out(THREADS);
  const char* error = run(kernel, 1, THREADS * sizeof(float), out.data(), waits);
  for (int i = 0; i < THREADS; ++i) {
    expect("out", i, out[i], static_cast<float>(i / size * size + size - 1 - i % size));
  }
  return error;
}

const char* run_case(const std::string& name) {
  std::vector<float> out(THREADS);
  std::vector<int> whole(THREADS);
  std::vector<float4> x(2);
  const float4* rows = x.data();
  if (name == "indices") {
    return check_indices();
  } else if (name == "warp_operations") {
    return check_warp_operations();
  } else if (name == "barrier" || name == "no_barrier") {
    return check_mirror(barrier, name == "barrier", THREADS);
  } else if (name == "warp_barrier" || name == "no_warp_barrier") {
    return check_mirror(warp_barrier, name == "warp_barrier", 32);
  } else if (name == "late_write") {
    return run(late_write, 1, sizeof(float), out.data());
  } else if (name == "early_exit") {
    const char* error = run(early_exit, 1, THREADS * sizeof(float), out.data());
    for (int i = 0; i < 32; ++i) {
      expect("out", i, out[i], static_cast<float>(31 - i));
    }
    return error;
  } else if (name == "divergence") {
    return run(divergence, 1, 0, whole.data());
  } else if (name == "different_masks") {
    return run(different_masks, 1, 0, whole.data());
  } else if (name == "foreign_lane") {
    return run(foreign_lane, 1, 0, whole.data());
  } else if (name == "foreign_mask") {
    return run(foreign_mask, 1, 0, whole.data());
  } else if (name == "parted_barriers") {
    return run(parted_barriers, 1, 0);
  } else if (name == "deadlock") {
    return run(deadlock, 1, 0, whole.data());
  } else if (name == "after_deadlock") {
    run(deadlock, 1, 0, whole.data());
    return check_mirror(barrier, true, THREADS);
  } else if (name == "poison") {
    const char* error = run(poison, 1, THREADS * sizeof(float), out.data());
    for (int i = 0; i < THREADS; ++i) {
      expect("is NaN: out", i, std::isnan(out[i]), true);
    }
    return error;
  } else if (name == "beyond_shared") {
    return run(beyond, 1, THREADS * sizeof(float), out.data(), 1);
  } else if (name == "before_shared") {
    return run(beyond, 1, THREADS * sizeof(float), out.data(), -1);
  } else if (name == "beyond_global") {
    return run(beyond_global, 1, 0, out.data());
  } else if (name == "misaligned") {
    return run(misaligned, 1, THREADS * sizeof(float), static_cast<const float*>(&x[0].x));
  } else if (name == "pipeline") {
    return run_pipeline<true, true, true>();
  } else if (name == "pipeline_without_wait") {
    return run_pipeline<false, true, true>();
  } else if (name == "pipeline_without_barrier") {
    return run_pipeline<true, false, true>();
  } else if (name == "pipeline_without_guard") {
    return run_pipeline<true, true, false>();
  } else if (name == "copy_to_misaligned") {
    return run(misplaced_copy, 1, 64, rows, 8, 0);
  } else if (name == "copy_from_misaligned") {
    return run(misplaced_copy, 1, 64, rows, 0, 4);
  } else if (name == "copy_beyond") {
    return run(misplaced_copy, 1, 64, rows, 64, 0);
  } else if (name == "load_misaligned") {
    return run(misplaced_load, 1, 64, 24);
  } else if (name == "load_beyond") {
    return run(misplaced_load, 1, 64, -16);
  } else if (name == "load" || name == "load_without_barrier") {
    std::vector<uint32_t> words(THREADS);
    return run(load_of_others, 1, THREADS * sizeof(float4), words.data(), name == "load");
  } else if (name == "not_tf32") {
    return run(not_tf32, 1, 0);
  } else if (name == "blocks") {
    return run(sum_of_blocks, 20, 0, out.data(), false);
  } else if (name == "race_of_blocks") {
    return run(sum_of_blocks, 20, 0, out.data(), true);
  } else if (name == "no_blocks") {
    return cuda::launch(nothing, dim3(0), THREADS, 0, nullptr);
  } else if (name == "many_blocks") {
    return cuda::launch(nothing, dim3(1, 65536), THREADS, 0, nullptr);
  } else if (name == "many_threads") {
    return cuda::launch(nothing, dim3(1), 1056, 0, nullptr);
  } else if (name == "much_shared") {
    return cuda::launch(nothing, dim3(1), THREADS, 99 * 1024 + 1, nullptr);
  } else if (name == "all_that_fits") {
    return cuda::launch(nothing, dim3(7), 1024, 99 * 1024, nullptr);
  } else if (name == "many_fibers") {
    return cuda::launch(nothing, dim3(126), THREADS, 0, nullptr);
  }
  return "no such case";
}

}  // namespace

// For the tests of fragments: operands of all lanes, and of all launches one warp.
extern "C" const char* probe_multiply(int dtype, const uint32_t* a, const uint32_t* b, float* d) {
  return cuda::launch(multiply, dim3(1), 32, 0, nullptr, dtype, a, b, d);
}

extern "C" const char* probe_load(const uint4* rows, bool transposed, uint32_t* out) {
  return cuda::launch(load, dim3(1), 32, 512, nullptr, rows, transposed, out);
}

extern "C" const char* probe_strides(int stride) {
  const float4 zero = {};
  return cuda::launch(strides, dim3(1), 32, 32 * stride + 16, nullptr, &zero, stride);
}

extern "C" uint32_t probe_round_to_tf32(float value) {
  return cuda::round_to_tf32(value);
}

int main(int count, char** values) {
  contrastive_ops_host_configure(count > 2 ? std::strtoull(values[2], nullptr, 10) : 0, count > 3);
  const char* error = run_case(values[1]);
  if (error != nullptr) {
    std::puts(error);
  } else if (!wrong) {
    std::puts("ok");
  }
  return error != nullptr || wrong;
}
