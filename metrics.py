"""Distances between images and between sets of images: the numbers in the tables of both papers.

CM-Func, Section 4.1 and Tables 1, 2, 4-7; INFD supplementary, Tables 1-2 and Figure 3. `python metrics.py -h` for use.
Read `frechet_distance` and `evaluate` first. Nothing of the other modules is imported here; sample.py makes the images.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import signal
import socket
import struct
import sys
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

HUB = {  # each file name ends in the first eight digits of its SHA-256
    "inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}
FILTERS = {"nearest": Image.NEAREST, "box": Image.BOX, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC,
           "lanczos": Image.LANCZOS}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS, MAX_BYTES = 1 << 26, 1 << 28                             # of an image: 8192 x 8192; beyond lie bombs
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, KeyError, struct.error, zlib.error,
              zipfile.BadZipFile, Image.DecompressionBombError)      # what Pillow, numpy and zipfile raise on bad files


# ---- two images: PSNR, LPIPS, scale consistency ----------------------------------------------------------------------


def weights_file(name: str, otherwise: str) -> Path:
    """The file HUB[name] in torch hub's cache, downloaded when it is not there.

    Raises ValueError, one line: which file to put where, or `otherwise`, the option that does without it.
    """
    url = HUB[name]
    file = Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(url).name
    if file.exists():
        return file
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)                                     # torch.hub sets none: a dead network would hang
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem[-8:], progress=False)
    except (OSError, RuntimeError) as error:                         # URLError is an OSError, a wrong hash RuntimeError
        raise ValueError(f"no {file} and no download ({error}): put {url} there, or {otherwise}") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return file


def import_lpips():
    """The lpips package, also where torchvision was built for another torch.

    Such a torchvision lacks its compiled operators and fails on import, "operator torchvision::nms does not exist";
    LPIPS needs none of them, so declaring the two names is enough.
    """
    try:
        import lpips
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import lpips
    return lpips


def lpips_network(net: str = "vgg", otherwise: str = "train without it: lpips=none, or preset tiny") -> nn.Module:
    """LPIPS v0.1 (Zhang et al. 2018): a, b (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1). Frozen, in eval mode.

    Eval mode matters: in train mode the dropout inside LPIPS' heads makes the value scatter.
    """
    if net not in ("vgg", "alex", "squeeze"):
        raise ValueError(f"unknown LPIPS network {net!r}: use vgg, alex or squeeze")
    file = weights_file(net, otherwise)
    lpips = import_lpips()
    with warnings.catch_warnings():                                  # lpips 0.1.4 speaks torchvision's older dialect
        warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated")
        warnings.filterwarnings("ignore", "Arguments other than a weight enum")
        try:
            return lpips.LPIPS(net=net, verbose=False).requires_grad_(False).eval()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]}): put {HUB[net]} there") from error


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,), of images (B, 3, H, W) in [-1, 1], clamped; peak 1 on a [0, 1] scale."""
    if a.shape != b.shape:
        raise ValueError(f"psnr needs two batches of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    mse = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().mean(dim=(1, 2, 3))
    return -10 * mse.log10()                                         # (B,), inf where the images are equal


def scale_consistency(draw: Callable[[int], Tensor], res: int, lpips: nn.Module | None = None) -> dict[str, float]:
    """Does a render keep its content across scales (INFD supplementary, Section B and Figure 3)?

    draw(res) renders the same fields at res x res, (B, 3, res, res) in [-1, 1]. The render at 2 res, averaged over
    2 x 2 pixels, is compared with the render at res: mean PSNR in dB, and mean LPIPS where a network is given.
    The paper shows pictures and gives no number; the area average is our choice of downsampling.
    """
    with torch.no_grad():
        once, twice = draw(res), F.avg_pool2d(draw(2 * res), 2)      # (B, 3, res, res) both
        scores = {"psnr": psnr(once, twice).mean().item()}
        if lpips is not None:
            scores["lpips"] = lpips(once.clamp(-1, 1), twice.clamp(-1, 1)).mean().item()
    return scores


# ---- networks whose features are compared ----------------------------------------------------------------------------


def tf_resize(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear resize of (B, C, H, W): output pixel i reads at i * H / size, no half-pixel centres."""
    for dim in (3, 2):                                               # rows are blended before columns, as TF does
        n = images.shape[dim]
        place = torch.arange(size, dtype=torch.float32, device=images.device) * (n / size)
        low = place.long()
        high = (low + 1).clamp(max=n - 1)
        weight = (place - low).view(-1, *[1] * (3 - dim))
        images = torch.lerp(images.index_select(dim, low).float(), images.index_select(dim, high).float(), weight)
    return images                                                    # (B, C, size, size)


class ConvBN(nn.Module):
    """Convolution, batch norm, ReLU. Stride 1 keeps the size unless told otherwise; stride 2 does not pad."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """An Inception block: branches side by side on one input, concatenated.

    A branch is a chain of steps. A step is a convolution (name, channels, kernel[, stride]), a list of convolutions
    side by side, or a 3x3 pool: "avg" and "max" keep the size, "halve" is a max pool of stride 2.
    """

    POOLS = {
        "avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),   # as in the TensorFlow graph
        "max": lambda x: F.max_pool2d(x, 3, 1, 1),
        "halve": lambda x: F.max_pool2d(x, 3, 2),
    }

    def __init__(self, c_in: int, *branches: Sequence):
        super().__init__()
        self.branches = [[step if isinstance(step, (list, str)) else [step] for step in branch] for branch in branches]
        for branch in self.branches:
            c = c_in
            for convs in branch:
                if not isinstance(convs, str):
                    for name, c_out, *shape in convs:
                        self.add_module(name, ConvBN(c, c_out, *shape))
                    c = sum(c_out for _, c_out, *_ in convs)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                if isinstance(step, str):
                    y = self.POOLS[step](y)
                else:
                    y = torch.cat([getattr(self, name)(y) for name, *_ in step], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def mixed_5(c_in: int, c_pool: int) -> Mixed:
    """35 x 35 blocks: 1x1, 5x5 and double 3x3."""
    return Mixed(c_in, [("branch1x1", 64, 1)],
                 [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                 [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
                 ["avg", ("branch_pool", c_pool, 1)])


def mixed_6(c: int) -> Mixed:
    """17 x 17 blocks: 7x7 convolutions as pairs of 1x7 and 7x1, c channels inside."""
    return Mixed(768, [("branch1x1", 192, 1)],
                 [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
                 [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
                  ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
                 ["avg", ("branch_pool", 192, 1)])


def mixed_7(c_in: int, pool: str) -> Mixed:
    """8 x 8 blocks: 3x3 convolutions split into 1x3 beside 3x1."""
    return Mixed(c_in, [("branch1x1", 320, 1)],
                 [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
                 [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
                  [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
                 [pool, ("branch_pool", 192, 1)])


class Inception(nn.Module):
    """Inception-v3 as FID needs it: TensorFlow's graph of 2015-12-05, under torchvision's names.

    It differs from torchvision's own network in 1008 classes, average pools that do not count the padding, and a max
    pool in the last block.
    """

    layers = ("pool", "spatial")                                     # whose moments are kept with a reference

    def __init__(self):
        super().__init__()
        self.weights = "random"                                      # first digits of the file's SHA-256
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_5(192, 32), mixed_5(256, 64), mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, [("branch3x3", 384, 3, 2)],
                              [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
                              ["halve"])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = mixed_6(128), mixed_6(160), mixed_6(160)
        self.Mixed_6e = mixed_6(192)
        self.Mixed_7a = Mixed(768, [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
                              [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
                               ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)],
                              ["halve"])
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, "avg"), mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Inception:
        """With the published weights, from `path` or torch hub's cache. Raises ValueError unless the SHA-256 fits."""
        file = Path(path) if path else weights_file("inception", "name it with --inception, or use --features squeeze")
        if not file.is_file():
            raise ValueError(f"no {file}: put {HUB['inception']} there, or use --features squeeze")
        data = file.read_bytes()
        found, wanted = hashlib.sha256(data).hexdigest()[:8], PurePosixPath(HUB["inception"]).stem[-8:]
        if found != wanted:
            raise ValueError(f"{file} is not the published file (SHA-256 {found}..., not {wanted}...): "
                             f"put {HUB['inception']} there, or use --features squeeze")
        net = cls()
        net.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
        net.weights = found
        return net.requires_grad_(False).eval().to(memory_format=torch.channels_last)    # 1.6 times as fast on a CPU

    def __str__(self) -> str:
        return f"Inception-v3 2015-12-05 (weights {self.weights}) after TF-legacy bilinear resize to 299"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> the features of `activations`."""
        return self.activations((tf_resize(images, 299) - 128) / 128)

    def activations(self, x: Tensor) -> dict[str, Tensor]:
        """x (B, 3, 299, 299) in about [-1, 1] -> pool (B, 2048), spatial (B, 2023), logits (B, 1008) without bias."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))     # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))     # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))    # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))           # (B, 768, 17, 17)
        # sFID looks at 7 channels of this branch so that 7 * 17 * 17 numbers are about as many as the 2048 of FID.
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))           # (B, 1280, 8, 8)
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))      # (B, 2048)
        return {"pool": pool, "spatial": spatial, "logits": F.linear(pool, self.fc.weight)}


