"""rope, with the norm of heads and the write of K and V to the paged cache."""

import torch

from values import TYPES, ROUNDING, Random, check, check_same, check_within, is_poison, poisoned

from .case import Case

BLOCK_TOKENS = 16
PAD_SLOT = -1
POSITIONS = 70
BLOCKS = 9
EPS = 1e-6


def launch_rope(place, of, dim, qkv, cache, table, positions, slots, norms, heads, kv_heads,
                parts=None, threads=256):
    parts = parts or -(-qkv.shape[1] // 16 // threads)
    arguments = [qkv, cache, table, positions, slots, *norms, heads, kv_heads, EPS]
    place.launch(f"rope_{of}_{dim}", [len(slots), parts], threads, arguments)


def angles(place, positions, dim):
    """[positions, dim]: cosines, then sines, of frequencies that fall."""
    frequencies = 0.9 ** torch.arange(dim // 2, dtype=torch.float64)
    turns = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([turns.cos(), turns.sin()], 1).float().to(place.device)


def normalised(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


def rotated(x, table):
    """`x` is [rows, heads, dim]; `table` [rows, dim]."""
    (a, b), (cos, sin) = x.chunk(2, -1), table.double()[:, None].chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def near(what, of, ours, exact):
    """A rotation cancels, so that its error is relative to what it rotates."""
    largest = exact.abs().amax(-1, keepdim=True)
    return check_within(what, ours, exact, exact.abs() * (ROUNDING[of] + 1e-5) + largest * 1e-5)


def rope(place, of, dim, heads, kv_heads, slots, norm, parts):
    rows, every = len(slots), heads + 2 * kv_heads
    random = Random(place, rows * every * dim)
    qkv = random.elements(of, rows, every * dim)
    norms = [random.elements(of, dim) if norm else None for _ in range(2)]
    positions = random.below(POSITIONS, rows).int().to(place.device)
    table = angles(place, POSITIONS, dim)
    cache = poisoned(place, of, BLOCKS, 2 * kv_heads, BLOCK_TOKENS, dim)
    before = qkv.clone().view(rows, every, dim)
    slot_words = torch.tensor(slots, dtype=torch.int64, device=place.device)
    launch_rope(place, of, dim, qkv, cache, table, positions, slot_words, norms, heads, kv_heads,
                parts, threads=64)
    after, exact = qkv.view(rows, every, dim), before.double()
    q, k, v = exact.split([heads, kv_heads, kv_heads], 1)
    if norm:
        q, k = normalised(q, norms[0]), normalised(k, norms[1])
    turned = table[positions.long()]
    share = near("q", of, after[:, :heads], rotated(q, turned))
    check_same("k and v in their row", after[:, heads:], before[:, heads:])
    written = torch.cat([rotated(k, turned), v], 1)
    for row, slot in enumerate(slots):
        if slot != PAD_SLOT:
            place_of = cache[slot // BLOCK_TOKENS, :, slot % BLOCK_TOKENS]
            share = max(share, near(f"slot of row {row}", of, place_of, written[row]))
            place_of.copy_(poisoned(place, of, 2 * kv_heads, dim))
    check(is_poison(cache), "something else was written")
    return {"share": share}


def cases(large):
    del large
    for of in TYPES:
        for dim in [64, 128]:
            for norm in [False, True]:
                for heads, kv_heads, slots, parts in [
                    (1, 1, [0], 1),
                    (9, 3, [15, 16, PAD_SLOT, 143, 17], 1),
                    (8, 1, [PAD_SLOT], 1),
                    (7, 7, [142 - 2 * row for row in range(65)], 2),
                ]:
                    yield Case(
                        f"rope {of} dim {dim}, {heads}/{kv_heads} heads, {len(slots)} rows"
                        f"{', norm' * norm}",
                        lambda place, a=(of, dim, heads, kv_heads, slots, norm, parts):
                        rope(place, *a), heads == 9)
