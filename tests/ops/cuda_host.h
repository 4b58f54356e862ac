// Stands in for the CUDA headers when csrc/cuda is compiled for the host: -DENDOMAMBA_HOST -include cuda_host.h.
//
// Every thread of a block is a fiber.  A warp's fibers run one after the other from one __syncwarp or shuffle to the
// next, and the warps of a block one after the other from one __syncthreads to the next, so what a kernel may assume
// between two of them is what happens here, in one order or, with `descending`, in the other: a missing barrier makes
// the two differ.  A vector that is read or written where it is not aligned, which stops a GPU, is an error here too.
// Blocks run one after the other, those of a cooperative launch from one barrier of the grid to the next.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
  uint16_t bits = 0;
  operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float v;
    std::memcpy(&v, &wide, 4);
    return v;
  }
};
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t wide;
  std::memcpy(&wide, &v, 4);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}
struct __half {
  _Float16 v = 0;
  operator float() const { return static_cast<float>(v); }
};
inline __half __float2half_rn(float v) { return {static_cast<_Float16>(v)}; }

namespace endomamba::cuda {

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t kStack = 256 * 1024;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of all threads of a block, used again by the next

struct Fiber {
  ucontext_t context;
  bool done = false, at_block_barrier = false, at_grid_barrier = false;
  unsigned shuffles = 0, products = 0, bf16_products = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint32_t> slots[2];  // what each thread offers in a shuffle, of every second one
  std::vector<std::array<float, 6>> operands[2];  // likewise, in a matrix product
  std::vector<std::array<uint32_t, 6>> words[2];  // and in one of bf16
  std::vector<float4> shared;
  ucontext_t scheduler;
  unsigned current = 0;
  std::function<void()> body;

  void yield() { swapcontext(&fibers[current].context, &scheduler); }
};
inline const void* misaligned = nullptr;  // the last address that a kernel used as if it were aligned
inline void host_aligned(const void* p, size_t size) {
  if (reinterpret_cast<uintptr_t>(p) % size) misaligned = p;
}
inline Block* block = nullptr;
inline bool descending = false;

inline float4* shared_memory() { return block->shared.data(); }
inline void __syncwarp() { block->yield(); }
inline void __syncthreads() {
  block->fibers[block->current].at_block_barrier = true;
  block->yield();
}
inline void wait_for_grid() {
  block->fibers[block->current].at_grid_barrier = true;
  block->yield();
}

inline float shuffle(float v, unsigned from_lane) {
  Fiber& me = block->fibers[block->current];
  std::vector<uint32_t>& slots = block->slots[me.shuffles++ % 2];
  std::memcpy(&slots[block->current], &v, 4);
  block->yield();
  float got;
  std::memcpy(&got, &slots[block->current / 32 * 32 + from_lane], 4);
  return got;
}
inline float __shfl_xor_sync(unsigned, float v, int mask) { return shuffle(v, block->current % 32 ^ mask); }
inline float __shfl_sync(unsigned, float v, int lane) { return shuffle(v, lane); }
inline int __shfl_sync(unsigned, int v, int lane) { return static_cast<int>(shuffle(static_cast<float>(v), lane)); }

// m16n8k8 in tf32; lane 4 g + t has rows g and g + 8 of the first operand and of the result, column g of the second.
inline void host_multiply(float (&d)[4], const float (&a)[4], float b0, float b1) {
  Fiber& me = block->fibers[block->current];
  std::vector<std::array<float, 6>>& slots = block->operands[me.products++ % 2];
  float values[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int i = 0; i < 6; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], 4);
    bits &= 0xffffe000u;
    std::memcpy(&slots[block->current][i], &bits, 4);
  }
  block->yield();
  const std::array<float, 6>* const warp = &slots[block->current / 32 * 32];
  const unsigned g = block->current % 32 / 4, t = block->current % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned column = 2 * t + i % 2;
    for (unsigned k = 0; k < 4; ++k) {
      const std::array<float, 6>&left = warp[4 * g + k], &right = warp[4 * column + k];
      d[i] += left[i / 2] * right[4] + left[2 + i / 2] * right[5];
    }
  }
}

