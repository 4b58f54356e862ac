// new residual = residual + row_scale * x; normed = RMSNorm or LayerNorm of it; and the way back.
//
// Task: a block of rows, one row after the other; a row stays in L1 between the passes over it.  Traffic of a row of c
// channels: x and residual read, new residual and normed written, each once; backward reads dnormed, new residual and
// its gradient (and x for the row scale's), writes dx and dresidual, each once.
// Numerics: fp32; sums of a row in 4 * W chains, then pairwise; the variance is that of the centred row.  A row's bits
// depend on nothing but the row and the instruction set.
// dweight, dbias: sums of 32 rows, then of a task's, then of the tasks in order: the tasks depend on b * m only.
#include "add_rms_norm.h"

#include <cmath>
#include <cstring>
#include <memory>

#include "parallel.h"
#include "simd.h"

namespace endomamba::ENDOMAMBA_LEVEL {

namespace {

constexpr int64_t kSumBlock = 32;  // rows summed in one go

ENDOMAMBA_INLINE int lanes_at(int64_t c, int64_t i) { return int(c - i < W ? c - i : W); }

// Sums over a row's channels in four chains, so that additions do not wait for each other.
struct RowSum {
  vf chain[4] = {zero(), zero(), zero(), zero()};
  ENDOMAMBA_INLINE float total() const { return sum((chain[0] + chain[1]) + (chain[2] + chain[3])); }
};

// f(i, lanes, chain) for W channels at a time.
template <class F>
ENDOMAMBA_INLINE void for_channels(int64_t c, const F& f) {
  int64_t i = 0;
  for (; i + 4 * W <= c; i += 4 * W) {
    f(i, W, 0);
    f(i + W, W, 1);
    f(i + 2 * W, W, 2);
    f(i + 3 * W, W, 3);
  }
  for (int chain = 0; i < c; i += W, ++chain) f(i, lanes_at(c, i), chain);
}

template <class T>
ENDOMAMBA_INLINE vf load_at(const T* p, int64_t stride, int64_t i, int lanes) {
  return load_lanes(p + i * stride, stride, lanes);
}

template <class T>
ENDOMAMBA_INLINE void store_at(T* p, int64_t stride, int64_t i, int lanes, vf v) {
  store_lanes(p + i * stride, stride, lanes, v);
}

// A view's row: null where the view is absent.
template <class T>
ENDOMAMBA_INLINE T* row_of(const View& view, int64_t i, int64_t j) {
  return view ? view.at<T>(i, j) : nullptr;
}

ENDOMAMBA_INLINE vf centred(vf r, float mean, int lanes) {
  float keep[W];
  if (lanes == W) return r - set1(mean);
  store(keep, r - set1(mean));
  for (int i = lanes; i < W; ++i) keep[i] = 0.0f;
  return load(keep);
}

template <class T>
void forward_row(const NormArgs& a, int64_t b, int64_t m, const float* weight, const float* bias) {
  const int64_t c = a.c, row = b * a.m + m;
  const T* x = a.x.at<T>(b, m);
  const float* residual = row_of<float>(a.residual, b, m);
  float* out = a.new_residual.at<float>(b, m);
  T* normed = a.normed.at<T>(b, m);
  const vf scale = set1(a.row_scale ? *a.row_scale.at<float>(b) : 1.0f);
  RowSum first;
  for_channels(c, [&](int64_t i, int lanes, int chain) __attribute__((always_inline)) {
    const vf added = load_at(x, a.x.s[2], i, lanes);
    const vf r = residual ? load_at(residual, a.residual.s[2], i, lanes) + added * scale : added * scale;
    store_lanes(out + i, 1, lanes, r);
    first.chain[chain] = first.chain[chain] + (a.layer_norm ? r : r * r);
  });
  float mean = 0.0f, square = first.total();
  if (a.layer_norm) {
    mean = square / float(c);
    RowSum second;
    for_channels(c, [&](int64_t i, int lanes, int chain) __attribute__((always_inline)) {
      const vf r = centred(load_lanes(out + i, 1, lanes), mean, lanes);
      second.chain[chain] = second.chain[chain] + r * r;
    });
    square = second.total();
    if (a.mean) *a.mean.at<float>(row) = mean;
  }
  const float rstd = 1.0f / std::sqrt(square / float(c) + a.eps);
  if (a.rstd) *a.rstd.at<float>(row) = rstd;
  const vf vmean = set1(mean), vrstd = set1(rstd);
  for_channels(c, [&](int64_t i, int lanes, int) __attribute__((always_inline)) {
    const vf r = (load_lanes(out + i, 1, lanes) - vmean) * vrstd;
    store_lanes(normed + i, 1, lanes, bias ? r * load(weight + i) + load(bias + i) : r * load(weight + i));
  });
}

// dweight and dbias are rows padded to whole vectors, to which this row's part is added.
template <class T>
void backward_row(const NormArgs& a, int64_t b, int64_t m, const float* weight, float* dweight, float* dbias,
                  float* row_sum) {
  const int64_t c = a.c, row = b * a.m + m;
  const T* dnormed = row_of<const T>(a.dnormed, b, m);
  const float* upstream = row_of<const float>(a.dnew_residual, b, m);
  const float* residual = a.new_residual.at<float>(b, m);
  const T* x = row_sum ? row_of<const T>(a.x, b, m) : nullptr;
  T* dx = row_of<T>(a.dx, b, m);
  float* dresidual = row_of<float>(a.dresidual, b, m);
  const vf rstd = set1(*a.rstd.at<float>(row)), mean = set1(a.layer_norm ? *a.mean.at<float>(row) : 0.0f);
  vf along = zero(), shared = zero();  // mean(w * dnormed * rhat), mean(w * dnormed)
  if (dnormed) {
    RowSum product, plain;
    for_channels(c, [&](int64_t i, int lanes, int chain) __attribute__((always_inline)) {
      const vf g = load_at(dnormed, a.dnormed.s[2], i, lanes);  // missing lanes are zero and stay so
      const vf rhat = (load_at(residual, a.new_residual.s[2], i, lanes) - mean) * rstd;
      const vf wg = g * load(weight + i);
      product.chain[chain] = product.chain[chain] + wg * rhat;
      plain.chain[chain] = plain.chain[chain] + wg;
      store(dweight + i, load(dweight + i) + g * rhat);
      if (dbias) store(dbias + i, load(dbias + i) + g);
    });
    along = set1(product.total() / float(c));
    if (a.layer_norm) shared = set1(plain.total() / float(c));
  }
  const vf scale = set1(a.row_scale ? *a.row_scale.at<float>(b) : 1.0f);
  RowSum scale_sum;
  for_channels(c, [&](int64_t i, int lanes, int chain) __attribute__((always_inline)) {
    vf dr = zero();
    if (dnormed) {
      const vf g = load_at(dnormed, a.dnormed.s[2], i, lanes);
      const vf rhat = (load_at(residual, a.new_residual.s[2], i, lanes) - mean) * rstd;
      dr = ((g * load(weight + i) - shared) - rhat * along) * rstd;
    }
    if (upstream) dr = dr + load_at(upstream, a.dnew_residual.s[2], i, lanes);
    if (x) scale_sum.chain[chain] = scale_sum.chain[chain] + dr * load_at(x, a.x.s[2], i, lanes);
    if (dresidual) store_lanes(dresidual + i, 1, lanes, dr);
    if (dx) store_lanes(dx + i, 1, lanes, dr * scale);
  });
  if (x) *row_sum = scale_sum.total();
}

// fp32 parameters as one padded row.
struct Row {
  std::unique_ptr<float[]> data;
  explicit Row(int64_t c, int64_t rows = 1) : data(new float[rows * padded(c)]()) {}
  static int64_t padded(int64_t c) { return (c + W - 1) / W * W; }

