"""Draw pictures at any resolution: the program. From Python: models.py, then pictures.py."""
from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from clif import WHOLE_PLANE, Window, check_frame
from commandline import Parser
from conditions import LED, SHIFTED, SHIFTED_LATENT, paired, read_given
from models import INFD, SAMPLERS, OneStep, draw_labels, export, load, named
from pictures import (SHEET, Drawing, check_new, dive, png_head, read_picture, whole, write_html,
                      write_movie, write_png, write_sheet)
from runs import cli, pick_device
from text import CLIPTokenizer
from viewer import about, serve


MOVIE = 2**32                               # bytes of frames: Pillow takes them all at once


def read_size(text: str) -> tuple[int, int]:
    """'512' -> (512, 512), '512x1024' -> (512, 1024), height first."""
    sides = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; write 512, or 512x1024")
    return int(sides[1]), int(sides[2] or sides[1])


def read_sizes(text: str) -> list[tuple[int, int]]:
    """'256,512x1024' -> [(256, 256), (512, 1024)]."""
    return [read_size(part) for part in text.split(",")]


def numbers(text: str) -> tuple[float, ...]:
    """'4.0,0.8' -> (4.0, 0.8)."""
    return tuple(float(part) for part in text.split(","))


def add_conditions(p: Parser) -> None:
    """Describe the options of conditions.py."""
    add = p.later("given", "conditions").add_argument
    add("--given", action="append", metavar="FILE",
        help="a picture to look like, where the --at behind it says; its alpha is a mask")
    add("--step-size", type=float, metavar="W",
        help=f"how firmly; too firm looks overdone (INFD {LED:g}, in one step {SHIFTED_LATENT:g}, "
             f"CM {SHIFTED:g})")
    add("--prompt-at", nargs=2, action="append", metavar=("TEXT", "y0,x0,y1,x1"),
        help="what to draw in a part of the plane; may be repeated, the later on top")


