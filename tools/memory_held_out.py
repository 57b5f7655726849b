"""Steps that no formula of the memory bill was written on, drawn by a random generator.

The formulas were written beside tiny, SmolLM2 and two random models. This list came
after them, and was committed before any of its steps was taken: other architectures,
depths and widths, other lengths, batches, dtypes and ranks. Nobody chose a cell, so
nobody could leave one out.

    python -m tools.memory_page --measure    takes these steps too
"""

import random

from transformers import (
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    StableLmConfig,
)

from peft_from_scratch.memory.setups import RECIPES, Setup
from peft_from_scratch.methods import METHODS

SEED, EACH = 18, 5  # cells of each model
USUAL = ("full", "lora", "qlora")  # half of the cells
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
GATED = (
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    GemmaConfig,
    GraniteConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    StableLmConfig,
)
LENGTHS = (24, 37, 93, 160, 201, 333)


class Draw(random.Random):
    """Choices that depend on `random()` alone, the same in every version of Python."""

    def one(self, values):
        return values[int(self.random() * len(values))]


def models() -> dict[str, PretrainedConfig]:
    """{name: configuration} of random sizes."""
    draw, every = Draw(SEED), {}
    for kind in GATED:
        every[kind.model_type] = kind(**_gated(draw, kind))
    for tie in (True, False):
        sizes = _gated(draw, LlamaConfig) | {"tie_word_embeddings": tie}
        every["llama, tied" if tie else "llama, untied"] = LlamaConfig(**sizes)
    del every["llama"]
    every["gpt2, dropout"] = GPT2Config(**_gpt2(draw), activation_function="gelu_new")
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    every["gpt2, gelu"] = GPT2Config(**_gpt2(draw), **still, activation_function="gelu")
    every["gpt_neox"] = GPTNeoXConfig(**_plain(draw), intermediate_size=200)
    every["opt"] = _opt(draw)
    every["falcon"] = FalconConfig(**_plain(draw), new_decoder_architecture=False)
    return every


def cells() -> list[tuple[str, Setup]]:
    """(name of the model, Setup) of every step."""
    draw = Draw(SEED + 1)
    return [(name, _setup(draw)) for name in models() for _ in range(EACH)]


def _setup(draw: Draw) -> Setup:
    method = draw.one(USUAL if draw.random() < 0.5 else [m.name for m in METHODS])
    options = {
        "r": {"r": draw.one((2, 5, 16, 24))},
        "m": {"m": draw.one((3, 16, 40))},
        "n": {"n": draw.one((3, 11, 20))},
    }
    uses = {"houlsby": "m", "prefix": "n", "prompt": "n", "full": "", "bitfit": ""}
    asked = options.get("" if method == "ia3" else uses.get(method, "r"), {})
    return Setup(
        method=method,
        dtype=draw.one(list(RECIPES)),
        batch=draw.one((1, 2, 3, 5)),
        length=draw.one(LENGTHS),
        attention=draw.one(("sdpa", "sdpa", "eager")),
        checkpointing=draw.one((False, False, True)),
        device="cpu",
        options=asked,
    )


def _gated(draw: Draw, kind: type) -> dict:
    heads, size = draw.one((2, 4, 6, 8)), draw.one((16, 24, 32))
    sizes = dict(
        hidden_size=heads * size,
        intermediate_size=heads * size * draw.one((2, 3)) + 8,
        num_hidden_layers=draw.one((1, 2, 3, 5, 7)),
        num_attention_heads=heads,
        num_key_value_heads=draw.one((1, 2, heads)),
        vocab_size=draw.one((500, 1300, 3000, 7000)),
        **TOKENS,
    )
    if kind is MistralConfig:
        sizes |= {"sliding_window": None}
    if kind is GemmaConfig:
        sizes |= {"head_dim": size}
    return sizes


def _plain(draw: Draw) -> dict:
    heads, size = draw.one((2, 4)), draw.one((16, 32))
    return dict(
        hidden_size=heads * size,
        num_hidden_layers=draw.one((2, 3, 6)),
        num_attention_heads=heads,
        vocab_size=draw.one((500, 1300, 3000)),
        **TOKENS,
    )


def _gpt2(draw: Draw) -> dict:
    sizes = _plain(draw)
    return dict(
        n_embd=sizes["hidden_size"],
        n_layer=sizes["num_hidden_layers"],
        n_head=sizes["num_attention_heads"],
        vocab_size=sizes["vocab_size"],
        **TOKENS,
    )


def _opt(draw: Draw) -> OPTConfig:
    sizes = _plain(draw)
    return OPTConfig(
        **sizes,
        ffn_dim=3 * sizes["hidden_size"],
        word_embed_proj_dim=sizes["hidden_size"],
        dropout=0.0,
    )
