"""TRL's trainers under ``memplan run``: real text on disk, losses and adapters byte for byte."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers.test_run import adapter, checkpoint, clean, exact, hardware

SCRIPT = Path(__file__).with_name("script_trl.py")
TEXT = (Path(__file__).parents[2] / "docs" / "design.md").read_text()

__all__ = ["checkpoint", "hardware"]


@pytest.fixture(scope="module")
def base(checkpoint):
    """The checkpoint with a tokenizer that was trained on our own text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words.train_from_iterator([TEXT], trainers.WordLevelTrainer(vocab_size=96, special_tokens=special))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [line for line in TEXT.splitlines() if len(line) > 40][:24]
    text = [json.dumps({"text": line}) for line in lines]
    pairs = [
        json.dumps({"prompt": one[:30], "chosen": one[30:], "rejected": other[30:]})
        for one, other in zip(lines, reversed(lines), strict=True)
    ]
    (folder / "text.jsonl").write_text("\n".join(text))
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    return folder


LONG = [pytest.param(kind, marks=pytest.mark.full) for kind in ("packed", "reward")]


@pytest.mark.parametrize("kind", ["sft", "dpo", *LONG])
def test_the_same_as_without(base, data, hardware, tmp_path, kind):
    def script(out, *before):
        command = [*before, sys.executable, SCRIPT, base, data, out, kind]
        return subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=250, check=False)

    alone = script(tmp_path / "whole")
    assert alone.returncode == 0, alone.stderr[-3000:]

    def under(vram, out):
        run = [sys.executable, "-m", "memplan", "run", "--vram", vram, "--ram", "64MiB", "--hardware", hardware, "--"]
        return script(out, *run)

    least = re.search(r"vram \((\d+) bytes\)", under("10KiB", tmp_path / "none").stderr)
    done = under(f"{int(least[1]) + 100_000}B", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-4000:]
    assert exact(done) == exact(alone)
    assert len(exact(done)) == 8
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    assert "streamed from" in done.stderr
    assert "stands aside" not in done.stderr
