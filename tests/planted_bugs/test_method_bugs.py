"""Bugs planted in the other methods: prompts, prefixes, bottlenecks, LoRA's relatives.

As in test_lora_bugs.py, each breaks one line and names the law that must notice.
"""

from functools import partial

import pytest
from laws.core import contract as laws
from laws.files import refused_method_files as hostile
from laws.methods import houlsby as behind
from laws.methods import lora_family as family
from laws.methods import prefix as prefix_laws
from laws.methods import prompt as prompt_laws
from laws.methods import virtual_tokens as soft
from laws.methods.one_row import contract
from planting import Bug, each_is_caught
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_from_scratch.core import adapter, decoder, matrices
from peft_from_scratch.core.decoder import DecoderAdapter
from peft_from_scratch.files import formats
from peft_from_scratch.methods import (
    bitfit,
    houlsby,
    ia3,
    loftq,
    pissa,
    prefix,
    prompt,
)
from peft_from_scratch.methods.dora import DoRA
from peft_from_scratch.methods.houlsby import Bottleneck
from peft_from_scratch.methods.ia3 import IA3
from peft_from_scratch.methods.pissa import PiSSA
from peft_from_scratch.methods.prefix import Prefix, Reparametrized
from peft_from_scratch.methods.prompt import Prompt
from peft_from_scratch.training import loop, state

attend = ALL_ATTENTION_FUNCTIONS[prefix.NAMES["sdpa"]]


@pytest.fixture(autouse=True)
def no_model_is_asked(monkeypatch):
    """The probe at inject refuses most bugs of prompts and prefixes before a law runs.

    Here the laws are on trial; test_decoder_bugs.py has the bugs of the probe.
    """
    for method in (prompt, prefix):
        monkeypatch.setattr(method, "refuse_unless_equal", lambda *asked: None)


def of_prompt(law, architecture="gpt2", *rest):
    return partial(law, prompt, architecture, *rest)


def of_prefix(law, architecture="gpt2", *rest):
    return partial(law, prefix, architecture, *rest)


def broken(method, name):
    return partial(hostile.a_broken_file_is_refused, method=method, name=name)


PROMPT = {
    "the mask hides P": Bug(
        Prompt.forward,
        "attention_mask.new_ones(",
        "attention_mask.new_zeros(",
        of_prompt(soft.padding_changes_no_logit),
    ),
    "tokens stand where P stands": Bug(
        DecoderAdapter.shifted_position_ids,
        "return position_ids + self.n",
        "return position_ids",
        of_prompt(soft.padding_changes_no_logit),
    ),
    "positions one too low": Bug(
        DecoderAdapter.shifted_position_ids,
        "return position_ids + self.n",
        "return position_ids + self.n - 1",
        of_prompt(soft.positions_from_the_caller_are_moved, "llama"),
    ),
    "P's own positions in reverse": Bug(
        Prompt.forward,
        "torch.arange(self.n, device=E.device)",
        "torch.arange(self.n, device=E.device).flip(0)",
        of_prompt(soft.padding_changes_no_logit),
    ),
    "padding counts as a position": Bug(
        DecoderAdapter.shifted_position_ids,
        "(attention_mask != 0).cumsum(-1)",
        "(attention_mask == attention_mask).cumsum(-1)",
        of_prompt(soft.padding_changes_no_logit),
    ),
    "P in front of the padding": Bug(
        Prompt.forward,
        "E = insert_after_padding(pads,",
        "E = insert_after_padding(0 * pads,",
        of_prompt(soft.padding_changes_no_logit),
    ),
    "padding on the right is taken for padding on the left": Bug(
        prompt.left_padding,
        "((attention_mask != 0).cumsum(-1) == 0).sum(-1)",
        "(attention_mask == 0).sum(-1)",
        of_prompt(soft.padding_changes_no_logit, "gpt2", "right"),
    ),
    "the last n cut off in the place of the first": Bug(
        prompt.drop_prompt,
        "torch.where(j < pads[:, None], j, j + n)",
        "torch.where(j < pads[:, None], j, j)",
        of_prompt(soft.logits_are_those_of_tokens_in_front, "llama"),
    ),
    "the hidden states keep P": Bug(
        prompt.drop_prompt,
        "out.hidden_states = tuple(map(cut, out.hidden_states))",
        "pass",
        of_prompt(soft.what_leaves_has_the_callers_length, "llama"),
    ),
    "P enters the cache with every piece": Bug(
        Prompt.forward,
        "first = self.begins(cache)",
        "first = True",
        prompt_laws.the_cache_holds_n_and_the_tokens,
    ),
    "P behind half of a row's padding": Bug(
        prompt._refuse_padding_alone,
        "if (pads >= t).any():",
        "if False:",
        prompt_laws.a_piece_that_ends_in_a_rows_padding_is_refused,
    ),
    "P in half precision": Bug(
        adapter.trained_dtype,
        "itemsize >= 4",
        "itemsize >= 2",
        partial(soft.half_precision_keeps_P_in_fp32, prompt),
    ),
    "uniform between 0 and 1": Bug(
        Prompt.__init__,
        "dtype=dtype) - STD",
        "dtype=dtype)",
        prompt_laws.starts_uniform_between_minus_and_plus_one_half,
    ),
    "the vocabulary's start is a random one": Bug(
        prompt.initial_ids,
        "return torch.randint(vocabulary, (n,))",
        "return torch.zeros(n, dtype=torch.long)",
        prompt_laws.starts_from_rows_of_the_table,
    ),
    "a start is cut from its front": Bug(
        decoder.token_ids,
        "[:n]",
        "[-n:]",
        partial(soft.ids_are_repeated_or_cut_to_n, prompt),
    ),
    "more positions than the model has": Bug(
        DecoderAdapter.__init__,
        "largest = min(LARGEST_N, positions - 1)",
        "largest = LARGEST_N",
        broken("prompt", "n beyond the positions"),
    ),
    "an encoder's prompt is loaded": Bug(
        formats.Format.arguments,
        "if name in config and config[name] not in values:",
        "if False:",
        broken("prompt", "two submodules"),
    ),
    "the base trains beside P": Bug(
        adapter.apply,
        "model.requires_grad_(False)",
        "pass",
        contract(laws.only_what_is_trainable_moves, "prompt"),
    ),
}

