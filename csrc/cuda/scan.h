// The CUDA scans' launchers: the arguments of the CPU's (csrc/cpu/scan.h), with pointers on the device.
#pragma once

#include "cpu/scan.h"

namespace endomamba::cuda {

// Both return when the kernel is queued on `stream` (a cudaStream_t) and throw what speaks against a launch.
//
// What they take of ScanArgs: n = 16, one group of B and C, channels of x, dt, z, y next to each other, states and
// parameters contiguous; no cu_seqlens, no mask.
//
// scan_walk: one warp walks 16 channels from end to end.  park: fp32 (b,l,d), scratch of a call of two directions;
// null where `walk_shared` says that shared memory will do.
void scan_walk(const ScanArgs& args, float* park, void* stream);
bool walk_shared(int64_t l);

// scan_frame: time cut in pieces of 8 or 16 tokens (`piece`) that are walked at the same time, for one frame or a few.
// No frames, no chunk states; `frame_tokens` is the most it takes.
void scan_frame(const ScanArgs& args, int piece, void* stream);
int frame_tokens(int piece);

}  // namespace endomamba::cuda
