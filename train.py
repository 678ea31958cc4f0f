"""The training loop: one `fit` for every stage, one `step` per stage, a table of presets, and the command line.

    python train.py --stage ae --preset tiny           encoder, decoder and renderer, patch by patch (INFD, Section J)
    python train.py --stage ldm --preset tiny          diffusion in the latent space of that autoencoder
    python train.py --stage pretrain --preset tiny     image functions that reconstruct pictures (CM-Func, 3.4)
    python train.py --stage cm --preset tiny           consistency training of the function generator (CM-Func, 3.1)
    python train.py --stage compare --preset latent    one of the papers' comparisons, small (COMPARISONS has them all)

The same command again continues the run. Losses and perceptual networks live here, outside the models.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import metrics
from autoencoder import (Attention, AutoencoderConfig, DiscriminatorConfig, FieldAutoencoder, PatchDiscriminator,
                         adaptive_weight, hinge_loss)
from clif import CLIF, ResBlock
from consistency import (ECT, ICT, ConsistencyConfig, ConsistencyModel, consistency_loss, denoising_distance, l2,
                         lpips_resized, pseudo_huber)
from data import DataConfig, rng, torch_noise
from inr_generator import (AdaLNBlock, Block, FunctionGenerator, GeneratorConfig, TransformerConfig, pixel_coord,
                           variational_coord)
from ldm import DiffusionConfig, GaussianDiffusion, SelfAttention, TimeResBlock, UNet, UNetConfig
from metrics import Stopped, ranks, stop_at_once
from sample import (FORMAT, INFD, LatentScale, OneStep, build, build_generator, checkpoints, draw, fill,
                    generator_parts, gflop, load, newest_checkpoint, onestep_calls, out_of_memory, peak_memory,
                    pick_device, read_checkpoint, seconds, to_uint8)

fcntl = importlib.import_module("fcntl") if os.name == "posix" else None             # Windows has no such locks

# ---- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What every stage can be told by key=value."""

    data: str = "synthetic"           # a name or a path, as --data
    seed: int = 0
    steps: int = 1_000_000
    batch: int = 8                    # images per optimiser step, over all micro-batches
    accum: int = 1                    # micro-batches per step: more need less memory
    lr: float = 3.6e-5                # INFD J.2; constant, no warm-up
    beta1: float = 0.5
    beta2: float = 0.9
    weight_decay: float = 0.0
    ema: float = 0.0                  # rate of the moving average of the weights; 0: none
    ema_warmup: bool = False          # min(ema, (1 + k) / (10 + k)) as in LDM; the published INFD code has no warm-up
    size: int = 256                   # side of the encoder's input, pixels
    flip: bool = False                # random horizontal flips; the published code has none
    workers: int = 4                  # loader processes; the batches do not depend on it
    dtype: str = "auto"               # auto: bf16 autocast on a GPU that has it, else fp32
    tf32: bool = True                 # fp32 products and convolutions on CUDA with 10 bits of mantissa, as bf16 has 7
    compile: str = "auto"             # auto: torch.compile on a GPU, without it where the compiler fails; on | off
    checkpoint: bool = False          # blocks keep their inputs alone for the backward pass: less memory, more time
    channels_last: bool = False       # convolutions in NHWC: no gain on a CPU, not yet measured on a GPU
    log_every: int = 50
    grid_every: int = 5_000
    save_every: int = 5_000
    keep_every: int = 0               # also keep every checkpoint whose step this divides; 0: the last two only


@dataclass(frozen=True)
class AERun(Run):
    """Stage ae: autoencoder and renderer, end to end (INFD J.1, J.2)."""

    patch: int = 256                  # side of the ground-truth patch, pixels
    max_size: int = 1024              # ground truth is resized to at most this before the crop
    downsample: bool = True           # False: always the largest size, the ablation of Section E
    p_whole: float = 0.0              # chance of the whole picture at `size`: a patch at 4x shows 1/16 of z
    p_original: float = 0.0           # chance of the largest size, from step original_from on (J.2: 0.5 on Mountains)
    original_from: int = 0
    lpips: str = "vgg"                # vgg | alex | squeeze | none
    lpips_weight: float = 1.0         # the weights are not in the paper; these four are the published code's
    gan_weight: float = 0.75          # times the adaptive weight; 0: no discriminator
    gan_start: int = 0                # first step with the GAN
    reg_weight: float = 1.0           # of the VQ loss; with kl=true take 1e-6 as LDM does (the published default is 1)
    init: str = ""                    # run folder or file of stage ae to start from, discriminator and all
    frozen_encoder: bool = False      # with init: learn D and R alone, so that z, and what diffuses it, remain valid
    eval_n: int = 64                  # held-out pictures in the scores at the end
    ae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    disc: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


@dataclass(frozen=True)
class LDMRun(Run):
    """Stage ldm: diffusion of the latents of a frozen autoencoder (INFD J.1, J.2)."""

    steps: int = 600_000
    batch: int = 48
    lr: float = 9.6e-5
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    ema: float = 0.9999
    init: str = ""                    # run folder or file of stage ae; default: the one beside this run
    start: str = ""                   # run of stage ldm whose UNet to start from: one of smaller latents, say
    latent_norm: bool = False         # scale latents to unit variance first (published: no)
    labels: bool = False              # condition on the classes of the data, where it has any
    pictures: int = 0                 # learn from the first so many pictures only; 0: all
    cache: bool = False               # encode every picture once and keep z in memory and beside the run
    preview_steps: int = 50           # DDIM steps of the sample grids, and of the samples that are scored
    eval_every: int = 0               # Frechet distance of samples to held-out pictures every so many steps; 0: never
    eval_n: int = 1000                # pictures on either side of that distance
    eval_features: str = "inception"  # inception (FID, needs its weights) | squeeze (FD-squeeze)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)


@dataclass(frozen=True)
class PretrainRun(Run):
    """Stage pretrain: image functions that reconstruct clean pictures (CM-Func 3.4, A.1). "open": not in the paper."""

    steps: int = 0                    # 0: as many as `epochs` need
    epochs: int = 30                  # A.1
    batch: int = 32                   # open: the reported hours fit 32
    lr: float = 1e-4                  # A.1, Adam
    muon: float = 0.0                 # not in the paper: learning rate of Muon, see WithMuon; 0: Adam for all
    lr_drop: bool = False             # open: a tenth of lr in the last fifth, as Trans-INR's code has it
    beta1: float = 0.9                # open: Adam's own
    beta2: float = 0.999
    size: int = 64
    flip: bool = True                 # open: OpenAI's default, here and in stage cm
    eval_n: int = 64                  # held-out pictures in the scores at the end
    func: GeneratorConfig = field(default_factory=GeneratorConfig)


# Appendix A.3: base 256, 2 residual blocks, mult 1,2,3,4, attention at 32, 16 and 8 px. open: resampling inside the
# residual blocks and heads of 64 channels, as Song et al.'s launch script has it (it cannot be 4 heads of 64 as well).
CM_UNET = UNetConfig(model_channels=256, num_head_channels=64, resblock_updown=True)


@dataclass(frozen=True)
class CMRun(Run):
    """Stage cm: consistency training of one of four generators (CM-Func 3.1, A.1). "open": the paper does not say."""

    steps: int = 900_000              # A.1: 400,000 for CIFAR-10
    K: int = 0                        # the run's length as N(k), mu(k) and ECT's stages know it; 0: steps
    batch: int = 32                   # A.1
    lr: float = 5e-4                  # A.1, RAdam; open: no warm-up, no clipping, no weight decay
    muon: float = 0.0                 # not in the paper: learning rate of Muon, see WithMuon; 0: RAdam for all
    beta1: float = 0.9                # open: RAdam's own
    beta2: float = 0.999
    ema: float = 0.9999               # open: average that samples are drawn from, beside the teacher's; published code
    size: int = 64
    flip: bool = True
    generator: str = "func"           # func | unet | uvit | dit (D.2.1, A.3)
    init: str = ""                    # run of stage pretrain (func; default: the one beside this run) or cm; or none
    distil: str = ""                  # run of stage cm that denoises: follow its trajectories instead of x + r z
    labels: bool = False              # condition on the classes of the data; the paper does for CIFAR-10
    lpips: str = "vgg"                # of cm.metric=lpips: vgg | alex | squeeze
    lpips_size: int = 224             # A.1
    distance_every: int = 5000        # denoising distance of distance_n held-out pictures into the log every so often
    distance_n: int = 64              # open
    cm: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    func: GeneratorConfig = field(default_factory=GeneratorConfig)
    vit: TransformerConfig = field(default_factory=TransformerConfig)        # of uvit and dit
    unet: UNetConfig = field(default_factory=lambda: CM_UNET)


# Parts of the presets below: the later recipes of consistency.py, and the generator for two CPU cores.
CM_ICT, CM_ECT = ({f"cm.{k}": v for k, v in asdict(recipe).items() if v != getattr(ConsistencyConfig(), k)}
                  for recipe in (ICT, ECT))
CM_TINY_FUNC = {"size": 64, "func.patch": 8, "func.dim": 192, "func.heads": 6, "func.encoder_depth": 3,
                "func.decoder_depth": 2, "func.groups": 48, "func.layers": 3, "func.hidden": 48, "func.pe_dim": 48,
                "func.pe_sigma": 64.0}

# What a preset changes from the defaults above, which are the paper's ("paper": FFHQ). Keys as on the command line.
PRESETS = {
    "ae": {
        "paper": {},                                                         # J.2: about 4 days on 4 A100
        "small": {"steps": 30_000, "lr": 1e-4, "ae.ch": 64, "ae.hidden": 128, "ema": 0.999, "grid_every": 2000,
                  "save_every": 2000},
        # Narrow and shallow: in minutes the number of steps counts for more than the width.
        "tiny": {"steps": 3000, "batch": 4, "lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "size": 64, "patch": 64,
                 "max_size": 256, "p_whole": 0.5, "lpips": "none", "gan_weight": 0.0, "reg_weight": 1e-6, "ae.ch": 16,
                 "ae.num_res_blocks": 1, "ae.groups": 8, "ae.kl": True, "ae.hidden": 32, "ema": 0.998,
                 "ema_warmup": True, "workers": 1, "grid_every": 1000, "save_every": 1000},
    },
    "ldm": {
        "paper": {},                                                         # J.2: about 4 days per 1M steps, 4 A100
        "small": {"steps": 40_000, "lr": 2e-4, "ema": 0.999, "ema_warmup": True, "latent_norm": True,
                  "unet.model_channels": 128, "grid_every": 2000, "save_every": 2000},
        "tiny": {"steps": 1500, "batch": 32, "lr": 1e-3, "ema": 0.998, "ema_warmup": True, "size": 64,
                 "latent_norm": True, "labels": True, "pictures": 4096, "cache": True, "unet.model_channels": 64,
                 "unet.channel_mult": (1, 2), "unet.num_res_blocks": 1, "unet.attention_ds": (2,), "unet.groups": 16,
                 "workers": 1, "log_every": 20, "grid_every": 500, "save_every": 500},
    },
    "pretrain": {
        "paper": {},                                                         # Table 3: 13 hours on an A6000
        "small": {"epochs": 0, "steps": 20_000, "func.dim": 384, "func.heads": 6, "func.encoder_depth": 6,
                  "func.decoder_depth": 4, "func.hidden": 128, "lr": 3e-4, "grid_every": 2000, "save_every": 2000},
        "tiny": CM_TINY_FUNC | {"steps": 4000, "batch": 8, "lr": 1e-3, "lr_drop": True, "workers": 1,
                                "grid_every": 1000, "save_every": 1000},
    },
    "cm": {
        "paper": {},                                                         # Table 3: 224 hours on an A6000
        "ict": CM_ICT,                      # the paper's networks and lengths, without LPIPS and without a teacher
        "ect": CM_ECT,
        # Easy consistency tuning: no second copy of the weights, no LPIPS, and pictures long before the paper's recipe.
        "small": CM_ECT | {"steps": 60_000, "batch": 64, "lr": 3e-4, "ema": 0.999, "ema_warmup": True, "func.dim": 384,
                           "func.heads": 6, "func.encoder_depth": 6, "func.decoder_depth": 4, "func.hidden": 128,
                           "vit.dim": 384, "vit.heads": 6, "vit.depth": 11, "unet.model_channels": 96,
                           "unet.num_head_channels": 32, "grid_every": 2000, "save_every": 2000,
                           "distance_every": 2000},
        # Few wide steps along the noise, and weight on the large levels: an image function of this size cannot draw the
        # noise that F has to at small ones, and ECT's own weights, greatest there, wash the pre-training out.
        "tiny": CM_TINY_FUNC | CM_ECT | {"steps": 2000, "batch": 16, "lr": 3e-4, "ema": 0.998, "ema_warmup": True,
                                         "labels": True, "cm.stages": 2, "cm.gap_weight": False, "cm.P_mean": 1.0,
                                         "vit.patch": 8, "vit.dim": 128, "vit.depth": 7, "vit.heads": 4,
                                         "unet.model_channels": 16, "unet.channel_mult": (1, 2, 3, 4),
                                         "unet.num_res_blocks": 1, "unet.attention_ds": (4, 8), "unet.groups": 8,
                                         "unet.num_head_channels": 16, "workers": 1, "log_every": 20,
                                         "grid_every": 500, "save_every": 500, "distance_every": 500},
    },
}
# The published settings of one data set, on top of preset paper. The supplementary says 1M steps with the switch at
# 600K (J.2: "in the last 400K iterations"); the published configuration for such data has these. It also leaves the
# second stage at 600K steps, where the text says 1.7M for Mountains: steps=1.7e6 follows the text.
PAPER_DATA = {("ae", "mountains"): {"steps": 1_200_000, "p_original": 0.5, "original_from": 800_000},
              ("pretrain", "cifar10"): {"size": 32},
              ("pretrain", "lsun-church"): {"size": 128},
              ("pretrain", "lsun-classroom"): {"size": 128},
              ("cm", "cifar10"): {"size": 32, "steps": 400_000, "labels": True, "cm.mu0": 0.9},
              ("cm", "lsun-church"): {"size": 128},
              ("cm", "lsun-classroom"): {"size": 128}}
