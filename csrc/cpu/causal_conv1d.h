// Arguments of the causal convolution kernels, one or two directions.
#pragma once

#include <cstdint>

#include "view.h"

namespace endomamba {

constexpr int64_t kConvBlock = 64;     // channels of one task
constexpr int64_t kConvRowGroup = 8;   // sequences of one backward task, at least: one partial sum of dweight each
constexpr int64_t kConvGroups = 128;   // and at most so many groups, which depends on b only

// One direction's taps.  weight (d,w), bias (d,), gradients alike, fp32; y (b,l,d) in x's dtype.
struct ConvDirection {
  View weight, bias, y;
  View dy, dweight, dbias;  // backward; dy absent: zero
};

struct ConvArgs {
  int64_t b = 0, l = 0, d = 0, w = 0;   // b counts sequences; packed: x has one row and cu_seqlens b + 1 entries
  int64_t frames = 0;                   // > 0: step k visits token (k % frames) * (l / frames) + k / frames
  View cu_seqlens;                      // int64, contiguous
  int dtype = 0, threads = 1;
  int directions = 0;                   // 2: the second one walks backwards; no states then
  bool silu = false, reverse = false;
  View x;                               // (b,l,d)
  View initial_state, final_state;      // (b,w-1,d) fp32
  View dx, dfinal_state, dinitial_state;
  ConvDirection dir[2];
};

}  // namespace endomamba
