"""Batches of pictures with coordinates: from folders, zips, prepared copies, built-in landscapes.

A `Source` gives `Picture`s; `random_patch` makes an item of one (INFD supplementary E and J.2; the
stages of CM-Func take whole pictures); `loader` stacks items to batches. `python data.py prepare
SRC DST --size 256` decodes a set once, for good. Reading files is in files.py. Read next: train.py,
whose steps consume the batches.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from clif import coord_grid
from files import (META, PIXELS, PREPARED, BadImage, Cifar10, Copy, DataError, Files, Photo, Photos,
                   Prepared, open_photos, sha256, shown, to_rgb)
from landscapes import Box, Landscapes, Scene
from runs import cli, rng, torch_noise

NAMES = {                                            # --data NAME, and what belongs in data/NAME
    "synthetic": "nothing, it is built in",
    "synthetic-6k-mix": "nothing, it is built in",
    "ffhq": "the 70,000 aligned 1024 px files of FFHQ",
    "ffhq-6k-mix": "the 70,000 aligned 1024 px files of FFHQ",
    "mountains": "photographs of mountains, 1024 px or more",
    "celeba": "the 202,599 aligned files of CelebA (178x218)",
    "lsun-church": "the LSUN outdoor churches, exported as image files",
    "lsun-classroom": "the LSUN classrooms, exported as image files",
    "cifar10": "the official python batches, unpacked, or one folder of images per class",
}
TOLERATED = 10                                       # unreadable images before 1 % of all is a lot


# ---- what a data set is --------------------------------------------------------------------------


class Picture(Protocol):
    """One square picture, drawn at any size."""

    name: str                                        # for messages
    size: int                                        # side in pixels; drawn larger, it is blurred

    def draw(self, res: int, box: Box | None = None) -> np.ndarray:
        """Draw it at res x res, uint8 (res, res, 3); of a box (top, left, h, w) that part alone."""
        ...


class Source(Protocol):
    """A data set: what a stage trains on and what scores are taken from.

    A class of your own needs __len__ and __getitem__, which gives a Picture or a PIL image (its
    centre square counts). `as_source` adds the rest: no classes, no captions.
    """

    classes: tuple[str, ...] = ()                    # their names; empty: there are none
    passed_over: str = ""                            # what of the files is not in the set, in words

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Picture: ...

    def label(self, i: int) -> int:
        """Give the class of picture i, an index into `classes`; 0 where there are none."""
        return 0

    def caption(self, i: int) -> str:
        """Describe picture i in words; empty where nothing does."""
        return ""


class Own(Source):
    """A data set class of the user, completed by the defaults of Source."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.classes = tuple(getattr(dataset, "classes", ()))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Picture:
        picture = self.dataset[i]
        if isinstance(picture, Image.Image):
            return Photo(f"{type(self.dataset).__name__}[{i}]", lambda: to_rgb(picture))
        return picture

    def label(self, i: int) -> int:
        return getattr(self.dataset, "label", super().label)(i)

    def caption(self, i: int) -> str:
        return getattr(self.dataset, "caption", super().caption)(i)


def as_source(dataset) -> Source:
    """Make a Source of any data set class; what is one already comes back as it is.

    Raises DataError where [0] is no picture, as in data sets of tensors or (image, label) pairs.
    """
    if len(dataset) == 0:
        raise DataError("the data set is empty")
    first = dataset[0]
    if isinstance(first, Image.Image):
        return Own(dataset)
    if not hasattr(first, "draw"):
        raise DataError(f"{type(dataset).__name__}[0] is a {type(first).__name__}, which cannot be "
                        f"drawn at any size: return a PIL image, and the class from label(i)")
    wanted = ("classes", "passed_over", "label", "caption")
    return dataset if all(hasattr(dataset, name) for name in wanted) else Own(dataset)


def fingerprint(source: Source) -> dict[str, int | str]:
    """Say which pictures a source holds, for a run to store: {"pictures": n, "digest": hex}.

    By content, without decoding: names within the set, sizes and labels, in any order, so that the
    same pictures under another path give the same. A class without identity(): its name and length.
    """
    own = getattr(source, "identity", None)
    parts = own() if own else [type(source).__name__, len(source), *source.classes]
    return {"pictures": len(source), "digest": hashlib.sha256(repr(parts).encode()).hexdigest()}


# ---- sets with a shape of their own --------------------------------------------------------------


