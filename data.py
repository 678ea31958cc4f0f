"""Data sets, folders, zips, prepared copies and built-in scenes, and the batches made of them.

A `Source` gives `Picture`s, which draw themselves at any size; `random_patch` makes an item of one
(INFD supplementary E and J.2); `loader` stacks items. Nothing in a file is trusted: damage is an
error of one line. Read next: train.py, whose steps consume the batches.
"""
from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import math
import os
import posixpath
import re
import shutil
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from clif import coord_grid
from landscapes import Box, Landscapes
from runs import Stopped, cli, first_line, rng, torch_noise

NAMES = ("synthetic", "synthetic-6k-mix", "ffhq", "ffhq-6k-mix", "mountains", "celeba",
         "lsun-church", "lsun-classroom", "cifar10")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
NOT_READ = (".avif", ".bmp", ".exr", ".gif", ".heic", ".jp2", ".jxl", ".ppm", ".tif", ".tiff")
MAX_PIXELS = 2**26                                   # 8192 x 8192: below Pillow's own limit
MAX_BYTES = 2**28                                    # of one file, packed or not
PIXELS, META = "pixels.u8", "meta.json"              # a prepared set: (N, S, S, 3); the rest
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX)")
TOLERATED = 10                                       # unreadable images before 1 % of all is a lot
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
CELEBA = ("list_eval_partition.txt", "list_eval_partition.csv")        # its makers', Kaggle's
FFHQ = ("ffhqvalidation.txt", "val.txt")             # taming-transformers' lists, as published


class DataError(ValueError):
    """The data cannot be used as asked; the message names the file and what to do."""


class BadImage(DataError):
    """One file is no readable image; training skips it and goes on."""


