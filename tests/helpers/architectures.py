"""Small random models of five architectures, and a tokenizer that needs no download."""

import torch
from device import DEVICE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCAB = 320
SHARED = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GATED = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    **SHARED,
)

CONFIGS = {
    "llama": lambda: LlamaConfig(**GATED, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=256, **SHARED
    ),
    "qwen": lambda: Qwen3Config(**GATED, tie_word_embeddings=True),
    "opt": lambda: OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
        **SHARED,
    ),
    "gemma": lambda: Gemma2Config(**GATED, query_pre_attn_scalar=8, sliding_window=64),
}


def build(architecture, *, seed=0, dtype=torch.float32):
    """A random two-layer model without dropout, its weights large enough to matter."""
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    model = Auto.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(DEVICE).eval()


def byte_tokenizer():
    """One token a byte (ids 64 and up), with a chat template; nothing is downloaded."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"] + [f"<r{i}>" for i in range(60)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "<bos>{{ m['role'] }}:{{ m['content'] }}<eos>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
    )
    return tokenizer
