"""What a seat draws, in torch: the oracle of the sampling kernels."""

import dataclasses
import math
import struct

import torch

TEMPERATURE_MIN = 1e-5
# The weight of the best logit in the sums of top-p, which are of whole numbers.
SHARE_ONE = 2.0**44
# A share that close to top_p may fall on either side.
SHARE_ERROR = 2e-6
# The last bits of a logarithm and of a sum in f32.
SCORE_ERROR = 3e-7
WORD = 0xFFFFFFFF


def f32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def bits(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


@dataclasses.dataclass
class Seat:
    """Parameters of a sequence, and what its penalties know."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    key: tuple = (0, 0)
    bias: list = dataclasses.field(default_factory=list)
    prompt: list = dataclasses.field(default_factory=list)
    output: list = dataclasses.field(default_factory=list)

    def words(self, bias_first):
        """`Seat` of sample.cuh; the last word is padding."""
        min_p = math.log(self.min_p) if self.min_p > 0 else -math.inf
        floats = [self.temperature, self.top_p, min_p, self.presence, self.frequency, self.repetition]
        return [*map(bits, floats), self.top_k, *self.key, bias_first, len(self.bias), 0x7FEE7FEE]

    @property
    def penalised(self):
        return (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)

    def seen(self, vocab):
        """A word a token: whether the prompt has it, and how often the output does."""
        seen = torch.zeros(vocab, dtype=torch.int64)
        for token in self.output:
            seen[token : token + 1] += 1
        for token in self.prompt:
            seen[token : token + 1] |= 1 << 31
        return seen

    def changed(self, logits, banned, seen):
        """Bias, penalties, bans and temperature, each rounded to f32 as on the device."""
        x, vocab = logits.clone(), len(logits)
        for token, value in sorted(self.bias, key=lambda bias: bias[0]):
            if token < vocab:
                x[token] += value
        if self.penalised:
            repetition = torch.tensor(self.repetition)
            x = torch.where(seen > 0, torch.where(x > 0, x / repetition, x * repetition), x)
            count = (seen & 0x7FFFFFFF).float()
            penalty = torch.tensor(self.presence) + torch.tensor(self.frequency) * count
            x = torch.where(count > 0, x - penalty, x)
        for token in banned:
            x[token : token + 1] = -math.inf
        if f32(self.temperature) < f32(TEMPERATURE_MIN):
            return x
        return x * (torch.tensor(1.0) / torch.tensor(self.temperature))

    def kept(self, x, slack):
        """Which tokens top-k, top-p (with a share more) and min-p leave."""
        best = x.max()
        kept = torch.ones_like(x, dtype=torch.bool)
        if not bool(best.isfinite()):
            return kept
        if 0 < self.top_k < len(x):
            kept &= x >= x.sort(descending=True).values[self.top_k - 1]
        if self.top_p < 1:
            falling = x[kept].sort(descending=True).values
            shares = ((falling - best).exp().double() * SHARE_ONE).floor().cumsum(0)
            wanted = ((f32(self.top_p) + slack) * shares[-1]).ceil().clamp(1, shares[-1])
            kept &= x >= falling[(shares >= wanted).nonzero()[0, 0]]
        if self.min_p > 0:
            kept &= x >= best + torch.tensor(math.log(self.min_p), dtype=torch.float32)
        return kept

    def allows(self, token, logits, banned, seen, position):
        """Whether a token is the one to draw, or too close to it to tell."""
        x = self.changed(logits, banned, seen)
        if f32(self.temperature) < f32(TEMPERATURE_MIN):
            return token == int((x == x.max()).nonzero()[0, 0])
        scores = x + noise(self.key, position, len(x))
        must, may = self.kept(x, -SHARE_ERROR), self.kept(x, SHARE_ERROR)
        best = float(scores[must].max())
        if math.isinf(best):
            return token == int((scores == best).nonzero()[0, 0])
        return bool(may[token]) and float(scores[token]) >= best - abs(best) * SCORE_ERROR - 1e-6


def noise(key, position, vocab):
    """Gumbel noise of Philox4x32-10's words (Salmon et al., 2011): logarithms in f64."""
    quads = torch.arange(-(-vocab // 4), dtype=torch.int64)
    zero = torch.zeros_like(quads)
    c, (low, high) = [zero + position, quads, zero, zero], key
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32 & WORD) ^ c[1] ^ low, b & WORD, (a >> 32 & WORD) ^ c[3] ^ high, a & WORD]
        low, high = (low + 0x9E3779B9) & WORD, (high + 0xBB67AE85) & WORD
    words = torch.stack(c, 1).flatten()[:vocab]
    return -(-((words.double() + 0.5) / 2.0**32).log()).log().float()
