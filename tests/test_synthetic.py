"""The synthetic endoscopy: the same bits in any order, a truth that fits the picture, phases no frame tells."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from endomamba import synthetic
from endomamba.cli import main
from endomamba.synthetic import LANDMARKS, PHASES, SAME_LOOKS, VARIANTS, Params, SyntheticVideo, TruthError, load_truth
from endomamba.synthetic.params import generator
from endomamba.synthetic.procedure import Procedure, View
from endomamba.synthetic.render import SIGHT
from endomamba.synthetic.scene import Scene
from endomamba.synthetic.truth import decode_mask, encode_mask

FRAMES, SIZE = 400, 96
# Change what is drawn, and this file and VERSION change with it: nothing trained before is comparable any more.
# `python -m tests.test_synthetic` writes it.
FROZEN = Path(__file__).parent / "data" / "synthetic.json"
FROZEN_FRAMES = (("base", 20), ("base", 150), ("teacher", 220), ("all-other", 100))


def block_means(variant: str, t: int) -> np.ndarray:
    """(8, 8, 3): of the blocks of a frame of 64 x 64."""
    rgb, _ = SyntheticVideo(variant, split="test", seed=11, frames=300, size=64)[t]
    return rgb.reshape(8, 8, 8, 8, 3).mean((1, 3))


def digest(frames) -> str:
    return hashlib.sha256(np.stack(frames).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def video() -> SyntheticVideo:
    return SyntheticVideo(seed=8, frames=FRAMES, size=SIZE)


@pytest.fixture(scope="module")
def shots(video):
    """Every ninth frame: (t, rgb, truth)."""
    return [(t, *video[t]) for t in range(0, FRAMES, 9)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("synthetic")
    assert main(["synth", "--out", str(folder), "--frames", "40", "--size", "64", "--seed", "5", "--quiet"]) == 0
    return synthetic.paths(folder, "base", "train", 5)


# ---- one seed, one video


def test_any_order_and_any_object_give_the_same_bits(video, shots):
    again = SyntheticVideo(seed=8, frames=FRAMES, size=SIZE)
    for t, rgb, truth in shots[::-4]:
        other, same = again[t]
        assert np.array_equal(rgb, other)
        assert truth == same


def test_another_process_with_other_threads_gives_the_same_bits(shots):
    code = (
        "import hashlib, numpy as np; from endomamba.synthetic import SyntheticVideo; "
        f"v = SyntheticVideo(seed=8, frames={FRAMES}, size={SIZE}); "
        f"print(hashlib.sha256(np.stack([v[t][0] for t in {[t for t, _, _ in shots[:6]]}]).tobytes()).hexdigest())"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    assert done.stdout.strip() == digest([rgb for _, rgb, _ in shots[:6]]), done.stderr


def test_seeds_splits_and_variants_differ():
    keys = [
        ("base", "train", 0),
        ("base", "train", 1),
        ("base", "val", 0),
        ("base", "test", 0),
        ("all-other", "test", 0),
    ]
    drawn = {}
    for variant, split, seed in keys:
        numbers = generator(VARIANTS[variant], split, seed, "procedure").random(4)
        assert drawn.setdefault(tuple(numbers), (variant, split, seed)) == (variant, split, seed)
    assert len(drawn) == len(keys)
    first = [SyntheticVideo(v, split=s, seed=n, frames=20, size=32)[0][0] for v, s, n in keys]
    assert len({frame.tobytes() for frame in first}) == len(keys)


def test_held_out_variants_cannot_be_trained_on():
    for name, params in VARIANTS.items():
        assert params.variant == name
        assert params.held_out == (name not in ("base", "teacher"))
        if params.held_out:
            with pytest.raises(ValueError, match="held out"):
                SyntheticVideo(name, split="train", frames=10, size=32)


@pytest.mark.parametrize("size", [32, 65, 97])
def test_any_size(size):
    rgb = SyntheticVideo(seed=1, frames=30, size=size)[3][0]
    assert rgb.shape == (size, size, 3)
    assert rgb.dtype == np.uint8
    assert rgb[size // 2 - 8 : size // 2 + 8].std() > 2


@pytest.mark.parametrize("frames", [1, 2, 7, 50])
def test_any_number_of_frames(frames):
    procedure = Procedure(VARIANTS["base"], "train", 0, frames)
    assert sum(s.stop - s.start for s in procedure.segments) == frames
    for t in range(frames):
        assert np.isfinite(dataclasses.astuple(procedure.view(t))[:6]).all()


def test_every_third_frame(tmp_path):
    all_of_them = SyntheticVideo(seed=3, frames=11, size=32)
    some = SyntheticVideo(seed=3, frames=11, size=32, every=3)
    assert len(some) == 4
    for t in range(4):
        (rgb, row), (other, whole) = some[t], all_of_them[3 * t]
        assert np.array_equal(rgb, other) and row == {**whole, "frame": t}
    pytest.importorskip("av")
    from endomamba.video import open_video

    movie, lines = synthetic.write(some, tmp_path)
    assert np.allclose(load_truth(lines).time, np.arange(4) * 3 / 25)
    with open_video(movie) as reader:
        assert [frame.time for frame in reader] == pytest.approx([0, 0.12, 0.24, 0.36], abs=1e-3)


@pytest.mark.parametrize(
    "bad", [{"seed": -1}, {"frames": 0}, {"size": 8}, {"every": 0}, {"split": "dev"}, {"variant": "bas"}]
)
def test_bad_arguments_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SyntheticVideo(**{"frames": 10, "size": 32, **bad})


# ---- truth and picture


def test_boxes_enclose_their_masks(video, shots):
    seen = 0
    for _, _, truth in shots:
        for polyp in truth["polyps"]:
            mask = decode_mask(polyp["mask"])
            x0, y0, x1, y1 = polyp["box"]
            inside = np.zeros_like(mask)
            inside[y0:y1, x0:x1] = True
            assert mask.sum() >= 24 * (SIZE / 224) ** 2
            assert not (mask & ~inside).any()
            assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
            assert polyp["kind"] == video.procedure.anatomy.polyps[polyp["id"]].kind
            assert not (mask & ~video.renderer.open).any()
            seen += 1
    assert seen > 10


def test_a_visible_polyp_landmark_lies_in_a_mask(shots):
    seen = 0
    for _, _, truth in shots:
        visible, x, y = truth["landmarks"][LANDMARKS.index("polyp")]
        if visible:
            masks = sum(decode_mask(polyp["mask"]) for polyp in truth["polyps"])
            assert masks[round(y), round(x)] == 1
            seen += 1
    assert seen > 5


def test_landmarks_lie_in_the_picture(shots):
    count = np.zeros(len(LANDMARKS))
    for _, _, truth in shots:
        for k, (visible, x, y) in enumerate(truth["landmarks"]):
            assert visible in (0, 1)
            assert -0.5 <= x < SIZE - 0.5 and -0.5 <= y < SIZE - 0.5
            count[k] += visible
    assert (count[: LANDMARKS.index("fold_2")] > 0).all(), dict(zip(LANDMARKS, count))


def test_projection_inverts_the_rays(video):
    """Where a ray of pixel (x, y) meets the wall, that point is projected to (x, y)."""
    view = video.procedure.view(200)
    scene = Scene(video.procedure.anatomy, view, video.renderer.lens)
    x, y = np.meshgrid(np.arange(10.0, SIZE - 10, 7), np.arange(10.0, SIZE - 10, 7))
    rays = scene.aim(video.renderer.lens.rays(x.ravel(), y.ravel()))
    t = scene.march(rays, np.ones(rays.shape[1], bool))
    pixels, far = scene.project((rays * t).T + scene.eye)
    assert np.abs(pixels - np.stack([x.ravel(), y.ravel()], 1)).max() < 0.02
    assert np.abs(far - t).max() < 1e-3
    gap = scene.distance((rays * t + scene.eye[:, None]).astype(np.float32), np.arange(rays.shape[1]))
    assert (np.abs(gap[t < 8]) < 0.02).mean() > 0.97


def test_polyps_are_drawn_where_the_mask_says(video):
    """Without the polyp the picture changes inside its mask, and hardly far away from it."""
    segment = next(s for s in video.procedure.segments if s.phase == "inspection")
    view = video.procedure.view((segment.start + segment.stop) // 2)
    index = segment.polyp
    removed = tuple(i == index for i in range(len(view.removed)))
    with_it, without = (video.renderer.draw(v) for v in (view, dataclasses.replace(view, removed=removed)))
    mask = with_it.polyps == index + 1
    assert mask.any()
    assert not (without.polyps == index + 1).any()
    change = np.abs(with_it.rgb.astype(int) - without.rgb).max(-1)
    ys, xs = np.nonzero(mask)
    yy, xx = np.mgrid[0:SIZE, 0:SIZE]
    away = np.hypot(yy - ys.mean(), xx - xs.mean()) > 1.5 * np.hypot(np.ptp(ys), np.ptp(xs))
    assert change[mask].mean() > 8
    assert change[mask].mean() > 4 * change[away & video.renderer.open].mean()


def test_masks_are_what_a_ray_through_every_pixel_hits(video):
    """The renderer marches every other pixel's ray; marching all of them gives nearly the same masks."""
    common = either = 0
    x, y = (axis.ravel().astype(float) for axis in np.meshgrid(np.arange(SIZE), np.arange(SIZE)))
    for t in range(0, FRAMES, 9):
        view = dataclasses.replace(video.procedure.view(t), tool=0.0)
        picture = video.renderer.draw(view)
        scene = picture.scene
        rays = scene.aim(video.renderer.lens.rays(x, y))
        away = scene.march(rays, np.ones(rays.shape[1], bool))
        points = (rays * away + scene.eye[:, None]).astype(np.float32)
        wall = scene.wall(points)[0]
        for i, lump in zip(scene.polyps, scene.lumps(points)):
            drawn = picture.polyps == i + 1
            if drawn.any():
                hit = ((lump < wall) & (away < SIGHT)).reshape(SIZE, SIZE) & video.renderer.open
                common, either = common + (hit & drawn).sum(), either + (hit | drawn).sum()
    assert either > 1000
    assert common / either > 0.95


