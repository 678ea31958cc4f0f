"""Train: the loop, the presets, and the command line.

    python train.py --stage ae --preset tiny         encoder, decoder, renderer (INFD, Section J)
    python train.py --stage ldm --preset tiny        diffusion of that autoencoder's latents
    python train.py --stage pretrain --preset tiny   image functions that reconstruct (CM-Func, 3.4)
    python train.py --stage cm --preset tiny         consistency training (CM-Func, 3.1)

The same command again continues the run. stages_infd.py and stages_func.py have what a step of each
does. From Python, with pictures and a loss of one's own:
train("ae", AERun(steps=1000), "runs/mine", "cpu", source=pictures, loss=my_loss)
"""
from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import data
from commandline import Parser
from data import Source
from files import shown
from runs import (Meter, RunFolder, Stopped, barrier, cli, flatten, on_signals, option_types,
                  parse_options, pick_device, print_once, process_group, ranks, rng, set_tf32, stop,
                  unflatten, wants_compile)
from stages import Run, Stage, add_up, descend, ema_update, micro_batches
from stages_func import CMRun, CMStage, PretrainRun, PretrainStage
from stages_infd import AERun, AEStage, LDMRun, LDMStage
from stages_onestep import LatentCMStage

__all__ = ["AERun", "AEStage", "CMRun", "CMStage", "LDMRun", "LDMStage", "PretrainRun",
           "PretrainStage", "configure", "fit", "main", "step", "train"]

# A run may be continued with these changed; its data is compared by content.
FREE = frozenset({"data", "init", "steps", "epochs", "accum", "workers", "dtype", "tf32", "compile",
                  "checkpoint", "channels_last", "log_every", "grid_every", "save_every",
                  "keep_every", "preview_steps", "eval_n"})


STAGES = {stage.name: stage for stage in (AEStage, LDMStage, PretrainStage, CMStage)}


# ---- the loop ----

def step(stage: Stage, batch: dict, k: int) -> dict[str, Tensor]:
    """Take step k of training; returns what to log, and "taken": whether the weights moved."""
    cfg = stage.cfg
    logs: dict = {}
    stage.prepare(k)
    for part in micro_batches(batch, cfg.accum):
        loss, terms = stage.objective(part, k)                   # forward, loss
        (loss / cfg.accum).backward()                            # backward
        add_up(logs, terms, cfg.accum)
    logs["taken"] = descend(stage.opts)                          # optimiser
    logs |= stage.follow(batch, k, logs["taken"])                # ae: discriminator; cm: teacher
    if stage.ema is not None:                                    # moving average
        warm = (1 + k) / (10 + k) if cfg.ema_warmup else 1
        ema_update(stage.ema, stage.net, min(cfg.ema, warm))
    return logs


def fit(stage: Stage, out: Path) -> None:
    """Train from where the newest checkpoint in `out` stands to cfg.steps; log, draw and save.

    Raises Stopped after a signal, saved; NotFinite; NotSaved; ValueError for another run's folder.
    """
    cfg = stage.cfg
    trained_on = data.fingerprint(stage.source)
    with RunFolder(out, stage.name, cfg, FREE, trained_on).owned() as folder:
        start = folder.resume(stage.state)
        with on_signals(stop):                       # at once: there is nothing to save yet
            if start == 0:
                stage.begin()
                stage.shown.load_state_dict(stage.net.state_dict())
            if start < cfg.steps:
                stage.collect()
        stream = stage.batches(start)
        meter = Meter()
        compiles = wants_compile(cfg.compile, stage.device)
        if compiles:
            print_once("the first step compiles, for up to two minutes; what it has compiled stays "
                       "in $TORCHINDUCTOR_CACHE_DIR (below $TMPDIR)")

        learning = stage.net.training
        for k in range(start, cfg.steps):
            batch = meter.wait_for(stream)
            if k == start:
                meter.restart()                      # workers began, latents were encoded
            torch.manual_seed(int(rng(cfg.seed, "dropout", k, ranks()[0]).integers(2**62)))
            logs = step(stage, batch, k)

            done = k + 1
            last = done == cfg.steps
            judged = last or done % cfg.grid_every == 0
            if judged:
                stage.net.eval()                     # which is judged where it has no average
                with meter.paused():
                    logs |= stage.validate()
            meter.add(logs, cfg.batch, k, batch["index"])
            if compiles and k == start:
                print_once(f"the first step took {time.perf_counter() - meter.since:.0f} s")
                meter.restart()                      # the rate is that of the other steps
            if last or done % cfg.log_every == 0:
                line = {"step": done, **meter.means()}
                folder.log(line)
                print_once(in_words(line, cfg))
            elif done == start + 20:
                print_once(f"{minutes(done, meter.rate(), cfg)}, by the first 20 steps")

            with meter.paused():
                signalled = folder.stopping()
                if last or signalled or done % cfg.save_every == 0:
                    folder.save(done, stage.state, stage.extra, last=last or signalled > 0)
                if judged and ranks()[0] == 0:
                    stage.preview(out, done)
                stage.net.train(learning)
            if signalled:
                barrier()                            # torchrun ends all as soon as one has ended
                raise Stopped(128 + signalled)


