"""The command line: doctor, compare, train, chat and merge."""

import argparse
import os
import sys

from .rows import ROWS, Plan

METHODS = ("lora", "full")  # what `train --method` knows


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status; a foreseen error is a sentence."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print(
            "\nStopped. The same command goes on where this one was.", file=sys.stderr
        )
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m peft_from_scratch",
        description="Fine-tuning, from scratch: measure it, do it, talk to the result.",
    )
    commands = top.add_subparsers(required=True, metavar="command")
    _doctor(commands)
    _compare(commands)
    _train(commands)
    _chat(commands)
    _merge(commands)
    return top


def _doctor(commands) -> None:
    command = _command(
        commands, "doctor", "what is here, what is missing, what it costs"
    )
    command.set_defaults(run=run_doctor)


def _compare(commands) -> None:
    command = _command(
        commands, "compare", "several methods, one table, picture and page"
    )
    plan = Plan()
    command.add_argument(
        "--task", default=plan.task, help="orders, terms, a .jsonl file …"
    )
    command.add_argument(
        "--methods",
        default=",".join(plan.methods),
        help=f"some of {','.join(row.key for row in ROWS)}",
    )
    command.add_argument("--seeds", default="0", help="seeds, such as 0,1,2")
    command.add_argument("--rows", type=int, default=plan.rows, help="test rows")
    command.add_argument(
        "--steps", type=int, default=plan.steps, help="optimizer steps"
    )
    command.add_argument("--out", default=plan.out, help="folder for the results")
    command.add_argument(
        "--tune",
        action="store_true",
        help="search the settings on validation first (half an hour on two cores)",
    )
    _base(command)
    command.set_defaults(run=run_compare)


def _train(commands) -> None:
    command = _command(
        commands, "train", "fine-tune on your own rows, save the adapter"
    )
    command.add_argument(
        "--data", required=True, help="rows.jsonl with prompt and completion, or a task"
    )
    command.add_argument("--method", choices=METHODS, default="lora")
    command.add_argument("--out", required=True, help="folder for the adapter")
    command.add_argument("--lr", type=float, help="highest learning rate")
    command.add_argument("--steps", type=int, default=50)
    command.add_argument("--batch", type=int, default=8, help="rows of a step")
    command.add_argument(
        "--accumulate", type=int, default=1, help="micro-batches a step"
    )
    command.add_argument("--template", choices=("chat", "raw"), default="chat")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--r", type=int, default=8, help="rank (lora)")
    command.add_argument(
        "--alpha", type=float, default=16, help="scale is alpha / r (lora)"
    )
    command.add_argument(
        "--targets", default="all-linear", help="preset or name (lora)"
    )
    _base(command)
    command.set_defaults(run=_from_commands("fine_tune"))


def _chat(commands) -> None:
    command = _command(
        commands, "chat", "talk to a base model, or to it with an adapter"
    )
    command.add_argument("--adapter", help="folder of a saved adapter")
    command.add_argument("--system", default="", help="the system turn")
    _base(command)
    command.set_defaults(run=_from_commands("chat"))


def _merge(commands) -> None:
    command = _command(
        commands, "merge", "fold an adapter into its base, save the model"
    )
    command.add_argument("--adapter", required=True, help="folder of a saved adapter")
    command.add_argument("--out", required=True, help="new folder for the merged model")
    _base(command)
    command.set_defaults(run=_from_commands("merge_to_folder"))


def _command(commands, name, text):
    return commands.add_parser(name, help=text, description=text.capitalize() + ".")


def _base(command) -> None:
    command.add_argument(
        "--base", default="smollm2", help="smollm2, a hub id (owner/name) or a folder"
    )
    command.add_argument(
        "--device", help="cpu, cuda or mps; by default the fastest here"
    )


def run_doctor(options) -> int:
    from .doctor import run

    return run()


def run_compare(options) -> None:
    from . import report, tuning
    from .compare import compare

    plan = Plan(
        base=options.base,
        task=options.task,
        methods=tuple(options.methods.split(",")),
        seeds=seeds_in(options.seeds),
        rows=options.rows,
        steps=options.steps,
        device=options.device,
        out=options.out,
    )
    if options.tune:
        tuning.search(plan)
    result = compare(plan)
    print(report.table(result))


def seeds_in(text: str) -> tuple[int, ...]:
    """The seeds of "0,1,2"."""
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise ValueError(
            f"seeds={text!r}: whole numbers with commas between them, such as 0,1,2"
        ) from None


def _from_commands(name: str):
    """The function of commands.py, imported only when it runs."""

    def run(options) -> None:
        from . import commands

        getattr(commands, name)(options)

    return run


if __name__ == "__main__":
    sys.exit(main())
