"""What a phase does besides learning: forward passes that keep nothing, and sampling.

    evaluate   one forward pass of all rows
    generate   a pass over the prompts, then one token after another: keys and values
    dpo        the reference reads both answers of each pair; then a step learns from
               them. 2 rows a pair, and one set of weights: the reference is the model
               with its adapters off (Rafailov et al., arXiv:2305.18290)
    group      G answers to each prompt are sampled, the reference reads them, and a
               step learns from all of them (Shao et al., arXiv:2402.03300)

    keys and values   2 · layers · kv heads · head size · s bytes, for each position
    logits            8 + s bytes a token and a word, where nothing is kept: the model's
                      (only where they are in 16 bits, s = 2), and log-softmax's
                      float32 input and output

Sampling is over when the step begins, and its keys and values are gone. So G answers
cost what G rows of a batch cost: learning keeps the activations of all of them.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from .pieces import step_of
from .setups import Recipe, Setup
from .shapes import Shape, shape_of
from .steps import Step
from .temporaries import forward_alone
from .weighing import Weighed, prefix_values

Moments = dict[str, dict[str, int]]


def before_learning(
    config: PretrainedConfig, setup: Setup, recipe: Recipe, w: Weighed, lasting: dict
) -> Moments:
    """The moments of a phase before a step learns; none for "train".

    Args
        lasting  {part: bytes} of what is there all the time
    Raises   ValueError  a model whose layers have no formula
    """
    if setup.phase == "train":
        return {}
    shape, step = _shape(config, setup), step_of(setup, recipe)
    args = config, setup, recipe, w, lasting
    sampled = _sampled(*args, shape, step) if setup.phase in SAMPLING else {}
    reads = {} if setup.phase == "generate" else _read(*args, shape, step)
    return sampled | reads


SAMPLING = ("generate", "group")


def _read(config, setup, recipe, w: Weighed, lasting, shape: Shape, step: Step):
    """All rows are read once, for the log-probabilities of their labels."""
    who = "forward" if setup.phase == "evaluate" else "reference"
    logits = setup.label_tokens * config.vocab_size * _scored(recipe)
    passing = forward_alone(shape, step)
    return {
        who: lasting
        | {"activations": passing, "transients": _dequantized(setup, recipe, w)},
        f"{who} logits": lasting | {"logits": logits},
    }


def _sampled(config, setup, recipe, w: Weighed, lasting, shape: Shape, step: Step):
    """The prompts are read, with all their answers; then the last token is sampled."""
    a_place = setup.rows * recipe.compute * prefix_values(config, 1)
    longer = w.options.get("n", 0)
    read = a_place * (setup.prompt + longer)
    cache = a_place * (setup.length + longer)
    buffer = _dequantized(setup, recipe, w)
    prompts = forward_alone(shape, replace(step, length=setup.prompt))
    growing = cache // (2 * shape.layers)  # one layer's keys, copied to a longer tensor
    logits = setup.rows * config.vocab_size * _scored(recipe)
    return {
        "prompts": lasting
        | {"keys_and_values": read, "activations": prompts, "transients": buffer},
        "sampling": lasting
        | {"keys_and_values": cache, "transients": max(buffer, growing)},
        "sampling logits": lasting | {"keys_and_values": cache, "logits": logits},
    }


def _scored(recipe: Recipe) -> int:
    """Bytes a logit takes where nothing is kept: as the model makes it, twice float32.

    In float32 the model's logits are log-softmax's input.
    """
    return 8 + (recipe.compute if recipe.compute < 4 else 0)


def _dequantized(setup: Setup, recipe: Recipe, w: Weighed) -> int:
    """A weight in four bits, made whole for one product."""
    return recipe.compute * w.projection if setup.method == "qlora" else 0


def _shape(config: PretrainedConfig, setup: Setup) -> Shape:
    shape = shape_of(config)
    if shape is None:
        raise ValueError(
            f"--phase {setup.phase} has formulas for layers like Llama's and GPT-2's; "
            f"{config.model_type} has none here. --phase train is measured"
        )
    return shape
