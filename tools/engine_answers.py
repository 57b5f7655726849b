"""Compare llama.cpp, running the GGUF file of a merged model, with the adapted model.

    llama-server -m orders.gguf --port 8080 -fa off -ctk f32 -ctv f32
    python -m tools.engine_answers --url http://127.0.0.1:8080 --base smollm2 \
        --adapter DIR --data rows.jsonl

Any server with llama.cpp's HTTP interface will do. Three things are compared: the ids
of texts (those of the rows, and random ones with Unicode and special tokens), the text
of the chat template, and greedy answers with the token they end at. Prints one line of
JSON. The adapted model computes in float32, unmerged, in transformers.
"""

import argparse
import json
import random
import urllib.request

import torch

from peft_from_scratch.cli.chat import stop_of
from peft_from_scratch.files import exchange
from peft_from_scratch.models.load import load_model
from peft_from_scratch.tasks.task import load_task
from peft_from_scratch.tasks.templates import encode_prompt

RANGES = [(32, 127), (160, 1536), (0x4E00, 0x4FFF), (0x1F300, 0x1F650)]  # code points
PIECES = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "12", "3.5", "½", "٣", "'s", "\u200d"]
TEXTS = 400  # random ones


def ask(url: str, path: str, body: dict) -> dict:
    """What the server answers to a POST."""
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), kind)
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def random_texts(tokenizer) -> list[str]:
    rng = random.Random(0)
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]

    def piece() -> str:
        letters = "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(5))
        return rng.choice([letters, rng.choice(PIECES), rng.choice(special)])

    return ["".join(piece() for _ in range(rng.randrange(1, 14))) for _ in range(TEXTS)]


def same_ids(url: str, tokenizer, texts: list[str]) -> int:
    """Of how many texts the server makes the ids that the tokenizer makes."""
    options = {"add_special": True, "parse_special": True}
    return sum(
        ask(url, "/tokenize", {"content": text, **options})["tokens"]
        == tokenizer(text).input_ids
        for text in texts
    )


def same_answer(url: str, model, ids: list[int], stop: int, most: int) -> bool:
    """Whether both write the same tokens, and end for the same reason."""
    prompt = torch.tensor([ids], device=model.device)
    options = dict(max_new_tokens=most, do_sample=False, eos_token_id=stop)
    with torch.no_grad():
        whole = model.generate(prompt, **options, pad_token_id=stop)
    ours = whole[0, len(ids) :].tolist()
    body = {"prompt": ids, "n_predict": most, "samplers": ["top_k"], "top_k": 1}
    theirs = ask(url, "/completion", body | {"return_tokens": True})
    ended = theirs["stop_type"] == "eos"
    tokens = [token for token in theirs["tokens"] if token != stop]
    return tokens == [t for t in ours if t != stop] and ended == (ours[-1] == stop)


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--url", "--base", "--adapter", "--data"):
        top.add_argument(name, required=True)
    top.add_argument("--rows", type=int, default=10, help="that are answered")
    top.add_argument("--most", type=int, default=32, help="tokens of an answer")
    options = top.parse_args()
    model, tokenizer = load_model(options.base, dtype="float32")
    exchange.load_as_trained(model, options.adapter)
    task = load_task(options.data)
    prompts = task.test["prompt"][: options.rows]
    template = "chat" if tokenizer.chat_template else "raw"
    encoded = [encode_prompt(tokenizer, "", p, template=template) for p in prompts]
    texts = [tokenizer.decode(ids) for ids in encoded] + random_texts(tokenizer)
    stop = stop_of(options.adapter, tokenizer)
    right = [same_answer(options.url, model, i, stop, options.most) for i in encoded]
    line = {
        "texts": len(texts),
        "same ids": same_ids(options.url, tokenizer, texts),
        "rows": len(right),
        "same answers": sum(right),
    }
    if tokenizer.chat_template:
        line["same chats"] = sum(map(_same_chat(options.url, tokenizer), prompts))
    print(json.dumps(line))


def _same_chat(url: str, tokenizer):
    def same(prompt) -> bool:
        turns = prompt
        if isinstance(prompt, str):
            turns = [{"role": "user", "content": prompt}]
        ours = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return ask(url, "/apply-template", {"messages": turns})["prompt"] == ours

    return same


if __name__ == "__main__":
    main()
