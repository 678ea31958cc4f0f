"""Models that draw: INFD and the one-step models, and how a file becomes one.

INFD: z ~ diffusion (published code: 200 steps of DDIM, eta 1), phi = D(z), pixels = R(phi, coord,
cell). CM-Func: one call of the generator makes an image function (Appendix D.3.1). Both come to
something with `tiles` and `draw`, and a picture is a function of (seed, index).
"""
from __future__ import annotations

import functools
import itertools
import math
import operator
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from autoencoder import AutoencoderConfig, FieldAutoencoder
from clif import Field, Window
from conditions import (LED, SHIFTED, SHIFTED_LATENT, Condition, check_conditions, conditioned,
                        fitted_noise, laid_out, misfit)
from consistency import (ConsistencyConfig, ConsistencyModel, LatentConsistency, sample_function,
                         sample_multistep)
from data import Photo, to_tensor
from files import to_rgb
from inr_generator import (DiT, FunctionGenerator, GeneratorConfig, ImageFunction,
                           TransformerConfig, UViT)
from ldm import DiffusionConfig, GaussianDiffusion, UNet, UNetConfig, guided
from pictures import read_picture
from published import (WEIGHT_FILES, Model, autoencoder_config, below, infd_model,
                       openai_network, read_weights, sd_model, split_weights)
from runs import (autocast_for, checkpoints, compiled, first_line, flatten, load_weights,
                  newest_checkpoint, read_checkpoint, rng, torch_noise, unflatten,
                  wants_channels_last, wants_compile, write_checkpoint)
from text import (CLIPTokenizer, TextConfig, TextTransformer, WordTokenizer, clip_tokenizer,
                  tokenizer_from)

Labels = Sequence[int | str] | int | str | None
Prompts = Sequence[str] | None              # image i is drawn from number i modulo their count


def draw_labels(net: nn.Module, classes: Sequence[str], indices: Sequence[int], seed: int,
                labels: Labels) -> Tensor | None:
    """Choose the classes (B,) of images: those given, else each by (seed, index); None without any.

    labels: numbers or names, one for all images or one each.
    """
    n = net.cfg.num_classes
    if labels is None and n == 0:
        return None
    if labels is None:
        labels = [rng(seed, "label", math.floor(i)).integers(n) for i in indices]
    numbers = {str(i): i for i in range(n)} | {name: i for i, name in enumerate(classes)}
    given = [str(label) for label in np.asarray(labels).reshape(-1)]
    for label in set(given) - set(numbers):
        known = ", ".join(classes) or f"{n or 'no'} classes"
        raise ValueError(f"label {label}: this model has {known}")
    if len(given) not in (1, len(indices)):
        raise ValueError(f"{len(given)} labels for {len(indices)} images: give one, or one each")
    chosen = torch.tensor([numbers[label] for label in given])
    return chosen.to(next(net.parameters()).device).expand(len(indices))


def named(classes: Sequence[str], i: int) -> str:
    """What class i is called: its number, where nothing else is known."""
    return classes[i] if i < len(classes) else str(i)


def numbered(indices: Sequence[float]) -> list[float]:
    """The numbers of images, 2.25 for one between 2 and 3, or ValueError where they are none."""
    try:
        numbers = [i if isinstance(i, float) else operator.index(i) for i in indices]
    except TypeError:
        numbers = []
    if not numbers:
        raise ValueError(f"indices {indices!r}: give the numbers of the images, as [0, 1] or "
                         f"range(4)")
    return numbers


def frozen(model: INFD | OneStep, device: torch.device | str) -> INFD | OneStep:
    """Move a model's networks, frozen and in eval mode."""
    for part in vars(model).values():
        if isinstance(part, nn.Module):
            part.to(device).eval().requires_grad_(False)
    return model


class LatentScale(nn.Module):
    """Give diffusion a latent of mean 0 and variance 1, and the autoencoder its own back.

    As made it is the identity, as published; stage ldm measures both by `latent_norm`, because a
    short training cannot afford a wrong signal-to-noise ratio.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) of the autoencoder -> what diffusion learns."""
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    def inverse(self, z: Tensor) -> Tensor:
        """What diffusion has drawn -> z of the autoencoder."""
        return z * self.std[:, None, None] + self.mean[:, None, None]


