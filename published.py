"""Files of others: INFD, OpenAI's consistency models, LDM and Stable Diffusion v1; safetensors.
What a file holds is read from its options or the names and shapes of its tensors, and the weights
get our names. Nothing in a file is executed. Read next: models.py, which makes models of it.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from autoencoder import AutoencoderConfig
from ldm import DiffusionConfig, GaussianDiffusion, UNetConfig, qkv_from_legacy
from runs import read_checkpoint, unflatten
from text import TextConfig


# ---- safetensors ----

DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
          "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
          "U32": torch.uint32, "F32": torch.float32, "I64": torch.int64, "U64": torch.uint64,
          "F64": torch.float64}
MOST_HEADER = 100_000_000         # bytes, as for the reference reader
LONGEST_NAME = 1_000


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file, trusting nothing in it: name -> tensor on the CPU, types as stored.

    Every rule of the format is checked, also where its reference reader is lenient, and before
    memory is taken for what a header claims. Raises FileNotFoundError, and ValueError with one line
    on what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    with path.open("rb") as file:
        try:
            header, left = _read_header(file, path.stat().st_size)
            entries = _check_entries(header, left)
            return {name: _read_tensor(file, *entry) for name, entry in entries.items()}
        except ValueError as error:
            raise ValueError(f"{path} is no sound safetensors file: {error}") from error


def _read_header(file: BinaryIO, size: int) -> tuple[dict, int]:
    """The header, parsed, and how many bytes follow it."""
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    length, = struct.unpack("<Q", file.read(8))
    if length > min(MOST_HEADER, size - 8):
        raise ValueError(f"its header claims {length:,} bytes, and the file has {size:,}")
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise ValueError("its header does not begin with {")
    try:
        return json.loads(raw.decode(), object_pairs_hook=_table), size - 8 - length
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error


def _table(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header has a name twice")
    return found


def _check_entries(header: dict, size: int) -> dict[str, tuple]:
    """name -> (dtype, shape, bytes), in the order of the data, which they cover completely."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not a table of texts")

    found = []
    for name, entry in header.items():
        name.encode()                                                # half a character: ValueError
        if len(name) > LONGEST_NAME:
            raise ValueError(f"it has a name of {len(name):,} characters")
        try:
            found.append((*_check_entry(entry), name))
        except ValueError as error:
            raise ValueError(f"tensor {name[:80]!r} {error}") from error

    at = 0
    entries = {}
    for begin, end, dtype, shape, name in sorted(found, key=lambda row: row[:2]):
        if begin != at:
            raise ValueError(f"tensor {name[:80]!r} begins at byte {begin}, not where the one "
                             f"before ends, at {at}")
        at = end
        entries[name] = (dtype, shape, end - begin)
    if at != size:
        raise ValueError(f"its tensors take {at:,} bytes, and {size:,} follow the header")
    return entries


def _check_entry(entry: object) -> tuple[int, int, torch.dtype, list[int]]:
    """(begin, end, dtype, shape) of one tensor; ValueError if they make no sense together."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("has not exactly dtype, shape and data_offsets")
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"has type {str(dtype)[:20]}, which is none of {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(map(_is_size, numbers)):
            raise ValueError("has a shape or offsets that are no list of numbers from 0 on")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError("has offsets that are not a begin and an end")
    if len(shape) > 64 or not _is_size(math.prod(side for side in shape if side)):
        raise ValueError("has a shape that no tensor can have")

    begin, end = offsets
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"has {end - begin:,} bytes, which do not fit shape {shape} of {dtype}")
    return begin, end, DTYPES[dtype], shape


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**63               # True is an int, and 4.0 == 4


def _read_tensor(file: BinaryIO, dtype: torch.dtype, shape: list[int], size: int) -> Tensor:
    if not size:
        return torch.empty(shape, dtype=dtype)
    data = bytearray(size)
    if file.readinto(data) < size:
        raise ValueError("it became shorter while it was read")
    if dtype == torch.bool:                                          # a byte may be 2 and more
        return torch.frombuffer(data, dtype=torch.uint8).ne(0).reshape(shape)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


# ---- files of Stable Diffusion v1 and LDM ----

class Nothing:
    """Stands for a class that a .ckpt names, such as a callback of training, and does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


