// conv_forward, conv_backward: the causal depthwise convolution of one direction with its states, or both directions
// from one reading of x.
//
// Grid (workers * cdiv(d, 64),), one warp a block, two neighbouring channels a lane: no lane needs another's numbers. A
//   worker takes every workers-th piece of kPiece steps of one sequence; forward there is one worker for each.
// Registers: the taps and the last w - 1 tokens; kAhead tokens are loaded before the first of them is used.
// Both: at step k the window x[k-w+1 .. k] makes y[k] and, mirrored, y_b[k-w+1]; the walk goes w - 1 steps further.
// Backward, at step k: the gradients dp of the sums before silu at k and, mirrored, at k-w+1, which are all that
//   dx[k-w+1] still waits for.  dweight and dbias stay in registers for all of a worker's pieces.
// Bytes: x, dy once (w - 1 tokens more a piece, from L2), y or dx once.
// Numerics: fp32, bias first, then the taps from the oldest.
// Bound: memory.
#include "cuda/conv.h"
#include "scan_args.cuh"

namespace endomamba::cuda {
namespace {

constexpr int kPiece = 32, kAhead = 8, kAheadBack = 4, kLaneChannels = 2, kBlockChannels = 32 * kLaneChannels;

struct ConvSide {
  const float *weight, *bias;
  void* y;
  Tensor dy;
};

struct ConvParams {
  ConvSide side[2];
  Tensor x, dx;
  const float *start, *dfinal;
  float *final, *dstart, *parts;
  int64_t pieces;  // of all sequences
  int64_t workers;
  int l, d, blocks, each, frames;  // each: pieces of a sequence
  bool silu, reverse;
};

struct Pair {
  float a, b;
  __device__ __forceinline__ void add(Pair u, Pair v) { a = fmaf(u.a, v.a, a), b = fmaf(u.b, v.b, b); }
};
template <class T>
__device__ __forceinline__ Pair pair(const Two<T>& v) {
  return {v.template at<0>(), v.template at<1>()};
}

__device__ __forceinline__ float silu_slope(float p) {
  const float s = sigmoid(p);
  return s * fmaf(p, 1.0f - s, 1.0f);
}

__device__ __forceinline__ int token_at(const ConvParams& p, int k) {
  k = p.reverse ? p.l - 1 - k : k;
  return p.frames ? k % p.frames * (p.l / p.frames) + k / p.frames : k;
}

// One direction's taps, from the oldest token of its walk to the newest, and its bias, of the lane's two channels.
template <int kWidth>
struct Taps {
  Pair w[kWidth], bias;

  __device__ __forceinline__ Taps(const ConvSide& s, int channel, int other) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      w[j] = {s.weight[channel * int64_t{kWidth} + j], s.weight[other * int64_t{kWidth} + j]};
    bias = {s.bias ? s.bias[channel] : 0.0f, s.bias ? s.bias[other] : 0.0f};
  }
  // window: x of kWidth steps; mirrored, the other walk's oldest comes last
  __device__ __forceinline__ Pair operator()(const Pair (&window)[kWidth], bool mirror) const {
    Pair sum = bias;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum.add(w[j], window[mirror ? kWidth - 1 - j : j]);
    return sum;
  }
};

// What both kernels' lanes have of x: the steps before the piece's first, and those that come.
template <class T, int kWidth, bool kAligned>
struct Reader {
  const ConvParams& p;
  const T* x;
  const float* start;
  int next;
  bool second;

