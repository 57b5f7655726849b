"""The command line: doctor, compare, train, chat, serve, merge, budget, ledger, work.

Nothing here imports torch until a command runs: the tables of methods and of candidates
import none, and other names that the library has as well (templates, bases) are written
out, and a test compares them. An option that is not given is None, and the library's
own default counts.
"""

import argparse
import codecs
import os
import sys
from pathlib import Path

from ..comparison.candidates import RELATIVES, USUAL
from ..methods import METHODS

TEMPLATES = ("chat", "raw")
OF_DATA = ("prompt", "completion", "config", "scorer", "instruction")  # of load_task
RESUMABLE = ("compare", "train", "ledger")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
BASES = ("tiny", "smollm2")  # the bases that claims are judged at
ENGINES = ("zero", "fsdp2", "deepspeed")  # of parallel/
RECIPES = ("mixed", "float32", "autocast", "bf16-pure")  # of a memory bill
PHASES = ("train", "evaluate", "generate", "dpo", "group")  # of the same


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status; a foreseen error is a sentence."""
    _replace_what_cannot_be_shown()
    options = parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        resumable = options.name in RESUMABLE
        on = " The same command goes on where this one was." if resumable else ""
        print(f"\nStopped.{on}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        advice = _advice(str(error))
        if not advice:
            raise  # a bug, whose traceback is wanted
        print(f"{type(error).__name__}: {error}. {advice}", file=sys.stderr)
        return 1


def _replace_what_cannot_be_shown() -> None:
    """Make terminals, pipes and logs that are not UTF-8 show ? for a letter they lack.

    Otherwise a run of an hour ends in a UnicodeEncodeError when it prints its table: in
    cp1252, where Windows puts a pipe, there are no lines to draw one with.
    """
    codecs.register_error("bytes of names, else ?", _shown)
    lenient = {"strict": "replace", "surrogateescape": "bytes of names, else ?"}
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in lenient:
            # Line by line, so that a log file says at once what a terminal would.
            stream.reconfigure(errors=lenient[stream.errors], line_buffering=True)


def _shown(error: UnicodeError) -> tuple[bytes, int]:
    """What is written for letters that an encoding lacks, and where to go on.

    The name of a file that is no UTF-8 comes as half surrogate pairs, each of them a
    byte: where Python would write these bytes (surrogateescape), they are written.
    """
    letters = map(ord, error.object[error.start : error.end])
    written = (i - 0xDC00 if 0xDC80 <= i <= 0xDCFF else ord("?") for i in letters)
    return bytes(written), error.end


def _advice(error: str) -> str | None:
    """What to do about a RuntimeError: torch has no other, so that its words must tell.

    None for one that nobody foresaw.
    """
    if "did not move" in error:
        return "On the command line: try a larger --lr"
    if "out of memory" in error or "can't allocate memory" in error:
        saving = "train also takes --checkpointing, and --chunk 256"
        return f"Try a smaller --batch, or a larger --accumulate; {saving}"
    return None


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
    _serve(commands)
    _merge(commands)
    _budget(commands)
    _ledger(commands)
    _work(commands)
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
    command.add_argument("--task", help="orders, terms, or as --data")
    command.add_argument(
        "--data",
        metavar="FILE",
        help="your own rows: a .jsonl file with the keys prompt and completion or "
        "messages, a folder with a data set, or hub:owner/name; the results go to "
        "out/FILE",
    )
    _own_rows(command)
    command.add_argument("--methods", help=f"some of {','.join((*USUAL, *RELATIVES))}")
    command.add_argument(
        "--family",
        action="store_true",
        help="the methods' relatives too: the FAMILY=1 of make",
    )
    command.add_argument("--seeds", help="seeds, such as 0,1,2")
    command.add_argument("--rows", type=int, help="test rows")
    command.add_argument("--steps", type=int, help="optimizer steps")
    command.add_argument("--batch", type=int, help="rows of an optimizer step")
    _paged(command)
    _max_tokens(command)
    command.add_argument(
        "--template", choices=TEMPLATES, help="for every row; by default as searched"
    )
    command.add_argument("--out", help="folder for the results")
    command.add_argument(
        "--tune",
        action="store_true",
        help="search the settings first, on rows of their own (hours on two cores)",
    )
    _base(command)
    _dtype(command)
    command.set_defaults(run=run_compare)


def _train(commands) -> None:
    command = _command(
        commands, "train", "fine-tune on your own rows, save the adapter"
    )
    command.add_argument(
        "--data",
        required=True,
        help="a task's name (orders, terms), the path of a .jsonl file with the keys "
        "prompt and completion or messages (of several turns), a folder with a data "
        "set, or hub:owner/name",
    )
    _own_rows(command)
    names = [method.name for method in METHODS]
    command.add_argument("--method", choices=names, default="lora")
    command.add_argument("--out", help="folder for the adapter")
    command.add_argument(
        "--show-masks",
        type=int,
        metavar="N",
        help="print N training rows with the tokens marked that are learned, check all "
        "rows, and end there: needs no --out",
    )
    command.add_argument("--lr", type=float, help="highest learning rate")
    command.add_argument("--steps", type=int, default=50)
    command.add_argument("--batch", type=int, default=8, help="rows of a step")
    _paged(command)
    command.add_argument(
        "--accumulate", type=int, default=1, help="micro-batches a step"
    )
    command.add_argument(
        "--checkpointing",
        action="store_true",
        default=None,
        help="compute each layer twice, for fewer bytes of activations",
    )
    command.add_argument(
        "--chunk",
        type=int,
        metavar="TOKENS",
        help="logits of so many label tokens at a time, for fewer bytes",
    )
    command.add_argument(
        "--buckets",
        type=int,
        metavar="N",
        help="divide the rows by length into N groups; a step's rows come from one",
    )
    _max_tokens(command)
    command.add_argument("--template", choices=TEMPLATES, default="chat")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--alpha", type=float, help="scale is alpha / r (lora's kin)")
    _sizes(command)
    _base(command)
    _dtype(command)
    command.add_argument(
        "--engine",
        choices=ENGINES,
        help="train on several ranks: our own ZeRO, torch's fully_shard, or DeepSpeed",
    )
    command.add_argument(
        "--stage", type=int, choices=(1, 2, 3), help="of ZeRO (zero: 1, deepspeed: 2)"
    )
    command.add_argument(
        "--ranks",
        type=int,
        help="processes to start on this machine; on several machines torchrun does",
    )
    command.set_defaults(run=run_train)


def _chat(commands) -> None:
    command = _command(
        commands, "chat", "talk to a base model, or to it with an adapter"
    )
    command.add_argument("--adapter", help="folder of a saved adapter")
    as_trained = "by default as the adapter was trained"
    command.add_argument("--system", help=f"the instruction; {as_trained}")
    command.add_argument("--template", choices=TEMPLATES, help=as_trained)
    _base(command)
    _dtype(command)
    command.set_defaults(run=run_chat)


def _serve(commands) -> None:
    command = _command(
        commands, "serve", "an OpenAI-style server for many adapters on one base"
    )
    command.add_argument(
        "--adapters",
        required=True,
        metavar="DIR",
        help="folder of adapters: its subfolders, each the name of a model",
    )
    command.add_argument("--host", default="127.0.0.1")
    command.add_argument("--port", type=int, default=8000)
    command.add_argument(
        "--keys", metavar="FILE", help="JSON of who may ask; by default everyone"
    )
    command.add_argument(
        "--allow-loading",
        action="store_true",
        help="let clients load and unload adapters of DIR while it serves",
    )
    command.add_argument(
        "--budget", default="256MB", help="of the adapters in memory, such as 256MB"
    )
    command.add_argument("--rows", type=int, default=16, help="requests in a batch")
    command.add_argument("--queue", type=int, default=64, help="requests that wait")
    command.add_argument(
        "--timeout", type=float, default=300.0, help="seconds for an answer, at most"
    )
    _base(command)
    _dtype(command)
    command.set_defaults(run=run_serve)


def _merge(commands) -> None:
    command = _command(
        commands, "merge", "fold an adapter into its base, save the model"
    )
    command.add_argument("--adapter", required=True, help="folder of a saved adapter")
    command.add_argument("--out", help="new folder for the merged model")
    command.add_argument(
        "--gguf",
        metavar="FILE",
        help="new GGUF file with the merged model and its tokenizer, which llama.cpp "
        "runs: a Llama such as smollm2 or tiny, with a byte-level BPE. transformers "
        "reads it back to the same logits; anything else is refused and stays a folder",
    )
    command.add_argument(
        "--gguf-dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the matrices in the GGUF file; float32 is exact and the largest",
    )
    _base(command)
    command.set_defaults(run=run_merge)


def _budget(commands) -> None:
    command = _command(
        commands, "budget", "the memory bill of a training step, from a config.json"
    )
    command.add_argument(
        "--config",
        required=True,
        metavar="DIR_OR_ID",
        help="a folder with a config.json, or the file; tiny, smollm2, or a hub id "
        "whose configuration was fetched before: nothing is downloaded",
    )
    names = [method.name for method in METHODS]
    command.add_argument("--method", choices=names, default="lora")
    command.add_argument(
        "--dtype",
        choices=RECIPES,
        help="of what the base trains; mixed, the default: bfloat16 weights and "
        "gradients, float32 master copy and AdamW states, 16 bytes a parameter. "
        "Adapters are float32 in each",
    )
    command.add_argument(
        "--batch",
        type=int,
        help="rows of a micro-batch (1); pairs with --phase dpo, prompts with group",
    )
    command.add_argument("--seq", type=int, default=512, help="tokens of a row (512)")
    command.add_argument(
        "--labels",
        type=int,
        metavar="TOKENS",
        help="of a row, those that have a label or are sampled; all but the first",
    )
    command.add_argument(
        "--attention",
        choices=("sdpa", "eager"),
        help="sdpa, the default: in one kernel; eager keeps tokens² probabilities",
    )
    command.add_argument(
        "--checkpointing", action="store_true", help="compute each layer twice"
    )
    command.add_argument(
        "--chunk", type=int, metavar="TOKENS", help="logits of so many tokens at a time"
    )
    command.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="that trains; cuda, the default. On a CPU, dropout keeps more",
    )
    command.add_argument("--zero", type=int, choices=range(4), help="stage of ZeRO")
    command.add_argument("--ranks", type=int, help="devices of the run (1)")
    _sizes(command)
    command.add_argument(
        "--phase",
        choices=PHASES,
        help="a training step, the default; one forward pass; generating, with its "
        "keys and values; a step of DPO; sampling a group of answers and learning from "
        "them",
    )
    command.add_argument(
        "--group",
        type=int,
        metavar="ANSWERS",
        help="to a prompt, with --phase group (8)",
    )
    command.add_argument(
        "--fit",
        metavar="SIZE",
        help="16GB for example: does it fit, and which change saves most",
    )
    command.add_argument(
        "--json", action="store_true", help="one JSON object, in bytes"
    )
    command.add_argument("--out", metavar="FILE.png", help="draw the timeline")
    command.set_defaults(run=run_budget)


def _ledger(commands) -> None:
    command = _command(
        commands, "ledger", "the textbook's claims, and what their runs say of them"
    )
    command.add_argument("ids", nargs="*", metavar="ID", help="claims; by default all")
    command.add_argument(
        "--run",
        dest="make_runs",  # `run` is the command's own function
        action="store_true",
        help="make the runs that are missing first",
    )
    command.add_argument(
        "--shard",
        metavar="i/N",
        help="with --run: worker i of N, counted from 0, makes its part of them, and "
        "judges nothing",
    )
    command.add_argument(
        "--base", choices=BASES, help="for this base model only; by default for both"
    )
    command.add_argument(
        "--page", action="store_true", help="write all claims to out/ledger.html too"
    )
    command.set_defaults(run=run_ledger)


def _work(commands) -> None:
    command = _command(
        commands, "work", "your own copies of the notebooks, with blanks, in work/"
    )
    command.add_argument(
        "number", nargs="?", metavar="NN", help="a notebook's, such as 04; else all"
    )
    command.add_argument(
        "--restore",
        action="store_true",
        help="make this one anew; your old one stays beside it, under a dated name",
    )
    command.set_defaults(run=run_work)


def _command(commands, name, text):
    command = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
    command.set_defaults(name=name)
    return command


def _paged(command) -> None:
    command.add_argument(
        "--paged",
        type=float,
        metavar="SHARE",
        help="keep this share of AdamW's states in memory, 0.25 for a quarter, and the "
        "others in a file",
    )


def _own_rows(command) -> None:
    """What a generated task has, and rows of one's own have not."""
    command.add_argument(
        "--scorer",
        help="of rows of your own, what counts as right: exact (by default), json, "
        "label, rouge-l, or the path of a .py file with score(answer, completion)",
    )
    command.add_argument(
        "--instruction",
        help="of rows of your own: what to do, in a sentence, for every row",
    )
    of_data_sets = "of a hub: data set or a folder: "
    command.add_argument("--prompt", help=f"{of_data_sets}the column of the prompts")
    command.add_argument(
        "--completion", help=f"{of_data_sets}the column of the completions"
    )
    command.add_argument("--config", help=f"{of_data_sets}one of its configurations")


