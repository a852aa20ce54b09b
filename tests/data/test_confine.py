"""What the kernel lets a preparing process do."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from preparing import SHORT, load, make_job, make_task, write_rows
from tiny_tokenizer import CHATML, tiny_tokenizer

from qlora_cli.data import pool as pool_module
from qlora_cli.data.confine import cpu_limit
from qlora_cli.data.pool import PACKAGE, Pool

NOT_ROOT = """
import importlib, os
from qlora_cli.data import confine, worker
for name in confine.LOADED_LATER:
    importlib.import_module(name)
if os.getuid() == 0:
    os.setuid(65534)  # nobody: the kernel does not count the processes of root
"""


def confined(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a confined process without root's rights says."""
    text = (
        f"import sys; sys.path.insert(0, {str(PACKAGE)!r})\n{NOT_ROOT}confine.confine(2**28)\n{textwrap.dedent(code)}"
    )
    return subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "open('file', 'w').write('a')",
        "open('/etc/passwd').read()",
        "open('there', 'a').write('a')",
        "os.open('file', os.O_CREAT)",
        "import socket; socket.socket()",
        "os.pipe()",
        "os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import threading; threading.Thread(target=print).start()",
        "'a' * 2**29",
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))",
    ],
)
def test_a_confined_process_can_only_compute(code: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "there").touch(0o666)
    done = confined(f"try:\n    {code}\nexcept BaseException as error:\n    print(type(error).__name__)", tmp_path)
    assert done.stdout.strip() in {"OSError", "BlockingIOError", "RuntimeError", "MemoryError", "ValueError"}, done
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == ""


def test_time_beyond_the_limit_ends_the_process_even_in_one_operation(tmp_path: Path) -> None:
    began = time.monotonic()
    done = confined("with confine.cpu_limit(0.2): 10 ** (10 ** 8)", tmp_path)
    assert done.returncode == -signal.SIGPROF
    assert time.monotonic() - began < 10


def test_the_limit_ends_with_its_block() -> None:
    with cpu_limit(60):
        assert signal.getitimer(signal.ITIMER_PROF)[0] > 50
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0


EVERYTHING = (
    "{{ lipsum(n=1) | length > 9 }}{{ [1, {'a': 'é'}] | pprint }}{{ 'a b' | wordwrap(1) }}{{ '\\N{BULLET}\\u00e9' }}"
    "{{ 'a&b' | urlize }}{{ 'é' | urlencode }}{{ [1] | tojson(indent=1) }}{{ strftime_now('%d %b %Y %Z %p') }}"
    "{{ 'Straße' | title | upper }}{{ 1.5 | round | string | float }}"
    "{{ 10 | filesizeformat }}{{ '<b>' | striptags | escape }}{{ 'x'.encode('utf-8') }}{{ [3, 1] | sort | sum }}"
)
"""Filters that import modules, read tables, or look for a codec."""


def test_templates_find_what_they_need_though_no_file_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = NOT_ROOT + "worker.main()"
    monkeypatch.setattr(pool_module, "COMMAND", pool_module.COMMAND.split("from")[0] + "\n" + main)
    template = EVERYTHING + CHATML
    examples = load(write_rows(tmp_path / "a.jsonl", [SHORT]), tokenizer=tiny_tokenizer(template=template))
    text = tiny_tokenizer().decode(examples.rows[0].input_ids)
    assert "True[1, {'a': 'é'}]a\nb•éa&amp;b%C3%A9[\n" in text
    assert "02 Jan 2026  AMSTRASSE2.010 Bytes" in text


def test_a_module_that_is_not_there_yet_is_refused_with_the_template() -> None:
    with Pool(make_job(tiny_tokenizer(template="{{ 'a'.encode('cp500') }}" + CHATML)), 1) as pool:
        (result,) = pool.map([make_task([SHORT])])
    ((_, where, what, _),) = result.bad
    assert where == "a:1"
    assert "cp500" in what
