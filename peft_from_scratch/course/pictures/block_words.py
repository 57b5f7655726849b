"""What the block picture says of each method: name, letters, place, equation.

Sources  LoRA arXiv:2106.09685, DoRA 2402.09353, PiSSA 2404.02948, QLoRA 2305.14314,
         adapters 1902.00751, prefix 2101.00190, prompt 2104.08691, IA3 2205.05638,
         BitFit 2106.10199
"""

from typing import NamedTuple


class Method(NamedTuple):
    """What is said of a method: its name, its letters, its place, and three lines."""

    label: str
    letters: str
    place: str
    lines: tuple[str, ...]


LOW_RANK = r"$A$ ($r$, $d_{in}$) and $B$ ($d_{out}$, $r$) stand beside every $W$"
METHODS = {
    "full": Method(
        "Full fine-tuning",
        "W",
        "every weight of the model",
        (
            r"$W \leftarrow W + \Delta W$, the embedding, the norms and the head too",
            "Nothing is added and nothing is frozen.",
        ),
    ),
    "lora": Method(
        "LoRA",
        "A B",
        "two thin matrices beside each W",
        (
            r"$h = W_0\,x + \frac{\alpha}{r}\,B\,A\,x$",
            f"{LOW_RANK}. $A$ starts random, $B$ at zero.",
            "Only $A$ and $B$ train; $W_0$ is frozen.",
        ),
    ),
    "dora": Method(
        "DoRA",
        "m",
        "LoRA, and a length for each row of W",
        (
            r"$h = m \odot (W_0 + \frac{\alpha}{r} B A)\,x \;/\;"
            r" \|W_0 + \frac{\alpha}{r} B A\|$, row by row",
            f"{LOW_RANK}; $m$ ($d_{{out}}$) sets the length of each row.",
            "$A$, $B$ and $m$ train; $W_0$ is frozen.",
        ),
    ),
    "pissa": Method(
        "PiSSA",
        "A B",
        "LoRA that starts from W's largest part",
        (
            r"$W = W_{res} + B\,A$, and so $h = W_{res}\,x + B\,A\,x$",
            f"{LOW_RANK}, made of its $r$ largest singular values.",
            "$A$ and $B$ train; what is left of $W$ is frozen.",
        ),
    ),
    "qlora": Method(
        "QLoRA",
        "4 bit",
        "LoRA beside a W of four bits",
        (
            r"$h = \mathrm{NF4}(W_0)\,x + \frac{\alpha}{r}\,B\,A\,x$",
            f"{LOW_RANK}, as in LoRA.",
            "$W_0$ is frozen, and kept in four bits a value: the strip of four cells.",
        ),
    ),
    "houlsby": Method(
        "Bottleneck adapters",
        "down up",
        "a small network after each sublayer",
        (
            r"$h \leftarrow h + \mathrm{up}\; f(\mathrm{down}\; h)$, before the sum"
            " with the stream",
            "down ($m$, hidden) and up (hidden, $m$), $m$ small, twice a layer",
            "Only they train.",
        ),
    ),
    "prefix": Method(
        "Prefix tuning",
        "K V",
        "extra keys and values in attention",
        (
            r"$\mathrm{attention}(q,\; [K;\, k],\; [V;\, v])$ in every layer",
            "$K$ and $V$ ($n$, heads, head size): $n$ positions that no token fills",
            "Only $K$ and $V$ train.",
        ),
    ),
    "prompt": Method(
        "Prompt tuning",
        "P",
        "extra embeddings before the first token",
        (
            r"$x = [P;\, \mathrm{embed}(tokens)]$, at the input only",
            "$P$ ($n$, hidden): $n$ embeddings that belong to no word",
            "Only $P$ trains.",
        ),
    ),
    "ia3": Method(
        "IA3",
        "$l$",
        "factors on keys, values and the MLP's inside",
        (
            r"$k \leftarrow l_k \odot k$,  $v \leftarrow l_v \odot v$,"
            r"  $f \leftarrow l_f \odot f$ inside the MLP",
            "Each $l$ is a vector, and starts at one.",
            "Only they train.",
        ),
    ),
    "bitfit": Method(
        "BitFit",
        "b",
        "the biases, in models that have some",
        (
            r"$h = W_0\,x + b$",
            "Only the biases $b$ train. Llama's layers have none; GPT-2's have.",
        ),
    ),
}
