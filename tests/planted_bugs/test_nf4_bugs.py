"""Bugs planted in NF4 and QLoRA: a law catches each.

As in test_lora_bugs.py, each breaks one line and names the law that must notice.
"""

from functools import partial

import torch
from laws.core import contract as laws
from laws.files import quantized_models as on_disk
from laws.methods import qlora as beside
from laws.methods.one_row import contract
from laws.nf4 import blocks as numbers
from laws.nf4 import keeping as kept
from laws.nf4 import linear as products
from planting import Bug, each_is_caught

from peft_from_scratch.core import counting, merge, targets
from peft_from_scratch.files import base_notes, combine, exchange, quantized
from peft_from_scratch.methods import full, lora_fast, pissa, qlora
from peft_from_scratch.models import load
from peft_from_scratch.nf4 import (
    NF4Linear,
    affine,
    blocks,
    codes,
    double,
    keeping,
    linear,
    spec,
)
from peft_from_scratch.nf4.linear import DequantBuffer, DequantMatmul


def nearest(code="nf4"):
    return partial(numbers.every_code_is_the_nearest, code)


def broken(name):
    return partial(on_disk.a_broken_file_is_refused, name=name)


def left(name):
    return partial(products.a_refusal_leaves_the_model_as_it_was, name)


def behind(name):
    return partial(beside.a_refusal_leaves_nothing_behind, name)


def cannot(name):
    return partial(beside.what_cannot_be_merged_is_left_alone, name)


