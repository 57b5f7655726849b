"""Several LoRAs into one: each way against dense sums in float64, and planted bugs.

The references never call the module under test: they load each adapter into a model,
take its dense update from there, and do the paper's arithmetic on whole matrices.
"""

import math
from functools import partial

import pytest
import torch
from adapter_files import contents, parsed, saved, say, tampered
from architectures import build
from laws.files.refused_files import BROKEN
from model_state import assert_same, largest, logits
from planting import Bug, each_is_caught, law
from safetensors.torch import save_file
from torch import nn

import peft_from_scratch as pfs
from peft_from_scratch.core import adapter, matrices
from peft_from_scratch.files import adapter_file, patterns
from peft_from_scratch.files import combine as combining
from peft_from_scratch.files.adapter_file import CONFIG, WEIGHTS
from peft_from_scratch.files.combine import LowRank, combine, cross_terms, updates

ARCHITECTURES = ("llama", "gpt2")
EACH_WAY = {  # at full rank and density, where every way keeps everything
    "linear": {},
    "concatenation": {},
    "svd": dict(r=4),
    "ties": dict(r=4, density=1.0),
    "dare": dict(r=4, density=1.0),
}
FIRST_LAYER = {r".*\.0\..*": 2}  # of either architecture
W = (0.7, -1.3)


def made(folder, seed, architecture="llama", *, base=None, **arguments):
    """`folder`, with the file of an adapter with random A and B."""
    model = build(architecture) if base is None else base
    pfs.lora.inject(model, **{"r": 4, "alpha": 6} | arguments)
    generator = torch.Generator().manual_seed(seed)
    for parameter in pfs.trainable(model).values():
        parameter.data.normal_(std=0.2, generator=generator)
    pfs.save(model, folder)
    return folder


def pair(folder, architecture="llama", **arguments):
    """Two folders with adapters of the same modules and rank."""
    return [
        made(folder / f"in{seed}", seed, architecture, **arguments) for seed in (1, 2)
    ]


def mixed(folder, architecture="llama"):
    """Two folders whose adapters differ in rank, scale and modules."""
    first = made(folder / "in1", 1, architecture, rslora=True, rank_pattern=FIRST_LAYER)
    alphas = {r".*\.1\..*": 2.5}
    arguments = dict(r=3, targets="attention", alpha_pattern=alphas)
    return [first, made(folder / "in2", 2, architecture, **arguments)]


def deltas(folder, architecture="llama"):
    """{module: dense update}, from the modules of a model that loaded the file."""
    model = build(architecture)
    pfs.load(model, folder)
    return {name: m.delta(torch.float64).detach() for name, m in adapters(model)}


def adapters(model):
    return adapter.adapters(model).items()


def dense(folders, weights, architecture="llama"):
    """{module: [w_i Delta W_i]}, of the adapters that have the module."""
    found = {}
    for folder, w in zip(folders, weights, strict=True):
        for name, delta in deltas(folder, architecture).items():
            found.setdefault(name, []).append(w * delta)
    return found


def summed(parts):
    return {name: sum(each) for name, each in parts.items()}


def cut(matrices, r):
    """Each matrix from its r largest singular values alone."""
    result = {}
    for name, matrix in matrices.items():
        U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
        result[name] = U[:, :r] @ S[:r].diag() @ Vt[:r]
    return result


def assert_close(ours, theirs, allowed=1e-6):
    difference = largest(ours, theirs)
    assert difference <= allowed, f"differ by {difference:.1e}"


def relative(got, exact):
    return {n: ((got[n] - W).norm() / W.norm()).item() for n, W in exact.items()}


def assert_errors(errors, expected, allowed=1e-6):
    assert errors.keys() == expected.keys()
    for name, error in errors.items():
        assert abs(error - expected[name]) <= allowed * max(1, expected[name]), name


# ---------------------------------------------------------------------------- Laws


@law
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def concatenation_is_the_exact_sum(folder, architecture="llama"):
    folders, out = mixed(folder, architecture), folder / "out"
    errors = combine(folders, out, how="concatenation", weights=W)
    exact = summed(dense(folders, W, architecture))
    assert_close(deltas(out, architecture), exact)
    assert errors.keys() == exact.keys()
    assert all(error < 1e-6 for error in errors.values())
    model = build(architecture)
    pfs.load(model, out)
    ranks = {name: len(module.A) for name, module in adapters(model)}
    wanted = dict.fromkeys(exact, 0)
    for each in folders:
        for name, update in updates(each).items():
            wanted[name] += len(update.A)
    assert ranks == wanted and len(set(ranks.values())) == 4  # 2, 4, 2 + 3, 4 + 3


