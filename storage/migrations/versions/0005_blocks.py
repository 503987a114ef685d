"""blocks: of users, and of the identities of users who were deleted"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("users", sa.Column("blocked", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "blocked_identities",
        sa.Column("fingerprint", sa.String(80), primary_key=True),
        sa.Column("former_user_id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False),
        sa.Column("created_at", sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql"), nullable=False),
        mysql_charset="utf8mb4",
    )
    op.create_index("ix_blocked_identities_former_user_id", "blocked_identities", ["former_user_id"])


def downgrade() -> None:
    op.drop_table("blocked_identities")
    op.drop_column("users", "blocked")
