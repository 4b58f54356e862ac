// A mixer without its two large projections, forward: conv and silu, x_proj, dt_proj, softplus, scan, gate.
//
// Three loops over tasks, each of which writes what the next one reads:
//   conv   channels   u = silu(conv(x)), of both directions from one reading of x (causal_conv1d.cpp)
//   x_proj 12 tokens  dt_low, B, C = x_proj u, as dot products along d: weights are read where they lie
//   scan   32 channels, chunks of 64 tokens; dt = dt_proj dt_low + bias is made where it is used, in the chunk
// Traffic, in elements of b*l*d: x 1, u 1 + 2 for each direction, z 1, y 1.  dt never exists in memory.
// Numerics: u has the dtype of x, as one activation of the model; dt, B, C and all after it are fp32, the decays of an
// x of 16 bits by exp2<kHalf>.  Each dot product is one chain along d for W lanes, whatever the tile, so that a row's
// bits depend on its own inputs and on the instruction set only: not on b, on the tiling or on the threads.
// Memory between the loops is the calling thread's own and is kept from call to call: it lies in its cache.
#include <type_traits>

#include "causal_conv1d.h"
#include "mixer.h"
#include "parallel.h"
#include "scan_common.h"

namespace endomamba::ENDOMAMBA_LEVEL {

void conv_fwd(const ConvArgs&);

namespace {

constexpr int64_t kTokens = 12;  // of one x_proj task
constexpr int kTile = W == 16 ? 6 : W == 8 ? 3 : 3;  // tokens of a tile: with 4 columns the sums fit in registers

// A token's dt_low, B and C; the states padded to whole multiples of 4.
int64_t projected_floats(const MixerArgs& a) { return a.r + 2 * padded_states(a.n); }

// --- x_proj ----------------------------------------------------------------------------------------------------------

// The next kStep elements of a row for a dot product; which lane takes which does not matter, as long as both rows
// agree.
template <class T>
struct Dot {
  static constexpr int64_t kStep = W;
  using Elements = vf;
  static ENDOMAMBA_INLINE Elements read(const T* p) { return load_full(p); }
  static ENDOMAMBA_INLINE vf add(vf sum, Elements x, Elements w) { return sum + x * w; }
};

template <>
struct Dot<bf16> {
  static constexpr int64_t kStep = 2 * W;
#if defined(__AVX512BF16__)
  using Elements = __m512bh;
  static ENDOMAMBA_INLINE Elements read(const bf16* p) { return (Elements)_mm512_loadu_si512(p); }
  static ENDOMAMBA_INLINE vf add(vf sum, Elements x, Elements w) { return (vf)_mm512_dpbf16_ps((__m512)sum, x, w); }
#else
  struct Elements {  // two to a lane of 32 bits: the upper half is an fp32 already
    vf low, high;
  };
  static ENDOMAMBA_INLINE Elements read(const bf16* p) {
    vu bits;
    std::memcpy(&bits, p, sizeof bits);
    return {(vf)(bits << 16), (vf)(bits & 0xffff0000u)};
  }
  static ENDOMAMBA_INLINE vf add(vf sum, Elements x, Elements w) { return sum + x.low * w.low + x.high * w.high; }
#endif
};

// The last count < kStep elements of a row, and zeros.
template <class T>
ENDOMAMBA_INLINE typename Dot<T>::Elements read_rest(const T* p, int64_t count) {
  T rest[Dot<T>::kStep] = {};
  std::memcpy(rest, p, count * sizeof(T));
  return Dot<T>::read(rest);
}

// out[t][c] = <u[t], weight[c]> for TOKENS rows of u and COLUMNS of weight.
template <class T, int TOKENS, int COLUMNS>
void dot_tile(const T* u, int64_t u_stride, const T* weight, int64_t weight_stride, int64_t d, float* out,
              int64_t out_stride) {
  vf sums[TOKENS][COLUMNS];
  for (int t = 0; t < TOKENS; ++t)
    for (int c = 0; c < COLUMNS; ++c) sums[t][c] = zero();
  const auto add = [&](const auto& read) __attribute__((always_inline)) {
    typename Dot<T>::Elements w[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) w[c] = read(weight + c * weight_stride);
#pragma GCC unroll 6
    for (int t = 0; t < TOKENS; ++t) {
      const auto x = read(u + t * u_stride);
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) sums[t][c] = Dot<T>::add(sums[t][c], x, w[c]);
    }
  };
  int64_t k = 0;
  for (; k + Dot<T>::kStep <= d; k += Dot<T>::kStep)
    add([&](const T* row) __attribute__((always_inline)) { return Dot<T>::read(row + k); });
  if (k < d) add([&](const T* row) __attribute__((always_inline)) { return read_rest(row + k, d - k); });
  for (int t = 0; t < TOKENS; ++t)
    for (int c = 0; c < COLUMNS; ++c) out[t * out_stride + c] = sum(sums[t][c]);
}

template <class T, int TOKENS>
void dot_rows(const T* u, int64_t u_stride, const T* weight, int64_t weight_stride, int64_t columns, int64_t d,
              float* out, int64_t out_stride) {
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4)
    dot_tile<T, TOKENS, 4>(u, u_stride, weight + c * weight_stride, weight_stride, d, out + c, out_stride);
  for (; c < columns; ++c)
    dot_tile<T, TOKENS, 1>(u, u_stride, weight + c * weight_stride, weight_stride, d, out + c, out_stride);
}

