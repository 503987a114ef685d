"""Pages of a list: the query, the schema of a page, and the SQL."""

from functools import cache
from typing import Any

from marshmallow import Schema, fields, validate
from sqlalchemy import ColumnElement, func, select

from blueprints.parsing import MAXIMUM_ID
from storage import database

COUNT_LIMIT = 10_000
"""The largest total: where counting stops."""


class ListSchema(Schema):
    """Which page of a list; subclasses add filters."""

    page = fields.Integer(load_default=1, validate=validate.Range(1, 1000))
    page_size = fields.Integer(load_default=20, validate=validate.Range(1, 100))
    after = fields.Integer(validate=validate.Range(1, MAXIMUM_ID), metadata={"example": 100})
    """上一页最后一项的 id，页码从其后算起；与第一页一样快 |
    The id of the last item on the previous page; `page` counts from there, each as fast as the first"""
    sort = fields.String(load_default="-created_at", validate=validate.OneOf(["created_at", "-created_at"]))
    """`-` 表示最新的在前 | `-` is for the newest first"""


@cache
def page_schema(item: type[Schema]) -> type[Schema]:
    """Describe a page of a list of such items."""
    items = fields.List(fields.Nested(item), required=True)
    examples = {"page": 1, "page_size": 20, "total": 1}
    numbers = {name: fields.Integer(required=True, metadata={"example": one}) for name, one in examples.items()}
    return Schema.from_dict({"items": items, **numbers}, name=f"{item.__name__.removesuffix('Schema')}PageSchema")


def load_page(
    model: Any, *conditions: ColumnElement[bool], page: int, page_size: int, sort: str, after: int | None = None
) -> dict[str, Any]:
    """Load a page of the rows that meet the conditions, in the order of their ids, which is that of their creation.

    The ids are found in an index alone, and only the rows of the page are read. A page number skips rows in that index;
    `after` goes straight to the place. The count ends at COUNT_LIMIT, so it costs little, whatever there is.

    :param model: has an `id`; an index must begin with the columns of the conditions.
    :param page: from 1.
    :param after: the id of an item; pages are those of the items that follow it.
    :param sort: `created_at`, or `-created_at` for the newest first.
    :returns: `items`, `page`, `page_size` and `total`, which is at most COUNT_LIMIT.
    """
    key, descending = model.id, sort.startswith("-")
    found = select(key).where(*conditions)
    ids = found.order_by(key.desc() if descending else key).limit(page_size).offset((page - 1) * page_size)
    if after is not None:
        ids = ids.where(key < after if descending else key > after)
    place = ids.subquery()
    # Outer, so that the rows are looked up by the ids, and not the other way round, as MariaDB does with small tables.
    rows = select(model.__table__).select_from(place.outerjoin(model.__table__, key == place.c.id))
    items = sorted(database.load(model, database.rows(rows)), key=lambda item: item.id, reverse=descending)
    ((total,),) = database.rows(select(func.count()).select_from(found.limit(COUNT_LIMIT).subquery()))
    return {"items": items, "page": page, "page_size": page_size, "total": total}
