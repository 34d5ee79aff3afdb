import os
from pathlib import Path

import pytest

from models.contract import ArtifactError
from training.plan import (
    NothingStochastic,
    ReportError,
    RepositoryError,
    TargetError,
    TypedTwice,
    check_report,
    check_writable,
    plan,
)
from training.recipes import DEFAULTS, SONAR_BASELINE


def planned(data="sonar", *, repository, **request):
    return plan(data, repository=repository, seed=0, num_samples=100, **request)


def test_defaults_are_the_data_sets_own(tmp_path):
    made = planned(repository=tmp_path)
    assert (made.name, made.data.name, made.recipe) == ("sonar", "sonar", DEFAULTS["sonar"])
    assert list(tmp_path.iterdir()) == []


def test_own_target_may_be_named(tmp_path):
    assert planned(repository=tmp_path, target="object").data.target == "object"
    with pytest.raises(TargetError, match="target 'band_01': sonar is set up for its target 'object' only"):
        planned(repository=tmp_path, target="band_01")


def test_net_without_dropout_is_refused(tmp_path):
    with pytest.raises(NothingStochastic, match="nothing to draw"):
        planned(repository=tmp_path, visible_dropout=0.0, hidden_dropout=0.0)
    assert not SONAR_BASELINE.is_stochastic
    # One rate above 0 is enough; digits have none on the visible layer to begin with.
    planned(repository=tmp_path, visible_dropout=0.0)
    with pytest.raises(NothingStochastic):
        planned("digits", repository=tmp_path, hidden_dropout=0.0)


def test_a_column_is_typed_once(tmp_path):
    path = tmp_path / "homes.csv"
    path.write_text("size,kind\n" + "".join(f"{number},{'ab'[number % 2]}\n" for number in range(20)))
    with pytest.raises(TypedTwice, match=r"^--type size: given more than once; wanted it once, as in size=numeric,"):
        planned(str(path), repository=tmp_path, target="kind", types=["size=ignored", "size=nullable"])


@pytest.mark.parametrize("name", ["", "Sonar", "a/b", "..", "-a", "a" * 64, "modèle"])
def test_bad_model_name_is_refused(name, tmp_path):
    with pytest.raises(ArtifactError, match="model name"):
        planned(repository=tmp_path, name=name)


def test_repository_that_does_not_exist_yet_is_writable_where_its_parent_is(tmp_path):
    check_writable(tmp_path / "new" / "deeper" / "sonar")
    assert list(tmp_path.iterdir()) == []


def test_repository_under_a_file_is_refused(tmp_path):
    obstacle = tmp_path / "file"
    obstacle.write_text("")
    with pytest.raises(RepositoryError, match="file is not a folder; wanted a writable folder"):
        planned(repository=obstacle / "repository")
    (tmp_path / "sonar").write_text("")
    with pytest.raises(RepositoryError, match="sonar is not a folder"):
        planned(repository=tmp_path)


def test_relative_repository_is_looked_up_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").write_text("")
    with pytest.raises(RepositoryError):
        check_writable(Path("artifacts"))
    check_writable(Path("others"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_repository_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(RepositoryError, match="read-only"):
        planned(repository=tmp_path)
    tmp_path.chmod(0o755)


def test_a_report_may_replace_an_older_one_and_is_refused_where_it_cannot_be_written(tmp_path):
    check_report(tmp_path / "study.html")
    (tmp_path / "study.html").write_text("an older one")
    check_report(tmp_path / "study.html")
    with pytest.raises(ReportError, match="is a folder; wanted a file that can be written"):
        check_report(tmp_path)
    with pytest.raises(ReportError, match="there is no folder"):
        check_report(tmp_path / "nowhere" / "study.html")
