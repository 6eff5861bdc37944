"""sample_begin, sample_scan and sample: rounds of seats that draw."""

import torch

from values import POISON_32, Random, check, poisoned

from .case import Case
from .draws import Seat
from .logprobs import padded

PAD = 0xFFFFFFFF
# Tokens of a thread of sample_scan.
SCAN_TOKENS = 16
# Of a block of sample_scan and of sample, as the engine has them.
THREADS = (128, 1024)
# Tokens that prompts, outputs and bans name.
FEW = 9


class Seats:
    """What the device keeps of sequences, and the launches that change it."""

    def __init__(self, place, logits, count, biases):
        self.place, self.count, self.vocab = place, count, logits.shape[1]
        self.logits = padded(place, logits)
        self.seats = poisoned(place, torch.int32, count, 12)
        self.seen = poisoned(place, torch.int32, count, self.vocab)
        self.sampled = poisoned(place, torch.int32, count)
        self.bias_tokens = place.words([token for token, _ in biases] or [0])
        values = [value for _, value in biases] or [0.0]
        self.bias_values = torch.tensor(values, dtype=torch.float32, device=place.device)

    def lists(self, lists):
        """Where each begins and the last ends, and all of them in one."""
        offsets, every = [0], []
        for one in lists:
            every += one
            offsets.append(len(every))
        return self.place.words(offsets), self.place.words(every or [0])

    def begin(self, begins, firsts):
        """`begins`: (slot, seat)."""
        slots = self.place.words([slot for slot, _ in begins])
        words = [word for (_, seat), first in zip(begins, firsts) for word in seat.words(first)]
        prompts = self.lists(seat.prompt for _, seat in begins)
        outputs = self.lists(seat.output for _, seat in begins)
        arguments = [slots, self.place.words(words), *prompts, *outputs, self.seats, self.seen]
        self.place.launch("sample_begin", [len(begins)], 64, [*arguments, self.vocab])

    def prepared(self, rows, threads=THREADS):
        """`rows`: (row of logits, slot, position, banned tokens). Gives the launches, and where they
        leave the tokens."""
        count, stride = len(rows), self.logits.shape[1]
        parts = -(-self.vocab // (threads[0] * SCAN_TOKENS))
        of_rows, slots, positions = (self.place.words(column) for column in list(zip(*rows))[:3])
        banned = self.lists(row[3] for row in rows)
        changed = poisoned(self.place, torch.float32, count, stride)
        best = poisoned(self.place, torch.int32, count, parts, 2)
        drawn = poisoned(self.place, torch.int32, count)
        scan = [self.logits, of_rows, slots, positions, *banned, self.seats, self.bias_tokens,
                self.bias_values, self.seen, changed, best, self.vocab, stride]
        last = [best, changed, slots, positions, self.seats, self.seen, drawn, self.sampled,
                self.vocab, stride, parts]

        def launch():
            self.place.launch("sample_scan", [parts, count], threads[0], scan)
            self.place.launch("sample", [count], threads[1], last)

        return launch, drawn

    def draw(self, rows, threads):
        launch, drawn = self.prepared(rows, threads)
        launch()
        return drawn.tolist()


def rounds(place, logits, count, plan, threads):
    """`plan`: rounds of (begins, rows). Checks every token, and what is kept."""
    biases = [bias for begins, _ in plan for _, seat in begins for bias in
              sorted(seat.bias, key=lambda bias: bias[0])]
    device, sitting, first = Seats(place, logits, count, biases), {}, 0
    vocab, sampled = logits.shape[1], [POISON_32] * count
    seen = torch.full((count, vocab), POISON_32, dtype=torch.int64)
    for number, (begins, rows) in enumerate(plan):
        firsts = []
        for slot, seat in begins:
            firsts.append(first)
            first += len(seat.bias)
            if slot != PAD:
                sitting[slot] = seat
                if seat.penalised:
                    seen[slot] = seat.seen(vocab)
        device.begin(begins, firsts)
        for (row, slot, position, banned), token in zip(rows, device.draw(rows, threads)):
            if slot == PAD:
                check(token == POISON_32, f"round {number}: a pad draws {token}")
                continue
            seat, what = sitting[slot], f"round {number}, slot {slot}: {token} of {sitting[slot]}"
            check(0 <= token < vocab, what)
            check(seat.allows(token, logits[row], banned, seen[slot], position), what)
            seen[slot, token] += int(seat.penalised)
            sampled[slot] = token
    check(device.sampled.tolist() == sampled, "the tokens of slots differ")
    check(bool((device.seen.cpu().long() & 0xFFFFFFFF == seen).all()), "what was seen differs")


def rows_of(vocab, count, random):
    """What a model gives, flat, tied, with minus infinities, with outliers."""
    rows = (random.uniform(count, vocab, 4).sum(-1) * 6 - 13).float()
    rows[:, :FEW] += 8
    rows[0::5, 7::53] += 9
    rows[1::5] *= 0.05
    rows[2::5] = (rows[2::5] * 0.5).round() / 2
    rows[3::5, ::3] = -torch.inf
    rows[4::5] *= torch.tensor([1.0, 1.0, 1.0, 1e4])[random.below(4, vocab)]
    return rows


def random_seat(vocab, random):
    """Every parameter is off in about half of the draws."""
    def pick(some):
        return some[int(random.below(len(some), 1))]

    def tokens():
        # Some repeat, and one does not exist.
        return random.below(min(FEW, vocab), pick(range(5))).tolist() + [vocab]

    seat = Seat(
        temperature=pick([0.0, 9e-6, 2e-5, 0.3, 0.7, 1.0, 1.0, 1.3, 2.0]),
        top_k=pick([0, 0, 0, 1, 2, 40, 300, vocab - 1, vocab, vocab + 5]),
        top_p=pick([1.0, 1.0, 1.0, 1e-5, 0.1, 0.5, 0.9, 0.95, 0.9999]),
        min_p=pick([0.0, 0.0, 0.0, 1e-5, 0.05, 0.5, 1.0]),
        presence=pick([0.0, 0.0, 0.0, 2.0, -1.5]),
        frequency=pick([0.0, 0.0, 0.0, 0.7, -0.3]),
        repetition=pick([1.0, 1.0, 1.0, 1.3, 0.6]),
        key=tuple(random.below(1 << 32, 2).tolist()),
        prompt=tokens(),
        output=tokens(),
    )
    if pick(range(3)) == 0:
        edges = [0, 511, 512, 2047, 2048, vocab - 1, vocab, vocab + 1]
        for at in range(pick([0, 1, 5, 100])):
            token = int(random.below(vocab, 1)) if at % 2 == 0 else edges[at // 2 % 8]
            seat.bias.append((token, int(random.below(200, 1)) / 8 - 12))
    return seat


def draws(place, vocab, count, number, threads):
    """Some leave their seats to others between rounds."""
    random = Random(place, vocab * 31 + count)
    logits = rows_of(vocab, min(count, 10), random)
    plan = []
    for turn in range(number):
        begins = [(slot, random_seat(vocab, random)) for slot in range(count)
                  if turn == 0 or (slot + turn) % 4 == 0]
        begins.insert(0, (PAD, Seat()))
        # Each slot once, as 7 divides no count, in another order, with padding in between and at the end.
        rows = []
        for slot in range(count):
            banned = random.below(min(FEW, vocab), 4).tolist() + [vocab] if slot % 3 == 0 else []
            row, late = (int(random.below(end, 1)) for end in (len(logits), 3))
            rows.append((row, (slot * 7 + 3) % count, 100 + turn + late, banned))
        rows.insert(1, (0, PAD, 0, []))
        rows.append((PAD, PAD, 0, []))
        plan.append((begins, rows))
    rounds(place, logits, count, plan, threads)


def cases(large):
    for vocab, count, number, threads in [
        (1, 6, 2, (32, 64)),
        (2, 16, 2, (32, 32)),
        (7, 64, 4, (32, 64)),
        (257, 64, 4, (32, 64)),
        (1030, 96, 3, (32, 96)),
        (4096, 48, 2, (128, 256)),
        (49152, 11, 1, THREADS),
    ] + [(128256, 65, 2, THREADS)] * large:
        yield Case(f"sample {count} seats of {vocab}",
                   lambda place, a=(vocab, count, number, threads): draws(place, *a), vocab == 257)
