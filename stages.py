"""What the four stages of training share: options, gradients, optimisers, held-out scores.

stages_infd.py has ae and ldm, stages_func.py pretrain and cm, and stages_onestep.py cm in latents.
`train.step` trains any of them.
"""
from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import data
from autoencoder import Attention
from clif import ResBlock
from data import Source, to_tensor, to_uint8
from files import DataError
from inr_generator import AdaLNBlock, Block
from ldm import SelfAttention, TimeResBlock
from metrics import psnr
from pictures import contact_sheet
from runs import (all_mean, autocast_for, check_whole, choose, compiled, first_line, lay_out_state,
                  newest_checkpoint, print_once, ranks, read_checkpoint, torch_noise,
                  wants_channels_last, wants_compile)


@dataclass(frozen=True)
class Run:
    """Options of every stage."""

    data: str = "synthetic"           # set by --data: a name, or the path of a folder or zip
    seed: int = 0
    steps: int = 1_000_000
    batch: int = 8                    # pictures per optimiser step, over all micro-batches
    accum: int = 1                    # micro-batches per step: more need less memory
    lr: float = 3.6e-5                # INFD J.2; constant, no warm-up
    beta1: float = 0.9                # J.2 of stage ldm; open in CM-Func: those of Adam
    beta2: float = 0.999
    weight_decay: float = 0.0
    ema: float = 0.0                  # rate of the moving average of the weights; 0: none
    ema_warmup: bool = False          # min(ema, (1 + k) / (10 + k)), LDM's; published INFD: no
    size: int = 256                   # side of the network's input, pixels
    flip: bool = False                # random horizontal flips; the published code has none
    workers: int = 4                  # loader processes; the batches do not depend on it
    dtype: str = "auto"               # bf16 (autocast) | fp32 | auto: bf16 on a GPU that has it
    tf32: bool = True                 # CUDA: fp32 products with 10 bits of mantissa
    compile: str = "auto"             # on | off | graphs (CUDA graphs, too) | auto: on, on a GPU
    checkpoint: bool = False          # keep only the inputs of blocks: less memory, more time
    channels_last: str = "auto"       # NHWC: true | false | auto: on a GPU, if compiled
    log_every: int = 50
    grid_every: int = 5_000           # a sheet of pictures, and a held-out score into the log
    save_every: int = 5_000
    keep_every: int = 0               # also keep checkpoints whose step this divides; 0: the last 2
    eval_n: int = 64                  # held-out pictures in the scores


ADAMW = functools.partial(torch.optim.AdamW, fused=True)         # with weight_decay 0 Adam
BLOCKS = (ResBlock, Attention, TimeResBlock, SelfAttention, AdaLNBlock, Block)


