"""One tenant that floods the server beside nine quiet ones: who waits, and how long.

    python benchmarks/fair_sharing.py [--turns 600] [--record]

The hot tenant has HELD requests in the queue at any time. A quiet one asks, reads its
answer, pauses for PAUSE turns and asks again. Four rows are written at once. The same
traffic meets the engine's two policies, fair and first come, and for comparison the
quiet tenants have the server to themselves.

All times are turns of the engine (serving/engine.py): one decoding step of every row.
So the figures are the same on every machine, and a busy one changes nothing. With
--record the picture goes into docs/fair_sharing.svg as well.
"""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import side_by_side
import torch
from matplotlib.figure import Figure

from peft_from_scratch import AdapterPool, load_model
from peft_from_scratch.common.atomic import new_file
from peft_from_scratch.common.provenance import provenance
from peft_from_scratch.plotting import theme
from peft_from_scratch.plotting.draw import frame, name_y
from peft_from_scratch.serving.engine import Engine
from peft_from_scratch.serving.requests import Request
from peft_from_scratch.serving.waiting import POLICIES

QUIET, HELD, PAUSE, ROWS, SEED = 9, 40, 20, 4, 0
PROMPT, ANSWER = 8, 12
HOT, ALONE = "hot", "quiet ones alone"
FIGURE = Path(__file__).parents[1] / "docs" / "fair_sharing.svg"
COLORS = {"fair": theme.BLUE, "first come": theme.ORANGE, ALONE: theme.GREY}


class Traffic:
    """The tenants at the engine's door.

    waits  {tenant: turns from each request to its first token}
    """

    def __init__(self, engine: Engine, hot: bool):
        self.engine, self.turn, self.open = engine, 0, Counter()
        self.waits: dict[str, list[int]] = defaultdict(list)
        self.next = {f"quiet {i + 1}": 2 * i for i in range(QUIET)}
        self.hot = hot

    def arrive(self) -> None:
        """Every request that is due at this turn."""
        while self.hot and self.open[HOT] < HELD:
            self._ask(HOT)
        for tenant, due in self.next.items():
            if due is not None and due <= self.turn:
                self.next[tenant] = None
                self._ask(tenant)

    def _ask(self, tenant: str) -> None:
        began, first = self.turn, []

        def listen(piece) -> None:
            if piece.tokens and not first:
                first.append(self.turn)
                self.waits[tenant].append(self.turn - began)
            if piece.reason is not None:
                self.open[tenant] -= 1
                if tenant != HOT:
                    self.next[tenant] = self.turn + PAUSE

        self.open[tenant] += 1
        self.engine.submit(Request((1,) * PROMPT, None, ANSWER, tenant=tenant), listen)


def run(base: str, policy: str, hot: bool, turns: int) -> dict:
    """What each tenant was served, and how long it waited, under one policy."""
    model, tokenizer = load_model(base, device="cpu", dtype="float32")
    pool = AdapterPool(model, budget_bytes=1)
    engine = Engine(model, tokenizer, pool, rows=ROWS, queue=10 * HELD, policy=policy)
    traffic = Traffic(engine, hot)
    for traffic.turn in range(turns):
        traffic.arrive()
        engine.turn()
    served = engine.served
    engine.close(0)
    pool.slots.remove()
    quiet = [
        wait for name, waits in traffic.waits.items() if name != HOT for wait in waits
    ]
    return {
        "policy": policy if hot else ALONE,
        "served": served,
        "hot_share": served.get(HOT, 0) / sum(served.values()),
        "quiet_answers": len(quiet),
        "quiet_waits": sorted(quiet),
        "hot_waits": sorted(traffic.waits[HOT]),
    }


def at(values: list[int], share: float) -> int:
    """The value that this share of them does not exceed."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0


def line(row: dict) -> str:
    waits = row["quiet_waits"]
    return (
        f"{row['policy']:18}{row['hot_share']:8.0%} of the tokens to the hot tenant; "
        f"{row['quiet_answers']:4} quiet requests, first token after {at(waits, 0.5)} "
        f"turns in the median, {at(waits, 0.95)} at 95 %"
    )


def figure(rows: list[dict], width: float = 7.4) -> Figure:
    """For each policy, the share of quiet requests by how long they waited."""
    with theme.style():
        page, axes = frame(
            "Beside a hot tenant, a quiet request waits for "
            + " and ".join(
                f"{at(row['quiet_waits'], 0.5)} turns ({row['policy']})"
                for row in rows
                if row["policy"] != ALONE
            ),
            f"{QUIET} tenants that ask, read and pause, beside one that keeps {HELD} "
            f"requests waiting; {ROWS} rows at once. A curve shows the share of quiet "
            "requests that had their first token after so many turns of the engine.",
            width,
            2.5,
            0.55,
            theme.LIGHT,
        )
        longest = max(row["quiet_waits"][-1] for row in rows)
        for row in rows:
            waits, many = row["quiet_waits"], len(row["quiet_waits"])
            shares = [(i + 1) / many for i in range(many)]
            label = f"{row['policy']} ({many} requests answered)"
            style = dict(color=COLORS[row["policy"]], linewidth=2, label=label)
            dash = "--" if row["policy"] == ALONE else "-"
            axes.step(
                [0, *waits, longest],
                [0, *shares, 1],
                where="post",
                linestyle=dash,
                **style,
            )
        axes.set_xlabel("Turns from the request to its first token")
        axes.set_xlim(0, longest)
        axes.set_ylim(0, 1.02)
        axes.grid(axis="y")
        axes.legend(loc="center", fontsize=theme.SMALL, frameon=False)
        name_y(axes, "Share of the quiet requests")
    return page


def measure(base: str, turns: int) -> dict:
    """All of the benchmark, as JSON can hold it."""
    cells = [run(base, policy, True, turns) for policy in POLICIES]
    cells.append(run(base, POLICIES[0], False, turns))
    return {
        "benchmark": "fair_sharing",
        "base": base,
        "turns": turns,
        "rows": ROWS,
        "quiet": QUIET,
        "held": HELD,
        "pause": PAUSE,
        "prompt": PROMPT,
        "answer": ANSWER,
        "cells": cells,
        "provenance": provenance(seed=SEED, device=torch.device("cpu")),
    }


def main(arguments: list[str]) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", default="tiny", help="as load_model takes it")
    parser.add_argument("--turns", type=int, default=600, help="of the engine")
    parser.add_argument("--draw", type=Path, help="only draw this result file")
    asked = side_by_side.parsed(parser, arguments)
    if asked.draw:
        result = json.loads(asked.draw.read_text("utf-8"))
    else:
        result = measure(asked.model, asked.turns)
        print(*map(line, result["cells"]), sep="\n")
        print(side_by_side.write(result, asked.record, out=asked.out))
    file = FIGURE if asked.record else asked.out / FIGURE.name
    with new_file(file) as new:
        new.write_text(theme.svg(figure(result["cells"])), encoding="utf-8")
    print(f"drawn to {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
