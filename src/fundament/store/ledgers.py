"""The table `ledgers`: how many entries of each process' ledger are written.

A database may keep a transaction and its answer still be lost. Whoever then writes again must know what is there.
"""

from datetime import UTC, datetime, timedelta

from sqlalchemy import BigInteger, Column, String, Table, delete
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.store.schema import Instant, insert_or, metadata

_FORGET_AFTER = timedelta(days=7)  # a process that wrote nothing for as long has ended

ledgers = Table(
    "ledgers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("n_written", BigInteger, nullable=False),
    Column("written_at", Instant, nullable=False),
)


async def begin(connection: AsyncConnection, ledger_id: str, number: int) -> bool:
    """Note that this transaction writes an entry; False where an earlier one has.

    Args:
        connection: of the transaction that writes the entry.
        ledger_id: whose entry.
        number: the entry's; the first is 1.
    """
    now = datetime.now(UTC)
    if number == 1:
        await connection.execute(delete(ledgers).where(ledgers.c.written_at < now - _FORGET_AFTER))
    insert = insert_or(connection, ledgers)
    statement = insert.on_conflict_do_update(
        index_elements=[ledgers.c.id],
        set_={"n_written": insert.excluded.n_written, "written_at": insert.excluded.written_at},
        where=ledgers.c.n_written < insert.excluded.n_written,
    ).returning(ledgers.c.id)
    done = await connection.execute(statement, {"id": ledger_id, "n_written": number, "written_at": now})
    return done.first() is not None
