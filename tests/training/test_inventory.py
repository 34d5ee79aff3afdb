import io
import json
import shutil

import pytest
from rich.console import Console

from training import inventory
from training.pipeline import train
from training.plan import plan
from training.progress import Reporter


@pytest.fixture(scope="module")
def sonar(tmp_path_factory):
    repository = tmp_path_factory.mktemp("inventory")
    request = plan("sonar", repository=repository, seed=0, num_samples=20, epochs=1)
    return train(request, Reporter(quiet=True)).folder


@pytest.fixture
def repository(sonar, tmp_path):
    for version in ("2", "10"):
        shutil.copytree(sonar, tmp_path / "sonar" / version)
    return tmp_path


def cells(items):
    table = inventory.table(items)
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_versions_are_listed_by_number_with_what_they_are(repository):
    items = inventory.read(repository)
    assert [item.version for item in items] == [2, 10]
    entry = json.loads(json.dumps(inventory.document(items[0])))
    assert entry["verified"] is True
    assert entry["tasks"] == ["classification"]
    assert [layer["settings"]["rate"] for layer in entry["stochastic_layers"]] == [0.2, 0.2, 0.2]
    assert set(entry["metrics"]["test"]) == {"accuracy", "nll", "brier"}
    [row, _] = cells(items)
    assert row[:3] == ("sonar 2", "classification", "3 Dropout 0.2")
    assert row[-1] == "verified"


def test_damaged_version_is_listed_with_its_problem_and_spoils_no_other(repository):
    with (repository / "sonar" / "2" / "saved_model.pb").open("ab") as stream:
        stream.write(b"x")
    (repository / "sonar" / "3").mkdir()
    (repository / "other" / "1").mkdir(parents=True)
    (repository / "other" / "1" / "manifest.json").write_text("{")
    other, second, third, tenth = inventory.read(repository)
    assert "manifest.json" in str(other.problem)
    assert "saved_model.pb" in str(second.problem)
    assert second.manifest is not None
    assert "manifest.json" in str(third.problem)
    assert tenth.problem is None
    assert [inventory.document(item)["verified"] for item in (other, second, third, tenth)] == [False] * 3 + [True]
    assert [row[-1] == "verified" for row in cells([other, second, third, tenth])] == [False] * 3 + [True]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_word_is_broken_however_narrow_the_terminal(repository, width):
    with (repository / "sonar" / "2" / "saved_model.pb").open("ab") as stream:
        stream.write(b"x")
    items = inventory.read(repository)
    written = io.StringIO()
    console = Console(width=width, file=written, markup=False)
    console.print(inventory.shown(items, console))
    text = written.getvalue()
    words = text.split()
    for word in ("sonar", "classification", "Dropout", "accuracy", "nll", "brier", "verified", "refused"):
        assert any(found.strip(":,") == word for found in words), word
    assert max(map(len, text.splitlines())) <= width
    assert any(line.startswith("model") for line in text.splitlines()[:2]) == (width >= 80)
    # Once, and after everything else.
    [said] = text.split("\n\n")[1:]
    assert "saved_model.pb" in "".join(said.split())


def test_repository_that_is_not_there_is_empty(tmp_path):
    assert inventory.read(tmp_path / "nothing") == []


def test_unfinished_publications_and_foreign_folders_are_no_models(repository):
    (repository / "sonar" / ".publishing-x").mkdir()
    (repository / "UPPER" / "1").mkdir(parents=True)
    (repository / "notes.txt").write_text("")
    assert [(item.name, item.version) for item in inventory.read(repository)] == [("sonar", 2), ("sonar", 10)]
