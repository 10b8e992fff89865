"""Records as JSON, for programs: keys are the names of the records' fields, times are ISO 8601 in UTC."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer

from ebbs_and_flows.codec import EncodedValue
from ebbs_and_flows.executions import FlowExecution, FlowTransition, TaskExecution
from ebbs_and_flows.registry import is_builtin_name


def print_json(document: object) -> None:
    """Print a document to stdout, in ASCII: no value can do anything to a terminal."""
    typer.echo(json.dumps(document, indent=2))


def execution_document(execution: FlowExecution, **more: Any) -> dict[str, Any]:
    """An execution: its fields, the types of the entries of its context, and what else is known of it.

    An entry of the context stands there as it is stored, in natural JSON; no value is decoded, so none can fail. One
    whose type only its application knows is an object of `$type` and `value`.
    """
    document: dict[str, Any] = {}
    entries = execution.execution_context.encode()
    for name, value in execution.model_dump(mode="json", exclude={"execution_context"}).items():
        document[name] = value
        if name == "current_task_index":  # where the record has it
            document["execution_context"] = {entry: _natural(encoded) for entry, encoded in entries.items()}
            document["entry_types"] = {entry: encoded.type_name for entry, encoded in entries.items()}
    return {**document, **more}


def run_document(
    execution: FlowExecution, attempts: Sequence[TaskExecution], transitions: Sequence[FlowTransition]
) -> dict[str, Any]:
    """An execution with its history."""
    return execution_document(
        execution,
        task_executions=[attempt.model_dump(mode="json") for attempt in attempts],
        flow_transitions=[transition.model_dump(mode="json") for transition in transitions],
    )


def _natural(encoded: EncodedValue) -> Any:
    return encoded.node if is_builtin_name(encoded.type_name) else {"$type": encoded.type_name, "value": encoded.node}