// dt_low, B and C of tokens [first, last) of a row.
template <class T>
void project(const MixerArgs& a, const MixerDirection& dir, int64_t row, int64_t first, int64_t last) {
  const int64_t states = padded_states(a.n), stride = projected_floats(a), u_stride = dir.u.s[1];
  const struct {
    int64_t from, count, to;
  } parts[] = {{0, a.r + (states == a.n ? 2 * a.n : 0), 0}, {a.r, a.n, a.r}, {a.r + a.n, a.n, a.r + states}};
  for (int i = 0; i < (states == a.n ? 1 : 3); ++i) {
    const T* weight = dir.x_proj.at<T>(parts[i].from);
    const int64_t weight_stride = dir.x_proj.s[0], columns = parts[i].count;
    int64_t t = first;
    const auto rows = [&](auto tokens) {
      constexpr int TOKENS = decltype(tokens)::value;
      for (; t + TOKENS <= last; t += TOKENS)
        dot_rows<T, TOKENS>(dir.u.at<T>(row, t), u_stride, weight, weight_stride, columns, a.d,
                            dir.projected.at<float>(row, t) + parts[i].to, stride);
    };
    rows(std::integral_constant<int, kTile>{});
    rows(std::integral_constant<int, 2>{});
    rows(std::integral_constant<int, 1>{});
  }
  if (states != a.n)
    for (int64_t t = first; t < last; ++t)
      for (int64_t s = a.n; s < states; ++s)
        dir.projected.at<float>(row, t)[a.r + s] = dir.projected.at<float>(row, t)[a.r + states + s] = 0.0f;
}

// --- scan ------------------------------------------------------------------------------------------------------------

// The tokens of a chunk in walking order: a start and a step.
struct Steps {
  int64_t size, first, step;
  Steps(int64_t length, int64_t chunk, bool reverse)
      : size(min64(kChunk, length - chunk * kChunk)),
        first(reverse ? length - 1 - chunk * kChunk : chunk * kChunk),
        step(reverse ? -1 : 1) {}
};

// dt_proj of TOKENS tokens, before the softplus, W channels: weight is [r][W].
template <int TOKENS>
ENDOMAMBA_INLINE void dt_rows(const float* low, int64_t stride, const float* weight, int64_t r, vf bias, float* out) {
  vf sums[TOKENS];
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) sums[t] = bias;
  for (int64_t j = 0; j < r; ++j) {
    const vf w = load(weight + j * W);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) sums[t] += set1(low[t * stride + j]) * w;
  }
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) store(out + t * W, sums[t]);
}

