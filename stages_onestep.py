"""One-step INFD, which joins the papers: stage cm (CM-Func 3.1) in the latents of INFD.

`python train.py --stage cm latents=RUN`: RUN, of stage ldm, gives autoencoder, scale and UNet.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from clif import coord_grid
from consistency import Guided, LatentConsistency, denoising_distance, l2
from data import to_uint8
from models import INFD, load
from runs import flatten, print_once, rng
from stages import set_rates
from stages_func import CMRun, CMStage, cm_config, smallest
from stages_infd import Latents, as_autoencoder, check_chances, encoded, leave_out
from text import CLIPTokenizer


UNRECTIFIED = 5                             # steps before RAdam divides by the gradient's size


class DecodedLPIPS(nn.Module):
    """LPIPS in the latents of INFD: of what a window of each draws, for which they are decoded.

    Squared errors of latents weigh alike what shows and what does not. Only a window is decoded:
    to draw all of a latent, and its gradient, takes many times what the UNet takes.
    """

    def __init__(self, base: INFD, lpips: nn.Module, window: int, l2_weight: float):
        """lpips: a frozen module (a, b) -> one distance per image; l2_weight: of `l2` of all."""
        super().__init__()
        self.autoencoder = base.autoencoder
        self.scale = base.scale
        self.lpips = lpips
        self.window = window
        self.l2_weight = l2_weight

    def draw(self, z: Tensor, corner: Tensor) -> Tensor:
        """A window of latents (B, C, h, w) from corner (B, 2) on, at f pixels a latent."""
        span = torch.arange(self.window, device=z.device)
        y, x = (corner[:, :, None] + span).unbind(1)                             # (B, window)
        image = torch.arange(len(z), device=z.device)[:, None, None]
        part = z.movedim(1, -1)[image, y[:, :, None], x[:, None]].movedim(-1, 1)  # (B, C, n, n)
        side = self.window * self.autoencoder.cfg.f
        coord = coord_grid((side, side), device=z.device).expand(len(z), -1, -1, -1)
        phi = self.autoencoder.decode(self.scale.inverse(part))
        return self.autoencoder.renderer(phi, coord, coord.new_full((len(z), 2), 2 / side))

    def forward(self, a: Tensor, b: Tensor, corner: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> (B,)."""
        d = self.lpips(self.draw(a, corner), self.draw(b, corner)).flatten()     # (B,)
        return d + self.l2_weight * l2(a, b)


