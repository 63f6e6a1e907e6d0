"""Documents as the schemas allow them: every optional key there or not, every nullable value null or not.

Written by hand from schema/*.schema.json; that they keep the schema is asserted where they are used.
"""

from __future__ import annotations

from datetime import UTC, timedelta, timezone
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

if TYPE_CHECKING:
    from datetime import datetime

    from hypothesis.strategies import SearchStrategy

    Json = dict[str, Any]
    Documents = SearchStrategy[Json]

GATES = ("tests", "validation", "prerequisites", "checklist", "evidence", "approval")
RUN_STATUS = ("awaiting_approval", "complete", "running", "stopped", "failed", "idle", "unknown")
INTENTS = ("cancel", "approve", "reject")

# Values.

_TELLING = ["", "\x00", "\n", "a\r\nb", '"', "\\", "{[", "\x7f\x85", "\u2028", "\ufeff", "é", "日本", "👩‍🚀🎉"]

text = st.text(max_size=8) | st.sampled_from(_TELLING)
some_text = st.text(min_size=1, max_size=8) | st.sampled_from(_TELLING[1:])
printable = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"), min_size=1, max_size=20
)
"""What an operator may write: no control characters."""
count = st.integers(0, 2**63 - 1) | st.sampled_from([0, 1, 2**31, 2**53 + 1, 2**63 - 1])
seconds = st.floats(0, 120) | st.integers(0, 120).map(float)
digest = st.binary(min_size=32, max_size=32).map(bytes.hex)
loop_id = st.from_regex(r"[A-Za-z0-9](\.?[A-Za-z0-9_-]){0,31}", fullmatch=True)
idempotency_key = st.text("AZaz09._:-", min_size=1, max_size=128)
_zones = st.just(UTC) | st.integers(-23 * 60 - 59, 23 * 60 + 59).map(
    lambda minutes: timezone(timedelta(minutes=minutes))
)


