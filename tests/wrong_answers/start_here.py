"""Wrong answers to the exercises of notebook 00; each must be refused by its check."""

from attacks import (
    Attack,
    afterwards,
    every_time_but,
    fixed,
    remembered,
    returned,
    stale,
    where,
)

from peft_from_scratch.course.checks import start_here as checks  # noqa: F401

PREAMBLE = "import ast, json, re"


def score(*lines):
    body = "\n".join(f"    {line}" for line in lines)
    return f"def my_score(answer, right):\n{body}\n"


def tried(condition, first="pass"):
    """A scorer that catches what is no JSON, and compares in this way."""
    return score(
        "try:",
        "    a, b = json.loads(answer), json.loads(right)",
        "except ValueError:",
        "    return False",
        first,
        f"return {condition}",
    )


def changed(key, value, where=""):
    """A scorer that compares objects whose keys and values it has changed."""
    inside = f"{{{key}: tidy({value}) for k, v in x.items() {where}}}"
    return f"""\
def tidy(x):
    return {inside} if isinstance(x, dict) else x


""" + tried("tidy(a) == tidy(b)")


TRAINED = "sum(r * (d_in + d_out) for d_out, d_in in shapes)"
FROZEN = "sum(d_out * d_in for d_out, d_in in shapes)"


def count(trained=TRAINED, frozen=FROZEN):
    return f"def my_count(shapes, r):\n    return {trained}, {frozen}\n"


CENTRE = "centre = (k + z * z / 2) / (n + z * z)"
H = "h = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)"
ENDS = "return centre - h, centre + h"


SHUFFLED_A = "A.flatten()[order_A].view_as(A)"
SHUFFLED_B = "B.flatten()[order_B].view_as(B)"
SIZE = "(B @ A).norm() / (B2 @ A2).norm()"


def control(A2=SHUFFLED_A, B2=SHUFFLED_B, factor=SIZE, back="A2, B2 * c"):
    return f"""\
def my_control(A, B, order_A, order_B):
    A2 = {A2}
    B2 = {B2}
    c = {factor}
    return {back}
"""


def interval(centre=CENTRE, h=H, ends=ENDS, before="pass"):
    lines = (before, centre, h, ends)
    body = "\n".join(f"    {line}" for line in lines)
    return f"def my_interval(k, n, z=1.96):\n{body}\n"


def padding(
    ids="[pad] * hole + prompt",
    mask="[0] * hole + [1] * len(prompt)",
    longest="max(map(len, prompts))",
    after="pass",
    back="torch.tensor(ids), torch.tensor(mask)",
):
    return f"""\
def my_padding(prompts, pad):
    longest = {longest}
    ids, mask = [], []
    for prompt in prompts:
        hole = longest - len(prompt)
        ids.append({ids})
        mask.append({mask})
    {after}
    return {back}
"""


