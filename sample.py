"""From a checkpoint to pictures at any resolution.

INFD: z ~ diffusion, phi = D(z), pixels = R(phi, coord, cell) (Section J; 200 DDIM steps, eta 1, tiles of 256 px).
CM-Func: one call of the generator gives an image function, drawn wherever it is asked (Appendix D.3.1).
Sampling needs neither losses nor optimisers. Reads the checkpoints of train.py, published INFD files, and OpenAI's
consistency models. See clif.py for the renderer, ldm.py for DDIM, consistency.py for one-step sampling.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import pickle
import struct
import sys
import time
import typing
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import metrics
from autoencoder import AutoencoderConfig, FieldAutoencoder
from clif import Means, render_tiles
from consistency import (ConsistencyConfig, ConsistencyModel, sample_function, sample_heun, sample_multistep,
                         sample_onestep)
from data import rng, torch_noise
from inr_generator import DiT, FunctionGenerator, GeneratorConfig, ImageFunction, TransformerConfig, UViT
from ldm import DiffusionConfig, GaussianDiffusion, UNet, UNetConfig, qkv_from_legacy

# ---- checkpoint files ------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first."""
    return sorted(run.glob("step-*.pt"), reverse=True)


FORMAT = 1                      # of our own checkpoints; a file of a later one is refused, not guessed at


def read_checkpoint(path: str | Path) -> dict:
    """Read one checkpoint file. Nothing in it is executed, and a flipped byte is found by the archive's checksums.

    Raises FileNotFoundError where there is no such file and ValueError where it is damaged or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; name a file or a run folder written by train.py")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a complete checkpoint (truncated, or not written by torch.save)")
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()                     # torch.load does not look at the checksums itself
        if bad is not None:
            raise ValueError(f"{path} is damaged: the checksum of {bad} does not match; use an older checkpoint")
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values and was not opened") from error
    if not isinstance(ckpt, dict):
        raise ValueError(f"{path} is not a checkpoint: expected a dict, found {type(ckpt).__name__}")
    if "stage" in ckpt and ckpt.get("format", 1) != FORMAT:
        raise ValueError(f"{path} has checkpoint format {ckpt['format']}, this version reads {FORMAT}; update the code")
    return ckpt


def newest_checkpoint(run: Path) -> tuple[Path, dict]:
    """The newest readable checkpoint of a run folder; a damaged one is named and the one before it is used."""
    files = checkpoints(run)
    if not files:
        raise FileNotFoundError(f"no checkpoint (step-*.pt) in {run}; train one with train.py")
    for path, older in zip(files, files[1:]):
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            print(f"warning: {error}; falling back to {older}", file=sys.stderr)
    return files[-1], read_checkpoint(files[-1])


def build(cls: type, values: dict):
    """A (nested) frozen dataclass from the plain dict that `dataclasses.asdict` made of it; unknown keys are errors."""
    types = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ValueError(f"unknown {cls.__name__} option {', '.join(unknown)}; written by another version?")
    made = {k: build(types[k], v) if dataclasses.is_dataclass(types[k]) else tuple(v) if isinstance(v, list) else v
            for k, v in values.items()}
    return cls(**made)


def fill(module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Load weights by name and shape; a ValueError names what does not fit, or is not finite."""
    own = module.state_dict()
    wrong = [f"missing {k}" for k in own if k not in weights] + [f"left over {k}" for k in weights if k not in own]
    wrong += [f"{k} is {tuple(weights[k].shape)}, not {tuple(v.shape)}"
              for k, v in own.items() if k in weights and weights[k].shape != v.shape]
    wrong += [f"{k} is not finite" for k in own if k in weights and not torch.isfinite(weights[k]).all()]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{what} does not fit: {'; '.join(wrong[:5])}{more}")
    module.load_state_dict(weights)


# ---- INFD ------------------------------------------------------------------------------------------------------------


