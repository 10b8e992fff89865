"""Ebbs and Flows: linear flows of tasks that survive anything, kept in your own SQL database."""

from ebbs_and_flows import schema
from ebbs_and_flows.codec import ValueCodec, register_codec, register_type
from ebbs_and_flows.context import ExecutionContext
from ebbs_and_flows.errors import (
    DatabaseUrlError,
    DuplicateEntryError,
    DuplicateTemplateError,
    EbbsError,
    FlowTimeoutError,
    FrozenContextError,
    InvalidArgumentError,
    InvalidContextError,
    InvalidEntryError,
    InvalidNameError,
    LeaseLostError,
    MigrationError,
    MissingEntryError,
    MissingInputError,
    SchemaError,
    StopRequestedError,
    TaskResultError,
    TaskTimeoutError,
    TemplateError,
    TemplateMismatchError,
    TransitionError,
    TypeRegistrationError,
    UndecodableValueError,
    UnknownExecutionError,
    UnknownTemplateError,
    UnknownTypeError,
    UnserializableValueError,
    WorkerStateError,
)
from ebbs_and_flows.executions import (
    Failure,
    FlowExecution,
    FlowFilter,
    FlowStatus,
    FlowTransition,
    TaskExecution,
    TaskStatus,
)
from ebbs_and_flows.health import InFlight, WorkerHealth
from ebbs_and_flows.logs import AttemptLogFilter
from ebbs_and_flows.pickle_codec import PickleCodec
from ebbs_and_flows.retries import RetryPolicy
from ebbs_and_flows.runner import FlowRunner
from ebbs_and_flows.service import FlowService
from ebbs_and_flows.stopping import raise_if_stop_requested, stop_requested, wait_for_stop
from ebbs_and_flows.tasks import FunctionTask, Task, TaskDataItem, TransactionalTask, task
from ebbs_and_flows.templates import FlowTemplate
from ebbs_and_flows.worker import Worker

__all__ = [
    "AttemptLogFilter",
    "DatabaseUrlError",
    "DuplicateEntryError",
    "DuplicateTemplateError",
    "EbbsError",
    "ExecutionContext",
    "Failure",
    "FlowExecution",
    "FlowFilter",
    "FlowRunner",
    "FlowService",
    "FlowStatus",
    "FlowTemplate",
    "FlowTimeoutError",
    "FlowTransition",
    "FrozenContextError",
    "FunctionTask",
    "InFlight",
    "InvalidArgumentError",
    "InvalidContextError",
    "InvalidEntryError",
    "InvalidNameError",
    "LeaseLostError",
    "MigrationError",
    "MissingEntryError",
    "MissingInputError",
    "PickleCodec",
    "RetryPolicy",
    "SchemaError",
    "StopRequestedError",
    "Task",
    "TaskDataItem",
    "TaskExecution",
    "TaskResultError",
    "TaskStatus",
    "TaskTimeoutError",
    "TemplateError",
    "TemplateMismatchError",
    "TransactionalTask",
    "TransitionError",
    "TypeRegistrationError",
    "UndecodableValueError",
    "UnknownExecutionError",
    "UnknownTemplateError",
    "UnknownTypeError",
    "UnserializableValueError",
    "ValueCodec",
    "Worker",
    "WorkerHealth",
    "WorkerStateError",
    "raise_if_stop_requested",
    "register_codec",
    "register_type",
    "schema",
    "stop_requested",
    "task",
    "wait_for_stop",
]
