"""What goes out: objects and mappings as their schemas show them, without marshmallow's own way from field to field."""

from collections.abc import Callable
from functools import partial
from typing import Any

from marshmallow import Schema, fields

PLAIN = (fields.Integer, fields.String, fields.Boolean)
"""Fields of what has the right type already, as typed columns and views return it."""

Convert = Callable[[Any], Any]


def dumper(schema: Schema) -> Convert:
    """Make the function that dumps an object, or a dict, as this schema declares it."""
    parts = [(name, _converter(name, field)) for name, field in schema.dump_fields.items()]

    def dump(source: Any) -> dict[str, Any]:
        get = source.__getitem__ if isinstance(source, dict) else partial(getattr, source)
        return {name: convert(get(name)) if convert else get(name) for name, convert in parts}

    return dump


def _converter(name: str, field: fields.Field[Any]) -> Convert | None:
    if type(field) in PLAIN:
        return None
    if isinstance(field, fields.Nested):
        return dumper(field.schema)
    if isinstance(field, fields.List) and (convert := _converter(name, field.inner)):
        return lambda values: [convert(value) for value in values]
    return partial(field._serialize, attr=name, obj=None)  # what a field's own class overrides
