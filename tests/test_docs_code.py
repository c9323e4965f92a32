"""The code of the documents runs: each page from top to bottom, with a small model in place of the large one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

import memplan
from memplan.cli import main
from tests.support import pages
from tests.support.pages import ROOT, blocks
from tests.support.training import CPU
from tests.trainers.small import align, save_small_llama, save_small_qwen, save_texts, save_tokenizer

DOCS = ROOT / "docs"
HOWTO = sorted((DOCS / "howto").glob("*.md"))
MARKED = [page for page in sorted(DOCS.glob("stages/*.md")) if "<!-- run -->" in page.read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_small_llama(folder)
    save_tokenizer(folder)
    align(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a reader has: a script that trains, and a plan and a record of a run under it."""
    (tmp_path / "cpu.json").write_bytes(msgspec.json.encode(CPU))
    save_texts(tmp_path)
    script = (ROOT / "examples" / "transformers_trainer.py").read_text(encoding="utf-8")
    given = ["train.py", str(model), "text.jsonl", "out", "--steps", "2"]
    (tmp_path / "train.py").write_text(
        script.replace("    main()", f"    import sys\n\n    sys.argv = {given}\n    main()")
    )
    loaded = AutoModelForCausalLM.from_pretrained(model).requires_grad_(False)
    loaded.lm_head.requires_grad_(True)
    batch = {"input_ids": torch.ones(1, 8, dtype=torch.long), "labels": torch.ones(1, 8, dtype=torch.long)}
    plan = memplan.plan(loaded, batch, vram="8MiB", ram="1GiB", hardware=CPU)
    plan.save(tmp_path / "plan.json")
    with memplan.attach(loaded, plan) as handle:
        loaded(**batch).loss.backward()
        handle.record.save(tmp_path / "record.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def swaps_of(model: Path, folder: Path) -> dict[str, str]:
    """Small names and sizes; plans are for the cards that a page names, runs for this machine."""
    here = f'hardware="{folder / "cpu.json"}"'
    small = f"memplan run --vram 2900KiB --ram 1GiB --hardware {folder}/cpu.json"
    return {
        "memplan run --vram 8GiB --ram 24GiB": small,
        "memplan run --vram 10GiB --ram 24GiB": small,
        'vram="10GiB"': f'vram="4MiB", {here}',
        'vram="8GiB"': f'vram="4MiB", {here}',
        'vram="13GiB"': f'vram="4MiB", {here}',
        "vram='8GiB'": f"vram='4MiB', {here}",
        "--seq 2048": "--seq 48",
        "--seq 512": "--seq 48",
        "llama-3.1-8b": str(model),
        "path/to/model": str(model),
    }


def ran(page: Path, folder: Path, swaps: Mapping[str, str]) -> list[pages.Ran]:
    return pages.run(page, folder, swaps, inside=main, HF_DATASETS_CACHE=str(folder / "cache"))


def test_readme(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(ran(ROOT / "README.md", folder, swaps_of(model, folder))) == 4
    assert "Fits" in capsys.readouterr().out
    assert "measured" in (folder / "report.txt").read_text()
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.mark.full
@pytest.mark.parametrize("page", HOWTO, ids=lambda page: page.stem)
def test_howto(page: Path, model: Path, folder: Path) -> None:
    assert ran(page, folder, swaps_of(model, folder))


@pytest.mark.full
@pytest.mark.parametrize("page", MARKED, ids=lambda page: page.stem)
def test_stages(page: Path, tmp_path: Path) -> None:
    assert pages.run(page, tmp_path, {})


@pytest.mark.full
def test_tutorial(tmp_path: Path) -> None:
    """With its own words, but for the model's name and the sizes: from data to a merged model, as without memplan."""
    small, folder, alone = tmp_path / "qwen", tmp_path / "as told", tmp_path / "alone"
    for made in (small, folder, alone):
        made.mkdir()
    save_small_qwen(small)
    (folder / "cpu.json").write_bytes(msgspec.json.encode(CPU))
    swaps = pages.tutorial_swaps(small, folder)
    told = pages.run(DOCS / "tutorial.md", folder, swaps, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    by_command = {one.command.split(" --")[0]: one.output for one in told}
    assert "Fits" in by_command["memplan plan " + str(small)]
    assert "streamed" in by_command["memplan run"]
    assert "measured" in by_command["cat report.txt"]
    shutil.copy(folder / "data.jsonl", alone)
    shutil.copy(folder / "train.py", alone)
    page = tmp_path / "alone.md"
    page.write_text("```console\n$ python train.py\n```\n")
    pages.run(page, alone, {}, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    names = ("adapter_model.safetensors",)
    assert [(folder / "adapter" / name).read_bytes() for name in names] == [
        (alone / "adapter" / name).read_bytes() for name in names
    ]
    base, merged = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (small, folder / "merged"))
    assert any(not torch.equal(base[name], merged[name]) for name in base)
    assert json.loads((folder / "merged" / "config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "tutorial.md", *HOWTO], ids=lambda page: page.stem)
def test_each_block_says_how_it_runs(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("python", "console", "bash", "toml", "text"), block.text
        assert block.mark or block.language != "python", block.text
        assert not block.mark.startswith("with: ") or block.mark.removeprefix("with: ") in pages.BEFORE


@pytest.mark.full
def test_notebook(tmp_path: Path) -> None:
    """Its cells in order, on the CPU: the last asserts that both runs are the same."""
    cells = json.loads((ROOT / "examples" / "free_t4.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells), "clear the outputs"
    page = tmp_path / "notebook.md"
    code = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code")
    page.write_text(f"<!-- run -->\n```python\n{code}```\n", encoding="utf-8")
    (done,) = pages.run(page, tmp_path, {}, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    assert "bit-identical, with " in done.output
