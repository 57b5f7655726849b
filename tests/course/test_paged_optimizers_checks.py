"""Notebook 09's checks: what the common mistakes are told, and what else is right."""

import build
from exercise_checks import checked
from try_answers import lesson

LESSON = lesson(build.FOLDER / "09_paged_optimizers.py")

TOLD = {  # exercise: {mutant: what its learner must read}
    "9.1": {
        "all zeros": "nobody has to leave",
        "nobody ever leaves": "return who left",
        "most recently used": "the one used last left",
        "first in, first out": "a hit is a use too",
        "the lowest number": "the lowest number left",
        "the highest number": "the highest number left",
        "one slot too few": "a slot is free",
        "one slot too many": "all slots are taken",
        "comes in twice": "more pages than slots",
        "never comes in": "put in, once",
        "a hit counts": "a hit is none",
        "faults never counted": "not there is a fault",
        "the page that came, where one left": "not the one that left",
        "stays, though it left": "more pages than slots",
    },
    "9.2": {
        "all zeros": "every page once in each optimizer step",
        "starting over": "just before its next use",
        "always backward": "just before its next use",
        "backward once": "step 4 does not begin with the pages that step 3",
        "even pages first": "just before its next use",
        "rotated by the slots": "does not begin with the pages that step 1",
        "only resident pages": "every page once in each optimizer step",
        "one page less": "every page once in each optimizer step",
        "one page twice": "every page once in each optimizer step",
        "one step less": "one list for each optimizer step",
        "one list for all steps": "one list for each optimizer step",
        "the number of faults": "a list is needed",
        "half of it turned": "does not begin with the pages",
    },
    "9.3": {
        "all zeros": "all entries are zero",
        "never written back": "is dirty, and must be written back",
        "always written back": "clean pages were written back",
        "always dirty": "a page that was just read is clean",
        "never dirty": "is dirty, and must be written back",
        "written through, every time": "nothing is written when nobody leaves",
        "written even when it stays": "is not read again",
        "m alone is written": "v is lost between the steps",
        "v alone is written": "m is lost between the steps",
        "t counts the pages": "it is the step's number",
        "no bias correction": "no bias correction",
        "no decay": "weight decay is missing",
        "decay in the gradient": "weight decay went into the gradient",
        "eps under the root": "eps was added under the root",
        "one beta for both": "it has a beta of its own",
        "nothing at all": "is not read again",
    },
    "9.4": {
        "all zeros": "my_plan(",
        "the most bytes": "frees the most bytes was chosen",
        "one token costs the same": "the bytes of one token did not change",
        "factors are what is saved": "0.25 leaves a quarter",
        "rounded up": "round down",
        "rounded": "round down",
        "below zero": "0 is the least",
        "only one token changes": "a change also multiplies the parts",
        "the last of equal ones": "of equal changes the last was chosen",
        "always a change": "so the best is None",
        "one on top of the other": "each is judged alone",
        "the gain": "the tokens that fit then are asked for",
        "the tokens alone": "three values are needed",
        "the first part left out": "a part is missing from the sum",
        "the last part left out": "a part is missing from the sum",
        "the parts are changed": "belongs to the caller",
    },
}
PAGES = """\
class MyPages:
    def __init__(self, slots):
        {}
    def use(self, page):
        {}
"""
PAGER = """\
class MyPager:
    def __init__(self, store):
        {}
    def bring(self, page):
        {}
    def update(self, p, g, t, lr, beta1, beta2, eps, decay):
        {}
"""
RIGHT = {  # exercise: {name: another right answer}
    "9.1": {
        "an OrderedDict": PAGES.format(
            "self.slots, self.resident, self.faults = slots, OrderedDict(), 0",
            "here = page in self.resident\n"
            "        self.faults += not here\n"
            "        self.resident[page] = None\n"
            "        self.resident.move_to_end(page)\n"
            "        if len(self.resident) > self.slots:\n"
            "            return self.resident.popitem(last=False)[0]\n"
            "        return None",
        ),
        "times of use": PAGES.format(
            "self.slots, self.resident, self.faults, self.now = slots, {}, 0, 0",
            "left, self.now = None, self.now + 1\n"
            "        if page not in self.resident:\n"
            "            self.faults += 1\n"
            "            if len(self.resident) == self.slots:\n"
            "                left = min(self.resident, key=self.resident.get)\n"
            "                del self.resident[left]\n"
            "        self.resident[page] = self.now\n"
            "        return left",
        ),
    },
    "9.2": {
        "the resident pages first": (
            "def my_order(pages, slots, steps):\n"
            "    order = [[*range(pages)]]\n"
            "    while len(order) < steps:\n"
            "        last = order[-1]\n"
            "        order.append(last[-slots:] + last[:-slots])\n"
            "    return order\n"
        ),
    },
    "9.3": {
        "torch's operations": PAGER.format(
            "self.store, self.page, self.dirty = store, None, False",
            "if self.page == page: return\n"
            "        if self.page is not None and self.dirty:\n"
            "            self.store.write(self.page, self.states)\n"
            "        self.states, self.page = self.store.read(page), page\n"
            "        self.dirty = False",
            "m, v = self.states[0], self.states[1]\n"
            "        p.mul_(1 - lr * decay)\n"
            "        m.lerp_(g, 1 - beta1)\n"
            "        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)\n"
            "        root = v.sqrt() / (1 - beta2**t) ** 0.5\n"
            "        p.addcdiv_(m, root.add_(eps), value=-lr / (1 - beta1**t))\n"
            "        self.dirty = True",
        ),
    },
    "9.4": {
        "a maximum with a key": (
            "def my_plan(parts, a_token, budget, changes):\n"
            "    def fits(change):\n"
            "        held = sum(parts[p] * change.get(p, 1) for p in parts)\n"
            "        token = a_token * change.get('a token', 1)\n"
            "        return max(0, math.floor((budget - held) / token))\n"
            "    options = {None: {}} | changes\n"
            "    best = max(options, key=lambda name: fits(options[name]))\n"
            "    return fits({}), best, fits(options[best])\n"
        ),
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)
