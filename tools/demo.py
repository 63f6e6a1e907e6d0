"""The main job on real input: a run, an agent, a manager that watches, approves, cancels and compares.

A scratch repo, a Superloop runtime (the stand-in of the tests, or the real superloop.sh
where SUPERLOOP_BIN points to one), a real sprite-agent on a real socket with a token, and
opsmgr over both transports. Exits with 0 when everything came out as it should.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

BIN = Path(sys.executable).parent
STAND_IN = Path(__file__).resolve().parent.parent / "tests" / "standin" / "superloop"
LOOP = "demo"
PATIENCE = 25.0
"""Seconds to wait for any one thing."""


class Runtime:
    """Superloop's command in the scratch repo: the stand-in, or the real one."""

    def __init__(self, repo: Path) -> None:
        given = os.environ.get("SUPERLOOP_BIN")
        self.command = str(Path(given).resolve()) if given else str(STAND_IN)
        self.is_real = self.command != str(STAND_IN)  # the README's first five minutes name the stand-in there
        self._repo = repo
        self._pace = repo / ".superloop" / "demo-pace"

    def prepare(self) -> None:
        """Makes the repo one that the runtime can work in."""
        (self._repo / ".superloop" / "loops" / LOOP).mkdir(parents=True)
        if self.is_real:
            self._configure()

    def start(self, *, endless: bool = False) -> subprocess.Popen[bytes]:
        """Starts a run, or goes on with one that was decided on."""
        if self.is_real:
            self._pace.write_text("600" if endless else "0.2")
            more = []
        else:
            more = ["--hang"] if endless else ["--pace", "0.06"]
        return subprocess.Popen(
            [self.command, "run", "--repo", str(self._repo), "--loop", LOOP, *more],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )

    def _configure(self) -> None:
        """The real runtime with a runner that needs no model: it waits, and promises completion."""
        for command in (["git", "init", "-q"], [self.command, "init", "--repo", str(self._repo), "--force"]):
            subprocess.run(command, cwd=self._repo, check=True, capture_output=True)
        runner = self._repo / ".superloop" / "demo-runner"
        runner.write_text(
            f'#!/bin/sh\ncat >/dev/null\nsleep "$(cat {self._pace})"\n'
            'printf "<promise>SUPERLOOP_COMPLETE</promise>\\n" | tee "$1"\n'
        )
        runner.chmod(0o755)
        (self._repo / ".superloop" / "specs" / "demo.md").write_text("# Demo\nNothing to do.\n")
        roles = ["planner", "implementer", "tester", "reviewer"]
        role = {"runner": "demo", "model": "none", "thinking": "none"}
        loop = {
            "id": LOOP,
            "spec_file": ".superloop/specs/demo.md",
            "completion_promise": "SUPERLOOP_COMPLETE",
            "max_iterations": 3,
            "checklists": [],
            "tests": {"mode": "off", "commands": []},
            "evidence": {"enabled": False},
            "approval": {"enabled": True, "require_on_completion": True},
            "timeouts": {"enabled": False},
            "stuck": {"enabled": False},
            "roles": roles,
        }
        config = {
            "runners": {"demo": {"command": [str(runner)], "args": ["{last_message_file}"], "prompt_mode": "stdin"}},
            "role_defaults": dict.fromkeys(roles, role),
            "loops": [loop],
        }
        (self._repo / ".superloop" / "config.json").write_text(json.dumps(config, indent=2))


