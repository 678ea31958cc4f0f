"""Draw pictures from a checkpoint at any resolution: the program, and the files that it writes.

Latents or functions of models.py become tiles, tiles rows of pixels, rows a PNG: memory does not
grow with the picture. A picture is a function of (seed, index), and its file says how it was made.
"""
from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from clif import Tiles, check_frame
from data import to_uint8
from models import SAMPLERS, INFD, OneStep, export, load, sampling
from runs import cli, compiled, nearest, pick_device, wants_compile


# ---- Picture files ----

def draw_bands(tiles: Tiles, width: int) -> Iterator[np.ndarray]:
    """Turn the tiles of one picture into its pixels (h, W, 3) uint8, one row of tiles at a time."""
    for _, x, rgb in tiles:
        pixels = to_uint8(rgb[0])                                    # (h, w, 3)
        if x == 0:
            band = np.empty((len(pixels), width, 3), np.uint8)
        band[:, x:x + pixels.shape[1]] = pixels
        if x + pixels.shape[1] == width:
            yield band


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Make a chunk of a PNG file: length, kind (4 bytes), data, CRC-32 of both."""
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png_head(size: tuple[int, int], info: dict) -> bytes:
    """Make all of a PNG before its pixels; the text `parameters` says in JSON how it was made."""
    ihdr = struct.pack(">2I5B", size[1], size[0], 8, 2, 0, 0, 0)     # 8 bits, RGB, not interlaced
    text = b"parameters\0" + json.dumps(info).encode("ascii")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", ihdr) + png_chunk(b"tEXt", text)


def write_png(path: Path, size: tuple[int, int], info: dict, bands: Iterable[np.ndarray]) -> None:
    """Write a PNG of `size` (H, W) from bands of rows (h, W, 3) uint8, top to bottom.

    Memory holds one band. The file has its name once it is whole. info: see `png_head`.
    """
    part = path.with_name(path.name + ".part")
    above = np.zeros((1, 3 * size[1]), np.uint8)
    deflate = zlib.compressobj()
    try:
        with open(part, "wb") as file:
            file.write(png_head(size, info))
            for band in bands:
                rows = band.reshape(len(band), -1)                   # (h, 3 W)
                up = rows - np.concatenate([above, rows[:-1]])       # modulo 256, as PNG has it
                raw = np.insert(up, 0, 2, axis=1)                    # filter 2: less the row above
                file.write(png_chunk(b"IDAT", deflate.compress(raw.tobytes())))
                above = rows[-1:]
            file.write(png_chunk(b"IDAT", deflate.flush()) + png_chunk(b"IEND", b""))
        part.rename(path)
    except OSError as error:                                         # a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def already_drawn(path: Path, size: tuple[int, int], info: dict) -> bool:
    """Say whether a file holds this very picture; FileExistsError where it holds anything else."""
    if not path.exists():
        return False
    head = png_head(size, info)
    with open(path, "rb") as file:
        if file.read(len(head)) != head:
            raise FileExistsError(f"{path} exists and is another picture; choose another --out")
    return True


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], side: int, gap: int = 4) -> np.ndarray:
    """Put pictures (h, w, 3) in rows on white, each in a cell of `side` pixels, gaps between.

    They are enlarged to their cell by nearest neighbour, so that pixels stay visible.
    """
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (side + gap), columns * (side + gap), 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, pixels in enumerate(row):
            scale = side / max(pixels.shape[:2])
            height, width = (max(1, round(scale * n)) for n in pixels.shape[:2])
            image = Image.fromarray(pixels).resize((width, height), Image.NEAREST)
            y = r * (side + gap)
            x = c * (side + gap)
            sheet[y:y + height, x:x + width] = np.asarray(image)
    return sheet[:-gap, :-gap]


SHEET = 8192                                # pixels: about the side of a sheet at most


def write_sheet(path: Path, files: Sequence[Path]) -> None:
    """Put picture files on one sheet, nearly square; large ones are reduced so that it fits."""
    columns = math.ceil(math.sqrt(len(files)))
    cell = (SHEET // columns, SHEET // columns)
    pictures = []
    for file in files:
        with Image.open(file) as image:
            image.thumbnail(cell)                                    # never enlarges
            pictures.append(np.asarray(image))
    side = max(max(pixels.shape) for pixels in pictures)
    rows = [pictures[at:at + columns] for at in range(0, len(pictures), columns)]
    part = path.with_name(f"part-{path.name}")                       # the suffix says the format
    try:
        Image.fromarray(contact_sheet(rows, side)).save(part, quality=92)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


# ---- Command line ----

def parse_size(text: str) -> tuple[int, int]:
    """'512' -> (512, 512), '512x1024' -> (512, 1024), height first."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(s.isdecimal() and 1 <= int(s) <= 2**20 for s in sides):
        raise argparse.ArgumentTypeError(f"cannot read the size {text!r}; write 512, or 512x1024 "
                                         f"(height x width), at least 1")
    return int(sides[0]), int(sides[-1])


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """'256,512x1024' -> [(256, 256), (512, 1024)]."""
    return [parse_size(part) for part in text.split(",")]


