"""One machine of a search, as a process of its own:  python -m tests.tuning.search_process URL STUDY BOWL_AS_JSON"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moe_param.tuning.search import Search
from moe_param.tuning.strategies import Grid
from moe_param.tuning.study import SearchError, open_study, storage_errors
from tests.tuning.surfaces import Bowl

RATES = tuple(2.0**k for k in range(-11, -3))


def grid(*seeds: int) -> Grid:
    return Grid(tuple({"learning_rate": rate} for rate in RATES), seeds or (0,))


if __name__ == "__main__":
    url, name, bowl = sys.argv[1:]
    values = json.loads(bowl)
    values["folder"] = Path(values["folder"])
    try:
        study = open_study(url, name, {})
        with storage_errors(url):
            Search(study, grid(), Bowl(**values), heartbeat=0.2, grace=300.0).run()
    except SearchError as error:
        sys.exit(f"search: {error}")
