"""Latent diffusion: train a UNet to predict the noise in a latent z; sample new z from pure noise.
INFD's second stage (supplementary J.1, J.2). The same UNet (ADM) is CM-Func's baseline CM-UNet and,
attending to the context that text.py makes of a prompt, Stable Diffusion v1's.
Read autoencoder.py first (it defines z), then stages_infd.py (`--stage ldm`) and models.py.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ---- UNet ----

@dataclass(frozen=True)
class UNetConfig:
    """Options of the UNet; by default INFD's diffusion model of 3 x 64 x 64 latents."""

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
    null_class: bool = False                       # one class more, none of them: see `guided`
    context_dim: int = 0                           # channels of the context's tokens; 0: no context
    transformer_depth: int = 1                     # blocks of a spatial transformer (LDM)
    dropout: float = 0.0                           # before the last conv of a residual block
    groups: int = 32                               # of every GroupNorm; their eps is 1e-5

    def __post_init__(self) -> None:
        if min(len(self.channel_mult), self.model_channels, self.num_res_blocks, self.groups,
               self.transformer_depth) < 1:
            raise ValueError(f"levels in channel_mult, model_channels, num_res_blocks, groups and "
                             f"transformer_depth must be at least 1, not {self}")
        for mult in self.channel_mult:
            if mult < 1 or mult * self.model_channels % self.groups:
                raise ValueError(f"channel_mult {mult} x model_channels {self.model_channels} must "
                                 f"be a multiple of groups={self.groups}")
        if self.null_class and not self.num_classes:
            raise ValueError("null_class is one class more than num_classes, which is 0")

    def heads(self, channels: int) -> int:
        """Number of attention heads on `channels` channels."""
        parts = self.num_head_channels or self.num_heads
        if parts < 1 or channels % parts:
            raise ValueError(f"num_head_channels (or num_heads) {parts} must divide {channels}")
        return channels // parts if self.num_head_channels else parts


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal code of a timestep or noise level: t (B,) -> (B, dim) float32, [cos | sin].

    Cosines come first, as in the published UNets (many ports put the sines first). An odd dim ends
    in a column of zeros.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t[:, None].float() * torch.exp(-math.log(10_000.0) * k / half)       # (B, dim // 2)
    embedding = torch.cat([angle.cos(), angle.sin()], dim=1)
    return F.pad(embedding, (0, dim % 2))                                        # (B, dim)


def zero(module: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero: its residual branch starts as nothing, the UNet as 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class TimeResBlock(nn.Module):
    """Residual block that sees the time: norm, SiLU, [resize,] conv, time, norm, SiLU, conv."""

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
    models; of ADM, LDM and INFD see `qkv_from_legacy`.
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
    """Reorder rows (3 C, ...) from (heads, [q | k | v], d), as in ADM, LDM and INFD, to ours."""
    return weight_or_bias.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another, as LDM has it: q, k and v without bias."""

    def __init__(self, channels: int, context_dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, heads * head_dim, bias=False)
        self.to_k = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, M, channels), context (B, N, context_dim) -> (B, M, channels)."""
        q = self.to_q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)          # (B, heads, M, d)
        k = self.to_k(context).unflatten(2, (self.heads, -1)).transpose(1, 2)    # (B, heads, N, d)
        v = self.to_v(context).unflatten(2, (self.heads, -1)).transpose(1, 2)    # (B, heads, N, d)
        out = F.scaled_dot_product_attention(q, k, v)                            # (B, heads, M, d)
        return self.to_out(out.transpose(1, 2).flatten(2))                       # (B, M, channels)


