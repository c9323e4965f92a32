"""The words that a plan is asked for in, checked before anything heavy is imported: a slip costs no time. No torch
here.

Near misses that can mean one thing are taken (``BF16``, ``half``, ``4bit``, a page of the hub); others are refused with
the names that are near.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from memplan.errors import InputError, ModelError, first_line
from memplan.model import models

DTYPES = ("bfloat16", "float16", "float32")
_DTYPE_NAMES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "bfloat": "bfloat16", "fp16": "float16", "float16": "float16",
    "f16": "float16", "half": "float16", "fp32": "float32", "float32": "float32", "f32": "float32", "float": "float32",
    "single": "float32",
}  # fmt: skip
QUANTIZATIONS = (
    "nf4", "nf4-nested", "fp4", "fp4-nested", "int8", "torchao-int8", "torchao-int4", "torchao-float8", "gptq", "awq",
)  # fmt: skip
"""What may be asked for by a word: :mod:`memplan.model.quantization` says what each is."""
DEQUANTIZED = "none"
"""In their place: a model that its configuration quantizes, as it is trained once it is dequantized."""
_TRAINED_ON = ("gptq", "awq", "bitsandbytes", "torchao")
"""Methods whose weights adapters are trained on as they are stored."""
QLORA = "qlora"
"""In their place: nested nf4, unless the configuration is quantized by itself."""
ALL_LINEAR = "all-linear"
DEFAULT_TARGETS = "default"
"""Where an adapter goes by itself: on all linear layers, but of a model with experts."""
_QUANTIZATION_NAMES = {
    "4bit": "nf4", "bnb4bit": "nf4", "loadin4bit": "nf4", "bnbnf4": "nf4", "nf4double": "nf4-nested",
    "nf4doublequant": "nf4-nested", "8bit": "int8", "bnb8bit": "int8", "loadin8bit": "int8", "llmint8": "int8",
}  # fmt: skip
_AUTOCAST_NAMES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}
_ATTENTIONS = (
    "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "paged_attention", "sdpa_paged",
    "eager_paged",
)  # fmt: skip
_ALL_LINEAR = "all-linear"
_DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
_ROUTED = ("q_proj", "k_proj", "v_proj", "o_proj", "experts", "embed_tokens", "lm_head")
_T5 = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo", "relative_attention_bias", "shared", "embed_tokens", "lm_head")
TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2"), _DENSE),
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), _ROUTED),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"),
    "gpt2": ("c_attn", "c_proj", "c_fc", "wte", "wpe", "lm_head"),
    "bloom": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "word_embeddings", "lm_head"),
    "t5": _T5,
    "mt5": _T5,
}
"""What an adapter may be put on, by the type of a configuration: the last part of a module's name. Other types are
looked at when they are built."""
_ANYWHERE = {name for known in TARGETS.values() for name in known} | {
    "w1", "w2", "w3", "gate", "score", "classifier", "qa_outputs", "fc1", "fc2", "out_proj",
}  # fmt: skip
"""Such lists are handed on from one model to another: PEFT takes what it finds of them."""


class Understood(NamedTuple):
    """What was asked for, by the names that memplan knows."""

    model: Any
    dtype: Any
    quantization: Any
    notes: tuple[str, ...]
    """What is to be said of how it was understood."""


def understood(
    model: Any, *, dtype: Any = None, quantization: Any = None, attention: Any = None, adapter: Any = None
) -> Understood:
    """Return what was asked for. What is no word, such as a module or a configuration, is handed on as it is.

    Raises InputError for what is not known, with what is near it, and ModelError for a ``config.json`` that is none.
    """
    settings: Any = None
    notes: tuple[str, ...] = ()
    dtype = dtype_name(dtype) if isinstance(dtype, str) else dtype
    quantization = _quantization(quantization)
    _check_attention(attention)
    if isinstance(model, (str, Path)):
        given, (model, settings) = model, _model(model)
        if isinstance(given, str) and given != model and models.hub_name(given) != model:
            hub = models.table()[model].hub
            if models.hub_name(given).lower() != hub.lower():
                notes = (f"{given} is planned as {hub}: the same shapes.",)
    else:
        given, settings = "the model", {"quantization_config": getattr(model, "quantization_config", None)}
    if quantization == "none":
        own = isinstance(settings, Mapping) and settings.get("quantization_config")
        method = own.get("quant_method") if isinstance(own, Mapping) else getattr(own, "quant_method", None)
        if own and str(getattr(method, "value", method)) in _TRAINED_ON:
            raise InputError(
                f"the quantization was given as 'none', but {given} is quantized by its configuration: give a model "
                "that is not, or leave the quantization out"
            )
        quantization = DEQUANTIZED if own else None
    return Understood(model, dtype, quantization, (*notes, *_targets(adapter, settings)))


def like(word: str, names: Iterable[str]) -> str:
    """Return ``"; near it: ..."`` with the names that are like a word, or an empty string."""
    found = difflib.get_close_matches(word.lower(), list(names), n=3, cutoff=0.5)
    return f"; near it: {', '.join(found)}" if found else ""


def dtype_name(given: str) -> str:
    """Return torch's name of a dtype of the frozen weights. Raises InputError for what is none."""
    found = _DTYPE_NAMES.get(given.strip().lower().removeprefix("torch."))
    if found is None and _is_quantization(given):
        raise InputError(
            f"the dtype was given as {given!r}, which is a quantization: give --quantization {given} "
            f"(quantization={given!r}), and as dtype what products are computed in, such as bf16"
        )
    if found is None:
        raise InputError(
            f"the dtype was given as {given!r}: give one of "
            f"{', '.join(sorted(_DTYPE_NAMES))}{like(given, _DTYPE_NAMES)}"
        )
    return found


