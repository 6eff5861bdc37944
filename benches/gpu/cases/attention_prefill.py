"""attention_prefill: chunks of prompts, ragged."""

from values import TYPES, check, check_same, is_poison

from . import attention_decode
from .attention import Heads, Step, check_large_scores, large_scores, large_values
from .case import Case

THREADS = 128
# Queries of a tile, and rows of K and V beside them in shared memory.
ROWS, RING_ROWS = 128, 3 * 64


def launch_prefill(place, heads, buffers, seqs, rows, spare_tiles=0):
    """`buffers`: q, one layer of the cache, first rows, lengths, tables, y, and the width of tables."""
    *addresses, table_stride = buffers
    arguments = [*addresses, seqs, heads.q_stride, table_stride, heads.kv_heads, heads.group,
                 heads.window, heads.scale]
    tiles = rows * heads.group // ROWS + seqs + spare_tiles
    place.launch(f"attention_prefill_{heads.of}_{heads.dim}", [heads.kv_heads, tiles], THREADS,
                 arguments, shared_bytes=(ROWS + RING_ROWS) * heads.dim * 2)


def run(step, spare_tiles=0, first=0):
    """Without the sequences before `first`, whose rows another kernel would take."""
    place, y, starts = step.place, step.y(), [0]
    for _, queries in step.sequences:
        starts.append(starts[-1] + queries)
    of = slice(first, None)
    buffers = [step.q, step.cache, place.words(starts[of]), step.lengths(of), step.tables(of), y,
               len(step.table[0])]
    launch_prefill(place, step.heads, buffers, len(step.sequences) - first, starts[-1], spare_tiles)
    return y


def prefill(place, heads, sequences):
    seed = sum(length + queries for length, queries in sequences)
    step = Step(place, heads, sequences, seed + heads.group)
    return step.check(run(step, seed % 3))


def chunks(place, window):
    """Bit for bit: a prompt at once, and in chunks of any size beside others."""
    heads = Heads("bf16", 64, 1, 2, window)
    whole = Step(place, heads, [(150, 150), (90, 9)], 6)
    at_once, length = run(whole), 0
    for queries in [37, 1, 26, 65, 21]:
        length += queries
        y = run(whole.part([(1, (90, 9)), (0, (length, queries))]), 1)
        check_same(f"up to {length}", y[9 : 9 + queries], at_once[length - queries : length])
        check_same(f"beside {length}", y[:9], at_once[150:159])


def rows_in_front(place):
    """The rows of decodes come first in a step, and are not prefill's."""
    heads = Heads("bf16", 64, 1, 7)
    step = Step(place, heads, [(9, 1)] * 40 + [(60, 30), (20, 20)], 2)
    y = run(step, first=40)
    check(is_poison(y[:40]), "rows of decodes are written")
    return step.part([(40, (60, 30)), (41, (20, 20))]).check(y[40:])


def as_decode(place, of, dim, window):
    """Rows of one token by both kernels, within the bound of the same reference."""
    heads = Heads(of, dim, 2, 4, window)
    step = Step(place, heads, [(1, 1), (64, 1), (200, 1), (333, 1)], 8)
    step.check(attention_decode.run(step, 2))
    return step.check(run(step))


def extremes(place, of, dim):
    step = large_scores(place, Heads(of, dim, 1, 4, 20), [(61, 40), (16, 16)])
    check_large_scores(step, run(step))
    step = large_values(place, Heads(of, dim, 1, 4), [(150, 20)])
    return step.check(run(step))


def plain_cases(of, dim):
    yield Heads(of, dim, 1, 1), [(1, 1)]
    yield Heads(of, dim, 2, 3), [(70, 45), (0, 0), (33, 1), (16, 16), (40, 0)]
    yield Heads(of, dim, 1, 1), [(200, 200)]
    yield Heads(of, dim, 1, 4), [(150, 33), (17, 15), (300, 3)]


def mixed_cases():
    for group in range(1, 9):
        yield Heads("bf16", 64, 1, group), [(group, 1), (62 + group, 40), (31 * group, 7)]
    yield Heads("bf16", 64, 1, 2), [(0, 0)]
    yield Heads("bf16", 64, 1, 2), [(0, 0), (65, 64), (0, 0), (0, 0)]
    many = [(at * 37 % 83, min(at * 37 % 83, at % 4)) for at in range(65)]
    yield Heads("bf16", 64, 1, 5), many
    for edge in [15, 16, 17, 63, 64, 65, 127, 128, 129]:
        yield Heads("bf16", 64, 1, 1), [(edge, edge), (edge + 1, 1)]
    for of, dim in [("bf16", 128), ("f16", 64)]:
        for window in [1, 7, 16, 17, 64, 65, 1000]:
            yield Heads(of, dim, 1, 3, window), [(131, 50), (66, 1), (80, 16)]
        yield Heads(of, dim, 1, 1, 90), [(300, 140)]


def large_cases():
    for of in TYPES:
        for window in [0, 1024]:
            yield Heads(of, 128, 8, 4, window), [(2048, 2048), (5001, 333), (17, 17)]
            yield Heads(of, 64, 4, 8, window), [(1999, 1999), (4096, 1)]


def cases(large):
    tables = [plain_cases(of, dim) for of in TYPES for dim in [64, 128]] + [mixed_cases()]
    for table in tables + [large_cases()] * large:
        for heads, sequences in table:
            yield Case(f"attention_prefill {heads}, {len(sequences)} of {sequences[:3]}",
                       lambda place, a=(heads, sequences): prefill(place, *a),
                       heads.group == 3 and len(sequences) == 5)
    for window in [0, 50]:
        yield Case(f"attention_prefill in chunks, window {window}",
                   lambda place, window=window: chunks(place, window))
    yield Case("attention_prefill behind decodes", rows_in_front)
    for of in TYPES:
        for dim, window in [(64, 0), (128, 100)]:
            yield Case(f"attention_prefill as decode {of} dim {dim}, window {window}",
                       lambda place, a=(of, dim, window): as_decode(place, *a))
        for dim in [64, 128]:
            yield Case(f"attention_prefill extremes {of} dim {dim}",
                       lambda place, a=(of, dim): extremes(place, *a))
