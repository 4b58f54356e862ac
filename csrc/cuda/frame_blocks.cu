// frame_blocks: all blocks of a frame, r += mixer(rms_norm(r)), in one kernel that stays on the GPU from block to
// block.
//
// At one stream a frame is a chain of dependent steps of 1 to 2 us each, where the start of a kernel costs as much as
// its work.  Here a step ends with a barrier of the whole grid, and what the next one needs of the weights is on its
// way while the barrier is waited for.
//
// Grid: a block of 12 warps on each multiprocessor, launched cooperatively.  Each step is cut in tiles, tile i belongs
//   to block i of the grid, then i + grid, ...; who owns what depends on the sizes alone, so results do not depend on
//   the grid.  Steps of a block (rows: all tokens of all streams):
//   in     32 rows x 96 columns of xz = (r Win') / rms; then u = silu(conv(x)).  Rows that the conv looks at beyond the
//          tile's own are made twice.  Two halves of the sum, six groups of 16 columns: 12 warps.
//   x_proj 16 rows x 8 to 24 columns of [low | B | C] = u Wx; each warp a twelfth of the sum.
//   scan   every token of a few channels.  dt = softplus(low Wdt + bias) by matrix products; then time across lanes:
//          four lanes, four states each, walk a piece of the tokens of one channel from zero and keep C P for every
//          token (P: product of the decays); 16 states of each channel go from piece to piece in order, and
//          <C P, start> is added.  The second direction after the first.  D x, gate, y.
//   out    16 rows x 48 columns of r += y Wout; each warp a twelfth of the sum.  For the next block each row's sum of
//          squares, and r in bf16.
// Traffic: every weight once a row of tiles, from L2; u, z, [low | B | C], y, r in the model's dtype through L2.
// Numerics: fp32 sums, states, dt, residual; x, u, z, low, B, C, y rounded to the model's dtype as its tensors would
//   be; the normed residual is not.  fp32 products are three tf32 products each.  Sums in an order of their own that
//   does not change; no atomics but the barrier's count.
// Bound: latency.  4 barriers a block of about 1 us, and the work between them.
//
// Products: m16n8k16 of bf16, m16n8k8 of tf32.  The order of a sum's terms is free, so a lane takes 16 neighbouring
// bytes of a row at once: of bf16 columns 8 t to 8 t + 7 of 32, which are, two by two, what the instruction calls 2t,
// 2t+1, 2t+8, 2t+9 of two steps of 16.  `copy`, which comes by way of shared memory, has its words in that order: see
// `place_of`.
#include "cuda/frame.h"
#include "device.cuh"

namespace endomamba::cuda {
namespace {

constexpr int kWarps = 12, kThreads = 32 * kWarps, kTaps = 3, kRow = 2 * kStates;
constexpr int kInRows = 32, kInColumns = 96, kRows = 16, kOutColumns = 48;

__host__ __device__ constexpr int up(int v, int step) { return (v + step - 1) / step * step; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int power_of_2(int v, int from = 16) {
  return from >= v ? from : power_of_2(v, 2 * from);
}

// Sizes that follow from the model's.  T: float, or uint16_t, the bits of a bf16.
template <class T, int kC>
struct Sizes {
  static constexpr int kLane = 16 / sizeof(T),
                       kGroup = 4 * kLane;  // terms of a sum that a lane, that four take at once
  static constexpr int kD = 2 * kC, kRank = power_of_2((kC + 15) / 16), kProj = kRank + kRow;
  static constexpr int kGroups = kC / kGroup, kInner = kD / kGroup;  // in a sum over c, over d
  static constexpr int kChannels = kD <= 192 ? 2 : kD <= 384 ? 4 : kD <= 768 ? 6 : 10;  // of the scan
  static constexpr int kPieces = kThreads / 4 / kChannels, kPiece = (197 + kPieces - 1) / kPieces;
  static constexpr int kTiles = kC / kOutColumns;  // of columns, each with sums of squares
};

// 32 bits are enough for an index into any of them: see frame_blocks().
template <class T>
struct Memory {
  unsigned* arrived;
  float *squares, *tail;  // (tiles, rows), (b, 3, d)
  T *copy, *u, *z, *proj, *y;  // (rows, c) of bf16, (s, rows, d), (rows, d), (s, rows, r + 32), (rows, d)
};

// Where word i of a row of `copy` lies: 4 x 4 words of 32 columns transposed, so that of 8 rows of 16 bytes ldmatrix
// gives lane 4 g + t the columns that its 16 bytes of a weight have.
__host__ __device__ constexpr int place_of(int i) { return (i & ~15) + i % 4 * 4 + i / 4 % 4; }

template <class T, int kC>
inline Memory<T> memory_of(void* base, int64_t b, int64_t l, int s, int64_t* bytes = nullptr) {
  using S = Sizes<T, kC>;
  const int64_t rows = b * l;
  char* p = static_cast<char*>(base);
  const auto take = [&](int64_t size) {
    char* const here = p;
    p += (size + 127) / 128 * 128;
    return here;
  };
  const auto tensor = [&](int64_t size) { return reinterpret_cast<T*>(take(size * sizeof(T))); };
  Memory<T> m;
  m.arrived = reinterpret_cast<unsigned*>(take(4));
  m.squares = reinterpret_cast<float*>(take(4 * S::kTiles * rows));
  m.tail = reinterpret_cast<float*>(take(4 * b * kTaps * S::kD));
  m.copy = sizeof(T) == 2 ? tensor(rows * kC) : nullptr;  // fp32: the residual itself
  m.u = tensor(s * rows * S::kD);
  m.z = tensor(rows * S::kD);
  m.proj = tensor(s * rows * S::kProj);
  m.y = tensor(rows * S::kD);
  if (bytes) *bytes = p - static_cast<char*>(base);
  return m;
}

// ---- words of bf16 -----------------------------------------------------------------------------------------------

__device__ __forceinline__ float low_half(uint32_t w) {
  w <<= 16;
  float v;
  std::memcpy(&v, &w, 4);
  return v;
}
__device__ __forceinline__ float high_half(uint32_t w) {
  w &= 0xffff0000u;
  float v;
  std::memcpy(&v, &w, 4);
  return v;
}
__device__ __forceinline__ uint32_t halves(float low, float high) {
#ifdef ENDOMAMBA_HOST
  return __float2bfloat16_rn(low).bits | static_cast<uint32_t>(__float2bfloat16_rn(high).bits) << 16;
#else
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
#endif
}

// Two neighbours of a row as they are in memory.
template <class T>
struct Pair;
template <>
struct Pair<uint16_t> {
  uint32_t word;

  static __device__ __forceinline__ Pair of(float a, float b) { return {halves(a, b)}; }
  __device__ __forceinline__ float2 floats() const { return make_float2(low_half(word), high_half(word)); }
};
template <>
struct alignas(8) Pair<float> {
  float a, b;

  static __device__ __forceinline__ Pair of(float a, float b) { return {a, b}; }
  __device__ __forceinline__ float2 floats() const { return make_float2(a, b); }
};

// ---- memory ------------------------------------------------------------------------------------------------------

// p + i, in one instruction
template <class T>
__device__ __forceinline__ T* at(T* p, int i) {
  return offset(p, i, static_cast<int>(sizeof(T)));
}

struct alignas(16) Words {
  uint32_t w[4];
};

// Weights: nobody writes them.  volatile: not moved behind the barrier that they are to be waited for with.
__device__ __forceinline__ Words weights_at(const void* p) {
  Words v;
#ifdef ENDOMAMBA_HOST
  std::memcpy(&v, p, 16);
#else
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p));
#endif
  return v;
}
__device__ __forceinline__ float weight_at(const float* p) {
#ifdef ENDOMAMBA_HOST
  return *p;
#else
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
#endif
}
// What another multiprocessor wrote before a barrier: from L2, L1 may hold what was there before.  volatile: not moved
// before that barrier; stores to shared memory may move past it, so that loads follow each other at once.
__device__ __forceinline__ Words words_at(const void* p) {
  Words v;
#ifdef ENDOMAMBA_HOST
  std::memcpy(&v, p, 16);
#else
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p));
#endif
  return v;
}
__device__ __forceinline__ uint32_t word_at(const void* p) {
  uint32_t v;
#ifdef ENDOMAMBA_HOST
  std::memcpy(&v, p, 4);
#else
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p));
#endif
  return v;
}
__device__ __forceinline__ float float_at(const float* p) {
  const uint32_t w = word_at(p);
  float v;
  std::memcpy(&v, &w, 4);
  return v;
}
__device__ __forceinline__ Pair<uint16_t> pair_at(const uint16_t* p) { return {word_at(p)}; }
__device__ __forceinline__ Pair<float> pair_at(const float* p) {
  Pair<float> v;
#ifdef ENDOMAMBA_HOST
  std::memcpy(&v, p, 8);
#else
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.a), "=f"(v.b) : "l"(p));
#endif
  return v;
}

