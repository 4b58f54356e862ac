from .api import BlockWeights, frame_blocks, pack_block

__all__ = ["BlockWeights", "frame_blocks", "pack_block"]
