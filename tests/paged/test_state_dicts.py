"""State dicts that others wrote: old ones, hooks' entries, broken ones; planted bugs.

torch.optim.AdamW is the reference: it is given the same state dict.
"""

import copy

import pytest
import torch
from planting import each_is_caught, law
from torch import nn
from two_optimizers import assert_equal_bits, assert_equal_states, feed, paged

from peft_from_scratch import PagedAdamW
from peft_from_scratch.paged import states

SETTINGS = dict(lr=1e-2, weight_decay=0.3)


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (40,), ())]


def torchs(ps, **options):
    return torch.optim.AdamW(ps, **SETTINGS | options, foreach=False)


def ours(ps, **options):
    return paged(ps, 2, **SETTINGS | options)


def adam(ps, **options):
    return torch.optim.Adam(ps, **SETTINGS | options, foreach=False)


def stepped(sides, optimizers, steps=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        feed(sides, generator)
        for optimizer in optimizers:
            optimizer.step()


def saved_by(make, change=lambda saved: None, **options):
    ps = parameters()
    optimizer = make(ps, **options)
    stepped([ps], [optimizer])
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    return saved


def assert_both_go_on_alike(saved, takers=(torchs, ours), **options):
    """Two optimizers that were given the same state dict make the same steps."""
    sides = [parameters() for _ in takers]
    optimizers = [make(ps, **options) for make, ps in zip(takers, sides, strict=True)]
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(saved))
    stepped(sides, optimizers, seed=2)
    assert_equal_bits(sides[1], sides[0])
    assert_equal_states(optimizers[1].state_dict(), optimizers[0].state_dict())


def without(*names):
    def change(saved):
        for group in saved["param_groups"]:
            for name in names:
                del group[name]

    return change


@law
def an_old_state_dict_takes_torchs_defaults():
    for make in (torchs, ours):
        for old in (("maximize",), ("amsgrad",), ("amsgrad", "maximize")):
            # The taker's own settings are others: they must not stay.
            taken = {"maximize": True, "amsgrad": False}
            assert_both_go_on_alike(saved_by(make, without(*old)), **taken)
        assert_both_go_on_alike(
            saved_by(make, without("maximize"), amsgrad=True), maximize=True
        )


@law
def the_decay_stays_adamws_in_whatever_loads_it():
    """Adam decays by L2 where a saved group does not say that it is decoupled."""
    for make in (torchs, ours):
        saved = saved_by(make)
        assert [g["decoupled_weight_decay"] for g in saved["param_groups"]] == [True]
        assert_both_go_on_alike(saved, takers=(torchs, adam))
    for make in (adam, torchs):
        assert_both_go_on_alike(saved_by(make))
    late = ours(parameters())
    late.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    saved = late.state_dict()["param_groups"]
    assert [group["decoupled_weight_decay"] for group in saved] == [True, True]


@law
def what_hooks_write_into_the_state_comes_back():
    """Entries for no parameter, and more entries for one."""
    sides = parameters(), parameters()
    optimizers = torchs(sides[0]), ours(sides[1])
    for optimizer in optimizers:
        optimizer.state["key"] = "value"
        optimizer.state["more"] = {"seen": 3}
        optimizer.state["none"] = 0
    stepped(sides, optimizers)
    for optimizer, ps in zip(optimizers, sides, strict=True):
        optimizer.state[ps[0]]["mine"] = torch.arange(3.0)
        optimizer.state[ps[0]]["count"] = 4
    assert_equal_entries(*(optimizer.state_dict() for optimizer in optimizers))
    saved = optimizers[0].state_dict()
    others = parameters(), parameters()
    takers = torchs(others[0]), ours(others[1])
    for taker in takers:
        taker.load_state_dict(copy.deepcopy(saved))
    assert_equal_entries(*(taker.state_dict() for taker in takers))
    assert takers[1].state["key"] == "value"
    assert takers[1].state[others[1][0]]["count"] == 4
    stepped(others, takers, seed=2)
    assert_equal_bits(others[1], others[0])
    assert_equal_entries(*(taker.state_dict() for taker in takers))


def assert_equal_entries(one, other):
    """Equal states, whatever is in them; and equal settings but for torch's loops."""
    assert one["state"].keys() == other["state"].keys()
    for key, state in one["state"].items():
        if not isinstance(state, dict):
            assert state == other["state"][key]
            continue
        assert state.keys() == other["state"][key].keys()
        for name, value in state.items():
            theirs = other["state"][key][name]
            same = (
                torch.equal if isinstance(value, torch.Tensor) else type(value).__eq__
            )
            assert same(value, theirs), (key, name)
    for mine, theirs in zip(one["param_groups"], other["param_groups"], strict=True):
        left = {*states.OTHERS, "fused"}  # None in torch's plain groups
        assert {k: v for k, v in mine.items() if k not in left} == {
            k: v for k, v in theirs.items() if k not in left
        }


@law
def an_entry_of_a_hook_before_the_first_step_changes_no_bit():
    sides = parameters(), parameters()
    reference, optimizer = torchs(sides[0]), ours(sides[1])
    optimizer.state[sides[1][1]]["mine"] = "kept"
    stepped(sides, (reference, optimizer))
    assert_equal_bits(sides[1], sides[0])
    assert optimizer.state_dict()["state"][1]["mine"] == "kept"
    early = ours(parameters())
    early.state[early.param_groups[0]["params"][1]]["mine"] = "kept"
    late = ours(parameters())
    late.load_state_dict(early.state_dict())  # of no steps, but of something
    assert late.state_dict()["state"] == {1: {"mine": "kept"}}


