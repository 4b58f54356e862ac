// Causal depthwise convolution with optional silu, forward and backward, one direction or both.
//
// Task (sequence, 64 channels), backward (8 sequences, 64 channels): walks the tokens with W channels at a time, the
// last w tokens in registers (w = 4; any other width keeps them in scratch).  Traffic: x read once and y written once
// for each direction; backward reads x and dy once and writes dx once, pre-activations are recomputed, nothing is
// saved. Both directions in one walk: at step k the window x[k-w+1..k] holds all that y[k] needs and all that the
// backward walk's y_b[k-w+1] needs, whose oldest token is x[k].  The walk runs w - 1 steps past the end with zeros
// coming in. Numerics: fp32, acc = bias, then one multiply-add a tap from the oldest to the newest, whatever the width,
// the layout and the edge, so that a row's bits depend on nothing but the row and the instruction set. dweight and
// dbias: sums of 32 tokens, then of those, then of the groups of sequences, always in this order.
#include "causal_conv1d.h"

#include <memory>
#include <type_traits>

#include "parallel.h"
#include "simd.h"

namespace endomamba::ENDOMAMBA_LEVEL {

namespace {

constexpr int64_t kSumBlock = 32;  // tokens summed in one go
constexpr int64_t kAhead = 8;  // tokens: rows are too far apart for the hardware to see that they are next

struct Lanes {
  vf v;
};

// w vectors.  WIDTH = 4 is the fast path: registers, whole vectors of adjacent channels.  WIDTH = 0 is every other
// case: scratch, any width, layout and number of lanes.  Both do the same arithmetic in the same order.
template <int WIDTH>
struct Taps {
  vf v[WIDTH];
  explicit Taps(int64_t) {
    for (int j = 0; j < WIDTH; ++j) v[j] = zero();
  }
  ENDOMAMBA_INLINE vf& operator[](int64_t j) { return v[j]; }
};

template <>
struct Taps<0> {
  std::unique_ptr<Lanes[]> v;
  explicit Taps(int64_t w) : v(new Lanes[w]) {
    for (int64_t j = 0; j < w; ++j) v[j].v = zero();
  }
  vf& operator[](int64_t j) { return v[j].v; }
};

template <class Array>
ENDOMAMBA_INLINE void shift(Array& taps, int64_t w) {
  for (int64_t j = 0; j + 1 < w; ++j) taps[j] = taps[j + 1];
}

template <class Array>
void load_taps(const View& weight, int64_t channel, int lanes, int64_t w, Array& taps) {
  for (int64_t j = 0; j < w; ++j) taps[j] = load_lanes(weight.at<float>(channel, j), weight.s[0], lanes);
}

// Steps through the tokens of one sequence in walking order; offsets in elements.
struct Walk {
  int64_t offset, step, major, frames, left;

  Walk(const ConvArgs& a, int64_t begin, int64_t length, int64_t stride) {
    const int64_t last = length - 1, sign = a.reverse ? -1 : 1;
    offset = (begin + (a.reverse ? last : 0)) * stride;
    frames = a.frames;
    left = frames;
    step = sign * stride;
    major = 0;
    if (frames) {  // time-fastest: frames steps of length / frames tokens, then back to the first frame's next token
      step *= length / frames;
      major = sign * stride - (frames - 1) * step;
    }
  }

  ENDOMAMBA_INLINE void advance() {
    if (frames && --left == 0) {
      left = frames;
      offset += major;
    } else {
      offset += step;
    }
  }
};

// An activation's walk: W channels of one token after the other.  FULL: they are adjacent and none is missing.
template <class T, bool FULL>
struct Stream {
  Walk walk;
  T* base;
  int64_t stride;
  int lanes;

  Stream(const ConvArgs& a, const View& view, int64_t row, int64_t begin, int64_t length, int64_t channel,
         int lanes_used)
      : walk(a, begin, length, view.s[1]), base(view.at<T>(row, 0, channel)), stride(view.s[2]), lanes(lanes_used) {}

  ENDOMAMBA_INLINE vf next() {
    const T* p = base + walk.offset;
    __builtin_prefetch(p + kAhead * walk.step);
    walk.advance();
    return FULL ? load_full(p) : load_lanes(p, stride, lanes);
  }

