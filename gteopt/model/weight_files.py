"""Finds a model's weight files, by the rule of transformers, and reads their headers.

Refuses to know: torch. Pickles are never opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gteopt.errors import (
    InputError,
    IntegrityError,
    UnsupportedError,
    join_problems,
    shorten_value,
)
from gteopt.model.artifact import MANIFEST
from gteopt.model.foreign import check_link, path_inside_folder, read_json
from gteopt.records.manifest import Manifest

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def index_files(folder: Path) -> list[str]:
    """The files that a sharded checkpoint's index lists, sorted.

    Raises:
        IntegrityError: the index is broken, or names a path outside of the folder.
    """
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise IntegrityError(f"{folder / INDEX} has no weight_map from tensors to files")
    for name in (names := set(map(str, weight_map.values()))):
        path_inside_folder(folder, name, of=INDEX)
    return sorted(names)


def find_weight_files(folder: Path, manifest: Manifest | None) -> tuple[Path, ...]:
    """The safetensors files of the transformer.

    As in transformers, these are `model.safetensors` if it exists, else the files of the index.

    Raises:
        InputError: the folder has no weights.
        IntegrityError: files of the index are missing.
        UnsupportedError: gteopt does not read the format; the message says what to do.
    """
    if manifest is not None and manifest.format == "gteopt":
        listed = sorted(
            record.path for record in manifest.files if record.path.startswith("weights/")
        )
        return tuple(path_inside_folder(folder, name, of=MANIFEST) for name in listed)
    single = folder / SINGLE
    if single.is_file():
        check_link(folder, single)
        return (single,)
    if (folder / INDEX).is_file():
        names = index_files(folder)
        missing = [f"{name} is missing" for name in names if not (folder / name).is_file()]
        if missing:
            raise IntegrityError(
                join_problems(f"{folder} is incomplete; download it again", missing[:10])
            )
        return tuple(folder / name for name in names)
    raise _without_weights(folder)


def _without_weights(folder: Path) -> InputError | UnsupportedError:
    """The error for a folder without safetensors weights: what it holds, and what to do."""
    if (folder / "adapter_config.json").is_file():
        return UnsupportedError(
            f"{folder} is an adapter (LoRA), not a whole model; merge it into its base first: "
            f'python -c "from sentence_transformers import SentenceTransformer as S; '
            f"m = S('{folder}'); m[0].model = m[0].model.merge_and_unload(); m.save('MERGED')\""
        )

    def some(*patterns: str) -> str:
        return ", ".join(
            shorten_value(path.name)
            for pattern in patterns
            for path in sorted(folder.glob(pattern))[:3]
        )

    if names := some("*.gguf"):
        return UnsupportedError(
            f"{folder} has its weights as GGUF ({names}), which is llama.cpp's format; give the "
            f"safetensors model that it was made from"
        )
    if names := some("*.onnx", "onnx/*.onnx"):
        return UnsupportedError(
            f"{folder} has its weights as ONNX ({names}); give the safetensors model that it was "
            f"made from"
        )
    if names := some("model.*.safetensors", "model.*.safetensors.index.json"):
        return UnsupportedError(
            f"{folder} has its weights under the name of a variant ({names}); rename the file to "
            f"{SINGLE}"
        )
    if names := some(*_PICKLES):
        return UnsupportedError(
            f"{folder} has its weights only as pickle ({names}), which can run code when opened; "
            f"convert them to safetensors first (save_pretrained does)"
        )
    return InputError(
        f"{folder} has no weights: neither {SINGLE} nor {INDEX}; download the model again"
    )


def read_weight_headers(files: tuple[Path, ...]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in safetensors files.

    Raises:
        IntegrityError: a file is broken or truncated.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    problems = []
    for path in files:
        try:
            with safe_open(path, framework="numpy") as handle:
                for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            problems.append(f"{path.name} ({path.stat().st_size} bytes): {shorten_value(error)}")
    if problems:
        subject = f"{files[0].parent} has broken weight files; download them again"
        raise IntegrityError(join_problems(subject, problems))
    return shapes
