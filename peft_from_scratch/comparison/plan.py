"""The plan of a comparison: what is compared, on what. Every result holds it."""

from dataclasses import dataclass, replace

from ..common import check
from ..models.load import AUTO, DTYPES
from ..tasks.task import Task, load_task
from ..tasks.templates import TEMPLATES
from ..training.config import TrainConfig
from .candidates import CANDIDATES, USUAL, Candidate

OF_DATA = ("prompt", "completion", "config", "scorer", "instruction")  # of load_task


@dataclass(frozen=True)
class Plan:
    """What is compared, and on what.

    Args
        task      a generated task, or rows of your own: a .jsonl file, a data set
        methods   keys of candidates
        rows      test rows answered by each candidate; all there are, where they are
                  fewer
        steps     optimizer steps of `batch` rows each; a candidate's steps_factor
                  multiplies them
        paged     share of AdamW's states that may be in memory at a time; None: all
        template  "chat" or "raw" for every candidate; None: as the tuning found, or the
                  one that the base has
        scorer, instruction, prompt, completion, config
                  of rows of your own: arguments of tasks.task.load_task
        max_tokens   longest row; None: TrainConfig's, or all positions that there are
        device    None picks CUDA, then MPS, then the CPU
        dtype     of the base's weights and of all products; "auto": see models.speed.
                  What trains is in float32 in each case
        out       folder of all that is written
    Raises   ValueError   the field, its value and what is allowed
    """

    base: str = "smollm2"
    task: str = "orders"
    methods: tuple[str, ...] = USUAL
    seeds: tuple[int, ...] = (0,)
    rows: int = 100
    steps: int = 50
    batch: int = 8
    paged: float | None = None
    template: str | None = None
    scorer: str | None = None
    instruction: str | None = None
    prompt: str = "prompt"
    completion: str = "completion"
    config: str | None = None
    max_tokens: int | None = None
    device: str | None = None
    dtype: str = "auto"
    out: str = "out"

    def __post_init__(self):
        known = [candidate.key for candidate in CANDIDATES]
        for method in self.methods:
            if method not in known:
                raise ValueError(f"{method=} is none of {', '.join(known)}")
        for name in ("rows", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.max_tokens is not None:
            TrainConfig(max_tokens=self.max_tokens)  # refuses none that long
        if self.paged is not None:
            TrainConfig(paged=self.paged)  # refuses a share that is none
        if not self.methods or not self.seeds:
            raise ValueError("name at least one method and one seed")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds={self.seeds}: different ones are needed, from 0 on"
            )
        check.one_of("dtype", self.dtype, (AUTO, *DTYPES))
        if self.template not in (None, *TEMPLATES):
            raise ValueError(
                f"template={self.template!r}: allowed are {', '.join(TEMPLATES)}, or "
                "None for the searched one"
            )

    def load_task(self) -> Task:
        """The task that the plan names, with what it says about its rows.

        Its test is the final one: the test itself is known from claims and lessons.
        """
        task = load_task(self.task, **{name: getattr(self, name) for name in OF_DATA})
        return replace(task, test=task.final)

    def steps_of(self, candidate: Candidate) -> int:
        """Optimizer steps that the candidate takes; 0 where nothing trains."""
        return self.steps * candidate.steps_factor if candidate.trains else 0

    def chosen(self) -> list[Candidate]:
        """The candidates that the plan names, in the table's order."""
        return [candidate for candidate in CANDIDATES if candidate.key in self.methods]
