import numpy as np
import pytest
import torch

from lablib.diagnostics import calibration, expected_calibration_error


def answers(probabilities: torch.Tensor, labels: torch.Tensor):
    confidence, predicted = probabilities.double().max(1)
    return confidence, predicted == labels


def test_a_case_made_by_hand():
    # bins of a half: (0.5, 1] holds confidences 0.6, 0.8, 1.0 with two hits, (0, 0.5] one of 0.5 that misses
    probabilities = torch.tensor([[0.6, 0.4], [0.2, 0.8], [1.0, 0.0], [0.5, 0.5]])
    labels = torch.tensor([0, 0, 0, 1])
    table = calibration(*answers(probabilities, labels), bins=2)
    assert table["images"].tolist() == [1, 3]
    assert table["confidence"].tolist() == pytest.approx([0.5, 0.8])
    assert table["accuracy"].tolist() == pytest.approx([0.0, 2 / 3])
    assert table[["low", "high"]].to_numpy().tolist() == [[0.0, 0.5], [0.5, 1.0]]
    expected = (1 * 0.5 + 3 * (0.8 - 2 / 3)) / 4
    assert expected_calibration_error(*answers(probabilities, labels), bins=2) == pytest.approx(expected)


def test_the_error_is_that_of_a_loop_over_fifteen_bins_in_numpy():
    generator = torch.Generator().manual_seed(0)
    probabilities = (torch.randn(500, 10, generator=generator) * 2).softmax(1)
    labels = torch.randint(0, 10, (500,), generator=generator)
    confidence = probabilities.max(1).values.numpy().astype(float)
    hits = (probabilities.argmax(1) == labels).numpy()
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - hits[inside].mean())
    assert expected_calibration_error(*answers(probabilities, labels)) == pytest.approx(error, abs=1e-9)


def test_the_error_agrees_with_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed; it is one more oracle")
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.randn(200, 5, generator=generator).softmax(1)
    labels = torch.randint(0, 5, (200,), generator=generator)
    theirs = torchmetrics.functional.calibration_error(probabilities, labels, "multiclass", n_bins=15, num_classes=5)
    assert expected_calibration_error(*answers(probabilities, labels)) == pytest.approx(theirs.item(), abs=1e-5)


def test_a_classifier_that_is_right_as_often_as_it_says_has_no_error():
    probabilities = torch.tensor([[0.75, 0.25]] * 4)
    assert expected_calibration_error(*answers(probabilities, torch.tensor([0, 0, 0, 1]))) == pytest.approx(
        0, abs=1e-12
    )