class SixKMix(Source):
    """FFHQ 6K-mix: every picture at `size` px, then the first 6000 again at 2 to 4 times that.

    The data has few large pictures; half of the draws go to them (`pick`), as in the published
    code. The same mix is made of scenes.
    """

    def __init__(self, photos: Source, size: int = 256):
        if len(photos) < 6000:
            raise DataError(f"ffhq-6k-mix needs at least 6000 pictures, there are {len(photos)}")
        self.photos = photos
        self.size = size
        self.passed_over = photos.passed_over

    def __len__(self) -> int:
        return len(self.photos) + 6000

    def pick(self, gen: np.random.Generator) -> int:
        """Choose the index to show: any small picture or any large one, with equal chances."""
        small = len(self.photos)
        return int(gen.integers(small) if gen.random() < 0.5 else small + gen.integers(6000))

    def __getitem__(self, i: int) -> Photo:
        large = i - len(self.photos)
        photo = self.photos[i if large < 0 else large]
        size = self.size if large < 0 else mix_size(large, self.size)
        return Photo(photo.name, lambda: Image.fromarray(photo.draw(size)))

    def identity(self) -> list:
        return [self.size, fingerprint(self.photos)]


def mix_size(i: int, size: int = 256) -> int:
    """Give the side of the i-th large picture of the 6K-mix: 2 to 4 times `size` over the first
    5000 (512 to 1024 px as published), 4 times for the last 1000."""
    return 2 * size + round(2 * size * (i / 4999)) if i < 5000 else 4 * size


# ---- prepared sets -------------------------------------------------------------------------------

@dataclass
class _Whole:
    """Row i of a prepared set: (pixels (S, S, 3), enlarged or not, caption), or why not."""

    source: Source
    size: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[np.ndarray, bool, str] | BadImage:
        try:
            picture = self.source[i]
            pixels = picture.draw(self.size)
            return pixels, picture.size < self.size, self.source.caption(i)
        except BadImage as error:
            return error


def prepare(name: str, folder: Path, size: int, workers: int = 0) -> dict:
    """Decode the data set `name` into a new folder that `open_data` reads, whole at size x size.

    What is drawn from the copy at `size` is what is drawn from the source, so whole pictures make
    the same batches. It appears when complete: an interrupted call leaves nothing, and the same
    call starts again. Gives the content of meta.json: unreadable pictures are left out and listed
    there as `skipped`, smaller ones are counted as `enlarged`. Raises FileExistsError, and
    DataError for a set that cannot be prepared.
    """
    if folder.exists():
        raise FileExistsError(f"{shown(folder)} exists; choose another folder, or delete it")
    if not 0 < size <= Scene.size:
        raise DataError(f"--size {size}: choose 1 to {Scene.size}")
    sources = {split: open_data(name, split) for split in ("train", "val")}
    if isinstance(sources["train"], (SixKMix, Prepared)):
        raise DataError(f"{shown(name)} cannot be prepared at one size: it has many by design, or "
                        f"was prepared before")
    meta = {"format": PREPARED, "source": name, "size": size, "filter": "lanczos", "count": 0,
            "sha256": "", "enlarged": 0, "skipped": [], "classes": sources["train"].classes,
            "passed_over": sources["train"].passed_over,
            "labels": {"train": [], "val": []}, "captions": {"train": [], "val": []}}

    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as temporary:
        made = Path(temporary, folder.name)          # TemporaryDirectory itself is for its owner
        made.mkdir()
        with open(made / PIXELS, "wb") as file:
            for split, source in sources.items():
                rows = DataLoader(_Whole(source, size), 16, collate_fn=list, num_workers=workers,
                                  worker_init_fn=_outlive_signals)
                bar = tqdm(chain.from_iterable(rows), f"{shown(name)}, {split}", len(source),
                           disable=None)
                for i, row in enumerate(bar):
                    if isinstance(row, BadImage):
                        meta["skipped"].append(str(row))
                        continue
                    pixels, enlarged, caption = row
                    file.write(pixels.tobytes())
                    meta["count"] += 1
                    meta["enlarged"] += enlarged
                    meta["labels"][split].append(source.label(i))
                    meta["captions"][split].append(caption)
            os.fsync(file.fileno())
        if not meta["count"]:
            raise DataError(f"none of the pictures of {shown(name)} can be read, the last: "
                            f"{meta['skipped'][-1]}")
        if not any(chain.from_iterable(meta["captions"].values())):
            del meta["captions"]
        meta["sha256"] = sha256(made / PIXELS)
        (made / META).write_text(json.dumps(meta) + "\n")
        made.rename(folder)                          # fails where another call was faster
    return meta


# ---- data sets by name ---------------------------------------------------------------------------


