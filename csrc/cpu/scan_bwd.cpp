// Selective scan, backward, one or two directions; the derivation stands in endomamba/ops/selective_scan/README.md.
//
// Task (8 sequences, 64 channels): for each sequence and direction the chunks of 64 tokens are visited from the last to
// the first; each is recomputed from its saved state (decays and states of 64 tokens in scratch, which stays in L2) and
// walked back, W channels at a time, the gradient of all states in registers.
// Reductions without atomics, in an order that no thread count changes: dA, dD, d dt_bias are summed over a task's
// sequences and then over groups of sequences; dB, dC over a task's channels (in lanes first, across lanes once per 64
// channels) and then over blocks of channels.
// Numerics: fp32 throughout; a_t h_{t-1} is taken as a product, never as h_t - dt B x, which cancels.
#include "parallel.h"
#include "scan_common.h"

namespace endomamba::ENDOMAMBA_LEVEL {

namespace {

// Pairs of vectors to one: blocks of 2M lanes become the sums of their halves, left from a, right from b.
template <int M>
ENDOMAMBA_INLINE vf fold(vf a, vf b) {
  vi low, high;
  for (int i = 0; i < W; ++i) {
    const int block = i / (2 * M) * (2 * M), inside = i % (2 * M);
    low[i] = block + inside % M + (inside < M ? 0 : W);
    high[i] = low[i] + M;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// out[i] = sum of the lanes of in[i], for W vectors at once: W - 1 folds instead of W reductions.
ENDOMAMBA_INLINE void sum_rows(const float* in, float* out) {
  vf v[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) v[i] = load(in + i * W);
#if defined(__AVX512F__)
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = fold<8>(v[i], v[i + 8]);
#endif
#if defined(__AVX2__)
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) v[i] = fold<4>(v[i], v[i + 4]);
#endif
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) v[i] = fold<2>(v[i], v[i + 2]);
  store(out, fold<1>(v[0], v[1]));
}

// The most groups that a block of 64 channels touches.
int64_t most_groups(const ScanArgs& a, const Grouping& groups) {
  int64_t most = 1;
  for (int64_t c = 0; c < a.d; c += kBackwardBlock) {
    const int64_t count = groups.count(c, min64(kBackwardBlock, a.d - c));
    most = count > most ? count : most;
  }
  return most;
}

// Partial sums of one direction, one row a task.
struct Partials {
  float *dB, *dC;  // varying: [token][block][groups][n]; constant: [row group][d][n]
  int64_t groups_B, groups_C;
  float* dA;  // [row group][d][n]
  float *dD, *dbias;  // [row group][d]
};

struct Shape {
  int64_t states, blocks64, tokens, row_groups;
};

// The walk back of one chunk for NS states.  In: decay, history (history[t] is the state before step t), the gradient
// of the states after the chunk in dh.  Out: dh before the chunk, sum_a = sum_s q A, sum_b = sum_s dh B of each token,
// and the additions to dA and to the dB, dC rows in lanes.
template <int NS, bool kLanesB, bool kLanesC>
void backward_states(int64_t tokens, int64_t states, const float* A, float* dh, float* dA, const float* dt,
                     const float* dtx, const float* dy, const Operand& B, const Operand& C, int64_t first,
                     const float* decay, const float* history, float* sum_a, float* sum_b, float* dB, float* dC) {
  constexpr int kStepB = kLanesB ? W : 1, kStepC = kLanesC ? W : 1;
  vf carry[NS];
#pragma GCC unroll 16
  for (int s = 0; s < NS; ++s) carry[s] = load(dh + s * W);
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const float* b = B.data + t * B.token_stride + first * kStepB;
    const float* c = C.data + t * C.token_stride + first * kStepC;
    const vf dt_t = load(dt + t * W), dtx_t = load(dtx + t * W), dy_t = load(dy + t * W);
    vf total_a = load(sum_a + t * W), total_b = load(sum_b + t * W);
    const int64_t now = t * states * W, next = now + states * W;
#pragma GCC unroll 16
    for (int s = 0; s < NS; ++s) {
      const vf b_s = kLanesB ? load(b + s * kStepB) : set1(b[s]);
      const vf c_s = kLanesC ? load(c + s * kStepC) : set1(c[s]);
      const vf dh_s = carry[s] + c_s * dy_t;
      store(dC + now + s * W, load(dC + now + s * W) + dy_t * load(history + next + s * W));
      store(dB + now + s * W, load(dB + now + s * W) + dh_s * dtx_t);
      carry[s] = load(decay + now + s * W) * dh_s;
      const vf q = carry[s] * load(history + now + s * W);
      total_a += q * load(A + s * W);
      total_b += dh_s * b_s;
      store(dA + s * W, load(dA + s * W) + q * dt_t);
    }
    store(sum_a + t * W, total_a);
    store(sum_b + t * W, total_b);
  }
#pragma GCC unroll 16
  for (int s = 0; s < NS; ++s) store(dh + s * W, carry[s]);
}

void backward_chunk(int64_t tokens, int64_t states, const float* A, float* dh, float* dA, const float* dt,
                    const float* dtx, const float* dy, const Operand& B, const Operand& C, const float* decay,
                    const float* history, float* sum_a, float* sum_b, float* dB, float* dC) {
  with_layout(B, C, [&](auto lanes_b, auto lanes_c) {
    constexpr bool kB = decltype(lanes_b)::value, kC = decltype(lanes_c)::value;
    int64_t s = 0;
    for (; s + kStates <= states; s += kStates)
      backward_states<kStates, kB, kC>(tokens, states, A + s * W, dh + s * W, dA + s * W, dt, dtx, dy, B, C, s,
                                       decay + s * W, history + s * W, sum_a, sum_b, dB + s * W, dC + s * W);
    for (; s < states; s += 4)
      backward_states<4, kB, kC>(tokens, states, A + s * W, dh + s * W, dA + s * W, dt, dtx, dy, B, C, s, decay + s * W,
                                 history + s * W, sum_a, sum_b, dB + s * W, dC + s * W);
  });
}

// Rows [token][states][W] of dB or dC to their partial sums.
void reduce_shared(const ScanArgs& a, const Shape& shape, const Sequence& seq, const Chunk& chunk, int64_t block,
                   int64_t groups, const float* lanes, float* partial) {
  float sums[W];
  for (int64_t i = 0; i < chunk.size; ++i) {
    const int64_t token = seq.row * a.l + chunk.token[i];
    float* out = partial + (token * shape.blocks64 + block) * groups * a.n;
    const float* in = lanes + i * shape.states * W;
    for (int64_t s = 0; s < a.n; s += W) {
      if (s + W <= shape.states) {
        sum_rows(in + s * W, sums);
      } else {
        for (int64_t k = 0; k < shape.states - s; ++k) sums[k] = sum(load(in + (s + k) * W));
      }
      for (int64_t k = 0; k < min64(W, a.n - s); ++k) out[s + k] = sums[k];
    }
  }
}

void reduce_lanes(const ScanArgs& a, const Shape& shape, const Sequence& seq, const Chunk& chunk, int64_t block,
                  const Grouping& grouping, int64_t groups, int64_t channel, int lanes_used, const float* lanes,
                  float* partial) {
  const int64_t base = grouping.of(block * kBackwardBlock);
  for (int64_t i = 0; i < chunk.size; ++i) {
    const int64_t token = seq.row * a.l + chunk.token[i];
    float* out = partial + (token * shape.blocks64 + block) * groups * a.n;
    const float* in = lanes + i * shape.states * W;
    for (int lane = 0; lane < lanes_used; ++lane)
      for (int64_t s = 0; s < a.n; ++s) out[(grouping.of(channel + lane) - base) * a.n + s] += in[s * W + lane];
  }
}

void reduce_constant(const Shape& shape, const Chunk& chunk, const float* lanes, float* sums) {
  for (int64_t i = 0; i < chunk.size; ++i)
    for (int64_t s = 0; s < shape.states * W; s += W)
      store(sums + s, load(sums + s) + load(lanes + i * shape.states * W + s));
}

// dy of the sum before the gate: dy * silu(z) * scale.
template <class TZ, class TY>
void stage_gradient(const ScanArgs& a, const Sequence& seq, const Chunk& chunk, int64_t channel, int lanes,
                    float* out) {
  for (int64_t i = 0; i < chunk.size; ++i) {
    vf dy = zero();
    if (a.dy) dy = load_lanes(a.dy.at<TY>(seq.row, chunk.token[i], channel), a.dy.s[2], lanes) * set1(a.scale);
    if (a.z) {
      const vf z = load_lanes(a.z.at<TZ>(seq.row, chunk.token[i], channel), a.z.s[2], lanes);
      dy = dy * (z * sigmoid(z));
    }
    store(out + i * W, dy);
  }
}

// dz = dy * scale * y * silu'(z), y before the gate and the scale; where asked for, scale * y * silu(z) too.
template <class TZ, class TY>
void write_dz(const ScanArgs& a, const Sequence& seq, int64_t first, int64_t blocks, int64_t width, const float* y) {
  for (int64_t t = 0; t < seq.length; ++t)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = first + block * W;
      const int lanes = int(min64(W, first + width - channel));
      const vf z = load_lanes(a.z.at<TZ>(seq.row, seq.first + t, channel), a.z.s[2], lanes);
      vf dy = zero();
      if (a.dy) dy = load_lanes(a.dy.at<TY>(seq.row, seq.first + t, channel), a.dy.s[2], lanes) * set1(a.scale);
      const vf gate = sigmoid(z);
      const vf slope = gate * (set1(1.0f) + z * (set1(1.0f) - gate));
      const vf sum = load(y + (t * blocks + block) * W);
      store_lanes(a.dz.at<TZ>(seq.row, seq.first + t, channel), a.dz.s[2], lanes, dy * sum * slope);
      if (a.y)
        store_lanes(a.y.at<TY>(seq.row, seq.first + t, channel), a.y.s[2], lanes, set1(a.scale) * sum * (z * gate));
    }
}

