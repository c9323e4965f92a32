"""Models of the comparison: their shapes, their checkpoints of random weights, their batches.

A checkpoint is made a layer at a time and written as a shard of its own, so that a large model is never whole in RAM.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memplan.model import models as known_models

RANK = 16
STD = 0.02
_LAYER = re.compile(r"^(.*?\.\d+)\.")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FLUX = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model by its shapes."""

    name: str
    config: Mapping[str, Any]
    """transformers' settings with ``model_type``; of ``flux``: diffusers'."""
    dtype: str = "float32"
    nf4: bool = False

    @property
    def adapter(self) -> dict[str, Any]:
        """LoRA on all linear layers; of a mixture on those of attention, since PEFT would merge fused experts whole."""
        of_attention = [f"{name}_proj" for name in "qkvo"]
        return {"rank": RANK, "targets": of_attention if self.config["model_type"] == "mixtral" else "all-linear"}

    @property
    def is_flux(self) -> bool:
        return self.config["model_type"] == "flux"


def known(name: str, dtype: str = "bfloat16", *, nf4: bool = False, **changed: Any) -> Model:
    """Return a model of ``memplan/models.json``, or ``flux``; ``changed``: settings in place of its own, told in its
    name.
    """
    if name == "flux":
        config: dict[str, Any] = {"model_type": "flux", **FLUX}
    else:
        found = known_models.find(name)
        assert found is not None, name
        config = dict(found[1].config)
    short = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    more = "".join(f"-{value}-layers" for key, value in changed.items() if key.endswith("layers"))
    return Model(name=f"{name}{more}-{'nf4' if nf4 else short}", config={**config, **changed}, dtype=dtype, nf4=nf4)


