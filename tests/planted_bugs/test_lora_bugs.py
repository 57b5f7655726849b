"""Bugs planted in the contract, LoRA, merging and the files: a law catches each.

A test that passes with the feature broken is worse than none. So every row below breaks
one line of the library, names the law that must notice, and first runs that law on the
sound code. The training loop's bugs are in test_loop.py, those of the other methods in
test_method_bugs.py.
"""

from functools import partial

import torch
from laws.core import adapter as verbs
from laws.core import contract as laws
from laws.core import left_out as left
from laws.core import targets as targeting
from laws.core import wrapped
from laws.core.contract import Method
from laws.files import foreign_files
from laws.files import refused_files as hostile
from laws.files import save_and_load as files
from laws.methods import lora as lora_laws
from laws.methods import rounding
from laws.methods.one_row import contract
from laws.methods.table import lora, low_rank
from planting import Bug, each_is_caught

from peft_from_scratch.common import atomic
from peft_from_scratch.core import adapter, left_out, merge, targets
from peft_from_scratch.core.adapter import Adapter
from peft_from_scratch.files import exchange, foreign, formats, patterns, untrusted
from peft_from_scratch.files.adapter_file import AdapterFile
from peft_from_scratch.files.formats import Format
from peft_from_scratch.methods import (
    bitfit,
    houlsby,
    ia3,
    lora_config,
    lora_fast,
    pissa,
)
from peft_from_scratch.methods import lora as method
from peft_from_scratch.methods.dora import DoRA
from peft_from_scratch.methods.lora import LoRA
from peft_from_scratch.methods.lora_fast import LowRankSum
from peft_from_scratch.nf4 import NF4Linear

SQUARE = Method("square", lora(targets="attn.c_proj"), low_rank)


def broken(name):
    return partial(hostile.a_broken_file_is_refused, name=name)


def written(variant):
    return partial(files.a_round_trip_is_bit_equal, variant=variant)


def looking_through(around, method):
    return partial(wrapped.every_verb_looks_through, around=around, method=method)