// p: at an even place.  Of memcpy the compiler would make stores of single bytes.
template <class T>
__device__ __forceinline__ void put(T* p, Pair<T> v) {
#ifdef ENDOMAMBA_HOST
  if (reinterpret_cast<uintptr_t>(p) % sizeof(v)) throw std::logic_error("put: not aligned");
  std::memcpy(p, &v, sizeof(v));
#else
  *reinterpret_cast<Pair<T>*>(p) = v;
#endif
}

// 16 bytes on their way from L2 to shared memory; `copied` waits for all of this thread.
__device__ __forceinline__ void copy_ahead(void* to, const void* from) {
#ifdef ENDOMAMBA_HOST
  std::memcpy(to, from, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#endif
}
__device__ __forceinline__ void copied() {
#ifndef ENDOMAMBA_HOST
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- the grid's barrier ------------------------------------------------------------------------------------------

__device__ __forceinline__ void arrive(unsigned* arrived) {
  __syncthreads();
#ifndef ENDOMAMBA_HOST
  if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
#endif
}
// target: arrivals since the kernel began.
__device__ __forceinline__ void wait(unsigned* arrived, unsigned target) {
#ifdef ENDOMAMBA_HOST
  wait_for_grid();
#else
  if (threadIdx.x == 0) {
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
    } while (seen < target);
  }
  __syncthreads();
#endif
}

// ---- products ----------------------------------------------------------------------------------------------------

// Rows 0 to 15 of 16 terms as the first operand: those of the two 16 bytes at `at` of each row, `pitch` bytes apart.
__device__ __forceinline__ Words fragment(const char* at, int pitch, int lane) {
  Words v;
#ifdef ENDOMAMBA_HOST
  for (int i = 0; i < 4; ++i) std::memcpy(&v.w[i], at + (lane / 4 + i % 2 * 8) * pitch + i / 2 * 16 + lane % 4 * 4, 4);
#else
  at += lane % 16 * pitch + lane / 16 * 16;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(at))));
#endif
  return v;
}

// d += a b over 16 terms; lane 4 g + t gets rows g and g + 8 of columns 2 t and 2 t + 1.
__device__ __forceinline__ void multiply(float (&d)[4], const Words& a, uint32_t b0, uint32_t b1) {
#ifdef ENDOMAMBA_HOST
  host_multiply_bf16(d, {a.w[0], a.w[1], a.w[2], a.w[3]}, {b0, b1});
#else
  // volatile: all lanes are to be here, whoever uses what comes out
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "r"(b0), "r"(b1));
#endif
}

// Eight terms of fp32 as three products of 11 bits each.  Rounded, not cut: then what is left out, below 2^-22 of a
// term, is of either sign.
__device__ __forceinline__ void multiply_exactly(float (&d)[4], const Words& a, uint32_t b0, uint32_t b1) {
  const auto split = [](uint32_t bits, float& high, float& low) {
    float v;
    std::memcpy(&v, &bits, 4);
    bits = (bits + 0x1000u) & 0xffffe000u;
    std::memcpy(&high, &bits, 4);
    low = v - high;
  };
  float high[4], low[4], high0, low0, high1, low1;
#pragma unroll
  for (int i = 0; i < 4; ++i) split(a.w[i], high[i], low[i]);
  split(b0, high0, low0), split(b1, high1, low1);
  float e[4] = {};  // the matrix unit cuts its sums, always towards 0: the long one is added outside of it
  cuda::multiply(e, low, high0, high1);
  cuda::multiply(e, high, low0, low1);
  cuda::multiply(e, high, high0, high1);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += e[i];
}

