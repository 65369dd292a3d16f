// Runs grids of fibers for device_host.h: schedule, barriers, warp-wide operations, shared memory, bank conflicts.
//
// Compiled without sanitizers, which so see the accesses of kernels alone. For ThreadSanitizer every thread of a grid
// has a fiber of its own, and nothing but barriers orders two of them: it finds races whatever the schedule was.
#include "device_host.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "fiber.h"

#ifdef CUDA_HOST_TSAN
#include <sanitizer/tsan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace contrastive_ops::cuda::host {

namespace {

constexpr int MOST_THREADS = 1024;
constexpr int MOST_SHARED_BYTES = 99 * 1024;  // of 8.6, 8.9 and 12.0, which run the code for 8.0, too
constexpr unsigned MOST_BLOCKS = 65535;       // of a grid in y and in z; in x 2^31 - 1
constexpr unsigned MOST_BLOCKS_X = 0x7fffffff;

// ThreadSanitizer of GCC knows 8128 threads. No block may have the fibers, and so the stacks, or the shared memory of
// one before it in the grid: it would pass for that one, and hide races between the two or show some that aren't there.
#ifdef CUDA_HOST_TSAN
constexpr bool KEEPS_BLOCKS = true;
constexpr size_t MOST_FIBERS = 8000;
#else
constexpr bool KEEPS_BLOCKS = false;
constexpr size_t MOST_FIBERS = ~size_t{0};
#endif

void release([[maybe_unused]] char& order) {
#ifdef CUDA_HOST_TSAN
  __tsan_release(&order);
#endif
}

void acquire([[maybe_unused]] char& order) {
#ifdef CUDA_HOST_TSAN
  __tsan_acquire(&order);
#endif
}

// What a lane brings to a warp-wide operation, and what it takes away.
struct Lane {
  uint32_t words[10];  // as many as multiply_add takes
};

struct Operation {
  const char* name;
  void (*carry_out)(Lane (&lanes)[32]);  // by the last lane to come; null where lanes read what the others brought
};

struct Warp {
  uint32_t alive = 0;
  uint32_t runnable = 0;
  // The operation that some lanes have come to. Two sets of words, as lanes may come to the next before all have left.
  uint32_t arrived = 0;
  uint32_t mask = 0;
  const Operation* operation = nullptr;
  Place place = {};
  unsigned generation = 0;
  Lane lanes[2][32];
  char order[2];  // what ThreadSanitizer knows a barrier by; two, or threads past it would order those not yet past it
};

struct Pending {
  Copy copy;
  int group;
};

struct Counted {
  Place place;
  const void* shared;
};

struct Thread {
  Fiber* fiber;
  unsigned index;
  int lane;
  Warp* warp;
  const char* waits_in = nullptr;
  Place waits_at = {};
  std::vector<Pending> pending;
  size_t carried_out = 0;  // of the pending
  int group = 0;           // the open one
  std::vector<Counted> copies;
};

struct Free {
  void operator()(void* memory) const {
    std::free(memory);
  }
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char, Free> shared;
  size_t shared_bytes;
  size_t alive;
  size_t arrived = 0;  // at the barrier
  Place barrier = {};
  unsigned generation = 0;
  bool predicate[2] = {};
  char order[2];

  Block(size_t size, size_t shared_bytes);
};

std::mutex one_grid;
std::vector<std::unique_ptr<Fiber>> fibers;  // those of earlier grids are taken again
Block* block = nullptr;
Thread* thread = nullptr;
void (*body)(void*) = nullptr;
void* kernel = nullptr;
char begin_of_block, end_of_grid;

std::mt19937_64 generator;
bool eager = false;

bool failed = false;
char failure[2048];

struct Wavefronts {
  int64_t taken = 0;
  int64_t least = 0;
};
using Site = std::tuple<const char*, int, const char*>;  // file, line, operation
std::map<Site, Wavefronts> counts;

template <typename T>
Lane lane_of(const T& value) {
  static_assert(sizeof(T) <= sizeof(Lane));
  Lane lane = {};
  std::memcpy(&lane, &value, sizeof(T));
  return lane;
}

template <typename T>
T value_of(const Lane& lane) {
  T value;
  std::memcpy(&value, &lane, sizeof(T));
  return value;
}

const char* base_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash == nullptr ? file : slash + 1;
}

