"""Programs that use training and sampling; demo and compare train by changes to preset tiny.

    python experiments.py demo                             both systems, 20 minutes on 2 cores
    python experiments.py compare NAME [steps=N seeds=N]   what papers compare
    python experiments.py bench STAGE [key=value ...]      a training step; bench sample [RUN ...]
    python experiments.py bench all [--quick]              every stage; bench curves: losses
    python experiments.py plot RUN [RUN ...]               the curves of a run's log: RUN/plot.png
    python experiments.py agreement RUN [--repeat N]       do its pictures show what prompts say?
"""
from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import operator
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageDraw
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import data
from autoencoder import FieldAutoencoder
from commandline import Parser
from metrics import Protocol, frechet_distance, load_features, statistics
from models import INFD, OneStep, load
from pictures import contact_sheet
from runs import (Meter, cli, convert, flatten, option_types, parse_options, pick_device,
                  read_log, set_tf32, unflatten, write_checkpoint)
from sample import bundled
from stages import drawn_at
from train import STAGES, configure, step, train

# The function generator learns as the bundled one did (weights/README.md): to reconstruct, to
# denoise (r = 0), and, distilled from that denoiser, to do it in one step. It cannot draw the white
# noise that F owes x at sigma_data 0.5: with both scales as here, f = M.
FUNC = {"func.position_base": 10.0, "func.position_scale": 4.0, "beta2": 0.99}
SCALES = FUNC | {"func.out_scale": 20.0, "cm.sigma_data": 0.05, "cm.sigma_max": 20.0}
DENOISER = {"steps": 300, "muon": 4e-3, "lr": 7e-4, "ect.k": 1e9, "ect.b": 0.0, "ect.P_mean": 0.3,
            "ect.P_std": 1.5}
ONE_STEP = {"steps": 180, "muon": 2e-3, "lr": 3e-4, "ect.stages": 1, "ect.q": 2.0, "ect.k": 9.0,
            "ect.b": 10.0, "ect.mu0": 0.98, "ect.P_mean": 1.2, "ect.P_std": 1.4,
            "init": "cm-denoiser", "distil": "cm-denoiser"}
AE = {"steps": 1500, "ae.kl_logvar": -6.0, "grid_every": 500, "eval_n": 64}
LDM = {"ae": AE | {"steps": 800}, "ldm": {"steps": 1000, "pictures": 2048, "grid_every": 500}}
HALF = {"size": 32, "func.patch": 4, "vit.patch": 4}     # stage cm at half the size, to afford it
LEARNED = {"pretrain": {"steps": 1500, "size": 32, "func.patch": 4}}
TUNED = {"steps": 500, "cm.sigma_data": 0.1, "func.out_scale": 10.0, "ect.stages": 1,
         "ect.P_mean": 1.5, "ect.P_std": 1.5}            # as in the paper, with scales of f = M

# Name -> side -> its runs, STAGE or STAGE-WORD, in order. In the last all sides, but for the demo,
# take as many steps of as many pictures.
COMPARISONS = {
    "demo": {"INFD": {"ae": AE | {"steps": 900, "eval_n": 16}, "ldm": LDM["ldm"] | {"steps": 900}},
             "CM-Func": {"pretrain": FUNC | {"steps": 1000, "muon": 4e-3, "eval_n": 16},
                         "cm-denoiser": SCALES | DENOISER, "cm": SCALES | ONE_STEP}},
    "renderer": {"clif": {"ae": AE}, "liif": {"ae": AE | {"ae.renderer": "liif"}}},      # INFD A
    "downsampling": {"with": {"ae": AE | {"p_whole": 0.0}},                              # INFD E
                     "without": {"ae": AE | {"p_whole": 0.0, "downsample": False}}},
    "mix": {name: {"ae": AE | {"data": name}} for name in ("synthetic", "synthetic-6k-mix")},
    "latent": {"learned": LDM,                                                           # INFD C
               "lowres": LDM | {"ae": LDM["ae"] | {"ae.lowres": True, "ae.kl": False}}},
    "generators": {name: {"cm": HALF | {"steps": 500, "generator": name, "init": "none"}}
                   for name in ("func", "unet", "uvit", "dit")},     # CM-Func, Tables 1, 2, 5
    "pretraining": {"with": LEARNED | {"cm": TUNED | HALF},          # CM-Func, Figure 8
                    "without": {"cm": TUNED | HALF | {"init": "none"}}},
    "resolution": {"64px": {"pretrain": {"steps": 1500}, "cm": TUNED},
                   "32px": LEARNED | {"cm": TUNED | HALF}},          # Table 7: as many tokens
    "convolutional": {"model": {"ae": AE | {"steps": 400},           # INFD D: see `draw_sides`
                                "ldm": LDM["ldm"] | {"steps": 800}}},
}

