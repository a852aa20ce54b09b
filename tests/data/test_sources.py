"""What a source's path means, and its rows in order: files, folders, patterns and hub ids, without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.hub import HubData
from qlora_cli.data.readers import READERS, DataFile
from qlora_cli.data.rows import Mark, describe, near_names
from qlora_cli.data.sources import SourceMark, read_parts, read_source, resolve
from qlora_cli.errors import Exit, UserError
from qlora_cli.recipe.schema import Source
from tests.data.test_readers import ROWS, write


def rows_of(path: Path | str, role: str = "train", **options: object) -> list[Any]:
    return [read.value for _, read in read_source(Source(path=str(path), **options), role)]


def refusal(path: Path | str, role: str = "train", **options: object) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(path, role, **options)
    return str(caught.value)


def files_of(path: Path | str, below: Path, **options: object) -> list[str]:
    """The files that a path means, below a folder."""
    return [os.path.relpath(part.path, below) for part in resolve(Source(path=str(path), **options), "train").parts]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with files of several types, each with its own name as its one row."""
    folder = tmp_path / "corpus"
    names = ["b/train-00000-of-00002.parquet", "b/train-00001-of-00002.parquet", "b/test.jsonl.gz", "a.jsonl"]
    for name in [*names, "train/x.csv", "train/deep/y.txt", "retrained.txt", ".hidden.jsonl", ".cache/z.jsonl"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, [{"text": name}])
    for name in ("README.md", "LICENSE", "b/picture.png"):
        (folder / name).write_text("x")
    return folder


# ── a file ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    assert resolve(Source(path=str(path)), "train").parts == (DataFile(str(path)),)
    assert rows_of(path) == ROWS
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows_of("~/a.jsonl") == rows_of("~/a.[j]*") == ROWS