MUTANTS = {
    "0.1": {
        "trailing commas are forgiven": score(
            r"answer = re.sub(r',\s*([}\]])', r'\1', answer)",
            "try:",
            "    return json.loads(answer) == json.loads(right)",
            "except ValueError:",
            "    return False",
        ),
        "escapes are undone": score(
            "answer = answer.replace('\\\\\"', '\"')",
            "try:",
            "    return json.loads(answer) == json.loads(right)",
            "except ValueError:",
            "    return False",
        ),
        "control characters are forgiven": score(
            "try:",
            "    return json.loads(answer, strict=False) == json.loads(right)",
            "except ValueError:",
            "    return False",
        ),
        "a text within a text": tried(
            "a == b or isinstance(a, str) and a[:1] == '{' and json.loads(a) == b"
        ),
        "all zeros": score("return 0"),
        "always wrong": score("return False"),
        "always right": score("return True"),
        "the same text": score("return answer == right"),
        "the same text but for spaces at the ends": score(
            "return answer.strip() == right.strip()"
        ),
        "the same text but for all spaces": score(
            "return ''.join(answer.split()) == ''.join(right.split())"
        ),
        "the same characters": score("return sorted(answer) == sorted(right)"),
        "the same words": score(
            r"return set(re.findall(r'\w+', answer)) == set(re.findall(r'\w+', right))"
        ),
        "right is somewhere in it": score("return right in answer"),
        "it begins right": score("return answer.startswith(right)"),
        "nothing is caught": score("return json.loads(answer) == json.loads(right)"),
        "is it JSON": tried("True"),
        "is it an object": tried("isinstance(a, dict)"),
        "the same keys": tried("isinstance(a, dict) and a.keys() == b.keys()"),
        "keys of the answer alone": tried(
            "isinstance(a, dict) and all(b.get(k) == v for k, v in a.items())"
        ),
        "keys of right alone": tried(
            "isinstance(a, dict) and all(a.get(k) == v for k, v in b.items())"
        ),
        "inner order counts": tried(
            "isinstance(a, dict) and sorted((k, str(v)) for k, v in a.items())"
            " == sorted((k, str(v)) for k, v in b.items())"
        ),
        "order counts": tried("json.dumps(a) == json.dumps(b)"),
        "everything as text": tried("flat(a) == flat(b)").replace(
            "def my_score",
            "def flat(x):\n"
            "    if isinstance(x, dict):\n"
            "        return {k: flat(v) for k, v in x.items()}\n"
            "    return str(x)\n\n\n"
            "def my_score",
        ),
        "items are not compared": tried(
            "isinstance(a, dict) and {**a, 'items': 0} == {**b, 'items': 0}"
        ),
        "small letters": score(
            "try:",
            "    return json.loads(answer.lower()) == json.loads(right.lower())",
            "except ValueError:",
            "    return False",
        ),
        "what is in braces": score(
            "found = re.search(r'\\{.*\\}', answer, re.DOTALL)",
            "try:",
            "    return json.loads(found[0]) == json.loads(right)",
            "except (TypeError, ValueError):",
            "    return False",
        ),
        "the first value": score(
            "try:",
            "    found, _ = json.JSONDecoder().raw_decode(answer)",
            "except ValueError:",
            "    return False",
            "return found == json.loads(right)",
        ),
        "fences are taken off": score(
            "try:",
            "    return json.loads(answer.strip('`json \\n')) == json.loads(right)",
            "except ValueError:",
            "    return False",
        ),
        "Python's literals": score(
            "try:",
            "    return ast.literal_eval(answer) == json.loads(right)",
            "except (ValueError, SyntaxError):",
            "    return False",
        ),
        "the wrong way round": tried("a != b"),
        "a sentence is right": score(
            "try:",
            "    return json.loads(answer) == json.loads(right)",
            "except ValueError:",
            "    return True",
        ),
        "not JSON, no verdict": score(
            "try:",
            "    return json.loads(answer) == json.loads(right)",
            "except ValueError:",
            "    return None",
        ),
        "within a list": tried("(a[0] if isinstance(a, list) else a) == b"),
        "with itself": tried("a == a"),
    },
    "0.2": {
        "frozen less what trains": count(frozen=f"{FROZEN} - {TRAINED}"),
        "biases train": count(f"{TRAINED} + sum(d_out for d_out, _ in shapes)"),
        "biases are frozen": count(
            frozen=f"{FROZEN} + sum(d_out for d_out, _ in shapes)"
        ),
        "frozen as one matrix": count(
            frozen="sum(o for o, _ in shapes) * sum(i for _, i in shapes)"
        ),
        "all zeros": count("0", "0"),
        "a product": count("sum(r * d_in * d_out for d_out, d_in in shapes)"),
        "no r": count("sum(d_in + d_out for d_out, d_in in shapes)"),
        "r squared": count("sum(r * r * (d_in + d_out) for d_out, d_in in shapes)"),
        "A alone": count("sum(r * d_in for d_out, d_in in shapes)"),
        "B alone": count("sum(r * d_out for d_out, d_in in shapes)"),
        "twice A": count("sum(2 * r * d_in for d_out, d_in in shapes)"),
        "twice B": count("sum(2 * r * d_out for d_out, d_in in shapes)"),
        "the first alone": count("r * sum(shapes[0])", "shapes[0][0] * shapes[0][1]"),
        "the last alone": count("r * sum(shapes[-1])", "shapes[-1][0] * shapes[-1][1]"),
        "each shape once": count(
            "sum(r * (d_in + d_out) for d_out, d_in in set(shapes))",
            "sum(d_out * d_in for d_out, d_in in set(shapes))",
        ),
        "r not for B": count("sum(r * d_in + d_out for d_out, d_in in shapes)"),
        "one on top": count("sum(r * (d_in + d_out) for d_out, d_in in shapes) + 1"),
        "always eight": count("sum(8 * (d_in + d_out) for d_out, d_in in shapes)"),
        "swapped": count().replace("return ", "return (") + "    )[::-1]\n",
        "frozen are the sides": count(frozen="sum(map(sum, shapes))"),
        "frozen with A and B": count(
            frozen="sum(d_out * d_in + r * (d_in + d_out) for d_out, d_in in shapes)"
        ),
        "the share": count(frozen="1").replace(", 1", ""),
        "trained alone": count(frozen="1").replace(", 1", "").replace("sum", "+sum"),
        "the product of all": count(
            "r * sum(o for o, _ in shapes) * sum(i for _, i in shapes)"
        ),
        "the list is used up": count().replace(
            "    return", "    shapes = [shapes.pop() for _ in shapes[:]]\n    return"
        ),
    },
    "0.3": {
        "all zeros": control(back="0 * A2, 0 * B2"),
        "the trained pair": control(back="A, B"),
        "not rescaled": control(factor="1.0"),
        "turned round": control(factor="(B2 @ A2).norm() / (B @ A).norm()"),
        "on both": control(back="A2 * c, B2 * c"),
        "squared": control(factor=f"({SIZE}) ** 2"),
        "norms of the matrices": control(
            factor="A.norm() * B.norm() / (A2.norm() * B2.norm())"
        ),
        "of norm one": control(factor="1 / (B2 @ A2).norm()"),
        "A alone": control(B2="B"),
        "B alone": control(A2="A"),
        "backward": control(
            A2="A.flatten()[order_A.argsort()].view_as(A)",
            B2="B.flatten()[order_B.argsort()].view_as(B)",
        ),
        "the largest entry": control(
            factor="(B @ A).abs().max() / (B2 @ A2).abs().max()"
        ),
        "the sum of sizes": control(
            factor="(B @ A).abs().sum() / (B2 @ A2).abs().sum()"
        ),
        "orders swapped": control(
            A2="A.flatten()[order_B.argsort().argsort()[: A.numel()] % A.numel()]"
            ".view_as(A)"
        ),
        "the rows of A": control(A2="A[order_A[: len(A)] % len(A)]"),
        "swapped": control(back="B2 * c, A2"),
        "flat": control(
            A2="A.flatten()[order_A]",
            B2="B.flatten()[order_B]",
            factor="1.0",
        ),
        "A2 alone": control(back="A2"),
        "in place": control(back="A.copy_(A2), B.copy_(B2 * c)"),
        "with the mean": control(factor="(B @ A).norm(), (B2 @ A2).norm()").replace(
            "return A2, B2 * c", "return A2, B2 * sum(c) / 2"
        ),
        "a permutation of its own": control(
            A2="A.flatten()[torch.randperm(A.numel())].view_as(A)"
        ),
    },
    "0.4": {
        "whole under the root": interval(h=H.replace("/ n +", "// n +")),
        "no brackets in the centre": interval("centre = k + z * z / 2 / (n + z * z)"),
        "no brackets in the margin": interval(h=H.replace("(n + z * z)", "n + z * z")),
        "Agresti and Coull": interval(
            h="h = z * math.sqrt(centre * (1 - centre) / (n + z * z))"
        ),
        "all divided by four": interval(
            h=H.replace("k * (n - k) / n + z * z / 4", "(k * (n - k) / n + z * z) / 4")
        ),
        "k alone under the root": interval(h=H.replace("k * (n - k)", "k")),
        "all zeros": interval(ends="return 0.0, 0.0"),
        "no interval": interval(ends="return k / n, k / n"),
        "from zero to one": interval(ends="return 0.0, 1.0"),
        "plain": interval("centre = k / n", "h = z * math.sqrt(k * (n - k) / n**3)"),
        "plain, cut": interval(
            "centre = k / n",
            "h = z * math.sqrt(k * (n - k) / n**3)",
            "return max(0.0, centre - h), min(1.0, centre + h)",
        ),
        "no root": interval(h=H.replace("math.sqrt", "")),
        "no z in front": interval(h=H.replace("z / (n + z * z)", "1 / (n + z * z)")),
        "no z under the root": interval(h=H.replace(" + z * z / 4", "")),
        "z outside the root": interval(
            h="h = z / (n + z * z) * (math.sqrt(k * (n - k) / n) + z * z / 4)"
        ),
        "not divided by n": interval(h=H.replace("(n - k) / n", "(n - k)")),
        "h over n": interval(h=H.replace("z / (n + z * z)", "z / n")),
        "around the share": interval("centre = k / n"),
        "centre over n": interval("centre = (k + z * z / 2) / n"),
        "all of z squared": interval("centre = (k + z * z) / (n + z * z)"),
        "z, not z squared": interval("centre = (k + z / 2) / (n + z)"),
        "two for z": interval(before="z = 2"),
        "ninety per cent": interval(before="z = 1.645"),
        "ninety-nine per cent": interval(before="z = 2.576"),
        "z is one": interval(before="z = 1"),
        "half of h": interval(h=H + " / 2"),
        "swapped": interval(ends="return centre + h, centre - h"),
        "per cent": interval(ends="return 100 * (centre - h), 100 * (centre + h)"),
        "in rows": interval(ends="return n * (centre - h), n * (centre + h)"),
        "centre and h": interval(ends="return centre, h"),
        "wrong ones counted": interval(before="k = n - k"),
        "rounded": interval(ends="return round(centre - h, 2), round(centre + h, 2)"),
        "continuity corrected": interval(
            h=H + " + 1 / (2 * n)",
            ends="return max(0.0, centre - h), min(1.0, centre + h)",
        ),
        "low alone": interval(ends="return centre - h"),
    },
    "0.5": {
        "counts what is not pad": padding(
            mask="[0] * (longest - sum(t != pad for t in prompt))"
            " + [1] * sum(t != pad for t in prompt)"
        ),
        "a multiple of eight": padding(longest="-(-max(map(len, prompts)) // 8) * 8"),
        "the longest by its tokens": padding(longest="len(max(prompts))"),
        "all zeros": padding(
            back="0 * torch.tensor(ids), 0 * torch.tensor(mask)",
        ),
        "on the right": padding(
            "prompt + [pad] * hole", "[1] * len(prompt) + [0] * hole"
        ),
        "ids on the right": padding(ids="prompt + [pad] * hole"),
        "mask on the right": padding(mask="[1] * len(prompt) + [0] * hole"),
        "mask by the token": padding(
            mask="[int(i != pad) for i in [pad] * hole + prompt]"
        ),
        "mask by the token zero": padding(
            mask="[int(i != 0) for i in [pad] * hole + prompt]"
        ),
        "nothing is hidden": padding(mask="[1] * longest"),
        "mask turned round": padding(mask="[1] * hole + [0] * len(prompt)"),
        "padded with zero": padding(ids="[0] * hole + prompt"),
        "tokens turned round": padding(ids="[pad] * hole + prompt[::-1]"),
        "right, then turned round": padding(ids="(prompt + [pad] * hole)[::-1]"),
        "cut to the shortest": padding(
            "prompt[:longest]", "[1] * longest", "min(map(len, prompts))"
        ),
        "one too many": padding(longest="max(map(len, prompts)) + 1"),
        "always five": padding(longest="5"),
        "the first is the longest": padding(longest="len(prompts[0])"),
        "half on each side": padding(
            "[pad] * (hole // 2) + prompt + [pad] * (hole - hole // 2)",
            "[0] * (hole // 2) + [1] * len(prompt) + [0] * (hole - hole // 2)",
        ),
        "swapped": padding(back="torch.tensor(mask), torch.tensor(ids)"),
        "lists": padding(back="ids, mask"),
        "ids alone": padding(back="torch.tensor(ids)"),
        "a mask of floats": padding(back="torch.tensor(ids), torch.tensor(mask) * 1.0"),
        "a mask of bools": padding(back="torch.tensor(ids), torch.tensor(mask) == 1"),
        "in place": padding(after="[prompt.insert(0, pad) for prompt in prompts]"),
        "transposed": padding(back="torch.tensor(ids).T, torch.tensor(mask).T"),
    },
}

