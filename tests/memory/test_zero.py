"""ZeRO on real ranks: one rank's AdamW, the bytes of the formulas, and lost ranks.

Every law starts its own ranks, which are forked from a server: see helpers/ranks.py.
"""

import pytest
import rank_jobs as jobs
import torch
from model_state import largest
from planting import each_is_caught, law
from ranks import LOST, on_ranks

import peft_from_scratch as pfs
from peft_from_scratch.memory import formulas
from peft_from_scratch.memory.collectives import Ring
from peft_from_scratch.memory.shards import Shard, _read_by, _Saving, shard
from peft_from_scratch.memory.zero import Optimizer
from peft_from_scratch.training.gradient_checkpointing import saved_by_value


@law
def weights_are_those_of_one_rank():
    """Within 1e-12 after three clipped steps of two micro-batches, in every stage."""
    on_ranks(2, jobs.weights_are_one_ranks, ["chain"], [1, 2, 3])


@pytest.mark.parametrize("kind", ["lora", "full", "dora", "prompt"])
def test_a_language_model_is_that_of_one_rank(kind):
    """Tied weights, transposed ones, and one that is read past its module."""
    on_ranks(2, jobs.weights_are_one_ranks, [kind], [2, 3])


def test_four_ranks_and_one():
    on_ranks(4, jobs.weights_are_one_ranks, ["chain"], [1, 2, 3])
    on_ranks(1, jobs.weights_are_one_ranks, ["chain"], [1, 2, 3])


def test_groups_have_settings_of_their_own():
    on_ranks(2, jobs.groups_have_settings_of_their_own)


@law
def bytes_are_those_of_the_formulas():
    on_ranks(2, jobs.bytes_are_the_formulas, ["chain", "lora"])


@law
def stage_three_sends_what_is_read():
    on_ranks(2, jobs.stage_three_sends_what_is_read)


def test_the_formulas_are_those_of_the_paper():
    """ZeRO's figure 1: 7.5B parameters in half precision on 64 ranks, in GB.

    Gradients in half precision, 12 bytes of states: 120 without, then 31.4, 16.6, 1.9.
    """
    gigabytes = []
    for stage, ranks in ((1, 1), (1, 64), (2, 64), (3, 64)):
        counted = formulas.zero_bytes(
            [10**6] * 7500, ranks=ranks, stage=stage, itemsize=2
        )
        gigabytes.append(round(sum(counted.values()) / 1e9, 1))
    assert gigabytes == [120.0, 31.4, 16.6, 1.9]
    sent = formulas.zero_traffic([64 * 10**6], ranks=64, stage=2)
    assert sent == 2 * 64 * 10**6 * 4 * 63 / 64


@law
def states_and_gradients_are_parts():
    on_ranks(2, jobs.states_and_gradients_are_parts)
    on_ranks(4, jobs.states_and_gradients_are_parts)


@law
def forward_keeps_no_weight():
    on_ranks(2, jobs.forward_keeps_no_weight)


@law
def half_precision_has_float32_masters():
    for ranks in (1, 2):
        on_ranks(ranks, jobs.half_precision_has_masters, ranks)


def test_checkpointing_changes_no_weight_in_stage_two():
    on_ranks(2, jobs.checkpointed_weights_are_the_same, 2)


@law
def checkpointing_changes_no_weight_in_stage_three():
    on_ranks(2, jobs.checkpointed_weights_are_the_same, 3)


@law
def every_method_learns_in_stage_three():
    on_ranks(2, jobs.every_method_learns_in_stage_three)


def test_a_cut_model_answers_and_learns_in_chunks():
    on_ranks(2, jobs.a_cut_model_answers_and_learns_in_chunks)


@law
def a_state_dict_loads_on_another_number_of_ranks(folder):
    """Saved on two, it goes on on four and on one, and in torch's AdamW."""
    path = str(folder / "saved.pt")
    on_ranks(2, jobs.save_after, "chain", 2, 2, path)
    on_ranks(4, jobs.go_on_from, "chain", 3, range(2, 4), path)
    on_ranks(1, jobs.go_on_from, "chain", 1, range(2, 4), path)
    file, model = torch.load(path), jobs.chain()
    model.load_state_dict(file["model"])
    alone = torch.optim.AdamW(jobs.trains(model))
    alone.load_state_dict(file["optimizer"])
    for step in range(2, 4):
        alone.zero_grad()
        jobs.loss_of(model, jobs.rows_of(step)).backward()
        alone.step()
    expected = dict(jobs.reference("chain", 4)[0].named_parameters())
    assert largest(dict(model.named_parameters()), expected) < 1e-12


