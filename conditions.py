"""Conditions on parts of a picture, at any scale, and one prompt here and another there.

INFD supplementary B names such inverse problems: a field can be rendered in any window at any
resolution, and a score of that rendering leads the sampler. Super-resolution, inpainting and
outpainting are such scores. Read next: models.py, whose `sample` and `functions` take conditions.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from clif import WHOLE_PLANE, Field, Window, check_frame
from data import to_tensor
from files import to_rgb
from inr_generator import ImageFunction
from pictures import read_picture

LARGEST = 2**20                             # pixels of all conditions: their gradients need memory
LED = 1.0                                   # step size of `conditioned`
SHIFTED = 0.05                              # of `fitted_noise` by CM-Func
SHIFTED_LATENT = 0.1                        # and by one-step INFD


# ---- What a picture should be ----

@dataclass(frozen=True)
class Condition:
    """A score of how a picture looks in a window of the plane, to be made small.

    score: any differentiable function of a rendering (B, 3, H, W), colours about [-1, 1], that
    gives (B,). The window is rendered with size = (H, W) pixels.
    """

    score: Callable[[Tensor], Tensor]
    size: tuple[int, int]
    window: Window = WHOLE_PLANE

    def __post_init__(self) -> None:
        check_frame(self.size, self.window)


def like(goal: Tensor, window: Window = WHOLE_PLANE, mask: Tensor | None = None) -> Condition:
    """The condition to look like a picture (3, H, W) in [-1, 1] there; its size is its scale.

    mask (H, W) in [0, 1]: how much each pixel counts, by default 1.
    """
    weight = torch.ones(goal.shape[1:]) if mask is None else mask

    def residual(rendering: Tensor) -> Tensor:
        error = (rendering - goal.to(rendering)).div(2).square().mean(dim=1)     # (B, H, W)
        here = weight.to(rendering)
        return (here * error).sum(dim=(1, 2)) / here.sum().clamp(min=1)          # (B,)

    return Condition(residual, tuple(goal.shape[1:]), window)


def read_given(file: str | Path, window: Window = WHOLE_PLANE) -> Condition:
    """`like` of a PNG, JPEG or WEBP file, whose alpha channel is the mask; OSError, ValueError."""
    pixels = np.asarray(read_picture(file, to_rgba))                             # (H, W, 4)
    mask = torch.from_numpy(pixels[..., 3] / np.float32(255))                    # (H, W)
    return like(to_tensor(pixels[..., :3]), window, mask)


def to_rgba(image: Image.Image) -> Image.Image:
    """As `files.to_rgb`, with the transparency kept."""
    if image.has_transparency_data:
        return ImageOps.exif_transpose(image).convert("RGBA")
    return to_rgb(image).convert("RGBA")


def paired(given: Sequence[str | Sequence[float]]) -> list[tuple[str, Window]]:
    """Files, some followed by a window, -> (file, window) of each; without, the whole plane."""
    pairs = []
    for i, item in enumerate(given):
        if isinstance(item, str):
            pairs.append((item, WHOLE_PLANE))
        elif i > 0 and isinstance(given[i - 1], str):
            pairs[-1] = (given[i - 1], item)
        else:
            raise ValueError("more windows than pictures: each --at y0,x0,y1,x1 follows the "
                             "--given FILE whose place it is")
    return pairs


def misfit(drawn: Field | ImageFunction, cells: tuple[int, int],
           conditions: Sequence[Condition]) -> Tensor:
    """The sum (B,) of the scores of B pictures, of which only the windows are rendered.

    Each counts by the side of its window: weighted by 1 a small one would drown the others, by its
    area they would drown it.
    cells: the model's own pixels down and across the plane. Where those of a condition are larger,
    as many as needed are rendered in place of each and averaged: no model learned to draw coarser.
    """
    total = 0
    for condition in conditions:
        (height, width), (y0, x0, y1, x1) = condition.size, condition.window
        fine = (max(1, math.ceil(cells[0] * (y1 - y0) / 2 / height)),
                max(1, math.ceil(cells[1] * (x1 - x0) / 2 / width)))
        rendering = drawn.draw((fine[0] * height, fine[1] * width), condition.window)
        side = math.sqrt((y1 - y0) * (x1 - x0) / 4)
        total = total + side * condition.score(F.avg_pool2d(rendering, fine))
    return total


def check_conditions(conditions: Sequence[Condition], step_size: float) -> None:
    """Raise ValueError where conditions are too large for their gradient, or no step size is."""
    pixels = sum(math.prod(condition.size) for condition in conditions)
    if pixels > LARGEST:
        raise ValueError(f"conditions of {pixels:,} pixels, which are rendered at every step, are "
                         f"more than {LARGEST:,}: make the pictures smaller")
    if not 0 <= step_size < math.inf:
        raise ValueError(f"step size is {step_size}; it must be a finite number, 0 or more")


# ---- How a sampler meets it ----

def conditioned(model: Callable, alpha_bar: Tensor, misfit: Callable[[Tensor], Tensor],
                step_size: float) -> Callable:
    """Lead a sampler to where a misfit is small: posterior sampling (Chung et al. 2023).

    Gives it eps + step_size sqrt(1 - alpha_bar_t) g / rms(g), where g (B, C, h, w) is the gradient
    of misfit(x_0), (B,), with respect to x_t through the model's prediction of x_0. By the rms of
    each picture's g a step is as long whatever the score's unit; a score that is met moves nothing.
    """
    def with_conditions(x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        a = alpha_bar[t[0]].item()
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            eps = model(x, t, y).to(x.dtype)                                 # (B, C, h, w)
            x_0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            g, = torch.autograd.grad(misfit(x_0).sum(), x)
        rms = g.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()            # (B, 1, 1, 1)
        return eps.detach() + step_size * math.sqrt(1 - a) * g / rms.clamp(min=1e-12)

    return with_conditions


def fitted_noise(noise: Tensor, misfit: Callable[[Tensor], Tensor], steps: int,
                 step_size: float) -> Tensor:
    """Noise (B, ...) of the same length whose pictures have a small misfit (B,): steps of Adam.

    Normal noise of so many numbers lies on a shell, and one-step models know no other.
    """
    def length(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))

    shell = length(noise)
    x = noise.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=step_size)
    for _ in range(steps):
        with torch.enable_grad():
            x.grad, = torch.autograd.grad(misfit(x).sum(), x)
        adam.step()
        with torch.no_grad():
            x.mul_(shell / length(x))
    return x.detach()


# ---- Layouts ----

def inside(shape: tuple[int, int], window: Window) -> Tensor:
    """How much of each of (h, w) cells of the plane lies in a window: (h, w) in [0, 1]."""
    def along(n: int, lo: float, hi: float) -> Tensor:
        cell = torch.arange(n, dtype=torch.float64)
        upto_hi = ((hi + 1) / 2 * n - cell).clamp(0, 1)
        return upto_hi - ((lo + 1) / 2 * n - cell).clamp(0, 1)               # (n,)

    y0, x0, y1, x1 = window
    return torch.outer(along(shape[0], y0, y1), along(shape[1], x0, x1))


def laid_out(model: Callable, regions: Sequence[tuple[Callable, Window]]) -> Callable:
    """Let a sampler follow `model` and, in the windows of the plane, the models of regions.

    Each is (x_t, t, y) -> eps (B, C, h, w), of its own prompt; of two that overlap the later holds.
    """
    def with_regions(x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        eps = model(x_t, t, y)
        for own, window in regions:
            share = inside(x_t.shape[-2:], window).to(eps)                   # (h, w)
            eps = (1 - share) * eps + share * own(x_t, t, y)
        return eps

    return with_regions
