"""How fast kernels run at the shapes of an 8B model, against what torch reaches on the same device."""

import statistics
import time

import torch

from cases import attention_decode, attention_prefill, cache, gemv, logprobs, rows, sampling, upkeep
from cases.attention import Heads
from cases.case import Case
from values import TYPES, Random

OF = "bf16"
ROUNDS, WARM_ROUNDS = 7, 2
# Launches of a round: their buffers together are larger than any second-level cache.
ROTATED_BYTES, ROTATIONS_MAX = 512 << 20, 1024


class Sizes:
    """Of Llama-3.1-8B, or of next to nothing where kernels are emulated."""

    def __init__(self, large):
        self.large = large
        self.hidden, self.mlp, self.vocab = (4096, 14336, 128256) if large else (64, 96, 301)
        self.heads = Heads(OF, 128, 8, 4) if large else Heads(OF, 64, 1, 2)
        self.context = 4096 if large else 40
        self.copy_bytes, self.square = (1 << 30, 8192) if large else (1 << 12, 32)


def seconds_of(place, launches):
    """Of one launch, the median of rounds; each round runs all of `launches`, on a GPU as a graph."""
    for launch in launches:
        launch()
    place.synchronize()
    if not place.is_gpu:
        begun = time.perf_counter()
        launches[0]()
        return time.perf_counter() - begun
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(WARM_ROUNDS + ROUNDS):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended) * 1e-3 / len(launches))
    return statistics.median(times[WARM_ROUNDS:])


def ceiling(place, kind):
    """Bytes read and written per second, or operations."""
    sizes = Sizes(place.is_gpu)
    if kind == "copy":
        source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=place.device)
        to = torch.empty_like(source)
        return {"gb_per_s": 2 * sizes.copy_bytes / seconds_of(place, [lambda: to.copy_(source)]) / 1e9}
    x, w = (elements(place, sizes.square, sizes.square) for _ in range(2))
    y = torch.empty_like(x)
    seconds = seconds_of(place, [lambda: torch.matmul(x, w, out=y)])
    return {"tflop_per_s": 2 * sizes.square**3 / seconds / 1e12}


