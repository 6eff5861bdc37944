"""gemv: the product of a few rows with a matrix."""

import torch

from values import ROUNDING, TYPES, Random, check_same, check_within, check, is_poison, poisoned

from .case import Case


def launch_gemv(place, of, x, weight, bias, y, threads=None):
    """`y` is [rows, stride or more], of 16 bits or f32."""
    (m, k), n = x.shape, weight.shape[0]
    threads = threads or min(max(-(-k // 8 // 32) * 32, 32), 256)
    wide = y.dtype == torch.float32
    arguments = [x, weight, bias, None if wide else y, y if wide else None, n, k, y.shape[1]]
    place.launch(f"gemv_{m}_{of}", [-(-n // 4)], threads, arguments)
    return threads


def gemv(place, of, m, n, k, with_bias, threads=None):
    random = Random(place, n * 7 + k)
    x, weight = random.elements(of, 8, k)[:m], random.elements(of, n, k)
    bias = random.elements(of, n) if with_bias else None
    shares = {}
    for name, dtype in [("narrow", of), ("wide", torch.float32)]:
        y = poisoned(place, dtype, m, n + 3)
        used = launch_gemv(place, of, x, weight, bias, y, threads)
        exact = x.double() @ weight.double().T
        size = x.double().abs() @ weight.double().abs().T
        exact = exact + (bias.double() if with_bias else 0)
        # A term goes through its share of a thread's sums, and those of warps.
        most = (k / used + 24) * size * 2.0**-24 + 1e-30
        most = most + (exact.abs() * ROUNDING[of] if name == "narrow" else 0)
        shares[name] = check_within(name, y[:, :n], exact, most)
        check(is_poison(y[:, n:]), "something lies between rows")
    return {"share": max(shares.values())}


def alone(place, of):
    """A row is the same bits whatever the others are, and however many."""
    random, n, k = Random(place, 1), 9, 2056
    x, weight, bias = random.elements(of, 8, k), random.elements(of, n, k), random.elements(of, n)

    def run(rows):
        y = poisoned(place, torch.float32, len(rows), n)
        launch_gemv(place, of, rows.contiguous(), weight, bias, y, threads=64)
        return y

    single = torch.cat([run(x[row : row + 1]) for row in range(8)])
    for m in range(2, 9):
        for first in [0, 8 - m]:
            check_same(f"{m} rows from {first}", run(x[first : first + m]), single[first : first + m])


def cases(large):
    for of in TYPES:
        for m in range(1, 9):
            shapes = [(1, 8, m % 2 == 0, 32), (7, 1032, True, 64), (33, 576, False, 128)]
            # The shapes of an 8B model's layers, as the engine launches them.
            shapes += [(6144, 4096, m % 2 == 1, None), (4096, 14336, False, None)] * large
            for n, k, bias, threads in shapes:
                yield Case(f"gemv {of} {m}x{n}x{k}{' bias' * bias}",
                           lambda place, a=(of, m, n, k, bias, threads): gemv(place, *a),
                           (n, m % 3) == (7, 0))
        for m, n, k, bias in [(1, 5, 14336, False), (8, 6, 4104, True)]:
            yield Case(f"gemv {of} {m}x{n}x{k}{' bias' * bias}",
                       lambda place, a=(of, m, n, k, bias): gemv(place, *a))
        yield Case(f"gemv {of} a row alone", lambda place, of=of: alone(place, of))
