"""Check the GPU layers against float64 and time them, on the shapes of gte-Qwen2-7B.

    .venv/bin/python benchmarks/gpu_layers.py --out benchmarks/results/gpu_layers.json

Each layer has a row for each shape and number of tokens. The layers are gteopt's, and torch's for
the same weights: bfloat16 through cuBLAS, `torch._int_mm` with the scales applied by torch.compile,
and tinygemm's 4-bit product. All layers take turns, and the time is the median over rounds. The
cache is flushed before each call, so that weights come from memory. `share_of_peak` refers to the
fastest square product of the same type in this run; `bytes_per_s` counts weights and activations
once.

At the end, gteopt's layers run under `torch.compile` without a graph break, on the first shape, and
must give the same numbers. The JSON is written after each shape; a layer that fails has its error
there. `--minutes` ends the run early, which the JSON says. `--tiles` measures every tile of the
int8 product, and more tiles of the product of 4-bit weights with few tokens.

Without a GPU, `TRITON_INTERPRET=1 ... --device cpu --shapes 96x256 --tokens 1 5 70` checks the
numbers and times nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from results_files import conditions, write_results
from torch import Tensor, nn

from gteopt.config.recipe import LayerScheme
from gteopt.kernels import cuda
from gteopt.kernels.reference import DequantLinear
from gteopt.quant.affine import PackedWeight, pack, quantize_rtn

SHAPES = ("18944x3584", "3584x18944", "3584x3584", "512x3584")
"""Outputs x inputs: gate and up, down, query and output, key and value."""
TOKENS = (16384, 16, 1, 128, 2048)
W8A8 = LayerScheme(bits=8, group_size="per_channel", symmetric=True, activation_bits=8)
TOKEN_ZEROS = W8A8.model_copy(update={"activation_symmetric": False})
FP8 = W8A8.model_copy(update={"number_format": "e4m3"})
INT4 = LayerScheme(bits=4, group_size=128, symmetric=False)
NF4 = LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4")
INT4_TILES = (
    cuda.Tile(16, 16, 128, 2, 4), cuda.Tile(16, 16, 128, 4, 4), cuda.Tile(16, 32, 128, 4, 3),
    cuda.Tile(16, 32, 128, 4, 6), cuda.Tile(16, 32, 64, 4, 6), cuda.Tile(16, 64, 128, 4, 4),
    cuda.Tile(16, 64, 128, 8, 4),
)  # fmt: skip
_CHECKED_TOKENS = 64
"""Number of tokens at each end that are compared with float64."""

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One layer on one shape.

    Attributes:
        error: relative Frobenius error to the float64 product of the layer's weight and the
            unrounded input; bfloat16 alone is near 0.002.
        compiled_error: `error` under torch.compile; None if that was not tried.
        time_us: median; None if nothing was timed.
        share_of_peak: operations per second / measured peak of the operands' type.
        bytes_per_s: bytes of weights, inputs and outputs / time.
        failure: the error of a layer that failed.
    """

    layer: str
    outputs: int
    inputs: int
    tokens: int
    error: float | None = None
    compiled_error: float | None = None
    time_us: float | None = None
    share_of_peak: float | None = None
    bytes_per_s: float | None = None
    failure: str | None = None


