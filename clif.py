"""CLIF: an image as a function of coordinates and pixel size, and how to draw it at any resolution, tile by tile.
Paper: Image Neural Field Diffusion Models (INFD), supplementary A (LIIF against CLIF), B and J.1 (architecture).
Read next: autoencoder.py, which makes the feature field phi that is rendered here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[nn.GroupNorm, Tensor], Tensor]
Window = tuple[float, float, float, float]                           # y0, x0, y1, x1 within [-1, 1]
WHOLE_PLANE: Window = (-1.0, -1.0, 1.0, 1.0)


# ---- Coordinates ----

def coord_grid(shape: tuple[int, int], window: Window | None = None,
               device: torch.device | str | None = None) -> Tensor:
    """Pixel centres (H, W, 2) as (y, x), float32, of an image of `shape` that fills `window` (default: the plane)."""
    y0, x0, y1, x1 = WHOLE_PLANE if window is None else window
    y, x = (torch.arange(n, dtype=torch.float32, device=device) for n in shape)
    return _pairs(_centres(y, shape[0], y0, y1), _centres(x, shape[1], x0, x1))


def _centres(index: Tensor, n: float, lo: float, hi: float) -> Tensor:
    """Where the pixels `index` have their centres if n of them fill [lo, hi]."""
    # A centre right between two features gets the one that float32 rounding leaves it nearer to, so the operations
    # and their order are the published ones. full_like: a GPU divides by a number as it multiplies by 1 / n, rounded.
    return lo + (hi - lo) * ((index + 0.5) / torch.full_like(index, n))


def _pairs(y: Tensor, x: Tensor) -> Tensor:
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)  # (H,), (W,) -> (H, W, 2)


def nearest(features: Tensor, coord: Tensor) -> Tensor:
    """The feature vector (B, C, H, W) of the cell of `features` (B, C, h, w) nearest to each coord (B, H, W, 2)."""
    # flip: grid_sample wants (x, y). A tie goes to the even cell, as in the published code; outside [-1, 1] is zero.
    return F.grid_sample(features, coord.flip(-1), mode="nearest", padding_mode="zeros", align_corners=False)


def _nearest_centre(phi: Tensor, coord: Tensor) -> Tensor:
    """Where the feature that `nearest` fetches for each coord lives: (B, 2, H, W) as (y, x)."""
    B, _, h, w = phi.shape
    return nearest(coord_grid((h, w), device=phi.device).movedim(-1, 0).expand(B, 2, h, w), coord)


# ---- Renderers ----

def own_statistics(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    """The ordinary GroupNorm: mean and variance of the tensor at hand, in INFD the tile being drawn."""
    return layer(x)


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))): the residual block of encoder, decoder and renderer."""

    def __init__(self, c_in: int, c_out: int, groups: int = 32):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)               # 1e-6 as in LDM; PyTorch's default is 1e-5
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def first_half(self, x: Tensor, norm: Norm = own_statistics) -> Tensor:
        return self.conv1(F.silu(norm(self.norm1, x)))               # (B, c_in, H, W) -> (B, c_out, H, W)

    def forward(self, x: Tensor, norm: Norm = own_statistics) -> Tensor:
        """x (B, c_in, H, W) -> (B, c_out, H, W); `norm` applies a GroupNorm layer to a tensor."""
        h = self.first_half(x, norm)
        h = self.conv2(F.silu(norm(self.norm2, h)))
        return self.nin_shortcut(x) + h


