"""Find YAML files, read them, and report every problem with its line.

Hides: PyYAML and the wording of pydantic's errors. Refuses to know: which documents exist.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from gteopt.errors import InputError, join_problems, suggest_names
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
"""With so few, nested aliases expand to a few hundred values at most."""
_SHOWN = 400
"""Most characters of one problem, because a problem quotes the value."""


def list_shipped_names(kind: ShippedKind) -> list[str]:
    """Names of the YAML files of one kind that come with gteopt, sorted."""
    return sorted(path.stem for path in shipped_dir(kind).glob("*.yaml"))


def find_yaml(kind: ShippedKind, name_or_file: str, *, beside: Path | None = None) -> Path:
    """The YAML file behind a shipped name or a path.

    Args:
        kind: the kind of file.
        name_or_file: a shipped name, or a path that ends in .yaml or .yml.
        beside: folder in which a relative path is looked for first, before the working directory.

    Raises:
        InputError: no such file, or no such name; the message suggests the nearest name.
    """
    word = _KIND_WORD[kind]
    if name_or_file.endswith((".yaml", ".yml")):
        candidates = [Path(name_or_file)]
        if beside is not None:
            candidates.insert(0, beside / name_or_file)
        for path in candidates:
            if path.is_file():
                return path
        raise InputError(
            f"{word} file {name_or_file} does not exist; give an existing file or a shipped name "
            f"({', '.join(list_shipped_names(kind))})"
        )
    path = shipped_dir(kind) / f"{name_or_file}.yaml"
    if path.is_file():
        return path
    raise InputError(
        f"unknown {word} '{name_or_file}': {suggest_names(name_or_file, list_shipped_names(kind))} "
        f"(for a file of your own, give its path ending in .yaml)"
    )


def read_yaml(path: Path, document: type[Document]) -> Document:
    """Read and validate one YAML file.

    Raises:
        InputError: unreadable, not YAML, or not valid; lists every problem with its line.
    """
    try:
        if (n_bytes := path.stat().st_size) > _MOST_BYTES:
            raise InputError(f"{path} has {n_bytes:,} bytes; at most {_MOST_BYTES:,} are allowed")
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
        content = document.model_validate(data)
    except ValidationError as error:
        errors = [dict(details) for details in error.errors()]
        problems += [_problem(path, node, document, e) for e in errors if not _is_consequence(e)]
    if problems:
        shown = [text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..." for text in problems[:20]]
        raise InputError(join_problems(f"{path} has {len(problems)} problem(s)", shown))
    return content


def _check_shape(path: Path, text: str) -> None:
    """Refuse YAML that would take too much memory: aliases in a few bytes can name millions.

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
                f"{path}:{line}: more than {_MOST_DEPTH} nested levels or "
                f"{_MOST_ALIASES} aliases (*name); write out the values"
            )


def _repeated_fields(path: Path, root: yaml.Node | None) -> list[str]:
    """Fields given twice in one mapping; YAML would silently keep the last value."""
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
    """Whether an error only follows from others: a list of invalid items is also "too short"."""
    return error["type"] == "too_short" and bool(len(error["input"]) >= error["ctx"]["min_length"])


def _problem(
    path: Path, node: yaml.Node | None, document: type[BaseModel], error: dict[str, Any]
) -> str:
    """One validation problem as 'file:line: field: what is allowed (what was found)'."""
    kind, context, value = error["type"], error.get("ctx", {}), error.get("input")
    location = [str(part) for part in error["loc"]]
    message = str(error["msg"]).removeprefix("Value error, ")
    options = str(context.get("expected", ""))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location.append(context["discriminator"].strip("'"))
        if kind == "union_tag_invalid":
            value, options = context["tag"], context["expected_tags"]
            message = f"Input should be one of {options}"
    line, keys = _locate(node, location)
    field = ".".join(keys) or "(file)"
    if kind == "extra_forbidden":
        hint = suggest_names(keys[-1], _fields_at(document, location[:-1]))
        return f"{path}:{line}: unknown field '{field}': {hint}"
    if kind in ("missing", "union_tag_not_found"):
        return f"{path}:{line}: field '{'.'.join([*keys, location[-1]])}' is missing"
    return f"{path}:{line}: {field}: {_worded(message, value, options)}"


def _worded(message: str, value: object, options: str) -> str:
    """A message with the value that was found and the name that was probably meant."""
    shown = "" if isinstance(value, dict | BaseModel) else f" (found {value!r})"
    if isinstance(value, str) and options:
        hint = suggest_names(value, re.findall("'([^']+)'", options))
        shown += f"; {hint}" if hint.startswith("did you mean") else ""
    return f"{message}{shown}"


def explain_validation_error(subject: str, error: ValidationError) -> InputError:
    """The problems of a validation error, worded as in `read_yaml`, but without a file."""
    problems = []
    for details in error.errors():
        problem: dict[str, Any] = dict(details)
        if not _is_consequence(problem):
            message = str(problem["msg"]).removeprefix("Value error, ")
            options = str(problem.get("ctx", {}).get("expected", ""))
            text = _worded(message, problem["input"], options)
            where = ".".join(str(part) for part in problem["loc"])
            problems.append(f"{where}: {text}" if where else text)
    return InputError(join_problems(f"{subject} has {len(problems)} problem(s)", problems))


def _locate(node: yaml.Node | None, location: list[str]) -> tuple[int, list[str]]:
    """Line (from 1) of the deepest part of `location` in the YAML, and the keys down to it.

    pydantic adds a union's tag to the location; parts that are not in the YAML are left out.
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
            # The part is the tag of a union's variant, a list's index or a mapping's key.
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