class GEGLU(nn.Module):
    """A linear layer, the first half of whose channels is multiplied by the GELU of the second."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., c_in) -> (..., c_out)."""
        value, gate = self.proj(x).chunk(2, dim=-1)                              # (..., c_out) each
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, MLP: each normalises its input and is added to it.

    This order is that of LDM's code; the LDM paper has the MLP in the middle.
    """

    def __init__(self, channels: int, heads: int, head_dim: int, context_dim: int):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads, head_dim)
        mlp = [GEGLU(channels, 4 * channels),
               nn.Identity(),                                # the published names count a dropout
               nn.Linear(4 * channels, channels)]
        self.ff = nn.ModuleDict({"net": nn.Sequential(*mlp)})
        self.attn2 = CrossAttention(channels, context_dim or channels, heads, head_dim)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x (B, M, channels), context (B, N, context_dim) -> (B, M, channels).

        Without a context the second attention is to x itself as well, as published.
        """
        h = self.norm1(x)
        x = x + self.attn1(h, h)                                         # (B, M, channels)
        h = self.norm2(x)
        x = x + self.attn2(h, h if context is None else context)         # (B, M, channels)
        return x + self.ff["net"](self.norm3(x))                         # (B, M, channels)


class SpatialTransformer(nn.Module):
    """Residual transformer blocks over all positions of a feature map, which attend to a context.

    Parameter names are those of LDM and Stable Diffusion v1. A position is known by its features
    alone. The GroupNorm has eps 1e-6, here only; the LDM paper has a LayerNorm in its place.
    """

    def __init__(self, channels: int, heads: int, head_dim: int, context_dim: int = 0,
                 depth: int = 1, groups: int = 32):
        super().__init__()
        inner = heads * head_dim
        blocks = [TransformerBlock(inner, heads, head_dim, context_dim) for _ in range(depth)]
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = zero(nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, C, h, w), context (B, N, context_dim) -> (B, C, h, w)."""
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)   # (B, h w, inner)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)                              # (B, h w, inner)
        h = tokens.transpose(1, 2).unflatten(2, x.shape[2:])             # (B, inner, h, w)
        return x + self.proj_out(h)                                      # (B, C, h, w)


class Stack(nn.Sequential):
    """nn.Sequential that hands residual blocks the time embedding, transformers the context."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        for layer in self:
            if isinstance(layer, TimeResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """The network of both papers: eps(x_t, t) of INFD, and F(c_in x, 250 ln sigma) of CM-UNet.

    ADM's UNet (Dhariwal & Nichol 2021), with the published parameter names. The middle block always
    attends, whatever the text says of "2, 4, 8" only. With a context_dim attention is by
    `SpatialTransformer`, as in LDM's text-to-image models and Stable Diffusion v1.
    """

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        width = cfg.model_channels

        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(),
                                        nn.Linear(4 * width, 4 * width))
        if cfg.num_classes:
            self.label_emb = nn.Embedding(cfg.num_classes + cfg.null_class, 4 * width)

        def attention(channels: int) -> nn.Module:
            heads = cfg.heads(channels)
            if not cfg.context_dim:
                return SelfAttention(channels, heads, cfg.groups)
            return SpatialTransformer(channels, heads, channels // heads, cfg.context_dim,
                                      cfg.transformer_depth, cfg.groups)

        def level_layers(c_in: int, c_out: int, ds: int) -> list[nn.Module]:
            layers = [TimeResBlock(cfg, c_in, c_out)]
            if ds in cfg.attention_ds:
                layers.append(attention(c_out))
            return layers

        ch = width * cfg.channel_mult[0]
        self.input_blocks = nn.ModuleList([Stack(nn.Conv2d(cfg.in_channels, ch, 3, padding=1))])
        skips = [ch]                                                 # channels of each input block
        for level, mult in enumerate(cfg.channel_mult):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(Stack(*level_layers(ch, mult * width, 2**level)))
                ch = mult * width
                skips.append(ch)
            if level < len(cfg.channel_mult) - 1:
                if cfg.resblock_updown:
                    down = TimeResBlock(cfg, ch, ch, nn.AvgPool2d(2))
                else:                                # the autoencoder pads two sides, not all four
                    down = nn.Sequential(OrderedDict(op=nn.Conv2d(ch, ch, 3, 2, padding=1)))
                self.input_blocks.append(Stack(down))
                skips.append(ch)

        self.middle_block = Stack(TimeResBlock(cfg, ch, ch), attention(ch),
                                  TimeResBlock(cfg, ch, ch))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(cfg.channel_mult))):
            for i in range(cfg.num_res_blocks + 1):
                layers = level_layers(ch + skips.pop(), mult * width, 2**level)
                ch = mult * width
                if level > 0 and i == cfg.num_res_blocks:
                    double = nn.Upsample(scale_factor=2.0, mode="nearest")
                    if cfg.resblock_updown:
                        layers.append(TimeResBlock(cfg, ch, ch, double))
                    else:
                        conv = nn.Conv2d(ch, ch, 3, padding=1)
                        layers.append(nn.Sequential(OrderedDict(resize=double, conv=conv)))
                self.output_blocks.append(Stack(*layers))

        self.out = nn.Sequential(nn.GroupNorm(cfg.groups, ch), nn.SiLU(),
                                 zero(nn.Conv2d(ch, cfg.out_channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None,
                context: Tensor | None = None) -> Tensor:
        """x (B, in_channels, H, W), t (B,), y (B,) int64 classes -> (B, out_channels, H, W).

        t is fed as it is: 0 to 999 for INFD, 250 ln sigma for consistency models. With null_class,
        y = num_classes is none of the classes. context: (B, N, context_dim), of any N.
        """
        side = 2 ** (len(self.cfg.channel_mult) - 1)
        if x.shape[2] % side or x.shape[3] % side:
            raise ValueError(f"UNet input is {x.shape[2]}x{x.shape[3]}; both sides must be "
                             f"multiples of {side}")
        if (y is not None) != (self.cfg.num_classes > 0):
            raise ValueError(f"give y if there are classes; this UNet has {self.cfg.num_classes}")
        if (context is not None) != (self.cfg.context_dim > 0):
            raise ValueError(f"give a context if the UNet attends to one; this one has context_dim "
                             f"{self.cfg.context_dim}")

        code = timestep_embedding(t, self.cfg.model_channels)            # (B, width)
        emb = self.time_embed(code.to(x.dtype))                          # (B, 4 width)
        if y is not None:
            emb = emb + self.label_emb(y)                                # (B, 4 width)

        h = x
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context)                                   # (B, C, H / ds, W / ds)
            skips.append(h)
        h = self.middle_block(h, emb, context)                           # (B, C, H / ds, W / ds)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)  # (B, C, H / ds, W / ds)
        return self.out(h)                                               # (B, out_channels, H, W)


# ---- guidance ----

def guided(model: Callable, scale: float, context: Tensor | None = None,
           null_context: Tensor | None = None, null_class: int | None = None) -> Callable:
    """Make samples follow their condition more closely (Ho & Salimans 2022, where w is scale - 1).

    Gives a sampler its model (x_t, t, y) -> eps_u + scale (eps_c - eps_u): `model`, a UNet, runs in
    one batch with its condition, context (B, N, D) or classes y or both, and with null_context (B
    or 1, N, D), of the empty caption or a negative prompt, and null_class in their place. Scale 1
    is the model with its condition and 0 that without, bit for bit, at the cost of one.
    """
    if not math.isfinite(scale):
        raise ValueError(f"guidance is {scale}; it must be a finite number")

    def with_guidance(x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if scale == 1:
            return model(x_t, t, y, context)
        if (y is None) != (null_class is None) or (context is None) != (null_context is None):
            raise ValueError("guidance needs what takes the place of each condition: null_class of "
                             "y, null_context of the context")
        null_y = None if y is None else torch.full_like(y, null_class)           # (B,)
        null = None if context is None else null_context.expand_as(context)      # (B, N, D)
        if scale == 0:
            return model(x_t, t, null_y, null)

        both_y = None if y is None else torch.cat([null_y, y])                   # (2 B,)
        both = None if context is None else torch.cat([null, context])           # (2 B, N, D)
        eps = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both_y, both)      # (2 B, C, h, w)
        eps_u, eps_c = eps.chunk(2)                                              # (B, C, h, w) each
        return eps_u + scale * (eps_c - eps_u)

    return with_guidance


# ---- diffusion ----

@dataclass(frozen=True)
class DiffusionConfig:
    """How fast the forward process adds noise, by default as INFD published it."""

    steps: int = 1000                # timesteps
    beta_start: float = 0.0015       # at 1000 steps; equal to LDM's
    beta_end: float = 0.0195         # at 1000 steps; equal to LDM's
    sqrt_beta: bool = False          # linear in sqrt(beta), as LDM and Stable Diffusion v1
    ddim_start: int = 0              # DDIM's lowest timestep; it ends one below. INFD 0, LDM 1

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < self.steps / 1000:     # each below 1
            raise ValueError(f"beta_start {self.beta_start} and beta_end {self.beta_end} must be "
                             f"above 0, rising, and below steps / 1000 = {self.steps / 1000}")
        if self.ddim_start not in (0, 1):
            raise ValueError(f"ddim_start is {self.ddim_start}; choose 0 (INFD) or 1 (LDM)")


def check_eta(eta: float) -> None:
    """ValueError where eta is no share of noise."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be in [0, 1]")


class GaussianDiffusion:
    """Add noise to data, train a model to predict it, and sample by removing it step by step.

    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I). `model` is any callable
    (x_t (B, C, h, w), t (B,) int64, y or None) -> eps (B, C, h, w). Nothing here draws random
    numbers. Tables are float64 on the CPU.
    """

    def __init__(self, cfg: DiffusionConfig):
        # Linear in beta, as the published INFD code; LDM is linear in sqrt(beta) between the same
        # ends, and its alpha_bar ends five times higher.
        self.cfg = cfg
        scale = 1000 / cfg.steps
        power = 2 if cfg.sqrt_beta else 1
        start = (scale * cfg.beta_start) ** (1 / power)
        end = (scale * cfg.beta_end) ** (1 / power)
        line = torch.linspace(start, end, cfg.steps, dtype=torch.float64, device="cpu")
        self.betas = line**power                                                 # (steps,)
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)                    # (steps,)
        self.log_rho = torch.logit(self.alpha_bar) / 2       # rho: signal to noise, see `flow_step`

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of clean x_0 (B, C, h, w) at timestep t (B,) int64; noise is standard normal."""
        def at_t(table: Tensor) -> Tensor:
            table = table.float().to(x_0.device, non_blocking=True)      # MPS has no float64
            return table[t].view(-1, 1, 1, 1)

        return at_t(self.alpha_bar.sqrt()) * x_0 + at_t((1 - self.alpha_bar).sqrt()) * noise

    def loss(self, model: Callable, x_0: Tensor, t: Tensor, noise: Tensor,
             y: Tensor | None = None) -> Tensor:
        """The training loss of each sample: |noise - eps(x_t, t)|^2 averaged over C, h, w; (B,)."""
        eps = model(self.q_sample(x_0, t, noise), t, y)                          # (B, C, h, w)
        return (noise - eps).square().flatten(1).mean(dim=1)                     # (B,)

    def ddim_timesteps(self, steps: int) -> list[int]:
        """The `steps` timesteps DDIM visits, ascending: 0, s, 2s, ... or, as LDM, 1, s + 1, ..."""
        grids = {}
        for stride in range(self.cfg.steps - 1, 0, -1):
            grid = range(self.cfg.ddim_start, self.cfg.steps, stride)
            grids[len(grid)] = grid                          # of equal length the smallest stride
        if steps not in grids:
            near = sorted(grids, key=lambda n: abs(n - steps))[:2]
            raise ValueError(f"{steps} sampling steps have no integer stride over {self.cfg.steps} "
                             f"timesteps; use {min(near)} or {max(near)}")
        return list(grids[steps])

    def ddim_sigma(self, t: int, t_prev: int, eta: float) -> float:
        """Standard deviation of the noise of a step; eta 0: none, 1: as in ancestral sampling."""
        a = self._alpha_bar_at(t)
        a_prev = self._alpha_bar_at(t_prev)
        return eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)

    def ddim_step(self, x_t: Tensor, eps: Tensor, t: int, t_prev: int, eta: float = 1.0,
                  noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One DDIM step from timestep t to t_prev < t: (x at t_prev, predicted x_0), both as x_t.

        t_prev = -1 is clean data, alpha_bar = 1 (LDM ends on alpha_bar_0). noise, standard normal,
        is read only where `ddim_sigma` is above 0.
        """
        a = self._alpha_bar_at(t)
        a_prev = self._alpha_bar_at(t_prev)
        x_0 = (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)
        sigma = self.ddim_sigma(t, t_prev, eta)
        x = math.sqrt(a_prev) * x_0 + math.sqrt(max(1 - a_prev - sigma**2, 0.0)) * eps
        if sigma > 0:
            x = x + sigma * noise
        return x, x_0

    @torch.no_grad()
    def ddim_loop(self, model: Callable, x_T: Tensor, steps: int = 200, eta: float = 1.0,
                  noise: Callable[[int], Tensor] | None = None, y: Tensor | None = None,
                  first: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Sample by DDIM, yielding (x_t, predicted x_0) after each of `steps` steps.

        x_T (B, C, h, w) is standard normal; noise(i), of step i, is called where some is added.
        first: the timestep to start from, for which x_T is then; those above it are left out.
        """
        check_eta(eta)
        visited = self.ddim_timesteps(steps)
        first = visited[-1] if first is None else first
        timesteps = [first, *(t for t in reversed(visited) if t < first)]
        x_t = x_T
        end = self.cfg.ddim_start - 1
        for i, (t, t_prev) in enumerate(zip(timesteps, timesteps[1:] + [end])):
            eps = self._eps(model, x_t, t, y)
            step_noise = noise(i) if self.ddim_sigma(t, t_prev, eta) > 0 else None
            x_t, x_0 = self.ddim_step(x_t, eps, t, t_prev, eta, step_noise)
            yield x_t, x_0

    def timestep_of(self, sigma: float) -> int:
        """The last timestep with at most sigma times as much noise as signal."""
        return int((self.log_rho >= -math.log(sigma)).sum()) - 1

    @torch.no_grad()
    def settle(self, model: Callable, noises: Sequence[Tensor], t: int,
               y: Tensor | None = None) -> Tensor:
        """Make the x_t (B, C, h, w) that a walk starts from at timestep t, below the end.

        INFD's schedule ends at 197 times as much noise as signal. There, dividing by alpha makes
        an error of eps an x_0 that is off by 4 standard deviations of the latents, and such a walk
        keeps those colours whatever class it is told. At less noise x_0 is right, but noise alone
        lacks what of x_0 shines through: so predict it from a first noise, put it into the next.
        """
        alpha, sigma = self._alpha_sigma(t)
        x_0 = torch.zeros_like(noises[0])
        for noise in noises[:-1]:
            x_t = alpha * x_0 + sigma * noise
            x_0 = (x_t - sigma * self._eps(model, x_t, t, y)) / alpha
        return alpha * x_0 + sigma * noises[-1]

    # Without noise x_t follows the probability flow (Song et al. 2021) from x_T to the sample. With
    # alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar) and rho = alpha / sigma it reads
    #     d(x / sigma) / d rho = x_0(x, rho),
    # and Euler's method on it is DDIM with eta 0, `flow_step`. DPM-Solver++ puts a better estimate
    # of x_0 into the same `flow_step`, but for the last: rho is infinite at clean data. With eta
    # above 0 a step forgets some of the noise of x_t for fresh noise, and with it what the network
    # got wrong before; with eta 1 a step of either is one of ancestral sampling.

    def solver_timesteps(self, steps: int, first: int | None = None) -> list[int]:
        """The `steps` timesteps DPM-Solver++ visits, ascending from 0 to `first`, or the last.

        Evenly spaced in log rho, rounded; where that repeats one, near 0, the later ones make way.
        """
        first = self.cfg.steps - 1 if first is None else first
        if not 1 <= steps <= first + 1:
            raise ValueError(f"{steps} sampling steps; choose 1 to {first + 1}")
        ends = self.log_rho[[first, 0]].tolist()
        wanted = torch.linspace(*ends, steps, dtype=torch.float64)                   # (steps,)
        nearest = (self.log_rho[:, None] - wanted).abs().argmin(dim=0).flip(0)       # ascending
        i = torch.arange(steps)
        distinct = (nearest - i).cummax(dim=0).values.clamp(max=first + 1 - steps) + i
        return distinct.tolist()

    def flow_step(self, x_t: Tensor, x_0: Tensor, t: int, t_prev: int,
                  noise: Tensor | None = None, eta: float = 0.0) -> Tensor:
        """x at t_prev, exact if the prediction x_0 stayed the same on the way; -1 is clean data.

        Of the noise of x_t (rho_t / rho_prev)^eta is kept, and standard normal `noise` fills it up.
        """
        alpha, sigma = self._alpha_sigma(t)
        alpha_prev, sigma_prev = self._alpha_sigma(t_prev)
        kept = (alpha * sigma_prev / (sigma * alpha_prev)) ** eta
        share = kept * sigma_prev / sigma
        x = share * x_t + (alpha_prev - alpha * share) * x_0
        if noise is not None:
            x = x + sigma_prev * math.sqrt(1 - kept**2) * noise
        return x

    @torch.no_grad()
    def dpm_loop(self, model: Callable, x_T: Tensor, steps: int = 20, eta: float = 0.0,
                 noise: Callable[[int], Tensor] | None = None, y: Tensor | None = None,
                 first: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Sample by DPM-Solver++(2M) of Lu et al. 2022, with eta above 0 by its SDE-DPM-Solver++.

        Arguments and what it yields as of `ddim_loop`. One model call per step: x_0 in the middle
        of the step, on the scale of log rho, is extrapolated from this prediction and the last.
        """
        check_eta(eta)
        timesteps = self.solver_timesteps(steps, first)[::-1]
        x_t = x_T
        x_0_last = None
        h_last = None
        for i, (t, t_prev) in enumerate(zip(timesteps, timesteps[1:] + [-1])):
            alpha, sigma = self._alpha_sigma(t)
            x_0 = (x_t - sigma * self._eps(model, x_t, t, y)) / alpha
            middle = x_0
            if t_prev >= 0:
                h = (self.log_rho[t_prev] - self.log_rho[t]).item()
                if x_0_last is not None:
                    middle = x_0 + h / (2 * h_last) * (x_0 - x_0_last)
                x_0_last = x_0
                h_last = h
            fresh = noise(i) if eta > 0 and t_prev >= 0 else None
            x_t = self.flow_step(x_t, middle, t, t_prev, fresh, eta)
            yield x_t, x_0

    @staticmethod
    def _eps(model: Callable, x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        level = torch.full((len(x_t),), t, device=x_t.device)                    # (B,)
        return model(x_t, level, y).to(x_t.dtype)                                # (B, C, h, w)

    def _alpha_bar_at(self, t: int) -> float:
        return 1.0 if t < 0 else self.alpha_bar[t].item()

    def _alpha_sigma(self, t: int) -> tuple[float, float]:
        alpha_bar = self._alpha_bar_at(t)
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