def parser() -> Parser:
    """Describe the command line."""
    p = Parser(usage="python sample.py [--ckpt RUN] [-n N] [--res SIZES] [OPTION ...]",
               description="Draw images as functions: any resolution, any window.")
    p._negative_number_matcher = re.compile(r"-[\d.]")               # --window -1,-1,0,0
    add = p.add_argument_group("the model").add_argument
    add("--ckpt", metavar="RUN", help="run folder or checkpoint file (the bundled weights)")
    add("--model", choices=["infd", "cm"], help="which bundled weights (infd)")
    add("--raw", action="store_true", help="the trained weights instead of their moving average")
    add("--export", metavar="FILE", help="write the model in half precision; draw nothing")

    add = p.add_argument_group("the pictures").add_argument
    add("-n", "--n", type=int, help="how many (1, or one a prompt); -n after torchrun")
    add("--start", type=int, default=0, metavar="I", help="number of the first image (0)")
    add("--seed", type=int, default=0, help="a picture depends on seed and number alone (0)")
    add("--image", metavar="FILE", help="draw a picture of yours, by an autoencoder, at any size")
    add("--label", help="class, by name or number (drawn per image)")
    add("--res", type=read_sizes, metavar="SIZES",
        help="512, or 256,512; 256x512 (height x width) stretches: see --latent-size, --window")
    add("--window", type=numbers, metavar="y0,x0,y1,x1", help="a part of -1,-1,1,1, at --res")
    add("--out", metavar="PATH", help="(a new folder under samples/); nothing is ever overwritten")
    add("--sheet", metavar="FILE", help="all pictures on one sheet, too: .png or .jpg")
    add("--batch", type=int, default=4, help="images made together (4)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (auto)")

    add = p.later("view", "more than still pictures").add_argument
    add("--view", action="store_true", help="walk through pictures in a browser on this machine")
    add("--port", type=int, help="of --view; 0: any that is free (8000)")
    add("--html", metavar="FILE", help="CM: a page that is the picture, drawn by WebGL at any size")
    add("--zoom", type=float, metavar="Z", help="dive Z times closer, into --out FILE.webp or .png")
    add("--at", type=numbers, dest="given", action="append", metavar="y,x",
        help="where to dive (0,0); y0,x0,y1,x1: where the --given before it lies (the whole)")
    add("--morph", type=int, metavar="N", help="walk through N pictures and back, into --out FILE")
    add("--frames", type=int, help="of --zoom and --morph, 30 a second (90)")

    add_conditions(p)
    add = p.later("infd", "INFD").add_argument
    add("--sampler", choices=SAMPLERS, help="(dpm++; published files: ddim; one-step models: cm)")
    add("--steps", type=int, help="of the sampler (dpm++ 20, ddim 200, Stable Diffusion 50, cm 2); "
                                  "1 or 2 without --ckpt and --sampler: the one-step INFD")
    add("--eta", type=float, help="fresh noise in each step, 0 to 1 (dpm++ 1; ddim 1, of text 0)")
    add("--latent-size", type=read_size, help="a larger noise map, as 32x64 (Section D)")
    add("--decoder", metavar="RUN", help="draw by this run of stage ae init=CKPT")
    add("--norm", choices=["frame", "paper"], help="statistics of the whole, or each tile (frame)")
    add("--tile", type=int, help="side of a tile in pixels (256, GPU 512; paper: patch)")
    add("--compile", metavar="WHEN", help="the drawing: on, off, or auto, on a CUDA GPU (auto)")

    add = p.later("text", "text to image").add_argument
    add("--prompt", action="append", metavar="TEXT", help="what to draw; several: image by image")
    add("--prompts", metavar="FILE", help="prompts, one a line")
    add("--negative", metavar="TEXT", help="what to lead away from (the empty text)")
    add("--guidance", type=float, metavar="W",
        help="1: none; more follows the prompt closer (2; Stable Diffusion 7.5)")
    add("--merges", metavar="FILE", help="CLIP's tokenizer, if not beside the checkpoint")

    add = p.later("cm", "CM-Func").add_argument
    add("--func-dtype", choices=["float32", "bfloat16"], help="of the function's later layers")
    add("--sigmas", type=numbers, help="noise of further steps, as 0.821 (iCT, ECT), 4 (LSUN)")
    return p


# The options of other kinds of models.
FOREIGN = {"INFD with text": ("sigmas", "func-dtype", "html"),
           "INFD without text": ("sigmas", "func-dtype", "html", "negative", "merges",
                                 "prompt-at"),
           "CM": ("sampler", "steps", "eta", "latent-size", "decoder", "norm", "tile",
                  "compile", "prompt", "negative", "guidance", "merges", "prompt-at")}


def warn(line: str) -> None:
    """Say on the terminal what of a prompt the model does not read; the viewer's page says it."""
    print(f"warning: {line}", file=sys.stderr)


def check_kind(model: INFD | OneStep, args: argparse.Namespace, say: Callable) -> None:
    """Raise ValueError where options belong to another kind of model, and say what is not read."""
    kind = "CM"
    if isinstance(model, INFD):
        reads = model.text is not None
        kind = "INFD with text" if reads else "INFD without text"
        model.check_condition(args.label, args.prompt, args.guidance,
                              negative=args.negative or "" if reads else "")
    given = [f"--{name}" for name in FOREIGN[kind]
             if getattr(args, name.replace("-", "_")) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} means nothing to a model of the kind {kind} (--help)")
    if args.merges and not isinstance(model.tokenizer, CLIPTokenizer):
        raise ValueError("--merges is of CLIP's tokenizer, and this model has its own words")
    placed = [text for text, _ in args.prompt_at or []]
    for prompt in [*(args.prompt or []), *placed, args.negative or ""]:
        remark = model.tokenizer.remark(prompt) if prompt else ""
        if remark:
            say(f'prompt "{prompt[:60]}": {remark}')


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


def centre_of_dive(args: argparse.Namespace) -> tuple[float, ...]:
    """Take the --at y,x of --zoom from among those of --given, which have four numbers."""
    for item in args.given or []:
        if args.zoom is not None and isinstance(item, tuple) and len(item) == 2:
            args.given = [other for other in args.given if other is not item] or None
            return item
    return (0.0, 0.0)