# CM-Func by resolution (A.2, D.2.1; attention of the UNet at 32, 16, 8 px). The text has four levels at 128 px too;
# with the published default of five the network grows with the resolution, as Figure 2 says: unet.channel_mult=1,2,3,4.
PAPER_SIZE = {32: {"func.patch": 4, "vit.patch": 4, "unet.attention_ds": (1, 2, 4)},
              64: {"func.patch": 4, "vit.patch": 4, "unet.attention_ds": (2, 4, 8)},
              128: {"func.patch": 8, "vit.patch": 8, "unet.attention_ds": (4, 8, 16),
                    "unet.channel_mult": (1, 1, 2, 3, 4)}}

# A run may be continued with these changed; anything else belongs to another run.
FREE = {"steps", "workers", "dtype", "tf32", "compile", "checkpoint", "channels_last", "accum", "log_every",
        "grid_every", "save_every", "keep_every", "preview_steps", "eval_every", "eval_n", "eval_features"}
COST = {"ae": "1,000,000 steps of batch 8: about 4 days on 4 A100",
        "ldm": "600,000 steps of batch 48: about 2.5 days on 4 A100",
        "pretrain": "30 epochs: 13 hours on an A6000 for CelebA at 64 px (Table 3)",
        "cm": "900,000 steps of batch 32: 224 hours on an A6000 for CelebA at 64 px (Table 3)"}


def options(cls: type, prefix: str = "") -> dict[str, type]:
    """Every option of a (nested) dataclass with its type, nested ones by dotted name."""
    found = {}
    for name, kind in typing.get_type_hints(cls).items():
        found |= options(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {prefix + name: kind}
    return found


def convert(name: str, kind: type, text: str):
    """The value of option `name` from its text; a ValueError names option, type and text."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int:
            number = float(text.replace("_", ""))
            if number != int(number):
                raise ValueError
            return int(number)
        if kind in (float, str):
            return kind(text)
        return tuple(int(v) for v in text.strip("()").split(",") if v.strip())
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"option {name}={text}: expected {getattr(kind, '__name__', 'integers like 1,2,4')}") from None


def apply(cfg, changes: dict):
    """A copy of the (nested) dataclass with dotted names replaced."""
    here = {k: v for k, v in changes.items() if "." not in k}
    for name in {k.split(".")[0] for k in changes if "." in k}:
        inner = {k.split(".", 1)[1]: v for k, v in changes.items() if k.startswith(name + ".")}
        here[name] = apply(getattr(cfg, name), inner)
    return dataclasses.replace(cfg, **here)


def configure(stage: str, preset: str, data_name: str, overrides: list[str]) -> Run:
    """Defaults, then the preset, then key=value; an unknown name or a wrong type is a ValueError that says so."""
    cls, _ = STAGES[stage]
    known, given = options(cls), {}
    for text in overrides:
        name, eq, value = text.partition("=")
        if not eq:
            raise ValueError(f"cannot read {text!r}: options are written key=value")
        if name not in known:
            raise ValueError(f"unknown option {name}; stage {stage} has: {', '.join(known)}")
        given[name] = convert(name, known[name], value)
    if preset not in PRESETS[stage]:
        raise ValueError(f"stage {stage} has no preset {preset}; there are: {', '.join(PRESETS[stage])}")
    base = ({} if preset in ("small", "tiny") else PAPER_DATA.get((stage, data_name), {})) | PRESETS[stage][preset]
    size = given.get("size", base.get("size", cls.size))
    by_size = {name: v for name, v in PAPER_SIZE.get(size, {}).items() if name in known}
    cfg = apply(cls(), by_size | base | {"data": data_name} | given)
    least = min(cfg.steps or "epochs" in known, cfg.batch, cfg.accum, cfg.log_every, cfg.grid_every, cfg.save_every)
    if least < 1 or cfg.batch % cfg.accum:
        raise ValueError("steps, batch, accum and the *_every options must be at least 1, and accum must divide batch")
    return cfg


# ---- several processes -----------------------------------------------------------------------------------------------

# Every rank draws its share of the same global batch, and all take the same step: weights, averages and optimiser are
# equal on all ranks, bit for bit. DistributedDataParallel would hide the reduction in hooks, which the adaptive weight
# of the GAN (a gradient inside the forward pass) goes around; here it is one call, once per optimiser step.


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """The device of this process; under torchrun inside a process group: NCCL between GPUs, gloo for all on CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # A dead rank closes its connections, which gloo sees at once, and torchrun ends the others; the time-out is for a
    # rank that hangs, and must outlast what rank 0 does alone: grids, scores, checkpoints.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def all_mean(tensors: list[Tensor]) -> list[Tensor]:
    """Means over all ranks, by one reduction; with one process, the tensors themselves."""
    world = ranks()[1]
    if world == 1 or not tensors:
        return tensors
    flat = torch.cat([t.detach().flatten() for t in tensors])
    dist.all_reduce(flat)
    return [part.view_as(t) for part, t in zip((flat / world).split([t.numel() for t in tensors]), tensors)]


def together(flag: int) -> int:
    """The largest flag of all ranks, so that they agree, say on when to stop."""
    if ranks()[1] == 1:
        return flag
    value = torch.tensor(flag)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


# ---- the loop --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_flag() -> Iterator[list[int]]:
    """A list that holds the signal's number after the first SIGTERM or SIGINT; a second one ends the process."""
    caught: list[int] = []

    def handler(number, frame):
        if caught:
            os._exit(128 + number)
        caught.append(number)
        if hasattr(signal, "SIGCHLD"):                    # a loader process that ends now must not break off the step
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for s, old in before.items():
            signal.signal(s, old)


def ema_update(ema: nn.Module, model: nn.Module, rate: float) -> None:
    """ema <- rate * ema + (1 - rate) * model, over all parameters; buffers are copied."""
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - rate)
        for mine, theirs in zip(ema.buffers(), model.buffers()):
            mine.copy_(theirs)


def descend(opt: torch.optim.Optimizer, wanted: Tensor | None = None) -> Tensor:
    """One optimiser step on the mean gradient of all ranks, unless that is not finite, or `wanted` () is false.

    Returns whether it was taken, (). A fused optimiser (`adam`) decides that on the device and nothing waits. Others
    are decided by the host, which waits for the gradients once: RAdam has no fused kernel, and undoing its step would
    take copies of the weights and of both moments.
    """
    params = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
    for p, grad in zip(params, all_mean([p.grad for p in params])):
        p.grad = grad
    taken = torch.isfinite(torch.stack(torch._foreach_norm([p.grad for p in params]))).all()
    taken = taken if wanted is None else taken & wanted
    if all(group.get("fused") for group in opt.param_groups):
        opt.found_inf = (~taken).float()                  # what a gradient scaler tells: leave weights and moments
        opt.step()
    elif taken:
        opt.step()
    opt.zero_grad(set_to_none=True)
    return taken


def adam(kind: type, params: Iterable[Tensor], cfg: Run, device: torch.device, **more: float) -> torch.optim.Optimizer:
    """Adam or AdamW, in fused kernels where the device has them."""
    return kind(params, cfg.lr, (cfg.beta1, cfg.beta2), fused=device.type in ("cpu", "cuda"), **more)


class WithMuon:
    """Two optimisers as one: Muon for the matrices in the blocks of a transformer, another for all else.

    Muon (Jordan et al. 2024) steps along the nearest orthogonal matrix to the momentum, here with the size that steps
    of Adam have at the same rate (Liu et al. 2025). Not in the papers, which have Adam and RAdam for everything.
    """

    def __init__(self, net: nn.Module, cfg: Run, other: Callable):
        inside = [p for block in net.modules() if isinstance(block, (Block, AdaLNBlock))
                  for name, p in block.named_parameters() if p.ndim == 2 and not name.startswith("modulation")]
        if not inside:
            raise ValueError(f"muon={cfg.muon:g} is for transformers, which this generator is not; leave it out")
        taken = set(map(id, inside))
        self.parts = {"muon": torch.optim.Muon(inside, cfg.muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
                      "other": other(p for p in net.parameters() if id(p) not in taken)}

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def with_muon(net: nn.Module, cfg: Run, make: Callable) -> torch.optim.Optimizer | WithMuon:
    """What make (parameters) gives for the whole net, or where option muon is set, for what Muon leaves over."""
    return WithMuon(net, cfg, make) if cfg.muon else make(net.parameters())


def save_checkpoint(run_dir: Path, step: int, content: dict, keep_every: int) -> Path:
    """Write step-<number>.pt: temporary name, fsync, checksums read back, rename; then delete all but the last two."""
    path, part = run_dir / f"step-{step:08d}.pt", run_dir / f"step-{step:08d}.part"
    try:
        with open(part, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        with zipfile.ZipFile(part) as archive:
            if archive.testzip() is not None:
                raise OSError(f"{part} was not written correctly; is the disk failing?")
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(run_dir, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    for old in checkpoints(run_dir)[2:]:
        if not keep_every or int(old.stem.split("-")[1]) % keep_every:
            old.unlink()
    return path


def try_to_save(run_dir: Path, step: int, content: dict, keep_every: int, last: bool) -> None:
    """save_checkpoint, three times if need be. A run outlives a full disk: it warns, and saves at the next interval.

    Raises OSError where it was the last chance: at the end of the run, or before stopping.
    """
    for wait in (0.5, 2.0, None):
        try:
            save_checkpoint(run_dir, step, content, keep_every)
            return
        except (OSError, RuntimeError) as error:                     # torch.save reports a full disk as RuntimeError
            if wait is not None:
                time.sleep(wait)
                continue
            reason = str(error).splitlines()[0]
            if last:
                raise OSError(f"step {step} could not be saved in {run_dir} ({reason}); what is there is older")
            warnings.warn(f"step {step} could not be saved ({reason}); training goes on and tries again at the next "
                          f"save; older checkpoints are untouched")


def all_finite(state: dict) -> bool:
    """Whether every parameter and buffer of the modules is finite."""
    tensors = [t for part in state.values() if isinstance(part, nn.Module) for t in part.state_dict().values()
               if t.is_floating_point()]
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(tensors))).all())


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder; ValueError where another run does. The lock goes with the process, however it ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if fcntl is None or ranks()[0]:                                  # no such locks on Windows; rank 0 holds it for all
        yield
        return
    with open(run_dir / "lock", "a") as file:                          # opening leaves it unchanged
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {run_dir}; wait for it, or choose another --out") from None
        for part in run_dir.glob("*.part"):                          # left by a run that was killed while it wrote
            part.unlink()
        yield


