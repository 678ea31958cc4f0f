"""Generate the weights of an image function from noise: CM-Func; DiT and U-ViT to compare.
CM-Func Sections 3.2 to 3.4, Appendices A.2, D.2.1; parts of ANR (Zhang et al. 2024), Trans-INR.
Next: stages_func.py; consistency.py trains any net(x, t, y). CM-UNet is ldm.UNet.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clif import WHOLE_PLANE, Window, check_frame, coord_grid
from ldm import timestep_embedding, zero

GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


def pixel_coord(shape: tuple[int, int], window: Window | None = None, corners: bool = False,
                device: torch.device | str | None = None) -> Tensor:
    """Where an image function is evaluated for each pixel of `window`: (H, W, 2) as (y, x)."""
    coord = coord_grid(shape, window, device)
    if not corners:                    # open: the full range on both axes, at any aspect
        return coord
    y0, x0, y1, x1 = WHOLE_PLANE if window is None else window
    cell = coord.new_tensor([(y1 - y0) / shape[0], (x1 - x0) / shape[1]])
    return (coord - cell / 2 + 1) / 2  # (i/H, j/W) as printed in Section 3.3


def variational_coord(coord: Tensor, noise: Tensor) -> Tensor:
    """Move coordinates (H, W, 2) by normal noise (B, H, W, 2), at most a quarter pixel (3.2).

    Of `corners`, whose plane is half as long, half a pixel.
    """
    step = 1 / max(coord.shape[:2])  # ANR. open: when; here in training, alike in f and f^-
    return coord + (0.3 * step * noise).clamp(-0.5 * step, 0.5 * step)


def frequencies(dim: int, sigma: float, turned: bool = False,
                device: torch.device | str | None = None) -> Tensor:
    """w (dim, 2) of `positional_encoding`, as (y, x): from 1 to sigma along y, the same along x.

    turned: each such pair by its own angle, multiples of the golden one. Along the axes alone, what
    training does not pin down between its pixels shows as a lattice.
    """
    w = torch.linspace(0, math.log(sigma), dim // 2, device=device).exp()        # (dim / 2,)
    angle = GOLDEN_ANGLE * turned * torch.arange(len(w), device=device)
    y = torch.stack([w * angle.cos(), w * angle.sin()], dim=1)
    x = torch.stack([-w * angle.sin(), w * angle.cos()], dim=1)
    return torch.cat([y, x])                                                     # (dim, 2)


def positional_encoding(coord: Tensor, dim: int, sigma: float, turned: bool = False) -> Tensor:
    """Code of a position c (..., 2) -> (..., 2 dim): cos, then sin of pi w . c."""
    w_y, w_x = (math.pi * frequencies(dim, sigma, turned, coord.device)).unbind(1)       # (dim,)
    y, x = coord.float().split(1, dim=-1)                                # (..., 1)
    angle = w_y * y + w_x * x                                            # (..., dim)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)                 # (..., 2 dim)


def share_of_axis(code: Tensor, axis: int) -> Tensor:
    """What one axis (0: y, 1: x) adds to a code (..., 2 dim): the other's columns become zero."""
    own = code.unflatten(-1, (2, 2, -1))[..., axis:axis + 1, :]          # (..., 2, 1, dim / 2)
    return F.pad(own, (0, 0, axis, 1 - axis)).flatten(-3)                # (..., 2 dim)


def affine(wb: Tensor, c: Tensor, bias: int = 1) -> Tensor:
    """W c + bias B: wb (B, in + 1, out) holds W over B; c (B or 1, n, in) -> (B, n, out)."""
    return torch.baddbmm(wb[:, -1:], c.expand(len(wb), -1, -1), wb[:, :-1], beta=bias)


def colours(weights: tuple[Tensor, ...], code: Tensor, columns: Tensor | None = None,
            dtype: torch.dtype = torch.float32) -> Tensor:
    """M_beta(c) = colour, for all training and drawing: code (B or 1, n, in) -> (B, n, 3).

    Of a grid, code and columns (1, W, in) are the shares of its H rows and W columns, added up by
    the first layer, which is linear: (B, H W, 3). dtype: of the other layers.
    """
    kind = "cpu" if code.is_meta else code.device.type                   # meta has no autocast
    with torch.autocast(kind, enabled=False):                            # sines of up to 3000
        first = weights[0].float()
        h = affine(first, code)                                          # (B, n, out)
        if columns is not None:
            h = h[:, :, None] + affine(first, columns, bias=0)[:, None]  # (B, H, W, out)
            h = h.flatten(1, 2)                                          # (B, H W, out)
        for wb in weights[1:]:
            h = affine(wb.to(dtype), h.to(dtype).relu_())                # Eq. (9)
        return h.float()                                                 # (B, n, 3)


