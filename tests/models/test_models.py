"""load_model: names, folders, a stand-in hub, devices, dtypes. No network is used."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
from architectures import build, byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from peft_from_scratch.models import smollm2
from peft_from_scratch.models.load import (
    NAMED,
    describe,
    load_model,
    pick_device,
    pick_dtype,
)

IDS = torch.arange(64, 80)[None]  # (1, 16)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small random Llama and its tokenizer, as save_pretrained writes them."""
    folder = tmp_path / "owner" / "name"
    build("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A model hub on this machine that has owner/name, and an empty client cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root = tmp_path
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    known = huggingface_hub.constants
    monkeypatch.setattr(known, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(known, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(known, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(known, "HF_HUB_CACHE", str(tmp_path / "client-cache"))
    yield server
    server.shutdown()
    server.server_close()


class Hub(BaseHTTPRequestHandler):
    """Answers /<owner>/<name>/resolve/<revision>/<file> from the server's root."""

    def do_GET(self):
        parts = self.path.partition("?")[0].split("/")[1:]
        api = parts[0] == "api"
        repository = self.server.root.joinpath(*(parts[2:4] if api else parts[:2]))
        file = None if api else repository.joinpath(*parts[4:])
        if file is not None and file.is_file():
            body = file.read_bytes()
            self.send_response(200)
            self.send_header("ETag", hashlib.sha256(body).hexdigest())
            self.send_header("X-Repo-Commit", "a" * 40)
        else:
            body = b""
            self.send_response(404)
            reason = "EntryNotFound" if repository.is_dir() else "RepoNotFound"
            self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        """Keep the test's output quiet."""


def never(what):
    """A function that no test may reach."""
    return lambda *_, **__: pytest.fail(what)


def unplug(hub, monkeypatch):
    """No hub answers any more, and nothing may wait for it."""
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr("time.sleep", never("waited for a retry"))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("spelling", [str, Path])
def test_a_local_folder_gives_the_saved_model(folder, spelling):
    model, tokenizer = load_model(spelling(folder), device="cpu")
    assert torch.equal(logits(model), logits(build("llama")))
    assert tokenizer("Ab").input_ids == byte_tokenizer()("Ab").input_ids
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    assert not any(module.training for module in model.modules())


def test_the_vocabulary_is_remembered_as_loaded(folder):
    model, _ = load_model(folder)
    rows = model.pfs_vocab_size
    model.resize_token_embeddings(rows + 7)
    assert (rows, model.pfs_vocab_size) == (320, 320)


def test_describe_tells_base_size_device_and_dtype(folder):
    model, _ = load_model(folder, device="cpu", dtype="bfloat16")
    count = sum(p.numel() for p in model.parameters())
    assert describe(model) == f"{folder}, {count:,} parameters, cpu, bfloat16"


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (None, torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("torch.float64", torch.float64),
    ],
)
def test_the_dtype_is_float32_unless_asked_for_another(folder, asked, given):
    build("llama", dtype=torch.bfloat16).save_pretrained(folder)
    model, _ = load_model(folder, device="cpu", dtype=asked)
    assert {p.dtype for p in model.parameters()} == {given}


@pytest.mark.parametrize("wrong", ["bf16", "int8", torch.int8, "Auto", ""])
def test_a_wrong_dtype_is_refused_with_the_allowed_ones(wrong):
    with pytest.raises(ValueError, match="float32, bfloat16, float16, float64"):
        pick_dtype(wrong)


def machine(monkeypatch, cuda=0, mps=False):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_the_best_device_is_cuda_then_mps_then_cpu(monkeypatch):
    for cuda, mps, best in ((2, True, "cuda:0"), (0, True, "mps"), (0, False, "cpu")):
        machine(monkeypatch, cuda, mps)
        assert pick_device() == torch.device(best)
        assert pick_device("cpu") == torch.device("cpu")


def test_a_device_that_is_here_is_taken(monkeypatch):
    machine(monkeypatch, cuda=2)
    for asked in ("cuda", "cuda:0", "cuda:1", torch.device("cuda", 1), "cpu:0"):
        assert pick_device(asked) == torch.device(asked)


@pytest.mark.parametrize("absent", ["cuda:2", "mps", "cpu:1", "xpu", "gpu", ""])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch, absent):
    machine(monkeypatch, cuda=2)
    with pytest.raises(ValueError, match=r"here are cuda:0, cuda:1, cpu$"):
        pick_device(absent)


def test_a_misspelt_name_is_refused_with_the_nearest_right_one():
    with pytest.raises(ValueError, match=r"did you mean 'smollm2'\?") as refused:
        load_model("smolm2")
    for allowed in (*NAMED, "owner/name", "folder"):
        assert allowed in str(refused.value)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "gpt2"]
)
def test_what_cannot_be_a_hub_id_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", never("asked"))
    with pytest.raises(ValueError, match="no model is called") as refused:
        load_model(name)
    assert "did you mean" not in str(refused.value)


def test_a_pad_token_is_lent_where_there_is_none(folder):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    _, tokenizer = load_model(folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"


def test_a_pad_token_that_is_there_is_kept(folder):
    assert load_model(folder)[1].pad_token == "<pad>"


def test_an_adapters_folder_is_refused_with_its_base(folder):
    config = {"base_model_name_or_path": "owner/base", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"adapter, not a model.*owner/base"):
        load_model(folder)


def test_tensors_without_values_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_pickled_weights_are_not_read(folder):
    model = build("llama")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(folder)


def test_code_beside_a_model_is_not_run(folder):
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError):
        load_model(folder)
    assert not ran.exists()


def test_a_hub_id_is_fetched_and_serves_offline_afterwards(hub, monkeypatch):
    model, tokenizer = load_model("owner/name", device="cpu")
    assert torch.equal(logits(model), logits(build("llama")))
    assert describe(model).startswith("owner/name, ")
    unplug(hub, monkeypatch)
    again, tokenizer = load_model("owner/name", device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert tokenizer.pad_token == "<pad>"


def test_an_id_that_the_hub_lacks_is_refused(hub):
    with pytest.raises(ValueError, match="'owner/none' is no folder here and no model"):
        load_model("owner/none")


def test_a_repository_without_a_model_is_refused(hub, folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"'owner/name' .* has no config\.json"):
        load_model("owner/name")


def test_a_hub_out_of_reach_is_one_sentence_at_once(hub, monkeypatch):
    unplug(hub, monkeypatch)
    with pytest.raises(ConnectionError, match=r"HTTPS_PROXY.*smollm2") as refused:
        load_model("owner/name")
    assert huggingface_hub.constants.ENDPOINT in str(refused.value)


def test_an_offline_hub_client_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        load_model("owner/name")


def test_smollm2_answers_and_never_asks_a_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", never("asked"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, tokenizer = load_model("smollm2", device="cpu")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)
    told = tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])
    assert "Paris" in told
    assert told.endswith(tokenizer.eos_token)
    assert describe(model) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct, 134,515,008 parameters, cpu, float32"
    )
    assert model.name_or_path == NAMED["smollm2"].published_as  # what peft writes
    assert tokenizer.model_max_length == smollm2.CONTEXT
