"""Text: from a prompt to the context that a UNet attends to.
CLIP's tokenizer and text transformer as in Stable Diffusion v1, from which INFD's text-to-image
starts (Section H), or small ones: words of the training captions, trained with the UNet.
ldm.UNet attends to the context. Read next: published.py, which reads weights.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ---- words ----

# White space as Unicode has it. Python's own idea of it includes the separators 28 to 31.
SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
ENDINGS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
MOST_CHARACTERS = 10_000


def clean(text: str) -> str:
    """Bring a text into the form that CLIP splits: HTML resolved, single spaces, lower case.

    CLIP's own code also repairs text with the package ftfy (curly quotes, ligatures, wrong
    encodings), which is not done here; what needs no repair comes out the same. Texts beyond
    MOST_CHARACTERS are cut: no model reads that much.
    """
    text = html.unescape(html.unescape(text))                        # twice, as published
    text = unicodedata.normalize("NFC", text).strip()
    return SPACES.sub(" ", text).strip().lower()[:MOST_CHARACTERS]


def split(text: str) -> list[str]:
    """Split a cleaned text into CLIP's words; at each place the first rule that fits is taken.

    One of SPECIAL, one of ENDINGS, a run of letters, a single number character, or a run of
    anything else that is not white space. Letters are those of this Python's Unicode version.
    """
    kinds = [_kind(character) for character in text]
    words = []
    at = 0
    while at < len(text):
        end = at + 1
        fixed = [word for word in SPECIAL + ENDINGS if text.startswith(word, at)]
        if fixed:
            end = at + len(fixed[0])
        elif kinds[at] != "N":
            while end < len(text) and kinds[end] == kinds[at]:
                end += 1
        if kinds[at] != "space":
            words.append(text[at:end])
        at = end
    return words


def _kind(character: str) -> str:
    category = unicodedata.category(character)[0]
    if category in ("L", "N"):
        return category                                              # a letter, a number
    return "space" if SPACES.match(character) else "other"


MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES_BYTES = 1_356_917
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES_USED = 49_152 - 256 - 2                                       # the file has more


def read_merges(checkpoint: Path, named: str | None = None) -> list[tuple[str, str]]:
    """CLIP's merges, of the file named by an option, else of the one beside the checkpoint.

    Raises FileNotFoundError that says what to put there, ValueError if it is not that very file.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    path = Path(named) if named else folder / MERGES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"CLIP's tokenizer is not at {path}: put {MERGES_FILE} "
                                f"({MERGES_BYTES:,} bytes, sha256 {MERGES_SHA256}), which CLIP's "
                                f"packages hold, beside the checkpoint (sample.py: or --merges "
                                f"FILE)")
    content = path.read_bytes() if path.stat().st_size < 2**24 else b""
    digest = hashlib.sha256(content).hexdigest()
    if digest != MERGES_SHA256:
        raise ValueError(f"{path} is not CLIP's {MERGES_FILE}: it has {path.stat().st_size:,} "
                         f"bytes and sha256 {digest}, not {MERGES_BYTES:,} and {MERGES_SHA256}")
    lines = gzip.decompress(content).decode().split("\n")[1:MERGES_USED + 1]    # after a header
    return [tuple(line.split()) for line in lines]


