"""The four stages: what each learns from, and one iteration of it in full.

ae and ldm make INFD (Section J), pretrain and cm make CM-Func (Sections 3.1, 3.4). A stage stands
below its options, whose defaults are the paper's. Its `step` shows forward, loss, backward and
optimiser; train.py's `fit` calls it. Losses and perceptual networks live here, outside the models.
"""
from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from autoencoder import (AutoencoderConfig, DiscriminatorConfig, FieldAutoencoder,
                         PatchDiscriminator, adaptive_weight, first_order, hinge_loss)
from clif import Field, ResBlock
from consistency import (ECT, ICT, ConsistencyConfig, ConsistencyModel, Schedule, consistency_loss,
                         denoising_distance, l2, lpips_resized, pseudo_huber)
from data import DataConfig, Source, to_tensor, to_uint8
from metrics import lpips_network
from inr_generator import (FunctionGenerator, GeneratorConfig, ImageFunction, TransformerConfig,
                           pixel_coord, variational_coord)
from ldm import DiffusionConfig, GaussianDiffusion, UNet, UNetConfig
from sample import GENERATORS, INFD, LatentScale, OneStep, build_generator, load
from runs import all_mean, flatten, load_weights, print_once, ranks, rng, torch_noise, unflatten
from training import (Guard, Run, Stage, accumulate, adam, descend, ema_update, evaluate, groups_of,
                      micro_batches, psnr_at_1x, reconstructions, speed_up, starting_point,
                      with_muon)


