import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the suite shares two cores among up to eight processes

import pytest

from tests.matrix import PAGE, Matrix
from tests.pool import Pool

MATRIX = Matrix()


@pytest.fixture(scope="session")
def pool():
    workers = Pool()
    yield workers
    workers.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" and hasattr(item, "callspec") and item.path.name == "test_laws.py":
        MATRIX.observe(item.originalname, item.callspec.params, report.passed, dict(report.user_properties))


def pytest_terminal_summary(terminalreporter):
    if MATRIX.write():
        terminalreporter.write_line(f"{PAGE.name} was written anew: the cells have changed. Look at it, and commit it.")
