"""LeaseKeeper: renews the leases of what a worker holds, beside whatever runs, and notices those that are lost."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError

from ebbs_and_flows.logs import logger
from ebbs_and_flows.persistence.databases import said
from ebbs_and_flows.service import FlowService

RENEWALS_PER_LEASE = 3
"""A lease is renewed when a third of it is over, so that one renewal may fail without its loss."""

MAX_LOOK_SECONDS = 1.0
"""How often it looks, at least, whether what it holds was cancelled or claimed by somebody else."""

STOP_SECONDS = 1.0
"""How long its last look is waited for when it stops: a round trip as a rule, longer where the database is gone."""

BATCH = 1000
"""How many leases are renewed in one statement; databases bound the parameters of one."""


@dataclass(frozen=True)
class _Hold:
    epoch: int
    on_lost: Callable[[], None] | None


class LeaseKeeper:
    """Keeps what was claimed under one worker's name, in a thread of its own that lives while anything is held.

    Args:
        service: where the leases are.
        lease_seconds: for how long a renewal holds.
        look_seconds: how often it looks for lost holds between renewals; at most once a second less often.
    """

    def __init__(self, service: FlowService, *, lease_seconds: float, look_seconds: float = MAX_LOOK_SECONDS) -> None:
        self._service = service
        self._process = os.getpid()
        self._lease_seconds = lease_seconds
        self._interval = min(look_seconds, MAX_LOOK_SECONDS, lease_seconds / RENEWALS_PER_LEASE)
        self._condition = threading.Condition()
        self._holds: dict[tuple[str, int], _Hold] = {}
        self._thread: threading.Thread | None = None
        self._renewed_at = 0.0
        self._is_failing = False

    def hold(self, worker: str, execution_id: int, epoch: int, on_lost: Callable[[], None] | None = None) -> None:
        """Renew this lease from now on.

        Args:
            on_lost: called in the keeper's thread, at most once, when the execution is no longer held.
        """
        if self._process != os.getpid():  # the thread and what it held are the parent's, maybe with the lock taken
            self._process, self._condition, self._holds, self._thread = os.getpid(), threading.Condition(), {}, None
        with self._condition:
            self._holds[worker, execution_id] = _Hold(epoch, on_lost)
            if self._thread is None:
                self._renewed_at = time.monotonic()
                # The thread keeps no keeper alive that everybody else has dropped.
                arguments = (weakref.ref(self), self._condition, self._interval)
                self._thread = threading.Thread(target=_keep, args=arguments, name="ebbs leases", daemon=True)
                self._thread.start()

    def release(self, worker: str, execution_id: int) -> None:
        """Renew this lease no more."""
        with self._condition:
            self._holds.pop((worker, execution_id), None)

    def stop(self) -> None:
        """Renew nothing any more, and wait for the connection on which it may just be looking, but not for long."""
        with self._condition:
            self._holds.clear()
            self._condition.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(STOP_SECONDS)

    def _has_rest(self) -> bool:
        """Whether nothing is held, so that the thread may end; called under the lock."""
        if self._holds:
            return False
        self._thread = None
        return True

    def _look(self) -> None:
        """Renew if it is time for that, else only look; what is lost is told."""
        with self._condition:
            holds = dict(self._holds)
        is_time = time.monotonic() - self._renewed_at >= self._lease_seconds / RENEWALS_PER_LEASE - self._interval / 2
        by_worker: dict[str, dict[int, int]] = {}
        for (worker, execution_id), hold in holds.items():
            by_worker.setdefault(worker, {})[execution_id] = hold.epoch
        try:
            for worker, held in _batches(by_worker):
                if is_time:
                    lost = self._service.renew(worker, held, lease_seconds=self._lease_seconds)
                else:
                    lost = self._service.no_longer_held(held)
                for execution_id in lost:
                    self._lose(worker, execution_id, holds[worker, execution_id])
            if is_time:
                self._renewed_at = time.monotonic()
            self._is_failing = False
        except SQLAlchemyError as error:
            # Said once: who holds the leases says more of the outage.
            level = logging.DEBUG if self._is_failing else logging.WARNING
            logger.log(level, "leases not renewed yet: %s", said(error))
            self._is_failing = True
        except Exception:
            logger.exception("leases not renewed yet")

    def _lose(self, worker: str, execution_id: int, hold: _Hold) -> None:
        with self._condition:
            if self._holds.get((worker, execution_id)) is not hold:
                return  # released meanwhile, or claimed anew
            del self._holds[worker, execution_id]
        if hold.on_lost is not None:
            hold.on_lost()


def _batches(by_worker: dict[str, dict[int, int]]) -> Iterator[tuple[str, dict[int, int]]]:
    for worker, held in by_worker.items():
        ids = list(held)
        for start in range(0, len(ids), BATCH):
            yield worker, {execution_id: held[execution_id] for execution_id in ids[start : start + BATCH]}


def _keep(reference: weakref.ref[LeaseKeeper], condition: threading.Condition, interval: float) -> None:
    while True:
        with condition:
            condition.wait(interval)
            keeper = reference()
            if keeper is None or keeper._has_rest():
                return
        keeper._look()
        del keeper