bool same(Place a, Place b) {
  return a.line == b.line && a.file == b.file;  // the literals of one kernel are of one object
}

__attribute__((format(printf, 1, 2))) void describe(const char* format, ...) {
  const size_t used = std::strlen(failure);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(failure + used, sizeof(failure) - used, format, arguments);
  va_end(arguments);
}

void wait(const char* operation, Place place) {
  thread->warp->runnable &= ~(1u << thread->lane);
  thread->waits_in = operation;
  thread->waits_at = place;
  Fiber::suspend();
}

void open_barrier() {
  block->arrived = 0;
  ++block->generation;
  block->predicate[block->generation & 1] = false;
  for (Warp& warp : block->warps) {
    warp.runnable = warp.alive;
  }
}

void run_thread() {
  acquire(begin_of_block);
  body(kernel);
  release(end_of_grid);
}

Block::Block(size_t size, size_t shared_bytes)
    : threads(size), warps((size + 31) / 32), shared_bytes(shared_bytes), alive(size) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1)) != 0) {
    std::abort();
  }
  std::memset(memory, 0xff, shared_bytes);  // NaN, and an id or an index that nothing has
  shared.reset(static_cast<unsigned char*>(memory));
  for (size_t i = 0; i < size; ++i) {
    threads[i].index = static_cast<unsigned>(i);
    threads[i].lane = i % 32;
    threads[i].warp = &warps[i / 32];
    warps[i / 32].alive |= 1u << i % 32;
  }
  for (Warp& warp : warps) {
    warp.runnable = warp.alive;
  }
}

// Of a block that is the n-th to run.
void give_fibers(size_t n) {
  const size_t first = KEEPS_BLOCKS ? n * block->threads.size() : 0;
  while (fibers.size() < first + block->threads.size()) {
    fibers.push_back(std::make_unique<Fiber>());
  }
  for (Thread& thread : block->threads) {
    thread.fiber = fibers[first + thread.index].get();
    thread.fiber->prepare(run_thread);
  }
}

void resume(Thread& next) {
  thread = &next;
  threadIdx = {next.index, 0, 0};
  next.fiber->resume();
  if (next.fiber->ended()) {
    next.warp->alive &= ~(1u << next.lane);
    next.warp->runnable &= next.warp->alive;
    if (--block->alive > 0 && block->arrived == block->alive) {  // threads that have ended count as arrived
      open_barrier();
    }
  }
  thread = nullptr;
}

void report_deadlock() {
  failed = true;
  describe("deadlock in block (%u, %u):", blockIdx.x, blockIdx.y);
  std::map<std::tuple<std::string, int, std::string>, std::pair<int, unsigned>> waiting;  // how many, and the first
  for (const Thread& thread : block->threads) {
    if (!thread.fiber->ended()) {
      auto& [count, first] = waiting[{base_name(thread.waits_at.file), thread.waits_at.line, thread.waits_in}];
      first = count++ == 0 ? thread.index : first;
    }
  }
  for (const auto& [where, who] : waiting) {
    const auto& [file, line, operation] = where;
    describe(
        " %d threads wait in %s at %s:%d, the first is %u;",
        who.first,
        operation.c_str(),
        file.c_str(),
        line,
        who.second);
  }
  describe(" %zu have ended", block->threads.size() - block->alive);
}