WEIGHT_FILES = (".safetensors", ".ckpt")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors or .ckpt file: name -> tensor. Nothing in it is executed.

    Raises FileNotFoundError, and ValueError where it is damaged or has no tensors by name.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\3\4"                         # as torch.load decides it
    unknown = _stand_ins(path) if archive else []
    with torch.serialization.safe_globals(unknown):
        content = read_checkpoint(path)
    content = content.get("state_dict", content)
    tensors = {}
    if isinstance(content, dict):
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{path} holds no tensors by name")
    return tensors


def _stand_ins(path: Path) -> list[tuple[type, str]]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:                                # damage makes it raise anything
        raise ValueError(f"{path} cannot be read as a checkpoint") from error
    return [(Nothing, name) for name in names]


# (what it is, a part of a name that only such files have)
FOREIGN = (
    ("a LoRA, which holds only changes to weights", "lora_"),
    ("Stable Diffusion XL", "conditioner.embedders."),
    ("Stable Diffusion XL or class-conditional", "model.diffusion_model.label_emb."),
    ("Stable Diffusion 2", "cond_stage_model.model."),
    ("LDM's text-to-image, which reads by BERT", "cond_stage_model.transformer.token_emb."),
    ("a ControlNet", "control_model."),
    ("Stable Diffusion 3", ".joint_blocks."),
    ("Flux", "double_blocks."),
    ("a UNet of diffusers; take the file that holds the whole model", "time_embedding.linear_1."),
)
UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
TEXT = "cond_stage_model.transformer."
# Tables that follow from the options, and networks that only the training needed.
LEFT_OUT = re.compile(r"embeddings\.position_ids$|^first_stage_model\.loss\.|^model_ema\.decay$|"
                      r"^model_ema\.num_updates$|^(alphas_|sqrt_|log_one_minus_|posterior_)")
AVERAGED = "model_ema."
SCALE = 0.18215                   # the UNet sees the latent times this; LDM's VQ models have 1


@dataclass(frozen=True)
class Parts:
    """The parts of a file of Stable Diffusion v1 or LDM by our names, in float32; empty: absent."""

    unet: dict[str, Tensor]           # of UNet; self-attention (models without text) in LDM's order
    autoencoder: dict[str, Tensor]    # encoder.*, decoder.*, quantizer.*, and as renderer.* the end
    text: dict[str, Tensor]           # of TextTransformer
    schedule: DiffusionConfig
    averaged: bool                    # the UNet is the moving average beside trained weights
    scale: float | None               # the UNet sees the latent times this; None: it does not say
    unknown: tuple[str, ...]          # names of tensors that have no place in a model


def split_weights(weights: dict[str, Tensor], raw: bool = False) -> Parts:
    """Split a file of Stable Diffusion v1 or LDM, or of its autoencoder alone, into parts.

    raw takes the trained weights of the UNet where the file also has their moving average. Which
    networks fit is left to loading; other kinds of models are refused here. Raises ValueError.
    """
    refuse_foreign(weights)
    weights = {name: value for name, value in weights.items() if not LEFT_OUT.search(name)}
    unet = below(weights, UNET)
    autoencoder = below(weights, AUTOENCODER)
    text = below(weights, TEXT)
    used = (UNET, AVERAGED, AUTOENCODER, TEXT, "betas", "scale_factor")
    if not unet and not autoencoder and not text:                    # an autoencoder on its own
        if "encoder.conv_in.weight" not in weights:
            raise ValueError(f"these are no weights of Stable Diffusion v1 or LDM, whole or their "
                             f"autoencoder (names: {', '.join(list(weights)[:5])}, ...)")
        used = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
        autoencoder = {k: v for k, v in weights.items() if k.startswith(used)}

    averaged = bool(below(weights, AVERAGED + "diffusion_model")) and not raw
    if averaged:
        unet = averaged_weights(weights, list(unet))
    unknown = [name for name in weights if not name.startswith(used)]
    text = {"text_model." + k.removeprefix("text_model."): v for k, v in text.items()}
    return Parts(_float(unet), _float(our_autoencoder(autoencoder)), _float(text),
                 schedule(weights), averaged, latent_scale(weights), tuple(unknown))


