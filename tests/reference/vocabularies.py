"""Goldens of vocabularies: SentencePiece and byte-level BPE in GGUF, and tokenizer.json documents.

    pip install -r tests/reference/requirements.txt
    python tests/reference/vocabularies.py tests/reference/vocabularies.json

Small vocabularies are trained here on the text below. Ids come from llama.cpp, which reads them from
a GGUF file by itself, and must be those of sentencepiece, which trained them; those of Mistral's tekken
from tiktoken, as llama.cpp differs from it where marks combine. Ids and text of documents come from
Hugging Face tokenizers.
"""

import ctypes
import io
import json
import pathlib
import random
import sys
import tempfile
import unicodedata

import gguf
import llama_cpp
import sentencepiece
import tiktoken
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = """The clerk walked along the river every Monday with a lantern, a pencil and a book of squared paper.
He wrote down 17 numbers at the first bridge, 12 at the second and 11 at the weir; by noon he had added them twice.
"Water," he told the children who followed him, "does not lie, but ink does." They'd heard it before; they didn't mind.
In the wet spring of 1874 the river rose above the third arch, and two of the meters were lost under the mud.
The millers proposed to guess. He'll refuse, they said, and he refused: I've read both dials by touch, he wrote.
  def price(tokens, rate):
      if tokens < 1000:
          return tokens * rate
      return 1000 * rate + (tokens - 1000) * rate / 2
\tfor (int i = 0; i < n; i++) { total += price[i]; }   // the sum of all
Die Rechnung war auf den letzten Pfennig richtig, und der Rat bewahrte das Buch unter Glas auf.
L'été à la rivière, où les élèves cherchaient déjà des mètres perdus près de l'écluse.
El niño midió el río con una cuerda, un lápiz y un cuaderno; mañana volverá a contar.
Счётчик показывает, сколько воды прошло, и больше ничего не показывает.
今日は天気がいいですね。川の水は嘘をつかない。数字は十七です。
今天天气很好，河里的水不会说谎，数字会说谎。
ALL CAPITALS AND camelCase AND snake_case AND SHOUTING!!! What??? Really... (yes) [no] {maybe} <tag> a/b\\c
"""

TEXTS = [
    "", " ", "  ", "   ", "\n", "\n\n\n", "\r\n", "\t", " \n ", "\n ", "a", " a", "  a", "   a", "a ", "a  ", " a b  c   d    e  ",
    "the river", " the river", "The clerk's book; he'll refuse, they'd said: I'VE READ IT'S", "They're DON'T we'll'll 'S 's",
    "1874", "12345678901234567890", "3.14159 -1e-9 0x1F 1,000,000", "٣٤٥ ½ Ⅷ ⁵ x²", "  def price(tokens):\n      return 1\n",
    "\tfor (i = 0; i < n; i++) {\n\t\ttotal += x;\n\t}\n", "a_b-c.d/e\\f|g", "...!!!???;;;", "'''\"\"\"```",
    "<tag> &amp; <0x0A> <0xFF> <0x> 0x0A", "▁", "▁▁a▁b", "a ▁ b", "\u2581 \u2581", "camelCaseAND snake_CASE ǅ ǅa Aʰ ªb",
    "été e\u0301te\u0301 a\u0308\u0323 n\u0303", "x\u0327\u0301\u0302\u0303\u0304", "\u0301\u0301", "🙂", "🙂🙂 🙂", "👩‍👩‍👧‍👦 🏳️‍🌈 👋🏽 🇵🇹", "a🙂b",
    "今天天气很好", "今日は天気がいいですね。", "カタカナ ひらがな 漢字", "안녕하세요 세계", "\u1112\u1161\u11ab \ud55c", "Привет, мир", "שלום עולם",
    "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Ωμέγα ἀρχή", "\u200b\u200d\ufeff\u2028\u00a0\u3000x", "\u00a0 \u00a0a\u3000 b", "\u0085\u000b\u000c",
    "\u0000\u0001\u001f\u007f", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛", "\ufffd", "\U0010ffff", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "eeee----====____    ....",
    "HTMLParser XMLHttp iPhone McX ABc aBC", "path/to//file/\n//\nx", "12 34 567 8901 23456 a1b22c333", "don't 12345 DON'T 67 WE'LL 89",
    "x\n\n  y\n \n z", "  \n\n\n   \t\n x", "，。！你好！！world，世界123中文abc", "hello\r\n\r\nworld\r\n", "a\u0301b\u0301 C\u0301D", "Ünï ÇAÑÓn ΑΒΓαβγ ЖЖжж",
    "!!x ??y $$z ++a ==b ~~c", " \"quoted\" 'single' (paren) [br]", "end.  \n", "tab\t\ttab \t x", " leading and trailing ", "new\n\n  lines \n and\tspaces \t\n", "e e e e  e", "supercalifragilisticexpialidocious",
]
# Control tokens of the SentencePiece vocabulary, typed and in templates.
SPECIAL_TEXTS = [
    "<s>", "<s>the river", "<s> the river", "the river</s>", "a<s>b</s> c", "[INST] the river [/INST]", "[INST]a[/INST]", "a[INST] b",
    "<s>[INST] <<SYS>>\nthe clerk\n<</SYS>>\n\n he wrote [/INST] 17 </s><s>[INST] and [/INST]", "[INST[INST]]", " [INST]  [/INST] ", "<unk>a", "</s",
]
CONTROL = ["[INST]", "[/INST]"]
USER_DEFINED = ["<<SYS>>", "<</SYS>>"]
SPM_TOKENS = 520
BYTE_LEVEL_TOKENS = 1000
RANDOM_DECODES = 40
# The first texts are those where spaces, prefixes and lines matter.
SPACED_TEXTS = 20