// The rows of W lanes, `count` adjacent elements each, as [element][W]; missing lanes are zero.
template <class T>
void load_columns(const T* base, int64_t stride, int64_t count, int lanes, float* out) {
  if (lanes < W) std::memset(out, 0, count * W * sizeof(float));
  for (int lane = 0; lane < lanes; ++lane)
    for (int64_t j = 0; j < count; ++j) out[j * W + lane] = to_float(base[lane * stride + j]);
}

struct Rows {  // of a chunk, [token][W]
  float dt[kChunk * W], dtx[kChunk * W], y[kChunk * W];
};

template <class T>
void scan_task(const MixerArgs& a, int64_t row, int64_t first) {
  const int64_t states = padded_states(a.n), width = min64(kForwardBlock, a.d - first), blocks = ceil_div(width, W);
  const int64_t per_block = (2 * states + a.r) * W, stride = projected_floats(a);
  Scratch matrices(blocks * per_block), scratch(sizeof(Rows) / sizeof(float));
  Scratch total(a.directions == 2 ? a.l * blocks * W : 0);
  Rows& rows = *reinterpret_cast<Rows*>(scratch.get());
  const vf scale = set1(a.scale);

  for (int direction = 0; direction < a.directions; ++direction) {
    const MixerDirection& dir = a.dir[direction];
    const bool reverse = direction == 1, last = direction + 1 == a.directions;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = first + block * W;
      const int lanes = int(min64(W, first + width - channel));
      float *A = matrices.get() + block * per_block, *state = A + states * W, *dt_weight = state + states * W;
      load_states(dir.A.at<float>(channel), dir.A, 0, a.n, lanes, a.log_A ? 1.0f : kLog2e, A);
      if (a.log_A)
        for (int64_t s = 0; s < a.n; ++s) store(A + s * W, exp(load(A + s * W)) * set1(-kLog2e));
      if (a.initial_state)
        load_states(a.initial_state.at<float>(row, channel), a.initial_state, 1, a.n, lanes, 1.0f, state);
      else
        std::memset(state, 0, states * W * sizeof(float));
      load_columns(dir.dt_proj.at<T>(channel), dir.dt_proj.s[0], a.r, lanes, dt_weight);
    }
    for (int64_t k = 0; k < ceil_div(a.l, kChunk); ++k) {
      const Steps steps(a.l, k, reverse);
      const float* projected = dir.projected.at<float>(row, steps.first);
      const int64_t token_stride = steps.step * stride;
      Operand B{const_cast<float*>(projected) + a.r, false, token_stride};
      Operand C{const_cast<float*>(projected) + a.r + states, false, token_stride};
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t channel = first + block * W;
        const int lanes = int(min64(W, first + width - channel));
        float *A = matrices.get() + block * per_block, *state = A + states * W, *dt_weight = state + states * W;
        if (dir.chunk_states)
          store_states(dir.chunk_states.at<float>(row, k, channel), dir.chunk_states, 2, a.n, lanes, state);
        const vf bias = dir.dt_bias ? load_lanes(dir.dt_bias.at<float>(channel), dir.dt_bias.s[0], lanes) : zero();
        const vf D = dir.D ? load_lanes(dir.D.at<float>(channel), dir.D.s[0], lanes) : zero();
        int64_t i = 0;
        for (; i + 8 <= steps.size; i += 8)
          dt_rows<8>(projected + i * token_stride, token_stride, dt_weight, a.r, bias, rows.dt + i * W);
        for (; i < steps.size; ++i)
          dt_rows<1>(projected + i * token_stride, token_stride, dt_weight, a.r, bias, rows.dt + i * W);
        // total is [step of the forward walk][block][W]: the other direction finds the token from the far end.
        float* totals = total.get() + (steps.first * blocks + block) * W;
        const int64_t total_step = steps.step * blocks * W;
        for (i = 0; i < steps.size; ++i) {
          const vf u = load_lanes(dir.u.at<T>(row, steps.first + i * steps.step, channel), 1, lanes);
          const vf dt = softplus(load(rows.dt + i * W));
          store(rows.dt + i * W, dt);
          store(rows.dtx + i * W, dt * u);
          store(rows.y + i * W, direction == 1 ? D * u + load(totals + i * total_step) : D * u);
        }
        scan_chunk<false, !std::is_same_v<T, float>>(steps.size, states, A, state, rows.dt, rows.dtx, B, C, rows.y,
                                                     nullptr, nullptr);
        if (!last) {
          for (i = 0; i < steps.size; ++i) store(totals + i * total_step, load(rows.y + i * W));
          continue;
        }
        for (i = 0; i < steps.size; ++i) {
          const int64_t token = steps.first + i * steps.step;
          const vf z = load_lanes(a.z.at<T>(row, token, channel), a.z.s[2], lanes);
          const vf y = load(rows.y + i * W) * scale * (z * sigmoid(z));
          store_lanes(a.y.at<T>(row, token, channel), a.y.s[2], lanes, y);
        }
      }
    }
    if (a.final_state)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t channel = first + block * W;
        const int lanes = int(min64(W, first + width - channel));
        store_states(a.final_state.at<float>(row, channel), a.final_state, 1, a.n, lanes,
                     matrices.get() + block * per_block + states * W);
      }
  }
}

