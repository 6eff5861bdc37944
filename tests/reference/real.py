"""Goldens of a real model, from Hugging Face transformers on the CPU in float32.

    pip install -r tests/reference/requirements.txt
    python tests/reference/real.py MODEL.gguf tests/reference/NAME.json

Weights are the GGUF file's own values, dequantised by transformers. Token ids and text come from
llama.cpp, which reads the file's vocabulary by itself; chat templates are rendered by transformers
(Jinja2). The JSON is small: of each row of logits, every `stride`-th and the largest.
"""

import json
import pathlib
import sys

import llama_cpp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GREEDY_TOKENS = 48
TOP = 8
KEPT = 192

LONG = """A meter counts what flows through it and nothing else. The town of Harwick had forty of \
them, one for each mill on the river, and a clerk who walked the bank every Monday with a lantern, \
a pencil and a book of squared paper. He wrote down 17 numbers at the first bridge, 12 at the \
second and 11 at the weir; by noon he had added them twice. When the sums disagreed he walked back. \
"Water," he told the boys who followed him, "does not lie, but ink does." In the wet spring of 1874 \
the river rose above the third arch, and two meters were lost under the mud. The millers proposed \
to guess. The clerk refused: he borrowed a boat, a rope and a boy who could swim, and read both \
dials by touch, counting the notches with his thumb. The bill that quarter was right to the last \
farthing. Years later, when the mills burned coal and the meters counted gas, the council kept his \
book under glass in the hall, open at that page, with the water stain across the figures, and every \
new clerk was shown it on the first day and asked one question: """

PROMPTS = {
    "short": "The capital of Portugal is",
    "one_token": "Hello",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "numbers": "1, 1, 2, 3, 5, 8, 13, 21, 34,",
    "languages": "Été à Zürich 🏔️: 今日は天気がいいですね。Привет, мир! ",
    "long": LONG,
    "longer": LONG * 3,
}

CHATS = {
    "question": [{"role": "user", "content": "What is the capital of Portugal?"}],
    "system": [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Name a colour."},
    ],
    "turns": [
        {"role": "user", "content": "Hi! My name is Ada."},
        {"role": "assistant", "content": "Hello Ada, how can I help?"},
        {"role": "user", "content": "  What is my name?\n\n"},
    ],
    "unicode": [{"role": "user", "content": "Translate: 早上好 👋🏽 \t e\u0301t\u00e9"}],
    "empty": [{"role": "user", "content": ""}],
}

TEXTS = [
    "", " ", "  ", "\n", "\n\n\n", "\t\t x", "a", " a", "  a", "a ", "a  ", " a b  c   d    e",
    "Hello, world!", "hello world", "Hello\r\nworld\r\n", "don't I'll we're they've I'm he'd DON'T",
    "12345678901234567890", "3.14159 -1e-9 0x1F 1,000,000", "2024-02-29T12:00:00Z",
    "e\u0301 \u00e9 a\u0308\u0323 n\u0303", "\u1112\u1161\u11ab \ud55c", "\ufb01 \u2167 \u00bd \u2075",
    "🙂", "👩‍👩‍👧‍👦 🏳️‍🌈 👋🏽 🇵🇹", "今天天气很好", "日本語のテキスト、カタカナ", "안녕하세요 세계",
    "Привет, мир", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Ωμέγα ἀρχή",
    "\u200b\u200d\ufeff\u2028\u00a0\u3000x", "\u0000\u0001\u001f\u007f", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛",
    "fn main() {\n\tprintln!(\"{}\", x);\n}\n", "https://example.org/a?b=c&d=%20#e", "a_b-c.d/e\\f|g",
    "...!!!???;;;", "'''\"\"\"```", "<b>&amp;</b>", "{{ x }} {% if y %}", "CamelCaseAndsnake_case",
    "supercalifragilisticexpialidocious", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "\\n \\u0041",
    " leading and trailing ", "end of text", "\ufffd", "x\u0327\u0301\u0302\u0303\u0304",
]


def rows_of(logits):
    """What is kept of one row: every stride-th value, and the largest with their ids."""
    stride = max(1, len(logits) // KEPT)
    top = torch.topk(logits, TOP)
    return {
        "stride": stride,
        "values": [round(float(v), 5) for v in logits[::stride]],
        "top_ids": top.indices.tolist(),
        "top_values": [round(float(v), 5) for v in top.values],
    }


def logits_after(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def greedy(model, ids):
    """Greedy tokens, and how far the best logit is above the second at each."""
    past, tokens, margins, step = None, [], [], torch.tensor([ids])
    for _ in range(GREEDY_TOKENS):
        with torch.no_grad():
            out = model(step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        top = torch.topk(out.logits[0, -1], 2)
        tokens.append(int(top.indices[0]))
        margins.append(round(float(top.values[0] - top.values[1]), 4))
        step = torch.tensor([[tokens[-1]]])
    return {"tokens": tokens, "margins": margins}


def main(gguf, out):
    path = pathlib.Path(gguf)
    vocab = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    encode = lambda text: vocab.tokenize(text.encode(), add_bos=False, special=False)
    decode = lambda ids: vocab.detokenize(ids).decode("utf-8", "replace") if ids else ""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    golden = {"prompts": {}, "chats": {}, "texts": []}
    for name, text in PROMPTS.items():
        ids = encode(text)
        golden["prompts"][name] = {
            "ids": ids, "logits": rows_of(logits_after(model, ids)[-1]), "greedy": greedy(model, ids),
        }
        print(name, len(ids), repr(decode(golden["prompts"][name]["greedy"]["tokens"])[:60]))
    for name, messages in CHATS.items():
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = vocab.tokenize(text.encode(), add_bos=False, special=True)
        golden["chats"][name] = {
            "messages": messages, "text": text, "ids": ids, "greedy": greedy(model, ids),
            "without_prompt": tokenizer.apply_chat_template(messages, tokenize=False),
        }
        print(name, len(ids), repr(decode(golden["chats"][name]["greedy"]["tokens"])[:60]))
    for text in TEXTS:
        ids = encode(text)
        assert decode(ids) == text, (text, decode(ids))
        golden["texts"].append({"text": text, "ids": ids})
    special = [t for t in tokenizer.all_special_tokens if t]
    golden["typed_special"] = [
        {"text": f"a{token}b", "ids": encode(f"a{token}b")} for token in special
    ]
    pathlib.Path(out).write_text(json.dumps(golden, separators=(",", ":")) + "\n")


main(*sys.argv[1:])