SCORES = {"psnr_render": "PSNR", "psnr_bicubic": "bicubic", "lpips_render": "LPIPS"}


def train_side(side: dict[str, dict], data_name: str, out: Path, device: torch.device, seed: int,
               texts: Sequence[str]) -> tuple[dict[str, float], INFD | OneStep]:
    """Train a side's runs, the last with options key=value; returns its numbers and its model."""
    row = {}
    for name, changes in side.items():
        stage = name.split("-")[0]
        base = configure(stage, "tiny", data_name)
        own = changes | {"seed": seed}
        own |= {key: str(out / own[key]) for key in ("init", "distil") if own.get(key) in side}
        if name == list(side)[-1]:
            own |= parse_options(type(base), texts, f"stage {stage}")
        made = train(stage, unflatten(type(base), own, base), out / name, device)

        row["parameters"] = sum(p.numel() for p in made.net.parameters())
        last = json.loads((out / name / "log.jsonl").read_text().splitlines()[-1])
        wanted = ("step", "images_per_s", "denoising_distance")
        row |= {key: last[key] for key in wanted if key in last}
        file = out / name / "eval.json"
        for score in json.loads(file.read_text()).values() if file.exists() else ():
            for key, title in SCORES.items():
                if key in score:
                    row[f"{title} {score['px']}px"] = score[key]
    return row, load(out / name, device)


def draw_some(model: INFD | OneStep, sizes: Sequence[int], n: int) -> list[Tensor]:
    """The first n samples at some sizes, (n, 3, S, S) each; of pixel generators at their own."""
    if isinstance(model, INFD):
        drawn = model.decode(model.sample(range(n), sampler="dpm++"))
    elif hasattr(model.f.net, "function"):
        drawn = model.functions(range(n))
    else:
        return [model.sample(range(n))]
    return [drawn.draw(size) for size in sizes]


def draw_sides(name: str, side: str, model: INFD | OneStep, n: int) -> dict[str, Tensor]:
    """What a trained side is measured by: n samples (n, 3, S, S) for each row of the table.

    convolutional: one model at twice its size, of its own latents by CLIF, and of latents of twice
    the height and width by a larger noise map.
    """
    if name != "convolutional":
        return {side: draw_some(model, [model.size], n)[0]}
    h, w = model.latent_shape[1:]
    drawn = {}
    for title, latent_size in (("CLIF", (h, w)), ("larger noise map", (2 * h, 2 * w))):
        z = model.sample(range(n), sampler="dpm++", latent_size=latent_size)
        drawn[title] = model.decode(z).draw(2 * model.size)
    return drawn


