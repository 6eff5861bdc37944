"""logprobs_scan and logprobs: log-softmax of a token and of the most probable ones."""

import torch

from values import POISON_32, Random, check, check_within, poisoned

from .case import Case

PAD = TOKEN_FROM_DEVICE = 0xFFFFFFFF
TOP_MAX = 20
# Tokens of a thread of logprobs_scan.
SCAN_TOKENS = 16
# Lies after a row's end, and would be the most probable.
BEYOND = 3e38
# Slots, and what was drawn for each.
SAMPLED = [5, 0, 1]


def padded(place, logits):
    """[rows, stride], rows at multiples of 4."""
    rows, vocab = logits.shape
    wide = torch.full((rows, -(-vocab // 4) * 4), BEYOND, dtype=torch.float32)
    wide[:, :vocab] = logits
    return wide.to(place.device)


def prepared(place, wide, vocab, columns, sampled, threads=(128, 128)):
    """`columns`: words of rows, tops, tokens and slots. Gives the launches, and what they leave."""
    rows, tops, tokens, slots = columns
    count, stride, parts = len(rows), wide.shape[1], -(-vocab // (threads[0] * SCAN_TOKENS))
    largest, sums = (poisoned(place, torch.float32, count, parts) for _ in range(2))
    picks = poisoned(place, torch.int32, count, parts, TOP_MAX, 2)
    scan = [wide, rows, tops, largest, sums, picks]
    found = [poisoned(place, torch.float32, count), poisoned(place, torch.int32, count, TOP_MAX),
             poisoned(place, torch.float32, count, TOP_MAX)]
    last = [*scan, tokens, slots, sampled, *found, vocab, stride, parts]

    def launch():
        place.launch("logprobs_scan", [parts, count], threads[0], [*scan, vocab, stride])
        place.launch("logprobs", [count], threads[1], last)

    return launch, found


def near(what, ours, exact):
    same = (ours.isnan() & exact.isnan()) | (ours.double() == exact)
    exact = torch.where(same, 0.0, exact)
    return check_within(what, torch.where(same, 0.0, ours.double()), exact, 1e-6 + exact.abs() * 3e-7)


def logprobs(place, logits, wanted, threads):
    """`wanted`: (row, token, slot, top)."""
    vocab = logits.shape[1]
    rows, tokens, slots, tops = zip(*wanted)
    columns = [place.words(column) for column in (rows, tops, tokens, slots)]
    wide = padded(place, logits)
    launch, found = prepared(place, wide, vocab, columns, place.words(SAMPLED), threads)
    launch()
    ours, ids, top_logprobs = (tensor.cpu() for tensor in found)
    bits = [ours.view(torch.int32), ids, top_logprobs.view(torch.int32)]
    exact = torch.log_softmax(logits.double(), 1)
    share = 0.0
    for index, (row, token, slot, top) in enumerate(wanted):
        what = f"{index}: row {row}, token {token}, {top} best"
        if row == PAD:
            check(all(bool((tensor[index] == POISON_32).all()) for tensor in bits), f"{what}: a pad")
            continue
        token = SAMPLED[slot] if token == TOKEN_FROM_DEVICE else token
        nan = torch.tensor(torch.nan, dtype=torch.float64)
        share = max(share, near(what, ours[index], exact[row, token] if token < vocab else nan))
        # Best first, the lowest ids first among equals.
        count = min(top, TOP_MAX, vocab)
        best = logits[row].sort(descending=True, stable=True).indices[:count]
        check(ids[index, :count].tolist() == best.tolist(), f"{what}: {ids[index, :count].tolist()}")
        share = max(share, near(what, top_logprobs[index, :count], exact[row, best]))
        check(all(bool((tensor[index, count:] == POISON_32).all()) for tensor in bits[1:]),
              f"{what}: more than wanted is written")
    return {"share": share}


def rows_of(vocab):
    """Mostly distinct, all of few values, with minus infinities, and with an outlier."""
    random = Random(torch.zeros(0), vocab)
    rows = (random.uniform(4, vocab) * 8 - 4).float()
    rows[1] = rows[1].round()
    rows[2] = torch.where(random.below(40, vocab) > 0, -torch.inf, rows[2])
    rows[3] *= 0.01
    places = random.below(vocab, 4)
    for row, value in enumerate([float(rows[0, places[0]]), -0.0, 1.0, 200.0]):
        rows[row, places[row]] = value
    return rows


def wanted_of(vocab):
    every = [(row, vocab - 1, 9, top) for top in [0, 1, 2, 5, 19, 20, 21] for row in range(4)]
    every.append((PAD, 0, 0, 3))
    every += [(slot, TOKEN_FROM_DEVICE, slot, 1) for slot in range(3)]
    return every + [(1, vocab, 0, 2), (PAD, TOKEN_FROM_DEVICE, PAD, 0)]


def cases(large):
    for vocab, threads in [(1, (32, 32)), (7, (32, 64)), (257, (32, 32)), (2050, (64, 128)),
                           (4096, (128, 32))] + [(128256, (128, 128))] * large:
        yield Case(f"logprobs of {vocab}",
                   lambda place, v=vocab, t=threads: logprobs(place, rows_of(v), wanted_of(v), t),
                   vocab == 257)
    few = [(0, 9, 0, 3), (1, 9, 0, 20), (2, 9, 0, 20), (3, 9, 0, 1)]
    yield Case("logprobs, more parts than threads",
               lambda place: logprobs(place, rows_of(17_001), few, (32, 32)))
    edges = torch.full((4, 9), -torch.inf)
    edges[1, 0] = edges[2, 8] = 1.0
    edges[3] = -1e6
    yield Case("logprobs of nothing probable",
               lambda place: logprobs(place, edges, wanted_of(9), (32, 32)))
