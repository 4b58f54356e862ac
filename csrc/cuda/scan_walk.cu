// scan_walk: the forward scan of one or two directions where there are warps enough, as in training.
//
// Grid (b * cdiv(d, 16),), a warp a direction.  A warp owns 16 channels of one sequence for all l tokens; nothing is
//   shared between blocks.  Two directions start at the two ends; what each finds before they meet waits in fp32
//   (`park`: shared memory, or for long sequences global memory), and what it finds after is added to what the other
//   left, gated and written.  One barrier.
// Lanes walk: lane 16 q + c has half q of the states of channel c.  Four tokens a turn, without a branch between them.
// Lanes own: what is done once a channel and token (loads, softplus, D, gate, y) is done for two neighbouring channels
//   of one token, 2 (c / 2) and the next, token 2 q + c % 2 of the four: 16-bit values travel in one word.  dt and dt x
//   go from owner to walker through shared memory, sums over states back by three shuffles.
// B and C of the four tokens lie in shared memory in fp32, brought four elements a lane.  The loads of the next four
//   tokens are under way while four are walked.
// Bytes: x, dt, z read once a direction, y written once; B and C once for every 16 channels, from L2 after the first; a
//   parked token 4 bytes out and in.  States every 64 tokens where a backward will need them.
// Numerics: all in fp32; A times log2(e), so a decay is one ex2; y is the sum of two halves, then D x.  A token past
// the
//   end has dt = 0 and leaves the state as it was.
// Bound: 18 of the multi-function unit's operations for each channel and token (16 decays, softplus and gate 1 or 2).
#include "scan_args.cuh"

namespace endomamba::cuda {
namespace {

#ifndef ENDOMAMBA_WARPS
#define ENDOMAMBA_WARPS 20
#endif
constexpr int kWarps = ENDOMAMBA_WARPS;  // of a multiprocessor that registers must leave room for
constexpr int kGroup = 4, kChannels = 16, kHalf = kStates / 2;
constexpr size_t kParkLimit = 16 * 1024;  // more would leave a multiprocessor too few warps

// A warp's shared memory.
struct Shared {
  float4 rows[kGroup][2][4];  // B and C of a token
  float4 steps[kGroup / 2][kChannels];  // dt, dt x of two tokens
};

template <class T, bool kBoth, bool kTime, bool kAligned>
__global__ void __launch_bounds__(kBoth ? 64 : 32, kBoth ? kWarps / 2 : kWarps)
    scan_walk_kernel(const __grid_constant__ Params p) {
  char* const memory = reinterpret_cast<char*>(shared_memory());
  const int lane = keep(threadIdx.x % 32);
  const int warp = kBoth ? __shfl_sync(kWarp, static_cast<int>(threadIdx.x / 32), 0) : 0;  // the same in all lanes
  const int c = lane % kChannels, q = lane / kChannels;
  const Side& s = p.side[warp];
  const int64_t seq = blockIdx.x / p.blocks;
  const int first = (blockIdx.x % p.blocks) * kChannels;
  const int l = p.l, d = p.d;
  const int walked = min(first + c, d - 1);  // past the last channel: read it again, write none
  const int own = first + c / 2 * 2, turn = 2 * q + c % 2;
  const bool mine = own < d, second = own + 1 < d;
  const int from = min(own, kAligned ? d - 2 : d - 1), next = min(own + 1, d - 1) - from;
  const Walk<kTime> walk(l, p.frames, s.reverse);
  // steps whose y waits for the other direction: forward those below the middle, backward those from it on
  const int parks = !kBoth ? 0 : s.reverse ? l - l / 2 : l / 2;
  const bool gate = p.z.p != nullptr;

  const T* const x = keep(static_cast<const T*>(s.x.p) + seq * s.x.b + from);
  const T* const dt = keep(static_cast<const T*>(s.dt.p) + seq * s.dt.b + from);
  const T* const z = keep(static_cast<const T*>(p.z.p) + (gate ? seq * p.z.b + from : 0));
  const Tensor& matrix = lane & 4 ? s.C : s.B;
  const int row_n = matrix.n, row_l = keep(matrix.l);
  const T* const row =
      keep(static_cast<const T*>(matrix.p) + seq * matrix.b + static_cast<int64_t>(lane % 4 * 4) * row_n);
  const int y_size = p.wide_y ? 4 : static_cast<int>(sizeof(T)), y_l = d * y_size;
  char* const y_out = keep(static_cast<char*>(p.y) + (seq * l * d + own) * y_size);
  float* const park = keep(p.shared_park ? reinterpret_cast<float*>(memory + 2 * sizeof(Shared)) + c / 2 * 2
                                         : p.park + seq * l * d + own);
  const int park_l = keep(4 * (p.shared_park ? kChannels : d));

  // offsets in shared memory: where a lane puts its row and its steps, where it finds its channel's
  const int at = warp * static_cast<int>(sizeof(Shared)), steps = at + static_cast<int>(sizeof(Shared::rows));
  const int put_row = at + lane * 16, get_row = at + q * 32;
  const int put_step = steps + q * (kChannels * 16) + c / 2 * 32 + c % 2 * 8, get_step = steps + c * 16;

  Two<T> raw_x, raw_dt, raw_z{};
  Four<T> raw_row;
  const auto fetch = [&](int kb) {
    const int token = walk(min(kb + turn, l - 1));
    raw_x = load_two<kAligned>(offset(x, token, s.x.l), next);
    raw_dt = load_two<kAligned>(offset(dt, token, s.dt.l), next);
    if (gate && (!kBoth || kb + kGroup > parks)) raw_z = load_two<kAligned>(offset(z, token, p.z.l), next);
    raw_row = load_four<kAligned>(offset(row, walk(min(kb + lane / 8, l - 1)), row_l), row_n);
  };

  const int64_t edge = walked * int64_t{kStates} + q * kHalf;
  float A[kHalf], h[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) A[i] = kLog2e * s.A[edge + i];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) h[i] = s.start ? s.start[seq * d * kStates + edge + i] : 0.0f;
  const auto save = [&](float* to) {
    if (first + c >= d) return;
    reinterpret_cast<float4*>(to + edge)[0] = make_float4(h[0], h[1], h[2], h[3]);
    reinterpret_cast<float4*>(to + edge)[1] = make_float4(h[4], h[5], h[6], h[7]);
  };
  const float D0 = s.D ? s.D[from] : 0.0f, D1 = s.D ? s.D[from + next] : 0.0f;
  const float bias0 = s.bias ? s.bias[from] : 0.0f, bias1 = s.bias ? s.bias[from + next] : 0.0f;

