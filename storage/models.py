"""The tables. `storage/migrations` has the same schema in steps; a test compares the two."""

from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import ColumnElement, ForeignKey, Index, UniqueConstraint, false
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.associationproxy import AssociationProxy, association_proxy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import BigInteger, DateTime, Integer, LargeBinary, String, Text, TypeDecorator

from storage.cipher import cipher

BigId = BigInteger().with_variant(Integer, "sqlite")  # SQLite increments only a plain INTEGER


def identifier(length: int) -> String:
    """An id of WeChat's, compared by case: to MySQL's default collation `oA` and `oa` are equal."""
    return String(length).with_variant(mysql.VARCHAR(length, collation="utf8mb4_bin"), "mysql")


class UtcDateTime(TypeDecorator[datetime]):
    """A time in UTC with microseconds, aware in Python, naive in the database."""

    impl = DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql")
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.replace(tzinfo=UTC)


def now() -> datetime:
    return datetime.now(UTC)


def creation(context: Any) -> datetime:
    """The default of `updated_at`: the `created_at` of the same new row."""
    return cast(datetime, context.get_current_parameters()["created_at"])


class Base(DeclarativeBase):
    # No id is reused: a session that outlives its user must not become another user's.
    __table_args__: Any = {"sqlite_autoincrement": True, "mysql_charset": "utf8mb4"}  # noqa: RUF012


class Versioned:
    """A row with an id, its times, and a version that each change increments.

    Of two writers of one version, the second changes nothing: its flush raises sqlalchemy.orm.exc.StaleDataError.
    """

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    version: Mapped[int] = mapped_column(Integer, default=1)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=creation, onupdate=now)

    @property
    def etag(self) -> str:
        """Identify this version of this row among all rows of all tables."""
        return f"{self.__tablename__}-{self.id}-{self.version}"  # type: ignore[attr-defined]

    __mapper_args__: Any = {"version_id_col": version}  # noqa: RUF012  SQLAlchemy copies it


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
        values = [cipher.encrypt(text, self._context(row)), next(cipher.blind_indexes(text, self.place))]
        return dict(zip(self.columns, values, strict=False))

    def equals(self, text: str) -> ColumnElement[bool]:
        """Return the condition that a row has this text, under whichever of the keys; nothing is normalised."""
        return self.model.__table__.c[self.columns[1]].in_(list(cipher.blind_indexes(text, self.place)))

    def _context(self, row: Any) -> str:
        # Not the id, which a new row does not have yet.
        if None in (row.app_id, row.openid):
            raise ValueError("app_id and openid must be set first: the encryption is bound to them.")
        return f"{self.place}:{row.app_id}:{row.openid}"


def encrypted_fields(model: type[DeclarativeBase]) -> list[Encrypted]:
    return [field for field in vars(model).values() if isinstance(field, Encrypted)]


