"""What the kernels compile to on GPUs that are not here, and what they move there."""

import json
import math
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import assert_caught, each_is_caught, law

from peft_from_scratch import nf4
from peft_from_scratch.common.marks import block_pattern
from peft_from_scratch.kernels import cases, count, gpu_targets, lora
from peft_from_scratch.kernels import nf4 as on_codes
from peft_from_scratch.kernels.language import INTERPRETED, Tiles, recorded
from peft_from_scratch.kernels.lora import matrix
from peft_from_scratch.kernels.trace import trace
from tools import kernels_page

NVIDIA = ("sm_80", "sm_90", "sm_100")
SHAPES = st.integers(1, 40)


@pytest.fixture(scope="module")
def stored():
    return json.loads(gpu_targets.RESULT.read_text("utf-8"))


@pytest.fixture(scope="module")
def live():
    return gpu_targets.elsewhere("--sample")


# ---------------------------------------------------------------------- What is stored


def test_the_file_is_of_these_kernels(stored):
    assert stored["made_of"] == gpu_targets.fingerprint(), (
        "a kernel, a tile or a case changed: run python -m "
        "peft_from_scratch.kernels.gpu_targets"
    )


def test_another_tile_or_kernel_is_another_fingerprint(monkeypatch):
    few = [case for case in cases.CASES if case.name in cases.SAMPLE]
    before = gpu_targets.fingerprint(few)
    assert gpu_targets.fingerprint(few) == before
    with monkeypatch.context() as patch:
        patch.setattr(lora, "tiles_for", lambda *_: Tiles(k=64))
        assert gpu_targets.fingerprint(few) != before
    source = gpu_targets.inspect.getsource(lora)
    for old, new, differs in (
        ("total *= scale", "total *= 2 * scale", True),
        ("total *= scale", "total *= scale  # as it is", False),
        ('"""y = x W^T, plus h B^T', '"""Another word. y = x W^T, + h B^T', False),
    ):
        assert source.count(old) == 1
        with mock.patch.object(gpu_targets.inspect, "getsource") as read:
            read.side_effect = lambda module: (
                source.replace(old, new) if module is lora else _source(module)  # noqa: B023
            )
            assert (gpu_targets.fingerprint(few) != before) is differs


def test_a_few_compiled_now_are_as_stored(stored, live):
    assert len(live["rows"]) >= 6
    assert live["versions"]["triton"] == stored["versions"]["triton"]
    known: dict[str, list] = {}
    for row in stored["rows"]:
        known.setdefault(_identity(row), []).append(row["targets"])
    for row in live["rows"]:
        for target, found in row["targets"].items():
            alike = [targets_[target] for targets_ in known[_identity(row)]]
            assert found in alike, (row["kernel"], target)


def _identity(row: dict) -> str:
    """What a row is, but for how its numbers divide."""
    keys = ("kernel", "dtypes", "transposed", "constants", "warps", "stages")
    return json.dumps([row[key] for key in keys])


def _source(module):
    return open(module.__file__, encoding="utf-8").read()


def test_products_use_matrix_instructions_of_their_own_dtype(stored):
    other = {"bf16": "f16", "fp16": "bf16"}
    for row in stored["rows"]:
        constants = row["constants"]
        sums = row["kernel"] in ("_add_up", "_dequantize")
        sums = sums or constants.get("BM") == 1  # a single row
        sums = sums or (row["kernel"], constants.get("UPDATE")) == ("_finish", "none")
        if row["dtype"] in other and not sums:
            for target, on in row["targets"].items():
                own, alien = row["dtype"].replace("fp", "f"), other[row["dtype"]]
                names = [n.replace("kind::f16", "") for n in on["instructions"]]
                assert names, (row["kernel"], target)
                for name in names:
                    parts = name.replace("_", ".").split(".")
                    assert own in parts and alien not in parts, (target, name)


# (dtype, target) -> bytes that one kernel's threads spill there; the page names it.
SPILLS = {("fp32", "sm_90"): 16, ("bf16", "sm_80"): 120}


