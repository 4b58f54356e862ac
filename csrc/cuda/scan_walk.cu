// scan_walk: the forward scan of one or two directions where there are warps enough, as in training.
//
// Grid (b * cdiv(d, 32),), a warp a direction.  A warp owns 32 channels of one sequence for all l tokens; nothing is
//   shared between blocks.  Two directions start at the two ends; what each finds before they meet waits in fp32
//   (`park`: shared memory, or for long sequences global memory), and what it finds after is added to what the other
//   left, gated and written.  One barrier.
// Lanes: lane c has channel c for all that is done once a channel (softplus, D, gate, y), and half of the states of
//   channels c and c ^ 1, the lower half in even lanes.  So one 16-byte read of B or C from shared memory serves two
//   channels, at three shuffles a token (dt and dt x there, half of <C,h> back).
// Tokens: in tiles of 8 in a warp's own shared memory.  x, dt, z, B and C of the next tile are copied there while one
// is
//   walked (cp.async, as wide as their alignment allows); B and C are spread to fp32 before their tile.
// Bytes: x, dt, z read once a direction, y written once; B and C once for every 32 channels, from L2 after the first;
//   a parked token 4 bytes out and in.  States every 64 tokens where a backward will need them.
// Numerics: all in fp32; A times log2(e), so a decay is one ex2; y is the sum of the two halves, then D x.
// Bound: 18 of the multi-function unit's operations for each channel and token (16 decays, softplus and gate 1 or 2).
#include "scan_args.cuh"

namespace endomamba::cuda {
namespace {

#ifndef ENDOMAMBA_WARPS
#define ENDOMAMBA_WARPS 24
#endif
#ifndef ENDOMAMBA_UNROLL
#define ENDOMAMBA_UNROLL 4
#endif
constexpr int kWarps = ENDOMAMBA_WARPS, kUnroll = ENDOMAMBA_UNROLL;
constexpr int kTile = 8, kHalf = kStates / 2, kChannels = 32;
constexpr size_t kParkLimit = 16 * 1024;  // more would leave a multiprocessor too few warps

// A warp's shared memory.
template <class T>
struct Shared {
  struct Tile {
    T x[kTile][kChannels], dt[kTile][kChannels], z[kTile][kChannels];
    T B[kTile][kStates], C[kTile][kStates];
  } tile[2];
  float B[kTile][kStates], C[kTile][kStates];
};

struct Half {
  float v[kHalf];

  __device__ __forceinline__ void load(const float* p) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  }
  __device__ __forceinline__ void store(float* p) const {
    reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
  }
};

// One token of one channel's half: h = exp2(dt A) h + u B, and its part of <C,h>.
__device__ __forceinline__ float advance(Half& h, const Half& A, float dt, float u, const Half& b, const Half& c) {
  float y = 0.0f;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    h.v[i] = fmaf(ex2(dt * A.v[i]), h.v[i], u * b.v[i]);
    y = fmaf(c.v[i], h.v[i], y);
  }
  return y;
}

// Starts the copies of `count` tokens' rows of kRow elements from column `first` on, of which `valid` are there.
template <int kBytes, int kRow, class T, class W>
__device__ __forceinline__ void copy_rows(T (*to)[kRow], const Tensor& t, const T* from, int valid, const W& walk,
                                          int kb, int count, int lane) {
  constexpr int kEach = kBytes / sizeof(T), kPieces = kRow / kEach;
#pragma unroll
  for (int i = 0; i < kTile * kPieces; i += 32) {
    const int row = (i + lane) / kPieces, column = (i + lane) % kPieces * kEach;
    const int bytes = min(max(valid - column, 0) * static_cast<int>(sizeof(T)), kBytes);
    if (row < count && (kTile * kPieces % 32 == 0 || i + lane < kTile * kPieces) && bytes > 0)
      copy_async<kBytes>(&to[row][column], offset(from + column, walk(kb + row), t.l), bytes);
  }
}

// As wide as the rows allow.  Of rows of channels the middle width is left out, it would only be code.
template <int kRow, class T, class W>
__device__ __forceinline__ void fetch_rows(T (*to)[kRow], const Tensor& t, const T* from, int valid, const W& walk,
                                           int kb, int count, int lane) {
  if (t.width == 16) return copy_rows<16>(to, t, from, valid, walk, kb, count, lane);
  if (kRow == kStates && t.width == 8) return copy_rows<8>(to, t, from, valid, walk, kb, count, lane);
#pragma unroll 1
  for (int i = lane; i < count * kRow; i += 32)
    if (i % kRow < valid)
      to[i / kRow][i % kRow] = *offset(from + static_cast<int64_t>(i % kRow) * t.n, walk(kb + i / kRow), t.l);
}

