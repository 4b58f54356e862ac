// What every CUDA kernel here shares: element types, the formulas of the scan in fp32, and how a kernel is launched.
//
// tests/ops/cuda_host.h stands in for the CUDA headers when these files are compiled for the host, to run the kernels'
// arithmetic without a GPU; so kernels use no intrinsic beyond those that it has.
#pragma once

#ifndef ENDOMAMBA_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/scan.h"

namespace endomamba::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kStates = 16;
constexpr unsigned kWarp = 0xffffffffu;

#ifndef ENDOMAMBA_HOST
__device__ __forceinline__ float4* shared_memory() {
  extern __shared__ float4 memory[];
  return memory;
}
#endif

template <class T>
__device__ __forceinline__ float to_float(T v) {
  return static_cast<float>(v);
}
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// 2 ulp, and results below 2^-126 become 0; exp2f alone would add a test for subnormal results.
__device__ __forceinline__ float ex2(float v) {
#ifdef ENDOMAMBA_HOST
  return exp2f(v);
#else
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#endif
}

// 1 / (1 + exp(-v)); exp overflows to inf for v < -88 and the quotient is 0, as it should be
__device__ __forceinline__ float sigmoid(float v) {
  const float e = 1.0f + ex2(-kLog2e * v);
#ifdef ENDOMAMBA_HOST
  return 1.0f / e;
#else
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(e));
  return r;
#endif
}

// softplus as max(v, 0) + log1p(exp(-|v|)): no overflow, no cancellation; above 20 it is v itself in fp32.  Off, the
// same instructions give v: exp is 0 and the floor -inf.
struct Softplus {
  float slope, offset, floor;
  float zero;  // softplus of it is 0

  static Softplus of(bool on) {
    return {on ? -kLog2e : 0.0f, on ? 0.0f : -1e30f, on ? 0.0f : -INFINITY, on ? -1e30f : 0.0f};
  }

  __device__ __forceinline__ float operator()(float v) const {
    const float u = ex2(fmaf(fabsf(v), slope, offset));
    // log1p on [0, 1] as u * P(u), P by Remez: relative error 2.1e-7
    float p = fmaf(u, 0.0051261018961668015f, -0.029074065387248993f);
    p = fmaf(p, u, 0.0775160863995552f);
    p = fmaf(p, u, -0.13602247834205627f);
    p = fmaf(p, u, 0.19076880812644958f);
    p = fmaf(p, u, -0.2483539879322052f);
    p = fmaf(p, u, 0.3331812024116516f);
    p = fmaf(p, u, -0.4999944567680359f);
    p = fmaf(p, u, 0.9999999403953552f);
    return fmaf(p, u, fmaxf(v, floor));
  }
};

// Where step k of the walk stands: from either end, and with kTime time fastest (see ScanArgs::frames).
template <bool kTime>
struct Walk {
  int first, step;
  int frames, frame;  // their number, the tokens of each

  __device__ __forceinline__ Walk(int l, int frames, bool reverse)
      : first(reverse ? l - 1 : 0), step(reverse ? -1 : 1), frames(frames), frame(kTime ? l / frames : 0) {}

  __device__ __forceinline__ int operator()(int k) const {
    k = first + step * k;
    return kTime ? k % frames * frame + k / frames : k;
  }
};

// base + index * stride in bytes: a 64-bit offset of 32-bit numbers, in one instruction.
template <class T>
__device__ __forceinline__ T* offset(T* base, int index, int stride) {
#ifdef ENDOMAMBA_HOST
  return reinterpret_cast<T*>(reinterpret_cast<intptr_t>(base) + static_cast<int64_t>(index) * stride);
#else
  int64_t at;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(at) : "r"(index), "r"(stride), "l"(base));
  return reinterpret_cast<T*>(at);
#endif
}

// The value itself, which the compiler then keeps rather than work it out again.
__device__ __forceinline__ int keep(int v) {
#ifndef ENDOMAMBA_HOST
  asm volatile("" : "+r"(v));
#endif
  return v;
}
template <class T>
__device__ __forceinline__ T* keep(T* p) {
#ifndef ENDOMAMBA_HOST
  asm volatile("" : "+l"(p));
#endif
  return p;
}

// Neighbouring elements as they are in memory: 16-bit ones stay in pairs until they are needed.
template <class T>
struct alignas(2 * sizeof(T)) Two {
  uint32_t w[sizeof(T) / 2];

