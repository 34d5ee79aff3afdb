"""KServe's InferenceService, `serving.kserve.io/v1beta1`, as far as a model on a stock runtime needs it; strictly.

Written from the structure that KServe publishes: the CustomResourceDefinition serving.kserve.io_inferenceservices.yaml,
and the classes V1beta1InferenceService, V1beta1PredictorSpec, V1beta1ModelSpec and V1beta1ModelFormat of its Python
package 0.21. An unknown field is refused: a cluster would drop it, or refuse it under strict validation. What the CRD
takes from Kubernetes (a container's fields) is not repeated here: `pod` gives it, for Kubernetes' own schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

# RFC 1035: the name becomes a part of host names.
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=0, lt=2**31)]
# The schemes that its storage initializer knows.
StorageUri = Annotated[str, Field(pattern=r"^(gs|s3|hdfs|webhdfs|https?|pvc|oci|hf|abfs)://[^/]+(/.*)?$")]

# Of `Container`, which the model's spec has in full.
CONTAINER_FIELDS = (
    *("args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "livenessProbe", "name", "ports"),
    *("readinessProbe", "resizePolicy", "resources", "securityContext", "startupProbe", "volumeMounts", "workingDir"),
)
# Of `PodSpec`, which the predictor has in full; and of its own component extension.
POD_FIELDS = (
    *("affinity", "automountServiceAccountToken", "imagePullSecrets", "nodeSelector", "priorityClassName"),
    *("securityContext", "serviceAccountName", "terminationGracePeriodSeconds", "tolerations"),
    *("topologySpreadConstraints", "volumes"),
)


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel, protected_namespaces=())


class ModelFormat(_Form):
    name: str
    version: str | None = None


class StorageSpec(_Form):
    path: str | None = None
    key: str | None = None
    schema_path: str | None = None
    parameters: dict[str, str] | None = None


class ModelSpec(_Form):
    # Kubernetes' own, checked by Kubernetes' own schema.
    model_config = ConfigDict(extra="allow")

    model_format: ModelFormat
    runtime: str | None = None
    runtime_version: str | None = None
    protocol_version: Literal["v1", "v2", "grpc-v1", "grpc-v2"] | None = None
    storage_uri: StorageUri | None = None
    storage: StorageSpec | None = None

    @model_validator(mode="after")
    def _has_one_place(self) -> Self:
        if (self.storage_uri is None) == (self.storage is None):
            raise ValueError("wanted one of storageUri and storage")
        if unknown := (self.model_extra or {}).keys() - set(CONTAINER_FIELDS):
            raise ValueError(f"unknown fields {sorted(unknown)}")
        return self


class Predictor(_Form):
    model_config = ConfigDict(extra="allow")

    model: ModelSpec
    min_replicas: Count | None = None
    max_replicas: Count | None = None
    scale_target: Count | None = None
    scale_metric: Literal["cpu", "memory", "concurrency", "rps"] | None = None
    container_concurrency: Count | None = None
    timeout: Count | None = None
    canary_traffic_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None

    @model_validator(mode="after")
    def _scales(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < (self.min_replicas or 0):
            raise ValueError("maxReplicas is below minReplicas")
        if unknown := (self.model_extra or {}).keys() - set(POD_FIELDS):
            raise ValueError(f"unknown fields {sorted(unknown)}")
        return self


class Spec(_Form):
    predictor: Predictor


class Metadata(_Form):
    name: Name
    namespace: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class InferenceService(_Form):
    api_version: Literal["serving.kserve.io/v1beta1"]
    kind: Literal["InferenceService"]
    metadata: Metadata
    spec: Spec

    def pod(self) -> dict[str, Any]:
        """A Pod with what the service says of its own, to be held against Kubernetes' schema."""
        model = self.spec.predictor.model.model_extra or {}
        container = {"name": "kserve-container", "image": "tensorflow/serving", **model}
        spec = {**(self.spec.predictor.model_extra or {}), "containers": [container]}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": self.metadata.name}, "spec": spec}
