"""Data sets of every form, and the batches made of them.

A `Source` gives pictures, which draw themselves at any size; `random_patch` makes an item of one
(INFD supplementary E, J.2); `loader` stacks items. files.py has how files are read.
Read next: train.py, whose steps consume the batches.
"""
from __future__ import annotations

import functools
import hashlib
import json
import os
import posixpath
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from clif import coord_grid
from commandline import Parser
from files import (EXTENSIONS, BadImage, DataError, Files, centre_square, decode, reading, shown,
                   to_rgb)
from landscapes import Box, Landscapes, Scene
from runs import cli, rng, torch_noise

PIXELS, META = "pixels.u8", "meta.json"  # a prepared set
TOLERATED = 10  # images that cannot be used before 1 % of all is a lot
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
HELD_OUT = ("list_eval_partition.txt", "list_eval_partition.csv",  # CelebA: its makers', Kaggle's
            "ffhqvalidation.txt", "val.txt")  # taming-transformers' lists


@dataclass
class Photo:
    """The centre square of an RGB image, decoded at the first use; drawn larger it is blurred."""

    name: str
    read: Callable[[], Image.Image]
    prepared: bool = False  # a copy that `prepare` made small

    @functools.cached_property
    def image(self) -> Image.Image:
        with reading(self.name, BadImage):
            return centre_square(self.read())

    @property
    def size(self) -> int:
        return self.image.width

    def require(self, res: int) -> None:
        """Raise DataError where a prepared copy has fewer pixels than `res`."""
        if self.prepared and res > self.size:
            raise DataError(f"{self.name} was prepared at {self.size} px, not {res}: prepare the "
                            f"source with --size {res}, or train with smaller size= and max_size=")

    def draw(self, res: int, box: Box | None = None) -> np.ndarray:
        """Resize the square to res x res, by Lanczos as published, and crop it to `box`."""
        # Pillow's resize(box=...) rounds to float32: not the same pixels. Rows first, then columns.
        top, left, h, w = box or (0, 0, res, res)
        self.require(res)
        side = self.size
        reach = 3 * max(side / res, 1) + 1  # 3: radius of Lanczos; 1: rounding
        first = max(0, int(top * side / res - reach))
        last = min(side, int((top + h) * side / res + reach) + 1)
        rows = self.image.crop((0, first, side, last))
        rows = rows.resize((res, last - first), Image.Resampling.LANCZOS)
        columns = Image.new("RGB", (w, side))
        columns.paste(rows.crop((left, 0, left + w, last - first)), (0, first))
        return np.asarray(columns.resize((w, res), Image.Resampling.LANCZOS))[top:top + h]


Picture = Photo | Scene  # or any class with name, size and draw


class Source:
    """A data set, made of any class whose [i] gives a PIL image, a pair with one, or a Picture.

    classes, targets, label(i), caption(i) and identity() are used where the class has them.
    """

    classes: Sequence[str] = ()
    labels: Sequence[int] = ()
    captions: Sequence[str] = ()
    passed_over = ""  # what of the files is not in the set, in words
    split_by = ""  # how the held-out pictures were chosen, in words

    def __init__(self, items):
        self.items = items
        self.labels = getattr(items, "targets", ())
        for name in ("classes", "label", "caption", "identity"):
            if hasattr(items, name):
                setattr(self, name, getattr(items, name))
        if len(items) and not hasattr(self[0], "draw"):
            kind = type(self[0])
            found = f"pair with a {type(self[0][0]).__name__}" if kind is tuple else kind.__name__
            raise DataError(f"{type(items).__name__}[0] is a {found}: return a PIL image (no "
                            f"ToTensor), alone or in a pair, and its class from label(i)")
        if len(self.classes) and not len(self.labels) and not hasattr(items, "label"):
            raise DataError(f"{type(items).__name__} has classes, but no label(i) or targets")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Picture:
        item = self.items[i]
        image = item[0] if isinstance(item, tuple) else item
        if isinstance(image, Image.Image):
            return Photo(f"{type(self.items).__name__}[{i}]", functools.partial(to_rgb, image))
        return item

    def label(self, i: int) -> int:
        return int(self.labels[i]) if len(self.labels) else 0

    def caption(self, i: int) -> str:
        return self.captions[i] if self.captions else ""

    def identity(self) -> list:
        """Tell the set from others by content, without decoding and whatever the order."""
        return [type(self.items).__name__, len(self), *self.classes]


