"""personal data: encrypted, and found by blind indexes"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NEW = {"real_name": 512, "id_card": 255, "email": 512, "bank_card": 255}
FIELDS = ["phone", *NEW]

# No batch: for that SQLite would copy the table, lose its AUTOINCREMENT and, with the old table, what refers to it.


def upgrade() -> None:
    for name, length in NEW.items():
        op.add_column("users", sa.Column(f"{name}_encrypted", sa.String(length)))
    # The keys are not known here: a phone number that is there already is found by `phone_index` once it is written
    # again, or after `flask keys rotate`.
    for name in FIELDS:
        op.add_column("users", sa.Column(f"{name}_index", sa.String(80)))
        op.create_index(f"ix_users_{name}_index", "users", [f"{name}_index"])


def downgrade() -> None:
    """Drop the columns, and with all but the phone number what is in them; SQLite can do it from 3.35 on."""
    for name in FIELDS:
        op.drop_index(f"ix_users_{name}_index", "users")
        op.drop_column("users", f"{name}_index")
    for name in NEW:
        op.drop_column("users", f"{name}_encrypted")
