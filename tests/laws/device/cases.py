"""CASES: what a device is held to, {name: law}, and the bugs that it must notice.

Every law of the contract x every way of computing x three architectures; the laws of
models.py likewise; the laws of pieces.py, one case each.
"""

from functools import partial

from laws.core import contract
from laws.device import bugs, models, pieces
from laws.methods.table import LAWS, METHODS, cases
from peft_from_scratch import methods

ARCHITECTURES = ("llama", "gpt2", "opt")
NO_AUTOCAST = {contract.autocast_trains_close_to_fp32}  # the device has none
# Rows that differ from another one in numbers alone, or are two others together.
SAME_CODE = {
    "full-lost",
    "lora-rslora",
    "lora-own-biases",
    "lora-patterns",
    "dora-dropout",
    "pfeiffer",
    "qlora-dropout",
    "qlora-biases",
    "qlora-patterns",
    "bitfit-on-four-bits",
    "houlsby-on-four-bits",
    "prefix-on-four-bits",
    "prompt-on-four-bits",
}
ROWS = [row for row in METHODS if row.name not in SAME_CODE]
# Beyond the first architecture: laws of what models.py does not compare.
OF_ARCHITECTURES = {
    contract.starts_from_the_pretrained_model,
    contract.only_what_is_trainable_moves,
    contract.checkpointing_changes_no_gradient,
}
OF_TWINS = {method.name for method in methods.METHODS} | {"prefix-mlp"}
TWINS = [row for row in METHODS if row.name in OF_TWINS] + models.PACKING
RESUMED = [row for row in METHODS if row.name in ("full", "lora-dropout", "prompt")]


def contracts():
    """{name: law} of the contract's laws."""
    first, *others = ARCHITECTURES
    every = {law: speaks for law, speaks in LAWS.items() if law not in NO_AUTOCAST}
    some = {law: speaks for law, speaks in every.items() if law in OF_ARCHITECTURES}
    chosen = [*cases(every, ROWS, [first]), *cases(some, ROWS, others)]
    return {name: partial(*case) for name, case in chosen}


def twins():
    """{name: law} of the laws of models.py."""
    resumed = {models.a_resumed_run_is_the_straight_run: lambda row: True}
    laws = {law: lambda row: True for law in models.LAWS}
    chosen = [
        *cases(laws, TWINS, ARCHITECTURES),
        *cases(resumed, RESUMED, ARCHITECTURES),
    ]
    return {name: partial(*case) for name, case in chosen}


SOUND = contracts() | twins() | {law.__name__: law for law in pieces.LAWS}
CASES = SOUND | {name: partial(bugs.is_caught, bug) for name, bug in bugs.BUGS.items()}