// m16n8k16 of bf16: words of two neighbouring terms; a: rows g, g + 8 of terms 2 t, then of 2 t + 8; b: column g.
inline void host_multiply_bf16(float (&d)[4], std::array<uint32_t, 4> a, std::array<uint32_t, 2> b) {
  Fiber& me = block->fibers[block->current];
  std::vector<std::array<uint32_t, 6>>& slots = block->words[me.bf16_products++ % 2];
  slots[block->current] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  block->yield();
  const auto half = [](uint32_t word, int i) {
    const uint32_t bits = i ? word & 0xffff0000u : word << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
  };
  const std::array<uint32_t, 6>* const warp = &slots[block->current / 32 * 32];
  const unsigned g = block->current % 32 / 4, t = block->current % 4;
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 4; ++k) {
      const std::array<uint32_t, 6>&left = warp[4 * g + k], &right = warp[4 * (2 * t + i % 2) + k];
      for (int e = 0; e < 2; ++e)
        d[i] += half(left[i / 2], e) * half(right[4], e) + half(left[2 + i / 2], e) * half(right[5], e);
    }
}

inline void run_fiber() {
  block->body();
  block->fibers[block->current].done = true;
  block->yield();
}

// A block about to run, its threads' stacks from `first_stack` on.
inline void prepare_block(Block& b, unsigned threads, size_t shared, unsigned first_stack) {
  b.fibers.resize(threads);
  for (auto& slots : b.slots) slots.resize(threads);
  for (auto& slots : b.operands) slots.resize(threads);
  for (auto& slots : b.words) slots.resize(threads);
  // as on a GPU, what shared memory holds at first is no number
  b.shared.assign((shared + 15) / 16, make_float4(NAN, NAN, NAN, NAN));
  while (stacks.size() < first_stack + threads) stacks.emplace_back(new char[kStack]);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks[first_stack + i].get(), f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
  }
}

// Every warp in turn to the next block barrier, which opens when all that still run are at it; until all threads are
// done, or are at the grid's barrier.  -> whether they are done.
inline bool run_block(unsigned index) {
  const unsigned threads = blockDim.x;
  blockIdx.x = index;
  for (Fiber& f : block->fibers) f.at_grid_barrier = false;
  const auto waits = [](const Fiber& f) { return f.done || f.at_block_barrier || f.at_grid_barrier; };
  for (;;) {
    for (unsigned w = 0; w < threads; w += 32) {
      const unsigned first = descending ? threads - 32 - w : w;
      for (bool ran = true; ran;) {
        ran = false;
        for (unsigned i = 0; i < 32; ++i) {
          const unsigned t = first + (descending ? 31 - i : i);
          Fiber& f = block->fibers[t];
          if (waits(f)) continue;
          block->current = threadIdx.x = t;
          swapcontext(&block->scheduler, &f.context);
          ran = true;
        }
      }
    }
    const auto all = [](auto&& is) { return std::all_of(block->fibers.begin(), block->fibers.end(), is); };
    if (all([](const Fiber& f) { return f.done; })) return true;
    if (all([](const Fiber& f) { return f.done || f.at_grid_barrier; })) return false;
    for (Fiber& f : block->fibers) f.at_block_barrier = false;
  }
}

inline void check_alignment(const char* name) {
  if (!misaligned) return;
  misaligned = nullptr;
  throw std::runtime_error(std::string(name) + ": misaligned address");
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void*, const A&... args) {
  blockDim.x = threads, gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    Block here;
    prepare_block(here, threads, shared, 0);
    here.body = [&] { kernel(args...); };
    block = &here;
    run_block(static_cast<unsigned>(b));
    check_alignment(name);
  }
}

template <class... P, class... A>
void launch_together(const char* name, void (*kernel)(P...), int blocks, int threads, size_t shared, void*,
                     const A&... args) {
  blockDim.x = threads, gridDim.x = blocks;
  std::vector<Block> all(blocks);
  for (int b = 0; b < blocks; ++b) {
    prepare_block(all[b], threads, shared, b * threads);
    all[b].body = [&] { kernel(args...); };
  }
  std::vector<char> done(blocks, false);
  while (std::find(done.begin(), done.end(), false) != done.end())
    for (int i = 0; i < blocks; ++i) {
      const int b = descending ? blocks - 1 - i : i;
      block = &all[b];
      if (!done[b]) done[b] = run_block(b);
    }
  check_alignment(name);
}

}  // namespace endomamba::cuda

// -fsanitize=alignment calls it with what was asked for and where; this one stands in for that of libubsan.
struct Mismatch {
  const char* file;
  unsigned line, column;
  void* type;
  unsigned char log_alignment;
};
inline void mismatch(const Mismatch* data, uintptr_t at) {
  if (at % (uintptr_t{1} << data->log_alignment)) endomamba::cuda::misaligned = reinterpret_cast<void*>(at);
}
extern "C" __attribute__((visibility("hidden"), used)) inline void __ubsan_handle_type_mismatch_v1(void* data, void* at) {
  mismatch(static_cast<Mismatch*>(data), reinterpret_cast<uintptr_t>(at));
}