def colour_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (48,) and covariance (48, 48) of the 4 x 4 mean colours of (n, 3, S, S)."""
    colours = nn.AdaptiveAvgPool2d(4)(images.cpu().clamp(-1, 1)).flatten(1)
    return colours.mean(dim=0), torch.cov(colours.T)


def measures(device: torch.device) -> dict[str, Callable]:
    """What makes mean and covariance of (n, 3, S, S): colours, and features where they are."""
    found = {"colour distance": colour_moments}
    try:
        net = load_features("squeeze").to(device)
    except ValueError as error:
        print(f"without FD-squeeze: {error}")
        return found

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        return statistics(images.split(32), net, Protocol("squeeze")).moments["pool"]

    return found | {"FD-squeeze": features}


def check_fair(sides: dict[str, dict], data_name: str, texts: Sequence[str]) -> None:
    """ValueError for options by which sides would no longer differ in what is compared alone."""
    last = [flatten(list(side.values())[-1]) for side in sides.values()]
    if data_name != "synthetic" and any("data" in changes for changes in last):
        raise ValueError("this comparison is of data of its own: leave --data out")
    for key in (text.partition("=")[0] for text in texts):
        if key in ("data", "seed"):
            raise ValueError(f"{key}=: write --data for all runs of all sides, and seeds=N")
        if len({str(changes.get(key)) for changes in last}) > 1:
            raise ValueError(f"{key}=: that is what the sides differ in")


def compare(name: str, data_name: str, out: Path, device: torch.device, seeds: int = 1,
            texts: Sequence[str] = (), n: int = 256) -> dict[str, dict[str, list]]:
    """Train every side for every seed; write NAME.png and NAME.json into `out`, print a table.

    Returns side -> column -> a number per seed; distances are Frechet distances of n samples to n
    held-out pictures of their size, for "other pictures" of n others.
    """
    if name not in COMPARISONS:
        raise ValueError(f"there is no comparison {name}; there are: {', '.join(COMPARISONS)}")
    check_fair(COMPARISONS[name], data_name, texts)
    held_out = data.open_data(data_name, "val")
    n = min(n, len(held_out) // 2)
    if n < 2:
        raise ValueError(f"{data_name} has {len(held_out)} held-out pictures, fewer than 4")
    rows = {}
    samples = {}
    sheets = []
    for seed, (side, stages) in itertools.product(range(seeds), COMPARISONS[name].items()):
        here = out / f"{side}-seed{seed}"
        row, model = train_side(stages, data_name, here, device, seed, texts)
        for column, value in row.items():
            rows.setdefault(side, {}).setdefault(column, []).append(value)
        if isinstance(model, OneStep) or model.unet:
            for title, drawn in draw_sides(name, side, model, n).items():
                samples.setdefault(title, []).append(drawn)
        sheets.append(np.asarray(Image.open(max(model.file.parent.glob("grid-*.png")))))

    shown = [sheets]
    if name == "convolutional":
        shown = [data.to_uint8(drawn[0][:8]) for drawn in samples.values()]

    ours = measures(device) if samples else {}
    for side, drawn in samples.items():
        size = drawn[0].shape[-1]
        truth = drawn_at([held_out[i] for i in range(2 * n)], size)              # (2 n, 3, S, S)
        for column, moments in ours.items():
            goal = moments(truth[:n])
            others = frechet_distance(*moments(truth[n:]), *goal)
            rows.setdefault(f"other pictures {size}px", {})[column] = [others]
            found = [frechet_distance(*moments(images.cpu()), *goal) for images in drawn]
            rows.setdefault(side, {})[column] = found
    sheet = contact_sheet(shown, max(max(pixels.shape) for pixels in itertools.chain(*shown)))
    Image.fromarray(sheet).save(out / f"{name}.png")
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{as_table(rows)}\n{out / name}.png: the last sheet of each side")
    return rows


def as_table(rows: dict[str, dict]) -> str:
    """Rows of named numbers, or of lists of them, as text."""
    columns = list(dict.fromkeys(itertools.chain(*rows.values())))
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([name, *(cell(row[c]) if c in row else "-" for c in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def cell(value: float | list[float]) -> str:
    """A number as text; of several the mean, and the standard deviation."""
    spread = f" +- {np.std(value, ddof=1):.2g}" if np.size(value) > 1 else ""
    return f"{np.mean(value):.5g}{spread}"


def cost(call: Callable, images: int, n: int, device: torch.device) -> dict[str, float]:
    """What a call for so many images costs, by the mean of n.

    gflop: 2 per multiply-add, of matrix products and convolutions. of_ceiling: the share of what a
    large product (bf16; CPU: fp32) does in that time. compile_s: what a first call takes more.
    """
    def seconds(what: Callable, n: int) -> float:
        timer = Timer("what()", globals={"what": what}, num_threads=torch.get_num_threads())
        return timer.timeit(n).mean                          # of the device's work; warms up

    with (torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH),
          FlopCounterMode(display=False) as counter):        # it knows no fused attention
        call()
    begin = time.perf_counter()
    call()
    first = time.perf_counter() - begin
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    each = seconds(call, n)
    peak = torch.cuda.max_memory_allocated()                 # 0 without a GPU

    a = torch.eye(1536) if device.type == "cpu" else torch.eye(8192).bfloat16().to(device)
    product = seconds(lambda: a @ a, 5)
    rate = counter.get_total_flops() / each
    row = {"ms": 1000 * each, "images_per_s": images / each, "gflop": rate * each / 1e9,
           "tflop_per_s": rate / 1e12, "of_ceiling": rate * product / (2 * len(a)**3),
           "peak_gb": peak / 1e9, "compile_s": max(0, first - each)}
    return row | (gpu_use(call, each) if device.type == "cuda" else {})


def gpu_use(call: Callable, each: float, n: int = 3) -> dict[str, float]:
    """What the profiler sees of a call of so many seconds: the share the GPU idles, its kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(n):
            call()
        torch.cuda.synchronize()
    seen = [event for event in profile.events() if not event.is_user_annotation
            and event.device_type == torch.autograd.DeviceType.CUDA]
    busy = covered([(event.time_range.start, event.time_range.end) for event in seen]) / 1e6
    kernels = [event for event in seen if not event.name.startswith(("Memcpy", "Memset"))]
    return {"gpu_idle": max(0, 1 - busy / (n * each)), "kernels": len(kernels) / n}


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """How much spans (start, end) cover together; they may overlap."""
    total = 0
    reached = -math.inf
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


