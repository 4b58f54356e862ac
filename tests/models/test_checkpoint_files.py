"""load_checkpoint on files as they were published, name by name, and on files made to do harm."""

import argparse
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from endomamba.models import CheckpointError, load_checkpoint
from tests.models.test_checkpoint import assert_loaded, assert_refused, new_model, pretraining, save, source

__all__ = ["source"]  # a fixture


def published_decoder(width, heads_width, hidden, encoder, blocks=4):
    """Names and shapes beside `encoder.` in checkpoint-499.pth."""
    shapes = {
        "mask_token": (1, 1, width),
        "encoder_to_decoder.weight": (width, encoder),
        "decoder.norm.weight": (width,),
        "decoder.norm.bias": (width,),
        "decoder.head.weight": (768, width),
        "decoder.head.bias": (768,),
    }
    for i in range(blocks):
        block = {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "attn.qkv.weight": (3 * heads_width, width),
            "attn.q_bias": (heads_width,),
            "attn.v_bias": (heads_width,),
            "attn.proj.weight": (width, heads_width),
            "attn.proj.bias": (width,),
            "mlp.fc1.weight": (hidden, width),
            "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (width, hidden),
            "mlp.fc2.bias": (width,),
        }
        shapes |= {f"decoder.blocks.{i}.{name}": shape for name, shape in block.items()}
    return {name: torch.full(shape, 7.0) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", ["pth", "safetensors", "module."])
def test_the_whole_pretraining_file(source, tmp_path, form):
    """The model of checkpoint-499.pth, as saved, as safetensors, and under a DistributedDataParallel."""
    decoder = published_decoder(width=8, heads_width=6, hidden=32, encoder=16)
    encoder = {name: t for name, t in pretraining(source).items() if name.startswith("encoder.")}
    weights, path = encoder | decoder, tmp_path / "checkpoint-499.safetensors"
    if form == "safetensors":
        save_file({name: t.contiguous() for name, t in weights.items()}, path)
    else:
        prefix = form if form == "module." else ""
        args = argparse.Namespace(model="pretrain_videomamba_small", opt_betas=[0.9, 0.999], decay=np.float64(0.05))
        content = {"model": {prefix + name: t for name, t in weights.items()}, "epoch": 499, "args": args}
        path = save(content, tmp_path, "checkpoint-499.pth")
    model = new_model()
    report = load_checkpoint(model, path)
    kept = ("cls_token", "pos_embed", "head.weight", "head.bias")
    assert_loaded(model, source, but=kept)
    assert sorted(report.missing) == sorted(kept) and not report.unexpected
    assert len(report.loaded) == len(source) - len(kept)
    assert {name.removeprefix("module.") for name in report.skipped} == {*decoder, "encoder.pos_embed"}
    assert len(str(report).splitlines()) < 40, "a report of a whole file should be read at a glance"


def test_published_and_new_names_in_one_file(source, tmp_path):
    """Which of the two is meant is nobody's guess."""
    path = save(source | {f"encoder.{name}": t + 1 for name, t in source.items()}, tmp_path)
    assert_refused(path, r"holds both (\S+) and encoder\.\1")


def test_an_unprefixed_file_loads_like_a_prefixed_one(source, tmp_path):
    """The published loader dropped every name without `encoder.` and said nothing."""
    body = {name: t for name, t in source.items() if not name.startswith("head.")}
    plain, prefixed = new_model(num_classes=0), new_model(num_classes=0)
    load_checkpoint(plain, save(body, tmp_path, "plain.pth"))
    load_checkpoint(prefixed, save({f"encoder.{name}": t for name, t in body.items()}, tmp_path, "prefixed.pth"))
    for model in (plain, prefixed):
        assert_loaded(model, source)


def test_loading_twice_and_into_what_was_trained(source, tmp_path):
    """A load replaces; nothing of the weights before it is left, and the file's tensors are not shared."""
    path = save(source, tmp_path)
    model = new_model(seed=5)
    load_checkpoint(model, path)
    pointers = [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    load_checkpoint(model, path)
    assert_loaded(model, source)
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


# ---- files made to do harm: refused, and nothing of them is run


def bomb(kind, mark):
    """An object whose unpickling creates the file `mark`."""
    code = f"open({str(mark)!r}, 'w').close()"
    call = {
        "system": (os.system, (f"touch {mark}",)),
        "eval": (eval, (f"open({str(mark)!r}, 'w')",)),
        "import": (exec, (code,)),
    }[kind]

    class Bomb:
        def __reduce__(self):
            return call

    return Bomb()


def hidden(kind, mark, place, source):
    harm = bomb(kind, mark)
    return {
        "beside": {"model": source, "extra": harm},
        "in args": {"model": source, "args": argparse.Namespace(lr=harm)},
        "as a weight": {"model": source | {"layers.0.norm.weight": harm}},
        "as the file": harm,
    }[place]


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["beside", "in args", "as a weight", "as the file"])
@pytest.mark.parametrize("kind", ["system", "eval", "import"])
def test_no_code_is_run(source, tmp_path, kind, place, old_format):
    mark = tmp_path / "mark"
    content = hidden(kind, mark, place, source)
    path = save(content, tmp_path, _use_new_zipfile_serialization=not old_format)
    message = assert_refused(path, "holds a .* beside its tensors, which is not loaded because it could run code")
    assert ("system" if kind == "system" else "eval" if kind == "eval" else "exec") in message
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file was harmless: this test could not fail"


class OtherNamespace(argparse.Namespace):
    """Not a Namespace of the standard library, whatever it derives from."""


class ObjectScalar:
    """numpy's scalar(), asked for a Python object at an address that the file names."""

    def __reduce__(self):
        scalar, _ = np.float64(1).__reduce__()
        return scalar, (np.dtype("O"), bytes(8))


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "extra", [np.arange(3), np.dtype("O"), ObjectScalar(), OtherNamespace(lr=1)], ids=lambda extra: type(extra).__name__
)
def test_the_allowed_names_let_no_others_in(source, tmp_path, extra, old_format):
    """Namespace and numpy numbers are let through; arrays, objects and subclasses are not."""
    path = save({"model": source, "extra": extra}, tmp_path, _use_new_zipfile_serialization=not old_format)
    assert_refused(path, "could run code|is damaged")


