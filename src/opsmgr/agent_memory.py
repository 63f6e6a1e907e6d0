"""What the manager remembers of an agent: how far its journal had got, and what was found of it.

An agent's disk may be restored to an earlier moment; then its journal goes backwards, and
a key that was run counts as new. The manager is outside and remembers: it freezes control
of the loop until an operator has looked into it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import msgspec

from opsmgr import store as files
from opsmgr.errors import AgentStateRolledBack, InputInvalid
from sprite_agent.contract import clock
from sprite_agent.contract.agent_state import Finding, JournalHead
from sprite_agent.contract.secrets import changing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from opsmgr.store import LoopStore

Escalation = tuple[str, dict[str, Any]]
"""Category and evidence."""


@dataclass(kw_only=True, slots=True)
class AgentMemory:
    """The memory of one loop's agent. Load it, let it look at an answer, save it."""

    journal: JournalHead | None = None
    frozen: str | None = None
    """Why control is frozen; None: it is not."""
    findings: list[Finding] = field(default_factory=list)
    """Those of the last snapshot."""
    frozen_before: str | None = field(default=None, compare=False)
    """`frozen` as it was loaded: unless it has changed since, it is not this memory's word that counts."""

    def look_at(self, now: JournalHead | None) -> list[Escalation]:
        """Takes note of how far the journal is said to have got; a step back freezes control."""
        before = self.journal
        if now is None or now == before:
            return []
        self.journal = now
        message = None if before is None else _step_back(before, now)
        if message is None or before is None:
            return []
        self.frozen = message
        return [("agent_state_rolled_back", {"message": message, "before": before._asdict(), "now": now._asdict()})]

    def look_into(self, findings: Iterable[Finding]) -> list[Escalation]:
        """Takes note of a snapshot's findings; those that are new are escalated."""
        known, self.findings = self.findings, list(findings)
        return [(found.reason.lower(), {"message": found.message}) for found in self.findings if found not in known]

    def refuse_if_frozen(self) -> None:
        """Returns unless control is frozen.

        Raises:
            AgentStateRolledBack
        """
        if self.frozen is not None:
            raise AgentStateRolledBack(f"control is frozen: {self.frozen}; look into it, then 'opsmgr unfreeze'")


def escalate(
    store: LoopStore, found: Iterable[Escalation], *, loop_id: str, trace_id: str | None, transport: str
) -> None:
    """Adds to the log of what an operator has to hear of.

    Raises:
        InputInvalid: it can't be written.
    """
    for category, evidence in found:
        files.append(
            store.escalations,
            {
                "timestamp": clock.now(),
                "loopId": loop_id,
                "traceId": trace_id,
                "category": category,
                "transport": transport,
                "evidence": evidence,
            },
        )


def load_memory(store: LoopStore) -> AgentMemory:
    """The memory as it was saved; an empty one where there is none.

    Raises:
        InputInvalid: the file can't be read, or is no such memory.
    """
    try:
        saved = msgspec.convert(files.load(store.agent) or {}, _Saved)
    except msgspec.ValidationError as error:
        raise InputInvalid(f"{store.agent} is no memory of an agent: {error}") from error
    head = saved.get("journal")
    return AgentMemory(
        journal=None if head is None else JournalHead(**head),
        frozen=saved.get("frozen"),
        frozen_before=saved.get("frozen"),
        findings=[Finding(**found) for found in saved.get("findings", ())],
    )


def save_memory(store: LoopStore, memory: AgentMemory) -> None:
    """Saves the memory; what another manager has saved since it was loaded, or an operator said, is not undone.

    Raises:
        InputInvalid: the file can't be read or written.
    """
    with _changing(store):
        known = load_memory(store)
        if memory.frozen == memory.frozen_before:
            memory.frozen = known.frozen
        ahead = memory.journal is None or known.journal is None or known.journal.sequence > memory.journal.sequence
        if ahead and memory.frozen is None:
            memory.journal = known.journal or memory.journal
        _write(store, memory)


def unfreeze(store: LoopStore) -> None:
    """Lets control go on.

    Raises:
        InputInvalid: the file can't be read or written.
    """
    with _changing(store):
        memory = load_memory(store)
        memory.frozen = None
        _write(store, memory)


class _SavedHead(TypedDict):
    id: str
    sequence: int
    head: str


class _SavedFinding(TypedDict):
    reason: str
    message: str


class _Saved(TypedDict, total=False):
    """What is taken from the file."""

    journal: _SavedHead | None
    frozen: str | None
    findings: list[_SavedFinding]


@contextlib.contextmanager
def _changing(store: LoopStore) -> Iterator[None]:
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        with changing(store.agent):
            yield
    except OSError as error:
        raise InputInvalid(f"{store.folder} can't be used: {error.strerror}") from error


def _write(store: LoopStore, memory: AgentMemory) -> None:
    files.save(
        store.agent,
        {
            "schemaVersion": "v1",
            "updatedAt": clock.now(),
            "journal": None if memory.journal is None else memory.journal._asdict(),
            "frozen": memory.frozen,
            "findings": [found._asdict() for found in memory.findings],
        },
    )


def _step_back(before: JournalHead, now: JournalHead) -> str | None:
    """What is wrong with going from one head to another; None: nothing."""
    if now.id != before.id:
        return f"the agent has another journal, {now.id}: it does not know what was run under {before.id}"
    if now.sequence < before.sequence:
        return f"the agent's journal went back from entry {before.sequence} to {now.sequence}"
    if now.sequence == before.sequence and now.head != before.head:
        return f"the agent's journal has another entry {now.sequence} than before"
    return None