NUMBERS = {
    "eight steps below zero": Bug(
        codes.normal_float,
        "k / 7) / last for k in range(7)",
        "k / 8) / last for k in range(7)",
        numbers.the_published_table_is_its_derivation,
    ),
    "quantiles up to infinity's neighbour": Bug(
        codes.normal_float,
        "step = offset - 0.5",
        "offset = 0.97; step = offset - 0.5",
        numbers.the_offset_is_the_one_that_the_table_was_made_with,
    ),
    "absmax without abs": Bug(
        blocks._ratios,
        "torch.amax(rows.abs(), ",
        "torch.amax(rows, ",
        numbers.blocks_are_runs_of_values_in_memory_order,
    ),
    "absmax of the short block without abs": Bug(
        blocks._ratios,
        "values[whole:].abs().amax()",
        "values[whole:].amax()",
        numbers.blocks_are_runs_of_values_in_memory_order,
    ),
    "nibbles in the other order": Bug(
        spec.pack,
        "(codes[::2] << 4) | codes[1::2]",
        "(codes[1::2] << 4) | codes[::2]",
        numbers.the_first_of_a_pair_is_in_the_high_nibble,
    ),
    "a code too low": Bug(
        blocks.nearest,
        "for midpoint in midpoints:",
        "for midpoint in midpoints[1:]:",
        nearest(),
    ),
    "the lower value in the place of the nearest": Bug(
        blocks.nearest,
        "_, midpoints, order = book(codebook, ratios.device)",
        "midpoints, _, order = book(codebook, ratios.device); "
        "midpoints = midpoints[1:]",
        nearest(),
    ),
    "the rank is taken for FP4's code": Bug(
        blocks.nearest,
        "order[rank.int()].to(torch.uint8)",
        "rank",
        nearest("fp4"),
    ),
    "blocks along the columns": Bug(
        blocks.quantize,
        "w.detach().reshape(-1)",
        "w.detach().mT.reshape(-1)",
        numbers.blocks_are_runs_of_values_in_memory_order,
    ),
    "tiny blocks are multiplied with an inverse that overflows": Bug(
        blocks._ratios,
        "if (absmax[: len(rows)] < TINY).any():",
        "if False:",
        numbers.scales_below_1e_37_lose_nothing,
    ),
    "pieces that end within a byte": Bug(
        blocks._chunks,
        "2 * block * max(1, most // (2 * block))",
        "block * max(1, most // block)",
        numbers.pieces_on_the_way_are_not_seen,
    ),
    "every piece has the first one's constants": Bug(
        blocks.dequantize,
        "constants = absmax[start // q.block :",
        "constants = absmax[0 :",
        numbers.pieces_on_the_way_are_not_seen,
    ),
    "the short block has another's constant": Bug(
        double.scale,
        "values[whole:].mul_(constants[-1])",
        "values[whole:].mul_(constants[0])",
        numbers.blocks_are_runs_of_values_in_memory_order,
    ),
    "NaN is quantized": Bug(
        blocks.quantize,
        "if not absmax.isfinite().all():",
        "if False:",
        numbers.a_nan_is_not_quantized,
    ),
    "the second absmax is forgotten": Bug(
        double.DoubleQuantized.dequantize,
        "scale(constants, self.nested_absmax, BLOCK)",
        "pass",
        numbers.doubled_constants_are_close_to_their_own,
    ),
    "the offset is forgotten": Bug(
        double.DoubleQuantized.dequantize,
        "constants.add_(self.offset)",
        "constants",
        numbers.doubled_constants_are_close_to_their_own,
    ),
    "the mean is not taken off": Bug(
        double.double_quantize,
        "F.pad(absmax - offset, ",
        "F.pad(absmax, ",
        numbers.doubled_constants_are_close_to_their_own,
    ),
    "the sum of the constants overflows": Bug(
        double._mean,
        "torch.where(mean.isfinite(), mean, shares)",
        "mean",
        partial(numbers.what_is_finite_comes_back_finite, kind="a sum that overflows"),
    ),
    "the shares of the mean sum up to more than its largest": Bug(
        double._mean,
        ".clamp(max=largest)",
        "",
        partial(numbers.what_is_finite_comes_back_finite, kind="all at the end"),
    ),
    "a constant is rounded beyond its dtype": Bug(
        double.double_quantize,
        "codes - beyond.to(torch.uint8)",
        "codes",
        partial(numbers.what_is_finite_comes_back_finite, dtype=torch.float16),
    ),
    "one unit for all constants": Bug(
        double.double_quantize,
        "rows.abs().amax(dim=1) if",
        "rows.abs().amax().expand(len(rows)).contiguous() if",
        numbers.doubled_constants_are_close_to_their_own,
    ),
    "sixteen steps of affine int4": Bug(
        affine.Affine.of.__func__,
        "- low) / 15",
        "- low) / 16",
        numbers.affine_is_fifteen_steps_from_the_lowest_to_the_highest,
    ),
    "affine int4 without its lowest value": Bug(
        affine.Affine.dequantize,
        "self.low[:, None] + rows",
        "rows",
        numbers.affine_is_fifteen_steps_from_the_lowest_to_the_highest,
    ),
    "out is not written to": Bug(
        blocks.dequantize,
        "flat, absmax = out.view(-1)",
        "flat, absmax = out.clone().view(-1)",
        numbers.out_is_written_to_and_its_dtype_counts,
    ),
}

LOOKUPS = {
    name: Bug(function, right, wrong, numbers.threads_and_places_are_not_seen)
    for name, (function, right, wrong) in {
        "half a row of a lookup is another thread's": (
            blocks._look_up,
            "bytes_.view(threads, -1).long()",
            "bytes_.view(-1, threads).T.long()",
        ),
        "the constants are multiplied after rounding": (
            blocks.dequantize,
            "scale(values, constants, q.block)\n            part.copy_(values)",
            "part.copy_(values)\n            scale(part, constants, q.block)",
        ),
    }.items()
}

