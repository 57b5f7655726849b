"""A GGUF file is read back by transformers: the same logits, ids, roles and template.

transformers reads GGUF with code of its own. It knows nothing of how a text is cut into
words by "gpt-2" and "smollm", so there llama.cpp's own patterns are the reference.
"""

import json
import random

import pytest
import torch
from architectures import GATED, build, byte_tokenizer
from chat_templates import CONTROL, FORMATS, merging_tokenizer, unmarked
from full_disk import files_of_at_most
from gguf import GGUFReader
from planting import each_is_caught, law
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import peft_from_scratch as pfs
from peft_from_scratch import nf4
from peft_from_scratch.files import gguf_file, gguf_tokens

NAME = "model.gguf"
IDS = torch.arange(40, 120)[None]
# As llama.cpp's src/llama-vocab.cpp has them at LLAMA_VOCAB_PRE_TYPE_GPT2 and _SMOLLM:
# each pattern cuts the pieces that the one before it has left.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
OF_LLAMA_CPP = {"gpt-2": [WORDS], "smollm": [r"\p{N}", WORDS]}
CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}


def small(*, tied=True, **changes):
    """A random Llama whose sizes and constants differ from those of LlamaConfig()."""
    sizes = GATED | dict(vocab_size=410, head_dim=16, rms_norm_eps=1e-3) | changes
    rope = sizes.pop("rope_parameters", {"rope_type": "default", "rope_theta": 500.0})
    config = LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def words(cut="gpt-2", template="chatml"):
    """A byte-level BPE with merges that cuts a text into words in one of the ways."""
    tokenizer = merging_tokenizer(unmarked(FORMATS[template].template))
    tokenizer.backend_tokenizer.pre_tokenizer = CUTS[cut]
    return tokenizer


def texts():
    """Words, letters, marks, spaces, digits and special tokens, in random order."""
    rng = random.Random(0)
    pieces = [
        *("the sun", " the", "user", "said", "'ll", "don't", " ", "  ", "\n", "\n\n"),
        *("\t", "\r\n", "12", "3.5", "½", "٣٤", "é", "e\u0301", "日本", "🎉", "\u200d"),
        *("\xa0", "\x00", "\x7f", "<|im", "|>", *CONTROL, "<bos>", "<unk>"),
        *"thesunsaidassistanthellouser",
    ]
    return ["".join(rng.choices(pieces, k=16)) for _ in range(150)]


def written(folder, model, tokenizer, **options):
    folder.mkdir(exist_ok=True, parents=True)
    gguf_file.save(model, tokenizer, folder / NAME, **options)
    return folder


def read_model(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=NAME, dtype=torch.float32
    ).eval()


def fields(folder):
    """{key of the metadata: its value}"""
    reader = GGUFReader(folder / NAME)
    return {key: field.contents() for key, field in reader.fields.items()}


# ------------------------------------------------------------------------- the model


@law
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def transformers_reads_the_same_model(folder, tied=True, dtype="float32"):
    model = small(tied=tied)
    with torch.no_grad():
        read = read_model(written(folder, model, words(), dtype=dtype))
        for parameter in model.parameters():  # vectors stay in float32
            if parameter.dim() > 1:
                parameter.copy_(parameter.to(getattr(torch, dtype)))
        expected = model.state_dict()
        assert read.state_dict().keys() == expected.keys()
        for name, tensor in read.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        assert torch.equal(read(IDS).logits, model(IDS).logits)
    limits = (read.config.max_position_embeddings, model.config.max_position_embeddings)
    assert limits[0] == limits[1]


@law
def an_untied_model_is_read_as_it_was(folder):
    transformers_reads_the_same_model(folder, tied=False)


@law
def a_tied_head_is_left_out(folder):
    for tied in (True, False):
        there = written(folder / str(tied), small(tied=tied), words())
        names = {tensor.name for tensor in GGUFReader(there / NAME).tensors}
        assert ("output.weight" in names) is not tied
        assert read_model(there).config.tie_word_embeddings is tied


@law
def what_llama_cpp_alone_reads_is_there(folder):
    there = fields(written(folder, small(), words(), dtype="bfloat16"))
    assert there["llama.attention.key_length"] == 16
    assert there["llama.attention.value_length"] == 16
    assert there.get("llama.rope.dimension_count") == 16
    assert there["general.file_type"] == 32  # LLAMA_FTYPE_MOSTLY_BF16 of llama.h
    assert there["general.name"] == "model"


