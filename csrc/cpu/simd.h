// Vectors of W fp32 lanes for the level this file is compiled at (baseline, AVX2, AVX-512 with and without BF16), and
// the few functions that the kernels need on them.  GCC / Clang vector extensions carry the arithmetic (contracted to
// FMA where the level has it); intrinsics stand only where the compilers find no good code by themselves.
//
// Everything here lives in the level's namespace: were it shared, the linker could keep the AVX-512 copy of an inline
// function for all levels.  Kernels use no std:: containers for the same reason.
//
// Numerics: fp32 throughout.  exp2 is a degree-5 polynomial with an exact 1 at 0 (relative error 9.1e-8 plus rounding,
// vanishing near 0, so that slow decays stay exact), softplus is relatively accurate down to underflow.  The decays of
// activations of 16 bits may take exp2<kHalf>, of degree 4: what it gives is 2^x of an x off by at most 1.5e-5 of
// itself, whatever the x, as if the step dt were off by that, whose own inputs were rounded to 2e-3 (bf16) or 5e-4.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define ENDOMAMBA_INLINE inline __attribute__((always_inline))

namespace endomamba {
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
}  // namespace endomamba

namespace endomamba::ENDOMAMBA_LEVEL {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

ENDOMAMBA_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ENDOMAMBA_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

ENDOMAMBA_INLINE vf set1(float s) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(s);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(s);
#else
  return vf{s, s, s, s};
#endif
}

ENDOMAMBA_INLINE vf zero() { return vf{}; }
ENDOMAMBA_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
ENDOMAMBA_INLINE vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }

// p(f) = 2^f on [-1/2, 1/2].
template <bool kHalf = false>
ENDOMAMBA_INLINE vf exp2_fraction(vf f) {
  if constexpr (kHalf) {  // max |log2(p(f)) / f - 1| is smallest
    vf p = set1(9.5605161e-3f);
    p = p * f + set1(5.5834170e-2f);
    p = p * f + set1(2.4024323e-1f);
    p = p * f + set1(6.9313723e-1f);
    return p * f + set1(1.0f);
  }
  vf p = set1(1.3264727e-3f);
  p = p * f + set1(9.6715130e-3f);
  p = p * f + set1(5.5507336e-2f);
  p = p * f + set1(2.4022242e-1f);
  p = p * f + set1(6.9314700e-1f);
  return p * f + set1(1.0f);
}

// 2^x.  Below -126 the result is zero (AVX-512: denormals are kept), above 128 inf; NaN stays NaN.
template <bool kHalf = false>
ENDOMAMBA_INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
  const __m512 k = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf p = exp2_fraction<kHalf>(x - (vf)k);
  return (vf)_mm512_scalef_ps((__m512)p, k);
#else
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  const vf bounded = select(x > set1(128.0f), set1(128.0f), select(x < set1(-126.0f), set1(-126.0f), x));
  const vf shifted = bounded + magic;
  const vf p = exp2_fraction<kHalf>(bounded - (shifted - magic));
  const vf y = (vf)((vi)p + ((vi)shifted << 23));  // at 128 the exponent field fills up: inf
  return select(x < set1(-126.0f), zero(), y);
#endif
}

