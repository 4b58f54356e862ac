"""The launch table of the Triton scan and the tool that rewrites it: what it picks from times, what it writes."""

import importlib.util
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from bench import tune_scan
from endomamba.ops import _scan_triton_table as table


def times(forward, backward) -> dict:
    """Made-up times: forward(choice, b), backward(choice, b) -> us."""
    calls = {"FWD": forward, "BWD": backward, "BWD_TWO": backward}
    return {
        kind: {
            tune_scan.name(choice): {f"{b}x{l}": call(choice, b) for b, l in tune_scan.SHAPES}
            for choice in tune_scan.CHOICES[kind]
        }
        for kind, call in calls.items()
    }


def test_picks_the_fastest_for_many_and_for_few_sequences():
    best = tune_scan.CHOICES["BWD"][-2]
    picked = tune_scan.pick(
        times(
            lambda c, b: 10 * c["W"] + (c["T"] if b == 768 else 12 - c["T"]),
            lambda c, b: 1 if c == best else 2 + c["W"],
        )
    )
    two = tune_scan.CHOICES["BWD_TWO"][0] | {"least": table.BWD_TWO["least"]}
    assert picked == {"FWD": {"W": 1, "T": 4, "T_few": 8, "few": table.FWD["few"]}, "BWD": best, "BWD_TWO": two}


def test_one_long_sequence_has_no_say_on_two_channels():
    fast = tune_scan.CHOICES["BWD_TWO"][1]
    picked = tune_scan.pick(
        times(lambda c, b: 1.0, lambda c, b: (1.0 if c == fast else 2.0) if b > 1 else 100 - c["W"])
    )
    assert picked["BWD_TWO"] == fast | {"least": table.BWD_TWO["least"]}


def test_a_shape_that_is_slow_in_itself_does_not_decide():
    """Times count by the best of their shape: 20 % on three small shapes outweigh 30 % on a large one."""
    first, second = tune_scan.CHOICES["BWD"][:2]

    def backward(c, b):
        large = b == 768
        factor = {tune_scan.name(first): 1.3 if large else 1.0, tune_scan.name(second): 1.0 if large else 1.2}
        return (1000.0 if large else 10.0) * factor.get(tune_scan.name(c), 9.0)

    assert tune_scan.pick(times(lambda c, b: 1.0, backward))["BWD"] == first


def test_writes_a_table_that_python_reads(tmp_path, monkeypatch):
    copy = tmp_path / "table.py"
    shutil.copy(table.__file__, copy)
    monkeypatch.setattr(tune_scan, "_scan_triton_table", SimpleNamespace(__file__=str(copy)))
    two = tune_scan.CHOICES["BWD_TWO"][0] | {"least": 3}
    picked = {"FWD": {"W": 2, "T": 8, "T_few": 8, "few": 1}, "BWD": tune_scan.CHOICES["BWD"][0], "BWD_TWO": two}
    tune_scan.write_table(picked, "a GPU")
    written = runpy.run_path(str(copy))
    assert {kind: written[kind] for kind in picked} == picked
    assert written["SPLIT"] == table.SPLIT
    assert written["APART"] == table.APART
    before = Path(table.__file__).read_text().splitlines()
    changed = sum(a != b for a, b in zip(before, copy.read_text().splitlines(), strict=True))
    assert changed == 3


@pytest.mark.parametrize(
    "choice",
    [table.BWD, table.BWD_TWO, *tune_scan.CHOICES["BWD"], *tune_scan.CHOICES["BWD_TWO"]],
    ids=tune_scan.name,
)
def test_the_warps_asked_for_fit_the_registers(choice):
    """Each quarter of a multiprocessor has 16,384 registers for its own warps; else the launch runs in two waves."""
    registers = -(-choice["maxnreg"] // 8) * 8 * 32
    assert choice["per_sm"] * choice["W"] <= 4 * (16_384 // registers)
    assert choice["T"] % 4 == 0