def measure(place, make, work):
    """`make` gives a launch with buffers of its own; `work` is bytes and operations of each."""
    moved, operations = work
    count = min(max(2, ROTATED_BYTES // max(moved, 1)), ROTATIONS_MAX) if place.is_gpu else 2
    seconds = seconds_of(place, [make() for _ in range(count)])
    # Each against its own floor: the slower of the two is what bounds the kernel.
    return {"microseconds": seconds * 1e6, "gb_per_s": moved / seconds / 1e9,
            "tflop_per_s": operations / seconds / 1e12}


def elements(place, *shape):
    return torch.randn(shape, dtype=TYPES[OF], device=place.device)


def row_kernels(place, kernel, count):
    sizes = Sizes(place.is_gpu)
    hidden, mlp = sizes.hidden, sizes.mlp
    if kernel == "rms_norm":
        weight = elements(place, hidden)

        def make():
            h, x, y = (elements(place, count, hidden) for _ in range(3))
            return lambda: rows.launch_rms_norm(place, OF, h, x, weight, y, count)

        return measure(place, make, (8 * count * hidden, 0))
    if kernel == "silu_mul":
        def make():
            gate_up, y = elements(place, count, 2 * mlp), elements(place, count, mlp)
            return lambda: rows.launch_silu_mul(place, OF, gate_up, y, count)

        return measure(place, make, (6 * count * mlp, 0))
    table, ids = elements(place, sizes.vocab, hidden), Random(place, 1).below(sizes.vocab, count)
    words = ids.int().to(place.device)

    def make():
        y = elements(place, count, hidden)
        if kernel == "embed":
            return lambda: rows.launch_embed(place, OF, table, words, words, words, y)
        return lambda: rows.launch_gather_rows(place, OF, table, words, y)

    return measure(place, make, (4 * count * hidden, 0))


def rope(place, count):
    heads, blocks = Sizes(place.is_gpu).heads, -(-count // 16)
    table = cache.angles(place, count, heads.dim)
    positions = torch.arange(count, dtype=torch.int32, device=place.device)
    slots = torch.arange(count, dtype=torch.int64, device=place.device)

    def make():
        qkv = elements(place, count, heads.q_stride)
        kv = elements(place, blocks, 2 * heads.kv_heads, 16, heads.dim)
        return lambda: cache.launch_rope(place, OF, heads.dim, qkv, kv, table, positions, slots,
                                         (None, None), heads.heads, heads.kv_heads)

    q, kv = heads.heads * heads.dim, 2 * heads.kv_heads * heads.dim
    return measure(place, make, (2 * count * (2 * q + 2 * kv), 0))


def product(place, count, n, k):
    def make():
        x, weight, y = elements(place, count, k), elements(place, n, k), elements(place, count, n)
        return lambda: gemv.launch_gemv(place, OF, x, weight, None, y)

    return measure(place, make, (2 * (n * k + count * (n + k)), 2 * count * n * k))


def paged(place, heads, seqs, length):
    """One layer of a cache, and tables without order."""
    blocks = -(-length // 16)
    kv = elements(place, seqs * blocks, 2 * heads.kv_heads, 16, heads.dim)
    order = torch.randperm(seqs * blocks, generator=torch.Generator().manual_seed(1))
    lengths = torch.full([seqs], length, dtype=torch.int32, device=place.device)
    return kv, lengths, order.int().to(place.device), blocks


def decode(place, seqs, length):
    heads = Sizes(place.is_gpu).heads
    splits = attention_decode.planned_splits(place, seqs, heads.kv_heads)

    def make():
        kv, lengths, tables, stride = paged(place, heads, seqs, length)
        q, y = elements(place, seqs, heads.q_stride), elements(place, seqs, heads.heads * heads.dim)
        partial, stats = (torch.empty(seqs * heads.heads * splits * width, device=place.device)
                          for width in (heads.dim, 2))
        buffers = [q, kv, lengths, tables, y, partial, stats, stride]
        return lambda: attention_decode.launch_decode(place, heads, buffers, seqs, splits,
                                                      attention_decode.CHUNK_BLOCKS)

    width = heads.heads * heads.dim
    moved = 2 * seqs * (2 * length * heads.kv_heads * heads.dim + 2 * width)
    return measure(place, make, (moved, 4 * seqs * length * width))


def prefill(place, seqs, length, queries):
    heads = Sizes(place.is_gpu).heads
    starts = place.words([seq * queries for seq in range(seqs + 1)])

    def make():
        kv, lengths, tables, stride = paged(place, heads, seqs, length)
        q, y = (elements(place, seqs * queries, width) for width in
                (heads.q_stride, heads.heads * heads.dim))
        buffers = [q, kv, starts, lengths, tables, y, stride]
        return lambda: attention_prefill.launch_prefill(place, heads, buffers, seqs, seqs * queries)

    pairs = seqs * sum(range(length - queries + 1, length + 1))
    width = heads.heads * heads.dim
    moved = 2 * seqs * (2 * length * heads.kv_heads * heads.dim + 2 * queries * width)
    return measure(place, make, (moved, 4 * pairs * width))


def draw(place, count, **parameters):
    vocab = Sizes(place.is_gpu).vocab
    seat = sampling.Seat(**parameters)
    logits = torch.randn(count, vocab) * 3

    def make():
        seats = sampling.Seats(place, logits, count, [])
        seats.begin([(slot, seat) for slot in range(count)], [0] * count)
        return seats.prepared([(row, row, 9, []) for row in range(count)])[0]

    return measure(place, make, (4 * count * vocab, 0))


def score(place, count, top):
    vocab = Sizes(place.is_gpu).vocab
    columns = [place.words(column) for column in
               (range(count), [top] * count, [5] * count, [0] * count)]

    def make():
        wide = logprobs.padded(place, torch.randn(count, vocab))
        return logprobs.prepared(place, wide, vocab, columns, place.words([0]))[0]

    return measure(place, make, (4 * count * vocab, 0))


def fill(place):
    count = Sizes(place.is_gpu).copy_bytes // 2
    to, blocks = elements(place, count), min(-(-count // 2048), 4096)

    def make():
        return lambda: upkeep.launch_fill(place, OF, to, count, 1, 0.02, blocks)

    return measure(place, make, (2 * count, 0))


def table(large):
    """The ceilings come first: everything else is said in percent of them."""
    sizes = Sizes(large)
    for kind in ["copy", "matmul"]:
        yield Case(f"ceiling {kind}", lambda place, kind=kind: ceiling(place, kind))
    for count in [1, 256, 4096] if large else [3]:
        for kernel in ["embed", "rms_norm", "silu_mul", "gather_rows"]:
            yield Case(f"speed {kernel} {count} rows",
                       lambda place, a=(kernel, count): row_kernels(place, *a))
        yield Case(f"speed rope {count} rows", lambda place, count=count: rope(place, count))
    hidden, mlp, stride = sizes.hidden, sizes.mlp, sizes.heads.q_stride
    for count in [1, 2, 4, 8] if large else [1, 3]:
        for n, k in [(stride, hidden), (2 * mlp, hidden), (hidden, mlp), (sizes.vocab, hidden)]:
            yield Case(f"speed gemv {count}x{n}x{k}",
                       lambda place, a=(count, n, k): product(place, *a))
    for seqs in [1, 8, 64, 256] if large else [2]:
        for length in [128, 1024, sizes.context] if large else [sizes.context]:
            yield Case(f"speed attention_decode {seqs} of {length}",
                       lambda place, a=(seqs, length): decode(place, *a))
    for seqs, length, queries in [(1, 512, 512), (1, 2048, 2048), (1, 8192, 2048), (8, 512, 256)] \
            if large else [(2, 40, 20)]:
        yield Case(f"speed attention_prefill {seqs} of {length}, {queries} queries",
                   lambda place, a=(seqs, length, queries): prefill(place, *a))
    for name, parameters in [("greedy", {"temperature": 0.0}), ("noise", {}),
                             ("top-p", {"top_p": 0.95}), ("top-k", {"top_k": 50, "temperature": 0.7})]:
        for count in [1, 64, 256] if large else [2]:
            yield Case(f"speed sample {name} {count} rows",
                       lambda place, c=count, p=parameters: draw(place, c, **p))
    for count, top in [(1, 0), (64, 20)] if large else [(2, 20)]:
        yield Case(f"speed logprobs {count} rows, {top} best",
                   lambda place, a=(count, top): score(place, *a))
    yield Case("speed fill", fill)
