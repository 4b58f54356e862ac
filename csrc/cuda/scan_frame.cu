// scan_frame: the forward scan of one or two directions where sequences are few and short, as one frame of a stream.
//
// Grid (b * cdiv(d, channels),), channels so few that every multiprocessor has a block.  Time is cut in pieces of 8
//   tokens, all walked at the same time: four lanes for each piece of each channel, whatever warp they fall in.
// Lanes: lane q of the four has states 4 q to 4 q + 3 for the whole piece, and for all that is done once a channel and
//   token (loads, softplus, D, gate, y) the piece's tokens 2 q and 2 q + 1.  dt and dt x go through shared memory from
//   the lane that has a token to the four that walk it, two tokens in one word.
// Carry: a piece is walked from zero, with the product P of its decays kept for every token: y of a token is
//   <C, h> + <C P, state at the piece's start>.  The last h and P of all pieces go to shared memory, one thread for
//   each channel and state walks over them in order, and every lane adds the second term.  No decay is computed twice.
// Two directions are walked one after the other up to their edges, which are then walked at the same time; a lane's
//   tokens are the same in both, so their sum stays in its registers.  Three block barriers.
// Bytes: x, dt, z, y once; B and C once for every block, from L2 after the first.
// Numerics: all in fp32; the sum over states is one of four sums of four.
// Bound: latency, then issue slots.  17 operations of the multi-function unit for each channel and token.
#include <algorithm>

#include "scan_args.cuh"

