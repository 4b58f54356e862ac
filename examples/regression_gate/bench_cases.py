"""The gate's cases of a project that imports endomamba's ops: one of the project's own functions, at two lengths."""

from functools import partial


def cases(device):
    return [
        {
            "op": "smooth",
            "shape": f"b1-l{tokens}-d64",
            "backend": device,
            "tolerance": 2e-5,
            "make": partial(make, device, tokens),
        }
        for tokens in (49, 197)
    ]


def make(device, tokens):
    """(call, truth): what is measured, and the same from inputs in fp64, which endomamba's reference computes."""
    import torch
    from downstream import smooth  # from the commit that is measured

    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, 64, generator=random).to(device)

    def call():
        with torch.inference_mode():
            return smooth(x)

    def truth():
        with torch.inference_mode():
            return smooth(x.double())

    return call, truth
