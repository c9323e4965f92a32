"""Trainers as people call them: transformers, TRL, Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import (
    HIDDEN,
    VOCABULARY,
    Rows,
    adapted,
    arguments,
    batches,
    fact,
    keep_history,
    keep_trained,
    llama,
    log,
    lora,
    main,
    saved,
    tokenizer,
    words,
)  # fmt: skip


def _trained(out: Path, model: Any, **more: Any) -> Any:
    from transformers import Trainer

    data = {"train_dataset": Rows(), **{name: more.pop(name) for name in ("eval_dataset", "callbacks") if name in more}}
    trainer = Trainer(model=model, args=arguments(out, **more), **data)
    trainer.train()
    keep_history(trainer)
    return trainer


def trainer(out: Path) -> None:
    """`Trainer`"""
    _trained(out, adapted(llama())).save_model(str(out / "adapter"))


def trainer_accumulated(out: Path) -> None:
    """… accumulation, NEFTune, label smoothing, cosine schedule, bf16"""
    _trained(
        out, adapted(llama()), gradient_accumulation_steps=2, neftune_noise_alpha=5.0, label_smoothing_factor=0.1,
        lr_scheduler_type="cosine", bf16=True,
    ).save_model(str(out / "adapter"))  # fmt: skip


def trainer_checkpointing(out: Path) -> None:
    """… gradient checkpointing"""
    _trained(out, adapted(llama()), gradient_checkpointing=True).save_model(str(out / "adapter"))


def trainer_best(out: Path) -> None:
    """… evaluated and saved each two steps, the best loaded at the end"""
    _trained(
        out, adapted(llama()), eval_dataset=Rows(4), eval_strategy="steps", save_strategy="steps", eval_steps=2,
        save_steps=2, load_best_model_at_end=True,
    ).save_model(str(out / "adapter"))  # fmt: skip


def trainer_resumed(out: Path) -> None:
    """… resumed from a checkpoint in a new Trainer"""
    from transformers import Trainer

    _trained(out, adapted(llama()), save_strategy="steps", save_steps=2, max_steps=2)
    second = Trainer(model=adapted(llama()), args=arguments(out, save_steps=2), train_dataset=Rows())
    second.train(resume_from_checkpoint=True)
    keep_history(second)
    second.save_model(str(out / "adapter"))


def trainer_native(out: Path) -> None:
    """… `model.add_adapter` of transformers in place of PEFT's model"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama())
    model.add_adapter(lora(target_modules=["q_proj", "v_proj"]))
    _trained(out, model)
    keep_trained(model)


def trainer_own_loss(out: Path) -> None:
    """… `compute_loss` of the script's own, as a subclass"""
    from transformers import Trainer

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:])
            loss = loss + 1e-3 * outputs.logits.logsumexp(-1).pow(2).mean()
            return (loss, outputs) if return_outputs else loss

    model = adapted(llama())
    trainer = Own(model=model, args=arguments(out), train_dataset=Rows())
    trainer.train()
    keep_history(trainer)
    keep_trained(model)


def trainer_stopped(out: Path) -> None:
    """… callbacks: stopped early, the learning rate changed"""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> Any:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
            control.should_training_stop = state.global_step == 3
            return control

    _trained(out, adapted(llama()), callbacks=[Stop()]).save_model(str(out / "adapter"))


def trainer_folds(out: Path) -> None:
    """… cross-validation: a new model and Trainer for each fold"""
    for fold in range(3):
        torch.manual_seed(fold)
        model = adapted(llama())
        _trained(out, model, max_steps=2)
        keep_trained(model)


def seq2seq(out: Path) -> None:
    """`Seq2SeqTrainer` with T5, generating to evaluate"""
    from peft import get_peft_model
    from transformers import (
        AutoModelForSeq2SeqLM,
        DataCollatorForSeq2Seq,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        T5Config,
        T5ForConditionalGeneration,
    )  # fmt: skip

    folder = saved(
        "t5",
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=16, d_ff=128, num_layers=4, num_heads=4,
                     decoder_start_token_id=0)
        ),
    )  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    model = get_peft_model(model, lora(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]))
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments(out, Seq2SeqTrainingArguments, eval_strategy="steps", eval_steps=2, predict_with_generate=True,
                       generation_max_length=6),
        train_dataset=Rows(), eval_dataset=Rows(4),
        data_collator=DataCollatorForSeq2Seq(tokenizer(llama()), model=model),
    )  # fmt: skip
    trainer.train()
    keep_history(trainer)
    trainer.save_model(str(out / "adapter"))