@law
def tiny_answers_from_its_file_as_before(folder):
    """The model that ships: 767 merges that compete, and greedy answers."""
    model, tokenizer = pfs.load_model("tiny", device="cpu")
    there = written(folder, model, tokenizer)
    read = AutoTokenizer.from_pretrained(there, gguf_file=NAME)
    theirs = read_model(there)
    for text in (*texts(), "The order is: two coffees, please.", "shovel the carpets"):
        assert read(text).input_ids == tokenizer(text).input_ids
    asked = read("An order of two", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(theirs(**asked).logits, model(**asked).logits)
        answers = [m.generate(**asked, max_new_tokens=20) for m in (theirs, model)]
    assert torch.equal(*answers)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_same_model_makes_the_same_bytes(tmp_path):
    one, two = (written(tmp_path / n, small(), words()) / NAME for n in "ab")
    assert one.read_bytes() == two.read_bytes()


# ------------------------------------------------------------------------- the tokens


@law
@pytest.mark.parametrize("template", ["chatml", "llama 3", "gemma"])
def transformers_reads_the_same_tokenizer(folder, template="chatml"):
    tokenizer = words(template=template)
    tokenizer.add_tokens(["<think>"])
    there = written(folder, small(), tokenizer)
    read = AutoTokenizer.from_pretrained(there, gguf_file=NAME)
    for text in (*texts(), "so <think>so", "日<think>"):
        ids = tokenizer(text).input_ids
        assert read(text).input_ids == ids, text
        assert read.decode(ids) == tokenizer.decode(ids)
        plain = read.decode(ids, skip_special_tokens=True)
        assert plain == tokenizer.decode(ids, skip_special_tokens=True)
    for role in ("bos", "eos", "unk", "pad"):
        name = f"{role}_token_id"
        assert getattr(read, name) == getattr(tokenizer, name), name
    assert read.chat_template == tokenizer.chat_template


@law
def a_text_is_cut_into_words_as_llama_cpp_cuts_it(folder, text_of=texts):
    for cut in CUTS:
        tokenizer = words(cut)
        name = fields(written(folder, small(), tokenizer))["tokenizer.ggml.pre"]
        theirs = words(cut)
        theirs.backend_tokenizer.pre_tokenizer = as_llama_cpp_cuts(name)
        for text in text_of():
            assert theirs(text).input_ids == tokenizer(text).input_ids, text


def as_llama_cpp_cuts(name):
    patterns = [
        pre_tokenizers.Split(Regex(pattern), "isolated")
        for pattern in OF_LLAMA_CPP[name]
    ]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*patterns, letters])


@law
def a_text_begins_and_ends_as_with_the_tokenizer(folder):
    """A post-processor that adds <bos>, <eos>, both or none."""
    for first in (False, True):
        for last in (False, True):
            tokenizer = words()
            around = ["<bos>"] * first + ["$A"] + ["<eos>"] * last
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=around,
                pair=["$A", "$B"],
                special_tokens=[("<bos>", 1), ("<eos>", 2)],
            )
            there = written(folder, small(), tokenizer)
            read = AutoTokenizer.from_pretrained(there, gguf_file=NAME)
            ids = tokenizer("the sun").input_ids
            assert (ids[0] == 1, ids[-1] == 2) == (first, last)
            assert read("the sun").input_ids == ids
            of_file = fields(there)
            assert of_file["tokenizer.ggml.add_bos_token"] is first
            assert of_file["tokenizer.ggml.add_eos_token"] is last


@law
def every_end_of_an_answer_is_in_the_file(folder):
    tokenizer = words()
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = tokenizer.convert_tokens_to_ids("<|eot|>")
    own = tokenizer.eos_token_id
    for of_model, expected in (
        (None, [own]),
        (own, [own]),
        (stop, [own, stop]),
        ([own, stop, other], [own, stop, other]),
    ):
        model = small()
        model.generation_config.eos_token_id = of_model
        there = fields(written(folder, model, tokenizer))
        keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
        assert [there[key] for key in keys if key in there] == expected


def test_ids_without_a_token_are_unused(tmp_path):
    there = fields(written(tmp_path, small(), words()))
    assert len(there["tokenizer.ggml.tokens"]) == 410
    kinds, count = there["tokenizer.ggml.token_type"], len(words())
    assert count < 410 and kinds[count:] == [5] * (410 - count)
    assert 5 not in kinds[:count]


def test_the_tokenizer_of_smollm2_is_cut_as_llama_cpp_cuts_it(tmp_path, smollm2):
    """Its own GGUF file says "smollm", too, and so it does in llama.cpp's converter."""
    _, tokenizer = smollm2
    content = gguf_tokens._content(tokenizer)
    assert gguf_tokens._pre_tokenizer(content) == "smollm"
    theirs = Tokenizer.from_str(json.dumps(content))
    theirs.pre_tokenizer = as_llama_cpp_cuts("smollm")
    for text in (*texts(), "1234 ab12cd ½٣ Ⅷ"):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer(text, add_special_tokens=False).input_ids


# ------------------------------------------------------------------------- refusals