  ENDOMAMBA_INLINE void put(vf value) {
    T* p = base + walk.offset;
    __builtin_prefetch(p + kAhead * walk.step, 1);
    walk.advance();
    FULL ? store_full(p, value) : store_lanes(p, stride, lanes, value);
  }
};

struct Sequence {
  int64_t index, row, begin, length;
  Sequence(const ConvArgs& a, int64_t i) : index(i), row(a.cu_seqlens ? 0 : i), begin(0), length(a.l) {
    if (a.cu_seqlens) {
      begin = *a.cu_seqlens.at<int64_t>(i);
      length = *a.cu_seqlens.at<int64_t>(i + 1) - begin;
    }
  }
};

ENDOMAMBA_INLINE vf activate(bool silu, vf pre) { return silu ? pre * sigmoid(pre) : pre; }

// dy times the activation's slope at pre.
ENDOMAMBA_INLINE vf slope(bool silu, vf dy, vf pre) {
  if (!silu) return dy;
  const vf s = sigmoid(pre);
  return dy * (s * (set1(1.0f) + pre * (set1(1.0f) - s)));
}

// Taps from the oldest token to the newest of the walk; MIRROR: the window lies the other way round.
template <bool MIRROR, class Array>
ENDOMAMBA_INLINE vf convolve(vf bias, Array& weight, Array& window, int64_t w) {
  vf acc = bias;
  for (int64_t j = 0; j < w; ++j) acc = acc + weight[j] * window[MIRROR ? w - 1 - j : j];
  return acc;
}

template <class T, int WIDTH, bool BOTH>
void forward_lanes(const ConvArgs& a, const Sequence& seq, int64_t channel, int lanes) {
  constexpr bool FULL = WIDTH != 0;
  const int64_t w = WIDTH ? WIDTH : a.w, length = seq.length;
  const bool silu = a.silu;
  Taps<WIDTH> weight(w), window(w), weight_b(w);
  load_taps(a.dir[0].weight, channel, lanes, w, weight);
  const auto bias_of = [&](const ConvDirection& dir) {
    return dir.bias ? load_lanes(dir.bias.at<float>(channel), dir.bias.s[0], lanes) : zero();
  };
  const vf bias = bias_of(a.dir[0]), bias_b = BOTH ? bias_of(a.dir[1]) : zero();
  if (BOTH) load_taps(a.dir[1].weight, channel, lanes, w, weight_b);
  if (a.initial_state)
    for (int64_t j = 0; j + 1 < w; ++j)
      window[j] = load_lanes(a.initial_state.at<float>(seq.index, j, channel), a.initial_state.s[2], lanes);

  Stream<T, FULL> x(a, a.x, seq.row, seq.begin, length, channel, lanes);
  Stream<T, FULL> y(a, a.dir[0].y, seq.row, seq.begin, length, channel, lanes);
  Stream<T, FULL> y_b(a, a.dir[BOTH].y, seq.row, seq.begin, length, channel, lanes);
  for (int64_t k = 0; k < length; ++k) {
    window[w - 1] = x.next();
    y.put(activate(silu, convolve<false>(bias, weight, window, w)));
    if (BOTH && k >= w - 1) y_b.put(activate(silu, convolve<true>(bias_b, weight_b, window, w)));
    shift(window, w);
  }
  if (BOTH) {
    for (int64_t k = length; k < length + w - 1; ++k) {
      window[w - 1] = zero();
      if (k >= w - 1) y_b.put(activate(silu, convolve<true>(bias_b, weight_b, window, w)));
      shift(window, w);
    }
  } else if (a.final_state) {
    for (int64_t j = 0; j + 1 < w; ++j)
      store_lanes(a.final_state.at<float>(seq.index, j, channel), a.final_state.s[2], lanes, window[j]);
  }
}

// The sums of dweight (w) and dbias of W channels in one direction.
template <int WIDTH>
struct Sums {
  Taps<WIDTH> weight, weight_total;
  vf bias = zero(), bias_total = zero();
  explicit Sums(int64_t w) : weight(w), weight_total(w) {}

  ENDOMAMBA_INLINE void fold(int64_t w) {
    for (int64_t j = 0; j < w; ++j) {
      weight_total[j] = weight_total[j] + weight[j];
      weight[j] = zero();
    }
    bias_total = bias_total + bias;
    bias = zero();
  }

