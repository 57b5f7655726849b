"""What every comparison with PEFT needs: its model, quietly, and the same loss."""

import warnings

import torch
from model_state import tokens

import peft_from_scratch as pfs


def quietly(call, *arguments, **named):
    """The call without PEFT's remarks on fan_in_fan_out, tied heads and the like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **named)


def our_name(name):
    """Ours of a parameter that PEFT keeps beside a projection."""
    for theirs, own in (
        ("base_model.model.", ""),
        ("base_layer.", ""),
        ("lora_magnitude_vector.default.weight", "m"),
        ("ia3_l.default", "l"),
        ("lora_", ""),
        (".default.weight", ""),
    ):
        name = name.replace(theirs, own)
    return name


def answers(model):
    """(logits at the tokens (b, t, vocabulary), loss of all tokens but the first).

    PEFT returns the logits of a soft prompt's own positions too, and supervises the
    first token, which the prompt predicts. We do neither.
    """
    ids = tokens()
    labels = ids.clone()
    labels[:, 0] = -100
    asked = dict(attention_mask=torch.ones_like(ids), labels=labels, use_cache=False)
    out = model(ids, **asked)
    return out.logits[:, -ids.shape[1] :], out.loss


def gradients_of(model, parameters):
    """{name: gradient} of the loss of `answers`, dropout seeded."""
    model.zero_grad()
    torch.manual_seed(0)
    answers(model)[1].backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


def ours(model):
    return gradients_of(model, pfs.trainable(model))