def as_source(items) -> Source:
    """Give a data set of any class what every source has: classes, labels, captions."""
    return items if isinstance(items, Source) else Source(items)


def fingerprint(source: Source) -> dict[str, int | str]:
    """Say which pictures a source holds, for a run to store."""
    digest = hashlib.sha256(repr(source.identity()).encode())
    return {"pictures": len(source), "digest": digest.hexdigest()}


@dataclass
class Photos(Source):
    """The pictures of one split; captions: of metadata.jsonl, else the text files beside them."""

    store: Files
    items: list[str]
    labels: list[int]
    classes: Sequence[str]
    passed_over: str
    split_by: str

    def __getitem__(self, i: int) -> Photo:
        name = self.store.where(self.items[i])
        return Photo(name, lambda: decode(self.store.read(self.items[i]), name))

    def caption(self, i: int) -> str:
        """What is said of a picture; "" with a warning where that cannot be read."""
        beside = os.path.splitext(self.items[i])[0] + ".txt"
        text = self.listed.get(self.items[i], "")
        if not text and beside in self.store.members:
            try:
                text = self.store.text(beside)
            except BadImage as error:
                warnings.warn(f"a caption is left out: {error}")
        return " ".join(text.encode("utf-8", "replace").decode().split())

    @functools.cached_property
    def listed(self) -> dict[str, str]:
        """Picture -> caption, of all metadata.jsonl files, which may name no other pictures."""
        found = {}
        for file in [name for name in self.store.names if name.endswith("metadata.jsonl")]:
            with reading(f"{self.store.where(file)} is damaged", remedy="; mend or remove it"):
                lines = self.store.text(file).split("\n")
                rows = [json.loads(line) for line in lines if line.strip()]
                names = [posixpath.join(posixpath.dirname(file), row["file_name"]) for row in rows]
                listed = {posixpath.normpath(name): str(row.get("text") or "")
                          for name, row in zip(names, rows)}
                missing = [name for name in listed if name not in self.store.members]
                if missing:
                    raise DataError(f"{self.store.where(file)} names {len(missing)} pictures that "
                                    f"are not there, the first {shown(missing[0])}; mend it")
            found |= listed
        return found

    def identity(self) -> list:
        return sorted(zip(self.items, map(self.store.size, self.items), self.labels))


def open_photos(store: Files, name: str, split: str) -> Photos:
    """Find one split of a set, with the classes of a dataset.json, else of the folders."""
    pictures = store.pictures
    over = store.passed_over
    if not pictures:
        raise DataError(f"{shown(store.root)} holds no {', '.join(EXTENSIONS)} files; passed over: "
                        f"{over or 'nothing'}")
    top = posixpath.commonpath([posixpath.dirname(picture) for picture in pictures])
    paths = [picture.removeprefix(top).lstrip("/").split("/") for picture in pictures]
    parts = [SPLITS.get(path[0].lower()) for path in paths]
    held = "val" if "val" in parts else "test"
    by = f"folder {held}"
    if "train" in parts and held in parts:
        paths = [path[1:] for path in paths]
        neither = len(parts) - parts.count("train") - parts.count(held)
        if neither and split != "all":
            over += ", " * bool(over) + f"{neither} neither in train nor in {held}"
    else:
        official, by = held_out(store, name)
        parts = [held if picture in official else "train" for picture in pictures]
    wanted = {"train": ["train"], "val": [held], "all": parts}[split]
    chosen = [i for i, part in enumerate(parts) if part in wanted]
    if not chosen:
        raise DataError(f"{shown(store.root)}: none of its {len(pictures)} pictures is in {split}")

    values = listed_labels(store) or [path[0] if len(path) == 2 else "" for path in paths]
    classes = sorted(set(values))
    if "" in classes or all(re.fullmatch(r"\d{5,}", str(value)) for value in classes):
        classes = classes[:1]  # numbered folders are pieces of one set
    index = {value: i for i, value in enumerate(classes)}
    return Photos(store, [pictures[i] for i in chosen], [index.get(values[i], 0) for i in chosen],
                  tuple(map(str, classes)) if len(classes) > 1 else (), over, by)