@law
def a_lost_rank_is_an_error_within_seconds():
    (message, seconds), other = on_ranks(
        2, jobs.a_lost_rank_is_an_error, "killed", dies=1
    )
    assert other == LOST and seconds < 2 and "from the last checkpoint" in message
    (message, seconds), _ = on_ranks(2, jobs.a_lost_rank_is_an_error, "slow")
    assert 1 < seconds < 4 and "did not answer within 2 s" in message


def test_a_rank_at_another_tensor_is_an_error():
    on_ranks(2, jobs.another_tensor_is_not_listened_to)


def test_what_cannot_be_is_refused():
    on_ranks(1, jobs.what_cannot_be_is_refused)
    assert pfs.zero.Optimizer is Optimizer
    for call in (pfs.zero.shard, lambda model: pfs.zero.Optimizer(model.parameters())):
        with pytest.raises(ValueError, match=r"process group.*init_process_group"):
            call(jobs.chain())


def test_a_group_may_be_some_of_the_ranks():
    on_ranks(3, jobs.a_group_is_part_of_the_ranks)


BUGS = {
    "a layer's weights gone before its backward pass": (
        saved_by_value,
        "isinstance(tensor, nn.Parameter)",
        "False",
        checkpointing_changes_no_weight_in_stage_three,
    ),
    "states not cut": (
        Shard.__init__,
        "-(-self.numel // ring.size)",
        "self.numel",
        bytes_are_those_of_the_formulas,
    ),
    "gradients summed and not averaged": (
        Shard.mean,
        "total / self.ring.size",
        "total.clone()",
        weights_are_those_of_one_rank,
    ),
    "the padding is updated": (
        Shard.mean,
        "gradient.new_zeros(",
        "gradient.new_ones(",
        states_and_gradients_are_parts,
    ),
    "parts gathered out of order": (
        Shard.join,
        "parts[self.ring.rank] = mine",
        "parts[self.ring.rank - 1] = mine",
        weights_are_those_of_one_rank,
    ),
    "parts overwritten and not added": (
        Ring.reduce_scatter,
        "here.add_(received)",
        "here.copy_(received)",
        weights_are_those_of_one_rank,
    ),
    "each rank starts from its own weights": (
        Optimizer._take,
        "self.ring.broadcast(p.data, number)",
        "pass",
        weights_are_those_of_one_rank,
    ),
    "each rank cuts its own weights": (
        shard,
        "ring.broadcast(p.data, number)",
        "pass",
        weights_are_those_of_one_rank,
    ),
    "the last micro-batch alone": (
        Optimizer._reduce,
        "self.gradients[p] += mean",
        "self.gradients[p] = mean",
        weights_are_those_of_one_rank,
    ),
    "clipped by the norm of one rank's parts": (
        Optimizer.clip_grad_norm_,
        "self.ring.all_gather(squares, number=len(self.shards))",
        "pass",
        weights_are_those_of_one_rank,
    ),
    "whole gradients kept": (
        Optimizer._take,
        "if self.stage > 1:",
        "if self.stage > 2:",
        bytes_are_those_of_the_formulas,
    ),
    "whole weights kept": (
        Shard.release,
        "if self.users == 0:",
        "if False:",
        bytes_are_those_of_the_formulas,
    ),
    "whole weights kept for backward": (
        _Saving.pack,
        "if each.users and",
        "if False and",
        forward_keeps_no_weight,
    ),
    "only what stands in the adapter itself": (
        _read_by,
        "if not isinstance(module, Adapter):",
        "if True:",
        every_method_learns_in_stage_three,
    ),
    "elements counted for bytes": (
        Ring._exchange,
        "away.nbytes",
        "away.numel()",
        stage_three_sends_what_is_read,
    ),
    "no float32 masters": (
        Optimizer._update,
        'state.get("master", w)',
        "w",
        half_precision_has_float32_masters,
    ),
    "the first part of every state loaded": (
        Optimizer._part,
        "self.shards[p].cut(value.to(p.device, dtype))",
        "value.to(p.device, dtype).flatten()[: self.shards[p].n].clone()",
        a_state_dict_loads_on_another_number_of_ranks,
    ),
    "waits as long as the group does": (
        Ring._exchange,
        "message.wait(self.timeout)",
        "message.wait()",
        a_lost_rank_is_an_error_within_seconds,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(BUGS)
