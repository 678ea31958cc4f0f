"""CLIF: an image as a function of coordinates and pixel size, drawn at any resolution.
Paper: Image Neural Field Diffusion Models (INFD), supplementary A (LIIF against CLIF), B and J.1.
Read next: autoencoder.py, which makes the feature field phi that is rendered here.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[nn.GroupNorm, Tensor], Tensor]     # applies a GroupNorm layer to a tensor
Window = tuple[float, float, float, float]          # y0, x0, y1, x1 within [-1, 1]
WHOLE_PLANE: Window = (-1.0, -1.0, 1.0, 1.0)
Tiles = Iterator[tuple[int, int, Tensor]]           # (y, x, rgb (B, 3, h, w)), y and x in pixels


# ---- Coordinates ----

def check_frame(res: int | tuple[int, int],
                window: Window | None = None) -> tuple[tuple[int, int], Window]:
    """Check the size and place of a picture before it is drawn: ((H, W), window), or ValueError."""
    try:
        height, width = map(operator.index, res if isinstance(res, Sequence) else (res, res))
        y0, x0, y1, x1 = map(float, WHOLE_PLANE if window is None else window)
    except (TypeError, ValueError):
        raise ValueError(f"resolution {res!r}, window {window!r}: give 512 or (256, 512), and "
                         f"(y0, x0, y1, x1)") from None
    if height < 1 or width < 1:
        raise ValueError(f"resolution {height}x{width}: both sides must be at least 1 pixel")
    if not (-1 <= y0 < y1 <= 1 and -1 <= x0 < x1 <= 1):
        raise ValueError(f"window {y0:g},{x0:g},{y1:g},{x1:g}: need -1 <= y0 < y1 <= 1, x alike")
    return (height, width), (y0, x0, y1, x1)


def coord_grid(shape: tuple[int, int], window: Window | None = None,
               device: torch.device | str | None = None) -> Tensor:
    """Pixel centres (H, W, 2) as (y, x), float32, of `shape` = (H, W) pixels that fill `window`."""
    (height, width), (y0, x0, y1, x1) = check_frame(shape, window)
    y = _centres(torch.arange(height, device=device), height, y0, y1)         # (H,)
    x = _centres(torch.arange(width, device=device), width, x0, x1)           # (W,)
    return torch.cartesian_prod(y, x).view(height, width, 2)


def _centres(index: Tensor, n: float, lo: float, hi: float) -> Tensor:
    """Where the pixels `index` have their centres if n pixels fill [lo, hi]."""
    # As published, because rounding decides ties; a GPU divides by a number with another rounding.
    index = index.float() + 0.5
    return lo + (hi - lo) * (index / torch.full_like(index, n))


def nearest(features: Tensor, coord: Tensor) -> Tensor:
    """Look up the nearest of features (B, C, h, w) for each coord (B, H, W, 2): (B, C, H, W)."""
    # A tie goes to the even cell, as in the published code; off the plane a feature is zero.
    return F.grid_sample(features, coord.flip(-1), mode="nearest",            # it wants (x, y)
                         padding_mode="zeros", align_corners=False)


def _nearest_centre(phi: Tensor, coord: Tensor) -> Tensor:
    """Where the feature that `nearest` finds for each coordinate lives: (B, 2, H, W) as (y, x)."""
    centres = coord_grid(phi.shape[-2:], device=phi.device).movedim(-1, 0)    # (2, h, w)
    return nearest(centres.expand(len(phi), -1, -1, -1), coord)               # (B, 2, H, W)


# ---- Renderers ----

def own_statistics(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    """The ordinary GroupNorm: mean and variance are those of x itself."""
    return layer(x)


class ResBlock(nn.Module):
    """The residual block of E, D and R: x + conv(act(norm(conv(act(norm(x))))))."""

    def __init__(self, c_in: int, c_out: int, groups: int = 32):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)            # as in LDM; PyTorch has 1e-5
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, norm: Norm = own_statistics) -> Tensor:
        """x (B, c_in, H, W) -> (B, c_out, H, W)."""
        h = self.conv1(F.silu(norm(self.norm1, x)))                           # (B, c_out, H, W)
        h = self.conv2(F.silu(norm(self.norm2, h)))                           # (B, c_out, H, W)
        return self.nin_shortcut(x) + h


def query(phi: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
    """Build the input of CLIF (published code); arguments as in `CLIF.forward`.

    Per pixel: the nearest feature, where in its cell the pixel lies, its size in half such cells.
    """
    # Filled on the device: to copy two numbers there the host would wait, twice in a step.
    hw = torch.cat([coord.new_full((1, 1, 1, 1), n) for n in phi.shape[-2:]], dim=1)
    feature = nearest(phi, coord)                                             # (B, C, H, W)
    offset = (coord.movedim(-1, 1) - _nearest_centre(phi, coord)) * hw        # (B, 2, H, W)
    size = (cell[:, :, None, None] * hw).expand_as(offset)                    # (B, 2, H, W)
    return torch.cat([feature, offset, size], dim=1)                          # (B, C + 4, H, W)


@dataclass(frozen=True)
class CLIFConfig:
    """Architecture of CLIF; the defaults are the published renderer."""

    in_channels: int = 128            # channels of phi: the decoder's base width (J.1)
    hidden: int = 256                 # width, a multiple of groups (published code)
    num_blocks: int = 2               # residual blocks (J.1)
    groups: int = 32                  # of every GroupNorm (published code)


class CLIF(nn.Module):
    """Convolutional Local Image Function, the renderer R(phi, c, s) of INFD (supplementary A).

    LIIF colours each point alone with an MLP, CLIF a grid of pixels together with a ConvNet: by J.1
    convolution, two residual blocks, convolution, the last after GroupNorm and SiLU as published.
    """

    def __init__(self, cfg: CLIFConfig):
        super().__init__()
        first = nn.Conv2d(cfg.in_channels + 4, cfg.hidden, 3, padding=1)
        blocks = [ResBlock(cfg.hidden, cfg.hidden, cfg.groups) for _ in range(cfg.num_blocks)]
        self.model = nn.ModuleList([first, *blocks])
        self.norm_out = nn.GroupNorm(cfg.groups, cfg.hidden, eps=1e-6)
        self.conv_out = nn.Conv2d(cfg.hidden, 3, 3, padding=1)
        self.reach = 2 * cfg.num_blocks + 2           # how many pixels far a pixel sees

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight at which `autoencoder.adaptive_weight` compares the losses."""
        return self.conv_out.weight

    def forward(self, phi: Tensor, coord: Tensor, cell: Tensor,
                norm: Norm = own_statistics) -> Tensor:
        """Colours (B, 3, H, W), about [-1, 1] but not clamped, of a grid of pixels.

        phi (B, C, h, w); coord (B, H, W, 2), pixel centres as (y, x) in [-1, 1]; cell (B, 2), the
        pixel's height and width in the same units.
        """
        return self.conv_out(self.body(query(phi, coord, cell), norm))        # (B, 3, H, W)

    def body(self, x: Tensor, norm: Norm = own_statistics) -> Tensor:
        """All between query and the last layer: x (B, C + 4, H, W) -> (B, hidden, H, W).

        A method because training compiles it: the last layer's gradients are asked for alone.
        """
        first, *blocks = self.model
        x = first(x)                                                          # (B, hidden, H, W)
        for block in blocks:
            x = block(x, norm)                                                # (B, hidden, H, W)
        return F.silu(norm(self.norm_out, x))                                 # (B, hidden, H, W)