class CLIPTokenizer:
    """Text to the numbers of CLIP's word pieces: a start, up to length - 2 pieces, ends to fill up.

    A word is its UTF-8 bytes, joined pair by pair in the order of `merges`. Stable Diffusion v1
    fills up with ends (OpenAI with 0). As in OpenAI's code, "<|startoftext|>" and "<|endoftext|>"
    within a text become the special pieces.
    """

    def __init__(self, merges: Iterable[tuple[str, str]], length: int = 77):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.symbols = {byte: chr(byte) for byte in printable}
        self.symbols |= {byte: chr(256 + i) for i, byte in enumerate(others)}

        self.length = length
        self.merges = [tuple(pair) for pair in merges]
        self.ranks = {pair: i for i, pair in enumerate(self.merges)}
        pieces = [*self.symbols.values(), *(symbol + "</w>" for symbol in self.symbols.values())]
        pieces += [first + second for first, second in self.merges]
        self.ids = {piece: i for i, piece in enumerate([*pieces, *SPECIAL])}
        self.start = self.ids[SPECIAL[0]]
        self.end = self.ids[SPECIAL[1]]

    def __len__(self) -> int:
        """Number of pieces: 49,408 of the published ones."""
        return 512 + len(self.merges) + len(SPECIAL)

    def state(self) -> dict:
        """Plain values for a checkpoint, read by `tokenizer_from`."""
        return {"merges": [list(pair) for pair in self.merges], "length": self.length}

    def pieces(self, word: str) -> list[str]:
        """The pieces of one word of `split`; the last one ends in </w>."""
        if word in SPECIAL:
            return [word]
        parts = [self.symbols[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while True:
            pairs = [pair for pair in zip(parts, parts[1:]) if pair in self.ranks]
            if not pairs:
                return parts
            first, second = min(pairs, key=self.ranks.get)

            joined = []                                              # at every place, from the left
            for part in parts:
                if joined and part == second and joined[-1] == first:
                    joined[-1] = first + second
                else:
                    joined.append(part)
            parts = joined

    def encode(self, text: str) -> list[int]:
        """The numbers of all pieces of a text, without start and end."""
        numbers = []
        for word in split(clean(text)):
            numbers += [self.ids[piece] for piece in self.pieces(word)]
        return numbers

    def __call__(self, texts: list[str]) -> Tensor:
        """texts -> (B, length) int64. What is too long is cut: see `remark`."""
        rows = []
        for text in texts:
            row = [self.start, *self.encode(text)[:self.length - 2]]
            rows.append(row + [self.end] * (self.length - len(row)))
        return torch.tensor(rows)

    def remark(self, text: str) -> str:
        """What of a text does not reach the model, in one line; empty if all of it does."""
        room = self.length - 2
        words = split(clean(text))
        ends = list(itertools.accumulate(len(self.pieces(word)) for word in words))
        for word, end in zip(words, ends):
            if end > room:
                return too_long(word, f"{ends[-1]} pieces", room)
        return ""


def too_long(word: str, found: str, read: int) -> str:
    """The line that says at which word a text is cut."""
    return f'the text has {found} and this model reads {read}: it is cut at "{word[:40]}"'


class WordTokenizer:
    """Text to the numbers of the words that the training captions had, for small models.

    0 fills up, so that the empty caption is all 0; 1 is any unknown word. Punctuation is left out.
    """

    def __init__(self, words: Iterable[str], length: int):
        self.words = list(words)
        self.length = length
        self.ids = {word: 2 + i for i, word in enumerate(self.words)}
        if length < 1 or not self.words or len(self.ids) < len(self.words):
            raise ValueError(f"a word tokenizer needs a length and different words; it got "
                             f"length {length} and {len(self.ids)} words")

    @classmethod
    def learn(cls, captions: Iterable[str], length: int = 0, most: int = 10_000) -> WordTokenizer:
        """Learn the `most` commonest words; length 0: that of the longest caption."""
        counts = Counter()
        longest = 0
        for caption in captions:
            found = cls.words_of(caption)
            counts.update(found)
            longest = max(longest, len(found))
        if not counts:
            raise ValueError("no caption has a word in it, so there is nothing to learn words from")
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(words[:most], length or longest)

    @staticmethod
    def words_of(text: str) -> list[str]:
        """The words of a text, without punctuation."""
        return [word for word in split(clean(text)) if _kind(word[-1]) in ("L", "N")]

    def __len__(self) -> int:
        """Number of words, with those for "nothing" and "unknown"."""
        return 2 + len(self.words)

    def state(self) -> dict:
        """Plain values for a checkpoint, read by `tokenizer_from`."""
        return {"words": self.words, "length": self.length}

    def __call__(self, texts: list[str]) -> Tensor:
        """texts -> (B, length) int64. What is too long or unknown is lost: see `remark`."""
        rows = []
        for text in texts:
            row = [self.ids.get(word, 1) for word in self.words_of(text)[:self.length]]
            rows.append(row + [0] * (self.length - len(row)))
        return torch.tensor(rows)

    def remark(self, text: str) -> str:
        """What of a text does not reach the model, in one line; empty if all of it does."""
        words = self.words_of(text)
        unknown = [word for word in dict.fromkeys(words) if word not in self.ids]
        parts = []
        if unknown:
            more = f" and {len(self.words) - 100} more" if len(self.words) > 100 else ""
            parts.append(f"this model does not know {', '.join(unknown[:20])}; it knows "
                         f"{', '.join(sorted(self.words[:100]))}{more}")
        if len(words) > self.length:
            parts.append(too_long(words[self.length], f"{len(words)} words", self.length))
        return "; ".join(parts)


def tokenizer_from(state: dict) -> CLIPTokenizer | WordTokenizer:
    """The tokenizer whose `state` a checkpoint holds."""
    if "words" in state:
        return WordTokenizer(state["words"], state["length"])
    return CLIPTokenizer(state["merges"], state["length"])


def clip_tokenizer(checkpoint: Path, named: str | None, cfg: TextConfig) -> CLIPTokenizer:
    """The tokenizer of a text transformer of CLIP; the merges are where `read_merges` looks."""
    tokenizer = CLIPTokenizer(read_merges(checkpoint, named), cfg.positions)
    if len(tokenizer) != cfg.vocabulary:
        raise ValueError(f"the text encoder knows {cfg.vocabulary:,} pieces, and CLIP's tokenizer "
                         f"makes {len(tokenizer):,}")
    return tokenizer


# ---- the text transformer ----

@dataclass(frozen=True)
class TextConfig:
    """Architecture of a text transformer. The defaults are the text half of CLIP ViT-L/14."""

    width: int = 768                  # channels of a token, and of the context
    layers: int = 12
    heads: int = 12                   # 64 channels each in every published CLIP
    hidden: int = 3072                # width inside the MLPs
    vocabulary: int = 49_408          # len(tokenizer)
    positions: int = 77               # tokenizer.length, the longest text

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"heads is {self.heads}; it must divide the width {self.width}")


class CausalAttention(nn.Module):
    """Multi-head attention of every token to itself and those before it."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.heads = cfg.heads
        self.k_proj = nn.Linear(cfg.width, cfg.width)
        self.v_proj = nn.Linear(cfg.width, cfg.width)
        self.q_proj = nn.Linear(cfg.width, cfg.width)
        self.out_proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, width) -> (B, N, width)."""
        q = self.q_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)        # (B, heads, N, d)
        k = self.k_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)        # (B, heads, N, d)
        v = self.v_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)        # (B, heads, N, d)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)            # (B, heads, N, d)
        return self.out_proj(out.transpose(1, 2).flatten(2))                     # (B, N, width)


