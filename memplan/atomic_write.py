"""The one writer of every file that memplan writes: a file is there whole or not at all, and nothing else is replaced.

[Note: what is written through] A link stays a link: its target gets the content, and is created where it does not
exist. An existing file keeps its mode, owner and access lists. A device node, a pipe and an open descriptor
(``/dev/stdout``, ``/dev/fd/63`` of a process substitution) are written to, never replaced. ``-`` is standard output.
Directories, sockets and disks are refused.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import sys
from contextlib import suppress
from pathlib import Path

from memplan.errors import InputError, MemplanError

STANDARD_OUTPUT = Path("-")
"""Stands for standard output where a file is written. A file of that name is named by a path with its folder."""
STANDARD_INPUT = STANDARD_OUTPUT
"""The same name where a plan, a record or a frontier is read."""


class OutputError(OSError):
    """Standard output could not be written to."""


_OPEN_FILES = re.compile(r"/proc/(\d+)(?:/task/\d+)?/fd")
_MOST_LINKS = 40
"""As many as Linux follows."""


def write(path: str | Path, data: bytes, error: type[MemplanError] = InputError) -> None:
    """Write a file that a user named, as :func:`write_whole` does. Raises ``error``.

    On standard output what goes wrong is an OutputError: there is no other path to give.
    """
    try:
        write_whole(Path(path), data)
    except OutputError:
        raise
    except (OSError, ValueError) as failure:
        raise error(f"{path} cannot be written: {reason(failure)}; give another path") from failure


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all. [Note: what is written through]

    A new file has the mode that the user's umask gives. What was there is intact where this raises, and nothing is left
    beside it.

    Raises OSError, and ValueError for what can be no file's name.
    """
    if path == STANDARD_OUTPUT:
        _to_standard_output(data)
        return
    descriptor = descriptor_of(path)
    if descriptor is not None:
        _to_descriptor(os.dup(descriptor), data)
        return
    found = _stat(path)
    if found is not None and not stat.S_ISREG(found.st_mode):
        _require_stream(path, found)
        _to_descriptor(os.open(path, os.O_WRONLY | getattr(os, "O_NOCTTY", 0)), data)
        return
    target = Path(os.path.realpath(path))
    _require_target(target, found)
    _replace(target, data, found)


def require_writable(path: Path) -> None:
    """Raise OSError or ValueError where :func:`write_whole` surely would, before what is to be written is computed."""
    if path == STANDARD_OUTPUT or descriptor_of(path) is not None:
        return
    found = _stat(path)
    if found is not None and not stat.S_ISREG(found.st_mode):
        _require_stream(path, found)
        if not _may(path, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    _require_target(Path(os.path.realpath(path)), found)


def read(path: str | Path) -> bytes:
    """Return a file's bytes; ``-`` is standard input. Raises OSError, and ValueError for what can be no file's name."""
    if Path(path) != STANDARD_INPUT:
        return Path(path).read_bytes()
    if sys.stdin is None:
        raise OSError(errno.EBADF, "standard input is closed")
    raw = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read().encode() if raw is None else raw.read()


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths name one regular file, or both standard output; a link is what it leads to."""
    if STANDARD_OUTPUT in (one, other):
        return one == other
    with suppress(OSError, ValueError):
        if os.path.realpath(one) == os.path.realpath(other):
            return not one.exists() or one.is_file()
        return one.is_file() and other.is_file() and os.path.samefile(one, other)
    return False


def reason(error: BaseException) -> str:
    """Return what stood in the way of a file, without the numbers and paths that Python adds."""
    return getattr(error, "strerror", None) or str(error)


def _stat(path: Path) -> os.stat_result | None:
    """Return what a path leads to; None where nothing is there."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def descriptor_of(path: Path) -> int | None:
    """Return the descriptor of this process that a path such as ``/dev/stdout`` stands for, or None.

    A file that standard output goes to is not replaced under it: what is printed later would be lost.
    """
    for _ in range(_MOST_LINKS):
        match = _OPEN_FILES.fullmatch(os.path.realpath(path.parent))
        if match is not None and path.name.isdigit():
            return int(path.name) if int(match[1]) == os.getpid() else None
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


def _may(path: Path, what: int) -> bool:
    return os.access(path, what, effective_ids=os.access in os.supports_effective_ids)


def _require_stream(path: Path, found: os.stat_result) -> None:
    """Raise OSError for what is neither a file nor something that bytes are sent through."""
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", str(path))
    if not (stat.S_ISCHR(found.st_mode) or stat.S_ISFIFO(found.st_mode)):
        kind = "a socket" if stat.S_ISSOCK(found.st_mode) else "a block device"
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))


def _require_target(target: Path, found: os.stat_result | None) -> None:
    """Raise OSError where a file cannot be put in place of ``found``, or cannot be created."""
    folder = target.parent
    if not folder.is_dir():
        what = "does not exist" if not folder.exists() else "is not a directory"
        raise FileNotFoundError(errno.ENOENT, f"the folder {folder} {what}", str(target))
    if found is not None and not _may(target, os.W_OK):  # a rename would not ask
        raise PermissionError(errno.EACCES, "the file is read-only", str(target))
    if not _may(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"files cannot be created in {folder}", str(target))


def _replace(target: Path, data: bytes, found: os.stat_result | None) -> None:
    # Not named after the file, whose name may be as long as a name can be.
    unfinished = target.with_name(f".memplan-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)  # some file systems say only here that the disk is full
            if found is not None:
                _keep_access(handle, target, found)
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _keep_access(handle: int, target: Path, found: os.stat_result) -> None:
    """Give a file the owner, the mode and the access lists of the one that it replaces, as far as this user may."""
    if hasattr(os, "fchown"):
        mine = os.fstat(handle)
        if (mine.st_uid, mine.st_gid) != (found.st_uid, found.st_gid):
            with suppress(OSError):
                os.fchown(handle, found.st_uid, found.st_gid)
        os.fchmod(handle, stat.S_IMODE(found.st_mode))
    if sys.platform == "linux":
        with suppress(OSError):
            for name in os.listxattr(target):
                with suppress(OSError):
                    os.setxattr(handle, name, os.getxattr(target, name))


def _to_standard_output(data: bytes) -> None:
    out = sys.stdout
    if out is None:
        raise OutputError(errno.EBADF, "standard output is closed")
    try:
        out.flush()
        if (raw := getattr(out, "buffer", None)) is not None:
            raw.write(data)
        else:
            out.write(data.decode())  # in the place of standard output: a notebook's, a test's
        out.flush()
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from error


def _to_descriptor(handle: int, data: bytes) -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # what was printed before comes before
    with open(handle, "wb") as file:
        file.write(data)
