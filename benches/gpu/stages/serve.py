"""What clients get at once: `candela bench` against the server, and transformers' continuous batching on
the same shapes.

On a GPU the model is an 8B one whose weights nobody has; in a rehearsal it is one of the small ones.
"""

import json
import sys
import tempfile
from pathlib import Path

import device
import models
import shapes
import tokenizer
import workers
from results import Results
from server import Server, device_flags
from values import check

# Llama-3.1-8B's config.json, as far as it says shapes.
LARGE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "hidden_act": "silu", "torch_dtype": "bfloat16",
}
WARM_REQUESTS = 4
WORKER = device.REPOSITORY / "benches/gpu/continuous.py"
# Of one case of transformers'.
CASE_SECONDS_MAX = 420


def written(options, at):
    """The directory of the model, and its vocabulary."""
    out = Path(options.out).resolve() / "models"
    if at.type == "cpu":
        return models.write("llama", out / "llama"), models.VOCAB
    directory = out / "large"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LARGE))
    tokenizer.write(directory, LARGE["vocab_size"])
    return directory, LARGE["vocab_size"]


def bench(results, binary, server, vocab, shape, count):
    """The report of `candela bench`; every prompt is what its shape says, token by token."""
    texts = tokenizer.texts(vocab)
    with tempfile.TemporaryDirectory() as directory:
        dataset, report = Path(directory) / "prompts.jsonl", Path(directory) / "report.json"
        lines = [json.dumps({"prompt": tokenizer.shown("".join(texts[token] for token in prompt))})
                 for prompt in shape.prompts(vocab, count)]
        dataset.write_text("\n".join(lines) + "\n")
        command = [binary, "bench", "--url", server.url, "--endpoint", "completions",
                   "--dataset", dataset, "--num-prompts", count, "--concurrency", shape.streams,
                   "--output-len", shape.tokens_out, "--json", report]
        ran = results.run_process(command)
        check(ran.returncode == 0, f"candela bench ends with {ran.returncode}: {ran.stderr[-1000:]}")
        return json.loads(report.read_text())


def ours(results, binary, server, vocab, shape):
    bench(results, binary, server, vocab, shape, min(WARM_REQUESTS, shape.requests))
    report = bench(results, binary, server, vocab, shape, shape.requests)
    check(report["failed"] == 0, f"{report['failed']} requests failed: {report['errors']}")
    for kind, each in [("input", shape.tokens_in), ("output", shape.tokens_out)]:
        found, wanted = report[f"{kind}_tokens"], each * shape.requests
        check(found == wanted, f"{found} {kind} tokens, not {wanted}")
    times = {f"{name}_{part}": report[f"{name}_ms"][part] for name in ("ttft", "tpot", "itl", "e2el")
             for part in ("p50", "p99")}
    return {"output_tokens_per_s": report["output_throughput_tokens_per_s"],
            "duration_s": report["duration_s"], **times}


def serve_flags(binary, at, every):
    """Room for all streams; weights are made up where the model is one that nobody has."""
    streams = max(shape.streams for shape in every)
    flags = [*device_flags(binary, at), "--max-num-seqs", str(streams)]
    if at.type == "cpu":
        return [*flags, "--kv-cache-memory", "1GiB"]
    context = max(shape.tokens_in + shape.tokens_out for shape in every)
    return [*flags, "--max-model-len", str(context), "--load-format", "dummy"]


def run(options, at):
    binary, build = device.binary(options)
    results = Results(options, "serve", device.facts(at), build)
    every = shapes.table(at.type == "cuda")
    of_ours = results.want([f"candela {shape}" for shape in every])
    of_theirs = results.want([f"transformers {shape}" for shape in every])
    directory, vocab = written(options, at)
    if of_ours:
        try:
            with Server(binary, directory, serve_flags(binary, at, every)) as server:
                for shape in every:
                    results.attempt(f"candela {shape}",
                                    lambda: ours(results, binary, server, vocab, shape))
        except AssertionError as wrong:
            for name in of_ours:
                results.attempt(name, lambda: check(False, str(wrong)))
    command = [sys.executable, str(WORKER), str(at), str(directory)]
    workers.walk(results, command, of_theirs, CASE_SECONDS_MAX)
    return results.finish()