def main() -> None:
    """Measure every layer on every shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="outputs x inputs")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tiles", action="store_true", help="measure more tiles")
    parser.add_argument("--minutes", type=float, help="end the run after this time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    timed = device.type == "cuda"
    peaks = {kind: peak(kind, device) for kind in ("bf16", "int8", "fp8")} if timed else {}
    print({kind: f"{rate / 1e12:.0f} TFLOP/s" for kind, rate in peaks.items()}, flush=True)
    rows: list[Row] = []
    late = False

    def write() -> None:
        if options.out is None:
            return
        record = {
            "schema": "gteopt.kernels/1",
            "peak_flop_per_s": peaks,
            "rounds": options.rounds,
            "ended_early": late,
            "int8_tiles": {str(k): list(v) for k, v in cuda.fastest_tiles().items()},
            "rows": [asdict(row) for row in rows],
            **conditions(),
        }
        write_results(options.out, record, indent=2)

    for shape in options.shapes:
        outputs, inputs = map(int, shape.split("x"))
        layers = layers_of(outputs, inputs, device, tiles=options.tiles)
        for tokens in options.tokens:
            late = late or (deadline is not None and time.monotonic() > deadline)
            if late:
                break
            x = inputs_of(tokens, inputs, device)
            for row in measured(layers, x, options.rounds, peaks, outputs):
                rows.append(row)
                show(shape, row)
        write()
    shape = options.shapes[0]
    outputs, inputs = map(int, shape.split("x"))
    layers = {} if late else layers_of(outputs, inputs, device, tiles=False)
    for i, row in compiled(layers, rows, shape, options.tokens, device):
        rows[i] = row
        if (row.compiled_error or 0) > 1.01 * (row.error or 0) + 1e-6 or row.failure:
            print(f"{row.layer}: WRONG under torch.compile: {row.compiled_error} {row.failure}")
    write()


def inputs_of(tokens: int, inputs: int, device: torch.device) -> Tensor:
    """Random inputs [T, I]: bfloat16 on a GPU, float32 in Triton's interpreter."""
    source = torch.Generator(device).manual_seed(tokens)
    x = torch.randn(tokens, inputs, generator=source, device=device)
    return x.to(torch.bfloat16 if device.type == "cuda" else torch.float32)


def measured(
    layers: dict[str, tuple[Product, Tensor, str]],
    x: Tensor,
    rounds: int,
    peaks: dict[str, float],
    outputs: int,
) -> Iterator[Row]:
    """Check each layer on these inputs, time it on a GPU, and yield its row."""
    tokens, inputs = x.shape
    able: dict[str, tuple[Product, Tensor, str]] = {}
    rows = {name: Row(name, outputs, inputs, tokens) for name in layers}
    for name, (product, weight, kind) in layers.items():
        try:
            rows[name] = replace(rows[name], error=wrong(product(x), x, weight))
            able[name] = product, weight, kind
        except _TooManyTokens:
            del rows[name]
        except Exception as error:  # a peer's operator may refuse, and a tile may not fit
            first = (str(error).strip().splitlines() or [""])[0]
            rows[name] = replace(rows[name], failure=f"{type(error).__name__}: {first}"[:160])
    for name, took in (interleaved(able, x, rounds) if peaks else {}).items():
        kind = layers[name][2]
        n_bytes = 2 * tokens * (inputs + outputs) + outputs * inputs * _BYTES[kind]
        rows[name] = replace(
            rows[name],
            time_us=took * 1e6,
            share_of_peak=2 * tokens * inputs * outputs / took / peaks[_TYPE[kind]],
            bytes_per_s=n_bytes / took,
        )
    yield from rows.values()


def wrong(output: Tensor, x: Tensor, weight: Tensor) -> float:
    """Relative error of the first and last tokens to float64."""
    x, output = (torch.cat([t[:_CHECKED_TOKENS], t[-_CHECKED_TOKENS:]]) for t in (x, output))
    exact = x.double() @ weight.double().T
    return float((output.double() - exact).norm() / exact.norm())


def compiled(
    layers: dict[str, tuple[Product, Tensor, str]],
    rows: list[Row],
    shape: str,
    tokens: Sequence[int],
    device: torch.device,
) -> Iterator[tuple[int, Row]]:
    """Index and new row of each row of our layers, with the error under torch.compile."""
    # Kernels in Triton's interpreter cannot be compiled.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    torch._dynamo.config.recompile_limit = 64  # layers share their code
    for name, (layer, weight, _) in layers.items():
        if not isinstance(layer, nn.Module):
            continue
        product: Product = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
        for n in tokens:
            x = inputs_of(n, weight.shape[1], device)
            key = (name, *map(int, shape.split("x")), n)
            for i, row in enumerate(rows):
                if (row.layer, row.outputs, row.inputs, row.tokens) == key and not row.failure:
                    try:
                        yield i, replace(row, compiled_error=wrong(product(x), x, weight))
                    except Exception as error:
                        first = str(error).strip().splitlines()[0]
                        yield i, replace(row, failure=f"under torch.compile: {first}"[:160])


