"""The neural field autoencoder: image -> latent z -> feature field phi -> image at any coordinates.
Paper: Image Neural Field Diffusion Models (INFD), supplementary J.1; encoder and decoder are LDM's, f4.
Read next: ldm.py, which generates z; clif.py holds the renderer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from clif import CLIF, LIIF, CLIFConfig, LIIFConfig, ResBlock, Window, render


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of encoder, latent, decoder and renderer; the defaults are the published FFHQ model (J.1)."""

    ch: int = 128                     # base channels, a multiple of groups (supplementary J.1)
    ch_mult: tuple[int, ...] = (1, 2, 4)    # width of each level in units of ch (supplementary J.1)
    num_res_blocks: int = 2           # per encoder level; the decoder has one more (published code)
    z_channels: int = 3               # channels of the latent (supplementary J.1)
    kl: bool = False                  # Gaussian latent with a KL loss in place of vector quantisation
    kl_logvar: float = 0.0            # added to its log-variance at the start; 0, as published, is noise of about 1,
                                      # in which most channels of a short training drown: see the presets
    lowres: bool = False              # z is the picture itself at size/f, not learned: the baseline of supplementary C,
                                      # Table 1 ("LR-DM + SR"), where decoder and renderer are left a super-resolution
    n_embed: int = 8192               # codes in the codebook (LDM VQ-f4)
    vq_beta: float = 0.25             # weight inside the quantisation loss (published code)
    renderer: str = "clif"            # clif, or liif, the baseline of supplementary A
    hidden: int = 256                 # width of the renderer (published code)
    num_blocks: int = 2               # residual blocks of CLIF (supplementary J.1)
    groups: int = 32                  # of every GroupNorm (published code); with one channel a group, levels are lost

    def __post_init__(self):
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))     # a checkpoint may hold a list
        if self.renderer not in ("clif", "liif"):
            raise ValueError(f"renderer {self.renderer!r}: choose clif or liif")
        if self.lowres and (self.kl or self.z_channels != 3):
            raise ValueError("lowres=true: z is a picture, which goes with z_channels=3 and kl=false")
        widths = {"ch": [self.ch * m for m in self.ch_mult], "hidden": [self.hidden] * (self.renderer == "clif")}
        for name, values in widths.items():
            if any(v < 1 or v % self.groups for v in values):
                raise ValueError(f"{name} gives {values} channels; GroupNorm needs multiples of groups={self.groups}")

    @property
    def f(self) -> int:
        """Downsampling factor from image to latent: 4 for three levels, there is none after the last."""
        return 2 ** (len(self.ch_mult) - 1)


# ---- Encoder and decoder ----
# Module names are LDM's (down, mid, up, ...), so that published checkpoints map key by key. The paper calls the two
# symmetric, without attention; the published networks, followed here, have three residual blocks per decoder level
# and self-attention between the middle blocks.

class Attention(nn.Module):
    """x + self-attention over all positions with a single head."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))    # (B, 1, h*w, C)
        h = F.scaled_dot_product_attention(q, k, v)                  # (B, 1, h*w, C)
        return x + self.proj_out(h[:, 0].mT.unflatten(2, x.shape[2:]))        # (B, C, h, w)


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2) by a strided convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))                     # right and bottom only, as in LDM; (h/2, w/2)


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2h, 2w): nearest neighbour, then a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (2h, 2w)


def _blocks(c_in: int, c_out: int, n: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(n)])


def _middle(c: int, groups: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(block_1=ResBlock(c, c, groups), attn_1=Attention(c, groups),
                                     block_2=ResBlock(c, c, groups)))


class Encoder(nn.Module):
    """E: image -> the latent before quantisation, or mean and log-variance of the KL variant."""

    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        c_out = 2 * cfg.z_channels if cfg.kl else cfg.z_channels
        self.conv_in = nn.Conv2d(3, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c, width) in enumerate(zip([cfg.ch, *widths], widths)):
            level = nn.ModuleDict({"block": _blocks(c, width, cfg.num_res_blocks, cfg.groups)})
            if i < len(widths) - 1:                                  # "after each level" but the last
                level["downsample"] = Downsample(width)
            self.down.append(level)
        self.mid = _middle(widths[-1], cfg.groups)
        self.norm_out = nn.GroupNorm(cfg.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)
        self.quant_conv = nn.Conv2d(c_out, c_out, 1)                 # published as encoder.1, the rest as encoder.0
        if cfg.kl:
            self.quant_conv.bias.data[cfg.z_channels:] += cfg.kl_logvar

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [-1, 1], sides multiples of f -> (B, z_channels, H/f, W/f); KL: twice the channels."""
        x = self.conv_in(image)                                      # (B, ch, H, W)
        for level in self.down:
            for block in level["block"]:
                x = block(x)                                         # (B, width, h, w)
            if "downsample" in level:
                x = level["downsample"](x)                           # (B, width, h/2, w/2)
        x = self.mid(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))       # (B, c_out, H/f, W/f)


