"""The weights of the package: that they are what they say, and that they recognise what they were trained to."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from endomamba.models import (
    create_model,
    described,
    list_pretrained,
    load_checkpoint,
    load_pretrained,
    pretrained_path,
    provenance,
)
from endomamba.stream import FrameStream
from endomamba.synthetic import PHASES, VARIANTS, SyntheticVideo

NAME = "nano-phases"


def test_small_and_of_known_origin():
    assert NAME in list_pretrained()
    path = pretrained_path(NAME)
    assert path.stat().st_size < 2 * 2**20
    with safe_open(path, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118  no mapping
    model = load_pretrained(NAME)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000 and not model.training
    trained = provenance(path)
    assert described(path).classes == PHASES
    assert trained["generator"] == {name: VARIANTS[name].digest() for name in ("base", "teacher")}
    scored = trained["accuracy by frame on test videos"]
    assert set(scored) == set(VARIANTS) - {"teacher"}
    with pytest.raises(ValueError, match=f"no weights 'nothing' in the package; there are {NAME}"):
        load_pretrained("nothing")


def test_another_model_does_not_take_them():
    with pytest.raises(ValueError, match="does not fit this model"):
        load_checkpoint(
            create_model("endomamba", embed_dim=64, depth=2, img_size=128, num_classes=8), pretrained_path(NAME)
        )


def agreement(model, frames, truth, forget=0):
    """Of a stream with the truth; forget: frames after which its memory is taken away."""
    stream, right = FrameStream(model), 0
    for t, (frame, true) in enumerate(zip(frames, truth)):
        if forget and t % forget == 0:
            stream.reset(0)
        right += int(stream(torch.from_numpy(frame)).argmax()) == true
    return right / len(truth)


def test_it_recognises_the_phases_of_a_variant_it_has_never_seen():
    """On a video that nothing was chosen by; a memory that is taken away, or random weights, must show."""
    video = SyntheticVideo("other-motion", split="test", seed=50, frames=600, size=128, every=4)
    drawn = [video[t] for t in range(len(video))]
    frames, truth = [rgb for rgb, _ in drawn], [PHASES.index(row["phase"]) for _, row in drawn]
    commonest = max(truth.count(phase) for phase in truth) / len(truth)
    model = load_pretrained(NAME)
    trained = agreement(model, frames, truth)
    assert trained > max(0.5, commonest + 0.1)
    assert agreement(model, frames, truth, forget=1) < trained - 0.1
    torch.manual_seed(0)
    random = create_model(described(pretrained_path(NAME)).model, **described(pretrained_path(NAME)).options).eval()
    assert agreement(random, frames[::4], truth[::4]) < trained - 0.2