def shown(name: str | Path) -> str:
    """Make a file's name fit for a message: characters that no terminal prints are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


@contextmanager
def reading(what: str, kind: type[DataError] = DataError, remedy: str = "") -> Iterator[None]:
    """Turn all that damage makes a reader raise into one line: what, the cause, the remedy."""
    try:
        yield
    except (DataError, Stopped):
        raise
    except Image.UnidentifiedImageError as error:
        raise kind(f"{what}: not a PNG, JPEG or WEBP image{remedy}") from error
    except Exception as error:
        cause = getattr(error, "strerror", None) or first_line(error)
        raise kind(f"{what}: {cause}{remedy}") from error


# ---- data sets ----


class Picture(Protocol):
    """One square picture; size is its side in pixels, drawn larger it is blurred."""

    name: str
    size: int

    def draw(self, res: int, box: Box | None = None) -> np.ndarray:
        """Draw it at res x res, uint8 (res, res, 3); of a box (top, left, h, w) that part alone."""


class Source:
    """A data set to train on and to score by, made of any class with len() and [i].

    [i] gives a PIL image (its centre square counts), a pair that begins with one, or a Picture.
    classes, targets, label(i), caption(i) and identity() are used where the class has them.
    """

    classes: Sequence[str] = ()                      # their names; empty: there are none
    labels: Sequence[int] = ()                       # of each picture an index into `classes`
    captions: Sequence[str] = ()
    passed_over = ""                                 # what of the files is not in the set, in words

    def __init__(self, dataset):
        self.dataset = dataset
        self.labels = getattr(dataset, "targets", ())
        for name in ("classes", "label", "caption", "identity"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))
        if len(dataset) and not hasattr(self[0], "draw"):
            kinds = f"{type(dataset).__name__}[0] is a {type(dataset[0]).__name__}"
            raise DataError(f"{kinds}: return a PIL image, and its class from label(i)")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Picture:
        item = self.dataset[i]
        image = item[0] if isinstance(item, tuple) else item
        if isinstance(image, Image.Image):
            return Photo(f"{type(self.dataset).__name__}[{i}]", functools.partial(to_rgb, image))
        return item

    def label(self, i: int) -> int:
        return self.labels[i] if self.labels else 0

    def caption(self, i: int) -> str:
        return self.captions[i] if self.captions else ""

    def identity(self) -> list:
        """Tell the set from others by content, without decoding; the order does not count."""
        return [type(self.dataset).__name__, len(self), *self.classes]


def as_source(dataset) -> Source:
    """Make a Source of any data set class."""
    return dataset if isinstance(dataset, Source) else Source(dataset)


def fingerprint(source: Source) -> dict[str, int | str]:
    """Say which pictures a source holds, for a run to store: {"pictures": n, "digest": hex}."""
    digest = hashlib.sha256(repr(source.identity()).encode())
    return {"pictures": len(source), "digest": digest.hexdigest()}


def decode(content: bytes, name: str = "picture") -> Image.Image:
    """Decode a PNG, JPEG or WEBP to RGB, upright, with transparency on white, or raise BadImage."""
    with reading(name, BadImage):
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MAX_PIXELS:  # known before any decoding
            raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any mode upright and to RGB, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                   # 16-bit grey, which Pillow's convert clips
        grey = np.asarray(image).astype(np.int32).clip(0, 65535)
        image = Image.fromarray(((2 * grey + 257) // 514).astype(np.uint8))    # round(grey / 257)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass
class Photo:
    """The centre square of an RGB image, decoded at the first use; a Picture."""

    name: str
    read: Callable[[], Image.Image]
    prepared: bool = False                           # its source may be larger

    @functools.cached_property
    def image(self) -> Image.Image:
        with reading(self.name, BadImage):
            image = self.read()
        side = min(image.size)
        left = (image.width - side) // 2
        top = (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    @property
    def size(self) -> int:
        return self.image.width

    def draw(self, res: int, box: Box | None = None) -> np.ndarray:
        """Resize the square to res x res, by Lanczos as published, and crop it to `box`."""
        # Pillow rounds a box to float32: not the same pixels. So its two passes are done one by
        # one: along the rows that the box needs, then along the columns.
        top, left, h, w = box or (0, 0, res, res)
        side = self.size
        reach = 3 * max(side / res, 1) + 1           # 3: radius of Lanczos; 1: rounding
        first = max(0, int(top * side / res - reach))
        last = min(side, int((top + h) * side / res + reach) + 1)
        rows = self.image.crop((0, first, side, last))
        rows = rows.resize((res, last - first), Image.Resampling.LANCZOS)
        columns = Image.new("RGB", (w, side))
        columns.paste(rows.crop((left, 0, left + w, last - first)), (0, first))
        return np.asarray(columns.resize((w, res), Image.Resampling.LANCZOS))[top:top + h]


# ---- folders and zips ----


class Files:
    """List and read a folder, links followed, or a zip.

    members: name -> where it lies; names: all but the hidden ones, sorted; pictures: those that are
    read; passed_over: what else looks like a picture, or may not be read, counted, in words.
    """

    def __init__(self, root: Path):
        self.root = root
        self.zipped = not root.is_dir()
        errors = []                                  # folders that cannot be read
        self.members = self._in_zip() if self.zipped else self._in_folder(errors)
        if errors and not self.members:
            raise errors[0]
        denied = [shown(error.filename) for error in errors]
        self.names = sorted(name for name in self.members if not HIDDEN.search(name))
        self.pictures = [name for name in self.names if name.lower().endswith(EXTENSIONS)]

        others = [name for name in self.names if name.lower().endswith(NOT_READ)]
        kinds = ", ".join(sorted({os.path.splitext(name)[1].lower() for name in others}))
        every = sum(name.lower().endswith(EXTENSIONS) for name in self.members)
        passed = {f"{kinds} (PNG, JPEG and WEBP are read)": len(others),
                  "hidden": every - len(self.pictures),
                  f"without permission ({', '.join(denied)})": len(denied)}
        for main in ("images1024x1024", "img_align_celeba"):     # of FFHQ and CelebA, not copies
            inside = [name for name in self.pictures if f"/{main}/" in f"/{name}"]
            if inside:
                passed[f"outside {main}"] = len(self.pictures) - len(inside)
                self.pictures = inside
        self.passed_over = ", ".join(f"{n} {what}" for what, n in passed.items() if n)

    def _in_folder(self, errors: list[OSError]) -> dict[str, str]:
        """Walk through the folder: each real folder once, and no loops."""
        found = {}
        seen = {os.path.realpath(self.root)}
        for folder, below, files in os.walk(self.root, onerror=errors.append, followlinks=True):
            within = Path(folder).relative_to(self.root)
            for name in files:
                found[(within / name).as_posix()] = os.path.join(folder, name)
            here = os.path.realpath(folder)
            paths = [os.path.join(folder, name) for name in sorted(below)]
            below.clear()
            for path in sorted(paths, key=os.path.islink):
                real = os.path.realpath(path)
                if real not in seen and not here.startswith(os.path.join(real, "")):
                    seen.add(real)
                    below.append(os.path.basename(path))
        return found

    def _in_zip(self) -> dict[str, str]:
        with reading(f"{shown(self.root)} is not a readable zip"):
            members = self.archive(os.getpid()).namelist()
        names = [posixpath.normpath(member.replace("\\", "/")) for member in members]   # Windows'
        return {name: member for name, member in zip(names, members) if member[-1] not in "/\\"}

    @functools.lru_cache(maxsize=8)
    def archive(self, process: int) -> zipfile.ZipFile:
        """Open the zip, once in each process: a handle must not cross a fork."""
        return zipfile.ZipFile(self.root)

    def where(self, name: str) -> str:
        return shown(self.root / name)

    def size(self, name: str) -> int:
        if self.zipped:
            return self.archive(os.getpid()).getinfo(self.members[name]).file_size
        return os.path.getsize(self.members[name])

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes:
        """Read a file. Raises BadImage, which names it and the cause."""
        with reading(self.where(name), BadImage):
            if self.size(name) > limit:              # zipfile never yields more than this size
                raise ValueError(f"larger than {limit >> 20} MB")
            if self.zipped:
                return self.archive(os.getpid()).read(self.members[name])
            return Path(self.members[name]).read_bytes()

    def text(self, name: str) -> str:
        """Read a file of labels or captions. Raises BadImage, as `read`."""
        with reading(self.where(name), BadImage):
            return self.read(name, MAX_BYTES // 4).decode("utf-8-sig")

    def nearest(self, *names: str) -> str | None:
        """Find the file of one of these names that lies nearest to the top."""
        found = [name for name in self.names if posixpath.basename(name) in names]
        return min(found, key=len, default=None)


@dataclass
class Photos(Source):
    """The pictures of one split of a folder or zip.

    A caption is the "text" of the picture's line in a metadata.jsonl of its folder, else the text
    file beside it (a.txt beside a.png).
    """

    store: Files
    members: list[str]
    labels: list[int]
    classes: Sequence[str]
    passed_over: str

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: int) -> Photo:
        member = self.members[i]
        name = self.store.where(member)
        return Photo(name, lambda: decode(self.store.read(member), name))

    def caption(self, i: int) -> str:
        beside = os.path.splitext(self.members[i])[0] + ".txt"
        text = self.listed.get(self.members[i], "")
        if not text and beside in self.store.members:
            text = self.store.text(beside)
        return " ".join(text.encode("utf-8", "replace").decode().split())

    @functools.cached_property
    def listed(self) -> dict[str, str]:
        """Picture -> caption, of all metadata.jsonl files."""
        found = {}
        for file in [name for name in self.store.names if name.endswith("metadata.jsonl")]:
            for number, line in enumerate(self.store.text(file).split("\n"), 1):
                with reading(f"{self.store.where(file)}, line {number} is damaged"):
                    row = json.loads(line.strip() or "{}")
                    name = posixpath.join(posixpath.dirname(file), row.get("file_name", ""))
                    name = posixpath.normpath(name)
                    if row and name not in self.store.members:
                        raise ValueError(f"there is no {shown(name)}")
                    found[name] = str(row.get("text") or "")
        return found

    def identity(self) -> list:
        sizes = [self.store.size(member) for member in self.members]
        return sorted(zip(self.members, sizes, self.labels))


def open_photos(store: Files, name: str, split: str) -> Photos:
    """Find one split of a set, train, val or all, with its classes: those of StyleGAN's and EDM's
    dataset.json, else the folders, where each picture lies in one that is no number."""
    pictures = store.pictures
    over = store.passed_over
    if not pictures:
        raise DataError(f"{shown(store.root)} holds no {', '.join(EXTENSIONS)} files"
                        f"{over and '; passed over: '}{over}")
    top = posixpath.commonpath([posixpath.dirname(picture) for picture in pictures])
    below = [picture.removeprefix(top).lstrip("/") for picture in pictures]
    parts = [SPLITS.get(path.split("/")[0].lower()) if "/" in path else None for path in below]
    held = "val" if "val" in parts else "test"
    if "train" in parts and held in parts:
        below = [path.partition("/")[2] for path in below]
        neither = len(parts) - parts.count("train") - parts.count(held)
        if neither and split != "all":
            over += ", " * bool(over) + f"{neither} neither in train nor in {held}"
    else:
        official = held_out(store, name)
        parts = [held if picture in official else "train" for picture in pictures]
    wanted = {"train": ["train"], "val": [held], "all": parts}[split]
    chosen = [i for i, part in enumerate(parts) if part in wanted]
    if not chosen:
        raise DataError(f"{shown(store.root)}: none of its {len(pictures)} pictures is in {split}")

    listed = listed_labels(store)
    folders = [path.split("/")[0] if path.count("/") == 1 else "" for path in below]
    values = [listed.get(picture) for picture in pictures] if listed else folders
    classes = sorted(set(values))
    pieces = all(re.fullmatch(r"\d{5,}", folder) for folder in folders)       # of a set in pieces
    if "" in classes or not listed and (pieces or name in NAMES and name != "cifar10"):
        classes = values[:1]
    index = {value: i for i, value in enumerate(classes)}
    return Photos(store, [pictures[i] for i in chosen], [index.get(values[i], 0) for i in chosen],
                  tuple(map(str, classes)) if len(classes) > 1 else (), over)


def held_out(store: Files, name: str) -> set[str]:
    """Choose the held-out pictures: the official ones of CelebA and FFHQ, else 5 % by their names'
    hash, so that a picture stays whatever is added, and at least one of 4."""
    pictures = store.pictures
    celeba = name == "celeba" or store.nearest(*CELEBA)
    ffhq = name == "ffhq" or "images1024x1024" in f"{store.root.name}/{pictures[0]}".split("/")
    listed = store.nearest(*CELEBA if celeba else FFHQ)
    if listed and (celeba or ffhq):
        rows = [line.replace(",", " ").split() for line in store.text(listed).splitlines()]
        stems = {Path(row[0]).stem for row in rows if row and row[1:] in ([], ["1"], ["2"])}
        return {picture for picture in pictures if Path(picture).stem in stems}
    if celeba or ffhq:
        first = 162_771 if celeba else 60_000        # the split that the makers of FFHQ recommend
        stems = {picture: Path(picture).stem for picture in pictures}
        held = {key for key, stem in stems.items() if stem.isdecimal() and int(stem) >= first}
        if held:
            return held
    ranks = {}
    for picture in pictures:
        bare = os.fsencode(os.path.splitext(picture)[0])
        ranks[picture] = int.from_bytes(hashlib.blake2b(bare, digest_size=8).digest(), "big")
    held = {picture for picture, rank in ranks.items() if rank < 0.05 * 2**64}
    return held or set(sorted(ranks, key=ranks.get)[:len(ranks) >= 4])


def listed_labels(store: Files) -> dict[str, int]:
    """Read picture -> class of StyleGAN's dataset.json, {"labels": [[name, class], ...]}."""
    file = store.nearest("dataset.json")
    found = {}
    with reading(f"{store.root / (file or '')} is damaged",
                 remedy="; mend it, or remove it to go on without labels"):
        content = json.loads(store.text(file)) if file else None
        rows = content.get("labels") if isinstance(content, dict) else None
        for name, label in rows or []:
            if type(label) is not int:               # of EG3D: a camera, no class
                return {}
            found[posixpath.join(posixpath.dirname(file), name.replace("\\", "/"))] = label
        missing = [name for name in store.pictures if found and name not in found]
        if missing:
            raise ValueError(f"no label for {len(missing)} pictures ({shown(missing[0])})")
    return found


