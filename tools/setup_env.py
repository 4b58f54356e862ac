"""Makes .venv ready for `make demo` ("video") or `make test` ("dev") and builds the CPU kernels.

Where the Python that runs this file has a working torch >= 2.4, .venv is a layer on top of its environment: that torch,
and so its GPU, is used, only what is missing is added, and nothing is installed into the environment itself.  Otherwise
.venv gets a torch of its own and the versions of constraints.txt.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
MADE_BY_US = VENV / "endomamba-setup.json"
CONSTRAINTS = ROOT / "constraints.txt"
TORCH = "2.13.0"
EXTRAS = {"video": "video", "dev": "video,dev"}


def say(text):
    print(f"setup: {text}", flush=True)


def stop(text):
    sys.exit(f"setup: {text}")


def pip(*arguments):
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "-qq", *arguments]
    if subprocess.call(command, cwd=ROOT):
        stop("pip could not install what is needed; its message stands above")


def active_torch():
    """The version of the active environment's torch and "", or None and why it is not used."""
    try:
        import torch
    except Exception as error:  # a broken torch raises whatever its libraries raise
        return None, f"{sys.executable} has no working torch ({str(error).splitlines()[0]})"
    version = str(torch.__version__)
    if tuple(map(int, version.split(".")[:2])) < (2, 4):
        return None, f"{sys.executable} has torch {version}, older than 2.4"
    return version, ""


def make_venv(on_top):
    if VENV.exists():
        if not MADE_BY_US.exists():
            stop(f"{VENV.name} is there and was not made by this script; move it away first")
        shutil.rmtree(VENV)
    if subprocess.call([sys.executable, "-m", "venv", str(VENV)]):
        stop("this Python cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)")
    MADE_BY_US.write_text("{}")
    if on_top:
        folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
        [below] = VENV.glob("lib/python*/site-packages")
        # Not --system-site-packages: on top of a virtual environment that would show its base, not the environment.
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders if Path(folder).is_dir()]
        (below / "zz_active_environment.pth").write_text("".join(lines))
        keep_triton(below)


def keep_triton(site_packages):
    """Where torch brought Triton under another name (nightlies, AMD) pip is told that it is there."""
    try:
        import triton

        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        about = site_packages / f"triton-{triton.__version__}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: triton\nVersion: {triton.__version__}\n")
        (about / "INSTALLER").write_text("endomamba-setup\n")
    except ImportError:
        pass


def constraints(torch):
    """constraints.txt; on top of an active environment less the packages it has, and with its torch nailed down."""
    if torch is None:
        return CONSTRAINTS
    have = {normal(dist.metadata["Name"]) for dist in importlib.metadata.distributions() if dist.metadata["Name"]}
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if normal(re.split("[=; ]", line)[0]) not in have]
    path = VENV / "constraints.txt"
    path.write_text("\n".join([*pins, f"torch=={torch}"]) + "\n")
    return path


def normal(name):
    return re.sub("[-_.]+", "-", name).lower()


def announce_torch():
    """Asks pip which build of torch it would take, so that the size can be said before it is fetched."""
    report = VENV / "torch.json"
    pip("--dry-run", "--no-deps", "--ignore-installed", "--report", str(report), f"torch=={TORCH}")
    [item] = json.loads(report.read_text())["install"]
    cuda = sys.platform == "linux" and any("nvidia" in need for need in item["metadata"].get("requires_dist", []))
    size = "2.9 GB, torch with its CUDA libraries" if cuda else "0.3 GB, 1.2 GB on disk"
    say(
        f"downloading torch {item['metadata']['version']} and the versions of constraints.txt into .venv/: about {size}"
    )
    if cuda:
        say(
            "for a small torch without CUDA stop here, install one as pytorch.org/get-started shows into an environment"
        )
        say("of your own, activate that and run make again: its torch will be kept")


def sources_digest():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    files += [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "endomamba" / "__init__.py"]
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sorted(files))).hexdigest()


def kernels_built(record):
    extension = ROOT / "endomamba" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return record.get("sources") == sources_digest() and extension.exists()


def install(level, pins):
    """This checkout in place, with what `level` needs; compiles what changed since the last time."""
    pip(*pins, "setuptools>=77", "pybind11>=3")
    pip(*pins, "--no-build-isolation", "--editable", f".[{EXTRAS[level]}]")
    info = json.loads((ROOT / "endomamba" / "_build_info.json").read_text())
    if "error" in info:
        say(f"the CPU kernels are not compiled, the slow PyTorch reference runs instead: {info['error']}")
    else:
        say(f"compiled the CPU kernels with {info['compiler']}: {', '.join(info['levels'])}")


def main():
    level = sys.argv[1] if len(sys.argv) == 2 else ""
    if level not in EXTRAS:
        stop(f"usage: setup_env.py {'|'.join(EXTRAS)}")
    if sys.version_info < (3, 10):  # noqa: UP036  (this file runs before anything has checked the version)
        stop(f"needs Python 3.10 or newer, {sys.executable} is {platform.python_version()}: make PYTHON=python3.12 ...")
    record = json.loads(MADE_BY_US.read_text()) if MADE_BY_US.exists() else {}
    if Path(sys.prefix).resolve() == VENV:  # .venv itself is active: ask again below it
        below = record.get("plan", {}).get("python") or sys._base_executable
        os.execv(below, [below, *sys.argv])

    torch, why_not = active_torch()
    plan = {"torch": torch, "python": torch and sys.executable}
    if record.get("plan") != plan:
        make_venv(torch is not None)
        record = {"plan": plan, "lists": {}}
        pip("--constraint", str(CONSTRAINTS), "pip")
        if torch is None:
            say(why_not)
            announce_torch()
            pip("--constraint", str(CONSTRAINTS), f"torch=={TORCH}")
        else:
            size = {"video": "0.3 GB", "dev": "0.5 GB"}[level]
            say(f"keeping torch {torch} of {sys.prefix}; what it lacks, at most {size}, goes into {VENV.name}/")
    lists = hashlib.sha256(CONSTRAINTS.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    listed = lists in (record["lists"].get(level), record["lists"].get("dev"))
    if not (listed and kernels_built(record)):
        install(level, ["--constraint", str(constraints(torch))])
        record["lists"][level] = lists
        record["sources"] = sources_digest()
        MADE_BY_US.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
