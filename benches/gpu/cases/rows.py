"""Kernels that take a row at a time: embed, rms_norm, silu_mul, gather_rows."""

import torch

from values import TYPES, Random, check, check_near, check_same, is_poison, poisoned

from .case import Case

PAD_ROW = TOKEN_FROM_DEVICE = 0xFFFFFFFF
EPS = 1e-5


def launch_embed(place, of, table, ids, slots, sampled, y, threads=256):
    arguments = [table, ids, slots, sampled, y, *table.shape]
    place.launch(f"embed_{of}", [len(ids)], threads, arguments)


def launch_rms_norm(place, of, h, residual, weight, y, rows, threads=None):
    cols = h.shape[1]
    threads = threads or -(-cols // 16 // 32) * 32 or 32
    arguments = [h, residual, weight, y, cols, EPS]
    place.launch(f"rms_norm_{of}", [rows], threads, arguments)


def launch_silu_mul(place, of, gate_up, y, rows, parts=None):
    size = y.shape[1]
    arguments = [gate_up, y, size]
    place.launch(f"silu_mul_{of}", [parts or -(-size // 2048), rows], 256, arguments)


def launch_gather_rows(place, of, x, wanted, y):
    place.launch(f"gather_rows_{of}", [len(wanted)], 256, [x, wanted, y, x.shape[1]])


def embed(place, of, ids, slots, hidden, vocab=11):
    sampled = [3, 10, 0]
    table = Random(place, hidden).elements(of, vocab, hidden)
    y = poisoned(place, of, len(ids) + 1, hidden)
    launch_embed(place, of, table, place.words(ids), place.words(slots), place.words(sampled), y)
    for row, (token, slot) in enumerate(zip(ids, slots)):
        token = sampled[slot] if token == TOKEN_FROM_DEVICE else token
        if token < vocab:
            check_same(f"row {row}", y[row], table[token])
        else:
            check(bool(y[row].isnan().all()), f"row {row} has no token")
    check(is_poison(y[len(ids)]), "a row too many")


def rms_norm(place, of, rows, cols, residual, threads=None):
    random = Random(place, rows * cols)
    # A row more than the grid has, which must stay as it is.
    h, x = random.elements(of, rows + 1, cols), random.elements(of, rows, cols)
    weight, y = random.elements(of, cols), poisoned(place, of, rows + 1, cols)
    before = h.clone()
    launch_rms_norm(place, of, h, x if residual else None, weight, y, rows, threads)
    sums = before[:rows].double() + (x.double() if residual else 0)
    # The sum is rounded before the norm sees it.
    sums = sums.to(TYPES[of]).double()
    check_same("h", h[:rows].double(), sums)
    exact = sums * (sums.square().mean(1, keepdim=True) + EPS).rsqrt() * weight.double()
    share = check_near("y", of, y[:rows], exact)
    check_same("h of no row", h[rows], before[rows])
    check(is_poison(y[rows]), "a row too many")
    return {"share": share}


def silu_mul(place, of, rows, size, parts=None):
    gate_up = Random(place, size).elements(of, rows, 2, size)
    y = poisoned(place, of, rows + 1, size)
    launch_silu_mul(place, of, gate_up, y, rows, parts)
    exact = torch.nn.functional.silu(gate_up[:, 0].double()) * gate_up[:, 1].double()
    share = check_near("y", of, y[:rows], exact)
    check(is_poison(y[rows]), "a row too many")
    return {"share": share}


def gather_rows(place, of, wanted, rows, cols):
    x, y = Random(place, cols).elements(of, rows, cols), poisoned(place, of, len(wanted), cols)
    launch_gather_rows(place, of, x, place.words(wanted), y)
    for at, row in enumerate(wanted):
        if row == PAD_ROW:
            check(is_poison(y[at]), f"pad {at} is written")
        else:
            check_same(f"row {at}", y[at], x[row])


def cases(large):
    pad, given = PAD_ROW, TOKEN_FROM_DEVICE
    for of in TYPES:
        for count, (ids, slots, hidden) in enumerate([
            ([0], [0], 8),
            ([10, given, 4, given], [9, 1, 9, 2], 576),
            ([11, 5, given - 1], [0] * 3, 1032),
            ([7] * 65, [0] * 65, 64),
        ]):
            yield Case(f"embed {of} {len(ids)}x{hidden}",
                       lambda place, of=of, a=(ids, slots, hidden): embed(place, of, *a), count == 1)
        shapes = [(1, 8, 32), (3, 576, 64), (65, 64, None), (2, 4096, 512), (1, 4104, 288),
                  (1, 16384, None)]
        for rows, cols, threads in shapes + [(257, 8192, None)] * large:
            for residual in [False, True]:
                yield Case(f"rms_norm {of} {rows}x{cols}{' residual' * residual}",
                           lambda place, of=of, a=(rows, cols, residual, threads):
                           rms_norm(place, of, *a), (rows, cols) == (3, 576))
        shapes = [(1, 8, None), (3, 1536, 2), (65, 72, None), (2, 1544, 9)]
        for rows, size, parts in shapes + [(257, 14336, None)] * large:
            yield Case(f"silu_mul {of} {rows}x{size}",
                       lambda place, of=of, a=(rows, size, parts): silu_mul(place, of, *a), rows == 3)
        for wanted, rows, cols in [([0], 1, 8), ([4, pad, 0, 2, pad], 5, 576),
                                   (list(range(64, -1, -1)), 65, 264)]:
            yield Case(f"gather_rows {of} {len(wanted)}x{cols}",
                       lambda place, of=of, a=(wanted, rows, cols): gather_rows(place, of, *a),
                       rows == 5)