def plain(value):
    """Tensors to numbers, tuples to lists: what JSON and a weights-only checkpoint hold."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value.item() if isinstance(value, Tensor) else value


def difference(old: dict, new: dict, prefix: str = "") -> list[str]:
    """The options in which two stored configurations differ, as 'name: old -> new'."""
    out = []
    for k in sorted(set(old) | set(new)):
        a, b = old.get(k), new.get(k)
        if isinstance(a, dict) and isinstance(b, dict):
            out += difference(a, b, f"{prefix}{k}.")
        elif a != b and prefix + k not in FREE:
            out.append(f"{prefix}{k}: {a} -> {b}")
    return out


class Meter:
    """Means of what the steps report between two log lines, read from the device for up to 20 steps at once."""

    def __init__(self):
        self.sums: dict[str, tuple] = {}                  # name -> (sum, count); goes into checkpoints
        self.unread: list[tuple] = []                     # (logs, (step, images)) of steps the host knows nothing about
        self.bad = 0                                      # skipped steps in a row
        self.images, self.waited, self.since = 0, 0.0, time.perf_counter()

    def wait_for(self, stream: Iterator[dict]) -> dict:
        """The next batch; the time it takes counts as waiting for data."""
        before = time.perf_counter()
        batch = next(stream)
        self.waited += time.perf_counter() - before
        return batch

    def all_ranks(self) -> dict[str, tuple]:
        """The sums as means over all ranks: what one process would have."""
        self.read()
        names = list(self.sums)
        totals = all_mean([torch.as_tensor(self.sums[name][0], dtype=torch.float64).cpu() for name in names])
        return {name: (total.item(), self.sums[name][1]) for name, total in zip(names, totals)}

    def add(self, logs: dict, images: int, where: tuple[int, Tensor]) -> None:
        """What a step reports, () tensors with "taken" among them; where: its number and the samples it saw."""
        self.unread.append(({name: value.detach() for name, value in logs.items()}, where))
        self.images += images
        if len(self.unread) == 20:
            self.read()

    def read(self) -> None:
        """Fetch what is unread: here alone training waits for the device. RuntimeError after 20 skipped steps."""
        rows, self.unread = self.unread, []
        for name in dict.fromkeys(name for logs, _ in rows for name in logs):
            having = [logs for logs, _ in rows if name in logs]
            for logs, value in zip(having, torch.stack([logs[name] for logs in having]).tolist()):
                logs[name] = value
        for logs, (k, index) in rows:
            taken = logs.pop("taken")
            self.bad = 0 if taken else self.bad + 1
            if self.bad == 20:
                raise RuntimeError(f"the gradients of 20 steps in a row are not finite; last batch: images "
                                   f"{index.tolist()} of step {k}. The newest checkpoint is good; lower lr")
            for name, value in (logs if taken else {"skipped": 1}).items():
                total, n = self.sums.get(name, (0, 0))
                self.sums[name] = total + value, n + 1 if taken else 1       # skipped steps are counted, not averaged

    def means(self) -> dict:
        """Means, images/s and the share of the time spent waiting for data; starts the next window."""
        elapsed = time.perf_counter() - self.since
        line = {name: round(total / n, 6) for name, (total, n) in self.all_ranks().items()}
        line |= {"images_per_s": round(self.images / elapsed, 2), "data_wait": round(self.waited / elapsed, 4)}
        self.sums, self.images, self.waited, self.since = {}, 0, 0.0, time.perf_counter()
        return line

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training time: saving and drawing."""
        before = time.perf_counter()
        yield
        self.since += time.perf_counter() - before


def cut_log(log: Path, step: int) -> None:
    """Keep the lines of a log up to a step: those written after that checkpoint are about to come again."""

    def number(line: str) -> float:
        try:
            return json.loads(line)["step"]
        except ValueError:                                # cut short by a kill
            return float("inf")

    if log.exists() and ranks()[0] == 0:
        kept = [line for line in log.read_text().splitlines() if number(line) <= step]
        log.with_suffix(".part").write_text("".join(line + "\n" for line in kept))
        log.with_suffix(".part").rename(log)


def say(text: str) -> None:
    """Print, once for all ranks."""
    if ranks()[0] == 0:
        print(text)


def resume(run_dir: Path, stage: str, cfg: Run, state: dict, meter: Meter) -> int:
    """Restore the newest checkpoint of the run into `state` and `meter`; returns the step to go on from, or 0.

    Raises ValueError where the folder holds a run of another stage or configuration: nothing of it is touched.
    """
    if not checkpoints(run_dir):
        cut_log(run_dir / "log.jsonl", 0)                 # of a run that was killed before its first checkpoint
        return 0
    path, ckpt = newest_checkpoint(run_dir)
    changed = [f"stage: {ckpt['stage']} -> {stage}"] if ckpt["stage"] != stage else \
        difference(plain(asdict(build(type(cfg), ckpt["config"]))), plain(asdict(cfg)))  # newer options: their default
    if changed:
        raise ValueError(f"{run_dir} holds another run ({'; '.join(changed)}); choose another --out, or those options")
    for name, part in state.items():
        if isinstance(part, nn.Module):
            fill(part, ckpt["state"][name], f"{name} in {path}")
        else:
            part.load_state_dict(ckpt["state"][name])
    meter.sums = {name: tuple(value) for name, value in ckpt["log"].items()}
    cut_log(run_dir / "log.jsonl", ckpt["step"])
    say(f"continuing {run_dir} from step {ckpt['step']}")
    return ckpt["step"]


@dataclass
class Setup:
    """A stage that is ready: what `fit` trains and `bench_step` measures."""

    cfg: Run                          # with what follows from the data and from other options
    source: object                    # the pictures
    state: dict                       # name -> module or optimiser, all a checkpoint restores; "ema" follows "model"
    step: Callable                    # (batch, k) -> dict of () tensors to log; "taken": whether the optimiser moved
    batches: Callable                 # (k) -> iterator of batches from step k on
    preview: Callable                 # (k) -> None, writes pictures and scores where step k is due for them
    extra: dict = field(default_factory=dict)              # plain values stored in every checkpoint
    scores: Callable | None = None    # () -> the scores of `evaluate` once training has ended

    def advance(self, batch: dict, k: int) -> dict:
        """Step k with random numbers of its own, and the average of the weights; returns what to log."""
        torch.manual_seed(int(rng(self.cfg.seed, "dropout", k, ranks()[0]).integers(2**62)))  # nothing else draws here
        logs = self.step(batch, k)
        if "ema" in self.state:
            rate = min(self.cfg.ema, (1 + k) / (10 + k)) if self.cfg.ema_warmup else self.cfg.ema
            ema_update(self.state["ema"], self.state["model"], rate)
        return logs


def fit(stage: str, setup: Setup, run_dir: Path) -> None:
    """Train to cfg.steps: batches, steps, EMA, log.jsonl, grids and checkpoints.

    Raises Stopped after a signal (the run is saved), RuntimeError after 20 steps in a row with non-finite gradients.
    """
    meter, rank, cfg = Meter(), ranks()[0], setup.cfg
    with locked(run_dir), stop_flag() as stop:
        together(0)                                       # the folder is rank 0's before anyone reads it
        start = resume(run_dir, stage, cfg, setup.state, meter)
        stream = setup.batches(start)
        together(0)                                       # all have read; from here on rank 0 alone writes
        with open(os.devnull if rank else run_dir / "log.jsonl", "a") as log, tqdm(
                total=cfg.steps, initial=start, desc=stage, unit="step", disable=True if rank else None,
                dynamic_ncols=True) as bar:
            for k in range(start, cfg.steps):
                batch = meter.wait_for(stream)
                meter.add(setup.advance(batch, k), cfg.batch, (k, batch["index"]))
                done = k + 1
                bar.update(1)
                if done % cfg.log_every == 0 or done == cfg.steps:
                    line = {"step": done, **meter.means()}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    bar.set_postfix({n: line[n] for n in ("loss", "images_per_s", "data_wait") if n in line})
                with meter.paused():
                    signalled = together(stop[0] if stop else 0)
                    last = done == cfg.steps or signalled > 0
                    if done % cfg.save_every == 0 or last:
                        save(stage, setup, run_dir, done, meter, last)
                    if rank == 0:
                        setup.preview(done)
                if signalled:
                    together(0)                           # torchrun ends the others as soon as one has ended
                    raise Stopped(128 + signalled)


def save(stage: str, setup: Setup, run_dir: Path, step: int, meter: Meter, last: bool) -> None:
    """Write a checkpoint (rank 0); RuntimeError where the weights are no longer finite: the older ones are good."""
    cfg, state, sums = setup.cfg, setup.state, meter.all_ranks()
    if not all_finite(state):
        raise RuntimeError(f"the weights are not finite at step {step}; the newest checkpoint in {run_dir} is good; "
                           f"lower lr")
    if ranks()[0] == 0:
        content = {"format": FORMAT, "stage": stage, "step": step, "config": plain(asdict(cfg)), **setup.extra,
                   "state": {name: part.state_dict() for name, part in state.items()}, "log": plain(sums)}
        try_to_save(run_dir, step, content, cfg.keep_every, last)


# ---- stage ae --------------------------------------------------------------------------------------------------------


def micro_batches(batch: dict, accum: int) -> list[dict]:
    """The batch in `accum` equal parts."""
    parts = {name: value.chunk(accum) for name, value in batch.items()}
    return [{name: part[j] for name, part in parts.items()} for j in range(accum)]


def ae_step(model: FieldAutoencoder, disc: PatchDiscriminator, opt: torch.optim.Optimizer, opt_d: torch.optim.Optimizer,
            perceptual: Callable | None, cfg: AERun, autocast: Callable = contextlib.nullcontext) -> Callable:
    """One iteration of the first stage: the generator (E, D, R), then the discriminator on the updated generator.

    The discriminator runs three times in train mode, on fake, real, fake, and so updates its BatchNorm statistics three
    times, as the published loop does. LPIPS is in eval mode; the published loop leaves its dropout on by accident.
    """
    last = model.renderer.last_weight

    def reconstruct(b: dict) -> tuple[Tensor, Tensor]:
        with autocast():
            rgb, reg = model(b["image"], b["coord"], b["cell"], b.get("kl"))             # (B, 3, P, P), ()
        return rgb.float(), reg

    def generator_loss(b: dict, gan: bool) -> tuple[Tensor, dict]:
        rgb, reg = reconstruct(b)
        l1 = (rgb - b["patch"]).abs().mean()
        logs, nll = {"l1": l1, "reg": reg}, l1
        if perceptual is not None:
            with autocast():
                logs["lpips"] = perceptual(rgb, b["patch"]).float().mean()
            nll = nll + cfg.lpips_weight * logs["lpips"]
        loss = value = nll + cfg.reg_weight * reg
        if gan:
            with autocast():
                g = -disc(rgb).float().mean()
            nll, push = linear(nll, rgb), linear(g, rgb)
            weight = adaptive_weight(nll, push, last, all_mean)
            loss = nll + cfg.reg_weight * reg + cfg.gan_weight * weight * push
            value = value + cfg.gan_weight * weight * g
            logs |= {"gan": g, "gan_weight": weight}
        return loss, logs | {"loss": value}

    def discriminator_loss(b: dict) -> tuple[Tensor, dict]:
        with torch.no_grad():
            rgb, _ = reconstruct(b)                                          # drawn again, by the updated generator
        with autocast():
            real, fake = disc(b["patch"]).float(), disc(rgb).float()         # two calls: BatchNorm sees them apart
        loss = hinge_loss(real, fake)
        return loss, {"disc": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}

    def step(batch: dict, k: int) -> dict:
        gan, logs, taken = cfg.gan_weight > 0 and k >= cfg.gan_start, {}, None
        before = [b.clone() for b in disc.buffers() if gan]  # BatchNorm sees a batch before anyone knows it is bad
        parts = micro_batches(batch, cfg.accum)
        phases = [(lambda b: generator_loss(b, gan), opt)] + [(discriminator_loss, opt_d)] * gan
        for phase, optimiser in phases:
            disc.requires_grad_(optimiser is opt_d)
            for b in parts:
                loss, part = phase(b)
                (loss / cfg.accum).backward()
                logs = add(logs, part, cfg.accum)
            taken = descend(optimiser, taken)             # without a step of the generator, none of its adversary
        for b, old in zip(disc.buffers(), before):
            b.copy_(torch.where(taken, b, old))
        return logs | {"taken": taken}

    return step


def linear(loss: Tensor, x: Tensor) -> Tensor:
    """A loss of x by its gradient there: a linear function of x, of another value and the same gradients before x.

    However often it is backpropagated, to the last layer for the adaptive weight and then to all of the generator,
    LPIPS and the discriminator are gone through once.
    """
    slope, = torch.autograd.grad(loss, x)
    return (slope * x).sum()


def add(logs: dict, part: dict, accum: int) -> dict:
    """Means over micro-batches, kept on the device."""
    return {**logs, **{k: logs.get(k, 0) + v.detach() / accum for k, v in part.items()}}


