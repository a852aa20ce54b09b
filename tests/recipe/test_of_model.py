"""A command that is given a model takes the options that count there, by a recipe's own rules, and no others."""

from __future__ import annotations

import pytest

from qlora_cli.errors import UserError
from qlora_cli.recipe.of_model import DATA_TYPES, recipe_of_model, recipe_to_quantize

ROWS = {"path": "rows.jsonl", "limit": 3}


def test_the_data_types_are_the_schemas():
    assert DATA_TYPES == ("nf4", "fp4", "int4", "nf2", "int2", "int8")


def test_the_recipe_holds_the_model_the_rows_and_the_options():
    options = ["quantization.block_size=128", "model.revision=main", "data.eval[0].format=text"]
    recipe = recipe_of_model("owner/model", ["nf4", "int2"], ROWS, options)
    assert (recipe.model.name_or_path, recipe.model.revision) == ("owner/model", "main")
    assert (recipe.quantization.data_type, recipe.quantization.block_size) == ("nf4", 128)
    assert recipe.data.eval[0].model_dump(include={"path", "limit", "format"}) == {**ROWS, "format": "text"}
    assert recipe_of_model("model", ["int8"]).data.eval == []


def test_an_option_counts_where_one_of_the_types_heeds_it():
    recipe = recipe_of_model("model", DATA_TYPES, None, ["quantization.zero_point=true", "quantization.clip=search"])
    assert recipe.quantization.data_type == "int4"
    assert recipe.quantization.zero_point


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", ["nf4"]), "MODEL: `model.name_or_path` is ''. Give text, not an empty one."),
        (("~/m", ["nf4"]), "MODEL: `~` is not expanded in '~/m'. Write the whole path."),
        (("m", ["nf4", "nf5"]),
         "--types: `quantization.data_type` is 'nf5'. Perhaps nf4? "
         "Possible are nf4, fp4, int4, nf2, int2, int8 or none."),
        (("m", ["nf4"], {"path": ""}), "--data: `data.eval[0].path` is ''. Give text, not an empty one."),
        (("m", ["nf4"], None, ["quantization.block_size=7"]),
         "--set quantization.block_size=7: `quantization.block_size` is 7. "
         "Give a whole number, at least 16, at most 65536, a multiple of 4."),
        (("m", ["nf4", "int8"], None, ["quantization.zero_point=true"]),
         "--set quantization.zero_point=true: `zero_point: true` has no effect with `data_type: nf4`. "
         "Delete one of the two."),
    ],
)  # fmt: skip
def test_wrong_names_and_options_are_told_by_the_recipes_rules(arguments, message):
    with pytest.raises(UserError) as error:
        recipe_of_model(*arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "option",
    ["training.epochs=1", "quantization.data_type=fp4", "model.name_or_path=other", "data.train=[]", "nonsense", "=1",
     "data.eval[0].format=text"],
)  # fmt: skip
def test_an_option_that_would_change_nothing_is_refused_with_those_that_do(option):
    with pytest.raises(UserError) as error:
        recipe_of_model("m", ["nf4"], None, [option])
    assert str(error.value) == (
        f"--set {option}: sets nothing that counts here. What may be set is model: revision, trust_remote_code, "
        "task, num_labels; "
        "quantization: double_quant, block_size, compute_dtype, skip_modules, zero_point, clip."
    )


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["adapter.r=4"], "--set adapter.r=4: changes nothing in what is stored"),
        (["adapter.init=loftq", "data.eval_fraction=0.1"], "--set data.eval_fraction=0.1: changes nothing"),
        (["training.epochs=1"], "--set training.epochs=1: changes nothing"),
        (["adapter.init=loftq", "adapter.loftq.calibration=8"], "there are no rows to calibrate on"),
    ],
)
def test_what_bears_on_no_stored_base_is_refused(overrides, told):
    with pytest.raises(UserError, match=told):
        recipe_to_quantize("some/model", overrides)


def test_what_bears_on_a_stored_base_is_taken():
    overrides = ["quantization.data_type=int2", "adapter.init=loftq", "adapter.loftq.calibration=8", "training.seed=3"]
    recipe = recipe_to_quantize("some/model", [*overrides, "data.train=[{path: rows.jsonl}]"])
    assert (recipe.quantization.data_type, recipe.adapter.loftq.calibration, recipe.training.seed) == ("int2", 8, 3)
