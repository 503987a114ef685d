"""an index by which the expired Idempotency-Keys of a user are found"""

from alembic import op

revision = "0007"
down_revision = "0006"

INDEX = "ix_idempotency_keys_user_id_created_at"


def upgrade() -> None:
    op.create_index(INDEX, "idempotency_keys", ["user_id", "created_at"])


def downgrade() -> None:
    op.drop_index(INDEX, "idempotency_keys")
