"""Pure. Reads one section of the configuration. Plain values go in. A frozen Struct and every
finding come out, each finding with the path of its key.

The section classes (shared/config/*) declare fields, types and rules. This module turns violations
into messages that a person can act on.
"""

from __future__ import annotations

import difflib
import functools
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, TypeAlias, TypeVar

import msgspec
from msgspec import Struct, inspect
from msgspec.structs import FieldInfo, force_setattr

from shared.errors import ConfigError

Path: TypeAlias = tuple[str | int, ...]
Where: TypeAlias = Callable[[Path], str]

_SHOWN_CHARS = 60  # characters of a wrong value or key that a message shows
# If no known key resembles an unknown one, and there are at most this many, the message lists them.
_NAMED_KEYS = 12


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong at `path`, and what to do. `other` is a second key that is involved.

    A warning names a key that has no effect. A stray is a key that nothing reads. It is an error,
    but the section's other values are usable, so the rules on them can be checked in the same run.
    """

    path: Path
    text: str
    severity: Literal["error", "stray", "warning"] = "error"
    other: Path | None = None


class Section(Struct, frozen=True, kw_only=True):
    """A mapping of the configuration file. It can also be constructed in Python. There it raises
    ConfigError for what the file reader would report.
    """

    IGNORED: ClassVar[Mapping[str, str]] = {}
    """Keys that are accepted but have no effect here -> why, and what happens instead."""
    REFUSED: ClassVar[Mapping[str, str]] = {}
    """Keys that are not fields and deserve a better message than "unknown key"."""
    SECRET: ClassVar[frozenset[str]] = frozenset()
    """Keys whose wrong values are not repeated in messages, because someone may have pasted a
    secret.
    """

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Normalises spellings before types are checked. It is idempotent, and it sees only known
        keys, whose values may have any type.
        """
        return given

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        """Rules between fields. `values` has the defaults filled in. A field that is already
        reported is absent.
        """
        yield from ()

    @classmethod
    def model_validate(cls, obj: object) -> Self:
        """Pydantic's name for it, as Ray's configurations have it. Raises ConfigError."""
        if isinstance(obj, cls):
            return obj
        if not isinstance(obj, Mapping):
            raise ConfigError(f"{cls.__name__}: expected a mapping of keys, got {shown(obj)}")
        return cls(**obj)

    def model_dump(
        self, *, mode: str = "python", exclude_none: bool = False, exclude_defaults: bool = False
    ) -> dict[str, Any]:
        """Plain values, from which the same section can be made again."""
        del mode  # all values are JSON's
        found: dict[str, Any] = {}
        for name, field in _fields(type(self)).items():
            value = getattr(self, name)
            if (exclude_none and value is None) or (
                exclude_defaults and not field.required and value == _default(field)
            ):
                continue
            found[name] = _plain(value, exclude_none, exclude_defaults)
        return found

    def model_dump_json(self, *, indent: int | None = None, exclude_none: bool = False) -> str:
        text = msgspec.json.encode(self.model_dump(exclude_none=exclude_none))
        return (text if indent is None else msgspec.json.format(text, indent=indent)).decode()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Another one with some values changed. It shares nothing with this one if `deep`.

        Raises ConfigError.
        """
        return type(self)(
            **{**(self.model_dump() if deep else _as_mapping(self)), **(update or {})}
        )

    def __post_init__(self) -> None:
        values, findings = read_fields(type(self), _as_mapping(self), ())
        name = type(self).__name__
        lines = error_lines(findings, lambda _: name)
        if lines:
            raise ConfigError("\n".join(lines))
        for key, value in values.items():
            force_setattr(self, key, value)


S = TypeVar("S", bound=Section)


def read_section(cls: type[S], raw: object, path: Path) -> tuple[S | None, list[Finding]]:
    """The section at `path` and its findings; None if its values cannot be used. An instance from
    the Python API passes through with its warnings.
    """
    if isinstance(raw, cls):
        return raw, read_fields(cls, _as_mapping(raw), path)[1]
    if not isinstance(raw, Mapping):
        return None, [Finding(path, f"expected a mapping of keys, got {shown(raw)}")]
    values, findings = read_fields(cls, raw, path)
    if has_errors(findings):
        return None, findings
    return cls(**values), findings


def read_fields(
    cls: type[Section], raw: Mapping[Any, Any], path: Path
) -> tuple[dict[str, Any], list[Finding]]:
    """The good values of a section's fields, with defaults filled in, and the findings on the
    others.

    None in the file means "not set", except for a field that takes None.
    """
    fields = _fields(cls)
    findings = [_unknown(cls, key, path) for key in raw if key not in fields]
    given = cls.prepare({key: value for key, value in raw.items() if key in fields})
    values: dict[str, Any] = {}
    for name, field in fields.items():
        here = (*path, name)
        if name not in given or (given[name] is None and not _takes_none(field)):
            if field.required:
                findings.append(Finding(here, "is missing; it is required"))
            else:
                values[name] = _default(field)
            continue
        value, found = _read_value(field, given[name], here, secret=name in cls.SECRET)
        findings += found
        if not has_errors(found):
            values[name] = value
        if name in cls.IGNORED and given[name] not in (None, {}, [], ()):
            findings.append(Finding(here, f"has no effect here: {cls.IGNORED[name]}", "warning"))
    findings += under(path, cls.check(values))
    return values, findings


def under(path: Path, findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings of a part, as findings of the whole."""
    for found in findings:
        yield replace(
            found,
            path=(*path, *found.path),
            other=None if found.other is None else (*path, *found.other),
        )


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether any finding makes the values unusable."""
    return any(found.severity == "error" for found in findings)


def error_lines(findings: Iterable[Finding], where: Where) -> list[str]:
    return [line(found, where) for found in findings if found.severity != "warning"]


def warning_lines(findings: Iterable[Finding], where: Where) -> list[str]:
    return [line(found, where) for found in findings if found.severity == "warning"]


def line(found: Finding, where: Where) -> str:
    """One finding as `file:line: key: what is wrong; what to do`."""
    see = "" if found.other is None else f" (see {dotted(found.other)}, {where(found.other)})"
    key = dotted(found.path)
    return (
        f"{where(found.path)}: {key}: {found.text}{see}"
        if key
        else f"{where(found.path)}: {found.text}{see}"
    )


def dotted(path: Path) -> str:
    """("llm_configs", 0, "lora_config") -> "llm_configs[0].lora_config"."""
    text = "".join(
        f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in path
    )
    return text.removeprefix(".")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` most likely misspells."""
    matches = difflib.get_close_matches(name[:_SHOWN_CHARS].lower(), sorted(known), n=1)
    return matches[0] if matches else None


