"""Score pictures: one against another, or a whole set against a set of real ones.

These are the numbers in the tables of both papers: CM-Func, Section 4.1 and Tables 1, 2, 4-7; INFD
supplementary, Tables 1-2 and Figure 3. sample.py makes the pictures, features.py the features that
are compared here. Read `frechet_distance` and `evaluate` first; `python metrics.py -h` for use.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runs
from features import (FILTERS, Images, ImageSet, Inception, Moments, Protocol, Squeeze, Statistics,
                      check_finite, image_batches, load_features, lpips_network, read_npz, size_of,
                      statistics)                # all names that a user of this module needs
from data import shown

# ---- two pictures: PSNR, scale consistency -------------------------------------------------------


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Measure the peak signal-to-noise ratio in dB of pictures (B, 3, H, W) in [-1, 1] -> (B,).

    Values are clamped; the peak is 1 on a [0, 1] scale. Equal pictures give infinity.
    """
    if a.shape != b.shape:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"psnr needs two batches of one shape, got {shapes}")
    mse = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().mean(dim=(1, 2, 3))
    return -10 * mse.log10()


def scale_consistency(draw: Callable[[int], Tensor], res: int,
                      lpips: nn.Module | None = None) -> dict[str, float]:
    """Measure whether a render keeps its content across scales (INFD, Section B and Figure 3).

    draw(res) renders the same fields at res x res, (B, 3, res, res) in [-1, 1]. The render at
    2 res, averaged over 2 x 2 pixels, is compared with the render at res: mean PSNR in dB, and mean
    LPIPS where a network is given. The paper shows pictures and gives no number; the area average
    is our choice of downsampling.
    """
    with torch.no_grad():
        once = draw(res)                                             # (B, 3, res, res)
        twice = F.avg_pool2d(draw(2 * res), 2)                       # (B, 3, res, res)
        scores = {"psnr": psnr(once, twice).mean().item()}
        if lpips is not None:
            scores["lpips"] = lpips(once.clamp(-1, 1), twice.clamp(-1, 1)).mean().item()
    return scores


# ---- two sets of features ------------------------------------------------------------------------


def root(sigma: Tensor) -> Tensor:
    """Factor a covariance (D, D) of rank r as R R^T; gives R (D, r)."""
    values, vectors = torch.linalg.eigh(sigma)
    rounding = values[-1] * len(values) * torch.finfo(values.dtype).eps
    kept = values > rounding
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Measure how far apart two Gaussians are, as FID does: squared, >= 0, in float64.

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). With S = R R^T, the trace of (S1 S2)^(1/2) is the
    sum of the singular values of R1^T R2. This needs symmetric eigenvalues only, never a root of a
    rounding error, so sets smaller than D and a set against itself are exact: a product's square
    root (sqrtm) loses half of the digits there.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(m).double() for m in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != 2 * mu1.shape:
        shapes = f"{tuple(sigma1.shape)} and {tuple(sigma2.shape)}"
        raise ValueError(f"statistics of different features: {shapes}")
    for values in (mu1, sigma1, mu2, sigma2):
        check_finite(values)
    overlap = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    spread = sigma1.trace() + sigma2.trace() - 2 * overlap
    return max(0.0, ((mu1 - mu2).square().sum() + spread).item())


def kernel_sum(x: Tensor, y: Tensor, block: int = 1000) -> float:
    """Sum (x.y / D + 1)^3 over all pairs of rows of (N, D) and (M, D); float64, in blocks."""
    total = 0.0
    for a in x.split(block):
        for b in y.split(block):
            total += (a.double() @ b.double().T / x.shape[1] + 1).pow(3).sum().item()
    return total


