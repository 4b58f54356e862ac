"""Puts the weights of a training into the package: bf16, with where they come from and how well they do.

    endomamba synth --out DATA --frames 600 --every 4 --size 128 --videos 40
    endomamba synth --out DATA --frames 600 --every 4 --size 128 --videos 20 --variant teacher
    endomamba data manifest DATA --layout synth
    endomamba finetune nano-phases --data DATA/manifest.jsonl --out RUN --set workers=0 --device cpu
    python tools/package_weights.py nano-phases --run RUN --data DATA --test TEST

TEST gets six videos of each held-out variant, and six of "base" that are not in DATA; the rounded weights are scored.
"""

import argparse
import json
import subprocess
from collections import Counter
from pathlib import Path

import torch

from endomamba import synthetic
from endomamba.models import described, pretrained
from endomamba.train import checkpoint, evaluate, finetune, layouts, manifest, recipes
from endomamba.train.world import World

EVERY, FRAMES, SIZE, VIDEOS = 4, 600, 128, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="what it was trained on")
    parser.add_argument("--test", type=Path, required=True, help="a folder for the videos it is scored on")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="what was changed, to be said"
    )
    args = parser.parse_args()
    weights = args.run / "final.safetensors"
    found = described(weights)
    assert found is not None
    headers = [synthetic.load_truth(path, 0, 1).header for path in sorted(args.data.glob("*.truth.jsonl"))]
    trained = {
        "recipe": args.recipe,
        "changes": args.set,
        "updates": last_update(args.run),
        "seed": recipes.find(args.recipe).seed,
        "started from": "scratch",
        "data": {v: f"{n} videos, split train" for v, n in Counter(header["variant"] for header in headers).items()},
        "frames": f"{FRAMES} of each video, every {EVERY}th, {SIZE} x {SIZE}",
        "generator": {header["variant"]: header["hash"] for header in headers},
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "torch": torch.__version__,
    }
    target = pretrained.FOLDER / f"{args.recipe}.safetensors"
    state = checkpoint_state(weights)
    facts = {"model": found.model, "options": json.dumps(found.options), "classes": json.dumps(found.classes)}
    checkpoint.save_weights(target, state, facts | {"trained": json.dumps(trained)})
    trained["accuracy by frame on test videos"] = scores(args.recipe, target, args.test)
    checkpoint.save_weights(target, state, facts | {"trained": json.dumps(trained)})
    print(json.dumps(trained, indent=1))


def last_update(run: Path) -> int:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def checkpoint_state(weights: Path) -> dict:
    from safetensors.torch import load_file

    return {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}


def scores(recipe: str, weights: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Of each variant: accuracy over all frames, the share of the commonest class, macro F1."""
    config, rows = recipes.find(recipe, {"workers": 0, "precision": "fp32"}), {}
    for variant in ("base", "other-textures", "other-motion", "other-polyps", "all-other"):
        place = folder / variant
        for seed in range(VIDEOS):
            if not synthetic.paths(place, variant, "test", seed)[1].exists():
                video = synthetic.SyntheticVideo(
                    variant, split="test", seed=seed, frames=FRAMES, size=SIZE, every=EVERY
                )
                synthetic.write(video, place, force=True)
        listed = manifest.write(place / "manifest.jsonl", *layouts.LAYOUTS["synth"].convert(place))
        world = World(torch.device("cpu"))
        model = finetune.build(config, listed, weights, head=True)
        values = evaluate.evaluate(config, model, listed, "test", world)
        phases = Counter(label for entry in listed.entries for label in entry.labels().tolist())
        rows[variant] = {
            "accuracy": round(values["accuracy"], 4),
            "commonest class": round(max(phases.values()) / phases.total(), 4),
            "macro F1": round(values["f1"], 4),
        }
        print(variant, rows[variant], flush=True)
    return rows


if __name__ == "__main__":
    main()
