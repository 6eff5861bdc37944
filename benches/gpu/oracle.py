"""transformers' own log-probabilities of a sequence."""

import torch
import transformers

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Oracle:
    def __init__(self, directory, dtype, at):
        # TF32 would be no reference for anything.
        torch.backends.cuda.matmul.allow_tf32 = False
        transformers.utils.logging.disable_progress_bar()
        self.at = at
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=DTYPES[dtype], attn_implementation="eager", local_files_only=True)
        self.model.to(at).eval()

    @torch.no_grad()
    def logprobs(self, tokens):
        """[tokens, vocab] in f64: of what may follow each token."""
        logits = self.model(torch.tensor([tokens], device=self.at)).logits[0]
        return logits.double().log_softmax(-1).cpu()
