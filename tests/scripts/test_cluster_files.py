"""The examples for Kubernetes and SkyPilot start what run_train.sh takes; SkyPilot itself reads its own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCS = Path("docs")
VARIABLES = set(re.findall(r"^#   ([A-Z_]+) ", Path("run_train.sh").read_text(), re.M))


def read(name: str) -> Any:
    return yaml.safe_load((DOCS / name).read_text())


def test_kubernetes_starts_the_script_on_each_machine() -> None:
    job = read("kubernetes.yaml")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sum(spec["replicas"] for spec in replicas.values()) == 2
    for spec in replicas.values():
        (container,) = spec["template"]["spec"]["containers"]
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert container["name"] == "pytorch", "the operator looks for this name"
        assert container["command"][0] == "./run_train.sh"
        assert set(variables) <= VARIABLES
        assert variables["NNODES"] == "2"
        assert variables["NGPU"] == container["resources"]["limits"]["nvidia.com/gpu"]
        host, port = variables["RDZV_ENDPOINT"].split(":")
        assert host == f"{job['metadata']['name']}-master-0"
        assert container["ports"][0]["containerPort"] == int(port)
        assert Path(variables["CONFIG_FILE"]).is_file()


def test_skypilot_starts_the_script_on_each_machine() -> None:
    task = read("skypilot.yaml")
    assert Path(task["envs"]["CONFIG_FILE"]).is_file()
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    assert set(re.findall(r"export ([A-Z_]+)=", task["run"])) <= VARIABLES
    assert "./run_train.sh" in task["run"]


def test_skypilot_itself_reads_the_example() -> None:
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(DOCS / "skypilot.yaml"))
    assert task.num_nodes == 2


def test_the_pods_of_the_kubernetes_example_are_pods() -> None:
    """By Kubernetes' own schema; that of a PyTorchJob is with its operator."""
    validate = pytest.importorskip("kubernetes_validate")
    for spec in read("kubernetes.yaml")["spec"]["pytorchReplicaSpecs"].values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "rank"}, "spec": spec["template"]["spec"]}
        validate.validate(pod, "1.30", strict=True)
