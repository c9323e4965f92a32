"""A model without its weights, from its configuration. Nothing is downloaded, no code of a checkpoint
run.

The analyzer traces it, and a model that is loaded straight to its homes begins as one.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from memplan.errors import InputError, MemplanError, ModelError, first_line
from memplan.model import models
from memplan.model.arguments import DEQUANTIZED, QLORA, dtype_name
from memplan.model.quantization import of_diffusers, quantization_of
from memplan.units import format_bytes

MOST_MODULES = 4096
"""Layers or experts of a kind that a configuration may ask for."""
_COUNTS = re.compile(r"^(num|n)_\w*(layer|block|expert)s?$|^depths?$")


class Skeleton(NamedTuple):
    """A model whose parameters hold no memory."""

    model: nn.Module
    name: str
    """For people: the directory's or the class's name."""
    folder: Path | None
    """Where its checkpoint lies, as far as that is known."""
    notes: tuple[str, ...] = ()
    """What is to be said of how it was built."""
    estimated: bool = False
    """Its quantized layers stand in for ones whose kernels are not there."""


# ---- configurations
# ----------------------------------------------------------------------------------------------------


def from_configuration(
    given: Any,
    dtype: Any,
    attention: str | None,
    *,
    buffers: bool = False,
    quantization: Any = None,
    plain: bool = False,
) -> Skeleton:
    """Return the model of a transformers configuration, of a directory with ``config.json``, or of a name, on ``meta``.

    A name is one of ``memplan/model/models.json``, which needs no network, or of a model on the hub, of which the
    configuration alone is fetched.

    ``buffers``: have its buffers hold their values all the same (rotary frequencies are in no checkpoint). The dtype is
    the configuration's where none is given; parameters that transformers keeps in float32 are so here.
    ``quantization``: see :func:`quantization_of`; the configuration's own where it has one (QLORA: else nested nf4).
    ``plain``: refuse one that has.

    Raises InputError for anything that cannot be used, ModelError for a model that cannot be built.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "a model is built from its configuration with transformers, which is not installed: "
            "pip install transformers, or give an nn.Module"
        ) from error
    folder: Path | None = None
    if isinstance(given, (str, Path)):
        if (found := _of_diffusers(given, dtype, attention, quantization)) is not None:
            return found
        config, name, folder = _named(transformers, given)
    elif isinstance(given, transformers.PretrainedConfig):
        config, name = copy.deepcopy(given), ""
        kept = getattr(config, "_name_or_path", "")
        folder = Path(kept) if kept and Path(kept).is_dir() else None
    else:
        raise InputError(
            f"the model is a {type(given).__name__}: give an nn.Module, a transformers configuration, a directory "
            "with a config.json, or a model's name"
        )
    _refuse_endless(config, name)
    if _is_untied_within(given, config):  # as from_pretrained has it, once it finds both in the checkpoint
        config.tie_word_embeddings = False
    options: dict[str, Any] = {"dtype": _dtype(dtype if dtype is not None else getattr(config, "dtype", None))}
    own = getattr(config, "quantization_config", None)
    dequantized: tuple[str, ...] = ()
    if quantization == DEQUANTIZED:
        if own is not None:
            del config.quantization_config
            dequantized = (_dequantized_note(name or type(config).__name__, own, options["dtype"]),)
        own = quantization = None
    if quantization == QLORA:
        quantization = None if own is not None else "nf4-nested"
    if own is not None:
        if plain or quantization is not None:
            what = (
                "which memplan cannot load yet: load"
                if plain
                else "and quantization was given besides: leave it out, or give"
            )
            raise InputError(
                f"{name or type(config).__name__} is quantized by its configuration, {what} the model without it"
            )
        del config.quantization_config
        quantization = own
    if attention is not None:
        options["attn_implementation"] = attention
    try:
        quantized = None if quantization is None else quantization_of(quantization, options["dtype"])
        build = _builder(transformers, config)
        with torch.random.fork_rng(devices=[]), _on_meta(buffers):
            model: nn.Module = build(config, options)
        if buffers:  # accelerate's context parts what is tied
            tied: Any = model
            tied.tie_weights()
        if quantized is not None:
            quantized.begin(model, options["dtype"])
        keep_in_float32(model, options["dtype"])
        notes = () if quantized is None else quantized.finish(model)
        estimated = bool(notes)
    except MemplanError:
        raise
    except ImportError as error:
        library = re.search(r"requires the ([\w.-]+) library", str(error))
        needed = library[1] if library else getattr(error, "name", None) or first_line(error)
        raise InputError(
            f"{name or type(config).__name__} needs {needed}, which is not installed: pip install {needed}, or give "
            "the configuration of its text part alone (text_config of its config.json), if that is what is trained"
        ) from error
    except Exception as error:
        raise ModelError(f"transformers cannot build a {type(config).__name__} model: {first_line(error)}") from error
    notes = (*dequantized, *notes)
    if _is_tied(model) and _says_untied(given):
        notes = (*notes, _untied_note(transformers, model))
    return Skeleton(model, name or type(model).__name__, folder, notes, estimated)


