"""Goldens of small random models of every family, from Hugging Face transformers in float32.

    python tests/reference/families.py tests/reference/families.json

Nothing of the weights is stored: value `i` of a tensor is a hash of the tensor's name and `i`, which
the test computes again, writes as safetensors in `dtype`, and loads.
"""

import json
import pathlib
import sys

import numpy
import torch
import transformers

PROMPT = [(7 * i * i + 3 * i + 1) % 97 for i in range(40)]
ROWS = [0, 5, 17, 39]
GREEDY_TOKENS = 16

BASE = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

CASES = {
    "llama 2": ("Llama", "float32", dict(num_key_value_heads=4)),
    "llama 3": ("Llama", "bfloat16", dict(rope_parameters=LLAMA3, head_dim=24)),
    "llama 3, tied": ("Llama", "float16", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama, linear rope": (
        "Llama", "float32",
        dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
    ),
    "llama, biases": ("Llama", "float32", dict(attention_bias=True, mlp_bias=True)),
    "llama, one KV head": ("Llama", "bfloat16", dict(num_key_value_heads=1, rms_norm_eps=1e-2)),
    "mistral": ("Mistral", "bfloat16", dict(sliding_window=8, head_dim=32)),
    "mistral, no window": ("Mistral", "float16", dict(sliding_window=None)),
    "qwen2": ("Qwen2", "bfloat16", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2, tied": ("Qwen2", "float32", dict(tie_word_embeddings=True)),
    "qwen2, window above layer 1": (
        "Qwen2", "float32", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", "bfloat16", dict(head_dim=32)),
    "qwen3, biases, tied": (
        "Qwen3", "float32", dict(head_dim=16, attention_bias=True, tie_word_embeddings=True),
    ),
}


def hashed(name, count):
    """Uniform in [-1, 1): splitmix64 of FNV-1a of the name plus the index."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    z = numpy.uint64(seed) + numpy.arange(count, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    z = z ^ (z >> numpy.uint64(31))
    return ((z >> numpy.uint64(40)).astype(numpy.float32) / 2**23) - 1.0


def weight(name, shape):
    """Norms lie about one; the rest is large enough that every part moves the logits."""
    values = torch.from_numpy(hashed(name, int(numpy.prod(shape))).reshape(shape))
    return 1.0 + 0.5 * values if name.endswith("norm.weight") else 0.3 * values


def main(out):
    numpy.seterr(over="ignore")
    golden = {"prompt": PROMPT, "rows": ROWS, "cases": []}
    for name, (family, dtype, extra) in CASES.items():
        config = getattr(transformers, family + "Config")(**(BASE | extra))
        config.architectures = [family + "ForCausalLM"]
        config._attn_implementation = "eager"
        model = getattr(transformers, family + "ForCausalLM")(config).float().eval()
        with torch.no_grad():
            shapes = {}
            for key, parameter in model.named_parameters():
                shapes[key] = list(parameter.shape)
                parameter.copy_(weight(key, parameter.shape).to(getattr(torch, dtype)).float())
            logits = model(torch.tensor([PROMPT])).logits[0]
            tokens, margins, ids = [], [], list(PROMPT)
            for _ in range(GREEDY_TOKENS):
                top = torch.topk(model(torch.tensor([ids])).logits[0, -1], 2)
                tokens.append(int(top.indices[0]))
                margins.append(round(float(top.values[0] - top.values[1]), 4))
                ids.append(tokens[-1])
        print(name, float(logits.std()), tokens[:6], min(margins))
        golden["cases"].append({
            "name": name, "dtype": dtype, "config": json.loads(config.to_json_string(use_diff=False)),
            "shapes": shapes, "tokens": tokens, "margins": margins,
            "logits": [[round(float(v), 5) for v in logits[row]] for row in ROWS],
        })
    pathlib.Path(out).write_text(json.dumps(golden, separators=(",", ":")) + "\n")


main(*sys.argv[1:])
