"""YAML as people expect it, with every way a file can be wrong told in one line."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

from wattier.errors import UserError

MAX_BYTES = 1_000_000


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a mapping.

    Raises:
        UserError: no such file, not text, too large, not YAML, a key given twice, no mapping.
    """
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise UserError(f"{path}: is a folder, but must be a YAML file. Give the path of the config.")
        if size > MAX_BYTES:
            raise UserError(f"{path}: is {size} bytes, but a config must be under {MAX_BYTES}. Is it a config?")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML config.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text. Give the path of a YAML config.") from error
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except Exception as error:  # PyYAML raises YAMLError, RecursionError, ValueError, KeyError ... by content
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: is not valid YAML ({reason}). Mend that line.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: is {describe(data)}, but must be a mapping with keys such as name, data, search.")
    return data


class _StrictLoader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 and everybody expects; refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.YAMLError(f"key {key!r} is given twice, line {key_node.start_mark.line + 1}")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def describe(value: Any) -> str:
    """A value as a message shows it: short, whatever it is."""
    if value is None:
        return "empty"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 77 digits"
    text = _shortly.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_shortly = reprlib.Repr()  # nested aliases can make a small file's repr fill the memory
_shortly.maxlevel, _shortly.maxstring, _shortly.maxother = 2, 60, 60