def latent_scale(weights: dict[str, Tensor]) -> float | None:
    """What a file of LDM says that latents are multiplied by, where it has been measured."""
    if "scale_factor" not in weights:
        return None
    scale = weights["scale_factor"]
    if scale.numel() != 1 or not 0 < scale.item() < math.inf:
        raise ValueError("scale_factor, by which its latents are multiplied, is no number above 0")
    return scale.item()


def refuse_foreign(weights: dict[str, Tensor]) -> None:
    """ValueError that names what a file is, if it is a known kind that this project cannot use."""
    for kind, mark in FOREIGN:
        if any(mark in name for name in weights):
            raise ValueError(f"this is {kind}; this project reads Stable Diffusion v1")
    first = weights.get(UNET + "input_blocks.0.0.weight")
    if first is not None and first.dim() == 4 and first.shape[1] in (5, 8, 9):
        kind = {5: "a depth", 8: "a picture-editing", 9: "an inpainting"}[first.shape[1]]
        raise ValueError(f"this is {kind} model, whose UNet takes {first.shape[1]} channels; "
                         f"this project reads the text-to-image model")
    projection = weights.get(UNET + "middle_block.1.proj_in.weight")
    if projection is not None and projection.dim() == 2:
        raise ValueError("this is Stable Diffusion 2; this project reads Stable Diffusion v1")


