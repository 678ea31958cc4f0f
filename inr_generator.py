"""From noise to the weights of an image function: the generator of CM-Func, and the transformers it is compared with.
CM-Func Sections 3.2 to 3.4, Appendices A.2, D.2.1; parts of DiT, ANR (Zhang et al. 2024), Trans-INR (Chen & Wang).
Next: consistency.py, which trains any net(x, t, y). The fourth generator, CM-UNet, is ldm.UNet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clif import WHOLE_PLANE, Window, coord_grid
from ldm import timestep_embedding


# ---- coordinates and image functions ----

def pixel_coord(shape: tuple[int, int], window: Window | None = None, corners: bool = False,
                device: torch.device | str | None = None) -> Tensor:
    """Where an image function is asked for each pixel of `window`: (H, W, 2) as (y, x).

    Pixel centres on [-1, 1], as in both codes the paper builds on, so that renders of all sizes coincide. corners: the
    (i/H, j/W) on [0, 1) that Section 3.3 prints, by which they shift. Both axes have the full range at any aspect: the
    picture stretches (open in the paper).
    """
    coord = coord_grid(shape, window, device)
    if not corners:
        return coord
    y0, x0, y1, x1 = WHOLE_PLANE if window is None else window
    cell = coord.new_tensor([(y1 - y0) / shape[0], (x1 - x0) / shape[1]])
    return (coord - cell / 2 + 1) / 2


def variational_coord(coord: Tensor, noise: Tensor) -> Tensor:
    """Pixel coordinates (H, W, 2), each moved at random by ANR's rule (Section 3.2): (B, H, W, 2).

    noise (B, H, W, 2) is standard normal. On [-1, 1] a pixel moves by at most a quarter of its size; the colour asked
    of it stays. The longer side sets the step on both axes, as in the published code. open: the paper does not say
    where this acts. For us in training only, in both stages, with one draw for student and target.
    """
    step = 1 / max(coord.shape[:2])
    return coord + (0.3 * step * noise).clamp(-0.5 * step, 0.5 * step)


def axis_encoding(c: Tensor, dim: int, sigma: float) -> Tensor:
    """(..., n) -> (..., n, dim): the share of one axis in the positional encoding, cos and sin, dim / 2 of each."""
    w = torch.linspace(0, math.log(sigma), dim // 2, device=c.device).exp()
    angle = math.pi * w * c.float()[..., None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def positional_encoding(coord: Tensor, dim: int, sigma: float) -> Tensor:
    """(..., 2) -> (..., 2 dim): cos then sin of pi w c, dim / 2 frequencies w from 1 to sigma per axis, y before x."""
    return axis_encoding(coord, dim, sigma).unflatten(-1, (2, -1)).transpose(-3, -2).flatten(-3)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context of plain float32 on the device, also where autocast is on."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device.type) else nullcontext()


@torch.compiler.assume_constant_result                    # torch.compile of 2.11 cannot look inside, and breaks the graph
def has_autocast(kind: str) -> bool:
    """Whether devices of this kind know autocast; meta, say, does not."""
    return torch.amp.is_autocast_available(kind)


def colours(weights: tuple[Tensor, ...], coord: Tensor, pe_dim: int, pe_sigma: float) -> Tensor:
    """M_beta(c): colours (B, ..., 3) of the MLPs `weights` at coord (B or 1, ..., 2), as ImageFunction says.

    A function of tensors alone, which is what torch.compile takes whatever its version.
    """
    with without_autocast(coord.device):
        code = positional_encoding(coord.flatten(1, -2), pe_dim, pe_sigma)                       # (B or 1, n, 2 pe_dim)
        first = weights[0].float()
        h = torch.baddbmm(first[:, -1:], code.expand(len(first), -1, -1), first[:, :-1])         # (B, n, out), Eq. 9
        return further_layers(weights, h).unflatten(1, coord.shape[1:-1])


def further_layers(weights: tuple[Tensor, ...], h: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The layers after the first one, whose output h (B, n, out) they overwrite: colours (B, n, 3)."""
    for wb in weights[1:]:
        wb = wb.to(dtype)
        h = torch.baddbmm(wb[:, -1:], h.to(dtype).relu_(), wb[:, :-1])
    return h.float()


def scaled(weights: tuple[Tensor, ...], factor: float | Tensor) -> tuple[Tensor, ...]:
    """The weights of the function times a number; exact, since the last layer is linear."""
    return (*weights[:-1], weights[-1].float() * factor)


