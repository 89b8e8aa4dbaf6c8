"""NAS-Bench-Macro's table: the true accuracy of every network of the space nasbench_macro."""

import csv

POOLING_AND_BIAS = 1280 * 4 * 4 + 10  # of nasray's MACs, which the table leaves out


def read_truth(path):
    """The file's rows by architecture: {arch: (top-1 as a fraction, params, MACs)}."""
    with open(path) as file:
        return {
            tuple(map(int, row["arch"])): (
                float(row["mean_acc"]) / 100,
                int(row["params"]),
                int(row["macs"]),
            )
            for row in csv.DictReader(file)
        }
