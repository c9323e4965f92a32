"""Rows of ``rows.csv`` as trainings that can be planned: what a row's own source says of its settings."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROWS = Path(__file__).with_name("rows.csv")
KLEIN_TARGETS = 11
PEFT_TOKENS = 648
"""Tokens of a sample in the batch that PEFT's 99th percentile is of, which nobody publishes (dynamic padding, at most
768): as much as its row LoRA rank 32 comes to, which is therefore not counted. The other rows are held to it."""
PEFT_ANCHOR = "lora--llama-3.2-3B-rank32.json"
SCORER_BYTES = 86_580_480 * 4 + 14 * 512 * 7680 * 2
"""What PEFT's image script keeps on the card besides (method_comparison/image-gen/run.py and its default settings):
DINOv2-base in float32, and the embeddings of 14 prompts."""
BEFORE_1270 = (
    "bitsandbytes before its pull request 1270 (July 2024) keeps the input of each 4-bit product, from one micro-batch "
    "to the next, which is counted as long as the longest"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row that has its settings."""

    row: int
    source: str
    name: str
    model: Any = ""
    """Of memplan's table, or what makes the module."""
    adapter: Callable[[], Any] | None = None
    trainable: int = 0
    """As published; 0 where it is not."""
    shape: Any = ()
    timed_shape: Any = ()
    """Where the time is of another one: of a mean batch."""
    quantization: str = ""
    kbit: bool = False
    keeps_inputs: bool = False
    """Of bitsandbytes' 4-bit products: see :data:`BEFORE_1270`."""
    checkpointing: bool = False
    optimizer: str = "adamw"
    head_tokens: int = 0
    """For how many tokens at a time there are logits; 0 for all at once."""
    shifts_logits: bool = False
    """Whether the loss copies them, as transformers' did until December 2024."""
    adapter_dtype: str = ""
    """Where it is not float32, as PEFT makes it."""
    measure: str = "reserved"
    """``allocated`` where that is what its program prints."""
    besides_bytes: int = 0
    before_bytes: int = 0
    """Of the micro-batch before, what is still there in a forward."""
    card: str = ""
    published_bytes: float = 0.0
    published_s: float = 0.0
    tokens: int = 0
    """Of a step, where the row gives its tokens a second."""
    stock: bool = True
    """Whether the model's code is transformers' or diffusers', or what was measured itself is what is planned."""
    causes: tuple[str, ...] = field(default=())


def rows() -> list[dict[str, str]]:
    """Return the published rows."""
    with ROWS.open(newline="") as file:
        return list(csv.DictReader(file))


def runs() -> tuple[list[Run], dict[int, str]]:
    """Return what can be planned, and why the other rows cannot."""
    found, left_out = [], {}
    for number, row in enumerate(rows()):
        made = _of(number, row)
        if isinstance(made, str):
            left_out[number] = made
        else:
            found.append(made)
    return found, left_out


def _of(number: int, row: dict[str, str]) -> Run | str:
    source = row["source"]
    if "MetaMathQA" in source:
        return _of_peft(number, row)
    if "image-gen" in source:
        return _of_klein(number, row)
    if "litgpt" in source:
        return _of_litgpt(number, row)
    if "fsdp_qlora" in source:
        return _of_fsdp_qlora(number, row)
    if "torchtune" in source:
        return _of_torchtune(number, row)
    if "axolotl" in source:
        return _of_axolotl(number, row)
    if row["method"] == "PEFT QLoRA":
        return Run(
            row=number, source="streamft", name=f"{row['model']} PEFT QLoRA", model="qwen2.5-3b", shape=(1, 512),
            adapter=lambda: {"rank": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}, quantization="nf4",
            kbit=True, checkpointing=True, published_bytes=float(row["peak_gb"]) * 1e9,
            card="rtx-3050-8gb", causes=("a laptop's card under Windows; GB of its README, +-30% between runs",),
        )  # fmt: skip
    if "INCOMPLETE" in row["notes"] or "not stated" in row["batch"] + row["seq"]:
        return "settings are missing"
    return "streams its weights: not whole on the card"


