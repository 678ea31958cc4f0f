"""The files that pictures lie in, none of which is trusted: a folder or a zip, and what it holds.

Sizes are capped, nothing is unpacked to the disk, and damage is an error of one line.
"""
from __future__ import annotations

import functools
import io
import os
import posixpath
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from runs import first_line

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
NOT_READ = (".avif", ".bmp", ".exr", ".gif", ".heic", ".jp2", ".jxl", ".ppm", ".tif", ".tiff")
MAX_PIXELS = 2**26  # 8192 x 8192: below Pillow's own limit
MAX_BYTES = 2**28  # of one file, packed or not
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX)")


class DataError(ValueError):
    """The data cannot be used as asked."""


class BadImage(DataError):
    """One file is no readable image; training skips it."""


def shown(name: str | Path) -> str:
    """Escape what no terminal prints of a file's name."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


@contextmanager
def reading(what: str, kind: type[DataError] = DataError, remedy: str = "") -> Iterator[None]:
    """Turn all that damage makes a reader raise into one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause = getattr(error, "strerror", None) or first_line(error)
        if isinstance(error, Image.UnidentifiedImageError):
            cause = "not a PNG, JPEG or WEBP image"
        raise kind(f"{what}: {cause}{remedy}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any mode upright and to RGB, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's convert clips
        grey = np.asarray(image).astype(np.int32).clip(0, 65535)
        image = Image.fromarray(((2 * grey + 257) // 514).astype(np.uint8))  # round(grey / 257)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def centre_square(image: Image.Image) -> Image.Image:
    """Crop an image to the largest square in its middle."""
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def decode(content: bytes, name: str = "picture",
           convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """Decode a PNG, JPEG or WEBP, or raise BadImage."""
    with reading(name, BadImage):
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MAX_PIXELS:  # known before any decoding
            raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
        return convert(image)


class Files:
    """List (name -> where it lies) and read a folder, links followed, or a zip."""

    def __init__(self, root: Path):
        self.root = root
        self.zipped = not root.is_dir()
        self.denied = []  # why folders cannot be read
        self.members = self._in_zip() if self.zipped else self._in_folder()
        if self.denied and not self.members:
            raise self.denied[0]
        self.names = sorted(name for name in self.members if not HIDDEN.search(name))
        visible = [name for name in self.names if name.lower().endswith(EXTENSIONS)]
        self.pictures = visible
        for main in ("images1024x1024", "img_align_celeba"):  # of FFHQ and CelebA, not copies
            self.pictures = [name for name in visible if main in name.split("/")] or self.pictures

        hidden = [name for name in self.members if HIDDEN.search(name)]
        others = [name[name.rindex("."):].lower() for name in self.names
                  if name.lower().endswith(NOT_READ)]
        denied = ", ".join(shown(error.filename) for error in self.denied)
        counts = {
            f"{', '.join(sorted(set(others)))} (PNG, JPEG and WEBP are read)": len(others),
            "hidden": sum(name.lower().endswith(EXTENSIONS) for name in hidden),
            f"without permission ({denied})": len(self.denied),
            "outside the official folder": len(visible) - len(self.pictures),
        }
        self.passed_over = ", ".join(f"{n} {what}" for what, n in counts.items() if n)

    def _in_folder(self) -> dict[str, str]:
        """Walk through the folder: each real folder once, and no loops."""
        found = {}
        top = self.root.resolve()
        seen = {str(top), *map(str, top.parents)}
        for folder, below, files in os.walk(top, onerror=self.denied.append, followlinks=True):
            within = Path(folder).relative_to(top)
            found |= {(within / name).as_posix(): os.path.join(folder, name) for name in files}
            paths = [os.path.join(folder, name) for name in sorted(below, reverse=True)]
            paths.sort(key=os.path.islink, reverse=True)  # of two names the real one counts
            real = {os.path.realpath(path): os.path.basename(path) for path in paths}
            below[:] = [name for path, name in real.items() if path not in seen]
            seen |= real.keys()
        return found

    def _in_zip(self) -> dict[str, str]:
        with reading(f"{shown(self.root)} is not a readable zip"):
            return {posixpath.normpath(member.replace("\\", "/")): member  # of Windows
                    for member in self.archive(os.getpid()).namelist() if member[-1] not in "/\\"}

    @functools.lru_cache(maxsize=8)
    def archive(self, process: int) -> zipfile.ZipFile:
        """Open the zip, once in each process: a handle must not cross a fork."""
        return zipfile.ZipFile(self.root)

    def where(self, name: str) -> str:
        return shown(self.root / name)

    def size(self, name: str) -> int:
        """Bytes when unpacked; -1 of what is no file: a link to nothing, a pipe, a device."""
        if self.zipped:
            return self.archive(os.getpid()).getinfo(self.members[name]).file_size
        try:
            found = os.stat(self.members[name])
        except OSError:
            return -1
        return found.st_size if stat.S_ISREG(found.st_mode) else -1

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes:
        with reading(self.where(name), BadImage):
            size = self.size(name)
            if size > limit:  # zipfile never yields more than this size
                raise ValueError(f"larger than {limit >> 20} MB")
            if self.zipped:
                return self.archive(os.getpid()).read(self.members[name])
            path = Path(self.members[name])
            if size < 0 and path.exists():  # which might never end
                raise ValueError("a pipe or a device, not a file")
            return path.read_bytes()

    def text(self, name: str) -> str:
        with reading(self.where(name), BadImage):
            return self.read(name, MAX_BYTES // 4).decode("utf-8-sig")

    def nearest(self, *names: str) -> str | None:
        """Find the file of one of these names that lies nearest to the top."""
        found = [name for name in self.names if posixpath.basename(name) in names]
        return min(found, key=len, default=None)
