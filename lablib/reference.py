"""The figures that the lab set out to reproduce: one author's single runs, test accuracy as a fraction."""

MNIST = {
    "MLP-2": 0.9835,
    "MLP-4": 0.9833,
    "MLP-8": 0.9796,
    "ResidualMLP-2": 0.9856,
    "ResidualMLP-4": 0.9864,
    "ResidualMLP-8": 0.9870,
}

# Exercise 1.3 on CIFAR-10; the width is not given there, 64 channels after the stem are the usual choice
CIFAR10 = {
    "SimpleCNN-2": 0.7503,
    "SimpleCNN-3": 0.8017,
    "SimpleCNN-4": 0.8287,
    "ResidualCNN-2": 0.8745,
    "ResidualCNN-3": 0.8689,
}

# Exercise 2.2 on CIFAR-10, 16 channels after the stem, by the published ratio of parameters; T = 4, alpha = 0.7
CIFAR10_DISTILLATION = {"teacher": 0.8164, "baseline": 0.7833, "distilled": 0.8095}

# what a reader has to know of a data set wherever a figure from it is shown
NOTES = {
    "cifar10-jpeg": "cifar10-jpeg is CIFAR-10 in a JPEG copy (quality 75, half the colour resolution): the same "
    "pictures, other pixels, so that accuracies come close to those on CIFAR-10, a little below, and are not the same.",
    "digits": "digits is 1,797 scans of 8 × 8 pixels, scaled up: a result on it shows that the lab runs.",
}
