"""The ends of attempts that are to be written: together in one transaction, and one by one where that is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ebbs_and_flows.checkpoints import Checkpoint, Claim, Recorded, Verdict
from ebbs_and_flows.errors import UnknownExecutionError
from ebbs_and_flows.lanes import Run
from ebbs_and_flows.logs import logger
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


@dataclass(frozen=True)
class End:
    """One attempt whose end is known, and not in the database yet."""

    run: Run
    verdict: Verdict


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
        self.wait_seconds = FIRST_WAIT_SECONDS
        """After how long what is left is to be written again."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, run: Run, verdict: Verdict) -> None:
        """An attempt has ended."""
        self._waiting.append(End(run, verdict))

    def forget(self, run: Run) -> None:
        """Its end is of no interest any more: it would be refused."""
        self._waiting = [each for each in self._waiting if each.run is not run]

    def write(self, wanted: Wanted | None = None) -> tuple[list[tuple[End, Recorded | None]], list[Claim]]:
        """Write what waits and claim what is wanted, in one transaction. Commits.

        Returns:
            Each end that was written, with what came of it, `None` where it was refused because the execution is no
            longer held; and the claims.

        Raises:
            SQLAlchemyError: the database does not answer as it should; all that was not returned still waits.
        """
        batch = {each.run.execution_id: each for each in self._waiting[:WRITE_BATCH]}
        # In the order of their ids: of two that lock several, neither can wait for the other.
        checkpoints = {execution_id: self._checkpoint(batch[execution_id]) for execution_id in sorted(batch)}
        try:
            recorded, claims = self._write_together(checkpoints, batch, wanted)
            sure = {each: self._sure_of(batch[each], checkpoints[each], recorded[each]) for each in recorded}
        except SQLAlchemyError:
            # Some of it may be committed: all of it waits on, and what is refused the next time is read back.
            for end in batch.values():
                end.run.was_tried = True
            raise
        if not batch:
            return [], claims
        self._waiting = [each for each in self._waiting if each.run.execution_id not in recorded]
        is_left = len(recorded) < len(batch)
        self.wait_seconds = min(2 * self.wait_seconds, LONGEST_WAIT_SECONDS) if is_left else FIRST_WAIT_SECONDS
        return [(batch[execution_id], each) for execution_id, each in sure.items()], claims

    def _checkpoint(self, end: End) -> Checkpoint:
        run, goes_on = end.run, self._goes_on()
        if run.starts_over is not None and goes_on:
            return start_over(run.claim, run.starts_over, self._lease_seconds)
        verdict = end.verdict if run.starts_over is None else STOPPED
        return checkpoint_of(run.claim, run.template, verdict, self._lease_seconds, goes_on=goes_on)

    def _write_together(
        self, checkpoints: dict[int, Checkpoint], batch: dict[int, End], wanted: Wanted | None
    ) -> tuple[dict[int, Recorded | None], list[Claim]]:
        try:
            return self._writer.write(list(checkpoints.values()), wanted)
        except DBAPIError as error:
            if not (checkpoints and is_refusal(error)):
                raise
        except SQLAlchemyError:
            raise
        except Exception:  # of one of them, whatever it is; the others are to be written
            if not checkpoints:
                raise
            logger.exception("checkpoints could not be written together")
        recorded = self._write_singly(checkpoints, batch)
        return recorded, self._writer.write([], wanted)[1]

    def _write_singly(self, checkpoints: dict[int, Checkpoint], batch: dict[int, End]) -> dict[int, Recorded | None]:
        recorded: dict[int, Recorded | None] = {}
        for execution_id, checkpoint in checkpoints.items():
            end = batch[execution_id]
            try:
                recorded.update(self._writer.write([checkpoint])[0])
            except DBAPIError as error:
                if not is_refusal(error):
                    raise
                if end.verdict.succeeded:
                    end = batch[execution_id] = End(end.run, refused(end.run.claim, end.run.task, error))
                    recorded.update(self._writer.write([self._checkpoint(end)])[0])
                else:
                    logger.exception("execution %s: its end cannot be recorded", execution_id)
                    recorded[execution_id] = None
            except SQLAlchemyError:
                raise
            except Exception:
                logger.exception("execution %s: its end cannot be recorded", execution_id)
                recorded[execution_id] = None
        return recorded

    def _sure_of(self, end: End, checkpoint: Checkpoint, recorded: Recorded | None) -> Recorded | None:
        """What came of a checkpoint; where it was refused, maybe because an earlier try was committed without an
        answer, that is read back.
        """
        if recorded is not None or not end.run.was_tried:
            return recorded
        try:
            return self._service.outcome_of(checkpoint)
        except UnknownExecutionError:
            return None
