"""Laws of the question that prompts and prefixes ask of a model at inject.

Each model below does something with tokens that most do not. Where an adapter cannot do
the same, it is refused by name, and where it can, it equals the plain model that has
read the tokens. No model is known by its name: a probe finds what differs.
"""

import pytest
import torch
from architectures import GATED, SHARED
from model_state import largest, logits, refused, tokens
from planting import law
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BambaConfig,
    BartConfig,
    BertConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    DogeConfig,
    DynamicCache,
    FalconH1Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    JetMoeConfig,
    ProphetNetConfig,
    RemBertConfig,
    RobertaConfig,
)

from laws.methods.virtual_tokens import (
    CLOSE,
    IDS,
    LENGTHS,
    N,
    in_front,
    padded,
    the_only,
)
from peft_from_scratch.core.adapter import adapters
from peft_from_scratch.methods import prefix, prompt

NARROW = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **SHARED)
BERT = dict(
    intermediate_size=48,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    is_decoder=True,
    **NARROW,
)
CROSSED = dict(decoder_attention_heads=4, decoder_ffn_dim=48, dropout=0.0, **SHARED)
TEXT = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=320)
LATENT = dict(
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    moe_intermediate_size=16,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    intermediate_size=48,
    num_key_value_heads=4,
    **NARROW,
)
CONFIGS = {
    "bamba": lambda: BambaConfig(
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        **GATED,
    ),
    "bart": lambda: BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, **CROSSED
    ),
    "bert": lambda: BertConfig(**BERT),
    "deepseek_v3": lambda: DeepseekV3Config(**LATENT),
    "diffllama": lambda: DiffLlamaConfig(**GATED),
    "doge": lambda: DogeConfig(**GATED),
    "encoder": lambda: BertConfig(**BERT | dict(is_decoder=False)),
    "falcon_h1": lambda: FalconH1Config(
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        **GATED,
    ),
    "gemma3n_text": lambda: Gemma3nTextConfig(
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=None,
        laurel_rank=8,
        altup_num_inputs=2,
        **TEXT,
        **GATED | dict(intermediate_size=[48, 48]),
    ),
    "gemma4_text": lambda: Gemma4TextConfig(
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        **TEXT,
        **{key: value for key, value in GATED.items() if key != "head_dim"},
    ),
    "jetmoe": lambda: JetMoeConfig(
        kv_channels=8,
        intermediate_size=48,
        num_local_experts=4,
        num_key_value_heads=2,
        **NARROW,
    ),
    "prophetnet": lambda: ProphetNetConfig(
        hidden_size=32,
        num_decoder_layers=2,
        num_decoder_attention_heads=4,
        decoder_ffn_dim=48,
        is_decoder=True,
        **SHARED,
    ),
    "rembert": lambda: RemBertConfig(input_embedding_size=32, **BERT),
    "roberta": lambda: RobertaConfig(**BERT),
}
REFUSED = [  # (method, architecture, words of the refusal)
    (prefix, "bart", "BartDecoder", "what the model computes differs by"),
    (prefix, "diffllama", "DiffLlamaModel", "what the model computes differs by"),
    (prefix, "doge", "DogeModel", "what the model computes differs by"),
    (prefix, "encoder", "BertModel", "Use LoRA"),
    (prefix, "roberta", "RobertaModel", "what the model computes differs by"),
    (prefix, "deepseek_v3", "DeepseekV3Model", "different shapes", "(4, 8), (4, 16)"),
    (prefix, "jetmoe", "JetMoeModel", "Sizes of tensors must match"),
    (prefix, "prophetnet", "ProphetNetDecoder", "layers saw it"),
    (prompt, "gemma3n_text", "Gemma3nTextModel", "what the model computes differs by"),
    (prompt, "gemma4_text", "Gemma4TextModel", "RuntimeError"),
    (prompt, "prophetnet", "last_hidden_state_ngram", "another shape"),
    (prompt, "roberta", "RobertaModel", "what the model computes differs by"),
]
READ = [  # (method, architecture) on which both are equal
    (prefix, "bert"),
    (prefix, "gemma3n_text"),
    (prompt, "bamba"),
    (prompt, "bart"),
    (prompt, "bert"),
    (prompt, "deepseek_v3"),
    (prompt, "diffllama"),
    (prompt, "doge"),
    (prompt, "falcon_h1"),
    (prompt, "jetmoe"),
    (prompt, "rembert"),  # its cache is one of two, for an encoder as well
]