// Warp after warp, each as far as it gets alone: where a barrier is missing, one is as far ahead as can be.
void run_block() {
  std::vector<Warp*> runnable;
  while (block->alive > 0) {
    runnable.clear();
    for (Warp& warp : block->warps) {
      if (warp.runnable != 0) {
        runnable.push_back(&warp);
      }
    }
    if (runnable.empty()) {
      return report_deadlock();
    }
    Warp& warp = *runnable[generator() % runnable.size()];
    Thread* first = &block->threads[32 * (&warp - block->warps.data())];
    while (warp.runnable != 0) {
      const uint64_t random = generator();
      const unsigned start = random % 32, step = random / 32 | 1;  // odd: every lane once
      for (unsigned i = 0; i < 32; ++i) {
        const unsigned lane = (start + i * step) % 32;
        if (warp.runnable >> lane & 1) {
          resume(first[lane]);
          if (failed) {
            return;
          }
        }
      }
    }
  }
}

// 8 lanes with 16 bytes each are one wavefront, unless two of them have different addresses in the same banks.
int wavefronts_of(const void* const (&addresses)[8]) {
  int most = 0;
  for (uintptr_t banks = 0; banks < 8; ++banks) {  // of four
    int different = 0;
    for (int lane = 0; lane < 8; ++lane) {
      const bool meets = addresses[lane] != nullptr && reinterpret_cast<uintptr_t>(addresses[lane]) / 16 % 8 == banks;
      different += meets && std::find(addresses, addresses + lane, addresses[lane]) == addresses + lane;
    }
    most = std::max(most, different);
  }
  return most;
}

void count(const char* operation, Place place, const void* const (&addresses)[4][8]) {
  Wavefronts& total = counts[{place.file, place.line, operation}];
  for (const auto& phase : addresses) {
    const int wavefronts = wavefronts_of(phase);
    total.taken += wavefronts;
    total.least += wavefronts > 0;
  }
}

// The n-th copy of a lane at some place in the source belongs to the n-th of the others.
void count_copies() {
  for (size_t first = 0; first < block->threads.size(); first += 32) {
    std::map<std::pair<const char*, int>, std::array<std::vector<const void*>, 32>> sites;
    for (size_t i = first; i < std::min(first + 32, block->threads.size()); ++i) {
      for (const Counted& copy : block->threads[i].copies) {
        sites[{copy.place.file, copy.place.line}][i % 32].push_back(copy.shared);
      }
    }
    for (const auto& [site, copies] : sites) {
      size_t times = 0;
      for (const auto& of_lane : copies) {
        times = std::max(times, of_lane.size());
      }
      for (size_t time = 0; time < times; ++time) {
        const void* addresses[4][8] = {};
        for (int lane = 0; lane < 32; ++lane) {
          addresses[lane / 8][lane % 8] = time < copies[lane].size() ? copies[lane][time] : nullptr;
        }
        count("copy_async", {site.first, site.second}, addresses);
      }
    }
  }
}

// Element (row, col) of matrix i of those that the lanes have the rows of.
uint32_t element(const Lane (&rows)[32], int i, int row, int col) {
  return rows[8 * i + row].words[col / 2] >> 16 * (col % 2) & 0xffff;
}

struct Row {
  uint4 elements;
  const void* address;
};

template <bool transposed>
void load_fragments(Lane (&lanes)[32]) {
  const void* addresses[4][8];
  Lane rows[32];
  for (int lane = 0; lane < 32; ++lane) {
    rows[lane] = lanes[lane];
    addresses[lane / 8][lane % 8] = value_of<Row>(lanes[lane]).address;
  }
  count(thread->warp->operation->name, thread->warp->place, addresses);
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, col = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = transposed ? element(rows, i, col, row) : element(rows, i, row, col);
      const uint32_t high = transposed ? element(rows, i, col + 1, row) : element(rows, i, row, col + 1);
      lanes[lane].words[i] = low | high << 16;
    }
  }
}

double of_bfloat16(uint32_t bits) {
  __nv_bfloat16_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __bfloat162float(raw);
}

double of_float16(uint32_t bits) {
  __half_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __half2float(raw);
}