LORA = {
    "alpha is not divided by the rank": Bug(
        LoRA.__init__, "alpha / (", "alpha / bool(", lora_laws.forward_is_the_equation
    ),
    "rsLoRA divides by r": Bug(
        LoRA.__init__,
        "math.sqrt(r) if",
        "r if",
        lora_laws.every_argument_reaches_every_module,
    ),
    "B starts random": Bug(
        LoRA.__init__,
        "torch.zeros(",
        "torch.randn(",
        contract(laws.starts_from_the_pretrained_model),
    ),
    "A starts at zero too": Bug(
        LoRA.__init__,
        "torch.randn(r, d_in, **like)",
        "torch.zeros(r, d_in, **like)",
        contract(laws.every_tensor_moves_after_an_evaluation),
    ),
    "A starts three times too wide": Bug(
        LoRA.__init__,
        "sqrt(3 * d_in)",
        "sqrt(d_in)",
        lora_laws.starts_gaussian_of_variance_one_third_over_d_in,
    ),
    "adapter in half precision": Bug(
        adapter.trained_dtype,
        "itemsize >= 4",
        "itemsize >= 2",
        lora_laws.half_precision_keeps_the_adapter_in_fp32,
    ),
    "dropout on the base's input as well": Bug(
        LoRA.forward,
        "base, dropped = self.base, self.dropout(x)",
        "base, dropped = self.base, self.dropout(x); x = dropped",
        lora_laws.dropout_falls_on_the_input_of_A_in_training_only,
    ),
    "dropout in evaluation": Bug(
        LoRA.forward,
        "self.dropout(x)",
        "F.dropout(x, 0.5)",
        contract(laws.mode_is_kept_and_changes_nothing),
    ),
    "evaluation writes into the base": Bug(
        LoRA.forward,
        "base, dropped =",
        "self.training or self.base.weight.data.add_(self.delta()); base, dropped =",
        contract(laws.mode_is_kept_and_changes_nothing),
    ),
    "evaluation keeps the A of its first call": Bug(
        LoRA.forward,
        "dropped, self.A,",
        "dropped, self.A if self.training else "
        "self.__dict__.setdefault('kept', self.A.detach().clone()),",
        contract(laws.state_dict_is_the_whole_state),
    ),
    "gradient of A without the scale": Bug(
        LowRankSum.backward,
        "dz = torch.mm(B_s.T, dh_s.T) * ctx.scale",
        "dz = torch.mm(B_s.T, dh_s.T)",
        lora_laws.gradients_are_those_of_the_equation,
    ),
    "gradient of B with the scale twice": Bug(
        LowRankSum.backward,
        "torch.mm(z.T, dh_s).T * ctx.scale",
        "torch.mm(z.T, dh_s).T * ctx.scale**2",
        lora_laws.gradients_are_those_of_the_equation,
    ),
    "no gradient for the layers below": Bug(
        LowRankSum.backward,
        "if needs_x:",
        "if False:",
        lora_laws.both_derivatives_are_those_of_finite_differences,
    ),
    "second derivative forgets x A": Bug(
        LowRankSum.backward,
        "if torch.is_grad_enabled() else",
        "if False else",
        lora_laws.both_derivatives_are_those_of_finite_differences,
    ),
    "the equation without its scale": Bug(
        LoRA.forward,
        "W0x + self.scale * F",
        "W0x + F",
        lora_laws.fast_equals_plain,
    ),
    "the fast way without its scale": Bug(
        lora_fast._add_product,
        "rows, Wt, beta=scale",
        "rows, Wt",
        lora_laws.fast_equals_plain,
    ),
    "the fast way without its scale, with a bias": Bug(
        lora_fast._sum,
        "z, Bt, alpha=scale",
        "z, Bt",
        lora_laws.fast_equals_plain,
    ),
    "a hook of the base is passed over": Bug(
        lora_fast._is_hooked,
        "base._forward_hooks",
        "None",
        partial(
            lora_laws.what_is_kept_of_the_base_is_not_written_into, keeper="a hook"
        ),
    ),
    "a hook of all modules is passed over": Bug(
        lora_fast._is_hooked,
        "        or _has_any_global_hook()\n",
        "",
        partial(
            lora_laws.what_is_kept_of_the_base_is_not_written_into,
            keeper="a hook of all modules",
        ),
    ),
    "full backward hooks are passed over": Bug(
        lora_fast._is_hooked,
        "        or base._backward_hooks\n        or base._backward_pre_hooks\n",
        "",
        lora_laws.backward_hooks_of_every_sort_run,
    ),
    "a patched base is passed over": Bug(
        lora_fast.is_safe,
        '        or "forward" in vars(base)\n',
        "",
        partial(
            lora_laws.what_is_kept_of_the_base_is_not_written_into,
            keeper="a forward of its own",
        ),
    ),
    "a projection that keeps its output is passed over": Bug(
        lora_fast.is_safe,
        "        or type(base).forward not in KNOWN\n",
        "",
        lora_laws.what_a_projection_keeps_itself_is_whole,
    ),
    "what a function mode has kept is written into": Bug(
        lora_fast._is_observed,
        "        or torch._C._len_torch_function_stack()\n",
        "",
        lora_laws.modes_and_their_caches_are_not_written_into,
    ),
    "a weight that trains gets no gradient": Bug(
        lora_fast._has_frozen_matrix,
        "        and not W.requires_grad\n",
        "",
        lora_laws.a_weight_that_trains_gets_its_gradient,
    ),
    "a weight of another dtype is converted": Bug(
        lora_fast._has_frozen_matrix,
        "W.dtype == x.dtype or",
        "True or",
        lora_laws.another_dtype_is_refused_as_the_base_refuses_it,
    ),
    "nothing is summed in place": Bug(
        lora_fast.is_safe,
        "return not (",
        "return not (\n        True or",
        lora_laws.what_nobody_sees_is_summed_in_place,
    ),
    "dropout is not passed on": Bug(
        lora_config.plan_layers,
        '("rslora", "dropout")',
        '("rslora",)',
        lora_laws.every_argument_reaches_every_module,
    ),
    "the last pattern decides": Bug(
        targets.per_module,
        "dict.fromkeys(matches, value) | values",
        "values | dict.fromkeys(matches, value)",
        lora_laws.every_argument_reaches_every_module,
    ),
}

