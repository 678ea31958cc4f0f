"""A page in the browser to walk through pictures: a server on this machine, for this machine alone.

The page (viewer.html) asks for a picture, then for tiles of it as one drags and zooms: level L cuts
the plane into 2^L by 2^L windows, each drawn alone. Neighbours fit because all are normalised by
the same statistics, those of the whole picture (`clif.FrameNorm`).
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import re
import secrets
import socket
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlencode, urlsplit

from PIL import Image

from clif import Tiles, check_frame
from models import INFD, OneStep, draw_labels, named
from pictures import Drawing, page, png_head, png_parts, whole
from runs import Stopped, first_line

TILE = 256                                  # pixels: the longer side of a tile
DEPTH = 12                                  # levels; float32 tells pixels of level 16 apart
PICTURES = 8                                # kept at a time: a latent and its field each
JOBS = 16                                   # requests at a time; more are refused
PIXELS = 4096                               # a side of a saved view
HOSTS = ("127.0.0.1", "localhost")          # any other name: a foreign site's, pointed at us
TEXT = "text/plain; charset=utf-8"
HEADERS = {"Content-Security-Policy":
           "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; "
           "script-src 'unsafe-inline'; style-src 'unsafe-inline'; form-action 'none'; "
           "base-uri 'none'; frame-ancestors 'none'",
           "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
           "Cross-Origin-Resource-Policy": "same-origin"}

# What a picture can be asked by, and what that may be.
FIELDS = {"seed": r"-?\d{1,15}", "steps": r"[1-9]\d{0,3}", "guidance": r"-?\d{0,3}(\.\d{1,9})?",
          "label": r".{1,100}", "prompt": r".{1,1000}", "negative": r".{1,1000}"}
KINDS = {"seed": int, "steps": int, "guidance": float}

Show = Callable[[dict, Callable, Callable], tuple[dict, Drawing]]    # see `serve`


def about(model: INFD | OneStep, args: argparse.Namespace, shape: tuple[int, int]) -> dict:
    """What the page must know: see `serve`; args: of sample.py."""
    if args.image:
        return {"shape": shape, "fields": [], "classes": [], "usual": {}, "start": {}}
    net = model.unet if isinstance(model, INFD) else model.f.net
    classes = [named(model.classes, i) for i in range(net.cfg.num_classes)]
    fields = ["seed"]
    usual = {}
    if classes:
        fields += ["label"]
    if isinstance(model, INFD):
        fields += ["steps"]
        usual["steps"] = model.settings(args.sampler, None, args.eta, bool(args.given))["steps"]
        if model.text is not None:
            fields += ["prompt"]
            usual["prompt"] = "what to draw"
        if model.f is None and (model.guidance != 1 if model.text else net.cfg.null_class):
            fields += ["negative", "guidance"] if model.text else ["guidance"]
            usual["guidance"] = model.guidance if model.text else 1
    start = {name: getattr(args, name) for name in fields}
    if classes and args.label is not None:
        start["label"] = classes[int(draw_labels(net, model.classes, [0], 0, args.label))]
    return {"shape": shape, "fields": fields, "classes": classes, "usual": usual,
            "start": {**start, "prompt": (args.prompt or [None])[0]}}


class Refused(Exception):
    """An answer that is not what was asked for: (status, line)."""


class Gallery:
    """The pictures asked for lately, and the one model that draws, one thing at a time."""

    def __init__(self, show: Show, about: dict):
        self.show = show
        self.salt = secrets.token_hex(8)    # another server's ids are not ours: other weights
        self.about = {**about, "tile": TILE, "depth": DEPTH, "pixels": PIXELS}
        height, width = about["shape"]
        self.tile = tuple(max(1, round(TILE * n / max(height, width))) for n in (height, width))
        self.model = threading.Lock()
        self.shown: OrderedDict[str, tuple[dict, Drawing]] = OrderedDict()
        self.closing = threading.Event()

    def picture(self, query: str, tell: Callable[[str], None]) -> str:
        """Make the picture that a query asks for; its id.

        On the way tells "done steps", and "remark LINE" of what the model does not read.
        """
        asked = self.read(query)
        text = self.salt + json.dumps(asked, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]

        def bar(walk: Iterable, what: str, steps: int, **_) -> Iterator:
            for done, item in enumerate(walk):
                self.check_open()
                tell(f"{done} {steps}")
                yield item

        def remark(line: str) -> None:
            tell(f"remark {line}")

        with self.model:
            if name not in self.shown:
                self.shown[name] = self.show(asked, bar, remark)
            self.shown.move_to_end(name)
            while len(self.shown) > PICTURES:
                self.shown.popitem(last=False)
        return name

    def read(self, query: str) -> dict:
        """What a query asks for, each field of this model; empty: None. ValueError if it is bad."""
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query),
                          max_num_fields=9)
        if len(dict(pairs)) < len(pairs) or not dict(pairs).keys() <= set(self.about["fields"]):
            raise ValueError(f"ask by {', '.join(self.about['fields'])}, each once")
        for name, value in pairs:
            if value and not re.fullmatch(FIELDS[name], value):
                raise ValueError(f"{name}: cannot read {value[:60]!r}")
        asked = {name: KINDS.get(name, str)(value) if value else None for name, value in pairs}
        return dict.fromkeys(self.about["fields"]) | asked | {"seed": asked.get("seed") or 0}

    def find(self, name: str) -> tuple[dict, Drawing]:
        """A picture by its id."""
        try:
            return self.shown[name]
        except KeyError:
            raise Refused(404, "no such picture; ask for it first") from None

    def draw_tile(self, name: str, level: int, y: int, x: int) -> bytes:
        """A tile as PNG."""
        n = 2**level
        if level > DEPTH or max(y, x) >= n:
            raise Refused(404, f"no such tile: levels 0 to {DEPTH}, rows and columns below 2^level")
        _, drawing = self.find(name)
        window = (2 * y / n - 1, 2 * x / n - 1, 2 * (y + 1) / n - 1, 2 * (x + 1) / n - 1)
        with self.model:
            pixels = whole(drawing, self.tile, window)
        made = io.BytesIO()
        Image.fromarray(pixels).save(made, "PNG", compress_level=1)
        return made.getvalue()

    def draw_view(self, name: str, query: str) -> tuple[str, Iterator[bytes]]:
        """A window of a picture as the PNG that sample.py writes: a file name, and its parts."""
        match = re.fullmatch(r"window=([-\d.e,]{7,120})&res=(\d{1,4})x(\d{1,4})", query)
        if not match:
            raise ValueError("ask for a view by window=y0,x0,y1,x1 and res=HEIGHTxWIDTH")
        window = tuple(float(part) for part in match[1].split(","))
        size = (int(match[2]), int(match[3]))
        if max(size) > PIXELS:
            raise ValueError(f"res: up to {PIXELS} pixels a side")
        info, drawing = self.find(name)
        check_frame(size, window)
        head = png_head(size, {**info, "window": window, "res": size})
        file = f"seed{info['seed']}-{info['index']:06d}-{size[0]}x{size[1]}.png"
        return file, png_parts(head, size[1], self.in_turn(drawing(size, window)))

    def check_open(self) -> None:
        """End what is being drawn when the server ends."""
        if self.closing.is_set():
            raise Refused(410, "closed")

    def in_turn(self, tiles: Tiles) -> Tiles:
        """Let others draw between two tiles."""
        tiles = iter(tiles)
        while True:
            with self.model:
                tile = next(tiles, None)
            self.check_open()                                        # no whole PNG of a part
            if tile is None:
                return
            yield tile


class Page(BaseHTTPRequestHandler):
    """Answers one request: the page, a picture to be sampled, a tile, a view to be saved."""

    timeout = 10                            # seconds that a client may be silent
    default_request_version = "HTTP/1.0"    # a request without a version gets a whole answer too
    server_version = "viewer"
    sys_version = ""
    error_content_type = TEXT
    error_message_format = "%(explain)s\n"

    def parse_request(self) -> bool:
        """Refuse what is no short GET of a page of this machine."""
        if not super().parse_request():
            return False
        host = self.headers.get("Host", "")
        if self.command != "GET":
            self.send_error(405, explain="only GET")
        elif len(self.path) > 20000:        # 1,000 characters of a prompt, up to 12 bytes each
            self.send_error(414, explain="too long")
        elif re.sub(r":\d+$", "", host).lower() not in HOSTS:
            self.send_error(421, explain="this is 127.0.0.1, asked by another name")
        elif self.foreign():
            self.send_error(403, explain="asked by another page")
        else:
            return True
        return False

    def foreign(self) -> bool:
        """Whether the page of another site asks, otherwise than by a link to ours."""
        followed = self.path == "/" and self.headers.get("Sec-Fetch-Mode") == "navigate"
        return not followed and self.headers.get("Sec-Fetch-Site", "none") not in (
            "none", "same-origin")

    def do_GET(self) -> None:
        gallery = self.server.gallery
        self.begun = ""                     # the kind of the answer
        try:
            address = urlsplit(self.path)
            path = address.path
            tile = re.fullmatch(r"/tile/([0-9a-f]{16})/(\d{1,2})/(\d{1,5})/(\d{1,5})", path)
            view = re.fullmatch(r"/view/([0-9a-f]{16})", path)
            if path == "/" and not address.query:
                self.begin("text/html; charset=utf-8")
                self.wfile.write(page(gallery.about))
            elif path == "/picture":
                self.tell(gallery.picture(address.query, self.tell))
            elif tile and not address.query:
                pixels = gallery.draw_tile(tile[1], *map(int, tile.groups()[1:]))
                self.begin("image/png")
                self.wfile.write(pixels)
            elif view:
                file, parts = gallery.draw_view(view[1], address.query)
                self.begin("image/png", ("Content-Disposition", f'attachment; filename="{file}"'))
                self.wfile.writelines(parts)
            else:
                raise Refused(404, "nothing here")
        except (ConnectionError, TimeoutError):
            raise                           # a client that has gone away
        except Refused as error:
            self.fail(*error.args)
        except ValueError as error:
            self.fail(400, first_line(error))
        except (OSError, RuntimeError, MemoryError) as error:
            self.fail(500, f"{type(error).__name__}: {first_line(error)}")
            raise

    def fail(self, status: int, line: str) -> None:
        """Say what is wrong, in a text that has begun as its last line; of a PNG the end lacks."""
        if not self.begun:
            self.send_error(status, explain=line)
        elif self.begun == TEXT:
            self.tell(line)

    def tell(self, line: object) -> None:
        """Send a line: how far the sampler is, the id; a client that has gone away ends it here."""
        self.begin(TEXT)
        self.wfile.write(f"{line}\n".encode())

    def begin(self, kind: str, *headers: tuple[str, str]) -> None:
        """Send the head of a good answer, once."""
        if not self.begun:
            self.begun = kind
            self.send_response(200)
            for name, value in (("Content-Type", kind), *headers):
                self.send_header(name, value)
            self.end_headers()

    def end_headers(self) -> None:
        """Close the head of any answer: nothing from elsewhere, nor in a page of elsewhere."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_) -> None:
        """Say nothing of every tile."""


