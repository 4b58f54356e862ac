// What the forward and the backward scan share: the walk over tokens, the staging of operands in fp32 rows of W lanes,
// and the recurrence of a chunk.
//
// Layout of scratch: a lane is a channel.  Per token vectors are [token][W]; per state ones [state][W]; B and C are
// [token][states] where one group serves the whole block, [token][states][W] where lanes belong to different groups.
// The state count is padded to a multiple of 4 with A = B = C = 0: decay 1, input 0, the padding stays zero.
#pragma once

#include "scan.h"
#include "simd.h"

namespace endomamba::ENDOMAMBA_LEVEL {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr int kStates = W == 16 ? 16 : 8;  // states that fit in registers at once

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t padded_states(int64_t n) { return (n + 3) / 4 * 4; }

// Waking a second thread costs more than this many state updates (40 us of one core), and far more on a busy machine.
static inline int threads_for(const ScanArgs& a) {
  const int64_t updates = (a.cu_seqlens ? 1 : a.b) * a.l * a.d * a.n;
  return updates < 200000 ? 1 : a.threads;
}

template <class F>
static inline void with_dtype(int dtype, const F& f) {
  if (dtype == kFloat32)
    f(float{});
  else if (dtype == kBFloat16)
    f(bf16{});
  else
    f(fp16{});
}

// Where a sequence lies: its row in x and its first token there.
struct Sequence {
  int64_t row, first, length;

  Sequence(const ScanArgs& a, int64_t index)
      : row(a.cu_seqlens ? 0 : index),
        first(a.cu_seqlens ? *a.cu_seqlens.at<int64_t>(index) : 0),
        length(a.cu_seqlens ? *a.cu_seqlens.at<int64_t>(index + 1) - first : a.l) {}
};

// The tokens of one chunk in walking order.
struct Chunk {
  int64_t size, slot;
  int64_t token[kChunk];
  bool masked[kChunk];

  Chunk(const ScanArgs& a, const Sequence& seq, int64_t index, int64_t chunk, bool reverse)
      : size(min64(kChunk, seq.length - chunk * kChunk)),
        slot(a.cu_seqlens ? seq.first / kChunk + index + chunk : chunk) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t step = reverse ? seq.length - 1 - (chunk * kChunk + i) : chunk * kChunk + i;
      const int64_t local = a.frames ? step % a.frames * (seq.length / a.frames) + step / a.frames : step;
      token[i] = seq.first + local;
      masked[i] = a.mask && *a.mask.at<uint8_t>(seq.row, token[i]) == 0;
    }
  }
};

// Which group of B or C a channel reads.
struct Grouping {
  int64_t per_group;
  bool constant;

  int64_t of(int64_t channel) const { return channel / per_group; }
  int64_t count(int64_t first, int64_t width) const { return of(first + width - 1) - of(first) + 1; }
  // One row serves all channels of the block.
  bool shared(int64_t first, int64_t width) const { return !constant && count(first, width) == 1; }
};

static inline Grouping grouping_B(const ScanArgs& a, const ScanDirection& dir) {
  return {a.d / dir.groups_B, dir.constant_B};
}

static inline Grouping grouping_C(const ScanArgs& a, const ScanDirection& dir) {
  return {a.d / dir.groups_C, dir.constant_C};
}

// B or C of a chunk, one group for the whole block: rows [token][states].
template <class T>
static void stage_shared(const ScanArgs& a, const View& view, const Sequence& seq, const Chunk& chunk, int64_t group,
                         bool zero_masked, float* out) {
  const int64_t states = padded_states(a.n);
  for (int64_t i = 0; i < chunk.size; ++i, out += states) {
    if (zero_masked && chunk.masked[i]) {
      std::memset(out, 0, states * sizeof(float));
      continue;
    }
    const T* in = view.at<T>(seq.row, chunk.token[i], group);
    int64_t s = 0;
    if (view.s[3] == 1)
      for (; s + W <= a.n; s += W) store(out + s, load_full(in + s));
    for (; s < a.n; ++s) out[s] = to_float(in[s * view.s[3]]);
    for (; s < states; ++s) out[s] = 0.0f;
  }
}