def test_camera_truth_is_the_view(video, shots):
    for t, _, truth in shots:
        view = video.procedure.view(t)
        assert truth["depth"] == pytest.approx(view.depth, abs=1e-4)
        assert truth["position"] == pytest.approx([view.x, view.y, view.depth], abs=1e-4)
        x, y = video.procedure.anatomy.centre(view.depth)
        assert np.hypot(view.x - x, view.y - y) < 0.8  # inside the lumen


@pytest.mark.parametrize("variant", VARIANTS)
def test_depth_grows_in_insertion_and_never_again_after_the_caecum(variant):
    procedure = Procedure(VARIANTS[variant], "test", 4, 600)
    depth = np.array([procedure.view(t).depth for t in range(600)])
    phase = [procedure.segment(t).phase for t in range(600)]
    turn = phase.index("caecum")
    assert (np.diff(depth[:turn]) >= 0).all()
    assert (np.diff(depth[turn:]) <= 1e-9).all()
    assert depth.max() == pytest.approx(procedure.anatomy.length)


# ---- the grammar


@pytest.mark.parametrize("variant", VARIANTS)
def test_phases_follow_the_grammar(variant):
    letters = dict(zip(PHASES, "ICWibars"))
    seen = ""
    for seed in range(8):
        procedure = Procedure(VARIANTS[variant], "test", seed, 1500)
        word = "".join(letters[s.phase] for s in procedure.segments)
        assert re.fullmatch(r"I+CW+(?:i(?:ba(?:rs)?)?W+)*", word), word
        assert [s.start for s in procedure.segments[1:]] == [s.stop for s in procedure.segments[:-1]]
        for s in procedure.segments:
            assert (s.phase in ("biopsy", "resection")) == (s.motif == "treat")
        seen += word
    assert set(seen) == set(letters.values())