def query(phi: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
    """What CLIF is told about each pixel: the nearest feature, where the pixel lies in its cell, and how large it is.

    phi (B, C, h, w); coord (B, H, W, 2) as (y, x) in [-1, 1]; cell (B, 2), the pixel size in the same units.
    Returns (B, C + 4, H, W): feature, offset y and x in [-1, 1], size y and x in half feature cells.
    """
    hw = coord.new_tensor(phi.shape[-2:]).view(1, 2, 1, 1)
    offset = (coord.movedim(-1, 1) - _nearest_centre(phi, coord)) * hw        # (B, 2, H, W)
    size = (cell[:, :, None, None] * hw).expand_as(offset)                    # (B, 2, H, W)
    return torch.cat([nearest(phi, coord), offset, size], dim=1)              # (B, C + 4, H, W)


@dataclass(frozen=True)
class CLIFConfig:
    """Architecture of CLIF; the defaults are the published renderer (supplementary J.1)."""

    in_channels: int = 128            # channels of phi: the decoder's base width (supplementary J.1)
    hidden: int = 256                 # width of the renderer, a multiple of groups (published code)
    num_blocks: int = 2               # residual blocks (supplementary J.1)
    groups: int = 32                  # of every GroupNorm (published code); narrow networks want fewer, see README


class CLIF(nn.Module):
    """Convolutional Local Image Function, the renderer R(phi, c, s) of INFD.

    LIIF colours each point alone with an MLP; CLIF lets a ConvNet see the whole grid of queries.
    Supplementary J.1 lists convolution, two residual blocks, convolution; the published network, followed here, has
    GroupNorm and SiLU before the last convolution too.
    """

    def __init__(self, cfg: CLIFConfig):
        super().__init__()
        blocks = [ResBlock(cfg.hidden, cfg.hidden, cfg.groups) for _ in range(cfg.num_blocks)]
        self.model = nn.ModuleList([nn.Conv2d(cfg.in_channels + 4, cfg.hidden, 3, padding=1), *blocks])
        self.norm_out = nn.GroupNorm(cfg.groups, cfg.hidden, eps=1e-6)
        self.conv_out = nn.Conv2d(cfg.hidden, 3, 3, padding=1)
        # The published sampler extends tiles by 8 pixels. Two 3x3 convolutions per block and one at either end see
        # 6 pixels far, so 8 is enough; only networks deeper than the published ones need more.
        self.halo = max(8, 2 * cfg.num_blocks + 2)

    @property
    def norms(self) -> list[nn.GroupNorm]:
        """Every GroupNorm in the order of the forward pass."""
        return [norm for block in self.model[1:] for norm in (block.norm1, block.norm2)] + [self.norm_out]

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial against the reconstruction loss."""
        return self.conv_out.weight

    def trunk(self, phi: Tensor, coord: Tensor, cell: Tensor, norm: Norm, depth: int) -> Tensor:
        """The input (B, hidden, H, W) of `self.norms[depth]`, computing nothing beyond it."""
        x = self.model[0](query(phi, coord, cell))                   # (B, C + 4, H, W) -> (B, hidden, H, W)
        for block in self.model[1:1 + depth // 2]:
            x = block(x, norm)
        return self.model[1 + depth // 2].first_half(x, norm) if depth % 2 else x

    def forward(self, phi: Tensor, coord: Tensor, cell: Tensor, norm: Norm = own_statistics) -> Tensor:
        """Colours (B, 3, H, W), about [-1, 1] but not clamped, of a grid of queries.

        phi (B, C, h, w); coord (B, H, W, 2), pixel centres as (y, x) in [-1, 1]; cell (B, 2), pixel size; `norm`
        applies a GroupNorm layer to a tensor (see `render_tiles` for the one other than the default).
        """
        x = self.trunk(phi, coord, cell, norm, depth=2 * (len(self.model) - 1))
        return self.conv_out(F.silu(norm(self.norm_out, x)))         # (B, hidden, H, W) -> (B, 3, H, W)


@dataclass(frozen=True)
class LIIFConfig:
    """Architecture of LIIF; the three switches are its published ablations."""

    in_channels: int = 128            # channels of phi
    hidden: int = 256                 # width of the MLP (LIIF)
    depth: int = 4                    # hidden layers (LIIF)
    unfold: bool = True               # show the MLP the 3x3 neighbourhood of the nearest feature
    ensemble: bool = True             # blend the answers of the four surrounding features by area
    cell_decode: bool = True          # tell the MLP the pixel size


class LIIF(nn.Module):
    """Local Implicit Image Function (Chen et al. 2021), the renderer CLIF is compared with in supplementary A."""

    halo = 0                                                         # every query stands alone
    norms: tuple[nn.GroupNorm, ...] = ()

    def __init__(self, cfg: LIIFConfig):
        super().__init__()
        self.cfg = cfg
        self.k = 3 if cfg.unfold else 1
        layers: list[nn.Module] = []
        c_in = cfg.in_channels * self.k**2 + 2 + 2 * cfg.cell_decode
        for _ in range(cfg.depth):
            layers += [nn.Linear(c_in, cfg.hidden), nn.ReLU()]
            c_in = cfg.hidden
        self.mlp = nn.Sequential(*layers, nn.Linear(c_in, 3))

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial against the reconstruction loss."""
        return self.mlp[-1].weight

    def forward(self, phi: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
        """As `CLIF.forward`: phi (B, C, h, w), coord (B, H, W, 2), cell (B, 2) -> colours (B, 3, H, W)."""
        B, C, h, w = phi.shape
        hw = coord.new_tensor([h, w])
        # The first layer is linear in the unfolded features, that is a convolution of phi. Taking it before the
        # lookup gives the same numbers as LIIF and never builds the (9C, h, w) unfolded map.
        first = self.mlp[0]
        split = C * self.k**2
        kernel = first.weight[:, :split].view(-1, C, self.k, self.k)
        mixed = F.conv2d(phi, kernel, first.bias, padding=self.k // 2)        # (B, hidden, h, w)
        size = (cell * hw)[:, None, None].expand_as(coord)                    # (B, H, W, 2)

        shifts = list(product((-1, 1), repeat=2)) if self.cfg.ensemble else [(0, 0)]
        nudge = 1e-6 if self.cfg.ensemble else 0.0                            # away from ties (LIIF)
        colours, areas = [], []
        for shift in shifts:                                                  # half a feature cell each way
            near = (coord + coord.new_tensor(shift) / hw + nudge).clamp(-1 + 1e-6, 1 - 1e-6)
            offset = (coord - _nearest_centre(phi, near).movedim(1, -1)) * hw             # (B, H, W, 2), in [-2, 2]
            where = torch.cat([offset, size], dim=-1) if self.cfg.cell_decode else offset
            hidden = nearest(mixed, near).movedim(1, -1) + F.linear(where, first.weight[:, split:])
            colours.append(self.mlp[1:](hidden))                              # (B, H, W, hidden) -> (B, H, W, 3)
            areas.append(offset.prod(dim=-1, keepdim=True).abs() + 1e-9)      # (B, H, W, 1)
        # A feature counts by the rectangle between the query and the feature diagonally opposite.
        total = sum(areas)
        blend = sum(colour * (area / total) for colour, area in zip(colours, reversed(areas)))
        return blend.movedim(-1, 1)                                           # (B, H, W, 3) -> (B, 3, H, W)


# ---- Drawing a field tile by tile ----

@dataclass(frozen=True)
class _Span:
    """A tile along one axis."""

    centres: Tensor                   # coordinates (h,) of its pixels and of the halo
    cell: float                       # pixel size
    crop: slice                       # what remains without the halo and what lies outside the window
    place: int                        # where that goes in the window


@dataclass(frozen=True)
class _Axis:
    """The row of pixels that frame, tiles and window share along one axis; the frame is the plane at that density."""

    density: float                    # pixels across the plane, seldom a fraction
    shift: float                      # of the row against the plane's edge, in pixels, in [-0.5, 0.5)
    size: int                         # pixels of the frame: those whose centres lie on the plane
    start: int                        # the window is pixels start to stop - 1 of the frame
    stop: int

    @classmethod
    def of(cls, n: int, lo: float, hi: float) -> _Axis:
        """n pixels over [lo, hi]. A window cut along the pixels of a frame gets exactly that frame's coordinates."""
        density = _snap(2 * n / (hi - lo))
        offset = _snap((lo + 1) / 2 * density)                       # from the plane's edge to the window's
        start = math.floor(offset + 0.5)
        shift = offset - start
        return cls(density, shift, math.ceil(density - shift - 0.5), start, start + n)

    def frame(self) -> _Axis:
        """The same row of pixels with a window that is all of it."""
        return replace(self, start=0, stop=self.size)

    def tiles(self, tile: int, halo: int, device: torch.device) -> Iterator[_Span]:
        """The tiles that touch the window. They are counted from the frame's first pixel, not the window's."""
        for a in range(self.start // tile * tile, self.stop, tile):
            b = min(a + tile, self.size)
            left, right = max(a - halo, 0), min(b + halo, self.size)
            index = torch.arange(left, right, dtype=torch.float32, device=device)
            a, b = max(a, self.start), min(b, self.stop)
            yield _Span(_centres(index + self.shift, self.density, -1.0, 1.0), 2 / self.density,
                        slice(a - left, b - left), a - self.start)


def _snap(pixels: float) -> float:
    """Make a number whole if it is so to a thousandth of a pixel: windows are often written with few decimals."""
    return float(round(pixels)) if abs(pixels - round(pixels)) < 1e-3 else pixels


def _queries(phi: Tensor, row: _Span, col: _Span) -> tuple[Tensor, Tensor]:
    """coord (B, H, W, 2) and cell (B, 2) of one tile with its halo."""
    coord = _pairs(row.centres, col.centres)                         # (H, W, 2)
    cell = coord.new_tensor([row.cell, col.cell])                    # (2,)
    return coord.expand(len(phi), -1, -1, -1), cell.expand(len(phi), 2)


Moments = tuple[int, Tensor, Tensor]                                 # count, mean, variance


def _pool(a: Moments, b: Moments) -> Moments:
    """Moments of two sets of numbers taken together, without the cancellation in E[x^2] - E[x]^2."""
    share, delta = b[0] / (a[0] + b[0]), b[1] - a[1]
    return a[0] + b[0], a[1] + share * delta, (1 - share) * a[2] + share * b[2] + share * (1 - share) * delta**2


def _frame_norm(renderer: CLIF, phi: Tensor, rows: _Axis, cols: _Axis, tile: int) -> Norm:
    """A norm with the GroupNorm statistics of the whole frame, gathered layer by layer over tiles and then frozen.

    Each layer is measured with all layers before it frozen, so it sees what it would see in an undivided frame.
    """
    frozen: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
        mean, scale = frozen[layer]                                  # (B, C, 1, 1) each
        return ((x - mean) * scale + layer.bias[:, None, None]).to(x.dtype)

    def measure(depth: int, layer: nn.GroupNorm, row: _Span, col: _Span) -> Moments:
        x = renderer.trunk(phi, *_queries(phi, row, col), norm, depth)
        x = x[..., row.crop, col.crop].float().unflatten(1, (layer.num_groups, -1))       # (B, G, C / G, h, w)
        mean = x.mean(dim=(2, 3, 4), keepdim=True)
        var = (x - mean).square().mean(dim=(2, 3, 4))                # (B, G); var_mean is 8 times slower on a CPU
        return x[0, 0].numel(), mean[:, :, 0, 0, 0].cpu().double(), var.cpu().double()    # cpu: MPS has no float64

    for depth, layer in enumerate(renderer.norms):
        tiles = product(rows.frame().tiles(tile, renderer.halo, phi.device),
                        cols.frame().tiles(tile, renderer.halo, phi.device))
        _, mean, var = reduce(_pool, (measure(depth, layer, row, col) for row, col in tiles))
        mean, scale = (v.repeat_interleave(layer.num_channels // layer.num_groups, dim=1)[..., None, None]
                       .to(layer.weight) for v in (mean, (var + layer.eps).rsqrt()))      # (B, C, 1, 1) each
        frozen[layer] = mean, scale * layer.weight[:, None, None]
    return norm


@torch.no_grad()
def _draw(renderer: CLIF | LIIF, phi: Tensor, rows: _Axis, cols: _Axis, tile: int,
          norm: str) -> Iterator[tuple[int, int, Tensor]]:
    draw = renderer
    if norm == "global" and renderer.norms:
        draw = partial(renderer, norm=_frame_norm(renderer, phi, rows, cols, tile))
    for row, col in product(rows.tiles(tile, renderer.halo, phi.device), cols.tiles(tile, renderer.halo, phi.device)):
        rgb = draw(phi, *_queries(phi, row, col))                    # (B, 3, tile + halos, tile + halos)
        yield row.place, col.place, rgb[..., row.crop, col.crop]


def render_tiles(renderer: CLIF | LIIF, phi: Tensor, res: int | tuple[int, int], window: Window | None = None,
                 tile: int = 256, norm: str = "paper") -> Iterator[tuple[int, int, Tensor]]:
    """Draw the field phi (B, C, h, w) tile by tile, row by row: yields (y, x, rgb (B, 3, h, w)), y and x in pixels.

    `res` is the size in pixels, int or (H, W), of `window` = (y0, x0, y1, x1), a rectangle of the plane [-1, 1]^2
    (default: all of it). Tiles are drawn with a halo that is cropped off; memory does not grow with `res`.
    CLIF's GroupNorms make every pixel depend on all others, so tiles need a rule for the statistics:

    paper    those of each tile with its halo. The published sampler does so (256 px tiles, 8 px halo), and training
             sees 256 px patches; each tile is normalised a little differently from its neighbours.
    global   those of the whole frame: tile size then changes nothing but rounding. Takes one partial forward pass
             over the frame per GroupNorm, about 4 times the cost of "paper" in all.

    The frame is the whole plane at the window's pixel density, also for a window: tiles lie on the frame's lattice and
    statistics are the frame's, so that a window equals the slice of the full picture. In global mode a window hence
    costs the passes over the whole frame at that density, which rules out deep zooms.
    Raises ValueError for an empty resolution, a window that is empty or leaves the plane, a bad tile or norm.
    """
    height, width = (res, res) if isinstance(res, int) else res
    y0, x0, y1, x1 = WHOLE_PLANE if window is None else window
    if height < 1 or width < 1:
        raise ValueError(f"resolution {height}x{width}: both sides must be at least 1 pixel")
    if not (-1 <= y0 < y1 <= 1 and -1 <= x0 < x1 <= 1):
        raise ValueError(f"window {y0:g},{x0:g},{y1:g},{x1:g}: need -1 <= y0 < y1 <= 1 and -1 <= x0 < x1 <= 1")
    if tile < 1:
        raise ValueError(f"tile {tile}: must be at least 1 pixel")
    if norm not in ("paper", "global"):
        raise ValueError(f"norm {norm!r}: choose paper or global")
    return _draw(renderer, phi, _Axis.of(height, y0, y1), _Axis.of(width, x0, x1), tile, norm)


def render(renderer: CLIF | LIIF, phi: Tensor, res: int | tuple[int, int], window: Window | None = None,
           tile: int = 256, norm: str = "paper") -> Tensor:
    """The whole picture (B, 3, H, W); arguments and errors as in `render_tiles`."""
    tiles = render_tiles(renderer, phi, res, window, tile, norm)
    height, width = (res, res) if isinstance(res, int) else res
    image = torch.empty(len(phi), 3, height, width, device=phi.device)
    for y, x, rgb in tiles:
        image[..., y:y + rgb.shape[-2], x:x + rgb.shape[-1]] = rgb
    return image
