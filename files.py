"""Pictures as they lie on a disk: folders and zips, the usual layouts, labels, captions.

`Files` lists and reads a set, `decode` makes RGB of a file, `open_photos` finds splits, classes and
captions as the makers of FFHQ, CelebA, StyleGAN and EDM lay them out. Nothing in a file is trusted:
damage is an error of one line. Read next: data.py, which makes batches of pictures.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import re
import zipfile
from collections.abc import Callable
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from landscapes import Box
from runs import first_line

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
NOT_READ = (".arw", ".avif", ".bmp", ".cr2", ".dng", ".exr", ".gif", ".heic", ".heif", ".jp2",
            ".jxl", ".nef", ".pgm", ".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff")
MAX_PIXELS = 2**26                                   # 8192 x 8192: below Pillow's own limit
MAX_BYTES = 2**28                                    # of one file, packed or not
MAX_TEXT = 2**26                                     # of a file of labels or captions
HELD_OUT = 0.05                                      # share of a set that has no split of its own
FFHQ, CELEBA = "images1024x1024", "img_align_celeba"         # of several copies the one that counts
PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")            # CelebA's, Kaggle's


class DataError(ValueError):
    """The data cannot be used as asked; the message names the file and what to do."""


class BadImage(DataError):
    """One file is no readable image; training skips it and goes on."""


def shown(name: str | Path) -> str:
    """Make a file's name fit for a message: characters that no terminal prints are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


def cause(error: Exception) -> str:
    """Say in one line why a file could not be read, without its name."""
    return getattr(error, "strerror", None) or first_line(error)


# ---- folders and zips ----------------------------------------------------------------------------


class Files:
    """List and read the files of a folder or, without unpacking it, of a zip.

    names: all but the hidden ones, sorted, relative to the folder, or in a zip to the one folder
    that holds all; pictures: those of them that are read; passed_over: what else looks like a
    picture, counted, in words; denied: folders without permission. Links are followed. Raises
    DataError for what is neither folder nor zip.
    """

    def __init__(self, root: Path):
        self.root = root
        self.opened = (0, None)
        self.denied: list[str] = []
        self.zipped = not root.is_dir()
        self.members = self._in_zip() if self.zipped else self._in_folder()    # name -> where
        self.names = sorted(name for name in self.members if not _hidden(name))
        self.pictures = [name for name in self.names if name.lower().endswith(EXTENSIONS)]

        notes = []
        others = [name for name in self.names if name.lower().endswith(NOT_READ)]
        if others:
            kinds = sorted({posixpath.splitext(name)[1].lower() for name in others})
            notes.append(f"{len(others)} {', '.join(kinds)} (PNG, JPEG and WEBP are read)")
        every = sum(name.lower().endswith(EXTENSIONS) for name in self.members)
        if every > len(self.pictures):
            notes.append(f"{every - len(self.pictures)} hidden")
        if self.denied:
            folders = "folder" if len(self.denied) == 1 else "folders"
            notes.append(f"{len(self.denied)} {folders} without permission ({self.denied[0]})")
        for main in (FFHQ, CELEBA):
            inside = [name for name in self.pictures if main in name.split("/")[:-1]]
            if 0 < len(inside) < len(self.pictures):
                notes.append(f"{len(self.pictures) - len(inside)} outside {main}")
                self.pictures = inside
        self.passed_over = ", ".join(notes)

    def _in_folder(self) -> dict[str, str]:
        """Walk through the folder, links followed: each real folder once, and no loops."""
        found = {}
        seen = {os.path.realpath(self.root)}
        for folder, below, files in os.walk(self.root, onerror=self._deny, followlinks=True):
            here = os.path.realpath(folder)
            paths = [os.path.join(folder, name) for name in below]
            below.clear()
            for path in sorted(paths, key=lambda p: (os.path.islink(p), p)):
                real = os.path.realpath(path)
                if real not in seen and not here.startswith(os.path.join(real, "")):
                    seen.add(real)
                    below.append(os.path.basename(path))
            within = Path(folder).relative_to(self.root).as_posix()
            for name in files:
                found[posixpath.normpath(f"{within}/{name}")] = os.path.join(folder, name)
        return found

    def _deny(self, error: OSError) -> None:
        if error.filename == os.fspath(self.root) or not isinstance(error, PermissionError):
            raise DataError(f"{shown(error.filename)}: {cause(error)}") from error
        self.denied.append(shown(error.filename))

    def _in_zip(self) -> dict[str, str]:
        where = shown(self.root)
        try:
            members = self.archive.namelist()
        except OSError as error:
            raise DataError(f"{where}: {cause(error)}") from error
        except Exception as error:                   # damage makes the reader raise anything
            raise DataError(f"{where} is not a readable zip file: {cause(error)}") from error
        found = {}
        for member in members:
            name = member.replace("\\", "/")         # as some programs of Windows write them
            if name.startswith("/") or ":" in name.split("/")[0] or ".." in name.split("/"):
                raise DataError(f"{where}: unsafe file name {member!r} in the zip")
            if not name.endswith("/"):
                found[posixpath.normpath(name)] = member
        tops = {name.partition("/")[0] for name in found if not _hidden(name)}
        if len(tops) == 1 and tops.isdisjoint(found):
            inside = f"{tops.pop()}/"
            found = {name.removeprefix(inside): member for name, member in found.items()}
        return found

    @property
    def archive(self) -> zipfile.ZipFile:
        """The zip, opened by each process for itself: a handle must not cross a fork."""
        if self.opened[0] != os.getpid():
            self.opened = (os.getpid(), zipfile.ZipFile(self.root))
        return self.opened[1]

    def __getstate__(self) -> dict:
        return vars(self) | {"opened": (0, None)}

    def where(self, name: str) -> str:
        """Name a file in a message."""
        return shown(self.root / name)

    def size(self, name: str) -> int:
        """Give a file's size in bytes, unpacked."""
        if self.zipped:
            return self.archive.getinfo(self.members[name]).file_size
        return os.path.getsize(self.members[name])

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes:
        """Read a file. Raises BadImage, which names it and the cause."""
        try:
            if self.size(name) > limit:              # zipfile never yields more than this size
                raise ValueError(f"larger than {limit >> 20} MB")
            if self.zipped:
                return self.archive.read(self.members[name])
            if not os.path.isfile(self.members[name]):
                raise ValueError("no regular file")
            return Path(self.members[name]).read_bytes()
        except Exception as error:                   # damage makes the reader raise anything
            raise BadImage(f"{self.where(name)}: {cause(error)}") from error

    def text(self, name: str) -> str:
        """Read a file of labels or captions. Raises BadImage, which names it and the cause."""
        try:
            return self.read(name, MAX_TEXT).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadImage(f"{self.where(name)}: not UTF-8 text") from error


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


