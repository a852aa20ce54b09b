"""Any bytes as a recipe: the values that YAML 1.2 means, or one message with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.errors import UserError
from qlora_cli.recipe import Recipe, load_recipe
from qlora_cli.recipe.located_yaml import MAX_BYTES, Located, parse_yaml, read_yaml, show

VALID = b"""\
model: {name_or_path: base}
quantization:
  data_type: nf4
  double_quant: true
adapter: &shared
  r: 8  # rank
  target_modules: [q_proj, "v_proj"]
data:
  train:
    - path: 'rows.jsonl'
      limit: 10
training:
  learning_rate: 2e-4
output_dir: >-
  runs/one
"""


def message(folder: Path, data: bytes) -> str:
    path = folder / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    return str(caught.value).replace(f"{path}:", "")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.0", 0.0),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-3", -3),
        ("TRUE", True),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("12:30:45", "12:30:45"),
        ("2026-99-99", "2026-99-99"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ('"5"', "5"),
        ("!!str 5", "5"),
        ('!!int "5"', 5),
        ("nan", "nan"),
        ("=", "="),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object):
    read, _ = parse_yaml(f"key: {text}", Located("x"))
    assert read == {"key": value}
    assert type(read["key"]) is type(value)


def test_keys_and_values_have_places_and_an_alias_has_those_of_its_anchor():
    _, located = parse_yaml("\ufeffa: 1\nb:\n  - &x c\n  - {d: *x}\n".lstrip("\ufeff"), Located("f.yaml"))
    assert str(located.keys["a",]) == "f.yaml:1:1"
    assert str(located.values["a",]) == "f.yaml:1:4"
    assert str(located.keys["b", 1, "d"]) == "f.yaml:4:6"
    assert str(located.values["b", 1, "d"]) == "f.yaml:3:5"


ALIAS_BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % ((98 + i, 98 + i) + (97 + i,) * 9) for i in range(9)
)


@pytest.mark.parametrize(
    ("data", "where", "words"),
    [
        (b"", "1:1", "the recipe is empty. Write a starter with `qlora init PATH`."),
        (b"# only a comment\n", "1:1", "the recipe is empty"),
        (b"- a", "1:1", "a recipe is a mapping, this is ['a']. Begin with `model:` and its keys."),
        (b"hello", "1:1", "a recipe is a mapping, this is 'hello'"),
        (b"a: 1\n---\nb: 2", "2:1", "a second document, in `---`. Keep one recipe per file"),
        (b"a: 1\nb: 2\na: 3", "3:1", "the key `a` appears twice, first at line 1, column 1. Delete one of the two."),
        (b"a: {b: 1, b: 2}", "1:11", "the key `b` appears twice, first at line 1, column 5"),
        (b"<<: {a: 1}", "1:1", "the merge key `<<`, which YAML 1.2 does not have. Write the merged keys out."),
        (b"a: {5: x}", "1:5", 'the key 5 is not text. Put it in quotes: "5".'),
        (b"true: x", "1:1", "the key true is not text"),
        (b"? [a]\n: x", "1:3", "a key that is itself a list or a mapping. Write `key: value`"),
        (b"a: !foo 3", "1:4", "the tag `!foo`. Delete it"),
        (b"a: !!python/name:os.system x", "1:4", "the tag `!!python/name:os.system`. Delete it"),
        (b"a: !!timestamp 2026-01-01", "1:4", "the tag `!!timestamp`. Delete it"),
        (b"a: !!set {b}", "1:4", "the tag `!!set`. Delete it"),
        (b"a: !!map [1]", "1:4", "the tag `!!map`. Delete it"),
        (b"a: !!int x", "1:4", "'x' is no !!int. Delete the tag or mend the value."),
        (b"a: !x!y z", "1:4", "a tag, in `a: !x!y z`. Delete it"),
        (b"a: &x [*x]", "1:4", "levels once aliases are written out. Use fewer: an alias that repeats others"),
        (ALIAS_BOMB, "1:4", "more than 20000 values or 50 levels once aliases are written out"),
        (b"a: [" + b"1," * 30_000 + b"]", "1:39999", "more than 20000 values"),
        (b"a: *y", "1:4", "an alias without its anchor, in `a: *y`. Write the value out"),
        (b"a: &x 1\nb: &x 2", "2:4", "an anchor that is already taken, in `b: &x 2`"),
        (b"[" * 3000, "1:51", "nested deeper than 50 levels. Close the brackets"),
        (b"- " * 3000, "1:101", "nested deeper than 50 levels"),
        (b"a: " + b"9" * 5000, "1:4", "the number 99999999999999999999... of 5000 characters does not fit in 64 bits"),
        (b"a: -9223372036854775808", "1:4", "does not fit in 64 bits. Write a smaller number."),
        (b"a: .nan", "1:4", ".nan is not a finite number. Write a number, or leave the key out."),
        (b"a: -.INF", "1:4", "-.INF is not a finite number"),
        (b"a: 1e999", "1:4", "1e999 is not a finite number"),
        (b"\xff\xfea\0", "1:1", "the byte 0xFF is not UTF-8. Save the recipe as UTF-8 text."),
        ("a: ä\nü: ".encode() + b"\x80", "2:4", "the byte 0x80 is not UTF-8"),
        (b"a: 1\nb: x\0y", "2:5", "the character U+0000. Delete it: a recipe is printable text."),
        (b'a: "\\0"', "1:4", "the character U+0000 in '\\x00'. Delete it: no text can hold it."),
        (b'a: "\\ud800"', "1:4", "the character U+D800 in '\\ud800'"),
        (b'a: "\\UFFFFFFFF"', "1:7", "an escape or directive that no text can hold"),
        (b"%YAML 1." + b"9" * 5000 + b"\n---\na: 1", "1:9", "an escape or directive that no text can hold"),
        (b'a: "\\q"', "1:6", 'a backslash in double quotes, in `a: "\\q"`. Use single quotes'),
        (b"a:\n\tb: 1", "2:1", "a tab, in `b: 1`. Use spaces"),
        (b"a:\tb", "1:3", "a tab, in"),
        (b"a: 1\nb: 'x\nc: 2", "2:4", "a quote that is not closed, in `b: 'x`. Add the closing quote."),
        (b'a: "x\n---\n"', "2:1", "a quote that is not closed"),
        (b"a: [1, 2\nb: 3\n", "2:2", "a list or mapping in brackets that is not closed"),
        (b"a: {b: 1", "1:4", "a list or mapping in brackets that is not closed, in `a: {b: 1`. Close the bracket"),
        (b"{a: 1}}", "1:7", "something after the end of the recipe, in `{a: 1}}`. Delete it"),
        (b"a: b: c", "1:5", "a second `:`, in `a: b: c`. Put the value in quotes, or mend the indentation."),
        (b"a: @x", "1:4", "a character with which no plain value can begin, in `a: @x`. Put the value in quotes."),
        (b"a: 1\nb\nc: 1", "3:1", "a key without its value, in `c: 1`. Write `key: value`"),
        (b" a: 1\nb: 2", "2:1", "indentation that fits nothing above, in `b: 2`. Indent"),
        (b"a: |\n  x\n y", "3:2", "something that is not `key: value`, in `y`. Mend the indentation"),
        (b"a: - b", "1:4", "a `-` in the wrong place, in `a: - b`. Begin the list on a line of its own."),
        (b"...", "1:1", "no value where one belongs, in `...`. Write the value, or delete this."),
        (b"%YAML 2.0\n---\na: 1", "1:1", "YAML cannot be read here (found incompatible YAML document"),
    ],
)
def test_what_is_no_recipe_gets_a_place_the_cause_and_a_remedy(tmp_path: Path, data: bytes, where: str, words: str):
    text = message(tmp_path, data)
    assert text.startswith(f"{where}: "), text
    assert words in text


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    values, located = read_yaml(tmp_path / "r.yaml")
    assert values == {"a": 1}
    assert located.keys["a",].column == 1


def test_a_path_without_a_readable_recipe_says_why(tmp_path: Path):
    (tmp_path / "big").write_bytes(b"#" * (MAX_BYTES + 1))
    expected = {
        tmp_path / "none.yaml": "no such file. Check the path, or write a starter with `qlora init PATH`.",
        tmp_path: "this is a folder. Name the recipe file in it.",
        tmp_path / "big": "larger than 256 KiB. Name a recipe, not a data or weight file.",
        tmp_path / ("x" * 300): "cannot be read: File name too long. Make it a file that you may read.",
    }
    for path, words in expected.items():
        with pytest.raises(UserError) as caught:
            read_yaml(path)
        assert str(caught.value) == f"{path}: {words}"


def test_values_are_shown_as_yaml_and_cut_short():
    assert show({"a": [True, None, "x", 2.5]}) == "{a: [true, null, 'x', 2.5]}"
    assert len(show("x" * 1000)) == 60


def loads_or_complains(path: Path, data: bytes) -> bool:
    """Whether there is a recipe, or a message of which every line names the file."""
    path.write_bytes(data)
    try:
        return isinstance(load_recipe(path), Recipe)
    except UserError as error:
        lines = str(error).splitlines()
        return bool(lines) and all(line.startswith(str(path)) for line in lines)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "r.yaml"


@settings(max_examples=500, deadline=5000)
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes_give_a_message_and_no_traceback(scratch: Path, data: bytes):
    assert loads_or_complains(scratch, data)


PIECES = [bytes([byte]) for byte in b"[]{},:-?&*!|>%@`\"'#\t\n \0~<\x85"] + [
    *(b"!!", b"<<: *shared", b"*shared", b"---\n", b"...", b"\n  ", b": ", b"? ", b"2e-4", b".nan", b"9" * 5000),
    *(b"!!float ", b"\\x", b"\xff", b"\xe2\x80\xa8", b"null", b"[" * 60, b"data:\n", b"  - ", b"%YAML 1.1\n", b'"\\U'),
]
EDITS = st.lists(
    st.tuples(
        st.integers(0, len(VALID)), st.integers(0, 30), st.one_of(st.sampled_from(PIECES), st.binary(max_size=4))
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=500, deadline=5000)
@given(edits=EDITS)
def test_a_damaged_recipe_gives_a_message_and_no_traceback(scratch: Path, edits: list[tuple[int, int, bytes]]):
    data = VALID
    for start, length, piece in edits:
        data = data[:start] + piece + data[start + length :]
    assert loads_or_complains(scratch, data)