def open_data(name: str, split: str = "train") -> Source:
    """Open a data set: one of NAMES, or the path of a folder, a zip, or what `prepare` made.

    split: train, val (held out) or all. Raises FileNotFoundError, and DataError with what to do.
    """
    if split not in ("train", "val", "all"):
        raise ValueError(f"unknown split {split!r}: train, val or all")
    if name == "synthetic":
        return Landscapes(split)
    if name == "synthetic-6k-mix":                   # for preset tiny: 64 px, and up to 256 px
        return Landscapes(split) if split == "val" else SixKMix(Landscapes(split), 64)

    root = _find(name)
    files = Files(root)
    if not files.zipped and {META, PIXELS} <= files.members.keys():
        return Prepared(root, split)
    batches = [file for file in files.names if file.split("/")[-1] == "data_batch_1"]
    if batches and files.zipped:
        raise DataError(f"{shown(root)}: the batches of CIFAR-10 are read from a folder; unpack it")
    if batches:
        return Cifar10((root / batches[0]).parent, split)
    if name == "ffhq-6k-mix" and split != "val":     # the published mix takes held-out files too
        return SixKMix(open_photos(files, "ffhq", "all"))
    return open_photos(files, name.removesuffix("-6k-mix"), split)


def _find(name: str) -> Path:
    roots = [Path("data")]
    if os.environ.get("DATA_ROOT"):
        roots.append(Path(os.environ["DATA_ROOT"]))
    folders = [name, "ffhq"] if name == "ffhq-6k-mix" else [name]
    tries = product(roots, folders, ("", ".zip"))
    places = [root / f"{folder}{end}" for root, folder, end in tries]
    if name not in NAMES:
        places.insert(0, Path(name))
    for place in places:
        try:
            mode = place.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue                                 # what forbids to look, says so
        if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
            return place
    what = NAMES.get(name, "a folder or .zip of PNG, JPEG or WEBP images")
    raise FileNotFoundError(f"no data set {shown(name)!r}: looked for "
                            f"{', '.join(map(shown, places))}. Put there: {what}; or go on without "
                            f"it: --data synthetic")


def check_data(source: Source, progress: Callable[[int], None] | None = None
               ) -> list[tuple[str, str]]:
    """Decode every picture and list what cannot be used: [(file, reason)].

    progress is told the count so far. Of a prepared set the pixel file is compared with its hash.
    """
    if isinstance(source, Prepared):
        file = source.root / PIXELS
        same = sha256(file) == source.hash
        reason = f"its SHA-256 is not the one in {META}; prepare it again"
        return [] if same else [(shown(file), reason)]

    def check(i: int) -> tuple[str, str] | None:
        picture = source[i]
        try:
            picture.size                             # decodes a photograph; scenes know theirs
        except BadImage as error:
            return picture.name, str(error).removeprefix(f"{picture.name}: ")

    folders = source.store.denied if isinstance(source, Photos) else []
    found = [(folder, "no permission to read this folder") for folder in folders]
    with ThreadPoolExecutor() as pool:               # decoders release the interpreter lock
        for done, bad in enumerate(pool.map(check, range(len(source))), 1):
            if bad:
                found.append(bad)
            if progress:
                progress(done)
    return found


# ---- encoder input and ground-truth patch --------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """How a picture becomes encoder input and ground-truth patch (INFD supplementary E, J.2)."""

    size: int = 256           # side of the encoder input (published code)
    patch: int = 256          # side of the patch that is rendered and compared (published code)
    max_size: int = 1024      # largest ground truth: larger pictures are resized to at most this
    p_whole: float = 0.0      # chance of a ground truth of `size` (published code has it, unused)
    p_original: float = 0.0   # chance of the largest size (J.2: 0.5 in the last 400K on Mountains)
    downsample: bool = True   # False: always the largest size, the ablation of supplementary E
    flip: bool = False        # mirror half of the pictures; the published code does not
    smallest: int = 0         # smallest ground truth; 0: the encoder's input (published code)
    edge: int = 0             # crops are drawn up to so many pixels past the border and moved back
                              # inside, so that the border is learnt about as often as the rest

    def __post_init__(self):
        smallest = self.smallest or self.size
        if not 0 < self.patch <= smallest <= self.max_size or self.size > self.max_size:
            small = f"smallest={self.smallest}, " if self.smallest else ""
            raise ValueError(f"patch={self.patch}, {small}size={self.size}, "
                             f"max_size={self.max_size}: each must not be larger than the next")
        if self.edge < 0 or (self.p_whole and self.patch > self.size):
            raise ValueError(f"edge={self.edge} must not be negative, and with p_whole "
                             f"patch={self.patch} not be larger than size={self.size}")


