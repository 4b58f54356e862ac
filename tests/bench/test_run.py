"""`python -m bench run`: accuracy before time, states as after so many frames, what is missing, going on."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench import providers, run
from bench.__main__ import main
from bench.providers import Options, Prepared, Provider

SMALL = Options(size=32, depth=4)


@pytest.fixture(scope="module")
def subjects():
    """One of each kind, on frames of four patches."""
    kinds = {"twin": providers.Twin, "window": providers.Window, "alone": providers.Alone}
    return {"mamba": providers.EndoMamba(SMALL, "cpu")} | {name: make(SMALL) for name, make in kinds.items()}


@pytest.mark.parametrize("name", ["mamba", "twin", "window", "alone"])
def test_each_is_right_by_its_reference(subjects, name):
    assert 0 < subjects[name].error() <= SMALL.tolerance


@pytest.mark.parametrize("name", ["mamba", "twin", "window"])
def test_a_wrong_step_is_seen(subjects, name, monkeypatch):
    subject = subjects[name]
    step = subject.model.step_
    monkeypatch.setattr(subject.model, "step_", lambda frame, state: step(frame, subject.model.init_state(1)))
    assert not subject.error() <= SMALL.tolerance, "a state that is forgotten"


@pytest.mark.parametrize("name", ["mamba", "twin", "window", "alone"])
def test_a_call_can_be_made_again(subjects, name):
    with torch.inference_mode():
        prepared = subjects[name].prepare(5)
        first = prepared.call().clone()
        prepared.rewind()
        assert torch.equal(prepared.call(), first)


def test_the_state_is_that_of_its_frame(subjects):
    twin, tokens = subjects["twin"], 5
    with torch.inference_mode():
        one, nine = twin.prepare(1), twin.prepare(9)
        assert nine.nbytes - 8 == 9 * (one.nbytes - 8)  # frame is 8 bytes
        assert one.nbytes - 8 == 2 * 2 * tokens * 192 * 4  # K and V, layers, tokens, channels, fp32
        state = nine.call.args[1]
        nine.call()
        assert (state.stop, int(state.frame)) == (9 * tokens, 9) and state.keys[:, :, :, : state.stop].isfinite().all()
        mamba = [subjects["mamba"].prepare(mark) for mark in (1, 9)]
        assert mamba[0].nbytes == mamba[1].nbytes and int(mamba[1].call.args[1].frame) == 8


def test_the_cache_is_that_of_the_same_frame_again(subjects):
    """Reading one frame twice gives the cache that `prepare` makes by repeating it, in the first layer."""
    twin = subjects["twin"]
    with torch.inference_mode():
        state = twin.model.init_state(1)
        twin.model.step_(twin.frames[0], state)
        made = twin.prepare(3).call.args[1].keys[0, 0, :, :10]
        assert torch.equal(made, torch.cat([state.held()[0][0, 0]] * 2, 1))


def test_a_wrong_replay_is_seen(subjects, monkeypatch):
    """Capturing needs a GPU: here a replay is the call itself, and then one that forgets to be rewound."""
    graphed = providers.Graphed(lambda: subjects["mamba"])
    monkeypatch.setattr(providers, "captured", lambda call: call)
    assert 0 < graphed.error() <= SMALL.tolerance
    monkeypatch.setattr(providers, "captured", lambda call: lambda: (call(), call())[1])
    assert not graphed.error() <= SMALL.tolerance


def test_too_large_a_cache_is_refused(subjects):
    with pytest.raises(MemoryError, match="its cache needs"):
        subjects["twin"].prepare(10**9)


@pytest.mark.parametrize("tokens", [1, 49])
def test_cores(tokens):
    for subject in (providers.Scan(Options(), "cpu"), providers.Attention(Options())):
        assert 0 < subject.error() <= 2e-5
        subject.prepare(tokens).call()


# ---- the run -----------------------------------------------------------------------------------------------------


class Fake:
    """Its call is slow at frame 4; it counts how often it was rewound."""

    def __init__(self, error=0.0):
        self.wrong, self.rewound = error, 0

    def error(self):
        return self.wrong

    def rewind(self):
        self.rewound += 1

    def prepare(self, mark):
        if mark > 8:
            raise MemoryError("its cache needs more")
        return Prepared(lambda: torch.ones(1000) + 1, self.rewind, 100 * mark)


@pytest.fixture
def fakes(monkeypatch):
    made = {"good": Fake(), "wrong": Fake(1.0), "nan": Fake(math.nan)}
    listed = [Provider(name, lambda fake=fake: fake) for name, fake in made.items()]
    listed.append(Provider("absent", None, "it is not installed"))
    monkeypatch.setattr(providers, "frame_providers", lambda options: listed)
    return made


def test_rows_and_what_is_missing(fakes, tmp_path, capsys):
    out = tmp_path / "run.json"
    command = ["run", "frames", "--marks", "1,4,9", "--rounds", "2", "--out", str(out)]
    assert main(command) == 0
    result = json.loads(out.read_text())
    assert [(row["provider"], row["mark"]) for row in result["rows"]] == [("good", 1), ("good", 4)]
    row = result["rows"][1]
    assert row["ms"]["calls"] == 6 and 0 < row["ms"]["p5"] <= row["ms"]["median"] <= row["ms"]["p95"]
    assert row["state_bytes"] == 400 and row["launches"] == 2 and 8000 <= row["peak_bytes"] < 8100
    why = {m["provider"]: m["why"] for m in result["missing"]}
    assert set(why) == {"wrong", "nan", "absent", "good"} and "no time is given" in why["nan"]
    assert "absent" in capsys.readouterr().out and result["meta"]["commit"]

    calls = fakes["good"].rewound
    assert main(command) == 0, "nothing is left to do"
    assert fakes["good"].rewound == calls and json.loads(out.read_text())["rows"] == result["rows"]


def test_a_run_that_was_cut_short_goes_on(fakes, tmp_path):
    """Four turns after two: the first two are kept, not measured again."""
    out = tmp_path / "run.json"
    command = ["run", "frames", "--marks", "1,4", "--out", str(out), "--rounds"]
    assert main([*command, "2"]) == 0
    before = [row["times_ms"] for row in json.loads(out.read_text())["rows"]]
    assert main([*command, "4"]) == 0
    result = json.loads(out.read_text())
    assert [len(row["times_ms"]) for row in result["rows"]] == [12, 12] and len(result["commands"]) == 1
    assert [row["times_ms"][:6] for row in result["rows"]] == before


def test_marks_take_turns(fakes, monkeypatch):
    """Both marks have a turn before either has its second."""
    order = []
    monkeypatch.setattr(run, "turn", lambda clock, prepared, row: (order.append(row["mark"]), add(row)))

    def add(row):
        row["times_ms"] += [1.0] * run.TURN
        row |= {"ms": run.spread([1.0]), "host": run.spread([1.0]), "load": 1.0}

    assert main(["run", "frames", "--quick", "--rounds", "2", "--marks", "1,4"]) == 0 and order == [1, 4]
    order.clear()
    monkeypatch.setattr(run, "save", lambda out, result: None)
    assert main(["run", "frames", "--rounds", "2", "--marks", "1,4", "--out", "unused"]) == 0 and order == [1, 4, 1, 4]


def test_another_commit_does_not_go_on(fakes, tmp_path, capsys):
    out = tmp_path / "run.json"
    command = ["run", "frames", "--quick", "--out", str(out)]
    assert main(command) == 0
    result = json.loads(out.read_text())
    result["meta"]["commit"] = "another"
    out.write_text(json.dumps(result))
    assert main(command) == 2 and "another commit: --fresh" in capsys.readouterr().err
    assert main([*command, "--fresh"]) == 0


@pytest.mark.parametrize(
    "words, told",
    [
        (["frames", "--marks", "1,x"], "--marks must be numbers"),
        (["--marks", "1"], "--marks belongs to one part"),
        (["--device", "cuda:77"], "there is no GPU"),
        (["frames", "--quick", "--only", "nothing"], "no provider"),
    ],
)
def test_refused(fakes, words, told, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["run", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line


def test_every_provider_has_a_subject_or_a_reason():
    for listed in (providers.frame_providers(Options()), providers.token_providers(Options())):
        names = [provider.name for provider in listed]
        assert len(set(names)) == len(names) and any("mamba-ssm" in name for name in names)
        assert all((provider.make is None) == bool(provider.why) for provider in listed)
