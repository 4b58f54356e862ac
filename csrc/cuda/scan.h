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

// scan_frame: time cut in pieces of 8 tokens that are walked at the same time, for one frame or a few on a GPU of so
// many multiprocessors.  No frames, no chunk states; at most `frame_tokens` tokens, fewer where the GPU has less shared
// memory than `frame_bytes` for them.
void scan_frame(const ScanArgs& args, int64_t processors, void* stream);
int frame_tokens();
int64_t frame_bytes(int64_t b, int64_t l, int64_t d, int directions, int64_t processors);

// scan_back: the backward of direction `which`, and dB, dC from the blocks' sums.  All memory is fp32, on the device;
// sizes in elements.  Takes what the walk takes, and its chunk states.
struct BackMemory {
  float *scratch, *sums, *parts;
  float* park;  // (b,l,d), of a call of two directions: the first one parks, the second one adds; else null
  // 1 to b; each leaves one row of `parts`: dA (d,16), dD (d,), ddt_bias (d,) and up to 12 unused bytes
  int64_t workers;
  bool parks;
};
struct BackSizes {
  int64_t blocks, scratch, sums, parts;
};
BackSizes scan_back_sizes(int64_t b, int64_t l, int64_t d, int64_t workers);
void scan_back(const ScanArgs& args, int which, const BackMemory& memory, void* stream);

}  // namespace endomamba::cuda
