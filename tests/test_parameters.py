"""A notebook's parameters: what is refused, and with which words."""

import math

import pytest

from lablib.parameters import Between, check_parameters

CELL = """
dataset: str = "digits"
epochs: int = 12
rate: float = 0.001
flip: bool = False
depths: list[int] = [2, 4, 8]
"""
ALLOWED = {"dataset": ("digits", "mnist"), "epochs": range(1, 101), "depths": range(1, 65)}


def notebook(*injected: str, **values) -> dict:
    """A notebook's globals() after its parameters cell and the cells that papermill put after it."""
    namespace = {"In": ["", CELL, *injected]}
    for source in (CELL, *injected):
        exec(source, namespace)
    return namespace | values


def fault(*injected: str, **values) -> str:
    with pytest.raises(ValueError, match=r"^the notebook's parameters cannot be used:\n- ") as caught:
        check_parameters(notebook(*injected, **values), **ALLOWED)
    return str(caught.value).partition("\n")[2]


def test_the_defaults_and_what_papermill_sets_right_are_taken():
    check_parameters(notebook(), **ALLOWED)
    check_parameters(notebook("# Parameters\nepochs = 3\ndataset = 'mnist'\n"), **ALLOWED)
    check_parameters(notebook(epochs=100, depths=[64, 1], flip=True, rate=0.5), **ALLOWED)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epochs": "two"}, "epochs = 'two': write a whole number from 1 to 100"),
        ({"epochs": 2.0}, "epochs = 2.0: write a whole number from 1 to 100"),
        ({"epochs": True}, "epochs = True: write a whole number from 1 to 100"),
        ({"epochs": None}, "epochs = None: write a whole number from 1 to 100"),
        ({"epochs": 0}, "epochs = 0: write a whole number from 1 to 100"),
        ({"epochs": 101}, "epochs = 101: write a whole number from 1 to 100"),
        ({"rate": "fast"}, "rate = 'fast': write a number such as 0.001"),
        ({"rate": True}, "rate = True: write a number such as 0.001"),
        ({"flip": 1}, "flip = 1: write True or False"),
        ({"flip": "false"}, "flip = 'false': write True or False; with papermill: -p flip True, with a capital T"),
        ({"dataset": "minst"}, "dataset = 'minst': write one of 'digits', 'mnist'"),
        ({"dataset": 7}, "dataset = 7: write one of 'digits', 'mnist'"),
        ({"depths": 4}, "depths = 4: write a list of one or more, each a whole number from 1 to 64"),
        ({"depths": []}, "depths = []: write a list of one or more, each a whole number from 1 to 64"),
        ({"depths": [2, 65]}, "depths = [2, 65]: write a list of one or more, each a whole number from 1 to 64"),
        ({"depths": ["2"]}, "depths = ['2']: write a list of one or more, each a whole number from 1 to 64"),
        ({"depths": [True]}, "depths = [True]: write a list of one or more, each a whole number from 1 to 64"),
        ({"depths": [2.0]}, "depths = [2.0]: write a list of one or more, each a whole number from 1 to 64"),
        ({"depths": "[2, 4]"}, "each a whole number from 1 to 64; with papermill: -y 'depths: [2, 4, 8]'"),
    ],
)
def test_a_wrong_value_is_refused_with_what_to_write_instead(values, words):
    message = fault(**values)
    assert message.startswith("- ")
    assert message.count("\n") == 0
    assert words in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epochs": "two"}, "epochs = 'two': write a whole number such as 3"),
        ({"dataset": 7}, "dataset = 7: write a string"),
        ({"depths": 4}, "depths = 4: write a list such as [2, 4, 8]"),
        ({"depths": ["two"]}, "depths = ['two']: write a list such as [2, 4, 8]"),
    ],
)
def test_without_a_range_the_type_alone_is_checked(values, words):
    with pytest.raises(ValueError, match="cannot be used") as caught:
        check_parameters(notebook(**values))
    assert words in str(caught.value)


def test_a_whole_number_is_taken_for_a_float():
    check_parameters(notebook(rate=1), **ALLOWED)


def test_an_unknown_name_that_papermill_injected_is_refused_with_a_suggestion():
    message = fault("# Parameters\nepoch = 3\n")
    assert (
        "there is no parameter 'epoch'. Did you mean 'epochs'? There are: dataset, epochs, rate, flip, dep" in message
    )


def test_an_unknown_name_that_resembles_none_gets_no_suggestion():
    message = fault("# Parameters\nzzz = 3\n")
    assert "there is no parameter 'zzz'. There are: dataset" in message


