"""Wrong answers to the exercises of notebook 09; each must be refused by its check."""

from peft_from_scratch.course.checks import paged_optimizers as checks  # noqa: F401

PREAMBLE = "from collections import OrderedDict, deque"

PAGES = """\
class MyPages:
    def __init__(self, slots):
        self.slots, self.resident, self.faults = slots, [], 0
        self.calls = 0

    def use(self, page):
        left = None
        if page in self.resident:
            {hit}
        else:
            {fault}
            if {full}:
                left = {leave}
            {enter}
        return {back}
"""


def pages(
    hit="self.resident.remove(page); self.resident.append(page)",
    fault="self.faults += 1",
    full="len(self.resident) == self.slots",
    leave="self.resident.pop(0)",
    enter="self.resident.append(page)",
    back="left",
):
    return PAGES.format(
        hit=hit, fault=fault, full=full, leave=leave, enter=enter, back=back
    )


PAGER = """\
class MyPager:
    def __init__(self, store):
        self.store, self.page, self.states, self.dirty = store, None, None, False
        self.t = 0
        self.seen = {{}}

    def bring(self, page):
        if {there}:
            return
        if {must}:
            {write}
        self.states = {read}
        self.page, self.dirty = page, {fresh}

    def update(self, p, g, t, lr, beta1, beta2, eps, decay):
        {first}
        m, v = {moments}
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_({beta2}).add_((1 - {beta2}) * g**2)
        {decayed}
        p -= {step}
        self.dirty = {dirty}
"""


def pager(
    there="page == self.page",
    must="self.dirty",
    write="self.store.write(self.page, self.states)",
    read="self.store.read(page)",
    fresh="False",
    first="pass",
    moments="self.states",
    beta2="beta2",
    decayed="p *= 1 - lr * decay",
    step="lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)",
    dirty="True",
):
    return PAGER.format(
        there=there,
        must=must,
        write=write,
        read=read,
        fresh=fresh,
        first=first,
        moments=moments,
        beta2=beta2,
        decayed=decayed,
        step=step,
        dirty=dirty,
    )


ORDER = """\
def my_order(pages, slots, steps):
    {first}
    forward = [*range(pages)]
    return {back}
"""


def order(back, first="pass"):
    return ORDER.format(back=back, first=first)


BOTH_WAYS = "[forward[::-1] if i % 2 else forward for i in range(steps)]"

PLAN = """\
def my_plan(parts, a_token, budget, changes):
    {first}
    def tokens_of(change):
        held = sum(size * change.get(part, 1) for part, size in {parts})
        return {tokens}

    now = tokens_of({now})
    best, most = None, {most}
    for name, change in {each}:
        longest = tokens_of({change})
        if {better}:
            best, most = name, longest
    return {back}
"""


def plan(
    parts="parts.items()",
    tokens='max(0, int((budget - held) // (a_token * change.get("a token", 1))))',
    now="{}",
    most="now",
    each="changes.items()",
    change="change",
    better="longest > most",
    back="now, best, most",
    first="pass",
):
    return PLAN.format(
        parts=parts,
        tokens=tokens,
        now=now,
        most=most,
        each=each,
        change=change,
        better=better,
        back=back,
        first=first,
    )


ROOM = "(budget - held) / (a_token * change.get('a token', 1))"

