// All blocks of a frame in one cooperative kernel: what endomamba/ops/frame_blocks does in four kernels a block.
#pragma once

#include <cstdint>

namespace endomamba::cuda {

constexpr int kFrameBlocks = 48;  // at most; their pointers are arguments of the kernel

// A block's weights as `pack_block` leaves them: s directions, c channels, d = 2 c inner ones, r the padded dt rank,
// 16 states, a conv 4 wide.  What has no type here is of the dtype.
struct FrameBlock {
  const void* in_proj;             // (2 d, c), times the norm's weight
  const float *conv, *conv_bias;   // (s, d, 4), (s, d)
  const void *x_proj, *dt_proj;    // (s, r + 32, d), (s, d, r)
  const float *dt_bias, *A, *D;    // (s, d), (s, d, 16), (s, d)
  const void* out_proj;            // (c, d)
};

struct FrameArgs {
  FrameBlock block[kFrameBlocks];
  int dtype;  // 0: fp32, 1: bf16
  int blocks, b, l, c, directions;
  float eps;
  float* residual;                 // (b, l, c), in place
  float *conv_state, *ssm_state;   // (blocks, b, 3, d), (blocks, b, d, 16), in place; of one direction only
  void* memory;                    // frame_memory(...) bytes; the first four are 0
};

int64_t frame_memory(int dtype, int64_t b, int64_t l, int64_t c, int64_t directions);
// Most tokens of a frame for c channels, 0: not these.  The least is 3, what the conv keeps.
int frame_most_tokens(int dtype, int64_t c);
// The dt rank, padded, that the kernel has for c channels.
int frame_rank(int64_t c);
// Bytes of shared memory that a block of threads needs; 0: not these channels.
int64_t frame_shared(int dtype, int64_t c, int64_t directions);
// grid: blocks of threads, at most as many as the GPU has multiprocessors.
void frame_blocks(const FrameArgs& args, int grid, void* stream);

}  // namespace endomamba::cuda