Rows = Iterator[tuple[str, dict]]                    # name and numbers of what was measured
WAYS = {"": [], "NCHW": ["channels_last=false"], "graphs": ["compile=graphs"],
        "eager": ["compile=off"]}                    # how `bench all` measures each stage
EXACT = ["compile=off", "channels_last=false", "dtype=fp32", "tf32=false"]


def bench_samples(files: Sequence[str], n: int, device: torch.device) -> Rows:
    """What a picture costs at 1, 4 and 16 times its model's size; default: the bundled models.

    sample: its latent, in 20 steps (one-step INFD: 2); INFD's pictures are from the latent to 8
    bits.
    """
    for file in files or (bundled("infd"), bundled("cm")):
        model = load(file, device)
        name = Path(file).stem
        if isinstance(model, INFD):
            model.compile()
            z = torch.randn(1, *model.latent_shape).to(device)
            if model.unet:
                sampler = "cm" if model.f else "dpm++"
                sample = functools.partial(model.sample, [0], sampler=sampler)
                yield f"{name} sample", cost(sample, 1, n, device)
        for size in (model.size, 4 * model.size, 16 * model.size):
            if isinstance(model, INFD):
                yield f"{name} {size}px", cost(
                    lambda: data.to_uint8(model.decode(z).draw(size)), 1, n, device)
            else:
                call = functools.partial(draw_some, model, [size], 1)
                yield f"{name} {size}px", cost(call, 1, n, device)


def bench(what: str, preset: str, data_name: str, texts: Sequence[str], n: int,
          device: torch.device) -> Rows:
    """What a step of a stage costs (ae: with its GAN); of stage cm by generator=func,dit.

    data_wait: the share of waiting for data in n further steps; all others have one batch.
    multi_res_fps (CM-Func 4.3): pictures per second where each is wanted at 32, 64 and 128 px, by
    one function or by a network for each size.
    """
    sizes = (32, 64, 128)
    cfg = configure(what, preset, data_name, texts)
    set_tf32(cfg.tf32, device)
    for name in getattr(cfg, "generator", what).split(","):
        own = [*texts, f"generator={name}"] if what == "cm" else texts
        made = STAGES[what](configure(what, preset, data_name, own), device)
        k = getattr(cfg, "gan_start", 0)
        stream = made.batches(k)
        row = cost(functools.partial(step, made, next(stream), k), cfg.batch, n, device)
        meter = Meter()
        for _ in range(n):
            logs = step(made, meter.wait_for(stream), k)
        float(logs["loss"])                                  # waits for the device
        row["data_wait"] = meter.waited / (time.perf_counter() - meter.since)
        row["parameters"] = sum(p.numel() for p in made.net.parameters())
        if what == "cm":
            models = []
            for size in [cfg.size] if made.makes_functions else sizes:
                other = configure(what, preset, data_name, [*own, f"size={size}"])
                models.append(OneStep(STAGES[what](other, device).f, size).to(device))
            several = cost(lambda: [draw_some(model, sizes, 1) for model in models], 3, n, device)
            row["multi_res_fps"] = several["images_per_s"]
        yield name, row


