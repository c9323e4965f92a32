"""The group of commands, and how a command ends."""

from __future__ import annotations

import errno
import gc
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

import click

import memplan
from memplan.atomic_write import OutputError, reason
from memplan.cli.output import fail, show_failure
from memplan.errors import DoesNotFitError, MemplanError, TooSlowError, first_line

OK, DOES_NOT_FIT, BAD_INPUT = 0, 1, 2
INTERNAL, OUTPUT_FAILED = 70, 74
"""EX_SOFTWARE and EX_IOERR of sysexits.h."""
INTERRUPTED, PIPE_CLOSED = 130, 141
"""What a shell says of a program that SIGINT or SIGPIPE ended."""

_NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")
"""Libraries that warn as they are imported of kernels for other machines: no user of a plan asked for those."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. ``arguments``: else those of the process."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in (given[: given.index("--")] if "--" in given else given)  # else it is a script's
    own_process = arguments is None
    if own_process:
        sys.stdout, sys.stderr = _told_of(sys.stdout), _told_of(sys.stderr)
        for library in _NOISY:
            logging.getLogger(library).setLevel(logging.ERROR)
    collected = gc.isenabled()
    try:
        code = _command(given, own_process, as_json)
        _flush()  # here, not by the interpreter as it ends: it would exit with a code of its own
        return code
    except KeyboardInterrupt:
        return INTERRUPTED  # while an error was printed
    except (OutputError, BrokenPipeError, SystemExit) as error:
        code = _not_printed(error)
        if own_process:
            _silence()
        return code
    finally:
        if collected:
            gc.enable()


def _command(given: list[str], own_process: bool, as_json: bool) -> int:
    """Run a command; return its code. Raises OSError, or rich's SystemExit, where its output cannot be written."""
    try:
        if "_MEMPLAN_COMPLETE" in os.environ:
            group.main(args=given, prog_name="memplan")
        # Not click's own main: it ends with 1 where a pipe was closed.
        with group.make_context("memplan", given, obj={"own_process": own_process}) as context:
            return int(group.invoke(context) or OK)
    except click.exceptions.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        click.echo(err=True)  # ends the line on which a terminal shows ^C
        return fail("Interrupted", "interrupted", as_json, INTERRUPTED)
    except click.Abort:
        return fail("Interrupted", "interrupted", as_json, INTERRUPTED)
    except click.ClickException as error:
        if as_json:
            return fail(type(error).__name__, error.format_message(), as_json, BAD_INPUT)
        error.show()
        return BAD_INPUT
    except DoesNotFitError as error:
        show_failure(error, as_json)
        return DOES_NOT_FIT
    except TooSlowError as error:
        return fail(type(error).__name__, str(error), as_json, DOES_NOT_FIT)
    except MemplanError as error:
        return fail(type(error).__name__, str(error), as_json, BAD_INPUT)
    except Exception as error:
        package = (getattr(error, "name", None) or "memplan").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and package != "memplan":
            message = f"this needs the package {package}, which is not installed: pip install {package}"
            return fail(type(error).__name__, message, as_json, BAD_INPUT)
        if isinstance(error, (BrokenPipeError, OutputError)) or not own_process:
            raise  # a caller in Python sees an error as it is
        click.echo(traceback.format_exc(), nl=False, err=True)
        message = f"internal error: {first_line(error)}. Please report it with the lines that stand above it"
        return fail(type(error).__name__, message, as_json, INTERNAL)


class _Raw(io.FileIO):
    """A standard stream whose errors can be told from those of other files."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from error


def _told_of(stream: TextIO) -> TextIO:
    """Return a standard stream anew: what it cannot write is an OutputError, and what its encoding lacks is written
    out.
    """
    if type(stream) is not io.TextIOWrapper:
        return stream  # None where it is closed
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Raw(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.isatty(),
        write_through=stream.write_through,
    )


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _not_printed(error: BaseException) -> int:
    """Return the code for output that could not be written, and say why where there is someone to read it."""
    failed = error if isinstance(error, OSError) else error.__context__  # rich exits where a pipe was closed
    if not isinstance(failed, (OutputError, BrokenPipeError)):
        return OK if isinstance(error, SystemExit) and not error.code else INTERNAL
    if failed.errno == errno.EPIPE:
        return PIPE_CLOSED
    with suppress(OSError):
        click.echo(f"memplan: the output cannot be written: {reason(failed)}", err=True)
    return OUTPUT_FAILED


def _silence() -> None:
    """Have what is left in the buffers go nowhere: the interpreter would try it once more as it ends, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(memplan.__version__)
def group() -> None:
    """Plan where the frozen blocks of a model live while an adapter is trained."""