class TextLayer(nn.Module):
    """Attention and an MLP, each added to what enters it."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.self_attn = CausalAttention(cfg)
        self.layer_norm1 = nn.LayerNorm(cfg.width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(cfg.width, cfg.hidden),
                                  "fc2": nn.Linear(cfg.hidden, cfg.width)})
        self.layer_norm2 = nn.LayerNorm(cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, width) -> (B, N, width)."""
        x = x + self.self_attn(self.layer_norm1(x))                              # (B, N, width)
        h = self.mlp["fc1"](self.layer_norm2(x))                                 # (B, N, hidden)
        # CLIP's approximation of the GELU; the exact one changes a trained CLIP's output visibly.
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h))                 # (B, N, width)


class TextTransformer(nn.Module):
    """Tokens to the context of a UNet: the text half of CLIP (Radford et al. 2021).

    Parameter names are the published ones. The rows of the padding belong to the context, and
    nothing masks them, as in Stable Diffusion v1.
    """

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.cfg = cfg
        embeddings = {"token_embedding": nn.Embedding(cfg.vocabulary, cfg.width),
                      "position_embedding": nn.Embedding(cfg.positions, cfg.width)}
        layers = nn.ModuleList([TextLayer(cfg) for _ in range(cfg.layers)])
        self.text_model = nn.ModuleDict({"embeddings": nn.ModuleDict(embeddings),
                                         "encoder": nn.ModuleDict({"layers": layers}),
                                         "final_layer_norm": nn.LayerNorm(cfg.width)})

        # OpenAI's initialisation: what is added to x starts smaller, the more layers add to it.
        nn.init.normal_(embeddings["token_embedding"].weight, std=0.02)
        nn.init.normal_(embeddings["position_embedding"].weight, std=0.01)
        for layer in layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                nn.init.normal_(linear.weight, std=cfg.width**-0.5)
            nn.init.normal_(layer.mlp["fc1"].weight, std=(2 * cfg.width) ** -0.5)
            for linear in (layer.self_attn.out_proj, layer.mlp["fc2"]):
                nn.init.normal_(linear.weight, std=(2 * cfg.layers * cfg.width) ** -0.5)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, N) int64 -> (B, N, width), what the first layer gets."""
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= self.cfg.positions:
            raise ValueError(f"tokens have shape {tuple(ids.shape)}; expected (B, N), "
                             f"N up to {self.cfg.positions}")
        embeddings = self.text_model["embeddings"]
        place = embeddings["position_embedding"].weight[:ids.shape[1]]           # (N, width)
        return embeddings["token_embedding"](ids) + place                        # (B, N, width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, N) int64, N up to cfg.positions, else ValueError -> the context (B, N, width)."""
        x = self.embed(ids)                                                      # (B, N, width)
        for layer in self.text_model["encoder"]["layers"]:
            x = layer(x)                                                         # (B, N, width)
        return self.text_model["final_layer_norm"](x)                            # (B, N, width)
