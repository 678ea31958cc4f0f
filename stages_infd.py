"""The stages of INFD: ae, the autoencoder (J.1, J.2), and ldm, diffusion of its latents (J.2).

A stage stands below its options, whose defaults are the paper's ("open": left open there).
"""
from __future__ import annotations

import functools
import hashlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import data
from autoencoder import (AutoencoderConfig, DiscriminatorConfig, FieldAutoencoder,
                         PatchDiscriminator, adaptive_weight, first_order, hinge_loss)
from clif import Field
from data import TOLERATED, DataConfig, Source, to_uint8
from files import shown
from ldm import DiffusionConfig, GaussianDiffusion, UNet, UNetConfig
from metrics import lpips_network
from models import (GUIDANCE, INFD, LatentScale, load, published_autoencoder, same_encoder,
                    start_of)
from published import WEIGHT_FILES
from runs import all_mean, flatten, load_weights, print_once, ranks, rng
from stages import (Reconstruction, Run, Stage, add_up, descend, micro_batches, optimisers,
                    readable, starting_point)
from text import TextConfig, TextTransformer, WordTokenizer, clip_tokenizer


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
    init: str = ""                    # run or file of stage ae to start from, or file of LDM or SD
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
            raise ValueError("frozen_encoder=true goes with init=RUN or FILE")
        self.terms = {"own": (1.0, self.loss)} if self.loss else {"l1": (1.0, F.l1_loss)}
        if cfg.lpips != "none" and not self.loss:
            self.lpips = lpips_network(cfg.lpips).to(self.device)
            self.terms["lpips"] = (cfg.lpips_weight, self.lpips)
        if cfg.gan_weight and cfg.patch < 3 * 2**cfg.disc.n_layers:
            raise ValueError(f"disc.n_layers={cfg.disc.n_layers} sees no patch={cfg.patch}: take "
                             f"patches of {3 * 2**cfg.disc.n_layers} px, or fewer layers")
        torch.manual_seed(cfg.seed)
        net = FieldAutoencoder(cfg.ae).to(self.device)
        self.disc = PatchDiscriminator(cfg.disc).to(self.device)
        if self.device.type == "cuda" and ranks()[1] > 1:
            self.disc = nn.SyncBatchNorm.convert_sync_batchnorm(self.disc)
        net.encoder.requires_grad_(not cfg.frozen_encoder)
        self.opts = optimisers(net, cfg)
        self.opts_d = optimisers(self.disc, cfg)
        self.scales = [s for s in (1, 2, 4, 8) if s <= 4 or s * cfg.size <= 2 * cfg.max_size]
        judges = [self.lpips] if self.lpips else []
        calls = [(part, "forward") for part in (net.encoder, net.decoder, *judges)]
        if cfg.ae.renderer == "clif":    # the adaptive weight asks for gradients of the rest alone
            calls.append((net.renderer, "body"))
        self.hold(net, calls, *judges, disc=self.disc, opt_d=self.opts_d)

    @classmethod
    def implied(cls, given: dict) -> dict[str, object]:
        """The architecture of the autoencoder in a published file; the renderer is free."""
        path = Path(given.get("init", ""))
        if path.suffix not in WEIGHT_FILES:
            return {}
        groups = given.get("ae.groups", AutoencoderConfig.groups)
        found = published_autoencoder(path, groups).cfg
        fixed = ("ch", "ch_mult", "num_res_blocks", "z_channels", "kl", "lowres", "n_embed",
                 "groups")
        return {f"ae.{name}": getattr(found, name) for name in fixed}

    def begin(self) -> None:
        cfg = self.cfg
        if Path(cfg.init).suffix in WEIGHT_FILES:
            print_once(f"keeping encoder and decoder of {cfg.init}, with a new renderer")
            theirs = published_autoencoder(Path(cfg.init), cfg.ae.groups).state_dict()
            kept = {k: v for k, v in theirs.items() if not k.startswith("renderer.")}
            fresh = {k: v for k, v in self.net.state_dict().items() if k.startswith("renderer.")}
            load_weights(self.net, kept | fresh, f"the autoencoder in {cfg.init}")
        elif cfg.init:
            _, best, ckpt = starting_point(cfg.init, "ae")
            load_weights(self.net, best, f"the autoencoder in {cfg.init}")
            if "disc" in ckpt["state"]:
                load_weights(self.disc, ckpt["state"]["disc"], f"the discriminator in {cfg.init}")
            elif cfg.gan_weight > 0:
                print_once(f"{cfg.init} has no discriminator; a new one learns")

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

    def with_gan(self, k: int) -> bool:
        return self.cfg.gan_weight > 0 and k >= self.cfg.gan_start

    def prepare(self, k: int) -> None:
        self.statistics = [b.clone() for b in self.disc.buffers()]

    def objective(self, part: dict, k: int) -> tuple[Tensor, dict]:
        """L1 + LPIPS, VQ or KL (J.2), the adversarial loss at its adaptive weight (code)."""
        cfg = self.cfg
        rgb, reg = self.draw(part)                               # (B, 3, P, P), ()
        logs = {"reg": reg}
        nll = 0.0
        for name, (weight, distance) in self.terms.items():
            with self.autocast():
                logs[name] = distance(rgb, part["patch"]).float().mean()         # ()
            nll = nll + weight * logs[name]
        loss = nll + cfg.reg_weight * reg
        if not self.with_gan(k):
            return loss, logs | {"loss": loss}
        self.disc.requires_grad_(False)
        with self.autocast():
            g = -self.disc(rgb).float().mean()
        pull = first_order(nll, rgb)
        push = first_order(g, rgb)
        weight = adaptive_weight(pull, push, self.net.renderer.last_weight, all_mean)
        logs |= {"gan": g, "gan_weight": weight, "loss": loss + cfg.gan_weight * weight * g}
        return pull + cfg.reg_weight * reg + cfg.gan_weight * weight * push, logs

    def adversary(self, part: dict) -> tuple[Tensor, dict]:
        """The hinge loss of the discriminator, on what the updated generator draws."""
        with torch.no_grad():
            rgb, _ = self.draw(part)
        with self.autocast():                                    # apart, for BatchNorm
            real = self.disc(part["patch"]).float()
            fake = self.disc(rgb).float()
        loss = hinge_loss(real, fake)
        return loss, {"disc": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}

    def follow(self, batch: dict, k: int, taken: Tensor) -> dict[str, Tensor]:
        """The discriminator's turn (J.2); without finite gradients of both it stays as it was."""
        if not self.with_gan(k):
            return {}
        logs: dict = {}
        self.disc.requires_grad_(True)
        for part in micro_batches(batch, self.cfg.accum):
            loss, terms = self.adversary(part)
            (loss / self.cfg.accum).backward()
            add_up(logs, terms, self.cfg.accum)
        taken = descend(self.opts_d, taken)
        for b, old in zip(self.disc.buffers(), self.statistics):
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
    start: str = ""                   # run of stage ldm to start from, or file of LDM or SD
    latent_norm: bool = False         # scale latents to unit variance first (published: no)
    labels: str = "auto"              # auto: tell the UNet the classes, if there are; true | false
    text: bool = False                # tell it the captions, of which it learns words, instead
    words: str = ""                   # filled in: which words those are
    p_uncond: float = 0.1             # leave class or caption out this often, for guidance (SD)
    p_shorten: float = 0.0            # and words of a caption this often: for short prompts
    pictures: int = 0                 # with cache: learn from the first so many only; 0: all
    cache: bool = False               # encode every picture once, unmirrored; keep z in memory
    preview_steps: int = 20           # of the sample sheets, by DPM-Solver++
    unet: UNetConfig = UNetConfig()
    context: TextConfig = TextConfig(width=256, layers=4, heads=4, hidden=1024)  # with text=true
    diffusion: DiffusionConfig = DiffusionConfig()


