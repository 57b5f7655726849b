"""What the sample lesson stands on: a claim and a ledger of its own, and a check."""

from pathlib import Path

import torch

from peft_from_scratch.course.checks import close, judged, unchanged
from peft_from_scratch.ledger import verdicts
from peft_from_scratch.ledger.claim import Claim, Rule

CLAIM = Claim(
    id="S1",
    notebook="90",
    statement="Twice three is six",
    rule=Rule(
        "Twice three",
        "in all",
        ("does not hold here", "holds", "does not hold here"),
        (5.0, 7.0),
    ),
    configs=lambda scale: [],
    measured=lambda runs: None,
    number="the product",
)


def stand_in() -> None:
    """Have the ledger know the sample's claim, and no other."""
    verdicts.CLAIMS = {CLAIM.id: CLAIM}
    verdicts.FILE = Path(__file__).with_name("ledger.json")


@judged
def twice(my_twice) -> None:
    """90.1: my_twice(x) is x + x, for x of any shape."""
    for shape in ((3,), (2, 2), (1, 4, 2)):
        x = torch.randn(shape)
        lent = x.clone()
        with unchanged(x=lent):
            got = my_twice(lent)
        what = f"my_twice(x), for x of shape {shape}"
        close(got, x + x, what=what, mistakes={"x itself": x, "the square": x * x})


@judged
def power(MyPower) -> None:
    """90.2: MyPower(k)(x) is x to the power of k."""
    for k in (2, 3):
        x = torch.randn(4)
        wrong = {"x k, not x to the power of k": x * k, "another k": x ** (5 - k)}
        what = f"MyPower({k})(x), for x of shape (4,)"
        close(MyPower(k)(x.clone()), x**k, what=what, mistakes=wrong)
