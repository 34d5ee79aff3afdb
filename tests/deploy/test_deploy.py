"""Files for other platforms, held against those platforms' own schemas and tools, and a real server's metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time

import httpx
import kubernetes_validate
import pytest
import yaml

from serving.settings import Settings
from tests.process import ROOT, free_port

DEPLOY = ROOT / "deploy"
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "dropserve.yaml").read_text()))
DASHBOARD = json.loads((DEPLOY / "grafana" / "dropserve.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
EXPRESSIONS = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
# The oldest release of Kubernetes that is cared for.
KUBERNETES = "1.31"


def manifest(kind: str) -> dict:
    [found] = [document for document in MANIFESTS if document["kind"] == kind]
    return found


def container() -> dict:
    [found] = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    return found


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not there; on Debian: apt-get install prometheus")
    return found


@pytest.mark.parametrize("document", MANIFESTS, ids=lambda document: document["kind"])
def test_manifests_fit_kubernetes_own_schemas(document):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_a_manifest_with_a_mistake_would_not():
    wrong = json.loads(json.dumps(manifest("Deployment")))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_probes_ask_what_the_server_answers(sonar_server):
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container()[probe]["httpGet"]
        assert ports[get["port"]] == 3000
        assert httpx.get(sonar_server.url + get["path"], timeout=10).status_code == 200
    exposed = {Settings.model_fields[name].default for name in ("rest_port", "grpc_port")}
    assert exposed <= set(ports.values())


def test_the_pod_is_given_the_time_that_the_server_takes_to_stop():
    settings = Settings.model_validate(
        {
            item["name"].removeprefix("DROPSERVE_").lower(): item["value"]
            for item in container()["env"]
            if item["name"].startswith("DROPSERVE_")
        }
    )
    # Long enough for two of the readiness probe's periods.
    assert settings.drain_s >= 2 * container()["readinessProbe"]["periodSeconds"]
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > settings.drain_s + settings.grace_s


def test_everything_selects_the_same_pods():
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("Service")["spec"]["selector"] == labels
    assert manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    scaled = manifest("HorizontalPodAutoscaler")["spec"]
    assert scaled["scaleTargetRef"]["name"] == manifest("Deployment")["metadata"]["name"]
    names = [metric["pods"]["metric"]["name"] for metric in scaled["metrics"] if metric["type"] == "Pods"]
    rules = yaml.safe_load((DEPLOY / "kubernetes" / "adapter-rule.yaml").read_text())["rules"]
    assert names == [rule["name"]["as"] for rule in rules]
    recorded = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
    assert {rule["seriesQuery"].partition("{")[0] for rule in rules} <= recorded


def test_compose_mounts_files_that_are_there():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert services.keys() == {"dropserve", "prometheus", "grafana"}
    mounted = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    assert mounted
    for path in mounted:
        assert (DEPLOY / path).exists(), path
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert [config["static_configs"][0]["targets"] for config in scraped] == [["dropserve:3000"]]


def test_every_metric_that_is_named_is_one_that_the_server_has(sonar_server):
    known = re.findall(r"^# TYPE (\w+) (\w+)$", httpx.get(f"{sonar_server.url}/metrics", timeout=10).text, re.MULTILINE)
    series = {name for name, _ in known}
    series |= {f"{name}_{end}" for name, kind in known if kind == "histogram" for end in ("bucket", "sum", "count")}
    named = {name for text in [*QUERIES, *EXPRESSIONS] for name in re.findall(r"\bdropserve_\w+", text)}
    assert len(named) > 10
    assert named <= series, named - series


def test_promtool_takes_the_rules():
    for check, file in (("rules", "rules.yml"), ("config", "prometheus.yml")):
        done = subprocess.run(
            [tool("promtool"), "check", check, DEPLOY / "prometheus" / file],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("code", "fires"), [("503", True), ("INTERNAL", True), ("INVALID_ARGUMENT", False)])
def test_failures_over_every_protocol_raise_an_alert(tmp_path, code, fires):
    """Two of a hundred requests; HTTP's codes are numbers, gRPC's are names."""
    series = 'dropserve_requests_total{model="sonar",code="%s"}'
    fired = {
        "exp_labels": {"severity": "page", "model": "sonar"},
        "exp_annotations": {
            "summary": "sonar: more than 1 % of the requests fail (5xx, or INTERNAL and the like over gRPC)"
        },
    }
    case = {
        "interval": "1m",
        "input_series": [{"series": series % name, "values": f"0+{rate}x30"} for name, rate in (("OK", 98), (code, 2))],
        "alert_rule_test": [
            {"eval_time": "20m", "alertname": "DropserveErrors", "exp_alerts": [fired] if fires else []}
        ],
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "prometheus" / "rules.yml")], "tests": [case]}))
    done = subprocess.run([tool("promtool"), "test", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_real_prometheus_answers_every_query_of_the_dashboard(sonar_server, tmp_path):
    port = free_port()
    host = sonar_server.url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(DEPLOY / "prometheus" / "rules.yml")],
        "scrape_configs": [{"job_name": "dropserve", "static_configs": [{"targets": [host]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [tool("prometheus"), f"--config.file={tmp_path / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    row = [0.5] * 60
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as prometheus,
    ):
        try:
            deadline = time.monotonic() + 60
            while not _answer(prometheus, "rate(dropserve_queue_seconds_count[1m]) > 0"):
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
                httpx.post(f"{sonar_server.url}/uncertainty", json={"instances": [row]}, timeout=30)
                # A refusal as well: there is a panel of them.
                httpx.post(f"{sonar_server.url}/predict", json={"instances": []}, timeout=30)
                time.sleep(0.5)
            silent = [query for query in QUERIES if not _answer(prometheus, query)]
        finally:
            process.terminate()
    # So few rows say nothing of drift, and not every model knows what is new to it.
    assert {query for query in silent if "novelty" not in query} <= {"dropserve_drift_score"}


def _answer(prometheus: httpx.Client, query: str) -> list:
    try:
        answer = prometheus.get("/api/v1/query", params={"query": query})
    except httpx.HTTPError:
        return []
    if answer.status_code == 503:
        return []
    assert answer.status_code == 200, f"{query}: {answer.text}"
    return answer.json()["data"]["result"]
