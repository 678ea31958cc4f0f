"""Train: the loop, the presets, and the command line.

    python train.py --stage ae --preset tiny         encoder, decoder, renderer (INFD, Section J)
    python train.py --stage ldm --preset tiny        diffusion of that autoencoder's latents
    python train.py --stage pretrain --preset tiny   image functions that reconstruct (CM-Func, 3.4)
    python train.py --stage cm --preset tiny         consistency training (CM-Func, 3.1)

The same command again continues the run. stages.py has what one step of each stage does. From
Python, with pictures and a loss of one's own:

    train("ae", AERun(steps=1000), Path("runs/mine"), device, source=pictures, loss=my_loss)
"""
from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
from runs import (RunFolder, Stopped, barrier, cli, flatten, nearest, option_types, parse_options,
                  pick_device, print_once, process_group, ranks, rng, set_tf32, unflatten)
from stages import STAGES, AERun, CMRun, LDMRun, PretrainRun
from training import Run, Stage, ema_update

# A run may be continued with these changed; anything else belongs to another run. Data is compared
# by content instead of by name, and what init led to is in the checkpoint.
FREE = frozenset({"data", "init", "steps", "K", "accum", "workers", "dtype", "tf32", "compile",
                  "checkpoint", "channels_last", "log_every", "grid_every", "save_every",
                  "keep_every", "preview_steps", "eval_n"})


# ---- the loop ----


def fit(stage: Stage, out: Path) -> None:
    """Train from where the newest checkpoint in `out` stands to cfg.steps; log, draw and save.

    Raises Stopped after a signal (the run is saved), NotFinite after 20 steps in a row without
    finite gradients, NotSaved, and ValueError where the folder holds another run.
    """
    cfg = stage.cfg
    trained_on = data.fingerprint(stage.source)
    with RunFolder(out, stage.name, cfg, FREE, trained_on, cfg.keep_every) as folder:
        start = folder.resume(stage.state)
        if start == 0:
            stage.begin()
        stream = stage.batches(start)
        meter = folder.meter
        bar = tqdm(total=cfg.steps, initial=start, desc=stage.name, unit="step",
                   disable=True if ranks()[0] else None, dynamic_ncols=True)

        for k in range(start, cfg.steps):
            batch = meter.wait_for(stream)
            torch.manual_seed(dropout_seed(cfg, k))
            logs = stage.step(batch, k)              # forward, loss, backward, optimiser
            if stage.ema is not None:
                ema_update(stage.ema, stage.net, ema_rate(cfg, k))

            done = k + 1
            last = done == cfg.steps
            judged = last or done % cfg.grid_every == 0
            if judged:
                with meter.paused():
                    logs |= stage.validate()
            meter.add(logs, cfg.batch, k, batch["index"])
            bar.update(1)
            if last or done % cfg.log_every == 0:
                line = {"step": done, **meter.means()}
                folder.log(line)
                show(bar, line, cfg)

            with meter.paused():
                signalled = folder.stopping()
                if last or signalled or done % cfg.save_every == 0:
                    folder.save(done, stage.state, stage.extra, last=last or signalled > 0)
                if judged and ranks()[0] == 0:
                    stage.preview(out, done)
            if signalled:
                bar.close()
                barrier()                            # torchrun ends all as soon as one has ended
                raise Stopped(128 + signalled)
        bar.close()


def dropout_seed(cfg: Run, k: int) -> int:
    """Give step k random numbers of its own, whatever came before; only dropout draws them."""
    return int(rng(cfg.seed, "dropout", k, ranks()[0]).integers(2**62))


def show(bar: tqdm, line: dict, cfg: Run) -> None:
    """Show a line of the log: behind the bar, or printed where there is no terminal."""
    wanted = ("loss", "held_out_psnr", "held_out_loss", "denoising_distance", "images_per_s")
    shown = {name: line[name] for name in wanted if name in line}
    if not bar.disable:
        bar.set_postfix(shown)
        return
    minutes = (cfg.steps - line["step"]) * cfg.batch / max(line["images_per_s"], 1e-9) / 60
    values = ", ".join(f"{name} {value:g}" for name, value in shown.items())
    print_once(f"step {line['step']:,} of {cfg.steps:,}: {values}, {minutes:.1f} minutes to go")


