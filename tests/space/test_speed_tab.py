import pytest
import speed_tab


@pytest.fixture(scope="module")
def table():
    return speed_tab.records()


def test_a_pass_that_was_not_recorded_is_told_of(table):
    cpu = next(name for name in table["machine"].unique() if "NVIDIA" not in name)
    assert speed_tab._missing(table, cpu, "forward") == ""
    assert speed_tab._chosen(table, cpu, "backward").empty
    assert speed_tab._missing(table, cpu, "backward") == f"No backward pass was recorded on {cpu}."


def test_the_machine_shown_first_is_the_one_of_the_figures(table):
    assert speed_tab._first(sorted(table["machine"].unique())) == "NVIDIA H200"
    assert speed_tab._first(["B", "C"]) == "B"
