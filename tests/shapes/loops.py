"""Loops as people write them around a causal model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import (
    HIDDEN,
    VOCABULARY,
    adamw,
    adapted,
    batches,
    fact,
    keep_trained,
    llama,
    log,
    lora,
    main,
    row,
    take_step,
    tokenizer,
)  # fmt: skip
from torch import nn
from torch.nn import functional


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 4, **call: Any) -> None:
    for batch in batches(count):
        loss = model(**batch, **call).loss
        take_step(optimizer, loss)


def plain(out: Path) -> None:
    """`model(**batch).loss`, then save"""
    model = adapted(llama()).train()
    train(model, adamw(model))
    model.save_pretrained(out / "adapter")


def eval_mode(out: Path) -> None:
    """Never calls `.train()`"""
    model = adapted(llama())
    model.eval()
    train(model, adamw(model))
    keep_trained(model)


def mixed_arguments(out: Path) -> None:
    """`model(ids, attention_mask=mask, labels=ids)`"""
    model = adapted(llama()).train()
    optimizer = adamw(model)
    for batch in batches():
        loss = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])[0]
        take_step(optimizer, loss)
    keep_trained(model)


def accumulated(out: Path) -> None:
    """Four micro-batches a step, clipped, a schedule"""
    model = adapted(llama()).train()
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for step in range(3):
        for batch in batches(4, size=1):
            (model(**batch).loss / 4).backward()
        log(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        schedule.step()
        if step < 2:
            optimizer.zero_grad(set_to_none=False)
    keep_trained(model)


def autocast(out: Path) -> None:
    """`torch.autocast` in bfloat16"""
    model = adapted(llama()).train()
    optimizer = adamw(model)
    for batch in batches():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        take_step(optimizer, loss)
    keep_trained(model)


def checkpointing(out: Path) -> None:
    """Gradient checkpointing by the model's own switch, `use_cache` as it is"""
    model = adapted(llama())
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    train(model, adamw(model))
    keep_trained(model)