def test_a_view_holds_no_phase():
    """What is drawn cannot depend on the phase: swap the labels of a pair, and the same View is drawn."""
    names = {field.name for field in dataclasses.fields(View)}
    assert not names & {"phase", "motif", "segment"}
    procedure = Procedure(VARIANTS["base"], "train", 0, 500)
    swap = {a: b for first, second, _ in SAME_LOOKS for a, b in ((first, second), (second, first))}
    before = [procedure.view(t) for t in range(500)]
    for i, s in enumerate(procedure.segments):
        procedure.segments[i] = dataclasses.replace(s, phase=swap.get(s.phase, s.phase))
    assert [procedure.view(t) for t in range(500)] == before


@functools.cache
def procedures() -> list[Procedure]:
    return [Procedure(VARIANTS["base"], "train", seed, 1000) for seed in range(60)]


def views_of(phase: str, motif: str) -> np.ndarray:
    """One frame, anywhere, of each such segment: what its View says relative to the colon, (n, 7)."""
    rows, rng = [], np.random.default_rng(0)
    for procedure in procedures():
        for s in procedure.segments:
            if (s.phase, s.motif) != (phase, motif):
                continue
            view = procedure.view(int(rng.integers(s.start, s.stop)))
            assert s.polyp is None or not view.removed[s.polyp]
            x, y = procedure.anatomy.centre(view.depth)
            gap = 0.0 if s.polyp is None else procedure.anatomy.polyps[s.polyp].s - view.depth
            rows.append([view.x - x, view.y - y, view.yaw, view.pitch, view.roll, view.tool, gap])
    return np.array(rows)


