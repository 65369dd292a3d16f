// Compiled without sanitizers, as runtime.cpp is, and telling them about each switch of stacks.
//
// ThreadSanitizer takes a fiber for a thread. Switches carry no synchronisation: only barriers of the kernels do.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifdef CUDA_HOST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CUDA_HOST_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace contrastive_ops::cuda::host {

namespace {

// What is not touched costs no memory. Sanitizers and -O0 take a multiple of what kernels need elsewhere.
constexpr size_t STACK = 256 * 1024;

Fiber* running = nullptr;

#ifdef CUDA_HOST_ASAN
const void* caller_stack;
size_t caller_stack_size;
#endif
#ifdef CUDA_HOST_TSAN
void* caller_thread;
#endif

size_t page() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace

#ifdef __x86_64__

// Saves the registers that a function must keep on this stack, and takes them from the other.
extern "C" void contrastive_ops_switch_stacks(void** from, void* to);
asm(R"(
.text
.type contrastive_ops_switch_stacks, @function
contrastive_ops_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size contrastive_ops_switch_stacks, . - contrastive_ops_switch_stacks
)");

#endif

Fiber::Context Fiber::caller_;

Fiber::Fiber() {
  void* memory = mmap(nullptr, page() + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page(), PROT_NONE) != 0) {
    std::perror("CUDA host: no memory for the stack of a thread");
    std::abort();
  }
  stack_ = static_cast<char*>(memory) + page();  // below it, an overflow ends the process
#ifdef CUDA_HOST_TSAN
  sanitizer_ = __tsan_create_fiber(__tsan_switch_to_fiber_no_sync);
#endif
}

Fiber::~Fiber() {
#ifdef CUDA_HOST_TSAN
  __tsan_destroy_fiber(sanitizer_);
#endif
  munmap(stack_ - page(), page() + STACK);
}

void Fiber::prepare(void (*body)()) {
#ifdef CUDA_HOST_ASAN
  sanitizer_ = nullptr;
  __asan_unpoison_memory_region(stack_, STACK);  // the frames of what was abandoned
#endif
#ifdef CUDA_HOST_TSAN
  if (!ended_) {  // ThreadSanitizer still counts the calls of what was abandoned
    __tsan_destroy_fiber(sanitizer_);
    sanitizer_ = __tsan_create_fiber(__tsan_switch_to_fiber_no_sync);
  }
#endif
  body_ = body;
  ended_ = false;
#ifdef __x86_64__
  auto* top = reinterpret_cast<uint64_t*>(stack_ + STACK);
  *--top = 0;  // begin() has no caller, and finds the stack aligned as after a call
  *--top = reinterpret_cast<uint64_t>(&Fiber::begin);
  for (int registers = 0; registers < 6; ++registers) {
    *--top = 0;
  }
  context_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = STACK;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::begin, 0);
#endif
}

void Fiber::begin() {
#ifdef CUDA_HOST_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &caller_stack, &caller_stack_size);
#endif
  running->body_();
  running->ended_ = true;
  running->leave(true);
  std::abort();
}

void Fiber::resume() {
  running = this;
#ifdef CUDA_HOST_ASAN
  void* caller_frames = nullptr;
  __sanitizer_start_switch_fiber(&caller_frames, stack_, STACK);
#endif
#ifdef CUDA_HOST_TSAN
  caller_thread = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(sanitizer_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
  contrastive_ops_switch_stacks(&caller_, context_);
#else
  swapcontext(&caller_, &context_);
#endif
#ifdef CUDA_HOST_ASAN
  __sanitizer_finish_switch_fiber(caller_frames, nullptr, nullptr);
#endif
  running = nullptr;
}

void Fiber::suspend() {
  running->leave(false);
}

void Fiber::leave([[maybe_unused]] bool for_good) {
#ifdef CUDA_HOST_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &sanitizer_, caller_stack, caller_stack_size);
#endif
#ifdef CUDA_HOST_TSAN
  __tsan_switch_to_fiber(caller_thread, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
  contrastive_ops_switch_stacks(&context_, caller_);
#else
  swapcontext(&context_, &caller_);
#endif
#ifdef CUDA_HOST_ASAN
  __sanitizer_finish_switch_fiber(sanitizer_, &caller_stack, &caller_stack_size);
#endif
}

}  // namespace contrastive_ops::cuda::host
