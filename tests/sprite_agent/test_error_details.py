"""Every error crosses the wire as itself: class, message, values, violations, and what is known of its attempt."""

from __future__ import annotations

import pytest
from google.protobuf import any_pb2, wrappers_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from sprite_agent.contract.error_details import DOMAIN, from_status, internal_error, to_status
from sprite_agent.errors import BY_REASON, ContractError, InternalError, LoopNotFound, OpsError, RunMismatch

MESSAGE = "line 7 of the log is 3 bytes too long: \u00e9"
DETAILS = {"line": "7", "path": "run.iteration", "loopId": "demo"}
VIOLATIONS = (("loop_id", "too long"), ("note", "has a line break"))


def made(reason: str, message: str = MESSAGE, **members: object) -> OpsError:
    """An error of the class with that reason; some classes have constructors of their own."""
    cls = BY_REASON[reason]
    error = cls.__new__(cls)
    OpsError.__init__(error, message, **{"details": DETAILS, "violations": VIOLATIONS, "retry_after": 1.5, **members})  # type: ignore[arg-type]  # by name
    return error


def sent(error: OpsError) -> status_pb2.Status:
    """The status as it arrives."""
    return status_pb2.Status.FromString(to_status(error).SerializeToString())


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_the_class_that_leaves_is_the_class_that_arrives_with_all_it_holds(reason: str) -> None:
    error = made(reason)

    status = sent(error)
    arrived = from_status(status)

    assert type(arrived) is BY_REASON[reason]
    assert status.code == code_pb2.Code.Value(error.status)
    assert (arrived.message, str(arrived)) == (MESSAGE, MESSAGE)
    assert (arrived.details, arrived.violations, arrived.retry_after) == (DETAILS, VIOLATIONS, 1.5)
    assert (arrived.status, arrived.retryable, arrived.executed) == (error.status, error.retryable, error.executed)
    assert arrived.error_id is None


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_an_error_that_holds_no_more_than_its_message_arrives_so(reason: str) -> None:
    arrived = from_status(sent(made(reason, details={}, violations=(), retry_after=None)))

    assert (arrived.details, arrived.violations, arrived.retry_after) == ({}, (), None)


@pytest.mark.parametrize(("trailer", "executed"), [("true", True), ("false", False), ("unknown", None), ("1", None)])
def test_whether_the_attempt_ran_anything_is_what_the_trailer_says(trailer: str, executed: bool | None) -> None:  # noqa: FBT001  # a case
    arrived = from_status(sent(made("CONTROL_BUSY")), executed=trailer, error_id="a1b2")

    assert (arrived.executed, arrived.error_id) == (executed, "a1b2")


def test_a_contract_violation_keeps_its_path() -> None:
    arrived = from_status(sent(ContractError("must be a string", path="event.name")))

    assert isinstance(arrived, ContractError)
    assert (arrived.path, arrived.message) == ("event.name", "event.name: must be a string")


def test_a_failed_precondition_names_its_type_and_loop() -> None:
    failure = error_details_pb2.PreconditionFailure()

    assert any(
        detail.Unpack(failure) for detail in sent(RunMismatch("run 2 is at hand", details={"loopId": "demo"})).details
    )
    (violation,) = failure.violations
    assert (violation.type, violation.subject, violation.description) == ("RUN_MISMATCH", "demo", "run 2 is at hand")


def test_an_internal_error_says_its_id_and_that_it_is_unknown_what_was_run() -> None:
    arrived = from_status(sent(internal_error("a1b2")))

    assert isinstance(arrived, InternalError)
    assert (arrived.executed, arrived.message) == (None, "internal error; the agent's log has it under a1b2")


@pytest.mark.parametrize("text", ["x", "\u00e9", "\u4e16", "\U0001f642"])
@pytest.mark.parametrize("reason", ["LOOP_NOT_FOUND", "RUN_MISMATCH", "CONTROL_BUSY"])
def test_of_long_messages_and_values_the_beginning_arrives(reason: str, text: str) -> None:
    long = text * 10_000
    error = made(
        reason,
        long,
        details={f"name{number}": long for number in range(20)},
        violations=[(long, long) for _ in range(20)],
    )

    arrived = from_status(sent(error))

    assert arrived.details.keys() == {f"name{number}" for number in range(8)}
    assert len(arrived.violations) == 8
    for cut, most in (
        (arrived.message, 512),
        *((value, 256) for value in arrived.details.values()),
        *((value, 256) for violation in arrived.violations for value in violation),
    ):
        assert cut.startswith(text * 8)
        assert len(cut) <= most


@pytest.mark.parametrize("text", ["x", "\u00e9", "\u4e16", "\U0001f642"])
def test_the_largest_status_fits_into_trailers(text: str) -> None:
    long = text * 10_000
    error = LoopNotFound(
        long,
        details={f"name{number}": long for number in range(20)},
        violations=[(f"field{number}", long) for number in range(20)],
    )

    status = to_status(error)

    # gRPC sends the message once more, percent-encoded; past 8 KiB in all it may refuse the trailers.
    encoded = len(status.message.encode()) * (1 if text == "x" else 3)
    assert status.ByteSize() + encoded < 8000


def with_details(*details: any_pb2.Any) -> status_pb2.Status:
    return status_pb2.Status(code=code_pb2.NOT_FOUND, message="no such thing", details=details)


def packed(reason: str, domain: str) -> any_pb2.Any:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
    return detail


def other_type() -> any_pb2.Any:
    detail = any_pb2.Any()
    detail.Pack(wrappers_pb2.StringValue(value="LOOP_NOT_FOUND"))
    return detail


@pytest.mark.parametrize(
    "status",
    [
        pytest.param(status_pb2.Status(), id="empty"),
        pytest.param(with_details(), id="without details"),
        pytest.param(with_details(other_type()), id="details of another type"),
        pytest.param(with_details(packed("LOOP_NOT_FOUND", "example.com")), id="another domain"),
        pytest.param(with_details(packed("LOOP_NOT_FOUND", "")), id="no domain"),
        pytest.param(with_details(packed("", DOMAIN)), id="no reason"),
        pytest.param(with_details(packed("FROM_THE_FUTURE", DOMAIN)), id="unknown reason"),
        pytest.param(
            with_details(any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")),
            id="broken details",
        ),
    ],
)
def test_a_status_that_is_not_the_agents_is_a_contract_violation(status: status_pb2.Status) -> None:
    with pytest.raises(ContractError):
        from_status(status)
