"""A small model of random weights and some lines of data, for examples that are started without arguments."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def small(kind: str, *columns: str) -> tuple[str, str, str, str]:
    """Return the folder of a model, a file of rows, a folder for what is trained, and a budget of vram.

    ``kind``: ``llama``, ``t5`` or ``unet``.
    ``columns``: of each row, of ``text``, ``prompt``, ``chosen`` and ``rejected``.
    """
    folder = Path(tempfile.mkdtemp(prefix="memplan-example-"))
    told = []
    for a, b in itertools.product(range(8), range(8)):
        text, prompt = f"{a} and {b} are {a + b}", f"{a} and {b} are"
        told.append({"text": text, "prompt": prompt, "chosen": f" {a + b}", "rejected": f" {a * b}"})
    rows = [{column: row[column] for column in columns} for row in told]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    torch.manual_seed(0)
    _save_model(kind, folder / "model")
    if kind != "unet":
        _save_tokenizer([row["text"] for row in told], folder / "model")
    return str(folder / "model"), str(folder / "rows.jsonl"), str(folder / "out"), "auto"


def _save_model(kind: str, folder: Path) -> None:
    if kind == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8, vocab_size=96,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, dtype="float32",
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    elif kind == "t5":
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            d_model=128, d_ff=512, d_kv=32, num_heads=4, num_layers=4, num_decoder_layers=4, vocab_size=96,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, tie_word_embeddings=False, dtype="float32",
        )  # fmt: skip
        T5ForConditionalGeneration(config).save_pretrained(folder)
    else:
        from diffusers import UNet2DConditionModel

        UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=32,
            attention_head_dim=8, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).save_pretrained(folder / "unet")  # fmt: skip


def _save_tokenizer(texts: list[str], folder: Path) -> None:
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=96, special_tokens=special))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
