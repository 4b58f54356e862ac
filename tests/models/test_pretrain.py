"""Pre-training: equal to the published code, its loss restated, what an encoder may see, and what is refused."""

import math
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from endomamba.models import (
    CheckpointError,
    PretrainConfig,
    PretrainEndoMamba,
    create_model,
    load_checkpoint,
    masking,
    pretrain,
)
from tests.models.common import BACKENDS, assert_close, make_video, wide_awake
from tests.models.test_checkpoint import save
from tests.models.test_checkpoint_files import published_decoder
from tests.ops.backends import DEVICE

GOLDEN = Path(__file__).parents[1] / "golden" / "endomamba_pretrain_d48_depth4.safetensors"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4,
        "decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 3}  # fmt: skip


def tiny(seed=0, **options) -> PretrainEndoMamba:
    torch.manual_seed(seed)
    with torch.device("cpu"):
        model = create_model("pretrain_endomamba", **{**TINY, **options})
    return wide_awake(model.to(DEVICE), seed)


def masks(model, b=2, t=4, seed=0):
    return torch.stack([model.config.draw_mask(t, seed=seed, key=i) for i in range(b)]).to(DEVICE)


# ---- the published code


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN, device=DEVICE)


def golden_model(golden, **options):
    """The golden was made with the norm of its class's default, 1e-5; the published models pass 1e-6."""
    sizes = {"embed_dim": 48, "depth": 4, "decoder_dim": 24, "decoder_heads": 3, "decoder_depth": 2}
    model = create_model("pretrain_endomamba", **{**sizes, "decoder_norm_eps": 1e-5, **options}).eval()
    model.load_state_dict({name[6:]: t for name, t in golden.items() if name.startswith("param.")})
    return model


def assert_parity(model, golden):
    j = torch.arange(3 * 8 * 224 * 224, dtype=torch.float64)
    video = (0.8 * torch.sin(0.00371 * j)).float().view(1, 3, 8, 224, 224)
    features, predicted = model.predict(video, golden["mask"])
    assert_close("visible features", features[:, :128], golden["visible_features_first128"], 5e-6)
    assert_close("reconstruction", predicted[:, :64], golden["reconstruction_first64"], 5e-6)
    assert_close("its mean", predicted.mean().view(1), golden["reconstruction_mean"], 5e-6)

    weights = torch.cos(0.3 * torch.arange(768, dtype=torch.float64)).float()
    ((predicted * weights).sum() / predicted.shape[1] + features.square().mean()).backward()
    named = dict(model.named_parameters())
    assert sorted(named) == sorted(name[5:] for name in golden if name.startswith("grad."))
    for name, p in named.items():
        truth = golden[f"grad.{name}"]
        error = (p.grad - truth).norm() / truth.norm()
        assert error <= 5e-5, f"gradient of {name}: off by {error:.2e} of its norm, the bar is 5e-5"


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(golden, backend):
    assert_parity(golden_model(golden, backend=backend), golden)


def plant_wrong_mask(monkeypatch):
    original = pretrain.split_places

    def swapped(mask, visible):
        places, masked = original(mask, visible)
        return torch.cat((masked[:, :1], places[:, 1:]), 1), torch.cat((places[:, :1], masked[:, 1:]), 1)

    monkeypatch.setattr(pretrain, "split_places", swapped)


def plant_positions_after_the_gather(monkeypatch):
    """Positions of the first tokens for the visible ones, as adding them after taking the visible would."""

    def forward_visible(self, video, visible):
        tokens = self.patch_embed(video).flatten(1, 2)
        shown = pretrain.take_tokens(tokens, visible).unflatten(1, (video.shape[2], -1))
        return self._read(shown + self.pos_embed[:, : shown.shape[2]])[0]

    monkeypatch.setattr(pretrain.EndoMamba, "forward_visible", forward_visible)


def plant_hidden_patches_answer_first(monkeypatch):
    original = pretrain.Decoder.forward

    def forward(self, tokens, answers):
        return original(self, tokens.roll(answers, 1), answers)

    monkeypatch.setattr(pretrain.Decoder, "forward", forward)


def plant_tanh_gelu(monkeypatch):
    original = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: original(x, approximate="tanh"))


def plant_nothing(monkeypatch):
    pass


