// Fibers and their scheduler: one block after the other, on one thread.
#include "cuda/emulate/device.h"

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace branchwise::cuda {

Grid threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {
namespace {

constexpr size_t kStack = 256 * 1024;

enum class State { ready, at_warp, at_block, ended };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  unsigned thread;
  State state;
  Operation operation;
  void* operand;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  ucontext_t first;
  jmp_buf where;
  bool begun;
  std::unique_ptr<char[]> stack;
};

struct Block {
  std::vector<Fiber> fibers;
  std::unique_ptr<char[]> shared;
  const std::function<void()>* kernel;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  uint32_t random = 1;
};
Block block;

// longjmp between stacks, as swapcontext would save the signal mask with a system call each time.
void leave() {
  Fiber* fiber = block.current;
  if (_setjmp(fiber->where) == 0) _longjmp(block.scheduler, 1);
}

void enter_fiber() {
  (*block.kernel)();
  block.current->state = State::ended;
  _longjmp(block.scheduler, 1);
}

void resume(Fiber& fiber) {
  block.current = &fiber;
  threadIdx = Grid(fiber.thread, 0, 0);
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.where, 1);
  fiber.begun = true;
  setcontext(&fiber.first);
}

// Runs a warp until its lanes meet, or wait for the block, or end. False: they all wait or ended.
bool run_warp(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i)
    if (block.fibers[i].state == State::ready) resume(block.fibers[i]);
  Fiber& first = block.fibers[begin];
  bool same = true;
  for (size_t i = begin; i < end; ++i) {
    same &= block.fibers[i].state == first.state;
    same &= first.state != State::at_warp || block.fibers[i].operation == first.operation;
  }
  if (!same)
    throw std::runtime_error("emulated kernel: the lanes of warp " + std::to_string(begin / 32) +
                             " of block " + std::to_string(blockIdx.x) +
                             " wait at different places");
  if (first.state != State::at_warp) return false;
  void* operands[32];
  for (size_t i = begin; i < end; ++i) operands[i - begin] = block.fibers[i].operand;
  first.operation(operands);
  for (size_t i = begin; i < end; ++i) block.fibers[i].state = State::ready;
  return true;
}

void run_block(int shared_bytes) {
  std::memset(block.shared.get(), 0xff, shared_bytes);  // NaN, in every type
  const size_t threads = block.fibers.size();
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.thread = static_cast<unsigned>(i);
    fiber.state = State::ready;
    fiber.begun = false;
    fiber.open.clear();
    fiber.groups.clear();
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.get();
    fiber.first.uc_stack.ss_size = kStack;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, enter_fiber, 0);
  }
  std::vector<size_t> running;
  for (size_t warp = 0; warp < threads / 32; ++warp) running.push_back(warp);
  for (;;) {
    while (!running.empty()) {
      block.random = block.random * 1664525 + 1013904223;
      size_t& picked = running[(block.random >> 8) % running.size()];
      if (run_warp(picked * 32, picked * 32 + 32)) continue;
      picked = running.back();
      running.pop_back();
    }
    size_t waiting = 0;
    for (const Fiber& fiber : block.fibers) waiting += fiber.state == State::at_block;
    if (waiting == 0) return;
    if (waiting != threads)
      throw std::runtime_error(
          "emulated kernel: a barrier that some threads of the block never reach");
    for (Fiber& fiber : block.fibers) fiber.state = State::ready;
    for (size_t warp = 0; warp < threads / 32; ++warp) running.push_back(warp);
  }
}

}  // namespace

void meet(Operation operation, void* operand) {
  Fiber& fiber = *block.current;
  fiber.operation = operation;
  fiber.operand = operand;
  fiber.state = State::at_warp;
  leave();
}

char* shared() { return block.shared.get(); }

void copy(void* to, const void* from, bool valid) {
  std::memset(to, 0xff, 16);
  block.current->open.push_back({to, from, valid});
}

void commit() {
  block.current->groups.push_back(std::move(block.current->open));
  block.current->open.clear();
}

void wait(int pending) {
  auto& groups = block.current->groups;
  for (; groups.size() > static_cast<size_t>(pending); groups.pop_front())
    for (const Copy& c : groups.front())
      c.valid ? std::memcpy(c.to, c.from, 16) : std::memset(c.to, 0, 16);
}

void run(Grid grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (threads % 32 != 0) throw std::runtime_error("emulated kernel: blocks are whole warps");
  block.kernel = &kernel;
  block.shared.reset(new char[shared_bytes + 1]);
  block.fibers.resize(threads);
  for (Fiber& fiber : block.fibers)
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  blockDim = Grid(threads, 1, 1);
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = Grid(x, y, z);
        run_block(shared_bytes);
      }
}

}  // namespace emulate

void sync_block() {
  emulate::block.current->state = emulate::State::at_block;
  emulate::leave();
}

}  // namespace branchwise::cuda
