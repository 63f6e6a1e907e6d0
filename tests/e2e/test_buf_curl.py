"""A person with buf curl and nothing else: finds the service by reflection, takes a snapshot, reads the events."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.rpc import error_details_pb2

from sprite_agent import __version__
from sprite_agent.face.server import SERVICE_NAME
from support.repos import LOOP, event, line
from support.runtime import executions
from support.waiting import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import AgentProgram

    from support.repos import LoopFiles

    Curl = Callable[..., subprocess.CompletedProcess[str]]

BUF = Path(sys.executable).with_name("buf")
PROTOS = Path(__file__).parents[2] / "protos"
TOKEN = "Authorization: Bearer token-of-the-tests"  # noqa: S105  # as tests/conftest.py has it


@pytest.fixture
def curl(start_agent: Callable[..., AgentProgram], tmp_path: Path) -> Curl:
    """Calls a method of an agent with a JSON request, as `buf curl` does; with `token=False` without one."""
    address = start_agent("--listen", "127.0.0.1:0").address()

    def call(method: str, request: Any = None, *, token: bool = True) -> subprocess.CompletedProcess[str]:
        words = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--emit-defaults"]
        words += ["-H", TOKEN, "--reflect-header", TOKEN] if token else ["--schema", str(PROTOS)]
        words += ["-d", json.dumps(request)] if request is not None else []
        words.append(f"http://{address}/{SERVICE_NAME}/{method}" if method.isalpha() else f"http://{address}")
        words += [method] if not method.isalpha() else []
        return subprocess.run(
            words,
            check=False,
            timeout=DEADLINE,
            cwd=tmp_path,
            env={"PATH": "", "HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return call


def answers(ended: subprocess.CompletedProcess[str]) -> list[Any]:
    """The responses that were printed, one document after the other."""
    assert ended.returncode == 0, ended.stderr
    decoder, text, found = json.JSONDecoder(), ended.stdout.strip(), []
    while text:
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:].lstrip()
    return found


def failure(ended: subprocess.CompletedProcess[str]) -> Any:
    """The error that was printed."""
    assert ended.returncode != 0
    return json.loads(ended.stderr)


def test_reflection_lists_the_services(curl: Curl) -> None:
    ended = curl("--list-services")

    assert ended.returncode == 0, ended.stderr
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= set(ended.stdout.split())


def test_reflection_lists_the_methods(curl: Curl) -> None:
    ended = curl("--list-methods")

    assert ended.returncode == 0, ended.stderr
    methods = {"GetInfo", "GetSnapshot", "StreamEvents", "ExecuteControl", "GetControl"}
    assert {f"{SERVICE_NAME}/{method}" for method in methods} <= set(ended.stdout.split())


def test_get_info_says_who_answers(curl: Curl, repo: LoopFiles) -> None:
    (info,) = answers(curl("GetInfo", {}))

    assert (info["agentVersion"], info["repoPath"], info["loops"]) == (__version__, str(repo.repo), [LOOP])
    assert info["limits"]["maxControlDeadline"] == "120s"


def test_a_snapshot_has_the_contracts_names(curl: Curl, repo: LoopFiles) -> None:
    repo.append(line(event(n=9007199254740993)))

    (answer,) = answers(curl("GetSnapshot", {"loopId": LOOP, "traceId": "trace-7"}))

    snapshot = answer["snapshot"]
    assert (snapshot["schemaVersion"], snapshot["envelopeType"]) == ("v1", "loop_run_snapshot")
    assert snapshot["traceId"] == {"value": "trace-7"}
    assert snapshot["source"] == {"repoPath": str(repo.repo), "loopId": LOOP}
    assert snapshot["cursor"] == {"eventLineOffset": "1", "eventLineCount": "1"}
    assert answer["resumeToken"].startswith("r1.")


def test_events_are_streamed_to_the_end_of_the_log(curl: Curl, repo: LoopFiles) -> None:
    repo.append(line(event(n=1, data={"big": 2**70})), b"\n", line(event(n=2)))

    batches = answers(curl("StreamEvents", {"loopId": LOOP}))
    rest = answers(curl("StreamEvents", {"loopId": LOOP, "eventLineOffset": "1"}))

    events = [found for batch in batches for found in batch["events"]]
    assert [found["cursor"]["eventLineOffset"] for found in events] == ["1", "3"]
    assert str(2**70) in events[0]["event"]["raw"]["json"]
    assert batches[-1]["caughtUp"] is True
    assert [found["cursor"]["eventLineOffset"] for batch in rest for found in batch["events"]] == ["3"]


def test_a_key_that_nobody_used_is_not_found(curl: Curl) -> None:
    error = failure(curl("GetControl", {"loopId": LOOP, "idempotencyKey": "key-9"}))

    assert error["code"] == "not_found"
    assert "key-9" in error["message"]
    assert [info.reason for info in error_infos(error)] == ["CONTROL_NOT_FOUND"]


def error_infos(error: Any) -> list[Any]:
    """The ErrorInfo among the details of an error, which buf shows as base64."""
    found = [detail["value"] for detail in error["details"] if detail["type"] == "google.rpc.ErrorInfo"]
    return [error_details_pb2.ErrorInfo.FromString(base64.b64decode(f"{value}===")) for value in found]


def test_a_control_without_a_deadline_is_refused(curl: Curl, repo: LoopFiles) -> None:
    repo.ask_approval()
    request = {"loopId": LOOP, "intent": "INTENT_APPROVE", "requestedBy": "ada", "idempotencyKey": "key-1"}

    error = failure(curl("ExecuteControl", request))

    assert (error["code"], executions(repo)) == ("invalid_argument", [])
    assert "deadline" in error["message"]


@pytest.mark.parametrize("method", ["GetInfo", "GetSnapshot", "StreamEvents"])
def test_without_the_token_it_is_refused(curl: Curl, method: str) -> None:
    error = failure(curl(method, {} if method == "GetInfo" else {"loopId": LOOP}, token=False))

    assert error["code"] == "unauthenticated"
    assert "send metadata 'authorization: Bearer <token>'" in error["message"]
