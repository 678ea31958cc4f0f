"""Score pictures: one against another, or a whole set against a set of real ones.

These are the numbers in the tables of both papers: CM-Func, Section 4.1 and Tables 1, 2, 4-7; INFD
supplementary, Tables 1-2 and Figure 3. FID is defined on one Inception-v3 (Heusel et al. 2017);
SqueezeNet stands in where its file cannot be had. Read `frechet_distance` and `evaluate` first.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import runs
from commandline import Parser
from data import PIXELS, Photo, Photos, Prepared, fingerprint, import_torchvision, to_uint8
from files import Files, centre_square, reading, shown

HUB = {
    "inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}
VERSION = 3                                      # of how pictures become features: raise with it
MAX_NPZ = 2**32                                  # bytes of the pictures in an .npz file


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Measure the peak signal-to-noise ratio in dB of pictures (B, 3, H, W) in [-1, 1] -> (B,)."""
    mse = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().mean(dim=(1, 2, 3))
    return -10 * mse.log10()


# ---- networks ----


def hub_file(name: str) -> Path:
    """Say where torch hub keeps a network's published file."""
    return Path(torch.hub.get_dir(), "checkpoints", HUB[name].rpartition("/")[2])


def weights_of(name: str, otherwise: str) -> contextlib.AbstractContextManager:
    """Where loading fails, say which file to put where, or what to do `otherwise`."""
    remedy = f"; put {HUB[name]} there, or {otherwise}"
    return reading(f"cannot load {hub_file(name)}", remedy=remedy)


def lpips_network(net: str = "vgg",
                  otherwise: str = "train without it: lpips=none, or preset tiny") -> nn.Module:
    """Load LPIPS v0.1, the perceptual distance of two pictures (Zhang et al. 2018).

    It takes a, b (B, 3, H, W) in [-1, 1] to (B, 1, 1, 1). It is frozen and in eval mode: in train
    mode the dropout inside its heads makes the value scatter.
    """
    if net not in ("vgg", "alex", "squeeze"):
        raise ValueError(f"unknown LPIPS network {net!r}: use vgg, alex or squeeze")
    import_torchvision()                         # mended where it was built for another torch
    import lpips
    with weights_of(net, otherwise), warnings.catch_warnings():
        warnings.simplefilter("ignore")          # lpips 0.1.4 calls torchvision in an older way
        return lpips.LPIPS(net=net, verbose=False).requires_grad_(False).eval()


