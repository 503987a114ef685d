"""admin by setting: who is an administrator only for as long as ADMIN_OPENIDS says so

Administrators from before stay: whether the setting or another administrator made them one is not known.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("users", sa.Column("admin_by_setting", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    op.drop_column("users", "admin_by_setting")
