// scan_back: the backward scan of one direction; scan_sums adds what its blocks leave of dB and dC.
//
// Grid (workers * cdiv(d, 32),), two warps of 16 channels each.  A worker takes every workers-th sequence, so dA, dD
// and
//   ddt_bias stay in registers over all of them: one partial sum a worker.
// Lanes walk and own as in scan_walk, four tokens at a time.
// Two directions are two launches: the first leaves its y before the gate in `park`, the second adds it for dz.
// A chunk of 64 tokens, the last one first:
//   (1) from its saved state forward, the states before every four tokens to `scratch`, which stays in L2;
//   then four tokens at a time, the last ones first, the inputs of the four before under way:
//   (2) forward: each token's decays and the states before it to shared memory; y; dC = sum of ds h;
//   (3) backward: g = dh + ds C is the gradient of the state; dB = sum of g dt x, dx = dt <g, B> + D ds,
//       dh = decay g, ddt = <dh h, A> + x <g, B>, dA = sum of dh h dt.
// Sums over channels (dB, dC): see lane_sum, the block's two warps added in shared memory, 128 bytes a
// token
//   and block to `sums`.  No atomics: the same call gives the same bits.
// Bytes: x, dt, B twice, z, dy, C once; dx, ddt, dz once; 4 bytes a channel and token to scratch and back, likewise
//   for a first direction's y.
// Numerics: fp32; of a 16-bit call the sums over channels are of values cut to 11 bits, without bias (kCut).
// Bound: issue slots.
#include "scan_args.cuh"

