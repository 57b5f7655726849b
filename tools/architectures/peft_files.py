"""PEFT on the same models: what it makes of our files, and files of its own."""

import copy
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_from_scratch.core.targets import is_quantized
from peft_from_scratch.nf4.linear import dequantize_model

from .subject import Skipped, Subject, close, described, logits


def read(subject: Subject, folder: str) -> Tensor:
    """The logits of PEFT's model with the adapter of this folder."""
    return logits(PeftModel.from_pretrained(in_full(subject), folder), subject.ids)


def make(subject: Subject, folder: str) -> Tensor:
    """Replace the folder's adapter by one that PEFT makes by its config; its logits.

    Raises  Skipped  PEFT cannot make it, or reads it otherwise than it wrote it
    """
    try:
        torch.manual_seed(6)
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        model = get_peft_model(in_full(subject), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        written = logits(model, subject.ids)
        for file in Path(folder).iterdir():
            file.unlink()
        model.save_pretrained(folder)
        close(read(subject, folder), written)
    except Exception as error:
        raise Skipped(f"PEFT cannot: {described(error)}") from error
    return written


def in_full(subject: Subject) -> nn.Module:
    """A copy of the reference that PEFT can take: its weights are in full."""
    model = copy.deepcopy(subject.reference)
    if is_quantized(model):
        dequantize_model(model)
    return model
