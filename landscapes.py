"""The built-in data: mountain landscapes, each a function of its number, drawn at any resolution.

Noise finer than a pixel is left out: a scene is the same at every size, with true detail (INFD,
Section H). The bundled weights know these pixels: keep the order of random numbers and arithmetic.
"""
import numpy as np

Box = tuple[int, int, int, int]  # top, left, height, width

TIMES = ("dawn", "day", "dusk", "night")
PALETTES = np.array([  # a time each: sky above, at the horizon, haze, direct light, shade
    [0.36, 0.47, 0.72, 1.00, 0.80, 0.66, 0.72, 0.66, 0.76, 1.08, 0.80, 0.60, 0.40, 0.40, 0.56],
    [0.13, 0.36, 0.72, 0.74, 0.87, 0.96, 0.62, 0.74, 0.88, 1.00, 0.95, 0.85, 0.30, 0.38, 0.52],
    [0.16, 0.16, 0.40, 1.00, 0.55, 0.28, 0.56, 0.38, 0.50, 1.12, 0.60, 0.38, 0.28, 0.25, 0.42],
    [0.02, 0.04, 0.12, 0.13, 0.22, 0.38, 0.12, 0.19, 0.33, 0.46, 0.56, 0.78, 0.13, 0.18, 0.30],
]).reshape(4, 5, 3)
SUN_HEIGHT = (0.24, 0.42), (-0.04, 0.16), (0.24, 0.42), (0.07, 0.22)
WOODS = {"spring": (0.27, 0.36, 0.15), "summer": (0.13, 0.25, 0.13),
         "autumn": (0.46, 0.33, 0.15), "winter": (0.17, 0.21, 0.21)}
ROCKS = (0.50, 0.47, 0.45), (0.60, 0.44, 0.36), (0.38, 0.38, 0.42), (0.57, 0.52, 0.45)
SNOW = np.array((0.95, 0.97, 1.00), np.float32)[:, None, None]
LATTICE = np.random.Generator(np.random.Philox(key=0)).uniform(-1, 1, 2**16).astype(np.float32)


def _color(rgb) -> np.ndarray:
    return np.array(rgb, np.float32)[:, None, None]  # (3, 1, 1)


def _mix(a, b, t):
    return a * (1 - t) + b * t


def _step(x, width: float):
    return np.clip(x / width + 0.5, 0, 1)  # share of a pixel where x > 0


def _noise(x, y):
    """Give smooth noise in [-1, 1] at (x, y), of period 256, and its derivatives."""
    s = x - np.floor(x)
    t = y - np.floor(y)
    i = np.floor(x).astype(np.intp) & 255
    j = (np.floor(y).astype(np.intp) & 255) << 8
    right = (i + 1) & 255
    down = (j + 256) & 65535
    a = LATTICE.take(j + i)
    c = LATTICE.take(down + i)
    ab = LATTICE.take(j + right) - a
    cd = LATTICE.take(down + right) - c
    u = s * s * (3 - 2 * s)
    v = t * t * (3 - 2 * t)
    rise = c - a + (cd - ab) * u
    dx = (ab + (cd - ab) * v) * (6 * s * (1 - s))
    return a + ab * u + rise * v, dx, rise * (6 * t * (1 - t))


def _fractal(x, y, pixel: float, freq: float, aspect: float, gain: float, offsets, ridged=False):
    """Sum octaves of noise, each faded out as it gets finer than a pixel."""
    value = dx = dy = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for k, (ox, oy) in enumerate(offsets.tolist()):
        fade = min(1.0, (1 / (freq * pixel) - 1.5) / 2)  # 1 at wavelengths of 3.5 pixels
        if fade <= 0:
            break
        n, nx, ny = _noise(x * freq + ox, y * (freq * aspect) + oy)
        sign = np.clip(-8 * n, -1, 1) if ridged else 0.5  # creases where n crosses zero
        amp = 2 * fade * gain**k
        value = value + amp * (n * sign + 0.35 * ridged)  # 0.35: zero mean
        dx = dx + amp * freq * nx * sign
        dy = dy + amp * freq * aspect * ny * sign
        freq *= 1.93
    return value, dx, dy