CONTRACT = {
    "the base trains as well": Bug(
        adapter.apply,
        "model.requires_grad_(False)",
        "pass",
        contract(laws.only_what_is_trainable_moves),
    ),
    "the base counts as trainable": Bug(
        adapter.trainable,
        'if not inner.startswith("base.")',
        "",
        contract(laws.counts_equal_the_formula),
    ),
    "adapters in training mode whatever the model's": Bug(
        adapter._in_mode,
        "module.training = adapter.base.training",
        "pass",
        contract(laws.mode_is_kept_and_changes_nothing),
    ),
    "a second injection is let through": Bug(
        targets.refuse_unfit,
        "if injection is not None:",
        "if False:",
        contract(laws.a_second_injection_is_refused),
    ),
    "adapters in a part of the model are not seen": Bug(
        targets.refuse_unfit,
        'isinstance(module, Wrapper) or hasattr(module, "adapter_layer_names")',
        "False",
        verbs.adapters_in_a_part_are_refused,
    ),
    "what reads the weight itself goes past the adapter": Bug(
        Adapter.__getattr__,
        "raise AttributeError(",
        "return getattr(self.base, name)\n        raise AttributeError(",
        verbs.what_reads_the_weight_itself_is_told,
    ),
    "a failed injection leaves the base frozen": Bug(
        adapter.plan,
        "_set_flags(model, flags)",
        "pass",
        verbs.an_injection_that_fails_late_leaves_no_trace,
    ),
    "a plan freezes the base": Bug(
        adapter.plan,
        "_set_flags(model, flags)",
        "pass",
        contract(laws.a_plan_touches_nothing),
    ),
    "a plan puts its adapters in": Bug(
        adapter.plan,
        "if not ready and not names:",
        "replace_modules(model, {m: ready[n] for n, m in modules.items()})\n"
        "    if not ready and not names:",
        contract(laws.a_plan_touches_nothing),
    ),
    "a plan takes the layers out of their mode": Bug(
        adapter._in_mode,
        "if module not in of_base:",
        "if True:",
        contract(laws.a_plan_touches_nothing, "prompt"),
    ),
    "inject plans something else": Bug(
        method.inject,
        "plan(model, targets=targets, exclude=exclude, **options)",
        "plan(model, r=r, alpha=alpha)",
        contract(laws.inject_is_plan_and_apply, "lora-patterns"),
    ),
    "what was planned to train is forgotten": Bug(
        adapter.apply,
        "_named_parameters(model, plan.base_params)",
        "{}",
        contract(laws.counts_equal_the_formula, "lora-biases", "gpt2"),
    ),
    "a plan is applied to any model": Bug(
        adapter._refuse_another,
        "is not adapter.base",
        "is None",
        verbs.a_plan_is_for_its_model_as_it_was,
    ),
    "a disabled adapter forgets the biases": Bug(
        adapter.disabled,
        "parameter.copy_(trained[name])",
        "pass",
        contract(laws.disabled_is_the_untouched_model, "lora-biases", "gpt2"),
    ),
    "an error leaves the adapters off": Bug(
        adapter.disabled,
        "finally:",
        "except ZeroDivisionError:\n        pass\n    else:",
        contract(laws.disabled_is_the_untouched_model),
    ),
    "a disabled PiSSA leaves its principal part in": Bug(
        adapter.disabled,
        "adapter.on_attach()",
        "pass",
        contract(laws.disabled_is_the_untouched_model, "pissa"),
    ),
    "every read of a forward enters two functions": Bug(
        Adapter.__getattr__,
        '("_parameters", "_modules", "_buffers")',
        '("_modules", "_buffers")',
        verbs.a_read_in_a_forward_enters_one_function,
    ),
    "adapters are put in place before all are made": Bug(
        adapter.plan,
        "ready = {name: _in_mode(wrap(module)) for name, module in modules.items()}",
        "ready = {}\n        for name, module in modules.items():\n"
        "            ready[name] = wrap(module)\n"
        "            replace_modules(model, {module: ready[name]})",
        verbs.an_injection_that_fails_late_leaves_no_trace,
    ),
    "remove leaves everything frozen": Bug(
        adapter.unwrap_adapters,
        "_set_flags(model, injected(model).requires_grad)",
        "pass",
        contract(laws.remove_is_exact),
    ),
    "remove thaws what was frozen before": Bug(
        adapter.unwrap_adapters,
        "_set_flags(model, injected(model).requires_grad)",
        "model.requires_grad_(True)",
        contract(laws.remove_is_exact),
    ),
    "remove leaves its record": Bug(
        adapter.unwrap_adapters,
        "del model.pfs_injection",
        "model.pfs_injection = None",
        contract(laws.remove_is_exact),
    ),
    "remove leaves the trained biases": Bug(
        adapter._restore_base,
        "parameter.copy_(originals[name])",
        "pass",
        contract(laws.remove_is_exact, "lora-biases", "gpt2"),
    ),
    "originals are kept by reference": Bug(
        adapter.apply,
        "parameter.detach().clone()",
        "parameter.detach()",
        contract(laws.remove_is_exact, "full", "opt"),
    ),
    "remove without originals keeps the trained weights": Bug(
        adapter._restore_base,
        "if lost:",
        "if lost:\n        return\n    if lost:",
        contract(laws.remove_is_exact, "full-lost"),
    ),
    "the head counts as a projection of the layers": Bug(
        targets.kinds,
        "if name.startswith(layers)",
        "if True",
        targeting.all_linear_is_every_projection_and_no_head,
    ),
    "a typo inside a list is skipped": Bug(
        targets._match,
        "if not matches:",
        "if False:",
        targeting.a_typo_inside_a_list_is_refused,
    ),
}