class LatentScale(nn.Module):
    """Shift and scale between the autoencoder's latent and the unit-variance latent that diffusion learns.

    The published code has none (diffusion runs on z as it is), which is the identity set here; train.py measures both
    numbers per channel where `latent_norm` is on, because a short training cannot afford a wrong signal-to-noise ratio.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, z: Tensor) -> Tensor:
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    def inverse(self, z: Tensor) -> Tensor:
        return z * self.std[:, None, None] + self.mean[:, None, None]


# How a latent is drawn, and in how many steps if none are given: ddim as published; the others in as many as brought
# the pictures within 40 dB of 200 steps of ddim (--compare-samplers, on a model of preset tiny).
SAMPLERS = {"ddim": 200, "dpm++": 20, "heun": 20}
NEEDS_LDM = "this checkpoint is an autoencoder (stage ae); sampling needs one of stage ldm"


@dataclass
class INFD:
    """An image neural field diffusion model, rebuilt from a checkpoint alone."""

    autoencoder: FieldAutoencoder
    unet: UNet | None                       # None in a checkpoint of stage ae
    diffusion: GaussianDiffusion
    scale: LatentScale
    size: int                               # side of the encoder's input, pixels
    patch: int                              # side of the training patch, pixels: the tile the renderer knows
    classes: tuple[str, ...] = ()
    step: int = 0
    weights: str = "published"              # which weights these are: EMA or not
    file: Path = Path()                     # where they were read from

    def to(self, device: torch.device | str) -> "INFD":
        for module in (self.autoencoder, self.unet, self.scale):
            if module is not None:
                module.to(device).eval().requires_grad_(False)
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        cfg = self.autoencoder.cfg
        return cfg.z_channels, self.size // cfg.f, self.size // cfg.f

    @torch.no_grad()
    def sample(self, indices: list[int], seed: int = 0, steps: int | None = None, eta: float = 1.0,
               latent_size: tuple[int, int] | None = None, labels: list[int] | None = None,
               progress: Callable = lambda steps: steps, sampler: str = "ddim") -> Tensor:
        """Latents z (n, C, h, w) of the images numbered `indices`; each is a function of (seed, index) alone.

        sampler is one of SAMPLERS, which has the steps taken by default; all begin at the same noise, and only ddim
        adds more (eta). latent_size draws a larger noise map with the same network: convolutional sampling (INFD,
        Section D). labels are one class per image (default: drawn from seed and index); progress wraps the iterable of
        denoising steps (tqdm, say). Raises ValueError for an autoencoder checkpoint.
        """
        if self.unet is None:
            raise ValueError(NEEDS_LDM)
        device = next(self.unet.parameters()).device
        shape = (self.latent_shape[0], *(latent_size or self.latent_shape[1:]))

        def noise(*key) -> Tensor:                                           # per image: batch size plays no part
            return torch.stack([torch_noise(shape, seed, *key, i) for i in indices]).to(device)

        y = draw_labels(self.unet.cfg.num_classes, indices, seed, labels, device)
        loops = {"ddim": functools.partial(self.diffusion.ddim_loop, eta=eta, noise=lambda k: noise("ddim", k)),
                 "dpm++": self.diffusion.dpm_loop, "heun": self.diffusion.heun_loop}
        walk = loops[sampler](self.unet, noise("x_T"), steps or SAMPLERS[sampler], y=y)
        for x_t, _ in progress(walk):                                        # (n, C, h, w)
            pass
        return self.scale.inverse(x_t)

    @torch.no_grad()
    def render(self, z: Tensor, res: int | tuple[int, int], **options) -> Tensor:
        """Latents z (n, C, h, w) -> pictures (n, 3, H, W); options as in `clif.render_tiles`."""
        return self.autoencoder.render(self.autoencoder.decode(z), res, **{"tile": self.patch, **options})


def draw_labels(n: int, indices: list[int], seed: int, labels: list[int] | None, device) -> Tensor | None:
    """Class labels (n,): those given, else uniform draws from (seed, index); None where there are no classes."""
    if not n:
        return None
    return torch.tensor(labels or [int(rng(seed, "label", i).integers(n)) for i in indices], device=device)


# ---- one-step models -------------------------------------------------------------------------------------------------


# The four generators of CM-Func: name -> (network, its configuration, the field of that configuration in a run).
GENERATORS = {"func": (FunctionGenerator, GeneratorConfig, "func"), "unet": (UNet, UNetConfig, "unet"),
              "uvit": (UViT, TransformerConfig, "vit"), "dit": (DiT, TransformerConfig, "vit")}


def generator_parts(name: str) -> tuple[type, type, str]:
    """The entry of GENERATORS; ValueError for an unknown name."""
    if name not in GENERATORS:
        raise ValueError(f"unknown generator {name}; there are: {', '.join(GENERATORS)}")
    return GENERATORS[name]


def build_generator(name: str, configs: Callable[[str], object]) -> nn.Module:
    """A generator by name; configs(field) gives its configuration. ValueError for an unknown name."""
    network, _, field = generator_parts(name)
    return network(configs(field))


@dataclass
class OneStep:
    """A consistency model, rebuilt from a checkpoint alone."""

    f: ConsistencyModel
    size: int                               # training resolution, which is also that of the noise (CM-Func D.3.1)
    second: float = 0.0                     # noise level of the second of two steps; 0: none is known
    heun: bool = False                      # a plain EDM denoiser, which needs many steps
    classes: tuple[str, ...] = ()
    step: int = 0
    weights: str = "published"              # which weights these are: EMA or not
    file: Path = Path()                     # where they were read from

    def to(self, device: torch.device | str) -> "OneStep":
        self.f.to(device).eval().requires_grad_(False)
        return self

    def noise(self, indices: list[int], seed: int, k: int = 0) -> Tensor:
        """(n, 3, S, S): the k-th standard normal of each image, a function of (seed, index, k) alone."""
        made = [torch_noise((3, self.size, self.size), seed, "x_T", i, k) for i in indices]
        return torch.stack(made).to(next(self.f.parameters()).device)

    def labels(self, indices: list[int], seed: int, labels: list[int] | None) -> Tensor | None:
        return draw_labels(self.f.net.cfg.num_classes, indices, seed, labels, next(self.f.parameters()).device)

    def sample(self, indices: list[int], seed: int = 0, sigmas: tuple[float, ...] = (),
               labels: list[int] | None = None) -> Tensor:
        """Images (n, 3, S, S) in [-1, 1]: one step, and one more from each of the noise levels `sigmas`."""
        y, noises = self.labels(indices, seed, labels), [self.noise(indices, seed, k) for k in range(len(sigmas) + 1)]
        if not sigmas:
            return sample_onestep(self.f, noises[0], y)
        return sample_multistep(self.f, noises, (self.f.cfg.sigma_max, *sigmas), y)

    def functions(self, indices: list[int], seed: int = 0, labels: list[int] | None = None) -> ImageFunction:
        """Image functions, one step: n images to be drawn at any resolution. ValueError where F makes pixels."""
        return sample_function(self.f, self.noise(indices, seed), self.labels(indices, seed, labels))

    def denoise(self, indices: list[int], seed: int, steps: int, labels: list[int] | None = None) -> Tensor:
        """Images of an EDM denoiser: Heun's method on a grid of `steps` levels."""
        return sample_heun(self.f, self.noise(indices, seed), steps, self.labels(indices, seed, labels))


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(path: str | Path, device: torch.device | str = "cpu", raw: bool = False) -> INFD | OneStep:
    """Rebuild a model from a checkpoint of train.py (a file or its run folder) or from a published file.

    raw takes the trained weights where the checkpoint also has their moving average (the default). Published files are
    known by what is in them: INFD's {'model': {'name', 'args', 'sd'}}, OpenAI's flat dict of a UNet.
    Raises FileNotFoundError, or ValueError naming what does not fit.
    """
    path = Path(path)
    path, ckpt = newest_checkpoint(path) if path.is_dir() else (path, read_checkpoint(path))
    model = ckpt.get("model")
    if "stage" in ckpt:
        if ckpt["stage"] not in ("ae", "ldm", "cm"):
            raise ValueError(f"{path} is a checkpoint of stage {ckpt['stage']}; expected ae, ldm or cm")
        made = cm_from_checkpoint(ckpt, raw) if ckpt["stage"] == "cm" else from_checkpoint(ckpt, raw)
    elif isinstance(model, dict) and {"name", "args", "sd"} <= set(model):
        made = from_published(model, raw)
    elif {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= set(ckpt):
        made = from_openai(ckpt, path.name)
    else:
        raise ValueError(f"{path} is neither a checkpoint of train.py nor a published INFD or OpenAI file "
                         f"(its keys: {', '.join(map(str, list(ckpt)[:8]))})")
    return dataclasses.replace(made, file=path).to(device)


def pick_weights(state: dict, raw: bool) -> tuple[dict, str]:
    """The moving average where there is one and raw does not ask for the trained weights; and what they are called."""
    if raw and "model" not in state:
        raise ValueError("this file holds the moving average of the weights only; leave --raw out")
    return (state["model"], "trained weights") if raw or "ema" not in state else (state["ema"], "EMA")


def cm_from_checkpoint(ckpt: dict, raw: bool = False) -> OneStep:
    """The one-step model of a checkpoint of stage cm."""
    config, state = ckpt["config"], ckpt["state"]
    name = config["generator"]
    net = build_generator(name, lambda field: build(generator_parts(name)[1], config[field]))
    weights, kind = pick_weights(state, raw)
    fill(net, weights, f"the generator {name}")
    cfg = build(ConsistencyConfig, config["cm"])
    # iCT and ECT publish 0.821 for 32 px; for the paper's recipe the level published for LSUN with the same s1.
    second = 0.821 if cfg.metric == "huber" else float(cfg.karras_sigmas(151)[67])
    return OneStep(ConsistencyModel(net, cfg), config["size"], second, classes=tuple(ckpt.get("classes", ())),
                   step=ckpt["step"], weights=kind)


def from_checkpoint(ckpt: dict, raw: bool = False) -> INFD:
    """The model of one of our own checkpoints."""
    config, state = ckpt["config"], ckpt["state"]
    weights, kind = pick_weights(state, raw)
    ae = ckpt if ckpt["stage"] == "ae" else ckpt["autoencoder"]
    autoencoder = FieldAutoencoder(build(AutoencoderConfig, ae["config"]["ae"]))
    scale, unet = LatentScale(autoencoder.cfg.z_channels), None
    diffusion = GaussianDiffusion(DiffusionConfig())
    if ckpt["stage"] == "ae":
        fill(autoencoder, weights, "the autoencoder")
    else:
        fill(autoencoder, ae["weights"], "the autoencoder")
        unet = UNet(build(UNetConfig, config["unet"]))
        fill(unet, weights, "the UNet")
        fill(scale, state["scale"], "the latent scale")
        diffusion = GaussianDiffusion(build(DiffusionConfig, config["diffusion"]))
    return INFD(autoencoder, unet, diffusion, scale, size=ae["config"]["size"], patch=ae["config"]["patch"],
                classes=tuple(ckpt.get("classes", ())), step=ckpt["step"], weights=kind)


# Published parameter names -> ours, by prefix (first match wins). What only training used is dropped by name.
PUBLISHED_NAMES = (
    ("encoder.0.", "encoder."), ("encoder.1.", "encoder.quant_conv."),
    ("decoder.0.", "decoder.post_quant_conv."), ("decoder.1.", "decoder."),
    ("quantizer.", "quantizer."), ("renderer.net.model.", "renderer.model."), ("renderer.net.", "renderer."),
)
PUBLISHED_TRAINING_ONLY = ("perc_loss.", "disc.")


def from_published(model: dict, raw: bool = False) -> INFD:
    """The model of a published INFD checkpoint: {'name', 'args', 'sd'}, every key of it accounted for."""
    args, sd = model["args"], model["sd"]
    autoencoder = FieldAutoencoder(published_autoencoder(args))
    weights, rest = {}, {}
    for key, value in sd.items():
        match = next(((old, new) for old, new in PUBLISHED_NAMES if key.startswith(old)), None)
        if match:
            weights[match[1] + key[len(match[0]):]] = value.float()
        elif not key.startswith(PUBLISHED_TRAINING_ONLY):
            rest[key] = value.float()
    fill(autoencoder, weights, "the published autoencoder (names as in this project)")

    prefix = "z_dm." if raw else "z_dm_ema."
    unet_weights = {k[len(prefix):]: v for k, v in rest.items() if k.startswith(prefix)}
    unknown = [k for k in rest if not k.startswith(("z_dm.", "z_dm_ema."))]
    if unknown:
        raise ValueError(f"the published checkpoint has keys that belong to no part: {', '.join(unknown[:5])}")
    unet, diffusion = None, GaussianDiffusion(DiffusionConfig())
    if "z_dm" in args:
        unet = UNet(published_unet(args["z_dm"]))
        fill(unet, unet_from_published(unet, unet_weights), "the published UNet")
        dp = args.get("z_dp") or {}
        diffusion = GaussianDiffusion(DiffusionConfig(beta_start=dp.get("linear_beta_start", 0.0015),
                                                      beta_end=dp.get("linear_beta_end", 0.0195)))
    size = args["z_shape"][1] * autoencoder.cfg.f
    return INFD(autoencoder, unet, diffusion, LatentScale(autoencoder.cfg.z_channels), size=size, patch=256,
                weights="published weights" if raw else "published EMA")


def published_autoencoder(args: dict) -> AutoencoderConfig:
    """AutoencoderConfig of a published spec. Options that no published model sets are refused by name."""
    encoder, net = args["encoder"].get("args") or {}, args["renderer"]["args"]
    known = {"ch", "ch_mult", "num_res_blocks", "z_channels", "resolution", "double_z"}
    unknown = sorted(set(encoder) - known) + [net["net"]["name"]] * (net["net"]["name"] != "simple_renderer_net")
    if unknown:
        raise ValueError(f"the published checkpoint uses {', '.join(unknown)}, which this project does not have")
    return AutoencoderConfig(ch=encoder.get("ch", 128), ch_mult=tuple(encoder.get("ch_mult", (1, 2, 4))),
                             num_res_blocks=encoder.get("num_res_blocks", 2), z_channels=args["z_shape"][0],
                             n_embed=args.get("n_embed", 8192), kl=not args.get("quantizer", False),
                             hidden=(net["net"].get("args") or {}).get("hidden_channels", 256))


def published_unet(spec: dict) -> UNetConfig:
    """UNetConfig of a published `openai_unet` spec; what it leaves out has the published default."""
    a = spec.get("args") or {}
    return UNetConfig(in_channels=a.get("in_channels", 3), out_channels=a.get("out_channels", 3),
                      model_channels=a.get("model_channels", 224),
                      channel_mult=tuple(a.get("channel_mult", (1, 2, 3, 4))),
                      num_res_blocks=a.get("num_res_blocks", 2),
                      attention_ds=tuple(a.get("attention_resolutions", (2, 4, 8))),
                      num_head_channels=a.get("num_head_channels", 32))


def unet_from_published(unet: UNet, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """ADM's attention stores q, k, v head by head in Conv1d weights; ours stores q|k|v in Conv2d ones."""
    own, out = unet.state_dict(), {}
    for key, value in weights.items():
        if ".qkv." in key and key in own:
            heads = value.shape[0] // 3 // unet.cfg.num_head_channels
            value = qkv_from_legacy(value, heads)
        out[key] = value.reshape(own[key].shape) if key in own and value.numel() == own[key].numel() else value
    return out


def from_openai(weights: dict, name: str) -> OneStep:
    """A consistency model (cd_*, ct_*) or denoiser (edm_*) of OpenAI; only the kind is read from the file's name."""
    unet = UNet(openai_unet(weights))
    own = unet.state_dict()                                          # qkv is ours as it is: q|k|v, not head by head
    fill(unet, {k: v.float().reshape(own[k].shape) if k in own and v.numel() == own[k].numel() else v.float()
                for k, v in weights.items()}, "the OpenAI UNet")
    kind, levels, cfg = name.split("_")[0], len(unet.cfg.channel_mult), ConsistencyConfig()
    second = {("cd", 4): cfg.karras_sigmas(40)[22], ("ct", 4): cfg.karras_sigmas(201)[106],     # published two-step
              ("cd", 6): cfg.karras_sigmas(40)[17 if "l2" not in name else 18],                 # levels of CD and CT
              ("ct", 6): cfg.karras_sigmas(151)[62 if "cat" in name else 67]}.get((kind, levels), 0)
    if levels not in (4, 6):
        raise ValueError(f"a UNet of {levels} levels is none of OpenAI's: ImageNet (64 px) has 4, LSUN (256 px) has 6")
    f = ConsistencyModel(unet, dataclasses.replace(cfg, boundary=kind != "edm"))
    return OneStep(f, 64 if levels == 4 else 256, float(second), heun=kind == "edm")


def openai_unet(weights: dict[str, Tensor]) -> UNetConfig:
    """UNetConfig of an OpenAI consistency model, from the names and shapes of its tensors.

    Their heads have 64 channels and they resample inside residual blocks, neither of which shows in the weights.
    """
    blocks = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("output_blocks."))
    ups = [i for i in range(blocks) if any(f"output_blocks.{i}.{c}.in_layers.0.weight" in weights for c in (1, 2))]
    if not ups:
        raise ValueError("the UNet in this file does not resample in residual blocks: no OpenAI consistency model")
    ends = [*ups, blocks - 1]                                        # last block of each level, from the coarsest up
    width = weights["input_blocks.0.0.weight"].shape[0]
    out = [weights[f"output_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in ends]
    attends = [f"output_blocks.{i}.1.qkv.weight" in weights for i in ends]
    emb = weights["output_blocks.0.0.emb_layers.1.weight"].shape[0]
    return UNetConfig(model_channels=width, channel_mult=tuple(c // width for c in reversed(out)),
                      num_res_blocks=ups[0], resblock_updown=True, num_head_channels=64,
                      attention_ds=tuple(2**i for i, a in enumerate(reversed(attends)) if a),
                      num_classes=weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else 0,
                      scale_shift_norm=emb == 2 * out[0])


# ---- pictures --------------------------------------------------------------------------------------------------------


def to_uint8(rgb: Tensor) -> np.ndarray:
    """(..., 3, h, w) in [-1, 1] -> (..., h, w, 3) uint8; truncates like the published sampler (torchvision's)."""
    return ((rgb.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).movedim(-3, -1).cpu().numpy()


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU, whose allocator says so in a RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def draw_bands(renderer: nn.Module, phi: Tensor, res: tuple[int, int], tile: int, window=None, norm: str = "paper",
               compile: Callable | None = None, first: int = 0) -> Iterator[np.ndarray]:
    """Pixels (B, h, W, 3) uint8 of the fields phi (B, C, h, w), a row of tiles at a time, from pixel row `first` on.

    Where memory runs out, what is computed at once is halved, down to 64 px, and drawing goes on below the finished
    rows. The picture does not change: with norm="paper" a tile is then drawn in pieces, with its own statistics.
    """
    means, done = Means(tile, compile=compile), first
    while done < res[0]:
        try:
            for _, x, rgb in render_tiles(renderer, phi, res, window, tile, norm, means, done):
                h, w = rgb.shape[-2:]
                band = np.empty((len(phi), h, res[1], 3), np.uint8) if x == 0 else band
                band[:, :, x:x + w] = to_uint8(rgb)
                if x + w == res[1]:
                    yield band
                    done += h
        except (RuntimeError, MemoryError) as error:
            if means.piece < 128 or not out_of_memory(error):
                raise
            means = dataclasses.replace(means, piece=means.piece // 2, keep=means.keep // 4)
            warnings.warn(f"out of memory: going on with {means.piece} px at a time")


def draw(renderer: nn.Module, phi: Tensor, res: tuple[int, int], tile: int, window=None,
         norm: str = "paper") -> np.ndarray:
    """Pixels (B, H, W, 3) uint8 of the fields phi (B, C, h, w); see `draw_bands`."""
    return np.concatenate(list(draw_bands(renderer, phi, res, tile, window, norm)), axis=1)


def compiles(option: str, device: torch.device) -> bool:
    """Whether networks are compiled. auto: on a CUDA GPU under Linux."""
    return option == "on" or (option == "auto" and device.type == "cuda" and sys.platform == "linux")


def compile_if_possible(function: Callable) -> Callable:
    """`function` compiled, anew for every shape; from the first failure on, after one warning, as it is."""
    compiled = torch.compile(function, dynamic=False)

    def call(*args):
        nonlocal compiled
        try:
            return compiled(*args)
        except RuntimeError as error:
            if compiled is function or out_of_memory(error):
                raise
            warnings.warn(f"torch.compile failed, drawing without it: {str(error).strip().splitlines()[0]}")
            compiled = function
        return function(*args)

    return call


def draw_functions(functions: ImageFunction, res: tuple[int, int], window=None,
                   dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Pixels (B, H, W, 3) uint8 of image functions, tile by tile: memory holds bytes, not floats."""
    out = np.empty((len(functions), *res, 3), np.uint8)
    for y, x, rgb in functions.tiles(res, window, dtype=dtype):
        for image, piece in zip(out, rgb):
            image[y:y + rgb.shape[2], x:x + rgb.shape[3]] = to_uint8(piece)
    return out


# ---- PNG files, a band of rows at a time -----------------------------------------------------------------------------
# Every band is one IDAT chunk and compressed on its own, so a file that was interrupted is as good as its whole chunks,
# and going on from there gives the same bytes as never having stopped.

Bands = Callable[[int], Iterator[np.ndarray]]       # first -> pixels (h, W, 3) uint8 from row `first` on, in bands


def one_band(pixels: np.ndarray) -> Bands:
    """A picture (H, W, 3) uint8 that was drawn whole."""
    return lambda first: iter([pixels[first:]])


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file: length, kind (4 bytes), data, CRC-32 of both."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def png_head(size: tuple[int, int], info: dict) -> bytes:
    """All of a PNG file before its pixels; the tEXt chunk `parameters` says in JSON how it was made."""
    ihdr = struct.pack(">2I5B", size[1], size[0], 8, 2, 0, 0, 0)             # 8 bits, RGB, not interlaced
    text = b"parameters\0" + json.dumps(info).encode("ascii")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", ihdr) + png_chunk(b"tEXt", text)


def png_filter(band: np.ndarray) -> np.ndarray:
    """Rows (h, W, 3) as PNG stores them: the first as it is (filter 0), others less the row above (filter 2)."""
    flat = band.reshape(len(band), -1)
    raw = np.empty((len(flat), 1 + flat.shape[1]), np.uint8)
    raw[0, 0], raw[0, 1:], raw[1:, 0] = 0, flat[0], 2
    np.subtract(flat[1:], flat[:-1], out=raw[1:, 1:])                        # modulo 256, as PNG has it
    return raw


def png_finished(file: typing.BinaryIO, head: bytes, size: tuple[int, int]) -> tuple[int, int, int]:
    """How far an interrupted file got: its whole rows, the place in it behind them, the Adler-32 checksum so far.

    Counts bands whose checksum and length are right, up to the first that is not; none where `head` differs.
    """
    rows, end, adler, stride = 0, len(head), 1, 1 + 3 * size[1]
    if file.read(len(head)) != head:
        return 0, 0, 1
    while len(start := file.read(8)) == 8 and start[4:] == b"IDAT":
        data = file.read(int.from_bytes(start[:4], "big"))
        if file.read(4) != struct.pack(">I", zlib.crc32(data, zlib.crc32(b"IDAT"))):
            break
        inflater, count, checksum, data = zlib.decompressobj(-15), 0, adler, data if rows else data[2:]
        try:
            while raw := inflater.decompress(data, 1 << 20):                 # at most 1 MiB at once
                count, checksum, data = count + len(raw), zlib.adler32(raw, checksum), inflater.unconsumed_tail
        except zlib.error:
            break
        if inflater.eof or not count or count % stride or rows + count // stride > size[0]:
            break
        rows, end, adler = rows + count // stride, file.tell(), checksum
    return rows, end, adler


def write_png(path: Path, size: tuple[int, int], info: dict, bands: Bands) -> None:
    """Write a PNG of `size` (H, W) that says how it was made; renamed into place when complete.

    bands(first) gives the pixels (h, W, 3) uint8 from row `first` on. What an interrupted call left is not asked again.
    """
    head, part = png_head(size, info), path.with_name(path.name + ".part")
    part.touch()
    with open(part, "r+b") as file:
        rows, end, adler = png_finished(file, head, size)
        file.seek(end)
        file.truncate()
        if not end:
            file.write(head)
        for band in bands(rows) if rows < size[0] else ():
            raw = png_filter(band)
            adler, deflater = zlib.adler32(raw, adler), zlib.compressobj(wbits=-15)
            start = b"\x78\x9c" if rows == 0 else b""                        # zlib's header: deflate, 32 KiB window
            file.write(png_chunk(b"IDAT", start + deflater.compress(raw) + deflater.flush(zlib.Z_FULL_FLUSH)))
            file.flush()
            rows += len(band)
        file.write(png_chunk(b"IDAT", b"\x03\0" + struct.pack(">I", adler)) + png_chunk(b"IEND", b""))   # empty block
    part.rename(path)


def already_drawn(path: Path, size: tuple[int, int], info: dict) -> bool:
    """Whether `path` holds this very picture. Raises FileExistsError where it holds anything else."""
    if not path.exists():
        return False
    head = png_head(size, info)
    try:
        with open(path, "rb") as file:
            same = file.read(len(head)) == head
    except OSError:
        same = False
    if not same:
        raise FileExistsError(f"{path} exists and is another picture; choose another --out")
    return True


# ---- speed -----------------------------------------------------------------------------------------------------------


def seconds(calls: dict[str, Callable], device: torch.device, repeats: int = 5,
            limit: float = math.inf) -> dict[str, float]:
    """Median seconds of each call after a warm-up, synchronised; taken in turn, so a disturbance meets them all.

    A call that has taken `limit` seconds is not repeated; if its warm-up took them, that is its time.
    """

    def once(call: Callable) -> float:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    times = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            if sum(times[name]) < limit:
                times[name].append(once(call))
    return {name: float(np.median(taken[1:] or taken)) for name, taken in times.items()}


def peak_memory(device: torch.device, reset: bool = False) -> int:
    """Bytes at the peak since the last reset: of the GPU, or of the process (Linux; elsewhere 0)."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device) or 0 if reset else torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])


def gflop(call: Callable) -> float:
    """Billions of floating-point operations of a call: 2 per multiply-add, matrix products and convolutions only."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):    # fused attention is not counted
        call()
    return counter.get_total_flops() / 1e9


def onestep_calls(f: ConsistencyModel, size: int, batch: int, sizes: Iterable[int],
                  dtype: torch.dtype = torch.float32) -> dict[str, Callable]:
    """What sampling `batch` images takes: the image of a pixel generator; or the function, and each rendering of it."""
    device = next(f.parameters()).device
    noise, y = torch.randn(batch, 3, size, size, device=device), None
    if f.net.cfg.num_classes:
        y = torch.arange(batch, device=device) % f.net.cfg.num_classes
    if not hasattr(f.net, "function"):
        return {f"image {size}": lambda: sample_onestep(f, noise, y)}
    function = sample_function(f, noise, y)
    draw_at = lambda res: lambda: torch.no_grad()(function.draw)(res, dtype=dtype)
    return {"function": lambda: sample_function(f, noise, y), **{f"render {res}": draw_at(res) for res in sizes}}


def bench(model: INFD | OneStep, described: dict, sizes: list[tuple[int, int]],
          dtype: torch.dtype = torch.float32) -> str:
    """Time per image of each part of sampling, as text and a JSON line; `described` says how it samples, `dtype` is
    that of ImageFunction.draw.

    multi_res_fps is Section 4.3's of CM-Func: pictures per second when each is wanted at 32, 64 and 128 px.
    """
    if isinstance(model, OneStep):
        device = next(model.f.parameters()).device
        lines, result = [], {}
        for batch in (1, 64):
            drawn = [res for res in sorted({32, 64, 128, 256, 512, model.size}) if batch * res**2 <= 2**20]
            times = seconds(onestep_calls(model.f, model.size, batch, drawn, dtype), device)
            lines += [f"batch {batch:2d}: {name:12} {1000 * t / batch:9.2f} ms per image" for name, t in times.items()]
            own = times.get("function", 0) + times.get(f"render {model.size}", times.get(f"image {model.size}", 0))
            result[f"batch {batch}"] = {**times, "images_per_s": batch / own}
            lines.append(f"batch {batch:2d}: {batch / own:.1f} images/s at {model.size} px")
            if "function" in times:
                fps = 3 * batch / (times["function"] + sum(times[f"render {res}"] for res in (32, 64, 128)))
                result[f"batch {batch}"]["multi_res_fps"] = fps
                lines.append(f"batch {batch:2d}: {fps:.1f} pictures/s at 32, 64 and 128 px")
    else:
        return bench_infd(model, SAMPLERS | {described["sampler"]: described["steps"]}, sizes or BENCH_SIZES)
    return "\n".join([*lines, json.dumps({"device": str(device), "seconds": result})])


BENCH_SIZES = [(256, 256), (512, 512), (1024, 1024), (2048, 2048)]


def bench_infd(model: INFD, samplers: dict[str, int], sizes: list[tuple[int, int]]) -> str:
    """Time and peak memory of the three parts of an image, each apart: latent (by sampler), decode, render (by norm).

    A latent is so many calls of the network, of which one is timed. Renders end as bytes on the CPU; the two norms
    take turns and share a peak.
    """
    device = next(model.unet.parameters()).device
    z = torch.randn(1, *model.latent_shape, device=device)
    t = torch.zeros(1, dtype=torch.long, device=device)
    phi, y = model.autoencoder.decode(z), draw_labels(model.unet.cfg.num_classes, [0], 0, None, device)
    parts = [{"network call": lambda: torch.no_grad()(model.unet)(z, t, y)},
             {"decode": lambda: model.autoencoder.decode(z)}]
    for size in sizes:
        parts.append({f"render {size[0]}x{size[1]}, norm {norm}":
                      functools.partial(draw, model.autoencoder.renderer, phi, size, model.patch, norm=norm)
                      for norm in ("paper", "global")})
    times, peaks = {}, {}
    for part in parts:
        peak_memory(device, reset=True)
        times |= seconds(part, device, limit=5)
        peaks |= dict.fromkeys(part, peak_memory(device))
    for name, steps in samplers.items():
        latent = f"latent, {name}, {steps} steps"
        times[latent] = times["network call"] * (2 * steps - 1 if name == "heun" else steps)
        peaks[latent] = peaks["network call"]
    lines = [f"{name:33} {1000 * s:12.1f} ms per image {1 / s:9.2f} images/s {peaks[name] / 1e6:8.0f} MB at the peak"
             for name, s in times.items()]
    return "\n".join([*lines, json.dumps({"device": str(device), "seconds": times, "peak_bytes": peaks})])


def compare_samplers(model: INFD, jobs: list[list[int]], seed: int, label: int | None, size: tuple[int, int]) -> str:
    """How many steps each sampler needs for what 200 steps of DDIM do: mean PSNR of the same pictures, as a table.

    Without noise all samplers approximate one path from x_T to a picture, and 200 DDIM steps miss the end of it (taken
    from 200 steps of heun) by a little. A sampler is as good as they are once it misses it by no more. jobs: lists of
    images made together.
    """
    def pictures(sampler: str, steps: int) -> Tensor:                        # (n, 3, H, W)
        draw_part = lambda part: model.sample(part, seed, steps, 0.0, labels=None if label is None else
                                              [label] * len(part), sampler=sampler)
        return torch.cat([model.render(draw_part(part), size) for part in jobs])

    def db(a: Tensor, b: Tensor) -> float:
        return metrics.psnr(a, b).mean().item()

    ddim, end, counts = pictures("ddim", 200), pictures("heun", 200), (5, 10, 15, 20, 30, 50)
    goal = db(ddim, end)
    lines = [f"{len(end)} pictures, {size[0]}x{size[1]}: PSNR in dB with 200 steps of ddim, eta 0 / with the end of "
             "the path", f"200 steps of ddim with the end of the path: {goal:.1f} dB",
             "steps" + "".join(f"{n:15}" for n in counts) + "   40 dB with ddim   as good as ddim"]
    for sampler in SAMPLERS:
        pairs = {n: (db(p, ddim), db(p, end)) for n in counts for p in [pictures(sampler, n)]}
        near = next((n for n in counts if pairs[n][0] >= 40), "-")
        reached = next((n for n in counts if pairs[n][1] >= goal), "-")
        lines.append(f"{sampler:5}" + "".join(f"{a:8.1f} /{b:5.1f}" for a, b in pairs.values()) +
                     f"{near:>18}{reached:>18}")
    return "\n".join([*lines, "network calls: heun 2 steps - 1, the others one per step"])


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_size(text: str) -> tuple[int, int]:
    """'512' -> (512, 512), '512x1024' -> (512, 1024), height first."""
    try:
        sides = [int(s) for s in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides, default=0) < 1:
        raise ValueError(f"cannot read the size {text!r}; write 512, or 512x1024 (height x width), at least 1")
    return sides[0], sides[-1]


def parse_window(text: str) -> tuple[float, ...]:
    """'y0,x0,y1,x1' in [-1, 1] -> four floats."""
    try:
        window = tuple(float(v) for v in text.split(","))
    except ValueError:
        window = ()
    if len(window) != 4 or not (-1 <= window[0] < window[2] <= 1 and -1 <= window[1] < window[3] <= 1):
        raise ValueError(f"--window {text} is not a part of the image: write y0,x0,y1,x1 with -1 <= y0 < y1 <= 1 and "
                         f"-1 <= x0 < x1 <= 1 (the whole image is -1,-1,1,1)")
    return window


def pick_device(name: str) -> torch.device:
    """auto: a CUDA GPU, else Apple's, else the CPU."""
    if name != "auto":
        try:
            return torch.zeros(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if torch.cuda.is_available():                                            # torchrun: a GPU for each process
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def bundled(name: str) -> Path:
    """The weights that come with the project, for a sample.py without --ckpt."""
    return Path(__file__).parent / "weights" / f"{name}.pt"


def export(source: Path, target: Path) -> None:
    """Write what sampling needs of a checkpoint (a file or its run folder): the moving average, in half precision.

    Absolute paths among the options, of the data or of earlier runs, keep their last part alone.

    Raises FileExistsError rather than overwrite, ValueError for a checkpoint that is not of stage ae, ldm or cm.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another file for --export")
    path, ckpt = newest_checkpoint(source) if source.is_dir() else (source, read_checkpoint(source))
    if ckpt.get("stage") not in ("ae", "ldm", "cm"):
        raise ValueError(f"--export takes a checkpoint of stage ae, ldm or cm written by train.py, not {path}")

    def half(value):
        if isinstance(value, dict):
            return {k: half(v) for k, v in value.items()}
        if isinstance(value, str) and os.path.isabs(value):
            return Path(value).name                       # the file may go to others: no folders of this machine
        return value.half() if isinstance(value, Tensor) and value.is_floating_point() else value

    state = ckpt["state"]
    best = "ema" if "ema" in state else "model"
    small = {k: half(v) for k, v in ckpt.items() if k not in ("log", "state")}
    small["state"] = {best: half(state[best])} | {k: state[k] for k in ("scale",) if k in state}
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    torch.save(small, part)
    part.rename(target)


def new_folder() -> Path:
    """samples/0001, samples/0002, ...: without --out every call gets a folder of its own."""
    taken = [int(p.name) for p in Path("samples").glob("*") if p.name.isdigit()]
    return Path("samples") / f"{max(taken, default=0) + 1:04d}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="Draw images as functions: any resolution, any window.")
    p.add_argument("--ckpt", help="run folder or checkpoint file (default: the weights that come with the project)")
    p.add_argument("--model", choices=["infd", "cm"], default="infd", help="without --ckpt: which bundled weights")
    p.add_argument("--export", metavar="FILE", help="write the model, in half precision, to FILE and draw nothing")
    p.add_argument("-n", "--n", type=int, default=1, help="number of images; -n after torchrun")
    p.add_argument("--res", default="", help="512, or 512x1024 (height x width), or several: 256,512,1024")
    p.add_argument("--window", help="y0,x0,y1,x1 in [-1, 1]: draw this part of the image at --res")
    p.add_argument("--steps", type=int, help="INFD: of the sampler (its own); CM: network calls, 1 or 2 (1); edm_*: 40")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--start", type=int, default=0, help="index of the first image")
    p.add_argument("--label", help="class, by name or number (default: drawn per image)")
    p.add_argument("--batch", type=int, default=4, help="images made together; does not change them")
    p.add_argument("--raw", action="store_true", help="the trained weights instead of their moving average")
    p.add_argument("--device", default="auto")
    p.add_argument("--out", help="folder (default: a new one under samples/)")
    p.add_argument("--fid", metavar="REFERENCE", help="score the samples against this folder, zip or statistics file")
    p.add_argument("--features", default="inception", choices=["inception", "squeeze"], help="of --fid; see metrics.py")
    p.add_argument("--bench", action="store_true", help="measure how fast this model samples, and draw nothing")
    infd, cm = p.add_argument_group("INFD only"), p.add_argument_group("CM only")
    infd.add_argument("--sampler", choices=list(SAMPLERS), help="how a latent is drawn (ddim); steps by default: " +
                      ", ".join(f"{name} {steps}" for name, steps in SAMPLERS.items()))
    infd.add_argument("--eta", type=float, help="noise of ddim: 0 deterministic, 1 as published (1)")
    infd.add_argument("--compare-samplers", action="store_true", default=None,
                      help="table of PSNR by sampler and steps, on --n images; draws nothing")
    infd.add_argument("--latent-size", help="side(s) of a larger noise map: convolutional sampling (Section D)")
    infd.add_argument("--norm", help="GroupNorm statistics of the renderer: paper, per tile (default), or global")
    infd.add_argument("--tile", type=int, help="tile side in pixels (default: the training patch)")
    infd.add_argument("--compile", choices=["auto", "on", "off"], help="the renderer (auto: on a CUDA GPU)")
    cm.add_argument("--func-dtype", choices=["float32", "bfloat16"],
                    help="of the image function's layers after the first (float32); bfloat16 is faster where the "
                         "processor multiplies it")
    cm.add_argument("--sigmas", help="noise levels of further steps, decreasing: 4.0,0.8 (training resolution only)")
    return p


def pick_label(model: INFD | OneStep, text: str | None) -> int | None:
    """A class given by name or number."""
    if text is None:
        return None
    net = model.unet if isinstance(model, INFD) else model.f.net
    n = net.cfg.num_classes
    label = model.classes.index(text) if text in model.classes else int(text) if text.isdigit() else -1
    if not 0 <= label < n:
        has = (", ".join(model.classes) or f"classes 0 to {n - 1}") if n else "no classes: leave --label out"
        raise ValueError(f"--label {text}: this model has {has}")
    return label


Painter = Callable[[list[int], list[int] | None], Iterator[tuple[int, tuple[int, int], Bands]]]


def refuse(args: argparse.Namespace, model: str, *names: str) -> None:
    """ValueError for options of the other kind of model."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} means nothing to this checkpoint, which is {model}")


def infd_painter(model: INFD, args: argparse.Namespace, sizes: list, window) -> tuple[dict, list, Painter]:
    """(what the PNGs say, the sizes to draw, a function that makes some images, to be drawn at all of them)."""
    refuse(args, "an INFD model", "sigmas", "func_dtype")
    if model.unet is None:
        raise ValueError(NEEDS_LDM)
    latent = parse_size(args.latent_size) if args.latent_size else None
    sampler = args.sampler or "ddim"
    steps, eta = args.steps or SAMPLERS[sampler], 1.0 if args.eta is None else args.eta
    if sampler != "ddim" and args.eta is not None:
        raise ValueError(f"--eta is the noise that ddim adds, and {sampler} adds none: leave --eta out")
    tile, norm = args.tile or model.patch, args.norm or "paper"
    device = next(model.unet.parameters()).device
    compiler = functools.cache(compile_if_possible) if compiles(args.compile or "auto", device) else None
    if not sizes:                                                            # the pixels that the latent stands for
        sizes = [tuple(side * model.autoencoder.cfg.f for side in latent or model.latent_shape[1:])]

    for size in sizes:                                                       # names bad options now; draws nothing
        render_tiles(model.autoencoder.renderer, torch.empty(0), size, window, tile, norm)

    def bands(phi, size, first):
        drawn = draw_bands(model.autoencoder.renderer, phi, size, tile, window, norm, compiler, first)
        return (band[0] for band in drawn)

    def paint(part, labels):
        bar = functools.partial(tqdm, total=steps, desc=f"images {part[0]}..{part[-1]}", leave=False, disable=None)
        z = model.sample(part, args.seed, steps, eta, latent, labels, bar, sampler)
        for b, i in enumerate(part):
            phi = model.autoencoder.decode(z[b:b + 1])                       # decoded once, drawn at every size
            for size in sizes:
                yield i, size, functools.partial(bands, phi, size)

    how = {"sampler": sampler, "steps": steps} | ({"eta": eta} if sampler == "ddim" else {})
    return {**how, "norm": norm, "tile": tile, "latent_size": latent}, sizes, paint


def onestep_painter(model: OneStep, args: argparse.Namespace, sizes: list, window) -> tuple[dict, list, Painter]:
    """As infd_painter. One step of a function generator draws functions; all else makes pixels at the training size."""
    refuse(args, "a one-step model", "sampler", "compare_samplers", "eta", "latent_size", "norm", "tile", "compile")
    steps, own = args.steps or (40 if model.heun else 1), (model.size, model.size)
    sigmas = tuple(float(v) for v in args.sigmas.split(",")) if args.sigmas else ()
    if sigmas and list(sigmas) != sorted(sigmas, reverse=True) or (sigmas and sigmas[0] >= model.f.cfg.sigma_max):
        raise ValueError(f"--sigmas {args.sigmas}: write decreasing noise levels below {model.f.cfg.sigma_max:g}")
    if not model.heun and not sigmas and steps > 1:
        if steps > 2 or not model.second:
            raise ValueError(f"--steps {steps}: name the noise levels of the further steps, as in --sigmas 4.0,0.8")
        sigmas = (model.second,)
    free = hasattr(model.f.net, "function") and not sigmas and not model.heun
    sizes, dtype = sizes or [own], getattr(torch, args.func_dtype or "float32")
    if not free and (window or args.func_dtype or sizes != [own]):
        raise ValueError(f"only one step of generator=func can be drawn at any size and window, and by --func-dtype; "
                         f"this draws --res {model.size} and the whole image")

    def paint(part, labels):
        if free:
            functions = model.functions(part, args.seed, labels)
            for size in sizes:
                many = max(1, 2**20 // (size[0] * size[1]))          # small pictures together, large ones one by one
                for at in range(0, len(part), many):
                    pixels = draw_functions(functions[at:at + many], size, window, dtype)
                    yield from ((i, size, one_band(image)) for i, image in zip(part[at:], pixels))
            return
        made = model.denoise(part, args.seed, steps, labels) if model.heun else \
            model.sample(part, args.seed, sigmas, labels)
        yield from ((i, own, one_band(to_uint8(image))) for i, image in zip(part, made))

    described = {"steps": steps, "sigmas": sigmas}
    return described | ({} if dtype == torch.float32 else {"func_dtype": args.func_dtype}), sizes, paint


def run(args: argparse.Namespace) -> None:
    """Draw what the command line asks for. Raises ValueError, FileNotFoundError, FileExistsError before any work."""
    if min(args.n, args.batch, 1 if args.steps is None else args.steps) < 1 or args.start < 0:
        raise ValueError("--n, --batch and --steps must be at least 1, --start at least 0")
    window = parse_window(args.window) if args.window else None
    sizes = [parse_size(s) for s in args.res.split(",")] if args.res else []
    device, path = pick_device(args.device), Path(args.ckpt) if args.ckpt else bundled(args.model)
    if args.export:
        return export(path, Path(args.export))
    model = load(path, device, args.raw)
    painter = infd_painter if isinstance(model, INFD) else onestep_painter
    described, sizes, paint = painter(model, args, sizes, window)
    if args.bench:
        return print(bench(model, described, sizes if args.res else [], getattr(torch, args.func_dtype or "float32")))
    if args.fid and len(sizes) > 1:
        raise ValueError("--fid compares pictures of one size; give --res one size")
    network = metrics.load_features(args.features).to(device) if args.fid else None      # fail before the work
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world > 1 and (not args.out or args.fid):
        raise ValueError("under torchrun give --out, which all processes share, and score it later with metrics.py")
    label, out = pick_label(model, args.label), Path(args.out) if args.out else new_folder()
    if args.compare_samplers:
        images = range(args.start, args.start + args.n)
        jobs = [list(images[at:at + args.batch]) for at in range(0, args.n, args.batch)]
        return print(compare_samplers(model, jobs, args.seed, label, sizes[0]))
    common = {"ckpt": model.file.name, "sha256": file_hash(model.file), "weights": model.weights, "seed": args.seed,
              "window": window, "label": args.label, **described}
    jobs = {i: {size: out / f"seed{args.seed}-{i:06d}-{size[0]}x{size[1]}.png" for size in sizes}
            for i in range(args.start, args.start + args.n)}
    info = lambda i, size: json.loads(json.dumps({**common, "index": i, "res": size}))
    todo = [i for i, files in jobs.items() if not all([already_drawn(p, s, info(i, s)) for s, p in files.items()])]
    todo = [i for i in todo if i % world == rank]                            # each process draws its share
    out.mkdir(parents=True, exist_ok=True)
    for at in range(0, len(todo), args.batch):
        part = todo[at:at + args.batch]
        for i, size, bands in paint(part, None if label is None else [label] * len(part)):
            if not jobs[i][size].exists():                                   # one that is there is the same picture
                write_png(jobs[i][size], size, info(i, size), bands)
    if rank == 0:
        print(f"{len(jobs) * len(sizes)} pictures ({model.weights}, step {model.step}) in {out}")
    if args.fid:
        print(metrics.fid(out, args.fid, metrics.Protocol(args.features, size=sizes[0][0]), net=network))


def file_hash(path: Path) -> str:
    """First 16 hex digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 2 after one line on what is wrong, 143 or 130 after a signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for i, arg in enumerate(argv[:-1]):
        if arg == "--window":                                                # argparse takes "-1,..." for an option
            argv[i:i + 2] = [f"--window={argv[i + 1]}"]
    args = parser().parse_args(argv)
    try:
        with metrics.stop_at_once():                                         # a picture is there whole, or not at all
            run(args)
    except metrics.Stopped as stop:
        print("stopped; the same command with the same --out draws what is missing", file=sys.stderr)
        return stop.args[0]
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
