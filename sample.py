"""Load a model, draw its pictures at any resolution, write them: for Python, and as a program.

INFD: z ~ diffusion, phi = D(z), pixels = R(phi, coord, cell) (Section J: 200 steps of DDIM, eta 1).
CM-Func: one call of the generator makes an image function (Appendix D.3.1). Both come to something
with `tiles` and `draw`, and a picture is a function of (seed, index).
"""
from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import re
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from autoencoder import AutoencoderConfig, FieldAutoencoder
from clif import Field, Tiles, check_frame
from consistency import (ConsistencyConfig, ConsistencyModel, sample_function, sample_multistep,
                         sample_onestep)
from data import to_uint8
from inr_generator import (DiT, FunctionGenerator, GeneratorConfig, ImageFunction,
                           TransformerConfig, UViT)
from ldm import DiffusionConfig, GaussianDiffusion, UNet, UNetConfig, guided
from published import WEIGHT_FILES, Model, infd_model, openai_network, read_weights, sd_model
from runs import (checkpoints, cli, compiled, first_line, flatten, load_weights,
                  newest_checkpoint, pick_device, read_checkpoint, rng, torch_noise, unflatten,
                  wants_compile, write_checkpoint)
from text import CLIPTokenizer, TextTransformer, WordTokenizer, clip_tokenizer

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
        labels = [rng(seed, "label", i).integers(n) for i in indices]
    numbers = {str(i): i for i in range(n)} | {name: i for i, name in enumerate(classes)}
    given = [str(label) for label in np.asarray(labels).reshape(-1)]
    for label in set(given) - set(numbers):
        raise ValueError(f"label {label}: this model has {', '.join(classes) or f'{n} classes'}")
    chosen = torch.tensor([numbers[label] for label in given])
    return chosen.to(next(net.parameters()).device).expand(len(indices))


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


# Steps: of ddim as published; of dpm++ as many as come within 40 dB of ddim's (docs/results.md).
SAMPLERS = {"ddim": 200, "dpm++": 20}


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
    ddim_steps: int = SAMPLERS["ddim"]      # what `sample` does where nothing else is said
    eta: float = 1.0
    guidance: float = 7.5                   # of text (Stable Diffusion)
    to = frozen

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture of the encoder's size."""
        cfg = self.autoencoder.cfg
        return cfg.z_channels, self.size // cfg.f, self.size // cfg.f

    def check_condition(self, labels: Labels, prompts: Prompts, guidance: float | None) -> None:
        """Raise ValueError where the model cannot draw by these; see `sample`."""
        if self.unet is None:
            raise ValueError("this is an autoencoder (stage ae); take a checkpoint of stage ldm")
        if self.text is None and prompts is not None:
            raise ValueError("a prompt: this model does not read text")
        if self.text is not None and labels is not None:
            raise ValueError("a label: this model has no classes, it draws what a prompt says")
        if self.text is not None and not (prompts and all(prompt.strip() for prompt in prompts)):
            raise ValueError("this model draws what a --prompt says: give one that is not empty")
        if guidance is not None and self.text is None and not self.unet.cfg.null_class:
            raise ValueError("guidance: this model never learned to draw without its condition")

    def guide(self, indices: Sequence[int], prompts: Prompts, negative: str,
              guidance: float | None) -> Callable:
        """The network that a sampler calls: (x_t, t, y) -> eps, after its condition."""
        if self.text is None and guidance is None:
            return self.unet
        if self.text is None:
            return guided(self.unet, guidance, null_class=self.unet.cfg.num_classes)
        texts = [prompts[i % len(prompts)] for i in indices]
        ids = self.tokenizer([negative, *texts]).to(self.scale.mean.device)      # (1 + B, N)
        null, context = self.text(ids).split([1, len(texts)])                    # (1 + B, N, D)
        return guided(self.unet, self.guidance if guidance is None else guidance, context, null)

    def steps_of(self, sampler: str) -> int:
        """How many steps a sampler takes where nothing is said."""
        return self.ddim_steps if sampler == "ddim" else SAMPLERS[sampler]

    @torch.no_grad()
    def sample(self, indices: Sequence[int], seed: int = 0, steps: int | None = None,
               eta: float | None = None, latent_size: tuple[int, int] | None = None,
               labels: Labels = None, sampler: str = "ddim", prompts: Prompts = None,
               negative: str = "", guidance: float | None = None) -> Tensor:
        """Draw the latents z (B, C, h, w) of the images numbered `indices`, for `decode`.

        latent_size: (h, w) of a larger noise map, convolutional sampling (Section D). eta: of ddim.
        prompts: what to draw; tokenizer.remark says what of one the model does not read. negative:
        what to lead away from. guidance: 1 is the model itself, more follows the prompt closer.
        """
        self.check_condition(labels, prompts, guidance)
        steps = self.steps_of(sampler) if steps is None else steps
        eta = self.eta if eta is None else eta
        model = self.guide(indices, prompts, negative, guidance)
        y = draw_labels(self.unet, self.classes, indices, seed, labels)
        shape = (self.latent_shape[0], *(latent_size or self.latent_shape[1:]))

        def noise(*key: int | str) -> Tensor:                        # per image, whatever the batch
            made = [torch_noise(shape, seed, *key, i) for i in indices]
            return torch.stack(made).to(self.scale.mean.device)      # (B, C, h, w)

        if sampler == "ddim":
            each = functools.partial(noise, "ddim")
            walk = self.diffusion.ddim_loop(model, noise("x_T"), steps, eta, each, y)
        else:
            walk = self.diffusion.dpm_loop(model, noise("x_T"), steps, y)
        for x_t, _ in tqdm(walk, "latents", steps, leave=False, disable=None):
            pass
        return self.scale.inverse(x_t)

    @torch.no_grad()
    def decode(self, z: Tensor, paper: bool = False, tile: int | None = None) -> Field:
        """Turn latents z (B, C, h, w) into pictures to be drawn at any size; see clif.Field.

        tile: its side; by default 256, and with paper, whose pictures change with it, the patch.
        """
        own = self.patch if paper else 256
        return self.autoencoder.field(z, own if tile is None else tile, paper)


