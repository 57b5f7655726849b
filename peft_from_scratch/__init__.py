"""Parameter-efficient fine-tuning, from scratch, to be read.

The package is a house with rooms. No import runs up this list (`make lint` holds it):

    common/      files that appear whole, checks of arguments, statistics, progress
    core/        the contract: adapters, targets, the decoder; inject, merge, remove
    nf4/  paged/      four-bit weights; AdamW within a budget of bytes
    methods/  kernels/    one file a method; LoRA's product in Triton
    files/  plotting/     adapters and quantized models on disk; figures
    models/  tasks/       base models; what is learned, and what counts as right
    training/    one plain loop, generation, evaluation
    memory/      bytes, counted and measured
    comparison/  serving/     the main job; many adapters on one base, over HTTP
    parallel/    several processes train one model: our ZeRO, FSDP2, DeepSpeed
    ledger/      the claims, their experiments, their verdicts
    course/      lessons, exercises and their checks
    cli/         the command line

Reading order: core/adapter.py (the contract), methods/lora.py (the method everyone
uses), methods/full.py (what it is measured against), the other methods (`ls methods` is
the syllabus), nf4/ before methods/qlora.py, core/decoder.py before methods/prompt.py
and prefix.py, files/ (the file format), training/loop.py (one plain loop), paged/ (its
optimizer, within a budget of bytes), comparison/ (the main job), kernels/.

Nothing is imported before it is used: `import peft_from_scratch` takes milliseconds.
"""

from .common import lazy
from .methods import METHODS

__version__ = "0.1.0"

MODULES = {method.name: f"methods.{method.name}" for method in METHODS} | {
    "evaluation": "training.evaluation",
    "kernels": "kernels",
    "loss": "training.loss",
    "nf4": "nf4",
    "targets": "core.targets",
    "tasks": "tasks",
    "templates": "tasks.templates",
    "zero": "memory.zero",
}
MEMBERS = lazy.homes(
    {
        "core.adapter": ("Adapter", "CannotMerge", "remove", "trainable"),
        "core.merge": ("merge",),
        "files.exchange": ("load", "save"),
        "models.load": ("load_model",),
        "paged": ("PagedAdamW",),
        "serving.pool": ("AdapterPool",),
    }
)

__getattr__, __dir__, __all__ = lazy.names(MODULES, MEMBERS)