// The same over 32 terms of bf16, 16 of fp32: of rows g (`upper`) and g + 8 (`lower`) and of column g the lane has 16
// bytes each.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const Words& upper, const Words& lower, const Words& b) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const Words a{{upper.w[i], lower.w[i], upper.w[i + 1], lower.w[i + 1]}};
    if constexpr (sizeof(T) == 2)
      multiply(d, a, b.w[i], b.w[i + 1]);
    else
      multiply_exactly(d, a, b.w[i], b.w[i + 1]);
  }
}

// ---- what every step needs -----------------------------------------------------------------------------------------

// The kernel's argument: all of it stays in constant memory.
template <class T>
struct Frame {
  FrameArgs args;
  Memory<T> m;
  int l, rows;
};

// The thread's and the block's number, not kept from step to step: nor is then what follows from them.
__device__ __forceinline__ int thread() {
#ifdef ENDOMAMBA_HOST
  return static_cast<int>(threadIdx.x);
#else
  int i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
  return i;
#endif
}
__device__ __forceinline__ int block_of_grid() {
#ifdef ENDOMAMBA_HOST
  return static_cast<int>(blockIdx.x);
#else
  int i;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(i));
  return i;
#endif
}

// ---- begin: r in bf16 and its sums of squares, for the first block -------------------------------------------------

template <class T, int kC>
__device__ __forceinline__ void begin(const Frame<T>& f) {
  const int id = thread(), lane = id % 32;
  for (int row = static_cast<int>(blockIdx.x) * kWarps + id / 32; row < f.rows; row += gridDim.x * kWarps) {
    float sum = 0.0f;
    for (int i = 2 * lane; i < kC; i += 64) {
      const float2 r = *reinterpret_cast<const float2*>(f.args.residual + row * kC + i);
      if constexpr (sizeof(T) == 2) put(f.m.copy + row * kC + 2 * place_of(i / 2), Pair<T>::of(r.x, r.y));
      sum = fmaf(r.x, r.x, fmaf(r.y, r.y, sum));
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(kWarp, sum, mask);
    if (lane < Sizes<T, kC>::kTiles) f.m.squares[lane * f.rows + row] = lane ? 0.0f : sum;
  }
}

// ---- in: norm, in_proj, conv ---------------------------------------------------------------------------------------

template <class T, int kC, bool kBoth>
struct In {
  using S = Sizes<T, kC>;
  static constexpr int kD = S::kD, kSides = kBoth ? 2 : 1, kOwn = kInRows - kTaps * kSides;
  static constexpr int kHalf = (S::kGroups + 1) / 2;  // groups of a half of the sum
  // bytes: 8 rows of 16 lie in different banks, of fp32 2 rows of 64
  static constexpr int kPitch = sizeof(T) == 2 ? 2 * kC + 16 : up(4 * kC + 64, 128) - 64;
  static constexpr int kSums = kInColumns + 8, kPairs = kInColumns / 2, kWordPitch = kPairs + 4;
  static constexpr int kXsRows = kInRows + 2 * kTaps;  // some that are read for rows of others before and behind
  static constexpr int kAt = kInRows * kPitch, kXs = kAt + 4 * kInRows * kSums,
                       kFactors = kXs + static_cast<int>(sizeof(Pair<T>)) * kXsRows * kWordPitch;
  static constexpr int kBytes = kFactors + 4 * kInRows;

  // whether half `half` of the sum has a group j
  static __device__ __forceinline__ bool there(int j, int half) {
    return S::kGroups % 2 == 0 || 2 * j + half < S::kGroups;
  }

  Words w[2][kHalf];
  float taps[kSides][2][kTaps + 1], bias[kSides][2];

  static __device__ __forceinline__ int columns() { return 2 * kD / kInColumns; }
  static __device__ __forceinline__ int tiles(const Frame<T>& f) {
    return columns() * f.args.b * ((f.l + kOwn - 1) / kOwn);
  }

  __device__ __forceinline__ void fetch(const FrameBlock& p, int tile) {
    const int id = thread(), lane = id % 32, warp = id / 32, half = warp / 6, first = tile % columns() * kInColumns;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = first + warp % 6 * 16 + 8 * n + lane / 4;
      const T* const row = at(static_cast<const T*>(p.in_proj), column * kC + S::kGroup * half + S::kLane * (lane % 4));
#pragma unroll
      for (int j = 0; j < kHalf; ++j) w[n][j] = there(j, half) ? weights_at(row + 2 * S::kGroup * j) : Words{};
    }
    const int channel = first % kD + 2 * (id % kPairs);
    const float *const filter = at(p.conv, 4 * channel), *const constant = at(p.conv_bias, channel);
#pragma unroll
    for (int side = 0; side < kSides; ++side)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Words four = weights_at(filter + 4 * (side * kD + i));
        std::memcpy(taps[side][i], &four, 16);
        bias[side][i] = weight_at(constant + side * kD + i);
      }
  }

  // state: (b, 3, d) of this block
  __device__ __forceinline__ void run(const Frame<T>& f, const float* state, int tile) const {
    char* const memory = reinterpret_cast<char*>(shared_memory());
    float* const sums = reinterpret_cast<float*>(memory + kAt);
    Pair<T>* const xs = reinterpret_cast<Pair<T>*>(memory + kXs) + kTaps * kWordPitch;
    float* const factors = reinterpret_cast<float*>(memory + kFactors);
    const int id = thread(), lane = id % 32, warp = id / 32, g = lane / 4, t4 = lane % 4, half = warp / 6;
    const int first = tile % columns() * kInColumns, strips = (f.l + kOwn - 1) / kOwn;
    const int seq = tile / columns() / strips, t0 = tile / columns() % strips * kOwn - kTaps;
    const auto row_of = [&](int i) { return seq * f.l + min(max(t0 + i, 0), f.l - 1); };

    constexpr int kWords = kC / S::kLane, kAtOnce = kThreads / kWords;  // of 16 bytes in a row; rows
    const T* from;
    if constexpr (sizeof(T) == 2)
      from = f.m.copy;
    else
      from = f.args.residual;
    if (id < kAtOnce * kWords) {
#pragma unroll
      for (int i = 0; i < kInRows; i += kAtOnce) {
        const int row = i + id / kWords;
        if (row < kInRows)
          copy_ahead(memory + row * kPitch + 16 * (id % kWords), at(from, row_of(row) * kC + id % kWords * S::kLane));
      }
    }
    if (id < kInRows) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) sum += float_at(at(f.m.squares, i * f.rows + row_of(id)));
      factors[id] = 1.0f / sqrtf(sum * (1.0f / kC) + f.args.eps);
    }
    copied();
    __syncthreads();

    float d[2][2][4] = {};
