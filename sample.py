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
from ldm import DiffusionConfig, GaussianDiffusion, UNet, UNetConfig, qkv_from_legacy
from runs import (checkpoints, cli, compiled, first_line, flatten, load_weights,
                  newest_checkpoint, pick_device, read_checkpoint, rng, torch_noise, unflatten,
                  wants_compile, write_checkpoint)

Labels = Sequence[int | str] | int | str | None


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
    to = frozen

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture of the encoder's size."""
        cfg = self.autoencoder.cfg
        return cfg.z_channels, self.size // cfg.f, self.size // cfg.f

    @torch.no_grad()
    def sample(self, indices: Sequence[int], seed: int = 0, steps: int | None = None,
               eta: float = 1.0, latent_size: tuple[int, int] | None = None,
               labels: Labels = None, sampler: str = "ddim") -> Tensor:
        """Draw the latents z (B, C, h, w) of the images numbered `indices`, for `decode`.

        latent_size: (h, w) of a larger noise map, convolutional sampling (Section D). eta: of ddim.
        """
        if self.unet is None:
            raise ValueError("this is an autoencoder (stage ae); take a checkpoint of stage ldm")
        steps = SAMPLERS[sampler] if steps is None else steps
        y = draw_labels(self.unet, self.classes, indices, seed, labels)
        shape = (self.latent_shape[0], *(latent_size or self.latent_shape[1:]))

        def noise(*key: int | str) -> Tensor:                        # per image, whatever the batch
            made = [torch_noise(shape, seed, *key, i) for i in indices]
            return torch.stack(made).to(self.scale.mean.device)      # (B, C, h, w)

        if sampler == "ddim":
            each = functools.partial(noise, "ddim")
            walk = self.diffusion.ddim_loop(self.unet, noise("x_T"), steps, eta, each, y)
        else:
            walk = self.diffusion.dpm_loop(self.unet, noise("x_T"), steps, y)
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

def load(path: str | Path, device: torch.device | str = "cpu", raw: bool = False) -> INFD | OneStep:
    """Rebuild a model from a checkpoint of train.py (a file or its run folder) or a published file.

    raw: the trained weights where the checkpoint has their moving average too (the default).
    Raises OSError, and ValueError for what is missing or does not fit.
    """
    path = Path(path)
    below = sorted({str(file.parent) for file in path.glob("*/step-*.pt")})
    if below and not checkpoints(path):
        raise ValueError(f"{path} is a folder of runs: choose {' or '.join(below)}")
    path, ckpt = newest_checkpoint(path) if path.is_dir() else (path, read_checkpoint(path))
    try:
        if ckpt.get("stage") in ("ae", "ldm", "cm"):
            made = trained(ckpt, raw)
        elif isinstance(ckpt.get("model"), dict) and {"args", "sd"} & set(ckpt["model"]):
            made = published_infd(ckpt["model"]["args"], ckpt["model"]["sd"], raw)
        elif "time_embed.0.weight" in ckpt and "out.2.weight" in ckpt:
            made = openai_onestep(ckpt, path.name)
        else:
            what = f"stage {ckpt['stage']}" if "stage" in ckpt else ", ".join(map(str, ckpt))
            raise ValueError(f"neither stage ae, ldm or cm of train.py, nor a published INFD or "
                             f"OpenAI file ({what:.99})")
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


# Names of INFD's parameters -> ours, by prefix; the first that fits wins. Ours goes on without.
PUBLISHED_NAMES = {"encoder.0.": "encoder.", "encoder.1.": "encoder.quant_conv.",
                   "decoder.0.": "decoder.post_quant_conv.", "decoder.1.": "decoder.",
                   "renderer.net.model.": "renderer.model.", "renderer.net.": "renderer."}


