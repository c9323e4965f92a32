"""What ``plan`` is given as a model -> a module that can be traced, with its adapter. Nothing is loaded or downloaded.

A configuration becomes a model on ``meta``; a module that gets an adapter here is copied there first, so the user's
own stays as it is.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memplan.analyze.batch import base_of, batch_for
from memplan.analyze.blocks import refuse_moved
from memplan.errors import InputError, ModelError

_ALL_LINEAR = "all-linear"
_ADAPTER_KEYS = ("rank", "targets", "alpha", "dropout")
_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A model that can be traced."""

    model: nn.Module
    name: str
    """For people: the directory's or the class's name."""
    folder: Path | None
    """Where its checkpoint lies, as far as that is known."""

    def shapes(self, batch: object) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of the batch by name."""
        return batch_for(self.model, batch).shapes()


def prepare(model: Any, *, adapter: Any = None, dtype: Any = None, attention: str | None = None) -> Prepared:
    """Return a traceable model of what the user gave: a module, a transformers configuration, or a directory.

    ``adapter``: a PEFT configuration, or ``{"rank": 16, "targets": "all-linear", "alpha": 32}``; None where the model
    has its trainables. ``dtype`` and ``attention`` are for a model that is built here.

    Raises InputError for anything that cannot be used, ModelError for a model that cannot be placed.
    """
    if isinstance(model, nn.Module):
        if dtype is not None or attention is not None:
            raise InputError(
                "dtype and attention were given with a model that is built already: give them with a configuration, "
                "or build the model with them"
            )
        refuse_moved(model)
        base = base_of(model)
        folder = getattr(getattr(base, "config", None), "_name_or_path", None)
        prepared = Prepared(
            model=model if adapter is None else _copy_on_meta(model),
            name=type(base).__name__,
            folder=Path(folder) if folder and Path(folder).is_dir() else None,
        )
    else:
        prepared = _from_configuration(model, dtype, attention)
    if adapter is None:
        return prepared
    return Prepared(model=_with_adapter(prepared.model, adapter), name=prepared.name, folder=prepared.folder)


def describe(model: nn.Module) -> str:
    """Return the model's adapter for people, such as ``"LoRA r=16 on all-linear"``; empty where it has none."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        return ""
    config = next(iter(configs.values()))
    kind = {"LORA": "LoRA"}.get(_text(config.peft_type), _text(config.peft_type))
    rank = getattr(config, "r", None)
    targets = getattr(config, "target_modules", None)
    what = f"{kind} r={rank}" if rank else kind
    if not targets:
        return what
    if isinstance(targets, str):
        return f"{what} on {targets}"
    if _covers_all_linear(base_of(model)):
        return f"{what} on {_ALL_LINEAR}"
    return f"{what} on {', '.join(sorted({target.rsplit('.', 1)[-1] for target in targets}))}"


# ---- configurations ----------------------------------------------------------------------------------------------------


def _from_configuration(given: Any, dtype: Any, attention: str | None) -> Prepared:
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "a model is built from its configuration with transformers, which is not installed: "
            "pip install 'memplan[hf]', or give an nn.Module"
        ) from error
    folder: Path | None = None
    if isinstance(given, (str, Path)):
        path = Path(given)
        folder = path.parent if path.name == "config.json" else path
        config = _read_config(transformers, path, folder)
        name = folder.resolve().name
    elif isinstance(given, transformers.PretrainedConfig):
        config, name = copy.deepcopy(given), ""
        kept = getattr(config, "_name_or_path", "")
        folder = Path(kept) if kept and Path(kept).is_dir() else None
    else:
        raise InputError(
            f"the model is a {type(given).__name__}: give an nn.Module, a transformers configuration, or a directory "
            "with a config.json"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name or type(config).__name__} is quantized: quantized weights cannot be analyzed yet. "
            "Give the configuration of the model without quantization"
        )
    options: dict[str, Any] = {"dtype": _dtype(dtype if dtype is not None else getattr(config, "dtype", None))}
    if attention is not None:
        options["attn_implementation"] = attention
    build = _builder(transformers, config)
    try:
        with torch.device("meta"):
            model: nn.Module = build(config, options)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"transformers cannot build a {type(config).__name__} model: {reason}") from error
    return Prepared(model=model, name=name or type(model).__name__, folder=folder)