KEEPING = {
    "kept weights are dequantized all the same": Bug(
        NF4Linear.dequantized,
        "if W is not None:",
        "if W is None and kept:",
        kept.kept_weights_answer_with_the_same_bits,
    ),
    "the dtype of a kept weight is not looked at": Bug(
        keeping.Unpacked.weight,
        "state = dtype, *(",
        "state = None, *(",
        kept.autocast_and_its_end_are_seen_inside,
    ),
    "what is dropped still counts": Bug(
        keeping.Unpacked._drop,
        "self.nbytes -= self._weights.pop(key)[0].nbytes",
        "del self._weights[key]",
        kept.autocast_and_its_end_are_seen_inside,
    ),
    "the budget is looked at before the weight is counted": Bug(
        keeping.Unpacked.weight,
        "self.nbytes + layer.values * dtype.itemsize > self.budget_bytes",
        "self.nbytes >= self.budget_bytes",
        kept.the_budget_is_never_exceeded,
    ),
    "the first that does not fit ends it": Bug(
        keeping.Unpacked.weight,
        "> self.budget_bytes:\n",
        "> self.budget_bytes:\n            self.budget_bytes = 0\n",
        kept.the_budget_is_never_exceeded,
    ),
    "an error leaves the weights": Bug(
        keeping.unpacked,
        "    finally:\n",
        "    except GeneratorExit:\n",
        kept.all_is_freed_at_the_end_also_after_an_error,
    ),
    "the layers stay in the block": Bug(
        keeping.unpacked,
        "layer.unpacked = None",
        "pass",
        kept.all_is_freed_at_the_end_also_after_an_error,
    ),
    "a write to the codes is not seen": Bug(
        keeping._version,
        "0 if tensor.is_inference() else tensor._version",
        "0",
        kept.a_change_inside_is_seen,
    ),
    "other constants are not seen": Bug(
        keeping.Unpacked.weight,
        "[*layer._buffers.values()]",
        "[layer.packed]",
        kept.a_change_inside_is_seen,
    ),
    "another tensor with codes is not seen": Bug(
        keeping.Unpacked.weight,
        "(id(t), _version(t)) for t",
        "_version(t) for t",
        kept.a_change_inside_is_seen,
    ),
    "the inner block takes over": Bug(
        keeping.unpacked,
        " and module.unpacked is None",
        "",
        kept.a_block_in_a_block_leaves_the_outer_one_its_weights,
    ),
    "a copy is in the block": Bug(
        keeping.Unpacked.__deepcopy__,
        "return None",
        "return self",
        kept.a_copy_made_inside_keeps_nothing,
    ),
    "threads do not wait for each other": Bug(
        keeping.Unpacked.weight,
        "with self._lock:",
        "if True:",
        kept.two_threads_in_one_block_dequantize_once,
    ),
    "streams share what is kept": Bug(
        keeping.Unpacked.weight,
        "(layer, stream), [",
        "layer, [",
        kept.a_stream_does_not_read_what_another_one_writes,
    ),
    "bytes are counted before they are there": Bug(
        keeping.Unpacked.weight,
        "layer.dequantize_into(W)",
        "self.nbytes += W.nbytes; layer.dequantize_into(W); self.nbytes -= W.nbytes",
        kept.an_error_while_a_weight_is_made_counts_no_bytes,
    ),
}

ERRORS = {
    "autograd keeps the weight": Bug(
        NF4Linear.forward,
        "if torch.is_grad_enabled() else times_dequantized",
        "if False else times_dequantized",
        kept.no_graph_holds_a_kept_weight,
    ),
    "a result is written in pairs where it has none": Bug(
        blocks._holds_pairs,
        "part.dtype == torch.float32 and pairs_fit",
        "part.dtype == torch.float32",
        numbers.threads_and_places_are_not_seen,
    ),
    "threads share what cannot be shared evenly": Bug(
        blocks._look_up,
        "if threads == 1 or len(out) % threads:",
        "if threads == 1:",
        numbers.threads_and_places_are_not_seen,
    ),
}

