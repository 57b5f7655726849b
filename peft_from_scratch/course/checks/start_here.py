"""What the exercises of notebook 00, start here, are compared with.

The scorer with that of the task "orders", the count with the parameters of real LoRA
modules, the control with control_of, the interval with wilson, the padding with
training.batch.left_pad.
"""

import copy
import json
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...common.statistics import wilson
from ...core.adapter import trainable
from ...methods import lora
from ...tasks import orders
from ...training.batch import left_pad
from . import Wrong, close, judged, unchanged

# 0.1 ----------------------------------------------------------------------------------

ORDER = {"customer": "Ines", "items": {"candle": 12, "rope": 2}, "city": "Oslo"}
RIGHT = json.dumps(ORDER, separators=(",", ":"))
NEVER = "nothing is right, or the answer is compared with something else than `right`"
ALWAYS = "everything is right, or only the keys are compared"
TEXTS = "two texts are compared; compare what json.loads makes of them"
KIND = "True or False is asked for, and nothing else"
LOOSE = "JSON is looked for inside of the answer; all of the answer must be JSON"
REPAIRED = "the answer was repaired before it was read; json.loads gets it as it is"
UNREAD = "what json.loads cannot read is wrong; its ValueError is to be caught"

# (answer, what a wrong verdict on it says of the scorer)
ANSWERS = (
    (RIGHT, NEVER),
    (RIGHT.replace("Oslo", "Lima"), ALWAYS),
    ('{"city":"Oslo","customer":"Ines","items":{"candle":12,"rope":2}}', TEXTS),
    (json.dumps(ORDER, indent=2), TEXTS),
    (
        '{"customer":"Ines","items":{"rope":2,"candle":12},"city":"Oslo"}',
        "the keys inside of items may stand in any order, too",
    ),
    ("I'm glad to hear that Ines is well.", UNREAD),
    (f"Here you are: {RIGHT}", LOOSE),
    (f"{RIGHT} Anything else?", LOOSE),
    (f"```json\n{RIGHT}\n```", LOOSE),
    (f"{RIGHT}\n{RIGHT}", LOOSE),
    (
        RIGHT.replace(',"city":"Oslo"', ""),
        "a missing key is not missed: the keys of `right` count, too",
    ),
    (
        RIGHT.replace('"city"', '"day":"Friday","city"'),
        "a key too many is not seen: the keys of the answer count, too",
    ),
    (RIGHT.replace("12", "11"), "what stands inside of items is not compared"),
    (
        RIGHT.replace("12", '"12"'),
        'values are compared as text: 12 and "12" are not the same',
    ),
    (
        RIGHT.replace("Oslo", " Oslo"),
        "spaces were taken out of the values; only those between values are free",
    ),
    (RIGHT.replace("Ines", "ines"), "capital letters count"),
    (RIGHT.replace('"', "'"), "that is Python, not JSON: json.loads, not eval"),
    (RIGHT[:-1], UNREAD),
    (f"{RIGHT[:-1]},}}", REPAIRED),
    (RIGHT.replace("Oslo", '\\"Oslo').replace(',"city', '\\",\\"city'), REPAIRED),
    (json.dumps(RIGHT), "a text that holds the order is not the order"),
    ("", UNREAD),
    ("12", "a number alone is JSON as well, and not the right value"),
    (f"[{RIGHT}]", "a list that holds the order is not the order"),
)