MERGING = {
    "merged without the scale": Bug(
        LoRA.delta,
        "self.scale * (",
        "1.0 * (",
        contract(laws.merged_equals_unmerged),
    ),
    "Conv1D merged in the other orientation": Bug(
        adapter.as_stored,
        "W.T if is_transposed(base) else W",
        "W",
        contract(laws.merged_equals_unmerged, SQUARE, "gpt2"),
    ),
    "merged and left on": Bug(
        merge.merge,
        "unwrap_adapters(model)",
        "pass",
        contract(laws.merged_equals_unmerged),
    ),
    "merged one by one": Bug(
        merge.merge,
        "ready.append((parameter, rounded))",
        "parameter.copy_(rounded)",
        contract(laws.merge_is_all_or_nothing),
    ),
    "merged in the precision of the weights": Bug(
        merge._wide,
        "torch.float64",
        "next(base.parameters()).dtype",
        verbs.merging_rounds_once_and_says_how_much,
    ),
    "the rounding error is not what was lost": Bug(
        merge.merge,
        "rounded.to(exact.dtype) - exact",
        "rounded - exact.to(rounded.dtype)",
        verbs.merging_rounds_once_and_says_how_much,
    ),
    "overflow is merged": Bug(
        merge.merge,
        "not rounded.isfinite()",
        "not exact.isfinite()",
        verbs.overflow_in_half_precision_is_not_merged,
    ),
    "merging a tied head changes the embedding": Bug(
        merge.merge,
        '_refuse_tied(model, f"{name}.{inner}", parameter)',
        "pass",
        verbs.a_tied_head_is_not_merged,
    ),
    "what cannot be merged is dropped": Bug(
        Adapter.merged,
        "raise CannotMerge(",
        "return {}\n    raise CannotMerge(",
        contract(laws.merged_equals_unmerged, "smallest"),
    ),
}