PREFIX = {
    "keys and values exchanged": Bug(
        attend,
        "P_K, P_V = ",
        "P_V, P_K = ",
        of_prefix(soft.logits_are_those_of_tokens_in_front),
    ),
    "the layers' prefixes in reverse": Bug(
        attend,
        "prefix(module.layer_idx)",
        "prefix(1 - module.layer_idx)",
        of_prefix(soft.logits_are_those_of_tokens_in_front),
    ),
    "P behind the keys": Bug(
        prefix._prepend,
        "[P.expand(len(states), -1, -1, -1), states]",
        "[states, P.expand(len(states), -1, -1, -1)]",
        of_prefix(soft.logits_are_those_of_tokens_in_front),
    ),
    "tokens see what follows": Bug(
        prefix._widen,
        "mask.tril(t - t_q)[None, None]",
        "mask[None, None]",
        of_prefix(soft.logits_are_those_of_tokens_in_front),
    ),
    "the mask hides P": Bug(
        prefix._widen,
        "value=True if",
        "value=False if",
        of_prefix(soft.padding_changes_no_logit),
    ),
    "the mask of eager attention hides P": Bug(
        prefix._widen,
        "else 0.0",
        "else -1e30",
        of_prefix(soft.padding_changes_no_logit, "llama", "left", prefix_laws.eager),
    ),
    "the mask is widened on the right": Bug(
        prefix._widen,
        "F.pad(mask, (n, 0)",
        "F.pad(mask, (0, n)",
        of_prefix(soft.padding_changes_no_logit),
    ),
    "layers and sides in another order": Bug(
        Prefix.of_layer,
        ".view(self.n, 2, heads, size).unbind(1)",
        ".view(self.n, heads, 2, size).unbind(2)",
        of_prefix(soft.logits_are_those_of_tokens_in_front),
    ),
    "a layout of our own": Bug(
        prefix.activations,
        ".permute(3, 0, 1, 2, 4)",
        ".permute(3, 0, 2, 1, 4)",
        prefix_laws.P_lies_by_token_layer_keys_and_values,
    ),
    "positions start at 0": Bug(
        Prefix.forward,
        "position_ids = self.shifted_position_ids(",
        "self.shifted_position_ids(",
        of_prefix(soft.logits_are_those_of_tokens_in_front),
    ),
    "positions start again with every piece": Bug(
        Prefix.forward,
        "past = 0 if self.begins(cache) else cache_length(cache)",
        "past = 0",
        of_prefix(soft.pieces_without_a_mask_are_one_pass),
    ),
    "evaluation keeps the P of its first call": Bug(
        Prefix.of_layer,
        "self.P[:, rows]",
        "(self.P if self.training else self.__dict__.setdefault("
        "'kept', self.P.detach().clone()))[:, rows]",
        contract(laws.state_dict_is_the_whole_state, "prefix"),
    ),
    "the attention is left behind": Bug(
        Prefix.on_remove,
        "self.base.config._attn_implementation = self.implementation",
        "pass",
        partial(prefix_laws.remove_restores_the_attention, "eager"),
    ),
    "sdpa whatever the model had": Bug(
        Prefix.on_remove,
        "self.implementation",
        "'sdpa'",
        partial(prefix_laws.remove_restores_the_attention, "eager"),
    ),
    "another attention ignores P": Bug(
        prefix._refuse_another,
        "if now != NAMES[before]:",
        "if False:",
        prefix_laws.another_attention_after_the_injection_is_noticed,
    ),
    "a model that hears nothing is let through": Bug(
        prefix.probe_kv_shape,
        "if len(seen) != config.num_hidden_layers:",
        "if not seen:\n        return (2, 4, 8)\n    if False:",
        prefix_laws.a_model_that_would_ignore_it_is_refused,
    ),
    "a window forgets the start": Bug(
        prefix.activations,
        "DynamicCache()",
        "DynamicCache(config=trunk.config)",
        prefix_laws.a_start_may_be_longer_than_the_window,
    ),
    "a start fifty times too wide": Bug(
        Prefix.__init__,
        "STD * torch.randn(",
        "torch.randn(",
        prefix_laws.starts_near_zero_at_random,
    ),
    "the MLP without its tanh": Bug(
        Reparametrized.__init__,
        "nn.Tanh()",
        "nn.Identity()",
        prefix_laws.the_mlp_is_its_equation,
    ),
    "the MLP's file holds another P": Bug(
        formats._flat_prefix,
        "module.states()",
        "module.states().flip(0)",
        prefix_laws.dropping_the_mlp_keeps_what_it_made,
    ),
}

