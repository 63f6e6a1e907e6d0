"""Who is let in, by files that can change at any time: what they say, and what stays in force when they break."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from sprite_agent.face.credential_files import INTERVAL, CredentialFiles, CredentialSources
from sprite_agent.face.credential_text import keys_text, parse_keys, parse_tokens, token_line
from sprite_agent.face.credentials import (
    SCOPES,
    Credentials,
    agreed_token,
    allows,
    allows_some_control,
    digest_of,
    new_token,
)
from support.certificates import put
from support.signing import Manager, put_keys, put_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = 1_800_000_000.0
DIGEST = "sha256:" + "ab" * 32

# Scopes.


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        ({"read"}, {"read"}),
        ({"control"}, {"control", "control:cancel", "control:approve", "control:reject"}),
        ({"control:cancel"}, {"control:cancel"}),
        ({"read", "control:approve"}, {"read", "control:approve"}),
        (set(), set()),
    ],
)
def test_a_scope_allows_what_it_says_and_control_every_kind_of_it(scopes: set[str], allowed: set[str]) -> None:
    assert {needed for needed in SCOPES if allows(scopes, needed)} == allowed
    assert allows_some_control(scopes) == any(needed.startswith("control") for needed in allowed)


# Tokens.


def test_a_new_token_is_found_by_its_text_and_by_no_other() -> None:
    text, token = new_token("t1", ["read"], until=NOW)
    known = Credentials(tokens=(new_token("t0", ["read"])[1], token))

    assert known.find_token(text, NOW) is token
    for other in (text[:-1], f"{text}A", text.lower(), text.replace("t1", "t0"), "", "spr1.t1.", "\udcff"):
        assert known.find_token(other, NOW) is None
    assert known.find_token(text, NOW + 1) is None


def test_whatever_comes_is_compared_with_every_token_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """H15: neither a right beginning nor a known id makes an answer quicker or slower."""
    texts, tokens = zip(*(new_token(f"t{number}", ["read"]) for number in range(3)), strict=True)
    compared: list[tuple[int, int]] = []
    constant_time = hmac.compare_digest

    def counted(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return constant_time(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    for text in (texts[0], texts[2], texts[0][:-1], "spr1.t9.x", ""):
        Credentials(tokens=tokens).find_token(text, NOW)

    assert compared == [(32, 32)] * 15


def test_new_tokens_are_long_and_never_the_same() -> None:
    texts = {new_token("t1", ["read"])[0] for _ in range(100)}

    assert len(texts) == 100
    assert {len(text) for text in texts} == {len("spr1.t1.") + 43}


def test_a_digest_of_something_that_could_be_guessed_lets_nobody_in() -> None:
    for guessable in ("hunter2", "spr1.t1.hunter2"):
        (token,) = parse_tokens(f"t1 sha256:{digest_of(guessable).hex()} read".encode())
        assert Credentials(tokens=(token,)).find_token(guessable, NOW) is None


def test_what_was_agreed_on_may_be_any_text_and_is_good_for_everything() -> None:
    token = agreed_token("hunter2")

    assert Credentials(tokens=(token,)).find_token("hunter2", NOW) is token
    assert all(allows(token.scopes, needed) for needed in SCOPES)


@pytest.mark.parametrize("until", [None, NOW])
@pytest.mark.parametrize("scopes", [["read"], ["control:reject", "read"], list(SCOPES)])
def test_a_line_says_what_the_token_is(scopes: list[str], until: float | None) -> None:
    text, token = new_token("t-1_a", scopes, until=until)
    line = token_line(token)

    assert parse_tokens(line.encode()) == (token,)
    assert text not in line
    assert text.rpartition(".")[2] not in line


def test_comments_and_empty_lines_say_nothing() -> None:
    text = f"# ours\n\n  a {DIGEST} read  # watches\n\t\nb\t{DIGEST} control,read until=2027-01-15T09:00:00+01:00\r\n#"

    first, second = parse_tokens(text.encode())

    assert (first.id, sorted(first.scopes), first.until) == ("a", ["read"], None)
    assert (second.id, sorted(second.scopes), second.until) == ("b", ["control", "read"], NOW)
    assert parse_tokens(b"") == ()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("spr1.t1.s3cret", "is not ID sha256:HEX SCOPES"),
        ("s3cret", "is not ID sha256:HEX SCOPES"),
        ("a s3cret read", "is not ID sha256:HEX SCOPES"),
        (f"a {DIGEST}", "is not ID sha256:HEX SCOPES"),
        (f"a {DIGEST} read until=2027-01-15T08:00:00Z s3cret", "is not ID sha256:HEX SCOPES"),
        (f"a {DIGEST[:-1]} read", "is not ID sha256:HEX SCOPES"),
        (f"a {DIGEST.upper()} read", "is not ID sha256:HEX SCOPES"),
        (f"a.s3cret {DIGEST} read", "has an id that is not 1 to 64"),
        (f"{'a' * 65} {DIGEST} read", "has an id that is not 1 to 64"),
        (f"a {DIGEST} s3cret", "has other scopes than read, control, control:cancel"),
        (f"a {DIGEST} read,", "has other scopes than"),
        (f"a {DIGEST} read, control", "ends in something else than until=TIME"),
        (f"a {DIGEST} read s3cret", "ends in something else than until=TIME"),
        (f"a {DIGEST} read until=s3cret", "ends in something else than until=TIME"),
        (f"a {DIGEST} read until=2027-01-15T08:00:00", "ends in something else than until=TIME"),
        (f"a {DIGEST} read until=0001-01-01T00:00:00+14:00", "ends in something else than until=TIME"),
        (f"a {DIGEST} read until=9999-12-31T23:59:59-14:00", "ends in something else than until=TIME"),
        (f"ok {DIGEST} control", "has the id of another: ok"),
    ],
)
def test_a_line_that_makes_no_sense_is_refused_by_its_number_and_nothing_of_it_is_told(line: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"^line 3 {what}") as caught:
        parse_tokens(f"# s3cret\nok {DIGEST} read\n{line}\n".encode())

    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(ValueError, match="it is no text"):
        parse_tokens(b"\xff")


# Trusted keys.


def test_an_entry_says_what_the_key_is() -> None:
    keys = [
        Manager().trusted(),
        Manager(key_id="m2", issuer="opsmgr-2").trusted(["control:cancel"], not_before=NOW, not_after=NOW + 1),
    ]

    found = parse_keys(keys_text(keys).encode())

    assert list(found.values()) == keys
    assert list(found) == ["m1", "m2"]
    assert parse_keys(b'{"keys": []}') == {}


ENTRY: dict[str, Any] = json.loads(keys_text([Manager().trusted()]))["keys"][0]


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ([{**ENTRY, "scopes": []}], "key m1 has other scopes than"),
        ([{**ENTRY, "scopes": ["write"]}], "key m1 has other scopes than"),
        ([{**ENTRY, "x": "AAAA"}], "key m1 has an x that is no Ed25519 key"),
        ([{**ENTRY, "x": f"{ENTRY['x']}="}], "key m1 has an x that is no Ed25519 key"),
        ([ENTRY, ENTRY], "it has two keys m1"),
        ([{**ENTRY, "d": "x"}], "unknown field `d`"),
        ([{**ENTRY, "kid": "a b"}], "kid"),
        ([{**ENTRY, "iss": ""}], "iss"),
        ([{**ENTRY, "naf": "2027"}], "naf"),
        ([{**ENTRY, "naf": 1_767_225_600_000}], "naf"),  # milliseconds
        ([{name: value for name, value in ENTRY.items() if name != "scopes"}], "missing required field `scopes`"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(entries: list[dict[str, Any]], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        parse_keys(json.dumps({"keys": entries}).encode())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"keys": {}}', b'{"keys": [], "more": 1}', b"\xff"])
def test_what_is_no_file_of_keys_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^it is not \{\"keys\": \[\.\.\.\]\}: "):
        parse_keys(content)


# Files that change.


class Scene:
    """Both files, an agent's view of them, and its clock."""

    def __init__(self, folder: Path) -> None:
        self.tokens = folder / "tokens"
        self.keys = folder / "keys.json"
        self.now = 0.0
        self.first = put_tokens(self.tokens, t1=["read"])["t1"]
        put_keys(self.keys, Manager().trusted())
        self.files = CredentialFiles(
            CredentialSources(token_file=self.tokens, trusted_keys=self.keys), now=lambda: self.now
        )

    def later(self) -> Credentials:
        """What is in force at the next look."""
        self.now += INTERVAL
        return self.files.in_force()

    def knows(self, text: str) -> bool:
        """Whether a token is let in after the next look."""
        return self.later().find_token(text, NOW) is not None


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_file_that_has_changed_is_noticed_without_a_restart(scene: Scene) -> None:
    second = put_tokens(scene.tokens, t2=["read"])["t2"]
    put_keys(scene.keys, Manager(key_id="m2").trusted())

    assert scene.knows(second)
    assert not scene.knows(scene.first)
    assert list(scene.later().keys) == ["m2"]