def stage_options(preset: str, data_name: str, texts: Sequence[str], folder: Path) -> dict:
    """Stage -> those of the options that it has; stage ldm starts from an untrained autoencoder."""
    options = {name: [text for text in texts if text.split("=")[0] in option_types(stage.options)]
               for name, stage in STAGES.items()}
    cfg = configure("ae", preset, data_name, options["ae"])
    weights = FieldAutoencoder(cfg.ae).state_dict()
    write_checkpoint(folder / "untrained.pt", {"stage": "ae", "step": 0, "config": flatten(cfg),
                                               "state": {"model": weights}})
    options["ldm"] += [f"init={folder / 'untrained.pt'}", "cache=false", "pictures=0"]
    return options


def bench_all(preset: str, data_name: str, texts: Sequence[str], n: int, quick: bool,
              device: torch.device) -> Rows:
    """Steps of all stages, in all WAYS unless quick, and what a picture of such a model costs."""
    with tempfile.TemporaryDirectory() as folder:
        options = stage_options(preset, data_name, texts, Path(folder))
        for what, way in itertools.product(STAGES, [""] if quick else WAYS):
            for name, row in bench(what, preset, data_name, options[what] + WAYS[way], n, device):
                yield f"{what if what == name else f'{what} {name}'} {way}".strip(), row
        yield from bench_samples([Path(folder, "untrained.pt")], n, device)


def bench_curves(preset: str, data_name: str, texts: Sequence[str], n: int, out: Path,
                 device: torch.device) -> Rows:
    """The losses of n steps of all stages as they run here, beside eager ones in fp32: OUT.png.

    gap: the largest relative difference of their means over tenths of the steps.
    """
    panels = []
    with tempfile.TemporaryDirectory() as folder:
        options = stage_options(preset, data_name, texts, Path(folder))
        for what in STAGES:
            row = {}
            for way, more in (("here", []), ("exact", EXACT)):
                cfg = configure(what, preset, data_name, options[what] + more)
                set_tf32(cfg.tf32, device)
                made = STAGES[what](cfg, device)
                batches = itertools.islice(made.batches(0), n)
                losses = [step(made, batch, k)["loss"] for k, batch in enumerate(batches)]
                row[way] = [round(float(loss), 6) for loss in losses]
            here, exact = row.values()
            parts = zip(np.array_split(here, min(n, 10)), np.array_split(exact, min(n, 10)))
            row["gap"] = max(abs(a.mean() / b.mean() - 1) for a, b in parts)
            panels.append(draw_panel(f"{what}: loss (red: as here, blue: eager fp32)",
                                     list(enumerate(here)), n, list(enumerate(exact))))
            yield what, row
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack(panels)).save(out)


# ---- The curves of a run ----

PANEL = (720, 220)                                   # pixels: width and height of a panel
LEFT, TOP, RIGHT, BOTTOM = 64, 30, 16, 24            # of its margins
BETTER = {"held_out_psnr": max, "held_out_loss": min, "denoising_distance": min}


