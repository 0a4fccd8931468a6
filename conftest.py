"""pytest --checkpoint=DIR: our model against the published code that lies beside its weights.

What that code computes is in official.py, what is compared in the tests marked `official`.
"""

import shutil
import sys
from pathlib import Path

import pytest

import official


def pytest_addoption(parser):
    parser.addoption("--checkpoint", type=Path, metavar="DIR",
                     help="run the tests marked official and no others: compare with the published "
                          "code in this checkpoint directory")
    parser.addoption("--reference", type=Path, metavar="FILE",
                     help="what that code gave: used if it is there, else written")
    parser.addoption("--official-python", metavar="PYTHON",
                     help="the interpreter that runs it; without this option, the one of pytest")


def pytest_configure(config):
    config.addinivalue_line("markers", "official: compares with the published code; --checkpoint")
    option = config.option
    if option.checkpoint is None:
        if option.reference or option.official_python:
            raise pytest.UsageError("--reference and --official-python need --checkpoint=DIR")
        return
    python = option.official_python or sys.executable
    if shutil.which(python) is None:
        raise pytest.UsageError(f"--official-python {python} is not a program")
    try:
        official.check(option.checkpoint, option.reference)
    except ValueError as error:
        raise pytest.UsageError(f"--checkpoint: {error}") from None
    if hasattr(option, "dist"):         # -n 2 would run the published code, and load ours, twice
        option.dist = "no"


def pytest_collection_modifyitems(config, items):
    """With --checkpoint nothing but the marked tests, so that no test can start itself anew."""
    if config.option.checkpoint is not None:
        others = [item for item in items if item.get_closest_marker("official") is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session")
def published(request, tmp_path_factory) -> tuple[Path, dict]:
    """The checkpoint directory, and the tensors that the published code gave."""
    option = request.config.option
    if option.checkpoint is None:
        pytest.skip("no published code and weights here; give --checkpoint=DIR")
    file = option.reference or tmp_path_factory.mktemp("official") / "reference.safetensors"
    try:
        return option.checkpoint, official.reference(
            option.checkpoint, file, option.official_python or sys.executable)
    except ValueError as error:
        pytest.fail(str(error), pytrace=False)