def in_words(line: dict, cfg: Run) -> str:
    """Say a line of the log, and how long the rest will take."""
    wanted = ("loss", "held_out_psnr", "held_out_loss", "denoising_distance", "images_per_s")
    values = ", ".join(f"{name} {line[name]:g}" for name in wanted if name in line)
    left = minutes(line["step"], line["images_per_s"], cfg)
    if line["data_wait"] > 0.25:
        left += f" ({line['data_wait']:.0%} waiting for pictures: data.py prepare, or workers)"
    return f"step {line['step']:,} of {cfg.steps:,}: {values}, {left}"


def minutes(step: int, images_per_s: float, cfg: Run) -> str:
    """Say how long the steps after `step` will take."""
    images = (cfg.steps - step) * cfg.batch
    return f"{images / max(images_per_s, 0.01) / 60:.1f} minutes to go"


# ---- presets ----

# Parts of presets: how often a run saves, later recipes, the generator for a GPU and for two cores.
OFTEN = {"grid_every": 2000, "save_every": 2000}
ICT_CM = {"schedule": "ict", "metric": "huber"}
ECT_CM = {"schedule": "ect", "metric": "huber", "cm.sigma_min": 0.003, "cm.boundary": False}
SMALL = OFTEN | {"func.dim": 384, "func.heads": 6, "func.encoder_depth": 6, "func.decoder_depth": 4,
                 "func.hidden": 128, "lr": 3e-4}
TINY = {"size": 64, "workers": 1, "grid_every": 250, "save_every": 1000}
FAST = TINY | {"ema": 0.998, "ema_warmup": True, "log_every": 20, "save_every": 500}
TINY_FUNC = {"func.patch": 8, "func.dim": 192, "func.heads": 6, "func.encoder_depth": 3,
             "func.decoder_depth": 2, "func.groups": 48, "func.layers": 3, "func.hidden": 48,
             "func.pe_dim": 48, "func.pe_sigma": 64.0}

# One-step INFD, with latents=RUN: a few minutes from the UNet of a small stage ldm.
LATENT = ECT_CM | FAST | {"batch": 16, "beta2": 0.99, "ect.stages": 1, "ect.gap_weight": False}

