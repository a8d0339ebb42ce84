"""YAML and command-line text into frozen dataclasses whose annotations are the schema; every mistake is collected.

YAML's own guesses are switched off: a plain scalar stays text (only null, true and false are read) until the declared
type says what it is. So `3e-4` is a number where a number is declared, and `no` or `0123` stays text where text is.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from peftrec.errors import ConfigError

T = TypeVar("T")
COMMAND_LINE = "command line"
_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}


@dataclass(frozen=True)
class Check:
    """What a value must be beyond its type, in the words of the error: metadata for `Annotated`."""

    expected: str
    holds: Callable[[Any], bool]


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 60, 60


def show(value: object) -> str:
    """`value` as one short line, in YAML's words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _SHORT.repr(value)


def _line(*parts: str) -> str:
    """The parts that are not empty, on one line even where a key holds line breaks."""
    return " ".join(": ".join(part for part in parts if part).splitlines())


def nearest(word: str, options: Sequence[str]) -> str | None:
    """The option that `word` was probably meant to be."""
    found = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return found[0] if found else None


def unknown_key(key: str, siblings: Sequence[str], everywhere: Sequence[str]) -> str:
    """What to say of a key that is none of its section's `siblings`; `everywhere` are all dotted keys."""
    elsewhere = [path for path in everywhere if path.rpartition(".")[2] == key]
    close = nearest(key, siblings)
    if elsewhere or close:
        return f"unknown key; did you mean {' or '.join(elsewhere) or close}?"
    return f"unknown key; expected one of {', '.join(siblings)}" if siblings else "unknown key"


def _is_section(hint: Any) -> TypeGuard[type]:
    return dataclasses.is_dataclass(hint)


@cache
def leaves(schema: type, path: str = "") -> dict[str, Any]:
    """Dotted key -> declared type, for every key below `schema` that is not itself a section."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(schema, include_extras=True).items():
        found |= leaves(hint, f"{path}{name}.") if _is_section(hint) else {path + name: hint}
    return found


class _Loader(yaml.SafeLoader):
    """Plain scalars stay text, tags are refused, a key given twice is an error."""

    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        "tag:yaml.org,2002:map": yaml.SafeLoader.construct_yaml_map,
        "tag:yaml.org,2002:seq": yaml.SafeLoader.construct_yaml_seq,
        "tag:yaml.org,2002:str": yaml.SafeLoader.construct_yaml_str,
        "tag:yaml.org,2002:null": lambda loader, node: None,
        "tag:yaml.org,2002:bool": lambda loader, node: loader.construct_scalar(node).lower() == "true",
        None: yaml.SafeLoader.construct_undefined,
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        seen: set[str] = set()
        for key in keys:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?i:true|false)$"), list("tTfF"))


def parse_yaml(text: str) -> Any:
    """The value of one YAML document.

    Raises:
        yaml.YAMLError: with a `problem_mark` where the place is known.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


class _Dumper(yaml.SafeDumper):
    """Text with line breaks stays on one line, in double quotes: other styles lose Unicode's rarer line breaks."""


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if len(f"{text}.".splitlines()) > 1 else None
    )


_Dumper.add_representer(str, _text_node)


def dump_yaml(value: object) -> str:
    """YAML text that `parse_yaml`, and any other reader of YAML, reads back."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf))


def read_yaml(path: str | Path, what: str = "a recipe") -> Any:
    """The value in a YAML file; `what` names in errors what it should hold.

    Raises:
        ConfigError: the file cannot be read, or is not YAML; with line and column where they are known.
    """
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected {what} in YAML; check the path") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected {what} in YAML") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8; expected {what} in YAML; save it as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else f"{path}"
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise ConfigError(
            f"{place}: {problem}; expected YAML with each key once; text that holds ':', '#' or '{{' needs quotes"
        ) from None


def _bare(hint: Any) -> Any:
    """`hint` without its checks."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return hint


