"""The launch path up to the driver: Triton's own binder, compiler and C launcher.

The driver is a stub, compiled here: it runs nothing, and notes what it was asked to
run. So each pointer, size and number of a launch is seen as a GPU would be given it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from peft_from_scratch.kernels import language

TESTS = Path(__file__).parents[1]
STUB = TESTS / "helpers" / "stub_cuda.c"
COMPILER = shutil.which("gcc") or shutil.which("cc")
PYTHON_H = Path(sysconfig.get_paths()["include"]) / "Python.h"

pytestmark = [
    pytest.mark.skipif(not language.INSTALLED, reason="Triton: Linux alone"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler: the stub driver is C"),
    pytest.mark.skipif(not PYTHON_H.exists(), reason="no Python.h: Triton's launcher"),
]

LAUNCHES = """
import ctypes, struct
import torch, triton
from triton.backends.nvidia.driver import CudaDriver
from peft_from_scratch import nf4
from peft_from_scratch.kernels import gather, language, lora
from peft_from_scratch.kernels import nf4 as on_codes

driver = CudaDriver()  # torch's part of it, as for one H100
driver.get_current_device = lambda: 0
driver.get_current_stream = lambda device: 0
driver.get_device_capability = lambda device: (9, 0)
triton.runtime.driver.set_active(driver)
for module in (gather, lora, on_codes):
    module.choose = lambda *_: "triton"

class Noted(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p), ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint), ("shared", ctypes.c_uint),
        ("parameters", ctypes.c_uint64 * 64),
    ]

stub = ctypes.CDLL("libcuda.so.1")
expected = ctypes.c_int.in_dll(stub, "stub_expected")
noted = Noted.in_dll(stub, "stub_noted")


def parameters(value, special=True):
    # What a kernel is passed: not what is compiled in, which is None, a constexpr
    # and, unless it is said otherwise, the number 1.
    if isinstance(value, tuple):
        return [p for part in value for p in parameters(part, special)]
    if isinstance(value, torch.Tensor):
        return [(value.data_ptr(), 8)]
    if isinstance(value, float):
        return [(struct.unpack("<I", struct.pack("<f", value))[0], 4)]
    if isinstance(value, int) and not (special and value == 1):
        return [(value, 4)]
    return []


def of(launch):
    fixed = {p.name for p in launch.kernel.params if p.do_not_specialize}
    return [
        p
        for name in launch.kernel.arg_names
        if name in launch.arguments
        for p in parameters(launch.arguments[name], name not in fixed)
    ]


asked = []


def note(launch):
    held()
    asked.append(launch)
    expected.value = len(of(launch))


def held():
    # What the driver was asked for by the launch before this one.
    if not asked:
        return
    launch, wanted = asked[-1], of(asked[-1])
    assert noted.name.decode() == launch.kernel.__name__, noted.name
    grid = (*launch.grid, 1, 1)[:3]
    assert tuple(noted.grid) == grid, (tuple(noted.grid), grid)
    assert noted.threads == 32 * launch.warps
    seen = [value & (2 ** (8 * size) - 1)
            for value, (_, size) in zip(noted.parameters, wanted)]
    assert seen == [value for value, _ in wanted], (noted.name, seen, wanted)
    print(noted.name.decode(), len(wanted), noted.shared)


def step(product, *leaves):
    y = product()
    torch.autograd.grad(y, leaves, torch.ones_like(y))


BF16 = torch.bfloat16
x = torch.randn(1, 576, dtype=BF16, requires_grad=True)
W, bias = torch.randn(96, 576, dtype=BF16), torch.randn(192, dtype=BF16)[::2]
A = torch.randn(5, 576, requires_grad=True)
B = torch.randn(96, 5, requires_grad=True)
q = nf4.quantize(W)
many = x.detach().repeat(300, 1).requires_grad_()
with language.observed(note):
    step(lambda: lora.lora_linear(x, W, A, B, 0.5, bias), x, A, B)
    step(lambda: lora.lora_linear(many, W, A, B, 0.5), many, A, B)
    step(lambda: on_codes.nf4_lora_linear(x, q, A, B, 0.5), x)
    on_codes.nf4_dequantize(q)
    stack = gather.Stack.of([(A.detach().to(BF16), B.detach().to(BF16), 0.5)] * 2)
    y = torch.zeros(1, 96, dtype=BF16)
    gather.gather_lora(y, x.detach(), stack, torch.tensor([1]))
    held()
print("launches:", len(asked))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A folder with the stub as libcuda.so.1."""
    folder = tmp_path_factory.mktemp("driver")
    headers = Path(language.triton.__path__[0]) / "backends" / "nvidia" / "include"
    built = folder / "libcuda.so.1"
    command = [COMPILER, "-shared", "-fPIC", "-O1", f"-I{headers}", str(STUB)]
    subprocess.run([*command, "-o", str(built)], check=True)
    return folder


def launched(driver: Path, script: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "LD_LIBRARY_PATH": str(driver),
        "TRITON_LIBCUDA_PATH": str(driver),
        "TRITON_CACHE_DIR": str(driver / "cache"),
        "PYTHONPATH": str(TESTS.parent),
    }
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_driver_is_given_what_a_launch_names(driver):
    """Pointers, sizes and numbers of all seven kernels, in order; grid and threads."""
    done = launched(driver, LAUNCHES)
    assert done.returncode == 0, done.stderr[-2000:]
    *kernels, last = done.stdout.splitlines()
    assert {line.split()[0] for line in kernels} == {
        "_product", "_finish", "_over_rows", "_add_up", "_dequantize", "_shrink",
        "_expand",
    }  # fmt: skip
    assert last == f"launches: {len(kernels)}"


def test_another_order_or_size_would_be_seen(driver):
    for right, wrong in (
        ("return [(value.data_ptr(), 8)]", "return [(value.data_ptr() + 2, 8)]"),
        ("not (special and value == 1)", "not value == 1"),
    ):
        assert LAUNCHES.count(right) == 1
        done = launched(driver, LAUNCHES.replace(right, wrong))
        assert done.returncode == 1 and "AssertionError" in done.stderr, right