MALFORMED = {  # what is wrong: how it comes about
    "the state dict has no 'state'; it has 'param_groups'": lambda s: s.pop("state"),
    "has no 'param_groups'; it has 'state'": lambda s: s.pop("param_groups"),
    "has no 'state'; it has no key": dict.clear,
    "'state' is [1]; it must be a dict": lambda s: s.update(state=[1]),
    "'param_groups' is {}; it must be a list": lambda s: s.update(param_groups={}),
    "group 0 is 3; it must be a dict": lambda s: s.update(param_groups=[3]),
    "'params' of group 0 is None; it must be a list": lambda s: s["param_groups"][
        0
    ].pop("params"),
    "a key in 'params' of group 0 is [0]; it": lambda s: s["param_groups"][0].update(
        params=[[0], 1, 2]
    ),
    "name 0 twice": lambda s: s["param_groups"][0].update(params=[0, 1, 0]),
    "the state of parameter 1 is [1]; it must": lambda s: s["state"].update({1: [1]}),
    "a state of 'layer.weight', which is in none": lambda s: s["state"].update(
        {"layer.weight": s["state"][0]}
    ),
    "group 0 of the state dict has no 'betas'": without("betas"),
    "lr='fast': allowed": lambda s: s["param_groups"][0].update(lr="fast"),
    "eps=None: allowed": lambda s: s["param_groups"][0].update(eps=None),
    "betas=0.9: allowed": lambda s: s["param_groups"][0].update(betas=0.9),
    "betas=('a', 'b'): allowed": lambda s: s["param_groups"][0].update(
        betas=("a", "b")
    ),
    "'step' of parameter 0 in the state dict is 'two'": lambda s: s["state"][0].update(
        step="two"
    ),
    "'step' of parameter 0 in the state dict is [1]": lambda s: s["state"][0].update(
        step=[1]
    ),
}


@law
def a_malformed_state_dict_is_refused_whole_and_says_what_is_missing():
    ps = parameters()
    optimizer = ours(ps)
    stepped([ps], [optimizer])
    before, table = optimizer.state_dict(), optimizer.page_table()
    for message, spoil in MALFORMED.items():
        with pytest.raises(ValueError) as refused:
            optimizer.load_state_dict(saved_by(torchs, spoil))
        assert message in str(refused.value)
        assert_equal_states(optimizer.state_dict(), before)
        assert optimizer.page_table() == table
    for no_dict in (None, [], "state"):
        with pytest.raises(ValueError, match=r"it is .*; it must be a dict"):
            optimizer.load_state_dict(no_dict)


def test_what_a_hook_makes_of_a_state_dict_is_checked_as_well():
    optimizer = ours(parameters())
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: saved.pop("state"))
    with pytest.raises(ValueError, match=r"has no 'state'|must be a dict"):
        optimizer.load_state_dict(saved_by(torchs))


def test_a_group_that_asks_for_the_decay_of_adam_is_refused():
    group = {"params": parameters(), "decoupled_weight_decay": False}
    with pytest.raises(ValueError, match=r"is the decay of torch\.optim\.Adam"):
        PagedAdamW([group], budget_bytes=1 << 20)


BUGS = {
    "an old state dict keeps the taker's settings": (
        states.merged_groups,
        "theirs = OLD | {**their}",
        "theirs = {k: mine.get(k) for k in OLD} | {**their}",
        an_old_state_dict_takes_torchs_defaults,
    ),
    "the groups do not say whose decay it is": (
        PagedAdamW.__init__,
        "defaults | DECOUPLED | {",
        "defaults | {",
        the_decay_stays_adamws_in_whatever_loads_it,
    ),
    "the decay of the giver is taken over": (
        states.merged_groups,
        "settings | DECOUPLED)",
        "settings | {k: theirs.get(k) for k in DECOUPLED})",
        the_decay_stays_adamws_in_whatever_loads_it,
    ),
    "entries of hooks left out of the state dict": (
        PagedAdamW.state_dict,
        "full[p] | own |",
        "own |",
        what_hooks_write_into_the_state_comes_back,
    ),
    "entries of hooks lost in loading": (
        PagedAdamW.load_state_dict,
        "state |= other_entries(groups, state_dict)",
        "pass",
        what_hooks_write_into_the_state_comes_back,
    ),
    "an entry for no parameter is an error": (
        PagedAdamW.state_dict,
        "if p in self.state}",
        "if self.state[p]}; [self._state_pages[p] for p in self.state]",
        what_hooks_write_into_the_state_comes_back,
    ),
    "an entry that is zero is no entry": (
        PagedAdamW.state_dict,
        "if s or key not in pages}",
        "if s}",
        what_hooks_write_into_the_state_comes_back,
    ),
    "a first step is known by an empty state": (
        PagedAdamW._walk,
        'first = "step" not in state',
        "first = not state",
        an_entry_of_a_hook_before_the_first_step_changes_no_bit,
    ),
    "a state dict is not looked at": (
        states.check_form,
        "if part not in state_dict:",
        "if False:",
        a_malformed_state_dict_is_refused_whole_and_says_what_is_missing,
    ),
    "a parameter named twice": (
        states._places,
        "if len(set(keys)) < len(keys):",
        "if False:",
        a_malformed_state_dict_is_refused_whole_and_says_what_is_missing,
    ),
    "a state of another model is taken for a hook's": (
        states.checked_states,
        "if key not in places and _is_of_adamw(saved):",
        "if False:",
        a_malformed_state_dict_is_refused_whole_and_says_what_is_missing,
    ),
}

test_a_planted_bug_is_caught = each_is_caught(
    BUGS,
    (
        AssertionError,
        KeyError,
        AttributeError,
        ValueError,
        TypeError,
        pytest.fail.Exception,
    ),
)
