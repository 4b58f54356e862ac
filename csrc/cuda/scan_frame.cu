// scan_frame: the forward scan of one or two directions where sequences are few and short, as one frame of a stream.
//
// Grid (b * cdiv(d, 8),), a warp for every kPiece tokens: all tokens of a sequence are walked at the same time.
// Lanes: four for each of 8 channels; lane q has states 4q to 4q + 3 of its channel for the whole piece, and for all
// that
//   is done once a channel (loads, softplus, D, gate, y) the piece's tokens kOwn q to kOwn q + kOwn - 1.
// Carry: a piece is walked from zero, with the product P of its decays kept for every token: y of a token is
//   <C, h> + <C P, state at the piece's start>.  The last h and P of all pieces go to shared memory, one thread for
//   each channel and state walks over them in order, and every warp adds the second term.  No decay is computed twice.
// Two directions are walked one after the other, the second one's operands on their way while the first is walked; a
//   lane's tokens are the same in both, so their sum stays in its registers.
// Bytes: x, dt, z, y once; B and C once for every 8 channels, from L2 after the first.
// Numerics: all in fp32; the sum over states is one of four sums of four.
// Bound: latency.  17 operations of the multi-function unit for each channel and token.
#include "scan_args.cuh"

namespace endomamba::cuda {
namespace {

constexpr int kChannels = 8, kPart = 4;  // channels of a block, states of a lane
constexpr int kEdge = kChannels * kStates;

template <int kPiece>
struct Limits {
  static constexpr int kThreads = kPiece == 8 ? 800 : 512;  // 25 pieces of 8 tokens, 16 of 16
};

// What one lane reads for a piece of one direction, raw.
template <class T, int kPiece>
struct Operands {
  static constexpr int kOwn = kPiece / 4;
  T x[kOwn], dt[kOwn];
  T B[kPiece / 8][kPart], C[kPiece / 8][kPart];  // of tokens lane / 4 + 8 i
};

template <class T, int kPiece, bool kBoth, bool kGate>
__global__ void __launch_bounds__(Limits<kPiece>::kThreads) scan_frame_kernel(const __grid_constant__ Params p) {
  constexpr int kOwn = kPiece / 4, kRows = kPiece / 8;
  float4* const memory = shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pieces = blockDim.x / 32;
  const int q = lane % 4, c = lane / 4;
  const int64_t seq = blockIdx.x / p.blocks;
  const int first = (blockIdx.x % p.blocks) * kChannels, channel = first + c;
  const bool mine = channel < p.d;
  const int own = min(channel, p.d - 1);
  // this warp's B and C, then of every piece its last h (then what it starts from) and its product of decays
  float* const B = reinterpret_cast<float*>(memory) + warp * (2 * kPiece * kStates);
  float* const C = B + kPiece * kStates;
  float* const edges = reinterpret_cast<float*>(memory) + pieces * (2 * kPiece * kStates);
  float* const products = edges + pieces * kEdge;

  // Token t of this piece in the order of the walk; past the end of the sequence: l or more.
  const auto token = [&](int t, bool reverse) { return warp * kPiece + (reverse ? kPiece - 1 - t : t); };
  const auto fetch = [&](Operands<T, kPiece>& o, const Side& s) {
    const T* const x = static_cast<const T*>(s.x.p) + seq * s.x.b + own;
    const T* const dt = static_cast<const T*>(s.dt.p) + seq * s.dt.b + own;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      const int at = token(q * kOwn + e, s.reverse);
      if (at >= p.l) continue;
      o.x[e] = *offset(x, at, s.x.l), o.dt[e] = *offset(dt, at, s.dt.l);
    }
    const T* const Bs = static_cast<const T*>(s.B.p) + seq * s.B.b + static_cast<int64_t>(q * kPart) * s.B.n;
    const T* const Cs = static_cast<const T*>(s.C.p) + seq * s.C.b + static_cast<int64_t>(q * kPart) * s.C.n;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int at = token(c + 8 * r, s.reverse);
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        o.B[r][i] = o.C[r][i] = from_float<T>(0.0f);
        if (at >= p.l) continue;
        o.B[r][i] = offset(Bs, at, s.B.l)[static_cast<int64_t>(i) * s.B.n];
        o.C[r][i] = offset(Cs, at, s.C.l)[static_cast<int64_t>(i) * s.C.n];
      }
    }
  };

  Operands<T, kPiece> next{};
  fetch(next, p.side[0]);
  T zs[kOwn] = {};
  if (kGate) {
    const T* const z = static_cast<const T*>(p.z.p) + seq * p.z.b + own;
#pragma unroll
    for (int e = 0; e < kOwn; ++e)
      if (warp * kPiece + q * kOwn + e < p.l) zs[e] = *offset(z, warp * kPiece + q * kOwn + e, p.z.l);
  }
  float sum[kOwn] = {};