// dx, ddt and the sums over tokens for dD and d dt_bias.
template <class T>
void write_inputs(const ScanDirection& dir, const Sequence& seq, const Chunk& chunk, int64_t channel, int lanes,
                  const float* x, const float* dt, const float* slope, const float* dy, const float* sum_a,
                  const float* sum_b, float* dD, float* dbias) {
  const vf D = dir.D ? load_lanes(dir.D.at<float>(channel), dir.D.s[0], lanes) : zero();
  vf total_D = zero(), total_bias = zero();  // of this chunk: two short sums round less than a long one
  for (int64_t i = 0; i < chunk.size; ++i) {
    const vf x_t = load(x + i * W), dy_t = load(dy + i * W), b_t = load(sum_b + i * W);
    const vf ddt = (set1(kLn2) * load(sum_a + i * W) + x_t * b_t) * load(slope + i * W);
    const vf dx = chunk.masked[i] ? zero() : load(dt + i * W) * b_t + D * dy_t;
    total_D += dy_t * x_t;
    total_bias += ddt;
    store_lanes(dir.dx.at<T>(seq.row, chunk.token[i], channel), dir.dx.s[2], lanes, dx);
    store_lanes(dir.ddt.at<T>(seq.row, chunk.token[i], channel), dir.ddt.s[2], lanes, ddt);
  }
  store(dD, load(dD) + total_D);
  store(dbias, load(dbias) + total_bias);
}

