"""The two models as a user holds them, rebuilt from a checkpoint alone: sample, decode, draw.

INFD: z ~ diffusion, phi = D(z), pixels = R(phi, coord, cell) (Section J: 200 steps of DDIM, eta 1).
CM-Func: one call of the generator makes an image function, drawn at any size (Appendix D.3.1).
Both come to something with `tiles` and `draw`: a clif.Field or an inr_generator.ImageFunction.
Next: sample.py, the program that draws.
"""
from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from autoencoder import AutoencoderConfig, FieldAutoencoder
from clif import Field
from consistency import (ConsistencyConfig, ConsistencyModel, sample_function, sample_multistep,
                         sample_onestep)
from inr_generator import (DiT, FunctionGenerator, GeneratorConfig, ImageFunction,
                           TransformerConfig, UViT)
from ldm import DiffusionConfig, GaussianDiffusion, UNet, UNetConfig, qkv_from_legacy
from runs import (checkpoints, first_line, flatten, load_weights, newest_checkpoint,
                  read_checkpoint, rng, torch_noise, unflatten, write_checkpoint)

Labels = Sequence[int | str] | int | str | None     # by number or name; None: drawn at random


def draw_labels(n: int, indices: Sequence[int], seed: int, labels: Labels,
                device: torch.device | str, classes: Sequence[str] = ()) -> Tensor | None:
    """Choose the classes (B,) of images: those given, else each by (seed, index) among all n.

    labels: one for all images, or one for each. None where the model has no classes (n = 0).
    Raises ValueError for a class that the model does not have, and for indices that are no list.
    """
    if isinstance(indices, str) or not isinstance(indices, Iterable):
        raise ValueError(f"indices are the numbers of the images, as in [0, 1, 2] or range(3), "
                         f"not {indices!r}")
    if labels is None and not n:
        return None
    if labels is None:
        return torch.tensor([rng(seed, "label", i).integers(n) for i in indices], device=device)

    labels = labels.tolist() if isinstance(labels, Tensor) else labels
    numbers = {str(i): i for i in range(n)} | {name: i for i, name in enumerate(classes)}
    given = [labels] if isinstance(labels, (int, str)) else list(labels)
    for label in given:
        if str(label) not in numbers:
            known = ", ".join(classes) or f"classes 0 to {n - 1}"
            raise ValueError(f"label {label}: this model has "
                             f"{known if n else 'no classes: leave the label out'}")
    each = given * len(indices) if isinstance(labels, (int, str)) else given
    if len(each) != len(indices):
        raise ValueError(f"{len(each)} labels for {len(indices)} images: give one, or one for each")
    return torch.tensor([numbers[str(label)] for label in each], device=device)


# ---- INFD ----

class LatentScale(nn.Module):
    """Give diffusion a latent of mean 0 and variance 1, and the autoencoder its own back.

    The published code has none (diffusion runs on z as it is), which is the identity set here;
    train.py measures both numbers per channel where `latent_norm` is on, because a short training
    cannot afford a wrong signal-to-noise ratio.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) of the autoencoder -> what diffusion learns."""
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    def inverse(self, z: Tensor) -> Tensor:
        """What diffusion has drawn (B, C, h, w) -> z of the autoencoder."""
        return z * self.std[:, None, None] + self.mean[:, None, None]


# Steps by default: of ddim as published; of dpm++ as many as bring the pictures within 40 dB of
# 200 steps of ddim (docs/results.md).
SAMPLERS = {"ddim": 200, "dpm++": 20}


