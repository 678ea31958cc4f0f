"""What a run is: random numbers, processes, signals, options, the run folder and its checkpoints.

One process writes a run's folder, and the same command continues it bit for bit: every random
number is a function of (seed, index), so that only weights, averages and optimisers are restored.
Read next: train.py, whose `fit` is the loop.
"""
from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import importlib
import json
import math
import operator
import os
import pickle
import re
import signal
import sys
import time
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

fcntl = importlib.import_module("fcntl") if os.name == "posix" else None     # none on Windows


# ---- random numbers ----

def _digest(key: tuple[int | str, ...]) -> int:
    plain = tuple(k if isinstance(k, str) else operator.index(k) for k in key)
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=16).digest(), "little")


def rng(*key: int | str) -> np.random.Generator:
    """Give the random numbers that belong to `key`: the same whoever asks, and whenever."""
    return np.random.Generator(np.random.Philox(key=_digest(key)))


def torch_noise(shape: tuple[int, ...], *key: int | str | float) -> Tensor:
    """Give the standard normal float32 noise that belongs to `key`; made on the CPU.

    A float in the key, as 2.25, asks for the noise a quarter of the way from that of 2 to that of
    3, on an arc, where it stays standard normal.
    """
    for at, part in enumerate(key):
        if isinstance(part, float):
            low = math.floor(part)
            angle = math.pi / 2 * (part - low)
            a, b = (torch_noise(shape, *key[:at], i, *key[at + 1:]) for i in (low, low + 1))
            return math.cos(angle) * a + math.sin(angle) * b
    return torch.randn(shape, generator=torch.Generator().manual_seed(_digest(key) >> 65))


# ---- several processes ----
# Every rank draws its share of one batch, and all take the same step. DistributedDataParallel would
# hide the reduction in hooks, which the adaptive weight of the GAN goes around.


def ranks() -> tuple[int, int]:
    """Say which process this is, and of how many: (rank, world); (0, 1) without torchrun."""
    started = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes of torchrun (NCCL between GPUs, gloo on CPUs); yields the device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))  # rank 0 draws and saves alone
    try:
        yield device
    finally:
        dist.destroy_process_group()


