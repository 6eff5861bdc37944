"""transformers' continuous batching, on the shapes that the server gets."""

import time

import torch
import transformers

from values import check

WARM_TOKENS = 8


class Batching:
    """A model of random weights; without `generate_batch` every run says why it was left out."""

    def __init__(self, directory, at):
        transformers.utils.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(directory)
        with at:
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.model.eval()
        self.at = at

    def run(self, prompts, tokens_out, streams):
        """Output tokens per second, of all requests given at once and `streams` of them running."""
        if not hasattr(self.model, "generate_batch"):
            return {"skipped": "this transformers has no continuous batching"}
        generation = transformers.GenerationConfig(
            max_new_tokens=tokens_out, do_sample=False, eos_token_id=-1, pad_token_id=0)
        batching = transformers.ContinuousBatchingConfig(max_requests_per_batch=streams)

        def generate(some, count):
            answers = self.model.generate_batch(
                some, generation_config=generation, continuous_batching_config=batching,
                max_new_tokens=count)
            return [len(answer.generated_tokens) for answer in answers.values()]

        generate(prompts[:1], WARM_TOKENS)
        begun = time.perf_counter()
        lengths = generate(prompts, tokens_out)
        seconds = time.perf_counter() - begun
        check(lengths == [tokens_out] * len(prompts), f"answers of {sorted(set(lengths))} tokens")
        return {"output_tokens_per_s": sum(lengths) / seconds, "duration_s": seconds}