class Squeeze(nn.Module):
    """SqueezeNet 1.1, the 5 MB trunk of LPIPS(squeeze): spatial mean of its last ReLU, 512 numbers."""

    layers = ("pool",)

    def __init__(self):
        super().__init__()
        otherwise = "use --features inception"
        self.weights = hashlib.sha256(weights_file("squeeze", otherwise).read_bytes()).hexdigest()[:8]
        self.lpips = lpips_network("squeeze", otherwise).to(memory_format=torch.channels_last)      # faster on a CPU

    def __str__(self) -> str:
        return f"SqueezeNet 1.1 relu7 mean (weights {self.weights}) after antialiased bilinear resize to 224"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> pool (B, 512)."""
        x = F.interpolate(images.float() / 127.5 - 1, (224, 224), mode="bilinear", align_corners=False, antialias=True)
        return {"pool": self.lpips.net(self.lpips.scaling_layer(x))[-1].mean(dim=(2, 3))}


def load_features(name: str = "inception", path: str | Path | None = None) -> Inception | Squeeze:
    """The feature network of FID ("inception", weights from `path` or the cache) or of FD-squeeze ("squeeze")."""
    if name not in ("inception", "squeeze"):
        raise ValueError(f"unknown features {name!r}: use inception or squeeze")
    return Inception.load(path) if name == "inception" else Squeeze()


# ---- statistics of features ------------------------------------------------------------------------------------------


def check_finite(features: Tensor) -> None:
    """Raises ValueError on NaN and infinity, which would reach every later number or, worse, be clamped away."""
    if not torch.isfinite(features).all():
        raise ValueError("a feature is NaN or infinite: damaged weights, or images that are not finite")


class Moments:
    """Mean and covariance of rows that come in batches, in float64 (Chan et al. 1979). Memory is O(D^2)."""

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)    # sum of (x - mean) (x - mean)^T

    def add(self, rows: Tensor) -> None:
        """rows (B, D)."""
        check_finite(rows)
        rows = rows.double()
        mean = rows.mean(dim=0)
        self._shift(len(rows), mean)
        self.scatter.addmm_((rows - mean).T, rows - mean)

    def merge(self, other: Moments) -> None:
        """Take in the rows that `other` has seen."""
        self._shift(other.count, other.mean)
        self.scatter += other.scatter

    def _shift(self, count: int, mean: Tensor) -> None:
        total, delta = self.count + count, mean - self.mean
        if count:
            self.scatter.addr_(delta, delta, alpha=self.count * count / total)
            self.mean = self.mean + delta * (count / total)
            self.count = total

    def covariance(self) -> Tensor:
        """(D, D), divided by n - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