void backward_task(const ScanArgs& a, const Shape& shape, const Partials* partials, int64_t row_group,
                   int64_t block64) {
  const int64_t first = block64 * kBackwardBlock, width = min64(kBackwardBlock, a.d - first);
  const int64_t states = shape.states, blocks = ceil_div(width, W), matrix = states * W;  // floats of one (W, n)
  int64_t longest = 0;
  const int64_t row_end = min64((row_group + 1) * kRowGroup, a.b);
  for (int64_t index = row_group * kRowGroup; index < row_end; ++index) {
    const int64_t length = Sequence(a, index).length;
    longest = length > longest ? length : longest;
  }
  const int64_t all = blocks * matrix;
  Scratch matrices(all + 2 * matrix), parameters(a.directions * 4 * all), sums(a.directions * 2 * blocks * W);
  Scratch rows(8 * kChunk * W), operands(2 * operand_floats(a)), tape((2 * kChunk + 1) * matrix);
  Scratch lanes_out(2 * kChunk * matrix), ungated(a.z ? longest * blocks * W : 0);
  float *dh = matrices.get(), *state = dh + all, *dA_chunk = state + matrix;
  float* row[8];
  for (int i = 0; i < 8; ++i) row[i] = rows.get() + i * kChunk * W;
  float *x = row[0], *dt = row[1], *dtx = row[2], *slope = row[3], *dy = row[4], *y = row[5], *sum_a = row[6],
        *sum_b = row[7];
  float *decay = tape.get(), *history = decay + kChunk * matrix;
  float *dB = lanes_out.get(), *dC = dB + kChunk * matrix;

  std::memset(parameters.get(), 0, a.directions * 4 * all * sizeof(float));
  std::memset(sums.get(), 0, a.directions * 2 * blocks * W * sizeof(float));
  for (int direction = 0; direction < a.directions; ++direction)
    for (int64_t block = 0; block < blocks; ++block) {
      const ScanDirection& dir = a.dir[direction];
      const int64_t channel = first + block * W;
      const int lanes = int(min64(W, first + width - channel));
      load_states(dir.A.at<float>(channel), dir.A, 0, a.n, lanes, kLog2e,
                  parameters.get() + direction * 4 * all + block * matrix);
    }

  for (int64_t index = row_group * kRowGroup; index < row_end; ++index) {
    const Sequence seq(a, index);
    for (int direction = 0; direction < a.directions; ++direction) {
      const ScanDirection& dir = a.dir[direction];
      const Partials& out = partials[direction];
      float *A = parameters.get() + direction * 4 * all, *dA = A + all, *dB_sum = dA + all, *dC_sum = dB_sum + all;
      const Grouping groups_B = grouping_B(a, dir), groups_C = grouping_C(a, dir);
      Operand B{operands.get(), !groups_B.shared(first, width), 0};
      Operand C{operands.get() + operand_floats(a), !groups_C.shared(first, width), 0};
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t channel = first + block * W;
        const int lanes = int(min64(W, first + width - channel));
        if (dir.dfinal_state)
          load_states(dir.dfinal_state.at<float>(index, channel), dir.dfinal_state, 1, a.n, lanes, 1.0f,
                      dh + block * matrix);
        else
          std::memset(dh + block * matrix, 0, matrix * sizeof(float));
      }
      for (int64_t k = ceil_div(seq.length, kChunk) - 1; k >= 0; --k) {
        const Chunk chunk(a, seq, index, k, dir.reverse);
        const int64_t row_floats = chunk.size * matrix;
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t channel = first + block * W;
          const int lanes = int(min64(W, first + width - channel));
          if (block == 0 || B.lanes) {
            stage_operand(a, dir.B, groups_B, seq, chunk, channel, lanes, true, B);
            std::memset(dB, 0, row_floats * sizeof(float));
          }
          if (block == 0 || C.lanes) {
            stage_operand(a, dir.C, groups_C, seq, chunk, channel, lanes, false, C);
            std::memset(dC, 0, row_floats * sizeof(float));
          }
          with_dtype(a.dtype, [&](auto in) {
            using T = decltype(in);
            stage_inputs<T>(a, dir, seq, chunk, channel, lanes, x, dt, dtx, slope);
            with_dtype(a.out_dtype, [&](auto out_type) {
              stage_gradient<T, decltype(out_type)>(a, seq, chunk, channel, lanes, dy);
            });
          });
          load_states(dir.chunk_states.at<float>(seq.row, chunk.slot, channel), dir.chunk_states, 2, a.n, lanes, 1.0f,
                      state);
          std::memcpy(history, state, matrix * sizeof(float));
          const vf D = dir.D ? load_lanes(dir.D.at<float>(channel), dir.D.s[0], lanes) : zero();
          for (int64_t i = 0; i < chunk.size; ++i) store(y + i * W, D * load(x + i * W));
          std::memset(sum_a, 0, chunk.size * W * sizeof(float));
          std::memset(sum_b, 0, chunk.size * W * sizeof(float));
          std::memset(dA_chunk, 0, matrix * sizeof(float));
          float *A_block = A + block * matrix, *dh_block = dh + block * matrix, *dA_block = dA + block * matrix;
          scan_chunk<true>(chunk.size, states, A_block, state, dt, dtx, B, C, y, decay, history + matrix);
          backward_chunk(chunk.size, states, A_block, dh_block, dA_chunk, dt, dtx, dy, B, C, decay, history, sum_a,
                         sum_b, dB, dC);
          for (int64_t s = 0; s < matrix; s += W) store(dA_block + s, load(dA_block + s) + load(dA_chunk + s));
          float* sum_D = sums.get() + (direction * blocks + block) * 2 * W;
          with_dtype(a.dtype, [&](auto in) {
            write_inputs<decltype(in)>(dir, seq, chunk, channel, lanes, x, dt, slope, dy, sum_a, sum_b, sum_D,
                                       sum_D + W);
          });
          if (a.z)
            for (int64_t i = 0; i < chunk.size; ++i) {
              float* total = ungated.get() + ((chunk.token[i] - seq.first) * blocks + block) * W;
              store(total, direction == 0 ? load(y + i * W) : load(total) + load(y + i * W));
            }
          if (dir.constant_B)
            reduce_constant(shape, chunk, dB, dB_sum + block * matrix);
          else if (B.lanes)
            reduce_lanes(a, shape, seq, chunk, block64, groups_B, out.groups_B, channel, lanes, dB, out.dB);
          if (dir.constant_C)
            reduce_constant(shape, chunk, dC, dC_sum + block * matrix);
          else if (C.lanes)
            reduce_lanes(a, shape, seq, chunk, block64, groups_C, out.groups_C, channel, lanes, dC, out.dC);
        }
        if (!B.lanes) reduce_shared(a, shape, seq, chunk, block64, out.groups_B, dB, out.dB);
        if (!C.lanes) reduce_shared(a, shape, seq, chunk, block64, out.groups_C, dC, out.dC);
      }
      if (dir.dinitial_state)
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t channel = first + block * W;
          const int lanes = int(min64(W, first + width - channel));
          store_states(dir.dinitial_state.at<float>(index, channel), dir.dinitial_state, 1, a.n, lanes,
                       dh + block * matrix);
        }
    }
    if (a.z)
      with_dtype(a.dtype, [&](auto in) {
        with_dtype(a.out_dtype, [&](auto out_type) {
          write_dz<decltype(in), decltype(out_type)>(a, seq, first, blocks, width, ungated.get());
        });
      });
  }

  const View packed{nullptr, {a.n, 1, 0, 0}};
  for (int direction = 0; direction < a.directions; ++direction)
    for (int64_t block = 0; block < blocks; ++block) {
      const ScanDirection& dir = a.dir[direction];
      const Partials& out = partials[direction];
      const int64_t channel = first + block * W, slot = row_group * a.d + channel;
      const int lanes = int(min64(W, first + width - channel));
      const float* dA = parameters.get() + direction * 4 * all + all + block * matrix;
      const float* sum_D = sums.get() + (direction * blocks + block) * 2 * W;
      store_states(out.dA + slot * a.n, packed, 0, a.n, lanes, dA);
      if (dir.constant_B) store_states(out.dB + slot * a.n, packed, 0, a.n, lanes, dA + all);
      if (dir.constant_C) store_states(out.dC + slot * a.n, packed, 0, a.n, lanes, dA + 2 * all);
      store_lanes(out.dD + slot, 1, lanes, load(sum_D));
      store_lanes(out.dbias + slot, 1, lanes, load(sum_D + W));
    }
}

