"""What is written of each intent: a line in intents.jsonl, two in the telemetry."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opsmgr import store as files
from opsmgr.errors import InputInvalid
from sprite_agent.contract import clock
from sprite_agent.contract.requests import EXIT_CODES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from opsmgr.store import LoopStore
    from opsmgr.transport.base import Transport
    from sprite_agent.contract.envelopes import ControlConfirmation, ControlRequest, ControlResult, ControlStatus
    from sprite_agent.errors import OpsError

_WAITS: ControlConfirmation = {"mode": "wait"}


@dataclass(kw_only=True, slots=True)
class Invocation:
    """One call for an intent: begun when it is made, recorded once when it has come out."""

    transport: Transport
    request: ControlRequest
    started_at: str = field(default_factory=clock.now)
    _since: float = field(default_factory=time.monotonic)
    _retries: int = field(init=False)
    _waited: float = field(init=False)

    def __post_init__(self) -> None:
        # A transport counts over its life; what is told is what this call took.
        self._retries = self.transport.attempts.retries
        self._waited = self.transport.attempts.waited_seconds

    def came_out(self, store: LoopStore, result: ControlResult, *, tell: Callable[[str], None]) -> None:
        """Records a result. A record that can't be written changes nothing: `tell` is told of it."""
        self._record(store, _from_result(self.request, result), tell)

    def failed(self, store: LoopStore, error: OpsError, *, tell: Callable[[str], None]) -> None:
        """Likewise for a call that brought no result."""
        self._record(store, _from_error(error), tell)

    def _record(self, store: LoopStore, outcome: dict[str, Any], tell: Callable[[str], None]) -> None:
        request, made = self.request, self.transport.attempts
        retries = made.retries - self._retries
        common: dict[str, Any] = {
            "timestamp": clock.now(),
            "loopId": request["loopId"],
            "intent": request["intent"],
            "traceId": request.get("traceId"),
            "requestedBy": request["requestedBy"],
            "transport": self.transport.name,
            "idempotencyKey": request["idempotencyKey"],
        }
        took = {
            "startedAt": self.started_at,
            "durationSeconds": round(max(0.0, time.monotonic() - self._since), 3),
            "retryAttempts": retries,
            "retryBackoffSeconds": round(max(0.0, made.waited_seconds - self._waited), 3),
        }
        codes = list(made.codes)[-retries:] if retries else []
        told = {name: took[name] for name in ("retryAttempts", "retryBackoffSeconds")}
        came = {name: value for name, value in outcome.items() if name not in ("reasonCode", "replayed")}
        intent = {**common, "note": request.get("note"), **came, **told, "attemptCodes": codes}
        judged = {name: outcome.get(name) for name in _JUDGED}
        try:
            files.append(store.intents, _without_nulls(intent))
            files.append(control_telemetry(store), _without_nulls({**common, **took, **judged}))
            files.append(invocation_telemetry(store), _without_nulls(self._invocation(common, took, outcome)))
        except InputInvalid as error:
            tell(f"the intent is not recorded: {error}")

    def _invocation(self, common: dict[str, Any], took: dict[str, Any], outcome: dict[str, Any]) -> dict[str, Any]:
        confirmation = self.request.get("confirmation", _WAITS)
        confirm, ran = outcome.get("confirm"), outcome.get("exitCode")
        asked = {
            "doConfirm": confirmation["mode"] == "wait",
            "timeoutSeconds": confirmation.get("timeoutSeconds"),
            "retryAttempts": took["retryAttempts"],
            "retryBackoffSeconds": took["retryBackoffSeconds"],
        }
        execution = {
            "status": outcome["status"] if ran is None else "success" if ran == 0 else "failed_command",
            "exitCode": ran,
            "command": outcome.get("command"),
            "output": outcome["commandOutput"],
            "replayed": outcome.get("replayed"),
        }
        looked = {
            "attempted": confirm is not None,
            "status": "not_attempted" if confirm is None else "confirmed" if confirm["confirmed"] else "not_confirmed",
            "exitCode": outcome.get("confirmExitCode"),
            "outcome": confirm,
        }
        judged = {name: outcome.get(name) for name in ("status", "confirmed", "reasonCode")}
        return {
            "schemaVersion": "v1",
            **common,
            "startedAt": took["startedAt"],
            "note": self.request.get("note"),
            "request": _without_nulls(asked),
            "execution": _without_nulls(execution),
            "confirmation": _without_nulls(looked),
            "outcome": _without_nulls({**judged, "durationSeconds": took["durationSeconds"]}),
        }


_JUDGED = ("status", "reasonCode", "exitCode", "confirmExitCode", "confirmed")


def control_telemetry(store: LoopStore) -> Path:
    """Figures of each call, a line each."""
    return store.folder / "telemetry" / "control.jsonl"


def invocation_telemetry(store: LoopStore) -> Path:
    """Each call whole, a line each."""
    return store.folder / "telemetry" / "control-invocations.jsonl"


def exit_code(result: ControlResult) -> int:
    """The exit code of a control command."""
    return EXIT_CODES[_status(result)]


def _status(result: ControlResult) -> ControlStatus:
    return result["status"] or "ambiguous"


def _from_result(request: ControlRequest, result: ControlResult) -> dict[str, Any]:
    confirmation = result["confirmation"]
    required = request.get("confirmation", _WAITS).get("requiredEffect", "completed")
    seen = {"effect": result["effect"], "requiredEffect": required}
    return {
        "status": _status(result),
        "reasonCode": result["reason"],
        "command": result["command"],
        "exitCode": result["exitCode"],
        "confirmExitCode": None if confirmation is None else 0 if confirmation["confirmed"] else 2,
        "confirmed": result["status"] == "confirmed",
        "commandOutput": result["output"],
        "confirm": None if confirmation is None else {**confirmation, **seen},
        "replayed": result["replayed"],
    }


def _from_error(error: OpsError) -> dict[str, Any]:
    # No answer means: it may have run. That is what ambiguous says; a refusal ran nothing.
    return {
        "status": "ambiguous" if error.executed is None else "failed_command",
        "reasonCode": error.reason.lower(),
        "confirmed": False,
        "commandOutput": f"{error.reason}: {error}",
    }


def _without_nulls(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if value is not None}