@pytest.mark.parametrize(
    "plant, caught_by, options",
    [
        (plant_wrong_mask, "visible features", {}),
        (plant_positions_after_the_gather, "visible features", {}),
        (plant_hidden_patches_answer_first, "reconstruction", {}),
        (plant_tanh_gelu, "reconstruction", {}),
        pytest.param(
            plant_nothing,
            "reconstruction",
            {"decoder_norm_eps": 1e-6},
            marks=pytest.mark.skipif(DEVICE != "cpu", reason="off by 1.2e-5, which a GPU's rounding may be"),
        ),
    ],
)
def test_planted_bug_is_caught(golden, monkeypatch, plant, caught_by, options):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=rf"^{caught_by}: off by"):
        assert_parity(golden_model(golden, **options), golden)


@pytest.mark.parametrize(
    "name, total, keys",
    [
        ("pretrain_endomamba_tiny", 7_503_088, 386),
        ("pretrain_endomamba_small", 26_462_784, 386),
        ("pretrain_endomamba_middle", 78_912_768, 494),
    ],
)
def test_published_sizes(name, total, keys):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == total and len(model.state_dict()) == keys
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith("encoder.")}
    e, hidden = model.config.decoder_dim, 4 * model.config.decoder_dim
    inner = {128: 126}.get(e, e)
    expected = published_decoder(e, inner, hidden, model.config.embed_dim)
    assert shapes == {name: tuple(t.shape) for name, t in expected.items()}


def test_published_init():
    torch.manual_seed(0)
    model = create_model("pretrain_endomamba", **TINY | {"embed_dim": 64, "decoder_dim": 64, "decoder_heads": 2})
    assert 0 < model.mask_token.abs().max() <= 0.02
    for name, p in model.decoder.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.ndim == 2:
            limit = math.sqrt(6 / (p.shape[0] + p.shape[1]))
            assert 0.95 * limit < p.abs().max() <= limit, name
    assert model.encoder.layers[3].drop_path.rate == pytest.approx(0.1 * 2 / 3), "the encoder's is on"


# ---- the loss, restated


def plain_loss(model, video, mask, teacher=None):
    """The definition, patch by patch, in fp64."""
    features, predicted = model.predict(video, mask)
    mean, std = (
        torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (model.config.pixel_mean, model.config.pixel_std)
    )
    p, (rows, columns) = model.config.patch_size, model.config.grid
    squares, cosines = [], []
    for i, row in enumerate(mask):
        answers, shown = iter(predicted[i].double()), iter(features[i].double())
        for place, hidden in enumerate(row.tolist()):
            frame, (y, x) = place // (rows * columns), divmod(place % (rows * columns), columns)
            if not hidden:
                if teacher is not None:
                    a, b = next(shown), teacher[i, place].double()
                    cosines.append(1 - (a @ b) / (a.norm() * b.norm()))
                continue
            pixels = video[i, :, frame, y * p : (y + 1) * p, x * p : (x + 1) * p].double() * std + mean
            pixels = pixels - pixels.mean((1, 2), keepdim=True)
            spread = (pixels.square().sum((1, 2), keepdim=True) / (p * p - 1)).sqrt() + 1e-6
            target = (pixels / spread).permute(1, 2, 0).flatten()  # colour fastest
            squares.append((next(answers) - target).square().mean())
    reconstruction = torch.stack(squares).mean()
    alignment = torch.stack(cosines).mean() if cosines else None
    return reconstruction, alignment


def assert_loss(model):
    video, mask = make_video(model, b=2), masks(model)
    video[0, :, 1] = video[0, :1, 1] * 1e-6  # patches of almost one colour: the 1e-6 decides
    video[1, :, 2] = 0.3
    teacher = torch.randn(2, 64, 16)
    with torch.no_grad():
        losses = model(video, mask, teacher)
        reconstruction, alignment = plain_loss(model, video, mask, teacher)
    assert_close("reconstruction", losses.reconstruction, reconstruction.float(), 3e-5)
    assert_close("alignment", losses.alignment, alignment.float(), 1e-6)
    assert_close("loss", losses.loss, (reconstruction + 0.25 * alignment).float(), 3e-5)
    without = model(video, mask)
    assert without.alignment is None and torch.equal(without.loss, losses.reconstruction)


def test_loss_is_the_definition():
    assert_loss(tiny())
    assert_loss(tiny(mask="random"))
    assert_loss(tiny(pixel_mean=(0.45,) * 3, pixel_std=(0.1, 0.2, 0.4)))