namespace endomamba::cuda {
namespace {

#ifndef ENDOMAMBA_BACK_WARPS
#define ENDOMAMBA_BACK_WARPS 12
#endif
constexpr int kGroup = 4, kChannels = 16, kHalf = kStates / 2, kWarps = 2;
constexpr int kGroups = kChunk / kGroup;
constexpr int kSums = 2 * kGroup * kStates;  // dB and dC of four tokens
static_assert(32 * kWarps == kGroup * kStates);

// What one worker leaves in `parts`: dA (d,16), dD (d,), ddt_bias (d,), then up to the next 16 bytes nothing.
__host__ __device__ constexpr int64_t part_size(int64_t d) { return (d * (kStates + 2) + 3) / 4 * 4; }

struct BackParams {
  Side side;
  Tensor z, dy, dz;
  const float* dfinal;
  void *dx, *ddt, *y;  // y: null, or the gated output again
  float *dstart, *parked, *scratch, *sums, *parts;
  int l, d, blocks, workers, frames;
  int64_t b;
  float scale;
  Softplus softplus;
  bool smooth, wide_dy, aligned;  // softplus is on; dy in fp32
  bool parks, adds;               // this direction's y goes to `parked`, or is added to what lies there
};

struct Shared {
  float4 rows[kGroup][2][4];
  float4 steps[kGroup / 2][kChannels];
  float2 slopes[kGroup / 2][kChannels];  // ds of two tokens
  float4 kept[kGroup][4][32];  // decays of a token, and the states before it
  float sums[2][kSums];
};

template <class T, bool kTime, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps, ENDOMAMBA_BACK_WARPS / kWarps)
    scan_back_kernel(const __grid_constant__ BackParams p) {
  constexpr bool kExact = sizeof(T) == 4;
  constexpr float kGiven = kExact ? 1.0f : kCut;
  char* const memory = reinterpret_cast<char*>(shared_memory());
  const int thread = keep(threadIdx.x), lane = thread % 32;
  const int warp = __shfl_sync(kWarp, static_cast<int>(threadIdx.x / 32), 0);
  const int c = lane % kChannels, q = lane / kChannels;
  const Side& s = p.side;
  const int block = blockIdx.x % p.blocks, worker = blockIdx.x / p.blocks;
  const int first = (block * kWarps + warp) * kChannels, l = p.l, d = p.d;
  const bool walks = first + c < d;
  const int walked = min(first + c, d - 1), own = first + c / 2 * 2, turn = 2 * q + c % 2;
  const bool mine = own < d, second = kAligned ? mine : own + 1 < d;
  const int from = min(own, kAligned ? d - 2 : d - 1), next = min(own + 1, d - 1) - from;
  const Walk<kTime> walk(l, p.frames, s.reverse);
  const bool gate = p.z.p != nullptr;
  const Tensor& matrix = lane & 4 ? s.C : s.B;
  const int row_n = matrix.n, row_l = keep(matrix.l);
  const int out_l = d * static_cast<int>(sizeof(T));

  const int at = warp * static_cast<int>(sizeof(Shared)), steps = at + static_cast<int>(sizeof(Shared::rows));
  const int slopes = steps + static_cast<int>(sizeof(Shared::steps));
  const int put_row = at + lane * 16, get_row = at + q * 32;
  const int put_step = steps + q * (kChannels * 16) + c / 2 * 32 + c % 2 * 8, get_step = steps + c * 16;
  const int put_slope = slopes + q * (kChannels * 8) + c / 2 * 16 + c % 2 * 4, get_slope = slopes + c * 8;
  const int kept = slopes + static_cast<int>(sizeof(Shared::slopes)) + lane * 16;
  constexpr int kToSums = sizeof(Shared) - sizeof(Shared::sums);
  const int put_sum = at + kToSums + (summed(lane) / 8 * kStates + q * kHalf + summed(lane) % 8) * 4;

  const int get_sum = kToSums + thread * 4;

  const int64_t edge = walked * int64_t{kStates} + q * kHalf;
  float A[kHalf], dA[kHalf] = {}, ones[8];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) A[i] = kLog2e * s.A[edge + i], ones[i] = lane / 4 == i ? 1.0f : 0.0f;
  const float D0 = s.D ? s.D[from] : 0.0f, D1 = s.D ? s.D[from + next] : 0.0f;
  const float bias0 = s.bias ? s.bias[from] : 0.0f, bias1 = s.bias ? s.bias[from + next] : 0.0f;
  float2 dD = {0.0f, 0.0f}, dbias = {0.0f, 0.0f};
  float* const scratch =
      keep(p.scratch + (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * (kGroups * 32 * kHalf) + lane * kHalf);
  const auto save = [&](float* to, const float(&v)[kHalf]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
  };
  const auto restore = [&](float(&v)[kHalf], const float* at, int apart = 4) {
    const float4 a = *reinterpret_cast<const float4*>(at), b = *reinterpret_cast<const float4*>(at + apart);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  };
  int buffer = 0;

#pragma unroll 1
  for (int64_t seq = worker; seq < p.b; seq += p.workers) {
    const T* const x = keep(static_cast<const T*>(s.x.p) + seq * s.x.b + from);
    const T* const dt = keep(static_cast<const T*>(s.dt.p) + seq * s.dt.b + from);
    const T* const row =
        keep(static_cast<const T*>(matrix.p) + seq * matrix.b + static_cast<int64_t>(lane % 4 * 4) * row_n);
    const int64_t out = seq * l * d + from;  // from is own in lanes that store
    const char* const dy =
        keep(static_cast<const char*>(p.dy.p) + (seq * p.dy.b + from) * (p.wide_dy ? 4 : static_cast<int>(sizeof(T))));
    const T* const z = keep(static_cast<const T*>(p.z.p) + (gate ? seq * p.z.b + from : 0));
    T* const dz = keep(static_cast<T*>(const_cast<void*>(p.dz.p)) + (gate ? seq * p.dz.b + from : 0));
    float* const parked = keep(p.parked + out);
    T* const dx = keep(static_cast<T*>(p.dx) + out);
    T* const ddt = keep(static_cast<T*>(p.ddt) + out);
    float* const sums = keep(p.sums + (seq * l * p.blocks + block) * (2 * kStates) + lane % kStates);
    Two<T> raw_x, raw_dt, raw_z{}, raw_dy{};
    Four<T> raw_row;
    Two<float> raw_wide{}, raw_before{};
    const auto fetch_steps = [&](int kb) {
      const int token = walk(min(kb + turn, l - 1));
      raw_x = load_two<kAligned>(offset(x, token, s.x.l), next);
      raw_dt = load_two<kAligned>(offset(dt, token, s.dt.l), next);
      raw_row = load_four<kAligned>(offset(row, walk(min(kb + lane / 8, l - 1)), row_l), row_n);
    };
    const auto fetch_slopes = [&](int kb) {
      const int token = walk(min(kb + turn, l - 1));
      if (!kAligned && sizeof(T) < 4 && p.wide_dy)
        raw_wide = load_two<kAligned>(reinterpret_cast<const float*>(offset(dy, token, p.dy.l)), next);
      else
        raw_dy = load_two<kAligned>(reinterpret_cast<const T*>(offset(dy, token, p.dy.l)), next);
      if (gate) raw_z = load_two<kAligned>(offset(z, token, p.z.l), next);
      if (p.adds) raw_before = load_two<kAligned>(offset(static_cast<const float*>(parked), token, d * 4), next);
    };
    float dh[kHalf] = {}, h[kHalf];
    if (p.dfinal && walks) restore(dh, p.dfinal + seq * d * kStates + edge);
#pragma unroll 1
    for (int chunk = (l - 1) / kChunk; chunk >= 0; --chunk) {
      const int k0 = chunk * static_cast<int>(kChunk);
      const int groups = (min(l - k0, static_cast<int>(kChunk)) + kGroup - 1) / kGroup;
      restore(h, s.chunks + (seq * ((l + kChunk - 1) / kChunk) + chunk) * d * kStates + edge);
      fetch_steps(k0);
      fetch_slopes(k0 + (groups - 1) * kGroup);
#pragma unroll 1
      for (int group = 0; group < groups - 1; ++group) {  // (1); all tokens of these are there
        save(scratch + group * (32 * kHalf), h);
        const float dt0 = p.softplus(raw_dt.template at<0>() + bias0),
                    dt1 = p.softplus(raw_dt.template at<1>() + bias1);
        __syncwarp();
        *reinterpret_cast<float2*>(memory + put_step) = make_float2(dt0, dt0 * raw_x.template at<0>());
        *reinterpret_cast<float2*>(memory + put_step + 16) = make_float2(dt1, dt1 * raw_x.template at<1>());
        *reinterpret_cast<float4*>(memory + put_row) = raw_row.floats();
        __syncwarp();
        fetch_steps(k0 + (group + 1) * kGroup);
#pragma unroll
        for (int t = 0; t < kGroup; t += 2) {
          const float4 step = *reinterpret_cast<const float4*>(memory + get_step + t / 2 * (kChannels * 16));
          advance(h, A, step.x, step.y, memory + get_row + t * 128);
          advance(h, A, step.z, step.w, memory + get_row + t * 128 + 128);
        }
      }
#pragma unroll 1
      for (int group = groups - 1; group >= 0; --group) {
        const int kb = k0 + group * kGroup, k = kb + turn;
        const bool live = k < l && mine, both = kAligned ? live : live && second;
        // past the end of tokens or channels: dt and ds are 0, x is some element of the same channel
        const float x0 = raw_x.template at<0>(), x1 = raw_x.template at<1>();
        const float v0 = live ? raw_dt.template at<0>() + bias0 : p.softplus.zero;
        const float v1 = both ? raw_dt.template at<1>() + bias1 : p.softplus.zero;
        const float dt0 = p.softplus(v0), dt1 = p.softplus(v1);
        const bool wide = !kAligned && sizeof(T) < 4 && p.wide_dy;
        const float dy0 = live ? p.scale * (wide ? raw_wide.at<0>() : raw_dy.template at<0>()) : 0.0f;
        const float dy1 = both ? p.scale * (wide ? raw_wide.at<1>() : raw_dy.template at<1>()) : 0.0f;
        const float z0 = raw_z.template at<0>(), z1 = raw_z.template at<1>();
        const float sig0 = sigmoid(z0), sig1 = sigmoid(z1);
        const float ds0 = gate ? dy0 * (z0 * sig0) : dy0, ds1 = gate ? dy1 * (z1 * sig1) : dy1;
        const float before0 = raw_before.at<0>(), before1 = raw_before.at<1>();
        __syncwarp();
        *reinterpret_cast<float2*>(memory + put_step) = make_float2(dt0, dt0 * x0);
        *reinterpret_cast<float2*>(memory + put_step + 16) = make_float2(dt1, dt1 * x1);
        *reinterpret_cast<float*>(memory + put_slope) = ds0, *reinterpret_cast<float*>(memory + put_slope + 8) = ds1;
        *reinterpret_cast<float4*>(memory + put_row) = raw_row.floats();
        __syncwarp();
        const int earlier = k0 + max(group - 1, 0) * kGroup;
        fetch_steps(earlier);
        fetch_slopes(earlier);

        float part[kGroup];  // (2)
#pragma unroll
        for (int t = 0; t < kGroup; t += 2) {
          const float4 step = *reinterpret_cast<const float4*>(memory + get_step + t / 2 * (kChannels * 16));
          const float2 ds = *reinterpret_cast<const float2*>(memory + get_slope + t / 2 * (kChannels * 8));
          float products[16];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float dtj = j ? step.z : step.x, u = j ? step.w : step.y, dsj = kGiven * (j ? ds.y : ds.x);
            float b[kHalf], cs[kHalf], a[kHalf];
            restore(b, reinterpret_cast<const float*>(memory + get_row + (t + j) * 128));
            restore(cs, reinterpret_cast<const float*>(memory + get_row + (t + j) * 128 + 64));
            float4* const keeps = reinterpret_cast<float4*>(memory + kept + (t + j) * 2048);
            keeps[64] = make_float4(h[0], h[1], h[2], h[3]), keeps[96] = make_float4(h[4], h[5], h[6], h[7]);
#pragma unroll
            for (int i = 0; i < kHalf; ++i) {
              a[i] = ex2(dtj * A[i]), h[i] = fmaf(a[i], h[i], u * b[i]);
              part[t + j] = i == 0 ? cs[i] * h[i] : fmaf(cs[i], h[i], part[t + j]);
              products[8 * j + i] = h[i] * dsj;
            }
            keeps[0] = make_float4(a[0], a[1], a[2], a[3]), keeps[32] = make_float4(a[4], a[5], a[6], a[7]);
          }
          const float sum = lane_sum<kExact>(products, ones, lane);
          *reinterpret_cast<float*>(memory + put_sum + (buffer * kSums + (kGroup + t) * kStates) * 4) = sum;
        }
        const float2 y = own_sums(part, q, c % 2);
        const int token = walk(k);
        {
          const float y0 = fmaf(D0, x0, y.x) + before0, y1 = fmaf(D1, x1, y.y) + before1;
          if (p.parks && live) store_two<kAligned>(offset(parked, token, d * 4), y0, y1, second);
          if (gate && !p.parks && live) {
            const float slope0 = sig0 * fmaf(z0, 1.0f - sig0, 1.0f), slope1 = sig1 * fmaf(z1, 1.0f - sig1, 1.0f);
            store_two<kAligned>(offset(dz, token, p.dz.l), dy0 * slope0 * y0, dy1 * slope1 * y1, second);
            if (p.y)
              store_two<kAligned>(offset(static_cast<T*>(p.y) + out, token, out_l), p.scale * (z0 * sig0) * y0,
                                  p.scale * (z1 * sig1) * y1, second);
          }
        }

        float gB[kGroup], gA[kGroup];  // (3)
#pragma unroll
        for (int t = kGroup - 2; t >= 0; t -= 2) {
          const float4 step = *reinterpret_cast<const float4*>(memory + get_step + t / 2 * (kChannels * 16));
          const float2 ds = *reinterpret_cast<const float2*>(memory + get_slope + t / 2 * (kChannels * 8));
          float products[16];
#pragma unroll
          for (int j = 1; j >= 0; --j) {
            const float dtj = j ? step.z : step.x, u = kGiven * (j ? step.w : step.y), dsj = j ? ds.y : ds.x;
            float b[kHalf], cs[kHalf], a[kHalf];
            restore(b, reinterpret_cast<const float*>(memory + get_row + (t + j) * 128));
            restore(cs, reinterpret_cast<const float*>(memory + get_row + (t + j) * 128 + 64));
            float before[kHalf];
            restore(a, reinterpret_cast<const float*>(memory + kept + (t + j) * 2048), 128);
            restore(before, reinterpret_cast<const float*>(memory + kept + (t + j) * 2048 + 1024), 128);
#pragma unroll
            for (int i = 0; i < kHalf; ++i) {
              const float g = fmaf(dsj, cs[i], dh[i]);
              gB[t + j] = i == 0 ? g * b[i] : fmaf(g, b[i], gB[t + j]);
              products[8 * j + i] = g * u;
              dh[i] = g * a[i];
              const float w = dh[i] * before[i];
              gA[t + j] = i == 0 ? w * A[i] : fmaf(w, A[i], gA[t + j]);
              dA[i] = fmaf(w, dtj, dA[i]);
            }
          }
          const float sum = lane_sum<kExact>(products, ones, lane);
          *reinterpret_cast<float*>(memory + put_sum + (buffer * kSums + t * kStates) * 4) = sum;
        }
        if (group > 0) restore(h, scratch + (group - 1) * (32 * kHalf));
        const float2 toB = own_sums(gB, q, c % 2), toA = own_sums(gA, q, c % 2);
        float ddt0 = fmaf(toA.x, kLn2, toB.x * x0), ddt1 = fmaf(toA.y, kLn2, toB.y * x1);
        if (p.smooth) ddt0 *= sigmoid(v0), ddt1 *= sigmoid(v1);
        dD.x = fmaf(ds0, x0, dD.x), dD.y = fmaf(ds1, x1, dD.y);
        dbias.x += live ? ddt0 : 0.0f, dbias.y += both ? ddt1 : 0.0f;
        if (live) {
          store_two<kAligned>(offset(dx, token, out_l), fmaf(toB.x, dt0, D0 * ds0), fmaf(toB.y, dt1, D1 * ds1), second);
          store_two<kAligned>(offset(ddt, token, out_l), ddt0, ddt1, second);
        }
        __syncthreads();
        // thread: (token, state) of four tokens, first of dB, then of dC
        const int step = kb + thread / kStates;
        float* const to = offset(sums, walk(step), p.blocks * (2 * kStates * 4));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float sum = 0.0f;
#pragma unroll
          for (int w = 0; w < kWarps; ++w)
            sum += *reinterpret_cast<const float*>(memory + get_sum + w * static_cast<int>(sizeof(Shared)) +
                                                   (buffer * kSums + i * (kSums / 2)) * 4);
          if (step < l) store(to + i * kStates, sum);
        }
        buffer ^= 1;
      }
    }
    if (p.dstart && walks) save(p.dstart + seq * d * kStates + edge, dh);
  }
  float* const part = p.parts + worker * part_size(d);
  if (walks) save(part + edge, dA);
