"""keys.py and door.py: who may ask, how much, and until when."""

import datetime as dt
import json
import stat
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from fieldmark.errors import ConfigError, UnknownName
from fieldmark.serving import keys as keys_module
from fieldmark.serving.app import create_app
from fieldmark.serving.keys import Allowance, BadKey, Keys, add_key, read_keys, remove_key

URL = "/v1/classify"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
def now(monkeypatch):
    """Seconds by which the clock of the allowances and of the looks at the file is ahead."""
    ahead, real = [0.0], time.monotonic
    monkeypatch.setattr(keys_module, "monotonic", lambda: real() + ahead[0])
    return ahead


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_the_file_has_no_key_and_is_for_its_owner(path):
    key = add_key(path, "shop")
    assert key.startswith("fm_")
    assert len(key) > 40
    assert key[3:] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    add_key(path, "another")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    other = add_key(path, "press")
    assert other != key
    keys = Keys(path)
    assert keys.name_of({"authorization": f"Bearer {key}"}) == "shop"
    assert keys.name_of({"authorization": f"bearer  {other} "}) == "press"
    assert keys.name_of({"x-api-key": other}) == "press"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic fm_x"},
        {"x-api-key": " "},
        {"authorization": "Bearer fm_wrong"},
        {"x-api-key": "k\u00e9y"},
        {"authorization": "Bearer " + "x" * 10_000},
    ],
)
def test_what_is_no_key(path, headers):
    add_key(path, "shop")
    with pytest.raises(BadKey) as caught:
        Keys(path).name_of(headers)
    assert len(str(caught.value)) < 100


def test_a_hash_is_no_key(path):
    add_key(path, "shop")
    with pytest.raises(BadKey):
        Keys(path).name_of({"x-api-key": read_keys(path).keys[0].sha256})


def test_a_key_ends_on_its_day(path, monkeypatch):
    day = dt.date(2031, 1, 31)
    monkeypatch.setattr(keys_module, "_today", lambda: day - dt.timedelta(1))
    key = add_key(path, "shop", expires=day)
    keys = Keys(path)
    assert keys.name_of({"x-api-key": key}) == "shop"
    monkeypatch.setattr(keys_module, "_today", lambda: day)
    with pytest.raises(BadKey, match="expired on 2031-01-31"):
        keys.name_of({"x-api-key": key})
    with pytest.raises(ConfigError, match="a day to come. Got 2031-01-31"):
        add_key(path, "late", expires=day)


def test_a_key_that_is_taken_away_or_added_needs_no_restart(path, now, capsys):
    key = add_key(path, "shop")
    keys = Keys(path)
    remove_key(path, "shop")
    added = add_key(path, "press")
    now[0] += 2
    with pytest.raises(BadKey):
        keys.name_of({"x-api-key": key})
    assert keys.name_of({"x-api-key": added}) == "press"
    assert "was read again: 1 keys" in capsys.readouterr().err
    path.write_text("{")
    now[0] += 2
    assert keys.name_of({"x-api-key": added}) == "press"
    assert "known before are still taken" in capsys.readouterr().err
    path.unlink()
    now[0] += 2
    assert keys.name_of({"x-api-key": added}) == "press"


def unreadable(path):
    raise ConfigError("keys must be a file that can be read.")


def test_a_change_that_could_not_be_read_is_read_when_it_can_be(path, now, monkeypatch, capsys):
    key = add_key(path, "shop")
    service = Keys(path)
    remove_key(path, "shop")
    with monkeypatch.context() as during:
        during.setattr(keys_module, "read_keys", unreadable)
        for _ in range(3):
            now[0] += 2
            assert service.name_of({"x-api-key": key}) == "shop"
    assert capsys.readouterr().err.count("known before are still taken") == 1
    now[0] += 2
    with pytest.raises(BadKey):
        service.name_of({"x-api-key": key})


