"""Claims judged on runs that a test invents."""

from collections.abc import Callable

from peft_from_scratch.ledger import runs
from peft_from_scratch.ledger.verdicts import claim, judge


def judged(id: str, result_of: Callable[[dict], dict], scale: str = "tiny") -> object:
    """The judgement, with each run's result as `result_of(config)` gives it.

    Runs are written to the store until the claim asks for no more; so its searches, its
    queries and its rule are tested together. The test needs the fixture `store`.
    """
    while (judgement := judge(claim(id), scale)).missing:
        for config in judgement.missing:
            runs.write(config, result_of(config))
    return judgement
