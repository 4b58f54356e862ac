// The CUDA convolutions' launchers: the arguments of the CPU's (csrc/cpu/causal_conv1d.h), pointers on the device.
#pragma once

#include "cpu/causal_conv1d.h"

namespace endomamba::cuda {

// What they take of ConvArgs: w = 4, channels of x, dx and dy next to each other, the rest contiguous; no
// cu_seqlens.  Both return when the kernel is queued on `stream` (a cudaStream_t).
void conv_forward(const ConvArgs& args, void* stream);

// parts: fp32 (workers, directions, w + 1, d), what each worker adds to dweight (w rows) and dbias; the caller adds
// them.
void conv_backward(const ConvArgs& args, int64_t workers, float* parts, void* stream);
int64_t conv_pieces(int64_t b, int64_t l);  // that workers share; more workers than pieces would leave some idle

}  // namespace endomamba::cuda