def parse_numbers(text: str) -> tuple[float, ...]:
    """'4.0,0.8' -> (4.0, 0.8)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; write 4,0.8") from None


# What earlier versions had -> where it went.
GONE = {"--fid": "draw into a folder, then: python metrics.py fid FOLDER REFERENCE",
        "--features": "it is an option of metrics.py",
        "--compare-samplers": "its table is in docs/results.md",
        "--bench": "python experiments.py bench sample",
        "--sampler heun": "dpm++ is as good in half the network calls (docs/results.md)",
        "--norm global": "--norm frame, the default, has the statistics of the whole picture"}


class Parser(argparse.ArgumentParser):
    """Reads the command line, and says in one line what is wrong with it."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def parser() -> Parser:
    """Describe the command line."""
    p = Parser(usage="python sample.py [--ckpt RUN] [-n N] [--res SIZES] [OPTION ...]",
               description="Draw images as functions: any resolution, any window.",
               allow_abbrev=False, formatter_class=functools.partial(
                   argparse.HelpFormatter, width=100, max_help_position=26))
    add = p.add_argument_group("the model").add_argument
    add("--ckpt", metavar="RUN", help="run folder or checkpoint file (the bundled weights)")
    add("--model", choices=["infd", "cm"], default="infd", help="which bundled weights (infd)")
    add("--raw", action="store_true", help="the trained weights instead of their moving average")
    add("--export", metavar="FILE", help="write the model in half precision; draw nothing")

    add = p.add_argument_group("the pictures").add_argument
    add("-n", "--n", type=int, default=1, metavar="N", help="how many (1); -n after torchrun")
    add("--start", type=int, default=0, metavar="I", help="number of the first image (0)")
    add("--seed", type=int, default=0, help="a picture depends on seed and number alone (0)")
    add("--label", help="class, by name or number (drawn per image)")
    add("--res", type=parse_sizes, metavar="SIZES",
        help="512 or several, 256,512,1024; 256x512 (height x width) stretches the image")
    add("--window", type=parse_numbers, metavar="y0,x0,y1,x1",
        help="draw this part of the plane, -1,-1,1,1, at --res")
    add("--steps", type=int, metavar="N", help="of INFD's sampler; CM: network calls, 1 or 2 (1)")
    add("--out", metavar="FOLDER", help="(a new one under samples/); nothing is ever overwritten")
    add("--sheet", metavar="FILE", help="all pictures on one sheet, too: .png or .jpg")
    add("--batch", type=int, default=4, metavar="N", help="images made together (4)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (auto)")

    add = p.add_argument_group("INFD only").add_argument
    steps = ", ".join(f"{name} in {n} steps" for name, n in SAMPLERS.items())
    add("--sampler", metavar="NAME", help=f"{steps} (ddim)")
    add("--eta", type=float, help="noise that ddim adds: 0 none, 1 as published (1)")
    add("--latent-size", type=parse_size, metavar="SIZE",
        help="a larger noise map, as 32x64: another aspect without stretching (Section D)")
    add("--norm", help="statistics of the renderer: frame, or paper, those of each tile (frame)")
    add("--tile", type=int, help="side of a tile in pixels (the training patch)")
    add("--compile", metavar="WHEN", help="the renderer: on, off, or auto, on a CUDA GPU (auto)")

    add = p.add_argument_group("CM only").add_argument
    add("--func-dtype", choices=["float32", "bfloat16"], help="of the function's later layers")
    add("--sigmas", type=parse_numbers, metavar="LEVELS",
        help="noise levels of further steps, as 4.0,0.8; at the training size only")
    return p


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; ValueError for what it cannot mean."""
    words = list(argv)
    for i, word in enumerate(argv):
        for gone in (word.partition("=")[0], word.replace("=", " "), " ".join(argv[i:i + 2])):
            if gone in GONE:
                raise ValueError(f"{gone} is gone: {GONE[gone]}")
        if word == "--window" and i + 1 < len(argv):                 # "-1,..." looks like an option
            words[i:i + 2] = [f"--window={argv[i + 1]}"]
    p = parser()
    args, unknown = p.parse_known_args(words)
    if unknown:
        name = "--" + unknown[0].partition("=")[0].lstrip("-")
        raise ValueError(f"unknown option {unknown[0]}{nearest(name, p._option_string_actions)}")
    for name, least in (("n", 1), ("batch", 1), ("steps", 1), ("tile", 1), ("start", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
    if args.window and len(args.window) != 4:
        raise ValueError("--window takes four numbers, y0,x0,y1,x1; the whole is -1,-1,1,1")
    if args.norm not in (None, "frame", "paper"):
        raise ValueError(f"--norm {args.norm}: choose frame or paper")
    return args


# What draws a model's pictures: how they are made, at which sizes, and a function that makes some:
# the numbers of images -> each with a function (size, window) -> its tiles.
Images = Iterator[tuple[int, Callable[..., Tiles]]]
Painter = tuple[dict, list[tuple[int, int]], Callable[[list[int]], Images]]


def refuse(args: argparse.Namespace, model: str, *names: str) -> None:
    """Raise ValueError for options of the other kind of model."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} means nothing to this checkpoint, which is {model}")