@law
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def the_logits_are_those_of_merging_each_in_turn(folder, architecture="llama"):
    folders, out = mixed(folder, architecture), folder / "out"
    merged, combined = build(architecture), build(architecture)
    before = logits(merged)
    for each in folders:
        pfs.load(merged, each)
        pfs.merge(merged)
    combine(folders, out, how="concatenation")
    pfs.load(combined, out)
    assert_close(logits(combined), logits(merged), 1e-5)
    assert largest(before, logits(merged)) > 0.1


@law
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def svd_is_the_nearest_of_its_rank(folder, architecture="llama"):
    folders, out = mixed(folder, architecture), folder / "out"
    errors = combine(folders, out, how="svd", weights=W, r=3)
    exact = summed(dense(folders, W, architecture))
    assert_close(deltas(out, architecture), cut(exact, 3))
    tails = {}
    for name, matrix in exact.items():
        S = torch.linalg.svdvals(matrix)
        tails[name] = (S[3:].square().sum() / S.square().sum()).sqrt().item()
    assert_errors(errors, tails)
    assert any(tail > 0.1 for tail in tails.values())


def test_svd_of_a_rank_that_is_enough_is_exact_and_stores_no_more(tmp_path):
    folders, out = pair(tmp_path), tmp_path / "out"
    errors = combine(folders, out, how="svd", r=16)
    assert all(error < 1e-6 for error in errors.values())
    assert {len(update.A) for update in updates(out).values()} == {8}


def by_the_paper(parts, density):
    """TIES, entry by entry: arXiv:2306.01708, algorithm 1, with lambda = 1."""
    columns = []
    for part in parts:
        values = part.flatten().tolist()
        kept = sorted(values, key=abs, reverse=True)[: int(density * len(values))]
        columns.append([v if abs(v) >= abs(kept[-1]) else 0.0 for v in values])
    merged = []
    for entries in zip(*columns, strict=True):
        mass = sum(entries)
        agree = [v for v in entries if v * mass > 0]
        merged.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view_as(parts[0])


@law
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def ties_is_the_paper(folder, architecture="llama"):
    folders, out = mixed(folder, architecture), folder / "out"
    folders.append(made(folder / "in3", 3, architecture))
    weights = (0.7, 1.3, -0.4)
    arguments = dict(weights=weights, r=5, density=0.3)
    errors = combine(folders, out, how="ties", **arguments)
    parts = dense(folders, weights, architecture)
    merged = cut({n: by_the_paper(each, 0.3) for n, each in parts.items()}, 5)
    assert_close(deltas(out, architecture), merged)
    assert_errors(errors, relative(merged, summed(parts)))


