"""What the moments of a step are put together from: the bytes behind timeline.Pieces.

Each number here has its formula in the docstring of budget.py, setups.py or
activations.py; ZeRO's divisions are made here.
"""

from transformers import PretrainedConfig

from .activations import a_layer, kept
from .formulas import STEP_BYTES
from .meta_model import kept_for_backward
from .setups import ADAPTER, Recipe, Setup
from .shapes import Shape, shape_of
from .steps import FORMULAS, Step, Trains, lengthened
from .temporaries import passing
from .timeline import Pieces
from .weighing import Weighed, weigh

LOGITS = 12  # bytes a label token and a word, at the worst moment of the loss
BUCKET = 500_000_000  # values: DeepSpeed's reduce_bucket_size
BY_FORMULA, MEASURED = "formula", "measured on the meta device"


def lasting_bytes(setup: Setup, recipe: Recipe, w: Weighed) -> dict[str, int]:
    """Bytes that are there at every moment of a step."""
    states = recipe.moments * w.own + ADAPTER.moments * w.added
    states += STEP_BYTES * (w.own_tensors + w.added_tensors)
    training = setup.phase == "train"
    return {
        "weights": shared(w.frozen + recipe.weights * w.own, setup, 3),
        "adapter": shared(ADAPTER.weights * w.added, setup, 3),
        "master": shared(recipe.master * w.own, setup, 1) if training else 0,
        "optimizer": shared(states, setup, 1) if training else 0,
    }


def shared(size: int, setup: Setup, stage: int) -> int:
    """Bytes on one rank, of what ZeRO divides from this stage on."""
    return -(-size // setup.ranks) if setup.zero >= stage else size


def pieces_of(
    config: PretrainedConfig, setup: Setup, recipe: Recipe, w: Weighed, lasting: dict
) -> tuple[Pieces, str]:
    """(what the moments are put together from, how activations were had)"""
    step, trains, shape = step_of(setup, recipe), _trains(setup, w), shape_of(config)
    labels = setup.batch * (setup.length - 1)
    scores = min(labels, setup.chunk or labels) * config.vocab_size
    table = recipe.gradients * w.table if setup.method == "full" else 0
    head = table if w.head_trains else 0
    embedding = head if w.tied else 0
    rows, summed = in_chunks(config, setup, recipe, labels, head)
    ids = 16 * setup.batch * setup.length  # and labels, int64
    if has_formula(shape, setup, w):
        way, longer = BY_FORMULA, lengthened(step, trains)
        saved, most = kept(shape, step, trains), passing(shape, longer, trains)
        layer = a_layer(shape, longer, trains)
    else:
        way, layer = MEASURED, 0
        saved, worst = _measured(config, setup, recipe)
        in_the_loss = worst < 1.02 * (saved + LOGITS * labels * config.vocab_size)
        most = 0 if in_the_loss else max(0, worst - saved - ids - embedding)
    if setup.dtype == "autocast":
        saved += 2 * (w.projections + w.table)  # the weights' copies, in bfloat16
    own = recipe.gradients * w.own + ADAPTER.gradients * w.added
    sharded = setup.zero == 3 and setup.ranks > 1
    return Pieces(
        lasting=lasting,
        gradients=shared(own, setup, 2),
        kept=saved + ids + rows,
        layer=layer,
        again=layer if setup.checkpointing else 0,
        passing=most,
        logits=LOGITS * scores,
        summed=summed,
        dlogits=recipe.compute * scores,
        head=head,
        table=shared(table, setup, 2),
        embedding=embedding,
        buffer=recipe.compute * w.projection if setup.method == "qlora" else 0,
        gathered=2 * w.layer if sharded else 0,  # this one and the next
        bucket=_bucket(setup, recipe, w),
        update=2 * (recipe.moments // 2 if w.own else 4) * w.largest,  # AdamW's two
        loading=w.tensor,
    ), way


def in_chunks(
    config: PretrainedConfig, setup: Setup, recipe: Recipe, labels: int, head: int
) -> tuple[int, int]:
    """What a loss in chunks keeps for backward, and what it has besides until its end.

    dH, of each label token, is kept from the first chunk on, with the token's place, in
    the stead of the head's input, which only a head that trains keeps. Until the last
    chunk there are the rows H that it cuts, and the sum of the head's gradient.
    """
    if setup.chunk is None:
        return 0, 0
    rows = recipe.compute * config.get_text_config().hidden_size * labels
    places = 2 * 8 * labels  # int64: row and column
    inputs = rows if setup.method == "full" else 0
    return rows + places - inputs, rows + head


def step_of(setup: Setup, recipe: Recipe) -> Step:
    return Step(
        setup.batch,
        setup.length,
        recipe.compute,
        setup.attention,
        setup.checkpointing,
        setup.dtype == "autocast",
        setup.device,
    )


def _trains(setup: Setup, w: Weighed) -> Trains:
    sizes = (w.options.get(name, 0) for name in ("r", "m", "n"))
    return Trains(setup.method, w.adapted or {}, *sizes)


def has_formula(shape: Shape | None, setup: Setup, w: Weighed) -> bool:
    """Whether activations.py has this model and method, in every layer alike."""
    alike = w.adapted or setup.method in ("full", "prompt", "prefix")
    return bool(shape and alike and setup.method in FORMULAS)


def _measured(
    config: PretrainedConfig, setup: Setup, recipe: Recipe
) -> tuple[int, int]:
    """(bytes kept, the most at one moment) of a step on the meta device."""
    unable = setup.method == "prefix"
    if unable or setup.dtype == "autocast":
        what = f"--method {setup.method}" if unable else "--dtype autocast"
        raise ValueError(
            f"{what} has a formula for layers like Llama's and GPT-2's, and cannot be "
            f"measured without numbers; {config.model_type} has other layers"
        )
    where = recipe.base, setup.attention
    _, model = weigh(config, setup.method, setup.options, *where)
    if setup.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return kept_for_backward(model, setup.batch, setup.length)


def _bucket(setup: Setup, recipe: Recipe, w: Weighed) -> int:
    """Gradients on their way: a copy of all (DistributedDataParallel), or a bucket."""
    if setup.ranks == 1:
        return 0
    values = w.own + w.added
    item = recipe.gradients if w.own else ADAPTER.gradients
    return item * (values if setup.zero == 0 else min(values, BUCKET))