def autocast_name(given: object) -> str:
    """Return torch's name of what autocast computes in: a dtype, or its name. Raises InputError for what is none."""
    found = _AUTOCAST_NAMES.get(str(given).removeprefix("torch."))
    if found is None:
        raise InputError(
            f"autocast was given as {given!r}: give one of {', '.join(sorted(_AUTOCAST_NAMES))}, or leave it out"
        )
    return found


def _is_quantization(given: str) -> bool:
    word = given.strip().lower().replace("_", "-")
    return _QUANTIZATION_NAMES.get(word.replace("-", ""), word) in QUANTIZATIONS


def _quantization(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    word = given.strip().lower().replace("_", "-")
    if word in ("", "no", "off"):
        word = "none"
    found = _QUANTIZATION_NAMES.get(word.replace("-", ""), word)
    if found not in (*QUANTIZATIONS, "none"):
        raise InputError(
            f"the quantization was given as {given!r}: give one of "
            f"{', '.join(QUANTIZATIONS)}{like(word, QUANTIZATIONS)}"
        )
    library = "torchao" if found.startswith("torchao") else "bitsandbytes"
    if found not in ("none", "gptq", "awq") and not _is_installed(library):
        raise not_installed(library)
    return found


def not_installed(library: str) -> InputError:
    """Return the error of a quantization whose library is not there."""
    return InputError(
        f"the quantization needs {library}, which is not installed: pip install 'memplan[quant]', or plan the model "
        f"without it"
    )


def _is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ValueError:  # it was left out of this process
        return sys.modules.get(library) is not None


def _check_attention(given: Any) -> None:
    # Once transformers is there, others may have registered kernels of their own; names with a slash are of the hub.
    if not isinstance(given, str) or "transformers" in sys.modules or "/" in given or "|" in given:
        return
    if given not in _ATTENTIONS:
        raise InputError(
            f"the attention was given as {given!r}: give one of {', '.join(_ATTENTIONS)}, or a kernel of the hub"
            f"{like(given, _ATTENTIONS)}"
        )


def _model(given: str | Path) -> tuple[Any, Any]:
    """Return a model by the name that memplan knows, and its settings as far as they are at hand."""
    folder = models.folder_of(given)
    if folder is not None:
        return given, _settings(folder / "config.json")
    known = models.find(given) if isinstance(given, str) else None
    if known is not None:
        exact = str(given).lower() in (known[0], known[1].hub.lower())
        return (given if exact else known[0]), known[1].config
    name = models.hub_name(str(given))
    if isinstance(given, Path) or not models.is_hub_name(name):
        raise models.unknown(given)
    fetched = models.from_hub(name)
    return name, None if fetched is None else _settings(fetched)


def _settings(file: Path) -> Any:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be used: {first_line(error)}; give a config.json of the model") from error
    if not isinstance(found, Mapping):
        raise ModelError(f"{file} cannot be used: it holds no settings; give a config.json of the model")
    return found


def _targets(adapter: Any, settings: Any) -> tuple[str, ...]:
    """Check the modules that an adapter is put on, where the model's are known; return what is to be said of them."""
    targets = adapter.get("targets") if isinstance(adapter, Mapping) else None
    if targets is None or isinstance(targets, str) or not all(isinstance(target, str) for target in targets):
        return ()  # a string is a pattern
    names = list(targets)
    if not names:
        raise InputError(f"the adapter has no targets: give module names, or {_ALL_LINEAR}")
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            raise InputError(
                f"the adapter's target was given as {name!r}: give a module's name such as q_proj, or {_ALL_LINEAR}"
            )
    kind = settings.get("model_type") if isinstance(settings, Mapping) else None
    architectures = (settings.get("architectures") or ()) if isinstance(settings, Mapping) else ()
    known = TARGETS.get(str(kind))
    if known is None or not all(
        str(one).endswith(("ForCausalLM", "ForConditionalGeneration")) for one in architectures
    ):
        return ()
    missing = [name for name in names if name.rsplit(".", 1)[-1] not in known]
    slips = [name for name in missing if name.rsplit(".", 1)[-1] not in _ANYWHERE]
    if slips or len(missing) == len(names):
        wrong = (slips or missing)[0]
        raise InputError(
            f"the adapter's target was given as {wrong!r}, which no layer of a {kind} model is "
            f"called{like(wrong, known)}; give of {', '.join(known)}, or {_ALL_LINEAR}"
        )
    if not missing:
        return ()
    return (f"No layer of a {kind} model is called {' or '.join(missing)}: PEFT puts the adapter on the others alone.",)
