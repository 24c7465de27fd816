"""Tables of results: every cell in its column, and words for however many talkers there are."""
import pytest

from ssl_gpu.report import ROWS, metrics_table, result_table, sets_table


def metrics(*angles):
    """Metrics with an error per talker."""
    return {key: list(angles) if key.endswith("mae_deg") else 0.5 for _, key, _ in ROWS}


@pytest.mark.parametrize("talkers", [1, 2, 3, 5])
def test_cells_never_run_into_each_other(talkers):
    """Two blanks at least before every cell, and all columns end where their names do."""
    errors = [100.25 + talker for talker in range(talkers)]
    columns = {name: metrics(*errors) for name in ("model, LEAKED", "GCC-PHAT", "chance")}
    lines = metrics_table(columns).splitlines()
    cell = " / ".join(f"{error:.2f}" for error in errors)
    assert lines[1].split("  ")[-1].strip() == cell and lines[1].count("  " + cell) == 3
    assert len({len(line) for line in lines}) == 1
    ends = [lines[0].index(name) + len(name) for name in columns]
    assert all(line[end - 1] != " " and line[end:end + 2] in ("  ", "") for line in lines for end in ends)


@pytest.mark.parametrize("talkers, words", [
    (1, "errors in degrees; "), (2, "errors of the smaller / the larger angle in degrees; "),
    (3, "errors of the 3 angles, ascending, in degrees; ")])
def test_heading_is_worded_for_the_number_of_talkers(talkers, words):
    row = metrics(*range(talkers))
    heading = result_table({**row, "baseline": row, "chance": row, "num_clips": 4, "eval_digest": "ab"}).splitlines()
    assert heading[0].startswith("4 clips, ") and heading[1].startswith(words)


def test_what_chance_of_measured_rooms_knows_is_said_below_the_table():
    row = metrics(1, 2) | {"interval_95": {"cone_mae_deg": [(0, 1), (0, 2)]}, "acc_at_15": 0.5, "both_at_10": 0.5,
                           "num_clips": 4, "eval_digest": "ab"}
    row |= {key: row for key in ("baseline", "baseline_mean", "chance")} | {"floor": None}
    for names, said in ((["e1"], 0), (["e1", "e3"], 1)):
        assert sets_table({name: row for name in names}).count("of e3 those of its own clips") == said
