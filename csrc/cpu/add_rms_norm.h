// Arguments of the fused add and norm kernels.
#pragma once

#include <cstdint>

#include "view.h"

namespace endomamba {

constexpr int64_t kNormRowGroup = 8;  // rows of one backward task, at least: one partial sum of dweight and dbias each
constexpr int64_t kNormGroups = 128;  // and at most so many groups, which depends on b * m only

struct NormArgs {
  int64_t b = 0, m = 0, c = 0;  // b * m rows of c channels; a row scale belongs to m rows
  int dtype = 0, threads = 1;
  bool layer_norm = false;  // else root mean square
  float eps = 0.0f;
  View x, normed;  // (b,m,c) of dtype
  View residual, new_residual;  // (b,m,c) fp32
  View weight, bias, row_scale;  // (c,), (c,), (b,) fp32
  View mean, rstd;  // (b * m,) fp32; mean for the layer norm only; the forward writes them where they are given
  // backward: every one may be absent
  View dnormed, dnew_residual, dx, dweight, dbias, dresidual, drow_scale;
};

}  // namespace endomamba
