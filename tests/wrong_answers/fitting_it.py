"""Wrong answers to the exercises of notebook 02; each must be refused by its check."""

from attacks import (
    afterwards,
    every_time_but,
    fixed,
    remembered,
    returned,
    stale,
    where,
)

from peft_from_scratch.course.checks import fitting_it as checks  # noqa: F401

PEAK = """\
def my_peak(moments):
    sums = {{name: {each} for name, parts in {order}}}
    name = {which}
    return {back}
"""
PEAK_PARTS = dict(
    each="sum(parts.values())",
    order="moments.items()",
    which="max(sums, key=sums.get)",
    back="(name, sums[name])",
)


def peak(**parts):
    return PEAK.format(**PEAK_PARTS | parts)


MAXIMA = (
    "sum(max(e.get(p, 0) for e in moments.values()) "
    "for p in {p for e in moments.values() for p in e})"
)
CHECKPOINT = """\
def my_checkpoint(f, x):
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, needed):
            ctx.save_for_backward(x)
            {before}
            {run}
            {after}
            return y

        @staticmethod
        def backward(ctx, dy):
            x = {input}
            now = torch.get_rng_state()
            {replay}
            with {mode}:
                y = f(x)
            {restore}
            {back}
            return {dx}, None

    return {call}
"""
CHECKPOINT_PARTS = dict(
    before="ctx.random = torch.get_rng_state()",
    run="y = f(x)",
    after="pass",
    input="ctx.saved_tensors[0].detach().requires_grad_()",
    replay="torch.set_rng_state(ctx.random)",
    mode="torch.enable_grad()",
    restore="torch.set_rng_state(now)",
    back="torch.autograd.backward(y, dy)",
    dx="x.grad",
    call="Again.apply(x, torch.empty(0, requires_grad=True))",
)


def checkpoint(**parts):
    return CHECKPOINT.format(**CHECKPOINT_PARTS | parts)


ZERO = """\
def my_zero_step(weights, gradients, exchange, update):
    N, size = len(weights), weights[0].numel()
    n = {n}
    def cut(t):
        return F.pad(t, (0, N * n - size)).view(N, n){copy}
    parts, whole = [{of_gradient} for g in gradients], [cut(w) for w in weights]
    for h in range(1, {scatter}):
        came = exchange([{away} for r in range(N)])
        for r in range(N):
            parts[r][(r - h - 1) % N] {add} came[r]
    for r in range(N):
        {update}
    for h in range({gather}):
        came = exchange([whole[r][(r - h) % N] for r in range(N)])
        for r in range(N):
            whole[r][{place}] = came[r]
    return {back}
"""
ZERO_PARTS = dict(
    n="-(-size // N)",
    copy=".clone()",
    of_gradient="cut(g)",
    scatter="N",
    away="parts[r][(r - h) % N]",
    add="+=",
    update="whole[r][r] = update(r, whole[r][r].clone(), parts[r][r] / N)",
    gather="N - 1",
    place="(r - h - 1) % N",
    back="[w.view(-1)[:size] for w in whole]",
)


def zero(**parts):
    return ZERO.format(**ZERO_PARTS | parts)


WHOLE = """\
def my_zero_step(weights, gradients, exchange, update):
    N, size = len(weights), weights[0].numel()
    n = -(-size // N)
    def cut(t):
        return F.pad(t, (0, N * n - size)).view(N, n)
    mean = {mean}
    new = [update(r, cut(weights[0])[r], cut(mean)[r]) for r in range(N)]
    return [torch.cat(new)[:size] for _ in range(N)]
"""
CHOICE = """\
def my_choice(bill, room):
    {first}
    for change in {order}:
        half = 2 if change == "halves" else 1
        share = 4 if change == "four GPUs" else 1
        again = change == "checkpointing"
        kept = {kept}
        logits = {logits}
        base = {base}
        moments = {{
            "loss": {loss},
            "backward": base + kept + {again},
            "update": {update},
        }}
        moment, peak = {peak}
        if {fits}:
            return {back}
    return {none}
"""
CHOICE_PARTS = dict(
    first="pass",
    order='("nothing", "chunks", "halves", "checkpointing", "four GPUs")',
    kept='bill["layers"] * bill["input" if again else "layer"] // half',
    logits='bill["logits"] // (8 if change == "chunks" else half)',
    base='bill["weights"] + bill["states"] // share',
    loss="base + kept + logits",
    again='(bill["layer"] if again else 0)',
    update='base + bill["gradients"] // share + bill["temporaries"]',
    peak="max(moments.items(), key=lambda each: each[1])",
    fits="peak <= room",
    back="(change, moment, peak)",
    none="None",
)


