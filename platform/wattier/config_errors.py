"""What pydantic finds wrong with a config, in the words of this project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from wattier.errors import did_you_mean
from wattier.strict_yaml import describe

PARAMETER_KINDS = ("RangeParameter", "ChoiceParameter")  # tags of a union, which no user wrote


def explain(path: Path, kind: type[BaseModel], error: ValidationError) -> str:
    """The first problem, as ``file: search.stages[0]: unknown key 'epoch'. Did you mean 'epochs'?``."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] in ("extra_forbidden", "invalid_key")), problems[0])
    location = [part for part in problem["loc"] if part not in (*PARAMETER_KINDS, "[key]")]
    more = f" ({len(problems) - 1} more problems follow.)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        *parents, key = location
        known = _known_keys(kind, list(problem["loc"][:-1]))
        return f"{path.name}: {_dotted(parents)}unknown key {key!r}.{did_you_mean(str(key), known)}" + (
            "" if did_you_mean(str(key), known) else f" Known are {', '.join(known)}." if known else ""
        )
    where = _dotted(location)
    if problem["type"] == "invalid_key":
        return (
            f"{path.name}: {_dotted(location[:-1])}key {describe(problem['input'])} is no text. Quote it, or remove it."
        )
    if problem["type"] == "missing":
        return f"{path.name}: {where}is missing, but must be given. Add it."
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    message = re.sub(r"a valid dictionary or instance of \w+", "a mapping", message)
    given = "" if problem["type"] == "value_error" else f"is {describe(problem['input'])}, but "
    return f"{path.name}: {where}{given}{message}{'' if message.endswith('?') else '.'}{more}"


def _known_keys(kind: type[BaseModel], location: list[Any]) -> list[str]:
    """Field names of the section at a location."""
    schema = kind.model_json_schema()
    node: Any = schema
    for part in location:
        node = _resolve(schema, node)
        if part in PARAMETER_KINDS:
            node = schema["$defs"][part]
        elif isinstance(part, int):
            node = node.get("items", {})
        else:
            of_any_name = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
            node = node.get("properties", {}).get(part) or next(filter(None, of_any_name), {})
        if not isinstance(node, dict):
            return []
    return list(_resolve(schema, node).get("properties", {}))


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    reference = node.get("$ref")
    resolved: dict[str, Any] = schema["$defs"][reference.rsplit("/", 1)[1]] if reference else node
    return resolved


def _dotted(location: list[Any]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return f"{text}: " if text else ""