#pragma unroll
  for (int turn = 0; turn < (kBoth ? 2 : 1); ++turn) {
    const Side& s = p.side[turn];
    const bool reverse = s.reverse;
    const float4 A4 = reinterpret_cast<const float4*>(s.A + own * int64_t{kStates})[q];
    const float A[kPart] = {A4.x * kLog2e, A4.y * kLog2e, A4.z * kLog2e, A4.w * kLog2e};
    const float D = s.D ? s.D[own] : 0.0f, bias = s.bias ? s.bias[own] : 0.0f;
    float x[kOwn], dt[kOwn];
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      const bool there = token(q * kOwn + e, reverse) < p.l;
      // past the end: decay 1 and input 0 leave the state as it was
      x[e] = there ? to_float(next.x[e]) : 0.0f;
      dt[e] = there ? p.softplus(to_float(next.dt[e]) + bias) : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int at = (c + 8 * r) * kPart + q;
      reinterpret_cast<float4*>(B)[at] =
          make_float4(to_float(next.B[r][0]), to_float(next.B[r][1]), to_float(next.B[r][2]), to_float(next.B[r][3]));
      reinterpret_cast<float4*>(C)[at] =
          make_float4(to_float(next.C[r][0]), to_float(next.C[r][1]), to_float(next.C[r][2]), to_float(next.C[r][3]));
    }
    __syncwarp();
    if (kBoth && turn == 0) fetch(next, p.side[1]);

    float h[kPart] = {}, P[kPart] = {1.0f, 1.0f, 1.0f, 1.0f}, y[kPiece], W[kPiece][kPart];
#pragma unroll
    for (int t = 0; t < kPiece; ++t) {
      const int owner = lane / 4 * 4 + t / kOwn;
      const float dtt = __shfl_sync(kWarp, dt[t % kOwn], owner);
      const float u = dtt * __shfl_sync(kWarp, x[t % kOwn], owner);
      const float4 b4 = reinterpret_cast<const float4*>(B)[t * kPart + q];
      const float4 c4 = reinterpret_cast<const float4*>(C)[t * kPart + q];
      const float b[kPart] = {b4.x, b4.y, b4.z, b4.w}, cs[kPart] = {c4.x, c4.y, c4.z, c4.w};
      y[t] = 0.0f;
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        const float a = ex2(dtt * A[i]);
        h[i] = fmaf(a, h[i], u * b[i]), P[i] *= a;
        y[t] = fmaf(cs[i], h[i], y[t]), W[t][i] = cs[i] * P[i];
      }
    }
    reinterpret_cast<float4*>(edges)[warp * (kEdge / 4) + lane] = make_float4(h[0], h[1], h[2], h[3]);
    reinterpret_cast<float4*>(products)[warp * (kEdge / 4) + lane] = make_float4(P[0], P[1], P[2], P[3]);
    __syncthreads();
    // the pieces' edges in walking order: piece k starts from what all before it left
    for (int i = threadIdx.x; i < kEdge; i += blockDim.x) {
      const bool real = first + i / kStates < p.d;
      const int64_t at = (seq * p.d + first) * kStates + i;
      float state = s.start && real ? s.start[at] : 0.0f;
#pragma unroll 4
      for (int k = 0; k < pieces; ++k) {
        const int slot = (reverse ? pieces - 1 - k : k) * kEdge + i;
        const float last = edges[slot], product = products[slot];
        edges[slot] = state;
        state = fmaf(product, state, last);
      }
      if (s.final && real) s.final[at] = state;
    }
    __syncthreads();
    const float4 start = reinterpret_cast<const float4*>(edges)[warp * (kEdge / 4) + lane];