double of_tf32(uint32_t bits) {
  if (bits & 0x1fff) {
    fail("an operand of multiply_add is not a TF32: round_to_tf32 it", thread->warp->place);
  }
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The matrix unit truncates what it adds up.
float toward_zero(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

// The fragments of mma.sync in the PTX ISA. A register has `packed` elements of a row of a, or of a column of b; lane
// l has row l / 4 and elements packed (l % 4) .. of the first half of K in the first register, and so on:
//   a[0] (row, first half)   a[1] (row + 8, first half)   a[2] (row, second half)   a[3] (row + 8, second half)
//   b[0] (first half, col l / 4)   b[1] (second half, col l / 4)
//   d[0], d[1] (row l / 4, cols 2 (l % 4), + 1)   d[2], d[3] (the same of row + 8)
template <int packed, double (*decode)(uint32_t)>
void multiply_fragments(Lane (&lanes)[32]) {
  constexpr int depth = 8 * packed;
  double a[16][depth], b[8][depth];
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4;
    for (int i = 0; i < packed; ++i) {
      const int k = lane % 4 * packed + i;
      const auto decoded = [&](int word) {
        return decode(packed == 1 ? lanes[lane].words[word] : lanes[lane].words[word] >> 16 * i & 0xffff);
      };
      a[row][k] = decoded(0);
      a[row + 8][k] = decoded(1);
      a[row][k + depth / 2] = decoded(2);
      a[row + 8][k + depth / 2] = decoded(3);
      b[row][k] = decoded(4);
      b[row][k + depth / 2] = decoded(5);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), col = lane % 4 * 2 + i % 2;
      float d;
      std::memcpy(&d, &lanes[lane].words[6 + i], sizeof(d));
      double sum = d;
      for (int k = 0; k < depth; ++k) {
        sum += a[row][k] * b[col][k];
      }
      d = toward_zero(sum);
      std::memcpy(&lanes[lane].words[6 + i], &d, sizeof(d));
    }
  }
}

const Operation SHUFFLE = {"a shuffle", nullptr};
const Operation VOTE = {"a vote", nullptr};
const Operation REDUCTION = {"__reduce_min_sync or __reduce_max_sync", nullptr};
const Operation SYNCHRONISATION = {"__syncwarp", nullptr};
const Operation LOAD = {"load_matrices", load_fragments<false>};
const Operation LOAD_TRANSPOSED = {"load_matrices_transposed", load_fragments<true>};
const Operation MULTIPLY[] = {
    // by Format
    {"multiply_add", multiply_fragments<2, of_bfloat16>},
    {"multiply_add", multiply_fragments<2, of_float16>},
    {"multiply_add", multiply_fragments<1, of_tf32>}};

// What all lanes of `mask` have brought, once they have, or made of it. It lasts until this lane's next operation.
const Lane (&exchange(const Operation& operation, uint32_t mask, const Lane& lane, Place place))[32] {
  Warp& warp = *thread->warp;
  const uint32_t self = 1u << thread->lane;
  if ((mask & self) == 0) {
    fail("a lane is not in the mask that it names", place);
  }
  if (warp.arrived == 0) {
    warp.operation = &operation;
    warp.mask = mask;
    warp.place = place;
  } else if (warp.operation != &operation || warp.mask != mask || !same(warp.place, place)) {
    char message[512];
    std::snprintf(
        message,
        sizeof(message),
        "lanes of a warp part: this one has come to %s with mask %08x, others to %s with mask %08x at %s:%d",
        operation.name,
        mask,
        warp.operation->name,
        warp.mask,
        base_name(warp.place.file),
        warp.place.line);
    fail(message, place);
  }
  Lane(&lanes)[32] = warp.lanes[warp.generation & 1];
  lanes[thread->lane] = lane;
  warp.arrived |= self;
  if (warp.arrived != mask) {
    wait(operation.name, place);
    return lanes;
  }
  if (operation.carry_out != nullptr) {
    operation.carry_out(lanes);
  }
  warp.arrived = 0;
  ++warp.generation;
  warp.runnable |= mask;
  return lanes;
}

template <typename T, typename Join>
T reduce(const Operation& operation, uint32_t mask, T value, Join join, Place place) {
  const Lane(&lanes)[32] = exchange(operation, mask, lane_of(value), place);
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) {
      value = join(value, value_of<T>(lanes[lane]));
    }
  }
  return value;
}