def test_next_to_nothing_spills_on_nvidia(stored):
    spilled = {
        (row["dtype"], target): row["targets"][target]["spilled"]
        for row in stored["rows"]
        for target in NVIDIA
        if row["targets"][target]["spilled"]
    }
    counts = [row["targets"][t]["spilled"] for row in stored["rows"] for t in NVIDIA]
    assert spilled == SPILLS and sum(map(bool, counts)) == len(SPILLS)


def test_nvidias_targets_have_the_shared_memory(stored):
    for row in stored["rows"]:
        for target in NVIDIA:
            limit = gpu_targets.LARGEST[target] * 1024
            assert row["targets"][target]["shared"] <= limit


def test_they_fit_smaller_gpus_too(stored):
    """99 KiB: sm_86, sm_89 and sm_120, whose tiles are those of sm_80."""
    for row in stored["rows"]:
        assert row["targets"]["sm_80"]["shared"] <= 99 * 1024


def test_a_weight_in_four_bits_takes_few_instructions(stored):
    """Fifteen selects a weight took 24 to 25; a table of pairs takes about half."""
    seen = set()
    for row in stored["rows"]:
        constants, on = row["constants"], row["targets"]
        counted = {target for target in on if "a_weight" in on[target]}
        reads = str(constants.get("LOAD", "")).startswith("unpacked")
        assert counted == (set(NVIDIA) if reads or "CHUNK" in constants else set())
        if counted and row["dtype"] != "fp32":
            odd = constants.get("BK") == 32 and constants["BM"] == 16
            limit = 75 if odd else 18
            assert 0 < on["sm_90"]["a_weight"] <= limit, (row["kernel"], constants)
            seen.add((constants.get("BM"), odd))
    assert seen == {(None, False), (16, False), (16, True), (64, False), (128, False)}


def test_every_case_is_in_the_file(stored):
    named = {name for row in stored["rows"] for name in row["cases"]}
    assert named == {case.name for case in cases.CASES}
    assert set(cases.SAMPLE) < named


def test_the_page_is_that_of_the_file(stored):
    text = kernels_page.PAGE.read_text("utf-8")
    assert block_pattern().search(text)
    assert kernels_page.with_tables(text, stored) == text
    share = 256 * (576 + 576) / 576**2  # of r (d_in + d_out) in d_in d_out
    assert f"is {share:.0%} of".replace("%", " %") in text.replace("\n", " ")


def test_the_pages_sentences_are_those_of_the_counts(stored):
    text = kernels_page.PAGE.read_text("utf-8").replace("\n", " ")

    def programs(m, n):
        first = count.fused(m, n, n, 16, torch.bfloat16)[0]
        return math.prod(first.grid)

    assert (
        f"{programs(16, 4096)} programs for 16 rows, {programs(1, 4096)} for one"
        in text
    )
    assert (
        f"{programs(16, 576)} programs for 16 rows and {programs(1, 576)} for" in text
    )
    each = [
        row["targets"]["sm_90"]["a_weight"]
        for row in stored["rows"]
        if str(row["constants"].get("LOAD")).startswith("unpacked")
        and row["dtype"] == "bf16"
        and not (row["constants"]["BK"] == 32 and row["constants"]["BM"] == 16)
    ]
    assert f"takes {min(each):.0f} to {max(each):.0f} instructions" in text
    line = next(
        x for x in kernels_page.waits(stored["rows"]).splitlines() if "| 1 |" in x
    )
    by_bytes, by_instructions, dense = map(float, line.strip("| ").split(" | ")[1:])
    assert by_bytes < 0.3 * dense and by_instructions > 2 * by_bytes


def test_a_spill_is_on_the_page(stored):
    row = json.loads(json.dumps(stored["rows"][0]))
    for on in row["targets"].values():
        on["spilled"] = 0
    assert kernels_page.spills([row]) == "Nothing, on any target."
    row["targets"]["sm_90"]["spilled"] = 4711
    assert "4711" in kernels_page.spills([row])


# ---------------------------------------------------------------------- How it is read

USAGE = """Resource usage:
 Common:
  GLOBAL:0
 Function _product:
  REG:168 STACK:24 SHARED:18432 LOCAL:8 CONSTANT[0]:412 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
AMDGCN = """
	v_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 0
    .sgpr_count:     61
    .sgpr_spill_count: 0
    .vgpr_count:     120
    .vgpr_spill_count: 3
