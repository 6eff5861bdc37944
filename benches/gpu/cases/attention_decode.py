"""attention_decode and attention_combine: one query a sequence, in splits."""

import torch

from values import TYPES, check_same, poisoned

from .attention import Heads, Step, check_large_scores, large_scores, large_values
from .case import Case

THREADS = 128
# As src/ops/place.rs has them.
CHUNK_BLOCKS = 8
BLOCKS_A_MULTIPROCESSOR = 4
SPLITS_MAX = 64

EDGES = [1, 2, 15, 16, 17, 0, 31, 32, 33, 47, 63, 64, 65, 100]


def planned_splits(place, rows, kv_heads):
    wanted = -(-place.multiprocessors * BLOCKS_A_MULTIPROCESSOR // (rows * kv_heads))
    return min(max(wanted, 1), SPLITS_MAX)


def launch_decode(place, heads, buffers, rows, splits, chunk_blocks):
    """`buffers`: q, one layer of the cache, lengths, tables, y, partial, stats, and the width of tables."""
    q, cache, lengths, tables, y, partial, stats, table_stride = buffers
    name, window = f"{heads.of}_{heads.dim}", heads.window
    arguments = [q, cache, lengths, tables, y, partial, stats, heads.q_stride, table_stride,
                 heads.kv_heads, heads.group, chunk_blocks, window, heads.scale]
    place.launch(f"attention_decode_{name}", [heads.kv_heads, rows, splits], THREADS, arguments)
    if splits > 1:
        arguments = [partial, stats, lengths, y, splits, chunk_blocks, window, heads.scale]
        place.launch(f"attention_combine_{name}", [heads.heads, rows], THREADS, arguments)


def run(step, splits, chunk_blocks=4):
    place, heads, rows = step.place, step.heads, len(step.sequences)
    y = step.y()
    partial = poisoned(place, torch.float32, rows, heads.heads, splits, heads.dim)
    stats = poisoned(place, torch.float32, rows, heads.heads, splits, 2)
    buffers = [step.q, step.cache, step.lengths(), step.tables(), y, partial, stats,
               len(step.table[0])]
    launch_decode(place, heads, buffers, rows, splits, chunk_blocks)
    return y


def decode(place, heads, lens, splits=None, chunk_blocks=CHUNK_BLOCKS):
    step = Step(place, heads, [(length, 1) for length in lens], sum(lens) + heads.group)
    splits = splits or planned_splits(place, len(lens), heads.kv_heads)
    return step.check(run(step, splits, chunk_blocks))


def alone(place, window):
    """A row is the same bits whatever is beside it."""
    heads, lens = Heads("bf16", 64, 2, 3, window), [300, 1, 0, 64, 65, 299, 150]
    step = Step(place, heads, [(length, 1) for length in lens], 9)
    together = run(step, 2)
    for row, sequence in enumerate(step.sequences):
        check_same(f"row {row}", run(step.part([(row, sequence)]), 2)[0], together[row])


def extremes(place, of, dim):
    for splits in [1, 2]:
        step = large_scores(place, Heads(of, dim, 1, 4, 20), [(length, 1) for length in [1, 16, 40, 61]])
        check_large_scores(step, run(step, splits))
    step = large_values(place, Heads(of, dim, 1, 4), [(1, 1), (70, 1), (500, 1)])
    return step.check(run(step, 2))


def plain_cases(of, dim):
    yield Heads(of, dim, 1, 1), [1], 1, 4
    yield Heads(of, dim, 1, 1), [0], 3, 4
    yield Heads(of, dim, 2, 3), EDGES, 1, 4
    yield Heads(of, dim, 2, 8), EDGES, 2, 4
    yield Heads(of, dim, 1, 7), [777, 5, 448, 449], 3, 4
    yield Heads(of, dim, 1, 4), [1030], 70, 4
    yield Heads(of, dim, 1, 2), [600, 129], 2, 8
    # As the engine plans it.
    yield Heads(of, dim, 3, 3), [333, 1, 90], None, CHUNK_BLOCKS


def mixed_cases():
    for group in range(1, 9):
        yield Heads("bf16", 64, 1, group), [3 * group + 60, 5, 71 * group], 2, 4
    many = [row * 37 % 83 for row in range(65)]
    yield Heads("bf16", 64, 1, 5), many, 2, 4
    yield Heads("bf16", 64, 1, 6, 9), many, 2, 4
    for of, dim in [("bf16", 128), ("f16", 64)]:
        for window, splits in [(1, 1), (1, 5), (7, 2), (15, 1), (16, 3), (17, 2), (32, 1), (64, 2)]:
            yield Heads(of, dim, 1, 3, window), EDGES, splits, 4
        yield Heads(of, dim, 1, 4, 300), [1001, 299, 300, 301, 640], 3, 4
        yield Heads(of, dim, 1, 4, 5000), [401], 4, 8


def large_cases():
    """Shapes of real models, as the engine plans them."""
    for of in TYPES:
        for rows in [1, 65]:
            lens = [(row * 577 + 4001) % 8192 for row in range(rows)]
            yield Heads(of, 128, 8, 4), lens, None, CHUNK_BLOCKS
            yield Heads(of, 128, 8, 4, 1024), lens, None, CHUNK_BLOCKS
            yield Heads(of, 64, 4, 8), lens, None, CHUNK_BLOCKS


def cases(large):
    tables = [plain_cases(of, dim) for of in TYPES for dim in [64, 128]] + [mixed_cases()]
    for table in tables + [large_cases()] * large:
        for heads, lens, splits, chunk in table:
            name = f"attention_decode {heads}, {len(lens)} from {lens[0]}, {splits or 'planned'} splits"
            yield Case(name, lambda place, a=(heads, lens, splits, chunk): decode(place, *a),
                       heads.group in (7, 8) and lens[0] in (1, 777))
    for window in [0, 100]:
        yield Case(f"attention_decode a row alone, window {window}",
                   lambda place, window=window: alone(place, window))
    for of in TYPES:
        for dim in [64, 128]:
            yield Case(f"attention_decode extremes {of} dim {dim}",
                       lambda place, a=(of, dim): extremes(place, *a))