# ---- one picture ---------------------------------------------------------------------------------


def decode(content: bytes, name: str = "picture") -> Image.Image:
    """Decode a PNG, JPEG or WEBP to RGB, upright, with transparency on white.

    Every pixel is decoded, so that damage is found. Raises BadImage, which begins with `name`.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MAX_PIXELS:  # known before any decoding
            raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
        return to_rgb(image)
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"{name}: not a PNG, JPEG or WEBP image") from error
    except Exception as error:                       # a hostile file makes a decoder raise anything
        raise BadImage(f"{name}: {cause(error)}") from error


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


class Photo:
    """The centre square of an image, decoded at the first use; a `data.Picture`.

    read() gives the image in RGB; crop is the side of the square, 0: as large as it gets.
    """

    def __init__(self, name: str, read: Callable[[], Image.Image], crop: int = 0):
        self.name = name
        self.read = read
        self.crop = crop

    @cached_property
    def image(self) -> Image.Image:
        try:
            image = self.read()
        except DataError:
            raise
        except Exception as error:                   # of a data set class of the user
            raise BadImage(f"{self.name}: {cause(error)}") from error
        side = min(*image.size, self.crop or image.width)
        left = (image.width - side) // 2
        top = (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    @property
    def size(self) -> int:
        return self.image.width

    def draw(self, res: int, box: Box | None = None) -> np.ndarray:
        """Resize the square to res x res, by Lanczos as published, and crop it to `box`."""
        lanczos = Image.Resampling.LANCZOS
        if box is None:
            return np.asarray(self.image.resize((res, res), lanczos))
        # Pillow can resize a box alone, but rounds its corners to float32: not the same pixels. Its
        # two passes, along the rows and then along the columns, are therefore done one by one: the
        # first on the rows that the box needs, the second on its columns alone.
        top, left, h, w = box
        side = self.size
        scale = side / res
        reach = 3 * max(scale, 1) + 1                # 3: radius of Lanczos; 1: rounding
        first = max(0, int(top * scale - reach))
        last = min(side, int((top + h) * scale + reach) + 1)
        rows = self.image.crop((0, first, side, last)).resize((res, last - first), lanczos)
        columns = Image.new("RGB", (w, side))
        columns.paste(rows.crop((left, 0, left + w, last - first)), (0, first))
        return np.asarray(columns.resize((w, res), lanczos))[top:top + h]


# ---- a set of them -------------------------------------------------------------------------------


class Photos:
    """The pictures of one split of a folder or zip, with classes and captions; a `data.Source`.

    A caption is the "text" of the picture's line in a metadata.jsonl of its folder, else the text
    file beside it (a.txt beside a.png).
    """

    def __init__(self, store: Files, members: list[str], labels: list[int],
                 classes: tuple[str, ...] = (), crop: int = 0, passed_over: str = ""):
        self.store = store
        self.members = members
        self.labels = labels
        self.classes = classes
        self.crop = crop
        self.passed_over = passed_over

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: int) -> Photo:
        member = self.members[i]
        name = self.store.where(member)
        return Photo(name, lambda: decode(self.store.read(member), name), self.crop)

    def label(self, i: int) -> int:
        return self.labels[i]

    def caption(self, i: int) -> str:
        """Describe picture i; empty without a caption. Raises DataError for a damaged text."""
        if not self.captioned(i):
            return ""
        text = self.listed.get(self.members[i]) or self.store.text(_bare(self.members[i]) + ".txt")
        return " ".join(text.encode("utf-8", "replace").decode().split())

    def captioned(self, i: int) -> bool:
        """Say whether picture i has a caption, without reading it."""
        member = self.members[i]
        return member in self.listed or _bare(member) + ".txt" in self.store.members

    @cached_property
    def listed(self) -> dict[str, str]:
        """Picture -> caption, of all metadata.jsonl files."""
        found = {}
        for file in self.store.names:
            if posixpath.basename(file) == "metadata.jsonl":
                found |= _caption_lines(self.store, file)
        return found

    def identity(self) -> list:
        """What tells the set from another: crop, names, sizes and labels, whatever their order."""
        sizes = [self.store.size(member) for member in self.members]
        return [self.crop, *sorted(zip(self.members, sizes, self.labels))]


def _bare(name: str) -> str:
    return posixpath.splitext(name)[0]


def _stem(name: str) -> str:
    return _bare(posixpath.basename(name))


def _caption_lines(store: Files, file: str) -> dict[str, str]:
    """Read a metadata.jsonl: picture -> caption. Raises DataError, which names file and line."""
    found = {}
    for number, line in enumerate(store.text(file).split("\n"), 1):
        try:
            row = json.loads(line.strip() or "{}")
            name = row.get("file_name", "")
            member = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
            text = str(row.get("text") or "")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{store.where(file)}, line {number} is damaged: {cause(error)}"
                            ) from error
        if name and member not in store.members:
            raise DataError(f"{store.where(file)}, line {number} names {shown(name)}, which is not "
                            f"there")
        if text:
            found[member] = text
    return found


def open_photos(store: Files, name: str, split: str) -> Photos:
    """Find one split of a set, train, val or all, with its classes.

    Splits: official lists and numbers of FFHQ and CelebA; else folders named train and val (valid,
    validation; or test); else by the hash of each name. Classes: StyleGAN's and EDM's dataset.json,
    else the folders, where each picture lies in one and their names are not numbers. Raises
    DataError.
    """
    pictures = store.pictures
    notes = [store.passed_over] if store.passed_over else []
    if not pictures:
        over = f"; passed over: {store.passed_over}" if notes else ""
        raise DataError(f"{shown(store.root)} holds no {', '.join(EXTENSIONS)} files{over}")
    deepest = sorted(store.names, key=lambda file: file.count("/"), reverse=True)
    files = {posixpath.basename(file): file for file in deepest}     # the one nearest to the top
    celeba = name == "celeba" or any(listed in files for listed in PARTITIONS)

    top = posixpath.commonpath([posixpath.dirname(n) for n in pictures])
    below = [n.removeprefix(top).lstrip("/") for n in pictures]
    parts = [n.split("/")[0].lower() if "/" in n else "" for n in below]
    held_parts = {"val", "valid", "validation"} & set(parts) or {"test"} & set(parts)
    if held_parts and "train" in parts:
        below = [n.partition("/")[2] for n in below]
        held = np.array([p in held_parts for p in parts])
        trained = np.array([p == "train" for p in parts])
        neither = len(parts) - held.sum() - trained.sum()
        if neither and split != "all":
            notes.append(f"{neither} neither in train nor in {', '.join(sorted(held_parts))}")
    else:
        held = _held_out(store, "celeba" if celeba else name, files)
        trained = ~held
    kept = {"train": trained, "val": held, "all": np.ones(len(pictures), bool)}[split]
    chosen = np.flatnonzero(kept).tolist()
    if not chosen:
        raise DataError(f"{shown(store.root)}: none of its {len(pictures)} pictures is in split "
                        f"{split} (a set of 4 has some)")

    own = _listed_labels(store, files)
    folders = [n.split("/")[0] if n.count("/") == 1 else "" for n in below]
    if own:
        values = [own[picture] for picture in pictures]
    elif "" in folders or name in ("ffhq", "mountains", "celeba", "lsun-church", "lsun-classroom"):
        values = [""] * len(pictures)
    else:
        values = folders
    known = sorted(set(values))
    numbered = not own and all(re.fullmatch(r"\d{5,}", v) for v in known)      # a set in pieces
    if len(known) < 2 or numbered:
        known = []
    index = {value: i for i, value in enumerate(known)}
    labels = [index.get(values[i], 0) for i in chosen]
    return Photos(store, [pictures[i] for i in chosen], labels, tuple(str(v) for v in known),
                  178 if celeba else 0, ", ".join(notes))


def _listed_labels(store: Files, files: dict[str, str]) -> dict[str, int]:
    """Read dataset.json, {"labels": [[name, class], ...]}: picture -> class; empty without one.

    Raises DataError where it is damaged or lacks a picture.
    """
    if "dataset.json" not in files:
        return {}
    file = files["dataset.json"]
    where = store.where(file)
    folder = posixpath.dirname(file)
    found = {}
    try:
        content = json.loads(store.text(file))
        labels = content.get("labels") if isinstance(content, dict) else None
        for name, label in labels or []:
            if type(label) is not int:               # of EG3D: a camera, no class
                return {}
            found[posixpath.join(folder, name.replace("\\", "/"))] = label
    except BadImage:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is damaged: {cause(error)}; mend it, or remove it to go on "
                        f"without labels") from error
    missing = [name for name in store.pictures if found and name not in found]
    if missing:
        raise DataError(f"{where} has no label for {len(missing)} pictures ({shown(missing[0])}); "
                        f"complete it, or remove it to go on without labels")
    return found


def _held_out(store: Files, name: str, files: dict[str, str]) -> np.ndarray:
    """Say which pictures are held out, bool (N,): an official split, else by the hash of each name.

    By hash a picture stays where it is, whatever is added to the set. About 5 % are held out; where
    that is none, as it may be of fewer than a hundred, the one of lowest hash.
    """
    stems = [_stem(picture) for picture in store.pictures]
    numbers = [int(stem) if re.fullmatch(r"\d{1,9}", stem) else -1 for stem in stems]
    if name == "celeba":                             # 0 train, 1 validation, 2 test
        for listed in PARTITIONS:
            if listed in files:
                lines = [re.split(r"[,\s]+", line.strip())
                         for line in store.text(files[listed]).splitlines()]
                held = {_stem(line[0]) for line in lines if line[1:] in (["1"], ["2"])}
                return np.array([stem in held for stem in stems])
        if len(stems) == 202_599 and min(numbers) > 0:
            return np.array(numbers) > 162_770
    if name == "ffhq" or FFHQ in f"{store.root.name}/{store.pictures[0]}".split("/"):
        # The published code uses the lists of taming-transformers (ffhqtrain.txt,
        # ffhqvalidation.txt), a random 60,000 and 10,000. Without them: the split that the FFHQ
        # authors recommend, the first 60,000 and the rest.
        for listed in ("ffhqvalidation.txt", "val.txt"):
            if listed in files:
                held = {_stem(line.strip()) for line in store.text(files[listed]).splitlines()}
                return np.array([stem in held for stem in stems])
        if min(numbers) >= 0 and max(numbers) >= 60_000:
            return np.array(numbers) >= 60_000

    rank = np.array([_rank(picture) for picture in store.pictures])
    held = rank < HELD_OUT
    if len(held) >= 4 and not held.any():
        held[rank.argmin()] = True
    return held


def _rank(picture: str) -> float:
    """A number in [0, 1) that belongs to a picture's name, without its extension, alone."""
    name = _bare(picture).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") / 2**64


