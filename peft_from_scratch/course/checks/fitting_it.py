"""What the exercises of notebook 02, fitting it, are compared with.

A peak is added up part by part. A checkpoint is compared with the plain function: its
values and gradients, the random numbers before and after, what autograd keeps, and how
often the function ran. A ZeRO step is compared with one rank's update, over a wire that
counts what is sent. A choice is compared with the bill of every change. our_peak,
our_checkpoint, our_zero_step and our_choice are the lesson's own answers.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import Wrong, close, judged, pulled, unchanged

Moments = Mapping[str, Mapping[str, int]]

# 2.1 ----------------------------------------------------------------------------------


def our_peak(moments: Moments) -> tuple[str, int]:
    """The lesson's own answer to 2.1: (name, bytes) of the largest moment."""
    sums = {name: sum(parts.values()) for name, parts in moments.items()}
    name = max(sums, key=sums.get)
    return name, sums[name]


@judged
def largest_moment(my_peak: Callable) -> None:
    """2.1: my_peak(moments) -> (name, bytes) of the first of the largest."""
    for moments in _moments():
        expected = our_peak(moments)
        with unchanged(moments=moments):
            got = my_peak(moments)
        _same_peak(got, expected, moments)


def _same_peak(got, expected: tuple, moments: Moments) -> None:
    where = f"my_peak({moments})"
    shown = f"{where}\n  expected  {expected}\n  got       {got!r}\nLikely mistake: "
    likely = _likely_peak(got, moments)
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Wrong(shown + (likely or "two values are needed: the name and the bytes"))
    if got[0] != expected[0]:
        raise Wrong(shown + (likely or "another moment has the largest sum"))
    close(
        got[1],
        expected[1],
        what=f"the bytes, for {where}",
        mistakes={likely: got[1]} if likely else {},
        kind=int,
    )


def _likely_peak(got, moments: Moments) -> str | None:
    """The mistake that gives what we got."""
    sums = {name: sum(parts.values()) for name, parts in moments.items()}
    parts = {name: max(each.values(), default=0) for name, each in moments.items()}
    rows = {part for each in moments.values() for part in each}
    total = sum(max(each.get(part, 0) for each in moments.values()) for part in rows)
    first, most = our_peak(moments)
    last = max(reversed(sums), key=sums.get)
    if isinstance(got, str | int):
        return "two values are needed: the name and the bytes"
    if not isinstance(got, tuple | list) or len(got) != 2:
        return None
    if got[1] == total != most:
        return "the parts' own maxima were added: they are not all there at one moment"
    if got[1] == sum(sums.values()) != most:
        return "all moments were added: only one of them is there at a time"
    if got[1] == max(parts.values()) != most:
        return "the largest single part was taken: add up the parts of each moment"
    if got[0] == last != first:
        return "of equal moments the first one counts"
    if got[0] == min(sums, key=sums.get) != first:
        return "the smallest moment was taken"
    return None


def _moments() -> Iterator[dict]:
    """The telling ones first."""
    yield {"forward": {"a": 5, "b": 9}, "update": {"a": 8, "c": 7}}
    yield {"loss": {"weights": 3, "logits": 4}, "update": {"weights": 3, "states": 4}}
    yield {"forward": {"a": 10}, "loss": {"a": 4, "b": 4, "c": 4}}
    yield {"only": {"a": 1}}
    yield {"loading": {}, "forward": {"a": 0}}
    dice = random.Random(2)
    for count in (2, 3, 8, 15):
        names = dice.sample([f"moment {i}" for i in range(20)], count)
        parts = ("weights", "states", "gradients", "kept", "logits")
        yield {
            name: {
                part: dice.randrange(10**10)
                for part in dice.sample(parts, dice.randint(1, 5))
            }
            for name in names
        }


# 2.2 ----------------------------------------------------------------------------------


def our_checkpoint(f: Callable, x: Tensor) -> Tensor:
    """The lesson's own answer to 2.2: f(x), computed once more in backward."""

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, needed):
            ctx.save_for_backward(x)
            ctx.random = torch.get_rng_state()
            return f(x)

        @staticmethod
        def backward(ctx, dy):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            now = torch.get_rng_state()
            torch.set_rng_state(ctx.random)
            with torch.enable_grad():
                y = f(x)
            torch.set_rng_state(now)
            torch.autograd.backward(y, dy)
            return x.grad, None

    return Again.apply(x, torch.empty(0, requires_grad=True))


