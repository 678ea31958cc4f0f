"""What every stage of training shares: its options, optimisers, averages, batches and scores.

Weights move in `descend`, alike on all ranks and only along finite gradients. `Stage` is what
train.py's `fit` calls. Next: stages.py, the four stages.
"""
from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import data
from autoencoder import Attention
from clif import Field, ResBlock
from data import Source, to_tensor, to_uint8
from inr_generator import AdaLNBlock, Block, ImageFunction
from ldm import SelfAttention, TimeResBlock
from metrics import psnr
from runs import (NotFinite, all_mean, autocast_for, compiled, newest_checkpoint, print_once,
                  ranks, read_checkpoint, wants_compile)
from sample import contact_sheet

Optimiser = torch.optim.Optimizer


@dataclass(frozen=True)
class Run:
    """Options of every stage."""

    data: str = "synthetic"           # set by --data: a name, or the path of a folder or zip
    seed: int = 0
    steps: int = 1_000_000
    batch: int = 8                    # pictures per optimiser step, over all micro-batches
    accum: int = 1                    # micro-batches per step: more need less memory
    lr: float = 3.6e-5                # INFD J.2; constant, no warm-up
    beta1: float = 0.5
    beta2: float = 0.9
    weight_decay: float = 0.0
    ema: float = 0.0                  # rate of the moving average of the weights; 0: none
    ema_warmup: bool = False          # min(ema, (1 + k) / (10 + k)) as in LDM; published INFD: no
    size: int = 256                   # side of the network's input, pixels
    flip: bool = False                # random horizontal flips; the published code has none
    workers: int = 4                  # loader processes; the batches do not depend on it
    dtype: str = "auto"               # auto: bf16 autocast on a GPU that has it, else fp32
    tf32: bool = True                 # CUDA: fp32 products with 10 bits of mantissa (bf16 has 7)
    compile: str = "auto"             # auto: torch.compile on a GPU, if the compiler works; on, off
    checkpoint: bool = False          # keep only the inputs of blocks: less memory, more time
    channels_last: bool = False       # convolutions in NHWC: no gain on a CPU
    log_every: int = 50
    grid_every: int = 5_000           # a sheet of pictures, and a held-out score into the log
    save_every: int = 5_000
    keep_every: int = 0               # also keep checkpoints whose step this divides; 0: the last 2
    eval_n: int = 64                  # held-out pictures in the scores


# ---- how weights move ----


def adam(kind: type, params: Iterable[Tensor], cfg: Run, device: torch.device,
         **more: float) -> Optimiser:
    """Make Adam or AdamW, in fused kernels where the device has them."""
    fused = device.type in ("cpu", "cuda")
    return kind(params, cfg.lr, (cfg.beta1, cfg.beta2), fused=fused, **more)


def with_muon(net: nn.Module, rate: float, make: Callable) -> list[Optimiser]:
    """Make the optimisers of a transformer: make(parameters), at a rate above 0 Muon beside it.

    Muon (Jordan et al. 2024) takes the matrices in the blocks and steps along the nearest
    orthogonal matrix to the momentum, here with the size that steps of Adam have at the same rate
    (Liu et al. 2025). Not in the papers, which have Adam and RAdam for everything.
    """
    if not rate:
        return [make(net.parameters())]
    blocks = [block for block in net.modules() if isinstance(block, (Block, AdaLNBlock))]
    inside = [p for block in blocks for name, p in block.named_parameters()
              if p.ndim == 2 and not name.startswith("modulation")]
    if not inside:
        raise ValueError(f"muon={rate:g} is for transformers, which this generator is not; "
                         f"leave it out")
    taken = set(map(id, inside))
    muon = torch.optim.Muon(inside, rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, make(p for p in net.parameters() if id(p) not in taken)]


def groups_of(optimisers: list[Optimiser]) -> list[dict]:
    """All parameter groups of some optimisers."""
    return [group for opt in optimisers for group in opt.param_groups]


def descend(optimisers: list[Optimiser], wanted: Tensor | None = None) -> Tensor:
    """Step along the mean gradient of all ranks, unless it is not finite or `wanted` () is false.

    Returns whether the step was taken, (). Fused optimisers decide that on the device and nothing
    waits. Others are decided by the host, which waits for the gradients once: RAdam has no fused
    kernel, and undoing its step would take copies of the weights and of both moments.
    """
    groups = groups_of(optimisers)
    params = [p for group in groups for p in group["params"] if p.grad is not None]
    for p, mean in zip(params, all_mean([p.grad for p in params])):
        p.grad = mean

    taken = torch.isfinite(torch.stack(torch._foreach_norm([p.grad for p in params]))).all()
    if wanted is not None:
        taken = taken & wanted
    on_device = all(group.get("fused") for group in groups)
    for opt in optimisers:
        if on_device:
            opt.found_inf = (~taken).float()         # as gradient scalers ask for it: leave all be
        if on_device or taken:
            opt.step()
        opt.zero_grad(set_to_none=True)
    return taken