  static __device__ __forceinline__ Two of(T a, T b) {
    const T v[2] = {a, b};
    Two two;
    std::memcpy(&two, v, sizeof(two));
    return two;
  }
  template <int i>
  __device__ __forceinline__ float at() const {
    uint32_t word = w[sizeof(T) == 4 ? i : 0];
    if constexpr (sizeof(T) == 4 || std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float, or all of it
      if (sizeof(T) < 4) word = i ? word & 0xffff0000u : word << 16;
      float v;
      std::memcpy(&v, &word, 4);
      return v;
    } else {
      const uint16_t bits = static_cast<uint16_t>(word >> (16 * i));
      T v;
      std::memcpy(&v, &bits, 2);
      return to_float(v);
    }
  }
};
template <class T>
struct alignas(4 * sizeof(T)) Four {
  Two<T> v[2];

  __device__ __forceinline__ float4 floats() const {
    return make_float4(v[0].template at<0>(), v[0].template at<1>(), v[1].template at<0>(), v[1].template at<1>());
  }
};

// V of global memory that the kernel does not write, or that it only writes: what `offset` returns could be any memory,
// and the compiler would not move a load of that before a store to shared memory.
template <class V>
__device__ __forceinline__ V load(const void* from) {
  V v;
#ifdef ENDOMAMBA_HOST
  host_aligned(from, sizeof(V));
  std::memcpy(&v, from, sizeof(V));
#else
  if constexpr (sizeof(V) == 16) {
    const float4 word = __ldg(static_cast<const float4*>(from));
    std::memcpy(&v, &word, 16);
  } else if constexpr (sizeof(V) == 8) {
    const float2 word = __ldg(static_cast<const float2*>(from));
    std::memcpy(&v, &word, 8);
  } else if constexpr (sizeof(V) == 4) {
    const unsigned word = __ldg(static_cast<const unsigned*>(from));
    std::memcpy(&v, &word, 4);
  } else {
    const unsigned short word = __ldg(static_cast<const unsigned short*>(from));
    std::memcpy(&v, &word, 2);
  }
#endif
  return v;
}
template <class V>
__device__ __forceinline__ void store(void* to, const V& v) {
#ifdef ENDOMAMBA_HOST
  host_aligned(to, sizeof(V));
  std::memcpy(to, &v, sizeof(V));
#else
  if constexpr (sizeof(V) == 8) {
    float2 word;
    std::memcpy(&word, &v, 8);
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(word.x), "f"(word.y) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    unsigned word;
    std::memcpy(&word, &v, 4);
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
  } else {
    unsigned short word;
    std::memcpy(&word, &v, 2);
    asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"(word) : "memory");
  }
#endif
}

// Elements 0 and `next` of global memory, in one word where they are known to be aligned neighbours.
template <bool kAligned, class T>
__device__ __forceinline__ Two<T> load_two(const T* p, int next) {
  if constexpr (kAligned) return load<Two<T>>(p);
  return Two<T>::of(load<T>(p), load<T>(p + next));
}
template <bool kAligned, class T>
__device__ __forceinline__ void store_two(T* p, float a, float b, bool second) {
  if constexpr (kAligned) {
    store(p, Two<T>::of(from_float<T>(a), from_float<T>(b)));
  } else {
    store(p, from_float<T>(a));
    if (second) store(p + 1, from_float<T>(b));
  }
}
template <bool kAligned, class T>
__device__ __forceinline__ Four<T> load_four(const T* p, int stride) {
  if constexpr (kAligned) return load<Four<T>>(p);
  return {{load_two<false>(p, stride), load_two<false>(p + 2 * int64_t{stride}, stride)}};
}

// One token of half a channel's states: h = exp2(dt A) h + u B, and its part of <C, h>.  rows: the half of B; that of C
// lies 64 bytes on.
__device__ __forceinline__ float advance(float (&h)[kStates / 2], const float (&A)[kStates / 2], float dt, float u,
                                         const char* rows) {
  float y = 0.0f;
#pragma unroll
  for (int i = 0; i < kStates / 2; i += 4) {
    const float4 b = reinterpret_cast<const float4*>(rows)[i / 4],
                 c = reinterpret_cast<const float4*>(rows + 64)[i / 4];
    h[i] = fmaf(ex2(dt * A[i]), h[i], u * b.x), h[i + 1] = fmaf(ex2(dt * A[i + 1]), h[i + 1], u * b.y);
    h[i + 2] = fmaf(ex2(dt * A[i + 2]), h[i + 2], u * b.z), h[i + 3] = fmaf(ex2(dt * A[i + 3]), h[i + 3], u * b.w);
    y = i == 0 ? c.x * h[i] : fmaf(c.x, h[i], y);
    y = fmaf(c.w, h[i + 3], fmaf(c.z, h[i + 2], fmaf(c.y, h[i + 1], y)));
  }
  return y;
}

