"""Run by Alembic, on the connection that `fundament.store.migrate` passes."""

from alembic import context

from fundament.store.schema import whole_metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=whole_metadata(),
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
