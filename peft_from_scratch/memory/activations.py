"""What a decoder layer keeps from forward to backward, tensor by tensor, as a formula.

A product y = x Wᵀ needs x for the gradient of W, and W for the gradient of x. So a
frozen W makes x superfluous, and an adapter beside it needs x again. An elementwise
function keeps its input or its output, whether anything in it trains or not. Hence two
conditions in the tables below. "on the path" means that something before it trains, so
that a gradient passes through; "trains" that its own weight or adapter does.

Bytes for each token of a batch. s: bytes of a value, 2 in bfloat16 and 4 in float32;
d: hidden size; f: units in the MLP; q: heads · head size; k: kv heads · head size;
t: tokens of the sequence.

    Llama's layer                         bytes a token           kept if
    float32 copy of x          norm       4 d      twice a layer  on the path
    1 / rms(x)                 norm       4        twice a layer  on the path
    x / rms(x)                 norm       s d      twice a layer  the norm trains
    input of q, k, v           norm 1     s d                     q, k or v trains
    rotated q; rotated k; v    attention  s (q + 2 k)             on the path
    output, row sums           attention  s q + 4 heads           on the path
    input of gate, up          norm 2     s d                     gate or up trains
    gate, silu(gate), up       MLP        3 s f                   on the path
    silu(gate) · up            MLP        s f                     down trains

    GPT-2's layer
    x; mean; 1 / deviation     LayerNorm  s (d + 2)  twice a layer  on the path
    input of q, k, v           norm 1     s d                       c_attn trains
    q, k, v in one tensor      attention  3 s d                     on the path
    output, row sums           attention  s d + 4 heads             on the path
    masks of two dropouts                 2 d; 2 s d on a CPU       with dropout
    input of c_fc              norm 2     s d                       c_fc trains
    what GELU keeps            MLP        4 s f (gelu_new), else s f  on the path
    output of GELU             MLP        s f                       c_proj trains

That is attention in one kernel (sdpa: flash attention). Written out (eager), it keeps
heads · t probabilities for each token: in Llama's layer in float32, and once more in
bfloat16; and its keys and values are copied for every head. With dropout there are two
more of them, the mask and what it leaves. On a CPU no kernel has dropout: GPT-2's
attention is then written out with sdpa, too, and in float32.

What a method adds: LoRA keeps z = x Aᵀ, r values a projection. DoRA keeps its inputs in
float32, and what W0 and B A return. A bottleneck keeps its input in float32 and its m
units twice. A prefix makes keys and values n positions longer, repeats them for every
head, and needs a mask. A prompt makes each row n tokens longer, and is put in and taken
out by copies of the hidden states.

Checkpointing keeps the input of each layer, s d, and makes the table's tensors again,
for one layer at a time.

The law of this file: the sum equals, to the byte, what torch hands to its saved-tensor
hooks (tests/memory/test_activations.py).
"""

from ..methods.lora_fast import FEW
from .shapes import Shape
from .steps import ORDER, Step, Trains, lengthened


def kept(shape: Shape, step: Step, trains: Trains) -> int:
    """Bytes that autograd keeps when a forward pass has reached the logits."""
    step = lengthened(step, trains)
    around = _around(shape, step, trains)
    if step.checkpointing:
        width = 4 if step.autocast else step.itemsize
        return around + shape.layers * width * shape.d * step.tokens
    first = a_layer(shape, step, trains, first=True)
    return around + first + (shape.layers - 1) * a_layer(shape, step, trains)


def a_layer(shape: Shape, step: Step, trains: Trains, *, first: bool = False) -> int:
    """Bytes that one layer keeps; `first`: the one that reads the embedding."""
    return sum(tensors(shape, step, trains, first=first).values())


def tensors(
    shape: Shape, step: Step, trains: Trains, *, first: bool = False
) -> dict[str, int]:
    """{tensor: bytes} that one layer keeps, as in the table above."""
    begins = trains.begins if first else -1
    kinds = {"llama": _llama, "gpt2": _gpt2}
    rows = kinds[shape.kind](shape, step, trains, begins)
    if trains.method == "prefix" and first and step.attention == "eager":
        rows["k and v"] /= 2  # q has no gradient there, so that k is not needed
    rows |= _of_method(shape, step, trains)
    return {name: round(size * step.tokens) for name, size in rows.items() if size}


def _llama(shape: Shape, step: Step, trains: Trains, begins: int) -> dict[str, float]:
    """Bytes a token of Llama's layer; `begins` is Trains.begins, or -1: all of it."""
    s, d, f = step.itemsize, shape.d, shape.f
    wide = 4 if step.autocast else s  # of the residual stream
    rows = {}
    for number, place, readers in ((1, "qkv", 3), (2, "in", 2)):
        # The first norm is on the path of the layer's input, the second of o's output.
        if begins < (0 if number == 1 else ORDER.index("in")):
            rows[f"x of norm {number}"] = 4 * d + 4
        if trains.weights:
            rows[f"x / rms of norm {number}"] = wide * d
        if trains.at(place, s):
            cast = step.autocast and trains.weights  # each product casts for itself
            rows[f"input of {place}"] = readers * s * d if cast else wide * d
    if begins <= ORDER.index("qkv"):
        rows |= _attention(shape, step, trains)
    elif trains.at("o", s):
        rows["output of attention"] = s * shape.queries
    if begins <= ORDER.index("in"):
        rows |= {"gate": s * f, "silu(gate)": s * f, "up": s * f}
    if trains.at("out", s):
        rows["input of down"] = s * f
    return rows


