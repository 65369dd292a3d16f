// A thread of execution that is resumed and suspended by hand, with a stack of its own.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace contrastive_ops::cuda::host {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes it begin with `body` at the next resume; whatever it was at before is abandoned.
  void prepare(void (*body)());
  // Runs it until it suspends itself or its body ends.
  void resume();
  bool ended() const {
    return ended_;
  }
  // Returns to the caller of resume(). Only within a fiber.
  static void suspend();

 private:
  static void begin();
  void leave(bool for_good);

#ifdef __x86_64__
  using Context = void*;  // the stack pointer; the registers to be kept are on the stack
#else
  using Context = ucontext_t;
#endif
  static Context caller_;  // of resume(), of which there is one at a time
  Context context_;
  void (*body_)() = nullptr;
  bool ended_ = true;
  char* stack_;
  void* sanitizer_ = nullptr;  // what AddressSanitizer or ThreadSanitizer knows it by
};

}  // namespace contrastive_ops::cuda::host