def kid(samples: Tensor, reference: Tensor) -> float:
    """Measure how far apart two sets of features are, without FID's bias on small sets.

    (N, D) and (M, D) -> the unbiased estimate, from all pairs, of the squared maximum mean
    discrepancy under the kernel (x.y / D + 1)^3 (Binkowski et al. 2018). Its mean is 0 for two
    sets of one distribution, so single values may be negative. Tables that average subsets of
    1,000 pictures estimate the same number, with more noise. Two sets of 5,000 take seconds on a
    CPU, of 50,000 minutes.
    """
    n = len(samples)
    m = len(reference)
    if min(n, m) < 2:
        raise ValueError(f"KID needs at least 2 images on each side, got {n} and {m}")
    value = -2 * kernel_sum(samples, reference) / (n * m)
    for rows in (samples, reference):
        check_finite(rows)
        with_itself = (rows.double().square().mean(dim=1) + 1).pow(3).sum().item()
        value += (kernel_sum(rows, rows) - with_itself) / (len(rows) * (len(rows) - 1))
    return value


def inception_score(logits: Tensor, split_size: int = 5000,
                    splits: int | None = None) -> tuple[float, float]:
    """Measure how sure and how varied the classes of pictures are (Salimans et al. 2016).

    exp of the mean KL(p(y|x) || p(y)) over consecutive blocks -> mean and spread of the blocks.
    Blocks of `split_size` (the last may be shorter) as in the ADM evaluator, or `splits` equal ones
    as in others. logits (N, classes), without bias.
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
        kl = p * (log_p - p.mean(dim=0).log())
        kl = kl.nan_to_num(0.0).sum(dim=1)                           # 0 log 0 = 0: a vanished class
        scores.append(kl.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Measure the squared distances (N, M) between the rows of (N, D) and (M, D)."""
    distance = torch.addmm(b.square().sum(dim=1), a, b.T, alpha=-2)
    distance += a.square().sum(dim=1, keepdim=True)                  # in place: one block in memory
    return distance.clamp_(min=0)


def knn_radii(x: Tensor, k: int, block: int = 1000) -> Tensor:
    """Measure the squared distance (N,) of each row of x (N, D) to its k-th nearest other row."""
    distances = (squared_distances(rows, x) for rows in x.split(block))
    return torch.cat([distance.kthvalue(k + 1, dim=1).values for distance in distances])


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3,
                     block: int = 1000) -> tuple[float, float]:
    """Measure fidelity and variety: precision and recall (Kynkaanniemi et al. 2019).

    (N, D) and (M, D) features -> the share of samples inside the reference's manifold, and of the
    reference inside the samples'. A manifold is the union of balls that reach to each point's k-th
    neighbour, borders included. float64, in blocks of rows: 50,000 x 50,000 takes 4 GB, where the
    ADM evaluator computes in float16.
    """
    if not 1 <= k < min(len(samples), len(reference)):
        raise ValueError(f"precision and recall with k = {k} need k >= 1 and more than {k} images "
                         f"on each side, got {len(samples)} and {len(reference)}")
    check_finite(samples)
    check_finite(reference)
    centre = reference.double().mean(dim=0)      # near the origin, distances lose fewer digits
    samples = samples.double() - centre
    reference = reference.double() - centre
    slack = 1e-12 * max(x.square().sum(dim=1).max().item() for x in (samples, reference))
    reach = knn_radii(reference, k, block) + slack                   # (M,)
    sample_reach = knn_radii(samples, k, block) + slack              # (N,)

    inside = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, radii in zip(samples.split(block), sample_reach.split(block)):
        distance = squared_distances(rows, reference)                # (block, M)
        inside += (distance <= reach).any(dim=1).sum().item()
        covered |= (distance <= radii[:, None]).any(dim=0)
    return inside / len(samples), covered.double().mean().item()


# ---- statistics of a reference, kept -------------------------------------------------------------


def save_statistics(stats: Statistics, file: Path) -> None:
    """Write an .npz, under a temporary name first; where that fails, only the cache is lost."""
    arrays = {f"rows.{layer}": rows.numpy() for layer, rows in stats.rows.items()}
    for layer, (mean, covariance) in stats.moments.items():
        arrays[f"moments.{layer}"] = torch.cat([mean[None], covariance]).numpy()     # (1 + D, D)
    known = ("source", "protocol", "count", "pixels", "sha")
    arrays["meta"] = np.array(json.dumps({name: getattr(stats, name) for name in known}))
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            np.savez(stream, **arrays)
        os.replace(temporary, file)
    except OSError as error:
        cause = runs.first_line(error)
        hint = "--cache names another folder"
        print(f"reference statistics not kept ({cause}); {hint}", file=sys.stderr)


