"""docs/memory_questions.md: questions from issue trackers, each answered by a bill.

    python -m tools.memory_questions

The page's figures are what its own commands print with --json; none is typed.
"""

import contextlib
import io
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from peft_from_scratch.cli.command_line import main as command
from peft_from_scratch.common import atomic, provenance
from peft_from_scratch.common.marks import between_marks, markdown
from peft_from_scratch.common.units import GB

PAGE = provenance.ROOT / "docs" / "memory_questions.md"
CONFIGS = "data/configs"
SHOWN = {
    "weights": "weights",
    "reference": "reference",
    "adapter": "adapter",
    "gradients": "gradients",
    "master": "master",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "keys_and_values": "keys and values",
}


@dataclass(frozen=True)
class Question:
    """A question that somebody had.

    asks    in a sentence
    thread  its address
    calls   {label: arguments of `budget`}; the first is the one to run
    says    the answer, from the JSON of the calls in their order
    """

    asks: str
    thread: str
    calls: dict[str, str]
    says: Callable[..., str]


def gb(count: float) -> str:
    return f"{count / GB:,.1f} GB"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def moving(bill: dict) -> str:
    """Share of the peak that activations and logits have, where they are at it."""
    return share(bill["activations"] + bill["logits"], bill["peak"])


QUESTIONS = (
    Question(
        "LoRA at 8192 tokens takes nearly as much memory as full fine-tuning. Why?",
        "https://github.com/huggingface/peft/issues/1514",
        {
            "LoRA, 8192 tokens": "tinyllama-1.1b --method lora --r 64 --seq 8192",
            "full, 8192 tokens": "tinyllama-1.1b --method full --seq 8192",
            "full in bfloat16": "tinyllama-1.1b --method full --dtype bf16-pure "
            "--seq 8192",
            "LoRA, 512 tokens": "tinyllama-1.1b --method lora --r 64 --seq 512",
            "full, 512 tokens": "tinyllama-1.1b --method full --seq 512",
        },
        lambda long, full, pure, short, short_full: (
            f"LoRA saves gradients, master copy and optimizer states: "
            f"{gb(full['total'] - long['total'])}, at any length. It saves hardly any "
            "activation: a gradient has to pass through every frozen layer. At 8192 "
            f"tokens activations and logits are {moving(long)} of LoRA's peak. So LoRA "
            f"needs {share(long['peak'], full['peak'])} of what full fine-tuning needs "
            f"in mixed precision, and {share(long['peak'], pure['peak'])} of what it "
            "needs with weights and states in bfloat16; at 512 tokens, "
            f"{share(short['peak'], short_full['peak'])}. Checkpointing and a loss in "
            "chunks save what LoRA does not."
        ),
    ),
    Question(
        "QLoRA takes more memory than LoRA in bfloat16, since "
        "`prepare_model_for_kbit_training` is called. Why?",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1569",
        {
            "QLoRA, the rest in float32": "ministral-8b --method qlora --dtype float32 "
            "--seq 4096",
            "QLoRA, bfloat16": "ministral-8b --method qlora --seq 4096",
            "LoRA, bfloat16": "ministral-8b --method lora --seq 4096",
        },
        lambda wide, four, lora: (
            "That function makes what is not in four bits float32: embedding, head and "
            "norms, and with them every activation. Four bits save "
            f"{gb(lora['weights'] - four['weights'])} of weights. Float32 adds "
            f"{gb(wide['weights'] - four['weights'])} to the weights, and "
            f"{gb(wide['activations'] - four['activations'])} to the activations of "
            f"4096 tokens: {gb(wide['peak'])} instead of {gb(four['peak'])}, and more "
            f"than LoRA's {gb(lora['peak'])}. With the embedding in bfloat16, as here "
            "by default, QLoRA is the smallest of the three. (The thread measures "
            "81.1, 63.1 and 72.8 GB on its machine, in the same order.)"
        ),
    ),
    Question(
        "Why does loading take twice the size of the model?",
        "https://github.com/zai-org/CogVLM/issues/320",
        {"loading, then generating": "llama-7b --method full --phase generate"},
        lambda bill: (
            f"The weights are {gb(bill['weights'])}. Read tensor by tensor, loading "
            f"peaks at {gb(bill['timeline']['loading'])}. A loader that first fills a "
            "model with random numbers and then reads a whole state dict holds both: "
            f"that is the bill's `high`, {gb(bill['high'])}."
        ),
    ),
    Question(
        "Full fine-tuning of a 7B model runs out of memory on an A100 of 80 GB. What "
        "would fit?",
        "https://github.com/tatsu-lab/stanford_alpaca/issues/56",
        {"full": "llama-7b --method full --fit 80GB"},
        lambda bill: (
            f"{gb(bill['peak'])} are needed, at the {bill['peak_moment']}: 16 bytes "
            f"for each of {bill['parameters'] / 1e9:.2f} billion parameters, before "
            f"the first activation. {_fits(bill)}"
        ),
    ),
    Question(
        "With LoRA, ZeRO-2 and ZeRO-3 take nearly the same memory on each GPU. Are "
        "frozen weights not divided?",
        "https://github.com/deepspeedai/DeepSpeed/issues/5109",
        {
            "LoRA, ZeRO-3": "llama-7b --method lora --zero 3 --ranks 8",
            "LoRA, ZeRO-2": "llama-7b --method lora --zero 2 --ranks 8",
            "LoRA, one GPU": "llama-7b --method lora",
        },
        lambda three, two, one: (
            "Stages 1 and 2 divide what belongs to trained parameters, and LoRA has "
            "little of that: ZeRO-2 on 8 GPUs saves "
            f"{gb(one['peak'] - two['peak'])} of {gb(one['peak'])} on each. Stage 3 "
            "divides weights, and should divide frozen ones too: "
            f"{gb(two['weights'])} become {gb(three['weights'])}, and "
            f"the peak {gb(three['peak'])}. Where stage 3 shows the figure of stage 2, "
            "the frozen weights were not divided."
        ),
    ),
    Question(
        "DPO needs two models. Would one be enough?",
        "https://github.com/huggingface/trl/issues/624",
        {
            "LoRA": "llama-7b --phase dpo --method lora",
            "full": "llama-7b --phase dpo --method full",
        },
        lambda lora, full: (
            "With adapters, yes: the reference is the same model with its adapters "
            "off, read without keeping anything, and there are no weights for it. With "
            f"full fine-tuning it is a second model, {gb(full['reference'])} of the "
            f"{gb(full['peak'])}. The reference's own forward pass peaks at "
            f"{gb(lora['timeline']['reference'])}, below the {gb(lora['peak'])} of the "
            "step. What a pair does cost is its two rows."
        ),
    ),
    Question(
        "Sampled answers pass no gradient back. Why does GRPO need more memory the "
        "more of them are generated?",
        "https://github.com/om-ai-lab/VLM-R1/issues/137",
        {
            "8 answers": "llama-7b --phase group --group 8 --seq 1024 --labels 512",
            "4 answers": "llama-7b --phase group --group 4 --seq 1024 --labels 512",
        },
        lambda eight, four: (
            "Sampling itself passes no gradient, and it is cheap: with 8 answers its "
            f"keys and values are {gb(eight['keys_and_values'])}, and they are gone "
            "when the step begins. But then the policy reads all answers again and "
            "learns from them, and keeps activations of each: "
            f"{gb(eight['activations'])} for 8, {gb(four['activations'])} for 4. "
            "Smaller micro-batches of one group, with their gradients added up, cost "
            "less."
        ),
    ),
    Question(
        "A mixture of experts uses a quarter of its parameters for a token. Why are "
        "all of them in memory, and why do four bits save so little?",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1780",
        {
            "QLoRA": "mixtral-8x7b --method qlora",
            "LoRA": "mixtral-8x7b --method lora",
        },
        lambda four, lora: (
            f"A token uses {four['parameters_active'] / 1e9:.1f} of "
            f"{four['parameters'] / 1e9:.1f} billion parameters, but the next token "
            f"may use others: all {gb(lora['weights'])} are there. transformers keeps "
            "the experts of a layer as one stacked tensor and not as linear layers, "
            "and what quantizes linear layers does not see it: in four bits the "
            f"weights are still {gb(four['weights'])}. (Another thread asks for [the "
            "experts alone](https://github.com/oobabooga/textgen/issues/7208).)"
        ),
    ),
)