// dB or dC of the tokens [begin, end): blocks of channels added in order.
template <class T>
void gather_tokens(const ScanArgs& a, const Shape& shape, const Grouping& grouping, int64_t groups,
                   const float* partial, const View& view, int64_t begin, int64_t end) {
  const int64_t all = grouping.of(a.d - 1) + 1;
  Scratch total(all * a.n);
  for (int64_t token = begin; token < end; ++token) {
    std::memset(total.get(), 0, all * a.n * sizeof(float));
    for (int64_t block = 0; block < shape.blocks64; ++block) {
      const int64_t first = block * kBackwardBlock, width = min64(kBackwardBlock, a.d - first);
      const float* in = partial + (token * shape.blocks64 + block) * groups * a.n;
      float* out = total.get() + grouping.of(first) * a.n;
      for (int64_t i = 0; i < grouping.count(first, width) * a.n; ++i) out[i] += in[i];
    }
    for (int64_t group = 0; group < all; ++group)
      for (int64_t s = 0; s < a.n; ++s)
        from_float(total.get()[group * a.n + s], *view.at<T>(token / a.l, token % a.l, group, s));
  }
}

// A parameter's gradient: groups of sequences added in order; `stride` floats from one to the next.
void gather_rows(int64_t row_groups, int64_t stride, int64_t begin, int64_t end, const float* partial, float* out) {
  for (int64_t i = begin; i < end; ++i) {
    float total = 0.0f;
    for (int64_t group = 0; group < row_groups; ++group) total += partial[group * stride + i];
    out[i] = total;
  }
}

}  // namespace