ConvArgs conv_args(const MixerArgs& a) {
  ConvArgs conv;
  conv.b = a.b, conv.l = a.l, conv.d = a.d, conv.w = a.w;
  conv.dtype = a.dtype, conv.threads = a.threads, conv.directions = a.directions;
  conv.silu = true;
  conv.x = a.x;
  conv.initial_state = a.initial_conv_state, conv.final_state = a.final_conv_state;
  for (int i = 0; i < a.directions; ++i) {
    conv.dir[i].weight = a.dir[i].conv_weight;
    conv.dir[i].bias = a.dir[i].conv_bias;
    conv.dir[i].y = a.dir[i].u;
  }
  return conv;
}

// (b, l, width), contiguous.
View tokens(const MixerArgs& a, char* start, int64_t width) { return {start, {a.l * width, width, 1, 0}}; }

}  // namespace

void mixer_fwd(const MixerArgs& given) {
  MixerArgs a = given;
  const int64_t rows = a.b * a.l, floats = projected_floats(a), size = a.dtype == kFloat32 ? 4 : 2;
  Scratch u(a.directions * ceil_div(rows * a.d * size, 4)), projected(a.directions * rows * floats);
  for (int i = 0; i < a.directions; ++i) {
    a.dir[i].u = tokens(a, reinterpret_cast<char*>(u.get() + i * ceil_div(rows * a.d * size, 4)), a.d);
    a.dir[i].projected = tokens(a, reinterpret_cast<char*>(projected.get() + i * rows * floats), floats);
  }
  conv_fwd(conv_args(a));
  const int64_t pieces = ceil_div(a.l, kTokens), blocks = ceil_div(a.d, kForwardBlock);
  const int threads = a.b * a.l * a.d * a.n < 200000 ? 1 : a.threads;
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(a.b * a.directions * pieces, threads, [&](int64_t task) {
      const int64_t begin = task % pieces * kTokens, row = task / pieces / a.directions;
      project<T>(a, a.dir[task / pieces % a.directions], row, begin, min64(begin + kTokens, a.l));
    });
    parallel_for(a.b * blocks, threads,
                 [&](int64_t task) { scan_task<T>(a, task / blocks, task % blocks * kForwardBlock); });
  });
}

}  // namespace endomamba::ENDOMAMBA_LEVEL
