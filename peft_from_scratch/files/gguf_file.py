"""A merged model and its tokenizer in one GGUF file, which llama.cpp runs.

A GGUF file holds metadata, the tokenizer among it, and then the tensors. For a model of
Llama's architecture two things change on the way: the names of the tensors, and the
order of the rows in the projections of queries and keys. Rotary position embeddings
turn pairs of rows of a head, by an angle that grows with the position. With a head of
d rows, transformers pairs rows i and i + d/2, and llama.cpp pairs neighbors:

    row 2i of the file = row i,    row 2i + 1 of the file = row i + d/2    0 <= i < d/2

Both compute the same attention: the dot product of a query and a key does not depend on
the order of their rows. All else is copied. What cannot be written so that llama.cpp
computes the same is refused by `plan`, before a file exists.

Sources  llama.cpp's convert_hf_to_gguf.py for what a file needs, and the constants of
         the library gguf for the names
"""

import errno
import os
from pathlib import Path

import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from torch import Tensor, nn

from ..common import atomic
from ..common.check import one_of
from ..core.adapter import adapters
from ..core.targets import QuantizedLinear
from . import gguf_tokens

DTYPES = {  # of matrices: (torch's, GGUF's, that of the file); vectors stay in float32
    "float32": (torch.float32, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (torch.float16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (torch.bfloat16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


def save(model: nn.Module, tokenizer, file: Path, *, dtype: str = "float32") -> None:
    """Write a model without adapters, and its tokenizer, to a GGUF file.

    Args
        model  a LlamaForCausalLM, in full precision; its generation config says which
               tokens end an answer, beside the tokenizer's own
        dtype  of the matrices: float32, float16 or bfloat16. Vectors stay in float32.
    Raises   ValueError  what the file cannot hold, by name; nothing is written
             OSError     the disk takes no more; no half of a file is left
    Memory   a copy of the query and key projections; in another dtype, of the model
    """
    write(plan(model, tokenizer, dtype=dtype), file)


def plan(model: nn.Module, tokenizer, *, dtype: str = "float32") -> GGUFWriter:
    """All that `save` would write; raises what `save` raises, and writes nothing."""
    one_of("dtype", dtype, DTYPES)
    _refuse_model(model)
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA])
    _add_sizes(writer, model.config, DTYPES[dtype][2])
    ends = gguf_tokens.ends(model, tokenizer)
    gguf_tokens.add(writer, tokenizer, rows=model.config.vocab_size, ends=ends)
    for name, tensor in _tensors(model).items():
        kind = dtype if tensor.dim() > 1 else "float32"
        writer.add_tensor(name, _bytes(name, tensor, kind), raw_dtype=DTYPES[kind][1])
    return writer


def write(planned: GGUFWriter, file: Path) -> None:
    """Write a plan to a file, once; the model's name in it is that of the file."""
    with atomic.new_file(file) as new:
        planned.add_name(new.stem)
        try:
            planned.write_header_to_file(new)
            planned.write_kv_data_to_file()
            planned.write_tensors_to_file()
        except OSError as error:
            if error.errno is None:  # numpy counts what was written, and not why
                full = errno.ENOSPC
                raise OSError(full, os.strerror(full)) from None
            raise
        finally:
            planned.close()


# ------------------------------------------------------------------------- the model


def _refuse_model(model: nn.Module) -> None:
    """ValueError unless the model is a plain Llama in full precision."""
    kind = getattr(model.config, "model_type", None)
    if kind != "llama":
        raise ValueError(
            f"a GGUF file is written for models of type 'llama' only, and this is "
            f"{kind!r}: save the merged model as a folder, and convert that with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    if adapters(model):
        raise ValueError("this model has adapters; call merge(model) first")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            "this model has 4-bit projections, and GGUF has no NF4 among its formats: "
            "call nf4.dequantize_model(model) first"
        )
    rope = model.config.rope_parameters
    settings = {
        "hidden_act": (model.config.hidden_act, "silu"),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
    }
    for name, (value, written) in settings.items():
        if value != written:
            raise ValueError(
                f"this model's configuration has {name}={value!r}, and only "
                f"{written!r} is written to a GGUF file: use llama.cpp's "
                "convert_hf_to_gguf.py on the saved folder"
            )


def _add_sizes(writer: GGUFWriter, config, file_type: LlamaFileType) -> None:
    writer.add_type("model")
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """{name in the file: tensor}; a head that is the embedding is not among them."""
    config = model.config
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name == "lm_head.weight" and tensor is model.get_input_embeddings().weight:
            continue  # both readers use the embedding where a file has no head
        there = names.get_name(name, try_suffixes=(".weight",))
        if there is None:
            raise ValueError(
                f"the tensor {name} has no place in a GGUF file of a Llama; those of "
                "transformers' LlamaForCausalLM without biases are written"
            )
        count = heads.get(name.split(".")[-2])
        tensors[there] = _neighbors(tensor, count) if count else tensor
    return tensors


def _neighbors(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head in llama.cpp's order: pairs that turn together adjoin.

    (heads * d, d_in) -> (heads * d, d_in)
    """
    halves = weight.unflatten(0, (heads, 2, -1))  # (heads, 2, d / 2, d_in)
    return halves.transpose(1, 2).reshape(weight.shape)


def _bytes(name: str, tensor: Tensor, dtype: str):
    """The tensor's values in this dtype, as an array of bytes: numpy has no bfloat16.

    Raises  ValueError  a quantized or offloaded tensor, or a value that does not fit
    """
    if tensor.is_meta or not tensor.is_floating_point():
        where = "offloaded (on meta)" if tensor.is_meta else f"in {tensor.dtype}"
        raise ValueError(f"the tensor {name} is {where}; a GGUF file takes it in full")
    values = tensor.detach().to("cpu", DTYPES[dtype][0]).contiguous()
    if not values.isfinite().all():
        raise ValueError(
            f"the tensor {name} would hold values that {dtype} cannot; choose another "
            "dtype, and look for NaN in the adapter"
        )
    return values.view(torch.uint8).numpy()
