"""A script for several ranks: ``python script_ranks.py FOLDER OUT KIND [VRAM RAM]``.

Several kinds, and the VRAM of each, may be given with commas between them: they are trained in turn.

KIND: ``trainer`` (transformers' Trainer), ``accelerate`` or ``ddp`` (loops), ``lightning``; what follows a ``+`` has it
do more, each in ``MORE``. With VRAM memplan's own lines are used; without, none.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from memplan.run import tiers
from tests.support import inside

MORE = {
    "accumulated": "micro-batches of which every second sums gradients, the first under no_sync",
    "checkpointing": "gradient checkpointing",
    "static": "DDP's static_graph",
    "unused": "DDP's find_unused_parameters",
    "quiet": "DDP's buffers are not broadcast",
    "disk": "layers have their homes on disk, in the checkpoint's own files",
    "resident": "two layers have theirs on the device",
    "packed": "so they have, and are packed: the script has changed them all",
    "checked": "the checked mode",
    "uneven": "rank 0 has one micro-batch more, within DDP's join",
    "evaluated": "an evaluation on rank 0 alone",
    "written": "a frozen weight is changed on every rank once training has begun",
    "memory": "say what of the resident memory is shared",
    "late": "attached after DDP is built",
    "unlike": "rank 1 has other frozen weights",
    "seeded": "frozen weights of each rank's own seed",
    "built": "the model is built from its configuration, and filled by load_state_dict",
    "saved": "a checkpoint is saved in the second step",
    "resumed": "and training goes on from it",
    "cast": "the model is cast before it is trained",
    "wrapped": "memplan.wrap in place of memplan.placing",
    "grouped": "under a plan whose micro-batches share loads, which ranks do not do",
    "callback": "MemplanCallback in place of it",
    "thinned": "rank 1 trains fewer parameters",
    "replanned": "rank 1 is given another plan",
    "killed": "rank 1 is killed with -9 in its second micro-batch, unless it was started anew",
    "felled": "all ranks are, in theirs",
    "faulted": "rank 1 raises in its second micro-batch",
    "crowded": "rank 1 runs out of memory in its second micro-batch, once",
}
STEPS = 3


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        row = (torch.arange(24) * (index + 3)) % 90 + 3
        return {"input_ids": row, "labels": row}


def batch(rank, step):
    ids = (torch.arange(48).view(2, 24) * (2 * step + rank + 3)) % 90 + 3
    return {"input_ids": ids, "labels": ids.clone()}


def options(given, more):
    if not given:
        return None
    vram, ram = given
    found = {"vram": vram, "ram": ram, "hardware": os.environ["PROFILE"]}
    if {"disk", "packed"} & set(more):
        found |= {"pins": {f"model.layers.{index}": "disk" for index in range(4)}, "disk": "64MiB"}
    if "resident" in more:
        found |= {"pins": {f"model.layers.{index}": "device" for index in (1, 2)}}
    return found | {"checked": True} if "checked" in more else found


def adapted(folder, more):
    rank = int(os.environ["RANK"])
    if "built" in more:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        for shard in Path(folder).glob("*.safetensors"):
            model.load_state_dict(load_file(shard), strict=False)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    if ("unlike" in more and rank == 1) or "seeded" in more:
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[5, 3] += 1 + rank
    if "cast" in more:
        model = model.to(torch.bfloat16)
    if "packed" in more:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.mul_(1.25)
    torch.manual_seed(6 + rank)  # DDP has them begin as rank 0's
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    if "thinned" in more and rank == 1:
        next(parameter for parameter in model.parameters() if parameter.requires_grad).requires_grad_(False)
    if "checkpointing" in more:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def save(model, out):
    if not dist.is_initialized() or dist.get_rank() == 0:
        found = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        Path(out).mkdir(parents=True, exist_ok=True)
        save_file(found, f"{out}/adapter.safetensors")


def tell_memory():
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        found[name] = int(value)
    shared = rss = pss = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
            inside = "memfd:memplan" in line
        elif inside and line.startswith("Rss:"):
            rss += int(line.split()[1])
        elif inside and line.startswith("Pss:"):
            pss += int(line.split()[1])
        elif inside and line.startswith("Anonymous:"):
            shared += int(line.split()[1])
    anonymous = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
            inside = line.endswith(".safetensors")
        elif inside and line.startswith("Anonymous:"):
            anonymous += int(line.split()[1])
    print("memory", rss, pss, shared, anonymous, flush=True)


def what_is_left():
    """How many mappings and descriptors of shared memory there are."""
    count = Path("/proc/self/maps").read_text().count("memfd:memplan")
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            count += "memfd:memplan" in os.readlink(file)
    return count


def micro_batches(rank, more):
    count = 2 if "accumulated" in more else 1
    for step in range(STEPS):
        for part in range(count):
            yield step * count + part, part == count - 1


def ddp(folder, out, more, asked):
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = adapted(folder, more)
    handle = None

    def attached():
        from memplan import attach, plan

        checked = {"checked": asked.pop("checked", False)}
        given = dict(asked)
        if "replanned" in more and rank == 1:
            given["vram"] = "4MiB"
        found = plan(model, batch(0, 0), **given)
        return attach(model, found, **checked)

    if asked and "late" not in more:
        handle = attached()
    wrapped = DistributedDataParallel(
        model,
        static_graph="static" in more,
        find_unused_parameters="unused" in more,
        forward_sync_buffers="quiet" not in more,
    )
    if asked and "late" in more:
        handle = attached()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    join = wrapped.join() if "uneven" in more else contextlib.nullcontext()
    calls = 0
    with join:
        for number, is_last in [*micro_batches(rank, more), *([(9, True)] if "uneven" in more and rank == 0 else [])]:
            if "written" in more and number == 1:
                with torch.no_grad():
                    model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.mul_(1.5)
            if number == 1 and (("killed" in more and rank == 1 and not is_restarted()) or "felled" in more):
                os.kill(os.getpid(), 9)
            if "faulted" in more and rank == int(os.environ.get("FAULTY", "1")) and number == 1:
                raise ValueError("something of the script's own")

            def run(number=number):
                nonlocal calls
                calls += 1
                loss = wrapped(**batch(rank, number)).loss
                if "crowded" in more and rank == 1 and calls == 3:
                    raise torch.OutOfMemoryError("out of memory, it says")
                loss.backward()

            quiet = contextlib.nullcontext() if is_last else wrapped.no_sync()
            with quiet:
                run() if handle is None or "crowded" not in more else handle.micro_batch(run)
            if is_last:
                optimizer.step()
                optimizer.zero_grad()
            if "evaluated" in more and rank == 0 and number == 1:
                model.eval()
                with torch.no_grad():
                    print("eval", model(**batch(5, 5)).loss.item().hex(), flush=True)
                model.train()
    if "memory" in more:
        tell_memory()
    save(model, out)
    if handle is not None:
        print("streamed", handle.record.loads > 0, handle.recoveries, flush=True)
        print("read", inside.bytes_read_from_disk(handle), flush=True)
        handle.detach()
        del handle
        gc.collect()
        print("left", what_is_left(), flush=True)


def accelerate(folder, out, more, asked):
    from accelerate import Accelerator

    import memplan

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2 if "accumulated" in more else 1)
    rank = accelerator.process_index
    model = adapted(folder, more)
    if asked:
        checked = {"checked": asked.pop("checked", False)}
        handle = memplan.attach(model, memplan.plan(model, batch(0, 0), **asked), **checked)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    for number, _ in micro_batches(rank, more):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch(rank, number)).loss)
            optimizer.step()
            optimizer.zero_grad()
    if "memory" in more:
        tell_memory()
    save(accelerator.unwrap_model(model), out)
    if asked:
        print("streamed", handle.record.loads > 0, flush=True)


def is_restarted():
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


class Crowded(Trainer):
    """Rank 1 runs out of memory in its second micro-batch, unless it was started anew."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step == 1 and self.args.process_index == 1 and not is_restarted():
            raise torch.OutOfMemoryError("out of memory, it says")
        return loss


