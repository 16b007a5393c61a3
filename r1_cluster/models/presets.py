"""The family's ten models as published: config.json of each, for planning without a download."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from r1_cluster.models.config_json import Values


@cache
def presets() -> dict[str, Values]:
    """config.json's content by the model's published name. A checkpoint's own config.json always wins."""
    text = resources.files("r1_cluster").joinpath("assets/presets.json").read_text(encoding="utf-8")
    found: dict[str, Values] = json.loads(text)
    return found