class Rows:
    """Rows that come in batches, in one array that doubles when full.

    A list of small tensors would pin a hole in the heap with each batch: gigabytes after 10,000 images.
    """

    def __init__(self):
        self.count, self.data = 0, torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """rows (B, D)."""
        end = self.count + len(rows)
        if end > len(self.data):
            grown = rows.new_empty(max(1024, 2 * end), *rows.shape[1:])
            if self.count:
                grown[:self.count] = self.all()
            self.data = grown
        self.data[self.count:end] = rows
        self.count = end

    def all(self) -> Tensor:
        return self.data[:self.count]


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Frechet distance of two Gaussians; float64, >= 0.

    With S = R R^T, the trace of (S1 S2)^(1/2) is the sum of the singular values of R1^T R2. This needs symmetric
    eigenvalues only, never a root of a rounding error, so sets smaller than D and a set against itself are exact:
    a product's square root (sqrtm) loses half of the digits there.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(m).double() for m in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != 2 * mu1.shape:
        raise ValueError(f"statistics of different features: {tuple(sigma1.shape)} and {tuple(sigma2.shape)}")
    for values in (mu1, sigma1, mu2, sigma2):
        check_finite(values)

    def root(sigma: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(sigma)
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps      # the rest is rounding
        return vectors[:, kept] * values[kept].sqrt()                # (D, rank)

    overlap = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    return max(0.0, ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap).item())


def inception_score(logits: Tensor, split_size: int = 5000, splits: int | None = None) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016) over consecutive blocks: mean and spread of the blocks.

    Blocks of `split_size` (the last may be shorter) as in the ADM evaluator, or `splits` equal ones as in others.
    logits (N, classes), without bias.
    """
    n = len(logits)
    if n < 2 or (splits is not None and not 1 <= splits <= n):
        raise ValueError(f"no Inception Score of {n} images in {splits or 1} splits")
    check_finite(logits)
    ends = [n * i // splits for i in range(splits + 1)] if splits else [*range(0, n, split_size), n]
    scores = []
    for start, end in zip(ends[:-1], ends[1:]):
        log_p = logits[start:end].double().log_softmax(dim=1)
        p = log_p.exp()
        kl = (p * (log_p - p.mean(dim=0).log())).nan_to_num(0.0).sum(dim=1)     # 0 log 0 = 0 for vanished classes
        scores.append(kl.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M). Only one such block is in memory at a time."""
    return torch.addmm(b.square().sum(dim=1), a, b.T, alpha=-2).add_(a.square().sum(dim=1, keepdim=True)).clamp_(min=0)


def knn_radii(x: Tensor, k: int, block: int = 1000) -> Tensor:
    """Squared distance (N,) of each row of x (N, D) to its k-th nearest other row."""
    return torch.cat([squared_distances(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(block)])


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3, block: int = 1000) -> tuple[float, float]:
    """Share of samples inside the reference's manifold, and of the reference inside the samples' (Kynkaanniemi 2019).

    (N, D) and (M, D) features; a manifold is the union of balls that reach to each point's k-th neighbour, borders
    included. float64, in blocks of rows: 50,000 x 50,000 takes 4 GB, where the ADM evaluator computes in float16.
    """
    if not 1 <= k < min(len(samples), len(reference)):
        raise ValueError(f"precision and recall with k = {k} need k >= 1 and more than {k} images on each side, "
                         f"got {len(samples)} and {len(reference)}")
    check_finite(samples)
    check_finite(reference)
    centre = reference.double().mean(dim=0)                          # near the origin, distances lose fewer digits
    samples, reference = samples.double() - centre, reference.double() - centre
    slack = 1e-12 * max(samples.square().sum(dim=1).max().item(), reference.square().sum(dim=1).max().item())
    reach, sample_reach = knn_radii(reference, k, block) + slack, knn_radii(samples, k, block) + slack
    inside, covered = 0, torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, radii in zip(samples.split(block), sample_reach.split(block)):
        distance = squared_distances(rows, reference)                # (block, M)
        inside += (distance <= reach).any(dim=1).sum().item()
        covered |= (distance <= radii[:, None]).any(dim=0)
    return inside / len(samples), covered.double().mean().item()


