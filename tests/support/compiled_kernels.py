"""Compile the GPU kernels without a GPU, and write facts of the machine code as JSON.

Run by test_cuda.py in a process of its own: Triton decides at import whether it compiles or
interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gteopt.kernels import cuda, cuda_int4, cuda_int8, cuda_tokens
from gteopt.quant import cuda_columns

SIGNATURES = {
    "_quantize_kernel": {
        "x": "*bf16", "up": "*bf16", "norm": "*bf16", "codes": "*i8", "scale": "*fp32",
        "zero": "*i32", "epsilon": "fp32",
    },
    "_round_kernel": {
        "x": "*bf16", "up": "*bf16", "norm": "*bf16", "floats": "*fp8e4nv", "scale": "*fp32",
        "epsilon": "fp32",
    },
    "_int8_kernel": {
        "codes": "*i8", "weight": "*i8", "y": "*bf16", "token_scale": "*fp32", "zero": "*i32",
        "scale": "*fp32", "row_sum": "*i32", "bias": "*fp32",
    },
    "_int4_kernel": {
        "x": "*bf16", "qweight": "*u8", "scale": "*fp16", "zero": "*u8", "levels": "*fp32",
        "bias": "*bf16", "parts": "*fp32",
    },
    "_sum_kernel": {"parts": "*fp32", "y": "*bf16", "bias": "*bf16"},
    "_gate_kernel": {"gate": "*bf16", "up": "*bf16"},
    "_rotate_kernel": {"x": "*bf16", "cos": "*bf16", "sin": "*bf16"},
    "_decode_kernel": {
        "qweight": "*u8", "scale": "*fp16", "zero": "*u8", "levels": "*fp32", "out": "*bf16",
    },
}  # fmt: skip
"""Every other argument that is not a constant is an int32."""
KERNELS = vars(cuda_tokens) | vars(cuda_int8) | vars(cuda_int4)


def compiled(capability: int) -> Iterator[dict[str, Any]]:
    """Every kernel as the layers of a 7B model launch it."""
    for t in (cuda.int8_tile(1), cuda.int8_tile(128), *cuda.LARGE_TILES):
        if t.copies and capability < 90:
            continue
        constants = {
            "HAS_ZERO": True, "HAS_BIAS": True, "TOGETHER": 8,
            "TOKENS": t.tokens, "OUTPUTS": t.outputs, "INPUTS": t.inputs,
        }  # fmt: skip
        name = "_int8_copy_kernel" if t.copies else "_int8_kernel"
        yield _compile(name, constants, t.n_warps, t.n_stages, capability)
    for nf4, inputs in ((False, 128), (True, 64)):
        element = {"MIDDLE": 8, "HAS_ZERO": not nf4, "NF4": nf4}
        for tokens in (16, 64):
            constants = {
                **element, "HAS_BIAS": False, "TOKENS": tokens, "OUTPUTS": 32, "INPUTS": inputs
            }  # fmt: skip
            yield _compile("_int4_kernel", constants, 4, 4, capability)
        decoded = {**element, "STEPS": 2048 // inputs, "INPUTS": inputs}
        yield _compile("_decode_kernel", decoded, 4, 3, capability)
    for gated, normed in ((False, False), (True, False), (False, True)):
        before = {"GATED": gated, "NORMED": normed, "BLOCK": 4096}
        yield _compile("_quantize_kernel", {"SYMMETRIC": False, **before}, 8, 3, capability)
        if capability >= 89:
            yield _compile("_round_kernel", {"MOST": 448.0, **before}, 8, 3, capability)
    yield _compile("_sum_kernel", {"HAS_BIAS": True, "BLOCK": 1024}, 4, 3, capability)
    yield _compile("_gate_kernel", {"BLOCK": 1024}, 4, 3, capability)
    yield _compile("_rotate_kernel", {"HEADS": 32, "HALF": 64}, 4, 3, capability)
    for number_format in ("int", "nf4", "e4m3"):
        yield _compile_panel(number_format, capability)


def _compile(
    name: str, constants: Mapping[str, Any], n_warps: int, n_stages: int, capability: int
) -> dict[str, Any]:
    kernel = KERNELS[name]
    pointers = SIGNATURES["_int8_kernel" if name == "_int8_copy_kernel" else name]
    if name == "_int8_copy_kernel":
        sizes = {"codes": constants["TOKENS"], "weight": constants["OUTPUTS"]}
        pointers = pointers | {
            argument: f"tensordesc<i8[{n}, {constants['INPUTS']}]>" for argument, n in sizes.items()
        }
    signature = {
        argument: "constexpr" if argument in constants else pointers.get(argument, "i32")
        for argument in kernel.arg_names
    }
    # A launch finds this out by itself: pointers and layers' sizes are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if pointers.get(argument, "").startswith("*") or argument in ("n_inputs", "n_outputs")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return _facts(name, source, {"num_warps": n_warps, "num_stages": n_stages}, capability)


def _compile_panel(number_format: str, capability: int) -> dict[str, Any]:
    """The kernel that rounds a panel of columns; its arguments are in two tuples."""
    is_int = number_format == "int"  # then there is no table of numbers
    types: Any = (
        ("*fp32", "*u8", "*fp32", "*i64", "*fp32", "*fp32", "constexpr" if is_int else "*fp32"),
        ("i32", "i32", "i32", "i32", "fp32", "fp32"),
    )
    signature = {
        "tensors": cuda_columns._Tensors(*types[0]),
        "sizes": cuda_columns._Sizes(*types[1]),
        **dict.fromkeys(("FORMAT", "ROWS", "COLUMNS"), "constexpr"),
    }
    constants: dict[Any, Any] = {
        "FORMAT": number_format, "ROWS": cuda_columns._ROWS, "COLUMNS": cuda_columns.PANEL
    }  # fmt: skip
    if is_int:
        constants[0, 6] = None
    places = [(0, i) for i in range(6 if is_int else 7)] + [(1, i) for i in range(4)]
    aligned = {place: [["tt.divisibility", 16]] for place in places}
    source = ASTSource(
        fn=cuda_columns._panel_kernel, signature=signature, constexprs=constants, attrs=aligned
    )
    return _facts("_panel_kernel", source, {"num_warps": 1}, capability)


def _facts(
    name: str, source: ASTSource, options: Mapping[str, int], capability: int
) -> dict[str, Any]:
    """Compile a kernel and count what its machine code needs."""
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = binary.asm["ptx"]
    return {
        "kernel": name,
        "shared_bytes": binary.metadata.shared,
        "registers": _registers(binary.asm["cubin"]),
        "tensor_core_products": ptx.count("wgmma.mma_async") + ptx.count("mma.sync"),
        "copies": ptx.count("cp.async.bulk.tensor"),
        "int8_products": ptx.count(".s32.s8.s8"),
        "spills": ptx.count("st.local"),
    }


def _registers(machine_code: bytes) -> int:
    """Registers of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        program = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.check_output([program, "--dump-resource-usage", file.name], text=True)
    return int(re.findall(r"REG:(\d+)", usage)[0])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(list(compiled(int(sys.argv[1])))))
