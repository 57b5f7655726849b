"""A tokenizer as a GGUF file has it: tokens, merges, ends, the chat template.

llama.cpp has no tokenizer.json. It knows a few ways to cut a text into words by their
names, and byte-level BPE as one algorithm without options. So a tokenizer is written
only where it is that algorithm and cuts in one of the ways below; any other is refused,
because the file would give other ids for the same text.

    tokenizer.ggml.tokens      the text of each id, byte-level; of added tokens, plain
    tokenizer.ggml.token_type  normal, control (special), user-defined (added), unused
    tokenizer.ggml.merges      "left right", the one that is applied first comes first
    tokenizer.ggml.pre         how a text is cut into words, by name
"""

import json
from collections.abc import Mapping

from gguf import GGUFWriter, TokenType
from tokenizers import pre_tokenizers
from torch import nn

WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS = {"gpt-2": [WORDS], "smollm": [DIGITS, WORDS]}  # by llama.cpp's names
PLAIN = (  # options of a BPE that must be off
    *("continuing_subword_prefix", "end_of_word_suffix"),
    *("dropout", "byte_fallback", "ignore_merges"),
)
ENDS = ("eos", "eot", "eom")  # the places for tokens at which llama.cpp ends an answer


def add(writer: GGUFWriter, tokenizer, *, rows: int, ends: list[int]) -> None:
    """Add a tokenizer to what will be written.

    Args
        rows  of the model's embedding; ids without a token get an unused one
        ends  the tokens that end an answer, one to three, the tokenizer's own first
    Raises  ValueError  what the file cannot say, by name
    """
    content = _content(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(content))
    tokens = _tokens(content, rows)
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    merges = content["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    _add_roles(writer, tokenizer, ends)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(_chat_template(tokenizer))


def ends(model: nn.Module, tokenizer) -> list[int]:
    """The tokens that end an answer: the tokenizer's first, then the model's others."""
    config = getattr(model, "generation_config", None)
    others = getattr(config, "eos_token_id", None)
    others = [others] if isinstance(others, int) else others or []
    tokens = [end for end in (tokenizer.eos_token_id, *others) if end is not None]
    tokens = list(dict.fromkeys(tokens))
    if not tokens:
        raise ValueError(
            "neither the tokenizer nor the model's generation config names a token "
            "that ends an answer: llama.cpp would take token 11; set one"
        )
    if len(tokens) > len(ENDS):
        raise ValueError(
            f"answers of this model end at {len(tokens)} tokens ({tokens}); a GGUF "
            f"file has places for {len(ENDS)}: name fewer in its generation config"
        )
    return tokens


def _content(tokenizer) -> dict:
    """The tokenizer as its tokenizer.json says it, if it is a plain byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend else {"model": {}}
    core = content["model"]
    if core.get("type") != "BPE":
        kind = core.get("type", type(tokenizer).__name__)
        raise ValueError(
            f"a GGUF file is written with a byte-level BPE, and this tokenizer is "
            f"{kind}: use llama.cpp's convert_hf_to_gguf.py on the saved folder"
        )
    whole = set(pre_tokenizers.ByteLevel.alphabet()) <= core["vocab"].keys()
    fine = {
        "normalizer": content["normalizer"] is None,
        "merges": len(core["merges"]) > 0,  # llama.cpp takes no vocabulary without
        "unk_token": core["unk_token"] is None or whole,  # no byte is unknown
        **{option: not core.get(option) for option in PLAIN},
    }
    for option, holds in fine.items():
        if not holds:
            raise ValueError(
                f"this tokenizer has {option}={core.get(option, content.get(option))!r}"
                ", which a GGUF file cannot say: other ids would come out"
            )
    return content


def _pre_tokenizer(content: Mapping) -> str:
    """llama.cpp's name for the way in which this tokenizer cuts a text into words."""
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    plain = [{k: v for k, v in s.items() if k != "trim_offsets"} for s in steps]
    for name, known in PRE_TOKENIZERS.items():
        if plain == known:
            return name
    raise ValueError(
        f"this tokenizer cuts a text into words by {plain}; a GGUF file is written for "
        f"those that cut as {' or '.join(PRE_TOKENIZERS)} does, in llama.cpp's names"
    )


def _tokens(content: Mapping, rows: int) -> list[tuple[str, TokenType]]:
    """(text, type) of each id; of an added token the text is plain, not byte-level."""
    tokens = {i: (t, TokenType.NORMAL) for t, i in content["model"]["vocab"].items()}
    for added in content["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise ValueError(
                f"the token {added['content']!r} takes in spaces, or stands only "
                "between them (lstrip, rstrip, single_word): a GGUF file cannot say so"
            )
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    for i, (token, kind) in tokens.items():
        if kind is TokenType.NORMAL and not alphabet.issuperset(token):
            raise ValueError(
                f"the token {token!r} ({i}) is neither byte-level nor added"
            )
    if max(tokens) >= rows:
        raise ValueError(
            f"the tokenizer has token {max(tokens)}, and the model's embedding only "
            f"{rows} rows: resize one of them"
        )
    return [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(rows)]


def _add_roles(writer: GGUFWriter, tokenizer, ends: list[int]) -> None:
    """The ids with a role, and whether a text gets the first or the last by itself."""
    roles = dict(zip(ENDS, ends, strict=False))
    roles |= {k: getattr(tokenizer, f"{k}_token_id") for k in ("bos", "unk", "pad")}
    for kind, token in roles.items():
        if token is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    first, last = _around(tokenizer)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)


def _chat_template(tokenizer) -> str:
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError(
            f"this tokenizer has several chat templates ({', '.join(template)}): set "
            "tokenizer.chat_template to the one that the adapter was trained with"
        )
    if tokenizer.bos_token_id is None and "bos_token" in template:
        raise ValueError(
            "the chat template writes bos_token, and the tokenizer has none: llama.cpp "
            "would write its token 11; set tokenizer.bos_token"
        )
    return template


def _around(tokenizer) -> tuple[bool, bool]:
    """Whether the tokenizer puts its first token before a text, and its last after."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for first in (False, True):
        for last in (False, True):
            before = [tokenizer.bos_token_id] * first
            if whole == [*before, *plain, *[tokenizer.eos_token_id] * last]:
                return first, last
    raise ValueError(
        f"this tokenizer puts tokens around a text ({whole} for {plain}) that are not "
        "its bos_token and eos_token, which a GGUF file cannot say"
    )