def import_torchvision():
    """Import torchvision; if built for another torch, with its missing operators declared."""
    try:
        import torchvision
    except RuntimeError:
        if hasattr(torch.ops.torchvision, "nms"):
            raise
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
        import torchvision
    return torchvision


def open_cifar10(folder: Path, split: str) -> Source:
    """Open the official python batches, read and checked (MD5) by torchvision."""
    official = import_torchvision().datasets.CIFAR10
    reader = type("CIFAR10", (official,), {"base_folder": folder.name})
    try:
        dataset = reader(folder.parent, train=split != "val")
        more = reader(folder.parent, train=False)
    except RuntimeError as error:
        raise DataError(f"{shown(folder)} is not CIFAR-10 as published (MD5); unpack "
                        f"cifar-10-python.tar.gz again") from error
    if split == "all":
        dataset.data = np.concatenate([dataset.data, more.data])
        dataset.targets += more.targets
    return Source(dataset)


class SixKMix(Source):
    """FFHQ 6K-mix: every picture at `size` px, then the first 6000 again at 2 to 4 times that."""

    def __init__(self, photos: Source, size: int = 256):
        if len(photos) < 6000:
            raise DataError(f"ffhq-6k-mix needs at least 6000 pictures, there are {len(photos)}")
        self.photos = photos
        self.size = size
        self.passed_over = photos.passed_over

    def __len__(self) -> int:
        return len(self.photos) + 6000

    def pick(self, gen: np.random.Generator) -> int:
        """Choose any small picture or any large one, with equal chances, as published."""
        small = len(self.photos)
        return int(gen.integers(small) if gen.random() < 0.5 else small + gen.integers(6000))

    def __getitem__(self, i: int) -> Photo:
        large = i - len(self.photos)
        photo = self.photos[i if large < 0 else large]
        size = self.size if large < 0 else mix_size(large, self.size)
        return Photo(photo.name, lambda: Image.fromarray(photo.draw(size)))

    def identity(self) -> list:
        return [self.size, *self.photos.identity()]


