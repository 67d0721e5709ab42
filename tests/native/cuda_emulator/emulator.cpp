#include <ucontext.h>

#include <memory>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t stack_size = 64 * 1024;

// Where threads meet: the last one to come opens the gate for all.
struct Gate {
  unsigned members = 0, arrived = 0, opened = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_size]};
  bool finished = false;
  unsigned exchanges = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  Gate gate;
  std::vector<Gate> warps;
  std::vector<uint64_t> slots;  // (warp, parity of the exchange, lane)
  std::vector<char> shared;
  ucontext_t scheduler;
  unsigned current = 0;
  bool moved = false;  // somebody finished or opened a gate in this round
  const std::function<void()>* thread = nullptr;
};

Block block;

void run() {
  (*block.thread)();
  block.fibers[block.current].finished = true;
  block.moved = true;
}

void wait(Gate& gate) {
  const unsigned seen = gate.opened;
  if (++gate.arrived == gate.members) {
    gate.arrived = 0;
    ++gate.opened;
    block.moved = true;
    return;
  }
  while (gate.opened == seen) swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

void run_block(unsigned threads) {
  block.gate = {threads, 0, 0};
  block.warps.assign(threads / 32, {32, 0, 0});
  block.slots.assign(threads * 2, 0);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.finished = false;
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_size;
    fiber.context.uc_link = &block.scheduler;
    makecontext(&fiber.context, run, 0);
  }
  for (bool unfinished = true; unfinished;) {
    unfinished = block.moved = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (block.fibers[i].finished) continue;
      block.current = i;
      threadIdx = {i, 0, 0};
      swapcontext(&block.scheduler, &block.fibers[i].context);
      unfinished = unfinished || !block.fibers[i].finished;
    }
    if (unfinished && !block.moved) {
      std::fputs("emulator: threads wait for one that never comes\n", stderr);
      std::abort();
    }
  }
}

}  // namespace

void launch(dim3 grid, dim3 size, size_t shared, cudaStream_t, const std::function<void()>& thread) {
  if (size.x % 32 != 0 || size.y != 1 || size.z != 1 || grid.x == 0 || grid.y == 0 || grid.y > 65535) {
    std::fputs("emulator: a launch of no such shape\n", stderr);
    std::abort();
  }
  if (block.fibers.size() < size.x) block.fibers.resize(size.x);
  block.thread = &thread;
  blockDim = size;
  gridDim = grid;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = {x, y, 0};
      block.shared.assign(shared + 16, 0x55);  // nobody cleared it
      run_block(size.x);
    }
  }
}

void* shared_memory() {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block.shared.data()) + 15) / 16 * 16);
}

void wait_for_block() { wait(block.gate); }

const uint64_t* exchange(uint64_t own) {
  Fiber& fiber = block.fibers[block.current];
  const unsigned warp = block.current / 32, lane = block.current % 32;
  // nobody is two exchanges ahead of another, so two sets of slots do
  uint64_t* const slots = block.slots.data() + (warp * 2 + fiber.exchanges++ % 2) * 32;
  slots[lane] = own;
  wait(block.warps[warp]);
  return slots;
}

}  // namespace emulator