class Server(ThreadingHTTPServer):
    """A thread for each request, JOBS of them; at 127.0.0.1 alone."""

    request_queue_size = 64

    def __init__(self, gallery: Gallery, port: int):
        self.gallery = gallery
        self.free = threading.BoundedSemaphore(JOBS)
        super().__init__(("127.0.0.1", port), Page)

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        if self.free.acquire(blocking=False):
            return super().process_request(request, client_address)
        with contextlib.suppress(OSError):
            request.sendall(b"HTTP/1.0 429 Too Many Requests\r\n\r\ntoo many at a time\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address: tuple) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        """Go on; that a client has gone away is no error."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f"error in an answer: {type(error).__name__}: {first_line(error)}",
                  file=sys.stderr)


def serve(show: Show, about: dict, port: int) -> None:
    """Serve the page until Ctrl-C.

    show(asked, bar, say): the picture that a dict of FIELDS asks for: how it is made, and what
    draws it. bar: as tqdm; say: takes a line of what is not read.
    about: "shape" (height, width) of the plane, "fields" of the model, "classes", and of the fields
    "start" (the values to begin with) and "usual" (shown where one is empty).
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: ports are 0 to 65535")
    gallery = Gallery(show, about)
    start = {name: about["start"].get(name) for name in about["fields"]}
    gallery.read(urlencode({k: v for k, v in start.items() if v is not None}))  # as the page will
    try:
        server = Server(gallery, port)
    except OSError as error:
        raise ValueError(f"--port {port}: {error.strerror}; choose another") from error
    print(f"http://127.0.0.1:{server.server_port}   (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except Stopped:
        print("closed")
    finally:
        gallery.closing.set()
        server.server_close()
        gallery.model.acquire(timeout=10)                            # nobody draws at the exit