def window_of(text: str) -> tuple[float, ...]:
    """The window behind the TEXT of --prompt-at."""
    try:
        return numbers(text)
    except ValueError as error:
        raise ValueError(f"--prompt-at TEXT {text}: the place is y0,x0,y1,x1") from error


def conditions_of(args: argparse.Namespace, step_size: float) -> tuple[dict, dict]:
    """What --given and --prompt-at ask of a model of this step size, and what PNGs say of that."""
    how = {}
    made = {}
    if args.step_size is not None and not args.given:
        raise ValueError("--step-size is that of --given: give a picture")
    if args.given:
        given = paired(args.given)
        how["conditions"] = [read_given(file, window) for file, window in given]
        how["step_size"] = step_size if args.step_size is None else args.step_size
        made["given"] = [(Path(file).name, digest(Path(file)), at) for file, at in given]
        made["step_size"] = how["step_size"]
        args.batch = 1                       # no rounding of a batch grows from step to step
    if args.prompt_at:
        how["regions"] = [(text, check_frame(1, window_of(at))[1]) for text, at in args.prompt_at]
        made["prompt_at"] = args.prompt_at
    return how, made


def infd_pictures(model: INFD, args: argparse.Namespace,
                  bar: Callable = tqdm) -> tuple[dict, list, Callable]:
    """(made, sizes, draw): what PNGs say of how they were made, the sizes asked for, and
    draw(indices), which samples these pictures and yields (index, Drawing) of each.
    """
    how = model.settings(args.sampler, args.steps, args.eta, bool(args.given))
    if model.text is not None:
        how["negative"] = args.negative or ""
    if model.text is not None or args.guidance is not None:
        how["guidance"] = model.guidance if args.guidance is None else args.guidance
    lead, led = conditions_of(args, model.step_size)
    latent = args.latent_size or model.latent_shape[1:]
    if how["sampler"] == "cm" and model.text is not None and args.given and args.prompt is None:
        args.prompt = fitting_prompts(model, args, lead["conditions"], latent)
    paper = args.norm == "paper"
    model.compile(args.compile or ("off" if args.given else "auto"))
    sizes = args.res or [tuple(model.autoencoder.cfg.f * n for n in latent)]

    def draw(indices: list[int]) -> Iterator[tuple[int, Drawing]]:
        z = model.sample(indices, args.seed, latent_size=latent, labels=args.label,
                         prompts=args.prompt, bar=bar, **how, **lead)
        for i, one in zip(indices, z.split(1)):
            yield i, model.decode(one, paper, args.tile).tiles

    made = {**how, **drawing_of(model, args), "latent_size": args.latent_size}
    return made | led, sizes, draw


def fitting_prompts(model: INFD, args: argparse.Namespace, conditions: list,
                    latent: tuple[int, int]) -> list[str]:
    """A caption for each picture, which its PNG says; that of i at i modulo their number, where
    `INFD.prompt_of` looks.
    """
    found = {i % args.n: model.fitting_captions([i], args.seed, conditions, latent)[0]
             for i in range(args.start, args.start + args.n)}
    return [found[k] for k in range(args.n)]


def drawing_of(model: INFD, args: argparse.Namespace) -> dict:
    """What PNGs say of --norm and of --tile, which else changes no picture."""
    paper = args.norm == "paper"
    return {"norm": args.norm or "frame"} | ({"tile": args.tile or model.patch} if paper else {})


