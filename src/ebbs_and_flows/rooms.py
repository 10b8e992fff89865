"""What a worker wants to claim, and how many more may run: the bounds of queues and templates, over all workers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ebbs_and_flows.checkpoints import Checkpoint, Recorded, Rest
from ebbs_and_flows.executions import FlowExecution, FlowStatus
from ebbs_and_flows.persistence.unit_of_work import UnitOfWork
from ebbs_and_flows.templates import FlowTemplate


@dataclass(frozen=True)
class Wanted:
    """What a worker asks for when it claims; see `FlowService.claim`."""

    templates: Mapping[str, FlowTemplate]
    statuses: Collection[FlowStatus]
    worker: str
    lease_seconds: float
    limit: int = 1
    queues: Collection[str] | None = None
    max_in_flight: Mapping[str, int] = field(default_factory=dict)
    only: int | None = None

    def is_possible(self, checkpoints: Sequence[Checkpoint]) -> bool:
        """Whether there is room for one, now or with these checkpoints."""
        most = self.limit + sum(1 for each in checkpoints if isinstance(each.then, Rest))
        return bool(self.templates) and most > 0

    def more_by(self, recorded: Iterable[Recorded | None]) -> Wanted:
        """The same, and as many more as have come to rest."""
        rested = sum(1 for each in recorded if each is not None and each.attempt is None)
        return replace(self, limit=self.limit + rested)


@dataclass
class Room:
    """What is left of `max_in_flight`, as counted in one transaction that nobody can claim beside.

    Attributes:
        templates: those of which something may be claimed.
        queues: those from which something may be claimed; `None` for all, where no queue is bounded.
    """

    templates: set[str]
    queues: set[str] | None
    _by_template: dict[str, int] = field(default_factory=dict)
    _by_queue: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        work: UnitOfWork,
        templates: Mapping[str, FlowTemplate],
        queues: Collection[str] | None,
        max_in_flight: Mapping[str, int],
    ) -> Room:
        """Count what is RUNNING of whatever is bounded. Without bounds, nothing is read.

        A bound that another worker is counting by in this moment has no room: the next claim will see what it left.
        """
        bounds = {each.name: each.max_in_flight for each in templates.values() if each.max_in_flight is not None}
        queue_bounds = {name: most for name, most in max_in_flight.items() if queues is None or name in queues}
        room = cls(set(templates), None if queues is None else set(queues))
        # Always in the same order, and never waiting: two claims cannot stand in each other's way.
        bounded = [name for name in sorted(bounds) if work.try_lock(f"template {name}")]
        running = work.executions.running_of("templates", bounded)
        room._by_template = {name: bounds[name] - running.get(name, 0) if name in bounded else 0 for name in bounds}
        bounded = [name for name in sorted(queue_bounds) if work.try_lock(f"queue {name}")]
        running = work.executions.running_of("queues", bounded)
        room._by_queue = {
            name: queue_bounds[name] - running.get(name, 0) if name in bounded else 0 for name in queue_bounds
        }
        room.take(())
        return room

    @property
    def is_full(self) -> bool:
        """Whether nothing more may be claimed."""
        return not self.templates or self.queues == set()

    def has(self, execution: FlowExecution) -> bool:
        """Whether this execution may be claimed."""
        return execution.template_name in self.templates and (self.queues is None or execution.queue in self.queues)

    @property
    def most_at_once(self) -> int:
        """How many may be claimed before it is to be counted again."""
        return min((*self._by_template.values(), *self._by_queue.values()), default=2**31 - 1)

    def take(self, claimed: Sequence[FlowExecution]) -> None:
        """Count what was claimed; what has no room left is left out from now on."""
        for execution in claimed:
            for left, name in ((self._by_template, execution.template_name), (self._by_queue, execution.queue)):
                if name in left:
                    left[name] -= 1
        for left, names in ((self._by_template, self.templates), (self._by_queue, self.queues or set())):
            for name in [each for each, room in left.items() if room < 1]:
                del left[name]
                names.discard(name)
