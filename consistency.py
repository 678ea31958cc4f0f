"""Consistency training: a denoiser whose answer is the same all along a diffusion trajectory, hence one step suffices.
CM-Func Section 3.1 and Appendices A.1, B, D.3.1, after Song et al. 2023; noise levels of Karras et al. 2022 (EDM).
Next: inr_generator.py for the network F that answers with an image function; train.py for the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Metric = Callable[[Tensor, Tensor], Tensor]      # two batches of images (B, 3, H, W) -> one distance each (B,)


# ---- noise levels and curricula ----

@dataclass(frozen=True)
class ConsistencyConfig:
    """The paper's setting by default; ICT and ECT below are the two later recipes.

    k is the training step and K the planned number of steps of the run throughout. A shortened run that should follow
    the head of a longer schedule passes the longer K: the paper does not say which its ablations did.
    """

    sigma_min: float = 0.002     # Section 4.1
    sigma_max: float = 80.0      # Section 4.1
    sigma_data: float = 0.5      # Appendix A.1
    rho: float = 7.0             # Appendix A.1
    boundary: bool = True        # Appendix A.1: c_skip and c_out shifted so that f(x, sigma_min) = x; False: EDM's own
    s0: int = 2                  # Appendix A.1, intervals of the sigma grid at the first step
    s1: int = 150                # Appendix A.1, at the last step
    mu0: float = 0.95            # left open by the paper: published code, 0.9 for CIFAR-10; 0: no teacher EMA at all
    printed_mu: bool = False     # mu(k) as Song et al. print it, instead of as the published code computes it
    metric: str = "lpips"        # Appendix A.1: "lpips" at 224 px; "l2" and "huber" need no download
    # Beyond the paper. iCT is Song & Dhariwal 2023, ECT is Geng et al. 2024.
    doubling: bool = False       # iCT: the grid doubles from s0 to s1 in equal stages
    lognormal: bool = False      # iCT: pairs of the grid drawn by a log-normal density, not uniformly
    gap_weight: bool = False     # iCT, ECT: weight 1 / (t - r); left open by the paper, 1 in the published CT code
    stages: int = 0              # ECT: above 0 t is continuous, and r tightens towards t in this many stages
    P_mean: float = -1.1         # iCT, ECT: mean of ln t
    P_std: float = 2.0           # iCT, ECT: standard deviation of ln t
    ect_q: float = 2.0           # ECT: the gap t - r shrinks by this factor per stage
    ect_k: float = 8.0           # ECT: how much wider the gap is at small t; 0: the same fraction everywhere
    ect_b: float = 1.0           # ECT: how fast that widening fades with t

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be above 0 and below sigma_max {self.sigma_max}")
        if not 1 <= self.s0 <= self.s1:
            raise ValueError(f"s0 {self.s0} must be at least 1 and at most s1 {self.s1}")
        if not 0 <= self.mu0 < 1:
            raise ValueError(f"mu0 {self.mu0} must be in [0, 1); 0 turns the teacher EMA off")
        if self.metric not in ("lpips", "l2", "huber"):
            raise ValueError(f"unknown metric {self.metric}; there are: lpips, l2, huber")

    def N(self, k: int, K: int) -> int:
        """Points of the sigma grid at step k of K, from s0 to s1 + 1 (Appendix A.1).

        The paper calls N the number of sub-intervals, but its sigma_i runs over i in [1, N]: N points, N - 1 intervals.
        """
        if self.doubling:
            length = max(1, K // (int(math.log2(self.s1 // self.s0)) + 1))               # steps per stage
            intervals = self.s0 * 2 ** min(k // length, 32)
        else:
            intervals = math.ceil(math.sqrt(k / K * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2) - 1)
        return min(max(intervals, 1), self.s1) + 1          # the printed formula grows on beyond K; we stop

    def mu(self, k: int, K: int) -> float:
        """Decay of the teacher theta^- <- mu theta^- + (1 - mu) theta after step k of K, in [0, 1).

        The paper leaves mu(k) open. Song et al. print exp(s0 ln mu0 / N(k)); both published codes divide by N(k) - 1,
        which is what trained their models and what we follow. After a few hundred steps the two agree to 0.001.
        """
        if self.mu0 == 0:
            return 0.0
        return math.exp(self.s0 * math.log(self.mu0) / (self.N(k, K) - (0 if self.printed_mu else 1)))

    def karras_sigmas(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """(n,) noise levels from sigma_max down to sigma_min (Appendix A.1, which counts upwards)."""
        if n < 2:
            raise ValueError(f"a sigma grid needs at least 2 points, not {n}")
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return torch.linspace(high, low, n, dtype=torch.float64).pow(self.rho).float().to(device)

    def pair_probabilities(self, sigmas: Tensor) -> Tensor:
        """(n - 1,) chance of each pair of neighbours on a grid (n,): the log-normal mass between them (iCT)."""
        mass = torch.erf((sigmas.double().log() - self.P_mean) / (math.sqrt(2) * self.P_std))
        weight = mass[:-1] - mass[1:]
        return weight / weight.sum()

    def stage(self, k: int, K: int) -> int:
        """Stage of ECT at step k of K; the last one goes on beyond K."""
        return min(k * self.stages // K, self.stages - 1)

    def tightened(self, t: Tensor, stage: int) -> Tensor:
        """The level r in [0, t) that level t is tied to in a stage of ECT; 0 ties it to the clean image."""
        widen = 1 + self.ect_k * torch.sigmoid(-self.ect_b * t)
        return (t * (1 - widen / self.ect_q ** (stage + 1))).clamp(min=0)

    def draw_levels(self, k: int, K: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(t, r), each (batch,): the student's and the target's noise levels at step k of K, t > r."""
        device = generator.device
        if self.stages:
            t = torch.exp(self.P_mean + self.P_std * torch.randn(batch, generator=generator, device=device))
            return t, self.tightened(t, self.stage(k, K))
        sigmas = self.karras_sigmas(self.N(k, K), device)
        if self.lognormal:
            index = torch.multinomial(self.pair_probabilities(sigmas), batch, replacement=True, generator=generator)
        else:
            index = torch.randint(len(sigmas) - 1, (batch,), generator=generator, device=device)
        return sigmas[index], sigmas[index + 1]

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        """(B,) weight of each sample in the loss."""
        return 1 / (t - r) if self.gap_weight else torch.ones_like(t)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in, shaped like sigma (Appendix A.1).

        c_in is missing in the paper; it is in the published code, and acts on the input of F only.
        """
        shift = self.sigma_min if self.boundary else 0.0
        total = (sigma**2 + self.sigma_data**2).sqrt()
        c_skip = self.sigma_data**2 / ((sigma - shift) ** 2 + self.sigma_data**2)
        return c_skip, self.sigma_data * (sigma - shift) / total, 1 / total


# Improved consistency training: the student's own weights as teacher, and no LPIPS. The weight 1 / (t - r) reaches
# thousands at small levels; it is meant for the bounded slope of pseudo-Huber.
ICT = ConsistencyConfig(s0=10, s1=1280, mu0=0.0, metric="huber", doubling=True, lognormal=True, gap_weight=True)

# Easy consistency tuning: starts close to a plain denoiser (r = 0 for small t) and tightens. It trains with EDM's
# scalings; its published code evaluates with the boundary form at 0.003, which changes nothing visible at sigma_max.
ECT = ConsistencyConfig(sigma_min=0.003, boundary=False, mu0=0.0, metric="huber", gap_weight=True, stages=8)


# ---- model and loss ----

def per_image(value: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to multiply images."""
    return value[:, None, None, None]


