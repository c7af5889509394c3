"""YAML files: where shipped ones lie, how one is read, and every problem with its line.

Hides: PyYAML and the wording of pydantic's errors. Refuses to know: which documents there are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from gteopt.errors import InputError, join_problems, suggest
from gteopt.paths import shipped_dir

ShippedKind = Literal[
    "recipes", "recipes/plans", "recipes/policies", "eval/suites", "eval/protocols"
]
_KIND_WORD: dict[ShippedKind, str] = {
    "recipes": "recipe",
    "recipes/plans": "plan",
    "recipes/policies": "policy",
    "eval/suites": "suite",
    "eval/protocols": "protocol",
}
Document = TypeVar("Document", bound=BaseModel)

_MOST_BYTES = 1 << 20
_MOST_DEPTH = 20
_MOST_ALIASES = 16
"""With so few, no nesting of aliases makes more than some hundred values."""
_SHOWN = 400
"""Most characters of one problem: a value is quoted in it."""


def shipped_names(kind: ShippedKind) -> list[str]:
    """Names of the YAML files of one kind that come with gteopt, sorted."""
    return sorted(path.stem for path in shipped_dir(kind).glob("*.yaml"))


def find_yaml(kind: ShippedKind, name_or_file: str, *, beside: Path | None = None) -> Path:
    """The file that a name or a path means.

    Args:
        kind: what is looked for.
        name_or_file: a shipped name, or a path that ends in .yaml or .yml.
        beside: folder that a relative path is tried against before the working directory.

    Raises:
        InputError: no such file, or no such name (with the nearest one).
    """
    what = _KIND_WORD[kind]
    if name_or_file.endswith((".yaml", ".yml")):
        candidates = [Path(name_or_file)]
        if beside is not None:
            candidates.insert(0, beside / name_or_file)
        for path in candidates:
            if path.is_file():
                return path
        raise InputError(
            f"{what} file {name_or_file} does not exist; give an existing file or a shipped name "
            f"({', '.join(shipped_names(kind))})"
        )
    path = shipped_dir(kind) / f"{name_or_file}.yaml"
    if path.is_file():
        return path
    raise InputError(
        f"unknown {what} '{name_or_file}': {suggest(name_or_file, shipped_names(kind))} "
        f"(for a file of your own, give its path ending in .yaml)"
    )


def read_yaml(path: Path, document: type[Document]) -> Document:
    """Read and validate one YAML file.

    Raises:
        InputError: unreadable, not YAML, or not valid; lists every problem with its line.
    """
    try:
        if (n_bytes := path.stat().st_size) > _MOST_BYTES:
            raise InputError(f"{path} has {n_bytes:,} bytes; at most {_MOST_BYTES:,} are read")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    try:
        _check_shape(path, text)
        node = yaml.compose(text)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{where}: not valid YAML: {problem}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of fields, found {type(data).__name__}")
    problems = _repeated_fields(path, node)
    try:
        read = document.model_validate(data)
    except ValidationError as error:
        found = [dict(each) for each in error.errors()]
        problems += [_problem(path, node, document, e) for e in found if not _is_consequence(e)]
    if problems:
        shown = [each if len(each) <= _SHOWN else f"{each[:_SHOWN]} ..." for each in problems[:20]]
        raise InputError(join_problems(f"{path} has {len(problems)} problem(s)", shown))
    return read


def _check_shape(path: Path, text: str) -> None:
    """Refuse what would take memory without end: few bytes can name a list of millions.

    Raises:
        InputError: nested too deeply, or too many aliases.
        yaml.YAMLError: not YAML.
    """
    depth = n_aliases = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        n_aliases += isinstance(event, yaml.AliasEvent)
        if depth > _MOST_DEPTH or n_aliases > _MOST_ALIASES:
            line = event.start_mark.line + 1 if event.start_mark is not None else 1
            raise InputError(
                f"{path}:{line}: more than {_MOST_DEPTH} levels or "
                f"{_MOST_ALIASES} aliases (*name); write the values out"
            )


def _repeated_fields(path: Path, root: yaml.Node | None) -> list[str]:
    """Fields written twice in one mapping; YAML would silently keep the last."""
    problems: list[str] = []
    nodes, visited = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in visited:  # an alias
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            first_line: dict[str, int] = {}
            for key, value in node.value:
                nodes.append(value)
                name, line = str(key.value), key.start_mark.line + 1
                if name in first_line:
                    problems.append(
                        f"{path}:{line}: field '{name}' is given twice, first on line "
                        f"{first_line[name]}"
                    )
                first_line.setdefault(name, line)
    return problems


def _is_consequence(error: dict[str, Any]) -> bool:
    """A list whose items are invalid is also called too short; the items' problems are enough."""
    return error["type"] == "too_short" and bool(len(error["input"]) >= error["ctx"]["min_length"])


