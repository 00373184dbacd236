"""Between TOML and frozen dataclasses: every key is known, every value is of its field's type, or it is an error."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ldm.errors import RequestError, printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_DEPTH, MAX_BITS = 8, 128  # of tables and lists in each other; of an integer, which a float and a message can hold
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # half characters are bytes of the command line that are not UTF-8


def read_toml(path: Path) -> dict[str, Any]:
    """Raises RequestError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RequestError(f"{path}: no such config") from error
    except ValueError as error:  # also what is not UTF-8, and numbers of more digits than Python reads
        raise RequestError(f"{path}: not TOML ({error})") from error
    except RecursionError as error:
        raise RequestError(f"{path}: it is nested too deeply") from error


def set_key(table: dict[str, Any], change: str) -> None:
    """Set what "a.b=value" says; the value is TOML, or else a bare string, and nothing takes the key away."""
    key, equals, text = change.partition("=")
    if not equals:
        raise RequestError(f"--set {change!r:.100}: use key=value, such as loop.steps=100")
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        values = {"value": text.strip()}
    if len(values) > 1:
        raise RequestError(f"--set {change!r:.100}: use one key=value, and another --set for another")
    *sections, name = key.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RequestError(f"--set {change!r:.100}: {printable(section)} is no section")
    if text.strip():
        table[name] = values["value"]
    else:
        table.pop(name, None)


def _check_room(value: Any, where: str, depth: int = 0) -> None:
    """Raises RequestError for what is nested deeper, or an integer of more bits, than any setting."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if depth > MAX_DEPTH:
        raise RequestError(f"{where} is nested too deeply")
    if type(value) is int and value.bit_length() > MAX_BITS:
        raise RequestError(f"{where} is a number of {value.bit_length()} bits: use at most {MAX_BITS}")
    for name, each in inner:
        _check_room(each, f"{where}: {printable(str(name))}", depth + 1)


def build(kind: Any, table: dict[str, Any], where: str) -> Any:
    """A dataclass from a TOML table, none of whose keys is unknown. A field whose metadata say that it is `needed` has
    to be there if anything is. Raises RequestError.
    """
    _check_room(table, where)
    types_of = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}
    if unknown := [name for name in table if name not in known]:
        raise RequestError(f"{where}: unknown key {unknown[0]!r:.100}; known are {', '.join(known)}")
    required = {f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING}
    if table:  # which is of no use without these
        required |= {f.name for f in known.values() if f.metadata.get("needed")}
    if absent := [name for name in known if name in required and name not in table]:
        raise RequestError(f"{where}: {absent[0]} is missing")
    values = {name: _value(types_of[name], value, f"{where}: {name}") for name, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise RequestError(f"{where}: {error}") from error


def _value(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise RequestError(f"{where} is {value!r:.50}: use a section")
        return build(kind, value, where)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_value(get_args(kind)[0], each, where) for each in value)
    if get_origin(kind) is tuple:
        raise RequestError(f"{where} is {value!r:.50}: use a list, in [ ]")
    alternatives = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if float in alternatives and type(value) is int:
        return float(value)
    if type(value) not in alternatives:
        names = [getattr(each, "__name__", str(each)) for each in alternatives if each is not type(None)]
        raise RequestError(f"{where} is {value!r:.50}: use {' or '.join(names)}")
    if isinstance(value, str) and NOT_TEXT.search(value):
        raise RequestError(f"{where} is {value!r:.50}: use UTF-8, without NUL characters")
    return value


def to_table(config: Any) -> dict[str, Any]:
    """A dataclass as TOML has it: without what is None."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {
        name: to_table(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value is not None
    }