def to_tensor(array: np.ndarray) -> Tensor:
    """Turn uint8 (H, W, 3) into float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float().div_(255).sub_(0.5).div_(0.5)


def to_uint8(rgb: Tensor) -> np.ndarray:
    """Turn (..., 3, h, w) in [-1, 1] into uint8 (..., h, w, 3), truncated as by the published
    samplers; values beyond are clamped. Raises ValueError for NaN or infinity."""
    if not torch.isfinite(rgb).all():
        raise ValueError("an image holds NaN or infinity")
    pixels = ((rgb.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()


def patch_at(picture: Picture, r: int, top: int, left: int, cfg: DataConfig,
             mirror: bool = False) -> dict[str, Tensor]:
    """Give the encoder input, and the patch at (top, left) of the picture at r x r; see
    `random_patch`."""
    P = cfg.patch
    whole = picture.draw(cfg.size)
    patch = picture.draw(r, (top, r - left - P if mirror else left, P, P))
    step = -1 if mirror else 1
    y = coord_grid((r, 1))[top:top + P, 0, 0]
    x = coord_grid((1, r))[0, left:left + P, 1]
    return {
        "image": to_tensor(whole[:, ::step]),                                  # (3, S, S)
        "patch": to_tensor(patch[:, ::step]),                                  # (3, P, P)
        "coord": torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1),     # (P, P, 2)
        "cell": torch.full((2,), 2 / r),                                       # (2,)
    }


def random_patch(picture: Picture, gen: np.random.Generator, cfg: DataConfig) -> dict[str, Tensor]:
    """Make what stage ae learns from: a picture, and a crop of it at a random size r.

    image (3, S, S) and patch (3, P, P) in [-1, 1]; coord (P, P, 2) and cell (2,) of the patch, as
    slices of coord_grid((r, r)). r is uniform in smallest..min(picture.size, max_size), both
    included (INFD supplementary E, J.2). Raises DataError for a picture that is too small.
    """
    if isinstance(picture, Copy):
        picture.require(cfg.max_size)                # else its ground truth is smaller, unnoticed
    smallest = cfg.smallest or cfg.size
    largest = min(picture.size, cfg.max_size)
    if largest < max(smallest, cfg.size):
        # The published code enlarges such pictures for its custom data and stops for FFHQ; blurred
        # ground truth teaches the renderer to blur, so this stops.
        raise DataError(f"{picture.name} is {picture.size} px, smaller than the input of "
                        f"{max(smallest, cfg.size)} px; remove it, or train with "
                        f"size={picture.size} or less")
    whole = gen.random() < cfg.p_whole
    keep = gen.random() < cfg.p_original
    mirror = cfg.flip and gen.random() < 0.5
    r = largest if keep or not cfg.downsample else int(gen.integers(smallest, largest + 1))
    if whole:
        r = cfg.size
    corner = gen.integers(-cfg.edge, r - cfg.patch + cfg.edge + 1, 2)
    top, left = corner.clip(0, r - cfg.patch).tolist()
    return patch_at(picture, r, top, left, cfg, mirror)


# ---- batches -------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _order(seed: int | str, epoch: int, n: int) -> np.ndarray:
    return rng(seed, "order", epoch).permutation(n)


@dataclass
class _Samples:
    """Sample n of an endless run: (item, what was skipped for it), or the error that ends it."""

    source: Source
    make_item: Callable[..., dict]
    seed: int | str
    noise: dict[str, tuple[int, ...]]
    captions: bool

    def index(self, n: int, attempt: int) -> int:
        """Say which picture sample n shows; after a bad one, the next."""
        if hasattr(self.source, "pick"):
            return self.source.pick(rng(self.seed, "pick", n, attempt))
        epoch, i = divmod(n + attempt, len(self.source))
        return int(_order(self.seed, epoch, len(self.source))[i])

    def item(self, n: int, i: int) -> dict:
        """Make sample n of picture i, with its noise, number, label and, if asked, caption."""
        item = dict(self.make_item(self.source[i], rng(self.seed, "item", n)))
        for name, shape in self.noise.items():
            item[name] = torch_noise(shape, self.seed, name, n)
        if self.captions:
            item["caption"] = self.source.caption(i)
        return item | {"index": n, "label": self.source.label(i)}

    def __getitem__(self, n: int) -> tuple[dict, list[str]] | DataError:
        skipped = []
        while True:
            try:
                return self.item(n, self.index(n, len(skipped))), skipped
            except BadImage as error:
                skipped.append(str(error))
                if len(skipped) > TOLERATED:
                    return DataError(f"{len(skipped)} unreadable images in a row, the last: "
                                     f"{error}")
            except DataError as error:               # raised in the main process, no traceback
                return error


def _collate(samples: list) -> tuple[dict, list[str]] | DataError:
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    items = [item for item, _ in samples]
    batch = {}
    for key in items[0]:
        values = [item[key] for item in items]
        texts = isinstance(values[0], str)
        batch[key] = values if texts else torch.stack([torch.as_tensor(v) for v in values])
    return batch, list(chain.from_iterable(skipped for _, skipped in samples))


def _outlive_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process; a worker that died first would break its step.

    Out of the process group, Ctrl-C does not come here. A SIGTERM of its own, which batch systems
    send to all, ends a worker two seconds later: ignored altogether, it would let the interpreter
    wait for it at exit.
    """
    if hasattr(signal, "SIGALRM"):
        os.setpgrp()
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, 2))


