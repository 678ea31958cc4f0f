"""Consistency training: a denoiser that answers alike along a trajectory samples in one step.
CM-Func Section 3.1 and Appendices A.1, B, D.3.1, after Song et al. 2023; noise levels of EDM.
Next: inr_generator.py for the network F that answers with a function; train.py for the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import guided


# ---- what f is ----

@dataclass(frozen=True)
class ConsistencyConfig:
    """What f is: its noise levels and scalings, whatever schedule it is trained by."""

    sigma_min: float = 0.002     # Section 4.1
    sigma_max: float = 80.0      # Section 4.1
    sigma_data: float = 0.5      # Appendix A.1
    rho: float = 7.0             # Appendix A.1
    boundary: bool = True        # Appendix A.1: shifted so that f(x, sigma_min) = x; False: EDM's

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max <= 1e6 and min(self.sigma_data, self.rho) > 0):
            raise ValueError(f"need 0 < sigma_min < sigma_max <= 1e6, sigma_data and rho above 0, "
                             f"not {self}")

    def karras_sigmas(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """The grid of n noise levels, (n,), from sigma_max down; Appendix A.1 counts upwards."""
        high = self.sigma_max ** (1 / self.rho)
        low = self.sigma_min ** (1 / self.rho)
        return torch.linspace(high, low, n, dtype=torch.float64).pow(self.rho).float().to(device)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in of Eq. (2), each like sigma (A.1; c_in: published code only)."""
        shift = self.sigma_min if self.boundary else 0.0
        total = (sigma**2 + self.sigma_data**2).sqrt()
        c_skip = self.sigma_data**2 / ((sigma - shift) ** 2 + self.sigma_data**2)
        c_out = self.sigma_data * (sigma - shift) / total
        return c_skip, c_out, 1 / total


# ---- schedules: which noise levels are tied to one another ----
# k is the training step and K the planned number; a short run that should follow the head of a
# longer schedule passes the longer K. levels: the student's t and the target's r < t, (batch,).
# mu: decay of the teacher, theta^- <- mu theta^- + (1 - mu) theta, after the step; where it is
# always 0 the student is its own target. weight: (B,), of each sample's loss.

@dataclass(frozen=True)
class Schedule:
    """The paper's: pairs of neighbours on a grid of noise levels that gets finer (Appendix A.1)."""

    s0: int = 2                  # Appendix A.1, points of the grid at the first step
    s1: int = 150                # Appendix A.1, its intervals at the last
    mu0: float = 0.95            # left open; published code, 0.9 for CIFAR-10; 0: no teacher
    printed_mu: bool = False     # mu(k) as Song et al. print it, not as the published code has it

    def __post_init__(self) -> None:
        if not (1 <= self.s0 <= self.s1 and 0 <= self.mu0 < 1):
            raise ValueError(f"need 1 <= s0 <= s1 and 0 <= mu0 < 1, not {self}")

    def N(self, k: int, K: int) -> int:
        """Points of the grid ("sub-intervals" in the paper, whose formula grows on beyond K)."""
        root = math.sqrt(k / K * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2)
        return min(max(math.ceil(root - 1), 1), self.s1) + 1             # N(k), Appendix A.1

    def mu(self, k: int, K: int) -> float:
        """Left open. Song et al. print N(k) where both published codes have N(k) - 1."""
        parts = self.N(k, K) if self.printed_mu else self.N(k, K) - 1
        return self.mu0 ** (self.s0 / parts)                             # exp(s0 ln mu0 / parts)

    def levels(self, k: int, K: int, batch: int, generator: torch.Generator,
               cfg: ConsistencyConfig) -> tuple[Tensor, Tensor]:
        sigmas = cfg.karras_sigmas(self.N(k, K), generator.device)       # (N,), falling
        index = torch.randint(len(sigmas) - 1, (batch,), generator=generator, device=sigmas.device)
        return sigmas[index], sigmas[index + 1]

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        return torch.ones_like(t)                        # left open; 1 in the published CT code

    def log(self, k: int, K: int) -> dict[str, float]:
        return {"N": float(self.N(k, K)), "mu": self.mu(k, K)}


