"""Pictures in files: PNG drawn tile by tile, sheets, moving pictures, a page that is a picture.

A PNG says in its text `parameters` how it was made. Read next: viewer.py; sample.py, the program.
"""
from __future__ import annotations

import base64
import contextlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin
from tqdm import tqdm

from clif import Tiles, Window
from data import to_uint8
from files import MAX_BYTES, BadImage, decode, shown, to_rgb
from inr_generator import ImageFunction, frequencies

Drawing = Callable[..., Tiles]              # (res, window) -> tiles: `tiles` of a field or function


def read_picture(file: str | Path,
                 convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """A picture of the user's, from a PNG, JPEG or WEBP file; OSError, or BadImage if damaged."""
    if Path(file).stat().st_size > MAX_BYTES:
        raise BadImage(f"{shown(file)}: a picture of more than {MAX_BYTES >> 20} MB")
    return decode(Path(file).read_bytes(), shown(file), convert)


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


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The name under which to write a file that is to be there whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.touch()                                                 # says at once what is wrong
        yield part
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def write_png(path: Path, head: bytes, size: tuple[int, int], tiles: Tiles) -> None:
    """Draw a picture of `size` into a file that begins by `head`, with a bar where that is long."""
    bar = tqdm(total=math.prod(size), desc=path.name, unit="px", unit_scale=True, leave=False,
               disable=None, delay=3)

    def counted() -> Tiles:
        for tile in tiles:
            yield tile
            bar.update(tile[2][0, 0].numel())

    with bar, whole_file(path) as part, open(part, "wb") as file:
        file.writelines(png_parts(head, size[1], counted()))


GAP = 4                                     # pixels between the pictures of a sheet
SHEET = 8192                                # pixels: about the side of a sheet at most


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], side: int) -> np.ndarray:
    """Put rows of pictures (h, w, 3) on white, enlarged to `side` pixels by nearest neighbour."""
    step = side + GAP
    sheet = np.full((len(rows) * step, max(map(len, rows)) * step, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, pixels in enumerate(row):
            scale = side / max(pixels.shape[:2])
            height, width = (max(1, round(scale * n)) for n in pixels.shape[:2])
            enlarged = Image.fromarray(pixels).resize((width, height), Image.NEAREST)
            sheet[r * step:r * step + height, c * step:c * step + width] = enlarged
    return sheet[:-GAP, :-GAP]


def write_sheet(path: Path, files: Sequence[Path], labels: Sequence[str] = ()) -> None:
    """Put picture files on one sheet, nearly square; large ones are reduced so that it fits.

    labels: a word of each, drawn into its corner.
    """
    columns = math.ceil(math.sqrt(len(files)))
    pictures = []
    for file in files:
        with Image.open(file) as image:
            image.thumbnail((SHEET // columns, SHEET // columns))    # never enlarges
            pictures.append(np.asarray(image))
    rows = [pictures[at:at + columns] for at in range(0, len(pictures), columns)]
    side = max(max(pixels.shape) for pixels in pictures)
    sheet = Image.fromarray(contact_sheet(rows, side))
    pen = ImageDraw.Draw(sheet)
    for i, label in enumerate(labels):
        corner = (i % columns * (side + GAP) + 3, i // columns * (side + GAP) + 1)
        pen.text(corner, label, font_size=max(8, side // 20), stroke_width=1, stroke_fill="black")
    sheet.save(path, quality=92)


def whole(drawing: Drawing, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
    """Draw the first of some pictures: uint8 (H, W, 3)."""
    pixels = np.empty((*size, 3), np.uint8)
    for top, left, rgb in drawing(size, window):
        pixels[top:top + rgb.shape[2], left:left + rgb.shape[3]] = to_uint8(rgb[0])
    return pixels


# ---- Moving pictures ----

def dive(zoom: float, at: tuple[float, float], frames: int) -> list[Window]:
    """Windows from the whole plane to one `zoom` times closer, in which `at` keeps its place."""
    windows = []
    for k in range(frames):
        share = k / max(frames - 1, 1)
        closer = zoom ** (share * share * (3 - 2 * share))           # begins and ends gently
        low, high = ([c + (edge - c) / closer for c in at] for edge in (-1, 1))
        windows.append((*low, *high))
    return windows


def check_new(path: Path, *kinds: str) -> None:
    """Make the folder of a file to be; ValueError for another kind, or where there is one."""
    if path.exists():
        raise ValueError(f"{path} exists: name a new file")
    if path.suffix not in kinds:
        raise ValueError(f"{path}: name a new file, {' or '.join(kinds)}")
    path.parent.mkdir(parents=True, exist_ok=True)


def write_movie(path: Path, frames: Iterable[np.ndarray], count: int, info: dict) -> None:
    """Write `count` frames (H, W, 3) as animated WebP or PNG, 30 a second, the ends held longer.

    info: how it was made, in JSON; the text `parameters` of PNG, EXIF's ImageDescription of WebP.
    """
    check_new(path, ".webp", ".png")
    if path.suffix == ".png":
        text = PngImagePlugin.PngInfo()
        text.add_text("parameters", json.dumps(info))
        how = {"pnginfo": text}
    else:
        exif = Image.Exif()
        exif[0x010E] = json.dumps(info)                              # ImageDescription
        how = {"quality": 75, "method": 4, "exif": exif}
    with whole_file(path) as part:
        bar = tqdm(frames, "frames", count, leave=False, disable=None)
        first, *others = (Image.fromarray(frame) for frame in bar)
        times = [33] * (1 + len(others))
        times[0] = times[-1] = 700
        first.save(part, path.suffix[1:], save_all=True, append_images=others, duration=times,
                   loop=0, **how)


# ---- A page that is a picture ----

def page(about: dict) -> bytes:
    """viewer.html with what it is to know, which may hold words of a foreign file."""
    text = json.dumps(about).replace("<", "\\u003c")
    html = Path(__file__).with_name("viewer.html").read_text("utf-8")
    return html.replace("ABOUT", text, 1).encode()


def write_html(path: Path, function: ImageFunction, shape: tuple[int, int], info: dict) -> None:
    """Write the first of some image functions as a page that draws it by WebGL, without a network.

    Weights in half precision, outputs padded to fours as the shader reads them. shape: the plane's.
    """
    halves = []
    for wb in function.weights:
        rows = wb[0].cpu().numpy().astype("<f2")                     # (in + 1, out)
        halves.append(np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))).tobytes())
    w = frequencies(*function.encoding).tolist()                     # along y and x
    made = {"weights": base64.b64encode(b"".join(halves)).decode(), "frequencies": w,
            "shapes": [tuple(wb.shape[1:]) for wb in function.weights],
            "corners": function.corners, "info": info}
    about = {"shape": shape, "fields": [], "classes": [], "start": {}, "usual": {}, "tile": 256,
             "depth": 12, "pixels": 4096, "function": made}
    check_new(path, ".html")
    with whole_file(path) as part:
        part.write_bytes(page(about))
