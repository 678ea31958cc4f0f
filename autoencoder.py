"""The neural field autoencoder: image -> latent z -> feature field phi -> image at any coordinates.
Paper: Image Neural Field Diffusion Models (INFD), supplementary J.1; E and D are LDM's, f4.
Read next: ldm.py, which generates z; clif.py holds the renderer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clif import (CLIF, LIIF, CLIFConfig, Field, LIIFConfig, Norm, ResBlock, nearest,
                  own_statistics)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of encoder, latent, decoder and renderer; the defaults are the FFHQ model."""

    ch: int = 128                     # base channels, a multiple of groups (J.1)
    ch_mult: tuple[int, ...] = (1, 2, 4)      # width of each level in units of ch (J.1)
    num_res_blocks: int = 2           # per encoder level; the decoder has one more (published code)
    z_channels: int = 3               # channels of the latent (J.1)
    kl: bool = False                  # Gaussian latent with a KL loss, no vector quantisation
    kl_logvar: float = 0.0            # added to its log-variance; at 0 short runs lose channels
    lowres: bool = False              # z is the picture at size/f (C, Table 1, "LR-DM + SR")
    n_embed: int = 8192               # codes in the codebook (LDM VQ-f4)
    vq_beta: float = 0.25             # weight inside the quantisation loss (published code)
    renderer: str = "clif"            # or liif, the baseline of supplementary A, or pixels, LDM's
    hidden: int = 256                 # width of the renderer (published code)
    num_blocks: int = 2               # residual blocks of CLIF (J.1)
    groups: int = 32                  # of every GroupNorm; one channel a group loses its level

    def __post_init__(self):
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))     # a checkpoint may hold a list
        if self.renderer not in ("clif", "liif", "pixels"):
            raise ValueError(f"renderer {self.renderer!r}: choose clif or liif (or pixels, LDM's)")
        if self.lowres and (self.kl or self.z_channels != 3):
            raise ValueError("lowres=true: a picture goes with z_channels=3 and kl=false")
        if min(len(self.ch_mult), self.num_res_blocks, self.z_channels, self.n_embed) < 1:
            raise ValueError(f"levels in ch_mult, num_res_blocks, z_channels and n_embed must be "
                             f"at least 1, not {self}")
        widths = [self.ch * m for m in self.ch_mult] + [self.hidden] * (self.renderer == "clif")
        if self.groups < 1 or any(width < 1 or width % self.groups for width in widths):
            raise ValueError(f"ch and hidden give {widths} channels; GroupNorm needs multiples of "
                             f"groups={self.groups}")

    @property
    def f(self) -> int:
        """Downsampling factor from image to latent: 4 for three levels."""
        return 2 ** (len(self.ch_mult) - 1)


# ---- Encoder and decoder ----
# Module names are LDM's, so that published checkpoints map key by key. The paper calls the two
# symmetric and names no attention; the published networks, followed here, have three residual
# blocks per decoder level and self-attention between the middle blocks.

class Attention(nn.Module):
    """Self-attention over all positions with a single head, added to its input."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)                                                      # (B, C, h, w)
        qkv = [layer(h).flatten(2).mT.contiguous()[:, None]                   # (B, 1, h*w, C) each,
               for layer in (self.q, self.k, self.v)]                # as the fused kernels want it
        h = F.scaled_dot_product_attention(*qkv)                              # (B, 1, h*w, C)
        return x + self.proj_out(h[:, 0].mT.unflatten(2, x.shape[2:]))        # (B, C, h, w)


def _blocks(c_in: int, c_out: int, n: int, groups: int) -> nn.ModuleList:
    widths = [c_in] + [c_out] * (n - 1)
    return nn.ModuleList([ResBlock(width, c_out, groups) for width in widths])


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
            if i < len(widths) - 1:                   # "after each level" (J.1) but the last
                level["downsample"] = nn.Sequential(OrderedDict(
                    pad=nn.ZeroPad2d((0, 1, 0, 1)),   # right and bottom only, as in LDM
                    conv=nn.Conv2d(width, width, 3, stride=2)))
            self.down.append(level)
        self.mid = _middle(widths[-1], cfg.groups)
        self.norm_out = nn.GroupNorm(cfg.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)
        self.quant_conv = nn.Conv2d(c_out, c_out, 1)  # published as encoder.1, the rest encoder.0
        if cfg.kl:
            self.quant_conv.bias.data[cfg.z_channels:] += cfg.kl_logvar

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) in [-1, 1], sides multiples of f -> z, or with KL its moments."""
        x = self.conv_in(image)                                               # (B, ch, H, W)
        for level in self.down:
            for block in level["block"]:
                x = block(x)                                                  # (B, width, h, w)
            if "downsample" in level:
                x = level["downsample"](x)                                    # (B, width, h/2, w/2)
        x = self.mid(x)                                                       # (B, width, H/f, W/f)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))       # (B, c_out, H/f, W/f)