SPEC = {
    name: Bug(
        function, right, wrong, numbers.the_definition_and_the_library_are_bit_equal
    )
    for name, (function, right, wrong) in {
        "tiny blocks are multiplied by the spec": (
            spec.ratios_of,
            "absmax < 1e-37",
            "absmax < 0",
        ),
        "short blocks are multiplied by the spec": (
            spec.ratios_of,
            " | (numbers >= whole)",
            "",
        ),
        "every block is divided by the spec": (
            spec.ratios_of,
            "absmax < 1e-37",
            "absmax < float('inf')",
        ),
        "on a midpoint the spec takes the upper value": (
            spec.spec_quantize,
            "> midpoints",
            ">= midpoints",
        ),
        "the spec takes the rank for the code": (
            spec.spec_quantize,
            "order[ranks]",
            "ranks",
        ),
        "the spec's midpoints are values": (
            spec.spec_quantize,
            "(values[:-1] + values[1:]) / 2",
            "values[:-1]",
        ),
        "the spec's absmax without abs": (
            spec.spec_quantize,
            "rows.abs().amax(dim=1)",
            "rows.amax(dim=1)",
        ),
        "the spec's constants one value late": (
            spec.spec_dequantize,
            "repeat_interleave(block)[: len(codes)]",
            "repeat_interleave(block).roll(1)[: len(codes)]",
        ),
        "nibbles are unpacked in the other order": (
            spec.unpack,
            "[packed >> 4, packed & 15]",
            "[packed & 15, packed >> 4]",
        ),
        "tiny blocks are multiplied": (
            blocks._ratios,
            "if (absmax[: len(rows)] < TINY).any():",
            "if False:",
        ),
        "the short block is multiplied": (
            blocks._ratios,
            "values[whole:] / absmax[-1]",
            "values[whole:] * (1 / absmax[-1])",
        ),
        "every block is divided": (
            blocks._ratios,
            "rows * (1 / absmax[: len(rows)].clamp(min=TINY))[:, None]",
            "rows / absmax[: len(rows)].clamp(min=TINY)[:, None]",
        ),
        "on a midpoint the upper value": (
            blocks.nearest,
            "torch.gt(",
            "torch.ge(",
        ),
        "the values of a byte change places": (
            blocks._look_up,
            "bytes_.int()",
            "((bytes_ << 4) | (bytes_ >> 4)).int()",
        ),
        "values are rounded before they are scaled": (
            blocks.dequantize,
            "both.view(torch.float32)[",
            "both.view(torch.float32).bfloat16().float()[",
        ),
    }.items()
}

