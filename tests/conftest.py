import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the suite shares two cores among up to eight processes

import pytest
import torch

from tests import formats, matrix
from tests.pool import Pool

MATRIX = matrix.Matrix()
FORMATS = formats.Formats()


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers alone and after any others."""
    torch.manual_seed(0)


@pytest.fixture
def proof(request):
    """Called by a test of a format with what it has compared with a real program: arguments of `Formats.proof`."""

    def note(*args, difference, **kwargs):
        request.node.user_properties.append(("proof", [args, kwargs | {"difference": float(difference)}]))

    return note


@pytest.fixture(scope="session")
def pool():
    workers = Pool()
    yield workers
    workers.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" and hasattr(item, "callspec") and item.path.name == "test_laws.py":
        report.user_properties.append(("cell", [item.originalname, {k: v for k, v in item.callspec.params.items() if isinstance(v, str)}]))


def pytest_runtest_logreport(report):
    """Where the pages are written: with several processes of tests, their reports come together in the first one."""
    if report.when != "call":
        return
    properties = dict(report.user_properties)
    if "cell" in properties:
        MATRIX.observe(*properties["cell"], report.passed, properties)
    for args, kwargs in (value for name, value in report.user_properties if name == "proof"):
        FORMATS.proof(*args, **kwargs)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    written = [matrix.PAGE] if MATRIX.write() else []
    everything = not config.option.keyword and not config.option.markexpr and not config.option.deselect and not config.args_given
    if everything and exitstatus == 0 and FORMATS.write():
        written.append(formats.PAGE)
    for page in written:
        terminalreporter.write_line(f"{page.name} was written anew: the cells have changed. Look at it, and commit it.")


def pytest_configure(config):
    config.args_given = config.args_source is pytest.Config.ArgsSource.ARGS