def test_ties_where_the_signs_cancel_and_where_all_is_trimmed():
    a = torch.tensor([[3.0, -2.0, 0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[-3.0, -4.0, 0.0, 5.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, -3.0, 0.0, 3.0]], dtype=torch.float64)
    assert torch.equal(combining.ties([a, b], 1.0), expected)
    only = torch.tensor([[3.0, 0.0, 0.0, 5.0]], dtype=torch.float64)
    assert torch.equal(combining.ties([a, b], 1e-9), only)  # one entry is always kept


@law
def dare_keeps_a_share_and_the_expectation():
    delta = torch.randn(40, 50, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    n, density = 400, 0.2
    draws = torch.stack([combining.dare(delta, density, generator) for _ in range(n)])
    kept = draws != 0
    assert_close(draws[kept], (delta / density).expand_as(draws)[kept], 1e-12)
    assert abs(kept.double().mean().item() - density) < 5 * (0.16 / kept.numel()) ** 0.5
    sigma = delta.abs() * ((1 - density) / density / n) ** 0.5
    assert ((draws.mean(0) - delta).abs() <= 5 * sigma).all()
    assert len({tuple(mask.flatten().tolist()) for mask in kept[:9]}) == 9


@law
def dare_adds_what_the_weighted_adapters_keep(folder):
    """At full rank, where the entries can be seen: 0, either one, or both, enlarged."""
    folders = pair(folder, targets="k_proj")
    weights, density, r = (0.7, -1.3), 0.25, 16
    arguments = dict(how="dare", weights=weights, density=density, r=r)
    combine(folders, folder / "out", **arguments)
    seen = set()
    for name, parts in dense(folders, weights).items():
        a, b = (part / density for part in parts)
        got = deltas(folder / "out")[name]
        kinds = torch.stack([0 * a, a, b, a + b])  # (4, d_out, d_in)
        nearest, kind = (kinds - got).abs().min(0)
        assert nearest.max() < 1e-5 * got.abs().max()
        seen |= set(kind.flatten().tolist())
    assert seen == {0, 1, 2, 3}
    combine(folders, folder / "again", **arguments)
    combine(folders, folder / "other", **arguments, seed=1)
    assert_same(parsed(folder / "again")[0], parsed(folder / "out")[0])
    assert largest(deltas(folder / "other"), deltas(folder / "out")) > 0.1


@law
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def linear_is_wrong_by_the_cross_terms(folder, architecture="llama"):
    folders, out = pair(folder, architecture, rslora=True), folder / "out"
    errors = combine(folders, out, how="linear", weights=W)
    model_a, model_b = build(architecture), build(architecture)
    pfs.load(model_a, folders[0]), pfs.load(model_b, folders[1])
    crossed, exact = {}, summed(dense(folders, W, architecture))
    for (name, a), (_, b) in zip(adapters(model_a), adapters(model_b), strict=True):
        root = [math.sqrt(abs(w) * m.scale) for w, m in zip(W, (a, b), strict=True)]
        A = root[0] * a.A.double() - root[1] * b.A.double()  # the sign of W[1]
        B = root[0] * a.B.double() + root[1] * b.B.double()
        crossed[name] = (B @ A).detach()
    assert_close(deltas(out, architecture), crossed)
    assert_errors(errors, relative(crossed, exact))
    assert_errors(errors, cross_terms(folders, W))
    assert min(errors.values()) > 0.3


@pytest.mark.parametrize("n", [2, 3, 5])
def test_cross_terms_of_independent_factors_grow_like_the_docstring_says(n):
    torch.manual_seed(n)
    shapes = (4, 400), (300, 4)
    parts = [LowRank(*(torch.randn(s).double() for s in shapes)) for _ in range(n)]
    ratio = combining._relative(combining.added(parts), combining.stacked(parts))
    assert abs(ratio / math.sqrt(n - 1) - 1) < 0.15


@law
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def one_adapter_stays_what_it_is(folder, architecture="llama"):
    source = made(folder / "in", 1, architecture)
    exact = deltas(source, architecture)
    for how, arguments in EACH_WAY.items():
        for w in (1, -2.5):
            out = folder / f"{how}{w}"
            errors = combine([source], out, how=how, weights=[w], **arguments)
            scaled = {name: w * delta for name, delta in exact.items()}
            assert_close(deltas(out, architecture), scaled)
            assert all(error < 1e-6 for error in errors.values())


@pytest.mark.parametrize("how", EACH_WAY)
def test_a_weight_of_zero_is_as_good_as_no_adapter(how, tmp_path):
    folders = pair(tmp_path)
    combine(folders, tmp_path / "out", how=how, weights=[1.5, 0], **EACH_WAY[how])
    exact = summed(dense(folders[:1], [1.5]))
    assert_close(deltas(tmp_path / "out"), exact)


@pytest.mark.parametrize("how", EACH_WAY)
def test_a_missing_module_counts_as_zero(how, tmp_path):
    """Adapters without a common module: each stays what it is, where it is."""
    folders = [
        made(tmp_path / "in1", 1, targets="attention"),
        made(tmp_path / "in2", 2, targets="mlp"),
    ]
    errors = combine(folders, tmp_path / "out", how=how, **EACH_WAY[how])
    exact = summed(dense(folders, (1, 1)))
    assert len(exact) == len(errors) == 14
    assert_close(deltas(tmp_path / "out"), exact)


@law
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def updates_are_those_of_the_loaded_model(folder, architecture="llama"):
    for each in mixed(folder, architecture):
        expected = deltas(each, architecture)
        assert_close({n: u.delta() for n, u in updates(each).items()}, expected)


def test_updates_of_a_pissa_are_its_change_of_the_original_weight(tmp_path):
    model, base = build("llama"), build("llama")
    pfs.pissa.inject(model, r=4)
    for parameter in pfs.trainable(model).values():
        parameter.data *= 1.1
    pfs.save(model, tmp_path)
    pfs.merge(model)
    for name, update in updates(tmp_path).items():
        now, before = (m.get_submodule(name).weight.double() for m in (model, base))
        assert_close(update.delta(), (now - before).detach(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_files_in_other_precisions_are_combined_in_float64(dtype, tmp_path):
    def cast(tensors, config):
        tensors.update({key: value.to(dtype) for key, value in tensors.items()})

    folders = [tampered(each, each, cast) for each in pair(tmp_path)]
    combine(folders, tmp_path / "out", how="concatenation", weights=W)
    tensors, metadata, _ = parsed(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert metadata == {"format": "pt", "vocab_size": "320"}
    assert_close(deltas(tmp_path / "out"), summed(dense(folders, W)))


@law
def names_that_end_alike_are_told_apart(folder):
    """ "0" is a module, and the end of the name of two others."""

    def net():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        return nn.Sequential(nn.Linear(8, 8), inner, nn.Sequential(nn.Linear(8, 8)))

    folders = []
    for name, r in (("0", 1), ("1.0", 2)):
        base = net()
        targets = {name: base.get_submodule(name)}
        folders.append(made(folder / name, r, base=base, r=r, targets=targets))
    combine(folders, folder / "out", how="concatenation")
    model, pattern = net(), parsed(folder / "out")[2]["target_modules"]
    every = [name for name, _ in model.named_modules()]
    assert patterns.matches_field("", pattern, every) == {"0", "1.0"}
    assert pfs.load(model, folder / "out") == ["0", "1.0"]
    assert {n: len(m.A) for n, m in adapters(model)} == {"0": 1, "1.0": 2}
    assert [m.scale for _, m in adapters(model)] == [1, 1]


def test_combining_leaves_the_random_state_alone(tmp_path):
    folders = pair(tmp_path)
    before = torch.get_rng_state()
    combine(folders, tmp_path / "out", how="dare", density=0.5, r=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_name_of_the_base_is_kept_where_all_agree(tmp_path):
    sound = pair(tmp_path)
    for names, expected in ((["x", "x"], "x"), (["x", "y"], None), ([{}, {}], None)):
        folders = [
            tampered(each, each, say(base_model_name_or_path=name))
            for each, name in zip(sound, names, strict=True)
        ]
        combine(folders, tmp_path / "out", how="linear")
        assert parsed(tmp_path / "out")[2]["base_model_name_or_path"] == expected


# ------------------------------------------------------------------------ Refusals


def refuses(folder, folders, *words, error=ValueError, call=combine, **arguments):
    """The call raises, with the words; nothing below `folder` changes."""
    before = contents(folder)
    if call is combine:
        arguments = {"out": folder / "out", "how": "concatenation"} | arguments
    try:
        call(folders, **arguments)
    except error as caught:
        message = str(caught)
    else:
        raise AssertionError(f"no {error.__name__} was raised")
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert contents(folder) == before


SVD = dict(how="svd", r=4)
TIES = dict(how="ties", r=4, density=0.5)
ARGUMENTS = {
    "how": (dict(how="sum"), ["how='sum'", "concatenation", "dare"]),
    "how a list": (dict(how=["svd"]), ["how=['svd']"]),
    "too few weights": (dict(weights=[1]), ["weights=[1]", "2"]),
    "NaN weight": (dict(weights=[1, math.nan]), ["nan"]),
    "infinite weight": (dict(weights=[math.inf, 1]), ["inf"]),
    "huge weight": (dict(weights=[10**400, 1]), ["weights=", "1e+30"]),
    "weight as text": (dict(weights=["1", 1]), ["'1'"]),
    "no r": (SVD | dict(r=None), ["r=None", "at least 1"]),
    "r 0": (SVD | dict(r=0), ["r=0"]),
    "r True": (SVD | dict(r=True), ["r=True"]),
    "r no whole number": (SVD | dict(r=4.0), ["r=4.0"]),
    "r too large": (SVD | dict(r=17), ["r=17", "k_proj", "16"]),
    "r too large for ties": (TIES | dict(r=33), ["r=33", "16"]),
    "r without meaning": (dict(r=8), ["r=8", "leave it out"]),
    "no density": (TIES | dict(density=None), ["density=None", "(0, 1]"]),
    "density 0": (TIES | dict(density=0), ["density=0"]),
    "density above 1": (TIES | dict(density=1.01), ["density=1.01"]),
    "density NaN": (TIES | dict(density=math.nan), ["density=nan"]),
    "density without meaning": (SVD | dict(density=0.5), ["density=0.5", "leave"]),
    "seed": (dict(seed=-1), ["seed=-1"]),
    "seed as text": (dict(seed="0"), ["seed='0'"]),
    "no folder": (dict(folders=[]), ["folders=[]"]),
    "a folder's name": (dict(folders="adapter"), ["'adapter'", "list"]),
    "beyond float32": (dict(weights=[9e29, 1], spread=1e30), ["float32", "weights"]),
}


@law
@pytest.mark.parametrize("name", ARGUMENTS)
def an_argument_is_refused(folder, name):
    arguments, words = ARGUMENTS[name]
    arguments = dict(arguments)
    folders = pair(folder)
    if size := arguments.pop("spread", None):
        for each in folders:
            tampered(each, each, partial(enlarge, size))
    folders = arguments.pop("folders", folders)
    saved(folder / "out")
    refuses(folder, folders, *words, **arguments)


def enlarge(size, tensors, config):
    tensors.update({key: value.double() * size for key, value in tensors.items()})


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("sound"))


# What only a model can tell. Such a file is combined, and the result refused by load().
ONLY_A_MODEL_KNOWS = {
    "no A and no B",
    "unknown module",
    "embedding",
    "targets no regex",
    "targets a number",
    "nested too deep",
    "too often",
    "targets that take years",
    "exclusions that take years",
}
SLOW = {"a pattern that takes years"}  # the same reader refuses it, after 5 s


@pytest.mark.parametrize("name", sorted(BROKEN.keys() - ONLY_A_MODEL_KNOWS - SLOW))
def test_a_broken_file_is_refused(name, sound, tmp_path):
    folders = [sound, tampered(sound, tmp_path / "broken", BROKEN[name][0])]
    refuses(tmp_path, folders, "broken")
    refuses(tmp_path, folders, "broken", call=cross_terms)
    if name != "broadcastable":  # alone it may be of a module with one output
        refuses(tmp_path, folders[1], "broken", call=updates)


@pytest.mark.parametrize("name", ["unknown module", "embedding"])
def test_what_only_a_model_knows_is_refused_on_loading(name, sound, tmp_path):
    def change(tensors, config):
        BROKEN[name][0](tensors, config)
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            other = key.replace("lora_A", "lora_B")
            tensors.setdefault(other, torch.ones(32, 4))

    folders = [sound, tampered(sound, tmp_path / "broken", change)]
    combine(folders, tmp_path / "out", how="concatenation")
    with pytest.raises(ValueError):
        pfs.load(build("llama"), tmp_path / "out")


@law
@pytest.mark.parametrize("method", ["dora", "full", "ia3", "biases"])
def what_is_no_plain_lora_is_refused(folder, method="dora"):
    method, words, arguments = {
        "dora": (pfs.dora, ["use_dora=True", "only plain LoRA"], {}),
        "full": (pfs.full, ["FULL", "only plain LoRA"], {}),
        "ia3": (pfs.ia3, ["IA3", "only plain LoRA"], {}),
        "biases": (pfs.lora, ["bias='all'", "bias='none'"], dict(bias="all")),
    }[method]
    architecture = "gpt2" if arguments else "llama"
    other = saved(folder / "in2", architecture=architecture, method=method, **arguments)
    refuses(folder, [made(folder / "in1", 1, architecture), other], *words, "in2")


@law
def different_bases_are_refused(folder):
    shapes = []
    for d in (8, 12):
        base = nn.Sequential(nn.Linear(8, d))
        arguments = dict(base=base, r=2, targets={"0": base[0]})
        shapes.append(made(folder / f"net{d}", 1, **arguments))
    refuses(folder, shapes, "(8, 8)", "(12, 8)", "net8", "net12", "different base")


@law
def different_vocabularies_are_refused(folder):
    folders = pair(folder)
    tensors, metadata, _ = parsed(folders[1])
    save_file(tensors, folders[1] / WEIGHTS, metadata | {"vocab_size": "330"})
    refuses(folder, folders, "vocabulary", "'320'", "'330'", "different base")
    save_file(tensors, folders[1] / WEIGHTS, {"format": "pt"})  # as PEFT writes it
    combine(folders, folder / "out", how="linear")
    assert parsed(folder / "out")[1]["vocab_size"] == "320"


def test_ranks_that_do_not_fit_are_refused(tmp_path):
    uneven = [made(tmp_path / "r4", 1), made(tmp_path / "r5", 2, r=5)]
    refuses(tmp_path, uneven, "[4, 5]", "equal", "concatenation", how="linear")
    refuses(tmp_path, uneven, "[4, 5]", call=cross_terms)
    many = [uneven[0]] * 5
    errors = combine(many, tmp_path / "long", how="concatenation")  # above a side of 16
    assert max(errors.values()) < 1e-6
    errors = combine(many, tmp_path / "out", how="svd", r=16)
    assert max(errors.values()) < 1e-6


def test_a_missing_file_is_named(tmp_path):
    folders = pair(tmp_path)
    for file in (WEIGHTS, CONFIG):
        (folders[1] / file).unlink()
        refuses(tmp_path, folders, file, "in2", error=FileNotFoundError)


@law
def a_failed_write_leaves_the_folder_as_it_was(folder, monkeypatch):
    """Also where the result is to take the place of one of the adapters."""
    folders = pair(folder)

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("planted: no space left")

    with monkeypatch.context() as patched:
        patched.setattr(adapter_file, "save_file", disk_full)
        refuses(folder, folders, "planted", error=OSError, out=folders[0])


def test_the_result_may_take_the_place_of_one_of_the_adapters(tmp_path):
    folders = pair(tmp_path)
    exact = summed(dense(folders, W))
    combine(folders, folders[0], how="concatenation", weights=W)
    assert_close(deltas(folders[0]), exact)
    assert sorted(contents(folders[0])) == [CONFIG, WEIGHTS]


# ------------------------------------------------------------------- Planted bugs


def argument(name):
    return partial(an_argument_is_refused, name=name)


BUGS = {
    "the scale is forgotten": Bug(
        LowRank.weighted,
        "abs(w * self.scale)",
        "abs(w)",
        concatenation_is_the_exact_sum,
    ),
    "the sign of the weight is forgotten": Bug(
        LowRank.weighted,
        "math.copysign(root, w)",
        "root",
        concatenation_is_the_exact_sum,
    ),
    "the sign is on both sides": Bug(
        LowRank.weighted,
        "root * self.B",
        "math.copysign(root, w) * self.B",
        linear_is_wrong_by_the_cross_terms,
    ),
    "the whole weight on either side": Bug(
        LowRank.weighted,
        "math.sqrt(abs(w * self.scale))",
        "abs(w * self.scale)",
        one_adapter_stays_what_it_is,
    ),
    "stacked in another order": Bug(
        combining.stacked,
        "[part.A for part in parts]",
        "[part.A for part in parts][::-1]",
        the_logits_are_those_of_merging_each_in_turn,
    ),
    "linear concatenates": Bug(
        combining._combined,
        "return added(parts)",
        "return stacked(parts)",
        linear_is_wrong_by_the_cross_terms,
    ),
    "the smallest directions are kept": Bug(
        combining.nearest,
        "svd_halves(R_B @ R_A.T, r)",
        "svd_halves((R_B @ R_A.T).flip(0), r)",
        svd_is_the_nearest_of_its_rank,
    ),
    "one singular value too few": Bug(
        matrices.svd_halves,
        "root = (S[:r] / scale).sqrt()",
        "root = (S[:r] / scale).sqrt() * (torch.arange(len(S[:r])) < r - 1)",
        svd_is_the_nearest_of_its_rank,
    ),
    "singular values on both sides": Bug(
        matrices.svd_halves,
        "(S[:r] / scale).sqrt()",
        "S[:r] / scale",
        svd_is_the_nearest_of_its_rank,
    ),
    "the smallest entries are kept": Bug(
        combining._trimmed,
        ".topk(kept)",
        ".topk(kept, largest=False)",
        ties_is_the_paper,
    ),
    "the largest entries, not magnitudes": Bug(
        combining._trimmed,
        "delta.abs().flatten()",
        "delta.flatten()",
        ties_is_the_paper,
    ),
    "signs are counted, not weighed": Bug(
        combining.ties,
        "trimmed.sum(0).sign()",
        "trimmed.sign().sum(0).sign()",
        ties_is_the_paper,
    ),
    "the sign is elected before trimming": Bug(
        combining.ties,
        "trimmed.sum(0).sign()",
        "sum(deltas).sign()",
        ties_is_the_paper,
    ),
    "the mean is over all adapters": Bug(
        combining.ties,
        "agree.sum(0).clamp(min=1)",
        "len(deltas)",
        ties_is_the_paper,
    ),
    "everybody agrees": Bug(
        combining.ties,
        "(trimmed.sign() == gamma) & (trimmed != 0)",
        "trimmed != 0",
        ties_is_the_paper,
    ),
    "dare does not enlarge": Bug(
        combining.dare, " / density", "", dare_keeps_a_share_and_the_expectation
    ),
    "dare keeps what it should drop": Bug(
        combining.dare,
        "torch.full(delta.shape, density)",
        "torch.full(delta.shape, 1 - density)",
        dare_keeps_a_share_and_the_expectation,
    ),
    "dare ignores the seed": Bug(
        combining.dare,
        "torch.bernoulli(share, generator=generator)",
        "torch.bernoulli(share)",
        dare_adds_what_the_weighted_adapters_keep,
    ),
    "every adapter drops the same entries": Bug(
        combining._combined,
        "sum(dare(part.delta(), density, generator) for part in parts)",
        "dare(sum(part.delta() for part in parts), density, generator)",
        dare_adds_what_the_weighted_adapters_keep,
    ),
    "the error is that of another sum": Bug(
        combining._relative,
        "exact.weighted(-1)",
        "exact.weighted(1)",
        concatenation_is_the_exact_sum,
    ),
    "the error is relative to the result": Bug(
        combining._relative,
        "_norm(exact)",
        "_norm(result)",
        linear_is_wrong_by_the_cross_terms,
    ),
    "rslora is ignored": Bug(
        combining._update,
        "math.sqrt(r) if config.rslora else r",
        "r",
        updates_are_those_of_the_loaded_model,
    ),
    "alpha_pattern is ignored": Bug(
        combining._update,
        "scale = config.alpha /",
        "scale = file.config['lora_alpha'] /",
        updates_are_those_of_the_loaded_model,
    ),
    "names are written as ends": Bug(
        combining._config,
        '"|".join(map(exact_regex, results))',
        "list(results)",
        names_that_end_alike_are_told_apart,
    ),
    "alpha does not follow the rank": Bug(
        combining._config,
        '"alpha_pattern": others',
        '"alpha_pattern": {}',
        concatenation_is_the_exact_sum,
    ),
    "DoRA is taken for LoRA": Bug(
        combining._config_of,
        "if file.format is not LORA:",
        "if file.format.peft_type != LORA.peft_type:",
        what_is_no_plain_lora_is_refused,
    ),
    "trained biases are lost": Bug(
        combining._config_of,
        'if config.bias != "none":',
        'if config.bias == "":',
        partial(what_is_no_plain_lora_is_refused, method="biases"),
    ),
    "different vocabularies are let through": Bug(
        combining._refuse_other_bases,
        '(VOCAB_SIZE, "the vocabulary"),',
        "",
        different_vocabularies_are_refused,
    ),
    "the error shows one shape twice": Bug(
        combining._refuse_other_bases,
        "{shortened(fact)} in",
        "{shortened(before)} in",
        different_bases_are_refused,
    ),
    "a rank that is too large is cut in silence": Bug(
        combining._refuse_ranks, "r > bound", "False", argument("r too large")
    ),
    "a share of 0 is let through": Bug(
        combining._refuse_options, "0 < density", "0 <= density", argument("density 0")
    ),
    "infinite values are written": Bug(
        combining._rounded,
        "not (rounded.A.isfinite().all() and rounded.B.isfinite().all())",
        "False",
        argument("beyond float32"),
    ),
    "the file is written in place": Bug(
        adapter_file.AdapterFile.write,
        "atomic.new_files(folder, (CONFIG, WEIGHTS)) as new:",
        "__import__('contextlib').nullcontext(Path(folder)) as new:\n"
        "        new.mkdir(parents=True, exist_ok=True)",
        a_failed_write_leaves_the_folder_as_it_was,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(BUGS)