def test_every_fault_is_listed_at_once():
    lines = fault("# Parameters\nepoch = 3\n", flip="false", epochs="two").splitlines()
    assert [line.split()[1] for line in lines] == ["there", "epochs", "flip"]


def test_names_that_other_cells_assign_are_no_parameters():
    check_parameters(notebook("model = 3\n# Parameters\n", "epoch = 4"), **ALLOWED)


def test_a_namespace_without_annotated_parameters_says_which_cell_to_run():
    with pytest.raises(
        ValueError, match="the notebook has no annotated parameters; run its cell tagged 'parameters' first"
    ):
        check_parameters({"epochs": 3})


# Between two numbers

GRID_CELL = """
alpha: float = 0.7
alphas: list[float] = [0.1, 0.9]
side: int = 32
"""
GRID_ALLOWED = {"alpha": Between(0, 1), "alphas": Between(0, 1), "side": Between(8, 64.5)}


def grid(**values) -> dict:
    namespace = {"In": ["", GRID_CELL]}
    exec(GRID_CELL, namespace)
    return namespace | values


@pytest.mark.parametrize("value", [0, 0.0, 1e-9, 0.5, 1, 1.0])
def test_a_number_between_the_two_or_one_of_them_is_taken(value):
    assert value in Between(0, 1)
    check_parameters(grid(alpha=value, alphas=[value, 0.5]), **GRID_ALLOWED)


@pytest.mark.parametrize("value", [-1e-9, -1, 1.0001, 2, 20, math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_between_the_two_is_refused_alone_and_in_a_list(value):
    assert value not in Between(0, 1)
    for name in ("alpha", "alphas"):
        with pytest.raises(ValueError, match=f"cannot be used:\n- {name} = "):
            check_parameters(grid(**{name: value if name == "alpha" else [0.5, value]}), **GRID_ALLOWED)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"alpha": 1.5}, "alpha = 1.5: write a number from 0 to 1"),
        ({"alpha": True}, "alpha = True: write a number from 0 to 1"),
        ({"alpha": "0.5"}, "alpha = '0.5': write a number from 0 to 1"),
        ({"alpha": None}, "alpha = None: write a number from 0 to 1"),
        ({"alpha": [0.5]}, "alpha = [0.5]: write a number from 0 to 1"),
        ({"alphas": [0.5, 1.5]}, "alphas = [0.5, 1.5]: write a list of one or more, each a number from 0 to 1"),
        ({"alphas": [False]}, "alphas = [False]: write a list of one or more, each a number from 0 to 1"),
        ({"alphas": ["0.5"]}, "alphas = ['0.5']: write a list of one or more, each a number from 0 to 1"),
        ({"alphas": []}, "alphas = []: write a list of one or more, each a number from 0 to 1"),
        ({"alphas": 0.5}, "alphas = 0.5: write a list of one or more, each a number from 0 to 1"),
        ({"side": 7}, "side = 7: write a number from 8 to 64.5"),
        ({"side": 65}, "side = 65: write a number from 8 to 64.5"),
    ],
)
def test_what_is_not_between_the_two_is_refused_with_both_of_them(values, words):
    with pytest.raises(ValueError, match="cannot be used") as caught:
        check_parameters(grid(**values), **GRID_ALLOWED)
    assert str(caught.value).partition("\n- ")[2] == words


def test_a_string_in_place_of_numbers_between_the_two_is_refused_with_papermills_way_to_write_a_list():
    with pytest.raises(ValueError, match=r"each a number from 0 to 1; with papermill: -y 'alphas: \[0.5, 1\]'"):
        check_parameters(grid(alphas="[0.5]"), **GRID_ALLOWED)


def test_the_type_counts_also_where_a_number_lies_between_the_two():
    with pytest.raises(ValueError, match=r"side = 32\.0: write a number from 8 to 64\.5"):
        check_parameters(grid(side=32.0), **GRID_ALLOWED)


@pytest.mark.parametrize("value", [True, "0.5"])
def test_what_is_no_number_is_refused_in_a_list_whose_annotation_does_not_say_of_what(value):
    namespace = {"__annotations__": {"alphas": list}, "alphas": [0.5, value]}
    with pytest.raises(
        ValueError, match=r"alphas = \[0.5, .*\]: write a list of one or more, each a number from 0 to 1"
    ):
        check_parameters(namespace, alphas=Between(0, 1))
