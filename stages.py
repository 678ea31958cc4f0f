"""The four stages: ae and ldm of INFD (Section J), pretrain and cm of CM-Func (3.4, 3.1).

A stage stands below its options, whose defaults are the papers' ("open": left open there). train.py
calls `step`: forward and loss (`objective`), `backward`, `descend`.
"""
from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset

import data
from autoencoder import (Attention, AutoencoderConfig, DiscriminatorConfig, FieldAutoencoder,
                         PatchDiscriminator, adaptive_weight, first_order, hinge_loss)
from clif import Field, ResBlock
from consistency import (ECT, ICT, ConsistencyConfig, ConsistencyModel, Schedule, consistency_loss,
                         denoising_distance, l2, lpips_resized, pseudo_huber)
from data import DataConfig, Source, to_tensor, to_uint8
from inr_generator import (AdaLNBlock, Block, FunctionGenerator, GeneratorConfig, ImageFunction,
                           TransformerConfig, pixel_coord, variational_coord)
from ldm import DiffusionConfig, GaussianDiffusion, SelfAttention, TimeResBlock, UNet, UNetConfig
from metrics import lpips_network, psnr
from runs import (all_mean, autocast_for, compiled, flatten, load_weights, newest_checkpoint,
                  print_once, ranks, read_checkpoint, rng, torch_noise, unflatten, wants_compile)
from sample import (GENERATORS, INFD, LatentScale, OneStep, build_generator, contact_sheet, load)


@dataclass(frozen=True)
class Run:
    """Options of every stage."""

    data: str = "synthetic"           # set by --data: a name, or the path of a folder or zip
    seed: int = 0
    steps: int = 1_000_000
    batch: int = 8                    # pictures per optimiser step, over all micro-batches
    accum: int = 1                    # micro-batches per step: more need less memory
    lr: float = 3.6e-5                # INFD J.2; constant, no warm-up
    beta1: float = 0.9                # open: those of Adam, but for stage ae
    beta2: float = 0.999
    weight_decay: float = 0.0
    ema: float = 0.0                  # rate of the moving average of the weights; 0: none
    ema_warmup: bool = False          # min(ema, (1 + k) / (10 + k)) as in LDM; published INFD: no
    size: int = 256                   # side of the network's input, pixels
    flip: bool = False                # random horizontal flips; the published code has none
    workers: int = 4                  # loader processes; the batches do not depend on it
    dtype: str = "auto"               # bf16 (autocast) | fp32 | auto: bf16 on a GPU that has it
    tf32: bool = True                 # CUDA: fp32 products with 10 bits of mantissa
    compile: str = "auto"             # on | off | auto: on a GPU, if the compiler works
    checkpoint: bool = False          # keep only the inputs of blocks: less memory, more time
    channels_last: bool = False       # convolutions in NHWC: no gain on a CPU
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
        opts += [torch.optim.Muon(inside, muon, 0.0, adjust_lr_fn="match_rms_adamw")]
    return opts


def backward(batch: dict, accum: int, objective: Callable) -> dict[str, Tensor]:
    """Add up gradients over `accum` parts of a batch; objective(part) -> (loss, what to log)."""
    logs: dict = {}
    for i in range(accum):
        part = {name: value.chunk(accum)[i] for name, value in batch.items()}
        loss, terms = objective(part)
        (loss / accum).backward()
        for name, value in terms.items():            # stays on the device
            logs[name] = logs.get(name, 0) + value.detach() / accum
    return logs


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


def speed_up(cfg: Run, device: torch.device, nets: list[nn.Module], calls: list[tuple]) -> None:
    """Apply channels_last and checkpoint to networks, compile to calls (module, method name)."""
    for net in nets:
        if cfg.channels_last:
            net.to(memory_format=torch.channels_last)
        for block in net.modules():
            if cfg.checkpoint and isinstance(block, BLOCKS):
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if wants_compile(cfg.compile, device):
        for module, name in calls:
            setattr(module, name, compiled(getattr(module, name), strict=cfg.compile == "on"))