@dataclass(frozen=True, eq=False)
class ImageFunction:
    """B images as functions of position: ReLU MLPs M_beta(c) = colour, one set of weights each (Eq. 6, 9).

    Nothing here is learned: beta comes from the generator. Everything runs in float32, also under autocast: the
    encoding takes sines of angles up to 3000. Colours are not clamped.
    """

    weights: tuple[Tensor, ...]      # beta, one (B, in + 1, out) per layer; the last row is the bias
    pe_dim: int                      # see positional_encoding
    pe_sigma: float
    corners: bool = False            # see pixel_coord

    def __call__(self, coord: Tensor) -> Tensor:
        """Colours (B, ..., 3) at coord (B, ..., 2), or at (1, ..., 2), the same for all B images."""
        return colours(self.weights, coord, self.pe_dim, self.pe_sigma)

    def tiles(self, res: int | tuple[int, int], window: Window | None = None, tile: int | None = None,
              dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, int, Tensor]]:
        """The images in pieces, row by row: (top, left, colours (B, 3, h, w)). Arguments as in `draw`.

        The first layer is linear in the encoding, which is one of y beside one of x: it is evaluated per row and per
        column, and added up for each pixel (Eq. 9 but for rounding).
        """
        height, width = (res, res) if isinstance(res, int) else res
        y0, x0, y1, x1 = WHOLE_PLANE if window is None else window
        device = self.weights[0].device
        tile = (64 if device.type == "cpu" else 256) if tile is None else tile
        if height < 1 or width < 1 or tile < 1:
            raise ValueError(f"resolution {height}x{width}, tile {tile}: all must be at least 1 pixel")
        if not (-1 <= y0 < y1 <= 1 and -1 <= x0 < x1 <= 1):
            raise ValueError(f"window {y0:g},{x0:g},{y1:g},{x1:g}: need -1 <= y0 < y1 <= 1 and -1 <= x0 < x1 <= 1")
        with without_autocast(device):
            y = pixel_coord((height, 1), window, self.corners, device)[:, 0, 0]                  # (H,)
            x = pixel_coord((1, width), window, self.corners, device)[0, :, 1]                   # (W,)
            y, x = (axis_encoding(c, self.pe_dim, self.pe_sigma) for c in (y, x))
            first = self.weights[0].float()
            wy, wx = (w.flatten(1, 2) for w in first[:, :-1].unflatten(1, (2, 2, -1)).unbind(2))         # cos and sin
            rows = y @ wy + first[:, -1:]                                                        # (B, H, out)
            cols = x @ wx                                                                        # (B, W, out)
        tall = max(1, tile * tile // (len(self) * min(tile, width)))
        for top in range(0, height, tall):
            for left in range(0, width, tile):
                a, b = rows[:, top:top + tall, None], cols[:, None, left:left + tile]
                with without_autocast(device):
                    rgb = further_layers(self.weights, (a + b).flatten(1, 2), dtype)             # (B, h w, 3)
                yield top, left, rgb.unflatten(1, (a.shape[1], b.shape[2])).movedim(-1, 1)

    def draw(self, res: int | tuple[int, int], window: Window | None = None, tile: int | None = None,
             dtype: torch.dtype = torch.float32) -> Tensor:
        """The images (B, 3, H, W) at any resolution and aspect.

        `res` is the size in pixels, int or (H, W), of `window` = (y0, x0, y1, x1), a rectangle of the plane [-1, 1]^2
        (default: all of it). Points do not see one another: tiles only bound the memory, to that of tile^2 pixels of
        all B images together (default: 64, which suits the caches of a CPU, or 256). dtype=torch.bfloat16 is for the
        layers after the first; the encoding and the first layer stay in float32.
        Raises ValueError for an empty resolution, and for a window that is empty or leaves the plane.
        """
        height, width = (res, res) if isinstance(res, int) else res
        out = None
        for top, left, rgb in self.tiles(res, window, tile, dtype):
            out = rgb.new_empty(len(self), 3, height, width) if out is None else out
            out[..., top:top + rgb.shape[2], left:left + rgb.shape[3]] = rgb
        return out

    def __len__(self) -> int:
        return len(self.weights[0])

    def __getitem__(self, index: int | slice) -> ImageFunction:
        """Some of the images; an int keeps the batch dimension."""
        if isinstance(index, int):
            first = range(len(self))[index]                          # negative indices, and an IndexError off the end
            index = slice(first, first + 1)
        return replace(self, weights=tuple(w[index] for w in self.weights))

    def to(self, device: torch.device | str) -> ImageFunction:
        return replace(self, weights=tuple(w.to(device) for w in self.weights))

    def scaled(self, factor: float | Tensor) -> ImageFunction:
        """The function times a number, or times one per image (B,)."""
        factor = factor[:, None, None] if isinstance(factor, Tensor) else factor
        return replace(self, weights=scaled(self.weights, factor))

    def to_dict(self) -> dict:
        """Plain content for torch.save; `from_dict` reads it back."""
        return {"weights": [w.detach().cpu() for w in self.weights], "pe_dim": self.pe_dim, "pe_sigma": self.pe_sigma,
                "corners": self.corners}

    @classmethod
    def from_dict(cls, content: dict) -> ImageFunction:
        missing = {"weights", "pe_dim", "pe_sigma", "corners"} - set(content)
        if missing:
            raise ValueError(f"not an image function: {', '.join(sorted(missing))} missing")
        return cls(tuple(content["weights"]), content["pe_dim"], content["pe_sigma"], content["corners"])


# ---- transformer parts ----

class PatchTokens(nn.Module):
    """Image to one token per patch, plus a fixed code of its place: as in DiT, but for base and scale if given.

    open: one convolution and fixed positions also for the function generator.
    """

    def __init__(self, size: int, patch: int, dim: int, base: float = 10_000.0, scale: float = 1.0):
        super().__init__()
        self.conv = nn.Conv2d(3, dim, patch, stride=patch)
        nn.init.xavier_uniform_(self.conv.weight.view(dim, -1))      # as a linear layer on flattened patches
        nn.init.zeros_(self.conv.bias)
        w = base ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))          # from 1 to 1 / base
        angle = torch.arange(size // patch, dtype=torch.float64)[:, None] * w
        code = scale * torch.cat([angle.sin(), angle.cos()], dim=1).float()              # (side, dim / 2)
        row, col = torch.broadcast_tensors(code[:, None], code)                          # (side, side, dim / 2)
        self.register_buffer("position", torch.cat([col, row], dim=-1).flatten(0, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2) + self.position                   # (B, T, D), row by row


def to_pixels(tokens: Tensor, patch: int) -> Tensor:
    """(B, T, 3 patch^2) of a square of patches -> (B, 3, H, W); inside a token: rows, columns, colours."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.unflatten(1, (side, side)).unflatten(3, (patch, patch, 3))             # (B, h, w, p, q, 3)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                       # (B, 3, h p, w q)


class Attention(nn.Module):
    """Multi-head attention of x to a context, or to itself."""

    def __init__(self, dim: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, T, D), context (B, S, D) -> (B, T, D)."""
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q(x), k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(dim: int, hidden: int, gelu: str = "none") -> nn.Sequential:
    """Two layers; gelu is "tanh" for DiT's approximation, "none" for the exact one."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate=gelu), nn.Linear(hidden, dim))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Condition(nn.Module):
    """Noise level and class as one vector (B, D); their embeddings are added, as in DiT. rows = 0: no classes."""

    def __init__(self, dim: int, rows: int):
        super().__init__()
        self.noise = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(rows, dim) if rows else None
        for name, value in self.named_parameters():                  # DiT's initialisation
            nn.init.normal_(value, std=0.02) if name.endswith("weight") else nn.init.zeros_(value)

    def forward(self, t: Tensor, y: Tensor | None) -> Tensor:
        c = self.noise(timestep_embedding(t, 256))
        return c if self.label is None else c + self.label(y)


class AdaLNBlock(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the condition: adaLN-Zero (Figure 5a).

    The paper calls the three sets alpha, gamma and tau. The regressing layer starts at zero: the block is the identity.
    """

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads, bias=True)
        self.mlp = mlp(dim, hidden, gelu="tanh")
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        for layer in (self.attn.q, self.attn.kv, self.attn.out, self.mlp[0], self.mlp[2], self.modulation[1]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.attn.q, self.attn.kv):                    # DiT draws q, k and v as one matrix of 3 dim rows
            nn.init.uniform_(layer.weight, -math.sqrt(1.5 / dim), math.sqrt(1.5 / dim))
        nn.init.zeros_(self.modulation[1].weight)                    # every gate closed: the identity

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, D), c (B, D) -> (B, T, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm(x), shift_m, scale_m))