# llama.cpp takes a space outside of ASCII for a control character when it looks for CJK characters,
# among which this vocabulary's own expression counts U+2028.
NOT_AS_TRAINED = ("deepseek-coder", "\u2028")

BYTE_LEVEL_PRES = [
    "default", "gpt-2", "smollm", "llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "qwen2", "deepseek-r1-qwen", "tekken", "deepseek-coder",
]


# The `pattern` of Mistral's tekken_240911.json.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_gguf(path, model, tokens, types, extra):
    """A GGUF file with a vocabulary and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for add in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
        getattr(writer, "add_" + add)(64)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp's reading of a vocabulary."""

    def __init__(self, *vocabulary):
        with tempfile.TemporaryDirectory() as dir:
            path = dir + "/vocabulary.gguf"
            write_gguf(path, *vocabulary)
            self.model = llama_cpp.Llama(path, vocab_only=True, verbose=False)

    def encode(self, text, bos=False):
        # An empty text is not passed on: the binding rejects a result of no tokens.
        return self.model.tokenize(text.encode(), add_bos=bos, special=False) if text or bos else []

    def decode(self, ids):
        vocab = llama_cpp.llama_model_get_vocab(self.model.model)
        array = (llama_cpp.llama_token * max(1, len(ids)))(*ids)
        room = 64 * len(ids) + 64
        buffer = ctypes.create_string_buffer(room)
        size = llama_cpp.llama_detokenize(vocab, array, len(ids), buffer, room, False, False)
        return buffer.raw[:size]


def case(text, ids, decoded):
    """A text, its ids, and their text where it is another."""
    return [text, ids] if decoded == text else [text, ids, decoded]


def train_sentencepiece():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()), model_writer=model, model_type="bpe", vocab_size=SPM_TOKENS,
        byte_fallback=True, split_digits=True, character_coverage=0.98, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=True, allow_whitespace_only_pieces=True,
        control_symbols=CONTROL, user_defined_symbols=USER_DEFINED, minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), proto.pieces


def merges_of(tokens, scores, types):
    """As Hugging Face's converter ranks them: by score, then by id."""
    normal = {token: (-score, id) for id, (token, score, kind) in enumerate(zip(tokens, scores, types)) if kind == 1}
    ranked = []
    for token, rank in normal.items():
        for split in range(1, len(token)):
            if token[:split] in normal and token[split:] in normal:
                ranked.append((*rank, token[:split], token[split:]))
    return [(left, right) for *_, left, right in sorted(ranked)]


def sentencepiece_golden():
    processor, pieces = train_sentencepiece()
    tokens, scores, types = [p.piece for p in pieces], [p.score for p in pieces], [p.type for p in pieces]
    user_defined = [id for id, kind in enumerate(types) if kind == 4]
    variants = []
    for space_prefix in (True, False):
        def extra(writer):
            writer.add_token_scores(scores)
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
            writer.add_unk_token_id(0)
            writer.add_add_space_prefix(space_prefix)
        oracle = LlamaCpp("llama", tokens, types, extra)
        texts = []
        for text in TEXTS + SPECIAL_TEXTS + ["a<<SYS>>b", "<<SYS>> a", " <</SYS>>"]:
            ids = oracle.encode(text)
            if space_prefix and not set(ids) & set(user_defined):
                assert ids == processor.encode(text), (text, ids, processor.encode(text))
                # Both read a space's stand-in as a space.
                assert processor.decode(ids) == text.replace("▁", " "), text
                assert oracle.decode(ids).decode() == text.replace("▁", " "), text
            texts.append(case(text, ids, oracle.decode(ids).decode()))
        rng = random.Random(1)
        decodes = []
        ordinary = [id for id, kind in enumerate(types) if kind not in (2, 3)]
        byte_ids = [id for id, kind in enumerate(types) if kind == 6]
        for _ in range(RANDOM_DECODES):
            ids = [rng.choice(rng.choice([ordinary, byte_ids])) for _ in range(rng.randint(1, 12))]
            decodes.append([ids, list(oracle.decode(ids))])
        with_bos = oracle.encode("the river", bos=True)
        variants.append({"space_prefix": space_prefix, "texts": texts, "decodes": decodes, "with_bos": with_bos})
    vocabulary = {"tokens": tokens, "scores": scores, "types": types}
    return vocabulary, variants


