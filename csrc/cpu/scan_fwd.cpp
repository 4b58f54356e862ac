// Selective scan, forward, one or two directions.
//
// Task (sequence, 32 channels): walks the tokens in chunks of 64, W channels at a time, all states in registers.
// Two directions: the first leaves its y in scratch (tokens x 32 fp32), the second adds, gates and writes: x, dt, B, C
// of each direction and z are read once, y is written once, nothing is flipped.
// Traffic: (2 + 1 + 1) * b*l*d elements for one direction with a gate, (4 + 1 + 1) for two; B and C 2*b*l*n for each
// block of 32 channels, from cache after the first.
// Numerics: fp32 state and sums; A arrives times log2(e), so a decay is one exp2; y = D x + <C, h> summed in two
// chains. A row's bits depend on its own inputs and on the instruction set only: not on b, on the split or on the
// threads.
#include "parallel.h"
#include "scan_common.h"

namespace endomamba::ENDOMAMBA_LEVEL {

namespace {

template <class TZ, class TY>
void write_output(const ScanArgs& a, const Sequence& seq, const Chunk& chunk, int64_t channel, int lanes,
                  const float* y) {
  const vf scale = set1(a.scale);
  for (int64_t i = 0; i < chunk.size; ++i) {
    vf value = load(y + i * W) * scale;
    if (a.z) {
      const vf z = load_lanes(a.z.at<TZ>(seq.row, chunk.token[i], channel), a.z.s[2], lanes);
      value = value * (z * sigmoid(z));
    }
    store_lanes(a.y.at<TY>(seq.row, chunk.token[i], channel), a.y.s[2], lanes, value);
  }
}

void forward_task(const ScanArgs& a, int64_t index, int64_t first) {
  const Sequence seq(a, index);
  const int64_t states = padded_states(a.n), width = min64(kForwardBlock, a.d - first), blocks = ceil_div(width, W);
  Scratch matrices(2 * blocks * states * W), rows(4 * kChunk * W);
  Scratch operands(2 * operand_floats(a)), total(a.directions == 2 ? seq.length * blocks * W : 0);
  float *A = matrices.get(), *h = A + blocks * states * W;
  float *x = rows.get(), *dt = x + kChunk * W, *dtx = dt + kChunk * W, *y = dtx + kChunk * W;

  for (int direction = 0; direction < a.directions; ++direction) {
    const ScanDirection& dir = a.dir[direction];
    const Grouping groups_B = grouping_B(a, dir), groups_C = grouping_C(a, dir);
    Operand B{operands.get(), !groups_B.shared(first, width), 0};
    Operand C{operands.get() + operand_floats(a), !groups_C.shared(first, width), 0};
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = first + block * W;
      const int lanes = int(min64(W, first + width - channel));
      load_states(dir.A.at<float>(channel), dir.A, 0, a.n, lanes, kLog2e, A + block * states * W);
      float* state = h + block * states * W;
      if (dir.initial_state)
        load_states(dir.initial_state.at<float>(index, channel), dir.initial_state, 1, a.n, lanes, 1.0f, state);
      else
        std::memset(state, 0, states * W * sizeof(float));
    }
    for (int64_t k = 0; k < ceil_div(seq.length, kChunk); ++k) {
      const Chunk chunk(a, seq, index, k, dir.reverse);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t channel = first + block * W;
        const int lanes = int(min64(W, first + width - channel));
        if (block == 0 || B.lanes) stage_operand(a, dir.B, groups_B, seq, chunk, channel, lanes, true, B);
        if (block == 0 || C.lanes) stage_operand(a, dir.C, groups_C, seq, chunk, channel, lanes, false, C);
        with_dtype(a.dtype, [&](auto type) {
          stage_inputs<decltype(type)>(a, dir, seq, chunk, channel, lanes, x, dt, dtx, nullptr);
        });
        float* state = h + block * states * W;
        if (dir.chunk_states)
          store_states(dir.chunk_states.at<float>(seq.row, chunk.slot, channel), dir.chunk_states, 2, a.n, lanes,
                       state);

        // total is [step of the forward walk][block][W]: the other direction finds the token from the far end.
        const auto total_at = [&](int64_t i) {
          const int64_t step = k * kChunk + i;
          return total.get() + ((dir.reverse ? seq.length - 1 - step : step) * blocks + block) * W;
        };
        const vf D = dir.D ? load_lanes(dir.D.at<float>(channel), dir.D.s[0], lanes) : zero();
        for (int64_t i = 0; i < chunk.size; ++i) {
          const vf skip = D * load(x + i * W);
          store(y + i * W, direction == 1 ? skip + load(total_at(i)) : skip);
        }
        scan_chunk<false>(chunk.size, states, A + block * states * W, state, dt, dtx, B, C, y, nullptr, nullptr);
        if (direction + 1 < a.directions) {
          for (int64_t i = 0; i < chunk.size; ++i) store(total_at(i), load(y + i * W));
        } else {
          with_dtype(a.dtype, [&](auto in) {
            with_dtype(a.out_dtype,
                       [&](auto out) { write_output<decltype(in), decltype(out)>(a, seq, chunk, channel, lanes, y); });
          });
        }
      }
    }
    if (dir.final_state)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t channel = first + block * W;
        const int lanes = int(min64(W, first + width - channel));
        store_states(dir.final_state.at<float>(index, channel), dir.final_state, 1, a.n, lanes, h + block * states * W);
      }
  }
}

}  // namespace

void scan_fwd(const ScanArgs& a) {
  const int64_t blocks = ceil_div(a.d, kForwardBlock);
  parallel_for(a.b * blocks, threads_for(a),
               [&](int64_t task) { forward_task(a, task / blocks, task % blocks * kForwardBlock); });
}

}  // namespace endomamba::ENDOMAMBA_LEVEL