# ---- sets of images --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """How images become features. Kept with cached statistics, which serve no other protocol."""

    features: str = "inception"      # "inception", or "squeeze": no large download, but no FID either
    size: int | None = None          # px; cut to the centre square and resized; None: as stored, all of one size
    filter: str = "lanczos"          # Pillow's filter for size; lanczos is what INFD's published code uses
    patch: int | None = None         # px; one random square per image (patch FID); None: the whole image
    seed: int = 0                    # of the patches; each depends on the seed and the image's number alone

    def __post_init__(self):
        if self.filter not in FILTERS:
            raise ValueError(f"unknown filter {self.filter!r}: use {', '.join(FILTERS)}")
        for name in ("size", "patch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def key(self, net: nn.Module) -> dict:
        """What must agree between two sets, without the settings that have no effect."""
        plain = asdict(self) | {"weights": net.weights}
        return plain | ({} if self.size else {"filter": None}) | ({} if self.patch else {"seed": None})

    def describe(self, pixels: str) -> str:
        return f"{pixels}, centre square by {self.filter}" if self.size else f"{pixels} as stored"


class ImageSet:
    """The images of a folder (with its subfolders), a zip, an .npz batch (arr_0, uint8 NHWC), or a set prepared by
    data.py, in sorted order.

    `limit` takes that many, evenly spaced, since sorted names are often sorted by class. Raises ValueError.
    """

    def __init__(self, path: str | Path, limit: int | None = None):
        self.path, self.zip, self.shape, self.prepared = Path(path), None, None, None
        try:
            if (self.path / "pixels.u8").is_file():                  # a set that data.py prepared: train, then val
                meta = json.loads((self.path / "meta.json").read_text())
                self.prepared, self.shape = Protocol(size=meta["size"], filter=meta["filter"]), (meta["count"],)
                self.shape += (self.prepared.size, self.prepared.size, 3)
                self.read_row = row_reader(self.path / "pixels.u8", 0, self.shape)
                names = [f"{i:08d}.png" for i in range(self.shape[0])]
            elif self.path.is_dir():
                names = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
            elif self.path.suffix == ".npz":
                self.shape, self.read_row = open_npz(self.path)
                names = [f"{i:08d}.png" for i in range(self.shape[0])]
            else:
                self.zip = zipfile.ZipFile(self.path)
                names = self.zip.namelist()
        except UNREADABLE as error:
            raise ValueError(f"cannot read {self.path} as a folder, zip or .npz batch of images: {error}") from error
        hidden = ("__MACOSX/", ".")
        self.names = sorted(n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(hidden))
        if limit is not None and not 1 <= limit <= len(self.names):
            raise ValueError(f"{self.path} holds {len(self.names)} images, not the {limit} asked for")
        if not self.names:
            raise ValueError(f"{self.path} holds no images ({', '.join(SUFFIXES)})")
        if limit:
            self.names = [self.names[i * len(self.names) // limit] for i in range(limit)]

    def __len__(self) -> int:
        return len(self.names)

    def raw(self, i: int) -> bytes:
        name = self.names[i]
        try:
            if self.shape:
                return self.read_row(int(name[:-4]))
            if self.zip and self.zip.getinfo(name).file_size > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES >> 20} MB")
            return self.zip.read(name) if self.zip else (self.path / name).read_bytes()
        except UNREADABLE as error:
            raise ValueError(f"cannot read {self.path}/{name}: {error}") from error

    def sha(self) -> str:
        """SHA-256 over the contents of the files in order; a folder and a zip of it agree."""
        total = hashlib.sha256()
        for i in range(len(self)):
            total.update(hashlib.sha256(self.raw(i)).digest())
        return total.hexdigest()

    def read(self, i: int, protocol: Protocol) -> np.ndarray:
        """Image i as uint8 (3, H, W), resized as `protocol` says. Raises ValueError that names the file.

        Upright and with transparency on white, like the pictures that training sees.
        """
        own = self.prepared
        if own and protocol.size and (protocol.size, protocol.filter) != (own.size, own.filter):
            raise ValueError(f"{self.path} was prepared with size {own.size} and filter {own.filter} instead of "
                             f"{protocol.size} and {protocol.filter}: choose the same, or give the images")
        data = self.raw(i)
        try:
            if self.shape:
                image = Image.frombytes("RGB", self.shape[2:0:-1], data)
            else:
                image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
            if image.width * image.height > MAX_PIXELS or image.mode[0] in "IF":      # convert would clip 16 bits
                raise ValueError(f"{image.width} x {image.height} pixels of mode {image.mode} are not supported")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
        except UNREADABLE as error:
            raise ValueError(f"cannot read {self.path}/{self.names[i]}: {error}") from error
        if protocol.size and image.size != (protocol.size, protocol.size):
            w, h = image.size
            side = min(w, h)
            x, y = (w - side) // 2, (h - side) // 2                  # resize(box=...) would read beyond the square
            image = image.crop((x, y, x + side, y + side)).resize((protocol.size,) * 2, FILTERS[protocol.filter])
        return np.asarray(image).transpose(2, 0, 1)                  # (3, H, W)


def open_npz(path: Path) -> tuple[tuple[int, ...], Callable[[int], bytes]]:
    """Shape of arr_0 and a reader of its rows: from disk where it is stored plainly (np.savez), else from memory."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("arr_0.npy")
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
            shape, fortran, dtype = read_header(stream)
            start = stream.tell()
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise ValueError(f"arr_0 is {dtype} {shape}, not uint8 (N, H, W, 3)")
    if info.compress_type != zipfile.ZIP_STORED:
        with np.load(path, allow_pickle=False) as arrays:
            array = arrays["arr_0"]
        return shape, lambda i: array[i].tobytes()
    with open(path, "rb") as file:                                   # zip: a 30-byte local header, name, extra, data
        file.seek(info.header_offset + 26)
        start += info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return shape, row_reader(path, start, shape)


def row_reader(path: Path, start: int, shape: tuple[int, ...]) -> Callable[[int], bytes]:
    """A reader of the rows of a uint8 array of `shape` that begins at byte `start` of a file."""
    size = math.prod(shape[1:])

    def read_row(i: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start + i * size)
            return file.read(size)

    return read_row


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> uint8, truncated like the published samplers and our PNG files."""
    if not torch.isfinite(images).all():
        raise ValueError("an image holds NaN or infinity")
    return ((images.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)


def crop_patches(images: Tensor, index: Sequence[int], patch: int, seed: int) -> Tensor:
    """One random patch x patch square of each image; image number `index[j]` always gets the same one."""
    H, W = images.shape[2:]
    if patch > min(H, W):
        raise ValueError(f"a patch of {patch} px does not fit into images of {W}x{H}")
    corners = [np.random.default_rng((seed, i)).integers(0, (H - patch + 1, W - patch + 1)) for i in index]
    return torch.stack([x[:, y0:y0 + patch, x0:x0 + patch] for x, (y0, x0) in zip(images, corners)])


# ---- from sets to statistics -----------------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal asked the program to end; the argument is the exit code, 143 or 130."""


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """SIGTERM and SIGINT raise Stopped: for work that leaves whole files only, and so can break off anywhere."""

    def handler(number, frame):
        raise Stopped(128 + number)

    before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for s, old in before.items():
            signal.signal(s, old)


def ranks() -> tuple[int, int]:
    """(rank, number of ranks) of torch.distributed; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(value) -> list:
    """`value` of every rank, in order of rank, on every rank."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def gather_rows(index: list[int], rows: Rows) -> Tensor:
    """Rows that the ranks hold, put back in the order of the images."""
    parts = [part for part in gather((index, rows.all())) if part[0]]
    if len(parts) == 1:
        return parts[0][1]                                           # in order already; 50,000 rows are not copied
    order = torch.tensor([i for part, _ in parts for i in part])
    return torch.cat([part for _, part in parts])[order.argsort()]


def image_batches(source: ImageSet | Iterable[Tensor], protocol: Protocol, batch: int,
                  workers: int) -> Iterator[tuple[list[int], Tensor]]:
    """(numbers, uint8 (B, 3, H, W)) of this rank's share: each world-th image of a set; all of an iterable's batches.

    Threads decode the next batch meanwhile. Raises ValueError where sizes are mixed.
    """
    rank, world = ranks()
    if not isinstance(source, ImageSet):
        seen = 0
        for images in source:
            yield [rank + world * (seen + i) for i in range(len(images))], to_uint8(images)
            seen += len(images)
        return
    size = None
    mine = range(rank, len(source), world)
    chunks = [list(mine[i:i + batch]) for i in range(0, len(mine), batch)]
    with ThreadPoolExecutor(workers) as pool:
        reading = deque()
        for chunk in tqdm(chunks + [None], desc=source.path.name, disable=None if rank == 0 else True, leave=False):
            if chunk:
                reading.append((chunk, [pool.submit(source.read, i, protocol) for i in chunk]))
            while reading and (chunk is None or len(reading) > 1):
                done, futures = reading.popleft()
                images = [future.result() for future in futures]
                size = size or images[0].shape
                for i, image in zip(done, images):
                    if image.shape != size:
                        raise ValueError(f"mixed sizes: {source.path}/{source.names[i]} is {size_of(image)}, others "
                                         f"are {size[2]}x{size[1]}; use --size to resize all")
                yield done, torch.from_numpy(np.stack(images))


def size_of(image: np.ndarray | Tensor) -> str:
    """"64x32" for (..., 32, 64): width first, as people say it."""
    return f"{image.shape[-1]}x{image.shape[-2]}"


@dataclass
class Statistics:
    """What one set of images contributes to a score."""

    source: str
    protocol: dict                                                   # Protocol.key
    count: int = 0
    pixels: str = ""                                                 # "64x64", before patches are cut
    sha: str = ""                                                    # of the contents, for references
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)     # layer -> mean (D,), covariance (D, D)
    rows: dict[str, Tensor] = field(default_factory=dict)            # layer -> (N, D), for IS, precision and recall


def statistics(source: str | Path | ImageSet | Iterable[Tensor], net: nn.Module, protocol: Protocol = Protocol(),
               moments: Sequence[str] = ("pool",), rows: Sequence[str] = (), batch: int = 32,
               workers: int = 4) -> Statistics:
    """One pass of `net` over a set of images: moments and/or rows of the layers named. Sharded over ranks.

    source: a path, an ImageSet, or batches (B, 3, H, W) in [-1, 1] (each rank brings its own share).
    """
    source = ImageSet(source) if isinstance(source, (str, Path)) else source
    sums, kept, numbers, sizes = {}, {layer: Rows() for layer in rows}, [], set()
    device = next(net.parameters()).device
    with torch.no_grad():
        for index, images in image_batches(source, protocol, batch, workers):
            numbers += index
            sizes.add(size_of(images))
            if protocol.patch:
                images = crop_patches(images, index, protocol.patch, protocol.seed)
            features = net(images.to(device))
            for layer in moments:
                sums.setdefault(layer, Moments(features[layer].shape[1])).add(features[layer].cpu())
            for layer in rows:
                kept[layer].add(features[layer].float().cpu())
    count, sizes = sum(gather(len(numbers))), set().union(*gather(sizes))
    if len(sizes) != 1 or count < 2:
        raise ValueError(f"mixed sizes ({', '.join(sorted(sizes))}): render or resize to one" if count > 1 else
                         f"too few images: {count}, at least 2 are needed")
    result = Statistics(str(getattr(source, "path", "images")), protocol.key(net), count, sizes.pop())
    for layer in moments:
        parts = [part for part in gather(sums.get(layer)) if part is not None]
        total = parts[0]
        for part in parts[1:]:
            total.merge(part)
        result.moments[layer] = (total.mean, total.covariance())
    result.rows = {layer: gather_rows(numbers, kept[layer]) for layer in rows}
    return result


def save_statistics(stats: Statistics, file: Path) -> None:
    """Write statistics as .npz, under a temporary name first; a folder that cannot be written costs only the cache."""
    arrays = {f"{layer}.rows": rows for layer, rows in stats.rows.items()}
    for layer, (mean, covariance) in stats.moments.items():
        arrays |= {f"{layer}.mean": mean, f"{layer}.covariance": covariance}
    meta = {name: getattr(stats, name) for name in ("source", "protocol", "count", "pixels", "sha")}
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            np.savez(stream, meta=json.dumps(meta), **{name: array.numpy() for name, array in arrays.items()})
        os.replace(temporary, file)
    except OSError as error:
        print(f"reference statistics not kept ({error}); --cache names another folder", file=sys.stderr)


def load_statistics(file: Path, protocol: dict, rows: Sequence[str] = ()) -> Statistics:
    """Statistics written by `save_statistics`. Raises ValueError where they are damaged or of another kind."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            stats = Statistics(**json.loads(str(arrays["meta"])))
            for name in arrays.files:
                layer, _, part = name.partition(".")
                if part == "mean":
                    mean, covariance = arrays[name], arrays[f"{layer}.covariance"]
                    stats.moments[layer] = (torch.from_numpy(mean), torch.from_numpy(covariance))
                elif part == "rows":
                    stats.rows[layer] = torch.from_numpy(arrays[name])
    except (*UNREADABLE, TypeError) as error:
        raise ValueError(f"cannot read {file} as statistics of this program: {error}; delete it") from error
    other = [f"{name} {stats.protocol.get(name)} instead of {value}" for name, value in protocol.items()
             if stats.protocol.get(name) != value]
    if other:
        raise ValueError(f"{file} was prepared with {', '.join(other)}: choose the same, or give the images")
    if not set(rows) <= stats.rows.keys():
        raise ValueError(f"{file} holds no single features ({', '.join(rows)}): give the images")
    return stats


def is_statistics(path: object) -> bool:
    """Whether `path` names a file of `save_statistics`."""
    if not isinstance(path, (str, Path)) or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "meta.npy" in archive.namelist()


def reference_statistics(path: str | Path, net: nn.Module, protocol: Protocol = Protocol(), rows: Sequence[str] = (),
                         cache: str | Path | None = None, batch: int = 32, workers: int = 4) -> Statistics:
    """Statistics of a reference set, kept beside it (or in `cache`) under the hash of its contents and the protocol."""
    if is_statistics(path):
        return load_statistics(Path(path), protocol.key(net), rows)
    images, path = ImageSet(path), Path(path).resolve()
    sha = gather(images.sha() if ranks()[0] == 0 else None)[0]
    key = hashlib.sha256(json.dumps(protocol.key(net), sort_keys=True).encode()).hexdigest()
    kind = "rows" if rows else "moments"                             # 50,000 rows are 400 MB: kept only when needed
    file = Path(cache or path.parent) / f"{path.stem}-{sha[:12]}-{key[:8]}.{kind}.npz"
    if gather(file.exists())[0]:
        return load_statistics(file, protocol.key(net), rows)
    stats = statistics(images, net, protocol, net.layers, rows, batch, workers)
    stats.sha = sha
    if ranks()[0] == 0:
        save_statistics(stats, file)
    gather(None)                                                     # no rank looks for the file before it is there
    return stats


# ---- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A number that says how it came about: `str(score)` is one line, `score.json()` the same for scripts."""

    name: str                                                        # "FID@5000": always with the number of samples
    value: float
    protocol: dict

    def __str__(self) -> str:
        return f"{self.name} = {self.value:.6g} | " + " | ".join(f"{key} {what}" for key, what in self.protocol.items())

    def json(self) -> str:
        value = self.value if math.isfinite(self.value) else str(self.value)      # JSON knows no infinity
        return json.dumps({"name": self.name, "value": value, **self.protocol})


def evaluate(names: Sequence[str], samples: str | Path | ImageSet | Iterable[Tensor],
             reference: str | Path | None = None, protocol: Protocol = Protocol(), net: nn.Module | None = None,
             k: int = 3, split_size: int = 5000, splits: int | None = None, cache: str | Path | None = None,
             batch: int = 32, workers: int = 4) -> list[Score]:
    """Scores of a set of images from one pass over it: any of "fid", "sfid", "is" and "pr" (precision and recall).

    samples: a path, an ImageSet, or batches (B, 3, H, W) in [-1, 1]. reference: a path, or a statistics file. `net`
    saves loading the network each time. With protocol.patch, "fid" is the patch FID of INFD (Table 2), with features
    "squeeze" it is FD-squeeze. Raises ValueError where a set, a setting or the reference does not fit.
    """
    unknown = set(names) - {"fid", "sfid", "is", "pr"}
    if unknown:
        raise ValueError(f"unknown score {', '.join(sorted(unknown))}: use fid, sfid, is, pr")
    if protocol.features == "squeeze" and {"sfid", "is"} & set(names):
        raise ValueError("sfid and is are defined on Inception alone: use --features inception")
    if protocol.patch and set(names) != {"fid"}:
        raise ValueError("only the Frechet distance has a form on patches")
    needs_reference = set(names) != {"is"}
    if needs_reference and reference is None:
        raise ValueError(f"{', '.join(names)} needs a REFERENCE to compare with")

    net = net or load_features(protocol.features)
    theirs, ours = None, None
    if needs_reference:
        single = ["pool"] if "pr" in names else []
        theirs = reference_statistics(reference, net, protocol, single, cache, batch, workers)
    moments = [layer for name, layer in (("fid", "pool"), ("sfid", "spatial")) if name in names]
    rows = [layer for name, layer in (("pr", "pool"), ("is", "logits")) if name in names]
    if is_statistics(samples):
        ours = load_statistics(Path(samples), protocol.key(net), rows)
    else:
        ours = statistics(samples, net, protocol, moments, rows, batch, workers)
    if theirs and theirs.pixels != ours.pixels:
        raise ValueError(f"the samples are {ours.pixels}, the reference is {theirs.pixels}: use --size for both")

    line = {"samples": f"{ours.source} ({ours.count})", "reference": "none"}
    if theirs:
        line["reference"] = f"{theirs.source} ({theirs.count}, sha256 {theirs.sha[:12]})"
    line |= {"size": protocol.describe(ours.pixels), "features": str(net),
             "seed": protocol.seed if protocol.patch else "none"}
    suffix = "" if protocol.features == "inception" else f"-{protocol.features}"
    scores = []
    for name in names:
        if name in ("fid", "sfid"):
            ours_m, theirs_m = (stats.moments["pool" if name == "fid" else "spatial"] for stats in (ours, theirs))
            title = "sFID" if name == "sfid" else "FD-squeeze" if suffix else "FID"
            title = f"p{title}-{protocol.patch}/{ours.pixels}" if protocol.patch else title
            few = {"note": "fewer images than features, covariance of low rank"}
            extra = few if min(ours.count, theirs.count) <= len(ours_m[0]) else {}
            scores.append(Score(title, frechet_distance(*ours_m, *theirs_m), line | extra))
        elif name == "is":
            mean, spread = inception_score(ours.rows["logits"], split_size, splits)
            blocks = f"{splits} equal" if splits else f"{-(-ours.count // split_size)} of {split_size} in order"
            scores.append(Score("IS", mean, line | {"splits": f"{blocks}, spread {spread:.4g}"}))
        else:
            both = precision_recall(ours.rows["pool"], theirs.rows["pool"], k)
            scores += [Score(title + suffix, value, line | {"k": k}) for title, value in zip(("P", "R"), both)]
    return [Score(f"{score.name}@{ours.count}", score.value, score.protocol) for score in scores]


def fid(samples: str | Path | ImageSet | Iterable[Tensor], reference: str | Path, protocol: Protocol = Protocol(),
        **options) -> Score:
    """FID (Heusel et al. 2017), FD-squeeze or patch FID as `protocol` says; options as in `evaluate`."""
    return evaluate(["fid"], samples, reference, protocol, **options)[0]


def per_image(score: Callable[..., Tensor], sets: list[ImageSet], protocol: Protocol, device: torch.device | str,
              workers: int) -> tuple[float, str]:
    """Mean of score(*images in [-1, 1], each (1, 3, H, W)) over sets read side by side, and the images' size."""
    numbers, values, sizes = [], Rows(), set()
    with torch.no_grad():
        for together in zip(*(image_batches(images, protocol, 1, workers) for images in sets)):
            sizes |= {size_of(image) for _, image in together}
            if len(sizes) > 1:
                raise ValueError(f"images of {' and '.join(sorted(sizes))} cannot be compared: use --size")
            numbers += together[0][0]
            values.add(score(*(image.to(device) / 127.5 - 1 for _, image in together)).reshape(1).cpu())
    mean = gather_rows(numbers, values).double().mean().item()
    if math.isnan(mean):
        raise ValueError("the score of an image is NaN")
    return mean, set().union(*gather(sizes)).pop()


def compare(name: str, samples: str | Path, reference: str | Path, protocol: Protocol = Protocol(),
            net: str = "vgg", device: torch.device | str = "cpu", limit: int | None = None, workers: int = 4) -> Score:
    """Mean "psnr" (dB) or "lpips" over images of the same name in two sets; `net` is the LPIPS network.

    A name may end in the size, as the files of sample.py do: renders of two sizes are compared with protocol.size.
    """
    a, b = ImageSet(samples, limit), ImageSet(reference, limit)
    plain = functools.partial(re.sub, r"(-\d+x\d+)?\.\w+$", "")      # seed0-000001-256x256.png -> seed0-000001
    for images in (a, b):
        images.names.sort(key=plain)
    alone = sorted({*map(plain, a.names)} ^ {*map(plain, b.names)})
    if alone or len(a) != len(b):
        raise ValueError(f"{name} compares images of the same name; {len(alone)} of {a.path} and {b.path} have no "
                         f"partner, the first: {alone[0] if alone else a.names[0]}")
    network = lpips_network(net, "use --lpips-net squeeze").to(device) if name == "lpips" else None
    value, size = per_image(network or psnr, [a, b], protocol, device, workers)
    line = {"samples": f"{a.path} ({len(a)})", "reference": f"{b.path} ({len(b)}, sha256 {b.sha()[:12]})",
            "size": protocol.describe(size), "features": f"LPIPS v0.1 {net}" if network else "none, peak 1",
            "seed": "none"}
    return Score(f"{'LPIPS-' + net if network else 'PSNR'}@{len(a)}", value, line)


IQA = ("niqe", "clipiqa", "musiq", "maniqa")                         # CM-Func, Tables 4 and 6; lower is better for niqe


def no_reference(names: Sequence[str], samples: str | Path, protocol: Protocol = Protocol(), smallest: int = 224,
                 device: torch.device | str = "cpu", limit: int | None = None, workers: int = 4) -> list[Score]:
    """Quality without a reference, as the optional package pyiqa defines it.

    NIQE needs 96 px and the paper does not say how images of 32 and 64 px got there (CM-Func, Appendix D.1), so
    smaller images are enlarged (bicubic) until their shorter side has `smallest` px, and the score's line says so.
    """
    try:
        import pyiqa
    except ImportError:
        raise ValueError(f"{', '.join(names)} needs the optional package: pip install pyiqa") from None
    images, scores = ImageSet(samples, limit), []
    for name in names:
        try:
            metric = pyiqa.create_metric(name, device=torch.device(device))
        except (OSError, RuntimeError, KeyError) as error:           # most often its weights cannot be downloaded
            raise ValueError(f"pyiqa cannot make {name}: {str(error).splitlines()[0]}") from error

        def score(x: Tensor) -> Tensor:
            short = min(x.shape[2:])
            if short < smallest:
                x = F.interpolate(x, [round(side * smallest / short) for side in x.shape[2:]], mode="bicubic")
            return metric((x * 0.5 + 0.5).clamp(0, 1))

        value, size = per_image(score, [images], protocol, device, workers)
        enlarged = f", enlarged to {smallest} px (bicubic)" if min(map(int, size.split("x"))) < smallest else ""
        line = {"samples": f"{images.path} ({len(images)})", "reference": "none",
                "size": protocol.describe(size) + enlarged, "features": f"pyiqa {name}", "seed": "none"}
        scores.append(Score(f"{name.upper()}@{len(images)}", value, line))
    return scores


# ---- command line ----------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Scores of SAMPLES against REFERENCE: folders, zips, .npz batches.",
                                     epilog="torchrun shares the work between ranks; the result is the same.")
    parser.add_argument("metric", help="fid, sfid, is, pr in one pass (fid,sfid,is,pr), fd (= fid --features squeeze), "
                                       f"pfid, psnr, lpips, {', '.join(IQA)}, or iqa for these four")
    parser.add_argument("samples", type=Path)
    parser.add_argument("reference", type=Path, nargs="?", help="images, or statistics kept from them")
    parser.add_argument("--features", choices=("inception", "squeeze"))
    parser.add_argument("--size", type=int, help="px; resize the centre square of every image (default: as stored)")
    parser.add_argument("--filter", choices=FILTERS, default=Protocol.filter, help="of --size (default %(default)s)")
    parser.add_argument("--patch", type=int, help="px; side of the random squares of pfid")
    parser.add_argument("--seed", type=int, default=0, help="of these squares")
    parser.add_argument("--limit", type=int, help="use this many of the samples, evenly spaced")
    parser.add_argument("--k", type=int, default=3, help="neighbours for pr")
    parser.add_argument("--splits", type=int, help="equal splits for is (default: blocks of 5000)")
    parser.add_argument("--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg")
    parser.add_argument("--inception", type=Path, help="the published Inception weights, instead of torch hub's cache")
    parser.add_argument("--cache", type=Path, help="folder for reference statistics (default: beside the reference)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=4, help="threads that decode")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[Score]:
    """The scores that the command line asks for."""
    names = list(dict.fromkeys(IQA if args.metric == "iqa" else args.metric.split(",")))
    features = args.features or ("squeeze" if "fd" in names else "inception")
    protocol = Protocol(features, args.size, args.filter, args.patch, args.seed)
    if ("pfid" in names) != (args.patch is not None):
        raise ValueError("pfid and --patch belong together: pfid --patch 256")
    if len({"fid", "fd", "pfid"} & set(names)) > 1:
        raise ValueError("fid, fd and pfid are one score under different protocols: ask for one at a time")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: no GPU is visible; use --device cpu")
    if set(names) <= set(IQA):
        return no_reference(names, args.samples, protocol, device=args.device, limit=args.limit, workers=args.workers)
    if set(names) <= {"psnr", "lpips"}:
        if args.reference is None:
            raise ValueError(f"{args.metric} needs a REFERENCE to compare with")
        return [compare(name, args.samples, args.reference, protocol, args.lpips_net, args.device, args.limit,
                        args.workers) for name in names]
    names = ["fid" if name in ("fd", "pfid") else name for name in names]
    samples = args.samples if is_statistics(args.samples) and not args.limit else ImageSet(args.samples, args.limit)
    net = load_features(features, args.inception).to(args.device)
    return evaluate(names, samples, args.reference, protocol, net, args.k, splits=args.splits, cache=args.cache,
                    batch=args.batch, workers=args.workers)


def main(argv: list[str] | None = None) -> None:
    """Print every score as a line with its protocol, and as JSON; bad input ends with one line and exit code 2."""
    args = parse(argv)
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1              # started by torchrun
    if together:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("gloo")                              # only results travel, and they are on the CPU
    try:
        with stop_at_once():
            scores = run(args)
    except Stopped as stop:
        sys.exit(stop.args[0])
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if ranks()[0] == 0:
        for score in scores:
            print(score, score.json(), sep="\n")
    if together:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
