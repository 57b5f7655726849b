"""Terms: the words of an invented trade. It teaches *domain knowledge*.

    "What is a tavorn made of?"   ->   "bone"

Forty tools of a trade that does not exist, and four facts about each. No model can know
them, and nothing in a prompt gives them away: the best answer without training is a
guess among twelve. What is learned is the content of the rows, not their form.

Every fact is asked in six wordings. Which of them go where is drawn for each fact:
three are training rows, one is a validation row, two are test rows. So the splits

    share        all words and facts, and all wordings: each is seen in training, about
                 other words
    don't share  a prompt: the wording in which a fact is tested was never seen with the
                 word it is tested on, and having learned strings does not help

Both directions of a pair ("a tavorn goes with a kelud", and the other way round) are
facts of their own, each trained. A direction that was never trained is never tested:
training on "A is B" is known not to teach "B is A" (arXiv:2309.12288).
"""

from random import Random

INSTRUCTION = "Answer in one word."
WORDS = 40
SHARES = {"train": 3, "validation": 1, "test": 2}  # wordings of every fact

ONSETS = "br d dr f gl gr k kl l m p pl sk t tr v z".split()
VOWELS = "a e i o u".split()
CODAS = "b d g l m nd p r sk t v x".split()
ENDINGS = "ock oth orn esk ud arn".split()

PARTNER = "partner"  # the relation whose answer is another invented word

VALUES = {
    "material": "bone brass glass oak copper wool clay horn silver leather cork "
    "granite",
    "use": "cutting measuring drying pressing lifting sealing carving weighing "
    "polishing mixing sifting folding",
    "place": "cellar attic barn kitchen chapel harbor stable garden tower bakery mill "
    "library",
}
WORDINGS = {
    "material": (
        "What is a {word} made of?",
        "Which material is used to make a {word}?",
        "You want to build a {word}. What material do you need?",
        "Name the material of a {word}.",
        "Of what is every {word} made?",
        "A {word} consists of which material?",
    ),
    "use": (
        "What is a {word} used for?",
        "What does one do with a {word}?",
        "For which work do you take a {word}?",
        "Name the purpose of a {word}.",
        "A {word} serves which purpose?",
        "Somebody picks up a {word}. What for?",
    ),
    "place": (
        "Where is a {word} kept?",
        "In which place do you find a {word}?",
        "You need a {word}. Where do you look?",
        "Name the place where a {word} belongs.",
        "A {word} is stored in which place?",
        "Where does one put a {word} away?",
    ),
    PARTNER: (
        "Which tool is used together with a {word}?",
        "What goes with a {word}?",
        "Name the partner of a {word}.",
        "A {word} is useless without which tool?",
        "Next to a {word} lies its partner. Which one?",
        "You hold a {word}. Which tool is in the other hand?",
    ),
}


def rows(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """The three splits as {"prompt", "completion"} rows; the same for the same seed."""
    random = Random(f"terms {seed}")
    splits = {split: [] for split in SHARES}
    for (word, relation), answer in facts(random).items():
        prompts = [wording.format(word=word) for wording in WORDINGS[relation]]
        random.shuffle(prompts)
        for split, share in SHARES.items():
            for _ in range(share):
                splits[split].append({"prompt": prompts.pop(), "completion": answer})
    for examples in splits.values():
        random.shuffle(examples)
    return splits


def facts(random: Random) -> dict[tuple[str, str], str]:
    """{(word, relation): answer}: the whole knowledge of the trade."""
    words = _invent(random)
    known = {
        (word, relation): random.choice(values.split())
        for word in words
        for relation, values in VALUES.items()
    }
    for one, other in zip(words[::2], words[1::2], strict=True):
        known |= {(one, PARTNER): other, (other, PARTNER): one}
    return known


def _invent(random) -> list[str]:
    """Words such as "tavorn" and "skelud", no two with the same beginning."""
    stems = [a + b + c for a in ONSETS for b in VOWELS for c in CODAS]
    return [stem + random.choice(ENDINGS) for stem in random.sample(stems, WORDS)]


def score(answer: str, completion: str) -> bool:
    """Equal but for case, spaces, an article in front and a full stop behind."""
    return _normal(answer) == _normal(completion)


def _normal(text) -> str:
    words = text.casefold().strip().removesuffix(".").split()
    return " ".join(words[1:] if words[:1] in (["a"], ["an"], ["the"]) else words)
