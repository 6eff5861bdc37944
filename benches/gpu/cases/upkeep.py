"""Kernels around the forward: block_copy, advance, unpack, fill."""

import struct

import torch

from place import U64
from values import TYPES, Random, check, check_near, check_same, is_poison, poisoned

from .case import Case

BLOCK_TOKENS = 16
LAYERS, BLOCKS = 3, 9
# Bytes of `Segment` of unpack.cu.
SEGMENT_BYTES = 24


def launch_block_copy(place, cache, pairs, layers, blocks, block_bytes, count, parts):
    arguments = [cache, pairs, U64(blocks), block_bytes, count]
    place.launch("block_copy", [parts, layers], 256, arguments)


def block_copy(place, pairs, block_bytes, parts):
    random = Random(place, block_bytes)
    cache = random.below(256, LAYERS, BLOCKS, block_bytes).to(torch.uint8).to(place.device)
    exact = cache.clone()
    for source, to in pairs:
        exact[:, to] = exact[:, source]
    flat = place.words([block for pair in pairs for block in pair] or [0])
    launch_block_copy(place, cache, flat, LAYERS, BLOCKS, block_bytes, len(pairs), parts)
    check_same("cache", cache, exact)


def advance(place, lens, stride):
    seqs, random = len(lens), Random(place, len(lens))
    tables, counts = random.below(1000, seqs, stride).tolist(), random.below(stride + 1, seqs).tolist()
    new_lens, positions = place.words(lens), place.words([9999] * seqs)
    slots = torch.full([seqs], -77, dtype=torch.int64, device=place.device)
    table = place.words([block for row in tables for block in row])
    arguments = [new_lens, positions, slots, table, place.words(counts), stride, seqs]
    place.launch("advance", [-(-seqs // 32)], 32, arguments)
    found = list(zip(new_lens.tolist(), positions.tolist(), slots.tolist()))
    for seq, length in enumerate(lens):
        block, exact = length // BLOCK_TOKENS, (0, 9999, -77)
        if length > 0:
            slot = -1
            if block < counts[seq]:
                slot = tables[seq][block] * BLOCK_TOKENS + length % BLOCK_TOKENS
            exact = (length + 1, length, slot)
        check(found[seq] == exact, f"sequence {seq} of {lens}: {found[seq]} for {exact}")


def unpack(place, arrays, parts):
    """`arrays`: words, words of a row, and words from one row to the next where they go."""
    random, head = Random(place, len(arrays)), SEGMENT_BYTES // 4 * len(arrays)
    segments, words, places = b"", [], []
    for count, row, stride in arrays:
        to = poisoned(place, torch.int32, -(-count // row) * stride + 1)
        segments += struct.pack("<QIIII", to.data_ptr(), head + len(words), count, row, stride)
        values = random.below(1 << 31, count)
        words += values.tolist()
        places.append((to, values.int().to(place.device)))
    data = torch.frombuffer(bytearray(segments), dtype=torch.int32).to(place.device)
    packet = torch.cat([data, place.words(words)])
    place.launch("unpack", [parts, len(arrays)], 256, [packet])
    for (count, row, stride), (to, values) in zip(arrays, places):
        exact = poisoned(place, torch.int32, len(to))
        at = torch.arange(count, device=place.device)
        exact[at // row * stride + at % row] = values
        check_same(f"{count} words in rows of {row}", to, exact)


def mixed(x):
    """lowbias32 of words in integers of 64 bits."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def launch_fill(place, of, to, count, seed, size, blocks):
    place.launch(f"fill_{of}", [blocks], 256, [to, U64(count), seed, size])


def fill(place, of, count, seed, blocks):
    to = poisoned(place, of, count + 8)
    launch_fill(place, of, to, count, seed, 0.02, blocks)
    index = torch.arange(count, dtype=torch.int64, device=place.device)
    words = mixed(mixed(torch.tensor(seed, device=place.device)) ^ index)
    exact = (words.double() * 2.0**-31 - 1) * 0.02
    check_near("values", of, to[:count], exact)
    check(is_poison(to[count:]), "more than asked for is written")
    # Even values within `size`: their mean and their square's are those of a uniform.
    if count > 1 << 15:
        mean, square = float(exact.mean()) / 0.02, float(exact.square().mean()) / 0.02**2
        check(abs(mean) < 0.02 and abs(square - 1 / 3) < 0.02, f"mean {mean}, square {square}")


def cases(large):
    for pairs, block_bytes, parts in [
        ([], 4096, 1),
        ([(0, 8)], 16, 1),
        ([(1, 2), (2, 3), (1, 4), (8, 1)], 4096, 3),
        ([(5, 5), (7, 0)], 2064, 2),
    ] + [([(block, block + 1) for block in range(8)], 1 << 20, 64)] * large:
        yield Case(f"block_copy {len(pairs)} pairs of {block_bytes}",
                   lambda place, a=(pairs, block_bytes, parts): block_copy(place, *a),
                   len(pairs) == 4)
    for lens, stride in [([1], 1), ([0], 1), ([15, 16, 17, 0, 31, 32, 47], 3), (list(range(65)), 5)]:
        yield Case(f"advance {len(lens)} from {lens[0]}",
                   lambda place, a=(lens, stride): advance(place, *a), len(lens) == 7)
    for arrays, parts in [
        ([(1, 1, 1)], 1),
        ([(65, 1, 1), (12, 3, 7), (1, 1, 1), (600, 40, 40)], 2),
        ([(5000, 50, 64)] * 9, 20),
    ]:
        yield Case(f"unpack {len(arrays)} arrays in {parts} parts",
                   lambda place, a=(arrays, parts): unpack(place, *a), len(arrays) == 4)
    for of in TYPES:
        for count, seed, blocks in [(8, 0, 1), (4104, 7, 3), (1 << 16, 0xFFFFFFFF, 5)]:
            yield Case(f"fill {of} {count}",
                       lambda place, of=of, a=(count, seed, blocks): fill(place, of, *a), count == 4104)
