"""Builds of the forward, and llama.cpp's, on the same GGUF file and cores, interleaved.

    pip install llama-cpp-python
    cargo bench --bench forward --no-run
    python benches/compare.py MODEL.gguf
    python benches/compare.py MODEL.gguf --rounds 3 --no-llama-cpp \
        --ours before=/elsewhere/forward --ours now --ours avx2 CANDELA_ISA_MAX=avx2

`--ours` names a run of our bench: a label, or label=binary for another build than the newest of this
tree, and environment variables for it. Prefill is one prompt in batches of at most 512 tokens with
the logits of the last row only; decode is 32 steps of one token for each of so many sequences from a
context of so many tokens. Prints the medians as one JSON object.
"""

import argparse
import glob
import json
import os
import statistics
import subprocess
import time

PROMPTS = [512, 2048]
BATCH_TOKENS = 512
# Not 32 as ours: each fills its context with a prompt first, which takes minutes.
SEQS = [1, 8]
CONTEXTS = [64, 1024]
STEPS = 32


class LlamaCpp:
    def __init__(self, model):
        import llama_cpp

        self.c = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        self.c.llama_log_set(self.quiet, None)
        self.c.llama_backend_init()
        self.model = self.c.llama_model_load_from_file(
            model.encode(), self.c.llama_model_default_params())
        params = self.c.llama_context_default_params()
        params.n_ctx = PROMPTS[-1] + SEQS[-1] * (CONTEXTS[-1] + STEPS + 1)
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = SEQS[-1]
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = os.cpu_count()
        self.context = self.c.llama_init_from_model(self.model, params)
        self.memory = self.c.llama_get_memory(self.context)
        self.batch = self.c.llama_batch_init(BATCH_TOKENS, 0, 1)

    def step(self, rows):
        """`rows` are (sequence, position, logits wanted)."""
        self.batch.n_tokens = len(rows)
        for index, (seq, position, wanted) in enumerate(rows):
            self.batch.token[index] = 1000 + position * 37 % 4000
            self.batch.pos[index] = position
            self.batch.n_seq_id[index] = 1
            self.batch.seq_id[index][0] = seq
            self.batch.logits[index] = wanted
        if self.c.llama_decode(self.context, self.batch) != 0:
            raise RuntimeError("llama_decode failed")
        self.c.llama_synchronize(self.context)

    def prefill(self, tokens):
        for first in range(0, tokens, BATCH_TOKENS):
            last = min(first + BATCH_TOKENS, tokens)
            self.step([(0, position, position == tokens - 1) for position in range(first, last)])

    def run(self):
        rates = {}
        self.c.llama_memory_clear(self.memory, True)
        self.prefill(PROMPTS[0])
        for tokens in PROMPTS:
            self.c.llama_memory_clear(self.memory, True)
            start = time.perf_counter()
            self.prefill(tokens)
            rates[f"prefill{tokens}"] = tokens / (time.perf_counter() - start)
        for context in CONTEXTS:
            for seqs in SEQS:
                self.c.llama_memory_clear(self.memory, True)
                for seq in range(seqs):
                    # A prompt for each, so that each has its own keys and values.
                    for first in range(0, context, BATCH_TOKENS):
                        last = min(first + BATCH_TOKENS, context)
                        self.step([(seq, position, False) for position in range(first, last)])
                start = time.perf_counter()
                for position in range(context, context + STEPS):
                    self.step([(seq, position, True) for seq in range(seqs)])
                rate = seqs * STEPS / (time.perf_counter() - start)
                rates[f"decode{seqs}@{context}"] = rate
        return rates


def candela(binary, environment, model):
    run = subprocess.run([binary], check=True, capture_output=True, text=True,
                         env={**os.environ, **environment, "CANDELA_BENCH_MODEL": model})
    row = {}
    for line in run.stdout.splitlines():
        if line.startswith("{"):
            line = json.loads(line)
            row.update({line["measure"]: line["tokens_per_second"]} if "measure" in line else line)
    return row


def newest():
    target = os.environ.get("CARGO_TARGET_DIR", "target")
    built = glob.glob(f"{target}/release/deps/forward-*")
    return max((path for path in built if os.access(path, os.X_OK)), key=os.path.getmtime)


def ours(words):
    label, _, binary = words[0].partition("=")
    environment = dict(word.split("=", 1) for word in words[1:])
    return label, lambda model: candela(binary or newest(), environment, model)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", nargs="+", action="append", metavar=("LABEL[=BINARY]", "NAME=VALUE"))
    parser.add_argument("--no-llama-cpp", action="store_true")
    options = parser.parse_args()
    runs = dict(ours(words) for words in options.ours or [["candela"]])
    if not options.no_llama_cpp:
        theirs = LlamaCpp(options.model)
        runs["llama.cpp"] = lambda model: theirs.run()
    rows = {label: [] for label in runs}
    for _ in range(options.rounds):
        for label, run in runs.items():
            rows[label].append(run(options.model))
    medians = {
        label: {key: round(statistics.median(row[key] for row in some), 1) for key in some[0]}
        for label, some in rows.items()
    }
    print(json.dumps(medians, indent=1))


main()
