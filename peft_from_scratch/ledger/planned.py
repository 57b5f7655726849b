"""Claims that wait for their experiment: what will be tried, and in which lesson.

A claim leaves this table when a module of experiments/ has it; a test says so. Until
then it counts as "not run yet". `source` is that of ledger/claim.py: empty for the
textbook's chapter.
"""

from dataclasses import dataclass

REGRET = "LoRA Without Regret, Thinking Machines 2025"
INTRUDERS = "arXiv:2410.21228"
# Lessons that are not written yet, by number.
LESSONS = {
    "03": "evaluation",
    "14": "the great comparison",
    "15": "fine-tune or prompt",
    "16": "training practice",
    "17": "rewards and preferences",
    "18": "capstone",
}


@dataclass(frozen=True)
class Planned:
    """A claim without an experiment; the fields are those of Claim."""

    id: str
    notebook: str
    statement: str
    source: str = ""


PLANNED = (
    Planned("E1", "03", "ROUGE and BERTScore correlate weakly with quality"),
    Planned("E2", "03", "A language model as judge is better than ROUGE and BERTScore"),
    Planned(
        "C1", "14", "The chapter's table of parameters, memory and merging is right"
    ),
    Planned("G1", "14", "PEFT is comparable to full fine-tuning"),
    Planned("G2", "14", "LoRA forgets less than full fine-tuning"),
    Planned("G4", "14", "PEFT reduces compute, memory and storage"),
    Planned(
        "D1",
        "15",
        "A task that is well represented in the pretraining data: few-shot prompting",
    ),
    Planned("D2", "15", "A specific output format: LoRA on examples of the format"),
    Planned("D3", "15", "Terminology of a domain: LoRA on data of the domain"),
    Planned(
        "D4", "15", "The highest performance: full fine-tuning, or LoRA of a high rank"
    ),
    Planned(
        "D5",
        "15",
        "Fewer than 100 labeled examples: few-shot prompting, and no fine-tuning",
    ),
    Planned(
        "D6",
        "15",
        "Several tasks served from one model: LoRA adapters on a shared base",
    ),
    Planned("D7", "15", "A tight GPU budget: QLoRA"),
    Planned(
        "D8",
        "15",
        "As base models improve, the gap between prompting and fine-tuning narrows",
    ),
    Planned(
        "B1",
        "16",
        "LoRA wants learning rates of 1e-4 to 3e-4, full fine-tuning 1e-5 to 5e-5",
    ),
    Planned(
        "B2",
        "16",
        "LoRA takes higher rates because its smaller space has a smoother loss",
    ),
    Planned(
        "B3",
        "16",
        "One to three epochs are enough; overfitting is the main risk, and early "
        "stopping on the validation loss helps",
    ),
    Planned("B4", "16", "A thousand clean examples beat a hundred thousand noisy ones"),
    Planned("G3", "18", "Weight updates of fine-tuning are low-dimensional"),
    Planned(
        "X2",
        "05",
        "With B random and A zero, and no multiplier, the best learning rate is that "
        "of full fine-tuning at every rank",
        "arXiv:2602.06204",
    ),
    Planned(
        "X3",
        "05",
        "LoRA on attention adds nothing to LoRA on the MLP, even at equal parameters",
        REGRET,
    ),
    Planned(
        "Y1",
        "07",
        "At about 4.5 bits, block formats beat NF4, and a code fitted to values "
        "normalized by their absmax beats it at equal bits",
        "arXiv:2306.06965, arXiv:2505.06653, arXiv:2509.23202",
    ),
    Planned(
        "X7",
        "14",
        "LoRA leaves intruder dimensions in the spectrum, full fine-tuning does not",
        INTRUDERS,
    ),
    Planned("X8", "14", "Intruder dimensions cause forgetting", INTRUDERS),
    Planned(
        "X9", "14", "Forgetting follows the size of the update, not the method", "ours"
    ),
    Planned(
        "X4",
        "16",
        "LoRA loses more than full fine-tuning as batches grow, whatever the rank",
        f"{REGRET}; disputed by arXiv:2602.09492",
    ),
    Planned(
        "X5",
        "16",
        "LoRA equals full fine-tuning until data exceed its capacity",
        REGRET,
    ),
    Planned("X6", "17", "Rank 1 is enough for policy-gradient learning", REGRET),
)