def held_out(store: Files, name: str) -> tuple[set[str], str]:
    """Choose the held-out pictures: the official ones, else 5 % by the hash of their own names.

    Gives them, and in words how they were chosen.
    """
    stems = {picture: Path(picture).stem for picture in store.pictures}
    listed = store.nearest(*HELD_OUT)
    lines = store.text(listed).splitlines() if listed else []
    rows = [line.replace(",", " ").split() for line in lines]
    official = {Path(row[0]).stem for row in rows if row and row[1:] in ([], ["1"], ["2"])}
    folders = store.where(store.pictures[0]).split("/")
    ffhq = bare_name(name) == "ffhq" or "images1024x1024" in folders
    if ffhq and not listed:
        official = {stem for stem in stems.values() if stem.isdecimal() and int(stem) >= 60_000}
    held = {picture for picture, stem in stems.items() if stem in official}
    if held:
        return held, "as published"
    ranks = sorted(
        (hashlib.blake2b(os.fsencode(os.path.splitext(name)[0]), digest_size=8).hexdigest(), name)
        for name in store.pictures)
    held = {name for rank, name in ranks if int(rank, 16) < 0.05 * 2**64}
    return held or {name for _, name in ranks[:len(ranks) >= 4]}, "about 1 in 20, by path"


def listed_labels(store: Files) -> list[int]:
    """Read each picture's class in StyleGAN's dataset.json, {"labels": [[name, class], ...]}."""
    file = store.nearest("dataset.json")
    if not file:
        return []
    folder = posixpath.dirname(file)
    with reading(f"{store.where(file)} is damaged or incomplete", remedy="; mend or remove it"):
        rows = json.loads(store.text(file)).get("labels") or []
        found = {posixpath.join(folder, name.replace("\\", "/")): label for name, label in rows}
        if not found or any(type(label) is not int for label in found.values()):  # EG3D: cameras
            return []
        return [found[name] for name in store.pictures]


def import_torchvision():
    """Import torchvision; if built for another torch, with its missing operators declared."""
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
        import torchvision
    return torchvision


class SixKMix(Source):
    """FFHQ 6K-mix: every picture at `size` px, then the first 6000 again at 2 to 4 times that."""

    def __init__(self, photos: Source, size: int = 256):
        if len(photos) < 6000:
            raise DataError(f"a 6k-mix needs at least 6000 pictures, there are {len(photos)}")
        self.photos = photos
        self.items = range(len(photos) + 6000)
        self.size = size
        self.passed_over = photos.passed_over
        self.split_by = "but trained on, too"

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
    """Give the side of the i-th large picture (512 to 1024 px as published)."""
    return 2 * size + round(2 * size * (i / 4999)) if i < 5000 else 4 * size


class Prepared(Source):
    """What `prepare` wrote; the pixels are mapped, not read: all processes share one copy."""

    def __init__(self, root: Path, split: str):
        self.root = root
        content = (root / META).read_bytes()
        with reading(f"{shown(root)} is damaged", remedy="; prepare the set again"):
            meta = json.loads(content)
            both = meta["train"] + meta["val"]  # of each picture its label and its caption
            n = len(meta["train"])
            rows = range(len(both))
            self.items = {"train": rows[:n], "val": rows[n:], "all": rows}[split]
            self.labels = [both[row][0] for row in self.items]
            self.captions = [both[row][1] for row in self.items]
            self.classes = tuple(meta["classes"])
            for name in ("filter", "sha256", "size", "passed_over"):
                setattr(self, name, meta[name])
            if meta["format"] != 2 or len(self.pixels) != len(both):
                raise ValueError(f"{META} does not fit {PIXELS}, or is of another version")

    @property
    def pixels(self) -> np.ndarray:
        return np.memmap(self.root / PIXELS, mode="r").reshape(-1, self.size, self.size, 3)

    def __getitem__(self, i: int) -> Photo:
        row = self.items[i]
        name = f"{shown(self.root)} number {row}"
        return Photo(name, lambda: Image.fromarray(self.pixels[row]), prepared=True)

    def identity(self) -> list:
        return [self.sha256, self.items]