# (answer, right, likely): the same rules where `right` is another kind of value
VALUES = (
    (
        '{"a":{"b":{"c":{"d":1}}}}',
        '{"a":{"b":{"c":{"d":2}}}}',
        "values deep inside are not compared",
    ),
    ('{"note":"  two spaces"}', '{"note":" two spaces"}', "spaces in values count"),
    ('{"day":"Friday"}', '{"day":"Monday"}', "only keys that you know are compared"),
    ('{"price":1.5}', '{"price":1}', "1.5 and 1 are different numbers"),
    ('{"price":1.501}', '{"price":1.502}', "numbers are rounded; all digits count"),
    ('{"price":0.1}', '{"price":0.10000000001}', "all digits of a number count"),
    ('{" day":"Friday"}', '{"day":"Friday"}', "spaces in keys count, too"),
    ('{"a":1,"b":null}', '{"a":1}', "a key whose value is null is a key too many"),
    ('{"a":1}', '{"a":1,"b":null}', "a key whose value is null must not be missing"),
    ('{"name":"René"}', '{"name":"Ren"}', "letters with accents count"),
    ('{"name":"René"}', '{"name":"Rene"}', "letters with accents count"),
    (r'{"name":"Ren\u00e9"}', '{"name":"René"}', TEXTS),
    ('{"note":"a\tb"}', r'{"note":"a\tb"}', "a bare tab within a text is no JSON"),
    (r'{"name":"\"Ines\""}', r'{"name":"\"Ines\""}', REPAIRED),
    ('{"list":[1,2,3]}', '{"list":[3,1,2]}', "the order of a list counts"),
    ('{"list":[1,2,3]}', '{"list":[1,2,2,3]}', "each entry of a list counts"),
    ("[1,2]", "[1, 2]", "`right` can be any JSON value, a list too"),
    ("[1,2]", "[2,1]", "the order of a list counts"),
    ("[1,2]", "[1,3]", "each entry of a list counts"),
    ("{}", "{ }", "what is empty can be right as well"),
    ("[]", "{}", "an empty list is no empty object"),
    ("0", "0", "zero can be right as well"),
    ("null", "null", "null can be right as well"),
    ("", "null", UNREAD),
    ('"yes"', '"yes"', "a text alone is JSON as well"),
    ('"yes"', '"no"', "a text alone is compared, too"),
    (
        json.dumps({"rows": [*range(99)]}),
        json.dumps({"rows": [*range(99)]}, indent=8),
        "a long answer can be right as well",
    ),
)


@judged
def score(my_score: Callable) -> None:
    """0.1: my_score(answer, right) is True where both are the same JSON value."""
    other = '{"customer":"Amara","items":{"saddle":1},"city":"Leeds"}'
    cases = [(answer, RIGHT, likely) for answer, likely in ANSWERS]
    cases += [(RIGHT, other, ALWAYS), (other, other, NEVER), *VALUES]
    cases += cases[:3]  # again, after all others
    for answer, right, likely in cases:
        expected = orders.score(answer, right)
        shown = (
            text if len(text) < 300 else text[:300] + "…" for text in (answer, right)
        )
        what = "my_score(answer, right)\n  answer    {!r}\n  right     {!r}".format(
            *shown
        )
        try:
            got = my_score(answer, right)
        except ValueError as error:
            raise Wrong(
                f"{what}\n  expected  {expected}\n  got       {type(error).__name__}: "
                f"{error}\nLikely mistake: {UNREAD}"
            ) from None
        if not isinstance(got, bool):
            likely = "`return` is missing in one case" if got is None else KIND
        close(got, expected, what=what, mistakes={likely: got})


# 0.2 ----------------------------------------------------------------------------------

# ([(d_out, d_in), …], r): two single ones; a layer of SmolLM2; thin ones; equal ones;
# the first again, with other shapes of as many numbers; more numbers than float32 or
# int32 can count; vectors
MODELS = (
    ([(24, 40)], 3),
    ([(576, 576)], 8),
    (
        [
            *((576, 576), (192, 576), (192, 576), (576, 576)),
            *((1536, 576), (1536, 576), (576, 1536)),
        ],
        8,
    ),
    ([(5, 70), (70, 5), (12, 12), (12, 12)], 1),
    ([(64, 16)] * 6, 16),
    ([(24, 20)], 3),
    ([(24, 40)], 5),
    ([(32, 30)], 3),
    ([(8191, 8191), (28673, 8191), (8191, 28673)] * 80, 63),
    ([(1, 9), (9, 1), (1, 1)], 1),
    ([(7, 3), (3, 7)] * 7 + [(2, 2)], 2),
    ([(3, 5), (2, 9)], 4),  # a rank above a side
    ([(24, 40)], 3),
)


@judged
def lora_count(my_count: Callable) -> None:
    """0.2: my_count(shapes, r): the parameters in all A and B, and in all W0."""
    for shapes, r in MODELS:
        lent = list(shapes)
        with unchanged(shapes=lent):
            got = my_count(lent, r)
        shown = f"{shapes[:7]}, … ({len(shapes)} in all)" if shapes[7:] else shapes
        _each(
            got,
            _counted(shapes, r),
            ("trained", "frozen"),
            f"for shapes={shown}, r={r}",
            _wrong_counts(shapes, r),
            tolerance=1e-13,
            kind=int,
        )


