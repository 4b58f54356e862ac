"""Metrics against their definitions, worked by hand or written a second time without the library."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch

from endomamba.train.evaluate import Neighbours
from endomamba.train.metrics import (
    average_precision,
    landmark_scores,
    mask_scores,
    means,
    scores,
    set_scores,
    video_scores,
)
from endomamba.train.relaxed import relax, relaxed_scores
from endomamba.train.surface import hausdorff, surface

from .common import tiny


def by_hand(predicted, true, classes):
    """Macro scores from their definitions."""
    p, t = np.asarray(predicted), np.asarray(true)
    rows = []
    for k in range(classes):
        hit, said, real = ((p == k) & (t == k)).sum(), (p == k).sum(), (t == k).sum()
        if said + real:
            rows.append(
                (
                    hit / said if said else 0,
                    hit / real if real else 0,
                    hit / (said + real - hit),
                    2 * hit / (said + real),
                )
            )
    return dict(zip(("precision", "recall", "jaccard", "f1"), np.mean(rows, 0))), np.std(rows, 0)


@pytest.mark.parametrize("classes, used", [(2, 2), (5, 5), (7, 4), (3, 1)])
def test_scores(classes, used):
    rng = np.random.default_rng(classes)
    for _ in range(10):
        p, t = rng.integers(0, used, (2, 30))
        got, (want, spread) = scores(torch.tensor(p), torch.tensor(t), classes), by_hand(p, t, classes)
        assert got["accuracy"] == pytest.approx((p == t).mean())
        for (name, value), std in zip(want.items(), spread):
            assert got[name] == pytest.approx(value, abs=1e-6) and got[f"{name}_std"] == pytest.approx(std, abs=1e-6)
        if classes == 2:
            hit = ((p == 1) & (t == 1)).sum()
            assert got["f1_positive"] == pytest.approx(2 * hit / ((p == 1).sum() + (t == 1).sum()), abs=1e-6)


def test_video_scores():
    a = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])
    b = torch.tensor([1, 1]), torch.tensor([1, 0])
    got = video_scores([a, b], 2)
    assert got["accuracy"] == pytest.approx(4 / 6)
    assert got["video_accuracy"] == pytest.approx(0.625) and got["video_accuracy_std"] == pytest.approx(0.125)
    assert got["video_balanced_accuracy"] == pytest.approx(((2 / 3 + 1) / 2 + 0.5) / 2)
    each = [by_hand(*video, 2)[0] for video in (a, b)]
    for name in ("precision", "recall", "jaccard", "f1"):
        values = [of_video[name] for of_video in each]
        assert got[f"video_{name}"] == pytest.approx(np.mean(values), abs=1e-6)
        assert got[f"video_{name}_std"] == pytest.approx(np.std(values), abs=1e-6)
    assert "relaxed_accuracy" not in got and "relaxed_accuracy" in video_scores([a, b], 2, relaxed=1)


# ---- relaxed phases


def evaluate_m(gt, pred, t, classes, published):
    """A second writing, loop by loop, of the published rule; phases from 1 as there.  published: its slip too."""
    diff = [p - g for p, g in zip(pred, gt)]
    edges = [0] + [i for i in range(1, len(gt)) if gt[i] != gt[i - 1]] + [len(gt)]
    for start, stop in itertools.pairwise(edges):
        phase, cur = gt[start], diff[start:stop]
        n = min(t, len(cur))
        late, early = [-1], [1]
        if classes == 7 and phase in (4, 5):
            early = [1, 2]
        elif classes == 7 and phase in (6, 7):
            late, early = [-1, -2], [1, 2]
        for i in [i for i in range(n) if cur[i] in late]:
            cur[i] = 0
        for i in [i for i, d in enumerate(cur[len(cur) - n :]) if d in early]:
            cur[i if published else len(cur) - n + i] = 0
        diff[start:stop] = cur
    rows = {}
    for phase in range(1, classes + 1):
        if phase not in gt:
            continue
        union = [i for i in range(len(gt)) if gt[i] == phase or pred[i] == phase]
        tp = sum(diff[i] == 0 for i in union)
        said = pred.count(phase)
        rows[phase] = (
            min(1, tp / said) if said else (1 if tp else math.nan),
            min(1, tp / gt.count(phase)),
            tp / len(union),
        )
    return sum(d == 0 for d in diff) / len(gt), rows


@pytest.mark.parametrize("published", [False, True], ids=["meant", "published"])
@pytest.mark.parametrize("classes", [7, 8])
def test_relaxed_phases(classes, published):
    rng = np.random.default_rng(classes)
    videos, accuracies, rows = [], [], []
    for _ in range(12):
        true = np.repeat(np.sort(rng.integers(0, classes, 9)), rng.integers(1, 9, 9))
        if rng.random() < 0.5:
            true = np.concatenate([true, true[:5]])
        predicted = np.clip(true + rng.choice([-2, -1, 0, 0, 0, 1, 2], len(true)), 0, classes - 1)
        videos.append((torch.tensor(predicted), torch.tensor(true)))
        accuracy, table = evaluate_m((true + 1).tolist(), (predicted + 1).tolist(), 4, classes, published)
        accuracies.append(accuracy)
        rows.append(table)
    got = relaxed_scores(videos, classes, 4, published)
    assert got["relaxed_accuracy"] == pytest.approx(np.mean(accuracies))
    for i, name in enumerate(("precision", "recall", "jaccard")):
        by_phase = [
            np.nanmean([table[phase][i] for table in rows if phase in table])
            for phase in range(1, classes + 1)
            if any(phase in table for table in rows)
        ]
        assert got[f"relaxed_{name}"] == pytest.approx(np.mean(by_phase)), name


def test_relaxed_borders_by_hand():
    true, said = torch.tensor([1, 1, 1, 1, 2, 2, 2, 2]), torch.tensor([0, 1, 0, 2, 1, 1, 2, 3])
    #   frame 0: late by a phase, at the begin; 2: late, not at the begin; 3: early, at the end; 5: late, second frame
    assert relax(said, true, 5, 1).tolist() == [True, True, False, True, True, False, True, True]
    assert relax(said, true, 5, 2).tolist() == [True, True, False, True, True, True, True, True]
    # The slip: what is early in the last frames is forgiven in the first.
    assert relax(said, true, 5, 1, published=True).tolist() == [True, True, False, False, True, False, True, False]


# ---- masks


def distances(a, b):
    """Of every voxel of a to the nearest of b, the plain way; both lists of points."""
    return [min(math.dist(p, q) for q in b) for p in a]


def border(mask):
    """Voxels with a neighbour outside, the plain way."""
    found = []
    for place in np.argwhere(mask):
        for dim in range(3):
            for step in (-1, 1):
                near = place.copy()
                near[dim] += step
                if (near < 0).any() or (near >= mask.shape).any() or not mask[tuple(near)]:
                    found.append(tuple(int(x) for x in place))
    return sorted(set(found))


@pytest.mark.parametrize("shape", [(1, 9, 11), (5, 8, 7), (9, 5, 5)])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_distances_between_surfaces(shape, share):
    rng = np.random.default_rng(int(100 * share))
    for _ in range(3):
        a, b = rng.random((2, *shape)) < share
        a[0, 0, 0] = b[-1, -1, -1] = True
        ours = {tuple(p) for p in np.argwhere(surface(torch.tensor(a))).tolist()}
        assert sorted(ours) == border(a)
        both = distances(border(a), border(b)) + distances(border(b), border(a))
        for percent in (50, 95, 100):
            got = hausdorff(torch.tensor(a), torch.tensor(b), percent)
            assert got == pytest.approx(np.percentile(both, percent), abs=1e-9)
    assert math.isnan(hausdorff(torch.tensor(a), torch.zeros(shape, dtype=torch.bool)))


def test_masks_full_of_holes_take_no_minutes():
    """As those of a network that has just begun: half a million voxels of surface."""
    noise = torch.rand(60, 128, 128, generator=torch.Generator().manual_seed(0)) < 0.5
    began = time.process_time()
    assert hausdorff(noise, noise.flip(0)) == 1.0
    assert time.process_time() - began < 20


def test_the_largest_distance_is_that_of_torchmetrics():
    from torchmetrics.functional.segmentation import hausdorff_distance

    rng = np.random.default_rng(0)
    a, b = torch.tensor(rng.random((2, 1, 12, 12)) < 0.1)
    want = hausdorff_distance(a[None].long(), b[None].long(), num_classes=1, include_background=True)
    assert hausdorff(a, b, 100) == pytest.approx(float(want.max()), abs=1e-4)


def test_mask_scores():
    from torchmetrics.functional.segmentation import dice_score, mean_iou

    rng = torch.Generator().manual_seed(0)
    said = torch.rand(4, 8, 8, generator=rng) < 0.3
    true = (torch.rand(4, 8, 8, generator=rng) < 0.4).to(torch.uint8)
    got = mask_scores(said, true)
    dice = dice_score(said.long()[None, None], true.long()[None, None], 1, input_format="one-hot")
    iou = mean_iou(said.long()[None, None], true.long()[None, None], 1, input_format="one-hot")
    assert got["dice"] == pytest.approx(float(dice)) and got["jaccard"] == pytest.approx(float(iou))
    frames = [2 * (p & (t == 1)).sum() / (p.sum() + t.sum()) for p, t in zip(said, true)]
    assert got["frame_dice"] == pytest.approx(float(torch.stack(frames).mean()))
    assert got["hd95"] == hausdorff(said, true == 1)
    # Where nothing counts, nothing counts.
    ignored = true.clone()
    ignored[:, :4] = 255
    alone = mask_scores(said[:, 4:], true[:, 4:])
    assert mask_scores(said, ignored)["dice"] == alone["dice"]


@pytest.mark.parametrize(
    "found, there, ours, published",
    [
        (0, 0, (1, math.nan), (0, 0)),
        (1, 0, (0, math.nan), (1, 0)),
        (0, 1, (0, math.nan), (0, 0)),
        (1, 1, (1, 0), (1, 0)),
    ],
)
def test_empty_masks(found, there, ours, published):
    said, true = torch.full((2, 4, 4), bool(found)), torch.full((2, 4, 4), there, dtype=torch.uint8)
    for wanted, quirk in ((ours, False), (published, True)):
        got = mask_scores(said, true, quirk)
        assert (got["dice"], got["hd95"]) == pytest.approx(wanted, nan_ok=True)


def test_means_leave_out_what_does_not_exist():
    rows = [{"dice": 1.0, "hd95": math.nan}, {"dice": 0.5, "hd95": 3.0}]
    assert means(rows) == {"dice": 0.75, "dice_std": 0.25, "hd95": 3.0, "hd95_std": 0.0}


# ---- landmarks, sets


def precision_by_hand(score, true):
    """Of every threshold, precision times the step in recall."""
    order = np.argsort(-score, kind="stable")
    score, true = score[order], true[order]
    ends = [i for i in range(len(score)) if i + 1 == len(score) or score[i + 1] != score[i]]  # ties stay together
    total, before = 0.0, 0.0
    for i in ends:
        recall = true[: i + 1].sum() / true.sum()
        total += (recall - before) * true[: i + 1].mean()
        before = recall
    return total


def test_average_precision():
    rng = np.random.default_rng(1)
    score = (rng.random((40, 4)) * 8).round() / 8  # with ties
    true = rng.random((40, 4)) < (0.5, 0.1, 0.9, 0.0)
    got = average_precision(torch.tensor(score, dtype=torch.float32), torch.tensor(true))
    assert got[:3].tolist() == pytest.approx([precision_by_hand(score[:, k], true[:, k]) for k in range(3)], abs=1e-6)
    assert got[3].isnan()
    half = [(torch.tensor(score[i : i + 20]), torch.tensor(true[i : i + 20]).long()) for i in (0, 20)]
    named = set_scores(half, ["a", "b", "c", "d"])
    assert named["ap"] == pytest.approx(float(got[:3].mean())) and math.isnan(named["ap:d"])
    assert named["ap:b"] == pytest.approx(float(got[1]))
    halves = (slice(0, 20), slice(20, 40))
    videos = [[precision_by_hand(score[h, k], true[h, k]) for h in halves if true[h, k].any()] for k in range(3)]
    assert named["video_ap"] == pytest.approx(np.mean([np.mean(of_class) for of_class in videos]), abs=1e-6)


def test_landmark_scores():
    nan = math.nan
    true = torch.tensor([[[1, 0.5, 0.5], [0, nan, nan]], [[1, 0.2, 0.2], [1, 0.9, 0.9]]])
    got = torch.tensor([[[2.0, 0.5, 0.53], [1.0, 0.3, 0.3]], [[-1.0, 0.26, 0.28], [3.0, 0.9, 0.9]]])
    values = landmark_scores(got, true)
    assert values["distance"] == pytest.approx((0.03 + 0.1 + 0) / 3, abs=1e-6)
    assert values["pck_5"] == pytest.approx(2 / 3) and values["visibility_accuracy"] == 0.5
    assert values["visibility_ap"] == 1.0


def test_neighbours():
    rng = torch.Generator().manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(50, 6, generator=rng), dim=1)
    labels = torch.randint(0, 3, (50,), generator=rng)
    asked = torch.nn.functional.normalize(torch.randn(4, 5, 6, generator=rng), dim=-1)
    config = tiny(probe="knn", neighbours=7)
    got = Neighbours([(bank[:20], labels[:20]), (bank[20:], labels[20:])], config, 3)(asked)
    for place in np.ndindex(4, 5):
        near = sorted(range(50), key=lambda i: -float(bank[i] @ asked[place]))[:7]
        votes = [sum(math.exp(float(bank[i] @ asked[place]) / 0.07) for i in near if labels[i] == k) for k in range(3)]
        assert int(got[place]) == int(np.argmax(votes))
    sets = torch.nn.functional.one_hot(labels, 3)
    share = Neighbours([(bank, sets)], tiny(task="sets", probe="knn", neighbours=7), 3)(asked)
    assert torch.equal(share.argmax(-1), got) and torch.allclose(share.sum(-1), torch.ones(4, 5))
    one = Neighbours([(bank, labels)], tiny(probe="knn", neighbours=1), 3)
    assert torch.equal(one(bank), labels)
