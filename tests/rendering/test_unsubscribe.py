from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.settings import load
from schemas.errors import InvalidInput
from transforms.unsubscribe import InvalidToken, Unsubscription, make_token, read_token

SECRET = b"0123456789abcdef0123456789abcdef"
FIELDS = st.text(max_size=60)


@given(FIELDS, FIELDS, FIELDS, FIELDS)
def test_a_token_says_what_was_put_in(tenant: str, person: str, topic: str, channel: str) -> None:
    token = make_token(SECRET, tenant, person, topic, channel)
    assert set(token) <= set(string.ascii_letters + string.digits + "-_")
    assert read_token(SECRET, token) == Unsubscription(tenant, person, topic, channel)
    assert make_token(SECRET, tenant, person, topic, channel) == token


@given(st.data())
def test_no_changed_token_is_read(data: st.DataObject) -> None:
    token = make_token(SECRET, "acme", "r-1", "news", "email")
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.sampled_from(string.ascii_letters + string.digits + "-_"))
    changed = token[:at] + other + token[at + 1 :]
    try:
        read = read_token(SECRET, changed)
    except InvalidToken:
        return
    # Only unused bits of the last base64 character may differ.
    assert read == Unsubscription("acme", "r-1", "news", "email")
    assert changed[:-1] == token[:-1]


@given(st.text(max_size=200) | st.binary(max_size=120).map(lambda b: b.decode("latin-1")))
def test_noise_is_no_token(noise: str) -> None:
    with pytest.raises(InvalidToken):
        read_token(SECRET, noise)


def test_another_secret_and_moved_borders_are_refused() -> None:
    token = make_token(SECRET, "ab", "c", "d", "e")
    with pytest.raises(InvalidToken, match="signature"):
        read_token(b"another secret of some length...", token)
    assert make_token(SECRET, "a", "bc", "d", "e") != token
    for damaged in (token[:-1], token + "A", token * 100, "", "===="):
        with pytest.raises(InvalidToken):
            read_token(SECRET, damaged)


def test_weak_secrets_and_endless_fields_are_refused() -> None:
    with pytest.raises(InvalidInput, match="at least 16"):
        make_token(b"short", "a", "b", "c", "d")
    with pytest.raises(InvalidInput, match="256"):
        make_token(SECRET, "a", "b" * 257, "c", "d")


def test_a_token_is_short_enough_for_one_header_line() -> None:
    token = make_token(SECRET, "acme", "3f0c7b6e-1f2d-4c3b-9a8e-7d6c5b4a3f2e", "offers", "email")
    assert len(token) < 120


@pytest.mark.parametrize("size", [0, 1, 254, 255, 256])
def test_every_length_that_an_id_may_have_comes_back(size: int) -> None:
    token = make_token(SECRET, "acme", "b" * size, "news", "email")
    assert read_token(SECRET, token) == Unsubscription("acme", "b" * size, "news", "email")


@pytest.mark.parametrize("secret", ["s" * 15, "short"])
def test_settings_refuse_a_secret_that_can_be_guessed_and_do_not_repeat_it(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("FANFARE_KAFKA", "127.0.0.1:1")
    monkeypatch.setenv("FANFARE_UNSUBSCRIBE_SECRET", secret)
    with pytest.raises(InvalidInput, match=r"UNSUBSCRIBE_SECRET.*use at least 16") as raised:
        load()
    assert secret not in str(raised.value)


def test_settings_take_no_secret_and_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FANFARE_KAFKA", "127.0.0.1:1")
    for secret in ("", "s" * 16):
        monkeypatch.setenv("FANFARE_UNSUBSCRIBE_SECRET", secret)
        assert load().unsubscribe_secret.get_secret_value() == secret
