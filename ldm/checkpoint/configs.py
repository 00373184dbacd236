"""Our configs as diffusers and transformers write them: what `detect` reads, in the other direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.checkpoint.detect import CFG_SCALE_KEY
from ldm.config import SD_V1, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig

JsonObject = dict[str, Any]


def unet_to_json(config: UNetConfig, sample_size: int, cfg_scale: float) -> JsonObject:
    """unet/config.json; `sample_size` is the side of the latents the model was trained at."""
    down = [
        "CrossAttnDownBlock2D" if level in config.attention_levels else "DownBlock2D"
        for level in range(len(config.channel_mult))
    ]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": config.heads,  # the number of heads, whatever it is called
        "block_out_channels": [config.channels * mult for mult in config.channel_mult],
        "center_input_sample": False,
        "cross_attention_dim": config.context_dim,
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.blocks_per_level,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.out_channels,
        "sample_size": sample_size,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
    } | ({} if cfg_scale == SD_V1.cfg_scale else {CFG_SCALE_KEY: cfg_scale})


def vae_to_json(config: VAEConfig, sample_size: int) -> JsonObject:
    """vae/config.json; `sample_size` is the side of the images the model was trained at."""
    levels = len(config.channel_mult)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [config.channels * mult for mult in config.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks_per_level,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.in_channels,
        "sample_size": sample_size,
        "scaling_factor": config.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_to_json(config: TextConfig) -> JsonObject:
    """text_encoder/config.json. The last two tokens of a CLIP vocabulary start and end a text."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": config.vocab_size - 1,
        "projection_dim": config.width,
        "vocab_size": config.vocab_size,
    }


def schedule_to_json(config: ScheduleConfig) -> JsonObject:
    """scheduler/scheduler_config.json: DDIM as the reference has it, or for zero SNR as arXiv:2305.08891 has."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": config.beta_end,
        "beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(config.beta_schedule, config.beta_schedule),
        "beta_start": config.beta_start,
        "clip_sample": False,
        "num_train_timesteps": config.timesteps,
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "set_alpha_to_one": False,
        "steps_offset": 0 if config.zero_terminal_snr else 1,
        "timestep_spacing": "trailing" if config.zero_terminal_snr else "leading",
        "trained_betas": None,
    }


def parts_to_json(parts: Mapping[str, Any], model: ModelConfig) -> dict[str, JsonObject]:
    """The config.json of each of some networks ("unet", "vae", "text") of a model, by the name of its folder."""
    downsampling = parts.get("vae", SD_V1.vae).downsampling
    write = {
        "unet": ("unet", lambda config: unet_to_json(config, model.image_size // downsampling, model.cfg_scale)),
        "vae": ("vae", lambda config: vae_to_json(config, model.image_size)),
        "text": ("text_encoder", text_to_json),
    }
    return {write[name][0]: write[name][1](config) for name, config in parts.items()}


MODEL_INDEX: JsonObject = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def tokenizer_to_json(max_length: int) -> JsonObject:
    """tokenizer/tokenizer_config.json of a CLIP tokenizer."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    return {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **special}
