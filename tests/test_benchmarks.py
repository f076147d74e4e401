"""The benchmarks: the harness runs, the rivals do the same work, and the page follows from the measurements."""

import copy
import getpass
import json
import platform
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import machine, tracking
from benchmarks.__main__ import kept, main
from benchmarks.aims import aims
from benchmarks.cases import CASES, Case, build, load
from benchmarks.contest import speeds
from benchmarks.gate import Epoch
from benchmarks.inputs import PILImages, TensorImages, split
from benchmarks.keras_rival import keras_model
from benchmarks.parts import profile
from benchmarks.report import markdown
from benchmarks.rivals import lablib_trainer
from benchmarks.tried import Training, Way
from benchmarks.tried import page as tried_page
from lablib import StreamlinedTrainer

DIGITS = {"dataset": "digits", "batch_size": 64, "slow_images": 256, "fast_images": 256}
CASE = Case("MLP-2", "MLP", {"hidden_sizes": (16,)}, translation_fraction=0.1, **DIGITS)
FLIPPED = Case("SimpleCNN-1", "SimpleCNN", {"depth": 1, "width": 4}, horizontal_flip=True, **DIGITS)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[dict, str]:
    """What two rivals in small write: the measurements and the page."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.__main__.CASES", (CASE,))
        assert (
            main(
                [
                    "--cases",
                    "MLP-2",
                    "--rivals",
                    "tight,lablib",
                    "--rounds",
                    "2",
                    "--jobs",
                    "1",
                    "--parts",
                    "none",
                    "--out",
                    str(out),
                ]
            )
            == 0
        )
    name = f"benchmark-{machine.device_slug(machine.describe())}"
    return json.loads((out / f"{name}.json").read_text()), (out / f"{name}.md").read_text()


def test_two_rivals_take_turns_and_are_measured(page):
    entries = page[0]["cases"][0]["entries"]
    assert {entry["rival"] for entry in entries} == {"tight", "lablib"}
    for entry in entries:
        assert len(entry["train"]) == len(entry["epoch"]) == 2
        assert all(0 < epoch <= train for train, epoch in zip(entry["train"], entry["epoch"], strict=True))  # rounded
        assert entry["images"] in (255, 256)  # a tenth of 284 is for validation
        assert entry["peak_memory_mib"] > 100
        assert entry["seconds_to_first_step"] > 0


def test_the_files_name_neither_places_nor_hosts(page):
    text = json.dumps(page[0]) + page[1]
    for word in (str(Path.cwd()), str(Path.home()), "/tmp", platform.node()):
        assert word not in text
    assert f"/{getpass.getuser()}/" not in text


def test_the_page_is_made_of_the_measurements_alone(page):
    measured, text = page
    assert markdown(measured) == text
    changed = copy.deepcopy(measured)
    for entry in changed["cases"][0]["entries"]:
        entry["train"] = [3000, 2000] if entry["rival"] == "lablib" else [1000, 1000]
    assert "2.5 times as fast" in markdown(changed)
    assert "2,500 (2,000–3,000)" in markdown(changed)


def test_the_page_has_a_section_for_each_part():
    rate = {"fp32": 100, "bf16": 400}
    entry = {"rival": "lablib", "title": "lablib", "variant": "one run", "images": 10, "train": [1000], "epoch": [900]}
    entry |= {"peak_memory_mib": 500, "seconds_to_first_step": 3.0, "warm_up_seconds": 0.1}
    case = {"name": "MLP-2", "network": "MLP", "arguments": {"hidden_sizes": [16]}, "dataset": "a/b", "batch_size": 8}
    demand = {"multiply_adds": 5_000_000, "precision": "fp32", "parameters": 12}
    row = {"images": 1000, "seconds": 2.0, "training_seconds": 1.0, "data_mib": 3, "more_memory_mib": 4}
    measured = {
        "machine": {
            "processor": "A",
            "units": [],
            "cores": 2,
            "memory_gib": 4,
            "gpu": None,
            "python": "3",
            "versions": {},
        },
        "date": "2026-01-01",
        "rounds": 1,
        "absent": ["Keras"],
        "cases": [case | {"entries": [entry], "demand": demand}],
        "ceiling": {"matrix product": rate, "convolution": rate},
        "parts": [
            {
                "case": "MLP-2",
                "images": 10,
                "threads": 1,
                "steps": 2,
                "ms_a_step": {"data": 1.0, "forward": 3.0},
                "ms_an_epoch": {"log": 5.0},
            }
        ],
        "linearity": {
            "case": "MLP-2",
            "images": [row],
            "epochs": [{"epochs": 2, "runs": 1, "images": 10, "seconds": 3.0}],
            "runs": [{"epochs": 1, "runs": 4, "images": 10, "seconds": 6.0}],
        },
        "notebook": {"notebook": "a.ipynb", "first_seconds": 60.0, "again_seconds": 15.0},
    }
    text = markdown(measured)
    assert "| MLP-2, one run | fp32 | 10.0 | 10.0% |" in text
    assert "| forward | 3.000 (75%) |" in text
    assert "| training | 8.0 |" in text
    assert "| 1,000 | 1.00 | 1000.0 | 2.00 | 3 | 4 |" in text
    assert "| 4 | 6.00 | 1.50 |" in text
    assert "15.0 s when all of its runs are finished" in text
    assert "Keras is left out" in text
    assert "| a notebook whose runs are finished | < 20 s | 15.0 s | yes |" in text
    assert (
        "| memory beyond the data, from 1,000 to 1,000 images | hardly grows | 4 to 4 MiB, beside 3 of data | yes |"
        in text
    )


def test_parts_measured_anew_take_the_place_of_the_old_ones_on_the_same_machine_only():
    before = {"machine": {"cores": 2}, "cases": [1], "notebook": "slow", "linearity": "old", "minutes": 10.0}
    now = {"machine": {"cores": 2}, "cases": [], "notebook": "quick", "minutes": 1.5}
    merged = {"machine": {"cores": 2}, "cases": [1], "notebook": "quick", "linearity": "old", "minutes": 11.5}
    merged["anew"] = ["notebook"]
    assert kept(before, now) == merged
    with pytest.raises(ValueError, match="leave --keep out"):
        kept(before, now | {"machine": {"cores": 4}})


def test_runs_side_by_side_count_from_the_first_begin_to_the_last_end():
    epochs = [Epoch(10.0, 12.0, 13.0, 100, 0), Epoch(10.5, 14.0, 15.0, 100, 0)]
    assert speeds(epochs) == (50.0, 40.0)


@pytest.mark.parametrize("case", [CASE, FLIPPED], ids=lambda case: case.name)
def test_the_rivals_see_images_of_the_same_distribution(case, tmp_path):
    data = load(case, None)
    train, _ = split(data)
    torch.manual_seed(0)
    pictures = torch.stack([image for image, _ in PILImages(case, data, train, training=True)])
    tensors = torch.stack([TensorImages(case, data, train, training=True)[i]["images"] for i in range(len(train))])
    trainer = lablib_trainer(case, None, str(tmp_path))
    ours = trainer.prepare_images(data.train_images[train], training=True)
    for theirs in (pictures, tensors):
        assert theirs.shape == ours.shape
        torch.testing.assert_close(theirs.mean(), ours.mean(), atol=0.02, rtol=0)
        torch.testing.assert_close(theirs.std(), ours.std(), atol=0.02, rtol=0)
        averages = theirs.mean(0) - ours.mean(0)  # of each pixel over all images
        assert averages[:, 2:-2, 2:-2].abs().max() < 0.15  # at the rim PIL interpolates in a way of its own


def test_validation_images_are_the_same_for_all(tmp_path):
    data = load(CASE, None)
    _, validation = split(data)
    ours = lablib_trainer(CASE, None, str(tmp_path)).prepare_images(data.train_images[validation], training=False)
    for kind in (PILImages, TensorImages):
        item = kind(CASE, data, validation, training=False)[5]
        image = item["images"] if isinstance(item, dict) else item[0]
        torch.testing.assert_close(image, ours[5], atol=1e-5, rtol=1e-5)


def test_every_rival_begins_with_the_same_weights():
    first, second = (build(CASE, (1, 28, 28), 10).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_networks_in_keras_compute_the_same(case, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    pytest.importorskip("keras", reason="Keras comes with the extra of the benchmarks: pip install -e '.[bench]'")
    shape = (3, 32, 32) if case.convolutional else (1, 28, 28)
    network = build(case, shape, 10).eval()
    images = torch.randn(4, *shape)
    with torch.no_grad():
        torch.testing.assert_close(keras_model(network, shape)(images), network(images), atol=1e-4, rtol=1e-4)


def test_the_profile_of_an_epoch_adds_up():
    parts = profile(CASE, 256, threads=1, epochs=2)
    assert parts["steps"] == 4
    assert all(parts["ms_a_step"][part] > 0 for part in ("data", "augmentation", "forward", "backward", "optimizer"))
    assert all(milliseconds > 0 for milliseconds in parts["ms_an_epoch"].values())


def test_the_devices_name_is_fit_for_a_file():
    assert machine.device_slug({"gpu": None, "cores": 2}) == "cpu-2-cores"
    assert machine.device_slug({"gpu": "NVIDIA H200", "cores": 16}) == "nvidia-h200"


def test_an_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--cases", "MLP-3"])
    assert "MLP-3: allowed are MLP-2" in capsys.readouterr().err


def test_the_aims_stand_beside_what_was_measured_and_say_why_one_is_missed():
    def entry(rival, images_a_second, variant="one run, 1 thread"):
        return {"rival": rival, "title": rival, "variant": variant, "train": [images_a_second]}

    mlp = [entry("student", 100), entry("keras", 900), entry("tight", 1000), entry("lablib", 960)]
    mlp.append(entry("lablib", 2500, "2 runs side by side"))
    cnn = [entry("student", 100), entry("tight", 90), entry("lablib", 199)]
    profile = {"case": "MLP-2", "ms_a_step": {"forward": 1.0, "data": 0.25, "Trainer's own": 0.5}}
    measured = {"cases": [{"name": "MLP-2", "entries": mlp}, {"name": "ResidualCNN-2", "entries": cnn}]}
    found = {aim.text: aim for aim in aims(measured | {"parts": [profile]})}
    assert [aim.measured for aim in found.values()][:3] == ["9.6 times", "25 times", "0.96 times"]
    assert [aim.reached for aim in found.values()] == [False, True, True, False, True, True, False]
    assert "tight loop) it is 10 times" in next(iter(found.values())).why
    assert found["every network, one run, beside each usual way"].measured == "1.07 times at least (MLP-2, keras)"
    assert found["Trainer's own time in a step of MLP-2"].measured == "0.50 ms"
    slower = aims({"cases": [{"name": "MLP-2", "entries": [entry("keras", 2), entry("lablib", 1)]}]})
    assert [aim.reached for aim in slower] == [False]


PLAIN = replace(CASE, arguments={"hidden_sizes": (16,), "dropout": 0.0})


def trained(way: Way) -> torch.Tensor:
    """The weights after an epoch."""
    training = Training(PLAIN, way, 256)
    torch.manual_seed(0)
    assert training.epoch() > 0
    return torch.cat([parameter.detach().flatten() for parameter in training.parameters])


@pytest.mark.parametrize(
    "change",
    [{"affine_grid": True}, {"ahead": True}, {"optimizer": "foreach"}, {"optimizer": "loop"}, {"keeps_memory": False}],
    ids=str,
)
def test_ideas_that_only_cost_time_train_the_same(change):
    torch.testing.assert_close(trained(Way(**change)), trained(Way()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [{"separate_sampling": True}, {"augmentation": torch.bfloat16}, {"bf16": True}, {"channels_last": True}],
    ids=str,
)
def test_ideas_that_round_train_nearly_the_same(change):
    torch.testing.assert_close(trained(Way(**change)), trained(Way()), atol=0.02, rtol=0)


def test_seeds_in_one_product_are_each_trained():
    before = torch.cat([p.flatten() for p in Training(PLAIN, Way(seeds=3), 256).parameters])
    after = trained(Way(seeds=3))
    assert after.isfinite().all()
    assert ((after - before).abs() > 0).float().mean() > 0.5


def test_validation_trains_nothing():
    assert torch.equal(trained(Way(validates=64)), trained(Way(validates=100)))


def test_what_was_tried_has_a_page_with_ratios_and_what_compiling_costs():
    tried = {"idea": "`torch.compile`", "network": "MLP-2", "outcome": "not kept", "usual": [100, 100, 50]}
    tried |= {"changed": [200, 200, 200], "warm_up_seconds": 10.0}
    described = {"processor": "A", "cores": 2, "python": "3", "versions": {"torch": "2"}}
    measured = {"machine": described, "date": "2026-01-01", "rounds": 3, "ideas": [tried]}
    text = tried_page(measured)
    assert "| `torch.compile` | MLP-2 | 2.00 (2.00–4.00) |" in text
    assert "takes 10 s more, which is earned back after 2,000 images" in text
    tried["changed"] = [50, 50, 50]
    assert "which is never earned back" in tried_page(measured)


def trackings(case: str, way: str, epochs: int) -> list[dict]:
    """As `tracking.measure`, with what is known: with W&B an epoch takes 2 ms longer, with histograms 10."""
    slower, written = {"off": (0, 0), "on": (0.002, 8), "histograms": (0.010, 80)}[way]
    ends = {"first": 3.0 if slower else 0.5, "second": 0.75 if slower else 0.5}
    rows = [{"training": which, "ends": seconds} for which, seconds in ends.items()]
    return [
        row | {"network": case, "parameters": 1234, "tracking": way, "seconds": 0.1 + slower, "kib": written}
        for row in rows
    ]


def test_what_tracking_costs_is_the_difference_to_trainings_without_it(tmp_path, monkeypatch):
    def directly(function, *arguments):
        return trackings(arguments[0].name, *arguments[1:]) if arguments else function()

    monkeypatch.setattr(tracking, "isolated", directly)
    assert tracking.main(["--cases", "MLP-2", "--rounds", "2", "--epochs", "4", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "tracking.md").read_text()
    plain = "| MLP-2 | 1,234 | W&B | 2.00 (2.00 to 2.00) | 8 | 0.25 (0.25 to 0.25) | 2.50 (2.50 to 2.50) |"
    assert plain in text
    assert "| MLP-2 | 1,234 | W&B and histograms | 10.00 (10.00 to 10.00) | 80 |" in text
    assert "2 rounds of two trainings of 4 epochs" in text
    assert len((tmp_path / "tracking.csv").read_text().splitlines()) == 1 + 2 * 3 * 2


def test_a_training_is_measured_with_what_comes_before_and_after_its_epochs(monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    for name in ("WANDB_MODE", "WANDB_SILENT", "WANDB_DIR"):
        monkeypatch.setenv(name, "")  # as before at the end
    final_test, clock, waited = StreamlinedTrainer.final_test, time.perf_counter, []

    def slow_test(trainer):
        waited.append(1000)  # seconds, by the clock
        return final_test(trainer)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(waited))

    monkeypatch.setattr(StreamlinedTrainer, "final_test", slow_test)
    first, second = tracking.measure(replace(CASE, batch_size=256), "off", epochs=2)
    assert (first["training"], second["training"]) == ("first", "second")
    assert first["parameters"] == sum(p.numel() for p in build(CASE, (1, 28, 28), 10).parameters())
    assert second["seconds"] < 900 < second["ends"]
    assert second["kib"] == 0
    (_, tracked) = tracking.measure(replace(CASE, batch_size=256), "on", epochs=2)
    assert tracked["kib"] > 1
    assert tracked["ends"] > 1900  # it has tested, too


def test_a_network_that_the_benchmark_of_tracking_does_not_know_is_refused(capsys):
    with pytest.raises(SystemExit):
        tracking.main(["--cases", "VGG"])
    assert "--cases VGG: there are MLP-2, " in capsys.readouterr().err