def noise_condition(sigma: Tensor) -> Tensor:
    """What the network is told about sigma > 0: 250 ln(sigma), 1095.5 at 80 and -1553.7 at 0.002.

    The paper leaves it open; this is the published code, less its 1e-44 inside the logarithm: that constant is a
    denormal, lost wherever these are flushed to zero. Nothing here calls a network at sigma = 0.
    """
    return 250 * sigma.float().log()


class ConsistencyModel(nn.Module):
    """f(x, sigma) = c_skip x + c_out F(c_in x, sigma), the denoised image, equal to x at sigma_min (Eq. 2).

    F is any network called as net(x, t, y): UNet, DiT, UViT, or a FunctionGenerator, which also takes `coord`.
    At large sigma f is F / 2, so F must reach [-2, 2]: no generator squashes its output.
    """

    def __init__(self, net: nn.Module, cfg: ConsistencyConfig):
        super().__init__()
        self.net = net
        self.cfg = cfg

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None = None, **extra: Tensor) -> Tensor:
        """x (B, 3, H, W), clean plus sigma times noise; sigma (B,) -> (B, 3, H, W). `extra` goes to the network."""
        c_skip, c_out, c_in = (per_image(c) for c in self.cfg.scalings(sigma))
        return c_skip * x + c_out * self.net(c_in * x, noise_condition(sigma), y, **extra).float()

    def function(self, x: Tensor, sigma: Tensor, y: Tensor | None = None):
        """c_out F alone, as an ImageFunction: without c_skip x nothing ties the output to the size of x (D.3.1).

        At sigma_max the dropped term has a standard deviation of 0.003.
        """
        if not hasattr(self.net, "function"):
            raise ValueError(f"{type(self.net).__name__} makes pixels, not functions: it draws its training size only")
        _, c_out, c_in = self.cfg.scalings(sigma)
        return self.net.function(per_image(c_in) * x, noise_condition(sigma), y).scaled(c_out)