def all_mean(tensors: list[Tensor]) -> list[Tensor]:
    """Average tensors over all ranks, in one reduction."""
    world = ranks()[1]
    if world == 1 or not tensors:
        return tensors
    flat = torch.cat([t.detach().flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = flat.div_(world).split([t.numel() for t in tensors])
    # In the layout of each: fused optimisers take that for granted, unchecked.
    return [torch.empty_like(t).copy_(part.view_as(t)) for part, t in zip(parts, tensors)]


def together(flag: int) -> int:
    """Give every rank the largest flag of all, so that they agree."""
    if ranks()[1] == 1:
        return flag
    value = torch.tensor(flag)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def barrier() -> None:
    """Wait until every rank has come here."""
    together(0)


def print_once(text: str) -> None:
    """Print on rank 0 alone."""
    if ranks()[0] == 0:
        print(text, flush=True)


# ---- how a program ends ----

class Stopped(BaseException):
    """A signal asked the program to end; the argument is the exit code, 143 or 130.

    As KeyboardInterrupt no Exception, which readers of damaged files and servers go on after.
    """


class NotFinite(RuntimeError):
    """Weights or gradients are NaN or infinite: the run cannot go on from here."""


class NotSaved(OSError):
    """The last chance to save a run failed."""


@contextlib.contextmanager
def on_signals(handler: Callable) -> Iterator[None]:
    """Let SIGTERM and SIGINT call handler(number, frame) within the block."""
    before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for s, old in before.items():
            signal.signal(s, old)


def stop(number: int, frame: object) -> None:
    """End the program at once, as a handler for `on_signals`."""
    raise Stopped(128 + number)


def cli(run: Callable[[list[str]], int | None], argv: list[str],
        stopped: str = "stopped", memory: str = "take a smaller batch or size") -> int:
    """Run a program; what ends it becomes one line and an exit code. Every `main` calls this.

    0: done. 2: bad input (ValueError, OSError). 1: numbers, disk or memory gave out (`memory` says
    what needs less). 143, 130: a signal (`stopped` says what is left).
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                   # names it cannot show print escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        with on_signals(stop):                               # `RunFolder` sets a flag instead
            code = run(argv) or 0
            sys.stdout.flush()
            return code
    except Stopped as ending:
        code, line = ending.args[0], stopped
    except BrokenPipeError:                                  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (NotFinite, NotSaved) as error:
        code, line = 1, f"error: {error}"
    except (torch.OutOfMemoryError, MemoryError) as error:
        code, line = 1, f"error: out of memory ({first_line(error)}): {memory}"
    except (ValueError, OSError) as error:
        code, line = 2, f"error: {first_line(error)}"
    print(line, file=sys.stderr, flush=True)
    return code


def first_line(error: BaseException) -> str:
    """Say in one line what went wrong; of an error of the system, the path and the cause."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return (str(error) or type(error).__name__).splitlines()[0]


# ---- options ----
# Frozen dataclasses, nested ones by a dotted name ("ae.ch"). Flat dicts of such names are what the
# command line, the presets and the checkpoints hold.


def flatten(cfg, prefix: str = "") -> dict[str, object]:
    """Turn a (nested) dataclass or dict into a flat dict of dotted names; tuples become lists."""
    if dataclasses.is_dataclass(cfg):
        cfg = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    flat = {}
    for name, value in cfg.items():
        if dataclasses.is_dataclass(value) or isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def option_types(cls: type, prefix: str = "") -> dict[str, type]:
    """List every option of a (nested) dataclass by its dotted name, with its type."""
    found = {}
    for name, kind in typing.get_type_hints(cls).items():
        nested = dataclasses.is_dataclass(kind)
        found |= option_types(kind, f"{prefix}{name}.") if nested else {prefix + name: kind}
    return found


def unflatten(cls: type, values: dict, base=None):
    """Build a dataclass from dotted names or nested dicts; what is not given is as in `base`."""
    flat = flatten(values)
    check_names(cls.__name__, flat, option_types(cls))
    base = cls() if base is None else base
    changes = {}
    for name, kind in typing.get_type_hints(cls).items():
        inner = {k[len(name) + 1:]: v for k, v in flat.items() if k.startswith(f"{name}.")}
        if inner:
            changes[name] = unflatten(kind, inner, getattr(base, name))
        elif name in flat:
            changes[name] = tuple(flat[name]) if isinstance(flat[name], list) else flat[name]
    return dataclasses.replace(base, **changes)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Name the known words that are like `name`, as the end of a message."""
    ends = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]]
    like = [*ends, *difflib.get_close_matches(name, known)]
    return f"; did you mean {', '.join(dict.fromkeys(like))}?" if like else ""


def choose(name: str, value: str, *known: str) -> None:
    """Raise ValueError where the value of an option is none of those known."""
    if value not in known:
        raise ValueError(f"{name}={value}: choose {', '.join(known[:-1])} or {known[-1]}")


def check_names(what: str, names: typing.Iterable[str], known: dict[str, type]) -> None:
    """Raise ValueError for a name that is no option."""
    for name in names:
        if name not in known:
            raise ValueError(f"{what} has no option {name}{nearest(name, known)}")


def convert(name: str, kind: type, text: str):
    """Read the value of option `name` from its text; ValueError says what was expected."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int:
            whole = re.fullmatch(r"\d[\d_]*", text)
            number = int(text) if whole else float(text.replace("_", ""))    # 1e6 is whole, too
            if number != int(number) or number < 0:
                raise ValueError
            return int(number)
        if kind in (float, str):
            return kind(text)
        return tuple(int(v) for v in text.strip("()").split(",") if v.strip())
    except (KeyError, ValueError, OverflowError):
        expected = {bool: "true or false", int: "a whole number, 0 or more", float: "a number"}
        expected = expected.get(kind, "integers like 1,2,4")
        raise ValueError(f"option {name}={text}: expected {expected}") from None


def parse_options(cls: type, texts: list[str], what: str) -> dict[str, object]:
    """Read key=value texts as options of a dataclass (`what` names it): a flat dict."""
    known = option_types(cls)
    given = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"cannot read {text!r}: options are written key=value")
        check_names(what, [name], known)
        given[name] = convert(name, known[name], value)
    return given


# ---- checkpoint files ----

FORMAT = 1               # of our own checkpoints; a file of a later one is refused, not guessed at


def checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run folder, newest first; not copies by names of the user's."""
    found = [path for path in run.glob("step-*.pt") if re.fullmatch(r"step-\d+", path.stem)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by the name of its file."""
    return int(path.stem.removeprefix("step-"))


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint file: nothing in it is executed, a flipped byte is a ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; name a file or a run folder of train.py")
    with path.open("rb") as file:                            # a lack of permission says so itself
        archived = file.read(2) == b"PK"
    if archived:
        verify_archive(path)                                 # torch.save's old format has no sums
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} was not opened: it is no checkpoint, cut short, or holds more "
                         f"than tensors and plain values") from error
    except Exception as error:                               # damage can make it raise anything
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(ckpt, dict):
        raise ValueError(f"{path} is no checkpoint: expected a dict, not {type(ckpt).__name__}")
    if "stage" in ckpt and ckpt.get("format", 1) != FORMAT:
        raise ValueError(f"{path} has checkpoint format {ckpt['format']}, this version reads "
                         f"{FORMAT}; update the code")
    return ckpt


def check_whole(path: str | Path, part: dict, *names: str) -> None:
    """ValueError where a part of a checkpoint lacks what it should hold."""
    missing = [name for name in names if not isinstance(part, dict) or name not in part]
    if missing:
        raise ValueError(f"{path} is no whole checkpoint: it lacks {', '.join(missing)}")


def verify_archive(path: Path) -> None:
    """Compare a file's checksums, which torch.load does not look at. Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(info.compress_type for info in archive.infolist())
            bad = "packed, as torch.save never does" if packed else archive.testzip()
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, RuntimeError) as error:
        bad = first_line(error)
    if bad is not None:
        raise ValueError(f"{path} is damaged (the checksum or header of {bad}); use an older one")


def newest_checkpoint(run: Path) -> tuple[Path, dict]:
    """Read a run's newest checkpoint; a damaged one is named and the one before it is used."""
    files = checkpoints(run)
    if not files:
        raise FileNotFoundError(f"no checkpoint (step-*.pt) in {run}; train one with train.py")
    for path, older in zip(files, files[1:]):
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            print(f"warning: {error}; falling back to {older}", file=sys.stderr)
    return files[-1], read_checkpoint(files[-1])


def write_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint whole or not at all: temporary name, fsync, checksums, rename, fsync."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        verify_archive(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def load_weights(module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Load weights by name and shape; a ValueError names what does not fit, or is not finite."""
    if not isinstance(weights, dict):
        raise ValueError(f"{what}: there are no weights, but a {type(weights).__name__}")
    shapes = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    wrong = [f"missing {k}" for k in shapes if k not in weights]
    wrong += [f"left over {k}" for k in weights if k not in shapes]
    for name in shapes.keys() & weights.keys():
        if shapes[name] != tuple(weights[name].shape):
            wrong.append(f"{name} is {tuple(weights[name].shape)}, not {shapes[name]}")
        elif not torch.isfinite(weights[name]).all():
            wrong.append(f"{name} is not finite")
    if wrong:
        raise ValueError(f"{what} does not fit, in {len(wrong)} places: {'; '.join(wrong[:5])}")
    module.load_state_dict(weights)


# ---- the log ----

class Meter:
    """Averages what the steps report; the host waits for the device at a line of the log alone."""

    def __init__(self):
        self.rows: list[tuple] = []                   # (logs, step, samples) since the last line
        self.bad = 0                                  # skipped steps in a row
        self.restart()

    def restart(self) -> None:
        """Leave out the time so far, and its images, of the rate."""
        self.images = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    def wait_for(self, stream: Iterator[dict]) -> dict:
        """Take the next batch; the time it takes counts as waiting for data."""
        before = time.perf_counter()
        batch = next(stream)
        self.waited += time.perf_counter() - before
        return batch

    def add(self, logs: dict[str, Tensor], images: int, k: int, index: Tensor) -> None:
        """Take in what step k reports, () tensors with "taken" among them; index: its samples."""
        self.rows.append(({name: value.detach() for name, value in logs.items()}, k, index))
        self.images += images

    def means(self) -> dict[str, float]:
        """Give the means over steps and ranks, images/s, and the share of time waiting for data.

        Raises NotFinite after 20 skipped steps in a row.
        """
        seen: dict[str, list[float]] = {}
        for logs, k, index in self.rows:
            values = {name: float(value) for name, value in logs.items()}
            taken = values.pop("taken")
            self.bad = 0 if taken else self.bad + 1
            if self.bad == 20:
                raise NotFinite(f"the gradients of 20 steps in a row are not finite; last batch: "
                                f"images {index.tolist()} of step {k}. The newest checkpoint is "
                                f"good; lower lr")
            for name, value in (values if taken else {"skipped": 1.0}).items():
                seen.setdefault(name, []).append(value)
        self.rows = []

        means = [torch.tensor(v).double().mean() for v in seen.values()]
        line = {name: round(m.item(), 6) for name, m in zip(seen, all_mean(means))}
        if "skipped" in seen:
            line["skipped"] = len(seen["skipped"])           # a count, not a mean
        elapsed = time.perf_counter() - self.since
        line["images_per_s"] = round(self.rate(), 2)
        line["data_wait"] = round(self.waited / elapsed, 4)
        self.restart()
        return line

    def rate(self) -> float:
        """Images per second since the last line of the log."""
        return self.images / (time.perf_counter() - self.since)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out time that is no training time: saving and drawing."""
        before = time.perf_counter()
        yield
        self.since += time.perf_counter() - before


# ---- the run folder ----

# What to say where these options differ from those of the run that is to be continued.
WHY = {"K": "K is for how many steps the noise levels are planned, by default for all: add K={} to "
            "train on at those of the end",
       "encoder": "The autoencoder has learned since, and its latents are others: train a new UNet "
                  "(start=RUN begins from the old), or give init= as it was"}


class RunFolder:
    """The folder of one run: its lock, log and checkpoints. `with RunFolder(...).owned()` holds it.

    Every rank makes one; rank 0 alone writes. free: names of options that may change in a continued
    run; data: what is trained on, {"pictures": n, "digest": hex}. The first SIGTERM or SIGINT makes
    `stopping` true, a second one ends the process.
    """

    def __init__(self, path: Path, stage: str, cfg, free: frozenset[str] = frozenset(),
                 data: dict | None = None):
        self.path = path
        self.stage = stage
        self.cfg = cfg
        self.free = free
        self.data = data
        self.signalled = 0

    @contextlib.contextmanager
    def owned(self) -> Iterator[RunFolder]:
        """Make the folder, hold it, and note signals, within the block."""
        self.path.mkdir(parents=True, exist_ok=True)
        first = ranks()[0] == 0
        with locked(self.path) if first else contextlib.nullcontext(), on_signals(self._note):
            for part in [*self.path.glob("step-*.part"), self.path / "log.part"] if first else ():
                part.unlink(missing_ok=True)                 # of a run that was killed in writing
            barrier()                                        # rank 0 holds it before any reads
            yield self

    def _note(self, number: int, frame: object) -> None:
        if self.signalled:
            os._exit(128 + number)
        self.signalled = number
        if hasattr(signal, "SIGCHLD"):        # a loader process that ends now must not end the step
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def stopping(self) -> int:
        """Say which signal any rank has got, or 0. All ranks must ask alike."""
        return together(self.signalled)

    def resume(self, state: dict) -> int:
        """Restore the newest checkpoint; returns the step to go on from, 0 without one.

        state: name -> module or list of optimisers. Raises ValueError where the folder
        holds a run of another stage, options or data.
        """
        step = 0
        if checkpoints(self.path):
            path, ckpt = newest_checkpoint(self.path)
            check_whole(path, ckpt, "stage", "step", "config", "state")
            self._check(ckpt)
            check_whole(path, ckpt["state"], *state)
            for name, part in state.items():
                restore(part, ckpt["state"][name], f"{name} in {path}")
            step = ckpt["step"]
            print_once(f"continuing {self.path} from step {step:,}")
        else:
            again = " over" if (self.path / "log.jsonl").exists() else ""
            print_once(f"starting{again} from step 0: no checkpoint in {self.path}")
        if ranks()[0] == 0:
            cut_log(self.path / "log.jsonl", step)           # 0: killed before its first checkpoint
        barrier()                                            # all have read; rank 0 may write now
        return step

    def _check(self, ckpt: dict) -> None:
        """Raise ValueError where a checkpoint is of another run."""
        old = {"stage": ckpt["stage"]}
        new = {"stage": self.stage}
        if old == new:                                       # options it lacks had their default
            old = flatten(unflatten(type(self.cfg), ckpt["config"]))
            new = flatten(self.cfg)
        other = [k for k in sorted(new) if old[k] != new[k] and k not in self.free]
        if other:
            changed = "; ".join(f"{k}: {old[k]} -> {new[k]}" for k in other)
            why = "".join(f". {WHY[k].format(old[k])}" for k in other if k in WHY)
            raise ValueError(f"{self.path} holds another run ({changed}); choose another --out, or "
                             f"those options{why}")
        then = ckpt.get("data")
        if self.data and then and then != self.data:
            raise ValueError(f"{self.path} was trained on {then['pictures']} pictures, the data "
                             f"has {self.data['pictures']} now, not the same ones; give what it "
                             f"was trained on, or choose another --out")

    def log(self, line: dict) -> None:
        """Add a line to log.jsonl (rank 0); a full disk is a warning."""
        if ranks()[0]:
            return
        try:
            with open(self.path / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            warnings.warn(f"a line of the log could not be written ({first_line(error)}); training "
                          f"goes on")

    def save(self, step: int, state: dict, extra: dict, last: bool) -> None:
        """Write step-<number>.pt (rank 0); the last two stay, and what cfg.keep_every divides.

        extra: plain values beside the state. A failure is a warning, NotSaved if it was the `last`
        chance. NotFinite where weights are no longer numbers: the older checkpoints are good.
        """
        if not all_finite(state):
            raise NotFinite(f"the weights are not finite at step {step}; the newest checkpoint in "
                            f"{self.path} is good; lower lr")
        if ranks()[0]:
            return
        content = {"format": FORMAT, "stage": self.stage, "step": step}
        content |= {"config": flatten(self.cfg), "data": self.data, **extra}
        content["state"] = {name: stored(part) for name, part in state.items()}
        try:
            write_checkpoint(self.path / f"step-{step:08d}.pt", content)
        except (OSError, RuntimeError, ValueError) as error:         # torch.save: a full disk
            line = f"step {step} could not be saved in {self.path} ({first_line(error)})"
            if last:
                raise NotSaved(f"{line}; what is there is older") from error
            warnings.warn(f"{line}; training goes on and tries again at the next save; older "
                          f"checkpoints are untouched")
            return
        every = self.cfg.keep_every
        for old in checkpoints(self.path)[2:]:
            if not every or step_of(old) % every:
                old.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder; ValueError where another process does.

    A POSIX record lock ends with the process that trains; loader processes do not inherit it.
    """
    with open(folder / "lock", "a") as file:                 # opening leaves it unchanged
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"another run is writing to {folder}; wait for it, or choose "
                                 f"another --out") from None
            warnings.warn(f"{folder} is on a file system without locks ({error.strerror}): take "
                          f"care that no two runs write to it")      # Lustre, some NFS
        yield


