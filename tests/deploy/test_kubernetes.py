"""The Kubernetes manifests: valid by its own schemas, and true of the image and the server that they run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "kubernetes.yaml"
PEERS = ROOT / "build" / "peers" / "kubernetes"
VERSION = "1.34"


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all(FILE.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def pod(objects: dict[str, Any]) -> Any:
    return objects["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: Any) -> Any:
    (container,) = pod["containers"]
    return container


@pytest.fixture(scope="module")
def options(container: Any) -> dict[str, Any]:
    """What the server makes of the arguments, with what the image puts before them."""
    from slm.cli.commands.serve import serve

    return serve.make_context("serve", ["--host", "0.0.0.0", *container["args"]], resilient_parsing=True).params


@pytest.mark.peer
def test_they_are_valid(objects: dict[str, Any]) -> None:
    if not PEERS.is_dir():
        pytest.skip("no kubernetes under build/peers; `make peers` installs it")
    program = (
        "import json, sys, kubernetes_validate as k\n"
        "for each in json.load(sys.stdin):\n"
        "    try:\n"
        "        k.validate(each, sys.argv[1], strict=True); print('valid')\n"
        "    except k.ValidationError as error:\n"
        "        print(error.message)\n"
    )
    wrong = json.loads(json.dumps(objects["Deployment"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessprobe"] = {}
    worse = json.loads(json.dumps(objects["Service"]))
    worse["spec"]["ports"][0]["port"] = "eighty"
    done = subprocess.run(
        [sys.executable, "-c", program, VERSION],
        input=json.dumps([*objects.values(), wrong, worse]),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PEERS)},
    )
    assert done.returncode == 0, done.stderr
    *said, of_wrong, of_worse = done.stdout.splitlines()
    assert said == ["valid"] * 4
    assert "readinessprobe" in of_wrong and "eighty" in of_worse


def test_they_belong_together(objects: dict[str, Any], container: Any) -> None:
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert set(objects) == {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
    for selector in (
        objects["Service"]["spec"]["selector"],
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    scaled = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert objects["PodDisruptionBudget"]["spec"]["minAvailable"] < scaled["minReplicas"]
    (port,) = container["ports"]
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]


def test_probes_ask_for_what_there_is(pod: Any, container: Any, options: dict[str, Any]) -> None:
    from slm.serve.app import make_app

    source = Path(make_app.__code__.co_filename).read_text(encoding="utf-8")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f'"{container[probe]["httpGet"]["path"]}"' in source
    assert container["ports"][0]["containerPort"] == options["port"]


def test_answers_under_way_have_their_time(pod: Any, container: Any, options: dict[str, Any]) -> None:
    before = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= before + options["grace"] + 5


def test_it_may_do_nothing_but_answer(pod: Any, container: Any) -> None:
    image = (ROOT / "deploy" / "Containerfile").read_text(encoding="utf-8")
    user = re.search(r"^USER (\d+):(\d+)$", image, flags=re.MULTILINE)
    assert user and (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == tuple(
        map(int, user.groups())
    )
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    limits = container["securityContext"]
    assert limits == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    (key,) = container["env"]
    from slm.cli.commands.serve import _KEYS

    assert key["name"] == _KEYS and "secretKeyRef" in key["valueFrom"]
    mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounted["/models"]["readOnly"] and container["args"][0] == "/models"
