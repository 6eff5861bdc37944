"""Our forward and llama.cpp's on the same GGUF file and cores, interleaved.

    pip install llama-cpp-python
    cargo bench --bench forward --no-run
    python benches/compare.py MODEL.gguf [ROUNDS]

Prefill is one prompt of 512 tokens, logits of the last row only. Decode is 64 steps of one token
from a context of 64. Prints the medians and their ratios as one JSON object.
"""

import glob
import json
import os
import statistics
import subprocess
import sys
import time

import llama_cpp

PROMPT_TOKENS = 512
DECODE_CONTEXT = 64
DECODE_STEPS = 64


def tokens(count):
    return [1000 + index * 37 % 4000 for index in range(count)]


def llama(model):
    threads = os.cpu_count()
    context = llama_cpp.Llama(
        model, n_ctx=1024, n_batch=PROMPT_TOKENS, n_ubatch=PROMPT_TOKENS, n_threads=threads,
        n_threads_batch=threads, logits_all=False, verbose=False,
    )
    context.eval(tokens(PROMPT_TOKENS))
    context.reset()
    start = time.perf_counter()
    context.eval(tokens(PROMPT_TOKENS))
    prefill = PROMPT_TOKENS / (time.perf_counter() - start)
    context.reset()
    context.eval(tokens(DECODE_CONTEXT))
    start = time.perf_counter()
    for token in tokens(DECODE_STEPS):
        context.eval([token])
    decode = DECODE_STEPS / (time.perf_counter() - start)
    return {"prefill": prefill, "decode": decode}


def candela(binary, model):
    run = subprocess.run([binary], env={**os.environ, "CANDELA_BENCH_MODEL": model},
                         check=True, capture_output=True, text=True)
    rates = {}
    for line in run.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            name = f"decode{row['decode_seqs']}" if "decode_seqs" in row else "prefill"
            rates[name] = row["tokens_per_second"]
    rates["decode"] = rates.pop("decode1")
    return rates


def main():
    model, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5
    built = [path for path in glob.glob("target/release/deps/forward-*") if os.access(path, os.X_OK)]
    binary = max(built, key=os.path.getmtime)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(candela(binary, model))
        theirs.append(llama(model))

    def median(rows):
        return {key: round(statistics.median(row[key] for row in rows), 1) for key in rows[0]}

    ours, theirs = median(ours), median(theirs)
    ratio = {key: round(ours[key] / theirs[key], 2) for key in theirs}
    print(json.dumps({"candela": ours, "llama_cpp": theirs, "ratio": ratio,
                      "llama_cpp_python": llama_cpp.__version__}))


main()
