"""Wrong answers to the exercises of notebook 12; each must be refused by its check."""

from attacks import first, remembered

from peft_from_scratch.course.checks import prefix_and_prompt as checks  # noqa: F401

PROMPT = """\
def my_prompt(model, P, input_ids, attention_mask):
    b, n = len(input_ids), len(P)
    t = input_ids.shape[1]
    E = model.get_input_embeddings()(input_ids)
    {before}
    joined = {joined}
    mask = {mask}
    positions = {positions}
    out = model(inputs_embeds=joined, attention_mask=mask, position_ids=positions)
    return {back}
"""
ONES = "attention_mask.new_ones(b, n)"
OWN = "(attention_mask.cumsum(1) - 1).clamp(min=0)"


def prompt(
    before="pass",
    joined="torch.cat([P.expand(b, -1, -1), E], dim=1)",
    mask=f"torch.cat([{ONES}, attention_mask], dim=1)",
    positions="(mask.cumsum(1) - 1).clamp(min=0)",
    back="out.logits[:, n:]",
):
    return PROMPT.format(
        before=before, joined=joined, mask=mask, positions=positions, back=back
    )


ATTENTION = """\
def my_attention(q, K, V, P_K, P_V):
    (t, d), n = q.shape, len(P_K)
    scores = {scores}
    seen = {seen}
    weights = {weights}
    return {back}
"""
SCORES = "q @ torch.cat([P_K, K]).T / d**0.5"
SEEN = "torch.ones(t, n + t, dtype=torch.bool).tril(n)"
WEIGHTS = "scores.masked_fill(~seen, float('-inf')).softmax(-1)"
ALONE = "(q @ P_K.T / d**0.5).softmax(-1) @ P_V"
PLAIN = "weights[:, n:] / weights[:, n:].sum(-1, True) @ V"


def attention(
    scores=SCORES,
    seen=SEEN,
    weights=WEIGHTS,
    back="weights @ torch.cat([P_V, V])",
):
    return ATTENTION.format(scores=scores, seen=seen, weights=weights, back=back)


SPLIT = """\
def my_split(q, K, P_K):
    (t, d), n = q.shape, len(P_K)
    scores = {scores}
    seen = {seen}
    weights = {weights}
    share = {share}
    among = {among}
    return {back}
"""


def split(
    scores=SCORES,
    seen=SEEN,
    weights=WEIGHTS,
    share="weights[:, :n].sum(-1)",
    among="weights[:, n:] / weights[:, n:].sum(-1, keepdim=True)",
    back="share, among",
):
    return SPLIT.format(
        scores=scores, seen=seen, weights=weights, share=share, among=among, back=back
    )


KEEP = """\
def my_keep(loss, n, most):
    keep, limit = list(range(n)), {limit}
    while len(keep) > {least}:
        trials = [[j for j in keep if j != i] for i in {tried}]
        losses = [loss(trial) for trial in trials]
        best = {best}
        if {stop}:
            break
        {go}
    return {back}
"""


def keep(
    limit="loss(list(range(n))) + most",
    least="1",
    tried="keep",
    best="losses.index(min(losses))",
    stop="losses[best] > limit",
    go="keep = trials[best]",
    back="keep",
):
    return KEEP.format(
        limit=limit,
        least=least,
        tried=tried,
        best=best,
        stop=stop,
        go=go,
        back=back,
    )


ALONE_COSTS = """\
def my_keep(loss, n, most):
    full = loss(list(range(n)))
    rests = [[j for j in range(n) if j != i] for i in range(n)]
    costs = [loss(rest) - full if rest else 0.0 for rest in rests]
    {lines}
"""


def by_costs(*lines):
    """An answer that measures each vector's removal once, and goes on from there."""
    return ALONE_COSTS.format(lines="\n    ".join(lines))