class Stage:
    """What `fit` trains. A stage has build, batches, objective, validate and preview of its own.

    source, held_out: pictures, as `data.as_source` takes them; by default what option `data` names.
    loss: the caller's own, in place of what a stage says: two (B, 3, h, w) -> (), in stage cm (B,).
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

    def hold(self, net: nn.Module, calls: list[tuple], **parts) -> None:
        """Name what learns, calls to compile, and what else a checkpoint restores."""
        self.net = net
        self.ema = copy.deepcopy(net).requires_grad_(False).eval() if self.cfg.ema else None
        self.shown = net if self.ema is None else self.ema
        self.state = {"model": net, "opt": self.opts, **parts}
        nets = [part for part in self.state.values() if isinstance(part, nn.Module)]
        speed_up(self.cfg, self.device, nets, calls)
        if self.ema is not None:
            self.state["ema"] = self.ema

    def begin(self) -> None:
        """Take over what a new run starts from."""

    def scores(self) -> dict:
        return {}

    def step(self, batch: dict, k: int) -> dict[str, Tensor]:
        """One iteration; returns what to log, and "taken": whether the weights moved."""
        logs = backward(batch, self.cfg.accum, functools.partial(self.objective, k=k))
        return logs | {"taken": descend(self.opts)}

    def tell_classes(self) -> int:
        """Note the classes that the network is told: those of the data, unless labels=false."""
        known = list(self.source.classes)
        labels = self.cfg.labels
        if labels not in ("auto", "true", "false") or labels == "true" and not known:
            raise ValueError(f"labels={labels}: choose auto, true or false; {self.cfg.data} has "
                             f"{len(known) or 'no'} classes")
        self.extra["classes"] = [] if labels == "false" else known
        return len(self.extra["classes"])

    def loaded(self, start: int, make_item: Callable | None = None, source: Source | None = None,
               **noise: tuple) -> Iterator[dict]:
        """This rank's batches from step `start` on; only "index" stays on the host."""
        cfg = self.cfg
        make_item = make_item or functools.partial(data.whole_item, size=cfg.size, flip=cfg.flip)
        for batch in data.loader(source or self.source, make_item, cfg.batch, start, cfg.seed,
                                 cfg.workers, *ranks(), self.device.type == "cuda", noise):
            index = batch.pop("index")
            moved = {key: v.to(self.device, non_blocking=True) for key, v in batch.items()}
            yield moved | {"index": index}

    @functools.cached_property
    def judged(self) -> tuple[Tensor, Tensor | None]:
        """Held-out pictures (n, 3, S, S), and their labels (n,) where the network is told them."""
        some = range(min(self.cfg.eval_n, len(self.held_out)))
        x = drawn_at([self.held_out[i] for i in some], self.cfg.size).to(self.device)
        y = torch.tensor([self.held_out.label(i) for i in some], device=self.device)
        return x, y if self.extra["classes"] else None

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
        page.save(folder / f"grid-{k:08d}.png")


def drawn_at(pictures: list[data.Picture], size: int) -> Tensor:
    """Draw pictures whole, (B, 3, size, size) in [-1, 1]."""
    return torch.stack([to_tensor(picture.draw(size)) for picture in pictures])


def starting_point(init: str, *stages: str) -> tuple[str, dict[str, Tensor], dict]:
    """Read a run folder or file: its stage, its best weights (the average), its whole state."""
    path = Path(init)
    ckpt = newest_checkpoint(path)[1] if path.is_dir() else read_checkpoint(path)
    if ckpt.get("stage") not in stages:
        raise ValueError(f"{init} is no run of stage {' or '.join(stages)}")
    print_once(f"starting from {path}, step {ckpt['step']}")
    state = ckpt["state"]
    return ckpt["stage"], state.get("ema", state["model"]), state