def plot(run_folder: Path) -> Path:
    """Draw the log of a run, a panel for each of its columns, held-out scores first: RUN/plot.png.

    Raises ValueError where there is no log with two lines.
    """
    file = run_folder / "log.jsonl"
    lines = read_log(file) if file.exists() else []
    if len(lines) < 2:
        raise ValueError(f"{file} has {len(lines)} lines, and a curve needs two; name a run folder "
                         f"of train.py that has come to its second line")
    panels = []
    for name in dict.fromkeys([*BETTER, "loss", *itertools.chain(*lines)]):
        points = [(line["step"], line[name]) for line in lines if name in line]
        points = [point for point in points if math.isfinite(point[1])]
        if points and name != "step":
            panels.append(draw_panel(name, points, lines[-1]["step"]))
    Image.fromarray(np.vstack(panels)).save(run_folder / "plot.png")
    return run_folder / "plot.png"


def draw_panel(name: str, points: Sequence[tuple[int, float]], steps: int,
               beside: Sequence[tuple[int, float]] = ()) -> Image.Image:
    """Draw one curve over 0..steps, and one beside it; on a logarithmic axis if they span a lot."""
    values = [value for _, value in (*beside, *points)]
    lo = min(values)
    hi = max(values)
    log = lo > 0 and hi > 10 * lo
    title = f"{name} by step" + " (logarithmic)" * log + f"; last {values[-1]:.4g}"
    if name in BETTER and len(points) > 1:
        best = BETTER[name](points, key=operator.itemgetter(1))
        title += f"; best {best[1]:.4g} at step {best[0]:,}"
    if hi == lo:
        lo, hi = lo - 1, hi + 1
    image = Image.new("RGB", PANEL, "white")
    pen = ImageDraw.Draw(image)
    right = PANEL[0] - RIGHT
    bottom = PANEL[1] - BOTTOM

    def at(step: float, value: float) -> tuple[float, float]:
        up = math.log(value / lo) / math.log(hi / lo) if log else (value - lo) / (hi - lo)
        return LEFT + step / steps * (right - LEFT), bottom - up * (bottom - TOP)

    marks = np.geomspace(lo, hi, 5) if log else np.linspace(lo, hi, 5)
    for step, value in zip(np.linspace(0, steps, 5), marks):
        x, y = at(step, value)
        pen.line((LEFT, y, right, y), "#dddddd")
        pen.text((LEFT - 6, y), f"{value:.4g}", "black", anchor="rm")
        pen.line((x, TOP, x, bottom), "#dddddd")
        pen.text((x, bottom + 6), f"{step:,.0f}", "black", anchor="mt")
    pen.rectangle((LEFT, TOP, right, bottom), outline="black")
    pen.text((LEFT, 8), title, "black")
    pen.line([at(*point) for point in beside], "#3060c0", 2)
    places = [at(*point) for point in points]
    pen.line(places, "#c03020", 2)
    if len(places) <= 40:
        for x, y in places:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), "#c03020")
    return image


# ---- Does a picture show what its prompt says? ----

# Attribute -> what captions of the built-in scenes say of it; where there is one phrase: or not.
ATTRIBUTES = {"time": ("dawn", "day", "dusk", "night"),
              "season": ("spring", "summer", "autumn", "winter"),
              "snow": ("snowy", "snow-capped", "wooded", "bare"), "lake": ("a lake",),
              "clouds": ("a clear sky", "scattered clouds", "a cloudy sky")}


def attributes(caption: str) -> list[int]:
    """Of each attribute the number of the phrase that a caption has; of one phrase 1, or 0 without.

    ValueError for a caption of other pictures.
    """
    found = []
    for name, phrases in ATTRIBUTES.items():
        said = [i for i, phrase in enumerate(phrases) if phrase in caption]
        if len(phrases) > 1 and len(said) != 1:
            raise ValueError(f"not a caption of the built-in scenes, it says no {name}: {caption}")
        found.append(said[0] if len(phrases) > 1 else len(said))
    return found