def plant_biased_std(monkeypatch):
    original = torch.var_mean
    monkeypatch.setattr(torch, "var_mean", lambda x, **options: original(x, correction=0, **options))


def plant_std_of_all_colours(monkeypatch):
    def var_mean(x, dim, keepdim):
        var, mean = var_mean.original(x, dim=dim, keepdim=keepdim)
        return var.mean(-1, keepdim=True).expand_as(var), mean

    var_mean.original = torch.var_mean
    monkeypatch.setattr(torch, "var_mean", var_mean)


def plant_normalised_pixels(monkeypatch):
    """1e-6 added to the std of the normalised pixels, not of those in [0, 1]."""
    monkeypatch.setattr(pretrain, "PATCH_STD_EPS", 2.5e-7)


def plant_colour_slowest(monkeypatch):
    original = pretrain.to_patches

    def to_patches(video, p):
        patches = original(video, p)
        return patches.mT.reshape(patches.shape)

    monkeypatch.setattr(pretrain, "to_patches", to_patches)


def plant_pixels_of_the_visible(monkeypatch):
    original = PretrainEndoMamba._target
    monkeypatch.setattr(
        PretrainEndoMamba, "_target", lambda self, video, masked: original(self, video, masked.roll(1, 1))
    )


def plant_teacher_not_gathered(monkeypatch):
    original = pretrain.alignment_loss
    monkeypatch.setattr(pretrain, "alignment_loss", lambda student, teacher: original(student, teacher.flip(1)))


@pytest.mark.parametrize(
    "plant, caught_by",
    [
        (plant_biased_std, "reconstruction"),
        (plant_std_of_all_colours, "reconstruction"),
        (plant_normalised_pixels, "reconstruction"),
        (plant_colour_slowest, "reconstruction"),
        (plant_pixels_of_the_visible, "reconstruction"),
        (plant_teacher_not_gathered, "alignment"),
    ],
)
def test_planted_loss_is_caught(monkeypatch, plant, caught_by):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=rf"^{caught_by}: off by"):
        assert_loss(tiny())


@torch.no_grad()
def test_loss_of_a_joined_batch_is_the_mean():
    """What two ranks compute apart is what one computes for both: equal numbers are masked in each sample."""
    model = tiny()
    video, mask, teacher = make_video(model, b=4), masks(model, b=4), torch.randn(4, 64, 16)
    whole = model(video, mask, teacher)
    halves = [model(*(x[rows] for x in (video, mask, teacher))) for rows in (slice(0, 2), slice(2, 4))]
    for name in whole._fields:
        parts = torch.stack([getattr(half, name) for half in halves])
        assert_close(name, parts.mean(), getattr(whole, name), 2e-6)


def test_a_teacher_of_another_width():
    model = tiny(teacher_dim=24)
    assert model.encoder_to_teacher.weight.shape == (24, 16)
    video, mask, teacher = make_video(model), masks(model, b=1), torch.randn(1, 64, 24)
    losses = model(video, mask, teacher)
    features, _ = model.predict(video, mask)
    visible = teacher[~mask].view(1, -1, 24)
    expected = 1 - torch.nn.functional.cosine_similarity(features @ model.encoder_to_teacher.weight.mT, visible, dim=-1)
    assert_close("alignment", losses.alignment, expected.mean(), 1e-6)
    losses.alignment.backward()
    assert model.encoder_to_teacher.weight.grad.any()


# ---- what the encoder sees


@pytest.mark.parametrize("kind", masking.MASKS)
def test_hidden_pixels_are_not_seen(kind):
    """To the bit: garbage in every hidden patch changes neither features nor answers, and no gradient reaches it."""
    model = tiny(mask=kind)
    video, mask = make_video(model, b=2), masks(model)
    patches = pretrain.to_patches(video, 8)
    patches[mask] = 1e3
    changed = pretrain.from_patches(patches, model.config.grid).requires_grad_()
    for got, expected in zip(model.predict(changed, mask), model.predict(video, mask)):
        assert torch.equal(got, expected)
    features, predicted = model.predict(changed, mask)
    (grad,) = torch.autograd.grad(features.square().sum() + predicted.square().sum(), changed)
    by_patch = pretrain.to_patches(grad, 8).abs().amax((2, 3))
    assert not by_patch[mask].any() and (by_patch[~mask] > 0).all()


