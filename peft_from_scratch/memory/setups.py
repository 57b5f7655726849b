"""What a step is asked to be: which recipe of dtypes, which batch, on how many devices.

Bytes for each trained parameter, by recipe. Adapters are float32 beside a base in half
precision, in every recipe: 4 + 4 + 8 = 16 bytes a parameter, without a master copy.

    recipe     weight  gradient  master  m and v   sum
    mixed           2         2       4        8    16
    float32         4         4       0        8    16
    autocast        4         4       0        8    16   bfloat16 copies for products
    bf16-pure       2         2       0        4     8
"""

from dataclasses import dataclass, field

from ..common import check
from ..methods import METHODS

PHASES = ("train", "evaluate", "generate", "dpo", "group")
LEARNING = ("train", "dpo", "group")  # phases that end in an update
ATTENTIONS = ("sdpa", "eager")
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Recipe:
    """Bytes of a value, for what the base itself trains; `compute`: an activation."""

    weights: int
    gradients: int
    master: int
    moments: int
    compute: int
    base: str  # dtype of the base's weights


RECIPES = {
    "mixed": Recipe(2, 2, 4, 8, 2, "bfloat16"),
    "float32": Recipe(4, 4, 0, 8, 4, "float32"),
    "bf16-pure": Recipe(2, 2, 0, 4, 2, "bfloat16"),
    "autocast": Recipe(4, 4, 0, 8, 2, "float32"),
}
ADAPTER = Recipe(4, 4, 0, 8, 0, "float32")
GROUP = 8  # answers to a prompt


@dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    method, options   of the table of methods; r, m, n, targets of its inject
    dtype             one of RECIPES
    batch, length     rows of a micro-batch, tokens of each
    labels            tokens of a row that have a label, or are sampled; None: all but
                      the first, and for sampling a prompt as long as the row
    attention         "sdpa": no (t, t) matrix; "eager": probabilities are kept
    chunk             label tokens whose logits are there at a time; None: all
    zero, ranks       ZeRO's stage, over how many devices
    device            "cuda" or "cpu": what dropout keeps differs
    phase             "train", "generate" (keys and values), "evaluate" (one forward);
                      "dpo", where the batch is pairs of rows; "group", where it is
                      prompts
    group             answers that are sampled for each prompt, with phase "group"
    """

    method: str = "lora"
    dtype: str = "mixed"
    batch: int = 1
    length: int = 512
    attention: str = "sdpa"
    checkpointing: bool = False
    labels: int | None = None
    chunk: int | None = None
    zero: int = 0
    ranks: int = 1
    device: str = "cuda"
    phase: str = "train"
    group: int | None = None
    options: dict = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that the model reads at once."""
        each = {"dpo": 2, "group": self.group or GROUP}.get(self.phase, 1)
        return self.batch * each

    @property
    def label_tokens(self) -> int:
        """Tokens of all rows whose logits are computed."""
        return self.rows * (self.labels or self.length - 1)

    @property
    def prompt(self) -> int:
        """Tokens of a row that are read before the first is sampled."""
        return self.length - (self.labels or 0)

    def __post_init__(self):
        check.one_of("method", self.method, [m.name for m in METHODS])
        check.one_of("dtype", self.dtype, RECIPES)
        check.one_of("attention", self.attention, ATTENTIONS)
        check.one_of("device", self.device, DEVICES)
        check.one_of("phase", self.phase, PHASES)
        check.whole("batch", self.batch, 1, 2**20, of="rows")
        check.whole("length", self.length, 2, 2**24, of="tokens")
        check.whole("zero", self.zero, 0, 3, of="ZeRO's stage")
        check.whole("ranks", self.ranks, 1, 2**20, of="devices")
        if self.labels is not None:
            most = self.length - 1
            check.whole("labels", self.labels, 1, most, of="tokens of a row")
        if self.group is not None:
            if self.phase != "group":
                raise ValueError(f"group={self.group} is for --phase group")
            check.whole("group", self.group, 1, 2**16, of="answers to a prompt")
        if self.chunk is not None:
            check.whole("chunk", self.chunk, 1, of="tokens")
        check.flag("checkpointing", self.checkpointing)