def show(shape: str, row: Row) -> None:
    """Print one line of the table."""
    figures = f"{row.error:9.5f}" if row.error is not None else f"  {row.failure}"
    if row.time_us is not None:
        figures += f"{row.time_us:10.1f} us {row.share_of_peak:7.1%}"
        figures += f"{(row.bytes_per_s or 0) / 1e12:7.2f} TB/s"
    print(f"{shape:12}{row.tokens:7} {row.layer:42}{figures}", flush=True)


_BYTES = {"bf16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5}
_TYPE = {"bf16": "bf16", "int8": "int8", "fp8": "fp8", "int4": "bf16"}
"""Number type that the tensor cores multiply, by kind of weights."""


def layers_of(
    outputs: int, inputs: int, device: torch.device, *, tiles: bool
) -> dict[str, tuple[Product, Tensor, str]]:
    """Each layer with its dequantized weight [O, I] and the kind of its weights."""
    source = torch.Generator(device).manual_seed(0)
    dense = torch.randn(outputs, inputs, generator=source, device=device) / inputs**0.5
    whole = dense.bfloat16() if device.type == "cuda" else dense
    layers: dict[str, tuple[Product, Tensor, str]] = {
        "torch bf16": (lambda x: nn.functional.linear(x, whole), whole, "bf16")
    }

    def add(name: str, kind: str, scheme: LayerScheme, make: type[nn.Module]) -> PackedWeight:
        packed = pack(quantize_rtn(dense, scheme))
        layers[name] = make(packed, None).to(device), packed.unpack().dequantize(), kind
        return packed

    symmetric = add("ours int8", "int8", W8A8, cuda.Int8LinearCuda)
    add("ours int8, token zero points", "int8", TOKEN_ZEROS, cuda.Int8LinearCuda)
    for tile in (*cuda.LARGE_TILES, *(cuda.int8_tile(n) for n in (16, 128))) if tiles else ():
        layer = cuda.Int8LinearCuda(symmetric, None).to(device)
        name = f"ours int8, {tile.tokens}x{tile.outputs}x{tile.inputs} {tile.n_warps} warps"
        name += f" {tile.n_stages} stages" + (", copies" if tile.copies else "")
        layers[name] = _tiled(layer, tile), symmetric.unpack().dequantize(), "int8"
    if device.type == "cuda":
        layers["torch._int_mm, compiled"] = (
            _compiled_int_mm(symmetric),
            symmetric.unpack().dequantize(),
            "int8",
        )
    if (
        cuda.Fp8LinearCuda.fits(pack(quantize_rtn(dense, FP8)), torch.bfloat16)
        and device.type == "cuda"
    ):
        eight = add("ours fp8", "fp8", FP8, cuda.Fp8LinearCuda)
        fast = cuda.Fp8LinearCuda(eight, None).to(device)
        fast.fast = True
        layers["ours fp8, fast accumulation"] = fast, eight.unpack().dequantize(), "fp8"
    four = add("ours int4", "int4", INT4, cuda.Int4LinearCuda)
    few = cuda.Int4LinearCuda(four, None).to(device)
    for tile in INT4_TILES if tiles else ():
        name = f"ours int4, {tile.tokens}x{tile.outputs}x{tile.inputs}"
        name += f" {tile.n_warps} warps {tile.n_stages} stages"
        layers[name] = _few_tokens(few, tile), four.unpack().dequantize(), "int4"
    add("ours nf4", "int4", NF4, cuda.Int4LinearCuda)
    add("dequantize, portable", "int4", INT4, DequantLinear)
    if device.type == "cuda":
        layers["torch tinygemm int4"] = _tinygemm(four), four.unpack().dequantize(), "int4"
    return layers


def _tiled(layer: cuda.Int8LinearCuda, tile: cuda.Tile) -> Product:
    def product(x: Tensor) -> Tensor:
        codes, scale, zero = cuda.quantize_tokens_cuda(x, symmetric=True)
        return cuda.int8_product(
            codes, scale, zero, layer.weight, layer.scale, None, None, x.dtype, tile
        )

    return product


class _TooManyTokens(Exception):
    """The tile is made for fewer tokens."""


def _few_tokens(layer: cuda.Int4LinearCuda, tile: cuda.Tile) -> Product:
    def product(x: Tensor) -> Tensor:
        if len(x) > tile.tokens:
            raise _TooManyTokens
        return layer.multiply(x, tile)

    return product


@torch.compile(dynamic=True)
def _scaled_int_mm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    token_scale = x.abs().amax(-1, keepdim=True).float() / 127
    codes = (x / token_scale).round().to(torch.int8)
    sums = torch._int_mm(codes, weight)
    return (sums * token_scale).bfloat16() * scale


def _compiled_int_mm(packed: PackedWeight) -> Product:
    """The product that torchao's dynamic int8 computes."""
    weight = (packed.qweight ^ 128).view(torch.int8).t()
    scale = packed.scale[:, 0].bfloat16()

    def padded(x: Tensor) -> Tensor:
        # torch._int_mm takes more than 16 rows on a GPU.
        rows = max(32, len(x))
        wide = nn.functional.pad(x, (0, 0, 0, rows - len(x))) if rows > len(x) else x
        product: Tensor = _scaled_int_mm(wide, weight, scale)
        return product[: len(x)]

    return padded


def _tinygemm(packed: PackedWeight) -> Product:
    codes = packed.unpack()
    scale = codes.scale.float()
    grid = torch.stack([scale, (8 - codes.zero.float()) * scale], -1).transpose(0, 1)
    pairs = codes.codes[:, ::2] << 4 | codes.codes[:, 1::2]
    weight = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    width = packed.in_features // packed.scale.shape[1]
    grid = grid.bfloat16().contiguous()

    def product(x: Tensor) -> Tensor:
        output: Tensor = torch.ops.aten._weight_int4pack_mm(x, weight, width, grid)
        return output

    return product


def interleaved(
    layers: dict[str, tuple[Product, Tensor, str]], x: Tensor, rounds: int
) -> dict[str, float]:
    """Median seconds of a call of each layer; three rounds of one call each warm up."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=x.device)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(rounds + 3):
        for name, (product, _, _) in layers.items():
            flush.zero_()  # the weights come from memory, as they do within a model
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            product(x)
            end.record()
            torch.cuda.synchronize()
            if number >= 3:
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def peak(kind: str, device: torch.device) -> float:
    """FLOP/s of the faster of two square products in this type."""
    best = 0.0
    for n in (4096, 8192):
        x = torch.randn(n, n, device=device, dtype=torch.bfloat16)
        if kind == "int8":
            x = (x * 40).round().to(torch.int8)
        if kind == "fp8":
            x = x.to(torch.float8_e4m3fn)
        took = interleaved({kind: (_SQUARES[kind], x, kind)}, x, 10)[kind]
        best = max(best, 2 * n**3 / took)
    return best


def _fp8_square(x: Tensor) -> Tensor:
    ones = torch.ones((len(x), 1), device=x.device)
    return torch._scaled_mm(
        *(x, x.t()),
        scale_a=ones,
        scale_b=ones.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


_SQUARES: dict[str, Product] = {
    "bf16": lambda x: x @ x.t(),
    "int8": lambda x: torch._int_mm(x, x.t()),
    "fp8": _fp8_square,
}


if __name__ == "__main__":
    main()