def loader(source: Source, make_item: Callable[..., dict], batch: int, start: int = 0,
           seed: int | str = 0, workers: int = 0, rank: int = 0, world: int = 1,
           pin_memory: bool = False, noise: dict[str, tuple[int, ...]] | None = None,
           captions: bool = False) -> Iterator[dict]:
    """Give endless batches from step `start` on: stacked items, "index" (of the sample), "label".

    Step k holds the samples k * batch .. (k + 1) * batch - 1, each rank an equal, contiguous share.
    Sample n shows picture n % len of a permutation of its epoch and gets the generator
    rng(seed, "item", n): the batches do not depend on workers, ranks or on where a run was
    continued. make_item(picture, gen) -> dict; with workers it must pickle.
    noise, name -> shape: standard normal numbers that the batch holds beside its items,
    torch_noise(shape, seed, name, n) of sample n; the workers draw them, since a GPU can take more
    pictures than one process can make noise for. captions: add "caption", a list of str.
    Unreadable images are replaced by the next one, with a warning; above 1 % of the images seen:
    DataError.
    """
    if batch < 1 or batch % world:
        raise ValueError(f"a batch of {batch} cannot be shared by {world} processes; choose a "
                         f"multiple")
    if len(source) == 0:
        raise DataError("the data set is empty")
    if workers and sys.platform == "linux" and not _room_in_shm():
        warnings.warn("little room in /dev/shm, so one process loads the data: workers=0 (docker: "
                      "--shm-size=1g)")
        workers = 0
    share = batch // world
    firsts = (k * batch + rank * share for k in count(start))
    batches = DataLoader(
        _Samples(source, make_item, seed, noise or {}, captions), collate_fn=_collate,
        batch_sampler=(range(first, first + share) for first in firsts), num_workers=workers,
        pin_memory=pin_memory, worker_init_fn=_outlive_signals, generator=torch.Generator())
    return _checked(batches, share)


def _checked(batches: DataLoader, share: int) -> Iterator[dict]:
    """Give the batches alone; warn of each skipped image and stop when they become too many."""
    bad = 0
    for seen, result in zip(count(share, share), batches):
        if isinstance(result, DataError):
            raise result
        batch, skipped = result
        for text in skipped:
            bad += 1
            warnings.warn(f"skipped unreadable image {bad}: {text}")
        if bad > max(TOLERATED, seen // 100):
            raise DataError(f"{bad} of the first {seen} images cannot be read (see --check-data), "
                            f"the last: {text}")
        yield batch


def _room_in_shm() -> bool:
    return os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free >= 2**28


# ---- command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(
        description="Decode a data set once: --data DST then reads pixels, not files.")
    p.add_argument("command", choices=["prepare"])
    p.add_argument("source", metavar="SRC",
                   help=f"a folder or .zip of images, or one of {', '.join(NAMES)}")
    p.add_argument("folder", metavar="DST", type=Path,
                   help="a new folder; size x size x 3 bytes a picture")
    p.add_argument("--size", type=int, required=True,
                   help="side in pixels (centre square, Lanczos)")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1,
                   help="processes that decode (%(default)s)")
    return p


def run(args: argparse.Namespace) -> None:
    """Prepare a set, and say what is in it and what is not."""
    meta = prepare(args.source, args.folder, args.size, args.workers)
    for text in meta["skipped"]:
        print(f"skipped: {text}")
    if meta["passed_over"]:
        print(f"passed over: {meta['passed_over']}")
    print(f"{meta['count']:,} pictures of {args.size} px in {shown(args.folder)}, "
          f"{len(meta['skipped'])} skipped, {meta['enlarged']} enlarged")


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code is that of `runs.cli`."""
    stopped = "stopped; nothing is left, the same command starts again"
    return cli(run, parser().parse_args(argv), stopped)


if __name__ == "__main__":
    sys.exit(main())