class Block(nn.Module):
    """Pre-norm transformer block: attention to itself, to data, both or neither, then an MLP.

    With both it is ANR's decoder block: INR tokens look at one another, then at the data (Figure 5b).
    """

    def __init__(self, dim: int, heads: int, hidden: int, to_itself: bool, to_data: bool, bias: bool = False):
        super().__init__()
        self.norm_self, self.attn_self = (nn.LayerNorm(dim), Attention(dim, heads, bias)) if to_itself else (None, None)
        self.norm_data, self.attn_data = (nn.LayerNorm(dim), Attention(dim, heads, bias)) if to_data else (None, None)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), mlp(dim, hidden)

    def forward(self, x: Tensor, data: Tensor | None = None) -> Tensor:
        """x (B, T, D), data (B, S, D), unnormalised -> (B, T, D)."""
        x = x if self.attn_self is None else x + self.attn_self(self.norm_self(x))
        x = x if self.attn_data is None else x + self.attn_data(self.norm_data(x), data)
        return x + self.mlp(self.norm_mlp(x))


def check_sizes(size: int, patch: int, dim: int, heads: int) -> None:
    """ValueError where patches do not tile the picture or heads do not divide the width."""
    if size < 1 or patch < 1 or size % patch:
        raise ValueError(f"patch size {patch} does not divide resolution {size}; choose another patch or size")
    if dim % heads or dim % 4:
        raise ValueError(f"width {dim} must be a multiple of 4 and of the number of heads, {heads}")


