// The table of kernels of one instruction-set level.  dispatch.cpp picks the best level the machine has, once, at load.
#pragma once

#include "add_rms_norm.h"
#include "causal_conv1d.h"
#include "mixer.h"
#include "scan.h"

namespace endomamba {

struct Kernels {
  const char* level;
  void (*scan_fwd)(const ScanArgs&);
  void (*scan_bwd)(const ScanArgs&);
  void (*conv_fwd)(const ConvArgs&);
  void (*conv_bwd)(const ConvArgs&);
  void (*norm_fwd)(const NormArgs&);
  void (*norm_bwd)(const NormArgs&);
  void (*mixer_fwd)(const MixerArgs&);
};

const Kernels& kernels();

}  // namespace endomamba
