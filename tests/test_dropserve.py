"""The command line as a user meets it: real processes, their exit codes, what they print and what they leave behind."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from dropserve import publication
from models import contract

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, str(ROOT / "dropserve.py")]


def dropserve(*arguments, cwd, **environment):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which `dropserve train sonar` has run, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    result = dropserve("train", "sonar", "--epochs", 2, "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_train_publishes_into_artifacts_and_into_bentomls_store(trained):
    folder, document = trained
    assert document["folder"] == "artifacts/sonar/1"
    manifest = contract.verify(folder / document["folder"])
    assert document["metrics"] == manifest.metrics
    assert document["training"]["epochs"] == 2
    stored = Path(os.environ["BENTOML_HOME"], "models", *document["bento_tag"].split(":"))
    assert contract.verify(stored) == manifest


def test_models_lists_what_train_published(trained):
    folder, _ = trained
    [entry] = json.loads(dropserve("models", "--json", cwd=folder).stdout)
    assert (entry["name"], entry["version"], entry["verified"]) == ("sonar", 1, True)
    text = dropserve("models", cwd=folder).stdout
    assert "sonar 1" in text
    assert "verified" in text


def test_repository_is_taken_from_the_option_then_from_the_environment(trained, tmp_path):
    folder, _ = trained
    repository = str(folder / "artifacts")
    for result in (
        dropserve("models", "--json", "--repository", repository, cwd=tmp_path, DROPSERVE_REPOSITORY="elsewhere"),
        dropserve("models", "--json", cwd=tmp_path, DROPSERVE_REPOSITORY=repository),
    ):
        assert len(json.loads(result.stdout)) == 1
    assert json.loads(dropserve("models", "--json", cwd=tmp_path).stdout) == []
    assert "no models in artifacts" in dropserve("models", cwd=tmp_path).stdout


# What is asked, and what the one line on standard error must name.
BAD_INPUT = {
    "unknown data set": (["sonr"], ["'sonr'", "wanted one of sonar"]),
    "empty data set name": ([""], ["''"]),
    "no such file": (["rows.csv", "--target", "kind"], ["rows.csv", "not found"]),
    "an option for files": (["sonar", "--type", "band_01=categorical"], ["--type", "sonar", "a table from a file"]),
    "a type that is none": (["rows.csv", "--type", "size"], ["--type", "'size'", "COLUMN=KIND"]),
    "a task that is none": (["rows.csv", "--task", "ranking"], ["--task", "ranking"]),
    "no data set": ([], ["DATA"]),
    "two data sets": (["sonar", "wine"], ["wine"]),
    "visible rate above the range": (["sonar", "--visible-dropout", "1.5"], ["visible", "1.5", "wanted"]),
    "hidden rate of 1": (["sonar", "--hidden-dropout", "1"], ["hidden", "1.0", "wanted"]),
    "negative rate": (["sonar", "--hidden-dropout", "-0.1"], ["hidden", "-0.1", "wanted"]),
    "rate that is no number": (["sonar", "--visible-dropout", "abc"], ["--visible-dropout", "number"]),
    "rate of nan": (["sonar", "--visible-dropout", "nan"], ["visible", "nan", "wanted"]),
    "nothing stochastic": (["sonar", "--visible-dropout", "0", "--hidden-dropout", "0"], ["sonar", "above 0"]),
    "negative epochs": (["sonar", "--epochs", "-3"], ["--epochs"]),
    "no epochs": (["sonar", "--epochs", "0"], ["--epochs"]),
    "half an epoch": (["sonar", "--epochs", "1.5"], ["--epochs"]),
    "one draw": (["sonar", "--num-samples", "1"], ["--num-samples"]),
    "negative seed": (["sonar", "--seed", "-1"], ["--seed"]),
    "seed out of range": (["sonar", "--seed", str(2**32)], ["--seed"]),
    "name with a slash": (["sonar", "--name", "a/b"], ["'a/b'", "wanted"]),
    "name of two lines": (["sonar", "--name", "a\nb"], ["wanted"]),
    "name that leaves the repository": (["sonar", "--name", "../x"], ["'../x'", "wanted"]),
    "target of another data set": (["sonar", "--target", "price"], ["'price'", "'object'"]),
    "repository under a file": (["sonar", "--repository", "file/below"], ["file", "not a folder"]),
    "model folder that is a file": (["sonar", "--name", "taken", "--repository", "."], ["taken", "not a folder"]),
    "confidence in no promise": (["sonar", "--confidence", "0.9"], ["--confidence 0.9", "--max-error", "wanted"]),
    "unknown option": (["sonar", "--fast"], ["--fast"]),
}


@pytest.mark.parametrize(("arguments", "named"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_to_train_is_one_line_and_exit_code_2_and_leaves_nothing(arguments, named, tmp_path):
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "taken").write_text("kept")
    before = contents(tmp_path)
    result = dropserve("train", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in named:
        assert word in line
    assert contents(tmp_path) == before


# As rich reads markup: a style, an end without a beginning, a picture.
ODD_COLUMNS = ["a[b]", "[/x]", "[red]size", ":smile:"]


def odd_table(folder):
    """A file with such names for itself, its columns, its categories and its classes."""
    lines = [
        f"{n / 7:.2f},{n % 3},{'[b]u[/b]' if n % 2 else '[/i]'},{n % 5},{['[/y]', '[z]'][n % 2]}" for n in range(60)
    ]
    path = folder / "rows[i][b].csv"
    path.write_text("\n".join([",".join([*ODD_COLUMNS, "kind"]), *lines]) + "\n", encoding="utf-8")
    return path


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path):
    path = odd_table(tmp_path)
    # Where a person looks on, there are bars with the file's name as well.
    person = {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": "120"}
    shown = dropserve("train", path.name, "--target", "kind", "--name", "odd", "--epochs", 1, cwd=tmp_path, **person)
    assert shown.returncode == 0, shown.stderr
    for name in (*ODD_COLUMNS, "[/i], [b]u[/b]", "[/y], [z]"):
        assert name in shown.stdout
    assert path.name in shown.stderr
    judged = dropserve("evaluate", "odd", path.name, "--subgroup", "[red]size", cwd=tmp_path, **person)
    assert judged.returncode == 0, judged.stderr
    for name in ("[/y]", "[z]", "[red]size", "[b]u[/b]", "[/i]"):
        assert name in judged.stdout


def test_line_breaks_in_names_tear_no_row(tmp_path):
    classes = ['"a\r\nb"', "c "]
    lines = [f'{n / 7:.2f},"{"uv"[n % 2]}\n",{classes[n % 2]}' for n in range(60)]
    path = tmp_path / "rows.csv"
    path.write_bytes("\n".join(['"si\n\nze","to\twn\n"," kind"', *lines, ""]).encode())
    shown = dropserve(
        "train", path.name, "--target", " kind", "--name", "odd", "--epochs", 1, cwd=tmp_path, COLUMNS="120"
    )
    assert shown.returncode == 0, shown.stderr
    said, _, *rows = shown.stdout.splitlines()[:4]
    assert said.endswith(r": 'a\r\nb', 'c '")
    assert [row.split()[0] for row in rows] == [r"'si\n\nze'", r"'to\twn\n'"]
    assert r"'u\n', 'v\n'" in rows[1]
    judged = dropserve("evaluate", "odd", path.name, "--subgroup", "to\twn\n", cwd=tmp_path, COLUMNS="120")
    assert judged.returncode == 0, judged.stderr
    starts = [line.split(" rows")[0].rstrip() for line in judged.stdout.splitlines()]
    for name in (r"'to\twn\n'", r"'u\n'", r"'v\n'", r"'a\r\nb'", "'c '"):
        assert any(start.startswith(name) for start in starts), name
    refused = dropserve("evaluate", "odd", path.name, "--subgroup", "town", cwd=tmp_path)
    [line] = refused.stderr.splitlines()
    assert line.endswith(r"wanted one of 'si\n\nze', 'to\twn\n', ' kind'")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "rows[i][b].csv", "--target", "[/x]", "--type", "a[b]=boolean"], "column 'a[b]'"),
        (["train", "rows[i][b].csv", "--target", "[/y]"], "wanted one of a[b], [/x], [red]size, :smile:, kind"),
        (["package", "[/x].keras", "--name", "odd"], "[/x].keras"),
        (["loadtest", "--host", "http://[/x]"], "http://[/x]"),
    ],
)
def test_errors_name_such_names_as_they_are(arguments, named, tmp_path):
    odd_table(tmp_path)
    result = dropserve(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert named in line


def threads(process):
    names = Path(f"/proc/{process.pid}/task").glob("*/comm")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return {name.read_text().strip() for name in names}
    return set()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "sonar", "--epochs", "1000000"], "interrupted: nothing was published\n"),
        (["study", "sonar"], "interrupted: nothing is kept of a study that is not done\n"),
    ],
    ids=["train", "study"],
)
def test_ctrl_c_is_one_line_and_exit_code_130_and_leaves_nothing(arguments, line, tmp_path):
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    # TensorFlow's own appear when it has something to compute.
    while process.poll() is None and not any("tf_" in name for name in threads(process)):
        time.sleep(0.1)
    try:
        process.send_signal(signal.SIGINT)
        _, found = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, found) == (130, line)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("module", ["json", "typer", "pydantic", "training.errors"])
def test_ctrl_c_is_one_line_while_the_command_line_is_imported_too(module, tmp_path):
    said, writing = os.pipe()
    # Python names each module that it has imported, and with a pipe as short as this waits until that is read.
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4_096)
    command = [sys.executable, "-X", "importtime", *COMMAND[1:], "models"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=writing) as process:
        os.close(writing)
        with open(said, buffering=1, errors="replace") as lines:
            for line in lines:
                if line.split("|")[-1].strip() == module:
                    break
            process.send_signal(signal.SIGINT)
            found = lines.read()
    assert process.returncode == 130
    assert "Traceback" not in found
    assert found.endswith("interrupted\n")


def test_what_ctrl_c_came_too_late_for_is_said_to_be_published(tmp_path):
    (tmp_path / "sonar" / "1").mkdir(parents=True)
    said = publication(tmp_path, "sonar")
    assert said() == "nothing was published"
    (tmp_path / "sonar" / "2").mkdir()
    assert said() == "sonar 2 was published already"


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["models", "extra"]])
def test_bad_command_is_one_line_and_exit_code_2(arguments, tmp_path):
    result = dropserve(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")


def test_help_is_everywhere(tmp_path):
    overview = dropserve(cwd=tmp_path)
    assert overview.returncode == 0
    assert overview.stdout == dropserve("--help", cwd=tmp_path).stdout
    for command in ("train", "models"):
        assert command in overview.stdout
        result = dropserve(command, "--help", cwd=tmp_path)
        assert result.returncode == 0
        assert "--repository" in result.stdout
        assert "--json" in result.stdout


def test_version_is_the_projects(tmp_path):
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert dropserve("--version", cwd=tmp_path).stdout == f"dropserve {wanted}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["models", "--json"], ["train", "sonr"]])
def test_quick_commands_load_no_machine_learning_library(arguments, tmp_path):
    code = """
import sys
import dropserve
sys.argv = ["dropserve", *sys.argv[1:]]
try:
    dropserve.main()
except SystemExit:
    pass
print("LOADED", sorted({"tensorflow", "keras", "bentoml", "sklearn"} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.stdout.splitlines()[-1] == "LOADED []"