// Rows of a tile to a contiguous (l, d) output, 16 bytes a lane where `wide`: d and `to` allow it.
template <class T, class W>
__device__ __forceinline__ void store_rows(T* to, int d, bool wide, const T (*from)[kChannels], int valid,
                                           const W& walk, int kb, int count, int lane) {
  constexpr int kEach = 16 / sizeof(T), kPieces = kChannels / kEach;
  const int row_bytes = d * static_cast<int>(sizeof(T));
  if (wide) {
#pragma unroll
    for (int i = 0; i < kTile * kPieces; i += 32) {
      const int row = (i + lane) / kPieces, column = (i + lane) % kPieces * kEach;
      if (row < count && column < valid)
        *reinterpret_cast<float4*>(offset(to + column, walk(kb + row), row_bytes)) =
            *reinterpret_cast<const float4*>(&from[row][column]);
    }
    return;
  }
  if (lane >= valid) return;
#pragma unroll 1
  for (int row = 0; row < count; ++row) *offset(to + lane, walk(kb + row), row_bytes) = from[row][lane];
}

template <class T, bool kBoth, bool kGate, bool kTime>
__global__ void __launch_bounds__(kBoth ? 64 : 32, kBoth ? kWarps / 2 : kWarps)
    scan_walk_kernel(const __grid_constant__ Params p) {
  float4* const memory = shared_memory();
  const int lane = threadIdx.x % 32;
  const int warp = kBoth ? __shfl_sync(kWarp, static_cast<int>(threadIdx.x / 32), 0) : 0;  // the same in all lanes
  const Side& s = p.side[warp];
  Shared<T>& mem = reinterpret_cast<Shared<T>*>(memory)[warp];
  const int64_t seq = blockIdx.x / p.blocks;
  const int first = (blockIdx.x % p.blocks) * kChannels, channel = first + lane;
  const int valid = min(p.d - first, kChannels);
  const bool mine = lane < valid, others = (lane ^ 1) < valid;
  const int own = min(channel, p.d - 1), other = min(channel ^ 1, p.d - 1);  // past the last: read it again, write none
  const int half = lane % 2 * kHalf;
  const Walk<kTime> walk(p.l, p.frames, s.reverse);
  // steps whose y waits for the other direction: forward those below the middle, backward those from it on
  const int parks = !kBoth ? 0 : s.reverse ? p.l - p.l / 2 : p.l / 2;

  const T* const x = static_cast<const T*>(s.x.p) + seq * s.x.b + first;
  const T* const dt = static_cast<const T*>(s.dt.p) + seq * s.dt.b + first;
  const T* const z = static_cast<const T*>(p.z.p) + (kGate ? seq * p.z.b + first : 0);
  const T* const B = static_cast<const T*>(s.B.p) + seq * s.B.b;
  const T* const C = static_cast<const T*>(s.C.p) + seq * s.C.b;
  const int64_t out = seq * p.l * p.d + channel;
  float* const park =
      p.shared_park ? reinterpret_cast<float*>(reinterpret_cast<Shared<T>*>(memory) + 2) + lane : p.park + out;
  const int park_l = p.shared_park ? 128 : p.d * 4;

  // A tile ends before the next multiple of kTile, and where parking ends.
  const auto end_of = [&](int kb) {
    const int stop = min((kb | (kTile - 1)) + 1, p.l);
    return kBoth && kb < parks ? min(stop, parks) : stop;
  };
  const auto fetch = [&](typename Shared<T>::Tile& to, int kb) {
    const int count = end_of(kb) - kb;
    fetch_rows(to.x, s.x, x, valid, walk, kb, count, lane);
    fetch_rows(to.dt, s.dt, dt, valid, walk, kb, count, lane);
    if (kGate && (!kBoth || kb >= parks)) fetch_rows(to.z, p.z, z, valid, walk, kb, count, lane);
    fetch_rows(to.B, s.B, B, kStates, walk, kb, count, lane);
    fetch_rows(to.C, s.C, C, kStates, walk, kb, count, lane);
    copy_group();
  };
  const int64_t edge = (seq * p.d + own) * kStates + half, other_edge = (seq * p.d + other) * kStates + half;
  Half A, A2, h, h2;
  A.load(s.A + own * int64_t{kStates} + half);
  A2.load(s.A + other * int64_t{kStates} + half);
#pragma unroll
  for (int i = 0; i < kHalf; ++i) A.v[i] *= kLog2e, A2.v[i] *= kLog2e, h.v[i] = h2.v[i] = 0.0f;
  if (s.start) h.load(s.start + edge), h2.load(s.start + other_edge);
  const float D = s.D ? s.D[own] : 0.0f, bias = s.bias ? s.bias[own] : 0.0f;
  const Softplus softplus(p.softplus);

  int64_t chunk = seq * ((p.l + kChunk - 1) / kChunk);
  const auto walk_tile = [&](typename Shared<T>::Tile& tile, int kb, int stop) {
    if (kBoth && kb == parks) __syncthreads();
    if (s.chunks && kb % kChunk == 0) {
      float* const to = s.chunks + chunk++ * p.d * kStates + half;
      if (mine) h.store(to + own * int64_t{kStates});
      if (others) h2.store(to + other * int64_t{kStates});
    }
#pragma unroll
    for (int i = 0; i < kTile * kStates; i += 128) {
      const int at = i + lane * 4;
      const T *b = &tile.B[0][0] + at, *c = &tile.C[0][0] + at;
      reinterpret_cast<float4*>(&mem.B[0][0] + at)[0] =
          make_float4(to_float(b[0]), to_float(b[1]), to_float(b[2]), to_float(b[3]));
      reinterpret_cast<float4*>(&mem.C[0][0] + at)[0] =
          make_float4(to_float(c[0]), to_float(c[1]), to_float(c[2]), to_float(c[3]));
    }
    __syncwarp();
#pragma unroll kUnroll
    for (int j = 0; j < kTile; ++j) {
      if (kb + j >= stop) break;
      const float xj = to_float(tile.x[j][lane]), dtj = softplus(to_float(tile.dt[j][lane]) + bias), u = dtj * xj;
      const float dt2 = __shfl_xor_sync(kWarp, dtj, 1), u2 = __shfl_xor_sync(kWarp, u, 1);
      Half b, c;
      b.load(&mem.B[j][half]), c.load(&mem.C[j][half]);
      const float y2 = advance(h2, A2, dt2, u2, b, c);
      float y = fmaf(D, xj, advance(h, A, dtj, u, b, c)) + __shfl_xor_sync(kWarp, y2, 1);
      const int token = walk(kb + j);
      if (kBoth && kb < parks) {
        if (mine) *offset(park, token, park_l) = y;
        continue;
      }
      if (kBoth && mine) y += *offset(park, token, park_l);
      y *= p.scale;
      if (kGate) {
        const float zj = to_float(tile.z[j][lane]);
        y *= zj * sigmoid(zj);
      }
      if (sizeof(T) < 4 && p.wide_y) {
        if (mine) static_cast<float*>(p.y)[out + static_cast<int64_t>(token) * p.d] = y;
      } else {
        tile.x[j][lane] = from_float<T>(y);
      }
    }
    if ((sizeof(T) < 4 && p.wide_y) || (kBoth && kb < parks)) return;
    __syncwarp();
    store_rows(static_cast<T*>(p.y) + (out - lane), p.d, p.wide_stores, tile.x, valid, walk, kb, stop - kb, lane);
  };
  int kb = 0, stop = 0;  // the tile that is walked while the next one comes; at first there is none
  for (int which = 1;; which ^= 1) {
    if (stop < p.l) {
      fetch(mem.tile[which ^ 1], stop);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    if (kb < stop) {
      __syncwarp();
      walk_tile(mem.tile[which], kb, stop);
      __syncwarp();  // the next rows go where these were
    }
    if (stop == p.l) break;
    kb = stop, stop = end_of(stop);
  }
  if (kBoth && parks == p.l) __syncthreads();  // one token: the other direction has nothing to park
  if (s.final) {
    if (mine) h.store(s.final + edge);
    if (others) h2.store(s.final + other_edge);
  }
}

size_t park_bytes(int64_t l) { return l * kChannels * sizeof(float); }

template <class T, bool kTime>
void launch_walk(const Params& p, bool both, int64_t b, void* stream) {
  const size_t shared = sizeof(Shared<T>) * (both ? 2 : 1) + (both && p.shared_park ? park_bytes(p.l) : 0);
  const bool gate = p.z.p != nullptr;
  const auto kernel = both
                          ? (gate ? scan_walk_kernel<T, true, true, kTime> : scan_walk_kernel<T, true, false, kTime>)
                          : (gate ? scan_walk_kernel<T, false, true, kTime> : scan_walk_kernel<T, false, false, kTime>);
  launch("scan_walk", kernel, b * p.blocks, both ? 64 : 32, shared, stream, p);
}

template <class T>
void launch_walk(const Params& p, const ScanArgs& a, void* stream) {
  p.frames > 0 ? launch_walk<T, true>(p, a.directions == 2, a.b, stream)
               : launch_walk<T, false>(p, a.directions == 2, a.b, stream);
}

}  // namespace

bool walk_shared(int64_t l) { return park_bytes(l) <= kParkLimit; }

void scan_walk(const ScanArgs& a, float* park, void* stream) {
  Params p = params(a, kChannels);
  p.park = park, p.shared_park = park == nullptr;
  if (a.directions == 2 && !park && !walk_shared(a.l))
    throw std::invalid_argument("scan_walk: " + std::to_string(a.l) + " tokens need memory to park them");
  switch (a.dtype) {
    case 0:
      return launch_walk<float>(p, a, stream);
    case 1:
      return launch_walk<__nv_bfloat16>(p, a, stream);
    case 2:
      return launch_walk<__half>(p, a, stream);
  }
  throw std::invalid_argument("scan_walk: dtype must be 0, 1 or 2, got " + std::to_string(a.dtype));
}

}  // namespace endomamba::cuda
