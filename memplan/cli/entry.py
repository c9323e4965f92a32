"""The group of commands, and how failures end."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

import click

import memplan
from memplan.cli.output import fail, show_failure
from memplan.errors import DoesNotFitError, MemplanError, TooSlowError

OK, DOES_NOT_FIT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. ``arguments``: else those of the process."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    context = {"own_process": arguments is None}
    as_json = "--json" in (given[: given.index("--")] if "--" in given else given)  # else it is a script's
    collected = gc.isenabled()
    try:
        return int(group.main(args=given, prog_name="memplan", standalone_mode=False, obj=context) or OK)
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
    except ModuleNotFoundError as error:
        package = (error.name or "memplan").partition(".")[0]
        if package == "memplan":
            raise
        extra = "'memplan[hf]'" if package in ("transformers", "peft") else package
        message = f"this needs the package {package}, which is not installed: pip install {extra}"
        return fail(type(error).__name__, message, as_json, BAD_INPUT)
    finally:
        if collected:
            gc.enable()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(memplan.__version__)
def group() -> None:
    """Plan where the frozen blocks of a model live while an adapter is trained."""
