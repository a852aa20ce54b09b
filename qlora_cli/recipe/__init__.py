"""The recipe: every key, the strict loader with places, overrides, and the documents made from the schema."""

from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import (
    Adapter,
    Data,
    Evaluation,
    LoftQ,
    Model,
    Quantization,
    Recipe,
    Section,
    Source,
    Training,
)

__all__ = [
    "Adapter",
    "Data",
    "Evaluation",
    "LoftQ",
    "Model",
    "Quantization",
    "Recipe",
    "Section",
    "Source",
    "Training",
    "dump_recipe",
    "load_recipe",
]