def ema_rate(cfg: Run, k: int) -> float:
    """Rate of the moving average at step k."""
    return min(cfg.ema, (1 + k) / (10 + k)) if cfg.ema_warmup else cfg.ema


# ---- presets ----

# Parts of the presets of stage cm: the later recipes, and the generator for two CPU cores.
CM_ICT = {"schedule": "ict", "metric": "huber"}
CM_ECT = {"schedule": "ect", "metric": "huber", "cm.sigma_min": 0.003, "cm.boundary": False}
SMALL_FUNC = {"func.dim": 384, "func.heads": 6, "func.encoder_depth": 6, "func.decoder_depth": 4,
              "func.hidden": 128}
TINY_FUNC = {"size": 64, "func.patch": 8, "func.dim": 192, "func.heads": 6, "func.encoder_depth": 3,
             "func.decoder_depth": 2, "func.groups": 48, "func.layers": 3, "func.hidden": 48,
             "func.pe_dim": 48, "func.pe_sigma": 64.0}
OFTEN = {"grid_every": 2000, "save_every": 2000}

# What a preset changes from the defaults of stages.py, which are the paper's ("paper": FFHQ for
# INFD, CelebA for CM-Func), with the names of the command line.
PRESETS = {
    "ae": {
        "paper": {},                                 # J.2: about 4 days on 4 A100
        "small": OFTEN | {"steps": 30_000, "lr": 1e-4, "ae.ch": 64, "ae.hidden": 128, "ema": 0.999},
        # Narrow and shallow: in minutes the number of steps counts for more than the width.
        "tiny": {"steps": 3000, "batch": 4, "lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "size": 64,
                 "patch": 64, "max_size": 256, "p_whole": 0.5, "lpips": "none", "gan_weight": 0.0,
                 "reg_weight": 1e-6, "ae.ch": 16, "ae.num_res_blocks": 1, "ae.groups": 8,
                 "ae.kl": True, "ae.hidden": 32, "ema": 0.998, "ema_warmup": True, "workers": 1,
                 "grid_every": 1000, "save_every": 1000},
    },
    "ldm": {
        "paper": {},                                 # J.2: about 4 days per 1M steps on 4 A100
        "small": OFTEN | {"steps": 40_000, "lr": 2e-4, "ema": 0.999, "ema_warmup": True,
                          "latent_norm": True, "unet.model_channels": 128},
        "tiny": {"steps": 1500, "batch": 32, "lr": 1e-3, "ema": 0.998, "ema_warmup": True,
                 "size": 64, "latent_norm": True, "pictures": 4096, "cache": True,
                 "unet.model_channels": 64, "unet.channel_mult": (1, 2), "unet.num_res_blocks": 1,
                 "unet.attention_ds": (2,), "unet.groups": 16, "workers": 1, "log_every": 20,
                 "grid_every": 500, "save_every": 500},
    },
    "pretrain": {
        "paper": {},                                 # Table 3: 13 hours on an A6000
        "small": SMALL_FUNC | OFTEN | {"epochs": 0, "steps": 20_000, "lr": 3e-4},
        "tiny": TINY_FUNC | {"steps": 4000, "batch": 8, "lr": 1e-3, "lr_drop": True, "workers": 1,
                             "grid_every": 1000, "save_every": 1000},
    },
    "cm": {
        "paper": {},                                 # Table 3: 224 hours on an A6000
        "ict": CM_ICT,                               # the paper's networks and lengths, without
        "ect": CM_ECT,                               # LPIPS and without a teacher
        # Easy consistency tuning: no second copy of the weights, no LPIPS, and pictures long
        # before the paper's recipe.
        "small": CM_ECT | SMALL_FUNC | OFTEN | {
            "steps": 60_000, "batch": 64, "lr": 3e-4, "ema": 0.999, "ema_warmup": True,
            "vit.dim": 384, "vit.heads": 6, "vit.depth": 11, "unet.model_channels": 96,
            "unet.num_head_channels": 32},
        # Few wide steps along the noise, and weight on the large levels: an image function of this
        # size cannot draw the noise that F has to at small ones, and ECT's own weights, greatest
        # there, wash the pre-training out.
        "tiny": CM_ECT | TINY_FUNC | {
            "steps": 2000, "batch": 16, "lr": 3e-4, "ema": 0.998, "ema_warmup": True,
            "ect.stages": 2, "ect.gap_weight": False, "ect.P_mean": 1.0, "vit.patch": 8,
            "vit.dim": 128, "vit.depth": 7, "vit.heads": 4, "unet.model_channels": 16,
            "unet.channel_mult": (1, 2, 3, 4), "unet.num_res_blocks": 1,
            "unet.attention_ds": (4, 8), "unet.groups": 8, "unet.num_head_channels": 16,
            "workers": 1, "log_every": 20, "grid_every": 500, "save_every": 500},
    },
}