def other(architecture):
    """A small random model, its weights large enough to matter."""
    torch.manual_seed(0)
    model = Auto.from_config(CONFIGS[architecture]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def named(row):
    return f"{row[0].__name__.rpartition('.')[2]}-{row[1]}"


@law
@pytest.mark.parametrize("row", REFUSED, ids=named)
def what_differs_from_tokens_is_refused(row):
    method, architecture, *words = row
    model = other(architecture)
    with refused(model, *words):
        method.inject(model, n=N)


@law
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def half_precision_hides_nothing(dtype=torch.bfloat16):
    """The bound is wider there, and yet below each of these faults."""
    for method, architecture, *words in REFUSED:
        if words[-1] == "what the model computes differs by":
            model = other(architecture).to(dtype)
            with refused(model, *words):
                method.inject(model, n=N)
    for method, architecture in READ:
        assert method.inject(other(architecture).to(dtype), n=N)


@law
@pytest.mark.parametrize("row", READ, ids=named)
def what_is_accepted_equals_tokens(row):
    """In one pass, through the cache, and behind padding."""
    method, architecture = row
    model, untouched = other(architecture), other(architecture)
    method.inject(model, n=N, start=IDS)
    with torch.no_grad():
        expected = untouched(in_front(tokens())).logits[:, N:]
        assert largest(logits(model), expected) < CLOSE
        first = model(tokens()[:, :7], use_cache=True)
        rest = model(  # positions, which Bamba does not count itself
            tokens()[:, 7:],
            position_ids=torch.arange(7, 10)[None],
            past_key_values=first.past_key_values,
        )
        together = torch.cat([first.logits, rest.logits], 1)
        assert largest(together, expected) < CLOSE
        rows, batch, mask = padded("right")
        found = model(batch, attention_mask=mask, use_cache=False).logits
        for row, ours, length in zip(rows, found, LENGTHS, strict=True):
            alone = untouched(in_front(row[None]), use_cache=False).logits[0, N:]
            assert largest(ours[:length], alone) < CLOSE


@law
def a_start_that_leaves_a_state_is_refused():
    """Tokens leave a state beside keys and values there; a random start is right."""
    model, untouched = other("falcon_h1"), other("falcon_h1")
    with refused(model, "start", "recurrent state", "start='random'"):
        prefix.inject(model, n=N, start=IDS)
    prefix.inject(model, n=N)
    adapter = the_only(model)
    with torch.no_grad():
        adapter.P *= 50
        cache = DynamicCache(config=untouched.config)
        for i in range(adapter.shape[0]):
            P_K, P_V = adapter.states()[:, i].permute(1, 2, 0, 3)
            cache.update(P_K[None], P_V[None], i)  # (1, h_kv, n, d)
        expected = untouched(tokens(1), past_key_values=cache).logits
    assert largest(logits(model, tokens(1)), expected) < CLOSE


@law
def the_probe_draws_nothing():
    """A seed gives the P that it gave before there was a probe: the first draw."""
    model = other("bert")
    torch.manual_seed(3)
    prefix.inject(model, n=2)
    found = the_only(model).P.detach() / prefix.STD
    torch.manual_seed(3)
    assert torch.equal(prefix.STD * torch.randn(found.shape), the_only(model).P)
    model = other("bert")
    torch.manual_seed(3)
    prompt.inject(model, n=2, start="random")
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2, 32) - prompt.STD, the_only(model).P)


@law
def the_trunk_is_what_embeds_ids():
    """Of a BERT not the encoder that owns the layers, but what is around it."""
    model = other("bert")
    for method in (prompt, prefix):
        assert method.inject(model, n=2) == ["bert"]
        assert list(adapters(model)) == ["bert"]
        model = other("bert")
