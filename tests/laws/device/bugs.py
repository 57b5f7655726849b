"""Tensors made in the wrong place: bugs that no test on a CPU can notice."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from device_runs import hold
from planting import Bug, planted

from laws.core import contract
from laws.device import models, pieces
from laws.methods.one_row import ROWS
from peft_from_scratch.common import digest
from peft_from_scratch.core import adapter
from peft_from_scratch.core.decoder import DecoderAdapter
from peft_from_scratch.files import exchange, quantized
from peft_from_scratch.kernels import Plan, Stack
from peft_from_scratch.methods import prefix, prompt
from peft_from_scratch.methods.ia3 import IA3
from peft_from_scratch.methods.lora import LoRA
from peft_from_scratch.methods.prefix import Prefix
from peft_from_scratch.methods.prompt import Prompt
from peft_from_scratch.nf4 import NF4Linear, blocks, codes, keeping, spec
from peft_from_scratch.nf4.double import DoubleQuantized
from peft_from_scratch.paged import PagedAdamW
from peft_from_scratch.paged.pages import Pager
from peft_from_scratch.training import batch, chunked_loss, evaluation, generation


def of(law, row, architecture="llama"):
    return partial(law, ROWS[row], architecture)


loop, injected = models.the_loop_trains_as_on_the_cpu, models.what_is_injected_is_there
answers, files = models.answers_and_losses_are_the_cpus, models.files_are_the_cpus

BUGS = {
    "all that trains beside a projection": Bug(
        adapter.factory_kwargs,
        '"device": weight.device, ',
        "",
        of(injected, "houlsby"),
    ),
    "the gradients of a loss in chunks": Bug(
        chunked_loss.ChunkedLoss.forward,
        "torch.empty_like(H)",
        "torch.empty(H.shape)",
        pieces.chunks_and_checkpoints_learn_as_on_the_cpu,
    ),
    "a LoRA's B": Bug(
        LoRA.__init__,
        "torch.zeros(d_out, r, **like)",
        "torch.zeros(d_out, r)",
        of(loop, "lora", "gpt2"),
    ),
    "the factors of (IA)³": Bug(
        IA3.__init__, "torch.ones(shape, **like)", "torch.ones(shape)", of(loop, "ia3")
    ),
    "a prefix": Bug(
        Prefix.__init__,
        "torch.randn(n, width, **like)",
        "torch.randn(n, width)",
        of(loop, "prefix"),
    ),
    "the tokens that a prefix starts from": Bug(
        prefix.activations,
        "ids[None].to(trunk.device)",
        "ids[None]",
        pieces.positions_without_a_mask_are_the_cpus,
    ),
    "the token that asks for a model's heads": Bug(
        prefix.probe_kv_shape,
        "dtype=torch.long, device=device",
        "dtype=torch.long",
        of(injected, "prefix"),
    ),
    "the mask in front of a prefix": Bug(
        prefix._widen,
        "dtype=torch.bool, device=query.device",
        "dtype=torch.bool",
        of(contract.starts_from_the_pretrained_model, "prefix", "gpt2"),
    ),
    "positions behind a prefix": Bug(
        DecoderAdapter.shifted_position_ids,
        "torch.arange(past, past + t, device=device)",
        "torch.arange(past, past + t)",
        pieces.positions_without_a_mask_are_the_cpus,
    ),
    "the count of pads": Bug(
        prompt.left_padding,
        "dtype=torch.long, device=device",
        "dtype=torch.long",
        of(loop, "prompt"),
    ),
    "positions of a prompt": Bug(
        Prompt.forward,
        "torch.arange(self.n, device=E.device)",
        "torch.arange(self.n)",
        of(contract.padding_changes_no_generated_token, "prompt"),
    ),
    "places behind the pads": Bug(
        prompt.insert_after_padding,
        "torch.arange(n + t, device=old.device)",
        "torch.arange(n + t)",
        of(loop, "prompt", "opt"),
    ),
    "places without the prompt": Bug(
        prompt.drop_prompt,
        "torch.arange(h.shape[1] - n, device=h.device)",
        "torch.arange(h.shape[1] - n)",
        of(loop, "prompt"),
    ),
    "codes": Bug(
        blocks.quantize,
        "dtype=torch.uint8, device=device",
        "dtype=torch.uint8",
        pieces.four_bits_are_the_cpus,
    ),
    "constants": Bug(
        blocks.quantize,
        "dtype=torch.float32, device=device",
        "dtype=torch.float32",
        pieces.four_bits_are_the_cpus,
    ),
    "a dequantized weight": Bug(
        blocks.dequantize,
        "dtype=dtype or q.dtype, device=q.packed.device",
        "dtype=dtype or q.dtype",
        pieces.four_bits_are_the_cpus,
    ),
    "ranks of ratios": Bug(
        blocks.nearest,
        "dtype=torch.uint8, device=ratios.device",
        "dtype=torch.uint8",
        pieces.four_bits_are_the_cpus,
    ),
    "a code book": Bug(
        codes.book, "values.to(device), ", "values, ", pieces.four_bits_are_the_cpus
    ),
    "the pairs of a code book": Bug(
        codes.pairs,
        ".flatten().to(device)",
        ".flatten()",
        pieces.four_bits_are_the_cpus,
    ),
    "the book of the constants": Bug(
        DoubleQuantized.dequantize,
        "self.codes.device",
        'torch.device("cpu")',
        pieces.four_bits_are_the_cpus,
    ),
    "constants that are moved and converted": Bug(
        NF4Linear._apply,
        "tensor.to(moved.device)",
        "tensor",
        pieces.a_projection_in_four_bits_is_the_cpus,
    ),
    "what stays dequantized": Bug(
        keeping.Unpacked.weight,
        "dtype=dtype, device=layer.device)",
        "dtype=dtype)",
        pieces.weights_that_stay_dequantized_are_the_cpus,
    ),
    "what is looked up on the way": Bug(
        blocks.dequantize,
        "dtype=torch.int64, device=out.device)",
        "dtype=torch.int64)",
        pieces.four_bits_are_the_cpus,
    ),
    "the spec's book": Bug(
        spec.spec_quantize,
        "torch.tensor(CODES[codebook], device=w.device)",
        "torch.tensor(CODES[codebook])",
        pieces.the_spec_of_four_bits_is_the_cpus,
    ),
    "the spec's block numbers": Bug(
        spec.ratios_of,
        "torch.arange(len(absmax), device=absmax.device)",
        "torch.arange(len(absmax))",
        pieces.the_spec_of_four_bits_is_the_cpus,
    ),
    "a model in four bits, loaded": Bug(
        quantized.load,
        ".to(device).eval()",
        ".eval()",
        pieces.quantized_models_go_to_disk_and_back,
    ),
    "the tokens that try a loaded adapter": Bug(
        exchange._probe,
        "torch.arange(8, device=next(model.parameters()).device)",
        "torch.arange(8)",
        of(files, "lora", "opt"),
    ),
    "a batch": Bug(
        batch.batch_of, "tensor.to(device)", "tensor", of(loop, "bitfit", "gpt2")
    ),
    "the mask of a batch that is answered": Bug(
        generation._continue,
        "mask.to(model.device)",
        "mask",
        of(answers, "full"),
    ),
    "the prefix of all prompts": Bug(
        generation._read,
        "torch.tensor([prefix], device=model.device)",
        "torch.tensor([prefix])",
        of(answers, "ia3", "opt"),
    ),
    "a window of prose": Bug(
        evaluation.general_losses,
        "torch.tensor([ids[start : start + length]], device=model.device)",
        "torch.tensor([ids[start : start + length]])",
        pieces.the_loss_on_prose_is_the_cpus,
    ),
    "the bytes of a checksum": Bug(
        digest.tensor_crc,
        "tensor.detach().cpu().contiguous()",
        "tensor.detach().contiguous()",
        of(loop, "dora"),
    ),
    "the slots of an optimizer": Bug(
        Pager.fit,
        "dtype=torch.int64, device=self.device",
        "dtype=torch.int64",
        pieces.optimizers_step_as_on_the_cpu,
    ),
    "an optimizer's scratch": Bug(
        PagedAdamW._walk,
        "dtype=torch.int64, device=pager.device",
        "dtype=torch.int64",
        pieces.optimizers_step_as_on_the_cpu,
    ),
    "the scales of gathered adapters": Bug(
        Stack.of.__func__,
        "dtype=torch.float32, device=As[0].device",
        "dtype=torch.float32",
        pieces.kernels_in_torch_are_the_cpus,
    ),
    "the rows of gathered adapters": Bug(
        Plan.of.__func__,
        "each.to(x.device)",
        "each",
        pieces.kernels_in_torch_are_the_cpus,
    ),
}


@contextmanager
def anew(bug: Bug) -> Iterator[None]:
    """Inside, the bug is planted, and nothing is remembered from sound code."""
    remembered = (models.trained, codes.book, codes.pairs)
    with planted(bug.function, bug.right, bug.wrong):
        for function in remembered:
            function.cache_clear()
        try:
            yield
        finally:
            for function in remembered:
                function.cache_clear()


def is_caught(bug: Bug) -> None:
    """The law fails on the device, by an error of the device or a comparison."""
    try:
        with anew(bug):
            hold(bug.law)
    except (AssertionError, RuntimeError, TypeError, ValueError):
        return
    raise AssertionError(f"nobody noticed {bug.wrong!r} in {bug.function.__name__}")
