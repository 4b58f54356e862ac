// ScanArgs as the kernels get them: only what a forward reads.
#pragma once

#include <climits>

#include "device.cuh"

namespace endomamba::cuda {

// Rows of x, dt or z (b,l,d), or of B or C (b,l,n).
struct Tensor {
  const void* p;
  int64_t b;  // elements from sequence to sequence
  int l, n;   // bytes from token to token, elements from state to state
  int width;  // bytes that one copy may move: 16, 8, 4, or 0 where rows are not aligned or elements not neighbours
};

struct Side {
  Tensor x, dt, B, C;
  const float *A, *D, *bias, *start;  // D, bias, start may be null
  float *final, *chunks;              // may be null
  bool reverse;
};

struct Params {
  Side side[2];
  Tensor z;
  void* y;
  float* park;
  int l, d, blocks, frames;
  float scale;
  Softplus softplus;
  bool shared_park;
  bool wide_y;   // y in fp32
  bool aligned;  // two neighbouring channels of x, dt, z, y may move together, and four states of B or C
};

inline int narrow(const char* name, int64_t v) {
  if (v > INT_MAX || v < INT_MIN)
    throw std::invalid_argument(std::string("scan: ") + name + " must fit in 32 bits, got " + std::to_string(v));
  return static_cast<int>(v);
}

inline Tensor tensor(const char* name, const View& v, int64_t size, int64_t n) {
  int width = 16;
  const auto fits = [&](int64_t bytes) { return bytes % width == 0; };
  while (width >= 4 && !(fits(reinterpret_cast<intptr_t>(v.p)) && fits(v.s[0] * size) && fits(v.s[1] * size)))
    width /= 2;
  return {v.p, v.s[0], narrow(name, v.s[1] * size), narrow(name, n), width >= 4 && n == 1 ? width : 0};
}

inline Params params(const ScanArgs& a, int channels) {
  Params p{};
  const int64_t size = a.dtype == 0 ? 4 : 2;
  for (int i = 0; i < a.directions; ++i) {
    const ScanDirection& in = a.dir[i];
    if (in.constant_B || in.constant_C || in.groups_B != 1 || in.groups_C != 1)
      throw std::invalid_argument("scan: the CUDA kernels take one group of B and C");
    Side& s = p.side[i];
    s.x = tensor("a stride of x", in.x, size, 1), s.dt = tensor("a stride of dt", in.dt, size, 1);
    s.B = tensor("a stride of B", in.B, size, in.B.s[3]), s.C = tensor("a stride of C", in.C, size, in.C.s[3]);
    s.A = in.A.at<float>(), s.D = in.D.at<float>(), s.bias = in.dt_bias.at<float>();
    s.start = in.initial_state.at<float>(), s.final = in.final_state.at<float>();
    s.chunks = in.chunk_states.at<float>(), s.reverse = in.reverse;
  }
  if (a.n != kStates) throw std::invalid_argument("scan: the CUDA kernels take n = 16, got " + std::to_string(a.n));
  if (a.cu_seqlens || a.mask) throw std::invalid_argument("scan: the CUDA kernels take no cu_seqlens and no mask");
  p.z = tensor("a stride of z", a.z, size, 1), p.y = a.y.p;
  p.l = narrow("the number of tokens", a.l), p.d = narrow("a row of y", a.d * 4) / 4;
  p.blocks = static_cast<int>((a.d + channels - 1) / channels), p.frames = static_cast<int>(a.frames);
  p.scale = a.scale, p.softplus = Softplus::of(a.softplus), p.wide_y = a.out_dtype == 0;
  p.aligned = a.d % 2 == 0 && p.z.width >= 2 * size;
  for (int i = 0; i < a.directions; ++i) {
    const Side& s = p.side[i];
    p.aligned = p.aligned && s.x.width >= 2 * size && s.dt.width >= 2 * size;
    p.aligned = p.aligned && s.B.width >= 4 * size && s.C.width >= 4 * size;
  }
  return p;
}

}  // namespace endomamba::cuda