def test_a_file_has_its_mode_and_owner_before_it_takes_the_place(path, monkeypatch):
    add_key(path, "shop")
    path.chmod(0o640)
    seen = []
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda new, to: seen.append(new.stat().st_mode & 0o777) or replace(new, to)
    )
    add_key(path, "press")
    assert seen == [0o640]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can be read.*Make it: fieldmark keys add NAME"),
        ("", "damaged at its JSON"),
        ("[]", "damaged at its JSON"),
        ('{"format_version": 2}', "damaged at format_version"),
        ('{"keys": [{"name": "a", "sha256": "x", "created": "2030-01-01"}]}', "keys.0.sha256"),
    ],
)
def test_a_file_that_is_none(path, content, message):
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        Keys(path)


def test_two_of_the_same_name(path):
    add_key(path, "shop")
    with pytest.raises(ConfigError, match="'shop' is in use: run fieldmark keys remove shop"):
        add_key(path, "shop")
    found = json.loads(path.read_text())
    found["keys"] *= 2
    path.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="different names"):
        Keys(path)
    with pytest.raises(ConfigError, match="name must have 1 to 64 letters"):
        add_key(path, "a b")
    with pytest.raises(ConfigError, match="at least 1. Got 0"):
        add_key(path, "none", images_per_minute=0)


def test_removing_suggests_the_nearest_name(path):
    add_key(path, "shop")
    with pytest.raises(UnknownName, match="'shpo' does not exist.*shop"):
        remove_key(path, "shpo")


def test_an_allowance_refills_and_says_when(now):
    allowance = Allowance(60, 60)
    assert allowance.take(60) == 0
    assert allowance.take(2) == pytest.approx(2, abs=0.5)
    now[0] += 2
    assert allowance.take(2) == 0
    now[0] += 1000
    assert allowance.take(90) == 0  # more than a minute's worth, at once: it is owed
    assert allowance.take(1) == pytest.approx(31, abs=1)


def test_the_door_is_shut_for_every_path_but_those_of_health(path, make_predictor, encode):
    key = add_key(path, "shop")
    app = create_app(make_predictor(), keys=Keys(path))
    client = TestClient(app, raise_server_exceptions=False)
    schema = client.get("/openapi.json").json()
    for template in [*schema["paths"], "/", "/nothing", "/v2/health/live/", "/livez/x"]:
        where = template.replace("{name}", "model").replace("{version}", "f" * 12)
        method = "POST" if "post" in schema["paths"].get(template, {}) else "GET"
        reply = client.request(method, where)
        is_open = template in ("/", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
        assert (reply.status_code != 401) == is_open, template
        assert reply.headers["x-request-id"]
        if not is_open:
            assert reply.headers["www-authenticate"] == "Bearer"
            text = reply.json()["error"]
            message = text if where.startswith("/v2") else text["message"]
            assert message.startswith("a request must carry a key")
            with_key = client.request(method, where, headers=bearer(key))
            assert with_key.status_code != 401
    assert client.post(URL, content=encode("red"), headers=bearer(key)).status_code == 200
    assert client.post(URL, content=encode("red"), headers=bearer(key + "x")).status_code == 401
    assert (
        'fieldmark_requests_total{reason="key",route="other",status="401"}'
        in client.get("/metrics", headers=bearer(key)).text
    )
    assert schema["components"]["securitySchemes"]


def test_images_over_the_allowance_are_429_with_the_time_to_wait(path, make_predictor, encode, now):
    key = add_key(path, "shop", images_per_minute=4)
    free = add_key(path, "press")
    client = TestClient(create_app(make_predictor(), keys=Keys(path)))
    files = [("images", (f"{index}.png", encode("red"))) for index in range(3)]
    assert client.post(URL, files=files, headers=bearer(key)).status_code == 200
    assert client.post(URL, content=encode("red"), headers=bearer(key)).status_code == 200
    refused = client.post(URL, files=files, headers=bearer(key))
    assert refused.status_code == 429
    assert 40 <= int(refused.headers["retry-after"]) <= 45
    assert client.post(URL, files=files, headers=bearer(free)).status_code == 200
    now[0] += 45
    assert client.post(URL, files=files, headers=bearer(key)).status_code == 200


def test_without_a_file_no_key_is_asked_for(make_predictor, encode):
    client = TestClient(create_app(make_predictor()))
    assert client.post(URL, content=encode("red"), headers=bearer("any")).status_code == 200
    assert "securitySchemes" not in client.get("/openapi.json").json()["components"]