def _dequantized_note(name: str, own: Any, dtype: torch.dtype) -> str:
    method = own.get("quant_method") if isinstance(own, Mapping) else getattr(own, "quant_method", None)
    return (
        f"{name} is stored as {getattr(method, 'value', method)}, and planned as it is trained once it is dequantized "
        f"to {str(dtype).removeprefix('torch.')}: load it so (dequantize=True in transformers' configuration of its "
        "quantization, or a copy that is stored so, whose files blocks may be read from)."
    )


def _is_untied_within(given: Any, config: Any) -> bool:
    """Whether a text part of its own parts head and embedding, and the settings around it do not say."""
    text = config.get_text_config()
    around = _settings_of(given)
    return (
        text is not config
        and around.get("tie_word_embeddings", around) is around
        and "text_config" in around
        and getattr(text, "tie_word_embeddings", None) is False
    )


def _says_untied(given: Any) -> bool:
    """Whether the settings that a model was named by part its head from its embedding."""
    return _settings_of(given).get("tie_word_embeddings") is False


def _settings_of(given: Any) -> Mapping[str, Any]:
    """Return the settings that a model was named by, as they are written; none for another's."""
    settings: Any = {}
    if (folder := models.folder_of(given)) is not None:
        with suppress(OSError, ValueError):
            settings = json.loads((folder / "config.json").read_text())
    elif isinstance(given, str) and (known := models.find(given)) is not None:
        settings = known[1].config
    return settings if isinstance(settings, dict) else {}


def _is_tied(model: Any) -> bool:
    try:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(embedding, "weight", None)


def _untied_note(transformers: Any, model: Any) -> str:
    weight = model.get_output_embeddings().weight
    return (
        f"Its configuration parts head and embedding, but transformers {transformers.__version__} makes one of them: "
        f"where the checkpoint holds both, count {format_bytes(weight.numel() * weight.element_size())} more."
    )


def _refuse_endless(config: Any, name: str) -> None:
    """Raise InputError for more layers or experts than could be built in a lifetime: a slip, or a hostile file."""
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        for key, value in vars(part).items():
            _refuse_count(name or type(config).__name__, key, value)


def _refuse_count(name: str, key: str, value: Any) -> None:
    if _COUNTS.search(key) and isinstance(value, int) and value > MOST_MODULES:
        raise InputError(f"{name} has {key} = {value}: more than {MOST_MODULES} are not built; mend the configuration")


def _of_diffusers(given: str | Path, dtype: Any, attention: str | None, quantization: str | None) -> Skeleton | None:
    """Return the model of a directory of diffusers', or of one of our names, by the class of diffusers that it names;
    None for another's.
    """
    folder = models.folder_of(given)
    settings = dict(_settings_of(given))
    name = settings.get("_class_name")
    if name is None:
        return None  # what cannot be read too: said where transformers reads it
    if settings.get("quantization_config"):
        raise ModelError(
            f"{given} is quantized, which is not known of models of diffusers: give the nn.Module as loaded"
        )
    for key, value in settings.items():
        _refuse_count(folder.name if folder else str(given), key, value)
    try:
        import diffusers
    except ImportError as error:
        raise InputError(
            f"{given} is a model of diffusers, which is not installed: pip install 'memplan[diffusers]', or give "
            "the nn.Module"
        ) from error
    if attention is not None:
        raise InputError(f"attention was given with {name}: leave it out for models of diffusers")
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin)):
        raise ModelError(f"{given} names the class {name!r}, which is no model of this diffusers")
    wanted = None if dtype is None else _dtype(dtype)
    quantized = None
    compute = wanted or torch.float32
    if quantization is not None:
        wanted = compute
        quantized = of_diffusers("nf4-nested" if quantization == QLORA else quantization, compute)
    try:
        model = diffusers_model(kind, settings, wanted)
        if folder is not None:
            model.register_to_config(_name_or_path=str(folder.resolve()))  # its autoencoder may lie beside it
        if quantized is not None:
            quantized.begin(model, compute)
            quantized.finish(model)
    except MemplanError:
        raise
    except Exception as error:
        raise ModelError(f"diffusers cannot build a {name}: {first_line(error)}") from error
    if folder is None:
        known = models.find(str(given))
        return Skeleton(model.train(), known[0] if known else str(given), None)
    called = folder.resolve()
    return Skeleton(model.train(), called.parent.name if called.name in models.TRAINED else called.name, folder)