class SceneReader(nn.Module):
    """A small classifier of scenes at 64 px, with an answer for each attribute."""

    def __init__(self, width: int = 32):
        super().__init__()
        sides = [3, width, 2 * width, 4 * width, 4 * width]
        layers = []
        for a, b in itertools.pairwise(sides):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)                      # (B, 3, 64, 64) -> (B, 4 w, 4, 4)
        answers = [max(2, len(phrases)) for phrases in ATTRIBUTES.values()]
        self.heads = nn.ModuleList(nn.Linear(4 * width * 16, n) for n in answers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, 64, 64) in [-1, 1] -> scores (B, answers) of each attribute."""
        h = self.trunk(images).flatten(1)                        # (B, 4 w * 16)
        return [head(h) for head in self.heads]


def read_scenes(n: int, epochs: int, device: torch.device) -> SceneReader:
    """Train a classifier on the first n scenes."""
    source = data.open_data("synthetic")
    images = drawn_at([source[i] for i in range(n)], 64).to(device)              # (n, 3, 64, 64)
    answers = torch.tensor([attributes(source.caption(i)) for i in range(n)], device=device)
    torch.manual_seed(0)
    net = SceneReader().to(device)
    steps = epochs * n // 64
    opt = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, steps)
    for k in range(steps):
        gen = torch.Generator().manual_seed(k)
        some = torch.randint(n, (64,), generator=gen).to(device)
        mirrored = torch.rand(64, 1, 1, 1, generator=gen).to(device) >= 0.5
        image = torch.where(mirrored, images[some].flip(3), images[some])        # (64, 3, 64, 64)
        losses = map(F.cross_entropy, net(image), answers[some].T)
        opt.zero_grad()
        sum(losses).backward()
        opt.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def shares(net: SceneReader, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Of each attribute the share of images (n, 3, 64, 64) in which it is what the caption says."""
    answers = torch.tensor([attributes(caption) for caption in captions], device=images.device)
    right = [scores.argmax(dim=1) == answers[:, a] for a, scores in enumerate(net(images))]
    row = {name: one.float().mean().item() for name, one in zip(ATTRIBUTES, right)}
    return row | {"mean": sum(row.values()) / len(row)}


def agreement(run_folder: str, n: int, device: torch.device) -> dict[str, dict]:
    """How often a text model of the built-in scenes draws what a prompt says, by attribute.

    Prompts are the captions of the first n held-out scenes; the truth is those scenes themselves.
    """
    model = load(run_folder, device)
    if not isinstance(model, INFD) or model.text is None:
        raise ValueError(f"{run_folder} does not read text; give a run of text=true")
    net = read_scenes(4000, 15, device)
    held_out = data.open_data("synthetic", "val")
    captions = [held_out.caption(i) for i in range(n)]
    other = captions[1:] + captions[:1]
    truth = drawn_at([held_out[i] for i in range(n)], 64).to(device)             # (n, 3, 64, 64)
    rows = {"true scenes": shares(net, truth, captions),
            "true scenes, another's caption": shares(net, truth, other)}
    ways = {f"w = {w:g}": {"sampler": "dpm++", "guidance": w} for w in (1.0, 2.0, 3.0, 4.0)}
    if model.f is not None:
        ways = {"one step": {"steps": 1}, "two steps": {"steps": 2}}
    for name, how in ways.items():
        drawn = []
        for some in torch.arange(n).split(16):
            z = model.sample(some.tolist(), prompts=captions, **how)
            drawn.append(model.decode(z).draw(64))
        drawn = torch.cat(drawn)                                                 # (n, 3, 64, 64)
        rows[name] = shares(net, drawn, captions)
        rows[f"{name}, another's prompt"] = shares(net, drawn, other)
    return rows


# ---- Command line ----

def parser() -> Parser:
    """Describe the command line."""
    p = Parser(usage=__doc__.split("\n\n")[1].strip(),
               description=f"NAME: {', '.join(name for name in COMPARISONS if name != 'demo')}")
    p.add_argument("program", choices=("demo", "compare", "bench", "plot", "agreement"))
    p.add_argument("words", nargs="*", help="NAME, STAGE or RUN, then key=value")
    p.add_argument("--data", help="a name, or the path of a folder or .zip (synthetic)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--out", help="folder of demo and compare (runs/demo, runs/compare/NAME), or "
                                 "picture of bench curves (runs/curves.png)")
    p.add_argument("--preset", help="bench: tiny, small, paper (tiny)")
    p.add_argument("--repeat", type=int, metavar="N",
                   help="bench: steps, or pictures, that are measured (20; curves: 200); "
                        "agreement: prompts (64)")
    p.add_argument("--quick", action="store_true", help="bench all: 5 steps, one way of compiling")
    return p