PRODUCTS = {
    "Conv1D is not transposed": Bug(
        linear.quantize_model,
        "as_matrix(module)",
        "module.weight",
        partial(products.heads_and_embeddings_stay_and_every_projection_goes, "gpt2"),
    ),
    "backward does not transpose": Bug(
        DequantMatmul.backward,
        "not ctx.transpose",
        "ctx.transpose",
        partial(products.product_and_gradient_are_those_of_the_dense_weight, "llama"),
    ),
    "backward trusts what lies in the buffer": Bug(
        DequantMatmul.backward,
        "dx = DequantMatmul.apply(dy, ctx.layer, ctx.dtype, not ctx.transpose)",
        "shape = (ctx.layer.out_features, ctx.layer.in_features)\n"
        "    with ctx.layer.buffer.of(shape, ctx.dtype, dy.device) as W:\n"
        "        dx = F.linear(dy, W.T)",
        products.each_layer_has_the_buffer_for_itself_while_it_needs_it,
    ),
    "threads share the buffer": Bug(
        DequantBuffer.__init__,
        "threading.local()",
        "type('Shared', (), {})()",
        products.threads_do_not_write_into_each_others_buffer,
    ),
    "threads of one GPU stream do not wait for each other": Bug(
        DequantBuffer._shared_by,
        "self._of_stream, self._lock",
        "self._of_stream, nullcontext()",
        products.threads_on_one_stream_do_not_write_into_its_buffer,
    ),
    "a GPU's buffer belongs to the thread": Bug(
        DequantBuffer._shared_by,
        "if not has_streams(device):",
        "if True:",
        products.backward_in_another_thread_has_the_streams_buffer,
    ),
    "a piece on a GPU is the whole": Bug(
        blocks._chunks,
        "else GPU_CHUNK",
        "else n",
        numbers.temporaries_on_a_gpu_are_of_a_piece,
    ),
    "a copy shares the buffer": Bug(
        DequantBuffer.__deepcopy__,
        "return DequantBuffer()",
        "return self",
        products.a_copy_has_a_buffer_of_its_own,
    ),
    "each layer has a buffer": Bug(
        linear.share_buffer,
        "module.is_last = buffer,",
        "module.is_last = DequantBuffer(),",
        products.the_buffer_is_as_large_as_the_largest_weight_and_one_for_all,
    ),
    "constants are cast to half precision": Bug(
        NF4Linear._apply,
        "if moved.dtype != tensor.dtype:",
        "if False:",
        products.half_precision_keeps_the_constants,
    ),
    "the bias is forgotten": Bug(
        NF4Linear.forward,
        "return y if self.bias is None else",
        "return y if True else",
        products.product_and_gradient_are_those_of_the_dense_weight,
    ),
    "full weights are kept for the backward pass": Bug(
        NF4Linear.add_product,
        "return C.addmm_(",
        "self.__dict__['kept'] = W.clone()\n        return C.addmm_(",
        products.a_step_holds_one_dequantized_weight_at_a_time,
    ),
    "one dequantization too many": Bug(
        lora_fast._plus_dh_W0,
        "    with base.dequantized(",
        "    base.dequantized(dh.dtype).__enter__()\n    with base.dequantized(",
        products.a_step_dequantizes_each_weight_twice,
    ),
    "full weights survive": Bug(
        linear.quantize_model,
        "names = list(modules)",
        "names, kept = list(modules), dict(modules)",
        products.no_full_copy_survives,
    ),
    "all weights are copied before the first goes": Bug(
        linear.quantize_model,
        "names = list(modules)",
        "names = list(modules)\n"
        "    every = [m.weight.detach().clone() for m in modules.values()]",
        products.quantizing_takes_no_copy_of_the_model,
    ),
    "looking for NaN takes a copy": Bug(
        linear._check,
        "torch.stack(W.aminmax()).isfinite().all()",
        "W.isfinite().all()",
        products.quantizing_takes_no_copy_of_the_model,
    ),
    "NaN is seen when half of the model is quantized": Bug(
        linear._check,
        "if not torch.stack(W.aminmax()).isfinite().all():",
        "if False:",
        left("a NaN in the last weight"),
    ),
    "options are looked at when the first weight is quantized": Bug(
        linear._check,
        "check_options(block, double, code)",
        "pass",
        left("a block of 0"),
    ),
    "a tied weight is quantized": Bug(
        linear._check,
        "if len(tied) > 1:",
        "if False:",
        left("a weight that two modules share"),
    ),
    "codes are quantized a second time": Bug(
        linear._check,
        "if isinstance(module, QuantizedLinear):",
        "if False:",
        left("quantized before"),
    ),
    "adapters are quantized under": Bug(
        targets.resolve,
        "refuse_unfit(model)",
        "pass",
        left("adapters on it"),
    ),
    "the compute dtype is forgotten": Bug(
        linear.quantize_model,
        "module.bias,\n            compute_dtype=compute_dtype,",
        "module.bias,",
        products.arguments_reach_every_projection,
    ),
    "what is excluded is quantized": Bug(
        linear.quantizable,
        "resolve(model, targets, exclude)",
        "resolve(model, targets)",
        products.arguments_reach_every_projection,
    ),
    "quantized modules are in training mode": Bug(
        linear.quantize_model,
        "packed.train(module.training)",
        "packed",
        products.heads_and_embeddings_stay_and_every_projection_goes,
    ),
    "a plain projection with its sizes exchanged": Bug(
        NF4Linear.plain,
        "first, second = second, first",
        "pass",
        partial(products.a_model_computes_what_its_dense_twin_computes, "llama"),
    ),
    "a plain Conv1D without its bias": Bug(
        NF4Linear.plain,
        "module.bias = self.bias",
        "module.bias = None if self.bias is None else nn.Parameter(0 * self.bias)",
        products.a_model_computes_what_its_dense_twin_computes,
    ),
    "PiSSA on codes": Bug(
        pissa._refuse_packed,
        "isinstance(module, QuantizedLinear)",
        "False",
        products.what_changes_weights_is_refused_on_four_bits,
    ),
    "full fine-tuning beside codes": Bug(
        full.plan,
        "isinstance(module, QuantizedLinear)",
        "False",
        products.what_changes_weights_is_refused_on_four_bits,
    ),
}