def _problem(
    path: Path, node: yaml.Node | None, document: type[BaseModel], error: dict[str, Any]
) -> str:
    """One validation problem as 'file:line: field: what was found, what is allowed'."""
    kind, context, found = error["type"], error.get("ctx", {}), error.get("input")
    location = [str(part) for part in error["loc"]]
    message = str(error["msg"]).removeprefix("Value error, ")
    options = str(context.get("expected", ""))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location.append(context["discriminator"].strip("'"))
        if kind == "union_tag_invalid":
            found, options = context["tag"], context["expected_tags"]
            message = f"Input should be one of {options}"
    line, keys = _locate(node, location)
    field = ".".join(keys) or "(file)"
    if kind == "extra_forbidden":
        hint = suggest(keys[-1], _fields_at(document, location[:-1]))
        return f"{path}:{line}: unknown field '{field}': {hint}"
    if kind in ("missing", "union_tag_not_found"):
        return f"{path}:{line}: field '{'.'.join([*keys, location[-1]])}' is missing"
    return f"{path}:{line}: {field}: {_said(message, found, options)}"


def _said(message: str, found: object, options: str) -> str:
    """What is wrong, with what was found and the name that was probably meant."""
    shown = "" if isinstance(found, dict | BaseModel) else f" (found {found!r})"
    if isinstance(found, str) and options:
        hint = suggest(found, re.findall("'([^']+)'", options))
        shown += f"; {hint}" if hint.startswith("did you mean") else ""
    return f"{message}{shown}"


def invalid(subject: str, error: ValidationError) -> InputError:
    """What a validation found, worded as `read_yaml` does where there is no file."""
    problems = []
    for found in error.errors():
        each: dict[str, Any] = dict(found)
        if not _is_consequence(each):
            message = str(each["msg"]).removeprefix("Value error, ")
            said = _said(message, each["input"], str(each.get("ctx", {}).get("expected", "")))
            where = ".".join(str(part) for part in each["loc"])
            problems.append(f"{where}: {said}" if where else said)
    return InputError(join_problems(f"{subject} has {len(problems)} problem(s)", problems))


def _locate(node: yaml.Node | None, location: list[str]) -> tuple[int, list[str]]:
    """Line (from 1) of the deepest part of `location` that the YAML has, and that part's keys.

    pydantic puts a union's tag into the location; parts that the YAML does not have are dropped.
    """
    line = node.start_mark.line + 1 if node is not None else 1
    keys: list[str] = []
    for part in location:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == part:
                    line, node = key_node.start_mark.line + 1, value_node
                    keys.append(part)
                    break
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
            keys.append(part)
    return line, keys


def _fields_at(document: type[BaseModel], location: list[str]) -> list[str]:
    """Names of the fields that may stand at a pydantic `location`."""
    models = [document]
    for part in location:
        fields = [
            field
            for model in models
            for name, field in model.model_fields.items()
            if part in (name, field.alias)
        ]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
        else:
            # The tag of a union's variant, or else a list's index or a mapping's key.
            variants = [
                model
                for model in models
                if any(part in get_args(f.annotation) for f in model.model_fields.values())
            ]
            models = variants or models
    return sorted({f.alias or n for model in models for n, f in model.model_fields.items()})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
