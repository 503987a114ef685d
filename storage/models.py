"""The tables. `storage/migrations` holds the same schema as steps; a test compares the two."""

from datetime import UTC, datetime

from flask import current_app
from sqlalchemy import BigInteger, DateTime, Integer, String, UniqueConstraint
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
    """Someone who has logged in. An openid means something only together with its app id."""

    __tablename__ = "users"
    __table_args__ = (
        UniqueConstraint("app_id", "openid", name="uq_users_app_id_openid"),
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
        if self.phone_encrypted is None:
            return None
        phone: str = current_app.extensions["cipher"].decrypt(self.phone_encrypted, self._phone_context)
        return phone

    @phone.setter
    def phone(self, phone: str | None) -> None:
        cipher = current_app.extensions["cipher"]
        self.phone_encrypted = None if phone is None else cipher.encrypt(phone, self._phone_context)

    @property
    def _phone_context(self) -> str:
        # By what names the row from the start: a new one has no id yet.
        return f"users.phone:{self.app_id}:{self.openid}"
