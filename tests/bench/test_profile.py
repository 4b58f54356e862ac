"""`python -m bench profile`: names, bounds, occupancy, SASS and ncu's table, the last from text in ncu's layout."""

from __future__ import annotations

import argparse
import importlib.util
import os

import pytest
import torch

from bench import ahead, calls, chip, ncu, profile, sass
from bench.__main__ import main

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


# ---- names and work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("768x49", (768, 49, 768, 16, "bf16")),
        ("2x3x8", (2, 3, 8, 16, "bf16")),
        ("2x3x8x4", (2, 3, 8, 4, "bf16")),
        ("tiny-l197-fp32", (1, 197, 384, 16, "fp32")),
        ("16 frames spatial, small", (16, 197, 768, 16, "bf16")),
    ],
)
def test_shapes(text, expected):
    assert calls.parse_shape(text) == calls.Shape(*expected)


@pytest.mark.parametrize("given", [("scan", "2x3"), ("selective_scan", "2y3"), ("selective_scan", "0x3")])
def test_a_wrong_name_is_one_sentence(given, capsys):
    assert main(["profile", *given]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("profile: ") and "got " in told and "\n" not in told


def test_the_documented_bounds():
    """768 x 49 both ways, bf16: 249 us of MUFU at 4.18 T/s is 256 at 4.06, softplus and gate apart; 539 us of issue."""
    shape = calls.parse_shape("768x49")
    _, _, work = calls.call_of("bidirectional_scan", shape, "meta")
    elements = 768 * 49 * 768
    assert work.exponentials == elements * (2 * (16 + 2) + 1)
    x, dt, B, params = 2 * elements, 2 * elements, 2 * 768 * 49 * 16, 4 * (768 * 16 + 2 * 768)
    assert work.bytes == 2 * (x + dt + 2 * B + params) + 2 * elements + 2 * elements  # z and y
    assert work.bound()[0] == "exponentials"
    _, _, back = calls.call_of("bidirectional_scan_backward", shape, "meta")
    assert back.bound()[0] == "issue" and back.bound()[1] == pytest.approx(539, abs=1)


@pytest.mark.parametrize("name", calls.NAMES)
def test_every_call_runs_on_a_cpu_and_gives_the_predicted_shapes(name, monkeypatch):
    monkeypatch.setitem(calls.FLAGS, "backend", "reference")
    args, call, work = calls.call_of(name, calls.Shape(2, 3, 4, 2, "fp32"), "cpu")
    moved = sum(t.numel() * t.element_size() for t in (*args, *call()) if isinstance(t, torch.Tensor))
    assert moved == work.bytes > 0


@pytest.mark.parametrize(
    "registers, shared, warps, expected",
    [
        (32, 0, 8, (8, "warps")),
        (32, 0, 1, (32, "blocks")),
        (255, 1024, 4, (2, "registers")),
        (168, 1024, 4, (3, "registers")),  # 12 warps: 16384 // (168 * 32) a scheduler
        (32, 100 * 1024, 4, (2, "shared memory")),
    ],
)
def test_occupancy(registers, shared, warps, expected):
    assert chip.occupancy(registers, shared, warps) == expected


# ---- SASS --------------------------------------------------------------------------------------------------------

SASS = """
\t.target\tsm_90
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MUFU.EX2 R2, R2 ;
        /*0020*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0030*/               @P0 LDG.E R4, desc[UR4][R2.64] ;
        /*0040*/                   MUFU.EX2 R2, R2 ;
        /*0050*/                   FFMA R4, R2, R4, R4 ;
        /*0060*/              @!P1 BRA 0x30 ;
        /*0070*/                   STS [R1], R4 ;
        /*0080*/               @P2 BRA 0x20 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""


def test_the_innermost_loop_is_found_and_counted():
    code = sass.instructions(SASS)
    assert len(code) == 11 and sass.loops(code) == [(0x30, 0x60), (0x20, 0x80)]
    loop = sass.hottest(code)
    assert loop.instructions == 4 and loop.kinds == {"global": 1, "MUFU": 1, "fp32": 1, "control": 1}
    assert sass.hottest(code[:2]) is None


# ---- ncu ---------------------------------------------------------------------------------------------------------

HEAD = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", *ncu.METRICS.values()]
UNITS = ["", "", "", "", "", "", "", "ns", "inst/cycle", "%", "%", "byte", "byte"]
ROWS = [
    ["0", "9", "python", "host", "_scan_fwd_kernel", "1", "7", "150,000", "0.5", "80.25", "30", "1,000,000", "500,000"],
    ["1", "9", "python", "host", "fill(float *, int)", "1", "7", "50,000", "0.1", "0", "9", "0", "1000"],
]


def ncu_csv(units=UNITS, head=HEAD) -> str:
    return "\n".join(",".join(f'"{cell}"' for cell in line) for line in (head, units, *ROWS))


def test_the_table_of_ncu_is_read():
    rows = ncu.parse("==PROF== Disconnected from process 9\n" + ncu_csv())
    assert [row["kernel"] for row in rows] == ["_scan_fwd_kernel", "fill"]
    assert rows[0] == {
        "kernel": "_scan_fwd_kernel", "ns": 150_000, "issue": 0.5, "xu_percent": 80.25, "warps_percent": 30,
        "read": 1e6, "written": 5e5,
    }  # fmt: skip
    micro = [*UNITS[:7], "us", *UNITS[8:11], "Kbyte", "byte"]
    row = ncu.parse(ncu_csv(micro))[0]
    assert (row["ns"], row["read"], row["written"]) == (150_000e3, 1e9, 5e5)


def test_a_table_without_a_metric_or_a_kernel_is_one_sentence():
    with pytest.raises(ahead.Skipped, match="no column gpu__time"):
        ncu.parse(ncu_csv(head=["x" if "gpu__time" in name else name for name in HEAD]))
    with pytest.raises(ahead.Skipped, match="saw no kernel"):
        ncu.parse("==WARNING== No kernels were profiled.")


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ahead.Skipped, match="no GPU"):
        ncu.measure("selective_scan", "2x3", "bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ahead.Skipped, match="ncu is not on PATH"):
        ncu.measure("selective_scan", "2x3", "bf16")


def test_ncu_is_asked_for_the_range_and_its_report_is_read(monkeypatch, tmp_path):
    """A stand-in for ncu writes the report where it is told and answers --import with the table."""
    fake = tmp_path / "ncu"
    (tmp_path / "table.csv").write_text(ncu_csv())
    fake.write_text(
        '#!/bin/sh\necho "$@" >> "$(dirname $0)/asked"\ncase "$1" in\n'
        '--import) cat "$(dirname $0)/table.csv";;\n'
        "*) for a; do case $a in *.ncu-rep) echo report > $a;; esac; done;;\nesac\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    rows = ncu.measure("selective_scan", "2x3", "bf16", tmp_path / "kept.ncu-rep")
    assert len(rows) == 2 and (tmp_path / "kept.ncu-rep").read_text() == "report\n"
    first, second = (tmp_path / "asked").read_text().splitlines()
    assert f"--nvtx-include {ncu.RANGE}/" in first and first.endswith("bench.ncu selective_scan 2x3 bf16")
    assert all(metric in first for metric in ncu.METRICS.values()) and "--page raw --csv" in second
    fake.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM - no permission'\nexit 1\n")
    with pytest.raises(ahead.Skipped, match="ncu failed: ERR_NVGPUCTRPERM"):
        ncu.measure("selective_scan", "2x3", "bf16")


def test_the_call_stands_inside_the_range(monkeypatch):
    said = []
    work = chip.Work(1, 1)
    monkeypatch.setattr(ncu, "call_of", lambda *_: ([], lambda: said.append("call"), work))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: said.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("pop"))
    ncu.run("selective_scan", "2x3", "bf16")
    assert said == ["call"] * 3 + [ncu.RANGE, "call", "pop"]


# ---- the table ---------------------------------------------------------------------------------------------------

AHEAD = {
    "kernel": "_scan_fwd_kernel", "blocks": 36864, "warps": 1, "registers": 75, "stack": 0, "spill_bytes": 8,
    "shared": 2048, "occupancy": 0.375, "limit": "registers", "instructions": 568,
}  # fmt: skip


def test_measured_rows_find_their_launch():
    measured = ncu.parse(ncu_csv())
    rows = profile.merge([AHEAD, AHEAD | {"registers": 80}], measured)
    assert [row.get("ns") for row in rows] == [150_000, None, 50_000] and len(measured) == 2
    text = profile.table(rows)
    assert "150.0" in text and "80 %" in text and "1,500,000" in text and "38 % (registers)" in text
    assert len({len(line) for line in text.splitlines()}) == 1
    assert "issue" not in profile.table([AHEAD])


def test_percent_of_the_bound():
    work = chip.Work(bytes=1_501_000, exponentials=int(chip.EX2 * 100e-6))
    told = profile.summary(work, ncu.parse(ncu_csv()), "NVIDIA H200")
    assert told == "measured: 200.0 us, 50 % of the bound (exponentials); 1,501,000 bytes, 1.00 of those predicted"
    assert "no percentage" in profile.summary(work, ncu.parse(ncu_csv()), "NVIDIA L4")


@needs_triton
def test_the_half_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = argparse.Namespace(op="add_rms_norm", shape="2x49", dtype="bf16", keep=None, no_ncu=False)
    assert profile.main(args) == 0
    text = capsys.readouterr().out
    assert "add_rms_norm 2x49x768x16 bf16, H200 (sm_90)" in text and "the one that applies: memory" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("_add_norm_fwd_kernel ")]
    assert int(row[1]) == 98 and 16 <= int(row[3]) <= 255 and row[5] == "0"
    assert "no loop, all of it" in text and text.rstrip().endswith("not measured: there is no GPU here")
