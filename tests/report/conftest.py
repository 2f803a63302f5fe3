"""A made-up run and its report, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_run import make_run

from neft.report.page import render_report
from neft.report.run_data import RunData, read_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="session")
def run_data(run_folder: Path) -> RunData:
    return read_run(run_folder)


@pytest.fixture(scope="session")
def page(run_data: RunData) -> str:
    return render_report(run_data)