def _attention(shape: Shape, step: Step, trains: Trains) -> dict[str, float]:
    """Bytes a token of Llama's attention, between its projections."""
    s, q, k = step.itemsize, shape.queries, shape.keys
    longer = trains.n if trains.method == "prefix" else 0
    more = (step.length + longer) / step.length  # positions that keys have
    if step.attention == "sdpa":
        return {
            "q": s * q,
            "k and v": 2 * s * (q if longer else k) * more,
            "output of attention": s * q,
            "row sums": 4 * shape.heads,
        }
    pairs = shape.heads * (step.length + longer)
    return {
        "q": s * q,
        "k and v": 2 * s * q * more,
        "probabilities, float32": 4 * pairs,
        "probabilities": s * pairs if s < 4 else 0,
        "output of attention": s * q if trains.at("o", s) else 0,
    }


def _gpt2(shape: Shape, step: Step, trains: Trains, begins: int) -> dict[str, float]:
    """Bytes a token of GPT-2's layer."""
    s, d, f, rows = step.itemsize, shape.d, shape.f, {}
    wide = 4 if step.autocast else s
    for number, place in ((1, "qkv"), (2, "in")):
        if begins < (0 if number == 1 else ORDER.index("in")):
            rows[f"x of norm {number}"] = wide * (d + 2)
        if trains.at(place, s):
            rows[f"input of {place}"] = s * d
    if begins <= ORDER.index("qkv"):
        rows |= _attention_gpt2(shape, step, trains)
    elif trains.at("o", s):
        rows["output of attention"] = s * d
    if begins <= ORDER.index("in"):
        written_out = step.autocast and shape.gelu > 1  # its power is in float32
        rows["GELU"] = (14 if written_out else shape.gelu * s) * f
    if trains.at("out", s):
        rows["input of out"] = s * f
    if shape.dropout:
        rows["masks of dropout"] = 2 * step.mask * d
    return rows


def _attention_gpt2(shape: Shape, step: Step, trains: Trains) -> dict[str, float]:
    """Bytes a token of GPT-2's attention: q, k and v are views of one tensor."""
    s, d = step.itemsize, shape.d
    longer = trains.n if trains.method == "prefix" else 0
    more = (step.length + longer) / step.length
    pairs = shape.heads * (step.length + longer)
    if step.attention == "sdpa" and step.device == "cpu" and shape.dropped:
        return {
            "q": 4 * d,
            "k and v": 8 * d * more,
            "probabilities": 12 * pairs,
            "output of attention": s * d if trains.at("o", s) else 0,
        }
    if step.attention == "sdpa":
        rows = {"q": s * d, "output of attention": s * d, "row sums": 4 * shape.heads}
        if longer:  # k and v are copies, and q's tensor still has the old ones in it
            return rows | {"k and v": 2 * s * d * (1 + more)}
        return rows | {"k and v": 2 * s * d}
    return {
        "q": s * d,
        "k and v": 2 * s * d * more,
        "probabilities": (s + (s + step.mask if shape.dropped else 0)) * pairs,
        "output of attention": s * d if trains.at("o", s) else 0,
    }


def _of_method(shape: Shape, step: Step, trains: Trains) -> dict[str, float]:
    """Bytes a token that the adapters of one layer keep."""
    s, narrow = step.itemsize, step.itemsize < 4 and step.tokens >= FEW
    if trains.method in ("lora", "qlora", "pissa"):
        return {"z = x Aᵀ": (s if narrow else 4) * trains.r * len(trains.adapted)}
    if trains.method == "prefix" and step.attention == "sdpa":
        return {"mask": s * (step.length + trains.n) / step.batch}
    if trains.method == "dora":
        sizes = trains.adapted.values()
        vectors = 12 * sum(d_out for d_out, _ in sizes)  # m, its gradient's, and scale
        return {
            "vectors": vectors / step.tokens,
            "z = x Aᵀ": 4 * trains.r * len(sizes),
            "x, W0 x and B z": sum(of_dora(*size, s) for size in sizes),
        }
    if trains.method == "houlsby":
        a_bottleneck = 4 * shape.d + 8 * trains.m
        return {"bottlenecks": len(trains.adapted) * a_bottleneck}
    return {}


def of_dora(d_out: int, d_in: int, s: int) -> int:
    """Bytes a token that DoRA keeps of a projection: its input in float32, W0 x, B z.

    In float32 the input is there already, as LoRA keeps it.
    """
    return (4 * d_in if s < 4 else 0) + s * d_out + 4 * d_out


def _around(shape: Shape, step: Step, trains: Trains) -> int:
    """Bytes kept outside of the layers: the last norm, rotary tables, a prompt's."""
    s, d, T, own = step.itemsize, shape.d, step.tokens, trains.weights
    wide = 4 if step.autocast else s
    ids = 8 * T if own else 0  # int64: the embedding's gradient needs them
    if trains.method == "prompt":
        indices = 8 * T + 8 * step.batch * (step.length - trains.n)
        ids = 2 * s * d * T + indices  # what torch.gather reads
    if shape.kind == "gpt2":
        positions = 8 * step.length if own else 0
        mask = step.mask * d if shape.dropout and trains.begins < 0 else 0
        return ids + positions + T * (wide * (d + 2) + (s * d if own else 0) + mask)
    norm = 4 * d + 4 + (wide * d + s * d if own else 0)
    return ids + T * norm + 2 * wide * shape.head_dim * step.length