FILES = {
    "alpha is not saved": Bug(
        Format.config,
        "for ours, theirs in self.fields.items()",
        'for ours, theirs in self.fields.items() if ours != "alpha"',
        written("rslora"),
    ),
    "rslora is not saved": Bug(
        Format.config,
        "theirs: options[ours]",
        'theirs: ours != "rslora" and options[ours]',
        written("rslora"),
    ),
    "alpha_pattern is not saved": Bug(
        formats._lora_targets, "own != alpha", "False", written("patterns")
    ),
    "our default in the place of PEFT's": Bug(
        Format.arguments,
        "{**self.absent, **config}",
        "config",
        files.a_file_without_lora_alpha_means_pefts_default,
    ),
    "missing tensors keep their random start": Bug(
        exchange.fitting,
        "_refuse_misfits(model, file, parameters)",
        "start = {key: p.detach() for key, p in parameters.items()}\n"
        "    file = replace(file, tensors=start | file.tensors)\n"
        "    _refuse_misfits(model, file, parameters)",
        broken("no A"),
    ),
    "missing modules are skipped": Bug(
        exchange._plan,
        "_refuse_absent(model, file)",
        "pass",
        broken("no A and no B"),
    ),
    "superfluous tensors are ignored": Bug(
        AdapterFile.refuse_other_keys,
        "extra = [k for k in self.tensors if k not in expected and k not in ignored]",
        "extra = []",
        broken("extra bias"),
    ),
    "a row is broadcast over the tensor": Bug(
        AdapterFile.refuse_other_shapes,
        "if tensor.shape != wanted.shape:",
        "if False:",
        broken("broadcastable"),
    ),
    "NaN is saved": Bug(
        exchange.save,
        'refuse_unusable(tensors, "this model")',
        "pass",
        files.an_adapter_with_nan_is_not_saved,
    ),
    "float64 overflows on loading": Bug(
        AdapterFile.refuse_other_shapes,
        "if not tensor.to(wanted.dtype).isfinite().all():",
        "if False:",
        broken("beyond float32"),
    ),
    "QA-LoRA is loaded as LoRA": Bug(
        formats.refuse_unimplemented,
        "name not in implemented",
        'name not in implemented | {"use_qalora"}',
        broken("use_qalora=True"),
    ),
    "layer 0 is taken for False": Bug(
        formats.refuse_unimplemented,
        'value is False or value in (None, "", [], {})',
        'value in (None, False, "", [], {})',
        broken("layers_to_transform=0"),
    ),
    "PiSSA is loaded as LoRA": Bug(
        Format.arguments,
        "if name in config and config[name] not in values:",
        "if False:",
        broken("pissa"),
    ),
    "a failure after the copy leaves the model injected": Bug(
        exchange._undo,
        "(adapter.unwrap_adapters if None in originals else adapter.remove)(model)",
        "pass",
        hostile.a_failure_after_the_copy_leaves_no_trace,
    ),
    "an adapter that does nothing says nothing": Bug(
        exchange._is_idle,
        "torch.equal(before, _probe(model))",
        "False",
        files.an_adapter_that_does_nothing_warns,
    ),
    "new rows of the vocabulary are lost": Bug(
        exchange.save,
        "_refuse_resized(model)",
        "pass",
        files.saving_a_resized_vocabulary_is_refused,
    ),
    "another vocabulary is not noticed": Bug(
        exchange.fitting,
        "base_notes.refuse_other_vocabulary(model, file.notes)",
        "pass",
        files.loading_onto_another_vocabulary_is_refused,
    ),
    "the old file is overwritten in place": Bug(
        atomic.new_files,
        "yield work",
        "yield folder\n        return",
        files.a_failed_save_leaves_the_folder_as_it_was,
    ),
    "a new config stays beside the old weights": Bug(
        atomic._bring_back,
        "os.replace(old, place)",
        "pass",
        files.a_file_that_cannot_be_replaced_leaves_the_folder_as_it_was,
    ),
    "a trained weight is taken for a copy of the base's": Bug(
        exchange._is_of_base,
        "torch.equal(parameter.cpu(), same)",
        "True",
        broken("another head"),
    ),
    "a name is taken for the end of a longer one": Bug(
        patterns.unambiguous,
        "exact_regex(name) if shared else name",
        "name",
        files.names_that_end_alike_are_told_apart,
    ),
}
WRAPPED = {
    "a part called base_layer is an adapter": Bug(
        targets.refuse_unfit,
        'hasattr(module, "adapter_layer_names")',
        'hasattr(module, "base_layer")',
        wrapped.a_part_of_the_name_base_layer_is_no_adapter,
    ),
    "a model of several has no hidden size": Bug(
        targets.hidden_size,
        "lambda: config)()",
        "lambda: config) and config",
        wrapped.the_hidden_size_is_that_of_the_text,
    ),
    "a module without a config stops in silence": Bug(
        targets.hidden_size,
        "if size is None:",
        "if False:",
        wrapped.a_module_without_a_config_is_refused_with_what_to_do,
    ),
    "compiled modules have names of their own": Bug(
        targets._plain_names,
        "inside[owner] == last",
        "False",
        looking_through("compiled by layers", "lora"),
    ),
    "a DataParallel has names of its own": Bug(
        targets._inside,
        '"module" if holds_module',
        "None if holds_module",
        looking_through("DataParallel inside", "lora"),
    ),
    "wrappers inside wrappers are not looked through": Bug(
        targets.unwrapped,
        "while (name",
        "if (name",
        looking_through("DataParallel, compiled", "lora"),
    ),
    "a wrapper's own names are taken": Bug(
        targets.named_parameters,
        "nn.Module.named_parameters(\n        model, remove",
        "model.named_parameters(\n        remove",
        looking_through("checkpointed", "biases"),
    ),
    "save() looks at the wrapper": Bug(
        exchange.save,
        "    model = unwrapped(model)\n",
        "",
        looking_through("DataParallel", "lora"),
    ),
    "the record of the injection is sought on the wrapper": Bug(
        adapter.injected,
        "return unwrapped(model).pfs_injection",
        "return model.pfs_injection",
        looking_through("DataParallel", "lora"),
    ),
    "the hidden size is sought on the wrapper": Bug(
        targets.hidden_size,
        'getattr(unwrapped(model), "config"',
        'getattr(model, "config"',
        looking_through("DataParallel", "ia3"),
    ),
    "a plan is made for what synchronizes processes": Bug(
        adapter.plan,
        "    refuse_synchronized(model)\n",
        "",
        wrapped.what_synchronizes_processes_is_looked_through_but_for_injection,
    ),
    "a plan is applied to what synchronizes processes": Bug(
        adapter.apply,
        "    refuse_synchronized(model)\n",
        "",
        wrapped.what_synchronizes_processes_is_looked_through_but_for_injection,
    ),
    "a sharded model is injected": Bug(
        targets._refuse_elsewhere,
        '"DTensor" in _class_names(parameter)',
        "False",
        wrapped.a_sharded_model_is_saved_whole_and_not_injected,
    ),
    "an offloaded model is injected": Bug(
        targets._refuse_elsewhere,
        "if away and (",
        "if False and (",
        wrapped.an_offloaded_model_is_refused,
    ),
    "a model that is all sizes is refused": Bug(
        targets._refuse_elsewhere,
        "len(away) < len(parameters)",
        "True",
        wrapped.an_offloaded_model_is_refused,
    ),
    "a file is loaded into a model without weights": Bug(
        exchange._refuse_empty,
        "if any(parameter.is_meta for parameter in model.parameters()):",
        "if False:",
        wrapped.an_offloaded_model_is_refused,
    ),
    "a write on the trunk stays on the wrapper": Bug(
        targets.Wrapper.__setattr__,
        "elif hasattr(self, name):",
        "elif False:",
        partial(wrapped.a_write_on_the_trunk_reaches_it, method="prompt"),
    ),
    "a write on a projection stays on the wrapper": Bug(
        targets.Wrapper.__setattr__,
        "elif name not in {",
        "elif True or name not in {",
        wrapped.a_write_on_a_projection_is_refused,
    ),
    "a wrapper tells a projection's sizes to nobody": Bug(
        Adapter.__getattr__,
        "name in SIZES",
        "False",
        wrapped.sizes_are_read_through_an_adapter,
    ),
}


