"""Small models of every family with random weights, saved as a hub would have them."""

import shutil

import torch
import transformers

import tokenizer

# Odd, so that rows of logits are padded.
VOCAB = 1013
CONTEXT = 512
# Weights so large that attention has favourites and logits differ.
WEIGHT_STD, NORM_STD, BIAS_STD = 0.06, 0.25, 0.2

COMMON = dict(vocab_size=VOCAB, hidden_size=512, intermediate_size=1032, num_attention_heads=8,
              num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=WEIGHT_STD,
              bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=True)


def config(family):
    """Of each family what is its own: the scaling of rope, biases, norms of heads, windows."""
    if family == "llama":
        scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        return transformers.LlamaConfig(**COMMON, num_hidden_layers=3, head_dim=64,
                                        rope_parameters=scaling)
    if family == "qwen2":
        return transformers.Qwen2Config(**{**COMMON, "num_attention_heads": 4}, num_hidden_layers=2,
                                        tie_word_embeddings=True)
    if family == "qwen3":
        return transformers.Qwen3Config(**COMMON, num_hidden_layers=2, head_dim=128)
    # 24: less than prompts have, and no multiple of a block.
    return transformers.MistralConfig(**COMMON, num_hidden_layers=4, head_dim=64, sliding_window=24)


FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]


def write(family, directory):
    """The same weights each time, in bf16."""
    if (directory / "tokenizer.json").exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(FAMILIES.index(family))
    model = transformers.AutoModelForCausalLM.from_config(config(family), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, NORM_STD)
            elif name.endswith("bias"):
                parameter.normal_(0.0, BIAS_STD)
    model.save_pretrained(directory)
    tokenizer.write(directory, VOCAB)
    return directory