def published_infd(args: dict, sd: dict[str, Tensor], raw: bool) -> INFD:
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
    weights = {}
    for key in sd:
        old = next((old for old in PUBLISHED_NAMES if key.startswith(old)), "")
        if not key.startswith(("z_dm.", "z_dm_ema.", "perc_loss.", "disc.")):
            weights[PUBLISHED_NAMES.get(old, "") + key.removeprefix(old)] = sd[key].float()
    autoencoder = filled(FieldAutoencoder, cfg, weights, "the autoencoder (names as here)")

    unet = None
    if "z_dm" in args:                                               # else a file of stage 1
        spec = {k.replace("attention_resolutions", "attention_ds"): v
                for k, v in (args["z_dm"].get("args") or {}).items() if k != "image_size"}
        unet_cfg = unflatten(UNetConfig, spec)                       # which has their defaults
        own = "z_dm." if raw else "z_dm_ema."
        weights = {k.removeprefix(own): sd[k].float() for k in sd if k.startswith(own)}
        weights = adm_weights(weights, unet_cfg.num_head_channels)
        unet = filled(UNet, unet_cfg, weights, "the UNet")
    betas = {k.removeprefix("linear_"): v for k, v in (args.get("z_dp") or {}).items()}
    return INFD(autoencoder, unet, GaussianDiffusion(unflatten(DiffusionConfig, betas)),
                LatentScale(cfg.z_channels), size=args["z_shape"][1] * cfg.f, patch=256,
                weights="published weights" if raw else "published EMA")


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


def openai_onestep(weights: dict[str, Tensor], name: str) -> OneStep:
    """A consistency model of OpenAI, whose file is a flat dict of weights."""
    if name.startswith("edm_"):
        raise ValueError("a plain denoiser: edm_* files are no longer read; cd_* and ct_* are")
    size = 64 if "label_emb.weight" in weights else 256
    weights = adm_weights({k: v.float() for k, v in weights.items()}, 0)
    net = filled(UNet, OPENAI[size], weights, f"OpenAI's UNet for {size} px")
    return OneStep(ConsistencyModel(net, ConsistencyConfig()), size)


def export(source: Path, target: Path) -> None:
    """Write what sampling needs of a run, in half precision: the moving average if there is one."""
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another file for --export")
    path = load(source).file                                         # says what is missing in it
    ckpt = read_checkpoint(path)
    if "stage" not in ckpt:
        raise ValueError(f"--export takes a checkpoint of train.py, not {path}")
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
    add("-n", "--n", type=int, default=1, help="how many (1); -n after torchrun")
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
    add("--steps", type=int, help="of the sampler (200 of ddim, 20 of dpm++)")
    add("--eta", type=float, help="noise that ddim adds: 0 none, 1 as published (1)")
    add("--latent-size", type=size, help="a larger noise map, as 32x64 (Section D)")
    add("--norm", choices=["frame", "paper"], help="statistics of the whole, or each tile (frame)")
    add("--tile", type=int, help="side of a tile in pixels (256; paper: the training patch)")
    add("--compile", metavar="WHEN", help="the renderer: on, off, or auto, on a CUDA GPU (auto)")

    add = p.add_argument_group("CM only").add_argument
    add("--func-dtype", choices=["float32", "bfloat16"], help="of the function's later layers")
    add("--sigmas", type=numbers, help="noise of further steps, as 0.821 (iCT, ECT), 4 (LSUN)")
    return p


# The options of the other kind of model.
FOREIGN = {INFD: ("sigmas", "func-dtype"),
           OneStep: ("sampler", "steps", "eta", "latent-size", "norm", "tile", "compile")}


def infd_pictures(model: INFD, args: argparse.Namespace) -> tuple[dict, list, Callable]:
    """How pictures are made, their sizes, and what draws those of some indices: tiles of each."""
    sampler = args.sampler or "ddim"
    how = {"sampler": sampler, "steps": SAMPLERS[sampler] if args.steps is None else args.steps}
    if sampler == "ddim":
        how["eta"] = 1.0 if args.eta is None else args.eta
    elif args.eta is not None:
        raise ValueError("--eta is the noise that ddim adds, and dpm++ adds none: leave it out")
    latent = args.latent_size or model.latent_shape[1:]
    paper = args.norm == "paper"
    renderer = model.autoencoder.renderer
    if wants_compile(args.compile or "auto", model.scale.mean.device):
        renderer = compiled(renderer, strict=args.compile == "on")
    sizes = args.res or [tuple(model.autoencoder.cfg.f * n for n in latent)]

    def draw(indices: list[int]) -> Iterator[tuple]:
        z = model.sample(indices, args.seed, latent_size=latent, labels=args.label, **how)
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
    if min(args.n, args.batch) < 1:
        raise ValueError("--n and --batch must be at least 1")

    model = load(path, pick_device(args.device), args.raw)
    given = [f"--{name}" for name in FOREIGN[type(model)]
             if getattr(args, name.replace("-", "_")) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} means nothing to a model of the kind "
                         f"{type(model).__name__} (--help)")
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
