"""Every causal model type of transformers, built small from its configuration, with an adapter."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
ROWS, LENGTH, VOCABULARY, LAYERS = 2, 12, 112, 4

_WIDTH, _HEADS = 64, 4
_FIELDS: tuple[tuple[int, str], ...] = (
    (
        _WIDTH,
        "hidden_size n_embd d_model embedding_size embed_dim word_embed_proj_dim attention_hidden_size "
        "lru_width dim embedding_dim width",
    ),
    (
        96,
        "intermediate_size ffn_dim d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim n_inner "
        "mlp_hidden_size dense_intermediate_size intermediate_size_mlp shared_expert_intermediate_size "
        "block_ff_dim",
    ),
    (
        48,
        "moe_intermediate_size shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size",
    ),
    (
        _HEADS,
        "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads "
        "num_local_experts num_experts n_routed_experts moe_num_experts mamba_n_heads swa_num_attention_heads "
        "linear_num_value_heads num_experts_per_layer",
    ),
    (
        2,
        "num_key_value_heads num_experts_per_tok moe_k moe_topk top_k_experts swa_num_key_value_heads "
        "linear_num_key_heads num_kv_heads moe_top_k attention_chunk_size_heads",
    ),
    (
        16,
        "head_dim q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels "
        "mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim swa_head_dim global_head_dim "
        "swa_v_head_dim hidden_size_per_layer_input index_head_dim mamba_d_state ssm_state_size state_size "
        "qk_head_dim d_kv",
    ),
    (LAYERS, "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input text_vocab_size"),
    (64, "max_position_embeddings n_positions max_sequence_length max_seq_len seq_length n_ctx"),
    (
        1,
        "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace mamba_n_groups n_groups "
        "num_nextn_predict_layers moe_layer_start_index",
    ),
    (0, "num_kv_shared_layers"),
)
_HEAD_FIELDS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def shrink(config, layers: int = LAYERS) -> None:
    """Make a configuration small, whatever its fields are called."""
    heads = next((getattr(config, n, None) for n in _HEAD_FIELDS if isinstance(getattr(config, n, None), int)), 0)
    grouped = getattr(config, "num_key_value_heads", None) not in (None, heads)
    for value, names in _FIELDS:
        for name in names.split():
            if isinstance(getattr(config, name, None), int) and not isinstance(getattr(config, name), bool):
                small = layers if value == LAYERS and name.endswith(("layers", "layer")) else value
                if name == "num_key_value_heads" and not grouped:
                    small = _HEADS
                _put(config, name, small)
    for name, value in list(vars(config).items()):
        if name in _SPECIAL and value is not None:
            _put(config, name, _SPECIAL.index(name) % 3)
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value, layers)
        elif isinstance(value, (list, tuple)) and len(value) > layers and all(isinstance(v, (str, int)) for v in value):
            _put(config, name, _spread(value, layers))


def _put(config, name, value) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError, ValueError):
        pass


def _spread(values, count):
    """As many of them, every kind among them."""
    kinds = list(dict.fromkeys(values))[:count]
    chosen = list(values[: count - len(kinds)]) + kinds if len(kinds) > 1 else list(values[:count])
    return type(values)(chosen)


def config_of(kind: str, layers: int = LAYERS):
    """Return a small configuration of a type, without dropout."""
    config = CONFIG_MAPPING[kind]()
    shrink(config, layers)
    for name in (
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "hidden_dropout",
        "dropout_rate",
        "layerdrop",
        "residual_dropout",
    ):
        if hasattr(config, name):
            _put(config, name, 0.0)
    for name, value in OVERRIDES.get(kind, {}).items():
        _put(config, name, value)
    config.is_decoder = True if hasattr(config, "is_decoder") else None
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


def make(kind: str, layers: int = LAYERS) -> nn.Module:
    """Return a small model of a type with a LoRA adapter whose B is not zero, in training mode."""
    config = config_of(kind, layers)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    total = sum(p.numel() for p in base.parameters())
    if total > 30_000_000:
        raise RuntimeError(f"still {total / 1e6:.0f} million parameters")
    with torch.no_grad():  # some are built with weights that are never set: they come with a checkpoint
        for tensor in (*base.parameters(), *base.buffers()):
            if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
                tensor.copy_(torch.randn(tensor.shape) * 0.02)
    with warnings.catch_warnings(action="ignore"):
        targets = [name for name, module in base.named_modules() if _adaptable(name, module)]
        lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets)
        return get_peft_model(base, lora).train()


def _adaptable(name: str, module: nn.Module) -> bool:
    plain = type(module).__name__ == "Conv1D" or isinstance(module, nn.Linear)
    # PEFT refuses a mamba's out_proj, which its kernels read without calling it.
    left = ("head", "router", "gate", "embed_out", "score", "cls", "out_proj", "conv1d")
    return plain and ".experts" not in name and not name.endswith(left)


_MAMBA = CONFIG_MAPPING["zamba2"]().layers_block_type[0]
"""Its name changes with transformers' version."""

OVERRIDES: dict[str, dict[str, object]] = {
    "bamba": {"mamba_n_heads": 8},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 4, "head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1},
    "zamba2": {
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "mamba_d_state": 16,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": [_MAMBA, "hybrid", _MAMBA, "hybrid"],
        "hybrid_layer_ids": [1, 3],
    },
}


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(4, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}
