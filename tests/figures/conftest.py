"""The lab's style for every test of a figure."""

import matplotlib
import matplotlib.pyplot as plt
import pytest

from lablib import figures


@pytest.fixture(autouse=True)
def _the_labs_style_and_no_figure_left_open():
    with matplotlib.rc_context():
        figures.use_style()
        yield
    plt.close("all")
