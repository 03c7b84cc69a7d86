"""Packages through a hub, by the real huggingface_hub: the hub is a server of this machine."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging_data import write_falcons

from fake_hub import FakeHub, fake_hub
from fieldmark.errors import ConfigError, IntegrityError, PlaceError
from fieldmark.packaging.draft import as_it_is
from fieldmark.packaging.hub import HubPlace, open_hub
from fieldmark.packaging.manifest import CARD, MANIFEST, Package
from fieldmark.packaging.transfer import check_destination, send, take

TOKEN = "hf_secret"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with fake_hub() as hub:
        yield hub


def place_of(hub: FakeHub | str, repo: str = "me/falcons", revision: str | None = None) -> HubPlace:
    from huggingface_hub import HfApi

    url = hub if isinstance(hub, str) else hub.url
    return HubPlace(repo, revision, HfApi(endpoint=url))


def put(package: Package, place: HubPlace, *, replace: bool = False, card: bytes = b"# c\n") -> str:
    there = check_destination(place)
    return send(as_it_is(package), card, place, there=there, keep_card=True, replace=replace)


def test_a_package_comes_back_as_it_went_in_one_commit(
    hub: FakeHub, package: Package, tmp_path: Path
) -> None:
    assert put(package, place_of(hub)) == "package"
    assert hub.private == {"me/falcons": True}
    assert [set(paths) for paths in hub.commits] == [{*package.manifest.files, CARD, MANIFEST}]
    assert f"Bearer {TOKEN}" in hub.tokens
    got = take(place_of(hub), tmp_path / "got", expect=package.id)
    got.check_files()
    assert got.id == package.id
    assert (got.path / CARD).read_bytes() == b"# c\n"
    assert put(package, place_of(hub)) == "nothing"
    assert len(hub.commits) == 1
    assert put(package, place_of(hub), card=b"# edited\n") == "card"
    assert hub.commits[1:] == [[CARD]]
    at = place_of(hub, revision=hub.sha("me/falcons"))
    assert take(at, tmp_path / "again").id == package.id


def test_another_package_is_replaced_in_one_commit(
    hub: FakeHub, package: Package, made: object, tmp_path: Path
) -> None:
    other = write_falcons(tmp_path / "other", made.module, None, name="other")  # type: ignore[attr-defined]
    put(package, place_of(hub))
    with pytest.raises(PlaceError, match="give --replace"):
        put(other, place_of(hub))
    assert put(other, place_of(hub), replace=True) == "package"
    assert len(hub.commits) == 2
    kept = {".gitattributes", CARD, MANIFEST}
    assert set(hub.repos["me/falcons"]) == kept | {*other.manifest.files}


def test_a_repository_of_something_else_is_refused(hub: FakeHub, package: Package) -> None:
    hub.repos["me/falcons"] = {".gitattributes": b"", CARD: b"# x", "pytorch_model.bin": b"x"}
    with pytest.raises(PlaceError, match="Got pytorch_model.bin"):
        put(package, place_of(hub))
    del hub.repos["me/falcons"]["pytorch_model.bin"]
    assert put(package, place_of(hub)) == "package"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", MANIFEST])
def test_what_the_hub_has_is_compared_with_what_was_sent(
    hub: FakeHub, package: Package, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    commit = hub._commit

    def lossy(repo: str, body: bytes) -> object:
        answer = commit(repo, body)
        data = hub.repos[repo][name]
        hub.repos[repo][name] = data[:-1] + bytes([data[-1] ^ 1])
        return answer

    monkeypatch.setattr(hub, "_commit", lossy)
    with pytest.raises(IntegrityError, match=f"{name} of hf:me/falcons must be what was sent"):
        put(package, place_of(hub))


def test_a_commit_in_between_is_not_written_over(
    hub: FakeHub, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["me/falcons"] = {".gitattributes": b""}
    place = place_of(hub)
    there = check_destination(place)
    hub.repos["me/falcons"] = {".gitattributes": b"another's"}
    with pytest.raises(PlaceError, match="refused with 412.*Somebody changed it meanwhile"):
        send(as_it_is(package), b"", place, there=there, keep_card=True, replace=False)
    assert set(hub.repos["me/falcons"]) == {".gitattributes"}


def test_a_file_altered_on_the_hub_is_refused(
    hub: FakeHub, package: Package, tmp_path: Path
) -> None:
    put(package, place_of(hub))
    hub.repos["me/falcons"]["config.json"] += b" "
    with pytest.raises(IntegrityError, match="config.json of hf:me/falcons must have"):
        take(place_of(hub), tmp_path / "got")
    assert not list(tmp_path.glob("*got*"))


@pytest.mark.parametrize(
    ("path", "status", "headers", "message"),
    [
        ("/api/models", 401, {}, "hf auth login"),
        ("/api/models", 404, {"X-Error-Code": "RepoNotFound"}, "must exist and be open to you"),
        ("/api/models", 403, {"X-Error-Code": "GatedRepo"}, "It is gated. Ask for access"),
        ("/api/models", 429, {}, "refused with 429.* Wait some minutes"),
        ("/api/models", 503, {}, "refused with 503.* Try again later"),
        ("/manifest.json", 403, {"X-Error-Message": "no, you"}, "403. It says: no, you."),
    ],
)
def test_a_refusal_is_one_sentence(
    hub: FakeHub, package: Package, path: str, status: int, headers: dict[str, str], message: str
) -> None:
    put(package, place_of(hub))
    hub.refuse[path] = status, headers
    place = HubPlace("me/falcons", None, place_of(hub)._api, must_exist=True)
    with pytest.raises(PlaceError, match=message) as caught:
        take(place, package.path.parent / "got")
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/commit/", 403, "Use a token that may write there"),
        ("/commit/", 413, "Make room"),
        ("/repos/create", 401, "The token is missing or not valid"),
        ("/preupload/", 402, "Make room"),
    ],
)
def test_a_refused_push_writes_nothing(
    hub: FakeHub, package: Package, path: str, status: int, message: str
) -> None:
    hub.refuse[path] = status, {}
    with pytest.raises(PlaceError, match=message):
        put(package, place_of(hub))
    assert hub.commits == []
    hub.refuse.clear()
    assert put(package, place_of(hub)) == "package"


def test_a_revision_must_exist(hub: FakeHub, package: Package, tmp_path: Path) -> None:
    put(package, place_of(hub))
    with pytest.raises(PlaceError, match="hf:me/falcons@v9 must be a branch, tag or commit"):
        put(package, place_of(hub, revision="v9"))
    with pytest.raises(PlaceError, match="must exist"):
        put(package, place_of(hub, repo="me/none", revision="v9"))


def test_offline_is_one_sentence_and_soon(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PlaceError, match="HF_HUB_OFFLINE is set. Unset it, or use a folder"):
        take(place_of("https://huggingface.co"), tmp_path / "got")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.socket() as free:  # nobody listens there
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(PlaceError, match="must be reachable.*Check the network"):
            put(package, place_of(url))


def test_a_push_needs_a_login(
    hub: FakeHub, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PlaceError, match="hf auth login, or set HF_TOKEN"):
        put(package, place_of(hub))
    assert hub.repos == {}


@pytest.mark.parametrize("address", ["hf:one", "hf:a/b/c", "hf://a/b", "hf:a/../b", "hf:a/b@"])
def test_an_address_must_name_a_repository(address: str) -> None:
    with pytest.raises(ConfigError, match="must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION"):
        open_hub(address, must_exist=True)
