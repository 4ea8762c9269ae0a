"""What the bars on stderr end with."""

from regjax.experiments._progress import Bar


def test_a_stage_that_needs_fewer_steps_than_its_limit_ends_at_100_percent(capsys):
    with Bar() as bar:
        bar("eigenvalues", 28, 960)
        bar("density", 5, 720)
    shown = capsys.readouterr().err
    assert "eigenvalues: 100%" in shown
    assert "28/28" in shown
    assert "5/5" in shown


def test_a_stage_that_failed_stays_where_it_was(capsys):
    bar = Bar()
    bar("training", 3, 10)
    bar.__exit__(RuntimeError, RuntimeError(), None)
    shown = capsys.readouterr().err
    assert "3/10" in shown
    assert "3/3" not in shown