class LatentCMStage(CMStage):
    """f goes from noise to a latent in one step. First as a denoiser (r = 0), for which the UNet of
    a diffusion is a start, then along that denoiser's trajectories (distil), or by tuning."""

    def build(self) -> None:
        cfg = self.cfg
        self.base = base = load(cfg.latents, self.device)
        if not isinstance(base, INFD) or base.unet is None or base.f is not None:
            raise ValueError(f"latents={cfg.latents} must be a run of stage ldm")
        if isinstance(base.tokenizer, CLIPTokenizer):
            raise ValueError(f"latents={cfg.latents} began as Stable Diffusion, whose text encoder "
                             f"this stage does not take")
        sees = cfg.metric == "lpips" and self.loss is None
        if sees and not 1 <= cfg.lpips_window <= base.latent_shape[1]:
            raise ValueError(f"lpips_window={cfg.lpips_window}: the latents of {cfg.latents} are "
                             f"{base.latent_shape[1]} a side")
        self.source = getattr(self.source, "photos", self.source)    # of the 6K-mix: all at once
        if cfg.generator not in (CMRun.generator, "unet"):
            raise ValueError(f"generator={cfg.generator}: with latents=RUN its UNet learns; leave "
                             f"generator out")
        if cfg.labels == "true" and not base.classes:
            raise ValueError(f"labels=true: latents={cfg.latents} is told no classes")
        side = cfg.lpips_window * base.autoencoder.cfg.f
        if sees and side < smallest(cfg.lpips):
            raise ValueError(f"lpips_window={cfg.lpips_window}: LPIPS would look at {side} px, and "
                             f"needs {smallest(cfg.lpips)}")
        scalings = replace(cfg.cm, sigma_data=1.0, boundary=False)
        cfg = replace(cfg, generator="unet", size=base.size, flip=False, cm=scalings,
                      labels=cfg.labels if base.classes else "false")
        self.cfg = replace(cm_config(cfg, 0), unet=base.unet.cfg)
        if base.classes and cfg.labels == "false":
            raise ValueError(f"latents={cfg.latents} is told classes: leave labels=false out")
        if self.tell_classes() != len(base.classes) or self.extra["classes"] != list(base.classes):
            raise ValueError(f"latents={cfg.latents} knows the classes {', '.join(base.classes)}; "
                             f"{cfg.data} has {', '.join(self.source.classes) or 'none'}")
        self.extra |= {"autoencoder": as_autoencoder(base),
                       "diffusion": flatten(base.diffusion.cfg)}
        if base.text is not None:
            self.extra |= {"tokenizer": base.tokenizer.state(), "captions": list(base.captions),
                           "text": {"config": flatten({"context": base.text.cfg}),
                                    "weights": base.text.state_dict()}}
        check_chances(cfg, base.text is not None)
        if (cfg.p_uncond or cfg.guidance != 1) and not (base.text or base.unet.cfg.null_class):
            raise ValueError(f"p_uncond and guidance: the UNet of latents={cfg.latents} never "
                             f"learned to draw without its class")
        net = base.unet.requires_grad_(True)         # without dropout, as all of stage cm
        f = LatentConsistency(net, self.cfg.cm, -base.diffusion.log_rho)
        self.assemble(f, base, scale=base.scale)
        if cfg.guidance != 1:
            if self.denoiser is None:
                raise ValueError("guidance is of the denoiser that distil=RUN names")
            null = None if base.text is None else self.told([""])["context"]
            self.denoiser = Guided(self.denoiser, cfg.guidance, null).to(self.device)

    def judge(self, lpips: nn.Module) -> nn.Module:
        return DecodedLPIPS(self.base, lpips, self.cfg.lpips_window, self.cfg.l2_weight)

    def metric_at(self, index: Tensor, k: int) -> Callable:
        """LPIPS looks at a window of each sample, drawn for all of step k."""
        if not isinstance(self.metric, DecodedLPIPS):
            return self.metric
        room = self.base.latent_shape[1] - self.cfg.lpips_window
        drawn = rng(self.cfg.seed, "window", k).integers(0, room + 1, (self.cfg.batch, 2))
        corner = torch.from_numpy(drawn)[index % self.cfg.batch]                 # (B, 2)
        return functools.partial(self.metric, corner=corner.to(self.device, non_blocking=True))

    def prepare(self, k: int) -> None:
        """Leave out the steps of RAdam that follow the bare gradient: they undo a trained UNet."""
        set_rates(self.opts, self.cfg.lr, self.cfg.muon, 0 if k < UNRECTIFIED else 1)

    @functools.cached_property
    def latents(self) -> Latents:
        return encoded(self, self.base)

    def collect(self) -> None:
        print_once(f"{len(self.latents):,} latents")

    def batches(self, start: int) -> Iterator[dict]:
        """Latents of mean 0 and variance 1 in the place of images, with what their captions say."""
        base = self.base
        for batch in self.loaded(start, source=self.latents, captions=base.text is not None,
                                 noise=base.latent_shape):
            batch["image"] = base.scale(batch.pop("latent"))                     # (B, C, h, w)
            batch = leave_out(batch, self.cfg)
            yield batch | self.told(batch.pop("caption", None))

    @torch.no_grad()
    def told(self, captions: list[str] | None) -> dict[str, Tensor]:
        """The context (B, N, D) of captions, for f; none without a text encoder."""
        if self.base.text is None:
            return {}
        tokens = self.base.tokenizer(captions).to(self.device, non_blocking=True)
        return {"context": self.base.text(tokens)}

    @torch.no_grad()
    def validate(self) -> dict[str, Tensor]:
        """Denoising distance of held-out latents, and at sigma_max alone."""
        numbers, x, y = self.judged
        encode = self.base.autoencoder.encode
        z = self.base.scale(torch.cat([encode(one) for one in x.split(1)]))      # (n, C, h, w)
        told = self.told([self.held_out.caption(i) for i in numbers])
        distances = denoising_distance(self.f, z, self.noise_like(z), y, **told)[1]
        return {"denoising_distance": distances.mean(), "distance_at_max": distances[0]}

    def preview(self, folder: Path, k: int) -> None:
        f = LatentConsistency(self.shown, self.cfg.cm, self.f.log_sigma)
        model = replace(self.base, unet=self.shown, f=f, guidance=1.0)
        side = 2 * model.size
        rows = []
        for steps in (1, 2):
            z = model.sample(range(8), self.cfg.seed, steps)
            rows.append(to_uint8(model.decode(z).draw(side)))
        self.sheet(rows, side, folder, k, f"one step, two steps, at {side} px")