namespace endomamba::cuda {
namespace {

constexpr int kPiece = 8, kLanes = 4, kPart = kStates / kLanes, kOwn = kPiece / kLanes;
constexpr int kThreads = 608;  // 25 pieces, as of 197 tokens, of 6 channels; two directions' W leaves no room for more
constexpr int kMostPieces = 32;
// Floats of shared memory.  A piece's B or C: a row of 16 each token, and 16 so that two pieces share no bank.  What
// belongs to a piece of a channel: its last h, then what it starts from; its product of decays; (dt, dt x) by token.
constexpr int kRows = (kPiece + 1) * kStates, kUnit = 3 * kStates, kProduct = kStates, kSteps = 2 * kStates;

enum class Way { kForward, kReverse, kBoth };

struct FrameParams {
  Params p;
  int channels, pieces;
  unsigned inverse;  // of channels, times 2^16, rounded up
  bool one;  // sequence
};

// From zero over the lane's piece: adds <C, h> to y, leaves the edge in `unit`.
template <bool kReverse>
__device__ __forceinline__ void walk_piece(float (&y)[kPiece], float (&W)[kPiece][kPart], const float (&A)[kPart],
                                           const float4* B, const float4* C, float* unit, int q) {
  float h[kPart], P[kPart];
  float4 pair = {};
#pragma unroll
  for (int k = 0; k < kPiece; ++k) {
    const int t = kReverse ? kPiece - 1 - k : k;
    if (k % 2 == 0) pair = reinterpret_cast<const float4*>(unit + kSteps)[t / 2];
    const float dt = t % 2 ? pair.z : pair.x, u = t % 2 ? pair.w : pair.y;
    const float4 b4 = B[t * kLanes + q], c4 = C[t * kLanes + q];
    const float b[kPart] = {b4.x, b4.y, b4.z, b4.w}, c[kPart] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const float a = ex2(dt * A[i]);
      h[i] = k == 0 ? u * b[i] : fmaf(a, h[i], u * b[i]), P[i] = k == 0 ? a : P[i] * a;
      y[t] = fmaf(c[i], h[i], y[t]), W[t][i] = c[i] * P[i];
    }
  }
  reinterpret_cast<float4*>(unit)[q] = make_float4(h[0], h[1], h[2], h[3]);
  reinterpret_cast<float4*>(unit + kProduct)[q] = make_float4(P[0], P[1], P[2], P[3]);
}

template <class T, Way kWay, bool kGate>
__global__ void __launch_bounds__(kThreads) scan_frame_kernel(const __grid_constant__ FrameParams f) {
  constexpr int kSides = kWay == Way::kBoth ? 2 : 1;
  const Params& p = f.p;
  float* const memory = reinterpret_cast<float*>(shared_memory());
  const int q = threadIdx.x % kLanes, units = blockDim.x / kLanes, unit = threadIdx.x / kLanes;
  const int piece = static_cast<int>(static_cast<unsigned>(unit) * f.inverse >> 16), c = unit - piece * f.channels;
  const int64_t seq = f.one ? 0 : blockIdx.x / p.blocks;  // a division takes as long as a read of L2
  const int first = static_cast<int>(blockIdx.x - seq * p.blocks) * f.channels, channel = first + c;
  const bool mine = piece < f.pieces && channel < p.d;
  const int own = min(channel, p.d - 1), at0 = piece * kPiece + q * kOwn;
  const auto rows = [&](int side, int which) { return memory + (2 * side + which) * f.pieces * kRows; };
  const auto area = [&](int side, int index) {
    return memory + 2 * kSides * f.pieces * kRows + (side * units + index) * kUnit;
  };

  // All that is read is asked for before any of it is used: one latency of the memory, not one after the other.
  constexpr int kTurns = 2;  // rows of B and C that a lane brings at once; 25 pieces of 6 channels need no more
  T raw_x[kSides][kOwn], raw_dt[kSides][kOwn], raw_z[kOwn] = {};
  Four<T> raw_rows[kTurns][kSides][2];
  float4 raw_A[kSides];
  float D[kSides], bias[kSides];
  const auto fetch = [&](T(&to)[kOwn], const Tensor& from) {
    const T* const start = static_cast<const T*>(from.p) + seq * from.b + own;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) to[e] = load<T>(offset(start, min(at0 + e, p.l - 1), from.l));
  };
  const auto fetch_rows = [&](int row, auto aligned) {
    const auto four = [&](const Tensor& from, int at) {
      const T* const start = static_cast<const T*>(from.p) + seq * from.b + static_cast<int64_t>(q * kPart) * from.n;
      return load_four<decltype(aligned)::value>(offset(start, at, from.l), from.n);
    };
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int at = min(row + turn * units, p.l - 1);
#pragma unroll
      for (int s = 0; s < kSides; ++s)
        raw_rows[turn][s][0] = four(p.side[s].B, at), raw_rows[turn][s][1] = four(p.side[s].C, at);
    }
  };
  const auto put_rows = [&](int row) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn, row += units) {
      if (row >= f.pieces * kPiece) break;
      const int to = row * kLanes + row / kPiece * kLanes + q;
#pragma unroll
      for (int s = 0; s < kSides; ++s)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          reinterpret_cast<float4*>(rows(s, i))[to] =
              row < p.l ? raw_rows[turn][s][i].floats() : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  };
#pragma unroll
  for (int s = 0; s < kSides; ++s) fetch(raw_dt[s], p.side[s].dt), fetch(raw_x[s], p.side[s].x);
  if (p.aligned)
    fetch_rows(unit, std::true_type());
  else
    fetch_rows(unit, std::false_type());
#pragma unroll
  for (int s = 0; s < kSides; ++s) {
    D[s] = p.side[s].D ? load<float>(p.side[s].D + own) : 0.0f;
    bias[s] = p.side[s].bias ? load<float>(p.side[s].bias + own) : 0.0f;
    raw_A[s] = load<float4>(p.side[s].A + own * int64_t{kStates} + q * kPart);
  }
  if (kGate) fetch(raw_z, p.z);
  // of the edge that this thread will walk first, see below
  const auto start_of = [&](int i) {
    const int side = kSides == 2 && i >= f.channels * kStates ? 1 : 0, edge = i - side * f.channels * kStates;
    const Side& s = p.side[side];
    if (!s.start || i >= kSides * f.channels * kStates || first + edge / kStates >= p.d) return 0.0f;
    return load<float>(s.start + (seq * p.d + first) * kStates + edge);
  };
  const float first_start = start_of(threadIdx.x);

  float W[kSides][kPiece][kPart], A[kSides][kPart], y[kPiece] = {}, skip[kOwn] = {};
