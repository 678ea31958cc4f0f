"""From pictures to the features that scores compare: networks, sets of pictures, statistics.

FID is defined on one Inception-v3 (Heusel et al. 2017), which is built here with its quirks;
SqueezeNet stands in where its file cannot be had; LPIPS compares two pictures. A set is a folder, a
zip, a prepared copy or an .npz batch. Read next: metrics.py, which makes scores of features.
"""
from __future__ import annotations

import functools
import hashlib
import io
import math
import os
import pickle
import socket
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import data as files
from data import shown, to_uint8
from runs import first_line

HUB = {  # each file name ends in the first eight digits of its SHA-256
    "inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}
FILTERS = ("nearest", "box", "bilinear", "bicubic", "lanczos")       # Pillow's
VERSION = 2                                      # of how pictures become features: raise with it
MAX_NPZ = 2**32                                  # bytes of an array in an .npz file


# ---- weights, LPIPS ------------------------------------------------------------------------------


def weights_file(name: str, otherwise: str) -> Path:
    """Find the file HUB[name] in torch hub's cache; download it when it is not there.

    Raises ValueError: which file to put where, or `otherwise`, the option that does without it.
    """
    url = HUB[name]
    file = Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(url).name
    if file.exists():
        return file
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)                 # torch.hub sets none: a dead network would hang
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem[-8:], progress=False)
    except (OSError, RuntimeError) as error:     # URLError is an OSError, a wrong hash RuntimeError
        cause = first_line(error)
        raise ValueError(f"no {file} and no download ({cause}): put {url} there, "
                         f"or {otherwise}") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return file


def lpips_network(net: str = "vgg",
                  otherwise: str = "train without it: lpips=none, or preset tiny") -> nn.Module:
    """Load LPIPS v0.1, the perceptual distance of two pictures (Zhang et al. 2018).

    The network takes a, b (B, 3, H, W) in [-1, 1] to (B, 1, 1, 1). It is frozen and in eval mode:
    in train mode the dropout inside its heads makes the value scatter. Raises ValueError where
    its weights are missing or damaged.
    """
    if net not in ("vgg", "alex", "squeeze"):
        raise ValueError(f"unknown LPIPS network {net!r}: use vgg, alex or squeeze")
    file = weights_file(net, otherwise)
    files.import_torchvision()                   # mended where it was built for another torch
    import lpips
    with warnings.catch_warnings():              # lpips 0.1.4 calls torchvision in an older way
        warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated")
        warnings.filterwarnings("ignore", "Arguments other than a weight enum")
        try:
            return lpips.LPIPS(net=net, verbose=False).requires_grad_(False).eval()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            cause = first_line(error)
            raise ValueError(f"{file} cannot be read ({cause}): put {HUB[net]} there") from error


# ---- Inception -----------------------------------------------------------------------------------


