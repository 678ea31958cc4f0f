"""The stages of CM-Func: pretrain (3.4), image functions that reconstruct, and cm (3.1).

A stage stands below its options, whose defaults are the paper's ("open": left open there).
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency import (ECT, ICT, ConsistencyConfig, ConsistencyModel, ResizedLPIPS, Schedule,
                         consistency_loss, denoising_distance, euler_step, heun_step, l2,
                         pseudo_huber)
from data import to_uint8
from inr_generator import (FunctionGenerator, GeneratorConfig, ImageFunction, TransformerConfig,
                           pixel_coord, variational_coord)
from ldm import UNetConfig
from metrics import lpips_network
from models import GENERATORS, INFD, OneStep, load, same_encoder
from runs import choose, flatten, load_weights, print_once, rng, unflatten
from stages import (Reconstruction, Run, Stage, ema_update, optimisers, set_rates,
                    starting_point)


@dataclass(frozen=True)
class PretrainRun(Run):
    """Stage pretrain: image functions learn to reconstruct (CM-Func 3.4, 4.1)."""

    steps: int = 0                    # 0: as many as `epochs` need
    epochs: int = 30                  # 4.1
    batch: int = 32                   # open in the paper: the reported hours fit 32
    lr: float = 1e-4                  # 4.1, Adam
    muon: float = 0.0                 # not in the paper: rate of Muon inside blocks; 0: Adam alone
    lr_drop: bool = False             # open: a tenth of lr in the last fifth, as in Trans-INR
    size: int = 64
    flip: bool = True                 # open: OpenAI's default, here and in stage cm
    func: GeneratorConfig = GeneratorConfig()


def moved_grid(noise: Tensor, corners: bool) -> Tensor:
    """Variational coordinates (B, S, S, 2) of the pixels, shifted by each sample's noise (3.2)."""
    grid = pixel_coord(noise.shape[1:3], corners=corners, device=noise.device)   # (S, S, 2)
    return variational_coord(grid, noise)