#pragma unroll
    for (int j = 0; j < kHalf; ++j)
      if (there(j, half)) {
        const char* const at = memory + 64 * (2 * j + half);
        if constexpr (sizeof(T) == 2) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {  // rows 16 (i / 2), terms 16 (i % 2)
            const Words a = fragment(at + i / 2 * 16 * kPitch + i % 2 * 32, kPitch, lane);
#pragma unroll
            for (int n = 0; n < 2; ++n) multiply(d[i / 2][n], a, w[n][j].w[i % 2 * 2], w[n][j].w[i % 2 * 2 + 1]);
          }
        } else {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const Words* const row = reinterpret_cast<const Words*>(at + (16 * m + g) * kPitch + 16 * t4);
            const Words upper = row[0], lower = row[8 * kPitch / 16];
#pragma unroll
            for (int n = 0; n < 2; ++n) multiply<T>(d[m][n], upper, lower, w[n][j]);
          }
        }
      }
    if (half) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // [m][n][row]
        float2* const to = reinterpret_cast<float2*>(sums + (16 * (i / 4) + 8 * (i % 2) + g) * kSums) +
                           (warp % 6 * 8 + 4 * (i / 2 % 2) + t4);
        *to = make_float2(d[i / 4][i / 2 % 2][2 * (i % 2)], d[i / 4][i / 2 % 2][2 * (i % 2) + 1]);
      }
    }
    __syncthreads();
    if (!half) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = 16 * (i / 4) + 8 * (i % 2) + g, pair = warp % 6 * 8 + 4 * (i / 2 % 2) + t4, t = t0 + row;
        const float2 other = reinterpret_cast<const float2*>(sums + row * kSums)[pair];
        const float factor = factors[row];
        float x = (d[i / 4][i / 2 % 2][2 * (i % 2)] + other.x) * factor;
        float y = (d[i / 4][i / 2 % 2][2 * (i % 2) + 1] + other.y) * factor;
        if (t < 0 || t >= f.l) x = y = 0.0f;
        if (!kBoth && t < 0 && first < kD) {
          const float* const before = state + (seq * kTaps + t + kTaps) * kD + first + 2 * pair;
          x = before[0], y = before[1];
        }
        xs[row * kWordPitch + pair] = Pair<T>::of(x, y);
      }
    }
    __syncthreads();

    const int pair = id % kPairs, column = first + 2 * pair, start = id / kPairs * 4, t = t0 + start;
    const int row = seq * f.l + t;  // of `start`: not there where t < 0
    const auto own = [&](int i) { return start + i >= kTaps && start + i < kTaps + kOwn && t + i < f.l; };
    if (first >= kD) {
      T* const to = at(f.m.z, row * kD + column - kD);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (own(i)) put(to + i * kD, xs[(start + i) * kWordPitch + pair]);
      return;
    }
    // rows start - 3 to start + 3, and on to start + 6 for the other direction
    constexpr int kSeen = 4 + kTaps * kSides;
    float x[kSeen][2];
#pragma unroll
    for (int i = 0; i < kSeen; ++i) {
      const float2 both = xs[(start + i - kTaps) * kWordPitch + pair].floats();
      x[i][0] = both.x, x[i][1] = both.y;
    }
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      T* const to = at(f.m.u, (side * f.rows + row) * kD + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float v[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          v[k] = bias[side][k];
#pragma unroll
          for (int j = 0; j <= kTaps; ++j) v[k] = fmaf(taps[side][k][j], x[side ? i + 2 * kTaps - j : i + j][k], v[k]);
          v[k] *= sigmoid(v[k]);
        }
        if (own(i)) put(to + i * kD, Pair<T>::of(v[0], v[1]));
      }
    }
#pragma unroll
    for (int i = 0; i < 4 && !kBoth; ++i) {
      const int last = t + i - (f.l - kTaps);
      if (own(i) && last >= 0)
        *reinterpret_cast<float2*>(at(f.m.tail, (seq * kTaps + last) * kD + column)) =
            make_float2(x[i + kTaps][0], x[i + kTaps][1]);
    }
  }
};

// ---- products whose sums are shared by all warps: rows of a, 8 kN rows of weights ----------------------------------

template <class T, int kInner, int kN>
struct Shared {
  static constexpr int kLane = 16 / sizeof(T), kGroup = 4 * kLane;
  static constexpr int kShare = (kInner + kWarps - 1) / kWarps, kD = kGroup * kInner, kPitch = 8 * kN + 8;
  static constexpr int kBytes = 4 * kWarps * kRows * kPitch;

  // whether a warp has a group j of the sum
  static __device__ __forceinline__ bool there(int j, int warp) {
    return kInner % kWarps == 0 || j * kWarps + warp < kInner;
  }

  Words w[kN][kShare];

  __device__ __forceinline__ void fetch(const void* weight, int column) {
    const int id = thread(), lane = id % 32, warp = id / 32;
    const T* const row =
        at(static_cast<const T*>(weight), (column + lane / 4) * kD + kGroup * warp + kLane * (lane % 4));
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int j = 0; j < kShare; ++j)
        w[n][j] = there(j, warp) ? weights_at(row + 8 * n * kD + kGroup * j * kWarps) : Words{};
  }

  // Leaves 12 parts in shared memory, behind a barrier; row i of a is that of `row + i`, at most `last`.
  __device__ __forceinline__ void run(const T* a, int row, int last) const {
    const int id = thread(), lane = id % 32, warp = id / 32, g = lane / 4, t4 = lane % 4;
    Words upper[kShare], lower[kShare];
    const T* const first = at(a, min(row + g, last) * kD + kGroup * warp + kLane * t4);
    const T* const second = at(a, min(row + g + 8, last) * kD + kGroup * warp + kLane * t4);
#pragma unroll
    for (int j = 0; j < kShare; ++j) {
      upper[j] = there(j, warp) ? words_at(first + kGroup * j * kWarps) : Words{};
      lower[j] = there(j, warp) ? words_at(second + kGroup * j * kWarps) : Words{};
    }
    float d[kN][4] = {};
#pragma unroll
    for (int j = 0; j < kShare; ++j)
#pragma unroll
      for (int n = 0; n < kN; ++n) multiply<T>(d[n], upper[j], lower[j], w[n][j]);
    float* const part = reinterpret_cast<float*>(shared_memory()) + warp * kRows * kPitch;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        reinterpret_cast<float2*>(part + (g + 8 * i) * kPitch)[4 * n + t4] = make_float2(d[n][2 * i], d[n][2 * i + 1]);
    __syncthreads();
  }

  static __device__ __forceinline__ float2 sum(int row, int pair) {
    const float* const parts = reinterpret_cast<const float*>(shared_memory());
    float2 v = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < min(kWarps, kInner); ++i) {
      const float2 part = reinterpret_cast<const float2*>(parts + (i * kRows + row) * kPitch)[pair];
      v.x += part.x, v.y += part.y;
    }
    return v;
  }
};