@pytest.mark.parametrize(("first", "second", "motif"), SAME_LOOKS)
def test_pairs_look_the_same(first, second, motif):
    """Two-sample Kolmogorov-Smirnov on every number a frame is drawn from: no difference at 1 in 1000."""
    a, b = (views_of(phase, motif) for phase in (first, second))
    assert min(len(a), len(b)) > 60
    for k in range(a.shape[1]):
        both = np.sort(np.concatenate([a[:, k], b[:, k]]))
        gap = [np.searchsorted(np.sort(x[:, k]), both, side="right") / len(x) for x in (a, b)]
        bound = 1.95 * np.sqrt(1 / len(a) + 1 / len(b))
        assert np.abs(gap[0] - gap[1]).max() < bound, (k, np.abs(gap[0] - gap[1]).max(), bound)


def test_stumps_are_where_a_resection_was():
    for seed in range(6):
        procedure = Procedure(VARIANTS["base"], "train", seed, 800)
        cut = set()
        for s in procedure.segments:
            removed = procedure.view(s.start).removed
            assert {i for i, gone in enumerate(removed) if gone} == cut
            if s.phase == "resection":
                cut.add(s.polyp)


# ---- frozen


def test_hash_of_every_variant_is_frozen():
    assert {name: params.digest() for name, params in VARIANTS.items()} == json.loads(FROZEN.read_text())["hashes"]


def test_the_hash_is_that_of_the_parameters():
    base = VARIANTS["base"]
    assert hashlib.sha256(base.canonical().encode()).hexdigest() == base.digest()
    digests = set()
    for field in dataclasses.fields(Params):
        value = getattr(base, field.name)
        other = {bool: lambda v: not v, str: lambda v: "circle", tuple: lambda v: (*v[:-1], v[-1] + 0.125)}
        changed = other.get(type(value), lambda v: v * 0.5)(value)
        digests.add(dataclasses.replace(base, **{"variant": "mine", field.name: changed}).digest())
    assert len(digests) == len(dataclasses.fields(Params))