  __device__ __forceinline__ Two<T> raw(int k) const {
    return load_two<kAligned>(offset(x, token_at(p, min(max(k, 0), p.l - 1)), p.x.l), next);
  }
  // before the first step: the state's rows; past the last: 0
  __device__ __forceinline__ Pair at(int k, const Two<T>& value) const {
    if (k >= p.l) return {0.0f, 0.0f};
    if (k >= 0) return pair(value);
    if (!start || k < 1 - kWidth) return {0.0f, 0.0f};
    const float* const row = start + (k + kWidth - 1) * int64_t{p.d};
    return {row[0], second ? row[1] : 0.0f};
  }
};

template <class T, int kWidth, bool kBoth, bool kAligned>
__global__ void __launch_bounds__(32) conv_forward_kernel(const __grid_constant__ ConvParams p) {
  const int channel = (blockIdx.x % p.blocks) * kBlockChannels + threadIdx.x * kLaneChannels;
  if (channel >= p.d) return;
  const bool second = channel + 1 < p.d;
  const int next = second ? 1 : 0, l = p.l;
  const int64_t piece = blockIdx.x / p.blocks, seq = piece / p.each;
  const int first = static_cast<int>(piece % p.each) * kPiece, end = min(first + kPiece, l);
  const int64_t states = seq * (kWidth - 1) * p.d + channel;
  const Reader<T, kWidth, kAligned> read{p, static_cast<const T*>(p.x.p) + seq * p.x.b + channel,
                                         p.start ? p.start + states : nullptr, next, second};
  const Taps<kWidth> taps(p.side[0], channel, channel + next);
  const Taps<kWidth> taps_b(p.side[kBoth ? 1 : 0], channel, channel + next);
  const int64_t out = seq * l * p.d + channel;
  const int out_l = p.d * static_cast<int>(sizeof(T));
  T* const y = static_cast<T*>(p.side[0].y) + out;
  T* const y_b = kBoth ? static_cast<T*>(p.side[1].y) + out : nullptr;

  const auto put = [&](T* to, int k, Pair v) {
    if (p.silu) v = {v.a * sigmoid(v.a), v.b * sigmoid(v.b)};
    store_two<kAligned>(offset(to, token_at(p, k), out_l), v.a, v.b, second);
  };
  Pair window[kWidth];
#pragma unroll
  for (int j = 1; j < kWidth; ++j) window[j] = read.at(first - kWidth + j, read.raw(first - kWidth + j));
  const int steps = end - first + (kBoth ? kWidth - 1 : 0);
#pragma unroll 1
  for (int i = 0; i < steps; i += kAhead) {
    Two<T> coming[kAhead];
#pragma unroll
    for (int t = 0; t < kAhead; ++t) coming[t] = read.raw(first + i + t);
#pragma unroll
    for (int t = 0; t < kAhead; ++t) {
      const int k = first + i + t, mirrored = k - kWidth + 1;
#pragma unroll
      for (int j = 1; j < kWidth; ++j) window[j - 1] = window[j];
      window[kWidth - 1] = read.at(k, coming[t]);
      if (k < end) put(y, k, taps(window, false));
      if (kBoth && mirrored >= first && mirrored < end) put(y_b, mirrored, taps_b(window, true));
    }
  }
  if (p.final && end == l)
#pragma unroll
    for (int j = 0; j < kWidth - 1; ++j) {
      const int k = l - kWidth + 1 + j;
      const Pair v = read.at(k, read.raw(k));
      float* const to = p.final + states + j * int64_t{p.d};
      to[0] = v.a;
      if (second) to[1] = v.b;
    }
}

template <class T, int kWidth, bool kBoth, bool kAligned>
__global__ void __launch_bounds__(32) conv_backward_kernel(const __grid_constant__ ConvParams p) {
  const int channel = (blockIdx.x % p.blocks) * kBlockChannels + threadIdx.x * kLaneChannels;
  if (channel >= p.d) return;
  const bool second = channel + 1 < p.d;
  const int next = second ? 1 : 0, l = p.l;
  const int64_t worker = blockIdx.x / p.blocks;
  const Taps<kWidth> taps(p.side[0], channel, channel + next);
  const Taps<kWidth> taps_b(p.side[kBoth ? 1 : 0], channel, channel + next);
  Pair dw[kWidth + 1] = {}, dw_b[kWidth + 1] = {};  // the last one is dbias
  const Pair one = {1.0f, 1.0f};

#pragma unroll 1
  for (int64_t piece = worker; piece < p.pieces; piece += p.workers) {
    const int64_t seq = piece / p.each, states = seq * (kWidth - 1) * p.d + channel;
    const int first = static_cast<int>(piece % p.each) * kPiece, end = min(first + kPiece, l);
    const Reader<T, kWidth, kAligned> read{p, static_cast<const T*>(p.x.p) + seq * p.x.b + channel,
                                           p.start ? p.start + states : nullptr, next, second};
    T* const dx = static_cast<T*>(const_cast<void*>(p.dx.p)) + seq * p.dx.b + channel;
    const auto slope_at = [&](const ConvSide& s, int k) {
      const T* const from = static_cast<const T*>(s.dy.p) + seq * s.dy.b + channel;
      return load_two<kAligned>(offset(from, token_at(p, min(max(k, 0), l - 1)), s.dy.l), next);
    };
    // of the sum before silu at step k, from that sum and the gradient of y
    const auto before = [&](bool there, const Two<T>& dy, Pair sum) {
      const Pair g = pair(dy);
      if (!there) return Pair{0.0f, 0.0f};
      return p.silu ? Pair{g.a * silu_slope(sum.a), g.b * silu_slope(sum.b)} : g;
    };
    Pair window[kWidth], dp[kWidth] = {}, dp_b[kWidth] = {};  // of the last kWidth steps, the newest last
#pragma unroll
    for (int j = 1; j < kWidth; ++j) window[j] = read.at(first - kWidth + j, read.raw(first - kWidth + j));
    const int steps = end - first + kWidth - 1;
#pragma unroll 1
    for (int i = 0; i < steps; i += kAheadBack) {
      Two<T> coming[kAheadBack], dy[kAheadBack] = {}, dy_b[kAheadBack] = {};
#pragma unroll
      for (int t = 0; t < kAheadBack; ++t) {
        const int k = first + i + t;
        coming[t] = read.raw(k);
        if (p.side[0].dy.p) dy[t] = slope_at(p.side[0], k);
        if (kBoth && p.side[1].dy.p) dy_b[t] = slope_at(p.side[1], k - kWidth + 1);
      }
#pragma unroll
      for (int t = 0; t < kAheadBack; ++t) {
        const int k = first + i + t, m = k - kWidth + 1;
#pragma unroll
        for (int j = 1; j < kWidth; ++j) window[j - 1] = window[j], dp[j - 1] = dp[j], dp_b[j - 1] = dp_b[j];
        window[kWidth - 1] = read.at(k, coming[t]);
        dp[kWidth - 1] = before(p.side[0].dy.p && k < l, dy[t], taps(window, false));
        if (kBoth) dp_b[kWidth - 1] = before(p.side[1].dy.p && m >= 0 && m < l, dy_b[t], taps_b(window, true));
        Pair sum = {0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          if (k < end) dw[j].add(dp[kWidth - 1], window[j]);
          if (kBoth && m >= first && m < end) dw_b[j].add(dp_b[kWidth - 1], window[kWidth - 1 - j]);
          sum.add(taps.w[j], dp[kWidth - 1 - j]);
          if (kBoth) sum.add(taps_b.w[j], dp_b[j]);
        }
        if (k < end) dw[kWidth].add(dp[kWidth - 1], one);
        if (kBoth && m >= first && m < end) dw_b[kWidth].add(dp_b[kWidth - 1], one);
        const int last = m - l + kWidth - 1;  // the row of the final state that step m is
        if (p.dfinal && last >= 0 && last < kWidth - 1) {
          const float* const row = p.dfinal + states + last * int64_t{p.d};
          sum.a += row[0], sum.b += second ? row[1] : 0.0f;
        }
        if (m >= first && m < end) store_two<kAligned>(offset(dx, token_at(p, m), p.dx.l), sum.a, sum.b, second);
        if (p.dstart && first == 0 && m < 0) {
          float* const row = p.dstart + states + k * int64_t{p.d};
          row[0] = sum.a;
          if (second) row[1] = sum.b;
        }
      }
    }
  }
  const auto leave = [&](int side, const Pair(&v)[kWidth + 1]) {
    float* const to = p.parts + ((worker * (kBoth ? 2 : 1) + side) * (kWidth + 1)) * p.d + channel;
#pragma unroll
    for (int j = 0; j <= kWidth; ++j) {
      to[j * int64_t{p.d}] = v[j].a;
      if (second) to[j * int64_t{p.d} + 1] = v[j].b;
    }
  };
  leave(0, dw);
  if (kBoth) leave(1, dw_b);
}

template <class T, int kWidth, bool kBoth>
void launch_conv(const ConvParams& p, bool aligned, bool forward, void* stream) {
  const auto kernel =
      forward
          ? (aligned ? conv_forward_kernel<T, kWidth, kBoth, true> : conv_forward_kernel<T, kWidth, kBoth, false>)
          : (aligned ? conv_backward_kernel<T, kWidth, kBoth, true> : conv_backward_kernel<T, kWidth, kBoth, false>);
  launch(forward ? "conv_forward" : "conv_backward", kernel, p.workers * p.blocks, 32, 0, stream, p);
}

template <class T>
void launch_conv(const ConvParams& p, const ConvArgs& a, bool aligned, bool forward, void* stream) {
  if (a.w != 4) throw std::invalid_argument("conv: the CUDA kernels have 4 taps, got " + std::to_string(a.w));
  a.directions == 2 ? launch_conv<T, 4, true>(p, aligned, forward, stream)
                    : launch_conv<T, 4, false>(p, aligned, forward, stream);
}

void run(const ConvArgs& a, int64_t workers, float* parts, bool forward, void* stream) {
  if (a.cu_seqlens) throw std::invalid_argument("conv: the CUDA kernels take no cu_seqlens");
  const int64_t size = a.dtype == 0 ? 4 : 2;
  ConvParams p{};
  p.x = tensor("a stride of x", a.x, size, 1), p.dx = tensor("a stride of dx", a.dx, size, 1);
  bool aligned = a.d % 2 == 0 && p.x.width >= 2 * size && (forward || p.dx.width >= 2 * size);
  for (int i = 0; i < a.directions; ++i) {
    const ConvDirection& in = a.dir[i];
    p.side[i] = {in.weight.at<float>(), in.bias.at<float>(), in.y.p, tensor("a stride of dy", in.dy, size, 1)};
    aligned = aligned && p.side[i].dy.width >= 2 * size && reinterpret_cast<intptr_t>(in.y.p) % (2 * size) == 0;
  }
  p.start = a.initial_state.at<float>(), p.final = a.final_state.at<float>();
  p.dfinal = a.dfinal_state.at<float>(), p.dstart = a.dinitial_state.at<float>(), p.parts = parts;
  p.l = narrow("the number of tokens", a.l), p.d = narrow("a row of y", a.d * 4) / 4;
  p.blocks = static_cast<int>((a.d + kBlockChannels - 1) / kBlockChannels);
  p.each = static_cast<int>((a.l + kPiece - 1) / kPiece), p.pieces = conv_pieces(a.b, a.l);
  p.workers = workers, p.frames = static_cast<int>(a.frames), p.silu = a.silu, p.reverse = a.reverse;
  with_dtype(a.dtype, "conv", [&](auto zero) { launch_conv<decltype(zero)>(p, a, aligned, forward, stream); });
}

}  // namespace

int64_t conv_pieces(int64_t b, int64_t l) { return b * ((l + kPiece - 1) / kPiece); }

void conv_forward(const ConvArgs& a, void* stream) { run(a, conv_pieces(a.b, a.l), nullptr, true, stream); }

void conv_backward(const ConvArgs& a, int64_t workers, float* parts, void* stream) {
  run(a, workers, parts, false, stream);
}

}  // namespace endomamba::cuda
