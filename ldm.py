"""Latent diffusion: train a UNet to predict the noise in a latent z; sample new z from pure noise.
INFD's second stage (supplementary J.1, J.2). The same UNet (ADM) is CM-Func's baseline CM-UNet.
Read autoencoder.py first (it defines z), then train.py (`--stage ldm`) and sample.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ---- UNet ----

@dataclass(frozen=True)
class UNetConfig:
    """Options of the UNet. The defaults are INFD's diffusion model of 3 x 64 x 64 latents."""

    in_channels: int = 3                           # channels of z, or 3 for RGB
    out_channels: int = 3                          # eps (INFD) or F (CM-UNet): as many as come in
    model_channels: int = 224                      # width at multiplier 1; INFD J.1
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)   # width of each level, in model_channels; J.1
    num_res_blocks: int = 2                        # per level going down, one more going up; J.1
    attention_ds: tuple[int, ...] = (2, 4, 8)      # downsampling factors with attention; J.1
    num_head_channels: int = 32                    # width of a head, J.1; 0: use num_heads instead
    num_heads: int = 1                             # heads, read only if num_head_channels is 0
    scale_shift_norm: bool = False                 # time scales and shifts the norm, else is added
    resblock_updown: bool = False                  # resample in a residual block, else by a conv
    num_classes: int = 0                           # 0: unconditional
    dropout: float = 0.0                           # before the last conv of a residual block
    groups: int = 32                               # of every GroupNorm; their eps is 1e-5

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attention_ds"):                # a checkpoint may hold lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("in_channels", "out_channels", "model_channels", "num_res_blocks", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_head_channels", "num_classes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 to switch it off")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult is {self.channel_mult}; it needs one positive integer "
                             f"per level")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")
        for level, mult in enumerate(self.channel_mult):
            channels = mult * self.model_channels
            if channels % self.groups:
                raise ValueError(f"level {level} has {channels} channels (model_channels x "
                                 f"channel_mult); GroupNorm needs a multiple of "
                                 f"groups={self.groups}")
            # The middle block attends whatever attention_ds says.
            if 2**level in self.attention_ds or level == len(self.channel_mult) - 1:
                self.heads(channels)

    def heads(self, channels: int) -> int:
        """Number of attention heads on `channels` channels; ValueError if they do not divide."""
        name = "num_head_channels" if self.num_head_channels else "num_heads"
        parts = getattr(self, name)
        if parts < 1 or channels % parts:
            raise ValueError(f"{name} is {parts}; it must divide the {channels} channels of an "
                             f"attention block")
        return channels // parts if self.num_head_channels else parts


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal code of a timestep or noise level: t (B,) -> (B, dim) float32, [cos | sin].

    t may be fractional and is not rescaled. An odd dim ends in a column of zeros. Cosines come
    first, as in the published UNets (the Transformer and many ports of it put the sines first).
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t[:, None].float() * torch.exp(-math.log(max_period) * k / half)     # (B, dim // 2)
    embedding = torch.cat([angle.cos(), angle.sin()], dim=1)
    return F.pad(embedding, (0, dim % 2))                                        # (B, dim)


def zero(module: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero, and return it.

    Used for the last layer of every residual branch: at the start of training each block is its
    skip connection, and the UNet returns exactly 0.
    """
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class TimeResBlock(nn.Module):
    """Residual block conditioned on the time embedding, which can also halve or double the size.

    norm, SiLU, [resize,] conv, time, norm, SiLU, conv. `resize` has no parameters: nn.Upsample,
    nn.AvgPool2d, or None to keep the size.
    """

    def __init__(self, cfg: UNetConfig, c_in: int, c_out: int, resize: nn.Module | None = None):
        super().__init__()
        self.scale_shift = cfg.scale_shift_norm
        self.resize = nn.Identity() if resize is None else resize
        c_time = 2 * c_out if self.scale_shift else c_out
        self.in_layers = nn.Sequential(nn.GroupNorm(cfg.groups, c_in), nn.SiLU(),
                                       nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * cfg.model_channels, c_time))
        self.out_layers = nn.Sequential(nn.GroupNorm(cfg.groups, c_out), nn.SiLU(),
                                        nn.Dropout(cfg.dropout),
                                        zero(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, c_in, h, w), emb (B, 4 model_channels) -> (B, c_out, h', w')."""
        norm, silu, conv = self.in_layers
        h = conv(self.resize(silu(norm(x))))                             # (B, c_out, h', w')
        time = self.emb_layers(emb)[:, :, None, None]                    # (B, c_time, 1, 1)

        norm, silu, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + time)
        return self.skip_connection(self.resize(x)) + conv(dropout(silu(h)))