def _shape(hint: Any) -> Any:
    """The Python type that values of `hint` have."""
    return get_origin(_bare(hint)) or _bare(hint)


def _members(hint: Any) -> dict[Any, Any]:
    """Python type -> declared type, for each alternative of `hint` but None."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {_shape(option): option for option in options if option is not NoneType}


def convert(value: Any, hint: Any) -> Any:
    """`value` as the declared type `hint`.

    Raises:
        ValueError: what was found and what was expected.
    """
    if hint is Any:
        try:
            return _plain_data(value)
        except RecursionError:
            raise ValueError("nested too deeply") from None
    members = _members(hint)
    if len(members) > 1 and type(value) not in members:
        raise ValueError(f"{show(value)}; expected {' or '.join(_WORDS[member] for member in members)}")
    shape = type(value) if type(value) in members else next(iter(members))
    hint = members[shape]
    if get_origin(hint) is Annotated:
        inner, *checks = get_args(hint)
        result = convert(value, inner)
        for check in checks:
            if not check.holds(result):
                raise ValueError(f"{show(value)}; expected {check.expected}")
        return result
    if shape is Literal:
        return _choice(value, get_args(hint))
    if shape is list and isinstance(value, (list, tuple)):
        return [convert(one, get_args(hint)[0]) for one in value]
    if shape is dict and isinstance(value, Mapping):
        key_hint, value_hint = get_args(hint)
        return {convert(key, key_hint): convert(one, value_hint) for key, one in value.items()}
    if shape is str and isinstance(value, str):
        return value
    if shape is bool and isinstance(value, bool):
        return value
    if shape in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(value, shape)
    quotes = "; put it in quotes" if shape is str and isinstance(value, (bool, int, float, dict)) else ""
    raise ValueError(f"{show(value)}; expected {_WORDS[shape]}{quotes}")


def _plain_data(value: Any) -> Any:
    """`value`, if it is what a file can hold: text, true or false, null, or lists and mappings of these.

    Numbers stay, or become, the text that they are in a file: whoever knows the type says what they are.
    """
    if isinstance(value, (list, tuple)):
        return [_plain_data(one) for one in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain_data(one) for key, one in value.items()}
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    raise ValueError(f"{show(value)}; expected text, a number, true, false, null, a list or a mapping")


def _choice(value: Any, choices: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in choices:
        return value
    close = nearest(value, choices) if isinstance(value, str) and len(choices) > 1 else None
    hint = f"; did you mean {close}?" if close else ""
    expected = choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    raise ValueError(f"{show(value)}; expected {expected}{hint}")


def _number(value: float | str, shape: type[int] | type[float]) -> float:
    """A finite number; whole numbers may be written 1e3 but not 1.5."""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (shape is int and number != int(number)):
        raise ValueError(f"{show(value)}; expected {_WORDS[shape]}")
    return shape(number)


class Reader:
    """Reads nested mappings into dataclasses. Mistakes are kept, with a default in their place, until all is read."""

    def __init__(self, schema: type, where: str, overridden: Sequence[str] = ()) -> None:
        self.where = where
        self.overridden = set(overridden)
        self.problems: list[str] = []
        self.given: set[str] = set()
        self.bad: set[str] = set()
        self.keys = leaves(schema)

    def problem(self, path: str, text: str) -> None:
        """Keep one mistake, found at the dotted key `path`."""
        self.bad.add(path)
        self.problems.append(_line(COMMAND_LINE if path in self.overridden else self.where, path, text))

    def section(self, schema: type[T], mapping: Any, path: str = "") -> T:
        """An instance of the dataclass `schema`; a key that is absent or null has its default."""
        hints = get_type_hints(schema, include_extras=True)
        if mapping is None:
            mapping = {}
        elif not isinstance(mapping, Mapping):
            self.problem(path, f"{show(mapping)}; expected a mapping with the keys {', '.join(hints)}")
            mapping = {}
        prefix = f"{path}." if path else ""
        for key in mapping:
            if key not in hints:
                self.problem(f"{prefix}{key}", unknown_key(str(key), list(hints), list(self.keys)))
        values: dict[str, Any] = {}
        for name, hint in hints.items():
            if _is_section(hint):
                values[name] = self.section(hint, mapping.get(name), prefix + name)
            elif mapping.get(name) is not None:
                self.given.add(prefix + name)
                try:
                    values[name] = convert(mapping[name], hint)
                except ValueError as error:
                    self.problem(prefix + name, str(error))
        for name in _required(schema) - values.keys():
            values[name] = None  # never seen outside: there is a problem, so the recipe is refused
            if prefix + name not in self.bad:
                self.problem(prefix + name, "missing; it has no default: add it")
        return schema(**values)


def _required(schema: Any) -> set[str]:
    """Fields of a dataclass that have no default."""
    missing = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(schema) if f.default is missing and f.default_factory is missing}


@dataclass(frozen=True)
class Overridden:
    """A mapping after the command line changed it, the dotted keys that it set, and what was wrong with it."""

    mapping: Any
    keys: tuple[str, ...]
    problems: tuple[str, ...]


def override(mapping: Any, schema: type, arguments: Sequence[str]) -> Overridden:
    """`mapping` with `--section.key value` and `--section.key=value` arguments put in; the last of two wins.

    Text goes in word for word where text is declared; lists and mappings are written as in YAML (`[q_proj, v_proj]`);
    null brings back the default. `mapping` itself is not changed.
    """
    keys = leaves(schema)
    changed: list[str] = []
    problems: list[str] = []
    for argument, text in _pairs(arguments):
        key = argument.removeprefix("--")
        try:
            if key == argument:
                raise ValueError("expected --section.key VALUE; put text that holds blanks in quotes")
            hint = _declared(key, keys)
            if text is None:
                raise ValueError(f"no value; expected --{key} VALUE")
            mapping = _put(mapping, key.split("."), _from_text(text, hint))
            changed.append(key if key in keys else key.rpartition(".")[0])
        except ValueError as error:
            problems.append(_line(COMMAND_LINE, key, str(error)))
    return Overridden(mapping, tuple(changed), tuple(problems))


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """`--key value` or `--key=value` as (argument, value); a value that starts with `--` needs the second."""
    waiting = deque(arguments)
    while waiting:
        argument, equals, text = waiting.popleft().partition("=")
        if equals:
            yield argument, text
        else:
            yield argument, waiting.popleft() if waiting and not waiting[0].startswith("--") else None


def _declared(key: str, keys: Mapping[str, Any]) -> Any:
    """The declared type of a dotted key, which may name one entry of a mapping (`data.columns.user_id`)."""
    if key in keys:
        return keys[key]
    section, _, name = key.rpartition(".")
    if dict in _members(keys.get(section)):
        return get_args(_bare(_members(keys[section])[dict]))[1]
    below = [path for path in keys if path.startswith(f"{key}.")]
    if below:
        raise ValueError(f"a section; expected one of its keys: {', '.join(below)}")
    siblings = [path.rpartition(".")[2] for path in keys if path.rpartition(".")[0] == section]
    raise ValueError(unknown_key(name, siblings, list(keys)))


def _put(mapping: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of nested mappings with `value` at `path`; copied along the path, for YAML aliases share their value."""
    if not path:
        return value
    if mapping is not None and not isinstance(mapping, Mapping):
        raise ValueError(f"the file has {show(mapping)} above it; expected a mapping there")
    return {**(mapping or {}), path[0]: _put((mapping or {}).get(path[0]), path[1:], value)}


def _from_text(text: str, hint: Any) -> Any:
    """What `text` on the command line means for the declared type `hint`."""
    members = _members(hint)
    if str in members and len(members) == 1:
        return None if text in ("null", "~") else text
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    return text if str in members and type(value) not in members and text not in ("null", "~") else value