def load_statistics(file: Path, net: nn.Module, protocol: Protocol,
                    rows: Sequence[str] = ()) -> Statistics:
    """Read a file of `save_statistics`; ValueError where it is damaged or of another kind."""
    name = shown(file)
    arrays = read_npz(file)
    try:
        meta = json.loads(str(arrays.pop("meta")))
        stats = Statistics(str(meta["source"]), dict(meta["protocol"]), int(meta["count"]),
                           str(meta["pixels"]), str(meta["sha"]))
        for layer in net.layers:
            values = torch.from_numpy(arrays.pop(f"moments.{layer}"))
            stats.moments[layer] = (values[0], values[1:])
        for key, array in arrays.items():
            stats.rows[key.removeprefix("rows.")] = torch.from_numpy(array).view(stats.count, -1)
    except Exception as error:                   # whatever the file holds instead
        cause = runs.first_line(error)
        raise ValueError(f"{name} holds no statistics of this program ({cause})") from error
    other = []
    for key, value in protocol.key(net).items():
        if stats.protocol.get(key) != value:
            other.append(f"{key} {stats.protocol.get(key)} instead of {value}")
    if other:
        raise ValueError(f"{name} was prepared with {', '.join(other)}: choose the same, or give "
                         f"the images")
    if not set(rows) <= stats.rows.keys():
        raise ValueError(f"{name} holds no single features ({', '.join(rows)}): give the images")
    return stats


def reference_statistics(source: str | Path | ImageSet, net: nn.Module,
                         protocol: Protocol = Protocol(), rows: Sequence[str] = (),
                         cache: str | Path | None = None, batch: int = 32,
                         workers: int = 4) -> Statistics:
    """Take a reference's statistics from the .npz kept beside it (or in `cache`), or make that.

    It is never stale: it is named by a hash of all that the pictures' files held when the network
    saw them, and one of the protocol; both are computed anew each time, and compared in full. The
    file can be given in place of the pictures.
    """
    if not isinstance(source, ImageSet) and str(source).endswith(".stats.npz"):
        return load_statistics(Path(source), net, protocol, rows)
    images = source if isinstance(source, ImageSet) else ImageSet(source)
    path = images.path.resolve()
    folder = Path(cache or path.parent)
    key = hashlib.sha256(json.dumps(protocol.key(net), sort_keys=True).encode()).hexdigest()
    sha = images.sha()
    file = folder / f"{path.stem}-{sha[:12]}-{key[:8]}.stats.npz"
    if file.exists():
        kept = load_statistics(file, net, protocol)
        if kept.sha == sha and set(rows) <= kept.rows.keys():
            return kept
    stats = statistics(images, net, protocol, net.layers, rows, batch, workers)
    stats.sha = images.seen()                    # another one, where files changed meanwhile
    save_statistics(stats, folder / f"{path.stem}-{stats.sha[:12]}-{key[:8]}.stats.npz")
    return stats


# ---- scores --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A number that says how it came about: str() is one line to read."""

    name: str                                    # "FID@5000": always with the number of samples
    value: float
    protocol: dict

    def __str__(self) -> str:
        words = [f"{key} {what}" for key, what in self.protocol.items()]
        return " | ".join([f"{self.name} = {self.value:.6g}", *words])

    def json(self) -> str:
        """Give the same as a line of JSON."""
        value = self.value if math.isfinite(self.value) else str(self.value)     # JSON has no inf
        return json.dumps({"name": self.name, "value": value, **self.protocol})


def conditions(samples: str, reference: str, size: str, features: str, seed: int | None) -> dict:
    """Name what every score depends on, in the order of its line."""
    return {"samples": samples, "reference": reference, "size": size, "features": features,
            "seed": "none" if seed is None else seed}


MOMENTS = {"fid": "pool", "sfid": "spatial"}     # score -> the layer whose moments it compares
ROWS = {"kid": "pool", "is": "logits", "pr": "pool"}     # score -> the layer it needs every row of


