"""The ops: one folder each, the same skeleton in all (see CONTRIBUTING.md)."""

from ._backend import backend_info, explain
from ._nvtx import nvtx_ranges, start_if_asked
from .add_rms_norm import add_layer_norm, add_rms_norm
from .bidirectional_scan import bidirectional_scan
from .causal_conv1d import bidirectional_conv1d, causal_conv1d
from .frame_blocks import BlockWeights, frame_blocks, pack_block
from .frame_embed import frame_embed
from .frame_head import frame_head
from .frame_resize import frame_resize
from .frame_settle import frame_settle
from .frame_step import frame_step
from .mixer_inner import mixer_inner
from .selective_scan import selective_scan

__all__ = [
    "BlockWeights",
    "add_layer_norm",
    "add_rms_norm",
    "backend_info",
    "bidirectional_conv1d",
    "bidirectional_scan",
    "causal_conv1d",
    "explain",
    "frame_blocks",
    "frame_embed",
    "frame_head",
    "frame_resize",
    "frame_settle",
    "frame_step",
    "mixer_inner",
    "nvtx_ranges",
    "pack_block",
    "selective_scan",
]

start_if_asked()  # after every op has registered its back ends