@pytest.mark.parametrize("suffix", READERS)
def test_limit_takes_the_first_rows(tmp_path: Path, suffix: str) -> None:
    assert rows_of(write(tmp_path / f"data{suffix}", ROWS), limit=2) == ROWS[:2]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, 7, {"a"')
    first, second = rows_of(tmp_path / "a.json", limit=2)
    assert first == {"a": 1}
    assert "found the number 7" in str(second)


@pytest.mark.parametrize("content", [b"\n\n", b"[]", b" [ ]\n"])
def test_a_source_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert refusal(tmp_path / "a.json") == f"{tmp_path}/a.json: holds no rows. Name a source with at least one row."
    (tmp_path / "a.csv").write_text("a,b\n")
    assert "holds no rows" in refusal(tmp_path / "a.csv")


def test_an_empty_file_is_refused_in_a_folder_too(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").touch()
    message = f"{tmp_path}/b.jsonl: the file is empty. Name a file with at least one row."
    assert refusal(tmp_path / "b.jsonl") == refusal(tmp_path) == refusal(tmp_path / "*.jsonl") == message


def test_an_unknown_type_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    message = refusal(tmp_path / "a.xlsx")
    assert "unknown file type '.xlsx'. Use one of .json, .jsonl, .csv, .tsv, .txt (each also as .gz or .zst)" in message
    for suffix in READERS:
        assert suffix.removesuffix(".gz").removesuffix(".zst") in message


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    assert f"no such file (did you mean {tmp_path}/train.jsonl?)" in refusal(tmp_path / "trian.jsonl")
    assert f"no such file (there is no folder {tmp_path}/data)" in refusal(tmp_path / "data/train.jsonl")
    assert near_names(tmp_path / "zzzzzz") == ""


@pytest.mark.parametrize("path", ["train.jsonl", "data/train.csv", "./data", "a/b/c", "no such", "~/x.json"])
def test_what_looks_like_a_path_never_asks_the_hub(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such file" in refusal(path)


def test_a_name_in_a_folder_that_exists_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "data").mkdir()
    assert "no such file" in refusal("data/train")


def test_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is not a regular file" in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize("option", ["split", "name"])
def test_a_file_has_no_split_and_no_name(tmp_path: Path, option: str) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    assert f"{option} is set, but a file has none" in refusal(path, **{option: "train"})


# ── a folder or a pattern ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_is_all_its_files_of_a_known_type_in_order(corpus: Path) -> None:
    resolved = resolve(Source(path=str(corpus)), "train")
    found = [os.path.relpath(part.path, corpus) for part in resolved.parts]
    assert found == [
        *("a.jsonl", "b/test.jsonl.gz", "b/train-00000-of-00002.parquet", "b/train-00001-of-00002.parquet"),
        *("retrained.txt", "train/deep/y.txt", "train/x.csv"),
    ]
    assert resolved.num_ignored == 3
    assert rows_of(corpus) == [{"text": name} for name in found]


PATTERNS = {
    "*.jsonl": ["a.jsonl"],
    "*": ["a.jsonl", "retrained.txt"],
    "?.jsonl": ["a.jsonl"],
    "b/train-0000[1-9]*": ["b/train-00001-of-00002.parquet"],
    "[!a]*/*.csv": ["train/x.csv"],
    "**/*.txt": ["retrained.txt", "train/deep/y.txt"],
    "**/y.txt": ["train/deep/y.txt"],
    "train/**": ["train/deep/y.txt", "train/x.csv"],
    "t*/**/*.*": ["train/deep/y.txt", "train/x.csv"],
    ".cache/*": [".cache/z.jsonl"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_the_files_that_match(corpus: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files_of(corpus / pattern, corpus) == PATTERNS[pattern]
    monkeypatch.chdir(corpus)
    assert [os.path.normpath(path) for path in files_of(pattern, Path())] == PATTERNS[pattern]


def test_a_file_whose_name_is_a_pattern_is_that_file(corpus: Path) -> None:
    write(corpus / "[a].jsonl", ROWS)
    assert files_of(corpus / "[a].jsonl", corpus) == ["[a].jsonl"]
    (corpus / "x[1]").mkdir()
    write(corpus / "x[1]/a.jsonl", ROWS)
    assert files_of(corpus / "x[1]", corpus) == ["x[1]/a.jsonl"]


SPLITS = {
    "train": ["b/train-00000-of-00002.parquet", "b/train-00001-of-00002.parquet", "train/deep/y.txt", "train/x.csv"],
    "test": ["b/test.jsonl.gz"],
    "00001": ["b/train-00001-of-00002.parquet"],
    "deep": ["train/deep/y.txt"],
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_is_a_word_of_the_path_below_the_folder(corpus: Path, split: str) -> None:
    assert files_of(corpus, corpus, split=split) == SPLITS[split]
    assert files_of(corpus / "**", corpus, split=split) == SPLITS[split]


def test_a_split_is_not_looked_for_above_the_folder(corpus: Path) -> None:
    what = "split is 'corpus', and no file has this word in its path: a.jsonl, b/test.jsonl.gz"
    message = refusal(corpus, split="corpus")
    assert what in message
    assert "retrained.txt and 2 more. Correct split, or remove it to read all of them" in message


def test_a_folder_or_pattern_without_rows_says_what_is_there(tmp_path: Path) -> None:
    assert f"{tmp_path}: the folder holds no files; in {tmp_path}: nothing" in refusal(tmp_path)
    assert f"no file matches: there is no folder {tmp_path}/data" in refusal(tmp_path / "data/*.jsonl")
    for name in ("a.xlsx", "b.xlsx", "c"):
        (tmp_path / name).write_text("x")
    assert f"no file matches; in {tmp_path}: a.xlsx, b.xlsx, c" in refusal(tmp_path / "*.jsonl")
    for path in (tmp_path, tmp_path / "*"):
        message = refusal(path)
        assert "no file of a known type, only 2 with .xlsx, 1 with no suffix. Use one of .json, .jsonl" in message


def test_files_have_no_name(corpus: Path) -> None:
    assert "name is set, but files have none. Remove name" in refusal(corpus, name="main")
    assert "name is set, but files have none" in refusal(corpus / "*", name="main")


def test_links_that_lead_in_circles_are_followed_once(corpus: Path, tmp_path: Path) -> None:
    expected = files_of(corpus, corpus)
    for name in ("b/up", "b/up2", "train/deep/up"):
        (corpus / name).symlink_to(corpus, target_is_directory=True)
    assert files_of(corpus, corpus) == expected
    assert files_of(corpus / "**", corpus) == expected
    write(tmp_path / "elsewhere.jsonl", ROWS)
    (corpus / "b/link.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert files_of(corpus / "b/l*", corpus) == ["b/link.jsonl"]


def test_a_link_that_leads_nowhere_is_no_silent_gap(corpus: Path) -> None:
    (corpus / "b/train-00002.parquet").symlink_to(corpus / "gone")
    assert f"{corpus}/b/train-00002.parquet: cannot be read: No such file or directory" in refusal(corpus)


def test_a_folder_that_cannot_be_listed_is_no_silent_gap(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def denied(path: str) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)  # root lists everything
    assert f"{corpus}/train/deep: cannot be listed: Permission denied. Check the folder" in refusal(corpus)


def test_what_datasets_saves_is_a_folder_of_rows(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    shutil.copy(next(tmp_path.glob("data*.arrow")), tmp_path / "cache-0123456789abcdef.arrow")
    assert rows_of(tmp_path) == ROWS
    assert resolve(Source(path=str(tmp_path)), "train").num_ignored == 3
    (tmp_path / "dataset_info.json").unlink()
    (tmp_path / "state.json").write_text('{"name": "Ohio"}')
    assert len(files_of(tmp_path, tmp_path)) == 3


# ── rows in order ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parts_follow_each_other_and_reading_goes_on_from_any_row(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.jsonl", [{"n": f"{number}.{row}"} for row in range(3)])
    (tmp_path / "1.jsonl").write_text("\n")
    for limit in (None, 1, 3, 4, 6):
        source = Source(path=str(tmp_path), limit=limit)
        whole = list(read_source(source, "train"))
        numbers = [(part, read.value["n"]) for part, read in whole]
        assert numbers == [(0, "0.0"), (0, "0.1"), (0, "0.2"), (2, "2.0"), (2, "2.1"), (2, "2.2")][:limit]
        for index, (part, read) in enumerate(whole):
            place = SourceMark(part, read.after, index + 1)
            assert list(read_source(source, "train", place)) == whole[index + 1 :]
            assert list(read_parts(resolve(source, "train").parts, source, place)) == whole[index + 1 :]


def test_bad_rows_are_among_the_rows_and_count(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n7\n{"a": 3}\n{"a": 4}\n')
    values = rows_of(tmp_path / "a.jsonl", limit=3)
    assert (values[0], values[2]) == ({"a": 1}, {"a": 3})
    assert str(values[1]).startswith(f"{tmp_path}/a.jsonl:2: expected an object with named columns, found the number 7")


OFFLINE = """
import sys
def watch(event, arguments):
    if event in ("socket.__new__", "socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(watch)
from qlora_cli.data.sources import read_source
from qlora_cli.recipe.schema import Source
for path in sys.argv[1:]:
    assert list(read_source(Source(path=path), "train"))
    if path.endswith((".json", ".jsonl", ".csv", ".tsv", ".txt")):
        assert "pyarrow" not in sys.modules
assert "torch" not in sys.modules and "datasets" not in sys.modules
"""


@pytest.mark.parametrize("namespace", [[], ["unshare", "-n"]], ids=["watched", "without a network"])
def test_local_files_open_no_socket_and_leave_no_cache(tmp_path: Path, namespace: list[str]) -> None:
    if namespace and (
        not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode
    ):
        pytest.skip("this machine does not let us make a network namespace")
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "data").mkdir()
    paths = [str(write(tmp_path / f"data/rows{suffix}", ROWS)) for suffix in READERS]
    plain = sorted(paths, key=lambda path: path.endswith((".gz", ".zst", ".parquet", ".arrow")))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    subprocess.run(
        [*namespace, sys.executable, "-c", OFFLINE, *plain, str(tmp_path / "data/**/*.gz"), str(tmp_path / "data")],
        check=True,
        env={**environment, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert list(home.iterdir()) == []


# ── the hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A hub with one data set, and the calls that it got."""
    import datasets

    calls: list[tuple] = []

    def load(path: str, name: str | None, split: str, streaming: bool = False) -> Any:
        calls.append((path, name, split, streaming))
        if path == "owner/missing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/missing' doesn't exist on the Hub")
        if path == "owner/offline":
            raise ConnectionError("Couldn't reach 'owner/offline' on the Hub")
        dataset = datasets.Dataset.from_list([{"text": "a", "id": 1}, {"text": "b"}, {"text": "c"}])
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_a_hub_id_is_read_by_split_name_and_limit(hub: list[tuple]) -> None:
    source = Source(path="owner/corpus-v1.0", name="main", limit=2)
    (part,) = resolve(source, "train").parts
    assert part == HubData("owner/corpus-v1.0", "main", "train")
    assert part.place(2) == "owner/corpus-v1.0[train]:row 2"
    assert hub == []  # nothing is loaded before it is read
    assert rows_of("owner/corpus-v1.0", name="main", limit=2) == [{"text": "a", "id": 1}, {"text": "b"}]
    rows_of("corpus", "eval")
    rows_of("corpus", "eval", split="extra")
    rows_of("corpus", streaming=True)
    assert hub == [
        ("owner/corpus-v1.0", "main", "train", False),
        ("corpus", None, "validation", False),
        ("corpus", None, "extra", False),
        ("corpus", None, "train", True),
    ]


def test_the_hubs_errors_say_that_no_file_is_there_either(hub: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal("owner/missing")
    assert message.startswith("owner/missing: is no local file, and the hub does not give it: Dataset 'owner/missing'")
    for attempt in (rows_of, lambda path: HubData(path, None, "train").digest()):
        with pytest.raises(UserError) as caught:
            attempt("owner/offline")
        assert caught.value.code == Exit.ENVIRONMENT
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *_: ["train"])
    assert "it has no split test or validation, only train" in refusal("corpus", role="eval")


def test_a_data_set_that_became_shorter_is_not_taken_for_read(hub: list[tuple]) -> None:
    assert [read.value for read in HubData("corpus", None, "train").read(Mark(3))] == []
    with pytest.raises(UserError, match="it has 3 rows, fewer than were read of it before"):
        list(HubData("corpus", None, "train").read(Mark(4)))


def test_a_row_of_the_hub_that_is_lost_on_the_way_is_an_error(
    hub: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost:
        def __iter__(self) -> Any:
            yield {"text": "a"}
            raise ConnectionError("Server Disconnected")

        def state_dict(self) -> dict:
            return {}

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Lost())
    rows = HubData("corpus", None, "train", streaming=True).read()
    assert next(rows).value == {"text": "a"}
    with pytest.raises(UserError, match="the hub does not give it: Server Disconnected") as caught:
        next(rows)
    assert caught.value.code == Exit.ENVIRONMENT


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of the hub's form on disk: three parquet files of several row groups, and a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    for number in range(3):
        rows = [{"text": f"{number}.{row}", "even": row if row % 2 == 0 else None} for row in range(25)]
        write(tmp_path / f"hub/train-{number:05d}-of-00003.parquet", rows, group=10)
    return tmp_path / "hub"


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_itself_goes_on_from_any_row(saved: Path, streaming: bool) -> None:
    data = HubData(str(saved), None, "train", streaming)
    whole = list(data.read())
    numbers = [(file, row) for file in range(3) for row in range(25)]
    expected = [{"text": f"{file}.{row}", **({"even": row} if row % 2 == 0 else {})} for file, row in numbers]
    assert [(read.number, read.value) for read in whole] == list(enumerate(expected, 1))
    for cut in (0, 9, 10, 23, 24, 25, 60, 74):
        for start in (whole[cut].after, Mark(cut + 1), Mark(cut + 1, state='["4.0.0", {}]')):
            rest = list(data.read(start))
            assert [(read.number, read.value) for read in rest] == list(enumerate(expected, 1))[cut + 1 :]
            for again in rest[::7]:  # a state that was reached from a state
                assert [read.value for read in data.read(again.after)] == expected[again.number :]
    assert bool(json.loads(whole[0].after.state or "[]")) == streaming


@pytest.mark.parametrize("streaming", [False, True])
def test_the_digest_of_a_data_set_changes_with_its_files(saved: Path, streaming: bool) -> None:
    def digest(name: str | None = None, split: str = "train") -> str:
        return HubData(str(saved), name, split, streaming).digest()

    first = digest()
    assert len(first) == 64
    assert digest() == first
    assert digest(name="default") != first
    write(saved / "train-00001-of-00003.parquet", [{"text": "other", "even": 1}])
    os.utime(saved / "train-00001-of-00003.parquet", ns=(1, 1))
    assert digest() != first


def test_a_streamed_file_that_breaks_is_an_error(saved: Path) -> None:
    path = saved / "train-00002-of-00003.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    message = refusal_of(HubData(str(saved), None, "train", streaming=True))
    assert message.startswith(f"{saved}: is no local file, and the hub does not give it: ")


def refusal_of(data: HubData) -> str:
    with pytest.raises(UserError) as caught:
        list(data.read())
    return str(caught.value)


def test_values_are_described_in_words() -> None:
    values = (None, True, 3, "x", [], {}, b"")
    assert [describe(value) for value in values] == [
        *("null", "true", "the number 3", "a text", "a list", "an object", "a bytes"),
    ]