@dataclass(frozen=True)
class ICT:
    """Improved consistency training (Song & Dhariwal 2023): no teacher, no LPIPS, doubling grid."""

    s0: int = 10                 # intervals of the grid at the first step
    s1: int = 1280               # at the last step
    P_mean: float = -1.1         # mean of ln sigma
    P_std: float = 2.0           # standard deviation of ln sigma

    def __post_init__(self) -> None:
        if not (1 <= self.s0 <= self.s1 and self.P_std > 0):
            raise ValueError(f"need 1 <= s0 <= s1 and P_std > 0, not {self}")

    def N(self, k: int, K: int) -> int:
        """Points of the grid: its intervals double from s0 to s1 in equal stages."""
        length = max(1, K // (int(math.log2(self.s1 // self.s0)) + 1))   # steps per stage
        return min(self.s0 * 2 ** min(k // length, 32), self.s1) + 1

    def mu(self, k: int, K: int) -> float:
        return 0.0

    def levels(self, k: int, K: int, batch: int, generator: torch.Generator,
               cfg: ConsistencyConfig) -> tuple[Tensor, Tensor]:
        sigmas = cfg.karras_sigmas(self.N(k, K), generator.device)       # (N,), falling
        mass = torch.erf((sigmas.double().log() - self.P_mean) / (math.sqrt(2) * self.P_std))
        chance = mass[:-1] - mass[1:]                                    # of each pair, (N - 1,)
        index = torch.multinomial(chance, batch, replacement=True, generator=generator)
        return sigmas[index], sigmas[index + 1]

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        return 1 / (t - r)           # thousands at small levels; pseudo_huber has a bounded slope

    def log(self, k: int, K: int) -> dict[str, float]:
        return {"N": float(self.N(k, K))}


@dataclass(frozen=True)
class ECT:
    """Easy consistency tuning (Geng et al. 2024), of sigma_min 0.003 and EDM's scalings."""

    stages: int = 8              # equal parts of the run, in which r goes from near 0 to near t
    q: float = 2.0               # the gap t - r shrinks by this factor per stage
    k: float = 8.0               # how much wider the gap is at small t; 0: a constant fraction of t
    b: float = 1.0               # how fast that widening fades with t
    P_mean: float = -1.1         # mean of ln t
    P_std: float = 2.0           # standard deviation of ln t
    gap_weight: bool = True      # weight 1 / (t - r); False: 1
    mu0: float = 0.0             # beyond ECT: constant decay of a teacher; 0: none

    def __post_init__(self) -> None:
        if self.stages < 1 or not 0 <= self.mu0 < 1 or self.q <= 1 or min(self.k, self.P_std) < 0:
            raise ValueError(f"need 1 <= stages, 0 <= mu0 < 1, q > 1, k and P_std >= 0, not {self}")

    def stage(self, k: int, K: int) -> int:
        """Stage at step k of K, from 0; the last one goes on beyond K."""
        return min(k * self.stages // K, self.stages - 1)

    def tightened(self, t: Tensor, stage: int) -> Tensor:
        """The level r in [0, t) that level t is tied to in a stage; 0 is the clean image."""
        widen = 1 + self.k * torch.sigmoid(-self.b * t)
        return (t * (1 - widen / self.q ** (stage + 1))).clamp(min=0)

    def mu(self, k: int, K: int) -> float:
        return self.mu0

    def levels(self, k: int, K: int, batch: int, generator: torch.Generator,
               cfg: ConsistencyConfig) -> tuple[Tensor, Tensor]:
        noise = torch.randn(batch, generator=generator, device=generator.device)
        t = torch.exp(self.P_mean + self.P_std * noise)
        return t, self.tightened(t, self.stage(k, K))

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        return 1 / (t - r) if self.gap_weight else torch.ones_like(t)

    def log(self, k: int, K: int) -> dict[str, float]:
        return {"stage": float(self.stage(k, K))}


# ---- the model and its loss ----

def per_image(value: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to multiply images."""
    return value[:, None, None, None]


def noise_condition(sigma: Tensor) -> Tensor:
    """What F is told about sigma (B,), left open; published code has ln(sigma + 1e-44)."""
    return 250 * sigma.float().log()


class ConsistencyModel(nn.Module):
    """f(x, sigma) = c_skip x + c_out F(c_in x, sigma): the image, x itself at sigma_min."""

    def __init__(self, net: nn.Module, cfg: ConsistencyConfig):
        super().__init__()
        self.net = net       # F(x, t, y, **extra), which must reach [-2, 2]: c_out is at most 1/2
        self.cfg = cfg

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None = None, **extra: Tensor) -> Tensor:
        """Noisy x (B, 3, H, W), sigma (B,), classes y (B,) -> (B, 3, H, W); `extra` goes to F."""
        c_skip, c_out, c_in = (per_image(c) for c in self.cfg.scalings(sigma))   # (B, 1, 1, 1)
        out = self.net(c_in * x, noise_condition(sigma), y, **extra).float()     # (B, 3, H, W)
        return c_skip * x + c_out * out                                          # Eq. (2)

    def function(self, x: Tensor, sigma: Tensor, y: Tensor | None = None):
        """c_out F as an ImageFunction; c_skip x, 0.003 at sigma_max, is left out (D.3.1)."""
        if not hasattr(self.net, "function"):
            raise ValueError(f"{type(self.net).__name__} makes pixels, not functions")
        _, c_out, c_in = self.cfg.scalings(sigma)
        return self.net.function(per_image(c_in) * x, noise_condition(sigma), y).scaled(c_out)


class LatentConsistency(ConsistencyModel):
    """f of latents of unit variance whose F is made of the UNet of a diffusion: one-step INFD.

    With sigma_data 1 and EDM's scalings c_in x is x_t at the timestep of equal sigma, and F is
    -v = (sigma_t x_t - eps) / alpha_t (Salimans & Ho 2022). INFD's alpha ends at 0.005, by which
    an error of eps is divided; F as made here leaves a large sigma the mean of the latents, 0, to
    learn from, and up to sigma 5 it is the UNet's own.
    """

    gain = math.sqrt(1 + 5.0**2)     # 1 / alpha at sigma 5

    def __init__(self, net: nn.Module, cfg: ConsistencyConfig, log_sigma: Tensor):
        """log_sigma (steps,), rising: ln(sigma_t / alpha_t) of the diffusion's timesteps."""
        super().__init__(net, cfg)
        if cfg.sigma_data != 1 or cfg.boundary:
            raise ValueError("latents need cm.sigma_data=1 and cm.boundary=false")
        self.register_buffer("log_sigma", log_sigma.float(), persistent=False)

    def time(self, sigma: Tensor) -> Tensor:
        """The diffusion's time, 0 to its last and also between two, of noise level sigma (B,)."""
        table = self.log_sigma
        level = sigma.float().log().clamp(table[0], table[-1])           # (B,)
        k = torch.searchsorted(table, level).clamp(min=1)                # (B,)
        return k - (table[k] - level) / (table[k] - table[k - 1])

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None = None,
                context: Tensor | None = None) -> Tensor:
        """Noisy x (B, C, h, w), sigma (B,), of a class or a text (B, N, D) -> latents like x."""
        c_skip, c_out, c_in = (per_image(c) for c in self.cfg.scalings(sigma))   # (B, 1, 1, 1)
        x_t = c_in * x                                                           # (B, C, h, w)
        eps = self.net(x_t, self.time(sigma), y, context).float()                # (B, C, h, w)
        out = (1 / c_in).clamp(max=self.gain) * (c_out * x_t - eps)              # -v
        return c_skip * x + c_out * out                                          # Eq. (2)


class Guided(nn.Module):
    """A denoiser led to its condition, D_u + w (D_c - D_u), whose paths a student learns: it then
    follows a text as closely in one call, without guidance (Meng et al. 2023).
    """

    def __init__(self, denoiser: LatentConsistency, scale: float,
                 null_context: Tensor | None = None):
        """scale: w. null_context (1, N, D): of the empty caption; without one, the null class."""
        super().__init__()
        self.denoiser = denoiser
        self.scale = scale
        self.null_class = denoiser.net.cfg.num_classes if null_context is None else None
        self.register_buffer("null_context", null_context, persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None = None,
                context: Tensor | None = None) -> Tensor:
        """As `LatentConsistency.forward`, by two calls in one batch."""
        led = guided(self.denoiser, self.scale, context, self.null_context, self.null_class)
        return led(x, sigma, y)


def euler_step(denoiser: nn.Module, x: Tensor, t: Tensor, r: Tensor, y: Tensor | None = None,
               **told: Tensor) -> Tensor:
    """Follow dx/dsigma = (x - D) / sigma from t (B,) to r < t by one step; r = 0: to D."""
    return x + per_image((r - t) / t) * (x - denoiser(x, t, y, **told))


def heun_step(denoiser: nn.Module, x: Tensor, t: Tensor, r: Tensor, y: Tensor | None = None,
              **told: Tensor) -> Tensor:
    """As `euler_step`, of second order: by the mean of the slopes at both ends."""
    gap = per_image(r - t)
    slope = (x - denoiser(x, t, y, **told)) / per_image(t)
    ahead = x + gap * slope                                          # Euler
    level = r.clamp(min=1e-6)
    there = (ahead - denoiser(ahead, level, y, **told)) / per_image(level)
    return torch.where(per_image(r) == 0, ahead, x + gap * (slope + there) / 2)


def consistency_loss(f: nn.Module, target: nn.Module | None, x: Tensor, noise: Tensor, t: Tensor,
                     r: Tensor, metric: Callable, y: Tensor | None = None,
                     denoiser: nn.Module | None = None, context: Tensor | None = None,
                     solver: Callable = heun_step, **extra: Tensor) -> Tensor:
    """The loss of consistency training: d(f(x + t z, t), target(x + r z, r)) of each image, (B,).

    x (B, 3, H, W) clean images, or latents; noise z like x; t > r >= 0 (B,), where r = 0 is the
    clean image: if all are, f learns to denoise and target may be None.
    `extra`, shifted coordinates, goes to both: separate draws would leave a floor under the loss.
    y, context: what f, target and denoiser are told, classes (B,) or a text (B, N, D).
    denoiser: distillation (Song et al. 2023, Algorithm 2) along its paths, by steps of `solver`;
    x + r z is on them in the mean only.
    """
    told = {} if context is None else {"context": context}
    noisy = x + per_image(t) * noise                                     # (B, 3, H, W)
    student = f(noisy, t, y, **told, **extra)                            # (B, 3, H, W)
    answer = x
    if target is not None:
        with torch.no_grad():
            start = x + per_image(r) * noise                             # (B, 3, H, W)
            if denoiser is not None:
                start = solver(denoiser, noisy, t, r, y, **told)
            there = target(start, r.clamp(min=1e-6), y, **told, **extra)
            answer = torch.where(per_image(r > 0), there, x)

    with torch.autocast(x.device.type, enabled=False):                   # never in bf16
        return metric(student.float(), answer.float())                   # Eq. (5)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference per image, (B,)."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """sqrt(||a - b||^2 + c^2) - c of the whole image, (B,); iCT's c = 0.00054 sqrt(3 H W)."""
    if c is None:
        c = 0.00054 * math.sqrt(a[0].numel())
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c


class ResizedLPIPS(nn.Module):
    """The paper's metric: LPIPS of both images, bilinearly resized to 224 px (Appendix A.1).

    lpips: a frozen module (a, b) -> one distance per image; it is copied. average_pool: left open;
    the published PyTorch code replaces the max pooling of the VGG. A size below 224 is cheaper.
    l2_weight, not in the paper: of `l2`, which holds the colours that LPIPS alone hardly sees.
    """

    def __init__(self, lpips: nn.Module, average_pool: bool = True, size: int = 224,
                 l2_weight: float = 0.0):
        super().__init__()
        self.lpips = deepcopy(lpips)
        self.size = (size, size)
        self.l2_weight = l2_weight
        for parent in list(self.lpips.modules()) if average_pool else []:
            for name, child in parent.named_children():
                if isinstance(child, nn.MaxPool2d):
                    pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding,
                                        child.ceil_mode)
                    setattr(parent, name, pool)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B,)."""
        large = (F.interpolate(image, self.size, mode="bilinear") for image in (a, b))
        d = self.lpips(*large).flatten()                                 # (B,)
        return d + self.l2_weight * l2(a, b) if self.l2_weight else d


# ---- sampling and evaluation ----

@torch.no_grad()
def sample_onestep(f: ConsistencyModel, noise: Tensor, y: Tensor | None = None) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1] from standard normal noise of the same shape, in one step."""
    return sample_multistep(f, [noise], [f.cfg.sigma_max], y)


@torch.no_grad()
def sample_multistep(f: ConsistencyModel, noises: Sequence[Tensor], sigmas: Sequence[float],
                     y: Tensor | None = None, clip: bool = True, limit: float = 1.0,
                     cfg: ConsistencyConfig | None = None) -> Tensor:
    """Images (B, 3, S, S), or latents, by denoising, adding less noise, denoising again, and so on.

    Song et al. 2023. sigmas: falling; noises: one (B, 3, S, S) each. clip: also before the last
    step. limit: of the values; math.inf for latents. cfg: by default f's. ECT adds sigma z where
    this adds sqrt(sigma^2 - sigma_min^2) z.
    """
    cfg = cfg or f.cfg
    x = float(sigmas[0]) * noises[0]
    image = f(x, x.new_full((len(x),), float(sigmas[0])), y)             # (B, 3, S, S)
    for noise, sigma in zip(noises[1:], sigmas[1:], strict=True):
        image = image.clamp(-limit, limit) if clip else image
        sigma = max(float(sigma), cfg.sigma_min)
        x = image + math.sqrt(sigma**2 - cfg.sigma_min**2) * noise
        image = f(x, x.new_full((len(x),), sigma), y)
    return image.clamp(-limit, limit)


@torch.no_grad()
def sample_function(f: ConsistencyModel, noise: Tensor, y: Tensor | None = None):
    """An ImageFunction of B images, for any resolution, from noise (B, 3, S, S) in one step."""
    return f.function(f.cfg.sigma_max * noise, noise.new_full((len(noise),), f.cfg.sigma_max), y)


@torch.no_grad()
def denoising_distance(f: ConsistencyModel, x: Tensor, noise: Tensor, y: Tensor | None = None,
                       n: int = 18, **extra: Tensor) -> tuple[Tensor, Tensor]:
    """Total denoising distance |f(x + sigma z, sigma) - x| along an n-point grid of noise levels.

    Section 4.1 and Appendix B. Returns (sigmas, distances), each (n,). Norm, average and grid are
    left open: here the L2 norm of the whole image, averaged over the batch.
    """
    sigmas = f.cfg.karras_sigmas(n, x.device)
    distances = []
    for sigma in sigmas:
        image = f(x + sigma * noise, sigma.expand(len(x)), y, **extra)   # (B, 3, H, W)
        distances.append((image - x).flatten(1).norm(dim=1).mean())
    return sigmas, torch.stack(distances)