@dataclass(frozen=True)
class LIIFConfig:
    """Architecture of LIIF; the three switches are its published ablations."""

    in_channels: int = 128            # channels of phi
    hidden: int = 256                 # width of the MLP
    depth: int = 4                    # hidden layers
    unfold: bool = True               # show the MLP the 3x3 neighbourhood of the nearest feature
    ensemble: bool = True             # blend the answers of the four nearest features by area
    cell_decode: bool = True          # tell the MLP the pixel size


class LIIF(nn.Module):
    """Local Implicit Image Function (Chen et al. 2021), CLIF's baseline in supplementary A."""

    reach = 0                         # a pixel does not see its neighbours

    def __init__(self, cfg: LIIFConfig):
        super().__init__()
        self.cfg = cfg
        k = 3 if cfg.unfold else 1
        self.unfold = nn.Unfold(k, padding=k // 2)
        widths = [cfg.in_channels * k**2 + 2 + 2 * cfg.cell_decode] + [cfg.hidden] * cfg.depth
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise(widths):
            layers += [nn.Linear(c_in, c_out), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], 3))

    @property
    def last_weight(self) -> nn.Parameter:
        return self.mlp[-1].weight

    def forward(self, phi: Tensor, coord: Tensor, cell: Tensor,
                norm: Norm = own_statistics) -> Tensor:
        """As `CLIF.forward`; there are no norms."""
        hw = coord.new_tensor(phi.shape[-2:])
        size = (cell * hw)[:, None, None].expand_as(coord)                    # (B, H, W, 2)
        around = self.unfold(phi).unflatten(2, phi.shape[-2:])                # (B, 9 * C, h, w)

        colours = []
        areas = []
        nudge = 1e-6 * self.cfg.ensemble                                      # no ties (LIIF)
        for shift in product((-1, 1), repeat=2) if self.cfg.ensemble else [(0, 0)]:
            near = coord + coord.new_tensor(shift) / hw + nudge               # half a cell each way
            near = near.clamp(-1 + 1e-6, 1 - 1e-6)                            # (B, H, W, 2)
            offset = (coord - _nearest_centre(phi, near).movedim(1, -1)) * hw     # in [-2, 2]
            feature = nearest(around, near).movedim(1, -1)                    # (B, H, W, 9 * C)
            parts = [feature, offset] + [size] * self.cfg.cell_decode
            colours.append(self.mlp(torch.cat(parts, dim=-1)))                # (B, H, W, 3)
            areas.append(offset.prod(dim=-1, keepdim=True).abs() + 1e-9)      # (B, H, W, 1)

        # A feature counts by the rectangle between the query and the feature diagonally opposite.
        weighted = [c * (area / sum(areas)) for c, area in zip(colours, reversed(areas))]
        return sum(weighted).movedim(-1, 1)                                   # (B, 3, H, W)


