"""Wrong answers to the exercises of notebook 11; each must be refused by its check."""

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


SHARE = """\
def my_share(q, K, P_K):
    (t, d), n = q.shape, len(P_K)
    scores = {scores}
    seen = {seen}
    weights = {weights}
    return {back}
"""


def share(scores=SCORES, seen=SEEN, weights=WEIGHTS, back="weights[:, :n].sum(-1)"):
    return SHARE.format(scores=scores, seen=seen, weights=weights, back=back)


COUNTS = """\
def my_counts(config, n):
    layers, heads = config.num_hidden_layers, {heads}
    size, d = {size}, config.hidden_size
    return {back}
"""


def counts(
    heads="config.num_key_value_heads",
    size="config.head_dim",
    back="n * 2 * layers * heads * size, n * d",
):
    return COUNTS.format(heads=heads, size=size, back=back)


MUTANTS = {
    "11.1": {
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
    "11.2": {
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
    "11.3": {
        "all zeros": share(back="0 * weights.sum(-1)"),
        "the tokens' share": share(back="weights[:, n:].sum(-1)"),
        "all of it": share(back="weights.sum(-1)"),
        "no scale": share(scores="q @ torch.cat([P_K, K]).T"),
        "divided by d": share(scores="q @ torch.cat([P_K, K]).T / d"),
        "no causal mask": share(seen="torch.ones(t, n + t, dtype=torch.bool)"),
        "prefix under the causal mask": share(
            seen="torch.ones(t, n + t, dtype=torch.bool).tril()"
        ),
        "the mask one too far": share(
            seen="torch.ones(t, n + t, dtype=torch.bool).tril(n + 1)"
        ),
        "counts of positions": share(back="n / (n + torch.arange(1.0, t + 1))"),
        "n / (n + t)": share(back="torch.full((t,), n / (n + t))"),
        "the mean of the n": share(back="weights[:, :n].mean(-1)"),
        "the first of the n": share(back="weights[:, 0]"),
        "one for each position": share(back="weights[:, :n]"),
        "the weights": share(back="weights"),
        "a column": share(back="weights[:, :n].sum(-1, keepdim=True)"),
        "the mean over tokens": share(back="weights[:, :n].sum(-1).mean().expand(t)"),
        "one number": share(back="weights[:, :n].sum(-1).mean()"),
        "the last token for all": share(back="weights[:, :n].sum(-1)[-1].expand(t)"),
        "the odds": share(back="weights[:, :n].sum(-1) / weights[:, n:].sum(-1)"),
        "the mass alone": share(back="scores[:, :n].exp().sum(-1)"),
        "scores added up": share(
            back="(scores * seen)[:, :n].sum(-1) / (scores * seen).sum(-1)"
        ),
        "overflows": share(
            weights="scores.exp() * seen",
            back="weights[:, :n].sum(-1) / weights.sum(-1)",
        ),
        "softmax over the queries": share(
            weights="scores.masked_fill(~seen, float('-inf')).softmax(0)"
        ),
        "in percent": share(back="100 * weights[:, :n].sum(-1)"),
    },
    "11.4": {
        "all zeros": counts(back="0, 0"),
        "every query head": counts(heads="config.num_attention_heads"),
        "the hidden size": counts(back="n * 2 * layers * d, n * d"),
        "no factor 2": counts(back="n * layers * heads * size, n * d"),
        "no layers": counts(back="n * 2 * heads * size, n * d"),
        "no heads": counts(back="n * 2 * layers * size, n * d"),
        "no n": counts(back="2 * layers * heads * size, d"),
        "n for the prefix alone": counts(back="n * 2 * layers * heads * size, d"),
        "hidden size / heads": counts(
            size="config.hidden_size // config.num_attention_heads"
        ),
        "a prompt in every layer": counts(
            back="n * 2 * layers * heads * size, n * layers * d"
        ),
        "a prompt of keys and values": counts(
            back="n * 2 * layers * heads * size, n * 2 * d"
        ),
        "a prompt as wide as the keys": counts(
            back="n * 2 * layers * heads * size, n * heads * size"
        ),
        "the vocabulary": counts(
            back="n * 2 * layers * heads * size, config.vocab_size * d"
        ),
        "swapped": counts(back="n * d, n * 2 * layers * heads * size"),
        "the sum": counts(back="n * 2 * layers * heads * size + n * d"),
        "the prefix alone": counts(back="n * 2 * layers * heads * size"),
        "bytes": counts(back="4 * n * 2 * layers * heads * size, 4 * n * d"),
        "one layer too few": counts(back="n * 2 * (layers - 1) * heads * size, n * d"),
    },
}
