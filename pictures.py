"""Pictures in files: PNG drawn tile by tile, and sheets of many.

A PNG says in its text `parameters` how it was made. Read next: sample.py, the program.
"""
from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clif import Tiles
from data import to_uint8

Drawing = Callable[..., Tiles]              # (res, window) -> tiles: `tiles` of a field or function


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file: length, kind, data, CRC-32 of both."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_head(size: tuple[int, int], info: dict) -> bytes:
    """All of a PNG before its pixels; its text `parameters` says in JSON how it was made."""
    ihdr = struct.pack(">2I5B", size[1], size[0], 8, 2, 0, 0, 0)     # 8 bits, RGB, not interlaced
    text = b"parameters\0" + json.dumps(info).encode("ascii")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", ihdr) + png_chunk(b"tEXt", text)


def png_parts(head: bytes, width: int, tiles: Tiles) -> Iterator[bytes]:
    """Draw a picture as a PNG that begins by `head`; memory holds one row of its tiles."""
    above = np.zeros((1, 3 * width), np.uint8)
    deflate = zlib.compressobj()
    band = []
    yield head
    for _, left, rgb in tiles:
        band.append(to_uint8(rgb[0]))                                # (h, w, 3)
        if left + rgb.shape[-1] < width:
            continue
        rows = np.concatenate(band, axis=1).reshape(-1, 3 * width)
        up = rows - np.concatenate([above, rows[:-1]])               # modulo 256, as PNG has it
        raw = np.insert(up, 0, 2, axis=1)                            # filter 2: less the row above
        yield png_chunk(b"IDAT", deflate.compress(raw.tobytes()))
        above = rows[-1:]
        band.clear()
    yield png_chunk(b"IDAT", deflate.flush()) + png_chunk(b"IEND", b"")


def write_png(path: Path, head: bytes, width: int, tiles: Tiles) -> None:
    """Draw a picture into a file, which is there whole or not at all; arguments: `png_parts`."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.writelines(png_parts(head, width, tiles))
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], side: int, gap: int = 4) -> np.ndarray:
    """Put rows of pictures (h, w, 3) on white, enlarged to `side` pixels by nearest neighbour."""
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (side + gap), columns * (side + gap), 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, pixels in enumerate(row):
            scale = side / max(pixels.shape[:2])
            height, width = (max(1, round(scale * n)) for n in pixels.shape[:2])
            cell = sheet[r * (side + gap):, c * (side + gap):]
            cell[:height, :width] = Image.fromarray(pixels).resize((width, height), Image.NEAREST)
    return sheet[:-gap, :-gap]


SHEET = 8192                                # pixels: about the side of a sheet at most


def write_sheet(path: Path, files: Sequence[Path]) -> None:
    """Put picture files on one sheet, nearly square; large ones are reduced so that it fits."""
    columns = math.ceil(math.sqrt(len(files)))
    pictures = []
    for file in files:
        with Image.open(file) as image:
            image.thumbnail((SHEET // columns, SHEET // columns))    # never enlarges
            pictures.append(np.asarray(image))
    rows = [pictures[at:at + columns] for at in range(0, len(pictures), columns)]
    sheet = contact_sheet(rows, max(max(pixels.shape) for pixels in pictures))
    Image.fromarray(sheet).save(path, quality=92)
