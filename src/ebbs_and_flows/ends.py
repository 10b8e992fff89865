"""The ends of attempts that are to be written: together in one transaction, and one by one where that is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ebbs_and_flows.checkpoints import Checkpoint, Claim, Recorded, Rest, Verdict
from ebbs_and_flows.errors import UnknownExecutionError
from ebbs_and_flows.executions import TaskStatus
from ebbs_and_flows.lanes import Run
from ebbs_and_flows.logs import logger
from ebbs_and_flows.persistence.batches import CheckpointBatch
from ebbs_and_flows.persistence.databases import is_refusal
from ebbs_and_flows.rooms import Wanted
from ebbs_and_flows.service import FlowService
from ebbs_and_flows.stepper import refused
from ebbs_and_flows.verdicts import STOPPED, checkpoint_of, start_over
from ebbs_and_flows.writers import Writer

WRITE_BATCH = 1000
"""How many ends are written in one transaction at most."""

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.02, 1.0
"""The wait before what somebody had locked is written again: it doubles from the first to the longest."""


class End(NamedTuple):
    """One attempt whose end is known, and not in the database yet."""

    run: Run
    verdict: Verdict


@dataclass
class Turn:
    """What a worker writes in one transaction, and what came of it."""

    ends: dict[int, End]
    batch: CheckpointBatch
    wanted: Wanted | None = None
    """What to claim with it."""
    recorded: dict[int, Recorded | None] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    error: Exception | None = None

    @property
    def resting(self) -> int:
        """How many executions are to come to rest with it."""
        return sum(1 for each in self.batch.checkpoints if isinstance(each.then, Rest))


class Ends:
    """Keeps ends until they are in the database, and writes all that have arrived in one transaction.

    What somebody else has locked just now stays for later, so that it holds up nobody. What the database will never
    store is recorded as that attempt's own failure.

    Args:
        service, writer: where they are recorded.
        lease_seconds: for how long a checkpoint renews the lease.
        goes_on: whether the next task follows when one has succeeded.
    """

    def __init__(
        self, service: FlowService, writer: Writer, *, lease_seconds: float, goes_on: Callable[[], bool]
    ) -> None:
        self._service = service
        self._writer = writer
        self._lease_seconds = lease_seconds
        self._goes_on = goes_on
        self._waiting: list[End] = []
        self._left: list[End] = []
        """What somebody had locked: it is behind all that nobody has tried yet, and has its own time."""
        self._wait_seconds = FIRST_WAIT_SECONDS
        self._again_at = 0.0

    def __bool__(self) -> bool:
        return bool(self._waiting or self._left)

    @property
    def new(self) -> int:
        """How many are to be written as soon as can be."""
        return len(self._waiting)

    def due_at(self, now: float) -> float:
        """When the next one is to be written, if there is any."""
        # What has just arrived is written as it arrives; this is for what one turn has no room for.
        return now + FIRST_WAIT_SECONDS if self._waiting else max(now, self._again_at)

    def add(self, run: Run, verdict: Verdict) -> None:
        """An attempt has ended."""
        self._waiting.append(End(run, verdict))

    def forget(self, run: Run) -> None:
        """Its end is of no interest any more: it would be refused."""
        self._waiting = [each for each in self._waiting if each.run is not run]
        self._left = [each for each in self._left if each.run is not run]

    def next_turn(self, most: int) -> Turn:
        """Take out what is to be written now, at most so many ends. In the thread of the worker's loop."""
        most = min(most, WRITE_BATCH)
        taken, self._waiting = self._waiting[:most], self._waiting[most:]
        if self._left and time.monotonic() >= self._again_at:
            room = most - len(taken)
            taken += self._left[:room]
            self._left = self._left[room:]
        ends = {each.run.execution_id: each for each in taken}
        # In the order of their ids: of two that lock several, neither can wait for the other.
        goes_on = self._goes_on()
        batch = self._service.batch_of([self._checkpoint(ends[each], goes_on) for each in sorted(ends)])
        return Turn(ends, batch)

    def put_back(self, turn: Turn) -> None:
        """Let what was taken out for a turn wait on, as what nobody has tried to write."""
        self._waiting = [*turn.ends.values(), *self._waiting]

    def write(self, turn: Turn) -> None:
        """Write a turn, in one transaction. Commits. In any thread; what comes of it, also an error, stands in the turn
        afterwards.
        """
        try:
            turn.recorded, turn.claims = self._write_together(turn)
            if None in turn.recorded.values():
                self._make_sure_of_refusals(turn)
        except Exception as error:
            turn.error = error

    def take_back(self, turn: Turn) -> list[tuple[End, Recorded | None]]:
        """Each end of a turn that was written, with what came of it; `None` where it was refused, because the execution
        is no longer held. In the thread of the worker's loop.

        Raises:
            Exception: the turn's error, as a rule SQLAlchemy's; all of its ends still wait.
        """
        if turn.error is not None:
            # Some of it may be committed: all of it waits on, and what is refused the next time is read back.
            for end in turn.ends.values():
                end.run.was_tried = True
            self._waiting = [*turn.ends.values(), *self._waiting]
            raise turn.error
        if turn.ends:
            left = [end for execution_id, end in turn.ends.items() if execution_id not in turn.recorded]
            self._left += left
            if left:
                self._again_at = time.monotonic() + self._wait_seconds
                self._wait_seconds = min(2 * self._wait_seconds, LONGEST_WAIT_SECONDS)
            elif not self._left:
                self._wait_seconds = FIRST_WAIT_SECONDS
        return [(turn.ends[execution_id], each) for execution_id, each in turn.recorded.items()]

    def _checkpoint(self, end: End, goes_on: bool) -> Checkpoint:
        run = end.run
        if run.starts_over is not None and goes_on:
            return start_over(run.claim, run.starts_over, self._lease_seconds)
        verdict = end.verdict if run.starts_over is None else STOPPED
        return checkpoint_of(run.claim, run.template, verdict, self._lease_seconds, goes_on=goes_on)

    def _write_together(self, turn: Turn) -> tuple[dict[int, Recorded | None], list[Claim]]:
        try:
            return self._writer.write(turn.batch, turn.wanted)
        except DBAPIError as error:
            if not (turn.ends and is_refusal(error)):
                raise
        except SQLAlchemyError:
            raise
        except Exception:  # of one of them, whatever it is; the others are to be written
            if not turn.ends:
                raise
            logger.exception("checkpoints could not be written together")
        recorded = self._write_singly(turn)
        return recorded, self._writer.write([], turn.wanted)[1]

    def _write_singly(self, turn: Turn) -> dict[int, Recorded | None]:
        recorded: dict[int, Recorded | None] = {}
        for checkpoint in turn.batch.checkpoints:
            execution_id = checkpoint.execution_id
            end = turn.ends[execution_id]
            try:
                recorded.update(self._writer.write([checkpoint])[0])
            except DBAPIError as error:
                if not is_refusal(error):
                    raise
                if end.verdict.succeeded:
                    end = turn.ends[execution_id] = End(end.run, refused(end.run.claim, end.run.task, error))
                    recorded.update(self._writer.write([self._checkpoint(end, self._goes_on())])[0])
                else:
                    logger.exception("execution %s: its end cannot be recorded", execution_id)
                    recorded[execution_id] = None
            except SQLAlchemyError:
                raise
            except Exception:
                logger.exception("execution %s: its end cannot be recorded", execution_id)
                recorded[execution_id] = None
        return recorded

    def _make_sure_of_refusals(self, turn: Turn) -> None:
        """Read back what was refused, where that may be because an earlier try was committed without an answer."""
        for checkpoint in turn.batch.checkpoints:
            execution_id = checkpoint.execution_id
            end = turn.ends[execution_id]
            if not end.run.was_tried or turn.recorded.get(execution_id, checkpoint) is not None:
                continue
            written = checkpoint
            if end.verdict.succeeded is not (checkpoint.end.status is TaskStatus.SUCCEEDED):
                written = self._checkpoint(end, self._goes_on())  # what it returned was refused meanwhile
            with suppress(UnknownExecutionError):
                turn.recorded[execution_id] = self._service.outcome_of(written)