def _fits(bill: dict) -> str:
    """The single changes after which it fits."""
    fit = bill["fit"]
    names = [c["name"] for c in fit["changes"] if c["peak"] <= fit["bytes"]]
    return f"Each of these alone makes it fit: {', '.join(names)}."


def asked(arguments: str) -> dict:
    """The JSON that `budget` prints."""
    name, *more = shlex.split(arguments)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = command(["budget", "--config", place(name), *more, "--json"])
    if status:
        raise RuntimeError(f"budget {arguments}: exit status {status}")
    return json.loads(out.getvalue())


def place(name: str) -> str:
    return str(provenance.ROOT / CONFIGS / f"{name}.json")


def answers() -> str:
    """All that is between the marks of the page."""
    return "\n\n".join(map(_answer, QUESTIONS)) + "\n"


def _answer(question: Question) -> str:
    bills = {label: asked(call) for label, call in question.calls.items()}
    name, *more = next(iter(question.calls.values())).split(" ", 1)
    shown = " ".join((f"{CONFIGS}/{name}.json", *more))
    rows = {p: w for p, w in SHOWN.items() if any(b.get(p) for b in bills.values())}
    lines = [
        [label, *(f"{bill.get(part, 0) / GB:,.1f}" for part in rows), _peak(bill)]
        for label, bill in bills.items()
    ]
    return "\n\n".join(
        (
            f"## {question.asks}",
            f"[{_short(question.thread)}]({question.thread})",
            f"    python -m peft_from_scratch budget --config {shown}",
            question.says(*bills.values()),
            markdown(("GB", *rows.values(), "peak"), lines),
        )
    )


def _peak(bill: dict) -> str:
    return f"{bill['peak'] / GB:,.1f} ({bill['peak_moment']})"


def _short(address: str) -> str:
    owner, repository, _, number = address.split("/")[-4:]
    return f"{owner}/{repository}#{number}"


def main() -> None:
    page = between_marks(PAGE.read_text("utf-8"), answers(), "answers")
    with atomic.new_file(PAGE) as partial:
        partial.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
