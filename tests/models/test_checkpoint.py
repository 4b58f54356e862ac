"""load_checkpoint: every published container, strictness, positions, and files that are wrong in every way."""

import argparse
import collections
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from endomamba.models import CheckpointError, create_model, load_checkpoint
from endomamba.models.layers import resize_positions

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4}


def new_model(seed=0, **options):
    torch.manual_seed(seed)
    return create_model("endomamba", **{**SMALL, "num_classes": 3, **options})


@pytest.fixture
def source():
    """Weights to be found again, no two alike, cls_token and biases too."""
    model = new_model(seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape))
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_loaded(model, source, but=()):
    for name, t in model.state_dict().items():
        assert torch.equal(t, source[name]) == (name not in but), name


def pretraining(source):
    """The published pre-training model: no cls, 16 positions instead of 17, a decoder beside it."""
    weights = {f"encoder.{name}": t for name, t in source.items() if not name.startswith(("head.", "cls_token"))}
    weights["encoder.pos_embed"] = source["pos_embed"][:, 1:] * 2
    decoder = {"mask_token": (1, 1, 8), "encoder_to_decoder.weight": (8, 16), "decoder.blocks.0.norm1.weight": (8,),
               "decoder.blocks.1.norm1.weight": (8,), "decoder.norm.bias": (8,)}  # fmt: skip
    return weights | {name: torch.ones(shape) for name, shape in decoder.items()}


def save(obj, tmp_path, name="weights.pth", **options):
    path = tmp_path / name
    torch.save(obj, path, **options)
    return path


# ---- containers


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
def test_bare(source, tmp_path, old_format):
    path = save(source, tmp_path, _use_new_zipfile_serialization=not old_format)
    model = new_model()
    report = load_checkpoint(model, path)
    assert_loaded(model, source)
    assert report.container == "bare" and set(report.loaded) == set(source)
    assert not (report.remapped or report.missing or report.unexpected or report.skipped)
    assert str(report) == f"{path} (bare): {len(source)} tensors loaded"


def test_phase_with_training_arguments(source, tmp_path):
    """['model'] beside what a training script writes: Namespace, numpy scalars of any kind, epoch, optimiser."""
    extra = {
        "args": argparse.Namespace(lr=1e-3, dims=(1, 2), best=np.float64(83.3)),
        "epoch": 19,
        "scores": [np.float32(0.8), np.float16(0.8), np.int64(7), np.uint8(7), np.bool_(True)],
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": np.float64(0.1)}]},
    }
    path = save({"model": collections.OrderedDict(source), **extra}, tmp_path)
    model = new_model()
    assert load_checkpoint(model, path).container == "['model']"
    assert_loaded(model, source)


def test_numpy_1_scalar_names(source, tmp_path):
    """numpy 1 wrote numpy.core.multiarray.scalar, numpy 2 numpy._core.multiarray.scalar: both are let through."""
    path = save({"model": source, "best": np.float64(1.5)}, tmp_path, pickle_protocol=2)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (key,) = [name for name in parts if name.endswith("data.pkl")]
    assert b"cnumpy._core.multiarray\nscalar" in parts[key] or b"cnumpy.core.multiarray\nscalar" in parts[key]
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        changed = parts[key].replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        changed = changed.replace(b"cnumpy.core.multiarray\n", b"c" + module + b"\n")
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, changed if name == key else data)
        model = new_model()
        load_checkpoint(model, path)
        assert_loaded(model, source)