class SelfAttention(nn.Module):
    """Residual multi-head attention over all positions of a feature map.

    The qkv channels are [q | k | v], each (heads, head_dim), as in the published consistency
    models. ADM, LDM and INFD order them (heads, [q | k | v]): `qkv_from_legacy` converts. Weights
    are those of 1x1 Conv2d, as OpenAI stores them (4-d); INFD's are of Conv1d (3-d) and are
    reshaped by whoever loads them.
    """

    def __init__(self, channels: int, heads: int, groups: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, h, w)."""
        # Fused attention kernels want head_dim innermost in memory; in channels_last it already is.
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()     # (B, h w, 3 C)
        qkv = qkv.unflatten(2, (3, self.heads, -1))                      # (B, h w, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                             # (B, heads, h w, d) each

        # The published code scales q and k each by d^-1/4; together that is the default scale.
        out = F.scaled_dot_product_attention(q, k, v)                    # (B, heads, h w, d)
        return x + self.proj_out(out.transpose(2, 3).reshape(x.shape))   # (B, C, h, w)


def qkv_from_legacy(weight_or_bias: Tensor, heads: int) -> Tensor:
    """Convert a qkv weight or bias of an ADM, LDM or INFD checkpoint to the order used here.

    Its rows (3 C, ...) go from (heads, [q | k | v], head_dim) to ([q | k | v], heads, head_dim).
    """
    rows = weight_or_bias.shape[0]
    if rows % (3 * heads):
        raise ValueError(f"qkv tensor has {rows} rows; {heads} heads need a multiple of "
                         f"{3 * heads}")
    return weight_or_bias.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


class Downsample(nn.Module):
    """Halve the size by a strided conv, padded on all four sides (the autoencoder pads two)."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)                                                # (B, C, h/2, w/2)


class Upsample(nn.Module):
    """Double the size: nearest neighbour, then a conv."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))     # (B, C, 2h, 2w)


class Stack(nn.Sequential):
    """nn.Sequential that hands the time embedding to its residual blocks."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimeResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """The network of both papers: eps(x_t, t) of INFD, and F(c_in x, 250 ln sigma) of CM-UNet.

    ADM's UNet (Dhariwal & Nichol 2021). Parameter names are the published ones, so that official
    checkpoints of both load key by key (qkv and 1x1 shapes: see SelfAttention). The middle block
    always attends, whatever the text says of "2, 4, 8" only.
    """

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        width = cfg.model_channels
        last = len(cfg.channel_mult) - 1

        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(),
                                        nn.Linear(4 * width, 4 * width))
        if cfg.num_classes:
            self.label_emb = nn.Embedding(cfg.num_classes, 4 * width)

        def level_layers(c_in: int, c_out: int, ds: int) -> list[nn.Module]:
            layers = [TimeResBlock(cfg, c_in, c_out)]
            if ds in cfg.attention_ds:
                layers.append(SelfAttention(c_out, cfg.heads(c_out), cfg.groups))
            return layers

        ch = width * cfg.channel_mult[0]
        self.input_blocks = nn.ModuleList([Stack(nn.Conv2d(cfg.in_channels, ch, 3, padding=1))])
        skips = [ch]                                                 # channels of each input block
        for level, mult in enumerate(cfg.channel_mult):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(Stack(*level_layers(ch, mult * width, 2**level)))
                ch = mult * width
                skips.append(ch)
            if level < last:
                half = nn.AvgPool2d(2)
                down = TimeResBlock(cfg, ch, ch, half) if cfg.resblock_updown else Downsample(ch)
                self.input_blocks.append(Stack(down))
                skips.append(ch)

        self.middle_block = Stack(TimeResBlock(cfg, ch, ch),
                                  SelfAttention(ch, cfg.heads(ch), cfg.groups),
                                  TimeResBlock(cfg, ch, ch))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(cfg.channel_mult))):
            for i in range(cfg.num_res_blocks + 1):
                layers = level_layers(ch + skips.pop(), mult * width, 2**level)
                ch = mult * width
                if level > 0 and i == cfg.num_res_blocks:
                    double = nn.Upsample(scale_factor=2.0, mode="nearest")
                    up = TimeResBlock(cfg, ch, ch, double) if cfg.resblock_updown else Upsample(ch)
                    layers.append(up)
                self.output_blocks.append(Stack(*layers))

        self.out = nn.Sequential(nn.GroupNorm(cfg.groups, ch), nn.SiLU(),
                                 zero(nn.Conv2d(ch, cfg.out_channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, in_channels, H, W), t (B,), y (B,) int64 classes -> (B, out_channels, H, W).

        t is fed as it is: 0 to 999 for INFD, 250 ln sigma for consistency models. y is given if
        and only if the model is conditional. H and W are free as long as they halve evenly at
        every level. Raises ValueError on inputs that do not fit the model.
        """
        self._check(x, t, y)
        code = timestep_embedding(t, self.cfg.model_channels)            # (B, width)
        emb = self.time_embed(code.to(x.dtype))                          # (B, 4 width)
        if y is not None:
            emb = emb + self.label_emb(y)

        h = x
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)                                            # (B, C, H / ds, W / ds)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)                                               # (B, out_channels, H, W)

    def _check(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        side = 2 ** (len(self.cfg.channel_mult) - 1)
        if x.dim() != 4 or x.shape[1] != self.cfg.in_channels:
            raise ValueError(f"UNet input has shape {tuple(x.shape)}; expected "
                             f"(B, {self.cfg.in_channels}, H, W)")
        # The published UNet pads nothing: an odd side comes back one pixel off and fits no skip.
        if x.shape[2] % side or x.shape[3] % side:
            raise ValueError(f"UNet input is {x.shape[2]}x{x.shape[3]}; both sides must be "
                             f"multiples of {side} ({len(self.cfg.channel_mult)} levels)")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}; expected one timestep per sample, "
                             f"({x.shape[0]},)")
        if y is not None and not self.cfg.num_classes:
            raise ValueError("classes y were given to an unconditional UNet (num_classes is 0)")
        if y is None and self.cfg.num_classes:
            raise ValueError(f"this UNet is conditional: give y, one class in "
                             f"0..{self.cfg.num_classes - 1} per sample")
        if y is not None and y.shape != x.shape[:1]:
            raise ValueError(f"y has shape {tuple(y.shape)}; expected one class per sample, "
                             f"({x.shape[0]},)")