def _prompts(count: int = 12, **columns: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": words(i, 5), **{name: column(i) for name, column in columns.items()}} for i in range(count)]
    )


def _trl(out: Path, kind: Any, config: Any, data: Any, model: Any = None, **more: Any) -> None:
    folder = llama()
    options = {name: more.pop(name) for name in ("reward_funcs", "ref_model") if name in more}
    trainer = kind(
        model=model or folder, args=arguments(out, config, **more), train_dataset=data,
        processing_class=tokenizer(folder), peft_config=lora(target_modules=["q_proj", "v_proj"]), **options,
    )  # fmt: skip
    trainer.train()
    keep_history(trainer)
    trainer.save_model(str(out / "adapter"))


def sft(out: Path) -> None:
    """TRL: SFT by the model's name, packed"""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"text": words(i, 10 + i)} for i in range(12)])
    _trl(out, SFTTrainer, SFTConfig, data, packing=True, max_length=32)


def sft_chat(out: Path) -> None:
    """TRL: SFT of prompts and completions, loss on completions"""
    from trl import SFTConfig, SFTTrainer

    data = _prompts(completion=lambda i: " " + words(i + 2, 6))
    _trl(out, SFTTrainer, SFTConfig, data, max_length=32, completion_only_loss=True)


def dpo(out: Path) -> None:
    """TRL: DPO, the adapter off as reference"""
    from trl import DPOConfig, DPOTrainer

    data = _prompts(chosen=lambda i: " " + words(i + 2, 6), rejected=lambda i: " " + words(i + 5, 4))
    _trl(out, DPOTrainer, DPOConfig, data, max_length=32)


def kto(out: Path) -> None:
    """TRL: KTO"""
    try:
        from trl import KTOConfig, KTOTrainer
    except ImportError:
        from trl.experimental.kto import KTOConfig, KTOTrainer

    data = _prompts(completion=lambda i: " " + words(i + 2, 6), label=lambda i: i % 2 == 0)
    _trl(out, KTOTrainer, KTOConfig, data, max_length=32, per_device_train_batch_size=4)


def reward(out: Path) -> None:
    """TRL: a reward model"""
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    data = _prompts(chosen=lambda i: " " + words(i + 2, 6), rejected=lambda i: " " + words(i + 5, 4))
    folder = llama()
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
    trainer = RewardTrainer(
        model=model, args=arguments(out, RewardConfig, max_length=32), train_dataset=data,
        processing_class=tokenizer(folder), peft_config=lora(task_type="SEQ_CLS", modules_to_save=["score"]),
    )  # fmt: skip
    trainer.train()
    keep_history(trainer)
    trainer.save_model(str(out / "adapter"))


def grpo(out: Path) -> None:
    """TRL: GRPO, sampled within the step"""
    from trl import GRPOConfig, GRPOTrainer

    def score(completions: list[str], **_: Any) -> list[float]:
        return [sum(map(ord, text)) % 17 / 17 for text in completions]

    _trl(
        out, GRPOTrainer, GRPOConfig, _prompts(), reward_funcs=score, num_generations=2, max_completion_length=6,
        max_steps=2, beta=0.1,
    )  # fmt: skip


def lightning_module(out: Path) -> None:
    """A LightningModule and its Trainer"""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted(llama())

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = self.model(**batch).loss
            log(loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    module = Module()
    module.model.train()
    lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=2,
    ).fit(module, torch.utils.data.DataLoader(list(batches(8)), batch_size=None))  # fmt: skip
    module.model.save_pretrained(out / "adapter")
    fact("steps", module.global_step)


if __name__ == "__main__":
    main(globals())