#pragma unroll
  for (int s = 0; s < kSides; ++s) {
    float dt[kOwn], u[kOwn];
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      // past the end: decay 1 and input 0 leave the state as it was
      const float x = to_float(raw_x[s][e]);
      dt[e] = at0 + e < p.l ? p.softplus(to_float(raw_dt[s][e]) + bias[s]) : 0.0f;
      u[e] = at0 + e < p.l ? dt[e] * x : 0.0f;
      skip[e] = fmaf(D[s], x, skip[e]);
    }
    reinterpret_cast<float4*>(area(s, unit) + kSteps)[q] = make_float4(dt[0], u[0], dt[1], u[1]);
    A[s][0] = raw_A[s].x * kLog2e, A[s][1] = raw_A[s].y * kLog2e;
    A[s][2] = raw_A[s].z * kLog2e, A[s][3] = raw_A[s].w * kLog2e;
  }
  put_rows(unit);
#pragma unroll 1
  for (int row = unit + kTurns * units; row < f.pieces * kPiece; row += kTurns * units) {
    fetch_rows(row, std::false_type());
    put_rows(row);
  }
  __syncthreads();
  const int from = min(piece, f.pieces - 1) * (kRows / 4);
  const auto at_piece = [&](int s, int which) { return reinterpret_cast<const float4*>(rows(s, which)) + from; };
  walk_piece<kWay == Way::kReverse>(y, W[0], A[0], at_piece(0, 0), at_piece(0, 1), area(0, unit), q);
  if constexpr (kSides == 2) walk_piece<true>(y, W[1], A[1], at_piece(1, 0), at_piece(1, 1), area(1, unit), q);
  __syncthreads();
  // the pieces' edges in walking order: a piece starts from what all before it left
  for (int i = threadIdx.x; i < kSides * f.channels * kStates; i += blockDim.x) {
    const int side = kSides == 2 && i >= f.channels * kStates ? 1 : 0, edge = i - side * f.channels * kStates;
    const bool reverse = kWay == Way::kReverse || side == 1, real = first + edge / kStates < p.d;
    const Side& s = p.side[side];
    const int64_t at = (seq * p.d + first) * kStates + edge;
    const int step = (reverse ? -1 : 1) * f.channels * kUnit;
    float* slot = area(side, (reverse ? f.pieces - 1 : 0) * f.channels + edge / kStates) + edge % kStates;
    float state = i < static_cast<int>(blockDim.x) ? first_start : start_of(i);
    constexpr int kBatch = 5;
    float last[kBatch], product[kBatch];
    const auto read = [&](const float* from, int k) {  // past the last piece: what leaves the state as it was
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        last[j] = k + j < f.pieces ? from[j * step] : 0.0f;
        product[j] = k + j < f.pieces ? from[j * step + kProduct] : 1.0f;
      }
    };
    read(slot, 0);
