"""diffusers' transformers and U-Nets, small, each with what a pipeline would call it with."""

from __future__ import annotations

import torch
from torch import nn

ROWS, SIDE, TEXT = 2, 8, 6
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_UNET = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 2, "norm_num_groups": 8,
    "attention_head_dim": 8,
}  # fmt: skip
_CROSS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32}


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(sum(shape) + 3))


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(ROWS, *shape, dtype=torch.long)


def _time() -> torch.Tensor:
    return torch.tensor([1.0, 3.0])


def _packed(channels: int, text: int, **more: object) -> dict[str, object]:
    """Latents as a sequence of patches, beside a text."""
    return {
        "hidden_states": _floats(16, channels),
        "encoder_hidden_states": _floats(TEXT, text),
        "timestep": _time(),
        **more,
    }


def _latent(*shape: int, width: int = 32, **more: object) -> dict[str, object]:
    return {
        "hidden_states": _floats(*shape),
        "encoder_hidden_states": _floats(TEXT, width),
        "timestep": _time(),
        **more,
    }


def _steps() -> torch.Tensor:
    return torch.tensor([1, 3])


_TYPES: dict[str, tuple[dict[str, object], object]] = {
    "AuraFlowTransformer2DModel": (
        {
            **_HEADS,
            "sample_size": SIDE,
            "num_mmdit_layers": 3,
            "num_single_dit_layers": 3,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        lambda: _latent(4, SIDE, SIDE),
    ),
    "ChromaTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 8,
            "num_layers": 3,
            "num_single_layers": 3,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        lambda: _packed(8, 32, img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(TEXT, 3)),
    ),
    "CogVideoXTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 32,
            "num_layers": 3,
            "sample_width": SIDE,
            "sample_height": SIDE,
            "sample_frames": 9,
            "max_text_seq_length": TEXT,
        },
        lambda: _latent(3, 4, SIDE, SIDE, timestep=_steps()),
    ),
    "CogView4Transformer2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "text_embed_dim": 32,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "sample_size": SIDE,
            "pos_embed_max_size": SIDE,
            "rope_axes_dim": (8, 8),
        },
        lambda: _latent(4, SIDE, SIDE, original_size=_floats(2), target_size=_floats(2), crop_coords=_floats(2)),
    ),
    "ControlNetModel": (
        {
            **{name: value for name, value in _UNET.items() if name != "sample_size"},
            **_CROSS,
            "conditioning_embedding_out_channels": (16, 32),
        },
        lambda: {
            "sample": _floats(4, SIDE, SIDE),
            "timestep": _steps(),
            "encoder_hidden_states": _floats(TEXT, 32),
            "controlnet_cond": _floats(3, 2 * SIDE, 2 * SIDE),
        },
    ),
    "DiTTransformer2DModel": (
        {**_HEADS, "num_layers": 3, "sample_size": SIDE, "num_embeds_ada_norm": 10},
        lambda: {"hidden_states": _floats(4, SIDE, SIDE), "timestep": _steps(), "class_labels": _steps()},
    ),
    "Flux2Transformer2DModel": (
        {
            **_HEADS,
            "in_channels": 8,
            "num_layers": 3,
            "num_single_layers": 3,
            "joint_attention_dim": 32,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: _packed(8, 32, img_ids=torch.zeros(16, 4), txt_ids=torch.zeros(TEXT, 4), guidance=_time()),
    ),
    "FluxTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 8,
            "num_layers": 3,
            "num_single_layers": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
            "guidance_embeds": True,
        },
        lambda: _packed(
            8,
            32,
            pooled_projections=_floats(32),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(TEXT, 3),
            guidance=_time(),
        ),
    ),
    "HunyuanDiT2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": SIDE,
            "hidden_size": 32,
            "num_layers": 4,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 16,
            "text_len": TEXT,
            "text_len_t5": TEXT,
            "use_style_cond_and_image_meta_size": False,
        },
        lambda: _latent(
            4,
            SIDE,
            SIDE,
            text_embedding_mask=_ones(TEXT),
            encoder_hidden_states_t5=_floats(TEXT, 32),
            text_embedding_mask_t5=_ones(TEXT),
            image_rotary_emb=(torch.ones(16, 16), torch.zeros(16, 16)),
        ),
    ),
    "HunyuanImageTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_single_layers": 3,
            "text_embed_dim": 32,
            "num_refiner_layers": 1,
            "rope_axes_dim": (8, 8),
        },
        lambda: _latent(4, SIDE, SIDE, encoder_attention_mask=_ones(TEXT)),
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_single_layers": 3,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda: _latent(
            4,
            2,
            SIDE,
            SIDE,
            encoder_attention_mask=_ones(TEXT),
            pooled_projections=_floats(16),
            guidance=_time(),
            timestep=_steps(),
        ),
    ),
    "LTXVideoTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 32,
            "num_layers": 3,
            "caption_channels": 32,
        },
        lambda: _packed(8, 32, encoder_attention_mask=_ones(TEXT), num_frames=1, height=4, width=4, timestep=_steps()),
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": SIDE,
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 32,
        },
        lambda: _latent(4, SIDE, SIDE, encoder_attention_mask=_ones(TEXT)),
    ),
    "MochiTransformer3DModel": (
        {
            **_HEADS,
            "num_layers": 3,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 8,
            "max_sequence_length": TEXT,
        },
        lambda: _latent(4, 2, SIDE, SIDE, encoder_attention_mask=_ones(TEXT)),
    ),
    "PixArtTransformer2DModel": (
        {
            **_HEADS,
            "num_layers": 3,
            "cross_attention_dim": 32,
            "sample_size": SIDE,
            "caption_channels": 32,
            "use_additional_conditions": False,
        },
        lambda: _latent(4, SIDE, SIDE, added_cond_kwargs={"resolution": None, "aspect_ratio": None}, timestep=_steps()),
    ),
    "QwenImageTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: _packed(16, 32, encoder_hidden_states_mask=_ones(TEXT), img_shapes=[[(1, 4, 4)]] * ROWS),
    ),
    "SD3Transformer2DModel": (
        {
            **_HEADS,
            "sample_size": SIDE,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": SIDE,
        },
        lambda: _latent(4, SIDE, SIDE, pooled_projections=_floats(32)),
    ),
    "SanaTransformer2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "sample_size": SIDE,
        },
        lambda: _latent(4, SIDE, SIDE),
    ),
    "UNet2DConditionModel": (
        {**_UNET, **_CROSS, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        lambda: {"sample": _floats(4, 16, 16), "timestep": _steps(), "encoder_hidden_states": _floats(TEXT, 32)},
    ),
    "UNet2DModel": (
        {
            **_UNET,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        lambda: {"sample": _floats(3, 16, 16), "timestep": _steps()},
    ),
    "WanTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 16,
            "ffn_dim": 48,
            "num_layers": 4,
            "rope_max_seq_len": 32,
        },
        lambda: _latent(4, 2, SIDE, SIDE, timestep=_steps()),
    ),
    "ZImageTransformer2DModel": (
        {
            "in_channels": 4,
            "dim": 48,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 32,
            "axes_dims": [4, 4, 4],
            "axes_lens": [128, 64, 64],
        },
        lambda: {
            "x": [x.unsqueeze(1) for x in _floats(4, SIDE, SIDE)],
            "t": _time(),
            "cap_feats": list(_floats(TEXT, 32)),
        },
    ),
}
NAMES = tuple(_TYPES)


def settings_of(name: str) -> dict[str, object]:
    return dict(_TYPES[name][0])


def batch_of(name: str) -> dict[str, object]:
    return _TYPES[name][1]()


def make(name: str) -> tuple[nn.Module, dict[str, object]]:
    """Return a small model of a class of diffusers without an adapter, and a micro-batch."""
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, name)(**settings_of(name)), batch_of(name)
