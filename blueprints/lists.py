"""Pages of a list: the query, the schema of a page, and the SQL."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from operator import attrgetter
from typing import Any

from marshmallow import Schema, ValidationError, fields, validate, validates_schema
from sqlalchemy import Select, bindparam, func, select

from blueprints.parsing import MAXIMUM_ID
from concurrency import room
from storage import snapshots

MAXIMUM_SKIP = 100_000
SKIPPED_AT_ONCE = 10_000
"""A page takes a part of `concurrency.room` for each time that it skips so many rows."""
COUNT_LIMIT = 10_000
"""The largest total: where counting stops."""


class ListSchema(Schema):
    """Which page of a list; subclasses add filters."""

    page = fields.Integer(load_default=1, validate=validate.Range(1, 1_000_000))
    page_size = fields.Integer(load_default=20, validate=validate.Range(1, 100))
    after = fields.Integer(
        load_default=None,
        validate=validate.Range(1, MAXIMUM_ID),
        metadata={"description": "The previous page's last id: a deep page then costs as little as the first."},
    )
    sort = fields.String(
        load_default="-created_at",
        validate=validate.OneOf(["created_at", "-created_at"]),
        metadata={"description": "Newest first by default; without the minus, oldest first."},
    )

    @validates_schema(pass_original=True)
    def _one_place(self, query: dict[str, Any], given: Mapping[str, Any], **kwargs: Any) -> None:
        if query.get("after") is not None and "page" in given:
            raise ValidationError({name: ["Send page or after, not both."] for name in ("page", "after")})
        if query["page"] * query["page_size"] > MAXIMUM_SKIP:
            raise ValidationError(f"At most {MAXIMUM_SKIP:,} items can be skipped: use after.", "page")


@cache
def page_schema(item: type[Schema]) -> type[Schema]:
    """Describe a page of a list of such items."""
    items = fields.List(fields.Nested(item), required=True)
    numbers = {name: fields.Integer(required=True) for name in ("page", "page_size", "total")}
    return Schema.from_dict({"items": items, **numbers}, name=f"{item.__name__.removesuffix('Schema')}PageSchema")


@cache
def _statements(
    model: Any, filters: tuple[tuple[str, bool], ...], descending: bool, is_after: bool
) -> tuple[Select[Any], Select[Any]]:
    """Make the SELECTs of a page and of its total once: that takes longer than to run them."""
    key = model.id
    found = select(key)
    for name, several in filters:
        column = getattr(model, name)
        found = found.where(column.in_(bindparam(name, expanding=True)) if several else column == bindparam(name))
    counted = found.limit(bindparam("count_limit")).subquery()
    ids = found.order_by(key.desc() if descending else key.asc()).limit(bindparam("limit")).offset(bindparam("offset"))
    if is_after:
        ids = ids.where(key < bindparam("after") if descending else key > bindparam("after"))
    page = ids.subquery()
    # Outer, so that the rows are looked up by the ids, and not the other way round, as MariaDB does with small tables.
    items = select(model.__table__).select_from(page.outerjoin(model.__table__, key == page.c.id))
    return items, select(func.count()).select_from(counted)


def load_page(
    model: Any, filters: Mapping[str, Any], *, page: int, page_size: int, after: int | None, sort: str
) -> dict[str, Any]:
    """Load a page of the rows that the filters find, in the order of their ids, which is that of their creation.

    The ids are found in an index alone, and only the rows of the page are read. A page number skips rows in that index;
    `after` goes straight to the place. The count ends at COUNT_LIMIT, so it costs little, whatever there is.

    :param model: has an `id`; an index must begin with the columns of the filters.
    :param filters: the value of each column, or a list of values.
    :param page: from 1.
    :param after: the id of an item; pages are those of the items that follow it.
    :param sort: `created_at`, or `-created_at` for the newest first.
    :returns: `items`, `page`, `page_size` and `total`, which is at most COUNT_LIMIT.
    :raises ApiError: UNAVAILABLE if too many deep pages are read at once.
    """
    descending = sort.startswith("-")
    names = tuple((name, isinstance(value, list)) for name, value in filters.items())
    of_page, of_total = _statements(model, names, descending, after is not None)
    skipped = (page - 1) * page_size
    values = {**filters, "limit": page_size, "offset": skipped, "after": after, "count_limit": COUNT_LIMIT}
    weight = skipped // SKIPPED_AT_ONCE
    with room(weight) if weight else nullcontext():
        items = snapshots.load(model, snapshots.rows(of_page, **values))
    items.sort(key=attrgetter("id"), reverse=descending)
    ((total,),) = snapshots.rows(of_total, **values)
    return {"items": items, "page": page, "page_size": page_size, "total": total}
