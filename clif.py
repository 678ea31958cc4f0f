"""CLIF: an image as a function of coordinates and pixel size, and how to draw it at any resolution.
Paper: Image Neural Field Diffusion Models (INFD), supplementary A (LIIF against CLIF), B and J.1.
Read next: autoencoder.py, which makes the feature field phi that is rendered here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

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
    """Check the size and place of a picture before it is drawn: ((H, W), window).

    res is a size in pixels, one number for a square or (H, W), of the rectangle `window` of the
    plane [-1, 1]^2 (default: all of it). Raises ValueError for an empty picture and for a window
    that is empty or leaves the plane.
    """
    height, width = (res, res) if isinstance(res, int) else res
    y0, x0, y1, x1 = WHOLE_PLANE if window is None else window
    if height < 1 or width < 1:
        raise ValueError(f"resolution {height}x{width}: both sides must be at least 1 pixel")
    if not (-1 <= y0 < y1 <= 1 and -1 <= x0 < x1 <= 1):
        raise ValueError(f"window {y0:g},{x0:g},{y1:g},{x1:g}: "
                         f"need -1 <= y0 < y1 <= 1 and -1 <= x0 < x1 <= 1")
    return (height, width), (y0, x0, y1, x1)


def coord_grid(shape: tuple[int, int], window: Window | None = None,
               device: torch.device | str | None = None) -> Tensor:
    """Pixel centres (H, W, 2) as (y, x), float32, of a picture of `shape` = (H, W) pixels.

    The picture fills `window` = (y0, x0, y1, x1) (default: the plane [-1, 1]^2).
    """
    y0, x0, y1, x1 = WHOLE_PLANE if window is None else window
    height, width = shape
    y = torch.arange(height, dtype=torch.float32, device=device)
    x = torch.arange(width, dtype=torch.float32, device=device)
    return _pairs(_centres(y, height, y0, y1), _centres(x, width, x0, x1))


def _centres(index: Tensor, n: float, lo: float, hi: float) -> Tensor:
    """Where the pixels `index` have their centres if n pixels fill [lo, hi]."""
    # A centre right between two features gets the one that float32 rounding leaves it nearer to,
    # so the operations and their order are the published ones. full_like: a GPU divides by a
    # Python number as it multiplies by 1 / n, which rounds differently.
    return lo + (hi - lo) * ((index + 0.5) / torch.full_like(index, n))


def _pairs(y: Tensor, x: Tensor) -> Tensor:
    """Coordinates along both axes, (H,) and (W,), as a grid (H, W, 2)."""
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


def nearest(features: Tensor, coord: Tensor) -> Tensor:
    """Look up the nearest feature vector for each coordinate.

    features (B, C, h, w), one vector per cell of the plane; coord (B, H, W, 2) as (y, x).
    Returns (B, C, H, W). A tie goes to the even cell, as in the published code; outside [-1, 1]
    the feature is zero.
    """
    return F.grid_sample(features, coord.flip(-1), mode="nearest",            # it wants (x, y)
                         padding_mode="zeros", align_corners=False)


def _nearest_centre(phi: Tensor, coord: Tensor) -> Tensor:
    """Where the feature that `nearest` finds for each coordinate lives: (B, 2, H, W) as (y, x)."""
    B, _, h, w = phi.shape
    centres = coord_grid((h, w), device=phi.device).movedim(-1, 0)            # (2, h, w)
    return nearest(centres.expand(B, 2, h, w), coord)                         # (B, 2, H, W)


# ---- Renderers ----

def own_statistics(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    """The ordinary GroupNorm: mean and variance are those of the tensor x (B, C, H, W) itself."""
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
        """x (B, c_in, H, W) -> (B, c_out, H, W); `norm` applies a GroupNorm layer to a tensor."""
        h = self.conv1(F.silu(norm(self.norm1, x)))                           # (B, c_out, H, W)
        h = self.conv2(F.silu(norm(self.norm2, h)))                           # (B, c_out, H, W)
        return self.nin_shortcut(x) + h


def query(phi: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
    """Build the input of CLIF for a grid of pixels (supplementary A).

    Per pixel: the nearest feature, where the pixel lies in that feature's cell, and how large the
    pixel is. phi (B, C, h, w); coord (B, H, W, 2), pixel centres as (y, x) in [-1, 1]; cell (B, 2),
    the pixel's height and width in the same units.
    Returns (B, C + 4, H, W): feature, offset (y, x) in [-1, 1], size (y, x) in half feature cells.
    """
    hw = coord.new_tensor(phi.shape[-2:]).view(1, 2, 1, 1)
    feature = nearest(phi, coord)                                             # (B, C, H, W)
    offset = (coord.movedim(-1, 1) - _nearest_centre(phi, coord)) * hw        # (B, 2, H, W)
    size = (cell[:, :, None, None] * hw).expand_as(offset)                    # (B, 2, H, W)
    return torch.cat([feature, offset, size], dim=1)                          # (B, C + 4, H, W)


@dataclass(frozen=True)
class CLIFConfig:
    """Architecture of CLIF; the defaults are the published renderer (supplementary J.1)."""

    in_channels: int = 128            # channels of phi: the decoder's base width (J.1)
    hidden: int = 256                 # width of the renderer, a multiple of groups (published code)
    num_blocks: int = 2               # residual blocks (J.1)
    groups: int = 32                  # of every GroupNorm (published code); with one channel a
                                      # group, levels are lost


class CLIF(nn.Module):
    """Convolutional Local Image Function, the renderer R(phi, c, s) of INFD (supplementary A).

    It turns a feature field phi into colours at any coordinates. LIIF colours each point alone with
    an MLP; CLIF runs a ConvNet over a grid of pixels, so that neighbours are drawn together.
    Supplementary J.1 lists convolution, two residual blocks, convolution; the published network,
    followed here, also has GroupNorm and SiLU before the last convolution.
    """

    def __init__(self, cfg: CLIFConfig):
        super().__init__()
        first = nn.Conv2d(cfg.in_channels + 4, cfg.hidden, 3, padding=1)
        blocks = [ResBlock(cfg.hidden, cfg.hidden, cfg.groups) for _ in range(cfg.num_blocks)]
        self.model = nn.ModuleList([first, *blocks])
        self.norm_out = nn.GroupNorm(cfg.groups, cfg.hidden, eps=1e-6)
        self.conv_out = nn.Conv2d(cfg.hidden, 3, 3, padding=1)
        # How many pixels far a pixel sees, one for each 3x3 kernel; and by how many the published
        # sampler widens a tile, which only networks deeper than the published ones outgrow.
        self.reach = 2 * cfg.num_blocks + 2
        self.halo = max(8, self.reach)

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial against the reconstruction loss."""
        return self.conv_out.weight

    def forward(self, phi: Tensor, coord: Tensor, cell: Tensor,
                norm: Norm = own_statistics) -> Tensor:
        """Colours (B, 3, H, W), about [-1, 1] but not clamped, of a grid of pixels.

        phi (B, C, h, w); coord (B, H, W, 2), pixel centres as (y, x) in [-1, 1]; cell (B, 2), the
        pixel size; `norm` applies a GroupNorm layer to a tensor.
        """
        first, *blocks = self.model
        x = query(phi, coord, cell)                                           # (B, C + 4, H, W)
        x = first(x)                                                          # (B, hidden, H, W)
        for block in blocks:
            x = block(x, norm)                                                # (B, hidden, H, W)
        return self.conv_out(F.silu(norm(self.norm_out, x)))                  # (B, 3, H, W)