HOULSBY = {
    "the nonlinearity is forgotten": Bug(
        Bottleneck.forward,
        "sigma(self.down(",
        "(self.down(",
        behind.forward_and_gradients_are_those_of_the_equation,
    ),
    "the upper bias is forgotten": Bug(
        Bottleneck.forward,
        "self.up(narrow)",
        "self.up(narrow) - self.up.bias",
        behind.forward_and_gradients_are_those_of_the_equation,
    ),
    "the way around is forgotten": Bug(
        Bottleneck.forward,
        "y + self.up(narrow)",
        "self.up(narrow)",
        behind.starts_near_the_identity,
    ),
    "behind the first projection": Bug(
        houlsby.last_projections,
        "last[targets.layer_of(model, name), kind] = name",
        "last.setdefault((targets.layer_of(model, name), kind), name)",
        behind.stands_behind_the_last_projections,
    ),
    "behind attention alone": Bug(
        houlsby.plan,
        "PLACEMENTS[config.placement]",
        "PLACEMENTS['houlsby'][:1]",
        partial(behind.stands_behind_the_last_projections, placement="pfeiffer"),
    ),
    "a start a hundred times too wide": Bug(
        Bottleneck.__init__,
        "std=STD,",
        "std=100 * STD,",
        behind.starts_near_the_identity,
    ),
    "a start that is not cut": Bug(
        Bottleneck.__init__,
        "a=-2 * STD, b=2 * STD",
        "a=-1, b=1",
        behind.starts_near_the_identity,
    ),
    "every nonlinearity is a GELU": Bug(
        houlsby.plan,
        "Bottleneck(base, config.m, config.nonlinearity)",
        "Bottleneck(base, config.m)",
        behind.stands_behind_the_last_projections,
    ),
}

