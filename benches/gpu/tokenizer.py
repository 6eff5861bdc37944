"""A tokenizer for weights that nobody trained: the text of every token is its own."""

import json
import string

# What byte-level BPE writes as itself, and the blank.
CHARACTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["\u0120"]


def texts(vocab):
    """Of each id: a character, or a blank and four letters."""
    letters = string.ascii_lowercase
    words = len(CHARACTERS)
    named = ("\u0120" + "".join(letters[index // 26**place % 26] for place in (3, 2, 1, 0))
             for index in range(vocab - words))
    return [*CHARACTERS, *named]


def shown(text):
    return text.replace("\u0120", " ")


def write(directory, vocab):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             # A word that is a token is that token, though nothing merges into it.
             "ignore_merges": True,
             "vocab": {text: index for index, text in enumerate(texts(vocab))}, "merges": []}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
             "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
             "decoder": byte_level, "model": model}
    (directory / "tokenizer.json").write_text(json.dumps(whole))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
