// OpenAI's Node client against a running server: node openai_sdk.mjs BASE_URL MODEL
import assert from "node:assert/strict";
import OpenAI from "openai";

const [base, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const chat = (extra) => client.chat.completions.create({ model, messages, ...extra });

const whole = await chat({ temperature: 0, max_tokens: 30 });
const text = whole.choices[0].message.content;
assert.match(text, /Paris/);

let streamed = "";
let usage = null;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await chat({ temperature: 0, max_tokens: 30, ...options })) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, text);
// The device's time is measured, so it alone differs.
for (const one of [usage, whole.usage]) delete one.cost_details.gpu_ms;
assert.deepEqual(usage, whole.usage);

const several = await chat({ n: 3, max_tokens: 4 });
assert.deepEqual(several.choices.map((choice) => choice.index), [0, 1, 2]);

const stopped = await chat({ temperature: 0, stop: "Paris" });
assert.equal(stopped.choices[0].message.content, text.split("Paris")[0]);

const scored = await chat({ max_tokens: 3, logprobs: true, top_logprobs: 2 });
assert.ok(scored.choices[0].logprobs.content.every((entry) => entry.top_logprobs.length === 2));

await assert.rejects(chat({ temperature: 9 }), (error) =>
  error instanceof OpenAI.BadRequestError && error.param === "temperature");
await assert.rejects(client.models.retrieve("nothing"), OpenAI.NotFoundError);

const stream = await chat({ stream: true, max_tokens: 64, n: 8, ignore_eos: true });
for await (const _ of stream) break;
stream.controller.abort();
const live = async () => {
  const metrics = await (await fetch(`${base}/metrics`)).text();
  return Number(metrics.match(/^candela:live_sequences\{.*\} (.*)$/m)[1]);
};
const deadline = Date.now() + 20_000;
while ((await live()) > 0) assert.ok(Date.now() < deadline, "a cancelled stream goes on");
console.log("ok: openai for Node");