# The published settings of one data set, on top of preset paper. The supplementary says 1M steps
# with the switch at 600K (J.2: "in the last 400K iterations"); the published configuration for such
# data has these. It also leaves the second stage at 600K steps, where the text says 1.7M for
# Mountains: steps=1.7e6 follows the text.
PAPER_DATA = {
    ("ae", "mountains"): {"steps": 1_200_000, "p_original": 0.5, "original_from": 800_000},
    ("pretrain", "cifar10"): {"size": 32},
    ("pretrain", "lsun-church"): {"size": 128},
    ("pretrain", "lsun-classroom"): {"size": 128},
    ("cm", "cifar10"): {"size": 32, "steps": 400_000, "ct.mu0": 0.9},
    ("cm", "lsun-church"): {"size": 128},
    ("cm", "lsun-classroom"): {"size": 128},
}

# CM-Func by resolution (A.2, D.2.1; attention of the UNet at 32, 16, 8 px). The text has four
# levels at 128 px too; with the published default of five the network grows with the resolution,
# as Figure 2 says: unet.channel_mult=1,2,3,4.
PAPER_SIZE = {
    32: {"func.patch": 4, "vit.patch": 4, "unet.attention_ds": (1, 2, 4)},
    64: {"func.patch": 4, "vit.patch": 4, "unet.attention_ds": (2, 4, 8)},
    128: {"func.patch": 8, "vit.patch": 8, "unet.attention_ds": (4, 8, 16),
          "unet.channel_mult": (1, 1, 2, 3, 4)},
}

COST = {"ae": "1,000,000 steps of batch 8: about 4 days on 4 A100",
        "ldm": "600,000 steps of batch 48: about 2.5 days on 4 A100",
        "pretrain": "30 epochs: 13 hours on an A6000 for CelebA at 64 px (Table 3)",
        "cm": "900,000 steps of batch 32: 224 hours on an A6000 for CelebA at 64 px (Table 3)"}


def configure(stage: str, preset: str = "paper", data_name: str = "synthetic",
              texts: Sequence[str] = ()) -> Run:
    """Put the options of a run together: defaults, the preset, then key=value texts.

    Raises ValueError for an unknown stage, preset or option and for a value of the wrong type.
    """
    if stage not in STAGES:
        raise ValueError(f"there is no stage {stage}; there are: {', '.join(STAGES)}")
    if preset not in PRESETS[stage]:
        raise ValueError(f"stage {stage} has no preset {preset}; there are: "
                         f"{', '.join(PRESETS[stage])}")
    for text in texts:
        if text.startswith("data="):
            raise ValueError(f"{text}: write --data {text.removeprefix('data=')}")
    cls = STAGES[stage].options
    known = option_types(cls)
    given = parse_options(cls, list(texts), f"stage {stage}")
    chosen = dict(PRESETS[stage][preset])
    if preset not in ("small", "tiny"):
        chosen = PAPER_DATA.get((stage, data_name), {}) | chosen
    size = given.get("size", chosen.get("size", cls.size))
    by_size = {name: v for name, v in PAPER_SIZE.get(size, {}).items() if name in known}
    return unflatten(cls, {**by_size, **chosen, "data": data_name, **given})