# ---- Drawing ----

@dataclass(frozen=True)
class FrameNorm:
    """Normalise every tile of a picture by the same statistics, so that tiles fit together.

    Those of each GroupNorm are taken from one rendering of the whole plane at twice phi's height
    and width (at phi's own, 0.3 dB are lost): a colour depends on coordinate and pixel size alone.
    """

    moments: dict[nn.Module, Tensor]  # layer -> mean and 1 / std of each group, (B, 2, G, 1)

    @classmethod
    def of(cls, renderer: nn.Module, phi: Tensor) -> FrameNorm:
        """Take them for phi (B, C, h, w); gradients pass through them unless disabled."""
        h, w = phi.shape[-2:]
        coord = coord_grid((2 * h, 2 * w), device=phi.device)[None]           # (1, 2h, 2w, 2)
        cell = coord.new_tensor([[1 / h, 1 / w]])                             # (1, 2)
        taken: dict[nn.Module, list[Tensor]] = defaultdict(list)

        def record(layer: nn.GroupNorm, x: Tensor) -> Tensor:
            groups = x.float().reshape(1, layer.num_groups, -1)               # (1, G, C/G * 4hw)
            mean = groups.mean(dim=-1, keepdim=True)                          # (1, G, 1)
            var = (groups - mean).square().mean(dim=-1, keepdim=True)         # var_mean: 8x slower
            taken[layer].append(torch.stack([mean, (var + layer.eps).rsqrt()], dim=1))
            return normalised(layer, x, taken[layer][-1])

        for one in phi.split(1):                                              # bounds the memory
            renderer(one, coord, cell, record)
        return cls({layer: torch.cat(parts) for layer, parts in taken.items()})

    def __call__(self, layer: nn.GroupNorm, x: Tensor) -> Tensor:
        """Apply `layer` to x (B, C, H, W): a `Norm`."""
        return normalised(layer, x, self.moments[layer])


