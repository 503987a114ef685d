"""What belongs to a user, in one list: merging two users, deleting one, and exporting one's data loop over it.

A model with a `user_id` that is not in it fails a test.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import select, update
from sqlalchemy.orm import joinedload

from storage import database
from storage.models import IdempotencyKey, Identity, Order, User

DETACHED_AT_ONCE, EXPORTED_AT_ONCE = 1000, 10


class Owned(NamedTuple):
    """How the rows of a model with a `user_id` follow their user."""

    model: Any
    export: str
    """The name of its list in the export; empty for what only repeats what is there already."""
    personal: Sequence[str] | None = None
    """Without what columns a row outlives its user; None if it is deleted with the user."""


OWNED = (
    Owned(Identity, export="identities"),
    Owned(Order, export="orders", personal=["remark"]),
    Owned(IdempotencyKey, export=""),
)


def move_all(user: User, heir: User) -> None:
    """Move everything that belongs to a user to another one; of two rows with the same key, the other's stays."""
    for owned in OWNED:
        for key in owned.model.__table__.foreign_keys:
            if key.column is User.__table__.c.id:
                values = {key.parent.name: heir.id, **_next_version(owned)}
                moved = update(owned.model).where(key.parent == user.id).values(values)
                unless_taken = moved.prefix_with("OR IGNORE", dialect="sqlite").prefix_with("IGNORE", dialect="mysql")
                database.session.execute(unless_taken)


def erase_all(user: User) -> None:
    """Take the user, and what is personal, out of the rows that outlive the user, whose row is locked.

    Some at a time, as a statement has seconds, and a user may have ordered for years.
    """
    for owned in OWNED:
        if owned.personal is not None:
            rows = select(owned.model.id).where(owned.model.user_id == user.id).limit(DETACHED_AT_ONCE)
            without = dict.fromkeys([*owned.personal, "user_id"]) | _next_version(owned)
            while ids := database.session.scalars(rows).all():
                database.session.execute(update(owned.model).where(owned.model.id.in_(ids)).values(without))


def read_all(owned: Owned, user_id: int) -> Iterator[Sequence[Any]]:
    """Load the rows of a user in batches, each with what belongs to it; between two batches no connection is held."""
    table = owned.model.__table__
    rows = select(owned.model).where(owned.model.user_id == user_id).order_by(*table.primary_key)
    rows = following = rows.limit(EXPORTED_AT_ONCE).options(joinedload("*"))  # in one statement, as in `load_order`
    while True:
        with database.session:
            batch = database.session.scalars(following).unique().all()
        if not batch:
            return
        yield batch
        following = rows.where(database.follows(table, batch[-1]))


def _next_version(owned: Owned) -> dict[str, Any]:
    return {"version": owned.model.version + 1} if hasattr(owned.model, "version") else {}
