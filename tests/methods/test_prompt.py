"""A soft prompt alone; what it shares with a prefix is in test_virtual_tokens.py."""

from laws.methods.virtual_tokens import started
from model_state import refused

import peft_from_scratch as pfs
from peft_from_scratch.methods import prompt


def test_a_prompt_cannot_be_merged_and_says_why():
    model, _ = started(prompt, "llama")
    with refused(model, "soft prompt", "positions", error=pfs.CannotMerge):
        pfs.merge(model)
