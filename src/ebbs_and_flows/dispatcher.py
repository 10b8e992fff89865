"""Dispatcher: the one thread of a worker that writes: it claims, starts bodies, and records what came of them."""

from __future__ import annotations

import logging
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from ebbs_and_flows.chances import LastChances, is_last_chance
from ebbs_and_flows.checkpoints import Claim, Recorded, Rest, Verdict
from ebbs_and_flows.ends import End, Ends, Turn
from ebbs_and_flows.executions import RUNNABLE_STATUSES, FlowStatus
from ebbs_and_flows.executors import ExecutorLane
from ebbs_and_flows.lanes import Lane, LocalLane, Run
from ebbs_and_flows.leases import LeaseKeeper
from ebbs_and_flows.logs import about, log_claim, log_verdict, logger
from ebbs_and_flows.outages import Outage, waits_without_end
from ebbs_and_flows.rooms import Wanted
from ebbs_and_flows.runner import FlowRunner
from ebbs_and_flows.stepper import Stepper
from ebbs_and_flows.stopping import NO_LONGER_HELD, PAST_LIMIT, WORKER_STOPS
from ebbs_and_flows.transactions import Transactions, Written
from ebbs_and_flows.verdicts import STOPPED, claim_after, judge
from ebbs_and_flows.writers import Writer

INTERRUPT_SECONDS = 1.0
"""How long a body that was cancelled or killed at its limit is given to end, before its attempt is ended without it."""

LAST_WORDS_SECONDS = 5.0
"""How long, after its grace period, a worker tries to hand back what it holds before it leaves it to its leases."""

LEAST_HALF = 16
"""Of no more executions in flight than twice this, all ends are written together that have arrived."""

CLAIM_PATIENCE_SECONDS = 0.05
"""While much is in flight, a few places may be free for so long until it is worth a claim."""

CLAIM_BATCH = 100
"""How many executions are claimed in one transaction at most, so that none of them waits long for its first task."""