def test_both_keys_count_while_one_takes_the_place_of_the_other(scene: Scene) -> None:
    seen = []
    for names in (["m1"], ["m1", "m2"], ["m2"]):
        put_keys(scene.keys, *(Manager(key_id=name).trusted() for name in names))
        seen.append(list(scene.later().keys))

    assert seen == [["m1"], ["m1", "m2"], ["m2"]]


def test_the_digest_is_that_of_the_file_of_keys(scene: Scene, tmp_path: Path) -> None:
    assert scene.later().keys_digest == hashlib.sha256(scene.keys.read_bytes()).hexdigest()
    before = scene.later().keys_digest
    put_keys(scene.keys, Manager(key_id="m2").trusted())
    assert scene.later().keys_digest not in {before, None}
    assert CredentialFiles(CredentialSources(token_file=scene.tokens)).in_force().keys_digest is None


def test_the_files_are_looked_at_once_a_second_or_when_it_is_asked_for(scene: Scene) -> None:
    second = put_tokens(scene.tokens, t2=["read"])["t2"]
    scene.now += INTERVAL / 2
    assert scene.files.in_force().find_token(second, NOW) is None

    scene.files.reload()

    assert scene.files.in_force().find_token(second, NOW)


def test_a_change_that_leaves_size_and_date_as_they_were_is_noticed(scene: Scene) -> None:
    before = scene.tokens.stat()
    scene.tokens.write_bytes(scene.tokens.read_bytes().replace(b"t1 ", b"t2 "))
    os.utime(scene.tokens, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert scene.later().tokens[0].id == "t2"


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "a folder": put_folder,
    "no sense": lambda path: put(path, b"s3cret", mode=0o600),
    "half written": lambda path: put(path, path.read_bytes()[:-9], mode=0o600),
    "others may change it": lambda path: path.chmod(0o620),
    "everyone may change it": lambda path: path.chmod(0o602),
}