# The options that a program reads, beside --device.
READS = {"demo": ("data", "out"), "compare": ("data", "out"), "plot": (), "agreement": ("repeat",),
         "bench": ("data", "preset", "repeat"), "bench sample": ("repeat",),
         "bench all": ("data", "preset", "repeat", "quick"),
         "bench curves": ("data", "preset", "repeat", "out")}


def check_words(args: argparse.Namespace, name: str, texts: list[str]) -> None:
    """ValueError for words and options that a program does not read."""
    program = args.program
    if f"{program} {name}" in READS:
        program = f"{program} {name}"
    given = [option for option in ("data", "out", "preset", "repeat", "quick")
             if getattr(args, option) not in (None, False)]
    foreign = [f"--{option}" for option in given if option not in READS[program]]
    foreign += {"demo": args.words, "agreement": texts}.get(program, [])
    if foreign:
        raise ValueError(f"{', '.join(foreign)}: {program} does not read that")
    if args.repeat is not None and args.repeat < 1:
        raise ValueError(f"--repeat {args.repeat}: once at least")
    if args.program == "bench" and any(text.startswith("latents=") for text in texts):
        raise ValueError("bench cm measures networks that make pictures: leave latents= out")


def run(argv: list[str]) -> None:
    """Do what the command line says."""
    args = parser().read(argv, "a run's options are written key=value; bench measures --repeat N")
    name, *texts = args.words or ["demo" if args.program == "demo" else ""]
    check_words(args, name, texts)
    if args.program == "plot":
        for run_folder in args.words or [""]:
            print(plot(Path(run_folder)))
        return
    device = pick_device(args.device)
    if args.program == "agreement":
        print(as_table(agreement(name, args.repeat or 64, device)))
    elif args.program == "bench":
        run_bench(name, texts, args, device)
    else:
        if name == "convolutional" and args.data is None:
            raise ValueError("compare convolutional asks what becomes of faces: name some by "
                             "--data, a folder or .zip, or ffhq or celeba")
        out = Path(args.out or ("runs/demo" if name == "demo" else f"runs/compare/{name}"))
        seeds = [text for text in texts if text.startswith("seeds=")]
        texts = [text for text in texts if text not in seeds]
        n = max([convert("seeds", int, text[6:]) for text in seeds], default=1)
        if n < 1:
            raise ValueError("seeds=0: one at least is trained")
        compare(name, args.data or "synthetic", out, device, n, texts)


def run_bench(name: str, texts: list[str], args: argparse.Namespace, device: torch.device) -> None:
    """Measure; every row is printed as it comes, as a line of JSON, and all as a table at last."""
    n = args.repeat or (5 if args.quick else 200 if name == "curves" else 20)
    common = args.preset or "tiny", args.data or "synthetic", texts, n
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    rows = {}
    curves = Path(args.out or "runs/curves.png")
    if curves.suffix not in (".png", ".jpg"):
        raise ValueError(f"--out {curves}: name a picture, .png or .jpg")
    with (tempfile.TemporaryDirectory() as empty,            # compile_s is without a cache
          patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=empty)):
        if name == "sample":
            measured = bench_samples(texts, n, device)
        elif name == "all":
            measured = bench_all(*common, args.quick, device)
        elif name == "curves":
            measured = bench_curves(*common, curves, device)
        else:
            measured = bench(name, *common, device)
        for row, values in measured:
            print(json.dumps({"name": row, "device": card, **values}), flush=True)
            rows[row] = {key: value for key, value in values.items() if np.isscalar(value)}
    print(as_table(rows))


def main(argv: list[str] | None = None) -> int:
    """The exit code: see `runs.cli`."""
    return cli(run, sys.argv[1:] if argv is None else argv, "stopped; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