DORA = {
    "the norm is trained": Bug(
        DoRA.forward,
        "self.norm()",
        "(as_matrix(self.base) + self.delta()).norm(dim=1)",
        family.the_norm_is_no_part_of_the_gradient,
    ),
    "m is not divided by the norm": Bug(
        DoRA.forward,
        "self.m / self.norm()",
        "self.m",
        contract(laws.starts_from_the_pretrained_model, "dora"),
    ),
    "the norm is that of W0 alone": Bug(
        DoRA.norm,
        "+ self.delta(dtype)",
        "",
        family.the_norm_is_no_part_of_the_gradient,
    ),
    "norms of columns": Bug(
        DoRA.norm,
        ".norm(dim=1)",
        ".norm(dim=0)[torch.arange(len(self.B)) % self.A.shape[1]]",
        family.the_norm_is_no_part_of_the_gradient,
    ),
    "the bias gets the new length too": Bug(
        DoRA.forward,
        "unbiased = unbiased - self.base.bias",
        "pass",
        family.the_norm_is_no_part_of_the_gradient,
    ),
    "the update without its scale": Bug(
        DoRA.forward,
        "g * self.scale * low_rank",
        "g * low_rank",
        family.the_norm_is_no_part_of_the_gradient,
    ),
    "merged without the norm": Bug(
        DoRA.merged,
        "self.m.to(dtype) / self.norm(dtype)",
        "self.m.to(dtype)",
        family.merged_rows_have_the_length_m,
    ),
    "merged without m": Bug(
        DoRA.merged,
        "(self.m.to(dtype) / self.norm(dtype))[:, None] * V",
        "V",
        family.merged_rows_have_the_length_m,
    ),
    "dropout spares W0's part": Bug(
        DoRA.forward,
        "F.linear(dropped, W0) if dropped is not x else y",
        "y",
        family.dropout_falls_on_the_change_alone,
    ),
    "a row of zeros is let through": Bug(
        DoRA.__init__,
        "if not self.m.all():",
        "if False:",
        family.a_row_of_zeros_is_refused,
    ),
}

PISSA = {
    "the residual is the whole weight": Bug(
        PiSSA.on_attach,
        "- self.scale * (self.B0 @ self.A0)",
        "",
        contract(laws.starts_from_the_pretrained_model, "pissa"),
    ),
    "subtracted twice": Bug(
        PiSSA.on_attach,
        "- self.scale *",
        "- 2 * self.scale *",
        contract(laws.starts_from_the_pretrained_model, "pissa"),
    ),
    "the residual is left behind": Bug(
        PiSSA.on_remove,
        "self.base.weight.copy_(self.original)",
        "pass",
        family.removed_after_training_to_the_last_bit,
    ),
    "restored by adding what was subtracted": Bug(
        PiSSA.on_remove,
        "self.base.weight.copy_(self.original)",
        "as_matrix(self.base).add_(self.scale * (self.B0 @ self.A0))",
        family.removed_after_training_to_the_last_bit,
    ),
    "the original is kept by reference": Bug(
        PiSSA.on_attach,
        "self.base.weight.detach().clone()",
        "self.base.weight.detach()",
        family.removed_after_training_to_the_last_bit,
    ),
    "A and B without the scale": Bug(
        matrices.svd_halves,
        "(S[:r] / scale).sqrt()",
        "S[:r].sqrt()",
        family.A_and_B_are_the_principal_triplets,
    ),
    "B of the smallest directions": Bug(
        matrices.svd_halves,
        "U[:, :r]",
        "U[:, -r:]",
        family.A_and_B_are_the_principal_triplets,
    ),
    "all of S in A": Bug(
        matrices.svd_halves,
        "root[:, None] * Vt[:r]",
        "(S[:r] / scale)[:, None] * Vt[:r]",
        family.A_and_B_are_the_principal_triplets,
    ),
    "the file adds the start": Bug(
        formats._change_since_start,
        "-module.B0",
        "module.B0",
        family.a_file_is_a_lora_of_twice_the_rank,
    ),
    "the file's scale is halved": Bug(
        formats._lora_targets,
        "times * m.alpha",
        "m.alpha",
        family.a_file_is_a_lora_of_twice_the_rank,
    ),
    "a tied weight is split": Bug(
        pissa._refuse_tied,
        "if len(sharing) > 1:",
        "if False:",
        family.a_tied_weight_is_refused,
    ),
    "more directions than the weight has": Bug(
        PiSSA.__init__,
        "min(r, *sizes(base))",
        "r",
        family.a_weight_of_fewer_directions_gives_all_of_them,
    ),
    "fewer directions on another scale": Bug(
        PiSSA.__init__,
        "alpha * directions / r",
        "alpha",
        family.a_weight_of_fewer_directions_gives_all_of_them,
    ),
    "a file of fewer directions with the alpha of all": Bug(
        formats._lora_targets,
        "if own != alpha",
        "if False",
        family.a_weight_of_fewer_directions_gives_all_of_them,
    ),
    "what was lost is spread over all directions": Bug(
        loftq.start,
        "module.A[: len(A)].copy_(A)",
        "module.A.copy_(A[:1])",
        family.loftq_starts_at_what_was_lost_in_narrow_weights_too,
    ),
}