# The networks F: name -> (network, its configuration, the option of a run that holds that).
GENERATORS = {"func": (FunctionGenerator, GeneratorConfig, "func"),
              "unet": (UNet, UNetConfig, "unet"),
              "uvit": (UViT, TransformerConfig, "vit"),
              "dit": (DiT, TransformerConfig, "vit")}


def build_generator(name: str, configs: Callable[[str], object]) -> nn.Module:
    """Make a network F by name; configs(option) gives its configuration."""
    network, _, option = GENERATORS[name]
    return network(configs(option))


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
        levels = [self.f.cfg.sigma_max, *sigmas]
        if not all(high > low > 0 for high, low in itertools.pairwise(levels)):
            raise ValueError(f"sigmas {', '.join(f'{s:g}' for s in sigmas)}: give decreasing noise "
                             f"levels below {levels[0]:g} and above 0")
        y = draw_labels(self.f.net, self.classes, indices, seed, labels)
        noises = [self.noise(indices, seed, k) for k in range(len(levels))]
        if len(levels) == 1:
            return sample_onestep(self.f, noises[0], y)
        return sample_multistep(self.f, noises, levels, y)

    def functions(self, indices: Sequence[int], seed: int = 0,
                  labels: Labels = None) -> ImageFunction:
        """Make B image functions in one step; ValueError where the network makes pixels."""
        y = draw_labels(self.f.net, self.classes, indices, seed, labels)
        return sample_function(self.f, self.noise(indices, seed), y)


# ---- From files to models and back ----

def load(path: str | Path, device: torch.device | str = "cpu", raw: bool = False,
         merges: str | None = None) -> INFD | OneStep:
    """Rebuild a model from a checkpoint of train.py (a file or its run folder) or a published file.

    raw: the trained weights where the checkpoint has their moving average too (the default).
    merges: the file of CLIP's tokenizer, where it is not beside a file of Stable Diffusion. Raises
    OSError, and ValueError for what is missing or does not fit.
    """
    path = Path(path)
    below = sorted({str(file.parent) for file in path.glob("*/step-*.pt")})
    if below and not checkpoints(path):
        raise ValueError(f"{path} is a folder of runs: choose {' or '.join(below)}")
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
            made = openai_onestep(ckpt, path.name)
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
    if plain.keys() != weights.keys():
        print(f"{what}: left module. and _orig_mod. out of the names of weights", file=sys.stderr)
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
    weights = state["ema" if average else "model"]
    if ckpt["stage"] == "cm":
        network, config, option = GENERATORS[options["generator"]]
        net = filled(network, section(option, config, options), weights, "the generator")
        kept = {k: v for k, v in options.items() if k.removeprefix("cm.") not in OLD_SCHEDULE}
        f = ConsistencyModel(net, section("cm", ConsistencyConfig, kept))
        made = OneStep(f, options["size"])
    else:
        alone = ckpt["stage"] == "ae"
        base = {"config": options, "weights": weights} if alone else ckpt["autoencoder"]
        cfg = section("ae", AutoencoderConfig, base["config"])
        made = INFD(filled(FieldAutoencoder, cfg, base["weights"], "the autoencoder"), None,
                    GaussianDiffusion(DiffusionConfig()), LatentScale(cfg.z_channels),
                    base["config"]["size"], base["config"]["patch"])
        if not alone:
            made.unet = filled(UNet, section("unet", UNetConfig, options), weights, "the UNet")
            made.diffusion = GaussianDiffusion(section("diffusion", DiffusionConfig, options))
            load_weights(made.scale, state["scale"], "the latent scale")
    return replace(made, classes=tuple(ckpt.get("classes", ())), step=ckpt["step"],
                   weights="EMA" if average else "trained weights")