def normalised(layer: nn.GroupNorm, x: Tensor, moments: Tensor) -> Tensor:
    """What `layer` makes of x (B, C, H, W) by given mean and 1 / std of groups, (B, 2, G, 1)."""
    mean, rstd = moments.unbind(dim=1)                                        # (B, G, 1) each
    scale = rstd * layer.weight.view(layer.num_groups, -1)                    # (B, G, C/G)
    shift = layer.bias.view_as(scale[0]) - mean * scale                       # (B, G, C/G)
    return (x * scale.view(-1, x.shape[1], 1, 1)).add_(shift.view(-1, x.shape[1], 1, 1))


def _snap(pixels: float) -> float:
    """Make whole what is so to a thousandth of a pixel: few decimals are typed."""
    return float(round(pixels)) if abs(pixels - round(pixels)) < 1e-3 else pixels


def _span(centre: Tensor, step: float, own: float) -> tuple[int, float, float]:
    """What a bicubic enlargement to pixels at `centre` (n,), an axis, looks at: see `_enlarged`.

    (count, start, stop) of the pixels that it reads: of size `own`, which fill the plane, or those
    wanted, of size `step`, where these are no finer.
    """
    first = float(centre[0])
    last = float(centre[-1])
    if step >= own:
        return len(centre), max(first - step / 2, -1.0), min(last + step / 2, 1.0)
    start = max(math.floor((first + 1) / own - 0.5) - 1, 0)
    stop = min(math.floor((last + 1) / own - 0.5) + 3, round(2 / own))
    return stop - start, start * own - 1, min(stop * own - 1, 1.0)


