"""Wrong answers to the exercises of notebook 06; each must be refused by its check."""

from attacks import (
    afterwards,
    every_time_but,
    first,
    fixed,
    remembered,
    returned,
    stale,
    where,
)

from peft_from_scratch.course.checks import merging as checks  # noqa: F401

PREAMBLE = "from transformers import AutoModelForCausalLM"

VERDICT = """\
def my_verdict(W0, A, B, scale, W):
    factors = {factors}
    BA = {BA}
    distance = {{}}
    for way, factor in factors.items():
        candidate = {candidate}
        distance[way] = {distance}
    best = min(distance, key=distance.get)
    return {back}
"""
RIGHT_VERDICT = dict(
    factors="{'not merged': 0.0, 'merged': scale, 'merged twice': 2 * scale,"
    " 'scale forgotten': 1.0}",
    BA="B.double() @ A.double()",
    candidate="(W0.double() + factor * BA).to(W.dtype)",
    distance="(W.double() - candidate.double()).norm()",
    back="best if distance[best] < 0.3 * scale * BA.norm() else 'none of these'",
)


def verdict(**parts):
    """The right verdict, but for these parts."""
    return VERDICT.format(**RIGHT_VERDICT | parts)


LEAST_SQUARES = """\
def my_verdict(W0, A, B, scale, W):
    BA = B.double() @ A.double()
    change = W.double() - W0.double()
    factor = ((change * BA).sum() / BA.square().sum()).item()
    ways = {'not merged': 0.0, 'merged': scale, 'merged twice': 2 * scale,
            'scale forgotten': 1.0}
    return min(ways, key=lambda way: abs(ways[way] - factor))
"""
CLOSE = """\
def my_verdict(W0, A, B, scale, W):
    BA = B.double() @ A.double()
    ways = {{'not merged': 0.0, 'merged': scale, 'merged twice': 2 * scale,
            'scale forgotten': 1.0}}
    for way, factor in ways.items():
        if torch.allclose(W.double(), W0.double() + factor * BA, {tolerance}):
            return way
    return 'none of these'
"""
SUM = """\
def my_sum(adapters, weights):
    A = {A}
    B = {B}
    return {back}
"""
EACH = "for w, (A, B, s) in zip(weights, adapters)"
RIGHT_SUM = dict(
    A="torch.cat([A for A, _, _ in adapters])",
    B=f"torch.cat([w * s * B {EACH}], dim=1)",
    back="A, B",
)


def total(**parts):
    """The right sum, but for these parts."""
    return SUM.format(**RIGHT_SUM | parts)


def where_ranks_agree(A, B):
    """Wrong where all ranks are the same, and right elsewhere."""
    same = "len({A.shape for A, _, _ in adapters}) == 1"
    return total(
        A=f"({A}) if {same} else {RIGHT_SUM['A']}",
        B=f"({B}) if {same} else {RIGHT_SUM['B']}",
    )


EXPORT = """\
def my_export(model, A, B, scale, folder):
    head = model.get_output_embeddings()
    {change}
    {untie}
    {save}
"""
RIGHT_EXPORT = dict(
    change="head.weight = nn.Parameter(head.weight.detach() + scale * B @ A)",
    untie="model.config.tie_word_embeddings = False",
    save="model.save_pretrained(folder)",
)


def export(**parts):
    """The right export, but for these parts."""
    return EXPORT.format(**RIGHT_EXPORT | parts)


IN_PLACE = "head.weight.data.add_(scale * B @ A)"


def head_of(new):
    return export(change=f"head.weight = nn.Parameter({new})")