@pytest.mark.parametrize("which", ["tokens", "keys"])
@pytest.mark.parametrize("how", BROKEN)
def test_while_a_file_cannot_be_used_the_old_credentials_stay_and_the_log_says_so_once(
    scene: Scene, which: str, how: str
) -> None:
    path: Path = getattr(scene, which)
    before = scene.files.in_force()
    with structlog.testing.capture_logs() as log:
        BROKEN[how](path)
        for _ in range(3):
            assert scene.later() is before
        said = [dict(entry) for entry in log]
        if path.is_dir():
            path.rmdir()
        put_tokens(scene.tokens, t2=["read"])
        put_keys(scene.keys, Manager(key_id="m2").trusted())
        after = scene.later()

    assert [entry["event"] for entry in said] == ["credentials: kept the old ones"]
    assert said[0]["log_level"] == "error"
    assert str(path) in said[0]["reason"]
    assert "s3cret" not in str(said)
    assert ([token.id for token in after.tokens], list(after.keys)) == (["t2"], ["m2"])
    assert log[-1] == {
        "event": "credentials: took the new ones",
        "log_level": "info",
        "tokens": 1,
        "keys": 1,
    }


def test_one_file_that_cannot_be_used_holds_back_the_other(scene: Scene) -> None:
    put(scene.tokens, b"s3cret", mode=0o600)
    put_keys(scene.keys, Manager(key_id="m2").trusted())

    assert list(scene.later().keys) == ["m1"]


def test_files_without_anything_let_nobody_in(scene: Scene) -> None:
    put(scene.tokens, b"", mode=0o600)
    put_keys(scene.keys)

    assert not scene.knows(scene.first)
    assert scene.later() == Credentials(keys_digest=scene.later().keys_digest)
    assert scene.files.sources.need_token


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o444])
def test_the_files_may_be_read_by_everyone(scene: Scene, mode: int) -> None:
    scene.tokens.chmod(mode)
    scene.keys.chmod(mode)

    assert CredentialFiles(scene.files.sources).in_force().tokens


@pytest.mark.parametrize("which", ["tokens", "keys"])
@pytest.mark.parametrize("how", BROKEN)
def test_an_agent_does_not_start_with_files_that_cannot_be_used(scene: Scene, which: str, how: str) -> None:
    BROKEN[how](getattr(scene, which))

    with pytest.raises(ValueError, match=str(getattr(scene, which))) as caught:
        CredentialFiles(scene.files.sources)
    assert "s3cret" not in str(caught.value)


def test_nothing_of_credentials_is_shown_by_accident(scene: Scene) -> None:
    shown = f"{scene.later()!r} {scene.files.sources!r} {new_token('t', ['read'])[1]!r}"

    assert scene.first not in shown
    assert digest_of(scene.first).hex() not in shown