#pragma unroll
  for (int distance : {1, 16}) {
    dD.x += __shfl_xor_sync(kWarp, dD.x, distance), dD.y += __shfl_xor_sync(kWarp, dD.y, distance);
    dbias.x += __shfl_xor_sync(kWarp, dbias.x, distance), dbias.y += __shfl_xor_sync(kWarp, dbias.y, distance);
  }
  float* const rest = part + int64_t{d} * kStates;
  if (turn == 0 && mine) rest[own] = dD.x, rest[d + own] = dbias.x;
  if (turn == 0 && second) rest[own + 1] = dD.y, rest[d + own + 1] = dbias.y;
}

// dB and dC (tokens, 16) of `sums` (tokens, blocks, 2, 16).  Grid (cdiv(tokens, 8),), 32 threads for each token.
template <class T>
__global__ void scan_sums_kernel(const float* sums, T* dB, T* dC, int64_t tokens, int blocks) {
  const int64_t token = blockIdx.x * int64_t{8} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (token >= tokens) return;
  const float* const from = sums + token * blocks * 32 + lane;
  float sum = 0.0f;
#pragma unroll 8
  for (int i = 0; i < blocks; ++i) sum += from[i * 32];
  (lane < kStates ? dB : dC)[token * kStates + lane % kStates] = from_float<T>(sum);
}

