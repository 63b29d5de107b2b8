"""How far each process' ledger is written, so that what it writes again is not counted twice."""

import sqlalchemy as sa
from alembic import op

revision = "v0006_ledgers"
down_revision = "v0005_job_turns"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this version."""
    op.create_table(
        "ledgers",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("n_written", sa.BigInteger(), nullable=False),
        sa.Column("written_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ledgers")),
    )


def downgrade() -> None:
    """Back to the version before."""
    op.drop_table("ledgers")