def _sizes(command) -> None:
    """Sizes of what is injected, which the methods have or have not."""
    command.add_argument("--r", type=int, help="rank (lora and its kin)")
    command.add_argument("--targets", help="preset or name (the same, and ia3)")
    command.add_argument("--m", type=int, help="units of a bottleneck (houlsby)")
    command.add_argument("--n", type=int, help="trained positions (prefix, prompt)")


def _max_tokens(command) -> None:
    command.add_argument(
        "--max-tokens", type=int, help="longest row; a longer one is an error, not cut"
    )


def _base(command) -> None:
    command.add_argument(
        "--base", default="smollm2", help="smollm2, a hub id (owner/name) or a folder"
    )
    command.add_argument(
        "--device", help="cpu, cuda or mps; by default the fastest here"
    )


def _dtype(command) -> None:
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the base; auto, the default: bfloat16 where the machine is fast in it",
    )


def run_doctor(options) -> int:
    from .doctor import run

    return run()


def run_compare(options) -> None:
    from ..comparison import report
    from ..comparison.compare import compare
    from ..comparison.plan import Plan
    from .commands import given

    names = ("base", "task", "rows", "steps", "batch", "paged", "template", "device")
    names += ("dtype", "out", "max_tokens", *OF_DATA)
    chosen = given(options, *names)
    if options.data is not None:
        chosen = own_data(options.data, chosen)
    if options.family and options.methods is not None:
        raise ValueError("--family and --methods exclude each other: name them all")
    if options.family:
        chosen["methods"] = (*USUAL, *RELATIVES)
    if options.methods is not None:
        methods = options.methods.split(",")
        chosen["methods"] = tuple(method.strip() for method in methods)
    if options.seeds is not None:
        chosen["seeds"] = seeds_in(options.seeds)
    plan = Plan(**chosen)
    print(report.table(compare(plan, tune=options.tune)))
    print(f"\nThe page to look at and to pass on: {Path(plan.out, 'compare.html')}")