def test_classification(source, tmp_path):
    weights = {f"module.{name}": t for name, t in source.items()}
    path = save({"backbone_state_dict": weights, "epoch": 3}, tmp_path)
    model = new_model(head="classification")
    report = load_checkpoint(model, path)
    assert_loaded(model, source)
    assert report.container == "['backbone_state_dict']"
    assert report.remapped["module.layers.0.norm.weight"] == "layers.0.norm.weight"
    assert len(report.remapped) == len(source)
    assert f"module.*: * ({len(source)} names)" in str(report)


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w}], ids=["bare", "model"])
def test_pretraining(source, tmp_path, wrap):
    """The published rule: decoder left out, positions discarded, cls and head as initialised; all of it reported."""
    path = save(wrap(pretraining(source)), tmp_path)
    model = new_model()
    fresh = {name: t.clone() for name, t in model.state_dict().items()}
    report = load_checkpoint(model, path)
    kept = ("cls_token", "pos_embed", "head.weight", "head.bias")
    assert_loaded(model, source, but=kept)
    assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in kept)
    assert sorted(report.missing) == sorted(kept)
    assert report.remapped["encoder.layers.3.mixer.D"] == "layers.3.mixer.D"
    assert set(report.skipped) == {n for n in pretraining(source) if not n.startswith("encoder.")} | {
        "encoder.pos_embed"
    }
    assert report.skipped["encoder.pos_embed"].startswith("16 rows have none for cls; the published rule discards them")
    assert "skipped     decoder.norm.bias: not part of the encoder" in str(report)
    assert "skipped     decoder.blocks.*.norm1.weight (2): not part of the encoder" in str(report)


def test_pretraining_with_mapped_positions(source, tmp_path):
    path = save({"model": pretraining(source)}, tmp_path)
    model = new_model()
    own = model.pos_embed[:, 0].clone()
    report = load_checkpoint(model, path, map_pos_embed=True)
    assert torch.equal(model.pos_embed[:, 1:], pretraining(source)["encoder.pos_embed"])
    assert torch.equal(model.pos_embed[:, 0], own) and own.any()
    assert report.remapped["encoder.pos_embed"] == "pos_embed put in rows 1.. behind the model's own row 0"
    assert "encoder.pos_embed" not in report.skipped and "pos_embed" not in report.missing


def test_the_cls_token_of_a_pretrained_encoder_is_alive(source, tmp_path):
    """The file has none.  One of zeros would be read through gates that are closed, and its features would be zero."""
    model = new_model(num_classes=0)
    load_checkpoint(model, save({"model": pretraining(source)}, tmp_path), map_pos_embed=True)
    height, width = model.config.size
    features = model.forward_features(torch.randn(2, 3, 3, height, width, device=model.pos_embed.device))
    assert (features[:, :, 0].abs().amax(-1) > 0.1).all()
    features[:, :, 0].square().mean().backward()
    assert model.cls_token.grad.norm() < 1e3


def test_pretrained_encoder_itself(source, tmp_path):
    """Without a cls token the model is the pre-training encoder, and its positions fit."""
    model = new_model(with_cls_token=False, num_classes=0)
    report = load_checkpoint(model, save({"model": pretraining(source)}, tmp_path))
    assert not report.missing
    assert torch.equal(model.pos_embed, pretraining(source)["encoder.pos_embed"])


def test_segmentation(source, tmp_path):
    weights = {f"encoder.{name}": t for name, t in source.items() if not name.startswith("head.")}
    weights |= {"decoder.conv_more.0.weight": torch.ones(2), "segmentation_head.0.weight": torch.ones(2)}
    model = new_model(num_classes=0)
    report = load_checkpoint(model, save(weights, tmp_path))
    assert_loaded(model, source)
    assert set(report.skipped) == {"decoder.conv_more.0.weight", "segmentation_head.0.weight"}


def test_safetensors(source, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(source, path)
    model = new_model()
    load_checkpoint(model, path)
    assert_loaded(model, source)


def test_half_precision_file(source, tmp_path):
    path = save({name: t.half() for name, t in source.items()}, tmp_path)
    model = new_model()
    load_checkpoint(model, path)
    assert model.pos_embed.dtype == torch.float32
    assert_loaded(model, {name: t.half().float() for name, t in source.items()})


# ---- positions of another size


@pytest.mark.parametrize("size, grid", [(48, (6, 6)), ((16, 40), (2, 5))], ids=str)
def test_positions_are_interpolated(source, tmp_path, size, grid):
    model = new_model(img_size=size)
    report = load_checkpoint(model, save({"model": source}, tmp_path))
    image = source["pos_embed"][:, 1:].view(1, 4, 4, 16).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, size=grid, mode="bicubic").permute(0, 2, 3, 1).reshape(1, -1, 16)
    assert torch.equal(model.pos_embed[:, :1], source["pos_embed"][:, :1])
    assert torch.allclose(model.pos_embed[:, 1:], expected, atol=1e-6)
    assert report.remapped["pos_embed"] == f"pos_embed interpolated from 4x4 to {grid[0]}x{grid[1]} patches"
    assert_loaded(model, source | {"pos_embed": model.pos_embed})


