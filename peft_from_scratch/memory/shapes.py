"""The sizes of a model that a bill needs, read from its configuration.

    hub id, folder or config.json  ->  configuration  ->  Shape, where a formula exists

Formulas are written for two shapes of decoder layer: Llama's (RMSNorm, rotary
positions, keys and values for fewer heads, a gated MLP) and GPT-2's (LayerNorm, one
projection for q, k and v, an MLP with GELU). All other models are measured instead, on
the meta device: meta_model.py.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
)

from ..common import check
from ..common.quiet import quiet_transformers
from ..models import smollm2
from ..models.load import NAMED

LLAMAS = ("llama", "mistral", "qwen2")  # model types whose layers are Llama's
WIDEST, DEEPEST = 2**20, 2**12  # units and layers, beyond which a file is not believed
# For a machine that has not fetched SmolLM2: nothing is fetched for a bill.
SMOLLM2 = dict(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49_152,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with layers of one kind.

    kind        "llama" or "gpt2"
    d, f        hidden size, and units inside the MLP
    heads       of the queries; kv_heads those of keys and values; each of head_dim
    vocabulary  rows of the embedding, and of the head
    dropout     share of residual activations that training drops: GPT-2's resid_pdrop
    dropped     the same of attention's probabilities: GPT-2's attn_pdrop
    gelu        tensors of f units that the activation keeps for backward (see
                activations.py)
    """

    kind: str
    layers: int
    d: int
    f: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dropout: float = 0.0
    dropped: float = 0.0
    gelu: int = 1

    @property
    def queries(self) -> int:
        """Units of the queries of a token."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Units of the keys of a token, and of the values: grouped heads share them."""
        return self.kv_heads * self.head_dim


def read_config(source: str | Path) -> PretrainedConfig:
    """The configuration of a model, without its weights and without a network.

    Args
        source  "tiny" or "smollm2"; a config.json or a folder that has one; or a hub
                id, whose configuration is in the hub client's cache
    Raises   ValueError  none there, no causal language model, or sizes that no model
                         has. Code that comes with a model is never run
    """
    if source == "smollm2" and not smollm2.WHEEL.place.exists():
        return LlamaConfig(**SMOLLM2)
    where, options = _place(source), dict(local_files_only=True)
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(
                where, trust_remote_code=False, **options
            )
        except Exception as error:  # whatever a broken or hostile file leads to
            raise ValueError(_unreadable(source, where, error)) from None
    config = config.get_text_config()
    _refuse(config, source)
    return config


def shape_of(config: PretrainedConfig) -> Shape | None:
    """The sizes that the formulas take; None where no formula is written."""
    if config.model_type in LLAMAS and getattr(config, "hidden_act", "") == "silu":
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True):
            return None  # a mask for the window: torch leaves its flash kernel
        heads = config.num_attention_heads
        return Shape(
            "llama",
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.vocab_size,
        )
    kept = {"gelu_new": 4, "gelu": 1, "gelu_pytorch_tanh": 1}
    if config.model_type == "gpt2" and config.activation_function in kept:
        return Shape(
            "gpt2",
            config.n_layer,
            config.n_embd,
            config.n_inner or 4 * config.n_embd,
            config.n_head,
            config.n_head,
            config.n_embd // config.n_head,
            config.vocab_size,
            config.resid_pdrop,
            config.attn_pdrop,
            kept[config.activation_function],
        )
    return None


def _place(source: str | Path) -> str:
    """What transformers reads the configuration from."""
    if source in NAMED:
        return str(NAMED[source].folder())
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--config {source}: the folder has no config.json")
    return str(path) if path.exists() else str(source)


def _unreadable(source, where: str, error: Exception) -> str:
    if Path(where).exists():
        first = str(error).strip().splitlines()[0] if str(error).strip() else error
        return f"--config {source}: transformers cannot read it: {first!s:.200}"
    return (
        f"--config {source}: no such file or folder, and not in the hub client's cache "
        f"(nothing is downloaded). Allowed: {', '.join(NAMED)}, a config.json, a "
        "folder that has one, or a hub id that was used here before"
    )


def _refuse(config: PretrainedConfig, source) -> None:
    """ValueError for what no bill can be made of."""
    where = f"--config {source}"
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{where}: transformers has no causal language model of the type "
            f"{config.model_type!r}"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{where}: its weights are quantized already (quantization_config). Name "
            "the configuration of the model before that; --method qlora quantizes it"
        )
    with check.about(where):
        for name, most in (
            ("hidden_size", WIDEST),
            ("num_hidden_layers", DEEPEST),
            ("num_attention_heads", WIDEST),
            ("vocab_size", 2**24),
            ("intermediate_size", WIDEST),
        ):
            value = getattr(config, name, None)
            if value is not None and not isinstance(value, list):
                check.whole(name, value, 1, most)
