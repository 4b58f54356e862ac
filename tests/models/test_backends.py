"""Every back end and every flag runs the same network: both directions, all tokens, the same gradients."""

import itertools

import pytest
import torch

from tests.models.common import BACKENDS, assert_close, long_memory, make_video
from tests.ops.backends import Random

TOLERANCE = 2e-6


def outputs_and_gradients(video, **options):
    model = long_memory(drop_path_rate=0.0, **options)
    out, _ = model.step(video, model.init_state(video.shape[0]))
    grads = torch.autograd.grad(out.square().sum(), (*model.parameters(),))
    return out.detach(), dict(zip((name for name, _ in model.named_parameters()), grads))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_no_flag_drops_a_direction(backend, use_checkpoint, train):
    """The published modules lose their backward scan as soon as the fast path is off, and say nothing."""
    video = make_video(long_memory(), b=2, t=3)
    expected, expected_grads = outputs_and_gradients(video, backend="reference")
    model = long_memory(backend=backend, use_checkpoint=use_checkpoint, drop_path_rate=0.0).train(train)
    out = model(video)
    grads = dict(
        zip((n for n, _ in model.named_parameters()), torch.autograd.grad(out.square().sum(), (*model.parameters(),)))
    )
    assert_close("logits", out.detach(), expected, TOLERANCE)
    for name, truth in expected_grads.items():
        assert truth.any(), f"{name} has no gradient: this test would not see it dropped"
        assert_close(f"gradient of {name}", grads[name], truth, 1e-5 * truth.abs().max().item())
    with torch.inference_mode():
        assert_close("in place", model.step_(video, model.init_state(2)), expected, TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_parameter_of_the_backward_direction_counts(backend):
    """In forward, in step and in step_: whatever a backward scan has of its own moves the output."""
    model = long_memory(backend=backend)
    video = make_video(model, t=2)
    random = Random(7)

    def run():
        with torch.no_grad():
            step, _ = model.step(video, model.init_state(1))
            return model(video), step, model.step_(video, model.init_state(1))

    before = run()
    names = [n for n, _ in model.named_parameters() if "_b." in n or n.endswith(("A_b_log", "D_b"))]
    assert len(names) == 2 * 7
    for name in names:
        p = model.get_parameter(name)
        kept = p.detach().clone()
        with torch.no_grad():
            p += 2.0 * random.randn(*p.shape)
            for kind, got, expected in zip(("forward", "step", "step_"), run(), before):
                assert (got - expected).abs().max() > 100 * TOLERANCE, f"{name} does not act in {kind}"
            p.copy_(kept)


def test_reversed_tokens_and_swapped_directions_reverse_the_output():
    """Tells a backward scan from a second forward one, as an output that depends on all tokens does not."""
    mixer = long_memory(depth=1, num_spatial_layers=1).layers[0].mixer
    swapped = long_memory(depth=1, num_spatial_layers=1).layers[0].mixer
    weights = mixer.state_dict()
    for name in weights:
        for a, b in (
            ("conv1d.", "conv1d_b."),
            ("x_proj.", "x_proj_b."),
            ("dt_proj.", "dt_proj_b."),
            ("A_log", "A_b_log"),
            ("D", "D_b"),
        ):
            pair = (name, name.replace(a, b)) if name.startswith(a) and not name.startswith(b) else None
            if pair:
                swapped.state_dict()[pair[0]].copy_(weights[pair[1]])
                swapped.state_dict()[pair[1]].copy_(weights[pair[0]])
    u = Random(2).randn(2, 7, 16)
    with torch.no_grad():
        out = mixer(u)
        assert (mixer(u.flip(1)).flip(1) - out).abs().max() > 1e-2, "both directions have the same weights"
        assert_close("reversed", swapped(u.flip(1)).flip(1), out, TOLERANCE)


OPTIONS = {
    "with_cls_token": (True, False),
    "head": ("mean", "cls", "classification"),
    "num_classes": (0, 2),
    "dt_init": ("published", "mamba"),
    "num_spatial_layers": (None, 0, 4),
    "use_checkpoint": (False, True),
}


def matrix():
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values))
        if options["with_cls_token"] or options["head"] == "mean":
            yield options


def test_every_combination_of_options_trains_and_streams():
    """The published constructors fail without cls, for two of three sizes, and ignore use_checkpoint."""
    count = 0
    for options in matrix():
        model = long_memory(**options).train()
        video = make_video(model, t=2)
        out = model(video)
        out.sum().backward()
        width = model.config.num_classes or model.config.embed_dim
        assert out.shape == (1, 2, width), options
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), options
        rows = model.pos_embed.shape[1]
        assert rows == 4 + options["with_cls_token"], options
        with torch.no_grad():
            model.eval()
            streamed, state = model.step(video[:, :, :1], model.init_state(1))
            streamed = torch.cat((streamed, model.step(video[:, :, 1:], state)[0]), 1)
            assert_close(str(options), streamed, model(video), TOLERANCE)
        count += 1
    assert count == 2 * 2 * 3 * 2 * (3 + 1)