def onestep_pictures(model: OneStep, args: argparse.Namespace) -> tuple[dict, list, Callable]:
    """As `infd_pictures`: functions at every size, or pixels at the training size."""
    own = [(model.size, model.size)]
    sizes = args.res or own
    sigmas = args.sigmas or ()
    dtype = args.func_dtype or "float32"
    free = hasattr(model.f.net, "function") and not sigmas
    lead, led = conditions_of(args, SHIFTED)
    if not free and (args.window or args.func_dtype or lead or sizes != own):
        raise ValueError(f"only one step of generator=func can be drawn at any size and window, by "
                         f"--func-dtype and --given; this draws --res {model.size} and the whole")

    def draw(indices: list[int]) -> Iterator[tuple[int, Drawing]]:
        if not free:
            images = model.sample(indices, args.seed, sigmas, args.label)
            for i, image in zip(indices, images.split(1)):
                yield i, lambda *_, image=image: [(0, 0, image)]
            return
        functions = model.functions(indices, args.seed, args.label, **lead)
        for b, i in enumerate(indices):
            yield i, functools.partial(functions[b].tiles, dtype=getattr(torch, dtype))

    made = {"steps": 1 + len(sigmas), "sigmas": sigmas, **led}
    return made | ({} if dtype == "float32" else {"func_dtype": dtype}), sizes, draw


def photo_pictures(model: INFD | OneStep, args: argparse.Namespace) -> tuple[dict, list, Callable]:
    """As `infd_pictures`: the user's own photograph, encoded and drawn by the autoencoder."""
    if not isinstance(model, INFD):
        raise ValueError("--image: a model of stage cm encodes no pictures; give one of INFD")
    own = ("label", "prompt", "sampler", "steps", "eta", "sigmas", "func_dtype", "guidance",
           "html", "morph", "given", "step_size", "decoder", "prompt_at", "negative", "merges")
    given = [f"--{name.replace('_', '-')}" for name in own if getattr(args, name) is not None]
    if given or args.n != 1 or args.start:
        raise ValueError(f"{', '.join(given) or '--n, --start'}: --image draws one picture, yours, "
                         f"and samples nothing")
    latent = args.latent_size or model.latent_shape[1:]
    if latent[0] != latent[1]:
        raise ValueError("--image: its centre square is encoded; give --latent-size one number")
    side = latent[0] * model.autoencoder.cfg.f
    image = read_picture(args.image)
    square = min(image.size)
    finer = f"; --latent-size {2 * latent[0]} keeps finer detail" if square > side else ""
    print(f"{args.image}: its centre square, {square} of {image.width}x{image.height} pixels, "
          f"encoded at {side} px{finer}")
    model.compile(args.compile or "auto")

    def draw(indices: list[int]) -> Iterator[tuple[int, Drawing]]:
        z = model.encode(image, side)
        yield 0, model.decode(z, args.norm == "paper", args.tile).tiles

    made = {"image": Path(args.image).name, "image_sha256": digest(Path(args.image)),
            **drawing_of(model, args), "latent_size": args.latent_size}
    return made, args.res or [(square, square)], draw


def pictures_of(model: INFD | OneStep, args: argparse.Namespace, bar: Callable = tqdm,
                say: Callable = warn) -> tuple[dict, list, Callable]:
    """As `infd_pictures`, for any model; ValueError where it is no model for the options."""
    if args.image:
        return photo_pictures(model, args)
    check_kind(model, args, say)
    if isinstance(model, INFD):
        return infd_pictures(model, args, bar)
    return onestep_pictures(model, args)


def bundled(name: str) -> Path:
    """Say where the weights are that come with the project."""
    return Path(__file__).parent / "weights" / f"{name}.pt"


def digest(file: Path) -> str:
    """Tell a file from others."""
    return hashlib.sha256(np.memmap(file, mode="r")).hexdigest()[:16]


def origin(model: INFD | OneStep, decoder: INFD | None = None) -> dict:
    """Which weights draw, as PNGs say it."""
    made = {"ckpt": model.file.name, "sha256": digest(model.file), "weights": model.weights}
    if decoder is None:
        return made
    return made | {"decoder": decoder.file.name, "decoder_sha256": digest(decoder.file)}


def described(model: INFD | OneStep, args: argparse.Namespace, common: dict, i: int) -> dict:
    """How picture i is made, for its PNG, which adds its size; common: what all share."""
    prompt = {}
    if isinstance(model, INFD) and model.text is not None and not args.image:
        prompts = [""] if args.given and args.prompt is None else args.prompt
        prompt["prompt"] = model.prompt_of(i, args.seed, prompts)
    return {**common, "seed": args.seed, "label": args.label, **prompt, "index": i}


