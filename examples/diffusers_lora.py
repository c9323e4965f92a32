"""LoRA on a diffusers model, a UNet or a transformer: python diffusers_lora.py MODEL OUT [--vram 10GiB --ram 24GiB]

MODEL: the folder of a pipeline, or of its ``unet`` or ``transformer`` alone. Images and captions are random here, in
the form that their encoders give. The shape of the usual script: noise, a time, and the mean squared error of what is
predicted. ``memplan run`` needs no line of memplan here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import diffusers
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import memplan


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("model", nargs="?")
    given.add_argument("out", nargs="?")
    given.add_argument("--vram", help="budget of the device, as 10GiB; without it memplan is not used")
    given.add_argument("--ram", help="budget of RAM")
    given.add_argument("--steps", type=int, default=20)
    args = given.parse_args()
    if args.model is None:
        from small import small  # random weights and some rows

        args.model, _, args.out, args.vram = small("unet")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(args.model)
    part = next((part for part in ("unet", "transformer") if (folder / part).is_dir()), None)
    kind = getattr(diffusers, json.loads((folder / (part or "") / "config.json").read_text())["_class_name"])
    model = kind.from_pretrained(args.model, subfolder=part)
    model.requires_grad_(False)
    torch.manual_seed(0)
    model.add_adapter(
        LoraConfig(r=8, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    )
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.vram:
        plan = memplan.plan(
            model,
            noisy(model, 0)[0],
            vram=args.vram,
            ram=args.ram,
            loss=lambda output: output.sample.float().square().mean(),
        )
        handle = memplan.attach(model, plan)
    model.to(device)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for step in range(args.steps):
        batch, target = noisy(model, step)
        predicted = model(**{name: tensor.to(device) for name, tensor in batch.items()}).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), target.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    save_file(get_peft_model_state_dict(model), Path(args.out) / "adapter_model.safetensors")
    if args.vram:
        memplan.report(plan, handle.record)


def noisy(model: torch.nn.Module, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a batch of latent images with noise and captions, and the noise."""
    config = model.config
    random = torch.Generator().manual_seed(step)
    latent, noise = torch.randn((2, 2, config.in_channels, config.sample_size, config.sample_size), generator=random)
    time = torch.randint(0, 1000, (2,), generator=random)
    share = (time / 1000)[:, None, None, None]
    noised = (1 - share) * latent + share * noise
    if "cross_attention_dim" in config:  # a UNet
        captions = torch.randn((2, 7, config.cross_attention_dim), generator=random)
        return {"sample": noised, "timestep": time, "encoder_hidden_states": captions}, noise
    captions = torch.randn((2, 7, config.joint_attention_dim), generator=random)
    pooled = torch.randn((2, config.pooled_projection_dim), generator=random)
    batch = {"hidden_states": noised, "timestep": time, "encoder_hidden_states": captions, "pooled_projections": pooled}
    return batch, noise


if __name__ == "__main__":
    main()