// ---- x_proj --------------------------------------------------------------------------------------------------------

template <class T, int kC, bool kBoth>
struct XProj {
  using S = Sizes<T, kC>;
  static constexpr int kSides = kBoth ? 2 : 1, kN = (S::kRank == 64 ? 2 : 1) + (kBoth ? 1 : 0);
  using Products = Shared<T, S::kInner, kN>;
  static constexpr int kColumns = S::kProj / (8 * kN);
  static_assert(S::kProj % (8 * kN) == 0, "tiles of x_proj must fit");

  Products products;

  static __device__ __forceinline__ int tiles(const Frame<T>& f) {
    return kColumns * kSides * ((f.rows + kRows - 1) / kRows);
  }

  __device__ __forceinline__ void fetch(const FrameBlock& p, int tile) {
    const int side = tile / kColumns % kSides;
    products.fetch(static_cast<const T*>(p.x_proj) + side * S::kProj * S::kD, tile % kColumns * 8 * kN);
  }

  __device__ __forceinline__ void run(const Frame<T>& f, int tile) const {
    const int side = tile / kColumns % kSides, row = tile / kColumns / kSides * kRows;
    products.run(f.m.u + side * f.rows * S::kD, row, f.rows - 1);
    const int id = thread();
    for (int i = id; i < kRows * 4 * kN; i += kThreads) {
      const int r = i / (4 * kN), pair = i % (4 * kN);
      const float2 v = Products::sum(r, pair);
      if (row + r < f.rows)
        put(at(f.m.proj, (side * f.rows + row + r) * S::kProj + tile % kColumns * 8 * kN + 2 * pair),
            Pair<T>::of(v.x, v.y));
    }
  }
};

// ---- scan ----------------------------------------------------------------------------------------------------------

template <class T, int kC, bool kBoth>
struct Scan {
  using S = Sizes<T, kC>;
  static constexpr int kD = S::kD, kSides = kBoth ? 2 : 1, kChannels = S::kChannels, kPiece = S::kPiece;
  static constexpr int kOwn = (kPiece + 3) / 4, kSlots = 4 * kOwn;  // tokens of a lane at the end
  static constexpr int kN = (kChannels + 7) / 8, kSteps = (S::kRank + S::kGroup - 1) / S::kGroup;
  static constexpr int kTokens = up(S::kPieces * kPiece, 16), kRowPitch = kRow + 4, kEdge = kChannels * kStates;
  static constexpr int kChunks = kRow / S::kLane;  // 16 bytes each, of a row of B and C
  static constexpr int kAtOnce = kThreads / kChunks, kLoads = (kTokens + kAtOnce - 1) / kAtOnce;  // such rows
  static constexpr int kStrips = (kSides * kTokens / 16 + kWarps - 1) / kWarps;
  static constexpr int kItems = (kTokens * kChannels / 2 + kThreads - 1) / kThreads;
  // floats: B and C, (dt, dt x), last states and products of decays of the pieces, D x of each direction and then y
  static constexpr int kStepsAt = kSides * kTokens * kRowPitch, kEdges = kStepsAt + kSides * kTokens * kChannels * 2;
  static constexpr int kProducts = kEdges + S::kPieces * kEdge, kY = kProducts + S::kPieces * kEdge;
  static constexpr int kBytes = 4 * (kY + kSides * kTokens * kChannels);
  static_assert(kEdge <= kThreads, "one thread a state carries");
  static_assert(kStrips <= kSides + 1, "what is left of the strips is one for each warp");

  // What makes dt and D x of one direction: of channels 2 t and 2 t + 1 of 8.
  struct OfSide {
    Words w[kN][kSteps];
    float bias[kN][2], D[kN][2];
  };

  // 16 tokens of one direction: rows g and g + 8 of the products.
  struct Strip {
    int t;  // of row g
    Words low[kSteps][2];
    Pair<T> x[kN][2];

