"""Tests with known answers: closed forms, exact invariances, bit-for-bit resume, and golden data.

Golden tests compare with numbers of the published implementations on small random weights. They
read the folder named by the environment variable GOLDEN and take every width, depth and shape from
its files, so they hold on any other set of the same files; where the folder is missing they are
skipped. Nothing here needs a network or a GPU.
"""
from __future__ import annotations

import argparse
import ast
import atexit
import base64
import contextlib
import ctypes
import errno
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import warnings
import zipfile
import zlib
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.distributed.run
import torch.nn.functional as F
import tqdm
from PIL import Image, ImageSequence, PngImagePlugin
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import clif
import data
import experiments
import files
import inr_generator
import metrics
import models
import pictures
import published
import runs
import sample
import stages
import stages_func
import stages_infd
import stages_onestep
import text
import train
import viewer
from autoencoder import (Attention, AutoencoderConfig, Decoder, DiscriminatorConfig, Encoder,
                         FieldAutoencoder, PatchDiscriminator, PixelHead, VectorQuantizer,
                         adaptive_weight, first_order, hinge_loss, kl_loss, split_moments)
from clif import (CLIF, CLIFConfig, Field, FrameNorm, LIIF, LIIFConfig, check_frame, coord_grid,
                  query)
from conditions import (LED, SHIFTED, Condition, conditioned, fitted_noise, inside, laid_out, like,
                        misfit, read_given)
from consistency import (ConsistencyConfig, ConsistencyModel, ECT, Guided, ICT,
                         LatentConsistency, ResizedLPIPS, Schedule, consistency_loss,
                         denoising_distance, euler_step, heun_step, l2, noise_condition, per_image,
                         pseudo_huber, sample_function, sample_multistep, sample_onestep)
from data import to_uint8
from inr_generator import (AdaLNBlock, Block, DiT, FunctionGenerator, FunctionPrediction,
                           GeneratorConfig, ImageFunction, TransformerConfig, UViT, pixel_coord,
                           positional_encoding, variational_coord)
from landscapes import Landscapes, TIMES
from ldm import (DiffusionConfig, GaussianDiffusion, SelfAttention, SpatialTransformer, UNet,
                 UNetConfig, guided, qkv_from_legacy, timestep_embedding)
from published import (OPENAI, PUBLISHED_NAMES, SCALE, SD_V1, adm_weights, autoencoder_config,
                       from_diffusers, our_autoencoder, read_safetensors, read_weights, schedule,
                       split_weights, text_config, unet_config)
from runs import rng, torch_noise
from text import (CLIPTokenizer, MERGES_FILE, TextConfig, TextTransformer, WordTokenizer, clean,
                  read_merges, split, tokenizer_from)

# ==================================================================================================
# What many tests share
# ==================================================================================================

ROOT = Path(__file__).parent
GOLDEN = Path(os.environ.get("GOLDEN", ROOT / "../shared/golden"))


def slow(test):
    """`pytest -m slow` runs it, a plain `pytest` skips it; no file registers the mark."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        test = pytest.mark.slow(test)
    condition = "'slow' not in config.option.markexpr"
    return pytest.mark.skipif(condition, reason="slow; pytest -m slow runs it")(test)


def golden_file(name: str) -> Path:
    """Where a reference file is, `infd/...`, `cm/...` or `text/...`; else the test is skipped."""
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"no reference numbers at {path}")
    return path


def golden(name: str) -> dict:
    """The content of a reference file."""
    path = golden_file(name)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return torch.load(path, weights_only=True)


def reference(name: str) -> tuple[dict, dict, dict, dict]:
    """Config, weights, inputs and outputs of a reference file."""
    g = golden(name)
    return g["config"], g.get("state_dict", {}), g.get("inputs", {}), g["outputs"]


def close(ours: torch.Tensor, theirs: torch.Tensor, tol: float | dict = 1e-4,
          name: str = "") -> None:
    """tol: largest difference in standard deviations of the reference (golden/infd/README), or
    rtol and atol (golden/cm/README)."""
    if isinstance(tol, dict):
        torch.testing.assert_close(ours, theirs, **tol, msg=lambda text: f"{name}: {text}")
        return
    assert ours.shape == theirs.shape, name
    error = (ours.detach() - theirs).abs().max()
    error = error / (theirs.std() if theirs.numel() > 1 else theirs.abs())
    assert error < tol, f"{name} off by {error:.2e} std"


def agree(theirs: dict, tol: float | dict = 1e-4, **ours: torch.Tensor) -> None:
    """Every value of ours is `close` to the reference of the same name."""
    for name, value in ours.items():
        close(value, theirs[name], tol, name)


def field_equal(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def formula(weights: dict, seed: int) -> dict:
    """The weights of the golden READMEs, a function of key and shape alone."""
    out = {}
    for key, old in weights.items():
        generator = torch.Generator().manual_seed((zlib.crc32(key.encode()) + seed) % 2**32)
        u = torch.rand(old.shape, generator=generator).mul_(2).sub_(1)
        if not old.is_floating_point():
            out[key] = torch.zeros(old.shape, dtype=old.dtype)
        elif key.endswith("running_var"):
            out[key] = 1 + 0.5 * u
        elif old.ndim >= 2:
            out[key] = u.mul_(math.sqrt(3 / old[0].numel()))
        else:
            out[key] = u.mul_(0.2).add_(1 if key.endswith("weight") else 0)
    return out


def meta(keys: dict, prefix: str = "") -> dict:
    """Tensors without storage from {name: [shape, dtype]}, of the part whose names begin so."""
    return {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, (shape, dtype) in published.below(keys, prefix).items()}


def loaded(make, weights: dict | None = None) -> nn.Module:
    """make() with these weights and no others, by default `formula`'s: frozen, in eval mode."""
    with torch.device("meta"):
        module = make()
    weights = formula(module.state_dict(), seed=0) if weights is None else weights
    weights = {name: value.float() for name, value in weights.items()}
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def count(make, *args, **options) -> int:
    """Number of parameters of make(*args, **options)."""
    with torch.device("meta"):
        return sum(p.numel() for p in make(*args, **options).parameters())


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ==================================================================================================
# The renderer and the autoencoder: clif.py, autoencoder.py
# ==================================================================================================

def field_rename(sd: dict, prefix: str = "") -> dict:
    """Published keys -> ours; `prefix`: the module of a relative state dict, not part of ours."""
    out = {}
    for key, value in sd.items():
        key = prefix + key
        old = next(filter(key.startswith, PUBLISHED_NAMES), "")
        out[(PUBLISHED_NAMES.get(old, "") + key.removeprefix(old)).removeprefix(prefix)] = value
    return out


def field_config(args: dict, **options) -> AutoencoderConfig:
    """Our configuration from the arguments of a published encoder or decoder."""
    return AutoencoderConfig(ch=args["ch"], ch_mult=args["ch_mult"], kl=args.get("double_z", False),
                             num_res_blocks=args["num_res_blocks"], z_channels=args["z_channels"],
                             **options)


def field_clif(hidden: int = 64) -> CLIF:
    return loaded(lambda: CLIF(CLIFConfig(32, hidden)))


def field_phi(c: int = 32, h: int = 16, w: int = 24, b: int = 1, seed: int = 0) -> torch.Tensor:
    return randn(b, c, h, w, seed=seed)


def field_grid(phi: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """coord (B, H, W, 2) and cell (B, 2) of the whole plane."""
    coord = coord_grid((height, width)).expand(len(phi), -1, -1, -1)
    return coord, torch.tensor([[2 / height, 2 / width]]).expand(len(phi), 2)


def field_spy(renderer: nn.Module) -> nn.Module:
    """Let a renderer note in `drawn` the (height, width) of every grid it draws."""
    def note(_, args):
        renderer.drawn.append(tuple(args[1].shape[1:3]))
    renderer.drawn = []
    renderer.register_forward_pre_hook(note)
    return renderer


def field_published_clif(config: dict, weights: dict) -> CLIF:
    """The renderer of a golden file."""
    args = config["official"]["args"]
    blocks = {int(k.split(".")[2]) for k in weights if k.startswith("net.model.")} - {0}
    cfg = CLIFConfig(args["z_dec_channels"], args["net"]["args"]["hidden_channels"], len(blocks))
    return loaded(lambda: CLIF(cfg), field_rename(weights, "renderer."))


def test_golden_coords():
    _, _, i, o = reference("infd/coords.pt")
    for spec, want in zip(i["grids"], o["grids"]):
        span = spec["range"]
        (y0, y1), (x0, x1) = span if isinstance(span[0], list) else (span, span)
        assert torch.equal(coord_grid(spec["shape"], (y0, x0, y1, x1)), want["coord"])
        cell = torch.tensor([(y1 - y0) / spec["shape"][0], (x1 - x0) / spec["shape"][1]])
        torch.testing.assert_close(cell.expand_as(want["cell"]), want["cell"])
    assert coord_grid((4, 2))[..., 0].T.tolist() == [[-0.75, -0.25, 0.25, 0.75]] * 2


@pytest.mark.parametrize("kind", ["", "_oob", "_tie"])
def test_golden_query(kind):
    """Feature, offset and size of every query; outside the plane, on its border and on ties too."""
    _, _, i, o = reference("infd/coords.pt")
    feat = i["feat_tie" if kind == "_tie" else "feat"]
    coord = i["coord" + kind]
    cells = i["cell" if kind == "_oob" else "cell" + kind]
    before = kind[1:] + "_" * bool(kind)
    want = torch.cat([o[before + name] for name in ("q_feat", "rel_coord", "rel_cell")], dim=-1)
    want = want.movedim(-1, 1)
    for y, x in itertools.product(*map(range, coord.shape[1:3])):    # a cell for each query
        got = query(feat, coord[:, y:y + 1, x:x + 1], cells[:, y, x])[..., 0, 0]
        torch.testing.assert_close(got, want[..., y, x], rtol=0, atol=1e-6)
    features = query(feat, coord, cells[:, 0, 0])[:, :feat.shape[1]]
    assert torch.equal(features, want[:, :feat.shape[1]])


def test_check_frame_names_bad_input():
    assert check_frame(8) == ((8, 8), (-1, -1, 1, 1))
    assert check_frame([3, 5], [0, 0, 0.5, 1]) == ((3, 5), (0, 0, 0.5, 1))
    field = Field(field_clif(), field_phi(), 16, paper=True)
    for bad in (dict(res=0), dict(res=(4, 0)), dict(res="8"), dict(window=(0, 0, 0, 1)),
                dict(window=(0, -1.1, 1, 1)), dict(window=(0, 0, 1, math.nan)),
                dict(window=(0, 0, math.inf, 1))):
        for call in (check_frame, field.draw):
            with pytest.raises(ValueError, match=f"^{next(iter(bad))}.*") as error:
                call(**({"res": 8} | bad))
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="tile 0"):
        Field(field_clif(), field_phi(), tile=0)


# ---- renderers ----

def test_golden_renderer():
    config, weights, i, o = reference("infd/renderer.pt")
    model = field_published_clif(config, weights)
    for k in range(2):
        cell = i[f"cell{k}"][:, 0, 0]
        close(query(i["z_dec"][:1], i[f"coord{k}"][:1], cell[:1]), o[f"layout{k}"], 1e-6)
        close(model(i["z_dec"], i[f"coord{k}"], cell), o[f"render{k}"])
    lowvar = model(i["z_dec_lowvar"], i["coord_lowvar"], i["cell_lowvar"][:, 0, 0])
    agree(o, render_lowvar=lowvar)
    # No shipped configuration has the variants without norms, 1x1 kernels or encoded coordinates.
    g = golden("infd/renderer_variants.pt")["larger"]
    i = g["inputs"]
    larger = field_published_clif(g["config"], g["state_dict"])
    agree(g["outputs"], render=larger(i["z_dec"], i["coord"], i["cell"][:, 0, 0]))


@pytest.mark.parametrize("case", ["full", "no_ensemble", "no_unfold", "no_cell", "plain"])
def test_golden_liif(case):
    g = golden("infd/liif_mlp.pt")
    cfg = g["config"]
    i = g["inputs"]
    case = g["cases"][case]
    cfg = LIIFConfig(cfg["feat_channels"], cfg["hidden_list"][0], len(cfg["hidden_list"]),
                     case["feat_unfold"], case["local_ensemble"], case["cell_decode"])
    weights = {k.replace("imnet.layers.", "mlp."): v for k, v in case["state_dict"].items()}
    model = loaded(lambda: LIIF(cfg), weights)
    points = [model(i["feat"], i["coord"][:, n:n + 1, None], i["cell"][:, n])[:, :, 0, 0]
              for n in range(i["coord"].shape[1])]                   # each has its own cell
    grid = model(i["feat"][:1], i["grid"][:, :, None], i["grid_cell"][:, 0])      # (N, 1) points
    agree(case, rgb=torch.stack(points, dim=1), rgb_grid9x11=grid[..., 0].mT)


def test_frame_statistics_are_those_of_the_plane_at_twice_phi():
    """A picture of that size is the undivided one, with its gradients unless these are disabled."""
    model = field_clif()
    phi = field_phi(h=8, w=12, b=2).requires_grad_()
    grid = field_grid(phi, 16, 24)
    weight = randn(2, 3, 16, 24, seed=1)
    with torch.no_grad():
        fixed = FrameNorm.of(model, phi)
    want = model(phi, *grid)
    slope, = torch.autograd.grad((want * weight).sum(), phi)
    for norm, same in ((FrameNorm.of(model, phi), True), (fixed, False)):
        rgb = model(phi, *grid, norm)
        field_equal(rgb, want)
        got, = torch.autograd.grad((rgb * weight).sum(), phi)
        assert ((got - slope).abs().max() < 1e-4 * slope.std()) == same
    field_equal(Field(model, phi.detach(), tile=16).draw((16, 24)), want.detach())


@pytest.mark.parametrize("paper", [False, True])
def test_a_batch_has_statistics_of_its_own_pictures(paper):
    """A picture taken from a batch keeps its batch dimension and its statistics."""
    spy = field_spy(field_clif())
    phi = torch.cat([field_phi(h=8, w=12), 3 * field_phi(h=8, w=12, seed=1)])
    both = Field(spy, phi, 32, paper)
    drawn = both.draw((20, 40))
    for i in range(2):
        field_equal(drawn[i:i + 1], Field(spy, phi[i:i + 1], 32, paper).draw((20, 40)))
    spy.drawn.clear()
    assert [len(one) for one in both] == [1, 1] and len(both) == 2 and not spy.drawn
    field_equal(drawn[1:], both[-1].draw((20, 40)))
    with pytest.raises(IndexError):
        both[2]


# ---- tiles ----

@pytest.mark.parametrize("res, coarse", [(96, 32), ((16, 80), (16, 32)), ((80, 20), (32, 20))])
def test_a_field_is_drawn_no_finer_than_training_saw_and_enlarged(res, coarse):
    """Beyond `finest` pixels a cell: bicubic, of one drawing of the plane, in tiles and windows."""
    plain = Field(field_clif(), field_phi(h=8, w=8, b=2), 16)
    field = replace(plain, finest=4)
    assert torch.equal(field.draw(32), plain.draw(32))
    size = check_frame(res)[0]
    whole = F.interpolate(plain.draw(coarse), size, mode="bicubic")
    close(field.draw(res), whole, 1e-4)
    close(replace(field, tile=37).draw(res), whole, 1e-4)
    h, w = size[0] // 2, size[1] // 4
    close(field.draw((h, w), (0, -0.5, 1, 0)), whole[..., h:, w:2 * w], 1e-4)


def test_golden_tiled_render():
    config, _, i, o = reference("infd/tiled_render.pt")
    model = golden("infd/infd_ckpt.pt")["model"]
    args = model["args"]
    cfg = field_config(args["encoder"]["args"], n_embed=args["n_embed"],
                       hidden=args["renderer"]["args"]["net"]["args"]["hidden_channels"])
    parts = ("encoder.", "quantizer.", "decoder.", "renderer.")
    weights = {k: v for k, v in model["sd"].items() if k.startswith(parts)}
    ours = loaded(lambda: FieldAutoencoder(cfg), field_rename(weights))
    size = config["output_size"]
    tiled = ours.field(i["z"], config["patch_size"], paper=True)
    assert tiled.halo == config["patch_padding"]
    agree(o, tiled=tiled.draw(size), tiled_nopad=replace(tiled, halo=0).draw(size),
          whole=ours.field(i["z"], size, paper=True).draw(size))


@pytest.mark.parametrize("paper", [False, True])
def test_drawing_goes_through_clif_and_query(paper, monkeypatch):
    """A breakpoint in `CLIF.forward` or `query` is met by every tile, and colours come from it."""
    calls = []
    forward = CLIF.forward

    def spied_forward(self, *args):
        calls.append("forward")
        return 0.5 * forward(self, *args)

    def spied_query(*args):
        calls.append("query")
        return query(*args)
    field = Field(field_clif(), field_phi(b=2), 16, paper)
    plain = list(field.tiles((20, 40)))
    monkeypatch.setattr(CLIF, "forward", spied_forward)
    monkeypatch.setattr(clif, "query", spied_query)
    for (_, _, once), (_, _, rgb) in zip(plain, field.tiles((20, 40)), strict=True):
        assert torch.equal(rgb, 0.5 * once)
    assert calls == ["forward", "query"] * len(plain) and not rgb.requires_grad
    assert [(y, x) for y, x, _ in plain] == list(itertools.product((0, 16), (0, 16, 32)))


@pytest.mark.parametrize("res, spread, tiles", [
    ((61, 37), 1.0, (16, 33, 256)), ((40, 70), 2e-3, (16, 33)), ((7, 100), 1.0, (7, 33)),
    ((20, 9), 2e-3, (7, 16))])
def test_tiles_equal_the_whole(res, spread, tiles):
    """Also where phi hardly varies, which the norms enlarge; every tile has one shape."""
    spy = field_spy(field_clif())
    field = Field(spy, 3 + spread * field_phi(b=2))
    whole = spy(field.phi, *field_grid(field.phi, *res), field.norm)
    for tile in tiles:
        spy.drawn.clear()
        drawn = replace(field, tile=tile).draw(res)
        torch.testing.assert_close(drawn, whole, rtol=0, atol=1e-5 / min(1, 10 * spread))
        shape, = set(spy.drawn)
        assert all(side <= min(tile + 12, size) for side, size in zip(shape, res))


def test_tiles_draw_little_more_than_the_picture():
    """A tile moved back inside the frame is drawn twice in part; even tiles keep that low."""
    spy = field_spy(LIIF(LIIFConfig(1, 1, 1, ensemble=False)))
    field = replace(Field(spy, torch.zeros(1, 1, 2, 2)), halo=6)
    for res, limit in (((256, 256), 1), ((300, 300), 1.32), ((640, 640), 1.3), ((257, 257), 1.8),
                       ((96, 700), 1.15)):
        spy.drawn.clear()
        for _ in field.tiles(res):
            pass
        assert sum(h * w for h, w in spy.drawn) <= limit * math.prod(res)


@pytest.mark.parametrize("paper", [False, True])
def test_window_equals_slice_and_costs_its_own_pixels(paper):
    """Without paper, whose tiles count from the plane's edge, only what a pixel sees is drawn."""
    spy = field_spy(field_clif())
    field = Field(spy, field_phi(), 32, paper)
    full = field.draw((50, 90))
    for box in ((0, 0, 50, 90), (17, 33, 40, 67), (32, 64, 49, 90), (24, 44, 25, 45)):
        y0, x0, y1, x1 = box
        window = (y0 / 25 - 1, x0 / 45 - 1, y1 / 25 - 1, x1 / 45 - 1)
        spy.drawn.clear()
        field_equal(field.draw((y1 - y0, x1 - x0), window), full[..., y0:y1, x0:x1])
    assert paper or spy.drawn == [(13, 13)]
    typed = [float(f"{v:.6f}") for v in window]                      # as on a command line
    assert (field.draw([1, 1], typed) - full[..., 24:25, 44:45]).abs().max() < 1e-3


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("res, window", [((7, 9), (-0.31, 0.127, 0.333, 0.9)),
                                         ((5, 5), (-1, -1, -0.999, 1)), ((3, 4), (0.2, 0.2, 1, 1))])
def test_any_window_is_where_it_says(res, window, paper):
    """Off the pixel lattice: a field that shows its coordinates gives the window's own grid."""
    class Echo(nn.Module):
        reach = 3

        def forward(self, phi, coord, cell, norm):
            size = cell[:, :1, None, None].expand(-1, -1, *coord.shape[1:3])
            return torch.cat([coord.movedim(-1, 1), size], dim=1)
    rgb = Field(Echo(), torch.zeros(1, 1, 2, 2), 4, paper).draw(res, window)[0]
    field_equal(rgb[:2].movedim(0, -1), coord_grid(res, window))
    size = torch.full(res, (window[2] - window[0]) / res[0])
    torch.testing.assert_close(rgb[2], size, rtol=1e-4, atol=0)


@slow
def test_memory_does_not_grow_with_resolution():
    """Of 512 rows 8192 px wide, coordinates take 32 MiB and colours 48: neither exists."""
    pytest.importorskip("resource", reason="peak memory is read with a Unix module")
    script = """
        import resource, sys
        import torch
        from clif import CLIF, CLIFConfig, Field
        unit = 2**20 if sys.platform == "darwin" else 2**10
        model, phi = CLIF(CLIFConfig(8, 8, 1, 8)), torch.randn(1, 8, 16, 16)
        for paper, res in ((False, (256, 1024)), (False, (512, 8192)), (True, (512, 8192))):
            for tile in Field(model, phi, 128, paper).tiles(res):
                pass
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit)
    """
    peaks = subprocess.check_output([sys.executable, "-c", textwrap.dedent(script)], text=True,
                                    cwd=Path(clif.__file__).parent).split()       # MiB
    assert int(peaks[-1]) - int(peaks[0]) < 20


# ---- encoder, decoder ----

def test_golden_encoder_and_decoder():
    config, weights, i, o = reference("infd/encoder_vq.pt")
    cfg = field_config(config["official"]["args"])
    encoder = loaded(lambda: Encoder(cfg), field_rename(weights, "encoder."))
    agree(o, z=encoder(i["image"]), z_lowvar=encoder(i["image_lowvar"]))

    config, weights, i, o = reference("infd/decoder.pt")
    cfg = field_config(config["official"]["args"])
    decoder = loaded(lambda: Decoder(cfg), field_rename(weights, "decoder."))
    lowvar = decoder(i["z_lowvar"])[:, :, ::4, ::4]
    agree(o, z_dec=decoder(i["z"]), z_dec_lowvar_every4th=lowvar)


def test_golden_encoder_kl():
    config, weights, i, o = reference("infd/encoder_kl.pt")
    image = i["image"]
    model = FieldAutoencoder(field_config(config["official"]["args"], hidden=32))
    model.encoder.load_state_dict(field_rename(weights, "encoder."))
    moments = model.encoder(image)
    mean, logvar = split_moments(moments)
    _, reg = model(image, *field_grid(image, *image.shape[-2:]), i["noise"])
    agree(o, moments=moments, moments_lowvar=model.encoder(i["image_lowvar"]), mean=mean,
          logvar=logvar, sample=model.encode(image, i["noise"]), mode=model.encode(image),
          kl_per_sample=kl_loss(mean, logvar), kl_loss=reg)
    mean, logvar = split_moments(i["params_extreme"])
    assert torch.equal(logvar, o["extreme_logvar"])
    agree(o, extreme_kl_per_sample=kl_loss(mean, logvar))


@pytest.mark.parametrize("part, make, cfg", [("encoder", Encoder, AutoencoderConfig()),
                                             ("decoder", Decoder, AutoencoderConfig()),
                                             ("renderer", CLIF, CLIFConfig()),
                                             ("disc", PatchDiscriminator, DiscriminatorConfig())])
def test_golden_full_width(part, make, cfg):
    """The published sizes, with every weight a function of its published name."""
    config, _, i, o = reference("infd/full_arch_probe.pt")
    keys = golden("infd/state_dict_keys_full.json")
    weights = field_rename(formula(meta(keys, part + "."), config["seed"]), part + ".")
    assert count(make, cfg) == config[part]["n_params"]
    model = loaded(lambda: make(cfg), weights)
    if part == "encoder":
        agree(o, z=model(i["image"]))
    elif part == "decoder":
        phi = model(i["z_in"])
        agree(o, z_dec_sub=phi[:, ::8, ::2, ::2])
        assert abs(phi.double().norm() / o["z_dec_stats"]["l2"] - 1) < 1e-5
    elif part == "renderer":
        agree(o, render=model(i["z_dec"], i["coord"], i["cell"][:, 0, 0]))
    else:
        agree(o, disc_eval_logits=model(i["disc_x"]))


def test_golden_keys_of_stage1():
    """Every key of a published checkpoint has its place, and every parameter of ours its key."""
    keys = golden("infd/state_dict_keys_full.json")
    theirs = {k: shape for k, (shape, _) in keys.items() if not k.startswith(("z_dm", "perc_loss."))}
    with torch.device("meta"):
        ours = FieldAutoencoder(AutoencoderConfig()).state_dict()
        disc = PatchDiscriminator(DiscriminatorConfig())
        disc = nn.SyncBatchNorm.convert_sync_batchnorm(disc)         # as for several GPUs
    ours |= {"disc." + k: v for k, v in disc.state_dict().items()}
    assert field_rename(theirs) == {k: list(v.shape) for k, v in ours.items()}


def test_parameter_counts():
    assert count(Encoder, AutoencoderConfig(kl=True)) == 22_351_280
    assert count(LIIF, LIIFConfig()) == 494_339


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attention_runs_in_a_fused_kernel(device):
    """And gives what the plain formula gives; where no fused kernel fits, sdpa_kernel raises."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA")
    torch.manual_seed(0)
    model = Attention(64, 8).to(device).requires_grad_(False)
    x = torch.randn(2, 64, 16, 20, device=device)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                      SDPBackend.CUDNN_ATTENTION]):
        got = model(x)
    with sdpa_kernel(SDPBackend.MATH):
        want = model(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if device == "cpu" else 1e-3)


def test_golden_vq():
    cfg, weights, i, o = reference("infd/vq.pt")
    model = VectorQuantizer(cfg["n_embed"], cfg["embed_dim"], cfg["beta"])
    std = model.embedding.weight.std().item()
    assert std == pytest.approx(1 / cfg["n_embed"] / math.sqrt(3), rel=0.15)      # uniform
    model.load_state_dict(weights)
    z = i["z"].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(z)[2], o["indices"])                # half precision: same codes
    z_q, loss, indices = model(z)
    assert torch.equal(indices, o["indices"])
    agree(o, z_q=z_q, loss=loss)
    (3 * loss + (z_q * i["upstream"]).sum()).backward()
    agree(o, 1e-3, grad_z=z.grad, grad_embedding=model.embedding.weight.grad)


def test_vq_tells_codes_apart_that_are_near():
    """In half precision and with TF32 too: no product of matrices, and one graph if compiled."""
    model = VectorQuantizer(64, 3)
    codes = model.embedding.weight.data.normal_()
    codes[32:] = codes[:32] + 1e-2
    z = codes.T.reshape(1, 3, 8, 8) + 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert model.nearest(z).tolist() == list(range(64))
    assert not torch._dynamo.explain(model)(z).graph_break_count


# ---- the whole autoencoder ----

FIELD_TINY = AutoencoderConfig(ch=32, ch_mult=[1, 2], num_res_blocks=1, n_embed=16, hidden=32,
                               num_blocks=1)


@pytest.mark.parametrize("change", [dict(), dict(kl=True), dict(lowres=True),
                                    dict(renderer="liif", ch_mult=(1,))])
def test_autoencoder_shapes_and_gradients(change):
    cfg = replace(FIELD_TINY, **change)
    model = FieldAutoencoder(cfg)
    image = randn(2, 3, 16, 24)
    z = model.encode(image)
    assert z.shape == (2, 3, 16 // cfg.f, 24 // cfg.f)
    code = model.quantize(z)
    assert torch.equal(code, z) == (cfg.kl or cfg.lowres)
    phi = model.decode(z)
    assert phi.shape == (2, 32, 16, 24) and torch.equal(phi, model.decoder(code))
    coord = coord_grid((5, 7), (-0.5, -0.5, 0, 0.25)).expand(2, 5, 7, 2)
    cell = torch.tensor([[0.1, 0.75 / 7]] * 2)
    rgb, reg = model(image, coord, cell)
    torch.testing.assert_close(rgb, model.renderer(phi, coord, cell))
    (rgb.square().mean() + reg).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    field = model.field(z, tile=8)
    picture = field.draw((9, 4))
    assert picture.shape == (2, 3, 9, 4) and not picture.requires_grad
    assert torch.equal(field.phi, phi) and field.tile == 8 and not field.paper


def test_autoencoder_names_bad_input():
    with pytest.raises(ValueError, match="15x16.*multiples of 2"):
        FieldAutoencoder(FIELD_TINY).encode(torch.zeros(1, 3, 15, 16))
    for change, text in ((dict(renderer="mlp"), "renderer 'mlp'"),
                         (dict(lowres=True, kl=True), "lowres"),
                         (dict(hidden=33), "hidden give .*33. channels.*groups=32")):
        with pytest.raises(ValueError, match=text):
            replace(FIELD_TINY, **change)


def test_golden_disc():
    config, weights, i, o = reference("infd/disc.pt")
    model = PatchDiscriminator(DiscriminatorConfig(config["ndf"], config["n_layers"]))
    model.load_state_dict(weights)
    agree(o, eval_logits_real=model.eval()(i["real"]))
    agree(o, train_logits_real=model.train()(i["real"]), train_logits_fake=model(i["fake"]))
    state = model.state_dict()
    for key, want in o["bn_after"].items():
        torch.testing.assert_close(state[key], want, rtol=1e-4, atol=1e-6)
    agree(o, eval_logits_nonsquare_after_bn=model.eval()(i["nonsquare"]))


def test_new_discriminator():
    model = PatchDiscriminator(DiscriminatorConfig(ndf=16))
    convs = [layer for layer in model.main if isinstance(layer, nn.Conv2d)]
    weights = torch.cat([conv.weight.flatten() for conv in convs])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    scales = torch.cat([m.weight for m in model.main if isinstance(m, nn.BatchNorm2d)])
    assert (scales.mean().item(), scales.std().item()) == pytest.approx((1.0, 0.02), abs=0.006)
    assert model(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_golden_losses():
    config, _, i, o = reference("infd/losses.pt")
    agree(o, hinge_d_loss=hinge_loss(i["logits_real"], i["logits_fake"]))
    for want in o["adaptive"].values():
        W = i["W"].clone().requires_grad_()
        pred = F.conv2d(i["h"], W, padding=1)
        nll = want["nll_scale"] * (pred - i["target"]).abs().mean()
        g_loss = -want["g_scale"] * F.conv2d(pred, i["K"], stride=2, padding=1).mean()
        weight = adaptive_weight(nll, g_loss, W)
        assert not weight.requires_grad
        agree(want, 1e-3, adaptive_weight=weight,
              total_gan_weight=config["gan_g_loss_weight"] * weight)
        shared = adaptive_weight(nll, g_loss, W, lambda grads: [2 * grads[0], grads[1]])
        torch.testing.assert_close(shared, (2 * weight).clamp(max=1e4))
        (nll + weight * g_loss).backward()                           # the graphs are still there
        assert W.grad.isfinite().all()


def test_first_order_keeps_the_gradients_before_x():
    """The graph of the loss is used once, however often gradients are asked for afterwards."""
    W = randn(5, 5).requires_grad_()

    def loss(x):
        return (x.sin() ** 3).sum()
    want, = torch.autograd.grad(loss(W @ W), W)
    x = W @ W
    kept = first_order(loss(x), x)
    for _ in range(2):
        got, = torch.autograd.grad(kept, W, retain_graph=True)
        torch.testing.assert_close(got, want)
    assert adaptive_weight(kept, 2 * kept, W) == pytest.approx(0.5, rel=1e-3)


# ==================================================================================================
# The UNet and latent diffusion: ldm.py
# ==================================================================================================

LDM_TINY = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_ds=(2,),
                      num_head_channels=16)


def ldm_unet_config(args):
    """Official UNet arguments of any family -> our config."""
    same = ("in_channels", "out_channels", "model_channels", "num_res_blocks", "num_heads",
            "context_dim", "transformer_depth")
    levels = {2**i for i in range(len(args["channel_mult"]))}
    return UNetConfig(
        **{name: args[name] for name in same if args.get(name)},
        channel_mult=tuple(args["channel_mult"]),
        attention_ds=tuple(sorted(levels & {*args["attention_resolutions"]})),
        num_head_channels=max(args.get("num_head_channels") or 0, 0),
        scale_shift_norm=args.get("use_scale_shift_norm", False),
        resblock_updown=args.get("resblock_updown", False),
        num_classes=args.get("num_classes") or 0)


def ldm_diffusion_config(args, steps=1000):
    """Official diffusion arguments -> our config."""
    return DiffusionConfig(steps, args["linear_beta_start"], args["linear_beta_end"])


def ldm_last(walk):
    """What a sampler ends with."""
    *_, (x_t, _) = walk
    return x_t


def ldm_infd_unet(args, state, prefix=""):
    """Our UNet with the weights of a published INFD state dict."""
    cfg = ldm_unet_config(args)
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return loaded(lambda: UNet(cfg), adm_weights(own, cfg.num_head_channels))


# ---- UNet ----

LDM_CM = UNetConfig(model_channels=256, num_head_channels=64, attention_ds=(2, 4, 8),
                    resblock_updown=True)                            # CM-UNet at 64 px


@pytest.mark.parametrize("cfg, parameters", [
    (UNetConfig(), 274_056_163), (OPENAI[64], 295_899_267), (OPENAI[256], 526_304_771),
    (LDM_CM, 387_236_611), (replace(LDM_CM, resblock_updown=False), 357_918_979),
    (replace(LDM_CM, scale_shift_norm=True), 406_391_811),
    (replace(LDM_CM, attention_ds=(1, 2, 4), num_classes=10), 367_552_771 + 10 * 4 * 256),
    (replace(LDM_CM, attention_ds=(4, 8, 16)), 381_978_371),
    (replace(LDM_CM, attention_ds=(4, 8, 16), channel_mult=(1, 1, 2, 3, 4)), 399_506_691)])
def test_ldm_parameter_counts_equal_the_published_models(cfg, parameters):
    assert count(UNet, cfg) == parameters


@pytest.mark.parametrize("cfg, number", [(UNetConfig(model_channels=32), 78),
                                         (replace(LDM_TINY, context_dim=24), 26)])
def test_ldm_zero_init_covers_exactly_the_residual_ends(cfg, number):
    state = UNet(cfg).state_dict()                       # the first: INFD's tensors, narrower
    ends = [k for k in state if re.search(r"out_layers\.3\.|\.proj_out\.|^out\.2\.", k)]
    assert len(ends) == number and not any(state[k].any() for k in ends)
    assert all(v.any() for k, v in state.items() if k.endswith("weight") and k not in ends)


def test_ldm_unet_does_not_mix_samples_and_takes_any_memory_format():
    model = loaded(lambda: UNet(replace(LDM_TINY, resblock_updown=True, scale_shift_norm=True)))
    x = randn(3, 3, 8, 20)
    t = torch.tensor([0.0, 12.5, 999.0])
    together = model(x, t)
    alone = torch.cat([model(x[i:i + 1], t[i:i + 1]) for i in range(3)])
    last = torch.channels_last
    reordered = model.to(memory_format=last)(x.contiguous(memory_format=last), t)
    assert together.std() > 0.1
    field_equal(together, alone)
    field_equal(together, reordered)


def test_ldm_timestep_embedding_closed_form():
    t = torch.tensor([0, 3, 999])
    emb = timestep_embedding(t, 9)                       # frequencies 1, 1/10, 1/100, 1/1000
    angle = t[:, None].double() / torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    expected = torch.cat([angle.cos(), angle.sin()], dim=1)
    assert torch.allclose(emb[:, :8].double(), expected, atol=1e-4)
    assert not emb[:, 8].any()
    assert torch.equal(emb, timestep_embedding(t.float(), 9))


@pytest.mark.parametrize("heads, dim", [(1, 4), (3, 2)])
def test_ldm_qkv_from_legacy_moves_every_row_to_its_place(heads, dim):
    rows = itertools.product(range(heads), range(3), range(dim))
    name = torch.tensor(list(rows))                      # (head, part, i) of each row
    expected = [[head, part, i] for part, head, i in
                itertools.product(range(3), range(heads), range(dim))]
    assert qkv_from_legacy(name, heads).tolist() == expected


def test_ldm_unet_refuses_what_does_not_fit():
    for options, word in [
            ({"model_channels": 48}, "multiple of groups=32"),
            ({"channel_mult": (1, 0)}, "channel_mult 0"),
            ({"num_head_channels": 48}, "must divide 448"),
            ({"num_head_channels": 0, "num_heads": 5}, "must divide 448")]:
        with pytest.raises(ValueError, match=word), torch.device("meta"):
            UNet(UNetConfig(**options))

    plain = UNet(LDM_TINY)
    classes = UNet(replace(LDM_TINY, num_classes=5))
    x = torch.zeros(2, 3, 8, 8)
    t = torch.tensor([1, 2])
    for model, args, word in [
            (plain, (x, t, t), "give y if there are classes; this UNet has 0"),
            (classes, (x, t), "this UNet has 5"),
            (plain, (x[:, :, :7], t), "7x8; both sides must be multiples of 2"),
            (plain, (x[..., :5], t), "multiples of 2")]:
        with pytest.raises(ValueError, match=word):
            model(*args)


# ---- diffusion ----

LDM_DIFFUSION = GaussianDiffusion(DiffusionConfig())


def test_ldm_loss_is_the_mean_square_of_each_sample_and_passes_the_class_on():
    t = torch.tensor([0, 500, 999])
    y = torch.tensor([4, 5, 6])

    def model(x_t, *told):
        assert told[0] is t and told[1] is y
        return torch.tensor([2.0, 1.0, -1.0]).view(3, 1, 1, 1).expand_as(x_t)

    x_0 = torch.zeros(3, 2, 4, 4)
    loss = LDM_DIFFUSION.loss(model, x_0, t, torch.full_like(x_0, 2.0), y)
    assert torch.equal(loss, torch.tensor([0.0, 1.0, 9.0]))


@pytest.mark.parametrize("steps, eta", [*itertools.product([5, 200], [0.0, 0.3, 1.0])])
def test_ldm_ddim_keeps_the_variance_of_every_timestep(steps, eta):
    # If all data are 0, x_t is N(0, 1 - alpha_bar_t) and eps = x_t / sqrt(1 - alpha_bar_t). A step
    # is then linear in x_t and in the noise, and must end on 1 - alpha_bar at the timestep it goes
    # to, whatever eta and the stride.
    one = torch.ones(1, dtype=torch.float64)
    variances = 1 - LDM_DIFFUSION.alpha_bar
    times = LDM_DIFFUSION.ddim_timesteps(steps)
    for t, t_prev in zip(times[1:], times):
        variance = variances[t].item()
        eps = one / math.sqrt(variance)
        gain, _ = LDM_DIFFUSION.ddim_step(one, eps, t, t_prev, eta, 0 * one)
        made = gain.item() ** 2 * variance + LDM_DIFFUSION.ddim_sigma(t, t_prev, eta) ** 2
        assert abs(made - variances[t_prev].item()) < 1e-12


def ldm_recording(calls):
    """A model with a gradient, and what it was called with."""
    weight = torch.ones((), requires_grad=True)

    def model(x_t, t, y):
        calls.append((t.tolist(), y))
        return (weight * x_t).tanh()

    return model


def test_ldm_loops_yield_every_step_and_ask_for_noise_only_where_it_is_added():
    x_T = torch.ones(2, 1, 2, 2)
    asked = []

    def noise(i):
        asked.append(i)
        return x_T

    visited = [800, 600, 400, 200, 0]
    ends = []
    for loop, times, options in [
            (LDM_DIFFUSION.ddim_loop, visited, dict(eta=0.0)),
            (LDM_DIFFUSION.ddim_loop, visited, dict(eta=1.0, noise=noise)),
            (LDM_DIFFUSION.dpm_loop, LDM_DIFFUSION.solver_timesteps(5)[::-1], {}),
            (LDM_DIFFUSION.dpm_loop, LDM_DIFFUSION.solver_timesteps(5)[::-1],
             dict(eta=0.5, noise=noise))]:
        calls = []
        taken = 0
        for x_t, x_0 in loop(ldm_recording(calls), x_T, 5, y="label", **options):
            taken += 1
            assert not x_t.requires_grad and torch.is_grad_enabled()
        assert taken == 5 and torch.equal(x_t, x_0)      # the last step lands on the prediction
        assert calls == [([t, t], "label") for t in times]       # one call per step
        ends.append(x_t)
    assert asked == 2 * list(range(4))                   # sigma is 0 in the last step
    assert not torch.allclose(ends[0], ends[1]) and not torch.allclose(ends[2], ends[3])
    assert torch.equal(x_T, torch.ones(2, 1, 2, 2))
    for loop in (LDM_DIFFUSION.ddim_loop, LDM_DIFFUSION.dpm_loop):
        with pytest.raises(ValueError, match="eta is 1.5"):
            next(loop(None, x_T, 5, 1.5, noise))


def test_ldm_ddim_timesteps_follow_the_stride_rule():
    assert LDM_DIFFUSION.ddim_timesteps(200) == list(range(0, 1000, 5))
    for steps in (2, 10, 334, 500, 1000):
        times = LDM_DIFFUSION.ddim_timesteps(steps)
        assert times[0] == 0 and len(times) == steps
        assert len({b - a for a, b in zip(times, times[1:])}) == 1
    for steps, near in [(150, "use 143 or 167"), (1, "use 2"), (0, "use 2"), (1001, "or 1000")]:
        with pytest.raises(ValueError, match=near):
            LDM_DIFFUSION.ddim_timesteps(steps)


def ldm_gaussian_flow(diffusion, mean, std):
    """(eps, exact) for data N(mean, std^2): the true noise prediction, and the flow from t to s."""
    def moments(t):
        alpha, sigma = diffusion._alpha_sigma(t)
        return alpha * mean, math.sqrt((alpha * std) ** 2 + sigma**2), sigma

    def eps(x_t, t, y):
        m, s, sigma = moments(t[0].item())
        return sigma / s**2 * (x_t - m)

    def exact(x_t, t, s):
        m_t, s_t, _ = moments(t)
        m_s, s_s, _ = moments(s)
        return m_s + s_s / s_t * (x_t - m_t)

    return eps, exact


@pytest.mark.parametrize("sampler, order", [("ddim_loop", 1), ("dpm_loop", 2)])
def test_ldm_samplers_converge_to_the_flow_of_a_gaussian_at_their_order(sampler, order):
    # Short betas, so that timesteps in whole numbers are as good as a continuous time. The state at
    # timestep 0, before the first-order step to clean data, is compared; the error must fall as
    # steps^-order.
    diffusion = GaussianDiffusion(DiffusionConfig(steps=20_000))
    eps, exact = ldm_gaussian_flow(diffusion, mean=0.3, std=0.5)
    x_T = torch.tensor([[[[-1.3, 0.2, 2.0]]]], dtype=torch.float64)
    options = {"eta": 0.0} if sampler == "ddim_loop" else {}
    errors = []
    for steps in (50, 100, 200):
        first = diffusion.ddim_timesteps(steps)[-1] if options else diffusion.cfg.steps - 1
        states = [x for x, _ in getattr(diffusion, sampler)(eps, x_T, steps, **options)]
        errors.append((states[-2] - exact(x_T, first, 0)).abs().max().item())
        assert torch.allclose(states[-1], exact(x_T, first, -1), atol=errors[-1] + 2e-4)
    for coarse, fine in zip(errors, errors[1:]):
        assert 0.8 * 2**order < coarse / fine < 1.3 * 2**order, errors


def test_ldm_a_step_of_the_flow_is_ddim_without_noise_or_with_all_of_it():
    x_t, eps, noise = randn(3, 1, 3, 2, 2, dtype=torch.float64)
    for t, t_prev in [(999, 700), (3, 0), (0, -1)]:
        x, x_0 = LDM_DIFFUSION.ddim_step(x_t, eps, t, t_prev, eta=0.0)
        assert torch.allclose(x, LDM_DIFFUSION.flow_step(x_t, x_0, t, t_prev), atol=1e-12)
        x, _ = LDM_DIFFUSION.ddim_step(x_t, eps, t, t_prev, eta=1.0, noise=noise)
        fresh = LDM_DIFFUSION.flow_step(x_t, x_0, t, t_prev, noise, eta=1.0)
        assert torch.allclose(x, fresh, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ldm_walks_of_any_eta_end_in_the_distribution_of_the_data(eta):
    """A Gaussian, from all of its noise or from part of it; deviations of 20,000 values."""
    eps, _ = ldm_gaussian_flow(LDM_DIFFUSION, mean=0.3, std=0.5)
    generator = torch.Generator().manual_seed(0)

    def noise(i):
        return torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64)

    for first in (None, LDM_DIFFUSION.timestep_of(2.0)):
        alpha, sigma = LDM_DIFFUSION._alpha_sigma(999 if first is None else first)
        x_T = alpha * (0.3 + 0.5 * noise(-1)) + sigma * noise(-1)
        *_, (x, _) = LDM_DIFFUSION.dpm_loop(eps, x_T, 30, eta, noise, first=first)
        assert abs(x.mean() - 0.3) < 0.015 and abs(x.std() - 0.5) < 0.015


def test_ldm_solver_timesteps_are_distinct_and_even_in_the_log_of_the_noise():
    for steps in (1, 2, 24, 777, 999, 1000):
        times = LDM_DIFFUSION.solver_timesteps(steps)
        assert len(times) == steps == len(set(times)) and times == sorted(times)
        assert times[-1] == 999 and (steps == 1 or times[0] == 0)
    gaps = -LDM_DIFFUSION.log_rho[LDM_DIFFUSION.solver_timesteps(10)].diff()
    assert gaps.max() - gaps.min() < 0.35                # the step from 1 to 0 is 0.35: rounding
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="1 to 1000"):
            LDM_DIFFUSION.solver_timesteps(steps)


def test_ldm_walks_start_where_they_are_told():
    ratio = torch.exp(-LDM_DIFFUSION.log_rho)                    # 0.04 to 197
    first = LDM_DIFFUSION.timestep_of(10.0)
    assert ratio[first] <= 10 < ratio[first + 1] and LDM_DIFFUSION.timestep_of(198.0) == 999
    for steps, visited in ((5, [800, 600, 400, 200, 0]), (200, list(range(0, 1000, 5))[::-1])):
        calls = []
        list(LDM_DIFFUSION.ddim_loop(ldm_recording(calls), torch.ones(1, 1, 2, 2), steps, eta=0.0,
                                     first=first))
        assert [t for (t,), _ in calls] == [first, *(t for t in visited if t < first)]
    times = LDM_DIFFUSION.solver_timesteps(20, first)
    assert len(set(times)) == 20 and (times[0], times[-1]) == (0, first)
    with pytest.raises(ValueError, match=f"1 to {first + 1}"):
        LDM_DIFFUSION.solver_timesteps(1000, first)


def test_ldm_what_settles_has_the_moments_of_a_true_x_t():
    """Of Gaussian data, whose x_0 is predicted exactly: noise alone lacks the mean and some of the
    variance, a settled x_t has all but the square (here 1 %) of what x_0's prior keeps back."""
    mean, std, t = 0.8, 0.35, 300
    eps, _ = ldm_gaussian_flow(LDM_DIFFUSION, mean, std)
    alpha, sigma = LDM_DIFFUSION._alpha_sigma(t)
    noise = randn(1, 1, 100, 100, dtype=torch.float64)
    noises = [noise.roll(i, 2) for i in range(3)]                # as good as independent
    x_t = LDM_DIFFUSION.settle(eps, noises, t)
    kept = 1 / (1 + (sigma / alpha / std) ** 2)                  # weight of x_t in the answer
    lacks = alpha * mean * kept**2
    assert (x_t - sigma * noises[2]).mean().item() == pytest.approx(alpha * mean - lacks, abs=0.01)
    assert torch.equal(LDM_DIFFUSION.settle(eps, noises[:1], t), sigma * noises[0])


def test_ldm_betas_grow_as_the_number_of_steps_shrinks():
    betas = GaussianDiffusion(DiffusionConfig(steps=250)).betas
    expected = 4 * torch.linspace(0.0015, 0.0195, 250, dtype=torch.float64)
    assert torch.allclose(betas, expected, rtol=1e-12)
    for options in ({"steps": 1}, {"steps": 19}, {"beta_start": 0.0}, {"beta_end": 0.001}):
        with pytest.raises(ValueError, match=r"above 0, rising, and below steps / 1000"):
            DiffusionConfig(**options)
    with pytest.raises(ValueError, match="ddim_start is 2"):
        DiffusionConfig(ddim_start=2)


# ---- golden: INFD ----

def test_ldm_golden_infd_unet():
    config, weights, i, out = reference("infd/unet.pt")
    model = ldm_infd_unet(config["official"]["args"], weights)
    emb = timestep_embedding(i["timesteps"], model.cfg.model_channels)
    agree(out, eps=model(i["x"], i["timesteps"]), eps_lowvar=model(i["x_lowvar"], i["timesteps"]),
          timestep_embedding=emb, time_embed_out=model.time_embed(emb),
          odd_dim_embedding=timestep_embedding(i["odd_dim_timesteps"], i["odd_dim"]))


def test_ldm_golden_infd_full_unet():
    """The published keys and shapes, and the output, by weights that follow from the keys."""
    config, _, i, out = reference("infd/full_arch_probe.pt")
    theirs = meta(golden("infd/state_dict_keys_full.json"), "z_dm.")
    cfg = UNetConfig()
    model = loaded(lambda: UNet(cfg), adm_weights(formula(theirs, config["seed"]), 32))
    assert len(theirs) == 368 and list(theirs) == list(model.state_dict())
    assert count(UNet, cfg) == config["unet"]["n_params"]
    agree(out, unet_eps=model(i["unet_x"], i["unet_t"]))


def ldm_compare_schedule(diffusion, table, name):
    """Every number of a stored schedule. Not used by us: fixed-large variances, ancestral steps."""
    times = diffusion.ddim_timesteps(len(table["betas"]))
    assert times == table.get("timestep_map", torch.arange(len(times))).tolist()
    alpha_bar = diffusion.alpha_bar[times]
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    pairs = list(zip(times, [-1] + times[:-1]))
    sigma = torch.tensor([diffusion.ddim_sigma(t, t_prev, 1.0) for t, t_prev in pairs],
                         dtype=torch.float64)
    for ours, field in [(alpha_bar, "alphas_cumprod"), (previous, "alphas_cumprod_prev"),
                        (1 - alpha_bar / previous, "betas"), (sigma**2, "posterior_variance")]:
        assert torch.allclose(ours, table[field], rtol=1e-9, atol=1e-12), (name, field)

    t = torch.tensor(times)                              # the two factors of q_sample
    one = torch.ones(len(t), 1, 1, 1)
    signal = diffusion.q_sample(one, t, 0 * one).flatten()
    noise = diffusion.q_sample(0 * one, t, one).flatten()
    assert torch.allclose(signal, table["sqrt_alphas_cumprod"].float(), rtol=1e-6)
    assert torch.allclose(noise, table["sqrt_one_minus_alphas_cumprod"].float(), rtol=1e-6)

    # DDIM with eta 1 has the mean of the ancestral posterior, coef1 x_0 + coef2 x_t: feed unit
    # vectors of (x_0, x_t).
    x_t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x_0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    means = []
    for t, t_prev in pairs:
        a = diffusion.alpha_bar[t].item()
        eps = (x_t - a**0.5 * x_0) / (1 - a) ** 0.5
        means.append(diffusion.ddim_step(x_t, eps, t, t_prev, 1.0, torch.zeros(2))[0])
    coefs = torch.stack([table["posterior_mean_coef1"], table["posterior_mean_coef2"]], dim=1)
    assert torch.allclose(torch.stack(means), coefs, rtol=1e-9, atol=1e-9), name


def test_ldm_golden_infd_schedules():
    config, _, _, out = reference("infd/diffusion.pt")
    steps = len(out["schedule1000"]["betas"])
    assert ldm_diffusion_config(config["official_z_dp"], steps) == DiffusionConfig()
    other = ldm_diffusion_config(config["alt"], len(out["schedule_alt"]["betas"]))
    for name, table in out.items():
        if name.startswith("schedule"):
            cfg = other if name == "schedule_alt" else DiffusionConfig()
            ldm_compare_schedule(GaussianDiffusion(cfg), table, name)

    # LDM's is another: the same ends, but linear in the root, and its timesteps start at 1.
    ldm = GaussianDiffusion(DiffusionConfig(sqrt_beta=True, ddim_start=1))
    assert torch.allclose(out["contrast_ldm_betas"], ldm.betas)
    assert out["contrast_ldm_alphas_cumprod"][-1] > 5 * LDM_DIFFUSION.alpha_bar[-1]
    assert out["contrast_ldm_ddim200_timesteps"].tolist() == ldm.ddim_timesteps(200)


def test_ldm_golden_infd_diffusion():
    config, _, i, out = reference("infd/diffusion.pt")
    eps = i["eps_pred"]
    agree(out, x_t=LDM_DIFFUSION.q_sample(i["x0"], i["t"], i["noise"]))
    loss = LDM_DIFFUSION.loss(lambda *_: eps, i["x0"], i["t"], i["noise"])
    agree(out, mse_per_sample=loss, loss_per_sample=loss, loss_mean=loss.mean())

    def step(n, t, t_prev, **options):
        return LDM_DIFFUSION.ddim_step(out["x_t"][n], eps[n], t, t_prev, **options)

    for n, t in enumerate(i["t"].tolist()):
        still = torch.zeros_like(eps[n])
        mean, predicted = step(n, t, t - 1, noise=still)
        close(mean, out["p_mean"][n])
        close(predicted, out["pred_xstart"][n])

    times = [-1, *LDM_DIFFUSION.ddim_timesteps(int(config["ddim_respacing"].removeprefix("ddim")))]
    for n, index in enumerate(i["t_ddim200_index"].tolist()):
        t_prev, t = times[index:index + 2]
        assert t == out["ddim_model_timesteps"][n]
        assert abs(LDM_DIFFUSION.ddim_sigma(t, t_prev, 1.0) - out["ddim_sigma_eta1"][n]) < 1e-5
        for name, stored in out["ddim"].items():
            eta = float(name.removeprefix("eta"))
            x, predicted = step(n, t, t_prev, eta=eta, noise=i["step_noise"][n])
            close(x, stored["sample"][n], name=name)
            close(predicted, stored["pred_xstart"][n], name=name)


def test_ldm_golden_infd_ddim_trajectory():
    config, weights, i, out = reference("infd/ddim_traj.pt")
    noises = i["noises"]
    model = ldm_infd_unet(config["official"]["args"], weights)
    diffusion = GaussianDiffusion(ldm_diffusion_config(config["z_dp"]))
    for eta in (0.0, 1.0):
        stored = out[f"eta{eta}"]
        fed = []

        def recorded(x, t, y):
            fed.append(t)
            return model(x, t, y)

        walk = list(diffusion.ddim_loop(recorded, i["x_T"], len(noises), eta, noises.__getitem__))
        for n, (drawn, predicted) in enumerate(walk):
            close(drawn, stored["samples"][n])
            close(predicted, stored["pred_xstarts"][n])
        close(drawn, stored["final"])
        assert torch.equal(torch.stack(fed), stored["model_timesteps"])


# ---- golden: consistency models ----

@pytest.mark.parametrize("name", ["unet_plain", "unet_ssn_cond_updown", "unet_updown",
                                  "unet_heads_ssn"])
def test_ldm_golden_cm_unet(name):
    config, weights, i, out = reference(f"cm/{name}.pt")
    cfg = ldm_unet_config(config)
    model = loaded(lambda: UNet(cfg), weights)           # names, shapes and qkv order as stored
    first = next(k for k, m in model.named_modules() if isinstance(m, SelfAttention))
    assert first == out.pop("first_attention_name")
    ours = {}

    def keep_middle(module, args, output):
        ours["middle_block"] = output

    def keep_attention(module, args, output):
        ours["first_attention_in"] = args[0]
        ours["first_attention_out"] = output

    model.middle_block.register_forward_hook(keep_middle)
    model.get_submodule(first).register_forward_hook(keep_attention)
    ours["out"] = model(i["x"], i["timesteps"], i.get("y"))
    ours["timestep_embedding"] = timestep_embedding(i["timesteps"], cfg.model_channels)
    ours["time_embed"] = model.time_embed(ours["timestep_embedding"])
    assert set(ours) == set(out)

    # The stored middle_block is off by about 1e-3: fed onwards, it misses the stored `out` by 2e-4
    # and more, where ours meets it within 3e-6. It fits a pass with half-precision attention, so
    # only its structure can be compared.
    close(ours.pop("middle_block"), out["middle_block"], 5e-3)
    for field, value in ours.items():
        cm_close(value, out[field])


# ==================================================================================================
# Consistency models and image functions: consistency.py, inr_generator.py
# ==================================================================================================
# Left out of the golden files, because no part of this project uses it: the fixed teacher EMA and
# the 0 that Karras' own sampler appends to the grid (schedules.pt), the function without positional
# encoding (inr_hyponet.pt), the encoders of Trans-INR and ANR (transinr_full.pt and anr_hypernet.pt
# enter behind them). Of the weightings of karras.pt, snr, snr+1, karras and truncated-snr belong to
# no recipe here: consistency.py leaves them out, and CM_WEIGHTINGS forms them for ct_loss.pt.

CM_TINY = GeneratorConfig(size=16, dim=24, heads=3, mlp_ratio=2.0, encoder_depth=2, decoder_depth=2,
                          groups=4, hidden=16, layers=3, pe_dim=8, pe_sigma=32.0)
CM_VIT = TransformerConfig(size=16, dim=24, depth=3, heads=3, mlp_ratio=2.0)
CM_ECT_MODEL = ConsistencyConfig(sigma_min=0.003, boundary=False)
CM_NETWORK = dict(rtol=1e-4, atol=2e-5)                  # tolerances of golden/cm/README.md
CM_CHAIN = dict(rtol=1e-4, atol=1e-4)
CM_FREQUENCY = dict(rtol=1e-3, atol=1e-3)                # sines of angles near 1000
CM_WEIGHTINGS = {                                        # of sigma and sigma_data
    "uniform": lambda s, sd: torch.ones_like(s),
    "snr": lambda s, sd: s**-2,
    "snr+1": lambda s, sd: s**-2 + 1,
    "karras": lambda s, sd: s**-2 + sd**-2,
    "truncated-snr": lambda s, sd: (s**-2).clamp(min=1)}


def cm_close(ours, theirs, tolerance=CM_NETWORK):
    torch.testing.assert_close(ours, theirs, **tolerance)


def cm_seeded():
    return torch.Generator().manual_seed(0)


CM_X = randn(2, 3, 16, 16)
CM_ZERO = torch.zeros(2)
CM_MOVED = variational_coord(pixel_coord((16, 16)), randn(2, 16, 16, 2))


class CmToy(nn.Module):
    """The toy network of golden/cm/README.md, with a record of what it was called with."""

    def __init__(self, state):
        super().__init__()
        self.W, self.b, self.v = (nn.Parameter(state[name].clone()) for name in ("W", "b", "v"))
        self.calls = []

    def forward(self, x, t, y=None, **extra):
        self.calls.append(dict(x=x, t=t, y=y, **extra))
        shift = self.b + self.v * torch.sin(t / 100)[:, None]
        return torch.tanh(torch.einsum("oc,bchw->bohw", self.W, x) + shift[:, :, None, None])


def cm_toy(seed=0):
    return CmToy({"W": randn(3, 3, seed=seed), "b": randn(3, seed=seed + 1),
                  "v": randn(3, seed=seed + 2)})


def cm_pair():
    """Student and target, and (x, noise, t, r) for their loss."""
    cfg = ConsistencyConfig()
    t, r = Schedule().levels(50, 100, 4, cm_seeded(), cfg)
    batch = (randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=1), t, r)
    return ConsistencyModel(cm_toy(), cfg), ConsistencyModel(cm_toy(5), cfg), batch


class CmTinyLPIPS(nn.Module):
    """LPIPS on the golden files' stand-in for VGG, with max pooling as the lpips package has it."""

    def __init__(self, state, layers):
        super().__init__()
        modules = []
        for conv in sorted({int(key.split(".")[0]) for key in state["tiny_vgg"]}):
            out, inp = state["tiny_vgg"][f"{conv}.weight"].shape[:2]
            modules += [nn.Conv2d(inp, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.net = nn.Sequential(*modules[:-1])
        self.net.load_state_dict(state["tiny_vgg"])
        self.lin = [state["lpips_lin"][key] for key in sorted(state["lpips_lin"], key=int)]
        self.layers = [int(layer) for layer in layers]
        self.requires_grad_(False)

    def features(self, x):
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        x = ((x + 1) / 2 - mean) / std
        for i, module in enumerate(self.net):
            x = module(x)
            if i in self.layers:
                yield x / (x.norm(dim=1, keepdim=True) + 1e-10)

    def forward(self, a, b):
        total = 0
        for fa, fb, lin in zip(self.features(a), self.features(b), self.lin):
            total = total + ((fa - fb) ** 2 * lin).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return total


# ---- schedules ----

def test_cm_schedule_tables():
    paper = Schedule()
    K = 900_000
    points = [0, 9_000, 90_000, 225_000, 450_000, 675_000, 900_000]
    assert [paper.N(k, K) for k in points] == [2, 16, 48, 76, 107, 131, 151]
    assert [round(paper.mu(k, K), 6) for k in points] == [
        0.9025, 0.993184, 0.99782, 0.998633, 0.999033, 0.999211, 0.999316]
    assert Schedule(printed_mu=True).mu(0, K) == pytest.approx(0.95)
    changes = [k for k in range(1, 3100) if paper.N(k, K) > paper.N(k - 1, K)]
    assert changes == [1, 198, 474, 830, 1264, 1777, 2369, 3040]
    assert paper.N(10 * K, K) == 151                     # the printed formula alone would go on
    assert paper.log(0, K) == {"N": 2.0, "mu": paper.mu(0, K)}

    ict = ICT()                                          # doubles the grid and has no teacher
    assert [ict.N(k, 800) for k in range(0, 800, 100)] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert ict.N(99, 800) == 11 and ict.N(800, 800) == 1281 and ict.N(0, 1) == 11
    assert ict.mu(0, 800) == 0 and ict.log(99, 800) == {"N": 11.0}


def test_cm_sigma_grid_table():
    cfg = ConsistencyConfig()
    table = [80, 57.59, 40.79, 28.37, 19.35, 12.91, 8.401, 5.315, 3.257, 1.923, 1.088, 0.5853,
             0.2964, 0.1395, 0.05995, 0.02293, 0.007528, 0.002]
    cm_close(cfg.karras_sigmas(18), torch.tensor(table), dict(rtol=3e-4, atol=0))
    for n in (2, 3, 151, 1281):
        sigmas = cfg.karras_sigmas(n)
        assert (sigmas[0], sigmas[-1], len(sigmas)) == (80.0, torch.tensor(0.002), n)
        assert (sigmas.diff() < 0).all()


def test_cm_scalings_table():
    sigma = torch.tensor([80, 2, 0.5, 0.01, 0.002])
    exact = dict(rtol=1e-3, atol=0)
    c_skip, c_out, c_in = ConsistencyConfig().scalings(sigma)
    cm_close(c_skip, torch.tensor([3.906e-5, 0.05893, 0.50200, 0.99974, 1]), exact)
    cm_close(c_out, torch.tensor([0.499978, 0.484586, 0.352139, 0.007998, 0]), exact)
    cm_close(c_in, torch.tensor([0.0125, 0.48507, 1.41421, 1.9996, 1.99998]), exact)
    conditions = torch.tensor([1095.51, 173.29, -173.29, -1151.29, -1553.65])
    cm_close(noise_condition(sigma), conditions, exact)


@pytest.mark.parametrize("schedule", [Schedule(), ICT()])
def test_cm_levels_are_neighbours_drawn_with_the_stated_chance(schedule):
    """Of iCT, ln sigma is normal with mean -1.1, a sign that has gone wrong elsewhere."""
    cfg = ConsistencyConfig()
    draws = 20_000
    t, r = schedule.levels(10, 1000, draws, cm_seeded(), cfg)
    sigmas = cfg.karras_sigmas(schedule.N(10, 1000))
    index = torch.searchsorted(-sigmas, -t)
    assert torch.equal(t, sigmas[index]) and torch.equal(r, sigmas[index + 1])
    chance = torch.full((len(sigmas) - 1,), 1 / (len(sigmas) - 1))
    if isinstance(schedule, ICT):
        chance = -torch.distributions.Normal(-1.1, 2.0).cdf(sigmas.log()).diff()
    share = index.bincount(minlength=len(chance)) / draws
    assert (share - chance / chance.sum()).abs().max() < 5 * 0.5 / math.sqrt(draws)


def test_cm_levels_of_a_seed_stay():
    """The first numbers of earlier versions, with which the bundled model was trained."""
    for schedule, cfg, first, second in [
            (Schedule(), ConsistencyConfig(), (2.7354169, 2.5152190), (0.0827837, 0.0720503)),
            (ICT(), ConsistencyConfig(), (0.0092027, 0.0081149), (0.1212100, 0.1111327)),
            (ECT(), CM_ECT_MODEL, (7.2571859, 7.0291204), (0.1851002, 0.1583136))]:
        drawn = torch.stack(schedule.levels(500, 1000, 2, cm_seeded(), cfg), dim=1)
        cm_close(drawn, torch.tensor([first, second]), dict(rtol=2e-5, atol=0))


def test_cm_ect_starts_near_a_denoiser_and_tightens():
    ect = ECT()
    gaps = []
    for k in range(0, 800, 100):
        t, r = ect.levels(k, 800, 1000, cm_seeded(), CM_ECT_MODEL)
        assert (r >= 0).all() and (r < t).all()
        gaps.append(((t - r) / t).mean().item())
        assert ect.log(k, 800) == {"stage": k / 100}
        if k == 0:
            assert (r[t < 1] == 0).all()
            cm_close(t.log().mean(), torch.tensor(-1.1), dict(rtol=0, atol=0.2))
    assert all(later < earlier for earlier, later in zip(gaps, gaps[1:]))
    assert ect.levels(800, 800, 2, cm_seeded(), CM_ECT_MODEL)[0].shape == (2,)      # k = K is valid
    assert ect.mu(5, 800) == 0 and ECT(mu0=0.98).mu(5, 800) == 0.98


@pytest.mark.parametrize("build, options", [
    (ConsistencyConfig, dict(sigma_min=0.0)), (ConsistencyConfig, dict(sigma_max=0.001)),
    (Schedule, dict(s0=0)), (Schedule, dict(s0=200)), (Schedule, dict(mu0=1.0)),
    (ConsistencyConfig, dict(sigma_data=0.0)), (ConsistencyConfig, dict(rho=0.0)),
    (ECT, dict(stages=0)), (ECT, dict(mu0=1.0)), (ECT, dict(q=1.0)), (ECT, dict(k=-1.0)),
    (ICT, dict(s0=0)), (ICT, dict(s1=5)), (ICT, dict(P_std=0.0))])
def test_cm_schedules_and_model_refuse(build, options):
    with pytest.raises(ValueError, match=f"need .* not .*{next(iter(options))}="):
        build(**options)


# ---- the consistency model and its loss ----

def test_cm_f_at_sigma_min_is_the_identity():
    """Bounded nets and unbounded ones alike: c_out is exactly zero there."""
    cfg = ConsistencyConfig()
    sigma = torch.full((2,), cfg.sigma_min)
    for net in (cm_toy(), FunctionGenerator(CM_TINY), DiT(CM_VIT), UViT(CM_VIT)):
        f = ConsistencyModel(sample_random(net), cfg)
        assert (f(CM_X, sigma) - CM_X).abs().max() <= 1e-6
        assert (f(CM_X, 2 * sigma) - CM_X).abs().max() > 1e-6


def test_cm_student_and_target_share_noise_classes_and_coordinates():
    student, target, (x, noise, t, r) = cm_pair()
    y = torch.arange(4)
    coord = randn(4, 8, 8, 2)
    consistency_loss(student, target, x, noise, t, r, l2, y, coord=coord)
    for model, level in ((student, t), (target, r)):
        (call,) = model.net.calls
        z = (call["x"] / per_image(model.cfg.scalings(level)[2]) - x) / per_image(level)
        cm_close(z, noise, dict(rtol=0, atol=2e-3))      # x / sigma is rounded at small levels
        cm_close(call["t"], noise_condition(level))
        assert call["y"] is y and call["coord"] is coord


def test_cm_no_gradient_reaches_the_target():
    student, target, (x, noise, t, r) = cm_pair()
    consistency_loss(student, target, x, noise, t, r, l2).mean().backward()
    assert all(value.grad is None for value in target.parameters())
    both, _, _ = cm_pair()                               # nor where it is the student itself
    consistency_loss(both, both, x, noise, t, r, l2).mean().backward()
    alone, frozen, _ = cm_pair()
    frozen.load_state_dict(alone.state_dict())
    consistency_loss(alone, frozen, x, noise, t, r, l2).mean().backward()
    cm_close(both.net.W.grad, alone.net.W.grad)


def test_cm_r_zero_stands_for_the_clean_image():
    """Also where only some are 0, and by distillation: no network is asked at sigma = 0."""
    f = ConsistencyModel(cm_toy(), CM_ECT_MODEL)
    denoiser, _ = cm_gaussian_answers(0.5)
    x = randn(3, 3, 8, 8)
    noise = randn(3, 3, 8, 8, seed=1)
    t = torch.tensor([0.1, 1.0, 10.0])
    clean = l2(f(x + per_image(t) * noise, t), x)
    for r, extra in [(torch.zeros(3), {}), (torch.zeros(3), dict(denoiser=denoiser)),
                     (torch.tensor([0.0, 0.0, 1.0]), dict(denoiser=denoiser))]:
        loss = consistency_loss(f, f, x, noise, t, r, l2, **extra)
        cm_close(loss[:2], clean[:2])
    cm_close(consistency_loss(f, None, x, noise, t, torch.zeros(3), l2), clean)
    loss.sum().backward()
    assert f.net.W.grad.isfinite().all()


def test_cm_latent_f_is_the_diffusions_own_x_0():
    """Up to sigma 5 the answer of f is (x_t - sigma_t eps) / alpha_t; above, where alpha goes to
    0.005, it stays near the mean. Timesteps are met exactly, and between two the time is between."""
    net = sample_random(UNet(UNetConfig(3, 3, 32, (1,), 1, (), groups=8, num_classes=2)))
    diffusion = GaussianDiffusion(DiffusionConfig())
    cfg = ConsistencyConfig(sigma_data=1.0, boundary=False)
    f = LatentConsistency(net, cfg, -diffusion.log_rho)
    z, noise, y = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1), torch.tensor([0, 1])
    for t in (0, 1, 300, 520):
        alpha, sigma_t = diffusion._alpha_sigma(t)
        sigma = torch.full((2,), sigma_t / alpha)
        cm_close(f.time(sigma), torch.full((2,), float(t)), dict(rtol=0, atol=2e-3))
        x_t = alpha * z + sigma_t * noise
        x_0 = (x_t - sigma_t * net(x_t, torch.full((2,), t), y)) / alpha
        cm_close(f(x_t / alpha, sigma, y), x_0, dict(rtol=0, atol=2e-3 * (1 + sigma[0].item())))
    times = f.time(torch.linspace(0.03, 300, 5000))
    assert times[0] == 0 and times[-1] == 999 and (times.diff() >= 0).all()
    sigma = torch.full((2,), 80.0)
    eps = net(noise, f.time(sigma), y)
    cm_close(f(80 * noise, sigma, y), 26**0.5 * (noise - eps), dict(rtol=0, atol=0.1))   # not 80
    for wrong in (ConsistencyConfig(), ConsistencyConfig(sigma_data=1.0)):
        with pytest.raises(ValueError, match="cm.sigma_data=1 and cm.boundary=false"):
            LatentConsistency(net, wrong, -diffusion.log_rho)


def cm_gaussian_answers(s):
    """Of data N(0, s^2): the ideal denoiser, and the consistency function, the trajectory's end."""
    def denoiser(x, t, y=None):
        return x * per_image(s**2 / (s**2 + t**2))

    def end(x, t, y=None):
        return x * per_image(s / (s**2 + t**2).sqrt())

    return denoiser, end


def test_cm_heun_step_follows_the_trajectories_of_gaussian_data():
    denoiser, _ = cm_gaussian_answers(0.5)
    x = 3 * randn(4, 3, 8, 8).double()
    errors = []
    for steps in (8, 16, 32):
        here = x
        levels = torch.linspace(3, 1, steps + 1).double()
        for t, r in zip(levels[:-1], levels[1:]):
            here = heun_step(denoiser, here, t.expand(4), r.expand(4))
        errors.append((here - x * math.sqrt((0.25 + 1) / (0.25 + 9))).abs().max().item())
    assert errors[2] < 1e-3
    assert all(3.5 < a / b < 4.6 for a, b in zip(errors, errors[1:]))            # second order
    t = torch.tensor([3.0, 1.0, 0.5, 2.0]).double()
    cm_close(heun_step(denoiser, x, t, torch.zeros(4).double()), denoiser(x, t))


def test_cm_euler_step_is_exact_where_the_slope_does_not_change():
    """One step of any width along a consistency function, whose answer is the trajectory's end."""
    end, x = randn(2, 4, 3, 8, 8).double()
    t = torch.tensor([80.0, 3.0, 1.0, 0.5]).double()

    def answer(x, t, y=None):
        return end

    for part in (0.5, 0.01, 0.0):
        there = euler_step(answer, end + per_image(t) * x, t, part * t)
        cm_close(there, end + per_image(part * t) * x)
    cm_close(heun_step(answer, end + per_image(t) * x, t, 0.5 * t), end + per_image(0.5 * t) * x)


def test_cm_distillation_leaves_no_distance_where_training_does():
    # The true consistency function answers alike along trajectories. x + r z is on one only in the
    # mean.
    denoiser, f = cm_gaussian_answers(0.5)
    x = 0.5 * randn(64, 3, 8, 8)
    noise = randn(64, 3, 8, 8, seed=1)
    t = torch.linspace(0.3, 4, 64)
    along = consistency_loss(f, f, x, noise, t, 0.9 * t, l2, denoiser=denoiser)
    trained = consistency_loss(f, f, x, noise, t, 0.9 * t, l2)
    assert (along < 1e-3 * trained).all()
    first_order = consistency_loss(f, f, x, noise, t, 0.9 * t, l2, denoiser=denoiser,
                                   solver=euler_step)
    assert (along < first_order).all() and (first_order < 0.1 * trained).all()


def test_cm_metrics_known_answers():
    a = torch.zeros(2, 3, 4, 4)
    b = a + per_image(torch.tensor([1.0, 2.0]))
    squares = torch.tensor([48.0, 4 * 48])
    c = 0.00054 * math.sqrt(48)
    assert l2(a, b).tolist() == [1, 4]
    cm_close(pseudo_huber(a, b, c=0.0), squares.sqrt())
    cm_close(pseudo_huber(a, b), (squares + c**2).sqrt() - c)
    assert pseudo_huber(a, a).tolist() == [0, 0]


def test_cm_denoising_distance_known_answer():
    clean = randn(2, 3, 4, 4)

    def off_by_sigma(x, sigma, y=None):
        return clean + per_image(sigma)

    off_by_sigma.cfg = ConsistencyConfig()
    sigmas, distances = denoising_distance(off_by_sigma, clean, randn(2, 3, 4, 4, seed=1))
    assert len(sigmas) == 18
    cm_close(distances, sigmas * math.sqrt(48))


def test_cm_sampling_without_the_skip_term():
    f = ConsistencyModel(sample_random(FunctionGenerator(CM_TINY)), ConsistencyConfig())
    function = sample_function(f, CM_X)
    with pytest.raises(ValueError, match="UViT makes pixels, not functions"):
        sample_function(ConsistencyModel(UViT(CM_VIT), f.cfg), CM_X)
    skip = f.cfg.scalings(torch.tensor(80.0))[0] * 80 * CM_X
    drawn = (function.draw(16) + skip).clamp(-1, 1)
    cm_close(drawn, sample_onestep(f, CM_X), dict(rtol=0, atol=1e-5))
    assert skip.std() == pytest.approx(0.003125, rel=0.1)
    assert function.draw((24, 40)).shape == (2, 3, 24, 40)
    assert not function.weights[0].requires_grad


@pytest.mark.parametrize("clip", [True, False])
def test_cm_multistep_adds_noise_by_the_published_rule(clip):
    seen = []

    def f(x, sigma, y):
        seen.append((x, sigma, y))
        return torch.full_like(x, 2.0)

    f.cfg = ConsistencyConfig(sigma_min=0.5, sigma_max=4.0)
    z = [randn(2, 3, 4, 4, seed=i) for i in range(3)]
    y = torch.tensor([3, 1])
    image = sample_multistep(f, z, [4.0, 1.3, 0.1], y, clip=clip)
    assert (image == 1).all() and all(call[2] is y for call in seen)
    start = 1.0 if clip else 2.0
    expected = [(4 * z[0], 4.0), (start + 1.2 * z[1], 1.3),              # 1.2^2 = 1.3^2 - 0.5^2
                (torch.full_like(z[2], start), 0.5)]
    for (x, sigma, _), (x_expected, level) in zip(seen, expected, strict=True):
        cm_close(x, x_expected)
        cm_close(sigma, torch.full((2,), level))


# ---- image functions ----

def cm_function(size=2, turned=False):
    net = sample_random(FunctionGenerator(replace(CM_TINY, pe_turned=turned)))
    with torch.no_grad():
        return net.function(randn(size, 3, 16, 16), torch.zeros(size))


def test_cm_windows_and_tiles_change_nothing():
    function = cm_function(size=3)
    whole = function.draw((40, 24))
    window = function.draw((10, 12), window=(0.0, -1.0, 0.5, 0.0))
    cm_close(window, whole[..., 20:30, :12], dict(rtol=0, atol=1e-4))
    for tile in (7, 16, 40):                             # tiles bound the memory, nothing else
        cm_close(function.draw((40, 24), tile=tile), whole)
    assert function.draw(1, tile=-1).shape == (3, 3, 1, 1)

    covered = torch.zeros(20, 50)                        # tiles hold all images
    for top, left, rgb in function.tiles((20, 50), tile=12):
        assert rgb.shape[:2] == (3, 3) and max(rgb.shape[2:]) <= 12
        covered[top:top + rgb.shape[2], left:left + rgb.shape[3]] += 1
    assert (covered == 1).all()


def test_cm_drawing_and_training_go_through_the_function_of_eq_9(monkeypatch):
    """`colours` sees H + W codes of a grid and one per point of anything else, and nothing else is
    a colour.
    """
    net = sample_random(FunctionGenerator(CM_TINY))
    function = sample_function(ConsistencyModel(net, ConsistencyConfig()), CM_X)
    colours = inr_generator.colours
    calls = []

    def counted(weights, code, columns=None, dtype=torch.float32):
        calls.append((code.shape[1], 0 if columns is None else columns.shape[1]))
        return 0 * colours(weights, code, columns, dtype) + 0.25

    monkeypatch.setattr(inr_generator, "colours", counted)
    for made, seen in [(function.draw((12, 40)), [(12, 40)]),
                       (function.draw((8, 12), tile=8), [(8, 8), (8, 8), (8, 4), (8, 4)]),
                       (function(CM_MOVED), [(256, 0)]), (net.redraw(CM_X, CM_MOVED), [(256, 0)]),
                       (net(CM_X, CM_ZERO, coord=CM_MOVED), [(256, 0)]),
                       (net(CM_X, CM_ZERO), [(16, 16)])]:
        assert (made == 0.25).all()
        assert [calls.pop(0) for _ in seen] == seen
    assert not calls


@pytest.mark.parametrize("turned", [False, True])
def test_cm_draw_equals_the_function_evaluated_pixel_by_pixel(turned):
    function = cm_function(turned=turned)
    window = (-0.5, -1.0, 1.0, 0.25)
    weights = [w.requires_grad_() for w in function.weights]
    drawn = function.draw((20, 12), window)
    asked = function(pixel_coord((20, 12), window)[None]).movedim(-1, 1)
    cm_close(drawn, asked, dict(rtol=0, atol=1e-5 * asked.std().item()))
    look = randn(*asked.shape)
    ours = torch.autograd.grad((drawn * look).sum(), weights)
    theirs = torch.autograd.grad((asked * look).sum(), weights)
    for own, other in zip(ours, theirs):
        cm_close(own, other, dict(rtol=0, atol=1e-5 * other.abs().max().item()))


def test_cm_image_function_is_batched_and_scaled():
    function = cm_function(size=3)
    whole = function.draw(8)
    assert len(function) == 3 and len(function[1:]) == 2
    for i in (0, 2, -1):
        cm_close(function[i].draw(8), whole[i][None])
    with pytest.raises(IndexError):
        function[3]
    factor = torch.tensor([1.0, 2.0, -1.0])
    cm_close(function.scaled(factor).draw(8), whole * per_image(factor))


def test_cm_image_function_closed_form():
    """One unit per layer, worked out by hand: 2 relu(cos(pi y)) + 0.5, and nothing of x."""
    first = torch.zeros(1, 5, 1)                         # cos y, cos x, sin y, sin x, bias
    first[0, 0] = 1.0
    last = torch.tensor([[[2.0, 0.0, 0.0], [0.5, 0.0, -1.0]]])
    function = ImageFunction((first, last), pe_dim=2, pe_sigma=1.0)
    coord = torch.tensor([[[0.0, 0.3], [1 / 3, -0.2], [1.0, 0.9]]])
    cm_close(function(coord), torch.tensor([[[2.5, 0, -1], [1.5, 0, -1], [0.5, 0, -1]]]))


def test_cm_corner_coordinates_are_those_printed():
    i, j = torch.meshgrid(torch.arange(4), torch.arange(8), indexing="ij")
    printed = torch.stack([i / 4, j / 8], dim=-1)
    near = dict(rtol=0, atol=1e-6)
    cm_close(pixel_coord((4, 8), corners=True), printed, near)
    cm_close(pixel_coord((2, 4), (0, -1, 1, 0), corners=True), printed[2:, :4], near)
    net = FunctionGenerator(replace(CM_TINY, corners=True))
    coord = pixel_coord((16, 16), corners=True)[None]
    cm_close(net(CM_X, CM_ZERO), net(CM_X, CM_ZERO, coord=coord))


def test_cm_variational_coordinates_stay_within_a_quarter_pixel():
    grid = pixel_coord((16, 8))
    still = variational_coord(grid, torch.zeros(2, 16, 8, 2))
    assert torch.equal(still, grid.expand(2, 16, 8, 2))
    shift = (variational_coord(grid, randn(50, 16, 8, 2)) - grid) / (2 / 16)
    assert shift.abs().max().item() == pytest.approx(0.25, abs=1e-4)
    assert (shift.abs() > 0.2499).float().mean().item() == pytest.approx(0.0956, abs=0.01)


def test_cm_half_precision_is_for_the_network_and_where_drawing_asks_for_it():
    function = cm_function()
    net = sample_random(FunctionGenerator(CM_TINY))
    whole = function.draw(16)
    exact = net(CM_X, CM_ZERO)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function.draw(16), whole)
        made = net(CM_X, CM_ZERO)
    assert made.dtype == torch.float32 and 0 < (made - exact).abs().max() < 0.2 * exact.std()
    rounded = function.draw(16, dtype=torch.bfloat16)    # the first layer is not
    assert rounded.dtype == torch.float32 and 0 < (rounded - whole).std() < 0.02 * whole.std()


# ---- generators ----

def test_cm_parameter_counts():
    for size, patch, uvit, dit, func in [(32, 4, 114_672_516, 161_469_744, 143_991_811),
                                         (64, 4, 114_819_972, 161_469_744, 143_991_811),
                                         (128, 8, 115_041_300, 161_691_072, 144_102_403)]:
        shape = TransformerConfig(size=size, patch=patch)
        assert (count(UViT, shape), count(DiT, shape)) == (uvit, dit)
        assert count(FunctionGenerator, GeneratorConfig(size=size, patch=patch)) == func

    small = TransformerConfig(size=32, num_classes=10)
    assert (count(UViT, small), count(DiT, small)) == (114_680_964, 161_476_656)
    timed = replace(small, num_classes=0, time_mlp=True)
    assert count(UViT, timed) == 114_672_516 + 4_722_432
    with torch.device("meta"):
        net = FunctionGenerator(GeneratorConfig(size=32, num_classes=10))
    parts = [sum(p.numel() for p in part.parameters()) for part in (
        net, net.encoder[0], net.condition.noise, net.predict.blocks[0], net.predict)]
    assert parts[:4] == [143_999_491, 10_628_352, 787_968, 9_447_168]
    assert parts[4] < 0.5 * parts[0] and len(net.predict.tokens) == 259      # Appendix C
    for options, parameters in [
            (dict(size=32, num_classes=10, self_attention=False), 129_829_891),
            (dict(groups=128), 144_188_419), (dict(groups=256), 144_581_635),
            (dict(head_dim=64), 143_991_811),                        # 12 heads of 64, as always
            (dict(head_dim=32), 143_991_811 - 6 * 2 * 4 * 768 * 384)]:
        assert count(FunctionGenerator, GeneratorConfig(**options)) == parameters


def test_cm_frequencies_lie_along_the_axes_or_pair_by_pair_at_multiples_of_the_golden_angle():
    """A pair is a rotation times 1 to sigma; the angle divides the turn in the golden ratio."""
    plain = inr_generator.frequencies(8, 64.0)
    w = torch.tensor([1.0, 4, 16, 64])
    zero = torch.zeros(4)
    cm_close(plain, torch.cat([torch.stack([w, zero], 1), torch.stack([zero, w], 1)]))
    turned = inr_generator.frequencies(8, 64.0, True)
    pairs = torch.stack([turned[:4], turned[4:]], dim=1)                 # (4, 2, 2)
    cm_close(pairs @ pairs.mT, w[:, None, None]**2 * torch.eye(2))
    assert (torch.linalg.det(pairs) > 0).all() and torch.equal(pairs[0], torch.eye(2))
    golden_ratio = (1 + math.sqrt(5)) / 2
    for k in range(4):
        angle = math.tau * k / golden_ratio**2
        cm_close(pairs[k, 0], w[k] * torch.tensor([math.cos(angle), math.sin(angle)]))
    code = positional_encoding(torch.tensor([[0.3, -0.7]]), 8, 64.0, True)
    angle = math.pi * turned @ torch.tensor([0.3, -0.7])
    cm_close(code[0], torch.cat([angle.cos(), angle.sin()]), dict(rtol=0, atol=1e-4))


def test_cm_position_code_has_the_given_frequencies():
    """w from 1 towards 1 / base, first half of the code for the column; DiT's own by default."""
    cfg = replace(CM_TINY, position_base=64.0, position_scale=3.0)       # 4 x 4 patches, dim 24
    code = FunctionGenerator(cfg).embed.position
    w = torch.tensor([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32])
    row, col = 2 * w, 1 * w
    cm_close(code[4 * 2 + 1], 3 * torch.cat([col.sin(), col.cos(), row.sin(), row.cos()]))
    default = FunctionGenerator(CM_TINY).embed.position
    assert torch.equal(default, DiT(CM_VIT).embed.position)


def test_cm_encoder_is_the_identity_at_init():
    """So the first step of consistency training sees exactly the network that pre-training left."""
    net = FunctionGenerator(CM_TINY)
    t = torch.tensor([1000.0, -900.0])
    assert torch.equal(net.extract(CM_X, t), net.embed(CM_X))
    assert torch.equal(net.function(CM_X, t).draw(8), net.reconstruct(CM_X).draw(8))
    assert torch.equal(DiT(CM_VIT)(CM_X, t), torch.zeros_like(CM_X))


def test_cm_initialisation_follows_the_sources():
    torch.manual_seed(0)
    net = FunctionGenerator(GeneratorConfig(size=16, dim=96, heads=3, encoder_depth=1,
                                            decoder_depth=1))
    attn = net.encoder[0].attn
    fused = torch.cat([attn.q.weight, attn.kv.weight])                   # Xavier of q|k|v
    assert fused.abs().max().item() == pytest.approx(math.sqrt(6 / (96 + 3 * 96)), rel=0.01)
    assert net.condition.noise[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert net.predict.tokens.std().item() == pytest.approx(1, rel=0.1)
    for base in net.predict.base:
        bound = 1 / math.sqrt(base.shape[0] - 1)
        assert base.abs().max().item() == pytest.approx(bound, rel=0.01)


def test_cm_out_scale_doubles_f_but_not_the_reconstruction():
    net = sample_random(FunctionGenerator(CM_TINY))
    double = FunctionGenerator(replace(CM_TINY, out_scale=2.0))
    double.load_state_dict(net.state_dict())
    cm_close(double(CM_X, CM_ZERO), 2 * net(CM_X, CM_ZERO))
    assert torch.equal(double.reconstruct(CM_X).draw(4), net.reconstruct(CM_X).draw(4))


def test_cm_pretraining_trains_everything_but_the_encoder_and_the_noise_level():
    net = sample_random(FunctionGenerator(replace(CM_TINY, num_classes=3)))
    drawn = net.redraw(2 * CM_X, CM_MOVED)
    assert torch.equal(drawn, net.reconstruct(2 * CM_X)(CM_MOVED).movedim(-1, 1))
    F.mse_loss(drawn, CM_X).backward()
    for name, value in net.named_parameters():
        trained = not name.startswith(("encoder.", "condition."))
        assert (value.grad is not None and value.grad.abs().sum() > 0) == trained, name


def test_cm_generators_refuse_what_cannot_be_built():
    for build, cfg, options, word in [
            (FunctionGenerator, CM_TINY, {"size": 30}, "patch 4 must divide size 30"),
            (FunctionGenerator, CM_TINY, {"groups": 5}, "groups 5 must divide hidden 16"),
            (FunctionGenerator, CM_TINY, {"pe_dim": 7}, "pe_dim even"),
            (FunctionGenerator, CM_TINY, {"heads": 0}, "heads must be at least 1"),
            (DiT, CM_VIT, {"patch": 7}, "patch 7 must divide size 16"),
            (DiT, CM_VIT, {"dim": 34}, "dim a multiple of 4"),
            (UViT, CM_VIT, {"depth": 4}, "depth must be odd"),
            (UViT, CM_VIT, {"patch": 7}, "patch divide size")]:
        with pytest.raises(ValueError, match=word):
            build(replace(cfg, **options))


# ---- golden: schedules, loss, samplers, loop ----

def test_cm_golden_schedules():
    g = golden("cm/schedules.pt")["outputs"]
    for table in g["tables"]:
        code = Schedule(s0=table["s0"], s1=table["s1"], mu0=table["mu0"])
        printed = replace(code, printed_mu=True)
        K = table["K"]
        assert [code.N(k, K) for k in table["k"]] == table["N"]
        for schedule, field in ((code, "mu_code"), (printed, "mu_paper")):
            assert [schedule.mu(k, K) for k in table["k"]] == pytest.approx(table[field], rel=1e-12)
    for n, grids in g["sigma_grids"].items():
        sigmas = ConsistencyConfig().karras_sigmas(int(n))
        cm_close(sigmas, grids["float64"].float(), dict(rtol=1e-6, atol=0))
        for name in ("loss_grid", "get_sigmas_karras"):  # theirs rounds pow in float32
            cm_close(sigmas, grids[name][:int(n)], dict(rtol=2e-6, atol=0))


def cm_config(g, **changes):
    named = ("sigma_data", "sigma_min", "sigma_max", "rho")
    return ConsistencyConfig(**{key: g[key] for key in named if key in g}, **changes)


def cm_golden_unet(name):
    config, weights, _, _ = reference(f"cm/{name}")
    return loaded(lambda: UNet(ldm_unet_config(config)), weights)


def cm_golden_gradients(net, case):
    for name in ("W", "b", "v"):
        cm_close(getattr(net, name).grad, case[f"grad_{name}"])


def test_cm_golden_karras():
    c, weights, i, out = reference("cm/karras.pt")
    sigma = i["sigma"]
    toy = CmToy(weights)
    for name, boundary in (("boundary", True), ("edm", False)):
        cfg = cm_config(c, boundary=boundary)
        for ours, part in zip(cfg.scalings(sigma), ("c_skip", "c_out", "c_in")):
            cm_close(ours, out[f"{name}_{part}"], dict(rtol=1e-5, atol=1e-9))
        x = i["denoise_x"]
        level = i["denoise_sigma"]
        cm_close(ConsistencyModel(toy, cfg)(x, level), out[f"denoise_{name}"])
        made = toy(per_image(cfg.scalings(level)[2]) * x, noise_condition(level))
        cm_close(made, out[f"denoise_{name}_F"])
    cm_close(noise_condition(sigma[sigma > 0]), out["c_noise"][sigma > 0])
    f = ConsistencyModel(cm_golden_unet(c["unet_file"]), cm_config(c))
    cm_close(f(i["unet_x"], i["unet_sigma"]), out["unet_denoise_boundary"], CM_FREQUENCY)

    stored = out["weightings"]
    assert set(stored) == {"sigma", *CM_WEIGHTINGS}
    for name, weighting in CM_WEIGHTINGS.items():
        ours = weighting(stored["sigma"], c["sigma_data"])
        cm_close(ours, stored[name], dict(rtol=1e-5, atol=0))


def cm_golden_metric(name, weights, layers):
    """The four metrics of ct_loss.pt; l1 and l2-32 show that a metric is any callable."""
    if name == "lpips":
        return ResizedLPIPS(CmTinyLPIPS(weights, layers))

    def l1(a, b):
        return (a - b).abs().mean((1, 2, 3))

    def l2_32(a, b):
        return l2(F.interpolate(a, size=32, mode="bilinear"),
                  F.interpolate(b, size=32, mode="bilinear"))

    return {"l2": l2, "l1": l1, "l2-32": l2_32}[name]


def test_cm_golden_ct_loss():
    config, weights, _, out = reference("cm/ct_loss.pt")
    cfg = ConsistencyConfig()
    for case in out["cases"]:
        student, target = (ConsistencyModel(CmToy(weights[who]), cfg)
                           for who in ("student", "target"))
        sigmas = cfg.karras_sigmas(case["num_scales"])
        t = sigmas[case["indices"]]
        r = sigmas[case["indices"] + 1]
        agree(case, CM_NETWORK, sigma_t=t, sigma_t2=r)
        x = case["x_start"]
        metric = cm_golden_metric(case["loss_norm"], weights, config["lpips_layers"])
        distance = consistency_loss(student, target, x, case["noise"], t, r, metric)
        loss = CM_WEIGHTINGS[case["weight_schedule"]](t, cfg.sigma_data) * distance
        for who, model, level in (("student", student, t), ("target", target, r)):
            call = model.net.calls[0]                    # theirs gets x + r z by an Euler step
            cm_close(call["x"], case[f"{who}_in"], CM_CHAIN)
            cm_close(call["t"], case[f"{who}_cnoise"])
            cm_close(model(x + per_image(level) * case["noise"], level), case[f"{who}_out"])
        agree(case, CM_NETWORK, loss_per_sample=loss, loss=loss.mean())
        loss.mean().backward()
        cm_golden_gradients(student.net, case)


def test_cm_golden_lpips_at_224():
    c, weights, i, out = reference("cm/lpips_tiny.pt")
    lpips = CmTinyLPIPS(weights, c["layers"])
    cm_close(ResizedLPIPS(lpips)(i["a"], i["b"]), out["avgpool_224"])
    cm_close(lpips(i["a"], i["b"]).flatten(), out["maxpool"])            # a copy was changed
    kept = ResizedLPIPS(lpips, average_pool=False)(i["a"], i["b"])
    assert (kept - out["avgpool_224"]).abs().min() > 1e-4


class CmHalf(torch.nn.Module):
    """A distance in place of LPIPS: half of the mean difference, of pictures as it gets them."""

    def forward(self, a, b):
        return 0.5 * (a - b).mean((1, 2, 3), keepdim=True)


def test_lpips_can_be_held_by_squared_errors():
    """Both terms in closed form, of pictures one grey value apart."""
    a = torch.full((3, 3, 8, 8), 0.25)
    b = a - torch.tensor([0.0, 0.1, 0.4])[:, None, None, None]
    cm_close(ResizedLPIPS(CmHalf())(a, b), torch.tensor([0.0, 0.05, 0.2]))
    both = ResizedLPIPS(CmHalf(), size=16, l2_weight=10.0)(a, b)
    cm_close(both, torch.tensor([0.0, 0.05 + 10 * 0.01, 0.2 + 10 * 0.16]))


def test_cm_golden_samplers():
    config, weights, _, out = reference("cm/samplers.pt")
    cfg = cm_config(config)
    for run in out["runs"]:
        toy = run["model"] == "toy"
        f = ConsistencyModel(CmToy(weights) if toy else cm_golden_unet("unet_plain.pt"), cfg)
        if run["sampler"] == "onestep":
            image = sample_onestep(f, run["noises"][0])
        else:
            levels = cfg.karras_sigmas(run["steps"])[run["ts"]]
            assert levels[-1] == torch.tensor(cfg.sigma_min)             # where no noise is added
            image = sample_multistep(f, run["noises"][:-1], levels[:-1].tolist(),
                                     clip=run["clip_denoised"])
        cm_close(image, run["out"], CM_CHAIN if toy else CM_FREQUENCY)


def test_cm_golden_train_loop():
    """Twelve steps: loss, RAdam, sampling EMAs, teacher with mu(k), in this order.

    The stored gradient of a matrix is still divided by the loss scale of the published
    mixed-precision loop, 2^20 and growing, so only its direction is compared; a wrong size would
    show in the weights.
    """
    c, weights, _, out = reference("cm/train_loop.pt")
    cfg = ConsistencyConfig()
    schedule = Schedule(s0=c["start_scales"], s1=c["end_scales"], mu0=c["start_ema"])
    f = ConsistencyModel(CmToy(weights), cfg)
    target = deepcopy(f).requires_grad_(False)
    averages = [deepcopy(f).requires_grad_(False) for _ in c["ema_rates"]]
    opt = torch.optim.RAdam(f.parameters(), lr=c["lr"], betas=(0.9, 0.999), eps=1e-8)
    for k, step in enumerate(out["steps"]):
        logs = schedule.log(k, c["total_steps"])
        assert logs["N"] == step["num_scales"]
        assert logs["mu"] == pytest.approx(step["mu"], rel=1e-12)
        sigmas = cfg.karras_sigmas(step["num_scales"])
        t = sigmas[step["indices"]]
        r = sigmas[step["indices"] + 1]
        opt.zero_grad()
        consistency_loss(f, target, step["x"], step["noise"], t, r, l2).mean().backward()
        for name, value in f.net.named_parameters():
            theirs = step["grads"][name]
            matrix = theirs.dim() > 1
            unit = value.grad.norm() if matrix else 1.0
            cm_close(value.grad / unit, theirs / (theirs.norm() if matrix else 1.0), CM_CHAIN)
        opt.step()
        with torch.no_grad():
            for average, mu in zip([*averages, target], [*c["ema_rates"], logs["mu"]]):
                for old, new in zip(average.parameters(), f.parameters()):
                    old.lerp_(new, 1 - mu)
        for net, stored in zip([f, target, *averages],
                               [step["params"], step["target"], *step["ema"]]):
            agree(stored, CM_CHAIN, **{name: net.net.state_dict()[name]
                                       for name in c["param_order"]})


def test_cm_golden_ect():
    c, weights, i, out = reference("cm/ect.pt")
    for table in out["t_to_r"]:
        widen = table["k"] if table["adj"] == "sigmoid" else 0.0
        ect = ECT(q=table["q"], k=widen, b=table["b"])
        for stage in table["stages"]:
            r = ect.tightened(table["t"], stage["stage"])
            cm_close(r, stage["r"], dict(rtol=1e-4, atol=1e-6))
    ect = ECT(P_mean=c["P_mean"], P_std=c["P_std"], k=c["k"], b=c["b"])
    cfg = replace(CM_ECT_MODEL, sigma_data=c["sigma_data"], sigma_min=c["eval_sigma_min"])
    for boundary, field in ((False, "precond_train"), (True, "precond_eval")):
        f = ConsistencyModel(CmToy(weights), replace(cfg, boundary=boundary))
        cm_close(f(i["precond_x"], i["precond_sigma"]), out[field])
    for case in out["losses"]:
        t = torch.exp(ect.P_mean + ect.P_std * case["rnd_normal"].flatten())
        r = replace(ect, q=case["q"]).tightened(t, case["stage"])
        cm_close(t, case["t"].flatten())
        cm_close(r, case["r"].flatten())
        f = ConsistencyModel(CmToy(weights), cfg)
        metric = functools.partial(pseudo_huber, c=case["c"])
        distance = consistency_loss(f, f, case["images"], case["eps"], t, r, metric)
        loss = ect.weight(t, r) * distance
        cm_close(loss, case["loss_per_sample"])
        loss.mean().backward()
        cm_golden_gradients(f.net, case)


# ---- golden: transformers ----

def cm_renamed(state, rules):
    """Published parameter names to ours; a fused q|k|v matrix becomes q and kv."""
    out = {}
    for key, value in state.items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        if ".qkv." in f".{key}":
            dim = value.shape[0] // 3
            out[key.replace("qkv", "q")] = value[:dim]
            out[key.replace("qkv", "kv")] = value[dim:]
        elif key:
            out[key] = value
    return out


CM_DIT_BLOCK = [(r"attn\.proj", "attn.out"), (r"mlp\.fc1", "mlp.0"), (r"mlp\.fc2", "mlp.2"),
                ("adaLN_modulation", "modulation")]
CM_DIT = [*CM_DIT_BLOCK, (r"x_embedder\.proj", "embed.conv"), ("t_embedder.mlp", "condition.noise"),
          (r"y_embedder\.embedding_table", "condition.label"), (r"final_layer\.linear", "out"),
          (r"final_layer\.modulation", "modulation"), (r"^pos_embed$", "")]
CM_UVIT = [(r"patch_embed\.proj", "patch"), ("time_embed", "time"), ("label_emb", "label"),
           ("in_blocks", "down"), (r"mid_block", "middle.0"),
           (r"out_blocks\.(\d+)\.skip_linear", r"merge.\1"), ("out_blocks", "up"),
           ("norm1", "norm_self"), ("norm2", "norm_mlp"), (r"attn\.proj", "attn.out"),
           (r"\.attn\.", ".attn_self."), (r"mlp\.fc1", "mlp.0"), (r"mlp\.fc2", "mlp.2"),
           ("decoder_pred", "out"), ("final_layer", "conv"), ("pos_embed", "position")]


def cm_anr_rules(self_attention):
    """ANR's decoder: 0 self, 1 cross, 2 feed-forward, or without self-attention from 0 on."""
    parts = ("self", "data", "mlp") if self_attention else ("data", "mlp")
    rules = [(r"^(?:\w+\.)?(?:hypobuilder|layers)\.", "blocks.")]
    for i, part in enumerate(parts):
        block = rf"^(blocks\.\d+)\.{i}"
        rules += [(rf"{block}\.norm\.", rf"\1.norm_{part}."),
                  (rf"{block}\.fn\.to_(q|kv)\.", rf"\1.attn_{part}.\2."),
                  (rf"{block}\.fn\.to_out\.0\.", rf"\1.attn_{part}.out."),
                  (rf"{block}\.fn\.net\.0\.", r"\1.mlp.0."),
                  (rf"{block}\.fn\.net\.3\.", r"\1.mlp.2.")]
    return [*rules, (r"^wtokens$", "tokens"), (r"^base_params\.wb", "base."),
            (r"^wtoken_postfc\.wb", "heads."), (r"^ctx_norm", "context_norm")]


def cm_head_dim(state, heads):
    """Width of a head in ANR's decoder, whatever the width of its tokens."""
    rows = {len(value) for key, value in state.items() if key.endswith("to_q.weight")}
    assert len(rows) == 1
    return rows.pop() // heads


def test_cm_golden_dit_block():
    c, weights, i, out = reference("cm/dit_block.pt")
    block = AdaLNBlock(c["hidden_size"], c["num_heads"], c["mlp_ratio"])
    block.load_state_dict(cm_renamed(weights, CM_DIT_BLOCK))
    agree(out, CM_NETWORK, out=block(i["x"], i["c"]), modulation=block.modulation(i["c"]),
          attn_of_x=block.attn(i["x"]))


@pytest.mark.parametrize("name", ["dit_tiny", "dit_tiny_cond"])
def test_cm_golden_dit(name):
    c, weights, i, out = reference(f"cm/{name}.pt")
    rows = len(weights["y_embedder.embedding_table.weight"])     # with a null class, if any
    net = DiT(TransformerConfig(c["input_size"], c["patch_size"], c["hidden_size"], c["depth"],
                                c["num_heads"], c["mlp_ratio"], num_classes=rows))
    net.load_state_dict(cm_renamed(weights, CM_DIT))
    cm_close(net.embed.position, out["pos_embed"][0], dict(rtol=0, atol=1e-6))
    agree(out, CM_NETWORK, tokens_in=net.embed(i["x"]),
          block0_out=net.blocks[0](out["tokens_in"], out["cond"]))
    agree(out, CM_FREQUENCY, timestep_embedding=timestep_embedding(i["t"], 256),
          cond=net.condition(i["t"], i["y"]), out=net(i["x"], i["t"], i["y"]))


@pytest.mark.parametrize("name", ["uvit_tiny", "uvit_tiny_cond"])
def test_cm_golden_uvit(name):
    c, weights, i, out = reference(f"cm/{name}.pt")
    if not (c["conv"] and c["skip"]):
        pytest.skip("U-ViT without its final convolution or its long skips is not used here")
    net = UViT(TransformerConfig(c["img_size"], c["patch_size"], c["embed_dim"], c["depth"],
                                 c["num_heads"], c["mlp_ratio"], max(c["num_classes"], 0),
                                 c["mlp_time_embed"], c["qkv_bias"]))
    state = cm_renamed(weights, CM_UVIT)
    net.load_state_dict({**state, "position": state["position"][0]})
    cm_close(net.down[0](out["block0_in"]), out["block0_out"])
    seen = {}

    def keep(key, first):
        return lambda module, args, made: seen.update({key: args[0] if first else made})

    net.down[0].register_forward_hook(keep("block0_in", True))
    net.up[0].register_forward_hook(keep("out_block0", False))
    net.out.register_forward_hook(keep("decoder_pred", False))
    seen["out"] = net(i["x"], i["timesteps"], i.get("y"))
    assert len(seen) == 4
    agree(out, CM_FREQUENCY, **seen)


# ---- golden: function generator ----

def test_cm_golden_coord_grid():
    g = golden("cm/coord_grid.pt")["outputs"]
    for name, window in (("grid_m1_p1", None), ("grid_0_1", (0, 0, 1, 1))):
        for shape, grid in g[name].items():
            ours = pixel_coord(tuple(int(n) for n in shape.split("x")), window)
            cm_close(ours, grid, dict(rtol=0, atol=1e-6))


def cm_function_from(params, hyponet):
    weights = tuple(params[f"wb{i}"] for i in range(len(params)))
    return ImageFunction(weights, hyponet["pe_dim"], hyponet.get("pe_sigma", 1024))


def test_cm_golden_inr_hyponet():
    """Trans-INR adds a constant to the colours (0.5, for images in [0, 1]); ours have none."""
    for case in golden("cm/inr_hyponet.pt")["outputs"]["cases"]:
        c = case["config"]
        if not c["use_pe"]:
            continue                                     # raw coordinates are not used here
        function = cm_function_from(case["params"], c)
        free = case["coords_free"]
        agree(case, CM_FREQUENCY, rgb=function(case["coords"]) + c["out_bias"],
              rgb_free=function(free) + c["out_bias"],
              posenc_free=positional_encoding(free, c["pe_dim"], c["pe_sigma"]))


def cm_prediction(hyponet, groups, decoder, depth, head_dim):
    """FunctionPrediction of a golden file, by the arguments of its networks."""
    dim = decoder["dim"]
    return FunctionPrediction(GeneratorConfig(
        dim=dim, heads=decoder["n_head"], head_dim=head_dim, encoder_depth=0, decoder_depth=depth,
        mlp_ratio=(decoder["ff_dim"] + 0.1) / dim,       # int(dim * ratio) is ff_dim again
        groups=groups, hidden=hyponet["hidden_dim"], layers=hyponet["depth"],
        pe_dim=hyponet["pe_dim"], pe_sigma=hyponet.get("pe_sigma", 1024), context_norm=False))


def cm_compare_params(weights, params):
    assert len(weights) == len(params)
    agree(params, CM_NETWORK, **{f"wb{i}": wb for i, wb in enumerate(weights)})


def test_cm_golden_transinr_from_the_weight_tokens():
    c, weights, i, out = reference("cm/transinr_full.pt")
    hyponet = c["hyponet"]["args"]
    args = c["transformer_encoder"]["args"]
    predict = cm_prediction(hyponet, c["n_groups"], args, depth=0, head_dim=args["head_dim"])
    ours = cm_renamed(weights, cm_anr_rules(True))
    predict.load_state_dict({key: ours[key] for key in predict.state_dict()})
    ends = list(itertools.accumulate(predict.groups))
    assert [list(part) for part in c["wtoken_ranges"].values()] == [
        [start, end] for start, end in zip([0, *ends], ends)]
    cm_compare_params(predict.weights(out["weight_tokens_out"]), out["params"])
    rgb = cm_function_from(out["params"], hyponet)(i["coords"]) + hyponet["out_bias"]
    cm_close(rgb, out["rgb"], CM_FREQUENCY)
    for base, theirs in zip(predict.base, out["example_init_base_params"].values()):
        assert base.shape == theirs.shape
        assert theirs.abs().max() <= 1 / math.sqrt(len(theirs) - 1)


def test_cm_golden_anr_decoder():
    c, weights, i, out = reference("cm/anr_decoder.pt")
    x = i["x"]
    width = cm_head_dim(weights, c["n_head"])
    assert width == c["head_dim"]
    blocks = nn.ModuleList(Block(c["dim"], c["n_head"], c["ff_dim"], True, True, head_dim=width)
                           for _ in range(c["depth"]))
    state = cm_renamed(weights, cm_anr_rules(True))
    blocks.load_state_dict({key.removeprefix("blocks."): value for key, value in state.items()})
    first = blocks[0]
    x1 = x + out["self_attn0"]
    agree(out, CM_NETWORK, self_attn0=first.attn_self(first.norm_self(x)),
          cross_attn0=first.attn_data(first.norm_data(x1), i["to"]),
          ff0=first.mlp(first.norm_mlp(x1 + out["cross_attn0"])))
    for block in blocks:
        x = block(x, i["to"])
    cm_close(x, out["out"])


def test_cm_golden_anr_hypernet_from_the_data_tokens():
    c, weights, i, out = reference("cm/anr_hypernet.pt")
    args = c["tinr_dec"]["args"]
    hyponet = c["hyponet"]["args"]
    decoder = {key: value for key, value in weights.items()
               if not key.startswith(("tinr_enc", "tokenizer"))}
    predict = cm_prediction(hyponet, c["n_groups"], args, args["depth"],
                            cm_head_dim(decoder, args["n_head"]))
    predict.load_state_dict(cm_renamed(decoder, cm_anr_rules(True)))
    cm_close(predict.fuse(out["encoded"]), out["decoded"])
    cm_compare_params(predict.weights(out["decoded"]), out["params"])
    function = ImageFunction(predict(out["encoded"]), predict.cfg.pe_dim, predict.cfg.pe_sigma)
    for key in out:
        if key.startswith("rgb_"):
            height, width = (int(n) for n in key.removeprefix("rgb_").split("x"))
            rgb = function.draw((height, width)) + hyponet["out_bias"]
            cm_close(rgb, out[key], CM_FREQUENCY)
    drawn = function.draw(i["x"].shape[-2:]) + hyponet["out_bias"]
    cm_close(F.mse_loss(drawn, i["x"]), out["recon_loss"], CM_FREQUENCY)


def test_cm_golden_variational_coords():
    _, _, i, out = reference("cm/variational_coords.pt")
    hyponet = golden("cm/anr_hypernet.pt")["config"]["hyponet"]["args"]
    function = cm_function_from(i["params"], hyponet)
    for case in out["cases"]:
        coord = variational_coord(pixel_coord((case["h"], case["w"])), case["raw_normal"])
        cm_close(coord, case["coords"], dict(rtol=0, atol=1e-6))
        cm_close(function(case["coords"]).movedim(-1, 1), case["rgb"], CM_FREQUENCY)


def cm_composed(case):
    """One case of cmfunc_composed.pt as our FunctionGenerator."""
    c = case["config"]
    h = c["hypo"]
    net = FunctionGenerator(GeneratorConfig(
        size=c["size"], patch=c["patch"], dim=c["dim"], heads=c["heads"],
        head_dim=cm_head_dim(case["state_dict"], c["heads"]), mlp_ratio=c["mlp"],
        encoder_depth=c["n_enc"], decoder_depth=c["n_dec"], num_classes=c["num_classes"] or 0,
        self_attention=c["self_attn"], context_norm=c["ctx_norm"], groups=c["groups"],
        hidden=h["hidden_dim"], layers=h["depth"], pe_dim=h["pe_dim"], pe_sigma=h["pe_sigma"]))
    ours = ("dec.", "wtokens", "base_params", "wtoken_postfc", "ctx_norm")
    inner = {key.removeprefix("dec."): value for key, value in case["state_dict"].items()
             if key.startswith(ours)}
    outer = {key: value for key, value in case["state_dict"].items() if not key.startswith(ours)}
    state = cm_renamed(outer, [*CM_DIT_BLOCK, (r"^enc\.", "encoder."),
                               ("^patch_embed", "embed.conv"), ("^y_embedder", "condition.label"),
                               ("^t_embedder.mlp", "condition.noise"), ("^pos_embed$", "")])
    for key, value in cm_renamed(inner, cm_anr_rules(c["self_attn"])).items():
        state[f"predict.{key}"] = value
    net.load_state_dict(state)
    cm_close(net.embed.position, case["state_dict"]["pos_embed"][0], dict(rtol=0, atol=1e-6))
    return net


def test_cm_golden_composed_generator():
    g = golden("cm/cmfunc_composed.pt")
    for case in g["outputs"]["cases"]:
        net = cm_composed(case)
        f = ConsistencyModel(net, cm_config(g["config"]))
        i = case["inputs"]
        out = case["outputs"]
        noisy = (i["x_t"], i["sigma"], i.get("y"))
        fed = (per_image(f.cfg.scalings(i["sigma"])[2]) * i["x_t"], noise_condition(i["sigma"]),
               i.get("y"))
        cm_close(net.predict.fuse(out["data_tokens"]), out["inr_tokens"])
        cm_compare_params(net.predict.weights(out["inr_tokens"]), out["params"])
        res = out["F_2n_by_n_plus_4"].shape[-2:]
        rgb = net.reconstruct(2 * i["x0"]).draw(net.cfg.size)
        agree(out, CM_FREQUENCY, data_tokens=net.extract(*fed), F=net(*fed), f=f(*noisy),
              F_2n_by_n_plus_4=net.function(*fed).draw(res),
              f_noskip_2n_by_n_plus_4=f.function(*noisy).draw(res),
              pretrain_rgb=rgb, pretrain_loss=F.mse_loss(rgb, i["x0"]))


# ==================================================================================================
# Data: data.py, landscapes.py
# ==================================================================================================


def data_picture(size: int, seed: int = 0) -> Image.Image:
    """Coarse random colours, enlarged: a picture that JPEG hardly changes."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def data_file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def data_folder(root: Path, content: dict[str, bytes]) -> Path:
    for name, file in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(file)
    return root


def data_pictures(n: int, size: int = 16, folder: str = "") -> dict[str, bytes]:
    return {f"{folder}{i:05d}.png": data_file(data_picture(size, i)) for i in range(n)}


def data_zip(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, file in content.items():
            archive.writestr(name, file)
    return path


def data_both(root: Path, content: dict[str, bytes]) -> tuple[Path, Path]:
    """The same files in a folder and in a zip."""
    return data_folder(root, content), data_zip(root.with_name(f"{root.name}.zip"), content)


def data_open(path: Path, split: str = "all"):
    return data.open_data(str(path), split)


def data_names(source) -> list[str]:
    return [Path(source[i].name).name for i in range(len(source))]


def data_name(picture, gen) -> dict:
    """An item that says which picture it is and what its generator gave."""
    return {"sum": int(picture.draw(16).sum(dtype=np.int64)), "random": gen.random()}


def data_take(n: int, *args, **kwargs) -> list[dict]:
    return list(itertools.islice(data.loader(*args, **kwargs), n))


def data_equal(a: list[dict], b: list[dict]) -> bool:
    def same(x, y) -> bool:
        return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)

    return len(a) == len(b) and all(map(same, a, b))


@contextlib.contextmanager
def data_permissions():
    """Permissions bind root, too, in this block: three capabilities of Linux are laid down."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()                           # its first number: those in effect
    libc.capget(header, held)
    before = held[0]
    held[0] &= ~0b1110                                       # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
    libc.capset(header, held)
    try:
        yield
    finally:
        held[0] = before
        libc.capset(header, held)


def test_random_numbers_belong_to_their_key_and_noise_between_two_lies_on_an_arc():
    keys = [(1,), ("1",), (1, 1), (11,), (-1,), ("a", "b"), ("ab",)]
    assert len({rng(*key).random() for key in keys}) == 7
    before = torch.get_rng_state()
    a, b = (torch_noise((4, 64, 64), 5, "x_T", i) for i in (2, 3))
    assert torch.equal(torch_noise((4, 64, 64), 5, "x_T", 2.0), a)
    assert abs(a.mean()) < 0.03 and abs(a.std() - 1) < 0.03
    middle = torch_noise((4, 64, 64), 5, "x_T", 2.5)
    assert torch.allclose(middle, (a + b) / math.sqrt(2), atol=1e-6)
    assert abs(middle.std() - 1) < 0.03                              # a line would give 0.71
    assert torch.equal(before, torch.get_rng_state())


def test_patch_golden():
    known = golden("infd/data_wrapper.pt")
    c = known["config"]
    cfg = data.DataConfig(size=c["resize_inp"], patch=c["final_crop_gt"],
                          max_size=c["resize_gt_ub"], smallest=c["resize_gt_lb"])
    pixels = known["inputs"]["image_uint8_hwc"].numpy()
    photo = data.Photo("golden", lambda: Image.fromarray(pixels))
    assert known["outputs"]["cases"]
    for case in known["outputs"]["cases"]:
        item = data.patch_at(photo, case["r"], case["ii"], case["jj"], cfg)
        item["cell"] = item["cell"].expand_as(item["coord"])
        for mine, published in ((item["image"], known["outputs"]["inp"]),
                                (item["patch"], case["gt"]), (item["coord"], case["gt_coord"]),
                                (item["cell"], case["gt_cell"])):
            assert mine.shape == published.shape
            assert (mine - published).abs().max() / published.std().clamp(min=0.1) < 1e-6


@pytest.mark.parametrize("flip", [False, True])
def test_a_patch_is_the_slice_of_the_resized_whole_at_its_coord(flip):
    photo = data.Photo("p", lambda: data_picture(90))
    cfg = data.DataConfig(size=16, patch=12, max_size=64, flip=flip)
    mirrored = 0
    for n in range(30):
        item = data.random_patch(photo, rng("patch", n), cfg)
        r = round(2 / item["cell"][0].item())
        grid = coord_grid((r, r))
        corner = (grid.reshape(-1, 2) == item["coord"][0, 0]).all(-1).nonzero()[0, 0]
        top, left = divmod(int(corner), r)
        box = slice(top, top + 12), slice(left, left + 12)
        whole = np.asarray(photo.image.resize((r, r), Image.Resampling.LANCZOS))
        plain = torch.equal(item["patch"], data.to_tensor(whole[box]))
        assert plain or torch.equal(item["patch"], data.to_tensor(whole[:, ::-1][box]))
        mirrored += not plain
        assert torch.equal(item["coord"], grid[box])
        small = photo.draw(16)
        assert torch.equal(item["image"], data.to_tensor(small if plain else small[:, ::-1]))
    assert 7 < mirrored < 23 if flip else mirrored == 0


@pytest.mark.parametrize("side", [1, 7, 333])
def test_a_box_of_a_photo_is_the_slice_of_all_of_it_bit_by_bit(side):
    gen = np.random.default_rng(side)
    noise = gen.integers(0, 256, (side, side, 3), dtype=np.uint8)
    photo = data.Photo("p", lambda: Image.fromarray(noise))
    for _ in range(15):
        res = int(gen.integers(1, 400))
        h, w = gen.integers(1, res + 1, 2).tolist()
        top, left = gen.integers((res - h + 1, res - w + 1)).tolist()
        whole = np.asarray(photo.image.resize((res, res), Image.Resampling.LANCZOS))
        assert (photo.draw(res) == whole).all()
        assert (photo.draw(res, (top, left, h, w)) == whole[top:top + h, left:left + w]).all()


def data_crops(n: int, side: int, **options) -> tuple[list[int], list[int]]:
    """Of n patches of a black picture: the ground truth's size, and the first row."""
    def draw(res, box=None):
        return np.zeros((*(box[2:] if box else (res, res)), 3), np.uint8)

    picture = types.SimpleNamespace(name="p", size=side, draw=draw)
    cfg = data.DataConfig(**{"size": 16, "patch": 16, "max_size": 64, **options})
    items = [data.random_patch(picture, rng("r", i), cfg) for i in range(n)]
    sizes = [round(2 / item["cell"][0].item()) for item in items]
    rows = [round((item["coord"][0, 0, 0].item() + 1) * r / 2 - 0.5)
            for item, r in zip(items, sizes)]
    return sizes, rows


def test_ground_truth_sizes_follow_the_options():
    def sizes(**options):
        return data_crops(120, 50, **options)[0]

    free = sizes()
    assert {16, 50} <= {*sizes(max_size=50), *free} and abs(np.mean(free) - 33) < 3
    assert set(sizes(downsample=False)) == {50}
    assert set(sizes(downsample=False, max_size=40)) == {40}
    assert 45 < sum(r == 50 for r in sizes(p_original=0.5)) < 78
    above = sizes(smallest=30)
    assert min(above) == 30 and max(above) == 50 and len(set(above)) > 15
    below = sizes(smallest=10, patch=8)                      # the encoder's input is 16
    assert 10 <= min(below) < 16 and max(below) == 50
    assert set(sizes(smallest=10, patch=8, p_whole=1)) == {16}
    for bad in ({"patch": 300}, {"smallest": 128}, {"smallest": 2000}, {"edge": -1},
                {"size": 128, "smallest": 256, "p_whole": 0.5}):
        with pytest.raises(ValueError, match="must hold"):
            data.DataConfig(**bad)


def test_with_edge_a_border_pixel_is_learnt_about_as_often_as_others():
    seen = {}
    for edge in (0, 6):
        rows = torch.zeros(24)
        for top in data_crops(400, 24, size=24, patch=8, max_size=24, edge=edge)[1]:
            rows[top:top + 8] += 1
        seen[edge] = rows / rows.mean()
    assert seen[0][0] < 0.25 and seen[0][-1] < 0.25          # one crop of 17
    assert all(0.5 < seen[6][row] < 1.1 for row in (0, 10, 12, -1))


def test_to_uint8_truncates_clamps_and_refuses_nan():
    x = torch.tensor([-9, -1, -0.9999, 0, 0.9999, 1, 9]).expand(2, 3, 1, 7)
    pixels = data.to_uint8(x)
    assert pixels.shape == (2, 1, 7, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0, :, 1].tolist() == [0, 0, 0, 127, 254, 255, 255]
    assert (data.to_tensor(data.to_uint8(x[0])) - x[0].clamp(-1, 1)).abs().max() < 2 / 255
    with pytest.raises(ValueError, match="NaN"):
        data.to_uint8(torch.full((3, 1, 1), float("nan")))


def test_batches_do_not_depend_on_workers_or_start(tmp_path):
    folder, packed = map(data_open, data_both(tmp_path / "all", data_pictures(40, 24)))
    cfg = data.DataConfig(size=16, patch=16, max_size=24)
    item = functools.partial(data.random_patch, cfg=cfg)
    whole = data_take(8, folder, item, 6, seed=3)
    assert torch.cat([b["index"] for b in whole]).tolist() == list(range(48))
    before = torch.get_rng_state()
    assert data_equal(whole, data_take(8, packed, item, 6, seed=3, workers=2))
    assert torch.equal(before, torch.get_rng_state())
    assert data_equal(whole[5:], data_take(3, folder, item, 6, start=5, seed=3, workers=1))
    sums = torch.cat([b["sum"] for b in data_take(24, folder, data_name, 5)]).view(-1, 40).tolist()
    assert len(set(sums[0])) == 40                           # each once in every epoch
    assert all(sorted(epoch) == sorted(sums[0]) for epoch in sums)
    assert len({tuple(epoch) for epoch in sums}) == len(sums) == 3


def test_two_ranks_see_the_samples_of_one_and_each_sample_its_own_noise():
    shapes = {"noise": (2, 3), "coord_noise": (4,)}
    take = functools.partial(data_take, 2, Landscapes("val"), data_name, 4, 5, 7, noise=shapes)
    one = take()
    two = [take(rank=rank, world=2) for rank in range(2)]
    assert data_equal(one, [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(*two)])
    assert one[0]["index"].tolist() == [20, 21, 22, 23]      # those of step 5
    for name, shape in shapes.items():
        assert torch.equal(one[1][name][3], torch_noise(shape, 7, name, 27))
    with pytest.raises(ValueError, match="9 cannot be shared by 2"):
        data_take(1, Landscapes("val"), data_name, 9, world=2)


def test_a_corrupt_image_is_replaced_by_the_next_and_named(tmp_path):
    content = data_pictures(60)
    content["00007.png"] = content["00007.png"][:60]
    source = data_open(data_folder(tmp_path, content))
    with pytest.warns(UserWarning, match=r"skipped image: .*00007\.png") as caught:
        batches = data_take(6, source, data_name, 10)
    assert len(caught) == 1
    at = data._order(0, 0, 60).tolist().index(7)
    sums = torch.cat([b["sum"] for b in batches]).tolist()
    assert sums[at] == sums[(at + 1) % 60] and len(sums) == 60
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert data_equal(batches, data_take(6, source, data_name, 10, workers=2))


def test_an_image_smaller_than_the_input_is_skipped_and_named(tmp_path):
    """One among many; where all are so small, the cause is the last word."""
    folder = data_folder(tmp_path / "a", data_pictures(60, 24) | {"00007.png": data_file(
        data_picture(15))})
    item = functools.partial(data.random_patch, cfg=data.DataConfig(16, 8, 24))
    with pytest.warns(UserWarning, match="skipped image: .*00007.png is 15 px, smaller than the in"):
        batches = data_take(6, data_open(folder), item, 10)
    assert [len(batch["image"]) for batch in batches] == 6 * [10]
    small = data_folder(tmp_path / "b", data_pictures(20, 15))
    with warnings.catch_warnings(), pytest.raises(data.DataError, match="train with size=15"):
        warnings.simplefilter("ignore")
        data_take(6, data_open(small), item, 10)


def test_many_corrupt_images_stop_the_run(tmp_path):
    bad = [f"{i:05d}.png" for i in range(0, 100, 20)]
    source = data_open(data_folder(tmp_path, data_pictures(100) | dict.fromkeys(bad, b"none")))
    message = r"1\d of the first \d+ images.*--check-data"
    with warnings.catch_warnings(), pytest.raises(data.DataError, match=message) as caught:
        warnings.simplefilter("ignore")
        data_take(100, source, data_name, 4, workers=1)
    assert "\n" not in str(caught.value)
    assert [Path(name).name for name, _ in data.check_data(source)] == bad


class DataOwn:
    """What a user writes: PIL images, wider than high, classes and captions."""

    classes = ["thin", "thick"]

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> Image.Image:
        return data_picture(40, i).crop((0, 0, 40, 30))

    def label(self, i: int) -> int:
        return i % 2

    def caption(self, i: int) -> str:
        return f"number {i}"


def test_a_data_set_class_of_ones_own_is_enough():
    own = data.as_source(DataOwn())
    assert own[2].size == 30 and own[2].draw(8).shape == (8, 8, 3)
    item = functools.partial(data.random_patch, cfg=data.DataConfig(16, 8, 30))
    batch = next(data.loader(own, item, 5, workers=1, captions=True))
    order = data._order(0, 0, 5).tolist()
    assert batch["patch"].shape == (5, 3, 8, 8)
    assert batch["label"].tolist() == [i % 2 for i in order]
    assert batch["caption"] == [f"number {i}" for i in order]
    assert data.as_source(own) is own
    plain = data.as_source([(data_picture(8), 1)])
    assert plain[0].draw(8).shape == (8, 8, 3) and plain.label(0) == 0 and plain.caption(0) == ""
    assert data.fingerprint(plain) != data.fingerprint(own)
    with pytest.raises(data.DataError, match="empty"):
        data_take(1, data.as_source([]), data_name, 1)


def test_class_folders_are_labels_and_zip_equals_folder(tmp_path):
    content = {}
    for k, c in enumerate("cab"):
        content |= {f"{c}/{i}.png": data_file(data_picture(8, 10 * k + i)) for i in range(3)}
    folder = data_open(data_folder(tmp_path / "set", content))
    windows = {name.replace("/", "\\"): file for name, file in content.items()}
    wrapped = {f"set/{name}": file for name, file in content.items()}
    for k, packing in enumerate((content, windows, wrapped)):
        packed = data_open(data_zip(tmp_path / f"set{k}.zip", packing))
        assert folder.classes == packed.classes == ("a", "b", "c")
        assert folder.labels == packed.labels == [0] * 3 + [1] * 3 + [2] * 3
        assert all((folder[i].draw(8) == packed[i].draw(8)).all() for i in range(9))
        assert (data.fingerprint(folder) == data.fingerprint(packed)) == (packing is not wrapped)
    again = pickle.loads(pickle.dumps(packed))
    assert (again[3].draw(8) == packed[3].draw(8)).all(), "a worker gets its own handle"


OUTSIDE = "3 outside the official folder"
ORIGINALS = ["images1024x1024/00000/00001.png", "images1024x1024/59000/59999.png",
             "images1024x1024/60000/60000.png"]
THUMBNAILS = [name.replace("images1024x1024", "thumbnails128x128") for name in ORIGINALS]
CELEBA = [f"{folder}/{i:06d}.jpg" for i in (1, 2, 3)
          for folder in ("img_align_celeba/img_align_celeba", "img_celeba")]


@pytest.mark.parametrize("files, held_out, classes, passed_over", [
    (["a/b/1.png", "c/d/1.png"], None, (), ""),              # no classes: two levels; one folder;
    (["only/1.png", "only/2.png"], None, (), ""),
    (["00000/1.png", "01000/1.png"], None, (), ""),          # pieces of a set; files beside folders
    (["a/1.png", "b/1.png", "c.png"], None, (), ""),
    *(([f"{train}/x/1.png", f"{train}/y/1.png", f"{held}/x/2.png", f"{held}/y/3.png"],      # case 2
       ["2.png", "3.png"], ("x", "y"), "")
      for train, held in (("train", "test"), ("Train", "valid"), ("TRAIN", "Validation"))),
    (["train/x/1.png", "train/y/1.png", "test/x/2.png", "val/x/3.png", "more/x/4.png"],
     ["3.png"], ("x", "y"), "2 neither in train nor in val"),
    ([*ORIGINALS, *THUMBNAILS], ["60000.png"], (), OUTSIDE),                                # case 6
    (ORIGINALS, ["60000.png"], (), ""),
    ([*ORIGINALS, *THUMBNAILS, ("ffhqvalidation.txt", b"00001.png\n59999.png\n")],
     ["00001.png", "59999.png"], (), OUTSIDE),
    ([*CELEBA, ("list_eval_partition.txt", b"000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n")],
     ["000002.jpg", "000003.jpg"], (), OUTSIDE),
    ([*CELEBA, ("list_eval_partition.csv",                   # Kaggle's
                b"image_id,partition\r\n000001.jpg,1\r\n000002.jpg,0\r\n000003.jpg,2\r\n")],
     ["000001.jpg", "000003.jpg"], (), OUTSIDE),
    (["1.png", ("notes.txt", b""), ("old/1.bmp", b""), ("2.TIF", b""), ".y.png", "a/.cache/x.jpg",
      "old/__MACOSX/._1.png", (".DS_Store", b"")],
     None, (), "2 .bmp, .tif (PNG, JPEG and WEBP are read), 3 hidden")])
def test_sets_are_split_and_classed_as_people_lay_them_out(
        tmp_path, files, held_out, classes, passed_over):
    image = data_file(data_picture(8))
    content = dict(file if isinstance(file, tuple) else (file, image) for file in files)
    for root in data_both(tmp_path / "set", content):
        train = data_open(root, "train")
        assert train.classes == classes and train.passed_over == passed_over
        if held_out is not None:
            val = data_open(root, "val")
            assert data_names(val) == held_out and not set(held_out) & set(data_names(train))
            assert val.classes == classes
            assert val.labels == (list(range(len(val))) if classes else [0] * len(val))


def test_a_set_without_pictures_says_what_it_passed_over(tmp_path):
    only = data_folder(tmp_path / "only", {"a.heic": b"", "b.avif": b""})
    with pytest.raises(data.DataError, match=r"holds no .*passed over: 2 \.avif, \.heic \(PNG"):
        data_open(only)


def test_a_picture_is_held_out_by_its_own_name(tmp_path):
    image = data_file(data_picture(8))
    root = data_folder(tmp_path / "plain", {f"{i}.png": image for i in range(400)})
    train, val, both = (data_names(data_open(root, split)) for split in ("train", "val", "all"))
    assert len(both) == 400 and sorted(train + val) == sorted(both) and 8 <= len(val) <= 35
    data_folder(root, {f"new/{i}.jpg": image for i in range(400)} | {"0a.png": image})
    grown = data_names(data_open(root, "val"))
    assert set(val) <= set(grown) and not set(grown) & set(train) and len(grown) > len(val)
    for n in range(4, 40, 5):                                # a small set has held-out pictures too
        few = data_folder(tmp_path / f"few{n}", {f"{n}-{i}.png": image for i in range(n)})
        assert 1 <= len(data_open(few, "val")) <= max(1, n // 3)
    few = data_folder(tmp_path / "three", {f"{i}.png": image for i in range(3)})
    with pytest.raises(data.DataError, match="none of its 3 pictures"):
        data_open(few, "val")


def test_case_9_stylegan_and_edm_labels_are_classes(tmp_path):
    names = [f"00000/img{i:05d}.png" for i in range(6)]

    def listed(content: object, where: str = "") -> dict[str, bytes]:
        pictures = data_pictures(6, 8, f"{where}00000/img")
        return pictures | {f"{where}dataset.json": json.dumps(content).encode()}

    labels = {"labels": [[name, 2 * (i % 3)] for i, name in enumerate(names)]}
    for root in (data_folder(tmp_path / "set", listed(labels)),
                 data_zip(tmp_path / "wrapped.zip", listed(labels, "set/"))):
        source = data_open(root)
        assert source.classes == ("0", "2", "4") and source.labels == [0, 1, 2, 0, 1, 2]
    cameras = {"labels": [[name, [0.5, 0.2]] for name in names]}               # EG3D's
    for none in ({"labels": None}, {"labels": []}, {"pictures": 3}, cameras):
        assert data_open(data_folder(tmp_path / "set", listed(none))).classes == ()
    for bad in ({"labels": [[name, 0] for name in names[:4]]}, {"labels": 7}, [1],
                {"labels": [[3, 3]]}, {"labels": [["a"]]}):
        with pytest.raises(data.DataError, match=r"dataset\.json is damaged or incomplete"):
            data_open(data_folder(tmp_path / "set", listed(bad)))


def test_6k_mix_halves_its_draws_between_small_and_large():
    photo = data.Photo("p", lambda: data_picture(300))
    mix = data.SixKMix(data.Source([photo] * 7000))
    drawn = np.array([mix.pick(rng(n)) for n in range(1000)])
    assert len(mix) == 13_000 and 440 < (drawn < 7000).sum() < 560
    assert drawn.max() < 13_000 and len(set(drawn.tolist())) > 800
    assert [mix[i].size for i in (5, 7000, 12_999)] == [256, 512, 1024]
    item = data.random_patch(mix[5], rng(0), data.DataConfig())
    assert torch.equal(item["image"], item["patch"]) and item["cell"].tolist() == [2 / 256] * 2
    batch = next(data.loader(mix, lambda picture, gen: {}, 4))
    assert batch["index"].tolist() == [0, 1, 2, 3]
    with pytest.raises(data.DataError, match="6000"):
        data.SixKMix(data.Source([photo] * 5999))
    known = golden("infd/ffhq_mix6000_sizes.pt")
    sizes = [data.mix_size(i) for i in known["inputs"]["index"].tolist()]
    assert sizes == known["outputs"]["size"].tolist()


def test_names_resolve_and_missing_data_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="data/ffhq.zip.*elsewhere.*--data synthetic"):
        data.open_data("ffhq")
    data_folder(tmp_path / "elsewhere/lsun-church", data_pictures(3))
    assert len(data.open_data("lsun-church", "all")) == 3
    (tmp_path / "data").mkdir()
    data_zip(tmp_path / "data/lsun-church.zip", data_pictures(2))
    assert len(data.open_data("lsun-church", "all")) == 2
    pictures = dict.fromkeys(["59999.png", "60000.png"], data_file(data_picture(8)))
    for path in ("data/ffhq", "far/images1024x1024/60000"):  # known by its name, or by the folder's
        data_folder(tmp_path / path, pictures)
    for name in ("ffhq", "data/ffhq", "far/images1024x1024", "far/images1024x1024/60000"):
        assert data_names(data.open_data(name, "val")) == ["60000.png"]
    (tmp_path / "fake.zip").write_bytes(b"this is no zip")
    with pytest.raises(data.DataError, match="not a readable zip"):
        data.open_data("fake.zip")


def test_case_3_pictures_are_known_by_content_not_by_path(tmp_path, monkeypatch):
    content = data_pictures(8, 12, "a/") | data_pictures(8, 14, "b/")
    root = data_folder(tmp_path / "set", content)
    known = data.fingerprint(data_open(root))
    assert known["pictures"] == 16 and re.fullmatch("[0-9a-f]{64}", known["digest"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("set")
    for path in ("set", "./set/", "link", str(root)):
        assert data.fingerprint(data.open_data(path, "all")) == known
    (root / "a/00000.png").write_bytes(content["a/00000.png"] + b"x")
    assert data.fingerprint(data_open(root)) != known
    (root / "a/00000.png").write_bytes(content["a/00000.png"])
    (root / "a/00000.png").rename(root / "b/00008.png")
    assert data.fingerprint(data_open(root)) != known


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
def test_names_behind_which_there_is_no_file_are_skipped_as_bad_pictures(tmp_path):
    """A link to nothing, as annexes have, a pipe and a device, which would never end."""
    root = data_folder(tmp_path / "set", data_pictures(3))
    (root / "gone.png").symlink_to("nowhere.png")
    (root / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.png")
    source = data_open(root)
    assert data.fingerprint(source)["pictures"] == 6
    said = {Path(name).name: why for name, why in data.check_data(source)}
    assert said == {"gone.png": "No such file or directory", **dict.fromkeys(
        ["pipe.png", "zero.png"], "a pipe or a device, not a file")}



def test_case_1_linked_folders_are_followed_once_and_loops_end(tmp_path):
    image = data_file(data_picture(8))
    data_folder(tmp_path / "set", {f"{c}/{c}{i}.png": image for c in "xyz" for i in range(4)})
    root = data_folder(tmp_path / "linked", {f"z/z{i}.png": image for i in range(4)})
    for name, target in (("x", "../set/x"), ("y", "../set/y"), ("a", "z"), ("z/up", ".."),
                         ("z/twin", "../../set/x"), ("out", "../.."), ("again", "../set/x"),
                         ("self", "self")):
        (root / name).symlink_to(target)
    (root / "x.png").symlink_to("../set/x/x0.png")
    assert data.Files(root).pictures == [
        "again/x0.png", "again/x1.png", "again/x2.png", "again/x3.png", "x.png",
        *(f"{c}/{c}{i}.png" for c in "yz" for i in range(4))]
    (root / "again").unlink()
    (root / "x.png").unlink()
    source = data_open(root)
    assert source.classes == ("x", "y", "z") and len(source) == 12
    assert data.fingerprint(source) == data.fingerprint(data_open(tmp_path / "set"))


def test_case_4_names_that_are_not_utf_8_are_shown_escaped(tmp_path, capsys):
    root = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(root)
    for i in range(6):
        with open(root + b"/\xe9\n%d.png" % i, "wb") as file:
            file.write(data_file(data_picture(8, i)) if i else b"broken")
    (name, reason), = data.check_data(data.open_data(os.fsdecode(root), "all"))
    assert name.endswith(r"caf\udce9/\udce9\n0.png") and reason == "not a PNG, JPEG or WEBP image"
    assert data_prepare(os.fsdecode(root), tmp_path / "copy", "--size", 8, "--workers", 0) == 0
    said = capsys.readouterr().out                           # strict UTF-8, as a terminal's
    assert "5 pictures of 8 px" in said and "1 skipped" in said
    assert r"caf\udce9/\udce9\n0.png: not a PNG" in said
    assert len(data_open(tmp_path / "copy")) == 5


def test_case_7_files_without_permission_are_one_line_with_the_true_cause(tmp_path):
    image = data_file(data_picture(8))
    root = data_folder(tmp_path / "set", {f"{c}/{i}.png": image for c in "xyz" for i in range(4)})
    packed = data_zip(tmp_path / "set.zip", {"a.png": image})
    for path in (root / "y", root / "z/1.png", packed):
        path.chmod(0)
    with data_permissions():
        source = data_open(root)
        assert len(source) == 8 and source.passed_over == f"1 without permission ({root}/y)"
        assert data.check_data(source) == [(f"{root}/z/1.png", "Permission denied")]
        with pytest.raises(ValueError, match="set.zip is not a readable zip: Permission denied"):
            data_open(packed)
    (root / "y").chmod(0o700)


def test_captions_lie_beside_the_pictures_or_in_a_list(tmp_path):
    content = data_pictures(4, 8, "a/") | data_pictures(3, 9, "b/")
    rows = [{"file_name": "00000.png", "text": " two\n words "}, {"file_name": "./00001.png"}]
    content["a/metadata.jsonl"] = "\n".join(map(json.dumps, rows)).encode() + b"\n\n"
    content |= {"a/00001.txt": "\ufeffsnow at dusk\n".encode(), "b/00002.txt": b"  a lake "}
    wanted = ["two words", "snow at dusk", "", "", "", "", "a lake"]
    for root in data_both(tmp_path / "set", content):
        source = data_open(root)
        assert [source.caption(i) for i in range(7)] == wanted
        batch = next(data.loader(source, data_name, 7, captions=True, workers=1))
        assert batch["caption"] == [wanted[i] for i in data._order(0, 0, 7)]
        data.prepare(str(root), tmp_path / f"{root.name}8", 8)
        copy = data_open(tmp_path / f"{root.name}8")
        kept = {source[i].draw(8).tobytes(): wanted[i] for i in range(7)}
        assert all(copy.caption(i) == kept[copy[i].draw(8).tobytes()] for i in range(7))
    for file, content, said in (
            ("metadata.jsonl", b"{", "is damaged: .*; mend or remove it"),
            ("metadata.jsonl", b'{"text": "no name"}', "is damaged: 'file_name'; mend"),
            ("metadata.jsonl", b'{"file_name": "8.png"}\n{"file_name": "../b/9.png"}',
             "names 2 pictures that are not there, the first a/8.png")):
        (tmp_path / "set/a" / file).write_bytes(content)
        with pytest.raises(data.DataError, match=f"{file}.*{said}"):
            data_open(tmp_path / "set").caption(1)

    # A caption that cannot be read costs itself alone: neither its picture nor the run.
    (tmp_path / "set/a/metadata.jsonl").unlink()
    (tmp_path / "set/a/00001.txt").write_bytes(b"\xff\xfe")
    source = data_open(tmp_path / "set")
    with pytest.warns(UserWarning, match="a caption is left out: .*00001.txt.*invalid start byte"):
        assert source.caption(1) == ""
    (name, said), = data.check_data(source)
    assert name.endswith("00001.png") and "00001.txt" in said


def data_prepare(*args) -> int:
    return data.main(["prepare", *map(str, args)])


@pytest.fixture(scope="module")
def data_prepared(tmp_path_factory) -> tuple[Path, Path]:
    """60 odd-shaped pictures in three classes, as a zip and prepared at 16 px."""
    root = tmp_path_factory.mktemp("prepared")
    content = {}
    for i in range(60):
        wide = data_picture(40, i).crop((0, i % 5, 40 - i % 7, 40))
        part = "val" if i % 4 == 3 else "train"
        content[f"{part}/{'abc'[i % 3]}/{i:05d}.jpg"] = data_file(wide, "JPEG", quality=95)
    source = data_zip(root / "set.zip", content)
    assert data_prepare(source, root / "set16", "--size", 16, "--workers", 2) == 0
    return source, root / "set16"


def test_a_prepared_set_gives_the_batches_of_its_source(data_prepared):
    whole = functools.partial(data.whole_item, size=16, flip=True)
    for split, n in (("train", 45), ("val", 15)):
        source, copy = (data_open(path, split) for path in data_prepared)
        assert len(source) == len(copy) == n and source.classes == copy.classes == ("a", "b", "c")
        batches = data_take(12, source, whole, 5, seed=2)
        assert data_equal(batches, data_take(12, copy, whole, 5, seed=2, workers=n % 2))
    both = data_open(data_prepared[1])
    assert len(both) == 60 and both.labels[45:] == copy.labels
    assert (both[45].draw(16) == copy[0].draw(16)).all()
    again = pickle.loads(pickle.dumps(both))
    assert isinstance(both.pixels, np.memmap) and len(pickle.dumps(both)) < 4000
    assert (again[0].draw(16) == both[0].draw(16)).all()
    with pytest.raises(data.DataError, match="was prepared at 16 px, not 32"):
        both[0].draw(32)
    with pytest.raises(data.DataError, match="was prepared at 16 px, not 32"):
        data.random_patch(both[0], rng(0), data.DataConfig(size=16, patch=16, max_size=32))


def test_an_interrupted_preparation_leaves_nothing_and_starts_again(
        data_prepared, tmp_path, monkeypatch, capsys):
    seen = []
    exif_transpose = files.ImageOps.exif_transpose

    def interrupted(image):
        if len(seen) == 40:
            os.kill(os.getpid(), signal.SIGTERM)             # while a file is being decoded
        seen.append(image)
        return exif_transpose(image)

    args = data_prepared[0], tmp_path / "copy", "--size", 16, "--workers", 0
    with monkeypatch.context() as patch:
        patch.setattr(files.ImageOps, "exif_transpose", interrupted)
        assert data_prepare(*args) == 143
    assert "starts again" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert data_prepare(*args) == 0
    for name in ("pixels.u8", "meta.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (data_prepared[1] / name).read_bytes()
    assert data_prepare(*args) == 2 and "exists" in capsys.readouterr().err


def test_damage_to_a_prepared_set_is_named(data_prepared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data_prepared[1], copy)
    assert data.check_data(data_open(copy)) == []
    pixels = (copy / "pixels.u8").read_bytes()
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "pixels.u8").write_bytes(pixels[:1000] + bytes([pixels[1000] ^ 1]) + pixels[1001:])
    (name, reason), = data.check_data(data_open(copy))       # opening looks at the size alone
    assert name == f"{copy}/pixels.u8" and "SHA-256" in reason
    for change in ({"format": 1}, {"train": 7}, {"train": [[0, ""]] * 9}, {"train": [3]},
                   {"size": None}, {"size": -16}, {"size": 1e999}, {"classes": None}):
        (copy / "meta.json").write_text(json.dumps(meta | change))
        with pytest.raises(data.DataError, match="copy is damaged.*prepare the set again"):
            data_open(copy)


def data_cifar(root: Path, monkeypatch) -> np.ndarray:
    """CIFAR-10's files with six pictures each; torchvision is told their MD5."""
    official = data.import_torchvision().datasets.CIFAR10
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    batch = pickle.dumps({"data": pixels, "labels": [3, 1, 4, 1, 5, 9]})
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
             "truck"]
    content = {f"data_batch_{i}": batch for i in range(1, 6)} | {"test_batch": batch}
    data_folder(root, content | {"batches.meta": pickle.dumps({"label_names": names})})
    sums = {name: hashlib.md5((root / name).read_bytes()).hexdigest() for name in os.listdir(root)}
    listed = sorted([name, sums[name]] for name in content if name.startswith("data_batch"))
    monkeypatch.setattr(official, "train_list", listed)
    monkeypatch.setattr(official, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(official, "meta", official.meta | {"md5": sums["batches.meta"]})
    return pixels


def test_cifar_batches(tmp_path, monkeypatch):
    pixels = data_cifar(tmp_path / "cifar-10-batches-py", monkeypatch)
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        train = data_open(root, "train")
        val = data_open(root, "val")
        assert (len(train), len(val)) == (30, 6)
        assert train.classes[train.label(2)] == "deer" and train.caption(2) == ""
        assert [val.label(i) for i in range(6)] == [3, 1, 4, 1, 5, 9]
        assert (train[7].draw(32).transpose(2, 0, 1).reshape(-1) == pixels[1]).all()
        assert data.fingerprint(train) != data.fingerprint(val)
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"\x80\x04.")
    with pytest.raises(data.DataError, match="as published.*MD5"):
        data_open(tmp_path)                                  # a pickle could run anything


def test_torchvision_of_another_build_is_imported(tmp_path, monkeypatch):
    """One that asks for operators its torch lacks; they are declared, and it loads."""
    declared = []
    monkeypatch.setattr(torch.library, "define", lambda name, schema: declared.append(name))
    monkeypatch.setattr(torch.library, "declared", declared, raising=False)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision.py").write_text(
        "import torch\n"
        "if not torch.library.declared:\n"
        "    raise RuntimeError('operator torchvision::nms does not exist')\n")
    del sys.modules["torchvision"]
    assert data.import_torchvision().__file__ == str(tmp_path / "torchvision.py")
    assert declared == ["torchvision::nms", "torchvision::qnms"]


def data_grey_png(side: int, body: bytes) -> bytes:
    """A PNG of side x side grey pixels around any compressed body."""
    made = b"\x89PNG\r\n\x1a\n"
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    for kind, part in ((b"IHDR", head), (b"IDAT", body), (b"IEND", b"")):
        made += struct.pack(">I", len(part)) + kind + part
        made += struct.pack(">I", zlib.crc32(kind + part))
    return made


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_must_not_be_decoded_are_refused(tmp_path, monkeypatch):
    """Bombs (F16) and what else ends before any decoding; truncated files (F15) are refused too."""
    jpeg = data_file(data_picture(200), "JPEG", quality=95)
    black = zlib.compress(bytes(10**6))
    content = {"bomb30000.png": data_grey_png(30_000, black), "text.png": b"hello",
               "bomb9000.png": data_grey_png(9_000, black), "empty.png": b"", "deep.png": b"short",
               "gif.png": data_file(data_picture(20).convert("P"), "GIF"),
               "cut.jpg": jpeg[:len(jpeg) // 2], "cut.png": data_file(data_picture(200))[:-300]}
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, file in content.items():
            archive.writestr(name, file)
        archive.getinfo("deep.png").file_size = 2**28 + 1    # as the list at the end says it
    loaded = []
    monkeypatch.setattr(files.ImageOps, "exif_transpose",
                        lambda image: loaded.append(image.size) or image)
    source = data_open(tmp_path / "set.zip")
    bad = {Path(name).name: reason for name, reason in data.check_data(source)}
    assert bad.keys() == content.keys()
    assert "pixels" in bad["bomb9000.png"] and "truncated" in bad["cut.jpg"]
    assert "not a PNG, JPEG or WEBP" in bad["gif.png"] and "larger than" in bad["deep.png"]
    assert set(loaded) == {(200, 200)}, "only the truncated files got as far as decoding"


def data_opened(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    return np.asarray(data.decode(data_file(image, kind, **options))).astype(int)


def test_every_kind_of_image_becomes_rgb():
    rgb = data_picture(40)
    grey = np.asarray(rgb.convert("L"))[..., None]
    steps = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    clear = np.arange(40) < 20                               # the left half
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(np.uint8(255 * np.tile(~clear, (40, 1)))))
    palette = rgb.quantize(8)
    first = np.asarray(palette)[0, 0]
    hole = (np.asarray(palette) == first)[..., None]
    coloured = np.asarray(palette.convert("RGB"))
    for opened, want in (
            (data_opened(rgb, "WEBP", lossless=True), np.asarray(rgb)),
            (data_opened(rgb.convert("L")), grey),
            (data_opened(Image.fromarray(steps)), np.round(steps / 257)[..., None]),   # not clipped
            (data_opened(rgb.convert("1")), 255 * np.asarray(rgb.convert("1"))[..., None]),
            (data_opened(alpha), np.where(clear[:, None], 255, np.asarray(rgb))),
            (data_opened(alpha.convert("LA")), np.where(clear[:, None], 255, grey)),
            (data_opened(palette, transparency=int(first)), np.where(hole, 255, coloured))):
        assert (opened == want).all()
    cmyk = rgb.convert("CMYK")
    exif = Image.Exif()
    exif[0x0112] = 6                                         # turn by 90 degrees to the right
    for opened, want in ((data_opened(cmyk, "JPEG", quality=100), cmyk.convert("RGB")),
                         (data_opened(rgb, "JPEG", exif=exif, quality=98), rgb.rotate(-90))):
        assert np.abs(opened - np.asarray(want)).mean() < 4


def data_damage(content: bytes, n: int) -> bytes:
    """Damage number n: a cut, a part doubled, some bytes at random, zeroed, or set to 255."""
    gen = np.random.default_rng((len(content), n))
    at = int(gen.integers(min(len(content), 200) if n % 2 else len(content)))
    width = int(gen.integers(1, 9))
    middle = (b"", content[at // 2:at], gen.bytes(width), bytes(width), b"\xff" * width)[n % 5]
    return content[:at] + middle + content[at + (width if n % 5 > 1 else 0):] * (n % 5 > 0)


def data_peak():
    """The most memory held so far, in kB; 0 where Linux does not say it."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else "")
    return int(found[1]) if found else 0


def test_damaged_files_are_refused_by_one_line(tmp_path, n=15):
    """One of the files of a set, or the zip as a whole."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = data_picture(48)
    content = {"0.png": data_file(picture), "1.jpg": data_file(picture, "JPEG", exif=exif),
               "2.webp": data_file(picture, "WEBP"),
               "3.png": data_file(picture.quantize(9), transparency=1)}
    labels = json.dumps({"labels": [[name, i] for i, name in enumerate(content)]})
    rows = [json.dumps({"file_name": name, "text": "snow"}) for name in list(content)[:2]]
    content |= {"metadata.jsonl": "\n".join(rows).encode(), "dataset.json": labels.encode(),
                "2.txt": "fog, \u5c71".encode(), "3.txt": b"a lake"}
    refused = 0
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")                        # the peak is what is held now
    held = data_peak()
    for k, name in itertools.product(range(n), [*content, "set.zip"]):
        root = data_zip(tmp_path / "set.zip",
                        content | {name: data_damage(content.get(name, b"-"), k)})
        if name == root.name:
            root.write_bytes(data_damage(data_zip(root, content).read_bytes(), k))
        try:
            source = data_open(root)
            for i in range(len(source)):
                assert "\n" not in source.caption(i)
                source[i].draw(8)
        except data.DataError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 4 * n
    assert data_peak() - held < 2**18                # 256 MB


@slow
def test_a_thousand_damaged_files_of_each_kind(tmp_path):
    test_damaged_files_are_refused_by_one_line(tmp_path, 1000)


def test_scenes_are_what_the_bundled_weights_were_trained_on():
    """Four pixels of each, and its words; another numpy may round the last bit another way."""
    known = {
        0: ([[130, 138, 185], [204, 180, 200], [116, 106, 115], [60, 65, 47]],
            "snow-capped mountains at dawn in summer, scattered clouds, conifers"),
        1: ([[64, 111, 189], [145, 176, 218], [114, 151, 160], [29, 61, 50]],
            "snow-capped mountains by day in summer, scattered clouds, conifers, a lake, mist"),
        2: ([[146, 106, 108], [162, 99, 86], [115, 80, 111], [96, 77, 113]],
            "snowy mountains at dusk in winter, scattered clouds, conifers, a lake"),
        59: ([[5, 13, 37], [22, 36, 68], [45, 60, 82], [32, 36, 29]],
             "snow-capped mountains at night in autumn, scattered clouds, conifers"),
    }
    for i, (pixels, caption) in known.items():
        scene = Landscapes()[i]
        drawn = scene.draw(64)[8::16, 8::16].reshape(-1, 3)[[0, 5, 10, 15]].astype(int)
        assert np.abs(drawn - pixels).max() <= 1 and scene.caption() == caption


def test_scenes_are_pure_and_windows_are_slices():
    source = Landscapes()
    for i in (1, 3):                                         # a lake, stars
        whole = source[i].draw(150)
        assert whole.shape == (150, 150, 3) and whole.dtype == np.uint8
        assert (whole == source[i].draw(150)).all() and whole.std() > 12
        assert (source[i].draw(150, (61, 17, 70, 99)) == whole[61:131, 17:116]).all()
        assert (source[i].draw(150, (149, 0, 1, 150)) == whole[149:]).all()
    assert source[0].draw(1).shape == (1, 1, 3)
    assert source[0].draw(3000, (2900, 10, 5, 6)).shape == (5, 6, 3)
    assert len({source[i].draw(16).tobytes() for i in range(40)}) == 40


def test_scene_classes_captions_and_splits():
    train = data.open_data("synthetic")
    val = data.open_data("synthetic", "val")
    assert (len(train), len(val), train.classes) == (50_000, 10_000, TIMES)
    for source in (train, val):
        labels = [source.label(i) for i in range(len(source))]
        assert np.bincount(labels).tolist() == [len(source) // 4] * 4
        assert all(source.classes[source.label(i)] in source.caption(i) for i in range(20))
    assert not {train[i].name for i in (0, 49_999)} & {val[i].name for i in (0, 9_999)}
    for i in range(4):                                       # the same at every size: 28 dB
        halved = val[i].draw(256).reshape(128, 2, 128, 2, 3).mean((1, 3))
        assert np.mean((halved - val[i].draw(128)) ** 2) < 255**2 / 10**2.8


# ==================================================================================================
# From a prompt or a file of others to a picture: text.py, published.py
# ==================================================================================================

def text_fits(make, weights, parameters):
    """make() has tensors of exactly these names and shapes, and so many numbers."""
    with torch.device("meta"):
        own = make().state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in weights.items()}
    assert sum(v.numel() for v in own.values()) == parameters


def text_autoencoder(weights):
    """The autoencoder of tensors with LDM's or diffusers' names."""
    ours = our_autoencoder(weights)
    return loaded(lambda: FieldAutoencoder(autoencoder_config(ours)), ours)


def text_decoded(autoencoder, z):
    phi = autoencoder.decode(z)
    return autoencoder.field(z).draw(tuple(phi.shape[-2:]))


# ---- words ----

def test_text_words_and_pieces_follow_clip():
    assert clean("  A\u00a0&amp;amp; B\n\tC ") == "a & b c"
    assert clean("cafe\u0301 \u0130") == "caf\u00e9 i\u0307"
    assert clean("a\x1cb") == "a\x1cb"                               # no white space to Unicode
    assert split("it's 'tis don't") == ["it", "'s", "'t", "is", "don", "'t"]
    assert split("2048 4k a_b!!") == ["2", "0", "4", "8", "4", "k", "a", "_", "b", "!!"]
    assert split("<|endoftext|>a <|end") == ["<|endoftext|>", "a", "<|", "end"]
    assert split("") == []

    tokenizer = CLIPTokenizer([("a", "a"), ("b", "c</w>"), ("aa", "aa")])
    assert tokenizer.pieces("aaaaab") == ["aaaa", "a", "b</w>"]      # the lowest pair everywhere
    assert tokenizer.pieces("aabc") == ["aa", "bc</w>"]
    assert CLIPTokenizer([("b", "c"), ("a", "b")]).pieces("abcd") == ["a", "bc", "d</w>"]
    assert len(tokenizer) == 512 + 3 + 2


def test_text_golden_clip_byte_table():
    config = golden("text/clip_bpe.json")["config"]
    tokenizer = CLIPTokenizer([])
    table = [[byte, ord(symbol)] for byte, symbol in tokenizer.symbols.items()]
    assert table == config["byte_to_unicode_in_vocabulary_order"]
    for number, (byte, symbol) in enumerate(table):
        assert tokenizer.ids[chr(symbol)] == number
        assert tokenizer.ids[chr(symbol) + "</w>"] == 256 + number


def test_text_golden_clip_bpe():
    """Needs the published merges: beside the golden file, or where CLIP_MERGES says."""
    data = golden("text/clip_bpe.json")
    config = data["config"]
    try:
        merges = read_merges(GOLDEN / "text", os.environ.get("CLIP_MERGES"))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = CLIPTokenizer(merges, config["context_length"])
    assert (len(tokenizer), tokenizer.start, tokenizer.end) == (
        config["vocab_size"], config["start_id"], config["end_id"])
    for case in data["cases"]:
        assert tokenizer.encode(case["text"]) == case["differs"].get("html_nfc", case["ids"])
        if not {"html_nfc", "hf_slow"} & set(case["differs"]):
            assert tokenizer([case["text"]])[0].tolist() == case["sd77"]


def test_text_golden_clip_bpe_tiny():
    data = golden("text/clip_bpe_tiny.json")
    config = data["config"]
    tokenizer = CLIPTokenizer(data["merges"], config["context_length"])
    again = tokenizer_from(json.loads(json.dumps(tokenizer.state())))
    assert (len(tokenizer), tokenizer.start, tokenizer.end) == (
        config["vocab_size"], config["start_id"], config["end_id"])
    for case in data["cases"]:
        pieces = map(tokenizer.pieces, split(clean(case["text"])))
        assert list(itertools.chain.from_iterable(pieces)) == case["pieces"]
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert again([case["text"]])[0].tolist() == case["sd77"]
        assert bool(tokenizer.remark(case["text"])) == (case["n"] > config["context_length"] - 2)


def test_text_long_prompts_are_cut_and_said():
    tokenizer = CLIPTokenizer([("a", "b</w>")], length=5)
    assert tokenizer(["ab ab ab", ""]).tolist() == [[513, 512, 512, 512, 514], [513] + 4 * [514]]
    assert tokenizer.remark("ab ab ab") == ""
    assert tokenizer.remark("ab ab cd ab") == \
        'the text has 5 pieces and this model reads 3: it is cut at "cd"'

    long = "".join(np.random.default_rng(0).choice(list("abcdefgh"), 1_000_000).tolist())
    tokenizer = CLIPTokenizer([(a, b) for a in "abcdefgh" for b in "abcdefgh"])
    assert clean(long) == long[:text.MOST_CHARACTERS] and text.MOST_CHARACTERS == 10_000
    assert tokenizer([long]).shape == (1, 77) and tokenizer.remark(long)


def test_text_merges_are_named_where_missing_and_refused_where_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{MERGES_FILE} .1,356,917 bytes, sha256 924691ac"):
        read_merges(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="other.gz"):
        read_merges(tmp_path, str(tmp_path / "other.gz"))
    (tmp_path / MERGES_FILE).write_bytes(b"#version: 0.2\na b\n")
    with pytest.raises(ValueError, match=f"is not CLIP's {MERGES_FILE}: it has 18 bytes and"):
        read_merges(tmp_path / "model.safetensors")


def test_text_word_tokenizer_learns_the_words_of_captions_and_names_others():
    tokenizer = WordTokenizer.learn(["A lake, a hill.", "a HILL at dusk", ""])
    assert tokenizer.words == ["a", "hill", "at", "dusk", "lake"]
    assert (tokenizer.length, len(tokenizer)) == (4, 7)
    again = tokenizer_from(json.loads(json.dumps(tokenizer.state())))
    assert again(["a lake; at DUSK!", "one hill", ""]).tolist() == \
        [[2, 6, 4, 5], [1, 3, 0, 0], [0, 0, 0, 0]]
    assert WordTokenizer.learn(["b b a a c"], length=2, most=2).words == ["a", "b"]

    tokenizer = WordTokenizer(["a", "lake", "hill"], length=3)
    assert tokenizer.remark("a hill, a") == ""
    assert tokenizer.remark("a fog lake fog") == \
        ('this model does not know fog; it knows a, hill, lake; '
         'the text has 4 words and this model reads 3: it is cut at "fog"')
    many = WordTokenizer([f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(120)], 3)
    assert many.remark("x").endswith(" and 20 more")


def text_first_block(**other):
    """The beginning of a UNet, whose first block has as many channels as its first layer."""
    return {"input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3),
            "input_blocks.1.0.in_layers.2.weight": torch.zeros(32, 32, 3, 3),
            "out.2.weight": torch.zeros(4, 32, 3, 3)} | other


@pytest.mark.parametrize("make, said", [
    (lambda: WordTokenizer([], 3), "different words"),
    (lambda: WordTokenizer(["a"], 0), "different words"),
    (lambda: WordTokenizer(["a", "a"], 3), "different words"),
    (lambda: WordTokenizer.learn(["", " ... "]), "no caption has a word"),
    (lambda: TextConfig(width=32, heads=5), "heads is 5; it must divide the width 32"),
    (lambda: TextConfig(layers=0), "layers is 0"),
    (lambda: TextTransformer(TextConfig(32, 1, 4, 64, 20, 6))(torch.zeros(2, 7).long()), "up to 6"),
    (lambda: autoencoder_config({}), "encoder.conv_in.weight is missing"),
    (lambda: text_config({}), "token_embedding.weight is missing"),
    (lambda: unet_config({}), "differ within a level"),
    (lambda: unet_config(text_first_block(**{"out.2.weight": torch.zeros(())})), "another form"),
    (lambda: unet_config(text_first_block(**{"input_blocks.1.0.in_layers.2.weight":
                                             torch.zeros(40, 32, 3, 3)})), "no multiples of 32"),
])
def test_text_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_text_golden_clip_transformer():
    config, weights, given, out = reference("text/clip_text.pt")
    weights = split_weights({published.TEXT + k: v for k, v in weights.items()}).text
    cfg = text_config(weights, config["heads"])
    assert cfg == TextConfig(config["width"], config["layers"], config["heads"],
                             config["intermediate"], config["vocab"], config["positions"])
    model = loaded(lambda: TextTransformer(cfg), weights)
    assert count(TextTransformer, cfg) == config["n_params"]

    ids = given["ids"]
    context = model(ids)
    agree(out, last_hidden_state=context, pooled=context[range(len(ids)), given["first_end"]],
          last_hidden_state_short=model(given["ids_short"]),
          row2_zero_padded_last_hidden_state=model(given["ids_zero_padded_row2"])[0])
    rows = [model.embed(ids[2:3])]
    for layer in model.text_model["encoder"]["layers"]:
        rows.append(layer(rows[-1]))
    skipped = model.text_model["final_layer_norm"](rows[-2])[0]
    agree(out, row2_embeddings=rows[0][0], row2_after_layer_1=rows[1][0],
          row2_before_final_norm=rows[-1][0], row2_skip_last_layer_then_final_norm=skipped)
    contrast = out["row2_contrast_exact_gelu"]                       # what a wrong GELU would give
    assert (context[2] - contrast).abs().max() > 1e-3 * contrast.std()


# ---- safetensors ----

def text_safetensors(tensors, **metadata):
    """The bytes of a safetensors file."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
             torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.float64: "F64"}
    header = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, value in tensors.items():
        raw = bytes(value.reshape(-1).view(torch.uint8).tolist())
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_text_golden_safetensors_cases(tmp_path):
    stricter = {"starts_with_space", "duplicate_key", "extra_field"}
    path = tmp_path / "case.safetensors"
    for case in golden("text/safetensors_cases.json")["cases"]:
        path.write_bytes(bytes.fromhex(case["hex"]))
        if not case["accepted_by_reference"] or case["name"] in stricter:
            with pytest.raises(ValueError, match="is no sound safetensors file: ") as error:
                read_safetensors(path)
            assert "\n" not in str(error.value), case["name"]
            continue
        tensors = read_safetensors(path)
        assert sorted(tensors) == sorted(case["tensors"]), case["name"]
        for name, (dtype, shape, values) in case["tensors"].items():
            value = tensors[name]
            assert str(value.dtype) == f"torch.{dtype}" and list(value.shape) == shape
            assert value.reshape(-1).double().tolist() == values


def test_text_safetensors_round_trip(tmp_path):
    tensors = {"a": randn(3, 4), "b": randn(2, 1, 3).half(), "c": randn(5).bfloat16(),
               "d": torch.tensor([True, False, True]), "e": torch.tensor(7),
               "f": torch.empty(0, 4), "\u5c71": torch.arange(3, dtype=torch.uint8)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(text_safetensors(tensors, format="pt"))
    read = read_safetensors(path)
    assert sorted(read) == sorted(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value)
    read["a"].add_(1)                                                # a tensor to write to
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file at"):
            read_safetensors(missing)


@pytest.mark.parametrize("header", [
    '{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4.0]}}',
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}',
    '{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"dtype":"F32"}}',
    '{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    '{"' + 2000 * "a" + '":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    '{"a":{"dtype":"F32","shape":[' + "1," * 70 + '1],"data_offsets":[0,4]}}',
    '{"b":{"dtype":"F32","shape":[0,9223372036854775807,4],"data_offsets":[0,0]},'
    '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    '{"a":{"dtype":"F32","shape":[' + 5000 * "9" + '],"data_offsets":[0,4]}}',
    '{"a":[0,4]}', '{"a":Infinity}', '{}', '{"a":' * 100_000,
])
def test_text_safetensors_refuses_a_header(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"1234")
    with pytest.raises(ValueError, match="is no sound safetensors file") as error:
        read_safetensors(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_text_damaged_safetensors_files_raise_nothing_but_value_errors(tmp_path):
    whole = text_safetensors({"a.weight": randn(4, 3), "a.bias": torch.zeros(4).half(),
                              "n": torch.tensor(3), "mask": torch.ones(5, dtype=torch.bool)}, k="v")
    header = struct.unpack("<Q", whole[:8])[0]
    path = tmp_path / "model.safetensors"
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(300):
        damaged = bytearray(whole)
        at = int(rng.integers(8 + header))
        if i % 3 == 0:
            damaged[at] = int(rng.choice(list(b'0123456789{}[]",:-.eE \xff')))
        elif i % 3 == 1:
            del damaged[at:]
        else:                                                        # a piece twice
            damaged[at:at] = whole[at:at + int(rng.integers(1, 99))]
        path.write_bytes(damaged)
        try:
            read_safetensors(path)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 200                     # what remains has another name or type of equal size


# ---- files of Stable Diffusion v1 ----

class TextCallback:
    """A class that the reader of a checkpoint does not know."""


class TextCommand:
    """What a hostile file holds: reading it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_text_ckpt_with_unknown_classes_is_read_and_nothing_runs(tmp_path):
    path = tmp_path / "model.ckpt"
    weights = {"a": torch.ones(2), "b": torch.zeros(1)}
    victim = tmp_path / "victim"
    for strange in ({TextCallback: TextCallback()}, TextCommand(str(victim))):
        torch.save({"state_dict": weights, "callbacks": strange}, path)
        read = read_weights(path)
        assert sorted(read) == ["a", "b"] and torch.equal(read["a"], weights["a"])
    assert not victim.exists()

    torch.save({"epoch": 3, "state_dict": [1, 2]}, path)
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read_weights(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError):
        read_weights(path)
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "none.ckpt")


TEXT_AE = AutoencoderConfig(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4, kl=True,
                            renderer="pixels")
TEXT_UNET = UNetConfig(in_channels=4, out_channels=4, model_channels=320, channel_mult=(1, 2, 4, 4),
                       attention_ds=(1, 2, 4), num_head_channels=0, num_heads=8, context_dim=768)


def test_text_golden_sd_v1_keys():
    """Every key and shape of the real file, on the meta device, and its number of parameters."""
    data = golden("text/sd_v1_keys.json")
    keys = {}
    for part in ("unet", "first_stage", "text"):
        keys |= data[part]["keys"]
    parts = split_weights(meta(keys))
    assert (parts.unknown, parts.schedule, parts.averaged) == ((), SD_V1, False)
    assert unet_config(parts.unet) == TEXT_UNET and autoencoder_config(parts.autoencoder) == TEXT_AE
    assert text_config(parts.text) == TextConfig()
    text_fits(lambda: UNet(TEXT_UNET), parts.unet, 859_520_964)
    text_fits(lambda: FieldAutoencoder(TEXT_AE), parts.autoencoder, 83_653_863)
    text_fits(lambda: TextTransformer(TextConfig()), parts.text, 123_060_480)

    small = UNetConfig(model_channels=192, channel_mult=(1, 2, 3, 5), context_dim=640)
    for cfg, name in ((replace(TEXT_UNET, context_dim=1280), "ldm_text2img_large_1p4B"),
                      (small, "ldm_text2img256"),
                      (replace(TEXT_UNET, in_channels=9), "sd_v1_inpainting_9_channels")):
        with torch.device("meta"):
            weights = UNet(cfg).state_dict()
        assert unet_config(weights) == cfg
        assert sum(v.numel() for v in weights.values()) == data["other_unets"][name]["parameters"]


def test_text_golden_names_of_diffusers():
    data = golden("text/sd_v1_keys.json")
    shapes = {name.removeprefix("first_stage_model."): shape
              for name, (shape, _) in data["first_stage"]["keys"].items()}
    for column in (1, 2):                                            # newer and older files
        theirs = {}
        for row in data["vae_to_diffusers"]:
            shape = shapes[row[0]][:2] if row[3] == "squeeze" else shapes[row[0]]
            theirs[row[column]] = torch.empty(shape, device="meta")
        names = from_diffusers(theirs)
        assert list(names) == [row[0] for row in data["vae_to_diffusers"]]
        assert {name: list(value.shape) for name, value in names.items()} == shapes


def test_text_golden_averaged_names():
    data = golden("text/sd_v1_keys.json")
    keys = dict(data["unet"]["keys"])
    for name in data["unet"]["keys"]:
        short = name.removeprefix("model.").replace(".", "")
        keys["model_ema." + short] = data["unet"]["keys"][name]
    assert set(data["ema"]["examples"]) <= set(keys)
    weights = meta(keys) | meta(data["ema"]["extra"])
    assert len(weights) == len(data["unet"]["keys"]) + data["ema"]["n_keys"]
    assert split_weights(weights).averaged and not split_weights(weights, raw=True).averaged
    del weights["model_ema.diffusion_modeltime_embed0weight"]
    with pytest.raises(ValueError, match="the moving average lacks time_embed.0.weight"):
        split_weights(weights)


@pytest.mark.parametrize("name, shape, kind", [
    ("cond_stage_model.model.ln_final.weight", (1024,), "Stable Diffusion 2;"),
    ("model.diffusion_model.middle_block.1.proj_in.weight", (1280, 1280), "Stable Diffusion 2;"),
    ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", (768,), "XL;"),
    ("model.diffusion_model.label_emb.0.0.weight", (1280, 2816), "XL or class-conditional"),
    ("model.diffusion_model.input_blocks.0.0.weight", (320, 9, 3, 3), "an inpainting model"),
    ("model.diffusion_model.input_blocks.0.0.weight", (320, 8, 3, 3), "a picture-editing model"),
    ("cond_stage_model.transformer.token_emb.weight", (30522, 1280), "BERT"),
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", (320, 4), "a LoRA"),
    ("control_model.time_embed.0.weight", (1280, 320), "a ControlNet"),
    ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", (64, 64), "Diffusion 3;"),
    ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", (64, 64), "Flux;"),
    ("time_embedding.linear_1.weight", (1280, 320), "a UNet of diffusers"),
    ("something.else", (3,), "no weights of Stable Diffusion v1 or LDM"),
])
def test_text_other_models_are_refused_by_name(name, shape, kind):
    with pytest.raises(ValueError, match=kind):
        split_weights({name: torch.zeros(shape)})


def test_text_files_in_half_precision_have_their_schedule(tmp_path):
    """Also the betas are rounded then, and the numbers of the known schedules come out exactly."""
    known = (SD_V1, DiffusionConfig(ddim_start=1), DiffusionConfig(sqrt_beta=True, ddim_start=1))
    for cfg, dtype in itertools.product(known, (torch.float16, torch.bfloat16)):
        assert schedule({"betas": GaussianDiffusion(cfg).betas.to(dtype)}) == cfg
    with pytest.raises(ValueError, match="not linear"):
        schedule({"betas": torch.tensor([0.001, 0.002, 0.02]).half()})


@pytest.mark.parametrize("change, said", [
    ({"scale_factor": torch.tensor(0.25)}, None),
    ({"scale_factor": torch.zeros(())}, "is no number above 0"),
    ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)},
     "UNet takes 6 channels and its latents have 3"),
    ({"model.diffusion_model.out.2.bias": torch.zeros(3, dtype=torch.int8)}, "not quantised")])
def test_text_a_file_of_ldm_says_its_scale_and_what_it_cannot_be(tmp_path, change, said):
    text_ldm_file(tmp_path / "ldm.ckpt")
    weights = torch.load(tmp_path / "ldm.ckpt")["state_dict"]
    torch.save({"state_dict": weights | change}, tmp_path / "other.ckpt")
    if said is None:
        assert models.load(tmp_path / "other.ckpt").scale.std.tolist() == [4.0, 4.0, 4.0]
        return
    with pytest.raises(ValueError, match=said):
        models.load(tmp_path / "other.ckpt")



def test_text_schedule_is_read_from_the_betas():
    for cfg in (SD_V1, DiffusionConfig(ddim_start=1), replace(SD_V1, steps=500)):
        assert schedule({"betas": GaussianDiffusion(cfg).betas.float()}) == cfg
    for betas in (torch.tensor([0.001, 0.002, 0.02]), torch.ones(1), torch.full((3, 3), 0.1),
                  torch.tensor([0.1, float("nan")])):
        with pytest.raises(ValueError, match="betas of this file"):
            schedule({"betas": betas})


# ---- the autoencoder, the UNet and guidance ----

def test_text_golden_autoencoder_kl():
    for name, group in golden("text/autoencoder_kl.pt").items():
        config = group["config"]
        weights = group.get("state_dict")
        if weights is None:
            shapes = {k: torch.empty(s, device="meta") for k, s in group["shapes"].items()}
            weights = formula(shapes, config["seed"])
        model = text_autoencoder(weights)
        text_check_autoencoder(model, group["inputs"], group["outputs"])
        assert sum(p.numel() for p in model.parameters()) == config["n_params"]
        if "diffusers_state_dict" in group:
            again = text_autoencoder(group["diffusers_state_dict"]).state_dict()
            assert all(torch.equal(again[key], v) for key, v in model.state_dict().items())
        if name == "tiny":
            parts = split_weights(read_weights(golden_file("text/vae_diffusers_tiny.safetensors")))
            assert not parts.unet and not parts.text and not parts.unknown
            assert all(torch.equal(parts.autoencoder[key], v) for key, v in again.items())


def text_check_autoencoder(model, given, out):
    """Encode, decode and the numbers between, against a group of autoencoder_kl.pt."""
    moments = model.encoder(given["image"])
    mean, logvar = split_moments(moments)
    sample = model.encode(given["image"], given["noise"])
    decoded = text_decoded(model, given["z"])
    agree(out, moments=moments, mean=mean, logvar=logvar, sample=sample,
          latent_scaled=SCALE * sample, moments_lowvar=model.encoder(given["image_lowvar"]),
          decoded=decoded, decoded_scaled=text_decoded(model, given["z"] / SCALE),
          decoded_lowvar=text_decoded(model, given["z_lowvar"]),
          reconstruction_of_mean=text_decoded(model, mean))
    pixels = ((decoded + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8)
    assert (pixels.int() - out["uint8_of_decoded"].int()).abs().max() <= 1


def test_text_golden_spatial_transformer():
    for group in golden("text/spatial_transformer.pt").values():
        config = group["config"]
        model = loaded(lambda: SpatialTransformer(
            config["in_channels"], config["n_heads"], config["d_head"], config["context_dim"] or 0,
            config["depth"], config["groups"]), group["state_dict"])
        given = group["inputs"]
        out = group["outputs"]
        context = given.get("context")
        agree(out, y=model(given["x"], context), y_lowvar=model(given["x_lowvar"], context))
        if context is not None:
            agree(out, y_context_first_token_only=model(given["x"], context[:, :1]))

        block = model.transformer_blocks[0]
        tokens = model.proj_in(model.norm(given["x"])).flatten(2).transpose(1, 2)
        h = block.norm1(tokens)
        after_self = tokens + block.attn1(h, h)
        h = block.norm2(after_self)
        after_cross = after_self + block.attn2(h, h if context is None else context)
        agree(out, tokens_in=tokens, after_self=after_self, after_cross=after_cross,
              after_ff=after_cross + block.ff["net"](block.norm3(after_cross)),
              block_lowvar=block(given["tokens_lowvar"], context),
              geglu=block.ff["net"][0](given["geglu_in"]))


def test_text_golden_unet():
    config, weights, given, out = reference("text/unet_text.pt")
    cfg = ldm_unet_config(config)
    assert unet_config(weights, config["num_heads"]) == cfg
    assert count(UNet, cfg) == config["n_params"]
    unet = loaded(lambda: UNet(cfg), weights)
    width = config["num_head_channels_variant"]
    other = loaded(lambda: UNet(replace(cfg, num_head_channels=width)), weights)
    x, t, context = given["x"], given["t"], given["context"]
    agree(out, eps=unet(x, t, None, context),
          eps_77_tokens=unet(x, t, None, given["context_77"]),
          eps_lowvar=unet(given["x_lowvar"], t, None, context),
          eps_float_t=unet(x, given["t_float"], None, context),
          eps_num_head_channels=other(x, t, None, context))


def test_text_golden_schedule_and_ddim_grids():
    config, _, given, out = reference("text/ddim_cfg.pt")
    cfg = DiffusionConfig(config["steps"], config["linear_start"], config["linear_end"],
                          sqrt_beta=True, ddim_start=1)
    diffusion = GaussianDiffusion(cfg)
    alpha_bar = diffusion.alpha_bar
    assert torch.allclose(diffusion.betas, out["betas"], rtol=1e-12, atol=0)
    assert torch.allclose(alpha_bar, out["alpha_bar"], rtol=1e-12, atol=0)
    for steps, grid in out["grids"].items():                         # the file's are from float32
        timesteps = diffusion.ddim_timesteps(int(steps))
        assert timesteps == grid["timesteps"].tolist()
        before = [0, *timesteps[:-1]]
        assert torch.allclose(alpha_bar[timesteps], grid["alpha_bar"], rtol=1e-6)
        assert torch.allclose(alpha_bar[before], grid["alpha_bar_prev"], rtol=1e-6)
        sigmas = [diffusion.ddim_sigma(t, t_prev, 1.0) for t, t_prev in zip(timesteps, before)]
        assert sigmas == pytest.approx(grid["sigma_eta1"].tolist(), rel=1e-4)

    timesteps = diffusion.ddim_timesteps(config["img2img_grid"])
    x_0 = given["img2img_x0"]
    t = torch.full((len(x_0),), timesteps[config["img2img_index"]])
    agree(out, img2img_noised=diffusion.q_sample(x_0, t, given["img2img_noise"]))


def test_text_golden_guidance():
    _, _, given, out = reference("text/ddim_cfg.pt")
    known = out["known_numbers"]

    def guide(eps_u, eps_c, scale):
        """A model whose eps is eps_c where the context is 1, and eps_u where it is 0."""
        def model(x, t, y, context):
            table = torch.stack([eps_u, eps_c]).flatten(0, 1)
            rows = torch.arange(len(x)) % len(eps_u) + len(eps_u) * context[:, 0, 0].long()
            return table[rows]

        context = torch.ones(len(eps_u), 1, 1)
        guide = guided(model, scale, context, 0 * context[:1])
        return guide(torch.zeros_like(eps_u), torch.zeros(len(eps_u)))

    for scale, expected in ((known["scale"], known["guided"]), (7.5, known["scale_7.5"])):
        pair = guide(known["eps_uncond"][None], known["eps_cond"][None], scale)
        assert torch.equal(pair[0], expected)
    for scale, expected in out["guided"].items():
        close(guide(given["eps_uncond"], given["eps_cond"], float(scale)), expected)


def test_text_golden_guided_ddim_of_a_toy_network():
    _, _, given, out = reference("text/ddim_cfg.pt")
    noises = given["toy_noises"]

    def network(x, t, y, context):
        strength = torch.tanh(context.mean(dim=(1, 2)))[:, None, None, None]
        return 0.6 * x + 0.3 * strength * torch.cos(t.float() / 100)[:, None, None, None]

    for name, expected in out["toy"].items():
        scale, eta = (float(number) for number in re.findall(r"[\d.]+", name))
        model = guided(network, scale, given["toy_context"], given["toy_context_uncond"])
        walk = GaussianDiffusion(SD_V1).ddim_loop(model, given["toy_x_T"], len(noises), eta,
                                                  lambda i: noises[i])
        for i, (x, x_0) in enumerate(walk):
            close(x, expected["x"][i])
            close(x_0, expected["pred_x0"][i])


def text_random_unet(**options):
    """A small UNet that depends on all its inputs."""
    return loaded(lambda: UNet(replace(LDM_TINY, in_channels=4, out_channels=4, **options)))


@pytest.mark.parametrize("options", [{"context_dim": 24}, {"num_classes": 3, "null_class": True},
                                     {"context_dim": 24, "num_classes": 3, "null_class": True}])
def test_text_guidance_by_class_text_or_both_runs_one_batch(options):
    """And by scale 1 or 0 it is one of the two models, bit for bit, at the cost of one."""
    x = randn(2, 4, 8, 8)
    t = torch.tensor([5, 900])
    y, context, null = torch.tensor([2, 0]), randn(2, 5, 24), randn(1, 5, 24, seed=1)
    y = y if "num_classes" in options else None
    context = context if "context_dim" in options else None
    calls = []
    unet = text_random_unet(**options)
    unet.register_forward_hook(lambda module, inputs, out: calls.append(len(out)))
    eps_c = unet(x, t, y, context)
    eps_u = unet(x, t, None if y is None else torch.tensor([3, 3]),
                 None if context is None else null.expand(2, 5, 24))
    assert (eps_c - eps_u).abs().max() > 0.1 * eps_u.std()

    places = {} if context is None else {"context": context, "null_context": null}
    places |= {} if y is None else {"null_class": 3}
    calls.clear()
    close(guided(unet, 3.0, **places)(x, t, y), eps_u + 3 * (eps_c - eps_u), 3e-5)
    assert torch.equal(guided(unet, 1.0, **places)(x, t, y), eps_c)
    assert torch.equal(guided(unet, 0.0, **places)(x, t, y), eps_u)
    assert calls == [4, 2, 2]


def test_text_guidance_and_conditions_that_do_not_fit():
    x = torch.zeros(1, 4, 8, 8)
    t = torch.zeros(1)
    context = torch.zeros(1, 5, 24)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="guidance is"):
            guided(None, scale)
    for tokens, y in ((None, torch.tensor([1])), (context, None)):
        with pytest.raises(ValueError, match="what takes the place of each condition"):
            guided(None, 2.0, tokens)(x, t, y)
    with pytest.raises(ValueError, match="give a context .* context_dim 24"):
        text_random_unet(context_dim=24)(x, t)
    with pytest.raises(ValueError, match="give a context .* context_dim 0"):
        text_random_unet()(x, t, None, context)
    with pytest.raises(ValueError, match="null_class is one class more"):
        UNetConfig(null_class=True)


# ---- whole models ----

@pytest.fixture
def text_tiny(monkeypatch, tmp_path):
    """The numbers of the tiny Stable Diffusion, and a merges file that passes for the published."""
    io = golden("text/sd_ckpt_tiny_io.pt")
    merges = golden("text/" + io["config"]["text"]["tokenizer"])["merges"]
    lines = ["#version: tiny", *(" ".join(pair) for pair in merges), "not used", ""]
    file = tmp_path / "merges.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    monkeypatch.setattr(text, "MERGES_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(text, "MERGES_USED", len(merges))
    heads = io["config"]["text"]["heads"]                    # no file says it; published: 64 wide
    monkeypatch.setattr(published, "text_config", functools.partial(text_config, heads=heads))
    assert io["config"]["unet"]["num_heads"] == 8
    return io, file


@pytest.mark.parametrize("name", ["sd_ckpt_tiny.pt", "sd_ckpt_tiny.safetensors"])
def test_text_golden_stable_diffusion_from_prompt_to_picture(text_tiny, name):
    data, merges = text_tiny
    config, given, out = data["config"], data["inputs"], data["outputs"]
    model = models.load(golden_file(f"text/{name}"), merges=str(merges))
    assert model.weights == ("published EMA" if name.endswith(".pt") else "published weights")
    assert model.unet.cfg == ldm_unet_config(config["unet"])
    assert len(model.tokenizer) == config["text"]["vocab"]

    ids = model.tokenizer(given["prompts"])
    assert torch.equal(ids, given["ids"])
    assert torch.equal(model.tokenizer(given["negative_prompts"]), given["ids_negative"])
    context = model.text(ids)
    null = model.text(given["ids_negative"])
    latent = model.scale(model.autoencoder.encode(given["image"], given["noise"]))
    agree(out, context=context, context_negative=null, latent_scaled=latent,
          eps_ema=model.unet(given["x"], given["t"], None, context),
          eps_ema_negative=model.unet(given["x"], given["t"], None, null),
          moments=model.autoencoder.encoder(given["image"]))

    steps = config["ddim_steps"]
    x_T = given["x_T"]
    assert model.diffusion.ddim_timesteps(steps)[::-1] == out["ddim_timesteps"]
    guide = model.guide(given["prompts"], given["negative_prompts"][0],
                        config["guidance_scale"])
    for i, (z, z_0) in enumerate(model.diffusion.ddim_loop(guide, x_T, steps, config["eta"])):
        close(z, out["ddim_x"][i])
        close(z_0, out["ddim_pred_x0"][i])
    picture = model.decode(model.scale.inverse(z)).draw(tuple(out["image"].shape[2:]))
    pixels = torch.from_numpy(to_uint8(picture)).movedim(-1, 1).int()
    assert (pixels - out["image_uint8"].int()).abs().max() <= 1

    plain = model.guide(given["prompts"], "", 1.0)
    noises = given["noises_eta1"].__getitem__
    agree(out, z=z, image=picture,
          z_scale_1=ldm_last(model.diffusion.ddim_loop(plain, x_T, steps, 0.0)),
          z_eta1=ldm_last(model.diffusion.ddim_loop(guide, x_T, steps, 1.0, noises)))

    if name.endswith(".pt"):                                 # which also has the trained weights
        model = models.load(golden_file(f"text/{name}"), raw=True, merges=str(merges))
        assert model.weights == "published weights"
        guide = model.guide(given["prompts"], "", config["guidance_scale"])
        agree(out, eps_raw=model.unet(given["x"], given["t"], None, context),
              z_raw_weights=ldm_last(model.diffusion.ddim_loop(guide, x_T, steps, 0.0)))


# ---- the command line ----

def test_text_golden_a_prompt_is_drawn_by_the_command_line(text_tiny, tmp_path, monkeypatch):
    """From the golden x_T, with the numbers' guidance and steps: the golden pictures."""
    data, merges = text_tiny
    given = data["inputs"]
    config = data["config"]
    monkeypatch.setattr(models, "torch_noise", lambda shape, seed, kind, i: given["x_T"][i])
    (tmp_path / "prompts.txt").write_text("\n".join(given["prompts"]) + "\n\n", "utf-8")
    ckpt = shutil.copy(golden_file("text/sd_ckpt_tiny.pt"), tmp_path / "tiny.ckpt")
    args = ["--ckpt", str(ckpt), "--merges", str(merges), "--out", str(tmp_path / "out"),
            "--latent-size", str(given["x_T"].shape[-1]), "--steps", str(config["ddim_steps"]),
            "--guidance", str(config["guidance_scale"])]
    assert sample.main([*args, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    want = data["outputs"]["image_uint8"].movedim(1, -1).numpy().astype(int)
    res = f"{want.shape[1]}x{want.shape[2]}"
    assert len(list(tmp_path.glob("out/*"))) == len(given["prompts"])
    for i, prompt in enumerate(given["prompts"]):
        pixels, info = main_png(tmp_path / f"out/seed0-{i:06d}-{res}.png")
        assert np.abs(pixels - want[i]).max() <= 1
        assert info["prompt"] == prompt and info["negative"] == "" and info["eta"] == 0
        assert info["guidance"] == config["guidance_scale"]

    both = [word for prompt in given["prompts"] for word in ("--prompt", prompt)]
    monkeypatch.setattr(models, "torch_noise", lambda shape, seed, kind, i: given["x_T"][i - 2])
    assert sample.main([*args, *both, "--start", "2"]) == 0          # image 2 has prompt 0 again
    again, info = main_png(tmp_path / f"out/seed0-000002-{res}.png")
    assert np.abs(again - want[0]).max() <= 1 and info["prompt"] == given["prompts"][0]


def test_text_defaults_and_negative_prompt_reach_the_picture(text_tiny, tmp_path, capsys):
    _, merges = text_tiny
    args = ["--ckpt", str(golden_file("text/sd_ckpt_tiny.safetensors")), "--merges", str(merges),
            "--latent-size", "4", "--steps", "2", "--prompt", "\u5c71 " * 80, "--out"]
    assert sample.main([*args, str(tmp_path / "a")]) == 0
    warned, = capsys.readouterr().err.splitlines()
    assert warned.startswith('warning: prompt "\u5c71 ') and "it is cut at" in warned
    plain, info = main_png(tmp_path / "a/seed0-000000-32x32.png")
    assert (info["guidance"], info["eta"], info["sampler"]) == (7.5, 0.0, "ddim")
    assert info["prompt"] == "\u5c71 " * 80
    assert sample.main([*args, str(tmp_path / "b"), "--negative", "fog"]) == 0
    other, info = main_png(tmp_path / "b/seed0-000000-32x32.png")
    assert info["negative"] == "fog" and (other != plain).any()
    model = models.load(args[1], merges=str(merges))
    assert [model.settings(sampler)["steps"] for sampler in ("ddim", "dpm++")] == [50, 20]
    assert model.size == 512
    wide = model.decode(torch.zeros(1, 4, 2, 3)).draw((32, 48))      # twice its size: each pixel
    own = model.decode(torch.zeros(1, 4, 2, 3)).draw((16, 24))       # four times
    assert torch.equal(wide, own.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_text_options_that_do_not_fit_are_named(text_tiny, tmp_path, capsys):
    _, merges = text_tiny
    tiny = ["--ckpt", golden_file("text/sd_ckpt_tiny.safetensors"), "--out", tmp_path / "out"]
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    infd = ["--ckpt", ROOT / "weights/infd.pt", "--out", tmp_path / "out"]
    with_merges = [*tiny, "--merges", merges]
    drawn = [*with_merges, "--prompt", "a lake"]
    for args, said in (
            ([*with_merges, "--prompt", " "], "give one that is not empty"),
            ([*drawn, "--label", 1], "a label: this model has no classes"),
            ([*drawn, "--guidance", "nan"], "guidance is nan"),
            ([*drawn, "--steps", 2, "--latent-size", 7], "both sides must be multiples"),
            ([*tiny, "--prompts", tmp_path / "blank.txt"], "has no prompt in it"),
            ([*tiny, "--prompts", tmp_path / "bytes.txt"], "is no text (UTF-8)"),
            ([*tiny, "--prompts", tmp_path / "none.txt"], "none.txt: No such file"),
            ([*tiny, "--prompt", "a"], f"put {MERGES_FILE} (1,356,917 bytes, sha256"),
            ([*infd, "--prompt", "a"], "a prompt: this model does not read text"),
            ([*infd, "--negative", "a"], "--negative means nothing to a model of the kind INFD"),
            ([*infd, "--guidance", 2], "never learned to draw without its condition"),
            (["--model", "cm", "--prompt", "a", "--guidance", 2],
             "--prompt, --guidance means nothing")):
        assert said in sample_error(capsys, *args), args
    assert not list(tmp_path.glob("out/*"))


def test_text_guidance_of_classes_where_the_checkpoint_dropped_them():
    ae = FieldAutoencoder(AutoencoderConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4,
                                            kl=True, renderer="pixels"))
    unet = text_random_unet(num_classes=3, null_class=True)
    model = models.INFD(ae, unet, GaussianDiffusion(SD_V1), models.LatentScale(4), 16, 16)
    drawn = {w: model.sample([0, 1], steps=4, labels=[2, 0], guidance=w) for w in (None, 1.0, 3.0)}
    assert torch.equal(drawn[None], drawn[1.0])
    assert (drawn[3.0] - drawn[1.0]).abs().max() > 1e-3
    for options, said in (({"prompts": ["a"]}, "does not read text"), ({"labels": 3}, "label 3")):
        with pytest.raises(ValueError, match=said):
            model.sample([0], steps=4, **options)


def test_text_other_files_are_refused_by_the_command_line(text_tiny, tmp_path, capsys):
    _, merges = text_tiny
    weights = read_safetensors(golden_file("text/sd_ckpt_tiny.safetensors"))
    path = tmp_path / "model.ckpt"
    call = ["--ckpt", path, "--prompt", "a", "--merges", merges]
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for more, said in (({first: torch.zeros(32, 9, 3, 3)}, "this is an inpainting model"),
                       ({first: torch.full((32, 4, 3, 3), math.nan)}, "is not finite")):
        torch.save({"state_dict": weights | more}, path)
        line = sample_error(capsys, *call)
        assert said in line and str(path) in line
    for prefix, said in (("cond_stage_model.", "no text encoder"),
                         ("first_stage_model.", "no autoencoder"), ("model.", "is an autoencoder"),
                         ("model.diffusion_model.out.", "out.2")):
        some = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        torch.save({"state_dict": some}, path)
        assert said in sample_error(capsys, *call)
    torch.save({"state_dict": weights | {"stray": torch.zeros(1)}}, path)
    models.load(path, merges=str(merges))
    assert "left out 1 tensors that no part of a model takes: stray" in capsys.readouterr().err
    line = sample_error(capsys, "--ckpt", path, "--export", tmp_path / "small.pt")
    assert "--export takes a checkpoint of train.py" in line


def text_published_names(weights):
    """Weights of a FieldAutoencoder with LDM's end, by LDM's names."""
    names = (("encoder.quant_conv.", "quant_conv."), ("decoder.post_", "post_"),
             ("quantizer.", "quantize."), ("renderer.", "decoder."))
    theirs = {}
    for name, value in weights.items():
        old, new = next((pair for pair in names if name.startswith(pair[0])), ("", ""))
        theirs[new + name.removeprefix(old)] = value
    return theirs


TEXT_LDM = (UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_ds=(2,)),
            AutoencoderConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=16,
                              renderer="pixels"))


def text_ldm_file(path):
    """A file of LDM, by VQ and without text; returns its UNet's weights by our names."""
    cfg, ae_cfg = TEXT_LDM
    ours = loaded(lambda: UNet(cfg)).state_dict()
    unet = {}
    for name, value in ours.items():
        if ".qkv." in name:
            heads = value.shape[0] // 3 // 32
            value = value.unflatten(0, (3, heads, 32)).transpose(0, 1).flatten(0, 2)
        attention = ".qkv." in name or ".proj_out." in name
        unet["model.diffusion_model." + name] = value[..., 0] if attention and value.dim() == 4 \
            else value
    autoencoder = text_published_names(loaded(lambda: FieldAutoencoder(ae_cfg)).state_dict())
    autoencoder = {"first_stage_model." + name: value for name, value in autoencoder.items()}
    betas = GaussianDiffusion(DiffusionConfig(sqrt_beta=True)).betas.float()
    torch.save({"state_dict": unet | autoencoder | {"betas": betas}}, path)
    return ours


def test_text_a_model_of_ldm_without_text_is_drawn(tmp_path):
    """Codes in place of a Gaussian, self-attention in the order and shape of LDM's files."""
    ours = text_ldm_file(tmp_path / "ldm.ckpt")
    model = models.load(tmp_path / "ldm.ckpt")
    assert (model.unet.cfg, model.autoencoder.cfg, model.size) == (*TEXT_LDM, 256)
    assert model.diffusion.cfg == DiffusionConfig(sqrt_beta=True, ddim_start=1)
    assert model.scale.std.tolist() == [1.0, 1.0, 1.0]
    for name, value in model.unet.state_dict().items():
        assert torch.equal(value, ours[name])
    args = ["--ckpt", str(tmp_path / "ldm.ckpt"), "--latent-size", "8", "--steps", "2"]
    assert sample.main([*args, "--out", str(tmp_path / "out")]) == 0
    pixels, info = main_png(tmp_path / "out/seed0-000000-32x32.png")
    assert pixels.std() > 1 and info["eta"] == 1 and "guidance" not in info


# ---- full size ----

def text_full(make, seed, names=str):
    """A module of full size with formula weights; `names` maps its names to the published ones."""
    with torch.device("meta"):
        ours = make().state_dict()
    weights = formula({names(key): value for key, value in ours.items()}, seed)
    return loaded(make, {key: weights[names(key)] for key in ours})


@slow
def test_text_golden_full_size_text_encoder_and_autoencoder():
    config, _, given, out = reference("text/full_text_probe.pt")
    text = text_full(lambda: TextTransformer(TextConfig()), config["seed"])
    context = text(given["ids"])
    mean_std = torch.stack([context.mean(), context.std()])
    assert torch.allclose(mean_std, out["last_hidden_state_mean_std"], atol=1e-4)

    def theirs(name):
        name = name.replace("encoder.quant_conv", "quant_conv")
        name = name.replace("decoder.post_quant_conv", "post_quant_conv")
        return name.replace("renderer.", "decoder.")

    autoencoder = text_full(lambda: FieldAutoencoder(TEXT_AE), config["seed"], theirs)
    agree(out, moments=autoencoder.encoder(given["image"]),
          decoded=text_decoded(autoencoder, given["z"]),
          last_hidden_state_rows_0_1_5_19_20_76=context[0, [0, 1, 5, 19, 20, 76]])


@slow
def test_text_golden_full_size_unet():
    """3.4 GB of weights."""
    config, _, given, out = reference("text/full_text_probe.pt")
    unet = text_full(lambda: UNet(TEXT_UNET), config["seed"])
    generator = torch.Generator().manual_seed(given["unet_context_seed"])
    context = torch.randn(given["unet_context_shape"], generator=generator)
    assert torch.equal(context.flatten()[:8], given["unet_context_first_values"])
    agree(out, eps=unet(given["unet_x"], given["unet_t"], None, context))


# ==================================================================================================
# Scores: metrics.py
# ==================================================================================================


class MetricsStub(nn.Module):
    """A feature network that is a fixed linear map of the 4 x 4 thumbnail; counts the images."""

    name = "stub"
    layers = ("pool", "spatial")

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.map = nn.Parameter(torch.randn(48, 20, generator=generator).double())
        self.seen = 0

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += len(images)
        pool = F.adaptive_avg_pool2d(images.double() / 255, 4).flatten(1) @ self.map
        return {"pool": pool, "spatial": pool[:, :7].square(), "logits": pool * 3}


def metrics_pictures(n: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, uint8 (n, size, size, 3)."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return (smooth * 255).byte().movedim(1, -1).numpy()


def metrics_folder(path: Path, pictures: np.ndarray) -> Path:
    path.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(path / f"{i:04d}.png")
    return path


def metrics_zip(path: Path, folder: Path) -> Path:
    return data_zip(path, {file.name: file.read_bytes() for file in sorted(folder.iterdir())})


@pytest.fixture
def metrics_stub(monkeypatch) -> MetricsStub:
    stub = MetricsStub()
    monkeypatch.setattr(metrics, "load_features", lambda *a: stub)
    return stub


@pytest.fixture
def metrics_squeeze_home(monkeypatch) -> None:
    """Torch hub's folder with SqueezeNet in it, or skip."""
    name = "checkpoints/" + metrics.HUB["squeeze"].rsplit("/", 1)[1]
    shared = GOLDEN.parent / "torch_home/hub"
    if not (Path(torch.hub.get_dir()) / name).exists():
        if not (shared / name).exists():
            pytest.skip(f"no SqueezeNet weights in {torch.hub.get_dir()}")
        monkeypatch.setenv("TORCH_HOME", str(shared.parent))


def metrics_scores(capsys, *arguments: object) -> list[dict]:
    """The JSON lines of a call of the command line, flat."""
    assert metrics.main([str(argument) for argument in arguments]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()[1::2]]
    return [record | record["protocol"] for record in records]


def metrics_error(capsys, *arguments: object) -> str:
    """The one line with which the command line refuses."""
    assert metrics.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    line, = captured.err.splitlines()
    assert line.startswith("error: ") and not captured.out
    return line


def test_metrics_golden_frechet_distance():
    reference = golden("cm/fid.pt")
    for case in reference["outputs"]["cases"]:
        got = metrics.frechet_distance(case["mu1"], case["sigma1"], case["mu2"], case["sigma2"])
        for other in ("fid", "fid_eigh"):
            assert got == pytest.approx(case[other], rel=1e-6, abs=1e-6), (case["label"], other)
    case, = (c for c in reference["outputs"]["cases"] if c["label"] == "from features")
    for side in "12":
        moments = metrics.Moments(len(case["mu1"]))
        for rows in reference["inputs"][f"features{side}"].split(7):
            moments.add(rows)
        for got, name in ((moments.mean, "mu"), (moments.covariance(), "sigma")):     # float32
            torch.testing.assert_close(got, case[f"{name}{side}"], rtol=1e-6, atol=1e-7)


def test_metrics_golden_precision_recall():
    for case in golden("cm/prec_recall.pt")["outputs"]["cases"]:
        reference = case["ref"]
        samples = case["sample"]
        for k, want in case["by_k"].items():
            for block in (7, 1000):
                got = metrics.precision_recall(samples, reference, int(k), block)
                assert got == pytest.approx((want["precision"], want["recall"]), abs=1e-9)
            for x, name in ((reference, "radii_sq_ref"), (samples, "radii_sq_sample")):
                rounding = x.square().sum(dim=1).max().item() * 2**-22       # float32 in the file
                got = metrics.knn_radii(x.double(), int(k)).square().float()
                torch.testing.assert_close(got, want[name], rtol=1e-4, atol=1e-5 + rounding)


def test_metrics_golden_inception_score():
    for case in golden("cm/inception_score.pt")["outputs"]["cases"]:
        logits = case["logits"]
        for size, want in case["split_size"].items():
            assert metrics.inception_score(logits, int(size))[0] == pytest.approx(want, rel=1e-5)
        shuffled = logits[np.random.RandomState(2020).permutation(len(logits))]
        for splits, want in case["splits"].items():
            for rows, suffix in ((logits, ""), (shuffled, "_shuffled")):
                mean, spread = metrics.inception_score(rows, splits=int(splits))
                assert mean == pytest.approx(want[f"mean{suffix}"], rel=1e-6)
                assert spread == pytest.approx(want[f"std{suffix}"], rel=1e-5, abs=1e-6)


def metrics_recipe(keys: dict, seed: int) -> dict[str, torch.Tensor]:
    """The weights of inception_recipe.pt, which are drawn and not stored."""
    state = {}
    for name, shape in keys.items():
        g = torch.Generator().manual_seed((zlib.crc32(name.encode()) + seed) % 2**31)
        r = torch.randn(shape, generator=g)
        if name.endswith("num_batches_tracked"):
            r = torch.tensor(0)
        elif name.endswith("running_var"):
            r = 1 + 0.1 * r.abs()
        elif name.endswith("bn.weight"):
            r = 1 + 0.1 * r
        elif name.endswith(("running_mean", ".bias")):
            r = 0.1 * r
        else:
            r = r * math.sqrt(2 / r[0].numel())
        state[name] = r
    return state


def test_metrics_golden_inception_recipe():
    reference = golden("cm/inception_recipe.pt")
    want = reference["outputs"]
    x = reference["inputs"]["x"]
    net = metrics.Inception().eval()
    ours = {name: list(value.shape) for name, value in net.state_dict().items()}
    assert ours == {name: list(shape) for name, shape in want["checkpoint_keys"].items()}
    net.load_state_dict(metrics_recipe(want["checkpoint_keys"], reference["config"]["seed"]))
    with torch.no_grad():
        # pytorch-fid's way of feeding it
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        got = net.activations(2 * x - 1)
        got["biased"] = got["logits"] + net.fc.bias
        for name, theirs in (("pool", "pool3"), ("logits", "logits_unbiased"), ("biased", "logits"),
                             ("spatial", "spatial_mixed6d_branch1x1_first7_nhwc")):
            torch.testing.assert_close(got[name], want[theirs], **CM_NETWORK)

        # the ADM evaluator's and ours: TensorFlow's resize
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1)
        got = net(reference["inputs"]["x_uint8_as_float"].to(torch.uint8))
    torch.testing.assert_close(got["pool"], want["adm_pool"], **CM_NETWORK)
    torch.testing.assert_close(got["spatial"], want["adm_spatial"], **CM_NETWORK)


def test_metrics_golden_lpips(monkeypatch):
    reference = golden("infd/lpips.pt")
    vision = data.import_torchvision().models
    layers = vision.vgg.make_layers(vision.vgg.cfgs["D"])            # no classifier of 500 MB
    trunk = types.SimpleNamespace(features=layers)
    monkeypatch.setattr(vision, "vgg16", lambda pretrained: trunk)
    net = metrics.lpips_network("vgg")
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    shapes = {key: torch.empty(shape) for key, shape in reference["config"]["vgg_shapes"].items()}
    drawn = formula(shapes, reference["config"]["seed"])
    weights = {key: w * (2**0.5 if w.ndim > 1 else 0.25) for key, w in drawn.items()}
    heads = reference["state_dict"]
    weights |= {k.replace("lin", "lins."): v for k, v in heads.items() if k.startswith("lin")}
    net.load_state_dict(weights | heads)

    a = reference["inputs"]["pred"].requires_grad_()
    b = reference["inputs"]["target"]
    want = reference["outputs"]
    value = net(a, b)
    torch.testing.assert_close(value, want["value_eval"], rtol=1e-4, atol=1e-6)
    value.mean().backward()
    gradient = want["grad_pred_of_mean"]
    assert (a.grad - gradient).abs().max() / gradient.std() < 1e-3
    assert torch.equal(net(b, b), want["identical"])


def test_metrics_golden_lpips_tiny(metrics_squeeze_home):
    reference = golden("cm/lpips_tiny.pt")
    weights = reference["state_dict"]["tiny_vgg"]
    heads = list(reference["state_dict"]["lpips_lin"].values())
    stack = []
    for name, weight in weights.items():
        if name.endswith("weight"):
            c_out, c_in = weight.shape[:2]
            stack += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    stack = nn.Sequential(*stack[:-1])
    stack.load_state_dict(weights)

    def trunk(x: torch.Tensor) -> list[torch.Tensor]:
        values = list(itertools.accumulate(stack, lambda h, layer: layer(h), initial=x))
        return [values[int(i) + 1] for i in reference["config"]["layers"]]

    net = metrics.lpips_network("squeeze")           # its arithmetic, with the file's small trunk
    del net.net
    net.net = types.SimpleNamespace(forward=trunk)
    net.L = len(heads)
    for head, weight in zip(net.lins, heads):
        head.model[1].weight = nn.Parameter(weight)
    with torch.no_grad():
        got = net(reference["inputs"]["a"], reference["inputs"]["b"]).flatten()
    want = reference["outputs"]["maxpool_lpips_package"]
    torch.testing.assert_close(got, want, **CM_NETWORK)


def test_metrics_frechet_distance_has_closed_forms():
    """Of equal covariances, the distance of the means; of diagonal ones, that of their roots."""
    root = randn(40, 60, dtype=torch.float64)
    mu, sigma = root[:, 0], root @ root.T
    shift = torch.linspace(-1, 1, 40, dtype=torch.float64)
    got = metrics.frechet_distance(mu, sigma, mu + shift, sigma)
    assert got == pytest.approx(shift.square().sum().item(), rel=1e-9)
    a, b = torch.rand(2, 30, dtype=torch.float64)
    want = (a.sqrt() - b.sqrt()).square().sum().item()
    assert metrics.frechet_distance(a, a.diag(), a, b.diag()) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("rank", [300, 20, 1])
def test_metrics_frechet_distance_of_a_set_to_itself_is_zero(rank):
    root = 10 * randn(200, rank, dtype=torch.float64)
    mu, sigma = root[:, 0], root @ root.T
    assert metrics.frechet_distance(mu, sigma, mu, sigma) < 1e-6


def test_metrics_moments_streamed_equal_the_whole():
    x = torch.randn(1000, 30, dtype=torch.float64) + 1e4     # far from 0, squares lose digits
    moments = metrics.Moments(30)
    for rows in x.split([1, 99, 400, 500]):
        moments.add(rows)
    assert moments.count == 1000
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-9, atol=0)
    want = torch.from_numpy(np.cov(x.numpy(), rowvar=False))
    torch.testing.assert_close(moments.covariance(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n, m, d", [(2, 2, 1), (9, 5, 3), (1001, 13, 7)])
def test_metrics_kid_equals_its_definition(n, m, d):
    x = randn(n, d).double()
    y = (randn(m, d, seed=1) * 2 + 1).double()
    within_x, within_y, across = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    want = (within_x.sum() - within_x.trace()) / (n * (n - 1)) - 2 * across.mean()
    want += (within_y.sum() - within_y.trace()) / (m * (m - 1))
    assert metrics.kid(x.float(), y.float()) == pytest.approx(want.item(), rel=1e-6)


def test_metrics_inception_score_bounds():
    sure = 1000 * torch.eye(10)                      # ten classes, each certain: the largest score
    assert metrics.inception_score(sure)[0] == pytest.approx(10)
    assert metrics.inception_score(torch.zeros(10, 10))[0] == pytest.approx(1)
    short_last_block = metrics.inception_score(sure, split_size=4)[0]
    assert short_last_block == pytest.approx((4 + 4 + 2) / 3)


def test_metrics_precision_recall_of_disjoint_and_collapsed_sets():
    x = torch.randn(50, 8)
    assert metrics.precision_recall(x, x) == (1, 1)
    assert metrics.precision_recall(x + 100, x) == (0, 0)
    collapsed = x[:1].expand(50, 8)                  # one real image again and again
    precision, recall = metrics.precision_recall(collapsed, x)
    assert precision == 1 and recall == 1 / 50       # radius 0 still holds the point itself
    for seed in range(5):                            # with a twin of each, all radii are 0
        x = randn(50, 100, seed=seed) * 3 + 50
        for block in (7, 1000):
            assert metrics.precision_recall(x, x.flip(0).repeat(2, 1), k=1, block=block) == (1, 1)


def test_metrics_tf_resize_reads_from_the_corner():
    row = torch.tensor([0.0, 10.0, 40.0]).expand(1, 1, 3, 3)
    wide = metrics.tf_resize(row, 6)[0, 0, 0]
    torch.testing.assert_close(wide, torch.tensor([0.0, 5, 10, 25, 40, 40]))
    torch.testing.assert_close(metrics.tf_resize(row.mT, 2)[0, 0, :, 0], torch.tensor([0.0, 25]))
    assert torch.equal(metrics.tf_resize(row, 3), row)


def test_metrics_psnr():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([a[0] + 0.2, a[1] + 5])          # 0.1 of the range, and clamped to half of it
    torch.testing.assert_close(metrics.psnr(a, b), torch.tensor([20.0, 20 * math.log10(2)]))
    assert metrics.psnr(a, a).isinf().all()


def test_metrics_folder_zip_and_npz_hold_the_same_images(tmp_path):
    pictures = metrics_pictures(7)
    folder = metrics_folder(tmp_path / "a", pictures)
    archive = metrics_zip(tmp_path / "a.zip", folder)
    np.savez(tmp_path / "plain.npz", pictures)
    np.savez_compressed(tmp_path / "small.npz", pictures)
    for path in (folder, archive, tmp_path / "plain.npz", tmp_path / "small.npz"):
        images = metrics.ImageSet(path)
        for batch in (3, 7, 50):                     # in order, whatever the size of the batches
            batches = list(metrics.image_batches(images, metrics.Protocol(), batch))
            assert np.array_equal(torch.cat(batches).movedim(1, -1).numpy(), pictures)
            assert max(map(len, batches)) <= batch
    assert metrics.ImageSet(folder).digest == metrics.ImageSet(archive).digest
    some = [picture.name for picture in metrics.ImageSet(folder, 3).pictures]
    assert some == [f"{folder}/000{i}.png" for i in (0, 2, 4)]       # evenly spaced


def test_metrics_size_cuts_the_centre_square_and_uses_the_filter(tmp_path):
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200                              # the centre square is all 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    images = metrics.ImageSet(tmp_path)
    assert (images.read(0, metrics.Protocol(size=4)) == np.full((3, 4, 4), 200)).all()
    Image.fromarray(metrics_pictures(1)[0]).save(tmp_path / "wide.png")
    box = images.read(0, metrics.Protocol(size=5, filter="box"))
    want = Image.open(tmp_path / "wide.png").resize((5, 5), Image.BOX)
    assert np.array_equal(box, np.asarray(want).transpose(2, 0, 1))
    assert not np.array_equal(box, images.read(0, metrics.Protocol(size=5)))


def test_metrics_a_prepared_set_serves_its_own_size_and_filter_only(tmp_path):
    folder = metrics_folder(tmp_path / "set", metrics_pictures(8))
    data.prepare(str(folder), tmp_path / "copy", 12)
    images = metrics.ImageSet(tmp_path / "copy")
    protocol = metrics.Protocol(size=12)
    stored = [images.read(i, metrics.Protocol()).tobytes() for i in range(8)]
    source = [metrics.ImageSet(folder).read(i, protocol).tobytes() for i in range(8)]
    assert stored == [images.read(i, protocol).tobytes() for i in range(8)]
    assert sorted(stored) == sorted(source) and len(set(stored)) == 8        # train before val
    for other in (metrics.Protocol(size=8), metrics.Protocol(size=12, filter="box")):
        with pytest.raises(ValueError, match="was prepared with size and filter"):
            images.read(0, other)


def test_metrics_patches_depend_on_seed_and_number_only():
    images = torch.arange(6 * 3 * 20 * 30).reshape(6, 3, 20, 30)
    patches = metrics.crop_patches(images, 0, 8, seed=1)
    assert patches.shape == (6, 3, 8, 8)
    assert torch.equal(metrics.crop_patches(images[4:], 4, 8, seed=1), patches[4:])
    assert not torch.equal(metrics.crop_patches(images, 0, 8, seed=2), patches)
    patches = metrics.crop_patches(images[:1].expand(200, -1, -1, -1), 0, 19, 0)
    assert len(patches[:, 0, 0, 0].unique()) == 2 * 12       # all places, borders included
    pictures = torch.from_numpy(metrics_pictures(9)).movedim(-1, 1)
    net = MetricsStub()
    batches = (pictures / 127.5 - 1 + 1e-3).split(4)         # numbers go on from batch to batch
    got = metrics.statistics(batches, net, metrics.Protocol(patch=8, seed=1), ["pool"])
    want = net(metrics.crop_patches(pictures, 0, 8, seed=1))["pool"].float()
    torch.testing.assert_close(got.rows["pool"], want)


def test_metrics_statistics_serve_their_own_pictures_and_protocol_only(tmp_path, metrics_stub):
    samples = metrics_folder(tmp_path / "samples", metrics_pictures(20))
    reference = metrics_folder(tmp_path / "reference", metrics_pictures(30, seed=1))
    changing = reference / "0007.png"
    changing.write_bytes(changing.read_bytes().ljust(4000, b"\0"))
    cache = tmp_path / "cache"
    protocol = metrics.Protocol(size=8, filter="box")

    def seen(names: list[str], how: metrics.Protocol = protocol) -> tuple[list, int]:
        before = metrics_stub.seen
        scores = metrics.evaluate(names, samples, reference, how, cache=cache)
        return scores, metrics_stub.seen - before

    first, n = seen(["fid", "sfid"])
    assert n == 50
    assert seen(["fid", "sfid"]) == (first, 20)      # the network saw the samples alone
    file, = cache.iterdir()

    # Scores that need every row put them into the same file, which serves all from then on.
    want, n = seen(["pr", "kid"])
    assert n == 50
    assert seen(["pr", "kid"]) == (want, 20) and seen(["fid", "sfid"]) == (first, 20)
    assert list(cache.iterdir()) == [file]

    content = file.read_bytes()                      # damage: made anew
    file.write_bytes(content[:len(content) // 2])
    assert seen(["fid", "sfid"]) == (first, 50) and list(cache.iterdir()) == [file]
    for other in (metrics.Protocol(size=8), metrics.Protocol(), replace(protocol, size=16)):
        assert seen(["fid"], other)[1] == 50
    assert len(list(cache.iterdir())) == 4
    other = data_file(Image.fromarray(metrics_pictures(1, seed=9)[0]))
    changing.write_bytes(other.ljust(4000, b"\0"))          # another picture of as many bytes
    changed, n = seen(["fid", "sfid"])
    assert n == 50 and changed[0].value != first[0].value

    # Tensors of a model count like the files that they would be saved to.
    plain = metrics.Protocol()
    made = (torch.from_numpy(metrics_pictures(20)).movedim(-1, 1) / 127.5 - 1 + 1e-3).split(8)
    score, = metrics.evaluate(["fid"], made, reference, plain, cache=cache)
    assert score.name == "FID@20"
    assert score.value == pytest.approx(seen(["fid"], plain)[0][0].value, rel=1e-12)


def test_metrics_reads_a_reference_first_and_scales_by_a_filter_only_with_size(
        tmp_path, metrics_stub, capsys):
    samples = metrics_folder(tmp_path / "samples", metrics_pictures(4))
    assert "none" in metrics_error(capsys, "fid", samples, tmp_path / "none")
    assert metrics_stub.seen == 0
    said = metrics_error(capsys, "fid", samples, samples, "--filter", "box")
    assert "--filter says how --size scales: give --size too" in said


def test_metrics_command_line_prints_protocol_and_json(tmp_path, metrics_stub, capsys):
    samples = metrics_folder(tmp_path / "samples", metrics_pictures(40))
    pictures = metrics_folder(tmp_path / "r", metrics_pictures(30, seed=1))
    reference = metrics_zip(tmp_path / "reference.zip", pictures)
    names = ["FID@40", "sFID@40", "KID@40", "IS@40", "P@40", "R@40"]
    arguments = ["fid,sfid,kid,is,pr", str(samples), str(reference), "--size", "8", "--filter",
                 "box"]
    assert metrics.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert metrics_stub.seen == 70                   # six scores from one pass
    digest = metrics.ImageSet(reference).digest[:12]
    for name, text, line in zip(names, lines[::2], lines[1::2], strict=True):
        record = json.loads(line)
        assert record["name"] == name and text.startswith(f"{name} = ")
        assert record["value"] == pytest.approx(float(text.split()[2]), rel=1e-5)
        for part in (f"samples {samples} (40)", f"reference {reference} (30), digest {digest}",
                     "pixels 8x8", "size 8", "filter box", "features stub"):
            assert part in text
    how = metrics.Protocol(size=8, filter="box")
    ours, theirs = (metrics.statistics(images, metrics_stub, how, ["pool", "logits"]).rows
                    for images in (samples, reference))
    values = [json.loads(line)["value"] for line in lines[5::2]]
    assert values[0] == metrics.kid(ours["pool"], theirs["pool"])
    assert values[1] == metrics.inception_score(ours["logits"])[0]
    assert tuple(values[2:]) == metrics.precision_recall(ours["pool"], theirs["pool"])
    record, = metrics_scores(capsys, "is", samples)
    assert record["reference"] == "none"


def test_metrics_command_line_names_patches_and_other_features(tmp_path, metrics_stub, capsys):
    samples = metrics_folder(tmp_path / "samples", metrics_pictures(40))
    reference = metrics_folder(tmp_path / "reference", metrics_pictures(30, seed=1))
    arguments = ["pfid", samples, reference, "--patch", 8, "--limit", 15, "--seed"]
    first, = metrics_scores(capsys, *arguments, 5)
    assert first["name"] == "pFID-8/16x16@15" and first["seed"] == 5
    record, = metrics_scores(capsys, *arguments, 6)
    assert record["value"] != pytest.approx(first["value"], rel=1e-4)
    record, = metrics_scores(capsys, "fd", samples, samples)
    assert record["name"] == "FD-squeeze@40" and record["value"] < 1e-6
    records = metrics_scores(capsys, "kid,pr", samples, samples, "--features", "squeeze")
    assert [r["name"] for r in records] == ["KD-squeeze@40", "P-squeeze@40", "R-squeeze@40"]


def test_metrics_psnr_and_lpips_between_folders(tmp_path, metrics_squeeze_home, capsys):
    pictures = metrics_pictures(5, size=32)
    a = metrics_folder(tmp_path / "a", pictures)
    b = metrics_folder(tmp_path / "b", pictures)
    noisy = (pictures[2].astype(int) + 51).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(b / "0002.png")
    lpips = ["--lpips", "squeeze"]
    same, zero = metrics_scores(capsys, "psnr,lpips", a, a, *lpips)
    assert same["value"] == math.inf and zero["value"] == 0
    record, = metrics_scores(capsys, "lpips", a, b, *lpips)
    x = torch.from_numpy(np.stack([pictures[2], noisy])).movedim(-1, 1) / 127.5 - 1
    assert record["name"] == "LPIPS-squeeze@5" and record["reference"] == f"{b} (5)"
    want = metrics.lpips_network("squeeze")(x[:1], x[1:]).item() / 5
    assert record["value"] == pytest.approx(want, rel=1e-4)

    large = metrics_folder(tmp_path / "large", pictures.repeat(2, axis=1).repeat(2, axis=2))
    for folder, mark in ((a, ""), (large, "-64x64")):        # sample.py ends names with the size
        for file in list(folder.iterdir()):          # 0003-7 sorts before 0003, after 0003-64x64
            file.rename(file.with_stem("0003-7" if file.stem == "0004" else file.stem + mark))
    record, = metrics_scores(capsys, "lpips", a, large, "--size", "32", "--filter", "box", *lpips)
    assert record["value"] == 0
    for name, folder in (("p", a), ("q", b)):            # prepared sets, whatever they are called
        assert data_prepare(folder, tmp_path / name, "--size", 16, "--workers", 0) == 0
    capsys.readouterr()
    record, = metrics_scores(capsys, "psnr", tmp_path / "p", tmp_path / "q")
    assert record["name"] == "PSNR@5"
    assert "only fid has a form on patches" in metrics_error(capsys, "psnr", a, b, "--patch", 8)
    (b / "0002.png").rename(b / "other.png")
    assert "0002" in metrics_error(capsys, "psnr", b, metrics_folder(tmp_path / "c", pictures))


def test_metrics_no_reference_scores_state_the_enlargement(tmp_path, monkeypatch, capsys):
    seen = []

    def create_metric(name: str, device: torch.device):
        def metric(x: torch.Tensor) -> torch.Tensor:
            in_range = x.min().item() >= 0 and x.max().item() <= 1
            seen.append((name, tuple(x.shape), in_range))
            return x.mean().reshape(1, 1) * (1 if x.shape[-1] == 224 else math.nan)
        return metric

    monkeypatch.setitem(sys.modules, "pyiqa", types.SimpleNamespace(create_metric=create_metric))
    folder = metrics_folder(tmp_path / "a", metrics_pictures(3, size=32))
    records = metrics_scores(capsys, ",".join(metrics.IQA), folder, "--limit", "2")
    assert seen == [(name, (1, 3, 224, 224), True) for name in metrics.IQA for _ in range(2)]
    assert all("enlarged to 224 px (bicubic)" in r["features"] for r in records)
    assert records[3]["name"] == "MANIQA@2"
    large = metrics_folder(tmp_path / "b", metrics_pictures(2, size=256))
    assert "NaN" in metrics_error(capsys, "niqe", large) and seen[-1][1] == (1, 3, 256, 256)


def test_metrics_fd_squeeze_orders_halves_before_a_blurred_copy(metrics_squeeze_home):
    archive = GOLDEN.parent / "data/cifar10-train.zip"
    if not archive.exists():
        pytest.skip(f"no {archive}")
    images = metrics.ImageSet(archive, 40)
    x = torch.cat(list(metrics.image_batches(images, metrics.Protocol()))) / 127.5 - 1
    blurred = F.avg_pool2d(F.pad(x[::2], (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    net = metrics.load_features("squeeze")
    weights = hashlib.sha256(metrics.hub_file("squeeze").read_bytes()).hexdigest()
    assert net.name.endswith(f"weights {weights[:8]}")               # of the file that is there
    even, odd, blur = (metrics.statistics([batch + 1e-3], net, rows=["pool"])
                       for batch in (x[::2], x[1::2], blurred))
    same, near, far = (metrics.frechet_distance(*even.moments["pool"], *other.moments["pool"])
                       for other in (even, odd, blur))
    assert same < 1e-6 < near < far and near > 0.3 * far             # FID's bias on small sets,
    same, near, far = (metrics.kid(even.rows["pool"], other.rows["pool"])
                       for other in (even, odd, blur))
    assert same < near < far and abs(near) < 0.3 * far               # which KID has not


def test_metrics_say_what_they_passed_over(tmp_path, metrics_stub, capsys):
    folder = metrics_folder(tmp_path / "set", metrics_pictures(6))
    for name in ("a.bmp", "b.tif", ".hidden.png"):
        (folder / name).write_bytes(b"")
    assert metrics.main(["is", str(folder)]) == 0
    captured = capsys.readouterr()
    passed_over = data.open_data(str(folder), "all").passed_over     # one lister
    assert "2 .bmp, .tif" in passed_over and "1 hidden" in passed_over
    assert captured.err == f"{folder}: 6 pictures; passed over: {passed_over}\n"
    assert captured.out.startswith("IS@6 = ")


def test_metrics_print_names_that_are_not_utf8(tmp_path, metrics_stub, capsys):
    odd = metrics_folder(tmp_path / os.fsdecode(b"caf\xe9"), metrics_pictures(6))
    for words in (("fid", odd, odd), ("psnr", odd, odd)):
        assert metrics.main(list(map(str, words))) == 0      # capsys is strict UTF-8
        text, line = capsys.readouterr().out.splitlines()
        assert "caf\\udce9" in text and json.loads(line)["name"] == text.split()[0]
    (odd / os.fsdecode(b"\xe9.png")).write_bytes(b"broken")
    assert "caf\\udce9/\\udce9.png: " in metrics_error(capsys, "fid", odd, odd)


def test_metrics_name_path_and_cause_of_what_the_system_refuses(tmp_path, metrics_stub, capsys):
    good = metrics_folder(tmp_path / "set", metrics_pictures(6))
    archive = metrics_zip(tmp_path / "shut.zip", good)
    folder = metrics_folder(tmp_path / "shut", metrics_pictures(6))
    file = metrics_folder(tmp_path / "closed", metrics_pictures(6)) / "0003.png"
    batch = tmp_path / "shut.npz"
    np.savez(batch, metrics_pictures(6))
    for path in (archive, folder, file, batch):
        path.chmod(0)
    with data_permissions():
        for path in (archive, folder, file, batch):
            line = metrics_error(capsys, "fid", good, path.parent if path == file else path)
            assert line.startswith(f"error: {path}") and "ermission" in line
    folder.chmod(0o700)


def test_metrics_keep_the_score_where_statistics_cannot_be_kept(tmp_path, metrics_stub, capsys):
    good = metrics_folder(tmp_path / "set", metrics_pictures(6))
    (tmp_path / "file").write_text("in the way of a folder")
    assert metrics.main(["fid", str(good), str(good), "--cache", str(tmp_path / "file/cache")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("FID@6 = ")
    note, = captured.err.splitlines()
    assert note.startswith("reference statistics not kept") and "--cache" in note


def test_metrics_refuses_bad_sets_in_one_line(tmp_path, metrics_stub, capsys):
    good = metrics_folder(tmp_path / "good", metrics_pictures(6))
    one = metrics_folder(tmp_path / "one", metrics_pictures(1))
    three = metrics_folder(tmp_path / "three", metrics_pictures(3))
    empty = metrics_folder(tmp_path / "empty", [])
    large = metrics_folder(tmp_path / "large", metrics_pictures(6, size=32))
    mixed = metrics_folder(tmp_path / "mixed", metrics_pictures(6))
    Image.fromarray(metrics_pictures(1, size=24)[0]).save(mixed / "0003.png")
    for words, arguments in (
            ("1 images", ("fid", one, good)),
            ("more than 3 images", ("pr", three, good)),
            ("empty holds 0 images", ("fid", empty, good)),
            ("No such file", ("fid", tmp_path / "missing", good)),
            ("missing.npz: No such file", ("fid", good, tmp_path / "missing.npz")),
            ("holds 6 images, not 7", ("fid", good, good, "--limit", 7)),
            ("needs a REFERENCE", ("kid", good)),
            ("fidd is not fd, pfid, or some of fid,", ("fidd", tmp_path / "missing", good)),
            ("fid,psnr is not", ("fid,psnr", good, good)),
            ("--patch", ("pfid", good, good)),
            ("form on patches", ("fid,kid", good, good, "--patch", 8)),
            ("--device nowhere", ("fid", good, good, "--device", "nowhere")),
            ("patch of 17 px does not fit", ("pfid", good, good, "--patch", 17)),
            ("use --features inception", ("sfid", good, good, "--features", "squeeze")),
            ("must not be negative", ("fid", good, good, "--size", -1)),
            ("use --size", ("fid", large, good)),
            ("use --size", ("psnr", large, good)),
            ("mixed holds images of several sizes", ("fid", mixed, good))):
        assert words in metrics_error(capsys, *arguments)
    record, = metrics_scores(capsys, "fid", mixed, large, "--size", "16")
    assert record["pixels"] == "16x16" and record["filter"] == "lanczos"

    (mixed / "0004.png").write_bytes((mixed / "0004.png").read_bytes()[:60])
    assert "mixed/0004.png" in metrics_error(capsys, "fid", mixed, good)


def test_metrics_npz_files_hold_pictures_and_cannot_claim_memory(tmp_path):
    path = tmp_path / "set.npz"
    for arrays in ({"arr_0": np.array([{}], dtype=object)}, {"arr_0": np.zeros((4, 8, 8, 3))},
                   {"arr_0": np.zeros((4, 8, 8), np.uint8)}, {"mu": np.zeros(3)}):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match="set.npz"):
            metrics.read_npz(path)
    for shape in ((2**40,), (2**31, 2**31), (2**70,)):
        header = io.BytesIO()
        fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, fields)
        data_zip(path, {"arr_0.npy": header.getvalue() + bytes(100)})
        with pytest.raises(ValueError, match="set.npz"):
            metrics.read_npz(path)


def test_metrics_survive_damaged_npz_files(tmp_path):
    """Read, or refused in one line."""
    np.savez(tmp_path / "plain.npz", metrics_pictures(3, 8))
    np.savez_compressed(tmp_path / "small.npz", metrics_pictures(3, 8))
    victim = tmp_path / "victim.npz"
    refused = 0
    for path in (tmp_path / "plain.npz", tmp_path / "small.npz"):
        for n in range(80):
            victim.write_bytes(data_damage(path.read_bytes(), n))
            try:
                metrics.ImageSet(victim).read(0, metrics.Protocol())
            except ValueError as error:
                refused += 1
                assert "victim" in str(error) and "\n" not in str(error)
    assert refused > 60


def test_metrics_refuses_numbers_that_are_none(tmp_path):
    good = metrics_folder(tmp_path / "good", metrics_pictures(6))
    broken = MetricsStub()
    broken.map.data[0, 0] = math.nan
    for samples, net, said in (
            ([torch.full((8, 3, 16, 16), math.nan)], MetricsStub(), "NaN"),
            (good, broken, "feature is NaN"),
            ([torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 9, 9)], MetricsStub(), "2 sizes")):
        with pytest.raises(ValueError, match=said):
            metrics.evaluate(["fid"], samples, good, net=net)


def test_metrics_names_missing_weights_and_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(url: str, *a, **k) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    hub = tmp_path / "hub/checkpoints"
    inception = "pt_inception-2015-12-05-6726825d.pth"
    for make, name, file, remedy in (
            (metrics.lpips_network, "squeeze", "squeezenet1_1-b8a52dc0.pth", "lpips=none"),
            (metrics.load_features, "squeeze", "squeezenet1_1-b8a52dc0.pth", "inception"),
            (metrics.load_features, "inception", inception, "other --features")):
        with pytest.raises(ValueError, match=f"{hub}/{file}: no network; .*{remedy}"):
            make(name)
        (hub / file).write_bytes(b"half of a download")
        with pytest.raises(ValueError, match=f"cannot load .*{file}"):
            make(name)
        (hub / file).unlink()
    monkeypatch.setattr(metrics, "Inception", nn.Flatten)    # without weights
    torch.save({}, hub / inception)
    with pytest.raises(ValueError, match="not the published file"):
        metrics.load_features()
    with pytest.raises(ValueError, match="unknown LPIPS network"):
        metrics.lpips_network("resnet")
    monkeypatch.setitem(sys.modules, "pyiqa", None)                  # not installed
    folder = metrics_folder(tmp_path / "set", metrics_pictures(2))
    with pytest.raises(ValueError, match="pip install pyiqa"):
        metrics.no_reference("niqe", metrics.ImageSet(folder))


# ==================================================================================================
# Conditions: conditions.py, and the models that take them
# ==================================================================================================

CORNER = (-1.0, -0.5, 0.0, 0.5)                      # a window of the plane
ASKED = [like(torch.zeros(3, 4, 4)), like(torch.ones(3, 9, 9), CORNER)]
HIDDEN = like(torch.ones(3, 5, 7), mask=torch.zeros(5, 7))


def conditions_model(stage):
    """A small random model, from a checkpoint's content."""
    return models.trained(sample_content(stage), raw=False).to("cpu")


def test_conditions_gradient_of_a_residual_is_that_of_finite_differences(monkeypatch):
    """In double precision, through decoder, CLIF, its tiles, averaging, masks and windows."""
    monkeypatch.setattr(clif, "coord_grid", lambda *args, **options: (
        coord_grid(*args, **options).double()))
    ae = sample_random(FieldAutoencoder(SAMPLE_AE)).double().eval()
    mask = torch.linspace(0, 1, 81).view(9, 9)
    asked = [ASKED[0], like(torch.ones(3, 9, 9), CORNER, mask),
             Condition(lambda x: x.mean(dim=(1, 2, 3)).square(), (4, 6), (0.5, 0.5, 1, 1))]

    def renderer(phi, coord, cell, norm):
        return ae.renderer(phi, coord.double(), cell.double(), norm)

    def score(z):
        field = clif.Field(renderer, ae.decode(z), tile=7, norm=clif.own_statistics, halo=2)
        return misfit(field, (16, 16), asked).sum()

    z, way = randn(2, 2, 4, 8, 8).double()
    gradient, = torch.autograd.grad(score(z.requires_grad_()), z)
    with torch.no_grad():
        slope = (score(z + 1e-5 * way) - score(z - 1e-5 * way)) / 2e-5
    assert slope.item() == pytest.approx((gradient * way).sum().item(), rel=1e-6)


def test_conditions_are_compared_at_their_own_scale_and_by_their_mask():
    field = conditions_model("ldm").decode(randn(1, 4, 8, 8))
    near = field.draw(16)[0]
    coarse = F.avg_pool2d(near, 8)                           # 2 x 2 pixels: coarser than the cells
    fine = field.draw((32, 24), CORNER)[0]
    mask = torch.zeros(16, 16)
    mask[3:5, 7] = 0.5
    error = torch.tensor([0.2, -0.4, 0.6]).view(3, 1, 1)
    wanted = (error / 2).square().mean().item()              # of colours in [0, 1]
    for goal, where, share in ((coarse, {}, 1),
                               (fine, {"window": CORNER}, 0.5),      # half as wide as the plane
                               (near + 5 * (mask == 0), {"mask": mask}, 1)):
        assert misfit(field, (16, 16), [like(goal, **where)]).item() < 1e-12
        off = misfit(field, (16, 16), [like(goal + error, **where)]).item()
        assert off == pytest.approx(share * wanted, rel=1e-4)


@pytest.mark.parametrize("stage, how", [
    ("ldm", {"sampler": "ddim"}), ("ldm", {"sampler": "dpm++"}), ("cm", {})])
def test_conditions_of_step_size_0_and_masked_out_ones_change_no_bit(stage, how):
    model = conditions_model(stage)

    def drawn(*conditions, **more):
        made = model.functions([3, 8], labels=[1, 2], steps=3, conditions=conditions, **how, **more)
        return made.draw(16)

    if stage == "ldm":
        assert model.settings(led=True) == {"sampler": "ddim", "steps": 50, "eta": 1.0}
    plain = drawn()
    led = drawn(*ASKED)
    assert torch.equal(drawn(*ASKED, step_size=0), plain) and torch.equal(drawn(HIDDEN), plain)
    assert torch.equal(drawn(HIDDEN, *ASKED), led) and (led - plain).abs().max() > 0.01


def test_conditions_far_closer_than_clif_was_trained_for_are_judged_as_they_are_drawn():
    """Beyond FINEST pixels a cell a picture is enlarged; the true latent misses nothing then."""
    model = conditions_model("ldm")
    z = model.sample([0], steps=2)
    window = (0.0, 0.0, 0.125, 0.125)
    close_up = model.decode(z).draw(32, window)                          # 32 pixels a cell
    own = [like(close_up[0], window)]
    assert model.misfit(own, model.scale(z)).item() < 1e-10



def test_conditions_that_are_the_models_own_sample_leave_it():
    """Of data that is one latent x_0 = z, which the network therefore always predicts."""
    model = conditions_model("ldm")
    z, noise = randn(2, 1, 4, 8, 8)
    drawn = model.decode(model.scale.inverse(z))
    own = [like(F.avg_pool2d(drawn.draw(16), 4)[0]), like(drawn.draw(8, CORNER)[0], CORNER)]
    table = model.diffusion.alpha_bar

    def network(x_t, t, y=None):
        a = table[t[0]].item()
        return (x_t - math.sqrt(a) * z) / math.sqrt(1 - a)

    assert model.misfit(own, z).item() < 1e-12
    led = conditioned(network, table, functools.partial(model.misfit, own), 2.0)
    assert torch.allclose(ldm_last(model.diffusion.ddim_loop(led, noise, 5, 0.0)), z, atol=1e-4)


def test_conditions_fit_noise_that_stays_as_long_as_it_was():
    noise = randn(2, 3, 4, 4)
    fitted = fitted_noise(noise, lambda x: x.flatten(1).mean(dim=1), 20, 0.1)
    assert (fitted.mean(dim=(1, 2, 3)) < noise.mean(dim=(1, 2, 3)) - 0.5).all()
    assert fitted.flatten(1).norm(dim=1).allclose(noise.flatten(1).norm(dim=1))


@slow
def test_conditions_fit_the_noise_of_one_step_infd():
    model = conditions_model("ldm")
    cfg = ConsistencyConfig(sigma_data=1.0, boundary=False)
    model.f = LatentConsistency(model.unet, cfg, -model.diffusion.log_rho)
    draw = functools.partial(model.sample, [3, 8], labels=1)
    plain = draw(steps=1)
    assert torch.equal(draw(conditions=ASKED, step_size=0.0), plain)
    before, after = (model.misfit(ASKED, model.scale(z)) for z in (plain, draw(conditions=ASKED)))
    assert (after < before).all()
    with pytest.raises(ValueError, match="by conditions in 1"):
        draw(conditions=ASKED, steps=2)


def test_conditions_lead_diffusion_to_a_score_of_any_kind():
    """As a user's CLIP would: here how bright the window is, from Python."""
    bright = Condition(lambda rendering: 1 - rendering.mean(dim=(1, 2, 3)), (6, 5), CORNER)
    before, after = (conditions_model("ldm").functions([0], steps=10, conditions=given)
                     for given in ([], [bright]))
    assert after.draw((6, 5), CORNER).mean() > before.draw((6, 5), CORNER).mean() + 0.05


def test_conditions_page_runs_as_it_stands(monkeypatch):
    """Its picture comes nearer to both conditions."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/conditions.md").read_text()
    names = {}
    exec(re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1], names)
    plain = names["cm"].functions([0], labels="dusk")
    for condition in (names["there"], names["sky"]):
        missed = [misfit(drawn, (64, 64), [condition]).item() for drawn in (plain, names["led"])]
        assert missed[1] < missed[0] / 2


def test_layouts_follow_each_prompt_where_it_is():
    words = WordTokenizer(["a", "lake", "wood"], 3)
    cfg = replace(SAMPLE_UNET, num_classes=0, context_dim=16)
    model = replace(conditions_model("ldm"), unet=sample_random(UNet(cfg)), tokenizer=words,
                    text=sample_random(TextTransformer(TextConfig(16, 1, 2, 32, len(words), 3))))
    draw = functools.partial(model.to("cpu").sample, [0, 1], steps=3, guidance=2.0)
    whole = [("a lake", clif.WHOLE_PLANE), ("a wood", clif.WHOLE_PLANE)]      # the later one holds
    led = draw(prompts=["a lake"], regions=whole)
    assert torch.equal(led, draw(prompts=["a wood"]))

    lake, wood = (model.guide([name], "", 2.0) for name in ("a lake", "a wood"))
    given = randn(1, 4, 8, 8), torch.tensor([999])
    wanted = lake(*given)
    wanted[..., 4:, :5] = wood(*given)[..., 4:, :5]
    assert torch.equal(laid_out(lake, [(wood, (0, -1, 1, 0.25))])(*given), wanted)
    shares = inside((2, 4), (-1, -0.75, 0.5, 1))                 # a cell may be half inside
    assert torch.equal(shares, torch.tensor([[0.5, 1, 1, 1], [0.25, 0.5, 0.5, 0.5]]).double())


def conditions_file(path, side, alpha=255):
    """Write a small picture."""
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.putalpha(alpha)
    image.save(path)
    return path


def test_conditions_of_the_command_line_and_what_the_picture_says(sample_runs, tmp_path):
    """Two pictures, one of which has a place; alone or beside others the same; alpha is a mask."""
    a, b, hidden = (conditions_file(tmp_path / f"{side}.png", side, alpha)
                    for side, alpha in ((4, 255), (8, 255), (5, 0)))
    given = ["--given", a, "--given", b, "--at=-0.25,-0.25,0.25,0.25"]
    ddim = ["--sampler", "ddim", "--steps", 5]

    def drawn(stage, *args, first=1):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert main_sample("--ckpt", sample_runs / stage, "--res", 16, "--seed", 3, *args, "--out",
                           out, "--start", first, "--n", 2 - first) == 0
        return main_png(out / "seed3-000001-16x16.png")

    plain, _ = drawn("ldm", *ddim)
    pixels, info = drawn("ldm", *ddim, *given)
    assert [(file, window) for file, _, window in info["given"]] == [
        ("4.png", [-1, -1, 1, 1]), ("8.png", [-0.25, -0.25, 0.25, 0.25])]
    assert info["given"][0][1] == hashlib.sha256(a.read_bytes()).hexdigest()[:16]
    assert info["step_size"] == LED and (plain != pixels).any()
    assert (drawn("ldm", *ddim, *given, first=0)[0] == pixels).all()
    for more in (["--given", hidden], [*given, "--step-size", 0]):
        assert (drawn("ldm", *ddim, *more)[0] == plain).all()
    pixels, info = drawn("cm", *given)
    assert info["step_size"] == SHIFTED and (pixels != drawn("cm")[0]).any()


# ==================================================================================================
# Sampling: sample.py, models.py, pictures.py, viewer.py
# ==================================================================================================

SAMPLE_CLASSES = ["dawn", "day", "dusk", "night"]
SAMPLE_AE = AutoencoderConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, kl=True,
                              hidden=16, num_blocks=1, groups=4)
SAMPLE_UNET = UNetConfig(in_channels=4, out_channels=4, model_channels=16, channel_mult=(1, 2),
                         num_res_blocks=1, attention_ds=(2,), num_head_channels=8, groups=8,
                         num_classes=4)
SAMPLE_FUNC = GeneratorConfig(size=16, patch=4, dim=32, heads=4, encoder_depth=1, decoder_depth=1,
                              num_classes=4, groups=8, hidden=16, layers=3, pe_dim=16,
                              pe_sigma=32.0)
SAMPLE_VIT = TransformerConfig(size=16, patch=4, dim=32, depth=3, heads=4)
SAMPLE_PIXELS = replace(SAMPLE_UNET, in_channels=3, out_channels=3, num_classes=0)


def sample_random(net, seed=0, std=0.1):
    """The network with random values added everywhere: no zero-initialised part hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(std * torch.randn(value.shape, generator=generator))
    return net


def sample_states(network, seed=0):
    """A training's weights and their average."""
    return {"model": sample_random(network, seed).state_dict(),
            "ema": sample_random(deepcopy(network), seed + 1, 0.01).state_dict()}


def sample_content(stage):
    """What train.py writes at a step of a stage, of small random models; cm-unet: pixels."""
    torch.manual_seed(0)
    content = {"format": runs.FORMAT, "stage": stage.partition("-")[0], "step": 4, "log": {}}
    ae = {**runs.flatten(SAMPLE_AE, "ae."), "size": 16, "patch": 16}
    if stage == "ae":
        return {**content, "config": ae, "state": sample_states(FieldAutoencoder(SAMPLE_AE))}
    if stage == "ldm":
        config = {**runs.flatten(SAMPLE_UNET, "unet."), "size": 16, "data": "synthetic",
                  **runs.flatten(DiffusionConfig(), "diffusion.")}
        scale = models.LatentScale(4)
        scale.std.fill_(0.5)
        weights = sample_random(FieldAutoencoder(SAMPLE_AE)).state_dict()
        state = sample_states(UNet(SAMPLE_UNET)) | {"scale": scale.state_dict()}
        return {**content, "config": config, "classes": SAMPLE_CLASSES, "state": state,
                "autoencoder": {"config": ae, "weights": weights}}
    config = {**runs.flatten(ConsistencyConfig(), "cm."), "size": 16, "metric": "huber",
              "generator": "unet" if stage == "cm-unet" else "func",
              **runs.flatten(SAMPLE_FUNC, "func."), **runs.flatten(SAMPLE_VIT, "vit."),
              **runs.flatten(SAMPLE_PIXELS, "unet.")}
    net = UNet(SAMPLE_PIXELS) if stage == "cm-unet" else FunctionGenerator(SAMPLE_FUNC)
    return {**content, "config": config, "state": sample_states(net),
            "classes": [] if stage == "cm-unet" else SAMPLE_CLASSES}


@pytest.fixture(scope="module")
def sample_runs(tmp_path_factory):
    """A folder of run folders, one a stage, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("ae", "ldm", "cm", "cm-unet"):
        (folder / stage).mkdir()
        torch.save(sample_content(stage), folder / stage / "step-00000004.pt")
    return folder


def main_sample(*args):
    return sample.main([*map(str, args)])


def main_png(path):
    with Image.open(path) as image:
        return np.asarray(image), json.loads(image.info["parameters"])


def sample_error(capsys, *args):
    """The one line of a call that must end with exit code 2."""
    capsys.readouterr()
    assert main_sample(*args) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def sample_gap(ours, theirs):
    """By how much two pictures of 8 bits differ at most."""
    return np.abs(ours.astype(int) - theirs).max()


# ---- published checkpoints ----

def test_golden_published_checkpoint_renders_and_samples():
    io = golden("infd/infd_ckpt_io.pt")
    x = io["inputs"]
    want = io["outputs"]
    model = models.load(GOLDEN / "infd" / io["config"]["checkpoint"])
    ae = model.autoencoder
    with torch.no_grad():
        z = ae.encode(x["image"])
        close(z, want["z"])
        close(ae.quantize(z), want["z_q"])
        close(ae.quantizer(z)[1], want["quant_loss"])
        assert torch.equal(ae.quantizer(z)[2], want["indices"])
        phi = ae.decode(z)
        close(phi, want["z_dec"])
        close(ae.decoder(z)[:1], want["z_dec_without_quantizer"])
        for i in range(3):                                   # two resolutions and an off-grid box
            cell = x[f"cell{i}"][:, 0, 0]
            close(ae.renderer(phi, x[f"coord{i}"], cell), want[f"render{i}"])
        for i in range(2):                                   # and as a user draws them, in one tile
            res = tuple(x[f"coord{i}"].shape[1:3])
            field = model.decode(z, paper=True, tile=max(res))
            close(field.draw(res), want[f"render{i}"])
        noises = x["noises"]
        walk = model.diffusion.ddim_loop(model.unet, x["x_T"], len(noises), 1.0,
                                         noises.__getitem__)
        z = ldm_last(walk)
        close(z, want["sample_z"])
        assert torch.equal(ae.quantizer(z)[2], want["sample_indices"])
        image = model.decode(z, paper=True).draw(tuple(want["sample_image"].shape[2:]))
        close(image, want["sample_image"])
        truth = want["sample_uint8"].movedim(1, -1).numpy()
        assert sample_gap(to_uint8(image), truth) <= 1
    assert (model.patch, model.weights, model.size) == (256, "published EMA", 32)


@pytest.mark.parametrize("at, name, value, said", [
    (["sd"], "decoder.1.conv_in.weight", None, "missing decoder.conv_in.weight"),
    (["sd"], "strange", torch.ones(1), "left over strange"),
    (["args"], "renderer", None, "lacks 'renderer'"), (["args"], "z_shape", None, "lacks 'z_shape'"),
    ([], "sd", None, "lacks 'sd'"), ([], "args", None, "lacks 'args'"),
    (["args", "renderer", "args", "net"], "name", "other_net", "its renderer is other_net"),
    (["args", "z_dm", "args"], "dropout_rate", 1, "no option dropout_rate")])
def test_golden_published_checkpoint_that_lacks_or_renames_something_says_what(
        tmp_path, capsys, at, name, value, said):
    ckpt = golden("infd/infd_ckpt.pt")
    part = functools.reduce(dict.__getitem__, at, ckpt["model"])
    part[name] = value
    if value is None:
        del part[name]
    torch.save(ckpt, tmp_path / "odd.pth")
    assert said in sample_error(capsys, "--ckpt", tmp_path / "odd.pth", "--out", tmp_path / "out")


def test_golden_a_published_file_of_stage_1_is_an_autoencoder(tmp_path):
    ckpt = golden("infd/infd_ckpt.pt")
    del ckpt["model"]["args"]["z_dm"]
    ckpt["model"]["sd"] = {k: v for k, v in ckpt["model"]["sd"].items() if not k.startswith("z_dm")}
    torch.save(ckpt, tmp_path / "ae.pth")
    assert models.load(tmp_path / "ae.pth").unet is None


def test_prefixes_of_wrappers_are_stripped(sample_runs, tmp_path):
    wrapped = sample_content("ldm")
    wrapped["state"]["ema"] = {f"module._orig_mod.{name}": value
                               for name, value in wrapped["state"]["ema"].items()}
    torch.save(wrapped, tmp_path / "a.pt")
    ours, theirs = (models.load(path).unet for path in (tmp_path / "a.pt", sample_runs / "ldm"))
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


SAMPLE_OPENAI = UNetConfig(model_channels=64, channel_mult=(1, 1, 1, 1), num_res_blocks=1,
                           attention_ds=(8,), num_head_channels=64, resblock_updown=True,
                           scale_shift_norm=True, num_classes=3)


@pytest.mark.parametrize("size, tensors", [(64, 541), (256, 566)])
def test_openai_architectures_have_the_tensors_of_the_published_files(size, tensors):
    with torch.device("meta"):
        assert len(UNet(OPENAI[size]).state_dict()) == tensors


def test_openai_checkpoint_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setitem(OPENAI, 64, SAMPLE_OPENAI)
    file = tmp_path / "cd_imagenet64_lpips.pt"
    net = sample_random(UNet(SAMPLE_OPENAI)).eval()
    torch.save({k: v[..., 0] if ".qkv." in k and v.dim() == 4 else v
                for k, v in net.state_dict().items()}, file)     # attention is Conv1d there
    assert main_sample("--ckpt", file, "--label", 1, "--out", tmp_path, "--sigmas", 1.5) == 0
    pixels, info = main_png(tmp_path / "seed0-000000-64x64.png")
    noises = [torch_noise((3, 64, 64), 0, "x_T", 0, k)[None] for k in range(2)]
    own = ConsistencyModel(net, ConsistencyConfig())
    image = sample_multistep(own, noises, (80.0, 1.5), torch.tensor([1]))
    assert sample_gap(pixels, to_uint8(image[0])) <= 1
    assert info["weights"] == "published" and info["sigmas"] == [1.5] and info["steps"] == 2


def test_openai_files_of_edm_are_refused(tmp_path, capsys):
    file = tmp_path / "edm_imagenet64_ema.pt"
    torch.save(UNet(SAMPLE_OPENAI).state_dict(), file)
    assert "edm_* files are no longer read" in sample_error(capsys, "--ckpt", file)


# ---- our checkpoints ----

def test_old_checkpoints_of_stage_cm_keep_their_schedule_beside_f(tmp_path):
    """weights/cm.pt is one: the fields of a schedule are known by name, and no others."""
    assert models.load(sample.bundled("cm")).f.cfg.sigma_data == 0.05
    content = sample_content("cm")
    content["config"]["cm.sigma_mid"] = 1.0
    torch.save(content, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="no option sigma_mid; did you mean"):
        models.load(tmp_path / "old.pt")


GONE = object()


@pytest.mark.parametrize("stage, path, value, said", [
    ("ldm", "config", GONE, "lacks 'config'"), ("ldm", "state", GONE, "lacks 'state'"),
    ("ldm", "state scale", GONE, "lacks 'scale'"), ("ldm", "step", GONE, "lacks 'step'"),
    ("ldm", "autoencoder", GONE, "lacks 'autoencoder'"), ("ldm", "config", {}, "lacks 'unet'"),
    ("ae", "config patch", GONE, "lacks 'patch'"), ("cm", "config size", GONE, "lacks 'size'"),
    ("cm", "config", [1], "items"), ("ldm", "classes", 5, "not iterable"),
    ("cm", "state", {"ema": {}}, "missing"), ("cm", "state", {"ema": {"a": "b"}}, "shape"),
    ("ldm", "config unet.model_channels", 2**20, "UNet does not fit"),     # no memory has so much
    ("ldm", "config unet.channel_mult", "wide", ""), ("ldm", "config unet.groups", 0, "")])
def test_a_checkpoint_with_a_part_gone_or_odd_names_it_in_one_line(tmp_path, capsys, stage, path,
                                                                  value, said):
    content = sample_content(stage)
    *above, name = path.split()
    part = functools.reduce(dict.__getitem__, above, content)
    part[name] = value
    if value is GONE:
        del part[name]
    torch.save(content, tmp_path / "odd.pt")
    line = sample_error(capsys, "--ckpt", tmp_path / "odd.pt", "--out", tmp_path / "out")
    assert said in line and "odd.pt" in line


def test_a_tokenizer_that_is_not_of_its_text_encoder_is_refused(tmp_path):
    """Else a word above the vocabulary would end the drawing with an index out of range."""
    ckpt = runs.read_checkpoint(sample.bundled("infd_text"))
    words = [*(f"word{i}" for i in range(500)), *ckpt["tokenizer"]["words"]]
    for change in ({"words": words}, {"length": ckpt["tokenizer"]["length"] + 1}):
        torch.save(ckpt | {"tokenizer": ckpt["tokenizer"] | change}, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match="odd.pt: its tokenizer knows"):
            models.load(tmp_path / "odd.pt")



def test_torch_saves_old_format_is_read(sample_runs, tmp_path):
    torch.save(sample_content("cm"), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    ours = models.load(tmp_path / "old.pt").functions([3])
    assert torch.equal(ours.draw(8), models.load(sample_runs / "cm").functions([3]).draw(8))


class SampleEvil:
    """Would write a file when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_fault_f18_hostile_checkpoints_run_nothing(tmp_path, capsys):
    file = tmp_path / "step-3.pt"
    evil = SampleEvil(tmp_path / "marker")
    for attack in (evil, {**sample_content("cm"), "evil": evil}):
        for modern in (True, False):
            torch.save(attack, file, _use_new_zipfile_serialization=modern)
            line = sample_error(capsys, "--ckpt", tmp_path, "--out", tmp_path / "out")
            assert "was not opened" in line
    file.write_bytes(pickle.dumps(evil))                         # torch.save's format of long ago
    sample_error(capsys, "--ckpt", tmp_path, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


def test_damaged_checkpoints_are_named_and_never_run_nor_grow(tmp_path):
    """Bits flipped, files cut, headers rewritten: a ValueError of one line, or the model itself.

    The format of long ago has no sums over its bytes: there damaged weights may be other ones.
    """
    content = sample_content("cm")
    content["state"].pop("model")
    generator = np.random.default_rng(0)
    refused = 0
    for modern in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=modern)
        whole = (tmp_path / "a.pt").read_bytes()
        want = models.load(tmp_path / "a.pt").functions([0]).draw(8)
        for k in range(30):
            bad = bytearray(whole)
            place = int(generator.integers(len(whole)))
            if k % 3 == 0:
                del bad[place:]
            elif k % 3 == 1:
                bad[place % 3000 if k % 2 else place] ^= 1 << int(generator.integers(8))
            else:
                start = place if k % 2 else max(0, len(whole) - 1 - place % 2000)
                bad[start:start + 8] = generator.bytes(8)
            (tmp_path / "a.pt").write_bytes(bad)
            try:
                drawn = models.load(tmp_path / "a.pt").functions([0]).draw(8)
            except ValueError as error:
                refused += 1
                assert "a.pt" in str(error) or "finite" in str(error)
                assert "\n" not in str(error)
            else:
                assert not modern or torch.equal(drawn, want)
    assert refused > 30


@pytest.mark.parametrize("option, value, said", [
    ("size", 24, "of size 16, the run of 24"), ("cm.sigma_max", 1e300, "sigma_max <= 1e6")])
def test_numbers_that_damage_changed_are_found_on_loading(tmp_path, option, value, said):
    content = sample_content("cm")
    content["config"] = runs.flatten(content["config"]) | {option: value}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"a.pt.*{said}"):
        models.load(tmp_path / "a.pt")


# ---- pictures ----

@pytest.mark.parametrize("stage, how, said", [
    ("ldm", {"sampler": "ddim", "steps": 2}, {"eta": 1.0, "norm": "frame", "latent_size": None}),
    ("cm", {}, {"steps": 1, "sigmas": []})])
def test_fault_f24_image_7_is_the_same_alone_in_batches_and_on_ranks(sample_runs, tmp_path,
                                                                     monkeypatch, stage, how, said):
    """And its file says how it was made."""
    model = models.load(sample_runs / stage)
    alone, four, all_16 = (model.functions(indices, 5, **how).draw(16)
                           for indices in ([7], range(4, 8), range(16)))
    for one in (four[3], all_16[7]):
        assert (one - alone[0]).abs().max() <= 1e-5 * max(1, alone.abs().max())
    assert (all_16[6] - alone[0]).abs().max() > 1e-3

    options = itertools.chain(*((f"--{name}", value) for name, value in how.items()))
    args = ["--ckpt", sample_runs / stage, "--seed", 5, "--res", 16, "-n", 16, *options]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main_sample(*args) == 2                               # each would take another folder
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main_sample(*args, "--out", tmp_path) == 0
    assert len(list(tmp_path.glob("*.png"))) == 16
    pixels, info = main_png(tmp_path / "seed5-000007-16x16.png")
    assert sample_gap(pixels, to_uint8(alone[0])) <= 1 and len(info["sha256"]) == 16
    wanted = {**how, **said, "seed": 5, "index": 7, "res": [16, 16], "window": None, "label": None}
    assert wanted.items() <= info.items()


def test_a_tile_is_part_of_a_picture_only_where_it_changes_it(sample_runs, tmp_path, capsys):
    """Frame statistics: pictures drawn before memory ran out stay those of the call with --tile."""
    args = ["--ckpt", sample_runs / "ldm", "--steps", 2, "--res", 40, "--out", tmp_path]
    assert main_sample(*args) == 0 and main_sample(*args, "--tile", 8) == 0
    assert "tile" not in main_png(tmp_path / "seed0-000000-40x40.png")[1]
    args[-1] = tmp_path / "paper"
    assert main_sample(*args, "--norm", "paper") == 0
    assert main_sample(*args, "--norm", "paper", "--tile", 16) == 0          # the model's own
    assert "another picture" in sample_error(capsys, *args, "--norm", "paper", "--tile", 8)
    field = models.load(sample_runs / "ldm").decode(randn(1, 4, 8, 8), paper=True)
    assert field.paper and field.tile == 16


@pytest.mark.parametrize("size", [(1, 2), (5, 7), (64, 33)])
def test_png_written_in_bands_holds_the_pixels_and_the_parameters(tmp_path, size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    info = {"res": list(size), "window": None, "label": "d\u00e4mmerung"}
    file = tmp_path / "a.png"
    head = pictures.png_head(size, info)
    rgb = (torch.from_numpy(picture).movedim(-1, 0)[None] + 0.5) / 127.5 - 1
    left = size[1] // 2
    for band in (1, 20, 64):                                     # of two tiles side by side
        rows = rgb.split(band, dim=2)
        tiles = itertools.chain(*(((0, 0, row[..., :left]), (0, left, row[..., left:]))
                                  for row in rows))
        pictures.write_png(file, head, size, tiles)
        pixels, read = main_png(file)
        assert np.array_equal(pixels, picture) and read == info
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    text = PngImagePlugin.PngInfo()                              # earlier versions' are known
    text.add_text("parameters", json.dumps(info))
    Image.fromarray(picture).save(file, pnginfo=text)
    assert file.read_bytes().startswith(head)


def test_a_large_png_takes_the_memory_of_one_band_and_shows_how_far_it_is(tmp_path, monkeypatch):
    """12 MB of pixels, which do not compress; numpy tells tracemalloc what it holds."""
    shown = io.StringIO()
    monkeypatch.setattr(pictures, "tqdm", lambda **how: tqdm.tqdm(
        **how | {"disable": False, "delay": 0, "file": shown, "mininterval": 0}))
    band = 2 * torch.rand(1, 3, 64, 1024) - 1
    tracemalloc.start()
    try:
        tiles = itertools.repeat((0, 0, band), 64)
        pictures.write_png(tmp_path / "a.png", pictures.png_head((4096, 1024), {}), (4096, 1024), tiles)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * band.numel() and (tmp_path / "a.png").stat().st_size > 10e6
    assert "a.png:  50%" in shown.getvalue() and "a.png: 100%" in shown.getvalue()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_fault_f11_a_signal_in_sampling_leaves_whole_pictures(sample_runs, tmp_path, monkeypatch,
                                                              capsys, number, code):
    args = ["--ckpt", sample_runs / "cm", "--n", 5, "--batch", 2]
    assert main_sample(*args, "--out", tmp_path / "whole") == 0
    drawn = []
    png_chunk = pictures.png_chunk

    def in_the_middle(kind, content):
        drawn.append(kind)
        if drawn.count(b"IEND") == 3 and kind == b"IDAT":
            os.kill(os.getpid(), number)
        return png_chunk(kind, content)

    monkeypatch.setattr(pictures, "png_chunk", in_the_middle)
    assert main_sample(*args, "--out", tmp_path / "parts") == code
    assert "the same command with --out FOLDER draws the rest" in capsys.readouterr().err
    monkeypatch.undo()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").iterdir()}
    assert len(before) == 3                                      # no part of a file stays either
    assert main_sample(*args, "--out", tmp_path / "parts") == 0
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    whole, parts = ({p.name: p.read_bytes() for p in (tmp_path / case).iterdir()}
                    for case in ("whole", "parts"))
    assert parts == whole and len(whole) == 5


def test_without_memory_a_line_names_what_needs_less(sample_runs, tmp_path, monkeypatch, capsys):
    def full(field, res, window=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Field, "tiles", full)
    args = ["--ckpt", sample_runs / "ldm", "--steps", 2, "--out", tmp_path]
    assert main_sample(*args) == 1
    line, = capsys.readouterr().err.splitlines()
    assert "out of memory" in line and "--tile" in line and not list(tmp_path.iterdir())


def test_drawing_compiles_a_graph_for_decoder_statistics_and_tiles(sample_runs, tmp_path,
                                                                   monkeypatch):
    """Each without a break, at every size and for every picture, and the picture is the same."""
    compiler, graphs = torch.compile, []

    def whole(function, **more):
        return compiler(function, fullgraph=True, dynamic=False,
                        backend=lambda graph, inputs: graphs.append(graph) or graph)

    monkeypatch.setattr(torch, "compile", whole)
    args = ["--ckpt", sample_runs / "ldm", "--steps", 2, "--res", "32,24x40", "--tile", 16, "--n", 2]
    for option in ("off", "on"):
        assert main_sample(*args, "--compile", option, "--out", tmp_path / option) == 0
        assert len(graphs) == (3 if option == "on" else 0)
    for file in (tmp_path / "on").iterdir():
        assert sample_gap(main_png(file)[0], main_png(tmp_path / "off" / file.name)[0]) <= 1


def test_drawing_in_bf16_is_that_in_fp32_to_8_bits(monkeypatch):
    """As on a CUDA GPU but for the compiler: 99.9 % of the pixels within 1/255."""
    plain, quick = (models.load("weights/infd.pt") for _ in range(2))
    autocast = runs.autocast_for("bf16", CPU)
    with monkeypatch.context() as patch:
        for name, told in (("wants_compile", True), ("wants_channels_last", True),
                           ("autocast_for", autocast)):
            patch.setattr(models, name, lambda *args, told=told, **more: told)
        patch.setattr(models, "compiled", lambda function, *args, **more: function)
        quick.compile()
    z = plain.sample([0], steps=2, sampler="dpm++", latent_size=(16, 16))
    ours, theirs = (to_uint8(model.decode(z).draw(64)).astype(int) for model in (quick, plain))
    gap = abs(ours - theirs).max(axis=-1)
    assert 0 < gap.max() and (gap <= 1).mean() >= 0.999


def test_a_sheet_shows_all_pictures_of_a_call(sample_runs, tmp_path, capsys):
    args = ["--ckpt", sample_runs / "cm", "--n", 3, "--res", 16, "--out", tmp_path, "--sheet"]
    sheet = tmp_path / "new/sheet.png"
    assert main_sample(*args, sheet) == 0
    pixels = np.full((36, 36, 3), 255)                           # 16 px and 4 between, in two rows
    for i, (y, x) in enumerate([(0, 0), (0, 20), (20, 0)]):
        pixels[y:y + 16, x:x + 16] = main_png(tmp_path / f"seed0-00000{i}-16x16.png")[0]
    assert np.array_equal(np.asarray(Image.open(sheet)), pixels)
    assert main_sample(*args, tmp_path / "b.jpg") == 0           # nothing drawn anew
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.format == "JPEG" and image.size == (36, 36)
    assert f"{sheet} exists: name a new file" in sample_error(capsys, *args, sheet)
    other = tmp_path / "c.gif"
    assert f"{other}: name a new file, .png or .jpg" in sample_error(capsys, *args, other)


def test_a_sheet_of_several_sizes_names_them_and_enlarges_by_nearest_neighbour(
        sample_runs, tmp_path, monkeypatch):
    words = []
    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "text",
                        lambda pen, corner, word, **how: words.append((corner, word)))
    assert main_sample("--ckpt", sample_runs / "cm", "--res", "32,8x16", "--out", tmp_path,
                       "--sheet", tmp_path / "sheet.png") == 0
    assert words == [((3, 1), "32x32"), ((39, 1), "8x16")]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    small, _ = main_png(tmp_path / "seed0-000000-8x16.png")
    assert np.array_equal(sheet[:16, 36:], small.repeat(2, 0).repeat(2, 1))
    assert sheet.shape == (32, 68, 3) and (sheet[16:, 36:] == 255).all()


# ---- viewer ----

@contextlib.contextmanager
def viewer_at(run, *options):
    """A server of a model of a run: (Gallery, port)."""
    args = sample.parser().read(["--ckpt", str(run), *options], "")
    model = models.load(run)
    show = functools.partial(sample.shown, model, args, sample.origin(model))
    gallery = viewer.Gallery(show, viewer.about(model, args, (64, 64)))
    with viewer.Server(gallery, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield gallery, server.server_port
        finally:
            server.shutdown()
            thread.join()


def viewer_get(port, path):
    """Ask a server: (status, headers, body)."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as asked:
        asked.request("GET", path)
        answer = asked.getresponse()
        return answer.status, answer.headers, answer.read()


@pytest.mark.parametrize("stage, query, options, steps", [
    ("ldm", "seed=3&label=day&steps=2", ["--sampler", "dpm++"], "0 2\n1 2\n"),
    ("cm", "seed=3&label=day", [], "")])
def test_viewer_tiles_are_windows_of_the_picture(sample_runs, tmp_path, stage, query, options, steps):
    with viewer_at(sample_runs / stage, *options) as (gallery, port):
        assert gallery.about["fields"] == ["seed", "label", "steps"][:2 if stage == "cm" else 3]
        status, headers, body = viewer_get(port, "/")
        assert status == 200 and b"</html>" in body and not re.search(rb"https?:", body)
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        status, _, body = viewer_get(port, f"/picture?{query}")
        name = body.decode().removeprefix(steps).strip()
        assert status == 200 and re.fullmatch("[0-9a-f]{16}", name)
        assert viewer_get(port, f"/picture?{query}")[2].decode() == f"{name}\n"   # it is kept

        how = {"steps": 2, "sampler": "dpm++"} if stage == "ldm" else {}
        drawn = models.load(sample_runs / stage).functions([0], 3, "day", **how)
        for level, y, x in ((0, 0, 0), (2, 3, 1), (viewer.DEPTH, 5, 7)):
            status, headers, body = viewer_get(port, f"/tile/{name}/{level}/{y}/{x}")
            assert status == 200 and headers["Content-Type"] == "image/png"
            n = 2**level
            window = (2 * y / n - 1, 2 * x / n - 1, 2 * (y + 1) / n - 1, 2 * (x + 1) / n - 1)
            expected = to_uint8(drawn.draw(256, window)[0])
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), expected)

        # A saved view is, byte for byte, the file that sample.py writes.
        status, headers, body = viewer_get(port, f"/view/{name}?window=-0.5,-0.25,0.5,0.75&res=40x48")
        file = re.search('"(.*)"', headers["Content-Disposition"])[1]
        options = [*options, "--steps", 2] if stage == "ldm" else options
        assert main_sample("--ckpt", sample_runs / stage, "--seed", 3, *options, "--label", "day",
                           "--res", "40x48", "--window", "-0.5,-0.25,0.5,0.75", "--out", tmp_path) == 0
        assert status == 200 and body == (tmp_path / file).read_bytes()


def test_viewer_page_knows_what_the_command_line_asks_for(sample_runs):
    """A class by its number too, and the steps that are taken where the page leaves them open."""
    model = models.load(sample_runs / "ldm")
    for options, label, steps in ((["--label", "2"], "dusk", 20), (["--label", "day"], "day", 20),
                                  (["--eta", "0"], None, 20), (["--sampler", "ddim"], None, 200)):
        args = sample.parser().read(options)
        about = viewer.about(model, args, (64, 64))
        assert about["start"]["label"] == label and about["usual"]["steps"] == steps
        assert model.settings(args.sampler, None, args.eta)["steps"] == steps


def test_classes_whose_names_are_numbers_are_drawn_by_their_names(sample_runs, tmp_path):
    """As folders of digits: class "2" is the second of 1, 2, 3, 4, by every way of drawing."""
    ckpt = runs.read_checkpoint(runs.checkpoints(sample_runs / "cm")[0])
    runs.write_checkpoint(tmp_path / "digits.pt", ckpt | {"classes": ["1", "2", "3", "4"]})
    model = models.load(tmp_path / "digits.pt")
    for label in ("2", "4"):
        args = sample.parser().read(["--label", label])
        assert viewer.about(model, args, (64, 64))["start"]["label"] == label
    assert main_sample("--ckpt", tmp_path / "digits.pt", "--label", 2, "--morph", 2, "--frames", 2,
                       "--out", tmp_path / "walk.png") == 0
    with Image.open(tmp_path / "walk.png") as walk:
        assert json.loads(walk.text["parameters"])["label"] == "2"
        walk.seek(0)
        first = np.asarray(walk.convert("RGB"))
    assert np.array_equal(first, to_uint8(model.functions([0], 0, "2").draw(first.shape[:2]))[0])



def test_viewer_keeps_few_pictures_and_one_it_forgot_is_asked_for_again(sample_runs, monkeypatch):
    monkeypatch.setattr(viewer, "PICTURES", 2)
    with viewer_at(sample_runs / "cm") as (gallery, port):
        names = [viewer_get(port, f"/picture{query}")[2].decode().strip()
                 for query in ("?seed=0", "?seed=1", "?seed=2")]
        codes = [viewer_get(port, f"/tile/{name}/0/0/0")[0] for name in names]
        assert codes == [404, 200, 200] and len(gallery.shown) == 2
        assert viewer_get(port, "/picture")[2].decode().strip() == names[0]  # seed 0 is the usual
        assert viewer_get(port, f"/tile/{names[0]}/0/0/0")[0] == 200


def viewer_hostile(name):
    """Requests as bytes that no page of ours makes."""
    paths = ["/../viewer.py", "/viewer.py", "//127.0.0.1/", "/?a", "/%2e%2e/", "*", "/tile",
             f"/tile/{name}/13/0/0", f"/tile/{name}/1/2/0", f"/tile/{name}/0/0/0?x",
             f"/tile/{'0' * 16}/0/0/0", "/picture?seed=--1", "/picture?seed=1&seed=2",
             "/picture?label=noon", "/picture?label=\u00fc", "http://[/", "/picture?steps=5", "/picture?x",
             "/picture?" + "&".join(10 * ["seed=1"]), f"/view/{name}",
             *(f"/view/{name}?window={view}" for view in (
                 "-1,-1,1,1&res=9999x9999", "-1,-1,1,1&res=0x5", "1,1,-1,-1&res=4x4",
                 "-1,-1,1e999,1&res=4x4", "1,2,3&res=4x4")), "/" + 21000 * "a", "/" + 70000 * "a"]
    good = "GET / HTTP/1.1\r\nHost: "
    heads = [f"GET {path} HTTP/1.1\r\nHost: localhost" for path in paths]
    heads += [good + host for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1]",
                                       "localhost\r\nSec-Fetch-Site: cross-site",
                                       "localhost\r\nSec-Fetch-Site: same-site\r\n"
                                       "Sec-Fetch-Mode: no-cors",
                                       "localhost\r\nX: " + 70000 * "a")]
    heads += [f"{method} / HTTP/1.1\r\nHost: localhost" for method in ("POST", "HEAD", "BREW")]
    heads += ["GET / HTTP/1.1", "GET / HTTP/9.9", "GET / HTTX", "GET", "GET / / /", "\x16\x03\x01\x02"]
    noise = np.random.default_rng(0).integers(11, 256, (50, 200), dtype=np.uint8)
    return [f"{head}\r\n\r\n".encode("latin-1") for head in heads] + [
        b"GET /" + row.tobytes() + b" HTTP/1.0\r\n\r\n" for row in noise]


def test_viewer_refuses_hostile_requests_and_survives_who_goes_away(sample_runs, capfd):
    with viewer_at(sample_runs / "cm") as (gallery, port):
        name = viewer_get(port, "/picture?seed=0")[2].decode().strip()
        with gallery.model, contextlib.ExitStack() as clients:       # all wait for the model
            for _ in range(viewer.JOBS):
                client = socket.create_connection(("127.0.0.1", port))
                clients.enter_context(client)
                client.sendall(b"GET /picture?seed=1 HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert viewer_get(port, "/")[0] == 429
        for _ in range(500):
            if viewer_get(port, "/")[0] == 200:
                break
            time.sleep(0.02)
        for request in viewer_hostile(name):
            answer = b""
            with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
                with contextlib.suppress(ConnectionResetError):      # it does not read all
                    client.sendall(request)
                    client.shutdown(socket.SHUT_WR)
                    for part in iter(functools.partial(client.recv, 4096), b""):
                        answer += part
            assert re.match(rb"HTTP/1.0 [45]\d\d |$", answer), (request[:200], answer[:200])
            assert len(answer) < 1500 and b"Traceback" not in answer
            assert answer or len(request) > 60000
        assert viewer_get(port, f"/tile/{name}/0/0/0")[0] == 200
    assert capfd.readouterr().err == ""


def test_viewer_says_what_went_wrong_on_its_own_side(sample_runs, monkeypatch, capfd):
    """A file of --given that has gone, memory that does not suffice: a status, and a line here."""
    errors = iter((FileNotFoundError(2, "No such file", "peak.png"), RuntimeError("out of memory"),
                   ConnectionResetError(104, "reset")))

    def fails(*_):
        raise next(errors)

    with viewer_at(sample_runs / "cm") as (gallery, port):
        name = viewer_get(port, "/picture?seed=-3")[2].decode().strip()
        monkeypatch.setattr(gallery, "show", fails)
        monkeypatch.setattr(viewer, "whole", fails)
        status, _, body = viewer_get(port, "/picture?seed=4")
        assert status == 500 and b"peak.png" in body
        assert viewer_get(port, f"/tile/{name}/0/0/0")[0] == 500
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            viewer_get(port, f"/tile/{name}/0/0/0")                  # who reset it needs no answer
    lines = capfd.readouterr().err.splitlines()
    assert ["peak.png" in lines[0], "out of memory" in lines[1], len(lines)] == [True, True, 2]


def test_viewer_leaves_a_view_that_it_cannot_finish_without_its_end(sample_runs, monkeypatch):
    """A PNG is whole if it ends by IEND, which the page looks for."""
    query = "window=-1,-1,1,1&res=100x90"
    with viewer_at(sample_runs / "ldm", "--sampler", "dpm++") as (gallery, port):
        name = viewer_get(port, "/picture?steps=1")[2].decode().split()[-1]
        png = viewer_get(port, f"/view/{name}?{query}")[2]
        assert png[-8:-4] == b"IEND"
        info, drawing = gallery.shown[name]

        def cut(size, window):
            tiles = iter(drawing(size, window))
            yield next(tiles)
            gallery.closing.set()                                    # Ctrl-C
            yield from tiles

        gallery.shown[name] = info, cut
        part = viewer_get(port, f"/view/{name}?{query}")[2]
    assert part[:33] == png[:33] and b"IEND" not in part and b"closed" not in part


def test_viewer_can_be_followed_to_by_a_link_and_tells_its_pictures_from_another_s(sample_runs):
    names = []
    for _ in range(2):
        with viewer_at(sample_runs / "cm") as (_, port):
            names.append(viewer_get(port, "/picture?seed=1")[2])
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as asked:
                asked.request("GET", "/", headers={"Sec-Fetch-Site": "cross-site",
                                                   "Sec-Fetch-Mode": "navigate"})
                assert asked.getresponse().status == 200
    assert names[0] != names[1]


def test_viewer_ends_by_ctrl_c_and_says_what_is_wrong_before(sample_runs, monkeypatch, capsys):
    answers = []

    def visited(server):
        """Ask from another thread, then press Ctrl-C."""
        try:
            answers.append(viewer_get(server.server_port, "/picture?seed=1")[0])
            with pytest.raises(ValueError, match=f"--port {server.server_port}: .* choose another"):
                viewer.serve(None, server.gallery.about, server.server_port)
            answers.append("refused")
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    class Visited(viewer.Server):
        def service_actions(self):
            """Called by serve_forever at every turn."""
            if not answers:
                answers.append("begun")
                threading.Thread(target=visited, args=(self,)).start()

    monkeypatch.setattr(viewer, "Server", Visited)
    assert main_sample("--ckpt", sample_runs / "cm", "--view", "--port", 0) == 0
    assert answers == ["begun", 200, "refused"] and "closed" in capsys.readouterr().out

    class Interrupted(viewer.Server):
        """Ctrl-C comes while a request is taken in, where the library goes on after errors."""

        def service_actions(self):
            if not answers:
                answers.append("asked")
                self.client = socket.create_connection(("127.0.0.1", self.server_port))

        def process_request(self, *request):
            self.client.close()
            raise runs.Stopped(130)

    answers.clear()
    monkeypatch.setattr(viewer, "Server", Interrupted)
    assert main_sample("--ckpt", sample_runs / "cm", "--view", "--port", 0) == 0
    assert "closed" in capsys.readouterr().out
    assert "window" in sample_error(capsys, "--ckpt", sample_runs / "cm-unet", "--view")
    line = sample_error(capsys, "--ckpt", sample_runs / "cm", "--view", "--seed", 10**16)
    assert "seed: cannot read" in line


def test_viewer_works_in_a_browser(sample_runs):
    """It samples, draws all tiles of the first view, and says no error."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium here")
    with viewer_at(sample_runs / "cm") as (gallery, port):
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
                   "--window-size=300,300", "--virtual-time-budget=20000", "--enable-logging=stderr",
                   f"http://127.0.0.1:{port}/#seed=7"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        asked = gallery.read("seed=7&label=")
        drawn = [gallery.read("seed=7")] if gallery.shown else []
    assert "×1.0" in ran.stdout and drawn == [asked]
    assert "Uncaught" not in ran.stderr and "Refused to" not in ran.stderr


# ---- moving pictures, and a page that is one ----

def test_a_dive_keeps_its_point_in_place_and_ends_as_close_as_asked():
    windows = pictures.dive(64, (0.5, -0.25), 9)
    assert windows[0] == (-1, -1, 1, 1)
    for y0, x0, y1, x1 in windows:
        assert -1 <= y0 and y1 <= 1 and -1 <= x0 and x1 <= 1
        assert math.isclose((0.5 - y0) / (y1 - y0), 0.75)
        assert math.isclose((-0.25 - x0) / (x1 - x0), 0.375)
    assert math.isclose(windows[-1][2] - windows[-1][0], 2 / 64)
    assert math.isclose(windows[4][2] - windows[4][0], 2 / 8)        # half-way in octaves


@pytest.mark.parametrize("kind, tolerance", [("webp", 15), ("png", 0)])      # WebP: of noise
def test_a_dive_is_written_as_a_moving_picture(sample_runs, tmp_path, capsys, kind, tolerance):
    run, file = sample_runs / "cm", tmp_path / "new" / f"dive.{kind}"
    dive = ["--ckpt", run, "--zoom", 8, "--at", "0.5,0", "--frames", 4, "--res", 32, "--out"]
    assert main_sample(*dive, file) == 0
    with Image.open(file) as movie:
        assert movie.n_frames == 4 and movie.size == (32, 32)
        info = movie.text["parameters"] if kind == "png" else movie.getexif()[0x010E]
        assert json.loads(info)["zoom"] == 8 and json.loads(info)["at"] == [0.5, 0]
        movie.seek(3)
        last = np.asarray(movie.convert("RGB")).astype(int)
    function = models.load(run).functions([0])
    exact = to_uint8(function.draw(32, pictures.dive(8, (0.5, 0), 4)[-1])[0])
    assert np.abs(last - exact).mean() <= tolerance
    assert "name a new file" in sample_error(capsys, *dive, file)
    assert list(file.parent.iterdir()) == [file]


def test_a_walk_between_pictures_starts_and_turns_at_them(sample_runs, tmp_path):
    run, file = sample_runs / "cm", tmp_path / "walk.png"
    assert main_sample("--ckpt", run, "--morph", 3, "--frames", 8, "--label", 1, "--start", 5,
                       "--res", 24, "--out", file) == 0
    with Image.open(file) as movie:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(movie)]
    for frame, i in ((0, 5), (2, 6), (4, 7)):
        exact = models.load(run).functions([i], labels=1).draw(24)
        assert sample_gap(frames[frame], to_uint8(exact[0])) == 0
    assert len(frames) == 8 and all(np.array_equal(frames[i], frames[8 - i]) for i in (1, 2, 3))


def html_about(text):
    """What a page knows."""
    return json.loads(re.search('<script type="application/json" id="about">(.*?)</script>', text)[1])


def html_colours(about, coord):
    """What the shader of viewer.html computes, in float32, at coord (n, 2): (n, 3)."""
    f = about["function"]
    halves = np.frombuffer(base64.b64decode(f["weights"]), "<f2").astype(np.float32)
    turns = (coord @ np.float32(f["frequencies"]).T / 2) % 1
    angle = np.float32(2 * np.pi) * turns
    h = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    for layer, (rows, out) in enumerate(f["shapes"]):
        wide = -(-out // 4) * 4
        weights, halves = halves[:rows * wide].reshape(rows, wide)[:, :out], halves[rows * wide:]
        h = (np.maximum(h, 0) if layer else h) @ weights[:-1] + weights[-1]
    assert halves.size == 0
    return h


def test_a_page_holds_the_image_function(tmp_path, capsys):
    file = tmp_path / "out.html"
    page = ["--model", "cm", "--html", file]
    assert main_sample(*page, "--seed", 3, "--label", "dusk") == 0
    text = file.read_text()
    assert 40_000 < len(text) < 200_000 and not re.search("https?:", text)
    about = html_about(text)
    assert about["function"]["info"]["label"] == "dusk"
    function = models.load(sample.bundled("cm")).functions([0], 3, "dusk")
    exact = function.draw(48)[0].movedim(0, -1).reshape(-1, 3).numpy()
    drawn = html_colours(about, coord_grid((48, 48)).reshape(-1, 2).numpy())
    assert np.abs(drawn.clip(-1, 1) - exact.clip(-1, 1)).max() < 0.002    # of 2: half precision
    assert "name a new file" in sample_error(capsys, *page)
    infd = sample_error(capsys, "--html", tmp_path / "b.html")
    assert "--html means nothing to a model of the kind INFD" in infd


def test_a_page_holds_a_function_whose_frequencies_are_turned(tmp_path):
    function = cm_function(1, turned=True)
    pictures.write_html(tmp_path / "out.html", function, (16, 16), {})
    text = (tmp_path / "out.html").read_text()
    about = html_about(text)
    drawn = html_colours(about, coord_grid((24, 24)).reshape(-1, 2).numpy())
    exact = function.draw(24)[0].movedim(0, -1).reshape(-1, 3).numpy()
    assert np.abs(drawn - exact).max() < 0.003 * np.abs(exact).max()     # half precision


# ---- a photograph of one's own ----

def test_a_photograph_is_drawn_at_any_size_as_from_python(sample_runs, tmp_path, capsys):
    """The centre square of a wide picture; a window is the slice of the whole."""
    file = tmp_path / "my photo.png"
    small = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(small).resize((60, 40), Image.Resampling.BICUBIC).save(file)
    args = ["--ckpt", sample_runs / "ae", "--image", file]
    assert main_sample(*args, "--res", "24,48", "--out", tmp_path / "a") == 0
    assert "its centre square, 40 of 60x40 pixels, encoded at 16 px" in capsys.readouterr().out
    infd = models.load(sample_runs / "ae")
    with Image.open(file) as image:
        square = image.crop((10, 0, 50, 40))
    field = infd.decode(infd.encode(square))
    for res in (24, 48):
        drawn, info = main_png(tmp_path / f"a/my photo-{res}x{res}.png")
        assert np.array_equal(drawn, to_uint8(field.draw(res))[0])
        assert info["image"] == "my photo.png" and len(info["image_sha256"]) == 16
    window = ["--window", "0,0,1,1", "--res", 24]
    assert main_sample(*args, *window, "--out", tmp_path / "b") == 0
    part, _ = main_png(tmp_path / "b/my photo-24x24.png")
    assert sample_gap(part, drawn[24:, 24:]) <= 1
    assert main_sample(*args, "--latent-size", 20, "--out", tmp_path / "c") == 0
    larger, _ = main_png(tmp_path / "c/my photo-40x40.png")     # by default as large as it is
    assert np.array_equal(larger, to_uint8(infd.decode(infd.encode(file, 40)).draw(40))[0])


@pytest.mark.parametrize("option", ["--image", "--given"])
def test_a_picture_of_the_users_that_cannot_be_read_is_one_line_with_its_cause(option, sample_runs,
                                                                               tmp_path, capsys):
    content = {"large.png": (b"", "a picture of more than 256 MB"), "no.png": (None, "No such file"),
               "cut.png": (data_file(data_picture(200))[:-300], "truncated"),
               "text.png": (b"words", "not a PNG, JPEG or WEBP image"),
               "bomb.png": (data_grey_png(9_000, zlib.compress(bytes(9_000 * 9_001))), "pixels are")}
    for name, (file, cause) in content.items():
        if file is not None:
            (tmp_path / name).write_bytes(file)
        if name == "large.png":
            os.truncate(tmp_path / name, files.MAX_BYTES + 1)     # of holes: it takes no room
        assert main_sample("--ckpt", sample_runs / "ldm", option, tmp_path / name) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and name in lines[0] and cause in lines[0], lines


def test_a_stretched_picture_is_remarked_on_with_what_people_mean(sample_runs, tmp_path, capsys):
    common = ["--ckpt", sample_runs / "ldm", "--steps", 2, "--res", "16x32", "--out", tmp_path]
    for more, stretched in (([], True), (["--latent-size", "8x16"], False),
                            (["--window", "-0.5,-1,0.5,1"], False), (["--window", "0,0,1,1"], True)):
        common[-1] = tmp_path / "-".join(more)
        assert main_sample(*common, *more) == 0
        assert ("stretches the picture" in capsys.readouterr().err) == stretched


# ---- one-step models ----

def test_stage_cm_one_function_is_drawn_at_any_size_and_window(sample_runs, tmp_path):
    common = ["--ckpt", sample_runs / "cm", "--n", 2, "--out", tmp_path]
    assert main_sample(*common, "--res", "32,16x48") == 0
    assert main_sample(*common, "--res", 16, "--window", "0,-1,1,0", "--batch", 1) == 0
    assert main_sample(*common, "--res", "32x16", "--func-dtype", "bfloat16") == 0
    model = models.load(sample_runs / "cm")
    assert model.weights == "EMA" and model.classes == tuple(SAMPLE_CLASSES)
    for i in range(2):
        drawn = {}
        function = model.functions([i])                          # alone; the files came from two
        for size in ((32, 32), (16, 48), (32, 16), (16, 16)):
            drawn[size], info = main_png(tmp_path / f"seed0-{i:06d}-{size[0]}x{size[1]}.png")
            assert info["steps"] == 1 and info["index"] == i
            if size != (16, 16):
                own = to_uint8(function.draw(size)[0])
                assert sample_gap(drawn[size], own) <= (3 if "func_dtype" in info else 1)
        assert sample_gap(drawn[16, 16], drawn[32, 32][16:, :16]) <= 1       # twice the size


def test_stage_cm_more_steps_stay_at_the_training_resolution(sample_runs, tmp_path):
    ckpt = ["--ckpt", sample_runs / "cm"]
    levels = ["--sigmas", "4,0.5", "--label", "dusk"]
    assert main_sample(*ckpt, *levels, "--out", tmp_path / "a") == 0
    pixels, info = main_png(tmp_path / "a/seed0-000000-16x16.png")
    noises = [torch_noise((3, 16, 16), 0, "x_T", 0, k)[None] for k in range(3)]
    f = models.load(sample_runs / "cm").f
    image = sample_multistep(f, noises, (80.0, 4.0, 0.5), torch.tensor([2]))
    assert sample_gap(pixels, to_uint8(image[0])) <= 1
    assert info["sigmas"] == [4.0, 0.5] and info["steps"] == 3


def test_stage_cm_a_generator_of_pixels_draws_its_own_size(sample_runs, tmp_path):
    ckpt = ["--ckpt", sample_runs / "cm-unet"]
    assert main_sample(*ckpt, "--out", tmp_path / "a") == 0
    pixels, _ = main_png(tmp_path / "a/seed0-000000-16x16.png")
    model = models.load(sample_runs / "cm-unet")
    image = sample_onestep(model.f, torch_noise((3, 16, 16), 0, "x_T", 0, 0)[None])
    assert sample_gap(pixels, to_uint8(image[0])) <= 1
    with pytest.raises(ValueError, match="makes pixels, not functions"):
        model.functions([0])


# ---- bad input ----

@pytest.fixture(scope="module")
def sample_files(tmp_path_factory):
    """A folder of pictures and checkpoints, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    picture = conditions_file(folder / "a.png", 20)
    conditions_file(folder / "large.png", 1025)
    (folder / "broken.png").write_bytes(picture.read_bytes()[:60])
    (folder / "text.png").write_text("no picture")
    (folder / "empty").mkdir()
    for name, content in (("other.pt", {"stage": "other", "step": 1}),
                          ("other.pth", {"model": {"a": torch.ones(1)}}), ("list.pt", [1])):
        torch.save(content, folder / name)
    return folder


@pytest.mark.parametrize("stage, args, said", [
    ("ldm", "--res 0", "write 512"), ("ldm", "--res 12y", "write 512, or 512x1024"),
    ("ldm", "--res 99999999", "cannot read"), ("ldm", "--tile 0", "at least 1"),
    ("ldm", "--window 0,0,0,1", "need -1 <= y0 < y1 <= 1"),
    ("ldm", "--window -1,-1,-0.5", "and (y0, x0, y1, x1)"),
    ("ldm", "--n 0", "at least 1"), ("ldm", "--n many", "invalid int value"),
    ("ldm", "--label noon", "this model has dawn, day, dusk, night"),
    ("cm-unet", "--label 0", "this model has no classes"),
    ("ldm", "--device abacus", "abacus"), ("ldm", "--compile yes", "choose auto, on, off or graphs"),
    ("ldm", "--compile graphs", "compile=graphs is for training"),
    ("ldm", "--sampler ddim --steps 300", "use 250 or"), ("ldm", "--steps 0", "steps"),
    ("ldm", "--sampler dpm++ --steps 1001", "1001 sampling steps; choose 1 to "),
    ("ldm", "--sampler cm", "sampler cm: this model is drawn by ddim or dpm++"),
    ("ldm", "--sampler dpm++ --eta 2", "eta is 2"),
    ("ldm", "--eta 2", "eta is 2"),
    ("ldm", "--sigmas 4,1", "--sigmas means nothing to a model of the kind INFD"),
    ("cm", "--steps 2 --norm paper", "--steps, --norm means nothing"),
    ("cm", "--sigmas 2 --res 32", "only one step of generator=func"),
    ("cm-unet", "--res 16,32", "only one step of generator=func"),
    ("cm", "--sigmas 1,2", "decreasing"), ("cm", "--sigmas nan", "decreasing"),
    ("cm", "--sigmas 99", "below 80"), ("cm", "--sigmas 1,0", "above 0"),
    ("ldm", "--samplr ddim", "no option --samplr; did you mean --sampler"),
    ("ldm", "res=512", "res=512: write --res 512"),
    ("ldm", "--size 512", "sizes are given by --res"),
    ("ldm", "--image a.png --label day", "--label: --image draws one picture, yours"),
    ("ldm", "--image a.png --n 2", "--n, --start: --image draws"),
    ("ldm", "--image a.png --latent-size 8x16", "give --latent-size one number"),
    ("ldm", "--image none.png", "none.png: No such file"),
    ("ldm", "--image text.png", "text.png: not a PNG, JPEG or WEBP image"),
    ("cm", "--image a.png", "a model of stage cm encodes no pictures"),
    ("ldm", "--given a.png --at 0,0,2,1", "window 0,0,2,1: need"),
    ("ldm", "--given a.png --at 0,0,1", "give 512 or (256, 512), and (y0, x0, y1, x1)"),
    ("ldm", "--given a.png --at=0,0,1,1 --at=0,0,1,1", "more windows than pictures"),
    ("ldm", "--at=0,0,1,1 --given a.png", "more windows than pictures"),
    ("ldm", "--given .", "Is a directory"), ("ldm", "--given broken.png", "broken.png: "),
    ("ldm", "--given large.png", "are more than 1,048,576: make the pictures smaller"),
    ("ldm", "--step-size 1", "--step-size is that of --given"),
    ("ldm", "--given a.png --step-size nan", "step size is nan"),
    ("ldm", "--prompt-at 'a lake' 0,0,1,1", "--prompt-at means nothing"),
    ("ae", "--given a.png", "this is an autoencoder"),
    ("cm", "--sigmas 1 --given a.png", "only one step"),
    ("cm", "--zoom 8 --frames 3 --out b.png", "--frames is even"),
    ("cm", "--zoom 8 --frames 3000 --res 2048 --out b.png", "need more than 4 GB of memory"),
    ("cm", "--zoom 1 --out b.png", "--zoom above 1"),
    ("cm", "--zoom 8 --at 2,0 --out b.png", "--at y,x within -1 and 1"),
    ("cm", "--zoom 8 --morph 2 --out b.png", "--zoom and --morph: ask for one at a time"),
    ("cm", "--morph 0 --out b.png", "--morph 2 to 1000"), ("cm", "--zoom 0 --out b.png", "above 1"),
    ("cm", "--morph 2", "a moving picture has a name: --out FILE.webp"),
    ("ldm", "--morph 2 --prompt a --prompt b --out b.png", "several prompts are for still pictures"),
    ("cm", "--html b.html --sigmas 0.8", "--sigmas: --html takes none"),
    ("cm", "--html b.html --func-dtype bfloat16", "--func-dtype: --html takes none"),
    ("cm", "--html b.html --window 0,0,1,1", "--window: --html takes none"),
    ("cm", "--html b.html --out c", "--out: --html takes none"),
    ("cm", "--export b.pt --decoder c", "--decoder goes with pictures"),
    ("cm", "--export b.pt --res 64", "--res goes with pictures"),
    ("ldm", "--view --n 3", "--n: --view takes none"), ("ldm", "--view --sheet b.png", "--sheet: --v"),
    ("ldm", "--zoom 4 --window 0,0,1,1 --out b.png", "--window: --zoom takes none"),
    ("cm", "--view --res 16,32", "--view draws at one size: give --res one"),
    ("cm", "--view --port 99999", "--port 99999: ports are 0 to 65535"),
    ("cm", "--port 99", "--port means nothing to still pictures"),
    ("cm", "--frames 7", "--frames means nothing to still pictures"),
    ("cm", "--out lab --sheet lab/seed0-000000-16x16.png", "is one of the pictures"),
    ("ldm", "--image a.png --given a.png --merges b", "--given, --merges: --image draws one"),
    ("ae", "--image a.png --step-size 3 --negative snow", "--step-size, --negative: --image draws"),
    ("cm", "--out a.png", "a.png: File exists"), ("cm", "--out a.png/b", "a.png/b: Not a directory"),
    ("cm", "--export a.png/b.pt", "a.png: File exists"),                          # case 7
    (".", "", "is a folder of runs: choose "), ("ae", "", "this is an autoencoder (stage ae)"),
    ("cm", "--ckpt none.pt", "no checkpoint at none.pt"),
    ("cm", "--ckpt text.png", "text.png was not opened"),
    ("cm", "--ckpt other.pt", "other.pt: neither stage ae, ldm or cm"),
    ("cm", "--ckpt other.pth", "nor a published INFD or OpenAI file"),
    ("cm", "--ckpt list.pt", "list.pt is no checkpoint: expected a dict"),
    ("cm", "--ckpt empty", "no checkpoint (step-*.pt) in empty")])
def test_what_cannot_be_drawn_is_refused_in_one_line(sample_runs, sample_files, monkeypatch, capsys,
                                                     stage, args, said):
    monkeypatch.chdir(sample_files)
    assert said in sample_error(capsys, "--ckpt", sample_runs / stage, *shlex.split(args))
    assert not list(sample_files.glob("samples/*/*"))


def test_mistakes_from_python_are_named_too(sample_runs):
    infd, cm = (models.load(sample_runs / stage) for stage in ("ldm", "cm"))
    field = infd.functions([0], steps=2)
    for call, said in ((lambda: infd.sample([0], steps=0), "0 sampling steps"),
                       (lambda: infd.sample([0], sampler="heun"), "drawn by ddim or dpm\\+\\+"),
                       (lambda: infd.sample(0), "indices 0: give the numbers of the images"),
                       (lambda: infd.functions([]), "indices \\[\\]: give the numbers"),
                       (lambda: cm.functions(3), "indices 3: give the numbers"),
                       (lambda: cm.sample(["a"]), "indices \\['a'\\]: give"),
                       (lambda: infd.sample([0], labels=["day", "dusk"]), "2 labels for 1 images"),
                       (lambda: cm.functions([0], labels=4), "label 4: this model has dawn"),
                       (lambda: cm.functions([0], labels=[1.5]), "label 1.5: this model"),
                       (lambda: field.draw("64"), "resolution '64', window None: give 512"),
                       (lambda: field.draw(8.5), "resolution 8.5"),
                       (lambda: field.draw(8, (0, 0, 1)), "and \\(y0, x0, y1, x1\\)"),
                       (lambda: infd.encode(Image.new("RGB", (9, 9)), 15), "a multiple of 2"),
                       (lambda: infd.decode(torch.zeros(1, 4, 8, 8), tile=0), "at least 1 pixel")):
        with pytest.raises(ValueError, match=said):
            call()
    by_name = infd.sample(range(2), steps=2, labels=["dusk", 0], seed=1)
    assert torch.equal(by_name, infd.sample(np.arange(2), steps=2, labels=["2", "dawn"], seed=1))
    same = cm.functions([0, 1], labels="day").draw(np.int64(8))
    assert torch.equal(same, cm.functions([0, 1], labels=torch.tensor([1, 1])).draw([8, 8]))


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_case_7_without_permission_the_line_says_so(sample_runs, capsys):
    """As a user without root's powers; read-only folders and checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        closed, ckpt = (shutil.copy(sample_runs / "cm/step-00000004.pt", f"{folder}/{name}.pt")
                        for name in ("closed", "open"))
        os.chmod(closed, 0)
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            for args in ([closed, "--out", "out"], [ckpt, "--out", folder],
                         [ckpt, "--out", f"{folder}/new"]):
                line = sample_error(capsys, "--ckpt", *args)
                assert "ermission" in line and folder in line
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)


def test_case_4_names_that_are_no_text_are_printed_escaped(sample_runs, tmp_path, monkeypatch):
    """The work is done, said and kept, whatever the terminal can show."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, "utf-8", "strict"))
    assert main_sample("--ckpt", sample_runs / "cm", "--out", out) == 0
    assert rb"caf\udce9" in terminal.getvalue() and len(list(Path(out).glob("*.png"))) == 1


# ---- export ----

@pytest.mark.parametrize("stage", ["ldm", "cm"])
def test_export_keeps_what_sampling_needs_in_half_precision(sample_runs, tmp_path, capsys, stage):
    file = tmp_path / "a.pt"
    assert main_sample("--ckpt", sample_runs / stage, "--export", file) == 0
    whole, small = (models.load(path) for path in (sample_runs / stage, file))
    assert (small.weights, small.step, small.size) == ("EMA", whole.step, whole.size)
    assert small.classes == whole.classes
    state = runs.read_checkpoint(file)["state"]
    assert state.keys() == ({"ema", "scale"} if stage == "ldm" else {"ema"})
    if stage == "ldm":
        assert torch.equal(small.scale.std, whole.scale.std)
    whole, small = (m.unet if stage == "ldm" else m.f.net for m in (whole, small))
    for ours, theirs in zip(small.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-11, atol=2**-25)     # half a unit
    for args, said in ((["--ckpt", sample_runs / stage, "--export", file], "exists; choose"),
                       (["--ckpt", file, "--raw"], "moving average alone: leave --raw out")):
        assert said in sample_error(capsys, *args)
    trained = models.load(sample_runs / stage, raw=True)
    assert trained.weights == "trained weights"
    raw = tmp_path / "raw.pt"
    assert main_sample("--ckpt", sample_runs / stage, "--raw", "--export", raw) == 0
    assert "ema" not in runs.read_checkpoint(raw)["state"]
    small = models.load(raw)
    whole, small = (m.unet if stage == "ldm" else m.f.net for m in (trained, small))
    for ours, theirs in zip(small.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-11, atol=2**-25)


def test_export_names_no_folder_of_this_machine_and_takes_what_is_sampled(tmp_path, capsys):
    given = sample_content("cm")
    given["config"] |= {"data": str(tmp_path / "faces.zip"), "init": "runs/faces/ae"}
    torch.save(given, tmp_path / "given.pt")
    assert main_sample("--ckpt", tmp_path / "given.pt", "--export", tmp_path / "kept.pt") == 0
    kept = runs.read_checkpoint(tmp_path / "kept.pt")["config"]
    assert kept == given["config"] | {"data": "faces.zip"}
    torch.save({**given, "stage": "pretrain"}, tmp_path / "given.pt")
    line = sample_error(capsys, "--ckpt", tmp_path / "given.pt", "--export", tmp_path / "b.pt")
    assert "neither stage ae, ldm or cm" in line and "pretrain" in line


# ---- the weights that come with the project ----

@pytest.fixture(scope="module")
def held_out():
    """128 held-out scenes (128, 3, 32, 32), and their classes."""
    scenes = data.open_data("synthetic", "val")
    images = torch.stack([data.to_tensor(scenes[i].draw(32)) for i in range(128)])
    return images, torch.tensor([scenes.label(i) for i in range(128)])


def bundled_classes(pictures, held_out):
    """Of which class the mean colour of pictures is: the nearest, by the spread within classes."""
    colour, truth = (images.mean(dim=(2, 3)) for images in (pictures.clamp(-1, 1), held_out[0]))
    centres = torch.stack([truth[held_out[1] == c].mean(dim=0) for c in range(4)])
    spread = torch.linalg.cholesky(torch.cov((truth - centres[held_out[1]]).T))
    apart = torch.linalg.solve_triangular(spread, (colour[:, None] - centres).mT, upper=False)
    return apart.norm(dim=1).argmin(dim=1)


def bundled_pictures(name, first, **how):
    """16 pictures of all four classes in turn, by bundled weights."""
    model = models.load(sample.bundled(name))
    asked = {"indices": range(first, first + 16), "labels": [0, 1, 2, 3] * 4}
    if name == "cm":
        return model.functions(**asked).draw(32)
    if model.text is not None:
        times = ("at dawn", "by day", "at dusk", "at night")
        asked["prompts"] = [f"mountains {time} in summer, conifers" for time in times]
        del asked["labels"]
    return model.decode(model.sample(**asked, **how), paper=True).draw(32)   # at once


@pytest.mark.parametrize("name, how", [
    ("infd", {"steps": 8}), ("infd_onestep", {"steps": 1}), ("cm", {})])
def test_bundled_weights_make_pictures_of_the_data(held_out, name, how):
    """Nearer to held-out scenes than to noise by far, of the class asked for; in small files."""
    assert sample.bundled(name).stat().st_size <= 20e6
    config = runs.read_checkpoint(sample.bundled(name))["config"].values()
    assert not [text for text in config if isinstance(text, str) and text.startswith(("/", "~"))]
    pictures = bundled_pictures(name, 0, **how)
    noise = torch.stack([torch_noise((3, 32, 32), 0, "demo", i) for i in range(16)])
    goal = experiments.colour_moments(held_out[0])
    near, far = (metrics.frechet_distance(*experiments.colour_moments(images), *goal)
                 for images in (pictures, noise))
    assert near < 0.2 * far
    assert (bundled_classes(held_out[0], held_out) == held_out[1]).all()
    assert (bundled_classes(pictures, held_out) == torch.arange(16) % 4).all()


@slow
@pytest.mark.parametrize("name, how", [
    ("infd", dict(sampler="dpm++")), ("infd", dict(sampler="dpm++", eta=0.0)),
    ("infd", dict(sampler="ddim", eta=0.0)), ("infd", dict(sampler="ddim", eta=1.0)),
    ("infd", dict(sampler="ddim", eta=0.0, steps=50)), ("infd_text", {}),
    ("infd_onestep", dict(steps=1)), ("infd_onestep", dict(steps=2)), ("cm", {})])
def test_bundled_pictures_are_of_the_class_asked_for(held_out, name, how):
    right = 0
    for first in range(0, 208, 16):
        found = bundled_classes(bundled_pictures(name, first, **how), held_out)
        right += (found == torch.arange(16) % 4).sum().item()
    assert right >= 0.99 * 208


def test_the_bundled_autoencoder_reconstructs_held_out_scenes():
    model = models.load(sample.bundled("infd"))
    scene = data.open_data("synthetic", "val")[0]
    image, truth = (data.to_tensor(scene.draw(n * model.size))[None] for n in (1, 2))
    field = model.decode(model.autoencoder.encode(image))
    assert metrics.psnr(field.draw(model.size), image).item() > 26
    assert metrics.psnr(field.draw(2 * model.size), truth).item() > 24


def test_a_prompt_alone_is_drawn_by_the_bundled_model_of_text(tmp_path):
    """By day the same noise is brighter than at night."""
    drawn = []
    for time_of_day in ("by day", "at night"):
        out = tmp_path / time_of_day
        prompt = f"snow-capped mountains {time_of_day} in summer, a clear sky, conifers"
        assert main_sample("--prompt", prompt, "--res", 32, "--steps", 4, "--norm", "paper",
                           "--out", out) == 0
        pixels, info = main_png(out / "seed0-000000-32x32.png")
        drawn.append(pixels.mean())
        assert info["ckpt"] == "infd_text.pt" and info["prompt"] == prompt
    assert drawn[0] > drawn[1] + 30


@pytest.mark.parametrize("args, name", [
    ([], "infd_text"), (["--model", "cm"], "cm"), (["--image", "a.png"], "autoencoder"),
    (["--prompts", "a.txt"], "infd_text"), (["--prompt-at", "a", "0,0,1,1"], "infd_text"),
    (["--prompt", "a", "--steps", "2"], "infd_onestep"), (["--steps", "3"], "infd_text"),
    (["--sampler", "cm"], "infd_onestep"), (["--steps", "2", "--sampler", "ddim"], "infd_text"),
    (["--zoom", "2", "--at", "0,0"], "infd_text"), (["--label", "dusk"], "infd"),
    (["--steps", "1", "--label", "dusk"], "infd_onestep"),               # which says: no classes
    (["--given", "a.png"], "infd_onestep"), (["--given", "a.png", "--label", "dusk"], "infd"),
    (["--given", "a.png", "--prompt", "a"], "infd_onestep"),
    (["--given", "a.png", "--sampler", "ddim"], "infd"),
    (["--given", "a.png", "--sampler", "ddim", "--prompt", "a"], "infd_text")])
def test_sample_without_a_checkpoint_takes_the_bundled_weights_for_what_is_asked(args, name):
    own = [] if "--model" in args else args
    for words, path in ((args, sample.bundled(name)), ([*own, "--ckpt", "a.pt"], Path("a.pt"))):
        asked = sample.parser().read(words)
        sample.centre_of_dive(asked)
        assert sample.chosen(asked) == path
    with pytest.raises(ValueError, match="leave it out with --ckpt"):
        sample.chosen(sample.parser().read(["--model", "infd", "--ckpt", "a.pt"]))


def test_a_dive_leaves_the_places_of_conditions_alone():
    """Two numbers say where to dive, four where the picture before them lies."""
    def read(*args):
        asked = sample.parser().read(["--zoom", "4", *args])
        return sample.centre_of_dive(asked), asked.given

    given = ["--given", "a.png", "--at", "0,0,1,1"]
    assert read(*given) == ((0.0, 0.0), ["a.png", (0, 0, 1, 1)])
    assert read(*given, "--at", "0.5,0") == ((0.5, 0), ["a.png", (0, 0, 1, 1)])
    assert read("--at", "0.5,0", *given) == ((0.5, 0), ["a.png", (0, 0, 1, 1)])
    assert read("--at", "0.5,0") == ((0.5, 0), None)


def test_sample_without_a_checkpoint_draws_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)                                  # into samples/0001, and so on
    assert main_sample("--sampler", "cm", "--res", 32, "--prompt", "a lake") == 0
    assert main_sample("--model", "cm", "--n", 2) == 0
    assert "2 pictures by cm.pt (EMA" in capsys.readouterr().out
    (_, info), (pixels, _) = (main_png(tmp_path / "samples" / file) for file in (
        "0001/seed0-000000-32x32.png", "0002/seed0-000001-64x64.png"))
    assert (info["ckpt"], info["sampler"], info["steps"]) == ("infd_onestep.pt", "cm", 2)
    assert pixels.shape == (64, 64, 3)


# ==================================================================================================
# Training: the loop, the stages, options and presets
# ==================================================================================================

CPU = torch.device("cpu")

TINY_AE = ["steps=6", "batch=2", "size=16", "patch=16", "max_size=32", "ae.num_res_blocks=1",
           "ae.ch=32", "ae.ch_mult=1,1", "ae.hidden=32", "ae.num_blocks=1", "eval_n=2",
           "workers=0", "log_every=2", "save_every=3", "grid_every=100"]
TINY_GAN = ["gan_weight=0.75", "disc.ndf=8", "disc.n_layers=1"]
TINY_LDM = ["steps=4", "batch=2", "size=16", "pictures=8", "unet.model_channels=32",
            "unet.channel_mult=1", "unet.attention_ds=", "unet.groups=8", "workers=0",
            "log_every=2", "save_every=2", "grid_every=100", "preview_steps=2", "eval_n=2"]
TINY_FUNC = ["batch=4", "size=16", "func.dim=32", "func.heads=2", "func.encoder_depth=1",
             "func.decoder_depth=1", "func.groups=4", "func.hidden=16", "func.pe_dim=8",
             "func.patch=4", "workers=0", "log_every=2", "save_every=3", "grid_every=3",
             "eval_n=2"]
TINY_PRETRAIN = [*TINY_FUNC, "steps=6", "ema=0.9"]
TINY_CM = [*TINY_FUNC, "steps=6"]
TINY_TEACHER = ["schedule=ct", "ct.mu0=0.9", "metric=l2"]
TINY_NETS = ["vit.patch=4", "vit.dim=32", "vit.depth=3", "vit.heads=2", "unet.model_channels=16",
             "unet.channel_mult=1,2", "unet.groups=8", "unet.num_head_channels=16",
             "unet.attention_ds=2"]


def main_train(*args):
    return train.main([*map(str, args)])


def main_stage(name, out, *options):
    """A run of preset tiny."""
    return main_train("--stage", name, "--preset", "tiny", "--out", out, *options)


def main_error(capsys):
    """The one line that a command left on stderr."""
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def main_runs(tmp_path_factory):
    """A finished run of both stages of INFD, as small as can be."""
    root = tmp_path_factory.mktemp("runs")
    assert main_stage("ae", root / "ae", *TINY_AE) == 0
    assert main_stage("ldm", root / "ldm", *TINY_LDM) == 0
    return root


@pytest.fixture(scope="module")
def stage_runs(tmp_path_factory):
    """Finished runs of both stages of CM-Func, and of a baseline, as small as can be."""
    root = tmp_path_factory.mktemp("cm-runs")
    assert main_stage("pretrain", root / "pretrain", *TINY_PRETRAIN) == 0
    assert main_stage("cm", root / "cm", *TINY_CM) == 0
    unet = ["generator=unet", "labels=false", "steps=3"]
    assert main_stage("cm", root / "cm-unet", *TINY_CM, *TINY_NETS, *unet) == 0
    return root


def main_state(run):
    return runs.newest_checkpoint(Path(run))[1]["state"]


def main_same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(main_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(main_same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def main_log(run):
    """The log without what the clock decides."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    clock = ("images_per_s", "data_wait")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def main_made(name, *options, **own):
    """A stage of preset tiny, ready to step."""
    return train.STAGES[name](train.configure(name, "tiny", "synthetic", options), CPU, **own)


def main_saved(out, stage):
    """A checkpoint of a stage that has not learned yet."""
    out.mkdir(exist_ok=True)
    stage.shown.load_state_dict(stage.net.state_dict())
    runs.RunFolder(out, stage.name, stage.cfg).save(1, stage.state, stage.extra, last=True)


# ---- the two steps of INFD against the published code ----

def main_golden_stage1(g):
    """Stage ae with the models, batch and optimisers of the golden file."""
    base = models.load(GOLDEN / "infd/infd_ckpt.pt").autoencoder
    optimiser = g["config"]["optimizers"]
    cfg = train.AERun(ae=base.cfg, disc=DiscriminatorConfig(ndf=g["config"]["disc"]["ndf"]),
                      gan_weight=g["config"]["gan_g_loss"], lpips="none", lr=optimiser["lr"],
                      beta1=optimiser["betas"][0], beta2=optimiser["betas"][1])
    stage = stages_infd.AEStage(cfg, CPU)
    runs.load_weights(stage.net, base.state_dict(), "the autoencoder")
    disc = {k.removeprefix("disc."): v.float() if v.is_floating_point() else v
            for k, v in g["disc_state_dict"].items()}
    runs.load_weights(stage.disc, disc, "the discriminator")
    stage.terms["lpips"] = (1.0, lambda a, b: (a - b).square().mean(dim=(1, 2, 3)))
    x = g["inputs"]
    cell = x["gt_cell"].reshape(len(x["inp"]), -1, 2)[:, 0]
    batch = {"image": x["inp"], "patch": x["gt"], "coord": x["gt_coord"], "cell": cell,
             "index": torch.arange(len(x["inp"]))}
    return stage, batch


def main_our_name(published):
    for theirs, ours in PUBLISHED_NAMES.items():
        if published.startswith(theirs):
            return ours + published.removeprefix(theirs)
    return published


def test_golden_stage1_step():
    g = golden("infd/stage1_step.pt")
    want = g["outputs"]
    stage, batch = main_golden_stage1(g)
    names = {"reg": "quant_loss", "l1": "l1_loss", "lpips": "perc_loss", "gan": "gan_g_loss",
             "gan_weight": "adaptive_g_w", "loss": "loss", "disc": "disc_loss",
             "logits_real": "disc_logits_real", "logits_fake": "disc_logits_fake"}
    for k in range(g["config"]["steps"]):
        logs = train.step(stage, batch, k)
        assert logs["taken"]
        for ours, theirs in names.items():
            value = want["logs"][k][theirs]
            assert logs[ours].item() == pytest.approx(value, rel=1e-3, abs=1e-4), (k, ours)
        if k == 0:
            main_golden_first_step(stage, want["step1"])
    stage.net.eval()
    with torch.no_grad():
        phi = stage.net.decode(stage.net.encode(batch["image"]))
        rgb = stage.net.renderer(phi, batch["coord"], batch["cell"])
    expected = want["eval_render_after_steps"]
    assert (rgb - expected).norm() / expected.norm() < 0.02 # two Adam steps multiply rounding


def main_golden_first_step(stage, want):
    """Gradients, weights and BatchNorm statistics after one step."""
    named = dict(stage.net.named_parameters())
    named |= {f"disc.{name}": p for name, p in stage.disc.named_parameters()}
    assert want["params"] and want["params"].keys() == want["grads"].keys()
    for old, value in want["params"].items():
        p = named[main_our_name(old)]
        grad = want["grads"][old]
        adversary = old.startswith("disc.")
        opt, = stage.opts_d if adversary else stage.opts
        first = opt.state[p]["exp_avg"] / (1 - stage.cfg.beta1)     # Adam's is the gradient
        # The discriminator sees a generator after Adam's first step, lr times the sign of each
        # gradient: where a gradient is rounding, so is that sign, and a LeakyReLU may fall on its
        # other side.
        assert (first - grad).norm() <= (0.05 if adversary else 1e-3) * grad.norm(), old
        clear = grad.abs() > 0.1 * grad.abs().max()
        close(p[clear], value[clear], 1e-3)
    for name, value in stage.disc.named_buffers():                  # fake, real, fake
        close(value, next(v for n, v in want["disc_bn"].items() if n.endswith(name)), 1e-3)


def test_golden_stage2_step(tmp_path):
    g = golden("infd/stage2_step.pt")
    cfg, x, want = g["config"], g["inputs"], g["outputs"]
    file = GOLDEN / "infd" / cfg["checkpoint"]
    raw, average = models.load(file, raw=True), models.load(file)
    o = cfg["optimizer"]
    run = train.LDMRun(unet=raw.unet.cfg, size=raw.size, init=str(file), lr=o["lr"],
                       beta1=o["betas"][0], beta2=o["betas"][1], weight_decay=o["weight_decay"],
                       labels="false", ema=cfg["z_dm_ema_rate"])
    stage = stages_infd.LDMStage(run, CPU)
    runs.load_weights(stage.net, raw.unet.state_dict(), "the UNet")
    runs.load_weights(stage.ema, average.unet.state_dict(), "its average")
    stage.diffusion = raw.diffusion
    close(stage.encode({"image": x["image"]}), x["z"])
    for k in range(len(x["t"])):
        stage.times = lambda index: x["t"][k]
        batch = {"image": x["image"], "noise": x["noise"][k], "index": torch.arange(len(x["t"][k]))}
        logs = train.step(stage, batch, k)
        log = want["logs"][k]
        assert logs["loss"].item() == pytest.approx(log.get("z_dm_loss", log.get("loss")), rel=1e-3)
        for name, module in (("params", stage.net), ("ema", stage.ema)):
            own = module.state_dict()
            assert want[f"step{k + 1}"][name]
            for key, value in want[f"step{k + 1}"][name].items():
                key = key.removeprefix("z_dm_ema.").removeprefix("z_dm.")
                ours = adm_weights({key: value}, raw.unet.cfg.num_head_channels)[key]
                close(own[key], ours.reshape(own[key].shape), 1e-3)


# ---- runs on the built-in scenes ----

def test_a_stopped_run_is_saved_and_continues(tmp_path):
    """A batch system signals all its processes; options come before and after flags."""
    if not Path("/proc/thread-self/children").exists():
        pytest.skip("finds the loader processes in /proc")
    args = [*TINY_AE, "--stage", "ae", "--preset", "tiny", "workers=1", "--out",
            str(tmp_path / "run"), "save_every=100000"]
    child = fault_child([*args, "steps=100000"])
    log = tmp_path / "run" / "log.jsonl"
    while child.is_alive() and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    assert children
    for pid in [*map(int, children), child.pid]:
        os.kill(pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 143
    step = runs.newest_checkpoint(tmp_path / "run")[1]["step"]
    assert step >= 2
    assert main_train(*args, f"steps={step + 2}") == 0
    assert runs.newest_checkpoint(tmp_path / "run")[1]["step"] == step + 2


def test_a_run_says_what_it_learns_from_how_long_it_takes_and_what_comes_next(tmp_path, capsys):
    """A line for each line of the log, and one after 20 steps."""
    args = [*TINY_AE, "log_every=22", "save_every=100"]
    assert main_stage("ae", tmp_path / "ae", *args, "steps=24") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stage ae: 50,000 pictures of synthetic to train on and 10,000 held "
                               "out (their score says when to stop), centre squares at 16 px and "
                               "16 px patches of them at 16 to 32 px, 4 classes (dawn, day, dusk, ")
    assert "parameters, 24 steps of batch 2, cpu, into" in lines[1]
    assert lines[2] == f"starting from step 0: no checkpoint in {tmp_path / 'ae'}"
    assert lines[3].endswith(" minutes to go, by the first 20 steps")
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.partition(":")[0] for line in steps] == ["step 22 of 24", "step 24 of 24"]
    assert "minutes to go" in steps[0] and "held_out_psnr" in steps[1]
    assert lines[-1] == (f"done; next: python train.py --stage ldm --preset tiny --out "
                         f"{tmp_path / 'ldm'} size=16")

    (tmp_path / "ae/step-00000024.pt").unlink()
    assert main_stage("ae", tmp_path / "ae", *args, "steps=1") == 0
    assert f"starting over from step 0: no checkpoint in {tmp_path}" in capsys.readouterr().out
    assert [line["step"] for line in main_log(tmp_path / "ae")] == [1]


@pytest.mark.parametrize("before, after", [
    (["--stage", "ae", "--data", "my photos"], ["--stage", "ldm", "--data", "my photos"]),
    (["--stage", "pretrain", "--out", "a b/pre", "func.dim=64", "steps=9", "size=32"],
     ["--stage", "cm", "--out", "a b/cm", "init=a b/pre", "func.dim=64", "size=32"]),
])
def test_the_next_command_goes_on_from_this_run(before, after):
    """Options that both stages must share are in it, words with a space are quoted when shown."""
    args = train.parser().parse_intermixed_args([*before, "--preset", "tiny"])
    words = train.next_command(args, Path(args.out or "runs/x/ae"))
    assert words[:2] == ["python", "train.py"]
    then = train.parser().parse_intermixed_args(words[2:])
    assert vars(then) == vars(train.parser().parse_intermixed_args([*after, "--preset", "tiny"]))
    done = argparse.Namespace(stage="cm")
    assert train.next_command(done, Path("a b")) == ["python", "sample.py", "--ckpt", "a b"]


@pytest.mark.parametrize("names, by", [
    ([f"a/{i}.png" for i in range(8)], "about 1 in 20, by path: "),
    (["train/1.png", "train/2.png", "val/1.png"], "folder val: "),
    (["img_align_celeba/1.png", "img_align_celeba/2.png"], "as published: ")])
def test_the_first_line_says_how_the_held_out_pictures_were_chosen(tmp_path, capsys, names, by):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    if by.startswith("as"):
        (tmp_path / "list_eval_partition.txt").write_text("1.png 0\n2.png 1\n")
    cfg = train.configure("ae", "tiny", str(tmp_path), TINY_AE)
    train.introduce(stages_infd.AEStage(cfg, CPU), tmp_path)
    assert f"1 held out ({by}their score says when to stop)" in capsys.readouterr().out


def test_a_longer_cm_run_explains_K_and_continues_with_it(stage_runs, tmp_path, capsys):
    shutil.copytree(stage_runs / "cm", tmp_path / "cm")
    args = [*TINY_CM, f"init={stage_runs / 'pretrain'}", "steps=8"]
    assert main_stage("cm", tmp_path / "cm", *args) == 2
    line = main_error(capsys)
    assert "(K: 6 -> 8)" in line and line.endswith("add K=6 to train on at those of the end")
    assert main_stage("cm", tmp_path / "cm", *args, "K=6") == 0
    assert main_log(tmp_path / "cm")[-1]["step"] == 8


# ---- how weights move ----

@pytest.mark.parametrize("make", [
    lambda p: torch.optim.RAdam([p], 0.1), lambda p: torch.optim.Adam([p], 0.1, fused=True),
    lambda p: torch.optim.AdamW([p], 0.1, fused=True)])
def test_a_step_with_a_gradient_that_is_not_finite_is_not_taken(make):
    """Fused optimisers leave it out themselves: weights, moments and steps are as without it."""
    weights, states = [], []
    good = [[1.0, 0.5], [0.5, -1.0]]
    for gradients in (good, [[1.0, math.nan], good[0], [math.inf, math.inf], good[1]]):
        p = nn.Parameter(torch.ones(2))
        opt = make(p)
        for gradient in gradients:
            p.grad = torch.tensor(gradient)
            assert bool(stages.descend([opt])) == (gradient in good)
            assert p.grad is None
        p.grad = torch.ones(2)
        assert not stages.descend([opt], torch.tensor(False))     # nor one that nobody wants
        weights.append(p.detach())
        states.append(opt.state_dict()["state"])
    assert torch.equal(*weights) and main_same(*states)
    assert not torch.equal(weights[0], torch.ones(2))


def test_of_several_optimisers_all_step_or_none():
    """One that cannot decide on the device makes the host decide for all."""
    ps = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    opts = [torch.optim.RAdam(ps[:1], 0.1), torch.optim.Adam(ps[1:], 0.1, fused=True)]
    for bad, taken in ((math.nan, False), (1.0, True)):
        ps[0].grad, ps[1].grad = torch.ones(2), torch.tensor([1.0, bad])
        assert bool(stages.descend(opts)) == taken
        assert [torch.equal(p, torch.ones(2)) for p in ps] == 2 * [not taken]


def test_ema_of_a_constant_rate_is_a_geometric_mean_of_the_past():
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(a.weight), nn.init.ones_(b.weight)
    for _ in range(5):
        stages.ema_update(a, b, 0.9)
    assert a.weight.item() == pytest.approx(1 - 0.9 ** 5)


def test_rates_of_step_k_drop_at_the_end_and_the_average_warms_up():
    options = ["steps=10", "lr=1e-2", "muon=1e-3", "lr_drop=true", "ema=0.99", "ema_warmup=true"]
    stage = main_made("pretrain", *TINY_FUNC, *options)
    for k, drop in ((7, 1), (8, 0.1)):
        before = [p.clone() for p in stage.ema.parameters()]
        train.step(stage, next(stage.batches(0)), k)
        rates = [opt.param_groups[0]["lr"] for opt in stage.opts]
        assert rates == pytest.approx([1e-2 * drop, 1e-3 * drop])
        share = (1 + k) / (10 + k)
        for old, new, p in zip(before, stage.ema.parameters(), stage.net.parameters()):
            torch.testing.assert_close(new, share * old + (1 - share) * p)


def main_gan(*options):
    """A small first stage with the GAN on, and its first batch."""
    stage = main_made("ae", *TINY_AE, *TINY_GAN, *options)
    return stage, next(stage.batches(0))


def main_gan_step(stage, batch):
    """One step of plain gradient descent with rate 1: what it subtracts are the gradients."""
    before = deepcopy(dict(stage.net.named_parameters()))
    stage.opts, stage.opts_d = ([torch.optim.SGD(net.parameters(), 1.0)]
                                for net in (stage.net, stage.disc))
    logs = train.step(stage, batch, 0)
    return logs, {name: before[name] - p for name, p in stage.net.named_parameters()}


def main_near(ours, theirs, tolerance):
    """Gradients by name, each within a share of its norm; of 1e-4 of all where it is rounding."""
    least = 1e-4 * torch.cat([g.flatten() for g in theirs.values()]).norm()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= tolerance * max(gradient.norm(), least), name


@pytest.mark.parametrize("accum", [1, 2])
def test_gan_step_goes_once_through_its_losses_and_has_the_gradients_of_the_formula(accum):
    stage, batch = main_gan(f"accum={accum}", "lpips_weight=0.5")
    plain, twin, cfg = deepcopy(stage.net), deepcopy(stage.disc), stage.cfg
    calls, expected = [], []

    def perceptual(a, b):
        return F.avg_pool2d((a - b).square(), 4).sqrt().mean(dim=(1, 2, 3))

    def counted(a, b):
        out = perceptual(a, b)
        out.register_hook(lambda gradient: calls.append(0))
        return out

    for i in range(accum):
        b = {name: value.chunk(accum)[i] for name, value in batch.items()}
        rgb, reg = plain(b["image"], b["coord"], b["cell"], b["latent_noise"])
        nll = (rgb - b["patch"]).abs().mean() + 0.5 * perceptual(rgb, b["patch"]).mean()
        g = -twin(rgb).mean()
        weight = adaptive_weight(nll, g, plain.renderer.last_weight)
        loss = nll + cfg.reg_weight * reg + cfg.gan_weight * weight * g
        (loss / accum).backward()
        expected.append(torch.stack([loss, weight, g]).detach())

    stage.terms["lpips"] = (0.5, counted)
    logs, gradients = main_gan_step(stage, batch)
    assert len(calls) == accum
    main_near(gradients, {name: p.grad for name, p in plain.named_parameters()}, 2e-3)
    ours = torch.stack([logs[name] for name in ("loss", "gan_weight", "gan")])
    torch.testing.assert_close(ours, torch.stack(expected).mean(dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fast", ["bf16", "channels_last", "checkpoint", "compile"])
def test_a_fast_step_is_the_plain_step(monkeypatch, fast):
    """What is for speed or memory changes rounding at most; checkpoints change nothing."""
    logs, gradients = main_gan_step(*main_gan())
    options = {"bf16": ["dtype=bf16"], "channels_last": ["channels_last=true"],
               "checkpoint": ["checkpoint=true"], "compile": ["compile=on", "checkpoint=true"]}
    compiler, graphs = torch.compile, []

    def eager(function, **more):
        return compiler(function, backend=lambda graph, inputs: graphs.append(graph) or graph)

    monkeypatch.setattr(torch, "compile", eager)
    stage, batch = main_gan(*options[fast])
    quick, theirs = main_gan_step(stage, batch)
    tolerance = {"bf16": 0.2, "checkpoint": 0.0}.get(fast, 2e-3)
    if fast == "bf16":                               # the first layers are off by more
        gradients, theirs = ({"all": torch.cat([g.flatten() for g in found.values()])}
                             for found in (gradients, theirs))
    main_near(theirs, gradients, tolerance)
    for name, value in logs.items():
        assert float(quick[name]) == pytest.approx(float(value), rel=tolerance, abs=tolerance), name
    if fast == "bf16":
        assert float(quick["l1"]) != float(logs["l1"])
    if fast == "channels_last":
        weight = stage.net.encoder.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
    if fast == "checkpoint":
        assert any(isinstance(m.forward, functools.partial) for m in stage.net.modules())
    if fast == "compile":                            # with gradients, and without for the adversary
        count = len(graphs)
        assert count >= 2
        stage.net.field(torch.zeros(1, 3, 8, 8)[:, :stage.cfg.ae.z_channels], tile=24).draw(24)
        assert len(graphs) == count                  # a preview's shape compiles nothing


@pytest.mark.parametrize("kind", [torch.optim.RAdam, stages.ADAMW])
def test_memory_layout_changes_no_step(kind, monkeypatch):
    """Moments of a contiguous run go on in NHWC, and so do means over ranks, which come in NCHW."""
    monkeypatch.setattr(runs, "ranks", lambda: (0, 2))
    monkeypatch.setattr(runs.dist, "all_reduce", lambda flat: flat.mul_(2))
    state, ends = {}, []
    for again in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Conv2d(3, 4, 3).to(memory_format=again)
        opt = kind(net.parameters(), 1e-2)
        for k in range(6):
            if k == 3 and again is torch.contiguous_format:
                state = deepcopy({"net": net.state_dict(), "opt": [opt.state_dict()]})
            if k == 3:
                runs.restore(net, state["net"], "net")
                runs.restore([opt], deepcopy(state["opt"]), "opt")
            net(randn(2, 3, 8, 8, seed=k)).square().mean().backward()
            assert stages.descend([opt])
        ends.append(net.weight.detach())
        assert opt.state[net.weight]["exp_avg"].stride() == net.weight.stride()
    assert ends[0].stride() != ends[1].stride()
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_channels_last_goes_with_the_compiler_on_a_gpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for device, compiles, expected in ((cpu, True, False), (gpu, True, True), (gpu, False, False)):
        assert runs.wants_channels_last("auto", device, compiles) is expected
        assert runs.wants_channels_last("true", device, compiles)
        assert not runs.wants_channels_last("false", device, compiles)


def test_a_failing_compiler_is_a_warning_and_eager_steps(monkeypatch):
    """auto: a step is that of compile=off, not in NHWC. on: it is an error."""
    def fails(graph, inputs):
        raise FileNotFoundError("no C++ compiler")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: compiler(f, backend=fails))
    monkeypatch.setattr(stages, "wants_compile", lambda option, device: option != "off")
    monkeypatch.setattr(stages, "wants_channels_last", lambda option, device, compiles: compiles)
    ends = []
    for option in ("auto", "off"):
        stage = main_made("ae", *TINY_AE, f"compile={option}")
        batch = next(stage.batches(0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.step(stage, batch, 0)
            train.step(stage, batch, 1)
        said = {str(w.message) for w in caught if "compile" in str(w.message)}
        assert len(said) == (option == "auto") and all("no C++ compiler" in one for one in said)
        ends.append({name: runs.stored(part) for name, part in stage.state.items()})
    assert main_same(*ends)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        runs.compiled(nn.Linear(1, 1), "on")(torch.ones(1, 1))


@pytest.mark.parametrize("stage, dtype", [("pretrain", "bf16"), ("cm", "fp32")])
def test_function_generator_compiles_as_one_graph(stage, dtype, tmp_path, monkeypatch, capsys):
    """Rendering included, without graph breaks, in bf16 too; and the run is the eager run."""
    compiler, graphs = torch.compile, []

    def whole(function, **more):
        return compiler(function, fullgraph=True,
                        backend=lambda graph, inputs: graphs.append(graph) or graph)

    monkeypatch.setattr(torch, "compile", whole)
    options = TINY_PRETRAIN if stage == "pretrain" else [*TINY_CM, "init=none"]
    for name in ("on", "off"):
        args = [*options, "steps=2", f"dtype={dtype}", f"compile={name}"]
        capsys.readouterr()
        assert main_stage(stage, tmp_path / name, *args) == 0
        assert ("the first step compiles" in capsys.readouterr().out) == (name == "on")
    assert len(graphs) == 1                          # of cm student, teacher and metric
    ours, theirs = (main_log(tmp_path / name)[-1] for name in ("on", "off"))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_option_tf32_is_set_for_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)   # restores what is changed
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for kind, tf32 in (("cpu", False), ("cuda", False), ("cuda", True)):
        runs.set_tf32(tf32, torch.device(kind))
        assert torch.backends.cudnn.allow_tf32 == (tf32 or kind == "cpu")
    assert asked == ["highest", "high"]


@pytest.mark.parametrize("net", [
    UNet(UNetConfig(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_ds=(2,),
                    num_head_channels=16, groups=8, dropout=0.3)),
    FunctionGenerator(GeneratorConfig(8, 4, 32, 2, encoder_depth=1, decoder_depth=1, groups=4,
                                      hidden=16, pe_dim=8)),
    UViT(TransformerConfig(8, 4, 32, depth=3, heads=2))], ids=["unet", "func", "uvit"])
def test_checkpointed_blocks_have_the_same_gradients(net):
    """Bit for bit, dropout included; and every block is run twice."""
    gradients, count = [], []
    x, t = randn(2, 3, 8, 8), torch.tensor([3.0, 500.0])
    for i, p in enumerate(net.parameters()):
        p.data = 0.1 * randn(*p.shape, seed=i)  # zero gates would hide the blocks
    for on in (False, True):
        copied, calls = deepcopy(net), []
        if on:
            stages.keep_only_inputs(copied)
        seen = [m for m in copied.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]
        for m in seen[:-1]:
            m.register_forward_hook(lambda *args, calls=calls: calls.append(0))
        torch.manual_seed(1)
        copied(x, t).square().mean().backward()
        gradients.append([p.grad for p in copied.parameters() if p.grad is not None])
        count.append(len(calls))
    assert gradients[0] and all(map(torch.equal, *gradients))
    assert count[1] >= 1.5 * count[0]


# ---- options and presets ----

@pytest.mark.parametrize("stage, options, said", [
    ("ae", "lrr=1e-4", "stage ae has no option lrr; did you mean lr"),
    ("ae", "ch=32", "did you mean ae.ch"),
    ("ae", "steps=many", "option steps=many: expected a whole number, 0 or more"),
    ("ae", "steps=0", "must be at least 1"),
    ("ae", "batch=3 accum=2", "batch=3 a multiple of accum=2"),
    ("ae", "ae.kl=perhaps", "option ae.kl=perhaps: expected true or false"),
    ("ae", "steps", "options are written key=value"),
    ("ae", "--steps 300", "--steps: write steps=300"),
    ("ae", "--flip size=64", "--flip: write flip=VALUE"),
    ("ae", "--weight-decay=0.1", "--weight-decay=0.1: write weight_decay=0.1"),
    ("ae", "--bench 20", "demo, compare and bench are programs of experiments.py"),
    ("ae", "data=cats", "data=cats: write --data cats"),
    ("ae", "--data no/such/folder", "synthetic"),
    ("ae", "dtype=fp16", "dtype=fp16: choose auto, bf16 or fp32"),
    ("ae", "compile=maybe", "choose auto, on, off or graphs"),
    ("ae", "compile=graphs accum=2", "compile=graphs goes with accum=1"),
    ("ae", "channels_last=yes", "choose auto, true or false"),
    ("ae", "ae.renderer=mlp", "choose clif or liif"),
    ("ae", "frozen_encoder=true", "goes with init=RUN"),
    ("ae", "init={ldm}", "is no run of stage ae"),
    ("ae", "--stage gan", "there is no stage gan; there are: ae, ldm, pretrain, cm"),
    ("ae", "--preset huge", "stage ae has no preset huge; there are: paper, small, sd, tiny"),
    ("ae", "--help demo", "there is no stage demo; there are: ae, ldm, pretrain, cm; demo, comp"),
    ("ae", f"--out {__file__}", f"{__file__}: "),
    ("ldm", "init=", "run --stage ae first"),
    ("ldm", f"init={ROOT}/weights/cm.pt", "is a model of stage cm; give one of stage ae"),
    ("ldm", "size=32", "was trained at size=16; give size=16"),
    ("ldm", "flip=true", "and that with flip=false"),
    ("ldm", "start={ae}", "is no run of stage ldm"),
    ("ldm", "text=true unet.attention_ds=1 start={ldm}", "knows no words of text=true"),
    ("ldm", "text=true labels=true", "not classes: leave labels=true out"),
    ("ldm", "p_uncond=2", "p_uncond=2 is a probability"),
    ("ldm", "text=true p_shorten=-1", "p_shorten=-1 is a probability"),
    ("ldm", "p_shorten=0.3", "p_shorten leaves out words of captions, and this UNet is told none"),
    ("ldm", "text=true --data {plain}", "plain has no captions; put name"),
    ("cm", "generator=gan", "generator=gan: choose func, unet, uvit or dit"),
    ("cm", "schedule=paper", "schedule=paper: choose ct, ict or ect"),
    ("cm", "guidance=3", "guidance goes with latents=RUN"),
    ("cm", "pictures=100", "pictures goes with latents=RUN"),
    ("cm", "metric=ssim", "metric=ssim: choose lpips, l2 or huber"),
    ("cm", "solver=rk4", "solver=rk4: choose heun or euler"),
    ("cm", "solver=euler", "solver=euler goes with distil=RUN"),
    ("cm", "l2_weight=10", "l2_weight=10: a positive number, with metric=lpips"),
    ("cm", "labels=maybe", "labels=maybe: choose auto, true or false"),
    ("cm", "labels=true --data {plain}", "has no classes"),
    ("cm", "size=18", "patch"),
    ("cm", "ct.mu0=1.5", "mu0"),
    ("cm", "func.dim=64 func.heads=4", "the weights in"),
    ("cm", "init=nowhere", "no run at nowhere"),
    ("cm", "generator=unet", "only generator=func has a pre-training"),
    ("cm", "generator=unet init={cm}", "the weights in"),
    ("cm", "init={ae}", "is no run of stage pretrain or cm"),
    ("cm", "distil={cm} labels=false", "must be a run of stage cm at 16 px, with 0 classes"),
    ("cm", "latents={ae}", "must be a run of stage ldm"),
    ("cm", "latents={ldm} metric=lpips", "lpips_window=16: the latents of"),
    ("cm", "lpips_window=8", "lpips_window goes with latents=RUN"),
    ("cm", "latents={ldm} labels=false", "is told classes: leave labels=false out"),
    ("cm", "generator=unet init=none unet.dropout=0.1", "unet.dropout: student and teacher would"),
    ("ldm", "text=true start={cm}", "knows no words of text=true"),
    ("ae", "eval_n=0", "steps, batch, accum, eval_n, size, *_every must be at least 1"),
    ("cm", "latents={ldm} distil={cm}", "must be a run of stage cm"),
    ("ae", "steps=-5", "option steps=-5: expected a whole number, 0 or more"),
    ("ae", "ema=1.5", "ema=1.5: the rate of an average, from 0 to below 1"),
    ("ae", "p_whole=7", "p_whole=7 is a probability"),
    ("ae", "ae.num_res_blocks=0", "num_res_blocks, z_channels and n_embed must be at least 1"),
    ("ae", "ae.ch_mult=", "levels in ch_mult"),
    ("ae", "gan_weight=1 disc.n_layers=3", "disc.n_layers=3 sees no patch=16: take patches of 24"),
    ("ae", "disc.ndf=0", "ndf and n_layers must be at least 1"),
    ("pretrain", "size=0", "size, *_every must be at least 1"),
    ("pretrain", "epochs=3 steps=4", "epochs and steps say the same"),
    ("ldm", "unet.groups=0", "groups and transformer_depth must be at least 1"),
    ("ldm", "unet.channel_mult=", "levels in channel_mult"),
    ("ldm", "unet.in_channels=7", "it is 3; leave it out"),
    ("cm", "latents={ldm} --data {plain}", "knows the classes dawn, day, dusk, night; "),
    ("ldm", "unet.num_classes=10", "unet.num_classes=10: by data and autoencoder it is 4; leave"),
    ("cm", "generator=unet init=none unet.in_channels=4", "pictures have 3; leave them out"),
    ("cm", "metric=lpips lpips=squeeze lpips_size=8", "lpips_size=8: LPIPS needs 16 px"),
    ("cm", "metric=lpips lpips=alex lpips_size=16", "lpips_size=16: LPIPS needs 32 px"),
    ("cm", "latents={ldm} metric=l2 lpips_size=64", "lpips_window says how much LPIPS sees"),
    ("cm", "latents={ldm} metric=lpips lpips_window=2", "lpips_window=2: LPIPS would look at 4 px"),
    ("cm", "latents={ldm} generator=dit", "generator=dit: with latents=RUN its UNet learns"),
    ("cm", "func.pe_sigma=0", "pe_sigma=0 must be above 0"),
    ("ldm", "preview_steps=1000", "preview_steps: 1000 sampling steps; choose 1 to 636"),
    ("ldm", "diffusion.steps=30 preview_steps=20", "preview_steps: 20 sampling steps; choose 1 to 17"),
    ("cm", "schedule=ict ict.s0=0", "need 1 <= s0 <= s1"),
    ("cm", "func.groups=0", "groups, hidden and layers must be at least 1"),
    ("ae", "init={odd}", "odd.pt is no whole checkpoint: it lacks step, state"),
    ("ae", "init={empty}", "empty.pt is no whole checkpoint: it lacks model"),
    ("ae", "init={number}", "there are no weights, but a int"),
])
def test_bad_training_options(main_runs, stage_runs, tmp_path, capsys, stage, options, said):
    places = {"ae": main_runs / "ae", "ldm": main_runs / "ldm", "cm": stage_runs / "cm"}
    small = {"ae": TINY_AE, "ldm": [*TINY_LDM, f"init={main_runs / 'ae'}"],
             "cm": [*TINY_CM, *TINY_NETS, f"init={stage_runs / 'pretrain'}"],
             "pretrain": TINY_FUNC}[stage]
    for name, content in (("odd", {}), ("empty", {"step": 1, "state": {}}),
                          ("number", {"step": 1, "state": {"model": 3}})):
        places[name] = tmp_path / f"{name}.pt"
        torch.save({"stage": "ae", **content}, places[name])
    plain = main_set(tmp_path / "plain", 4)
    given = options.format(**places, plain=plain).split()
    assert main_stage(stage, tmp_path / "run", *small, *given) == 2
    assert said in main_error(capsys)
    assert not list(tmp_path.glob("run/step-*"))


@pytest.mark.parametrize("stage", list(train.STAGES))
def test_help_fits_a_screen_and_lists_every_option_of_a_stage_behind_it(capsys, stage):
    assert main_train("--help") == 0
    assert len(capsys.readouterr().out.splitlines()) <= 30
    assert main_train("--help", stage) == 0
    out = capsys.readouterr().out
    listed = re.findall(r"^  ([\w.]+)=", out, re.MULTILINE)
    assert sorted(listed) == sorted(runs.option_types(train.STAGES[stage].options))
    assert re.search(r"^  init= +run", out, re.MULTILINE) or stage == "pretrain"


@pytest.mark.parametrize("data_name, size, patch, steps, mu0, classes", [
    ("cifar10", 32, 4, 400_000, 0.9, 10), ("celeba", 64, 4, 900_000, 0.95, 0),
    ("lsun-church", 128, 8, 900_000, 0.95, 0)])
def test_stage_cm_paper_presets(data_name, size, patch, steps, mu0, classes):
    cfg = stages_func.cm_config(train.configure("cm", "paper", data_name), classes)
    assert (cfg.size, cfg.func.patch, cfg.steps, cfg.K) == (size, patch, steps, steps)
    assert (cfg.schedule, cfg.ct) == ("ct", Schedule(s0=2, s1=150, mu0=mu0))
    assert (cfg.metric, cfg.batch, cfg.lr) == ("lpips", 32, 5e-4)
    assert cfg.func.num_classes == classes and cfg.func.size == size
    pretrain = train.configure("pretrain", "paper", data_name)
    assert (pretrain.size, pretrain.func.patch) == (size, patch)
    assert (pretrain.epochs, pretrain.lr) == (30, 1e-4)
    assert train.configure("cm", "paper", "celeba", ["size=128"]).func.patch == 8
    for preset, schedule in (("ict", ICT()), ("ect", ECT())):
        later = train.configure("cm", preset, data_name)
        assert (later.schedule, getattr(later, preset)) == (preset, schedule)
        assert later.metric == "huber" and later.steps == steps and later.size == size
    assert (later.cm.sigma_min, later.cm.boundary) == (0.003, False)
    with pytest.raises(ValueError, match="stage pretrain has no preset ict; there are: paper"):
        train.configure("pretrain", "ict", data_name)


def test_presets_hold_known_options():
    for stage, presets in train.PRESETS.items():
        defaults = runs.flatten(train.STAGES[stage].options())
        for preset, changes in presets.items():
            latents = ["latents=run"] if preset in ("denoiser", "onestep") else []
            cfg = train.configure(stage, preset, texts=latents)
            flat = runs.flatten(cfg)
            for name, value in changes.items():
                value = list(value) if isinstance(value, tuple) else value
                assert flat[name] == value, (stage, preset, name)
                assert type(value) is type(defaults[name]), (stage, preset, name)
    assert train.configure("ae", "paper", "mountains").original_from == 800_000
    assert train.configure("ae", "small", "mountains").original_from == 0


@pytest.mark.parametrize("size, unet, uvit, dit, function", [
    (32, 80.38, 15.08, 13.90, 35.63), (64, 300.79, 61.90, 57.53, 62.53),
    (128, 613.59, 62.01, 57.64, 62.58)])
def test_stage_cm_flops_of_the_paper_presets(size, unet, uvit, dit, function):
    """Forward GFLOP of the published modules at batch 1, counted without computing anything."""
    def gflop(call):                                     # 2 for each multiply-add
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
        return counter.get_total_flops() / 1e9

    for name, expected in (("unet", unet), ("uvit", uvit), ("dit", dit), ("func", function)):
        options = [f"size={size}", f"generator={name}"]
        cfg = stages_func.cm_config(train.configure("cm", "paper", "celeba", options), 0)
        with torch.device("meta"):
            network, _, option = models.GENERATORS[name]
            net = network(getattr(cfg, option))
            x, t = torch.empty(1, 3, size, size), torch.empty(1)
            if name != "func":
                assert gflop(lambda: net(x, t)) == pytest.approx(expected, rel=2e-3)
                continue
            assert gflop(lambda: net.function(x, t)) == pytest.approx(function, rel=2e-3)
            made = net.function(x, t)
            for res, render in ((32, 0.541), (64, 2.163), (128, 8.653)):    # biases as products
                counted = gflop(lambda: made(torch.empty(1, res, res, 2)))
                assert counted == pytest.approx(2e-9 * res**2 * (4 * 256 * 256 + 3 * 256))
                assert counted == pytest.approx(render, rel=5e-3)


# ---- what may change between two starts of a run, and what not ----

def main_set(folder, n, classes=()):
    """A folder of n pictures of 16 px, in sub-folders where there are classes."""
    for i in range(n):
        place = folder / classes[i % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((16, 16), Image.BICUBIC).save(place / f"{i:03d}.png")
    return folder


@pytest.mark.parametrize("stage, options", [("pretrain", TINY_PRETRAIN), ("ae", TINY_AE)])
def test_a_prepared_copy_is_enough_for_a_run_with_its_sheets(tmp_path, stage, options):
    """Sheets and scores ask for no more pixels than the copy has."""
    folder = main_set(tmp_path / "set", 24)
    assert data_prepare(folder, tmp_path / "copy", "--size", 16, "--workers", 0) == 0
    own = ["max_size=16"] if stage == "ae" else []
    assert main_stage(stage, tmp_path / "run", *options, *own, "steps=2", "grid_every=1", "--data",
                      tmp_path / "copy") == 0
    assert len(list((tmp_path / "run").glob("grid-*.png"))) == 2


def test_a_full_disk_costs_a_line_of_the_log_and_a_sheet_not_the_run(tmp_path, monkeypatch):
    """As saving: training goes on."""
    stage = main_made("pretrain", *TINY_PRETRAIN)
    folder = runs.RunFolder(tmp_path, "pretrain", stage.cfg)
    if Path("/dev/full").exists():
        (tmp_path / "log.jsonl").symlink_to("/dev/full")
        with pytest.warns(UserWarning, match="a line of the log could not be written.*No space"):
            folder.log({"step": 1})
    with pytest.warns(UserWarning, match="the sheet of step 7 could not be written"):
        stage.preview(tmp_path / "gone", 7)


def test_copies_in_a_run_folder_are_no_checkpoints_and_stay(tmp_path):
    """Names that a user gives are neither taken for the newest nor deleted."""
    run = tmp_path / "run"
    args = ["pretrain", run, *TINY_PRETRAIN, "save_every=1"]
    assert main_stage(*args, "steps=2") == 0
    mine = [run / name for name in ("step-best.pt", "step-00000001-good.pt", "notes.part")]
    for file in mine:
        shutil.copy(run / "step-00000001.pt", file)
    assert main_stage(*args, "steps=4") == 0
    assert [runs.step_of(path) for path in runs.checkpoints(run)] == [4, 3]
    assert all(file.exists() for file in mine)
    assert [line["step"] for line in main_log(run)][-1] == 4


def test_a_signal_before_the_first_step_ends_the_run_at_once(main_runs, tmp_path, monkeypatch):
    """While latents are encoded there is nothing to save, and it may take long."""
    def encoded(stage, base):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    monkeypatch.setattr(stages_infd, "encoded", encoded)
    args = [tmp_path / "run", *TINY_LDM, f"init={main_runs / 'ae'}"]
    assert main_stage("ldm", *args) == 143
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["lock"]


def test_options_of_another_schedule_are_warned_of():
    for texts, said in ((["ct.s0=4"], "ct.s0 has no effect: it goes with schedule=ct, not ect"),
                        (["schedule=ict", "ect.q=4"], "with schedule=ect, not ict")):
        with pytest.warns(UserWarning, match=said):
            train.configure("cm", "tiny", texts=texts)


def test_what_depends_on_the_resolution_is_of_cm_func_alone():
    for size, unet in ((32, (1, 2, 4)), (128, (4, 8, 16))):
        assert train.configure("cm", "paper", texts=[f"size={size}"]).unet.attention_ds == unet
        ours = train.configure("ldm", "paper", texts=[f"size={size}"])
        assert ours.unet == train.LDMRun.unet


@pytest.mark.parametrize("preset", ["denoiser", "onestep"])
def test_presets_of_one_step_infd_need_its_latents(preset):
    with pytest.raises(ValueError, match=f"preset {preset} goes with latents=RUN"):
        train.configure("cm", preset)
    assert train.configure("cm", preset, texts=["latents=a"]).latents == "a"


def test_a_run_of_epochs_goes_on_for_more_and_a_finished_one_collects_nothing(
        tmp_path, monkeypatch):
    source = data.Source([Image.new("RGB", (16, 16))] * 8)
    collected = []
    monkeypatch.setattr(train.PretrainStage, "collect", lambda stage: collected.append(stage))
    for epochs in (1, 2, 2):
        cfg = train.configure("pretrain", "tiny", texts=[*TINY_FUNC, f"epochs={epochs}"])
        train.train("pretrain", cfg, tmp_path / "run", CPU, source, source)
    assert runs.newest_checkpoint(tmp_path / "run")[1]["step"] == 4 and len(collected) == 2


def test_other_options_of_the_image_function_are_warned_of(stage_runs, tmp_path, capsys):
    args = [*TINY_CM, f"init={stage_runs / 'pretrain'}", "metric=l2", "steps=1"]
    for more, warns in (([], False), (["func.position_scale=4", "func.pe_sigma=2"], True)):
        assert main_stage("cm", tmp_path / f"{warns}", *args, *more) == 0
        said = capsys.readouterr().out
        assert ("learned was of other options (func.position_scale: 1.0 -> 4.0; func.pe_sigma: "
                "64.0 -> 2.0)" in said) == warns == ("warning" in said)


# ---- losses, and what is judged ----

@pytest.mark.parametrize("recipe", [["ect.gap_weight=true"], ["schedule=ict"], TINY_TEACHER])
def test_the_loss_of_stage_cm_is_that_of_its_schedule_classes_and_moved_grid(recipe):
    stage = stage_cm("metric=l2", *recipe)
    for seed, p in enumerate(stage.f.parameters()):
        p.data.add_(0.3 * randn(*p.shape, seed=seed))    # gates at 0 would hide the classes
    part = next(stage.batches(0))
    t, r = stage.levels(part["index"], 0)
    coord = variational_coord(pixel_coord((16, 16)), part["coord_noise"])
    with torch.no_grad():
        d = consistency_loss(stage.f, stage.target, part["image"], part["noise"], t, r, l2,
                             part["label"], coord=coord)
        loss, logs = stage.objective(part, 0)
    close(loss, (stage.schedule.weight(t, r) * d).mean())
    close(logs["difference"], d.mean())


def test_the_loss_of_stage_pretrain_is_the_squared_error_of_its_reconstruction():
    stage = main_made("pretrain", *TINY_FUNC)
    part = next(stage.batches(0))
    coord = variational_coord(pixel_coord((16, 16)), part["coord_noise"])
    with torch.no_grad():
        drawn = stage.func.reconstruct(2 * part["image"])(coord).movedim(-1, 1)
        close(stage.objective(part, 0)[0], F.mse_loss(drawn, part["image"]))


@pytest.mark.parametrize("stage, options", [
    ("ae", TINY_AE), ("ldm", TINY_LDM), ("pretrain", TINY_FUNC), ("cm", [*TINY_CM, "init=none"])])
def test_bf16_reaches_the_loss_of_every_stage(main_runs, stage, options):
    init = [f"init={main_runs / 'ae'}"] if stage == "ldm" else []
    losses = []
    for kind in ("fp32", "bf16"):
        made = main_made(stage, *options, *init, f"dtype={kind}")
        for seed, p in enumerate(made.net.parameters()):
            p.data.add_(0.05 * randn(*p.shape, seed=seed))
        losses.append(made.objective(next(made.batches(0)), 0)[0].item())
    assert 0 < abs(losses[1] - losses[0]) < 0.02 * losses[0]


def test_scores_are_of_the_same_picture_at_its_size():
    grey = [Image.new("RGB", (32, 32), 3 * (40 * i + 40,)) for i in range(3)]
    stage = main_made("ae", *TINY_AE, "eval_n=3", source=data.Source(grey))
    values = iter(image.getpixel((0, 0))[0] + 1.5 for image in grey)      # a grey level too light

    def reconstruct(image):
        value = next(values) / 127.5 - 1
        return types.SimpleNamespace(draw=lambda res: torch.full((1, 3, res, res), value))

    stage.reconstruct = reconstruct
    scores = stage.evaluate(3, [1, 2, 4])
    assert [(row["n"], row["px"]) for row in scores.values()] == [(3, 16), (3, 32), (0, 64)]
    for row in (scores["1x"], scores["2x"]):
        assert (row["psnr_render"], row["psnr_bicubic"]) \
            == pytest.approx(2 * (20 * math.log10(255),))


def test_the_held_out_loss_is_of_the_average_its_classes_and_fixed_noise(main_runs):
    stage = main_made("ldm", *TINY_LDM, f"init={main_runs / 'ae'}", "ema=0.9", "eval_n=3")
    for seed, p in enumerate(stage.ema.parameters()):
        p.data.add_(0.05 * randn(*p.shape, seed=seed))
    some = [stage.held_out[i] for i in range(3)]
    with torch.no_grad():
        z = stage.scale(stage.base.autoencoder.encode(stages.drawn_at(some, 16)))
        noise = torch.stack([torch_noise(z.shape[1:], 0, "held out", i) for i in range(3)])
        y = torch.tensor([stage.held_out.label(i) for i in range(3)])
        want = stage.diffusion.loss(stage.ema, z, torch.tensor([0, 333, 666]), noise, y).mean()
    close(stage.validate()["held_out_loss"], want)
    t = stage.times(torch.arange(4000))
    assert np.abs(np.bincount(t // 250, minlength=4) / 4000 - 0.25).max() < 0.03
    assert (t.min(), t.max()) == (0, 999)


def test_latent_norm_gives_latents_of_mean_0_and_variance_1(main_runs):
    stage = main_made("ldm", *TINY_LDM, f"init={main_runs / 'ae'}", "latent_norm=true")
    stage.begin()                                    # 512 samples: each of 8 pictures 64 times
    z = stage.scale(torch.stack(list(stage.latents)))
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std(dim=(0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-4)


def test_the_adversary_waits_for_gan_start():
    stage, batch = main_gan("gan_start=3")
    before = deepcopy(stage.disc.state_dict())
    assert not {"gan", "disc"} & train.step(stage, batch, 2).keys()
    assert main_same(stage.disc.state_dict(), before)
    assert {"gan", "disc"} <= train.step(stage, batch, 3).keys()
    assert not main_same(stage.disc.state_dict(), before)


def test_the_last_two_checkpoints_stay_and_those_that_keep_every_divides(tmp_path):
    run = runs.RunFolder(tmp_path, "ae", train.AERun(keep_every=4))
    for step in range(1, 12):
        run.save(step, {"model": nn.Linear(1, 1)}, {}, last=False)
    assert [runs.step_of(path) for path in runs.checkpoints(tmp_path)] == [11, 10, 8, 4]


def test_optimisers_have_the_decay_and_betas_of_the_run():
    net = nn.Linear(3, 3)
    opt, = stages.optimisers(net, train.LDMRun(lr=0.1, weight_decay=0.5, beta1=0.6, beta2=0.7))
    before = deepcopy(net.state_dict())
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    assert stages.descend([opt]) and opt.param_groups[0]["betas"] == (0.6, 0.7)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, (1 - 0.1 * 0.5) * before[name])


@pytest.mark.parametrize("words, folder", [
    ("--stage ae", "synthetic-tiny/ae"),
    ("--stage cm --data sets/faces.zip generator=unet", "faces-tiny/cm-unet")])
def test_runs_lie_where_the_readme_looks_and_weeks_are_refused(
        tmp_path, monkeypatch, capsys, words, folder):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(train, "train", lambda stage, cfg, out, device: made.append(out))
    assert main_train("--preset", "tiny", *words.split()) == 0 and made == [Path("runs", folder)]
    monkeypatch.setattr(train, "pick_device", lambda name: CPU)
    capsys.readouterr()
    assert main_train("--stage", "ldm") == 2 and "takes days on GPUs" in main_error(capsys)


def test_a_run_that_lacks_newer_options_goes_on_with_their_defaults(fault_run, tmp_path):
    run = shutil.copytree(fault_run, tmp_path / "run")
    for file in runs.checkpoints(run):
        ckpt = runs.read_checkpoint(file)
        del ckpt["config"]["solver"], ckpt["config"]["func.pe_turned"]
        runs.write_checkpoint(file, ckpt)
    assert main_train(*fault_cm(run, "steps=7", "K=6")) == 0 and fault_step(run) == 7


def test_kl_logvar_is_where_the_variance_of_latents_starts():
    parts = []
    for logvar in (0.0, -6.0):
        torch.manual_seed(0)
        moments = Encoder(replace(FIELD_TINY, kl=True, kl_logvar=logvar))(randn(1, 3, 16, 16))
        parts.append(moments.chunk(2, dim=1))
    close(parts[0][0], parts[1][0])
    close(parts[0][1] - 6, parts[1][1])


def test_the_minutes_to_go_are_those_of_the_samples_that_are_left():
    left = types.SimpleNamespace(steps=130, batch=4)
    assert train.minutes(10, 2.0, left) == "4.0 minutes to go"


def test_epochs_count_in_pictures_and_at_least_one_step_is_taken(tmp_path):
    for epochs, steps in ((1, 1), (4, 11)):
        cfg = train.configure("pretrain", "tiny", "synthetic", [*TINY_FUNC, f"epochs={epochs}"])
        made = train.PretrainStage(replace(cfg, batch=8 if epochs > 1 else 32), CPU,
                                   data.Source([Image.new("RGB", (16, 16))] * 22))
        assert made.cfg.steps == steps
    assert train.configure("pretrain", "tiny").steps == 4000


def test_whole_numbers_are_read_exactly():
    assert runs.convert("seed", int, "12345678901234567891") == 12345678901234567891
    assert runs.convert("steps", int, "1e6") == 1_000_000 == runs.convert("steps", int, "1_000_000")


def test_a_unet_of_other_latents_is_warned_of(main_runs, tmp_path, capsys):
    main_saved(tmp_path / "ae", main_made("ae", *TINY_AE, "seed=1"))
    start = f"start={main_runs / 'ldm'}"
    for run, warns in ((main_runs, False), (tmp_path, True)):
        capsys.readouterr()
        main_made("ldm", *TINY_LDM, f"init={run / 'ae'}", start).begin()
        assert ("has not the encoder of" in capsys.readouterr().out) == warns



def test_changed_data_is_refused_and_moved_data_goes_on(tmp_path, capsys):
    """What a run was trained on is known by its content, not by its path."""
    folder = main_set(tmp_path / "set", 24)
    args = [tmp_path / "run", *TINY_PRETRAIN, "steps=1"]
    assert main_stage("pretrain", *args, "--data", folder) == 0
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert main_stage("pretrain", *args, "steps=2", "--data", moved) == 0
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    main_set(moved, 32)
    capsys.readouterr()
    assert main_stage("pretrain", *args, "steps=3", "--data", moved) == 2
    line = main_error(capsys)
    assert "was trained on 22 pictures, the data has 30 now" in line
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before


def test_a_unet_is_not_continued_after_its_autoencoder_has_changed(main_runs, tmp_path, capsys):
    """Its latents are others then. The same weights under another path go on."""
    shutil.copytree(main_runs, tmp_path / "runs")
    (tmp_path / "runs/ae").rename(tmp_path / "moved")
    args = [tmp_path / "runs/ldm", *TINY_LDM, "steps=5"]
    assert main_stage("ldm", *args, f"init={tmp_path / 'moved'}") == 0
    main_saved(tmp_path / "runs/ae", main_made("ae", *TINY_AE, "seed=1"))
    capsys.readouterr()
    assert main_stage("ldm", *args) == 2
    line = main_error(capsys)
    assert re.search(r"holds another run \(encoder: \w{16} -> \w{16}\)", line)
    assert "train a new UNet (start=RUN" in line


# ---- stage ae and stage ldm ----

def test_check_data_lists_what_is_bad(tmp_path, capsys):
    for i in range(9):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:40])
    (tmp_path / "words.jpg").write_text("no picture")
    assert main_train("--data", tmp_path, "--check-data") == 2
    bad = sorted(re.findall(r"^bad: .*?(\w+\.\w+): ", capsys.readouterr().out, re.MULTILINE))
    assert bad == ["3.png", "words.jpg"]


def test_cached_latents_are_those_of_the_pictures_that_would_be_drawn(main_runs):
    """The same samples see the same pictures, encoded before or now."""
    options = [*TINY_LDM, "batch=4", f"init={main_runs / 'ae'}"]
    source = data.open_data("synthetic")
    source.items.numbers = range(6)
    cached, fresh = (main_made("ldm", *options, "pictures=0", f"cache={on}", source=source)
                     for on in ("true", "false"))
    for a, b, _ in zip(cached.batches(0), fresh.batches(0), range(4)):
        assert a.keys() == {"latent", "noise", "label", "index"}
        assert torch.equal(a["index"], b["index"]) and torch.equal(a["label"], b["label"])
        b.pop("latent_noise")                        # a cache holds means
        torch.testing.assert_close(cached.encode(a), fresh.encode(b), rtol=0, atol=1e-5)
    part = main_made("ldm", *options, "pictures=5", source=source)
    assert [z.shape for z in part.latents] == 5 * [part.base.latent_shape]
    with pytest.raises(ValueError, match="stage ldm takes no loss of your own"):
        main_made("ldm", *options, loss=l2)


def test_the_sheet_of_a_run_without_moving_average_is_drawn_without_gradients(tmp_path):
    """Preset paper has none: what is drawn is the model that trains."""
    stage, graphs = main_made("ae", *TINY_AE, "ema=0"), []
    stage.net.decoder.register_forward_hook(
        lambda module, args, phi: graphs.append(phi.requires_grad))
    stage.preview(tmp_path, 7)
    assert graphs == 2 * [False]                     # eval_n
    sheet = np.asarray(Image.open(tmp_path / "grid-00000007.png"))
    # Rows of input and render | original at 16, 32, 64 and, as max_size allows, 128 px.
    cell = 4 * 16 + 4
    assert sheet.shape == (16 + 2 * cell - 4, 7 * cell - 4, 3)


def test_a_unet_may_start_from_that_of_another_run(main_runs, tmp_path):
    """Without a step that changes much (lr 0), the other run's moving average is what comes out."""
    args = [*TINY_LDM, f"init={main_runs / 'ae'}", "lr=0", "steps=1"]
    assert main_stage("ldm", tmp_path / "ldm", *args, f"start={main_runs / 'ldm'}") == 0
    old, new = main_state(main_runs / "ldm"), main_state(tmp_path / "ldm")
    assert all(torch.equal(value, old["ema"][key]) for key, value in new["model"].items())
    assert main_same(new["ema"], old["ema"])


# ---- stage ldm: captions ----

TINY_TEXT = ["text=true", "unet.attention_ds=1", "context.width=16", "context.layers=1",
             "context.heads=2", "context.hidden=32"]


@pytest.fixture(scope="module")
def text_run(main_runs, tmp_path_factory):
    """A finished run from captions."""
    out = tmp_path_factory.mktemp("text") / "ldm"
    assert main_stage("ldm", out, *TINY_LDM, *TINY_TEXT, f"init={main_runs / 'ae'}") == 0
    return out


def test_stage_ldm_learns_words_of_captions_and_its_checkpoint_knows_them(text_run, capsys):
    model = models.load(text_run)
    assert "--merges is of CLIP's tokenizer" in sample_error(capsys, "--ckpt", text_run, "--merges",
                                                             "a.txt")
    seen = [Landscapes().caption(i) for i in range(8)]           # pictures=8
    assert list(model.captions) == [seen[i] for i in rng(0, "captions").permutation(8)]
    assert set(model.tokenizer.words) == set(WordTokenizer.learn(seen).words)
    assert model.text.cfg.vocabulary == len(model.tokenizer)
    assert model.unet.cfg.context_dim == 16 and model.unet.cfg.num_classes == 0

    one = dict(steps=3, sampler="dpm++")
    z = model.sample([0, 1, 2], prompts=["a lake", "mountains at dusk"], **one)
    alone = model.sample([2], prompts=["a lake", "by day"], **one)
    torch.testing.assert_close(z[2:], alone, rtol=1e-4, atol=1e-4)
    for i in (0, 5):                                             # none given: one of the captions
        caption = model.prompt_of(i, 0, None)
        assert caption in seen
        assert torch.equal(model.sample([i], **one), model.sample([i], prompts=[caption], **one))
    assert len({model.prompt_of(i, 0, None) for i in range(40)}) == 8

    out = text_run.parent / "drawn"
    assert main_sample("--ckpt", text_run, "--out", out, "--steps", 2, "--sampler", "dpm++",
                       "--prompt", "a lake, a unicorn", "--guidance", 3) == 0
    assert "does not know unicorn; it knows" in capsys.readouterr().err
    info = main_png(next(out.glob("*.png")))[1]
    assert (info["prompt"], info["guidance"]) == ("a lake, a unicorn", 3.0)
    assert main_sample("--ckpt", text_run, "--steps", 2, "--label", "dusk") == 2
    assert "has no classes, it draws what a prompt says" in main_error(capsys)
    deaf = replace(model, guidance=1.0)                          # trained with p_uncond=0
    with pytest.raises(ValueError, match="never learned to draw without"):
        deaf.sample([0], **one, prompts=["a lake"], guidance=2.0)


def test_stage_ldm_from_captions_resumes_bit_for_bit(main_runs, text_run, tmp_path):
    args = [*TINY_LDM, *TINY_TEXT, f"init={main_runs / 'ae'}"]
    shutil.copytree(text_run, tmp_path / "ldm")
    (tmp_path / "ldm" / "step-00000004.pt").unlink()
    assert main_stage("ldm", tmp_path / "ldm", *args) == 0
    assert main_same(main_state(tmp_path / "ldm"), main_state(text_run))


def test_a_run_that_starts_from_an_exported_file_keeps_the_numbers_of_its_words(
        main_runs, text_run, tmp_path):
    models.export(text_run, tmp_path / "given.pt")
    args = [*TINY_LDM, *TINY_TEXT, f"init={main_runs / 'ae'}", "pictures=1"]     # of fewer words
    stage = main_made("ldm", *args, f"start={tmp_path / 'given.pt'}")
    stage.begin()
    ours = models.load(tmp_path / "given.pt")
    assert stage.tokenizer.state() == ours.tokenizer.state()
    assert stage.tokenizer.words != WordTokenizer.learn([Landscapes().caption(0)]).words
    for name, value in ours.text.state_dict().items():
        assert torch.equal(stage.net["text"].state_dict()[name], value)


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_cannot_be_read_are_passed_over_by_every_stage(main_runs, tmp_path, workers):
    """Of those to learn from and of those held out; the others keep their classes, in order."""
    for split, bad in (("train", 3), ("val", 0)):
        main_set(tmp_path / "set" / split, 6, classes=("a", "b"))
        file = next((tmp_path / "set" / split).glob(f"*/{bad:03d}.png"))
        file.write_bytes(file.read_bytes()[:60])
    cfg = train.configure("ldm", "tiny", str(tmp_path / "set"), [
        *TINY_LDM, f"init={main_runs / 'ae'}", "batch=5", f"workers={workers}", "eval_n=3"])
    stage = train.STAGES["ldm"](cfg, CPU)
    with pytest.warns(UserWarning, match="skipped image: .*003.png"):
        batch = next(stage.batches(0))
    unread = [i for i in range(6) if "003" in stage.source[i].name]
    kept = [i for i in range(6) if i not in unread]
    assert len(stage.latents) == 5 and len(unread) == 1
    assert [stage.latents.label(k) for k in range(5)] == [stage.source.label(i) for i in kept]
    truth = stage.base.autoencoder.encode(stages.drawn_at([stage.source[i] for i in kept], 16))
    torch.testing.assert_close(torch.stack(list(stage.latents)), truth)
    assert batch["latent"].shape[0] == 5
    with pytest.warns(UserWarning, match="skipped image: .*000.png"):
        numbers, x, y = stage.judged
    assert len(numbers) == len(x) == 2 and y.tolist() == [stage.held_out.label(i) for i in numbers]
    assert torch.isfinite(stage.validate()["held_out_loss"])


def test_a_set_of_which_nothing_can_be_read_is_an_error_with_the_cause(main_runs, tmp_path, capsys):
    folder = main_set(tmp_path / "set", 4)                     # one of them is held out
    for file in folder.glob("*.png"):
        file.write_bytes(b"")
    for workers in (0, 1):
        assert main_stage("ldm", tmp_path / "run", *TINY_LDM, f"init={main_runs / 'ae'}", "--data",
                          folder, f"workers={workers}") == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "3 of the first 3 images cannot be used (see --check-data), the last: " in said
        assert "003.png: not a PNG, JPEG or WEBP image" in said


def test_stage_ae_starts_from_an_exported_file_with_a_new_discriminator(main_runs, tmp_path,
                                                                        capsys):
    file = tmp_path / "ae.pt"
    assert main_sample("--ckpt", main_runs / "ae", "--export", file) == 0
    stage = main_made("ae", *TINY_AE, *TINY_GAN, f"init={file}")
    fresh = deepcopy(stage.disc.state_dict())
    stage.begin()
    assert f"{file} has no discriminator; a new one learns" in capsys.readouterr().out
    assert main_same(stage.disc.state_dict(), fresh)
    assert main_same(stage.net.state_dict(), models.load(file).autoencoder.state_dict())


def test_a_condition_left_out_is_the_empty_caption_or_the_null_class(main_runs):
    """Which samples go without depends on (seed, index) alone."""
    args = [*TINY_LDM, f"init={main_runs / 'ae'}", "batch=4"]
    told = main_made("ldm", *args, *TINY_TEXT, "p_uncond=0")
    never = main_made("ldm", *args, *TINY_TEXT, "p_uncond=1")
    often = main_made("ldm", *args, *TINY_TEXT, "p_uncond=0.5", "batch=8")
    empty = never.tokenizer([""])[0]
    assert all(torch.equal(row, empty) for row in next(never.batches(0))["tokens"])
    rows = [row for batch, _ in zip(told.batches(0), range(2)) for row in batch["tokens"]]
    left = [rng(0, "uncond", n).random() < 0.5 for n in range(8)]
    assert 0 < sum(left) < 8
    for n, row in enumerate(next(often.batches(0))["tokens"]):
        assert torch.equal(row, empty if left[n] else rows[n])

    classes = main_made("ldm", *args, "p_uncond=0.5", "batch=8")
    assert classes.cfg.unet.null_class and classes.net.label_emb.num_embeddings == 5
    labels = next(classes.batches(0))["label"].tolist()
    plain = next(main_made("ldm", *args, "p_uncond=0", "batch=8").batches(0))["label"].tolist()
    assert labels == [4 if left[n] else plain[n] for n in range(8)]


def test_words_left_out_of_a_caption_leave_the_others_in_their_order(main_runs):
    """p_shorten: which words stay depends on (seed, index) alone, and half of the captions stay."""
    args = [*TINY_LDM, *TINY_TEXT, f"init={main_runs / 'ae'}", "p_uncond=0"]
    short = main_made("ldm", *args, "p_shorten=0.5", "batch=8")
    fours = main_made("ldm", *args, "p_shorten=0.5", "batch=4").batches(0)
    tokens = next(short.batches(0))["tokens"]
    assert torch.equal(tokens, torch.cat([next(fours)["tokens"], next(fours)["tokens"]]))
    whole = next(main_made("ldm", *args, "batch=8").batches(0))["tokens"]
    untouched = [rng(0, "shorten", n).random() >= 0.5 for n in range(8)]
    assert 0 < sum(untouched) < 8
    for row, full, same in zip(tokens, whole, untouched):
        assert torch.equal(row, full) == same
        rest = iter(full.tolist())
        assert all(word in rest for word in row[row > 0].tolist())       # in the same order


@pytest.mark.parametrize("words", ["a b c d e f g h", "mountains at dawn", ""])
def test_shortened_captions_keep_a_random_share_of_their_words(words):
    texts = [stages_infd.shortened(words, rng(0, n), 1.0) for n in range(4000)]
    assert stages_infd.shortened(words, rng(0, 0), 0.0) == words
    counts = np.array([len(text.split()) for text in texts])
    n = len(words.split())
    expected = np.full(n + 1, 1 / (n + 1))               # of a share that is uniform
    assert np.abs(np.bincount(counts, minlength=n + 1) / 4000 - expected).max() < 0.03


def test_words_are_learnt_from_captions_of_all_kinds(main_runs, monkeypatch):
    """Of more than are read at random: every second scene would be dawn or dusk."""
    monkeypatch.setattr(stages_infd, "MOST_CAPTIONS", 20)
    args = [*TINY_LDM, *TINY_TEXT, f"init={main_runs / 'ae'}", "pictures=40"]
    stage = main_made("ldm", *args)
    assert len(stage.extra["captions"]) == 20
    assert {"dawn", "day", "dusk", "night"} <= set(stage.tokenizer.words)


def test_the_loss_of_a_caption_is_that_of_its_context(main_runs):
    stage = main_made("ldm", *TINY_LDM, *TINY_TEXT, f"init={main_runs / 'ae'}", "batch=4")
    batch = next(stage.batches(0))
    with torch.no_grad():
        for p in stage.net.parameters():             # what starts at 0 hides the context
            p.add_(0.05)
        z = stage.scale(stage.encode(batch))
        t = torch.tensor([10, 300, 600, 900])
        context = stage.net["text"](batch["tokens"])
        eps = stage.net["unet"](stage.diffusion.q_sample(z, t, batch["noise"]), t, None, context)
        want = (eps - batch["noise"]).square().mean(dim=(1, 2, 3))
        field_equal(stage.denoise(stage.net, z, t, batch["noise"], batch), want)
        other = {"tokens": batch["tokens"].flip(0)}
        assert (stage.denoise(stage.net, z, t, batch["noise"], other) - want).abs().max() > 1e-6


def test_fine_tuning_with_a_frozen_encoder_keeps_z_and_learns_the_rest(main_runs, tmp_path):
    options = [*TINY_AE, "steps=2", "ema=0.9", "ema_warmup=false"]
    assert main_stage("ae", tmp_path / "a", *options, f"init={main_runs / 'ae'}",
                      "frozen_encoder=true") == 0
    old, new = main_state(main_runs / "ae")["ema"], main_state(tmp_path / "a")["model"]
    for key, value in new.items():
        if key.startswith("encoder.") or not value.is_floating_point():
            assert torch.equal(value, old[key]), key
    for key in ("renderer.conv_out.weight", "decoder.conv_in.weight"):
        assert not torch.equal(new[key], old[key])


CONVERT = ["steps=2", "batch=2", "size=16", "patch=16", "max_size=32", "ae.hidden=32",
           "ae.num_blocks=1", "eval_n=2", "workers=0", "log_every=2", "grid_every=100", "ema=0"]


def main_published(path, cfg):
    """An autoencoder of LDM with random weights, written as a published file."""
    theirs = loaded(lambda: FieldAutoencoder(cfg))
    path.write_bytes(text_safetensors(text_published_names(theirs.state_dict())))
    return theirs


def test_a_published_autoencoder_becomes_a_field(tmp_path):
    """E and D feel nothing of it: the same latents, the same features in front of the last norm."""
    cfg = AutoencoderConfig(ch=16, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, kl=False,
                            n_embed=32, groups=4, renderer="pixels")
    file = tmp_path / "vae.safetensors"
    theirs = main_published(file, cfg)
    stage = main_made("ae", *CONVERT, f"init={file}", "ae.groups=4")
    fresh = deepcopy(stage.net.renderer.state_dict())
    stage.begin()
    assert stage.net.cfg == replace(cfg, renderer="clif", hidden=32, num_blocks=1)
    image, z = randn(2, 3, 16, 16), randn(2, 4, 4, 4, seed=1)
    assert torch.equal(stage.net.encode(image), theirs.encode(image))
    phi = stage.net.decode(z)
    assert torch.equal(phi, theirs.decode(z)) and phi.shape == (2, 16, 16, 16)
    assert main_same(stage.net.renderer.state_dict(), fresh)


def test_text_golden_conversion_of_a_file_of_diffusers():
    """Our features, ended by the norm and convolution that the file has, are its pictures."""
    path = golden_file("text/vae_diffusers_tiny.safetensors")
    group = golden("text/autoencoder_kl.pt")["tiny"]
    config = group["config"]
    stage = main_made("ae", *CONVERT, f"init={path}")
    stage.begin()
    cfg = stage.cfg.ae
    assert (cfg.ch_mult, cfg.z_channels, cfg.kl) == (tuple(config["ch_mult"]),
                                                     config["z_channels"], True)
    weights = our_autoencoder(read_safetensors(path))
    end = PixelHead(cfg.ch * cfg.ch_mult[0])
    end.load_state_dict({k.removeprefix("renderer."): v.float() for k, v in weights.items()
                         if k.startswith("renderer.")})
    with torch.no_grad():
        phi = stage.net.decode(group["inputs"]["z"])
        close(end.conv_out(F.silu(end.norm_out(phi))), group["outputs"]["decoded"])
        close(stage.net.encoder(group["inputs"]["image"]), group["outputs"]["moments"])


def test_conversion_refuses_what_does_not_fit(tmp_path, capsys):
    cfg = AutoencoderConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, kl=True, renderer="pixels")
    file = tmp_path / "vae.safetensors"
    main_published(file, cfg)
    weights = read_safetensors(file)
    files = {"wide": weights | {"encoder.down.1.block.0.conv1.weight": torch.ones(10**5, 0)},
             "nan": weights | {"decoder.conv_in.bias": torch.full((32,), math.nan)},
             "unet": {"model.diffusion_model.time_embed.0.weight": torch.zeros(1)}}
    for name, content in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(text_safetensors(content))
    for option, said in (
            ("ae.ch=64", "ae.ch=64: the file that the run starts from has 32; leave ae.ch out"),
            ("ae.groups=5", "GroupNorm needs multiples of groups=5"),
            ("size=17", "sides must be multiples of 2"),
            (f"init={tmp_path}/wide.safetensors", "does not fit"),
            (f"init={tmp_path}/nan.safetensors", "decoder.conv_in.bias is not finite"),
            (f"init={tmp_path}/unet.safetensors", "unet.safetensors: it has no autoencoder")):
        assert main_stage("ae", tmp_path / "ae", *CONVERT, f"init={file}", option) == 2
        assert said in main_error(capsys), option


def test_preset_sd_is_the_published_autoencoder_and_the_last_steps_are_at_the_original_size():
    cfg = train.configure("ae", "sd")
    assert replace(cfg.ae, renderer="pixels") == TEXT_AE and cfg.ae.f == 8 and cfg.size == 512
    assert (cfg.steps - cfg.original_from, cfg.p_original) == (400_000, 0.5)         # J.2
    mountains = train.configure("ae", "paper", "mountains")
    assert (mountains.steps - mountains.original_from, mountains.p_original) == (400_000, 0.5)
    assert cfg.frozen_encoder and cfg.reg_weight == 1e-6
    with torch.device("meta"):           # all but the last norm and convolution, and CLIF of J.1
        assert count(FieldAutoencoder, cfg.ae) == 83_653_863 - 3_715 + 2_674_179


def test_latents_of_a_published_file_are_drawn_by_its_converted_autoencoder(tmp_path, capsys):
    """The same latents, unscaled by the file's factor, another decoder."""
    file = tmp_path / "ldm.ckpt"
    text_ldm_file(file)
    stage = main_made("ae", *CONVERT, f"init={file}")
    main_saved(tmp_path / "own", stage)
    stage.begin()
    main_saved(tmp_path / "ae", stage)
    call = ["--ckpt", file, "--latent-size", 8, "--steps", 2, "--res", 48]
    assert main_sample(*call, "--decoder", tmp_path / "ae", "--out", tmp_path / "out") == 0
    pixels, info = main_png(tmp_path / "out/seed0-000000-48x48.png")
    z = models.load(file).sample([0], steps=2, latent_size=(8, 8))
    plain, wanted = (to_uint8(models.load(path).decode(z).draw(48))[0]
                     for path in (file, tmp_path / "ae"))
    assert (pixels == wanted).all() and (pixels != plain).any()
    assert info["decoder"] == "step-00000001.pt" and len(info["decoder_sha256"]) == 16
    for more, said in ((["--decoder", tmp_path / "own"], "step-00000001.pt has not the encoder"),
                       (["--decoder", ROOT / "weights/cm.pt"], "cm.pt has not the encoder")):
        assert said in sample_error(capsys, *call, *more, "--out", tmp_path / "b")
    assert "--decoder means nothing" in sample_error(capsys, "--model", "cm", "--decoder", "a")


def test_the_tile_of_a_photograph_is_in_its_file(sample_runs, tmp_path, capsys):
    """So that the same call with another, which draws another picture, is not taken for done."""
    photo = conditions_file(tmp_path / "a.png", 40)
    call = ["--ckpt", sample_runs / "ae", "--image", photo, "--res", 48, "--out", tmp_path / "out"]
    for tile in (16, 16, 24):
        code = main_sample(*call, "--norm", "paper", "--tile", tile)
        assert code == (0 if tile == 16 else 2)
    assert "exists and is another picture" in capsys.readouterr().err
    assert main_png(tmp_path / "out/a-48x48.png")[1]["tile"] == 16


START = ["steps=2", "batch=2", "size=16", "pictures=4", "workers=0", "log_every=2", "ema=0.5",
         "grid_every=2", "preview_steps=2", "eval_n=2"]


def test_a_unet_may_start_from_that_of_a_published_file(tmp_path, capsys):
    """What the file says of its UNet, noise and latents is followed, and nothing else is taken."""
    file = tmp_path / "ldm.ckpt"
    text_ldm_file(file)
    converted = main_made("ae", *CONVERT, f"init={file}")
    converted.begin()
    main_saved(tmp_path / "ae", converted)
    args = [*START, f"start={file}"]
    stage = main_made("ldm", *args, f"init={tmp_path / 'ae'}")
    stage.begin()
    theirs = models.load(file)
    assert stage.cfg.unet == theirs.unet.cfg and stage.cfg.diffusion == theirs.diffusion.cfg
    x, t = randn(2, 3, 4, 4), torch.tensor([3, 900])
    assert torch.equal(stage.net(x, t), theirs.unet(x, t)) and torch.equal(stage.scale(x), x)

    assert main_stage("ldm", tmp_path / "ldm", *args) == 0           # the run ae is beside it
    assert "warning" not in capsys.readouterr().out
    made = models.load(tmp_path / "ldm")
    assert made.autoencoder.cfg.renderer == "clif" and made.unet.cfg == theirs.unet.cfg
    assert not torch.equal(made.unet(x, t), theirs.unet(x, t))
    vae = tmp_path / "vae.safetensors"
    main_published(vae, replace(TEXT_LDM[1], kl=True))
    for name, z_channels in (("own", 3), ("four", 4)):
        ae = ["ae.ch=16", "ae.ch_mult=1,1,1", f"ae.z_channels={z_channels}"]
        main_saved(tmp_path / name, main_made("ae", *CONVERT, *ae))
    for more, said in (("unet.model_channels=64", "the file that the run starts from has 32"),
                       ("text=true", "leave text out"), (f"start={vae}", "has no UNet"),
                       (f"init={tmp_path / 'four'}", "does not fit")):
        assert main_stage("ldm", tmp_path / "b", *args, more) == 2
        assert said in main_error(capsys), more
    main_made("ldm", *args, f"init={tmp_path / 'own'}").begin()
    assert "own has not the encoder of" in capsys.readouterr().out


def test_text_golden_stable_diffusion_goes_on_learning_from_captions(text_tiny, tmp_path, capsys):
    """Converted and started from the file: its eps, its scale, its tokenizer; then UNet learns."""
    numbers, merges = text_tiny
    given, out = numbers["inputs"], numbers["outputs"]
    file = Path(shutil.copy(golden_file("text/sd_ckpt_tiny.safetensors"), tmp_path))
    side = 4 * models.load(file, merges=str(merges)).autoencoder.cfg.f
    for picture in main_set(tmp_path / "set", 8).glob("*.png"):
        Image.open(picture).resize((side, side)).save(picture)
    (tmp_path / "set/000.txt").write_text("a lake")
    sizes = [f"size={side}", f"max_size={side}", f"patch={side}"]
    converted = main_made("ae", *CONVERT, *sizes, f"init={file}")
    converted.begin()
    main_saved(tmp_path / "ae", converted)
    args = [*START, sizes[0], f"start={file}", f"init={tmp_path / 'ae'}", "pictures=0",
            "cache=false"]
    assert main_stage("ldm", tmp_path / "ldm", *args, "--data", tmp_path / "set") == 2
    assert MERGES_FILE in main_error(capsys)
    shutil.copy(merges, tmp_path / MERGES_FILE)

    started = stages_infd.LDMStage(train.configure("ldm", "tiny", str(tmp_path / "set"), args), CPU)
    started.begin()
    main_saved(tmp_path / "same", started)
    assert main_stage("ldm", tmp_path / "ldm", *args, "--data", tmp_path / "set") == 0
    same, new = models.load(tmp_path / "same"), models.load(tmp_path / "ldm")
    context = same.text(same.tokenizer(given["prompts"]))
    close(context, out["context"])
    close(same.unet(given["x"], given["t"], None, context), out["eps_ema"])
    close(same.scale(same.autoencoder.encode(given["image"], given["noise"])),
               out["latent_scaled"])
    assert main_same(new.text.state_dict(), same.text.state_dict())
    assert not torch.equal(new.unet.out[2].weight, same.unet.out[2].weight)
    assert (new.guidance, new.ddim_steps, new.eta) == (7.5, 50, 0.0)
    plain = main_made("ldm", *START, f"size={side}", f"init={tmp_path / 'same'}")
    plain.preview(tmp_path, 1)                       # without text: of `same` the autoencoder alone
    assert plain.base.unet is None and plain.base.text is None


def test_fine_tuning_at_the_original_size_begins_where_it_should():
    options = ["size=8", "patch=8", "max_size=32", "batch=4", "p_whole=0", "p_original=1",
               "original_from=2", "workers=0", "gan_weight=0"]
    stage = main_made("ae", *options)
    stream = stage.batches(0)
    cells = [next(stream)["cell"][:, 0].tolist() for _ in range(4)]
    assert any(cell != 2 / 32 for cell in cells[0] + cells[1])
    assert cells[2] + cells[3] == [pytest.approx(2 / 32)] * 8
    assert next(stage.batches(1))["cell"][:, 0].tolist() == cells[1]


# ---- stage cm: one step ----

def stage_cm(*options):
    return main_made("cm", *TINY_CM, *TINY_NETS, *options)


@pytest.mark.parametrize("levels", [TINY_TEACHER, [], ["schedule=ict"]])
def test_stage_cm_levels_belong_to_the_samples_whatever_the_micro_batches(levels):
    stage = stage_cm(*levels)
    index = torch.arange(12, 16)
    t, r = stage.levels(index, 3)
    assert t.shape == (4,) and (t > r).all()
    halves = [stage.levels(part, 3) for part in index.chunk(2)]
    assert torch.equal(t, torch.cat([half[0] for half in halves]))
    assert torch.equal(r, torch.cat([half[1] for half in halves]))
    assert not torch.equal(t, stage.levels(index + 4, 4)[0])


@pytest.mark.parametrize("recipe", [TINY_TEACHER, [], ["ect.mu0=0.98"]])
def test_stage_cm_moves_the_student_and_only_a_teacher_follows(recipe):
    stage = stage_cm(*recipe)
    assert (stage.target is stage.f) == (not recipe)
    before, teacher = deepcopy(stage.f.state_dict()), deepcopy(stage.target.state_dict())
    logs = train.step(stage, next(stage.batches(0)), 4)
    assert logs["taken"]
    moved = [k for k, v in stage.f.state_dict().items() if not torch.equal(v, before[k])]
    assert moved and all(p.grad is None for p in stage.target.parameters())
    if recipe is TINY_TEACHER:
        mu = stage.cfg.ct.mu(4, 6)
        assert logs["N"] == stage.cfg.ct.N(4, 6) and logs["mu"] == pytest.approx(mu, rel=1e-6)
    else:
        mu = 0.98
        assert logs["stage"] == 1                    # step 4 of 6, in the second of 2 stages
    for key in moved if recipe else ():
        expected = mu * teacher[key] + (1 - mu) * stage.f.state_dict()[key]
        torch.testing.assert_close(stage.target.state_dict()[key], expected)


def test_stage_cm_muon_steps_along_orthogonal_matrices_inside_blocks_and_nowhere_else():
    """Its step is that of Adam in size, all singular values alike; all else moves as without it."""
    moves = []
    for recipe in ([], ["muon=4e-3"]):
        stage = stage_cm(*recipe)
        before = deepcopy(dict(stage.f.named_parameters()))
        for seed, p in enumerate(stage.f.parameters()):
            p.grad = randn(*p.shape, seed=seed)
        assert stages.descend(stage.opts)
        moves.append({name: (p - before[name]).detach() for name, p in stage.f.named_parameters()})
    plain, muon = moves
    inside = [name for name in muon if not torch.equal(muon[name], plain[name])]
    decoder = itertools.product(("attn_self", "attn_data"), ("q", "kv", "out"))
    assert {tuple(name.split(".")[-3:-1]) for name in inside} == {
        ("attn", "q"), ("attn", "kv"), ("attn", "out"), ("mlp", "0"), ("mlp", "2"), *decoder}
    for name in inside:
        values = torch.linalg.svdvals(muon[name])
        assert muon[name].square().mean().sqrt() == pytest.approx(0.2 * 4e-3, rel=0.25), name
        square = len(set(muon[name].shape)) == 1     # those are near singular
        assert square or values.max() < 2 * values.min(), name
    with pytest.raises(ValueError, match="muon=0.004 is for transformers"):
        stage_cm("muon=4e-3", "generator=unet")


# ---- stages pretrain and cm: runs ----

def test_stage_cm_distils_a_denoiser_that_stays_as_it_is(stage_runs, tmp_path, monkeypatch):
    """It follows the trajectories of that run, which is not trained and not kept beside it."""
    teacher, seen, loss = main_state(stage_runs / "cm"), [], stages_func.consistency_loss

    def told(*args, **more):
        seen.append(args[8])
        return loss(*args, **more)

    monkeypatch.setattr(stages_func, "consistency_loss", told)
    args = [*TINY_CM, f"init={stage_runs / 'cm'}", f"distil={stage_runs / 'cm'}"]
    assert main_stage("cm", tmp_path / "run", *args, "steps=2") == 0
    state = main_state(tmp_path / "run")
    for denoiser in seen:
        assert main_same(denoiser.net.state_dict(), teacher["ema"])
        assert not any(p.requires_grad for p in denoiser.parameters())
    assert len(seen) == 2 and set(state) == set(teacher)
    assert not main_same(state["model"], teacher["model"])
    stage = main_made("cm", *args)
    stage.begin()                                    # init: where that run's average stands
    assert main_same(stage.net.state_dict(), teacher["ema"])


# ---- stage cm in the latents of INFD ----

TINY_LATENT = ["batch=2", "pictures=8", "steps=8", "workers=0", "log_every=2", "save_every=4",
               "eval_n=2", "ema=0.9"]


@pytest.mark.parametrize("n, shares", [(70, ([32], [32], [6])), (96, ([32], [32], [32])),
                                       (100, ([32, 4], [32, 0], [32, 0]))])
def test_ranks_share_the_encoding_of_latents(main_runs, tmp_path, monkeypatch, n, shares):
    """Each encodes its blocks, as many as the others, and together they are what one makes."""
    source = data.Source([Image.new("RGB", (8, 8), (i, 2 * i, 0)) for i in range(n)])
    stage = types.SimpleNamespace(
        cfg=types.SimpleNamespace(pictures=n, size=8, workers=0), device=CPU, source=source)
    base = models.load(main_runs / "ldm")
    parts = []
    with monkeypatch.context() as patch:
        patch.setattr(stages_infd, "all_gathered", lambda part: parts.append(part) or [part])
        for rank in range(3):
            patch.setattr(stages_infd, "ranks", lambda rank=rank: (rank, 3))
            stages_infd.encoded(stage, base)
    k = len(shares[0])
    assert [[len(part[0]) for part in parts[k * rank:k * rank + k]] for rank in range(3)] \
        == list(shares)
    in_order = iter([parts[k * rank + block] for block in range(k) for rank in range(3)])
    monkeypatch.setattr(stages_infd, "all_gathered", lambda _: [next(in_order) for _ in range(3)])
    monkeypatch.setattr(stages_infd, "ranks", lambda: (0, 3))
    shared = stages_infd.encoded(stage, base)
    monkeypatch.undo()
    whole = stages_infd.encoded(stage, base)
    assert shared.kept == whole.kept == list(range(n))
    assert torch.equal(torch.stack(list(shared)), torch.stack(list(whole)))


@pytest.fixture(scope="module")
def onestep_run(main_runs, tmp_path_factory):
    """A one-step INFD, as small as can be: a denoiser first, then distilled from that."""
    root = tmp_path_factory.mktemp("onestep")
    args = [*TINY_LATENT, f"latents={main_runs / 'ldm'}"]
    assert main_stage("cm", root / "denoiser", *args, "ect.k=1e9", "ect.b=0", "metric=l2") == 0
    ones = [f"init={root / 'denoiser'}", f"distil={root / 'denoiser'}", "ect.mu0=0.9"]
    assert main_stage("cm", root / "cm", *args, *ones) == 0
    return root / "cm"


def test_lpips_of_latents_looks_at_a_window_of_what_they_draw(main_runs, monkeypatch):
    """It draws as a latent of that size would; beyond the window nothing counts but l2."""
    monkeypatch.setattr(stages_func, "lpips_network", lambda *_: CmHalf())
    monkeypatch.setattr(stages_onestep, "smallest", lambda lpips: 1)
    stage = train.LatentCMStage(train.configure("cm", "tiny", "synthetic", [
        *TINY_LATENT, f"latents={main_runs / 'ldm'}", "metric=lpips", "lpips_window=2"]), CPU)
    base = stage.base
    a, b = randn(2, 2, *base.latent_shape)
    a.requires_grad_(True)
    corner = torch.tensor([[0, 2], [1, 0]])
    parts = [base.scale.inverse(z)[..., y:y + 2, x:x + 2] for z, (y, x) in zip(a.split(1), corner)]
    side = 2 * base.autoencoder.cfg.f
    drawn = [base.autoencoder.field(part, side, True) for part in parts]
    whole = torch.cat([field.draw(side) for field in drawn])
    torch.testing.assert_close(stage.metric.draw(a, corner), whole, rtol=1e-4, atol=1e-5)

    d = stage.metric(a, b, corner)
    mean = (stage.metric.draw(a, corner) - stage.metric.draw(b, corner)).mean((1, 2, 3))
    torch.testing.assert_close(d, 0.5 * mean)
    d.sum().backward()
    seen = torch.zeros(2, *base.latent_shape[1:], dtype=torch.bool)
    for i, (y, x) in enumerate(corner):
        seen[i, y:y + 2, x:x + 2] = True
    assert torch.equal(a.grad.abs().sum(1) > 0, seen)
    stage.metric.l2_weight = 3.0
    torch.testing.assert_close(stage.metric(a, b, corner), 0.5 * mean + 3 * l2(a, b))

    both = stage.metric_at(torch.tensor([6, 7]), 5).keywords["corner"]    # as one, and part by part
    assert torch.equal(both[1:], stage.metric_at(torch.tensor([7]), 5).keywords["corner"])
    assert not torch.equal(both, stage.metric_at(torch.tensor([6, 7]), 6).keywords["corner"])
    logs = train.step(stage, next(stage.batches(0)), 0)
    assert torch.isfinite(logs["loss"])


def test_dropout_of_an_ldm_is_left_out_by_one_step_and_by_what_is_judged(
        main_runs, tmp_path, monkeypatch):
    """Student and teacher would each leave out units of their own; without an average, sheets and
    held-out scores are of the network that learns."""
    modes = {"objective": set(), "validate": set(), "preview": set()}
    for name, seen in modes.items():
        plain = getattr(stages_infd.LDMStage, name)

        def noted(stage, *args, seen=seen, plain=plain):
            seen.add(stage.net.training)
            return plain(stage, *args)

        monkeypatch.setattr(stages_infd.LDMStage, name, noted)
    args = [*TINY_LDM, f"init={main_runs / 'ae'}", "unet.dropout=0.5", "ema=0", "grid_every=2"]
    assert main_stage("ldm", tmp_path / "ldm", *args) == 0
    assert modes == {"objective": {True}, "validate": {False}, "preview": {False}}
    stage = train.LatentCMStage(train.configure("cm", "tiny", "synthetic", [
        *TINY_LATENT, f"latents={tmp_path / 'ldm'}"]), CPU)
    assert not any(part.training for part in stage.net.modules())
    assert stage.base.unet is stage.net and all(p.requires_grad for p in stage.net.parameters())


def test_one_step_infd_starts_as_its_ldm_and_learns_its_latents(main_runs):
    stage = train.LatentCMStage(train.configure("cm", "tiny", "synthetic", [
        *TINY_LATENT, f"latents={main_runs / 'ldm'}"]), CPU)
    stage.begin()
    base = models.load(main_runs / "ldm")
    assert main_same(stage.net.state_dict(), base.unet.state_dict())
    assert (stage.cfg.size, stage.cfg.generator, stage.cfg.cm.sigma_data) == (16, "unet", 1.0)
    batch = next(stage.batches(0))
    n = data._order(0, 0, 8)[batch["index"]]
    truth = base.autoencoder.encode(stages.drawn_at([stage.source[int(i)] for i in n], 16))
    close(batch["image"], base.scale(truth))
    assert batch["label"].tolist() == [stage.source.label(int(i)) for i in n]
    assert torch.equal(batch["noise"][1], torch_noise(base.latent_shape, 0, "noise", 1))
    # The first steps of RAdam, along the bare gradient, only fill its moments.
    for k, moved in enumerate([False] * 5 + [True]):
        train.step(stage, batch, k)
        assert main_same(stage.net.state_dict(), base.unet.state_dict()) != moved
        assert all(kept["exp_avg"].any() for kept in stage.opts[0].state.values()) or k == 0


def test_one_step_infd_resumes_bit_for_bit(main_runs, onestep_run, tmp_path):
    root = onestep_run.parent
    shutil.copytree(onestep_run, tmp_path / "cm")
    (tmp_path / "cm" / "step-00000008.pt").unlink()
    args = [*TINY_LATENT, f"latents={main_runs / 'ldm'}", f"init={root / 'denoiser'}",
            f"distil={root / 'denoiser'}", "ect.mu0=0.9"]
    assert main_stage("cm", tmp_path / "cm", *args) == 0
    assert main_same(main_state(tmp_path / "cm"), main_state(onestep_run))
    assert main_log(onestep_run)[-1]["distance_at_max"] > 0
    assert (onestep_run / "grid-00000008.png").exists()


def test_one_step_infd_draws_as_infd_does(onestep_run, tmp_path, capsys):
    """At any size and window, in one call or two, by a label; exported too."""
    model = models.load(onestep_run)
    calls = []
    model.f.net.register_forward_hook(lambda *call: calls.append(call[1][1]))
    one = model.sample([5, 6], steps=1, labels=["dusk", "day"])
    assert len(calls) == 1 and one.shape == (2, *model.latent_shape)
    close(one[1:], model.sample([6], steps=1, labels=1))
    two = model.sample([5, 6], labels=["dusk", "day"])
    assert len(calls) == 4 and torch.equal(calls[2], calls[0][:2])
    torch.testing.assert_close(calls[3], model.f.time(torch.full((2,), models.SECOND)))
    assert not torch.equal(one, two)
    large = model.sample([0], latent_size=(8, 16))
    field = model.decode(large)
    close(field.draw((32, 64))[:, :, :16, :32], field.draw((16, 32), (-1, -1, 0, 0)))

    with pytest.raises(ValueError, match="name it .pt; .safetensors is for files of others"):
        models.export(onestep_run, tmp_path / "half.safetensors")
    assert main_sample("--ckpt", onestep_run, "--export", tmp_path / "half.pt") == 0
    half = models.load(tmp_path / "half.pt").sample([5, 6], steps=1, labels=["dusk", "day"])
    close(half, one, 0.02)
    assert main_sample("--ckpt", tmp_path / "half.pt", "--res", "24,20x40", "--label", "night",
                       "--window=-0.5,-0.5,0.5,0.5", "--out", tmp_path / "out") == 0
    infos = [main_png(file)[1] for file in (tmp_path / "out").glob("*.png")]
    assert [(info["sampler"], info["steps"]) for info in infos] == 2 * [("cm", 2)]
    capsys.readouterr()
    for wrong, said in ((["--steps", 3], "draws in 1 or 2"), (["--sampler", "ddim"], "drawn by cm"),
                        (["--eta", 1], "cm does not"), (["--guidance", 2], "never learned")):
        assert main_sample("--ckpt", onestep_run, *wrong, "--out", tmp_path / "no") == 2
        assert said in main_error(capsys), wrong


def test_a_diffusion_may_be_learnt_in_the_latents_of_one_step_infd(onestep_run, tmp_path, capsys):
    """It draws its sheets by itself, and not in one step."""
    args = [*TINY_LDM, f"init={onestep_run}", "grid_every=4"]
    assert main_stage("ldm", tmp_path / "ldm", *args) == 0
    assert (tmp_path / "ldm/grid-00000004.png").exists()
    assert models.load(tmp_path / "ldm").f is None
    rows = experiments_bench(capsys, "sample", "--repeat", 1, onestep_run)
    assert f"{onestep_run.name} sample" in rows


def test_one_step_infd_reads_captions(text_run, onestep_text, tmp_path):
    """The words and the text encoder are those of the LDM, and stay."""
    run = onestep_text.parent / "cm"
    base, model = models.load(text_run), models.load(run)
    assert main_same(model.text.state_dict(), base.text.state_dict())
    assert model.captions == base.captions and model.guidance == 1
    a, b = (model.sample([0], prompts=[text]) for text in ("a lake", "dusk"))
    assert not torch.equal(a, b) and torch.equal(a, model.sample([0], prompts="a lake"))
    assert main_sample("--ckpt", run, "--prompt", "a lake", "--res", 16, "--out",
                       tmp_path / "out") == 0


def test_a_denoiser_of_other_latents_is_refused(main_runs, onestep_run, tmp_path, capsys):
    args = [*TINY_LATENT, f"latents={main_runs / 'ldm'}"]
    _, ckpt = runs.newest_checkpoint(onestep_run)
    encoder = ckpt["autoencoder"]["weights"]
    name = next(name for name in encoder if name.startswith("encoder."))
    runs.write_checkpoint(tmp_path / "same.pt", ckpt)
    same = train.configure("cm", "tiny", texts=[*args, f"distil={tmp_path / 'same.pt'}"])
    assert train.LatentCMStage(same, CPU).denoiser is not None
    encoder[name] = encoder[name] + 1
    runs.write_checkpoint(tmp_path / "other.pt", ckpt)
    capsys.readouterr()
    assert main_stage("cm", tmp_path / "c", *args, f"distil={tmp_path / 'other.pt'}") == 2
    assert "other.pt has other latents than latents=" in main_error(capsys)


@pytest.fixture(scope="module")
def onestep_text(text_run, tmp_path_factory):
    """A one-step INFD of text, of whose captions it keeps six."""
    root = tmp_path_factory.mktemp("onestep_text")
    assert main_stage("cm", root / "cm", *TINY_LATENT, f"latents={text_run}") == 0
    ckpt = runs.newest_checkpoint(root / "cm")[1]
    runs.write_checkpoint(root / "six.pt", ckpt | {"captions": ckpt["captions"][:6]})
    return root / "six.pt"


@pytest.fixture
def fitted_briefly(monkeypatch):
    """Three steps of `fitted_noise`: what they lead to is judged elsewhere."""
    monkeypatch.setattr(models, "fitted_noise", lambda noise, misfit, steps, step_size:
                        fitted_noise(noise, misfit, 3, step_size))


def test_conditions_alone_choose_the_caption_of_a_one_step_picture(onestep_text, fitted_briefly):
    """That of whose picture they miss least; a prompt that is given stays."""
    model = models.load(onestep_text)
    captions = list(dict.fromkeys(model.captions))
    assert len(captions) > 2
    goal = model.functions([3], steps=1, prompts=[captions[2]]).draw(16)[0]
    there = [like(goal)]
    assert model.fitting_captions([3], 0, there) == [captions[2]]
    alone, told, other = (model.sample([3], conditions=there, prompts=prompts)
                          for prompts in (None, [captions[2]], [captions[1]]))
    assert torch.equal(alone, told) and not torch.equal(alone, other)


def test_a_photo_is_drawn_by_a_model_of_text_and_its_file_says_no_prompt(text_run, tmp_path):
    photo = conditions_file(tmp_path / "a.png", 8)
    assert main_sample("--ckpt", text_run, "--image", photo, "--res", 16, "--out", tmp_path) == 0
    assert "prompt" not in main_png(tmp_path / "a-16x16.png")[1]


def test_what_a_picture_by_conditions_alone_shows_its_file_says(
        onestep_text, fitted_briefly, tmp_path, monkeypatch):
    """The caption that they chose, by which the same picture is drawn, as a still or a frame."""
    model = models.load(onestep_text)
    goal = conditions_file(tmp_path / "a.png", 8)
    common = ["--ckpt", onestep_text, "--given", goal, "--res", 16, "--start", 3]
    assert main_sample(*common, "--n", 2, "--out", tmp_path / "out") == 0
    chosen = model.fitting_captions([3, 4], 0, [read_given(goal)])
    for i, caption in zip((3, 4), chosen):
        pixels, info = main_png(tmp_path / f"out/seed0-{i:06d}-16x16.png")
        assert info["prompt"] == caption
        assert main_sample(*common[:-1], i, "--prompt", caption, "--out", tmp_path / f"{i}") == 0
        assert np.array_equal(pixels, main_png(tmp_path / f"{i}/seed0-{i:06d}-16x16.png")[0])
    served = []
    monkeypatch.setattr(sample, "serve", lambda show, about, port: served.append(about))
    assert main_sample(*common, "--view") == 0
    assert served[0]["start"]["prompt"] is None                      # each seed has its own
    assert main_sample(*common, "--morph", 2, "--frames", 2, "--out", tmp_path / "m.png") == 0
    with Image.open(tmp_path / "m.png") as film:
        info = json.loads(film.text["parameters"])
        first = np.asarray(film.convert("RGB"))
    assert info["prompt"] == chosen[0] and info["window"] is None
    assert sample_gap(first, main_png(tmp_path / "out/seed0-000003-16x16.png")[0]) <= 1


def test_a_negative_prompt_needs_guidance_and_text(text_run, sample_runs, capsys):
    model = models.load(text_run)
    for how in ({"guidance": 1}, {"guidance": 1.0, "prompts": ["a lake"]}):
        with pytest.raises(ValueError, match="a negative prompt: it is guidance that leads away"):
            model.sample([0], negative="snow", **how)
    said = sample_error(capsys, "--ckpt", text_run, "--guidance", 1, "--negative", "snow")
    assert "a negative prompt: it is guidance" in said
    deaf = models.load(sample_runs / "ldm")
    for how in ({"negative": "snow"}, {"regions": [("a lake", (0, 0, 1, 1))]}):
        with pytest.raises(ValueError, match="a prompt: this model does not read text"):
            deaf.sample([0], steps=2, **how)
    place = ["--ckpt", text_run, "--prompt", "a lake", "--prompt-at"]
    said = sample_error(capsys, *place, "mist", "abc")
    assert "--prompt-at TEXT abc: the place is y0,x0,y1,x1" in said
    assert main_sample(*place, "giraffe", "0,0,1,1", "--steps", 1, "--res", 16, "--out",
                       text_run.parent / "placed") == 0
    assert 'prompt "giraffe": this model does not know giraffe' in capsys.readouterr().err


def test_viewer_says_which_words_a_model_does_not_read(text_run):
    with viewer_at(text_run, "--sampler", "dpm++") as (_, port):
        status, _, body = viewer_get(port, "/picture?prompt=a+castle,+a+lake&steps=1")
    remark, *_, name = body.decode().splitlines()
    assert status == 200 and re.fullmatch("[0-9a-f]{16}", name)
    assert remark.startswith("remark ") and "does not know castle; it knows" in remark


def test_one_step_infd_learns_the_paths_that_guidance_leads_to(text_run, tmp_path):
    """From a denoiser that learned with captions left out; w = 1 and 0 are its own, bit for bit."""
    def made(*options):
        cfg = train.configure("cm", "tiny", texts=[*TINY_LATENT, *options])
        return train.LatentCMStage(cfg, CPU)

    told = f"latents={text_run}"
    denoiser = tmp_path / "denoiser"
    assert main_stage("cm", denoiser, *TINY_LATENT, told, "p_uncond=1", "ect.k=1e9", "ect.b=0",
                      "metric=l2") == 0
    model = models.load(denoiser)
    assert model.guidance == 1
    null, context = model.text(model.tokenizer(["", "a lake"])).split(1)
    x, sigma = torch_noise(model.latent_shape, 0)[None], torch.tensor([3.0])
    plain = functools.partial(model.f, x, sigma)
    led = {w: Guided(model.f, w, null)(x, sigma, context=context) for w in (0, 1, 3)}
    without, full = plain(context=null), plain(context=context)
    assert torch.equal(led[0], without) and torch.equal(led[1], full)
    close(led[3], without + 3 * (full - without))

    batch = next(made(told, "p_uncond=1").batches(0))
    close(batch["context"], null.expand_as(batch["context"]))
    gaps = []
    for guidance in (1, 3):
        stage = made(told, f"distil={denoiser}", f"guidance={guidance}", "ect.k=0")
        gaps.append(stage.objective(next(stage.batches(0)), 0)[0])
    assert gaps[0] != gaps[1]
    for wrong, said in (([told, "guidance=3"], "that distil=RUN names"),
                        ([f"latents={sample.bundled('infd')}", "p_uncond=0.1"], "its class")):
        with pytest.raises(ValueError, match=said):
            made(*wrong)


def test_runs_log_draw_and_score_what_they_promise(main_runs, stage_runs):
    """Held-out scores, by which one sees when to stop, stand in the log every grid_every steps."""
    for run, name, steps in ((main_runs / "ae", "held_out_psnr", [6]),
                             (main_runs / "ldm", "held_out_loss", [4]),
                             (stage_runs / "pretrain", "held_out_psnr", [4, 6]),
                             (stage_runs / "cm", "denoising_distance", [4, 6])):
        lines = [line for line in main_log(run) if name in line]
        assert [line["step"] for line in lines] == steps, name
        assert all(0 < line[name] < 100 and line["loss"] > 0 for line in lines)
    assert {"difference", "stage"} <= set(main_log(stage_runs / "cm")[0])
    cell = 2 * 16 + 4
    for run, rows, columns in (("cm", 2, 8), ("cm-unet", 1, 8), ("pretrain", 2, 5)):
        file = runs.checkpoints(stage_runs / run)[0].name.replace("step", "grid")
        sheet = np.asarray(Image.open((stage_runs / run / file).with_suffix(".png")))
        assert sheet.shape == (16 + rows * cell - 4, columns * cell - 4, 3), run
    scores = json.loads((stage_runs / "pretrain" / "eval.json").read_text())
    assert scores["1x"]["n"] == scores["2x"]["n"] == 2 and scores["2x"]["px"] == 32


def test_stage_cm_starts_as_the_pretrained_reconstructor(stage_runs):
    """The encoder is the identity at first, so F(c_in x) is M(c_in x), the reconstruction."""
    average = main_state(stage_runs / "pretrain")["ema"]
    stage = main_made("cm", *TINY_CM, f"init={stage_runs / 'pretrain'}")
    before = {k: v.clone() for k, v in stage.net.state_dict().items()}
    stage.begin()
    for key, value in stage.net.state_dict().items():
        pretrained = average.get(key)
        assert torch.equal(value, before[key] if pretrained is None else pretrained), key
        assert (pretrained is None) == key.startswith(("encoder.", "condition.")), key
    x = randn(2, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        f = stage.net(2 * x, torch.full((2,), 5.0), torch.tensor([0, 3]))
        assert torch.equal(f, stage.net.reconstruct(2 * x).draw(16))


def test_classes_are_used_where_the_data_has_them_by_one_rule_in_every_stage(main_runs, tmp_path,
                                                                             capsys):
    plain, sorted_ = main_set(tmp_path / "plain", 24), main_set(tmp_path / "sorted", 24, ("a", "b"))
    for kind, options in ((stages_func.CMStage, [*TINY_CM, "init=none"]),
                          (stages_infd.LDMStage, [*TINY_LDM, f"init={main_runs / 'ae'}"])):
        for folder, more, classes, said in ((plain, [], [], "no classes"),
                                            (sorted_, [], ["a", "b"], "(a, b), used\n"),
                                            (sorted_, ["labels=false"], [], "(a, b), not used")):
            cfg = train.configure(kind.name, "tiny", str(folder), [*options, *more])
            stage = kind(cfg, CPU)
            train.introduce(stage, tmp_path)
            assert said in capsys.readouterr().out and stage.extra["classes"] == classes
            main_saved(tmp_path / f"{kind.name}-{folder.name}{more}", stage)
            made = models.load(tmp_path / f"{kind.name}-{folder.name}{more}")
            assert made.classes == tuple(classes)


# ---- from Python ----

class MainPictures:
    """A data set class of a user: PIL images, nothing else."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return Image.fromarray(np.full((40, 40, 3), 40 * i, np.uint8))


@pytest.mark.parametrize("name, options", [("ae", [*TINY_AE, "lpips=vgg"]),
                                           ("pretrain", TINY_PRETRAIN),
                                           ("cm", [*TINY_CM, "metric=lpips"])])
def test_a_user_trains_on_pictures_and_a_loss_of_their_own(tmp_path, capsys, name, options):
    """In place of L1 and LPIPS, or of the metric, whose networks are not loaded."""
    calls = []

    def loss(a, b):
        calls.append(a.shape)
        return (a - b).square().mean(dim=(1, 2, 3))

    stage = main_made(name, *options, source=MainPictures(), loss=loss)
    train.introduce(stage, tmp_path)
    said = "6 pictures of MainPictures to train on and none held out"
    assert said in capsys.readouterr().out and len(stage.held_out) == 6
    logs = train.step(stage, next(stage.batches(0)), 0)
    assert calls == [(stage.cfg.batch, 3, 16, 16)] and not {"l1", "lpips"} & logs.keys()


class MainPairs(MainPictures):
    """As torchvision's: pairs of a picture and its class."""

    classes = ("even", "odd")

    def __getitem__(self, i):
        return super().__getitem__(i), i % 2


@pytest.mark.parametrize("targets", [[0, 1] * 3, torch.tensor([0, 1] * 3)])
def test_pairs_with_targets_are_pictures_with_classes(targets):
    pairs = MainPairs()
    with pytest.raises(data.DataError, match="MainPairs has classes, but no label"):
        data.as_source(pairs)
    pairs.targets = targets
    source = data.as_source(pairs)
    assert [source.label(i) for i in range(6)] == [0, 1] * 3 and source.classes == pairs.classes
    assert np.array_equal(source[2].draw(40), np.full((40, 40, 3), 80))


@pytest.mark.parametrize("items, said", [
    ([torch.zeros(3, 16, 16)], r"list\[0\] is a Tensor"), ([np.zeros((4, 4, 3))], "is a ndarray"),
    (torch.utils.data.TensorDataset(torch.zeros(4, 3, 16, 16)), "return a PIL image"),
    ([(torch.zeros(3, 16, 16), 1)], r"is a pair with a Tensor: return a PIL image \(no ToTensor")])
def test_a_data_set_of_tensors_is_refused_by_a_clear_line(items, said):
    with pytest.raises(data.DataError, match=said):
        data.as_source(items)


# ---- every preset takes a step ----
# What one step on two cores cannot have: the weights of LPIPS, thousands of pictures encoded
# beforehand, 256 px through the first stage, and in preset paper its widths, of hundreds of
# millions of weights and moments. The depths stay.

FAULT_SIDE = ["size=64", "patch=64", "max_size=128", "lpips=none"]
FAULT_NARROW = ["func.dim=96", "func.heads=3", "func.hidden=32"]
FAULT_PRESETS = {
    "tiny": {"ae": [], "ldm": ["pictures=8"], "pretrain": [], "cm": []},
    "small": {"ae": FAULT_SIDE, "ldm": ["size=64"], "pretrain": [], "cm": []},
    "paper": {"ae": [*FAULT_SIDE, "ae.ch=32", "ae.hidden=32", "disc.ndf=8"],
              "ldm": ["size=64", "unet.model_channels=32"],
              "pretrain": FAULT_NARROW, "cm": [*FAULT_NARROW, "init=none", "metric=huber"]}}


def fault_preset(tmp_path, monkeypatch, preset):
    for stage in train.STAGES:
        monkeypatch.setattr(train.STAGES[stage], "preview", lambda *args: None)
        args = ["steps=1", "batch=1", "workers=0", "eval_n=1", *FAULT_PRESETS[preset][stage]]
        out = ["--device", "cpu", "--out", tmp_path / stage]
        assert main_train("--stage", stage, "--preset", preset, *out, *args) == 0
        assert runs.newest_checkpoint(tmp_path / stage)[1]["step"] == 1
        assert "loss" in main_log(tmp_path / stage)[0]
    infd, cm = models.load(tmp_path / "ldm"), models.load(tmp_path / "cm")
    assert infd.decode(infd.sample([0], steps=2)).draw(64).shape == (1, 3, 64, 64)
    assert cm.functions([0]).draw(64).shape == (1, 3, 64, 64)


def test_fault_f26_preset_tiny_trains_saves_loads_and_draws(tmp_path, monkeypatch):
    fault_preset(tmp_path, monkeypatch, "tiny")


@slow
@pytest.mark.parametrize("preset", ["small", "paper"])
def test_fault_f26_every_preset_trains_saves_loads_and_draws(tmp_path, monkeypatch, preset):
    fault_preset(tmp_path, monkeypatch, preset)


def test_stage_out_of_memory_in_training_says_what_helps(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(train, "descend", full)
    assert main_stage("ae", tmp_path, *TINY_AE) == 1
    assert "accum=2" in main_error(capsys)


# ==================================================================================================
# Faults: kills, full disks, damaged files, numbers that are none, several processes, no network
# ==================================================================================================
# F1 to F26 are the rows of a table of faults, each with its criterion. Those that are not here
# stand with the module they concern: F15 to F17 with data.py, F18 and F24 with sample.py, F26 with
# train.py; F21 is one line that names the option, F4 costs one interval as F3 does.

FAULT_ARGS = {"ae": [*TINY_AE, *TINY_GAN, "eval_n=1"], "ldm": TINY_LDM,
              "pretrain": [*TINY_PRETRAIN, "eval_n=1", "muon=4e-3", "lr_drop=true"],
              "cm": [*TINY_CM, *TINY_TEACHER, "init=none", "ema=0.9"]}


def fault_args(stage, out, main_runs, *options):
    """The command line of a small run: stage ae with its GAN, stage cm with its teacher."""
    init = [f"init={main_runs / 'ae'}"] if stage == "ldm" else []
    words = ["--stage", stage, "--preset", "tiny", "--out", out, *FAULT_ARGS[stage], *init]
    return list(map(str, [*words, "log_every=1", *options]))         # a resumed line has all steps


def fault_cm(out, *options):
    return fault_args("cm", out, None, *options)


def fault_train(args, seed=None, signals=(), env=()):
    """main_train as a process: it dies in a save by `seed`, or gets signals in step 2."""
    os.environ.update(env)
    torch.set_num_threads(1)                                         # two processes, two cores
    if seed is not None:
        fault_die_in_save(seed)
    with pytest.MonkeyPatch.context() as patch:
        fault_signal(patch, 2, *signals)
        os._exit(main_train(*args))


def fault_child(*args):
    """A process of fault_train, without the seconds that imports take.

    It is forked from a server that has only imported this file: autograd refuses to work in a fork
    of a process where it already has threads, one per GPU.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child = context.Process(target=fault_train, args=args)
    child.start()
    atexit.register(child.kill)      # a test that failed leaves it, and Python waits for it
    return child


def fault_signal(monkeypatch, k, *signals):
    """Signals to this process within the k-th step from now on."""
    add = runs.Meter.add
    steps = []

    def signalled(meter, *args):
        add(meter, *args)
        steps.append(0)
        if len(steps) == k:
            for number in signals:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(runs.Meter, "add", signalled)


def fault_no_previews(monkeypatch):
    """Sheets and scores have tests of their own."""
    for stage in train.STAGES.values():
        monkeypatch.setattr(stage, "preview", lambda *args: None)
        monkeypatch.setattr(stage, "scores", lambda *args: {})


@pytest.fixture(scope="module")
def fault_run(tmp_path_factory):
    """A finished run of stage cm, saved at steps 3 and 6."""
    run = tmp_path_factory.mktemp("fault") / "run"
    with pytest.MonkeyPatch.context() as patch:
        fault_no_previews(patch)
        assert main_train(*fault_cm(run)) == 0
    return run


def fault_bytes(run):
    return {p.name: p.read_bytes() for p in run.glob("step-*")}


def fault_step(run):
    return runs.newest_checkpoint(run)[1]["step"]


# ---- F1: a kill at any moment ----

def fault_die_in_save(seed):
    """SIGKILL in a random save: at a byte of the file, or between two calls that write."""
    gen = np.random.default_rng(seed)
    write = runs.write_checkpoint
    wanted = int(gen.integers(1, 4))
    point = int(gen.integers(0, 6))
    saves = []

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    class Dying(io.FileIO):
        left = int(gen.integers(1, 800_000))

        def write(self, content):
            if self.left < len(content):
                super().write(content[:self.left])
                die()
            self.left -= len(content)
            return super().write(content)

    def dying(*args):
        saves.append(0)
        if len(saves) == wanted:
            if point < 3:
                runs.open = lambda path, mode: (Dying if mode == "wb" else open)(path, mode)
            if point == 3:
                os.fsync = die
            if point == 4:
                Path.replace = die
            if point == 5:
                Path.unlink = die
        return write(*args)

    runs.write_checkpoint = dying


def fault_kills(tmp_path, kills):
    """Kill a run again and again, in every second try inside of a save.

    What is left must always go on, and the end be bit for bit that of a run nobody disturbed.
    """
    run = tmp_path / "run"
    gen = np.random.default_rng(0)
    args = ["save_every=2", "K=1000", "grid_every=1000000"]
    for kill in range(kills):
        before = (run / "log.jsonl").stat().st_mtime_ns if run.exists() else 0
        options = fault_cm(run, *args, "steps=1000000")
        child = fault_child(options, kill if kill % 2 else None)
        if kill % 2 == 0:                                            # any time within the loop
            log = run / "log.jsonl"
            while not log.exists() or log.stat().st_mtime_ns == before:
                assert child.is_alive()
                time.sleep(0.001)
            time.sleep(gen.uniform(0, 0.4))
            child.kill()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL

        assert len(list(run.glob("step-*.part"))) <= 1
        saved = [runs.read_checkpoint(file)["step"] for file in runs.checkpoints(run)]
        lines = (run / "log.jsonl").read_text().splitlines()
        logged = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        assert max(logged, default=0) - max(saved, default=0) <= 2
    steps = f"steps={max(saved, default=0) + 3}"
    assert main_train(*fault_cm(run, *args, steps)) == 0
    assert not list(run.glob("*.part")) and len(runs.checkpoints(run)) == 2
    assert main_train(*fault_cm(tmp_path / "whole", *args, steps)) == 0
    assert main_same(main_state(run), main_state(tmp_path / "whole"))
    assert main_log(run) == main_log(tmp_path / "whole")


@pytest.fixture
def one_thread():
    """As child processes have: other sums of floats would not be theirs bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_fault_f01_two_kills(one_thread, tmp_path):
    fault_kills(tmp_path, 2)


@slow
def test_fault_f01_fifty_kills(one_thread, tmp_path):
    fault_kills(tmp_path, 50)


# ---- F2, F3, F7, F8: writing a checkpoint ----

def fault_save(folder, step, value=1.0):
    """What fit saves, of a network of one weight matrix."""
    folder.mkdir(exist_ok=True)
    net = nn.Linear(8, 8, bias=False)
    net.requires_grad_(False).weight.fill_(value)
    run = runs.RunFolder(folder, "ae", train.STAGES["ae"].options())
    run.save(step, {"model": net}, {}, last=True)


@pytest.mark.parametrize("owner, name, error", [
    (torch, "save", RuntimeError), (torch, "save", TypeError), (torch, "save", KeyboardInterrupt),
    (torch, "save", runs.Stopped), (os, "fsync", OSError), (Path, "replace", OSError)])
def test_fault_f02_f08_a_save_that_fails_changes_no_file(tmp_path, monkeypatch, owner, name, error):
    for step in (1, 2):
        fault_save(tmp_path, step)
    before = fault_bytes(tmp_path)

    def fails(*args):
        if name == "save":
            args[1].write(b"the first half")
        raise error("input/output error")

    monkeypatch.setattr(owner, name, fails)
    expected = runs.NotSaved if error in (OSError, RuntimeError) else error
    with pytest.raises(expected, match="input/output error"):
        fault_save(tmp_path, 3)
    assert fault_bytes(tmp_path) == before and len(before) == 2      # and no step-*.part


def test_fault_f08_the_older_is_deleted_only_after_the_new_one_was_verified(tmp_path, monkeypatch):
    for step in (1, 2):
        fault_save(tmp_path, step)
    before = fault_bytes(tmp_path)
    fsync = os.fsync

    def fsync_of_a_failing_disk(fd):                                 # writes a flipped byte
        fsync(fd)
        part, = tmp_path.glob("*.part")
        content = bytearray(part.read_bytes())
        content[content.index(torch.full((64,), 3.0).numpy().tobytes())] ^= 1
        part.write_bytes(content)

    monkeypatch.setattr(os, "fsync", fsync_of_a_failing_disk)
    with pytest.raises(runs.NotSaved, match="damaged"):
        fault_save(tmp_path, 3, 3.0)
    assert fault_bytes(tmp_path) == before


def test_fault_f03_a_full_disk_costs_an_interval_and_at_the_end_is_an_error(tmp_path, monkeypatch,
                                                                           capsys):
    """So does any save that fails, whatever the cause (F4)."""
    fault_no_previews(monkeypatch)
    write = runs.write_checkpoint

    def on_full_disk(path, content):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if content["step"] in (2, 4):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            write(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    run = tmp_path / "run"
    args = fault_cm(run, "save_every=1", "steps=4")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_checkpoint", on_full_disk)
        with pytest.warns(UserWarning, match="step 2 could not be saved .* tries again"):
            assert main_train(*args) == 1
    line = main_error(capsys)
    assert line.startswith("error: step 4 could not be saved") and "what is there is older" in line
    assert sorted(fault_bytes(run)) == ["step-00000001.pt", "step-00000003.pt"]
    assert main_train(*args) == 0 and fault_step(run) == 4


def test_fault_f07_f08_order_of_a_power_cut(tmp_path, monkeypatch):
    """Data before name, name before deletion; two checkpoints are always kept."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("reads names in /proc")
    for step in (1, 2):
        fault_save(tmp_path / "run", step)
    calls = []

    def traced(owner, name, said):
        call = getattr(owner, name)

        def noted(*args, **options):
            calls.append(said(*args))
            return call(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    def file(fd):
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name

    traced(torch, "save", lambda content, f: f"write {Path(f.name).name}")
    traced(os, "fsync", lambda fd: f"fsync {file(fd)}")
    traced(zipfile.ZipFile, "testzip", lambda archive: f"verify {Path(archive.filename).name}")
    traced(Path, "replace", lambda path, to: f"rename {path.name} {to.name}")
    traced(Path, "unlink", lambda path, missing_ok=False: f"delete {path.name}")
    fault_save(tmp_path / "run", 3)
    assert calls == ["write step-00000003.part", "fsync step-00000003.part",
                     "verify step-00000003.part", "rename step-00000003.part step-00000003.pt",
                     "fsync run", "delete step-00000001.pt"]


# ---- F5, F6: damaged checkpoints ----

@pytest.mark.parametrize("damage", ["half", "flipped"])
def test_fault_f05_f06_a_damaged_checkpoint_is_named_and_passed_over(fault_run, tmp_path,
                                                                     monkeypatch, capsys, damage):
    """Training and sampling go on from the one before, and the end is that of a whole run."""
    fault_no_previews(monkeypatch)
    run = shutil.copytree(fault_run, tmp_path / "run")
    newest, older = runs.checkpoints(run)
    content = bytearray(newest.read_bytes())
    if damage == "half":
        del content[len(content) // 2:]
    else:                                                            # the highest byte of a weight
        weight = next(v for v in main_state(run)["model"].values() if v.numel() > 64)
        content[content.index(weight.numpy().tobytes()) + 3] ^= 1
    newest.write_bytes(content)
    if damage == "flipped":
        torch.load(newest, weights_only=True)                        # does not notice

    capsys.readouterr()
    assert main_sample("--ckpt", run, "--out", tmp_path / "drawn") == 0
    out, err = capsys.readouterr()
    assert "step 3)" in out and err.count("\n") == 1 and newest.name in err and older.name in err
    assert "damaged" in err
    assert main_train(*fault_cm(run)) == 0
    out, err = capsys.readouterr()
    assert "from step 3" in out and newest.name in err and older.name in err
    assert main_same(main_state(run), main_state(fault_run))
    assert main_log(run) == main_log(fault_run)


# ---- F9, F10, F12, F13: resume, loader processes, several ranks ----

FAULT_RANK = """
import os, sys, time
import runs, train
folder, save_takes, dies = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
rank = os.environ["RANK"]
told = open(f"{folder}/rank{rank}", "a", buffering=1)
add, write = runs.Meter.add, runs.write_checkpoint

def added(*args):
    told.write(f"{os.getpid()}\\n")
    add(*args)
    if rank == "1" and dies and len(open(told.name).readlines()) >= dies:
        raise RuntimeError("rank 1 has a fault")

def written(*args):
    time.sleep(save_takes)
    return write(*args)

runs.Meter.add, runs.write_checkpoint = added, written
sys.exit(train.main(sys.argv[4:]))
"""


def fault_port():
    """A port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fault_ranks(tmp_path, args, save_takes=0.0, dies=0):
    """Start two ranks by torchrun; each writes its process number to a file in every step."""
    (tmp_path / "rank.py").write_text(FAULT_RANK)
    env = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", fault_port()]
    command = [sys.executable, *launch, tmp_path / "rank.py", tmp_path, save_takes, dies, *args]
    return subprocess.Popen(list(map(str, command)), env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def fault_told(tmp_path):
    """What each of two ranks has written."""
    files = [tmp_path / name for name in ("rank0", "rank1")]
    return [file.read_text().split() if file.exists() else [] for file in files]


def fault_two_ranks(stage, main_runs, tmp_path):
    """Two processes, as torchrun starts them, share the samples of one, and have its losses."""
    plain = {"ae": ["gan_weight=0"], "pretrain": ["muon=0"]}.get(stage, [])      # rounding grows
    options = ["batch=4", "steps=6", *plain]
    one, two = (fault_args(stage, tmp_path / f"run{n}", main_runs, *options) for n in (1, 2))
    assert main_train(*one) == 0
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(fault_port())}
    ranks = [fault_child(two, None, (), job | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    for rank in ranks:
        rank.join(240)
        assert rank.exitcode == 0
    ours, theirs = ([line["loss"] for line in main_log(tmp_path / run)] for run in ("run2", "run1"))
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1.1e-6)       # the log has six digits
    assert fault_step(tmp_path / "run2") == 6


def test_fault_f10_two_ranks_take_the_steps_of_one(tmp_path):
    fault_two_ranks("cm", None, tmp_path)


@slow
@pytest.mark.parametrize("stage", ["ae", "ldm", "pretrain"])
def test_fault_f10_two_ranks_take_the_steps_of_one_in_every_stage(main_runs, tmp_path, stage):
    fault_two_ranks(stage, main_runs, tmp_path)


def fault_resume(stage, steps, stops, main_runs, tmp_path, monkeypatch):
    """A run stopped in each of some steps, and continued by loader processes: bit for bit."""
    fault_no_previews(monkeypatch)
    wait_for = runs.Meter.wait_for
    seen = []

    def told(meter, stream):
        batch = wait_for(meter, stream)
        seen[-1] += batch["index"].tolist()
        return batch

    def trained(out, *options):
        seen.append([])
        return main_train(*fault_args(stage, tmp_path / out, main_runs, f"steps={steps}",
                                      "grid_every=5", *options))

    monkeypatch.setattr(runs.Meter, "wait_for", told)
    uncached = ["cache=false", "pictures=0", "latent_norm=false"]    # a cache needs no loader
    more = uncached if stage == "ldm" else []
    assert trained("whole", *more) == 0
    whole = runs.newest_checkpoint(tmp_path / "whole")[1]
    parts = {"ae": {"disc", "opt_d"}, "ldm": {"scale"}, "pretrain": set(), "cm": {"target"}}[stage]
    assert whole["state"].keys() == parts | {"model", "opt", "ema"}
    for k in stops:
        out = f"stopped{k}"
        with monkeypatch.context() as patch:
            fault_signal(patch, k, signal.SIGTERM)
            assert trained(out, *more) == 143
        assert fault_step(tmp_path / out) == k
        assert trained(out, *more, "workers=2") == 0
        assert seen[0] == seen[-2] + seen[-1]
        assert main_log(tmp_path / out) == main_log(tmp_path / "whole")
        assert main_same(runs.newest_checkpoint(tmp_path / out)[1]["state"], whole["state"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("stage", list(train.STAGES))
def test_fault_f09_f10_a_run_continues_bit_for_bit(main_runs, tmp_path, monkeypatch, stage):
    fault_resume(stage, 6, [4], main_runs, tmp_path, monkeypatch)


@slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("stage", list(train.STAGES))
def test_fault_f09_resume_at_every_one_of_20_steps(main_runs, tmp_path, monkeypatch, stage):
    fault_resume(stage, 20, range(1, 20), main_runs, tmp_path, monkeypatch)


def fault_wait(job, tmp_path, steps):
    """Until each of two ranks has taken some steps; their process numbers."""
    while min(map(len, fault_told(tmp_path))) < steps:
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.05)
    return [int(lines[0]) for lines in fault_told(tmp_path)]


@slow
@pytest.mark.parametrize("receivers, save_takes", [([0], 0), ([1], 0), ([0, 1], 5)])
def test_fault_f12_sigterm_stops_two_ranks_at_the_same_step(tmp_path, receivers, save_takes):
    """Whoever gets it. torchrun ends the others when one has gone: first all is written."""
    run = tmp_path / "run"
    args = fault_cm(run, "steps=100000", "save_every=100000", "K=1000")
    job = fault_ranks(tmp_path, args, save_takes)
    pids = fault_wait(job, tmp_path, 3)
    for rank in receivers:
        os.kill(pids[rank], signal.SIGTERM)
    assert job.wait(timeout=120) != 0
    steps = [len(lines) for lines in fault_told(tmp_path)]
    assert steps[0] == steps[1] and list(fault_bytes(run)) == [f"step-{steps[0]:08d}.pt"]
    assert fault_step(run) == steps[0] and not list(run.glob("*.part"))


@slow
@pytest.mark.parametrize("fault", ["killed", "raises"])
def test_fault_f13_a_dead_rank_ends_the_job_within_a_minute(tmp_path, fault):
    run = tmp_path / "run"
    args = fault_cm(run, "steps=100000", "save_every=2", "K=1000")
    job = fault_ranks(tmp_path, args, dies=8 if fault == "raises" else 0)
    pids = fault_wait(job, tmp_path, 5)
    if fault == "killed":
        os.kill(pids[1], signal.SIGKILL)
    assert job.wait(timeout=60) != 0
    assert not Path(f"/proc/{pids[0]}").exists()
    step = fault_step(run)
    assert step >= 4
    assert main_train(*args, f"steps={step + 1}") == 0 and fault_step(run) == step + 1


# ---- F11: signals ----

def test_fault_f11_ctrl_c_in_training_ends_it_after_the_step(tmp_path, monkeypatch, capsys):
    fault_signal(monkeypatch, 2, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    assert main_train(*fault_cm(tmp_path / "run", "save_every=100")) == 130
    assert fault_step(tmp_path / "run") == 2 and signal.getsignal(signal.SIGINT) == before
    assert "the same command continues" in capsys.readouterr().err


def test_fault_f11_a_second_signal_ends_it_at_once(tmp_path):
    child = fault_child(fault_cm(tmp_path / "run", "save_every=1"), None, 2 * (signal.SIGTERM,))
    child.join()
    assert child.exitcode == 143 and fault_step(tmp_path / "run") == 1


def test_fault_f11_a_signal_in_the_evaluation(tmp_path, monkeypatch):
    """The training is saved by then; the same command evaluates again."""
    args = fault_args("ae", tmp_path / "run", None, "steps=2")
    reached = []

    def scored(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(0)

    with monkeypatch.context() as patch:
        patch.setattr(train.STAGES["ae"], "scores", scored)
        assert main_train(*args) == 143 and not reached
    assert fault_step(tmp_path / "run") == 2 and not (tmp_path / "run/eval.json").exists()
    assert main_train(*args) == 0 and (tmp_path / "run/eval.json").exists()


def test_fault_f11_a_signal_in_scoring(tmp_path, metrics_stub, monkeypatch):
    folder = str(metrics_folder(tmp_path / "set", metrics_pictures(8)))
    monkeypatch.setattr(MetricsStub, "forward", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert metrics.main(["fid", folder, folder, "--device", "cpu"]) == 143


# ---- F14: numbers that are none ----

def fault_nan(monkeypatch, stage, bad):
    """bad: step -> NaN, by which its loss is multiplied, or infinity, by which its gradient is."""
    cls = train.STAGES[stage]
    prepare = cls.prepare
    owner, name = {"ae": (FieldAutoencoder, "forward"), "ldm": (GaussianDiffusion, "loss"),
                   "cm": (sys.modules[cls.__module__], "consistency_loss")}[stage]
    call = getattr(owner, name)
    now = [0]

    def counted(self, k):
        now[0] = k
        prepare(self, k)

    def spoil(out):
        value = bad.get(now[0], 1)
        if math.isnan(value):
            return out * value
        if math.isinf(value) and out.requires_grad:
            out.register_hook(lambda gradient: gradient * value)
        return out

    def spoilt(*args, **options):
        out = call(*args, **options)
        return (spoil(out[0]), *out[1:]) if isinstance(out, tuple) else spoil(out)

    monkeypatch.setattr(cls, "prepare", counted)
    monkeypatch.setattr(owner, name, spoilt)


def fault_finite(state):
    if isinstance(state, dict):
        return all(map(fault_finite, state.values()))
    if isinstance(state, (list, tuple)):
        return all(map(fault_finite, state))
    return not torch.is_tensor(state) or bool(torch.isfinite(state).all())


@pytest.mark.parametrize("stage", ["ae", "ldm", "cm"])
def test_fault_f14_a_step_without_numbers_is_skipped_and_counted(main_runs, tmp_path, monkeypatch,
                                                                 stage):
    fault_no_previews(monkeypatch)
    fault_nan(monkeypatch, stage, {1: math.nan, 3: math.inf})
    run = tmp_path / "run"
    args = ["steps=5", "save_every=1", "keep_every=1"]
    assert main_train(*fault_args(stage, run, main_runs, *args)) == 0
    log = main_log(run)
    assert [line.get("skipped", 0) for line in log] == [0, 1, 0, 1, 0]
    assert all(math.isfinite(v) for line in log for v in line.values())
    states = [runs.read_checkpoint(file)["state"] for file in runs.checkpoints(run)[::-1]]
    assert len(states) == 5 and all(map(fault_finite, states))
    same = [main_same(a["model"], b["model"]) for a, b in itertools.pairwise(states)]
    assert same == [True, False, True, False]


def test_fault_f14_twenty_steps_without_numbers_end_the_run():
    """Counted over lines of the log; the last batch is named."""
    meter = runs.Meter()
    for k in range(36):
        meter.add({"taken": torch.tensor(k == 15)}, 4, k, torch.arange(4 * k, 4 * k + 4))
        if k % 10 == 9:
            assert meter.means()["skipped"] == 10 - (k == 19)
    with pytest.raises(runs.NotFinite, match=r"images \[140, 141, 142, 143\] of step 35"):
        meter.means()


def test_fault_f14_weights_that_are_no_numbers_are_never_saved(tmp_path, monkeypatch, capsys):
    fault_no_previews(monkeypatch)
    run = tmp_path / "run"
    update = train.ema_update

    def spoilt(ema, model, rate):
        update(ema, model, math.nan if runs.checkpoints(run) else rate)

    monkeypatch.setattr(train, "ema_update", spoilt)
    assert main_train(*fault_cm(run, "grid_every=100")) == 1
    assert main_error(capsys).startswith("error: the weights are not finite at step 6")
    assert fault_step(run) == 3 and fault_finite(main_state(run))


# ---- F18, F19, F20: checkpoints and folders of others ----

def test_fault_f18_training_runs_nothing_that_a_checkpoint_holds(fault_run, tmp_path, capsys):
    """Nor does it go on from weights that are no numbers."""
    run = shutil.copytree(fault_run, tmp_path / "run")
    marker = tmp_path / "marker"
    args = fault_cm(run)
    file, older = runs.checkpoints(run)
    older.unlink()
    ckpt = runs.read_checkpoint(file)
    next(iter(ckpt["state"]["model"].values())).view(-1)[0] = math.nan
    torch.save(ckpt, file)
    capsys.readouterr()
    assert main_train(*args) == 2 and "not finite" in main_error(capsys)
    for attack in (SampleEvil(marker), {**ckpt, "evil": SampleEvil(marker)}):
        torch.save(attack, file)
        assert main_train(*args) == 2
        assert "was not opened" in main_error(capsys) and not marker.exists()
    file.write_bytes(pickle.dumps(SampleEvil(marker), 2))            # torch.save's of long ago
    assert main_train(*args) == 2 and not marker.exists()
    assert "was not opened" in main_error(capsys)


def test_fault_f19_another_configuration_or_a_later_format_is_refused(fault_run, tmp_path, capsys):
    """The way out is another --out, so that a run is one configuration, always."""
    run = shutil.copytree(fault_run, tmp_path / "run")
    before = fault_bytes(run)
    assert main_train(*fault_cm(run), "lr=0.5", "func.hidden=32") == 2
    line = main_error(capsys)
    assert "func.hidden: 16 -> 32" in line and "-> 0.5" in line and "choose another --out" in line
    assert main_stage("pretrain", run, *TINY_PRETRAIN) == 2
    assert "stage: cm -> pretrain" in main_error(capsys)
    assert fault_bytes(run) == before

    file, older = runs.checkpoints(run)
    older.unlink()
    torch.save({**runs.read_checkpoint(file), "format": runs.FORMAT + 1}, file)
    for program, args in ((main_train, fault_cm(run)), (main_sample, ["--ckpt", run])):
        assert program(*args) == 2
        line = main_error(capsys)
        assert f"format {runs.FORMAT + 1}, this version reads {runs.FORMAT}" in line
    assert main_sample("--ckpt", tmp_path / "none") == 2
    assert str(tmp_path / "none") in main_error(capsys)


def test_fault_f20_a_folder_belongs_to_one_run_at_a_time(tmp_path, capsys):
    """And to the next as soon as the process has ended, however it did."""
    run = tmp_path / "run"
    child = fault_child(fault_cm(run, "steps=100000", "save_every=2", "K=1000"))
    while not runs.checkpoints(run):
        assert child.is_alive()
        time.sleep(0.02)
    assert main_train(*fault_cm(run, "steps=100000", "K=1000")) == 2
    line = main_error(capsys)
    assert line.startswith("error: another run is writing to") and str(run) in line
    assert child.is_alive()
    child.kill()
    child.join()
    step = fault_step(run)
    assert main_train(*fault_cm(run, f"steps={step + 1}", "K=1000")) == 0
    assert fault_step(run) == step + 1


def test_case_5_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch):
    def lockf(file, how):
        raise OSError(errno.ENOSYS, "function not implemented")

    monkeypatch.setattr(runs.fcntl, "lockf", lockf)
    with pytest.warns(UserWarning, match="file system without locks"):
        with runs.locked(tmp_path):
            pass


def fault_hold(folder, pipe):
    """Hold a folder, start a loader process that outlives us, and wait to be killed."""
    with runs.locked(Path(folder)):
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        pipe.send("held")
        time.sleep(60)


def test_case_10_a_lock_ends_with_the_process_that_trains(tmp_path):
    """Its children live on and hold the same open file: a restart needs no pause all the same."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    child = context.Process(target=fault_hold, args=(tmp_path, theirs))
    child.start()
    assert mine.recv() == "held"
    with pytest.raises(ValueError, match="another run is writing"):
        with runs.locked(tmp_path):
            pass
    child.kill()
    child.join()
    with runs.locked(tmp_path):
        pass


# ---- F25: a bare machine ----

FAULT_BARE = """
import socket, sys, warnings
connect = socket.socket.connect

def refused(*args):
    raise OSError("no network")

def local(self, address):                            # loader processes pass tensors by sockets
    return refused() if isinstance(address, tuple) else connect(self, address)

socket.socket.connect = local
socket.create_connection = socket.getaddrinfo = refused
import train
warnings.simplefilter("ignore")
args = sys.argv[1:]
print("lpips:", train.main([*args, "lpips=vgg"]))
sys.exit(train.main([*args, "workers=2"]))
"""


def test_fault_f25_no_network_no_gpu_no_home(tmp_path):
    """HOME lies in /proc, where not even root can write."""
    caches = ("TORCH_HOME", "XDG_CACHE_HOME", "TMPDIR")
    env = {k: v for k, v in os.environ.items() if k not in caches}
    home = "/proc" if Path("/proc").exists() else str(tmp_path / "none")
    env |= {"HOME": home, "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(Path(train.__file__).parent)
    command = [sys.executable, "-c", FAULT_BARE, *fault_args("ae", "runs/ae", None, "steps=2")]
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "lpips: 2" in done.stdout and fault_step(tmp_path / "runs/ae") == 2
    error, = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "vgg16-397923af.pth" in error and f"{home}/.cache/torch/hub/checkpoints" in error
    assert "lpips=none" in error


# ==================================================================================================
# Experiments: experiments.py
# ==================================================================================================


def experiments_tiny() -> dict[str, dict]:
    """What makes each stage as small as can be, as COMPARISONS has it."""
    texts = {"ae": TINY_AE, "ldm": TINY_LDM, "pretrain": TINY_PRETRAIN,
             "cm": [*TINY_CM, *TINY_NETS]}
    return {stage: runs.parse_options(train.STAGES[stage].options, given, stage)
            for stage, given in texts.items()}


def experiments_twice(name, sides, out, monkeypatch, **options):
    """The rows of a comparison; the same again trains nothing and gives the same."""
    monkeypatch.setitem(experiments.COMPARISONS, name, sides)
    monkeypatch.setattr(experiments, "load_features", lambda name: MetricsStub())
    rows = experiments.compare(name, "synthetic", out, CPU, n=8, **options)
    files = {file: file.read_bytes() for file in out.rglob("step-*.pt")}
    assert json.loads((out / f"{name}.json").read_text()) == rows and files
    assert experiments.compare(name, "synthetic", out, CPU, n=8, **options) == rows
    assert {file: file.read_bytes() for file in out.rglob("step-*.pt")} == files
    return rows


def test_demo_trains_every_stage_once_and_says_what_came_of_it(tmp_path, monkeypatch, capsys):
    """The same runs in the same order, each as small as can be; the last follows a denoiser."""
    trained = []
    tiny = experiments_tiny()
    sides = {}
    for side, runs_of in experiments.COMPARISONS["demo"].items():
        sides[side] = {name: tiny[name.split("-")[0]] for name in runs_of}
    sides["CM-Func"]["cm"] = tiny["cm"] | {"init": "cm-denoiser", "distil": "cm-denoiser"}
    call = experiments.train

    def told(stage, cfg, out, device):
        trained.append((stage, out.name, getattr(cfg, "distil", "")))
        return call(stage, cfg, out, device)

    monkeypatch.setattr(experiments, "train", told)
    out = tmp_path / "demo"
    rows = experiments_twice("demo", sides, out, monkeypatch)
    denoiser = str(out / "CM-Func-seed0/cm-denoiser")
    assert trained[:5] == [("ae", "ae", ""), ("ldm", "ldm", ""), ("pretrain", "pretrain", ""),
                           ("cm", "cm-denoiser", ""), ("cm", "cm", denoiser)]
    distance = {side: row["colour distance"][0] for side, row in rows.items()}
    assert distance["other pictures 16px"] < min(distance["INFD"], distance["CM-Func"])
    assert {"PSNR 16px", "PSNR 32px", "PSNR 64px"} <= set(rows["INFD"])
    assert 8 < rows["INFD"]["PSNR 16px"][0] < 30 and "FD-squeeze" in rows["CM-Func"]
    sheets = [Image.open(max(run.glob("grid-*.png"))).size
              for run in (out / "INFD-seed0/ldm", out / "CM-Func-seed0/cm")]
    side = max(max(sheets))
    with Image.open(out / "demo.png") as sheet:                      # the two last sheets
        assert sheet.size == (2 * side + 4, side)
    assert "colour distance" in capsys.readouterr().out


def test_every_comparison_is_of_equal_steps_and_pictures(tmp_path, monkeypatch):
    """Where it is no demo; and every run of every table has known options and a working network."""
    made = []

    def planned(stage, cfg, out, device):
        made.append((stage, cfg))
        raise FileExistsError

    monkeypatch.setattr(experiments, "train", planned)
    for name, sides in experiments.COMPARISONS.items():
        last = []
        for side, parts in sides.items():
            assert re.fullmatch(r"[\w-]+", side)                     # it names a folder
            for run, texts in itertools.product(parts, ([], ["steps=70"])):
                alone = {run: parts[run]}                            # the run alone, as the last
                with pytest.raises(FileExistsError):
                    experiments.train_side(alone, "synthetic", tmp_path, CPU, 3, texts)
                assert made[-1][1].seed == 3 and (made[-1][1].steps == 70 or not texts)
            stage, cfg = made[-2]                                    # of the last run, as it stands
            last.append((stage, cfg))
            if stage == "cm":
                net = train.STAGES["cm"](replace(cfg, init="", distil=""), CPU).net
                assert sum(p.numel() for p in net.parameters()) > 1e5
                assert ("pretrain" in parts) == (cfg.init != "none")
        assert len(sides) > 1 or name == "convolutional"             # one model, drawn in two ways
        if name != "demo":
            assert len({(stage, cfg.steps, cfg.batch, cfg.lr) for stage, cfg in last}) == 1
            assert len({repr(cfg) for _, cfg in last}) == len(sides) - (name == "latent")


@slow
def test_comparison_of_renderers(tmp_path, monkeypatch, capsys):
    """Two seeds, steps from outside, scores at twice the training size too."""
    call = experiments.compare
    ae = experiments_tiny()["ae"] | {"disc.ndf": 8, "max_size": 64}
    sides = {"clif": {"ae": ae}, "liif": {"ae": ae | {"ae.renderer": "liif"}}}
    rows = experiments_twice("renderer", sides, tmp_path, monkeypatch, seeds=2, texts=["steps=3"])
    row = rows["liif"]
    assert all(len(values) == 2 for values in row.values()) and row["step"] == [3, 3]
    run = tmp_path / "liif-seed1/ae"
    scores = json.loads((run / "eval.json").read_text())
    assert row["PSNR 32px"][1] == scores["2x"]["psnr_render"] != row["PSNR 32px"][0]
    net = models.load(run).autoencoder
    assert row["parameters"][0] == sum(p.numel() for p in net.parameters())
    capsys.readouterr()
    monkeypatch.setattr(experiments, "compare", lambda *args: call(*args, n=8))
    words = ["compare", "renderer", "steps=3", "seeds=2", "--out", str(tmp_path), "--device", "cpu"]
    assert experiments.main(words) == 0
    out = capsys.readouterr().out
    assert "PSNR 128px" in out and f"{row['parameters'][0]:.5g} +- 0 " in out


@slow
def test_comparison_of_convolutional_sampling_draws_one_model_twice_its_size(tmp_path, monkeypatch):
    tiny = experiments_tiny()
    sides = {"model": {"ae": tiny["ae"] | {"disc.ndf": 8}, "ldm": tiny["ldm"]}}
    rows = experiments_twice("convolutional", sides, tmp_path, monkeypatch)
    assert rows["CLIF"].keys() == rows["larger noise map"].keys() >= {"colour distance"}
    assert "colour distance" not in rows["model"] and "other pictures 32px" in rows
    with Image.open(tmp_path / "convolutional.png") as sheet:
        assert sheet.height == 2 * 32 + 4                    # a row each, at twice 16 px


def test_colour_moments_have_a_closed_form_and_a_table_shows_means_and_gaps():
    """Two pictures of one colour each: the mean is between them, the covariance of two points."""
    images = torch.tensor([0.5, -0.5])[:, None, None, None].expand(2, 3, 8, 8)
    mean, cov = experiments.colour_moments(images)
    assert torch.equal(mean, torch.zeros(48)) and torch.allclose(cov, torch.full((48, 48), 0.5))
    text = experiments.as_table({"a": {"x": [1.0, 2.0]}, "longer": {"x": [3], "y": 123456.0}})
    assert text.splitlines() == ["                  x           y",
                                 "     a  1.5 +- 0.71           -",
                                 "longer            3  1.2346e+05"]


@pytest.mark.parametrize("words, said", [
    ("compare", "there is no comparison ; there are: demo, renderer, downsampling, mix, latent"),
    ("compare convolutional", "name some by --data"),
    ("compare generators lrr=1", "stage cm has no option lrr"),
    ("compare generators seeds=two", "option seeds=two: expected a whole number"),
    ("bench cmm", "there is no stage cmm; there are: ae, ldm, pretrain, cm"),
    ("bench ldm", "stage ldm needs an autoencoder"),
    ("bench ae --preset huge", "stage ae has no preset huge"),
    ("bench sample none.pt", "none.pt"),
    ("plot none", "has 0 lines"),
    (f"agreement {ROOT}/weights/infd.pt --device cpu", "infd.pt does not read text")])
def test_experiments_refuse_what_they_cannot_do(tmp_path, capsys, words, said):
    out = ["--out", str(tmp_path / "runs")] if words.startswith("compare") else []
    assert experiments.main([*words.split(), *out]) == 2
    assert said in main_error(capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words, said", [
    ("demo steps=5", "steps=5: demo does not read that"),
    ("demo --repeat 3 --quick", "--repeat, --quick: demo does not read that"),
    ("agreement a.pt b.pt", "b.pt: agreement does not read that"),
    ("plot a --data b", "--data: plot does not read that"),
    ("bench sample --preset paper", "--preset: bench sample does not read that"),
    ("bench pretrain --out b.png", "--out: bench does not read that"),
    ("bench pretrain --repeat -3", "--repeat -3: once at least"),
    ("bench cm latents=a", "leave latents= out"),
    ("bench curves --out b", "--out b: name a picture"),
    ("compare renderer ae.renderer=liif", "ae.renderer=: that is what the sides differ in"),
    ("compare renderer seed=7", "seed=: write --data for all runs of all sides, and seeds=N"),
    ("compare latent data=a", "data=: write --data"),
    ("compare mix --data a", "of data of its own: leave --data out"),
    ("compare renderer seeds=0", "seeds=0: one at least"),
    ("compare renderer --preset paper", "--preset: compare does not read that")])
def test_experiments_say_what_they_do_not_read(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert experiments.main(words.split()) == 2
    assert said in main_error(capsys)
    assert not any(tmp_path.iterdir())



def experiments_bench(capsys, *args):
    """The rows that a benchmark printed, by name."""
    capsys.readouterr()
    assert experiments.main(["bench", *map(str, args)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    return {line.pop("name"): line for line in lines}


@pytest.mark.parametrize("stage", ["ae", "ldm", "pretrain", "cm"])
def test_stage_bench_measures_a_training_step(main_runs, tmp_path, monkeypatch, capsys, stage):
    """Work and rates agree with one another, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    args = {"ae": [*TINY_AE, *TINY_GAN, "gan_start=5"], "pretrain": TINY_PRETRAIN, "cm": TINY_CM,
            "ldm": [*TINY_LDM, f"init={main_runs / 'ae'}"]}[stage]
    rows = experiments_bench(capsys, stage, "--repeat", 1, *args)
    row = rows["func" if stage == "cm" else stage]
    batch = 4 if stage in ("pretrain", "cm") else 2
    assert row["images_per_s"] == pytest.approx(1000 / row["ms"] * batch)
    assert row["tflop_per_s"] == pytest.approx(row["gflop"] / row["ms"])
    assert row["gflop"] > 0 and row["parameters"] > 0 and row["of_ceiling"] > 0
    assert 0 <= row["data_wait"] < 5 and row["compile_s"] >= 0 and row["peak_gb"] >= 0
    assert not list(tmp_path.iterdir())


def test_stage_bench_counts_the_work_of_a_known_product(monkeypatch):
    """2 n^3 for a product of n x n matrices, by a clock for which every call takes 2 s."""
    class Clock:
        def __init__(self, *_, **__):
            pass

        def timeit(self, n):
            return types.SimpleNamespace(mean=2.0)

    monkeypatch.setattr(experiments, "Timer", Clock)
    a = torch.ones(64, 64)
    row = experiments.cost(lambda: a @ a, 4, 3, CPU)
    assert (row["ms"], row["images_per_s"], row["gflop"]) == (2000, 2, 2 * 64**3 / 1e9)
    assert row["tflop_per_s"] == pytest.approx(64**3 / 1e12)
    assert row["of_ceiling"] == pytest.approx((64 / 1536)**3)


@slow
def test_stage_cm_bench_compares_generators_by_their_pictures_at_three_sizes(capsys, monkeypatch):
    """One function for all three, or a network for each; Section 4.3 counts all of it."""
    drawn = []
    call = experiments.draw_some

    def told(model, sizes, n):
        made = call(model, sizes, n)
        drawn.append([image.shape[-1] for image in made])
        return made

    monkeypatch.setattr(experiments, "draw_some", told)
    args = [*TINY_CM, *TINY_NETS, "batch=2", "size=32", "generator=func,dit,unet"]
    rows = experiments_bench(capsys, "cm", "--repeat", 1, *args)
    assert list(rows) == ["func", "dit", "unet"]
    assert all(row["multi_res_fps"] > 0 for row in rows.values())
    calls = len(drawn) // 7                                      # one of func, three each of others
    assert drawn == [[32, 64, 128]] * calls + [[32], [64], [128]] * 2 * calls


@slow
def test_sample_bench_times_pictures_of_any_model(main_runs, stage_runs, capsys):
    files = [stage_runs / "cm", stage_runs / "cm-unet", main_runs / "ldm"]
    rows = experiments_bench(capsys, "sample", "--repeat", 1, *files)
    sizes = [f"{name} {size}px" for name in ("cm", "cm-unet", "ldm") for size in (16, 64, 256)]
    assert list(rows) == [*sizes[:6], "ldm sample", *sizes[6:]]
    assert rows["cm 256px"]["gflop"] > rows["cm 64px"]["gflop"] > 0


TINY_ALL = [*dict.fromkeys([*TINY_AE, *TINY_GAN, *TINY_LDM, *TINY_CM, *TINY_NETS, "batch=2"])]


@slow
def test_bench_all_needs_no_run_and_quick_measures_one_way(capsys, monkeypatch, tmp_path):
    """Every stage gets those options that it has, and stage ldm an autoencoder to start from."""
    def told(what, preset, data_name, texts, n, device):
        made = train.STAGES[what](train.configure(what, preset, data_name, texts), device)
        yield what, {"repeat": n, "graphs": made.cfg.compile == "graphs",
                     "NCHW": made.cfg.channels_last == "false"}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "bench", told)
    monkeypatch.setattr(experiments, "cost", lambda call, *rest: {"ms": call().ndim})
    drawn = {f"untrained {size}px": {"device": "cpu", "ms": 4} for size in (16, 64, 256)}
    for args, ways, n in ((["--quick"], [""], 5), ([], ["", " NCHW", " graphs", " eager"], 20)):
        rows = experiments_bench(capsys, "all", *args, *TINY_ALL)
        names = [f"{stage}{way}" for stage in ("ae", "ldm", "pretrain", "cm") for way in ways]
        assert list(rows) == [*names, *drawn] and rows.items() >= drawn.items()
        assert all(rows[name]["repeat"] == n for name in names)
    assert rows["cm graphs"]["graphs"] and rows["ae NCHW"]["NCHW"] and not rows["cm"]["NCHW"]
    assert not list(tmp_path.iterdir())


@slow
@pytest.mark.parametrize("dtype, gap", [("fp32", 0), ("bf16", 0.2)])
def test_bench_curves_lays_losses_beside_exact_ones(capsys, tmp_path, dtype, gap):
    """In fp32 on a CPU they are the same; in bf16 close."""
    out = tmp_path / "new" / "curves.png"
    args = "--repeat", 4, "--out", out, *TINY_ALL, f"dtype={dtype}"
    rows = experiments_bench(capsys, "curves", *args)
    assert list(rows) == ["ae", "ldm", "pretrain", "cm"]
    for row in rows.values():
        assert len(row["here"]) == len(row["exact"]) == 4
        assert (0 < row["gap"] < gap) if gap else row["gap"] == 0
    assert Image.open(out).height == 4 * experiments.PANEL[1]


def test_a_gpu_is_busy_while_any_kernel_runs():
    assert experiments.covered([(0, 4), (1, 2), (3, 6), (6, 7), (9, 10)]) == 8


def test_agreement_reads_captions_and_counts_what_pictures_show():
    """One that knows is right of all captions, and of another's as often as both say the same."""
    captions = [Landscapes("val").caption(i) for i in range(40)]
    answers = torch.tensor([experiments.attributes(caption) for caption in captions])
    assert experiments.attributes("snow-capped mountains by day in autumn, a clear sky, a lake") \
        == [1, 2, 1, 1, 0]
    assert answers[:, 0].tolist() == [i % 4 for i in range(40)]
    with pytest.raises(ValueError, match="it says no time: a cat"):
        experiments.attributes("a cat")

    def knows(images):
        return [F.one_hot(column, 4).float() for column in answers.T]

    images = torch.zeros(40, 3, 64, 64)
    assert set(experiments.shares(knows, images, captions).values()) == {1.0}
    other = captions[1:] + captions[:1]
    want = (answers == answers.roll(-1, 0)).float().mean(dim=0)
    field_equal(torch.tensor([*experiments.shares(knows, images, other).values()][:5]), want)


def test_agreement_asks_of_true_scenes_and_of_every_way_to_draw(onestep_text, monkeypatch):
    """Of pictures by the captions of held-out scenes, and by those of their neighbours."""
    asked = []
    monkeypatch.setattr(experiments, "read_scenes", lambda *_: None)
    monkeypatch.setattr(experiments, "shares", lambda net, *both: asked.append(both) or {})
    rows = experiments.agreement(str(onestep_text), 18, CPU)
    assert list(rows) == ["true scenes", "true scenes, another's caption", "one step",
                          "one step, another's prompt", "two steps", "two steps, another's prompt"]
    captions = [Landscapes("val").caption(i) for i in range(18)]
    assert [told for _, told in asked] == 3 * [captions, captions[1:] + captions[:1]]
    model = models.load(onestep_text)
    close(asked[2][0], model.decode(model.sample(range(18), steps=1, prompts=captions)).draw(64))
    assert all(asked[i][0] is asked[i + 1][0] for i in (0, 2, 4))


def test_a_reader_of_scenes_learns_the_time_of_day():
    """An answer for every attribute, that of the light right after eight steps."""
    net = experiments.read_scenes(64, 8, CPU)
    source = data.open_data("synthetic", "val")
    images = stages.drawn_at([source[i] for i in range(16)], 64)
    assert [h.shape for h in net(images)] == [(16, n) for n in (4, 4, 4, 2, 3)]
    assert experiments.shares(net, images, [source.caption(i) for i in range(16)])["time"] > 0.6


def test_plot_draws_a_panel_for_every_column_of_the_log(tmp_path, capsys):
    """A line from corner to corner; the best held-out score; a line that a kill cut short."""
    lines = [{"step": 10 * i, "loss": 2.0 + i, "held_out_psnr": 20.0 - (i - 3)**2, "reg": 10.0**i}
             for i in range(1, 6)]
    log = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60, "lo'
    (tmp_path / "log.jsonl").write_text(log)
    assert experiments.main(["plot", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'plot.png'}\n"
    with Image.open(tmp_path / "plot.png") as image:
        page = np.asarray(image)
    width, height = experiments.PANEL
    assert page.shape == (3 * height, width, 3)
    red = (page == (0xc0, 0x30, 0x20)).all(axis=-1)
    assert red[:height].any()
    y, x = np.nonzero(red[height:2 * height])                    # loss: straight, 3 to 7
    step = (width - experiments.LEFT - experiments.RIGHT) / 50
    fit = np.polyfit(x, y, 1)
    assert fit[0] == pytest.approx(-(height - experiments.TOP - experiments.BOTTOM) / (40 * step),
                                   rel=0.02)
    y, x = np.nonzero(red[2 * height:])                          # reg: straight on its log axis
    assert np.polyfit(x, y, 1) == pytest.approx(fit, rel=0.05)


@pytest.mark.parametrize("program", [train, sample, data, metrics, experiments])
def test_help_of_every_program_fits_a_screen_and_names_every_option(capsys, program):
    def shown(*args):
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            assert program.main(["--help", *args]) == 0
        return capsys.readouterr().out

    brief = shown()
    assert len(brief.splitlines()) <= 40 and max(map(len, brief.splitlines())) <= 100
    if program is experiments:
        assert all(name in brief for name in experiments.COMPARISONS)
    if program is not sample:
        return
    parser = sample.parser()
    flags = [action.option_strings[-1] for action in parser._actions]
    assert set(flags) <= set(re.findall(r"--[a-z-]+", brief))
    everything = shown("all")
    assert all(re.search(rf"^  .*{flag} ", everything, re.MULTILINE) for flag in flags)
    assert "--sigmas SIGMAS" in shown("cm") and "--res" not in shown("cm")
    assert sample.main(["--help", "gan"]) == 2
    assert main_error(capsys) == "error: --help gan: there are all, view, given, infd, text, cm"


@pytest.mark.parametrize("program, words, said", [
    (sample, "--n", "argument -n/--n: expected one argument"),
    (metrics, "fid a b --sise 3", "no option --sise; did you mean --size"),
    (metrics, "psnr a b size=64", "size=64: write --size 64"),
    (metrics, "", "required: metric, samples"),
    (data, "prepare a b", "required: --size"),
    (experiments, "demos", "invalid choice: 'demos'"),
    (experiments, "bench ae --steps 3", "bench measures --repeat N"),
    (train, "--stage", "argument --stage: expected one argument")])
def test_every_program_answers_a_mistake_in_one_line(capsys, program, words, said):
    assert program.main(words.split()) == 2
    assert said in main_error(capsys)


# ==================================================================================================
# The house and the README: all files
# ==================================================================================================


README = (ROOT / "README.md").read_text()
MODULES = sorted(p.stem for p in ROOT.glob("*.py") if not p.stem.startswith("test"))


def house_tree(module):
    return ast.parse((ROOT / f"{module}.py").read_text())


@pytest.mark.parametrize("module", MODULES)
def test_house_modules_are_read_in_one_sitting_and_importing_them_does_nothing(module):
    """At module level: imports, definitions, constants, docstrings, and the call of main."""
    lines = (ROOT / f"{module}.py").read_text().splitlines()
    assert len(lines) <= 750
    wide = [n for n, line in enumerate(lines, 1) if len(line) > 100]
    assert len(wide) <= len(lines) / 100, f"{module}.py: lines over 100 columns: {wide}"
    tree = house_tree(module)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{module}.{node.name} has {length} lines"
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in tree.body:
        main = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert main or text or isinstance(node, kinds), f"{module}.py:{node.lineno} runs something"


def test_house_imports_go_one_way():
    needs = {}
    for module in MODULES:
        needs[module] = set()
        for node in ast.walk(house_tree(module)):
            if isinstance(node, ast.Import):
                needs[module] |= {alias.name for alias in node.names} & set(MODULES)
            elif isinstance(node, ast.ImportFrom):
                needs[module] |= {node.module} & set(MODULES)
    built = set()
    while len(built) < len(MODULES):
        ready = {m for m in MODULES if m not in built and needs[m] <= built}
        assert ready, f"a circle of imports among {sorted(set(MODULES) - built)}"
        built |= ready


def test_readme_is_a_landing_page_whose_map_names_what_there_is():
    assert len(README.splitlines()) <= 220
    rows = re.findall(r"`(\w+)\.(\w+)`", README.split("## From paper to code")[1])
    assert len(rows) > 25
    for module, symbol in rows:
        defined = {getattr(node, "name", "") for node in house_tree(module).body}
        assert symbol in defined, f"{module}.py does not define {symbol}"


PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md"))),
         "weights/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_readme_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def readme_command(line):
    """Parse one command of a page by the program's own parser; True where it is one of ours."""
    script, *words = shlex.split(line)
    if script == "train.py":
        parsed = train.parser().parse_intermixed_args(words)
        here = [word for word in parsed.options if not word.endswith(".safetensors")]
        train.configure(parsed.stage, parsed.preset, parsed.data, here)
    elif script == "sample.py":
        sample.parser().read(words)
    elif script == "experiments.py":
        experiments.parser().parse_intermixed_args(words)
    elif script == "metrics.py":
        metrics.parser().read(words)
    return script in ("train.py", "sample.py", "experiments.py", "metrics.py")


@pytest.mark.parametrize("page", PAGES)
def test_readme_commands_parse(page):
    text = (ROOT / page).read_text()
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.M | re.S))
    commands = re.findall(r"(?:^|&& )python (.*?)(?: +#.*| &&|$)", blocks, re.M)
    commands += re.findall(r"`python ((?:train|sample|experiments)\.py [^`]*)`", text)
    commands += re.findall(r"`python (metrics\.py [\w,]+ [^`]+)`", text)
    commands += re.findall(r"^torchrun --nproc-per-node \d (.*)$", blocks, re.M)
    known = [readme_command(line) for line in commands if "--help" not in line]
    assert sum(known) >= {"README.md": 10, "docs/training.md": 1}.get(page, 2)


def test_torchrun_hands_on_what_the_readme_gives_it():
    """It looks through all words for beginnings of its own options, even behind the script."""
    lines = re.findall(r"^torchrun (.*)$", README, re.M)
    assert len(lines) >= 2
    for words in map(str.split, lines):
        parsed = torch.distributed.run.get_args_parser().parse_args(words)
        assert parsed.nproc_per_node == "8"
        assert [parsed.training_script, *parsed.training_script_args] == words[2:]
    assert sample.parser().parse_args(["-n", "3"]).n == sample.parser().parse_args(["--n", "3"]).n


def test_readme_python_runs_as_it_stands(monkeypatch, tmp_path, capsys):
    """Five examples of at most 20 lines, each block a program of its own, of small networks."""
    configure = train.configure
    small = {"ae": TINY_AE, "cm": TINY_CM}

    def configured(stage, preset, texts):
        return configure(stage, preset, texts=[*small[stage], "log_every=10", *texts])

    monkeypatch.setattr(train, "configure", configured)
    monkeypatch.chdir(tmp_path)
    Path("weights").symlink_to(ROOT / "weights")
    shutil.copy(ROOT / "assets/top.jpg", "photo.jpg")
    drawing, training = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    examples = re.split(r"^# (?=\d\.)", f"{drawing}\n{training}", flags=re.M)[1:]
    assert [text[0] for text in examples] == list("12345")
    assert all(len(text.strip().splitlines()) <= 20 for text in examples)

    names = {}
    exec(drawing, names)
    assert names["small"].shape == (2, 3, 64, 64) and names["wide"].shape == (2, 3, 96, 192)
    with Image.open("zoom.gif") as film:
        assert film.n_frames == 20 and film.size == (96, 96)
    deep = names["field"].draw(24, (-0.125, -0.125, 0.125, 0.125))       # a slice of the whole
    torch.testing.assert_close(deep, names["field"].draw(192)[..., 84:108, 84:108], atol=1e-4,
                               rtol=0)
    with Image.open("photo.jpg") as image:
        square = data.Photo("photo", lambda: data.to_rgb(image)).draw(256)
    assert metrics.psnr(names["photo"].clamp(-1, 1), data.to_tensor(square)[None]).item() > 20

    names = {}
    exec(training, names)
    assert [len(main_log(f"runs/mine/{name}")) for name in ("ae", "sharper", "cm")] == [1, 1, 1]
    assert "own" in main_log("runs/mine/sharper")[0] and "l1" in main_log("runs/mine/ae")[0]
    assert "100 pictures of Pictures" in capsys.readouterr().out


def test_training_page_explains_every_column_of_a_log(main_runs, stage_runs):
    page = (ROOT / "docs/training.md").read_text()
    explained = set(re.findall(r"`(\w+)`", page.split("| column |")[1].split("## Names")[0]))
    seen = {"own", "lpips", "gan", "gan_weight", "disc", "logits_real", "logits_fake", "skipped"}
    for run in (main_runs / "ae", main_runs / "ldm", stage_runs / "pretrain", stage_runs / "cm"):
        for line in (run / "log.jsonl").read_text().splitlines():
            seen |= json.loads(line).keys()
    for schedule in (Schedule(), ICT(), ECT()):
        seen |= schedule.log(0, 10).keys()
    assert seen - {"step"} <= explained
