"""Bugs planted in what stands before the tokens: its cache, its lengths, its probe.

Each removes a refusal, or breaks what makes a model right that was wrong before.
"""

from functools import partial

from laws.methods import prefix as prefix_laws
from laws.methods import prompt as prompt_laws
from laws.methods import unlike_tokens as unlike
from laws.methods import virtual_tokens as soft
from planting import Bug, each_is_caught
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_from_scratch.core import decoder, decoder_probe
from peft_from_scratch.core.decoder import DecoderAdapter
from peft_from_scratch.files import formats
from peft_from_scratch.methods import prefix, prompt
from peft_from_scratch.methods.prefix import Prefix
from peft_from_scratch.methods.prompt import Prompt
from peft_from_scratch.training import generation

attend = ALL_ATTENTION_FUNCTIONS[prefix.NAMES["sdpa"]]


def on_llama(law, method):
    return partial(law, method, "llama")


def refusal(method, architecture):
    (row,) = (row for row in unlike.REFUSED if row[:2] == (method, architecture))
    return partial(unlike.what_differs_from_tokens_is_refused, row)


def reading(method, architecture):
    return partial(unlike.what_is_accepted_equals_tokens, (method, architecture))


CACHES = {
    "a cache that another model filled": Bug(
        DecoderAdapter.begins,
        "if getattr(cache, MARK, None) != self.mark:",
        "if False:",
        on_llama(soft.a_cache_filled_without_it_is_refused, prefix),
    ),
    "any adapter's mark will do": Bug(
        DecoderAdapter.begins,
        "!= self.mark",
        "is None",
        on_llama(soft.a_cache_filled_without_it_is_refused, prompt),
    ),
    "the same number on all adapters": Bug(
        DecoderAdapter.__init__,
        "uuid4().bytes",
        "b''",
        on_llama(soft.a_cache_filled_without_it_is_refused, prompt),
    ),
    "an emptied cache is taken for a full one": Bug(
        decoder.is_empty,
        "return bool(length == 0)",
        "return not hasattr(cache, MARK)",
        on_llama(soft.a_copied_cache_goes_on, prompt),
    ),
    "a mask of another length": Bug(
        DecoderAdapter.refuse_lengths,
        "if columns != past + t:",
        "if False:",
        on_llama(soft.masks_of_another_length_are_refused, prefix),
    ),
    "the whole text, behind a cache": Bug(
        prompt._refuse_cut,
        "begin != past",
        "False",
        prompt_laws.whole_texts_with_a_cache_are_refused,
    ),
    "P in the cache counts as tokens": Bug(
        Prompt._refuse_misread,
        "length - self.n",
        "length",
        on_llama(soft.a_conversation_goes_on_from_its_cache, prompt),
    ),
    "a mask's 2 counts twice": Bug(
        DecoderAdapter.shifted_position_ids,
        "(attention_mask != 0)",
        "attention_mask.long()",
        on_llama(soft.any_number_but_zero_is_a_real_token, prefix),
    ),
    "a cache of fixed length without room": Bug(
        prompt._refuse_full,
        "0 < length < n + most",
        "0 < length < most",
        prompt_laws.a_cache_of_fixed_length_has_room_for_P,
    ),
    "only past_key_values is a cache": Bug(
        decoder.cache_of,
        "for name in CACHES",
        "for name in CACHES[:1]",
        prompt_laws.a_state_that_counts_no_tokens_goes_on,
    ),
    "a state is always a new one": Bug(
        decoder.is_empty,
        "not cache.has_previous_state()",
        "True",
        prompt_laws.a_state_that_counts_no_tokens_goes_on,
    ),
    "heads of a model that has none": Bug(
        formats._heads,
        "except (AttributeError, RuntimeError):",
        "except TypeError:",
        prompt_laws.a_model_without_heads_is_saved,
    ),
}