class User(Versioned, Base):
    """Someone who has logged in, with their first identity; `Identity` has all of them."""

    __tablename__ = "users"
    __table_args__ = (UniqueConstraint("app_id", "openid", name="uq_users_app_id_openid"), Base.__table_args__)

    app_id: Mapped[str] = mapped_column(identifier(32))
    openid: Mapped[str] = mapped_column(identifier(64))
    unionid: Mapped[str | None] = mapped_column(identifier(64))
    nickname: Mapped[str | None] = mapped_column(String(64))
    avatar_url: Mapped[str | None] = mapped_column(String(512))
    role: Mapped[str] = mapped_column(String(16), default="user")
    admin_by_setting: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Whether an administrator is one only for as long as ADMIN_OPENIDS says so."""
    blocked: Mapped[bool] = mapped_column(default=False, server_default=false())

    # 155 bytes encrypt to at most 255 characters, 347 to 512; a name of 64 characters can have 256 bytes.
    phone = Encrypted(String(255), searchable=True)
    real_name = Encrypted(String(512), searchable=True)
    id_card = Encrypted(String(255), searchable=True)
    email = Encrypted(String(512), searchable=True)
    bank_card = Encrypted(String(255), searchable=True)


Index("uq_users_unionid", User.unionid, unique=True)

PERSONAL_FIELDS = tuple(field.name for field in encrypted_fields(User))
"""The encrypted fields of `User`."""

PROFILE_FIELDS = ("nickname", "avatar_url", *PERSONAL_FIELDS)
"""The fields that users fill in about themselves."""


class Identity(Base):
    """The user whom one of our apps knows by an openid, which is unique only together with the app id."""

    __tablename__ = "identities"

    app_id: Mapped[str] = mapped_column(identifier(32), primary_key=True)
    openid: Mapped[str] = mapped_column(identifier(64), primary_key=True)
    user_id: Mapped[int] = mapped_column(BigId, ForeignKey("users.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)

    authorization = Encrypted(Text())
    """The web-app authorization of the user."""


class Order(Versioned, Base):
    """An order. It outlives its user, who is then None."""

    __tablename__ = "orders"
    # Each index serves the lists of one filter, in the order of the ids, which both databases store in every index.
    __table_args__ = (Index("ix_orders_user_id_status", "user_id", "status"), Base.__table_args__)

    user_id: Mapped[int | None] = mapped_column(BigId, ForeignKey("users.id", ondelete="SET NULL"), index=True)
    status: Mapped[str] = mapped_column(String(16), default="pending", index=True)
    remark: Mapped[str | None] = mapped_column(String(500))
    total: Mapped[int] = mapped_column(BigInteger)
    items: Mapped[list["OrderItem"]] = relationship(
        back_populates="order", order_by="OrderItem.id", cascade="all, delete-orphan", passive_deletes=True
    )

    def sum_up(self) -> None:
        """Recompute the total after the items have changed."""
        self.total = sum(item.subtotal for item in self.items)
        if self.id is not None:
            self.updated_at = now()  # also if the total is the same: items are part of the order and of its version


class OrderItem(Base):
    """An item of an order, whose version it shares."""

    __tablename__ = "order_items"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    order_id: Mapped[int] = mapped_column(BigId, ForeignKey("orders.id", ondelete="CASCADE"), index=True)
    sku: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(128))
    quantity: Mapped[int] = mapped_column(Integer)
    unit_price: Mapped[int] = mapped_column(BigInteger)
    order: Mapped[Order] = relationship(back_populates="items")

    user_id: AssociationProxy[int | None] = association_proxy("order", "user_id")
    version: AssociationProxy[int] = association_proxy("order", "version")
    etag: AssociationProxy[str] = association_proxy("order", "etag")

    @property
    def subtotal(self) -> int:
        return self.quantity * self.unit_price


class IdempotencyKey(Base):
    """The response to a request that a client may repeat."""

    __tablename__ = "idempotency_keys"
    # Expired ones are looked for in each POST that brings a key; a user may have tens of thousands.
    __table_args__ = (Index("ix_idempotency_keys_user_id_created_at", "user_id", "created_at"), Base.__table_args__)

    user_id: Mapped[int] = mapped_column(BigId, ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    about_user_id: Mapped[int | None] = mapped_column(BigId, ForeignKey("users.id", ondelete="CASCADE"), index=True)
    """Whom the response is about; it is deleted with that user."""
    key: Mapped[str] = mapped_column(identifier(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    status: Mapped[int | None] = mapped_column(Integer)
    headers: Mapped[str | None] = mapped_column(Text)
    body: Mapped[bytes | None] = mapped_column(LargeBinary().with_variant(mysql.MEDIUMBLOB, "mysql"))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class BlockedIdentity(Base):
    """By what WeChat knew a blocked user whose account was deleted, as a keyed hash."""

    __tablename__ = "blocked_identities"

    fingerprint: Mapped[str] = mapped_column(String(80), primary_key=True)
    former_user_id: Mapped[int] = mapped_column(BigId, index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