def tf_resize(images: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to (B, C, size, size) as TensorFlow 1 did.

    Bilinear, and output pixel i reads at i * H / size: no half-pixel centres.
    """
    for dim in (3, 2):                           # rows are blended before columns, as TF does
        n = images.shape[dim]
        place = torch.arange(size, dtype=torch.float32, device=images.device) * (n / size)
        low = place.long()
        high = (low + 1).clamp(max=n - 1)
        weight = (place - low).view(-1, *[1] * (3 - dim))
        before = images.index_select(dim, low).float()
        after = images.index_select(dim, high).float()
        images = torch.lerp(before, after, weight)
    return images


class ConvBN(nn.Module):
    """Convolution, batch norm, ReLU; stride 1 keeps the size if `pad`, stride 2 does not pad."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1,
                 pad: bool = True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


# The 3 x 3 pools. The TensorFlow graph does not count the padding in its averages.
AVG = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
MAX = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
HALVE = functools.partial(F.max_pool2d, kernel_size=3, stride=2)


class Mixed(nn.Module):
    """An Inception block: branches side by side on one input, concatenated.

    A branch is a list of steps. A step is a pool, a convolution (name, channels, kernel[, stride]),
    or a list of convolutions side by side.
    """

    def __init__(self, c_in: int, *branches: list):
        super().__init__()
        self.branches = []
        for branch in branches:
            c = c_in
            steps = []
            for step in branch:
                if not callable(step):
                    convs = step if isinstance(step, list) else [step]
                    for name, c_out, *shape in convs:
                        self.add_module(name, ConvBN(c, c_out, *shape))
                    c = sum(conv[1] for conv in convs)
                    step = [conv[0] for conv in convs]
                steps.append(step)
            self.branches.append(steps)          # pools, and lists of the names of convolutions

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for steps in self.branches:
            y = x
            for step in steps:
                if callable(step):
                    y = step(y)
                else:
                    y = torch.cat([getattr(self, name)(y) for name in step], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def mixed_5(c_in: int, c_pool: int) -> Mixed:
    """Make a block on 35 x 35 pixels: 1x1, 5x5 and double 3x3."""
    return Mixed(c_in, [("branch1x1", 64, 1)],
                 [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                 [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
                 [AVG, ("branch_pool", c_pool, 1)])


def mixed_6(c: int) -> Mixed:
    """Make a block on 17 x 17 pixels: 7x7 as pairs of 1x7 and 7x1, c channels inside."""
    return Mixed(768, [("branch1x1", 192, 1)],
                 [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
                 [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)),
                  ("branch7x7dbl_3", c, (1, 7)), ("branch7x7dbl_4", c, (7, 1)),
                  ("branch7x7dbl_5", 192, (1, 7))],
                 [AVG, ("branch_pool", 192, 1)])


def mixed_7(c_in: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    """Make a block on 8 x 8 pixels: 3x3 convolutions split into 1x3 beside 3x1."""
    return Mixed(c_in, [("branch1x1", 320, 1)],
                 [("branch3x3_1", 384, 1),
                  [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
                 [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
                  [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
                 [pool, ("branch_pool", 192, 1)])


class Inception(nn.Module):
    """Inception-v3 as FID needs it: TensorFlow's graph of 2015-12-05, under torchvision's names.

    It differs from torchvision's own network in 1008 classes, average pools that do not count the
    padding, and a max pool in the last block.
    """

    layers = ("pool", "spatial")                 # whose moments are kept with a reference

    def __init__(self):
        super().__init__()
        self.weights = "random"                  # first digits of the file's SHA-256
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, pad=False)
        self.Mixed_5b = mixed_5(192, 32)
        self.Mixed_5c = mixed_5(256, 64)
        self.Mixed_5d = mixed_5(288, 64)
        self.Mixed_6a = Mixed(
            288, [("branch3x3", 384, 3, 2)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
            [HALVE])
        self.Mixed_6b = mixed_6(128)
        self.Mixed_6c = mixed_6(160)
        self.Mixed_6d = mixed_6(160)
        self.Mixed_6e = mixed_6(192)
        self.Mixed_7a = Mixed(
            768, [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
            [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
             ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)],
            [HALVE])
        self.Mixed_7b = mixed_7(1280, AVG)
        self.Mixed_7c = mixed_7(2048, MAX)
        self.fc = nn.Linear(2048, 1008)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Inception:
        """Load the published weights, from `path` or torch hub; ValueError unless the hash fits."""
        otherwise = "name it with --inception, or use --features squeeze"
        file = Path(path or weights_file("inception", otherwise))
        there = f"put {HUB['inception']} there, or use --features squeeze"
        if not file.is_file():
            raise ValueError(f"no {file}: {there}")
        content = file.read_bytes()
        found = hashlib.sha256(content).hexdigest()[:8]
        wanted = PurePosixPath(HUB["inception"]).stem[-8:]
        if found != wanted:
            raise ValueError(f"{file} is not the published file (SHA-256 {found}..., not "
                             f"{wanted}...): {there}")
        net = cls()
        net.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        net.weights = found
        net = net.to(memory_format=torch.channels_last)              # 1.6 times as fast on a CPU
        return net.requires_grad_(False).eval()

    def __str__(self) -> str:
        return (f"Inception-v3 2015-12-05 (weights {self.weights}) "
                f"after TF-legacy bilinear resize to 299")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Take uint8 (B, 3, H, W) to the features of `activations`."""
        return self.activations((tf_resize(images, 299) - 128) / 128)

    def activations(self, x: Tensor) -> dict[str, Tensor]:
        """Take x (B, 3, 299, 299), in about [-1, 1], to the layers that scores compare.

        pool (B, 2048); spatial (B, 2023); logits (B, 1008) without bias, as the Inception Score's.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))     # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(HALVE(x)))         # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(HALVE(x))))    # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))           # (B, 768, 17, 17)
        # sFID takes 7 channels of this branch: 7 * 17 * 17 numbers, about as many as FID's 2048.
        spatial = self.Mixed_6d.branch1x1(x)[:, :7]                  # (B, 7, 17, 17)
        spatial = spatial.permute(0, 2, 3, 1).flatten(1)             # (B, 2023), channels last
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))           # (B, 1280, 8, 8)
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))      # (B, 2048)
        return {"pool": pool, "spatial": spatial, "logits": F.linear(pool, self.fc.weight)}


# ---- SqueezeNet ----------------------------------------------------------------------------------


class Squeeze(nn.Module):
    """SqueezeNet 1.1, the 5 MB trunk of LPIPS(squeeze): the spatial mean of its last ReLU."""

    layers = ("pool",)

    def __init__(self):
        super().__init__()
        otherwise = "use --features inception"
        content = weights_file("squeeze", otherwise).read_bytes()
        self.weights = hashlib.sha256(content).hexdigest()[:8]
        self.lpips = lpips_network("squeeze", otherwise).to(memory_format=torch.channels_last)

    def __str__(self) -> str:
        return (f"SqueezeNet 1.1 relu7 mean (weights {self.weights}) "
                f"after antialiased bilinear resize to 224")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Take uint8 (B, 3, H, W) to pool (B, 512)."""
        x = F.interpolate(images.float() / 127.5 - 1, (224, 224), mode="bilinear", antialias=True)
        return {"pool": self.lpips.net(self.lpips.scaling_layer(x))[-1].mean(dim=(2, 3))}


def load_features(name: str = "inception", path: str | Path | None = None) -> Inception | Squeeze:
    """Load the network of FID ("inception", from `path` or the cache) or FD-squeeze ("squeeze")."""
    if name not in ("inception", "squeeze"):
        raise ValueError(f"unknown features {name!r}: use inception or squeeze")
    return Inception.load(path) if name == "inception" else Squeeze()


# ---- sets of pictures ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """How pictures become features. Kept with statistics, which serve no other protocol."""

    features: str = "inception"                  # or "squeeze": a small download, but no FID
    size: int | None = None                      # px, of the centre square; None: as stored
    filter: str = "lanczos"                      # of size; INFD's published code uses lanczos
    patch: int | None = None                     # px; one random square per picture (patch FID)
    seed: int = 0                                # of the squares, with the picture's number

    def __post_init__(self):
        if self.filter not in FILTERS:
            raise ValueError(f"unknown filter {self.filter!r}: use {', '.join(FILTERS)}")
        for name in ("size", "patch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def key(self, net: nn.Module) -> dict:
        """List what must agree between two sets, without the settings that have no effect."""
        key = asdict(self) | {"weights": net.weights, "version": VERSION}
        if not self.size:
            key["filter"] = None
        if not self.patch:
            key["seed"] = None
        return key

    def describe(self, pixels: str) -> str:
        """Say how large the pictures are, and why."""
        return f"{pixels}, centre square by {self.filter}" if self.size else f"{pixels} as stored"


def read_npz(path: Path, only: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file, all or `only` some, without pickles.

    A header cannot claim more memory than the file fills, nor the file more than MAX_NPZ.
    Raises OSError where the file cannot be opened, ValueError where it is damaged.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0,
               (2, 0): np.lib.format.read_array_header_2_0}
    with open(path, "rb") as file:               # here the system's own error names the cause
        try:
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    with archive.open(info) as member:
                        shape, _, dtype = readers[np.lib.format.read_magic(member)](member)
                    if math.prod(shape) * dtype.itemsize > min(info.file_size, MAX_NPZ):
                        raise ValueError(f"{info.filename} claims {shape} numbers: more than is "
                                         f"there, or than {MAX_NPZ >> 30} GB")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in only or arrays.files}
        except Exception as error:               # damage makes the reader raise anything
            cause = first_line(error)
            raise ValueError(f"cannot read {shown(path)} as .npz: {cause}") from error


class ImageSet:
    """The pictures of a folder, a zip, a set that data.py prepared, or an .npz batch, by name.

    The batch is arr_0, uint8 (N, H, W, 3). `limit` takes that many pictures, evenly spaced, since
    sorted names are often sorted by class. What the set passes over is said in one line on stderr.
    Raises ValueError and OSError, which name path and cause.
    """

    def __init__(self, path: str | Path, limit: int | None = None):
        self.path = Path(path)
        self.name = shown(path)
        self.rows = None                         # the pixels, where the pictures are no files
        self.prepared = None                     # the size and filter of a prepared set
        self.digests = {}                        # name -> SHA-256 of what was last read
        if self.path.suffix == ".npz":
            self.rows = read_npz(self.path, ["arr_0"])["arr_0"]
            if self.rows.dtype != np.uint8 or self.rows.ndim != 4 or self.rows.shape[3] != 3:
                raise ValueError(f"{self.name}: arr_0 is {self.rows.dtype} {self.rows.shape}, "
                                 f"not uint8 (N, H, W, 3)")
        elif os.path.isfile(self.path / files.PIXELS):   # False where there is no permission
            copy = files.Prepared(self.path, "all")
            self.rows = copy.pixels
            self.prepared = (copy.size, copy.filter)
        if self.rows is None:
            self.store = files.Files(self.path)
            self.names = self.store.pictures
            if self.store.passed_over:
                print(f"{self.name}: {len(self.names)} pictures; passed over: "
                      f"{self.store.passed_over}", file=sys.stderr)
        else:
            self.names = [f"{i:08d}.png" for i in range(len(self.rows))]
        if not self.names:
            raise ValueError(f"{self.name} holds no images ({', '.join(files.EXTENSIONS)})")
        if limit is not None:
            if not 1 <= limit <= len(self):
                raise ValueError(f"{self.name} holds {len(self)} images, not the {limit} asked for")
            self.names = [self.names[i * len(self) // limit] for i in range(limit)]

    def __len__(self) -> int:
        return len(self.names)

    def content(self, name: str) -> bytes:
        """Read what is stored of a picture: its file, or its pixels where it is no file."""
        if self.rows is None:
            content = self.store.read(name)
        else:
            content = self.rows[int(name.removesuffix(".png"))].tobytes()
        self.digests[name] = hashlib.sha256(content).digest()
        return content

    def sha(self) -> str:
        """Hash the contents of all files in order (SHA-256); a folder and a zip of it agree."""
        for name in self.names:
            self.content(name)
        return self.seen()

    def seen(self) -> str:
        """Give what `sha` would have given for the contents as they were last read."""
        shape = b"" if self.rows is None else str(self.rows.shape[1:]).encode()
        digests = b"".join(self.digests[name] for name in self.names)
        return hashlib.sha256(shape + digests).hexdigest()

    def read(self, i: int, protocol: Protocol) -> np.ndarray:
        """Read picture i as uint8 (3, H, W), as `protocol` says. ValueError names the file."""
        wanted = (protocol.size, protocol.filter)
        if self.prepared and protocol.size and self.prepared != wanted:
            raise ValueError(f"{self.name} was prepared with size and filter {self.prepared} "
                             f"instead of {wanted}: choose the same, or give the images")
        name = self.names[i]
        content = self.content(name)
        if self.rows is None:
            image = files.decode(content, self.store.where(name))
        else:
            h, w = self.rows.shape[1:3]
            image = Image.frombytes("RGB", (w, h), content)
        if protocol.size and image.size != (protocol.size, protocol.size):
            w, h = image.size
            side = min(w, h)
            x = (w - side) // 2
            y = (h - side) // 2                  # resize(box=...) would read beyond the square
            square = image.crop((x, y, x + side, y + side))
            how = Image.Resampling[protocol.filter.upper()]
            image = square.resize((protocol.size, protocol.size), how)
        return np.asarray(image).transpose(2, 0, 1)


Images = str | Path | ImageSet | Iterable[Tensor]                    # tensors: batches in [-1, 1]


def image_batches(source: ImageSet | Iterable[Tensor], protocol: Protocol, batch: int,
                  workers: int) -> Iterator[Tensor]:
    """Yield pictures in order, uint8 (B, 3, H, W); threads decode the next batch meanwhile.

    Raises ValueError where a set has several sizes.
    """
    if not isinstance(source, ImageSet):
        for images in source:
            yield torch.from_numpy(to_uint8(images)).movedim(-1, 1)
        return
    if min(batch, workers) < 1:
        raise ValueError(f"batch and workers must be at least 1, got {batch} and {workers}")
    chunks = [range(i, min(i + batch, len(source))) for i in range(0, len(source), batch)]
    chunks.append(range(0))                      # nothing is read ahead of the last batch's end
    size = None
    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(source.read, i, protocol) for i in chunks[0]]
        for k, chunk in enumerate(tqdm(chunks[:-1], source.name, disable=None, leave=False)):
            reading = ahead
            ahead = [pool.submit(source.read, i, protocol) for i in chunks[k + 1]]
            images = [future.result() for future in reading]
            size = size or size_of(images[0])
            for i, image in zip(chunk, images):
                if size_of(image) != size:
                    name = f"{source.name}/{shown(source.names[i])}"
                    raise ValueError(f"mixed sizes: {name} is {size_of(image)}, others are {size}; "
                                     f"use --size to resize all")
            yield torch.from_numpy(np.stack(images))


def size_of(image: np.ndarray | Tensor) -> str:
    """Say how large (..., 32, 64) is, as people do: "64x32"."""
    return f"{image.shape[-1]}x{image.shape[-2]}"


def crop_patches(images: Tensor, numbers: Sequence[int], patch: int, seed: int) -> Tensor:
    """Cut a random square from each of (B, 3, H, W), by the seed and the picture's number."""
    H, W = images.shape[2:]
    if patch > min(H, W):
        raise ValueError(f"a patch of {patch} px does not fit into images of {W}x{H}")
    patches = []
    for image, number in zip(images, numbers):
        generator = np.random.default_rng((seed, number))
        y, x = generator.integers(0, (H - patch + 1, W - patch + 1))
        patches.append(image[:, y:y + patch, x:x + patch])
    return torch.stack(patches)                                      # (B, 3, patch, patch)


# ---- statistics of a set -------------------------------------------------------------------------


def check_finite(features: Tensor) -> None:
    """Refuse NaN and infinity, which would spoil every later number or be clamped away."""
    if not torch.isfinite(features).all():
        raise ValueError("a feature is NaN or infinite: damaged weights, or pictures")


class Moments:
    """Mean and covariance of rows that come in batches, in float64 (Chan et al. 1979)."""

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)    # sum of (x-mean) (x-mean)^T

    def add(self, rows: Tensor) -> None:
        """Take in rows (B, D)."""
        check_finite(rows)
        rows = rows.double()
        mean = rows.mean(dim=0)
        delta = mean - self.mean
        total = self.count + len(rows)
        self.scatter.addr_(delta, delta, alpha=self.count * len(rows) / total)
        self.scatter.addmm_((rows - mean).T, rows - mean)
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Give the covariance (D, D), divided by n - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


@dataclass
class Statistics:
    """What one set of pictures contributes to its scores."""

    source: str
    protocol: dict                               # Protocol.key
    count: int
    pixels: str                                  # "64x64", before patches are cut
    sha: str = ""                                # of the contents, for references
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)      # mean, covariance
    rows: dict[str, Tensor] = field(default_factory=dict)            # layer -> (N, D)


def statistics(source: Images, net: nn.Module, protocol: Protocol = Protocol(),
               moments: Iterable[str] = ("pool",), rows: Iterable[str] = (), batch: int = 32,
               workers: int = 4) -> Statistics:
    """Run `net` once over a set of pictures; keep moments, rows or both of the layers named."""
    source = ImageSet(source) if isinstance(source, (str, Path)) else source
    device = next(net.parameters()).device
    sums = {}
    kept = {layer: bytearray() for layer in rows}        # grows in place: 50,000 x 2048 are 400 MB,
    count = 0                                            # and a list of tensors fragments the heap
    sizes = set()
    with torch.no_grad():
        for images in image_batches(source, protocol, batch, workers):
            sizes.add(size_of(images))
            if protocol.patch:
                numbers = range(count, count + len(images))
                images = crop_patches(images, numbers, protocol.patch, protocol.seed)
            count += len(images)
            features = {layer: x.cpu() for layer, x in net(images.to(device)).items()}
            for layer in moments:
                if layer not in sums:
                    sums[layer] = Moments(features[layer].shape[1])
                sums[layer].add(features[layer])
            for layer in rows:
                kept[layer] += features[layer].float().numpy().tobytes()
    if count < 2:
        raise ValueError(f"too few images: {count}, at least 2 are needed")
    if len(sizes) > 1:
        raise ValueError(f"mixed sizes ({', '.join(sorted(sizes))}): render or resize to one")

    name = source.name if isinstance(source, ImageSet) else "images"
    result = Statistics(name, protocol.key(net), count, sizes.pop())
    for layer, total in sums.items():
        result.moments[layer] = (total.mean, total.covariance())
    for layer, content in kept.items():
        result.rows[layer] = torch.frombuffer(content, dtype=torch.float32).view(count, -1)
    return result