def tf_resize(images: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to a square as TensorFlow 1 did: pixel i reads at i * H / size."""
    padded = F.pad(images.float(), (0, 1, 0, 1), mode="replicate")
    wide = F.interpolate(padded, (size + 1, size + 1), mode="bilinear", align_corners=True)
    return wide[..., :size, :size]


class Inception(nn.Module):
    """Inception-v3 as FID needs it: TensorFlow's graph of 2015-12-05, under torchvision's names.

    Unlike torchvision's, its averages do not count the padding, and its last block pools by max.
    """

    name = "Inception-v3 2015-12-05 after TF-legacy bilinear resize to 299"
    layers = ("pool", "spatial")                 # whose moments scores compare

    def __init__(self):
        super().__init__()
        models = import_torchvision().models
        net = models.inception.Inception3(1008, aux_logits=False, init_weights=False)
        for name, part in net.named_children():  # in the order in which they run
            self.add_module(name, part)

    def forward(self, images: Tensor) -> dict[str, Tensor]:          # uint8 (B, 3, H, W)
        return self.activations((tf_resize(images, 299) - 128) / 128)

    def activations(self, x: Tensor) -> dict[str, Tensor]:
        """Take x (B, 3, 299, 299), in about [-1, 1], to pool, spatial, and logits without bias."""
        *parts, (_, fc) = self.named_children()
        for name, part in parts:
            if name == "Mixed_6d":               # sFID: 7 * 17 * 17 numbers, about as many as FID
                spatial = part.branch1x1(x)[:, :7].movedim(1, -1).flatten(1)         # (B, 2023)
            if hasattr(part, "branch_pool"):
                pooled = (F.max_pool2d(x, 3, 1, 1) if name == "Mixed_7c" else
                          F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
                x = torch.cat([*part._forward(x)[:-1], part.branch_pool(pooled)], dim=1)
            else:
                x = part(x)
        x = x.flatten(1)                                             # (B, 2048)
        return {"pool": x, "spatial": spatial, "logits": x @ fc.weight.T}            # (B, 1008)


class Squeeze(nn.Module):
    """SqueezeNet 1.1, the 5 MB trunk of LPIPS(squeeze): the spatial mean of its last ReLU."""

    name = "SqueezeNet 1.1 relu7 mean after antialiased bilinear resize to 224"
    layers = ("pool",)

    def __init__(self):
        super().__init__()
        self.lpips = lpips_network("squeeze", "use --features inception")

    def forward(self, images: Tensor) -> dict[str, Tensor]:          # uint8 (B, 3, H, W)
        x = F.interpolate(images.float() / 127.5 - 1, (224, 224), mode="bilinear", antialias=True)
        return {"pool": self.lpips.net(self.lpips.scaling_layer(x))[-1].mean(dim=(2, 3))}


def load_features(name: str = "inception") -> Inception | Squeeze:
    """Load the network of FID ("inception") or FD-squeeze ("squeeze"), frozen; its name ends in
    the first digits of the file's SHA-256. Another Inception than the published one is refused."""
    with weights_of(name, "use other --features"):
        if name == "squeeze":
            net = Squeeze()
        else:
            weights = torch.hub.load_state_dict_from_url(HUB[name], map_location="cpu",
                                                         check_hash=True, weights_only=True)
            net = Inception()
            net.load_state_dict(weights)
        digest = hashlib.sha256(hub_file(name).read_bytes()).hexdigest()[:8]
        if name != "squeeze" and digest not in HUB[name]:
            raise ValueError("not the published file")
    net.name += f", weights {digest}"
    net = net.to(memory_format=torch.channels_last)          # 1.6 times as fast on a CPU
    return net.requires_grad_(False).eval()


# ---- sets of pictures ----


@dataclass(frozen=True)
class Protocol:
    """How pictures become features."""

    features: str = "inception"                  # or "squeeze": a small download, but no FID
    size: int = 0                                # px, of the centre square; 0: as stored
    filter: str = "lanczos"                      # of size; INFD's published code uses lanczos
    patch: int = 0                               # px; one random square per picture (patch FID)
    seed: int = 0                                # of the squares, with the picture's number


def read_npz(path: Path) -> np.ndarray:
    """Read arr_0, uint8 (N, H, W, 3), of an .npz file; DataError where there is none."""
    with reading(shown(path)):
        arrays = np.load(path, allow_pickle=False)
        if arrays.zip.getinfo("arr_0.npy").file_size > MAX_NPZ:
            raise ValueError(f"arr_0 fills more than {MAX_NPZ >> 30} GB")
        rows = arrays["arr_0"]
        if rows.dtype != np.uint8 or rows.shape[3:] != (3,):
            raise ValueError(f"arr_0 is {rows.dtype} {rows.shape}, not uint8 (N, H, W, 3)")
        return rows


class ImageSet:
    """The pictures of a folder, a zip, a set that data.py prepared, or an .npz batch.

    `limit` takes that many, evenly spaced. Raises ValueError and OSError, which name the file.
    """

    def __init__(self, path: str | Path, limit: int = 0):
        self.path = Path(path)
        self.name = shown(path)
        self.prepared = None                     # the size and filter of a prepared set
        self.files: Files | None = None
        if self.path.suffix == ".npz":
            rows = read_npz(self.path)
            self.digest = hashlib.sha256(rows).hexdigest()
            pictures = [Photo(f"{i:08d}", partial(Image.fromarray, row))
                        for i, row in enumerate(rows)]
        elif os.path.isfile(self.path / PIXELS):             # False where there is no permission
            pictures = Prepared(self.path, "all")
            self.digest = fingerprint(pictures)["digest"]
            self.prepared = (pictures.size, pictures.filter)
        else:
            self.files = files = Files(self.path)
            pictures = Photos(files, files.pictures, [0] * len(files.pictures), (), "")
            self.digest = fingerprint(pictures)["digest"]
            if files.passed_over:
                print(f"{self.name}: {len(pictures)} pictures; passed over: {files.passed_over}",
                      file=sys.stderr)
        n = len(pictures)
        if n < (limit or 1):
            raise ValueError(f"{self.name} holds {n} images, not {limit or 'any'}")
        self.pictures = [pictures[i * n // (limit or n)] for i in range(limit or n)]

    def content(self) -> str:
        """Hash what the files hold: names and sizes may stay where a picture has changed."""
        total = hashlib.sha256(self.digest.encode())
        for name in self.files.pictures if self.files else ():
            total.update(hashlib.sha256(self.files.read(name)).digest())
        return total.hexdigest()

    def read(self, i: int, protocol: Protocol) -> np.ndarray:
        """Read picture i as uint8 (3, H, W), as `protocol` says."""
        size = protocol.size
        if self.prepared and size and self.prepared != (size, protocol.filter):
            raise ValueError(f"{self.name} was prepared with size and filter {self.prepared}: "
                             f"choose the same, or give the images")
        image = self.pictures[i].read()
        if size:
            resampling = Image.Resampling[protocol.filter.upper()]
            image = centre_square(image).resize((size, size), resampling)
        return np.asarray(image).transpose(2, 0, 1)


Images = str | Path | ImageSet | Iterable[Tensor]            # tensors: (B, 3, H, W) in [-1, 1]


def image_batches(source: ImageSet | Iterable[Tensor], protocol: Protocol,
                  batch: int = 32) -> Iterator[Tensor]:
    """Yield pictures in order, uint8 (B, 3, H, W); threads decode the next batch meanwhile."""
    if not isinstance(source, ImageSet):
        for images in source:
            yield torch.from_numpy(to_uint8(images)).movedim(-1, 1)
        return
    numbers = range(len(source.pictures))
    read = partial(source.read, protocol=protocol)
    with ThreadPoolExecutor() as pool:
        ahead = pool.map(read, numbers[:batch])
        for start in tqdm(numbers[::batch], source.name, disable=None, leave=False):
            images = list(ahead)
            ahead = pool.map(read, numbers[start + batch:start + 2 * batch])
            if len({image.shape for image in images}) > 1:
                raise ValueError(f"{source.name} holds images of several sizes: use --size")
            yield torch.from_numpy(np.stack(images))


def crop_patches(images: Tensor, first: int, patch: int, seed: int) -> Tensor:
    """Cut a square (INFD G, Table 2) of each of (B, 3, H, W), pictures number `first` and on."""
    H, W = images.shape[2:]
    if patch > min(H, W):
        raise ValueError(f"a patch of {patch} px does not fit into images of {W}x{H}")
    patches = []
    for number, image in enumerate(images, first):
        generator = np.random.default_rng((seed, number))
        y, x = generator.integers(0, (H - patch + 1, W - patch + 1))
        patches.append(image[:, y:y + patch, x:x + patch])
    return torch.stack(patches)                                      # (B, 3, patch, patch)


# ---- statistics of a set ----


class Moments:
    """Mean and covariance of rows that come in batches, in float64 (Chan et al. 1979)."""

    def __init__(self, dim: int):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)    # sum of (x-mean) (x-mean)^T

    def add(self, rows: Tensor) -> None:                             # (B, D)
        rows = rows.double()
        mean = rows.mean(dim=0)
        delta = mean - self.mean
        total = self.count + len(rows)
        self.scatter.addr_(delta, delta, alpha=self.count * len(rows) / total)
        self.scatter.addmm_((rows - mean).T, rows - mean)
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    def covariance(self) -> Tensor:                                  # (D, D)
        return self.scatter / (self.count - 1)


@dataclass
class Statistics:
    """What one set of pictures contributes to its scores."""

    source: str                                  # the set and its number of pictures, in words
    count: int
    pixels: str                                  # "64x64", before patches are cut
    moments: dict[str, tuple[Tensor, Tensor]]    # layer -> mean (D,), covariance (D, D)
    rows: dict[str, Tensor]                      # layer -> (N, D)


def statistics(source: Images, net: nn.Module, protocol: Protocol = Protocol(),
               rows: Iterable[str] = ()) -> Statistics:
    """Run `net` once over a set of pictures; keep moments, and of the layers `rows` every row."""
    source = ImageSet(source) if isinstance(source, (str, Path)) else source
    device = next(net.parameters()).device
    sums = {}
    kept = {layer: [] for layer in rows}
    count = 0
    sizes = set()
    with torch.no_grad():
        for images in image_batches(source, protocol):
            sizes.add("{1}x{0}".format(*images.shape[2:]))
            if protocol.patch:
                images = crop_patches(images, count, protocol.patch, protocol.seed)
            count += len(images)
            for layer, x in net(images.to(device)).items():
                x = x.cpu()                                          # (B, D)
                if not x.isfinite().all():
                    raise ValueError("a feature is NaN or infinite: damaged weights, or pictures")
                if layer in net.layers:
                    sums.setdefault(layer, Moments(x.shape[1])).add(x)
                if layer in kept:
                    kept[layer].append(x.float())
    if count < 2 or len(sizes) > 1:
        raise ValueError(f"{count} images of {len(sizes)} sizes: two of one (--size) are needed")
    moments = {layer: (total.mean, total.covariance()) for layer, total in sums.items()}
    whole = {layer: torch.cat(parts) for layer, parts in kept.items()}       # (count, D)
    name = f"{getattr(source, 'name', 'images')} ({count})"
    return Statistics(name, count, sizes.pop(), moments, whole)


def reference_statistics(source: str | Path, net: nn.Module, protocol: Protocol,
                         rows: Iterable[str] = (),
                         cache: str | Path | None = None) -> Statistics:
    """Take a reference's statistics from the file kept beside it (or in `cache`), or make that.

    The file is named by what the pictures hold and the protocol, so that it serves no others.
    """
    images = ImageSet(source)
    path = images.path.resolve()
    known_by = f"{images.content()} {protocol} {net.name} {VERSION}"
    key = hashlib.sha256(known_by.encode()).hexdigest()
    file = Path(cache or path.parent, f"{path.stem}-{key[:16]}.stats.pt")
    with contextlib.suppress(OSError, ValueError, TypeError):        # missing, or damaged
        kept = Statistics(**runs.read_checkpoint(file))
        if kept.rows.keys() >= set(rows):
            return kept
    result = statistics(images, net, protocol, rows)
    result.source += f", digest {images.digest[:12]}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        runs.write_checkpoint(file, vars(result))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"reference statistics not kept ({runs.first_line(error)}): --cache names another "
              f"folder", file=sys.stderr)
    return result


# ---- two sets of features ----


def root(sigma: Tensor) -> Tensor:
    """Factor a covariance (D, D) of rank r as R R^T; gives R (D, r)."""
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps         # rounding
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Measure how far apart two Gaussians are, as FID does: squared, >= 0, in float64.

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). With S = R R^T, the trace of (S1 S2)^(1/2) is the
    sum of the singular values of R1^T R2, exact also for sets smaller than D, or a set and itself,
    where the square root of a product (sqrtm) loses half of the digits.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(m).double() for m in (mu1, sigma1, mu2, sigma2))
    overlap = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    spread = sigma1.trace() + sigma2.trace() - 2 * overlap
    return ((mu1 - mu2).square().sum() + spread).clamp(min=0).item()