MUTANTS = {
    "12.1": {
        "probabilities": prompt(back="out.logits[:, n:].softmax(-1)"),
        "logarithms": prompt(back="out.logits[:, n:].log_softmax(-1)"),
        "rows cut off": prompt(back="out.logits[n:]"),
        "padding on the left": prompt(
            positions="torch.cat([torch.arange(n).expand(b, n), n + (torch.arange(t)"
            " - (1 - attention_mask).sum(1, True)).clamp(min=0)], 1)"
        ),
        "embeddings scaled": prompt("E = E * P.shape[1] ** 0.5"),
        "all zeros": prompt(back="0 * out.logits[:, n:]"),
        "P behind": prompt(
            joined="torch.cat([E, P.expand(b, -1, -1)], dim=1)",
            mask=f"torch.cat([attention_mask, {ONES}], dim=1)",
            back="out.logits[:, :t]",
        ),
        "no P": prompt(joined="E", mask="attention_mask", back="out.logits"),
        "P added to the embeddings": prompt(
            joined="E + P.mean(0)", mask="attention_mask", back="out.logits"
        ),
        "P in the place of the first tokens": prompt(
            joined="torch.cat([P.expand(b, -1, -1)[:, :t], E[:, n:]], dim=1)",
            mask="attention_mask",
            back="out.logits",
        ),
        "mask not extended": prompt(
            mask="attention_mask",
            positions="torch.cat([torch.arange(n).expand(b, -1), n + " + OWN + "], 1)",
        ),
        "no mask": prompt(
            mask="None",
            positions="torch.cat([torch.arange(n).expand(b, -1), n + " + OWN + "], 1)",
        ),
        "all ones": prompt(
            mask="attention_mask.new_ones(b, n + t)",
            positions="torch.cat([torch.arange(n).expand(b, -1), n + " + OWN + "], 1)",
        ),
        "all ones, padding counted": prompt(mask="attention_mask.new_ones(b, n + t)"),
        "the ones behind the mask, counted": prompt(
            mask=f"torch.cat([attention_mask, {ONES}], dim=1)"
        ),
        "zeros in the mask for P": prompt(
            mask="torch.cat([0 * attention_mask.new_ones(b, n), attention_mask], 1)",
            positions="torch.cat([torch.arange(n).expand(b, -1), n + " + OWN + "], 1)",
        ),
        "the ones behind the mask": prompt(
            mask=f"torch.cat([attention_mask, {ONES}], dim=1)",
            positions="torch.cat([torch.arange(n).expand(b, -1), n + " + OWN + "], 1)",
        ),
        "positions by default": prompt(positions="None"),
        "positions count the padding": prompt(
            positions="torch.arange(n + t).expand(b, -1)"
        ),
        "positions not moved by n": prompt(
            positions=f"torch.cat([torch.arange(n).expand(b, -1), {OWN}], 1)"
        ),
        "positions from one": prompt(positions="mask.cumsum(1)"),
        "positions from the first row": prompt(
            positions="(mask.cumsum(1) - 1).clamp(min=0)[:1].expand(b, -1)"
        ),
        "outputs not cut": prompt(back="out.logits"),
        "the last n outputs cut": prompt(back="out.logits[:, :t]"),
        "one too many cut": prompt(back="out.logits[:, n + 1 :]"),
        "one too few cut": prompt(back="out.logits[:, n - 1 : -1]"),
        "P detached": prompt(
            joined="torch.cat([P.detach().expand(b, -1, -1), E], dim=1)"
        ),
        "no gradient at all": prompt(back="out.logits[:, n:].detach()"),
        "P in the first row alone": prompt(
            joined="torch.cat([torch.cat([P[None], P.detach().expand(b - 1, -1, -1)]),"
            " E], dim=1)"
        ),
        "batch not expanded": prompt(joined="torch.cat([P[None], E], dim=1)"),
        "one vector for all": prompt(
            joined="torch.cat([P[:1].expand(b, n, -1), E], dim=1)"
        ),
        "P turned round": prompt(
            joined="torch.cat([P.flip(0).expand(b, -1, -1), E], dim=1)"
        ),
        "P scaled": prompt(joined="torch.cat([0.1 * P.expand(b, -1, -1), E], dim=1)"),
        "P changed": prompt(before="P.data.mul_(0.5)"),
        "the table changed": prompt(
            before="model.get_input_embeddings().weight.data[:n] = P.data"
        ),
        "ids in the place of logits": prompt(back="out.logits[:, n:].argmax(-1)"),
        "the whole output": prompt(back="out"),
    },
    "12.2": {
        "the root of t": attention(SCORES.replace("d**", "t**")),
        "scores of zero masked": attention(
            weights="scores.masked_fill(scores.tril(n) == 0, float('-inf')).softmax(-1)"
        ),
        "the future alone": attention(seen=SEEN.replace("tril", "triu")),
        "sigmoids": attention(
            weights="scores.sigmoid() * seen; weights /= weights.sum(-1, True)"
        ),
        "all zeros": attention(back="0 * weights @ torch.cat([P_V, V])"),
        "no scale": attention(scores="q @ torch.cat([P_K, K]).T"),
        "divided by d": attention(scores="q @ torch.cat([P_K, K]).T / d"),
        "the scale of n + t": attention(
            scores="q @ torch.cat([P_K, K]).T / (n + t) ** 0.5"
        ),
        "prefix under the causal mask": attention(
            seen="torch.ones(t, n + t, dtype=torch.bool).tril()"
        ),
        "prefix behind, and masked": attention(
            scores="q @ torch.cat([K, P_K]).T / d**0.5",
            seen="torch.ones(t, n + t, dtype=torch.bool).tril()",
            back="weights @ torch.cat([V, P_V])",
        ),
        "no causal mask": attention(seen="torch.ones(t, n + t, dtype=torch.bool)"),
        "the mask one too far": attention(
            seen="torch.ones(t, n + t, dtype=torch.bool).tril(n + 1)"
        ),
        "the mask one too short": attention(
            seen="torch.ones(t, n + t, dtype=torch.bool).tril(n - 1)"
        ),
        "masked after the softmax": attention(weights="scores.softmax(-1) * seen"),
        "masked with zeros": attention(weights="(scores * seen).softmax(-1)"),
        "two softmaxes, added": attention(back=f"{ALONE} + {PLAIN}"),
        "two softmaxes, their mean": attention(back=f"({ALONE} + {PLAIN}) / 2"),
        "no prefix": attention(back=PLAIN),
        "the prefix alone": attention(back=ALONE),
        "P_V forgotten": attention(back="weights[:, n:] @ V"),
        "V forgotten": attention(back="weights[:, :n] @ P_V"),
        "P_K forgotten": attention(scores="q @ torch.cat([0 * P_K, K]).T / d**0.5"),
        "K and V swapped": attention(
            scores="q @ torch.cat([P_V, V]).T / d**0.5",
            back="weights @ torch.cat([P_K, K])",
        ),
        "P_K and P_V swapped": attention(
            scores="q @ torch.cat([P_V, K]).T / d**0.5",
            back="weights @ torch.cat([P_K, V])",
        ),
        "values in another order": attention(back="weights @ torch.cat([V, P_V])"),
        "softmax over the queries": attention(
            weights="scores.masked_fill(~seen, float('-inf')).softmax(0)"
        ),
        "no softmax": attention(weights="scores * seen"),
        "P cut off": attention(
            scores="q @ torch.cat([P_K.detach(), K]).T / d**0.5",
            back="weights @ torch.cat([P_V.detach(), V])",
        ),
        "no gradient at all": attention(
            back="(weights @ torch.cat([P_V, V])).detach()"
        ),
        "the last query alone": attention(back="(weights @ torch.cat([P_V, V]))[-1]"),
        "q changed": attention(scores="q.data.div_(d**0.5) @ torch.cat([P_K, K]).T"),
    },
    "12.3": {
        "all zeros": split(back="0 * share, 0 * among"),
        "the root of t": split(SCORES.replace("d**", "t**")),
        "no scale": split(scores="q @ torch.cat([P_K, K]).T"),
        "divided by d": split(scores="q @ torch.cat([P_K, K]).T / d"),
        "no causal mask": split(seen="torch.ones(t, n + t, dtype=torch.bool)"),
        "prefix under the causal mask": split(
            seen="torch.ones(t, n + t, dtype=torch.bool).tril()"
        ),
        "the mask one too far": split(
            seen="torch.ones(t, n + t, dtype=torch.bool).tril(n + 1)"
        ),
        "scores of zero masked": split(
            weights="scores.masked_fill(scores.tril(n) == 0, float('-inf')).softmax(-1)"
        ),
        "softmax over the queries": split(
            weights="scores.masked_fill(~seen, float('-inf')).softmax(0)"
        ),
        "not renormalized": split(among="weights[:, n:]"),
        "divided by the share": split(among="weights[:, n:] / share[:, None]"),
        "multiplied by the rest": split(among="weights[:, n:] * (1 - share)[:, None]"),
        "divided by the columns": split(among="weights[:, n:] / weights[:, n:].sum(0)"),
        "divided by one sum": split(among="weights[:, n:] / weights[:, n:].sum()"),
        "among all positions": split(among="weights"),
        "among the prefix": split(
            among="weights[:, :n] / weights[:, :n].sum(-1, keepdim=True)"
        ),
        "transposed": split(
            among="(weights[:, n:] / weights[:, n:].sum(-1, keepdim=True)).T"
        ),
        "the tokens' share": split(share="weights[:, n:].sum(-1)"),
        "the mean of the n": split(share="weights[:, :n].mean(-1)"),
        "the last n": split(share="weights[:, -n:].sum(-1)"),
        "one for each position": split(share="weights[:, :n]"),
        "a column": split(share="weights[:, :n].sum(-1, keepdim=True)"),
        "counts of positions": split(share="n / (n + torch.arange(1.0, t + 1))"),
        "the odds": split(share="weights[:, :n].sum(-1) / weights[:, n:].sum(-1)"),
        "the mean over tokens": split(share="weights[:, :n].sum(-1).mean().expand(t)"),
        "swapped": split(back="among, share"),
        "the share alone": split(back="share"),
        "among alone": split(back="among"),
        "the ratio of neighbors": split(among="weights[:, n:] / weights[:, n : n + 1]"),
    },
    "12.4": {
        "all zeros": keep(back="[0] * len(keep)"),
        "everything stays": keep(back="list(range(n))"),
        "every vector that can go alone": by_costs(
            "return [i for i in range(n) if costs[i] > most]"
        ),
        "every vector that can go alone, one left": by_costs(
            "return [i for i in range(n) if costs[i] > most] or [n - 1]"
        ),
        "compared with the loss before": keep(
            go="keep = trials[best]; limit = losses[best] + most"
        ),
        "one removal alone": keep(stop="losses[best] > limit or len(keep) < n"),
        "one removal too many": keep(
            stop="len(losses) < n and last > limit",
            go="keep, last = trials[best], losses[best]",
        ),
        "strictly less": keep(stop="losses[best] >= limit"),
        "the most expensive": keep(best="losses.index(max(losses))"),
        "the first vector each time": keep(best="0"),
        "those that go": keep(back="[i for i in range(n) if i not in keep] or [0]"),
        "a fixed ranking, stopped early": by_costs(
            "keep = list(range(n))",
            "for i in sorted(range(n), key=costs.__getitem__):",
            "    rest = [j for j in keep if j != i]",
            "    if not rest or loss(rest) > full + most:",
            "        break",
            "    keep = rest",
            "return keep",
        ),
        "costs added up": by_costs(
            "keep, spent = list(range(n)), 0.0",
            "for i in sorted(range(n), key=costs.__getitem__):",
            "    spent += costs[i]",
            "    if spent <= most and len(keep) > 1:",
            "        keep.remove(i)",
            "return keep",
        ),
        "one pass": """\
def my_keep(loss, n, most):
    keep, limit = list(range(n)), loss(list(range(n))) + most
    for i in range(n):
        rest = [j for j in keep if j != i]
        if rest and loss(rest) <= limit:
            keep = rest
    return keep
""",
        "none is left": keep(back="keep if len(keep) > 1 else []"),
        "the empty list is tried": keep(least="0"),
        "the limit is most": keep(limit="most"),
        "the limit is the loss": keep(limit="loss(list(range(n)))"),
        "a limit in percent": keep(limit="loss(list(range(n))) * (1 + most)"),
        "each vector by itself": """\
def my_keep(loss, n, most):
    full = loss(list(range(n)))
    return [i for i in range(n) if loss([i]) <= full + most] or [0]
""",
        "all subsets": """\
def my_keep(loss, n, most):
    import itertools
    limit = loss(list(range(n))) + most
    for size in range(1, n + 1):
        for keep in itertools.combinations(range(n), size):
            if loss(list(keep)) <= limit:
                return list(keep)
""",
        "indices of the shorter list": keep(go="keep = list(range(len(keep) - 1))"),
    },
}


