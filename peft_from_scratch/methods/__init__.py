r"""The syllabus: one file a method, and METHODS, the one table of all methods.

Everything that lists methods reads this table: the names of the package (`pfs.lora`),
the choices of the command line, the comparison, the experiments, the picture of a
transformer layer, the colors of all figures, and the README's table. Reading it imports
neither torch nor a method: `Method.module` imports a method's file when it is asked
for.

A variant of a method is no row here. rsLoRA is LoRA with another scale: a row of the
comparison (comparison/candidates.py) or of an experiment (experiments/finetune.py) that
names its method. loftq.py is a variant, too: another initialization of QLoRA.

Sources  LoRA arXiv:2106.09685, DoRA 2402.09353, PiSSA 2404.02948, QLoRA 2305.14314,
         adapters 1902.00751, prefix 2101.00190, prompt 2104.08691, IA3 2205.05638,
         BitFit 2106.10199
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

# Grids of peak learning rates, in steps of half a decade. A search whose best rate is
# at an end of its grid tries more.
WHOLE_MODEL = (1e-5, 3e-5, 1e-4, 3e-4)
ADDED_MATRICES = (1e-3, 3e-3, 1e-2, 3e-2)
ADDED_VECTORS = (3e-3, 1e-2, 3e-2, 1e-1)
LOW_RANK = {"r": 8, "alpha": 16, "targets": "all-linear"}


@dataclass(frozen=True)
class Compared:
    """A candidate of the comparison, where it differs from the method's defaults.

    Args
        label                  the name of its row; None: the method's label
        family                 True: only in a comparison that asks for relatives, too
        options                arguments of inject
        settings_from          another candidate, whose searched settings serve where
                               this one has none
        steps_factor           optimizer steps, as a multiple of the plan's
        init_from_instruction  inject(start=) gets the tokens of the task's instruction
    """

    label: str | None = None
    family: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    settings_from: str | None = None
    steps_factor: int = 1
    init_from_instruction: bool = False


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args
        name           of its file methods/<name>.py, of `pfs.<name>`, of `--method`
        label          its name in pictures and tables
        color, marker  its look in every figure: the name of one of plotting's COLORS,
                       and one of its MARKERS; no two methods share both
        letters        what stands for it in the picture's legend
        place          where in a transformer layer it works, in a few words
        lines          its equation, the shapes, what trains; in matplotlib's mathtext
        parts          what the picture draws for it, some of plotting.block.PARTS
        trains         what trains, for the README
        mergeable      "yes" or "no", with a remark if need be, for the README
        peft_file      whether PEFT reads its saved file, for the README
        rates          peak learning rates that a search tries first
        lr             peak learning rate that is used where nobody has searched; within
                       half a decade of the optimum on SmolLM2 where that was searched
        own_weights    whether it trains the model's own weights, which must then be in
                       float32: training/precision.py
        hyper          the arguments of inject that the configuration of an experiment's
                       run states, with their defaults there: stored runs hold them
        compared       its row of the comparison; None: it has none
    """

    name: str
    label: str
    color: str
    marker: str
    letters: str
    place: str
    lines: tuple[str, ...]
    parts: tuple[str, ...]
    trains: str
    mergeable: str
    peft_file: str
    rates: tuple[float, ...] = ADDED_MATRICES
    lr: float = 1e-3
    own_weights: bool = False
    hyper: Mapping[str, object] = field(default_factory=dict)
    compared: Compared | None = None

    @property
    def module(self) -> ModuleType:
        """The method's file, imported when it is first asked for."""
        return import_module(f"{__name__}.{self.name}")


_A_AND_B = r"$A$ ($r$, $d_{in}$) and $B$ ($d_{out}$, $r$) in parallel with every $W$"

