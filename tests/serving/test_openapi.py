"""The OpenAPI document is about the loaded model, and its examples work."""

import pytest


def test_every_operation_s_example_is_answered(client):
    document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    posted = 0
    for path, item in document["paths"].items():
        if "post" in item:
            example = item["post"]["requestBody"]["content"]["application/json"]["example"]
            answer = client.post(path, json=example)
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["predictions"]) == len(example["instances"])
            posted += 1
        else:
            assert client.get(path).status_code == 200
    assert posted == 2


def test_the_document_names_the_loaded_model_s_features(client, trained):
    schema = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    forms = [rows["items"] for rows in schema["application/json"]["schema"]["properties"]["instances"]["anyOf"]]
    by_name = next(form for form in forms if form["type"] == "object")
    assert list(by_name["properties"]) == [feature.name for feature in trained.manifest.inputs[0].features]


@pytest.mark.parametrize("path", ["/docs", "/"])
def test_the_page_loads_nothing_from_elsewhere(client, path):
    page = client.get(path, follow_redirects=True)
    assert page.headers["content-type"].startswith("text/html")
    assert "band_" in page.text or "0.0" in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text