def sampling(sampler: str = "ddim", steps: int | None = None, eta: float | None = None) -> dict:
    """Say how latents are drawn: {"sampler", "steps", and "eta" of ddim}, with defaults filled in.

    Raises ValueError for an unknown sampler and for an option it has no use for.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler}; there are: {', '.join(SAMPLERS)}")
    how = {"sampler": sampler, "steps": SAMPLERS[sampler] if steps is None else steps}
    if sampler == "ddim":
        how["eta"] = 1.0 if eta is None else eta
    elif eta is not None:
        raise ValueError(f"eta is the noise that ddim adds, and {sampler} adds none: leave eta out")
    return how


@dataclass
class INFD:
    """Hold an image neural field diffusion model."""

    autoencoder: FieldAutoencoder
    unet: UNet | None                       # None in a checkpoint of stage ae
    diffusion: GaussianDiffusion
    scale: LatentScale
    size: int                               # side of the encoder's input, pixels
    patch: int                              # side of the training patch, pixels: the model's tile
    classes: tuple[str, ...] = ()
    step: int = 0
    weights: str = "published"              # which weights these are: EMA or not
    file: Path = Path()                     # where they were read from

    def to(self, device: torch.device | str) -> INFD:
        """Move the model, frozen and in eval mode."""
        for module in (self.autoencoder, self.unet, self.scale):
            if module is not None:
                module.to(device).eval().requires_grad_(False)
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture of the encoder's size."""
        cfg = self.autoencoder.cfg
        return cfg.z_channels, self.size // cfg.f, self.size // cfg.f

    def labels(self, indices: Sequence[int], seed: int, labels: Labels) -> Tensor | None:
        """As `draw_labels`. Raises ValueError for an autoencoder, which cannot sample."""
        if self.unet is None:
            raise ValueError("this checkpoint is an autoencoder (stage ae); sampling needs one of "
                             "stage ldm")
        return draw_labels(self.unet.cfg.num_classes, indices, seed, labels,
                           self.scale.mean.device, self.classes)

    @torch.no_grad()
    def sample(self, indices: Sequence[int], seed: int = 0, steps: int | None = None,
               eta: float | None = None, latent_size: tuple[int, int] | None = None,
               labels: Labels = None, progress: Callable = iter, sampler: str = "ddim") -> Tensor:
        """Draw the latents z (B, C, h, w) of the images numbered `indices`, for `decode`.

        Each is a function of (seed, index) alone. sampler, steps, eta: see `sampling`; all samplers
        begin at the same noise. latent_size: height and width of a larger noise map for the same
        network, convolutional sampling (Section D). labels: see `draw_labels`. progress: wraps the
        iterable of steps (tqdm, say). Raises ValueError for options that the model does not have.
        """
        how = sampling(sampler, steps, eta)
        y = self.labels(indices, seed, labels)
        shape = (self.latent_shape[0], *(latent_size or self.latent_shape[1:]))

        def noise(*key: int | str) -> Tensor:                        # per image, whatever the batch
            made = [torch_noise(shape, seed, *key, i) for i in indices]
            return torch.stack(made).to(self.scale.mean.device)      # (B, C, h, w)

        if sampler == "ddim":
            walk = self.diffusion.ddim_loop(self.unet, noise("x_T"), how["steps"], how["eta"],
                                            functools.partial(noise, "ddim"), y)
        else:
            walk = self.diffusion.dpm_loop(self.unet, noise("x_T"), how["steps"], y)
        for x_t, _ in progress(walk):
            pass
        return self.scale.inverse(x_t)

    @torch.no_grad()
    def decode(self, z: Tensor, paper: bool = False, tile: int | None = None) -> Field:
        """Turn latents z (B, C, h, w) into pictures that can be drawn at any size and window.

        paper: the published statistics of each tile, by which pictures change with the tile; else
        the tile bounds memory alone (clif.Field). tile: its side (default: the training patch).
        """
        channels = self.latent_shape[0]
        if z.dim() != 4 or z.shape[1] != channels:
            raise ValueError(f"this model has latents (B, {channels}, h, w), not {tuple(z.shape)}")
        return self.autoencoder.field(z, tile=self.patch if tile is None else tile, paper=paper)


# ---- One-step models ----

# The networks F: name -> (network, its configuration, the option of a run that holds that).
GENERATORS = {"func": (FunctionGenerator, GeneratorConfig, "func"),
              "unet": (UNet, UNetConfig, "unet"),
              "uvit": (UViT, TransformerConfig, "vit"),
              "dit": (DiT, TransformerConfig, "vit")}