FOREIGN = {
    "every model is asked with a mask": Bug(
        exchange._probe,
        "if any_name or k in known",
        "",
        files.a_model_is_asked_with_the_arguments_that_it_has,
    ),
    "every model generates text": Bug(
        exchange.task_type,
        'if not hasattr(model, "generate"):',
        "if False:",
        files.the_task_in_a_file_is_the_models,
    ),
    "names of wrappers stay in the keys": Bug(
        foreign._without_wrappers,
        "part not in INSIDE",
        "True",
        partial(
            foreign_files.what_other_tools_leave_is_the_same_adapter,
            how="checkpointed layers",
        ),
    ),
    "DDP's name stays before the keys": Bug(
        foreign._without_wrappers,
        'plain.removeprefix("module.")',
        "plain",
        partial(
            foreign_files.what_other_tools_leave_is_the_same_adapter, how="DDP around"
        ),
    ),
    "keys without a prefix get none": Bug(
        foreign._with_one_prefix,
        "key: PREFIX + plain",
        "key: plain",
        partial(
            foreign_files.what_other_tools_leave_is_the_same_adapter, how="no prefix"
        ),
    ),
    "a prefix stays twice": Bug(
        foreign._with_one_prefix,
        "while keys and",
        "while False and",
        partial(
            foreign_files.what_other_tools_leave_is_the_same_adapter,
            how="the prefix twice",
        ),
    ),
    "an adapter's name stays in the keys": Bug(
        foreign._without_adapter_name,
        "if (match := named.search(now)) and",
        "if (match := None) and",
        partial(
            foreign_files.what_other_tools_leave_is_the_same_adapter, how="another name"
        ),
    ),
    "two adapters in a file are one": Bug(
        foreign._without_adapter_name,
        "len(names) > 1",
        "False",
        partial(
            foreign_files.what_cannot_be_read_is_refused_for_its_reason,
            how="two adapters",
        ),
    ),
    "two tensors of one name: the last wins": Bug(
        foreign.plain_keys,
        "len(set(keys.values())) < len(keys)",
        "False",
        partial(
            foreign_files.what_cannot_be_read_is_refused_for_its_reason,
            how="a tensor twice",
        ),
    ),
    "a part that is missing is not missed": Bug(
        foreign.read_weights,
        "    _refuse_missing_parts(path, parts)\n",
        "",
        partial(
            foreign_files.what_cannot_be_read_is_refused_for_its_reason,
            how="a missing part",
        ),
    ),
    "two parts hold one tensor: the last wins": Bug(
        foreign.read_weights,
        "tensors.keys() & more.keys()",
        "set()",
        partial(
            foreign_files.what_cannot_be_read_is_refused_for_its_reason,
            how="a part twice",
        ),
    ),
    "a pickle is opened": Bug(
        foreign.read_weights,
        "    if not parts:\n",
        "    for pickle in path.parent.glob('*.bin'):\n"
        "        __import__('torch').load(pickle, weights_only=False)\n"
        "    if not parts:\n",
        partial(
            foreign_files.what_cannot_be_read_is_refused_for_its_reason, how="a pickle"
        ),
    ),
    "a pointer of Git LFS is a broken file": Bug(
        untrusted._is_lfs_pointer,
        "read(len(LFS)) == LFS",
        "read(0) == LFS",
        partial(
            foreign_files.what_cannot_be_read_is_refused_for_its_reason,
            how="a pointer of Git LFS",
        ),
    ),
    "every config is UTF-8 without a mark": Bug(
        untrusted.parse_json,
        "if isinstance(content, bytes)",
        "if False",
        partial(
            foreign_files.what_other_tools_leave_is_the_same_adapter,
            how="UTF-16",
        ),
    ),
    "the name of a DataParallel inside PEFT stays": Bug(
        exchange._without_module,
        "return replace(file, tensors=plain)",
        "return file",
        partial(
            foreign_files.what_other_tools_leave_is_the_same_adapter, how="DDP inside"
        ),
    ),
    "a part called module loses its name": Bug(
        exchange._without_module,
        "n in here or ",
        "",
        foreign_files.a_model_with_a_part_called_module_keeps_its_names,
    ),
}

