"""What PyYAML's scanner and parser complain of, in the words of someone who writes a recipe."""

from __future__ import annotations

# (what PyYAML says, what it means, what to do): the first entry whose first part occurs in the complaint
PROBLEMS: tuple[tuple[str, str, str], ...] = (
    (r"found character '\t'", "a tab", "Use spaces: YAML knows no tabs outside of quotes"),
    ("cannot start any token", "a character with which no plain value can begin", "Put the value in quotes"),
    ("mapping values are not allowed here", "a second `:`", "Put the value in quotes, or mend the indentation"),
    ("could not find expected ':'", "a key without its value", "Write `key: value`, with a space after the colon"),
    ("but found '<block", "indentation that fits nothing above", "Indent the keys of one section alike"),
    ("expected <block end>", "something that is not `key: value`", "Mend the indentation or the quotes of this line"),
    ("sequence entries are not allowed here", "a `-` in the wrong place", "Begin the list on a line of its own"),
    ("expected ',' or", "a list or mapping in brackets that is not closed", "Close the bracket or add the comma"),
    ("found unexpected end of stream", "a quote that is not closed", "Add the closing quote"),
    ("document separator", "a quote that is not closed", "Add the closing quote"),
    ("unknown escape character", "a backslash in double quotes", 'Use single quotes, or write `\\\\` inside of "..."'),
    ("but found another document", "a second document", "Keep one recipe per file: delete `---` and what follows"),
    ("undefined alias", "an alias without its anchor", "Write the value out, or quote a `*` that is meant as text"),
    ("second occurrence", "an anchor that is already taken", "Give each `&anchor` a name of its own"),
    ("undefined tag handle", "a tag", "Delete it: a recipe holds plain values only, and a text with `!` needs quotes"),
    ("expected '<document start>'", "something after the end of the recipe", "Delete it, or mend the brackets above"),
    ("expected the node content", "no value where one belongs", "Write the value, or delete this"),
    ("an escape or directive", "an escape or directive that no text can hold", "Delete it"),
)


def in_plain_words(complaint: str, line: str) -> tuple[str, str]:
    """(what, todo) for a complaint of PyYAML about `line`; what is not in the table is passed on as it is."""
    seen = f", in `{line if len(line) <= 60 else line[:57] + '...'}`" if line else ""
    for part, meaning, todo in PROBLEMS:
        if part in complaint:
            return meaning + seen, todo
    return f"YAML cannot be read here ({complaint}){seen}", "Write `key: value` lines, indented with spaces"
