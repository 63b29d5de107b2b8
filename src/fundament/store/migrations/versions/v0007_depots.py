"""In which depot each job's files lie, so that a worker with another one leaves it alone."""

import sqlalchemy as sa
from alembic import op

revision = "v0007_depots"
down_revision = "v0006_ledgers"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this version."""
    op.add_column("jobs", sa.Column("depot", sa.String(16), nullable=True))


def downgrade() -> None:
    """Back to the version before."""
    op.drop_column("jobs", "depot")