def _counted(shapes, r: int) -> tuple[int, int]:
    """The parameters of real modules, on the device meta: it holds no numbers."""
    with torch.device("meta"):
        bases = [nn.Linear(d_in, d_out, bias=False) for d_out, d_in in shapes]
        model = nn.ModuleList(lora.LoRA(base, r) for base in bases)
    trained = sum(parameter.numel() for parameter in trainable(model).values())
    return trained, sum(base.weight.numel() for base in bases)


def _wrong_counts(shapes, r: int) -> dict[str, tuple[int, int]]:
    trained, frozen = _counted(shapes, r)
    return {
        "the two are swapped: first what trains": (frozen, trained),
        "r is missing: A has r rows, B has r columns": (trained // r, frozen),
        "r times d_out times d_in: A and B are added up, each with its own sides": (
            r * frozen,
            frozen,
        ),
        "A alone is counted": (r * sum(d_in for _, d_in in shapes), frozen),
        "B alone is counted": (r * sum(d_out for d_out, _ in shapes), frozen),
        "the first matrix alone is counted": _counted(shapes[:1], r),
        "the last matrix alone is counted": _counted(shapes[-1:], r),
        "equal shapes are counted once; each matrix has its own A and B": _counted(
            sorted(set(shapes)), r
        ),
        "frozen is W0 alone, without A and B": (trained, frozen + trained),
        "frozen holds the sides of W0, added; it has d_out times d_in parameters": (
            trained,
            trained // r,
        ),
        "frozen is all of W0: nothing of it is taken off": (trained, frozen - trained),
        "the matrices are counted one by one, not as one large one": (
            trained,
            math.prod(map(sum, zip(*shapes, strict=True))),
        ),
        "biases are counted: A and B have none": (
            trained + sum(d_out for d_out, _ in shapes),
            frozen,
        ),
        "biases are counted: W0 alone is meant": (
            trained,
            frozen + sum(d_out for d_out, _ in shapes),
        ),
        "r is r, even where a side is smaller": (
            sum(min(r, d_out, d_in) * (d_out + d_in) for d_out, d_in in shapes),
            frozen,
        ),
        "one r too many": (trained * r, frozen),
        "r stands at d_in alone; brackets are missing": (
            sum(r * d_in + d_out for d_out, d_in in shapes),
            frozen,
        ),
        "B has the sides of A; it is d_out times r": (
            2 * r * sum(d_in for _, d_in in shapes),
            frozen,
        ),
        "A has the sides of B; it is r times d_in": (
            2 * r * sum(d_out for d_out, _ in shapes),
            frozen,
        ),
        "r is an argument, not always 8": (trained // r * 8, frozen),
    }


# 0.3 ----------------------------------------------------------------------------------

# (r, d_in, d_out, size of the entries); the first again, with other numbers
UPDATES = (
    *((2, 5, 4, 1.0), (2, 5, 4, 1.0), (1, 7, 3, 1.0), (8, 24, 16, 0.02)),
    *((4, 4, 4, 1.0), (3, 20, 2, 30.0), (6, 2, 9, 1e-3), (1, 1, 1, 2.0)),
    (16, 40, 48, 0.1),
)


def control_of(
    A: Tensor, B: Tensor, order_A: Tensor, order_B: Tensor
) -> tuple[Tensor, Tensor]:
    """A and B with shuffled entries, and an update as large as before.

        A2 = P_A(A)        B2 = c P_B(B)        c = ‖B A‖ / ‖P_B(B) P_A(A)‖

    Args
        A, B              (r, d_in), (d_out, r)
        order_A, order_B  permutations of their entries
    Returns  (A2, B2), of the shapes and dtypes of A and B
    """
    A2, B2 = A.flatten()[order_A].view_as(A), B.flatten()[order_B].view_as(B)
    return A2, B2 * ((B @ A).norm() / (B2 @ A2).norm())


@judged
def fair_control(my_control: Callable) -> None:
    """0.3: my_control(A, B, order_A, order_B): shuffled, and as large as before."""
    for i, (r, d_in, d_out, size) in enumerate(UPDATES):
        draw = torch.Generator().manual_seed(i)
        A = size * torch.randn(r, d_in, generator=draw)
        B = size * torch.randn(d_out, r, generator=draw)
        orders = [torch.randperm(each.numel(), generator=draw) for each in (A, B)]
        _judge_control(my_control, A, B, *orders)
        _judge_control(my_control, A, B, orders[0], orders[1].flip(0))
        _judge_control(my_control, A, B, orders[0].flip(0), orders[1])


def _judge_control(my_control, A, B, order_A, order_B) -> None:
    where = f"for r={len(A)}, d_in={A.shape[1]}, d_out={len(B)}"
    with unchanged(A=A, B=B, order_A=order_A, order_B=order_B):
        got = my_control(A, B, order_A, order_B)
    A2, B2 = _same_shapes(got, A, B, where)
    expected = control_of(A, B, order_A, order_B)
    close(
        B2 @ A2,
        expected[1] @ expected[0],
        what=f"the update B2 A2, {where}",
        mistakes=_wrong_controls(A, B, order_A, order_B),
        tolerance=1e-4,
        kind=A.dtype,
    )


def _same_shapes(got, A: Tensor, B: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """The pair that came back; Wrong where it is none, or of other shapes."""
    if not isinstance(got, tuple | list) or len(got) != 2:
        close(got, (A, B), what=f"(A2, B2) {where}")
    for name, mine, theirs in zip(("A2", "B2"), got, (A, B), strict=True):
        if not isinstance(mine, Tensor) or mine.shape != theirs.shape:
            shape = tuple(mine.shape) if isinstance(mine, Tensor) else mine
            raise Wrong(
                f"{name} {where}\n  expected  a tensor of shape {tuple(theirs.shape)}\n"
                f"  got       {shape}\nLikely mistake: `return A2, B2`, in this order; "
                "a flattened matrix gets its shape back by view_as"
            )
    return tuple(got)


def _wrong_controls(A, B, order_A, order_B) -> dict[str, Tensor]:
    """{mistake: the update that it gives}."""
    A2, B2 = A.flatten()[order_A].view_as(A), B.flatten()[order_B].view_as(B)
    before, after = B @ A, B2 @ A2
    factor = before.norm() / after.norm()
    back_A = A.flatten()[order_A.argsort()].view_as(A)
    back_B = B.flatten()[order_B.argsort()].view_as(B)
    back = back_B @ back_A
    return {
        "nothing is shuffled: this is the trained update": before,
        "shuffled, but not made as large as before": after,
        "the factor is turned round: divide by the norm of the shuffled one": after
        / factor,
        "the factor is there twice: one of A2 and B2 takes it": after * factor**2,
        "the update has norm one, not that of the trained one": after / after.norm(),
        "A alone is shuffled": B @ A2 * (before.norm() / (B @ A2).norm()),
        "B alone is shuffled": B2 @ A * (before.norm() / (B2 @ A).norm()),
        "the orders are used backward: entry i comes from place order[i]": back
        * (before.norm() / back.norm()),
        "the largest entry is kept, not the norm": after
        * (before.abs().max() / after.abs().max()),
        "the sum of the entries' sizes is kept; the norm is the root of the squares": (
            after * (before.abs().sum() / after.abs().sum())
        ),
    }


# 0.4 ----------------------------------------------------------------------------------

RESULTS = (
    *((14, 20), (0, 20), (20, 20), (1, 7), (46, 100), (171, 200), (1, 1), (0, 1)),
    *((7, 14), (140, 200), (3, 9), (9, 12), (123_456, 1_000_000), (2, 100_000)),
)
CAREFUL = (1.96, 1.0, 2.576, 3.5, 0.25)  # z; the first is what z is by itself


@judged
def interval(my_interval: Callable) -> None:
    """0.4: my_interval(k, n) is Wilson's (low, high), both from zero to one."""
    for z in CAREFUL:
        for k, n in RESULTS:
            got = my_interval(k, n) if z == CAREFUL[0] else my_interval(k, n, z=z)
            _each(
                got,
                _wilson(k, n, z),
                ("low", "high"),
                f"for k={k}, n={n}, z={z}",
                _wrong_intervals(k, n, z),
                tolerance=1e-6,
            )


def _wilson(k: int, n: int, z: float) -> tuple[float, float]:
    """By the library, which is told in how many cases of a hundred it may miss."""
    return wilson(k, n, math.erf(z / math.sqrt(2)))


def _wrong_intervals(k: int, n: int, z: float) -> dict[str, tuple[float, float]]:
    low, high = _wilson(k, n, z)
    p = k / n

    def around(centre: float, half: float) -> tuple[float, float]:
        return centre - half, centre + half

    centre = (k + z * z / 2) / (n + z * z)
    spread = k * (n - k) / n + z * z / 4
    plain = z * (p * (1 - p) / n) ** 0.5
    fixed = {
        "z is an argument, not always 1.96": 1.96,
        "z is 1.645: that is for nine times in ten": 1.645,
        "z is 2.576: that is for ninety-nine times in a hundred": 2.576,
        "z is one: multiply by z": 1.0,
    }
    return {
        **{text: _wilson(k, n, other) for text, other in fixed.items() if other != z},
        "low and high are swapped": (high, low),
        "in percent; shares from zero to one are asked for": (100 * low, 100 * high),
        "in rows; shares are asked for": (n * low, n * high),
        "the plain interval p ± z sqrt(p (1 - p) / n), which has no width at 0 of n": (
            around(p, plain)
        ),
        "the plain interval, cut at zero and one": (
            max(0.0, p - plain),
            min(1.0, p + plain),
        ),
        "the square root is missing": around(centre, z * spread / (n + z * z)),
        "the margin lacks its z in front": around(centre, spread**0.5 / (n + z * z)),
        "z² / 4 is missing under the root": around(
            centre, z * (k * (n - k) / n) ** 0.5 / (n + z * z)
        ),
        "z² / 4 stands outside of the root": around(
            centre, z * ((k * (n - k) / n) ** 0.5 + z * z / 4) / (n + z * z)
        ),
        "all that is under the root is divided by four; z² alone is": around(
            centre, z * ((k * (n - k) / n + z * z) / 4) ** 0.5 / (n + z * z)
        ),
        "// drops what is behind the point, under the root": around(
            centre, z * (k * (n - k) // n + z * z / 4) ** 0.5 / (n + z * z)
        ),
        "under the root stands k / n; the wrong ones count, too: k (n - k) / n": around(
            centre, z * (k / n + z * z / 4) ** 0.5 / (n + z * z)
        ),
        "the plain margin around the new centre (Agresti and Coull's interval)": around(
            centre, z * (centre * (1 - centre) / (n + z * z)) ** 0.5
        ),
        "brackets are missing in the centre: (k + z² / 2) / (n + z²)": around(
            k + z * z / 2 / (n + z * z), z * spread**0.5 / (n + z * z)
        ),
        "brackets are missing in the margin: z / (n + z²)": around(
            centre, z / n + z * z * spread**0.5
        ),
        "k (n - k) is not divided by n": around(
            centre, z * (k * (n - k) + z * z / 4) ** 0.5 / (n + z * z)
        ),
        "the margin is divided by n, not by n + z²": around(
            centre, z * spread**0.5 / n
        ),
        "the centre is k / n; the z² are missing": around(
            p, z * spread**0.5 / (n + z * z)
        ),
        "the centre is divided by n, not by n + z²": around(
            (k + z * z / 2) / n, z * spread**0.5 / (n + z * z)
        ),
        "z² is added to k, not half of it": around(
            (k + z * z) / (n + z * z), z * spread**0.5 / (n + z * z)
        ),
        "the margin is z over n + z², times the root; not half of that": around(
            centre, z * spread**0.5 / (n + z * z) / 2
        ),
        "the wrong answers are counted: k are right": _wilson(n - k, n, z),
        **{
            f"rounded to {digits} digits; leave them all": (
                round(low, digits),
                round(high, digits),
            )
            for digits in (2, 3, 4)
        },
        "the centre and the margin, not the two ends": (centre, high - centre),
    }


# 0.5 ----------------------------------------------------------------------------------

# (prompts of token ids, token for padding)
PROMPTS = (
    ([[5, 6, 7, 8], [9], [4, 3]], 0),
    ([[5, 1, 7], [1, 8, 6, 1, 4]], 1),  # that token is a real one, too
    ([[7, 2], [3, 4]], 2),
    ([[6]], 3),
    ([[2, 2, 2], [2]], 2),
    ([[8, 7, 6, 5], [4], [3, 2]], 0),  # the shapes of the first, and other tokens
    ([[5, 6, 7, 8], [9], [4, 3]], 1),  # the first, and another pad
    ([[4], [3, 2], [8, 7, 6, 5]], 0),
    ([[], [5, 6], [7]], 3),  # an empty prompt
    ([[151_643, 70_001], [40_000, 300, 128_009]], 128_009),  # a large vocabulary
    ([[*range(40)], [*range(7)], [*range(30, 60)], [1], [2, 3]], 1),
    ([[5, 6], [3], [5, 6], [3]], 0),  # each twice
    ([[5, 6, 7, 8], [9], [4, 3]], 0),
)


@judged
def padding(my_padding: Callable) -> None:
    """0.5: my_padding(prompts, pad) is (ids, mask), padded on the left."""
    for prompts, pad in PROMPTS:
        lent = copy.deepcopy(prompts)
        with unchanged(prompts=lent):
            got = my_padding(lent, pad)
        _each(
            got,
            left_pad(prompts, cached=0, pad_id=pad),
            ("ids", "mask"),
            f"for prompts={prompts}, pad={pad}",
            _wrong_paddings(prompts, pad),
            kind=int,
        )


def _wrong_paddings(prompts, pad: int) -> dict[str, tuple[Tensor, Tensor]]:
    ids, mask = left_pad(prompts, cached=0, pad_id=pad)
    longest, shortest = max(map(len, prompts)), min(map(len, prompts))
    holes = [longest - len(p) for p in prompts]
    counted = [sum(token != pad for token in p) for p in prompts]
    once = [list(p) for p in dict.fromkeys(map(tuple, prompts))]
    right = [p + [pad] * hole for p, hole in zip(prompts, holes, strict=True)]
    ones = [[1] * len(p) + [0] * h for p, h in zip(prompts, holes, strict=True)]
    return {
        "padded on the right": (torch.tensor(right), torch.tensor(ones)),
        "the ids are padded on the right, the mask on the left": (
            torch.tensor(right),
            mask,
        ),
        "the mask has its zeros on the right": (ids, torch.tensor(ones)),
        "the mask compares with `pad`, but a real token may be the same: count": (
            ids,
            (ids != pad).long(),
        ),
        "the mask counts what is not `pad`; count all tokens of the prompt": (
            ids,
            torch.tensor([[0] * (longest - n) + [1] * n for n in counted]),
        ),
        "equal prompts are padded once; each has a row": left_pad(
            once, cached=0, pad_id=pad
        ),
        "filled up to a multiple of eight; the longest prompt fills a row": (
            nn.functional.pad(ids, (-longest % 8, 0), value=pad),
            nn.functional.pad(mask, (-longest % 8, 0)),
        ),
        "16 bits are too few for the ids: no dtype is needed": (
            ids.to(torch.int16),
            mask,
        ),
        "the mask hides nothing": (ids, torch.ones_like(mask)),
        "the mask is turned round: 1 on real tokens, 0 on padding": (ids, 1 - mask),
        "the prompts are turned round": (ids.flip(1), mask.flip(1)),
        "the order of the tokens is turned round": (
            left_pad([p[::-1] for p in prompts], cached=0, pad_id=pad)[0],
            mask,
        ),
        "padded with zero, not with `pad`": (ids.masked_fill(mask == 0, 0), mask),
        "one pad too many": (
            nn.functional.pad(ids, (1, 0), value=pad),
            nn.functional.pad(mask, (1, 0)),
        ),
        "cut to the shortest prompt": (
            torch.tensor([p[:shortest] for p in prompts]),
            torch.ones(len(prompts), shortest, dtype=torch.int64),
        ),
        "the two are swapped: first the ids": (mask, ids),
    }


def _each(
    got,
    expected: Sequence,
    names: Sequence[str],
    where: str,
    mistakes: dict[str, tuple],
    **demands,
) -> None:
    """close() for each of several values, by its name."""
    if not isinstance(got, tuple | list) or len(got) != len(names):
        close(got, expected, what=f"({', '.join(names)}) {where}")
    for i, name in enumerate(names):
        wrong = {text: values[i] for text, values in mistakes.items()}
        what = f"{name} {where}"
        close(got[i], expected[i], what=what, mistakes=wrong, inside=True, **demands)