@pytest.mark.parametrize("options", [{"strict": True}, {"strict": False}, {"drop_head": True}, {"map_pos_embed": True}])
def test_no_option_makes_a_bad_file_good(source, tmp_path, options):
    garbage = tmp_path / "notes.txt"
    garbage.write_text("the weights are on the other disk\n")
    assert_refused(garbage, "is neither a PyTorch nor a safetensors file", **options)
    assert_refused(save({"model": source, "extra": bomb("system", tmp_path / "mark")}, tmp_path), "run code", **options)
    stray = save({f"stem.{name}": t for name, t in source.items()}, tmp_path)
    assert_refused(stray, "would load nothing", **options)


def test_every_cut_of_a_file_is_refused(source, tmp_path):
    """A download that stopped anywhere, in each form; the model keeps its weights."""
    buffers = {}
    for form, new in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save(source, buffer, _use_new_zipfile_serialization=new)
        buffers[form] = buffer.getvalue()
    save_file(source, tmp_path / "whole.safetensors")
    buffers["safetensors"] = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "part"
    for data in buffers.values():
        for i in range(25):
            path.write_bytes(data[: len(data) * i // 25])
            assert_refused(path, "damaged|is empty|neither a PyTorch nor a safetensors")


def test_a_damaged_byte_inside_the_archive(source, tmp_path):
    path = save(source, tmp_path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    key = next(name for name in parts if name.endswith("data.pkl"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data[:40] + b"\xff\xff" + data[42:] if name == key else data)
    assert_refused(path, "is damaged")


def test_a_plain_pickle_of_tensors(source, tmp_path):
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({name: t.cpu().numpy() for name, t in source.items()}))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(new_model(), path)
    assert "\n" not in str(error.value)
