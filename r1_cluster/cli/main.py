"""Entry point of the `r1-cluster` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from typer.main import get_command

from r1_cluster import __version__
from r1_cluster.cli import weights
from r1_cluster.cli.chat import chat
from r1_cluster.cli.drain import drain
from r1_cluster.cli.serve import serve
from r1_cluster.cli.status import status
from r1_cluster.cli.stop import stop
from r1_cluster.cli.terminal import require_text, show_what_cannot_be_shown
from r1_cluster.config import ConfigError

_DESCRIPTION = """\
Serves DeepSeek-R1 models on a Ray cluster, behind an OpenAI-compatible endpoint.

Begin with `r1-cluster serve cluster_configs/services/nano.yaml`, and `r1-cluster chat` from another terminal.
"""

app = typer.Typer(help=_DESCRIPTION, add_completion=False, rich_markup_mode="markdown")
for _command in (serve, chat, status, drain, stop):
    app.command()(_command)
app.add_typer(weights.app, name="weights")


def _version(asked: bool) -> None:
    if asked:
        print(f"r1-cluster {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    pass


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code. Raises SystemExit for a command line that is wrong."""
    arguments = sys.argv[1:] if argv is None else argv
    show_what_cannot_be_shown()
    try:
        require_text(arguments)
        # Not typer's own `main`, whose exit codes for a closed pipe and for Ctrl-C are others than ours.
        command = get_command(app)
        with command.make_context("r1-cluster", list(arguments)) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as done:
        return done.exit_code
    except typer.TyperException as error:
        at = getattr(error, "ctx", None)
        if at is not None:
            print(at.get_usage(), file=sys.stderr)
        path = "r1-cluster" if at is None else at.command_path
        print(f"{path}: {error.format_message()}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except ConfigError as error:
        print(f"r1-cluster: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
