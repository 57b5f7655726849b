"""Notebook 12's checks: what the common mistakes are told, and what else is right."""

import build
from exercise_checks import checked
from try_answers import lesson

from peft_from_scratch.course.checks import prefix_and_prompt as checks

LESSON = lesson(build.FOLDER / "12_prefix_and_prompt.py")

TOLD = {  # exercise: {mutant: what its learner must read}
    "12.1": {
        "all zeros": "all entries are zero",
        "P behind": "stands behind the tokens",
        "no P": "P is missing",
        "zeros in the mask for P": "the mask hides P",
        "all ones, padding counted": "padding is counted",
        "the ones behind the mask, counted": "the ones stand behind the mask",
        "positions by default": "the positions count the padding too",
        "positions count the padding": "the positions count the padding too",
        "positions not moved by n": "start at 0 again",
        "positions from one": "the first is 0",
        "outputs not cut": "cut them off",
        "the last n outputs cut": "the last n outputs were cut off",
        "one vector for all": "one row of P",
        "P turned round": "P was turned round",
        "P detached": "no gradient reaches P",
        "P changed": "P itself was changed",
        "the table changed": "the model itself was changed",
    },
    "12.2": {
        "all zeros": "all entries are zero",
        "no scale": "no scale",
        "divided by d": "divided by sqrt(d)",
        "prefix under the causal mask": "the prefix is under the causal mask",
        "prefix behind, and masked": "behind the tokens and so masked",
        "no causal mask": "tokens see later tokens",
        "masked after the softmax": "masked after the softmax",
        "two softmaxes, added": "two softmaxes, added up",
        "two softmaxes, their mean": "two softmaxes, their mean",
        "no prefix": "the prefix is missing",
        "P_V forgotten": "the values of the prefix are forgotten",
        "P_K forgotten": "the keys of the prefix are forgotten",
        "K and V swapped": "K and V are swapped",
        "P_K and P_V swapped": "P_K and P_V are swapped",
        "softmax over the queries": "dim=-1",
        "P cut off": "no gradient reaches P_K",
        "q changed": "q itself was changed",
    },
    "12.3": {
        "all zeros": "all entries are zero",
        "no scale": "no scale",
        "no causal mask": "tokens see later tokens",
        "prefix under the causal mask": "the prefix is under the causal mask",
        "not renormalized": "each row must add up to 1",
        "divided by the share": "the tokens' sum is 1 - share",
        "multiplied by the rest": "the weights are divided by it",
        "among all positions": "cut off the first n",
        "transposed": "rows are queries",
        "the tokens' share": "the tokens' share",
        "the mean of the n": "their sum",
        "one for each position": "add them up",
        "a column": "without keepdim",
        "the odds": "divide by both",
        "counts of positions": "not their weight",
        "swapped": "share and among are swapped",
        "the share alone": "(share, among)",
    },
    "12.4": {
        "all zeros": "each once",
        "everything stays": "nothing was removed",
        "every vector that can go alone": "Two that do the same work",
        "every vector that can go alone, one left": "Two that do the same work",
        "compared with the loss before": "small losses add up",
        "one removal alone": "the search ended too early",
        "strictly less": "exactly `most` is allowed",
        "those that go": "the vectors that go were returned",
        "a fixed ranking, stopped early": "try all that are left again",
        "one pass": "a vector that had to stay at first may go now",
        "none is left": "at least one stays",
        "the empty list is tried": "called with an empty list",
        "all subsets": "all subsets are tried",
        "one removal too many": "one removal too many",
    },
}
PROMPT = "def my_prompt(model, P, input_ids, attention_mask):\n    {}\n"
ATTENTION = "def my_attention(q, K, V, P_K, P_V):\n    {}\n"
SPLIT = "def my_split(q, K, P_K):\n    {}\n"
KEEP = "def my_keep(loss, n, most):\n    {}\n"
RIGHT = {  # exercise: {name: another right answer}
    "12.1": {
        "behind the padding, by the library": PROMPT.format(
            "import copy\n"
            "    model = copy.deepcopy(model)\n"
            "    pfs.prompt.inject(model, n=len(P), start='random')\n"
            "    (name,) = pfs.trainable(model)\n"
            "    trunk = model.get_submodule(name.rpartition('.')[0])\n"
            "    del trunk.P\n"
            "    trunk.P = P\n"
            "    return model(input_ids, attention_mask=attention_mask).logits"
        ),
        "positions from the tokens' own": PROMPT.format(
            "(b, t), n = input_ids.shape, P.shape[0]\n"
            "    E = model.get_input_embeddings().weight[input_ids]\n"
            "    x = torch.cat((P[None].repeat(b, 1, 1), E), 1)\n"
            "    own = attention_mask.cumsum(-1) - 1 + n\n"
            "    first = torch.arange(n).repeat(b, 1)\n"
            "    at = torch.cat((first, own), 1)\n"
            "    mask = F.pad(attention_mask, (n, 0), value=1)\n"
            "    out = model(inputs_embeds=x, attention_mask=mask, position_ids=at)\n"
            "    return out.logits[:, -t:]"
        ),
        "row by row": PROMPT.format(
            "rows = []\n"
            "    for ids, mask in zip(input_ids, attention_mask):\n"
            "        keep = mask.bool()\n"
            "        x = torch.cat([P, model.get_input_embeddings()(ids[keep])])\n"
            "        own = model(inputs_embeds=x[None]).logits[0, len(P):]\n"
            "        row = own.new_zeros(len(ids), own.shape[1])\n"
            "        rows.append(row.index_put((keep.nonzero()[:, 0],), own))\n"
            "    return torch.stack(rows)"
        ),
    },
    "12.2": {
        "torch's own attention": ATTENTION.format(
            "(t, d), n = q.shape, len(P_K)\n"
            "    seen = F.pad(torch.ones(t, t).tril(), (n, 0), value=1).bool()\n"
            "    keys, values = torch.cat([P_K, K]), torch.cat([P_V, V])\n"
            "    return F.scaled_dot_product_attention(q, keys, values, seen)"
        ),
        "the mixture": ATTENTION.format(
            "t, d = q.shape\n"
            "    hidden = torch.full((t, t), float('-inf')).triu(1)\n"
            "    own, front = q @ K.T / d**0.5 + hidden, q @ P_K.T / d**0.5\n"
            "    odds = front.logsumexp(-1) - own.logsumexp(-1)\n"
            "    share = torch.sigmoid(odds)[:, None]\n"
            "    mine, theirs = own.softmax(-1) @ V, front.softmax(-1) @ P_V\n"
            "    return (1 - share) * mine + share * theirs"
        ),
        "the prefix behind, open": ATTENTION.format(
            "t, d = q.shape\n"
            "    own = (q @ K.T).masked_fill(~torch.ones(t, t).bool().tril(), -1e30)\n"
            "    weights = (torch.cat([own, q @ P_K.T], 1) / math.sqrt(d)).softmax(1)\n"
            "    return weights @ torch.cat([V, P_V])"
        ),
    },
    "12.3": {
        "logsumexp": SPLIT.format(
            "t, d = q.shape\n"
            "    hidden = torch.full((t, t), float('-inf')).triu(1)\n"
            "    own, front = q @ K.T / d**0.5 + hidden, q @ P_K.T / d**0.5\n"
            "    share = torch.sigmoid(front.logsumexp(-1) - own.logsumexp(-1))\n"
            "    return share, own.softmax(-1)"
        ),
        "a loop": SPLIT.format(
            "shares, among = [], torch.zeros(len(q), len(q))\n"
            "    for i, each in enumerate(q):\n"
            "        s = torch.cat([P_K, K[: i + 1]]) @ each / len(each) ** 0.5\n"
            "        w, n = s.softmax(0), len(P_K)\n"
            "        shares.append(w[:n].sum())\n"
            "        among[i, : i + 1] = w[n:] / w[n:].sum()\n"
            "    return torch.stack(shares), among"
        ),
    },
    "12.4": {
        "the cheapest, with pop": KEEP.format(
            "keep, full = list(range(n)), loss(list(range(n)))\n"
            "    while len(keep) > 1:\n"
            "        cut = [keep[:i] + keep[i + 1:] for i in range(len(keep))]\n"
            "        costs = [loss(each) for each in cut]\n"
            "        if min(costs) - full > most:\n"
            "            return keep\n"
            "        keep.pop(int(np.argmin(costs)))\n"
            "    return keep"
        ),
        "recursion": KEEP.format(
            "limit = loss(list(range(n))) + most\n"
            "    def less(keep):\n"
            "        for i in keep if len(keep) > 1 else []:\n"
            "            rest = [j for j in keep if j != i]\n"
            "            if loss(rest) <= limit:\n"
            "                return less(rest)\n"
            "        return keep\n"
            "    return less(list(range(n)))"
        ),
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)


def test_the_librarys_own_answers_pass():
    """A lesson goes on with them where the learner's have not passed."""
    checks.prompt_forward(checks.library_prompt)
    checks.prefix_attention(checks.library_attention)
    checks.attention_split(checks.library_split)
    checks.kept_vectors(checks.library_keep)
