// Arguments of a Mamba mixer between its two large projections, one direction or both.
#pragma once

#include <cstdint>

#include "view.h"

namespace endomamba {

// One direction.  Vectors, taps, A, D fp32; the two matrices in the dtype of x, each row adjacent.
struct MixerDirection {
  View conv_weight, conv_bias;  // (d,w), (d,)
  View x_proj, dt_proj;         // (r + 2n, d), (d,r)
  View dt_bias, A, D;           // (d,), (d,n), (d,)
  View chunk_states;            // (b,chunks,d,n) fp32, where a backward is to come: the state before each chunk
  View u, projected;            // scratch, the kernel's own: (b,l,d) in the dtype of x, (b,l,projected_floats) fp32
};

struct MixerArgs {
  int64_t b = 0, l = 0, d = 0, n = 0, w = 0, r = 0;
  int dtype = 0, threads = 1;
  int directions = 0;  // 2: the second one walks backwards; no states then
  bool log_A = false;  // A holds log(-A)
  float scale = 1.0f;  // of the sum over the directions
  View x, z, y;        // (b,l,d)
  View initial_conv_state, final_conv_state;  // (b,w-1,d) fp32; both may be the same memory
  View initial_state, final_state;            // (b,d,n) fp32, likewise
  MixerDirection dir[2];
};

}  // namespace endomamba
