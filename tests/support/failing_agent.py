"""The agent with failpoints and mutations: what tests start in the place of `sprite-agent`.

    python -m support.failing_agent serve ...    sprite-agent's own command line
    python -m support.failing_agent answer       answers controls that it reads, each in a child of its own

$FAILPOINTS is what `failing_executor.Failpoints` reads, $MUTANT one of `mutants.MUTANTS`.

`answer` reads one job a line, forks, and prints what its child answers, then how that
ended: a process that starts in milliseconds, to be killed at any moment.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from sprite_agent.contract.requests import check_request
from sprite_agent.control import executor, executors, failpoints
from sprite_agent.errors import OpsError
from sprite_agent.repo import Repo
from support import failing_executor
from support.mutants import MUTANTS
from support.runtime import executors_of, request
from support.waiting import until

BUG = 70
"""Exit code of a child that has met an error that is none of the agent's."""

_printing = threading.Lock()
"""One line at a time."""


def arm(spec: str, mutant: str | None) -> None:
    """Has this process, and the executors it starts, fail as told."""
    if spec:
        failpoints.hit = failing_executor.Failpoints(spec, "agent").hit
        python = executors.EXECUTOR[:-1]
        setattr(executors, "EXECUTOR", (*python, failing_executor.__file__, executor.__file__, spec))  # noqa: B010  # of another length
    if mutant:
        MUTANTS[mutant]()


def serve_jobs() -> None:
    """Answers jobs until there are no more."""
    check_request(request())  # whatever is made when it is first used is made before the children are
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _do(json.loads(line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        os.write(sys.stdout.fileno(), b"\n")  # what it was killed in the middle of printing
        _print({"ended": os.waitstatus_to_exitcode(status)})


def _do(job: dict[str, Any]) -> None:
    """Asks all the requests of a job at the same moment."""
    if job["held"]:
        _print({"pid": os.getpid()})
        os.read(sys.stdin.fileno(), 1)
    arm(job["failpoints"], job["mutant"])
    state, ahead = Path(job["state"]), job["ahead"]
    repo = Repo(Path(job["repo"]), state_folder=state, runtime=job["runtime"], executors_ahead=ahead)
    if job["recover"] or ahead:
        repo.recover()
    if ahead:
        until(lambda: executors_of(state), "an executor waits")
    together = threading.Barrier(len(job["requests"]))
    callers = [threading.Thread(target=_ask, args=(repo, document, together)) for document in job["requests"]]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()


def _ask(repo: Repo, document: dict[str, Any], together: threading.Barrier) -> None:
    together.wait()
    try:
        _print({"attempt": document["traceId"], "answer": repo.execute(document)})
    except OpsError as error:
        facts = {"reason": error.reason, "executed": error.executed, "retryable": error.retryable}
        _print({"attempt": document["traceId"], "error": facts})
    except BaseException:  # noqa: BLE001  # a bug: the test is told by the exit code
        traceback.print_exc()
        os._exit(BUG)


def _print(document: dict[str, Any]) -> None:
    text = memoryview(json.dumps(document).encode() + b"\n")
    with _printing:
        while text:
            text = text[os.writev(sys.stdout.fileno(), [text]) :]  # no write, which may be made to fail


if __name__ == "__main__":
    if sys.argv[1] == "answer":
        serve_jobs()
    else:
        arm(os.environ.get("FAILPOINTS", ""), os.environ.get("MUTANT"))
        from sprite_agent import cli

        cli.main()