def _of_peft(number: int, row: dict[str, str]) -> Run | str:
    name = row["source"].rsplit("/", 1)[-1]
    kind = row["method"].split()[0]
    if kind in ("FULL", "OSF"):
        return "all of the model's weights are trained: there is nothing frozen to plan"
    if kind in ("BOFT", "FROD", "SHIRA"):
        return "its adapter is made of the weights' values: it cannot be planned by name"
    if name == PEFT_ANCHOR:
        return "the length of the longest batch was taken from it"
    notes = row["notes"]
    mean = float(row["tokens_per_s"]) * float(row["s_per_step"]) / 4
    return Run(
        row=number, source="PEFT, Llama 3.2 3B", name=name.removesuffix(".json").replace("llama-3.2-3B-", ""),
        model="llama-3.2-3b", adapter=lambda: _peft_config(kind, name, row, klein=False),
        trainable=_number(r"trainable ([\d,]+)", notes), shape=(4, PEFT_TOKENS), timed_shape=(4, round(mean)),
        card="l40s", published_bytes=_decimal(r"p99 of steps ([\d.]+)", notes) * 2**30,
        published_s=float(row["s_per_step"]), tokens=round(4 * mean),
    )  # fmt: skip


def _of_klein(number: int, row: dict[str, str]) -> Run | str:
    name = row["source"].rsplit("/", 1)[-1]
    kind = row["method"].split()[0]
    if kind == "FULL":
        return "all of the model's weights are trained: there is nothing frozen to plan"
    if kind == "BOFT":
        return "its adapter is made of the weights' values: it cannot be planned by name"
    return Run(
        row=number, source="PEFT, FLUX.2 klein 4B", name=name.removesuffix(".json").replace("flux2-klein-", ""),
        model="flux.2-klein-base-4b", adapter=lambda: _peft_config(kind, name, row, klein=True),
        trainable=_number(r"trainable ([\d,]+)", row["notes"]), checkpointing=True, besides_bytes=SCORER_BYTES,
        shape={"batch": 2, "height": 512, "width": 512, "seq": 512}, card="l40s",
        published_bytes=float(row["peak_gb"]) * 2**30, published_s=float(row["s_per_step"]),
    )  # fmt: skip


def _peft_config(kind: str, name: str, row: dict[str, str], *, klein: bool) -> Any:
    """Return PEFT's configuration of a row: its own defaults but for what the experiment's adapter_config.json says."""
    import peft

    rank = {"r": int(row["rank"])} if row["rank"].isdigit() else {}
    names = {
        "ADALORA": "AdaLoraConfig", "BEFT": "BeftConfig", "C3A": "C3AConfig", "DEFT": "DeftConfig",
        "FOURIERFT": "FourierFTConfig", "GLORA": "GloraConfig", "GRALORA": "GraloraConfig", "HRA": "HRAConfig",
        "IA3": "IA3Config", "LILY": "LilyConfig", "LOHA": "LoHaConfig", "LOKR": "LoKrConfig", "LORA": "LoraConfig",
        "MISS": "MissConfig", "PSOFT": "PsoftConfig", "PVERA": "PveraConfig", "RANDLORA": "RandLoraConfig",
        "ROAD": "RoadConfig", "TINYLORA": "TinyLoraConfig", "TRAINABLE_TOKENS": "TrainableTokensConfig",
        "VBLORA": "VBLoRAConfig", "VERA": "VeraConfig", "WAVEFT": "WaveFTConfig",
    }  # fmt: skip
    more: dict[str, Any] = {
        "ADALORA": {"init_r": 64, "target_r": 32, "total_step": 5000, "tinit": 200, "tfinal": 500},
        "C3A": {"block_size": 256 if klein else 64},
        "DEFT": {"para": "para" in name},
        "FOURIERFT": {"n_frequency": 2000 if klein else 1000},
        "IA3": {"feedforward_modules": ["down_proj", "gate_proj", "up_proj"]},
        "LILY": {} if klein else {"stride_A": 14, "num_B": 2},
        "LORA": {"lora_alpha": 64, "use_dora": "dora" in name, "use_rslora": "rslora" in name},
        "MISS": {"init_weights": "bat" if "bat" in name else True},
        "TINYLORA": {"weight_tying": 1.0} if "tying" in name else {},
        "TRAINABLE_TOKENS": {"token_indices": [128000, 128001]},
        "WAVEFT": {"n_frequency": 2592 if klein else 5000},
    }.get(kind, {})
    if kind == "PREFIX_TUNING":
        return peft.PrefixTuningConfig(num_virtual_tokens=200, task_type="CAUSAL_LM")
    if kind == "P_TUNING":
        return peft.PromptEncoderConfig(num_virtual_tokens=20, encoder_hidden_size=3072, task_type="CAUSAL_LM")
    if kind == "ADALORA":
        rank = {}
    task = {} if klein else {"task_type": "CAUSAL_LM"}
    return getattr(peft, names[kind])(target_modules=row["targets"].split(), **rank, **more, **task)