class Reconstruction(Stage):
    """A stage whose reconstruct(image (1, 3, S, S)) can be drawn at multiples of S: `scales`."""

    lpips: nn.Module | None = None

    @torch.no_grad()
    def evaluate(self, n: int, scales: Sequence[int]) -> dict:
        """Mean PSNR, LPIPS of n held-out pictures that large, and of their 1x render enlarged."""
        scores: dict = {f"{s}x": {"px": s * self.cfg.size, "n": 0} for s in scales}
        judges = {"psnr": psnr} | ({"lpips": self.lpips} if self.lpips else {})
        for i, image in enumerate(self.judged[0][:n].split(1)):
            drawn = self.reconstruct(image)
            base = to_tensor(to_uint8(drawn.draw(self.cfg.size)[0]))[None]
            for row in scores.values():
                res = row["px"]
                if res > max(self.cfg.size, self.held_out[i].size):
                    break
                truth = to_tensor(self.held_out[i].draw(res))[None].to(self.device)
                rgb = to_tensor(to_uint8(drawn.draw(res)[0]))[None].to(self.device)
                bicubic = F.interpolate(base.to(truth), (res, res), mode="bicubic").clamp(-1, 1)
                row["n"] += 1
                for name, ours in itertools.product(judges, ("render", "bicubic")):
                    score = judges[name](rgb if ours == "render" else bicubic, truth).item()
                    mean = row.get(f"{name}_{ours}", 0.0)
                    row[f"{name}_{ours}"] = mean + (score - mean) / row["n"]
        return scores

    def validate(self) -> dict[str, Tensor]:
        return {"held_out_psnr": torch.tensor(self.evaluate(16, [1])["1x"]["psnr_render"])}

    def scores(self) -> dict:
        return self.evaluate(self.cfg.eval_n, self.scales)

    @torch.no_grad()
    def preview(self, folder: Path, k: int) -> None:
        sides = [s * self.cfg.size for s in self.scales if s == 1 or s * self.cfg.size <= 512]
        rows = []
        for i, image in enumerate(self.judged[0][:4].split(1)):
            drawn = self.reconstruct(image)
            rows.append([to_uint8(image[0])])
            for side in sides:
                rows[i] += [to_uint8(drawn.draw(side)[0]), self.held_out[i].draw(side)]
        self.sheet(rows, sides[-1], folder, k, f"input, then render | original at {sides} px")


@dataclass(frozen=True)
class AERun(DataConfig, Run):
    """Stage ae: autoencoder and renderer, end to end (INFD J.1, J.2)."""

    beta1: float = 0.5                # J.2
    beta2: float = 0.9
    original_from: int = 0            # p_original counts from this step on
    lpips: str = "vgg"                # vgg | alex | squeeze | none
    lpips_weight: float = 1.0         # not in the paper; these four are the published code's
    gan_weight: float = 0.75          # times the adaptive weight; 0: no discriminator
    gan_start: int = 0                # first step with the GAN
    reg_weight: float = 1.0           # of the VQ loss; with kl=true take 1e-6 as LDM does
    init: str = ""                    # run or file of stage ae to start from, discriminator too
    frozen_encoder: bool = False      # with init: learn D and R alone, so that z remains valid
    ae: AutoencoderConfig = AutoencoderConfig()
    disc: DiscriminatorConfig = DiscriminatorConfig()