"""
PTX = """
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, p, 1, 1;
	wgmma.wait_group.sync.aligned 0;
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1 }, { %r5 };
	@%p0 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r3, %p1;
	tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%rd1];
"""
TTGIR = """
%1 = ttng.tc_gen5_mma %a, %b, %acc : !ttg.memdesc<128x32xbf16, #s>, !ttg.memdesc<32x128xbf16, #s>, !ttg.memdesc<128x128xf32, #t>
%2 = ttg.local_load %c : !ttg.memdesc<128x32xf16, #s>
"""  # noqa: E501


@law
def resources_are_read():
    assert gpu_targets.resources(USAGE) == {"registers": 168, "spilled": 32}


SASS = """
.text._product:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.U8 R2, [R4.64] ;
.L_x_0:
        /*0020*/              @!P1 SEL R3, R2, R5, !P0 ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;
        /*0040*/               @P2 BRA `(.L_x_0) ;
        /*0050*/                   IMAD.MOV.U32 R7, RZ, RZ, R9 ;
        /*0060*/               @P3 BRA `(.L_x_1) ;
.L_x_4:
        /*0068*/                   NOP ;
        /*006c*/               @P5 BRA `(.L_x_4) ;
        /*0070*/               @P4 BRA `(.L_x_3) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2) ;
        /*00a0*/                   NOP;