class Block(nn.Module):
    """A small layer that counts its calls; with dropout it draws random numbers."""

    def __init__(self, d: int, p: float, dtype: torch.dtype):
        super().__init__()
        self.up = nn.Linear(d, 2 * d, dtype=dtype)
        self.down = nn.Linear(2 * d, d, dtype=dtype)
        self.p, self.calls = p, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = torch.tanh(self.up(x))
        return x + self.down(F.dropout(h, self.p) if self.p else h)


@dataclass(frozen=True)
class Case:
    """Layers in a row, each of them checkpointed."""

    shape: tuple[int, ...]
    layers: int = 1
    p: float = 0.0
    learns: bool = True  # whether x needs a gradient
    dtype: torch.dtype = torch.float32

    def __str__(self):
        text = f"{self.layers} layer(s) on x of shape {self.shape}"
        text += f", dropout {self.p}" if self.p else ""
        return text + ("" if self.learns else ", where x needs no gradient")


CHECKPOINTS = (
    Case((20, 6)),
    Case((3, 5, 8), layers=2),
    Case((5, 4), p=0.5),
    Case((5, 4), layers=3, p=0.3),
    Case((3, 4), learns=False),
    Case((3, 4), layers=3, p=0.5, learns=False),
    Case((2, 2), layers=12, dtype=torch.float64),
    Case((20, 6)),
)


@judged
def recomputed(my_checkpoint: Callable) -> None:
    """2.2: my_checkpoint(f, x) -> f(x), whose inside is computed again in backward."""
    for case in CHECKPOINTS:
        width = case.shape[-1]
        blocks = [Block(width, case.p, case.dtype) for _ in range(case.layers)]
        model = nn.Sequential(*blocks)
        x = torch.randn(case.shape, dtype=case.dtype, requires_grad=case.learns)
        twin = x.detach().clone().requires_grad_(case.learns)
        _same_step(my_checkpoint, case, model, x, twin)
    _same_without_gradients(my_checkpoint)


def _same_step(my_checkpoint, case: Case, model, x: Tensor, twin: Tensor) -> None:
    """Forward, random numbers drawn by others, backward: beside the plain function."""
    before = torch.get_rng_state()
    expected = model(twin)
    between = torch.rand(3)
    expected_way = expected * expected.detach().sin()
    right = _gradients_of(expected_way, model, twin)
    after = torch.rand(3)
    for block in model:
        block.calls = 0
    torch.set_rng_state(before)
    kept: list[Tensor] = []
    y = x
    with unchanged(x=x), _noting(kept):
        for block in model:
            y = my_checkpoint(block, y)
    close(y, expected, what=f"f(x), {case}", kind=case.dtype)
    _kept_nothing(kept, case, model)
    if not y.requires_grad:
        raise Wrong(
            f"the result needs no gradient, for {case}. Likely mistake: autograd looks "
            "at the arguments of apply() only. Where none of the tensors among them "
            "needs a gradient, backward is never called, though f has parameters"
        )
    close(torch.rand(3), between, what=f"random numbers after forward, {case}")
    got = _gradients_of(y * y.detach().sin(), model, x)
    _same_gradients(got, right, case, model)
    close(
        torch.rand(3),
        after,
        what=f"random numbers after backward, {case}",
        mistakes={
            "the replay's state was left behind: put the state of before back": between
        },
    )
    _ran_twice(model, case)


