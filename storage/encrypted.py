"""Encrypted columns: a model attribute that is plain text in Python and encrypted in the database."""

from typing import Any

from sqlalchemy import ColumnElement, String
from sqlalchemy.orm import DeclarativeBase, mapped_column

from storage.cipher import cipher


class Encrypted:
    """A text or None of a model with `app_id` and `openid`, encrypted and bound to its row.

    Reading it raises `DecryptionError` if the value was made for another row or column, or with a key that is not among
    ENCRYPTION_KEYS. It needs an application context.

    It declares its columns: `<name>_encrypted` and, if it is searchable, `<name>_index`.

    :param column_type: of the encrypted text.
    :param searchable: whether there is a blind index, which finds rows.
    """

    def __init__(self, column_type: String, *, searchable: bool = False) -> None:
        self._column_type, self._searchable = column_type, searchable

    def __set_name__(self, model: type[DeclarativeBase], name: str) -> None:
        self.model = model
        self.name = name
        self.place = f"{model.__tablename__}.{name}"
        self.columns = [f"{name}_encrypted"]
        """The names of the columns that hold it, the encrypted one first."""
        setattr(model, self.columns[0], mapped_column(self._column_type))
        if self._searchable:
            self.columns.append(f"{name}_index")
            setattr(model, self.columns[1], mapped_column(String(80), index=True))

    def __get__(self, row: DeclarativeBase | None, model: type[DeclarativeBase]) -> Any:
        return self if row is None else self.open(row)

    def __set__(self, row: DeclarativeBase, text: str | None) -> None:
        for column, value in self.seal(row, text).items():
            setattr(row, column, value)

    def open(self, row: Any) -> str | None:
        """Decrypt it from a row of the table, or an object of the model.

        :raises DecryptionError: see above.
        """
        value = getattr(row, self.columns[0])
        return None if value is None else cipher.decrypt(value, self._context(row))

    def seal(self, row: Any, text: str | None) -> dict[str, str | None]:
        """Return the values of the columns of this row for a text, by their names."""
        if text is None:
            return dict.fromkeys(self.columns)
        values = [cipher.encrypt(text, self._context(row)), cipher.blind_index(text, self.place)]
        return dict(zip(self.columns, values, strict=False))

    def equals(self, text: str) -> ColumnElement[bool]:
        """Return the condition that a row has this text, under whichever of the keys; nothing is normalised."""
        return self.model.__table__.c[self.columns[1]].in_(cipher.blind_indexes(text, self.place))

    def _context(self, row: Any) -> str:
        # Not the id, which a new row does not have yet.
        if None in (row.app_id, row.openid):
            raise ValueError("app_id and openid must be set first: the encryption is bound to them.")
        return f"{self.place}:{row.app_id}:{row.openid}"


def encrypted_fields(model: type[DeclarativeBase]) -> list[Encrypted]:
    return [field for field in vars(model).values() if isinstance(field, Encrypted)]