// The same with a group for each lane: [token][states][W].  A constant operand is staged once: `tokens` is 1.
template <class T>
static void stage_lanes(const ScanArgs& a, const View& view, const Grouping& groups, const Sequence& seq,
                        const Chunk& chunk, int64_t channel, int lanes, int64_t tokens, bool zero_masked, float* out) {
  const int64_t states = padded_states(a.n);
  std::memset(out, 0, tokens * states * W * sizeof(float));
  for (int64_t i = 0; i < tokens; ++i, out += states * W) {
    if (zero_masked && chunk.masked[i]) continue;
    for (int lane = 0; lane < lanes; ++lane) {
      const T* in = view.at<T>(seq.row, chunk.token[i], groups.of(channel + lane));
      for (int64_t s = 0; s < a.n; ++s) out[s * W + lane] = to_float(in[s * view.s[3]]);
    }
  }
}

// B or C of a chunk as the recurrence reads it.
struct Operand {
  float* data;
  bool lanes;            // [token][states][W] instead of [token][states]
  int64_t token_stride;  // floats from one token to the next; 0 for a constant operand
};

static inline int64_t operand_floats(const ScanArgs& a) { return kChunk * padded_states(a.n) * W; }

static inline void stage_operand(const ScanArgs& a, const View& view, const Grouping& groups, const Sequence& seq,
                                 const Chunk& chunk, int64_t channel, int lanes, bool zero_masked, Operand& out) {
  const int64_t states = padded_states(a.n);
  // A masked token has dt = 0 and x = 0: a constant B, which holds no NaN of a padding token, needs no zeroing.
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (!out.lanes) {
      stage_shared<T>(a, view, seq, chunk, groups.of(channel), zero_masked, out.data);
      out.token_stride = states;
    } else {
      stage_lanes<T>(a, view, groups, seq, chunk, channel, lanes, groups.constant ? 1 : chunk.size,
                     zero_masked && !groups.constant, out.data);
      out.token_stride = groups.constant ? 0 : states * W;
    }
  });
}

// x, dt' = softplus(dt + bias) and dt' * x of W channels; slope, where asked for, is d dt' / d dt.
template <class T>
static void stage_inputs(const ScanArgs& a, const ScanDirection& dir, const Sequence& seq, const Chunk& chunk,
                         int64_t channel, int lanes, float* x_out, float* dt_out, float* dtx_out, float* slope_out) {
  const vf bias = dir.dt_bias ? load_lanes(dir.dt_bias.at<float>(channel), dir.dt_bias.s[0], lanes) : zero();
  for (int64_t i = 0; i < chunk.size; ++i) {
    vf x = zero(), dt = zero(), slope = zero();
    if (!chunk.masked[i]) {
      x = load_lanes(dir.x.at<T>(seq.row, chunk.token[i], channel), dir.x.s[2], lanes);
      const vf raw = load_lanes(dir.dt.at<T>(seq.row, chunk.token[i], channel), dir.dt.s[2], lanes) + bias;
      dt = a.softplus ? softplus(raw) : raw;
      if (slope_out) slope = a.softplus ? select(raw > set1(20.0f), set1(1.0f), sigmoid(raw)) : set1(1.0f);
    }
    store(x_out + i * W, x);
    store(dt_out + i * W, dt);
    store(dtx_out + i * W, dt * x);
    if (slope_out) store(slope_out + i * W, slope);
  }
}

// Rows of (d, n) or (.., d, n) fp32 to [state][W] and back; `base` points at the first channel.
static inline void load_states(const float* base, const View& view, int channel_axis, int64_t n, int lanes,
                               float factor, float* out) {
  const int64_t stride_d = view.s[channel_axis], stride_n = view.s[channel_axis + 1];
  std::memset(out, 0, padded_states(n) * W * sizeof(float));
  for (int lane = 0; lane < lanes; ++lane)
    for (int64_t s = 0; s < n; ++s) out[s * W + lane] = base[lane * stride_d + s * stride_n] * factor;
}