def _written(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


date_time = st.datetimes(timezones=_zones).map(_written)

_json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.sampled_from([2**53 + 1, 2**63, 2**64, -(2**63) - 1, 0.0, -0.0, 1.0, 5e-324, 1.7e308])
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
open_object: Documents = st.dictionaries(text, _json_values, max_size=3)


# Documents.

_source = st.fixed_dictionaries({"repoPath": some_text, "loopId": some_text})
_sequence = st.fixed_dictionaries({"source": some_text, "value": count})
_cursor = st.fixed_dictionaries({"eventLineOffset": count, "eventLineCount": count})
_artifact = st.fixed_dictionaries(
    {
        "path": some_text,
        "exists": st.booleans(),
        "sizeBytes": count,
        "lineCount": count,
        "sha256": st.none() | digest,
        "mtimeEpoch": st.none() | st.integers(-(2**63), 2**63 - 1),
    }
)
_gates = st.builds(
    lambda further, named: further | named,
    st.dictionaries(text | st.sampled_from(["lifecycle", "additional"]), text, max_size=3),
    st.fixed_dictionaries(dict.fromkeys(GATES, text)),
)

snapshot: Documents = st.fixed_dictionaries(
    {
        "schemaVersion": st.just("v1"),
        "envelopeType": st.just("loop_run_snapshot"),
        "emittedAt": date_time,
        "source": _source,
        "run": st.fixed_dictionaries(
            {
                "runId": some_text,
                "iteration": count,
                "status": st.sampled_from(RUN_STATUS),
                "summary": st.none() | open_object,
            }
        ),
        "runtime": st.fixed_dictionaries(
            dict.fromkeys(("superloopState", "activeRun", "approval"), st.none() | open_object),
            optional={"heartbeat": st.none() | open_object},
        ),
        "artifacts": st.fixed_dictionaries(
            dict.fromkeys(("events", "runSummary", "state", "activeRun", "approval"), _artifact),
            optional={"heartbeat": _artifact},
        ),
        "cursor": _cursor,
        "health": st.fixed_dictionaries(
            {
                "eventCount": count,
                "lastEventAt": st.none() | text,
                "lastEventName": st.none() | text,
                "lastSummaryAt": st.none() | text,
                "hasPendingApproval": st.booleans(),
                "gates": st.none() | _gates,
                "stuck": st.none() | st.fixed_dictionaries({"streak": count, "threshold": count}),
            }
        ),
    },
    optional={"traceId": st.none() | text, "sequence": _sequence},
)

event: Documents = st.fixed_dictionaries(
    {
        "schemaVersion": st.just("v1"),
        "envelopeType": st.just("loop_run_event"),
        "emittedAt": date_time,
        "source": _source,
        "cursor": _cursor,
        "run": st.fixed_dictionaries({"runId": some_text, "iteration": count}),
        "event": st.fixed_dictionaries(
            {
                "timestamp": some_text,
                "name": some_text,
                "role": st.none() | text,
                "status": st.none() | text,
                "message": st.none() | text,
                "payload": st.none() | open_object,
                "raw": open_object,
            }
        ),
    },
    optional={"traceId": st.none() | text, "sequence": _sequence},
)

control_request: Documents = st.fixed_dictionaries(
    {
        "loopId": loop_id,
        "intent": st.sampled_from(INTENTS),
        "requestedBy": printable,
        "idempotencyKey": idempotency_key,
    },
    optional={
        "traceId": text,
        "note": printable,
        "confirmation": st.fixed_dictionaries(
            {"mode": st.sampled_from(["skip", "wait"])},
            optional={"timeoutSeconds": seconds, "requiredEffect": st.sampled_from(["decision_recorded", "completed"])},
        ),
        "provenance": st.fixed_dictionaries({"managerId": text, "host": text, "attempt": count}),
        "expectedRunId": some_text,
        "expectedIteration": count,
        "expectedApprovalDigest": digest,
    },
)

control_result: Documents = st.fixed_dictionaries(
    {
        "schemaVersion": st.just("v1"),
        "envelopeType": st.just("control_result"),
        "traceId": st.none() | text,
        "loopId": loop_id,
        "intent": st.sampled_from(INTENTS),
        "requestedBy": some_text,
        "note": st.none() | text,
        "idempotencyKey": some_text,
        "state": st.sampled_from(["executing", "executed", "done"]),
        "status": st.sampled_from([None, "confirmed", "executed_unconfirmed", "ambiguous", "failed_command"]),
        "reason": st.none() | text,
        "detail": st.none() | text,
        "effect": st.sampled_from(["none", "decision_recorded", "completed"]),
        "executed": st.booleans(),
        "replayed": st.booleans(),
        "command": st.lists(text, max_size=4),
        "exitCode": st.none() | st.integers(-(2**31), 2**31 - 1),
        "timedOut": st.booleans(),
        "output": text,
        "startedAt": st.none() | date_time,
        "finishedAt": st.none() | date_time,
        "confirmation": st.none()
        | st.fixed_dictionaries(
            {
                "intent": st.sampled_from(INTENTS),
                "confirmed": st.booleans(),
                "reason": some_text,
                "attempts": count,
                "timeoutSeconds": st.floats(0, 86400),
                "observedStatus": st.sampled_from([None, *RUN_STATUS]),
                "observedLastEvent": st.none() | text,
                "observedApprovalStatus": st.none() | text,
                "observedActive": st.none() | st.booleans(),
                "observedAt": date_time,
            }
        ),
        "journal": st.fixed_dictionaries({"id": some_text, "sequence": count}),
    }
)


# JSON texts: the same value spelled in the ways JSON allows.

_space = st.sampled_from(["", "", " ", "\n", "\t", "\r\n", "\n    "])
_number = (
    st.integers(-(10**40), 10**40).map(str)
    | st.from_regex(r"-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,2})?", fullmatch=True)
    | st.sampled_from(["1.0", "1e0", "1E+2", "-0", "-0.0", "0e5", "1e-400", "9007199254740993", "18446744073709551616"])
)
_string = st.lists(
    st.characters(exclude_categories=["Cs"], exclude_characters='"\\', min_codepoint=0x20)
    | st.sampled_from([r"\"", r"\\", r"\/", r"\b", r"\f", r"\n", r"\r", r"\t", r"\u0000", r"\u0041", r"\u00E9"])
    | st.sampled_from([r"\ud83d\ude00", r"\uD83D\uDE00", r"\u2028", "{", "}", "[", "]", ",", ":"]),
    max_size=6,
).map(lambda pieces: f'"{"".join(pieces)}"')


def _spaced(inner: SearchStrategy[str]) -> SearchStrategy[str]:
    return st.tuples(_space, inner, _space).map("".join)


def _listed(inner: SearchStrategy[str], most: int) -> SearchStrategy[str]:
    return st.lists(inner, max_size=most).map(",".join) | _space


def _array(inner: SearchStrategy[str]) -> SearchStrategy[str]:
    return _listed(_spaced(inner), 3).map(lambda items: f"[{items}]")


def _object(inner: SearchStrategy[str]) -> SearchStrategy[str]:
    # Few names, so that some stand in an object twice.
    name = _string | st.sampled_from(['"a"', '"b"', r'"\u0061"'])
    member = st.tuples(_spaced(name), _spaced(inner)).map(":".join)
    return _listed(member, 4).map(lambda items: f"{{{items}}}")


_json_texts = st.recursive(
    st.sampled_from(["null", "true", "false"]) | _number | _string,
    lambda inner: _array(inner) | _object(inner),
    max_leaves=5,
)
object_text = _spaced(_object(_json_texts))
"""The text of one JSON object, as another program may have written it."""
