"""``python -m benchmarks.port SET NAME FILE``: measure one model, write its `Outcome`; `_child` runs it."""

import argparse
import importlib
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from .._setting import Setting
from ._measure import measure_port
from .zoo import SETS, find

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.port", description=__doc__)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("name")
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # what builders warn of is theirs; what matters here is in the outcome
    outcome = measure_port(
        find(arguments.set, arguments.name),
        importlib.import_module("torchjax_bridge").port,
        Setting("cpu", arguments.quick),
    )
    arguments.file.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    sys.stdout.flush()
