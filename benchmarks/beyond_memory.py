"""Optimizer states larger than the memory that a process may have.

    python benchmarks/beyond_memory.py [--layers 16] [--budget 8]        Linux only

Three processes train the same model on the same rows, three steps of AdamW each. A
layer has 1024 x 1024 weights: 4 MiB, and 8 MiB of states. When weights and gradients
are there, the system's limit on a process's data (RLIMIT_DATA) is lowered, so that half
of the states would fit:

    torch, no limit     what the others are compared with
    torch               dies
    paged               finishes, with the same bits

A file in shared mapping is not in that limit. Where memory is really short, the system
writes parts of the file back to the disk; here it need not.
"""

import argparse
import json
import os
import subprocess
import sys
import zlib

WIDTH, ROWS, STEPS = 1024, 8, 3
MIB = 1 << 20
CANDIDATES = ("torch, no limit", "torch", "paged")
# glibc keeps freed tensors of 4 MiB in its heap, in pieces that a next one may not fit
# into, and they count; with a threshold that is set they go back to the system.
ENVIRONMENT = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}


def data_bytes() -> int:
    """What RLIMIT_DATA limits: private memory that may be written to."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def limit_data(room: int) -> None:
    """Allow so many bytes beyond what the process has now."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + room, hard))


def train(candidate: str, layers: int, budget: int) -> dict:
    """One of the processes: what it did, as JSON can hold it."""
    import torch
    from torch import nn

    if candidate == "paged":
        from peft_from_scratch import PagedAdamW

    torch.set_num_threads(1)  # a thread's stack would count
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    rows = torch.randn(ROWS, WIDTH)

    def backward() -> float:
        loss = (model(rows) - rows).square().mean()
        loss.backward()
        return loss.item()

    backward()
    # What torch imports in its first step of an optimizer would count as its states.
    first = nn.Parameter(torch.zeros(1))
    first.grad = torch.zeros(1)
    torch.optim.AdamW([first]).step()
    if candidate != "torch, no limit":
        limit_data(layers * WIDTH * WIDTH * 4)
    if candidate == "paged":
        optimizer = PagedAdamW(model.parameters(), budget_bytes=budget)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        losses.append(backward())
        optimizer.step()
    crc = 0
    for p in model.parameters():
        crc = zlib.crc32(p.detach().numpy(), crc)
    done = {"losses": losses, "crc": crc}
    if candidate == "paged":
        counters = vars(optimizer.counters)
        store = sum(row.bytes for row in optimizer.page_table())
        done |= {"counters": counters, "states": store}
    return done


def outcome(candidate: str, layers: int, budget: int) -> dict:
    """Run one candidate in a process of its own.

    Returns  what it did, or {"died": the last line that it wrote, or its signal}
    """
    command = [sys.executable, __file__, "--layers", str(layers), "--budget"]
    command += [str(budget // MIB), "--only", candidate]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return {"died": said[-1] if said else f"exit code {done.returncode}"}


def report(outcomes: dict[str, dict], layers: int, budget: int) -> str:
    weights = layers * WIDTH * WIDTH * 4
    lines = [
        f"weights {weights // MIB} MiB, gradients {weights // MIB} MiB, states "
        f"{2 * weights // MIB} MiB; room beside weights and gradients "
        f"{weights // MIB} MiB; paged: a budget of {budget // MIB} MiB"
    ]
    exact = outcomes[CANDIDATES[0]]
    for candidate, done in outcomes.items():
        if "died" in done:
            lines.append(f"{candidate:16}died: {done['died']}")
            continue
        same = "the same" if done["crc"] == exact.get("crc") else "other"
        losses = ", ".join(f"{loss:.6f}" for loss in done["losses"])
        lines.append(f"{candidate:16}finished: losses {losses}; {same} weights")
        if "counters" in done:
            counted = done["counters"]
            lines.append(
                f"{'':16}{done['states'] // MIB} MiB of states in a file, at most "
                f"{counted['peak_resident_bytes'] / MIB:.1f} MiB of them in the arena; "
                f"{counted['faults']} faults, {counted['hits']} hits, "
                f"{counted['bytes_in'] / MIB:.0f} MiB in, "
                f"{counted['bytes_out'] / MIB:.0f} MiB out"
            )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="of 4 MiB; at least 4")
    parser.add_argument("--budget", type=int, default=8, help="in MiB; default 8")
    parser.add_argument("--only", choices=CANDIDATES, help=argparse.SUPPRESS)
    asked, _ = parser.parse_known_args(arguments)  # make bench has one ARGS for all
    if asked.layers < 4 or asked.budget < 1:
        parser.error("--layers: at least 4; --budget: at least 1")
    if not sys.platform.startswith("linux"):
        print("beyond_memory.py needs RLIMIT_DATA as Linux has it; nothing was run")
        return
    settings = asked.layers, asked.budget * MIB
    if asked.only:
        print(json.dumps(train(asked.only, *settings)))
        return
    outcomes = {name: outcome(name, *settings) for name in CANDIDATES}
    print(report(outcomes, *settings))
    if "died" in outcomes["paged"] or "died" not in outcomes["torch"]:
        sys.exit("the limit did not tell the two apart on this system")


if __name__ == "__main__":
    main(sys.argv[1:])
