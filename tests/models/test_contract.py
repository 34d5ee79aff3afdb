"""The artifact's seal: any file missing, truncated or altered is refused by one line that names it."""

import json
import math
import shutil
from typing import Any

import pytest
from pydantic import ValidationError

from models.contract import (
    HDF5_FILE,
    KERAS_FILE,
    MANIFEST_FILE,
    SAVED_MODEL_FILE,
    WARMUP_FILE,
    ArtifactError,
    Calibration,
    ConformalScores,
    Manifest,
    check_name,
    counted,
    csv_delimiter,
    listed,
    manifest_bytes,
    model_names,
    one_line,
    read_manifest,
    verify,
    versions,
    visible,
)

FILES = [
    SAVED_MODEL_FILE,
    "variables/variables.index",
    "variables/variables.data-00000-of-00001",
    KERAS_FILE,
    HDF5_FILE,
    WARMUP_FILE,
]


@pytest.fixture
def copy(tiny, tmp_path):
    folder = tmp_path / "1"
    shutil.copytree(tiny.folder, folder)
    return folder


def refusal(folder) -> str:
    with pytest.raises(ArtifactError) as caught:
        verify(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_file_of_an_artifact_is_listed(tiny):
    assert set(FILES) <= set(tiny.manifest.files)
    on_disk = {path.relative_to(tiny.folder).as_posix() for path in tiny.folder.rglob("*") if path.is_file()}
    assert on_disk == {*tiny.manifest.files, MANIFEST_FILE}
    assert verify(tiny.folder) == tiny.manifest


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    assert str(copy / name) in refusal(copy)


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
def test_a_truncated_file_is_named(copy, name):
    content = (copy / name).read_bytes()
    for length in (0, len(content) // 2, len(content) - 1):
        (copy / name).write_bytes(content[:length])
        assert str(copy / name) in refusal(copy)


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_named(copy, name):
    content = (copy / name).read_bytes()
    for position in (0, len(content) // 2, len(content) - 1):
        (copy / name).write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert str(copy / name) in refusal(copy)
    (copy / name).write_bytes(content + b"\n")
    assert str(copy / name) in refusal(copy)


def test_any_altered_byte_of_the_manifest_is_refused(copy):
    path = copy / MANIFEST_FILE
    content = path.read_bytes()
    for position in [*range(0, len(content), 37), *range(len(content) - 90, len(content))]:
        for bit in (1, 32):
            path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
            assert str(path) in refusal(copy)
    for altered in (content + b"\n", b" " + content, content.replace(b"\n", b"\r\n"), content.replace(b": ", b":")):
        path.write_bytes(altered)
        assert str(path) in refusal(copy)


def test_a_manifest_that_is_a_folder_or_no_json_is_named(copy):
    path = copy / MANIFEST_FILE
    for content in (b"", b"null", b"[]", b"{}", b"\xff\xfe", b'{"format": 2}'):
        path.write_bytes(content)
        assert str(path) in refusal(copy)
    path.unlink()
    path.mkdir()
    assert str(path) in refusal(copy)


def test_a_sealed_manifest_of_another_format_is_refused(copy, tiny):
    other = json.loads(manifest_bytes(tiny.manifest))
    other["format"] = 2
    (copy / MANIFEST_FILE).write_text(json.dumps(other))
    assert "wanted a format 1 manifest" in refusal(copy)


@pytest.mark.parametrize(
    "path", ["../1/secret", "/etc/passwd", "variables/../../x", "..", "", "a//b", "./a", "a\\..\\b", MANIFEST_FILE]
)
def test_a_manifest_cannot_point_outside_its_artifact(copy, tiny, path):
    """Even a rightly sealed one: else whoever can write a manifest could have any file of the machine examined."""
    digest = next(iter(tiny.manifest.files.values()))
    forged = Manifest.model_construct(**{**dict(tiny.manifest), "files": {path: digest}})
    (copy / MANIFEST_FILE).write_bytes(manifest_bytes(forged))
    message = refusal(copy)
    assert str(copy / MANIFEST_FILE) in message
    assert "does not lie inside the artifact" in message


def test_a_manifest_survives_a_round_trip(tiny, tmp_path):
    (tmp_path / MANIFEST_FILE).write_bytes(manifest_bytes(tiny.manifest))
    assert read_manifest(tmp_path) == tiny.manifest


DECILES = [0.0, 0.1, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.69]


def calibration(**of_output: Any) -> dict[str, Any]:
    return {"rows": 10, "outputs": {"first": of_output}}


def test_calibration_is_found_by_output(tiny):
    (output,) = tiny.manifest.outputs
    assert tiny.manifest.model_copy(update={"calibration": None}).calibrated(output) is None
    made = Calibration.model_validate(calibration(reference={"predictive_entropy": DECILES}))
    manifest = tiny.manifest.model_copy(update={"calibration": made})
    found = manifest.calibrated(output.model_copy(update={"name": "first"}))
    assert found is not None
    assert found.reference.predictive_entropy == DECILES
    assert found.reference.mutual_information is None
    assert manifest.calibrated(output.model_copy(update={"name": "second"})) is None


@pytest.mark.parametrize(
    "reference",
    [{"predictive_entropy": DECILES[:5]}, {"predictive_entropy": DECILES[::-1]}, {"entropy": DECILES}, [DECILES]],
    ids=["too few", "falling", "unknown", "a list"],
)
def test_an_uncertainty_reference_that_is_not_as_it_should_be_is_refused(reference):
    with pytest.raises(ValidationError, match=r"outputs\.first\.reference"):
        Calibration.model_validate(calibration(reference=reference))


@pytest.mark.parametrize(
    ("coverage", "rank"),
    # ceil((n + 1) coverage) of 9 scores; 0.95 would need 19 rows.
    [(0.1, 1), (0.5, 5), (0.55, 6), (0.8, 8), (0.9, 9), (0.91, None), (0.95, None)],
)
def test_thresholds_are_the_scores_of_the_finite_sample_rank(coverage, rank):
    scores = ConformalScores(kind="lac", scores=[[0.1 * place for place in range(1, 10)], [0.5]], by_class=True)
    wanted = math.inf if rank is None else 0.1 * rank
    assert scores.thresholds(coverage) == [wanted, 0.5 if coverage <= 0.5 else math.inf]


@pytest.mark.parametrize(("coverage", "rows"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99)])
def test_rows_that_a_coverage_wants(coverage, rows):
    def threshold(count: int) -> float:
        return ConformalScores(kind="lac", scores=[[0.0] * count]).thresholds(coverage)[0]

    assert ConformalScores(kind="lac", scores=[[]]).rows_wanted(coverage) == rows
    assert threshold(rows) == 0
    assert threshold(rows - 1) == math.inf


@pytest.mark.parametrize("name", ["sonar", "a", "a" * 63, "0.9-b_c"])
def test_names_that_are_allowed(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "Sonar", "a" * 64, "../x", "a/b", ".a", "a.", "-a", "a b", "a\n", "ä", "a:1"])
def test_names_that_are_refused(name):
    with pytest.raises(ArtifactError, match="wanted 1 to 63 lower-case letters"):
        check_name(name)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("size of [x]", "size of [x]"),
        ("größe, 'm²'", "größe, 'm²'"),
        ("", "''"),
        (" size", "' size'"),
        ("size\t", r"'size\t'"),
        ("a\nb", r"'a\nb'"),
        ("\ufeffsize", r"'\ufeffsize'"),
        ("no\xa0break", r"'no\xa0break'"),
        ("\x1b[31mred", r"'\x1b[31mred'"),
        ("\ud800", r"'\ud800'"),
    ],
)
def test_names_are_quoted_where_not_all_of_them_would_be_seen(name, shown):
    assert visible(name) == shown
    assert listed(["a", name]) == f"a, {shown}"


