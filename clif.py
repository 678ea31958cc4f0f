"""CLIF: an image as a function of coordinates and pixel size, and how to draw it at any resolution, tile by tile.
Paper: Image Neural Field Diffusion Models (INFD), supplementary A (LIIF against CLIF), B and J.1 (architecture).
Read next: autoencoder.py, which makes the feature field phi that is rendered here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[nn.GroupNorm, Tensor], Tensor]
Window = tuple[float, float, float, float]                           # y0, x0, y1, x1 within [-1, 1]
WHOLE_PLANE: Window = (-1.0, -1.0, 1.0, 1.0)
Tiles = Iterator[tuple[int, int, Tensor]]                            # (y, x, rgb (B, 3, h, w)), see render_tiles


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

    def forward(self, x: Tensor, norm: Norm = own_statistics) -> Tensor:
        """x (B, c_in, H, W) -> (B, c_out, H, W); `norm` applies a GroupNorm layer to a tensor."""
        h = self.conv1(F.silu(norm(self.norm1, x)))
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
    def layers(self) -> list[tuple[nn.GroupNorm, nn.Conv2d]]:
        """Every GroupNorm with the convolution that follows it, in the order of the forward pass."""
        blocks = [pair for b in self.model[1:] for pair in ((b.norm1, b.conv1), (b.norm2, b.conv2))]
        return [*blocks, (self.norm_out, self.conv_out)]

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial against the reconstruction loss."""
        return self.conv_out.weight

    def forward(self, phi: Tensor, coord: Tensor, cell: Tensor, norm: Norm = own_statistics) -> Tensor:
        """Colours (B, 3, H, W), about [-1, 1] but not clamped, of a grid of queries.

        phi (B, C, h, w); coord (B, H, W, 2), pixel centres as (y, x) in [-1, 1]; cell (B, 2), pixel size; `norm`
        applies a GroupNorm layer to a tensor.
        """
        x = self.model[0](query(phi, coord, cell))                            # (B, C + 4, H, W) -> (B, hidden, H, W)
        return self.conv_out(self.trunk(x, norm))

    def trunk(self, x: Tensor, norm: Norm = own_statistics) -> Tensor:
        """All between the first and the last convolution: (B, hidden, H, W) -> (B, hidden, H, W)."""
        for block in self.model[1:]:
            x = block(x, norm)
        return F.silu(norm(self.norm_out, x))


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


# ---- Tiles ----

@dataclass(frozen=True)
class _Span:
    """A tile along one axis: the pixels it draws and a halo."""

    centres: Tensor                   # coordinates (n,) of the pixels, float32 on the CPU
    inside: Tensor                    # (n,): 1 for pixels of the frame, 0 for those that fill a tile of fixed shape up
    cell: float                       # pixel size
    reach: slice                      # which pixels of the frame these are
    crop: slice                       # what remains without the halo and what lies outside the window
    place: int                        # where that goes in the window