def check_names(names: Sequence[str], protocol: Protocol, reference: object) -> None:
    """Raise ValueError where scores are unknown or do not fit the protocol."""
    unknown = set(names) - {*MOMENTS, *ROWS}
    if unknown:
        raise ValueError(f"unknown score {', '.join(sorted(unknown))}: use fid, sfid, kid, is, pr")
    if protocol.features == "squeeze" and {"sfid", "is"} & set(names):
        raise ValueError("sfid and is are defined on Inception alone: use --features inception")
    if protocol.patch and set(names) != {"fid"}:
        raise ValueError("only the Frechet distance has a form on patches")
    if set(names) != {"is"} and reference is None:
        raise ValueError(f"{', '.join(names)} needs a REFERENCE to compare with")


def compute(name: str, ours: Statistics, theirs: Statistics | None, protocol: Protocol, k: int,
            split_size: int, splits: int | None) -> list[tuple[str, float, dict]]:
    """Compute one score: [(title, value, what its line says beside the protocol)]."""
    squeeze = protocol.features == "squeeze"
    if name == "is":
        mean, spread = inception_score(ours.rows["logits"], split_size, splits)
        count = -(-ours.count // split_size)
        blocks = f"{splits} equal" if splits else f"{count} of {split_size} in order"
        return [("IS", mean, {"splits": f"{blocks}, spread {spread:.4g}"})]
    if name == "kid":
        value = kid(ours.rows["pool"], theirs.rows["pool"])
        return [("KD-squeeze" if squeeze else "KID", value, {"estimate": "unbiased, of all pairs"})]
    if name == "pr":
        precision, recall = precision_recall(ours.rows["pool"], theirs.rows["pool"], k)
        end = "-squeeze" if squeeze else ""
        return [("P" + end, precision, {"k": k}), ("R" + end, recall, {"k": k})]

    layer = MOMENTS[name]
    title = "sFID" if name == "sfid" else "FD-squeeze" if squeeze else "FID"
    title = f"p{title}-{protocol.patch}/{ours.pixels}" if protocol.patch else title
    few = min(ours.count, theirs.count) <= len(ours.moments[layer][0])
    note = {"note": "fewer images than features, covariance of low rank"} if few else {}
    return [(title, frechet_distance(*ours.moments[layer], *theirs.moments[layer]), note)]


def evaluate(names: Sequence[str], samples: Images, reference: str | Path | ImageSet | None = None,
             protocol: Protocol = Protocol(), net: nn.Module | None = None, k: int = 3,
             split_size: int = 5000, splits: int | None = None, cache: str | Path | None = None,
             batch: int = 32, workers: int = 4) -> list[Score]:
    """Score a set of pictures in one pass: any of "fid", "sfid", "kid", "is", "pr" (two scores).

    reference: pictures, or their .stats.npz. `net` saves loading the network each time. With
    protocol.patch, "fid" is the patch FID of INFD (Table 2); with features "squeeze" it is
    FD-squeeze. Raises ValueError where a set, a setting or the reference does not fit.
    """
    check_names(names, protocol, reference)
    net = net or load_features(protocol.features)
    theirs = None
    if set(names) != {"is"}:
        pairs = ["pool"] if {"kid", "pr"} & set(names) else []
        theirs = reference_statistics(reference, net, protocol, pairs, cache, batch, workers)
    moments = {MOMENTS[name] for name in names if name in MOMENTS}
    rows = {ROWS[name] for name in names if name in ROWS}
    ours = statistics(samples, net, protocol, moments, rows, batch, workers)
    if theirs and theirs.pixels != ours.pixels:
        raise ValueError(f"the samples are {ours.pixels}, the reference is {theirs.pixels}: "
                         f"use --size for both")

    against = f"{theirs.source} ({theirs.count}, sha256 {theirs.sha[:12]})" if theirs else "none"
    line = conditions(f"{ours.source} ({ours.count})", against, protocol.describe(ours.pixels),
                      str(net), protocol.seed if protocol.patch else None)
    scores = []
    for name in names:
        for title, value, words in compute(name, ours, theirs, protocol, k, split_size, splits):
            scores.append(Score(f"{title}@{ours.count}", value, line | words))
    return scores


def fid(samples: Images, reference: str | Path | ImageSet, protocol: Protocol = Protocol(),
        **options) -> Score:
    """Measure FID (Heusel et al. 2017), FD-squeeze or patch FID: `evaluate` for one score."""
    return evaluate(["fid"], samples, reference, protocol, **options)[0]


# ---- scores of single pictures, averaged ---------------------------------------------------------


def per_image(score: Callable[..., Tensor], sets: list[ImageSet], protocol: Protocol,
              device: torch.device | str, workers: int) -> tuple[float, str]:
    """Average score(*images) over sets side by side, each image (1, 3, H, W) in [-1, 1].

    Gives the mean and the size of the images.
    """
    values = []
    sizes = set()
    with torch.no_grad():
        for images in zip(*(image_batches(one, protocol, 1, workers) for one in sets)):
            sizes |= {size_of(image) for image in images}
            if len(sizes) > 1:
                both = " and ".join(sorted(sizes))
                raise ValueError(f"images of {both} cannot be compared: use --size")
            values.append(score(*(image.to(device) / 127.5 - 1 for image in images)).item())
    mean = float(np.mean(values))
    if math.isnan(mean):
        raise ValueError("the score of an image is NaN")
    return mean, sizes.pop()


def plain(name: str) -> str:
    """Strip a picture's name of ending and size: seed0-000001-256x256.png is seed0-000001."""
    return re.sub(r"(-\d+x\d+)?\.\w+$", "", name)


def compare(name: str, samples: ImageSet, reference: ImageSet, protocol: Protocol = Protocol(),
            net: str = "vgg", device: torch.device | str = "cpu", workers: int = 4) -> Score:
    """Average "psnr" (dB) or "lpips" over the pictures of one name in two sets; `net` is of LPIPS.

    A name may end in the size, as the files of sample.py do: renders of two sizes are compared
    with protocol.size.
    """
    sets = [samples, reference]
    for images in sets:
        images.names.sort(key=plain)
    alone = sorted({*map(plain, samples.names)} ^ {*map(plain, reference.names)})
    if alone or len(samples) != len(reference):
        first = shown(alone[0] if alone else samples.names[0])
        raise ValueError(f"{name} compares images of the same name; {len(alone)} of {samples.name} "
                         f"and {reference.name} have no partner, the first: {first}")
    title = "PSNR"
    features = "none, peak 1"
    score = psnr
    if name == "lpips":
        title = f"LPIPS-{net}"
        features = f"LPIPS v0.1 {net}"
        score = lpips_network(net, "use --lpips-net squeeze").to(device)
    value, size = per_image(score, sets, protocol, device, workers)
    against = f"{reference.name} ({len(reference)}, sha256 {reference.seen()[:12]})"
    line = conditions(f"{samples.name} ({len(samples)})", against, protocol.describe(size),
                      features, None)
    return Score(f"{title}@{len(samples)}", value, line)


IQA = ("niqe", "clipiqa", "musiq", "maniqa")     # CM-Func, Tables 4 and 6; lower is better for niqe


def no_reference(name: str, samples: ImageSet, protocol: Protocol = Protocol(), smallest: int = 224,
                 device: torch.device | str = "cpu", workers: int = 4) -> Score:
    """Measure quality without a reference, as the optional package pyiqa defines it.

    NIQE needs 96 px and the paper does not say how images of 32 and 64 px got there (CM-Func,
    Appendix D.1), so smaller ones are enlarged (bicubic) until their shorter side has `smallest`
    px, and the score's line says so.
    """
    try:
        import pyiqa
    except ImportError:
        raise ValueError(f"{name} needs the optional package: pip install pyiqa") from None
    try:
        metric = pyiqa.create_metric(name, device=torch.device(device))
    except (OSError, RuntimeError, KeyError) as error:   # most often, no download of its weights
        raise ValueError(f"pyiqa cannot make {name}: {runs.first_line(error)}") from error

    def score(x: Tensor) -> Tensor:
        short = min(x.shape[2:])
        if short < smallest:
            sides = [round(side * smallest / short) for side in x.shape[2:]]
            x = F.interpolate(x, sides, mode="bicubic")
        return metric((x * 0.5 + 0.5).clamp(0, 1))

    value, size = per_image(score, [samples], protocol, device, workers)
    small = min(map(int, size.split("x"))) < smallest
    enlarged = f", enlarged to {smallest} px (bicubic)" if small else ""
    line = conditions(f"{samples.name} ({len(samples)})", "none",
                      protocol.describe(size) + enlarged, f"pyiqa {name}", None)
    return Score(f"{name.upper()}@{len(samples)}", value, line)


# ---- command line --------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    about = "Score SAMPLES against REFERENCE: folders, zips, prepared sets, .npz batches."
    parser = argparse.ArgumentParser(description=about)
    scores = (f"fid, sfid, kid, is, pr in one pass (fid,kid), fd (= fid --features squeeze), pfid, "
              f"psnr, lpips, {', '.join(IQA)}, or iqa for these four")
    add = parser.add_argument
    add("metric", help=scores)
    add("samples", type=Path)
    add("reference", type=Path, nargs="?", help="images, or the .stats.npz kept from them")
    add("--features", choices=("inception", "squeeze"))
    add("--size", type=int, help="px; resize the centre square of every image (default: as stored)")
    add("--filter", choices=FILTERS, default=Protocol.filter, help="of --size (%(default)s)")
    add("--patch", type=int, help="px; side of the random squares of pfid")
    add("--seed", type=int, default=0, help="of these squares")
    add("--limit", type=int, help="use this many of the samples, evenly spaced")
    add("--k", type=int, default=3, help="neighbours for pr")
    add("--splits", type=int, help="equal splits for is (default: blocks of 5000)")
    add("--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg")
    add("--inception", type=Path, help="the published Inception weights, instead of torch hub's")
    add("--cache", type=Path, help="folder of reference statistics (default: beside the reference)")
    add("--batch", type=int, default=32)
    add("--workers", type=int, default=4, help="threads that decode")
    add("--device", default="auto", help="auto, cuda, mps, cpu")
    return parser.parse_args(argv)


def asked(args: argparse.Namespace) -> Iterator[Score]:
    """Yield the scores that the command line asks for, each as soon as it is there."""
    names = list(dict.fromkeys(IQA if args.metric == "iqa" else args.metric.split(",")))
    features = args.features or ("squeeze" if "fd" in names else "inception")
    protocol = Protocol(features, args.size, args.filter, args.patch, args.seed)
    if ("pfid" in names) != (args.patch is not None):
        raise ValueError("pfid and --patch belong together: pfid --patch 256")
    if len({"fid", "fd", "pfid"} & set(names)) > 1:
        raise ValueError("fid, fd and pfid are one score by several protocols: one at a time")
    device = runs.pick_device(args.device)
    samples = ImageSet(args.samples, args.limit)

    if set(names) <= set(IQA):
        for name in names:
            yield no_reference(name, samples, protocol, device=device, workers=args.workers)
    elif set(names) <= {"psnr", "lpips"}:
        if args.reference is None:
            raise ValueError(f"{args.metric} needs a REFERENCE to compare with")
        reference = ImageSet(args.reference, args.limit)
        for name in names:
            yield compare(name, samples, reference, protocol, args.lpips_net, device, args.workers)
    else:
        names = ["fid" if name in ("fd", "pfid") else name for name in names]
        check_names(names, protocol, args.reference)
        net = load_features(features, args.inception).to(device)
        yield from evaluate(names, samples, args.reference, protocol, net, args.k,
                            splits=args.splits, cache=args.cache, batch=args.batch,
                            workers=args.workers)


def run(args: argparse.Namespace) -> None:
    """Print every score as a line with its protocol, and as JSON."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("metrics.py is one process: start it without torchrun")
    for score in asked(args):
        print(score, score.json(), sep="\n", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the program; bad input ends with one line and exit code 2."""
    stopped = "stopped; scores that were finished stand above"
    return runs.cli(run, parse(argv), stopped, memory="take a smaller --batch")


if __name__ == "__main__":
    sys.exit(main())