def mix_size(i: int, size: int = 256) -> int:
    """Give the side of the i-th large picture of the 6K-mix (512 to 1024 px as published)."""
    return 2 * size + round(2 * size * (i / 4999)) if i < 5000 else 4 * size


class Prepared(Source):
    """What `prepare` wrote; the pixels are mapped, not read: all processes share one copy."""

    def __init__(self, root: Path, split: str):
        self.root = root
        text = (root / META).read_bytes()
        have = (root / PIXELS).stat().st_size
        with reading(f"{shown(root / META)} is damaged", remedy="; prepare the set again"):
            meta = json.loads(text)
            both = meta["train"] + meta["val"]       # of each picture its label and its caption
            self.dataset = both if split == "all" else meta[split]
            self.first = len(meta["train"]) if split == "val" else 0
            self.labels = [label for label, _ in self.dataset]
            self.captions = [text for _, text in self.dataset]
            self.classes = tuple(meta["classes"])
            self.filter = meta["filter"]
            self.hash = meta["sha256"]
            self.size = meta["size"]
            self.passed_over = meta["passed_over"]
            self.shape = (len(both), self.size, self.size, 3)
            if meta["format"] != 2 or self.size < 1 or have != math.prod(self.shape):
                raise ValueError(f"not the {have:,} bytes of {PIXELS}, or not this version's")

    @property
    def pixels(self) -> np.ndarray:
        """All pictures of both splits, uint8 (N, S, S, 3)."""
        return np.memmap(self.root / PIXELS, np.uint8, "r", shape=self.shape)

    def __getitem__(self, i: int) -> Photo:
        row = self.first + range(len(self))[i]
        name = f"{shown(self.root)} number {row}"
        return Photo(name, lambda: Image.fromarray(self.pixels[row]), prepared=True)

    def identity(self) -> list:
        return [self.hash, self.first, len(self)]