def assembled(parts: Model, path: Path, merges: str | None = None) -> INFD:
    """The model of a published file; merges: see `text.find_merges`."""
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
                weights=parts.weights, text=text, tokenizer=tokenizer)
    return made if text is None else replace(made, ddim_steps=50, eta=0.0)   # as published


def openai_onestep(weights: dict[str, Tensor], name: str) -> OneStep:
    """A consistency model of OpenAI, whose file is a flat dict of weights."""
    size, network = openai_network(weights, name)
    net = filled(UNet, *network, f"OpenAI's UNet for {size} px")
    return OneStep(ConsistencyModel(net, ConsistencyConfig()), size)


def export(source: Path, target: Path) -> None:
    """Write what sampling needs of a run, in half precision: the moving average if there is one."""
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another file for --export")
    ckpt = {}
    if source.suffix not in WEIGHT_FILES:
        path = load(source).file                                     # says what is missing in it
        ckpt = read_checkpoint(path)
    if "stage" not in ckpt:
        raise ValueError(f"--export takes a checkpoint of train.py, not {source}")
    best = "ema" if "ema" in ckpt["state"] else "model"
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


# ---- Picture files ----

def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file: length, kind, data, CRC-32 of both."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_head(size: tuple[int, int], info: dict) -> bytes:
    """All of a PNG before its pixels; its text `parameters` says in JSON how it was made."""
    ihdr = struct.pack(">2I5B", size[1], size[0], 8, 2, 0, 0, 0)     # 8 bits, RGB, not interlaced
    text = b"parameters\0" + json.dumps(info).encode("ascii")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", ihdr) + png_chunk(b"tEXt", text)


def write_png(path: Path, head: bytes, width: int, tiles: Tiles) -> None:
    """Draw a picture into a PNG that begins by `head`; memory holds one row of its tiles."""
    part = path.with_name(path.name + ".part")
    above = np.zeros((1, 3 * width), np.uint8)
    deflate = zlib.compressobj()
    band = []
    try:
        with open(part, "wb") as file:
            file.write(head)
            for _, left, rgb in tiles:
                band.append(to_uint8(rgb[0]))                        # (h, w, 3)
                if left + rgb.shape[-1] < width:
                    continue
                rows = np.concatenate(band, axis=1).reshape(-1, 3 * width)
                up = rows - np.concatenate([above, rows[:-1]])       # modulo 256, as PNG has it
                raw = np.insert(up, 0, 2, axis=1)                    # filter 2: less the row above
                file.write(png_chunk(b"IDAT", deflate.compress(raw.tobytes())))
                above = rows[-1:]
                band.clear()
            file.write(png_chunk(b"IDAT", deflate.flush()) + png_chunk(b"IEND", b""))
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], side: int, gap: int = 4) -> np.ndarray:
    """Put rows of pictures (h, w, 3) on white, enlarged to `side` pixels by nearest neighbour."""
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (side + gap), columns * (side + gap), 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, pixels in enumerate(row):
            scale = side / max(pixels.shape[:2])
            height, width = (max(1, round(scale * n)) for n in pixels.shape[:2])
            cell = sheet[r * (side + gap):, c * (side + gap):]
            cell[:height, :width] = Image.fromarray(pixels).resize((width, height), Image.NEAREST)
    return sheet[:-gap, :-gap]