def check_inputs(x: Tensor, y: Tensor | None, size: int, num_classes: int) -> None:
    """ValueError where x is not (B, 3, size, size), or classes y are missing or unexpected."""
    if x.shape[1:] != (3, size, size):
        raise ValueError(f"input is {tuple(x.shape[1:])}; this generator takes noise and images of (3, {size}, {size})")
    if y is not None and not num_classes:
        raise ValueError("classes given to an unconditional generator; leave them out")
    if y is None and num_classes:
        raise ValueError(f"this generator is class-conditional; pass one class of 0 to {num_classes - 1} per image")


# ---- CM-Func: the function generator ----

@dataclass(frozen=True)
class GeneratorConfig:
    """CM-Func, at 64 px by default: 144 million parameters. "open": the paper does not say, the reason follows."""

    size: int = 64                   # training resolution, which is also that of the noise (Appendix D.3.1)
    patch: int = 4                   # Appendix A.2: 4 at 32 and 64 px, 8 at 128 px
    dim: int = 768                   # Appendix D.2.1, said of U-ViT and DiT: "same as our function generator"
    heads: int = 12                  # Appendix D.2.1
    mlp_ratio: float = 4.0           # open: DiT, and Trans-INR's 3072 over 768
    encoder_depth: int = 8           # N, Section 4.1
    decoder_depth: int = 6           # M, Section 4.1
    num_classes: int = 0             # CIFAR-10: 10. open: label embedding added to that of the noise, never dropped
    self_attention: bool = True      # open: INR tokens attend to one another before the data, as in ANR
    context_norm: bool = True        # open: LayerNorm on the data tokens; ANR has none, but also no gated encoder
    # A base of 10,000 is made for long sequences: over 8 x 8 patches 70 % of such a code hardly vary, and attention is
    # slow to tell the patches apart. Base 10 spreads its frequencies over them, scale 4 lifts it above the colours.
    position_base: float = 10_000.0  # open: DiT, of the code of a patch's place
    position_scale: float = 1.0      # open: DiT
    groups: int = 64                 # open: tokens per layer, 259 in all; Trans-INR's setting for images
    hidden: int = 256                # Section 4.1, width of the image function
    layers: int = 5                  # Section 4.1, its depth
    pe_dim: int = 128                # open: Trans-INR, 64 frequencies per axis, 256 inputs
    pe_sigma: float = 1024.0         # open: Trans-INR, highest frequency, in half-waves over the plane
    out_scale: float = 1.0           # open: F = out_scale * M; 2 makes f = M, what pre-training fits, at large sigma
    corners: bool = False            # coordinates as Section 3.3 prints them, see pixel_coord

    def __post_init__(self) -> None:
        check_sizes(self.size, self.patch, self.dim, self.heads)
        if self.hidden % min(self.groups, self.hidden):
            raise ValueError(f"{self.groups} groups do not divide the image function's width {self.hidden}")

    def layer_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of each layer of the image function."""
        widths = [2 * self.pe_dim] + [self.hidden] * (self.layers - 1) + [3]
        return list(zip(widths[:-1], widths[1:]))


class FunctionPrediction(nn.Module):
    """Data tokens -> beta, the weights of the image function (Section 3.3). PyTorch's default initialisation."""

    def __init__(self, cfg: GeneratorConfig):
        super().__init__()
        self.cfg = cfg
        shapes = cfg.layer_shapes()
        self.groups = [min(cfg.groups, fan_out) for _, fan_out in shapes]                # tokens of each layer
        self.tokens = nn.Parameter(torch.randn(sum(self.groups), cfg.dim))
        self.context_norm = nn.LayerNorm(cfg.dim) if cfg.context_norm else nn.Identity()
        self.blocks = nn.ModuleList(                                 # open: no noise level here; Figure 5b draws none
            Block(cfg.dim, cfg.heads, int(cfg.dim * cfg.mlp_ratio), to_itself=cfg.self_attention, to_data=True)
            for _ in range(cfg.decoder_depth))
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(cfg.dim), nn.Linear(cfg.dim, fan_in))
                                   for fan_in, _ in shapes)
        self.base = nn.ParameterList(nn.Parameter(torch.empty(fan_in + 1, fan_out).uniform_(-1, 1) / math.sqrt(fan_in))
                                     for fan_in, fan_out in shapes)

    def fuse(self, data: Tensor) -> Tensor:
        """data (B, S, D) -> INR tokens (B, T, D)."""
        data = self.context_norm(data)
        x = self.tokens.repeat(len(data), 1, 1)                      # (B, T, D)
        for block in self.blocks:
            x = block(x, data)
        return x

    def weights(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """INR tokens (B, T, D) -> one (B, in + 1, out) per layer, by Trans-INR's weight grouping (Section 3.3).

        Column j of a layer is its shared base column times token j mod g, normalised: every unit has weights of norm 1.
        Biases, the last row, are shared by all images and not predicted, though the paper lists them in beta.
        """
        beta = []
        for token, head, base in zip(tokens.split(self.groups, dim=1), self.heads, self.base):
            u = head(token).float().transpose(1, 2)                              # (B, in, g)
            u = u.repeat(1, 1, base.shape[1] // u.shape[2])                      # (B, in, out), tiled, not in blocks
            w = F.normalize(base[:-1] * u, dim=1)
            beta.append(torch.cat([w, base[-1:].expand(len(w), -1, -1)], dim=1))         # (B, in + 1, out)
        return tuple(beta)

    def forward(self, data: Tensor) -> tuple[Tensor, ...]:
        """Data tokens (B, S, D) -> beta."""
        return self.weights(self.fuse(data))


class FunctionGenerator(nn.Module):
    """G(x, sigma) = beta and F(x, sigma, c) = M_beta(c) (Eq. 7, 8): the network F, drawn at any coordinates c."""

    def __init__(self, cfg: GeneratorConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = PatchTokens(cfg.size, cfg.patch, cfg.dim, cfg.position_base, cfg.position_scale)
        self.condition = Condition(cfg.dim, cfg.num_classes)
        self.encoder = nn.ModuleList(AdaLNBlock(cfg.dim, cfg.heads, int(cfg.dim * cfg.mlp_ratio))
                                     for _ in range(cfg.encoder_depth))
        self.predict = FunctionPrediction(cfg)

    def extract(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Feature extraction: noisy x to data tokens (B, T, D)."""
        c = self.condition(t, y)
        tokens = self.embed(x)
        for block in self.encoder:
            tokens = block(tokens, c)
        return tokens

    def function(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> ImageFunction:
        """F as a function of position. x (B, 3, S, S) times c_in, t (B,) = 250 ln sigma, y (B,) classes."""
        return self.as_function(self.beta(x, t, y))

    def beta(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """G(x, sigma): the weights of the functions."""
        check_inputs(x, y, self.cfg.size, self.cfg.num_classes)
        return scaled(self.predict(self.extract(x, t, y)), self.cfg.out_scale)

    def as_function(self, beta: tuple[Tensor, ...]) -> ImageFunction:
        return ImageFunction(beta, self.cfg.pe_dim, self.cfg.pe_sigma, self.cfg.corners)

    def reconstruct(self, x: Tensor) -> ImageFunction:
        """The path of pre-training: clean images (B, 3, S, S) to image functions M (Section 3.4, Figure 5c).

        Neither the encoder nor the noise level takes part: no gradient reaches them, and classes are not needed. The
        patch embedding does, or there would be no tokens, although the paper counts function prediction only. The loss
        (Eq. 10) is the squared distance of M to the image. open: feed 2 x, which is c_in at sigma = 0, so that the
        tokens keep the scale that consistency training gives them.
        """
        check_inputs(x, None, self.cfg.size, 0)
        return self.as_function(self.predict(self.embed(x)))

    def redraw(self, x: Tensor, coord: Tensor) -> Tensor:
        """What `reconstruct` gives (B, 3, H, W) at coord (B or 1, H, W, 2), without the function between."""
        check_inputs(x, None, self.cfg.size, 0)
        return colours(self.predict(self.embed(x)), coord, self.cfg.pe_dim, self.cfg.pe_sigma).movedim(-1, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, coord: Tensor | None = None) -> Tensor:
        """F (B, 3, H, W), drawn at coord (B or 1, H, W, 2), by default at the pixels of x."""
        if coord is None:
            return self.function(x, t, y).draw(self.cfg.size)
        return colours(self.beta(x, t, y), coord, self.cfg.pe_dim, self.cfg.pe_sigma).movedim(-1, 1)


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
    time_mlp: bool = False           # U-ViT only: an MLP on the noise level; off in the published small models
    qkv_bias: bool = False           # U-ViT only; DiT always has it

    def __post_init__(self) -> None:
        check_sizes(self.size, self.patch, self.dim, self.heads)


class DiT(nn.Module):
    """Peebles & Xie's transformer as F. Unconditional, it keeps the one class without which DiT cannot be built."""

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = PatchTokens(cfg.size, cfg.patch, cfg.dim)
        self.condition = Condition(cfg.dim, max(cfg.num_classes, 1))
        self.blocks = nn.ModuleList(AdaLNBlock(cfg.dim, cfg.heads, int(cfg.dim * cfg.mlp_ratio))
                                    for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 2 * cfg.dim))
        self.out = nn.Linear(cfg.dim, 3 * cfg.patch**2)
        for layer in (self.modulation[1], self.out):                 # F starts at zero
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """F (B, 3, S, S). x (B, 3, S, S) times c_in, t (B,) = 250 ln sigma, y (B,) classes."""
        check_inputs(x, y, self.cfg.size, self.cfg.num_classes)
        c = self.condition(t, torch.zeros_like(t, dtype=torch.long) if y is None else y)
        tokens = self.embed(x)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        return to_pixels(self.out(modulate(self.norm(tokens), shift, scale)), self.cfg.patch)


class UViT(nn.Module):
    """Bao et al.'s transformer as F: noise level and class are tokens, and long skips join the two halves."""

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        if cfg.depth % 2 == 0:
            raise ValueError(f"U-ViT's depth {cfg.depth} must be odd: as many blocks up as down, and one between")
        self.cfg = cfg
        half, dim = cfg.depth // 2, cfg.dim

        def blocks(n: int) -> nn.ModuleList:
            hidden = int(dim * cfg.mlp_ratio)
            return nn.ModuleList(Block(dim, cfg.heads, hidden, True, False, cfg.qkv_bias) for _ in range(n))

        self.patch = nn.Conv2d(3, dim, cfg.patch, stride=cfg.patch)
        self.label = nn.Embedding(cfg.num_classes, dim) if cfg.num_classes else None
        self.time = nn.Identity()
        if cfg.time_mlp:
            self.time = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.extras = 2 if cfg.num_classes else 1                    # tokens before the patches: [class,] noise level
        self.position = nn.Parameter(torch.zeros(self.extras + (cfg.size // cfg.patch) ** 2, dim))
        self.down, self.middle, self.up = blocks(half), blocks(1), blocks(half)
        self.merge = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(half))         # one per block on the way up
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 3 * cfg.patch**2)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        nn.init.trunc_normal_(self.position, std=0.02)               # published initialisation, here and below
        for layer in (layer for layer in self.modules() if isinstance(layer, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """F (B, 3, S, S). x (B, 3, S, S) times c_in, t (B,) = 250 ln sigma, y (B,) classes."""
        check_inputs(x, y, self.cfg.size, self.cfg.num_classes)
        tokens = [] if self.label is None else [self.label(y)[:, None]]
        tokens += [self.time(timestep_embedding(t, self.cfg.dim))[:, None], self.patch(x).flatten(2).transpose(1, 2)]
        h = torch.cat(tokens, dim=1) + self.position                 # (B, extras + T, D)
        skips = []
        for block in self.down:
            h = block(h)
            skips.append(h)
        h = self.middle[0](h)
        for merge, block in zip(self.merge, self.up):
            h = block(merge(torch.cat([h, skips.pop()], dim=-1)))
        return self.conv(to_pixels(self.out(self.norm(h))[:, self.extras:], self.cfg.patch))
