"""The figures that the lab set out to reproduce: one author's single runs, test accuracy as a fraction."""

MNIST = {
    "MLP-2": 0.9835,
    "MLP-4": 0.9833,
    "MLP-8": 0.9796,
    "ResidualMLP-2": 0.9856,
    "ResidualMLP-4": 0.9864,
    "ResidualMLP-8": 0.9870,
}