def test_mapped_positions_are_interpolated_too(source, tmp_path):
    model = new_model(img_size=48)
    report = load_checkpoint(model, save(pretraining(source), tmp_path), map_pos_embed=True)
    done = "pos_embed interpolated from 4x4 to 6x6 patches, put in rows 1.. behind the model's own row 0"
    assert report.remapped["encoder.pos_embed"] == done
    # on the CPU, as load_checkpoint does: another device interpolates with other roundings
    expected = resize_positions(pretraining(source)["encoder.pos_embed"].cpu(), (4, 4), (6, 6))
    assert torch.equal(model.pos_embed[:, 1:].cpu(), expected) and model.pos_embed[:, 0].any()


def test_positions_that_fit_by_accident(source, tmp_path):
    """16 pre-trained patches are not 15 patches and a cls token."""
    model = new_model(img_size=(24, 40))
    report = load_checkpoint(model, save(pretraining(source), tmp_path))
    assert report.skipped["encoder.pos_embed"].startswith("16 rows have none for cls")


def test_positions_for_a_model_without_cls(source, tmp_path):
    weights = {name: t for name, t in source.items() if not name.startswith("head.")}
    model = new_model(with_cls_token=False, num_classes=0)
    assert_refused(save(weights, tmp_path), "missing: pos_embed; unknown to the model: cls_token", model)
    report = load_checkpoint(model, tmp_path / "weights.pth", strict=False)
    assert report.skipped == {"pos_embed": "has a row for cls, which this model does not have"}


def test_positions_without_a_grid(source, tmp_path):
    path = save(source | {"pos_embed": torch.randn(1, 12, 16)}, tmp_path)
    with pytest.raises(CheckpointError, match="missing: pos_embed"):
        load_checkpoint(new_model(), path)
    report = load_checkpoint(new_model(), path, strict=False)
    assert report.skipped["pos_embed"] == "11 patches are no square grid"


# ---- strictness; whatever fails leaves the model as it was


def assert_refused(path, message, model=None, **options):
    model = new_model() if model is None else model
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(model, path, **options)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    return str(error.value)


def test_another_size_of_model(source, tmp_path):
    path = save(source, tmp_path)
    message = "does not fit this model: it is for embed_dim 16, depth 4, the model has "
    assert_refused(path, message + "32, 4$", new_model(embed_dim=32))
    assert_refused(path, message + "16, 6$", new_model(depth=6))
    assert_refused(path, r"unknown to the model: layers\.\*\.mixer\.A_b_log, ", new_model(num_spatial_layers=1))
    assert_refused(path, r"A_log has shape \(32, 16\) in the file, \(32, 8\) in the model", new_model(d_state=8))


def test_missing_and_unexpected(source, tmp_path):
    weights = dict(source)
    del weights["layers.2.mixer.D"]
    weights["layers.2.mixer.D_c"] = torch.ones(32)
    path = save(weights, tmp_path)
    assert_refused(path, r"missing: layers\.\*\.mixer\.D; unknown to the model: layers\.\*\.mixer\.D_c$")
    model = new_model()
    report = load_checkpoint(model, path, strict=False)
    assert report.missing == ("layers.2.mixer.D",) and report.unexpected == ("layers.2.mixer.D_c",)
    assert "missing     layers.*.mixer.D: kept as initialised" in str(report)
    assert_loaded(model, source, but=("layers.2.mixer.D",))


def test_shape_mismatch(source, tmp_path):
    path = save(source | {"layers.1.norm.weight": torch.ones(5)}, tmp_path)
    assert_refused(path, r"layers\.1\.norm\.weight has shape \(5,\) in the file, \(16,\) in the model$")
    report = load_checkpoint(new_model(), path, strict=False)
    assert report.skipped == {"layers.1.norm.weight": "shape (5,) in the file, (16,) in the model"}
    assert "layers.1.norm.weight" in report.missing and "layers.1.norm.weight" not in report.loaded


