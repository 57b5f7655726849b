"""Laws of what the presets leave out: named, with its share, and only that."""

import copy
import warnings

import peft
import pytest
import torch
from architectures import GATED, build
from model_state import assert_same, largest, logits, refused, snapshot, tokens
from planting import law
from torch import nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DeepseekV3Config,
    Dots1Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    PhimoeConfig,
    ProphetNetConfig,
    Qwen2MoeConfig,
    Qwen3NextConfig,
)

import peft_from_scratch as pfs
from peft_from_scratch.core import counting
from peft_from_scratch.core.adapter import adapters

SMALL = dict(moe_intermediate_size=16, shared_expert_intermediate_size=24)
LINEAR = dict(
    num_experts_per_tok=2,
    layer_types=["linear_attention", "full_attention"],
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
DENSE = dict(  # a dense layer, and one of experts with a shared one
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
BART = dict(
    vocab_size=320,
    d_model=32,
    decoder_layers=2,
    decoder_ffn_dim=48,
    decoder_attention_heads=4,
    encoder_layers=1,
    encoder_ffn_dim=48,
    encoder_attention_heads=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=2,
)
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**GATED, num_local_experts=4),
    "gpt_oss": lambda: GptOssConfig(**GATED, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(**GATED, **SMALL, num_experts=4),
    "qwen3_next": lambda: Qwen3NextConfig(**GATED, **SMALL, **LINEAR, num_experts=4),
    "phimoe": lambda: PhimoeConfig(**GATED, num_local_experts=4),
    "llama4": lambda: Llama4TextConfig(
        **GATED, num_local_experts=4, intermediate_size_mlp=48
    ),
    "dots1": lambda: Dots1Config(**GATED, **DENSE, moe_intermediate_size=16),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**GATED, "num_key_value_heads": 4, "head_dim": 4},
        **DENSE,
        moe_intermediate_size=16,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "bart": lambda: BartConfig(**BART, is_decoder=True),
    "prophetnet": lambda: ProphetNetConfig(
        vocab_size=320,
        hidden_size=32,
        decoder_ffn_dim=48,
        num_decoder_layers=2,
        num_decoder_attention_heads=4,
        is_decoder=True,
    ),
}
METHODS = {
    "lora": pfs.lora.inject,
    "dora": pfs.dora.inject,
    "pissa": pfs.pissa.inject,
    "qlora": pfs.qlora.inject,
    "ia3": pfs.ia3.inject,
    "houlsby": lambda model: pfs.houlsby.inject(model, m=4),
}
# Architecture -> (names that the sentence holds, why).
SAID = {
    "mixtral": ("model.layers.*.mlp.experts", "3-D parameters"),
    "gpt_oss": ("model.layers.*.mlp.experts", "3-D parameters"),
    "qwen2_moe": ("model.layers.*.mlp.experts", "3-D parameters"),
    "qwen3_next": ("model.layers.*.mlp.experts", "3-D parameters"),
    "deepseek_v3": ("model.layers.*.mlp.experts", "3-D parameters"),
    "phimoe": ("model.layers.*.mlp.router", "no single tensor"),
    "llama4": ("model.layers.*.feed_forward.router", "no single tensor"),
    "bart": ("model.decoder.layers.*.encoder_attn.q_proj", "beside an encoder"),
    "prophetnet": ("cross_attn.query_proj", "beside an encoder"),
}


def built(architecture):
    torch.manual_seed(0)
    return Auto.from_config(CONFIGS[architecture]()).eval()


