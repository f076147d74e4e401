import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tools.execute import clean


def test_timings_widgets_and_redrawn_progress_go_and_the_results_stay(tmp_path):
    outputs = [
        new_output("stream", name="stdout", text="one\n\rruns: 0/2\rruns: 1/2"),
        new_output("stream", name="stdout", text="\rruns: 2/2\r\ndone"),
        new_output("stream", name="stderr", text="a warning\n"),
        new_output("display_data", data={"text/plain": "98.5 %"}),
    ]
    cell = new_code_cell("1 + 1", outputs=outputs, metadata={"papermill": {"duration": 1}, "tags": ["kept"]})
    notebook = new_notebook(cells=[cell], metadata={"papermill": {"input_path": "x"}, "widgets": {}})
    nbformat.write(notebook, tmp_path / "out.ipynb")
    clean(tmp_path / "out.ipynb")
    cleaned = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert not {"papermill", "widgets"} & set(cleaned.metadata)
    assert dict(cleaned.cells[0].metadata) == {"tags": ["kept"]}
    assert [output.get("text") for output in cleaned.cells[0].outputs] == ["one\nruns: 2/2\ndone", "a warning\n", None]
    assert cleaned.cells[0].outputs[2].data["text/plain"] == "98.5 %"