def trainer(folder, out, more, asked):
    import memplan

    args = TrainingArguments(
        output_dir=out, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, seed=7, logging_steps=100,
        save_strategy="steps" if {"saved", "resumed"} & set(more) else "no", save_steps=2,
        gradient_accumulation_steps=2 if "accumulated" in more else 1,
    )  # fmt: skip
    callbacks = []
    if asked and "callback" in more:
        from memplan.trainers.callback import MemplanCallback

        callbacks.append(MemplanCallback(**asked))
    is_placed = asked and not {"wrapped", "callback", "grouped"} & set(more)
    with memplan.placing(**asked) if is_placed else contextlib.nullcontext():
        kind = Crowded if "crowded" in more else Trainer
        made = kind(model=adapted(folder, more), args=args, train_dataset=Rows(), callbacks=callbacks)
    if asked and "wrapped" in more:
        memplan.wrap(made, **asked)
    if asked and "grouped" in more:
        memplan.wrap(made, plan=memplan.plan(made.model, batch(0, 0), accumulation=2, group=2, **asked))
        assert made.memplan.plan.group == 2
    made.train(resume_from_checkpoint=f"{out}/checkpoint-2" if "resumed" in more else None)
    if "memory" in more:
        tell_memory()
    save(made.model, out)
    if asked:
        handle = callbacks[0].handle if callbacks else made.memplan
        print("streamed", handle.record.loads > 0, flush=True)
        print("budget", handle.plan.budgets.vram_bytes, flush=True)


