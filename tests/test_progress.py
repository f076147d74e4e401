"""The progress of an experiment: one bar over all epochs, fed by the runs' history files."""

import json
import os
import re

from lablib.experiments import _Progress

ROW = json.dumps({"epoch": 1, "train_loss": 0.5, "val_accuracy": 0.9}) + "\n"


def test_the_bar_counts_the_epochs_of_all_runs_and_shows_the_latest_figures(tmp_path, capsys):
    paths = {("net", seed): tmp_path / str(seed) for seed in (0, 1, 2)}
    for path in paths.values():
        path.mkdir()
    (paths["net", 2] / "history.jsonl").write_text(9 * ROW)
    os.utime(paths["net", 2] / "history.jsonl", (0, 0))  # of an earlier session, whose end is not counted again
    progress = _Progress(paths, num_epochs=4)
    progress.bar.mininterval = 0
    (paths["net", 0] / "history.jsonl").write_text(3 * ROW)
    progress._show({key: rows for key in paths if (rows := progress._history(key))})
    assert progress.bar.n == 3
    progress.finished(("net", 0))  # it stopped early
    assert progress.bar.n == 4
    with progress:
        pass
    said = capsys.readouterr().out
    assert re.search(r"3 runs: +25%.* 3/12 .*net, seed 0: loss 0.500, validation 90.0 %", said)
    assert "<" in said  # the time left