def prepare(name: str, folder: Path, size: int, workers: int = 0) -> dict:
    """Decode a set into a new folder, which appears when it is complete; gives its meta.json."""
    if size < 1:
        raise ValueError(f"--size {size}: pictures have at least 1 pixel")
    if folder.exists():
        raise FileExistsError(f"{shown(folder)} exists; choose another folder, or delete it")
    sources = {split: open_data(name, split) for split in ("train", "val")}
    meta = {"format": 2, "source": name, "size": size, "filter": "lanczos", "train": [], "val": [],
            "classes": sources["train"].classes, "passed_over": sources["train"].passed_over,
            "skipped": 0}
    digest = hashlib.sha256()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as temporary:
        made = Path(temporary, folder.name)  # TemporaryDirectory itself is for its owner
        made.mkdir()
        with open(made / PIXELS, "wb") as file:
            for split, source in sources.items():
                drawn = DataLoader(source, None, collate_fn=functools.partial(_draw, size=size),
                                   num_workers=workers, worker_init_fn=outlive_signals)
                for i, pixels in enumerate(tqdm(drawn, split, disable=None)):
                    if isinstance(pixels, str):
                        tqdm.write(f"skipped: {pixels}")
                        meta["skipped"] += 1
                        continue
                    file.write(pixels)
                    digest.update(pixels)
                    meta[split].append((source.label(i), source.caption(i)))
        (made / META).write_text(json.dumps(meta | {"sha256": digest.hexdigest()}))
        made.rename(folder)  # fails where another call was faster
    return meta


def _draw(picture: Picture, size: int) -> bytes | str:
    try:
        return picture.draw(size).tobytes()
    except BadImage as error:
        return str(error)


def bare_name(name: str) -> str:
    """The name of a data set, of whose published settings there are some, without its path."""
    return Path(name).name.removesuffix(".zip")


def open_data(name: str, split: str = "train") -> Source:
    """Open synthetic[-6k-mix], or a path, also below data or $DATA_ROOT.

    split: train, val (held out) or all (of CIFAR-10: train).
    """
    plain = name.removesuffix("-6k-mix")
    mixed = name != plain and split != "val"
    if plain == "synthetic":
        scenes = Source(Landscapes(split))
        return SixKMix(scenes, 64) if mixed else scenes  # preset tiny's: 64 px, and to 256 px

    places = [Path(name)]
    for root in filter(None, ("data", os.environ.get("DATA_ROOT"))):
        places += [Path(root, plain), Path(root, f"{plain}.zip")]
    found = [place for place in places if place.exists()]
    if not found:
        raise FileNotFoundError(f"no data set at {', '.join(map(shown, places))}: put images "
                                f"there, or use --data synthetic")
    files = Files(found[0])
    if not files.zipped and {META, PIXELS} <= files.members.keys():
        return Prepared(files.root, split)
    batch = files.nearest("data_batch_1")
    if batch:
        folder = (files.root / batch).resolve().parent
        with reading(f"{shown(folder)} is not CIFAR-10 as published (MD5)",
                     remedy="; unpack cifar-10-python.tar.gz again"):
            official = import_torchvision().datasets.CIFAR10
            return Source(official(folder.parent, train=split != "val"))
    if mixed:  # the published mix takes held-out files too
        return SixKMix(open_photos(files, plain, "all"))
    return open_photos(files, plain, split)


