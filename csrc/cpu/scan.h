// Arguments of the selective scan kernels, one or two directions.
#pragma once

#include <cstdint>

#include "view.h"

namespace endomamba {

constexpr int64_t kChunk = 64;         // tokens between two saved states
constexpr int64_t kForwardBlock = 32;  // channels of one forward task
constexpr int64_t kBackwardBlock = 64; // channels of one backward task: one partial sum of dB and dC each
constexpr int64_t kRowGroup = 8;  // sequences of one backward task: one partial sum of dA, dD and d dt_bias each

// One direction.  Views: x, dt (b,l,d); B, C (b,l,g,n); A (d,n), D, dt_bias (d,) and states (b,d,n) fp32.
struct ScanDirection {
  View x, dt, A, B, C, D, dt_bias, initial_state;
  View final_state, chunk_states;  // chunk_states (rows, chunks, d, n), contiguous
  bool reverse = false;
  int64_t groups_B = 1, groups_C = 1;  // channel c reads group c / (d / groups)
  bool constant_B = false, constant_C = false;  // (d,n): as many groups as channels, the same for every token
  // backward
  View dfinal_state, dx, ddt, dB, dC, dA, dD, ddt_bias, dinitial_state;
};

struct ScanArgs {
  int64_t b = 0, l = 0, d = 0, n = 0;  // b counts sequences; packed: x has one row and cu_seqlens b + 1 entries
  int64_t frames = 0;  // > 0: step k visits token (k % frames) * (l / frames) + k / frames
  View cu_seqlens;  // int64, contiguous
  int dtype = 0, out_dtype = 0;
  int directions = 0, threads = 1;
  bool softplus = true;
  float scale = 1.0f;
  ScanDirection dir[2];  // the first `directions` count
  View z, y, mask;  // mask (b,l) of bytes; y of a backward: the gated output again, where asked for
  View dy, dz;
};

}  // namespace endomamba