void scan_bwd(const ScanArgs& a) {
  Shape shape;
  shape.states = padded_states(a.n);
  shape.blocks64 = ceil_div(a.d, kBackwardBlock);
  shape.tokens = (a.cu_seqlens ? 1 : a.b) * a.l;
  shape.row_groups = ceil_div(a.b, kRowGroup);
  const int64_t rows = shape.tokens * shape.blocks64 * a.n, vector = shape.row_groups * a.d, matrix = vector * a.n;
  Partials partials[2];
  int64_t floats[2][2], total = 0;
  for (int i = 0; i < a.directions; ++i) {
    partials[i].groups_B = most_groups(a, grouping_B(a, a.dir[i]));
    partials[i].groups_C = most_groups(a, grouping_C(a, a.dir[i]));
    floats[i][0] = a.dir[i].constant_B ? matrix : rows * partials[i].groups_B;
    floats[i][1] = a.dir[i].constant_C ? matrix : rows * partials[i].groups_C;
    total += floats[i][0] + floats[i][1] + matrix + 2 * vector;
  }
  Scratch memory(total);
  float* next = memory.get();
  for (int i = 0; i < a.directions; ++i) {
    Partials& p = partials[i];
    p.dB = next;
    p.dC = p.dB + floats[i][0];
    p.dA = p.dC + floats[i][1];
    p.dD = p.dA + matrix;
    p.dbias = p.dD + vector;
    next = p.dbias + vector;
    if (p.groups_B > 1) std::memset(p.dB, 0, floats[i][0] * sizeof(float));  // lanes add to these
    if (p.groups_C > 1) std::memset(p.dC, 0, floats[i][1] * sizeof(float));
  }
  parallel_for(shape.row_groups * shape.blocks64, threads_for(a),
               [&](int64_t task) { backward_task(a, shape, partials, task / shape.blocks64, task % shape.blocks64); });
  const int64_t span = 256;
  for (int i = 0; i < a.directions; ++i) {
    const ScanDirection& dir = a.dir[i];
    const Partials& p = partials[i];
    parallel_for(ceil_div(shape.tokens, span), threads_for(a), [&](int64_t task) {
      const int64_t begin = task * span, end = min64(begin + span, shape.tokens);
      with_dtype(a.dtype, [&](auto in) {
        using T = decltype(in);
        if (!dir.constant_B) gather_tokens<T>(a, shape, grouping_B(a, dir), p.groups_B, p.dB, dir.dB, begin, end);
        if (!dir.constant_C) gather_tokens<T>(a, shape, grouping_C(a, dir), p.groups_C, p.dC, dir.dC, begin, end);
      });
    });
    parallel_for(ceil_div(a.d, span), threads_for(a), [&](int64_t task) {
      const int64_t begin = task * span, end = min64(begin + span, a.d);
      gather_rows(shape.row_groups, a.d * a.n, begin * a.n, end * a.n, p.dA, dir.dA.at<float>());
      if (dir.constant_B) gather_rows(shape.row_groups, a.d * a.n, begin * a.n, end * a.n, p.dB, dir.dB.at<float>());
      if (dir.constant_C) gather_rows(shape.row_groups, a.d * a.n, begin * a.n, end * a.n, p.dC, dir.dC.at<float>());
      if (dir.dD) gather_rows(shape.row_groups, a.d, begin, end, p.dD, dir.dD.at<float>());
      if (dir.ddt_bias) gather_rows(shape.row_groups, a.d, begin, end, p.dbias, dir.ddt_bias.at<float>());
    });
  }
}

}  // namespace endomamba::ENDOMAMBA_LEVEL