# What a preset changes from the defaults above, which are the paper's (FFHQ, CelebA).
PRESETS = {
    "ae": {"paper": {},
           "small": OFTEN | {"steps": 30_000, "lr": 1e-4, "ae.ch": 64, "ae.hidden": 128,
                             "ema": 0.999},
           # Stable Diffusion's autoencoder becomes a field (init=FILE), pictures up to 2K (H, I).
           "sd": {"size": 512, "max_size": 2048, "original_from": 600_000, "p_original": 0.5,
                  "frozen_encoder": True, "reg_weight": 1e-6, "ae.ch_mult": (1, 2, 4, 4),
                  "ae.z_channels": 4, "ae.kl": True},
           "tiny": TINY | {"steps": 3000, "batch": 4, "lr": 1e-3, "beta1": 0.9, "beta2": 0.99,
                           "ema": 0.998, "ema_warmup": True, "patch": 64, "max_size": 256,
                           "p_whole": 0.5, "lpips": "none", "gan_weight": 0.0, "reg_weight": 1e-6,
                           "ae.ch": 16, "ae.groups": 8, "ae.num_res_blocks": 1, "ae.kl": True,
                           "ae.hidden": 32}},
    "ldm": {"paper": {}, "sd": {"size": 512},
            "small": OFTEN | {"steps": 40_000, "lr": 2e-4, "ema": 0.999, "ema_warmup": True,
                              "latent_norm": True, "unet.model_channels": 128},
            "tiny": FAST | {"steps": 1500, "batch": 32, "lr": 1e-3, "latent_norm": True,
                            "pictures": 4096, "cache": True, "unet.model_channels": 64,
                            "unet.channel_mult": (1, 2), "unet.num_res_blocks": 1,
                            "unet.attention_ds": (2,), "unet.groups": 16}},
    "pretrain": {"paper": {},
                 "small": SMALL | {"epochs": 0, "steps": 20_000},
                 "tiny": TINY | TINY_FUNC | {"steps": 4000, "batch": 8, "lr": 1e-3,
                                             "lr_drop": True}},
    "cm": {"paper": {}, "ict": ICT_CM, "ect": ECT_CM,
           # r = 0 at large noise, where the UNet of a diffusion is no denoiser; then distil=THAT.
           "denoiser": LATENT | {"steps": 160, "lr": 5e-4, "metric": "l2", "ect.k": 1e9,
                                 "ect.b": 0.0, "ect.P_mean": 2.5, "ect.P_std": 1.2},
           "onestep": LATENT | {"steps": 300, "lr": 3e-4, "ect.k": 9.0, "ect.b": 10.0,
                                "ect.mu0": 0.95, "ect.P_mean": 0.7, "ect.P_std": 1.3},
           "small": ECT_CM | SMALL | {
               "steps": 60_000, "batch": 64, "ema": 0.999, "ema_warmup": True, "vit.dim": 384,
               "vit.heads": 6, "vit.depth": 11, "unet.model_channels": 96,
               "unet.num_head_channels": 32},
           # Few wide steps, and weight on the large levels: at small ones an image function of this
           # size cannot draw the noise that F has to.
           "tiny": ECT_CM | FAST | TINY_FUNC | {
               "steps": 2000, "batch": 16, "lr": 3e-4, "ect.stages": 2, "ect.gap_weight": False,
               "ect.P_mean": 1.0, "vit.patch": 8, "vit.dim": 128, "vit.depth": 7, "vit.heads": 4,
               "unet.model_channels": 16, "unet.channel_mult": (1, 2, 3, 4), "unet.groups": 8,
               "unet.num_res_blocks": 1, "unet.attention_ds": (4, 8),
               "unet.num_head_channels": 16}},
}

# Published settings of a data set, on top of preset paper. Of Mountains the text has 1M and 600K.
PAPER_DATA = {
    ("ae", "mountains"): {"steps": 1_200_000, "p_original": 0.5, "original_from": 800_000},
    ("pretrain", "cifar10"): {"size": 32},
    ("pretrain", "lsun-church"): {"size": 128},
    ("pretrain", "lsun-classroom"): {"size": 128},
    ("cm", "cifar10"): {"size": 32, "steps": 400_000, "ct.mu0": 0.9},
    ("cm", "lsun-church"): {"size": 128},
    ("cm", "lsun-classroom"): {"size": 128},
}

# CM-Func by resolution (A.2, D.2.1). The text has four levels at 128 px too; the published default
# of five lets the network grow with the resolution, as in Figure 2.
PAPER_SIZE = {
    32: {"func.patch": 4, "vit.patch": 4, "unet.attention_ds": (1, 2, 4)},
    64: {"func.patch": 4, "vit.patch": 4, "unet.attention_ds": (2, 4, 8)},
    128: {"func.patch": 8, "vit.patch": 8, "unet.attention_ds": (4, 8, 16),
          "unet.channel_mult": (1, 1, 2, 3, 4)},
}


def options_of(stage: str) -> type[Run]:
    """The options of a stage; ValueError where there is none of that name."""
    if stage not in STAGES:
        raise ValueError(f"there is no stage {stage}; there are: {', '.join(STAGES)}; {MOVED}")
    return STAGES[stage].options


def configure(stage: str, preset: str = "paper", data_name: str = "synthetic",
              texts: Sequence[str] = ()) -> Run:
    """Put the options of a run together: defaults, the preset, then key=value texts.

    Raises ValueError for an unknown stage, preset or option and for a value of the wrong type.
    """
    cls = options_of(stage)
    if preset not in PRESETS[stage]:
        raise ValueError(f"stage {stage} has no preset {preset}; there are: "
                         f"{', '.join(PRESETS[stage])}")
    for text in texts:
        if text.startswith("data="):
            raise ValueError(f"{text}: write --data {text.removeprefix('data=')}")
    given = parse_options(cls, list(texts), f"stage {stage}")
    chosen = PRESETS[stage][preset]
    if preset not in ("small", "tiny"):
        chosen = PAPER_DATA.get((stage, data.bare_name(data_name)), {}) | chosen
    follows = STAGES[stage].implied(given)
    for name, value in follows.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name}={given[name]}: the file that the run starts from has {value};"
                             f" leave {name} out")
    chosen = chosen | follows
    if "epochs" in given:
        if given.get("steps"):
            raise ValueError("epochs and steps say the same: leave one of them out")
        chosen = chosen | {"steps": 0}
    schedule = given.get("schedule", chosen.get("schedule", "ct"))
    for name in given:
        part = name.partition(".")[0]
        if part in ("ct", "ict", "ect") and part != schedule:
            warnings.warn(f"{name} has no effect: it goes with schedule={part}, not {schedule}")
    if stage == "cm" and preset in ("denoiser", "onestep") and not given.get("latents"):
        raise ValueError(f"preset {preset} goes with latents=RUN, a run of stage ldm")
    size = given.get("size", chosen.get("size", cls.size))
    known = option_types(cls)
    scaled = PAPER_SIZE.get(size, {}) if stage in ("pretrain", "cm") else {}
    by_size = {name: v for name, v in scaled.items() if name in known}
    return unflatten(cls, {**by_size, **chosen, "data": data_name, **given})