def heun_step(denoiser: nn.Module, x: Tensor, t: Tensor, r: Tensor, y: Tensor | None = None) -> Tensor:
    """x at level t -> where the trajectory dx/dsigma = (x - D) / sigma passes r < t, by one step of Heun's method.

    denoiser D(x, sigma, y); x (B, 3, H, W); t, r (B,). At r = 0 it is D(x, t) (Karras et al. 2022, Algorithm 1).
    """
    slope = (x - denoiser(x, t, y)) / per_image(t)
    ahead = x + per_image(r - t) * slope                             # Euler
    level = r.clamp(min=1e-6)
    there = (ahead - denoiser(ahead, level, y)) / per_image(level)
    return torch.where(per_image(r) == 0, ahead, x + per_image(r - t) * (slope + there) / 2)     # corrected


def consistency_loss(f: nn.Module, target: nn.Module, x: Tensor, noise: Tensor, t: Tensor, r: Tensor, metric: Metric,
                     y: Tensor | None = None, denoiser: nn.Module | None = None, **extra: Tensor) -> Tensor:
    """d(f(x + t z, t), target(x + r z, r)) per image, (B,); its mean is the objective (Eq. 5).

    x (B, 3, H, W) clean images; noise like x, one z for both sides; t > r >= 0 (B,). `extra` (coordinates, with their
    random shifts) also goes to both: separate draws would leave a floor under the distance. No gradient enters
    `target`; it may be f itself (iCT, ECT). r = 0 stands for the clean image.
    denoiser: beyond the paper, consistency distillation (Song et al. 2023, Algorithm 2): its trajectory leads from
    x + t z to level r, in place of x + r z, which adds the variance of x given x + t z.
    """
    noisy = x + per_image(t) * noise
    student, answer = f(noisy, t, y, **extra), x
    tied = r > 0
    with torch.no_grad():
        if tied.any():                                               # in training a denoiser none is
            start = x + per_image(r) * noise
            if denoiser is not None:
                start[tied] = heun_step(denoiser, noisy[tied], t[tied], r[tied], None if y is None else y[tied])
            answer = torch.where(per_image(tied), target(start, r.clamp(min=1e-6), y, **extra), x)
    with torch.autocast(x.device.type, enabled=False):       # the networks may run in bf16, the distance never
        return metric(student.float(), answer.float())


# ---- metrics ----