def small(kind: str, *, width: int = 384, layers: int = 10) -> Model:
    """Return a Llama, a Mixtral of four experts or a T5, small enough for two CPUs."""
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 128)}
    stack = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": layers}
    common = {**stack, **heads, "vocab_size": 4096, "max_position_embeddings": 1024, "tie_word_embeddings": False}
    config: dict[str, Any] = {"model_type": kind, **common, **_TOKENS}
    if kind == "mixtral":
        config |= {"intermediate_size": width, "num_local_experts": 4, "num_experts_per_tok": 2}
    if kind == "t5":
        config = {
            "model_type": "t5", "d_model": width, "d_kv": 64, "d_ff": width * 11 // 4, "num_layers": layers // 2,
            "num_decoder_layers": layers // 2, "num_heads": width // 64, "vocab_size": 4096, "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        }  # fmt: skip
    return Model(name=f"{kind}-{width}x{layers}", config=config)


# ---- checkpoints
# -------------------------------------------------------------------------------------------------------


def write_checkpoint(model: Model, folder: Path, device: torch.device) -> int:
    """Write config and shards of random weights to ``folder``; return the shards' bytes.

    Values depend on a tensor's name alone. ``device``: where they are drawn (and quantized). Raises OSError where the
    disk has no room for them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    skeleton, config = _skeleton(model)
    size_bytes = sum(p.numel() * p.element_size() for p in skeleton.parameters()) // (3 if model.nf4 else 1)
    free = shutil.disk_usage(folder).free
    if free < size_bytes * 1.05:
        raise OSError(f"the checkpoint of {model.name} needs {size_bytes:,} bytes in {folder}, which has {free:,} free")
    quantized = _linear_weights(skeleton) if model.nf4 else set()
    weight_map: dict[str, str] = {}
    prefix = "diffusion_pytorch_model" if model.is_flux else "model"
    for index, names in enumerate(_shards(skeleton)):
        shard = f"{prefix}-{index:05d}.safetensors"
        _write_shard(folder / shard, skeleton, names, quantized, device, weight_map)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index_file = folder / f"{prefix}.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    config(folder)
    return total


def _skeleton(model: Model) -> tuple[nn.Module, Callable[[Path], Any]]:
    """Return the model on ``meta``, and what writes its configuration."""
    if model.is_flux:
        from diffusers import FluxTransformer2DModel

        with torch.device("meta"):
            flux = FluxTransformer2DModel(**{k: v for k, v in model.config.items() if k != "model_type"})
        return flux.to(getattr(torch, model.dtype)), flux.save_config
    from transformers import AutoConfig

    from memplan.model.meta_model import from_configuration

    settings = dict(model.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, use_cache=False, dtype=model.dtype)
    made: Any = from_configuration(config, model.dtype, None).model
    config.architectures = [type(made).__name__]
    if model.nf4:
        config.quantization_config = nf4_settings(model.dtype).to_dict()
    return made, config.save_pretrained


def nf4_settings(dtype: str) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )


def _shards(skeleton: nn.Module) -> Iterator[list[str]]:
    """Yield the names of each layer's weights, then those of the rest."""
    groups: dict[str, list[str]] = {}
    for name, _ in skeleton.named_parameters():
        found = _LAYER.match(name)
        groups.setdefault(found[1] if found else "", []).append(name)
    rest = groups.pop("", [])
    yield from groups.values()
    yield rest


def _linear_weights(skeleton: nn.Module) -> set[str]:
    """Return the names of what bitsandbytes quantizes: all linear layers but the head."""
    return {f"{name}.weight" for name, m in skeleton.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def _write_shard(
    path: Path,
    skeleton: nn.Module,
    names: list[str],
    quantized: set[str],
    device: torch.device,
    weight_map: dict[str, str],
) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        made = random_values(name, skeleton.get_parameter(name), device)
        if name in quantized:
            import bitsandbytes

            kind = {"quant_type": "nf4", "compress_statistics": False}
            weight = bitsandbytes.nn.Params4bit(made, requires_grad=False, **kind).to(device)
            tensors[name] = weight.data.cpu()
            state = weight.quant_state.as_dict(packed=True)
            tensors |= {f"{name}.{key}": value.cpu().contiguous() for key, value in state.items()}
        else:
            tensors[name] = made.cpu()
    save_file(tensors, path, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(tensors, path.name))


def random_values(name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values of a weight by its name: ones of a norm's scale, zeros of a bias, else normal ones."""
    made = torch.empty(like.shape, dtype=like.dtype, device=device)
    if like.ndim < 2:
        return made.fill_(1.0 if name.endswith("weight") else 0.0)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return made.normal_(0, STD, generator=generator)


# ---- batches
# -----------------------------------------------------------------------------------------------------------


def batch_of(model: Model, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return one micro-batch of (rows, tokens of a row) on the CPU: the same whenever it is asked for.

    Of Flux: rows of images of 1024 x 1024 (4,096 tokens) and 512 tokens of text.
    """
    generator = torch.Generator().manual_seed(2)
    if model.is_flux:
        rows, dtype = shape[0], getattr(torch, model.dtype)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        width, pooled = model.config["joint_attention_dim"], model.config["pooled_projection_dim"]
        return {
            "hidden_states": normal(rows, shape[1], model.config["in_channels"]),
            "encoder_hidden_states": normal(rows, shape[1] // 8, width),
            "pooled_projections": normal(rows, pooled),
            "timestep": torch.full((rows,), 0.5, dtype=dtype),
            "guidance": torch.ones(rows, dtype=dtype),
            "img_ids": torch.zeros(shape[1], 3, dtype=dtype),
            "txt_ids": torch.zeros(shape[1] // 8, 3, dtype=dtype),
        }
    ids = torch.randint(3, model.config["vocab_size"], shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def loss_of(output: Any) -> torch.Tensor:
    """Return the loss of what a model gave: its own, or of Flux the mean square."""
    loss: torch.Tensor | None = getattr(output, "loss", None)
    return output[0].float().pow(2).mean() if loss is None else loss
