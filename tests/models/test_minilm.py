"""The weights that number formats are judged by: not born in four bits."""

import pytest
import torch

from peft_from_scratch import load_model, nf4
from peft_from_scratch.models import minilm


def rounded_by_affine_int4(W):
    """Largest change, relative to the largest weight, at blocks of 32."""
    return (nf4.Affine.of(W, 32).dequantize() - W).abs().max() / W.abs().max()


@pytest.fixture(scope="module")
def matrices():
    return minilm.matrices()


def test_they_are_the_projections_of_six_layers(matrices):
    shapes = {"query": (384, 384), "intermediate.dense": (1536, 384)}
    assert len(matrices) == 6 * 6
    for ending, shape in shapes.items():
        chosen = [W for n, W in matrices.items() if n.endswith(f"{ending}.weight")]
        assert [tuple(W.shape) for W in chosen] == [shape] * 6
    assert all(W.dtype == torch.float32 and W.dim() == 2 for W in matrices.values())


def test_four_bits_change_them_and_do_not_change_smollm2s(matrices):
    """The trap: SmolLM2's blocks of 32 hold at most sixteen values each."""
    W = matrices["encoder.layer.0.intermediate.dense.weight"]
    model, _ = load_model("smollm2", device="cpu")
    born_in_four_bits = model.model.layers[3].mlp.up_proj.weight.detach()
    assert rounded_by_affine_int4(W) > 0.01
    assert rounded_by_affine_int4(born_in_four_bits) < 1e-6
    blocks = born_in_four_bits.view(-1, 32)
    assert max(len(block.unique()) for block in blocks[:500]) <= 16
    assert max(len(block.unique()) for block in W.view(-1, 32)[:500]) == 32
