"""The cache of packed blocks: files named by what they hold, so that none is ever taken for another. No torch here.

A block whose weights no checkpoint holds as they are (cast, quantized, or changed in memory) is written once, whole or
not at all, in the layout of its slot; the next run with the same bytes finds it. Its name is its checksum.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from memplan.errors import InputError
from memplan.units import format_bytes

_NAME = re.compile(r"[0-9a-f]{40}\.block")
_PART = re.compile(r"\.(\d+)-.*\.part")
_TIP = "free some room there, set MEMPLAN_CACHE to another disk, or give more ram"


class CacheEntry(Struct, frozen=True, kw_only=True):
    """One packed block."""

    name: str
    size_bytes: int
    created: str
    """Date, ISO 8601."""
    about: str
    """The model and the block, for people; empty where that is not known any more."""


def checksum() -> hashlib.blake2b:
    """Return a new checksum to feed a block's bytes to."""
    return hashlib.blake2b(digest_size=20)


class BlockCache:
    """Packed blocks in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "blocks"

    def require_room(self, size_bytes: int) -> None:
        """Raise InputError where the disk has no room for so many bytes beside what is cached."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_parts()
        free = shutil.disk_usage(self.folder).free
        held = sum(entry.size_bytes for entry in self.entries())
        if size_bytes > free + held:
            raise InputError(
                f"{format_bytes(size_bytes)} of blocks were to be written to {self.folder}, where {format_bytes(free)} "
                f"are free: {_TIP}"
            )

    def put(
        self, pieces: Callable[[], Iterable[NDArray[np.uint8]]], size_bytes: int, about: str, *, twice: bool
    ) -> tuple[Path, str]:
        """Return the file that holds just these bytes, written if need be, and their checksum.

        ``pieces`` gives them, ``size_bytes`` in all. ``twice``: to have them a second time is cheap, so look first
        whether the file is there. Several processes may write the same file at once.

        Raises InputError where the disk takes no more.
        """
        if twice:
            path, found = self._named(_checksum_of(pieces()))
            if _has(path, size_bytes):
                return path, found
        try:
            total = checksum()
            name = self._write_part(_fed(total, pieces()))
            path, found = self._named(total)
            try:
                if _has(path, size_bytes):
                    os.unlink(name)
                    return path, found
                self._write(path.with_suffix(".json"), json.dumps({"about": about}).encode())
                os.replace(name, path)
            except BaseException:
                _drop(name)
                raise
        except OSError as error:
            raise InputError(
                f"cannot write {about} ({format_bytes(size_bytes)}) to {self.folder}: {error.strerror or error}; {_TIP}"
            ) from error
        return path, found

    def _named(self, total: hashlib.blake2b) -> tuple[Path, str]:
        found = total.hexdigest()
        return self.folder / f"{found}.block", found

    def entries(self) -> tuple[CacheEntry, ...]:
        """Return what is cached, the oldest first."""
        found = []
        for path in self._files():
            try:
                stat = path.stat()
            except OSError:
                continue  # cleared meanwhile
            about = ""
            with contextlib.suppress(OSError, ValueError, AttributeError):
                about = str(json.loads(path.with_suffix(".json").read_bytes()).get("about", ""))
            created = datetime.datetime.fromtimestamp(stat.st_mtime, datetime.UTC).isoformat(timespec="seconds")
            found.append((stat.st_mtime_ns, path.name, stat.st_size, created, about))
        return tuple(
            CacheEntry(name=name, size_bytes=size, created=created, about=about)
            for _, name, size, created, about in sorted(found)
        )

    def clear(self) -> int:
        """Remove all packed blocks; return the bytes. What a run has open stays readable for it."""
        freed = sum(entry.size_bytes for entry in self.entries())
        for path in self._files():
            for file in (path, path.with_suffix(".json")):
                file.unlink(missing_ok=True)
        self._drop_parts()
        return freed

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("*.block") if _NAME.fullmatch(path.name) and not path.is_symlink()]

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file whole or not at all."""
        name = self._write_part([data])
        try:
            os.replace(name, path)
        except BaseException:
            _drop(name)
            raise

    def _write_part(self, pieces: Iterable[bytes | NDArray[np.uint8]]) -> str:
        """Write a file under a name that says that it is not whole yet; return the name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{os.getpid()}-", suffix=".part", dir=self.folder)
        try:
            with open(handle, "wb") as file:
                for piece in pieces:
                    file.write(piece if isinstance(piece, bytes) else piece.data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            _drop(name)
            raise
        return name

    def _drop_parts(self) -> None:
        """Remove what processes that are gone left half written."""
        for path in self.folder.glob(".*.part"):
            match = _PART.fullmatch(path.name)
            if match and not os.path.exists(f"/proc/{match[1]}"):
                path.unlink(missing_ok=True)


def _checksum_of(pieces: Iterable[NDArray[np.uint8]]) -> hashlib.blake2b:
    total = checksum()
    for piece in pieces:
        total.update(piece.data)
    return total


def _fed(total: hashlib.blake2b, pieces: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """Yield the pieces, each having gone into ``total``."""
    for piece in pieces:
        total.update(piece.data)
        yield piece


def _has(path: Path, size_bytes: int) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_size == size_bytes
    return False


def _drop(name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name)