class Decoder(nn.Module):
    """D: quantised latent -> feature field phi, LDM's features before the last norm."""

    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)   # decoder.0
        self.conv_in = nn.Conv2d(cfg.z_channels, widths[-1], 3, padding=1)    # the rest decoder.1
        self.mid = _middle(widths[-1], cfg.groups)
        self.up = nn.ModuleList()                     # up[0] is the finest level and runs last
        for i, (c, width) in enumerate(zip([*widths[1:], widths[-1]], widths)):
            level = nn.ModuleDict({"block": _blocks(c, width, cfg.num_res_blocks + 1, cfg.groups)})
            if i > 0:
                level["upsample"] = nn.Sequential(OrderedDict(
                    nearest=nn.Upsample(scale_factor=2.0, mode="nearest"),
                    conv=nn.Conv2d(width, width, 3, padding=1)))
            self.up.append(level)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, z_channels, h, w) -> phi (B, ch * ch_mult[0], f*h, f*w)."""
        x = self.conv_in(self.post_quant_conv(z))                             # (B, width, h, w)
        x = self.mid(x)                                                       # (B, width, h, w)
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)                                                  # (B, width, h, w)
            if "upsample" in level:
                x = level["upsample"](x)                                      # (B, width, 2h, 2w)
        return x


class PixelHead(nn.Module):
    """The end of LDM's own decoder as a renderer: colours at the resolution of phi only.

    So a published autoencoder draws as it is. At other resolutions each pixel has the colour of the
    nearest one.
    """

    reach = 0                         # colours are looked up one by one

    def __init__(self, c_phi: int, groups: int = 32):
        super().__init__()
        self.norm_out = nn.GroupNorm(groups, c_phi, eps=1e-6)
        self.conv_out = nn.Conv2d(c_phi, 3, 3, padding=1)

    @property
    def last_weight(self) -> nn.Parameter:
        return self.conv_out.weight

    def forward(self, phi: Tensor, coord: Tensor, cell: Tensor,
                norm: Norm = own_statistics) -> Tensor:
        """As `CLIF.forward`; cell and norm are not used, the statistics are those of phi."""
        rgb = self.conv_out(F.silu(self.norm_out(phi)))                       # (B, 3, h, w)
        return nearest(rgb, coord)                                            # (B, 3, H, W)


# ---- Regularising the latent ----

class VectorQuantizer(nn.Module):
    """Replace each latent vector by the nearest of `n_embed` learned codes.

    loss = |sg(z_q) - z|^2 + beta |z_q - sg(z)|^2, averaged over all elements, as published. VQ-VAE
    has beta on the other term: the codes then move faster, and z is held less.
    """

    def __init__(self, n_embed: int, dim: int, beta: float = 0.25):
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(n_embed, dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> indices of the nearest codes (B*h*w,)."""
        flat = z.movedim(1, -1).flatten(0, -2).float()                        # (B*h*w, C)
        codes = self.embedding.weight.float()                                 # (n_embed, C)
        # |z - e|^2 less |z|^2. No matrix product: TF32 and bf16 would confuse near codes.
        distance = codes.square().sum(dim=1).repeat(len(flat), 1)             # (B*h*w, n_embed)
        for z_c, e_c in zip(flat.T, codes.T):                                 # C is 3 or 4
            distance.addcmul_(z_c[:, None], e_c, value=-2)
        return distance.argmin(dim=1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, C, h, w) -> (z_q (B, C, h, w), loss, indices (B*h*w,))."""
        B, _, h, w = z.shape
        indices = self.nearest(z)                                             # (B*h*w,)
        z_q = self.embedding(indices.view(B, h, w)).movedim(-1, 1)            # (B, C, h, w)
        loss = F.mse_loss(z, z_q.detach()) + self.beta * F.mse_loss(z_q, z.detach())
        return z + (z_q - z).detach(), loss, indices  # the value of z_q with the gradient of z


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2C, h, w) -> mean and log-variance, (B, C, h, w) each; the latter within [-30, 20]."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) per image (B,), summed over its latent (B, C, h, w)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


# ---- The autoencoder ----

class FieldAutoencoder(nn.Module):
    """E, VQ (or KL), D and R: an image becomes a latent z, and z a function of coordinates."""

    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = nn.AvgPool2d(cfg.f) if cfg.lowres else Encoder(cfg)
        self.quantizer = None
        if not (cfg.kl or cfg.lowres):
            self.quantizer = VectorQuantizer(cfg.n_embed, cfg.z_channels, cfg.vq_beta)
        self.decoder = Decoder(cfg)
        c_phi = cfg.ch * cfg.ch_mult[0]
        if cfg.renderer == "clif":
            self.renderer = CLIF(CLIFConfig(c_phi, cfg.hidden, cfg.num_blocks, cfg.groups))
        elif cfg.renderer == "liif":
            self.renderer = LIIF(LIIFConfig(c_phi, cfg.hidden))
        else:
            self.renderer = PixelHead(c_phi, cfg.groups)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """The latent that diffusion learns: before quantisation, unscaled.

        image (B, 3, H, W) in [-1, 1] -> z (B, C, H/f, W/f). KL: mean + std * noise, N(0, 1) of z's
        shape, or the mean without noise. Raises ValueError unless f divides H and W.
        """
        return self._encode(image, noise)[0]

    def _encode(self, image: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """z and the KL loss, without KL 0."""
        H, W = image.shape[-2:]
        if H % self.cfg.f or W % self.cfg.f:
            raise ValueError(f"image of {H}x{W} pixels: sides must be multiples of {self.cfg.f}")
        z = self.encoder(image)                                               # (B, C, H/f, W/f)
        if not self.cfg.kl:
            return z, z.new_zeros(())
        mean, logvar = split_moments(z)                                       # (B, C, H/f, W/f)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return z, kl_loss(mean, logvar).mean()

    def quantize(self, z: Tensor) -> Tensor:
        """The latent the decoder gets: the nearest codes, with the gradient of z; without VQ, z."""
        return z if self.quantizer is None else self.quantizer(z)[0]

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w), not yet quantised -> phi (B, ch * ch_mult[0], f*h, f*w)."""
        return self.decoder(self.quantize(z))

    @torch.no_grad()
    def field(self, z: Tensor, tile: int = 256, paper: bool = False) -> Field:
        """z (B, C, h, w), not yet quantised -> the pictures it stands for, see `clif.Field`."""
        return Field(self.renderer, self.decode(z), tile, paper)

    def forward(self, image: Tensor, coord: Tensor, cell: Tensor,
                noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One training pass: (rgb (B, 3, P, Q), VQ or KL loss).

        image (B, 3, H, W), coord (B, P, Q, 2), cell (B, 2); `noise` as in `encode`. The KL loss
        sums over the latent, so its weight must be tiny: LDM has 1e-6, the published 1 is for VQ.
        """
        z, reg = self._encode(image, noise)                                   # (B, C, H/f, W/f)
        if self.quantizer is not None:
            z, reg, _ = self.quantizer(z)                                     # (B, C, H/f, W/f)
        return self.renderer(self.decoder(z), coord, cell), reg               # (B, 3, P, Q)


# ---- The adversary ----

@dataclass(frozen=True)
class DiscriminatorConfig:
    """Width and depth of the PatchGAN discriminator."""

    ndf: int = 64                     # channels of the first layer (published code)
    n_layers: int = 3                 # layers with stride 2; 3 sees 70 pixels (pix2pix)

    def __post_init__(self):
        if min(self.ndf, self.n_layers) < 1:
            raise ValueError(f"ndf and n_layers must be at least 1, not {self}")


class PatchDiscriminator(nn.Module):
    """The PatchGAN of pix2pix: one real-or-fake logit per overlapping patch of the picture."""

    def __init__(self, cfg: DiscriminatorConfig):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, cfg.ndf, 4, stride=2, padding=1),
                                   nn.LeakyReLU(0.2)]
        c = cfg.ndf
        for n in range(1, cfg.n_layers + 1):
            width = cfg.ndf * min(2**n, 8)
            stride = 2 if n < cfg.n_layers else 1
            layers += [nn.Conv2d(c, width, 4, stride=stride, padding=1, bias=False),
                       nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
            c = width
        self.main = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, padding=1))

        for layer in self.main:                       # pix2pix; biases keep PyTorch's default
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) -> logits (B, 1, h, w); 256 px give 30x30."""
        return self.main(image)


def hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """What the discriminator minimises; the generator minimises -mean(logits_fake)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def first_order(loss: Tensor, x: Tensor) -> Tensor:
    """Replace loss(x) by (dloss/dx).detach() * x, summed over x.

    It has the same gradient, not the same value, for everything before x, so that LPIPS and the
    discriminator are back-propagated once for both the adaptive weight and the step.
    """
    slope, = torch.autograd.grad(loss, x)
    return (slope * x).sum()


def adaptive_weight(nll: Tensor, g_loss: Tensor, last_weight: Tensor,
                    average: Callable[[list[Tensor]], list[Tensor]] | None = None) -> Tensor:
    """Balance the adversarial against the reconstruction loss (published code; VQGAN).

    lambda = |grad nll| / (|grad g_loss| + 1e-4), at most 1e4, both for the last layer's weight.
    Detached; the losses' graphs stay alive. average: the means of gradients over processes.
    """
    g_nll, = torch.autograd.grad(nll, last_weight, retain_graph=True)
    g_gan, = torch.autograd.grad(g_loss, last_weight, retain_graph=True)
    if average is not None:
        g_nll, g_gan = average([g_nll, g_gan])
    return (g_nll.norm() / (g_gan.norm() + 1e-4)).clamp(0.0, 1e4).detach()
