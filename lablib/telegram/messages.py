"""What the messages say: plain text, and the loss curves as a picture."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lablib.secret import redacted

_ERROR_LENGTH = 500  # characters of an error's text
_LINES = 8  # in a picture


def of_run(title: str, run_name: str, result: Mapping[str, Any], info: str = "") -> str:
    """A finished training; `title` says of what on what, `result` is as a `Run` has it, or a part of that."""
    lines = [f"{title}: training finished", f"run: {run_name}"]
    if "best_epoch" in result:
        lines.append(f"best epoch: {result['best_epoch']} of {result['epochs']}")
        lines.append(f"validation accuracy: {_percent(result['val_accuracy'])}")
    if "test_accuracy" in result:
        lines.append(f"test accuracy: {_percent(result['test_accuracy'])}")
    if "seconds" in result:
        lines.append(f"duration: {duration(result['seconds'])}")
    return _joined(lines, info)


def of_failed_run(headline: str, run_name: str, place: str, error: str, resumes_after: float, info: str = "") -> str:
    """A training that did not end well; `resumes_after`: the epochs of its last checkpoint, 0 without one."""
    resume = f"It can be resumed: it goes on after epoch {resumes_after:.3g}, its last checkpoint."
    if not resumes_after:
        resume = "It can be started again; it has no checkpoint yet."
    return _joined([headline, f"run: {run_name}", place, error, resume], info)


def of_experiment(result, loaded: int, seconds: float, info: str = "") -> str:
    """An experiment at its end; `loaded` of its runs were in the store before."""
    from lablib.statistics import summarise

    trained, failed = len(result.runs) - loaded, len(result.failures)
    lines = [
        f"Experiment on {result.data.name}: finished",
        f"runs: {trained} trained, {loaded} loaded, {failed} failed",
        f"duration: {duration(seconds)}",
        *(["", info] if info else []),  # before what may be long, and cut
    ]
    if result.runs:
        lines += ["", "test accuracy, mean over n seeds:"]
        values = {name: list(result.values(name).values()) for name in result.models}
        lines += [f"{name}: {summarise(v).percent()}" for name, v in values.items() if v]
    if result.failures:
        failures = result.failures.items()
        lines += ["", *(f"failed: {name}, seed {seed}: {line[:_ERROR_LENGTH]}" for (name, seed), line in failures)]
    return "\n".join(lines)


def of_stopped_experiment(result, error: BaseException, places: Sequence[str], seconds: float, info: str = "") -> str:
    """An experiment that an error or a person stopped; `places` say how far its unfinished runs got."""
    total = len(result.models) * len(result.seeds)
    lines = [
        f"Experiment on {result.data.name}: {outcome(error)}",
        f"{len(result.runs)} of {total} runs are finished, after {duration(seconds)}",
        *places,
        described(error),
        "It can be resumed: started again, it loads the finished runs and goes on with the others.",
    ]
    return _joined(lines, info)


def outcome(error: BaseException) -> str:
    """Whether a person stopped it or an error did."""
    return "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"


def described(error: BaseException) -> str:
    """An error's type and message, without a traceback that the message may hold, and without tokens."""
    text = re.split(r"^.*Traceback \(most recent call last\)", str(error), maxsplit=1, flags=re.MULTILINE)[0].strip()
    text = redacted(text)
    text = f"{text[:_ERROR_LENGTH]}…" if len(text) > _ERROR_LENGTH else text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place(epoch: int, num_epochs: int) -> str:
    """Where a training was; epoch 0 is before the first."""
    return f"at epoch {epoch} of {num_epochs}" if epoch else "before the first epoch"


def duration(seconds: float) -> str:
    """Seconds as people say them: 7 s, 3 min 05 s, 2 h 14 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def experiment_curves(result) -> bytes | None:
    """Validation loss by epoch as PNG, a mean over seeds for each model; None without a run that has a history.

    Of many models it shows those with the best validation accuracy, as more lines cannot be told apart.
    """
    histories, picture = result.histories(), io.BytesIO()
    if histories.empty:
        return None
    from lablib.figures import loss_curves
    from lablib.figures.style import lab_style

    scores = {name: result.values(name, "val_accuracy") for name in histories["model"].unique()}
    means = {name: sum(by_seed.values()) / len(by_seed) for name, by_seed in scores.items()}
    shown = sorted(means, key=means.get, reverse=True)[:_LINES]
    with matplotlib.rc_context(lab_style()):
        figure = Figure()  # pyplot does not know of it, so that no notebook shows it
        loss_curves(histories[histories["model"].isin(shown)], "val_loss", result.data.name, figure=figure)
        if len(means) > len(shown):
            title = f"the {len(shown)} of {len(means)} models with the best validation accuracy"
            figure.axes[0].set_title(title, fontsize="small")
        figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _joined(lines: Sequence[str], info: str) -> str:
    return "\n".join([*lines, *(["", info] if info else [])])