QLORA = {
    "skip is ignored": Bug(
        qlora.plan, "exclude=skip,", "", beside.every_argument_arrives
    ),
    "the block is ignored": Bug(
        qlora.plan,
        "64 if block is None else block",
        "64",
        beside.every_argument_arrives,
    ),
    "adapters in float32 whatever was asked": Bug(
        qlora.plan,
        "parameter.data.to(dtype or parameter.dtype)",
        "parameter.data",
        beside.every_argument_arrives,
    ),
    "quantized before the arguments are tried": Bug(
        qlora.plan,
        "model, bits = unwrapped(model), None",
        "quantize_model(model); model, bits = unwrapped(model), None",
        behind("r=0"),
    ),
    "trying takes random numbers": Bug(
        qlora.plan,
        "planned = plan_layers(",
        "torch.rand(1); planned = plan_layers(",
        beside.it_is_lora_on_the_quantized_model,
    ),
    "a plan quantizes": Bug(
        qlora.plan,
        "quantizable(model, **bits)",
        "quantize_model(model, **bits)",
        partial(laws.a_plan_touches_nothing, beside.WHOLE[0], "llama"),
    ),
    "the adapters' bases outlive their codes": Bug(
        qlora._quantize,
        "layer.base = nn.Identity()",
        "pass",
        beside.full_weights_go_as_their_codes_come,
    ),
    "other codes are asked for in vain": Bug(
        qlora.plan,
        "elif any(value is not None for value in asked.values()):",
        "elif False:",
        beside.codes_are_not_quantized_a_second_time,
    ),
    "shares are of bytes": Bug(
        counting.count,
        "m.values for m in",
        "m.packed.numel() for m in",
        beside.shares_count_values_and_not_bytes,
    ),
    "merged onto the wrong base": Bug(
        qlora.merge,
        'weights[name].double() + update if onto == "original" else trained',
        "trained",
        beside.merged_onto_the_original_is_off_by_what_quantizing_changed,
    ),
    "Conv1D merged in the other orientation": Bug(
        qlora.merge,
        "copy_(as_stored(base, W))",
        "copy_(W)",
        partial(
            beside.merged_onto_the_original_is_off_by_what_quantizing_changed,
            targets="attn.c_proj",
        ),
    ),
    "requantized without the update": Bug(
        qlora.merge,
        "_requantized(base, W)",
        "_requantized(base, W - update)",
        beside.merged_and_requantized_is_off_by_rounding_once_more,
    ),
    "requantized in other blocks": Bug(
        qlora._requantized,
        "base.block, base.constant_codebook or False, base.codebook",
        "64, base.constant_codebook or False, base.codebook",
        beside.merged_and_requantized_is_off_by_rounding_once_more,
    ),
    "the error is told in units of the update": Bug(
        qlora.merge,
        "relative_error(lost.item(), trained.norm().item())",
        "relative_error(lost.item(), update.norm().item())",
        beside.merged_onto_the_original_is_off_by_what_quantizing_changed,
    ),
    "NaN is merged": Bug(
        qlora.merge,
        "if not W.to(base.dtype).isfinite().all():",
        "if False:",
        cannot("a NaN in the original"),
    ),
    "merged weights stay frozen": Bug(
        NF4Linear.plain,
        "nn.Parameter(weight)",
        "nn.Parameter(weight, requires_grad=False)",
        contract(laws.merged_equals_unmerged, "qlora"),
    ),
    "merging leaves the codes": Bug(
        merge.merge,
        "adapter.base = base",
        "pass",
        contract(laws.merged_equals_unmerged, "qlora"),
    ),
    "the file does not say that the base has four bits": Bug(
        base_notes.of_model,
        "BASE_BITS: base_bits(model)",
        "BASE_BITS: None",
        beside.a_file_of_four_bits_warns_on_a_base_in_full,
    ),
    "an adapter's own matrices are taken for the base's": Bug(
        base_notes._kept_in_full,
        "- set(quantized) - of_adapters",
        "- set(quantized)",
        beside.an_adapter_brings_its_bits_along,
    ),
    "what was left in full is forgotten": Bug(
        exchange.load_as_trained,
        "exclude=full or None",
        "exclude=None",
        partial(beside.an_adapter_brings_its_bits_along, method="qlora"),
    ),
    "other bits are not noticed": Bug(
        base_notes.other_bits,
        "if bits and bits != read_bits(here):",
        "if False:",
        beside.a_file_of_other_bits_warns,
    ),
    "the warning is given to a base in four bits, too": Bug(
        base_notes.other_bits,
        "if bits and not here:",
        "if bits:",
        beside.a_file_of_four_bits_warns_on_a_base_in_full,
    ),
    "the warning measures other blocks": Bug(
        base_notes.base_error,
        "quantize(W0, **bits)",
        "quantize(W0)",
        beside.a_file_of_four_bits_warns_on_a_base_in_full,
    ),
    "the warning forgets the update": Bug(
        base_notes.base_error,
        "changed += update.square()",
        "changed += W0.square()",
        beside.a_file_of_four_bits_warns_on_a_base_in_full,
    ),
    "half a note is enough": Bug(
        base_notes._check_bits,
        'if not isinstance(bits, dict) or set(bits) - {"exclude"} != OPTIONS:',
        "if set(bits) < OPTIONS:\n        return\n"
        "    if set(bits) - {'exclude'} != OPTIONS:",
        partial(beside.a_hostile_note_is_refused, note='{"code": "nf4", "block": 64}'),
    ),
    "adapters of other bits are combined": Bug(
        combine._refuse_other_bases,
        '(BASE_BITS, "the bits of the base"),',
        "",
        beside.adapters_of_other_bits_have_no_sum,
    ),
}