def evaluate(weights: tuple[Tensor, ...], coord: Tensor, *encoding: float) -> Tensor:
    """Colours at coord (B or 1, ..., 2), of tensors alone: torch.compile takes no dataclass."""
    code = positional_encoding(coord.flatten(1, -2), *encoding)          # (B or 1, n, in)
    return colours(weights, code).unflatten(1, coord.shape[1:-1])        # (B, ..., 3)


@dataclass(frozen=True, eq=False)
class ImageFunction:
    """B images as functions of position: ReLU MLPs M_beta(c) = colour (Eq. 6, 9)."""

    weights: tuple[Tensor, ...]  # beta, (B, in + 1, out) per layer; the last row is the bias
    pe_dim: int
    pe_sigma: float
    pe_turned: bool = False
    corners: bool = False

    @property
    def encoding(self) -> tuple[int, float, bool]:
        return self.pe_dim, self.pe_sigma, self.pe_turned

    def __call__(self, coord: Tensor) -> Tensor:
        """Colours (B, ..., 3) at coord (B or 1, ..., 2)."""
        return evaluate(self.weights, coord, *self.encoding)

    def tiles(self, res: int | tuple[int, int], window: Window | None = None,
              tile: int | None = None, dtype: torch.dtype = torch.float32) -> Iterator[tuple]:
        """Draw in pieces, row by row: (top, left, colours (B, 3, h, w))."""
        (height, width), window = check_frame(res, window)
        device = self.weights[0].device
        tile = max(1, tile or (64 if device.type == "cpu" else 256))
        group = max(1, tile**2 // (min(tile, height) * min(tile, width)))  # images at a time
        parts = [self[i:i + group].weights for i in range(0, len(self), group)]

        rows = pixel_coord((height, 1), window, self.corners, device)[None, :, 0]  # (1, H, 2)
        cols = pixel_coord((1, width), window, self.corners, device)     # (1, W, 2)
        if not self.pe_turned:             # each axis has its share of the code, (1, H or W, in)
            rows = share_of_axis(positional_encoding(rows, *self.encoding), 0)
            cols = share_of_axis(positional_encoding(cols, *self.encoding), 1)

        for top in range(0, height, tile):
            down = rows[:, top:top + tile]                               # (1, h, 2 or in)
            for left in range(0, width, tile):
                across = cols[:, left:left + tile]                       # (1, w, 2 or in)
                code = (self.crossings(down, across), None) if self.pe_turned else (down, across)
                rgb = torch.cat([colours(part, *code, dtype) for part in parts])
                yield top, left, rgb.unflatten(1, (down.shape[1], -1)).movedim(-1, 1)

    def crossings(self, rows: Tensor, cols: Tensor) -> Tensor:
        """The code (1, h w, in) where rows (1, h, 2) and columns (1, w, 2) of pixels cross."""
        coord = torch.cartesian_prod(rows[0, :, 0], cols[0, :, 1])       # (h w, 2)
        return positional_encoding(coord, *self.encoding)[None]

    def draw(self, res: int | tuple[int, int], window: Window | None = None,
             tile: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The images (B, 3, H, W); res, window: see clif.check_frame. tile bounds memory only."""
        (height, width), window = check_frame(res, window)
        out = self.weights[0].new_empty(len(self), 3, height, width, dtype=torch.float32)
        for top, left, rgb in self.tiles(res, window, tile, dtype):
            out[..., top:top + rgb.shape[2], left:left + rgb.shape[3]] = rgb
        return out

    def __len__(self) -> int:
        return len(self.weights[0])

    def __getitem__(self, index: int | slice) -> ImageFunction:
        """Some of the images; an int keeps the batch dimension."""
        index = index if isinstance(index, slice) else [index]
        return replace(self, weights=tuple(w[index] for w in self.weights))

    def scaled(self, factor: Tensor) -> ImageFunction:
        """The functions times one number per image (B,), exactly: the last layer is linear."""
        last = self.weights[-1] * factor[:, None, None]
        return replace(self, weights=(*self.weights[:-1], last))


# ---- transformer parts ----

def check_widths(cfg: GeneratorConfig | TransformerConfig) -> None:
    """ValueError where no transformer can be that wide."""
    if min(cfg.patch, cfg.heads, cfg.dim) < 1 or cfg.dim % 4:
        raise ValueError(f"patch and heads must be at least 1 and dim a multiple of 4, not {cfg}")


class PatchTokens(nn.Module):
    """One token per patch, plus a fixed code of its place: (B, 3, S, S) -> (B, T, D), as in DiT."""

    def __init__(self, cfg: GeneratorConfig | TransformerConfig, base=1e4, scale=1.0):
        super().__init__()
        if cfg.size % cfg.patch:
            raise ValueError(f"patch {cfg.patch} must divide size {cfg.size}")
        self.conv = nn.Conv2d(3, cfg.dim, cfg.patch, stride=cfg.patch)
        nn.init.xavier_uniform_(self.conv.weight.view(cfg.dim, -1))
        nn.init.zeros_(self.conv.bias)

        k = torch.arange(cfg.dim // 4, dtype=torch.float64)
        w = base ** (-k / len(k))
        angle = torch.arange(cfg.size // cfg.patch, dtype=torch.float64)[:, None] * w
        code = scale * torch.cat([angle.sin(), angle.cos()], dim=1).float()      # (side, D / 2)
        row, col = torch.broadcast_tensors(code[:, None], code)          # (side, side, D / 2)
        self.register_buffer("position", torch.cat([col, row], dim=-1).flatten(0, 1),
                             persistent=False)                           # (T, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2) + self.position   # (B, T, D)


def to_pixels(tokens: Tensor, patch: int) -> Tensor:
    """Tokens (B, T, 3 patch^2) -> the image (B, 3, S, S)."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.unflatten(1, (side, side)).unflatten(3, (patch, patch, 3))  # (B, h, w, p, q, 3)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)       # (B, 3, h p, w q)


class Attention(nn.Module):
    """Multi-head attention of x (B, T, D) to a context (B, S, D), or to itself -> (B, T, D)."""

    def __init__(self, dim: int, heads: int, bias: bool, head_dim: int = 0):
        super().__init__()
        inner = heads * (head_dim or dim // heads)
        self.heads = heads
        self.q = nn.Linear(dim, inner, bias=bias)
        self.kv = nn.Linear(dim, 2 * inner, bias=bias)
        self.out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)       # (B, S, heads d)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2)   # (B, heads, T, d)
                   for part in (self.q(x), k, v))
        out = F.scaled_dot_product_attention(q, k, v)                    # (B, heads, T, d)
        return self.out(out.transpose(1, 2).flatten(2))                  # (B, T, D)


class Condition(nn.Module):
    """Noise level t (B,) and class y (B,), one of `rows`, as one vector (B, D), their sum (DiT)."""

    def __init__(self, dim: int, rows: int):
        super().__init__()
        self.noise = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(rows, dim) if rows else None
        for name, value in self.named_parameters():  # DiT's initialisation
            nn.init.normal_(value, std=0.02) if name.endswith("weight") else nn.init.zeros_(value)

    def forward(self, t: Tensor, y: Tensor | None) -> Tensor:
        c = self.noise(timestep_embedding(t, 256))                       # (B, D)
        return c if self.label is None else c + self.label(y)            # (B, D)


class AdaLNBlock(nn.Module):
    """Block that the condition shifts, scales and gates: adaLN-Zero (Figure 5a), first identity."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads, bias=True)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in (self.attn.q, self.attn.kv):  # DiT draws q, k and v as one matrix
            nn.init.uniform_(layer.weight, -math.sqrt(1.5 / dim), math.sqrt(1.5 / dim))
        nn.init.zeros_(self.modulation[1].weight)  # every gate closed: the identity

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        parts = self.modulation(c)[:, None].chunk(6, dim=-1)             # the paper's alpha, gamma
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts       # and tau: (B, 1, D) each

        h = self.norm(x) * (1 + scale_a) + shift_a                       # (B, T, D)
        x = x + gate_a * self.attn(h)                                    # (B, T, D)
        h = self.norm(x) * (1 + scale_m) + shift_m                       # (B, T, D)
        return x + gate_m * self.mlp(h)                                  # (B, T, D)


class Block(nn.Module):
    """Pre-norm block: attention to itself, to data, both (Figure 5b, ANR's decoder) or neither."""

    def __init__(self, dim: int, heads: int, hidden: int, to_itself: bool, to_data: bool,
                 bias: bool = False, head_dim: int = 0):
        super().__init__()
        self.norm_self = nn.LayerNorm(dim) if to_itself else None
        self.attn_self = Attention(dim, heads, bias, head_dim) if to_itself else None
        self.norm_data = nn.LayerNorm(dim) if to_data else None
        self.attn_data = Attention(dim, heads, bias, head_dim) if to_data else None
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, data: Tensor | None = None) -> Tensor:
        if self.attn_self is not None:
            x = x + self.attn_self(self.norm_self(x))                    # (B, T, D)
        if self.attn_data is not None:
            x = x + self.attn_data(self.norm_data(x), data)              # (B, T, D)
        return x + self.mlp(self.norm_mlp(x))                            # (B, T, D)


# ---- CM-Func ----

@dataclass(frozen=True)
class GeneratorConfig:
    """CM-Func, at 64 px by default: 144 million parameters. "open": the paper does not say."""

    size: int = 64               # of training and of the noise (D.3.1)
    patch: int = 4               # A.2; 8 at 128 px
    dim: int = 768               # D.2.1: "same as our function generator"
    heads: int = 12              # D.2.1
    head_dim: int = 0            # of the decoder, ANR's; 0: dim / heads
    mlp_ratio: float = 4.0       # open: DiT's and Trans-INR's
    encoder_depth: int = 8       # N, Section 4.1
    decoder_depth: int = 6       # M, Section 4.1
    num_classes: int = 0         # open: added to the noise's code, never dropped
    self_attention: bool = True  # open: of INR tokens, as in ANR
    context_norm: bool = True    # open: LayerNorm on data tokens, unlike ANR
    position_base: float = 1e4   # open: DiT's; 10 tells 8 x 8 patches apart
    position_scale: float = 1.0  # open: DiT's; 4 lifts places above colours
    groups: int = 64             # open: tokens per layer, Trans-INR's; 259 in all
    hidden: int = 256            # Section 4.1, width of the image function
    layers: int = 5              # Section 4.1, its depth
    pe_dim: int = 128            # open: Trans-INR's, 64 frequencies per axis
    pe_sigma: float = 1024.0     # open: Trans-INR's, the highest frequency
    pe_turned: bool = False      # not in the paper: frequencies along all directions
    out_scale: float = 1.0       # open: F = out_scale M; 2: f is 3.4's M
    corners: bool = False        # coordinates as Section 3.3 prints them

    def __post_init__(self) -> None:
        check_widths(self)
        if min(self.groups, self.hidden, self.layers, self.pe_dim) < 1 or self.pe_dim % 2:
            raise ValueError(f"groups, hidden and layers must be at least 1 and pe_dim even, "
                             f"not {self}")
        if not self.pe_sigma > 0:
            raise ValueError(f"pe_sigma={self.pe_sigma:g} must be above 0")
        if self.hidden % min(self.groups, self.hidden):
            raise ValueError(f"groups {self.groups} must divide hidden {self.hidden}")


class FunctionPrediction(nn.Module):
    """Predict beta, the weights of the image functions, from data tokens (Section 3.3)."""

    def __init__(self, cfg: GeneratorConfig):
        super().__init__()
        self.cfg = cfg
        widths = [2 * cfg.pe_dim] + [cfg.hidden] * (cfg.layers - 1) + [3]
        shapes = list(zip(widths[:-1], widths[1:]))                      # (in, out) of each layer
        self.groups = [min(cfg.groups, fan_out) for _, fan_out in shapes]  # tokens per layer
        self.tokens = nn.Parameter(torch.randn(sum(self.groups), cfg.dim))
        self.context_norm = nn.LayerNorm(cfg.dim) if cfg.context_norm else nn.Identity()

        hidden = int(cfg.dim * cfg.mlp_ratio)
        self.blocks = nn.ModuleList(  # open: no noise level here; Figure 5b draws none
            Block(cfg.dim, cfg.heads, hidden, cfg.self_attention, True, head_dim=cfg.head_dim)
            for _ in range(cfg.decoder_depth))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(cfg.dim), nn.Linear(cfg.dim, n)) for n, _ in shapes)
        self.base = nn.ParameterList(
            torch.empty(fan_in + 1, fan_out).uniform_(-1, 1) / math.sqrt(fan_in)
            for fan_in, fan_out in shapes)

    def fuse(self, data: Tensor) -> Tensor:
        """data (B, S, D) -> INR tokens (B, T, D)."""
        data = self.context_norm(data)                                   # (B, S, D)
        x = self.tokens.repeat(len(data), 1, 1)                          # (B, T, D)
        for block in self.blocks:
            x = block(x, data)                                           # (B, T, D)
        return x

    def weights(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """INR tokens (B, T, D) -> beta; its biases are shared, though the paper predicts them."""
        beta = []
        for token, head, base in zip(tokens.split(self.groups, dim=1), self.heads, self.base):
            u = head(token).float().transpose(1, 2)                      # (B, in, g)
            u = u.repeat(1, 1, base.shape[1] // u.shape[2])              # (B, in, out), tiled
            w = F.normalize(base[:-1] * u, dim=1)                        # weight grouping, 3.3
            b = base[-1:].expand(len(w), -1, -1)                         # (B, 1, out)
            beta.append(torch.cat([w, b], dim=1))                        # (B, in + 1, out)
        return tuple(beta)

    def forward(self, data: Tensor) -> tuple[Tensor, ...]:
        return self.weights(self.fuse(data))


class FunctionGenerator(nn.Module):
    """The network F that answers with a function: G(x, sigma) = beta, F(., c) = M_beta(c)."""

    def __init__(self, cfg: GeneratorConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = PatchTokens(cfg, cfg.position_base, cfg.position_scale)
        self.condition = Condition(cfg.dim, cfg.num_classes)
        self.encoder = nn.ModuleList(
            AdaLNBlock(cfg.dim, cfg.heads, cfg.mlp_ratio) for _ in range(cfg.encoder_depth))
        self.predict = FunctionPrediction(cfg)
        self.encoding = (cfg.pe_dim, cfg.pe_sigma, cfg.pe_turned)

    def extract(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, 3, S, S) times c_in, t (B,) = 250 ln sigma, y (B,) -> data tokens (B, T, D)."""
        c = self.condition(t, y)                                         # (B, D)
        tokens = self.embed(x)                                           # (B, T, D)
        for block in self.encoder:
            tokens = block(tokens, c)                                    # (B, T, D)
        return tokens

    def beta(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """G(x, sigma): the weights of the functions."""
        *beta, last = self.predict(self.extract(x, t, y))                # Eq. (7)
        return (*beta, self.cfg.out_scale * last)

    def function(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> ImageFunction:
        """F as a function of position."""
        return ImageFunction(self.beta(x, t, y), *self.encoding, self.cfg.corners)

    def reconstruct(self, x: Tensor) -> ImageFunction:
        """M as a function of position, without encoder and noise level (3.4, Figure 5c)."""
        beta = self.predict(self.embed(x))  # open: of 2 x, c_in x at sigma = 0
        return ImageFunction(beta, *self.encoding, self.cfg.corners)

    def redraw(self, x: Tensor, coord: Tensor) -> Tensor:
        """M (B, 3, H, W) at coord (B or 1, H, W, 2), for stage pretrain (Eq. 10)."""
        return evaluate(self.predict(self.embed(x)), coord, *self.encoding).movedim(-1, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None,
                coord: Tensor | None = None) -> Tensor:
        """F (B, 3, H, W) at coord (B or 1, H, W, 2), by default at the pixels of x."""
        if coord is None:
            return self.function(x, t, y).draw(self.cfg.size)
        return evaluate(self.beta(x, t, y), coord, *self.encoding).movedim(-1, 1)  # Eq. (8)


# ---- CM-DiT and CM-UViT ----

@dataclass(frozen=True)
class TransformerConfig:
    """CM-DiT (161 million parameters at 64 px) or CM-UViT (115 million), Appendix D.2.1."""

    size: int = 64              # the only resolution it makes
    patch: int = 4              # 4 at 64 px, 8 at 128 px
    dim: int = 768
    depth: int = 15             # U-ViT: 7 blocks down, 1 in the middle, 7 up
    heads: int = 12
    mlp_ratio: float = 4.0      # open: published code of both
    num_classes: int = 0        # CIFAR-10: 10, never dropped
    time_mlp: bool = False      # U-ViT only: MLP on the noise level
    qkv_bias: bool = False      # U-ViT only; DiT always has it

    def __post_init__(self) -> None:
        check_widths(self)


class DiT(nn.Module):
    """Peebles & Xie's transformer as F; unconditional, it keeps one class, as published."""

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = PatchTokens(cfg)
        self.condition = Condition(cfg.dim, max(cfg.num_classes, 1))
        self.blocks = nn.ModuleList(
            AdaLNBlock(cfg.dim, cfg.heads, cfg.mlp_ratio) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), zero(nn.Linear(cfg.dim, 2 * cfg.dim)))
        self.out = zero(nn.Linear(cfg.dim, 3 * cfg.patch**2))            # F starts at zero

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, 3, S, S) times c_in, t (B,) = 250 ln sigma, y (B,) classes -> F (B, 3, S, S)."""
        y = torch.zeros_like(t, dtype=torch.long) if y is None else y    # (B,)
        c = self.condition(t, y)                                         # (B, D)

        tokens = self.embed(x)                                           # (B, T, D)
        for block in self.blocks:
            tokens = block(tokens, c)                                    # (B, T, D)

        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)      # (B, 1, D) each
        tokens = self.out(self.norm(tokens) * (1 + scale) + shift)       # (B, T, 3 patch^2)
        return to_pixels(tokens, self.cfg.patch)                         # (B, 3, S, S)


class UViT(nn.Module):
    """Bao et al.'s transformer as F: noise level and class are tokens; long skip connections."""

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        if cfg.depth % 2 == 0 or cfg.size % cfg.patch:
            raise ValueError(f"depth must be odd, and patch divide size: {cfg}")
        self.cfg = cfg
        half = cfg.depth // 2
        dim = cfg.dim
        block = functools.partial(Block, dim, cfg.heads, int(dim * cfg.mlp_ratio), True, False,
                                  cfg.qkv_bias)
        self.patch = nn.Conv2d(3, dim, cfg.patch, stride=cfg.patch)
        self.label = nn.Embedding(cfg.num_classes, dim) if cfg.num_classes else None
        self.time = nn.Identity()
        if cfg.time_mlp:
            self.time = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.extras = 2 if cfg.num_classes else 1  # in front: [class,] noise level
        tokens = self.extras + (cfg.size // cfg.patch) ** 2
        self.position = nn.Parameter(torch.zeros(tokens, dim))
        self.down = nn.ModuleList(block() for _ in range(half))
        self.middle = nn.ModuleList([block()])
        self.up = nn.ModuleList(block() for _ in range(half))
        self.merge = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 3 * cfg.patch**2)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

        nn.init.trunc_normal_(self.position, std=0.02)  # as published, here and below
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As DiT."""
        time = self.time(timestep_embedding(t, self.cfg.dim))[:, None]   # (B, 1, D)
        patches = self.patch(x).flatten(2).transpose(1, 2)               # (B, T, D)
        h = torch.cat([time, patches], dim=1)                            # (B, 1 + T, D)
        if self.label is not None:
            h = torch.cat([self.label(y)[:, None], h], dim=1)            # (B, 2 + T, D)
        h = h + self.position                                            # (B, extras + T, D)

        skips = []
        for block in self.down:
            h = block(h)                                                 # (B, extras + T, D)
            skips.append(h)
        h = self.middle[0](h)                                            # (B, extras + T, D)
        for merge, block in zip(self.merge, self.up):
            h = merge(torch.cat([h, skips.pop()], dim=-1))               # (B, extras + T, D)
            h = block(h)                                                 # (B, extras + T, D)

        tokens = self.out(self.norm(h))[:, self.extras:]                 # (B, T, 3 patch^2)
        return self.conv(to_pixels(tokens, self.cfg.patch))              # (B, 3, S, S)