class Mountain:
    """One range: a smooth outline with a summit, and noise that roughens it."""
    def __init__(self, g, depth: float, back: float, sign: int, high: bool, snow: float):
        self.depth = depth  # 0 at the back, 1 in front
        self.base = _mix(back, 0.98, depth**1.3) + g.normal(0, 0.012)  # y of the foot, downwards
        self.tilt = g.uniform(0.05, 0.35) * depth * sign
        self.summit = g.uniform(0.05, 0.28) * high, g.uniform(0.15, 0.85), g.uniform(0.25, 0.5)
        self.rough = _mix(g.uniform(0.08, 0.18), g.uniform(0.03, 0.08), depth)
        self.freq = g.uniform(2.0, 3.6)
        self.offsets = g.uniform(0, 256, (12, 2))
        self.snow = snow  # from this height above the foot

    def outline(self, x):
        """Give y of the smooth upper edge at columns x, and its slope."""
        height, centre, width = self.summit
        side = (x - centre) / width
        away = np.sqrt(side * side + 0.01)
        peak = 1.25 * height * np.exp(-2.2 * away)
        edge = self.base - peak - self.tilt * (x - 0.5)
        return edge, 2.2 / width * peak * side / away - self.tilt

    def ridge(self, x, pixel: float):
        """Give the same in all detail."""
        y, slope = self.outline(x)
        zero = np.zeros((1, 1), np.float32)
        n, dx, _ = _fractal(x, zero, pixel, self.freq, 0.5, 0.45, self.offsets, ridged=True)
        return y - self.rough * n, slope - self.rough * dx