#pragma unroll 1
    for (int k = 0; k < f.pieces; k += kBatch) {
      float starts[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) starts[j] = state, state = fmaf(product[j], state, last[j]);
      read(slot + kBatch * step, k + kBatch);
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        if (k + j < f.pieces) slot[j * step] = starts[j];
      slot += kBatch * step;
    }
    if (s.final && real) s.final[at] = state;
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSides; ++s) {
    const float4 start = reinterpret_cast<const float4*>(area(s, unit))[q];
#pragma unroll
    for (int t = 0; t < kPiece; ++t) {
      y[t] = fmaf(W[s][t][0], start.x, y[t]), y[t] = fmaf(W[s][t][1], start.y, y[t]);
      y[t] = fmaf(W[s][t][2], start.z, y[t]), y[t] = fmaf(W[s][t][3], start.w, y[t]);
    }
  }
  // four lanes' sums of 8 tokens become one lane's 2
  float four[kPiece / 2], sum[kOwn];
  exchange<2>(four, y, threadIdx.x % 32), exchange<1>(sum, four, threadIdx.x % 32);
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
    const int at = at0 + e;
    if (at >= p.l || !mine) continue;
    sum[e] = (sum[e] + skip[e]) * p.scale;
    if (kGate) sum[e] *= to_float(raw_z[e]) * sigmoid(to_float(raw_z[e]));
    const int64_t to = (seq * p.l + at) * p.d + channel;
    if (p.wide_y)
      static_cast<float*>(p.y)[to] = sum[e];
    else
      static_cast<T*>(p.y)[to] = from_float<T>(sum[e]);
  }
}

int pieces_of(int64_t l) { return static_cast<int>((l + kPiece - 1) / kPiece); }

// Channels of a block: so many that no multiprocessor gets a second block, as far as a block has lanes for them.
int channels_of(int64_t b, int64_t l, int64_t d, int64_t processors) {
  const int64_t most = std::min<int64_t>(kThreads / kLanes / pieces_of(l), d);
  int64_t channels = 1;
  while (channels < most && b * ((d + channels - 1) / channels) > processors) ++channels;
  return static_cast<int>(channels);
}

int units_of(int channels, int pieces) { return (channels * pieces + 7) / 8 * 8; }  // whole warps

size_t shared_bytes(int channels, int pieces, int sides) {
  return sides * (2 * pieces * kRows + units_of(channels, pieces) * kUnit) * sizeof(float);
}

template <class T, Way kWay>
void launch_frame(const FrameParams& f, int64_t blocks, void* stream) {
  const size_t shared = shared_bytes(f.channels, f.pieces, kWay == Way::kBoth ? 2 : 1);
  const auto kernel = f.p.z.p ? scan_frame_kernel<T, kWay, true> : scan_frame_kernel<T, kWay, false>;
  launch("scan_frame", kernel, blocks, units_of(f.channels, f.pieces) * kLanes, shared, stream, f);
}

template <class T>
void launch_frame(const FrameParams& f, const ScanArgs& a, void* stream) {
  const int64_t blocks = a.b * f.p.blocks;
  if (a.directions == 2) return launch_frame<T, Way::kBoth>(f, blocks, stream);
  a.dir[0].reverse ? launch_frame<T, Way::kReverse>(f, blocks, stream)
                   : launch_frame<T, Way::kForward>(f, blocks, stream);
}

}  // namespace

int frame_tokens() { return kMostPieces * kPiece; }

int64_t frame_bytes(int64_t b, int64_t l, int64_t d, int directions, int64_t processors) {
  return static_cast<int64_t>(shared_bytes(channels_of(b, l, d, processors), pieces_of(l), directions));
}

void scan_frame(const ScanArgs& a, int64_t processors, void* stream) {
  if (a.l > frame_tokens())
    throw std::invalid_argument("scan_frame: at most " + std::to_string(frame_tokens()) + " tokens, got " +
                                std::to_string(a.l));
  if (a.directions == 2 && (a.dir[0].reverse || !a.dir[1].reverse))
    throw std::invalid_argument("scan_frame: of two directions the second one is the reverse one");
  FrameParams f{};
  f.pieces = pieces_of(a.l), f.channels = channels_of(a.b, a.l, a.d, processors);
  f.inverse = static_cast<unsigned>((65536 + f.channels - 1) / f.channels), f.one = a.b == 1;
  f.p = params(a, f.channels);
  if (f.p.frames > 0 || f.p.side[0].chunks)
    throw std::invalid_argument("scan_frame: takes no frames and saves no states");
  with_dtype(a.dtype, "scan_frame", [&](auto zero) { launch_frame<decltype(zero)>(f, a, stream); });
}

}  // namespace endomamba::cuda