def own_data(data: str, chosen: dict) -> dict:
    """The plan's fields for rows of one's own, whose results have a folder of theirs.

    Raises  ValueError  a task was named as well, or the data is none
    """
    if "task" in chosen:
        raise ValueError("--data and --task exclude each other: name one of them")
    data = os.path.expanduser(data)  # make hands ~ over as it is
    if data.startswith("hub:"):
        name = data.removeprefix("hub:").replace("/", "-")
    elif data.endswith(".jsonl") or Path(data).is_dir():
        name = Path(data).resolve().stem
    else:
        raise ValueError(
            f"--data {data}: a .jsonl file is needed, a folder with a data set, or "
            "hub: and an id"
        )
    return {"out": str(Path("out", name)), **chosen, "task": data}


def seeds_in(text: str) -> tuple[int, ...]:
    """The seeds of "0,1,2"."""
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise ValueError(
            f"seeds={text!r}: whole numbers with commas between them, such as 0,1,2"
        ) from None


def run_train(options) -> None:
    from .commands import fine_tune
    from .ranks import fine_tune_on_ranks

    asked = options.engine, options.stage, options.ranks
    several = any(each is not None for each in asked) or several_ranks()
    if several and options.show_masks is None:
        fine_tune_on_ranks(options)
    else:
        fine_tune(options)