def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference per image, (B,)."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """sqrt(||a - b||^2 + c^2) - c over the whole image, (B,); c = 0.00054 sqrt(3 H W) by default (iCT).

    The norm is that of the whole difference: elementwise, as many ports have it, is another loss. c = 0, the plain norm
    of ECT, has no gradient where a = b.
    """
    if c is None:
        c = 0.00054 * math.sqrt(a[0].numel())
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c


def lpips_resized(lpips: nn.Module, average_pool: bool = True, size: int = 224) -> Metric:
    """LPIPS of both images after bilinear interpolation to 224 x 224 (Appendix A.1), as a metric.

    lpips: a module (a, b in [-1, 1]) -> one distance per image, frozen and in eval mode; it is copied.
    average_pool: left open by the paper. The published PyTorch code replaces every max pooling of the VGG by average
    pooling; False keeps the network as it is, like the lpips package and the published JAX code.
    size: less than 224 is cheaper and another loss.
    """
    lpips = deepcopy(lpips)
    for parent in list(lpips.modules()) if average_pool else []:
        for name, child in parent.named_children():
            if isinstance(child, nn.MaxPool2d):
                pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(parent, name, pool)

    def metric(a: Tensor, b: Tensor) -> Tensor:
        a, b = (F.interpolate(image, size=(size, size), mode="bilinear", align_corners=False) for image in (a, b))
        return lpips(a, b).flatten()                                 # (B,)

    return metric


# ---- sampling and evaluation ----

def levels_like(x: Tensor, sigma: float) -> Tensor:
    """(B,) copies of one noise level."""
    return torch.full((len(x),), sigma, device=x.device)


@torch.no_grad()
def sample_onestep(f: ConsistencyModel, noise: Tensor, y: Tensor | None = None) -> Tensor:
    """noise (B, 3, H, W), standard normal at the training resolution -> images in [-1, 1]."""
    return f(f.cfg.sigma_max * noise, levels_like(noise, f.cfg.sigma_max), y).clamp(-1, 1)


@torch.no_grad()
def sample_multistep(f: ConsistencyModel, noises: Sequence[Tensor], sigmas: Sequence[float], y: Tensor | None = None,
                     clip: bool = True) -> Tensor:
    """Denoise, add less noise, denoise again (Song et al. 2023, multistep sampling); images in [-1, 1].

    sigmas: decreasing levels, sigma_max first; noises: as many standard normals (B, 3, H, W). With the skip term, so at
    the training resolution only. clip: every denoised image is clamped, not only the last.
    Published second levels are points of a grid, e.g. karras_sigmas(40)[22] for CD and karras_sigmas(201)[106] for CT
    on ImageNet-64. ECT adds sigma z where this rule, the published one, adds sqrt(sigma^2 - sigma_min^2) z.
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
def sample_heun(f: ConsistencyModel, noise: Tensor, steps: int, y: Tensor | None = None) -> Tensor:
    """Heun's method along dx/dsigma = (x - f) / sigma (Karras et al. 2022, Algorithm 1, no churn); images in [-1, 1].

    For a plain denoiser f, such as OpenAI's edm_* files: 2 steps - 1 network calls from sigma_max to 0. A consistency
    model needs none of it.
    """
    sigmas = f.cfg.karras_sigmas(steps, noise.device)
    x = sigmas[0] * noise
    for sigma, lower in zip(sigmas[:-1], sigmas[1:]):
        x = heun_step(f, x, sigma.expand(len(x)), lower.expand(len(x)), y)
    return f(x, sigmas[-1].expand(len(x)), y).clamp(-1, 1)           # the step to 0


@torch.no_grad()
def sample_function(f: ConsistencyModel, noise: Tensor, y: Tensor | None = None):
    """noise (B, 3, H, W) -> ImageFunction of B images, to be drawn at any resolution (Appendix D.3.1). One step.

    The noise stays at the training resolution whatever is drawn. Colours are not clamped.
    """
    return f.function(f.cfg.sigma_max * noise, levels_like(noise, f.cfg.sigma_max), y)


@torch.no_grad()
def denoising_distance(f: ConsistencyModel, x: Tensor, noise: Tensor, y: Tensor | None = None,
                       n: int = 18) -> tuple[Tensor, Tensor]:
    """Total denoising distance |f(x + sigma z, sigma) - x| along an n-point grid (Section 4.1, Appendix B).

    Returns (sigmas, distances), each (n,). The paper leaves norm, average and grid open: here the L2 norm of the whole
    image, averaged over the batch; divided by sqrt(3 H W) it is the RMS per value.
    """
    sigmas = f.cfg.karras_sigmas(n, x.device)
    images = (f(x + sigma * noise, sigma.expand(len(x)), y) for sigma in sigmas)
    return sigmas, torch.stack([(image - x).flatten(1).norm(dim=1).mean() for image in images])
