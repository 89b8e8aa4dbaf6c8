"""NAS-Bench-Macro (Su et al. 2021) as a nasray space, and the true accuracy of all of it."""

import csv
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from nasray.spaces.space import Gene

CHOICES = ("identity", "mb3_k3", "mb6_k5")
STAGES = ((0, 1), (2, 3, 4), (5, 6, 7))  # layers; the first of each has stride 2
CHANNELS = (64, 128, 256)


@dataclass(frozen=True)
class Macro:
    """3^8 architectures, 3969 different networks: what an identity does not change."""

    name = "nas_bench_macro"

    num_classes: int = 10
    resolution: int = 32

    @cached_property
    def genes(self):
        return tuple(Gene(f"layer{index}", "op", CHOICES) for index in range(8))

    @property
    def gene_columns(self):
        return ((), *((index,) for index in range(8)), ())

    def resolution_of(self, arch):
        return self.resolution

    def decode(self, arch):
        blocks = [Conv("stem", 3, 32, 3, 32)]
        channels, resolution = 32, 32
        for stage, out_channels in zip(STAGES, CHANNELS, strict=True):
            for layer in stage:
                stride = 2 if layer == stage[0] else 1
                name = f"layer{layer}"
                blocks.append(Layer(name, arch[layer], channels, out_channels, stride, resolution))
                channels, resolution = out_channels, resolution // stride
        return (*blocks, Head("head", channels, resolution, self.num_classes))

    def canonical(self, population):
        """Within a stage, move identities behind its other layers; the first layer stays."""
        population = population.copy()
        for stage in STAGES:
            later = list(stage[1:])
            order = np.argsort(population[:, later] == 0, axis=1, kind="stable")
            population[:, later] = np.take_along_axis(population[:, later], order, axis=1)
        return population

    def to_json(self, arch):
        return {"op": list(arch)}


@dataclass(frozen=True)
class Conv:
    name: str
    in_channels: int
    out_channels: int
    kernel: int
    resolution: int

    def build(self):
        padding = self.kernel // 2
        return nn.Sequential(
            nn.Conv2d(self.in_channels, self.out_channels, self.kernel, 1, padding, bias=False),
            nn.BatchNorm2d(self.out_channels),
            nn.ReLU(),
        )


@dataclass(frozen=True)
class Layer:
    name: str
    choice: int
    in_channels: int
    out_channels: int
    stride: int
    resolution: int

    def build(self):
        if self.choice == 0:
            if self.stride == 1:
                return nn.Identity()
            return nn.Sequential(
                nn.Conv2d(self.in_channels, self.out_channels, 1, 2, bias=False),
                nn.BatchNorm2d(self.out_channels),
            )
        expand, kernel = ((3, 3), (6, 5))[self.choice - 1]
        mid = self.in_channels * expand
        return nn.Sequential(
            nn.Conv2d(self.in_channels, mid, 1, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU(),
            nn.Conv2d(mid, mid, kernel, self.stride, kernel // 2, groups=mid, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU(),
            nn.Conv2d(mid, self.out_channels, 1, bias=False),
            nn.BatchNorm2d(self.out_channels),
        )


@dataclass(frozen=True)
class Head:
    name: str
    in_channels: int
    resolution: int
    num_classes: int

    def build(self):
        return nn.Sequential(
            nn.Conv2d(self.in_channels, 1280, 1, bias=False),
            nn.BatchNorm2d(1280),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(1280, self.num_classes),
        )


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
