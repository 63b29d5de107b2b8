"""Classifiers and what they learned from."""

import sqlalchemy as sa
from alembic import op

revision = "v0002_classifiers"
down_revision = "v0001_accounts"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this version."""
    op.create_table(
        "classifiers",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("owner", sa.String(12), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("task", sa.String(64), nullable=True),
        sa.Column("dim", sa.Integer(), nullable=False),
        sa.Column("access", sa.String(16), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("head", sa.LargeBinary(), nullable=False),
        sa.Column("n_examples", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_number", sa.BigInteger(), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("used_number", sa.BigInteger(), nullable=False),
        sa.Column("held_by", sa.String(36), nullable=True),
        sa.Column("held_until", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_classifiers")),
    )
    op.create_index(op.f("ix_classifiers_owner"), "classifiers", ["owner"])
    op.create_table(
        "classifier_examples",
        sa.Column("classifier_id", sa.String(36), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["classifier_id"],
            ["classifiers.id"],
            name=op.f("fk_classifier_examples_classifier_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("classifier_id", "number", name=op.f("pk_classifier_examples")),
    )


def downgrade() -> None:
    """Back to the version before."""
    op.drop_table("classifier_examples")
    op.drop_index(op.f("ix_classifiers_owner"), "classifiers")
    op.drop_table("classifiers")