def planned(model: INFD | OneStep, args: argparse.Namespace, common: dict, sizes: list,
            out: Path) -> dict[tuple, tuple[Path, bytes]]:
    """The files of a call by (index, size), and what these PNGs begin with."""
    files = {}
    for i, size in itertools.product(range(args.start, args.start + args.n), sizes):
        name = Path(args.image).stem if args.image else f"seed{args.seed}-{i:06d}"
        file = out / f"{name}-{size[0]}x{size[1]}.png"
        info = {**described(model, args, common, i), "window": args.window, "res": size}
        head = png_head(size, info)
        if file.exists() and file.open("rb").read(len(head)) != head:
            raise FileExistsError(f"{file} exists and is another picture; choose another --out")
        files[i, size] = file, head
    return files


def check_sheet(sheet: Path, files: list[Path], sizes: list[tuple[int, int]]) -> None:
    """ValueError where the sheet of --sheet cannot be written, or is one of the pictures."""
    check_new(sheet, ".png", ".jpg")
    if max(map(max, sizes)) > SHEET:
        raise ValueError(f"--sheet is for pictures of up to {SHEET} pixels a side")
    if sheet.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"--sheet {sheet} is one of the pictures: name another file")


def say_stretched(size: tuple[int, int], window: Window, latent: tuple[int, int]) -> None:
    """Remark where the pixels of a picture are not squares of its plane."""
    y0, x0, y1, x1 = window
    if abs(size[1] * (y1 - y0) * latent[0] / (size[0] * (x1 - x0) * latent[1]) - 1) > 0.02:
        print(f"remark: --res {size[0]}x{size[1]} stretches the picture to that shape; a wider or "
              f"taller one is drawn by --latent-size (INFD), a part of it by --window, as "
              f"-0.5,-1,0.5,1 for twice as wide as high", file=sys.stderr)


def shown(model: INFD | OneStep, args: argparse.Namespace, common: dict, asked: dict,
          bar: Callable, say: Callable) -> tuple[dict, Drawing]:
    """Make a picture for viewer.py, by what is `asked` in place of args; see `viewer.serve`."""
    args = argparse.Namespace(**{**vars(args), **asked})
    if "prompt" in asked:
        args.prompt = [asked["prompt"]] if asked["prompt"] else None
    if isinstance(model, INFD):
        args.compile = "off"                                         # `run` has done it, if asked
    made, _, draw = pictures_of(model, args, bar, say)
    i, drawing = next(draw([args.start]))
    return described(model, args, common | made, i), drawing


