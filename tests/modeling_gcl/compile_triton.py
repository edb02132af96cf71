"""usage: compile_triton.py: compile the Triton kernels as for a GPU, and print what they take of it, as JSON lines.

Needs no GPU, but the NVIDIA tools that Triton brings. Run by `test_kernels.py`.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_gcl import kernels

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
CASES = (  # capability, dtype, rows, dim, bf16, semantic
    (90, torch.float32, 64, 512, False, 0),
    (90, torch.float32, 64, 768, True, 0),
    (90, torch.bfloat16, 64, 512, False, 384),
    (80, torch.float32, 64, 768, False, 0),
    (80, torch.bfloat16, 64, 512, False, 0),
    (90, torch.float32, 1, 100, False, 0),  # Triton makes a constant of an argument that is 1
)


class Compiler:
    """In a kernel's place: compiles it for the arguments of each launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, num_warps, num_stages, **arguments):
        arguments["PRECISION"] = "tf32x3"  # as on a GPU
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, arguments[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        compiled = triton.compile(
            ASTSource(self.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
        print(
            json.dumps(
                {
                    "kernel": self.kernel.fn.__name__,
                    "capability": capability,
                    "dtype": TYPES[dtype],
                    "dim": dim,
                    "bf16": bf16,
                    "shared": compiled.metadata.shared,
                    **resources(compiled.asm["cubin"]),
                }
            )
        )


def resources(cubin):
    """Registers and bytes of stack, which is where they spill to, of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name.lower(): int(re.search(rf"{name}:(\d+)", run.stdout)[1]) for name in ("REG", "STACK")}


kernels._sums_kernel = Compiler(kernels._sums_kernel)
kernels._gradient_kernel = Compiler(kernels._gradient_kernel)
for capability, dtype, rows, dim, bf16, semantic in CASES:
    kernels._is_hopper = lambda _, hopper=capability == 90: hopper
    x, labels = torch.zeros(rows, dim, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    cosines = torch.zeros(rows, semantic) if semantic else None
    panel = SimpleNamespace(
        rows=(x,), cols=(x,), blocks=[(0, 0)], symmetric=True, row_labels=(labels,) * 2, col_labels=(labels,) * 2,
        row_semantic=cosines, col_semantic=cosines,
    )  # fmt: skip
    sums = torch.zeros(1, 1, rows)
    if not bf16:
        kernels.add_sums(panel, 20.0, 1.0, sums)
    kernels.add_weighted(panel, 20.0, 1.0, sums, sums, [torch.zeros(rows, dim)], bf16=bf16)