    __device__ __forceinline__ void ask(const Frame<T>& f, int side, int row0, int t4, int first) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int row = side * f.rows + row0 + min(t + 8 * k, f.l - 1);
        const T* const from = at(f.m.proj, row * S::kProj + S::kLane * t4);
#pragma unroll
        for (int j = 0; j < kSteps; ++j)
          low[j][k] = S::kGroup * (j + 1) <= S::kRank || S::kGroup * j + S::kLane * t4 < S::kRank
                          ? words_at(from + S::kGroup * j)
                          : Words{};
#pragma unroll
        for (int n = 0; n < kN; ++n) x[n][k] = pair_at(at(f.m.u, row * kD + min(first + 8 * n + 2 * t4, kD - 2)));
      }
    }

    // dt, dt x and D x to shared memory; the first two 0 behind the end, so that a step there changes nothing.
    __device__ __forceinline__ void steps(const Frame<T>& f, const OfSide& p, float* memory, int side, int t4) const {
      const Softplus softplus = {-kLog2e, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        float d[4] = {};
#pragma unroll
        for (int j = 0; j < kSteps; ++j) multiply<T>(d, low[j][0], low[j][1], p.w[n][j]);
        const int c = 8 * n + 2 * t4, to = (side * kTokens + t) * kChannels + c;
        float dt[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) dt[i] = softplus(d[i] + p.bias[n][i % 2]);
        if (c < kChannels) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const bool there = t + 8 * k < f.l;
            const float2 own = x[n][k].floats();
            const float dt0 = there ? dt[2 * k] : 0.0f, dt1 = there ? dt[2 * k + 1] : 0.0f;
            // x of the last token stands for what is not there
            *reinterpret_cast<float4*>(memory + kStepsAt + 2 * (to + 8 * k * kChannels)) =
                make_float4(dt0, there ? dt0 * own.x : 0.0f, dt1, there ? dt1 * own.y : 0.0f);
            *reinterpret_cast<float2*>(memory + kY + to + 8 * k * kChannels) =
                make_float2(p.D[n][0] * own.x, p.D[n][1] * own.y);
          }
        }
      }
    }
  };

  OfSide sides[kSides];
  float A[kSides][4], start;

  static __device__ __forceinline__ int groups() { return (kD + kChannels - 1) / kChannels; }
  static __device__ __forceinline__ int tiles(const Frame<T>& f) { return groups() * f.args.b; }

  __device__ __forceinline__ void fetch(const FrameBlock& p, const float* state, int tile) {
    const int id = thread(), lane = id % 32, quad = id / 4, first = tile % groups() * kChannels, seq = tile / groups();
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int channel = min(first + 8 * n + lane / 4, kD - 1);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          const int term = S::kGroup * j + S::kLane * (lane % 4);
          sides[side].w[n][j] =
              term < S::kRank ? weights_at(static_cast<const T*>(p.dt_proj) + (side * kD + channel) * S::kRank + term)
                              : Words{};
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = side * kD + min(first + 8 * n + 2 * (lane % 4) + i, kD - 1);
          sides[side].bias[n][i] = weight_at(p.dt_bias + at), sides[side].D[n][i] = weight_at(p.D + at);
        }
      }
      const Words four =
          weights_at(p.A + (side * kD + min(first + quad % kChannels, kD - 1)) * kStates + 4 * (lane % 4));
      std::memcpy(A[side], &four, 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) A[side][i] *= kLog2e;
    }
    start = 0.0f;
    const int carried = first * kStates + id;
    if (!kBoth && id < kEdge && carried < kD * kStates) start = float_at(state + seq * kD * kStates + carried);
  }

  // y of the pieces of one direction, in walking order within a piece; `own` gets this lane's tokens added.
  template <bool kReverse>
  __device__ __forceinline__ void walk(float* memory, int side, int pieces, float begin, float* final, int first,
                                       float (&own)[kOwn]) const {
    const float* const rows = memory + side * kTokens * kRowPitch;
    const float2* const steps = reinterpret_cast<const float2*>(memory + kStepsAt) + side * kTokens * kChannels;
    float *const edges = memory + kEdges, *const products = memory + kProducts;
    const int id = thread(), quad = id / 4, q = id % 4, c = quad % kChannels, piece = quad / kChannels;
    const bool walks = piece < pieces;
    const int begin_at = (walks ? piece : 0) * kPiece;
    float h[4] = {}, P[4] = {1.0f, 1.0f, 1.0f, 1.0f}, y[kSlots] = {}, W[kPiece][4];
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      constexpr int kLast = kPiece - 1;
      const int i = kReverse ? kLast - k : k, t = begin_at + i;
      const float2 step = steps[t * kChannels + c];
      const float4 b = *reinterpret_cast<const float4*>(rows + t * kRowPitch + 4 * q);
      const float4 e = *reinterpret_cast<const float4*>(rows + t * kRowPitch + kStates + 4 * q);
      const float bs[4] = {b.x, b.y, b.z, b.w}, cs[4] = {e.x, e.y, e.z, e.w};
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float decay = ex2(step.x * A[side][n]);
        h[n] = fmaf(decay, h[n], step.y * bs[n]), P[n] *= decay;
        sum = fmaf(cs[n], h[n], sum), W[i][n] = cs[n] * P[n];
      }
      y[i] = sum;
    }
    if (walks) {
      reinterpret_cast<float4*>(edges)[(piece * kChannels + c) * 4 + q] = make_float4(h[0], h[1], h[2], h[3]);
      reinterpret_cast<float4*>(products)[(piece * kChannels + c) * 4 + q] = make_float4(P[0], P[1], P[2], P[3]);
    }
    __syncthreads();
    if (id < kEdge) {
      float state = begin;
#pragma unroll 8
      for (int k = 0; k < pieces; ++k) {
        const int slot = (kReverse ? pieces - 1 - k : k) * kEdge + id;
        const float last = edges[slot], product = products[slot];
        edges[slot] = state;
        state = fmaf(product, state, last);
      }
      if (final && first * kStates + id < kD * kStates) final[id] = state;
    }
    __syncthreads();
    const float4 s = reinterpret_cast<const float4*>(edges)[(walks ? piece * kChannels + c : 0) * 4 + q];
#pragma unroll
    for (int i = 0; i < kPiece; ++i) y[i] += fmaf(W[i][0], s.x, W[i][1] * s.y) + fmaf(W[i][2], s.z, W[i][3] * s.w);
    // four lanes' sums of all slots become one lane's own: halves are exchanged twice
    float two[2 * kOwn];