def test_a_named_variant_cannot_be_changed():
    with pytest.raises(ValueError, match="is fixed"):
        dataclasses.replace(VARIANTS["base"], speed=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["base"].speed = 1.0


@pytest.mark.parametrize(("variant", "t"), FROZEN_FRAMES)
def test_pictures_are_frozen(variant, t):
    """Another CPU's sin and exp send a ray to another texel here and there: less than a grey level of a mean."""
    frozen = np.array(json.loads(FROZEN.read_text())["blocks"][f"{variant} {t}"])
    assert np.abs(block_means(variant, t) - frozen).max() < 2.5


# ---- files


def test_run_lengths_are_coco():
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert encode_mask(mask) == {"size": [2, 3], "counts": [2, 1, 1, 2]}
    rng = np.random.default_rng(0)
    for mask in [rng.random((5, 7)) < p for p in (0, 0.3, 0.7, 1)]:
        rle = encode_mask(mask)
        assert np.array_equal(decode_mask(rle), mask)
        assert all(count > 0 for count in rle["counts"][1:])
    with pytest.raises(ValueError, match="add up"):
        decode_mask({"size": [2, 3], "counts": [2, 1]})


def test_files_hold_what_the_generator_draws(written):
    from endomamba.video import open_video

    movie, lines = written
    truth = load_truth(lines)
    video = SyntheticVideo(seed=5, frames=40, size=64)
    with open_video(movie) as reader:
        frames = [frame.rgb.numpy() for frame in reader]
        assert reader.info.fps == 25
        assert not reader.damage
    assert len(frames) == len(truth) == 40
    for t in (0, 13, 39):
        rgb, row = video[t]
        off = [np.abs(frame.astype(int) - rgb).mean() for frame in frames]
        assert off[t] < 8
        assert off[t] < 0.8 * max(off)
        assert PHASES[truth.phase[t]] == row["phase"]
        assert truth.time[t] == pytest.approx(t / 25)
        assert [polyp.box for polyp in truth.polyps[t]] == [tuple(polyp["box"]) for polyp in row["polyps"]]
    assert truth.masks().shape == (40, 64, 64)
    assert truth.landmarks.shape == (40, len(LANDMARKS), 3)
    assert np.array_equal(np.isnan(truth.landmarks[..., 1]), truth.landmarks[..., 0] == 0)


def test_the_movie_names_its_parameters(written):
    import av

    with av.open(str(written[0])) as container:
        stamp = json.loads(container.metadata["comment"])
    header = load_truth(written[1], 0, 1).header
    for key in ("hash", "variant", "split", "seed", "generator"):
        assert stamp[key] == header[key]
    assert header["hash"] == VARIANTS["base"].digest()


def test_a_clip_is_a_part_of_the_whole(written):
    whole, clip = load_truth(written[1]), load_truth(written[1], 10, 20)
    assert clip.start == 10
    assert np.array_equal(clip.phase, whole.phase[10:20])
    assert np.array_equal(clip.landmarks, whole.landmarks[10:20], equal_nan=True)
    assert np.array_equal(clip.masks(), whole.masks()[10:20])
    with pytest.raises(TruthError, match="it has 0 to 40"):
        load_truth(written[1], 10, 41)


def edit_line(lines: list[str], number: int, **changes) -> list[str]:
    return [*lines[:number], json.dumps({**json.loads(lines[number]), **changes}), *lines[number + 1 :]]


MASK = {"size": [64, 64], "counts": [64, 3, 64 * 64 - 67]}
POLYP = {"id": 0, "kind": "flat", "box": [1, 0, 2, 3], "mask": MASK}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [], "not a truth file"),
        (lambda lines: lines[1:], "not a truth file"),
        (lambda lines: lines[:-3], "cut off: frame 37 of 40"),
        (lambda lines: [*lines[:-1], lines[-1][:30]], "line 41"),
        (lambda lines: [*lines[:5], *lines[6:]], "line 6: frame 4 was expected, got 5"),
        (lambda lines: edit_line(lines, 0, generator=0), "generator version 0"),
        (lambda lines: edit_line(lines, 0, hash="0" * 64), "hash"),
        (lambda lines: edit_line(lines, 0, phases=["a"]), "phases must be"),
        (lambda lines: edit_line(lines, 3, phase="rest"), "line 4: phase 'rest'"),
        (lambda lines: edit_line(lines, 3, landmarks=[[0, 0, 0]]), "line 4: 6 landmarks"),
        (lambda lines: edit_line(lines, 3, polyps=[{**POLYP, "box": [0, 0, 9, 9]}]), "box of polyp 0 must be"),
        (lambda lines: edit_line(lines, 3, polyps=[{**POLYP, "mask": {**MASK, "counts": [5]}}]), "add up"),
        (lambda lines: edit_line(lines, 3, polyps=[{"id": 0}]), "line 4: 'mask' is missing"),
    ],
)
def test_a_damaged_truth_file_is_refused(written, tmp_path, damage, message):
    path = tmp_path / "damaged.truth.jsonl"
    lines = written[1].read_text().splitlines()
    path.write_text("\n".join(edit_line(lines, 3, polyps=[POLYP])))
    assert load_truth(path).polyps[2][0].mask[:3, 1].all()
    path.write_text("\n".join(damage(lines)))
    with pytest.raises(TruthError, match=re.escape(message)):
        load_truth(path)


def test_existing_files_stay_unless_forced(written, capsys):
    before = [path.read_bytes() for path in written]
    arguments = ["synth", "--out", str(written[0].parent), "--size", "64", "--seed", "5", "--quiet", "--frames"]
    assert main([*arguments, "30"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.read_bytes() for path in written] == before
    assert main([*arguments, "40", "--force"]) == 0
    assert [path.read_bytes() for path in written] == before  # the same seed, the same files


def test_a_stopped_run_leaves_whole_videos_only(tmp_path, monkeypatch, capsys):
    pytest.importorskip("av")
    draw, drawn = SyntheticVideo.__getitem__, []

    def interrupt(self, t):
        drawn.append(t)
        if len(drawn) > 25:
            raise KeyboardInterrupt
        return draw(self, t)

    monkeypatch.setattr(SyntheticVideo, "__getitem__", interrupt)
    arguments = ["synth", "--out", str(tmp_path), "--videos", "3", "--frames", "20", "--size", "32", "--quiet"]
    assert main(arguments) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base-train-000000.mp4",
        "base-train-000000.truth.jsonl",
    ]
    assert len(load_truth(tmp_path / "base-train-000000.truth.jsonl")) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "bas"], "variant must be one of base,"),
        (["--variant", "all-other"], "held out"),
        (["--split", "dev"], "split must be one of train"),
        (["--size", "33"], "must be even"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, capsys, arguments, message):
    pytest.importorskip("av")
    assert main(["synth", "--out", str(tmp_path / "out"), "--frames", "5", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    blocks = {f"{variant} {t}": np.rint(block_means(variant, t)).astype(int).tolist() for variant, t in FROZEN_FRAMES}
    hashes = {name: params.digest() for name, params in VARIANTS.items()}
    FROZEN.write_text(json.dumps({"hashes": hashes, "blocks": blocks}) + "\n")