def _gradients_of(y: Tensor, model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Gradients of a weighted sum of y, taken away from where they were left."""
    weights = torch.arange(1.0, y.numel() + 1, dtype=y.dtype).view(y.shape).cos()
    (y * weights).sum().backward()
    tensors = {"x": x, **dict(model.named_parameters())}
    gradients = {name: tensor.grad for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    return gradients


def _same_gradients(got: dict, right: dict, case: Case, model: nn.Module) -> None:
    drawn = case.p > 0
    for name, expected in right.items():
        what = f"the gradient of {name}, {case}"
        if expected is None:
            continue  # of an x that needs none
        if got[name] is None:
            raise Wrong(
                f"{what}\n  expected  a tensor\n  got       None\nLikely mistake: "
                + (
                    "backward() returns the gradient of x, in the place of x"
                    if name == "x"
                    else "backward() has to go back through f's new graph, which ends "
                    "in its parameters: torch.autograd.backward(y, dy)"
                )
            )
        try:
            close(got[name], expected, what=what, tolerance=1e-4)
        except Wrong as wrong:
            if not drawn:
                raise
            raise Wrong(
                f"{str(wrong).partition('Likely mistake')[0]}Likely mistake: dropout "
                "drew other numbers the second time: set the random state of forward "
                "before f runs again"
            ) from None


class _noting(torch.autograd.graph.saved_tensors_hooks):
    """Notes what autograd keeps."""

    def __init__(self, kept: list[Tensor]):
        def note(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        super().__init__(note, lambda tensor: tensor)


def _kept_nothing(kept: list[Tensor], case: Case, model: nn.Module) -> None:
    """Only tensors of x's size are kept, one for each layer."""
    size = torch.Size(case.shape).numel()
    own = {p.data_ptr() for p in model.parameters()}
    floats = [t for t in kept if t.is_floating_point()]  # no random state
    others = [t for t in floats if t.data_ptr() not in own]
    values = sum(t.numel() for t in others)
    if values > case.layers * size + 64:  # and something small beside
        raise Wrong(
            f"autograd keeps {values} values, for {case}; the inputs of the layers "
            f"have {case.layers * size}. Likely mistake: f runs in forward with a "
            "graph, so that all that it computes on the way is kept"
        )


def _ran_twice(model: nn.Module, case: Case) -> None:
    for number, block in enumerate(model):
        if block.calls != 2:
            raise Wrong(
                f"layer {number} ran {block.calls} times, for {case}. Likely mistake: "
                "f runs once in forward, and once more in backward"
            )


def _same_without_gradients(my_checkpoint: Callable) -> None:
    """A function without parameters, used twice; and inside of no_grad."""
    x = torch.randn(4, requires_grad=True)
    y = my_checkpoint(torch.sin, x) + my_checkpoint(torch.exp, x)
    twin = x.detach().clone().requires_grad_()
    pulled(y, twin.sin() + twin.exp())
    close(x.grad, twin.grad, what="the gradient of x, which two functions read")
    with torch.no_grad():
        close(my_checkpoint(torch.sin, x), x.sin(), what="f(x) within torch.no_grad()")


# 2.3 ----------------------------------------------------------------------------------


def our_zero_step(weights, gradients, exchange, update) -> list[Tensor]:
    """The lesson's own answer to 2.3: the new weights of every rank."""
    N, size = len(weights), weights[0].numel()
    n = -(-size // N)
    cut = lambda t: F.pad(t, (0, N * n - size)).view(N, n).clone()  # noqa: E731
    parts = [cut(g) for g in gradients]
    for hop in range(1, N):
        came = exchange([parts[r][(r - hop) % N] for r in range(N)])
        for r in range(N):
            parts[r][(r - hop - 1) % N] += came[r]
    whole = [cut(w) for w in weights]
    for r in range(N):
        whole[r][r] = update(r, whole[r][r].clone(), parts[r][r] / N)
    for hop in range(N - 1):
        came = exchange([whole[r][(r - hop) % N] for r in range(N)])
        for r in range(N):
            whole[r][(r - hop - 1) % N] = came[r]
    return [w.view(-1)[:size] for w in whole]


@dataclass
class Wire:
    """A ring of simulated ranks: what rank r sends, rank r + 1 receives.

    sent  values that a rank has sent, for each hop
    """

    ranks: int
    n: int | None = None  # values that a message must have; None: any number
    sent: list[int] = field(default_factory=list)

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Send one tensor from each rank; what each rank receives, in their order."""
        if not isinstance(tensors, list | tuple) or len(tensors) != self.ranks:
            count = len(tensors) if isinstance(tensors, list | tuple) else "no list"
            raise Wrong(
                f"exchange() got {count} tensors for {self.ranks} ranks. Likely "
                "mistake: it takes a list with one tensor for each rank"
            )
        if not all(isinstance(t, Tensor) for t in tensors):
            raise Wrong(
                "exchange() got something that is no tensor. Likely mistake: it takes "
                "a list with one tensor for each rank"
            )
        for tensor in tensors if self.n is not None else ():
            if tensor.numel() != self.n:
                raise Wrong(
                    f"a rank sent {tensor.numel()} values in a hop; a part has "
                    f"{self.n}. Likely mistake: a rank sends one part in a hop, and "
                    "never the whole tensor"
                )
        self.sent.append(max(t.numel() for t in tensors))
        copies = [t.detach().clone() for t in tensors]
        return [copies[rank - 1] for rank in range(self.ranks)]


class Update:
    """An optimizer whose ranks have states of their own, and that is not linear."""

    def __init__(self, ranks: int):
        self.states: list[Tensor | None] = [None] * ranks
        self.asked: list[tuple[int, Tensor, Tensor]] = []

    def __call__(self, rank: int, w: Tensor, g: Tensor) -> Tensor:
        self.asked.append((rank, w.detach().clone(), g.detach().clone()))
        before = self.states[rank]
        self.states[rank] = g.abs() if before is None else 0.5 * before + g.abs()
        return w - 0.1 * g / (self.states[rank] + 0.5)


SPLITS = ((3, 7), (2, 4), (4, 8), (1, 5), (5, 3), (4, 1), (3, 12), (12, 30))
DTYPES = (torch.float32, torch.float64)


@judged
def zero_step(my_zero_step: Callable) -> None:
    """2.3: my_zero_step(weights, gradients, exchange, update) -> new weights."""
    for number, (ranks, size) in enumerate(SPLITS):
        dtype, update, reference = DTYPES[number % 2], Update(ranks), Update(ranks)
        w = torch.randn(size, dtype=dtype)
        for step in range(2):
            gradients = [torch.randn(size, dtype=dtype) for _ in range(ranks)]
            given = [w.clone() for _ in range(ranks)]
            wire = Wire(ranks, -(-size // ranks))
            update.asked.clear()
            where = f"{ranks} ranks, {size} weights, step {step + 1}"
            with unchanged(weights=given, gradients=gradients):
                got = my_zero_step(given, gradients, wire, update)
            right = _one_rank(w, gradients, reference)
            _own_parts(update.asked, w, ranks, where)
            _same_weights(got, right, w, gradients, ranks, where)
            _sent_right(wire, ranks, where)
            w = right


def _parts(tensor: Tensor, ranks: int) -> Tensor:
    n = -(-tensor.numel() // ranks)
    return F.pad(tensor, (0, ranks * n - tensor.numel())).view(ranks, n)


def _one_rank(w: Tensor, gradients: list[Tensor], update: Callable) -> Tensor:
    """One rank that has all rows: the mean gradient, updated part by part."""
    ranks, mean = len(gradients), torch.stack(gradients).mean(0)
    w_parts, g_parts = _parts(w, ranks), _parts(mean, ranks)
    new = [update(r, w_parts[r], g_parts[r]) for r in range(ranks)]
    return torch.cat(new)[: w.numel()]


def _same_weights(got, right: Tensor, w, gradients, ranks: int, where: str) -> None:
    if not isinstance(got, list | tuple) or len(got) != ranks:
        shown = f"{len(got)} values" if isinstance(got, list | tuple) else repr(got)
        raise Wrong(
            f"the result for {where}\n  expected  a list of {ranks} tensors\n  got  "
            f"     {shown[:60]}\nLikely mistake: return the new weights of every rank"
        )
    for rank, new in enumerate(got):
        mistakes = {"nothing was updated": w}
        if isinstance(new, Tensor) and new.shape == right.shape:
            own = _parts(right, ranks)[rank]
            alone = _parts(w, ranks).clone()
            alone[rank] = own
            mistakes["only the rank's own part is new: gather the others' parts"] = (
                alone.view(-1)[: w.numel()]
            )
        likely = "the padding was left on: a rank's weights have the size of before"
        padded = ranks * -(-w.numel() // ranks)
        if isinstance(new, Tensor) and new.numel() == padded != w.numel():
            raise Wrong(
                f"the weights of rank {rank}, {where}\n  expected  shape "
                f"({w.numel()},)\n  got       shape {tuple(new.shape)}\nLikely "
                f"mistake: {likely}"
            )
        close(
            new,
            right,
            what=f"the weights of rank {rank}, {where}",
            mistakes=mistakes | _wrong_gradients(w, gradients, ranks),
            tolerance=1e-4,
            kind=w.dtype,
        )


def _wrong_gradients(w: Tensor, gradients: list[Tensor], ranks: int) -> dict:
    """{mistake: the weights of the first step that it gives}"""
    total = torch.stack(gradients).sum(0)
    table = {
        "the gradients were added up: divide by the number of ranks": [total] * ranks,
        "each rank used its own gradient: reduce-scatter comes first": gradients,
        "all ranks used the first one's gradient": [gradients[0]] * ranks,
    }
    weights = {}
    for text, each in table.items():
        update = Update(ranks)
        parts = zip(_parts(w, ranks), each, range(ranks), strict=True)
        new = [update(r, p, _parts(g, ranks)[r]) for p, g, r in parts]
        weights[text] = torch.cat(new)[: w.numel()]
    return weights if ranks > 1 else {}


def _own_parts(asked: list, w: Tensor, ranks: int, where: str) -> None:
    """Rank r updates part r, once, and nothing else."""
    who = sorted(rank for rank, _, _ in asked)
    if who != list(range(ranks)):
        raise Wrong(
            f"update() was called for the ranks {who}, {where}. Likely mistake: it is "
            "called once for each rank"
        )
    for rank, part, _ in asked:
        close(
            part,
            _parts(w, ranks)[rank],
            what=f"the weights that rank {rank} updates, {where}",
            mistakes={
                f"that is part {other}: rank {rank} updates part {rank}": each
                for other, each in enumerate(_parts(w, ranks))
                if other != rank
            },
        )


def _sent_right(wire: Wire, ranks: int, where: str) -> None:
    hops = 2 * (ranks - 1)
    if len(wire.sent) != hops:
        raise Wrong(
            f"there were {len(wire.sent)} hops around the ring, {where}; "
            f"reduce-scatter and all-gather need {hops} together. Likely mistake: "
            + (
                "a rank knows what it holds and what exchange() brought, and nothing "
                "else"
                if len(wire.sent) < hops
                else "each of the two takes one hop less than there are ranks"
            )
        )


# 2.4 ----------------------------------------------------------------------------------

CHANGES = ("nothing", "chunks", "halves", "checkpointing", "four GPUs")


def our_choice(bill: Mapping[str, int], room: int) -> tuple[str, str, int] | None:
    """The lesson's own answer to 2.4: (change, moment, peak), or None."""
    for change in CHANGES:
        moment, peak = our_peak(_changed(bill, change))
        if peak <= room:
            return change, moment, peak
    return None


def _changed(bill: Mapping[str, int], change: str, **wrong) -> dict[str, dict]:
    """The three moments of a bill with one change, and with mistakes at choice."""
    rules = {"logits": True, "rest": True, "again": True, "inputs": True} | wrong
    half = 2 if change == "halves" else 1
    parts = 4 if change == "four GPUs" else 1
    again = change == "checkpointing"
    kept = bill["layers"] * bill["input" if again else "layer"] // half
    if again and not rules["inputs"]:
        kept = 0
    logits = bill["logits"] // (8 if change == "chunks" else 1)
    logits //= half if rules["logits"] else 1
    if again and wrong.get("no_logits"):
        logits = 0
    base = {
        "weights": bill["weights"] // (parts if wrong.get("stage_three") else 1),
        "states": bill["states"] // parts,
    }
    gradients = bill["gradients"] // (1 if wrong.get("stage_one") else parts)
    layer = bill["layer"] if again and rules["again"] else 0
    moments = {
        "loss": base | {"kept": kept, "logits": logits},
        "backward": base | {"kept": kept, "again": layer},
        "update": base | {"gradients": gradients, "temporaries": bill["temporaries"]},
    }
    if wrong.get("no_update"):
        del moments["update"]
    return moments


@judged
def cheapest_change(my_choice: Callable) -> None:
    """2.4: my_choice(bill, room) -> (change, moment, peak), or None."""
    for bill, room in _bills():
        expected = our_choice(bill, room)
        with unchanged(bill=bill):
            got = my_choice(bill, room)
        _same_choice(got, expected, bill, room)


def _same_choice(got, expected, bill: Mapping[str, int], room: int) -> None:
    where = f"my_choice({dict(bill)}, {room})"
    shown = f"{where}\n  expected  {expected}\n  got       {got!r}\nLikely mistake: "
    likely = _likely_choice(got, bill, room)
    if got is None or expected is None:
        if got is not expected:
            why = "one of the changes fits, and None was returned"
            if expected is None:
                why = "no single change fits, so the answer is None"
            raise Wrong(shown + (likely or why))
        return
    if not isinstance(got, tuple | list) or len(got) != 3:
        raise Wrong(shown + "three values are needed: change, moment, peak")
    if got[0] not in CHANGES:
        raise Wrong(shown + f"a change is one of {', '.join(CHANGES)}")
    if got[0] != expected[0]:
        raise Wrong(shown + (likely or _wrong_change(got[0], expected[0], bill, room)))
    if got[1] != expected[1]:
        raise Wrong(
            shown + (likely or "the moment is the one that is largest with the change")
        )
    mistakes = {likely: got[2]} if likely else {}
    close(got[2], expected[2], what=where, mistakes=mistakes, kind=int)


def _wrong_change(got: str, expected: str, bill: Mapping[str, int], room: int) -> str:
    peak = our_peak(_changed(bill, got))[1]
    if peak > room:
        return f"with {got!r} the peak is {peak}, which does not fit"
    return f"{got!r} fits, but {expected!r} fits too and is cheaper"


def _likely_choice(got, bill: Mapping[str, int], room: int) -> str | None:
    """The mistake that gives what we got."""

    def first(peak_of=our_peak, fits=lambda peak: peak <= room, order=CHANGES, **wrong):
        for change in order:
            moment, peak = peak_of(_changed(bill, change, **wrong))
            if fits(peak):
                return change, moment, peak
        return None

    def total(moments):
        rows = {part for each in moments.values() for part in each}
        most = [max(e.get(part, 0) for e in moments.values()) for part in rows]
        return our_peak(moments)[0], sum(most)

    ways = {
        "the parts were added up over all moments: the peak is one moment": (
            first(peak_of=total)
        ),
        "checkpointing leaves the logits alone": first(no_logits=True),
        "checkpointing still keeps the input of every layer": first(inputs=False),
        "backward computes one layer again, and holds all of it": first(again=False),
        "with half the rows the logits are half as many, too": first(logits=False),
        "stage 2 leaves the weights whole": first(stage_three=True),
        "stage 2 cuts the gradients, too": first(stage_one=True),
        "the update is a moment, too": first(no_update=True),
        "a peak as large as the room fits": first(fits=lambda peak: peak < room),
        "the change that saves most was taken: take the cheapest that fits": min(
            ((c, *our_peak(_changed(bill, c))) for c in CHANGES), key=lambda e: e[2]
        ),
        "the dearest change was taken: start with the cheapest": first(
            order=CHANGES[::-1]
        ),
    }
    right = our_choice(bill, room)
    if not (got is None or isinstance(got, tuple | list)):
        return None
    got = tuple(got) if got is not None else None
    return next((t for t, way in ways.items() if way == got and way != right), None)


def _bills() -> Iterator[tuple[dict, int]]:
    """(bill, room), the telling ones first; each peak is the room once, and one off."""
    cases = [
        # logits are the peak; then layers; then states
        _bill(80, 160, 80, 4, 40, 8, 800, 16),
        _bill(80, 160, 80, 40, 40, 8, 80, 16),
        _bill(80, 1600, 80, 4, 40, 8, 80, 400),
        _bill(800, 160, 80, 2, 400, 80, 80, 16),
        _bill(80, 80, 800, 4, 40, 8, 80, 800),
    ]
    dice = random.Random(4)
    for _ in range(25):
        wide = [8 * dice.randint(1, 10 ** dice.randint(1, 4)) for _ in range(5)]
        layer = 8 * dice.randint(2, 500)
        small = 8 * dice.randint(1, layer // 8)
        weights, states, gradients, logits, temporaries = wide
        layers = dice.randint(1, 40)
        cases.append(
            _bill(
                *(weights, states, gradients, layers),
                *(layer, small, logits, temporaries),
            )
        )
    for bill in cases:
        for change in CHANGES:
            peak = our_peak(_changed(bill, change))[1]
            yield bill, peak
            yield bill, peak - 1


def _bill(weights, states, gradients, layers, layer, input, logits, temporaries):
    return dict(
        weights=weights,
        states=states,
        gradients=gradients,
        layers=layers,
        layer=layer,
        input=input,
        logits=logits,
        temporaries=temporaries,
    )