LENGTHS = {
    "n is not counted in forward": Bug(
        DecoderAdapter.refuse_beyond_table,
        "self.n + tokens > self.table",
        "tokens > self.table",
        partial(soft.a_full_length_counts_n, prefix),
    ),
    "one position is lost": Bug(
        DecoderAdapter.refuse_beyond_table,
        "self.n + tokens > self.table",
        "self.n + tokens >= self.table",
        partial(soft.a_full_length_counts_n, prompt),
    ),
    "n is not counted in generate": Bug(
        decoder.positions,
        "limit - in_front(model)",
        "limit",
        partial(soft.a_full_length_counts_n, prompt),
    ),
    "a rotary model ends as well": Bug(
        decoder.table_of_positions,
        "return limit if tables else None",
        "return limit",
        partial(soft.rotary_positions_do_not_end, prompt),
    ),
    "a window without P": Bug(
        generation.generate,
        "in_front(model) + most",
        "most",
        prompt_laws.pads_and_P_do_not_push_tokens_out_of_a_window,
    ),
    "packed rows": Bug(
        prompt._refuse_packed,
        "if named or restarts:",
        "if named:",
        prompt_laws.packed_rows_are_refused,
    ),
    "packed rows by their lengths": Bug(
        prompt._refuse_packed,
        "if named or restarts:",
        "if restarts:",
        prompt_laws.packed_rows_are_refused,
    ),
    "packed rows see no prefix but the first": Bug(
        prefix._widen,
        "value=True if",
        "value=False if",
        prefix_laws.packed_rows_each_see_it,
    ),
    "segments of too few tokens": Bug(
        prompt._refuse_one_a_token,
        "value.shape[:2] == (b, t)",
        "False",
        prompt_laws.arguments_with_one_value_a_token_are_refused,
    ),
}

PROBE = {
    "no model is asked": Bug(
        decoder_probe._difference,
        "if not distance < bound:",
        "if False:",
        refusal(prefix, "bart"),
    ),
    "nor one that changes what values it reads": Bug(
        decoder_probe._difference,
        "if not distance < bound:",
        "if False:",
        refusal(prefix, "doge"),
    ),
    "nor one that needs ids in each layer": Bug(
        decoder_probe._difference,
        "if not distance < bound:",
        "if False:",
        refusal(prompt, "gemma3n_text"),
    ),
    "half precision is not asked": Bug(
        decoder_probe._difference,
        "else CLOSE_IN_HALF",
        "else 1.0",
        unlike.half_precision_hides_nothing,
    ),
    "P is asked where it starts, and nowhere else": Bug(
        decoder_probe._difference,
        "parameter *= 1.5",
        "pass",
        refusal(prompt, "gemma4_text"),
    ),
    "what it returns beside the states": Bug(
        decoder_probe._difference,
        "if others:",
        "if False:",
        refusal(prompt, "prophetnet"),
    ),
    "keys and values of two shapes": Bug(
        prefix.probe_kv_shape,
        "if len(shapes) > 1:",
        "if False:",
        refusal(prefix, "deepseek_v3"),
    ),
    "a start without the state that tokens leave": Bug(
        prefix.activations,
        "if any(isinstance(layer",
        "if False and any(isinstance(layer",
        unlike.a_start_that_leaves_a_state_is_refused,
    ),
    "a probe that draws": Bug(
        prefix._large,
        "with scoped.seeded(0, next(trunk.parameters()).device):",
        "if True:",
        unlike.the_probe_draws_nothing,
    ),
    "the encoder that owns the layers": Bug(
        decoder.find_decoder,
        "while name and not _embeds_ids(modules[name]):",
        "while False:",
        unlike.the_trunk_is_what_embeds_ids,
    ),
    "a layer's prefix for all": Bug(
        attend,
        "prefix(module.layer_idx)",
        "prefix(0)",
        reading(prefix, "bert"),
    ),
}

DEVICES = {
    "the MLP runs once for all layers": Bug(
        Prefix.forward,
        "{KEYWORD: self.of_layer}",
        "{KEYWORD: [each.unbind(1) for each in self.states().unbind(1)].__getitem__}",
        partial(soft.reentrant_checkpointing_changes_no_gradient, prefix, hidden=8),
    ),
    "the device of the parameters": Bug(
        Prefix.forward,
        "past, t, tokens.device",
        "past, t, next(self.parameters()).device",
        partial(soft.a_replica_equals_the_model, prefix),
    ),
}

# What a missing refusal leads to is an error of torch or transformers, too.
ERRORS = (AssertionError, AttributeError, IndexError, RuntimeError, ValueError)
ERRORS += (StopIteration,)
test_a_planted_bug_is_caught = each_is_caught(
    CACHES | LENGTHS | PROBE | DEVICES, errors=ERRORS
)
