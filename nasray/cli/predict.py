"""The verb `nasray predict`: what a trained network says of images."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterable
from typing import Any

import click

import nasray
from nasray.errors import UserError


@click.command()
@click.argument("model")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="Classes each.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per image and line.")
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values, with a header.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
def predict(
    model: str, images: tuple[str, ...], top: int, as_json: bool, as_csv: bool, batch_size: int
) -> None:
    """Print the class of each IMAGE by MODEL, and its probability.

    MODEL is an .onnx file of `nasray export` (run by onnxruntime, without torch), a model.pt, or a
    run directory. IMAGE is a file, a folder, or - for a list of them on standard input, one a line.
    Images are cropped as for the top-1 in the report. Those that cannot be read are named on
    standard error, and make the exit status 1.
    """
    if as_json and as_csv:
        raise UserError("--json and --csv: give one of the two")
    found = nasray.predict(model, _with_stdin(images), top=top, batch_size=batch_size)
    if as_csv:
        _echo(_csv_line(["image", *_csv_names(top), "error"]))
    number = num_unreadable = 0
    for number, each in enumerate(found, 1):  # noqa: B007  read after the loop
        if "error" in each:
            num_unreadable += 1
            _echo(f"{each['image']}: {each['error']}", err=True)
        if as_csv:
            _echo(_csv_line(_csv_cells(each, top)))
        elif as_json:
            _echo(json.dumps(each))
        elif "classes" in each:
            _echo(_text(each))
    if num_unreadable:
        _echo(f"{num_unreadable} of {number} images cannot be read", err=True)
        click.get_current_context().exit(1)


def _with_stdin(images: Iterable[str]) -> list[str]:
    """The paths given, with "-" replaced by the lines of standard input."""
    paths: list[str] = []
    for image in images:
        if image != "-":
            paths.append(image)
            continue
        lines = sys.stdin.buffer.read().splitlines()
        paths += [os.fsdecode(line) for line in lines if line.strip()]
    return paths


def _echo(line: str, *, err: bool = False) -> None:
    click.echo(os.fsencode(line), err=err)  # a file's name may be in any bytes


def _text(found: dict[str, Any]) -> str:
    classes = (f"{each['class']} {each['probability']:.1%}" for each in found["classes"])
    return f"{found['image']}  {', '.join(classes)}"


def _csv_names(top: int) -> list[str]:
    numbers = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    return [f"{name}{number}" for number in numbers for name in ("class", "probability")]


def _csv_cells(found: dict[str, Any], top: int) -> list[str]:
    cells = [found["image"]]
    for each in found.get("classes", []):
        cells += [each["class"], f"{each['probability']:.6f}"]
    return [*cells, *[""] * (1 + 2 * top - len(cells)), found.get("error", "")]


def _csv_line(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(cells)
    return buffer.getvalue()