def option_help(stage: str) -> str:
    """List the options of a stage, grouped: name, default, and the comment in the code."""
    cls = options_of(stage)
    groups = [("", base) for base in cls.__mro__[:-1]]
    groups += [(f"{name}.", type(v)) for name, v in vars(cls()).items() if hasattr(v, "__dict__")]
    values = flatten(cls())
    lines = []
    for prefix, group in groups:
        lines.append(f"\n{inspect.getdoc(group).splitlines()[0]}")
        for name, comment in re.findall(r"^    (\w+): [^#\n]*(?:# (.*))?", inspect.getsource(group),
                                        re.MULTILINE):
            if prefix + name in values:
                value = values.pop(prefix + name)
                shown = ",".join(map(str, value)) if isinstance(value, list) else value
                lines.append(f"  {f'{prefix}{name}={shown}':32}  {comment}".rstrip())
    return "\n".join(lines)


# ---- from a configuration to a trained model ----

def train(stage: str, cfg: Run, out: str | Path, device: str | torch.device,
          source: Source | None = None, held_out: Source | None = None,
          loss: Callable | None = None) -> Stage:
    """Train a stage into a run folder and score it; returns the stage.

    source, held_out, loss: see `Stage`. What a stage starts from is by default the run of the stage
    before it, in the folder beside `out`.
    """
    out = Path(out)
    device = pick_device(device) if isinstance(device, str) else device
    world = int(os.environ.get("WORLD_SIZE", 1))
    steps = cfg.steps or getattr(cfg, "epochs", 0)
    counts = (steps, cfg.batch, cfg.accum, cfg.log_every, cfg.grid_every, cfg.save_every,
              cfg.eval_n, cfg.size)
    if min(counts) < 1 or cfg.batch % (world * cfg.accum):
        raise ValueError(f"steps, batch, accum, eval_n, size, *_every must be at least 1, and batch"
                         f"={cfg.batch} a multiple of accum={cfg.accum} times {world} processes")
    if not 0 <= cfg.ema < 1:
        raise ValueError(f"ema={cfg.ema:g}: the rate of an average, from 0 to below 1")
    before = {"ldm": "ae", "cm": "pretrain"}.get(stage)
    latents = getattr(cfg, "latents", "")            # of stage cm: one-step INFD
    if before and not cfg.init and not latents and getattr(cfg, "generator", "func") == "func":
        cfg = replace(cfg, init=str(out.parent / before))
    set_tf32(cfg.tf32, device)
    kind = LatentCMStage if latents else STAGES[stage]
    made = kind(cfg, device, source, held_out, loss)
    introduce(made, out)
    fit(made, out)
    scores = made.scores() if ranks()[0] == 0 else {}
    if scores:
        (out / "eval.json").write_text(json.dumps(scores, indent=1) + "\n")
    apart = "" if made.held_out is made.source else "held-out "
    for scale, row in scores.items():
        if row["n"]:
            means = ", ".join(f"{name} {row[name]:.4g}" for name in list(row)[2:])
            print(f"{scale}, {row['px']} px, {row['n']} {apart}pictures: {means}")
    return made


def introduce(stage: Stage, out: Path) -> None:
    """Say what a run learns from, how large it is and where it goes."""
    cfg = stage.cfg
    source = stage.source
    some = ", ".join([*source.classes[:4], "..."][:len(source.classes)])
    used = "used" if stage.extra["classes"] else "not used"
    classes = f"{len(source.classes)} classes ({some}), {used}" if source.classes else "no classes"
    by = f"{source.split_by}: " * bool(source.split_by)
    held = f"{len(stage.held_out):,} held out ({by}their score says when to stop)"
    if stage.held_out is source:
        held = "none held out, so that scores are of the same pictures"
    over = f"; passed over: {source.passed_over}" if source.passed_over else ""
    crops = ""
    if isinstance(cfg, AERun):
        crops = f" and {cfg.patch} px patches of them at {cfg.size} to {cfg.max_size} px"
    parameters = sum(p.numel() for p in stage.net.parameters())
    print_once(f"stage {stage.name}: {len(source):,} pictures of {shown(cfg.data)} to "
               f"train on and {held}, centre squares at {cfg.size} px{crops}, {classes}{over}\n"
               f"{parameters:,} parameters, {cfg.steps:,} steps of batch {cfg.batch}, "
               f"{stage.device}, into {shown(out)}")