LEFT_OUT = {
    "what is left out is not said": Bug(
        left_out.warn,
        "if parts:",
        "if False:",
        partial(
            left.defaults_work_and_say_what_they_leave_out,
            architecture="mixtral",
            method="lora",
        ),
    ),
    "PiSSA says nothing of what it leaves out": Bug(
        pissa.plan,
        "        left_out.warn_of_preset(model, targets)\n",
        "",
        partial(
            left.defaults_work_and_say_what_they_leave_out,
            architecture="mixtral",
            method="pissa",
        ),
    ),
    "IA3 says nothing of what it leaves out": Bug(
        ia3._keys_values_and_mlp,
        "    left_out.warn(model)\n",
        "",
        partial(
            left.defaults_work_and_say_what_they_leave_out,
            architecture="mixtral",
            method="ia3",
        ),
    ),
    "bottlenecks say nothing of what they leave out": Bug(
        houlsby.plan,
        "        left_out.warn(model)\n",
        "",
        partial(
            left.defaults_work_and_say_what_they_leave_out,
            architecture="mixtral",
            method="houlsby",
        ),
    ),
    "IA3 refuses a mixture": Bug(
        ia3._keys_values_and_mlp,
        ", needed=False",
        "",
        partial(
            left.defaults_work_and_say_what_they_leave_out,
            architecture="mixtral",
            method="ia3",
        ),
    ),
    "the share is of what is adapted": Bug(
        left_out.warn,
        "size / total",
        "size / (2 * total)",
        left.the_share_is_of_all_parameters,
    ),
    "a sentence where modules are named": Bug(
        left_out.warn_of_preset,
        "isinstance(targets, str) and targets in PRESETS",
        "True",
        left.nothing_is_said_where_nothing_is_left_out,
    ),
    "a convolution is taken for experts": Bug(
        left_out._values_in_3d,
        "isinstance(module, _ConvNd)",
        "False",
        left.a_convolution_is_no_expert,
    ),
    "a router that returns a tuple is adapted": Bug(
        targets.returns_a_tensor,
        "isinstance(y, Tensor) and y.shape == (1, d_out)",
        "True",
        partial(
            left.defaults_work_and_say_what_they_leave_out,
            architecture="phimoe",
            method="lora",
        ),
    ),
    "a router that is named is adapted": Bug(
        targets.resolve,
        "if not returns_a_tensor(module):",
        "if False:",
        left.a_router_that_is_named_is_refused,
    ),
    "trying a projection leaves traces": Bug(
        targets.returns_a_tensor,
        "        vars(projection).update(before)\n",
        "        vars(projection).update(before | {'last': 0})\n",
        left.trying_a_projection_leaves_no_trace,
    ),
    "cross-attention of a lone decoder is adapted": Bug(
        targets.is_idle,
        "alone and CROSS",
        "False and CROSS",
        partial(
            left.defaults_work_and_say_what_they_leave_out,
            architecture="bart",
            method="lora",
        ),
    ),
    "cross-attention beside an encoder is left out": Bug(
        targets.is_idle,
        "(alone and CROSS",
        "(CROSS",
        left.cross_attention_is_adapted_where_it_runs,
    ),
    "an indexer is adapted": Bug(
        targets.is_idle,
        "INDEXER.search(name) or ",
        "",
        left.an_indexer_is_left_out,
    ),
    "biases that never run train": Bug(
        bitfit.reached_by_text,
        "if gradient is not None",
        "if True",
        left.biases_that_never_run_do_not_train,
    ),
    "a file says nothing of PEFT's experts": Bug(
        exchange._warn_of_pefts_experts,
        "if fused and taken:",
        "if False:",
        left.what_peft_takes_for_experts_is_said,
    ),
    "every file of a mixture warns of PEFT": Bug(
        exchange._warn_of_pefts_experts,
        "if fused and taken:",
        "if fused:",
        left.what_peft_takes_for_experts_is_said,
    ),
}

TWICE = "C.copy_(scale * C.double() + torch.mm({}).double())"  # rounded before
CASES = {kind: partial(rounding.an_update_survives, kind) for kind in rounding.KINDS}