def moving(args: argparse.Namespace, size: tuple, draw: Callable) -> Iterator[np.ndarray]:
    """Draw the frames of --zoom, one picture from near and far, or of --morph, there and back."""
    if args.zoom:
        _, drawing = next(draw([args.start]))
        yield from (whole(drawing, size, w) for w in dive(args.zoom, args.at, args.frames))
        return
    there = []
    for i in np.linspace(args.start, args.start + args.morph - 1, args.frames // 2 + 1):
        _, drawing = next(draw([float(i)]))
        there.append(whole(drawing, size, args.window))
        yield there[-1]
    yield from there[-2:0:-1]


def write_moving(model: INFD | OneStep, args: argparse.Namespace, common: dict, size: tuple,
                 draw: Callable) -> None:
    """Write what --zoom or --morph asks for."""
    if not args.out:
        raise ValueError("a moving picture has a name: --out FILE.webp")
    args.frames = 90 if args.frames is None else args.frames
    morph = 2 if args.morph is None else args.morph
    zoom = 2 if args.zoom is None else args.zoom
    if not (2 <= args.frames <= 3000 and args.frames % 2 == 0 and 2 <= morph <= 1000
            and 1 < zoom <= 1e4 and max(map(abs, args.at)) <= 1):
        raise ValueError("--frames is even, 2 to 3000; --morph 2 to 1000; --zoom above 1, up to "
                         "10000; --at y,x within -1 and 1")
    if args.frames * 3 * math.prod(size) > MOVIE:
        raise ValueError(f"{args.frames} frames of {size[1]}x{size[0]} need more than "
                         f"{MOVIE / 2**30:g} GB of memory: take fewer --frames, or a smaller --res")
    info = {**described(model, args, common, args.start), "res": size, "frames": args.frames}
    info |= ({"zoom": args.zoom, "at": args.at} if args.zoom else
             {"morph": args.morph, "window": args.window})
    if args.morph:                                                   # conditions stay
        net = model.unet if isinstance(model, INFD) else model.f.net
        y = draw_labels(net, model.classes, [args.start], args.seed, args.label)
        info["label"] = args.label = None if y is None else named(model.classes, int(y))
        args.prompt = [info["prompt"]] if "prompt" in info else None
    write_movie(Path(args.out), moving(args, size, draw), args.frames, info)
    print(f"{args.frames} frames in {args.out}")


def exhibit(model: INFD | OneStep, args: argparse.Namespace, common: dict, size: tuple,
            draw: Callable) -> None:
    """Serve --view, or write --html or a moving picture."""
    check_frame(size, args.window)
    if args.view:
        port = 8000 if args.port is None else args.port
        serve(functools.partial(shown, model, args, common), about(model, args, size), port)
    elif args.html:
        lead, _ = conditions_of(args, SHIFTED)
        function = model.functions([args.start], args.seed, args.label, **lead)
        write_html(Path(args.html), function, size, described(model, args, common, args.start))
        print(f"a page that draws picture {args.start}: {args.html}")
    else:
        write_moving(model, args, common, size, draw)


def asked_for(path: Path, args: argparse.Namespace) -> tuple[INFD | OneStep, dict]:
    """The model that draws, by the decoder of --decoder, and what PNGs say of these files."""
    device = pick_device(args.device)
    model = load(path, device, args.raw, args.merges)
    decoder = None
    if args.decoder and isinstance(model, INFD):
        decoder = load(args.decoder, device)
        model = model.drawn_by(decoder)
    return model, origin(model, decoder)


def check_alone(args: argparse.Namespace) -> bool:
    """Say whether more than still pictures is asked for; ValueError for options of those alone."""
    asked = [f"--{name}" for name in ("html", "zoom", "morph") if getattr(args, name) is not None]
    asked += ["--view"] if args.view else []
    moves = args.zoom is not None or args.morph is not None
    for name, wanted in (("port", args.view), ("frames", moves)):
        if getattr(args, name) is not None and not wanted:
            raise ValueError(f"--{name} means nothing to still pictures (--help view)")
    if not asked:
        return False
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)}: ask for one at a time")
    still = ["n", "sheet"]
    if args.morph is None:
        still += ["window"]
    if not moves:
        still += ["out"]
    if args.html:
        still += ["sigmas", "func_dtype"]
    for name in still:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: {asked[0]} takes none, it is of still "
                             f"pictures")
    if len(args.res or [0]) > 1:
        raise ValueError(f"{asked[0]} draws at one size: give --res one")
    return True


def check_export(args: argparse.Namespace) -> None:
    """ValueError where --export would leave an option out: it writes the checkpoint as it is."""
    usual = vars(parser().parse_args([]))
    for name, value in vars(args).items():
        if name not in ("ckpt", "model", "raw", "export", "at") and value != usual.get(name):
            raise ValueError(f"--{name.replace('_', '-')} goes with pictures: --export writes the "
                             f"checkpoint alone")


def chosen(args: argparse.Namespace) -> Path:
    """The checkpoint asked for, or the bundled one that does best what is asked for."""
    if args.ckpt and args.model:
        raise ValueError("--model is one of the bundled: leave it out with --ckpt")
    if args.ckpt:
        return Path(args.ckpt)
    if args.model == "cm":
        return bundled("cm")
    few = args.sampler == "cm" or args.sampler is None and args.steps in (1, 2)
    how = (args.sampler, args.steps, args.eta, args.guidance, args.label)
    if args.image:
        return bundled("autoencoder")
    if few or args.given and all(value is None for value in how):
        return bundled("infd_onestep")
    told = args.prompt or args.prompts or args.prompt_at
    return bundled("infd_text" if told or args.label is None and not args.given else "infd")