class AEStage(Reconstruction):
    """E, D and R draw patches at random scales (INFD J.2). loss(rgb, patch): for L1 + LPIPS."""

    name = "ae"
    options = AERun

    def build(self) -> None:
        cfg = self.cfg
        if cfg.frozen_encoder and not cfg.init:
            raise ValueError("frozen_encoder=true goes with init=RUN")
        self.terms = {"own": (1.0, self.loss)} if self.loss else {"l1": (1.0, F.l1_loss)}
        if cfg.lpips != "none" and not self.loss:
            self.lpips = lpips_network(cfg.lpips).to(self.device)
            self.terms["lpips"] = (cfg.lpips_weight, self.lpips)
        torch.manual_seed(cfg.seed)
        net = FieldAutoencoder(cfg.ae).to(self.device)
        self.disc = PatchDiscriminator(cfg.disc).to(self.device)
        if self.device.type == "cuda" and ranks()[1] > 1:
            self.disc = nn.SyncBatchNorm.convert_sync_batchnorm(self.disc)
        net.encoder.requires_grad_(not cfg.frozen_encoder)
        self.opts = optimisers(net, cfg)
        self.opts_d = optimisers(self.disc, cfg)
        self.scales = [s for s in (1, 2, 4, 8) if s <= 4 or s * cfg.size <= 2 * cfg.max_size]
        # Not the renderer's last layer, whose gradients the adaptive weight asks for alone.
        blocks = [part for part in net.renderer.modules() if isinstance(part, ResBlock)]
        calls = [(part, "forward") for part in (net.encoder, net.decoder, *blocks)]
        self.hold(net, calls, disc=self.disc, opt_d=self.opts_d)

    def begin(self) -> None:
        if self.cfg.init:
            _, best, state = starting_point(self.cfg.init, "ae")
            load_weights(self.net, best, f"the autoencoder in {self.cfg.init}")
            load_weights(self.disc, state["disc"], f"the discriminator in {self.cfg.init}")

    def batches(self, start: int) -> Iterator[dict]:
        """Random patches at random scales; from original_from on, often at the largest (J.2)."""
        cfg = self.cfg
        shape = (cfg.ae.z_channels, cfg.size // cfg.ae.f, cfg.size // cfg.ae.f)
        noise = {"latent_noise": shape} if cfg.ae.kl else {}
        for end, chance in ((cfg.original_from, 0.0), (sys.maxsize, cfg.p_original)):
            if start < end:
                item = functools.partial(data.random_patch, cfg=replace(cfg, p_original=chance))
                yield from itertools.islice(self.loaded(start, item, **noise), end - start)
                start = end

    def draw(self, part: dict) -> tuple[Tensor, Tensor]:
        with self.autocast():
            rgb, reg = self.net(part["image"], part["coord"], part["cell"],
                                part.get("latent_noise"))
        return rgb.float(), reg

    def objective(self, part: dict, gan: bool) -> tuple[Tensor, dict]:
        """L1 + LPIPS, VQ or KL, and the adversarial loss at its adaptive weight."""
        cfg = self.cfg
        rgb, reg = self.draw(part)                               # (B, 3, P, P), ()
        logs = {"reg": reg}
        nll = 0.0
        for name, (weight, distance) in self.terms.items():
            with self.autocast():
                logs[name] = distance(rgb, part["patch"]).float().mean()         # ()
            nll = nll + weight * logs[name]
        loss = nll + cfg.reg_weight * reg
        if not gan:
            return loss, logs | {"loss": loss}
        with self.autocast():
            g = -self.disc(rgb).float().mean()
        nll = first_order(nll, rgb)
        push = first_order(g, rgb)
        weight = adaptive_weight(nll, push, self.net.renderer.last_weight, all_mean)
        value = loss + cfg.gan_weight * weight * g
        loss = nll + cfg.reg_weight * reg + cfg.gan_weight * weight * push
        return loss, logs | {"gan": g, "gan_weight": weight, "loss": value}

    def adversary(self, part: dict) -> tuple[Tensor, dict]:
        """The hinge loss of the discriminator, on what the updated generator draws."""
        with torch.no_grad():
            rgb, _ = self.draw(part)
        with self.autocast():                                    # apart, for BatchNorm
            real = self.disc(part["patch"]).float()
            fake = self.disc(rgb).float()
        loss = hinge_loss(real, fake)
        return loss, {"disc": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}

    def step(self, batch: dict, k: int) -> dict[str, Tensor]:
        """One iteration (J.2): E, D and R; then the discriminator, if both gradients are finite."""
        cfg = self.cfg
        gan = cfg.gan_weight > 0 and k >= cfg.gan_start
        statistics = [b.clone() for b in self.disc.buffers()]
        self.disc.requires_grad_(False)
        logs = backward(batch, cfg.accum, functools.partial(self.objective, gan=gan))
        taken = descend(self.opts)
        self.disc.requires_grad_(True)
        if gan:
            logs |= backward(batch, cfg.accum, self.adversary)
            taken = descend(self.opts_d, taken)
        for b, old in zip(self.disc.buffers(), statistics):
            b.copy_(torch.where(taken, b, old))
        return logs | {"taken": taken}

    def reconstruct(self, image: Tensor) -> Field:
        return self.shown.field(self.shown.encode(image), tile=self.cfg.patch)


@dataclass(frozen=True)
class LDMRun(Run):
    """Stage ldm: diffusion of the latents of a frozen autoencoder (INFD J.1, J.2)."""

    steps: int = 600_000
    batch: int = 48
    lr: float = 9.6e-5
    weight_decay: float = 0.01
    ema: float = 0.9999
    init: str = ""                    # run or file of stage ae; by default the one beside --out
    encoder: str = ""                 # filled in: which encoder it is that makes the latents
    start: str = ""                   # run of stage ldm whose UNet to start from
    latent_norm: bool = False         # scale latents to unit variance first (published: no)
    labels: str = "auto"              # auto: tell the UNet the classes, if there are; true | false
    pictures: int = 0                 # with cache: learn from the first so many only; 0: all
    cache: bool = False               # encode every picture once, unmirrored; keep z in memory
    preview_steps: int = 50           # DDIM steps of the sample sheets
    unet: UNetConfig = UNetConfig()
    diffusion: DiffusionConfig = DiffusionConfig()


class LDMStage(Stage):
    """The UNet learns the latents of a frozen autoencoder (INFD J.2)."""

    name = "ldm"
    options = LDMRun

    def build(self) -> None:
        cfg = self.cfg
        if self.loss is not None:
            raise ValueError("stage ldm takes no loss of your own: it learns the noise of a latent")
        if cfg.cache and cfg.flip or cfg.pictures and not cfg.cache:
            raise ValueError("pictures=N goes with cache=true, and that with flip=false")
        if not Path(cfg.init or "none").exists():
            raise ValueError(f"stage ldm needs an autoencoder and there is none at {cfg.init}; run "
                             f"--stage ae first, or give init=RUN")
        self.base = base = load(cfg.init, self.device)
        if not isinstance(base, INFD):
            raise ValueError(f"init={cfg.init} is a model of stage cm; give one of stage ae or ldm")
        if base.size != cfg.size:
            raise ValueError(f"{cfg.init} was trained at size={base.size}; give size={base.size}")
        self.source = getattr(self.source, "photos", self.source)    # of the 6K-mix: all at once
        frozen = base.autoencoder.state_dict()
        config = flatten({"ae": base.autoencoder.cfg, "size": base.size, "patch": base.patch})
        self.extra["autoencoder"] = {"config": config, "weights": frozen}
        encoder = (v for name, v in frozen.items() if name.startswith("encoder."))
        digest = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in encoder)).hexdigest()
        n = base.latent_shape[0]
        unet = replace(cfg.unet, in_channels=n, out_channels=n, num_classes=self.tell_classes())
        self.cfg = cfg = replace(cfg, unet=unet, encoder=digest[:16])
        torch.manual_seed(cfg.seed)
        net = UNet(unet).to(self.device)
        self.scale = LatentScale(n).to(self.device)
        self.diffusion = GaussianDiffusion(cfg.diffusion)
        self.opts = optimisers(net, cfg)
        self.hold(net, [(net, "forward"), (base.autoencoder.encoder, "forward")], scale=self.scale)

    def begin(self) -> None:
        """Take over the UNet of `start`; with latent_norm, measure the latents of 512 samples."""
        cfg = self.cfg
        if cfg.start:
            load_weights(self.net, starting_point(cfg.start, "ldm")[1], f"the UNet in {cfg.start}")
        if cfg.latent_norm:
            some = itertools.islice(self.batches(0), -(-512 // cfg.batch))
            z = torch.cat([self.encode(batch).cpu().double() for batch in some])     # (N, C, h, w)
            mean, square = all_mean([v.mean(dim=(0, 2, 3)) for v in (z, z.square())])
            self.scale.mean.copy_(mean)
            self.scale.std.copy_((square - mean.square()).sqrt())

    def batches(self, start: int) -> Iterator[dict]:
        shape = self.base.latent_shape
        if self.cfg.cache:
            return self.loaded(start, source=self.latents, noise=shape)
        kl = {"latent_noise": shape} if self.base.autoencoder.cfg.kl else {}
        return self.loaded(start, noise=shape, **kl)

    @functools.cached_property
    @torch.no_grad()
    def latents(self) -> Latents:
        """The latents of the first cfg.pictures, or all, pictures; of the KL variant the means."""
        n = min(self.cfg.pictures or len(self.source), len(self.source))
        print_once(f"encoding {n:,} pictures")
        pictures = DataLoader(Subset(self.source, range(n)), 32, num_workers=self.cfg.workers,
                              collate_fn=functools.partial(drawn_at, size=self.cfg.size))
        encode = self.base.autoencoder.encode
        made = Latents(torch.cat([encode(x.to(self.device)).cpu() for x in pictures]))
        made.label = self.source.label
        return made

    @torch.no_grad()
    def encode(self, part: dict) -> Tensor:
        """z (B, C, h, w), before quantisation: cached, or of the pictures."""
        if "latent" in part:
            return part["latent"]
        with self.autocast():
            return self.base.autoencoder.encode(part["image"], part.get("latent_noise")).float()

    def times(self, index: Tensor) -> Tensor:
        steps = self.cfg.diffusion.steps
        t = [int(rng(self.cfg.seed, "t", n).integers(steps)) for n in index.tolist()]
        return torch.tensor(t).to(self.device, non_blocking=True)

    def objective(self, part: dict, k: int) -> tuple[Tensor, dict]:
        """The mean squared error of the predicted noise, at uniform times of the samples' own."""
        z = self.scale(self.encode(part))                        # (B, C, h, w)
        t = self.times(part["index"])                            # (B,)
        y = part["label"] if self.extra["classes"] else None
        with self.autocast():
            loss = self.diffusion.loss(self.net, z, t, part["noise"], y).mean()
        return loss, {"loss": loss}

    @torch.no_grad()
    def validate(self) -> dict[str, Tensor]:
        """The loss of held-out latents, of each always at the same time and noise."""
        x, y = self.judged
        z = self.scale(torch.cat([self.base.autoencoder.encode(one) for one in x.split(1)]))
        t = torch.arange(len(z), device=self.device) * self.cfg.diffusion.steps // len(z)
        loss = self.diffusion.loss(self.shown, z, t, self.noise_like(z), y)
        return {"held_out_loss": loss.mean()}

    def preview(self, folder: Path, k: int) -> None:
        model = replace(self.base, unet=self.shown, diffusion=self.diffusion, scale=self.scale)
        drawn = model.decode(model.sample(range(8), self.cfg.seed, self.cfg.preview_steps))
        sides = [s * model.size for s in (1, 2, 4) if s == 1 or s * model.size <= 512]
        rows = [to_uint8(drawn.draw(side)) for side in sides]
        self.sheet(rows, sides[-1], folder, k, f"the same samples at {sides} px")


class Latents(list):
    """Latents (C, h, w) for `data.loader`."""


@dataclass(frozen=True)
class PretrainRun(Run):
    """Stage pretrain: image functions learn to reconstruct (CM-Func 3.4, A.1)."""

    steps: int = 0                    # 0: as many as `epochs` need
    epochs: int = 30                  # A.1
    batch: int = 32                   # open in the paper: the reported hours fit 32
    lr: float = 1e-4                  # A.1, Adam
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
        steps = cfg.steps or cfg.epochs * len(self.source) // cfg.batch
        self.cfg = cfg = replace(cfg, steps=steps, func=replace(cfg.func, size=cfg.size))
        torch.manual_seed(cfg.seed)
        self.func = FunctionGenerator(cfg.func).to(self.device)
        self.drawer = copy.deepcopy(self.func)       # with the average of the weights
        net = nn.ModuleDict({"embed": self.func.embed, "predict": self.func.predict})
        self.opts = optimisers(net, cfg, muon=cfg.muon)
        self.hold(net, [(self.func, "redraw")])
        self.drawer.embed = self.shown["embed"]
        self.drawer.predict = self.shown["predict"]

    def batches(self, start: int) -> Iterator[dict]:
        return self.loaded(start, coord_noise=(self.cfg.size, self.cfg.size, 2))

    def objective(self, part: dict, k: int) -> tuple[Tensor, dict]:
        """The squared error of M: the encoder is skipped, and sigma is 0."""
        x = part["image"]                                        # (B, 3, S, S)
        coord = moved_grid(part["coord_noise"], self.cfg.func.corners)           # (B, S, S, 2)
        with self.autocast():                        # c_in is 1 / sigma_data at sigma = 0
            rgb = self.func.redraw(x / ConsistencyConfig.sigma_data, coord)      # (B, 3, S, S)
        loss = self.loss(rgb, x)                                 # Eq. (10)
        return loss, {"loss": loss}

    def step(self, batch: dict, k: int) -> dict[str, Tensor]:
        drop = 0.1 if self.cfg.lr_drop and k >= 0.8 * self.cfg.steps else 1
        for opt, rate in zip(self.opts, (self.cfg.lr, self.cfg.muon)):
            opt.param_groups[0]["lr"] = rate * drop
        return super().step(batch, k)

    def reconstruct(self, image: Tensor) -> ImageFunction:
        return self.drawer.reconstruct(image / ConsistencyConfig.sigma_data)


@dataclass(frozen=True)
class CMRun(Run):
    """Stage cm: consistency training of one of four generators (CM-Func 3.1, A.1)."""

    steps: int = 900_000              # A.1: 400,000 for CIFAR-10
    K: int = 0                        # steps that the schedule is planned for; 0: steps
    batch: int = 32                   # A.1
    lr: float = 5e-4                  # A.1, RAdam; open: no warm-up, clipping or weight decay
    muon: float = 0.0                 # not in the paper: rate of Muon inside blocks; 0: RAdam alone
    ema: float = 0.9999               # open: average to sample from, beside the teacher's
    size: int = 64
    flip: bool = True
    generator: str = "func"           # func | unet | uvit | dit (D.2.1, A.3)
    schedule: str = "ct"              # ct: the paper's | ict | ect, with the options of that name
    metric: str = "lpips"             # lpips (A.1) | l2 | huber; those two need no download
    lpips: str = "vgg"                # network of metric=lpips: vgg | alex | squeeze
    lpips_size: int = 224             # A.1
    init: str = ""                    # run of stage pretrain (func: the one beside --out) or cm
    distil: str = ""                  # run of a denoiser: follow its trajectories, not x + r z
    labels: str = "auto"              # auto: tell f the classes, if there are; true | false
    cm: ConsistencyConfig = ConsistencyConfig()
    ct: Schedule = Schedule()
    ict: ICT = ICT()
    ect: ECT = ECT()
    func: GeneratorConfig = GeneratorConfig()
    vit: TransformerConfig = TransformerConfig()                 # of uvit and dit
    # A.3. open: resampling inside residual blocks and heads of 64 channels, as Song et al.
    unet: UNetConfig = UNetConfig(model_channels=256, num_head_channels=64, resblock_updown=True)


class CMStage(Stage):
    """f goes from noise to image (function) in one step (CM-Func 3.1). loss(a, b): for metric."""

    name = "cm"
    options = CMRun

    def build(self) -> None:
        self.cfg = cfg = cm_config(self.cfg, self.tell_classes())
        self.schedule = getattr(cfg, cfg.schedule)
        self.metric = self.loss or {"l2": l2, "huber": pseudo_huber}.get(cfg.metric)
        if self.metric is None:
            net = lpips_network(cfg.lpips, "train without it: metric=huber schedule=ect")
            self.metric = lpips_resized(net.to(self.device), cfg.lpips == "vgg", cfg.lpips_size)
        self.denoiser = None
        if cfg.distil:
            made = load(cfg.distil, self.device)
            like = (cfg.size, len(self.extra["classes"]))
            if not isinstance(made, OneStep) or (made.size, made.f.net.cfg.num_classes) != like:
                raise ValueError(f"distil={cfg.distil} must be a run of stage cm at {cfg.size} px, "
                                 f"with {like[1]} classes")
            self.denoiser = made.f
        torch.manual_seed(cfg.seed)
        net = build_generator(cfg.generator, functools.partial(getattr, cfg))
        self.f = ConsistencyModel(net, cfg.cm).to(self.device)
        self.makes_functions = hasattr(net, "function")
        self.target = self.f                         # without a teacher, its own
        teacher = {}
        if self.schedule.mu(0, cfg.K):
            self.target = copy.deepcopy(self.f).requires_grad_(False)
            teacher = {"target": self.target.net}
        self.opts = optimisers(net, cfg, torch.optim.RAdam, cfg.muon)
        self.hold(net, [(one, "forward") for one in (net, *teacher.values())], **teacher)

    def begin(self) -> None:
        """Take over what stage pretrain has learned (3.4), or all of a run of stage cm to tune."""
        init = self.cfg.init
        if init in ("", "none"):
            return
        if not Path(init).exists():
            raise ValueError(f"no run at {init}: run --stage pretrain first, or give init=none")
        stage, best, _ = starting_point(init, "pretrain", "cm")
        if stage == "pretrain" and self.cfg.generator != "func":
            raise ValueError(f"init={init}: only generator=func has a pre-training")
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
        """Noise levels t > r, (B,) each, of the samples: drawn for all of step k, each its own."""
        cfg = self.cfg
        seed = int(rng(cfg.seed, "levels", k).integers(2**62))
        generator = torch.Generator().manual_seed(seed)
        drawn = self.schedule.levels(k, cfg.K, cfg.batch, generator, cfg.cm)
        return tuple(v[index % cfg.batch].to(self.device, non_blocking=True) for v in drawn)

    def objective(self, part: dict, k: int) -> tuple[Tensor, dict]:
        """Student to target, at the same noise and coordinates; with a denoiser: distillation."""
        t, r = self.levels(part["index"], k)                     # (B,)
        y = part["label"] if self.extra["classes"] else None
        coord = {}
        if self.makes_functions:                                 # (B, S, S, 2)
            coord["coord"] = moved_grid(part["coord_noise"], self.cfg.func.corners)
        with self.autocast():
            d = consistency_loss(self.f, self.target, part["image"], part["noise"], t, r,
                                 self.metric, y, self.denoiser, **coord)         # (B,)
        loss = (self.schedule.weight(t, r) * d).mean()           # Eq. (5)
        return loss, {"loss": loss, "difference": d.mean()}

    def step(self, batch: dict, k: int) -> dict[str, Tensor]:
        """One iteration; then the teacher: theta^- <- mu theta^- + (1 - mu) theta."""
        logs = super().step(batch, k)
        if self.target is not self.f and logs["taken"]:
            ema_update(self.target, self.f, self.schedule.mu(k, self.cfg.K))
        place = self.schedule.log(k, self.cfg.K).items()
        return logs | {name: torch.tensor(value) for name, value in place}

    def validate(self) -> dict[str, Tensor]:
        """Denoising distance of the student (Section 4.1, Appendix B)."""
        x, y = self.judged
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


def cm_config(cfg: CMRun, classes: int) -> CMRun:
    """Fill in what follows from the data and from other options; ValueError for unknown names."""
    for name, known in (("schedule", ("ct", "ict", "ect")), ("metric", ("lpips", "l2", "huber")),
                        ("generator", tuple(GENERATORS))):
        if getattr(cfg, name) not in known:
            raise ValueError(f"unknown {name} {getattr(cfg, name)}; there are: {', '.join(known)}")
    part = GENERATORS[cfg.generator][2]
    own = {"K": cfg.K or cfg.steps, f"{part}.num_classes": classes}
    if part != "unet":
        own[f"{part}.size"] = cfg.size
    return unflatten(CMRun, own, cfg)


STAGES = {stage.name: stage for stage in (AEStage, LDMStage, PretrainStage, CMStage)}
