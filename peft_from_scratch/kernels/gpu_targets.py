"""What the kernels are on GPUs that are not here: compiled ahead of time, and read.

    python -m peft_from_scratch.kernels.gpu_targets    compiles all cases, 3 minutes

writes data/results/kernels.json, of which tools/kernels_page.py makes docs/kernels.md.
Triton needs no GPU to compile for one: it is told the target. How a launch's arguments
would be specialised is asked of its own binder. From what comes out are read

    registers     of a thread; 255 is NVIDIA's limit, 512 AMD's
    shared        bytes that the threads of a program share
    spilled       bytes of a thread's stack: values that found no register
    a_weight      of a kernel that unpacks four bits, on NVIDIA: the instructions of
                  its loop, for each weight that the loop unpacks
    instructions  those that multiply matrices, with the operands' dtype

How fast any of it is, a compiler does not say.
"""

import argparse
import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from ..common import atomic
from ..common.digest import digest
from ..common.progress import bar
from ..common.provenance import ROOT, package_version
from . import language
from .cases import CASES, NAMES, SAMPLE, KernelCase
from .language import INTERPRETED, Launch

RESULT = ROOT / "data" / "results" / "kernels.json"
TARGETS = {
    "sm_80": ("cuda", 80, 32),  # A100
    "sm_90": ("cuda", 90, 32),  # H100
    "sm_100": ("cuda", 100, 32),  # B200
    "gfx942": ("hip", "gfx942", 64),  # MI300X
}
LARGEST = {  # KiB that a program can share: CUDA's programming guide; CDNA 3's manual
    **{"sm_80": 163, "sm_90": 227, "sm_100": 227},
    "gfx942": 64,
}
MATRIX = {  # by backend: the instructions that multiply matrices, in the assembly
    "cuda": r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.\S*?[^\s;]*",
    "hip": r"\bv_mfma_\w+",
}
# A line of nvdisasm: its address, a predicate or none, the operation.
OPERATION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


# Compiling ----------------------------------------------------------------------------


def source(launch: Launch, target) -> tuple:
    """(what Triton compiles for a launch, its options), as its JIT would make them."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    bound, special, more = bind(**launch.arguments, **launch.constants, **options)
    packed = kernel._pack_args(backend, options, bound, special, more)
    options, signature, constants, attributes = packed
    return ASTSource(kernel, signature, constants, attributes), vars(options)


def compiled(launch: Launch, target: str) -> dict:
    """Registers, bytes and instructions of a launch on a target; see the module."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget(*TARGETS[target])
    compilable, options = source(launch, target)
    binary = triton.compile(compilable, target=target, options=options)
    read = nvidia if target.backend == "cuda" else amd
    facts = read(binary.asm) | {"shared": binary.metadata.shared}
    if target.backend == "cuda" and (weights := unpacked_by_a_thread(launch)):
        sass = _nvidias("nvdisasm", binary.asm["cubin"], "-c")
        facts["a_weight"] = round(len(loop(sass)) / weights, 1)
    return facts


def unpacked_by_a_thread(launch: Launch) -> float:
    """How many weights in four bits a thread unpacks on a way through the loop."""
    constants = launch.constants
    reader = getattr(constants.get("LOAD"), "fn", None)
    if launch.kernel.fn.__name__ == "_dequantize":
        return constants["CHUNK"] / (32 * launch.warps)
    if reader is None or not reader.__name__.startswith("unpacked"):
        return 0
    return constants["BN"] * constants["BK"] / (32 * launch.warps)


def loop(sass: str) -> list[str]:
    """The operations of a kernel's longest loop; all of them where it has none.

    A loop is what lies between a label and the last branch back to it.
    """
    operations, labels, longest = [], {}, (0, None)
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(operations)
        elif match := OPERATION.match(line):
            operations.append(match[1])
            back = re.search(r"\.L_\w+", line)
            if match[1] == "BRA" and back is not None and back[0] in labels:
                begin, end = labels[back[0]], len(operations)
                if end - begin > 1:  # not the branch to itself behind the end
                    longest = max(longest, (end - begin, begin))
    length, begin = longest
    return operations if begin is None else operations[begin : begin + length]


def nvidia(assembly: dict) -> dict:
    """What cuobjdump says of a cubin, and the instructions of its PTX."""
    usage = resources(_nvidias("cuobjdump", assembly["cubin"], "--dump-resource-usage"))
    names = instructions(assembly["ptx"], "cuda")
    dtypes = operands(assembly["ttgir"])
    kinds = [n + "." + "/".join(dtypes) if "kind::f16" in n else n for n in names]
    return usage | {"instructions": kinds}


def resources(report: str) -> dict:
    """{registers, spilled} from cuobjdump --dump-resource-usage."""
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    registers, stack, local = map(int, match.groups())
    return {"registers": registers, "spilled": stack + local}


def operands(ttgir: str) -> list[str]:
    """The dtypes that tcgen05's products read: its kind::f16 is fp16 and bf16 alike."""
    lines = [line for line in ttgir.splitlines() if "ttng.tc_gen5_mma" in line]
    dtypes = {t for line in lines for t in re.findall(r"memdesc<[\dx]+x(b?f\d+)", line)}
    return sorted(dtypes - {"f32"})


def amd(assembly: dict) -> dict:
    """The kernel's own notes at the end of its assembly, and its instructions."""
    text = assembly["amdgcn"]

    def noted(name: str) -> int:
        return int(re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)[1])

    spills = 4 * (noted("vgpr_spill_count") + noted("sgpr_spill_count"))
    return {
        "registers": noted("vgpr_count"),
        "spilled": max(spills, noted("private_segment_fixed_size")),
        "instructions": instructions(text, "hip"),
    }