@dataclass(eq=False)
class Field:
    """B pictures as functions of position: draw them at any resolution, aspect and window.

    A tile is one call renderer(phi, coord, cell, norm), so memory does not grow with the picture.
    By `FrameNorm` tiles, windows and the whole agree to rounding; `paper`: as published, each tile
    with 8 pixels around it is normalised by itself.
    """

    renderer: Callable[..., Tensor]   # CLIF or LIIF; by `replace` a compiled one
    phi: Tensor                       # (B, C, h, w)
    tile: int = 256                   # side of a tile in pixels; with paper, of a training patch
    paper: bool = False
    norm: Norm | None = None          # by default, this and halo follow from paper
    halo: int = 0                     # pixels drawn around a tile and cut off
    finest: int = 0                   # pixels a cell of phi; what is finer is enlarged; 0: drawn

    @torch.no_grad()
    def __post_init__(self):
        if self.tile < 1:
            raise ValueError(f"tile {self.tile}: must be at least 1 pixel")
        if self.norm is None:
            self.halo = max(8 * self.paper, self.renderer.reach)
            own = self.paper or self.halo == 0        # LIIF has no norms
            self.norm = own_statistics if own else FrameNorm.of(self.renderer, self.phi)

    def __len__(self) -> int:
        return len(self.phi)

    def __getitem__(self, i: int) -> Field:
        """One of the pictures, as a batch of one."""
        i = range(len(self))[i]                       # IndexError beyond the end
        norm = self.norm
        if isinstance(norm, FrameNorm):
            norm = FrameNorm({layer: both[i:i + 1] for layer, both in norm.moments.items()})
        return replace(self, phi=self.phi[i:i + 1], norm=norm)

    def tiles(self, res: int | tuple[int, int], window: Window | None = None) -> Tiles:
        """Draw tile by tile, row by row; res and window as in `check_frame`.

        Tiles carry a gradient where phi does, in which the statistics count as constant.
        """
        wanted = torch.is_grad_enabled() and self.phi.requires_grad
        (height, width), (y0, x0, y1, x1) = check_frame(res, window)
        pixel = ((y1 - y0) / height, (x1 - x0) / width)
        least = [2 / (n * self.finest) if self.finest else 0.0 for n in self.phi.shape[-2:]]
        if pixel[0] < least[0] or pixel[1] < least[1]:
            yield from self._enlarged((height, width), (y0, x0), pixel, least)
            return
        cell = torch.tensor([pixel] * len(self))                                      # (B, 2)
        cell = cell.to(self.phi.device)
        rows = self._cut(height, y0, y1)
        cols = self._cut(width, x0, x1)
        for (top, y, kept_y), (left, x, kept_x) in product(rows, cols):
            coord = torch.cartesian_prod(y.to(cell.device), x.to(cell.device))        # (h w, 2)
            coord = coord.view(len(y), len(x), 2).expand(len(self), -1, -1, -1)       # (B, h, w, 2)
            with torch.set_grad_enabled(wanted):
                rgb = self.renderer(self.phi, coord, cell, self.norm)         # (B, 3, h, w)
            yield top, left, rgb[..., kept_y, kept_x]

    def draw(self, res: int | tuple[int, int], window: Window | None = None) -> Tensor:
        """Whole pictures (B, 3, H, W), about [-1, 1] but not clamped; arguments as in `tiles`."""
        size, _ = check_frame(res, window)
        dtype = torch.promote_types(self.phi.dtype, torch.float32)
        pictures = torch.empty(len(self), 3, *size, dtype=dtype, device=self.phi.device)
        for y, x, rgb in self.tiles(size, window):
            pictures[..., y:y + rgb.shape[2], x:x + rgb.shape[3]] = rgb
        return pictures

    def _enlarged(self, size: tuple[int, int], corner: tuple[float, float],
                  pixel: tuple[float, float], least: Sequence[float]) -> Tiles:
        """Enlarge (bicubic) what is drawn by pixels no finer than `least` (y, x).

        Those are some of the pixels of that size that fill the plane, so that tiles and windows are
        slices of one picture here, too.
        """
        coarser = replace(self, finest=0)
        for corner_of_tile in product(*(range(0, n, self.tile) for n in size)):
            spans = []                                # of rows, of columns
            places = []                               # of the pixels wanted, in [-1, 1] of a span
            for n, first, lo, step, own in zip(size, corner_of_tile, corner, pixel, least):
                index = torch.arange(first, min(first + self.tile, n), dtype=torch.float64)
                centre = lo + (index + 0.5) * step
                count, start, stop = _span(centre, step, own)
                spans.append((count, start, stop))
                places.append(2 * (centre - start) / (stop - start) - 1)
            (rows, y0, y1), (cols, x0, x1) = spans
            drawn = coarser.draw((rows, cols), (y0, x0, y1, x1))              # (B, 3, rows, cols)
            y, x = torch.meshgrid(*places, indexing="ij")                     # (h, w) each
            place = torch.stack([x, y], dim=-1).to(drawn).expand(len(self), -1, -1, -1)
            yield *corner_of_tile, F.grid_sample(drawn, place, "bicubic", "border", False)

    def _cut(self, n: int, lo: float, hi: float) -> Iterator[tuple[int, Tensor, slice]]:
        """Cut n pixels over [lo, hi] into tiles: (first pixel, coordinates to draw, what stays).

        They are some of the pixels that fill the plane; a tile draws `halo` more of these around
        it. The last is moved back inside the plane, so that all have one size. paper: as published,
        counted from the plane's first pixel and cut off at its edge.
        """
        density = _snap(2 * n / (hi - lo))            # pixels across the plane, seldom a fraction
        offset = _snap((lo + 1) / 2 * density)        # from the plane's edge to the window's
        start = math.floor(offset + 0.5)
        stop = start + n
        shift = offset - start                        # of all pixels, in [-0.5, 0.5)
        size = math.ceil(density - shift - 0.5)

        even = 32 * math.ceil(n / math.ceil(n / self.tile) / 32)              # few sizes to compile
        step = self.tile if self.paper else min(even, self.tile)
        end = min(stop + self.halo, size)
        side = min(step + 2 * self.halo, end - max(start - self.halo, 0))

        for a in range(start // step * step if self.paper else start, stop, step):
            left = max(a - self.halo, 0)
            right = min(a + step + self.halo, size)
            if not self.paper:
                left = min(left, end - side)
                right = left + side
            first = max(a, start)
            drawn = _centres(torch.arange(left, right) + shift, density, -1.0, 1.0)
            yield first - start, drawn, slice(first - left, min(a + step, stop) - left)
