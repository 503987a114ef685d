"""users"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _identifier(length: int) -> sa.String:
    return sa.String(length).with_variant(mysql.VARCHAR(length, collation="utf8mb4_bin"), "mysql")


def upgrade() -> None:
    moment = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql")
    op.create_table(
        "users",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("app_id", _identifier(32), nullable=False),
        sa.Column("openid", _identifier(64), nullable=False),
        sa.Column("unionid", _identifier(64)),
        sa.Column("nickname", sa.String(64)),
        sa.Column("avatar_url", sa.String(512)),
        sa.Column("phone_encrypted", sa.String(255)),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
        sa.UniqueConstraint("app_id", "openid", name="uq_users_app_id_openid"),
        sqlite_autoincrement=True,
        mysql_charset="utf8mb4",
    )


def downgrade() -> None:
    op.drop_table("users")