def warned(act):
    """The texts of the UserWarnings of an act."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in seen if w.category is UserWarning]


@law
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", SAID)
def defaults_work_and_say_what_they_leave_out(architecture="phimoe", method="lora"):
    """One sentence; the model runs, and a gradient reaches everything that trains."""
    model = built(architecture)
    (text,) = warned(lambda: METHODS[method](model))
    assert text.startswith("not adapted: ")
    for word in SAID[architecture]:
        assert word in text
    out = model(tokens(), labels=tokens(), use_cache=False)
    out.loss.backward()
    assert out.loss.isfinite()
    for name, parameter in pfs.trainable(model).items():
        assert parameter.grad is not None, name


@law
def the_share_is_of_all_parameters():
    model = built("mixtral")
    total = counting.count(model).total
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    (text,) = warned(lambda: pfs.lora.inject(model))
    assert f"{100 * experts / total:.0f} % of the parameters" in text
    assert 0.2 < experts / total < 0.9


@law
def nothing_is_said_where_nothing_is_left_out():
    for architecture in ("llama", "gpt2"):
        for inject in METHODS.values():
            model = build(architecture)
            assert not warned(lambda: inject(model))  # noqa: B023
    model = built("mixtral")  # whoever names modules knows the others
    assert not warned(lambda: pfs.lora.inject(model, targets=["q_proj"]))


@law
def a_convolution_is_no_expert():
    """Mixers of state-space models have one, whose weight has three dimensions."""
    model = build("llama")
    model.model.layers[0].mlp.conv = nn.Conv1d(4, 4, 3)
    assert not warned(lambda: pfs.lora.inject(model))


class Keeping(nn.Linear):
    """A projection that keeps what it returned."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


@law
def trying_a_projection_leaves_no_trace():
    model = build("llama")
    model.model.layers[0].mlp.up_proj = Keeping(32, 48)
    before = snapshot(model)
    plan = pfs.lora.plan(model)
    assert "model.layers.0.mlp.up_proj" in plan.adapters
    assert_same(snapshot(model), before)


@law
def a_router_that_is_named_is_refused():
    model = built("phimoe")
    with refused(model, "layers.0.mlp.router", "no single tensor", "exclude"):
        pfs.lora.inject(model, targets=["router", "q_proj"])


@law
def cross_attention_is_adapted_where_it_runs():
    """In a model with its encoder, and where somebody names it."""
    model = BartForConditionalGeneration(BartConfig(**BART))
    assert not warned(lambda: pfs.lora.inject(model))
    assert any("encoder_attn" in name for name in adapters(model))
    model = built("bart")
    assert len(pfs.lora.inject(model, targets=r".*encoder_attn\.q_proj")) == 2


@law
def biases_that_never_run_do_not_train():
    model = built("prophetnet")
    pfs.bitfit.inject(model)
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(p.grad is not None for p in pfs.trainable(model).values())


class Indexer(nn.Module):
    def __init__(self):
        super().__init__()
        self.wk = nn.Linear(32, 8)


@law
def an_indexer_is_left_out():
    """What it computes chooses tokens: no gradient passes through a choice."""
    model = build("llama")
    model.model.layers[0].self_attn.indexer = Indexer()
    (text,) = warned(lambda: pfs.lora.inject(model))
    assert "indexer.wk" in text and "no gradient" in text
    assert not any("indexer" in name for name in adapters(model))
    pfs.remove(model)
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.zeros(48))
    assert pfs.bitfit.inject(model) == ["model.layers.0.mlp.up_proj.bias"]


@law
def what_peft_takes_for_experts_is_said(folder):
    """And it does: the logits of this file in PEFT are others, ours are the same."""
    model, loaded = built("dots1"), built("dots1")
    pfs.lora.inject(model)
    for parameter in pfs.trainable(model).values():
        parameter.data.add_(0.05)
    (text,) = warned(lambda: pfs.save(model, folder / "all"))
    assert "mlp.gate_proj" in text and "experts.gate_up_proj" in text and "PEFT" in text
    theirs = copy.deepcopy(loaded)
    pfs.load(loaded, folder / "all")
    assert torch.equal(logits(loaded), logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(theirs, folder / "all").eval()
    assert largest(logits(theirs), logits(model)) > 1e-3
    sound, theirs = built("dots1"), built("dots1")
    pfs.lora.inject(sound, targets="attention")
    for parameter in pfs.trainable(sound).values():
        parameter.data.add_(0.05)
    assert not warned(lambda: pfs.save(sound, folder / "attention"))
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "attention").eval()
    assert largest(logits(theirs), logits(sound)) < 1e-5
