"""What a signature proves, and each way in which it proves nothing: by the first check that fails."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from sprite_agent.contract.proofs import MAX_SIGNATURE, verify
from sprite_agent.contract.signatures import PrivateKey, Signer, decode, digest, encode, load_signer, read_private_key
from sprite_agent.errors import (
    SignatureBodyMismatch,
    SignatureInvalid,
    SignatureKeyExpired,
    SignatureKeyUnknown,
    SignatureMalformed,
    SignatureRefused,
    SignatureStale,
    SignatureWrongAudience,
    SignatureWrongMethod,
)
from support.signing import Manager

if TYPE_CHECKING:
    from pathlib import Path

    from sprite_agent.callers import Proof
    from sprite_agent.contract.proofs import TrustedKey

METHOD = "/sprite_agent.v1.SpriteAgentService/ExecuteControl"
BODY = b"\x0a\x04demo"
TOKEN = "spr1.t1.secret"  # noqa: S105  # not one
NOW = 1_800_000_000.0


@pytest.fixture
def manager() -> Manager:
    return Manager()


def checked(signature: str, *keys: TrustedKey, **given: Any) -> Proof:
    """What the signature proves, to an agent that got what was signed."""
    right: dict[str, Any] = {"audience": "sprite-1", "method": METHOD, "body": BODY, "token": TOKEN, "now": NOW}
    return verify(signature, keys={key.key_id: key for key in keys}, **{**right, **given})


def sign(manager: Manager, *, at: float = NOW, **members: Any) -> str:
    signer = manager.signer(now=lambda: at, **members)
    return signer.sign(METHOD, BODY, token=TOKEN, actor="ada", trace_id="trace-1")


def refused(error: type[SignatureRefused], signature: str, *keys: TrustedKey, **given: Any) -> SignatureRefused:
    """The refusal, which has to be this one and no other."""
    with pytest.raises(SignatureRefused) as caught:
        checked(signature, *keys, **given)
    assert type(caught.value) is error
    return caught.value


# Signing.


def test_a_signature_proves_who_signed_for_whom(manager: Manager) -> None:
    proof = checked(sign(manager), manager.trusted())

    assert (proof.issuer, proof.key_id, proof.actor) == ("opsmgr-1", "m1", "ada")
    assert proof.expires == NOW + 60


def test_a_signature_says_what_it_was_made_for_and_no_more(manager: Manager) -> None:
    header, claims, _ = (base64.urlsafe_b64decode(part + "==") for part in sign(manager).split("."))
    said = json.loads(claims)

    assert json.loads(header) == {"alg": "EdDSA", "typ": "ops-req+jwt", "kid": "m1"}
    assert len(said.pop("jti")) == 36
    assert said == {
        "iss": "opsmgr-1",
        "aud": "sprite-1",
        "iat": NOW,
        "exp": NOW + 30,
        "rpc": METHOD,
        "bd": base64.urlsafe_b64encode(hashlib.sha256(BODY).digest()).decode().rstrip("="),
        "bl": len(BODY),
        "ath": base64.urlsafe_b64encode(hashlib.sha256(TOKEN.encode()).digest()).decode().rstrip("="),
        "act": "ada",
        "trc": "trace-1",
    }


def test_each_signature_has_a_nonce_of_its_own(manager: Manager) -> None:
    nonces = {checked(sign(manager), manager.trusted()).nonce for _ in range(50)}

    assert len(nonces) == 50


def test_who_has_no_token_and_acts_for_nobody_signs_that(manager: Manager) -> None:
    signature = manager.signer(now=lambda: NOW).sign(METHOD, BODY, token=None)

    assert checked(signature, manager.trusted(), token=None).actor is None
    refused(SignatureBodyMismatch, signature, manager.trusted())


def test_a_signer_acts_for_its_actor_unless_told_otherwise(manager: Manager) -> None:
    signer = manager.signer(actor="robot", now=lambda: NOW)

    proofs = [checked(signer.sign(METHOD, BODY, token=TOKEN, actor=actor), manager.trusted()) for actor in (None, "b")]

    assert [proof.actor for proof in proofs] == ["robot", "b"]


@pytest.mark.parametrize("character", ["\U0001f600", '"', "é"])
@pytest.mark.parametrize("traced", ["\U0001f600", "\x01"])
def test_the_longest_actor_and_trace_id_can_be_signed(manager: Manager, character: str, traced: str) -> None:
    signer = manager.signer(now=lambda: NOW)
    signature = signer.sign(METHOD, BODY, token=TOKEN, actor=character * 200, trace_id=traced * 256)

    assert checked(signature, manager.trusted()).actor == character * 200


def test_a_trace_id_of_any_length_leaves_room_for_the_signature(manager: Manager) -> None:
    signature = manager.signer(now=lambda: NOW).sign(METHOD, BODY, token=TOKEN, trace_id="x" * 10_000)

    checked(signature, manager.trusted())


# Refusing, in the order of the checks.


@pytest.mark.parametrize(
    "text", ["", ".", "..", "a.b", "a.b.c.d", "not a signature", "é.é.é", "a" * MAX_SIGNATURE, "\udcff", "=.=.="]
)
def test_what_is_no_compact_jwt_is_malformed(manager: Manager, text: str) -> None:
    refused(SignatureMalformed, text, manager.trusted())


def test_a_longer_signature_than_the_longest_is_not_looked_at(manager: Manager) -> None:
    padded = manager.signed(METHOD, BODY, token=TOKEN, src="x" * MAX_SIGNATURE)

    assert "4096 are the most" in refused(SignatureMalformed, padded, manager.trusted()).message


@pytest.mark.parametrize(
    "header",
    [
        {"typ": "JWT"},
        {"typ": "OPS-REQ+JWT"},
        {"kid": ""},
        {"kid": "a b"},
        {"kid": "m1\n"},
        {"kid": "x" * 65},
        {"jwk": {}},
        {"jku": "https://example.com"},
        {"x5u": "https://example.com"},
        {"x5c": []},
        {"crit": ["exp"]},
        {"b64": True, "zip": "DEF"},
        {"cty": "x"},
    ],
    ids=str,
)
def test_a_header_of_any_other_form_is_malformed(manager: Manager, header: dict[str, Any]) -> None:
    refused(SignatureMalformed, manager.signed(METHOD, BODY, token=TOKEN, header=header), manager.trusted())


@pytest.mark.parametrize(
    "header",
    [
        b'{"alg":"EdDSA","typ":"ops-req+jwt"}',
        b'{"alg":"none","typ":"ops-req+jwt","kid":"m1"}',
        b'{"alg":"HS256","typ":"ops-req+jwt","kid":"m1"}',
        b'{"alg":"ES256","typ":"ops-req+jwt","kid":"m1"}',
        b'{"alg":"eddsa","typ":"ops-req+jwt","kid":"m1"}',
        b'{"alg":"EdDSA","alg":"EdDSA","typ":"ops-req+jwt","kid":"m1"}',
        b'{"alg":["EdDSA"],"typ":"ops-req+jwt","kid":"m1"}',
        b'{"alg":"EdDSA","typ":"ops-req+jwt","kid":1}',
        b'["alg","typ","kid"]',
        b"[" * 3000,
        b"\xff\xfe",
        b"null",
        b"",
    ],
)
def test_a_header_that_says_anything_else_is_malformed(manager: Manager, header: bytes) -> None:
    _, claims, made = sign(manager).split(".")

    refused(SignatureMalformed, f"{encode(header)}.{claims}.{made}", manager.trusted())


def test_another_text_of_the_same_signature_is_malformed(manager: Manager) -> None:
    header, claims, made = sign(manager).split(".")
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_".index(made[-1])
    others = [
        made[:-1] + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"[last ^ bit] for bit in (1, 2)
    ]

    for other in (
        *others,
        f"{made}==",
        f"{made}\n",
        f"{made[:10]} {made[10:]}",
        made.replace("-", "+").replace("_", "/"),
    ):
        if other != made:
            refused(SignatureMalformed, f"{header}.{claims}.{other}", manager.trusted())


def test_a_key_that_is_not_trusted_is_unknown(manager: Manager) -> None:
    other = Manager(key_id="m2")

    assert "'m1'" in refused(SignatureKeyUnknown, sign(manager), other.trusted()).message
    refused(SignatureKeyUnknown, sign(manager))


@pytest.mark.parametrize(
    ("times", "counts"),
    [
        ({"not_before": NOW + 1}, False),
        ({"not_after": NOW - 1}, False),
        ({"not_before": NOW, "not_after": NOW}, True),
        ({"not_before": NOW - 1}, True),
        ({"not_after": NOW + 1}, True),
    ],
)
def test_a_key_counts_within_its_time_only(manager: Manager, times: dict[str, Any], *, counts: bool) -> None:
    if counts:
        checked(sign(manager), manager.trusted(**times))
    else:
        error = refused(SignatureKeyExpired, sign(manager), manager.trusted(**times))
        assert error.details == {"keyId": "m1", "serverTime": "2027-01-15T08:00:00Z"}


def test_a_key_of_the_same_name_does_not_do(manager: Manager) -> None:
    refused(SignatureInvalid, sign(Manager()), manager.trusted())


def test_a_signature_of_other_claims_is_invalid(manager: Manager) -> None:
    header, claims, made = sign(manager).split(".")
    said = {**json.loads(decode(claims)), "act": "bob"}

    refused(SignatureInvalid, f"{header}.{encode(json.dumps(said).encode())}.{made}", manager.trusted())
    refused(SignatureInvalid, f"{header}.{claims}.", manager.trusted())
    refused(SignatureInvalid, f"{header}.{claims}.{encode(bytes(64))}", manager.trusted())


RIGHT: dict[str, Any] = {"iat": int(NOW), "exp": int(NOW) + 30}


@pytest.mark.parametrize(
    "claims",
    [
        *({name: None} for name in ("iss", "aud", "jti", "rpc", "bd", "bl")),
        *({name: 1} for name in ("iss", "aud", "jti", "rpc", "bd", "ath", "act")),
        {"aud": ["sprite-1"]},
        {"bl": "6"},
        {"bl": 6.0},
        {"iat": float(NOW)},
        {"exp": str(int(NOW))},
        {"iat": True},
        {"iat": -1, "exp": 10},
        {"iat": 10**400, "exp": 10**400},
        {"jti": "short"},
        {"jti": "x" * 65},
        {"jti": "x" * 16 + "\n"},
        {"jti": "x" * 16 + "."},
        {"iss": "two words"},
        {"exp": int(NOW) + 61},
        {"exp": int(NOW) - 1},
    ],
    ids=str,
)
def test_claims_of_any_other_form_are_malformed(manager: Manager, claims: dict[str, Any]) -> None:
    signature = manager.signed(METHOD, BODY, token=TOKEN, **{**RIGHT, **claims})

    refused(SignatureMalformed, signature, manager.trusted())


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b"{", b'{"iss":"a","iss":"b"}', b"\xff", b"[" * 3000])
def test_a_payload_that_is_no_object_is_malformed(manager: Manager, payload: bytes) -> None:
    refused(SignatureMalformed, manager.signed(METHOD, BODY, token=TOKEN, payload=payload), manager.trusted())


def test_claims_that_say_more_are_allowed(manager: Manager) -> None:
    signature = manager.signed(METHOD, BODY, token=TOKEN, src={"host": "a", "list": [1.5, None]}, **RIGHT)

    checked(signature, manager.trusted())


def test_a_key_counts_for_its_issuer_only(manager: Manager) -> None:
    refused(SignatureKeyUnknown, sign(manager, issuer="opsmgr-2"), manager.trusted())


@pytest.mark.parametrize("audience", ["sprite-2", "sprite-1 ", "SPRITE-1", "", "*", "sprite-1\udc80", "é"])
def test_a_signature_for_another_sprite_is_refused(manager: Manager, audience: str) -> None:
    refused(SignatureWrongAudience, manager.signed(METHOD, BODY, token=TOKEN, aud=audience, **RIGHT), manager.trusted())


@pytest.mark.parametrize(
    ("age", "counts"),
    [(age, -30 <= age <= 60) for age in (-3600, -91, -61, -31, -30.5, -30, -29, 0, 29, 31, 60, 60.5, 61, 91, 3600)],
)
def test_a_signature_is_of_this_moment(manager: Manager, age: float, *, counts: bool) -> None:
    if counts:
        checked(sign(manager), manager.trusted(), now=NOW + age)
        return
    error = refused(SignatureStale, sign(manager), manager.trusted(), now=NOW + age)

    assert error.details["skewSeconds"] == str(round(age))
    assert error.details["serverTime"][:10] == "2027-01-15"


@pytest.mark.parametrize("age", [89, 90])
def test_one_that_lasts_as_long_as_it_may_counts_for_a_minute_and_the_skew(manager: Manager, age: float) -> None:
    signature = manager.signed(METHOD, BODY, token=TOKEN, iat=int(NOW), exp=int(NOW) + 60)

    assert checked(signature, manager.trusted(), now=NOW + age).expires == NOW + 90
    refused(SignatureStale, signature, manager.trusted(), now=NOW + 91)


@pytest.mark.parametrize("method", [METHOD[:-1], METHOD.lower(), METHOD[1:], METHOD + "/", METHOD[:-14] + "GetInfo"])
def test_a_signature_for_another_method_is_refused(manager: Manager, method: str) -> None:
    refused(SignatureWrongMethod, sign(manager), manager.trusted(), method=method)


@pytest.mark.parametrize("body", [b"", BODY + b"\0", BODY[:-1], b"\x0a\x04Demo", BODY * 2])
def test_a_signature_of_other_bytes_is_refused(manager: Manager, body: bytes) -> None:
    refused(SignatureBodyMismatch, sign(manager), manager.trusted(), body=body)


def test_digest_and_length_of_the_bytes_both_count(manager: Manager) -> None:
    for claims in ({"bl": len(BODY) + 1}, {"bd": digest(BODY + b"x")}, {"bd": ""}, {"bd": digest(BODY) + "="}):
        signature = manager.signed(METHOD, BODY, token=TOKEN, **{**RIGHT, **claims})
        refused(SignatureBodyMismatch, signature, manager.trusted())


@pytest.mark.parametrize("token", [None, "", TOKEN + "x", TOKEN.upper()])
def test_a_signature_that_goes_with_another_token_is_refused(manager: Manager, token: str | None) -> None:
    refused(SignatureBodyMismatch, sign(manager), manager.trusted(), token=token)


def test_the_first_check_that_fails_is_the_one_that_is_told(manager: Manager) -> None:
    """Each signature is wrong in one way more than the one before, and an earlier check finds it."""
    wrong: dict[str, Any] = {"token": "another"}
    assert "token" in refused(SignatureBodyMismatch, sign(manager), manager.trusted(), **wrong).message
    wrong["body"] = b"other"
    assert "bytes" in refused(SignatureBodyMismatch, sign(manager), manager.trusted(), **wrong).message
    wrong["method"] = "/other"
    refused(SignatureWrongMethod, sign(manager), manager.trusted(), **wrong)
    wrong["now"] = NOW + 1000
    refused(SignatureStale, sign(manager), manager.trusted(), **wrong)
    wrong["audience"] = "sprite-2"
    refused(SignatureWrongAudience, sign(manager), manager.trusted(), **wrong)
    by_another = sign(manager, issuer="opsmgr-2")
    refused(SignatureKeyUnknown, by_another, manager.trusted(), **wrong)
    refused(SignatureInvalid, by_another, Manager().trusted(), **wrong)
    refused(SignatureKeyExpired, by_another, Manager().trusted(not_after=NOW), **wrong)
    refused(SignatureKeyUnknown, by_another, **wrong)
    refused(SignatureMalformed, by_another[1:], **wrong)


# Key files.


def put(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_signer_is_loaded_from_its_file(tmp_path: Path) -> None:
    made = PrivateKey.new(key_id="m1", issuer="opsmgr-1", audience=None)
    manager = Manager(key=made.key)
    file = put(tmp_path / "key.json", made.text)

    signature = load_signer(file, audience="sprite-1").sign(METHOD, BODY, token=TOKEN, actor="ada")

    checked_now = json.loads(decode(signature.split(".")[1]))["iat"]
    assert checked(signature, manager.trusted(), now=checked_now).actor == "ada"
    with pytest.raises(ValueError, match="names no Sprite and none was given"):
        load_signer(file)


def test_a_key_file_may_name_its_sprite(tmp_path: Path) -> None:
    file = put(tmp_path / "key.json", PrivateKey.new(key_id="m1", issuer="o", audience="sprite-7").text)

    assert load_signer(file).audience == "sprite-7"
    assert load_signer(file, audience="sprite-8").audience == "sprite-8"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_key_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    file = put(tmp_path / "key.json", PrivateKey.new(key_id="m1", issuer="o", audience="s").text, mode)

    with pytest.raises(ValueError, match=r"can be read by others; chmod 600 it"):
        load_signer(file)


def test_what_is_no_key_file_is_refused_and_nothing_of_it_is_told(tmp_path: Path) -> None:
    made = PrivateKey.new(key_id="m1", issuer="o", audience="s")
    right = json.loads(made.text)
    other = PrivateKey.new(key_id="m1", issuer="o", audience="s")
    wrong: list[Any] = [
        b"",
        b"{",
        b"[" * 3000,
        made.d.encode(),
        {**right, "d": made.d[:-1]},
        {**right, "d": made.d + "AAAA"},
        {**right, "d": f"{made.d}="},
        {**right, "more": 1},
        {**right, "kid": "a b"},
        {**right, "x": other.x},
        {name: value for name, value in right.items() if name != "iss"},
    ]
    for content in wrong:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        with pytest.raises(ValueError, match="key file") as caught:
            read_private_key(put(tmp_path / "key.json", text))
        assert made.d[:20] not in f"{caught.value} {caught.value.__cause__}"


def test_a_key_keeps_its_private_half_to_itself() -> None:
    made = PrivateKey.new(key_id="m1", issuer="o", audience="s")
    signer = Signer(key=made.key, key_id="m1", issuer="o", audience="s")

    assert made.d not in f"{made!r} {made} {signer!r} {signer}"
