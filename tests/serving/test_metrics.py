"""What is counted, where it cannot be written for the other workers."""

import shutil

from serving.metrics import Metrics


def test_a_folder_that_is_gone_stops_neither_counting_nor_showing(tmp_path):
    folder = tmp_path / "workers"
    metrics = Metrics(2000, folder)
    metrics.request("native", "predict", None, "200", 0.01)
    shown = {family.name: family for family in metrics.collect()}
    assert [sample.value for sample in shown["dropserve_requests"].samples] == [1]
    folder.mkdir()
    metrics.write()
    assert len(list(folder.iterdir())) == 1
    shutil.rmtree(folder)
    metrics.request("native", "predict", None, "200", 0.01)
    metrics.write()