def kl_noise(cfg: AutoencoderConfig, size: int) -> dict[str, tuple[int, ...]]:
    """The noise that a batch needs for the KL encoder, as `data.loader` takes it."""
    return {"kl": (cfg.z_channels, size // cfg.f, size // cfg.f)} if cfg.kl else {}


def ae_batches(cfg: AERun, source, device: torch.device) -> Callable:
    """Random patches at random scales; from step original_from on, with chance p_original at the largest (J.2)."""

    def patches(start: int, p_original: float) -> Iterator[dict]:
        shape = DataConfig(cfg.size, cfg.patch, cfg.max_size, cfg.p_whole, p_original, cfg.downsample, cfg.flip)
        item = functools.partial(data.random_patch, cfg=shape)
        return source_batches(cfg, source, item, cfg.workers, device, kl_noise(cfg.ae, cfg.size))(start)

    def batches(start: int) -> Iterator[dict]:
        if start < cfg.original_from:
            yield from itertools.islice(patches(start, 0.0), cfg.original_from - start)
            start = cfg.original_from
        yield from patches(start, cfg.p_original)

    return batches


def on_device(batches: Iterator[dict], device: torch.device) -> Iterator[dict]:
    """The batches on the device, but for the samples' numbers, which the host needs.

    A GPU copies them from pinned memory beside its own work: the host, which waits for no step, asks for a batch while
    the step before is still computed.
    """
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(copies):                                      # None: does nothing
            moved = {k: v.to(device, non_blocking=True) for k, v in batch.items() if k != "index"}
        if copies is not None:
            now = torch.cuda.current_stream(device)
            now.wait_stream(copies)
            for v in moved.values():
                v.record_stream(now)                                         # its memory is free after this step only
        yield moved | {"index": batch["index"]}


def setup_ae(cfg: AERun, run_dir: Path, device: torch.device) -> Setup:
    """Stage ae: E, D, R with L1 + LPIPS + adaptive GAN + VQ (or KL), on patches of random scale."""
    source, held_out = data.open_data(cfg.data, "train"), data.open_data(cfg.data, "val")
    perceptual = None if cfg.lpips == "none" else metrics.lpips_network(cfg.lpips).to(device)
    if cfg.frozen_encoder and not cfg.init:
        raise ValueError("frozen_encoder=true goes with init=RUN: an encoder that never learned makes a poor z")
    torch.manual_seed(cfg.seed)
    model, disc = FieldAutoencoder(cfg.ae).to(device), PatchDiscriminator(cfg.disc).to(device)
    if cfg.init and not checkpoints(run_dir):
        continue_from(model, disc, Path(cfg.init))
    model.encoder.requires_grad_(not cfg.frozen_encoder)
    # The published loop has one Adam per part; Adam treats every parameter alone, so one for E, D, R is the same.
    opt, opt_d = (adam(torch.optim.Adam, m.parameters(), cfg, device) for m in (model, disc))
    state = {"model": model, "disc": disc, "opt": opt, "opt_d": opt_d}
    if cfg.ema:
        state["ema"] = copy.deepcopy(model).requires_grad_(False)
    shown = state.get("ema", model)
    # Of the renderer all but its last layer, whose gradients the adaptive weight asks for alone.
    trunk = [(model.renderer, "trunk")] if isinstance(model.renderer, CLIF) else []
    speed_up(cfg, device, [model, disc], [(model.encoder, "forward"), (model.decoder, "forward"), *trunk])

    def preview(k: int) -> None:
        if k % cfg.grid_every == 0 or k == cfg.steps:
            Image.fromarray(ae_sheet(shown, held_out, cfg, device)).save(run_dir / f"grid-{k:08d}.png")

    return Setup(cfg, source, state, ae_step(model, disc, opt, opt_d, perceptual, cfg, autocast_for(cfg, device)),
                 ae_batches(cfg, source, device), preview,
                 scores=lambda: evaluate_ae(shown, held_out, cfg, device, perceptual))


# ---- what stage ae shows ---------------------------------------------------------------------------------------------


def starting_point(init: Path, *stages: str) -> tuple[Path, dict]:
    """The state of another run (its folder, or a file) with its stage, and its best weights: the moving average."""
    path, ckpt = newest_checkpoint(init) if init.is_dir() else (init, read_checkpoint(init))
    if ckpt.get("stage") not in stages:
        raise ValueError(f"{init} is no run of stage {' or '.join(stages)}")
    say(f"starting from {path}")
    state = ckpt["state"]
    return path, state | {"stage": ckpt["stage"], "best": state.get("ema", state.get("model"))}


def continue_from(model: FieldAutoencoder, disc: PatchDiscriminator, init: Path) -> None:
    """Load another run of stage ae: the moving average, where it has one, and its adversary."""
    path, state = starting_point(init, "ae")
    fill(model, state["best"], f"the autoencoder in {path}")
    fill(disc, state.get("disc", {}), f"the discriminator in {path}")


@torch.no_grad()
def ae_sheet(model: FieldAutoencoder, source, cfg: AERun, device: torch.device, n: int = 4) -> np.ndarray:
    """Held-out pictures, a row each: the input, then render | truth at 1x, 2x and 4x the training resolution.

    A panel has at most 512 px: of a larger rendering it shows the centre, drawn as a window.
    """
    rows, side = [], min(4 * cfg.size, 512)
    for i in range(min(n, len(source))):
        picture = source[i]
        image = data.to_tensor(picture.draw(cfg.size))[None].to(device)
        phi = model.decode(model.encode(image))
        panels = [picture.draw(cfg.size)]
        for scale in (1, 2, 4):
            res = scale * cfg.size
            shown, corner = min(res, side), (res - min(res, side)) // 2
            half = shown / res
            pixels = draw(model.renderer, phi, (shown, shown), cfg.patch, (-half, -half, half, half))[0]
            panels += [pixels] + [picture.draw(res, (corner, corner, shown, shown))] * (res <= picture.size)
        rows.append(panels)
    return contact_sheet(rows, side)


def contact_sheet(rows: list[list[np.ndarray]], side: int, gap: int = 4) -> np.ndarray:
    """Square pictures in rows, each enlarged to `side` by nearest neighbour, so that pixels stay visible."""
    sheet = np.full((len(rows) * (side + gap), max(map(len, rows)) * (side + gap), 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, pixels in enumerate(row):
            y, x = r * (side + gap), c * (side + gap)
            sheet[y:y + side, x:x + side] = np.asarray(Image.fromarray(pixels).resize((side, side), Image.NEAREST))
    return sheet[:-gap, :-gap]


@torch.no_grad()
def evaluate(reconstruct: Callable, source, n: int, size: int, scales: list[int], device: torch.device,
             perceptual: Callable | None = None) -> dict:
    """PSNR (and LPIPS) of n held-out pictures at multiples of the training resolution, beside bicubic upsampling of the
    1x rendering. A picture counts at a scale if its original has that many pixels.

    reconstruct (image (1, 3, S, S)) -> a function of the resolution that draws (1, 3, res, res) in [-1, 1].
    """
    scores: dict = {f"{s}x": {"px": s * size, "n": 0} for s in scales}
    for i in range(min(n, len(source))):
        picture, base = source[i], None
        drawn = reconstruct(data.to_tensor(picture.draw(size))[None].to(device))
        for scale in scales:
            res, out = scale * size, scores[f"{scale}x"]
            if res > picture.size:
                continue
            rgb = data.to_tensor(to_uint8(drawn(res)[0]))[None].to(device)
            base = rgb if base is None else base
            truth = data.to_tensor(picture.draw(res))[None].to(device)
            out["n"] += 1
            for name, image in (("render", rgb), ("bicubic", F.interpolate(base, (res, res), mode="bicubic"))):
                out[f"psnr_{name}"] = out.get(f"psnr_{name}", 0) + metrics.psnr(image, truth).item()
                if perceptual is not None:
                    out[f"lpips_{name}"] = out.get(f"lpips_{name}", 0) + perceptual(image.clamp(-1, 1), truth).item()
    return {scale: {k: v if k in ("n", "px") else round(v / out["n"], 4) for k, v in out.items()}
            for scale, out in scores.items()}


def evaluate_ae(model: FieldAutoencoder, source, cfg: AERun, device: torch.device, perceptual: Callable | None) -> dict:
    """Scores at 1x, 2x, 4x the encoder's resolution, and at 8x unless that is over twice what max_size trained."""

    def reconstruct(image: Tensor) -> Callable:
        phi = model.decode(model.encode(image))
        return lambda res: model.render(phi, res, tile=cfg.patch)

    scales = [s for s in (1, 2, 4, 8) if s <= 4 or s * cfg.size <= 2 * cfg.max_size]
    return evaluate(reconstruct, source, cfg.eval_n, cfg.size, scales, device, perceptual)


def keep_scores(result: dict, run_dir: Path) -> None:
    """Write the scores of `evaluate` to eval.json and print them."""
    (run_dir / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    print(score_table(result))


def score_table(result: dict) -> str:
    """The scores of `evaluate` as text."""
    lines = ["held-out pictures      PSNR render  bicubic from 1x   LPIPS render  bicubic"]
    for scale, r in result.items():
        if r["n"]:
            lpips = [f"{r[k]:.4f}" if k in r else "-" for k in ("lpips_render", "lpips_bicubic")]
            lines.append(f"{scale:>3} {r['px']:4d} px ({r['n']:3d}) {r['psnr_render']:15.2f} {r['psnr_bicubic']:16.2f} "
                         f"{lpips[0]:>14} {lpips[1]:>8}")
    return "\n".join(lines)


# ---- stage ldm -------------------------------------------------------------------------------------------------------


def picture_item(picture, gen: np.random.Generator, size: int, flip: bool) -> dict:
    """A whole picture at `size`, perhaps mirrored."""
    image = data.to_tensor(picture.draw(size))
    return {"image": image.flip(-1) if flip and gen.random() < 0.5 else image}


def source_batches(cfg: Run, source, make_item: Callable, workers: int, device: torch.device,
                   noise: dict[str, tuple[int, ...]]) -> Callable:
    """batches(start): this rank's share of the batches from step `start` on, with their noise, on the device."""

    def batches(start: int) -> Iterator[dict]:
        stream = data.loader(source, make_item, cfg.batch, start, cfg.seed, workers, *ranks(),
                             pin_memory=device.type == "cuda", noise=noise)
        return on_device(stream, device)

    return batches


def picture_batches(cfg: Run, source, device: torch.device, noise: dict[str, tuple[int, ...]]) -> Callable:
    """batches(start) of whole pictures at cfg.size."""
    item = functools.partial(picture_item, size=cfg.size, flip=cfg.flip)
    return source_batches(cfg, source, item, cfg.workers, device, noise)


def ldm_step(unet: UNet, encode: Callable, diffusion: GaussianDiffusion, opt: torch.optim.Optimizer, cfg: LDMRun,
             draw_noise: Callable, autocast: Callable = contextlib.nullcontext) -> Callable:
    """One iteration of the second stage: the mean squared error of the predicted noise, at uniform time steps.

    encode (batch) -> z; draw_noise (batch) -> (t, noise), a function of the samples' numbers.
    """

    def step(batch: dict, k: int) -> dict:
        logs: dict = {}
        for b in micro_batches(batch, cfg.accum):
            z = encode(b)                                                    # (B, C, h, w), before quantisation
            t, noise = draw_noise(b)
            with autocast():
                loss = diffusion.loss(unet, z, t, noise, b["label"] if cfg.unet.num_classes else None).mean()
            (loss / cfg.accum).backward()
            logs = add(logs, {"loss": loss}, cfg.accum)
        return logs | {"taken": descend(opt)}

    return step


@dataclass
class Pictures:
    """The first n pictures of a source at one size, for a DataLoader that goes through them once."""

    source: object
    n: int
    size: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Tensor:
        return data.to_tensor(self.source[i].draw(self.size))                # (3, S, S)


@dataclass
class Latents:
    """What `data.loader` needs of a source, with latents in place of pictures: z (N, 1, C, h, w), or (N, 2, C, h, w)
    where the second is that of the mirrored picture. z may be larger than memory: it stays on the disk.
    """

    z: np.ndarray
    labels: list[int]

    def __len__(self) -> int:
        return len(self.z)

    def label(self, i: int) -> int:
        return self.labels[i]

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(np.array(self.z[i]))


def latent_item(z: Tensor, gen: np.random.Generator) -> dict:
    """One latent as an item of a batch; mirrored for the samples for which `picture_item` mirrors."""
    return {"z": z[int(len(z) > 1 and gen.random() < 0.5)]}


def latents_digest(base: INFD, source, cfg: LDMRun, n: int) -> str:
    """A hash of all that decides the latents of the first n pictures: files, drawing, size, flips, and the encoder."""
    digest = hashlib.sha256(repr((data.fingerprint(source), cfg.size, n, cfg.flip, base.autoencoder.cfg)).encode())
    for i in (0, n // 2, n - 1):                                             # the same files may be drawn otherwise
        digest.update(source[i].draw(cfg.size).tobytes())
    for name, weight in base.autoencoder.encoder.state_dict().items():
        digest.update(name.encode() + weight.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_all(base: INFD, source, cfg: LDMRun, device: torch.device, folder: Path) -> Latents:
    """The latents of all (or the first cfg.pictures) pictures; read from `folder` if the same encoding left them.

    The KL variant keeps the mean: its standard deviation is a small fraction of the spread between pictures.
    """
    n = min(cfg.pictures or len(source), len(source))
    file = folder / f"latents-{latents_digest(base, source, cfg, n)}.npy"
    if not file.exists() and ranks()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        z = np.lib.format.open_memmap(part, "w+", np.float32, (n, 1 + cfg.flip, *base.latent_shape))
        images = torch.utils.data.DataLoader(Pictures(source, n, cfg.size), 32, num_workers=cfg.workers)
        for at, x in zip(itertools.count(0, 32), tqdm(images, "encoding", disable=None)):
            for flipped in range(1 + cfg.flip):
                z[at:at + len(x), flipped] = base.autoencoder.encode((x.flip(-1) if flipped else x).to(device)).cpu()
        z.flush()
        part.rename(file)
    together(0)                                                              # the other ranks wait for the file
    return Latents(np.load(file, mmap_mode="r"), [source.label(i) for i in range(n)])


def latent_batches(cfg: LDMRun, base: INFD, source, device: torch.device, run_dir: Path) -> tuple[Callable, Callable]:
    """(batches, encode): batches(start) iterates from that step on, encode(batch) gives z, cached or encoded afresh."""
    noise = {"eps": base.latent_shape}
    if cfg.cache:
        latents = encode_all(base, source, cfg, device, run_dir)
        batches = source_batches(cfg, latents, latent_item, 0, device, noise)
    else:
        batches = picture_batches(cfg, source, device, noise | kl_noise(base.autoencoder.cfg, cfg.size))
    autocast = autocast_for(cfg, device)

    @torch.no_grad()
    def encode(b: dict) -> Tensor:
        if cfg.cache:
            return b["z"]
        with autocast():
            return base.autoencoder.encode(b["image"], b.get("kl")).float()  # (B, C, h, w)

    return batches, encode


def setup_ldm(cfg: LDMRun, run_dir: Path, device: torch.device) -> Setup:
    """Stage ldm: the UNet learns the latents of a frozen autoencoder."""
    init = Path(cfg.init) if cfg.init else run_dir.parent / "ae"
    if not init.exists():
        raise FileNotFoundError(f"stage ldm needs an autoencoder and there is none at {init}; run --stage ae first "
                                f"with the same --data and --preset, or name one with init=RUN")
    base = load(init, device)
    if base.size != cfg.size:
        raise ValueError(f"the autoencoder in {init} was trained at size={base.size}; give size={base.size}")
    if cfg.pictures and not cfg.cache:
        raise ValueError("pictures=N goes with cache=true: only cached latents can be a part of the data")
    source = data.open_data(cfg.data, "train")
    if isinstance(source, data.SixKMix):                                     # the published second stage of the 6K-mix
        source = source.photos                                               # sees every file once, at 256 px
    channels, *side = base.latent_shape
    cfg = apply(cfg, {"unet.in_channels": channels, "unet.out_channels": channels,
                      "unet.num_classes": len(source.classes) if cfg.labels else 0})
    torch.manual_seed(cfg.seed)
    unet, scale = UNet(cfg.unet).to(device), LatentScale(channels).to(device)
    if cfg.start and not checkpoints(run_dir):
        path, other = starting_point(Path(cfg.start), "ldm")
        fill(unet, other["best"], f"the UNet in {path}")
    diffusion = GaussianDiffusion(cfg.diffusion)
    opt = adam(torch.optim.AdamW, unet.parameters(), cfg, device, weight_decay=cfg.weight_decay)
    state = {"model": unet, "opt": opt, "scale": scale}
    if cfg.ema:
        state["ema"] = copy.deepcopy(unet).requires_grad_(False)
    batches, encode = latent_batches(cfg, base, source, device, run_dir)
    if cfg.latent_norm and not checkpoints(run_dir):                         # a continued run has them in `scale`
        z = torch.cat([encode(b).cpu() for b in itertools.islice(batches(0), -(-512 // cfg.batch))])
        scale.mean.copy_(all_mean([z.mean(dim=(0, 2, 3))])[0])
        centred = z - scale.mean.cpu()[:, None, None]
        scale.std.copy_(all_mean([centred.square().mean(dim=(0, 2, 3))])[0].sqrt())
    encoder = [] if cfg.cache else [(base.autoencoder.encoder, "forward")]
    speed_up(cfg, device, [unet], [(unet, "forward"), *encoder])

    def draw_noise(b: dict) -> tuple[Tensor, Tensor]:
        t = torch.tensor([int(rng(cfg.seed, "t", n).integers(cfg.diffusion.steps)) for n in b["index"].tolist()])
        return t.to(device, non_blocking=True), b["eps"]

    step = ldm_step(unet, lambda b: scale(encode(b)), diffusion, opt, cfg, draw_noise, autocast_for(cfg, device))
    infd = INFD(base.autoencoder, state.get("ema", unet), diffusion, scale, base.size, base.patch, source.classes)
    extra = {"autoencoder": base_checkpoint(base), "classes": list(source.classes) if cfg.labels else []}
    network = metrics.load_features(cfg.eval_features).to(device) if cfg.eval_every else None

    def preview(k: int) -> None:
        if k % cfg.grid_every == 0 or k == cfg.steps:
            ldm_preview(infd, cfg, run_dir / f"grid-{k:08d}.png")
        if network is not None and (k % cfg.eval_every == 0 or k == cfg.steps):
            score_samples(infd, network, cfg, k, run_dir)

    return Setup(cfg, source, state, step, batches, preview, extra)


def score_samples(infd: INFD, network: nn.Module, cfg: LDMRun, k: int, run_dir: Path) -> None:
    """Frechet distance of eval_n samples to as many held-out pictures, at the training size, into scores.jsonl."""
    held_out = data.open_data(cfg.data, "val")
    n = min(cfg.eval_n, len(held_out))
    truth = (data.to_tensor(held_out[i].draw(cfg.size))[None] for i in range(n))
    drawn = (infd.render(infd.sample(list(range(at, min(at + 16, n))), cfg.seed, cfg.preview_steps), cfg.size)
             for at in range(0, n, 16))
    protocol = metrics.Protocol(cfg.eval_features)
    ours, theirs = (metrics.statistics(s, network, protocol).moments["pool"] for s in (drawn, truth))
    name = "FID" if cfg.eval_features == "inception" else f"FD-{cfg.eval_features}"
    score = {"step": k, f"{name}@{n}": round(metrics.frechet_distance(*ours, *theirs), 4)}
    with open(run_dir / "scores.jsonl", "a") as f:
        f.write(json.dumps(score) + "\n")
    print(score)


def base_checkpoint(base: INFD) -> dict:
    """What a checkpoint of stage ldm keeps of the autoencoder, so that it can be sampled from alone."""
    config = {"ae": plain(asdict(base.autoencoder.cfg)), "size": base.size, "patch": base.patch}
    return {"config": config, "weights": base.autoencoder.state_dict()}


def ldm_preview(infd: INFD, cfg: LDMRun, path: Path, n: int = 8) -> None:
    """The same n latents drawn at 1x, 2x and 4x, a row each, from noise that stays fixed over the run."""
    z = infd.sample(list(range(n)), cfg.seed, cfg.preview_steps)
    fields = [infd.autoencoder.decode(z[i:i + 1]) for i in range(n)]          # decoded once, drawn three times
    side, rows = min(4 * infd.size, 512), []
    for scale in (1, 2, 4):
        res = min(scale * infd.size, side)
        rows.append([draw(infd.autoencoder.renderer, phi, (res, res), infd.patch)[0] for phi in fields])
    Image.fromarray(contact_sheet(rows, side)).save(path)


# ---- stage pretrain --------------------------------------------------------------------------------------------------


def function_parts(net: FunctionGenerator) -> nn.ModuleDict:
    """What stage pretrain trains and hands to stage cm (3.4): patch embedding and function prediction."""
    return nn.ModuleDict({"embed": net.embed, "predict": net.predict})


def moved_grid(batch: dict, corners: bool) -> Tensor:
    """Variational coordinates (B, S, S, 2) of the pixels, shifted by each sample's own noise (3.2)."""
    noise = batch["coord"]                                                   # (B, S, S, 2)
    return variational_coord(pixel_coord(noise.shape[1:3], corners=corners, device=noise.device), noise)


def pretrain_step(net: FunctionGenerator, opt: torch.optim.Optimizer, cfg: PretrainRun,
                  autocast: Callable = contextlib.nullcontext) -> Callable:
    """One iteration of pre-training: the encoder is skipped, and sigma is 0."""
    rates = [group["lr"] for group in opt.param_groups]          # a checkpoint loaded later may hold dropped ones

    def step(batch: dict, k: int) -> dict:
        logs: dict = {}
        for group, lr in zip(opt.param_groups, rates):
            group["lr"] = lr * (0.1 if cfg.lr_drop and k >= 0.8 * cfg.steps else 1)
        for b in micro_batches(batch, cfg.accum):
            x = b["image"]                                                   # (B, 3, S, S)
            with autocast():                                                 # c_in is 1 / sigma_data at sigma = 0
                rgb = net.redraw(x / ConsistencyConfig.sigma_data, moved_grid(b, cfg.func.corners))
            loss = (rgb - x).square().mean()                                 # Eq. (10)
            (loss / cfg.accum).backward()
            logs = add(logs, {"loss": loss}, cfg.accum)
        return logs | {"taken": descend(opt)}

    return step


def setup_pretrain(cfg: PretrainRun, run_dir: Path, device: torch.device) -> Setup:
    """Stage pretrain: the function prediction of CM-Func learns to reconstruct pictures."""
    source, held_out = data.open_data(cfg.data, "train"), data.open_data(cfg.data, "val")
    cfg = apply(cfg, {"steps": cfg.steps or cfg.epochs * len(source) // cfg.batch, "func.size": cfg.size})
    torch.manual_seed(cfg.seed)
    net = FunctionGenerator(cfg.func).to(device)
    shown, model = copy.deepcopy(net) if cfg.ema else net, function_parts(net)
    opt = with_muon(model, cfg, functools.partial(adam, torch.optim.Adam, cfg=cfg, device=device))
    state = {"model": model, "opt": opt}
    if cfg.ema:
        state["ema"] = function_parts(shown).requires_grad_(False)
    speed_up(cfg, device, [net], [(net, "redraw")])

    def reconstruct(image: Tensor) -> Callable:
        return shown.reconstruct(image / ConsistencyConfig.sigma_data).draw

    @torch.no_grad()
    def preview(k: int) -> None:
        if k % cfg.grid_every == 0 or k == cfg.steps:
            rows = []
            for i in range(min(4, len(held_out))):
                image = held_out[i].draw(cfg.size)
                drawn = reconstruct(data.to_tensor(image)[None].to(device))
                rows.append([image] + [to_uint8(drawn(s * cfg.size)[0]) for s in (1, 2)])
            Image.fromarray(contact_sheet(rows, 2 * cfg.size)).save(run_dir / f"grid-{k:08d}.png")

    return Setup(cfg, source, state, pretrain_step(net, opt, cfg, autocast_for(cfg, device)),
                 picture_batches(cfg, source, device, {"coord": (cfg.size, cfg.size, 2)}), preview,
                 scores=lambda: evaluate(reconstruct, held_out, cfg.eval_n, cfg.size, [1, 2], device))


# ---- stage cm --------------------------------------------------------------------------------------------------------


def cm_step(f: ConsistencyModel, target: ConsistencyModel, opt: torch.optim.Optimizer, cfg: CMRun, metric: Callable,
            draw_noise: Callable, autocast: Callable = contextlib.nullcontext,
            denoiser: ConsistencyModel | None = None) -> Callable:
    """One iteration of consistency training: student to target, then the target follows the new student by mu(k).

    draw_noise (batch, k) -> (z, t, r, extra): functions of the samples' numbers, the same for both sides. target may
    be f itself (iCT, ECT). With a denoiser it is consistency distillation.
    """

    def step(batch: dict, k: int) -> dict:
        logs: dict = {}
        for b in micro_batches(batch, cfg.accum):
            z, t, r, extra = draw_noise(b, k)                                # (B, 3, S, S), (B,), (B,)
            y = b["label"] if cfg.labels else None
            with autocast():
                d = consistency_loss(f, target, b["image"], z, t, r, metric, y, denoiser, **extra)       # (B,)
            loss = (cfg.cm.weight(t, r) * d).mean()                          # Eq. (5)
            (loss / cfg.accum).backward()
            logs = add(logs, {"loss": loss, "difference": d.mean()}, cfg.accum)
        taken, mu = descend(opt), cfg.cm.mu(k, cfg.K)
        if taken and target is not f:
            ema_update(target, f, mu)                                        # theta^- <- mu theta^- + (1 - mu) theta
        return logs | cm_schedule(cfg, k) | {"taken": taken}

    return step


def cm_schedule(cfg: CMRun, k: int) -> dict[str, Tensor]:
    """Where the curriculum is at step k, for the log: N and mu, or ECT's stage."""
    if cfg.cm.stages:
        return {"stage": torch.tensor(float(cfg.cm.stage(k, cfg.K)))}
    return {"N": torch.tensor(float(cfg.cm.N(k, cfg.K))), "mu": torch.tensor(cfg.cm.mu(k, cfg.K))}


def cm_shapes(cfg: CMRun) -> dict[str, tuple[int, ...]]:
    """The noise of a sample, as `data.loader` takes it: z, and for a function the shifts of its coordinates."""
    return {"z": (3, cfg.size, cfg.size)} | ({"coord": (cfg.size, cfg.size, 2)} if cfg.generator == "func" else {})


def cm_noise(cfg: CMRun) -> Callable:
    """draw_noise of cm_step: z and the coordinates' shifts by sample; the levels by step, a sample taking its own."""

    def draw_noise(b: dict, k: int) -> tuple[Tensor, Tensor, Tensor, dict]:
        z = b["z"]
        generator = torch.Generator().manual_seed(int(rng(cfg.seed, "levels", k).integers(2**62)))
        t, r = (levels[b["index"] % cfg.batch].to(z.device, non_blocking=True)
                for levels in cfg.cm.draw_levels(k, cfg.K, cfg.batch, generator))
        extra = {"coord": moved_grid(b, cfg.func.corners)} if cfg.generator == "func" else {}
        return z, t, r, extra

    return draw_noise


def cm_metric(cfg: CMRun, device: torch.device) -> Callable:
    """The distance between student and target."""
    if cfg.cm.metric != "lpips":
        return {"l2": l2, "huber": pseudo_huber}[cfg.cm.metric]
    network = metrics.lpips_network(cfg.lpips, "train without it: cm.metric=huber cm.mu0=0 cm.gap_weight=true")
    return lpips_resized(network.to(device), average_pool=cfg.lpips == "vgg", size=cfg.lpips_size)


def start_from(net: nn.Module, cfg: CMRun, run_dir: Path) -> None:
    """Load what stage pretrain has learned (3.4), or the whole generator of another run of stage cm.

    The latter is how easy consistency tuning starts from a denoiser, which cm.ect_k=1e9 cm.ect_b=0 trains (r = 0).
    """
    init = Path(cfg.init) if cfg.init else run_dir.parent / "pretrain"
    if not init.exists():
        raise FileNotFoundError(f"stage cm starts from stage pretrain and there is none at {init}; run --stage "
                                f"pretrain first with the same --data and --preset, name one with init=RUN, or give "
                                f"init=none")
    path, state = starting_point(init, "pretrain", "cm")
    if state["stage"] == "pretrain" and cfg.generator != "func":
        raise ValueError(f"init={init}: only generator=func has a pre-training")
    fill(function_parts(net) if state["stage"] == "pretrain" else net, state["best"], f"the weights in {path}")


def distilled(cfg: CMRun, device: torch.device) -> ConsistencyModel:
    """The denoiser of cfg.distil, frozen; it may be another generator than the one that learns from it."""
    made = load(cfg.distil, device)
    if not isinstance(made, OneStep) or made.size != cfg.size or bool(made.classes) != cfg.labels:
        raise ValueError(f"distil={cfg.distil} must be a run of stage cm at {cfg.size} px, "
                         f"with{'' if cfg.labels else 'out'} classes")
    return made.f


def cm_config(cfg: CMRun, classes: int) -> CMRun:
    """The configuration with what follows from other options: sizes, classes, K."""
    if cfg.labels and not classes:
        raise ValueError(f"labels=true, but {cfg.data} has no classes (sub-folders); leave labels out")
    part = generator_parts(cfg.generator)[2]
    sized = {} if part == "unet" else {f"{part}.size": cfg.size}
    return apply(cfg, {"K": cfg.K or cfg.steps, f"{part}.num_classes": classes if cfg.labels else 0} | sized)


def cm_parts(cfg: CMRun, net: nn.Module, device: torch.device) -> tuple:
    """Student, target and optimiser. Without a teacher EMA (mu0 = 0) the student is its own target."""
    f = ConsistencyModel(net, cfg.cm).to(device)
    target = copy.deepcopy(f).requires_grad_(False) if cfg.cm.mu0 else f
    make = functools.partial(torch.optim.RAdam, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
    return f, target, with_muon(f, cfg, make)


def setup_cm(cfg: CMRun, run_dir: Path, device: torch.device) -> Setup:
    """Stage cm: noise to image (function) in one step."""
    source, held_out = data.open_data(cfg.data, "train"), data.open_data(cfg.data, "val")
    cfg = cm_config(cfg, len(source.classes))
    torch.manual_seed(cfg.seed)
    net = build_generator(cfg.generator, lambda name: getattr(cfg, name))
    wanted = cfg.init != "none" if cfg.generator == "func" else cfg.init not in ("", "none")
    if wanted and not checkpoints(run_dir):
        start_from(net, cfg, run_dir)
    f, target, opt = cm_parts(cfg, net, device)
    state = {"model": net, "opt": opt}
    if target is not f:
        state["target"] = target.net
    shown = f
    if cfg.ema:
        shown = copy.deepcopy(f).requires_grad_(False)
        state["ema"] = shown.net
    nets = list({f.net: None, target.net: None})
    speed_up(cfg, device, nets, [(net, "forward") for net in nets])
    images, labels = zip(*[(data.to_tensor(held_out[i].draw(cfg.size)), held_out.label(i))
                           for i in range(min(cfg.distance_n, len(held_out)))])
    x, y = torch.stack(images).to(device), torch.tensor(labels, device=device) if cfg.labels else None
    z = torch.stack([torch_noise(x.shape[1:], cfg.seed, "held out", i) for i in range(len(x))]).to(device)
    denoiser = distilled(cfg, device) if cfg.distil else None
    take = cm_step(f, target, opt, cfg, cm_metric(cfg, device), cm_noise(cfg), autocast_for(cfg, device), denoiser)

    def step(batch: dict, k: int) -> dict:
        logs = take(batch, k)
        if (k + 1) % cfg.distance_every == 0 or k + 1 == cfg.steps:          # Appendix B, of the student
            logs["denoising_distance"] = denoising_distance(f, x, z, y)[1].mean()
        return logs

    model = OneStep(shown, cfg.size, classes=source.classes if cfg.labels else ())

    def preview(k: int) -> None:
        if k % cfg.grid_every == 0 or k == cfg.steps:
            held = [None if v is None else v[:4] for v in (x, z, y)]
            Image.fromarray(cm_sheet(model, cfg.seed, *held)).save(run_dir / f"grid-{k:08d}.png")

    return Setup(cfg, source, state, step, picture_batches(cfg, source, device, cm_shapes(cfg)), preview,
                 {"classes": list(source.classes) if cfg.labels else []})


@torch.no_grad()
def cm_sheet(model: OneStep, seed: int, x: Tensor, z: Tensor, y: Tensor | None, n: int = 8) -> np.ndarray:
    """n one-step samples from noise that stays fixed over the run, at 1x and (functions) 2x beside bilinear upsampling;
    then each held-out picture x and its denoised images at n - 1 levels from sigma_max down."""
    size, rows = model.size, []
    if hasattr(model.f.net, "function"):
        functions = model.functions(list(range(n)), seed)
        once = functions.draw(size).clamp(-1, 1)
        larger = F.interpolate(once, scale_factor=2, mode="bilinear")
        rows = [[to_uint8(image) for image in row] for row in (once, functions.draw(2 * size), larger)]
    else:
        rows = [[to_uint8(image) for image in model.sample(list(range(n)), seed)]]
    columns = [x] + [model.f(x + sigma * z, sigma.expand(len(x)), y)
                     for sigma in model.f.cfg.karras_sigmas(18, x.device)[::18 // (n - 1)][:n - 1]]
    rows += [[to_uint8(column[i]) for column in columns] for i in range(len(x))]
    return contact_sheet(rows, 2 * size)


# ---- stage demo ------------------------------------------------------------------------------------------------------


# Both systems from nothing, one after the other: changes to preset tiny, for twenty minutes on two CPU cores in all.
# The function generator learns as the bundled one did (weights/README.md): to reconstruct, to denoise (r = 0), and
# then, distilled from that denoiser, to do it in one step. Tied to its own answers before it can denoise, it soon
# answers alike whatever it sees; and it cannot draw the white noise that F would owe x at sigma_data 0.5: with both
# scales as here, f = M. A short way down, from noise 20, is learned in so few steps, if too bright at night.
DEMO_FUNC = {"func.position_base": 10.0, "func.position_scale": 4.0, "beta2": 0.99}
DEMO_SCALES = DEMO_FUNC | {"func.out_scale": 20.0, "cm.sigma_data": 0.05, "cm.sigma_max": 20.0}
DEMO = {"ae": {"steps": 900, "ae.kl_logvar": -6.0, "grid_every": 500, "eval_n": 16},
        "ldm": {"steps": 900, "pictures": 2048, "grid_every": 500},
        "pretrain": DEMO_FUNC | {"steps": 1000, "muon": 4e-3, "eval_n": 16},
        "denoiser": DEMO_SCALES | {"steps": 300, "muon": 4e-3, "lr": 7e-4, "cm.ect_k": 1e9, "cm.ect_b": 0.0,
                                   "cm.P_mean": 0.3, "cm.P_std": 1.5},
        "cm": DEMO_SCALES | {"steps": 180, "muon": 2e-3, "lr": 3e-4, "cm.stages": 1, "cm.ect_q": 2.0, "cm.ect_k": 9.0,
                             "cm.ect_b": 10.0, "cm.mu0": 0.98, "cm.s1": 2, "cm.P_mean": 1.2, "cm.P_std": 1.4}}


def demo(data_name: str, out: Path, device: torch.device, table: dict = DEMO, n: int = 256) -> dict:
    """Every stage of `table` into its folder of `out`, then demo.png and demo.json; returns the numbers.

    The distances of n samples to n held-out pictures are Frechet distances of their 4 x 4 mean colours, which needs no
    network: held-out pictures against others say what is reached at best, noise what is to be left behind.
    """
    began = time.perf_counter()
    for name, changes in table.items():
        stage = "cm" if name == "denoiser" else name
        if name == "cm" and "denoiser" in table:
            changes = changes | {"init": str(out / "denoiser"), "distil": str(out / "denoiser")}
        train(stage, small_config(stage, data_name, changes), out / name, device)
    infd, cm = load(out / "ldm", device), load(out / "cm", device)
    held_out = data.open_data(data_name, "val")
    index = list(range(min(n, len(held_out) // 2)))
    samples = {"INFD": draw_some(infd, infd.size, index), "CM-Func": draw_some(cm, cm.size, index)}
    scores = json.loads((out / "ae" / "eval.json").read_text())
    report = {"minutes": round((time.perf_counter() - began) / 60, 1),
              "psnr": {scale: score["psnr_render"] for scale, score in scores.items() if score["n"]},
              "distance": distances(samples, held_out, cm.size)}
    side = 4 * infd.size
    rows = [truth_row(held_out, side), *sample_rows(infd, infd.size), *sample_rows(cm, cm.size)]
    Image.fromarray(contact_sheet(rows, side)).save(out / "demo.png")
    (out / "demo.json").write_text(json.dumps(report, indent=1) + "\n")
    say(f"{report['minutes']} minutes; {out / 'demo.png'}: held-out pictures, then INFD at {infd.size} and "
        f"{side} px, then CM-Func at {cm.size} and {2 * cm.size} px\n"
        f"PSNR of INFD's reconstructions: " + ", ".join(f"{k} {v:.2f} dB" for k, v in report["psnr"].items())
        + "\ndistance to held-out pictures: " + ", ".join(f"{k} {v:.3f}" for k, v in report["distance"].items()))
    return report


def small_config(stage: str, data_name: str, changes: dict) -> Run:
    """Preset tiny with changes, and without labels where the data has no classes."""
    cfg = apply(configure(stage, "tiny", data_name, []), changes)
    return apply(cfg, {"labels": False}) if stage == "cm" and not data.open_data(cfg.data).classes else cfg


def draw_some(model: INFD | OneStep, size: int, index: list[int], batch: int = 16) -> Tensor:
    """The samples numbered `index`, a batch at a time: (n, 3, size, size) in [-1, 1], on the CPU.

    Only a model that makes functions can be drawn at another size than its own.
    """
    if isinstance(model, INFD):
        make = lambda part: model.render(model.sample(part, sampler="dpm++"), size)
    elif hasattr(model.f.net, "function"):
        make = lambda part: model.functions(part).draw(size)
    else:
        make = model.sample
    return torch.cat([make(index[at:at + batch]).clamp(-1, 1).cpu() for at in range(0, len(index), batch)])


def colour_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (48,) and covariance (48, 48) of the pictures' 4 x 4 mean colours, clamped to [-1, 1]."""
    moments = metrics.Moments(48)
    moments.add(F.adaptive_avg_pool2d(images.clamp(-1, 1), 4).flatten(1))
    return moments.mean, moments.covariance()


def distances(samples: dict[str, Tensor], held_out, size: int, moments: Callable = colour_moments) -> dict[str, float]:
    """Frechet distances to n held-out pictures of: n others, the samples (n, 3, S, S) by name, and as much noise."""
    n = len(next(iter(samples.values())))
    truth, others = torch.stack([data.to_tensor(held_out[i].draw(size)) for i in range(2 * n)]).split(n)
    noise, goal = torch.stack([torch_noise((3, size, size), 0, "demo", i) for i in range(n)]), moments(truth)
    return {name: round(metrics.frechet_distance(*moments(images), *goal), 4)
            for name, images in {"held out": others, **samples, "noise": noise.clamp(-1, 1)}.items()}


def truth_row(held_out, side: int, n: int = 8) -> list[np.ndarray]:
    """The first n held-out pictures at `side` px, or as large as they are."""
    return [picture.draw(min(side, picture.size)) for picture in (held_out[i] for i in range(n))]


@torch.no_grad()
def sample_rows(model: INFD | OneStep, size: int, held_out=None, n: int = 8) -> list[list[np.ndarray]]:
    """n samples at `size`, and a row of the same at 4x (INFD) or at 2x (functions); of an autoencoder alone, n held-out
    pictures."""
    index = list(range(n))
    if isinstance(model, INFD):
        device = next(model.autoencoder.parameters()).device
        z = model.sample(index, sampler="dpm++") if model.unet is not None else model.autoencoder.encode(
            torch.stack([data.to_tensor(held_out[i].draw(model.size)) for i in index]).to(device))
        fields, renderer = [model.autoencoder.decode(z[i:i + 1]) for i in index], model.autoencoder.renderer
        return [[draw(renderer, phi, (res, res), model.patch, norm="global")[0] for phi in fields]
                for res in (size, 4 * size)]
    if not hasattr(model.f.net, "function"):
        return [[to_uint8(image) for image in model.sample(index)]]
    functions = model.functions(index)
    return [[to_uint8(image) for image in functions.draw(res)] for res in (size, 2 * size)]


# ---- stage compare ---------------------------------------------------------------------------------------------------


AE = DEMO["ae"] | {"steps": 1500, "eval_n": 64}
LDM = {"ae": AE | {"steps": 800}, "ldm": DEMO["ldm"] | {"steps": 1000}}
PRETRAIN = {"steps": 1500}
HALF = {"size": 32, "func.patch": 4, "vit.patch": 4}                         # stage cm at half the size, to afford it
# Consistency tuning straight after the pre-training, as in the paper, with scales at which f = M (see DEMO).
TUNED = {"steps": 500, "cm.sigma_data": 0.1, "func.out_scale": 10.0, "cm.stages": 1, "cm.P_mean": 1.5, "cm.P_std": 1.5}
# What the papers compare: name -> side -> its stages in order, with changes to preset tiny. The last stage is the one
# compared: in it all sides take as many steps of as many pictures.
COMPARISONS = {
    "renderer": {"clif": {"ae": AE}, "liif": {"ae": AE | {"ae.renderer": "liif"}}},                        # INFD, A
    # INFD, Section E and Figure 5. A whole picture at the encoder's size would be a downsampled one.
    "downsampling": {"with": {"ae": AE | {"p_whole": 0.0}},
                     "without": {"ae": AE | {"p_whole": 0.0, "downsample": False}}},
    "mix": {"all-high": {"ae": AE}, "6k-mix": {"ae": AE | {"data": "synthetic-6k-mix"}}},                  # Table 1
    "latent": {"learned": LDM,                                                                   # Section C, Table 1
               "lowres": LDM | {"ae": LDM["ae"] | {"ae.lowres": True, "ae.kl": False}}},
    "generators": {name: {"cm": HALF | {"steps": 500, "generator": name, "init": "none"}}     # CM-Func, Tables 1, 2, 5
                   for name in ("func", "unet", "uvit", "dit")},
    "pretraining": {"with": {"pretrain": PRETRAIN | {"size": 32, "func.patch": 4}, "cm": TUNED | HALF},  # Figure 8
                    "without": {"cm": TUNED | HALF | {"init": "none"}}},
    # CM-Func, Table 7: as many tokens at either resolution, as in the paper; both are drawn at 64 px.
    "resolution": {f"{size}px": {stage: changes | {"size": size, "func.patch": size // 8}
                                 for stage, changes in (("pretrain", PRETRAIN), ("cm", TUNED))}
                   for size in (64, 32)},
}


def side_configs(stages: dict[str, dict], data_name: str, seed: int = 0, steps: int = 0) -> dict[str, Run]:
    """The configuration of each stage of a side; steps, unless 0, are those of the last."""
    more = {stage: {"seed": seed} for stage in stages}
    more[list(stages)[-1]] |= {"steps": steps} if steps else {}
    return {stage: small_config(stage, data_name, changes | more[stage]) for stage, changes in stages.items()}


def compare(name: str, data_name: str, out: Path, device: torch.device, steps: int = 0, seeds: int = 1,
            table: dict = COMPARISONS, n: int = 256) -> dict:
    """Train every side of a comparison for every seed, then compare.png and compare.json; returns the numbers.

    rows: side -> column -> a number per seed. Sides that generate are drawn from the same noise; the distances of n
    samples are those of stage demo, and the same with features of SqueezeNet where its weights are.
    """
    if name not in table:
        raise ValueError(f"there is no comparison {name}; there are: {', '.join(table)}")
    sides, out = table[name], out / name
    if data_name != "synthetic" and any("data" in changes for stages in sides.values() for changes in stages.values()):
        raise ValueError(f"comparison {name} draws its pictures itself; leave --data out")
    held_out, models, rows = data.open_data(data_name, "val"), {}, {side: {} for side in sides}
    for seed, (side, stages) in itertools.product(range(seeds), sides.items()):
        here, configs = out / f"{side}-seed{seed}", side_configs(stages, data_name, seed, steps)
        for stage, cfg in configs.items():
            train(stage, cfg, here / stage, device)
        models[side, seed] = model = load(here / stage, device)
        if model.step != cfg.steps:
            raise ValueError(f"{here / stage} holds a run of {model.step} steps, not {cfg.steps}; choose another --out")
        for column, value in side_scores(model, configs, here).items():
            rows[side].setdefault(column, []).append(value)
    size = max(model.size for model in models.values())
    if stage != "ae":
        index = list(range(min(n, len(held_out) // 2)))
        samples = {key: draw_some(model, size, index) for key, model in models.items()}
        for column, moments in {"colour distance": colour_moments, **squeeze_moments(device)}.items():
            for key, value in distances(samples, held_out, size, moments).items():
                rows.setdefault(key[0] if key in models else key, {}).setdefault(column, []).append(value)
    for side, row in rows.items():                                           # norms, of images of one size alone
        if side in sides and models[side, 0].size != size:
            row.pop("denoising distance", None)
    report = {"comparison": name, "data": data_name, "steps": cfg.steps, "batch": cfg.batch, "seeds": seeds,
              "rows": rows}
    shown = [sample_rows(models[side, 0], size, held_out) for side in sides]
    sheet = contact_sheet([truth_row(held_out, 4 * size), *itertools.chain(*shown)], 4 * size)
    Image.fromarray(sheet).save(out / "compare.png")
    (out / "compare.json").write_text(json.dumps(report, indent=1) + "\n")
    say(f"{compare_table(report)}\n{out / 'compare.png'}: held-out pictures, then " + ", ".join(
        f"{side} ({len(made)} row{'s' * (len(made) > 1)})" for side, made in zip(sides, shown)))
    return report


def side_scores(model: INFD | OneStep, configs: dict[str, Run], here: Path) -> dict[str, float]:
    """What the runs of a side in `here` say of themselves: its cost, scores against the true scenes, distances.

    minutes are those of training in all stages, by their logs; parameters those of the network trained last.
    """
    minutes, row = 0.0, {}
    for stage, cfg in configs.items():
        logs = [json.loads(line) for line in (here / stage / "log.jsonl").read_text().splitlines()]
        for before, line in zip([{"step": 0}, *logs], logs):
            minutes += (line["step"] - before["step"]) * cfg.batch / line["images_per_s"] / 60
        file = here / stage / "eval.json"
        for scale, score in json.loads(file.read_text()).items() if file.exists() else ():
            row |= {f"{kind} {score['px']}px": score[key] for kind, key in (
                ("PSNR", "psnr_render"), ("bicubic", "psnr_bicubic"), ("LPIPS", "lpips_render"))
                    if key in score and (kind, scale) != ("bicubic", "1x")}
        if "denoising_distance" in logs[-1]:
            row["denoising distance"] = logs[-1]["denoising_distance"]
    net = model.f.net if isinstance(model, OneStep) else model.unet or model.autoencoder
    return {"minutes": round(minutes, 3), "parameters": sum(p.numel() for p in net.parameters())} | row


def squeeze_moments(device: torch.device) -> dict[str, Callable]:
    """{"FD-squeeze": images (n, 3, S, S) -> mean and covariance of their features}, or {} without the weights."""
    try:
        network = metrics.load_features("squeeze").to(device)
    except ValueError as error:
        say(f"without FD-squeeze: {error}")
        return {}
    protocol = metrics.Protocol("squeeze")
    return {"FD-squeeze": lambda images: metrics.statistics(images.split(32), network, protocol).moments["pool"]}


def compare_table(report: dict) -> str:
    """The report of `compare` as text: means, and over several seeds their standard deviation."""
    columns = list(dict.fromkeys(column for row in report["rows"].values() for column in row))

    def cell(values: list[float]) -> str:
        mean = f"{np.mean(values):,.{0 if values[0] > 1e4 else 3}f}" if values else "-"
        return mean + (f" +- {np.std(values, ddof=1):.3f}" if len(set(values)) > 1 else "")

    table = [["", *columns]] + [[side, *(cell(row.get(column, [])) for column in columns)]
                                for side, row in report["rows"].items()]
    widths = [max(map(len, column)) for column in zip(*table)]
    title = f"{report['comparison']}: {report['steps']:,} steps of batch {report['batch']}, {report['seeds']} seed(s)"
    return "\n".join([title, *("  ".join(map(str.rjust, line, widths)) for line in table)])


# ---- how fast is it? -------------------------------------------------------------------------------------------------


def ceilings(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large matrix product: in fp32 (on CUDA in TF32 unless tf32=false) and in bf16."""
    n = 8192 if device.type == "cuda" else 1536
    pairs = {name: torch.randn(n, n, device=device, dtype=kind)
             for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    times = seconds({name: functools.partial(torch.mm, a, a) for name, a in pairs.items()}, device)
    return {name: float(f"{2e-12 * n**3 / t:.5g}") for name, t in times.items()}


def bench_step(setup: Setup, device: torch.device, n: int, ceiling: dict[str, float]) -> dict:
    """What n steps of training cost, from the stage's own loader, one at a time; rates are medians.

    gflop is that of one step as it runs, forward, backward and what checkpoint=true repeats; data_wait the share of the
    time that the loader took; compile_s what the first step took beyond the others. Stage ae is taken where its GAN is
    on. Under torchrun: images of all processes, all else of one.
    """
    cfg, k = setup.cfg, getattr(setup.cfg, "gan_start", 0)
    stream, times = setup.batches(k), []
    advance = lambda: setup.advance(next(stream), k)
    with torch.compiler.set_stance("force_eager") if compiled(cfg, device) else contextlib.nullcontext():
        work = gflop(advance)
    for i in range(2 + n):
        if i == 2:                                                           # the first compiles, the second warms up
            peak_memory(device, reset=True)
        begin = time.perf_counter()
        batch = next(stream)
        got = time.perf_counter()
        setup.advance(batch, k)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((got - begin, time.perf_counter() - got))
    waited, step = np.array(times[2:]).T                                     # (n,) seconds each
    each, compute = float(np.median(waited + step)), float(np.median(step))
    dtype = "fp32" if autocast_for(cfg, device) is contextlib.nullcontext else "bf16"
    rate = work / 1000 / compute
    row = {"images_per_s": cfg.batch / each, "steps_per_s": 1 / each, "gflop": work, "tflop_per_s": rate,
           "of_ceiling": rate / ceiling[dtype], "peak_gb": peak_memory(device) / 1e9,
           "data_wait": waited.sum() / (waited.sum() + step.sum()), "compile_s": max(0.0, times[0][1] - compute)}
    return {"parameters": parameters(setup), "dtype": dtype, **{k: float(f"{v:.5g}") for k, v in row.items()}}


def bench(stage: str, preset: str, cfg: Run, run_dir: Path, device: torch.device, n: int) -> dict:
    """The costs of a stage (of stage cm: of each generator) by name, and the device's ceiling."""
    set_tf32(cfg, device)
    report = {"device": str(device), "steps": n, "ceiling_tflop_per_s": ceilings(device)}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / stage
        if stage == "ldm":
            cfg = bench_ldm(cfg, preset, run_dir, here)
        for name in cfg.generator.split(",") if stage == "cm" else [stage]:
            own = dataclasses.replace(cfg, generator=name, init="none", labels=False) if stage == "cm" else cfg
            setup = STAGES[stage][1](own, here, device)
            report[name] = bench_step(setup, device, n, report["ceiling_tflop_per_s"])
            if stage == "cm":
                report[name] |= bench_cm(setup, device)
    return report


def bench_ldm(cfg: LDMRun, preset: str, run_dir: Path, folder: Path) -> LDMRun:
    """Stage ldm as it can be measured at once: few pictures to encode beforehand, and any autoencoder."""
    if cfg.cache:
        cfg = dataclasses.replace(cfg, pictures=min(cfg.pictures or 8 * cfg.batch, 8 * cfg.batch))
        say(f"measured with the cached latents of {cfg.pictures} pictures")
    init = Path(cfg.init) if cfg.init else run_dir.parent / "ae"
    if not cfg.init and not init.exists():
        init = folder.parent / "ae"
        sides = [f"{name}={cfg.size}" for name in ("size", "patch", "max_size")]
        ae = configure("ae", preset, cfg.data, sides)
        say(f"there is no run of stage ae: measured with a random autoencoder of preset {preset}")
        init.mkdir()
        save_checkpoint(init, 0, {"format": FORMAT, "stage": "ae", "step": 0, "config": plain(asdict(ae)),
                                  "state": {"model": FieldAutoencoder(ae.ae).state_dict()}}, 0)
    return dataclasses.replace(cfg, init=str(init))


def bench_cm(setup: Setup, device: torch.device, repeats: int = 5) -> dict:
    """What a generator costs in sampling.

    multi_res_fps is Section 4.3's: pictures per second when each is wanted at 32, 64 and 128 px, which takes one
    function and three renderings, or three networks, each trained for its size.
    """
    sizes, cfg = (32, 64, 128), setup.cfg
    models = {cfg.size: ConsistencyModel(setup.state["model"], cfg.cm).eval().requires_grad_(False)}
    if cfg.generator != "func":
        models = {size: sized_model(cfg, size, device) for size in sizes}
    calls: dict[str, Callable] = {}
    for size, model in models.items():
        calls |= onestep_calls(model, size, 1, sizes)
    times = seconds(calls, device, repeats)
    row = {"ms": {part: round(1000 * times[part], 2) for part in calls},
           "gflop_of_sampling": {part: round(gflop(call), 3) for part, call in calls.items()}}
    return row | {"multi_res_fps": round(3000 / sum(row["ms"].values()), 3),
                  "multi_res_gflop": round(sum(row["gflop_of_sampling"].values()), 2)}


def bench_table(report: dict) -> str:
    """The report of `bench` as text."""
    limits = ", ".join(f"{name} {value:.3f}" for name, value in report["ceiling_tflop_per_s"].items())
    rows = {name: r for name, r in report.items() if isinstance(r, dict) and "images_per_s" in r}
    lines = [f"{report['device']}, {report['steps']} steps; matrix products reach {limits} TFLOP/s",
             "training    parameters  images/s   steps/s  TFLOP/s  of ceiling  peak GB  data wait  compile s"]
    lines += [f"{name:9} {r['parameters']:>12,} {r['images_per_s']:9.2f} {r['steps_per_s']:9.3f} "
              f"{r['tflop_per_s']:8.3f} {r['of_ceiling']:6.1%} {r['dtype']} {r['peak_gb']:8.2f} {r['data_wait']:10.2%} "
              f"{r['compile_s']:10.2f}" for name, r in rows.items()]
    sampled = {name: r for name, r in rows.items() if "ms" in r}
    if sampled:
        lines.append("sampling   multi-res FPS  GFLOP   its parts, ms (GFLOP)")
    for name, r in sampled.items():
        parts = ", ".join(f"{part} {ms:.1f} ({r['gflop_of_sampling'][part]:.2f})" for part, ms in r["ms"].items())
        lines.append(f"{name:9} {r['multi_res_fps']:14.3f} {r['multi_res_gflop']:6.1f}   {parts}")
    return "\n".join(lines)


def sized_model(cfg: CMRun, size: int, device: torch.device) -> ConsistencyModel:
    """The generator as it would be trained for another resolution."""
    known = options(CMRun)
    sized = cm_config(apply(cfg, {"size": size} | {k: v for k, v in PAPER_SIZE[size].items() if k in known}), 0)
    net = build_generator(cfg.generator, lambda part: getattr(sized, part))
    return ConsistencyModel(net, cfg.cm).to(device).eval().requires_grad_(False)


# ---- command line ----------------------------------------------------------------------------------------------------


STAGES = {"ae": (AERun, setup_ae), "ldm": (LDMRun, setup_ldm), "pretrain": (PretrainRun, setup_pretrain),
          "cm": (CMRun, setup_cm)}


def autocast_for(cfg: Run, device: torch.device) -> Callable:
    """A context manager for the forward passes. bf16 needs no loss scaling; fp16 is not offered (it overflows)."""
    if cfg.dtype not in ("auto", "bf16", "fp32"):
        raise ValueError(f"option dtype={cfg.dtype}: choose auto, bf16 or fp32")
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if cfg.dtype == "bf16" or (cfg.dtype == "auto" and auto):
        return functools.partial(torch.autocast, device.type, torch.bfloat16)
    return contextlib.nullcontext


BLOCKS = (ResBlock, Attention, TimeResBlock, SelfAttention, AdaLNBlock, Block)       # what checkpoint=true recomputes


def set_tf32(cfg: Run, device: torch.device) -> None:
    """Option tf32, which holds for the whole process; only CUDA knows such products."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = cfg.tf32


def speed_up(cfg: Run, device: torch.device, nets: list[nn.Module], methods: list[tuple[nn.Module, str]]) -> None:
    """Options channels_last and checkpoint for networks, and compile for methods of modules, in place."""
    for net in nets:
        net.to(memory_format=torch.channels_last if cfg.channels_last else torch.preserve_format)
        for block in net.modules():
            if cfg.checkpoint and isinstance(block, BLOCKS):
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if compiled(cfg, device):
        compile_methods(methods, strict=cfg.compile == "on")


def compile_methods(methods: list[tuple[nn.Module, str]], strict: bool) -> None:
    """Compile for the shapes of the first call, a training step's. Others, those of previews, remain eager.

    Where the compiler fails, strict raises its error; otherwise all methods go on eagerly after one warning.
    """
    broken = []

    def replacement(eager: Callable) -> Callable:
        quick, first = torch.compile(eager), []

        def call(*args, **options):
            shapes = [a.shape for a in (*args, *options.values()) if isinstance(a, Tensor)]
            first.extend([] if first else [shapes])
            if not broken and shapes == first[0]:
                try:
                    return quick(*args, **options)
                except RuntimeError as error:
                    if strict or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                        raise
                    broken.append(True)                   # not the error, whose frames keep the loader from ending
                    warnings.warn(f"torch.compile failed, so training goes on without it ("
                                  f"{' '.join(str(error).splitlines()[:2])}); compile=off is silent, compile=on stops")
            return eager(*args, **options)

        return call

    for module, name in methods:
        setattr(module, name, replacement(getattr(module, name)))


def compiled(cfg: Run, device: torch.device) -> bool:
    """Whether to compile the networks."""
    if cfg.compile not in ("auto", "on", "off"):
        raise ValueError(f"option compile={cfg.compile}: choose auto, on or off")
    return cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda" and sys.platform == "linux")


def train(stage: str, cfg: Run, run_dir: Path, device: torch.device) -> None:
    """Train a stage to the end, and score it."""
    set_tf32(cfg, device)
    setup = STAGES[stage][1](cfg, run_dir, device)
    cfg = setup.cfg
    say(f"stage {stage}: {len(setup.source):,} pictures of {cfg.data}, {parameters(setup):,} parameters, "
        f"{cfg.steps:,} steps of batch {cfg.batch}, {device}, into {run_dir}")
    fit(stage, setup, run_dir)
    if setup.scores is not None and ranks()[0] == 0:
        keep_scores(setup.scores(), run_dir)


def parameters(setup: Setup) -> int:
    """Size of the network that is trained."""
    return sum(p.numel() for p in setup.state["model"].parameters())


def check_data(name: str) -> int:
    """Decode everything there is and list what cannot be used."""
    bad = []
    for split in ("train", "val"):
        source = data.open_data(name, split)
        found = data.check_data(source)
        print(f"{split}: {len(source):,} pictures, {len(found)} bad")
        bad += found
    for file, reason in bad:
        print(f"bad: {file}: {reason}")
    return 2 if bad else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="Train. The same command again continues the run.",
                                epilog="key=value sets any option of the stage; a wrong name lists them all")
    p.add_argument("--stage", choices=[*STAGES, "demo", "compare"], default="ae",
                   help="demo: every stage, small, one after the other: 20 minutes on two CPU cores; compare: a "
                        "comparison of the papers, small, named by --preset, with options steps= and seeds=")
    p.add_argument("--preset", default="paper",
                   help="paper, small or tiny; ict and ect: stage cm by improved consistency training, or easy "
                        f"consistency tuning; of stage compare: {', '.join(COMPARISONS)}")
    p.add_argument("--data", default="synthetic", help="a name, or the path of a folder or .zip of images")
    p.add_argument("--out", help="run folder (default: runs/DATA-PRESET/STAGE)")
    p.add_argument("--device", default="auto")
    p.add_argument("--bench", action="store_true",
                   help="measure 20 steps (--bench 50: 50) and stop; stage cm samples too, generator=func,dit compares")
    p.add_argument("--check-data", action="store_true", help="decode every picture, list the bad ones, and stop")
    p.add_argument("options", nargs="*", metavar="key=value")
    return p


def compare_options(texts: list[str]) -> dict[str, int]:
    """steps= and seeds= of stage compare."""
    given = {}
    for name, _, value in (text.partition("=") for text in texts):
        if name not in ("steps", "seeds"):
            raise ValueError(f"unknown option {name}; stage compare has: steps, seeds")
        given[name] = convert(name, int, value)
    if min(given.values(), default=1) < 1:
        raise ValueError("steps and seeds must be at least 1")
    return given


def run(args: argparse.Namespace) -> int:
    """Check the data, or train; returns the exit code."""
    if args.check_data:
        return check_data(args.data)
    alone = not args.bench and int(os.environ.get("WORLD_SIZE", 1)) == 1
    if args.stage == "demo":
        if args.options or not alone:
            raise ValueError("stage demo takes --data, --out and --device alone, and one process")
        demo(args.data, Path(args.out or "runs/demo"), pick_device(args.device))
        return 0
    if args.stage == "compare":
        if not alone:
            raise ValueError("stage compare takes no --bench, and one process")
        given = compare_options(args.options)
        compare(args.preset, args.data, Path(args.out or "runs/compare"), pick_device(args.device), **given)
        return 0
    number = args.options[:1] if args.bench and args.options and args.options[0].isdigit() else []
    cfg = configure(args.stage, args.preset, args.data, args.options[len(number):])
    device = pick_device(args.device)
    if args.preset not in ("small", "tiny") and device.type == "cpu" and args.device != "cpu" and not args.bench:
        raise ValueError(f"preset {args.preset} of stage {args.stage} is {COST[args.stage]}; there is no GPU here. "
                         f"Take --preset tiny (minutes on two CPU cores), or insist with --device cpu")
    folder = args.stage if getattr(cfg, "generator", "func") == "func" else f"{args.stage}-{cfg.generator}"
    run_dir = Path(args.out) if args.out else Path("runs") / f"{Path(args.data).stem}-{args.preset}" / folder
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch % (world * cfg.accum):
        raise ValueError(f"batch={cfg.batch} cannot be shared by {world} processes with accum={cfg.accum}; choose a "
                         f"multiple of {world * cfg.accum}")
    with process_group(device) as device:
        if args.bench:
            report = bench(args.stage, args.preset, cfg, run_dir, device, int(*number or [20]))
            say(f"{bench_table(report)}\n{json.dumps(report)}")
        else:
            train(args.stage, cfg, run_dir, device)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0; 2 after one line on what is wrong; 1 where memory, disk or numbers gave out; 143 or 130 after a
    signal."""
    args = parser().parse_args(argv)
    try:
        with stop_at_once():                                 # `fit` looks at a flag between its steps instead
            return run(args)
    except Stopped as stop:
        print("stopped; the same command continues", file=sys.stderr)
        return stop.args[0]
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError, MemoryError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if out_of_memory(error):
            print(f"error: out of memory ({text}). Give accum=2 (or more): the same steps in smaller parts; or a "
                  f"smaller batch, size, or network", file=sys.stderr)
            return 1
        if "not finite" in text or "could not be saved" in text:
            print(f"error: {text}", file=sys.stderr)
            return 1
        raise


if __name__ == "__main__":
    sys.exit(main())
