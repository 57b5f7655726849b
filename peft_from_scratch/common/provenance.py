"""Where a number came from: code, packages, machine, seed. Result files say it."""

import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "datasets", "safetensors", "peft-from-scratch")
ROOT = Path(__file__).parents[1]  # of the repository, where there is one
# What only shows results, teaches, or runs other experiments: no figure of compare.py
# changes where these do. Files and folders of the package, by their names.
SHOWING = {
    *("columns.py", "costs.py", "doctor.py", "figures.py", "findings.py"),
    *("block.py", "block_words.py", "curves.py"),
    *("plotting.py", "progress.py", "readme.py", "report.py"),
    *("__main__.py", "chat.py", "commands.py"),
    *("cards.py", "checks", "exercises.py", "ghost.py", "lesson.py"),
    *("corpus.py", "pretrain.py", "tiny_card.py"),
    *("claim.py", "experiments", "ledger.py", "runs.py"),
}


def provenance(*, seed: int, device: torch.device | str = "cpu") -> dict:
    """What a reader needs to judge or repeat a result, as JSON can hold it."""
    commit, changed = git_commit()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "changed": changed,
        "machine": f"{processor()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB",
        "device": device_name(torch.device(device)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def digest(*parts) -> str:
    """Sixteen digits that tell one value, as JSON can hold it, from another."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest() -> str:
    """The digest of the package's code, but for what is SHOWING."""
    package = Path(__file__).parent
    files = sorted(package.rglob("*.py"))
    counted = [f for f in files if f.relative_to(package).parts[0] not in SHOWING]
    return digest(*(f.read_text("utf-8") for f in counted))


def git_commit() -> tuple[str | None, bool | None]:
    """(commit, whether files differ from it); (None, None) outside a git checkout."""
    try:
        return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    """The machine's memory in GiB; NaN where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return float("nan")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU (MPS)" if device.type == "mps" else device.type


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
