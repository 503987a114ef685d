"""Pages of a list."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import InstrumentedAttribute

from storage import database


def page_of(
    model: Any,
    conditions: Sequence[ColumnElement[bool]],
    *,
    page: int,
    page_size: int,
    after: int | None,
    sort: str,
    count_limit: int | None = None,
) -> dict[str, Any]:
    """Read a page of the rows that meet the conditions, in the order of their ids, which is that of their creation.

    The ids are found in an index alone, and only the rows of the page are read. A page number skips what stands before
    it in that index; `after` goes straight to the place, so that the last page costs what the first does.

    :param model: has an `id`; an index must begin with the columns of the conditions.
    :param page: from 1.
    :param after: the id of the last item of the page before; if there is one, `page` is only repeated in the answer.
    :param sort: `created_at`, or `-created_at` for the newest first.
    :param count_limit: how far to count; the total says no more than this. None counts all that meet the conditions.
    :returns: `items`, `page`, `page_size` and `total`.
    """
    key: InstrumentedAttribute[int] = model.id
    descending = sort.startswith("-")
    order = key.desc() if descending else key.asc()
    ids = select(key).where(*conditions).order_by(order).limit(page_size)
    if after is None:
        ids = ids.offset((page - 1) * page_size)
    else:
        ids = ids.where(key < after) if descending else ids.where(key > after)
    found = database.session.scalars(ids).all()
    items = database.session.scalars(select(model).where(key.in_(found)).order_by(order)).all()
    counting = select(func.count(key)).where(*conditions)
    if count_limit is not None:
        counting = select(func.count()).select_from(select(key).where(*conditions).limit(count_limit).subquery())
    total = database.session.scalar(counting)
    return {"items": items, "page": page, "page_size": page_size, "total": total}
