"""tiny: a language model of a million parameters, small enough to see whole.

A Llama with four layers, trained from zero by tools/pretrain.py on text that
tools/corpus.py generates. A fine-tuning run on it takes seconds, so that lessons and
tests can repeat one over many seeds. It knows the small world of tasks/world.py and
nothing else: what is measured on it is measured on a toy, and has to say so.

    data/tiny/                       config.json, model.safetensors, tokenizer.json, …
    data/tiny/checkpoints/step-…/    the same, on the way there, in bfloat16
"""

from pathlib import Path

from transformers import LlamaConfig

from ..common.provenance import ROOT

FOLDER = ROOT / "data" / "tiny"
PUBLISHED_AS = "peft-from-scratch/tiny"  # what an adapter's file names as its base
VOCABULARY, CONTEXT = 1024, 512  # tokens


def folder(*, every_byte: bool = False) -> Path:
    """The folder of the model, which ships with the repository.

    Raises  FileNotFoundError  this is an installation without the repository's data
    """
    if not (FOLDER / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"tiny is not in {FOLDER}: it ships with the repository, in data/. Clone "
            "that, or make it: python -m tools.pretrain"
        )
    return FOLDER


def checkpoints() -> list[Path]:
    """The folders of the model on its way, the least trained first."""
    return sorted((FOLDER / "checkpoints").glob("step-*"))


def config(**special_tokens: int) -> LlamaConfig:
    """The shape of the model: 984,192 parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.08,  # about 1 / √128; the usual 0.02 is for wider models
        **special_tokens,
    )
