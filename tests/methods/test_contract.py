"""Every law x every method x every architecture. A new method is one row of METHODS."""

import pytest
from architectures import CONFIGS
from laws.core import contract as laws
from laws.methods.table import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


# law -> the methods that it speaks of
LAWS = {
    laws.starts_from_the_pretrained_model: lambda m: True,
    laws.counts_equal_the_formula: lambda m: True,
    laws.tensors_lie_in_memory_as_files_do: lambda m: True,
    laws.only_what_is_trainable_moves: lambda m: True,
    laws.every_tensor_moves_after_an_evaluation: lambda m: True,
    laws.a_plan_touches_nothing: lambda m: True,
    laws.inject_is_plan_and_apply: lambda m: True,
    laws.remove_is_exact: lambda m: True,
    laws.disabled_is_the_untouched_model: lambda m: True,
    laws.mode_is_kept_and_changes_nothing: lambda m: True,
    laws.merged_equals_unmerged: lambda m: True,
    laws.merge_is_all_or_nothing: lambda m: m.wraps and m.mergeable,
    laws.a_second_injection_is_refused: lambda m: True,
    laws.saved_and_loaded_is_bit_equal: lambda m: m.saved,
    laws.padding_changes_no_generated_token: lambda m: True,
    laws.checkpointing_changes_no_gradient: lambda m: True,
    laws.a_copy_is_independent: lambda m: True,
    laws.state_dict_is_the_whole_state: lambda m: True,
    laws.two_adapters_in_turn_share_a_base: lambda m: m.restores,
    laws.autocast_trains_close_to_fp32: lambda m: True,
}


def cases(chosen, architectures):
    for law, applies in chosen.items():
        for method in filter(applies, METHODS):
            for architecture in filter(
                method.architectures.__contains__, architectures
            ):
                label = f"{law.__name__}-{method.name}-{architecture}"
                yield pytest.param(law, method, architecture, id=label)


@pytest.mark.parametrize("law, method, architecture", list(cases(LAWS, CONFIGS)))
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