MUTANTS = {
    "9.1": {
        "a hit counts where it is full": pages(
            hit="if len(self.resident) == self.slots:"
            "\n                self.resident.remove(page)"
            "\n                self.resident.append(page)"
        ),
        "a hit moves one place": pages(
            hit="i = self.resident.index(page)"
            "\n            self.resident[i : i + 2] = self.resident[i : i + 2][::-1]"
        ),
        "all zeros": pages(back="0"),
        "nobody ever leaves": pages(full="False"),
        "most recently used": pages(leave="self.resident.pop()"),
        "first in, first out": pages(hit="pass"),
        "a hit moves to the wrong end": pages(
            hit="self.resident.remove(page); self.resident.insert(0, page)"
        ),
        "the lowest number": pages(
            leave="self.resident.pop(self.resident.index(min(self.resident)))"
        ),
        "the highest number": pages(
            leave="self.resident.pop(self.resident.index(max(self.resident)))"
        ),
        "the second oldest": pages(leave="self.resident.pop(min(1, self.slots - 1))"),
        "one slot too few": pages(full="len(self.resident) >= max(self.slots - 1, 1)"),
        "one slot too many": pages(full="len(self.resident) > self.slots"),
        "all of them leave": pages(leave="self.resident[0]; self.resident.clear()"),
        "leaves on a hit too": pages(
            hit="left = self.resident.pop(0); self.resident.append(left)"
        ),
        "comes in twice": pages(hit="self.resident.append(page)"),
        "a hit counts": pages(
            hit="self.faults += 1; self.resident.remove(page);"
            " self.resident.append(page)"
        ),
        "faults never counted": pages(fault="pass"),
        "first uses not counted": pages(
            fault="self.faults += len(self.resident) == self.slots"
        ),
        "counts from one": pages(fault="self.faults = (self.faults or 1) + 1"),
        "the page that came": pages(back="page"),
        "the page that came, where one left": pages(
            back="None if left is None else page"
        ),
        "says not who": pages(back="None"),
        "says whether": pages(back="left is not None"),
        "the oldest, whether it left or not": pages(back="self.resident[0]"),
        "never comes in": pages(enter="pass"),
        "comes in at the front": pages(enter="self.resident.insert(0, page)"),
        "stays, though it left": pages(leave="self.resident[0]"),
        "the one that is free of charge": pages(
            leave="self.resident.pop(self.calls % self.slots)",
            fault="self.faults += 1; self.calls += 1",
        ),
        "the resident ones": pages(back="self.resident"),
    },
    "9.2": {
        "all zeros": order("[[0] * pages] * steps"),
        "starting over": order("[forward] * steps"),
        "always backward": order("[forward[::-1]] * steps"),
        "backward once": order(
            "[forward[::-1] if i == 1 else forward for i in range(steps)]"
        ),
        "backward every third time": order(
            "[forward if i % 3 else forward[::-1] for i in range(steps)]"
        ),
        "even pages first": order(
            "[sorted(forward, key=lambda p: (p % 2, p)) for i in range(steps)]"
        ),
        "the pages that left first": order(
            "[forward[: pages - slots] + forward[pages - slots :]] * steps"
        ),
        "rotated by the slots": order(
            "[forward[(i * slots) % pages :] + forward[: (i * slots) % pages]"
            " for i in range(steps)]"
        ),
        "only resident pages": order("[forward[:slots] for i in range(steps)]"),
        "one page less": order(BOTH_WAYS.replace("forward[::-1]", "forward[:0:-1]")),
        "one page twice": order(
            "[[0, *(forward[::-1] if i % 2 else forward)] for i in range(steps)]"
        ),
        "each page for all its steps": order("[[p] * steps for p in forward]"),
        "one step less": order(f"{BOTH_WAYS}[1:]"),
        "one list for all steps": order(f"sum({BOTH_WAYS}, [])"),
        "pages from one": order(
            "[[p + 1 for p in (forward[::-1] if i % 2 else forward)]"
            " for i in range(steps)]"
        ),
        "the number of faults": order("pages + (steps - 1) * (pages - slots)"),
        "half of it turned": order(
            "[forward[slots:][::-1] + forward[:slots] if i % 2 else forward"
            " for i in range(steps)]"
        ),
    },
    "9.3": {
        "all zeros": pager(step="p"),
        "never written back": pager(must="False"),
        "always written back": pager(must="self.page is not None"),
        "written through, every time": pager(
            step="lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps);"
            " self.store.write(self.page, self.states)"
        ),
        "written even when it stays": pager(there="False"),
        "read even when it stays": pager(
            there="page == self.page and not self.store.read(page).isnan().all()"
        ),
        "always dirty": pager(fresh="True"),
        "never dirty": pager(dirty="False"),
        "dirty only where something is new": pager(dirty="t == 1"),
        "written to the new page's place": pager(
            write="self.store.write(page, self.states)"
        ),
        "m alone is written": pager(
            write="self.store.write(self.page, torch.stack([self.states[0],"
            " torch.zeros_like(self.states[1])]))"
        ),
        "v alone is written": pager(
            write="self.store.write(self.page, torch.stack([torch.zeros_like("
            "self.states[0]), self.states[1]]))"
        ),
        "m and v swapped on the way": pager(
            write="self.store.write(self.page, self.states.flip(0))"
        ),
        "a fresh page each time": pager(read="0 * self.store.read(page)"),
        "the page before": pager(read="self.store.read(self.page or 0)"),
        "t counts the pages": pager(
            first="self.t += 1; t = self.t",
        ),
        "t from zero, held at one": pager(first="t = max(t - 1, 1)"),
        "always the first step": pager(first="t = 1"),
        "no bias correction": pager(step="lr * m / (v.sqrt() + eps)"),
        "m not corrected": pager(step="lr * m / ((v / (1 - beta2**t)).sqrt() + eps)"),
        "v not corrected": pager(step="lr * (m / (1 - beta1**t)) / (v.sqrt() + eps)"),
        "corrections swapped": pager(
            step="lr * (m / (1 - beta2**t)) / ((v / (1 - beta1**t)).sqrt() + eps)"
        ),
        "no decay": pager(decayed="pass"),
        "decay in the gradient": pager(
            first="g = g + decay * p",
            decayed="pass",
        ),
        "decay without the rate": pager(decayed="p *= 1 - decay"),
        "decay after the step": pager(
            decayed="pass",
            step="lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps);"
            " p *= 1 - lr * decay",
        ),
        "eps under the root": pager(
            step="lr * (m / (1 - beta1**t)) / (v / (1 - beta2**t) + eps).sqrt()"
        ),
        "no root": pager(step="lr * (m / (1 - beta1**t)) / (v / (1 - beta2**t) + eps)"),
        "uphill": pager(
            step="-lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)"
        ),
        "one beta for both": pager(beta2="beta1"),
        "m and v from copies": pager(moments="self.states.clone()"),
        "a new p": pager(
            decayed="p = p * (1 - lr * decay)",
        ),
    },
    "9.4": {
        "all zeros": plan(back="0, None, 0"),
        "the most bytes": plan(
            better="(freed := sum(s - s * change.get(p, 1) for p, s in parts.items()))"
            " > self_freed",
            first="self_freed = -1e99",
        ).replace("best, most = name", "self_freed, best, most = freed, name"),
        "one token costs the same": plan(
            tokens="max(0, int((budget - held) // a_token))"
        ),
        "only one token changes": plan(
            parts="((p, s) for p, s in parts.items())"
        ).replace("size * change.get(part, 1)", "size"),
        "factors are what is saved": plan().replace(
            "size * change.get(part, 1)", "size * (1 - change.get(part, 0))"
        ),
        "rounded": plan(tokens=f"max(0, round({ROOM}))"),
        "rounded up": plan(tokens=f"max(0, math.ceil({ROOM}))"),
        "not rounded": plan(tokens=f"max(0.0, {ROOM})"),
        "below zero": plan(tokens=f"math.floor({ROOM})"),
        "the last of equal ones": plan(better="longest >= most and longest > now"),
        "a change that gains nothing": plan(better="longest >= most"),
        "always a change": plan(most="-1"),
        "one on top of the other": plan(
            first="so_far = {}",
            change="so_far := {key: so_far.get(key, 1) * change.get(key, 1)"
            " for key in {**so_far, **change}}",
        ),
        "the gain": plan(back="now, best, most - now"),
        "the tokens alone": plan(back="now"),
        "the best alone": plan(back="best"),
        "in another order": plan(back="best, now, most"),
        "the first part left out": plan(parts="[*parts.items()][1:]"),
        "the last part left out": plan(parts="[*parts.items()][:-1]"),
        "the first change": plan(
            back="now, *(next(((n, tokens_of(c)) for n, c in"
            " changes.items() if tokens_of(c) > now), (None, now)))"
        ),
        "the worst change": plan(better="longest < most"),
        "the parts are changed": plan().replace(
            "    now = tokens_of",
            "    parts.update(parts | {'spare': 0})\n    now = tokens_of",
        ),
        "the budget is not all": plan(first="budget = 0.95 * budget"),
    },
}


