"""From a checkpoint to pictures at any resolution: z ~ diffusion, phi = D(z), pixels = R(phi, coord, cell).

Sampling needs neither losses nor optimisers. Reads the checkpoints of train.py and the published INFD files
(INFD, Section J; 200 DDIM steps, eta 1, tiles of 256 px, halo 8). See clif.py for the renderer, ldm.py for DDIM.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import pickle
import sys
import typing
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from tqdm import tqdm

import metrics
from autoencoder import AutoencoderConfig, FieldAutoencoder
from clif import render_tiles
from data import rng, torch_noise
from ldm import DiffusionConfig, GaussianDiffusion, UNet, UNetConfig, qkv_from_legacy

# ---- checkpoint files ------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first."""
    return sorted(run.glob("step-*.pt"), reverse=True)


def read_checkpoint(path: str | Path) -> dict:
    """Read one checkpoint file. Nothing in it is executed, and a flipped byte is found by the archive's checksums.

    Raises FileNotFoundError where there is no such file and ValueError where it is damaged or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give --ckpt a file or a run folder written by train.py")
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
    """Load weights by name and shape; a ValueError names what is missing, left over or of another shape."""
    own = module.state_dict()
    wrong = [f"missing {k}" for k in own if k not in weights] + [f"left over {k}" for k in weights if k not in own]
    wrong += [f"{k} is {tuple(weights[k].shape)}, not {tuple(v.shape)}"
              for k, v in own.items() if k in weights and weights[k].shape != v.shape]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{what} does not fit: {'; '.join(wrong[:5])}{more}")
    module.load_state_dict(weights)


# ---- the model -------------------------------------------------------------------------------------------------------


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
    def sample(self, indices: list[int], seed: int = 0, steps: int = 200, eta: float = 1.0,
               latent_size: tuple[int, int] | None = None, labels: list[int] | None = None,
               progress: Callable = lambda steps: steps) -> Tensor:
        """Latents z (n, C, h, w) of the images numbered `indices`; each is a function of (seed, index) alone.

        latent_size draws a larger noise map with the same network: convolutional sampling (INFD, Section D).
        labels are one class per image (default: drawn from seed and index); progress wraps the iterable of denoising
        steps (tqdm, say). Raises ValueError for an autoencoder checkpoint.
        """
        if self.unet is None:
            raise ValueError(NEEDS_LDM)
        device = next(self.unet.parameters()).device
        shape = (self.latent_shape[0], *(latent_size or self.latent_shape[1:]))

        def noise(*key) -> Tensor:                                           # per image: batch size plays no part
            return torch.stack([torch_noise(shape, seed, *key, i) for i in indices]).to(device)

        y = self.labels(indices, seed, labels, device)
        walk = self.diffusion.ddim_loop(self.unet, noise("x_T"), steps, eta, lambda k: noise("ddim", k), y)
        for x_t, _ in progress(walk):                                        # (n, C, h, w)
            pass
        return self.scale.inverse(x_t)

    @torch.no_grad()
    def render(self, z: Tensor, res: int | tuple[int, int], **options) -> Tensor:
        """Latents z (n, C, h, w) -> pictures (n, 3, H, W); options as in `clif.render_tiles`."""
        return self.autoencoder.render(self.autoencoder.decode(z), res, **{"tile": self.patch, **options})

    def labels(self, indices: list[int], seed: int, labels: list[int] | None, device) -> Tensor | None:
        """Class labels (n,): those given, else uniform draws from (seed, index); None where there are no classes."""
        n = self.unet.cfg.num_classes
        if not n:
            return None
        drawn = labels or [int(rng(seed, "label", i).integers(n)) for i in indices]
        return torch.tensor(drawn, device=device)


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(path: str | Path, device: torch.device | str = "cpu", raw: bool = False) -> INFD:
    """Rebuild a model from a checkpoint of train.py (a file or its run folder) or from a published INFD file.

    raw takes the trained weights where the checkpoint also has their moving average (the default).
    Raises FileNotFoundError, or ValueError naming what does not fit.
    """
    path = Path(path)
    path, ckpt = newest_checkpoint(path) if path.is_dir() else (path, read_checkpoint(path))
    if "stage" in ckpt:
        if ckpt["stage"] not in ("ae", "ldm"):
            raise ValueError(f"{path} is a checkpoint of stage {ckpt['stage']}; expected ae or ldm")
        return dataclasses.replace(from_checkpoint(ckpt, raw), file=path).to(device)
    model = ckpt.get("model")
    if isinstance(model, dict) and {"name", "args", "sd"} <= set(model):
        return dataclasses.replace(from_published(model, raw), file=path).to(device)
    raise ValueError(f"{path} is neither a checkpoint of train.py nor a published INFD file "
                     f"(its keys: {', '.join(map(str, list(ckpt)[:8]))})")


def from_checkpoint(ckpt: dict, raw: bool = False) -> INFD:
    """The model of one of our own checkpoints."""
    config, state = ckpt["config"], ckpt["state"]
    weights = state["model"] if raw or "ema" not in state else state["ema"]
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
                classes=tuple(ckpt.get("classes", ())), step=ckpt["step"],
                weights="EMA" if weights is not state["model"] else "trained weights")


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


# ---- pictures --------------------------------------------------------------------------------------------------------


def to_uint8(rgb: Tensor) -> np.ndarray:
    """(3, h, w) in [-1, 1] -> (h, w, 3) uint8; truncates like the published sampler (torchvision's ToPILImage)."""
    return ((rgb.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).movedim(0, -1).cpu().numpy()


def draw(renderer: nn.Module, phi: Tensor, res: tuple[int, int], tile: int, window=None,
         norm: str = "paper") -> np.ndarray:
    """Pixels (B, H, W, 3) uint8 of the fields phi (B, C, h, w), tile by tile: memory holds bytes, not floats."""
    out = np.empty((len(phi), *res, 3), np.uint8)
    for y, x, rgb in render_tiles(renderer, phi, res, window, tile, norm):
        h, w = rgb.shape[-2:]
        for b in range(len(phi)):
            out[b, y:y + h, x:x + w] = to_uint8(rgb[b])
    return out


def write_png(path: Path, pixels: np.ndarray, info: dict) -> None:
    """Write a PNG that says how it was made (tEXt chunk `parameters`, JSON); renamed into place when complete."""
    meta = PngImagePlugin.PngInfo()
    meta.add_text("parameters", json.dumps(info))
    part = path.with_name(path.name + ".part")
    Image.fromarray(pixels).save(part, format="PNG", pnginfo=meta)
    part.rename(path)


def already_drawn(path: Path, info: dict) -> bool:
    """Whether `path` holds this very picture. Raises FileExistsError where it holds anything else."""
    if not path.exists():
        return False
    try:
        with Image.open(path, formats=("PNG",)) as image:
            same = json.loads(image.info.get("parameters", "null")) == info
    except (OSError, ValueError):
        same = False
    if not same:
        raise FileExistsError(f"{path} exists and is another picture; choose another --out")
    return True


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
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def newest_run() -> Path:
    """The run folder of stage ldm that was written last, for a sample.py without --ckpt."""
    files = sorted(Path("runs").glob("*/ldm/step-*.pt"), key=lambda p: p.stat().st_mtime)
    if not files:
        raise FileNotFoundError("no --ckpt given and no trained model in runs/*/ldm; train a small one with: "
                                "python train.py --stage ae --preset tiny && python train.py --stage ldm --preset tiny")
    return files[-1].parent


def new_folder() -> Path:
    """samples/0001, samples/0002, ...: without --out every call gets a folder of its own."""
    taken = [int(p.name) for p in Path("samples").glob("*") if p.name.isdigit()]
    return Path("samples") / f"{max(taken, default=0) + 1:04d}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="Draw images as functions: one latent, any resolution, any window.")
    p.add_argument("--ckpt", help="run folder or checkpoint file (default: the newest runs/*/ldm)")
    p.add_argument("--n", type=int, default=1, help="number of images")
    p.add_argument("--res", default="", help="512, or 512x1024 (height x width), or several: 256,512,1024")
    p.add_argument("--window", help="y0,x0,y1,x1 in [-1, 1]: draw this part of the image at --res")
    p.add_argument("--steps", type=int, default=200, help="DDIM steps")
    p.add_argument("--eta", type=float, default=1.0, help="DDIM noise: 0 deterministic, 1 as published")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--start", type=int, default=0, help="index of the first image")
    p.add_argument("--label", help="class, by name or number (default: drawn per image)")
    p.add_argument("--batch", type=int, default=4, help="images denoised together; does not change them")
    p.add_argument("--latent-size", help="side(s) of a larger noise map: convolutional sampling (Section D)")
    p.add_argument("--norm", default="paper", help="GroupNorm statistics of the renderer: paper (per tile) or global")
    p.add_argument("--tile", type=int, help="tile side in pixels (default: the training patch)")
    p.add_argument("--raw", action="store_true", help="the trained weights instead of their moving average")
    p.add_argument("--device", default="auto")
    p.add_argument("--out", help="folder (default: a new one under samples/)")
    p.add_argument("--fid", metavar="REFERENCE", help="score the samples against this folder, zip or statistics file")
    p.add_argument("--features", default="inception", choices=["inception", "squeeze"], help="of --fid; see metrics.py")
    return p


def pick_label(model: INFD, text: str | None) -> int | None:
    """A class given by name or number."""
    if text is None:
        return None
    n = model.unet.cfg.num_classes if model.unet else 0
    label = model.classes.index(text) if text in model.classes else int(text) if text.isdigit() else -1
    if not 0 <= label < n:
        has = ", ".join(model.classes) if n else "no classes: leave --label out"
        raise ValueError(f"--label {text}: this model has {has}")
    return label


def run(args: argparse.Namespace) -> None:
    """Draw what the command line asks for. Raises ValueError, FileNotFoundError, FileExistsError before any work."""
    if min(args.n, args.batch, args.steps) < 1 or args.start < 0:
        raise ValueError("--n, --batch and --steps must be at least 1, --start at least 0")
    window = parse_window(args.window) if args.window else None
    sizes = [parse_size(s) for s in args.res.split(",")] if args.res else []
    device, path = pick_device(args.device), Path(args.ckpt) if args.ckpt else newest_run()
    model = load(path, device, args.raw)
    if model.unet is None:
        raise ValueError(NEEDS_LDM)
    latent = parse_size(args.latent_size) if args.latent_size else None
    if args.fid and len(sizes) > 1:
        raise ValueError("--fid compares pictures of one size; give --res one size")
    network = metrics.load_features(args.features).to(device) if args.fid else None      # fail before the work
    if not sizes:                                                            # the pixels that the latent stands for
        sizes = [tuple(side * model.autoencoder.cfg.f for side in latent or model.latent_shape[1:])]
    label, out = pick_label(model, args.label), Path(args.out) if args.out else new_folder()
    common = {"ckpt": model.file.name, "sha256": file_hash(model.file), "weights": model.weights, "seed": args.seed,
              "steps": args.steps, "eta": args.eta, "window": window, "norm": args.norm,
              "tile": args.tile or model.patch, "latent_size": latent, "label": args.label}
    jobs = {i: {size: out / f"seed{args.seed}-{i:06d}-{size[0]}x{size[1]}.png" for size in sizes}
            for i in range(args.start, args.start + args.n)}
    info = lambda i, size: json.loads(json.dumps({**common, "index": i, "res": size}))
    todo = [i for i, files in jobs.items() if not all([already_drawn(p, info(i, s)) for s, p in files.items()])]
    out.mkdir(parents=True, exist_ok=True)
    for at in range(0, len(todo), args.batch):
        part = todo[at:at + args.batch]
        bar = functools.partial(tqdm, total=args.steps, desc=f"images {part[0]}..{part[-1]}", leave=False, disable=None)
        labels = None if label is None else [label] * len(part)
        z = model.sample(part, args.seed, args.steps, args.eta, latent, labels, bar)
        for b, i in enumerate(part):
            phi = model.autoencoder.decode(z[b:b + 1])                       # decoded once, drawn at every size
            for size in sizes:
                pixels = draw(model.autoencoder.renderer, phi, size, common["tile"], window, args.norm)[0]
                write_png(jobs[i][size], pixels, info(i, size))
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
    """The exit code: 0, or 2 after one line on what is wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for i, arg in enumerate(argv[:-1]):
        if arg == "--window":                                                # argparse takes "-1,..." for an option
            argv[i:i + 2] = [f"--window={argv[i + 1]}"]
    args = parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