def instructions(assembly: str, backend: str) -> list[str]:
    """The kinds of matrix instructions in it, without their layout."""
    kinds = set(re.findall(MATRIX[backend], assembly))
    noise = r"\.(sync|aligned|row|col|cta_group::1)\b"
    return sorted(re.sub(noise, "", name) for name in kinds)


def _nvidias(name: str, cubin: bytes, option: str) -> str:
    """What one of the tools that Triton brings along says of a cubin."""
    import triton

    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout


# All of them --------------------------------------------------------------------------


def rows(cases: Iterable[KernelCase]) -> list[dict]:
    """A row for each launch that compiles to something of its own.

    Raises   RuntimeError   Triton interprets in this process: see `elsewhere`
    """
    if INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET=1 is set: kernels are interpreted in this process and "
            "cannot be compiled. elsewhere() compiles in a process without it"
        )
    from triton.backends.compiler import GPUTarget

    launches: dict[str, tuple[Launch, list[str]]] = {}
    for case in cases:
        for launch in case.launches():
            compilable, _ = source(launch, GPUTarget(*TARGETS["sm_80"]))
            options = launch.warps, launch.stages
            key = compilable.hash() + str(options)
            names = launches.setdefault(key, (launch, []))[1]
            if case.name not in names:
                names.append(case.name)
    table = []
    with bar("compiling", "kernel", len(launches) * len(TARGETS)) as progress:
        for launch, names in launches.values():
            on = {}
            for target in TARGETS:
                on[target] = compiled(launch, target)
                progress.update()
            table.append(described(launch) | {"targets": on, "cases": names})
    return table


def described(launch: Launch) -> dict:
    """A launch by its words and numbers, without what differs between its cases."""
    dtypes, views = [], []
    for name, value in launch.arguments.items():
        tensor, *strides = value if isinstance(value, tuple) else (value,)
        if isinstance(tensor, torch.Tensor):
            dtypes.append(NAMES[tensor.dtype])
            if len(strides) == 2 and strides[1] != 1:
                views.append(name)  # its rows do not lie in memory one by one
    half = [dtype for dtype in dtypes if dtype in ("fp16", "bf16")]
    constants = {
        name: value.fn.__name__ if hasattr(value, "fn") else value
        for name, value in launch.constants.items()
    }
    return {
        "kernel": launch.kernel.fn.__name__,
        "dtype": (*half, "fp32")[0],
        "dtypes": sorted(set(dtypes)),
        "transposed": views,
        "constants": constants,
        "warps": launch.warps,
        "stages": launch.stages,
    }


def result(cases: Iterable[KernelCase] = CASES) -> dict:
    """What data/results/kernels.json holds."""
    return {
        "made_of": fingerprint(),
        "versions": {name: package_version(name) for name in ("triton", "torch")},
        "rows": rows(cases),
    }


def elsewhere(*arguments: str) -> dict:
    """`result`, computed by a process that compiles; its cache is gone afterwards."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", __spec__.name, "--into", str(file), *arguments]
        environment |= {"TRITON_CACHE_DIR": folder, "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}  # fmt: skip
        subprocess.run(command, env=environment, check=True)
        return json.loads(file.read_text("utf-8"))


# Whether the file is current ----------------------------------------------------------


def fingerprint(cases: Iterable[KernelCase] = CASES) -> str:
    """Another one as soon as a kernel's code, a tile or a shape changes.

    Comments, docstrings and what is around the kernels do not count.
    """
    launches = [(case.name, launch) for case in cases for launch in case.launches()]
    modules = {language.__name__}
    for _, launch in launches:
        values = (launch.kernel, *launch.constants.values())
        modules |= {value.fn.__module__ for value in values if hasattr(value, "fn")}
    code = [text for name in sorted(modules) for text in kernels_of(name)]
    parts = [
        [name, launch.grid, described(launch), _numbers(launch.arguments)]
        for name, launch in launches
    ]
    return digest(code, parts)


def kernels_of(module: str) -> list[str]:
    """The code of a module's Triton functions, without comments and docstrings."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    functions = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any(
            "triton" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            if ast.get_docstring(node) is not None:
                del node.body[0]
            functions.append(ast.unparse(node))
    return functions


def _numbers(value):
    """Arguments as JSON can hold them: a tensor by its dtype and shape."""
    if isinstance(value, torch.Tensor):
        return [NAMES[value.dtype], *value.shape]
    if isinstance(value, dict):
        return {name: _numbers(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [_numbers(part) for part in value]
    return getattr(value, "value", value)  # of a tl.constexpr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, help="where the result goes, as JSON")
    parser.add_argument("--sample", action="store_true", help="a few cases alone")
    asked = parser.parse_args()
    cases = [case for case in CASES if case.name in SAMPLE or not asked.sample]
    if asked.into is not None:  # this is the process that compiles
        asked.into.write_text(json.dumps(result(cases)), "utf-8")
        return
    if asked.sample:
        parser.error("--sample is no whole result: say with --into where it goes")
    kernels = elsewhere()
    with atomic.new_file(RESULT) as partial:
        partial.write_text(json.dumps(kernels, indent=1) + "\n", "utf-8")
    print("compiled; now the page made of it: python -m tools.kernels_page")


if __name__ == "__main__":
    main()