#pragma unroll
    for (int i = 0; i < 2 * kOwn; ++i) {
      const bool upper = q & 2;
      two[i] = (upper ? y[i + 2 * kOwn] : y[i]) + __shfl_xor_sync(kWarp, upper ? y[i] : y[i + 2 * kOwn], 2);
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const bool upper = q & 1;
      own[i] += (upper ? two[i + kOwn] : two[i]) + __shfl_xor_sync(kWarp, upper ? two[i] : two[i + kOwn], 1);
    }
  }

  // conv_state (b, 3, d), ssm_state (b, d, 16) of this block
  __device__ __forceinline__ void run(const Frame<T>& f, float* conv_state, float* ssm_state, int tile) const {
    float* const memory = reinterpret_cast<float*>(shared_memory());
    const int id = thread(), lane = id % 32, warp = id / 32, g = lane / 4, t4 = lane % 4;
    const int first = tile % groups() * kChannels, seq = tile / groups();
    const int pieces = (f.l + kPiece - 1) / kPiece, tokens = pieces * kPiece;
    const int row0 = seq * f.l;

    Pair<T> z[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int item = id + k * kThreads, t = min(item / (kChannels / 2), f.l - 1);
      const int channel = min(first + 2 * (item % (kChannels / 2)), kD - 2);
      z[k] = pair_at(at(f.m.z, (row0 + t) * kD + channel));
    }
    // All that this thread turns into steps of the walk, asked for at once: rows of B and C, and for products of 16
    // tokens of one direction the low-rank dt and x.  A warp has strip `warp` of each direction, then what is left.
    const int strips = (tokens + 15) / 16, chunk = id % kChunks;
    Words rows[kSides][kLoads];
    Strip strip[kStrips];
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      const T* const from =
          at(f.m.proj, (side * f.rows + row0 + id / kChunks) * S::kProj + S::kRank + S::kLane * chunk);
#pragma unroll
      for (int k = 0; k < kLoads; ++k)
        rows[side][k] = id / kChunks + k * kAtOnce < f.l ? words_at(from + k * kAtOnce * S::kProj) : Words{};
    }
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      const int side = i < kSides ? i : warp % kSides;
      strip[i].t = 16 * (i < kSides ? warp : kWarps * (i / kSides) + warp / kSides) + g;
      strip[i].ask(f, side, row0, t4, first);
    }
    // B and C in fp32, 0 behind the end
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      float* const to = memory + (side * kTokens + id / kChunks) * kRowPitch + S::kLane * chunk;
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const Words& v = rows[side][k];
        if (id / kChunks + k * kAtOnce >= tokens) continue;
        float4* const row = reinterpret_cast<float4*>(to + k * kAtOnce * kRowPitch);
        if constexpr (sizeof(T) == 2) {
          row[0] = make_float4(low_half(v.w[0]), high_half(v.w[0]), low_half(v.w[1]), high_half(v.w[1]));
          row[1] = make_float4(low_half(v.w[2]), high_half(v.w[2]), low_half(v.w[3]), high_half(v.w[3]));
        } else {
          std::memcpy(row, &v, 16);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      const int side = i < kSides ? i : warp % kSides;
      OfSide weights = sides[0];
      if (kBoth && side) weights = sides[kSides - 1];
      if (strip[i].t - g < 16 * strips) strip[i].steps(f, weights, memory, side, t4);
    }
    __syncthreads();

    float own[kOwn] = {};
    float* const final = kBoth ? nullptr : ssm_state + (seq * kD + first) * kStates;
    walk<false>(memory, 0, pieces, start, final, first, own);
    if (kBoth) {
      __syncthreads();
      walk<true>(memory, kSides - 1, pieces, 0.0f, nullptr, first, own);
    }
    const int quad = id / 4, c = quad % kChannels, piece = quad / kChannels;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int slot = id % 4 * kOwn + i;
      if (piece < pieces && slot < kPiece) memory[kY + (piece * kPiece + slot) * kChannels + c] += own[i];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int item = id + k * kThreads, t = item / (kChannels / 2), channel = 2 * (item % (kChannels / 2));
      if (t >= f.l || first + channel >= kD) continue;
      float2 v = *reinterpret_cast<const float2*>(memory + kY + t * kChannels + channel);
      if (kBoth) {
        const float2 other = *reinterpret_cast<const float2*>(memory + kY + (kTokens + t) * kChannels + channel);
        v.x += other.x, v.y += other.y;
      }
      const float2 gate = z[k].floats();
      put(at(f.m.y, (row0 + t) * kD + first + channel),
          Pair<T>::of(v.x * (gate.x * sigmoid(gate.x)), v.y * (gate.y * sigmoid(gate.y))));
    }
    if (!kBoth && id < kTaps * kChannels) {
      const int at = (seq * kTaps + id / kChannels) * kD + first + id % kChannels;
      if (first + id % kChannels < kD) conv_state[at] = float_at(f.m.tail + at);
    }
  }
};

// ---- out -----------------------------------------------------------------------------------------------------------

template <class T, int kC>
struct Out {
  using S = Sizes<T, kC>;
  using Products = Shared<T, S::kInner, kOutColumns / 8>;

  Products products;
  float2 r[2];

  static __device__ __forceinline__ int tiles(const Frame<T>& f) { return S::kTiles * ((f.rows + kRows - 1) / kRows); }
  // Half a warp sums a row: its lanes have pairs `lane` and, the first 8, 16 + lane.
  static __device__ __forceinline__ int row(int tile, int id) { return tile / S::kTiles * kRows + id / 16; }
  static __device__ __forceinline__ int word(int tile, int id, int k) {
    return tile % S::kTiles * (kOutColumns / 2) + id % 16 + 16 * k;
  }
  static __device__ __forceinline__ int place(int tile, int id, int k) {
    return row(tile, id) * kC + 2 * word(tile, id, k);
  }
  static __device__ __forceinline__ bool mine(const Frame<T>& f, int tile, int id, int k) {
    return id < 16 * kRows && row(tile, id) < f.rows && (k == 0 || id % 16 < 8);
  }

  __device__ __forceinline__ void fetch(const Frame<T>& f, const FrameBlock& p, int tile) {
    const int id = thread();
    products.fetch(p.out_proj, tile % S::kTiles * kOutColumns);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      r[k] = make_float2(0.0f, 0.0f);
      if (mine(f, tile, id, k)) r[k] = pair_at(at(f.args.residual, place(tile, id, k))).floats();
    }
  }

  __device__ __forceinline__ void run(const Frame<T>& f, int tile) const {
    products.run(f.m.y, tile / S::kTiles * kRows, f.rows - 1);
    const int id = thread();
    if (id >= 16 * kRows) return;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (!mine(f, tile, id, k)) continue;
      const float2 v = Products::sum(id / 16, id % 16 + 16 * k);
      const float2 next = make_float2(r[k].x + v.x, r[k].y + v.y);
      *reinterpret_cast<float2*>(at(f.args.residual, place(tile, id, k))) = next;
      if constexpr (sizeof(T) == 2)
        put(at(f.m.copy, row(tile, id) * kC + 2 * place_of(word(tile, id, k))), Pair<T>::of(next.x, next.y));
      sum = fmaf(next.x, next.x, fmaf(next.y, next.y, sum));
    }
#pragma unroll
    for (int mask = 8; mask; mask /= 2) sum += __shfl_xor_sync(kWarp, sum, mask);
    if (id % 16 == 0 && row(tile, id) < f.rows) f.m.squares[tile % S::kTiles * f.rows + row(tile, id)] = sum;
  }
};

// ---- the kernel ----------------------------------------------------------------------------------------------------

// What the first tile needs of the weights is asked for before the barrier.
template <class Step, class T, class Fetch, class Run>
__device__ __forceinline__ void step(const Frame<T>& f, unsigned& turn, Fetch&& fetch, Run&& run) {
  Step s;
  arrive(f.m.arrived);
  int tile = block_of_grid();
  const int tiles = Step::tiles(f);
  fetch(s, min(tile, tiles - 1));  // always: what is not set on every way is kept from block to block
  wait(f.m.arrived, ++turn * gridDim.x);
  while (tile < tiles) {
    run(s, tile);
    tile += gridDim.x;
    if (tile < tiles) {
      __syncthreads();
      fetch(s, tile);
    }
  }
}