def check_data(source: Source) -> list[tuple[str, str]]:
    """Decode every picture and list what cannot be used: [(file, reason)]."""
    found = []
    if isinstance(source, Prepared) and hashlib.sha256(source.pixels).hexdigest() != source.sha256:
        found.append((shown(source.root / PIXELS), f"its SHA-256 is not that of {META}"))
    for i in tqdm(range(len(source)), "checking", disable=None):
        picture = source[i]
        try:
            picture.size  # decodes a photograph; scenes know theirs
        except BadImage as error:
            found.append((picture.name, str(error).removeprefix(f"{picture.name}: ")))
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always")
            source.caption(i)
        found += [(picture.name, str(remark.message)) for remark in remarks]
    return found


def check_probabilities(cfg: object, *names: str) -> None:
    """ValueError where one of these options is none."""
    for name in names:
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"{name}={getattr(cfg, name):g} is a probability, 0 to 1")


@dataclass(frozen=True)
class DataConfig:
    """How a picture becomes encoder input and ground-truth patch (INFD supplementary E, J.2)."""

    size: int = 256  # side of the encoder input (published code)
    patch: int = 256  # side of the patch that is rendered and compared (published code)
    max_size: int = 1024  # largest ground truth: larger pictures are resized to at most this
    p_whole: float = 0.0  # chance of a ground truth of `size` (published code has it, unused)
    p_original: float = 0.0  # chance of the largest size (J.2: 0.5 in the last 400K on Mountains)
    downsample: bool = True  # False: always the largest size, the ablation of supplementary E
    flip: bool = False  # mirror half of the pictures; the published code does not
    smallest: int = 0  # smallest ground truth; 0: the encoder's input (published code)
    edge: int = 0  # crops may lie so far outside; moved back, they show borders more

    def __post_init__(self):
        least = self.smallest or self.size
        fits = 0 < self.patch <= least <= self.max_size and self.size <= self.max_size
        check_probabilities(self, "p_whole", "p_original")
        if not fits or self.edge < 0 or (self.p_whole and self.patch > self.size):
            raise ValueError(f"patch={self.patch} <= smallest={least} <= max_size={self.max_size} "
                             f">= size={self.size} and edge={self.edge} >= 0 must hold, and with "
                             f"p_whole={self.p_whole} patch <= size")


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
    least = cfg.smallest or cfg.size
    if isinstance(picture, Photo):
        picture.require(cfg.max_size)  # else its ground truth would be smaller, unnoticed
    largest = min(picture.size, cfg.max_size)
    needed = max(least, cfg.size)
    if largest < needed:  # enlarged, it would teach the renderer to blur
        raise BadImage(f"{picture.name} is {picture.size} px, smaller than the input of {needed} "
                       f"px; remove it, or train with size={picture.size} or less")
    whole = gen.random() < cfg.p_whole
    keep = gen.random() < cfg.p_original
    mirror = cfg.flip and gen.random() < 0.5
    r = largest if keep or not cfg.downsample else int(gen.integers(least, largest + 1))
    if whole:
        r = cfg.size
    corner = gen.integers(-cfg.edge, r - cfg.patch + cfg.edge + 1, 2)
    top, left = corner.clip(0, r - cfg.patch).tolist()
    return patch_at(picture, r, top, left, cfg, mirror)


def whole_item(picture: Picture | Tensor, gen: np.random.Generator, size: int, flip: bool) -> dict:
    """Make what the other stages learn from: a whole picture at `size`, or a latent as it is."""
    if isinstance(picture, Tensor):
        return {"latent": picture}
    image = to_tensor(picture.draw(size))
    return {"image": image.flip(-1) if flip and gen.random() < 0.5 else image}


@functools.lru_cache(maxsize=4)
def _order(seed: int | str, epoch: int, n: int) -> np.ndarray:
    return rng(seed, "order", epoch).permutation(n)