def prepare(name: str, folder: Path, size: int, workers: int = 0) -> dict:
    """Decode the data set `name` into a new folder that `open_data` reads, whole at size x size.

    The folder appears when it is complete. Gives its meta.json, and in it as `skipped` what could
    not be read, in `enlarged` how many pictures were smaller.
    """
    if folder.exists():
        raise FileExistsError(f"{shown(folder)} exists; choose another folder, or delete it")
    sources = {split: open_data(name, split) for split in ("train", "val")}
    meta = {"format": 2, "source": name, "size": size, "filter": "lanczos", "train": [], "val": [],
            "classes": sources["train"].classes, "passed_over": sources["train"].passed_over,
            "enlarged": 0, "skipped": []}
    digest = hashlib.sha256()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as temporary:
        made = Path(temporary, folder.name)          # TemporaryDirectory itself is for its owner
        made.mkdir()
        with open(made / PIXELS, "wb") as file:
            for split, source in sources.items():
                drawn = DataLoader(source, 16, collate_fn=functools.partial(_draw, size=size),
                                   num_workers=workers, worker_init_fn=_outlive_signals)
                bar = tqdm(chain.from_iterable(drawn), split, len(source), disable=None)
                for i, (pixels, told) in enumerate(bar):
                    if pixels is None:
                        meta["skipped"].append(told)
                        continue
                    file.write(pixels)
                    digest.update(pixels)
                    meta["enlarged"] += told
                    meta[split].append((source.label(i), source.caption(i)))
            os.fsync(file.fileno())
        meta["sha256"] = digest.hexdigest()
        (made / META).write_text(json.dumps(meta) + "\n")
        made.rename(folder)                          # fails where another call was faster
    return meta


