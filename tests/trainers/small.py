"""Small models and texts on disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TEXT = (Path(__file__).parents[2] / "docs" / "design.md").read_text()


def save_small_llama(folder: Path) -> list[Path]:
    """Save one in a folder, and return its shards."""
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64, dtype="float32", use_cache=False, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="400KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    return shards


def save_small_qwen(folder: Path) -> None:
    """Save one of the tutorial's kind, with its tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(5)
    config = Qwen3Config(
        hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=96, max_position_embeddings=64, dtype="bfloat16", tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder, max_shard_size="400KB")
    save_tokenizer(folder)
    align(folder)


def save_small_t5(folder: Path) -> None:
    """Save an encoder-decoder in a folder."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(5)
    config = T5Config(
        d_model=64, d_ff=192, d_kv=16, num_heads=4, num_layers=4, num_decoder_layers=4, vocab_size=96, dtype="float32",
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder, max_shard_size="400KB")


def save_small_unet(folder: Path) -> None:
    """Save a UNet as the part of a pipeline that it is."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(5)
    UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=32, attention_head_dim=8,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(folder / "unet")  # fmt: skip


def save_small_dit(folder: Path) -> None:
    """Save a diffusion transformer in several shards."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(5)
    SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=16,
        pos_embed_max_size=16,
    ).save_pretrained(folder / "transformer", max_shard_size="1MB")  # fmt: skip
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2


def align(folder: Path) -> None:
    """Have each file's tensors lie at multiples of 64 bytes, as they do in RAM: alignment changes bits."""
    for shard in folder.rglob("*.safetensors"):
        raw = shard.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        padded = -(-(size + 8) // 64) * 64 - 8
        shard.write_bytes(struct.pack("<Q", padded) + raw[8 : 8 + size].ljust(padded) + raw[8 + size :])


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of 96 words that was trained on our own text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words.train_from_iterator([TEXT], trainers.WordLevelTrainer(vocab_size=96, special_tokens=special))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_texts(folder: Path) -> None:
    """Save ``text.jsonl`` and ``pairs.jsonl``, of our own text."""
    lines = [line for line in TEXT.splitlines() if len(line) > 40][:24]
    pairs = [
        {"prompt": one[:30], "chosen": one[30:], "rejected": other[30:]}
        for one, other in zip(lines, reversed(lines), strict=True)
    ]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
