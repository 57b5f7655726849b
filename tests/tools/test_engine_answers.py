"""The tool that asks a llama.cpp server: equal answers count, and others do not."""

import json

import pytest
import torch
from architectures import byte_tokenizer

import peft_from_scratch as pfs
from tools import engine_answers


class Engine:
    """What a server with llama.cpp's interface answers for this model."""

    def __init__(self, model, wrong=""):
        self.model, self.tokenizer, self.wrong = model, byte_tokenizer(), wrong

    def __call__(self, url, path, body):
        if path == "/tokenize":
            ids = self.tokenizer(body["content"]).input_ids
            return {"tokens": ids[1:] if self.wrong == "ids" else ids}
        if path == "/apply-template":
            text = self.tokenizer.apply_chat_template(
                body["messages"],
                tokenize=False,
                add_generation_prompt=self.wrong != "chat",
            )
            return {"prompt": text}
        assert (path, body["top_k"], body["samplers"]) == ("/completion", 1, ["top_k"])
        ids = torch.tensor([body["prompt"]])
        options = dict(max_new_tokens=body["n_predict"], do_sample=False)
        whole = self.model.generate(ids, **options, eos_token_id=2, pad_token_id=2)
        new = whole[0, ids.shape[1] :].tolist()
        stopped = new[-1] == 2 or self.wrong == "stop"
        if self.wrong == "answer":
            new[0] += 1
        kept = [token for token in new if token != 2]
        return {"tokens": kept, "stop_type": "eos" if stopped else "limit"}


@pytest.mark.parametrize("wrong", ["", "ids", "chat", "answer", "stop"])
def test_only_equal_answers_count(wrong, base, tmp_path, monkeypatch, capsys):
    model, _ = pfs.load_model(base)
    pfs.lora.inject(model, r=2)
    for parameter in pfs.trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    pfs.save(model, tmp_path / "adapter")
    rows = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(engine_answers, "ask", Engine(model, wrong))
    monkeypatch.setattr(engine_answers, "TEXTS", 20)
    words = (
        f"x --url u --base {base} --adapter {tmp_path / 'adapter'} --rows 3 --most 4"
    )
    data = ["--data", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr("sys.argv", [*words.split(), *data])
    engine_answers.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["texts"], line["rows"]) == (23, 3)
    assert (line["same ids"] == 23) is (wrong != "ids")
    assert (line["same chats"] == 3) is (wrong != "chat")
    assert (line["same answers"] == 3) is (wrong not in ("answer", "stop"))
