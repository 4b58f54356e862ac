"""What must be equal before two times may be compared: the device, its driver, the state of its clocks."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

GPU_FIELDS = (
    "name", "uuid", "driver_version", "vbios_version", "persistence_mode", "power.limit", "clocks.max.sm",
    "clocks.max.mem", "clocks.applications.graphics", "mig.mode.current",
)  # fmt: skip
# Bits of clocks_throttle_reasons.active that mean: slower than the same GPU a minute ago.
SLOWED = {0x8: "hardware slowdown", 0x20: "too hot (driver)", 0x40: "too hot (hardware)", 0x80: "power brake"}
SYSTEM = Path("/sys/devices/system/cpu")
CPU_INFO = Path("/proc/cpuinfo")


class Refused(Exception):
    """The comparison would mean nothing: why, in one sentence."""


def describe(device: str) -> dict[str, str]:
    """Everything about the machine that a ratio must not be made of.  What cannot be read is "unknown", and said."""
    found = {
        "cpu": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "governor": each_core("cpufreq/scaling_governor"),
        "highest clock": each_core("cpufreq/scaling_max_freq"),
        "boost": read(SYSTEM / "cpufreq" / "boost"),
        "turbo off": read(SYSTEM / "intel_pstate" / "no_turbo"),
        "SMT": read(SYSTEM / "smt" / "active"),
        "kernel": platform.release(),
    }
    return found | (gpu_query(GPU_FIELDS, device) if device.startswith("cuda") else {})


def cpu_model() -> str:
    lines = read(CPU_INFO).splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def each_core(name: str) -> str:
    """The setting of the cores this process may use, each value once."""
    return ", ".join(sorted({read(SYSTEM / f"cpu{core}" / name) for core in os.sched_getaffinity(0)}))


def idlest_cores(count: int, seconds: float = 0.2) -> set[int]:
    """So many of the cores this process may use, those that did the least in the last moment."""

    def idle() -> dict[int, int]:
        rows = (line.split() for line in read(Path("/proc/stat")).splitlines() if line.startswith("cpu"))
        return {int(row[0][3:]): int(row[4]) for row in rows if row[0] != "cpu"}

    before = idle()
    time.sleep(seconds)
    spent = {core: ticks - before.get(core, 0) for core, ticks in idle().items()}
    return set(sorted(os.sched_getaffinity(0), key=lambda core: -spent.get(core, 0))[:count])


def read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"


def gpu_query(fields: tuple[str, ...], device: str) -> dict[str, str]:
    """nvidia-smi's answers about the device that torch calls `device`."""
    index = int(device.partition(":")[2] or 0)
    visible = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    command = ["nvidia-smi", f"--id={visible[index] if visible else index}", "--format=csv,noheader"]
    try:
        done = subprocess.run([*command, f"--query-gpu={','.join(fields)}"], text=True, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"the state of the GPU cannot be read: nvidia-smi: {error}") from error
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise Refused(f"the state of the GPU cannot be read: nvidia-smi: {told[-1]}")
    return dict(zip(fields, (value.strip() for value in done.stdout.strip().split(",")), strict=True))


def slowed_down(device: str) -> list[str]:
    """Why the clocks of this GPU are below their usual state right now; nothing on a CPU, which does not say."""
    if not device.startswith("cuda"):
        return []
    (active,) = gpu_query(("clocks_throttle_reasons.active",), device).values()
    return [why for bit, why in SLOWED.items() if int(active, 16) & bit]


def require_equal(what: str, one: dict, other: dict) -> None:
    """Raises Refused with what differs."""
    differs = [
        f"{key} is {one.get(key)!r} and {other.get(key)!r}"
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    ]
    if differs:
        raise Refused(f"{what}: {'; '.join(differs)}")


def require_full_speed(device: str) -> None:
    slow = slowed_down(device)
    if slow:
        raise Refused(f"the clocks of {device} are held down ({', '.join(slow)}): wait until it has cooled, then again")