FILES = {
    "another code book is let through": Bug(
        quantized._take_codebook,
        "if not torch.equal(",
        "if None is torch.equal(",
        broken("another code book"),
    ),
    "short codes are let through": Bug(
        quantized._take_sized, "tensor.numel() != count", "False", broken("short codes")
    ),
    "codes of another dtype are let through": Bug(
        quantized._take_sized,
        "tensor.dtype != dtype or",
        "",
        broken("codes of another dtype"),
    ),
    "constants may overflow": Bug(
        quantized._double_quantized_of,
        "if not doubled.dequantize().isfinite().all():",
        "if False:",
        broken("units that overflow"),
    ),
    "what is not quantized is not checked": Bug(
        quantized._load_unquantized,
        "for name, tensor in values.items():",
        "for name, tensor in list(values.items())[:0]:",
        broken("infinite norm"),
    ),
    "the dtype of before is forgotten": Bug(
        quantized._quantized_of,
        "DTYPE[dtype], block",
        "torch.float32, block",
        partial(on_disk.a_round_trip_is_bit_equal, of=torch.bfloat16),
    ),
    "transposed projections come back as they are not": Bug(
        quantized._load_quantized,
        "transposed=is_transposed(module)",
        "transposed=False",
        on_disk.a_round_trip_is_bit_equal,
    ),
    "eight bits are taken for four": Bug(
        quantized.is_four_bit,
        ' and settings.get("load_in_4bit") is True',
        "",
        broken("eight bits"),
    ),
    "the old file is overwritten in place": Bug(
        quantized.save,
        "atomic.new_files(directory, (CONFIG, WEIGHTS, *beside)) as new:",
        "__import__('contextlib').nullcontext(Path(directory)) as new:",
        on_disk.a_failed_save_leaves_the_folder_as_it_was,
    ),
    "the generation config is lost": Bug(
        quantized.save,
        "(model.generation_config, tokenizer)",
        "(tokenizer,)",
        on_disk.a_changed_generation_config_is_kept,
    ),
    "the dtype is forgotten": Bug(
        quantized._load_unquantized,
        "tensor.to(dtype) if dtype else tensor",
        "tensor",
        on_disk.load_model_reads_such_a_folder,
    ),
    "load_model leaves four bits to bitsandbytes": Bug(
        load._model,
        "and quantized.is_four_bit(folder)",
        "and False",
        on_disk.load_model_reads_such_a_folder,
    ),
}
BUGS = {
    f"{part}: {bug}": row
    for part, table in {
        "numbers": NUMBERS,
        "lookups": LOOKUPS,
        "spec": SPEC,
        "products": PRODUCTS,
        "keeping": KEEPING,
        "qlora": QLORA,
        "files": FILES,
    }.items()
    for bug, row in table.items()
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
test_a_planted_error_is_caught = each_is_caught(ERRORS, RuntimeError)
