"""What a file's container demands of it and FFmpeg does not tell: is it whole, is its structure unbroken?

FFmpeg reads on behind damage without a word where it can (Matroska, MPEG-TS), so packets vanish.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

LOOK = 1 << 18  # bytes at either end of a transport stream; in between FFmpeg itself marks what is broken


def fault_in(path: str | os.PathLike, container: str) -> str:
    """-> why this file is not as long or not as whole as its container demands, in words; "" where nothing is known.

    container: FFmpeg's name of it.
    """
    path = Path(path)
    with path.open("rb") as file:
        if "matroska" in container:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _matroska_fault(data)
        if container == "mpegts":
            size = path.stat().st_size
            head = file.read(LOOK)
            file.seek(max(0, size - LOOK))
            return _transport_fault(head, file.read(), size)
    return ""


# ---- Matroska (RFC 9559): elements of id, length, content, which fill their parent without a gap

_SEGMENT, _TRACKS, _CLUSTER = 0x18538067, 0x1654AE6B, 0x1F43B675
_ANYWHERE = {0xEC, 0xBF}  # void, checksum
_IN_SEGMENT = {_TRACKS, _CLUSTER, 0x114D9B74, 0x1549A966, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367} | _ANYWHERE
_SIMPLE_BLOCK, _BLOCK_GROUP, _BLOCK = 0xA3, 0xA0, 0xA1
_IN_CLUSTER = {_SIMPLE_BLOCK, _BLOCK_GROUP, 0xE7, 0x5854, 0xA7, 0xAB, 0xAF} | _ANYWHERE
_TRACK_ENTRY, _TRACK_NUMBER = 0xAE, 0xD7

Element = tuple[int, int, int]  # id, begin and end of its content


class _Broken(Exception):
    pass


class _Live(Exception):
    """An element of unknown length, as a live recording has: nothing can be checked against it."""


def _matroska_fault(data: mmap.mmap) -> str:
    try:
        segments = [element for element in _elements(data, 0, len(data)) if element[0] == _SEGMENT]
        tracks: set[int] = set()
        for _, begin, end in segments:
            for kind, start, stop in _elements(data, begin, end):
                if kind not in _IN_SEGMENT:
                    raise _Broken(f"there is no Matroska element at byte {start}")
                if kind == _TRACKS:
                    tracks |= set(_track_numbers(data, start, stop))
                if kind == _CLUSTER:
                    _check_cluster(data, start, stop, tracks)
    except _Broken as fault:
        return str(fault)
    except _Live:
        return ""
    return "" if segments else "it has no Matroska segment"


def _check_cluster(data: mmap.mmap, begin: int, end: int, tracks: set[int]) -> None:
    for kind, start, stop in _elements(data, begin, end):
        if kind not in _IN_CLUSTER:
            raise _Broken(f"there is no Matroska element at byte {start}")
        if kind == _BLOCK_GROUP:
            blocks = [element for element in _elements(data, start, stop) if element[0] == _BLOCK]
        else:
            blocks = [(kind, start, stop)] if kind == _SIMPLE_BLOCK else []
        for _, place, _ in blocks:
            number, _ = _number(data, place)
            if number not in tracks:
                raise _Broken(f"a block at byte {place} belongs to track {number}, which the file does not have")


def _track_numbers(data: mmap.mmap, begin: int, end: int) -> Iterator[int]:
    for kind, start, stop in _elements(data, begin, end):
        if kind == _TRACK_ENTRY:
            for inner, a, b in _elements(data, start, stop):
                if inner == _TRACK_NUMBER:
                    yield int.from_bytes(data[a:b], "big")


def _elements(data: mmap.mmap, begin: int, end: int) -> Iterator[Element]:
    place = begin
    while place < end:
        first = data[place]
        width = 9 - first.bit_length()
        if width > 4:
            raise _Broken(f"there is no Matroska element at byte {place}")
        kind = int.from_bytes(data[place : place + width], "big")
        length, start = _number(data, place + width)
        if length is None:
            raise _Live
        if start + length > end:
            raise _Broken(
                f"the file ends early: it declares {start + length} bytes and holds {end}"
                if end == len(data)
                else f"the Matroska element at byte {place} is longer than what it lies in"
            )
        yield kind, start, start + length
        place = start + length


def _number(data: mmap.mmap, place: int) -> tuple[int | None, int]:
    """A number of 1 to 8 bytes -> its value, None for the one that means unknown, and the place behind it."""
    if place >= len(data) or not data[place]:
        raise _Broken(f"there is no Matroska element at byte {place}")
    width = 9 - data[place].bit_length()
    value = int.from_bytes(data[place : place + width], "big") - (1 << 7 * width)
    return None if value == (1 << 7 * width) - 1 else value, place + width


# ---- MPEG transport stream (ISO 13818-1, 2.4.3): packets of 188 bytes, in some files with 4 before or 16 behind


def _transport_fault(head: bytes, tail: bytes, size: int) -> str:
    for unit, offset in ((188, 0), (192, 4), (204, 0)):
        marks = head[offset::unit]
        if marks.count(b"G") < 0.5 * len(marks):
            continue
        begin = -(size - len(tail)) % unit + offset
        if size % unit:
            return "the file ends in the middle of a transport packet"
        if len(marks) != marks.count(b"G") or set(tail[begin::unit]) != {71}:
            return "transport packets at its start or its end are broken"
        if not (_continuous(head[offset:], unit) and _continuous(tail[begin:], unit)):
            return "transport packets at its start or its end are missing"
        break
    return ""


def _continuous(data: bytes, unit: int) -> bool:
    """Whether every programme counts its packets modulo 16 without a gap.

    FFmpeg tells of a gap only with the next packet of the same programme, which may not come any more.
    """
    last: dict[int, int] = {}
    for place in range(0, len(data) - 5, unit):
        pid = int.from_bytes(data[place + 1 : place + 3], "big") & 0x1FFF
        control, count = data[place + 3] >> 4 & 3, data[place + 3] & 15
        restarts = control & 2 and data[place + 4] and data[place + 5] & 0x80  # an announced discontinuity
        if pid == 0x1FFF or not control & 1:  # stuffing, or nothing of the programme in it
            continue
        if pid in last and not restarts and count not in (last[pid], (last[pid] + 1) % 16):
            return False
        last[pid] = count
    return True