METHODS = (
    Method(
        name="full",
        label="Full fine-tuning",
        color="red",
        marker="D",
        letters="W",
        place="every weight of the model",
        lines=(
            r"$W \leftarrow W + \Delta W$, the embedding, the norms and the head too",
            "Nothing is added and nothing is frozen.",
        ),
        parts=("weights",),
        trains="everything",
        mergeable="is merged",
        peft_file="no",
        rates=WHOLE_MODEL,
        lr=1e-4,
        own_weights=True,
        compared=Compared(),
    ),
    Method(
        name="lora",
        label="LoRA",
        color="blue",
        marker="o",
        letters="A B",
        place="two thin matrices in parallel with each W",
        lines=(
            r"$h = W_0\,x + \frac{\alpha}{r}\,B\,A\,x$",
            f"{_A_AND_B}. $A$ is initialized at random, $B$ to zero.",
            "Only $A$ and $B$ train; $W_0$ is frozen.",
        ),
        parts=("low-rank",),
        trains="A and B in parallel with each projection; rsLoRA and LoRA+ are options",
        mergeable="yes",
        peft_file="yes",
        hyper=LOW_RANK,
        compared=Compared(label="LoRA, all linear"),
    ),
    Method(
        name="dora",
        label="DoRA",
        color="purple",
        marker="v",
        letters="m",
        place="LoRA, and a length for each row of W",
        lines=(
            r"$h = m \odot (W_0 + \frac{\alpha}{r} B A)\,x \;/\;"
            r" \|W_0 + \frac{\alpha}{r} B A\|$, row by row",
            f"{_A_AND_B}; $m$ ($d_{{out}}$) sets the length of each row.",
            "$A$, $B$ and $m$ train; $W_0$ is frozen.",
        ),
        parts=("low-rank", "lengths"),
        trains="A and B, and the length of each weight's row",
        mergeable="yes",
        peft_file="yes",
        hyper=LOW_RANK,
        compared=Compared(family=True, settings_from="lora"),
    ),
    Method(
        name="pissa",
        label="PiSSA",
        color="brown",
        marker="P",
        letters="A B",
        place="LoRA, initialized to W's best rank-r part",
        lines=(
            r"$W = W_{res} + B\,A$, and so $h = W_{res}\,x + B\,A\,x$",
            f"{_A_AND_B}, made of its $r$ largest singular values.",
            "$A$ and $B$ train; what is left of $W$ is frozen.",
        ),
        parts=("low-rank",),
        trains="A and B, from the weight's largest singular directions",
        mergeable="yes",
        peft_file="as a LoRA",
        hyper=LOW_RANK,
        compared=Compared(family=True, settings_from="lora"),
    ),
    Method(
        name="qlora",
        label="QLoRA",
        color="orange",
        marker="h",
        letters="4 bit",
        place="LoRA in parallel with a W of four bits",
        lines=(
            r"$h = \mathrm{NF4}(W_0)\,x + \frac{\alpha}{r}\,B\,A\,x$",
            f"{_A_AND_B}, as in LoRA.",
            "$W_0$ is frozen, and kept in four bits a value: the strip of four cells.",
        ),
        parts=("low-rank", "four bits"),
        trains="A and B in parallel with each projection, which is in four bits",
        mergeable="yes, leaving four bits",
        peft_file="as a LoRA",
        hyper=LOW_RANK,
        compared=Compared(settings_from="lora"),
    ),
    Method(
        name="houlsby",
        label="Bottleneck adapters",
        color="amber",
        marker="s",
        letters="down up",
        place="a small network after each sublayer",
        lines=(
            r"$y \leftarrow y + \mathrm{up}\; \sigma(\mathrm{down}\; y)$, before the"
            " sum with the stream",
            r"down ($m$, $d_{\mathrm{model}}$) and up ($d_{\mathrm{model}}$, $m$), $m$"
            " small, twice a layer",
            "Only they train.",
        ),
        parts=("bottlenecks",),
        trains="a bottleneck after attention and one after the MLP",
        mergeable="no",
        peft_file="no",
        hyper={"m": 8, "placement": "houlsby"},
        compared=Compared(options={"m": 32}),
    ),
    Method(
        name="prefix",
        label="Prefix tuning",
        color="tan",
        marker="X",
        letters="K V",
        place="extra keys and values in attention",
        lines=(
            r"$\mathrm{attention}(q,\; [P_K;\, K],\; [P_V;\, V])$ in every layer",
            "$P_K$, $P_V$ ($n$, heads, head size): $n$ positions that no token fills",
            "Only $P_K$ and $P_V$ train; $K$ and $V$ are the tokens' own.",
        ),
        parts=("keys and values",),
        trains="keys and values before those of every layer",
        mergeable="no",
        peft_file="yes",
        lr=1e-2,
        hyper={"n": 16, "start": "random"},
        compared=Compared(init_from_instruction=True),
    ),
    Method(
        name="prompt",
        label="Prompt tuning",
        color="tan",
        marker="^",
        letters="P",
        place="extra embeddings before the first token",
        lines=(
            r"$x = [P;\, \mathrm{embed}(tokens)]$, at the input only",
            r"$P$ ($n$, $d_{\mathrm{model}}$): $n$ embeddings that belong to no word",
            "Only $P$ trains.",
        ),
        parts=("embeddings",),
        trains="embeddings before the tokens' own",
        mergeable="no",
        peft_file="yes",
        rates=ADDED_VECTORS,
        lr=3e-2,
        hyper={"n": 16, "start": "vocabulary"},
        compared=Compared(steps_factor=2, init_from_instruction=True),  # learns slowly
    ),
    Method(
        name="ia3",
        label="IA3",
        color="amber",
        marker="p",
        letters="$l$",
        place="factors on keys, values and the MLP's middle",
        lines=(
            r"$k \leftarrow l_k \odot k$,  $v \leftarrow l_v \odot v$,"
            r"  $f \leftarrow l_f \odot f$ inside the MLP",
            "Each $l$ is a vector, initialized to one.",
            "Only they train.",
        ),
        parts=("factors",),
        trains="a factor for each key, value and inner activation",
        mergeable="yes",
        peft_file="yes",
        rates=ADDED_VECTORS,
        lr=1e-2,
        compared=Compared(label="(IA)³", family=True),
    ),
    Method(
        name="bitfit",
        label="BitFit",
        color="red",
        marker="<",
        letters="b",
        place="the biases, in models that have some",
        lines=(
            r"$h = W_0\,x + b$",
            "Only the biases $b$ train. Llama's layers have none; GPT-2's have.",
        ),
        parts=("biases",),
        trains="the biases",
        mergeable="is merged",
        peft_file="no",
        own_weights=True,
    ),
)


def named(name: str) -> Method:
    """The row of this name.

    Raises  ValueError  no such method; the message holds the names
    """
    for method in METHODS:
        if method.name == name:
            return method
    known = ", ".join(method.name for method in METHODS)
    raise ValueError(f"method={name!r}: allowed are {known}")