class Scene:
    """The mountain landscape of a number, antialiased."""
    size = 4096  # it has none of its own

    def __init__(self, index: int):
        g = np.random.Generator(np.random.Philox(key=index + 1))  # 0 is the lattice's
        self.name = f"scene {index}"
        self.time = TIMES[index % 4]
        self.season = tuple(WOODS)[g.integers(4)]
        self.zenith, self.horizon, self.haze, self.light, self.shade = (
            _color(c * g.normal(1, 0.035, 3) + g.normal(0, 0.02)) for c in PALETTES[index % 4])
        self.rock = _color(ROCKS[g.integers(4)])
        self.wood = _color(WOODS[self.season] * g.uniform(0.8, 1.2, 3))
        self.side = 1 if g.random() < 0.5 else -1  # the light is right or left
        self.sun = (0.5 + self.side * g.uniform(0.08, 0.42), g.uniform(*SUN_HEIGHT[index % 4]),
                    g.uniform(0.014, 0.03))  # x, y, radius
        self.clouds = g.uniform(-0.8, 0.3)
        self.mist = g.uniform(0.1, 0.8)
        self.tree = g.uniform(0.022, 0.045)
        self.snow = g.uniform(0, 0.25) - 0.35 * (self.season == "winter")
        self.wooded = g.uniform(-0.05, 0.12) if g.random() < 0.85 else -9.0  # up to, above foot
        self.lake = g.uniform(0.70, 0.82) if g.random() < 0.4 else 2.0  # y; 2: none
        self.sky_offsets = g.uniform(0, 256, (2, 12, 2))
        n = int(g.integers(3, 7))
        back = g.uniform(0.50, 0.62)
        turn = int(g.integers(2))
        rise = 0.25 * (self.season != "winter")
        self.mountains = [
            Mountain(g, d, back, (-1) ** (i + turn), i < 2, self.snow + rise * d)
            for i, d in enumerate(np.linspace(0, 1, n).tolist())]

    def caption(self) -> str:
        kind = "wooded" if self.wooded > -1 else "bare"
        if self.snow < max(m.summit[0] + m.rough / 2 for m in self.mountains):
            kind = "snowy" if self.snow < 0 else "snow-capped"
        sky = "a clear sky" if self.clouds < -0.5 else "scattered clouds"
        sky = sky if self.clouds < 0 else "a cloudy sky"
        when = f"{'by' if self.time == 'day' else 'at'} {self.time} in {self.season}"
        extras = ", conifers" * (self.wooded > -1) + ", a lake" * (self.lake < 1)
        return f"{kind} mountains {when}, {sky}{extras}" + ", mist" * (self.mist > 0.5)

    def draw(self, res: int, box: Box | None = None) -> np.ndarray:
        """Draw the scene, cropped to `box`: uint8 (height, width, 3)."""
        top, left, h, w = box or (0, 0, res, res)
        pixel = 1 / res
        x = ((np.arange(left, left + w) + 0.5) * pixel).astype(np.float32)[None]  # (1, w)
        y = ((np.arange(top, top + h) + 0.5) * pixel).astype(np.float32)[:, None]  # (h, 1)

        # The lake mirrors all but the front range.
        reflected = np.where(y < self.lake, y, np.float32(2 * self.lake) - y)
        image = self.sky(x, reflected, pixel)  # (3, h, w)
        for m in self.mountains[:-1]:
            self.paint(image, m, x, reflected, pixel)
        if self.lake < 1:
            ripples = 0.12 * _fractal(x, y, pixel, 4, 9, 0.7, self.sky_offsets[1])[0]
            water = _mix(0.85 * image, 0.5 * self.shade + 0.2 * self.zenith, 0.25) * (1 + ripples)
            image = _mix(image, water, _step(y - self.lake, pixel))
        self.paint(image, self.mountains[-1], x, y, pixel)
        return (np.clip(image, 0, 1).transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8)

    def sky(self, x, y, pixel: float):
        """Draw gradient, sun or moon, stars, clouds."""
        up = np.clip(1 - y / 0.6, 0, 1) ** 0.8
        away = np.hypot(x - self.sun[0], y - self.sun[1]).astype(np.float32)
        glow = self.light * (0.45 * np.exp(away / -0.14) + 0.3 * np.exp(away / -0.04))
        image = _mix(self.horizon, self.zenith, up) + glow
        image = _mix(image, np.minimum(1, 0.8 + 0.3 * self.light), _step(self.sun[2] - away, pixel))
        if self.time == "night":
            image = image + self.stars(x / 0.03, y / 0.03, pixel) * up
        n, dx, dy = _fractal(x, y * (1 + y), pixel, 2.2, 2.5, 0.5, self.sky_offsets[0])
        thick = np.clip(n + self.clouds, 0, 1)
        bright = np.clip(1.05 - 0.5 * thick + 0.01 * (dy - 2 * self.side * dx), 0.2, 1)
        cloud = _mix(0.6 * self.shade + 0.4 * self.haze, np.minimum(1, self.light + 0.12), bright)
        return _mix(image, cloud, 1 - np.exp(-2.5 * thick))

    def stars(self, x, y, pixel: float):
        """Draw one star to a cell; those smaller than a pixel keep their light."""
        i = np.floor(x)
        j = np.floor(y)
        k = (i.astype(np.intp) * 7 + j.astype(np.intp) * 4099) & 32767
        dx, dy, bright = (LATTICE[k + s] for s in (0, 9000, 20000))
        radius = max(0.0014, 0.6 * pixel)
        away = (x - i - 0.5 - 0.3 * dx) ** 2 + (y - j - 0.5 - 0.3 * dy) ** 2
        away = away * (0.03 / radius) ** 2
        return 4 * (0.0014 / radius) ** 2 * np.clip(bright, 0, 1) ** 3 * np.exp(-away)

    def paint(self, image, m: Mountain, x, y, pixel: float):
        """Paint mountain m: rock, snow and woods, lit, in haze."""
        wooded = self.wooded > -1 and m.depth > 0.45
        if wooded:
            self.trees(image, m, x, y, pixel, 0.0)  # on the ridge
        ridge, steep = m.ridge(x, pixel)
        edge, fall = m.outline(x)
        rows = np.flatnonzero(y > ridge.min() - 2 * pixel)
        face = y[rows]

        down = face - edge
        away = x - m.summit[1]
        spread = 20 * m.summit[0] * np.exp(-(away / m.summit[2]) ** 2) * np.maximum(down, 0)
        gullies = x - away * spread / (1 + spread)
        n, dx, dy = _fractal(gullies, down, pixel, m.freq, 0.55, 0.47, m.offsets, ridged=True)
        dx = dx * m.rough - 0.6 * fall * np.exp(np.abs(down) / -0.2)
        dy = dy * m.rough
        flat = 1 / (1 + dx * dx + dy * dy)
        lit = np.clip((0.35 + 0.5 * dy - 0.8 * self.side * dx) * np.sqrt(flat), 0, 1)
        height = m.base - face + 0.06 * n
        snow = _step(height - m.snow + 0.1 * (flat - 0.6), 0.03)
        woods = _step(self.wooded - height + 0.05 * (flat - 0.6), 0.02)
        ground = _mix(_mix(self.rock, self.wood, woods), SNOW, snow)
        tone = ground * (self.shade * (0.8 + 0.3 * n) + self.light * lit)

        fog = self.mist * (1 - m.depth) ** 0.7 * np.clip((face - ridge) / 0.35, 0, 1)
        fog = 0.75 * (1 - m.depth) ** 1.4 + fog
        cover = _step(face - ridge, pixel * (1 + np.abs(steep)))
        image[:, rows] = _mix(image[:, rows], _mix(tone, self.haze, np.minimum(fog, 0.93)), cover)
        for drop in (0.9, 2.0, 3.1) if wooded else ():
            self.trees(image, m, x, y, pixel, drop * self.tree)

    def trees(self, image, m: Mountain, x, y, pixel: float, drop: float):
        """Paint a row of conifers with feet `drop` below the ridge of m."""
        size = self.tree * (0.5 + 0.5 * m.depth)
        shift = 37.3 * m.depth + 1234.5 * drop
        cell = np.floor(x / size + shift)
        a, b, c = (LATTICE[(cell.astype(np.intp) & 32767) + s] for s in (3, 11000, 25000))
        axis = (cell + 0.5 + 0.25 * a - shift) * size  # of each column's tree
        foot = m.ridge(axis, pixel)[0] + drop
        grown = _step(self.wooded + 0.04 * c - m.base + foot, 0.05)
        tall = size * (2.1 + 0.9 * b) * grown
        rows = np.flatnonzero((y < foot.max() + 2 * pixel) & (y > (foot - tall).min() - 2 * pixel))

        up = foot - y[rows]
        dx = x - axis
        z = np.clip(up / np.maximum(tall, 1e-6), 0, 1)  # 0 at the foot, 1 at the tip
        tier = 7 * z % 1 * np.clip(tall / (20 * pixel) - 0.5, 0, 1)  # boughs larger than pixels
        half = 0.46 * size * grown * (1 - z) * (1.05 - 0.35 * tier)
        inside = np.minimum(dx + pixel / 2, half) - np.maximum(dx - pixel / 2, -half)
        cover = np.clip(inside / pixel, 0, 1) * _step(up, pixel)
        bright = 0.25 + 0.5 * np.clip(0.5 + self.side * dx / size, 0, 1) + 0.15 * c - 0.1 * tier
        snow = 0.55 * _step(m.base - foot - m.snow + 0.05 + 0.05 * b, 0.05) * (1 - tier) * (1 - z)
        tone = _mix(self.wood, SNOW, snow) * (self.shade + self.light * bright)
        tone = _mix(tone, self.haze, 0.6 * (1 - m.depth) ** 1.2)
        image[:, rows] = _mix(image[:, rows], tone, cover)


class Landscapes:
    """50,000 scenes to train on, 10,000 others; their class is the time of day."""

    classes = TIMES

    def __init__(self, split: str = "train"):
        held_out = range(50_000, 60_000)
        self.numbers = {"train": range(50_000), "val": held_out, "all": range(60_000)}[split]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Scene:
        return Scene(self.numbers[i])

    def label(self, i: int) -> int:
        return self.numbers[i] % len(TIMES)

    def caption(self, i: int) -> str:
        return self[i].caption()
