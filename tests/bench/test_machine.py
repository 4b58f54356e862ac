"""What may not be compared, and that the refusal says what differed."""

from __future__ import annotations

import pytest

from bench import machine
from bench.machine import Refused

GPU = {
    "name": "NVIDIA H200", "uuid": "GPU-1", "driver_version": "580.1", "vbios_version": "96",
    "persistence_mode": "Enabled", "power.limit": "700.00 W", "clocks.max.sm": "1980 MHz", "clocks.max.mem": "3201 MHz",
    "clocks.applications.graphics": "1980 MHz", "mig.mode.current": "Disabled",
}  # fmt: skip


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a nvidia-smi in the PATH that answers with these values."""

    def answers(values: dict, active: str = "0x0000000000000001", status: int = 0) -> None:
        path = tmp_path / "nvidia-smi"
        fields = "\n".join(f'case ",$query," in *",{k},"*) line="$line, {v}";; esac' for k, v in values.items())
        path.write_text(
            "#!/bin/sh\nquery=${3#--query-gpu=}\nline=\n"
            f'test "$query" = clocks_throttle_reasons.active && {{ echo "{active}"; exit {status}; }}\n'
            f'{fields}\necho "${{line#, }}"\nexit {status}\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return answers


def test_a_gpu_is_described(nvidia_smi):
    nvidia_smi(GPU)
    assert machine.describe("cuda:0").items() >= GPU.items()


@pytest.mark.parametrize(
    ("key", "other"),
    [("uuid", "GPU-2"), ("driver_version", "590"), ("persistence_mode", "Disabled"), ("power.limit", "1 W")],
)
def test_another_gpu_driver_or_clock_setting_is_refused(nvidia_smi, key, other):
    nvidia_smi(GPU)
    before = machine.describe("cuda")
    nvidia_smi(GPU | {key: other})
    with pytest.raises(Refused, match=f"changed: {key} is '{GPU[key]}' and '{other}'"):
        machine.require_equal("changed", before, machine.describe("cuda"))


@pytest.mark.parametrize(
    ("active", "why"),
    [("0x0000000000000008", "hardware slowdown"), ("0x0000000000000060", "too hot .driver., too hot .hardware.")],
)
def test_clocks_held_down_are_refused(nvidia_smi, active, why):
    nvidia_smi(GPU, active)
    with pytest.raises(Refused, match=why):
        machine.require_full_speed("cuda")


@pytest.mark.parametrize("active", ["0x0000000000000000", "0x0000000000000001", "0x0000000000000004"])
def test_idle_and_power_capped_clocks_are_usual(nvidia_smi, active):
    nvidia_smi(GPU, active)
    machine.require_full_speed("cuda")


def test_without_an_answer_it_is_refused(nvidia_smi, monkeypatch):
    nvidia_smi(GPU, status=9)
    with pytest.raises(Refused, match="cannot be read"):
        machine.describe("cuda")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Refused, match="cannot be read"):
        machine.describe("cuda")


def test_another_cpu_or_governor_is_refused(tmp_path, monkeypatch):
    info, governor = tmp_path / "cpuinfo", tmp_path / "cpu0" / "cpufreq" / "scaling_governor"
    governor.parent.mkdir(parents=True)
    governor.write_text("performance\n")
    info.write_text("processor : 0\nmodel name : A CPU\n")
    monkeypatch.setattr(machine, "SYSTEM", tmp_path)
    monkeypatch.setattr(machine, "CPU_INFO", info)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0})
    before = machine.describe("cpu")
    assert before["cpu"] == "A CPU" and before["governor"] == "performance" and before["boost"] == "unknown"
    governor.write_text("powersave\n")
    with pytest.raises(Refused, match="governor is 'performance' and 'powersave'"):
        machine.require_equal("two", before, machine.describe("cpu"))
    info.write_text("model name : Another\n")
    with pytest.raises(Refused, match=r"cpu is 'A CPU' and 'Another'.*governor"):
        machine.require_equal("two", before, machine.describe("cpu"))


def test_equal_machines_are_compared():
    machine.require_equal("two", machine.describe("cpu"), machine.describe("cpu"))
    machine.require_full_speed("cpu")


def test_idle_cores_are_cores_of_ours():
    import os

    cores = machine.idlest_cores(1, seconds=0.05)
    assert len(cores) == 1 and cores <= os.sched_getaffinity(0)