def accelerate_loop(out: Path) -> None:
    """`Accelerator.prepare`, `accumulate`, `backward`, `clip_grad_norm_`"""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = adapted(llama())
    loader = torch.utils.data.DataLoader([{k: v[0] for k, v in batch.items()} for batch in batches(8)], batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        log(loss)
    accelerator.unwrap_model(model).save_pretrained(out / "adapter")


def two_adapters(out: Path) -> None:
    """Two adapters of one base, trained in turns"""
    model = adapted(llama())
    model.add_adapter("second", lora(r=2, target_modules=["q_proj"]))
    model.train()
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        train(model, adamw(model), 2)
    model.save_pretrained(out / "adapter")


def own_loss(out: Path) -> None:
    """logits, and a loss of the script's own with smoothing"""
    model = adapted(llama()).train()
    optimizer = adamw(model)
    for batch in batches():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = functional.cross_entropy(
            logits.reshape(-1, VOCABULARY).float(), batch["labels"][:, 1:].reshape(-1), label_smoothing=0.1
        )
        take_step(optimizer, loss)
    keep_trained(model)


def outside_head(out: Path) -> None:
    """Hidden states into a head that lies outside the model"""
    model = adapted(llama(), lora(task_type=None)).train()
    head = nn.Linear(HIDDEN, 3)
    optimizer = adamw(model, head)
    for batch in batches():
        states = model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
        loss = functional.cross_entropy(head(states[-1][:, -1] + states[2][:, -1]), batch["input_ids"][:, 0] % 3)
        take_step(optimizer, loss)
    keep_trained(model, head)


def probe(out: Path) -> None:
    """A frozen model under no_grad, a head trained on what it says"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama()).requires_grad_(False)
    head = nn.Linear(HIDDEN, 3)
    optimizer = adamw(head)
    for batch in batches():
        with torch.no_grad():
            states = model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[-1][:, -1]
        loss = functional.cross_entropy(head(states), batch["input_ids"][:, 0] % 3)
        take_step(optimizer, loss)
    keep_trained(head)


def distilled(out: Path) -> None:
    """The model without its adapter is the teacher"""
    model = adapted(llama()).train()
    optimizer = adamw(model)
    for batch in batches():
        ids = batch["input_ids"]
        with torch.no_grad(), model.disable_adapter():
            teacher = model(input_ids=ids).logits
        student = model(input_ids=ids).logits
        loss = functional.kl_div(
            student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
        ) + functional.cross_entropy(student[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
        take_step(optimizer, loss)
    keep_trained(model)


def teacher(out: Path) -> None:
    """Another model is the teacher"""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(llama("teacher", num_hidden_layers=2)).eval().requires_grad_(False)
    model = adapted(llama()).train()
    optimizer = adamw(model)
    for batch in batches():
        ids = batch["input_ids"]
        with torch.no_grad():
            wanted = other(input_ids=ids).logits.softmax(-1)
        loss = functional.cross_entropy(model(input_ids=ids).logits.transpose(1, 2), wanted.transpose(1, 2))
        take_step(optimizer, loss)
    keep_trained(model)


def sharpness_aware(out: Path) -> None:
    """SAM: forward and backward twice a step, the adapter moved between"""
    model = adapted(llama(), lora(lora_dropout=0.0)).train()
    optimizer = adamw(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for batch in batches():
        model(**batch).loss.backward()
        moves = [0.05 * (p.grad.sign() if p.grad is not None else torch.zeros_like(p)) for p in trained]
        with torch.no_grad():
            for parameter, move in zip(trained, moves, strict=True):
                parameter.add_(move)
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        with torch.no_grad():
            for parameter, move in zip(trained, moves, strict=True):
                parameter.sub_(move)
        optimizer.step()
        optimizer.zero_grad()
        log(loss)
    keep_trained(model)


def closure(out: Path) -> None:
    """LBFGS: the optimizer calls the model itself"""
    model = adapted(llama(), lora(lora_dropout=0.0, target_modules=["q_proj"])).train()
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=0.5, max_iter=4)
    for batch in batches(2):

        def again(batch: dict[str, torch.Tensor] = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            log(loss)
            return loss

        optimizer.step(again)
    keep_trained(model)


def evaluated(out: Path) -> None:
    """Validation and `generate` between steps"""
    folder = llama()
    model = adapted(folder)
    optimizer = adamw(model)
    for epoch in range(2):
        model.train()
        train(model, optimizer, 2)
        model.eval()
        with torch.no_grad():
            for batch in batches(2, size=4):
                log(model(**batch).loss)
        made = model.generate(input_ids=row(epoch, 6)[None], max_new_tokens=5, do_sample=epoch == 1)
        fact(f"generated {epoch}", tokenizer(folder).decode(made[0]))
    keep_trained(model)


def uneven(out: Path) -> None:
    """Batches of different lengths and sizes, the last one the longest"""
    model = adapted(llama()).train()
    optimizer = adamw(model)
    for length, size in ((8, 2), (24, 1), (15, 3), (32, 2)):
        loss = model(**next(batches(1, size, length))).loss
        take_step(optimizer, loss)
    keep_trained(model)


def contrastive(out: Path) -> None:
    """Two forwards, one backward (SimCSE: two draws of dropout)"""
    model = adapted(llama(), lora(task_type=None)).train()
    optimizer = adamw(model)
    for batch in batches(4, size=4):
        ids = batch["input_ids"]
        one, two = (model(input_ids=ids, output_hidden_states=True).hidden_states[-1][:, -1] for _ in range(2))
        scores = functional.cosine_similarity(one[:, None], two[None], dim=-1) / 0.05
        loss = functional.cross_entropy(scores, torch.arange(len(ids)))
        take_step(optimizer, loss)
    keep_trained(model)


def chunked_head(out: Path) -> None:
    """The backbone is called, and the head of the model by pieces"""
    model = adapted(llama()).train()
    optimizer = adamw(model)
    causal = model.get_base_model()
    for batch in batches():
        ids = batch["input_ids"]
        states = causal.model(input_ids=ids).last_hidden_state[:, :-1]
        pieces = [
            functional.cross_entropy(causal.lm_head(piece).transpose(1, 2), wanted)
            for piece, wanted in zip(states.split(8, 1), ids[:, 1:].split(8, 1), strict=True)
        ]
        loss = torch.stack(pieces).mean()
        take_step(optimizer, loss)
    keep_trained(model)


def compiled(out: Path) -> None:
    """`torch.compile` of the whole model"""
    model = torch.compile(adapted(llama(), lora(lora_dropout=0.0)).train(), backend="eager")
    train(model, adamw(model))
    keep_trained(model)


def compiled_later(out: Path) -> None:
    """`torch.compile` of the whole model once it has been trained for two steps"""
    model = adapted(llama(), lora(lora_dropout=0.0)).train()
    optimizer = adamw(model)
    for number, batch in enumerate(batches()):
        if number == 2:
            model = torch.compile(model, backend="eager")
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log(loss)
    keep_trained(model)


def merged(out: Path) -> None:
    """merged, cast to bfloat16 and saved at the end"""
    model = adapted(llama()).train()
    train(model, adamw(model))
    model.merge_and_unload().bfloat16().save_pretrained(out / "merged")


def new_tokens(out: Path) -> None:
    """New tokens: embeddings made longer and trained whole"""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama())
    model.resize_token_embeddings(VOCABULARY + 8)
    model = get_peft_model(model, lora(modules_to_save=["embed_tokens", "lm_head"])).train()
    train(model, adamw(model))
    model.save_pretrained(out / "adapter")


def folds(out: Path) -> None:
    """cross-validation: a new model for each fold"""
    for fold in range(3):
        torch.manual_seed(fold)
        model = adapted(llama()).train()
        train(model, adamw(model), 2)
        keep_trained(model)


def resumed(out: Path) -> None:
    """A saved adapter is loaded and trained on"""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = llama()
    model = adapted(folder).train()
    train(model, adamw(model), 2)
    model.save_pretrained(out / "first")
    del model
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, str(out / "first"), is_trainable=True).train()
    train(model, adamw(model), 2)
    model.save_pretrained(out / "second")


def last_layers(out: Path) -> None:
    """No adapter: the last two layers and the head are trained"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama()).requires_grad_(False).train()
    for part in (*model.model.layers[-2:], model.lm_head):
        part.requires_grad_(True)
    train(model, adamw(model, lr=1e-3))
    keep_trained(model)


def biases(out: Path) -> None:
    """No adapter: BitFit, only biases are trained"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama("biased", attention_bias=True, mlp_bias=True)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    train(model, adamw(model))
    keep_trained(model)


def half_base(out: Path) -> None:
    """The base in bfloat16, the adapter in float32, autocast"""
    model = adapted(llama(), dtype=torch.bfloat16).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    optimizer = adamw(model)
    for batch in batches():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        take_step(optimizer, loss)
    model.save_pretrained(out / "adapter")


def soft_prompt(out: Path) -> None:
    """A prompt of the script's own before the embeddings of a frozen model"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama()).requires_grad_(False).train()
    prompt = nn.Parameter(torch.randn(4, HIDDEN) * 0.1)
    optimizer = torch.optim.AdamW([prompt], lr=1e-2)
    for batch in batches():
        embedded = model.get_input_embeddings()(batch["input_ids"])
        embedded = torch.cat([prompt[None].expand(len(embedded), -1, -1), embedded], 1)
        labels = functional.pad(batch["labels"], (4, 0), value=-100)
        loss = model(inputs_embeds=embedded, labels=labels).loss
        take_step(optimizer, loss)
    fact("prompt", prompt.detach().numpy().tobytes().hex())


def own_layers(out: Path) -> None:
    """LoRA of the script's own in place of each Linear, as tutorials do"""
    from transformers import AutoModelForCausalLM

    class LoRALinear(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear
            self.a = nn.Parameter(torch.randn(linear.in_features, 4) * 0.02)
            self.b = nn.Parameter(torch.zeros(4, linear.out_features))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + x @ self.a @ self.b

    model = AutoModelForCausalLM.from_pretrained(llama()).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRALinear(layer.self_attn.q_proj)
        layer.self_attn.v_proj = LoRALinear(layer.self_attn.v_proj)
    model.train()
    train(model, adamw(model))
    keep_trained(model)


def taken_over(out: Path) -> None:
    """A network outside the model takes over the forwards of its Linears (kohya)"""
    from transformers import AutoModelForCausalLM

    class Side(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.down = nn.Linear(linear.in_features, 4, bias=False)
            self.up = nn.Linear(4, linear.out_features, bias=False)
            nn.init.zeros_(self.up.weight)
            self.original = linear.forward
            linear.forward = self.forward  # type: ignore[method-assign]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.original(x) + self.up(self.down(x))

    model = AutoModelForCausalLM.from_pretrained(llama()).requires_grad_(False).train()
    sides = nn.ModuleList(Side(layer.self_attn.q_proj) for layer in model.model.layers)
    train(model, adamw(sides))
    keep_trained(sides)


def from_config(out: Path) -> None:
    """`from_config`, then `load_state_dict` of a safetensors file"""
    from peft import get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = llama()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.load_state_dict(load_file(f"{folder}/model.safetensors"))
    model = get_peft_model(model, lora()).train()
    train(model, adamw(model))
    model.save_pretrained(out / "adapter")


def own_model(out: Path) -> None:
    """A module of the script's own, with adapters after each layer (AdapterHub, Houlsby)"""
    from safetensors.torch import load_model, save_model

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)
            self.norm = nn.LayerNorm(HIDDEN)
            self.mlp = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))
            self.adapter = nn.Sequential(nn.Linear(HIDDEN, 4), nn.ReLU(), nn.Linear(4, HIDDEN))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen = self.norm(x)
            x = x + self.attention(seen, seen, seen, need_weights=False)[0]
            return self.adapter(x + self.mlp(x)) + x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
            self.layers = nn.ModuleList(Layer() for _ in range(6))
            self.head = nn.Linear(HIDDEN, VOCABULARY)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    model, file = Model(), out / "base.safetensors"
    save_model(model, str(file))
    load_model(model, str(file))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapter" in name)
    model.train()
    optimizer = adamw(model)
    for batch in batches():
        ids = batch["input_ids"]
        loss = functional.cross_entropy(model(ids)[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
        take_step(optimizer, loss)
    keep_trained(model)


def classifier(out: Path) -> None:
    """Sequence classification with a new head"""
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(llama(), num_labels=3)
    model = get_peft_model(model, lora(task_type="SEQ_CLS")).train()
    optimizer = adamw(model)
    for batch in batches():
        loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"][:, 0] % 3).loss
        take_step(optimizer, loss)
    model.save_pretrained(out / "adapter")


def reinforced(out: Path) -> None:
    """Sampled under no_grad, then a policy gradient against the base (PPO by hand)"""
    model = adapted(llama(), lora(lora_dropout=0.0))
    value = nn.Linear(HIDDEN, 1)
    optimizer = adamw(model, value)
    for step in range(3):
        model.eval()
        made = model.generate(input_ids=row(step, 6).repeat(2, 1), max_new_tokens=6, do_sample=True)
        with torch.no_grad(), model.disable_adapter():
            base = model(input_ids=made).logits.log_softmax(-1)
        model.train()
        for _ in range(2):
            said = model(input_ids=made, output_hidden_states=True)
            new = said.logits.log_softmax(-1)
            estimate = value(said.hidden_states[-1])[:, 5:-1, 0]
            chosen = new[:, 5:-1].gather(-1, made[:, 6:, None])[..., 0]
            before = base[:, 5:-1].gather(-1, made[:, 6:, None])[..., 0]
            reward = (made[:, 6:] % 7).float() / 7
            loss = -((reward - estimate.detach()) * (chosen - before).exp()).mean() + (reward - estimate).pow(2).mean()
            take_step(optimizer, loss)
    keep_trained(model, value)


def functional_call(out: Path) -> None:
    """The model through `torch.func.functional_call` with the adapter's tensors"""
    model = adapted(llama(), lora(lora_dropout=0.0)).train()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = adamw(model)
    for batch in batches():
        loss = torch.func.functional_call(model, trained, (), batch).loss
        take_step(optimizer, loss)
    keep_trained(model)


if __name__ == "__main__":
    main(globals())