def test_not_floating_point(source, tmp_path):
    path = save(source | {"norm_f.weight": torch.ones(16, dtype=torch.int8)}, tmp_path)
    assert_refused(path, "norm_f.weight has torch.int8 in the file, torch.float32 in the model")


@pytest.mark.parametrize("strict", [True, False])
def test_head_of_another_task(source, tmp_path, strict):
    path = save({"model": source}, tmp_path)
    seven = new_model(num_classes=7)
    message = "a head for 3 classes and this model one for 7: create it with num_classes=3, or pass drop_head=True"
    assert_refused(path, message, seven, strict=strict)
    none = new_model(num_classes=0)
    message = "a head for 3 classes and this model none: create it with num_classes=3, or pass drop_head=True"
    assert_refused(path, message, none, strict=strict)
    for model in (seven, none):
        report = load_checkpoint(model, path, drop_head=True, strict=strict)
        assert report.skipped == {"head.weight": "drop_head=True", "head.bias": "drop_head=True"}


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_to_load(source, tmp_path, strict):
    """The published loader dropped every name without `encoder.` and loaded nothing without a word."""
    for weights, held in (
        ({"backbone.stem.weight": torch.ones(3)}, r"the file holds backbone\.stem\.weight"),
        ({f"net.{name}": t for name, t in source.items()}, r"the file holds net\.pos_embed|the file holds net\."),
        ({"head.weight": source["head.weight"], "head.bias": source["head.bias"]}, "the file holds head.weight"),
    ):
        assert_refused(save(weights, tmp_path), held, strict=strict)
    other = new_model(embed_dim=32, d_state=8)
    assert_refused(
        save(source, tmp_path), "would load nothing" if not strict else "is for embed_dim 16", other, strict=strict
    )
    assert_refused(save({"epoch": 3, "model": {}}, tmp_path), "holds no tensors by name", strict=strict)


# ---- files that are no checkpoints


class Attack:
    def __reduce__(self):
        import os

        return os.system, ("echo owned",)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (
            b"<!DOCTYPE html><title>Sign in</title>",
            "is neither a PyTorch nor a safetensors file \\(it begins with b'<!DOC",
        ),
        (b"version https://git-lfs.github.com/spec/v1", "is neither a PyTorch nor a safetensors file"),
        (b"PK\x03\x04 no archive", "is damaged or truncated"),
        (b"\x80\x02 no pickle", "is damaged"),
        (b"\xff" * 8 + b'{"a', "is a damaged or truncated safetensors file"),
        (pickle.dumps([1, 2, 3]), "is damaged|holds a list"),
        (pickle.dumps(Attack(), protocol=2), "is damaged|could run code"),
    ],
    ids=["empty", "html", "lfs", "zip", "pickle", "safetensors", "other pickle", "bare attack"],
)
def test_not_a_checkpoint(tmp_path, content, message):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    assert_refused(path, message)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_truncated(source, tmp_path, form, kept):
    path = tmp_path / "weights"
    if form == "safetensors":
        save_file(source, path)
    else:
        torch.save(source, path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert_refused(path, "damaged")


def test_code_is_not_run(source, tmp_path, capfd):
    path = save({"model": source, "extra": Attack()}, tmp_path)
    assert_refused(path, r"holds a \w+\.system beside its tensors, which is not loaded because it could run code")
    assert "owned" not in capfd.readouterr().out


def test_allowed_globals_are_not_left_behind(source, tmp_path):
    before = set(torch.serialization.get_safe_globals())  # a list whose order varies
    load_checkpoint(new_model(), save(source, tmp_path))
    assert set(torch.serialization.get_safe_globals()) == before


def test_no_file(tmp_path):
    assert_refused(tmp_path / "absent.pth", r"cannot be opened \(No such file or directory\)")
    assert_refused(tmp_path, r"cannot be opened \(Is a directory\)")


def test_not_a_dict(tmp_path):
    assert_refused(save([torch.ones(2)], tmp_path), "holds a list, not a state dict")
    assert_refused(save(torch.ones(2), tmp_path), "holds a Tensor, not a state dict")
