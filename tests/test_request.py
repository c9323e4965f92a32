"""One list of options: every entrance takes all of them, and refuses what is none in the same words."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import click
import pytest
from torch import nn

import memplan
from memplan import api
from memplan.cli import group, main
from memplan.cli.options import OPTIONS
from memplan.errors import InputError, SizeError
from memplan.plan_options import PlanOptions
from memplan.queries import fit as fitting
from memplan.request import NAMES, Request, Sizes, completed
from memplan.trainers import hf_trainer as transformers
from memplan.trainers import lightning, placing
from memplan.units import GIB
from tests.queries.small import config_of
from tests.support.pages import docs_script
from tests.support.training import CPU

ENTRANCES = {
    "plan": (api, memplan.plan),
    "frontier": (api, memplan.frontier),
    "fit": (api, memplan.fit),
    "the question of fit": (fitting, fitting.fit),
    "wrap": (transformers, memplan.wrap),
    "wrap_within": (transformers, transformers.wrap_within),
    "plan_for": (transformers, transformers.plan_for),
    "placing": (placing, memplan.placing),
    "Placement": (lightning, lightning.Placement),
}
NOT_SAID = {"progress"}
"""A function: a command line cannot say it."""
NOT_OF_A_SCRIPT = {
    "adapter", "dtype", "attention", "quantization", "qlora", "kbit", "gradient_checkpointing", "examples", "epochs",
    "loss", "trained_by",
    "gpus", "nodes",
}  # fmt: skip
"""A script makes its model and its batches itself."""
NOT_ASKED = {"max_step_s", "gains"}
"""Of questions that are about more than one plan."""


@pytest.mark.parametrize("name", ENTRANCES)
def test_every_entrance_takes_every_option(name: str) -> None:
    module, entrance = ENTRANCES[name]
    parameters = inspect.signature(entrance).parameters
    options = parameters["options"]
    assert options.kind is inspect.Parameter.VAR_KEYWORD
    assert options.annotation == "Unpack[PlanOptions]"
    assert module.PlanOptions is PlanOptions is memplan.PlanOptions
    assert not set(parameters) & set(NAMES)


def said_by(command: str) -> set[str]:
    """The options of which a command has all parameters, by their names in the list."""
    parameters = {parameter.name for parameter in group.commands[command].params}
    return {name for name, row in OPTIONS.items() if {option.name for option in row.said} <= parameters}


def test_every_command_takes_every_option_that_can_be_said() -> None:
    assert set(OPTIONS) == set(NAMES) - NOT_SAID
    assert said_by("plan") == set(OPTIONS)
    assert said_by("frontier") == said_by("fit") == set(OPTIONS) - NOT_ASKED
    assert said_by("run") == set(OPTIONS) - NOT_OF_A_SCRIPT
    for command in ("plan", "frontier", "fit", "run"):
        known = {option.name for name in said_by(command) for option in OPTIONS[name].said}
        own = {parameter.name for parameter in group.commands[command].params} - known
        assert not own & {option.name for row in OPTIONS.values() for option in row.said}


def test_each_option_is_explained() -> None:
    texts = docs_script("reference").texts()
    assert tuple(texts) == NAMES
    assert all(text.endswith(".") for _, text in texts.values())
    text = memplan.plan.__doc__ or ""
    assert [name for name in NAMES if f"``{name}``" not in text] == []
    assert "memplan.PlanOptions" in text


def made_up(name: str, **options: Any) -> None:
    model, batch = config_of("llama"), (1, 8)
    if name in ("plan", "frontier", "fit"):
        getattr(memplan, name)(model, batch, **options)
    elif name == "placing":
        with memplan.placing(**options):
            raise AssertionError("entered")
    elif name == "Placement":
        lightning.Placement(**options)
    else:
        memplan.wrap(object(), **options)  # before anything is asked of it


@pytest.mark.parametrize("name", ["plan", "frontier", "fit", "wrap", "placing", "Placement"])
def test_a_made_up_option_is_refused_everywhere(name: str) -> None:
    with pytest.raises(InputError, match="there is no option 'actvations'; near it: activations"):
        made_up(name, actvations="keep")
    with pytest.raises(InputError, match="near it: optimizer_state"):
        made_up(name, vram="1GiB", optimiser_state="host")


@pytest.mark.parametrize("name", ["wrap", "placing", "Placement"])
def test_what_cannot_be_used_is_refused_before_a_trainer_is_there(name: str) -> None:
    for options, message in (
        ({"vram": "6"}, "did you mean 6GiB"),
        ({"activations": "away"}, "give one of keep, recompute, offload or any"),
        ({"pins": {"layers.3": "gpu"}}, "names the tier 'gpu'"),
        ({"optimizer_state": "disk"}, "cannot be in 'disk' between steps"),
        ({"optimizer": "adamwise"}, "near it: adamw"),
        ({"autocast": "fp8"}, "autocast was given as 'fp8'"),
        ({"max_step_s": -1}, "the longest step was given as -1 s"),
        ({"examples": 5}, "the batch is no shape"),
    ):
        with pytest.raises(InputError, match=message):
            made_up(name, **options)


@pytest.mark.quick("wrap", "Placement")
@pytest.mark.parametrize("name", ["wrap", "placing", "Placement"])
def test_options_beside_a_plan_are_not_ignored(name: str) -> None:
    plan = memplan.plan(config_of("llama"), (1, 8), vram="1GiB", ram="1GiB", hardware=CPU, adapter={"rank": 2})
    with pytest.raises(InputError, match="elastic was given with a plan that was made before"):
        made_up(name, plan=plan, elastic=False)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("plan gpt2 --actvations keep", "--activations"),
        ("frontier gpt2 --elastc", "--elastic"),
        ("fit gpt2 --page-lok 1GiB", "--page-lock"),
        ("run --optimizer-stat host -- true", "--optimizer-state"),
    ],
)
def test_a_made_up_word_is_refused_with_what_is_near(
    command: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", ["frontier", "fit"])
def test_what_a_question_has_no_use_for_is_refused(command: str) -> None:
    for options in ({"max_step_s": 1.0}, {"gains": False}):
        (name,) = options
        with pytest.raises(InputError, match=f"{name} was given to {command}"):
            getattr(memplan, command)(config_of("llama"), (1, 8), **options)
    with pytest.raises(InputError, match="adapter was given to fit, which is asked with rank and targets"):
        memplan.fit(config_of("llama"), (1, 8), adapter={"rank": 2})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--optimizer adamwise", "near it: adamw"),
        ("--max-step-s 0", "the longest step was given as 0.0 s"),
        ("--pin layers.3=gpu", "not BLOCK=TIER"),
        ("--optimizer paged_adamw_8bit --optimizer-state host", "goes to the host between steps by itself"),
        ("--checkpoint /no/such/folder", "does not exist"),
    ],
)
def test_a_slip_starts_no_script(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *words.split(), "--", "true"]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_plan_made_before_and_options_start_no_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = memplan.plan(config_of("llama"), (1, 8), vram="1GiB", ram="1GiB", hardware=CPU, adapter={"rank": 2})
    plan.save(tmp_path / "plan.json")
    assert main(["run", "--plan", str(tmp_path / "plan.json"), "--vram", "1GiB", "--", "true"]) == 2
    assert "vram was given with a plan that was made before" in capsys.readouterr().err


def test_a_request_is_understood_once() -> None:
    request = Request.of(
        "gpt2",
        (4, 64),
        {"vram": "6GiB", "ram": "auto", "dtype": "half", "optimizer": "AdamW", "accumulation": 2, "examples": 9,
         "pins": {"h.3": "device"}, "activations": {"h.1": "offload"}},
    )  # fmt: skip
    assert request.sizes == Sizes(
        vram_bytes=6 * GIB, ram_bytes=None, disk_bytes=None, page_lock_bytes=None, margin_bytes=0
    )
    assert request.build.keywords()["dtype"] == "float16"
    training = request.training
    assert (training.optimizer, training.steps, training.epochs) == ("adamw", 2, 1)
    assert request.choices.pins == {"h.3": "device"}
    assert request.choices.activations == {"h.1": "offload"}
    assert not request.choices.offload_where_best
    assert Request.of("gpt2", (1, 8), {"activations": "any"}).choices.offload_where_best


def test_qlora_is_its_parts_unless_they_are_given() -> None:
    whole = Request.of("gpt2", (1, 8), {"qlora": True})
    assert (whole.build.quantization, whole.build.dtype, whole.build.kbit) == ("qlora", "bf16", True)
    assert (whole.training.autocast, whole.training.optimizer) == ("bf16", "paged_adamw_8bit")
    part = Request.of("gpt2", (1, 8), {"qlora": True, "kbit": False, "optimizer": "sgd", "quantization": "int8"})
    assert (part.build.quantization, part.build.kbit, part.training.optimizer) == ("int8", False, "sgd")
    with pytest.raises(InputError, match="qlora was given with a Linear that is built already"):
        Request.of(nn.Linear(1, 1), None, {"qlora": True})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"accumulation": 0}, InputError, "accumulation was given as 0"),
        ({"accumulation": "2"}, InputError, "accumulation was given as '2'"),
        ({"group": -2}, InputError, "group was given as -2: give a number of micro-batches, 1 or more, or auto"),
        ({"group": 0, "accumulation": 4}, InputError, "group was given as 0"),
        ({"group": True, "accumulation": 4}, InputError, "group was given as True"),
        ({"group": "all", "accumulation": 4}, InputError, "group was given as 'all'"),
        ({"page_lock": "half"}, SizeError, "page_lock was given as 'half'"),
        ({"pins": ["layers.3"]}, InputError, "give a tier by block name"),
        ({"activations": {"h.1": "any"}}, InputError, "the activations of h.1 were given as 'any'"),
        ({"activations": 3}, InputError, "the activations were given as 3"),
    ],
)
def test_what_cannot_be_used(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Request.of("gpt2", (1, 8), options)


def test_what_is_given_goes_before_what_a_trainer_says() -> None:
    said = {"accumulation": 4, "steps": 10, "optimizer": "sgd"}
    assert completed({}, **said) == said
    assert completed({"optimizer": "adamw", "steps": None}, **said) == {**said, "optimizer": "adamw", "steps": None}
    assert completed({"examples": 8}, **said) == {"accumulation": 4, "optimizer": "sgd", "examples": 8}


def test_commands_say_what_they_take() -> None:
    """No two options of a command have one name."""
    for command in ("plan", "frontier", "fit", "run"):
        names = [name for one in group.commands[command].params if isinstance(one, click.Option) for name in one.opts]
        assert len(names) == len(set(names))