def kid(samples: Tensor, reference: Tensor) -> float:
    """Measure how far apart sets of features (N, D), (M, D) are, without FID's bias on small sets.

    The unbiased estimate, of all pairs, of the squared maximum mean discrepancy under the kernel
    (x.y / D + 1)^3 (Binkowski et al. 2018); its mean is 0 for one distribution, so it may be < 0.
    """
    def total(a: Tensor, b: Tensor) -> float:
        return sum((rows @ b.T / b.shape[1] + 1).pow(3).sum().item() for rows in a.split(1000))

    x = samples.double()
    y = reference.double()
    value = -2 * total(x, y) / (len(x) * len(y))
    for rows in (x, y):
        with_itself = (rows.square().mean(dim=1) + 1).pow(3).sum().item()
        value += (total(rows, rows) - with_itself) / (len(rows) * (len(rows) - 1))
    return value


def inception_score(logits: Tensor, split_size: int = 5000,
                    splits: int | None = None) -> tuple[float, float]:
    """Measure how sure and how varied the classes of pictures are (Salimans et al. 2016).

    exp of the mean KL(p(y|x) || p(y)) over blocks of logits (N, classes) -> mean and spread of the
    blocks: of `split_size` as in the ADM evaluator, or `splits` equal ones as in others.
    """
    if splits:
        blocks = logits.tensor_split([len(logits) * i // splits for i in range(1, splits)])
    else:
        blocks = logits.split(split_size)
    scores = []
    for block in blocks:
        log_p = block.double().log_softmax(dim=1)
        p = log_p.exp()
        kl = p * log_p - torch.xlogy(p, p.mean(dim=0))               # 0 log 0 = 0
        scores.append(kl.sum(dim=1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def knn_radii(x: Tensor, k: int, block: int = 1000) -> Tensor:
    """Measure the distance (N,) of each row of x (N, D) to its k-th nearest other row."""
    distances = (torch.cdist(rows, x) for rows in x.split(block))
    return torch.cat([distance.kthvalue(k + 1, dim=1).values for distance in distances])


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3,
                     block: int = 1000) -> tuple[float, float]:
    """Measure fidelity and variety: precision and recall (Kynkaanniemi et al. 2019).

    Features (N, D), (M, D) -> the share of samples inside the reference's manifold, and the other
    way round. A manifold is the union of balls that reach to each point's k-th neighbour, borders
    included. In float64, where the ADM evaluator computes in float16.
    """
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on each side")
    samples = samples.double()
    reference = reference.double()
    slack = 1e-6 * torch.cat([samples, reference]).norm(dim=1).max()         # a distance 0 rounds
    reach = knn_radii(reference, k, block) + slack                   # (M,)
    sample_reach = knn_radii(samples, k, block) + slack              # (N,)
    inside = 0
    covered = torch.zeros(len(reference), dtype=torch.bool)
    for rows, radii in zip(samples.split(block), sample_reach.split(block)):
        distance = torch.cdist(rows, reference)                      # (block, M)
        inside += (distance <= reach).any(dim=1).sum().item()
        covered |= (distance <= radii[:, None]).any(dim=0)
    return inside / len(samples), covered.double().mean().item()


# ---- scores ----


@dataclass(frozen=True)
class Score:
    """A number that says how it came about: str() is one line to read."""

    name: str                                    # "FID@5000": always with the number of samples
    value: float
    protocol: dict[str, object]

    def __str__(self) -> str:
        words = [f"{key} {what}" for key, what in self.protocol.items()]
        return " | ".join([f"{self.name} = {self.value:.6g}", *words])


ROWS = {"fid": [], "sfid": [], "kid": ["pool"], "is": ["logits"], "pr": ["pool"]}    # kept whole


def measure(name: str, ours: Statistics, theirs: Statistics | None) -> dict[str, float]:
    """Compute one score, or the two of "pr", by its title."""
    if name == "is":
        return {"IS": inception_score(ours.rows["logits"])[0]}
    if name == "kid":
        return {"KID": kid(ours.rows["pool"], theirs.rows["pool"])}
    if name == "pr":
        return dict(zip("PR", precision_recall(ours.rows["pool"], theirs.rows["pool"])))
    title, layer = {"fid": ("FID", "pool"), "sfid": ("sFID", "spatial")}[name]
    return {title: frechet_distance(*ours.moments[layer], *theirs.moments[layer])}


def evaluate(names: Sequence[str], samples: Images, reference: str | Path | None = None,
             protocol: Protocol = Protocol(), net: nn.Module | None = None,
             cache: str | Path | None = None, device: torch.device | str = "cpu") -> list[Score]:
    """Score a set of pictures in one pass: any of "fid", "sfid", "kid", "is", "pr" (two scores).

    With protocol.patch, "fid" is the patch FID of INFD (Table 2). `net` saves loading it. Raises
    ValueError where a set or a setting does not fit.
    """
    squeeze = protocol.features == "squeeze"
    alone = set(names) == {"is"}                 # needs no reference
    if not set(names) <= ROWS.keys():
        raise ValueError(f"unknown score in {','.join(names)}: use {', '.join(ROWS)}")
    if squeeze and {"sfid", "is"} & set(names):
        raise ValueError("sfid and is are defined on Inception alone: use --features inception")
    if protocol.patch and set(names) != {"fid"}:
        raise ValueError("only fid has a form on patches")
    net = (net or load_features(protocol.features)).to(device)
    rows = {layer for name in names for layer in ROWS[name]}
    theirs = None
    if not alone:                                # first: a name may be mistyped
        theirs = reference_statistics(reference, net, protocol, rows & {"pool"}, cache)
    ours = statistics(samples, net, protocol, rows)
    if theirs and theirs.pixels != ours.pixels:
        raise ValueError(f"samples of {ours.pixels}, reference of {theirs.pixels}: use --size")
    line = {"samples": ours.source, "reference": "none" if alone else theirs.source,
            "pixels": ours.pixels, **asdict(protocol), "features": net.name}
    scores = []
    for name in names:
        for title, value in measure(name, ours, theirs).items():
            title = title.replace("ID", "D") + "-squeeze" if squeeze else title
            title = f"p{title}-{protocol.patch}/{ours.pixels}" if protocol.patch else title
            scores.append(Score(f"{title}@{ours.count}", value, line))
    return scores


def per_image(title: str, score: Callable[..., Tensor], sets: list[ImageSet], protocol: Protocol,
              features: str, device: torch.device | str) -> Score:
    """Average score(*images) over sets side by side, each image (1, 3, H, W) in [-1, 1]."""
    values = []
    with torch.no_grad():
        for images in zip(*(image_batches(one, protocol, batch=1) for one in sets)):
            if len({image.shape for image in images}) > 1:
                raise ValueError("two sets of different sizes: use --size")
            values.append(score(*(image.to(device) / 127.5 - 1 for image in images)).item())
    if np.isnan(values).any():
        raise ValueError("the score of an image is NaN")
    names = [f"{one.name} ({len(values)})" for one in sets]
    line = dict(zip(("samples", "reference"), names)) | asdict(protocol) | {"features": features}
    return Score(f"{title}@{len(values)}", float(np.mean(values)), line)


def compare(name: str, samples: ImageSet, reference: ImageSet, protocol: Protocol = Protocol(),
            net: str = "vgg", device: torch.device | str = "cpu") -> Score:
    """Average "psnr" (dB) or "lpips" (by `net`) over the pictures of one name in two sets.

    A name may end in the size, as those of sample.py do: seed0-000001-256x256.png. Pictures of
    prepared sets have numbers.
    """
    def plain(picture: Photo) -> str:
        if picture.prepared:
            return picture.name.rpartition(" number ")[2]
        return re.sub(r"(-\d+x\d+)?\.\w+$", "", os.path.basename(picture.name))

    sets = [samples, reference]
    for images in sets:
        images.pictures.sort(key=plain)
    for pair in zip_longest(*(map(plain, images.pictures) for images in sets)):
        if pair[0] != pair[1]:
            raise ValueError(f"{name} compares images of one name in {samples.name} and in "
                             f"{reference.name}, not {pair[0]} and {pair[1]}")
    if name == "psnr":
        return per_image("PSNR", psnr, sets, protocol, "none, peak 1", device)
    network = lpips_network(net, "use --lpips squeeze").to(device)
    return per_image(f"LPIPS-{net}", network, sets, protocol, "LPIPS v0.1", device)


IQA = ("niqe", "clipiqa", "musiq", "maniqa")     # CM-Func, Tables 4 and 6; lower is better for niqe


def no_reference(name: str, samples: ImageSet, protocol: Protocol = Protocol(), smallest: int = 224,
                 device: torch.device | str = "cpu") -> Score:
    """Measure quality without a reference, as the optional package pyiqa defines it.

    NIQE needs 96 px and the paper does not say how images of 32 and 64 px got there (CM-Func,
    Appendix D.1): smaller ones are enlarged (bicubic) to a shorter side of `smallest` px.
    """
    with reading(f"{name} needs the package pyiqa (pip install pyiqa) and its weights"):
        import pyiqa
        metric = pyiqa.create_metric(name, device=torch.device(device))

    def score(x: Tensor) -> Tensor:
        scale = smallest / min(x.shape[2:])
        if scale > 1:
            x = F.interpolate(x, [round(side * scale) for side in x.shape[2:]], mode="bicubic")
        return metric((x * 0.5 + 0.5).clamp(0, 1))

    features = f"pyiqa {name}, smaller images enlarged to {smallest} px (bicubic)"
    return per_image(name.upper(), score, [samples], protocol, features, device)


# ---- command line ----


def parser() -> Parser:
    """Describe the command line."""
    p = Parser(description="Score SAMPLES against REFERENCE: folders, zips, prepared sets, .npz "
                           "batches.")
    add = p.add_argument
    add("metric", help=f"fid, sfid, kid, is, pr in one pass (fid,kid), fd (= fid --features "
                       f"squeeze), pfid; psnr, lpips; {', '.join(IQA)}")
    add("samples", type=Path)
    add("reference", type=Path, nargs="?")
    add("--features", choices=("inception", "squeeze"), default="inception")
    add("--size", type=int, default=0, help="px; resize the centre square of every image")
    add("--filter", choices=("nearest", "box", "bilinear", "bicubic", "lanczos"), default="lanczos")
    add("--patch", type=int, default=0, help="px; side of the random squares of pfid")
    add("--seed", type=int, default=0, help="of these squares")
    add("--limit", type=int, default=0, help="use this many of the samples, evenly spaced")
    add("--lpips", choices=("vgg", "alex", "squeeze"), default="vgg")
    add("--cache", type=Path, help="folder of reference statistics (default: beside the reference)")
    add("--device", default="auto", help="auto, cuda, mps, cpu")
    return p


def scores(args: argparse.Namespace) -> Iterator[Score]:
    """Yield the scores that the command line asks for, each as soon as it is there."""
    names = ["fid"] if args.metric in ("fd", "pfid") else args.metric.split(",")
    if not (set(names) <= ROWS.keys() or set(names) <= {"psnr", "lpips", *IQA}):
        raise ValueError(f"{args.metric} is not fd, pfid, or some of {', '.join(ROWS)}, or some of "
                         f"psnr, lpips, {', '.join(IQA)}")
    if args.metric == "pfid" and not args.patch:
        raise ValueError("pfid needs the side of its squares: --patch 256")
    if args.patch and set(names) != {"fid"}:
        raise ValueError("--patch is of pfid: only fid has a form on patches")
    if min(args.size, args.patch, args.limit) < 0:
        raise ValueError("--size, --patch and --limit must not be negative")
    if args.filter != Protocol.filter and not args.size:
        raise ValueError("--filter says how --size scales: give --size too")
    features = "squeeze" if args.metric == "fd" else args.features
    protocol = Protocol(features, args.size, args.filter, args.patch, args.seed)
    if args.reference is None and not set(names) <= {"is", *IQA}:
        raise ValueError(f"{args.metric} needs a REFERENCE to compare with")
    device = runs.pick_device(args.device)
    samples = ImageSet(args.samples, args.limit)
    if set(names) <= ROWS.keys():
        yield from evaluate(names, samples, args.reference, protocol, None, args.cache, device)
        return
    for name in names:
        if name in IQA:
            yield no_reference(name, samples, protocol, device=device)
        else:
            reference = ImageSet(args.reference, args.limit)
            yield compare(name, samples, reference, protocol, args.lpips, device)


def run(argv: list[str]) -> None:
    """Print every score as soon as it is there, as a line and as JSON."""
    for score in scores(parser().read(argv)):
        print(score, json.dumps(asdict(score)), sep="\n", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Print scores, each as a line with its protocol and as JSON."""
    return runs.cli(run, sys.argv[1:] if argv is None else argv,
                    "stopped; finished scores stand above", "use --device cpu")


if __name__ == "__main__":
    sys.exit(main())