def _sample(n: int, skipped: list[str], source: Source, make_item: Callable[..., dict],
            seed: int | str, noise: dict[str, tuple[int, ...]], captions: bool) -> dict:
    """Make sample n, of the next picture where one cannot be read."""
    for attempt in range(TOLERATED + 1):
        if hasattr(source, "pick"):
            i = source.pick(rng(seed, "pick", n, attempt))
        else:
            epoch, i = divmod(n + attempt, len(source))
            i = int(_order(seed, epoch, len(source))[i])
        try:
            item = dict(make_item(source[i], rng(seed, "item", n)))
            if captions:
                item["caption"] = source.caption(i)
            break
        except BadImage as error:
            skipped.append(str(error))
    else:
        raise DataError(f"{TOLERATED + 1} images in a row cannot be used, the last: {skipped[-1]}")
    for name, shape in noise.items():
        item[name] = torch_noise(shape, seed, name, n)
    return item | {"index": n, "label": source.label(i)}


def _batch(numbers: list[int], **options) -> tuple[dict, list[str]] | DataError:
    """Stack samples and say what was skipped; an error is raised in the main process, in a line."""
    skipped = []
    try:
        return default_collate([_sample(n, skipped, **options) for n in numbers]), skipped
    except DataError as error:
        return error


def outlive_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, whose step needs its workers; end 2 s later."""
    if hasattr(signal, "SIGALRM"):
        os.setpgrp()
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, 2))


def report(skipped: list[str], bad: int, of: int, limit: int) -> None:
    """Warn of images that were skipped; DataError where `bad` of the first `of` are above limit."""
    for text in skipped:
        warnings.warn(f"skipped image: {text}")
    if bad > limit:
        raise DataError(f"{bad} of the first {of} images cannot be used (see --check-data), the "
                        f"last: {skipped[-1]}")


def loader(source: Source, make_item: Callable[..., dict], batch: int, start: int = 0,
           seed: int | str = 0, workers: int = 0, rank: int = 0, world: int = 1,
           pin_memory: bool = False, noise: dict[str, tuple[int, ...]] | None = None,
           captions: bool = False) -> Iterator[dict]:
    """Give endless batches from step `start` on: stacked items, "index" (of the sample), "label".

    Step k holds the samples k * batch .. (k + 1) * batch - 1, each rank an equal, contiguous share.
    make_item(picture, gen) -> dict gets rng(seed, "item", n), and noise, name -> shape, becomes
    torch_noise(shape, seed, name, n). captions: add "caption". Above 1 % unreadable: DataError.
    """
    if batch < 1 or batch % world:
        raise ValueError(f"a batch of {batch} cannot be shared by {world} processes")
    if len(source) == 0:
        raise DataError("the data set is empty")
    share = batch // world
    firsts = (k * batch + rank * share for k in count(start))
    make = functools.partial(_batch, source=source, make_item=make_item, seed=seed,
                             noise=noise or {}, captions=captions)
    batches = DataLoader(
        range(sys.maxsize), batch_sampler=(range(first, first + share) for first in firsts),
        collate_fn=make, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=outlive_signals, generator=torch.Generator())
    bad = 0
    for seen, result in zip(count(share, share), batches):
        if isinstance(result, DataError):
            raise result
        stacked, skipped = result
        bad += len(skipped)
        report(skipped, bad, seen, max(TOLERATED, seen // 100))
        yield stacked


def run(argv: list[str]) -> None:
    """Prepare a copy, and say what is in it."""
    p = Parser(description="Decode a data set once: --data DST then reads pixels, not files.")
    p.add_argument("command", choices=["prepare"])
    p.add_argument("source", metavar="SRC", help="as of --data")
    p.add_argument("folder", metavar="DST", type=Path, help="new; size x size x 3 bytes a picture")
    p.add_argument("--size", type=int, required=True, help="side; smaller pictures are enlarged")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="that decode (%(default)s)")
    args = p.read(argv)
    meta = prepare(args.source, args.folder, args.size, args.workers)
    print(f"{len(meta['train'] + meta['val']):,} pictures of {args.size} px in "
          f"{shown(args.folder)}, {meta['skipped']} skipped; passed over: "
          f"{meta['passed_over'] or 'nothing'}")


def main(argv: list[str] | None = None) -> int:
    """The exit code: see `runs.cli`."""
    return cli(run, sys.argv[1:] if argv is None else argv,
               "stopped; nothing is left, the same command starts again")


if __name__ == "__main__":
    sys.exit(main())