# ---- CIFAR-10 ------------------------------------------------------------------------------------


def import_torchvision():
    """Import torchvision, also one that was built for another torch.

    Such a torchvision lacks its compiled operators and fails while it registers what they do to
    fake tensors. Neither LPIPS nor CIFAR-10 calls them: it is enough that they are declared.
    """
    try:
        import torchvision
    except RuntimeError:
        if hasattr(torch.ops.torchvision, "nms"):
            raise
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", schema)
        import torchvision
    return torchvision


class Cifar10:
    """The official python batches, read and checked (MD5) by torchvision, all in memory; a
    `data.Source`."""

    passed_over = ""

    def __init__(self, folder: Path, split: str):
        official = import_torchvision().datasets.CIFAR10
        reader = type("Batches", (official,), {"base_folder": folder.name})
        wanted = {"train": [True], "val": [False], "all": [True, False]}[split]
        try:
            parts = [reader(folder.parent, train=part) for part in wanted]
        except RuntimeError as error:
            raise DataError(f"{shown(folder)} does not hold CIFAR-10 as published: a file is "
                            f"missing or has another MD5; unpack cifar-10-python.tar.gz again"
                            ) from error
        self.folder = folder
        self.split = split
        self.classes = tuple(parts[0].classes)
        self.images = np.concatenate([part.data for part in parts])  # (N, 32, 32, 3)
        self.labels = list(chain.from_iterable(part.targets for part in parts))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Photo:
        return Photo(f"{shown(self.folder)} number {i}", lambda: Image.fromarray(self.images[i]))

    def label(self, i: int) -> int:
        return self.labels[i]

    def caption(self, i: int) -> str:
        return ""

    def identity(self) -> list:
        return ["cifar10", self.split]