def ema_update(ema: nn.Module, model: nn.Module, rate: float) -> None:
    """ema <- rate * ema + (1 - rate) * model, over all parameters; buffers are copied."""
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - rate)
        for mine, theirs in zip(ema.buffers(), model.buffers()):
            mine.copy_(theirs)


def micro_batches(batch: dict, accum: int) -> list[dict]:
    """Cut a batch into `accum` equal parts."""
    parts: list[dict] = [{} for _ in range(accum)]
    for name, value in batch.items():
        for part, piece in zip(parts, value.chunk(accum)):
            part[name] = piece
    return parts


def accumulate(logs: dict, part: dict, accum: int) -> dict:
    """Average what micro-batches report, on the device."""
    return logs | {name: logs.get(name, 0) + v.detach() / accum for name, v in part.items()}


BLOCKS = (ResBlock, Attention, TimeResBlock, SelfAttention, AdaLNBlock, Block)


def speed_up(cfg: Run, device: torch.device, nets: list[nn.Module],
             methods: list[tuple[nn.Module, str]]) -> None:
    """Apply options channels_last and checkpoint to networks and compile to methods, in place."""
    for net in nets:
        if cfg.channels_last:
            net.to(memory_format=torch.channels_last)
        for block in net.modules():
            if cfg.checkpoint and isinstance(block, BLOCKS):
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if wants_compile(cfg.compile, device):
        for module, name in methods:
            setattr(module, name, compiled(getattr(module, name), strict=cfg.compile == "on"))


# ---- what a stage is ----

STRIP = 16                            # pixels, height of the caption of a sheet


class Stage:
    """What `fit` trains: networks with their pictures, one iteration, and what shows how they do.

    source, held_out: pictures to learn from and to judge by, data.Source or any data set class
    that `data.as_source` takes; by default those that option `data` names. loss: one of the
    caller's own, where a stage says what it replaces. Everything is the same on all ranks.
    """

    name: str                         # as --stage has it
    options: type[Run]

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
        self.extra: dict = {}                        # plain values that checkpoints hold as well
        self.build()

    def build(self) -> None:
        """Make the networks and optimisers, and `hold` them."""
        raise NotImplementedError

    def hold(self, net: nn.Module, **parts) -> None:
        """Name what learns, and all else that a checkpoint restores; makes the moving average."""
        self.net = net
        self.ema = copy.deepcopy(net).requires_grad_(False).eval() if self.cfg.ema else None
        self.shown = net if self.ema is None else self.ema
        self.state = {"model": net, **parts}
        if self.ema is not None:
            self.state["ema"] = self.ema

    def begin(self) -> None:
        """Take over what a new run starts from; a continued one has it in its checkpoint."""

    def batches(self, start: int) -> Iterator[dict]:
        """This rank's share of the batches from step `start` on, on the device."""
        raise NotImplementedError

    def step(self, batch: dict, k: int) -> dict[str, Tensor]:
        """One iteration; () tensors to log, among them "taken": whether the optimiser moved."""
        raise NotImplementedError

    def validate(self) -> dict[str, Tensor]:
        """Cheap held-out scores for the log, () tensors."""
        return {}

    def scores(self) -> dict:
        """Held-out scores once training has ended, as `evaluate` gives them; {} for none."""
        return {}

    def preview(self, folder: Path, k: int) -> None:
        """Draw the sheet of step k."""

    def sheet(self, rows: list[list], side: int, folder: Path, k: int, caption: str) -> None:
        """Write rows of pictures (h, w, 3) as the sheet of step k, with a caption above."""
        picture = Image.fromarray(contact_sheet(rows, side))
        page = Image.new("RGB", (picture.width, picture.height + STRIP), "white")
        page.paste(picture, (0, STRIP))
        text = f"step {k:,}, seed {self.cfg.seed}: {caption}"
        ImageDraw.Draw(page).text((4, 2), text, "black")
        page.save(folder / f"grid-{k:08d}.png")

    def held_image(self, i: int) -> Tensor:
        """Held-out picture i at the training size, (1, 3, S, S)."""
        return to_tensor(self.held_out[i].draw(self.cfg.size))[None].to(self.device)

    def loaded(self, source: Source, make_item: Callable, start: int, noise: dict,
               workers: int | None = None) -> Iterator[dict]:
        """Batches from step `start` on with their noise, {key: shape}, moved to the device.

        From pinned memory, so that the host, which waits for no step, does not wait here either.
        "index", the samples' numbers, stays on the host, which needs them.
        """
        cfg = self.cfg
        rank, world = ranks()
        workers = cfg.workers if workers is None else workers
        stream = data.loader(source, make_item, cfg.batch, start, cfg.seed, workers, rank, world,
                             pin_memory=self.device.type == "cuda", noise=noise)
        for batch in stream:
            index = batch.pop("index")
            moved = {key: v.to(self.device, non_blocking=True) for key, v in batch.items()}
            yield moved | {"index": index}

    def whole_pictures(self, start: int, noise: dict) -> Iterator[dict]:
        """Batches of whole pictures at cfg.size."""
        item = functools.partial(picture_item, size=self.cfg.size, flip=self.cfg.flip)
        return self.loaded(self.source, item, start, noise)