AS_PUBLISHED = {"ddim_steps": 50, "eta": 0.0, "guidance": 7.5, "sampler": "ddim"}   # of SD v1
GUIDANCE = 2.0                              # of text, for models trained here (docs/results.md)
# Steps: of ddim as published; of dpm++ as many as come within 40 dB of ddim's (docs/results.md).
# cm: of the one-step model, the second from noise of the level SECOND.
SAMPLERS = {"ddim": 200, "dpm++": 20, "cm": 2}
LED_STEPS = {"ddim": 50, "dpm++": 20, "cm": 1}              # by conditions
SECOND = 1.4
FINEST = 8                                  # pixels a cell of phi, as 1024 px of 128 cells; finer
                                            # ones CLIF draws as flat squares (docs/results.md)
START = 10.0                                # noise to signal where walks start, but for DDIM's with
                                            # eta 1, if the schedule ends above twice; see `settle`
FRESH = 1.0                                 # eta of dpm++: see docs/results.md


def start_of(diffusion: GaussianDiffusion) -> int | None:
    """The timestep of START where the schedule ends above twice that (INFD: 197); else None."""
    ends = math.exp(-diffusion.log_rho[-1])                          # noise to signal
    return diffusion.timestep_of(START) if ends > 2 * START else None


@dataclass
class INFD:
    """Hold an image neural field diffusion model."""

    autoencoder: FieldAutoencoder
    unet: UNet | None                       # None in a checkpoint of stage ae
    diffusion: GaussianDiffusion
    scale: LatentScale
    size: int                               # side of the encoder's input, pixels
    patch: int                              # side of the training patch, pixels
    classes: tuple[str, ...] = ()
    step: int = 0
    weights: str = "published"              # which weights these are: EMA or not
    file: Path = Path()                     # where they were read from
    text: TextTransformer | None = None     # makes the context that the UNet attends to
    tokenizer: CLIPTokenizer | WordTokenizer | None = None
    captions: Sequence[str] = ()            # of its training; drawn where no prompt is given
    sampler: str = "dpm++"                  # of `sample` where nothing else is said
    ddim_steps: int = SAMPLERS["ddim"]
    eta: float = 1.0                        # of ddim: 1, as published, asks for a long training
    guidance: float = 7.5                   # of text; 1: it never learned to draw without
    f: LatentConsistency | None = None      # one-step INFD: draws the latents, and unet is its net
    to = frozen

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture of the encoder's size."""
        cfg = self.autoencoder.cfg
        return cfg.z_channels, self.size // cfg.f, self.size // cfg.f

    def check_condition(self, labels: Labels, prompts: Prompts, guidance: float | None,
                        led: bool = False, negative: str = "",
                        regions: Sequence[tuple] = ()) -> None:
        """Raise ValueError where the model cannot draw by these; see `sample`. led: by pictures."""
        if self.unet is None:
            raise ValueError("this is an autoencoder (stage ae); take a checkpoint of stage ldm")
        if self.text is None and (prompts is not None or negative or regions):
            raise ValueError("a prompt: this model does not read text")
        if self.text is not None and labels is not None:
            raise ValueError("a label: this model has no classes, it draws what a prompt says; say "
                             "it there, and leave the label out")
        given = self.captions if prompts is None else prompts
        if self.text is not None and not led and not all(map(str.strip, given or [""])):
            raise ValueError("this model draws what a --prompt says: give one that is not empty")
        learned = self.unet.cfg.null_class if self.text is None else self.guidance != 1
        if guidance not in (None, 1) and (self.f is not None or not learned):
            raise ValueError("guidance: this model never learned to draw without its condition")
        if negative and (self.guidance if guidance is None else guidance) == 1:
            raise ValueError("a negative prompt: it is guidance that leads away from it, and here "
                             "that is 1, which does not lead")

    def prompt_of(self, i: int, seed: int, prompts: Prompts) -> str:
        """What image i is drawn from: its prompt, else a training caption drawn by (seed, i)."""
        if prompts is not None:
            return prompts[math.floor(i) % len(prompts)]
        return self.captions[rng(seed, "caption", math.floor(i)).integers(len(self.captions))]

    def guide(self, texts: Sequence[str], negative: str = "", guidance: float | None = None,
              regions: Sequence[tuple[str, Window]] = ()) -> Callable:
        """What a sampler calls, after its condition: (x_t, t, y) -> eps; f: (x, sigma, y) -> x.

        texts: what each picture is drawn from, of a model of text.
        """
        if regions:
            areas = [(self.guide(len(texts) * [text], negative, guidance), window)
                     for text, window in regions]
            return laid_out(self.guide(texts, negative, guidance), areas)
        net = self.unet if self.f is None else self.f
        if self.text is None and guidance is None:
            return net
        if self.text is None:
            return guided(net, guidance, null_class=self.unet.cfg.num_classes)
        ids = self.tokenizer([negative, *texts]).to(self.scale.mean.device)      # (1 + B, N)
        null, context = self.text(ids).split([1, len(texts)])                    # (1 + B, N, D)
        return guided(net, self.guidance if guidance is None else guidance, context, null)

    def noise(self, indices: Sequence[float], seed: int, latent_size: tuple[int, int] | None,
              *key: int | str) -> Tensor:
        """Noise (B, C, h, w) for the latents of images, of each its own, whatever the batch."""
        shape = (self.latent_shape[0], *(latent_size or self.latent_shape[1:]))
        made = [torch_noise(shape, seed, *key, i) for i in indices]
        return torch.stack(made).to(self.scale.mean.device)

    @torch.no_grad()
    def fitting_captions(self, indices: Sequence[float], seed: int,
                         conditions: Sequence[Condition],
                         latent_size: tuple[int, int] | None = None) -> list[str]:
        """Of 32 captions of the training those, one an image, of whose pictures in one step the
        conditions miss least; to draw without any makes haze.
        """
        noise = self.noise(indices, seed, latent_size, "x_T")                    # (B, C, h, w)
        texts = list(dict.fromkeys(self.captions[:32]))
        missed = [self.misfit_at_once(self.guide(len(noise) * [text]), noise, None, conditions)
                  for text in texts]
        return [texts[k] for k in torch.stack(missed).argmin(dim=0).tolist()]    # of (32, B)

    @property
    def step_size(self) -> float:
        """How firmly conditions lead where nothing is said."""
        return LED if self.f is None else SHIFTED_LATENT

    def settings(self, sampler: str | None = None, steps: int | None = None,
                 eta: float | None = None, led: bool = False) -> dict:
        """Fill in what these leave open of how to `sample`, or ValueError; led: by conditions."""
        if sampler is None:
            many = "ddim" if led else self.sampler
            sampler = many if self.f is None else "cm"
        known = ("ddim", "dpm++") if self.f is None else ("cm",)
        if sampler not in known:
            raise ValueError(f"sampler {sampler}: this model is drawn by {' or '.join(known)}")
        usual = LED_STEPS if led else SAMPLERS | {"ddim": self.ddim_steps}
        how = {"sampler": sampler, "steps": usual[sampler] if steps is None else steps}
        if sampler != "cm":
            own = {"ddim": self.eta, "dpm++": FRESH}[sampler]
            how["eta"] = own if eta is None else eta
        elif eta is not None:
            raise ValueError("eta is noise that ddim and dpm++ add, and cm does not: leave it out")
        return how

    @torch.no_grad()
    def sample(self, indices: Sequence[int], seed: int = 0, steps: int | None = None,
               eta: float | None = None, latent_size: tuple[int, int] | None = None,
               labels: Labels = None, sampler: str | None = None, prompts: Prompts = None,
               negative: str = "", guidance: float | None = None,
               conditions: Sequence[Condition] = (), step_size: float | None = None,
               regions: Sequence[tuple[str, Window]] = (), bar: Callable = tqdm) -> Tensor:
        """Draw the latents z (B, C, h, w) of the images numbered `indices`, for `decode`.

        An index as 2.25 lies a quarter of the way from picture 2 to 3, by the condition of 2.
        latent_size: (h, w) of a larger noise map, convolutional sampling (Section D). eta: how much
        of the noise each step makes anew.
        prompts: what to draw; tokenizer.remark says what of one the model does not read. negative:
        what to lead away from. guidance: 1 is the model itself, more follows the prompt closer.
        conditions: see `conditions.conditioned`, as step_size; without prompts they choose them.
        regions: prompts of their own, each in a window. bar: shows progress, called as tqdm.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        self.check_condition(labels, prompts, guidance, bool(conditions), negative, regions)
        step_size = self.step_size if step_size is None else step_size
        check_conditions(conditions, step_size)
        indices = numbered(indices)
        how = self.settings(sampler, steps, eta, bool(conditions))
        sampler = how["sampler"]
        steps = how["steps"]
        y = draw_labels(self.unet, self.classes, indices, seed, labels)
        noise = functools.partial(self.noise, indices, seed, latent_size)

        texts = len(indices) * [""]                                  # if conditions alone say what
        if self.text is not None and not (conditions and prompts is None):
            texts = [self.prompt_of(i, seed, prompts) for i in indices]
        elif self.text is not None and sampler == "cm":
            texts = self.fitting_captions(indices, seed, conditions, latent_size)
        model = self.guide(texts, negative, guidance, regions)
        if conditions and sampler != "cm":
            missed = functools.partial(self.misfit, conditions)
            model = conditioned(model, self.diffusion.alpha_bar, missed, step_size)

        if sampler == "cm":
            if steps not in (1, 2) or (conditions and steps == 2):
                raise ValueError(f"{steps} steps: this model draws in 1 or 2, by conditions in 1")
            noises = [noise("x_T"), noise("cm")][:steps]
            levels = [self.f.cfg.sigma_max, SECOND][:steps]
            if conditions:
                noises = [self.fitted(model, noises[0], y, conditions, step_size)]
            return self.scale.inverse(sample_multistep(model, noises, levels, y, limit=math.inf,
                                                       cfg=self.f.cfg))
        return self.scale.inverse(self.walked(model, noise, how, y, bar))

    def walked(self, model: Callable, noise: Callable, how: dict, y: Tensor | None,
               bar: Callable) -> Tensor:
        """What diffusion draws in many steps, (B, C, h, w); arguments as in `sample`."""
        x_T = noise("x_T")
        first = start_of(self.diffusion) if how["sampler"] == "dpm++" or how["eta"] < 1 else None
        if first is not None:
            noises = [noise("settle", 0), noise("settle", 1), x_T]
            x_T = self.diffusion.settle(model, noises, first, y)
        steps = how["steps"]
        loop = self.diffusion.ddim_loop if how["sampler"] == "ddim" else self.diffusion.dpm_loop
        walk = loop(model, x_T, steps, how["eta"], functools.partial(noise, "ddim"), y, first)
        for x_t, _ in bar(walk, "latents", steps, leave=False, disable=None):
            pass
        return x_t

    def compile(self, option: str = "auto") -> None:
        """Compile decoder and renderer, option as in `runs.wants_compile`; no other model has them.

        On a CUDA GPU they then work in NHWC and bf16: of 256 px pictures of the bundled model
        99.996 % of the pixels are within 1/255 of those in fp32.
        """
        device = self.scale.mean.device
        if option == "graphs":
            raise ValueError("compile=graphs is for training: a drawing keeps what a replayed "
                             "graph would overwrite")
        if not wants_compile(option, device):
            return
        autocast = autocast_for("auto", device)
        for part in (self.autoencoder.decoder, self.autoencoder.renderer):
            if wants_channels_last("auto", device, compiles=True):
                part.to(memory_format=torch.channels_last)
            plain = functools.partial(part.to, memory_format=torch.contiguous_format)
            quick = compiled(part.forward, option, shapes=8, otherwise=plain)
            part.forward = functools.partial(called_within, autocast, quick)

    def fitted(self, f: Callable, noise: Tensor, y: Tensor | None,
               conditions: Sequence[Condition], step_size: float) -> Tensor:
        """The noise of one-step INFD with which its one call meets conditions."""
        return fitted_noise(noise, lambda x: self.misfit_at_once(f, x, y, conditions),
                            60, step_size)

    def misfit_at_once(self, f: Callable, noise: Tensor, y: Tensor | None,
                       conditions: Sequence[Condition]) -> Tensor:
        """The `misfit` (B,) of what one call of f makes of noise (B, C, h, w)."""
        sigma = noise.new_full((len(noise),), self.f.cfg.sigma_max)
        return self.misfit(conditions, f(self.f.cfg.sigma_max * noise, sigma, y))

    def misfit(self, conditions: Sequence[Condition], x_0: Tensor) -> Tensor:
        """How far the pictures of what diffusion draws, x_0, are from conditions: (B,)."""
        phi = self.autoencoder.decode(self.scale.inverse(x_0))                   # (B, C, h, w)
        drawn = Field(self.autoencoder.renderer, phi, finest=FINEST)             # as `decode` does
        return misfit(drawn, phi.shape[-2:], conditions)

    @torch.no_grad()
    def decode(self, z: Tensor, paper: bool = False, tile: int | None = None) -> Field:
        """Turn latents z (B, C, h, w) into pictures to be drawn at any size; see clif.Field.

        Beyond FINEST, but for `paper`, they are enlarged: no training has seen finer pixels.
        tile: its side; by default 256, on a CUDA GPU 512: fewer calls, and less drawn twice. With
        paper, whose pictures change with it, it is the patch.
        """
        own = self.patch if paper else 512 if z.is_cuda else 256
        field = self.autoencoder.field(z, own if tile is None else tile, paper)
        return field if paper else replace(field, finest=FINEST)

    def functions(self, indices: Sequence[int], seed: int = 0, labels: Labels = None,
                  **how) -> Field:
        """Make B pictures to be drawn at any size, as `OneStep.functions`; how: see `sample`."""
        return self.decode(self.sample(indices, seed, labels=labels, **how))

    @torch.no_grad()
    def encode(self, picture: Image.Image | str | Path, side: int | None = None) -> Tensor:
        """The latent z (1, C, h, w) of a picture of one's own, for `decode`: of its centre square.

        picture: an image, or a PNG, JPEG or WEBP file; damage is a ValueError. side: to how many
        pixels it is scaled for the encoder, by default as in training; larger keeps finer detail.
        """
        side = self.size if side is None else side
        if side < 1 or side % self.autoencoder.cfg.f:
            raise ValueError(f"side {side}: give a multiple of {self.autoencoder.cfg.f} pixels")
        own = picture if isinstance(picture, Image.Image) else read_picture(picture)
        square = Photo("picture", functools.partial(to_rgb, own))
        image = to_tensor(square.draw(side))[None]                   # (1, 3, S, S)
        return self.autoencoder.encode(image.to(self.scale.mean.device))

    def drawn_by(self, other: INFD | OneStep) -> INFD:
        """This model with the decoder and renderer of `other`, for instance this one converted.

        Raises ValueError unless both have one encoder, and so latents of one meaning.
        """
        if not isinstance(other, INFD) or not same_encoder(self, other):
            raise ValueError(f"{other.file} has not the encoder whose latents this model draws; "
                             f"convert its autoencoder by --stage ae init=FILE frozen_encoder=true")
        return replace(self, autoencoder=other.autoencoder, patch=other.patch)


def called_within(context: Callable, function: Callable, *args) -> Tensor:
    """function(*args) within context(), in fp32."""
    with context():
        return function(*args).float()


def same_encoder(a: INFD, b: INFD) -> bool:
    """Say whether two models have the same latents: one encoder, up to half precision."""
    ours = a.autoencoder.encoder.state_dict()
    theirs = b.autoencoder.encoder.state_dict()
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return False
    return all((v.cpu() - theirs[k].cpu()).abs().max() <= 0.01 * v.abs().max()
               for k, v in ours.items())


# The networks F: name -> (network, its configuration, the option of a run that holds that).
GENERATORS = {"func": (FunctionGenerator, GeneratorConfig, "func"),
              "unet": (UNet, UNetConfig, "unet"),
              "uvit": (UViT, TransformerConfig, "vit"),
              "dit": (DiT, TransformerConfig, "vit")}


@dataclass
class OneStep:
    """Hold a consistency model."""

    f: ConsistencyModel
    size: int                               # training resolution, also that of the noise (D.3.1)
    classes: tuple[str, ...] = ()
    step: int = 0
    weights: str = "published"
    file: Path = Path()
    to = frozen

    def noise(self, indices: Sequence[int], seed: int, k: int = 0) -> Tensor:
        """The k-th standard normal (B, 3, S, S) of each image."""
        made = [torch_noise((3, self.size, self.size), seed, "x_T", i, k) for i in indices]
        return torch.stack(made).to(next(self.f.parameters()).device)

    def sample(self, indices: Sequence[int], seed: int = 0, sigmas: Sequence[float] = (),
               labels: Labels = None) -> Tensor:
        """Draw images (B, 3, S, S) in [-1, 1] in one step, and one more from each of `sigmas`."""
        indices = numbered(indices)
        levels = [self.f.cfg.sigma_max, *sigmas]
        if not all(high > low > 0 for high, low in itertools.pairwise(levels)):
            raise ValueError(f"sigmas {', '.join(f'{s:g}' for s in sigmas)}: give decreasing noise "
                             f"levels below {levels[0]:g} and above 0")
        y = draw_labels(self.f.net, self.classes, indices, seed, labels)
        noises = [self.noise(indices, seed, k) for k in range(len(levels))]
        return sample_multistep(self.f, noises, levels, y)

    @torch.no_grad()
    def functions(self, indices: Sequence[int], seed: int = 0, labels: Labels = None,
                  conditions: Sequence[Condition] = (), step_size: float = SHIFTED,
                  steps: int = 150) -> ImageFunction:
        """Make B image functions in one step; ValueError where the network makes pixels.

        conditions: their noise is fitted to them; see `conditions.fitted_noise`.
        """
        indices = numbered(indices)
        check_conditions(conditions, step_size)
        y = draw_labels(self.f.net, self.classes, indices, seed, labels)
        noise = self.noise(indices, seed)
        sigma = noise.new_full((len(noise),), self.f.cfg.sigma_max)

        def missed(noise: Tensor) -> Tensor:
            drawn = self.f.function(self.f.cfg.sigma_max * noise, sigma, y)
            return misfit(drawn, (self.size, self.size), conditions)

        if conditions:
            noise = fitted_noise(noise, missed, steps, step_size)
        return sample_function(self.f, noise, y)


# ---- From files to models and back ----

def load(path: str | Path, device: torch.device | str = "cpu", raw: bool = False,
         merges: str | None = None) -> INFD | OneStep:
    """Rebuild a model from a checkpoint of train.py (a file or its run folder) or a published file.

    raw: the trained weights where the checkpoint has their moving average too (the default).
    merges: the file of CLIP's tokenizer, where it is not beside a file of Stable Diffusion. Raises
    OSError, and ValueError for what is missing or does not fit.
    """
    path = Path(path)
    inside = sorted({str(file.parent) for file in path.glob("*/step-*.pt")})
    if inside and not checkpoints(path):
        raise ValueError(f"{path} is a folder of runs: choose {' or '.join(inside)}")
    if path.is_dir():
        path, ckpt = newest_checkpoint(path)
    elif path.suffix in WEIGHT_FILES:
        ckpt = {"state_dict": read_weights(path)}
    else:
        ckpt = read_checkpoint(path)
    try:
        if ckpt.get("stage") in ("ae", "ldm", "cm"):
            made = trained(ckpt, raw)
        elif isinstance(ckpt.get("model"), dict) and {"args", "sd"} & set(ckpt["model"]):
            made = assembled(infd_model(ckpt["model"]["args"], ckpt["model"]["sd"], raw), path)
        elif "state_dict" in ckpt:
            made = assembled(sd_model(ckpt["state_dict"], raw), path, merges)
        elif "time_embed.0.weight" in ckpt and "out.2.weight" in ckpt:
            size, network = openai_network(ckpt, path.name)
            net = filled(UNet, *network, f"OpenAI's UNet for {size} px")
            made = OneStep(ConsistencyModel(net, ConsistencyConfig()), size)
        else:
            what = f"stage {ckpt['stage']}" if "stage" in ckpt else ", ".join(map(str, ckpt))
            raise ValueError(f"neither stage ae, ldm or cm of train.py, nor a published INFD or "
                             f"OpenAI file, nor Stable Diffusion v1 ({what:.99})")
    except KeyError as error:
        raise ValueError(f"{path} is no whole checkpoint: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError,
            ArithmeticError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from error
    return replace(made, file=path).to(device)


def filled(network: Callable, cfg: object, weights: dict[str, Tensor], what: str) -> nn.Module:
    """Make network(cfg) with these weights, less what wrappers put before names.

    First without memory: a damaged width cannot ask for terabytes.
    """
    plain = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): weights[name] for name in weights}
    with torch.device("meta"):
        made = network(cfg)
    wanted = {name: value.shape for name, value in made.state_dict().items()}
    if wanted == {name: value.shape for name, value in plain.items()}:
        made = network(cfg)
    load_weights(made, plain, what)
    return made


def section(name: str, config: type, options: dict):
    """Build a configuration from a run's options, dotted or nested: those below `name`."""
    flat = flatten(options)
    inner = {k.removeprefix(f"{name}."): flat[k] for k in flat if k.startswith(f"{name}.")}
    if not inner:
        raise KeyError(name)
    return unflatten(config, inner)