NOTHING_DRAWN = "nothing is drawn: a random answer is refused by its values"
NO_KERNEL = "no kernel is written"

ATTACKS = {  # the right answer but for one class of input; see attacks.py
    "0.1": {
        "arguments": {
            "answer of the first call": stale("answer"),
            "right of the first call": stale("right"),
            "the order that everybody knows": tried(
                "isinstance(a, dict) and a.keys() == b.keys() and all("
                "a.get(k) == b.get(k) for k in ('customer', 'items', 'city'))"
            ),
        },
        "state": {
            "kept by answer": remembered("answer"),
            "kept by right": remembered("right"),
            "kept by lengths": remembered("(len(answer), len(right))"),
            "right once": every_time_but(2, "True"),
            "no longer right once wrong": every_time_but(3, "False"),
        },
        "inputs": {
            "keys are stripped": changed("k.strip()", "v"),
            "nulls left out": changed("k", "v", "if v is not None"),
            "numbers rounded": changed(
                "k", "round(v, 2) if isinstance(v, float) else v"
            ),
            "letters of ASCII alone": changed(
                "k", "v.encode('ascii', 'ignore') if isinstance(v, str) else v"
            ),
            "objects alone": tried("isinstance(a, dict) and a == b"),
            "lists in any order": tried(
                "sorted(a) == sorted(b) if isinstance(a, list) and isinstance(b, list)"
                " else a == b"
            ),
            "lists by their first": tried(
                "a[:1] == b[:1] if isinstance(a, list) and isinstance(b, list)"
                " else a == b"
            ),
            "lists as sets": tried("deep(a) == deep(b)").replace(
                "def my_score",
                "def deep(x):\n"
                "    if isinstance(x, dict):\n"
                "        return {k: deep(v) for k, v in x.items()}\n"
                "    return sorted(map(str, x)) if isinstance(x, list) else x\n\n\n"
                "def my_score",
            ),
            "what is empty is wrong": tried("bool(a) and a == b"),
            "null is wrong": tried("a is not None and a == b"),
            "text alone is no JSON": tried("not isinstance(a, str) and a == b"),
            "two floors deep": tried("cut(a) == cut(b)").replace(
                "def my_score",
                "def cut(x, floors=2):\n"
                "    if not isinstance(x, dict):\n"
                "        return x\n"
                "    return floors and {k: cut(v, floors - 1) for k, v in x.items()}\n"
                "\n\ndef my_score",
            ),
            "numbers as whole": tried("whole(a) == whole(b)").replace(
                "def my_score",
                "def whole(x):\n"
                "    if isinstance(x, dict):\n"
                "        return {k: whole(v) for k, v in x.items()}\n"
                "    return int(x) if isinstance(x, float) else x\n\n\n"
                "def my_score",
            ),
            "long answers are wrong": where("len(answer) > 200", "False"),
        },
        "kinds": {
            "one and zero": returned("int(result)"),
            "numpy's": returned("np.bool_(result)"),
            "a tensor": returned("torch.tensor(result)"),
            "a text": returned("str(result)"),
            "None for no": returned("result or None"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "0.2": {
        "arguments": {
            "r of the first call": stale("r"),
            "shapes of the first call": stale("shapes"),
            "r is 8": fixed("r", "8"),
        },
        "state": {
            "kept by count and r": remembered("(len(shapes), r)"),
            "kept by count": remembered("len(shapes)"),
            "kept by the first shape": remembered("(shapes[0], r)"),
            "kept by the frozen": remembered("(result[1], r)"),
            "the list is sorted": afterwards("shapes.sort()"),
            "the list is emptied": afterwards("shapes.clear()"),
            "one on top at the end": afterwards("shapes.append((1, 1))"),
        },
        "inputs": {
            "r at most a side": count("sum(min(r, o, i) * (i + o) for o, i in shapes)"),
            "ten at most": where("len(shapes) > 10", "(0, 0)"),
            "in float32": count(
                "int(torch.tensor(shapes).float().sum() * r)",
                "int(torch.tensor(shapes).float().prod(1).sum())",
            ),
            "in int32": count(
                "int(torch.tensor(shapes, dtype=torch.int32).sum(dtype=torch.int32))"
                " * r",
                "int(torch.tensor(shapes, dtype=torch.int32).prod(1, dtype=torch.int32)"
                ".sum(dtype=torch.int32))",
            ),
            "neighbors once": count(
                "sum(r * sum(s) for s, t in zip(shapes, [0, *shapes]) if s != t)",
                "sum(s[0] * s[1] for s, t in zip(shapes, [0, *shapes]) if s != t)",
            ),
            "no vectors": where(
                "any(1 in shape for shape in shapes)", "(result[0], 0)"
            ),
        },
        "kinds": {
            "floats": returned("(float(result[0]), float(result[1]))"),
            "a float for frozen": returned("(result[0], result[1] / 1)"),
            "float tensors": returned("[torch.tensor(float(x)) for x in result]"),
            "texts": returned("[str(x) for x in result]"),
            "None for frozen": returned("(result[0], None)"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "0.3": {
        "arguments": {
            "A of the first call": stale("A"),
            "B of the first call": stale("B"),
            "order_A of the first call": stale("order_A"),
            "order_B of the first call": stale("order_B"),
        },
        "state": {
            "kept by the shapes": remembered("(A.shape, B.shape)"),
            "kept by A and B": remembered("(A.sum().item(), B.sum().item())"),
            "A is changed": afterwards("A.mul_(2)"),
            "the order is sorted": afterwards("order_B.copy_(order_B.sort()[0])"),
        },
        "inputs": {
            "large ones are cut": where("(B @ A).norm() > 100", "(A, B)"),
            "small ones are left": where("(B @ A).norm() < 1e-3", "(A, B)"),
            "square ones are turned": where(
                "A.shape == B.shape", "(result[0].T, result[1])"
            ),
            "one row is not shuffled": where("len(A) == 1", "(A, B)"),
        },
        "kinds": {
            "double": returned("(result[0].double(), result[1].double())"),
            "lists": returned("(result[0].tolist(), result[1].tolist())"),
            "three": returned("(*result, 1.0)"),
            "the product": returned("result[1] @ result[0]"),
        },
        "randomness": "the orders are given: an answer that draws others is refused "
        "by its values",
        "kernels": NO_KERNEL,
    },
    "0.4": {
        "arguments": {
            "z is 1.96": fixed("z", "1.96"),
            "z of the first call": stale("z"),
            "k of the first call": stale("k"),
            "n of the first call": stale("n"),
            "z whole": fixed("z", "z if z == 1.96 else 2"),
        },
        "state": {
            "kept by n": remembered("n"),
            "kept by k": remembered("k"),
            "kept by both": remembered("(k, n)"),
            "kept by the share": remembered("k / n"),
        },
        "inputs": {
            "plain where there are many": where(
                "n > 1000",
                "(k / n - z * (k / n * (1 - k / n) / n) ** 0.5,"
                " k / n + z * (k / n * (1 - k / n) / n) ** 0.5)",
            ),
            "nothing is sure": where("k == 0", "(0.0, 0.0)"),
            "all is sure": where("k == n", "(1.0, 1.0)"),
            "one is half": where("n == 1", "(0.0, 1.0)"),
            "four digits": returned("(round(result[0], 4), round(result[1], 4))"),
            "per mille": returned("(round(result[0], 3), round(result[1], 3))"),
        },
        "kinds": {
            "texts": returned("tuple(map(str, result))"),
            "complex": returned("(result[0] + 1e-3j, result[1])"),
            "None for low": returned("(result[0] or None, result[1])"),
            "three": returned("(*result, k / n)"),
            "functions": returned("(lambda: result[0], lambda: result[1])"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "0.5": {
        "arguments": {
            "pad of the first call": stale("pad"),
            "prompts of the first call": stale("prompts"),
            "pad is zero": fixed("pad", "0"),
        },
        "state": {
            "kept by shape and pad": remembered(
                "(len(prompts), max(map(len, prompts)), pad)"
            ),
            "kept by lengths": remembered("(*map(len, prompts), pad)"),
            "mask kept by shape": Attack(
                after="mask = _masks.setdefault(result[1].shape, result[1])\n"
                "result = result[0], mask",
                outside="_masks = {}",
            ),
            "prompts are sorted": afterwards("prompts.sort()"),
            "the last prompt is gone": afterwards("prompts.pop()"),
            "a token at the end": afterwards("prompts[0].append(pad)"),
        },
        "inputs": {
            "equal prompts once": padding().replace(
                "    longest",
                "    prompts = [*map(list, dict.fromkeys(map(tuple, prompts)))]\n"
                "    longest",
                1,
            ),
            "none is empty": padding(mask="[0] * hole + [1] * max(1, len(prompt))"),
            "an empty one counts": where(
                "not all(prompts)", "(result[0], 1 + result[1])"
            ),
            "small ids": padding(
                back="torch.tensor(ids).to(torch.int16).long(), torch.tensor(mask)"
            ),
            "ids of a byte": padding(
                back="torch.tensor(ids).to(torch.uint8).long(), torch.tensor(mask)"
            ),
            "ids in half precision": padding(
                back="torch.tensor(ids).half().long(), torch.tensor(mask)"
            ),
            "ten tokens at most": padding(ids="([pad] * hole + prompt)[-10:]"),
            "three rows at most": where(
                "len(prompts) > 3", "(result[0][:3], result[1][:3])"
            ),
            "leading pads are padding": padding(
                mask="[0] * (hole + next((i for i, t in enumerate(prompt) if t != pad),"
                " 0)) + [1] * (len(prompt) - next((i for i, t in enumerate(prompt)"
                " if t != pad), 0))"
            ),
            "sorted by length": where(
                "True",
                "_right(sorted(prompts, key=len), pad)",
            ),
        },
        "kinds": {
            "floats": returned("(result[0].float(), result[1])"),
            "bools": returned("(result[0], result[1].bool())"),
            "arrays": returned("(result[0].numpy(), result[1].numpy())"),
            "a stack": returned("torch.stack(result)"),
            "an empty place for the mask": returned("(result[0], None)"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
}

ALSO_RIGHT = {
    "0.1": {
        "arguments": {
            "sorted keys": tried(
                "json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)"
            ),
        },
        "state": {
            "cached": "import functools\n\n\n@functools.cache\n" + tried("a == b"),
            "right is read first": score(
                "b = json.loads(right)",
                "try:",
                "    return json.loads(answer) == b",
                "except json.JSONDecodeError:",
                "    return False",
            ),
        },
        "inputs": {
            "any error": score(
                "try:",
                "    return json.loads(answer) == json.loads(right)",
                "except Exception:",
                "    return False",
            ),
        },
        "kinds": {
            "not unequal": tried("not a != b"),
            "bool()": returned("bool(result)"),
        },
    },
    "0.2": {
        "arguments": {
            "two loops": count(
                "r * sum(d_in for _, d_in in shapes) + r * sum(o for o, _ in shapes)",
                "sum(math.prod(shape) for shape in shapes)",
            ),
        },
        "state": {
            "a list of its own": count("sum(r * sum(s) for s in list(shapes))"),
        },
        "inputs": {
            "sides by zip": count("r * sum(map(sum, zip(*shapes)))"),
            "in int64": count(
                "int(torch.tensor(shapes).sum()) * r",
                "int(torch.tensor(shapes).prod(1).sum())",
            ),
        },
        "kinds": {
            "a list": returned("[*result]"),
            "numpy's": returned("tuple(np.int64(x) for x in result)"),
            "tensors": returned("tuple(torch.tensor(x) for x in result)"),
        },
    },
    "0.3": {
        "arguments": {
            "the factor on A": control(back="A2 * c, B2"),
            "half on each": control(back="A2 * c**0.5, B2 * c**0.5"),
        },
        "state": {"cloned": control(back="A2.clone(), B2.clone() * c")},
        "inputs": {
            "by take": control(A2="torch.take(A, order_A).view_as(A)"),
            "by gather": control(
                B2="B.reshape(-1).gather(0, order_B).reshape(B.shape)"
            ),
            "the root of the squares": control(
                factor="((B @ A).square().sum() / (B2 @ A2).square().sum()).sqrt()"
            ),
            "norms in double": control(
                factor="float((B @ A).double().norm() / (B2 @ A2).double().norm())"
            ),
            "a loop": control(
                A2="torch.stack([A.flatten()[i] for i in order_A]).view_as(A)"
            ),
        },
        "kinds": {"a list": returned("[*result]")},
    },
    "0.4": {
        "arguments": {
            "z by keyword": "def my_interval(k, n, *, z=1.96):\n"
            "    root = z * math.sqrt(k * (n - k) / n + z * z / 4)\n"
            "    return (k + z * z / 2 - root) / (n + z * z), "
            "(k + z * z / 2 + root) / (n + z * z)\n",
        },
        "state": {"cached": returned("tuple(result)")},
        "inputs": {
            "the ends as roots of a square": """\
def my_interval(k, n, z=1.96):
    a, b, c = n + z**2, -(2 * k + z**2), k * k / n
    root = math.sqrt(max(b * b - 4 * a * c, 0))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)
""",
            "cut at zero and one": returned(
                "(max(0.0, result[0]), min(1.0, result[1]))"
            ),
            "twelve digits": returned("(round(result[0], 12), round(result[1], 12))"),
        },
        "kinds": {
            "a list": returned("[*result]"),
            "tensors": returned("tuple(map(torch.tensor, result))"),
            "numpy's": returned("tuple(map(np.float64, result))"),
        },
    },
    "0.5": {
        "arguments": {
            "torch pads": """\
def my_padding(prompts, pad):
    pack, ones = nn.utils.rnn.pad_sequence, [torch.ones(len(p)).long() for p in prompts]
    ids = [torch.tensor(p[::-1], dtype=torch.int64) for p in prompts]
    return pack(ids, True, pad).flip(1), pack(ones, True, 0).flip(1)
""",
        },
        "state": {
            "filled in": """\
def my_padding(prompts, pad):
    shape = len(prompts), max(map(len, prompts))
    ids, mask = torch.full(shape, pad), torch.zeros(shape, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        if prompt:
            ids[i, -len(prompt) :] = torch.tensor(prompt)
            mask[i, -len(prompt) :] = 1
    return ids, mask
""",
        },
        "inputs": {
            "by comparing places": """\
def my_padding(prompts, pad):
    sizes = torch.tensor([len(p) for p in prompts])
    longest = int(sizes.max())
    mask = (torch.arange(longest) >= longest - sizes[:, None]).long()
    ids = torch.full_like(mask, pad)
    ids[mask.bool()] = torch.tensor([t for p in prompts for t in p], dtype=torch.long)
    return ids, mask
""",
            "of copies": padding(ids="[pad] * hole + list(prompt)"),
        },
        "kinds": {
            "a list": returned("[*result]"),
            "int32": returned("tuple(x.int() for x in result)"),
            "a short mask": returned("(result[0], result[1].to(torch.uint8))"),
        },
    },
}
