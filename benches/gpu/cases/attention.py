"""Sequences in a paged cache, and their attention in f64 with a bound of what a kernel may differ."""

import dataclasses
import math

import torch

from values import ROUNDING, TYPES, Random, check, check_within, is_poison, poisoned

BLOCK_TOKENS = 16
# A table's entry that no kernel has reason to read; a block so far away is not there.
NO_BLOCK = 0xFFFFFFF0


@dataclasses.dataclass(frozen=True)
class Heads:
    of: str
    dim: int
    kv_heads: int
    # Query heads of a KV head.
    group: int
    # 0: none.
    window: int = 0

    @property
    def heads(self):
        return self.kv_heads * self.group

    @property
    def q_stride(self):
        return (self.heads + 2 * self.kv_heads) * self.dim

    @property
    def scale(self):
        return 1 / math.sqrt(self.dim)

    def seen(self, position):
        """The first token that a query sees; the last is itself."""
        return max(position + 1 - self.window, 0) if self.window else 0

    def __str__(self):
        window = f", window {self.window}" if self.window else ""
        return f"{self.of} dim {self.dim}, {self.kv_heads}x{self.group} heads{window}"


class Step:
    """All that a kernel reads. `sequences` are (length, queries): the last of a length are rows. What none
    of the rows sees is poison: other blocks, tokens past the end of a block, tokens and table entries in
    front of the window, k and v among the rows."""

    def __init__(self, place, heads, sequences, seed):
        self.place, self.heads, self.sequences = place, heads, sequences
        random = Random(place, seed)
        rows = sum(queries for _, queries in sequences)
        self.q = poisoned(place, heads.of, rows, heads.q_stride)
        self.q[:, : heads.heads * heads.dim] = random.elements(heads.of, rows, heads.heads * heads.dim)
        blocks = [-(-length // BLOCK_TOKENS) for length, _ in sequences]
        count = sum(blocks) + 2
        free = torch.randperm(count, generator=random.generator).tolist()
        self.cache = poisoned(place, heads.of, count, 2 * heads.kv_heads, BLOCK_TOKENS, heads.dim)
        self.table = [[NO_BLOCK] * (1 + max(blocks)) for _ in sequences]
        for index in range(len(sequences)):
            tokens = self.tokens(index)
            for block in range(tokens.start // BLOCK_TOKENS, -(-tokens.stop // BLOCK_TOKENS)):
                self.table[index][block] = free.pop()
            kv = random.elements(heads.of, len(tokens), 2 * heads.kv_heads, heads.dim)
            self.write(index, kv)

    def tokens(self, index):
        """Those of a sequence that any of its rows sees."""
        length, queries = self.sequences[index]
        first = self.heads.seen(length - queries) if 0 < queries <= length else length
        return range(first, length)

    def at(self, index):
        """Blocks and places in them of `tokens`."""
        at = torch.tensor(list(self.tokens(index)), dtype=torch.int64)
        blocks = torch.tensor(self.table[index], dtype=torch.int64)[at // BLOCK_TOKENS]
        return blocks.to(self.place.device), (at % BLOCK_TOKENS).to(self.place.device)

    def write(self, index, kv):
        blocks, offsets = self.at(index)
        self.cache[blocks, :, offsets] = kv

    def tables(self, sequences=slice(None)):
        return self.place.words([block for row in self.table[sequences] for block in row])

    def lengths(self, sequences=slice(None)):
        return self.place.words([length for length, _ in self.sequences[sequences]])

    def y(self):
        """A row more than there are, which nothing may write."""
        return poisoned(self.place, self.heads.of, len(self.q) + 1, self.heads.heads * self.heads.dim)

    def part(self, picked):
        """Only some of the sequences, (index, (length, queries)), with their last rows."""
        part = object.__new__(Step)
        part.place, part.heads, part.cache = self.place, self.heads, self.cache
        part.sequences = [sequence for _, sequence in picked]
        part.table = [self.table[index] for index, _ in picked]
        rows = []
        for index, (length, queries) in picked:
            end = sum(count for _, count in self.sequences[: index + 1])
            end -= self.sequences[index][0] - length
            rows.append(self.q[end - queries : end])
        part.q = torch.cat(rows)
        return part

    def check(self, y):
        """Every row of `y`, and the spare one; the share of the bound that is used."""
        first, share = 0, 0.0
        for index, (length, queries) in enumerate(self.sequences):
            rows = y[first : first + queries].view(queries, self.heads.heads, self.heads.dim)
            if queries and length:
                exact, most = self.attend(index, self.q[first : first + queries])
                what = f"sequence {index} of {length}"
                share = max(share, check_within(what, rows, exact, most))
            elif queries:
                check(bool((rows == 0).all()), f"padding row {first} is not zeros")
            first += queries
        check(is_poison(y[first:]), "a row too many")
        return {"share": share}

    def attend(self, index, q):
        """Each element of [queries, heads, dim] and how far a kernel's may be from it. With u half a unit
        of the type: the result is rounded, `u |o|`; weights are rounded before they meet V,
        `u sum(w |v|)`; a score is a sum of `dim` products in f32, wrong by up to `dim 2^-24 sum |q k|`,
        and a weight by as much relative to it, as is the sum that all are divided by; the sums over
        tokens, the exponentials and their arguments cost `(tokens + 100) 2^-23`."""
        heads, (length, queries) = self.heads, self.sequences[index]
        q = q[:, : heads.heads * heads.dim].double().view(queries, heads.heads, heads.dim)
        blocks, offsets = self.at(index)
        kv = self.cache[blocks, :, offsets].double()
        k, v = (half.repeat_interleave(heads.group, 1) for half in kv.chunk(2, 1))
        scores = heads.scale * torch.einsum("qhd,thd->hqt", q, k)
        tokens = torch.tensor(list(self.tokens(index)), device=q.device)
        position = torch.arange(length - queries, length, device=q.device)[:, None]
        hidden = (tokens > position) | ((tokens <= position - heads.window) & (heads.window > 0))
        sizes = torch.einsum("qhd,thd->hqt", q.abs(), k.abs()).masked_fill(hidden, 0).amax(-1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        exact = torch.einsum("hqt,thd->qhd", weights, v)
        unit = ROUNDING[heads.of]
        score = heads.scale * sizes * heads.dim * 2.0**-24
        sums = ((~hidden).sum(-1) + 100) * 2.0**-23
        relative = (unit + (2 * score).expm1() + sums).T[:, :, None]
        most = torch.einsum("hqt,thd->qhd", weights, v.abs()) * relative
        return exact, most + unit * exact.abs() + 1e-7


def large_values(place, heads, sequences):
    """Values at the type's limit, of one sign in a third of the elements and else of both: sums of them
    must not overflow."""
    step = Step(place, heads, sequences, 4)
    limit = torch.finfo(TYPES[heads.of]).max
    for index in range(len(sequences)):
        token = torch.tensor(list(step.tokens(index)), device=place.device)[:, None]
        at = torch.arange(heads.dim, device=place.device)
        k = ((token * 13 + at * 5) % 11) / 11 - 0.5
        sign = torch.where((at % 3 != 0) & ((token + at) % 2 == 0), -1.0, 1.0)
        kv = torch.stack([k] * heads.kv_heads + [sign * limit] * heads.kv_heads, 1)
        step.write(index, kv.to(TYPES[heads.of]))
    return step


def large_scores(place, heads, sequences):
    """Scores of 2^30 and more that only one token has: its V is the result, exactly."""
    step = Step(place, heads, sequences, 3)
    step.q[:, : heads.heads * heads.dim] = 0
    step.q[:, 3 : heads.heads * heads.dim : heads.dim] = 32768
    for index in range(len(sequences)):
        token = torch.tensor(list(step.tokens(index)), device=place.device)
        at = torch.arange(heads.dim, device=place.device)
        k = torch.where(at == 3, 1024.0 * (rank(token)[:, None] - 20.0), 0.0)
        v = (token[:, None] * 64 + at) / 64
        kv = torch.stack([k] * heads.kv_heads + [v] * heads.kv_heads, 1)
        step.write(index, kv.to(TYPES[heads.of]))
    return step


def rank(token):
    """Tokens below 61 in another order."""
    return token * 7 % 61


def check_large_scores(step, y):
    heads, row = step.heads, 0
    for length, queries in step.sequences:
        for position in range(length - queries, length):
            winner = max(range(heads.seen(position), position + 1), key=rank)
            exact = (winner * 64 + torch.arange(heads.dim, device=y.device)) / 64
            exact = exact.to(y.dtype).repeat(heads.heads)
            check(bool((y[row] == exact).all()), f"position {position} is not V of token {winner}")
            row += 1