def changed(edit):
    """words(), its tokenizer.json changed by `edit`, as a file could have it."""
    content = json.loads(words().backend_tokenizer.to_str())
    edit(content)
    core = Tokenizer.from_str(json.dumps(content))
    roles = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(tokenizer_object=core, **roles)


def without_a_byte(content):
    content["model"]["vocab"]["<hole>"] = content["model"]["vocab"].pop("à")


def a_space_before(content):
    content["added_tokens"][5]["lstrip"] = True


def with_roles(**roles):
    tokenizer = words()
    for name, value in roles.items():
        setattr(tokenizer, name, value)
    return tokenizer


def strange_around():
    tokenizer = words()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|eot|> $A", pair="$A $B", special_tokens=[("<|eot|>", 8)]
    )
    return tokenizer


def word_piece():
    core = Tokenizer(models.WordPiece(vocab={"<unk>": 0, "a": 1, "<eos>": 2}))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


TOKENIZERS = {
    "WordPiece": word_piece,
    "normalizer=": lambda: changed(
        lambda c: c.update(normalizer=json.loads(normalizers.NFC().__getstate__()))
    ),
    "ignore_merges=True": lambda: changed(
        lambda c: c["model"].update(ignore_merges=True)
    ),
    "byte_fallback=True": lambda: changed(
        lambda c: c["model"].update(byte_fallback=True)
    ),
    "unk_token='<unk>'": lambda: changed(without_a_byte),
    "cuts a text into words by": lambda: merging_tokenizer(None),
    "merges=[]": byte_tokenizer,
    "lstrip": lambda: changed(a_space_before),
    "neither byte-level nor added": lambda: changed(
        lambda c: c["model"]["vocab"].update({"日本": 400})
    ),
    "only 410 rows": lambda: changed(lambda c: c["model"]["vocab"].update(ab=410)),
    "several chat templates (a, b)": lambda: with_roles(
        chat_template={"a": "x", "b": "y"}
    ),
    "the tokenizer has none": lambda: with_roles(
        bos_token=None, chat_template="{{ bos_token }}"
    ),
    "puts tokens around a text": strange_around,
}


@pytest.mark.parametrize("words_of_error", TOKENIZERS)
def test_a_tokenizer_that_a_file_cannot_say_is_refused(words_of_error, tmp_path):
    assert_refused(small(), TOKENIZERS[words_of_error](), words_of_error, tmp_path)


def with_adapters():
    model = small()
    pfs.lora.inject(model, r=2)
    return model


def in_four_bits():
    model = small()
    nf4.quantize_model(model, block=32)
    return model


def holding(value):
    model = small()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    return model


def ending_at(*tokens):
    model = small()
    model.generation_config.eos_token_id = list(tokens)
    return model


def offloaded():
    model = small()
    model.model.layers[0].mlp.to("meta")
    return model


def scaled():
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    return small(rope_parameters=rope)


MODELS = {
    "'gpt2'": lambda: build("gpt2"),
    "'qwen3'": lambda: build("qwen"),
    "call merge(model) first": with_adapters,
    "dequantize_model(model) first": in_four_bits,
    "rope_type='linear'": scaled,
    "hidden_act='gelu'": lambda: small(hidden_act="gelu"),
    "self_attn.q_proj.bias": lambda: small(attention_bias=True),
    "mlp.gate_proj.bias": lambda: small(mlp_bias=True),
    "ffn_up.weight would hold values that float16": lambda: holding(7e4),
    "blk.1.ffn_up.weight": lambda: holding(float("nan")),
    "offloaded (on meta)": offloaded,
    "end at 4 tokens ([2, 5, 6, 7])": lambda: ending_at(5, 6, 7),
}


@pytest.mark.parametrize("words_of_error", MODELS)
def test_a_model_that_a_file_cannot_hold_is_refused(words_of_error, tmp_path):
    assert_refused(MODELS[words_of_error](), words(), words_of_error, tmp_path)


def test_a_model_without_any_end_is_refused(tmp_path):
    model = small(eos_token_id=None)
    model.generation_config.eos_token_id = None
    assert_refused(model, with_roles(eos_token=None), "names a token", tmp_path)


def assert_refused(model, tokenizer, sentence, folder):
    with pytest.raises(ValueError) as refused:
        gguf_file.save(model, tokenizer, folder / NAME, dtype="float16")
    assert sentence in str(refused.value)
    assert not list(folder.iterdir())


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="allowed are float32, float16, bfloat16"):
        gguf_file.save(small(), words(), tmp_path / NAME, dtype="q4_0")


