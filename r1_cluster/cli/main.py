"""Entry point of the `r1-cluster` command."""

from __future__ import annotations

import argparse
import os
import sys

from r1_cluster import __version__
from r1_cluster.cli import chat, drain, serve, status, stop
from r1_cluster.cli.terminal import require_text, show_what_cannot_be_shown
from r1_cluster.config import ConfigError

_DESCRIPTION = """\
Serves DeepSeek-R1 models on a Ray cluster, behind an OpenAI-compatible endpoint.

  r1-cluster serve cluster_configs/services/nano.yaml    start a service, stop it with Ctrl-C
  r1-cluster chat                                        talk to it from another terminal
  r1-cluster status                                      who runs where, and how busy it is
  r1-cluster drain                                       stop it once its answers have ended
  r1-cluster stop                                        stop it from another terminal
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the process's exit code."""
    parser = argparse.ArgumentParser(
        "r1-cluster", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"r1-cluster {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (serve, chat, status, drain, stop):
        module.add_parser(commands)
    show_what_cannot_be_shown()
    try:
        require_text(sys.argv[1:] if argv is None else argv)
        arguments = parser.parse_args(argv)
        return int(arguments.run(arguments))
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
