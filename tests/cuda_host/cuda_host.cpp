// The fibers behind cuda_host.h, and a few instructions.
#include "cuda_host.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace gradvac::host {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr std::size_t kStack = 256 << 10;  // reserved; only what is touched is there
constexpr int kFailed = 719, kNoneFits = 720;

struct Block;

struct Fiber {
  jmp_buf at;
  ucontext_t context;
  void* stack = nullptr;
  bool begun = false;
  Block* block = nullptr;
  int thread = 0;
};

// A barrier of some fibers, and what they show each other there.
struct Meeting {
  int members = 0, arrived = 0;
  std::uint32_t shown[2][32][8];  // in turns: who is late still reads what the others read
  int turn = 0;
  std::vector<Fiber*> waiting;
};

struct Block {
  std::int64_t index = 0;
  std::deque<Fiber*> ready, waiting;  // the latter for something to be shown
  std::int64_t looked = 0;            // at so many of `shown`
  int live = 0;
  Meeting all;
  std::vector<Meeting> warps;
  std::vector<char> shared;
  std::vector<Fiber*> fibers;
  double speed = 1;
};

// Only one launch runs at a time: the tests do not call from several threads.
jmp_buf scheduler;
Fiber* current = nullptr;
std::vector<Fiber*> idle;
std::vector<std::unique_ptr<Fiber>> fibers;
Body body;
void* call;
std::string failure;
std::mt19937_64 random_numbers;
bool fuzzed = false;
bool wants_another_block = false;
std::int64_t switched = 0, launched = 0, shown = 0;
int resident_blocks = 3;

// To the scheduler, until it chooses this fiber again.
__attribute__((noinline)) void leave() {
  if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    body(call);
    Block* block = current->block;
    --block->live;
    idle.push_back(current);
    leave();
  }
}

__attribute__((noinline)) void enter(Fiber* fiber) {
  current = fiber;
  thread_index.x = fiber->thread;
  block_index.x = static_cast<unsigned>(fiber->block->index);
  if (_setjmp(scheduler) != 0) return;
  if (fiber->begun) _longjmp(fiber->at, 1);
  fiber->begun = true;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, live, 0);
  setcontext(&fiber->context);
}

Fiber* take_fiber() {
  if (idle.empty()) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber* fiber = fibers.back().get();
    fiber->stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber->stack == MAP_FAILED) throw std::bad_alloc();
    return fiber;
  }
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

std::unique_ptr<Block> start(std::int64_t index, int threads, std::size_t shared) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->live = threads;
  block->all.members = threads;
  block->warps.resize((threads + 31) / 32);
  block->shared.assign(shared + 16, static_cast<char>(0xFF));  // NaN: what nobody wrote shows
  for (int thread = 0; thread < threads; ++thread) {
    ++block->warps[thread / 32].members;
    Fiber* fiber = take_fiber();
    fiber->block = block.get();
    fiber->thread = thread;
    block->ready.push_back(fiber);
    block->fibers.push_back(fiber);
  }
  if (fuzzed) block->speed = std::exp(4 * std::uniform_real_distribution<double>(-1, 1)(random_numbers));
  return block;
}

// Which of the blocks goes on; any that can, faster ones more often.
std::size_t choose(const std::vector<std::unique_ptr<Block>>& blocks, std::size_t last) {
  if (!fuzzed) {
    for (std::size_t b = 0; b < blocks.size(); ++b) {
      const std::size_t which = (last + b + (wants_another_block ? 1 : 0)) % blocks.size();
      if (!blocks[which]->ready.empty()) return which;
    }
    return blocks.size();
  }
  if (!wants_another_block && last < blocks.size() && !blocks[last]->ready.empty()) return last;
  double sum = 0;
  for (const auto& block : blocks) sum += block->ready.empty() ? 0 : block->speed;
  double left = std::uniform_real_distribution<double>(0, sum)(random_numbers);
  std::size_t found = blocks.size();
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    if (blocks[b]->ready.empty()) continue;
    found = b;
    left -= blocks[b]->speed;
    if (left < 0) break;
  }
  return found;
}

void meet(Meeting& meeting) {
  if (++meeting.arrived < meeting.members) {
    meeting.waiting.push_back(current);
    leave();
    return;
  }
  meeting.arrived = 0;
  meeting.turn ^= 1;
  auto& ready = current->block->ready;
  ready.insert(ready.end(), meeting.waiting.begin(), meeting.waiting.end());
  meeting.waiting.clear();
}

Meeting& warp() { return current->block->warps[current->thread / 32]; }

}  // namespace

void fuzz(std::uint64_t seed) {
  fuzzed = seed != 0;
  random_numbers.seed(seed);
}
void set_residents(int blocks) { resident_blocks = blocks; }
std::int64_t switches() { return switched; }
std::int64_t launches() { return launched; }

