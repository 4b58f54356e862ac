"""`python -m bench report`: tables that name the fastest and the missing, plots that are XML, every point in place."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as xml

import pytest

from bench import frame_report, svg
from bench.__main__ import main

SVG = "{http://www.w3.org/2000/svg}"


def row(provider, mark, ms, part="frames", state=0):
    spread = {"median": ms, "p5": 0.9 * ms, "p95": 1.2 * ms, "calls": 3}
    return {
        "part": part, "mark": mark, "provider": provider, "ms": spread, "host": spread | {"median": 2.0},
        "state_bytes": state,
        "error": 1e-7, "launches": 602, "peak_bytes": 1234567, "load": 1.5,
    }  # fmt: skip


RESULT = {
    "meta": {
        "device": {"cpu": "a <CPU> & more", "cores": "2"}, "versions": {"torch": "2.13"}, "commit": "0123456789abcdef",
        "model": "tiny", "size": 224, "depth": None, "threads": 1, "dtype": "float32",
    },
    "commands": ["python -m bench run"],
    "missing": [
        {"part": "frames", "provider": "mamba-ssm", "why": "not installed"},
        {"part": "frames", "provider": "twin", "mark": 1000, "why": "too large"},
    ],
    "rows": [
        row("EndoMamba, cpu", 1, 80.0, state=350216), row("twin", 1, 60.0, state=100),
        row("EndoMamba, cpu", 128, 81.0, state=350216), row("twin", 128, 900.0, state=12800),
        row("scan, cpu", 49, 0.4, "tokens"), row("attention", 49, 0.1, "tokens"),
    ],
}  # fmt: skip


@pytest.fixture
def report(tmp_path):
    file = tmp_path / "some_run.json"
    file.write_text(json.dumps(RESULT))
    assert main(["report", str(file), "--plots", str(tmp_path / "plots")]) == 0
    plots = {part: xml.parse(tmp_path / "plots" / f"some_run_{part}.svg").getroot() for part in ("frames", "tokens")}
    return (tmp_path / "some_run.md").read_text(), plots


def test_tables(report):
    text, _ = report
    assert "| ms | frame 1 | frame 128 |" in text
    assert "| EndoMamba, cpu | 80 [72, 96] | **81 [72.9, 97.2]** |" in text
    assert "| twin | **60 [54, 72]** | 900 [810, 1,080] |" in text, "where the other wins, the table says so"
    assert "| EndoMamba, cpu | 350,216 | 350,216 |" in text and "| twin | 602 | 2 | 3 | 1e-07 |" in text
    assert "- mamba-ssm: not installed" in text and "- twin at frame 1,000: too large" in text
    assert "| attention | **0.1 [0.09, 0.12]** |" in text and "commit 0123456789ab" in text
    tokens = text.split("## The core")[1]
    assert "bytes carried" not in tokens and "Not measured" not in tokens


def test_plots_are_xml_with_all_points(report):
    frames = report[1]["frames"]
    assert len(frames.findall(f"{SVG}circle")) == 4 and len(frames.findall(f"{SVG}polyline")) == 2
    words = [element.text for element in frames.iter(f"{SVG}text")]
    assert {"EndoMamba, cpu", "twin", "1", "128", "frames seen"} <= set(words)
    assert any("a <CPU> & more" in word for word in words)
    ours, twin = (line.get("points") for line in frames.findall(f"{SVG}polyline"))
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in twin.split())
    assert svg.LEFT < x1 < x2 < svg.WIDTH - svg.RIGHT and y1 > y2, "more milliseconds stand higher"
    (_, flat), (_, end) = (map(float, point.split(",")) for point in ours.split())
    assert 0 < flat - end < 3 and y2 < end


def test_names_do_not_cover_each_other():
    placed = svg.spread_out([100, 101, 50, 102])
    assert placed[2] == 50 and sorted(placed) == placed[2:3] + [100, 115, 130]
    low = svg.spread_out([svg.HEIGHT, svg.HEIGHT])
    assert max(low) <= svg.HEIGHT - svg.BOTTOM and abs(low[0] - low[1]) == svg.GAP


def test_one_point_and_many_decades():
    one = svg.chart("t", "s", "x", "y", [svg.Line("a", [(1, 2, 2, 2)])], [1])
    assert xml.fromstring(one) is not None and "nan" not in one
    wide = svg.Axis([1e-3, 1e4], 0, 100)
    assert wide.ticks() == [pytest.approx(10.0**p) for p in range(-3, 5)]
    assert svg.Axis([1, 9], 0, 100).ticks() == [1, 2, 5]


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"rows": []}', '{"rows": [], "meta": {}}'])
def test_refused(content, tmp_path, capsys):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    assert main(["report", str(file)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("report: ") and re.search("is not a result|has no rows", line)


def test_roofline(tmp_path, capsys):
    """A kernel at its bound has a share of 1, and lies on its roof; the mistake of a factor would show."""
    from bench import roofline

    shape = [768, 49, 768, 16]
    least = 1e6 * (768 * 49 * 768 * 18 + 768 * 49 * 768) / 4.06e12  # decays, softplus and gate
    row = {
        "case": "causal", "part": "forward", "ours": {"median_us": least}, "theirs": {"median_us": 5 * least},
        "bytes": 1 << 28, "shape": shape, "dtype": "bf16",
    }  # fmt: skip
    meta = {
        "gpu": "G", "torch": "2", "triton": "3", "driver": "5", "commit": "abc", "rounds": 7, "command": "python it"
    }  # fmt: skip
    result = {"meta": meta, "rows": [row, row | {"part": "no such"}, {"case": "host", "part": "time", "value": 1}]}
    (scan,) = roofline.scans(result)
    assert scan["bound"] == "exponentials" and scan["share"] == pytest.approx(1)
    assert scan["updates"] == 768 * 49 * 768 * 16
    file = tmp_path / "scan.json"
    file.write_text(json.dumps(result))
    assert main(["report", str(file)]) == 0
    table = file.with_suffix(".md").read_text()
    assert "| 5.0 |" in table and "| 100% |" in table and table.count("| causal |") == 1
    drawn = (tmp_path / "scan_roofline.svg").read_text()
    assert drawn.count("<circle") > 2 and "ours, forward" in drawn and "bound, backward" in drawn


KEY = {"model": "tiny", "dtype": "bf16", "backend": "auto"}
FRAMES = {
    "meta": RESULT["meta"] | {"device": {"name": "NVIDIA H200", "cpu": "some"}},
    "commands": ["python -m bench frame"],
    "missing": [{"case": "ViT/16", "why": "not now"} | KEY],
    "rows": [
        KEY | {
            "case": "resident 224", "error": 1e-3, "launches": 3, "bytes_grown": 0, "frames_per_second": 2000.0,
            "host": {"median": 0.5, "p99/p50": 1.04, "p99.9": 0.61, "max": 1.2, "frames": 20000},
            "device": {"median": 0.48},
            "budget": [
                {"name": "Memcpy DtoD (Device -> Device)", "count": 1, "us": 1.5},
                {"name": "void at::native::kernel<2, at::Add<long>, std::array<char*> >(int)", "count": 2, "us": 300.0},
            ],
        },
        KEY | {
            "case": "mp4 1920x1080", "frames_per_second": 210.0, "decode_frames_per_second": 215.0,
            "model_frames_per_second": 800.0, "decoder_waited": 0.02, "limit": "decoder",
        },
        KEY | {
            "case": "2000 frames by the fp32 parallel pass", "mean_error": 2e-3, "slope_per_1000_frames": -1e-5,
            "interval_per_1000_frames": [-3e-5, 1e-5], "by_time": [1.8e-3, 2e-3, 2.1e-3],
            "restarted": {"every": 40, "mean_error": 1.5e-3},
            "beside_restarted": {"slope_per_1000_frames": 2e-6, "interval_per_1000_frames": [-1e-6, 4e-6]},
        },
    ],
}  # fmt: skip


def test_frames(tmp_path):
    file = tmp_path / "gpu_frame.json"
    file.write_text(json.dumps(FRAMES))
    assert main(["report", str(file)]) == 0
    text = (tmp_path / "gpu_frame.md").read_text()
    assert "| resident 224 | 0.500 | 1.04 | 0.610 | 1.200 | 20,000 | 0.480 | 2,000 | 3 | 0 | 1e-03 |" in text
    assert "| mp4 1920x1080 | 210 | 215 | 800 | 2% | decoder |" in text
    assert "| 2.00e-03 | -1.0e-05 | -3.0e-05 to +1.0e-05 | 1.80e-03 to 2.10e-03 |" in text
    assert (
        "| by how much more than a stream restarted every 40 frames | 5.00e-04 | +2.0e-06 | -1.0e-06 to +4.0e-06 |"
        in text
    )
    assert "302 us in sum" in text and text.index("| at::native::kernel | 2 | 300.0 | 150.00 |") < text.index(
        "| Memcpy DtoD |"
    )
    assert "- ViT/16 (tiny, bf16): not now" in text
    # 12 spatial layers both ways and 12 temporal ones; 14 x 14 patches and cls, 384 channels, 16 states
    assert f"{36 * 197 * 384 * 16 / 1e6:.0f} million exponentials" in text and "to read 13 MB of weights" in text


def test_frames_of_a_cpu(tmp_path):
    rows = [row | ({"device": None} if "budget" in row else {}) for row in FRAMES["rows"]]
    file = tmp_path / "cpu_frame.json"
    file.write_text(json.dumps(FRAMES | {"rows": rows, "missing": [], "meta": RESULT["meta"]}))
    assert main(["report", str(file)]) == 0
    text = (tmp_path / "cpu_frame.md").read_text()
    assert "| 20,000 | – | 2,000 |" in text and "in sum" not in text and "Not measured" not in text


def test_a_kernel_is_told_by_its_own_name():
    made = "void endomamba::cuda::(anonymous namespace)::frame_blocks_kernel<unsigned short, 384, true>(endomamba::"
    assert frame_report.short(made) == "endomamba::cuda::frame_blocks_kernel"
    assert frame_report.short("_frame_head_kernel") == "_frame_head_kernel"
    assert (
        frame_report.short("std::enable_if<!(false), void>::type internal::gemvx::kernel<int>")
        == "internal::gemvx::kernel"
    )