.L_x_3:
"""


@law
def the_longest_loop_is_read():
    found = gpu_targets.loop(SASS)
    assert found == ["LDG", "SEL", "HMMA", "BRA", "IMAD", "BRA"]
    straight = SASS.replace("@P2 BRA", "@P2 NOP").replace("@P3 BRA", "@P3 NOP")
    straight = straight.replace("@P5 BRA", "@P5 NOP")
    assert len(gpu_targets.loop(straight)) == 13  # all of it


@law
def amds_notes_are_read():
    told = gpu_targets.amd({"amdgcn": AMDGCN})
    assert told["registers"] == 120 and told["spilled"] == 12
    assert told["instructions"] == ["v_mfma_f32_32x32x8_bf16"]


@law
def instructions_are_read():
    assert gpu_targets.instructions(PTX, "cuda") == [
        "mma.m16n8k16.f32.f16.f16.f32",
        "tcgen05.mma.kind::f16",
        "wgmma.mma_async.m64n128k16.f32.bf16.bf16",
    ]
    assert gpu_targets.operands(TTGIR) == ["bf16"]


READING = {
    "a spill not reported": (
        *(gpu_targets.resources, '"spilled": stack + local', '"spilled": 0'),
        resources_are_read,
    ),
    "the stack for the registers": (
        *(gpu_targets.resources, '"registers": registers', '"registers": stack'),
        resources_are_read,
    ),
    "the last loop for the longest": (
        *(
            gpu_targets.loop,
            "max(longest, (end - begin, begin))",
            "(end - begin, begin)",
        ),
        the_longest_loop_is_read,
    ),
    "a branch ahead for a loop": (
        *(gpu_targets.loop, "back[0] in labels", "True"),
        the_longest_loop_is_read,
    ),
    "predicated instructions left out": (
        *(
            gpu_targets.loop,
            "match := OPERATION.match(line)",
            'match := "@" not in line and OPERATION.match(line)',
        ),
        the_longest_loop_is_read,
    ),
    "a spill on AMD not reported": (
        *(gpu_targets.amd, 'noted("vgpr_spill_count") + ', ""),
        amds_notes_are_read,
    ),
    "all that is loaded for what is multiplied": (
        *(gpu_targets.operands, 'if "ttng.tc_gen5_mma" in line', ""),
        instructions_are_read,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(READING, (AssertionError, KeyError))


def test_an_interpreting_process_says_that_it_cannot_compile():
    assert INTERPRETED
    with pytest.raises(RuntimeError, match="elsewhere"):
        gpu_targets.rows(cases.CASES[:1])


# ---------------------------------------------------------------------------- Counting


def a_product_is_counted(m, n, k, r, sweep, keep=True, bias=True, dtype=torch.float32):
    """Bytes as the interpreter sees them; FLOPs by the blocks that it multiplies."""
    x, W, A, B = (torch.randn(s).to(dtype) for s in ((m, k), (n, k), (r, k), (n, r)))
    tiles = Tiles(m=16, n=16, k=16, sweep=sweep, group=2, warps=1, stages=1)
    more = {"bias": torch.randn(n)} if bias else {}

    def run():
        lora.product(
            x, matrix(W), n, A=A, B=B, scale=2.0, keep=keep, tiles=tiles, **more
        )

    agrees(run, needed=2 * (m * n * k + m * r * k + m * n * r))


def a_sum_over_rows_is_counted(m, r, width):
    U, V = torch.randn(m, r), torch.randn(m, width)
    agrees(lambda: lora.over_rows(U, V, torch.float16), needed=2 * m * r * width)


def agrees(run, needed, all_is_read=True):
    from triton.runtime.interpreter import InterpreterBuilder

    with recorded() as launches:
        run()
    multiplied, create = [], InterpreterBuilder.create_dot

    def noted(self, a, b, *rest):
        multiplied.append(2 * math.prod(a.data.shape) * b.data.shape[1])
        return create(self, a, b, *rest)

    with trace() as seen, mock.patch.object(InterpreterBuilder, "create_dot", noted):
        run()
    counts = [count.count(launch) for launch in launches]
    assert sum(c.loads for c in counts) == seen.bytes("load")
    assert sum(c.stores for c in counts) == seen.bytes("store")
    if len(launches) == 1 and all_is_read:
        assert counts[0].compulsory == seen.bytes(distinct=True)
    products = [
        c
        for c, launch in zip(counts, launches, strict=True)
        if launch.kernel.fn.__name__ != "_add_up"
    ]
    assert sum(c.flops for c in products) == sum(multiplied)
    assert sum(c.needed for c in products) == needed <= sum(c.flops for c in products)


@settings(max_examples=15, deadline=None)
@given(SHAPES, SHAPES, SHAPES, st.integers(1, 20), st.integers(1, 3), st.booleans())
def test_a_product_is_counted(m, n, k, r, sweep, keep):
    a_product_is_counted(m, n, k, r, sweep, keep, bias=not keep)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_counted(dtype):
    a_product_is_counted(17, 40, 33, 5, 2, dtype=dtype)


def test_a_large_rank_is_counted():
    a_product_is_counted(17, 40, 33, 70, 2)


@pytest.mark.parametrize("r, keep", [(5, True), (5, False), (70, True)])
def test_a_product_in_shares_is_counted(r, keep):
    a_product_is_counted(2, 40, 16 * 24 + 5, r, 2, keep, bias=not keep)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 100))
def test_a_sum_over_rows_is_counted(m, r, width):
    a_sum_over_rows_is_counted(m, r, width)


def four_bits_are_counted(m, n, k, block, double, across):
    """W as bytes and constants: n, k are those of the product, W^T's where across."""
    shape = (k, n) if across else (n, k)
    q = nf4.quantize(torch.randn(shape), block=block, double=double)
    x, A, B = torch.randn(m, k), torch.randn(3, k), torch.randn(n, 3)
    given = on_codes.reading(q, m, x.dtype, across)
    given["tiles"] = Tiles(m=16, n=16, k=32, sweep=2, group=2, warps=1, stages=1)
    agrees(
        lambda: lora.product(x, A=A, B=B, **given),
        needed=2 * (m * n * k + m * 3 * k + m * n * 3),
        all_is_read=False,  # of a table of 256 values not each
    )


def test_a_dequantized_weight_is_counted():
    for shape, block in (((40, 64), 64), ((3, 1023), 31), ((5, 5), 5)):
        q = nf4.quantize(torch.randn(shape), block, double=False)
        agrees(lambda: on_codes.nf4_dequantize(q, backend="triton"), 0, False)  # noqa: B023
        with recorded() as log:
            on_codes.nf4_dequantize(q, backend="triton")
        moved = q.nbytes + 4 * q.numel + 256 * 8  # the table of pairs
        assert count.count(log[0]).compulsory == moved


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("sizes", [(17, 40, 64), (5, 33, 96), (20, 64, 31)])
def test_four_bits_are_counted(sizes, double, across):
    four_bits_are_counted(*sizes, 64, double, across)


