"""Weights of diffusers' modules under the names that original Stable Diffusion checkpoints give them.

What Civitai serves are single files in this layout. It is fixed: SD 1.5's denoiser has 4 blocks and SDXL's 3, of 2
layers each, and the autoencoder has 4.
"""

import torch
from torch import Tensor

State = dict[str, Tensor]

_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.",
    "conv_shortcut.": "skip_connection.",
}
_OPEN_CLIP = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}


def unet_to_ldm(state: State, attention: tuple[bool, ...]) -> State:
    """Rename a denoiser's weights.

    Args:
        state: Of a UNet2DConditionModel with 2 layers per block.
        attention: Whether each block on the way down has cross-attention.
    """
    last = len(attention) - 1
    names = {
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "conv_in.": "input_blocks.0.0.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
    for i, attends in enumerate(attention):
        for j in range(2):
            names[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{3 * i + j + 1}.0."
            names[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{3 * i + j + 1}.1."
        for j in range(3):
            names[f"up_blocks.{last - i}.resnets.{j}."] = f"output_blocks.{3 * (last - i) + j}.0."
            names[f"up_blocks.{last - i}.attentions.{j}."] = f"output_blocks.{3 * (last - i) + j}.1."
        names[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{3 * (i + 1)}.0.op."
        names[f"up_blocks.{last - i}.upsamplers.0."] = f"output_blocks.{3 * (last - i) + 2}.{2 if attends else 1}."
    return _renamed(state, names, _RESNET, "model.diffusion_model.")


def vae_to_ldm(state: State) -> State:
    """Rename the weights of an AutoencoderKL with 4 blocks of 2 layers."""
    names = {"conv_norm_out.": "norm_out."}
    for part in ("encoder", "decoder"):
        names[f"{part}.conv_norm_out."] = f"{part}.norm_out."
        names[f"{part}.mid_block.attentions.0."] = f"{part}.mid.attn_1."
        for j in range(2):
            names[f"{part}.mid_block.resnets.{j}."] = f"{part}.mid.block_{j + 1}."
    for i in range(4):
        for j in range(3):
            names[f"encoder.down_blocks.{i}.resnets.{j}."] = f"encoder.down.{i}.block.{j}."
            names[f"decoder.up_blocks.{i}.resnets.{j}."] = f"decoder.up.{3 - i}.block.{j}."
        names[f"encoder.down_blocks.{i}.downsamplers.0."] = f"encoder.down.{i}.downsample."
        names[f"decoder.up_blocks.{i}.upsamplers.0."] = f"decoder.up.{3 - i}.upsample."
    inner = {
        "group_norm.": "norm.",
        "to_q.": "q.",
        "to_k.": "k.",
        "to_v.": "v.",
        "to_out.0.": "proj_out.",
        "conv_shortcut.": "nin_shortcut.",
    }
    renamed = _renamed(state, names, inner, "first_stage_model.")
    # Attention was written as 1x1 convolutions.
    return {key: v[..., None, None] if "attn_1" in key and v.ndim == 2 else v for key, v in renamed.items()}


def clip_to_ldm(state: State, prefix: str) -> State:
    """Rename the weights of a CLIPTextModel, whose names transformers 5 has shortened."""
    return {f"{prefix}text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}


def clip_to_open_clip(state: State, prefix: str) -> State:
    """Rename the weights of a CLIPTextModelWithProjection as OpenCLIP's, whose attention has one matrix for q, k, v."""
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    renamed: State = {}
    for key, value in state.items():
        if key == "text_projection.weight":
            renamed[prefix + "text_projection"] = value.T.contiguous()
        elif key in names:
            renamed[prefix + names[key]] = value
        elif ".q_proj." in key:
            q_k_v = torch.cat([state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            layer, kind = key.removeprefix("text_model.encoder.layers.").split(".self_attn.q_proj.")
            renamed[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{kind}"] = q_k_v
        elif ".k_proj." not in key and ".v_proj." not in key:
            name = key.removeprefix("text_model.encoder.layers.")
            for ours, theirs in _OPEN_CLIP.items():
                name = name.replace(ours, theirs)
            renamed[f"{prefix}transformer.resblocks.{name}"] = value
    return renamed


def _renamed(state: State, beginnings: dict[str, str], inner: dict[str, str], prefix: str) -> State:
    """Replace the beginnings of keys, and in a resnet's or an attention's keys what follows."""
    renamed: State = {}
    for key, value in state.items():
        ours = max((name for name in beginnings if key.startswith(name)), key=len, default="")
        rest = key.removeprefix(ours)
        for name, theirs in inner.items() if "resnets" in key or "attn_1" in beginnings.get(ours, "") else ():
            if rest.startswith(name):
                rest = theirs + rest.removeprefix(name)
        renamed[prefix + beginnings.get(ours, "") + rest] = value
    return renamed