@dataclass(frozen=True)
class LIIFConfig:
    """Architecture of LIIF; the three switches are its published ablations."""

    in_channels: int = 128            # channels of phi
    hidden: int = 256                 # width of the MLP (LIIF)
    depth: int = 4                    # hidden layers (LIIF)
    unfold: bool = True               # show the MLP the 3x3 neighbourhood of the nearest feature
    ensemble: bool = True             # blend the answers of the four nearest features by area
    cell_decode: bool = True          # tell the MLP the pixel size


class LIIF(nn.Module):
    """Local Implicit Image Function (Chen et al. 2021): supplementary A compares CLIF with it."""

    reach = 0                         # a pixel does not see its neighbours
    halo = 0

    def __init__(self, cfg: LIIFConfig):
        super().__init__()
        self.cfg = cfg
        self.k = 3 if cfg.unfold else 1
        c_in = cfg.in_channels * self.k**2 + 2 + 2 * cfg.cell_decode
        layers: list[nn.Module] = []
        for _ in range(cfg.depth):
            layers += [nn.Linear(c_in, cfg.hidden), nn.ReLU()]
            c_in = cfg.hidden
        self.mlp = nn.Sequential(*layers, nn.Linear(c_in, 3))

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial against the reconstruction loss."""
        return self.mlp[-1].weight

    def forward(self, phi: Tensor, coord: Tensor, cell: Tensor,
                norm: Norm = own_statistics) -> Tensor:
        """As `CLIF.forward`: phi (B, C, h, w), coord (B, H, W, 2), cell (B, 2) -> (B, 3, H, W).

        LIIF has no norms: `norm` is there so that both renderers are called alike.
        """
        B, C, h, w = phi.shape
        hw = coord.new_tensor([h, w])
        size = (cell * hw)[:, None, None].expand_as(coord)                    # (B, H, W, 2)

        # The first layer is linear in the unfolded features, so it is a convolution of phi. Taken
        # before the lookup it gives the same numbers without the (9C, h, w) unfolded map.
        first = self.mlp[0]
        split = C * self.k**2
        kernel = first.weight[:, :split].view(-1, C, self.k, self.k)
        mixed = F.conv2d(phi, kernel, first.bias, padding=self.k // 2)        # (B, hidden, h, w)

        colours = []
        areas = []
        nudge = 1e-6 if self.cfg.ensemble else 0.0                            # no ties (LIIF)
        for shift in product((-1, 1), repeat=2) if self.cfg.ensemble else [(0, 0)]:
            near = coord + coord.new_tensor(shift) / hw + nudge               # half a cell each way
            near = near.clamp(-1 + 1e-6, 1 - 1e-6)                            # (B, H, W, 2)
            offset = (coord - _nearest_centre(phi, near).movedim(1, -1)) * hw     # in [-2, 2]
            where = torch.cat([offset, size], dim=-1) if self.cfg.cell_decode else offset
            hidden = nearest(mixed, near).movedim(1, -1)                      # (B, H, W, hidden)
            hidden = hidden + F.linear(where, first.weight[:, split:])        # (B, H, W, hidden)
            colours.append(self.mlp[1:](hidden))                              # (B, H, W, 3)
            areas.append(offset.prod(dim=-1, keepdim=True).abs() + 1e-9)      # (B, H, W, 1)

        # A feature counts by the rectangle between the query and the feature diagonally opposite.
        total = sum(areas)
        weighted = [c * (area / total) for c, area in zip(colours, reversed(areas))]
        return sum(weighted).movedim(-1, 1)                                   # (B, 3, H, W)


# ---- Frame statistics ----

class FrameNorm:
    """Normalise every tile of a field by the same statistics, so that tiles fit together.

    GroupNorm is all that ties a tile to the rest of the picture. Its mean and variance are taken
    once per picture, from one rendering of the whole plane at twice phi's height and width, and
    serve every tile, window and resolution after that. So the picture is one function of coordinate
    and pixel size. Twice phi is twice the encoder's input; statistics of a smaller rendering, at
    the encoder's input, cost up to 0.3 dB. An instance is the `norm` of `CLIF.forward`. The
    published code takes the statistics of each tile instead (`own_statistics`).
    """

    def __init__(self, renderer: nn.Module, phi: Tensor, grad: bool = False):
        """phi (B, C, h, w). With grad, gradients also pass through the statistics."""
        self.frozen: dict[nn.Module, Tensor] = {}     # layer -> (B, 2, C, 1, 1): scale and shift
        if not any(isinstance(layer, nn.GroupNorm) for layer in renderer.modules()):
            return

        taken: dict[nn.Module, list[Tensor]] = {}

        def record(layer: nn.GroupNorm, x: Tensor) -> Tensor:
            frozen = _scale_and_shift(layer, x)                               # (1, 2, C, 1, 1)
            taken.setdefault(layer, []).append(frozen)
            return (x * frozen[:, 0]).add_(frozen[:, 1])

        h, w = phi.shape[-2:]
        coord = coord_grid((2 * h, 2 * w), device=phi.device)[None]           # (1, 2h, 2w, 2)
        cell = coord.new_tensor([[1 / h, 1 / w]])                             # (1, 2)
        with torch.set_grad_enabled(grad):
            for one in phi.split(1):                                          # bounds the memory
                renderer(one, coord, cell, record)                            # (1, 3, 2h, 2w)
            self.frozen = {layer: torch.cat(parts) for layer, parts in taken.items()}

    def __call__(self, layer: nn.GroupNorm, x: Tensor) -> Tensor:
        """Apply `layer` to x (B, C, H, W) with the statistics of the whole pictures."""
        scale, shift = self.frozen[layer].unbind(dim=1)                       # (B, C, 1, 1) each
        return (x * scale).add_(shift)                                        # (B, C, H, W)

    def __getitem__(self, index: slice) -> FrameNorm:
        """The statistics of some of the pictures."""
        part = FrameNorm.__new__(FrameNorm)
        part.frozen = {layer: both[index] for layer, both in self.frozen.items()}
        return part


def _scale_and_shift(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    """GroupNorm of x (B, C, H, W) as x * scale + shift, (B, 2, C, 1, 1)."""
    groups = x.float().reshape(len(x), layer.num_groups, -1)                  # (B, G, C/G * H * W)
    mean = groups.mean(dim=-1, keepdim=True)                                  # (B, G, 1)
    var = (groups - mean).square().mean(dim=-1, keepdim=True)                 # var_mean: 8x slower
    rstd = (var + layer.eps).rsqrt()                                          # (B, G, 1)

    width = layer.num_channels // layer.num_groups
    scale = rstd.repeat_interleave(width, dim=1) * layer.weight[:, None]      # (B, C, 1)
    shift = layer.bias[:, None] - mean.repeat_interleave(width, dim=1) * scale
    return torch.stack([scale, shift], dim=1)[..., None]                      # (B, 2, C, 1, 1)


# ---- Tiles ----

@dataclass(frozen=True)
class _Span:
    """A tile along one axis, in pixels of the frame: drawn from left to right, kept from a to b."""

    left: int
    right: int
    a: int
    b: int

    @property
    def kept(self) -> slice:
        """What is kept of the pixels drawn."""
        return slice(self.a - self.left, self.b - self.left)


@dataclass(frozen=True)
class _Axis:
    """A window along one axis, as part of a frame: the whole plane at the window's pixel size.

    Windows cut along the pixels of a picture share its frame, so that they equal its slices.
    """

    density: float                    # pixels across the plane, seldom a fraction
    shift: float                      # from the plane's edge to the edge of pixel 0, in pixels
    size: int                         # pixels of the frame: those whose centres lie on the plane
    start: int                        # the window is pixels start to stop - 1 of the frame
    stop: int

    @classmethod
    def of(cls, n: int, lo: float, hi: float) -> _Axis:
        """n pixels over [lo, hi]."""
        density = _snap(2 * n / (hi - lo))
        offset = _snap((lo + 1) / 2 * density)        # from the plane's edge to the window's
        start = math.floor(offset + 0.5)
        shift = offset - start                        # in [-0.5, 0.5)
        return cls(density, shift, math.ceil(density - shift - 0.5), start, start + n)

    def centres(self, span: _Span) -> Tensor:
        """Coordinates (n,) of the pixels drawn, float32 on the CPU: equal on every device."""
        index = torch.arange(span.left, span.right, dtype=torch.float32)
        return _centres(index + self.shift, self.density, -1.0, 1.0)

    def tiles(self, tile: int, halo: int) -> Iterator[_Span]:
        """Tiles of one size that cover the window and see `halo` pixels of the frame around it.

        A tile that would leave the frame is moved back inside, and what is new of it is kept.
        They keep up to `tile` pixels each, fewer where that takes no more of them.
        """
        lo = max(self.start - halo, 0)
        hi = min(self.stop + halo, self.size)
        inner = max(hi - lo - 2 * halo, 1)
        even = math.ceil(inner / math.ceil(inner / tile))
        even = min(tile, math.ceil(even / 32) * 32)   # few sizes: a compiled renderer has one shape
        side = min(even + 2 * halo, hi - lo)

        a = self.start
        while a < self.stop:
            left = min(max(a - halo, 0), hi - side)
            right = left + side
            b = self.stop if right == hi else right - halo
            yield _Span(left, right, a, b)
            a = b

    def published_tiles(self, tile: int, halo: int) -> Iterator[_Span]:
        """The published sampler's tiles: counted from the frame's first pixel, each with a halo.

        One that touches the window is drawn whole, because its statistics are its own.
        """
        for a in range(self.start // tile * tile, self.stop, tile):
            b = min(a + tile, self.size)
            left = max(a - halo, 0)
            right = min(b + halo, self.size)
            yield _Span(left, right, max(a, self.start), min(b, self.stop))


def _snap(pixels: float) -> float:
    """Make a number whole if it is so to a thousandth of a pixel: few decimals are typed."""
    return float(round(pixels)) if abs(pixels - round(pixels)) < 1e-3 else pixels


# ---- Drawing ----

@dataclass(eq=False)
class Field:
    """B pictures as functions of position: draw them at any resolution, aspect and window.

    Every tile is one call renderer(phi, coord, cell, norm) with coordinates made for it alone, so
    that memory does not grow with the picture. There are two rules for the norms' statistics:

    frame   (default) those of `FrameNorm`: tiles, windows and the whole picture agree to rounding,
            and a window costs its own pixels and a margin as wide as the receptive field.
    paper   those of each tile with its halo, as in the published sampler (256 px and 8 px), where
            training sees patches of that size. Each tile is normalised a little differently.

    replace(field, renderer=compiled) draws by a compiled renderer: by the rule `frame`, the tiles
    of a picture have one shape, and the statistics are inputs.
    Raises ValueError for an empty tile.
    """

    renderer: Callable[..., Tensor]   # CLIF or LIIF
    phi: Tensor                       # (B, C, h, w)
    tile: int = 256                   # side of a tile in pixels; with paper, of a training patch
    paper: bool = False
    norm: Norm | None = None          # default: by the rule
    halo: int | None = None           # pixels drawn around a tile and cut off; default: by the rule

    def __post_init__(self):
        if self.tile < 1:
            raise ValueError(f"tile {self.tile}: must be at least 1 pixel")
        if self.halo is None:
            self.halo = self.renderer.halo if self.paper else self.renderer.reach
        if self.norm is None:
            self.norm = own_statistics if self.paper else FrameNorm(self.renderer, self.phi)

    def __len__(self) -> int:
        return len(self.phi)

    def __getitem__(self, index: int | slice) -> Field:
        """Some of the pictures; an int keeps the batch dimension."""
        if isinstance(index, int):
            first = range(len(self))[index]           # negative ones too; IndexError beyond the end
            index = slice(first, first + 1)
        norm = self.norm[index] if isinstance(self.norm, FrameNorm) else self.norm
        return replace(self, phi=self.phi[index], norm=norm)

    def tiles(self, res: int | tuple[int, int], window: Window | None = None) -> Tiles:
        """Draw tile by tile, row by row: yields (y, x, rgb (B, 3, h, w)), y and x in pixels.

        res and window, and the ValueError they raise at the call, are those of `check_frame`.
        No gradients.
        """
        (height, width), (y0, x0, y1, x1) = check_frame(res, window)
        return self._tiles(_Axis.of(height, y0, y1), _Axis.of(width, x0, x1))

    @torch.no_grad()
    def _tiles(self, rows: _Axis, cols: _Axis) -> Tiles:
        cut = _Axis.published_tiles if self.paper else _Axis.tiles
        B = len(self)
        cell = self.phi.new_tensor([2 / rows.density, 2 / cols.density], dtype=torch.float32)
        cell = cell.expand(B, 2)                                              # (B, 2)
        for row, col in product(cut(rows, self.tile, self.halo), cut(cols, self.tile, self.halo)):
            y = rows.centres(row).to(cell.device)                             # (h,)
            x = cols.centres(col).to(cell.device)                             # (w,)
            coord = _pairs(y, x).expand(B, -1, -1, -1)                        # (B, h, w, 2)
            rgb = self.renderer(self.phi, coord, cell, self.norm)             # (B, 3, h, w)
            yield row.a - rows.start, col.a - cols.start, rgb[..., row.kept, col.kept]

    def draw(self, res: int | tuple[int, int], window: Window | None = None) -> Tensor:
        """Whole pictures (B, 3, H, W), about [-1, 1] but not clamped; arguments as in `tiles`."""
        (height, width), window = check_frame(res, window)
        pictures = torch.empty(len(self), 3, height, width, device=self.phi.device)
        for y, x, rgb in self.tiles((height, width), window):
            pictures[..., y:y + rgb.shape[2], x:x + rgb.shape[3]] = rgb
        return pictures
