"""Networks over `endomamba.ops`: create them by name, load published weights, run clips or streams.

model = create_model("endomamba_small", num_classes=7)
report = load_checkpoint(model, "endomamba_small_phase.pth")
logits = model(video)                            # (b, 3, t, h, w) -> (b, t, classes)

state = model.init_state(batch_size=1)
logits, state = model.step(frames, state)        # any number of frames >= 1

model = load_pretrained("nano-phases")           # a small trained one that comes with the package

`endomamba_*` are the subject; `attention_twin_*` and `endofm` have the same calls and are there to compare with.
`videomamba_*` read whole clips.  `pretrain_endomamba_*` learn from unlabelled video and a `Teacher` (pretrain.py).
"""

from ._registry import create_model, list_models, register_model
from .attention_twin import AttentionTwin, AttentionTwinConfig, CacheState
from .checkpoint import CheckpointError, LoadReport, load_checkpoint
from .config import EndoMambaConfig
from .described import Described, describe, described
from .endofm import EndoFM, EndoFMConfig, WindowState
from .endomamba import EndoMamba
from .framewise import FrameWise
from .heads import ClassificationHead, LocalisationHead, PhaseHead, SegmentationHead
from .packed import Packed, packed
from .pretrain import Pictures, PretrainConfig, PretrainEndoMamba, PretrainLoss
from .pretrained import list_pretrained, load_pretrained, pretrained_path, provenance
from .state import StreamState
from .teacher import Teacher, load_teacher
from .videomamba import VideoMamba, VideoMambaConfig

__all__ = [
    "AttentionTwin",
    "AttentionTwinConfig",
    "CacheState",
    "CheckpointError",
    "ClassificationHead",
    "Described",
    "EndoFM",
    "EndoFMConfig",
    "EndoMamba",
    "EndoMambaConfig",
    "FrameWise",
    "LoadReport",
    "LocalisationHead",
    "Packed",
    "PhaseHead",
    "Pictures",
    "PretrainConfig",
    "PretrainEndoMamba",
    "PretrainLoss",
    "SegmentationHead",
    "StreamState",
    "Teacher",
    "VideoMamba",
    "VideoMambaConfig",
    "WindowState",
    "create_model",
    "describe",
    "described",
    "list_models",
    "list_pretrained",
    "load_checkpoint",
    "load_pretrained",
    "load_teacher",
    "packed",
    "pretrained_path",
    "provenance",
    "register_model",
]