MUTANTS = {
    "6.1": {
        "all zeros": verdict(back="0"),
        "always merged": verdict(back="'merged'"),
        "always none of these": verdict(back="'none of these'"),
        "nothing is left over": verdict(back="best"),
        "the direction alone": LEAST_SQUARES,
        "the usual tolerance": CLOSE.format(tolerance="rtol=1e-2, atol=1e-3"),
        "a narrow tolerance": CLOSE.format(tolerance="rtol=1e-6, atol=1e-9"),
        "no candidate is rounded": verdict(candidate="W0.double() + factor * BA"),
        "equal bits": verdict(back="best if distance[best] == 0 else 'none of these'"),
        "no scale": verdict(
            factors="{'not merged': 0.0, 'merged': 1.0, 'merged twice': 2.0,"
            " 'scale forgotten': scale}"
        ),
        "twice means the scale squared": verdict(
            factors="{'not merged': 0.0, 'merged': scale, 'merged twice': scale**2,"
            " 'scale forgotten': 1.0}"
        ),
        "the scale divides": verdict(
            factors="{'not merged': 0.0, 'merged': 1 / scale, 'merged twice': 2 /"
            " scale, 'scale forgotten': 1.0}"
        ),
        "the base is no candidate": verdict(
            factors="{'merged': scale, 'merged twice': 2 * scale,"
            " 'scale forgotten': 1.0}"
        ),
        "twice is no candidate": verdict(
            factors="{'not merged': 0.0, 'merged': scale, 'scale forgotten': 1.0}"
        ),
        "a lost scale is no candidate": verdict(
            factors="{'not merged': 0.0, 'merged': scale, 'merged twice': 2 * scale}"
        ),
        "signs do not matter": verdict(
            distance="((W.double() - W0.double()).abs()"
            " - (candidate.double() - W0.double()).abs()).norm()"
        ),
        "norms alone": verdict(
            distance="((W.double() - W0.double()).norm()"
            " - (candidate.double() - W0.double()).norm()).abs()"
        ),
        "the product is rounded first": verdict(
            candidate="W0 + (factor * BA).to(W.dtype)",
            back="best if distance[best] == 0 else 'none of these'",
        ),
        "the sizes of the weights": verdict(
            back="best if distance[best] < 0.3 * W.double().norm() else 'none of these'"
        ),
        "a fixed limit": verdict(
            back="best if distance[best] < 0.05 else 'none of these'"
        ),
    },
    "6.2": {
        "all zeros": total(back="0 * A, 0 * B"),
        "the factors are added": where_ranks_agree(
            "sum(A for A, _, _ in adapters)", f"sum(w * s * B {EACH})"
        ),
        "the factors are added, nothing else": where_ranks_agree(
            "sum(A for A, _, _ in adapters)", "sum(B for _, B, _ in adapters)"
        ),
        "the weights on both sides": total(A=f"torch.cat([w * A {EACH}])"),
        "the scales on both sides": total(A=f"torch.cat([s * A {EACH}])"),
        "no scales": total(B=f"torch.cat([w * B {EACH}], dim=1)"),
        "no weights": total(B=f"torch.cat([s * B {EACH}], dim=1)"),
        "neither": total(B="torch.cat([B for _, B, _ in adapters], dim=1)"),
        "no signs": total(B=f"torch.cat([abs(w) * s * B {EACH}], dim=1)"),
        "roots without the sign": total(
            A=f"torch.cat([abs(w * s) ** 0.5 * A {EACH}])",
            B=f"torch.cat([abs(w * s) ** 0.5 * B {EACH}], dim=1)",
        ),
        "the mean": total(B=f"torch.cat([w * s * B {EACH}], dim=1) / len(weights)"),
        "the mean by weights": total(
            B=f"torch.cat([w * s * B {EACH}], dim=1) / (sum(weights) or 1)"
        ),
        "the first alone": total(
            A="adapters[0][0]", B="weights[0] * adapters[0][2] * adapters[0][1]"
        ),
        "the sides are swapped": total(back="B, A"),
        "transposed": total(back="A.T, B.T"),
        "a dense sum": total(A="torch.eye(adapters[0][0].shape[1])").replace(
            "return A, B", f"return A, sum(w * s * B @ A {EACH})"
        ),
        "the product": total(back="B @ A"),
        "weights of the wrong adapter": total(
            B="torch.cat([w * s * B for w, (A, B, s) in"
            " zip(weights[::-1], adapters)], dim=1)"
        ),
        "the first scale for all": total(
            B=f"torch.cat([w * adapters[0][2] * B {EACH}], dim=1)"
        ),
    },
    "6.3": {
        "all zeros": head_of("torch.zeros_like(head.weight)"),
        "in place, still tied": export(change=IN_PLACE, untie="pass"),
        "in place, untied": export(change=IN_PLACE),
        "the config still ties": export(untie="pass"),
        "nothing is saved": export(save="pass"),
        "the model is not changed": export(change="pass"),
        "tied, and not changed": export(change="pass", untie="pass"),
        "no scale": head_of("head.weight.detach() + B @ A"),
        "twice": head_of("head.weight.detach() + 2 * scale * B @ A"),
        "subtracted": head_of("head.weight.detach() - scale * B @ A"),
        "the update alone": head_of("scale * B @ A"),
        "in the embedding": export(
            change="E = model.get_input_embeddings(); "
            "E.weight = nn.Parameter(E.weight.detach() + scale * B @ A)"
        ),
        "both of their own": export(
            change=f"{RIGHT_EXPORT['change']}; E = model.get_input_embeddings(); "
            "E.weight = nn.Parameter(E.weight.detach() + scale * B @ A)"
        ),
        "tied again before saving": export(
            untie="model.config.tie_word_embeddings = True; model.tie_weights()"
        ),
        "the scale twice": head_of("head.weight.detach() + scale**2 * B @ A"),
        "the config alone": export(
            save="model.config.save_pretrained(folder)",
        ),
        "untied after saving": export(
            untie="model.save_pretrained(folder)",
            save="model.config.tie_word_embeddings = False",
        ),
    },
}