def infd_painter(model: INFD, args: argparse.Namespace) -> Painter:
    """Make one latent per image, decode it once, and draw it at every size."""
    refuse(args, "an INFD model", "sigmas", "func_dtype")
    how = sampling(args.sampler or "ddim", args.steps, args.eta)
    latent = args.latent_size or model.latent_shape[1:]
    renderer = model.autoencoder.renderer
    if wants_compile(args.compile or "auto", model.scale.mean.device):
        renderer = compiled(renderer, strict=args.compile == "on")

    def paint(part: list[int]) -> Images:
        bar = functools.partial(tqdm, total=how["steps"], leave=False, disable=None,
                                desc=f"images {part[0]} to {part[-1]}")
        z = model.sample(part, args.seed, latent_size=latent, labels=args.label, progress=bar,
                         **how)
        for b, i in enumerate(part):
            field = model.decode(z[b:b + 1], args.norm == "paper", args.tile)
            yield i, replace(field, renderer=renderer).tiles

    described = {**how, "norm": args.norm or "frame"}
    if args.norm == "paper":                                         # else it does not change them
        described["tile"] = model.patch if args.tile is None else args.tile
    described["latent_size"] = args.latent_size
    return described, args.res or [tuple(model.autoencoder.cfg.f * n for n in latent)], paint


def onestep_painter(model: OneStep, args: argparse.Namespace) -> Painter:
    """Make functions and draw them at every size, or pixels at the training size."""
    refuse(args, "a one-step model", "sampler", "eta", "latent_size", "norm", "tile", "compile")
    own = [(model.size, model.size)]
    sigmas = args.sigmas or ()
    if args.steps == 2 and not sigmas and model.second:
        sigmas = (model.second,)
    model.levels(sigmas)
    if args.steps not in (None, 1 + len(sigmas)):
        raise ValueError(f"--steps {args.steps}: name the noise levels of the further steps, as in "
                         f"--sigmas 4.0,0.8")
    free = hasattr(model.f.net, "function") and not sigmas
    if not free and (args.window or args.func_dtype or (args.res or own) != own):
        raise ValueError(f"only one step of generator=func can be drawn at any size and window, "
                         f"and by --func-dtype; this draws --res {model.size} and the whole image")
    dtype = getattr(torch, args.func_dtype or "float32")

    def paint(part: list[int]) -> Images:
        if free:
            functions = model.functions(part, args.seed, args.label)
            for b, i in enumerate(part):
                yield i, functools.partial(functions[b].tiles, dtype=dtype)
        else:
            for i, image in zip(part, model.sample(part, args.seed, sigmas, args.label)):
                yield i, functools.partial(one_tile, image)

    described = {"steps": 1 + len(sigmas), "sigmas": sigmas}
    if dtype != torch.float32:
        described["func_dtype"] = args.func_dtype
    return described, args.res or own, paint