def _draw(pictures: list[Picture], size: int) -> list[tuple]:
    rows = []
    for picture in pictures:
        try:
            rows.append((picture.draw(size).tobytes(), picture.size < size))
        except BadImage as error:
            rows.append((None, str(error)))
    return rows


# ---- data sets by name ----


def open_data(name: str, split: str = "train") -> Source:
    """Open a data set: one of NAMES, or the path of a folder, a zip, or what `prepare` made.

    split: train, val (held out) or all. Raises FileNotFoundError, and DataError with what to do.
    """
    if split not in ("train", "val", "all"):
        raise ValueError(f"unknown split {split!r}: train, val or all")
    if name == "synthetic" or name == "synthetic-6k-mix" and split == "val":
        return Source(Landscapes(split))
    if name == "synthetic-6k-mix":                   # for preset tiny: 64 px, and up to 256 px
        return SixKMix(Source(Landscapes(split)), 64)

    root = _find(name)
    files = Files(root)
    if not files.zipped and {META, PIXELS} <= files.members.keys():
        return Prepared(root, split)
    batch = files.nearest("data_batch_1")
    if batch:
        if files.zipped:
            raise DataError(f"{shown(root)}: CIFAR-10 is read from a folder; unpack it")
        return open_cifar10((root / batch).parent, split)
    if name == "ffhq-6k-mix" and split != "val":     # the published mix takes held-out files too
        return SixKMix(open_photos(files, "ffhq", "all"))
    return open_photos(files, name.removesuffix("-6k-mix"), split)


def _find(name: str) -> Path:
    places = [] if name in NAMES else [Path(name)]
    for root in filter(None, ("data", os.environ.get("DATA_ROOT"))):
        place = Path(root, name.removesuffix("-6k-mix"))
        places += [place, place.with_name(f"{place.name}.zip")]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(f"no data set {shown(name)!r}: looked for "
                            f"{', '.join(map(shown, places))}. Put a folder or .zip of images "
                            f"there, or go on without it: --data synthetic")


