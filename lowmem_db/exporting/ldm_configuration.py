"""The configuration that older programs look for beside a single file, in the form of the original LDM repositories.

Keys and class names are those of https://github.com/CompVis/stable-diffusion and Stability-AI/stablediffusion: programs
build the model from them. The values come from the model.
"""

from typing import Any

import yaml

from lowmem_db.models.folder import ModelFolder

_UNET_CLASS = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
_VAE_CLASS = "ldm.models.autoencoder.AutoencoderKL"


def ldm_configuration(model: ModelFolder) -> str:
    """Return the configuration, as YAML, of a Stable Diffusion 1.x or 2.x model that predicts v."""
    unet, vae, schedule = (model.config_of(name) for name in ("unet", "vae", "scheduler"))
    params = {
        "parameterization": "v",
        "linear_start": schedule["beta_start"],
        "linear_end": schedule["beta_end"],
        "num_timesteps_cond": 1,
        "timesteps": schedule["num_train_timesteps"],
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": unet["sample_size"],
        "channels": unet["in_channels"],
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "scale_factor": vae.get("scaling_factor", 0.18215),
        "use_ema": False,
        "unet_config": {"target": _UNET_CLASS, "params": _unet(unet)},
        "first_stage_config": {"target": _VAE_CLASS, "params": _vae(vae)},
        "cond_stage_config": _text_encoder(model.config_of("text_encoder")),
    }
    content = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}
    return yaml.safe_dump(content, sort_keys=False)


def _unet(config: dict[str, Any]) -> dict[str, Any]:
    widths, kinds = config["block_out_channels"], config["down_block_types"]
    heads = config["attention_head_dim"]  # the number of heads, or one for each block; see diffusers
    found = {
        "use_checkpoint": False,
        "image_size": 32,  # unused
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "attention_resolutions": [2**level for level, kind in enumerate(kinds) if "CrossAttn" in kind][::-1],
        "num_res_blocks": config["layers_per_block"],
        "channel_mult": [width // widths[0] for width in widths],
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": config["cross_attention_dim"],
        "legacy": False,
    }
    if isinstance(heads, list):
        return found | {"num_head_channels": widths[0] // heads[0], "use_linear_in_transformer": True}
    return found | {"num_heads": heads}


def _vae(config: dict[str, Any]) -> dict[str, Any]:
    widths = config["block_out_channels"]
    shape = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    loss = {"target": "torch.nn.Identity"}
    return {"embed_dim": config["latent_channels"], "monitor": "val/rec_loss", "ddconfig": shape, "lossconfig": loss}


def _text_encoder(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("hidden_act") != "gelu":
        return {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    params = {"freeze": True, "layer": "penultimate"}
    return {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": params}