def share() -> tuple[int, int]:
    """(rank, world): which of the pictures this process draws; torchrun starts several."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def write_stills(model: INFD | OneStep, args: argparse.Namespace, common: dict, sizes: list,
                 draw: Callable) -> None:
    """Write the still pictures that are not there yet, and their sheet."""
    rank, world = share()
    windows = [check_frame(size, args.window)[1] for size in sizes]
    for size, window in zip(sizes, windows):
        say_stretched(size, window, common.get("latent_size") or (1, 1))
    taken = [int(p.name) for p in Path("samples").glob("*") if p.name.isdecimal()]
    out = Path(args.out or f"samples/{max(taken, default=0) + 1:04d}")
    files = planned(model, args, common, sizes, out)
    if args.sheet:
        check_sheet(Path(args.sheet), [file for file, _ in files.values()], sizes)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()                          # says what is wrong at once

    todo = [i for (i, _), (file, _) in files.items() if i % world == rank and not file.exists()]
    todo = list(dict.fromkeys(todo))
    for at in range(0, len(todo), args.batch):
        for i, drawing in draw(todo[at:at + args.batch]):
            for size in sizes:
                file, head = files[i, size]
                if not file.exists():                                # one that is there is the same
                    write_png(file, head, size, drawing(size, args.window))
    if args.sheet:
        labels = [f"{size[0]}x{size[1]}" for _, size in files] if len(sizes) > 1 else []
        write_sheet(Path(args.sheet), [file for file, _ in files.values()], labels)
    if rank == 0:
        made_by = f"by {Path(args.ckpt or model.file).name} ({model.weights}, step {model.step})"
        print(f"{len(files)} picture{'s' * (len(files) > 1)} {made_by} in {out}")


def run(argv: list[str]) -> None:
    """Draw what the command line asks for."""
    args = parser().read(argv, "sizes are given by --res, scores made by metrics.py, "
                               "measurements by experiments.py")
    more = check_alone(args)
    args.at = centre_of_dive(args)
    path = chosen(args)
    if args.export:
        check_export(args)
        return export(path, Path(args.export), args.raw)
    if share()[1] > 1 and (not args.out or args.sheet):
        raise ValueError("under torchrun give --out, which all processes share, and no --sheet")
    args.prompt = read_prompts(args)
    if args.n is None:
        args.n = len(args.prompt or [""])
    if more and len(args.prompt or []) > 1:
        raise ValueError("several prompts are for still pictures: give one")
    if args.html:
        check_new(Path(args.html), ".html")
    if min(args.n, args.batch) < 1:
        raise ValueError("--n and --batch must be at least 1")

    model, common = asked_for(path, args)
    if args.view or args.zoom:
        args.window = WHOLE_PLANE                                    # or this model has no windows
    told = args.prompt                                               # below, of --given: found
    made, sizes, draw = pictures_of(model, args)
    net = model.unet if isinstance(model, INFD) else model.f.net
    if net is not None:
        draw_labels(net, model.classes, [0], args.seed, args.label)  # names a wrong one at once
    if more:
        args.prompt = told if args.view else args.prompt             # each seed finds its own
        return exhibit(model, args, common | made, sizes[0], draw)

    write_stills(model, args, common | made, sizes, draw)


def main(argv: list[str] | None = None) -> int:
    """The exit code: see `runs.cli`."""
    return cli(run, sys.argv[1:] if argv is None else argv,
               stopped="stopped; stills that are drawn stay (without --out in the newest folder of "
                       "samples), and the same command with --out FOLDER draws the rest",
               memory="take a smaller --tile (INFD), --batch or --res")


if __name__ == "__main__":
    sys.exit(main())
