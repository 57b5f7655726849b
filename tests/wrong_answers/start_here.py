"""Wrong answers to the exercises of notebook 00; each must be refused by its check."""

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


TRAINED = "sum(r * (d_in + d_out) for d_out, d_in in shapes)"
FROZEN = "sum(d_out * d_in for d_out, d_in in shapes)"


def count(trained=TRAINED, frozen=FROZEN):
    return f"def my_count(shapes, r):\n    return {trained}, {frozen}\n"


CENTRE = "centre = (k + z * z / 2) / (n + z * z)"
H = "h = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)"
ENDS = "return centre - h, centre + h"


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
    "0.4": {
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
