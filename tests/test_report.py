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


def set_row():
    """As of one set, the same for the model and for all others."""
    angle = {"mae_deg": [3.0, 4.0], "median_deg": [1.0, 2.0], "p90_deg": [5.0, 6.0], "acc_at_10": [0.8, 0.9],
             "both_at_10": 0.7}
    row = metrics(1, 2) | {"interval_95": {"cone_mae_deg": [(0, 1), (0, 2)]}, "acc_at_15": 0.5, "both_at_10": 0.5,
                           "num_clips": 4, "eval_digest": "ab", "set_version": 1, "cone": angle, "azimuth": angle,
                           "detection_at_10": {"mdr": 0.125, "far": 0.125, "fine_error_deg": 2.25}}
    return row | {key: row for key in ("baseline", "baseline_mean", "chance")} | {"floor": None}


def test_sets_have_a_table_of_cone_angles_and_one_of_the_rest():
    floor = {"exact_cone": [6.0, 7.0], "exact_cone_and_distance": [5.0, 5.5], "exact_cone_mae": [6.1, 7.1],
             "exact_cone_and_distance_mae": [5.1, 5.6]}
    first, second, _ = sets_table({"e1": set_row() | {"floor": floor}}).split("\n\n")
    for table, column, floors in ((first, "azimuth class MAE", ["6.00 / 7.00", "5.00 / 5.50"]),
                                  (second, "azimuth MAE", ["6.10 / 7.10", "5.10 / 5.60"])):
        head, *rows = table.splitlines()
        assert [row.split("  ")[1 if row.startswith("e1") else 2].strip() for row in rows[:2]] == [
            "model", "GCC-PHAT, max"]
        at = head.index(column)
        assert [row[at:at + 11] for row in rows[-2:]] == floors
    row = second.splitlines()[1]
    assert all(cell in row for cell in ("5.00 / 6.00", "12.5 %", "2.25", "3.00 / 4.00", "80.0 / 90.0 %", "70.0 %"))


def test_what_there_is_nothing_of_is_no_number():
    """Intervals of fewer than 10 scenes, and the error of talkers of whom none was found."""
    few = set_row()
    few |= {"interval_95": None, "detection_at_10": {"mdr": 1.0, "far": 1.0, "fine_error_deg": None}}
    text = sets_table({"e1": few})
    assert "100.0 %" in text and "None" not in text and "  too few  " in text


def test_what_chance_of_measured_rooms_knows_is_said_below_the_table():
    row = set_row()
    for names, said in ((["e1"], 0), (["e1", "e3"], 1)):
        assert sets_table({name: row for name in names}).count("of e3 those of its own clips") == said