class Decoder(nn.Module):
    """D: quantised latent -> feature field phi. It ends at LDM's last features: the renderer takes the place of the
    final norm and convolution to RGB."""

    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)   # published as decoder.0, rest decoder.1
        self.conv_in = nn.Conv2d(cfg.z_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], cfg.groups)
        levels = []
        for i, (c, width) in enumerate(zip([*widths[1:], widths[-1]], widths)):
            level = nn.ModuleDict({"block": _blocks(c, width, cfg.num_res_blocks + 1, cfg.groups)})
            if i > 0:
                level["upsample"] = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(levels)                              # up[0] is the finest level and runs last

    def forward(self, z: Tensor) -> Tensor:
        """z (B, z_channels, h, w) -> phi (B, ch * ch_mult[0], f*h, f*w)."""
        x = self.mid(self.conv_in(self.post_quant_conv(z)))          # (B, widths[-1], h, w)
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)                                         # (B, width, h, w)
            if "upsample" in level:
                x = level["upsample"](x)                             # (B, width, 2h, 2w)
        return x


# ---- Regularising the latent ----

class VectorQuantizer(nn.Module):
    """Replace each latent vector by the nearest of `n_embed` learned codes; gradients pass straight through.

    loss = |sg(z_q) - z|^2 + beta |z_q - sg(z)|^2, averaged over all elements: the weight beta is on the codebook, as
    in the published model. VQ-VAE has it on the other term, which `legacy=False` gives. The value is the same, the
    gradients are not.
    """

    def __init__(self, n_embed: int, dim: int, beta: float = 0.25, legacy: bool = True):
        super().__init__()
        self.beta, self.legacy = beta, legacy
        self.embedding = nn.Embedding(n_embed, dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> indices of the nearest codes (B*h*w,), in the order b, h, w."""
        flat = z.movedim(1, -1).flatten(0, -2).float()               # (B*h*w, C)
        codes = self.embedding.weight.float()                        # (n_embed, C)
        # |z - e|^2 without |z|^2, which is the same for every code: a single (B*h*w, n_embed) matrix.
        with torch.autocast(z.device.type, enabled=False):           # bf16 would confuse near codes
            return torch.addmm(codes.square().sum(dim=1), flat, codes.T, alpha=-2).argmin(dim=1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> codes (B, C, h, w)."""
        return self.embedding(indices).movedim(-1, 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, C, h, w) -> (z_q (B, C, h, w), loss, indices (B*h*w,))."""
        B, _, h, w = z.shape
        indices = self.nearest(z)
        z_q = self.lookup(indices.view(B, h, w))
        commitment, codebook = F.mse_loss(z, z_q.detach()), F.mse_loss(z_q, z.detach())
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        return z + (z_q - z).detach(), loss, indices                 # the value of z_q, the gradient of z


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2C, h, w) -> mean and log-variance, (B, C, h, w) each; the latter within [-30, 20]."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) per image (B,), summed over its latent."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


# ---- The autoencoder ----

class FieldAutoencoder(nn.Module):
    """E, VQ (or KL), D and R: an image becomes a latent z, and z a function from coordinates to colours.

    With lowres, E is the mean of f x f pixels, and nothing regularises z.
    """

    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = nn.AvgPool2d(cfg.f) if cfg.lowres else Encoder(cfg)
        self.quantizer = None if cfg.kl or cfg.lowres else VectorQuantizer(cfg.n_embed, cfg.z_channels, cfg.vq_beta)
        self.decoder = Decoder(cfg)
        c_phi = cfg.ch * cfg.ch_mult[0]
        self.renderer = (CLIF(CLIFConfig(c_phi, cfg.hidden, cfg.num_blocks, cfg.groups)) if cfg.renderer == "clif"
                         else LIIF(LIIFConfig(c_phi, cfg.hidden)))

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> z (B, C, H/f, W/f), before quantisation and unscaled: what diffusion learns.

        KL: mean + std * noise, with noise (B, C, H/f, W/f) from N(0, 1), or the mean without noise.
        Raises ValueError if H or W is not a multiple of f.
        """
        return self._encode(image, noise)[0]

    def _encode(self, image: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """z, and the KL variant's loss, 0 where nothing is to be regularised, None where the quantiser knows it."""
        H, W = image.shape[-2:]
        if H % self.cfg.f or W % self.cfg.f:
            raise ValueError(f"image of {H}x{W} pixels: both sides must be multiples of {self.cfg.f}")
        z = self.encoder(image)                                      # (B, C, H/f, W/f), or 2C channels
        if not self.cfg.kl:
            return z, z.new_zeros(()) if self.cfg.lowres else None
        mean, logvar = split_moments(z)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return z, kl_loss(mean, logvar).mean()

    def quantize(self, z: Tensor) -> Tensor:
        """The latent the decoder gets: the nearest codes, with the gradient of z; without VQ, z as it is."""
        return z if self.quantizer is None else self.quantizer(z)[0]

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w), not yet quantised -> phi (B, ch * ch_mult[0], f*h, f*w)."""
        return self.decoder(self.quantize(z))

    def render(self, phi: Tensor, res: int | tuple[int, int], window: Window | None = None, tile: int = 256,
               norm: str = "paper") -> Tensor:
        """phi -> picture (B, 3, H, W), without gradients; see `clif.render_tiles` for the arguments."""
        return render(self.renderer, phi, res, window, tile, norm)

    def forward(self, image: Tensor, coord: Tensor, cell: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One training pass: image (B, 3, H, W), coord (B, P, Q, 2), cell (B, 2) -> (rgb (B, 3, P, Q), VQ or KL loss).

        `noise` as in `encode`. The KL loss is a mean over the batch of sums over the latent, so its weight in the total
        must be tiny: LDM has 1e-6; the published default of 1 belongs to VQ.
        """
        z, reg = self._encode(image, noise)
        if self.quantizer is not None:
            z, reg, _ = self.quantizer(z)
        return self.renderer(self.decoder(z), coord, cell), reg


# ---- The adversary ----

@dataclass(frozen=True)
class DiscriminatorConfig:
    """Width and depth of the PatchGAN discriminator."""

    ndf: int = 64                     # channels of the first layer (published code)
    n_layers: int = 3                 # layers with stride 2; 3 sees 70 pixels (pix2pix)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, as published (nn.SyncBatchNorm, which has no CPU version)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, h, w)."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        world = dist.get_world_size()
        local = torch.stack([x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))])     # (2, C)
        mean, square = all_reduce(local) / world
        var = square - mean.square()
        n = world * x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class PatchDiscriminator(nn.Module):
    """The PatchGAN of pix2pix: one real-or-fake logit per overlapping patch of the picture."""

    def __init__(self, cfg: DiscriminatorConfig):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, cfg.ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        c = cfg.ndf
        for n in range(1, cfg.n_layers + 1):
            width = cfg.ndf * min(2**n, 8)
            stride = 2 if n < cfg.n_layers else 1
            layers += [nn.Conv2d(c, width, 4, stride=stride, padding=1, bias=False),
                       BatchNorm(width), nn.LeakyReLU(0.2)]
            c = width
        self.main = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, padding=1))
        for layer in self.main:                                      # pix2pix; biases keep PyTorch's default
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, BatchNorm):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) -> logits (B, 1, h, w); 256 px give 30x30. Batch norm runs in the mode of the module."""
        return self.main(image)


def hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """What the discriminator minimises; the generator minimises -mean(logits_fake)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def adaptive_weight(nll: Tensor, g_loss: Tensor, last_weight: Tensor,
                    average: Callable = lambda grads: grads) -> Tensor:
    """lambda = |grad nll| / (|grad g_loss| + 1e-4), at most 1e4: equal pull of both losses on the last layer's weight.

    Detached; the graphs of both losses stay alive for the backward pass that follows. average: takes the means of the
    gradients over several processes, which then agree on lambda.
    """
    g_nll, = torch.autograd.grad(nll, last_weight, retain_graph=True)
    g_gan, = torch.autograd.grad(g_loss, last_weight, retain_graph=True)
    g_nll, g_gan = average([g_nll, g_gan])
    return (g_nll.norm() / (g_gan.norm() + 1e-4)).clamp(0.0, 1e4).detach()