def shown(value: object) -> str:
    """A value for a message: short, on one line, in YAML's words."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the text '{_printable(value)}'"
        case int() if value.bit_length() > 64:
            return "an enormous number"
        case int() | float():
            return f"{value}"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return f"a Python {type(value).__name__}"


def expected(kind: inspect.Type) -> str:
    """A type in words, for a message."""
    match kind:
        case inspect.UnionType(types=types):
            return " or ".join(
                expected(part) for part in types if not isinstance(part, inspect.NoneType)
            )
        case inspect.IntType():
            return "a whole number" + _bounds(kind)
        case inspect.FloatType():
            return "a number" + _bounds(kind)
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType():
            return "some text" if kind.min_length else "text"
        case inspect.LiteralType(values=values):
            return " or ".join(
                f"'{value}'" if isinstance(value, str) else str(value) for value in values
            )
        case inspect.ListType() | inspect.VarTupleType():
            return f"a list, each item {expected(kind.item_type)}"
        case inspect.DictType():
            return "a mapping of keys"
        case _:
            return "a value"


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    words = []
    if kind.ge is not None:
        words.append(f"at least {kind.ge:g}")
    if kind.gt is not None:
        words.append(f"more than {kind.gt:g}")
    if kind.le is not None:
        words.append(f"at most {kind.le:g}")
    return f" ({', '.join(words)})" if words else ""


def _read_value(
    field: FieldInfo, raw: object, path: Path, *, secret: bool
) -> tuple[Any, list[Finding]]:
    """The value of one field. If a finding is an error, the value means nothing."""
    section = _section_of(field)
    if section is not None and raw is not None:
        return read_section(section, raw, path)
    try:
        value = msgspec.convert(raw, field.type)
    except msgspec.ValidationError:
        got = "something else" if secret else shown(raw)
        return None, [
            Finding(path, f"expected {expected(_kind(field))}, got {got}{_spelling(raw, field)}")
        ]
    if isinstance(value, float) and not math.isfinite(value):
        return None, [Finding(path, f"expected {expected(_kind(field))}, got {value}")]
    return value, []


def _spelling(raw: object, field: FieldInfo) -> str:
    """What to write instead, if YAML's own rules caused the mistake."""
    words = expected(_kind(field))
    if isinstance(raw, str) and "number" in words:
        try:
            number = float(raw)
        except ValueError:
            return ""
        if math.isfinite(number) and abs(number) < 1e18:
            return (
                f"; write it without quotes or exponent: {number:.0f}"
                if number.is_integer()
                else "; write it without quotes"
            )
    if isinstance(raw, str) and "true or false" in words:
        return "; write true or false without quotes"
    if isinstance(raw, bool | int | float) and words.startswith(("text", "some text")):
        return "; put it in quotes"  # YAML reads no, on and 3.5 as something else
    return ""


