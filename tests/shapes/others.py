"""Models that are not causal language models: images, sound, pairs, diffusion, other bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import HIDDEN, VOCABULARY, adamw, adapted, batches, keep_trained, llama, lora, main, row, saved, take_step
from torch.nn import functional


def _small(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, **more,
    }  # fmt: skip


def image_classes(out: Path) -> None:
    """ViT, a new head"""
    from peft import get_peft_model
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

    folder = saved("vit", lambda: ViTForImageClassification(ViTConfig(**_small(image_size=32, patch_size=8))))
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    config = lora(task_type=None, target_modules="all-linear", modules_to_save=["classifier"])
    model = get_peft_model(model, config).train()
    optimizer = adamw(model)
    for step in range(4):
        take_step(optimizer, model(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([step, 1])).loss)
    keep_trained(model)


def masked_words(out: Path) -> None:
    """BERT, masked words"""
    from peft import get_peft_model
    from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

    folder = saved("bert", lambda: BertForMaskedLM(BertConfig(**_small(vocab_size=VOCABULARY))))
    model = AutoModelForMaskedLM.from_pretrained(folder)
    model = get_peft_model(model, lora(task_type=None, target_modules=["query", "value"])).train()
    optimizer = adamw(model)
    for batch in batches():
        ids = batch["input_ids"]
        hidden = torch.rand(ids.shape) < 0.3
        take_step(optimizer, model(input_ids=ids.masked_fill(hidden, 3), labels=ids.masked_fill(~hidden, -100)).loss)
    keep_trained(model)


def sentences(out: Path) -> None:
    """BERT, mean of the states of two sentences, contrasted (sentence-transformers)"""
    from peft import get_peft_model
    from transformers import AutoModel, BertConfig, BertForMaskedLM

    folder = saved("bert", lambda: BertForMaskedLM(BertConfig(**_small(vocab_size=VOCABULARY))))
    config = lora(task_type="FEATURE_EXTRACTION", target_modules=["query", "value"])
    model = get_peft_model(AutoModel.from_pretrained(folder), config).train()
    optimizer = adamw(model)
    for step in range(4):
        one, two = (
            model(input_ids=torch.stack([row(step + shift, 12), row(step + shift + 1, 12)])).last_hidden_state.mean(1)
            for shift in (0, 5)
        )
        scores = functional.normalize(one, dim=-1) @ functional.normalize(two, dim=-1).T
        take_step(optimizer, functional.cross_entropy(scores * 20, torch.arange(2)))
    keep_trained(model)


def _clip() -> str:
    from transformers import CLIPConfig, CLIPModel

    text = _small(vocab_size=VOCABULARY, max_position_embeddings=32, eos_token_id=2, projection_dim=32)
    vision = _small(image_size=32, patch_size=8, projection_dim=32)
    return saved("clip", lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)))


def clip(out: Path) -> None:
    """CLIP, `return_loss`"""
    from peft import get_peft_model
    from transformers import AutoModel

    model = get_peft_model(
        AutoModel.from_pretrained(_clip()), lora(task_type=None, target_modules=["q_proj", "v_proj"])
    )
    model.train()
    optimizer = adamw(model)
    for batch in batches():
        ids = batch["input_ids"][:, :12]
        take_step(optimizer, model(input_ids=ids, pixel_values=torch.randn(2, 3, 32, 32), return_loss=True).loss)
    keep_trained(model)


def clip_features(out: Path) -> None:
    """CLIP by `get_text_features` and `get_image_features`"""
    from peft import get_peft_model
    from transformers import AutoModel

    model = get_peft_model(
        AutoModel.from_pretrained(_clip()), lora(task_type=None, target_modules=["q_proj", "v_proj"])
    )
    model.train()
    optimizer = adamw(model)
    for batch in batches():
        text = model.get_text_features(input_ids=batch["input_ids"][:, :12])
        image = model.get_image_features(pixel_values=torch.randn(2, 3, 32, 32))
        text, image = (found if torch.is_tensor(found) else found.pooler_output for found in (text, image))
        scores = functional.normalize(text, dim=-1) @ functional.normalize(image, dim=-1).T
        take_step(optimizer, functional.cross_entropy(scores * 20, torch.arange(2)))
    keep_trained(model)


def speech(out: Path) -> None:
    """Whisper, spectrograms to words"""
    from peft import get_peft_model
    from transformers import AutoModelForSpeechSeq2Seq, WhisperConfig, WhisperForConditionalGeneration

    def make() -> Any:
        return WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=8,
                max_source_positions=32, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
            )
        )  # fmt: skip

    model = AutoModelForSpeechSeq2Seq.from_pretrained(saved("whisper", make))
    model = get_peft_model(model, lora(task_type=None, target_modules=["q_proj", "v_proj"])).train()
    optimizer = adamw(model)
    for batch in batches():
        take_step(optimizer, model(input_features=torch.randn(2, 8, 64), labels=batch["labels"][:, :10]).loss)
    keep_trained(model)


def image_and_text(out: Path) -> None:
    """LLaVA, an image among the words"""
    from peft import get_peft_model
    from transformers import (
        AutoModelForImageTextToText,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )  # fmt: skip

    def make() -> Any:
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**_small(image_size=32, patch_size=8)),
                text_config=LlamaConfig(**_small(vocab_size=VOCABULARY, max_position_embeddings=128)),
                image_token_index=5, image_token_id=5, vision_feature_layer=-1,
            )
        )  # fmt: skip

    model = AutoModelForImageTextToText.from_pretrained(saved("llava", make))
    model = get_peft_model(model, lora(target_modules=["q_proj", "v_proj"])).train()
    optimizer = adamw(model)
    for batch in batches():
        ids = torch.cat([torch.full((2, 16), 5), batch["input_ids"].clamp(min=6)], 1)
        take_step(optimizer, model(input_ids=ids, pixel_values=torch.randn(2, 3, 32, 32), labels=ids).loss)
    keep_trained(model)


def _unet() -> str:
    from diffusers import UNet2DConditionModel

    return saved(
        "unet",
        lambda: UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
            attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
    )  # fmt: skip


def unet(out: Path) -> None:
    """A UNet, `unet(noisy, t, states, return_dict=False)[0]`, `add_adapter` (diffusers' example)"""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(_unet()).requires_grad_(False)
    model.add_adapter(lora(task_type=None, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    model.train()
    scheduler, optimizer = DDPMScheduler(), adamw(model)
    for _ in range(4):
        latents, noise, states = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 6, 32)
        steps = torch.randint(0, 1000, (2,))
        said = model(scheduler.add_noise(latents, noise, steps), steps, states, return_dict=False)[0]
        take_step(optimizer, functional.mse_loss(said.float(), noise))
    keep_trained(model)


def unet_prior(out: Path) -> None:
    """… with prior preservation: the batch in two, two losses (DreamBooth), checkpointing"""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(_unet()).requires_grad_(False)
    model.add_adapter(lora(task_type=None, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    model.enable_gradient_checkpointing()
    model.train()
    optimizer = adamw(model)
    for _ in range(4):
        noise = torch.randn(4, 4, 8, 8)
        said = model(torch.randn(4, 4, 8, 8), torch.randint(0, 1000, (4,)), torch.randn(4, 6, 32)).sample
        (own, prior), (one, two) = said.chunk(2), noise.chunk(2)
        take_step(optimizer, functional.mse_loss(own, one) + 0.5 * functional.mse_loss(prior, two))
    keep_trained(model)


def flux(out: Path) -> None:
    """A FLUX transformer by keywords, weighted flow matching"""
    from diffusers import FluxTransformer2DModel

    folder = saved(
        "flux",
        lambda: FluxTransformer2DModel(
            in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        ),
    )  # fmt: skip
    model = FluxTransformer2DModel.from_pretrained(folder).requires_grad_(False)
    model.add_adapter(lora(task_type=None, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    model.train()
    optimizer = adamw(model)
    for _ in range(4):
        latents, noise, sigma = torch.randn(1, 16, 4), torch.randn(1, 16, 4), torch.rand(1)
        said = model(
            hidden_states=(1 - sigma) * latents + sigma * noise, timestep=sigma, guidance=torch.ones(1),
            pooled_projections=torch.randn(1, 32), encoder_hidden_states=torch.randn(1, 6, 32),
            txt_ids=torch.zeros(6, 3), img_ids=torch.zeros(16, 3), return_dict=False,
        )[0]  # fmt: skip
        take_step(optimizer, (sigma * (said - (noise - latents)) ** 2).mean())
    keep_trained(model)


def image_and_encoder(out: Path) -> None:
    """A UNet and its text encoder, both with adapters, one optimizer"""
    from diffusers import UNet2DConditionModel
    from peft import get_peft_model
    from transformers import CLIPTextConfig, CLIPTextModel

    def make() -> Any:
        text = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        return CLIPTextModel(CLIPTextConfig(**text, vocab_size=VOCABULARY, max_position_embeddings=32, eos_token_id=2))

    encoder = CLIPTextModel.from_pretrained(saved("encoder", make))
    encoder = get_peft_model(encoder, lora(task_type=None, target_modules=["q_proj", "v_proj"])).train()
    model = UNet2DConditionModel.from_pretrained(_unet()).requires_grad_(False)
    model.add_adapter(lora(task_type=None, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    model.train()
    optimizer = adamw(model, encoder)
    for step in range(4):
        states = encoder(input_ids=torch.stack([row(step, 8), row(step + 1, 8)])).last_hidden_state
        noise = torch.randn(2, 4, 8, 8)
        said = model(torch.randn(2, 4, 8, 8), torch.randint(0, 1000, (2,)), states).sample
        take_step(optimizer, functional.mse_loss(said, noise))
    keep_trained(model, encoder)


def experts(out: Path) -> None:
    """Mixtral: routed experts, and the router's loss"""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = saved(
        "mixtral",
        lambda: MixtralForCausalLM(
            MixtralConfig(**_small(vocab_size=VOCABULARY, num_key_value_heads=2, num_local_experts=4))
        ),
    )
    model = adapted(folder, lora(target_modules=["q_proj", "v_proj"])).train()
    optimizer = adamw(model)
    for batch in batches():
        take_step(optimizer, model(**batch, output_router_logits=True).loss)
    keep_trained(model)


def four_bit(out: Path) -> None:
    """QLoRA: an nf4 base, `prepare_model_for_kbit_training`"""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(llama(), quantization_config=config, device_map="cpu")
    model = get_peft_model(prepare_model_for_kbit_training(model), lora()).train()
    optimizer = adamw(model)
    for batch in batches():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        take_step(optimizer, loss)
    keep_trained(model)


if __name__ == "__main__":
    main(globals())