LITGPT = {"gemma-2b": "Gemma-2b", "gemma-2-9b": "Gemma-2-9b", "llama-3.1-8b": "Llama-3.1-8B"} | dict.fromkeys(
    ("mistral-7b", "mistral-7b-v0.2"), "Mistral-7B-v0.1"
)
"""Names of LitGPT's for those of the table."""


VOCABULARY = {
    "falcon-7b": 65024, "gemma-2b": 256000, "gemma-2-9b": 256000, "llama-3.1-8b": 128256, "mistral-7b": 32000,
    "mistral-7b-v0.2": 32000, "phi-2": 51200, "Phi-3-mini-4k-instruct": 32064, "stablelm-base-alpha-3b": 50688,
}  # fmt: skip
"""Padded. Its loop holds the logits of one micro-batch, in float32, while the next runs."""


def _of_litgpt(number: int, row: dict[str, str]) -> Run:
    from benchmarks.published import litgpt

    quantization = "nf4" if "nf4" in row["quant"] else ""
    model = LITGPT.get(row["model"], row["model"])
    return Run(
        row=number, source="LitGPT", name=f"{row['model']} {quantization}".strip(), quantization=quantization,
        model=lambda: litgpt.model(
            model, rank=int(row["rank"]), targets=row["targets"].split(), quantization=quantization,
            dropout=0.1 if "gemma" in row["model"] else 0.05,
        ),
        shape=(int(row["batch"]), 512), before_bytes=int(row["batch"]) * 512 * VOCABULARY[row["model"]] * 4,
        keeps_inputs=bool(quantization), measure="allocated", card="a10",
        published_bytes=float(row["peak_gb"]) * 1e9, causes=(BEFORE_1270,) if quantization else (),
    )  # fmt: skip


def _of_fsdp_qlora(number: int, row: dict[str, str]) -> Run | str:
    if "DDP mode" not in row["method"]:
        return "its weights are split over two cards"
    return Run(
        row=number, source="fsdp_qlora", name=f"Llama-2-7b nf4, {row['card'].split(' (')[0]}", model="llama-2-7b",
        adapter=lambda: {"rank": 64, "dropout": 0.1,
                         "targets": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]},
        quantization="nf4", checkpointing=True, adapter_dtype="bfloat16", shifts_logits=True,
        shape=(int(row["batch"]), 2048),
        card="rtx-4090" if "4090" in row["card"] else "rtx-3090", published_bytes=float(row["peak_gb"]) * 2**30,
        published_s=float(row["s_per_step"]), tokens=int(row["batch"]) * 2048 * 2,
    )  # fmt: skip


def _of_torchtune(number: int, row: dict[str, str]) -> Run | str:
    if "do not use as truth" in row["notes"] or "FSDP" in row["method"] or "offloading" in row["grad_ckpt"]:
        return "what differs is not stated, its weights are split, or its activations offloaded"
    nf4 = "nf4" in row["quant"]
    return Run(
        row=number, source="torchtune", name=f"Llama 3.1 8B {'nf4' if nf4 else ''}, compiled", model="llama-3.1-8b",
        adapter=lambda: {"rank": 8, "targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        quantization="nf4" if nf4 else "", checkpointing=True, shape=(2, 2048), head_tokens=512,
        adapter_dtype="bfloat16", card="rtx-4090",
        published_bytes=float(row["peak_gb"]) * 2**30, published_s=float(row["s_per_step"]), tokens=2 * 2048,
        stock=False, causes=("torchtune's own model, compiled: its layers save less",),
    )  # fmt: skip


AXOLOTL = {
    "Devstral-Small-2507": "mistral-small-24b", "Ministral-8B-Instruct-2410": "ministral-8b",
    "Seed-OSS-36B-Instruct": "seed-oss-36b", "Magistral-Small-2506": "mistral-small-24b",
    "Hunyuan-0.5B-Instruct": "hunyuan-0.5b",
}  # fmt: skip


def _of_axolotl(number: int, row: dict[str, str]) -> Run | str:
    own = row["model"].rpartition("/")[2]
    return Run(
        row=number, source="axolotl", name=f"{own} nf4", model=AXOLOTL[own],
        adapter=lambda: {"rank": 32, "targets": "all-linear"}, quantization="nf4-nested", kbit=True, checkpointing=True,
        shape=(2, 2048), head_tokens=1, optimizer="adamw_8bit" if "8bit" in row["optimizer"] else "adamw",
        published_bytes=float(row["peak_gb"]) * 2**30, card="l40s", stock=False,
        causes=("rounded by its README ('about'); the card is not stated; cut cross entropy",),
    )  # fmt: skip


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return 0 if match is None else int(match[1].replace(",", ""))


def _decimal(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in {text}")
    return float(match[1])
