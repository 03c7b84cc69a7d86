"""What README and docs tell people to type exists: verbs, options, recipes, settings."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from fieldmark import cli
from fieldmark.cookbook import load_recipe
from fieldmark.errors import FieldmarkError

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["fieldmark"]:
                found.append(words[1:])
    return found


ALL = [(page.name, words) for page in PAGES for words in commands(page)]


def test_there_are_commands_to_check() -> None:
    assert len(ALL) >= 20
    assert {"README.md", "tutorial.md"} <= {name for name, _ in ALL}


@pytest.mark.parametrize(("page", "words"), ALL, ids=lambda value: str(value)[:60])
def test_a_command_exists_with_its_options(page: str, words: list[str]) -> None:
    group = get_command(cli.app)
    verb, *rest = words
    command = group.commands[verb]  # type: ignore[attr-defined]
    if hasattr(command, "commands"):  # as of keys: add, list, remove
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_parser(command.make_context(verb, ["--help"], resilient_parsing=True)).parse_args(
        list(rest)
    )
    if verb == "train" and rest[:1] and not rest[0].startswith("-"):
        settings = [word for word in rest[1:] if "=" in word and not word.startswith("-")]
        try:
            load_recipe(rest[0], settings)
        except FieldmarkError as error:
            pytest.fail(str(error))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_command_line_reference_is_current(tmp_path: Path) -> None:
    import subprocess
    import sys

    script, written = ROOT / "scripts" / "make_cli_reference.py", tmp_path / "cli.md"
    subprocess.run([sys.executable, script, written], check=True)
    assert written.read_text() == (ROOT / "docs" / "reference" / "cli.md").read_text(), (
        "docs/reference/cli.md is out of date. Run: make docs"
    )


@pytest.mark.slow
def test_the_tutorial_runs_as_written(in_empty_folder: Path, tiny_images: Path) -> None:
    """Every command of the tutorial, in order; the service is asked by its own curl line.

    `photos` and `weights` stand for what a user has: drawn images, and weights of random numbers.
    """
    import json
    import shutil
    import subprocess
    import sys
    import urllib.request

    from random_weights import save_weights

    shutil.copytree(tiny_images / "train", in_empty_folder / "photos")
    save_weights(in_empty_folder / "weights")
    bin_folder = Path(sys.executable).parent
    for words in commands(ROOT / "docs" / "tutorial.md"):
        program = [str(bin_folder / "fieldmark"), *words]
        if words[0] != "serve":
            done = subprocess.run(program, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (words, done.stderr[-800:])
            continue
        program[program.index("--port") + 1] = "0"
        process = subprocess.Popen([*program, "--json"], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            image = (in_empty_folder / "runs/first/package/golden/000.png").read_bytes()
            request = urllib.request.Request(f"{url}/v1/classify?top_k=3", image)
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert len(json.load(answer)["predictions"]) == 3
        finally:
            process.terminate()
            assert process.wait(timeout=30) == 0
    assert (in_empty_folder / "classes.png").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_tuning_runs_as_written(in_empty_folder: Path) -> None:
    import json
    import shlex
    import subprocess
    import sys

    for words in commands(ROOT / "docs" / "how-to" / "tune.md"):
        program = [sys.executable, "-m", "fieldmark", *words]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stderr[-800:])
    assert (in_empty_folder / "rates.png").is_file()
    sweep = json.loads((in_empty_folder / "sweeps/digits/sweep.json").read_text())
    assert len(sweep["trials"]) == 6
    load_recipe("digits", shlex.split(sweep["best"]["command"])[3:])


@pytest.mark.parametrize("form", [1, 2, 3, 4, 5])
def test_spaces_in_the_table_are_spaces(form: int) -> None:
    from fieldmark.config.space import split_settings
    from fieldmark.cookbook import find_recipe

    page = (ROOT / "docs" / "how-to" / "tune.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    for text in re.findall("`(.*?)`", rows[form - 1]):
        assert split_settings(find_recipe("digits"), [text])[1], text


@pytest.mark.slow
def test_the_python_example_of_the_readme_runs(in_empty_folder: Path) -> None:
    (block,) = blocks(ROOT / "README.md", "python")
    namespace: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), namespace)
    assert (in_empty_folder / "runs/two-epochs/package/manifest.json").is_file()
