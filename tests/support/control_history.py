"""Checks what callers were told of controls against what was run, whatever happened in between."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sprite_agent.control.audit import AuditEntry
    from support.repos import Json


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One attempt at a control, and what came of it: an answer, an error that the agent made, or nothing."""

    request: Json
    """Its trace id is the attempt's own."""
    answer: Json | None = None
    reason: str | None = None
    """Of the agent's error."""
    executed: bool | None = None
    """As the agent's error says: whether this attempt ran anything."""


class ControlHistory:
    """Every attempt at some controls, whoever made it; any thread may note. Checked at the end.

    The controls must be decisions: their commands can be told apart, by the mark they bear.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def attempt(self, request: Json) -> Json:
        """The request as it is to be sent this time."""
        return {**request, "traceId": uuid.uuid4().hex}

    def answered(self, request: Json, answer: Any) -> None:
        """Notes an answer to an attempt."""
        self.calls.append(Call(request=request, answer=answer))

    def refused(self, request: Json, reason: str, *, executed: bool | None) -> None:
        """Notes an error that the agent made."""
        self.calls.append(Call(request=request, reason=reason, executed=executed))

    def unanswered(self, request: Json) -> None:
        """Notes that no answer came: from a killed process, or through a broken connection."""
        self.calls.append(Call(request=request))

    def check(
        self, executions: Iterable[Json], audit: Iterable[AuditEntry], *, exit_code: int = 0, lost: bool = False
    ) -> None:
        """Fails unless each key was run at most once, and what was said of it is true and stays so.

        Args:
            executions: what the runtime's command was started with, each time.
            audit: the journal's.
            exit_code: what each command has ended with.
            lost: executors or commands were killed, so that it may not be known how a command ended.
        """
        rows = [entry.document["body"] for entry in audit if entry.kind == "begun"]
        begun = {row["executionId"]: row for row in rows}
        marks = [mark_of(execution) for execution in executions]
        strangers = [mark for mark in marks if mark not in begun]
        assert not strangers, f"no row was committed for what was run: {strangers}"

        denied = {call.request["traceId"] for call in self.calls if call.executed is False}
        broken = [mark for mark in marks if begun[mark]["traceId"] in denied]
        assert not broken, f"it was said that these attempts ran nothing: {broken}"

        ran = Counter(begun[mark]["idempotencyKey"] for mark in marks)
        for key in {call.request["idempotencyKey"] for call in self.calls}:
            calls = [call for call in self.calls if call.request["idempotencyKey"] == key]
            assert ran[key] <= 1, f"key {key} was run {ran[key]} times"
            _check_answers(calls)
            _check_refusals(calls)
            for answer in [call.answer for call in calls if call.answer is not None][:1]:
                _check_truth(answer, ran=ran[key], exit_code=exit_code, lost=lost)


def mark_of(execution: Json) -> str:
    """Which execution it was, by the mark that the command of a decision was given."""
    argv = execution["argv"]
    return str(argv[argv.index("--by") + 1]).rpartition("#")[2]


def _check_answers(calls: list[Call]) -> None:
    """Fails unless the answers for one key are the same, of its own request, and one at most is the first."""
    answers: list[Json] = []
    for call in calls:
        if call.answer is not None:
            answers.append(call.answer)
            for name in ("loopId", "intent", "requestedBy", "idempotencyKey"):
                asked, told = call.request[name], call.answer[name]
                assert asked == told, f"{name} {asked!r} was asked for, {told!r} answered"
    for answer in answers:
        assert answer["state"] == "done", f"this is no answer: {answer}"
        assert {**answer, "replayed": True} == {**answers[0], "replayed": True}, "two answers for one key"
    first = [answer for answer in answers if not answer["replayed"]]
    assert len(first) <= 1, f"{len(first)} answers say that they are the first"


def _check_refusals(calls: list[Call]) -> None:
    """Fails where a request that was answered was also refused, as one that is not the key's."""
    answered = {_meaning(call) for call in calls if call.answer is not None}
    for call in calls:
        taken_for_another = call.reason == "IDEMPOTENCY_KEY_REUSED" and _meaning(call) in answered
        assert not taken_for_another, f"a request was taken for another one: {call.request}"


def _meaning(call: Call) -> str:
    return json.dumps({**call.request, "traceId": None}, sort_keys=True)


def _check_truth(answer: Json, *, ran: int, exit_code: int, lost: bool) -> None:
    """Fails unless an answer says what has happened."""
    executed, told = answer["executed"], answer["exitCode"]
    if answer["reason"] == "not_needed":
        assert ran == 0, "it was run, and said not to have been needed"
    elif told is not None:
        assert (executed, ran, told) == (True, 1, exit_code), f"ran {ran} times with {exit_code}, answered {told}"
    else:
        assert lost, f"ran {ran} times with {exit_code}, and that was lost"
        assert executed or not ran, "it was run, and said not to have been"