def _read_config(transformers: Any, path: Path, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{path} is no directory with a config.json: give one (nothing is downloaded here), a transformers "
            "configuration or an nn.Module"
        )
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{folder / 'config.json'} cannot be used: {reason} (memplan runs no code from a checkpoint; for such a "
            "model give the nn.Module)"
        ) from error


def _builder(transformers: Any, config: Any) -> Any:
    """Return what makes a model of a configuration: the class that it is known for in training."""
    automatic = transformers.AutoModelForCausalLM
    if getattr(config, "is_encoder_decoder", False):
        automatic = transformers.AutoModelForSeq2SeqLM
    if type(config) in automatic._model_mapping:
        return lambda config, options: automatic.from_config(config, **options)
    for name in getattr(config, "architectures", None) or ():
        named: Any = getattr(transformers, name, None)
        if inspect.isclass(named) and issubclass(named, transformers.PreTrainedModel):
            make: Any = named
            return lambda config, options: make._from_config(config, **options)
    raise ModelError(
        f"transformers has no language model for {type(config).__name__}, and its architectures name no class of "
        "transformers: give the nn.Module"
    )


def _dtype(given: Any) -> torch.dtype:
    if given is None:
        return torch.float32
    if isinstance(given, torch.dtype):
        return given
    found = _DTYPES.get(str(given).removeprefix("torch."))
    if found is None:
        raise InputError(f"the dtype was given as {given!r}: give one of {', '.join(sorted(_DTYPES))}")
    return found


# ---- adapters ----------------------------------------------------------------------------------------------------------


def _with_adapter(model: nn.Module, adapter: Any) -> nn.Module:
    """Return the model, which is ours, with a PEFT adapter."""
    try:
        import peft
    except ImportError as error:
        raise InputError(
            "an adapter is added with peft, which is not installed: pip install 'memplan[hf]', or give a model that "
            "has its adapter"
        ) from error
    if getattr(model, "peft_config", None):
        raise InputError("the model has an adapter already: leave adapter= out")
    config: Any
    if isinstance(adapter, Mapping):
        config = _lora(peft, model, adapter)
    elif isinstance(adapter, peft.PeftConfig):
        config = copy.deepcopy(adapter)
        if getattr(config, "target_modules", None) == _ALL_LINEAR and not hasattr(model, "get_output_embeddings"):
            config.target_modules = _linear_names(model)
    else:
        raise InputError(
            f"the adapter is a {type(adapter).__name__}: give a PEFT configuration or "
            '{"rank": 16, "targets": "all-linear"}'
        )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going away
            warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)  # it sets it right itself
            adapted: nn.Module = peft.get_peft_model(model, config)
    except (ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the adapter does not fit {type(model).__name__}: {reason}") from error
    return adapted


def _lora(peft: Any, model: nn.Module, given: Mapping[str, Any]) -> Any:
    unknown = [key for key in given if key not in _ADAPTER_KEYS]
    if unknown:
        raise InputError(f"the adapter has {unknown[0]!r}: it may have {', '.join(_ADAPTER_KEYS)}")
    rank = given.get("rank", 16)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"the adapter's rank was given as {rank!r}: give a whole number, at least 1")
    targets = given.get("targets", _ALL_LINEAR)
    if targets == _ALL_LINEAR and not hasattr(model, "get_output_embeddings"):
        targets = _linear_names(model)
    return peft.LoraConfig(
        r=rank,
        lora_alpha=given.get("alpha", 2 * rank),
        lora_dropout=given.get("dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def _linear_names(model: nn.Module) -> list[str]:
    """PEFT knows ``all-linear`` for transformers' models only; for others, name them."""
    names = [name for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    if not names:
        raise InputError(f"{type(model).__name__} has no linear layer within it for an adapter: name the targets")
    return names


def _covers_all_linear(model: nn.Module) -> bool:
    """Whether no linear layer but the head, and those of the adapter, is without adapter."""
    adapted = {id(module.base_layer) for module in model.modules() if hasattr(module, "base_layer")}
    inside = {
        id(inner)
        for module in model.modules()
        if hasattr(module, "base_layer")
        for inner in module.modules()
        if id(inner) not in adapted
    }
    given = getattr(model, "get_output_embeddings", None)
    head = given() if callable(given) else None
    return all(
        id(module) in adapted or id(module) in inside or module is head
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )


def _copy_on_meta(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers hold no memory; what is tied stays tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def _text(kind: object) -> str:
    return str(getattr(kind, "value", kind))