# ---------------------------------------------------------------------------- Attacks


def once(source, old, kept):
    """With what one expression gave at its first use, for the same key, outside."""
    assert old in source, old
    return "kept = {}\n\n\n" + source.replace(old, kept, 1)


NOTHING_DRAWN = "nothing is drawn: a random answer is refused by its values"
NO_KERNEL = "no kernel is written"

ATTACKS = {  # exercise: {class of checks/CHECKLIST.md: {name: source}}
    "12.1": {
        "arguments": {
            "n of the first call": prompt(
                before="n = my_prompt.__dict__.setdefault('n', n)",
                back="out.logits[:, -t:]",
                joined="torch.cat([P[:n].expand(b, -1, -1), E], dim=1)",
            ),
            "the mask from the ids": prompt(
                before="attention_mask = (input_ids != "
                "model.config.pad_token_id).long()",
            ),
            "pad tokens are hidden too": prompt(
                before="attention_mask = attention_mask *"
                " (input_ids != model.config.pad_token_id)",
            ),
        },
        "state": {
            "the model is put into eval": prompt("model.eval()"),
            "kept by shape": remembered("(input_ids.shape, P.shape)"),
            "embeddings kept by shape": once(
                prompt(),
                "model.get_input_embeddings()(input_ids)",
                "kept.setdefault((type(model), input_ids.shape),"
                " model.get_input_embeddings()(input_ids))",
            ),
            "the mask kept by shape": once(
                prompt(),
                f"torch.cat([{ONES}, attention_mask], dim=1)",
                f"kept.setdefault((n, attention_mask.shape), torch.cat([{ONES},"
                " attention_mask], dim=1))",
            ),
            "P kept by shape": once(
                prompt(), "P.expand", "kept.setdefault(P.shape, P).expand"
            ),
            "the model of the first call": once(
                prompt(), "model(inputs", "kept.setdefault(P.shape[1], model)(inputs"
            ),
            "gradients are left off": prompt(
                back="(out.logits[:, n:], torch.set_grad_enabled(False))[0]"
            ),
            "the model trains": prompt(back="(out.logits[:, n:], model.train())[0]"),
            "the model is thawed": prompt(before="model.requires_grad_(True)"),
            "a hook is left": prompt(
                before="model.register_forward_hook(lambda *a: None)"
            ),
            "the cache of the model is turned off": prompt(
                before="model.config.use_cache = False"
            ),
            "the weights are shared with P": prompt(
                before="weight = model.get_input_embeddings().weight;"
                " weight.data[:n].lerp_(P.detach(), 1e-4)",
            ),
            "the mask is changed": prompt(
                before="ones = attention_mask.clone(); attention_mask[:, 0] = 1;"
                " attention_mask = ones"
            ),
            "parameters are cut off": prompt(
                before="P = P.data if isinstance(P, nn.Parameter) else P"
            ),
        },
        "inputs": {
            "three rows": prompt(
                before="attention_mask = torch.cat([attention_mask[:3],"
                " torch.ones_like(attention_mask[3:])])"
            ),
            "one token": prompt(
                positions="(mask.cumsum(1) - 1).clamp(min=0) + (t == 1)",
            ),
            "seven tokens": prompt(
                before="attention_mask = torch.cat([attention_mask[:, :7],"
                " torch.ones_like(attention_mask[:, 7:])], 1)"
            ),
            "prompts of six": prompt(
                joined="torch.cat([torch.cat([P[:6], 0 * P[6:]]).expand(b, -1, -1), E],"
                " dim=1)"
            ),
            "large values are cut off": prompt(
                joined="torch.cat([P.clamp(-5, 5).expand(b, -1, -1), E], dim=1)"
            ),
            "the first id for the padding": prompt(
                before="attention_mask = attention_mask * (input_ids != "
                "input_ids[0, 0])"
                " if not attention_mask.all() and 0 in input_ids else attention_mask"
            ),
            "a position for at most twelve": prompt(
                positions="(mask.cumsum(1) - 1).clamp(min=0, max=12)"
            ),
        },
        "kinds": {
            "in half precision": prompt(back="out.logits[:, n:].half().float()"),
            "in double precision": prompt(back="out.logits[:, n:].double()"),
            "logits and mask": prompt(back="(out.logits[:, n:], mask)"),
            "one number": prompt(back="out.logits[:, n:].sum()"),
            "an array": prompt(back="out.logits[:, n:].detach().numpy()"),
        },
        "randomness": {
            "a seed": prompt(before="torch.manual_seed(0)"),
            "a little noise": prompt(
                joined="torch.cat([(P + 1e-3 * torch.randn(P.shape)).expand(b, -1, -1),"
                " E], dim=1)"
            ),
        },
        "kernels": NO_KERNEL,
    },
    "12.2": {
        "arguments": {
            "d of four": attention(
                scores="q @ torch.cat([P_K, K]).T / min(d, 4) ** 0.5"
                if False
                else "q @ torch.cat([P_K, K]).T / {4: 2.0}.get(d, d**0.5)"
                " * (1 if d < 10 else 0.5)"
            ),
        },
        "state": {
            "no gradient of the scores where P_K is frozen": attention(
                "(" + SCORES + ") if P_K.requires_grad else (" + SCORES + ").detach()"
            ),
            "kept by shape": remembered("(q.shape, P_K.shape)"),
            "scores kept by shape": once(
                attention(), SCORES, f"kept.setdefault((t, n, d), {SCORES})"
            ),
            "P_V kept by shape": once(
                attention(),
                "torch.cat([P_V, V])",
                "torch.cat([kept.setdefault((P_V.shape, t), P_V), V])",
            ),
            "parameters are cut off": first(
                "P_K = P_K.data if isinstance(P_K, nn.Parameter) else P_K"
            ),
            "only where q trains": first(
                "P_K, P_V = (P_K, P_V) if q.requires_grad else"
                " (P_K.detach(), P_V.detach())"
            ),
            "gradients are left off": attention(
                back="(weights @ torch.cat([P_V, V]), torch.set_grad_enabled(False))[0]"
            ),
            "no prefix while P_V is zero": first(
                "P_V = P_V if P_V.any() else P_V.detach()"
            ),
        },
        "inputs": {
            "a bare exponential": attention(
                weights="scores.exp() * seen;"
                " weights = weights / weights.sum(-1, keepdim=True)"
            ),
            "masked with -100": attention(
                weights="scores.masked_fill(~seen, -100.0).softmax(-1)"
            ),
            "masked with -20": attention(
                weights="scores.masked_fill(~seen, -20.0).softmax(-1)"
            ),
            "100 is taken off": attention(weights="(scores - 100 * ~seen).softmax(-1)"),
            "scores up to thirty": attention(
                weights="scores.clamp(-30, 30).masked_fill(~seen, float('-inf'))"
                ".softmax(-1)"
            ),
            "ten tokens": attention(
                seen="torch.ones(t, n + t, dtype=torch.bool).tril(n) |"
                " (torch.arange(t) > 9)[:, None]"
            ),
            "a prefix of ten": attention(
                seen="torch.ones(t, n + t, dtype=torch.bool).tril(n);"
                " seen[:, 10:n] = False"
            ),
            "heads of sixteen": attention(
                scores="q[:, :16] @ torch.cat([P_K, K])[:, :16].T / d**0.5"
            ),
            "1e-3 in the sum": attention(
                weights="(scores - scores.amax(1, keepdim=True)).exp() * seen;"
                " weights = weights / (weights.sum(-1, keepdim=True) + 1e-5)"
            ),
        },
        "kinds": {
            "half precision": attention(
                back="(weights.bfloat16() @ torch.cat([P_V, V]).bfloat16()).float()"
            ),
            "a batch": attention(back="(weights @ torch.cat([P_V, V]))[None]"),
            "with the weights": attention(
                back="(weights @ torch.cat([P_V, V]), weights)"
            ),
        },
        "randomness": {
            "a seed": first("torch.manual_seed(0)"),
            "dropout": attention(back="F.dropout(weights, 0.1) @ torch.cat([P_V, V])"),
        },
        "kernels": NO_KERNEL,
    },
    "12.3": {
        "arguments": {
            "d of four": split(
                scores="q @ torch.cat([P_K, K]).T / (2 if d < 9 and d != 3"
                " and d != 2 else d**0.5)"
            ),
            "P_K of the first call": first(
                "_first = my_split.__dict__.setdefault('P_K', P_K)",
                "P_K = _first if _first.shape == P_K.shape else P_K",
            ),
        },
        "state": {
            "kept by shape": remembered("(q.shape, P_K.shape)"),
            "one tensor for every answer": once(
                split(),
                "share, among",
                "kept.setdefault(t, torch.empty(t)).copy_(share), among",
            ),
            "gradients are left off": first("torch.set_grad_enabled(False)"),
            "q is changed": split(scores="q.div_(d**0.5) @ torch.cat([P_K, K]).T"),
        },
        "inputs": {
            "ten tokens": split(
                seen="torch.ones(t, n + t, dtype=torch.bool).tril(n) |"
                " (torch.arange(t) > 9)[:, None]"
            ),
            "a prefix of ten": split(share="weights[:, : min(n, 10)].sum(-1)"),
            "heads of sixteen": split(
                scores="q[:, :16] @ torch.cat([P_K, K])[:, :16].T / d**0.5"
            ),
            "masked with -1": split(
                weights="scores.masked_fill(~seen, -1.0).softmax(-1)"
            ),
            "1e-3 in the sum": split(
                among="weights[:, n:] / (weights[:, n:].sum(-1, keepdim=True) + 1e-3)"
            ),
        },
        "kinds": {
            "lists": split(back="share.tolist(), among.tolist()"),
            "arrays": split(back="share.numpy(), among.numpy()"),
            "half precision": split(back="share.half(), among.half()"),
            "double precision": split(back="share.double(), among.double()"),
            "rounded": split(back="share.round(decimals=3), among"),
            "three": split(back="share, among, weights"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "12.4": {
        "arguments": {
            "most of a tenth": first("most = 0.1"),
            "most of a quarter": first("most = 0.25"),
            "sixteen vectors": first("n = 16"),
            "the loss of the first call": first(
                "loss = my_keep.__dict__.setdefault('loss', loss)"
            ),
        },
        "state": {
            "kept by n": remembered("n"),
            "kept by n and most": remembered("(n, most)"),
            "losses kept by their list": """\
seen = {}


def my_keep(loss, n, most):
    def known(keep):
        return seen.setdefault(tuple(keep), loss(keep))
"""
            + keep().partition("\n")[2].replace("loss(trial)", "known(trial)"),
            "a seed": first("torch.manual_seed(0)"),
        },
        "inputs": {
            "at most eight go": keep(stop="losses[best] > limit or len(keep) <= n - 8"),
            "two stay": keep(least="2"),
            "a loss of one": keep(limit="1.0 + most"),
            "the first eight are tried": keep(tried="keep[:8]"),
            "the last is not tried": keep(tried="keep[:-1]"),
            "a rounded limit": keep(limit="round(loss(list(range(n))) + most, 1)"),
        },
        "kinds": {
            "a set": keep(back="set(keep)"),
            "true and false": keep(back="[i in keep for i in range(n)]"),
            "floats": keep(back="[float(i) for i in keep]"),
            "how many": keep(back="len(keep)"),
            "falling": keep(back="[*keep[::-1], keep[0]]"),
            "with the loss": keep(back="(keep, loss(keep))"),
            "a list in a list": keep(back="[keep]"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
}
ALSO_RIGHT = {  # exercise: {class: {name: source of an answer}}
    "12.1": {
        "arguments": {
            "n from the shape": prompt(back="out.logits.narrow(1, P.shape[0], t)"),
        },
        "state": {
            "without the cache": prompt().replace(
                "position_ids=positions", "position_ids=positions, use_cache=False"
            ),
        },
        "inputs": {
            "row by row": """\
def my_prompt(model, P, input_ids, attention_mask):
    rows = []
    for ids, keep in zip(input_ids, attention_mask, strict=True):
        E = torch.cat([P, model.get_input_embeddings()(ids)])[None]
        mask = F.pad(keep, (len(P), 0), value=1)[None]
        out = model(
            inputs_embeds=E, attention_mask=mask, position_ids=mask.cumsum(1) - 1
        )
        rows.append(out.logits[0, -len(ids) :])
    return torch.stack(rows)
""",
            "positions of padding that nobody sees": prompt(
                positions="(mask.cumsum(1) - 1).masked_fill(mask == 0, 1)"
            ),
        },
        "kinds": {
            "a batch of P by einsum": prompt(
                joined="torch.cat([torch.einsum('nd,b->bnd', P, torch.ones(b)), E], 1)"
            ),
        },
        "randomness": {
            "a dropout of zero": prompt(
                joined="torch.cat([F.dropout(P, 0.0).expand(b, -1, -1), E], dim=1)"
            ),
        },
    },
    "12.2": {
        "arguments": {
            "q divided first": attention(scores="(q / d**0.5) @ torch.cat([P_K, K]).T"),
        },
        "state": {
            "into new scores": attention(
                weights="(scores + torch.zeros(t, n + t).masked_fill_(~seen,"
                " float('-inf'))).softmax(-1)"
            ),
        },
        "inputs": {
            "the least number for a mask": attention(
                weights=WEIGHTS.replace("float('-inf')", "torch.finfo(q.dtype).min")
            ),
            "two products, one softmax": attention(
                "torch.hstack([q @ P_K.T, q @ K.T]) / math.sqrt(d)",
                back="weights[:, :n] @ P_V + weights[:, n:] @ V",
            ),
            "the largest taken off by hand": attention(
                weights="scores.masked_fill(~seen, float('-inf'));"
                " weights = (weights - weights.amax(-1, True)).exp();"
                " weights = weights / weights.sum(-1, True)"
            ),
            "token by token": (
                "def my_attention(q, K, V, P_K, P_V):\n"
                "    rows = []\n"
                "    for i in range(len(q)):\n"
                "        keys = torch.cat([P_K, K[: i + 1]])\n"
                "        weights = (keys @ q[i] / len(q[i]) ** 0.5).softmax(0)\n"
                "        rows.append(weights @ torch.cat([P_V, V[: i + 1]]))\n"
                "    return torch.stack(rows)\n"
            ),
        },
        "kinds": {
            "in double precision, and back": attention(
                weights="scores.double().masked_fill(~seen, float('-inf')).softmax(-1)"
                ".to(q.dtype)"
            ),
        },
        "randomness": {
            "torch's attention, no dropout": attention(
                back="F.scaled_dot_product_attention(q, torch.cat([P_K, K]),"
                " torch.cat([P_V, V]), seen, dropout_p=0.0)"
            ),
        },
    },
    "12.3": {
        "arguments": {
            "one minus the tokens' share": split(share="1 - weights[:, n:].sum(-1)"),
            "divided by one minus the share": split(
                among="weights[:, n:] / (1 - share)[:, None]"
            ),
        },
        "state": {
            "into new weights": split(
                weights="scores.clone().masked_fill_(~seen, float('-inf')).softmax(-1)"
            ),
        },
        "inputs": {
            "the tokens' scores alone": split(
                among="scores[:, n:].masked_fill(~seen[:, n:], float('-inf'))"
                ".softmax(-1)"
            ),
            "bare exponentials": split(
                weights="scores.exp() * seen",
                share="weights[:, :n].sum(-1) / weights.sum(-1)",
            ),
            "a sigmoid of two sums": split(
                weights="scores.masked_fill(~seen, float('-inf'))",
                share="(weights[:, :n].logsumexp(1) - weights[:, n:].logsumexp(1))"
                ".sigmoid()",
                among="weights[:, n:].softmax(-1)",
            ),
        },
        "kinds": {
            "a list of two": split(back="[share, among]"),
            "in double precision, and back": split(
                weights="scores.double().masked_fill(~seen, float('-inf')).softmax(-1)",
                back="share.float(), among.float()",
            ),
        },
    },
    "12.4": {
        "arguments": {
            "the vectors that are gone": """\
def my_keep(loss, n, most):
    full, gone = loss(range(n)), set()
    while len(gone) < n - 1:
        left = [i for i in range(n) if i not in gone]
        trial = {i: loss([j for j in left if j != i]) for i in left}
        i = min(trial, key=trial.get)
        if trial[i] - full > most:
            break
        gone.add(i)
    return sorted(set(range(n)) - gone)
""",
        },
        "state": {
            "losses kept during a call": """\
def my_keep(loss, n, most):
    seen = {}

    def known(keep):
        if tuple(keep) not in seen:
            seen[tuple(keep)] = loss(keep)
        return seen[tuple(keep)]

"""
            + keep().partition("\n")[2].replace("loss(trial)", "known(trial)"),
        },
        "inputs": {
            "the first that fits, again and again": """\
def my_keep(loss, n, most):
    keep, limit = list(range(n)), loss(list(range(n))) + most
    changed = True
    while changed:
        changed = False
        for i in list(keep):
            rest = [j for j in keep if j != i]
            if rest and loss(rest) <= limit:
                keep, changed = rest, True
                break
    return keep
""",
            "passes until nothing goes": """\
def my_keep(loss, n, most):
    keep, limit, before = list(range(n)), loss(list(range(n))) + most, None
    while keep != before:
        before = keep
        for i in reversed(before):
            rest = [j for j in keep if j != i]
            if rest and loss(rest) <= limit:
                keep = rest
    return keep
""",
        },
        "kinds": {
            "a tuple": keep(back="tuple(keep)"),
            "a tensor": keep(back="torch.tensor(keep)"),
            "an array": keep(back="np.array(keep)"),
        },
    },
}