# ---------------------------------------------------------------------------- Attacks


NOTHING_DRAWN = "nothing is drawn: a random answer is refused by its values"
NO_KERNEL = "no kernel is written"

ATTACKS = {  # exercise: {class of checks/CHECKLIST.md: {name: source}}
    "9.1": {
        "arguments": {
            "five slots": pages(full="len(self.resident) == min(self.slots, 5)"),
        },
        "state": {
            "one list for all tables": pages()
            .replace(
                "    def __init__(self, slots):\n",
                "    resident = []\n\n    def __init__(self, slots):\n",
            )
            .replace(
                "self.slots, self.resident, self.faults = slots, [], 0",
                "self.slots, self.faults = slots, 0; self.resident.clear()",
            ),
            "one count for all tables": pages(fault="MyPages.faults += 1")
            .replace(
                "    def __init__(self, slots):\n",
                "    faults = 0\n\n    def __init__(self, slots):\n",
            )
            .replace(
                "self.slots, self.resident, self.faults = slots, [], 0",
                "self.slots, self.resident, MyPages.faults = slots, [], 0",
            ),
            "the slots of the last table": pages(
                full="len(self.resident) == MyPages.slots"
            ).replace("self.slots, self.resident", "MyPages.slots, self.resident"),
        },
        "inputs": {
            "page zero never leaves": pages(back="left or None"),
            "pages below ten": pages(
                hit="i = [p % 10 for p in self.resident]"
                ".index(page % 10); self.resident.append(self.resident.pop(i))"
            ).replace(
                "if page in self.resident:",
                "if page % 10 in [p % 10 for p in self.resident]:",
            ),
            "the same object": pages().replace(
                "if page in self.resident:", "if any(p is page for p in self.resident):"
            ),
            "ten slots": pages(full="len(self.resident) >= min(self.slots, 10)"),
            "sixty uses": pages(
                hit="self.calls += 1; self.calls > 99 or"
                " (self.resident.remove(page), self.resident.append(page))",
            ),
            "a slot that is never full": pages(
                full="len(self.resident) == self.slots and self.slots < 9"
            ),
        },
        "kinds": {
            "a list of who left": pages(back="[left]"),
            "as text": pages(back="left if left is None else str(left)"),
            "with a point": pages(back="left if left is None else float(left)"),
            "-1 for nobody": pages(back="-1 if left is None else left"),
            "False for nobody": pages(back="False if left is None else left"),
            "faults with a point": pages(fault="self.faults += 1.0"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "9.2": {
        "arguments": {
            "eight pages": order(BOTH_WAYS, first="pages = 8"),
            "three steps": order(BOTH_WAYS, first="steps = 3"),
            "four slots": order(
                "[forward if i % 2 == 0 else"
                " forward[pages - 4 :][::-1] + forward[: max(pages - 4, 0)]"
                " for i in range(steps)]"
            ),
        },
        "state": {
            "the first answer again": order(
                f"my_order.__dict__.setdefault('kept', {BOTH_WAYS})"
            ),
            "the pages of the first call": order(
                BOTH_WAYS, first="pages = my_order.__dict__.setdefault('pages', pages)"
            ),
        },
        "inputs": {
            "ten steps": order(
                "[forward[::-1] if i % 2 and i < 9 else forward for i in range(steps)]"
            ),
            "a hundred pages": order(BOTH_WAYS, first="pages = min(pages, 100)"),
            "one slot starts over": order(
                f"[forward] * steps if slots == 1 else {BOTH_WAYS}"
            ),
            "two steps at least": order(BOTH_WAYS, first="steps = max(steps, 2)"),
        },
        "kinds": {
            "with a point": order(
                "[[float(p) for p in (forward[::-1] if i % 2 else forward)]"
                " for i in range(steps)]"
            ),
            "as text": order(f"str({BOTH_WAYS})"),
            "names of pages": order(
                "[[str(p) for p in (forward[::-1] if i % 2 else forward)]"
                " for i in range(steps)]"
            ),
        },
        "randomness": "an order may be drawn: only its faults are judged",
        "kernels": NO_KERNEL,
    },
    "9.3": {
        "arguments": {
            "the rate of the check": pager(
                first="lr = 0.05",
            ),
            "beta1 of the check": pager(first="beta1 = 0.8"),
            "beta2 of the check": pager(first="beta2 = 0.95"),
            "eps of the check": pager(first="eps = 1e-3"),
            "the decay of the check": pager(first="decay = 0.1"),
            "the rate of the first step": pager(
                first="lr = self.seen.setdefault('lr', lr)"
            ),
            "the decay of the first step": pager(
                first="decay = self.seen.setdefault('decay', decay)"
            ),
            "betas of the first step": pager(
                first="beta1, beta2 = self.seen.setdefault('betas', (beta1, beta2))"
            ),
            "t counted by page": pager(
                first="t = self.seen[self.page] = self.seen.get(self.page, 0) + 1"
            ),
        },
        "state": {
            "states in the class": pager().replace("self.states", "MyPager.states"),
            "the page in the class": pager().replace("self.page", "MyPager.page"),
            "dirty in the class": pager().replace("self.dirty", "MyPager.dirty"),
            "the store in the class": pager().replace("self.store", "MyPager.store"),
            "pages kept beside the slot": pager(
                read="self.seen.setdefault(page, self.store.read(page))",
            ),
            "pages kept beside the slot, and read": pager(
                read="(self.store.read(page), self.seen.setdefault(page,"
                " torch.zeros_like(self.store.pages[page])))[1]",
            ),
            "in the store itself": pager(
                read="(self.store.read(page), self.store.pages[page])[1]",
            ),
            "zeros at the first sight of a page": pager(
                read="self.store.read(page) * (page in self.seen);"
                " self.seen[page] = True",
            ),
            "dirty up to step nine": pager(dirty="t < 9"),
            "dirty where a gradient is": pager(dirty="bool(g.any())"),
            "g is changed": pager(first="g.mul_(1.0001)"),
            "g is squared in place": pager(
                step="lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps);"
                " g.pow_(2)",
            ),
            "gradients are left off": pager(first="torch.set_grad_enabled(False)"),
            "the other pages of p move": pager(
                first="p.untyped_storage().nbytes() == p.nbytes or"
                " p.as_strided((p.untyped_storage().nbytes() // 4,), (1,), "
                "0).mul_(0.9999)",
            ),
        },
        "inputs": {
            "the same object": pager(there="page is self.page"),
            "page zero is none": pager(must="self.page and self.dirty"),
            "large gradients are cut off": pager(first="g = g.clamp(-10, 10)"),
            "norms are cut off": pager(first="g = g / max(1.0, float(g.norm()) / 100)"),
            "small gradients are noise": pager(first="g = g * (g.abs() > 1e-5)"),
            "ten pages": pager(must="self.dirty and (self.page < 10)"),
            "nine steps": pager(first="t = min(t, 9)"),
            "pages in order": pager(
                must="self.dirty and page != self.page - 2",
            ),
            "no decay, no shrinking": pager(decayed="p *= 1 - lr * (decay or 0.01)"),
            "six values": pager(
                step="F.pad((lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt()"
                " + eps))[:6], (0, max(0, len(p) - 6)))",
            ),
        },
        "kinds": {
            "states in half precision": pager(
                write="self.store.write(self.page, self.states.half().float())",
            ),
            "p in half precision": pager(
                step="(lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps))"
                ".bfloat16().float()",
            ),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "9.4": {
        "arguments": {
            "the budget of the lesson": plan(first="budget = 48_000_000_000"),
            "the token of the first bill": plan(first="a_token = 2"),
            "the parts of the first bill": plan(
                first="parts = {'weights': 30, 'buffer': 2, 'adapters': 4, 'states': 8}"
            ),
            "the states alone": plan().replace(
                "change.get(part, 1)",
                "(change.get(part, 1) if part == 'states' else 1)",
            ),
        },
        "state": {
            "the first answer again": plan(
                back="my_plan.__dict__.setdefault('kept', (now, best, most))"
            ),
            "the best of all calls": plan(
                back="(now, my_plan.__dict__.setdefault('best', best), most)"
            ),
            "a change is used up": plan(
                better="longest > most and (change.clear() or True)"
            ),
        },
        "inputs": {
            "one part": plan(parts="[*parts.items()][:4]"),
            "ten changes": plan(each="[*changes.items()][:10]"),
            "a million tokens at most": plan(
                tokens="max(0, min(1000, int((budget - held) // (a_token *"
                ' change.get("a token", 1)))))'
            ),
            "one token at least": plan(
                tokens="max(1, int((budget - held) // (a_token *"
                ' change.get("a token", 1))))'
            ),
            "no factor above one": plan().replace(
                "size * change.get(part, 1)", "size * min(1, change.get(part, 1))"
            ),
            "a change has one factor": plan(
                change="dict([*change.items()][:1])",
            ),
        },
        "kinds": {
            "tokens with a point": plan(back="float(now), best, float(most)"),
            "as a dictionary": plan(back="dict(tokens=now, best=best, most=most)"),
            "the change itself": plan(back="now, changes.get(best), most"),
            "an empty name": plan(back="now, best or '', most"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
}
ALSO_RIGHT = {  # exercise: {class: {name: source of an answer}}
    "9.1": {
        "arguments": {
            "free slots counted down": pages(
                full="not self.free",
                enter="self.free -= left is None; self.resident.append(page)",
            ).replace("self.calls = 0", "self.free = slots"),
        },
        "state": {
            "a deque": pages(leave="self.resident.popleft()").replace(
                "slots, [], 0", "slots, deque(), 0"
            ),
        },
        "inputs": {
            "times of use": pages(
                hit="pass",
                leave="min(self.resident, key=self.resident.get);"
                " del self.resident[left]",
                enter="pass",
                back="(self.resident.__setitem__(page, self.faults + len(self.seen)),"
                " self.seen.append(page), left)[2]",
            )
            .replace("slots, [], 0", "slots, {}, 0")
            .replace("self.calls = 0", "self.seen = []"),
        },
        "kinds": {
            "a table read anew": pages().replace(
                "    def use(self, page):",
                "    @property\n    def count(self):\n"
                "        return len(self.resident)\n\n    def use(self, page):",
            ),
        },
    },
    "9.2": {
        "arguments": {
            "resident pages first": order(
                "[forward[(-i * slots) % pages :] + forward[: (-i * slots) % pages]"
                " for i in range(steps)]"
            ),
        },
        "state": {
            "backward first": order(
                "[forward if i % 2 else forward[::-1] for i in range(steps)]"
            ),
        },
        "inputs": {
            "one list turned in place": order(
                "[(forward.reverse(), [*forward])[1] for i in range(steps)]"
            ),
        },
        "kinds": {
            "tuples and ranges": order(
                "tuple(range(pages)[::-1] if i % 2 else tuple(forward)"
                " for i in range(steps))"
            ),
            "arrays": order(
                "[np.arange(pages)[:: -1 if i % 2 else 1] for i in range(steps)]"
            ),
            "tensors": order(
                "[torch.arange(pages).flip(0) if i % 2 else torch.arange(pages)"
                " for i in range(steps)]"
            ),
        },
    },
    "9.3": {
        "arguments": {
            "in torch's own order": pager(
                decayed="p.mul_(1 - lr * decay)",
                step="lr / (1 - beta1**t) * m / (v.sqrt() / (1 - beta2**t) ** 0.5 "
                "+ eps)",
            ),
        },
        "state": {
            "a dictionary for the slot": pager().replace(
                "self.seen = {}", "self.seen = {'store': store}"
            ),
            "written when it leaves, as a copy": pager(
                write="self.store.write(self.page, self.states.clone())"
            ),
        },
        "inputs": {
            "into both at once": pager(
                first="self.states.mul_(torch.tensor([[beta1], [beta2]]))",
                moments="self.states.add_(torch.stack([(1 - beta1) * g,"
                " (1 - beta2) * g**2]))",
            )
            .replace("        m.mul_(beta1).add_((1 - beta1) * g)\n", "")
            .replace("        v.mul_(beta2).add_((1 - beta2) * g**2)\n", ""),
        },
        "kinds": {
            "in double precision on the way": pager(
                step="(lr * (m.double() / (1 - beta1**t)) / ((v.double() / (1 - "
                "beta2**t))"
                ".sqrt() + eps)).float()",
            ),
        },
    },
    "9.4": {
        "arguments": {
            "a sorted list": plan(
                back="now, *((best, most) if most > now else (None, now))",
                each="sorted(changes.items(), key=lambda c: -tokens_of(c[1]))",
            ),
        },
        "state": {
            "copies": plan(first="parts, changes = dict(parts), dict(changes)"),
        },
        "inputs": {
            "floor of a quotient": plan(tokens=f"max(0, math.floor({ROOM}))"),
        },
        "kinds": {
            "a list": plan(back="[now, best, most]"),
            "a tensor": plan(back="torch.tensor(now), best, torch.tensor(most)"),
            "numpy": plan(back="np.int64(now), best, np.int64(most)"),
        },
    },
}
