"""`qlora merge`."""

from qlora_cli.merging.verb import merge
from qlora_cli.merging.wanted import Wanted

__all__ = ["Wanted", "merge"]
