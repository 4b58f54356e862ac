"""Heads for masks and landmarks: sizes and names as published, any backbone, streams."""

from __future__ import annotations

import pytest
import torch

from endomamba.frame_stream import FrameStream
from endomamba.models import CheckpointError, FrameWise, PhaseHead, create_model, load_checkpoint, packed

SMALL = {"img_size": 32, "embed_dim": 16, "depth": 4, "d_state": 4, "head_width": 32, "dt_init": "mamba"}
MASKS = {**SMALL, "num_classes": 2, "head": "segmentation"}
POINTS = {**SMALL, "num_classes": 5, "head": "localisation"}


def seeded(options, name="endomamba"):
    torch.manual_seed(0)
    model = create_model(name, **options).eval()
    with torch.no_grad():
        for module in model.modules():  # as after training: statistics that are not 0 and 1
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize(
    "head, classes, parameters, names",
    [
        ("segmentation", 2, 28_568_930, {"head.decoder.conv_more.0.weight": (512, 384, 3, 3),
                                        "head.decoder.blocks.0.conv1.0.weight": (256, 512, 3, 3),
                                        "head.decoder.blocks.3.conv2.1.running_mean": (16,),
                                        "head.segmentation_head.0.weight": (2, 16, 3, 3)}),
        ("localisation", 5, 25_392_148, {"head.vis_head.head.0.weight": (512, 384),
                                        "head.vis_head.head.4.weight": (10, 512),
                                        "head.pos_head.head.2.weight": (512, 512)}),
    ],
)  # fmt: skip
def test_published_sizes(head, classes, parameters, names):
    with torch.device("meta"):
        model = create_model("endomamba_small", num_classes=classes, head=head)
    assert sum(p.numel() for p in model.parameters()) == parameters
    weights = model.state_dict()
    assert {name: tuple(weights[name].shape) for name in names} == names


def test_the_decoder_by_hand():
    """Written out with functions, from patches in rows to the difference of two logits."""
    from torch.nn import functional as F

    model, video = seeded(MASKS), torch.randn(1, 3, 2, 32, 32)
    w = model.head.state_dict()

    def conv(x, name):
        x = F.conv2d(x, w[f"{name}.0.weight"], padding=1)
        stats = (w[f"{name}.1.running_mean"], w[f"{name}.1.running_var"])
        return F.relu(F.batch_norm(x, *stats, w[f"{name}.1.weight"], w[f"{name}.1.bias"]))

    tokens = model.forward_features(video)[0, :, 1:]  # (t, 4, c): without cls
    x = torch.stack([torch.stack([tokens[:, 2 * row + column] for column in range(2)], -1) for row in range(2)], -2)
    x = conv(x, "decoder.conv_more")
    for i in range(4):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = conv(conv(x, f"decoder.blocks.{i}.conv1"), f"decoder.blocks.{i}.conv2")
    x = F.conv2d(x, w["segmentation_head.0.weight"], w["segmentation_head.0.bias"], padding=1)
    torch.testing.assert_close(model(video)["mask"][0], x[:, 1] - x[:, 0], rtol=1e-5, atol=1e-5)


def test_landmarks_by_hand():
    model, video = seeded(POINTS), torch.randn(1, 3, 2, 32, 32)
    frame = model.forward_features(video).mean(2)
    seen, place = model.head.vis_head.head, model.head.pos_head.head
    logits = seen[4](seen[2](seen[0](frame))).view(1, 2, 5, 2)
    xy = place[4](place[2](place[0](frame).relu()).relu()).view(1, 2, 5, 2)
    want = torch.cat((logits.mean(-1, keepdim=True), xy), -1)
    torch.testing.assert_close(model(video)["landmarks"], want)


