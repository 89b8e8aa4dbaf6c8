"""The verb `nasray benchmark`: exported networks side by side."""

import json
from typing import Any

import click

import nasray
from nasray.cli.options import python_option, pythons_of


@click.command()
@click.argument("models", metavar="RUN_DIR|ONNX...", nargs=-1, required=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--cpus", default="", help="The cores to run on, e.g. 4-7.")
@click.option("--host", default="", help="Run on this host by ssh, e.g. user@board.")
@python_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object per file and line.")
def benchmark(
    models: tuple[str, ...], pythons: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Compare exported networks: size, top-1 as measured at their export, speed.

    Of RUN_DIR all that it exported. ms is of one image, images/s in batches of 32; ONNX files take
    turns, so that other work on the machine slows them all, and others follow with one thread.
    """
    rows = nasray.benchmark(models, pythons=pythons_of(pythons), **options)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    width = max(len("file"), *(len(row["file"]) for row in rows))
    click.echo(
        f"{'file':<{width}}  {'precision':<9}{'MB':>7}{'top-1':>8}{'drop':>7}{'ms':>9}"
        f"{'images/s':>10}  runtime"
    )
    for row in rows:
        top1 = "-" if row["top1"] is None else f"{row['top1']:.1%}"
        drop = "-" if row["drop"] is None else f"{row['drop']:.1f}"
        click.echo(
            f"{row['file']:<{width}}  {row['precision']:<9}{row['bytes'] / 1e6:>7.2f}{top1:>8}"
            f"{drop:>7}{_number(row['ms'], '9.3f')}{_number(row['images_per_s'], '10.0f')}"
            f"  {row['runtime']}"
        )
    threads = options["threads"]
    click.echo(f"\nonnxruntime: {threads} thread{'s' if threads > 1 else ''}")


def _number(value: float | None, form: str) -> str:
    return "-".rjust(int(form.partition(".")[0])) if value is None else format(value, f">{form}")