def build_generator(name: str, configs: Callable[[str], object]) -> nn.Module:
    """Make a network F by name; configs(option) gives its configuration."""
    if name not in GENERATORS:
        raise ValueError(f"unknown generator {name}; there are: {', '.join(GENERATORS)}")
    network, _, option = GENERATORS[name]
    return network(configs(option))


@dataclass
class OneStep:
    """Hold a consistency model."""

    f: ConsistencyModel
    size: int                               # training resolution, also that of the noise (D.3.1)
    second: float = 0.0                     # noise level of the second of two steps; 0: none known
    classes: tuple[str, ...] = ()
    step: int = 0
    weights: str = "published"              # which weights these are: EMA or not
    file: Path = Path()                     # where they were read from

    def to(self, device: torch.device | str) -> OneStep:
        """Move the model, frozen and in eval mode."""
        self.f.to(device).eval().requires_grad_(False)
        return self

    def labels(self, indices: Sequence[int], seed: int, labels: Labels) -> Tensor | None:
        """As `draw_labels`."""
        device = next(self.f.parameters()).device
        return draw_labels(self.f.net.cfg.num_classes, indices, seed, labels, device, self.classes)

    def noise(self, indices: Sequence[int], seed: int, k: int = 0) -> Tensor:
        """The k-th standard normal (B, 3, S, S) of each image, by (seed, index, k) alone."""
        made = [torch_noise((3, self.size, self.size), seed, "x_T", i, k) for i in indices]
        return torch.stack(made).to(next(self.f.parameters()).device)

    def levels(self, sigmas: Sequence[float]) -> list[float]:
        """The noise levels of all steps; ValueError unless they decrease and stay above 0."""
        levels = [self.f.cfg.sigma_max, *sigmas]
        if not all(high > low > 0 for high, low in zip(levels, levels[1:])):
            raise ValueError(f"sigmas {', '.join(f'{s:g}' for s in sigmas)}: give decreasing noise "
                             f"levels below {self.f.cfg.sigma_max:g} and above 0")
        return levels

    def sample(self, indices: Sequence[int], seed: int = 0, sigmas: Sequence[float] = (),
               labels: Labels = None) -> Tensor:
        """Draw images (B, 3, S, S) in [-1, 1] at the training size, each by (seed, index) alone.

        One step, and one more from each of the noise levels `sigmas`. labels: see `draw_labels`.
        Raises ValueError for levels or classes that the model does not have.
        """
        levels = self.levels(sigmas)
        y = self.labels(indices, seed, labels)
        noises = [self.noise(indices, seed, k) for k in range(len(levels))]
        if len(levels) == 1:
            return sample_onestep(self.f, noises[0], y)
        return sample_multistep(self.f, noises, levels, y)

    def functions(self, indices: Sequence[int], seed: int = 0,
                  labels: Labels = None) -> ImageFunction:
        """Make B image functions in one step, to be drawn at any size; arguments as in `sample`.

        Raises ValueError also where the network makes pixels.
        """
        y = self.labels(indices, seed, labels)
        return sample_function(self.f, self.noise(indices, seed), y)


# ---- Loading ----

def load(path: str | Path, device: torch.device | str = "cpu", raw: bool = False) -> INFD | OneStep:
    """Rebuild a model from a checkpoint of train.py (a file or its run folder) or a published file.

    raw: the trained weights where the checkpoint has their moving average too (the default).
    Published files are known by what is in them: INFD's {'model': {'name', 'args', 'sd'}}, OpenAI's
    flat dict of a UNet (cd_*, ct_*). Nothing in a file is executed. Raises FileNotFoundError,
    PermissionError, and ValueError with the name of what is missing or does not fit.
    """
    path, ckpt = find_checkpoint(Path(path))
    try:
        made = rebuild(parts(ckpt, path), path.name, raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path}: something in it is not as train.py or the published code writes "
                         f"it ({type(error).__name__}: {first_line(error)})") from error
    return replace(made, file=path).to(device)


