"""The dtype that a machine is fast in: measured, and chosen only where it pays."""

import pytest
import torch

import peft_from_scratch as pfs
from peft_from_scratch.models import speed
from peft_from_scratch.models.load import pick_dtype

CPU = torch.device("cpu")


@pytest.fixture
def rates(monkeypatch):
    """FLOP/s that a measurement will find, by dtype."""
    rates = {torch.float32: 100e9, torch.bfloat16: 400e9}
    monkeypatch.setattr(
        speed, "measured_rate", lambda device, rows, seconds, dtype: rates[dtype]
    )
    speed._measured_on_cpu.cache_clear()
    yield rates
    speed._measured_on_cpu.cache_clear()


def test_a_cpu_that_multiplies_bfloat16_computes_in_it(rates):
    chosen = speed.fast_dtype(CPU)
    assert chosen.dtype == torch.bfloat16
    assert "400 GFLOP/s in bfloat16, 100 in float32" in chosen.reason
    model, _ = pfs.load_model("tiny", device="cpu", dtype="auto")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("half", [10e9, 100e9, 140e9])
def test_one_that_imitates_it_stays_in_float32(rates, half):
    rates[torch.bfloat16] = half
    assert speed.fast_dtype(CPU).dtype == torch.float32
    assert pick_dtype("auto", CPU) == torch.float32


def test_nothing_is_measured_where_a_dtype_is_named(rates):
    rates.clear()
    assert pick_dtype(None, CPU) == torch.float32
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("native", [True, False])
def test_cuda_says_itself_whether_it_has_bfloat16(monkeypatch, native):
    def supported(including_emulation=True):
        return native or including_emulation  # a T4 emulates it

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    chosen = speed.fast_dtype(torch.device("cuda")).dtype
    assert chosen == (torch.bfloat16 if native else torch.float32)


def test_mps_stays_in_float32():
    assert speed.fast_dtype(torch.device("mps")).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rate_is_measured_in_the_dtype_that_is_asked_for(monkeypatch, dtype):
    seen = set()
    linear = torch.nn.functional.linear

    def watched(x, W):
        seen.update({x.dtype, W.dtype})
        return linear(x, W)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    assert speed.measured_rate(CPU, 4, 0.01, dtype) > 0
    assert seen == {dtype}