MOST_CAPTIONS = 10_000                      # that words are learnt from, at random over the set
EXAMPLES = 256                              # captions kept, to be drawn where no prompt is given


class Latents(list):
    """Latents (C, h, w) of the pictures `kept` of a source, for `data.loader`."""

    def __init__(self, latents: Tensor, source: Source, kept: list[int]):
        super().__init__(latents)
        self.source = source
        self.kept = kept

    def label(self, i: int) -> int:
        return self.source.label(self.kept[i])

    def caption(self, i: int) -> str:
        return self.source.caption(self.kept[i])


@torch.no_grad()
def encoded(stage: Stage, base: INFD) -> Latents:
    """The latents of the first cfg.pictures, or all, pictures; of the KL variant the means.

    Every rank encodes its share, 32 pictures at a time, and gets the others' from them.
    """
    cfg = stage.cfg
    source = stage.source
    n = min(cfg.pictures or len(source), len(source))
    print_once(f"encoding {n:,} pictures")
    rank, world = ranks()
    rounds = -(-n // (32 * world))               # as many for every rank: the last may be empty
    blocks = [range(n)[32 * (k * world + rank):][:32] for k in range(rounds)]
    draw = functools.partial(readable, source=source, size=cfg.size)
    batches = DataLoader(range(n), batch_sampler=blocks, num_workers=cfg.workers, collate_fn=draw,
                         worker_init_fn=data.outlive_signals)
    kept = []
    latents = []
    bad = 0
    for numbers, x, skipped in batches:
        z = []
        if numbers:                              # a copy: what is sent of a view is all behind it
            z = [base.autoencoder.encode(x.to(stage.device)).cpu().contiguous()]
        for read, made, unread in all_gathered((numbers, z, skipped)):
            bad += len(unread)
            data.report(unread, bad, n, min(max(TOLERATED, n // 100), n - 1))
            kept += read
            latents += made
    return Latents(torch.cat(latents), source, kept)


def all_gathered(value: object) -> list:
    """The values of all ranks, in their order."""
    world = ranks()[1]
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


def check_chances(cfg: Run, text: bool) -> None:
    """ValueError where `leave_out` cannot do what the options ask for."""
    data.check_probabilities(cfg, "p_uncond", "p_shorten")
    if cfg.p_shorten and not text:
        raise ValueError("p_shorten leaves out words of captions, and this UNet is told none")


def leave_out(batch: dict, cfg: Run) -> dict:
    """Leave out the captions of some samples or their classes, each with probability p_uncond.

    Of others, each with probability p_shorten, keep random words in their order: where captions
    always name everything, a UNet learns that what a prompt leaves out is not wanted.
    """
    told = "caption" in batch or cfg.unet.num_classes
    if not told or not (cfg.p_uncond or cfg.p_shorten):
        return batch
    index = batch["index"].tolist()
    out = [rng(cfg.seed, "uncond", n).random() < cfg.p_uncond for n in index]
    if "caption" in batch:
        texts = batch["caption"]
        if cfg.p_shorten:
            texts = [shortened(text, rng(cfg.seed, "shorten", n), cfg.p_shorten)
                     for n, text in zip(index, texts)]
        return batch | {"caption": ["" if left else text for left, text in zip(out, texts)]}
    left = torch.tensor(out).to(batch["label"].device, non_blocking=True)        # (B,)
    return batch | {"label": torch.where(left, cfg.unet.num_classes, batch["label"])}


def shortened(text: str, g: np.random.Generator, chance: float) -> str:
    """Keep a random share of the words, in their order, with probability `chance`."""
    if g.random() >= chance:
        return text
    share = g.random()
    return " ".join(word for word in text.split() if g.random() < share)


def as_autoencoder(base: INFD) -> dict:
    """What a checkpoint of the stages after ae keeps of it."""
    config = flatten({"ae": base.autoencoder.cfg, "size": base.size, "patch": base.patch})
    return {"config": config, "weights": base.autoencoder.state_dict()}


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
            raise ValueError(f"stage ldm needs an autoencoder, and there is none at init={cfg.init}"
                             f"; run --stage ae first, or give init=RUN")
        base = load(cfg.init, self.device)
        if not isinstance(base, INFD):
            raise ValueError(f"init={cfg.init} is a model of stage cm; give one of stage ae or ldm")
        if base.size != cfg.size:
            raise ValueError(f"{cfg.init} was trained at size={base.size}; give size={base.size}")
        self.base = base = replace(base, unet=None, text=None, f=None)   # of a file that has them
        self.source = getattr(self.source, "photos", self.source)    # of the 6K-mix: all at once
        self.extra["autoencoder"] = frozen = as_autoencoder(base)
        encoder = (v for name, v in frozen["weights"].items() if name.startswith("encoder."))
        digest = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in encoder)).hexdigest()
        n = base.latent_shape[0]
        self.started = Path(cfg.start).suffix in WEIGHT_FILES        # from a published file
        self.cfg = cfg = replace(self.learn_words(), encoder=digest[:16])
        classes = self.tell_classes()
        own = {"in_channels": n, "out_channels": n, "num_classes": classes,
               "null_class": classes > 0 and cfg.p_uncond > 0,
               "context_dim": cfg.context.width if cfg.text else 0}
        for name, value in own.items():
            asked = getattr(cfg.unet, name)
            if asked not in (value, getattr(UNetConfig, name)):
                raise ValueError(f"unet.{name}={asked}: by data and autoencoder it is {value}; "
                                 f"leave it out")
        unet = replace(cfg.unet, **own)
        self.cfg = cfg = replace(cfg, unet=unet)
        torch.manual_seed(cfg.seed)
        net = UNet(unet).to(self.device)
        calls = [(net, "forward"), (base.autoencoder.encoder, "forward")]
        if cfg.text:
            net = nn.ModuleDict({"unet": net, "text": TextTransformer(cfg.context)}).to(self.device)
            net["text"].requires_grad_(not self.started)         # as Stable Diffusion was trained
            calls.append((net["text"], "forward"))
        self.scale = LatentScale(n).to(self.device)
        self.diffusion = GaussianDiffusion(cfg.diffusion)
        try:
            self.diffusion.solver_timesteps(cfg.preview_steps, start_of(self.diffusion))
        except ValueError as error:
            raise ValueError(f"preview_steps: {error}") from error
        self.opts = optimisers(net, cfg)
        self.hold(net, calls, base.autoencoder.encoder, scale=self.scale)

    @classmethod
    def implied(cls, given: dict) -> dict[str, object]:
        """UNet, text encoder and noise schedule of a published file; it knows no classes."""
        path = Path(given.get("start", ""))
        if path.suffix not in WEIGHT_FILES:
            return {}
        model = load(path)
        if model.unet is None:
            raise ValueError(f"start={path} has no UNet; take the file that holds the whole model")
        context = {} if model.text is None else {"context": model.text.cfg}
        found = flatten({"unet": model.unet.cfg, "diffusion": model.diffusion.cfg, **context})
        found = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()
                 if name != "unet.dropout"}
        return found | {"text": model.text is not None, "labels": "false", "latent_norm": False}

    def learn_words(self) -> LDMRun:
        """With text=true make the tokenizer of the training captions; returns the options."""
        cfg = self.cfg
        check_chances(cfg, cfg.text)
        if not cfg.text:
            return cfg
        if cfg.labels == "true":
            raise ValueError("text=true tells captions, not classes: leave labels=true out")
        n = min(cfg.pictures or len(self.source), len(self.source))
        some = rng(0, "captions").permutation(n)[:MOST_CAPTIONS].tolist()
        captions = [self.source.caption(i) for i in some]
        told = [caption for caption in captions if caption]
        if not told:
            raise ValueError(f"text=true: {shown(cfg.data)} has no captions; put name.txt "
                             f"beside name.jpg, or a metadata.jsonl (file_name, text)")
        if self.started:
            self.tokenizer = clip_tokenizer(Path(cfg.start), None, cfg.context)
        elif cfg.start:                                          # whose words have their numbers
            self.tokenizer = getattr(load(cfg.start), "tokenizer", None)
            if not isinstance(self.tokenizer, WordTokenizer):
                raise ValueError(f"start={cfg.start} knows no words of text=true; start from a "
                                 f"run that learned captions")
        else:
            self.tokenizer = WordTokenizer.learn(told)
        state = self.tokenizer.state()
        known = "CLIP's pieces of words" if self.started else f"{len(self.tokenizer) - 2:,} words"
        print_once(f"captions: {known} of {len(captions):,} pictures, "
                   f"{len(captions) - len(told):,} of them without; the first: {told[0][:90]}")
        self.extra |= {"tokenizer": state, "captions": told[:EXAMPLES]}
        digest = hashlib.sha256(repr(state).encode()).hexdigest()
        context = replace(cfg.context, vocabulary=len(self.tokenizer), positions=state["length"])
        return replace(cfg, labels="false", words=digest[:16], context=context)

    def begin(self) -> None:
        """Take over what `start` has; with latent_norm, measure the latents of 512 samples."""
        cfg = self.cfg
        if cfg.start:
            print_once(f"starting from the UNet in {cfg.start}")
            theirs = load(cfg.start)
            if not isinstance(theirs, INFD) or theirs.unet is None or theirs.f is not None:
                raise ValueError(f"{cfg.start} is no run of stage ldm")
            if not same_encoder(theirs, self.base):
                print_once(f"warning: {cfg.init} has not the encoder of {cfg.start}, so the UNet "
                           f"has to learn other latents")
            part = theirs.unet
            if cfg.text:
                part = nn.ModuleDict({"unet": theirs.unet, "text": theirs.text})
            load_weights(self.net, part.state_dict(), f"the UNet in {cfg.start}")
            load_weights(self.scale, theirs.scale.state_dict(), f"the scale of {cfg.start}")
        if cfg.latent_norm:
            some = itertools.islice(self.batches(0), -(-512 // cfg.batch))
            parts = (part for batch in some for part in micro_batches(batch, cfg.accum))
            z = torch.cat([self.encode(part).cpu().double() for part in parts])      # (N, C, h, w)
            mean, square = all_mean([v.mean(dim=(0, 2, 3)) for v in (z, z.square())])
            self.scale.mean.copy_(mean)
            self.scale.std.copy_((square - mean.square()).sqrt())

    def batches(self, start: int) -> Iterator[dict]:
        shape = self.base.latent_shape
        kl = self.base.autoencoder.cfg.kl and not self.cfg.cache
        noise = {"noise": shape} | ({"latent_noise": shape} if kl else {})
        source = self.latents if self.cfg.cache else None
        for batch in self.loaded(start, source=source, captions=self.cfg.text, **noise):
            batch = leave_out(batch, self.cfg)
            if self.cfg.text:
                tokens = self.tokenizer(batch.pop("caption"))                            # (B, N)
                batch["tokens"] = tokens.to(self.device, non_blocking=True)
            yield batch

    @functools.cached_property
    def latents(self) -> Latents:
        return encoded(self, self.base)

    def collect(self) -> None:
        if self.cfg.cache:
            print_once(f"{len(self.latents):,} latents")

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

    def denoise(self, net: nn.Module, z: Tensor, t: Tensor, noise: Tensor, part: dict) -> Tensor:
        """The loss (B,) of latents z (B, C, h, w) at times t (B,), with classes or captions."""
        y = part["label"] if self.extra["classes"] else None
        model = net
        if self.cfg.text:                                        # context (B, N, D)
            model = functools.partial(net["unet"], context=net["text"](part["tokens"]))
        return self.diffusion.loss(model, z, t, noise, y)

    def objective(self, part: dict, k: int) -> tuple[Tensor, dict]:
        """The mean squared error of the predicted noise, at uniform times of the samples' own."""
        z = self.scale(self.encode(part))                        # (B, C, h, w)
        t = self.times(part["index"])                            # (B,)
        with self.autocast():
            loss = self.denoise(self.net, z, t, part["noise"], part).mean()
        return loss, {"loss": loss}

    @torch.no_grad()
    def validate(self) -> dict[str, Tensor]:
        """The loss of held-out latents, of each always at the same time and noise."""
        numbers, x, y = self.judged
        z = self.scale(torch.cat([self.base.autoencoder.encode(one) for one in x.split(1)]))
        t = torch.arange(len(z), device=self.device) * self.cfg.diffusion.steps // len(z)
        part = {"label": y}
        if self.cfg.text:
            captions = [self.held_out.caption(i) for i in numbers]
            part = {"tokens": self.tokenizer(captions).to(self.device)}          # (n, N)
        loss = self.denoise(self.shown, z, t, self.noise_like(z), part)          # (n,)
        return {"held_out_loss": loss.mean()}

    def preview(self, folder: Path, k: int) -> None:
        model = replace(self.base, unet=self.shown, diffusion=self.diffusion, scale=self.scale,
                        sampler="dpm++")
        if self.cfg.text:
            model = replace(model, unet=self.shown["unet"], text=self.shown["text"],
                            tokenizer=self.tokenizer, captions=self.extra["captions"],
                            guidance=GUIDANCE if self.cfg.p_uncond else 1.0)
        drawn = model.decode(model.sample(range(8), self.cfg.seed, self.cfg.preview_steps))
        sides = [s * model.size for s in (1, 2, 4) if s == 1 or s * model.size <= 512]
        rows = [to_uint8(drawn.draw(side)) for side in sides]
        self.sheet(rows, sides[-1], folder, k, f"the same samples at {sides} px")
