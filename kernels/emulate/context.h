// A stack of its own for each thread of a block, and the switch between two of them.
#pragma once

#include <sanitizer/asan_interface.h>
#include <stdint.h>
#include <stdlib.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulate {

constexpr size_t STACK_BYTES = 64 << 10;

#if defined(__x86_64__)

// Saves what the ABI says a call keeps, and goes on where `to` was left. It needs no system call,
// unlike swapcontext, and kernels switch a great many times.
extern "C" void emulate_switch(void** from, void* to);
asm(R"(
.text
.globl emulate_switch
.type emulate_switch, @function
emulate_switch:
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
.size emulate_switch, .-emulate_switch
)");

struct Context {
  void* top = nullptr;

  void start(unsigned char* stack, void (*body)()) {
    // Six registers, the address to go to, and a return address that is never used; a function finds
    // its stack 8 bytes off a multiple of 16.
    auto** at = reinterpret_cast<void**>(stack + STACK_BYTES - 8 * sizeof(void*));
    for (int i = 0; i < 8; i++) at[i] = nullptr;
    at[6] = reinterpret_cast<void*>(body);
    top = at;
  }
  static void go(Context& from, Context& to) { emulate_switch(&from.top, to.top); }
};

#else

struct Context {
  ucontext_t context;

  void start(unsigned char* stack, void (*body)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
  }
  static void go(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

}  // namespace emulate