  Row(const View& view, int64_t c) : Row(c) {
    if (!view)
      data.reset();
    else
      for (int64_t i = 0; i < c; ++i) data[i] = *view.at<float>(i);
  }
  float* get() const { return data.get(); }
};

// Adds a row of partial sums to another and clears it.
void fold(float* part, float* total, int64_t floats) {
  for (int64_t i = 0; i < floats; ++i) {
    total[i] += part[i];
    part[i] = 0.0f;
  }
}

template <class F>
void with_dtype(int dtype, const F& f) {
  if (dtype == kFloat32)
    f(float{});
  else if (dtype == kBFloat16)
    f(bf16{});
  else
    f(fp16{});
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Below this many elements a second thread costs more than it brings.
int threads_for(const NormArgs& a) { return a.b * a.m * a.c < 32768 ? 1 : a.threads; }

}  // namespace

void norm_fwd(const NormArgs& a) {
  const Row weight(a.weight, a.c), bias(a.bias, a.c);
  const int64_t rows = a.b * a.m, block = ceil_div(8192, a.c > 0 ? a.c : 1);
  with_dtype(a.dtype, [&](auto element) {
    parallel_for(ceil_div(rows, block), threads_for(a), [&](int64_t task) {
      const int64_t end = (task + 1) * block < rows ? (task + 1) * block : rows;
      for (int64_t row = task * block; row < end; ++row)
        forward_row<decltype(element)>(a, row / a.m, row % a.m, weight.get(), bias.get());
    });
  });
}

void norm_bwd(const NormArgs& a) {
  const Row weight(a.weight, a.c);
  const int64_t rows = a.b * a.m, width = Row::padded(a.c);
  const int64_t spread = ceil_div(rows, kNormGroups), group = spread > kNormRowGroup ? spread : kNormRowGroup;
  const int64_t groups = ceil_div(rows, group);
  const std::unique_ptr<float[]> row_sums(a.drow_scale ? new float[rows] : nullptr);  // dnew . x of a row
  const Row totals(a.c, 2 * groups);  // [group][dweight, dbias][c]
  with_dtype(a.dtype, [&](auto element) {
    parallel_for(groups, threads_for(a), [&](int64_t task) {
      const Row part(a.c, 2);
      float* total = totals.get() + task * 2 * width;
      const int64_t end = (task + 1) * group < rows ? (task + 1) * group : rows;
      for (int64_t row = task * group; row < end; ++row) {
        backward_row<decltype(element)>(a, row / a.m, row % a.m, weight.get(), part.get(),
                                        a.dbias ? part.get() + width : nullptr,
                                        a.drow_scale ? row_sums.get() + row : nullptr);
        if ((row - task * group + 1) % kSumBlock == 0 || row + 1 == end) fold(part.get(), total, 2 * width);
      }
    });
  });
  const Row sums(a.c, 2);
  for (int64_t task = 0; task < groups; ++task)
    for (int64_t i = 0; i < 2 * width; ++i) sums.get()[i] += totals.get()[task * 2 * width + i];
  for (int64_t i = 0; i < a.c; ++i) {
    if (a.dweight) *a.dweight.at<float>(i) = sums.get()[i];
    if (a.dbias) *a.dbias.at<float>(i) = sums.get()[width + i];
  }
  if (!a.drow_scale) return;
  for (int64_t b = 0; b < a.b; ++b) {
    double total = 0.0;
    for (int64_t m = 0; m < a.m; ++m) total += row_sums[b * a.m + m];
    *a.drow_scale.at<float>(b) = float(total);
  }
}

}  // namespace endomamba::ENDOMAMBA_LEVEL