def test_of_many_names_the_first_are_listed_and_the_others_counted():
    names = [f"c{number}" for number in range(3000)]
    assert listed(names[:3], 3) == "c0, c1, c2"
    assert listed(names[:4], 3) == "c0, c1, c2 and 1 more"
    assert listed(names) == ", ".join(names[:20]) + " and 2,980 more"
    assert listed([]) == ""


def test_things_are_counted_as_people_read_it():
    found = [counted(number, "test row") for number in (0, 1, 2, 1800)]
    assert found == ["0 test rows", "1 test row", "2 test rows", "1,800 test rows"]


def test_a_message_is_one_line_whose_own_blanks_stay():
    assert one_line("found 'a  b',\r\n   wanted:\n\n\tc\u2028d\n") == "found 'a  b', wanted: c d"


def test_versions_are_whole_numbers_only(tmp_path):
    assert versions(tmp_path / "nowhere", "net") == []
    assert model_names(tmp_path / "nowhere") == []
    for entry in ("1", "2", "10", ".publishing-abc", "latest", "3.1", "-4", "²"):
        (tmp_path / "net" / entry).mkdir(parents=True)
    (tmp_path / "net" / "5").write_text("a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "Wrong Name" / "1").mkdir(parents=True)
    assert versions(tmp_path, "net") == [1, 2, 10]
    assert model_names(tmp_path) == ["net"]


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("a,b;c,d\n1;2;3;4;5\n", ","),
        ("\ufeffprice, old;price, new;kind;size\n", ";"),
        ("a\tb,c\td", "\t"),
        ("only\n1,5\n", ","),
        ("", ","),
    ],
)
def test_csv_delimiter_is_what_the_first_line_has_most_often(tmp_path, text, delimiter):
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    assert csv_delimiter(path) == delimiter
