"""The compiled CPU kernels, `endomamba._C`, or the reason why they are not there."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

BUILD_INFO = Path(__file__).resolve().parent.parent / "_build_info.json"


def _load() -> tuple[ModuleType | None, str]:
    try:
        from endomamba import _C
    except ImportError as error:
        built = build_info().get("error")
        return None, f"endomamba._C is not built ({built})" if built else f"endomamba._C does not load ({error})"
    return _C, ""


def build_info() -> dict:
    """What setup.py noted about the build: compiler and levels, or the compiler's own words on why there is none."""
    return json.loads(BUILD_INFO.read_text()) if BUILD_INFO.is_file() else {}


C, MISSING = _load()