const char* refusal(dim3 grid, int threads, int shared_bytes) {
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > MOST_BLOCKS_X || grid.y > MOST_BLOCKS ||
      grid.z > MOST_BLOCKS) {
    describe(
        "a grid of %u x %u x %u blocks: each must be at least 1, the first at most 2^31 - 1, the others %u",
        grid.x,
        grid.y,
        grid.z,
        MOST_BLOCKS);
  } else if (threads < 1 || threads > MOST_THREADS) {
    describe("%d threads in a block: there must be 1 to %d", threads, MOST_THREADS);
  } else if (shared_bytes < 0 || shared_bytes > MOST_SHARED_BYTES) {
    describe("%d bytes of shared memory: a block has at most %d", shared_bytes, MOST_SHARED_BYTES);
  } else if (static_cast<size_t>(grid.x) * grid.y * grid.z > MOST_FIBERS / threads) {
    describe(
        "a grid of %u x %u x %u blocks of %d threads: ThreadSanitizer has room for %zu threads",
        grid.x,
        grid.y,
        grid.z,
        threads,
        MOST_FIBERS);
  }
  return failure[0] == '\0' ? nullptr : failure;
}

}  // namespace

void fail(const char* message, Place place) {
  failed = true;
  describe(
      "%s:%d: %s; block (%u, %u), thread %u",
      base_name(place.file),
      place.line,
      message,
      blockIdx.x,
      blockIdx.y,
      thread->index);
  Fiber::suspend();
  std::abort();
}

int lane_index() {
  return thread->lane;
}

bool synchronise_block(bool predicate, Place place) {
  if (block->arrived == 0) {
    block->barrier = place;
  } else if (!same(block->barrier, place)) {
    char message[512];
    std::snprintf(
        message,
        sizeof(message),
        "threads of a block part: this one has come to __syncthreads here, others at %s:%d",
        base_name(block->barrier.file),
        block->barrier.line);
    fail(message, place);
  }
  const unsigned side = block->generation & 1;
  block->predicate[side] |= predicate;
  release(block->order[side]);
  if (++block->arrived == block->alive) {
    open_barrier();
  } else {
    wait("__syncthreads", place);
  }
  acquire(block->order[side]);
  return block->predicate[side];
}

void synchronise_warp(uint32_t mask, Place place) {
  char& order = thread->warp->order[thread->warp->generation & 1];
  release(order);
  exchange(SYNCHRONISATION, mask, Lane(), place);
  acquire(order);
}

uint64_t shuffle(uint32_t mask, uint64_t bits, int source, Place place) {
  const Lane(&lanes)[32] = exchange(SHUFFLE, mask, lane_of(bits), place);
  if ((mask >> source & 1) == 0) {
    fail("a lane asks for the value of one that is not in the mask", place);
  }
  return value_of<uint64_t>(lanes[source]);
}

uint32_t vote(uint32_t mask, bool predicate, Place place) {
  return reduce(VOTE, mask, uint32_t{predicate} << thread->lane, std::bit_or<uint32_t>(), place);
}

int minimum(uint32_t mask, int value, Place place) {
  return reduce(REDUCTION, mask, value, [](int a, int b) { return std::min(a, b); }, place);
}

int maximum(uint32_t mask, int value, Place place) {
  return reduce(REDUCTION, mask, value, [](int a, int b) { return std::max(a, b); }, place);
}

void multiply(Format format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  Lane lane;
  std::memcpy(lane.words, a, sizeof(a));
  std::memcpy(lane.words + 4, b, sizeof(b));
  std::memcpy(lane.words + 6, d, sizeof(d));
  const Lane(&lanes)[32] = exchange(MULTIPLY[static_cast<int>(format)], ~0u, lane, place);
  std::memcpy(d, lanes[thread->lane].words + 6, sizeof(d));
}

