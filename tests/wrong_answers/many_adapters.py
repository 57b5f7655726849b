"""Wrong answers to the exercises of notebook 13; each must be refused by its check."""

from attacks import (
    afterwards,
    every_time_but,
    fixed,
    remembered,
    returned,
    stale,
    where,
)

from peft_from_scratch.course.checks import many_adapters as checks  # noqa: F401

PREAMBLE = "from peft_from_scratch.course import page_picture"

GATHER = """\
def my_gather(x, W0, A, B, v):
    r = {r}
    wide_A = torch.stack([{pad_A} for a in A])
    wide_B = torch.stack([{pad_B} for b in B])
    rows = [i for i, each in enumerate(v) if {has}]
    own = [{own} for i in rows]
    h = {base}
    z = torch.bmm(x[rows], wide_A[own].transpose(1, 2))
    h[rows] += {update}
    return {back}
"""
PARTS = dict(
    r="max(map(len, A))",
    pad_A="F.pad(a, (0, 0, 0, r - len(a)))",
    pad_B="F.pad(b, (0, r - b.shape[1]))",
    has="each is not None",
    own="v[i]",
    base="x @ W0.T",
    update="torch.bmm(z, wide_B[own].transpose(1, 2))",
    back="h",
)


def gather(**parts):
    return GATHER.format(**PARTS | parts)


PLAN = """\
def my_plan(memory, row, adapter, trace, load, seconds):
    {first}
    best = None
    for rows, group in {each}:
        slots = {slots}
        if {refused}:
            continue
        time = load * {loads} + group * {groups}
        if {better}:
            best = rows, slots, time
    return {back}
"""
PLAN_PARTS = dict(
    first="pass",
    each="seconds.items()",
    slots="(memory - rows * row) // adapter",
    refused="slots < rows",
    loads="page_picture.faults(slots, trace)",
    groups="math.ceil(len(trace) / rows)",
    better="best is None or time < best[2]",
    back="best",
)


def plan(**parts):
    return PLAN.format(**PLAN_PARTS | parts)


CACHE = """\
class MyPrefixCache:
    {shared}
    def __init__(self):
        {init}

    def keep(self, version, tokens, cache):
        {before}
        self.kept[{key}, {copy}] = {kept}

    def find(self, version, prompt):
        for n in {lengths}:
            if ({key}, {begin}) in self.kept:
                return {back}
        return {nothing}
"""
CACHE_PARTS = dict(
    shared="pass",
    init="self.kept = {}",
    before="pass",
    key="version and version.digest",
    copy="tuple(tokens)",
    kept="cache",
    lengths="range(len(prompt) - 1, 0, -1)",
    begin="tuple(prompt[:n])",
    back="n, self.kept[version and version.digest, tuple(prompt[:n])]",
    nothing="(0, None)",
)


def cache(**parts):
    key = parts.get("key", CACHE_PARTS["key"])
    back = f"n, self.kept[{key}, {parts.get('begin', CACHE_PARTS['begin'])}]"
    return CACHE.format(**CACHE_PARTS | {"back": back} | parts)