static inline void store_states(float* base, const View& view, int channel_axis, int64_t n, int lanes,
                                const float* in) {
  const int64_t stride_d = view.s[channel_axis], stride_n = view.s[channel_axis + 1];
  for (int lane = 0; lane < lanes; ++lane)
    for (int64_t s = 0; s < n; ++s) base[lane * stride_d + s * stride_n] = in[s * W + lane];
}

// One step for NS states, which live in registers for the whole chunk: h = 2^(dt A) h + dt x B, y += <C, h>.
// kHistory (backward): keeps the decay and h of every step, both [token][states][W].  kHalf: see exp2.
template <int NS, bool kLanesB, bool kLanesC, bool kHistory, bool kHalf>
static void scan_states(int64_t tokens, int64_t states, const float* A, float* h, const float* dt, const float* dtx,
                        const Operand& B, const Operand& C, int64_t first, float* y, float* decay, float* history) {
  constexpr int kStepB = kLanesB ? W : 1, kStepC = kLanesC ? W : 1;
  vf state[NS];
#pragma GCC unroll 16
  for (int s = 0; s < NS; ++s) state[s] = load(h + s * W);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* b = B.data + t * B.token_stride + first * kStepB;
    const float* c = C.data + t * C.token_stride + first * kStepC;
    const vf dt_t = load(dt + t * W), dtx_t = load(dtx + t * W);
    vf sum[2] = {load(y + t * W), zero()};
#pragma GCC unroll 16
    for (int s = 0; s < NS; ++s) {
      const vf b_s = kLanesB ? load(b + s * kStepB) : set1(b[s]);
      const vf c_s = kLanesC ? load(c + s * kStepC) : set1(c[s]);
      const vf a_s = exp2<kHalf>(dt_t * load(A + s * W));
      state[s] = a_s * state[s] + dtx_t * b_s;
      sum[s & 1] += state[s] * c_s;
      if constexpr (kHistory) {
        store(decay + (t * states + s) * W, a_s);
        store(history + (t * states + s) * W, state[s]);
      }
    }
    store(y + t * W, sum[0] + sum[1]);
  }
#pragma GCC unroll 16
  for (int s = 0; s < NS; ++s) store(h + s * W, state[s]);
}

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// Calls f with the layout of B and C as constants.
template <class F>
static inline void with_layout(const Operand& B, const Operand& C, const F& f) {
  if (B.lanes)
    C.lanes ? f(Constant<true>{}, Constant<true>{}) : f(Constant<true>{}, Constant<false>{});
  else
    C.lanes ? f(Constant<false>{}, Constant<true>{}) : f(Constant<false>{}, Constant<false>{});
}

// All states of W channels over a chunk.
template <bool kHistory, bool kHalf = false>
static void scan_chunk(int64_t tokens, int64_t states, const float* A, float* h, const float* dt, const float* dtx,
                       const Operand& B, const Operand& C, float* y, float* decay, float* history) {
  with_layout(B, C, [&](auto lanes_b, auto lanes_c) {
    constexpr bool kB = decltype(lanes_b)::value, kC = decltype(lanes_c)::value;
    int64_t s = 0;
    for (; s + kStates <= states; s += kStates)
      scan_states<kStates, kB, kC, kHistory, kHalf>(tokens, states, A + s * W, h + s * W, dt, dtx, B, C, s, y,
                                                    decay + s * W, history + s * W);
    for (; s < states; s += 4)
      scan_states<4, kB, kC, kHistory, kHalf>(tokens, states, A + s * W, h + s * W, dt, dtx, B, C, s, y, decay + s * W,
                                              history + s * W);
  });
}

}  // namespace endomamba::ENDOMAMBA_LEVEL
