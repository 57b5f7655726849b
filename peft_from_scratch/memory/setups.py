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

PHASES = ("train", "generate", "evaluate")
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


@dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    method, options   of the table of methods; r, m, n, targets of its inject
    dtype             one of RECIPES
    batch, length     rows of a micro-batch, tokens of each; all of them have labels
    attention         "sdpa": no (t, t) matrix; "eager": probabilities are kept
    chunk             label tokens whose logits are there at a time; None: all
    zero, ranks       ZeRO's stage, over how many devices
    device            "cuda" or "cpu": what dropout keeps differs
    phase             "train", "generate" (keys and values), "evaluate" (one forward)
    """

    method: str = "lora"
    dtype: str = "mixed"
    batch: int = 1
    length: int = 512
    attention: str = "sdpa"
    checkpointing: bool = False
    chunk: int | None = None
    zero: int = 0
    ranks: int = 1
    device: str = "cuda"
    phase: str = "train"
    options: dict = field(default_factory=dict)

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
        if self.chunk is not None:
            check.whole("chunk", self.chunk, 1, of="tokens")
        check.flag("checkpointing", self.checkpointing)
