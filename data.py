"""Batches of pictures with coordinates: photographs in folders and zips, or procedural landscapes drawn at any size.
Paper: INFD supplementary E and J.2 (random downsampling, crops), H (scale consistency); CM-Func uses whole pictures.
`python data.py prepare SRC DST --size 256` decodes a set once, for good. Read next: train.py, whose steps consume the
batches.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import json
import operator
import os
import pickle
import posixpath
import re
import shutil
import signal
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from clif import coord_grid
from metrics import Stopped, stop_at_once

Box = tuple[int, int, int, int]                                      # top, left, height, width in pixels

NAMES = {                                                            # --data NAME, and what belongs in data/NAME
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
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**26                                                   # 8192 x 8192: below Pillow's own limit
MAX_BYTES = 2**28                                                    # of one file, packed or not
MAX_DIRECTORY = 2**25                                                # bytes of a zip's directory: about 350,000 files
TOLERATED = 10                                                       # unreadable images before 1 % of all is too much


class DataError(ValueError):
    """The data cannot be used as asked; the message names the file and what to do."""


class BadImage(DataError):
    """One file is no readable image; training skips it and goes on."""


# ---- randomness ------------------------------------------------------------------------------------------------------


def _digest(key: tuple[int | str, ...]) -> int:
    plain = tuple(k if isinstance(k, str) else operator.index(k) for k in key)
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=16).digest(), "little")


def rng(*key: int | str) -> np.random.Generator:
    """The random numbers that belong to `key`, whoever asks, whenever: nothing has to be stored or restored."""
    return np.random.Generator(np.random.Philox(key=_digest(key)))


def torch_noise(shape: tuple[int, ...], *key: int | str) -> Tensor:
    """Standard normal float32 noise that belongs to `key`; made on the CPU, so it is the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(_digest(key) >> 65))


# ---- files -----------------------------------------------------------------------------------------------------------


class Folder:
    """The files below a folder, named relative to it."""

    def __init__(self, root: Path):
        self.root = root
        found = (Path(path, f).relative_to(root).as_posix() for path, _, files in os.walk(root) for f in files)
        self.names = sorted(name for name in found if not _hidden(name))

    def stamp(self, name: str) -> tuple[int, int]:
        """What changes with a file: its size, and when it was written."""
        stat = (self.root / name).stat()
        return stat.st_size, stat.st_mtime_ns

    def read(self, name: str) -> bytes:
        path = self.root / name
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"larger than {MAX_BYTES >> 20} MB")
        return path.read_bytes()


class Zip:
    """The files in a zip, read in place. Each process opens the file for itself: a handle must not cross a fork."""

    def __init__(self, root: Path):
        self.root, self.opened = root, (0, None)
        try:
            if _directory_bytes(root) > MAX_DIRECTORY:               # looked up before zipfile makes objects of it
                raise DataError(f"{root}: too many files for a zip; unpack it and give the folder")
            names = self.archive.namelist()
        except (zipfile.BadZipFile, struct.error) as error:
            raise DataError(f"{root} is not a readable zip file: {error}") from error
        for name in names:
            if name.startswith(("/", "\\")) or ":" in name.split("/")[0] or ".." in re.split(r"[/\\]", name):
                raise DataError(f"{root}: unsafe file name {name!r} in the zip")
        self.names = sorted(name for name in names if not name.endswith("/") and not _hidden(name))

    @property
    def archive(self) -> zipfile.ZipFile:
        if self.opened[0] != os.getpid():
            self.opened = os.getpid(), zipfile.ZipFile(self.root)
        return self.opened[1]

    def __getstate__(self) -> dict:
        return {"root": self.root, "names": self.names, "opened": (0, None)}

    def stamp(self, name: str) -> tuple[int, int]:
        """What changes with a file: its size and its checksum."""
        info = self.archive.getinfo(name)
        return info.file_size, info.CRC

    def read(self, name: str) -> bytes:
        if self.archive.getinfo(name).file_size > MAX_BYTES:         # zipfile never yields more than this size
            raise DataError(f"larger than {MAX_BYTES >> 20} MB")
        return self.archive.read(name)


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _directory_bytes(path: Path) -> int:
    """Size of a zip's central directory as its end record states it (the size that zipfile goes by)."""
    with open(path, "rb") as f:
        f.seek(max(0, path.stat().st_size - 2**16 - 100))
        tail = f.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0:
        raise zipfile.BadZipFile("no end record")
    if end >= 76 and tail[end - 76:end - 72] == b"PK\6\6":           # zip64: a longer record before it
        return struct.unpack_from("<Q", tail, end - 36)[0]
    return struct.unpack_from("<I", tail, end + 12)[0]


