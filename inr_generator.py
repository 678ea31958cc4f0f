"""Generate the weights of an image function from noise: CM-Func, and two transformers to compare.
CM-Func Sections 3.2 to 3.4, Appendices A.2, D.2.1; parts of DiT, ANR (Zhang et al. 2024) and
Trans-INR. Next: consistency.py, which trains any net(x, t, y). The fourth, CM-UNet, is ldm.UNet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clif import WHOLE_PLANE, Window, check_frame, coord_grid
from ldm import timestep_embedding


# ---- coordinates ----

def pixel_coord(shape: tuple[int, int], window: Window | None = None, corners: bool = False,
                device: torch.device | str | None = None) -> Tensor:
    """Where an image function is evaluated for each pixel of `window`: (H, W, 2) as (y, x).

    Pixel centres on [-1, 1], as in both codes the paper builds on, so that pictures of all sizes
    coincide. corners: the (i/H, j/W) on [0, 1) that Section 3.3 prints, by which they shift. Both
    axes have the full range at any aspect: the picture stretches (open in the paper).
    """
    coord = coord_grid(shape, window, device)
    if not corners:
        return coord
    y0, x0, y1, x1 = WHOLE_PLANE if window is None else window
    cell = coord.new_tensor([(y1 - y0) / shape[0], (x1 - x0) / shape[1]])
    return (coord - cell / 2 + 1) / 2


def variational_coord(coord: Tensor, noise: Tensor) -> Tensor:
    """Move each pixel's coordinates at random, to train a function between the pixels too.

    coord (H, W, 2); noise (B, H, W, 2), standard normal -> (B, H, W, 2). ANR's rule (Section 3.2):
    on [-1, 1] a pixel moves by at most a quarter of its size; the colour asked of it stays. The
    longer side sets the step on both axes, as in the published code. open: the paper does not say
    where this acts. Here in training only, in both stages, with one draw for student and target.
    """
    step = 1 / max(coord.shape[:2])
    return coord + (0.3 * step * noise).clamp(-0.5 * step, 0.5 * step)


def positional_encoding(coord: Tensor, dim: int, sigma: float) -> Tensor:
    """Code of a position, the input of an image function: (..., 2) -> (..., 2 dim).

    cos y, cos x, sin y, sin x, each of pi w c for the dim / 2 frequencies w from 1 to sigma.
    """
    w = torch.linspace(0, math.log(sigma), dim // 2, device=coord.device).exp()
    angle = (math.pi * w * coord.float()[..., None]).flatten(-2)         # (..., dim): y, x
    return torch.cat([angle.cos(), angle.sin()], dim=-1)                 # (..., 2 dim)


def share_of_axis(code: Tensor, axis: int) -> Tensor:
    """What one axis (0: y, 1: x) adds to a code (..., 2 dim): the other's columns become zero.

    The shares of both axes add up to the code.
    """
    own = code.unflatten(-1, (2, 2, -1))[..., axis:axis + 1, :]          # (..., 2, 1, dim / 2)
    return F.pad(own, (0, 0, axis, 1 - axis)).flatten(-3)                # (..., 2 dim)


# ---- image functions ----

def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context of plain float32 on the device, also where autocast is on."""
    known = has_autocast(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


@torch.compiler.assume_constant_result       # torch.compile of 2.11 cannot look inside
def has_autocast(kind: str) -> bool:
    """Whether devices of this kind know autocast; meta, say, does not."""
    return torch.amp.is_autocast_available(kind)


def affine(wb: Tensor, c: Tensor, bias: int = 1) -> Tensor:
    """W c + bias B: wb (B, in + 1, out) holds W over B; c (B or 1, n, in) -> (B, n, out)."""
    return torch.baddbmm(wb[:, -1:], c.expand(len(wb), -1, -1), wb[:, :-1], beta=bias)


def colours(weights: tuple[Tensor, ...], code: Tensor, columns: Tensor | None = None,
            dtype: torch.dtype = torch.float32) -> Tensor:
    """Evaluate image functions, M_beta(c) = colour, for all training and all drawing.

    weights: beta, see ImageFunction. code (B or 1, n, in): the encoding of n points -> (B, n, 3).
    Of a grid, code (1, H, in) and columns (1, W, in) are the shares of its rows and its columns in
    the encoding -> (B, H W, 3): the first layer is linear, so it is applied to the H + W shares and
    added up for the H W points. dtype: of all layers but the first.
    """
    with without_autocast(code.device):
        first = weights[0].float()
        h = affine(first, code)                                          # (B, n, out)
        if columns is not None:
            h = h[:, :, None] + affine(first, columns, bias=0)[:, None]  # (B, H, W, out)
            h = h.flatten(1, 2)                                          # (B, H W, out)
        for wb in weights[1:]:
            h = affine(wb.to(dtype), h.to(dtype).relu_())                # Eq. (9)
        return h.float()                                                 # (B, n, 3)


def evaluate(weights: tuple[Tensor, ...], coord: Tensor, pe_dim: int, pe_sigma: float) -> Tensor:
    """Colours (B, ..., 3) at coord (B or 1, ..., 2) anywhere.

    A function of tensors alone, which is what torch.compile takes whatever its version.
    """
    code = positional_encoding(coord.flatten(1, -2), pe_dim, pe_sigma)   # (B or 1, n, in)
    return colours(weights, code).unflatten(1, coord.shape[1:-1])        # (B, ..., 3)


def scaled(weights: tuple[Tensor, ...], factor: float | Tensor) -> tuple[Tensor, ...]:
    """The weights of the functions times a number; exact, since the last layer is linear."""
    return (*weights[:-1], weights[-1].float() * factor)


@dataclass(frozen=True, eq=False)
class ImageFunction:
    """B images as functions of position: ReLU MLPs M_beta(c) = colour (Eq. 6, 9).

    Nothing here is learned: beta comes from the generator. Everything runs in float32, also under
    autocast: the encoding takes sines of angles up to 3000. Colours are not clamped.
    """

    weights: tuple[Tensor, ...]      # beta, (B, in + 1, out) per layer; the last row is the bias
    pe_dim: int                      # see positional_encoding
    pe_sigma: float
    corners: bool = False            # see pixel_coord

    def __call__(self, coord: Tensor) -> Tensor:
        """Colours (B, ..., 3) at coord (B, ..., 2), or (1, ..., 2) for the same in all images."""
        return evaluate(self.weights, coord, self.pe_dim, self.pe_sigma)

    def tiles(self, res: int | tuple[int, int], window: Window | None = None,
              tile: int | None = None,
              dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, int, Tensor]]:
        """Draw in pieces, row by row: (top, left, colours (B, 3, h, w)). Arguments as in `draw`."""
        (height, width), window = check_frame(res, window)
        device = self.weights[0].device
        tile = (64 if device.type == "cpu" else 256) if tile is None else tile
        if tile < 1:
            raise ValueError(f"resolution {height}x{width}, tile {tile}: at least 1 pixel each")
        group = max(1, tile**2 // (min(tile, height) * min(tile, width)))        # images at a time
        parts = [self[i:i + group].weights for i in range(0, len(self), group)]

        rows = pixel_coord((height, 1), window, self.corners, device)[None, :, 0]        # (1, H, 2)
        cols = pixel_coord((1, width), window, self.corners, device)                     # (1, W, 2)
        rows = share_of_axis(positional_encoding(rows, self.pe_dim, self.pe_sigma), 0)
        cols = share_of_axis(positional_encoding(cols, self.pe_dim, self.pe_sigma), 1)
        for top in range(0, height, tile):
            down = rows[:, top:top + tile]                               # (1, h, in)
            for left in range(0, width, tile):
                across = cols[:, left:left + tile]                       # (1, w, in)
                rgb = torch.cat([colours(part, down, across, dtype) for part in parts])
                yield top, left, rgb.unflatten(1, (down.shape[1], -1)).movedim(-1, 1)

    def draw(self, res: int | tuple[int, int], window: Window | None = None,
             tile: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The images (B, 3, H, W) at any resolution and aspect.

        res and window, and the ValueError they raise, are those of clif.check_frame. Points do not
        see one another: tiles only bound the memory, to the layers of tile^2 points at a time
        (default: 64, which suits the caches of a CPU, or 256). dtype: of all layers but the first.
        """
        (height, width), window = check_frame(res, window)
        out = self.weights[0].new_empty(len(self), 3, height, width, dtype=torch.float32)
        for top, left, rgb in self.tiles(res, window, tile, dtype):
            out[..., top:top + rgb.shape[2], left:left + rgb.shape[3]] = rgb
        return out

    def __len__(self) -> int:
        return len(self.weights[0])

    def __getitem__(self, index: int | slice) -> ImageFunction:
        """Some of the images; an int keeps the batch dimension."""
        if isinstance(index, int):
            first = range(len(self))[index]          # takes negatives; IndexError off the end
            index = slice(first, first + 1)
        return replace(self, weights=tuple(w[index] for w in self.weights))

    def to(self, device: torch.device | str) -> ImageFunction:
        return replace(self, weights=tuple(w.to(device) for w in self.weights))

    def scaled(self, factor: float | Tensor) -> ImageFunction:
        """The functions times a number, or times one per image (B,)."""
        factor = factor[:, None, None] if isinstance(factor, Tensor) else factor
        return replace(self, weights=scaled(self.weights, factor))

    def to_dict(self) -> dict:
        """Plain content for torch.save; `from_dict` reads it back."""
        return {"weights": [w.detach().cpu() for w in self.weights], "pe_dim": self.pe_dim,
                "pe_sigma": self.pe_sigma, "corners": self.corners}

    @classmethod
    def from_dict(cls, content: dict) -> ImageFunction:
        missing = {"weights", "pe_dim", "pe_sigma", "corners"} - set(content)
        if missing:
            raise ValueError(f"not an image function: {', '.join(sorted(missing))} missing")
        return cls(tuple(content["weights"]), content["pe_dim"], content["pe_sigma"],
                   content["corners"])


# ---- transformer parts ----

class PatchTokens(nn.Module):
    """One token per patch, plus a fixed code of its place: (B, 3, S, S) -> (B, T, D), row by row.

    As in DiT, but for base and scale if given. open: also for the function generator.
    """

    def __init__(self, size: int, patch: int, dim: int, base: float = 10_000.0, scale: float = 1.0):
        super().__init__()
        if dim % 4:
            raise ValueError(f"width {dim} must be a multiple of 4, for the code of the places")
        self.conv = nn.Conv2d(3, dim, patch, stride=patch)
        nn.init.xavier_uniform_(self.conv.weight.view(dim, -1))          # as a linear layer
        nn.init.zeros_(self.conv.bias)

        w = base ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))      # 1 to 1 / base
        angle = torch.arange(size // patch, dtype=torch.float64)[:, None] * w
        code = scale * torch.cat([angle.sin(), angle.cos()], dim=1).float()          # (side, D / 2)
        row, col = torch.broadcast_tensors(code[:, None], code)          # (side, side, D / 2)
        self.register_buffer("position", torch.cat([col, row], dim=-1).flatten(0, 1),
                             persistent=False)                           # (T, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2) + self.position   # (B, T, D)


def to_pixels(tokens: Tensor, patch: int) -> Tensor:
    """Tokens (B, T, 3 patch^2), inside rows, columns, colours -> the image (B, 3, S, S)."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.unflatten(1, (side, side)).unflatten(3, (patch, patch, 3))   # (B, h, w, p, q, 3)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)             # (B, 3, h p, w q)


class Attention(nn.Module):
    """Multi-head attention of x (B, T, D) to a context (B, S, D), or to itself -> (B, T, D).

    head_dim: width of a head; 0: dim / heads. heads head_dim need not be dim.
    """

    def __init__(self, dim: int, heads: int, bias: bool, head_dim: int = 0):
        super().__init__()
        inner = heads * (head_dim or dim // heads)
        self.heads = heads
        self.q = nn.Linear(dim, inner, bias=bias)
        self.kv = nn.Linear(dim, 2 * inner, bias=bias)
        self.out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)       # (B, S, heads d)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2)           # (B, heads, T, d)
                   for part in (self.q(x), k, v))
        out = F.scaled_dot_product_attention(q, k, v)                            # (B, heads, T, d)
        return self.out(out.transpose(1, 2).flatten(2))                          # (B, T, D)


def mlp(dim: int, hidden: int, gelu: str = "none") -> nn.Sequential:
    """Two layers; gelu, as nn.GELU's: "tanh" is DiT's approximation, "none" the exact function."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate=gelu), nn.Linear(hidden, dim))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, D), shift and scale (B, D) -> (B, T, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Condition(nn.Module):
    """Embed noise level t (B,) and class y (B,) as one vector (B, D), their sum, as in DiT.

    rows: number of classes; 0: there are none.
    """

    def __init__(self, dim: int, rows: int):
        super().__init__()
        self.noise = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(rows, dim) if rows else None
        for name, value in self.named_parameters():                      # DiT's initialisation
            nn.init.normal_(value, std=0.02) if name.endswith("weight") else nn.init.zeros_(value)

    def forward(self, t: Tensor, y: Tensor | None) -> Tensor:
        c = self.noise(timestep_embedding(t, 256))                       # (B, D)
        return c if self.label is None else c + self.label(y)            # (B, D)


class AdaLNBlock(nn.Module):
    """Transformer block that the condition shifts, scales and gates: adaLN-Zero (Figure 5a).

    The paper calls the three sets alpha, gamma and tau. The layer that regresses them starts at
    zero, so that the block is the identity.
    """

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads, bias=True)
        self.mlp = mlp(dim, hidden, gelu="tanh")
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

        attention = [self.attn.q, self.attn.kv, self.attn.out]
        for layer in (*attention, self.mlp[0], self.mlp[2], self.modulation[1]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.attn.q, self.attn.kv):        # DiT draws q, k and v as one matrix
            nn.init.uniform_(layer.weight, -math.sqrt(1.5 / dim), math.sqrt(1.5 / dim))
        nn.init.zeros_(self.modulation[1].weight)        # every gate closed: the identity

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, D), c (B, D) -> (B, T, D)."""
        parts = self.modulation(c).chunk(6, dim=1)                       # 6 of (B, D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts       # (B, D) each

        h = modulate(self.norm(x), shift_a, scale_a)                     # (B, T, D)
        x = x + gate_a[:, None] * self.attn(h)                           # (B, T, D)
        h = modulate(self.norm(x), shift_m, scale_m)                     # (B, T, D)
        return x + gate_m[:, None] * self.mlp(h)                         # (B, T, D)


class Block(nn.Module):
    """Pre-norm transformer block: attention to itself, to data, both or neither, then an MLP.

    With both it is ANR's decoder block: INR tokens attend to one another, then to the data
    (Figure 5b).
    """

    def __init__(self, dim: int, heads: int, hidden: int, to_itself: bool, to_data: bool,
                 bias: bool = False, head_dim: int = 0):
        super().__init__()
        self.norm_self = nn.LayerNorm(dim) if to_itself else None
        self.attn_self = Attention(dim, heads, bias, head_dim) if to_itself else None
        self.norm_data = nn.LayerNorm(dim) if to_data else None
        self.attn_data = Attention(dim, heads, bias, head_dim) if to_data else None
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = mlp(dim, hidden)

    def forward(self, x: Tensor, data: Tensor | None = None) -> Tensor:
        """x (B, T, D), data (B, S, D), unnormalised -> (B, T, D)."""
        if self.attn_self is not None:
            x = x + self.attn_self(self.norm_self(x))                    # (B, T, D)
        if self.attn_data is not None:
            x = x + self.attn_data(self.norm_data(x), data)              # (B, T, D)
        return x + self.mlp(self.norm_mlp(x))                            # (B, T, D)


def check_sizes(size: int, patch: int, dim: int, heads: int) -> None:
    """ValueError where patches do not tile the picture, or heads do not divide the width."""
    if size < 1 or patch < 1 or size % patch:
        raise ValueError(f"patch size {patch} does not divide resolution {size}; choose another "
                         f"patch or size")
    if heads < 1 or dim % heads:
        raise ValueError(f"width {dim} must be a multiple of the number of heads, {heads}")


def check_inputs(x: Tensor, y: Tensor | None, size: int, num_classes: int) -> None:
    """ValueError where x is not (B, 3, size, size), or classes y are missing or unexpected."""
    if x.shape[1:] != (3, size, size):
        raise ValueError(f"input is {tuple(x.shape[1:])}; this generator takes noise and images of "
                         f"(3, {size}, {size})")
    if y is not None and not num_classes:
        raise ValueError("classes given to an unconditional generator; leave them out")
    if y is None and num_classes:
        raise ValueError(f"this generator is class-conditional; pass one class of 0 to "
                         f"{num_classes - 1} per image")


# ---- CM-Func: the function generator ----

@dataclass(frozen=True)
class GeneratorConfig:
    """CM-Func, at 64 px by default: 144 million parameters. "open": the paper does not say."""

    size: int = 64                   # training resolution, and that of the noise (Appendix D.3.1)
    patch: int = 4                   # Appendix A.2: 4 at 32 and 64 px, 8 at 128 px
    dim: int = 768                   # D.2.1, of U-ViT and DiT: "same as our function generator"
    heads: int = 12                  # Appendix D.2.1
    head_dim: int = 0                # of the decoder (ANR; the encoder is DiT's); 0: dim / heads
    mlp_ratio: float = 4.0           # open: DiT, and Trans-INR's 3072 over 768
    encoder_depth: int = 8           # N, Section 4.1
    decoder_depth: int = 6           # M, Section 4.1
    num_classes: int = 0             # CIFAR-10: 10. open: added to the noise's code, never dropped
    self_attention: bool = True      # open: INR tokens attend to one another first, as in ANR
    context_norm: bool = True        # open: LayerNorm on data tokens; ANR has neither it nor gates
    # A base of 10,000 is made for long sequences: over 8 x 8 patches 70 % of such a code hardly
    # vary, and attention is slow to tell the patches apart. Base 10 spreads its frequencies over
    # them, scale 4 lifts it above the colours.
    position_base: float = 10_000.0  # open: DiT, of the code of a patch's place
    position_scale: float = 1.0      # open: DiT
    groups: int = 64                 # open: tokens per layer, 259 in all; Trans-INR's for images
    hidden: int = 256                # Section 4.1, width of the image function
    layers: int = 5                  # Section 4.1, its depth
    pe_dim: int = 128                # open: Trans-INR, 64 frequencies per axis, 256 inputs
    pe_sigma: float = 1024.0         # open: Trans-INR, highest frequency, half-waves over the plane
    out_scale: float = 1.0           # open: F = out_scale M; 2: at large sigma f is the M of 3.4
    corners: bool = False            # coordinates as Section 3.3 prints them, see pixel_coord

    def __post_init__(self) -> None:
        divided = self.encoder_depth or not self.head_dim or self.heads < 1
        check_sizes(self.size, self.patch, self.dim, self.heads if divided else 1)
        if self.head_dim < 0:
            raise ValueError(f"head_dim {self.head_dim} must be at least 1, or 0 for dim / heads")
        if self.hidden % min(self.groups, self.hidden):
            raise ValueError(f"{self.groups} groups do not divide the image function's width "
                             f"{self.hidden}")

    def layer_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of each layer of the image function."""
        widths = [2 * self.pe_dim] + [self.hidden] * (self.layers - 1) + [3]
        return list(zip(widths[:-1], widths[1:]))


class FunctionPrediction(nn.Module):
    """Predict beta, the weights of the image functions, from data tokens (Section 3.3).

    Initialised as PyTorch does it.
    """

    def __init__(self, cfg: GeneratorConfig):
        super().__init__()
        self.cfg = cfg
        shapes = cfg.layer_shapes()
        self.groups = [min(cfg.groups, fan_out) for _, fan_out in shapes]        # tokens per layer
        self.tokens = nn.Parameter(torch.randn(sum(self.groups), cfg.dim))
        self.context_norm = nn.LayerNorm(cfg.dim) if cfg.context_norm else nn.Identity()

        hidden = int(cfg.dim * cfg.mlp_ratio)
        self.blocks = nn.ModuleList(             # open: no noise level here; Figure 5b draws none
            Block(cfg.dim, cfg.heads, hidden, cfg.self_attention, True, head_dim=cfg.head_dim)
            for _ in range(cfg.decoder_depth))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(cfg.dim), nn.Linear(cfg.dim, fan_in))
            for fan_in, _ in shapes)
        self.base = nn.ParameterList()
        for fan_in, fan_out in shapes:
            base = torch.empty(fan_in + 1, fan_out).uniform_(-1, 1) / math.sqrt(fan_in)
            self.base.append(nn.Parameter(base))

    def fuse(self, data: Tensor) -> Tensor:
        """data (B, S, D) -> INR tokens (B, T, D)."""
        data = self.context_norm(data)                                   # (B, S, D)
        x = self.tokens.repeat(len(data), 1, 1)                          # (B, T, D)
        for block in self.blocks:
            x = block(x, data)                                           # (B, T, D)
        return x

    def weights(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """INR tokens (B, T, D) -> beta, by Trans-INR's weight grouping (Section 3.3).

        Column j of a layer is its shared base column times token j mod g, normalised: every unit
        has weights of norm 1. Biases, the last row, are shared by all images and not predicted,
        though the paper lists them in beta.
        """
        beta = []
        for token, head, base in zip(tokens.split(self.groups, dim=1), self.heads, self.base):
            u = head(token).float().transpose(1, 2)                      # (B, in, g)
            u = u.repeat(1, 1, base.shape[1] // u.shape[2])              # (B, in, out), tiled
            w = F.normalize(base[:-1] * u, dim=1)                        # weight grouping
            b = base[-1:].expand(len(w), -1, -1)                         # (B, 1, out)
            beta.append(torch.cat([w, b], dim=1))                        # (B, in + 1, out)
        return tuple(beta)

    def forward(self, data: Tensor) -> tuple[Tensor, ...]:
        """Data tokens (B, S, D) -> beta."""
        return self.weights(self.fuse(data))


class FunctionGenerator(nn.Module):
    """The network F that answers with a function: G(x, sigma) = beta, F(x, sigma, c) = M_beta(c).

    Eq. (7) and (8). x (B, 3, S, S) times c_in; t (B,) = 250 ln sigma; y (B,) classes or None.
    """

    def __init__(self, cfg: GeneratorConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = PatchTokens(cfg.size, cfg.patch, cfg.dim, cfg.position_base,
                                 cfg.position_scale)
        self.condition = Condition(cfg.dim, cfg.num_classes)
        hidden = int(cfg.dim * cfg.mlp_ratio)
        self.encoder = nn.ModuleList(AdaLNBlock(cfg.dim, cfg.heads, hidden)
                                     for _ in range(cfg.encoder_depth))
        self.predict = FunctionPrediction(cfg)

    def extract(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Feature extraction: noisy x to data tokens (B, T, D)."""
        c = self.condition(t, y)                                         # (B, D)
        tokens = self.embed(x)                                           # (B, T, D)
        for block in self.encoder:
            tokens = block(tokens, c)                                    # (B, T, D)
        return tokens

    def beta(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """G(x, sigma): the weights of the functions."""
        check_inputs(x, y, self.cfg.size, self.cfg.num_classes)
        return scaled(self.predict(self.extract(x, t, y)), self.cfg.out_scale)   # Eq. (7)

    def reconstructing_beta(self, x: Tensor) -> tuple[Tensor, ...]:
        """The path of pre-training: clean images (B, 3, S, S) to the weights of functions M.

        Section 3.4, Figure 5c. Neither the encoder nor the noise level takes part: no gradient
        reaches them, and classes are not needed. The patch embedding does, or there would be no
        tokens, although the paper counts function prediction only. The loss (Eq. 10) is the squared
        distance of M to the image. open: feed 2 x, which is c_in x at sigma = 0, so that the tokens
        keep the scale that consistency training gives them.
        """
        check_inputs(x, None, self.cfg.size, 0)
        return self.predict(self.embed(x))

    def as_function(self, beta: tuple[Tensor, ...]) -> ImageFunction:
        return ImageFunction(beta, self.cfg.pe_dim, self.cfg.pe_sigma, self.cfg.corners)

    def function(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> ImageFunction:
        """F as a function of position, to be drawn at any resolution."""
        return self.as_function(self.beta(x, t, y))

    def reconstruct(self, x: Tensor) -> ImageFunction:
        """M as a function of position."""
        return self.as_function(self.reconstructing_beta(x))

    def redraw(self, x: Tensor, coord: Tensor) -> Tensor:
        """M (B, 3, H, W) at coord (B or 1, H, W, 2): what stage pretrain trains."""
        beta = self.reconstructing_beta(x)
        return evaluate(beta, coord, self.cfg.pe_dim, self.cfg.pe_sigma).movedim(-1, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None,
                coord: Tensor | None = None) -> Tensor:
        """F (B, 3, H, W) at coord (B or 1, H, W, 2), by default at the pixels of x."""
        if coord is None:
            return self.function(x, t, y).draw(self.cfg.size)
        beta = self.beta(x, t, y)
        return evaluate(beta, coord, self.cfg.pe_dim, self.cfg.pe_sigma).movedim(-1, 1)  # Eq. (8)


# ---- the two transformers that make pixels ----

@dataclass(frozen=True)
class TransformerConfig:
    """CM-DiT (161 million parameters at 64 px) or CM-UViT (115 million), Appendix D.2.1."""

    size: int = 64                   # the only resolution it makes
    patch: int = 4                   # Appendix D.2.1: 4 at 64 px, 8 at 128 px
    dim: int = 768                   # Appendix D.2.1
    depth: int = 15                  # Appendix D.2.1; U-ViT: 7 blocks down, 1 in the middle, 7 up
    heads: int = 12                  # Appendix D.2.1
    mlp_ratio: float = 4.0           # open: published code of both
    num_classes: int = 0             # CIFAR-10: 10, never dropped
    time_mlp: bool = False           # U-ViT only: MLP on the noise level; off in the small models
    qkv_bias: bool = False           # U-ViT only; DiT always has it

    def __post_init__(self) -> None:
        check_sizes(self.size, self.patch, self.dim, self.heads)


class DiT(nn.Module):
    """Peebles & Xie's transformer as F: x (B, 3, S, S) times c_in -> (B, 3, S, S).

    Unconditional, it keeps the one class without which DiT cannot be built.
    """

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = PatchTokens(cfg.size, cfg.patch, cfg.dim)
        self.condition = Condition(cfg.dim, max(cfg.num_classes, 1))
        hidden = int(cfg.dim * cfg.mlp_ratio)
        self.blocks = nn.ModuleList(AdaLNBlock(cfg.dim, cfg.heads, hidden)
                                    for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 2 * cfg.dim))
        self.out = nn.Linear(cfg.dim, 3 * cfg.patch**2)
        for layer in (self.modulation[1], self.out):                     # F starts at zero
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, 3, S, S) times c_in, t (B,) = 250 ln sigma, y (B,) classes -> F (B, 3, S, S)."""
        check_inputs(x, y, self.cfg.size, self.cfg.num_classes)
        y = torch.zeros_like(t, dtype=torch.long) if y is None else y    # (B,)
        c = self.condition(t, y)                                         # (B, D)

        tokens = self.embed(x)                                           # (B, T, D)
        for block in self.blocks:
            tokens = block(tokens, c)                                    # (B, T, D)

        shift, scale = self.modulation(c).chunk(2, dim=1)                # (B, D) each
        tokens = self.out(modulate(self.norm(tokens), shift, scale))     # (B, T, 3 patch^2)
        return to_pixels(tokens, self.cfg.patch)                         # (B, 3, S, S)


class UViT(nn.Module):
    """Bao et al.'s transformer as F: x (B, 3, S, S) times c_in -> (B, 3, S, S).

    Noise level and class are tokens, and long skip connections join the two halves.
    """

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        if cfg.depth % 2 == 0:
            raise ValueError(f"U-ViT's depth {cfg.depth} must be odd: as many blocks up as down, "
                             f"and one between")
        self.cfg = cfg
        half = cfg.depth // 2
        dim = cfg.dim
        hidden = int(dim * cfg.mlp_ratio)

        def blocks(n: int) -> nn.ModuleList:
            return nn.ModuleList(Block(dim, cfg.heads, hidden, True, False, cfg.qkv_bias)
                                 for _ in range(n))

        self.patch = nn.Conv2d(3, dim, cfg.patch, stride=cfg.patch)
        self.label = nn.Embedding(cfg.num_classes, dim) if cfg.num_classes else None
        self.time = nn.Identity()
        if cfg.time_mlp:
            self.time = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.extras = 2 if cfg.num_classes else 1        # tokens in front: [class,] noise level
        patches = (cfg.size // cfg.patch) ** 2
        self.position = nn.Parameter(torch.zeros(self.extras + patches, dim))
        self.down = blocks(half)
        self.middle = blocks(1)
        self.up = blocks(half)
        self.merge = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(half))     # one per `up`
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 3 * cfg.patch**2)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

        nn.init.trunc_normal_(self.position, std=0.02)   # published initialisation, here and below
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, 3, S, S) times c_in, t (B,) = 250 ln sigma, y (B,) classes -> F (B, 3, S, S)."""
        check_inputs(x, y, self.cfg.size, self.cfg.num_classes)
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