ROUNDING = {
    "the product is rounded before the sum": Bug(
        lora_fast._add_product,
        "C.addmm_(rows, Wt, beta=scale)",
        TWICE.format("rows, Wt"),
        CASES["Linear"],
    ),
    "the product is rounded before the sum, in training at 1e-4": Bug(
        lora_fast._add_product,
        "C.addmm_(rows, Wt, beta=scale)",
        TWICE.format("rows, Wt"),
        rounding.training_in_bfloat16_follows_float32,
    ),
    "the product is rounded before the sum, in training at 1e-3": Bug(
        lora_fast._add_product,
        "C.addmm_(rows, Wt, beta=scale)",
        TWICE.format("rows, Wt"),
        partial(rounding.training_in_bfloat16_follows_float32, rate=1e-3),
    ),
    "the product is rounded before the sum, with float16": Bug(
        lora_fast._add_product,
        "C.addmm_(rows, Wt, beta=scale)",
        TWICE.format("rows, Wt"),
        partial(CASES["Conv1D"], dtype=torch.float16),
    ),
    "a product in four bits is rounded before the sum": Bug(
        NF4Linear.add_product,
        "C.addmm_(x, W.T, beta=scale)",
        TWICE.format("x, W.T"),
        CASES["NF4Linear"],
    ),
    "the product is rounded before the sum, value by value": Bug(
        lora_fast._add_product,
        "C.addmm_(rows, Wt, beta=scale)",
        TWICE.format("rows, Wt"),
        rounding.test_half_precision_output_is_the_sum_rounded_once,
    ),
    "a rounded bias hides the update": Bug(
        lora_fast._sum,
        "or dtype.itemsize == 2:",
        "or dtype != small:",
        partial(CASES["Linear"], bias=True),
    ),
    "nothing is summed in the product": Bug(
        lora_fast.is_safe,
        "return not (",
        "return not (\n        True or",
        CASES["Linear"],
    ),
    "a quantized LoRA keeps the buffer": Bug(
        lora_fast.low_rank_sum,
        "        if Wt is None:\n            base.release_if_last()\n",
        "",
        lora_laws.the_last_product_frees_the_buffer,
    ),
    "DoRA rounds before its sum": Bug(
        DoRA.forward,
        "if lora_fast.rounds(self.base, x):",
        "if False:",
        rounding.a_change_of_length_survives,
    ),
    "DoRA's second product has no gradient": Bug(
        lora_fast.SumWithProduct.backward,
        "if ctx.needs_input_grad[1]:",
        "if False:",
        rounding.doras_gradients_are_those_of_float64,
    ),
    "DoRA's bias is forgotten": Bug(
        lora_fast.sum_with_product,
        "h if base.bias is None else h + base.bias.to(result)",
        "h",
        rounding.doras_gradients_are_those_of_float64,
    ),
    "autocast is not seen": Bug(
        lora_fast._product_dtype,
        "return torch.get_autocast_dtype(x.device.type)",
        "return x.dtype",
        rounding.autocast_rounds_once_too,
    ),
    "autocast narrows float64": Bug(
        lora_fast._product_dtype,
        "x.dtype == torch.float64 or",
        "",
        rounding.autocast_leaves_float64_alone,
    ),
    "the scale comes last, after an overflow": Bug(
        lora_fast._sum,
        "if dtype == torch.float16:",
        "if False:",
        rounding.sums_that_half_precision_holds_are_finite,
    ),
    "float16 gradients": Bug(
        lora_fast._small_dtype,
        "dtype == torch.bfloat16 and",
        "dtype.itemsize == 2 and",
        rounding.small_gradients_survive_in_float16,
    ),
    "the gradient of x with dropout goes to x": Bug(
        LowRankSum.backward,
        "if ctx.has_dropout:",
        "if False:",
        lora_laws.both_derivatives_are_those_of_finite_differences,
    ),
}

# Where the bug stops the work, with an error that tells nobody why.
CAUGHT = AssertionError, AttributeError, LookupError, RuntimeError
CAUGHT += TypeError, ValueError

test_a_planted_bug_is_caught = each_is_caught(LORA | CONTRACT | MERGING | FILES)
test_a_bug_of_rounding_is_caught = each_is_caught(ROUNDING)
test_a_bug_of_wrapped_models_is_caught = each_is_caught(WRAPPED, CAUGHT)
test_a_bug_of_what_is_left_out_is_caught = each_is_caught(LEFT_OUT, CAUGHT)
test_a_bug_of_foreign_files_is_caught = each_is_caught(FOREIGN, CAUGHT)

# Where torch itself stops: its own error, in the place of a wrong value.
STOPS = {
    "a weight that is computed stops": Bug(
        lora_fast._has_frozen_matrix,
        "return isinstance(base, NF4Linear)",
        "return True",
        partial(lora_laws.a_weight_that_trains_gets_its_gradient, computed=True),
    ),
    "torch.func stops": Bug(
        lora_fast._is_observed,
        "torch._C._are_functorch_transforms_active()",
        "False",
        lora_laws.torch_func_goes_through,
    ),
    "forward-mode AD stops": Bug(
        lora_fast._is_observed,
        "        or forward_ad._current_level >= 0\n",
        "",
        lora_laws.a_tangent_goes_through,
    ),
    "a trace cannot be saved": Bug(
        lora_fast.is_safe,
        "        or torch.jit.is_tracing()\n",
        "",
        lora_laws.a_trace_can_be_saved,
    ),
    "a selective checkpoint's cache is written into": Bug(
        lora_fast._is_observed,
        "not all(getattr(mode",
        "False and all(getattr(mode",
        lora_laws.modes_and_their_caches_are_not_written_into,
    ),
    "a ragged batch stops": Bug(
        lora_fast.is_safe,
        "        or type(x) is not Tensor\n",
        "",
        lora_laws.a_ragged_batch_goes_through,
    ),
}

test_a_stop_is_caught = each_is_caught(STOPS, (AttributeError, RuntimeError))