  float* chunk = s.chunks + seq * ((l + kChunk - 1) / kChunk) * d * kStates;
  const bool chunks = s.chunks != nullptr;
  fetch(0);
#pragma unroll 1
  for (int kb = 0; kb < l; kb += kGroup) {
    if (chunks && kb % kChunk == 0) save(chunk), chunk += static_cast<int64_t>(d) * kStates;
    const Two<T> own_x = raw_x, own_z = raw_z;
    const int k = kb + turn;
    const bool live = k < l;
    const float x0 = own_x.template at<0>(), x1 = own_x.template at<1>();
    const float dt0 = p.softplus(live ? raw_dt.template at<0>() + bias0 : p.softplus.zero);
    const float dt1 = p.softplus(live ? raw_dt.template at<1>() + bias1 : p.softplus.zero);
    __syncwarp();  // all have read what lies there
    *reinterpret_cast<float2*>(memory + put_step) = make_float2(dt0, dt0 * x0);
    *reinterpret_cast<float2*>(memory + put_step + 16) = make_float2(dt1, dt1 * x1);
    *reinterpret_cast<float4*>(memory + put_row) = raw_row.floats();
    __syncwarp();
    fetch(kb + kGroup);

    float y[kGroup];
#pragma unroll
    for (int t = 0; t < kGroup; t += 2) {
      const float4 step = *reinterpret_cast<const float4*>(memory + get_step + t / 2 * (kChannels * 16));
      const char* const both = memory + get_row + t * 128;
      y[t] = advance(h, A, step.x, step.y, both), y[t + 1] = advance(h, A, step.z, step.w, both + 128);
    }
    const float2 sum = own_sums(y, q, c % 2);
    float y0 = fmaf(D0, x0, sum.x), y1 = fmaf(D1, x1, sum.y);

    const int token = walk(k);
    float* const parked = offset(park, token, park_l);
    if (kBoth && k < parks && mine) {
      if (kAligned) *reinterpret_cast<float2*>(parked) = make_float2(y0, y1);
      if (!kAligned) parked[0] = y0;
      if (!kAligned && second) parked[1] = y1;
    }
    if (kBoth && kb + kGroup <= parks) continue;
    if (kBoth && kb <= parks) __syncthreads();  // the two directions meet here
    if (kBoth && k >= parks && live && mine) {
      const float2 other =
          kAligned ? *reinterpret_cast<float2*>(parked) : make_float2(parked[0], second ? parked[1] : 0);
      y0 += other.x, y1 += other.y;
    }
    y0 *= p.scale, y1 *= p.scale;
    if (gate) {
      const float z0 = own_z.template at<0>(), z1 = own_z.template at<1>();
      y0 *= z0 * sigmoid(z0), y1 *= z1 * sigmoid(z1);
    }
    char* const to = offset(y_out, token, y_l);
    if (k < parks || !live || !mine) continue;
    if (sizeof(T) == 4 || p.wide_y)
      store_two<kAligned>(reinterpret_cast<float*>(to), y0, y1, second);
    else
      store_two<kAligned>(reinterpret_cast<T*>(to), y0, y1, second);
  }
  if (s.final) save(s.final + seq * d * kStates);
}

size_t park_bytes(int64_t l) { return l * kChannels * sizeof(float); }

template <class T, bool kAligned>
void launch_walk(const Params& p, const ScanArgs& a, void* stream) {
  const bool both = a.directions == 2, time = a.frames > 0;
  const size_t shared = sizeof(Shared) * (both ? 2 : 1) + (both && p.shared_park ? park_bytes(p.l) : 0);
  const auto kernel =
      both ? (time ? scan_walk_kernel<T, true, true, kAligned> : scan_walk_kernel<T, true, false, kAligned>)
           : (time ? scan_walk_kernel<T, false, true, kAligned> : scan_walk_kernel<T, false, false, kAligned>);
  launch("scan_walk", kernel, a.b * p.blocks, both ? 64 : 32, shared, stream, p);
}

template <class T>
void launch_walk(const Params& p, const ScanArgs& a, void* stream) {
  p.aligned ? launch_walk<T, true>(p, a, stream) : launch_walk<T, false>(p, a, stream);
}

}  // namespace

bool walk_shared(int64_t l) { return park_bytes(l) <= kParkLimit; }

void scan_walk(const ScanArgs& a, float* park, void* stream) {
  Params p = params(a, kChannels);
  p.park = park, p.shared_park = park == nullptr;
  if (a.directions == 2 && !park && !walk_shared(a.l))
    throw std::invalid_argument("scan_walk: " + std::to_string(a.l) + " tokens need memory to park them");
  with_dtype(a.dtype, "scan_walk", [&](auto zero) { launch_walk<decltype(zero)>(p, a, stream); });
}

}  // namespace endomamba::cuda
