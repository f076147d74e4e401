"""A notebook's parameters: what is refused, and with which words."""

import pytest

from lablib.parameters import check_parameters

CELL = """
from typing import Literal
from lablib.parameters import Count, Natural, Counts, Positive, Share, Shares

Name = Literal["digits", "mnist"]
dataset: Name = "digits"
epochs: Count = 12
images: Natural = 0
rate: Positive = 0.001
flip: bool = False
alpha: Share = 0.7
alphas: Shares = [0.1, 0.9]
depths: Counts = [2, 4, 8]
"""


def notebook(*injected: str, **values) -> dict:
    """A notebook's globals() after its parameters cell and the cells that papermill put after it."""
    namespace = {"In": ["", CELL, *injected]}
    for source in (CELL, *injected):
        exec(source, namespace)
    return namespace | values


def fault(*injected: str, **values) -> str:
    with pytest.raises(ValueError, match=r"^the notebook's parameters cannot be used:\n- ") as caught:
        check_parameters(notebook(*injected, **values))
    return str(caught.value).partition("\n")[2]


def test_the_defaults_and_what_papermill_sets_right_are_taken():
    check_parameters(notebook())
    check_parameters(notebook("# Parameters\nepochs = 3\ndataset = 'mnist'\n"))
    check_parameters(notebook(epochs=100, depths=[64, 1], flip=True, rate=1, alpha=0, alphas=[1]))
    check_parameters(notebook("model = 3\n# Parameters\n", "epoch = 4"))  # of other cells


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epochs", "two", "epochs = 'two': epochs should be a valid integer"),
        ("epochs", 2.0, "epochs = 2.0: epochs should be a valid integer"),
        ("epochs", True, "epochs = True: epochs should be a valid integer"),
        ("epochs", None, "epochs = None: epochs should be a valid integer"),
        ("epochs", 0, "epochs = 0: epochs should be greater than or equal to 1"),
        ("images", -1, "images = -1: images should be greater than or equal to 0"),
        ("rate", "fast", "rate = 'fast': rate should be a valid number"),
        ("rate", True, "rate = True: rate should be a valid number"),
        ("rate", 0, "rate = 0: rate should be greater than 0"),
        ("rate", float("inf"), "rate = inf: rate should be a finite number"),
        ("alpha", 1.5, "alpha = 1.5: alpha should be less than or equal to 1"),
        ("alpha", float("nan"), "alpha = nan: alpha should be "),
        ("alphas", [0.5, 1.5], "alphas = [0.5, 1.5]: alphas[1] should be less than or equal to 1"),
        ("alphas", ["0.5"], "alphas = ['0.5']: alphas[0] should be a valid number"),
        ("flip", 1, "flip = 1: flip should be a valid boolean"),
        ("flip", "false", "should be a valid boolean; with papermill: -p flip True, with a capital T"),
        ("dataset", "minst", "dataset = 'minst': dataset should be 'digits' or 'mnist'"),
        ("depths", 4, "depths = 4: depths should be a valid list"),
        ("depths", [], "depths = []: depths list should have at least 1 item"),
        ("depths", [True], "depths = [True]: depths[0] should be a valid integer"),
        ("depths", "[2, 4]", "depths should be a valid list; with papermill: -y 'depths: [2, 4]'"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(name, value, words):
    message = fault(**{name: value})
    assert message.count("\n") == 0
    assert words in message


def test_an_unknown_name_that_papermill_injected_is_refused_with_a_suggestion_if_it_resembles_one():
    assert "there is no parameter 'epoch'. Did you mean 'epochs'? There are: dataset, epochs, images" in fault(
        "# Parameters\nepoch = 3\n"
    )
    assert "there is no parameter 'zzz'. There are: dataset" in fault("# Parameters\nzzz = 3\n")


def test_every_fault_is_listed_at_once():
    lines = fault("# Parameters\nepoch = 3\n", flip="false", epochs="two").splitlines()
    assert [line.split()[1] for line in lines] == ["there", "epochs", "flip"]


def test_a_namespace_without_annotated_parameters_says_which_cell_to_run():
    with pytest.raises(ValueError, match="no annotated parameters; run its cell tagged 'parameters' first"):
        check_parameters({"epochs": 3})