SHEET = 8192                                # pixels: about the side of a sheet at most


def write_sheet(path: Path, files: Sequence[Path]) -> None:
    """Put picture files on one sheet, nearly square; large ones are reduced so that it fits."""
    columns = math.ceil(math.sqrt(len(files)))
    pictures = []
    for file in files:
        with Image.open(file) as image:
            image.thumbnail((SHEET // columns, SHEET // columns))    # never enlarges
            pictures.append(np.asarray(image))
    rows = [pictures[at:at + columns] for at in range(0, len(pictures), columns)]
    sheet = contact_sheet(rows, max(max(pixels.shape) for pixels in pictures))
    Image.fromarray(sheet).save(path, quality=92)


# ---- Command line ----

def size(text: str) -> tuple[int, int]:
    """'512' -> (512, 512), '512x1024' -> (512, 1024), height first."""
    sides = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; write 512, or 512x1024")
    return int(sides[1]), int(sides[2] or sides[1])


def sizes(text: str) -> list[tuple[int, int]]:
    """'256,512x1024' -> [(256, 256), (512, 1024)]."""
    return [size(part) for part in text.split(",")]


def numbers(text: str) -> tuple[float, ...]:
    """'4.0,0.8' -> (4.0, 0.8)."""
    return tuple(float(part) for part in text.split(","))


class Parser(argparse.ArgumentParser):
    """Reads the command line; a ValueError says what is wrong with it."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def parser() -> Parser:
    """Describe the command line."""
    p = Parser(usage="python sample.py [--ckpt RUN] [-n N] [--res SIZES] [OPTION ...]",
               description="Draw images as functions: any resolution, any window.",
               allow_abbrev=False)
    p._negative_number_matcher = re.compile(r"-[\d.]")               # --window -1,-1,0,0
    add = p.add_argument_group("the model").add_argument
    add("--ckpt", metavar="RUN", help="run folder or checkpoint file (the bundled weights)")
    add("--model", choices=["infd", "cm"], default="infd", help="which bundled weights (infd)")
    add("--raw", action="store_true", help="the trained weights instead of their moving average")
    add("--export", metavar="FILE", help="write the model in half precision; draw nothing")

    add = p.add_argument_group("the pictures").add_argument
    add("-n", "--n", type=int, help="how many (1, or one a prompt); -n after torchrun")
    add("--start", type=int, default=0, metavar="I", help="number of the first image (0)")
    add("--seed", type=int, default=0, help="a picture depends on seed and number alone (0)")
    add("--label", help="class, by name or number (drawn per image)")
    add("--res", type=sizes, help="512 or several, 256,512,1024; 256x512 (height x width)")
    add("--window", type=numbers, metavar="y0,x0,y1,x1", help="a part of -1,-1,1,1, at --res")
    add("--out", metavar="FOLDER", help="(a new one under samples/); nothing is ever overwritten")
    add("--sheet", metavar="FILE", help="all pictures on one sheet, too: .png or .jpg")
    add("--batch", type=int, default=4, help="images made together (4)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (auto)")

    add = p.add_argument_group("INFD only").add_argument
    add("--sampler", choices=SAMPLERS, help="(ddim)")
    add("--steps", type=int, help="of the sampler (200 of ddim, 20 of dpm++; text: 50 of ddim)")
    add("--eta", type=float, help="noise that ddim adds: 0 none, 1 as published (1; text: 0)")
    add("--latent-size", type=size, help="a larger noise map, as 32x64 (Section D)")
    add("--norm", choices=["frame", "paper"], help="statistics of the whole, or each tile (frame)")
    add("--tile", type=int, help="side of a tile in pixels (256; paper: the training patch)")
    add("--compile", metavar="WHEN", help="the renderer: on, off, or auto, on a CUDA GPU (auto)")

    add = p.add_argument_group("text to image (Stable Diffusion v1)").add_argument
    add("--prompt", action="append", metavar="TEXT", help="what to draw; several: image by image")
    add("--prompts", metavar="FILE", help="prompts, one a line")
    add("--negative", metavar="TEXT", help="what to lead away from (the empty text)")
    add("--guidance", type=float, metavar="W", help="1: none; more follows the prompt closer (7.5)")
    add("--merges", metavar="FILE", help="CLIP's tokenizer, if not beside the checkpoint")

    add = p.add_argument_group("CM only").add_argument
    add("--func-dtype", choices=["float32", "bfloat16"], help="of the function's later layers")
    add("--sigmas", type=numbers, help="noise of further steps, as 0.821 (iCT, ECT), 4 (LSUN)")
    return p


# The options of other kinds of models.
FOREIGN = {"INFD with text": ("sigmas", "func-dtype"),
           "INFD without text": ("sigmas", "func-dtype", "negative", "merges"),
           "OneStep": ("sampler", "steps", "eta", "latent-size", "norm", "tile", "compile",
                       "prompt", "negative", "guidance", "merges")}


def check_kind(model: INFD | OneStep, args: argparse.Namespace) -> None:
    """Raise ValueError where options belong to another kind of model, and say what is not read."""
    kind = type(model).__name__
    if isinstance(model, INFD):
        model.check_condition(args.label, args.prompt, args.guidance)
        kind += " without text" if model.text is None else " with text"
    given = [f"--{name}" for name in FOREIGN[kind]
             if getattr(args, name.replace("-", "_")) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} means nothing to a model of the kind {kind} (--help)")
    for prompt in [*(args.prompt or []), args.negative or ""]:
        remark = model.tokenizer.remark(prompt) if prompt else ""
        if remark:
            print(f'warning: prompt "{prompt[:60]}": {remark}', file=sys.stderr)


def read_prompts(args: argparse.Namespace) -> list[str] | None:
    """The prompts of --prompt and of the lines of --prompts that are not empty; None without."""
    if args.prompts is None:
        return args.prompt
    try:
        lines = Path(args.prompts).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.prompts} is no text (UTF-8)") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{args.prompts} has no prompt in it; write one a line")
    return [*(args.prompt or []), *found]


def infd_pictures(model: INFD, args: argparse.Namespace) -> tuple[dict, list, Callable]:
    """How pictures are made, their sizes, and what draws those of some indices: tiles of each."""
    sampler = args.sampler or "ddim"
    how = {"sampler": sampler,
           "steps": model.steps_of(sampler) if args.steps is None else args.steps}
    if sampler == "ddim":
        how["eta"] = model.eta if args.eta is None else args.eta
    elif args.eta is not None:
        raise ValueError("--eta is the noise that ddim adds, and dpm++ adds none: leave it out")
    if model.text is not None:
        how["negative"] = args.negative or ""
        how["guidance"] = model.guidance if args.guidance is None else args.guidance
    elif args.guidance is not None:
        how["guidance"] = args.guidance
    latent = args.latent_size or model.latent_shape[1:]
    paper = args.norm == "paper"
    renderer = model.autoencoder.renderer
    if wants_compile(args.compile or "auto", model.scale.mean.device):
        renderer = compiled(renderer, strict=args.compile == "on")
    sizes = args.res or [tuple(model.autoencoder.cfg.f * n for n in latent)]

    def draw(indices: list[int]) -> Iterator[tuple]:
        z = model.sample(indices, args.seed, latent_size=latent, labels=args.label,
                         prompts=args.prompt, **how)
        for i, one in zip(indices, z.split(1)):
            field = replace(model.decode(one, paper, args.tile), renderer=renderer)
            for size in sizes:
                yield i, size, field.tiles(size, args.window)

    tile = {"tile": args.tile or model.patch} if paper else {}       # else it changes no picture
    made = {**how, "norm": args.norm or "frame", **tile, "latent_size": args.latent_size}
    return made, sizes, draw


def onestep_pictures(model: OneStep, args: argparse.Namespace) -> tuple[dict, list, Callable]:
    """As `infd_pictures`: functions at every size, or pixels at the training size."""
    own = [(model.size, model.size)]
    sizes = args.res or own
    sigmas = args.sigmas or ()
    dtype = args.func_dtype or "float32"
    free = hasattr(model.f.net, "function") and not sigmas
    if not free and (args.window or args.func_dtype or sizes != own):
        raise ValueError(f"only one step of generator=func can be drawn at any size and window, "
                         f"and by --func-dtype; this draws --res {model.size} and the whole image")

    def draw(indices: list[int]) -> Iterator[tuple]:
        if not free:
            images = model.sample(indices, args.seed, sigmas, args.label)
            for i, image in zip(indices, images.split(1)):
                yield i, own[0], [(0, 0, image)]
            return
        functions = model.functions(indices, args.seed, args.label)
        for (b, i), size in itertools.product(enumerate(indices), sizes):
            tiles = functions[b].tiles(size, args.window, dtype=getattr(torch, dtype))
            yield i, size, tiles

    made = {"steps": 1 + len(sigmas), "sigmas": sigmas}
    return made | ({} if dtype == "float32" else {"func_dtype": dtype}), sizes, draw


def bundled(name: str) -> Path:
    """Say where the weights are that come with the project."""
    return Path(__file__).parent / "weights" / f"{name}.pt"


def planned(args: argparse.Namespace, model: INFD | OneStep, sizes: list, made: dict,
            out: Path) -> tuple[dict, dict]:
    """Name the files of a call by (index, size), and what their PNGs begin with."""
    digest = hashlib.sha256(np.memmap(model.file, mode="r")).hexdigest()[:16]
    common = {"ckpt": model.file.name, "sha256": digest, "weights": model.weights,
              "seed": args.seed, "window": args.window, "label": args.label, **made}
    files = {}
    heads = {}
    for i, size in itertools.product(range(args.start, args.start + args.n), sizes):
        if args.prompt:
            common["prompt"] = args.prompt[i % len(args.prompt)]
        files[i, size] = file = out / f"seed{args.seed}-{i:06d}-{size[0]}x{size[1]}.png"
        heads[i, size] = head = png_head(size, {**common, "index": i, "res": size})
        if file.exists() and file.open("rb").read(len(head)) != head:
            raise FileExistsError(f"{file} exists and is another picture; choose another --out")
    return files, heads


def run(argv: list[str]) -> None:
    """Draw what the command line asks for."""
    args, unknown = parser().parse_known_args(argv)
    if unknown:
        raise ValueError(f"unknown option {' '.join(unknown)} (metrics.py has --fid and --features "
                         f"now, experiments.py bench, docs/results.md the table of samplers)")
    path = Path(args.ckpt) if args.ckpt else bundled(args.model)
    if args.export:
        return export(path, Path(args.export))
    rank = int(os.environ.get("RANK", 0))                            # torchrun: each has its share
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and (not args.out or args.sheet):
        raise ValueError("under torchrun give --out, which all processes share, and no --sheet")
    if args.window and len(args.window) != 4:
        raise ValueError("--window takes four numbers, y0,x0,y1,x1; the whole is -1,-1,1,1")
    args.prompt = read_prompts(args)
    if args.n is None:
        args.n = len(args.prompt or [""])
    if min(args.n, args.batch) < 1:
        raise ValueError("--n and --batch must be at least 1")

    model = load(path, pick_device(args.device), args.raw, args.merges)
    check_kind(model, args)
    pictures = infd_pictures if isinstance(model, INFD) else onestep_pictures
    made, sizes, draw = pictures(model, args)
    net = model.unet if isinstance(model, INFD) else model.f.net
    if net is not None:
        draw_labels(net, model.classes, [0], args.seed, args.label)  # names a wrong one at once
    for size in sizes:
        check_frame(size, args.window)
    sheet = args.sheet and Path(args.sheet)
    if sheet and (sheet.exists() or sheet.suffix not in (".png", ".jpg")
                  or max(map(max, sizes)) > SHEET):
        raise ValueError(f"--sheet {sheet}: name a new .png or .jpg file, for pictures of up to "
                         f"{SHEET} pixels a side")

    taken = [int(p.name) for p in Path("samples").glob("*") if p.name.isdecimal()]
    out = Path(args.out or f"samples/{max(taken, default=0) + 1:04d}")
    for folder in (out, sheet.parent if sheet else out):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()                   # says what is wrong at once
    files, heads = planned(args, model, sizes, made, out)

    todo = [i for (i, _), file in files.items() if i % world == rank and not file.exists()]
    todo = list(dict.fromkeys(todo))
    for at in range(0, len(todo), args.batch):
        for i, size, tiles in draw(todo[at:at + args.batch]):
            if not files[i, size].exists():                          # one that is there is the same
                write_png(files[i, size], heads[i, size], size[1], tiles)
    if sheet:
        write_sheet(sheet, list(files.values()))
    if rank == 0:
        print(f"{len(files)} pictures ({model.weights}, step {model.step}) in {out}")


def main(argv: list[str] | None = None) -> int:
    """The exit code: see `runs.cli`."""
    return cli(run, sys.argv[1:] if argv is None else argv,
               stopped="stopped; the same command with the same --out draws what is missing",
               memory="take a smaller --tile (INFD), --batch or --res")


if __name__ == "__main__":
    sys.exit(main())