@dataclass(frozen=True)
class _Axis:
    """The row of pixels that frame, tiles and window share along one axis; the frame is the plane at that density."""

    density: float                    # pixels across the plane, seldom a fraction
    shift: float                      # of the row against the plane's edge, in pixels
    size: int                         # pixels of the frame: those whose centres lie on the plane
    start: int                        # the window is pixels start to stop - 1 of the frame
    stop: int

    @classmethod
    def of(cls, n: int, lo: float, hi: float) -> _Axis:
        """n pixels over [lo, hi]. A window cut along the pixels of a frame gets exactly that frame's coordinates."""
        density = _snap(2 * n / (hi - lo))
        offset = _snap((lo + 1) / 2 * density)                       # from the plane's edge to the window's
        start = math.floor(offset + 0.5)
        shift = offset - start                                       # in [-0.5, 0.5)
        return cls(density, shift, math.ceil(density - shift - 0.5), start, start + n)

    def frame(self) -> _Axis:
        """The same row of pixels with a window that is all of it."""
        return replace(self, start=0, stop=self.size)

    def part(self, span: _Span) -> _Axis:
        """A tile and its halo as a frame of its own; the window is what the tile draws."""
        return replace(self, shift=self.shift + span.reach.start, size=span.reach.stop - span.reach.start,
                       start=span.crop.start, stop=span.crop.stop)

    def tiles(self, tile: int, halo: int, fixed: bool) -> Iterator[_Span]:
        """The tiles that touch the window. They are counted from the frame's first pixel, not the window's.

        fixed fills every tile up to tile + 2 halo pixels, which `inside` tells from the frame's.
        """
        for a in range(self.start // tile * tile, self.stop, tile):
            b = min(a + tile, self.size)
            left, right = max(a - halo, 0), min(b + halo, self.size)
            index = torch.arange(left, left + tile + 2 * halo if fixed else right, dtype=torch.float32)
            centres = _centres(index.clamp(max=right - 1) + self.shift, self.density, -1.0, 1.0)
            a, b = max(a, self.start), min(b, self.stop)
            yield _Span(centres, (index < right).float(), 2 / self.density, slice(left, right),
                        slice(a - left, b - left), a - self.start)


def _snap(pixels: float) -> float:
    """Make a number whole if it is so to a thousandth of a pixel: windows are often written with few decimals."""
    return float(round(pixels)) if abs(pixels - round(pixels)) < 1e-3 else pixels


# ---- A tile is a grid: CLIF for less ----
# `CLIF.forward` takes any coordinates. Those of a tile form a grid, so the nearest feature is a row and a column of
# phi; of the four channels beside the feature two are constant, and two vary along one axis only.

def _axis_query(span: _Span, n: int) -> tuple[Tensor, Tensor]:
    """`query` along an axis of n features: the nearest feature's index (P,); and (3, P), inside, offset and size.

    Offset and size are 0 where `inside` is. All on the CPU: ties then fall alike on every device.
    """
    ramp = torch.arange(n, dtype=torch.float32)
    xy = torch.stack([span.centres, torch.zeros_like(span.centres)], dim=-1)              # (P, 2)
    # Asked of grid_sample as in `nearest`, so that ties agree; border: no rounding leads off the plane.
    index = F.grid_sample(ramp[None, None, None], xy[None, None], "nearest", "border", align_corners=False)
    index = index[0, 0, 0].long()                                    # (P,)
    offset = (span.centres - _centres(ramp, n, -1.0, 1.0)[index]) * n
    return index, torch.stack([span.inside, offset * span.inside, span.inside * span.cell * n])


def _tile_query(phi: Tensor, row: _Span, col: _Span) -> tuple[Tensor, Tensor, Tensor]:
    """What `query` tells of a tile, in parts: features (B, C, H, W), down (3, H) and across (3, W)."""
    (iy, down), (ix, across) = _axis_query(row, phi.shape[2]), _axis_query(col, phi.shape[3])
    top, bottom = int(iy[0]), int(iy[-1]) + 1
    features = phi[:, :, top:bottom].index_select(3, ix.to(phi.device))                   # (B, C, few, W)
    features = features.index_select(2, (iy - top).to(phi.device))                        # last: it copies whole rows
    return features, down.to(phi), across.to(phi)


def _first_conv(weight: Tensor, bias: Tensor, features: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """The first convolution of what `query` returns: (B, C, H, W), (3, H), (3, W) -> (B, hidden, H, W).

    A channel that varies along one axis only is convolved along that axis; along the other its kernel is summed over
    the taps inside the frame. Both sizes and offsets together are six outer products of a column and a row.
    """
    B, C = features.shape[:2]
    x = F.conv2d(features, weight[:, :C], bias, padding=1)
    down, across = (F.pad(v, (1, 1)).unfold(1, 3, 1) for v in (down, across))             # (3, H, 3), (3, W, 3): taps
    vary_down = torch.einsum("ocij,chi->ohj", weight[:, C::2], down[1:])                  # (hidden, H, 3)
    vary_across = torch.einsum("ocij,cwj->oiw", weight[:, C + 1::2], across[1:])          # (hidden, 3, W)
    columns = torch.cat([vary_down, down[0].expand_as(vary_down)], dim=2).repeat(B, 1, 1).to(x.dtype)
    rows = torch.cat([across[0].mT.expand_as(vary_across), vary_across], dim=1).repeat(B, 1, 1).to(x.dtype)
    return x.flatten(0, 1).baddbmm_(columns, rows).view(x.shape)     # in place: a pass over x costs as much as this


def _inside_statistics(mask: Tensor, layer: nn.GroupNorm, x: Tensor) -> Tensor:
    """`own_statistics` of the pixels where mask (H, W) is 1, and 0 elsewhere: the padding of the next convolution."""
    g = x.unflatten(1, (layer.num_groups, -1)).float()               # (B, G, C / G, H, W)
    count = mask.sum() * g.shape[2]
    mean = (g * mask).sum(dim=(2, 3, 4), keepdim=True) / count
    g = (g - mean) * mask
    g = g * (g.square().sum(dim=(2, 3, 4), keepdim=True) / count + layer.eps).rsqrt()
    return ((g.flatten(1, 2) * layer.weight[:, None, None] + layer.bias[:, None, None]) * mask).to(x.dtype)


def _whole_tile(renderer: CLIF, features: Tensor, down: Tensor, across: Tensor, fixed: bool) -> Tensor:
    """`CLIF.forward` from `_tile_query`. fixed: the tile is filled up, and what fills it must count for nothing."""
    norm = own_statistics
    if fixed:
        mask = down[0, :, None] * across[0]                          # (H, W)
        features, norm = features * mask, partial(_inside_statistics, mask)
    first = renderer.model[0]
    x = _first_conv(first.weight, first.bias, features, down, across)
    return renderer.conv_out(renderer.trunk(x, norm))


# ---- A frame in pieces, with the statistics of the whole ----

@dataclass(frozen=True)
class Means:
    """What drawing may use: time and memory. The picture changes by rounding alone."""

    piece: int | None = None          # side in pixels of what is computed at once, a halo apart (default: the tile)
    keep: int = 2 * 2**30             # bytes of activations that may be kept from layer to layer for norm="global"
    compile: Callable | None = None   # torch.compile or the like; everything compiled then has one fixed shape


def _frozen_layer(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """conv(act(norm(x))) with given statistics: scale and shift (B, C, 1, 1)."""
    x = (x * scale).add_(shift)
    x = F.silu(x if mask is None else x.mul_(mask), inplace=True)    # zeros beyond the frame, as a convolution pads
    return F.conv2d(x, weight, bias, padding=1)


def _moments(x: Tensor, groups: int, out: Tensor) -> int:
    """Mean and variance of each group of channels, x (B, C, H, W) into `out` (2, B, G); returns H * W * C / G."""
    x = x.reshape(len(x), groups, -1).float()
    mean = x.mean(dim=-1, keepdim=True)
    out[0], out[1] = mean[..., 0], (x - mean).square().mean(dim=-1)       # var_mean is 8 times slower on a CPU
    return x.shape[-1]


def _freeze(layer: nn.GroupNorm, counts: list[int], moments: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift (B, C, 1, 1) that normalise like `layer`, from the moments (N, 2, B, G) of a frame in pieces."""
    n = torch.tensor(counts, dtype=torch.float64)[:, None, None]
    mean, var = moments.cpu().double().unbind(dim=1)                 # cpu: MPS has no float64
    share, centre = n / n.sum(), (n * mean).sum(dim=0) / n.sum()
    var = (share * (var + (mean - centre) ** 2)).sum(dim=0)          # no cancellation as in E[x^2] - E[x]^2
    rstd, centre = (v.repeat_interleave(layer.num_channels // layer.num_groups, dim=1)
                    for v in ((var + layer.eps).rsqrt(), centre))    # (B, C)
    scale = rstd * layer.weight.cpu().double()
    shift = layer.bias.cpu().double() - centre * scale
    return tuple(v[..., None, None].to(layer.weight) for v in (scale, shift))


class _Frame:
    """Draws a frame with the GroupNorm statistics of all its pixels.

    Layer by layer: the statistics of a layer's input are gathered over all pieces, then frozen, and the next layer sees
    what it would see in an undivided frame. Where `means.keep` allows, the activations of the frame are kept from one
    layer to the next, and each is computed once. Otherwise every piece starts from phi again at each of them.
    """

    def __init__(self, renderer: CLIF, phi: Tensor, rows: _Axis, cols: _Axis, piece: int, means: Means):
        self.layers, self.first = renderer.layers, renderer.model[0]
        self.phi, self.rows, self.cols, self.piece = phi, rows, cols, piece
        self.fixed, compile = means.compile is not None, means.compile or (lambda function: function)
        self.first_conv, self.frozen_layer = compile(_first_conv), compile(_frozen_layer)
        self.frozen: list[tuple[Tensor, Tensor]] = []                # of the norms so far
        # Two maps: the residual stream, which the norms of even number read, and the inside of a block.
        shape = (2, len(phi), self.first.out_channels, rows.size, cols.size)
        self.kept = phi.new_empty(shape) if math.prod(shape) * phi.element_size() <= means.keep else None
        self.halo = 1 if self.kept is not None else renderer.halo

    def spans(self, rows: _Axis, cols: _Axis) -> Iterator[tuple[_Span, _Span]]:
        return product(*(axis.tiles(self.piece, self.halo, self.fixed) for axis in (rows, cols)))

    def start(self, row: _Span, col: _Span) -> Tensor:
        """The first convolution."""
        features, down, across = _tile_query(self.phi, row, col)
        if self.fixed:
            features = features * (down[0, :, None] * across[0])
        return self.first_conv(self.first.weight, self.first.bias, features, down, across)

    def run(self, k: int, x: Tensor, row: _Span, col: _Span) -> Tensor:
        """Norm k, whose statistics are frozen, activation and convolution."""
        mask = (row.inside[:, None] * col.inside).to(x) if self.fixed else None
        conv = self.layers[k][1]
        return self.frozen_layer(x, *self.frozen[k], conv.weight, conv.bias, mask)

    def input(self, k: int, row: _Span, col: _Span) -> Tensor:
        """What norm k sees in a piece and its halo."""
        if self.kept is not None:
            x = self.kept[k % 2][..., row.reach, col.reach]
            return F.pad(x, (0, len(col.inside) - x.shape[3], 0, len(row.inside) - x.shape[2])) if self.fixed else x
        x = h = self.start(row, col)
        for j in range(k):
            h = self.run(j, h, row, col)
            if j % 2:
                h = x = x + h
        return h

    def advance(self, k: int, row: _Span, col: _Span) -> Tensor:
        """The input of norm k in a piece without halo; kept, if it may be."""
        if self.kept is None:
            return self.input(k, row, col)[..., row.crop, col.crop]
        x = self.run(k - 1, self.input(k - 1, row, col), row, col) if k else self.start(row, col)
        x = x[..., row.crop, col.crop]
        place = self.kept[k % 2][..., row.place:row.place + x.shape[2], col.place:col.place + x.shape[3]]
        return place.add_(x) if k and k % 2 == 0 else place.copy_(x)          # every second layer is a block's second

    def tiles(self) -> Tiles:
        """The window, as `render_tiles` yields it."""
        for k, (norm, _) in enumerate(self.layers):
            spans = list(self.spans(self.rows.frame(), self.cols.frame()))
            # One array: a small tensor per piece would pin a hole in the heap each, gigabytes in a large frame.
            moments = self.phi.new_empty(len(spans), 2, len(self.phi), norm.num_groups, dtype=torch.float32)
            counts = [_moments(self.advance(k, row, col), norm.num_groups, out)
                      for (row, col), out in zip(spans, moments)]
            self.frozen.append(_freeze(norm, counts, moments))
        last = len(self.layers) - 1
        for row, col in self.spans(self.rows, self.cols):
            rgb = self.run(last, self.input(last, row, col), row, col)
            yield row.place, col.place, rgb[..., row.crop, col.crop]


# ---- Drawing ----

def _queries(phi: Tensor, row: _Span, col: _Span) -> tuple[Tensor, Tensor]:
    """coord (B, H, W, 2) and cell (B, 2) of one tile with its halo."""
    coord = _pairs(row.centres, col.centres).to(phi.device)          # (H, W, 2)
    cell = coord.new_tensor([row.cell, col.cell])                    # (2,)
    return coord.expand(len(phi), -1, -1, -1), cell.expand(len(phi), 2)


def _paste(tiles: Tiles, shape: tuple[int, ...], device: torch.device) -> Tensor:
    image = torch.empty(shape, device=device)                        # (B, 3, H, W)
    for y, x, rgb in tiles:
        image[..., y:y + rgb.shape[-2], x:x + rgb.shape[-1]] = rgb
    return image


def _plain_tiles(renderer: nn.Module, phi: Tensor, rows: _Axis, cols: _Axis, tile: int) -> Tiles:
    """Tiles of a renderer without norms."""
    for row, col in product(*(axis.tiles(tile, renderer.halo, fixed=False) for axis in (rows, cols))):
        rgb = renderer(phi, *_queries(phi, row, col))                # (B, 3, tile + halos, tile + halos)
        yield row.place, col.place, rgb[..., row.crop, col.crop]


def _paper_tiles(renderer: CLIF, phi: Tensor, rows: _Axis, cols: _Axis, tile: int, means: Means) -> Tiles:
    """Tiles with their own statistics. One that is drawn in pieces is a frame of its own."""
    fixed = means.compile is not None
    whole_tile = means.compile(_whole_tile) if fixed else _whole_tile
    for row, col in product(*(axis.tiles(tile, renderer.halo, fixed) for axis in (rows, cols))):
        if means.piece is None or means.piece >= tile:
            rgb = whole_tile(renderer, *_tile_query(phi, row, col), fixed)[..., row.crop, col.crop]
        else:
            shape = (len(phi), 3, row.crop.stop - row.crop.start, col.crop.stop - col.crop.start)
            pieces = _Frame(renderer, phi, rows.part(row), cols.part(col), means.piece, means).tiles()
            rgb = _paste(pieces, shape, phi.device)
        yield row.place, col.place, rgb


@torch.no_grad()
def _draw(renderer: CLIF | LIIF, phi: Tensor, rows: _Axis, cols: _Axis, tile: int, norm: str, means: Means) -> Tiles:
    piece = min(means.piece or tile, tile)
    if not isinstance(renderer, CLIF):
        yield from _plain_tiles(renderer, phi, rows, cols, piece)
    elif norm == "paper":
        yield from _paper_tiles(renderer, phi, rows, cols, tile, means)
    else:
        yield from _Frame(renderer, phi, rows, cols, piece, means).tiles()


def render_tiles(renderer: CLIF | LIIF, phi: Tensor, res: int | tuple[int, int], window: Window | None = None,
                 tile: int = 256, norm: str = "paper", means: Means = Means(), first: int = 0) -> Tiles:
    """Draw the field phi (B, C, h, w) tile by tile, row by row: yields (y, x, rgb (B, 3, h, w)), y and x in pixels.

    `res` is the size in pixels, int or (H, W), of `window` = (y0, x0, y1, x1), a rectangle of the plane [-1, 1]^2
    (default: all of it). Tiles are drawn with a halo that is cropped off; beyond `means.keep` bytes memory does not
    grow with `res`.
    CLIF's GroupNorms make every pixel depend on all others, so tiles need a rule for the statistics:

    paper    those of each tile with its halo. The published sampler does so (256 px tiles, 8 px halo), and training
             sees 256 px patches; each tile is normalised a little differently from its neighbours.
    global   those of the whole frame: tile size then changes nothing but rounding. Costs about as much as "paper" while
             two maps of the frame's activations fit into `means.keep` bytes, and about 4 times as much beyond.

    The frame is the whole plane at the window's pixel density, also for a window: tiles lie on the frame's lattice and
    statistics are the frame's, so that a window equals the slice of the full picture. In global mode a window hence
    costs the passes over the whole frame at that density, which rules out deep zooms.
    `means` bounds time and memory, see there. `first` leaves out the rows of the window above it; y counts from there.
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
    rows, cols = _Axis.of(height, y0, y1), _Axis.of(width, x0, x1)
    return _draw(renderer, phi, replace(rows, start=rows.start + first), cols, tile, norm, means)


def render(renderer: CLIF | LIIF, phi: Tensor, res: int | tuple[int, int], window: Window | None = None,
           tile: int = 256, norm: str = "paper", means: Means = Means()) -> Tensor:
    """The whole picture (B, 3, H, W); arguments and errors as in `render_tiles`."""
    tiles = render_tiles(renderer, phi, res, window, tile, norm, means)
    height, width = (res, res) if isinstance(res, int) else res
    return _paste(tiles, (len(phi), 3, height, width), phi.device)