// Half sums of four tokens of channel c in lanes c and 16 + c -> whole sums of channels 2 (c / 2) and the next, of
// token 2 q + c % 2, in lane 16 q + c.
__device__ __forceinline__ float2 own_sums(const float (&part)[4], bool q, bool odd) {
  const float first = (q ? part[2] : part[0]) + __shfl_xor_sync(kWarp, q ? part[0] : part[2], 16);
  const float second = (q ? part[3] : part[1]) + __shfl_xor_sync(kWarp, q ? part[1] : part[3], 16);
  const float kept = odd ? second : first, other = __shfl_xor_sync(kWarp, odd ? first : second, 1);
  return make_float2(odd ? other : kept, odd ? kept : other);
}

// d += a b, m16n8k8 in tf32: the matrix unit cuts what it gets to 11 bits.
__device__ __forceinline__ void multiply(float (&d)[4], const float (&a)[4], float b0, float b1) {
#ifdef ENDOMAMBA_HOST
  host_multiply(d, a, b0, b1);
#else
  const unsigned* u = reinterpret_cast<const unsigned*>(a);
  // volatile: all lanes are to be here, whoever uses what comes out
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(u[0]), "r"(u[1]), "r"(u[2]), "r"(u[3]), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}

// Cutting a mantissa to 11 bits takes 2^-11 * 0.72 off a value on average: given back beforehand, sums have no bias.
constexpr float kCut = 1.0f + 3.52e-4f;

// Halves of v are exchanged with the lane that differs in bit kBit: the lane with it keeps the sums of the upper half.
template <int kBit, int kSize>
__device__ __forceinline__ void exchange(float (&to)[kSize / 2], const float (&v)[kSize], int lane) {
  const bool upper = lane & kBit;
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) {
    const float given = upper ? v[i] : v[i + kSize / 2], kept = upper ? v[i + kSize / 2] : v[i];
    to[i] = kept + __shfl_xor_sync(kWarp, given, kBit);
  }
}

// Sums of 16 values over the 16 lanes of each half of a warp.  Lane 16 q + 4 i + j gets that of value `summed(lane)`.
//
// kExact: fp32 additions; the matrix unit's own sums have fewer bits, whatever it is given.  Else matrix products with
// ones; ones[m]: 1 in lanes 4 m to 4 m + 3, else 0.  Values 4 i to 4 i + 3 are rows 0-7 and 8-15 of the product's first
// operand; the second one sends them to columns 2 i and 2 i + 1, so one accumulator takes all, summed over quads of
// lanes.  Three shuffles add the four quads of a half.
__device__ __forceinline__ int summed(int lane) { return lane % 4 * 4 + (lane & 8) / 8 + (lane & 4) / 2; }
template <bool kExact>
__device__ __forceinline__ float lane_sum(const float (&v)[16], const float (&ones)[8], int lane) {
  if constexpr (kExact) {
    float eight[8], four[4], two[2], one[1];
    exchange<2>(eight, v, lane), exchange<1>(four, eight, lane), exchange<4>(two, four, lane);
    exchange<8>(one, two, lane);
    return one[0];
  }
  float d[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    multiply(d, {v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]}, ones[2 * i], ones[2 * i + 1]);
  const bool p = lane & 8, q = lane & 4;
  const float s0 = (p ? d[2] : d[0]) + __shfl_xor_sync(kWarp, p ? d[0] : d[2], 8);
  const float s1 = (p ? d[3] : d[1]) + __shfl_xor_sync(kWarp, p ? d[1] : d[3], 8);
  return (q ? s1 : s0) + __shfl_xor_sync(kWarp, q ? s0 : s1, 4);
}

// f of a value of the element type that `dtype` names.  ENDOMAMBA_BF16_ONLY leaves the others out, which the tests of
// all architectures' registers have no time for.
template <class F>
void with_dtype(int dtype, const char* name, const F& f) {
  switch (dtype) {
    case 1:
      return f(__nv_bfloat16{});
#ifndef ENDOMAMBA_BF16_ONLY
    case 0:
      return f(float{});
    case 2:
      return f(__half{});
#endif
  }
  throw std::invalid_argument(std::string(name) + ": dtype must be 0, 1 or 2, got " + std::to_string(dtype));
}

#ifndef ENDOMAMBA_HOST
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void* stream,
            const A&... args) {
  if (blocks > 0x7fffffff) throw std::invalid_argument(std::string(name) + ": more than 2^31 - 1 blocks");
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), name);
}

// All blocks at the same time, so that they may wait for each other.
template <class... P, class... A>
void launch_together(const char* name, void (*kernel)(P...), int blocks, int threads, size_t shared, void* stream,
                     const A&... args) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative, together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream), config.attrs = &together, config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
}
#endif

}  // namespace endomamba::cuda