def choice(**parts):
    return CHOICE.format(**CHOICE_PARTS | parts)


MUTANTS = {
    "2.1": {
        "all zeros": peak(back="('', 0)"),
        "the name alone": peak(back="name"),
        "the bytes alone": peak(back="sums[name]"),
        "the smallest": peak(which="min(sums, key=sums.get)"),
        "the largest part": peak(each="max(parts.values(), default=0)"),
        "the parts' own maxima": peak(back=f"(name, {MAXIMA})"),
        "all moments added": peak(back="(name, sum(sums.values()))"),
        "the last of equal ones": peak(order="reversed(moments.items())"),
        "the first moment": peak(which="next(iter(sums))"),
        "the number of parts": peak(each="len(parts)"),
        "swapped": peak(back="(sums[name], name)"),
        "by name": peak(which="max(sums)"),
    },
    "2.2": {
        "all zeros": checkpoint(after="y = 0 * y"),
        "keeps everything": "def my_checkpoint(f, x):\n    return f(x)\n",
        "no random state": checkpoint(replay="pass"),
        "the state after f": checkpoint(
            before="pass", after="ctx.random = torch.get_rng_state()"
        ),
        "the replay is left behind": checkpoint(restore="pass"),
        "forward draws nothing": checkpoint(after="torch.set_rng_state(ctx.random)"),
        "a seed of its own": checkpoint(
            before="torch.manual_seed(0)", replay="torch.manual_seed(0)"
        ),
        "needs a gradient at x": checkpoint(call="Again.apply(x, torch.empty(0))"),
        "x needs a gradient by force": checkpoint(
            call="Again.apply(x.requires_grad_(), torch.empty(0))"
        ),
        "not recorded": checkpoint(mode="torch.no_grad()"),
        "no gradient to x": checkpoint(dx="None"),
        "the gradient of y to x": checkpoint(dx="dy"),
        "dy is forgotten": checkpoint(back="y.sum().backward()"),
        "dy is squared": checkpoint(back="torch.autograd.backward(y, dy * dy)"),
        "the parameters get nothing": checkpoint(
            back="g = torch.autograd.grad(y, x, dy)[0]", dx="g"
        ),
        "x is not cut off": checkpoint(input="ctx.saved_tensors[0]"),
        "a graph in forward": checkpoint(
            run="with torch.enable_grad(): y = f(x.detach().requires_grad_())",
            after="ctx.y = y; y = y.detach()",
        ),
        "f runs twice in forward": checkpoint(run="f(x.detach()); y = f(x)"),
        "f runs twice in backward": checkpoint(
            back="torch.autograd.backward(y, dy); f(x)"
        ),
        "the gradient twice": checkpoint(dx="2 * x.grad"),
        "x is changed": checkpoint(after="x.data.add_(1)"),
    },
    "2.3": {
        "all zeros": zero(back="[0 * w.view(-1)[:size] for w in whole]"),
        "a sum for the mean": zero(
            update="whole[r][r] = update(r, whole[r][r].clone(), parts[r][r])"
        ),
        "no reduce-scatter": zero(scatter="1"),
        "its own gradient": zero(
            scatter="1",
            update="whole[r][r] = update(r, whole[r][r].clone(), parts[r][r])",
        ),
        "no all-gather": zero(gather="0"),
        "one hop too few": zero(gather="N - 2"),
        "one hop too many": zero(gather="N if N > 1 else 0"),
        "one hop too few in reduce-scatter": zero(scatter="N - 1"),
        "what comes replaces": zero(add="="),
        "subtracted": zero(add="-="),
        "the same part in each hop": zero(away="parts[r][r]"),
        "whole gradients are sent": zero(away="parts[r].flatten()"),
        "put in the wrong place": zero(place="(r - h) % N"),
        "the next part": zero(
            update="whole[r][(r + 1) % N] = update(r, whole[r][(r + 1) % N].clone(), "
            "parts[r][(r + 1) % N] / N)"
        ),
        "rank 0 updates all": zero(
            update="whole[r][r] = update(0, whole[r][r].clone(), parts[r][r] / N)"
        ),
        "every rank updates everything": zero(
            update="whole[r] = torch.stack([update(r, whole[r][i].clone(), "
            "parts[r][i] / N) for i in range(N)])"
        ),
        "no update": zero(update="pass"),
        "the gradients are ignored": zero(
            update="update(r, whole[r][r].clone(), parts[r][r] / N)"
        ),
        "the padding stays": zero(back="[w.view(-1) for w in whole]"),
        "one rank's weights": zero(back="whole[0].view(-1)[:size]"),
        "rounded down": zero(n="max(1, size // N)"),
        "no wire": WHOLE.format(mean="torch.stack(gradients).mean(0)"),
        "the first rank's gradient": WHOLE.format(mean="gradients[0]"),
        "gradients are changed": zero(
            of_gradient="(cut(g) if N * n > size else g.view(N, n))"
        ),
        "divided twice": zero(
            update="whole[r][r] = update(r, whole[r][r].clone(), parts[r][r] / N / N)"
        ),
    },
    "2.4": {
        "all zeros": choice(back="('nothing', 'loss', 0)"),
        "the sum of all": choice(
            peak='"loss", base + kept + logits + bill["gradients"] // share + '
            'bill["temporaries"]'
        ),
        "the dearest first": choice(
            order='("four GPUs", "checkpointing", "halves", "chunks", "nothing")'
        ),
        "never nothing": choice(
            order='("chunks", "halves", "checkpointing", "four GPUs")'
        ),
        "never None": choice(none='("four GPUs", moment, peak)'),
        "less than the room": choice(fits="peak < room"),
        "checkpointing drops the logits": choice(
            logits='0 if again else bill["logits"] // (8 if change == "chunks" '
            "else half)"
        ),
        "checkpointing keeps nothing": choice(
            kept='0 if again else bill["layers"] * bill["layer"] // half'
        ),
        "checkpointing changes nothing": choice(
            kept='bill["layers"] * bill["layer"] // half'
        ),
        "no layer again": choice(again="0"),
        "half the rows keep all logits": choice(
            logits='bill["logits"] // (8 if change == "chunks" else 1)'
        ),
        "half the rows, half the gradients": choice(
            update='base + bill["gradients"] // share // half + bill["temporaries"]'
        ),
        "chunks shorten activations": choice(
            kept='bill["layers"] * bill["input" if again else "layer"] // half '
            '// (8 if change == "chunks" else 1)'
        ),
        "stage three": choice(base='(bill["weights"] + bill["states"]) // share'),
        "stage one": choice(update='base + bill["gradients"] + bill["temporaries"]'),
        "ranks share activations": choice(loss="base + (kept + logits) // share"),
        "no update": choice(update="0"),
        "no loss": choice(loss="0"),
        "gradients in the loss": choice(
            loss='base + kept + logits + bill["gradients"]'
        ),
        "the moment before the change": choice(
            first="now = None",
            back="(change, now or moment, peak)",
            fits="(now := now or moment) and peak <= room",
        ),
        "the change alone": choice(back="change"),
        "what is left": choice(back="(change, moment, room - peak)"),
        "the room": choice(back="(change, moment, room)"),
    },
}
NOTHING_DRAWN = "no random number is asked for"
NO_KERNEL = "no kernel is asked for"
ATTACKS = {
    "2.1": {
        "arguments": {"moments of the first call": stale("moments")},
        "state": {
            "remembered by length": remembered("len(moments)"),
            "right once": every_time_but(2, "('forward', 0)"),
            "a moment is taken out": afterwards("moments.pop(result[0])"),
        },
        "inputs": {
            "ten moments": where("len(moments) > 10", "('forward', 0)"),
            "large ones": where("result[1] > 10**9", "(result[0], 10**9)"),
        },
        "kinds": {
            "a float": returned("(result[0], float(result[1]))"),
            "a text": returned("f'{result[0]} {result[1]}'"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "2.2": {
        "arguments": {
            "f of the first call": stale("f"),
            "x of the first call": stale("x"),
        },
        "state": {
            "remembered by shape": remembered("tuple(x.shape)"),
            "right once": every_time_but(3, "f(x)"),
            "autograd stays off": afterwards("torch.set_grad_enabled(False)"),
        },
        "inputs": {
            "two dimensions": where("x.dim() > 2", "result.flatten(0, 1)"),
            "an x that needs none": where("not x.requires_grad", "f(x)"),
        },
        "kinds": {
            "double": returned("result.double()"),
            "detached": returned("result.detach()"),
            "a tuple": returned("(result,)"),
        },
        "randomness": {
            "a seed": afterwards("torch.manual_seed(0)"),
            "draws itself": afterwards("torch.rand(1)"),
        },
        "kernels": NO_KERNEL,
    },
    "2.3": {
        "arguments": {
            "weights of the first call": stale("weights"),
            "gradients of the first call": stale("gradients"),
            "update of the first call": stale("update"),
            "exchange of the first call": stale("exchange"),
        },
        "state": {
            "remembered by size": remembered("len(weights)"),
            "right once": every_time_but(2, "[w.clone() for w in weights]"),
            "weights are changed": afterwards("weights[0].add_(1)"),
            "gradients are zeroed": afterwards("[g.zero_() for g in gradients]"),
        },
        "inputs": {
            "ten ranks": where("len(weights) > 10", "[w.clone() for w in weights]"),
            "fewer values than ranks": where(
                "weights[0].numel() < len(weights)", "[w.clone() for w in weights]"
            ),
            "two ranks alone": fixed("gradients", "[gradients[0]] * len(gradients)"),
        },
        "kinds": {
            "float32": returned("[w.float() for w in result]"),
            "one tensor": returned("torch.stack(result)"),
            "rows": returned("[w[None] for w in result]"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
    "2.4": {
        "arguments": {
            "bill of the first call": stale("bill"),
            "room of the first call": stale("room"),
            "four layers": fixed("bill", "dict(bill, layers=4)"),
        },
        "state": {
            "remembered by room": remembered("room // 1000"),
            "right once": every_time_but(2, "None"),
            "the bill is changed": afterwards("bill['logits'] = 0"),
        },
        "inputs": {
            "many layers": where("bill['layers'] > 10", "None"),
            "little room": where("room < 1000", "('nothing', 'loss', room)"),
        },
        "kinds": {
            "a float": returned("result and (*result[:2], float(result[2]))"),
            "two values": returned("result and result[:2]"),
            "an empty tuple": returned("result or ()"),
        },
        "randomness": NOTHING_DRAWN,
        "kernels": NO_KERNEL,
    },
}
LIBRARYS = """\
from torch.utils.checkpoint import checkpoint
def my_checkpoint(f, x):
    return checkpoint(f, x, use_reentrant=False)
"""
OTHER_PEAK = """\
def my_peak(moments):
    best = None
    for name, parts in moments.items():
        total = 0
        for size in parts.values():
            total += size
        if best is None or total > best[1]:
            best = [name, total]
    return best
"""
OUR_CHECKPOINT = "my_checkpoint = checks.our_checkpoint\n"
OUR_ZERO = "my_zero_step = checks.our_zero_step\n"
OTHER_ZERO = """\
def my_zero_step(weights, gradients, exchange, update):
    N, size = len(weights), len(weights[0])
    n = (size + N - 1) // N
    extra = torch.zeros(N * n - size, dtype=weights[0].dtype)
    split = lambda t: [p.clone() for p in torch.cat([t, extra]).split(n)]
    parts = [split(g / N) for g in gradients]
    for h in range(1, N):
        came = exchange(tuple(parts[r][r - h] for r in range(N)))
        for r in range(N):
            parts[r][r - h - 1] = parts[r][r - h - 1] + came[r]
    whole = [split(w) for w in weights]
    for r in range(N):
        whole[r][r] = update(r, whole[r][r], parts[r][r])
    for h in range(N - 1):
        came = exchange([whole[r][r - h] for r in range(N)])
        for r in range(N):
            whole[r][r - h - 1] = came[r]
    return tuple(torch.cat(w)[:size] for w in whole)
"""
OUR_CHOICE = "my_choice = checks.our_choice\n"
ALSO_RIGHT = {
    "2.1": {
        "arguments": {"a loop": OTHER_PEAK},
        "state": {"the lesson's": "my_peak = checks.our_peak\n"},
        "inputs": {"a loop, with a list": OTHER_PEAK},
        "kinds": {"a list": peak(back="[name, sums[name]]")},
    },
    "2.2": {
        "arguments": {"the lesson's": OUR_CHECKPOINT},
        "state": {"torch's": LIBRARYS},
        "inputs": {
            "x.clone()": checkpoint(
                input="ctx.saved_tensors[0].detach().clone().requires_grad_()"
            )
        },
        "kinds": {
            "grad() of all": checkpoint(back="torch.autograd.backward([y], [dy])")
        },
        "randomness": {
            "fork_rng": """\
def my_checkpoint(f, x):
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, needed, x):
            ctx.save_for_backward(x, torch.get_rng_state())
            return f(x)

        @staticmethod
        def backward(ctx, dy):
            x, random = ctx.saved_tensors
            x = x.detach().requires_grad_()
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.set_rng_state(random)
                f(x).backward(dy)
            return None, x.grad

    return Again.apply(torch.zeros(1, requires_grad=True), x)
"""
        },
    },
    "2.3": {
        "arguments": {"the lesson's": OUR_ZERO},
        "state": {"lists of parts": OTHER_ZERO},
        "inputs": {"divided before": OTHER_ZERO},
        "kinds": {"a tuple": zero(back="tuple(w.view(-1)[:size] for w in whole)")},
    },
    "2.4": {
        "arguments": {"the lesson's": OUR_CHOICE},
        "state": {"a list": choice(back="[change, moment, peak]")},
        "inputs": {"the other way around": choice(fits="not peak > room")},
        "kinds": {"a list again": choice(back="list((change, moment, peak))")},
    },
}