def diffusers_model(cls: Any, config: Any, dtype: torch.dtype | None, **options: Any) -> Any:
    """Return a model of a class of diffusers, its parameters on ``meta``, of the dtypes that ``from_pretrained``
    loads.
    """
    with torch.random.fork_rng(devices=[]), _on_meta(True):  # they make buffers with NumPy
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype or before)
        try:
            model = cls.from_config(config, **options)
        finally:
            torch.set_default_dtype(before)
    kept = cls._keep_in_fp32_modules or []
    for path, tensor in model.state_dict(keep_vars=True).items() if dtype is not None else ():
        if tensor.is_floating_point():
            full = bool(set([kept] if isinstance(kept, str) else kept) & set(path.split(".")))
            tensor.data = tensor.data.to(torch.float32 if full else dtype)
    return model


def _on_meta(buffers: bool) -> AbstractContextManager[Any]:
    if not buffers:
        return torch.device("meta")
    from accelerate import init_empty_weights

    context: AbstractContextManager[Any] = init_empty_weights(include_buffers=False)
    return context


def keep_in_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Have the parameters in float32 that ``from_pretrained`` would load so whatever the dtype."""
    given: Any = getattr(model, "_get_dtype_plan", None)
    wanted: dict[str, torch.dtype] = given(dtype) if callable(given) else {}
    if not wanted:
        return
    from transformers.core_model_loading import build_glob_alternation

    pattern = build_glob_alternation(list(wanted))[0]
    for name, parameter in model.named_parameters():
        if pattern.search(name):
            parameter.data = parameter.data.to(torch.float32)


def _named(transformers: Any, given: str | Path) -> tuple[Any, str, Path | None]:
    """Return the configuration that a directory or a name stands for, a name for people, and the directory."""
    folder = models.folder_of(given)
    if folder is not None:
        try:
            config = transformers.AutoConfig.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            raise ModelError(
                f"{folder / 'config.json'} cannot be used: {first_line(error)} (memplan runs no code from a "
                "checkpoint; for such a model give the nn.Module)"
            ) from error
        return config, folder.resolve().name, folder
    known = models.find(str(given)) if isinstance(given, str) else None
    if known is not None:
        settings = dict(known[1].config)
        kind = settings.pop("model_type")
        try:
            return transformers.AutoConfig.for_model(kind, **settings), known[0], None
        except Exception as error:
            raise ModelError(
                f"this transformers cannot describe {known[0]}, of type {kind}: {first_line(error)}"
            ) from error
    if isinstance(given, str) and models.is_hub_name(hub := models.hub_name(given)):
        return _from_hub(transformers, hub), hub.rsplit("/", 1)[-1], None
    raise models.unknown(given)


def _from_hub(transformers: Any, name: str) -> Any:
    """Return the configuration of a model on the hub, from its cache where it is there. Nothing else is fetched."""
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise models.not_on_hub(name, error) from error


_ENCODER_DECODER = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", "AutoModelForImageTextToText")
_LANGUAGE = ("AutoModelForMaskedLM", "AutoModelForCausalLM")
_OTHERS = (
    "AutoModelForImageTextToText",
    "AutoModelForImageClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForCTC",
    "AutoModelForAudioClassification",
)


def _builder(transformers: Any, config: Any) -> Any:
    """Return what makes a model of a configuration.

    The class that it names, unless that is a language model without its head; else the first automatic class that knows
    it.
    """

    def automatic(names: tuple[str, ...]) -> Any:
        for name in names:
            if name == "AutoModelForMaskedLM" and getattr(config, "is_decoder", False):
                continue
            found: Any = getattr(transformers, name)
            if type(config) in found._model_mapping:
                return found.from_config
        return None

    named: Any = None
    for name in getattr(config, "architectures", None) or ():
        found: Any = getattr(transformers, name, None)
        if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel):
            named = found
            break
    headless = (
        type(config) in transformers.AutoModel._model_mapping
        and named is not None
        and (named is transformers.AutoModel._model_mapping[type(config)])
    )
    build = None if named is None or headless else named._from_config
    language = (*_ENCODER_DECODER, *_LANGUAGE) if getattr(config, "is_encoder_decoder", False) else _LANGUAGE
    build = build or automatic(language) or (named._from_config if named is not None else automatic(_OTHERS))
    if build is None:
        raise ModelError(
            f"transformers has no model of language, images or sound for {type(config).__name__}, and its "
            "architectures name no class of transformers: give the nn.Module"
        )
    return lambda config, options: build(config, **options)


def _dtype(given: Any) -> torch.dtype:
    if given is None:
        return torch.float32
    if isinstance(given, torch.dtype):
        return given
    found: torch.dtype = getattr(torch, dtype_name(str(given)))
    return found