def stored(part: nn.Module | list[torch.optim.Optimizer]):
    """Give the state of a module, or of a list of optimisers, for a checkpoint."""
    return [opt.state_dict() for opt in part] if isinstance(part, list) else part.state_dict()


def restore(part: nn.Module | list[torch.optim.Optimizer], content, what: str) -> None:
    """Load what `stored` gave; ValueError where weights do not fit."""
    if isinstance(part, nn.Module):
        load_weights(part, content, what)
        return
    for opt, own in zip(part, content, strict=True):
        opt.load_state_dict(own)
        lay_out_state(opt)


def lay_out_state(opt: torch.optim.Optimizer) -> None:
    """Lay out what an optimiser keeps of each weight as that weight is, and as gradients are."""
    for p, kept in opt.state.items():
        for name, value in kept.items():
            if value.shape == p.shape:
                kept[name] = torch.empty_like(p).copy_(value)


def all_finite(state: dict) -> bool:
    """Say whether every parameter and buffer of the modules in `state` is finite."""
    tensors = []
    for part in state.values():
        if isinstance(part, nn.Module):
            tensors += [t for t in part.state_dict().values() if t.is_floating_point()]
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(tensors))).all())


def read_log(log: Path) -> list[dict]:
    """The lines of a log, less those that a kill cut short."""
    lines = []
    for text in log.read_text().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def cut_log(log: Path, step: int) -> None:
    """Keep the lines of a log up to a step; those after that checkpoint will come again."""
    if not log.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_log(log) if line["step"] <= step]
    part = log.with_suffix(".part")
    part.write_text("".join(kept))
    part.replace(log)