def decode(data: bytes) -> Image.Image:
    """A PNG, JPEG or WEBP as RGB, upright, transparency on white. Damaged files raise: every pixel is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise DataError("not a PNG, JPEG or WEBP image") from error
    if image.width * image.height > MAX_PIXELS:                      # known from the header, before any decoding
        raise DataError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                                   # 16-bit grey; Pillow's convert would clip it
        image = Image.fromarray(np.round(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- photographs -----------------------------------------------------------------------------------------------------


class Photo:
    """The centre square of one image file, decoded once, at the first use."""

    def __init__(self, name: str, read: Callable[[], Image.Image], crop: int = 0):
        self.name, self.read, self.crop = name, read, crop           # crop: side of the square; 0: as large as it gets

    @cached_property
    def image(self) -> Image.Image:
        try:
            image = self.read()
        except BadImage:
            raise
        except Exception as error:                                   # a hostile file can make a decoder raise anything
            reason = str(error) or type(error).__name__
            raise BadImage(f"{self.name}: {reason.splitlines()[0]}") from error
        side = min(*image.size, self.crop or image.width)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    @property
    def size(self) -> int:
        return self.image.width

    def draw(self, res: int, box: Box | None = None) -> np.ndarray:
        """The square resized to res x res, cropped to `box`: uint8 (height, width, 3). Lanczos, as published."""
        if box is None:
            return np.asarray(self.image.resize((res, res), Image.Resampling.LANCZOS))
        # Pillow can resize a box alone, but rounds its corners to float32: not the same pixels. Its two passes, along
        # the rows and then along the columns, are therefore done one by one: the first on the rows that the box needs,
        # the second on its columns alone.
        (top, left, h, w), side = box, self.size
        scale = side / res
        reach = 3 * max(scale, 1) + 1                                # 3: radius of Lanczos; 1: rounding
        first, last = max(0, int(top * scale - reach)), min(side, int((top + h) * scale + reach) + 1)
        rows = self.image.crop((0, first, side, last)).resize((res, last - first), Image.Resampling.LANCZOS)
        cols = Image.new("RGB", (w, side))
        cols.paste(rows.crop((left, 0, left + w, last - first)), (0, first))
        return np.asarray(cols.resize((w, res), Image.Resampling.LANCZOS))[top:top + h]


class Photos:
    """Image files of one folder or zip, with their classes."""

    def __init__(self, store: Folder | Zip, members: list[str], labels: list[int], classes: tuple[str, ...], crop: int):
        self.store, self.members, self.labels, self.classes, self.crop = store, members, labels, classes, crop

    def __len__(self) -> int:
        return len(self.members)

    def label(self, i: int) -> int:
        return self.labels[i]

    def __getitem__(self, i: int) -> Photo:
        member = self.members[i]
        return Photo(f"{self.store.root}/{member}", lambda: decode(self.store.read(member)), self.crop)


class SixKMix:
    """FFHQ 6K-mix: every file at 256 px, then the first 6000 files again at 512 to 1024 px; or so with scenes and with
    sizes in these proportions.

    The data has few large pictures; half of the draws go to them (`pick`), as in the published code.
    """

    classes = ()

    def __init__(self, photos: Photos | Landscapes, size: int = 256):
        if len(photos) < 6000:
            raise DataError(f"ffhq-6k-mix needs at least 6000 pictures, {photos.store.root} has {len(photos)}")
        self.photos, self.size = photos, size

    def __len__(self) -> int:
        return len(self.photos) + 6000

    def label(self, i: int) -> int:
        return 0

    def pick(self, gen: np.random.Generator) -> int:
        """The index to show: any small picture or any large one, with equal chances."""
        return int(gen.integers(len(self.photos)) if gen.random() < 0.5 else len(self.photos) + gen.integers(6000))

    def __getitem__(self, i: int) -> Photo:
        small = i < len(self.photos)
        photo = self.photos[i if small else i - len(self.photos)]
        size = self.size if small else mix_size(i - len(self.photos), self.size)
        return Photo(photo.name, lambda: Image.fromarray(photo.draw(size)))


def mix_size(i: int, size: int = 256) -> int:
    """Side of the i-th large picture of the 6K-mix: 512 to 1024 (2 to 4 times the small ones' size) over the first
    5000, 1024 for the last 1000."""
    return 2 * size + round(2 * size * (i / 4999)) if i < 5000 else 4 * size


class Cifar10:
    """The official python batches, all in memory: images uint8 (N, 32, 32, 3), labels int (N,)."""

    classes = CIFAR10

    def __init__(self, root: Path, images: np.ndarray, labels: np.ndarray):
        self.root, self.images, self.labels = root, images, labels

    def __len__(self) -> int:
        return len(self.images)

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def __getitem__(self, i: int) -> Photo:
        return Photo(f"{self.root} number {i}", lambda: Image.fromarray(self.images[i]))


class _Inert:
    """Stands in for every numpy object of a pickle: keeps the state it is given and runs nothing."""

    def __init__(self, *args):
        self.state = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return _Inert
        raise pickle.UnpicklingError(f"refuses to load {module}.{name}, which is no plain array")


def read_batch(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) and labels (N,) of one CIFAR-10 batch. It is a pickle, yet no code in it can run."""
    try:
        batch = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
        pixels = np.frombuffer(batch[b"data"].state[-1], np.uint8).reshape(-1, 3, 32, 32)
        labels = np.array(batch[b"labels"], np.int64)
    except Exception as error:                                       # a damaged pickle can raise anything
        raise DataError(f"{name} is not a CIFAR-10 batch: {error}") from error
    if labels.shape != pixels.shape[:1] or not ((0 <= labels) & (labels < 10)).all():
        raise DataError(f"{name} is not a CIFAR-10 batch: {len(pixels)} images, labels {labels.shape}")
    return pixels.transpose(0, 2, 3, 1), labels


# ---- prepared sets ---------------------------------------------------------------------------------------------------

PREPARED = 1                                                         # version of the two files below
PIXELS, META = "pixels.u8", "meta.json"                              # uint8 (N, S, S, 3), first train, then val


class Copy(Photo):
    """A picture of a prepared set: it gives the pixels it has, and is never enlarged."""

    def require(self, res: int) -> None:
        """DataError where `res` is more than was prepared."""
        if res > self.size:
            raise DataError(f"{self.name} was prepared at {self.size} px, not the {res} px asked for: prepare the "
                            f"source with --size {res}, or train with size={self.size} or less (stage ae: "
                            f"max_size as well)")

    def draw(self, res: int, box: Box | None = None) -> np.ndarray:
        self.require(res)
        return super().draw(res, box)


class Prepared:
    """A set that `prepare` decoded and resized. The pixels are mapped, not read: all processes share one copy."""

    def __init__(self, root: Path, split: str):
        try:
            meta = json.loads((root / META).read_text())
            if meta["format"] != PREPARED:
                raise DataError(f"{root} has format {meta['format']}, this version reads {PREPARED}; prepare it again")
            labels, self.size, self.hash = meta["labels"], int(meta["size"]), str(meta["sha256"])
            both, self.classes = labels["train"] + labels["val"], tuple(meta["classes"])
            fits = len(both) == meta["count"] and set(both) <= set(range(max(1, len(self.classes))))
        except DataError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{root}/{META} is damaged ({error!r}); prepare it again") from error
        have, want = (root / PIXELS).stat().st_size, len(both) * self.size**2 * 3
        if not fits or have != want:
            raise DataError(f"{root} is damaged or not complete: {PIXELS} has {have:,} bytes, {META} says {want:,} for "
                            f"{len(both):,} labels; prepare it again")
        self.root, self.total = root, len(both)
        self.labels, self.first = both if split == "all" else labels[split], len(labels["train"]) * (split == "val")

    @cached_property
    def pixels(self) -> np.ndarray:
        return np.memmap(self.root / PIXELS, np.uint8, "r", shape=(self.total, self.size, self.size, 3))

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "pixels"}   # it would go by value

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, i: int) -> int:
        return self.labels[i]

    def __getitem__(self, i: int) -> Copy:
        row = self.first + range(len(self))[i]
        return Copy(f"{self.root} number {row}", lambda: Image.fromarray(self.pixels[row]))

    def damage(self) -> list[tuple[str, str]]:
        """[(file, reason)] where the pixels are not those that were written, else []."""
        digest = hashlib.sha256()
        with open(self.root / PIXELS, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        same = digest.hexdigest() == self.hash
        return [] if same else [(f"{self.root}/{PIXELS}", f"its SHA-256 is not the one in {META}; prepare it again")]


@dataclass
class _Whole(torch.utils.data.Dataset):
    """Row i of a prepared set: (pixels (S, S, 3), whether they were enlarged), or why there is none."""

    source: Landscapes | Photos | Cifar10
    size: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[np.ndarray, bool] | BadImage:
        try:
            picture = self.source[i]
            return picture.draw(self.size), picture.size < self.size
        except BadImage as error:
            return error


def prepare(name: str, folder: Path, size: int, workers: int = 0) -> dict:
    """Decode the data set `name` into a new folder that `open_data` reads: every picture whole at size x size.

    What is drawn from the copy at `size` is what is drawn from the source, so whole pictures make the same batches. It
    appears when complete: an interrupted call leaves nothing, and the same call starts again. Returns the content of
    meta.json; unreadable pictures are left out and listed there as `skipped`, smaller ones are counted as `enlarged`.
    Raises FileExistsError, and DataError for a set that cannot be prepared.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another folder, or delete it")
    if not 0 < size <= Scene.size:
        raise DataError(f"--size {size}: choose 1 to {Scene.size}")
    sources = {split: open_data(name, split) for split in ("train", "val")}
    if isinstance(sources["train"], (SixKMix, Prepared)):
        raise DataError(f"{name} cannot be prepared at one size: it has many by design, or was prepared before")
    meta = {"format": PREPARED, "source": name, "size": size, "filter": "lanczos", "count": 0, "sha256": "",
            "enlarged": 0, "skipped": [], "classes": sources["train"].classes, "labels": {"train": [], "val": []}}
    digest = hashlib.sha256()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as temporary:
        made = Path(temporary, folder.name)                          # TemporaryDirectory itself is for its owner alone
        made.mkdir()
        with open(made / PIXELS, "wb") as file:
            for split, source in sources.items():
                rows = torch.utils.data.DataLoader(_Whole(source, size), 16, collate_fn=list, num_workers=workers,
                                                   worker_init_fn=_outlive_signals)
                rows = tqdm(chain.from_iterable(rows), f"{name}, {split}", len(source), disable=None)
                for i, row in enumerate(rows):
                    if isinstance(row, BadImage):
                        meta["skipped"].append(str(row))
                        continue
                    pixels, small = row[0].tobytes(), row[1]
                    file.write(pixels)
                    digest.update(pixels)
                    meta["enlarged"] += small
                    meta["labels"][split].append(source.label(i))
            os.fsync(file.fileno())
        meta["count"], meta["sha256"] = sum(map(len, meta["labels"].values())), digest.hexdigest()
        if not meta["count"]:
            raise DataError(f"none of the pictures of {name} can be read, the last: {meta['skipped'][-1]}")
        (made / META).write_text(json.dumps(meta) + "\n")
        made.rename(folder)                                          # fails where another call was faster
    return meta


# ---- data sets by name -----------------------------------------------------------------------------------------------


def open_data(name: str, split: str = "train") -> Landscapes | Photos | SixKMix | Cifar10 | Prepared:
    """The data set `name` (one of NAMES, or a path to a folder or zip, or what `prepare` made of one of them); split:
    train, val (held out) or all.

    A source has a length, `classes` (names; empty without), `label(i)`, and pictures: source[i] has `name`, `size`
    (the largest square it gives) and draw(res, box) -> uint8. Raises FileNotFoundError, DataError with what to do.
    """
    if split not in ("train", "val", "all"):
        raise ValueError(f"unknown split {split!r}: train, val or all")
    if name == "synthetic":
        return Landscapes(split)
    if name == "synthetic-6k-mix":                                   # for preset tiny: 64 px, and up to 256 px
        return Landscapes(split) if split == "val" else SixKMix(Landscapes(split), 64)
    store = _find(name)
    if {PIXELS, META} <= set(store.names) and isinstance(store, Folder):
        return Prepared(store.root, split)
    batches = [n for n in store.names if re.fullmatch(r"(.*/)?(data_batch_\d|test_batch)", n)]
    if batches:
        wanted = [n for n in batches if split == "all" or n.endswith("test_batch") == (split == "val")]
        parts = [read_batch(store.read(n), f"{store.root}/{n}") for n in wanted]
        if not parts:
            raise DataError(f"{store.root} has no batch for split {split}; found {', '.join(batches)}")
        return Cifar10(store.root, *(np.concatenate(p) for p in zip(*parts)))
    if name == "ffhq-6k-mix" and split != "val":                     # the published mix takes the held-out files too
        return SixKMix(_open_photos(store, "ffhq", "all"))
    return _open_photos(store, name.removesuffix("-6k-mix"), split)


def fingerprint(source: Landscapes | Photos | SixKMix | Cifar10 | Prepared) -> str:
    """A hash of which pictures a source has, without decoding any: names and stamps of the files, in their order."""
    if isinstance(source, Cifar10):
        return hashlib.sha256(source.images.tobytes()).hexdigest()
    if isinstance(source, Landscapes):
        parts = [source.first, source.count]
    elif isinstance(source, SixKMix):
        parts = [fingerprint(source.photos), source.size]
    elif isinstance(source, Prepared):
        parts = [source.hash, source.first, len(source)]
    else:
        parts = [source.crop, *((name, source.store.stamp(name)) for name in source.members)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _find(name: str) -> Folder | Zip:
    roots = [Path("data")] + ([Path(os.environ["DATA_ROOT"])] if os.environ.get("DATA_ROOT") else [])
    folders = [name, "ffhq"] if name == "ffhq-6k-mix" else [name]
    places = [root / f"{f}{end}" for root in roots for f in folders for end in ("", ".zip")]
    if name not in NAMES:
        places.insert(0, Path(name))
    for place in places:
        if place.is_dir():
            return Folder(place)
        if place.is_file():
            return Zip(place)
    what = NAMES.get(name, "a folder or .zip of PNG, JPEG or WEBP images")
    raise FileNotFoundError(f"no data set {name!r}: looked for {', '.join(map(str, places))}. Put there: {what}; "
                            f"or go on without it: --data synthetic")


def _open_photos(store: Folder | Zip, name: str, split: str) -> Photos:
    """The images of one split with their labels: parts first (train/, val/), then the folders below as classes."""
    images = [n for n in store.names if n.lower().endswith(EXTENSIONS)]
    if not images:
        raise DataError(f"{store.root} holds no {', '.join(EXTENSIONS)} files")
    top = posixpath.commonpath([posixpath.dirname(n) for n in images])         # the folders that all have in common
    below = [n[len(top):].lstrip("/") for n in images]
    parts = [n.split("/")[0] if "/" in n else "" for n in below]
    held_out = "val" if "val" in parts else "test"
    if {"train", held_out} <= set(parts):
        below = [n.partition("/")[2] for n in below]
        held = np.array([p == held_out for p in parts])
        kept = held if split == "val" else np.array([p == "train" for p in parts])
    else:
        held = _held_out(store, name, images)
        kept = held if split == "val" else ~held
    chosen = np.arange(len(images)) if split == "all" else np.flatnonzero(kept)
    if len(chosen) == 0:
        raise DataError(f"{store.root}: none of its {len(images)} pictures is in split {split} (a set of 4 has some)")

    folders = [n.split("/")[0] if n.count("/") == 1 else "" for n in below]
    classes = tuple(sorted(set(folders)))
    numbered = all(re.fullmatch(r"\d{5,}", c) for c in classes)      # 00000/, 01000/: a big set in pieces, no classes
    if len(classes) < 2 or "" in classes or numbered or (name in NAMES and name != "cifar10"):
        classes = ()
    labels = [classes.index(folders[i]) if classes else 0 for i in chosen]
    return Photos(store, [images[i] for i in chosen], labels, classes, crop=178 if name == "celeba" else 0)


def _held_out(store: Folder | Zip, name: str, images: list[str]) -> np.ndarray:
    """Which images are held out, bool (N,): by the official lists of FFHQ and CelebA, else a fixed random part."""
    n, stems = len(images), [_stem(i) for i in images]
    files = {posixpath.basename(f): f for f in store.names if f.endswith(".txt")}
    if name == "ffhq":
        # The published code uses the lists of taming-transformers (ffhqtrain.txt, ffhqvalidation.txt), a random 60,000
        # and 10,000. Without them: the split that the FFHQ authors recommend, the first 60,000 and the rest.
        for listed in ("ffhqvalidation.txt", "val.txt"):
            if listed in files:
                held = {_stem(line.strip()) for line in store.read(files[listed]).decode().splitlines()}
                return np.array([s in held for s in stems])
        if n == 70_000 and all(s.isdigit() for s in stems):
            return np.array([int(s) >= 60_000 for s in stems])
    if name == "celeba":                                             # 0 train, 1 validation, 2 test
        if "list_eval_partition.txt" in files:
            lines = store.read(files["list_eval_partition.txt"]).decode().splitlines()
            part = {_stem(line.split()[0]): line.split()[1] for line in lines if line.strip()}
            return np.array([part.get(s, "0") != "0" for s in stems])
        if n == 202_599 and all(s.isdigit() for s in stems):
            return np.array([int(s) > 162_770 for s in stems])
    held = np.zeros(n, bool)
    held[rng("held out", n).permutation(n)[:min(max(64, n // 20), n // 4)]] = True
    return held


def _stem(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0]


def check_data(source, progress: Callable[[int], None] | None = None) -> list[tuple[str, str]]:
    """Decode every picture; the (name, reason) of each that fails. `progress` is told the count so far.

    Of a prepared set the pixel file is compared with its hash.
    """
    if isinstance(source, Prepared):
        return source.damage()

    def check(i: int) -> tuple[str, str] | None:
        picture = source[i]
        try:
            picture.size                                             # decodes a photograph; scenes know theirs
        except BadImage as error:
            return picture.name, str(error).removeprefix(f"{picture.name}: ")

    with ThreadPoolExecutor() as pool:                               # decoders release the interpreter lock
        found = []
        for done, bad in enumerate(pool.map(check, range(len(source))), 1):
            found += [bad] if bad else []
            if progress:
                progress(done)
    return found


# ---- synthetic landscapes --------------------------------------------------------------------------------------------

TIMES = ("dawn", "day", "dusk", "night")
PALETTES = {     # sky above, sky at the horizon, haze, direct light, light in the shade
    "dawn": ((0.36, 0.47, 0.72), (1.00, 0.80, 0.66), (0.72, 0.66, 0.76), (1.08, 0.80, 0.60), (0.40, 0.40, 0.56)),
    "day": ((0.13, 0.36, 0.72), (0.74, 0.87, 0.96), (0.62, 0.74, 0.88), (1.00, 0.95, 0.85), (0.30, 0.38, 0.52)),
    "dusk": ((0.16, 0.16, 0.40), (1.00, 0.55, 0.28), (0.56, 0.38, 0.50), (1.12, 0.60, 0.38), (0.28, 0.25, 0.42)),
    "night": ((0.02, 0.04, 0.12), (0.13, 0.22, 0.38), (0.12, 0.19, 0.33), (0.46, 0.56, 0.78), (0.13, 0.18, 0.30)),
}
SUN_HEIGHT = {"dawn": (0.24, 0.42), "day": (-0.04, 0.16), "dusk": (0.24, 0.42), "night": (0.07, 0.22)}
WOODS = {"spring": (0.27, 0.36, 0.15), "summer": (0.13, 0.25, 0.13), "autumn": (0.46, 0.33, 0.15),
         "winter": (0.17, 0.21, 0.21)}
ROCKS = (0.50, 0.47, 0.45), (0.60, 0.44, 0.36), (0.38, 0.38, 0.42), (0.57, 0.52, 0.45)
SNOW = (0.95, 0.97, 1.00)


def _color(rgb) -> np.ndarray:
    return np.array(rgb, np.float32)[:, None, None]                  # (3, 1, 1)


def _mix(a, b, t):
    return a * (1 - t) + b * t                                       # exactly a at 0 and b at 1


def _step(x, width: float):
    return np.clip(x / width + 0.5, 0, 1)                            # share of a pixel of this width where x > 0


@lru_cache(maxsize=1)
def _lattice() -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=0)).uniform(-1, 1, 2**16).astype(np.float32)


def _noise(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smooth noise in [-1, 1] at (x, y) in lattice cells, and its two derivatives. It repeats after 256 cells."""
    i, j = np.floor(x), np.floor(y)
    s, t = x - i, y - j
    i, j = i.astype(np.intp) & 255, (j.astype(np.intp) & 255) << 8
    right, down = (i + 1) & 255, (j + 256) & 65535
    at = _lattice().take                                             # faster than brackets
    a, c = at(j + i), at(down + i)
    ab, cd = at(j + right) - a, at(down + right) - c
    u, v = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    upper, rise = a + ab * u, c - a + (cd - ab) * u
    return upper + rise * v, (ab + (cd - ab) * v) * (6 * s * (1 - s)), rise * (6 * t * (1 - t))


def _fractal(x, y, pixel: float, freq: float, aspect: float, gain: float, offsets, ridged: bool = False):
    """Octaves of noise and the two derivatives of their sum; each fades out before it gets finer than a pixel shows."""
    value = dx = dy = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for k, (ox, oy) in enumerate(offsets.tolist()):
        fade = min(1.0, (1 / (freq * pixel) - 1.5) / 2)              # wavelength in pixels: 3.5 or more counts in full
        if fade <= 0:
            break
        n, nx, ny = _noise(x * freq + ox, y * (freq * aspect) + oy)
        sign = np.clip(-8 * n, -1, 1) if ridged else 0.5             # ridged: creases where the noise crosses zero
        amp = 2 * fade * gain**k
        value = value + amp * (n * sign + 0.35 * ridged)             # 0.35: zero mean
        dx, dy = dx + amp * freq * nx * sign, dy + amp * freq * aspect * ny * sign
        freq *= 1.93
    return value, dx, dy


@dataclass(frozen=True)
class Mountain:
    """One range: a smooth outline with a summit, roughened by noise that also shapes the slope below it."""

    depth: float              # 0 at the back, 1 in front
    base: float               # where its foot is, y in [0, 1] downwards
    tilt: float
    summit: tuple[float, float, float]                               # height, x, half-width
    rough: float              # height of the roughness
    freq: float
    offsets: np.ndarray

    def outline(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """y of the smooth upper edge at columns x, and its derivative."""
        height, centre, width = self.summit
        side = (x - centre) / width
        away = np.sqrt(side * side + 0.01)
        peak = 1.25 * height * np.exp(-2.2 * away)
        return self.base - peak - self.tilt * (x - 0.5), 2.2 / width * peak * side / away - self.tilt

    def ridge(self, x: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray]:
        """y of the upper edge in all detail at columns x (1, w), and its derivative."""
        y, slope = self.outline(x)
        n, dx, _ = _fractal(x, np.zeros((1, 1), np.float32), pixel, self.freq, 0.5, 0.45, self.offsets, ridged=True)
        return y - self.rough * n, slope - self.rough * dx


class Scene:
    """A mountain landscape, a function of its index: drawn antialiased at any size, the same scene at each."""

    size = 4096                                                      # it has no resolution of its own

    def __init__(self, index: int):
        g = np.random.Generator(np.random.Philox(key=index + 1))     # 0 is the lattice's
        self.name, self.time, self.season = f"scene {index}", TIMES[index % 4], tuple(WOODS)[g.integers(4)]
        self.palette = [_color(c * g.normal(1, 0.035, 3) + g.normal(0, 0.02)) for c in np.array(PALETTES[self.time])]
        self.rock, self.wood = _color(ROCKS[g.integers(4)]), _color(WOODS[self.season] * g.uniform(0.8, 1.2, 3))
        self.side = 1 if g.random() < 0.5 else -1                    # where the light comes from: right or left
        self.sun = 0.5 + self.side * g.uniform(0.08, 0.42), g.uniform(*SUN_HEIGHT[self.time]), g.uniform(0.014, 0.03)
        self.clouds, self.mist, self.tree = g.uniform(-0.8, 0.3), g.uniform(0.1, 0.8), g.uniform(0.022, 0.045)
        self.snow = g.uniform(0, 0.25) - 0.35 * (self.season == "winter")      # heights of the snow line and
        self.wooded = g.uniform(-0.05, 0.12) if g.random() < 0.85 else -9.0    # of the tree line above the foot
        self.lake = g.uniform(0.70, 0.82) if g.random() < 0.4 else 2.0         # y of its far shore; 2: none
        self.sky_offsets = g.uniform(0, 256, (2, 12, 2))
        n, back, turn = int(g.integers(3, 7)), g.uniform(0.50, 0.62), int(g.integers(2))
        self.mountains = [Mountain(
            depth=d, base=_mix(back, 0.98, d**1.3) + g.normal(0, 0.012),
            tilt=g.uniform(0.05, 0.35) * d * (-1) ** (i + turn),
            summit=(g.uniform(0.05, 0.28) * (i < 2), g.uniform(0.15, 0.85), g.uniform(0.25, 0.5)),
            rough=_mix(g.uniform(0.08, 0.18), g.uniform(0.03, 0.08), d), freq=g.uniform(2.0, 3.6),
            offsets=g.uniform(0, 256, (12, 2))) for i, d in enumerate(np.linspace(0, 1, n).tolist())]

    def snow_line(self, m: Mountain) -> float:
        return self.snow + (0 if self.season == "winter" else 0.25 * m.depth)

    def caption(self) -> str:
        """The scene in words."""
        top = max(m.summit[0] + m.rough / 2 for m in self.mountains)
        bare = "bare" if self.wooded < -1 else "wooded"
        kind = "snowy" if self.snow < 0 else "snow-capped" if self.snow < top else bare
        sky = "a clear sky" if self.clouds < -0.5 else "scattered clouds" if self.clouds < 0 else "a cloudy sky"
        return (f"{kind} mountains {'by' if self.time == 'day' else 'at'} {self.time} in {self.season}, {sky}"
                + ", conifers" * (self.wooded > -1) + ", a lake" * (self.lake < 1) + ", mist" * (self.mist > 0.5))

    def draw(self, res: int, box: Box | None = None) -> np.ndarray:
        """The scene at res x res, cropped to `box`: uint8 (height, width, 3)."""
        top, left, h, w = box or (0, 0, res, res)
        pixel = 1 / res
        x = ((np.arange(left, left + w) + 0.5) * pixel).astype(np.float32)[None]           # (1, w)
        y = ((np.arange(top, top + h) + 0.5) * pixel).astype(np.float32)[:, None]          # (h, 1)
        reflected = np.where(y < self.lake, y, np.float32(2 * self.lake) - y)
        image = self.sky(x, reflected, pixel)                                              # (3, h, w)
        for m in self.mountains[:-1]:
            self.paint(image, m, x, reflected, pixel)
        if self.lake < 1:
            ripples = 0.12 * _fractal(x, y, pixel, 4, 9, 0.7, self.sky_offsets[1])[0]
            water = _mix(0.85 * image, 0.5 * self.palette[4] + 0.2 * self.palette[0], 0.25) * (1 + ripples)
            image = _mix(image, water, _step(y - self.lake, pixel))
        self.paint(image, self.mountains[-1], x, y, pixel)
        return (np.clip(image, 0, 1).transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8)

    def paint(self, image, m: Mountain, x, y, pixel: float) -> None:
        """Mountain m with its trees over `image`, in place."""
        rows_of_trees = (0.0, 0.9, 2.0, 3.1) if self.wooded > -1 and m.depth > 0.45 else ()
        for drop in rows_of_trees[:1]:                               # on the ridge, their feet behind it
            self.trees(image, m, x, y, pixel, drop)
        self.slope(image, m, x, y, pixel)
        for drop in rows_of_trees[1:]:
            self.trees(image, m, x, y, pixel, drop * self.tree)

    def sky(self, x, y, pixel: float) -> np.ndarray:
        """Gradient, sun or moon with its glow, stars, clouds: (3, h, w)."""
        zenith, horizon, haze, light, shade = self.palette
        up = np.clip(1 - y / 0.6, 0, 1) ** 0.8
        away = np.hypot(x - self.sun[0], y - self.sun[1]).astype(np.float32)
        image = _mix(horizon, zenith, up) + light * (0.45 * np.exp(away / -0.14) + 0.3 * np.exp(away / -0.04))
        image = _mix(image, np.minimum(1, 0.8 + 0.3 * light), _step(self.sun[2] - away, pixel))
        if self.time == "night":
            image = image + self.stars(x, y, pixel) * up
        n, dx, dy = _fractal(x, y * (1 + y), pixel, 2.2, 2.5, 0.5, self.sky_offsets[0])
        thick = np.clip(n + self.clouds, 0, 1)
        bright = np.clip(1.05 - 0.5 * thick + 0.01 * (dy - 2 * self.side * dx), 0.2, 1)
        cloud = _mix(0.6 * shade + 0.4 * haze, np.minimum(1, light + 0.12), bright)
        return _mix(image, cloud, 1 - np.exp(-2.5 * thick))

    def stars(self, x, y, pixel: float, cell: float = 0.03) -> np.ndarray:
        """One star to a cell; those smaller than a pixel keep their light."""
        i, j = np.floor(x / cell), np.floor(y / cell)
        k = (i.astype(np.intp) * 7 + j.astype(np.intp) * 4099) & 32767
        dx, dy, bright = (_lattice()[k + s] for s in (0, 9000, 20000))
        radius = max(0.0014, 0.6 * pixel)
        away = ((x / cell - i - 0.5 - 0.3 * dx) ** 2 + (y / cell - j - 0.5 - 0.3 * dy) ** 2) * (cell / radius) ** 2
        return 4 * (0.0014 / radius) ** 2 * np.clip(bright, 0, 1) ** 3 * np.exp(-away)

    def slope(self, image, m: Mountain, x, y, pixel: float) -> None:
        """The face of mountain m: rock, snow and woods by height and steepness, lit from the side, lost in haze."""
        zenith, horizon, haze, light, shade = self.palette
        ridge, steep = m.ridge(x, pixel)
        rows = np.flatnonzero(y > ridge.min() - 2 * pixel)
        y = y[rows]
        edge, fall = m.outline(x)
        down, away = y - edge, x - m.summit[1]                       # gullies spread from the summit
        spread = 20 * m.summit[0] * np.exp(-(away / m.summit[2]) ** 2) * np.maximum(down, 0)
        n, dx, dy = _fractal(x - away * spread / (1 + spread), down, pixel, m.freq, 0.55, 0.47, m.offsets, ridged=True)
        dx, dy = dx * m.rough - 0.6 * fall * np.exp(np.abs(down) / -0.2), dy * m.rough
        flat = 1 / (1 + dx * dx + dy * dy)
        lit = np.clip((0.35 + 0.5 * dy - 0.8 * self.side * dx) * np.sqrt(flat), 0, 1)
        height = m.base - y + 0.06 * n
        snow = _step(height - self.snow_line(m) + 0.1 * (flat - 0.6), 0.03)
        woods = _step(self.wooded - height + 0.05 * (flat - 0.6), 0.02)
        tone = _mix(_mix(self.rock, self.wood, woods), _color(SNOW), snow) * (shade * (0.8 + 0.3 * n) + light * lit)
        fog = 0.75 * (1 - m.depth) ** 1.4 + self.mist * (1 - m.depth) ** 0.7 * np.clip((y - ridge) / 0.35, 0, 1)
        cover = _step(y - ridge, pixel * (1 + np.abs(steep)))
        image[:, rows] = _mix(image[:, rows], _mix(tone, haze, np.minimum(fog, 0.93)), cover)

    def trees(self, image, m: Mountain, x, y, pixel: float, drop: float) -> None:
        """A row of conifers whose feet stand `drop` below the ridge of mountain m, one to a cell of width `size`."""
        zenith, horizon, haze, light, shade = self.palette
        size = self.tree * (0.5 + 0.5 * m.depth)
        shift = 37.3 * m.depth + 1234.5 * drop
        cell = np.floor(x / size + shift)
        a, b, c = (_lattice()[(cell.astype(np.intp) & 32767) + s] for s in (3, 11000, 25000))
        axis = (cell + 0.5 + 0.25 * a - shift) * size                # (1, w): each column knows its tree
        foot = m.ridge(axis, pixel)[0] + drop
        grown = _step(self.wooded + 0.04 * c - m.base + foot, 0.05)  # smaller towards the tree line
        tall = size * (2.1 + 0.9 * b) * grown
        rows = np.flatnonzero((y < foot.max() + 2 * pixel) & (y > (foot - tall).min() - 2 * pixel))
        up, dx = foot - y[rows], x - axis
        z = np.clip(up / np.maximum(tall, 1e-6), 0, 1)               # 0 at the foot, 1 at the tip
        tier = 7 * z % 1 * np.clip(tall / (20 * pixel) - 0.5, 0, 1)  # boughs, where they are larger than pixels
        half = 0.46 * size * grown * (1 - z) * (1.05 - 0.35 * tier)
        cover = np.clip((np.minimum(dx + pixel / 2, half) - np.maximum(dx - pixel / 2, -half)) / pixel, 0, 1)
        cover = cover * _step(up, pixel)
        bright = 0.25 + 0.5 * np.clip(0.5 + self.side * dx / size, 0, 1) + 0.15 * c - 0.1 * tier
        snow = 0.55 * _step(m.base - foot - self.snow_line(m) + 0.05 + 0.05 * b, 0.05) * (1 - tier) * (1 - z)
        tone = _mix(self.wood, _color(SNOW), snow) * (shade + light * bright)
        image[:, rows] = _mix(image[:, rows], _mix(tone, haze, 0.6 * (1 - m.depth) ** 1.2), cover)


class Landscapes:
    """Procedural mountains: 50,000 scenes to train on, 10,000 others held out; the class is the time of day."""

    classes = TIMES

    def __init__(self, split: str = "train"):
        self.first, self.count = {"train": (0, 50_000), "val": (50_000, 10_000), "all": (0, 60_000)}[split]

    def __len__(self) -> int:
        return self.count

    def label(self, i: int) -> int:
        return (self.first + i) % len(TIMES)

    def caption(self, i: int) -> str:
        return self[i].caption()

    def __getitem__(self, i: int) -> Scene:
        return Scene(self.first + range(self.count)[i])


# ---- encoder input and ground-truth patch ----------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """How one picture becomes an encoder input and a ground-truth patch (INFD J.2, supplementary E)."""

    size: int = 256           # side of the encoder input; also the smallest ground truth (published code)
    patch: int = 256          # side of the patch that is rendered and compared (published code)
    max_size: int = 1024      # largest ground truth: larger pictures are resized to at most this (published code)
    p_whole: float = 0.0      # chance of the whole picture at `size` as ground truth (published code has it, unused)
    p_original: float = 0.0   # chance of the largest size (J.2: 0.5 in the last 400K steps on Mountains)
    downsample: bool = True   # False: always the largest size, the ablation of supplementary E
    flip: bool = False        # mirror half of the pictures; the published code does not

    def __post_init__(self):
        if not 0 < self.patch <= self.size <= self.max_size:
            raise ValueError(f"patch={self.patch}, size={self.size}, max_size={self.max_size}: each must not be larger "
                             "than the next")


def to_tensor(array: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float().div_(255).sub_(0.5).div_(0.5)


def patch_at(picture, r: int, top: int, left: int, cfg: DataConfig, mirror: bool = False) -> dict[str, Tensor]:
    """Encoder input and the patch at (top, left) of the picture at r x r; see `random_patch`. Draws no numbers."""
    S, P = cfg.size, cfg.patch
    whole = picture.draw(S)
    patch = picture.draw(r, (top, r - left - P if mirror else left, P, P))
    step = -1 if mirror else 1
    y, x = coord_grid((r, 1))[top:top + P, 0, 0], coord_grid((1, r))[0, left:left + P, 1]
    return {
        "image": to_tensor(whole[:, ::step]),                        # (3, S, S)
        "patch": to_tensor(patch[:, ::step]),                        # (3, P, P)
        "coord": torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1),     # (P, P, 2), a slice of the r x r grid
        "cell": torch.full((2,), 2 / r),                             # (2,)
    }


def random_patch(picture, gen: np.random.Generator, cfg: DataConfig) -> dict[str, Tensor]:
    """What stage ae learns from: the picture at cfg.size, and a crop of it at a random size r (supplementary E, J.2).

    image (3, S, S) and patch (3, P, P) in [-1, 1]; coord (P, P, 2) and cell (2,) of the patch, as slices of
    coord_grid((r, r)). r is uniform in S..min(picture.size, max_size), both included.
    """
    if isinstance(picture, Copy):
        picture.require(cfg.max_size)                                # else its ground truth would be smaller unnoticed
    largest = min(picture.size, cfg.max_size)
    if largest < cfg.size:
        # The published code enlarges such pictures for its custom data and stops for FFHQ; blurred ground truth
        # teaches the renderer to blur, so this stops.
        raise DataError(f"{picture.name} is {picture.size} px, smaller than the input of {cfg.size} px; "
                        f"remove it, or train with size={picture.size} or less")
    whole, keep, mirror = gen.random() < cfg.p_whole, gen.random() < cfg.p_original, cfg.flip and gen.random() < 0.5
    r = largest if keep or not cfg.downsample else int(gen.integers(cfg.size, largest + 1))
    r = cfg.size if whole else r
    top, left = gen.integers(0, r - cfg.patch + 1, 2).tolist()
    return patch_at(picture, r, top, left, cfg, mirror)


# ---- batches ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _order(seed: int | str, epoch: int, n: int) -> np.ndarray:
    return rng(seed, "order", epoch).permutation(n)


class _Samples(torch.utils.data.Dataset):
    """Sample n of an endless run: (item, what had to be skipped for it), or the error that ends the run."""

    def __init__(self, source, make_item: Callable[..., dict], seed: int | str, noise: dict[str, tuple[int, ...]]):
        self.source, self.make_item, self.seed, self.noise = source, make_item, seed, noise

    def index(self, n: int, attempt: int) -> int:
        """Which picture sample n shows; after a bad one, the next."""
        if hasattr(self.source, "pick"):
            return self.source.pick(rng(self.seed, "pick", n, attempt))
        epoch, i = divmod(n + attempt, len(self.source))
        return int(_order(self.seed, epoch, len(self.source))[i])

    def __getitem__(self, n: int) -> tuple[dict, list[str]] | DataError:
        skipped: list[str] = []
        while True:
            i = self.index(n, len(skipped))
            try:
                item = self.make_item(self.source[i], rng(self.seed, "item", n))
                noise = {name: torch_noise(shape, self.seed, name, n) for name, shape in self.noise.items()}
                return {**item, **noise, "index": n, "label": self.source.label(i)}, skipped
            except BadImage as error:
                skipped.append(str(error))
                if len(skipped) > TOLERATED:
                    return DataError(f"{len(skipped)} unreadable images in a row, the last: {error}")
            except DataError as error:                               # raised in the main process, without a traceback
                return error


def _collate(samples: list) -> tuple[dict[str, Tensor], list[str]] | DataError:
    errors = [s for s in samples if isinstance(s, DataError)]
    if errors:
        return errors[0]
    items = [item for item, _ in samples]
    batch = {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}
    return batch, [text for _, skipped in samples for text in skipped]


def _outlive_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM are for the main process; a worker that dies first would break off the step it is in.

    Out of the process group, Ctrl-C does not come here. A SIGTERM of its own, which batch systems send to all, ends a
    worker two seconds later: ignored altogether, it would let the interpreter wait for it at exit.
    """
    if hasattr(signal, "SIGALRM"):
        os.setpgrp()
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, 2))


def loader(source, make_item: Callable[..., dict], batch: int, start: int = 0, seed: int | str = 0, workers: int = 0,
           rank: int = 0, world: int = 1, pin_memory: bool = False,
           noise: dict[str, tuple[int, ...]] | None = None) -> Iterator[dict[str, Tensor]]:
    """Endless batches from step `start` on: the stacked items, with "index" (sample number n) and "label".

    Step k holds the samples k * batch .. (k + 1) * batch - 1, each rank an equal, contiguous share. Sample n shows
    picture n % len of a permutation of its epoch and gets the generator rng(seed, "item", n): the batches do not depend
    on workers, ranks or on where a run was continued. make_item(picture, gen) -> dict; with workers it must pickle.
    noise, name -> shape: standard normal numbers that the batch holds beside its items, torch_noise(shape, seed, name,
    n) of sample n; the workers draw them, since a GPU can take more pictures than one process can make noise for.
    Unreadable images are replaced by the next one, with a warning; above 1 % of the images seen: DataError.
    """
    if batch < 1 or batch % world:
        raise ValueError(f"a batch of {batch} cannot be shared by {world} processes; choose a multiple")
    if len(source) == 0:
        raise DataError("the data set is empty")
    if workers and sys.platform == "linux" and not _room_in_shm():
        warnings.warn("little room in /dev/shm, so one process loads the data: workers=0 (docker: --shm-size=1g)")
        workers = 0
    share = batch // world
    steps = (range(k * batch + rank * share, k * batch + (rank + 1) * share) for k in count(start))
    batches = torch.utils.data.DataLoader(
        _Samples(source, make_item, seed, noise or {}), batch_sampler=steps, collate_fn=_collate, num_workers=workers,
        pin_memory=pin_memory, worker_init_fn=_outlive_signals, generator=torch.Generator())
    return _checked(batches, share)


def _checked(batches, share: int) -> Iterator[dict[str, Tensor]]:
    """The batches alone; warns of each skipped image and stops when they become too many."""
    bad = 0
    for seen, result in zip(count(share, share), batches):
        if isinstance(result, DataError):
            raise result
        batch, skipped = result
        for text in skipped:
            bad += 1
            warnings.warn(f"skipped unreadable image {bad}: {text}")
        if bad > max(TOLERATED, seen // 100):
            raise DataError(f"{bad} of the first {seen} images cannot be read (see --check-data), the last: {text}")
        yield batch


def _room_in_shm() -> bool:
    return os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free >= 2**28


# ---- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="Decode a data set once: --data DST then reads pixels, not files.")
    p.add_argument("command", choices=["prepare"])
    p.add_argument("source", metavar="SRC", help=f"a folder or .zip of images, or one of {', '.join(NAMES)}")
    p.add_argument("folder", metavar="DST", type=Path, help="a new folder; size x size x 3 bytes a picture")
    p.add_argument("--size", type=int, required=True, help="side in pixels (centre square, Lanczos)")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode (%(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 2 after one line on what is wrong, 143 or 130 after a signal."""
    args = parser().parse_args(argv)
    try:
        with stop_at_once():
            meta = prepare(args.source, args.folder, args.size, args.workers)
    except Stopped as stop:
        print("stopped; nothing is left, the same command starts again", file=sys.stderr)
        return stop.args[0]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for text in meta["skipped"]:
        print(f"skipped: {text}")
    print(f"{meta['count']:,} pictures of {args.size} px in {args.folder}, {len(meta['skipped'])} skipped, "
          f"{meta['enlarged']} enlarged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