void load(bool transposed, uint32_t (&r)[4], const uint4& row, const void* shared, Place place) {
  const Lane(&lanes)[32] = exchange(transposed ? LOAD_TRANSPOSED : LOAD, ~0u, lane_of(Row{row, shared}), place);
  std::memcpy(r, lanes[thread->lane].words, sizeof(r));
}

unsigned char* shared_memory() {
  return block->shared.get();
}

void check_shared(const void* shared, const char* operation, Place place) {
  const auto address = reinterpret_cast<uintptr_t>(shared);
  const auto begin = reinterpret_cast<uintptr_t>(block->shared.get());
  const char* complaint = nullptr;
  if (address < begin || address + 16 > begin + block->shared_bytes) {
    complaint = "outside of the shared memory of the block";
  } else if (address % 16 != 0) {
    complaint = "not aligned to 16 bytes";
  }
  if (complaint != nullptr) {
    char message[256];
    std::snprintf(
        message,
        sizeof(message),
        "%s: byte %td of %zu of shared memory is %s",
        operation,
        static_cast<ptrdiff_t>(address - begin),
        block->shared_bytes,
        complaint);
    fail(message, place);
  }
}

void count_copy(const void* shared, Place place) {
  thread->copies.push_back({place, shared});
}

bool copies_are_eager() {
  return eager;
}

void put_off(const Copy& copy) {
  thread->pending.push_back({copy, thread->group});
}

void end_group() {
  ++thread->group;
}

bool take_due(int groups, Copy& copy) {
  if (thread->carried_out == thread->pending.size()) {
    return false;
  }
  const Pending& next = thread->pending[thread->carried_out];
  if (next.group + groups >= thread->group) {
    return false;
  }
  copy = next.copy;
  ++thread->carried_out;
  return true;
}

int threads_of_launch, shared_bytes_of_launch;

const char* run_grid(dim3 grid, int threads, int shared_bytes, void (*grid_body)(void*), void* grid_kernel) {
  const std::lock_guard<std::mutex> lock(one_grid);
  failed = false;
  failure[0] = '\0';
  if (const char* message = refusal(grid, threads, shared_bytes)) {
    return message;
  }
  body = grid_body;
  kernel = grid_kernel;
  threads_of_launch = threads;
  shared_bytes_of_launch = shared_bytes;
  gridDim = grid;
  blockDim = dim3(threads);
  std::vector<unsigned> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), generator);
  std::vector<std::unique_ptr<Block>> blocks;
  for (size_t n = 0; n < order.size() && !failed; ++n) {
    blockIdx = {order[n] % grid.x, order[n] / grid.x % grid.y, order[n] / grid.x / grid.y};
    blocks.push_back(std::make_unique<Block>(threads, shared_bytes));
    block = blocks.back().get();
    give_fibers(n);
    release(begin_of_block);  // what the fibers find was written before they go on
    run_block();
    count_copies();
    if (!KEEPS_BLOCKS) {
      blocks.clear();
    }
  }
  acquire(end_of_grid);
  block = nullptr;
  return failed ? failure : nullptr;
}

}  // namespace contrastive_ops::cuda::host

void contrastive_ops_host_configure(uint64_t seed, bool eager) {
  cuda_host::generator.seed(seed);
  cuda_host::eager = eager;
}

int contrastive_ops_host_threads() {
  return cuda_host::threads_of_launch;
}

int contrastive_ops_host_shared_bytes() {
  return cuda_host::shared_bytes_of_launch;
}

const char* contrastive_ops_host_wavefronts() {
  static std::string text;
  std::map<std::string, cuda_host::Wavefronts> totals;  // a header has a name of its own in every object
  for (const auto& [site, count] : cuda_host::counts) {
    const auto& [file, line, operation] = site;
    auto& total = totals[std::string(operation) + " " + cuda_host::base_name(file) + ":" + std::to_string(line)];
    total.taken += count.taken;
    total.least += count.least;
  }
  cuda_host::counts.clear();
  text.clear();
  for (const auto& [site, total] : totals) {
    text += site + ", " + std::to_string(total.taken) + ", " + std::to_string(total.least) + "\n";
  }
  return text.c_str();
}
