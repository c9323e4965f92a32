"""Commands about this machine: its rates, what is found on it, what is kept on its disk."""

from __future__ import annotations

from pathlib import Path

import click

from memplan.atomic_write import STANDARD_OUTPUT, OutputError, reason
from memplan.cli.entry import BAD_INPUT, OK, group
from memplan.cli.options import JSON
from memplan.cli.output import print_json
from memplan.cli.paths import OUTPUT, apart_from, require_apart
from memplan.units import format_bytes


@group.command(short_help="Measure this machine's rates, for better times in plans.")
@click.option("--out", type=OUTPUT, help="Write the profile to this file too.")
@JSON
def calibrate(out: Path | None, as_json: bool) -> int:
    """Measure what this machine can do, under two minutes, and keep it for the plans to come.

    Plans measure it themselves where it was not yet: do so again on a quiet machine, after a change of hardware or
    driver.
    """
    require_apart({"--out": out}, as_json=as_json)

    from memplan.hardware import profile as profiles
    from memplan.hardware.calibrate import current
    from memplan.show.tables import progress, write_rates

    with progress("Measuring") as tell:
        profile = current.measured_now(progress=tell)
    if out is not None:
        try:
            profiles.save(profile, out)
        except OutputError:
            raise
        except OSError as error:
            raise click.BadParameter(f"{out} cannot be written: {reason(error)}.", param_hint="--out") from error
    if as_json:
        from msgspec import to_builtins

        print_json(to_builtins(profile))
        return OK
    with apart_from(out):
        click.echo(f"{profile.name}\n")
        write_rates(profiles.as_rows(profile))
    if out not in (None, STANDARD_OUTPUT):
        click.echo(f"\nThe profile is in {out}: memplan plan --hardware {out}")
    return OK


@group.command(short_help="Say what is found on this machine, and what it means.")
@JSON
def doctor(as_json: bool) -> int:
    """Look at this machine: memory, devices, libraries, folders. Exits with 2 where something is in the way."""
    from memplan import doctor as doctors

    found = doctors.findings()
    if as_json:
        from msgspec import to_builtins

        print_json({"findings": to_builtins(found)})
    else:
        from memplan.show.tables import write_findings

        write_findings([(one.what, one.found, one.meaning, one.is_problem) for one in found])
    return BAD_INPUT if any(one.is_problem for one in found) else OK


@group.command(short_help="List the models that are known by name.")
@click.argument("text", required=False)
@JSON
def models(text: str | None, as_json: bool) -> int:
    """List the models that need no network and no config.json, with TEXT in their name where it is given.

    Exits with 2 where there is none. Any other model on the hub, or a directory with a config.json, can be planned too.
    """
    from memplan.model import models as known

    wanted = "" if text is None else text.lower()
    found = {name: model for name, model in known.table().items() if wanted in name or wanted in model.hub.lower()}
    if not found:
        raise click.BadParameter(
            f"no model that memplan knows has {text!r} in its name{_near(known.near(str(text)))}.", param_hint="TEXT"
        )
    if as_json:
        print_json({"models": {name: {"hub": m.hub, "parameters": m.parameters} for name, m in found.items()}})
    else:
        from memplan.show.known import write_models

        write_models([(name, f"{m.parameters / 1e9:,.1f} B", m.hub) for name, m in sorted(found.items())])
    return OK


@group.command(short_help="List the hardware that is known by name.")
@click.argument("text", required=False)
@JSON
def hardware(text: str | None, as_json: bool) -> int:
    """List the cards that plans can be made for, with TEXT in their name where it is given.

    Exits with 2 where there is none. Without --hardware a plan is for this machine, which is measured once.
    """
    from memplan.hardware import cards
    from memplan.hardware import profile as profiles
    from memplan.hardware.budgets import most_vram_bytes

    wanted = "" if text is None else text.lower()
    found = [profiles.load(name) for name in profiles.names() if wanted in name]
    if not found and text is not None:
        found = [profiles.load(name) for name in cards.matching(text, profiles.names())]
    if not found:
        near = _near(cards.near(str(text), profiles.names()))
        raise click.BadParameter(f"no card that memplan knows has {text!r} in its name{near}.", param_hint="TEXT")
    if as_json:
        rows = {one.name: {"device_bytes": int(one.device_bytes.value), "about": one.description} for one in found}
        print_json({"hardware": rows})
    else:
        from memplan.show.known import write_hardware

        write_hardware(
            [(one.name, format_bytes(most_vram_bytes(one)), one.description.partition(". ")[0]) for one in found]
        )
    return OK


def _near(names: list[str]) -> str:
    return f"; near it: {', '.join(names)}" if names else ""


@group.group(short_help="Look at packed blocks, or remove them.")
def cache() -> None:
    """Blocks that were packed for the disk because no checkpoint holds them as they are."""


@cache.command("list")
@JSON
def list_cache(as_json: bool) -> int:
    """Show what is cached, the oldest first."""
    from memplan.cache import BlockCache
    from memplan.hardware.machine import cache_folder

    held = BlockCache(cache_folder())
    if as_json:
        from msgspec import to_builtins

        print_json({"folder": str(held.folder), "blocks": to_builtins(held.entries())})
    else:
        from memplan.show.tables import write_cache

        write_cache(str(held.folder), [(e.about, e.size_bytes, e.created) for e in held.entries()])
    return OK


@cache.command("clear")
@click.option("--yes", is_flag=True, help="Do not ask.")
@JSON
def clear_cache(yes: bool, as_json: bool) -> int:
    """Remove all packed blocks, and the analyses of models. Runs that use them go on."""
    from memplan.analyze import graph_cache as kept
    from memplan.cache import BlockCache
    from memplan.hardware.machine import cache_folder

    held = BlockCache(cache_folder())
    if not yes:
        click.confirm(f"Remove {len(held.entries())} packed blocks from {held.folder}?", abort=True, err=True)
    freed = held.clear() + kept.clear(cache_folder() / kept.FOLDER)
    if as_json:
        print_json({"folder": str(held.folder), "freed_bytes": freed})
    else:
        click.echo(f"{format_bytes(freed)} freed in {held.folder}.")
    return OK