# ---- what the device gives ----

def pick_device(name: str) -> torch.device:
    """Choose the device. auto: a CUDA GPU (one for each process), else Apple's, else the CPU."""
    if name != "auto":
        try:
            return torch.zeros(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name}: {first_line(error)}") from error
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast_for(dtype: str, device: torch.device) -> Callable:
    """Give a maker of contexts for forward passes. auto: bf16 on a GPU that has it, else fp32.

    bf16 needs no loss scaling; fp16 is not offered, since it overflows.
    """
    choose("dtype", dtype, "auto", "bf16", "fp32")
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if dtype == "bf16" or (dtype == "auto" and auto):
        return functools.partial(torch.autocast, device.type, torch.bfloat16)
    return contextlib.nullcontext


def set_tf32(on: bool, device: torch.device) -> None:
    """Allow fp32 products with 10 bits of mantissa in the whole process; only CUDA knows them."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if on else "highest")
        torch.backends.cudnn.allow_tf32 = on


def wants_compile(option: str, device: torch.device) -> bool:
    """Say whether to compile. auto: on a CUDA GPU under Linux. graphs: with CUDA graphs, too."""
    choose("compile", option, "auto", "on", "off", "graphs")
    auto = device.type == "cuda" and sys.platform == "linux"
    return option in ("on", "graphs") or (option == "auto" and auto)


def wants_channels_last(option: str, device: torch.device, compiles: bool) -> bool:
    """Say whether convolutions work in NHWC. auto: on a CUDA GPU, in what is compiled.

    There they are 1.2 to 2 times faster, but PyTorch's own GroupNorm is 1.8 times slower, so that
    without the compiler, which writes the norms, it loses (docs/results.md).
    """
    choose("channels_last", option, "auto", "true", "false")
    return option == "true" or (option == "auto" and compiles and device.type == "cuda")


def compiled(function: Callable, option: str = "auto", shapes: int = 1,
             otherwise: Callable[[], object] | None = None) -> Callable:
    """Compile a function of tensors for the first few shapes it is called with; others run as are.

    Training has one, and so have the tiles of a picture. option: as in `wants_compile`. Where the
    compiler fails, only auto goes on, without it, after one warning and a call of `otherwise`.
    """
    mode = "reduce-overhead" if option == "graphs" else None
    quick = torch.compile(function, dynamic=False, mode=mode)
    known: list[list] = []
    broken: list[bool] = []                       # not the error, whose frames keep callers alive

    def call(*args, **options):
        given = [a.shape for a in (*args, *options.values()) if isinstance(a, Tensor)]
        if given not in known and len(known) < shapes:
            known.append(given)
        if broken or given not in known:
            return function(*args, **options)
        try:
            return quick(*args, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            if option != "auto":
                raise
            broken.append(True)
            cause = " ".join(str(error).splitlines()[:2])         # which backend, and what it said
            warnings.warn(f"torch.compile failed, going on without it ({cause}); "
                          f"compile=off is silent, compile=on stops")
        if otherwise is not None:
            otherwise()
        return function(*args, **options)

    return call