def picture_item(picture: data.Picture, gen, size: int, flip: bool) -> dict:
    """A whole picture at `size`, perhaps mirrored: image (3, S, S)."""
    image = to_tensor(picture.draw(size))
    return {"image": image.flip(-1) if flip and gen.random() < 0.5 else image}


@dataclass
class Guard:
    """A value that a continued run must find as it was; stands among the parts of `state`."""

    value: str | int
    message: str                      # where it has changed; with {was} and {now}

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        if state["value"] != self.value:
            raise ValueError(self.message.format(was=state["value"], now=self.value))


def starting_point(init: str, *stages: str) -> tuple[str, dict[str, Tensor], dict]:
    """Read a run folder or file: its stage, its best weights (the average), its whole state."""
    path = Path(init)
    path, ckpt = newest_checkpoint(path) if path.is_dir() else (path, read_checkpoint(path))
    if ckpt.get("stage") not in stages:
        raise ValueError(f"{init} is no run of stage {' or '.join(stages)}")
    print_once(f"starting from {path}")
    state = ckpt["state"]
    return ckpt["stage"], state["ema"] if "ema" in state else state["model"], state


# ---- held-out scores of stages that reconstruct ----


@torch.no_grad()
def evaluate(reconstruct: Callable[[Tensor], Field | ImageFunction], source: Source, n: int,
             size: int, scales: list[int], device: torch.device,
             perceptual: Callable | None = None) -> dict:
    """Judge reconstructions of n held-out pictures: PSNR (and LPIPS) at multiples of `size`.

    Beside each stands bicubic upsampling of the 1x rendering. A picture counts at a scale if its
    original has that many pixels. reconstruct: image (1, 3, S, S) -> what draws it at any size.
    """
    scores: dict = {f"{scale}x": {"px": scale * size, "n": 0} for scale in scales}
    for i in range(min(n, len(source))):
        picture = source[i]
        drawn = reconstruct(to_tensor(picture.draw(size))[None].to(device))
        base = None
        for scale in scales:
            res = scale * size
            if res > picture.size:
                continue
            rgb = drawn.draw(res)                                # (1, 3, res, res)
            if not torch.isfinite(rgb).all():
                raise NotFinite("what is drawn is not finite; the newest checkpoint is good; "
                                "lower lr")
            rgb = to_tensor(to_uint8(rgb[0]))[None].to(device)
            base = rgb if base is None else base
            bicubic = F.interpolate(base, (res, res), mode="bicubic")
            truth = to_tensor(picture.draw(res))[None].to(device)
            found = {"n": 1, "psnr_render": psnr(rgb, truth).item(),
                     "psnr_bicubic": psnr(bicubic, truth).item()}
            if perceptual is not None:
                found["lpips_render"] = perceptual(rgb, truth).item()
                found["lpips_bicubic"] = perceptual(bicubic.clamp(-1, 1), truth).item()
            out = scores[f"{scale}x"]
            out |= {name: out.get(name, 0) + value for name, value in found.items()}
    for out in scores.values():
        out |= {k: round(v / out["n"], 4) for k, v in out.items() if k not in ("px", "n")}
    return scores


def psnr_at_1x(stage: Stage) -> dict[str, Tensor]:
    """Mean PSNR of up to 16 reconstructions at the training size, for the log."""
    n = min(16, stage.cfg.eval_n)
    size = stage.cfg.size
    scores = evaluate(stage.reconstruct, stage.held_out, n, size, [1], stage.device)
    return {"held_out_psnr": torch.tensor(scores["1x"]["psnr_render"])}


@torch.no_grad()
def reconstructions(stage: Stage, scales: list[int]) -> list[list]:
    """Four held-out pictures, a row each: the input, then render | truth at multiples of its size.

    A panel has at most 512 px: of a larger rendering it shows the centre, drawn as a window.
    """
    size = stage.cfg.size
    rows = []
    for i in range(min(4, len(stage.held_out))):
        picture = stage.held_out[i]
        drawn = stage.reconstruct(stage.held_image(i))
        row = [picture.draw(size)]
        for res in [scale * size for scale in scales]:
            side = min(res, max(size, 512))
            half = side / res
            corner = (res - side) // 2
            row.append(to_uint8(drawn.draw(side, (-half, -half, half, half))[0]))
            if res <= picture.size:
                row.append(picture.draw(res, (corner, corner, side, side)))
        rows.append(row)
    return rows