# What older checkpoints of stage cm hold beside f: schedule and distance.
OLD_SCHEDULE = {"s0", "s1", "mu0", "printed_mu", "metric", "doubling", "lognormal", "gap_weight",
                "stages", "P_mean", "P_std", "ect_q", "ect_k", "ect_b"}


def trained(ckpt: dict, raw: bool) -> INFD | OneStep:
    """The model of a checkpoint of train.py."""
    options = flatten(ckpt["config"])
    state = ckpt["state"]
    average = "ema" in state and not raw
    if raw and "model" not in state:
        raise ValueError("an exported file holds the moving average alone: leave --raw out")
    weights = state["ema" if average else "model"]
    if ckpt["stage"] == "cm" and "autoencoder" not in ckpt:
        network, config, option = GENERATORS[options["generator"]]
        net = filled(network, section(option, config, options), weights, "the generator")
        kept = {k: v for k, v in options.items() if k.removeprefix("cm.") not in OLD_SCHEDULE}
        f = ConsistencyModel(net, section("cm", ConsistencyConfig, kept))
        if getattr(net.cfg, "size", options["size"]) != options["size"]:
            raise ValueError(f"its generator is of size {net.cfg.size}, the run of "
                             f"{options['size']}: it is damaged")
        made = OneStep(f, options["size"])
    else:
        alone = ckpt["stage"] == "ae"
        base = {"config": options, "weights": weights} if alone else ckpt["autoencoder"]
        cfg = section("ae", AutoencoderConfig, base["config"])
        made = INFD(filled(FieldAutoencoder, cfg, base["weights"], "the autoencoder"), None,
                    GaussianDiffusion(DiffusionConfig()), LatentScale(cfg.z_channels),
                    base["config"]["size"], base["config"]["patch"])
        if not alone:
            if "tokenizer" in ckpt:                              # it learned from captions
                told = ckpt.get("text", {"config": options, "weights": below(weights, "text.")})
                made.tokenizer = tokenizer_from(ckpt["tokenizer"])
                made.captions = ckpt["captions"]
                once = ckpt["stage"] == "cm"                     # guided, if at all, in training
                made.guidance = GUIDANCE if options.get("p_uncond") and not once else 1.0
                made.eta = AS_PUBLISHED["eta"]
                if isinstance(made.tokenizer, CLIPTokenizer):        # began as Stable Diffusion
                    made = replace(made, **AS_PUBLISHED)
                reads = section("context", TextConfig, told["config"])
                knows = (len(made.tokenizer), made.tokenizer.length)
                if knows != (reads.vocabulary, reads.positions):
                    raise ValueError(f"its tokenizer knows {knows[0]} words, {knows[1]} a text, "
                                     f"its text encoder {reads.vocabulary} and {reads.positions}")
                made.text = filled(TextTransformer, reads, told["weights"], "the text encoder")
                weights = weights if "text" in ckpt else below(weights, "unet.")
            made.unet = filled(UNet, section("unet", UNetConfig, options), weights, "the UNet")
            options |= flatten({"diffusion": ckpt.get("diffusion", {})})     # of stage cm
            made.diffusion = GaussianDiffusion(section("diffusion", DiffusionConfig, options))
            load_weights(made.scale, state["scale"], "the latent scale")
        if ckpt["stage"] == "cm":
            made.f = LatentConsistency(made.unet, section("cm", ConsistencyConfig, options),
                                       -made.diffusion.log_rho)
    return replace(made, classes=tuple(ckpt.get("classes", ())), step=ckpt["step"],
                   weights="EMA" if average else "trained weights")


