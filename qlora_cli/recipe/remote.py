"""What a recipe names: on this machine or elsewhere? If nothing is elsewhere, no socket is opened."""

from __future__ import annotations

import glob
import os
import re
from typing import Any

from qlora_cli.recipe.schema import Recipe

LOCAL_TRACKERS = ("tensorboard",)

_FILE = re.compile(r"[./~].*|.*\.[A-Za-z]\w{0,7}")  # rows.jsonl is one, owner/corpus-v1.0 is not: as in data/sources.py


def is_local(path: str) -> bool:
    """Whether a path means something on this machine: it is there, or it has the form of a file or a pattern."""
    return os.path.lexists(path) or glob.has_magic(path) or bool(_FILE.fullmatch(path))


def names_something_remote(recipe: Recipe) -> bool:
    """Whether the model, a data source or a tracker may need the network: what is not found here may be on a hub."""
    sources = [*recipe.data.train, *recipe.data.eval]
    remote = [not os.path.exists(recipe.model.name_or_path), *(not is_local(source.path) for source in sources)]
    return any(remote) or any(tracker not in LOCAL_TRACKERS for tracker in recipe.report_to)


def whole(path: str) -> str:
    """The path from the root on. Not abspath: that takes link/.. for the folder that link is in."""
    return os.path.join(os.getcwd(), os.path.expanduser(path).removeprefix("./"))


def with_whole_paths(recipe: Recipe) -> Recipe:
    """The recipe with every local path whole, so that its run is found from any folder."""
    values: dict[str, Any] = recipe.model_dump(by_alias=True)
    places = [(values["model"], "name_or_path"), (values["adapter"], "from"), (values["data"], "chat_template")]
    for holder, name in places:
        if holder[name] is not None and os.path.lexists(os.path.expanduser(holder[name])):
            holder[name] = whole(holder[name])
    for source in [*values["data"]["train"], *values["data"]["eval"]]:
        if is_local(source["path"]):
            source["path"] = whole(source["path"])
    return Recipe.model_validate(values, by_alias=True, by_name=False)
