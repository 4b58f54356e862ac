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

#include "cuda/scan.h"

namespace endomamba::cuda {

constexpr float kLog2e = 1.4426950408889634f;
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

  __device__ __forceinline__ explicit Softplus(bool on)
      : slope(on ? -kLog2e : 0.0f), offset(on ? 0.0f : -1e30f), floor(on ? 0.0f : -INFINITY) {}

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

// kBytes from global to shared memory without a register between; what lies past `valid` bytes becomes 0.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid) {
#ifdef ENDOMAMBA_HOST
  std::memset(to, 0, kBytes);
  std::memcpy(to, from, valid);
#else
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(kBytes), "r"(valid)
                 : "memory");
#endif
}
__device__ __forceinline__ void copy_group() {
#ifndef ENDOMAMBA_HOST
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// All groups but the last kLeft are there, for the lane that asks; the warp needs a __syncwarp after it.
template <int kLeft>
__device__ __forceinline__ void copy_wait() {
#ifndef ENDOMAMBA_HOST
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
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
#endif

}  // namespace endomamba::cuda