def optimisers(net: nn.Module, cfg: Run, kind: Callable = ADAMW, muon: float = 0.0) -> list:
    """Make `kind`, and at a rate muon > 0 Muon for the matrices in blocks, which no paper has."""
    blocks = [m for m in net.modules() if muon and isinstance(m, (Block, AdaLNBlock))]
    inside = [p for block in blocks for name, p in block.named_parameters()
              if p.ndim == 2 and not name.startswith("modulation")]
    if muon and not inside:
        raise ValueError(f"muon={muon:g} is for transformers; leave it out")
    taken = set(map(id, inside))
    rest = [p for p in net.parameters() if id(p) not in taken]
    opts = [kind(rest, cfg.lr, (cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)]
    if muon:
        opts += [torch.optim.Muon(inside, muon, cfg.weight_decay, adjust_lr_fn="match_rms_adamw")]
    return opts


def set_rates(opts: list, lr: float, muon: float, factor: float) -> None:
    """Let what `optimisers` made go on at `factor` times its rates."""
    for opt, rate in zip(opts, (lr, muon)):
        opt.param_groups[0]["lr"] = rate * factor


def micro_batches(batch: dict[str, Tensor], accum: int) -> Iterator[dict[str, Tensor]]:
    """Cut a batch into `accum` parts, over which gradients add up."""
    for i in range(accum):
        yield {name: value.chunk(accum)[i] for name, value in batch.items()}


def add_up(logs: dict[str, Tensor], terms: dict[str, Tensor], accum: int) -> None:
    """Add what one of `accum` parts has to log to the mean over all; stays on the device."""
    for name, value in terms.items():
        logs[name] = logs.get(name, 0) + value.detach() / accum


def descend(opts: list[torch.optim.Optimizer], wanted: Tensor | bool = True) -> Tensor:
    """Step along the mean gradient of all ranks if that is finite and `wanted`; returns whether."""
    groups = [group for opt in opts for group in opt.param_groups]
    params = [p for group in groups for p in group["params"] if p.grad is not None]
    for p, mean in zip(params, all_mean([p.grad for p in params])):
        p.grad = mean
    norms = torch._foreach_norm([p.grad for p in params])
    taken = torch.isfinite(torch.stack(norms)).all() & wanted
    on_device = all(group.get("fused") for group in groups)      # not RAdam: the host waits then
    for opt in opts:
        if on_device:
            opt.found_inf = (~taken).float()         # as gradient scalers ask for it: leave all be
        if on_device or taken:
            opt.step()
        opt.zero_grad()
    return taken


def ema_update(ema: nn.Module, model: nn.Module, rate: float) -> None:
    """ema <- rate * ema + (1 - rate) * model, over all parameters; buffers are copied."""
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - rate)
        for mine, theirs in zip(ema.buffers(), model.buffers()):
            mine.copy_(theirs)


