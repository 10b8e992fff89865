"""UnitOfWork: one transaction, rolled back on exit unless it was committed."""

from __future__ import annotations

from functools import cached_property
from types import TracebackType

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from ebbs_and_flows.errors import InvalidArgumentError
from ebbs_and_flows.persistence.batches import Batches
from ebbs_and_flows.persistence.contexts import Contexts
from ebbs_and_flows.persistence.databases import Database, check_untranslated
from ebbs_and_flows.persistence.isolation import connect
from ebbs_and_flows.persistence.repositories import Attempts, Executions, Transitions
from ebbs_and_flows.persistence.statements import Statements


class UnitOfWork:
    """A transaction with the repositories that read and write in it. Only `commit()` persists.

    Args:
        engine: where a connection is taken from, and given back on exit.
        database, statements: what to say to it.
        joined: a connection of the caller's instead; then beginning, committing and closing it is left to the caller.
        connection: one that its holder keeps, instead of one of the engine; in no transaction before and after.
        writes: whether it is going to write; a reader takes no lock that another one would wait for.
    """

    def __init__(
        self,
        engine: Engine,
        database: Database,
        statements: Statements,
        *,
        joined: Connection | None = None,
        connection: Connection | None = None,
        writes: bool = True,
    ) -> None:
        self._engine = engine
        self._database = database
        self._statements = statements
        self._joined = joined
        self._kept = connection
        self._writes = writes

    def __enter__(self) -> UnitOfWork:
        if self._joined is None:
            self.connection = connect(self._engine) if self._kept is None else self._as_the_engine_is(self._kept)
            try:
                if self._writes:
                    self._database.begin_write(self.connection)
            except BaseException:
                self._leave()
                raise
            self._transaction = self.connection.get_transaction()
        else:
            if self._joined.dialect.name != self._database.name:
                expected = f"one on this service's {self._database.name} database, not on {self._joined.dialect.name}"
                raise InvalidArgumentError("session", self._joined, expected)
            check_untranslated(self._joined, self._statements.tables.metadata.schema)
            self.connection = self._joined
        return self

    @cached_property
    def executions(self) -> Executions:
        """Reads and writes `ebbs_flow_executions`."""
        return Executions(self.connection, self._statements)

    @cached_property
    def attempts(self) -> Attempts:
        """Reads and writes `ebbs_task_executions`."""
        return Attempts(self.connection, self._statements)

    @cached_property
    def transitions(self) -> Transitions:
        """Reads and writes `ebbs_flow_transitions`."""
        return Transitions(self.connection, self._statements)

    @cached_property
    def contexts(self) -> Contexts:
        """Reads contexts."""
        return Contexts(self.connection, self._statements)

    @cached_property
    def batches(self) -> Batches:
        """Writes many rows at once."""
        return Batches(self.connection, self._statements.batches)

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._joined is None:
            self._leave()

    def _leave(self) -> None:
        """Roll back what was not committed."""
        if self._kept is None:
            self.connection.close()
        else:
            self.connection.rollback()

    def _as_the_engine_is(self, connection: Connection) -> Connection:
        options = self._engine.get_execution_options()
        if connection.get_execution_options().get("isolation_level") != options.get("isolation_level"):
            return connection.execution_options(isolation_level=options["isolation_level"])
        return connection

    def commit(self) -> None:
        """Make all that was written durable; nothing where the transaction is the caller's."""
        if self._joined is not None:
            return
        try:
            self.connection.commit()
        except BaseException:
            # SQLAlchemy takes a refused COMMIT for the end of the transaction. To SQLite it is not: the connection
            # would go back to the pool within it, with the write lock.
            if not (self.connection.closed or self.connection.invalidated):
                self.connection.connection.rollback()
            raise

    def is_intact(self) -> bool:
        """Whether its transaction is still the one it began, and can be committed."""
        return self._transaction is not None and self._transaction.is_active

    def is_lost(self) -> bool:
        """Whether the database has dropped the connection, and with it whatever was not committed."""
        return not self.connection.closed and self.connection.invalidated  # a closed one says invalidated, too

    def announce(self, channel: str) -> None:
        """Tell those who listen that something is due, once this transaction commits; nothing where nobody can."""
        self._database.announce(self.connection, channel)

    def try_lock(self, name: str) -> bool:
        """Take a lock of this name until the transaction ends; False where another transaction has it."""
        return self._database.try_lock(self.connection, name, self._statements.tables.executions)

    def session(self) -> Session:
        """A Session within this transaction, for a transactional task.

        Its own `commit` and `rollback` act on a savepoint, so neither can end the transaction that the checkpoint
        needs.
        """
        return Session(bind=self.connection, join_transaction_mode="create_savepoint")
