// The threads of a block: who waits for what, and when all of them have come.
#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include <vector>

#include "context.h"

namespace emulate {

constexpr uint32_t LANES = 32;

// A copy into shared memory that is under way; from == nullptr fills with zeros.
struct Copy {
  void* to;
  const void* from;
};

enum class State { Ready, AtBarrier, AtCollective, Done };

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  State state = State::Done;
  uint32_t index = 0;
  // Line of the barrier, or name of the collective, that it waits at.
  int line = 0;
  const char* collective = nullptr;
  uint32_t mask = 0;
  const void* in = nullptr;
  void* out = nullptr;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

// All state of the emulation; one block runs at a time.
struct World {
  std::vector<Fiber> fibers;
  Context scheduler;
  Fiber* current = nullptr;
  const char* kernel = "";
  void (*body)(const void*) = nullptr;
  const void* args = nullptr;
  // Threads run from the last to the first, and copies land at once.
  bool backwards = false;
  // Blocks so far: what was left in shared memory by an earlier one is poisoned.
  uint64_t block = 0;
  unsigned char* dynamic_shared = nullptr;
};
static World world;

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  fprintf(stderr, "emulate: %s, block %u,%u,%u thread %u: ", world.kernel, blockIdx.x, blockIdx.y,
          blockIdx.z, threadIdx.x);
  va_list args;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fputc('\n', stderr);
  fflush(stderr);
  _exit(3);
}

inline void land(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.from) {
      memcpy(copy.to, copy.from, 16);
    } else {
      memset(copy.to, 0, 16);
    }
  }
}

inline void hand_over() { Context::go(world.current->context, world.scheduler); }

inline void wait_for_block(int line) {
  world.current->state = State::AtBarrier;
  world.current->line = line;
  hand_over();
}

// Every lane in `mask` comes here with the same mask; the last to come computes the results of all.
template <typename In, typename Out>
Out collect(const char* name, uint32_t mask, const In& in,
            void (*compute)(uint32_t mask, const In* const* in, Out* const* out)) {
  Fiber& self = *world.current;
  uint32_t first = self.index / LANES * LANES;
  Out result;
  self.collective = name;
  self.mask = mask;
  self.in = &in;
  self.out = &result;
  if (!(mask >> (self.index - first) & 1)) fail("%s: its own lane is not in mask %08x", name, mask);
  const In* ins[LANES] = {};
  Out* outs[LANES] = {};
  for (uint32_t lane = 0; lane < LANES; lane++) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= world.fibers.size()) fail("%s: lane %u does not exist", name, lane);
    Fiber& other = world.fibers[first + lane];
    if (&other != &self) {
      if (other.state == State::Done) fail("%s: lane %u has ended", name, lane);
      if (other.state != State::AtCollective) {
        self.state = State::AtCollective;
        hand_over();
        return result;
      }
      bool same = other.collective == name || strcmp(other.collective, name) == 0;
      if (!same || other.mask != mask) {
        fail("%s with mask %08x meets %s with mask %08x of lane %u", name, mask, other.collective,
             other.mask, lane);
      }
    }
    ins[lane] = static_cast<const In*>(other.in);
    outs[lane] = static_cast<Out*>(other.out);
  }
  compute(mask, ins, outs);
  for (uint32_t lane = 0; lane < LANES; lane++) {
    if (mask >> lane & 1) world.fibers[first + lane].state = State::Ready;
  }
  return result;
}

inline void thread_main() {
  world.body(world.args);
  Fiber& self = *world.current;
  if (!self.groups.empty() || !self.open.empty()) fail("ends with a copy under way");
  self.state = State::Done;
  hand_over();
  abort();
}

inline void resume(Fiber& fiber) {
  world.current = &fiber;
  uint32_t index = fiber.index;
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
  Context::go(world.scheduler, fiber.context);
}

// Lets all threads of a block through if they wait at one barrier; false if they never will.
inline bool open_barrier() {
  const Fiber* waiting = nullptr;
  for (const Fiber& fiber : world.fibers) {
    if (fiber.state == State::AtCollective) return false;
    if (fiber.state == State::AtBarrier) {
      if (waiting && waiting->line != fiber.line) {
        fail("threads wait at the barriers of lines %d and %d", waiting->line, fiber.line);
      }
      waiting = &fiber;
    }
  }
  for (Fiber& fiber : world.fibers) {
    if (fiber.state == State::AtBarrier) fiber.state = State::Ready;
  }
  return waiting != nullptr;
}

inline void run_block() {
  world.block++;
  for (Fiber& fiber : world.fibers) {
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack, STACK_BYTES);
    fiber.context.start(fiber.stack, thread_main);
    fiber.state = State::Ready;
  }
  while (true) {
    bool ran = false, left = false;
    size_t count = world.fibers.size();
    for (size_t i = 0; i < count; i++) {
      Fiber& fiber = world.fibers[world.backwards ? count - 1 - i : i];
      if (fiber.state == State::Ready) {
        resume(fiber);
        ran = true;
      }
      left |= fiber.state != State::Done;
    }
    if (!left) return;
    if (!ran && !open_barrier()) fail("threads wait for others that never come");
  }
}

}  // namespace emulate