def kl_noise(cfg: AutoencoderConfig, size: int) -> dict[str, tuple[int, ...]]:
    """The noise that the KL encoder needs for a batch, as `Stage.loaded` takes it."""
    shape = (cfg.z_channels, size // cfg.f, size // cfg.f)
    return {"latent_noise": shape} if cfg.kl else {}


def class_count(cfg: LDMRun | CMRun, source: Source) -> int:
    """How many classes a network is told: those of the data, unless labels=false."""
    if cfg.labels not in ("auto", "true", "false"):
        raise ValueError(f"option labels={cfg.labels}: choose auto, true or false")
    if cfg.labels == "true" and not source.classes:
        raise ValueError(f"labels=true, but {cfg.data} has no classes (sub-folders); leave labels "
                         f"out")
    return 0 if cfg.labels == "false" else len(source.classes)


# ---- stage ae: the autoencoder ----


@dataclass(frozen=True)
class AERun(Run):
    """Stage ae: autoencoder and renderer, end to end (INFD J.1, J.2)."""

    patch: int = 256                  # side of the ground-truth patch, pixels
    max_size: int = 1024              # ground truth is resized to at most this before the crop
    smallest: int = 0                 # and to at least this; 0: size
    downsample: bool = True           # False: always the largest size, the ablation of Section E
    p_whole: float = 0.0              # chance of the whole picture at `size`: 4x shows 1/16 of z
    p_original: float = 0.0           # chance of the largest size (J.2: 0.5 on Mountains)
    original_from: int = 0            # from this step on
    edge: int = 0                     # also draw crops up to so many pixels past the border
    lpips: str = "vgg"                # vgg | alex | squeeze | none
    lpips_weight: float = 1.0         # not in the paper; these four are the published code's
    gan_weight: float = 0.75          # times the adaptive weight; 0: no discriminator
    gan_start: int = 0                # first step with the GAN
    reg_weight: float = 1.0           # of the VQ loss; with kl=true take 1e-6 as LDM does
    init: str = ""                    # run or file of stage ae to start from, discriminator too
    frozen_encoder: bool = False      # with init: learn D and R alone, so that z remains valid
    ae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    disc: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


class AEStage(Stage):
    """E, D and R learn to draw patches of pictures at random scales (INFD J.2).

    loss: (rgb (B, 3, P, P), patch (B, 3, P, P)) -> (), in place of L1 + LPIPS.
    """

    name = "ae"
    options = AERun

    def build(self) -> None:
        cfg = self.cfg
        device = self.device
        if cfg.frozen_encoder and not cfg.init:
            raise ValueError("frozen_encoder=true goes with init=RUN: an encoder that never "
                             "learned makes a poor z")
        self.lpips = None
        if cfg.lpips != "none" and self.loss is None:
            self.lpips = lpips_network(cfg.lpips).to(device)

        torch.manual_seed(cfg.seed)
        net = FieldAutoencoder(cfg.ae).to(device)
        self.disc = PatchDiscriminator(cfg.disc).to(device)
        if device.type == "cuda" and ranks()[1] > 1:
            self.disc = nn.SyncBatchNorm.convert_sync_batchnorm(self.disc)
        net.encoder.requires_grad_(not cfg.frozen_encoder)
        # The published loop has one Adam per part; Adam treats every parameter alone.
        self.opt = adam(torch.optim.Adam, net.parameters(), cfg, device)
        self.opt_d = adam(torch.optim.Adam, self.disc.parameters(), cfg, device)
        self.hold(net, disc=self.disc, opt=self.opt, opt_d=self.opt_d)

        # Not the renderer's last layer, whose gradients the adaptive weight asks for alone.
        blocks = [part for part in net.renderer.modules() if isinstance(part, ResBlock)]
        parts = [net.encoder, net.decoder, *blocks]
        speed_up(cfg, device, [net, self.disc], [(part, "forward") for part in parts])

    def begin(self) -> None:
        """Take over the weights of init, with its adversary."""
        if self.cfg.init:
            _, best, state = starting_point(self.cfg.init, "ae")
            load_weights(self.disc, state.get("disc", {}), f"the discriminator in {self.cfg.init}")
            for net in (self.net, self.shown):
                load_weights(net, best, f"the autoencoder in {self.cfg.init}")

    def batches(self, start: int) -> Iterator[dict]:
        """Random patches at random scales; from original_from on, often at the largest (J.2)."""
        cfg = self.cfg
        shared = {f.name: getattr(cfg, f.name) for f in fields(DataConfig)}
        for end, p_original in ((cfg.original_from, 0.0), (sys.maxsize, cfg.p_original)):
            if start < end:
                shape = DataConfig(**shared | {"p_original": p_original})
                item = functools.partial(data.random_patch, cfg=shape)
                stream = self.loaded(self.source, item, start, kl_noise(cfg.ae, cfg.size))
                yield from itertools.islice(stream, end - start)
                start = end

    def draw(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The patches as the autoencoder draws them (B, 3, P, P), and the VQ or KL loss ()."""
        with self.autocast():
            rgb, reg = self.net(batch["image"], batch["coord"], batch["cell"],
                                batch.get("latent_noise"))
        return rgb.float(), reg

    def distance(self, rgb: Tensor, patch: Tensor) -> tuple[Tensor, dict]:
        """L1 + LPIPS of (B, 3, P, P), or the caller's own loss; and what to log of it."""
        if self.loss is not None:
            return self.loss(rgb, patch), {}
        l1 = (rgb - patch).abs().mean()
        if self.lpips is None:
            return l1, {"l1": l1}
        with self.autocast():
            lpips = self.lpips(rgb, patch).float().mean()
        return l1 + self.cfg.lpips_weight * lpips, {"l1": l1, "lpips": lpips}

    def step(self, batch: dict, k: int) -> dict[str, Tensor]:
        """One iteration (J.2): E, D and R; then the discriminator, on what they now draw.

        It runs three times in train mode, on fake, real, fake, and updates its BatchNorm
        statistics as often, as in the published loop. LPIPS is in eval mode; the published loop
        leaves its dropout on by accident.
        """
        cfg = self.cfg
        gan = cfg.gan_weight > 0 and k >= cfg.gan_start
        parts = micro_batches(batch, cfg.accum)
        statistics = [b.clone() for b in self.disc.buffers()]    # in case the step is not taken
        logs: dict = {}

        self.disc.requires_grad_(False)
        for part in parts:
            rgb, reg = self.draw(part)                           # (B, 3, P, P), ()
            nll, terms = self.distance(rgb, part["patch"])       # ()
            loss = nll + cfg.reg_weight * reg
            value = loss
            if gan:
                with self.autocast():
                    g = -self.disc(rgb).float().mean()
                nll = first_order(nll, rgb)
                push = first_order(g, rgb)
                weight = adaptive_weight(nll, push, self.net.renderer.last_weight, all_mean)
                loss = nll + cfg.reg_weight * reg + cfg.gan_weight * weight * push
                value = value + cfg.gan_weight * weight * g
                terms |= {"gan": g, "gan_weight": weight}
            (loss / cfg.accum).backward()
            logs = accumulate(logs, terms | {"reg": reg, "loss": value}, cfg.accum)
        taken = descend([self.opt])

        self.disc.requires_grad_(True)
        for part in parts if gan else ():
            with torch.no_grad():
                rgb, _ = self.draw(part)                         # by the updated generator
            with self.autocast():                                # apart, for BatchNorm
                real = self.disc(part["patch"]).float()
                fake = self.disc(rgb).float()
            loss = hinge_loss(real, fake)
            (loss / cfg.accum).backward()
            terms = {"disc": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
            logs = accumulate(logs, terms, cfg.accum)
        if gan:
            taken = descend([self.opt_d], taken)     # not without a step of the generator
        for b, old in zip(self.disc.buffers(), statistics):
            b.copy_(torch.where(taken, b, old))
        return logs | {"taken": taken}

    def reconstruct(self, image: Tensor) -> Field:
        """The pictures image (B, 3, S, S) as fields, by the average of the weights."""
        return self.shown.field(self.shown.encode(image), tile=self.cfg.patch)

    def validate(self) -> dict[str, Tensor]:
        return psnr_at_1x(self)

    def scores(self) -> dict:
        """Scores at 1x, 2x, 4x, and at 8x unless that is over twice what max_size trained."""
        cfg = self.cfg
        scales = [s for s in (1, 2, 4, 8) if s <= 4 or s * cfg.size <= 2 * cfg.max_size]
        return evaluate(self.reconstruct, self.held_out, cfg.eval_n, cfg.size, scales, self.device,
                        self.lpips)

    def preview(self, folder: Path, k: int) -> None:
        rows = reconstructions(self, [1, 2, 4])
        side = min(4 * self.cfg.size, 512)
        self.sheet(rows, side, folder, k, "input, then render | truth at 1x, 2x, 4x")


# ---- stage ldm: diffusion of latents ----


@dataclass(frozen=True)
class LDMRun(Run):
    """Stage ldm: diffusion of the latents of a frozen autoencoder (INFD J.1, J.2)."""

    steps: int = 600_000
    batch: int = 48
    lr: float = 9.6e-5
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    ema: float = 0.9999
    init: str = ""                    # run or file of stage ae; by default the one beside --out
    start: str = ""                   # run of stage ldm whose UNet to start from
    latent_norm: bool = False         # scale latents to unit variance first (published: no)
    labels: str = "auto"              # auto: tell the UNet the classes, if there are; true | false
    pictures: int = 0                 # learn from the first so many pictures only; 0: all
    cache: bool = False               # encode every picture once, and keep z in memory
    preview_steps: int = 50           # DDIM steps of the sample sheets
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)


class LDMStage(Stage):
    """The UNet learns the latents of a frozen autoencoder (INFD J.2)."""

    name = "ldm"
    options = LDMRun

    def build(self) -> None:
        cfg = self.cfg
        device = self.device
        if self.loss is not None:
            raise ValueError("stage ldm takes no loss of your own: it learns the noise of a latent")
        if cfg.pictures and not cfg.cache:
            raise ValueError("pictures=N goes with cache=true: only cached latents can be a part "
                             "of the data")
        self.base = frozen_autoencoder(cfg, device)
        if isinstance(self.source, data.SixKMix):    # the published second stage of the 6K-mix
            self.source = self.source.photos         # sees every file once, at 256 px
        channels = self.base.latent_shape[0]
        classes = class_count(cfg, self.source)
        unet = replace(cfg.unet, in_channels=channels, out_channels=channels, num_classes=classes)
        self.cfg = cfg = replace(cfg, unet=unet)

        torch.manual_seed(cfg.seed)
        net = UNet(unet).to(device)
        self.scale = LatentScale(channels).to(device)
        self.diffusion = GaussianDiffusion(cfg.diffusion)
        self.opt = adam(torch.optim.AdamW, net.parameters(), cfg, device,
                        weight_decay=cfg.weight_decay)
        encoder = Guard(weights_digest(self.base.autoencoder.encoder),
                        f"init={cfg.init} holds another encoder than the one whose latents this "
                        f"run has learned; name that one, or choose another --out")
        self.hold(net, encoder=encoder, opt=self.opt, scale=self.scale)
        config = {"ae": self.base.autoencoder.cfg, "size": self.base.size, "patch": self.base.patch}
        self.extra = {"autoencoder": {"config": flatten(config),
                                      "weights": self.base.autoencoder.state_dict()},
                      "classes": list(self.source.classes) if classes else []}
        encodes = [] if cfg.cache else [(self.base.autoencoder.encoder, "forward")]
        speed_up(cfg, device, [net], [(net, "forward"), *encodes])

    def begin(self) -> None:
        """Take over the UNet of `start`; with latent_norm, measure the latents of 512 samples."""
        cfg = self.cfg
        if cfg.start:
            _, best, _ = starting_point(cfg.start, "ldm")
            for net in (self.net, self.shown):
                load_weights(net, best, f"the UNet in {cfg.start}")
        if cfg.latent_norm:
            some = itertools.islice(self.batches(0), -(-512 // cfg.batch))
            z = torch.cat([self.encode(batch).cpu() for batch in some])          # (N, C, h, w)
            mean, = all_mean([z.mean(dim=(0, 2, 3))])
            centred = z - mean[:, None, None]
            variance, = all_mean([centred.square().mean(dim=(0, 2, 3))])
            self.scale.mean.copy_(mean)
            self.scale.std.copy_(variance.sqrt())

    def batches(self, start: int) -> Iterator[dict]:
        """Pictures, or their cached latents, with the noise of the diffusion."""
        noise = {"noise": self.base.latent_shape}
        if self.cfg.cache:
            return self.loaded(self.latents, latent_item, start, noise, workers=0)
        noise |= kl_noise(self.base.autoencoder.cfg, self.base.size)
        return self.whole_pictures(start, noise)

    @functools.cached_property
    @torch.no_grad()
    def latents(self) -> Latents:
        """The latents of all, or of the first cfg.pictures, pictures.

        The KL variant keeps the mean: its standard deviation is a small fraction of the spread
        between pictures.
        """
        cfg = self.cfg
        n = min(cfg.pictures or len(self.source), len(self.source))
        print_once(f"encoding {n:,} pictures")
        pictures = torch.utils.data.DataLoader(
            torch.utils.data.Subset(self.source, range(n)), 32, num_workers=cfg.workers,
            collate_fn=functools.partial(drawn_at, size=cfg.size))
        z = []
        for x in pictures:
            views = (x, x.flip(-1)) if cfg.flip else (x,)
            drawn = [self.base.autoencoder.encode(view.to(self.device)).cpu() for view in views]
            z.append(torch.stack(drawn, dim=1))                  # (32, 1 or 2, C, h, w)
        return Latents(torch.cat(z), self.source)

    @torch.no_grad()
    def encode(self, batch: dict) -> Tensor:
        """z (B, C, h, w), before quantisation: cached, or of the pictures."""
        if "latent" in batch:
            return batch["latent"]
        with self.autocast():
            z = self.base.autoencoder.encode(batch["image"], batch.get("latent_noise"))
        return z.float()

    def times(self, index: Tensor) -> Tensor:
        """The time steps (B,) of the samples numbered `index`, uniform."""
        steps = self.cfg.diffusion.steps
        t = [int(rng(self.cfg.seed, "t", n).integers(steps)) for n in index.tolist()]
        return torch.tensor(t).to(self.device, non_blocking=True)

    def step(self, batch: dict, k: int) -> dict[str, Tensor]:
        """One iteration: the mean squared error of the predicted noise, at uniform time steps."""
        cfg = self.cfg
        logs: dict = {}
        for part in micro_batches(batch, cfg.accum):
            z = self.scale(self.encode(part))                    # (B, C, h, w)
            t = self.times(part["index"])                        # (B,)
            y = part["label"] if cfg.unet.num_classes else None
            with self.autocast():
                loss = self.diffusion.loss(self.net, z, t, part["noise"], y).mean()
            (loss / cfg.accum).backward()
            logs = accumulate(logs, {"loss": loss}, cfg.accum)
        return logs | {"taken": descend([self.opt])}

    @torch.no_grad()
    def validate(self) -> dict[str, Tensor]:
        """The loss of held-out latents, of each always at the same time and noise."""
        n = min(self.cfg.eval_n, len(self.held_out))
        losses = []
        for i in range(n):
            z = self.scale(self.base.autoencoder.encode(self.held_image(i)))     # (1, C, h, w)
            t = torch.tensor([i * self.cfg.diffusion.steps // n], device=self.device)
            noise = torch_noise(z.shape, self.cfg.seed, "held out", i).to(self.device)
            y = torch.tensor([self.held_out.label(i)], device=self.device)
            y = y if self.cfg.unet.num_classes else None
            losses.append(self.diffusion.loss(self.shown, z, t, noise, y).mean())
        return {"held_out_loss": torch.stack(losses).mean()}

    def preview(self, folder: Path, k: int) -> None:
        """The same eight latents drawn at 1x, 2x and 4x, a row each, always from the same noise."""
        base = self.base
        model = INFD(base.autoencoder, self.shown, self.diffusion, self.scale, base.size,
                     base.patch)
        drawn = model.decode(model.sample(range(8), self.cfg.seed, self.cfg.preview_steps))
        side = min(4 * base.size, 512)
        rows = [list(to_uint8(drawn.draw(min(scale * base.size, side)))) for scale in (1, 2, 4)]
        self.sheet(rows, side, folder, k, "the same eight samples at 1x, 2x, 4x")


class Latents(list):
    """Latents in place of the pictures of `source`, for `data.loader`.

    [i] is (1, C, h, w), or (2, C, h, w) where the second is that of the mirrored picture.
    """

    def __init__(self, z: Tensor, source: Source):
        super().__init__(z)
        self.label = source.label


def latent_item(z: Tensor, gen) -> dict:
    """One latent; mirrored for the samples for which `picture_item` mirrors."""
    return {"latent": z[int(len(z) > 1 and gen.random() < 0.5)]}


def drawn_at(pictures: list[data.Picture], size: int) -> Tensor:
    """Pictures at one size, (B, 3, S, S)."""
    return torch.stack([to_tensor(picture.draw(size)) for picture in pictures])


def frozen_autoencoder(cfg: LDMRun, device: torch.device) -> INFD:
    """Load the autoencoder of `init`. ValueError where there is none, or one of another size."""
    if not cfg.init or not Path(cfg.init).exists():
        where = f" and there is none at {cfg.init}" if cfg.init else ""
        raise ValueError(f"stage ldm needs an autoencoder{where}; run --stage ae first with the "
                         f"same --data and --preset, or name one with init=RUN")
    base = load(cfg.init, device)
    if not isinstance(base, INFD):
        raise ValueError(f"init={cfg.init} is a model of stage cm; stage ldm needs an autoencoder: "
                         f"a run or file of stage ae or ldm")
    if base.size != cfg.size:
        raise ValueError(f"the autoencoder in {cfg.init} was trained at size={base.size}; "
                         f"give size={base.size}")
    return base


def weights_digest(module: nn.Module) -> str:
    """Hash a module's weights, to know it again by."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- stage pretrain: image functions that reconstruct ----


@dataclass(frozen=True)
class PretrainRun(Run):
    """Stage pretrain: image functions learn to reconstruct (CM-Func 3.4, A.1).

    "open" is what the paper leaves open, here and in stage cm.
    """

    steps: int = 0                    # 0: as many as `epochs` need
    epochs: int = 30                  # A.1
    batch: int = 32                   # open: the reported hours fit 32
    lr: float = 1e-4                  # A.1, Adam
    muon: float = 0.0                 # not in the paper: rate of Muon, see with_muon; 0: Adam alone
    lr_drop: bool = False             # open: a tenth of lr in the last fifth, as in Trans-INR
    beta1: float = 0.9                # open: Adam's own
    beta2: float = 0.999
    size: int = 64
    flip: bool = True                 # open: OpenAI's default, here and in stage cm
    func: GeneratorConfig = field(default_factory=GeneratorConfig)


def function_parts(net: FunctionGenerator) -> nn.ModuleDict:
    """What stage pretrain hands to stage cm (3.4): patch embedding and function prediction."""
    return nn.ModuleDict({"embed": net.embed, "predict": net.predict})


def moved_grid(noise: Tensor, corners: bool) -> Tensor:
    """Variational coordinates (B, S, S, 2) of the pixels, shifted by each sample's noise (3.2)."""
    grid = pixel_coord(noise.shape[1:3], corners=corners, device=noise.device)   # (S, S, 2)
    return variational_coord(grid, noise)


class PretrainStage(Stage):
    """The function prediction of CM-Func learns to reconstruct pictures (CM-Func 3.4).

    loss: (rgb (B, 3, S, S), image (B, 3, S, S)) -> (), in place of the squared error.
    """

    name = "pretrain"
    options = PretrainRun

    def build(self) -> None:
        cfg = self.cfg
        device = self.device
        self.loss = self.loss or F.mse_loss
        steps = cfg.steps or cfg.epochs * len(self.source) // cfg.batch
        self.cfg = cfg = replace(cfg, steps=steps, func=replace(cfg.func, size=cfg.size))

        torch.manual_seed(cfg.seed)
        self.func = FunctionGenerator(cfg.func).to(device)
        net = function_parts(self.func)
        make = functools.partial(adam, torch.optim.Adam, cfg=cfg, device=device)
        self.opts = with_muon(net, cfg.muon, make)
        self.rates = [group["lr"] for group in groups_of(self.opts)]
        self.hold(net, opt=self.opts)
        self.drawer = copy.deepcopy(self.func)       # with the average of the weights
        self.drawer.embed = self.shown["embed"]
        self.drawer.predict = self.shown["predict"]
        speed_up(cfg, device, [self.func], [(self.func, "redraw")])

    def batches(self, start: int) -> Iterator[dict]:
        """Whole pictures, and the noise that shifts their coordinates."""
        return self.whole_pictures(start, {"coord_noise": (self.cfg.size, self.cfg.size, 2)})

    def step(self, batch: dict, k: int) -> dict[str, Tensor]:
        """One iteration: the encoder is skipped, and sigma is 0."""
        cfg = self.cfg
        drop = 0.1 if cfg.lr_drop and k >= 0.8 * cfg.steps else 1
        for group, rate in zip(groups_of(self.opts), self.rates):
            group["lr"] = rate * drop

        logs: dict = {}
        for part in micro_batches(batch, cfg.accum):
            x = part["image"]                                    # (B, 3, S, S)
            coord = moved_grid(part["coord_noise"], cfg.func.corners)            # (B, S, S, 2)
            with self.autocast():                    # c_in is 1 / sigma_data at sigma = 0
                rgb = self.func.redraw(x / ConsistencyConfig.sigma_data, coord)  # (B, 3, S, S)
            loss = self.loss(rgb, x)                             # Eq. (10)
            (loss / cfg.accum).backward()
            logs = accumulate(logs, {"loss": loss}, cfg.accum)
        return logs | {"taken": descend(self.opts)}

    def reconstruct(self, image: Tensor) -> ImageFunction:
        """The pictures image (B, 3, S, S) as functions, by the average of the weights."""
        return self.drawer.reconstruct(image / ConsistencyConfig.sigma_data)

    def validate(self) -> dict[str, Tensor]:
        return psnr_at_1x(self)

    def scores(self) -> dict:
        return evaluate(self.reconstruct, self.held_out, self.cfg.eval_n, self.cfg.size, [1, 2],
                        self.device)

    def preview(self, folder: Path, k: int) -> None:
        rows = reconstructions(self, [1, 2])
        self.sheet(rows, 2 * self.cfg.size, folder, k, "input, then render | truth at 1x, 2x")


# ---- stage cm: consistency training ----

# Appendix A.3: base 256, 2 residual blocks, mult 1,2,3,4, attention at 32, 16 and 8 px. open:
# resampling inside the residual blocks and heads of 64 channels, as in the launch script of Song
# et al. (it cannot be 4 heads of 64 as well).
CM_UNET = UNetConfig(model_channels=256, num_head_channels=64, resblock_updown=True)


@dataclass(frozen=True)
class CMRun(Run):
    """Stage cm: consistency training of one of four generators (CM-Func 3.1, A.1)."""

    steps: int = 900_000              # A.1: 400,000 for CIFAR-10
    K: int = 0                        # length of the run as its schedule knows it; 0: steps
    batch: int = 32                   # A.1
    lr: float = 5e-4                  # A.1, RAdam; open: no warm-up, clipping or weight decay
    muon: float = 0.0                 # not in the paper: rate of Muon, see with_muon; 0: RAdam only
    beta1: float = 0.9                # open: RAdam's own
    beta2: float = 0.999
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
    cm: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    ct: Schedule = field(default_factory=Schedule)
    ict: ICT = field(default_factory=ICT)
    ect: ECT = field(default_factory=ECT)
    func: GeneratorConfig = field(default_factory=GeneratorConfig)
    vit: TransformerConfig = field(default_factory=TransformerConfig)        # of uvit and dit
    unet: UNetConfig = field(default_factory=lambda: CM_UNET)


class CMStage(Stage):
    """f learns to go from noise to image (function) in one step (CM-Func 3.1).

    loss: a metric, (a (B, 3, S, S), b (B, 3, S, S)) -> (B,), in place of option metric.
    """

    name = "cm"
    options = CMRun

    def build(self) -> None:
        device = self.device
        self.cfg = cfg = cm_config(self.cfg, class_count(self.cfg, self.source))
        self.schedule = getattr(cfg, cfg.schedule)
        self.K = cfg.K or cfg.steps
        self.metric = self.loss or cm_metric(cfg, device)
        self.denoiser = frozen_denoiser(cfg, device) if cfg.distil else None

        torch.manual_seed(cfg.seed)
        net = build_generator(cfg.generator, functools.partial(getattr, cfg))
        self.f = ConsistencyModel(net, cfg.cm).to(device)
        self.makes_functions = hasattr(net, "function")
        self.target = self.f                         # without a teacher, its own
        if self.schedule.mu(0, self.K):
            self.target = copy.deepcopy(self.f).requires_grad_(False)
        make = functools.partial(torch.optim.RAdam, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
        self.opts = with_muon(net, cfg.muon, make)
        plan = Guard(self.K, "the schedule of this run was planned for {was} steps, this one for "
                             "{now}: K={was} goes on by the old plan, another --out starts over")
        teacher = {} if self.target is self.f else {"target": self.target.net}
        self.hold(net, K=plan, opt=self.opts, **teacher)
        self.extra = {"classes": list(self.source.classes) if self.tells_classes else []}
        nets = [net, *teacher.values()]
        speed_up(cfg, device, nets, [(one, "forward") for one in nets])

    @property
    def tells_classes(self) -> bool:
        return self.net.cfg.num_classes > 0

    def begin(self) -> None:
        """Take over what stage pretrain has learned (3.4), or all of another run of stage cm.

        The latter is how consistency tuning starts from a denoiser, which schedule=ect ect.k=1e9
        ect.b=0 trains (r = 0).
        """
        cfg = self.cfg
        if cfg.init in ("", "none"):
            return
        if not Path(cfg.init).exists():
            raise ValueError(f"stage cm starts from stage pretrain and there is none at "
                             f"{cfg.init}; run --stage pretrain first with the same --data and "
                             f"--preset, name one with init=RUN, or give init=none")
        stage, best, _ = starting_point(cfg.init, "pretrain", "cm")
        if stage == "pretrain" and cfg.generator != "func":
            raise ValueError(f"init={cfg.init}: only generator=func has a pre-training")
        part = function_parts(self.net) if stage == "pretrain" else self.net
        load_weights(part, best, f"the weights in {cfg.init}")
        for other in (self.shown, self.target.net):
            other.load_state_dict(self.net.state_dict())

    def batches(self, start: int) -> Iterator[dict]:
        """Whole pictures and their noise; for functions also the shifts of their coordinates."""
        size = self.cfg.size
        coord = {"coord_noise": (size, size, 2)} if self.makes_functions else {}
        return self.whole_pictures(start, {"noise": (3, size, size)} | coord)

    def levels(self, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Noise levels t > r, (B,) each, of the samples: drawn for all of step k, each its own."""
        cfg = self.cfg
        generator = torch.Generator().manual_seed(int(rng(cfg.seed, "levels", k).integers(2**62)))
        t, r = self.schedule.levels(k, self.K, cfg.batch, generator, cfg.cm)
        own = index % cfg.batch
        return (t[own].to(self.device, non_blocking=True),
                r[own].to(self.device, non_blocking=True))

    def step(self, batch: dict, k: int) -> dict[str, Tensor]:
        """One iteration: student to target, then the target follows the new student by mu(k).

        Student and target see the same noise and the same coordinates. With a denoiser it is
        consistency distillation.
        """
        cfg = self.cfg
        logs: dict = {}
        for part in micro_batches(batch, cfg.accum):
            t, r = self.levels(part["index"], k)                 # (B,)
            y = part["label"] if self.tells_classes else None
            extra = {}
            if self.makes_functions:                             # (B, S, S, 2)
                extra["coord"] = moved_grid(part["coord_noise"], cfg.func.corners)
            with self.autocast():
                d = consistency_loss(self.f, self.target, part["image"], part["noise"], t, r,
                                     self.metric, y, self.denoiser, **extra)     # (B,)
            loss = (self.schedule.weight(t, r) * d).mean()       # Eq. (5)
            (loss / cfg.accum).backward()
            logs = accumulate(logs, {"loss": loss, "difference": d.mean()}, cfg.accum)
        taken = descend(self.opts)
        if self.target is not self.f and taken:      # theta^- <- mu theta^- + (1 - mu) theta
            ema_update(self.target, self.f, self.schedule.mu(k, self.K))
        place = self.schedule.log(k, self.K)
        return logs | {n: torch.tensor(v) for n, v in place.items()} | {"taken": taken}

    @functools.cached_property
    def judged(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Held-out pictures x (n, 3, S, S), noise like x, labels (n,)."""
        n = min(self.cfg.eval_n, len(self.held_out))
        x = torch.cat([self.held_image(i) for i in range(n)])
        noise = [torch_noise(x.shape[1:], self.cfg.seed, "held out", i) for i in range(n)]
        y = torch.tensor([self.held_out.label(i) for i in range(n)], device=self.device)
        return x, torch.stack(noise).to(self.device), y if self.tells_classes else None

    def validate(self) -> dict[str, Tensor]:
        """Denoising distance of the student (Section 4.1, Appendix B)."""
        return {"denoising_distance": denoising_distance(self.f, *self.judged)[1].mean()}

    @torch.no_grad()
    def preview(self, folder: Path, k: int) -> None:
        """Eight samples of fixed noise at 1x, functions also at 2x, beside bilinear upsampling.

        Below, four held-out pictures, each followed by what f makes of it at seven noise levels.
        """
        size = self.cfg.size
        f = ConsistencyModel(self.shown, self.cfg.cm)
        model = OneStep(f, size)
        if self.makes_functions:
            functions = model.functions(range(8), self.cfg.seed)
            once = functions.draw(size).clamp(-1, 1)
            larger = F.interpolate(once, scale_factor=2, mode="bilinear")
            rows = [list(to_uint8(images)) for images in (once, functions.draw(2 * size), larger)]
        else:
            rows = [list(to_uint8(model.sample(range(8), self.cfg.seed)))]
        x, noise, y = (v if v is None else v[:4] for v in self.judged)
        sigmas = self.cfg.cm.karras_sigmas(18, self.device)[:14:2]               # (7,)
        columns = [to_uint8(x)]
        for sigma in sigmas:
            columns.append(to_uint8(f(x + sigma * noise, sigma.expand(len(x)), y)))
        rows += [list(row) for row in zip(*columns)]
        drawn = "samples at 1x, 2x, 1x enlarged" if self.makes_functions else "samples"
        self.sheet(rows, 2 * size, folder, k, f"{drawn}; then held-out pictures, denoised from "
                   f"noise {sigmas[0]:.3g} to {sigmas[-1]:.2g}")


def cm_config(cfg: CMRun, classes: int) -> CMRun:
    """Fill in what follows from the data and from other options; ValueError for unknown names."""
    for name, known in (("schedule", ("ct", "ict", "ect")), ("metric", ("lpips", "l2", "huber")),
                        ("generator", tuple(GENERATORS))):
        if getattr(cfg, name) not in known:
            raise ValueError(f"unknown {name} {getattr(cfg, name)}; there are: {', '.join(known)}")
    part = GENERATORS[cfg.generator][2]
    own = {f"{part}.num_classes": classes}
    if part != "unet":
        own[f"{part}.size"] = cfg.size
    return unflatten(CMRun, own, cfg)


def cm_metric(cfg: CMRun, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The distance between student and target."""
    if cfg.metric != "lpips":
        return {"l2": l2, "huber": pseudo_huber}[cfg.metric]
    network = lpips_network(cfg.lpips, "train without it: metric=huber schedule=ect")
    return lpips_resized(network.to(device), average_pool=cfg.lpips == "vgg", size=cfg.lpips_size)


def frozen_denoiser(cfg: CMRun, device: torch.device) -> ConsistencyModel:
    """Load the denoiser of `distil`; it may be another generator than the one that learns."""
    made = load(cfg.distil, device)
    classes = getattr(cfg, GENERATORS[cfg.generator][2]).num_classes
    fits = isinstance(made, OneStep) and made.size == cfg.size
    if not fits or made.f.net.cfg.num_classes != classes:
        raise ValueError(f"distil={cfg.distil} must be a run of stage cm at {cfg.size} px, "
                         f"with{'' if classes else 'out'} classes")
    return made.f


STAGES = {stage.name: stage for stage in (AEStage, LDMStage, PretrainStage, CMStage)}