FOUR_BITS = {
    "a byte for each weight": ("math.ceil(width / 2) if run > 1 else width", "width"),
    "a constant for each block": ("math.ceil(width / run)", "math.ceil(width / 64)"),
    "a look-up for each weight": ("(2 if run > 1 else 1)", "1"),
    "no second constants": ("doubled[0] is not None", "False"),
}


@pytest.mark.parametrize("name", FOUR_BITS)
def test_a_planted_miscount_of_four_bits_is_caught(name):
    def law():
        four_bits_are_counted(17, 40, 64, 64, True, False)

    law()
    assert_caught(count._packed, *FOUR_BITS[name], law)


def test_a_weight_counted_once_is_caught():
    once = "loads=down * once.loads", "loads=once.loads"
    law = partial(four_bits_are_counted, 17, 40, 64, 64, True, False)
    assert_caught(count._weight, *once, law)


COUNTING = {
    "the mask forgotten": ('"x": (m * k, columns)', '"x": (height * k, columns)'),
    "the sweep not counted": ('programs * constants["SWEEP"]', "programs"),
    "A read once": ("fused and programs * down", "fused and 1"),
    "h stored by none": ('if constants["KEEP"]:', "if False:"),
    "x A^T computed once": ("whole += fused * programs", "whole += fused"),
}


@pytest.mark.parametrize("name", COUNTING)
def test_a_planted_miscount_is_caught(name):
    source = gpu_targets.inspect.getsource(count._product)
    right, wrong = COUNTING[name]
    if "height" in wrong:  # the height is known further down
        wrong = wrong.replace("height", "down * BM")
    assert source.count(right) == 1
    assert_caught(
        count._product, right, wrong, lambda: a_product_is_counted(17, 70, 33, 5, 2)
    )


def test_whole_blocks_are_the_closed_form():
    """The issue's shapes: 4096 cubed in blocks of 128, by hand."""
    n = 4096
    tiles = Tiles(m=128, n=128, k=32, sweep=1)
    x, W, A, B = (
        cases.empty(*s, dtype=torch.bfloat16)
        for s in ((n, n), (n, n), (16, n), (n, 16))
    )
    with recorded() as log:
        lora.product(x, matrix(W), n, A=A, B=B, tiles=tiles)
    found = count.count(log[0])
    assert found.loads == 2 * (32 * n * n + 32 * n * n + 32 * 32 * 16 * n + 32 * 16 * n)
    assert found.stores == 2 * n * n
    assert found.compulsory == 2 * (3 * n * n + 2 * 16 * n)
    assert found.needed == 2 * n * n * n + 4 * 16 * n * n
    assert found.flops == found.needed + 31 * 2 * 16 * n * n  # x A^T in 32 columns


def test_steps_on_their_own_are_the_closed_form():
    m, k, n, r = 4096, 576, 1536, 16
    four = count.unfused(m, k, n, r, torch.bfloat16)
    three = count.in_three(m, k, n, r, torch.bfloat16)
    moved = [m * k + n * k + m * n, m * k + r * k + m * r, m * r + n * r + m * n]
    assert [c.compulsory for c in four] == [2 * e for e in (*moved, 3 * m * n)]
    assert [c.compulsory for c in three] == [
        2 * e for e in (*moved[:2], moved[2] + m * n)
    ]
    needed = 2 * (m * n * k + m * k * r + m * r * n + m * n)
    assert sum(c.needed for c in four) == sum(c.needed for c in three) == needed


def test_what_has_no_formula_is_refused():
    with recorded() as log:
        lora.over_rows(torch.ones(4, 2), torch.ones(4, 8), torch.float32)
    unknown = mock.Mock(**{"kernel.fn.__name__": "_other"})
    unknown.kernel.fn.__name__ = "_other"
    count.count(log[0])
    with pytest.raises(ValueError, match="_other"):
        count.count(unknown)
