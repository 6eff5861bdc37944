"""Whole models on the server against transformers, in the same type and in f32.

Both sides round to 16 bits, in different places, so neither is right: what counts is how far each is
from f32 on the same weights. Ours may be 1.5 times as far as transformers' is, in the root of the mean
square over all positions, and 3 times at the worst one.
"""

import math
from pathlib import Path

import torch

import device
import models
import tokenizer
from oracle import Oracle
from results import Results
from server import Server, device_flags
from values import check

ERROR_RATIO_MAX, WORST_RATIO_MAX = 1.5, 3.0
# Of errors that f32 sums in another order have, which the CPU's have alone.
ERROR_MIN = 1e-4
LENGTHS = [2, 15, 16, 17, 33, 65, 130, 257]
OUTPUT = 24
BATCH = 64
# Logits of an f16 model are its own; the type of the others is that of their weights.
VARIANTS = [(family, "bf16") for family in models.FAMILIES] + [("llama", "f16")]


class Model:
    """A model's prompts, what transformers says of them, and what the server does."""

    def __init__(self, options, at, family, dtype):
        self.at, self.dtype = at, dtype
        self.binary = device.binary(options)[0]
        self.directory = models.write(family, Path(options.out).resolve() / "models" / family)
        self.exact = Oracle(self.directory, "f32", at)
        self.theirs = Oracle(self.directory, dtype, at)
        self.ids = {tokenizer.shown(text): at for at, text in enumerate(tokenizer.texts(models.VOCAB))}
        random = torch.Generator().manual_seed(len(family))

        def draw(length):
            return torch.randint(models.VOCAB, (length,), generator=random).tolist()

        self.prompts = [draw(length) for length in LENGTHS]
        self.batch = [draw(1 + index * 37 % 83) for index in range(BATCH)]

    def serve(self, graphs=True):
        flags = device_flags(self.binary, self.at, self.dtype, graphs)
        flags += ["--max-model-len", str(models.CONTEXT), "--max-num-seqs", str(BATCH)]
        flags += ["--kv-cache-memory", "1GiB"] if self.at.type == "cpu" else []
        return Server(self.binary, self.directory, flags)

    def generated(self, choice):
        """Token ids, their log-probabilities, and how far the second best is from the best."""
        found = choice["logprobs"]
        margins = []
        for top in found["top_logprobs"]:
            best = sorted(top.values(), reverse=True)
            margins.append(best[0] - best[1])
        return [self.ids[text] for text in found["tokens"]], found["token_logprobs"], margins

    def greedy(self, server, prompts):
        choices = server.complete(prompts, max_tokens=OUTPUT, temperature=0, logprobs=2, ignore_eos=True)
        return [self.generated(choice) for choice in sorted(choices, key=lambda one: one["index"])]


class Errors:
    """How far ours and theirs are from f32, over positions."""

    def __init__(self):
        self.ours, self.theirs = [], []

    def add(self, exact, ours, theirs):
        self.ours.append(abs(ours - exact))
        self.theirs.append(abs(theirs - exact))

    def check(self):
        def size(errors):
            return math.sqrt(sum(error**2 for error in errors) / len(errors))

        ours, theirs = size(self.ours), size(self.theirs)
        measured = {"positions": len(self.ours), "error": ours, "their_error": theirs,
                    "worst": max(self.ours), "their_worst": max(self.theirs)}
        check(ours <= max(ERROR_RATIO_MAX * theirs, ERROR_MIN), f"too far from f32: {measured}")
        check(max(self.ours) <= max(WORST_RATIO_MAX * max(self.theirs), ERROR_MIN),
              f"too far from f32 somewhere: {measured}")
        return measured


def prompts(model, server):
    """The log-probabilities of prompts, each fed at once and read by `echo`."""
    errors = Errors()
    for prompt in model.prompts:
        choice = server.complete(prompt, echo=True, logprobs=0, max_tokens=1, temperature=0)[0]
        ours = choice["logprobs"]["token_logprobs"][1 : len(prompt)]
        exact, theirs = model.exact.logprobs(prompt), model.theirs.logprobs(prompt)
        for at, (token, logprob) in enumerate(zip(prompt[1:], ours, strict=True)):
            errors.add(float(exact[at, token]), logprob, float(theirs[at, token]))
    return errors.check()


