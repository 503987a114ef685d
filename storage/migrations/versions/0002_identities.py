"""identities: several openids of one user, told to be one by their unionid"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _identifier(length: int) -> sa.String:
    return sa.String(length).with_variant(mysql.VARCHAR(length, collation="utf8mb4_bin"), "mysql")


def upgrade() -> None:
    big_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    moment = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql")
    op.create_table(
        "identities",
        sa.Column("app_id", _identifier(32), primary_key=True),
        sa.Column("openid", _identifier(64), primary_key=True),
        sa.Column("user_id", big_id, sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False),
        sa.Column("authorization_encrypted", sa.Text()),
        sa.Column("created_at", moment, nullable=False),
        mysql_charset="utf8mb4",
    )
    op.create_index("ix_identities_user_id", "identities", ["user_id"])
    op.execute(
        "INSERT INTO identities (app_id, openid, user_id, created_at) SELECT app_id, openid, id, created_at FROM users"
    )
    # A unionid held twice stays with the older user; the other one is joined to him when he logs in next.
    users = sa.table("users", sa.column("id"), sa.column("unionid"))
    oldest = (
        sa.select(sa.func.min(users.c.id).label("id")).where(users.c.unionid.is_not(None)).group_by(users.c.unionid)
    )
    held = sa.select(oldest.subquery().c.id)  # a table within a table: MySQL does not read what it is updating
    op.execute(sa.update(users).where(users.c.unionid.is_not(None), users.c.id.not_in(held)).values(unionid=None))
    # An index, not a constraint: for that SQLite would copy the table, lose its AUTOINCREMENT and, with the old table,
    # what refers to it.
    op.create_index("uq_users_unionid", "users", ["unionid"], unique=True)


def downgrade() -> None:
    op.drop_index("uq_users_unionid", "users")
    op.drop_table("identities")