IA3S = {
    "keys and values in front, the MLP behind": Bug(
        ia3.plan,
        'kinds.get(name) == "mlp"',
        'kinds.get(name) != "mlp"',
        contract(laws.counts_equal_the_formula, "ia3"),
    ),
    "the bias is merged as it was": Bug(
        IA3.merged,
        "if not self.feedforward and self.base.bias is not None:",
        "if False:",
        family.ia3_is_its_equation,
    ),
    "the bias is not scaled": Bug(
        IA3.forward,
        "(y * l)",
        "(y * l + (1 - l) * self.base.bias)",
        family.ia3_is_its_equation,
    ),
    "queries as well": Bug(
        ia3._keys_values_and_mlp,
        "*targeting.matching(KEYS_AND_VALUES, attention)",
        "*attention",
        family.keys_values_and_the_last_of_the_mlp_are_scaled,
    ),
    "all of the MLP": Bug(
        ia3._keys_values_and_mlp,
        'last_projections(model, ("mlp",), needed=False)',
        '{name for name, kind in kinds.items() if kind == "mlp"}',
        family.keys_values_and_the_last_of_the_mlp_are_scaled,
    ),
    "starts at zero": Bug(
        IA3.__init__,
        "torch.ones(",
        "torch.zeros(",
        contract(laws.starts_from_the_pretrained_model, "ia3"),
    ),
}

BITFIT_AND_LORA_PLUS = {
    "weights train beside the biases": Bug(
        bitfit.plan,
        '== "bias"',
        'in ("bias", "weight")',
        family.biases_and_nothing_else_train,
    ),
    "a bias without a gradient trains": Bug(
        bitfit.reached_by_text,
        "if gradient is not None",
        "if True",
        family.biases_that_no_text_reaches_are_left_alone,
    ),
    "flags stay as the question left them": Bug(
        bitfit.reached_by_text,
        "parameter.requires_grad_(flag)",
        "pass",
        family.biases_that_no_text_reaches_are_left_alone,
    ),
    "the ratio is that of A": Bug(
        state.parameter_groups,
        "m.get_parameter(name)) for m in modules for name in m.loraplus_parameters",
        "m.A) for m in modules if m.loraplus_parameters",
        family.B_moves_lr_ratio_times_as_far,
    ),
    "the ratio is forgotten": Bug(
        loop.optimizer_steps,
        'lr * group["ratio"]',
        "lr",
        family.a_B_of_zero_ends_its_first_step_at_the_rate,
    ),
    "all tensors are fast": Bug(
        state.parameter_groups,
        '"ratio": 1.0},\n        {"params": quick',
        '"ratio": config.lr_ratio},\n        {"params": quick',
        family.B_moves_lr_ratio_times_as_far,
    ),
    "rates grow from step to step": Bug(
        loop.optimizer_steps,
        '= lr * group["ratio"]',
        '= group["lr"] * group["ratio"] ** 0.1',
        family.resumed_is_bit_equal,
    ),
    "a ratio without a LoRA does nothing": Bug(
        state.parameter_groups,
        "if not fast:",
        "if False:",
        family.a_ratio_without_a_lora_is_refused,
    ),
}
BUGS = {
    f"{method}: {bug}": row
    for method, table in {
        "prompt": PROMPT,
        "prefix": PREFIX,
        "houlsby": HOULSBY,
        "dora": DORA,
        "pissa": PISSA,
        "ia3": IA3S,
        "bitfit, lora+": BITFIT_AND_LORA_PLUS,
    }.items()
    for bug, row in table.items()
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