class Manager:
    """opsmgr, as an operator would call it."""

    def __init__(self, repo: Path, address: str, token_file: Path, runtime: str, state: Path) -> None:
        self._where = ["--repo", str(repo), "--loop", LOOP]
        self._service = ["--transport", "sprite_service", "--service-target", address]
        self._service += ["--service-token-file", str(token_file)]
        self._local = ["--transport", "local", "--superloop-bin", runtime, "--state-dir", str(state)]

    def call(self, name: str, *options: str, local: bool = False) -> list[dict[str, Any]]:
        """The documents that a command prints."""
        command = [str(BIN / "opsmgr"), name, *self._where, *(self._local if local else self._service), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        if done.returncode:
            raise SystemExit(f"demo: opsmgr {name} ended with {done.returncode}: {done.stderr or done.stdout}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def watch(self) -> subprocess.Popen[str]:
        """Starts opsmgr watch from the first line on; it prints NDJSON."""
        command = [str(BIN / "opsmgr"), "watch", *self._where, *self._service, "--from-start"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


class Watched:
    """The events that `opsmgr watch` has delivered so far; printed as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait_for(self, name: str, times: int = 1) -> None:
        """Returns once the event was seen so often."""
        with self._news:
            seen = self._news.wait_for(lambda: self.count(name) >= times, PATIENCE)
        must(seen, f"no event {name} within {PATIENCE:.0f} s")

    def count(self, name: str) -> int:
        """How often the event was seen."""
        return sum(envelope["event"]["name"] == name for envelope in self.events)

    def _read(self) -> None:
        for line in self._process.stdout or ():
            envelope = json.loads(line)
            event = envelope["event"]
            what = " ".join(filter(None, (event["name"], event["role"], event["status"])))
            with self._news:
                say(f"  {dim(event['timestamp'])}  #{envelope['cursor']['eventLineOffset']:<3} {what}")
                self.events.append(envelope)
                self._news.notify_all()


def main() -> None:
    """Plays the demo."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="opsmgr-demo-") as scratch, contextlib.ExitStack() as stack:
        scene = set_up(Path(scratch).resolve(), stack)
        headline("opsmgr watch: the events, live")
        scene.watched.wait_for("approval_requested")
        play_approval(scene, stack)
        play_cancel(scene, stack)
        headline("opsmgr reconcile: the final projection")
        [final] = scene.manager.call("reconcile")
        flags = [name for name, raised in final["divergence"]["flags"].items() if raised]
        say(f"  status {bold(final['projection']['status'])}, confidence {final['transition']['confidence']}")
        say(f"  divergence {', '.join(flags) or 'none'}; health {final['health']['status']}")
        say("  (the cancel stopped a working run, and the runtime writes no event for that: hence the divergence)")
        headline("Both transports, side by side")
        count = compare(scene.manager)
        end(scene.watcher)
        end(scene.agent)
        must(scene.agent.returncode == 0, f"sprite-agent ended with {scene.agent.returncode}")
    say(f"\n{bold('All as it should be')}: {count} envelopes equal, in {time.monotonic() - began:.0f} s.\n")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that plays a part."""

    runtime: Runtime
    agent: subprocess.Popen[bytes]
    manager: Manager
    watcher: subprocess.Popen[str]
    watched: Watched


def set_up(scratch: Path, stack: contextlib.ExitStack) -> Scene:
    """Starts a run, an agent and a watcher; `stack` ends them."""
    repo, state = scratch / "repo", scratch / "state"
    runtime = Runtime(repo)
    runtime.prepare()
    headline("A run starts, and an agent serves it")
    say(f"  runtime: {'the real superloop.sh' if runtime.is_real else 'the stand-in of the tests'}")
    stack.callback(end, runtime.start())
    wait_until((repo / ".superloop" / "loops" / LOOP / "events.jsonl").exists, "the event log")
    token_file, digests = make_token(scratch)
    command = [str(BIN / "sprite-agent"), "serve", "--repo", str(repo), "--listen", "127.0.0.1:0"]
    command += ["--state-dir", str(state), "--token-file", str(digests), "--superloop-bin", runtime.command]
    log = scratch / "agent.log"
    with log.open("w") as output:
        agent = subprocess.Popen(command, stderr=output)
    stack.callback(end, agent)
    wait_until(lambda: "serving" in log.read_text() or agent.poll() is not None, "the agent")
    must(agent.poll() is None, f"sprite-agent did not start: {log.read_text()}")
    address = next(
        entry["address"] for line in log.read_text().splitlines() if "address" in (entry := json.loads(line))
    )
    say(f"  sprite-agent: {address}, with a token")
    manager = Manager(repo, address, token_file, runtime.command, state)
    watcher = manager.watch()
    stack.callback(end, watcher)
    return Scene(runtime=runtime, agent=agent, manager=manager, watcher=watcher, watched=Watched(watcher))


def make_token(folder: Path) -> tuple[Path, Path]:
    """A token for the manager, in a file of its own, and the file by which the agent knows it."""
    token, digests = folder / "token", folder / "tokens"
    command = [str(BIN / "sprite-agent"), "keys", "token", "--id", "demo", "--scope", "read", "--scope", "control"]
    done = subprocess.run([*command, "--file", str(digests)], capture_output=True, text=True, check=True)
    token.touch(mode=0o600)
    token.write_text(done.stdout)
    return token, digests


def play_approval(scene: Scene, stack: contextlib.ExitStack) -> None:
    """Shows the pending approval, approves it, sees it confirmed, and asks again with the same key."""
    headline("The pending approval")
    [snapshot] = scene.manager.call("snapshot")
    approval = snapshot["runtime"]["approval"]
    say(f"  run {approval['run_id']}, iteration {approval['iteration']}, status {bold(approval['status'])}")
    say(f"  gates: {', '.join(f'{name} {result}' for name, result in snapshot['health']['gates'].items())}")

    headline("opsmgr control --intent approve, and the run goes on to consume it")
    approve = ["control", "--intent", "approve", "--by", "demo", "--idempotency-key", "demo-approve"]
    approve += ["--confirm", "decision", "--expected-approval-digest", snapshot["artifacts"]["approval"]["sha256"]]
    [decision] = scene.manager.call(*approve)
    tell_result(decision)
    stack.callback(end, scene.runtime.start())
    [confirmed] = scene.manager.call("confirm", "--intent", "approve", "--interval-seconds", "0.2")
    say(f"  {bold('completed')}: {confirmed['reason']}, status {confirmed['observedStatus']}")
    scene.watched.wait_for("loop_complete")
    [again] = scene.manager.call(*approve)
    say(f"  asked again with the same key: replayed {again['replayed']}, nothing was run twice")
    must(decision["status"] == "confirmed" and again["replayed"], "the approval did not come out as it should")


def play_cancel(scene: Scene, stack: contextlib.ExitStack) -> None:
    """Starts a second run and cancels it."""
    headline("A second run, and opsmgr control --intent cancel")
    roles = scene.watched.count("role_start")
    run = scene.runtime.start(endless=True)
    stack.callback(end, run)
    scene.watched.wait_for("role_start", times=roles + 1)
    [cancelled] = scene.manager.call("control", "--intent", "cancel", "--by", "demo")
    tell_result(cancelled)
    must(cancelled["status"] == "confirmed", "the cancel did not come out as it should")
    run.wait(PATIENCE)


def compare(manager: Manager) -> int:
    """Compares what both transports say; gives how many envelopes that were."""
    total = 0
    for name, options in (("snapshot", ()), ("events", ("--from-start",))):
        service, local = (untimed(manager.call(name, *options, local=local)) for local in (False, True))
        must(service == local, f"{name} differs between the transports")
        say(f"  {name}: {len(service)} envelope{'s' if len(service) > 1 else ''}, {bold('equal')}")
        total += len(service)
    return total


def untimed(envelopes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Envelopes without the moment they were built."""
    return [{**envelope, "emittedAt": None} for envelope in envelopes]


def end(process: subprocess.Popen[Any]) -> None:
    """Leaves no process behind."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def must(holds: bool, otherwise: str) -> None:  # noqa: FBT001  # reads like the sentence it is
    """Ends the demo as failed unless `holds`."""
    if not holds:
        raise SystemExit(f"demo: {otherwise}")


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Returns once `holds()` is true."""
    until = time.monotonic() + PATIENCE
    while not holds():
        must(time.monotonic() < until, f"{what} is not there after {PATIENCE:.0f} s")
        time.sleep(0.02)


def tell_result(result: dict[str, Any]) -> None:
    """A control result in a line."""
    say(f"  {bold(result['status'])}: {result['reason']}; command exit {result['exitCode']}, effect {result['effect']}")


def headline(text: str) -> None:
    """A step begins."""
    say(f"\n{bold(text)}")


def bold(text: str) -> str:
    """Stands out on a terminal."""
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def dim(text: str) -> str:
    """Steps back on a terminal."""
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def say(text: str) -> None:
    """A line to whoever watches."""
    print(text, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the processes are ended
    main()