FIFO = (
    "(lambda seen, n=[0]: [(n.__setitem__(0, n[0] + 1), seen.append(a), "
    "len(seen) > slots and seen.pop(0)) for a in trace if a not in seen] and n[0] "
    "or n[0])([])"
)
MUTANTS = {
    "13.1": {
        "all zeros": "def my_gather(x, W0, A, B, v):\n    return 0 * (x @ W0.T)\n",
        "the base alone": gather(update="0"),
        "no base": gather(base="0 * x @ W0.T"),
        "the base twice": gather(base="2 * x @ W0.T"),
        "adapter 0 for all": gather(own="0"),
        "the first row's adapter for all": gather(has="v[0] is not None", own="v[0]"),
        "None is adapter 0": gather(has="True", own="v[i] or 0"),
        "None is the last adapter": gather(
            has="True", own="-1 if v[i] is None else v[i]"
        ),
        "adapter 0 is none": gather(has="each"),
        "cut to the smallest rank": gather(
            r="min(map(len, A))", pad_A="a[:r]", pad_B="b[:, :r]"
        ),
        "padded with ones": gather(
            pad_A="F.pad(a, (0, 0, 0, r - len(a)), value=1.0)",
            pad_B="F.pad(b, (0, r - b.shape[1]), value=1.0)",
        ),
        "A is padded in front": gather(pad_A="F.pad(a, (0, 0, r - len(a), 0))"),
        "the neighbor's B": gather(
            update="torch.bmm(z, wide_B[own[1:] + own[:1]].transpose(1, 2))"
        ),
        "subtracted": gather(update="-torch.bmm(z, wide_B[own].transpose(1, 2))"),
        "in the order of the adapters": gather(
            back="h[sorted(range(len(v)), key=lambda i: (v[i] is None, v[i] or 0))]"
        ),
        "a loop over the rows": (
            "def my_gather(x, W0, A, B, v):\n"
            "    h = [row @ W0.T for row in x]\n"
            "    h = [y if a is None else y + row @ A[a].T @ B[a].T"
            " for y, row, a in zip(h, x, v)]\n"
            "    return torch.stack(h)\n"
        ),
        "a loop over the adapters": (
            "def my_gather(x, W0, A, B, v):\n"
            "    h = x @ W0.T\n"
            "    for a in set(v) - {None}:\n"
            "        rows = [i for i, each in enumerate(v) if each == a]\n"
            "        h[rows] += x[rows] @ A[a].T @ B[a].T\n"
            "    return h\n"
        ),
        "scaled by one over r": gather(
            update="torch.bmm(z, wide_B[own].transpose(1, 2)) / r"
        ),
        "the last token alone": gather(back="h[:, -1:]"),
        "tokens and rows swapped": gather(back="h.transpose(0, 1)"),
    },
    "13.2": {
        "all zeros": plan(back="(0, 0, 0.0)"),
        "the most rows": plan(better="best is None or rows > best[0]"),
        "the most slots": plan(better="best is None or slots > best[1]"),
        "the first that fits": plan(better="best is None"),
        "every request is a load": plan(loads="len(trace)"),
        "each adapter is loaded once": plan(loads="len(set(trace))"),
        "first in, first out": plan(loads=FIFO),
        "no loads": plan(loads="0"),
        "the loads alone": plan(groups="0"),
        "groups are rounded down": plan(groups="(len(trace) // rows)"),
        "groups are not rounded": plan(groups="len(trace) / rows"),
        "one slot is enough": plan(refused="slots < 1"),
        "one slot more than rows": plan(refused="slots <= rows"),
        "rows take no memory": plan(slots="memory // adapter"),
        "a row's adapter is in the row": plan(
            slots="(memory - rows * (row + adapter)) // adapter"
        ),
        "slots are rounded up": plan(slots="-(-(memory - rows * row) // adapter)"),
        "never None": plan(back="best or (1, 1, load + seconds[min(seconds)])"),
        "the time alone": plan(back="best and best[2]"),
        "a load for each group": plan(loads="math.ceil(len(trace) / rows)"),
        "the worst plan": plan(better="best is None or time > best[2]"),
    },
    "13.3": {
        "all zeros": cache(back="0, None"),
        "the name is the key": cache(key="version and version.name"),
        "name and digest are the key": cache(
            key="version and (version.name, version.digest)"
        ),
        "the version is the key": cache(key="version"),
        "no adapter in the key": cache(key="0"),
        "the base is like any adapter": cache(
            key="version.digest if version else ''",
            before="self.kept['digest 3', tuple(tokens)] = cache if not version else 0",
        ),
        "the length is the key": cache(copy="len(tokens)", begin="n"),
        "the set of tokens is the key": cache(
            copy="frozenset(tokens)", begin="frozenset(prompt[:n])"
        ),
        "the last tokens are the key": cache(
            copy="tuple(tokens[-2:])", begin="tuple(prompt[:n][-2:])"
        ),
        "the shortest": cache(lengths="range(1, len(prompt))"),
        "the whole prompt": cache(lengths="range(len(prompt), 0, -1)"),
        "two tokens are left": cache(lengths="range(len(prompt) - 2, 0, -1)"),
        "from one token on nothing": cache(lengths="range(len(prompt) - 1, 1, -1)"),
        "the cache alone": cache(
            back="self.kept[version and version.digest, tuple(prompt[:n])]"
        ),
        "the first is kept": cache(
            kept="self.kept.get((version and version.digest, tuple(tokens)), cache)"
        ),
        "shared by all": cache(shared="kept = {}", init="pass"),
        "taken out when it is used": cache(
            back="n, self.kept.pop((version and version.digest, tuple(prompt[:n])))"
        ),
        "one content a name": cache(
            init="self.kept, self.now = {}, {}",
            before="self.now[version and version.name] = version",
            key="self.now.get(version and version.name)",
        ),
    },
}
NOTHING_DRAWN = "no random number is asked for"
NO_KERNEL = "no kernel is asked for"
ATTACKS = {
    "13.1": {
        "arguments": {
            "x of the first call": stale("x"),
            "W0 of the first call": stale("W0"),
            "A of the first call": stale("A"),
            "B of the first call": stale("B"),
            "v of the first call": stale("v"),
        },
        "state": {
            "remembered by shape": remembered("tuple(x.shape)"),
            "remembered by v": remembered("tuple(v)"),
            "right once": every_time_but(2, "x @ W0.T"),
            "x is changed": afterwards("x.mul_(2)"),
            "v is sorted": afterwards("v.sort(key=str)"),
            "A is changed": afterwards("A[0].add_(1)"),
            "autograd stays off": afterwards("torch.set_grad_enabled(False)"),
        },
        "inputs": {
            "ten adapters": where("len(A) > 10", "x @ W0.T"),
            "ranks up to eight": gather(r="min(8, max(map(len, A)))")
            .replace("a in A", "a in [e[:8] for e in A]")
            .replace("b in B", "b in [e[:, :8] for e in B]"),
            "one token": where("x.shape[1] > 1", "result[:, :1].expand_as(result)"),
            "someone has an adapter": where(
                "not any(e is not None for e in v)", "None"
            ),
        },
        "kinds": {
            "float32": returned("result.float()"),
            "as a list": returned("[*result]"),
            "one row has no row": returned("result.squeeze(0)"),
            "rows and tokens in one": returned("result.flatten(0, 1)"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "13.2": {
        "arguments": {
            "memory of the first call": stale("memory"),
            "a row of the first call": stale("row"),
            "an adapter of the first call": stale("adapter"),
            "the trace of the first call": stale("trace"),
            "the load of the first call": stale("load"),
            "the seconds of the first call": stale("seconds"),
            "ten bytes a row": fixed("row", "10"),
        },
        "state": {
            "the first answer again": remembered("0"),
            "remembered by memory": remembered("memory"),
            "the trace is used up": afterwards("trace.clear()"),
            "plans are used up": afterwards("seconds.clear()"),
        },
        "inputs": {
            "rows in rising order": plan(
                better="(best is None or time < best[2]) and "
                "(best is None or rows > best[0])"
            ),
            "ten adapters": plan(loads="min(10, page_picture.faults(slots, trace))"),
            "slots for all, if there are": plan(
                slots="min((memory - rows * row) // adapter, 10)",
            ),
            "no empty trace": where("not trace", "None"),
        },
        "kinds": {
            "rows as a text": returned("result and (str(result[0]), *result[1:])"),
            "slots with a point": returned(
                "result and (result[0], float(result[1]), result[2])"
            ),
            "as a dictionary": returned(
                "result and dict(zip(('rows', 'slots', 'time'), result))"
            ),
            "False for None": returned("result or False"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "13.3": {
        "arguments": {
            "the version of the first call": stale("version", "find"),
            "the tokens of the first call": stale("tokens", "keep"),
            "the prompt of the first call": stale("prompt", "find"),
        },
        "state": {
            "the list itself": cache(
                init="self.kept = []",
            )
            .replace(
                "self.kept[version and version.digest, tuple(tokens)] = cache",
                "self.kept.insert(0, (version and version.digest, tokens, cache))",
            )
            .replace(
                "if (version and version.digest, tuple(prompt[:n])) in self.kept:\n"
                "                return n, self.kept[version and version.digest, "
                "tuple(prompt[:n])]",
                "for key, tokens, cache in self.kept:\n"
                "                if key == (version and version.digest) and "
                "[*tokens] == [*prompt[:n]]:\n"
                "                    return n, cache",
            ),
            "a look keeps nothing back": afterwards("self.kept.clear()", method="find"),
            "right twenty times": every_time_but(20, "(0, None)", "find"),
            "the prompt is cut": afterwards(
                "prompt[-1:] = [] if isinstance(prompt, list) else ()", method="find"
            ),
        },
        "inputs": {
            "ten tokens": cache(lengths="range(min(10, len(prompt) - 1), 0, -1)"),
            "five contents": cache(
                before="if len(self.kept) > 5: self.kept.pop(next(iter(self.kept)))"
            ),
            "zeros are padding": cache(
                copy="tuple(t for t in tokens if t)",
                begin="tuple(t for t in prompt[:n] if t)",
            ),
        },
        "kinds": {
            "a copy": cache(kept="__import__('copy').copy(cache)"),
            "n with a point": returned("(float(result[0]), result[1])", "find"),
            "None for nothing": cache(nothing="None"),
            "lists only": cache(begin="tuple(prompt[:n] + [])"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
}
ALSO_RIGHT = {
    "13.1": {
        "arguments": {
            "einsum": gather(
                update="torch.einsum('ntr,ndr->ntd', z, wide_B[own])",
            ),
        },
        "state": {
            "a new tensor": gather(
                update="0",
                back="h.index_add(0, torch.tensor(rows, dtype=torch.long), "
                "torch.bmm(z, wide_B[own].transpose(1, 2)))",
            ),
        },
        "inputs": {
            "an adapter of zeros for none": (
                "def my_gather(x, W0, A, B, v):\n"
                "    r = max(map(len, A))\n"
                "    wide_A = x.new_zeros(len(A) + 1, r, x.shape[2])\n"
                "    wide_B = x.new_zeros(len(A) + 1, len(W0), r)\n"
                "    for i, (a, b) in enumerate(zip(A, B)):\n"
                "        wide_A[i, :len(a)], wide_B[i, :, :len(a)] = a, b\n"
                "    own = [len(A) if i is None else i for i in v]\n"
                "    z = x @ wide_A[own].transpose(1, 2)\n"
                "    return x @ W0.T + z @ wide_B[own].transpose(1, 2)\n"
            ),
        },
        "kinds": {
            "no product at all": (
                "def my_gather(x, W0, A, B, v):\n"
                "    h = (x[:, :, None] * W0).sum(-1)\n"
                "    for i, a in enumerate(v):\n"
                "        if a is not None:\n"
                "            z = (x[i][:, None] * A[a]).sum(-1)\n"
                "            h[i] += (z[:, None] * B[a]).sum(-1)\n"
                "    return h\n"
            ),
        },
    },
    "13.2": {
        "arguments": {
            "the last of equal plans": plan(better="best is None or time <= best[2]"),
        },
        "state": {
            "a list of plans": plan(
                first="plans = []",
                better="plans.append((rows, slots, time)) or False",
                back="min(plans, key=lambda p: p[2]) if plans else None",
            ),
        },
        "inputs": {
            "no more slots than adapters": plan(
                slots="min((memory - rows * row) // adapter, "
                "max(rows, len(set(trace))))"
            ),
        },
        "kinds": {
            "a list": plan(back="best and [*best]"),
            "numpy": plan(back="best and (np.int64(best[0]), *best[1:])"),
        },
    },
    "13.3": {
        "arguments": {
            "the base has a word": cache(key="version.digest if version else 'base'"),
        },
        "state": {
            "a table for each content": cache(
                init="self.kept = __import__('collections').defaultdict(dict)"
            )
            .replace(
                "self.kept[version and version.digest, tuple(tokens)] =",
                "self.kept[version and version.digest][tuple(tokens)] =",
            )
            .replace(
                "(version and version.digest, tuple(prompt[:n])) in self.kept",
                "tuple(prompt[:n]) in self.kept[version and version.digest]",
            )
            .replace(
                "self.kept[version and version.digest, tuple(prompt[:n])]",
                "self.kept[version and version.digest][tuple(prompt[:n])]",
            ),
        },
        "inputs": {
            "tokens as text": cache(
                copy="' '.join(map(str, tokens))",
                begin="' '.join(map(str, prompt[:n]))",
            ),
        },
        "kinds": {"as a list": cache(nothing="[0, None]")},
    },
}
