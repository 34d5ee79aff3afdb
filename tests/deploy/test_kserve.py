"""The KServe InferenceService: its form, and that what it points at is what TensorFlow Serving would load."""

from __future__ import annotations

import copy
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from tests.deploy.kserve import InferenceService
from tests.deploy.test_deploy import DEPLOY, KUBERNETES, manifest

[SERVICE] = yaml.safe_load_all((DEPLOY / "kubernetes" / "kserve.yaml").read_text())


def changed(path: str, value: Any) -> dict[str, Any]:
    """The service with another value at a dotted path; `None` takes the field away."""
    service = copy.deepcopy(SERVICE)
    *parents, last = path.split(".")
    place = service
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return service


def test_the_service_has_kserve_s_form_and_its_container_kubernetes_own():
    service = InferenceService.model_validate(SERVICE)
    kubernetes_validate.validate(service.pod(), KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("apiVersion", "serving.kserve.io/v1alpha1"),
        ("kind", "InferenceGraph"),
        ("metadata.name", "Sonar"),
        ("metadata.name", "1sonar"),
        ("spec.transformers", {}),
        ("spec.predictor.minReplica", 2),
        ("spec.predictor.minReplicas", "2"),
        ("spec.predictor.maxReplicas", 1),
        ("spec.predictor.scaleMetric", "queue"),
        ("spec.predictor.model.modelFormat", "tensorflow"),
        ("spec.predictor.model.modelFormat", None),
        ("spec.predictor.model.modelFormat.version", 2),
        ("spec.predictor.model.storageUri", "/artifacts/sonar"),
        ("spec.predictor.model.storageUri", None),
        ("spec.predictor.model.protocolVersion", "v3"),
        ("spec.predictor.model.resource", {}),
    ],
)
def test_a_service_with_a_mistake_has_not(path, value):
    with pytest.raises(ValidationError):
        InferenceService.model_validate(changed(path, value))


def test_a_container_with_a_mistake_has_not():
    service = InferenceService.model_validate(changed("spec.predictor.model.resources.limit", {"cpu": "1"}))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service.pod(), KUBERNETES, strict=True)


def test_the_storage_is_what_tensorflow_serving_loads(trained_repository):
    """What `storageUri` names becomes `--model_base_path`: a folder for each version, named by its number, with a
    SavedModel in it.
    """
    service = InferenceService.model_validate(SERVICE)
    uri = service.spec.predictor.model.storage_uri
    assert uri is not None
    *_, repository, name = uri.split("/")
    assert repository == "artifacts"
    assert name == service.metadata.name
    [version] = [path for path in (trained_repository / name).iterdir() if path.is_dir()]
    assert version.name == "1"
    assert (version / "saved_model.pb").is_file()
    assert (version / "variables" / "variables.index").is_file()
    assert (version / "assets.extra" / "tf_serving_warmup_requests").is_file()


def test_replicas_are_as_many_as_without_kserve():
    predictor = InferenceService.model_validate(SERVICE).spec.predictor
    scaled = manifest("HorizontalPodAutoscaler")["spec"]
    assert (predictor.min_replicas, predictor.max_replicas) == (scaled["minReplicas"], scaled["maxReplicas"])