def keep_only_inputs(net: nn.Module) -> None:
    """Let the blocks of a network compute twice what the backward pass needs: option checkpoint."""
    for block in net.modules():
        if isinstance(block, BLOCKS):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class Stage:
    """What `fit` trains. A stage has build, batches, objective, validate and preview of its own.

    objective(part of a batch, k) -> (loss, what to log). See `train.step`.

    source, held_out: pictures, as `data.as_source` takes them; by default what option `data` names.
    loss: the caller's own, in place of what a stage says: two (B, 3, h, w) -> (B,), or in stages ae
    and pretrain the mean, ().
    """

    def __init__(self, cfg: Run, device: torch.device, source: Source | None = None,
                 held_out: Source | None = None, loss: Callable | None = None):
        if source is not None:
            cfg = replace(cfg, data=type(source).__name__)
        else:
            source = data.open_data(cfg.data, "train")
            held_out = data.open_data(cfg.data, "val") if held_out is None else held_out
        self.cfg = cfg                               # `build` adds what follows from the data
        self.device = device
        self.source = data.as_source(source)
        self.held_out = self.source if held_out is None else data.as_source(held_out)
        self.loss = loss
        self.autocast = autocast_for(cfg.dtype, device)
        self.extra: dict = {"classes": []}           # plain values that checkpoints hold as well
        self.build()

    def hold(self, net: nn.Module, calls: list[tuple], *frozen: nn.Module, **parts) -> None:
        """Name what learns, calls to compile, networks that stay as they are, and what else a
        checkpoint restores.
        """
        cfg = self.cfg
        if cfg.compile == "graphs" and cfg.accum > 1:
            raise ValueError("compile=graphs goes with accum=1: a replayed graph would overwrite "
                             "the gradients of the part before")
        self.net = net
        self.state = {"model": net, "opt": self.opts, **parts}
        self.frozen = frozen
        compiles = wants_compile(cfg.compile, self.device)
        if wants_channels_last(cfg.channels_last, self.device, compiles):
            self.lay_out(torch.channels_last)
        self.ema = copy.deepcopy(net).requires_grad_(False).eval() if cfg.ema else None
        self.shown = net if self.ema is None else self.ema
        for part in self.state.values():
            if cfg.checkpoint and isinstance(part, nn.Module):
                keep_only_inputs(part)
        if self.ema is not None:
            self.state["ema"] = self.ema
        otherwise = self.lay_out if cfg.channels_last == "auto" else None
        for owner, name in calls if compiles else ():
            setattr(owner, name, compiled(getattr(owner, name), cfg.compile, otherwise=otherwise))

    def lay_out(self, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        """Lay out the networks in memory, and what optimisers keep of their weights."""
        for part in (*self.frozen, *self.state.values()):
            if isinstance(part, nn.Module):
                part.to(memory_format=memory_format)
                continue
            for opt in part:
                lay_out_state(opt)

    @classmethod
    def implied(cls, given: dict) -> dict[str, object]:
        """Options fixed by the published file that `given` starts from (init=, start=)."""
        return {}

    def begin(self) -> None:
        """Take over what a new run starts from."""

    def scores(self) -> dict:
        return {}

    def collect(self) -> None:
        """Make what batches are made of, where that takes long: a signal ends it at once."""

    def prepare(self, k: int) -> None:
        """What comes before the forward pass of step k."""

    def follow(self, batch: dict, k: int, taken: Tensor) -> dict[str, Tensor]:
        """What comes after the optimiser's step k; returns what else to log."""
        return {}

    def tell_classes(self) -> int:
        """Note the classes that the network is told: those of the data, unless labels=false."""
        known = list(self.source.classes)
        choose("labels", self.cfg.labels, "auto", "true", "false")
        if self.cfg.labels == "true" and not known:
            raise ValueError(f"labels=true: {self.cfg.data} has no classes")
        self.extra["classes"] = [] if self.cfg.labels == "false" else known
        return len(self.extra["classes"])

    def loaded(self, start: int, make_item: Callable | None = None, source: Source | None = None,
               captions: bool = False, **noise: tuple) -> Iterator[dict]:
        """This rank's batches from step `start` on; only "index" and "caption" stay on the host."""
        cfg = self.cfg
        make_item = make_item or functools.partial(data.whole_item, size=cfg.size, flip=cfg.flip)
        for batch in data.loader(source or self.source, make_item, cfg.batch, start, cfg.seed,
                                 cfg.workers, *ranks(), self.device.type == "cuda", noise,
                                 captions):
            host = {key: batch.pop(key) for key in ("index", "caption") if key in batch}
            moved = {key: v.to(self.device, non_blocking=True) for key, v in batch.items()}
            yield moved | host

    @functools.cached_property
    def judged(self) -> tuple[list[int], Tensor, Tensor | None]:
        """Numbers of held-out pictures, they (n, 3, S, S), and labels (n,) if the net is told."""
        some = range(min(self.cfg.eval_n, len(self.held_out)))
        numbers, x, skipped = readable(some, self.held_out, self.cfg.size)
        data.report(skipped, len(skipped), len(some), len(some) - 1)
        y = torch.tensor([self.held_out.label(i) for i in numbers], device=self.device)
        return numbers, x.to(self.device), y if self.extra["classes"] else None

    def noise_like(self, x: Tensor) -> Tensor:
        """Noise for held-out pictures or latents x (n, ...), of each always the same."""
        noise = [torch_noise(one.shape, self.cfg.seed, "held out", i) for i, one in enumerate(x)]
        return torch.stack(noise).to(self.device)

    def sheet(self, rows: Sequence, side: int, folder: Path, k: int, what: str) -> None:
        """Write rows of pictures (h, w, 3) as the sheet of step k, with a caption above."""
        picture = Image.fromarray(contact_sheet(rows, side))
        page = Image.new("RGB", (picture.width, picture.height + 16), "white")
        page.paste(picture, (0, 16))
        ImageDraw.Draw(page).text((4, 2), f"step {k:,}, seed {self.cfg.seed}: {what}", "black")
        try:
            page.save(folder / f"grid-{k:08d}.png")
        except OSError as error:
            warnings.warn(f"the sheet of step {k} could not be written ({first_line(error)}); "
                          f"training goes on")


def drawn_at(pictures: list[data.Picture], size: int) -> Tensor:
    """Draw pictures whole, (B, 3, size, size) in [-1, 1]."""
    return torch.stack([to_tensor(picture.draw(size)) for picture in pictures])


def readable(numbers: Sequence[int], source: Source, size: int) -> tuple[list, Tensor, list[str]]:
    """`drawn_at` of those that can be read: their numbers, they, and why the others cannot."""
    kept = []
    drawn = [torch.empty(0, 3, size, size)]
    skipped = []
    for i in numbers:
        try:
            drawn.append(drawn_at([source[i]], size))
            kept.append(i)
        except DataError as error:
            skipped.append(str(error))
    return kept, torch.cat(drawn), skipped


def starting_point(init: str, *stages: str) -> tuple[str, dict[str, Tensor], dict]:
    """Read a run folder or file: its stage, its best weights (the average), all of it."""
    path = Path(init)
    ckpt = newest_checkpoint(path)[1] if path.is_dir() else read_checkpoint(path)
    if ckpt.get("stage") not in stages:
        raise ValueError(f"{init} is no run of stage {' or '.join(stages)}")
    check_whole(init, ckpt, "step", "state")
    print_once(f"starting from {path}, step {ckpt['step']}")
    state = ckpt["state"]                            # of an exported file one of the two is there
    best = "ema" if "ema" in state else "model"
    check_whole(init, state, best)
    return ckpt["stage"], state[best], ckpt


class Reconstruction(Stage):
    """A stage whose reconstruct(image (1, 3, S, S)) can be drawn at multiples of S: `scales`."""

    lpips: nn.Module | None = None

    @torch.no_grad()
    def evaluate(self, n: int, scales: Sequence[int]) -> dict:
        """Mean PSNR, LPIPS of n held-out pictures that large, and of their 1x render enlarged."""
        scores: dict = {f"{s}x": {"px": s * self.cfg.size, "n": 0} for s in scales}
        judges = {"psnr": psnr} | ({"lpips": self.lpips} if self.lpips else {})
        numbers, x, _ = self.judged
        for i, image in zip(numbers[:n], x.split(1)):
            drawn = self.reconstruct(image)
            picture = self.held_out[i]
            base = to_tensor(to_uint8(drawn.draw(self.cfg.size)[0]))[None]
            for row in scores.values():
                res = row["px"]
                if res > max(self.cfg.size, picture.size):
                    break
                truth = to_tensor(picture.draw(res))[None].to(self.device)
                rgb = to_tensor(to_uint8(drawn.draw(res)[0]))[None].to(self.device)
                bicubic = F.interpolate(base.to(truth), (res, res), mode="bicubic").clamp(-1, 1)
                row["n"] += 1
                for name, judge in judges.items():
                    for kind, made in (("render", rgb), ("bicubic", bicubic)):
                        total = row.get(f"{name}_{kind}", 0.0)
                        row[f"{name}_{kind}"] = total + judge(made, truth).item()
        for row in scores.values():
            row |= {key: row[key] / row["n"] for key in list(row)[2:]}
        return scores

    def validate(self) -> dict[str, Tensor]:
        return {"held_out_psnr": torch.tensor(self.evaluate(16, [1])["1x"]["psnr_render"])}

    def scores(self) -> dict:
        return self.evaluate(self.cfg.eval_n, self.scales)

    @torch.no_grad()
    def preview(self, folder: Path, k: int) -> None:
        numbers, x, _ = self.judged
        known = min(self.held_out[i].size for i in numbers[:4])      # of a prepared copy, no more
        sides = [s * self.cfg.size for s in self.scales
                 if s == 1 or s * self.cfg.size <= min(known, 512)]
        rows = []
        for i, image in zip(numbers[:4], x.split(1)):
            drawn = self.reconstruct(image)
            picture = self.held_out[i]
            row = [to_uint8(image[0])]
            for side in sides:
                row += [to_uint8(drawn.draw(side)[0]), picture.draw(side)]
            rows.append(row)
        self.sheet(rows, sides[-1], folder, k, f"input, then render | original at {sides} px")
