"""Pretrain tiny from zero: tokenizer, weights, checkpoints on the way, and its gate.

    python -m tools.pretrain                 into out/tiny; resumes there
    python -m tools.pretrain --out data/tiny

The same seed, packages and number of threads give the same model. It is written only if
it has learned what it is for: copying and answering from context. A low loss does not
say that, since most of the loss lies in what nobody can know (who, where, how many).
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peft_from_scratch.common import atomic
from peft_from_scratch.common.digest import digest
from peft_from_scratch.common.progress import bar
from peft_from_scratch.common.provenance import ROOT, provenance
from peft_from_scratch.common.quiet import quiet_transformers
from peft_from_scratch.files.pretrained import whole_model
from peft_from_scratch.models import tiny
from peft_from_scratch.tasks.templates import encode_prompt
from peft_from_scratch.tasks.world import TOLD, invented, kind_pair
from peft_from_scratch.training import checkpoint
from peft_from_scratch.training.batch import batch_of
from peft_from_scratch.training.config import History, TrainConfig, learning_rate
from peft_from_scratch.training.generation import generate
from peft_from_scratch.training.loss import accumulate_gradients, mean_loss
from peft_from_scratch.training.state import TrainState
from tools import corpus

STEPS, BATCH = 9000, 24  # documents of a step
RECIPE = dict(schedule="cosine", weight_decay=0.1, betas=(0.9, 0.95))
KEPT = (1 / 60, 1 / 24, 1 / 12, 1 / 6, 1 / 3, 7 / 12)  # of the steps: checkpoints
SAVED_EVERY = 200  # steps
TOKENIZER_TEXTS = 20_000  # documents
HELD_OUT = -1  # a step that training never takes: what it would have read is the test
EXAMS = 200  # questions of each ability
LONGEST_ANSWER = 40  # tokens
GATES = {"copying": 0.9, "answering": 0.9, "recording": 0.9, "echo": 0.95}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pretrain the model tiny from zero.")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "tiny")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    model, tokenizer, record = pretrained(options.out, options.steps, options.seed)
    record |= {
        "abilities": abilities(model, tokenizer),
        "samples": samples(model, tokenizer),
        "checkpoints": on_the_way(work_folder(options.out), tokenizer, options.seed),
    }
    print(json.dumps(record, indent=1))
    weak = [name for name, least in GATES.items() if record["abilities"][name] < least]
    if weak:
        print(f"not written: {', '.join(weak)} below the gate {GATES}")
        return 1
    write(options.out, model, tokenizer, record)
    print(f"written to {options.out}")
    return 0


@dataclass(frozen=True)
class Phase:
    """A part of pretraining, with a schedule of its own."""

    start: int  # steps before it
    recipe: TrainConfig
    mix: corpus.Mix


def phases(steps: int, seed: int) -> tuple[Phase, ...]:
    """Five sixths of the steps, then the rest: the rate rises once more."""
    first = 5 * steps // 6

    def recipe(count, lr):
        warmup = count // 40
        return TrainConfig(
            steps=count, batch=BATCH, lr=lr, warmup=warmup, seed=seed, **RECIPE
        )

    return (
        Phase(0, recipe(first, 3e-3), corpus.MIX),
        Phase(first, recipe(steps - first, 2e-3), corpus.LATER_MIX),
    )


# ------------------------------------------------------------------------- tokenizer


def new_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens, from the same kind of text.

    A word after a space, and after a quotation mark or bracket, are two different words
    to such a tokenizer. It is given texts with both, or quoted words would come to
    pieces that no task of a hundred steps can learn to spell.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.VOCABULARY,
        special_tokens=[corpus.END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    random = Random(f"tokenizer {seed}")
    texts = (corpus.document(random) for _ in range(TOKENIZER_TEXTS))
    quoted = (_quoted(random, text) for text in texts)
    tokenizer.train_from_iterator(quoted, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=corpus.END,
        pad_token=corpus.END,
        model_max_length=tiny.CONTEXT,
    )


def _quoted(random: Random, text: str) -> str:
    text = text.replace(corpus.END, "")
    if random.random() < 0.3:
        return " ".join(f'"{word}"' for word in text.split())
    return text


# -------------------------------------------------------------------------- training


def pretrained(
    out: Path, steps: int = STEPS, seed: int = 0
) -> tuple[nn.Module, PreTrainedTokenizerFast, dict]:
    """(model, tokenizer, what there is to tell of it): resumed where it stopped.

    Args
        out  where the model will go; work_folder(out) holds what is needed meanwhile
    """
    work = work_folder(out)
    tokenizer = new_tokenizer(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny.config(**_special(tokenizer)))
    parts = phases(steps, seed)
    run = _run(model, parts[0].recipe)
    settings = {"phases": [repr(p.recipe) for p in parts], "mix": _mix_digest(parts)}
    checkpoint.resume(run, work / "state", settings)
    keep = {round(share * steps) for share in KEPT}
    with bar("tiny", "step", steps, done=run.history.steps) as shown:
        while run.history.steps < steps:
            began = time.perf_counter()
            phase = max((p for p in parts if p.start <= run.history.steps), key=_start)
            _step(model, tokenizer, run, phase)
            run.history.seconds += time.perf_counter() - began
            shown.set_postfix_str(f"loss {run.history.loss[-1]:.3f}", refresh=False)
            shown.update()
            if run.history.steps in keep:
                _keep(model, tokenizer, work / f"step-{run.history.steps:05d}")
            if run.history.steps % SAVED_EVERY == 0 or run.history.steps == steps:
                checkpoint.save(run, work / "state", settings)
    return model.eval(), tokenizer, _record(model, tokenizer, run.history, parts)


def work_folder(out: Path) -> Path:
    """Beside `out`: the state of an unfinished run, and the checkpoints to be kept."""
    return out.with_name(f"{out.name}.run")


def _special(tokenizer) -> dict[str, int]:
    end = tokenizer.eos_token_id
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


def _run(model: nn.Module, recipe: TrainConfig) -> TrainState:
    """Matrices decay; norms do not."""
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1]},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(
        groups, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    ordered = [p for group in groups for p in group["params"]]
    names = {id(p): name for name, p in parameters.items()}
    trainable = {names[id(p)]: p for p in ordered}  # as the optimizer numbers them
    return TrainState(trainable, optimizer, torch.device("cpu"), History())


def _start(phase: Phase) -> int:
    return phase.start


def _step(model: nn.Module, tokenizer, run: TrainState, phase: Phase) -> None:
    step, recipe = run.history.steps, phase.recipe
    parts = corpus.batches(tokenizer, recipe.seed, step, recipe.batch, mix=phase.mix)
    loss, _ = accumulate_gradients(model, [batch_of(p, run.device) for p in parts])
    nn.utils.clip_grad_norm_(run.trainable.values(), recipe.clip)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step - phase.start)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.history.loss.append(loss)


def _mix_digest(parts: Sequence[Phase]) -> str:
    weights = [{kind.__name__: n for kind, n in part.mix.items()} for part in parts]
    return digest(weights, corpus.TOLD_WHOLE)


def _keep(model: nn.Module, tokenizer, folder: Path) -> None:
    """A checkpoint to look at later: half the bytes, and no optimizer."""
    if folder.exists():  # the run was killed after it was written
        shutil.rmtree(folder)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    with atomic.new_folder(folder) as new:
        _save(half, tokenizer, new)


def _save(model: nn.Module, tokenizer, folder: Path) -> None:
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _record(model, tokenizer, history: History, parts: Sequence[Phase]) -> dict:
    seed = parts[0].recipe.seed
    return {
        "parameters": model.num_parameters(),
        "steps": history.steps,
        "documents": history.steps * BATCH,
        "recipe": {**RECIPE, "batch": BATCH},
        "phases": [{"steps": p.recipe.steps, "lr": p.recipe.lr} for p in parts],
        "seconds": round(history.seconds),
        "held_out_loss": _held_out_loss(model, tokenizer, seed),
        **provenance(seed=seed),
    }


def _held_out_loss(model: nn.Module, tokenizer, seed: int) -> float:
    """Nats per token of whole documents, questions included."""
    parts = corpus.batches(tokenizer, seed, HELD_OUT, 300, whole=1.0)
    return round(mean_loss(model, [row for part in parts for row in part]), 4)


# -------------------------------------------------------------------------- abilities


def abilities(model: nn.Module, tokenizer, seed: int = 0) -> dict[str, float]:
    """What the model can do, on questions that it never read, as shares of one.

    copying, answering, recording   answers that are right, word for word
    choosing    the same as answering, of a tale of two events: which one was asked for?
    formats     a record in a format that four examples show
    echo        tokens of a line's second round that are foreseen
    """
    asked: dict[str, Callable[[Random], list[corpus.Pair]]] = {
        "copying": lambda random: [corpus.copy_pair(random)],
        "answering": lambda random: [corpus.tale_pair(random, 1)],
        "choosing": lambda random: [corpus.tale_pair(random, 2)],
        "recording": lambda random: [corpus.record_pair(random)],
        "formats": lambda random: corpus.format_pairs(random, max(corpus.EXAMPLES)),
    }
    shares = {}
    for name, draw in asked.items():
        random = Random(f"exam {name} {seed}")
        exam = [draw(random) for _ in range(EXAMS)]
        shares[name] = round(_right(model, tokenizer, exam), 4)
    return {**shares, "echo": round(_echo(model, tokenizer, seed), 4)}


def on_the_way(work: Path, tokenizer, seed: int) -> list[dict]:
    """Loss and abilities of each checkpoint that was kept."""
    rows = []
    for folder in sorted(work.glob("step-*")):
        with quiet_transformers():
            model = whole_model(folder, dtype=torch.float32).eval()
        rows.append(
            {
                "steps": int(folder.name.partition("-")[2]),
                "loss": _held_out_loss(model, tokenizer, seed),
                "abilities": abilities(model, tokenizer),
            }
        )
    return rows


def samples(model: nn.Module, tokenizer, seed: int = 0) -> list[dict[str, str]]:
    """What it answers to a question of each kind, and how it goes on from nothing."""
    random = Random(f"samples {seed}")
    asked = {
        "A question about a tale": corpus.tale_pair(random, 2)[0],
        "A record": corpus.record_pair(random)[0],
        "Words that it never saw": corpus.copy_pair(random)[0],
        "A kind that it was told": kind_pair(random, sorted(TOLD)[0])[0],
        "A sum": "5 + 6 =",
    }
    texts = {what: f"Input: {text}\nOutput:" for what, text in asked.items()}
    texts["The beginning of a report"] = "On Monday"
    prompts = [
        tokenizer(text, add_special_tokens=False).input_ids for text in texts.values()
    ]
    answers = _answers(model, tokenizer, prompts)
    answered = zip(texts.items(), answers, strict=True)
    return [{"what": w, "asked": a, "answer": answer} for (w, a), answer in answered]


def _right(model, tokenizer, exam: list[list[corpus.Pair]]) -> float:
    """Share of the last answers that are right; the pairs before them are examples."""
    prompts = [
        encode_prompt(tokenizer, "", pairs[-1][0], template="raw", examples=pairs[:-1])
        for pairs in exam
    ]
    answers = _answers(model, tokenizer, prompts)
    right = [pairs[-1][1] for pairs in exam]
    return sum(a.strip() == r for a, r in zip(answers, right, strict=True)) / len(exam)


def _answers(model: nn.Module, tokenizer, prompts: list[list[int]]) -> list[str]:
    """What the model puts first, token by token, up to its end token."""
    end = tokenizer.eos_token_id
    return generate(
        model, tokenizer, prompts, stop_id=end, max_new_tokens=LONGEST_ANSWER
    )


@torch.no_grad()
def _echo(model: nn.Module, tokenizer, seed: int) -> float:
    """Share of the tokens of a line's second round that the model puts first."""
    random, hits = Random(f"exam echo {seed}"), []
    for _ in range(EXAMS):
        words = " " + " ".join(invented(random) for _ in range(8))
        ids = tokenizer(words, add_special_tokens=False).input_ids
        logits = model(torch.tensor([ids * 2])).logits[0]
        foreseen = logits[len(ids) : -1].argmax(-1)
        hits.append((foreseen == torch.tensor(ids[1:])).float().mean().item())
    return sum(hits) / len(hits)


# --------------------------------------------------------------------------- the files


def write(out: Path, model: nn.Module, tokenizer, record: dict) -> None:
    """Put model, tokenizer, checkpoints and figures into `out`."""
    work = work_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    with atomic.new_folder_beside(out / "new") as new:
        _save(model, tokenizer, new)
        (new / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
        for file in new.iterdir():
            file.chmod(0o644)
            file.replace(out / file.name)
    kept = out / "checkpoints"
    if kept.exists():
        shutil.rmtree(kept)
    kept.mkdir()
    for folder in sorted(work.glob("step-*")):
        shutil.copytree(folder, kept / folder.name)


if __name__ == "__main__":
    raise SystemExit(main())
