"""A tiny random model of every causal language model type that transformers has.

A type's configuration class is asked for its default, every field that stands for a
size is made small, and the model is drawn at random: nothing is downloaded. What the
table SIZES does not know, or a type wants otherwise, stands in EXCEPTIONS.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
LAYERS = 2
LARGEST = 3_000_000  # parameters that still count as tiny

# (size, the names that configurations have for it)
SIZES = (
    (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size"
        " unpadded_vocab_size ngram_vocab_size_base encoder_hash_byte_group_vocab",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers"
        " encoder_layers num_decoder_layers num_encoder_layers max_window_layers"
        " attn_layer_period num_blocks",
    ),
    (
        32,
        "hidden_size d_model n_embd dim_model_base word_embed_proj_dim embedding_size"
        " emb_dim input_embedding_size output_embedding_size backbone_hidden_size"
        " lru_width attention_hidden_size embedding_dim hidden_size_global",
    ),
    (
        48,
        "intermediate_size moe_intermediate_size decoder_ffn_dim encoder_ffn_dim"
        " ffn_dim dim_ff dff n_inner ffn_hidden_size shared_expert_intermediate_size"
        " shared_intermediate_size intermediate_size_mlp dense_intermediate_size"
        " shared_experts_intermediate_size expert_ffn_hidden_size d_inner"
        " feed_forward_size moe_shared_expert_intermediate_size",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads"
        " encoder_attention_heads num_decoder_attention_heads attention_heads"
        " num_encoder_attention_heads swa_num_attention_heads num_experts"
        " n_routed_experts num_local_experts moe_num_experts linear_num_value_heads"
        " mamba_d_state state_size linear_num_heads mamba_num_heads ssm_state_size"
        " index_n_heads",
    ),
    (
        2,
        "num_key_value_heads swa_num_key_value_heads num_kv_heads num_query_groups"
        " num_experts_per_tok num_experts_per_token moe_topk moe_k topk_group n_group"
        " linear_num_key_heads num_attention_groups",
    ),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts"
        " first_k_dense_replace num_dense_layers attn_layer_offset expert_layer_offset",
    ),
    (
        8,
        "head_dim kv_channels d_head dim_head attention_head_dim swa_head_dim"
        " qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim"
        " linear_value_head_dim linear_head_dim attention_head_size index_head_dim"
        " rotary_dim hidden_size_per_layer_input laurel_rank adapter_rank",
    ),
    (
        16,
        "kv_lora_rank q_lora_rank qk_head_dim o_lora_rank time_step_rank mamba_dt_rank"
        " mamba_head_dim",
    ),
    (
        256,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length"
        " max_target_positions context_length",
    ),
    (
        64,
        "sliding_window attention_window_size sliding_window_size local_attention"
        " attention_chunk_size index_topk",
    ),
)
SMALL = {name: size for size, names in SIZES for name in names.split()}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Lists with one word a layer.
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")
# Sizes that some defaults leave open, as None.
OPEN = ("head_dim", "n_inner", "num_key_value_heads")
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=4)
ROTARY = dict(rope_type="default", rope_theta=10000.0)
SHARED_ATTENTION = dict(attention_hidden_size=64, attention_head_dim=16)
# {type, or type of a part: its fields where sizes must fit each other}
EXCEPTIONS: Mapping[str, Mapping] = {
    "bailing_hybrid": dict(num_expert_group=2),
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(rope_parameters={"full_attention": ROTARY}),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "deepseek_v4": dict(
        compress_rates={
            "compressed_sparse_attention": 2,
            "heavily_compressed_attention": 4,
        }
    ),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "falcon_h1": MAMBA | dict(mamba_d_ssm=64),
    "gemma3n_text": dict(
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * LAYERS,
        intermediate_size=[48] * LAYERS,
    ),
    "gemma4_text": dict(num_kv_shared_layers=0),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": MAMBA
    | dict(layer_types=["linear_attention", "full_attention"]),
    "kimi_linear": dict(num_expert_group=1, topk_group=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": dict(zero_expert_num=2, n_routed_experts=4),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=2),
    "nemotron_h": dict(
        n_groups=2,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
    ),
    "qwen4_exp_text": dict(
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=64,
        indexer_compress_ratio=4,
    ),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "roc_bert": dict(
        pronunciation_embed_dim=8,
        pronunciation_vocab_size=32,
        shape_embed_dim=8,
        shape_vocab_size=32,
    ),
    "reformer": dict(
        attn_layers=["local", "lsh"],
        axial_pos_embds=False,
        num_buckets=4,
    ),
    "xlstm": dict(hidden_size=128, embedding_dim=128),  # 64 numbers in all heads' keys
    "xmod": dict(default_language="en_XX"),
    "zamba": SHARED_ATTENTION
    | dict(
        mamba_dt_rank=4,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
    ),
    "zamba2": SHARED_ATTENTION
    | dict(n_mamba_heads=4, mamba_headdim=16, num_query_groups=4),
    "zaya": dict(num_experts_per_tok=1, router_hidden_size=16),
}


def types() -> list[str]:
    """Every type that AutoModelForCausalLM knows, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config(kind: str) -> PretrainedConfig:
    """The configuration of a type with every size made small."""
    return _small(CONFIG_MAPPING[kind])


def build(kind: str, seed: int = 0) -> nn.Module:
    """A random model of this type in float32, its weights large enough to matter.

    Raises  ValueError   with its default fields the type is no tiny model
            whatever     its own code raises
    """
    torch.manual_seed(seed)
    small = config(kind)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(small)
    size = sum(parameter.numel() for parameter in outline.parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters, even with every known size made small")
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _small(cls: type[PretrainedConfig]) -> PretrainedConfig:
    """An instance of a configuration class, and of the classes of its parts, small."""
    default = cls()
    fields = default.to_dict()
    chosen = {
        name: size
        for name, size in {**SMALL, **TOKENS}.items()
        if isinstance(fields.get(name), int) or (name in OPEN and name in fields)
    }
    for name, value in fields.items():
        if "drop" in name and isinstance(value, float):
            chosen[name] = 0.0
        if name in LAYER_LISTS and isinstance(value, list):
            chosen[name] = _one_of_each(value)
        if name == "is_decoder":
            chosen[name] = True
    if "kv_lora_rank" in fields:  # every head has keys of its own, of a common origin
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    for part in cls.sub_configs:
        if isinstance(inner := getattr(default, part, None), PretrainedConfig):
            chosen[part] = _small(type(inner))
    return cls(**chosen | EXCEPTIONS.get(cls.model_type, {}))


def _one_of_each(kinds: list[str]) -> list[str]:
    """LAYERS kinds of layers, each of those of the default once, the last repeated."""
    different = list(dict.fromkeys(kinds))[:LAYERS]
    return different + different[-1:] * (LAYERS - len(different))