  // out: rows of d floats, w for dweight and one for dbias.
  void write(int64_t w, int64_t d, int lanes, float* out) {
    for (int64_t j = 0; j < w; ++j) store_lanes(out + j * d, 1, lanes, weight_total[j]);
    store_lanes(out + w * d, 1, lanes, bias_total);
  }
};

// At step k the window is x[k-w+1..k] and g holds the slopes of steps k-w+1..k, so that dx[k-w+1] is complete.  Before
// the first token lies the initial state, after the last one dfinal_state enters.
template <class T, int WIDTH, bool BOTH>
void backward_lanes(const ConvArgs& a, int64_t first, int64_t last, int64_t channel, int lanes, float* partial) {
  constexpr bool FULL = WIDTH != 0;
  const int64_t w = WIDTH ? WIDTH : a.w;
  const bool silu = a.silu;
  Taps<WIDTH> weight(w), weight_b(w), window(w), g(w), g_b(w);
  Sums<WIDTH> sums(w), sums_b(w);
  load_taps(a.dir[0].weight, channel, lanes, w, weight);
  const auto bias_of = [&](const ConvDirection& dir) {
    return dir.bias ? load_lanes(dir.bias.at<float>(channel), dir.bias.s[0], lanes) : zero();
  };
  const vf bias = bias_of(a.dir[0]), bias_b = BOTH ? bias_of(a.dir[1]) : zero();
  if (BOTH) load_taps(a.dir[1].weight, channel, lanes, w, weight_b);
  const bool has_dy = bool(a.dir[0].dy), has_dy_b = BOTH && bool(a.dir[1].dy);

  for (int64_t index = first; index < last; ++index) {
    const Sequence seq(a, index);
    const int64_t length = seq.length;
    for (int64_t j = 0; j < w; ++j) {
      const bool state = j + 1 < w && a.initial_state;
      window[j] =
          state ? load_lanes(a.initial_state.at<float>(index, j, channel), a.initial_state.s[2], lanes) : zero();
      g[j] = g_b[j] = zero();
    }
    Stream<T, FULL> x(a, a.x, seq.row, seq.begin, length, channel, lanes);
    Stream<T, FULL> dx(a, a.dx, seq.row, seq.begin, length, channel, lanes);
    Stream<T, FULL> dy(a, a.dir[0].dy, seq.row, seq.begin, length, channel, lanes);
    Stream<T, FULL> dy_b(a, a.dir[BOTH].dy, seq.row, seq.begin, length, channel, lanes);
    int64_t unfolded = 0;

    const auto step = [&](int64_t k, bool inside) __attribute__((always_inline)) {
      window[w - 1] = inside ? x.next() : zero();
      g[w - 1] = zero();
      if (inside && has_dy) {
        const vf pre = silu ? convolve<false>(bias, weight, window, w) : zero();
        const vf slope_now = slope(silu, dy.next(), pre);
        g[w - 1] = slope_now;
        for (int64_t j = 0; j < w; ++j) sums.weight[j] = sums.weight[j] + slope_now * window[j];
        sums.bias = sums.bias + slope_now;
      }
      vf out = zero();
      for (int64_t j = 0; j < w; ++j) out = out + weight[j] * g[w - 1 - j];
      if (BOTH) {
        g_b[w - 1] = zero();
        if (k >= w - 1 && has_dy_b) {
          const vf pre = silu ? convolve<true>(bias_b, weight_b, window, w) : zero();
          const vf slope_now = slope(silu, dy_b.next(), pre);
          g_b[w - 1] = slope_now;
          for (int64_t j = 0; j < w; ++j) sums_b.weight[j] = sums_b.weight[j] + slope_now * window[w - 1 - j];
          sums_b.bias = sums_b.bias + slope_now;
        }
        for (int64_t j = 0; j < w; ++j) out = out + weight_b[j] * g_b[j];
        shift(g_b, w);
      }
      if (!inside && a.dfinal_state)
        out = out + load_lanes(a.dfinal_state.at<float>(index, k - length, channel), a.dfinal_state.s[2], lanes);
      if (k >= w - 1)
        dx.put(out);
      else if (a.dinitial_state)
        store_lanes(a.dinitial_state.at<float>(index, k, channel), a.dinitial_state.s[2], lanes, out);
      shift(window, w);
      shift(g, w);
      if (++unfolded == kSumBlock) {
        sums.fold(w);
        if (BOTH) sums_b.fold(w);
        unfolded = 0;
      }
    };
    for (int64_t k = 0; k < length; ++k) step(k, true);
    for (int64_t k = length; k < length + w - 1; ++k) step(k, false);
    sums.fold(w);
    if (BOTH) sums_b.fold(w);
  }
  sums.write(w, a.d, lanes, partial + channel);
  if (BOTH) sums_b.write(w, a.d, lanes, partial + (w + 1) * a.d + channel);
}

// --- from arguments to the right instance ---------------------------------------------------------------------------

template <class F>
void with_dtype(int dtype, const F& f) {
  if (dtype == kFloat32)
    f(float{});
  else if (dtype == kBFloat16)
    f(bf16{});
  else
    f(fp16{});
}

// f(element, both)
template <class F>
void with_instance(const ConvArgs& a, const F& f) {
  with_dtype(a.dtype, [&](auto element) {
    if (a.directions == 2)
      f(element, std::true_type{});
    else
      f(element, std::false_type{});
  });
}

bool adjacent(const View& view) { return !view || view.s[2] == 1; }

// Below this many elements a second thread costs more than it brings.
int threads_for(const ConvArgs& a) {
  const int64_t elements = a.l * a.d * (a.cu_seqlens ? 1 : a.b);
  return elements < 16384 ? 1 : a.threads;
}

}  // namespace

void conv_fwd(const ConvArgs& a) {
  const int64_t blocks = (a.d + kConvBlock - 1) / kConvBlock;
  const bool fast = a.w == 4 && adjacent(a.x) && adjacent(a.dir[0].y) && adjacent(a.dir[1].y);
  with_instance(a, [&](auto element, auto both) {
    using T = decltype(element);
    constexpr bool BOTH = decltype(both)::value;
    parallel_for(a.b * blocks, threads_for(a), [&](int64_t task) {
      const Sequence seq(a, task / blocks);
      const int64_t begin = task % blocks * kConvBlock, end = begin + kConvBlock < a.d ? begin + kConvBlock : a.d;
      for (int64_t channel = begin; channel < end; channel += W) {
        const int lanes = int(end - channel < W ? end - channel : W);
        if (fast && lanes == W)
          forward_lanes<T, 4, BOTH>(a, seq, channel, lanes);
        else
          forward_lanes<T, 0, BOTH>(a, seq, channel, lanes);
      }
    });
  });
}

void conv_bwd(const ConvArgs& a) {
  const int64_t blocks = (a.d + kConvBlock - 1) / kConvBlock;
  const int64_t spread = (a.b + kConvGroups - 1) / kConvGroups;
  const int64_t group = spread > kConvRowGroup ? spread : kConvRowGroup, groups = (a.b + group - 1) / group;
  const bool fast = a.w == 4 && adjacent(a.x) && adjacent(a.dx) && adjacent(a.dir[0].dy) && adjacent(a.dir[1].dy);
  const int64_t sums = a.directions * (a.w + 1) * a.d;  // floats of one group: [direction][w taps, bias][d]
  const std::unique_ptr<float[]> partials(new float[groups * sums]);
  with_instance(a, [&](auto element, auto both) {
    using T = decltype(element);
    constexpr bool BOTH = decltype(both)::value;
    parallel_for(groups * blocks, threads_for(a), [&](int64_t task) {
      const int64_t first = task / blocks * group, last = first + group < a.b ? first + group : a.b;
      const int64_t begin = task % blocks * kConvBlock, end = begin + kConvBlock < a.d ? begin + kConvBlock : a.d;
      float* partial = partials.get() + task / blocks * sums;
      for (int64_t channel = begin; channel < end; channel += W) {
        const int lanes = int(end - channel < W ? end - channel : W);
        if (fast && lanes == W)
          backward_lanes<T, 4, BOTH>(a, first, last, channel, lanes, partial);
        else
          backward_lanes<T, 0, BOTH>(a, first, last, channel, lanes, partial);
      }
    });
  });
  for (int i = 0; i < a.directions; ++i)
    for (int64_t j = 0; j <= a.w; ++j) {
      const ConvDirection& dir = a.dir[i];
      if (j == a.w && !dir.dbias) continue;
      const float* part = partials.get() + (i * (a.w + 1) + j) * a.d;
      for (int64_t c = 0; c < a.d; ++c) {
        float total = 0.0f;
        for (int64_t row_group = 0; row_group < groups; ++row_group) total += part[row_group * sums + c];
        *(j < a.w ? dir.dweight.at<float>(c, j) : dir.dbias.at<float>(c)) = total;
      }
    }
}

}  // namespace endomamba::ENDOMAMBA_LEVEL