# ---- prepared sets -------------------------------------------------------------------------------

PREPARED = 1                                         # version of the two files below
PIXELS, META = "pixels.u8", "meta.json"              # uint8 (N, S, S, 3), first train, then val


class Copy(Photo):
    """A picture of a prepared set: it gives the pixels it has, and is never enlarged."""

    def require(self, res: int) -> None:
        """Raise DataError where `res` is more than was prepared."""
        if res > self.size:
            raise DataError(f"{self.name} was prepared at {self.size} px, not the {res} px asked "
                            f"for: prepare the source with --size {res}, or train with "
                            f"size={self.size} or less (stage ae: max_size as well)")

    def draw(self, res: int, box: Box | None = None) -> np.ndarray:
        self.require(res)
        return super().draw(res, box)


class Prepared:
    """A set that `data.prepare` decoded; a `data.Source`.

    The pixels are mapped, not read: all processes share one copy.
    """

    def __init__(self, root: Path, split: str):
        where = shown(root)
        try:
            meta = json.loads((root / META).read_text())
            labels = meta["labels"]
            captions = meta.get("captions", {"train": [], "val": []})
            self.size = int(meta["size"])
            self.filter = str(meta["filter"])
            self.hash = str(meta["sha256"])
            self.classes = tuple(meta["classes"])
            self.passed_over = str(meta.get("passed_over", ""))
            both = labels["train"] + labels["val"]
            texts = captions["train"] + captions["val"]
            fits = len(both) == meta["count"] and len(texts) in (0, len(both)) and self.size > 0
            fits = fits and set(both) <= set(range(max(1, len(self.classes))))
            version = meta["format"]
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError,
                RecursionError) as error:
            raise DataError(f"{where}/{META} is damaged ({error!r}); prepare it again") from error
        if version != PREPARED:
            raise DataError(f"{where} has format {version}, this version reads {PREPARED}; prepare "
                            f"it again")
        have = (root / PIXELS).stat().st_size
        want = len(both) * self.size**2 * 3
        if not fits or have != want:
            raise DataError(f"{where} is damaged or not complete: {PIXELS} has {have:,} bytes, "
                            f"{META} says {want:,} for {len(both):,} labels; prepare it again")
        self.root = root
        self.total = len(both)
        self.first = len(labels["train"]) if split == "val" else 0
        self.labels = both if split == "all" else labels[split]
        self.captions = texts if split == "all" else captions[split]

    @cached_property
    def pixels(self) -> np.ndarray:
        """All pictures of both splits, uint8 (N, S, S, 3)."""
        shape = (self.total, self.size, self.size, 3)
        return np.memmap(self.root / PIXELS, np.uint8, "r", shape=shape)

    def __getstate__(self) -> dict:                  # the pixels would go by value
        return {name: value for name, value in vars(self).items() if name != "pixels"}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Copy:
        row = self.first + range(len(self))[i]
        return Copy(f"{shown(self.root)} number {row}", lambda: Image.fromarray(self.pixels[row]))

    def label(self, i: int) -> int:
        return self.labels[i]

    def caption(self, i: int) -> str:
        return self.captions[i] if self.captions else ""

    def identity(self) -> list:
        return [self.hash, self.first, len(self)]


def sha256(file: Path) -> str:
    """Give the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