def greedy(model, server):
    """Tokens and their log-probabilities: each token must be f32's best after the same tokens, where its
    margin is larger than what both may be wrong by."""
    return follow(model, model.prompts, model.greedy(server, model.prompts))


def follow(model, asked, answers):
    errors, steps = Errors(), []
    for prompt, (tokens, logprobs, _) in zip(asked, answers):
        check(len(tokens) == OUTPUT, f"{len(tokens)} tokens of {OUTPUT}")
        exact, theirs = (oracle.logprobs(prompt + tokens) for oracle in (model.exact, model.theirs))
        for at, (token, logprob) in enumerate(zip(tokens, logprobs), len(prompt) - 1):
            errors.add(float(exact[at, token]), logprob, float(theirs[at, token]))
            steps.append((token, exact[at], int(theirs[at].argmax())))
    measured = errors.check()
    # Of two logits, each off by what theirs are off at the worst, and half more.
    tolerance = 2 * max(ERROR_RATIO_MAX * measured["their_worst"], ERROR_MIN)
    sure = equal = 0
    for token, exact, their_token in steps:
        best = exact.topk(2)
        is_sure = float(best.values[0] - best.values[1]) > tolerance
        sure, equal = sure + is_sure, equal + (token == their_token)
        check(not is_sure or token == int(best.indices[0]), f"token {token} for {best}")
    check(sure > 0, f"no margin is larger than {tolerance}: {measured}")
    return {**measured, "tolerance": tolerance, "tokens": len(steps), "sure": sure, "as_theirs": equal}


def graphs(model, server):
    """Decode steps as graphs and launched one by one: the same tokens."""
    if model.at.type == "cpu":
        return {"skipped": "the CPU has no graphs"}
    drawn = dict(max_tokens=OUTPUT, temperature=1.0, seed=7, logprobs=2, ignore_eos=True)

    def ask(of):
        answers = [of.complete(prompt, **drawn)[0] for prompt in model.prompts]
        return model.greedy(of, model.prompts), [model.generated(answer) for answer in answers]

    with_graphs = ask(server)
    with model.serve(graphs=False) as eager:
        without = ask(eager)
    for kind, ours, plain in zip(["greedy", "drawn"], with_graphs, without):
        for prompt, one, other in zip(model.prompts, ours, plain):
            check(one[0] == other[0], f"{kind}, a prompt of {len(prompt)}: {one[0]} for {other[0]}")
    return {"tokens": 2 * OUTPUT * len(model.prompts)}


def batch(model, server):
    """64 at once: each as near to f32 as alone, and the same tokens until a margin within the tolerance."""
    together = model.greedy(server, model.batch)
    measured = follow(model, model.batch, together)
    same = 0
    for prompt, (tokens, _, _) in zip(model.batch, together):
        [(alone, _, margins)] = model.greedy(server, [prompt])
        for token, own, margin in zip(tokens, alone, margins):
            if token != own:
                check(margin <= measured["tolerance"], f"{tokens} for {alone}, margin {margin}")
                break
        same += tokens == alone
    return {**measured, "same_as_alone": same, "of": BATCH}


CHECKS = {"prompts": prompts, "greedy": greedy, "graphs": graphs, "batch": batch}


def run(options, at):
    _, build = device.binary(options)
    results = Results(options, "model", device.facts(at), build)
    variants = [variant for variant in VARIANTS if variant[1] == "bf16" or at.type == "cuda"]
    names = {variant: {" ".join([*variant, name]): name for name in CHECKS} for variant in variants}
    missing = results.want([name for of_one in names.values() for name in of_one])
    for variant in variants:
        asked = [name for name in names[variant] if name in missing]
        if not asked or results.out_of_time():
            continue
        model = Model(options, at, *variant)
        try:
            with model.serve() as server:
                for name in asked:
                    results.attempt(name, lambda: CHECKS[names[variant][name]](model, server))
        except AssertionError as wrong:
            # The server does not start, which all of its cases need.
            for name in asked:
                results.attempt(name, lambda: check(False, str(wrong)))
    return results.finish()