// e^x with the product x * log2(e) in two parts, so that the relative error does not grow with |x|.
ENDOMAMBA_INLINE vf exp(vf x) {
#if defined(__AVX512F__)
  // min and max give their second operand where one is NaN.
  const vf bounded = (vf)_mm512_min_ps((__m512)set1(89.0f), _mm512_max_ps((__m512)set1(-104.0f), (__m512)x));
  const vf log2e = set1(1.44269502f);
  const vf k = (vf)_mm512_roundscale_ps((__m512)(bounded * log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // One rounding, asked for: the compilers share the product with the line above and round it.
  const vf high = (vf)_mm512_fmsub_ps((__m512)bounded, (__m512)log2e, (__m512)k);
  const vf f = high + bounded * set1(1.92596299e-8f);
  return (vf)_mm512_scalef_ps((__m512)exp2_fraction(f), (__m512)k);
#else
  const vf clamped = select(x > set1(88.7f), set1(88.7f), select(x < set1(-87.3f), set1(-87.3f), x));
  const vf magic = set1(12582912.0f);
  const vf shifted = clamped * set1(1.44269504f) + magic;
  const vf k = shifted - magic;
  const vf r = (clamped - k * set1(0.693145752f)) - k * set1(1.42860677e-6f);
  const vf p = exp2_fraction(r * set1(1.44269504f));
  const vi whole = __builtin_convertvector(k, vi);  // scaled in two steps: 2^128 is no float
  const vi first = whole >> 1;
  const vf scale_first = (vf)((first + 127) << 23);
  const vf scale_second = (vf)((whole - first + 127) << 23);
  const vf y = p * scale_first * scale_second;
  return select(x < set1(-87.3f), zero(), select(x > set1(88.7f), set1(__builtin_inff()), y));
#endif
}

// 1 / (1 + e^-x): where e^-x overflows the result is rightly zero.
ENDOMAMBA_INLINE vf sigmoid(vf x) { return set1(1.0f) / (set1(1.0f) + exp(-x)); }

// log(1 + e^x): max(x, 0) + log1p(u), u = e^-|x|, log1p(u) = 2 atanh(s), s = u / (2 + u) <= 1/3.  Above 20 that is x to
// the bit; NaN stays NaN by u.
ENDOMAMBA_INLINE vf softplus(vf x) {
  const vf u = exp(-abs(x));
  const vf s = u / (set1(2.0f) + u);
  const vf q = s * s;
  vf p = set1(1.21447787e-1f);
  p = p * q + set1(1.07153706e-1f);
  p = p * q + set1(1.43082976e-1f);
  p = p * q + set1(1.99994445e-1f);
  p = p * q + set1(3.33333373e-1f);
  const vf log1p = set1(2.0f) * (s + s * q * p);
  return select(x > zero(), x, zero()) + log1p;
}

// The lanes summed pairwise, always in the same order.
ENDOMAMBA_INLINE float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lanes[W];
  store(lanes, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// Memory blocks a thread keeps between tasks: fresh ones cost a page fault per 4 KiB, a quarter of a backward call at
// (1, 197, 768).  At most kSlots blocks of up to 1 MiB stay; larger ones go back at once.
class BlockCache {
 public:
  static constexpr int kSlots = 12;
  static constexpr int64_t kLargest = 1 << 20;

  static BlockCache& of_thread() {
    static thread_local BlockCache cache;
    return cache;
  }
  void* take(int64_t& bytes) {
    for (Block& block : blocks_)
      if (block.p != nullptr && block.bytes >= bytes && block.bytes <= 2 * bytes) {
        void* p = block.p;
        bytes = block.bytes;
        block.p = nullptr;
        return p;
      }
    void* p = std::aligned_alloc(64, bytes);
    if (p == nullptr) std::abort();
    return p;
  }
  void give(void* p, int64_t bytes) {
    Block* place = nullptr;
    for (Block& block : blocks_)
      if (block.p == nullptr) place = &block;
    if (bytes > kLargest || place == nullptr) return std::free(p);
    *place = {p, bytes};
  }
  ~BlockCache() {
    for (Block& block : blocks_) std::free(block.p);
  }

 private:
  struct Block {
    void* p = nullptr;
    int64_t bytes = 0;
  };
  Block blocks_[kSlots];
};

// Scratch memory of a task, aligned to a cache line, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : bytes_(((floats > 0 ? floats : 1) * 4 + 63) / 64 * 64),
        data_(static_cast<float*>(BlockCache::of_thread().take(bytes_))) {}
  ~Scratch() { BlockCache::of_thread().give(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  int64_t bytes_;
  float* data_;
};

// --- elements of fp32, bf16 and fp16 -------------------------------------------------------------------------------

ENDOMAMBA_INLINE float to_float(float x) { return x; }

ENDOMAMBA_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

ENDOMAMBA_INLINE float to_float(fp16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // inf, NaN
    bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {  // denormal: the mantissa times 2^-24
    const float small = float(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &small, 4);
  }
  bits |= sign;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
#endif
}

ENDOMAMBA_INLINE void from_float(float x, float& y) { y = x; }

ENDOMAMBA_INLINE void from_float(float x, bf16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  y.bits = nan ? uint16_t((bits >> 16) | 0x40u) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

ENDOMAMBA_INLINE void from_float(float x, fp16& y) {
#if defined(__F16C__)
  y.bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // rounds to 65,536 or more
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // denormal in fp16: let the fp32 adder round at 2^-24
    float magnitude, rounded;
    std::memcpy(&magnitude, &bits, 4);
    rounded = magnitude + 0.5f;
    std::memcpy(&half, &rounded, 4);
    half -= 0x3f000000u;
  } else {
    half = (bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13;
  }
  y.bits = uint16_t(half | sign);
#endif
}

// --- W elements at a time; `count` < W at the edge, `stride` in elements -------------------------------------------

ENDOMAMBA_INLINE vf load_full(const float* p) { return load(p); }

ENDOMAMBA_INLINE vf load_full(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vh bits;
  std::memcpy(&bits, p, sizeof bits);
  return (vf)(__builtin_convertvector(bits, vu) << 16);
#endif
}

ENDOMAMBA_INLINE vf load_full(const fp16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
#endif
}

ENDOMAMBA_INLINE void store_full(float* p, vf v) { store(p, v); }

ENDOMAMBA_INLINE void store_full(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#elif defined(__AVX512F__)
  const __m512i bits = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
#else
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  const vu nan = (vu)(v != v);
  const vh half = __builtin_convertvector((quiet & nan) | (rounded & ~nan), vh);
  std::memcpy(p, &half, sizeof half);
#endif
}

ENDOMAMBA_INLINE void store_full(fp16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  float lanes[W];
  store(lanes, v);
  for (int i = 0; i < W; ++i) from_float(lanes[i], p[i]);
#endif
}

// Missing lanes read as zero.
template <class T>
ENDOMAMBA_INLINE vf load_lanes(const T* p, int64_t stride, int count) {
  if (stride == 1 && count >= W) return load_full(p);
  float lanes[W] = {};
  for (int i = 0; i < count && i < W; ++i) lanes[i] = to_float(p[i * stride]);
  return load(lanes);
}

template <class T>
ENDOMAMBA_INLINE void store_lanes(T* p, int64_t stride, int count, vf v) {
  if (stride == 1 && count >= W) return store_full(p, v);
  float lanes[W];
  store(lanes, v);
  for (int i = 0; i < count && i < W; ++i) from_float(lanes[i], p[i * stride]);
}

}  // namespace endomamba::ENDOMAMBA_LEVEL