def one_tile(image: torch.Tensor, size: tuple[int, int], window: object) -> Tiles:
    """Give a picture (3, S, S) that is there already as a single tile."""
    yield 0, 0, image[None]


def file_hash(path: Path) -> str:
    """Give the first 16 hex digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


def new_folder() -> Path:
    """Name samples/0001, samples/0002, ...: without --out every call has a folder of its own."""
    taken = [int(p.name) for p in Path("samples").glob("*") if p.name.isdecimal()]
    return Path("samples") / f"{max(taken, default=0) + 1:04d}"


def bundled(name: str) -> Path:
    """Say where the weights are that come with the project."""
    return Path(__file__).parent / "weights" / f"{name}.pt"


def make_folder(folder: Path) -> None:
    """Make a folder that can be written to, before any work; else an OSError says why not."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; pictures need a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder}: no permission to write there")


def check_sheet(file: Path, sizes: list[tuple[int, int]]) -> None:
    """Raise ValueError or OSError before any work where pictures cannot go onto this sheet."""
    if file.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--sheet {file}: name a .png or .jpg file")
    if file.exists():
        raise FileExistsError(f"--sheet {file} exists; choose another file")
    if any(max(size) > SHEET for size in sizes):
        raise ValueError(f"--sheet takes pictures of up to {SHEET} pixels a side")
    make_folder(file.parent)


def run(argv: list[str]) -> None:
    """Draw what the command line asks for. Raises ValueError and OSError before any work."""
    args = parse(argv)
    path = Path(args.ckpt) if args.ckpt else bundled(args.model)
    if args.export:
        return export(path, Path(args.export))
    rank = int(os.environ.get("RANK", 0))                            # torchrun: each has its share
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and (not args.out or args.sheet):
        raise ValueError("under torchrun give --out, which all processes share, and no --sheet")

    model = load(path, pick_device(args.device), args.raw)
    model.labels([], args.seed, args.label)
    painter = infd_painter if isinstance(model, INFD) else onestep_painter
    described, sizes, paint = painter(model, args)
    for size in sizes:
        check_frame(size, args.window)

    if args.sheet:
        check_sheet(Path(args.sheet), sizes)
    out = Path(args.out) if args.out else new_folder()
    make_folder(out)
    common = {"ckpt": model.file.name, "sha256": file_hash(model.file), "weights": model.weights,
              "seed": args.seed, "window": args.window, "label": args.label, **described}
    files = {}
    todo = []
    for i in range(args.start, args.start + args.n):
        for size in sizes:
            files[i, size] = out / f"seed{args.seed}-{i:06d}-{size[0]}x{size[1]}.png"
        done = [already_drawn(files[i, size], size, {**common, "index": i, "res": size})
                for size in sizes]
        if not all(done) and i % world == rank:
            todo.append(i)

    for at in range(0, len(todo), args.batch):
        for i, tiles in paint(todo[at:at + args.batch]):
            for size in sizes:
                if not files[i, size].exists():                      # one that is there is the same
                    bands = draw_bands(tiles(size, args.window), size[1])
                    write_png(files[i, size], size, {**common, "index": i, "res": size}, bands)
    if args.sheet:
        write_sheet(Path(args.sheet), list(files.values()))
    if rank == 0:
        print(f"{len(files)} pictures ({model.weights}, step {model.step}) in {out}")


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 2 after one line on what is wrong, 1 without memory, 143 or 130 stopped."""
    return cli(run, sys.argv[1:] if argv is None else argv,
               stopped="stopped; the same command with the same --out draws what is missing",
               memory="take a smaller --tile (INFD), --batch or --res")


if __name__ == "__main__":
    sys.exit(main())