# ---- from a configuration to a trained model ----


def train(stage: str, cfg: Run, out: str | Path, device: str | torch.device,
          source: data.Source | None = None, held_out: data.Source | None = None,
          loss: Callable | None = None) -> Stage:
    """Train a stage into a run folder, score it, and say what to do next; returns the stage.

    source, held_out, loss: pictures and a loss of one's own, see `Stage`. What a stage starts from
    is by default the run of the stage before it, in the folder beside `out`.
    """
    check(cfg)
    out = Path(out)
    device = pick_device(device) if isinstance(device, str) else device
    before = {"ldm": "ae", "cm": "pretrain"}.get(stage)
    if before and not cfg.init and getattr(cfg, "generator", "func") == "func":
        cfg = replace(cfg, init=str(out.parent / before))
    set_tf32(cfg.tf32, device)
    made = STAGES[stage](cfg, device, source, held_out, loss)
    introduce(made, out)
    fit(made, out)
    scores = made.scores() if ranks()[0] == 0 else {}
    if scores:
        (out / "eval.json").write_text(json.dumps(scores, indent=1) + "\n")
        print(score_lines(scores))
    print_once(f"done; next: {NEXT[stage].format(out=out)}")
    return made


def introduce(stage: Stage, out: Path) -> None:
    """Say what a run learns from, how large it is and where it goes."""
    cfg = stage.cfg
    names = stage.source.classes
    classes = "no classes"
    if names:
        more = ", ..." if len(names) > 4 else ""
        used = "used" if stage.extra.get("classes") else "not used"
        classes = f"{len(names)} classes ({', '.join(names[:4])}{more}), {used}"
    held = f"{len(stage.held_out):,} held out"
    if stage.held_out is stage.source:
        held = "none held out, so that scores are of the same pictures"
    over = f"; passed over: {stage.source.passed_over}" if stage.source.passed_over else ""
    parameters = sum(p.numel() for p in stage.net.parameters())
    print_once(f"stage {stage.name}: {len(stage.source):,} pictures of {data.shown(cfg.data)} to "
               f"train on and {held}, centre squares at {cfg.size} px, {classes}{over}")
    print_once(f"{parameters:,} parameters, {cfg.steps:,} steps of batch {cfg.batch}, "
               f"{stage.device}, into {data.shown(out)}")


NEXT = {"ae": "python train.py --stage ldm init={out}, with the same --data and --preset",
        "ldm": "python sample.py --ckpt {out}",
        "pretrain": "python train.py --stage cm init={out}, with the same --data and --preset",
        "cm": "python sample.py --ckpt {out}"}


