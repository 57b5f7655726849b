"""Chat templates in the formats of well-known models, and a tokenizer for all of them.

Each is written with {% generation %} around what the assistant says, as transformers
marks it; `unmarked` is the template without these marks, as most models ship theirs.
"""

from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SAID = "{% generation %}"
DONE = "{% endgeneration %}"
EACH = "{% for m in messages %}"
NEXT = "{% endfor %}"
REFUSE_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
)


@dataclass(frozen=True)
class Format:
    """A template, and what it writes around an answer."""

    template: str
    end: str
    space: str = ""  # before the answer
    system: bool = True  # whether it has system turns


def turns(header, content, end, after="", *, before="", ask):
    """A template of turns that all look the same: header, content, end."""
    return (
        f"{before}{EACH}{header}"
        "{% if m['role'] == 'assistant' %}"
        f"{SAID}{content}{end}{DONE}"
        "{% else %}"
        f"{content}{end}"
        "{% endif %}"
        f"{after}{NEXT}{{% if add_generation_prompt %}}{ask}{{% endif %}}"
    )


CONTENT, TRIMMED = "{{ m['content'] }}", "{{ m['content'] | trim }}"
LINE = "{{ '\n' }}"
CHATML_HEAD = "<|im_start|>{{ m['role'] }}" + LINE
CHATML_ASK = "<|im_start|>assistant" + LINE
# Reasoning is left out of an answer once another question follows it.
STRIPPED = (
    "{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}"
)

FORMATS = {
    "chatml": Format(
        turns(CHATML_HEAD, CONTENT, "<|im_end|>", LINE, ask=CHATML_ASK),
        end="<|im_end|>",
    ),
    "llama 3": Format(
        turns(
            "<|header|>{{ m['role'] }}<|/header|>" + LINE * 2,
            TRIMMED,
            "<|eot|>",
            before="<bos>",
            ask="<|header|>assistant<|/header|>" + LINE * 2,
        ),
        end="<|eot|>",
    ),
    "gemma": Format(
        turns(
            "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}" + LINE,
            TRIMMED,
            "</turn>",
            LINE,
            before="<bos>" + REFUSE_SYSTEM,
            ask="<turn>model" + LINE,
        ),
        end="</turn>",
        system=False,
    ),
    "mistral": Format(
        "<bos>" + REFUSE_SYSTEM + EACH + "{% if m['role'] == 'user' %}"
        "[INST] {{ m['content'] }} [/INST]{% else %}"
        f"{SAID} {TRIMMED}<eos>{DONE}{{% endif %}}{NEXT}",
        end="<eos>",
        space=" ",
        system=False,
    ),
    "thinking": Format(
        turns(CHATML_HEAD, STRIPPED, "<|im_end|>", LINE, ask=CHATML_ASK),
        end="<|im_end|>",
    ),
}
CONTROL = [
    *("<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>"),
    *("<turn>", "</turn>"),
]
LINE_ENDS = r"\s*[\r\n]+"  # go together, whatever follows: so Llama 3 cuts a text
GPT2 = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def unmarked(template):
    return template.replace(SAID, "").replace(DONE, "")


def merging_tokenizer(template, words=f"{LINE_ENDS}|{GPT2}"):
    """A byte-level BPE with merges, so that letters on two sides of a border may merge.

    Two line ends are one token.

    Args
        words  the pattern of the pieces that no token crosses
    """
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>", "<unk>", *CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["assistant\n\nuser\n\nthe sun said\n\n hello [INST] to [/INST] the user"]
    core.train_from_iterator(text * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=CONTROL,
    )
    tokenizer.chat_template = template
    return tokenizer