def find_checkpoint(path: Path) -> tuple[Path, dict]:
    """Read a checkpoint file, or the newest of a run folder; of a folder of runs it names these."""
    if not path.is_dir():
        return path, read_checkpoint(path)
    below = sorted({str(file.parent) for file in path.glob("*/step-*.pt")})
    if below and not checkpoints(path):
        raise ValueError(f"{path} is a folder of runs: choose {' or '.join(below)}")
    return newest_checkpoint(path)


class Part(dict):
    """A part of a checkpoint's content, which says what it lacks."""

    def __missing__(self, name: object) -> None:
        raise ValueError(f"it lacks {name!r}, so it is no whole checkpoint")


PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")    # of DistributedDataParallel and torch.compile


def parts(content: dict, path: Path) -> Part:
    """Take a checkpoint's content apart; strips what wrappers put before names, and says so."""
    if any(isinstance(name, str) and PREFIX.match(name) for name in content):
        print(f"{path}: left module. and _orig_mod. out of the names of weights", file=sys.stderr)
        content = {PREFIX.sub("", name): value for name, value in content.items()}
    return Part({name: parts(value, path) if isinstance(value, dict) else value
                 for name, value in content.items()})


def rebuild(ckpt: dict, name: str, raw: bool) -> INFD | OneStep:
    """Make the model of a checkpoint's content; `name` is that of its file."""
    makers = {"ae": infd_of, "ldm": infd_of, "cm": onestep_of}
    if "stage" in ckpt:
        if ckpt["stage"] not in makers:
            raise ValueError(f"a checkpoint of stage {ckpt['stage']}; expected ae, ldm or cm")
        return makers[ckpt["stage"]](ckpt, raw)
    model = ckpt.get("model")
    if isinstance(model, dict) and {"args", "sd"} & set(model):
        return published_infd(model, raw)
    if {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= set(ckpt):
        return openai_onestep(ckpt, name)
    raise ValueError(f"neither a checkpoint of train.py nor a published INFD or OpenAI file (its "
                     f"keys: {', '.join(map(str, list(ckpt)[:8])) or 'none'})")


def with_weights(make: Callable[[], nn.Module], weights: dict[str, Tensor], what: str) -> nn.Module:
    """Make a network and load its weights; a ValueError names what does not fit.

    An outline without memory is compared first: a damaged width cannot ask for terabytes.
    """
    with torch.device("meta"):
        outline = make()
    wanted = {name: value.shape for name, value in outline.state_dict().items()}
    if wanted != {name: value.shape for name, value in weights.items()}:
        load_weights(outline, weights, what)                         # raises, and says what differs
    made = make()
    load_weights(made, weights, what)
    return made


def section(name: str, config: type, options: dict):
    """Build a configuration from a run's options, dotted or nested: those below `name`."""
    flat = flatten(options)
    inner = {k.removeprefix(f"{name}."): flat[k] for k in flat if k.startswith(f"{name}.")}
    if not inner:
        raise ValueError(f"its config lacks {name!r}")
    return unflatten(config, inner)


def pick_weights(state: dict, raw: bool) -> tuple[dict, str]:
    """The moving average; the trained weights where raw asks for them or there is no average."""
    if raw and "ema" in state and "model" not in state:
        raise ValueError("it holds the moving average of the weights only; leave --raw out")
    if raw or "ema" not in state:
        return state["model"], "trained weights"
    return state["ema"], "EMA"


def infd_of(ckpt: dict, raw: bool) -> INFD:
    """The model of a checkpoint of stage ae or ldm."""
    weights, kind = pick_weights(ckpt["state"], raw)
    whole = ckpt["stage"] == "ae"
    base = {"config": ckpt["config"], "weights": weights} if whole else ckpt["autoencoder"]
    cfg = section("ae", AutoencoderConfig, base["config"])
    autoencoder = with_weights(functools.partial(FieldAutoencoder, cfg), base["weights"],
                               "the autoencoder")
    unet = None
    scale = LatentScale(cfg.z_channels)
    diffusion = DiffusionConfig()
    if not whole:
        unet_cfg = section("unet", UNetConfig, ckpt["config"])
        unet = with_weights(functools.partial(UNet, unet_cfg), weights, "the UNet")
        load_weights(scale, ckpt["state"]["scale"], "the latent scale")
        diffusion = section("diffusion", DiffusionConfig, ckpt["config"])
    return INFD(autoencoder, unet, GaussianDiffusion(diffusion), scale, base["config"]["size"],
                base["config"]["patch"], tuple(ckpt.get("classes", ())), ckpt["step"], kind)


# What older checkpoints of stage cm hold beside f: schedule and distance, which sampling needs not.
OLD_SCHEDULE = {"s0", "s1", "mu0", "printed_mu", "metric", "doubling", "lognormal", "gap_weight",
                "stages", "P_mean", "P_std", "ect_q", "ect_k", "ect_b"}


def onestep_of(ckpt: dict, raw: bool) -> OneStep:
    """The model of a checkpoint of stage cm."""
    options = Part(flatten(ckpt["config"]))
    weights, kind = pick_weights(ckpt["state"], raw)
    name = options["generator"]

    def configuration(option: str):
        return section(option, GENERATORS[name][1], options)

    net = with_weights(functools.partial(build_generator, name, configuration), weights,
                       f"the generator {name}")
    metric = options["metric"] if "metric" in options else options["cm.metric"]
    kept = {k: v for k, v in options.items() if k.removeprefix("cm.") not in OLD_SCHEDULE}
    cfg = section("cm", ConsistencyConfig, kept)
    # iCT and ECT publish 0.821 for 32 px; for the paper's recipe it is the level published for
    # LSUN, whose last grid has as many points.
    second = 0.821 if metric == "huber" else float(cfg.karras_sigmas(151)[67])
    return OneStep(ConsistencyModel(net, cfg), options["size"], second,
                   tuple(ckpt.get("classes", ())), ckpt["step"], kind)


# ---- Published files ----

# Names of INFD's parameters -> ours, by prefix; the first that fits wins. Ours goes on without.
PUBLISHED_NAMES = {"encoder.0.": "encoder.", "encoder.1.": "encoder.quant_conv.",
                   "decoder.0.": "decoder.post_quant_conv.", "decoder.1.": "decoder.",
                   "renderer.net.model.": "renderer.model.", "renderer.net.": "renderer."}


def published_infd(model: dict, raw: bool) -> INFD:
    """The model of a published INFD file: {'name', 'args', 'sd'}, every key accounted for."""
    args = model["args"]
    ours, unet_weights = {}, {}
    ema = "z_dm." if raw else "z_dm_ema."
    for key, value in model["sd"].items():
        old = next((old for old in PUBLISHED_NAMES if key.startswith(old)), "")
        if key.startswith(ema):
            unet_weights[key.removeprefix(ema)] = value.float()
        elif not key.startswith(("z_dm.", "z_dm_ema.", "perc_loss.", "disc.")):
            ours[PUBLISHED_NAMES.get(old, "") + key.removeprefix(old)] = value.float()

    cfg = published_autoencoder(args)
    autoencoder = with_weights(functools.partial(FieldAutoencoder, cfg), ours,
                               "the published autoencoder (names as in this project)")
    unet = None
    if "z_dm" in args:                                               # else a file of stage 1
        spec = dict(args["z_dm"].get("args") or {})
        spec["attention_ds"] = spec.pop("attention_resolutions", UNetConfig.attention_ds)
        spec.pop("image_size", None)
        unet_cfg = unflatten(UNetConfig, spec)                       # which has their defaults
        weights = adm_weights(unet_weights, unet_cfg.num_head_channels)
        unet = with_weights(functools.partial(UNet, unet_cfg), weights, "the published UNet")
    betas = {k.removeprefix("linear_"): v for k, v in (args.get("z_dp") or {}).items()}
    return INFD(autoencoder, unet, GaussianDiffusion(unflatten(DiffusionConfig, betas)),
                LatentScale(cfg.z_channels), size=args["z_shape"][1] * cfg.f, patch=256,
                weights="published weights" if raw else "published EMA")


def published_autoencoder(args: dict) -> AutoencoderConfig:
    """AutoencoderConfig of a published spec; options that we do not have are refused."""
    net = args["renderer"]["args"]["net"]
    if net["name"] != "simple_renderer_net":
        raise ValueError(f"its renderer is {net['name']}, which this project does not have")
    spec = dict(args["encoder"].get("args") or {})
    for name in ("resolution", "double_z"):                          # said elsewhere, or not needed
        spec.pop(name, None)
    spec |= {"z_channels": args["z_shape"][0], "kl": not args.get("quantizer", False),
             "n_embed": args.get("n_embed", AutoencoderConfig.n_embed),
             "hidden": (net.get("args") or {}).get("hidden_channels", AutoencoderConfig.hidden)}
    return unflatten(AutoencoderConfig, spec)


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


def openai_onestep(weights: dict[str, Tensor], name: str) -> OneStep:
    """A consistency model of OpenAI; only the kind is read from the file's name."""
    if name.startswith("edm_"):
        raise ValueError("a plain denoiser, which takes many steps: edm_* files are no longer "
                         "read; cd_* and ct_* are")
    cfg = openai_unet(weights)
    levels = len(cfg.channel_mult)
    if levels not in (4, 6):
        raise ValueError(f"a UNet of {levels} levels is none of OpenAI's: ImageNet (64 px) has 4, "
                         f"LSUN (256 px) has 6")
    weights = adm_weights({k: v.float() for k, v in weights.items()}, 0)
    net = with_weights(functools.partial(UNet, cfg), weights, "the OpenAI UNet")
    return OneStep(ConsistencyModel(net, ConsistencyConfig()), 64 if levels == 4 else 256)


def openai_unet(weights: dict[str, Tensor]) -> UNetConfig:
    """UNetConfig of an OpenAI consistency model, from the names and shapes of its tensors.

    Its heads have 64 channels and it resamples inside residual blocks, neither of which shows.
    """
    blocks = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("output_blocks."))
    ups = [i for i in range(blocks)
           if f"output_blocks.{i}.1.in_layers.0.weight" in weights
           or f"output_blocks.{i}.2.in_layers.0.weight" in weights]
    if not ups:
        raise ValueError("its UNet does not resample in residual blocks: no model of OpenAI's")
    ends = [*ups, blocks - 1]                         # last block of each level, the coarsest first
    width = weights["input_blocks.0.0.weight"].shape[0]
    out = [weights[f"output_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in ends]
    attends = [f"output_blocks.{i}.1.qkv.weight" in weights for i in ends]
    emb = weights["output_blocks.0.0.emb_layers.1.weight"].shape[0]
    classes = weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else 0
    return UNetConfig(model_channels=width, channel_mult=tuple(c // width for c in reversed(out)),
                      num_res_blocks=ups[0], resblock_updown=True, num_head_channels=64,
                      attention_ds=tuple(2**i for i, a in enumerate(reversed(attends)) if a),
                      num_classes=classes, scale_shift_norm=emb == 2 * out[0])


# ---- Export ----

def export(source: Path, target: Path) -> None:
    """Write what sampling needs of a checkpoint, in half precision: the moving average if any.

    Absolute paths among the options keep their last part alone: the file may go to others. Raises
    FileExistsError rather than overwrite, ValueError for no checkpoint of stage ae, ldm or cm.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another file for --export")
    path, ckpt = find_checkpoint(source)
    if ckpt.get("stage") not in ("ae", "ldm", "cm"):
        raise ValueError(f"--export takes a checkpoint of stage ae, ldm or cm written by train.py, "
                         f"not {path}")
    load(path)                                                       # says what is missing in it

    state = ckpt["state"]
    best = "ema" if "ema" in state else "model"
    small = {name: _half(value) for name, value in ckpt.items() if name not in ("log", "state")}
    small["state"] = {best: _half(state[best])}
    if "scale" in state:
        small["state"]["scale"] = state["scale"]                     # a few numbers, which matter
    target.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(target, small)


def _half(value):
    if isinstance(value, dict):
        return {k: _half(v) for k, v in value.items()}
    if isinstance(value, str) and os.path.isabs(value):
        return Path(value).name
    return value.half() if isinstance(value, Tensor) and value.is_floating_point() else value
