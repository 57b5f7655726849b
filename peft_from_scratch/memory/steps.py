"""What a step reads and what trains in it, as the formulas of activations need it."""

from dataclasses import dataclass, field, replace

FORMULAS = ("full", "lora", "qlora", "pissa", "dora", "houlsby", "prompt", "prefix")
NAMES = {  # of projections: their place in Llama's layer, and in GPT-2's
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "c_attn": "qkv",
    "o_proj": "o",
    "attn.c_proj": "o",
    "gate_proj": "in",
    "up_proj": "in",
    "c_fc": "in",
    "down_proj": "out",
    "mlp.c_proj": "out",
}
ORDER = ("qkv", "o", "in", "out")


@dataclass(frozen=True)
class Step:
    """What one training step reads, and how it computes.

    itemsize   bytes of an activation's value, s
    autocast   float32 weights and residual stream, products in bfloat16 (s = 2)
    device     "cuda" or "cpu": dropout keeps more on a CPU
    """

    batch: int
    length: int
    itemsize: int
    attention: str = "sdpa"
    checkpointing: bool = False
    autocast: bool = False
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def mask(self) -> int:
        """Bytes of a value's place in a mask of dropout."""
        return self.itemsize if self.device == "cpu" else 1


@dataclass(frozen=True)
class Trains:
    """What trains, by its place in a layer.

    method   one of FORMULAS
    adapted  {projection of the layer: (d_out, d_in)}, of those with an adapter
    r, m, n  rank, units of a bottleneck, trained positions
    """

    method: str
    adapted: dict[str, tuple[int, int]] = field(default_factory=dict)
    r: int = 0
    m: int = 0
    n: int = 0

    @property
    def weights(self) -> bool:
        return self.method == "full"

    def at(self, place: str, itemsize: int) -> bool:
        """Whether the input of the projections there is kept for a gradient of W."""
        if self.method == "houlsby":
            return False  # a bottleneck reads what the projection returns
        if self.method == "dora" and itemsize < 4:
            return False  # it keeps a float32 copy: _of_method
        return self.weights or any(NAMES[name] == place for name in self.adapted)

    @property
    def begins(self) -> int:
        """Where the path of gradients begins: -1 the embedding, else an index of ORDER.

        After the first adapter of the first layer.
        """
        if self.method in ("full", "prompt"):
            return -1
        if self.method == "prefix":
            return 0
        return min(ORDER.index(NAMES[name]) for name in self.adapted)


def lengthened(step: Step, trains: Trains) -> Step:
    """The step with a soft prompt before every row."""
    n = trains.n if trains.method == "prompt" else 0
    return replace(step, length=step.length + n)
