"""What a server is loaded with."""

import random
import re

import tokenizer

# Requests that each stream sends, one after the other.
REQUESTS_A_STREAM = 2


class Shape:
    """Streams at once, tokens of a prompt, tokens of an answer."""

    def __init__(self, streams, tokens_in, tokens_out):
        self.streams, self.tokens_in, self.tokens_out = streams, tokens_in, tokens_out

    def __str__(self):
        return f"{self.streams} streams {self.tokens_in}/{self.tokens_out}"

    @classmethod
    def of(cls, text):
        return cls(*map(int, re.findall(r"\d+", text)))

    @property
    def requests(self):
        return self.streams * REQUESTS_A_STREAM

    def prompts(self, vocab, count):
        """Random token ids, each of which is a token of its own in the text too."""
        draw = random.Random(f"{self} {count}")
        words = range(len(tokenizer.CHARACTERS), vocab)
        return [draw.choices(words, k=self.tokens_in) for _ in range(count)]


def table(is_gpu):
    if not is_gpu:
        return [Shape(streams, 16, 16) for streams in (1, 4)]
    return [Shape(streams, length, length) for length in (128, 1000) for streams in (1, 8, 64, 256)]
