"""The verbs of the service: serving a package, and the keys that its clients carry."""

import datetime as dt
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fieldmark import pipeline, show
from fieldmark.cli.options import Json, Package, app
from fieldmark.errors import ConfigError
from fieldmark.runtime import log

MAX_IMAGES, MAX_REQUEST_BYTES, MAX_TIMEOUT_S = 32, 64_000_000, 60.0
keys_app = typer.Typer(no_args_is_help=True, help="Make, list and take away keys of a service.")
app.add_typer(keys_app, name="keys")

KeysFile = Annotated[Path, typer.Option("--file", metavar="FILE", help="Of names and hashes.")]
KEYS_FILE = Path("keys.json")


class LogFormat(StrEnum):
    """How the service writes its log on stderr."""

    text = "text"
    json = "json"


@app.command()
def serve(
    model: Package,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    variant: Annotated[str, typer.Option(help="As bench found, or a name.")] = "auto",
    threads: Annotated[str, typer.Option(help="T or CALLSxT; 0: as bench found.")] = "0",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ask for a key: see fieldmark keys.")
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option("--log", help="json: a line a request.")
    ] = LogFormat.text,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="For an answer.")] = 10.0,
    drain_s: Annotated[float, typer.Option(min=0, help="After SIGTERM, not ready.")] = 5.0,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Images in the model.")] = 8,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="For a batch to fill.")] = 0.0,
    max_inside: Annotated[int, typer.Option(min=1, help="Images; more are refused.")] = 256,
    max_images: Annotated[
        int | None, typer.Option(min=1, help=f"Of a request [{MAX_IMAGES}].")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of one image.")] = 10_000_000,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of one image.")] = 50_000_000,
    max_connections: Annotated[int, typer.Option(min=1, help="The slowest makes room.")] = 2048,
    max_per_address: Annotated[int, typer.Option(min=0, help="Connections; 0: any.")] = 0,
    body_timeout_s: Annotated[float, typer.Option(min=0.001, help="For a body to arrive.")] = 30.0,
    as_json: Json = False,
) -> None:
    """Serve a package over HTTP.

    POST an image, a form with several or base64 in JSON to /v1/classify. What
    cannot be answered in time is refused at once, with the time to wait.

    Example: fieldmark serve runs/smoke --port 8000
    """
    from fieldmark.serving.limits import Limits

    limits = Limits(
        max_body_bytes=max_body_bytes,
        max_request_bytes=max(max_body_bytes, MAX_REQUEST_BYTES),
        max_pixels=max_pixels,
        max_images=min(MAX_IMAGES, max_inside) if max_images is None else max_images,
        max_inside=max_inside,
        timeout_s=timeout_s,
        max_timeout_s=max(timeout_s, MAX_TIMEOUT_S),
        max_batch_size=max_batch_size,
        max_wait_s=max_wait_ms / 1000,
        max_connections=max_connections,
        max_per_address=max_per_address,
        body_timeout_s=body_timeout_s,
        drain_s=drain_s,
    )
    log.use_json(log_format is LogFormat.json)
    pipeline.serve(
        model,
        host=host,
        port=port,
        variant=variant,
        threads=threads,
        device=device,
        limits=limits,
        keys=keys,
        announce=show.print_json if as_json else None,
    )


@keys_app.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Of who will carry the key.")],
    file: KeysFile = KEYS_FILE,
    expires: Annotated[
        str, typer.Option(metavar="DAY", help="The first day without it, as 2030-01-31 [none].")
    ] = "",
    per_minute: Annotated[
        int | None, typer.Option(min=1, help="Images that it may send [any number].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, once: the file keeps its hash alone.

    Example: fieldmark keys add shop --file keys.json --per-minute 600
    """
    from fieldmark.serving.keys import add_key as make

    key = make(file, name, expires=_day(expires), images_per_minute=per_minute)
    if as_json:
        show.print_json({"name": name, "key": key, "file": str(file)})
    else:
        typer.echo(key)
        log.say(f"{file} has its hash. Send it as: Authorization: Bearer KEY")


@keys_app.command("list")
def list_keys(file: KeysFile = KEYS_FILE, as_json: Json = False) -> None:
    """List the names, with when they end and how much they may send."""
    from fieldmark.serving.keys import read_keys

    rows: list[dict[str, Any]] = [
        entry.model_dump(mode="json", exclude={"sha256"}) for entry in read_keys(file).keys
    ]
    if as_json:
        show.print_json({"keys": rows})
        return
    columns = ("name", "created", "expires", "images_per_minute")
    log.table(columns, ([row[column] or "-" for column in columns] for row in rows))


@keys_app.command("remove")
def remove_key(
    name: Annotated[str, typer.Argument(help="As fieldmark keys list shows it.")],
    file: KeysFile = KEYS_FILE,
    as_json: Json = False,
) -> None:
    """Take a key away, from a running service within two seconds."""
    from fieldmark.serving.keys import remove_key as remove

    remove(file, name)
    if as_json:
        show.print_json({"name": name, "file": str(file)})
    else:
        log.say(f"{name} is no longer in {file}")


def _day(text: str) -> dt.date | None:
    if not text:
        return None
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"expires must be a day such as 2030-01-31. Got {text!r}.") from None