def check(cfg: Run) -> None:
    """Raise ValueError for numbers that cannot be: of steps and batches, over all processes."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    steps = cfg.steps or getattr(cfg, "epochs", 0)
    counts = (steps, cfg.batch, cfg.accum, cfg.log_every, cfg.grid_every, cfg.save_every)
    if min(counts) < 1 or cfg.batch % cfg.accum:
        raise ValueError("steps, batch, accum and the *_every options must be at least 1, and "
                         "accum must divide batch")
    if cfg.batch % (world * cfg.accum):
        raise ValueError(f"batch={cfg.batch} cannot be shared by {world} processes with "
                         f"accum={cfg.accum}; choose a multiple of {world * cfg.accum}")


def score_lines(scores: dict) -> str:
    """The scores of `evaluate` in words, a line for each scale."""
    lines = []
    for scale, row in scores.items():
        if row["n"]:
            line = (f"{scale}, {row['px']} px, {row['n']} held-out pictures: PSNR "
                    f"{row['psnr_render']:.2f}, of bicubic from 1x {row['psnr_bicubic']:.2f}")
            if "lpips_render" in row:
                line += f"; LPIPS {row['lpips_render']:.4f}, {row['lpips_bicubic']:.4f}"
            lines.append(line)
    return "\n".join(lines)


# ---- command line ----

MOVED = {"demo": "python experiments.py demo", "compare": "python experiments.py compare NAME",
         "bench": "python experiments.py bench STAGE"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Train. The same command again continues the run.", add_help=False,
        allow_abbrev=False, epilog="key=value sets an option of the stage; --help STAGE lists them")
    p.add_argument("--stage", default="ae", help=f"{', '.join(STAGES)} (default: ae)")
    p.add_argument("--preset", default="paper",
                   help="paper (default), small or tiny; of stage cm also ict and ect: improved "
                        "consistency training, easy consistency tuning")
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


def option_help(stage: str) -> str:
    """List the options of a stage, grouped: name, default, and the comment in the code."""
    cls = STAGES[stage].options
    groups = [("", Run), ("", cls)]
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


def refuse_unknown(args: argparse.Namespace, unknown: list[str]) -> None:
    """Raise ValueError for flags that there are not, with what to write instead."""
    flag, _, value = unknown[0].lstrip("-").partition("=")
    if flag in MOVED:
        raise ValueError(f"--{flag} has moved: {MOVED[flag]}")
    known = option_types(STAGES[args.stage].options) if args.stage in STAGES else {}
    name = flag.replace("-", "_")
    if name in known:
        loose = [text for text in (*args.options, *unknown[1:]) if "=" not in text]
        raise ValueError(f"there is no flag --{flag}; write {name}={value or [*loose, 'VALUE'][0]}")
    raise ValueError(f"there is no flag {unknown[0]}{nearest(name, known)}")


def check_data(name: str) -> int:
    """Decode everything there is and list what cannot be used; returns the exit code."""
    bad = []
    for split in ("train", "val"):
        source = data.open_data(name, split)
        found = data.check_data(source)
        print(f"{split}: {len(source):,} pictures, {len(found)} bad")
        bad += found
    if source.passed_over:
        print(f"passed over: {source.passed_over}")
    for file, reason in bad:
        print(f"bad: {file}: {reason}")
    return 2 if bad else 0


def run(argv: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    args, unknown = parser().parse_known_intermixed_args(argv.texts)
    if args.help:
        if args.help not in STAGES:
            raise ValueError(f"there is no stage {args.help}; there are: {', '.join(STAGES)}")
        print(option_help(args.help))
        return 0
    if args.help == "":
        parser().print_help()
        return 0
    if args.stage in MOVED:
        raise ValueError(f"--stage {args.stage} has moved: {MOVED[args.stage]}")
    if unknown:
        refuse_unknown(args, unknown)
    if args.check_data:
        return check_data(args.data)

    cfg = configure(args.stage, args.preset, args.data, args.options)
    device = pick_device(args.device)
    if args.preset not in ("small", "tiny") and device.type == "cpu" and args.device != "cpu":
        raise ValueError(f"preset {args.preset} of stage {args.stage} is {COST[args.stage]}; there "
                         f"is no GPU here. Take --preset tiny (minutes on two CPU cores), or "
                         f"insist with --device cpu")
    generator = getattr(cfg, "generator", "func")
    folder = args.stage if generator == "func" else f"{args.stage}-{generator}"
    out = Path("runs") / f"{Path(args.data).stem}-{args.preset}" / folder
    with process_group(device) as device:
        train(args.stage, cfg, Path(args.out) if args.out else out, device)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The exit code: see `runs.cli`."""
    texts = list(sys.argv[1:] if argv is None else argv)
    return cli(run, argparse.Namespace(texts=texts), "stopped; the same command continues",
               "give accum=2 (or more): the same steps in smaller parts; or a smaller batch, size, "
               "or network")


if __name__ == "__main__":
    sys.exit(main())
