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

Metric = Callable[[Tensor, Tensor], Tensor]      # two batches of images (B, 3, H, W) -> (B,)


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
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be above 0 and below sigma_max "
                             f"{self.sigma_max}")

    def karras_sigmas(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """The grid of n noise levels, (n,), from sigma_max down to sigma_min.

        Karras et al. 2022, as in Appendix A.1, which counts upwards.
        """
        if n < 2:
            raise ValueError(f"a sigma grid needs at least 2 points, not {n}")
        high = self.sigma_max ** (1 / self.rho)
        low = self.sigma_min ** (1 / self.rho)
        return torch.linspace(high, low, n, dtype=torch.float64).pow(self.rho).float().to(device)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in of Eq. (2), each shaped like sigma (Appendix A.1).

        c_in is missing in the paper; it is in the published code, and acts on the input of F only.
        """
        shift = self.sigma_min if self.boundary else 0.0
        total = (sigma**2 + self.sigma_data**2).sqrt()
        c_skip = self.sigma_data**2 / ((sigma - shift) ** 2 + self.sigma_data**2)
        c_out = self.sigma_data * (sigma - shift) / total
        return c_skip, c_out, 1 / total


# ---- schedules: which noise levels are tied to one another ----
# k is the training step and K the planned number of steps. A short run that should follow the head
# of a longer schedule passes the longer K: the paper does not say which its ablations did.
# Each schedule has the same four methods:
#   levels   draws the student's levels t and the target's r < t, both (batch,), where cfg has them;
#   mu       decay of the teacher, theta^- <- mu theta^- + (1 - mu) theta, after step k. One that is
#            0 at every k has no teacher: the student is its own target;
#   weight   (B,), multiplies the loss of each sample;
#   log      where the schedule is at step k, for the run's log.

@dataclass(frozen=True)
class Schedule:
    """The paper's: pairs of neighbours on a grid of noise levels that gets finer (Appendix A.1)."""

    s0: int = 2                  # Appendix A.1, intervals of the grid at the first step
    s1: int = 150                # Appendix A.1, at the last step
    mu0: float = 0.95            # left open; published code, 0.9 for CIFAR-10; 0: no teacher
    printed_mu: bool = False     # mu(k) as Song et al. print it, not as the published code has it

    def __post_init__(self) -> None:
        if not 1 <= self.s0 <= self.s1:
            raise ValueError(f"s0 {self.s0} must be at least 1 and at most s1 {self.s1}")
        if not 0 <= self.mu0 < 1:
            raise ValueError(f"mu0 {self.mu0} must be in [0, 1); 0 turns the teacher EMA off")

    def N(self, k: int, K: int) -> int:
        """Points of the grid at step k of K, from s0 to s1 + 1.

        The paper calls N the number of sub-intervals, but its sigma_i runs over i in [1, N]: N
        points, N - 1 intervals. The printed formula grows on beyond K; here it stops.
        """
        root = math.sqrt(k / K * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2)
        return min(max(math.ceil(root - 1), 1), self.s1) + 1             # N(k), Appendix A.1

    def mu(self, k: int, K: int) -> float:
        """Decay of the teacher after step k of K, in [0, 1).

        The paper leaves it open. Song et al. print exp(s0 ln mu0 / N(k)); both published codes
        divide by N(k) - 1, which is what trained their models and what this does. After a few
        hundred steps the two agree to 0.001.
        """
        if self.mu0 == 0:
            return 0.0
        parts = self.N(k, K) if self.printed_mu else self.N(k, K) - 1
        return math.exp(self.s0 * math.log(self.mu0) / parts)

    def levels(self, k: int, K: int, batch: int, generator: torch.Generator,
               cfg: ConsistencyConfig) -> tuple[Tensor, Tensor]:
        sigmas = cfg.karras_sigmas(self.N(k, K), generator.device)       # (N,), falling
        index = torch.randint(len(sigmas) - 1, (batch,), generator=generator,
                              device=generator.device)
        return sigmas[index], sigmas[index + 1]

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        return torch.ones_like(t)                        # left open; 1 in the published CT code

    def log(self, k: int, K: int) -> dict[str, float]:
        return {"N": float(self.N(k, K)), "mu": self.mu(k, K)}


@dataclass(frozen=True)
class ICT:
    """Improved consistency training (Song & Dhariwal 2023): no teacher, no LPIPS, a doubling grid.

    The weight 1 / (t - r) reaches thousands at small levels; it is meant for `pseudo_huber`, whose
    slope is bounded.
    """

    s0: int = 10                 # intervals of the grid at the first step
    s1: int = 1280               # at the last step
    P_mean: float = -1.1         # mean of ln sigma
    P_std: float = 2.0           # standard deviation of ln sigma

    def __post_init__(self) -> None:
        if not 1 <= self.s0 <= self.s1:
            raise ValueError(f"s0 {self.s0} must be at least 1 and at most s1 {self.s1}")

    def N(self, k: int, K: int) -> int:
        """Points of the grid at step k of K: the intervals double from s0 to s1 in equal stages."""
        length = max(1, K // (int(math.log2(self.s1 // self.s0)) + 1))   # steps per stage
        return min(self.s0 * 2 ** min(k // length, 32), self.s1) + 1

    def mu(self, k: int, K: int) -> float:
        return 0.0

    def pair_probabilities(self, sigmas: Tensor) -> Tensor:
        """Chance (n - 1,) of each pair of neighbours on a grid (n,): log-normal mass between."""
        mass = torch.erf((sigmas.double().log() - self.P_mean) / (math.sqrt(2) * self.P_std))
        weight = mass[:-1] - mass[1:]
        return weight / weight.sum()

    def levels(self, k: int, K: int, batch: int, generator: torch.Generator,
               cfg: ConsistencyConfig) -> tuple[Tensor, Tensor]:
        sigmas = cfg.karras_sigmas(self.N(k, K), generator.device)       # (N,), falling
        index = torch.multinomial(self.pair_probabilities(sigmas), batch, replacement=True,
                                  generator=generator)
        return sigmas[index], sigmas[index + 1]

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        return 1 / (t - r)

    def log(self, k: int, K: int) -> dict[str, float]:
        return {"N": float(self.N(k, K))}


@dataclass(frozen=True)
class ECT:
    """Easy consistency tuning (Geng et al. 2024): t is continuous, and r approaches it in stages.

    It starts close to a plain denoiser (r = 0 for small t), without a teacher. It trains with EDM's
    scalings, `ECT_MODEL`; its published code evaluates with the boundary form at 0.003, which
    changes nothing visible at sigma_max.
    """

    stages: int = 8              # equal parts of the run
    q: float = 2.0               # the gap t - r shrinks by this factor per stage
    k: float = 8.0               # how much wider the gap is at small t; 0: a constant fraction of t
    b: float = 1.0               # how fast that widening fades with t
    P_mean: float = -1.1         # mean of ln t
    P_std: float = 2.0           # standard deviation of ln t
    gap_weight: bool = True      # weight 1 / (t - r); False: 1
    mu0: float = 0.0             # beyond ECT: constant decay of a teacher; 0: none

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise ValueError(f"stages is {self.stages}; ECT has at least 1")
        if not 0 <= self.mu0 < 1:
            raise ValueError(f"mu0 {self.mu0} must be in [0, 1); 0 turns the teacher EMA off")

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


ECT_MODEL = ConsistencyConfig(sigma_min=0.003, boundary=False)


# ---- the model and its loss ----

def per_image(value: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to multiply images."""
    return value[:, None, None, None]


def noise_condition(sigma: Tensor) -> Tensor:
    """What the network is told about sigma (B,) > 0: 250 ln(sigma), 1095.5 at 80, -1553.7 at 0.002.

    The paper leaves it open; this is the published code, less its 1e-44 inside the logarithm: that
    constant is a denormal, lost wherever these are flushed to zero. Nothing here calls a network at
    sigma = 0.
    """
    return 250 * sigma.float().log()


class ConsistencyModel(nn.Module):
    """f(x, sigma) = c_skip x + c_out F(c_in x, sigma), the denoised image, equal to x at sigma_min.

    F is any network called as net(x, t, y): UNet, DiT, UViT, or a FunctionGenerator, which also
    takes `coord`. At large sigma f is F / 2, so F must reach [-2, 2]: no generator squashes its
    output.
    """

    def __init__(self, net: nn.Module, cfg: ConsistencyConfig):
        super().__init__()
        self.net = net
        self.cfg = cfg

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None = None, **extra: Tensor) -> Tensor:
        """x (B, 3, H, W), clean plus sigma times noise; sigma (B,); y (B,) classes -> (B, 3, H, W).

        `extra` goes to the network.
        """
        c_skip, c_out, c_in = (per_image(c) for c in self.cfg.scalings(sigma))   # (B, 1, 1, 1)
        out = self.net(c_in * x, noise_condition(sigma), y, **extra).float()     # (B, 3, H, W)
        return c_skip * x + c_out * out                                          # Eq. (2)

    def function(self, x: Tensor, sigma: Tensor, y: Tensor | None = None):
        """c_out F as an ImageFunction: without c_skip x nothing ties the output to the size of x.

        At sigma_max the dropped term has a standard deviation of 0.003 (Appendix D.3.1). Raises
        ValueError where F makes pixels.
        """
        if not hasattr(self.net, "function"):
            raise ValueError(f"{type(self.net).__name__} makes pixels, not functions: it draws its "
                             f"training size only")
        _, c_out, c_in = self.cfg.scalings(sigma)
        function = self.net.function(per_image(c_in) * x, noise_condition(sigma), y)
        return function.scaled(c_out)                                            # D.3.1


def heun_step(denoiser: nn.Module, x: Tensor, t: Tensor, r: Tensor,
              y: Tensor | None = None) -> Tensor:
    """Follow the trajectory dx/dsigma = (x - D) / sigma from level t to r < t, by one step of Heun.

    denoiser D(x, sigma, y); x (B, 3, H, W); t, r (B,) -> (B, 3, H, W). At r = 0 the answer is
    D(x, t) (Karras et al. 2022, Algorithm 1).
    """
    gap = per_image(r - t)
    slope = (x - denoiser(x, t, y)) / per_image(t)
    ahead = x + gap * slope                                          # Euler
    level = r.clamp(min=1e-6)
    there = (ahead - denoiser(ahead, level, y)) / per_image(level)
    return torch.where(per_image(r) == 0, ahead, x + gap * (slope + there) / 2)


def consistency_loss(f: nn.Module, target: nn.Module, x: Tensor, noise: Tensor, t: Tensor,
                     r: Tensor, metric: Metric, y: Tensor | None = None,
                     denoiser: nn.Module | None = None, **extra: Tensor) -> Tensor:
    """The loss of consistency training: d(f(x + t z, t), target(x + r z, r)) of each image, (B,).

    x (B, 3, H, W) clean images; noise z like x, the same for both sides; t > r >= 0 (B,), where
    r = 0 stands for the clean image. `extra` (coordinates, with their random shifts) also goes to
    both: separate draws would leave a floor under the distance. No gradient enters `target`, which
    may be f itself (iCT, ECT).
    denoiser: beyond the paper, consistency distillation (Song et al. 2023, Algorithm 2). Its
    trajectory leads from x + t z to level r; x + r z lies on it only in the mean.
    """
    noisy = x + per_image(t) * noise                                     # (B, 3, H, W)
    student = f(noisy, t, y, **extra)
    answer = x
    tied = r > 0
    with torch.no_grad():
        if tied.any():                                                   # no: training a denoiser
            start = x + per_image(r) * noise
            if denoiser is not None:
                labels = None if y is None else y[tied]
                start[tied] = heun_step(denoiser, noisy[tied], t[tied], r[tied], labels)
            made = target(start, r.clamp(min=1e-6), y, **extra)
            answer = torch.where(per_image(tied), made, x)

    # The networks may run in bf16, the distance never.
    with torch.autocast(x.device.type, enabled=False):
        return metric(student.float(), answer.float())                   # Eq. (5)


# ---- metrics ----

def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference per image, (B,)."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """sqrt(||a - b||^2 + c^2) - c over the whole image, (B,); c = 0.00054 sqrt(3 H W) (iCT).

    The norm is that of the whole difference: elementwise, as many ports have it, is another loss.
    c = 0, the plain norm of ECT, has no gradient where a = b.
    """
    if c is None:
        c = 0.00054 * math.sqrt(a[0].numel())
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c


def lpips_resized(lpips: nn.Module, average_pool: bool = True, size: int = 224) -> Metric:
    """The paper's metric: LPIPS of both images, bilinearly resized to 224 px (Appendix A.1).

    lpips: a module (a, b in [-1, 1]) -> one distance per image, frozen, in eval mode; it is copied.
    average_pool: left open by the paper. The published PyTorch code replaces every max pooling of
    the VGG by average pooling; False keeps it, like the lpips package and the published JAX code.
    size: less than 224 is cheaper and another loss.
    """
    lpips = deepcopy(lpips)
    for parent in list(lpips.modules()) if average_pool else []:
        for name, child in parent.named_children():
            if isinstance(child, nn.MaxPool2d):
                pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(parent, name, pool)

    def resized(image: Tensor) -> Tensor:
        return F.interpolate(image, size=(size, size), mode="bilinear", align_corners=False)

    def metric(a: Tensor, b: Tensor) -> Tensor:
        return lpips(resized(a), resized(b)).flatten()                   # (B,)

    return metric


# ---- sampling and evaluation ----

def levels_like(x: Tensor, sigma: float) -> Tensor:
    """(B,) copies of one noise level."""
    return torch.full((len(x),), sigma, device=x.device)


@torch.no_grad()
def sample_onestep(f: ConsistencyModel, noise: Tensor, y: Tensor | None = None) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] from standard normal noise of the same shape, in one step.

    H and W are the training resolution.
    """
    return f(f.cfg.sigma_max * noise, levels_like(noise, f.cfg.sigma_max), y).clamp(-1, 1)


@torch.no_grad()
def sample_multistep(f: ConsistencyModel, noises: Sequence[Tensor], sigmas: Sequence[float],
                     y: Tensor | None = None, clip: bool = True) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] by denoising, adding less noise, denoising again, and so on.

    Song et al. 2023, multistep sampling. sigmas: decreasing levels, sigma_max first; noises: as
    many standard normals (B, 3, H, W). It keeps the skip term, so it works at the training
    resolution only. clip: clamp every denoised image, not only the last. Published second levels
    are points of a grid, e.g. karras_sigmas(40)[22] for CD and karras_sigmas(201)[106] for CT on
    ImageNet-64. ECT adds sigma z where this rule, the published one, adds
    sqrt(sigma^2 - sigma_min^2) z.
    """
    if len(noises) != len(sigmas):
        raise ValueError(f"{len(sigmas)} noise levels need as many noises, not {len(noises)}")
    x = f.cfg.sigma_max * noises[0]
    image = f(x, levels_like(x, float(sigmas[0])), y)
    for noise, sigma in zip(noises[1:], sigmas[1:]):
        image = image.clamp(-1, 1) if clip else image
        sigma = max(float(sigma), f.cfg.sigma_min)
        x = image + math.sqrt(sigma**2 - f.cfg.sigma_min**2) * noise
        image = f(x, levels_like(x, sigma), y)
    return image.clamp(-1, 1)


@torch.no_grad()
def sample_function(f: ConsistencyModel, noise: Tensor, y: Tensor | None = None):
    """An ImageFunction of B images, to be drawn at any resolution, in one step (Appendix D.3.1).

    noise (B, 3, H, W), standard normal, stays at the training resolution whatever is drawn. Colours
    are not clamped.
    """
    return f.function(f.cfg.sigma_max * noise, levels_like(noise, f.cfg.sigma_max), y)


@torch.no_grad()
def denoising_distance(f: ConsistencyModel, x: Tensor, noise: Tensor, y: Tensor | None = None,
                       n: int = 18) -> tuple[Tensor, Tensor]:
    """Total denoising distance |f(x + sigma z, sigma) - x| along an n-point grid of noise levels.

    Section 4.1 and Appendix B. Returns (sigmas, distances), each (n,). The paper leaves norm,
    average and grid open: here the L2 norm of the whole image, averaged over the batch; divided by
    sqrt(3 H W) it is the RMS per value.
    """
    sigmas = f.cfg.karras_sigmas(n, x.device)
    distances = []
    for sigma in sigmas:
        image = f(x + sigma * noise, sigma.expand(len(x)), y)            # (B, 3, H, W)
        distances.append((image - x).flatten(1).norm(dim=1).mean())
    return sigmas, torch.stack(distances)
