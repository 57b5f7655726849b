"""F5: who can be served alone, and what that costs on disk and in memory.

    tasks     full fine-tuning     adapters
    1         M                    M + a
    T         T · M                M + T · a          M: bytes of a model, a: an adapter

A fully fine-tuned folder is loaded by transformers alone, in a fresh process with empty
caches and no network; the adapter's folder must fail there, and work with its base.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...common.quiet import quiet_transformers
from ...core import adapter
from ...core.merge import merge
from ...files import exchange
from ...methods import full, lora
from ...models.load import load_model
from .. import runs
from ..claim import FAILS, HOLDS, Claim, Measured, Rule
from ..runs import Run
from .finetune import randomize

TASKS = (1, 10, 100)
COPIES = {"tiny": 10, "smollm2": 2}  # really written; their sizes must agree
PROBE = list(range(1, 17))  # token ids that every vocabulary has
CLOSE = 1e-4  # of a logit: one process may add up in another order than the next
ALONE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
found = {}
for name, folder in json.loads(sys.argv[1]).items():
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.tensor([json.loads(sys.argv[2])])
        with torch.no_grad():
            found[name] = model.eval()(ids).logits[0, -1].tolist()
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print("FOUND" + json.dumps(found))
"""


def config(base: str) -> dict:
    return {
        "experiment": "standalone",
        "base": base,
        "base_digest": runs.base_digest(base),
        "r": 8,
        "alpha": 16,
        "copies": COPIES.get(base, 2),
        "seed": 0,
    }


def compute(config: dict) -> dict:
    """Write models and adapters, and load them alone.

    Returns  checks        {what must hold: whether it did}
        errors             what loading the adapter's folder alone said, shortened
        bytes              {"model", "adapter"}: {"disk", "memory"} of one
        disk, memory       {"full", "adapters"}: bytes for each number of TASKS
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        memory = {"model": _write_base(folder, config["base"])}
        expected = {"model": _write_models(folder, config)}
        expected["adapter"], memory["adapter"] = _write_adapters(folder, config)
        with_base = _with_base(folder)
        base_disk = _size(folder / "base")
        (folder / "base").rename(folder / "elsewhere")  # or the adapter would find it
        alone = in_fresh_process(
            {name: folder / f"{name}-0" for name in ("model", "adapter")}, folder
        )
        sizes = {name: _sizes(folder, name) for name in ("model", "adapter")}
    error = alone["adapter"] if isinstance(alone["adapter"], str) else ""
    checks = {
        "the model's folder works alone": close(alone["model"], expected["model"]),
        "the adapter's folder alone does not load": bool(error),
        "the adapter works with its base": close(with_base, expected["adapter"]),
        "every task costs the same bytes": all(
            len(set(s)) == 1 for s in sizes.values()
        ),
    }
    disk = {"model": sizes["model"][0], "adapter": sizes["adapter"][0]}
    return {
        "checks": checks,
        "errors": error.replace(scratch, "…")[:200],
        "bytes": {n: {"disk": disk[n], "memory": memory[n]} for n in disk},
        "base_disk": base_disk,
        "disk": totals(disk["model"], base_disk, disk["adapter"]),
        "memory": totals(memory["model"], memory["model"], memory["adapter"]),
    }


def totals(model: int, base: int, adapter: int) -> dict[str, list[int]]:
    """Bytes for each number of TASKS, both ways."""
    return {
        "full": [tasks * model for tasks in TASKS],
        "adapters": [base + tasks * adapter for tasks in TASKS],
    }


def in_fresh_process(folders: dict[str, Path], scratch: Path) -> dict:
    """{name: logits, or the error as text} of folders loaded by transformers alone.

    The process has empty caches and no hub, so that nothing but the folder is there.
    """
    empty = scratch / "empty"
    empty.mkdir(exist_ok=True)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(empty),
        "XDG_CACHE_HOME": str(empty),
        "PEFT_FROM_SCRATCH_CACHE": str(empty),
    }
    named = json.dumps({name: str(folder) for name, folder in folders.items()})
    done = subprocess.run(
        [sys.executable, "-c", ALONE, named, json.dumps(PROBE)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if "FOUND" not in done.stdout:
        raise RuntimeError(f"the fresh process failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.rpartition("FOUND")[2])


def close(logits, expected: Tensor) -> bool:
    """Whether these are logits, and the expected ones."""
    if not isinstance(logits, list | Tensor):
        return False
    logits = torch.as_tensor(logits)
    return logits.shape == expected.shape and bool(
        torch.allclose(logits, expected, atol=CLOSE)
    )


def _write_base(folder: Path, name: str) -> int:
    """Write a copy of the base, which all others are made from; its bytes in memory.

    A tied weight counts once.
    """
    base, tokenizer = load_model(name, device="cpu")
    _save(base, tokenizer, folder / "base")
    return sum(parameter.nbytes for parameter in base.parameters())


def _write_models(folder: Path, config: dict) -> Tensor:
    """Write models that differ in every weight; the first one's logits."""
    for copy in range(config["copies"]):
        model, tokenizer = load_model(folder / "base", device="cpu")
        full.inject(model)
        _disturb(model, copy)
        merge(model)  # nothing to fold in: the trained weights are the model
        _save(model, tokenizer, folder / f"model-{copy}")
        if copy == 0:
            logits = _logits(model)
    return logits


def _write_adapters(folder: Path, config: dict) -> tuple[Tensor, int]:
    """Write adapters that do something; the first one's logits, bytes in memory."""
    for copy in range(config["copies"]):
        model, _ = load_model(folder / "base", device="cpu")
        torch.manual_seed(copy)
        lora.inject(model, r=config["r"], alpha=config["alpha"])
        randomize(model)
        exchange.save(model, folder / f"adapter-{copy}")
        if copy == 0:
            logits = _logits(model)
    return logits, sum(p.nbytes for p in adapter.trainable(model).values())


def _with_base(folder: Path) -> Tensor:
    model, _ = load_model(folder / "base", device="cpu")
    exchange.load(model, folder / "adapter-0")
    return _logits(model)


def _save(model: nn.Module, tokenizer, folder: Path) -> None:
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def _disturb(model: nn.Module, seed: int) -> None:
    """Small changes to every weight, as training would make them."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + 1e-2 * torch.randn_like(parameter))


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(torch.tensor([PROBE])).logits[0, -1]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _sizes(folder: Path, name: str) -> list[int]:
    return [_size(copy) for copy in sorted(folder.glob(f"{name}-*"))]


def measured(all_runs: Sequence[Run]) -> Measured:
    """How many of the checks failed."""
    (run,) = all_runs
    failed = sum(not passed for passed in run.result["checks"].values())
    return Measured(failed, failed, failed, seeds=())


CLAIMS = (
    Claim(
        id="F5",
        notebook="01",
        statement=(
            "A fully fine-tuned model can be served independently, where an adapter "
            "needs its base"
        ),
        rule=Rule(
            words=(
                "How many of four checks fail: in a fresh process with no cache and no "
                "network the fine-tuned folder gives its model's logits; the adapter's "
                "folder does not load there; with its base it gives its model's "
                "logits; and every task costs the same bytes"
            ),
            unit="checks failed",
            verdicts=(HOLDS, FAILS),
            edges=(0.0,),
        ),
        configs=lambda scale: [config(scale)],
        measured=measured,
        number="checks that failed",
        so={
            "holds": (
                "A fully fine-tuned folder works alone. An adapter's folder needs its "
                "base."
            ),
        },
    ),
)