RETRY_MARGIN_SECONDS = 0.01
"""Added to the wait for a retry, so that it is due by the database's clock as well when it is looked for."""


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker works; see `Worker`."""

    name: str
    concurrency: int
    lease_seconds: float
    queues: tuple[str, ...]
    max_in_flight: Mapping[str, int]
    executor: Executor | Callable[[], Executor] | None
    poll_seconds: float
    transaction_slots: int


class Dispatcher:
    """Runs a worker's executions, from `loop` to its return. One is used once.

    Bodies run elsewhere (`Lane`); what they have to say, what the lease keeper and the listener notice, and what other
    threads ask for comes in through one inbox, and is done in the loop's thread. So nothing here is locked.
    """

    def __init__(self, runner: FlowRunner, settings: WorkerSettings) -> None:
        self._runner = runner
        self._service = runner.service
        self._settings = settings
        # SimpleQueue.put may be called from a signal's handler, whatever the interrupted thread is doing.
        self._inbox: queue.SimpleQueue[Callable[[], None] | tuple[Run, Verdict | Written] | None] = queue.SimpleQueue()
        """Something to do; or a body that has ended, and how; or nothing, to look again."""
        self.runs: dict[int, Run] = {}
        self.counts: Counter[str] = Counter()
        self.outage = Outage()
        self.turned_at = time.monotonic()
        self.is_stopping = False
        self.failure: str | None = None
        """Why it stopped by itself."""
        self._stop_grace: float | None = None
        self._stops_at = 0.0
        self._writer = Writer(self._service)
        self._ends = Ends(
            self._service, self._writer, lease_seconds=settings.lease_seconds, goes_on=lambda: not self.is_stopping
        )
        self._last_chances = LastChances(settings.lease_seconds)
        self._may_have_strays = False
        self._has_more = True
        self._turns_handed_over = 0
        self._is_claiming = False
        """Whether one of them claims."""
        self._claimed_at = 0.0
        self._next_claim_at = 0.0
        self._next_recovery_at = 0.0
        self._leases = LeaseKeeper(
            self._service, lease_seconds=settings.lease_seconds, look_seconds=settings.poll_seconds
        )
        self._stepper = Stepper(
            self._service, runner.templates, lease_seconds=settings.lease_seconds, sleep=lambda _seconds: None
        )
        transactions = Transactions(
            self._service, lease_seconds=settings.lease_seconds, sleep=time.sleep, waits=waits_without_end
        )
        self._local = LocalLane(
            settings.concurrency,
            settings.lease_seconds,
            transactions=transactions,
            transaction_slots=settings.transaction_slots,
            has_one_writer=self._service.has_one_writer,
            goes_on=lambda: not self.is_stopping,
            ended=lambda run, result: self._inbox.put((run, result)),
        )
        self._remote: ExecutorLane | None = None
        if settings.executor is not None:
            self._remote = ExecutorLane(
                settings.executor,
                settings.concurrency,
                settings.lease_seconds,
                post=self._inbox.put,
                ended=self._body_ended,
                on_dead=self._executor_is_dead,
            )

    # --- from other threads -------------------------------------------------------------------------------------------

    def stop(self, grace_seconds: float) -> None:
        """Claim nothing more, and end when what is held is finished or handed back; a shorter grace replaces a longer
        one. May be called from any thread and from a signal's handler.
        """
        if self._stop_grace is None or grace_seconds < self._stop_grace:
            self._stop_grace = grace_seconds
        self._inbox.put(None)

    def wake(self) -> None:
        """Something may be due: look for it at once."""
        self._inbox.put(self._look_for_more)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def loop(self, *, until_idle: bool) -> None:
        """Run executions until stopped, or until nothing is left to do. Raises nothing that the database says."""
        try:
            while not self._turn(until_idle=until_idle):
                self._receive()
        finally:
            self._leases.stop()
            self._writer.close(LAST_WORDS_SECONDS)
            for lane in self._lanes:
                lane.close()

    def _turn(self, *, until_idle: bool) -> bool:
        """Do all that there is to do now; whether that was the last."""
        now = self.turned_at = time.monotonic()
        self._stop_if_asked(now)
        self._end_what_is_past_its_limit(now)
        is_done = False
        if self._turns_handed_over == 0 and now >= self.outage.until and not self._local.holds_the_write_lock:
            with self._outages():
                self._hand_back_strays()
                self._recover(now)
                self._write(now)
                is_done = self._turns_handed_over == 0 and until_idle and self._is_idle(now)
                if self._turns_handed_over == 0:  # else nobody has answered yet: `_written_beside` notes what they say
                    self.outage.over()
        elif self._turns_handed_over > 0:
            self._hand_over_next()
        if self.is_stopping:
            is_over = not (self.runs or self._ends or self._may_have_strays or self._turns_handed_over)
            return is_over or time.monotonic() > self._stops_at + LAST_WORDS_SECONDS
        return is_done

    @contextmanager
    def _outages(self) -> Iterator[None]:
        """Note what the database says; nothing of it is raised."""
        try:
            yield
        except SQLAlchemyError as error:
            self.outage.note(error)
        except Exception as error:
            logger.exception("a worker's turn failed, which should not be; it goes on")
            self.outage.note(error)

    def _receive(self) -> None:
        """Wait for something to do, and take in all that has arrived."""
        try:
            message = self._inbox.get(timeout=self._seconds_to_wait())
            while True:
                self._take_in(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _take_in(self, message: Callable[[], None] | tuple[Run, Verdict | Written] | None) -> None:
        try:
            if isinstance(message, tuple):
                self._body_ended(*message)
            elif message is not None:
                message()
        except Exception:
            logger.exception("a worker could not take in what has happened, which should not be; it goes on")

    def _seconds_to_wait(self) -> float:
        now = time.monotonic()
        times = [now + self._settings.poll_seconds]
        for lane in self._lanes:
            times += [run.deadline for run in lane.limited if run.deadline is not None]
            seconds = lane.start_what_can()
            if seconds is not None:
                times.append(now + seconds)
        if self.is_stopping:
            times += [each for each in (self._stops_at, self._stops_at + LAST_WORDS_SECONDS) if each > now]
        if self._turns_handed_over == 0 and not self._local.holds_the_write_lock:
            times.append(max(self.outage.until, self._next_writing_at(now)))
        return max(0.0, min(times) - now)

    def _next_writing_at(self, now: float) -> float:
        """When there is something to ask the database, or to tell it."""
        times = [now + self._settings.poll_seconds]
        if self._ends:
            times.append(self._ends.due_at(now))
        if not self.is_stopping:
            times.append(self._next_recovery_at)
            if len(self.runs) < self._settings.concurrency:
                times.append(now if self._has_more else self._next_claim_at)
        return min(times)

    @property
    def _lanes(self) -> list[Lane]:
        return [self._local] if self._remote is None else [self._local, self._remote]

    # --- claim, start -------------------------------------------------------------------------------------------------

    def _look_for_more(self) -> None:
        self._has_more = True

    def _write(self, now: float) -> None:
        """Write the ends that have arrived and claim what there is room for, and go on with both.

        Where others are in flight, that is done in the writer's thread, and what arrives meanwhile is gathered for the
        next turn. A lone execution does not wait for two changes of threads.
        """
        turn = self._ends.next_turn(self._half())
        turn.wanted = self._wanted(now, resting=turn.resting)
        if turn.wanted is None and not turn.ends:
            self._local.allow_transactions()
            return
        if turn.ends and len(self.runs) > len(turn.ends) and self._hand_over(turn):
            return
        self._ends.write(turn)
        self._go_on_after(turn, self._take_back(turn))

    def _half(self) -> int:
        """One half at a time: while the database writes it, this process can do what the other half needs."""
        return max(LEAST_HALF, len(self.runs) // 2)

    def _hand_over(self, turn: Turn) -> bool:
        """Have a turn written in the writer's thread; False where there is no thread for it."""

        def write() -> None:
            self._ends.write(turn)
            self._inbox.put(partial(self._written_beside, turn))

        try:
            self._writer.hand_over(write, after_another=self._turns_handed_over > 0)
        except RuntimeError:
            return False
        self._turns_handed_over += 1
        self._is_claiming = self._is_claiming or turn.wanted is not None
        return True

    def _hand_over_next(self, pending: int = 0) -> None:
        """Give the writer what it is to go on with, so that the database is not idle: the other half, once it is
        complete; any number, where nothing else is under way.

        Args:
            pending: how many claims are yet to be taken up.
        """
        now = time.monotonic()
        least = 1 if self._turns_handed_over == 0 else self._half()
        is_time = self._ends.new >= least and self._turns_handed_over < 2 and now >= self.outage.until
        # What else a turn has to do waits for those that are under way, and they must come to an end.
        is_interrupted = self._may_have_strays or (now >= self._next_recovery_at and not self.is_stopping)
        if not is_time or is_interrupted or self._local.holds_the_write_lock:
            return
        turn = self._ends.next_turn(self._half())
        resting = turn.resting
        room = self._settings.concurrency - len(self.runs) - pending + resting
        is_worth_it = 2 * room >= self._settings.concurrency or now >= self._claimed_at + CLAIM_PATIENCE_SECONDS
        if is_worth_it and not self._is_claiming:
            turn.wanted = self._wanted(now, pending, resting)
        if not self._hand_over(turn):
            self._ends.put_back(turn)
            self._has_more = self._has_more or turn.wanted is not None

    def _written_beside(self, turn: Turn) -> None:
        self._turns_handed_over -= 1
        if turn.wanted is not None:
            self._is_claiming = False
        with self._outages():
            ends = self._take_back(turn)
            try:
                self._hand_over_next(len(turn.claims))
            finally:
                self._go_on_after(turn, ends)
            self.outage.over()

    def _take_back(self, turn: Turn) -> list[tuple[End, Recorded | None]]:
        try:
            return self._ends.take_back(turn)
        except Exception:
            if turn.wanted is not None:
                self._may_have_strays = True  # it may have been committed without an answer
                self._has_more = True
            raise

    def _go_on_after(self, turn: Turn, ends: list[tuple[End, Recorded | None]]) -> None:
        """Go on with what a turn has written and claimed."""
        for end, recorded in ends:
            self._go_on(end, recorded)
        wanted = turn.wanted
        if wanted is not None:
            rested = sum(1 for _, recorded in ends if recorded is not None and recorded.attempt is None)
            self._has_more = self._has_more or len(turn.claims) >= wanted.limit + rested or wanted.only is not None
            try:
                for claim in turn.claims:
                    self._take_up(claim, by_itself=wanted.only is not None, beside=len(turn.claims) > 1)
            except BaseException:
                self._may_have_strays = self._has_more = True
                raise
        self._local.allow_transactions()

    def _wanted(self, now: float, pending: int = 0, resting: int = 0) -> Wanted | None:
        """What to claim now, if anything: as much as there is room for, and as much more as comes to rest meanwhile.

        Args:
            pending: how many claims are yet to be taken up.
            resting: how many executions are about to come to rest.
        """
        free = min(self._settings.concurrency - len(self.runs) - pending, CLAIM_BATCH)
        if self.is_stopping or not (self._has_more or now >= self._next_claim_at) or free + resting < 1:
            return None
        self._has_more = False
        self._claimed_at = now
        self._next_claim_at = now + self._settings.poll_seconds
        if self._last_chances.keep_others_out(self.runs.values(), now):
            return None
        return Wanted(
            self._runner.templates,
            RUNNABLE_STATUSES,
            self._settings.name,
            self._settings.lease_seconds,
            free,
            self._settings.queues,
            self._settings.max_in_flight,
            self._last_chances.next(now) if self._last_chances else None,
        )

    def _take_up(self, claim: Claim, *, by_itself: bool, beside: bool) -> None:
        self.counts["claimed"] += 1
        if claim.attempt is None:
            self._note_rest(claim, claim.execution.status, None)
            return
        execution = claim.execution
        on_lost = partial(self._inbox.put, partial(self._lose, execution.execution_id, execution.epoch))
        self._leases.hold(self._settings.name, execution.execution_id, execution.epoch, on_lost)
        self._start(claim, by_itself=by_itself, beside=beside)

    def _start(self, claim: Claim, *, alone: bool = False, by_itself: bool = False, beside: bool = False) -> None:
        """Start the open attempt of a claim; while the worker stops, hand it back instead.

        Args:
            alone: whether no other may run in its lane meanwhile.
            by_itself: whether it was claimed to be held without others.
            beside: whether others were claimed with it.
        """
        attempt = claim.attempt
        assert attempt is not None, "only an open attempt can be started"
        template = self._runner.templates[claim.execution.template_name]
        task = template.get_task(attempt.task_index)
        assert task is not None, "attempts are started at tasks of the template"
        run = Run(claim, template, task, alone=alone)
        earlier = self.runs.get(run.execution_id)
        if earlier is not None and earlier.claim.execution.epoch != claim.execution.epoch:
            self._supersede(earlier)
        self.runs[run.execution_id] = run
        if self.is_stopping:
            self._settle(run, STOPPED)
            return
        lane = self._lane_of(run)
        run.is_last_chance = lane.is_in_this_process and is_last_chance(run)
        if run.is_last_chance and not by_itself and (beside or len(self.runs) > 1):
            run.is_last_chance = False
            self._settle(run, self._last_chances.hand_back(run, time.monotonic()))
            return
        log_claim(claim, "started")
        lane.add(run)

    def _lane_of(self, run: Run) -> Lane:
        if self._remote is None or run.is_transactional or run.is_async:
            return self._local
        return self._remote

    # --- how attempts end ---------------------------------------------------------------------------------------------

    def _body_ended(self, run: Run, result: Verdict | Written) -> None:
        self._lane_of(run).ended(run)
        if run.is_settled:
            return
        if isinstance(result, Written):
            run.is_settled = True
            self._recorded(run, result.verdict, result.recorded)
        elif run.is_past_limit:
            self._settle_past_limit(run)
        else:
            self._settle(run, result)

    def _settle(self, run: Run, verdict: Verdict) -> None:
        run.is_settled = True
        self._ends.add(run, verdict)

    def _settle_past_limit(self, run: Run) -> None:
        assert run.limit is not None, "only a body that has begun has a limit"
        self._settle(run, judge(run.task, run.limit.reached(), run.claim.counts_of(run.name)))

    def _end_what_is_past_its_limit(self, now: float) -> None:
        for run in [run for lane in self._lanes for run in lane.limited]:
            assert run.deadline is not None, "it is among those that have one"
            # What was cancelled still takes up a process, which is killed for it.
            if run.is_settled and (run.is_past_limit or self._lane_of(run) is self._local):
                self._lane_of(run).limited.discard(run)
                continue
            if now < run.deadline:
                continue
            if run.is_past_limit:  # it was interrupted and has not ended: it does not react
                self._settle_past_limit(run)
                self._lane_of(run).give_up(run)
                continue
            run.deadline = self._lane_of(run).deadline_of(run, now)
            if now < run.deadline:
                continue
            run.is_past_limit = True
            run.signal.set(PAST_LIMIT)
            if self._lane_of(run).interrupt(run) or run.is_settled:
                run.deadline = now + INTERRUPT_SECONDS
            elif self._holds_the_write_lock(run):
                self._lane_of(run).limited.discard(run)
            else:
                self._settle_past_limit(run)
                self._lane_of(run).give_up(run)

    def _holds_the_write_lock(self, run: Run) -> bool:
        """Whether nothing can be written before this body has ended: it notices its limit by itself then."""
        return self._local.holds_the_write_lock and run.is_transactional and run in self._local.active

    def _lose(self, execution_id: int, epoch: int) -> None:
        """The lease keeper says that an execution is not held any more."""
        run = self.runs.get(execution_id)
        if run is None or run.claim.execution.epoch != epoch:
            return
        run.signal.set(NO_LONGER_HELD)
        if run.is_settled or (run.is_transactional and run in self._local.active):
            return  # what it has to say is being written, and will be refused
        log_claim(run.claim, "dropped, the execution was cancelled or is no longer held here", level=logging.WARNING)
        if run.is_async and self._lane_of(run) is self._local:
            self._local.interrupt(run)
        run.is_settled = True
        self._lane_of(run).give_up(run)
        self.counts["refused"] += 1
        self._drop(run)

    def _supersede(self, earlier: Run) -> None:
        """Its lease had expired, it was recovered by somebody, and this worker has claimed it anew."""
        earlier.signal.set(NO_LONGER_HELD)
        earlier.is_settled = True
        self._ends.forget(earlier)
        self._lane_of(earlier).give_up(earlier)

    def _drop(self, run: Run) -> None:
        if self.runs.get(run.execution_id) is run:
            del self.runs[run.execution_id]
            self._leases.release(self._settings.name, run.execution_id)
        if self._settings.max_in_flight or run.template.max_in_flight is not None:
            self._has_more = True  # there is room for one more of these
        if self._last_chances or run.is_last_chance:
            self._has_more = True  # others may be claimed again, or the one that waited for this

    def _go_on(self, end: End, recorded: Recorded | None) -> None:
        try:
            self._recorded(end.run, end.verdict, recorded)
        except Exception:
            logger.exception("execution %s cannot go on here, which should not be; handed back", end.run.execution_id)
            self._drop(end.run)
            self._may_have_strays = True

    def _recorded(self, run: Run, verdict: Verdict, recorded: Recorded | None) -> None:
        """Go on from what was written."""
        if recorded is None:
            log_claim(run.claim, "refused, the execution is no longer held here", level=logging.WARNING)
            self.counts["refused"] += 1
            self._drop(run)
            # A transactional task may have committed, and begun the next one, just as it was handed back.
            self._may_have_strays = self._may_have_strays or self.is_stopping
            return
        self.counts["attempts"] += 1
        log_verdict(run.claim, verdict)
        claim = claim_after(run.claim, verdict, recorded)
        if claim.attempt is not None:
            self._start(claim, alone=run.alone and run.starts_over is not None)
            return
        self._drop(run)
        then = recorded.then
        assert isinstance(then, Rest), "without another attempt the execution has come to rest"
        self._note_rest(run.claim, then.status, then.reason)
        if then.status is FlowStatus.RESCHEDULED:
            self._next_claim_at = min(self._next_claim_at, time.monotonic() + then.wait_seconds + RETRY_MARGIN_SECONDS)

    def _note_rest(self, claim: Claim, status: FlowStatus, reason: str | None) -> None:
        self.counts[status.value] += 1
        logger.info(
            "execution %s of %s is %s%s",
            claim.execution.execution_id,
            claim.execution.template_name,
            status,
            f": {reason}" if reason else "",
            extra=about(claim),
        )

    # --- what others have left ----------------------------------------------------------------------------------------

    def _recover(self, now: float) -> None:
        if self.is_stopping or now < self._next_recovery_at:
            return
        self._next_recovery_at = now + self._settings.poll_seconds
        # Not its own: those it renews as soon as it can, if nobody has been faster.
        became = self._service.recover_expired(self._runner.templates, spared=self._settings.name)
        self.counts["recovered"] += len(became)
        for execution_id, status in became.items():
            logger.warning("execution %s: its worker's lease has expired, it is %s now", execution_id, status)
        if became:
            self._has_more = True

    def _hand_back_strays(self) -> None:
        """Hand back what is held under this worker's name and does not run, such as claims whose answer was lost."""
        if not self._may_have_strays:
            return
        strays = [each for each in self._service.held_by(self._settings.name) if each.execution_id not in self.runs]
        for stray in strays:
            logger.warning("execution %s is held here without being run, handed back", stray.execution_id)
        answers = [self._stepper.hand_back(stray) for stray in strays]
        self._may_have_strays = not all(answers)
        self._has_more = True

    def _is_idle(self, now: float) -> bool:
        """Whether nothing is in flight, nothing is due, and no retry is to come."""
        if self.runs or self._ends or self._has_more or self._last_chances:
            return False
        seconds = self._service.seconds_until_next(self._runner.templates, self._settings.queues)
        if seconds is None:
            return True
        # What is due now and was not claimed is beyond a bound, or has come just now.
        self._next_claim_at = min(self._next_claim_at, now + (seconds + RETRY_MARGIN_SECONDS if seconds else 0.1))
        return False

    # --- stopping -----------------------------------------------------------------------------------------------------

    def _stop_if_asked(self, now: float) -> None:
        if self._stop_grace is None:
            return
        if not self.is_stopping:
            self.is_stopping = True
            self._stops_at = now + self._stop_grace
            logger.info("worker %s is stopping with %s executions in flight", self._settings.name, len(self.runs))
            for run in list(self.runs.values()):
                run.signal.set(WORKER_STOPS)
                if run.began is None and not run.is_settled:
                    self._settle(run, STOPPED)
        self._stops_at = min(self._stops_at, now + self._stop_grace)
        if now >= self._stops_at:
            for run in list(self.runs.values()):
                if not run.is_settled and not self._holds_the_write_lock(run):
                    self._settle(run, STOPPED)
                    self._lane_of(run).interrupt(run)

    def _executor_is_dead(self, why: str) -> None:
        self.failure = self.failure or f"its executor cannot be used any more: {why}"
        logger.error("worker %s stops: %s", self._settings.name, self.failure)
        self._stop_grace = 0.0
