"""the schema of the first release; a database of an earlier revision is first upgraded with the code of that time"""

from functools import partial

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0006"
down_revision = None


def _identifier(length: int) -> sa.String:
    return sa.String(length).with_variant(mysql.VARCHAR(length, collation="utf8mb4_bin"), "mysql")


def upgrade() -> None:
    create = partial(op.create_table, sqlite_autoincrement=True, mysql_charset="utf8mb4")
    big_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    moment = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql")
    personal = {"phone": 255, "real_name": 512, "id_card": 255, "email": 512, "bank_card": 255}
    create(
        "users",
        sa.Column("id", big_id, primary_key=True),
        sa.Column("app_id", _identifier(32), nullable=False),
        sa.Column("openid", _identifier(64), nullable=False),
        sa.Column("unionid", _identifier(64)),
        sa.Column("nickname", sa.String(64)),
        sa.Column("avatar_url", sa.String(512)),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("admin_by_setting", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("blocked", sa.Boolean(), nullable=False, server_default=sa.false()),
        *(sa.Column(f"{name}_encrypted", sa.String(length)) for name, length in personal.items()),
        *(sa.Column(f"{name}_index", sa.String(80), index=True) for name in personal),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
        sa.UniqueConstraint("app_id", "openid", name="uq_users_app_id_openid"),
    )
    op.create_index("uq_users_unionid", "users", ["unionid"], unique=True)
    create(
        "identities",
        sa.Column("app_id", _identifier(32), primary_key=True),
        sa.Column("openid", _identifier(64), primary_key=True),
        sa.Column("user_id", big_id, sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
        sa.Column("authorization_encrypted", sa.Text()),
        sa.Column("created_at", moment, nullable=False),
    )
    create(
        "blocked_identities",
        sa.Column("fingerprint", sa.String(80), primary_key=True),
        sa.Column("former_user_id", big_id, nullable=False, index=True),
        sa.Column("created_at", moment, nullable=False),
    )
    create(
        "orders",
        sa.Column("id", big_id, primary_key=True),
        sa.Column("user_id", big_id, sa.ForeignKey("users.id", ondelete="SET NULL"), index=True),
        sa.Column("status", sa.String(16), nullable=False, index=True),
        sa.Column("remark", sa.String(500)),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
    )
    op.create_index("ix_orders_user_id_status", "orders", ["user_id", "status"])
    create(
        "order_items",
        sa.Column("id", big_id, primary_key=True),
        sa.Column("order_id", big_id, sa.ForeignKey("orders.id", ondelete="CASCADE"), nullable=False, index=True),
        sa.Column("sku", sa.String(64), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.Column("unit_price", sa.BigInteger(), nullable=False),
    )
    create(
        "idempotency_keys",
        sa.Column("user_id", big_id, sa.ForeignKey("users.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("key", _identifier(255), primary_key=True),
        sa.Column("about_user_id", big_id, sa.ForeignKey("users.id", ondelete="CASCADE"), index=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("status", sa.Integer()),
        sa.Column("headers", sa.Text()),
        sa.Column("body", sa.LargeBinary().with_variant(mysql.MEDIUMBLOB, "mysql")),
        sa.Column("created_at", moment, nullable=False),
    )


def downgrade() -> None:
    for table in ("idempotency_keys", "order_items", "orders", "blocked_identities", "identities", "users"):
        op.drop_table(table)
