"""What a file of the other methods may not do; test_refused_files.py has LoRA's.

After each refusal the model is compared bit for bit with what it was before.
"""

import copy

import pytest
import torch
from adapter_files import parsed, say, tampered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws.core.contract import original
from laws.files.refused_files import JUNK
from laws.files.refused_method_files import SOUND, sound
from model_state import assert_same, refused, snapshot
from safetensors.torch import save_file

import peft_from_scratch as pfs
from peft_from_scratch.files.adapter_file import WEIGHTS
from peft_from_scratch.files.formats import FORMATS, METADATA


@pytest.mark.parametrize("method", SOUND)
def test_half_a_file_and_a_pickle_are_refused(method, tmp_path):
    tensors, metadata, _ = parsed(sound(method))
    tampered(sound(method), tmp_path, lambda tensors, config: None)
    model, path = copy.deepcopy(original(SOUND[method][0])), tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-4])
    with refused(model, WEIGHTS):
        pfs.load(model, tmp_path)
    torch.save(tensors, path)
    with refused(model, WEIGHTS, "no readable safetensors"):
        pfs.load(model, tmp_path)
    save_file(tensors, path, metadata | {"vocab_size": "321"})
    with refused(model, "321", "320"):
        pfs.load(model, tmp_path)
    path.unlink()
    with refused(model, WEIGHTS, "does not exist", error=FileNotFoundError):
        pfs.load(model, tmp_path)


# A prompt of the same width fits any model: nothing tells them apart but the effect.
@pytest.mark.parametrize("method", [method for method in SOUND if method != "prompt"])
def test_a_file_for_another_architecture_is_refused(method):
    other = "gemma" if SOUND[method][0] == "opt" else "gpt2"
    model = copy.deepcopy(original(other))
    with refused(model):
        pfs.load(model, sound(method))


FIELDS = {
    method: {*row.fields.values(), *row.ignored, *row.supported}
    for method, row in FORMATS.items()
    if method in ("prompt", "prefix", "houlsby", "ia3")
}


@settings(
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize("method", FIELDS)
@given(data=st.data())
def test_any_config_loads_or_is_refused(method, tmp_path, data):
    names = st.sampled_from(sorted(FIELDS[method] | METADATA - {"peft_type"}))
    fields = data.draw(st.dictionaries(names, st.sampled_from(JUNK), min_size=1))
    model = copy.deepcopy(original("llama"))
    before = snapshot(model)
    try:
        pfs.load(model, tampered(sound(method), tmp_path / "junk", say(**fields)))
    except ValueError:
        assert_same(snapshot(model), before)
    else:
        assert pfs.trainable(model)