def documents(vocabulary):
    """tokenizer.json files over one vocabulary, without their models."""
    tokens, types = vocabulary["tokens"], vocabulary["types"]
    merges = merges_of(tokens, vocabulary["scores"], types)
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    fallback, fuse = decoders.ByteFallback(), decoders.Fuse()
    spaces = normalizers.Replace(" ", "▁")
    legacy = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    space = lambda scheme, split=False: pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=split)
    space_decoder = lambda scheme: decoders.Metaspace("▁", prepend_scheme=scheme)
    cases = {
        "legacy": (legacy, None, decoders.Sequence([replace, fallback, fuse, strip])),
        "metaspace first": (None, space("first"), decoders.Sequence([replace, fallback, fuse, strip])),
        "metaspace always, split": (None, space("always", True), decoders.Sequence([fallback, space_decoder("always")])),
        "metaspace alone": (None, space("always"), space_decoder("always")),
        "metaspace never": (None, space("never"), decoders.Sequence([replace, fallback, fuse])),
        "first in a sequence": (None, pre_tokenizers.Sequence([space("first")]), space_decoder("first")),
        "no prefix": (spaces, None, decoders.Sequence([replace, fallback, fuse])),
        "no bytes": (legacy, None, decoders.Sequence([replace, fuse, strip])),
        "no spaces": (legacy, None, decoders.Sequence([fallback, fuse])),
    }
    out, rng = [], random.Random(2)
    for name, (normalizer, pre_tokenizer, decoder) in cases.items():
        tokenizer = Tokenizer(models.BPE(
            vocab={token: id for id, token in enumerate(tokens)}, merges=merges, unk_token="<unk>", fuse_unk=True,
            byte_fallback=True,
        ))
        tokenizer.add_special_tokens([t for t, kind in zip(tokens, types) if kind in (2, 3)])
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, types) if kind == 4])
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        if pre_tokenizer is not None:
            tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoder
        document = json.loads(tokenizer.to_str())
        del document["model"]["vocab"], document["model"]["merges"]
        tokenizer.encode_special_tokens = True
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        cases_of = lambda texts: [case(text, encode(text), tokenizer.decode(encode(text))) for text in texts]
        texts = cases_of(TEXTS[:SPACED_TEXTS] + TEXTS[SPACED_TEXTS::4])
        tokenizer.encode_special_tokens = False
        special = cases_of(SPECIAL_TEXTS)
        word = [id for id, kind in enumerate(types) if kind in (1, 3, 4)]
        decodes = [[rng.choice(word) for _ in range(rng.randint(1, 8))] for _ in range(RANDOM_DECODES)]
        decodes = [[ids, tokenizer.decode(ids)] for ids in decodes]
        out.append({"name": name, "document": document, "texts": texts, "special": special, "decodes": decodes})
    return merges, out


def bytes_to_unicode():
    """GPT-2's printable stand-ins of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def byte_level_golden():
    tokenizer = Tokenizer(models.BPE())
    # Words are hardly split, so that most merges cross what some pre-tokenizer keeps apart.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = TEXTS + [CORPUS[at:at + 24] for at in range(0, len(CORPUS), 24)]
    tokenizer.train_from_iterator(pieces, trainers.BpeTrainer(
        vocab_size=BYTE_LEVEL_TOKENS, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False, max_token_length=8,
    ))
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get) + ["<|end|>"]
    merges = [" ".join(merge) for merge in model["merges"]]
    types = [1] * (len(tokens) - 1) + [3]
    byte_of = {stand_in: byte for byte, stand_in in bytes_to_unicode().items()}
    ranks = {bytes(byte_of[c] for c in token): id for id, token in enumerate(tokens[:-1])}
    tekken = tiktoken.Encoding("tekken", pat_str=TEKKEN, mergeable_ranks=ranks, special_tokens={})
    pres = {}
    for pre in BYTE_LEVEL_PRES:
        def extra(writer):
            writer.add_tokenizer_pre(pre)
            writer.add_token_merges(merges)
            writer.add_bos_token_id(len(tokens) - 1)
        oracle = LlamaCpp("gpt2", tokens, types, extra)
        ids = [None if pre == NOT_AS_TRAINED[0] and NOT_AS_TRAINED[1] in text else oracle.encode(text) for text in TEXTS]
        if pre == "tekken":
            trained = [tekken.encode_ordinary(text) for text in TEXTS]
            for text, one, other in zip(TEXTS, ids, trained):
                assert one == other or any(unicodedata.category(c)[0] == "M" for c in text), text
            ids = trained
        pres[pre] = {"ids": ids, "with_bos": oracle.encode("a", bos=True)}
    return {"tokens": tokens, "types": types, "merges": merges, "texts": TEXTS, "pres": pres}


def main(out):
    vocabulary, variants = sentencepiece_golden()
    merges, docs = documents(vocabulary)
    golden = {
        "sentencepiece": {"vocabulary": vocabulary, "variants": variants},
        "documents": {"merges": merges, "cases": docs},
        "byte_level": byte_level_golden(),
    }
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    pathlib.Path(out).write_text(text + "\n", encoding="utf-8")
    print(len(text), "bytes;", sum(k == 1 for k in vocabulary["types"]), "normal tokens;", len(merges), "merges")


main(*sys.argv[1:])