def _unknown(cls: type[Section], key: object, path: Path) -> Finding:
    if not isinstance(key, str):
        return Finding(path, f"expected keys that are text, got {shown(key)}", "stray")
    here = (*path, key)
    if key in cls.REFUSED:
        return Finding(here, cls.REFUSED[key], "stray")
    known = _fields(cls)
    match = nearest(key, known)
    if match is not None:
        return Finding(here, f"unknown key; did you mean '{match}'?", "stray")
    names = f"; known keys: {', '.join(known)}" if len(known) <= _NAMED_KEYS else "; remove it"
    return Finding(here, f"unknown key{names}", "stray")


def _printable(text: str) -> str:
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_SHOWN_CHARS]
    )
    return escaped + ("..." if len(text) > _SHOWN_CHARS else "")


def _plain(value: Any, exclude_none: bool, exclude_defaults: bool) -> Any:
    """As JSON would give it back: it has neither tuples nor sections."""
    if isinstance(value, Section):
        return value.model_dump(exclude_none=exclude_none, exclude_defaults=exclude_defaults)
    if isinstance(value, Mapping):
        return {key: _plain(part, exclude_none, exclude_defaults) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, exclude_none, exclude_defaults) for part in value]
    return value


def _as_mapping(section: Section) -> dict[str, Any]:
    return {name: getattr(section, name) for name in section.__struct_fields__}


@functools.cache  # pure function of the class; msgspec resolves the annotations at each call
def _fields(cls: type[Section]) -> dict[str, FieldInfo]:
    return {field.name: field for field in msgspec.structs.fields(cls)}


def _kind(field: FieldInfo) -> inspect.Type:
    return inspect.type_info(field.type)


def _section_of(field: FieldInfo) -> type[Section] | None:
    for candidate in (field.type, *typing.get_args(field.type)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _takes_none(field: FieldInfo) -> bool:
    return field.type in (Any, None) or type(None) in typing.get_args(field.type)


def _default(field: FieldInfo) -> Any:
    return field.default_factory() if field.default is msgspec.NODEFAULT else field.default