def check_data(source: Source) -> list[tuple[str, str]]:
    """Decode every picture and list what cannot be used: [(file, reason)]."""
    found = []
    if isinstance(source, Prepared) and hashlib.sha256(source.pixels).hexdigest() != source.hash:
        found.append((shown(source.root / PIXELS), f"its SHA-256 is not that of {META}"))
    for i in tqdm(range(len(source)), "checking", disable=None):
        picture = source[i]
        try:
            picture.size                             # decodes a photograph; scenes know theirs
        except BadImage as error:
            found.append((picture.name, str(error).removeprefix(f"{picture.name}: ")))
    return found


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
    edge: int = 0             # crops may lie so far outside; moved back, they show borders more

    def __post_init__(self):
        least = self.smallest or self.size
        if not 0 < self.patch <= least <= self.max_size or self.size > self.max_size:
            raise ValueError(f"patch={self.patch}, smallest={least}, size={self.size}, max_size="
                             f"{self.max_size}: each must not be larger than the next")
        if self.edge < 0 or (self.p_whole and self.patch > self.size):
            raise ValueError(f"edge={self.edge} must not be negative, and with p_whole "
                             f"patch={self.patch} not be larger than size={self.size}")


def to_tensor(array: np.ndarray) -> Tensor:
    """Turn uint8 (H, W, 3) into float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float().div_(255).sub_(0.5).div_(0.5)


def to_uint8(rgb: Tensor) -> np.ndarray:
    """Turn (..., 3, h, w) in [-1, 1] into uint8 (..., h, w, 3), truncated as published."""
    if not torch.isfinite(rgb).all():
        raise ValueError("an image holds NaN or infinity")
    pixels = ((rgb.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()


def patch_at(picture: Picture, r: int, top: int, left: int, cfg: DataConfig,
             mirror: bool = False) -> dict[str, Tensor]:
    """Give the encoder input, and the patch at (top, left) of the picture at r x r."""
    P = cfg.patch
    step = -1 if mirror else 1
    whole = picture.draw(cfg.size)
    patch = picture.draw(r, (top, r - left - P if mirror else left, P, P))
    y = coord_grid((r, 1))[top:top + P, 0, 0]
    x = coord_grid((1, r))[0, left:left + P, 1]
    return {
        "image": to_tensor(whole[:, ::step]),                                  # (3, S, S)
        "patch": to_tensor(patch[:, ::step]),                                  # (3, P, P)
        "coord": torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1),     # (P, P, 2)
        "cell": torch.full((2,), 2 / r),                                       # (2,)
    }


def random_patch(picture: Picture, gen: np.random.Generator, cfg: DataConfig) -> dict[str, Tensor]:
    """Make what stage ae learns from: a picture, and a crop of it at a random size r, uniform in
    smallest..min(picture.size, max_size), both included (INFD supplementary E, J.2)."""
    if isinstance(picture, Photo) and picture.prepared and picture.size < cfg.max_size:
        raise DataError(f"{picture.name} was prepared at {picture.size} px: prepare it at "
                        f"{cfg.max_size} px, or train with max_size={picture.size}")
    least = cfg.smallest or cfg.size
    largest = min(picture.size, cfg.max_size)
    if largest < max(least, cfg.size):               # enlarged, it would teach the renderer to blur
        raise DataError(f"{picture.name} is {picture.size} px, smaller than the input of "
                        f"{max(least, cfg.size)} px; remove it, or train with "
                        f"size={picture.size} or less")
    whole = gen.random() < cfg.p_whole
    keep = gen.random() < cfg.p_original
    mirror = cfg.flip and gen.random() < 0.5
    r = largest if keep or not cfg.downsample else int(gen.integers(least, largest + 1))
    if whole:
        r = cfg.size
    corner = gen.integers(-cfg.edge, r - cfg.patch + cfg.edge + 1, 2)
    top, left = corner.clip(0, r - cfg.patch).tolist()
    return patch_at(picture, r, top, left, cfg, mirror)


# ---- batches ----


@functools.lru_cache(maxsize=4)
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

    def __getitem__(self, n: int) -> tuple[dict, list[str]] | DataError:
        skipped = []
        while len(skipped) <= TOLERATED:
            try:
                return self.item(n, len(skipped)), skipped
            except BadImage as error:
                skipped.append(str(error))
            except DataError as error:               # raised in the main process, no traceback
                return error
        return DataError(f"{len(skipped)} unreadable images in a row, the last: {skipped[-1]}")

    def item(self, n: int, attempt: int) -> dict:
        """Make sample n; after a bad picture, of the next."""
        if hasattr(self.source, "pick"):
            i = self.source.pick(rng(self.seed, "pick", n, attempt))
        else:
            epoch, i = divmod(n + attempt, len(self.source))
            i = int(_order(self.seed, epoch, len(self.source))[i])
        item = dict(self.make_item(self.source[i], rng(self.seed, "item", n)))
        for name, shape in self.noise.items():
            item[name] = torch_noise(shape, self.seed, name, n)
        if self.captions:
            item["caption"] = self.source.caption(i)
        return item | {"index": n, "label": self.source.label(i)}


def _collate(samples: list) -> tuple[dict, list[str]] | DataError:
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    items, skipped = zip(*samples)
    return default_collate(items), list(chain.from_iterable(skipped))


def _outlive_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process; a worker that died first would break its step.

    A SIGTERM ends a worker two seconds later: ignored, the interpreter would wait for it at exit.
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
    Sample n shows picture n % len of a permutation of its epoch; make_item(picture, gen) -> dict
    gets rng(seed, "item", n), and noise, name -> shape, is torch_noise(shape, seed, name, n): all
    the same for any workers, ranks and start. captions: add "caption", a list of str. An unreadable
    image is replaced by the next, with a warning; above 1 % of the images seen: DataError.
    """
    if batch < 1 or batch % world:
        raise ValueError(f"a batch of {batch} cannot be shared by {world} processes")
    if len(source) == 0:
        raise DataError("the data set is empty")
    if workers and os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free < 2**28:
        warnings.warn("little room in /dev/shm (docker: --shm-size=1g), so workers=0")
        workers = 0
    share = batch // world
    firsts = (k * batch + rank * share for k in count(start))
    batches = DataLoader(
        _Samples(source, make_item, seed, noise or {}, captions), collate_fn=_collate,
        batch_sampler=(range(first, first + share) for first in firsts), num_workers=workers,
        pin_memory=pin_memory, worker_init_fn=_outlive_signals, generator=torch.Generator())
    bad = 0
    for seen, result in zip(count(share, share), batches):
        if isinstance(result, DataError):
            raise result
        stacked, skipped = result
        for text in skipped:
            bad += 1
            warnings.warn(f"skipped unreadable image {bad}: {text}")
        if bad > max(TOLERATED, seen // 100):
            raise DataError(f"{bad} of the first {seen} images cannot be read (see --check-data), "
                            f"the last: {text}")
        yield stacked


def run(args: argparse.Namespace) -> None:
    """Prepare a set, and say what is in it and what is not."""
    meta = prepare(args.source, args.folder, args.size, args.workers)
    for text in meta["skipped"]:
        print(f"skipped: {text}")
    print(f"{len(meta['train']) + len(meta['val']):,} pictures of {args.size} px in "
          f"{shown(args.folder)}, {len(meta['skipped'])} skipped, {meta['enlarged']} enlarged"
          f"{'; passed over: ' * bool(meta['passed_over'])}{meta['passed_over']}")


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code is that of `runs.cli`."""
    p = argparse.ArgumentParser(
        description="Decode a data set once: --data DST then reads pixels, not files.")
    p.add_argument("command", choices=["prepare"])
    p.add_argument("source", metavar="SRC", help=f"a folder, a .zip, or one of {', '.join(NAMES)}")
    p.add_argument("folder", metavar="DST", type=Path, help="new; size x size x 3 bytes a picture")
    p.add_argument("--size", type=int, required=True, help="side in pixels (centre, Lanczos)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="that decode (%(default)s)")
    return cli(run, p.parse_args(argv), "stopped; nothing is left, the same command starts again")


if __name__ == "__main__":
    sys.exit(main())
