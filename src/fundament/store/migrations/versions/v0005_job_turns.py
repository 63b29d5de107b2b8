"""How jobs ended, the bytes of their results, when they are due; how often a chunk was tried.

A chunk's place among its job's is its first line: what is divided further keeps its order.
"""

import sqlalchemy as sa
from alembic import op

revision = "v0005_job_turns"
down_revision = "v0004_job_inputs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this version."""
    op.add_column("jobs", sa.Column("outcome", sa.String(12), nullable=True))
    op.execute("UPDATE jobs SET outcome = state WHERE state IN ('completed', 'failed', 'cancelled')")
    op.add_column("jobs", sa.Column("not_before", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("n_written_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE jobs SET n_written_bytes = (SELECT coalesce(sum(n_output_bytes + n_error_bytes), 0) FROM job_chunks "
        "WHERE job_chunks.job_id = jobs.id)"
    )
    op.add_column("job_chunks", sa.Column("n_tries", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("job_chunks", sa.Column("n_admitted", sa.BigInteger(), nullable=False, server_default="0"))
    op.drop_index(op.f("ix_job_chunks_job_id_number"), "job_chunks")
    op.drop_column("job_chunks", "number")
    op.create_index(op.f("ix_job_chunks_job_id_first_line"), "job_chunks", ["job_id", "first_line"], unique=True)


def downgrade() -> None:
    """Back to the version before."""
    op.drop_index(op.f("ix_job_chunks_job_id_first_line"), "job_chunks")
    op.add_column("job_chunks", sa.Column("number", sa.Integer(), nullable=False, server_default="0"))
    op.execute("UPDATE job_chunks SET number = first_line")
    op.create_index(op.f("ix_job_chunks_job_id_number"), "job_chunks", ["job_id", "number"], unique=True)
    op.drop_column("job_chunks", "n_admitted")
    op.drop_column("job_chunks", "n_tries")
    op.drop_column("jobs", "n_written_bytes")
    op.drop_column("jobs", "not_before")
    op.drop_column("jobs", "outcome")
