"""What other public estimators say of a training step, by their own formulas.

P: parameters of the model, N: GPUs (1 here), s, b: length and batch, h: hidden size, L:
layers, a: heads, V: words, f: units of the MLP over h.

    accelerate       4 · 4 P in float32, 2 · 4 P in bfloat16: the largest of its four
                     rows, which is the figure that it prints for training with Adam
    DeepSpeed, ZeRO-2   2 P + 18 P / N       without offloading
    DeepSpeed, ZeRO-3   4 · (parameters of the largest module) + 18 P / N
    EleutherAI       P (w + 4 + 12) + s b h L (16 w + 2 + (2 w + 1) a s / h)
                     with w bytes a value: 2, or 4 without mixed precision, where its
                     option for low precision says so; with checkpointing the term of
                     a s / h is left out;
                     P = 2 V h + s h + 8 h L + 2 h + 2 (1 + g) L h² + 3 L h² f
                     for an MLP of three projections, g: kv heads over heads

Sources: accelerate's `accelerate estimate-memory`, which is asked itself; DeepSpeed
0.19.8, estimate_zero2_model_states_mem_needs in runtime/zero/stage_1_and_2.py, and
estimate_zero3_model_states_mem_needs in stage3.py; EleutherAI's cookbook, commit
069ae2e, calc/calc_transformer_mem.py.
"""

from transformers import PretrainedConfig

from peft_from_scratch.memory.meta_model import ghost
from peft_from_scratch.memory.setups import Setup
from peft_from_scratch.memory.weighing import Weighed

LEAVES_OUT = {
    "accelerate": "the method, the batch, the length: activations and logits; in "
    "bfloat16 it adds nothing up, and prints the largest of four rows",
    "DeepSpeed, ZeRO-2": "the method (what is frozen gets gradients and states), "
    "activations and logits; it counts float32 gradients beside 16-bit ones",
    "DeepSpeed, ZeRO-3": "the same; one module is whole at a time",
    "EleutherAI": "the method, the logits and their gradient, attention in one kernel "
    "(it has tokens² terms), tied embeddings; gradients are float32",
}


def accelerate(config: PretrainedConfig, dtype: str) -> int:
    """Bytes for training with Adam, from accelerate's own functions."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    size, _ = calculate_maximum_sizes(ghost(config, "float32"))
    half = "float32" if dtype == "float32" else "bfloat16"
    return max(estimate_training_usage(size, half).values())


def zero_2(parameters: int, ranks: int = 1) -> int:
    """Bytes on one GPU, model states alone, nothing offloaded."""
    return 2 * parameters + 18 * parameters // ranks


def zero_3(parameters: int, largest: int, ranks: int = 1) -> int:
    """The same; `largest`: parameters of the largest module by itself."""
    return 4 * largest + 18 * parameters // ranks


def eleuther(config: PretrainedConfig, setup: Setup) -> int:
    """Bytes on one GPU, for a model of Llama's shape."""
    w = 4 if setup.dtype == "float32" else 2
    s, b, h = setup.length, setup.batch, config.hidden_size
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv = config.num_key_value_heads / heads
    attention = 2 * (1 + kv) * layers * h * h
    mlp = 3 * layers * h * config.intermediate_size
    around = 2 * config.vocab_size * h + s * h + 8 * h * layers + 2 * h
    pairs = 0 if setup.checkpointing else (2 * w + 1) * heads * s / h
    kept = s * b * h * layers * (16 * w + 2 + pairs)
    return int((around + attention + mlp) * (w + 4 + 12) + kept)


def all_of_them(
    config: PretrainedConfig, setup: Setup, w: Weighed, of_accelerate: int
) -> dict[str, int]:
    """{estimator: bytes} of one step; DeepSpeed's count what adapters add as well."""
    parameters = w.total + w.added
    return {
        "accelerate": of_accelerate,
        "DeepSpeed, ZeRO-2": zero_2(parameters),
        "DeepSpeed, ZeRO-3": zero_3(parameters, max(w.table, w.projection)),
        "EleutherAI": eleuther(config, setup),
    }