# ---- command line ----

MOVED = "demo, compare and bench are programs of experiments.py"


def parser() -> Parser:
    """Describe the command line."""
    p = Parser(description="Train. The same command again continues the run.", add_help=False,
               epilog="key=value sets an option of the stage; --help STAGE lists them")
    p.add_argument("--stage", default="ae", help=f"{', '.join(STAGES)} (default: ae)")
    p.add_argument("--preset", default="paper",
                   help="paper (default), small or tiny; of ae and ldm also sd: from Stable "
                        "Diffusion v1; of cm also ict and ect: improved consistency training, easy "
                        "consistency tuning; with latents=RUN denoiser, then onestep")
    p.add_argument("--data", default="synthetic",
                   help="a name, or the path of a folder or .zip of images (default: synthetic)")
    p.add_argument("--out", help="run folder (default: runs/DATA-PRESET/STAGE)")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, mps")
    p.add_argument("--check-data", action="store_true",
                   help="decode every picture, list the bad ones, and stop")
    p.add_argument("-h", "--help", nargs="?", const="", metavar="STAGE",
                   help="show this, or the options of a stage")
    p.add_argument("options", nargs="*", metavar="key=value")
    return p


def check_data(name: str) -> int:
    """Decode everything there is and list what cannot be used; returns the exit code."""
    bad = []
    for split in ("train", "val"):
        source = data.open_data(name, split)
        found = data.check_data(source)
        over = f"; passed over: {source.passed_over}" if source.passed_over else ""
        print(f"{split}: {len(source):,} pictures, {len(found)} bad{over}")
        bad += found
    for file, reason in bad:
        print(f"bad: {file}: {reason}")
    return 2 if bad else 0


def run(argv: list[str]) -> int:
    """Do what the command line says; returns the exit code."""
    words = {name for made in STAGES.values() for name in option_types(made.options)}
    args = parser().read(argv, f"--help STAGE lists the options of a stage; {MOVED}", words)
    if args.help is not None:
        print(option_help(args.help) if args.help else parser().format_help())
        return 0
    if args.check_data:
        return check_data(args.data)
    cfg = configure(args.stage, args.preset, args.data, args.options)
    device = pick_device(args.device)
    published = args.preset in ("paper", "sd", "ict", "ect")
    if published and device.type == "cpu" and args.device != "cpu":
        raise ValueError(f"preset {args.preset} takes days on GPUs (INFD: 4 A100, CM-Func: 1 A6000)"
                         f", and there is none; take --preset tiny, or insist with --device cpu")
    generator = getattr(cfg, "generator", "func")
    folder = args.stage if generator == "func" else f"{args.stage}-{generator}"
    out = Path(args.out or Path("runs", f"{Path(args.data).resolve().stem}-{args.preset}", folder))
    with process_group(device) as device:
        train(args.stage, cfg, out, device)
        print_once(f"done; next: {shlex.join(next_command(args, out))}")
    return 0


def next_command(args: argparse.Namespace, out: Path) -> list[str]:
    """The words of the command that goes on from a finished run."""
    after = {"ae": "ldm", "pretrain": "cm"}.get(args.stage)
    if after is None:
        return ["python", "sample.py", "--ckpt", str(out)]
    flags = {"--preset": args.preset, "--data": args.data, "--device": args.device}
    flags["--out"] = args.out and str(out.parent / after)
    words = ["python", "train.py", "--stage", after]
    for flag, value in flags.items():
        words += [flag, value] if value not in (None, parser().get_default(flag[2:])) else []
    if out.name != args.stage:                       # else the stage finds it by itself
        words.append(f"init={out}")
    return words + [text for text in args.options if text.startswith(("size=", "func."))]


def main(argv: list[str] | None = None) -> int:
    """The exit code: see `runs.cli`."""
    return cli(run, sys.argv[1:] if argv is None else argv, "stopped; the same command continues",
               "give accum=2 (or more), or a smaller batch, size or network")


if __name__ == "__main__":
    sys.exit(main())
