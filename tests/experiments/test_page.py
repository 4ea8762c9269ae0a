"""The page of a run: it holds all that is printed, and needs nothing but itself."""

import dataclasses
import html.parser
import re
import shlex

import pytest

from regjax.__main__ import main
from regjax.experiments import (
    LandscapeSettings,
    SpectrumSettings,
    TrainSettings,
    _contents,
    _folder,
    _meanings,
    _monitor_report,
    _page,
    _report,
    _seeds,
    _settings,
    _spectrum_run,
    _table,
    _words,
    run_landscape,
    run_spectrum,
    run_train,
)
from tests.experiments.test_training import SMALL, make_dataset, silent

pytestmark = pytest.mark.usefixtures("small_data", "standard_promotion")

FEW = {"num_eigenvalues": 2, "num_steps": 4, "num_probes": 2}
SURFACE = {"points": 3, "probe_points": 2}
# Whatever the browser would fetch, or run.
OUTSIDE = {"script", "link", "iframe", "object", "embed", "video", "audio", "base", "form"}


class Reader(html.parser.HTMLParser):
    """What is on a page: tags, pictures, text, and the settings that are marked."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.words, self.images = [], [], [], []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_data(self, data):
        self.words.append(data)


def check_alone(page):
    """Nothing on the page comes from outside of it, and each picture says what it is."""
    assert not OUTSIDE & set(page.tags)
    assert all(image["src"].startswith("data:image/") for image in page.images)
    assert all(len(image["alt"]) > 20 for image in page.images)
    names = [name for name, _ in page.attributes]
    assert names.count("src") == len(page.images)
    assert not [name for name in names if name == "href" or name.startswith("on")]
    assert "url(" not in page.text
    assert "@import" not in page.text


def check_printed(page, out):
    """All that was printed stands on the page, number by number."""
    printed, _, _ = out.partition("Results are in")
    cells = re.split(r"\s{2,}|\n", printed)
    assert len(cells) > 10
    for cell in cells:
        assert " ".join(cell.split()) in page.text, cell


def words_of(options):
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def test_a_page_holds_all_that_is_printed_and_all_settings(tmp_path, capsys):
    main(["spectrum", *words_of({**SMALL, **FEW, "out": tmp_path})])
    page = Reader(tmp_path / "report.html")
    check_alone(page)
    check_printed(page, capsys.readouterr().out)
    assert len(page.images) == 1
    for name in _settings.option_types(SpectrumSettings):
        assert ("--" + name.replace("_", "-") + " " in page.text) == ("." not in name)
    assert "--num-steps 4 *" in page.text
    assert "--optimizer sgd --" in page.text  # at its default, without a mark
    assert "jax 0." in page.text
    assert "SHA-256 000" in page.text
    # Each row of the tables is followed by what it means.
    for name, sentence in (("trace", "Sum of all eigenvalues"), ("eigenvalue 2", "The largest")):
        assert re.search(rf"{name} [^ ]+ ± [^ ]+ {sentence}", page.text)
    assert page.text.count(f"{_meanings.BOUND}.") == 2
    command = shlex.split(re.search(r"python -m regjax spectrum (.*) Left: ", page.text)[1])
    assert _words.parse("spectrum", command) == SpectrumSettings(**SMALL, **FEW, out=tmp_path)


def test_a_folder_with_two_analyses_of_a_network_has_one_page(tmp_path):
    settings = SpectrumSettings(**SMALL, **FEW, figure="svg", out=tmp_path)
    run_spectrum(settings, silent)
    surface = LandscapeSettings(**SMALL, **SURFACE, figure="pdf", checkpoint=tmp_path)
    run_landscape(surface, silent)
    page = Reader(tmp_path / "report.html")
    check_alone(page)
    assert "Spectrum" in page.words
    assert "Loss surface" in page.words
    assert page.text.count("accuracy ") == page.text.count("accuracy 0") + 1  # once
    kinds = [image["src"].partition(";")[0] for image in page.images]
    assert kinds == ["data:image/svg+xml", "data:image/png", "data:image/png"]
    # Of another network, or of a run that was not finished, nothing is shown.
    other = dataclasses.replace(settings, seed=1, overwrite=True)
    run_spectrum(other, silent)
    assert "Loss surface" not in Reader(tmp_path / "report.html").words


def test_a_page_of_an_interrupted_analysis_is_not_made(tmp_path):
    run_train(TrainSettings(**SMALL, out=tmp_path), silent)
    before = (tmp_path / "report.html").read_bytes()

    def interrupt(stage, done, total):
        if stage == "density":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_spectrum(SpectrumSettings(**SMALL, **FEW, checkpoint=tmp_path), interrupt)
    assert (tmp_path / "report.html").read_bytes() == before
    run_train(TrainSettings(**SMALL, out=tmp_path), silent)
    assert "Spectrum" not in Reader(tmp_path / "report.html").words


@pytest.mark.parametrize(("command", "seeds"), [("landscape", 1), ("train", 2)])
def test_a_comparison_has_a_page(command, seeds, tmp_path, capsys):
    own = SURFACE if command == "landscape" else {}
    words = words_of({**SMALL, **own, "out": tmp_path, "seeds": seeds})
    main([command, *words, "--compare", "sgd", "adam"])
    page = Reader(tmp_path / "report.html")
    check_alone(page)
    check_printed(page, capsys.readouterr().out)
    assert len(page.images) == len(own)
    assert "--compare sgd adam *" in page.text
    assert (_meanings.PAIRED in page.text) == (seeds == 2)
    own = tmp_path / "adam" / ("seed_1" if seeds == 2 else "") / "report.html"
    assert "--optimizer adam *" in Reader(own).text


def test_what_a_name_holds_is_text(tmp_path, monkeypatch):
    name = 'A <script>alert(1)</script> & "B"'
    dataset = make_dataset()._replace(name=name)
    monkeypatch.setattr(_spectrum_run, "load", lambda name, **options: dataset)
    run_train(TrainSettings(**SMALL, data="<b>&", out=tmp_path), silent)
    page = Reader(tmp_path / "report.html")
    check_alone(page)
    assert page.text.count(name) >= 2
    assert "--data <b>& *" in page.text


def test_what_is_not_a_number_is_shown_as_such(tmp_path):
    record = run_spectrum(SpectrumSettings(**SMALL, **FEW, out=tmp_path), silent)
    block, nan = record["blocks"]["network"], float("nan")
    block["eigenvalues"]["values"][0] = nan
    block["density"]["trace"] = {"value": nan, "standard_error": nan}
    block["density"]["counts"] |= {"outlier_threshold": nan, "zero_threshold": nan}
    record["generalization"]["test_loss"] = float("inf")
    sharpness = {"value": 1.5, "residual_norm": nan, "converged": False}
    margins = {"low": -0.5, "median": nan, "high": 2.0}
    record["geometry"] = {
        "num_examples": 23,
        "geometric_complexity": nan,
        "margins": {"train": margins, "test": margins},
        "spherical_sharpness": {
            **sharpness,
            **{"mode": "train", "num_examples": 9, "num_leaves": 1, "of_all_leaves": True},
        },
    }
    _page.write_page(tmp_path, "spectrum.json", record)
    page = Reader(tmp_path / "report.html")
    check_printed(page, _table.text(_contents.run_contents(record)))
    text = page.text
    assert "spherical sharpness not converged 1.5 ± nan" in text
    assert "-0.5, nan, 2" in text
    assert "trace nan ± nan" in text
    assert "eigenvalue 1 nan ± " in text
    assert "eigenvalues above nan" in text
    assert " inf " in text


def test_a_page_of_a_failure_says_so_first(tmp_path):
    record = run_train(TrainSettings(**SMALL, out=tmp_path), silent)
    record["training"]["failure"] = "TRAINING FAILED: it diverged."
    _page.write_page(tmp_path, "training.json", record)
    text = Reader(tmp_path / "report.html").text
    assert text.index("TRAINING FAILED") < text.index("This command")


def test_every_row_has_a_meaning():
    names = [*_seeds.QUANTITIES, *_report.LISTED, "learned", "batch norm"]
    names += [label for label, _, _ in _monitor_report.OF_MONITOR.values()]
    assert len(names) > 40
    for name in names:
        assert _meanings.meaning(name).text.endswith(".")
        assert not _meanings.meaning(name).error.endswith(".")
    with pytest.raises(KeyError):
        _meanings.meaning("largest eigenvalu")


@pytest.mark.parametrize(
    "settings",
    [
        TrainSettings(),
        TrainSettings(learning_rate=0.5, weight_decay=1e-30, data="my file's.npz", momentum=0.0),
        TrainSettings(transformation="sam", monitor="loss,sharpness"),
        SpectrumSettings(compare=("sgd", "sam,rho=0.1"), seeds=3, geometry=True, mesh="data=2"),
        LandscapeSettings(init="gradinit", data_dir="-odd folder"),
        TrainSettings(
            transformation="perturbed_gradient",
            perturbed_gradient=_settings.TRANSFORMATIONS["perturbed_gradient"](layerwise=False),
        ),
    ],
)
def test_a_command_line_is_read_back(settings):
    start, *words = shlex.split(_words.command_line(settings).removeprefix("python -m regjax "))
    assert start == _folder.command(settings)
    read = _words.parse(start, words)
    assert _folder.all_options(read) == {
        **_folder.all_options(settings),
        "data_dir": read.data_dir,
    }
    assert str(read.data_dir) == str(settings.data_dir)


def test_what_is_usual_is_not_on_the_command_line():
    settings = TrainSettings(learning_rate=0.05, width=64, depth=2, resume=True, overwrite=True)
    assert _words.command_line(settings) == "python -m regjax train"