def test_large_values_fit_the_other_dtypes(tmp_path):
    for dtype in ("float32", "bfloat16"):
        gguf_file.save(holding(7e4), words(), tmp_path / NAME, dtype=dtype)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    for most in (100, 20_000, 100_000):  # the header, the tokens, the tensors
        for old in (False, True):
            file = tmp_path / f"{most} {old}" / NAME
            if old:
                file.parent.mkdir()
                file.write_text("old")
            with files_of_at_most(most), pytest.raises(OSError) as refused:
                gguf_file.save(small(), words(), file)
            assert f"{file} cannot be written and" in str(refused.value)
            left = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
            assert left == ["old"] * old
            file.unlink(missing_ok=True)


# ------------------------------------------------------------------------- bugs

BUGS = {
    "rows of queries and keys as they are": (
        gguf_file._tensors,
        "_neighbors(tensor, count) if count else tensor",
        "tensor",
        transformers_reads_the_same_model,
    ),
    "halves and pairs exchanged": (
        gguf_file._neighbors,
        "(heads, 2, -1)",
        "(heads, -1, 2)",
        transformers_reads_the_same_model,
    ),
    "keys take the queries' heads": (
        gguf_file._tensors,
        '"k_proj": config.num_key_value_heads',
        '"k_proj": config.num_attention_heads',
        transformers_reads_the_same_model,
    ),
    "values are permuted too": (
        gguf_file._tensors,
        '"k_proj": config.num_key_value_heads}',
        '"k_proj": config.num_key_value_heads, "v_proj": config.num_key_value_heads}',
        transformers_reads_the_same_model,
    ),
    "a tied head is written": (
        gguf_file._tensors,
        "continue",
        "pass",
        a_tied_head_is_left_out,
    ),
    "every head is left out": (
        gguf_file._tensors,
        " and tensor is model.get_input_embeddings().weight",
        "",
        an_untied_model_is_read_as_it_was,
    ),
    "no base of the rotation": (
        gguf_file._add_sizes,
        'writer.add_rope_freq_base(config.rope_parameters["rope_theta"])',
        "pass",
        transformers_reads_the_same_model,
    ),
    "no constant of the norms": (
        gguf_file._add_sizes,
        "writer.add_layer_norm_rms_eps(config.rms_norm_eps)",
        "pass",
        transformers_reads_the_same_model,
    ),
    "no width of a head": (
        gguf_file._add_sizes,
        "writer.add_rope_dimension_count(config.head_dim)",
        "pass",
        what_llama_cpp_alone_reads_is_there,
    ),
    "no width of a head for llama.cpp": (
        gguf_file._add_sizes,
        "writer.add_key_length(config.head_dim)",
        "writer.add_key_length(config.hidden_size // config.num_attention_heads)",
        what_llama_cpp_alone_reads_is_there,
    ),
    "vectors are rounded": (
        gguf_file.plan,
        'dtype if tensor.dim() > 1 else "float32"',
        "dtype",
        lambda folder: transformers_reads_the_same_model(folder, dtype="bfloat16"),
    ),
    "merges in another order": (
        gguf_tokens.add,
        'merges = content["model"]["merges"]',
        'merges = content["model"]["merges"][::-1]',
        tiny_answers_from_its_file_as_before,
    ),
    "special tokens are plain": (
        gguf_tokens._tokens,
        'TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED',
        "TokenType.NORMAL",
        transformers_reads_the_same_tokenizer,
    ),
    "added tokens are special": (
        gguf_tokens._tokens,
        'TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED',
        "TokenType.CONTROL",
        transformers_reads_the_same_tokenizer,
    ),
    "no chat template": (
        gguf_tokens.add,
        "writer.add_chat_template(_chat_template(tokenizer))",
        "pass",
        transformers_reads_the_same_tokenizer,
    ),
    "no pad": (
        gguf_tokens._add_roles,
        '("bos", "unk", "pad")',
        '("bos", "unk")',
        transformers_reads_the_same_tokenizer,
    ),
    "the base's end alone": (
        gguf_tokens.ends,
        "(tokenizer.eos_token_id, *others)",
        "(tokenizer.eos_token_id,)",
        every_end_of_an_answer_is_in_the_file,
    ),
    "the stop token takes the end's place": (
        gguf_tokens.ends,
        "(tokenizer.eos_token_id, *others)",
        "(*others, tokenizer.eos_token_id)",
        every_end_of_an_answer_is_in_the_file,
    ),
    "digits are words": (
        gguf_tokens._pre_tokenizer,
        "return name",
        'return "gpt-2"',
        a_text_is_cut_into_words_as_llama_cpp_cuts_it,
    ),
    "no first token": (
        gguf_tokens._add_roles,
        "writer.add_add_bos_token(first)",
        "writer.add_add_bos_token(False)",
        a_text_begins_and_ends_as_with_the_tokenizer,
    ),
}
test_a_planted_bug_is_caught = each_is_caught(BUGS)