# ---- diffusion ----

@dataclass(frozen=True)
class DiffusionConfig:
    """How fast the forward process adds noise. The defaults are INFD's published configuration."""

    steps: int = 1000                # timesteps
    beta_start: float = 0.0015       # at 1000 steps; equal to LDM's
    beta_end: float = 0.0195         # at 1000 steps; equal to LDM's

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}; diffusion needs at least 2")
        if not 0 < self.beta_start <= self.beta_end:
            raise ValueError(f"need 0 < beta_start <= beta_end, got {self.beta_start} and "
                             f"{self.beta_end}")
        if self.beta_end * 1000 / self.steps >= 1:
            raise ValueError(f"{self.steps} steps are too few: betas grow as 1000/steps and "
                             f"beta_end {self.beta_end} would reach 1; use more than "
                             f"{int(self.beta_end * 1000)}")


class GaussianDiffusion:
    """Add noise to data, train a model to predict it, and sample by removing it step by step.

    The forward process is q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I). `model` is
    any callable (x_t (B, C, h, w), t (B,) int64, y or None) -> eps (B, C, h, w). Nothing here draws
    random numbers: t and noise are arguments. Tables are float64 on the CPU.
    """

    def __init__(self, cfg: DiffusionConfig):
        # Linear in beta, as the published INFD code. LDM, which the paper builds on, is linear in
        # sqrt(beta) between the same ends; its alpha_bar ends five times higher, so checkpoints of
        # the two need their own schedule.
        self.cfg = cfg
        scale = 1000 / cfg.steps
        self.betas = torch.linspace(scale * cfg.beta_start, scale * cfg.beta_end, cfg.steps,
                                    dtype=torch.float64, device="cpu")           # (steps,)
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)                    # (steps,)

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t (B, C, h, w) of clean x_0 (B, C, h, w) at timestep t (B,) int64, 0 to steps - 1.

        noise: as x_0, standard normal.
        """
        def at_t(table: Tensor) -> Tensor:
            return table.float().to(x_0.device)[t].view(-1, 1, 1, 1)     # MPS has no float64

        return at_t(self.alpha_bar.sqrt()) * x_0 + at_t((1 - self.alpha_bar).sqrt()) * noise

    def loss(self, model: Callable, x_0: Tensor, t: Tensor, noise: Tensor,
             y: Tensor | None = None) -> Tensor:
        """The training loss of each sample: |noise - eps(x_t, t)|^2 averaged over C, h, w; (B,)."""
        eps = model(self.q_sample(x_0, t, noise), t, y)                          # (B, C, h, w)
        return (noise - eps).square().flatten(1).mean(dim=1)                     # (B,)

    def ddim_timesteps(self, steps: int) -> list[int]:
        """The `steps` timesteps DDIM visits, ascending: 0, s, 2s, ... with an integer stride s.

        (LDM visits 1, s + 1, ...) Raises ValueError where no stride gives exactly that many, naming
        the nearest counts that work.
        """
        counts = {}                              # number of timesteps -> smallest stride giving it
        for stride in range(self.cfg.steps - 1, 0, -1):
            counts[len(range(0, self.cfg.steps, stride))] = stride
        if steps in counts:
            return list(range(0, self.cfg.steps, counts[steps]))
        fewer = sorted(n for n in counts if n < steps)
        more = sorted(n for n in counts if n > steps)
        near = " or ".join(str(n) for n in fewer[-1:] + more[:1])
        raise ValueError(f"{steps} sampling steps have no integer stride over {self.cfg.steps} "
                         f"timesteps; use {near}")

    def ddim_sigma(self, t: int, t_prev: int, eta: float) -> float:
        """Standard deviation of the noise that the step from t to t_prev adds.

        eta 0: none, the step is deterministic; 1: as much as in ancestral sampling.
        """
        a = self._alpha_bar_at(t)
        a_prev = self._alpha_bar_at(t_prev)
        return eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)

    def ddim_step(self, x_t: Tensor, eps: Tensor, t: int, t_prev: int, eta: float = 1.0,
                  noise: Tensor | None = None, clip: bool = False) -> tuple[Tensor, Tensor]:
        """One DDIM step from timestep t to t_prev < t: (x at t_prev, predicted x_0), both as x_t.

        t_prev = -1 is clean data, alpha_bar = 1 (LDM ends on alpha_bar_0). eps is the model's
        output at (x_t, t); noise, as x_t and standard normal, is needed only where `ddim_sigma` is
        above 0. clip limits the predicted x_0 to [-1, 1].
        """
        a = self._alpha_bar_at(t)
        a_prev = self._alpha_bar_at(t_prev)
        x_0 = (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)
        if clip:
            x_0 = x_0.clamp(-1, 1)
            eps = (x_t - math.sqrt(a) * x_0) / math.sqrt(1 - a)      # agrees with the clipped x_0

        sigma = self.ddim_sigma(t, t_prev, eta)
        x = math.sqrt(a_prev) * x_0 + math.sqrt(max(1 - a_prev - sigma**2, 0.0)) * eps
        if sigma > 0:
            if noise is None:
                raise ValueError(f"the DDIM step {t} -> {t_prev} with eta {eta} needs noise; "
                                 f"use eta 0 to go without")
            x = x + sigma * noise
        return x, x_0

    @torch.no_grad()
    def ddim_loop(self, model: Callable, x_T: Tensor, steps: int = 200, eta: float = 1.0,
                  noise: Callable[[int], Tensor] | None = None, y: Tensor | None = None,
                  clip: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Sample by DDIM, yielding (x_t, predicted x_0) after each of `steps` steps.

        x_T (B, C, h, w) is standard normal; the last x_t is the sample. noise(i) gives the standard
        normal (B, C, h, w) of step i, counted from 0 in sampling order, so that it can depend on
        (seed, image, step) alone. It is not called where none is added: eta 0, and the last step.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must be in [0, 1]")
        if eta > 0 and noise is None:
            raise ValueError(f"DDIM with eta {eta} needs noise, a function of the step; use eta 0 "
                             f"to go without")
        timesteps = self.ddim_timesteps(steps)[::-1]
        x_t = x_T
        for i, (t, t_prev) in enumerate(zip(timesteps, timesteps[1:] + [-1])):
            eps = self._eps(model, x_t, t, y)
            step_noise = noise(i) if self.ddim_sigma(t, t_prev, eta) > 0 else None
            x_t, x_0 = self.ddim_step(x_t, eps, t, t_prev, eta, step_noise, clip)
            yield x_t, x_0

    def ddim_sample(self, model: Callable, x_T: Tensor, steps: int = 200, eta: float = 1.0,
                    noise: Callable[[int], Tensor] | None = None, y: Tensor | None = None,
                    clip: bool = False) -> Tensor:
        """The last x_t of `ddim_loop`, (B, C, h, w). The defaults are the published setting."""
        for x_t, _ in self.ddim_loop(model, x_T, steps, eta, noise, y, clip):
            pass
        return x_t

    # Without noise, x_t follows an ordinary differential equation (the probability flow of Song et
    # al. 2021) from x_T to the sample. With alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar)
    # and rho = alpha / sigma it reads
    #     d(x / sigma) / d rho = x_0(x, rho),
    # and Euler's method on it is DDIM with eta 0, `flow_step`. DPM-Solver++ puts a better estimate
    # of x_0 over the step into the same `flow_step`. rho is infinite at clean data, so its last
    # step, from timestep 0, is Euler's; at timestep 0 next to nothing is left to take out.

    def solver_timesteps(self, steps: int) -> list[int]:
        """The `steps` timesteps DPM-Solver++ visits, ascending from 0 to the last, each once.

        They are evenly spaced in log rho (half the log signal-to-noise ratio), rounded; where that
        would repeat a timestep, near 0, the later ones make way. Raises ValueError for more steps
        than there are timesteps.
        """
        if not 1 <= steps <= self.cfg.steps:
            raise ValueError(f"{steps} sampling steps; this model has timesteps for 1 to "
                             f"{self.cfg.steps}")
        log_rho = torch.logit(self.alpha_bar) / 2                            # falls with t
        first = log_rho[-1].item()
        last = log_rho[0].item()
        wanted = torch.linspace(first, last, steps, dtype=torch.float64)
        nearest = (log_rho[:, None] - wanted).abs().argmin(dim=0).flip(0)    # (steps,), ascending

        i = torch.arange(steps)
        distinct = (nearest - i).cummax(dim=0).values.clamp(max=self.cfg.steps - steps) + i
        return distinct.tolist()

    def flow_step(self, x_t: Tensor, x_0: Tensor, t: int, t_prev: int) -> Tensor:
        """x at t_prev, exact if the prediction x_0 stayed the same on the way; -1 is clean data."""
        alpha, sigma = self._alpha_sigma(t)
        alpha_prev, sigma_prev = self._alpha_sigma(t_prev)
        return sigma_prev / sigma * x_t + (alpha_prev - alpha * sigma_prev / sigma) * x_0

    @torch.no_grad()
    def dpm_loop(self, model: Callable, x_T: Tensor, steps: int = 20,
                 y: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Sample by DPM-Solver++(2M) of Lu et al. 2022; yields as `ddim_loop` with eta 0.

        Second order with one model call per step: x_0 in the middle of the step (on the scale of
        log rho) is extrapolated from this prediction and the last.
        """
        timesteps = self.solver_timesteps(steps)[::-1]
        x_t = x_T
        x_0_last = None
        h_last = None
        for t, t_prev in zip(timesteps, timesteps[1:] + [-1]):
            x_0 = self._predict_x_0(model, x_t, t, y)
            middle = x_0
            if t_prev >= 0:
                h = self._log_rho(t_prev) - self._log_rho(t)
                if x_0_last is not None:
                    middle = x_0 + h / (2 * h_last) * (x_0 - x_0_last)
                x_0_last = x_0
                h_last = h
            x_t = self.flow_step(x_t, middle, t, t_prev)
            yield x_t, x_0

    @staticmethod
    def _eps(model: Callable, x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        level = torch.full((len(x_t),), t, device=x_t.device)                    # (B,)
        return model(x_t, level, y).to(x_t.dtype)                                # (B, C, h, w)

    def _predict_x_0(self, model: Callable, x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        alpha, sigma = self._alpha_sigma(t)
        return (x_t - sigma * self._eps(model, x_t, t, y)) / alpha

    def _alpha_bar_at(self, t: int) -> float:
        return 1.0 if t < 0 else self.alpha_bar[t].item()

    def _alpha_sigma(self, t: int) -> tuple[float, float]:
        alpha_bar = self._alpha_bar_at(t)
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    def _log_rho(self, t: int) -> float:
        alpha, sigma = self._alpha_sigma(t)
        return math.log(alpha / sigma)
