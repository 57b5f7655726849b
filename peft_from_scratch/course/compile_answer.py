"""A learner's kernel, compiled for GPUs that are not here, in a process of its own.

    compiled(my_lora)      {"sm_80": {"registers": 143, …}, "sm_90": …}, or Refused

A lesson interprets its kernels, and Triton takes that decision when it is imported. So
the source of a kernel is written to a file, with what it uses, and a second process
compiles it: for `y = x W^T + scale (x A^T) B^T` in bf16, with SIZE rows and columns.

    source_of(my_lora)     what that file holds
    python -m peft_from_scratch.course.compile_answer FOLDER     the second process
"""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import ModuleType

import torch

from ..common.provenance import ROOT
from ..kernels.cases import empty
from ..kernels.language import Launch, matrix

ANSWER, RESULT = "answer", "compiled.json"
TARGETS = {"sm_80": "A100", "sm_90": "H100"}
SIZE, RANK = 4096, 16  # rows of x, of W and of A
TILES = dict(BM=128, BN=64, BK=32, RANK=16, SWEEP=4)
WARPS, STAGES = 8, 3
REMEDIES = (  # (part of what the compiler says, the likely mistake)
    (
        "same dtype",
        "`low` is float32 and the tile of B is bf16. Round `low` to B's dtype before "
        "the product: rounded(low * scale, B[0].dtype.element_ty)",
    ),
    (
        "K >=",
        "the inner size of a `dot` is below 16. The matrix unit needs at least 16 "
        "ranks, or columns of k, at a time: use all RANK columns, and BK as it is",
    ),
    (
        "global variable",
        "a kernel cannot use a number from outside. Write it in the kernel, or make "
        "it a tl.constexpr argument",
    ),
)
UNKNOWN = (
    "the interpreter runs this line as Python, and the compiler does not know it. Use "
    "`tl` and the helpers of the text for all that happens to tiles"
)


class Refused(ValueError):
    """A compiler's no: on which target, in which line, why, and the remedy."""

    def __init__(self, target: str, line: str, reason: str):
        self.remedy = next((r for part, r in REMEDIES if part in reason), UNKNOWN)
        where = f"\n  in the line  {line}" if line else ""
        super().__init__(
            f"right in the interpreter, but it does not compile for {target}, the "
            f"{TARGETS[target]}, in bf16:{where}\n  the compiler says  {reason}\n"
            f"Likely mistake: {self.remedy}"
        )


def compiled(kernel) -> dict[str, dict]:
    """{target: registers, spilled, shared, instructions} of a fused LoRA kernel.

    Args
        kernel   takes (x, W, A, B, y, m_size, n_size, k_size, r, scale) and the names
                 of TILES
    Raises   Refused       it does not compile for a target
             RuntimeError  the second process ended without an answer
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{ANSWER}.py"
        file.write_text(source_of(kernel), "utf-8")
        command = [sys.executable, "-m", __name__, folder, kernel.fn.__name__]
        process = subprocess.run(
            command, env=_environment(folder), capture_output=True, text=True
        )
        result = Path(folder) / RESULT
        if not result.exists():
            last = process.stderr.strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"the process that compiles has failed: {last[0]}")
        answer = json.loads(result.read_text("utf-8"))
    if "reason" in answer:
        raise Refused(**answer)
    return answer


def _environment(folder: str) -> dict[str, str]:
    """This process's own, without the interpreter, and with a cache that goes away."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"TRITON_CACHE_DIR": folder, "PYTHONPATH": os.pathsep.join(paths)}


# The source ---------------------------------------------------------------------------


def source_of(kernel) -> str:
    """A module that has the kernel and all that it uses, in the order of definition.

    What a package has is imported from there; what a cell defines is copied.
    """
    lines: dict[str, str] = {}
    _collect(kernel, kernel.fn.__name__, lines)
    return "\n".join(lines.values()) + "\n"


def _collect(value, name: str, lines: dict[str, str]) -> None:
    if name in lines:
        return
    if isinstance(value, ModuleType):
        lines[name] = f"import {value.__name__} as {name}"
    elif _is_importable(value):
        home = getattr(value, "fn", value)
        lines[name] = f"from {home.__module__} import {home.__name__} as {name}"
    elif hasattr(value, "fn"):
        code = textwrap.dedent(inspect.getsource(value.fn))
        names = {n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name)}
        known = value.fn.__globals__
        for used in sorted(names & set(known) - {name}):
            _collect(known[used], used, lines)
        lines[name] = code
    elif isinstance(value, int | float | str):
        lines[name] = f"{name} = {value!r}"


def _is_importable(value) -> bool:
    """Whether a module that is no notebook has this very function or class."""
    home = getattr(value, "fn", value)
    module, name = (getattr(home, a, None) for a in ("__module__", "__name__"))
    if not module or not name or module == "__main__" or module not in sys.modules:
        return False
    return getattr(importlib.import_module(module), name, None) is value


# The second process -------------------------------------------------------------------


def launch_of(kernel) -> Launch:
    """The kernel in the shapes that are compiled; its tensors have no memory."""
    shapes = dict(x=(SIZE, SIZE), W=(SIZE, SIZE), A=(RANK, SIZE), B=(SIZE, RANK))
    shapes["y"] = SIZE, SIZE
    tensors = {
        name: matrix(empty(*shape, dtype=torch.bfloat16))
        for name, shape in shapes.items()
    }
    sizes = dict(m_size=SIZE, n_size=SIZE, k_size=SIZE, r=RANK, scale=0.5)
    grid = SIZE // TILES["BM"], SIZE // (TILES["BN"] * TILES["SWEEP"])
    return Launch(kernel, grid, tensors | sizes, TILES, WARPS, STAGES)


def answer_for(kernel) -> dict:
    """What each target says; or of the first that refuses: target, line, reason."""
    from ..kernels import gpu_targets

    facts = {}
    for target in TARGETS:
        try:
            facts[target] = gpu_targets.compiled(launch_of(kernel), target)
        except Exception as error:
            return {"target": target} | _explained(error)
    return facts


def _explained(error: Exception) -> dict[str, str]:
    """The line of the learner's kernel, and the innermost reason."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    source = getattr(error, "src", None) or ""
    at = getattr(getattr(error, "node", None), "lineno", 0)
    lines = source.splitlines()
    line = lines[at - 1].strip() if 0 < at <= len(lines) else ""
    text = getattr(cause, "error_message", None) or str(cause)
    reason = next((x for x in reversed(text.strip().splitlines()) if x.strip()), "")
    return {"line": line, "reason": reason.strip() or type(cause).__name__}


def main(folder: str, name: str) -> None:
    """Compile the kernel of that name in FOLDER/answer.py; write its answer there."""
    kernel = getattr(importlib.import_module(ANSWER), name)
    text = json.dumps(answer_for(kernel))
    (Path(folder) / RESULT).write_text(text, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
