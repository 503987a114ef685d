"""The tables. `storage/migrations` holds the same schema as steps; a test compares the two."""

from datetime import UTC, datetime

from flask import current_app
from sqlalchemy import BigInteger, DateTime, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

BigId = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only in a plain INTEGER


def identifier(length: int) -> String:
    """Text of WeChat's that tells users apart: MySQL's default collation takes `oA` and `oa` for the same."""
    return String(length).with_variant(mysql.VARCHAR(length, collation="utf8mb4_bin"), "mysql")


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC to the microsecond; time zones are added and taken away on the way."""

    impl = DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql")
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.replace(tzinfo=UTC)


def now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    pass


class User(Base):
    """Someone who has logged in, with the identity that he came with first; `Identity` holds all of them."""

    __tablename__ = "users"
    __table_args__ = (
        UniqueConstraint("app_id", "openid", name="uq_users_app_id_openid"),
        Index("uq_users_unionid", "unionid", unique=True),
        # No id is ever given out twice: a session that outlives its user must not become another's.
        {"sqlite_autoincrement": True, "mysql_charset": "utf8mb4"},
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    app_id: Mapped[str] = mapped_column(identifier(32))
    openid: Mapped[str] = mapped_column(identifier(64))
    unionid: Mapped[str | None] = mapped_column(identifier(64))
    nickname: Mapped[str | None] = mapped_column(String(64))
    avatar_url: Mapped[str | None] = mapped_column(String(512))
    phone_encrypted: Mapped[str | None] = mapped_column(String(255))
    role: Mapped[str] = mapped_column(String(16), default="user")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now, onupdate=now)

    @property
    def phone(self) -> str | None:
        """The phone number in full, or None; the column holds it encrypted for this row alone."""
        return _decrypt(self.phone_encrypted, self._phone_context)

    @phone.setter
    def phone(self, phone: str | None) -> None:
        self.phone_encrypted = _encrypt(phone, self._phone_context)

    @property
    def _phone_context(self) -> str:
        # By what names the row from the start: a new one has no id yet.
        return f"users.phone:{self.app_id}:{self.openid}"


class Identity(Base):
    """Whom one of our apps knows under an openid, which means something only together with the app id."""

    __tablename__ = "identities"
    __table_args__ = ({"mysql_charset": "utf8mb4"},)

    app_id: Mapped[str] = mapped_column(identifier(32), primary_key=True)
    openid: Mapped[str] = mapped_column(identifier(64), primary_key=True)
    user_id: Mapped[int] = mapped_column(BigId, ForeignKey("users.id", ondelete="CASCADE"), index=True)
    authorization_encrypted: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)

    @property
    def authorization(self) -> str | None:
        """What the user granted to a web app, as text, or None; the column holds it encrypted for this row alone."""
        return _decrypt(self.authorization_encrypted, self._authorization_context)

    @authorization.setter
    def authorization(self, authorization: str | None) -> None:
        self.authorization_encrypted = _encrypt(authorization, self._authorization_context)

    @property
    def _authorization_context(self) -> str:
        return f"identities.authorization:{self.app_id}:{self.openid}"


def _encrypt(text: str | None, context: str) -> str | None:
    return None if text is None else current_app.extensions["cipher"].encrypt(text, context)


def _decrypt(value: str | None, context: str) -> str | None:
    return None if value is None else current_app.extensions["cipher"].decrypt(value, context)
