import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the suite shares two cores among up to eight processes

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def pool():
    workers = Pool()
    yield workers
    workers.close()
