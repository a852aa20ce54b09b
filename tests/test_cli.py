"""The command line as a user meets it: exit codes, what goes to stdout and what to stderr, and how soon."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_cli import __version__

ROOT = Path(__file__).parents[1]
MINIMAL = "model: {name_or_path: base}\ndata: {train: [{path: rows.jsonl}]}\n"

VALID = "valid (its keys; `qlora preview` looks at the data, `qlora train` at the model)\n"


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=folder, env=environment, timeout=60)


def qlora(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "qlora_cli", *arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(MINIMAL)
    return tmp_path


def test_a_valid_recipe_is_said_on_stdout(folder: Path):
    done = qlora(folder, "validate", "r.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "r.yaml: " + VALID,
        "",
    )


def test_problems_are_lines_on_stderr_and_exit_code_2(folder: Path):
    done = qlora(folder, "validate", "r.yaml", "--set", "adapter.r=0", "--set", "adapter.lora_alpha=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "--set adapter.r=0: `adapter.r` is 0. Give a whole number, at least 1.\n"
        "--set adapter.lora_alpha=3: unknown key `lora_alpha: 3` in `adapter`. Here it is `adapter.alpha`.\n"
    )


def test_a_missing_recipe_is_a_message(folder: Path):
    done = qlora(folder, "validate", "none.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "none.yaml: no such file. Check the path, or write a starter with `qlora init PATH`.\n"


def test_json_is_one_object_for_success_and_for_problems(folder: Path):
    done = qlora(folder, "validate", "r.yaml", "--json", "--set", "adapter.r=8")
    answer = json.loads(done.stdout)
    assert (done.returncode, done.stderr, answer["problems"]) == (0, "", [])
    assert answer["recipe"]["adapter"]["r"] == 8
    done = qlora(folder, "validate", "r.yaml", "--json", "--set", "adapter.r=0")
    expected = {"where": "--set adapter.r=0", "what": "`adapter.r` is 0", "todo": "Give a whole number, at least 1"}
    assert (done.returncode, done.stderr, json.loads(done.stdout)) == (2, "", {"problems": [expected]})


def test_a_recipe_from_a_pipe_is_read(folder: Path):
    command = f"cat r.yaml | {sys.executable} -m qlora_cli validate /dev/stdin"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder, timeout=60)
    assert done.stdout.startswith("/dev/stdin: valid "), done.stderr


def test_schema_prints_json_or_the_page(folder: Path):
    assert json.loads(qlora(folder, "schema").stdout)["title"] == "qlora recipe"
    assert qlora(folder, "schema", "--markdown").stdout.startswith("# The recipe\n")


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-0.6B", "2e-4", "no", "a: b", "#x", 'it\'s "q"', "- x", "é\u2028", "{model}"]
)
def test_init_writes_a_recipe_that_is_valid(folder: Path, name: str):
    done = qlora(folder, "init", "new.yaml", "--model", name, "--data", f"{name}.jsonl")
    assert (done.returncode, done.stdout, done.stderr) == (0, "new.yaml\n", "")
    recipe = json.loads(qlora(folder, "validate", "new.yaml", "--json").stdout)["recipe"]
    assert (recipe["model"]["name_or_path"], recipe["data"]["train"][0]["path"]) == (name, f"{name}.jsonl")
    assert recipe["output_dir"] == "runs/new"


def test_init_without_arguments_writes_recipe_yaml_with_the_schema_line(folder: Path):
    assert qlora(folder, "init").stdout == "recipe.yaml\n"
    assert (folder / "recipe.yaml").read_text().startswith("# yaml-language-server: $schema=")
    assert qlora(folder, "validate", "recipe.yaml").returncode == 0


def test_init_never_overwrites(folder: Path):
    done = qlora(folder, "init", "r.yaml")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "r.yaml: exists already. Name another file, or delete this one first.\n"
    assert (folder / "r.yaml").read_text() == MINIMAL


def test_init_refuses_an_empty_name_and_a_missing_folder(folder: Path):
    done = qlora(folder, "init", "x.yaml", "--data", "")
    assert (done.returncode, done.stderr) == (
        2,
        "--data: `data.train[0].path` is ''. Give text, not an empty one.\n",
    )
    done = qlora(folder, "init", "none/x.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("none/x.yaml: cannot be written: No such file or directory. Name a file in a folder")
    assert not (folder / "x.yaml").exists()


def test_version_and_usage_errors(folder: Path):
    done = qlora(folder, "--version")
    assert (done.returncode, done.stdout) == (0, f"qlora {__version__}\n")
    for arguments in (["validate"], ["no-such-command"], ["validate", "r.yaml", "--no-such-option"]):
        done = qlora(folder, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Usage: qlora" in done.stderr


@pytest.mark.parametrize("command", ["validate", "schema", "init"])
def test_every_command_shows_an_example_that_runs(folder: Path, command: str):
    page = " ".join(qlora(folder, command, "--help").stdout.split())
    example = page.partition("Example: qlora ")[2].partition(" Arguments:")[0].partition(" Options:")[0]
    words = example.partition(" > ")[0].split()
    if command != "init":
        (folder / "my.yaml").write_text(MINIMAL)
    assert words[0] == command
    assert qlora(folder, *words).returncode == 0


def test_nothing_is_coloured_outside_of_a_terminal(folder: Path):
    for arguments in (["--help"], ["validate", "--help"], ["validate", "none.yaml"], ["validate"]):
        done = qlora(folder, *arguments)
        assert "\x1b" not in done.stdout + done.stderr


END = "import qlora_cli.cli as cli\nfrom qlora_cli.errors import *\ndef app(**_): raise {}\ncli.app = app\ncli.main()"


def test_each_kind_of_end_has_its_exit_code(folder: Path):
    done = python(folder, "-c", END.format("UserError('runs/x', 'in use', 'wait', Exit.IN_USE)"))
    assert (done.returncode, done.stderr) == (5, "runs/x: in use. Wait.\n")
    assert python(folder, "-c", END.format("KeyboardInterrupt")).returncode == 130
    done = python(folder, "-c", END.format("ZeroDivisionError"))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")


def test_an_interrupted_command_ends_with_130(folder: Path):
    code = "import qlora_cli.recipe as r, qlora_cli.cli as cli, sys\ndef stop(*_): raise KeyboardInterrupt\n"
    code += "r.load_recipe = stop\nsys.argv = ['qlora', 'validate', 'r.yaml']\ncli.main()"
    done = python(folder, "-c", code)
    assert (done.returncode, done.stdout) == (130, "")


def test_a_file_name_outside_of_the_terminals_encoding_is_no_traceback(folder: Path):
    code = f"import os; os.link(b'r.yaml', b'\\xff.yaml'); os.execv({sys.executable!r}, "
    code += f"[{sys.executable!r}, '-m', 'qlora_cli', 'validate', b'\\xff.yaml'])"
    done = python(folder, "-c", code)
    assert (done.returncode, done.stdout) == (0, "\\udcff.yaml: " + VALID)


def test_no_heavy_module_is_loaded_for_help_or_a_recipe(folder: Path):
    code = "import sys, qlora_cli.cli as cli\nsys.argv = ['qlora', *{}]\ntry: cli.main()\nexcept SystemExit: pass\n"
    code += "print(sorted({{'torch', 'transformers', 'pydantic', 'yaml', 'rich'}} & set(sys.modules)), file=sys.stderr)"
    assert python(folder, "-c", code.format(["--help"])).stderr.splitlines()[-1] == "[]"
    assert python(folder, "-c", code.format(["validate", "r.yaml"])).stderr.splitlines()[-1] == "['pydantic', 'yaml']"


def cpu_seconds(folder: Path, *arguments: str) -> float:
    """Processor time of a whole Python process: other work on the machine does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python(folder, *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_and_recipe_errors_come_at_once(folder: Path):
    """Help within twice, a recipe error within three times what importing typer and rich alone takes."""
    cases = {
        "imports": ("-c", "import typer, rich.console"),
        "help": ("-m", "qlora_cli", "--help"),
        "error": ("-m", "qlora_cli", "train", "r.yaml", "--set", "adapter.r=0"),
    }
    best = dict.fromkeys(cases, 60.0)
    for _ in range(7):  # taken in turn, the least of each
        for name, arguments in cases.items():
            best[name] = min(best[name], cpu_seconds(folder, *arguments))
    assert best["help"] < 2 * best["imports"], best
    assert best["error"] < 3 * best["imports"], best


def test_a_reader_that_has_gone_is_no_traceback(tmp_path):
    """As `qlora schema | head -1`: the pipe's other end is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "qlora_cli", "schema"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")
