// Compiled once per level: the level's row of function pointers.
#include "kernels.h"

#define ENDOMAMBA_STRING_(x) #x
#define ENDOMAMBA_STRING(x) ENDOMAMBA_STRING_(x)

namespace endomamba::ENDOMAMBA_LEVEL {

void scan_fwd(const ScanArgs&);
void scan_bwd(const ScanArgs&);
void conv_fwd(const ConvArgs&);
void conv_bwd(const ConvArgs&);
void norm_fwd(const NormArgs&);
void norm_bwd(const NormArgs&);
void mixer_fwd(const MixerArgs&);

extern const Kernels table;
const Kernels table = {
    ENDOMAMBA_STRING(ENDOMAMBA_LEVEL), scan_fwd, scan_bwd, conv_fwd, conv_bwd, norm_fwd, norm_bwd, mixer_fwd};

}  // namespace endomamba::ENDOMAMBA_LEVEL
