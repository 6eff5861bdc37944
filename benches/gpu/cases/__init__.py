"""What each kernel is asked, and what torch says that it should answer."""

from . import attention_decode, attention_prefill, cache, gemv, logprobs, rows, sampling, upkeep

MODULES = [rows, cache, upkeep, gemv, attention_decode, attention_prefill, sampling, logprobs]


def table(large):
    """All cases: the same on every device and, if it is a real one, more of real sizes."""
    return [case for module in MODULES for case in module.cases(large)]