class PretrainStage(Reconstruction):
    """The function prediction reconstructs (CM-Func 3.4). loss(rgb, image): for squared error."""

    name = "pretrain"
    options = PretrainRun
    scales = (1, 2)

    def build(self) -> None:
        cfg = self.cfg
        self.loss = self.loss or F.mse_loss
        steps = cfg.steps or max(1, cfg.epochs * len(self.source) // cfg.batch)
        self.cfg = cfg = replace(cfg, steps=steps, func=replace(cfg.func, size=cfg.size))
        torch.manual_seed(cfg.seed)
        self.func = FunctionGenerator(cfg.func)
        self.func.encoder = nn.ModuleList()          # skipped here (3.4)
        self.func.to(self.device)
        self.drawer = copy.deepcopy(self.func)       # with the average of the weights
        net = nn.ModuleDict({"embed": self.func.embed, "predict": self.func.predict})
        self.opts = optimisers(net, cfg, muon=cfg.muon)
        self.hold(net, [(self.func, "redraw")])
        self.drawer.embed = self.shown["embed"]
        self.drawer.predict = self.shown["predict"]

    def batches(self, start: int) -> Iterator[dict]:
        return self.loaded(start, coord_noise=(self.cfg.size, self.cfg.size, 2))

    def prepare(self, k: int) -> None:
        late = self.cfg.lr_drop and k >= 0.8 * self.cfg.steps
        set_rates(self.opts, self.cfg.lr, self.cfg.muon, 0.1 if late else 1)

    def objective(self, part: dict, k: int) -> tuple[Tensor, dict]:
        """The squared error of M: the encoder is skipped, and sigma is 0."""
        x = part["image"]                                        # (B, 3, S, S)
        coord = moved_grid(part["coord_noise"], self.cfg.func.corners)           # (B, S, S, 2)
        with self.autocast():                        # c_in is 1 / sigma_data at sigma = 0
            rgb = self.func.redraw(x / ConsistencyConfig.sigma_data, coord)      # (B, 3, S, S)
        loss = self.loss(rgb, x).mean()                          # Eq. (10)
        return loss, {"loss": loss}

    def reconstruct(self, image: Tensor) -> ImageFunction:
        return self.drawer.reconstruct(image / ConsistencyConfig.sigma_data)


@dataclass(frozen=True)
class CMRun(Run):
    """Stage cm: consistency training of one of four generators (CM-Func 3.1, A.1, A.2)."""

    steps: int = 900_000              # A.2: 400,000 for CIFAR-10
    K: int = 0                        # steps that the schedule is planned for; 0: steps
    batch: int = 32                   # A.2
    lr: float = 5e-4                  # A.2, RAdam; open: no warm-up, clipping or weight decay
    muon: float = 0.0                 # not in the paper: rate of Muon inside blocks; 0: RAdam alone
    ema: float = 0.9999               # open: average to sample from, beside the teacher's
    size: int = 64
    flip: bool = True
    generator: str = "func"           # func | unet | uvit | dit (D.2.1, A.3)
    schedule: str = "ct"              # ct: the paper's | ict | ect, with the options of that name
    metric: str = "lpips"             # lpips (A.1) | l2 | huber; those two need no download
    lpips: str = "vgg"                # network of metric=lpips: vgg | alex | squeeze
    lpips_size: int = 224             # A.1
    lpips_window: int = 16            # with latents: it sees so many by so many of them, decoded
    l2_weight: float = 0.0            # not in the paper: of l2, on top of metric=lpips
    init: str = ""                    # run of stage pretrain (func: the one beside --out) or cm
    distil: str = ""                  # run of a denoiser: follow its trajectories, not x + r z
    solver: str = "heun"              # along them: heun | euler, for a distil= that answers in one
    latents: str = ""                 # run of stage ldm: one step in its latents, from its UNet
    p_uncond: float = 0.0             # with latents: of a denoiser that will guide, as stage ldm
    p_shorten: float = 0.0            # with latents: leave out words of captions, as stage ldm
    guidance: float = 1.0             # with latents, distil: the paths that lead to caption, class
    pictures: int = 0                 # with latents: learn from the first so many only; 0: all
    labels: str = "auto"              # auto: tell f the classes, if there are; true | false
    cm: ConsistencyConfig = ConsistencyConfig()
    ct: Schedule = Schedule()
    ict: ICT = ICT()
    ect: ECT = ECT()
    func: GeneratorConfig = GeneratorConfig()
    vit: TransformerConfig = TransformerConfig()                 # of uvit and dit
    # A.3, whose 4 heads of 64 channels fit 256 alone. open: resampling inside residual blocks.
    unet: UNetConfig = UNetConfig(model_channels=256, num_head_channels=64, resblock_updown=True)


class CMStage(Stage):
    """f goes from noise to image (function) in one step (CM-Func 3.1). loss(a, b): for metric."""

    name = "cm"
    options = CMRun

    def build(self) -> None:
        self.cfg = cfg = cm_config(self.cfg, self.tell_classes())
        torch.manual_seed(cfg.seed)
        network, _, option = GENERATORS[cfg.generator]
        net = network(getattr(cfg, option))
        self.assemble(ConsistencyModel(net, cfg.cm))

    def assemble(self, f: ConsistencyModel, base: INFD | None = None, **parts) -> None:
        """Put together what training f takes; base: whose latents f makes; parts: see `hold`."""
        cfg = self.cfg
        self.schedule = getattr(cfg, cfg.schedule)
        self.metric = self.loss or {"l2": l2, "huber": pseudo_huber}.get(cfg.metric)
        judges = []
        if self.metric is None:
            net = lpips_network(cfg.lpips, "train without it: metric=huber schedule=ect")
            self.metric = self.judge(net.to(self.device))
            judges = [self.metric]
        self.f = f.to(self.device)
        self.denoiser = None
        self.solver = {"heun": heun_step, "euler": euler_step}[cfg.solver]
        if cfg.distil:
            made = load(cfg.distil, self.device)
            classes = len(self.extra["classes"])
            same = type(made.f) is type(f) and made.size == cfg.size
            if not same or made.f.net.cfg.num_classes != classes:
                beside = f" and latents={cfg.latents}" if cfg.latents else ""
                raise ValueError(f"distil={cfg.distil} must be a run of stage cm at {cfg.size} px, "
                                 f"with {classes} classes{beside}")
            if base is not None and not same_encoder(made, base):
                raise ValueError(f"distil={cfg.distil} has other latents than "
                                 f"latents={cfg.latents}")
            self.denoiser = made.f
        self.makes_functions = hasattr(f.net, "function")
        self.target = self.f                         # without a teacher, its own
        teacher = {}
        if self.schedule.mu(0, cfg.K):
            self.target = copy.deepcopy(self.f).requires_grad_(False)
            teacher = {"target": self.target.net}
        self.opts = optimisers(f.net, cfg, torch.optim.RAdam, cfg.muon)
        self.distance = consistency_loss             # networks and metric in one graph, compiled
        frozen = judges if self.denoiser is None else [*judges, self.denoiser]
        self.hold(f.net, [(self, "distance")], *frozen, **teacher, **parts)

    def judge(self, lpips: nn.Module) -> nn.Module:
        """The metric of metric=lpips."""
        return ResizedLPIPS(lpips, self.cfg.lpips == "vgg", self.cfg.lpips_size,
                            self.cfg.l2_weight)

    def metric_at(self, index: Tensor, k: int) -> Callable:
        """The metric of the samples `index` (B,) in step k."""
        return self.metric

    def begin(self) -> None:
        """Take over what stage pretrain has learned (3.4), or all of a run of stage cm to tune."""
        init = self.cfg.init
        if init in ("", "none"):
            return
        if not Path(init).exists():
            raise ValueError(f"no run at {init}: run --stage pretrain first, or give init=none")
        stage, best, ckpt = starting_point(init, "pretrain", "cm")
        if stage == "pretrain" and self.cfg.generator != "func":
            raise ValueError(f"init={init}: only generator=func has a pre-training")
        if self.cfg.generator == "func":
            warn_of_others(init, flatten(ckpt.get("config", {})), flatten(self.cfg))
        part = self.net
        if stage == "pretrain":
            part = nn.ModuleDict({"embed": part.embed, "predict": part.predict})
        load_weights(part, best, f"the weights in {init}")
        self.target.net.load_state_dict(self.net.state_dict())

    def batches(self, start: int) -> Iterator[dict]:
        size = self.cfg.size
        coord = {"coord_noise": (size, size, 2)} if self.makes_functions else {}
        return self.loaded(start, noise=(3, size, size), **coord)

    def levels(self, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Noise levels t > r (B,) of the samples, on the host: drawn for all of step k."""
        cfg = self.cfg
        seed = int(rng(cfg.seed, "levels", k).integers(2**62))
        generator = torch.Generator().manual_seed(seed)
        drawn = self.schedule.levels(k, cfg.K, cfg.batch, generator, cfg.cm)
        return tuple(v[index % cfg.batch] for v in drawn)

    def objective(self, part: dict, k: int) -> tuple[Tensor, dict]:
        """Student to target, at the same noise and coordinates; with a denoiser: distillation."""
        t, r = self.levels(part["index"], k)                     # (B,), on the host
        target = self.target if (r > 0).any() else None
        t, r = (v.to(self.device, non_blocking=True) for v in (t, r))
        y = part["label"] if self.extra["classes"] else None
        coord = {}
        if self.makes_functions:                                 # (B, S, S, 2)
            coord["coord"] = moved_grid(part["coord_noise"], self.cfg.func.corners)
        with self.autocast():
            d = self.distance(self.f, target, part["image"], part["noise"], t, r,
                              self.metric_at(part["index"], k), y, self.denoiser,
                              part.get("context"), self.solver, **coord)         # (B,)
        loss = (self.schedule.weight(t, r) * d).mean()           # Eq. (5)
        return loss, {"loss": loss, "difference": d.mean()}

    def follow(self, batch: dict, k: int, taken: Tensor) -> dict[str, Tensor]:
        """The teacher: theta^- <- mu theta^- + (1 - mu) theta. Logs the place in the schedule."""
        if self.target is not self.f:
            ema_update(self.target, self.f, self.schedule.mu(k, self.cfg.K))
        place = self.schedule.log(k, self.cfg.K).items()
        return {name: torch.tensor(value) for name, value in place}

    def validate(self) -> dict[str, Tensor]:
        """Denoising distance of the student (Section 4.1, Appendix B)."""
        _, x, y = self.judged
        distances = denoising_distance(self.f, x, self.noise_like(x), y)[1]
        return {"denoising_distance": distances.mean()}

    @torch.no_grad()
    def preview(self, folder: Path, k: int) -> None:
        size = self.cfg.size
        model = OneStep(ConsistencyModel(self.shown, self.cfg.cm), size)
        rows = [to_uint8(model.sample(range(8), self.cfg.seed))]
        if self.makes_functions:
            rows += [to_uint8(model.functions(range(8), self.cfg.seed).draw(2 * size))]
        self.sheet(rows, 2 * size, folder, k, f"samples at {size} px, functions at {2 * size} px")


def smallest(lpips: str) -> int:
    """Side in pixels of which every layer of a network of LPIPS still has features."""
    return 32 if lpips == "alex" else 16


UNSEEN = ("func.pe_", "func.position_", "func.head", "func.corners")     # in shapes of weights


def warn_of_others(init: str, theirs: dict, ours: dict) -> None:
    """Say which options of the image function differ without another shape of the weights."""
    differ = [f"{name}: {value} -> {ours[name]}" for name, value in theirs.items()
              if name.startswith(UNSEEN) and ours.get(name, value) != value]
    if differ:
        print_once(f"warning: what {init} learned was of other options ({'; '.join(differ)})")


def cm_config(cfg: CMRun, classes: int) -> CMRun:
    """Fill in what follows from the data and from other options; ValueError for unknown names."""
    choose("schedule", cfg.schedule, "ct", "ict", "ect")
    choose("metric", cfg.metric, "lpips", "l2", "huber")
    choose("solver", cfg.solver, "heun", "euler")
    choose("generator", cfg.generator, *GENERATORS)
    if cfg.unet.dropout:
        raise ValueError("unet.dropout: student and teacher would each leave out units of their "
                         "own, and their loss would not end; stage cm has none")
    if cfg.solver != CMRun.solver and not cfg.distil:
        raise ValueError(f"solver={cfg.solver} goes with distil=RUN, whose trajectories it follows")
    if cfg.l2_weight and (cfg.metric != "lpips" or not 0 < cfg.l2_weight < math.inf):
        raise ValueError(f"l2_weight={cfg.l2_weight:g}: a positive number, with metric=lpips")
    for name in ("p_uncond", "p_shorten", "guidance", "pictures", "lpips_window"):
        if getattr(cfg, name) != getattr(CMRun, name) and not cfg.latents:
            raise ValueError(f"{name} goes with latents=RUN, a run of stage ldm")
    if cfg.latents and cfg.lpips_size != CMRun.lpips_size:
        raise ValueError("lpips_size: with latents=RUN, lpips_window says how much LPIPS sees")
    if cfg.lpips_size < smallest(cfg.lpips):
        raise ValueError(f"lpips_size={cfg.lpips_size}: LPIPS needs {smallest(cfg.lpips)} px")
    if not cfg.latents and (cfg.unet.in_channels, cfg.unet.out_channels) != (3, 3):
        raise ValueError("unet.in_channels, unet.out_channels: pictures have 3; leave them out")
    part = GENERATORS[cfg.generator][2]
    own = {"K": cfg.K or cfg.steps, f"{part}.num_classes": classes}
    if part != "unet":
        own[f"{part}.size"] = cfg.size
    return unflatten(CMRun, own, cfg)