# ---------------------------------------------------------------------------- Attacks

NOTHING_DRAWN = "nothing is drawn: a random answer is refused by its values"
NO_KERNEL = "no kernel is written"

ATTACKS = {  # exercise: {class of checks/CHECKLIST.md: {name: source or Attack}}
    "6.1": {
        "arguments": {
            "W0 of the first call": stale("W0"),
            "W of the first call": stale("W"),
            "A of the first call": stale("A"),
            "B of the first call": stale("B"),
            "a scale of two": fixed("scale", "2.0"),
        },
        "state": {
            "kept by shape": remembered("W.shape"),
            "kept by scale": remembered("scale"),
            "wrong from the fifth call on": every_time_but(5, "'merged'"),
            "W0 is changed": afterwards("W0.add_(1)"),
            "A is changed": afterwards("A.mul_(2)"),
            "gradients are left off": first("torch.set_grad_enabled(False)"),
        },
        "inputs": {
            "half precision is none of these": where(
                "W.dtype == torch.float16", "'none of these'"
            ),
            "small updates are not merged": where(
                "(W.double() - W0.double()).norm() < 0.01 * W0.double().norm()",
                "'not merged'",
            ),
            "large updates are strange": where(
                "(W.double() - W0.double()).norm() > W0.double().norm()",
                "'none of these'",
            ),
            "scales above one": where("scale < 1", "'scale forgotten'"),
            "square weights": where("W.shape[0] != W.shape[1]", "'none of these'"),
            "a rank of one is nothing": where("len(A) == 1", "'not merged'"),
        },
        "kinds": {
            "a list": returned("[result]"),
            "in capitals": returned("result.upper()"),
            "with a full stop": returned("result + '.'"),
            "bytes": returned("result.encode()"),
        },
        "randomness": {
            "a guess": returned(
                "['merged', 'not merged', 'merged twice'][int(3 * torch.rand(()))]"
            ),
            "a seed": first("torch.manual_seed(0)"),
        },
        "kernels": NO_KERNEL,
    },
    "6.2": {
        "arguments": {
            "adapters of the first call": stale("adapters"),
            "weights of the first call": stale("weights"),
            "weights of one": fixed("weights", "[1.0] * len(adapters)"),
        },
        "state": {
            "kept by the number of adapters": remembered("len(adapters)"),
            "wrong the second time": every_time_but(2, "(0 * result[0], result[1])"),
            "a B is scaled in place": total(
                B=f"torch.cat([B.mul_(w * s) {EACH}], dim=1)"
            ),
            "the list is sorted": first("adapters.sort(key=lambda each: each[2])"),
            "the list is emptied": afterwards("adapters.clear()"),
            "gradients are left off": first("torch.set_grad_enabled(False)"),
        },
        "inputs": {
            "two adapters": first("adapters = adapters[:2]; weights = weights[:2]"),
            "three adapters": first("adapters = adapters[:3]; weights = weights[:3]"),
            "positive weights": total(
                B=f"torch.cat([max(w, 0) * s * B {EACH}], dim=1)"
            ),
            "weights up to one": total(
                B=f"torch.cat([min(max(w, -1), 1) * s * B {EACH}], dim=1)"
            ),
            "small weights are dropped": total(
                B=f"torch.cat([w * (abs(w) > 0.01) * s * B {EACH}], dim=1)"
            ),
            "the largest rank": first(
                "keep = max(len(A) for A, _, _ in adapters)",
                "adapters = [(A[:keep], B[:, :keep] * (len(A) == keep), s)"
                " for A, B, s in adapters]",
            ),
        },
        "kinds": {
            "in double precision": returned("(result[0].double(), result[1].double())"),
            "arrays": returned("(result[0].numpy(), result[1].numpy())"),
            "a scale as well": returned("(*result, 1.0)"),
            "A alone": returned("result[0]"),
        },
        "randomness": {
            "dropout": returned("(result[0], F.dropout(result[1], 0.05))"),
            "a seed": first("torch.manual_seed(0)"),
        },
        "kernels": NO_KERNEL,
    },
    "6.3": {
        "arguments": {
            "A of the first call": head_of(
                "head.weight.detach() + scale * B @ my_export.__dict__.setdefault("
                "A.shape, A)"
            ),
            "B of the first call": head_of(
                "head.weight.detach() + scale * my_export.__dict__.setdefault("
                "B.shape, B) @ A"
            ),
            "the scale of the first call": stale("scale"),
            "the model of the first call": stale("model"),
            "another folder": first("folder = str(folder) + '-other'"),
        },
        "state": {
            "A is changed": afterwards("A.mul_(2)"),
            "B is changed": export(change="B.mul_(scale)").replace(
                "B.mul_(scale)",
                "head.weight = nn.Parameter(head.weight.detach() + B.mul_(scale) @ A)",
            ),
            "gradients are left off": first("torch.set_grad_enabled(False)"),
            "another default dtype": first("torch.set_default_dtype(torch.float64)"),
            "nothing from the second call on": "import itertools\n"
            "calls = itertools.count()\n\n\n"
            + export(save="model.save_pretrained(folder) if not next(calls) else None"),
        },
        "inputs": {
            "Llama alone": export(
                untie="model.config.tie_word_embeddings = "
                "model.config.model_type != 'llama'"
            ),
            "model.lm_head of a Llama": export(
                change="if model.config.model_type != 'gpt2': head.weight = "
                "nn.Parameter(head.weight.detach() + scale * B @ A)"
            ),
            "scales above one": head_of(
                "head.weight.detach() + max(scale, 1.0) * B @ A"
            ),
            "ranks up to three": head_of(
                "head.weight.detach() + scale * B[:, :3] @ A[:3]"
            ),
            "the first sixty tokens": export(
                change="update = scale * B @ A; update[50:] = 0; head.weight = "
                "nn.Parameter(head.weight.detach() + update)"
            ),
        },
        "kinds": {
            "in half precision": export(
                save="model.bfloat16().save_pretrained(folder)"
            ),
            "an adapter beside it": export(
                change="torch.save((A, B), folder)", save="pass"
            ),
            "the weights alone": export(
                save="folder.mkdir(); "
                "torch.save(model.state_dict(), folder / 'pytorch_model.bin')"
            ),
        },
        "randomness": {
            "a random head": head_of("torch.randn_like(head.weight)"),
            "a seed": first("torch.manual_seed(0)"),
        },
        "kernels": NO_KERNEL,
    },
}
ALSO_RIGHT = {  # exercise: {class: {name: source of an answer}}
    "6.1": {
        "arguments": {
            "by position of BA": verdict(BA="(A.double().T @ B.double().T).T"),
        },
        "state": {
            "a copy, in place": verdict(
                candidate="W0.double().clone().add_(factor * BA).to(W.dtype)"
            ),
        },
        "inputs": {
            "a wide limit": verdict(
                back="best if distance[best] < 0.7 * scale * BA.norm()"
                " else 'none of these'"
            ),
            "a narrow limit": verdict(
                back="best if distance[best] < 0.05 * scale * BA.norm()"
                " else 'none of these'"
            ),
            "computed in float32": verdict(
                BA="B @ A", candidate="(W0.float() + factor * BA).to(W.dtype)"
            ),
            "the largest entry": verdict(
                distance="(W.double() - candidate.double()).square().mean().sqrt()",
                back="best if distance[best] * W.numel() ** 0.5 <"
                " 0.3 * scale * BA.norm() else 'none of these'",
            ),
        },
        "kinds": {
            "NumPy's text": returned("np.str_(result)"),
        },
        "randomness": {
            "candidates in an order by chance": verdict(
                factors="(lambda d: {k: d[k] for k in"
                " [list(d)[i] for i in torch.randperm(4)]})("
                + RIGHT_VERDICT["factors"]
                + ")"
            ),
        },
    },
    "6.2": {
        "arguments": {
            "the weight on A": total(
                A=f"torch.cat([w * A {EACH}])",
                B=f"torch.cat([s * B {EACH}], dim=1)",
            ),
        },
        "state": {
            "copies": total(
                A="torch.vstack([A.clone() for A, _, _ in adapters])",
                B=f"torch.hstack([(w * s) * B.clone() {EACH}])",
            ),
        },
        "inputs": {
            "roots with the sign": total(
                A=f"torch.cat([math.copysign(abs(w * s) ** 0.5, w) * A {EACH}])",
                B=f"torch.cat([abs(w * s) ** 0.5 * B {EACH}], dim=1)",
            ),
            "by a singular value decomposition": (
                "def my_sum(adapters, weights):\n"
                f"    W = sum(w * s * B.double() @ A.double() {EACH})\n"
                "    U, S, Vt = torch.linalg.svd(W, full_matrices=False)\n"
                "    k = min(len(S), sum(len(A) for A, _, _ in adapters))\n"
                "    return Vt[:k].float(), (U[:, :k] * S[:k]).float()\n"
            ),
            "another order": total(
                A="torch.cat([A for A, _, _ in adapters[::-1]])",
                B=f"torch.cat([w * s * B {EACH}][::-1], dim=1)",
            ),
        },
        "kinds": {
            "a list": returned("[*result]"),
            "parameters": returned("tuple(nn.Parameter(X) for X in result)"),
        },
        "randomness": {
            "an order by chance": (
                "def my_sum(adapters, weights):\n"
                "    order = torch.randperm(len(adapters)).tolist()\n"
                "    A = torch.cat([adapters[i][0] for i in order])\n"
                "    return A, torch.cat([weights[i] * adapters[i][2] *"
                " adapters[i][1] for i in order], dim=1)\n"
            ),
        },
    },
    "6.3": {
        "arguments": {
            "the update in another order": head_of(
                "head.weight.detach() + (A.T @ (scale * B).T).T"
            ),
        },
        "state": {
            "the model stays as it is": (
                "import copy\n\n\n"
                "def my_export(model, A, B, scale, folder):\n"
                "    model = copy.deepcopy(model)\n"
                "    W = model.get_input_embeddings().weight.detach()\n"
                "    model.config.tie_word_embeddings = False\n"
                "    model.get_output_embeddings().weight = nn.Parameter(\n"
                "        W + scale * B @ A)\n"
                "    model.save_pretrained(folder)\n"
            ),
        },
        "inputs": {
            "the embedding gets the copy": (
                "def my_export(model, A, B, scale, folder):\n"
                "    E = model.get_input_embeddings()\n"
                "    E.weight = nn.Parameter(E.weight.detach().clone())\n"
                "    with torch.no_grad():\n"
                "        model.get_output_embeddings().weight += scale * B @ A\n"
                "    model.config.tie_word_embeddings = False\n"
                "    model.save_pretrained(folder)\n"
            ),
            "a new model": (
                "def my_export(model, A, B, scale, folder):\n"
                "    config = type(model.config).from_dict(model.config.to_dict())\n"
                "    config.tie_word_embeddings = False\n"
                "    new = AutoModelForCausalLM.from_config(config)\n"
                "    new.load_state_dict(model.state_dict(), strict=False)\n"
                "    W = model.get_input_embeddings().weight.detach()\n"
                "    new.get_output_embeddings().weight.data = W + scale * B @ A\n"
                "    new.save_pretrained(folder)\n"
            ),
        },
        "kinds": {
            "returns the model": afterwards("result = model"),
            "the folder as text": first("folder = str(folder)"),
        },
        "randomness": {
            "a dropout of zero": head_of(
                "head.weight.detach() + F.dropout(scale * B @ A, 0.0)"
            ),
        },
    },
}
