"""OpenAI's Python client against a running server: python openai_sdk.py BASE_URL MODEL"""

import sys
import time
import urllib.request

import openai

base, model = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
hello = [{"role": "user", "content": "What is the capital of France?"}]


def live_sequences():
    text = urllib.request.urlopen(f"{base}/metrics").read().decode()
    line = next(line for line in text.splitlines() if line.startswith("candela:live_sequences{"))
    return float(line.rsplit(" ", 1)[1])


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"not refused with {kind}")


assert [one.id for one in client.models.list()] == [model]
assert client.models.retrieve(model).id == model

whole = client.chat.completions.create(model=model, messages=hello, temperature=0, max_tokens=30)
text = whole.choices[0].message.content
assert "Paris" in text, text
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

chunks = list(client.chat.completions.create(
    model=model, messages=hello, temperature=0, max_tokens=30, stream=True,
    stream_options={"include_usage": True},
))
assert chunks[0].choices[0].delta.role == "assistant"
assert "".join(one.choices[0].delta.content or "" for one in chunks[:-1]) == text
# The device's time is measured, so it alone differs.
usages = [chunks[-1].usage.to_dict(), whole.usage.to_dict()]
assert all(usage["cost_details"].pop("gpu_ms") > 0 for usage in usages), usages
assert usages[0] == usages[1] and usages[0]["cost"] > "0" and chunks[-1].choices == [], usages

several = client.chat.completions.create(model=model, messages=hello, n=3, seed=1, max_tokens=8)
assert [choice.index for choice in several.choices] == [0, 1, 2]
again = client.chat.completions.create(model=model, messages=hello, n=3, seed=1, max_tokens=8)
assert [one.message.content for one in several.choices] == [one.message.content for one in again.choices]

stopped = client.chat.completions.create(model=model, messages=hello, temperature=0, stop=["Paris"])
assert stopped.choices[0].finish_reason == "stop"
assert stopped.choices[0].message.content == text.split("Paris")[0]

scored = client.chat.completions.create(
    model=model, messages=hello, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3)
for entry in scored.choices[0].logprobs.content:
    assert len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob

legacy = client.completions.create(
    model=model, prompt=["One, two,", "A, b,"], max_tokens=3, logprobs=2, echo=True)
assert [choice.text[:4] for choice in legacy.choices] == ["One,", "A, b"]
assert legacy.choices[0].logprobs.token_logprobs[0] is None

error = refused(openai.NotFoundError, lambda: client.models.retrieve("nothing"))
assert error.code == "model_not_found" and error.request_id
error = refused(openai.BadRequestError, lambda: client.chat.completions.create(
    model=model, messages=hello, temperature=9))
assert error.param == "temperature"
error = refused(openai.BadRequestError, lambda: client.completions.create(
    model=model, prompt="word " * 9000))
assert error.code == "context_length_exceeded"

with client.chat.completions.create(
    model=model, messages=hello, stream=True, max_tokens=64, n=8, extra_body={"ignore_eos": True},
) as stream:
    next(iter(stream))
deadline = time.monotonic() + 20
while live_sequences() > 0:
    assert time.monotonic() < deadline, "a cancelled stream goes on"
print(f"ok: openai {openai.__version__} for Python")