#pragma unroll
    for (int t = 0; t < kPiece; ++t)
      y[t] += fmaf(W[t][0], start.x, W[t][1] * start.y) + fmaf(W[t][2], start.z, W[t][3] * start.w);
    // four lanes' sums of kPiece tokens become one lane's kOwn: halves are exchanged twice
    float two[kPiece / 2], one[kOwn];
#pragma unroll
    for (int t = 0; t < kPiece / 2; ++t) {
      const bool upper = q & 2;
      const float given = upper ? y[t] : y[t + kPiece / 2], kept = upper ? y[t + kPiece / 2] : y[t];
      two[t] = kept + __shfl_xor_sync(kWarp, given, 2);
    }
#pragma unroll
    for (int t = 0; t < kOwn; ++t) {
      const bool upper = q & 1;
      const float given = upper ? two[t] : two[t + kOwn], kept = upper ? two[t + kOwn] : two[t];
      one[t] = fmaf(D, x[t], kept + __shfl_xor_sync(kWarp, given, 1));
    }
    // a reverse walk's last tokens are the first ones in memory
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      const float mirrored = __shfl_xor_sync(kWarp, one[kOwn - 1 - e], 3);
      sum[e] += reverse ? mirrored : one[e];
    }
    if (kBoth && turn == 0) __syncthreads();  // the second direction's edges go where these were
  }
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
    const int at = warp * kPiece + q * kOwn + e;
    if (at >= p.l || !mine) continue;
    float y = sum[e] * p.scale;
    if (kGate) y *= to_float(zs[e]) * sigmoid(to_float(zs[e]));
    const int64_t to = (seq * p.l + at) * p.d + channel;
    if (p.wide_y)
      static_cast<float*>(p.y)[to] = y;
    else
      static_cast<T*>(p.y)[to] = from_float<T>(y);
  }
}

template <class T, int kPiece>
void launch_frame(const Params& p, const ScanArgs& a, void* stream) {
  const int pieces = (p.l + kPiece - 1) / kPiece;
  if (pieces * 32 > Limits<kPiece>::kThreads)
    throw std::invalid_argument("scan_frame: at most " + std::to_string(frame_tokens(kPiece)) +
                                " tokens in pieces of " + std::to_string(kPiece) + ", got " + std::to_string(p.l));
  const size_t shared = pieces * (2 * kPiece * kStates + 2 * kEdge) * sizeof(float);
  const bool gate = p.z.p != nullptr;
  const auto kernel =
      a.directions == 2
          ? (gate ? scan_frame_kernel<T, kPiece, true, true> : scan_frame_kernel<T, kPiece, true, false>)
          : (gate ? scan_frame_kernel<T, kPiece, false, true> : scan_frame_kernel<T, kPiece, false, false>);
  launch("scan_frame", kernel, a.b * p.blocks, pieces * 32, shared, stream, p);
}

template <class T>
void launch_frame(const Params& p, const ScanArgs& a, int piece, void* stream) {
  if (piece == 8) return launch_frame<T, 8>(p, a, stream);
  if (piece == 16) return launch_frame<T, 16>(p, a, stream);
  throw std::invalid_argument("scan_frame: pieces have 8 or 16 tokens, got " + std::to_string(piece));
}

}  // namespace

int frame_tokens(int piece) {
  return piece == 8 ? Limits<8>::kThreads / 32 * 8 : piece == 16 ? Limits<16>::kThreads / 32 * 16 : 0;
}

void scan_frame(const ScanArgs& a, int piece, void* stream) {
  const Params p = params(a, kChannels);
  if (p.frames > 0 || p.side[0].chunks) throw std::invalid_argument("scan_frame: takes no frames and saves no states");
  switch (a.dtype) {
    case 0:
      return launch_frame<float>(p, a, piece, stream);
    case 1:
      return launch_frame<__nv_bfloat16>(p, a, piece, stream);
    case 2:
      return launch_frame<__half>(p, a, piece, stream);
  }
  throw std::invalid_argument("scan_frame: dtype must be 0, 1 or 2, got " + std::to_string(a.dtype));
}

}  // namespace endomamba::cuda