def assembled(parts: Model, path: Path, merges: str | None = None) -> INFD:
    """The model of a published file; merges: see `text.read_merges`."""
    cfg, weights = parts.autoencoder
    text = None
    tokenizer = None
    if parts.text is not None:
        tokenizer = clip_tokenizer(path, merges, parts.text[0])
        text = filled(TextTransformer, *parts.text, "the text encoder")
    autoencoder = filled(FieldAutoencoder, cfg, weights, "the autoencoder (names as here)")
    unet = None if parts.unet is None else filled(UNet, *parts.unet, "the UNet")
    scale = LatentScale(cfg.z_channels)
    scale.std.fill_(1 / parts.scale)
    made = INFD(autoencoder, unet, GaussianDiffusion(parts.diffusion), scale, parts.size, patch=256,
                weights=parts.weights, text=text, tokenizer=tokenizer, sampler="ddim")
    return made if text is None else replace(made, **AS_PUBLISHED)


def published_autoencoder(path: Path, groups: int) -> FieldAutoencoder:
    """The autoencoder of a file of Stable Diffusion v1 or LDM; its renderer is LDM's own end.

    groups: of its norms, 32 in all that are published. Raises OSError, ValueError.
    """
    weights = read_weights(path)
    try:
        weights = split_weights(weights).autoencoder
        if not weights:
            raise ValueError("it has no autoencoder; take the file that holds the whole model")
        cfg = autoencoder_config(weights, groups)
        return filled(FieldAutoencoder, cfg, weights, "the autoencoder (names as here)")
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from error


def export(source: Path, target: Path, raw: bool = False) -> None:
    """Write what sampling needs of a run, in half precision; raw: see `load`."""
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another file for --export")
    if target.suffix in WEIGHT_FILES:
        raise ValueError(f"--export {target}: name it .pt; {target.suffix} is for files of others")
    ckpt = {}
    if source.suffix not in WEIGHT_FILES:
        path = load(source, raw=raw).file                            # says what is missing in it
        ckpt = read_checkpoint(path)
    if "stage" not in ckpt:
        raise ValueError(f"--export takes a checkpoint of train.py, not {source}")
    best = "ema" if "ema" in ckpt["state"] and not raw else "model"
    state = {name: value for name, value in ckpt["state"].items() if name in (best, "scale")}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(target, halved({**ckpt, "log": {}, "state": state}))


def halved(value):
    """Networks in half precision, and of absolute paths the last part: the file goes to others."""
    if isinstance(value, dict):
        return {k: v if k == "scale" else halved(v) for k, v in value.items()}
    if isinstance(value, str) and os.path.isabs(value):
        return Path(value).name
    return value.half() if isinstance(value, Tensor) and value.is_floating_point() else value
