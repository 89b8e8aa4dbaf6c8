"""The command line: its verbs, and how errors are reported.

Nothing heavy is imported before a verb needs it: `nasray --help` must answer at once.
"""

import logging
import signal
import sys
import threading
from typing import Any

import click

import nasray
from nasray.cli import runs
from nasray.cli.benchmark import benchmark
from nasray.cli.cache import cache
from nasray.cli.cluster import status, stop, submit
from nasray.cli.doctor import doctor
from nasray.cli.front import front
from nasray.cli.latency import latency, measure_latency
from nasray.cli.micronet import micronet
from nasray.cli.predict import predict
from nasray.cli.spaces import import_weights, profile, show, spaces
from nasray.cli.watch import watch
from nasray.errors import EvaluationError, UserError


class Interrupted(click.ClickException):
    """Ctrl-C or SIGTERM ended the command."""

    exit_code = 130  # 128 + SIGINT, as in a shell


class Verbs(click.Group):
    """The verbs. A user's mistake is printed as one line, other errors with their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb that the command line names.

        Raises:
            Interrupted: Ctrl-C ended it.
            click.ClickException: the user's mistake, or a file that cannot be read or written.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted. Run the same command again to resume.") from None
        except (UserError, EvaluationError) as error:
            raise click.ClickException(" ".join(str(error).split())) from None
        except OSError as error:
            from nasray.storage.files import ADVICE, told

            # What names no file and is no trouble of a disk is a bug, and keeps its traceback.
            # Errors of pyarrow are plain OSErrors without a number, and name the file in the text.
            named = error.filename is not None or error.errno in ADVICE
            if not named and (error.errno is not None or type(error) is not OSError):
                raise
            logging.getLogger("nasray").debug("where it was raised:", exc_info=True)
            raise click.ClickException(told(error)) from None


@click.group(cls=Verbs)
@click.version_option(nasray.__version__)
@click.option("--verbose", is_flag=True, help="Show the output of Ray and its workers, too.")
def main(verbose: bool) -> None:
    """Find image classifiers that fit your budget, on a laptop or a Ray cluster."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, from the start
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("nasray").setLevel(logging.DEBUG if verbose else logging.INFO)


for verb in (
    runs.run,
    runs.data,
    runs.train,
    runs.search,
    runs.evaluate,
    runs.calibration_study,
    runs.fit_predictor,
    runs.rank,
    runs.retrain,
    runs.export,
    runs.report,
    predict,
    benchmark,
    spaces,
    profile,
    micronet,
    show,
    import_weights,
    measure_latency,
    latency,
    front,
    cache,
    doctor,
    submit,
    status,
    watch,
    stop,
):
    main.add_command(verb)
