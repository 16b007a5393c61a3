"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ServiceName = Annotated[
    str | None, typer.Option("--service", metavar="NAME", help="Which service, where several are running.")
]
