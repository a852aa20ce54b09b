"""Does a recipe name anything that is not on this machine? If not, no socket is opened."""

from __future__ import annotations

import os

from qlora_cli.recipe.schema import Recipe

LOCAL_TRACKERS = ("tensorboard",)


def names_something_remote(recipe: Recipe) -> bool:
    """Whether the model, a data source or a tracker may need the network: what is not found here may be on a hub."""
    paths = [recipe.model.name_or_path, *(source.path for source in [*recipe.data.train, *recipe.data.eval])]
    return any(not os.path.exists(path) for path in paths) or any(t not in LOCAL_TRACKERS for t in recipe.report_to)