@torch.no_grad()
def test_visible_tokens_keep_their_places_and_order():
    """With every token visible it is the EndoMamba without cls; with some, a frame's row holds that frame's tokens."""
    model = tiny()
    video = make_video(model, b=2)
    everything = torch.arange(64).expand(2, -1)
    assert torch.equal(model.encoder.forward_visible(video, everything), model.encoder.forward_features(video))
    assert torch.equal(model.encoder.patch_tokens(video), model.encoder.forward_features(video))
    visible, _ = masking.split_places(masks(model), 16)
    assert ((visible // 16).view(2, 4, 4) == torch.arange(4).view(1, 4, 1)).all()
    shown = model.encoder.forward_visible(video, visible)
    assert shown.shape == (2, 4, 4, 16)
    first = model.encoder.forward_visible(video[:, :, :2], visible[:, :8])
    assert_close("earlier frames do not see later ones", first, shown[:, :2], 2e-6)


def test_drawn_answers_go_where_they_belong(monkeypatch):
    """A decoder that answers with the target draws the original; grey stands where pixels are hidden."""
    model = tiny().train()
    video, mask = 0.5 * make_video(model, b=2), masks(model)
    monkeypatch.setattr(
        PretrainEndoMamba, "_predict", lambda self, video, visible, masked: (None, self._target(video, masked)[0])
    )
    pictures = model.reconstruct(video, mask)
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (model.config.pixel_mean, model.config.pixel_std))
    original = (video * std + mean).clamp(0, 1)
    assert_close("original", pictures.original, original, 1e-6)
    assert_close("reconstruction", pictures.reconstruction, original, 1e-5)
    hidden = mask.view(2, 1, 4, 4, 4).repeat_interleave(8, 3).repeat_interleave(8, 4).expand_as(original)
    assert (pictures.masked[hidden] == 0.5).all() and torch.equal(pictures.masked[~hidden], pictures.original[~hidden])
    assert model.training and not any(x.requires_grad for x in pictures)


def test_reconstruct_draws_no_random_number():
    model = tiny(drop_path_rate=0.5).train()
    video, mask = make_video(model), masks(model, b=1)
    before = torch.get_rng_state()
    first, second = model.reconstruct(video, mask), model.reconstruct(video, mask)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(first.reconstruction, second.reconstruction)
    assert model.training and model.encoder.layers[2].training
    assert first.reconstruction.shape == video.shape
    assert not torch.equal(first.reconstruction, first.original)
    assert_close("patches and back", pretrain.from_patches(pretrain.to_patches(video, 8), (4, 4)), video, 0)


# ---- masks


@pytest.mark.parametrize("kind", masking.MASKS)
def test_a_mask_follows_from_seed_and_key(kind):
    config = PretrainConfig(**TINY, mask=kind)
    first = config.draw_mask(4, seed=0, key="a.mp4 epoch 0")
    torch.manual_seed(7)
    config.draw_mask(4, seed=3, key="b.mp4")
    assert torch.equal(config.draw_mask(4, seed=0, key="a.mp4 epoch 0"), first)
    for seed, key in ((1, "a.mp4 epoch 0"), (0, "a.mp4 epoch 1")):
        assert not torch.equal(config.draw_mask(4, seed=seed, key=key), first)
    assert first.dtype == torch.bool and first.shape == (64,) and first.sum() == 48
    each = first.view(4, 16).sum(1)
    assert (each == 12).all() == (kind != "random")
    assert (first.view(4, 16) == first[:16]).all() == (kind == "tube")
    assert config.visible_tokens(4) == 16


def test_masks_are_frozen():
    """A resumed run must hide what it would have hidden, whatever numpy or torch it resumes with."""
    drawn = [
        masking.draw_mask(kind, ratio, 16, 196, seed=seed, key=key)
        for kind in masking.MASKS
        for ratio, seed, key in ((0.75, 0, "clip-0"), (0.9, 5, 123_456))
        if (kind, ratio) != ("random", 0.9)
    ]
    digest = sha256(b"".join(mask.numpy().tobytes() for mask in drawn)).hexdigest()
    assert digest[:16] == "d2818953a354e95d"


def test_every_place_is_as_likely():
    drawn = torch.stack([masking.draw_mask("tube", 0.75, 1, 16, seed=0, key=i) for i in range(4000)]).float()
    assert (drawn.mean(0) - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5
    pairs = (drawn.T @ drawn / 4000)[~torch.eye(16, dtype=torch.bool, device=drawn.device)]
    assert (pairs - 12 / 16 * 11 / 15).abs().max() < 5 * (0.55 * 0.45 / 4000) ** 0.5


def test_published_counts():
    config = PretrainConfig()
    assert config.draw_mask(16, seed=0, key=0).sum() == 2352 and config.visible_tokens(16) == 784
    with pytest.raises(ValueError, match=r"mask='random' with mask_ratio=0.9 leaves 314 patches, not a multiple of 16"):
        masking.draw_mask("random", 0.9, 16, 196, seed=0, key=0)


# ---- training


def test_it_learns_one_clip():
    model = tiny(drop_path_rate=0.0).train()
    video, mask, teacher = make_video(model), masks(model, b=1), torch.randn(1, 64, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model(video, mask, teacher)
    for _ in range(40):
        optimizer.zero_grad()
        losses = model(video, mask, teacher)
        losses.loss.backward()
        optimizer.step()
    assert losses.reconstruction < 0.7 * first.reconstruction and losses.alignment < 0.3 * first.alignment


def gradients(model, function, *inputs):
    return torch.autograd.grad(function(*inputs).loss, (*model.parameters(),))


def test_checkpointing_and_compile_give_the_same_gradients():
    """fullgraph: no shape depends on what a mask holds, so nothing waits for a GPU."""
    model = tiny(drop_path_rate=0.0).train()
    inputs = make_video(model, b=2), masks(model), torch.randn(2, 64, 16)
    expected = gradients(model, model, *inputs)
    assert all(g.abs().max() > 0 for g in expected)
    model.gradient_checkpointing = True
    assert model.decoder.gradient_checkpointing and model.encoder.gradient_checkpointing
    assert all(torch.equal(got, want) for got, want in zip(gradients(model, model, *inputs), expected))
    assert tiny(use_checkpoint=True).gradient_checkpointing
    model.gradient_checkpointing = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(model, compiled, *inputs), expected):
        assert_close("gradient", got, want, 1e-5 * want.abs().max().item())
    torch.compiler.reset()


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "weights"])
def test_low_precision(whole):
    model = tiny()
    video, mask, teacher = make_video(model, b=2), masks(model), torch.randn(2, 64, 16)
    exact = model(video, mask, teacher)
    if whole:
        model = model.to(torch.bfloat16)
        low = model(video, mask, teacher)
    else:
        with torch.autocast(DEVICE, torch.bfloat16):
            low = model(video, mask, teacher.bfloat16())
    assert all(part.dtype == torch.float32 for part in low)
    for name, got, want in zip(exact._fields, low, exact):
        assert abs(got - want) < 0.02 * want, name
    low.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- files


