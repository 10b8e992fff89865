"""Ebbs and Flows: linear flows of tasks that survive anything, kept in your own SQL database."""

from ebbs_and_flows import schema
from ebbs_and_flows.codec import ValueCodec, register_codec, register_type
from ebbs_and_flows.context import ExecutionContext
from ebbs_and_flows.errors import (
    DatabaseUrlError,
    DuplicateEntryError,
    DuplicateTemplateError,
    EbbsError,
    FrozenContextError,
    InvalidArgumentError,
    InvalidEntryError,
    InvalidNameError,
    LeaseLostError,
    MissingEntryError,
    MissingInputError,
    SchemaError,
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
from ebbs_and_flows.pickle_codec import PickleCodec
from ebbs_and_flows.retries import RetryPolicy
from ebbs_and_flows.runner import FlowRunner
from ebbs_and_flows.service import FlowService
from ebbs_and_flows.tasks import FunctionTask, Task, TaskDataItem, TransactionalTask, task
from ebbs_and_flows.templates import FlowTemplate

__all__ = [
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
    "FlowTransition",
    "FrozenContextError",
    "FunctionTask",
    "InvalidArgumentError",
    "InvalidEntryError",
    "InvalidNameError",
    "LeaseLostError",
    "MissingEntryError",
    "MissingInputError",
    "PickleCodec",
    "RetryPolicy",
    "SchemaError",
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
    "register_codec",
    "register_type",
    "schema",
    "task",
]
