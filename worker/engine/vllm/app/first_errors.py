"""Shell. A large request that does not fit is refused at the first wrong item of each of its lists.

pydantic keeps an error for every item that does not fit, and for every form that the item might
have had. 60,000 numbers as the `input` of a response are 3.7 million errors. To make them holds the
worker's loop, and each of its threads, for most of a minute. What is accepted is the same. A
request with few items is refused with all of vLLM's errors.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import SchemaValidator

FEW_ITEMS = 32
"""Of all lists and objects together. An item of a response may have 60 forms."""
_COLLECTIONS = frozenset(("dict", "frozenset", "list", "set", "tuple"))
_NO_SCHEMAS = frozenset(("config", "default", "expected", "metadata", "serialization"))


class FirstErrors:
    """Validates as `thorough` does, which has this schema. All other calls go to `thorough`."""

    def __init__(self, schema: Any, thorough: Any) -> None:
        self._thorough = thorough
        self._quick = SchemaValidator(ending_at_first(schema), None, _use_prebuilt=False)

    def validate_python(self, value: Any, **more: Any) -> Any:
        """Raises what `thorough` raises."""
        try:
            return self._quick.validate_python(value, **more)
        except ValidationError:
            if not has_few_items(value):
                raise
        return self._thorough.validate_python(value, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._thorough, name)


def has_few_items(value: Any) -> bool:
    """Whether lists and objects have at most FEW_ITEMS items, all together."""
    count, todo = 0, [value]
    while todo and count <= FEW_ITEMS:
        one = todo.pop()
        if isinstance(one, list | dict):
            count += len(one)
            todo += (one.values() if isinstance(one, dict) else one) if count <= FEW_ITEMS else ()
    return count <= FEW_ITEMS


def ending_at_first(schema: Any) -> Any:
    """A copy of pydantic's schema, whose collections end at the first wrong item."""
    if type(schema) in (list, tuple):
        return type(schema)(map(ending_at_first, schema))
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if not isinstance(kind, str):  # fields by name, of which one may be called `type`
        return {name: ending_at_first(of) for name, of in schema.items()}
    made = {k: v if k in _NO_SCHEMAS else ending_at_first(v) for k, v in schema.items()}
    return made | {"fail_fast": True} if kind in _COLLECTIONS else made


def install(app: Any) -> None:
    """Once vLLM has made its app. A second call does nothing."""
    for route in app.routes:
        for field in getattr(getattr(route, "dependant", None), "body_params", ()):
            adapter = field._type_adapter
            adapter.validator = _first(adapter.core_schema, adapter.validator)
            for kind in _models(field.field_info.annotation):  # vLLM makes some of these itself
                kind.__pydantic_validator__ = _first(
                    kind.__pydantic_core_schema__, kind.__pydantic_validator__
                )


def _first(schema: Any, validator: Any) -> FirstErrors:
    return validator if isinstance(validator, FirstErrors) else FirstErrors(schema, validator)


def _models(hint: Any) -> Iterator[Any]:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
    for part in typing.get_args(hint):
        yield from _models(part)