template <class T, int kC, bool kBoth>
__global__ void __launch_bounds__(kThreads, 1) frame_blocks_kernel(const __grid_constant__ Frame<T> f) {
  using S = Sizes<T, kC>;
  const FrameArgs& p = f.args;
  unsigned turn = 0;
  begin<T, kC>(f);
#pragma unroll 1
  for (int i = 0; i < p.blocks; ++i) {
    const FrameBlock& w = p.block[i];
    float* const conv_state = kBoth ? nullptr : p.conv_state + static_cast<int64_t>(i) * p.b * kTaps * S::kD;
    float* const ssm_state = kBoth ? nullptr : p.ssm_state + static_cast<int64_t>(i) * p.b * S::kD * kStates;
    step<In<T, kC, kBoth>>(
        f, turn, [&](auto& s, int tile) { s.fetch(w, tile); }, [&](auto& s, int tile) { s.run(f, conv_state, tile); });
    step<XProj<T, kC, kBoth>>(
        f, turn, [&](auto& s, int tile) { s.fetch(w, tile); }, [&](auto& s, int tile) { s.run(f, tile); });
    step<Scan<T, kC, kBoth>>(
        f, turn, [&](auto& s, int tile) { s.fetch(w, ssm_state, tile); },
        [&](auto& s, int tile) { s.run(f, conv_state, ssm_state, tile); });
    step<Out<T, kC>>(
        f, turn, [&](auto& s, int tile) { s.fetch(f, w, tile); }, [&](auto& s, int tile) { s.run(f, tile); });
  }
}

template <class T, int kC, bool kBoth>
constexpr int shared_bytes() {
  return larger(larger(In<T, kC, kBoth>::kBytes, XProj<T, kC, kBoth>::Products::kBytes),
                larger(Scan<T, kC, kBoth>::kBytes, Out<T, kC>::Products::kBytes));
}

template <class T, int kC, bool kBoth>
void launch_frame(const FrameArgs& args, int grid, void* stream) {
  using S = Sizes<T, kC>;
  if (args.l < kTaps || args.l > S::kPieces * S::kPiece)
    throw std::invalid_argument("frame_blocks: tokens must be 3 to " + std::to_string(S::kPieces * S::kPiece) +
                                " for c = " + std::to_string(kC) + ", got " + std::to_string(args.l));
  const Frame<T> f{args, memory_of<T, kC>(args.memory, args.b, args.l, kBoth ? 2 : 1), args.l, args.b * args.l};
  launch_together("frame_blocks", frame_blocks_kernel<T, kC, kBoth>, grid, kThreads, shared_bytes<T, kC, kBoth>(),
                  stream, f);
}

template <class T, int kChannels>
struct Model {
  using Type = T;
  static constexpr int kC = kChannels;
};

// f of the model of these channels and dtype (0: fp32, 1: bf16); -1 where there is none.
template <class F>
int64_t with_model(int dtype, int64_t c, F&& f) {
  // Tests compile one size for all architectures, and another for the host.
#ifndef ENDOMAMBA_BF16_ONLY
  if (dtype == 0 && c == 96) return f(Model<float, 96>());
  if (dtype == 1 && c == 96) return f(Model<uint16_t, 96>());
#ifndef ENDOMAMBA_96_ONLY
  if (dtype == 0) {
    if (c == 192) return f(Model<float, 192>());
    if (c == 384) return f(Model<float, 384>());
    if (c == 576) return f(Model<float, 576>());
  }
  if (dtype == 1) {
    if (c == 192) return f(Model<uint16_t, 192>());
    if (c == 576) return f(Model<uint16_t, 576>());
  }
#endif
#endif
#ifndef ENDOMAMBA_96_ONLY
  if (dtype == 1 && c == 384) return f(Model<uint16_t, 384>());
#endif
  return -1;
}

}  // namespace

int64_t frame_memory(int dtype, int64_t b, int64_t l, int64_t c, int64_t directions) {
  return with_model(dtype, c, [&](auto model) {
    int64_t bytes = 0;
    memory_of<typename decltype(model)::Type, decltype(model)::kC>(nullptr, b, l, static_cast<int>(directions), &bytes);
    return bytes;
  });
}

int frame_most_tokens(int dtype, int64_t c) {
  const int64_t most = with_model(dtype, c, [](auto model) -> int64_t {
    using S = Sizes<typename decltype(model)::Type, decltype(model)::kC>;
    return S::kPieces * S::kPiece;
  });
  return larger(0, static_cast<int>(most));
}

int frame_rank(int64_t c) { return power_of_2(static_cast<int>((c + 15) / 16)); }

int64_t frame_shared(int dtype, int64_t c, int64_t directions) {
  const int64_t bytes = with_model(dtype, c, [&](auto model) -> int64_t {
    using T = typename decltype(model)::Type;
    constexpr int kC = decltype(model)::kC;
    return directions == 2 ? shared_bytes<T, kC, true>() : shared_bytes<T, kC, false>();
  });
  return larger(0, static_cast<int>(bytes));
}

void frame_blocks(const FrameArgs& args, int grid, void* stream) {
  if (args.blocks > kFrameBlocks)
    throw std::invalid_argument("frame_blocks: at most " + std::to_string(kFrameBlocks) + " blocks, got " +
                                std::to_string(args.blocks));
  // u of both directions, ssm_state of a block
  if (static_cast<int64_t>(args.b) * larger(2 * args.l, kStates) * 2 * args.c > 0x7fffffff)
    throw std::invalid_argument("frame_blocks: more than 2^31 - 1 values in a tensor");
  const int64_t done = with_model(args.dtype, args.c, [&](auto model) -> int64_t {
    using T = typename decltype(model)::Type;
    constexpr int kC = decltype(model)::kC;
    if (args.directions == 2)
      launch_frame<T, kC, true>(args, grid, stream);
    else
      launch_frame<T, kC, false>(args, grid, stream);
    return 0;
  });
  if (done < 0)
    throw std::invalid_argument("frame_blocks: c must be 96, 192, 384 or 576 and dtype 0 or 1, got " +
                                std::to_string(args.c) + " and " + std::to_string(args.dtype));
}

}  // namespace endomamba::cuda
