"""transformers' continuous batching, as a worker: DEVICE DIRECTORY. A name is `transformers STREAMS streams
IN/OUT`, which is a shape."""

import sys
import time

import torch
import transformers

import workers
from shapes import Shape
from values import check

WARM_TOKENS = 8


class Batching:
    """A model of random weights."""

    def __init__(self, directory, at):
        transformers.utils.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(directory)
        self.vocab = config.vocab_size
        with at:
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.model.eval()

    def run(self, shape):
        """Output tokens per second, all requests given at once and as many as streams running."""
        generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        batching = transformers.ContinuousBatchingConfig(max_requests_per_batch=shape.streams)

        def generate(prompts, count):
            answers = self.model.generate_batch(
                prompts, generation_config=generation, continuous_batching_config=batching,
                max_new_tokens=count)
            return [len(answer.generated_tokens) for answer in answers.values()]

        prompts = shape.prompts(self.vocab, shape.requests)
        generate(prompts[:1], WARM_TOKENS)
        begun = time.perf_counter()
        lengths = generate(prompts, shape.tokens_out)
        seconds = time.perf_counter() - begun
        check(lengths == [shape.tokens_out] * len(prompts), f"answers of {sorted(set(lengths))} tokens")
        return {"output_tokens_per_s": sum(lengths) / seconds, "duration_s": seconds}


def main():
    device, directory = sys.argv[1:]
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        why = {"skipped": f"transformers {transformers.__version__} has no continuous batching"}
        return workers.serve(lambda name: why)
    batching = Batching(directory, torch.device(device))
    return workers.serve(lambda name: batching.run(Shape.of(name.removeprefix("transformers "))))


main()
