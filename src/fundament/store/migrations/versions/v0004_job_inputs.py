"""The file with a job's lines, where it is not the one that was handed in."""

import sqlalchemy as sa
from alembic import op

revision = "v0004_job_inputs"
down_revision = "v0003_jobs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this version."""
    op.add_column("jobs", sa.Column("input_name", sa.String(80), nullable=True))


def downgrade() -> None:
    """Back to the version before."""
    op.drop_column("jobs", "input_name")