def test_a_file_of_pretraining_goes_both_ways(tmp_path):
    """Whole into the model of pre-training, its encoder into an EndoMamba; a projection to a teacher is left out."""
    source = tiny(1, teacher_dim=24)
    path = save({"model": source.state_dict(), "epoch": 499}, tmp_path)
    again = tiny(2, teacher_dim=24)
    report = load_checkpoint(again, path)
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in again.state_dict().items())
    assert not (report.missing or report.unexpected or report.skipped)
    encoder = create_model("endomamba", img_size=32, patch_size=8, embed_dim=16, depth=4)
    report = load_checkpoint(encoder, path, map_pos_embed=True)
    assert torch.equal(encoder.pos_embed[:, 1:], source.encoder.pos_embed)
    assert torch.equal(encoder.layers[3].mixer.D, source.encoder.layers[3].mixer.D)
    assert report.missing == ("cls_token",) and "encoder_to_teacher.weight" in report.skipped
    for model, message in (
        (tiny(), "unknown to the model: encoder_to_teacher.weight"),
        (tiny(teacher_dim=24, depth=2), "embed_dim 16, depth 4, the model has 16, 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(model, path)


# ---- refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask": "row"}, r"PretrainConfig: mask must be one of \('tube', 'frame', 'random'\), got 'row'"),
        ({"mask_ratio": 0.0}, r"PretrainConfig: mask_ratio must be in \(0, 1\), got 0.0"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \(0, 1\), got 1.0"),
        ({"mask_ratio": "0.75"}, r"mask_ratio must be in \(0, 1\), got '0.75'"),
        (
            {"mask_ratio": 0.06},
            "PretrainConfig: mask_ratio=0.06 masks 0 of 16 patches: some must be masked and some visi",
        ),
        ({"mask": "random", "mask_ratio": 1.5}, r"mask_ratio must be in \(0, 1\), got 1.5"),
        ({"mask_ratio": float("nan")}, r"mask_ratio must be in \(0, 1\), got nan"),
        ({"align_weight": -1}, r"align_weight must be in \[0, inf\), got -1"),
        ({"align_weight": float("nan")}, r"align_weight must be in \[0, inf\), got nan"),
        ({"teacher_dim": 0}, "teacher_dim must be an integer of at least 1, got 0"),
        ({"decoder_dim": 15}, r"decoder_dim must be even \(positions are sin, cos pairs\), got 15"),
        ({"decoder_dim": 0}, "decoder_dim must be an integer of at least 1, got 0"),
        ({"decoder_depth": 0}, "decoder_depth must be an integer of at least 1, got 0"),
        ({"decoder_heads": 17}, "decoder_heads must not exceed decoder_dim=16, got 17"),
        ({"decoder_norm_eps": 0.0}, r"decoder_norm_eps must be in \(0, 1\), got 0.0"),
        ({"pixel_std": (0.2, 0.2)}, r"pixel_std must have in_channels=3 numbers, got \(0.2, 0.2\)"),
        ({"pixel_std": (0.2, 0.2, 0.0)}, r"each number of pixel_std must be in \(0, inf\), got 0.0"),
        ({"with_cls_token": True}, "with_cls_token has no meaning in pre-training: leave it at False"),
        ({"num_classes": 7}, "num_classes has no meaning in pre-training: leave it at 0"),
        ({"head": "cls"}, "head"),
        ({"hold_position": True}, "hold_position has no meaning in pre-training"),
        ({"dynamic_img_size": True}, "dynamic_img_size has no meaning in pre-training"),
        ({"embed_dim": 15}, "PretrainConfig: embed_dim must be even"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**{**TINY, **options})


def test_forward_refuses():
    model = tiny().train()
    video, mask = make_video(model, b=2), masks(model)

    def assert_refused(message, *inputs, model=model):
        with pytest.raises(ValueError, match=message):
            model(*inputs)

    assert_refused(r"PretrainEndoMamba: video must be \(b, 3, t, 32, 32\)", video[:, :, :, :16], mask)
    assert_refused(
        r"mask must be bool of shape \(b, t n\) = \(2, 64\), got torch.float32 \(2, 64\)", video, mask.float()
    )
    assert_refused(r"mask must be bool of shape .* got torch.bool \(2, 4, 16\)", video, mask.view(2, 4, 16))
    uneven = tiny(mask="random")
    if DEVICE == "cpu":  # a GPU is not waited for: its assertion would end all that this process does there
        swapped = masks(tiny(mask="frame", mask_ratio=0.5))
        per_frame = r"must leave 4 patches of each frame visible \(mask='tube', mask_ratio=0.75\), this"
        assert_refused(per_frame, video, swapped)
        assert_refused("must leave 4 patches of each frame visible", video, masks(tiny(mask="random")))
        assert_refused("must leave 16 patches of each clip visible", video, swapped, model=uneven)
    uneven(video, mask)  # which hides as many in each clip
    assert_refused(
        r"a vector for each patch of the clips, \(b, t n, c\) = \(2, 64, 16\), got \(2, 64, 24\); for a teacher of "
        r"another width create the model with teacher_dim=24",
        video, mask, torch.randn(2, 64, 24),
    )  # fmt: skip
    assert_refused(r"= \(2, 64, 16\), got \(2, 65, 16\)$", video, mask, torch.randn(2, 65, 16))
    assert_refused(r"= \(2, 64, 16\), got \(2, 4, 16, 16\)$", video, mask, torch.randn(2, 4, 16, 16))
    assert_refused(
        "teacher_features carry a gradient, and a teacher that learns would move to the student",
        video, mask, torch.randn(2, 64, 16, requires_grad=True),
    )  # fmt: skip
    assert_refused(
        "teacher_dim=24 is set, so teacher_features are needed", video, mask, model=tiny(teacher_dim=24).train()
    )
    with pytest.raises(ValueError, match="forward_visible: needs with_cls_token=False"):
        create_model("endomamba", img_size=32, patch_size=8, embed_dim=16, depth=2).forward_visible(video, mask)