template <class T>
void launch_back(const BackParams& p, const ScanDirection& dir, void* stream) {
  const size_t shared = sizeof(Shared) * kWarps;
  const bool time = p.frames > 0;
  const auto kernel = p.aligned ? (time ? scan_back_kernel<T, true, true> : scan_back_kernel<T, false, true>)
                                : (time ? scan_back_kernel<T, true, false> : scan_back_kernel<T, false, false>);
  launch("scan_back", kernel, static_cast<int64_t>(p.workers) * p.blocks, 32 * kWarps, shared, stream, p);
  const int64_t tokens = p.b * p.l;
  launch("scan_sums", scan_sums_kernel<T>, (tokens + 7) / 8, 256, 0, stream, static_cast<const float*>(p.sums),
         dir.dB.at<T>(), dir.dC.at<T>(), tokens, p.blocks);
}

}  // namespace

BackSizes scan_back_sizes(int64_t b, int64_t l, int64_t d, int64_t workers) {
  const int64_t blocks = (d + kWarps * kChannels - 1) / (kWarps * kChannels);
  return {blocks, workers * blocks * kWarps * kGroups * 32 * kHalf, b * l * blocks * 2 * kStates,
          workers * part_size(d)};
}

void scan_back(const ScanArgs& a, int which, const BackMemory& m, void* stream) {
  const Params f = params(a, kChannels * kWarps);
  const ScanDirection& dir = a.dir[which];
  const int64_t size = a.dtype == 0 ? 4 : 2;
  if (m.workers < 1 || m.workers > a.b) throw std::invalid_argument("scan_back: workers must be 1 to b");
  BackParams p{};
  p.side = f.side[which], p.z = f.z;
  p.wide_dy = a.out_dtype == 0;
  const int64_t dy_size = p.wide_dy ? 4 : size;
  p.dy = tensor("a stride of dy", a.dy, dy_size, 1), p.dz = tensor("a stride of dz", a.dz, size, 1);
  p.dfinal = dir.dfinal_state.at<float>(), p.dstart = dir.dinitial_state.at<float>();
  p.dx = dir.dx.p, p.ddt = dir.ddt.p, p.y = a.y.p;
  p.parked = m.park, p.parks = m.park && m.parks, p.adds = m.park && !m.parks;
  p.scratch = m.scratch, p.sums = m.sums, p.parts = m.parts;
  p.l = f.l, p.d = f.d, p.blocks = f.blocks, p.workers = static_cast<int>(m.workers), p.frames = f.frames;
  p.b = a.b, p.scale = a.scale, p.softplus = f.softplus, p.smooth = a.softplus;
  p.aligned = f.aligned && dy_size == size && p.dy.width >= 2 * size && (!p.dz.p || p.dz.width >= 2 * size);
  with_dtype(a.dtype, "scan_back", [&](auto zero) { launch_back<decltype(zero)>(p, dir, stream); });
}

}  // namespace endomamba::cuda
