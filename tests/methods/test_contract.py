"""Every law x every method x every architecture. A new method is one row of METHODS."""

import pytest
from architectures import CONFIGS
from laws.core import contract as laws
from laws.methods.table import LAWS, METHODS, cases

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize(
    "law, method, architecture",
    [pytest.param(*case, id=name) for name, case in cases(LAWS, METHODS, CONFIGS)],
)
def test_each_law_holds(law, method, architecture):
    law(method, architecture)


# Random Llama, Qwen and Gemma models are not fp64 inside: their norms compute in fp32.
@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
@pytest.mark.parametrize(
    "method",
    [m for m in METHODS if m.mergeable and not m.prepare],
    ids=lambda m: m.name,
)
def test_merged_equals_unmerged_in_fp64(method, architecture):
    laws.merged_equals_unmerged_in_fp64(method, architecture)