def several_ranks() -> bool:
    """Whether torchrun, or train itself, started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def run_chat(options) -> None:
    from .chat import chat

    chat(options)


def run_serve(options) -> None:
    from .serve import serve

    serve(options)


def run_merge(options) -> None:
    from .commands import merge_to_folder

    merge_to_folder(options)


def run_budget(options) -> None:
    from .budget import budget

    budget(options)


def run_ledger(options) -> None:
    from ..ledger import verdicts

    ids = options.ids or list(verdicts.CLAIMS)
    claims = [verdicts.claim(id) for id in ids]  # an unknown one is said before any run
    bases = (options.base,) if options.base else BASES
    if options.shard is not None:
        _make_part(options, ids, bases)
        return
    if options.make_runs:
        verdicts.make_runs(ids, bases)
    rows = verdicts.rows()
    print(verdicts.table([row for row in rows if row["id"] in ids], bases))
    for claim in claims:
        for reason in verdicts.reasons(claim, bases):
            print(f"  {reason}")
    _keep(rows)
    if options.page:
        from ..ledger import page

        print(f"\nthe page: {page.write(rows).absolute()}")


def _keep(rows: list[dict]) -> None:
    """Write the ledger where it changed, and say which rules did."""
    from ..ledger import verdicts

    for text in verdicts.replaced_rules(rows):
        print(f"\n{text}")
    if verdicts.write(rows):
        change = "is written anew: the runs say something else than it did"
        print(f"\n{verdicts.FILE} {change}")


def _make_part(options, ids, bases) -> None:
    """One worker's part of the runs; the verdicts are for whoever has all of them."""
    from ..ledger import verdicts
    from ..ledger.workers import part_of

    mine = part_of(options.shard)
    if not options.make_runs:
        raise ValueError(f"--shard {options.shard} divides runs to make: add --run")
    verdicts.make_runs(ids, bases, mine)
    judged = [verdicts.judge(verdicts.claim(id), base) for id in ids for base in bases]
    left = sum(len(each.missing) for each in judged)
    print(f"worker {options.shard} is done; {left} runs are missing, of other workers")


def run_work(options) -> None:
    from ..course.exercises import work

    work(options.number, restore=options.restore)
