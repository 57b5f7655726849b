"""Invented results of a comparison, in the shape that compare.compare returns."""

import random

from peft_from_scratch.comparison import summary

BASE = 134_515_008  # parameters of the base model
METHODS = {  # key: (label, trainable parameters)
    "zero-shot": ("Zero-shot", 0),
    "few-shot": ("Few-shot", 0),
    "full": ("Full fine-tuning", BASE),
    "lora-attention": ("LoRA on attention", 921_600),
    "lora": ("LoRA on all linear layers", 2_442_240),
    "dora": ("DoRA", 2_500_000),
    "pissa": ("PiSSA", 2_442_240),
    "qlora": ("QLoRA", 2_442_240),
    "houlsby": ("Houlsby adapters", 4_452_480),
    "prefix": ("Prefix tuning", 184_320),
    "prompt": ("Prompt tuning", 9_216),
    "ia3": ("IA3", 74_880),
    "bitfit": ("BitFit", 35_136),
    "lora-mlp": ("LoRA on the feed-forward layers", 1_520_640),
    "merged-by-ties": ("Two LoRAs merged by trimming and electing signs", 4_884_480),
}


def comparison(
    methods=tuple(METHODS)[:5],
    *,
    seed: int = 0,
    rows: int = 100,
    seeds: int = 1,
    whole: bool = True,
) -> dict:
    """A result with these methods; the seed chooses all its numbers.

    Args
        whole  answers are right or wrong, and not something between
    """
    dice = random.Random(seed)
    compared, pairs = summary.compared(
        {key: _runs(key, dice, rows, seeds, whole) for key in methods}
    )
    return {
        "base": "smollm2",
        "base_name": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "task": "orders",
        "instruction": "Turn the order into one line of JSON.",
        "rows_tested": rows,
        "seeds": list(range(seeds)),
        "device": "cpu",
        "dtype": "float32",
        "provenance": {
            "when": "2030-01-02T03:04:05+00:00",
            "commit": "0123abc",
            "changed": False,
            "machine": "an invented one, 2 cores",
            "platform": "Linux",
            "python": "3.11.7",
            "packages": {"torch": "2.13.0"},
            "threads": 2,
            "seed": 0,
        },
        "wall": {"sentence": "Training took 100 s, all else 20 s, in all 120 s."},
        "tuned": {
            "file": "tuning.json",
            "runs": 33,
            "when": "2030-01-01",
            "rule": "best exact match",
        },
        "rows": compared,
        "pairs": pairs,
        "machine": {
            "cpu": "an invented one",
            "cores": 2,
            "threads": 2,
            "busy_elsewhere": 0.1,
        },
    }


def _runs(
    key: str, dice: random.Random, rows: int, seeds: int, whole: bool
) -> list[dict]:
    """The figures of each seed; what does not train has one."""
    chance = dice.choice([0, 1, dice.random(), dice.random()])
    row = _row(key, dice)

    def answer() -> float:
        return dice.random() < chance if whole else chance * dice.random()

    return [
        row | {"correct": [answer() for _ in range(rows)]}
        for _ in range(seeds if row["trainable"] else 1)
    ]


def _row(key: str, dice: random.Random) -> dict:
    label, trainable = METHODS[key]
    return {
        "key": key,
        "label": label,
        "settings": {"template": "chat"} | ({"lr": 1e-3} if trainable else {}),
        "settings_from": "searched for lora",
        "tried": [[5e-4, 0.5], [1e-3, 0.61], [2e-3, 0.6]] if trainable else [],
        "trainable": trainable,
        "total": BASE,
        "share": trainable / BASE,
        "steps": 50 if trainable else 0,
        "batch": 8 if trainable else 0,
        "memory": _memory(trainable, dice),
        "forgetting": {"before": 3.4, "after": 3.5, "change": dice.uniform(-0.1, 0.9)},
        "seconds": {
            "train": dice.uniform(10, 200) if trainable else 0,
            "step": 1.5,
            "answer": dice.uniform(10, 99),
            "total": 300,
        },
        "disk_bytes": 4 * trainable,
        "decode": {
            "ms": 30.0,
            "base_ms": 28.0,
            "ratio": 1 + dice.random(),
            "low": 0.9,
            "high": 2.1,
            "merged": {"ratio": 1 + dice.random() / 10, "low": 0.9, "high": 1.2},
        },
        "merge": {
            "possible": True,
            "reason": None,
            "logit_error": dice.uniform(0, 1e-4),
        },
        "samples": [
            {
                "prompt": prompt,
                "expected": '{"a": 1}',
                "answer": answer,
                "correct": right,
            }
            for prompt, answer, right in (
                ("Order one", '{"a": 1}', True),
                ("Order two", f"no idea, says {label}", False),
            )
        ],
    }


def _memory(trainable: int, dice: random.Random) -> dict:
    kinds = {
        "weights": 4 * BASE,
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,
        "activations": dice.randint(10**8, 10**9),
    }
    when = "training" if trainable else "answering"
    return {**kinds, "peak": int(0.97 * sum(kinds.values())), "when": when}
