"""Notebook 12's checks: what the common mistakes are told, and what else is right."""

import build
from exercise_checks import checked
from try_answers import lesson

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
        "the tokens' share": "the tokens' share",
        "no scale": "no scale",
        "no causal mask": "later tokens count",
        "counts of positions": "not their weight",
        "n / (n + t)": "later tokens included",
        "the mean of the n": "their sum",
        "one for each position": "add them up",
        "the weights": "add up the first n",
        "a column": "without keepdim",
        "the odds": "divide by both",
        "the mass alone": "not divided by the whole",
        "scores added up": "not their exponentials",
        "overflows": "an overflow",
    },
    "12.4": {
        "all zeros": "(prefix, prompt) for n=5",
        "every query head": "only key-value heads have keys",
        "the hidden size": "the hidden size was taken for h_kv d",
        "no factor 2": "times 2",
        "no layers": "a prefix stands in each",
        "no n": "n is forgotten",
        "hidden size / heads": "config.head_dim",
        "a prompt in every layer": "at the input alone",
        "swapped": "prefix and prompt are swapped",
        "bytes": "parameters are asked for",
        "the prefix alone": "return all 2",
    },
}
PROMPT = "def my_prompt(model, P, input_ids, attention_mask):\n    {}\n"
ATTENTION = "def my_attention(q, K, V, P_K, P_V):\n    {}\n"
SHARE = "def my_share(q, K, P_K):\n    {}\n"
COUNTS = "def my_counts(config, n):\n    {}\n"
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
        "logsumexp": SHARE.format(
            "t, d = q.shape\n"
            "    hidden = torch.full((t, t), float('-inf')).triu(1)\n"
            "    own, front = q @ K.T / d**0.5 + hidden, q @ P_K.T / d**0.5\n"
            "    return torch.sigmoid(front.logsumexp(-1) - own.logsumexp(-1))"
        ),
        "a loop": SHARE.format(
            "shares = []\n"
            "    for i, each in enumerate(q):\n"
            "        s = torch.cat([P_K, K[: i + 1]]) @ each / len(each) ** 0.5\n"
            "        shares.append(s.softmax(0)[: len(P_K)].sum())\n"
            "    return torch.stack(shares)"
        ),
    },
    "12.4": {
        "a list, in another order": COUNTS.format(
            "prompt = config.hidden_size * n\n"
            "    keys = config.head_dim * config.num_key_value_heads * n\n"
            "    return [config.num_hidden_layers * (keys + keys), prompt]"
        ),
        "of a real tensor": COUNTS.format(
            "P = torch.empty(config.num_hidden_layers, 2, n,\n"
            "        config.num_key_value_heads, config.head_dim)\n"
            "    return P.numel(), torch.empty(n, config.hidden_size).numel()"
        ),
    },
}


(
    test_a_common_mistake_is_named,
    test_an_answer_that_is_right_in_another_way_passes,
    test_every_exercise_has_both,
) = checked(LESSON, TOLD, RIGHT)
