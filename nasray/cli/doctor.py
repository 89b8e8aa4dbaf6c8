"""The verb that looks at this machine before a job does."""

import dataclasses
import json

import click


@click.command()
@click.argument("places", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of lines.")
@click.pass_context
def doctor(context: click.Context, places: tuple[str, ...], as_json: bool) -> None:
    """Say what this machine has and lacks for nasray, with a fix for each problem.

    PLACES, folders or URIs such as s3://bucket/runs, are tried by writing and removing a small
    file. The exit status is 1 if there is a problem.
    """
    from nasray.doctor import examine, is_well

    findings = examine(places)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(each) for each in findings], indent=1))
    else:
        width = max(len(each.subject) for each in findings)
        for each in findings:
            fix = f" -> {each.fix}" if each.fix else ""
            click.echo(f"{each.level:<8} {each.subject:<{width}}  {each.text}{fix}")
    context.exit(0 if is_well(findings) else 1)