char* shared_memory() {
  const auto address = reinterpret_cast<std::uintptr_t>(current->block->shared.data());
  return reinterpret_cast<char*>((address + 15) / 16 * 16);
}
void wait_for_block() { meet(current->block->all); }
void wait_for_warp() { meet(warp()); }
void exchange_all(const std::uint32_t* words, int count, std::uint32_t (*all)[8]) {
  Meeting& meeting = warp();
  const int turn = meeting.turn;
  std::copy(words, words + count, meeting.shown[turn][current->thread % 32]);
  meet(meeting);
  std::memcpy(all, meeting.shown[turn], sizeof meeting.shown[turn]);
}
std::uint64_t exchange(std::uint64_t bits, int lane) {
  Meeting& meeting = warp();
  const int turn = meeting.turn;
  std::memcpy(meeting.shown[turn][current->thread % 32], &bits, sizeof bits);
  meet(meeting);
  std::memcpy(&bits, meeting.shown[turn][lane], sizeof bits);
  return bits;
}
void let_others() {
  current->block->ready.push_back(current);
  wants_another_block = true;
  leave();
}
void show() { ++shown; }
void wait_to_be_shown() {
  current->block->waiting.push_back(current);
  wants_another_block = true;
  leave();
}
void fail(const char* reason) {
  failure = reason;
  leave();
  __builtin_unreachable();
}

int run(Body body_, void* call_, std::int64_t blocks, int threads, std::size_t shared) {
  if (blocks < 1 || blocks > 0x7FFFFFFF || threads < 1 || threads > 1024) return 9;
  if (resident_blocks < 1) return kNoneFits;
  body = body_;
  call = call_;
  failure.clear();
  block_size.x = threads;
  grid_size.x = static_cast<unsigned>(blocks);
  std::vector<std::unique_ptr<Block>> on_device;
  ++launched;
  std::vector<std::int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (fuzzed) std::shuffle(order.begin(), order.end(), random_numbers);
  std::int64_t started = 0;
  std::size_t last = 0;
  while (failure.empty()) {
    on_device.erase(std::remove_if(on_device.begin(), on_device.end(), [](const auto& b) { return b->live == 0; }),
                    on_device.end());
    while (started < blocks && static_cast<std::int64_t>(on_device.size()) < resident_blocks) {
      on_device.push_back(start(order[started++], threads, shared));
    }
    if (on_device.empty()) return 0;
    for (const auto& block : on_device) {
      if (block->looked == shown) continue;
      block->looked = shown;
      block->ready.insert(block->ready.end(), block->waiting.begin(), block->waiting.end());
      block->waiting.clear();
    }
    const std::size_t which = choose(on_device, std::min(last, on_device.size() - 1));
    if (which == on_device.size()) {
      failure = "deadlock: every thread waits for another one";
      break;
    }
    switched += which != last;
    last = which;
    wants_another_block = false;
    Block& block = *on_device[which];
    while (!block.ready.empty() && failure.empty() && !wants_another_block) {
      if (fuzzed) std::swap(block.ready.front(), block.ready[random_numbers() % block.ready.size()]);
      Fiber* fiber = block.ready.front();
      block.ready.pop_front();
      enter(fiber);
    }
  }
  for (const auto& block : on_device) {  // their fibers are left where they are, and begin anew
    for (Fiber* fiber : block->fibers) {
      fiber->begun = false;
      if (std::find(idle.begin(), idle.end(), fiber) == idle.end()) idle.push_back(fiber);
    }
  }
  return kFailed;
}

const char* describe_error(int error) {
  return error == kFailed ? failure.c_str() : error == kNoneFits ? "no block fits" : "invalid configuration";
}

}  // namespace gradvac::host

namespace gradvac::cuda {

float half_to_float(std::uint32_t bits) {
  const float magnitude = [&]() -> float {
    const std::uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return mantissa ? NAN : INFINITY;
    return exponent == 0 ? ldexpf(static_cast<float>(mantissa), -24)
                         : ldexpf(static_cast<float>(mantissa + 1024), static_cast<int>(exponent) - 25);
  }();
  return bits & 0x8000u ? -magnitude : magnitude;
}

std::uint32_t float_to_half(float x) {
  const std::uint32_t sign = __float_as_uint(x) >> 16 & 0x8000u;
  x = fabsf(x);
  if (x != x) return 0x7FFFu;
  if (x == 0) return sign;
  if (x >= 65520.0f) return sign | 0x7C00u;
  int exponent = 0;
  frexpf(x, &exponent);                               // x < 2^exponent
  const int unit = std::max(exponent - 11, -24);      // of the last place
  const float places = nearbyintf(ldexpf(x, -unit));  // exact, then to even
  if (unit == -24) return sign | static_cast<std::uint32_t>(places);
  return sign | ((static_cast<std::uint32_t>(unit + 24) << 10) + static_cast<std::uint32_t>(places));
}

std::uint32_t float_to_bfloat16(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7FFFu;
  return (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
}

namespace {

template <class Number>
void multiply(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Number number) {
  const std::uint32_t mine[8] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  std::uint32_t all[32][8];
  host::exchange_all(mine, 6, all);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
    double sum = sums[e];
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2, shift = 16 * (k % 2);
      const std::uint32_t left = all[4 * (row % 8) + quad][(row / 8) + 2 * (k / 8)];
      const std::uint32_t right = all[4 * column + quad][4 + k / 8];
      sum +=
          static_cast<double>(number(left >> shift & 0xFFFFu)) * static_cast<double>(number(right >> shift & 0xFFFFu));
    }
    sums[e] = static_cast<float>(sum);
  }
}

}  // namespace

void multiply_bfloat16(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  multiply(sums, a, b, [](std::uint32_t bits) { return __uint_as_float(bits << 16); });
}
void multiply_float16(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  multiply(sums, a, b, [](std::uint32_t bits) { return half_to_float(bits); });
}

}  // namespace gradvac::cuda