def averaged_weights(weights: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The moving average of a UNet's weights, whose names in the file have lost all their dots."""
    found = {}
    for name in names:
        key = AVERAGED + ("diffusion_model." + name).replace(".", "")
        if key not in weights:
            raise ValueError(f"the moving average lacks {name}; --raw takes the trained weights")
        found[name] = weights[key]
    return found


def below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of the part whose names begin so, without that beginning."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _float(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float32; ValueError for those of a quantised file, whose scales lie elsewhere."""
    for name, value in weights.items():
        if not value.is_floating_point():
            raise ValueError(f"{name} is of {value.dtype}, not of floating point: take a file that "
                             f"is not quantised")
    return {name: value.float() for name, value in weights.items()}


# ---- names ----

OURS = {"quant_conv.": "encoder.quant_conv.",             # LDM -> ours, by beginning
        "post_quant_conv.": "decoder.post_quant_conv.",
        "quantize.embedding.": "quantizer.embedding.",
        "decoder.norm_out.": "renderer.norm_out.",
        "decoder.conv_out.": "renderer.conv_out."}
DIFFUSERS = (                         # diffusers -> published; all that fit, in this order
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("attn_1.group_norm.", "attn_1.norm."),
    ("attn_1.to_q.", "attn_1.q."),
    ("attn_1.to_k.", "attn_1.k."),
    ("attn_1.to_v.", "attn_1.v."),
    ("attn_1.to_out.0.", "attn_1.proj_out."),
    ("attn_1.query.", "attn_1.q."),                                  # older files
    ("attn_1.key.", "attn_1.k."),
    ("attn_1.value.", "attn_1.v."),
    ("attn_1.proj_attn.", "attn_1.proj_out."),
    ("down_blocks.", "down."),
    (".resnets.", ".block."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
)


def our_autoencoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an autoencoder with LDM's names or those of diffusers to ours.

    What LDM's decoder ends with, from features to RGB, is named renderer: the renderer replaces it.
    """
    ours = {}
    for name, value in from_diffusers(weights).items():
        ours[_renamed(name, OURS)] = value
    return ours


def _renamed(name: str, rules: dict[str, str]) -> str:
    """The name with its beginning exchanged by the first rule that fits."""
    for old, new in rules.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def from_diffusers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an autoencoder by LDM's names, unchanged if these are its names already."""
    if not any(".resnets." in name for name in weights):
        return weights
    levels = _count(weights, "decoder.up_blocks.{}.resnets.0.conv1.weight")
    found = {}
    for name, value in weights.items():
        for old, new in DIFFUSERS:
            name = name.replace(old, new)
        up = re.match(r"decoder\.up_blocks\.(\d{1,3})\.", name)
        if up:                                                       # 0 is the coarsest level
            name = f"decoder.up.{levels - 1 - int(up[1])}." + name[up.end():]
        if ".attn_1." in name and value.dim() == 2:
            value = value[:, :, None, None]                          # a linear layer is a 1x1 conv
        found[name] = value
    return found


# ---- what the shapes tell ----

def _side(weights: dict[str, Tensor], name: str, axis: int = 0) -> int:
    """One side of a tensor. ValueError if there is no such tensor."""
    if name not in weights or weights[name].dim() <= axis:
        raise ValueError(f"{name} is missing or has another form; this is no model of LDM's kind")
    return weights[name].shape[axis]


def _count(weights: dict[str, Tensor], name: str) -> int:
    """How many layers there are in a row: those that `name` names with 0, 1, ... for {}."""
    n = 0
    while name.format(n) in weights:
        n += 1
    return n


def _multiples(widths: list[int], unit: int) -> tuple[int, ...]:
    if not widths or not unit or any(width % unit for width in widths):
        raise ValueError(f"levels of {widths} channels are no multiples of {unit}")
    return tuple(width // unit for width in widths)


def autoencoder_config(weights: dict[str, Tensor], groups: int = 32) -> AutoencoderConfig:
    """The configuration of an autoencoder from the tensors of `our_autoencoder`.

    The groups of its norms leave no trace in the shapes; all published ones have 32.
    """
    level = "encoder.down.{}.block.0.conv1.weight"
    widths = [_side(weights, level.format(i)) for i in range(_count(weights, level))]
    blocks = _count(weights, "encoder.down.0.block.{}.conv1.weight")
    ch = _side(weights, "encoder.conv_in.weight")
    z_channels = _side(weights, "decoder.conv_in.weight", 1)
    cfg = AutoencoderConfig(ch, _multiples(widths, ch), blocks, z_channels, renderer="pixels",
                            groups=groups)
    if "quantizer.embedding.weight" not in weights:
        return replace(cfg, kl=True)
    return replace(cfg, n_embed=_side(weights, "quantizer.embedding.weight"))


def unet_config(weights: dict[str, Tensor], heads: int = 8) -> UNetConfig:
    """The configuration of a UNet of LDM's kind from its tensors.

    Heads leave no trace in the shapes. Stable Diffusion v1 and LDM's larger text-to-image model
    have 8 everywhere; the smaller one (context 640) and models without text heads of 32 channels.
    """
    levels = [[]]                                                    # a block: (channels, attends)
    for i in range(1, len(weights)):
        layer = f"input_blocks.{i}.0.in_layers.2.weight"
        if f"input_blocks.{i}.0.op.weight" in weights:
            levels.append([])
        elif layer in weights:
            levels[-1].append((_side(weights, layer), f"input_blocks.{i}.1.norm.weight" in weights))
        else:
            break
    if any(len(level) != len(levels[0]) or len(set(level)) != 1 for level in levels):
        raise ValueError("blocks of this UNet differ within a level; it is no model of LDM's kind")

    block = "middle_block.1.transformer_blocks.{}.attn2.to_k.weight"
    depth = _count(weights, block)
    context = _side(weights, block.format(0), 1) if depth else 0
    by_width = context in (0, 640)
    width = _side(weights, "input_blocks.0.0.weight")
    return UNetConfig(
        in_channels=_side(weights, "input_blocks.0.0.weight", 1),
        out_channels=_side(weights, "out.2.weight"),
        model_channels=width,
        channel_mult=_multiples([level[0][0] for level in levels], width),
        num_res_blocks=len(levels[0]),
        attention_ds=tuple(2**k for k, level in enumerate(levels) if level[0][1]),
        num_head_channels=32 if by_width else 0,
        num_heads=1 if by_width else heads,
        context_dim=context,
        transformer_depth=max(depth, 1))


def text_config(weights: dict[str, Tensor], heads: int = 0) -> TextConfig:
    """The configuration of a text transformer; heads 0: of 64 channels each, as CLIP's."""
    layers = _count(weights, "text_model.encoder.layers.{}.mlp.fc1.weight")
    tokens = "text_model.embeddings.token_embedding.weight"
    places = "text_model.embeddings.position_embedding.weight"
    width = _side(weights, tokens, 1)
    hidden = _side(weights, "text_model.encoder.layers.0.mlp.fc1.weight")
    return TextConfig(width, layers, heads or max(width // 64, 1), hidden,
                      _side(weights, tokens), _side(weights, places))


SD_V1 = DiffusionConfig(beta_start=0.00085, beta_end=0.012, sqrt_beta=True, ddim_start=1)
KNOWN = (SD_V1, *(DiffusionConfig(sqrt_beta=sqrt, ddim_start=1) for sqrt in (True, False)))   # LDM


def schedule(weights: dict[str, Tensor]) -> DiffusionConfig:
    """The schedule of a file from its betas; if it has none, Stable Diffusion v1's.

    Raises ValueError if the betas are neither linear nor linear in their square roots.
    """
    if "betas" not in weights:
        return SD_V1
    stored = weights["betas"]
    n = len(stored) if stored.dim() == 1 and stored.is_floating_point() else 0
    betas = stored.double()
    if n < 2 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError("the betas of this file are no noise schedule")

    close = max(1e-5, 2 * torch.finfo(stored.dtype).eps)         # of a file in half precision
    start, end = (float(f"{end:.6g}") for end in (betas[[0, -1]] * n / 1000).tolist())
    found = [cfg for cfg in KNOWN if cfg.steps == n]
    if start <= end < n / 1000:
        found += [DiffusionConfig(n, start, end, sqrt, ddim_start=1) for sqrt in (True, False)]
    for cfg in found:
        if (GaussianDiffusion(cfg).betas - betas).abs().max() < close * betas[-1]:
            return cfg
    raise ValueError("the betas of this file are not linear, nor are their square roots")


# ---- whole models ----

Network = tuple[object, dict[str, Tensor]]               # its configuration, its weights


@dataclass(frozen=True)
class Model:
    """What models.py makes a latent diffusion model of."""

    autoencoder: Network
    unet: Network | None              # None in a file of an autoencoder
    diffusion: DiffusionConfig
    size: int                         # side of the encoder's input, pixels
    weights: str                      # which weights these are
    scale: float = 1.0                # the UNet sees the latent times this
    text: Network | None = None


def sd_model(weights: dict[str, Tensor], raw: bool) -> Model:
    """The model of a file of Stable Diffusion v1 or LDM, or of an autoencoder alone.

    The size is not in the file: latents are taken to be 64 x 64, as those of Stable Diffusion v1
    and of most of LDM's models.
    """
    parts = split_weights(weights, raw)
    if not parts.autoencoder:
        raise ValueError("it has no autoencoder; take the file that holds the whole model")
    if parts.unknown:
        print(f"left out {len(parts.unknown)} tensors that no part of a model takes: "
              f"{', '.join(parts.unknown[:3])}, ...", file=sys.stderr)
    cfg = autoencoder_config(parts.autoencoder)
    unet = None
    text = None
    if parts.unet:
        unet_cfg = unet_config(parts.unet)
        unet = (unet_cfg, adm_weights(parts.unet, unet_cfg.num_head_channels))
    if unet and not unet_cfg.in_channels == unet_cfg.out_channels == cfg.z_channels:
        raise ValueError(f"its UNet takes {unet_cfg.in_channels} channels and its latents have "
                         f"{cfg.z_channels}: it is no model that draws from noise alone")
    if unet and unet_cfg.context_dim:
        if not parts.text:
            raise ValueError("it has no text encoder; take the file that holds the whole model")
        text = (text_config(parts.text), parts.text)
    return Model((cfg, parts.autoencoder), unet, parts.schedule, 64 * cfg.f,
                 "published EMA" if parts.averaged else "published weights",
                 parts.scale or (SCALE if cfg.kl else 1.0), text)


# Names of INFD's parameters -> ours, by prefix; the first that fits wins. Ours goes on without.
PUBLISHED_NAMES = {"encoder.0.": "encoder.", "encoder.1.": "encoder.quant_conv.",
                   "decoder.0.": "decoder.post_quant_conv.", "decoder.1.": "decoder.",
                   "renderer.net.model.": "renderer.model.", "renderer.net.": "renderer."}


def infd_model(args: dict, sd: dict[str, Tensor], raw: bool) -> Model:
    """The model of a published INFD file, every key accounted for."""
    renderer = args["renderer"]["args"]["net"]
    if renderer["name"] != "simple_renderer_net":
        raise ValueError(f"its renderer is {renderer['name']}, which this project does not have")
    hidden = (renderer.get("args") or {}).get("hidden_channels", AutoencoderConfig.hidden)
    spec = {"n_embed": args.get("n_embed", AutoencoderConfig.n_embed), "hidden": hidden,
            "z_channels": args["z_shape"][0], "kl": not args.get("quantizer", False)}
    for name, value in (args["encoder"].get("args") or {}).items():
        if name not in ("z_channels", "resolution", "double_z"):     # said elsewhere, or not needed
            spec[name] = value
    cfg = unflatten(AutoencoderConfig, spec)
    others = ("z_dm.", "z_dm_ema.", "perc_loss.", "disc.")
    autoencoder = {_renamed(key, PUBLISHED_NAMES): value.float()
                   for key, value in sd.items() if not key.startswith(others)}

    unet = None
    if "z_dm" in args:                                               # else a file of stage 1
        spec = {k.replace("attention_resolutions", "attention_ds"): v
                for k, v in (args["z_dm"].get("args") or {}).items() if k != "image_size"}
        unet_cfg = unflatten(UNetConfig, spec)                       # which has their defaults
        own = below(sd, "z_dm." if raw else "z_dm_ema.")
        unet = (unet_cfg, adm_weights(_float(own), unet_cfg.num_head_channels))
    betas = {k.removeprefix("linear_"): v for k, v in (args.get("z_dp") or {}).items()}
    return Model((cfg, autoencoder), unet, unflatten(DiffusionConfig, betas),
                 args["z_shape"][1] * cfg.f, "published weights" if raw else "published EMA")


def adm_weights(weights: dict[str, Tensor], head: int) -> dict[str, Tensor]:
    """Weights of ADM's UNet as ours: attention has Conv1d there, Conv2d here.

    head: channels of a head where q, k and v lie head by head (INFD); 0: q|k|v, as ours (OpenAI).
    """
    ours = {}
    for name, value in weights.items():
        if ".qkv." in name and head:
            value = qkv_from_legacy(value, value.shape[0] // 3 // head)
        ours[name] = value[..., None] if value.dim() == 3 else value         # (out, in, 1, 1)
    return ours


# The networks that OpenAI published, cd_* and ct_*: of ImageNet at 64 px, of LSUN at 256 px.
OPENAI = {64: UNetConfig(model_channels=192, num_res_blocks=3, num_head_channels=64,
                         scale_shift_norm=True, resblock_updown=True, num_classes=1000),
          256: UNetConfig(model_channels=256, channel_mult=(1, 1, 2, 2, 4, 4), num_head_channels=64,
                          attention_ds=(8, 16, 32), resblock_updown=True)}


def openai_network(weights: dict[str, Tensor], name: str) -> tuple[int, Network]:
    """(size, network) of a consistency model of OpenAI, whose file is a flat dict of weights."""
    if name.startswith("edm_"):
        raise ValueError("a plain denoiser: edm_* files are no longer read; cd_* and ct_* are")
    size = 64 if "label_emb.weight" in weights else 256
    return size, (OPENAI[size], adm_weights(_float(weights), 0))