def lightning(folder, out, more, asked):
    import warnings

    warnings.simplefilter("ignore")
    import lightning as pl

    from memplan.trainers.lightning import Placement

    class Adapted(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = adapted(folder, more)

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def on_train_epoch_start(self):
            self.model.train()

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    module = Adapted()
    callbacks = [Placement(**asked)] if asked else []
    made = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=STEPS, default_root_dir=out, callbacks=callbacks,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    made.fit(module, torch.utils.data.DataLoader(Rows(), batch_size=2))
    save(module.model, out)
    if asked:
        print("streamed", callbacks[0].handle.record.loads > 0, flush=True)


def fault(where):
    """Have this rank fail where it plans, maps, fills, packs or attaches; be of another node; or share no memory."""
    import memplan.run.attach
    import memplan.trainers.loading.mapped_weights as mapped
    from memplan.cache import BlockCache
    from memplan.queries import one_plan
    from memplan.ranks import session, shared_memory
    from memplan.ranks.world import Node
    from memplan.run.memory.home import Weights

    def fail(*args, **kwargs):
        if where.endswith("killed"):
            os.kill(os.getpid(), 9)
        raise OSError(f"injected where it {where}")

    if where == "apart":
        session.this_node = lambda rank: Node(boot="another", pids="")
        return
    if where == "unshared":
        shared_memory._opened = lambda offer, size_bytes: None
        return
    owner, name = {
        "plans": (one_plan, "_signature"), "maps": (mapped, "put_weights"), "fills": (Weights, "fill"),
        "packs": (BlockCache, "put"), "attaches": (memplan.run.attach, "install"),
    }[where.split(" ")[0]]  # fmt: skip
    setattr(owner, name, fail)


def main():
    if os.environ.get("FAULT") and os.environ["RANK"] == os.environ.get("FAULTY", "1"):
        fault(os.environ["FAULT"])
    folder, out, kinds, *given = sys.argv[1:]
    torch.set_num_threads(1)
    tiers.RING_BYTES = int(os.environ.get("RING", tiers.RING_BYTES))
    for number, kind in enumerate(kinds.split(",")):
        kind, *more = kind.split("+")
        assert set(more) <= set(MORE), more
        print("case", number, flush=True)
        asked = options([given[0].split(",")[number], *given[1:]] if given else given, more)
        globals()[kind](folder, f"{out}/{number}" if "," in kinds else out, more, asked)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
