"""The table of largest differences, printed below the test results."""

import pytest


@pytest.fixture
def measure(record_property):
    """measure(what, ours, theirs): keep the difference, and fail above `allowed`."""
    from observe import largest

    def check(what, ours, theirs, allowed=1e-5):
        difference = largest(ours, theirs)
        record_property(what, difference)
        assert difference <= allowed, f"{what} differ by {difference:.1e}"

    return check


def pytest_terminal_summary(terminalreporter):
    rows = [
        (report.nodeid.rpartition("::")[2], report.user_properties)
        for report in terminalreporter.getreports("passed")
        if "parity" in report.nodeid and report.user_properties
    ]
    if rows:
        terminalreporter.section("largest difference from peft, over the largest value")
    for name, measured in rows:
        columns = "  ".join(f"{what} {value:.1e}" for what, value in measured)
        terminalreporter.write_line(f"{name:<56} {columns}")