@pytest.mark.parametrize("options", [MASKS, POINTS], ids=["masks", "points"])
@pytest.mark.parametrize("name", ["endomamba", "attention_twin"])
def test_streams_answer_as_clips_do(options, name):
    options = options if name == "endomamba" else {k: v for k, v in options.items() if k not in ("d_state", "dt_init")}
    model, video = seeded(options, name), torch.randn(1, 3, 5, 32, 32)
    ((part, whole),), wrapped = model(video).items(), packed(model)
    state, held, answers, packs = model.init_state(1), wrapped.init_state(1), [], []
    with torch.no_grad():
        for frames in video.split((2, 1, 2), dim=2):
            answer, state = model.step(frames, state)
            answers.append(answer[part])
            packs.append(wrapped.unpack(wrapped.step_(frames, held))[part])
    torch.testing.assert_close(torch.cat(answers, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(packs, 1), whole, rtol=1e-4, atol=1e-4)


class DoubledHead(PhaseHead):
    """More than pooling and one Linear, though made out of it."""

    def forward(self, features):
        return 2 * super().forward(features)


@pytest.mark.parametrize("head", ["mean", "cls", "classification", "none", "segmentation", "localisation", "doubled"])
def test_frame_streams_with_weights_packed_once(head):
    """Each head, its answers and its state, by both ways through the model."""
    options = {"segmentation": MASKS, "localisation": POINTS, "none": SMALL, "doubled": {**SMALL, "num_classes": 3}}
    model = seeded(options.get(head, {**SMALL, "num_classes": 3, "head": head}))
    if head == "doubled":
        model.head = DoubledHead(16, 3).eval()
    wrapped, video = packed(model), torch.randn(1, 3, 4, 32, 32)
    assert (model.frame_weights().head is not None) == (head in ("mean", "cls", "classification"))
    plain, fused = FrameStream(wrapped, packed=False), FrameStream(wrapped, packed=True)
    assert plain._weights is None and fused._weights is not None
    whole = model(video)
    want = whole if isinstance(whole, torch.Tensor) else next(iter(whole.values())).flatten(2)
    for i in range(4):
        frame = video[0, :, i]
        for stream in (plain, fused, fused.clone()) if i == 3 else (plain, fused):
            torch.testing.assert_close(stream(frame)[0], want[0, i], rtol=1e-4, atol=1e-4)
    assert fused.clone()._weights is not None and plain.clone()._weights is None
    if isinstance(whole, dict):
        with pytest.raises(ValueError, match=r"must answer with one tensor, it gives a dict of .*packed\(model\)"):
            FrameStream(model)(frame)


OTHERS = {
    "endofm": {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_frames": 3},
    "videomamba": {"img_size": 32, "embed_dim": 16, "depth": 2, "num_frames": 3},
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_backbone_answers_frames(name, tmp_path):
    torch.manual_seed(0)
    video = torch.randn(2, 3, 3, 32, 32)
    for kind, classes, shape in (("segmentation", 2, (2, 3, 32, 32)), ("localisation", 4, (2, 3, 4, 3)),
                                 ("mean", 3, (2, 3, 3)), ("mean", 0, (2, 3, 16))):  # fmt: skip
        model = FrameWise(create_model(name, **OTHERS[name]), kind, classes, 32).eval()
        answer = model(video)
        answer = answer if isinstance(answer, torch.Tensor) else next(iter(answer.values()))
        assert answer.shape == shape
        torch.save(model.state_dict(), tmp_path / "own.pth")
        again = FrameWise(create_model(name, **OTHERS[name]), kind, classes, 32).eval()
        load_checkpoint(again, tmp_path / "own.pth")
        twice = again(video)
        assert torch.equal(answer, twice if isinstance(twice, torch.Tensor) else next(iter(twice.values())))
        backbone = create_model(name, **OTHERS[name])  # and its backbone alone
        load_checkpoint(backbone, tmp_path / "own.pth")
        assert torch.equal(backbone.pos_embed, model.encoder.pos_embed)
    with pytest.raises(ValueError, match="has no cls token of each frame"):
        FrameWise(create_model(name, **OTHERS[name]), "cls", 3)
    with pytest.raises(CheckpointError):
        load_checkpoint(create_model("endomamba", **SMALL), tmp_path / "own.pth")


@pytest.mark.parametrize("options, prefix", [(MASKS, "encoder."), (POINTS, "")], ids=["masks", "points"])
def test_published_names(options, prefix, tmp_path):
    """Published files have the parts of the head beside the encoder, not under `head.`."""
    model = seeded(options)
    names = {
        name: name.removeprefix("head.") if name.startswith("head.") else prefix + name for name in model.state_dict()
    }
    torch.save({names[name]: tensor for name, tensor in model.state_dict().items()}, tmp_path / "published.pth")
    other = seeded({**options}).train()
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    report = load_checkpoint(other, tmp_path / "published.pth")
    assert not report.missing and not report.unexpected and not report.skipped
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))
    phases = create_model("endomamba", **{**SMALL, "num_classes": 7})
    if prefix:  # the encoder alone, as before
        report = load_checkpoint(phases, tmp_path / "published.pth")
        assert set(report.missing) == {"head.weight", "head.bias"} and len(report.skipped) == 56
    load_checkpoint(phases, tmp_path / "published.pth", drop_head=True)
    assert torch.equal(phases.pos_embed, model.pos_embed)


@pytest.mark.parametrize(
    "options, why",
    [
        ({**MASKS, "num_classes": 3}, "needs num_classes=2"),
        ({**MASKS, "patch_size": 8}, "patch_size=16"),
        ({**MASKS, "head_width": 4}, "head_width >= 8"),
        ({**MASKS, "dynamic_img_size": True}, "masks of one size"),
        ({**SMALL, "head": "boxes"}, "head must be one of"),
    ],
)
def test_wrong_heads(options, why):
    """Tokens of another picture than the head was made for, too."""
    with pytest.raises(ValueError, match=r"needs 4 patches a frame, \(2, 2\), and at most cls, got 10"):
        seeded(MASKS).head(torch.randn(1, 1, 10, 16))
    with pytest.raises(ValueError, match=why):
        create_model("endomamba", **options)
