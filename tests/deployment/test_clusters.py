"""The files of clusters/, as far as they can be tried without a cloud.

Ray's own code reads them: its schema, its autoscaler, what it would run on each node, and what
it would ask EC2 and Compute Engine for. Nothing here leaves this machine.
"""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private import _azure
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import (
    BundleSelector,
    GangResourceRequest,
    ResourceRequest,
    ResourceRequestByCount,
)
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.core.generated.instance_manager_pb2 import Instance

from tests.conftest import wait_for

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
FILES = sorted(path for path in CLUSTERS.rglob("*") if path.is_file())
CLOUDS = ("aws", "gcp", "azure")
KUBERAY = ("raycluster", "rayjob")
MARKET = "ray.io/market-type"
IN = LabelSelectorOperator.Value("LABEL_OPERATOR_IN")
NOT_IN = LabelSelectorOperator.Value("LABEL_OPERATOR_NOT_IN")

# An evaluator asks for a spot node, else for any; a training worker for one that is not.
EVALUATOR = ResourceRequestUtil.make(
    {"CPU": 4, "GPU": 1}, label_selectors=[[(MARKET, IN, ["spot"])], []]
)
WORKER = ResourceRequestUtil.make(
    {"CPU": 4, "GPU": 1}, label_selectors=[[(MARKET, NOT_IN, ["spot"])]]
)


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody in the repository's folder, with a token and nothing else."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("token")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)


def launcher_config(cloud: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / f"{cloud}.yaml").read_text())


def kuberay_documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTERS / f"kuberay/{name}.yaml").read_text()))


def ray_cluster_spec(name: str) -> dict[str, Any]:
    spec = kuberay_documents(name)[-1]["spec"]
    return spec["rayClusterSpec"] if name == "rayjob" else spec


def autoscaling_config(name: str) -> dict[str, Any]:
    """What Ray's autoscaler makes of a file, for the launcher or for KubeRay."""
    if name in CLOUDS:
        return prepare_config(launcher_config(name))
    resource = {"metadata": {"name": "nasray", "namespace": "default"}}
    return _derive_autoscaling_config_from_ray_cr(resource | {"spec": ray_cluster_spec(name)})


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_ray_accepts_every_file_of_its_launcher(path: Path):
    validate_config(prepare_config(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("name", CLOUDS + KUBERAY)
def test_a_cluster_has_a_head_for_drivers_trainers_that_stay_and_evaluators_on_spot(name: str):
    config = autoscaling_config(name)
    validate_config(config)
    assert config["idle_timeout_minutes"] == 5
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert set(types) == {"trainer", "evaluator"}
    limits = {key: (kind["min_workers"], kind["max_workers"]) for key, kind in types.items()}
    assert limits == {"trainer": (0, 4), "evaluator": (0, 8)}
    assert config["max_workers"] >= 12
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]
    assert head["max_workers"] == 0
    gpus = {key: kind["resources"]["GPU"] for key, kind in types.items()}
    assert gpus == {"trainer": 4, "evaluator": 1}
    markets = {key: kind["labels"][MARKET] for key, kind in types.items()}
    assert markets == {"trainer": "on-demand", "evaluator": "spot"}
    assert head["labels"][MARKET] == "on-demand"


@pytest.mark.parametrize("name", CLOUDS + KUBERAY)
def test_the_autoscaler_places_evaluators_on_spot_first_and_training_never(name: str):
    config = AutoscalingConfig(autoscaling_config(name), skip_content_hash=True)

    def started(number: int, request: ResourceRequest, *, together: bool = False) -> dict[str, int]:
        wanted = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
        )
        if together:  # as the bundles of a placement group
            bundles = BundleSelector(resource_requests=[request] * number)
            wanted.gang_resource_requests = [GangResourceRequest(bundle_selectors=[bundles])]
        else:
            wanted.resource_requests = [ResourceRequestByCount(request=request, count=number)]
        reply = ResourceDemandScheduler(None).schedule(wanted)
        assert not reply.infeasible_resource_requests
        assert not reply.infeasible_gang_resource_requests
        return {launch.instance_type: launch.count for launch in reply.to_launch}

    assert started(8, EVALUATOR) == {"evaluator": 8}
    assert started(12, EVALUATOR) == {"evaluator": 8, "trainer": 1}
    assert started(4, WORKER) == started(4, WORKER, together=True) == {"trainer": 1}
    assert started(16, WORKER, together=True) == {"trainer": 4}


class Nodes(NodeProvider):
    """Nodes that are only names."""

    def __init__(self) -> None:
        super().__init__({}, "nasray")
        self.tags: dict[str, str] = {}

    def is_terminated(self, node_id: str) -> bool:
        return False

    def internal_ip(self, node_id: str) -> str:
        return "10.0.0.2"

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self.tags

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self.tags |= tags


class Shell:
    """Stands for `subprocess` and keeps what is to be run."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def check_call(self, command: list[str], *_: Any, **__: Any) -> int:
        self.commands.append(" ".join(command))
        return 0

    call = check_call

    def check_output(self, command: list[str], *_: Any, **__: Any) -> bytes:
        self.check_call(command)
        return b""


@pytest.mark.parametrize("node_type", ["trainer", "evaluator"])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_new_node_gets_the_token_and_the_checkout_and_starts_with_its_labels(
    cloud: str, node_type: str
):
    config, shell = autoscaling_config(cloud), Shell()
    RayInstaller(Nodes(), AutoscalingConfig(config), process_runner=shell).install_ray(
        Instance(instance_id="1", cloud_instance_id="node", instance_type=node_type), "10.0.0.1"
    )
    copied = [command for command in shell.commands if command.startswith("rsync")]
    for target in (".ray/auth_token", "nasray/setup.py", "nasray/nasray/"):
        assert any(f"10.0.0.2:~/{target}" in command for command in copied)
    [start] = [command for command in shell.commands if "ray start" in command]
    labels = json.dumps(config["available_node_types"][node_type]["labels"], separators=(",", ":"))
    assert f"RAY_OVERRIDE_LABELS='{labels}'" in start.replace("'\"'\"'", "'")
    assert "export RAY_AUTH_MODE=token" in start.split("ray start")[0]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_start_asks_for_the_token_and_shows_the_dashboard_to_nobody_else(cloud: str):
    config = launcher_config(cloud)
    commands = [config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]]
    for command in commands:
        assert re.search(r"export RAY_AUTH_MODE=token\b.*; ray start ", command)
        assert "0.0.0.0" not in command
    assert "--dashboard-host=127.0.0.1 " in commands[0]
    assert "--autoscaling-config=" in commands[0]
    # What `ray up` sets for the autoscaler that knows labels is not undone.
    assert "RAY_enable_autoscaler_v2" not in str(config)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_only_what_pip_needs_of_the_checkout_is_mounted(cloud: str):
    mounts = launcher_config(cloud)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert sorted(mounts.values()) == ["README.md", "nasray", "pyproject.toml", "setup.py"]
    assert all(target == f"~/nasray/{source}" for target, source in mounts.items())
    assert all((ROOT / source).exists() for source in mounts.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_anything_like_a_secret(path: Path):
    text = path.read_text()
    assert "PRIVATE KEY" not in text and "kind: Secret" not in text
    assert not re.search(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{35}\b", text)
    for word in re.findall(r"[A-Za-z0-9+=]{24,}", text):  # no slash: those are paths
        random_hex = re.fullmatch(r"[0-9a-f]+", word) and len(set(word)) > 6
        mixed = all(re.search(kind, word) for kind in ("[A-Z]", "[a-z]", "[0-9]"))
        assert not random_hex and not mixed, word
    for value in re.findall(r"(?i)(?:password|secret|token|_key)[\w-]*\s*[:=]\s*(\S{12,})", text):
        assert value.startswith(("$", "~", '"$')), value


def test_all_files_want_the_same_ray():
    named = re.compile(r"(?:rayproject/ray:|rayVersion: |ray\[[\w,]+\]==)(\d+\.\d+\.\d+)")
    found = {path.name: named.findall(path.read_text()) for path in FILES}
    versions = Counter(version for each in found.values() for version in each)
    assert len(versions) == 1, found
    assert {name for name, each in found.items() if each} >= {
        *(f"{name}.yaml" for name in CLOUDS + KUBERAY),
        "Dockerfile",
    }


def test_the_table_of_clusters_has_every_file():
    table = (CLUSTERS / "README.md").read_text()
    for path in FILES:
        assert f"`{path.relative_to(CLUSTERS)}`" in table or path.name == "README.md", path


def test_the_image_is_made_of_what_is_there():
    lines = (CLUSTERS / "Dockerfile").read_text().splitlines()
    copied = [line.split()[2:-1] for line in lines if line.startswith("COPY")]
    assert sum(copied, []) == ["setup.py", "pyproject.toml", "README.md", "nasray"]


# EC2, Compute Engine, Azure: what Ray would ask them for.


def test_ec2_takes_what_ray_makes_of_every_node_type(monkeypatch: pytest.MonkeyPatch):
    moto = pytest.importorskip("moto")
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    config = prepare_config(launcher_config("aws"))
    kinds = config["available_node_types"]
    with moto.mock_aws():
        from ray.autoscaler._private.aws import node_provider as aws

        ec2, iam = boto3.client("ec2", config["provider"]["region"]), boto3.client("iam")
        for profile in ("nasray-head", "nasray-node"):
            iam.create_instance_profile(InstanceProfileName=profile)
        types = [kind["node_config"]["InstanceType"] for kind in kinds.values()]
        described = ec2.describe_instance_types(InstanceTypes=types)["InstanceTypes"]
        monkeypatch.setattr(aws, "list_ec2_instances", lambda *_: described)  # not all 800
        provider_class = aws.AWSNodeProvider
        filled = provider_class.fillout_available_node_types_resources(config)
        for name, kind in filled["available_node_types"].items():
            real = next(
                each for each in described if each["InstanceType"] == types[list(kinds).index(name)]
            )
            cpus = 0 if name == "head" else real["VCpuInfo"]["DefaultVCpus"]
            gpus = sum(gpu["Count"] for gpu in real.get("GpuInfo", {"Gpus": []})["Gpus"])
            assert (kind["resources"]["CPU"], kind["resources"].get("GPU", 0)) == (cpus, gpus)
            if gpus:  # the name by which jobs may ask for it
                accelerator = kind["labels"]["ray.io/accelerator-type"]
                assert kind["resources"][f"accelerator_type:{accelerator}"] == 1
        booted = provider_class.bootstrap_config(filled)
        provider = provider_class(booted["provider"], "nasray")
        for name, kind in booted["available_node_types"].items():
            tags = {"ray-node-kind": "worker", "ray-user-node-type": name}
            provider.create_node(kind["node_config"], tags, 1)
        found = [
            node for each in ec2.describe_instances()["Reservations"] for node in each["Instances"]
        ]
        [group] = ec2.describe_security_groups(GroupNames=["ray-autoscaler-nasray"])[
            "SecurityGroups"
        ]
    nodes = {
        tag["Value"]: node
        for node in found
        for tag in node["Tags"]
        if tag["Key"] == "ray-user-node-type"
    }
    assert set(nodes) == {"head", "trainer", "evaluator"}
    spot = {name for name, node in nodes.items() if node.get("InstanceLifecycle") == "spot"}
    assert spot == {"evaluator"}
    for name, node in nodes.items():
        profile = "nasray-head" if name == "head" else "nasray-node"
        assert node["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")
        assert node["SecurityGroups"][0]["GroupId"] == group["GroupId"]
    from_outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in from_outside] == [(22, 22)]


def test_compute_engine_knows_what_ray_makes_of_every_node_type(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("googleapiclient")
    import google.auth
    import httplib2
    from google.auth.credentials import AnonymousCredentials
    from googleapiclient.discovery_cache import get_static_doc
    from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

    inserted: dict[str, Any] = {}
    done = {"name": "operation", "status": "DONE"}
    answers: dict[str, Any] = {
        ":getIamPolicy": {"bindings": []},
        ":setIamPolicy": {},
        "iam.gserviceaccount.com": {"email": "head@gserviceaccount.com", "projectId": "project"},
        "/subnetworks": {"items": [{"selfLink": "subnet"}]},
        "/operations/": done,
        "setCommonInstanceMetadata": done,
        "/instances?": done,
        "cloudresourcemanager.googleapis.com": {"projectId": "project", "lifecycleState": "ACTIVE"},
        "/projects/project?": {"name": "project", "commonInstanceMetadata": {}},
    }

    def answer(_: Any, uri: str, method: str = "GET", body: Any = None, **__: Any) -> Any:
        if method == "POST" and "/instances?" in uri:
            inserted[json.loads(body)["labels"]["ray-user-node-type"]] = json.loads(body)
        found = next(content for part, content in answers.items() if part in uri)
        return httplib2.Response({"status": 200}), json.dumps(found).encode()

    monkeypatch.setattr(httplib2.Http, "request", answer)
    monkeypatch.setattr(google.auth, "default", lambda *_, **__: (AnonymousCredentials(), None))
    filled = (CLUSTERS / "gcp.yaml").read_text().replace("PROJECT", "project")
    config = GCPNodeProvider.bootstrap_config(prepare_config(yaml.safe_load(filled)))
    provider = GCPNodeProvider(config["provider"], "nasray")
    for name, kind in config["available_node_types"].items():
        tags = {"ray-node-name": f"ray-nasray-{name}", "ray-user-node-type": name}
        provider.create_node(config["head_node"] | kind["node_config"], tags, 1)
    schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]
    for body in inserted.values():
        assert not unknown_to_google(body, {"$ref": "Instance"}, schemas)
    assert set(inserted) == {"head", "trainer", "evaluator"}
    models = {
        name: body.get("scheduling", {}).get("provisioningModel") for name, body in inserted.items()
    }
    assert models == {"head": None, "trainer": None, "evaluator": "SPOT"}
    for name in ("trainer", "evaluator"):
        assert inserted[name]["serviceAccounts"][0]["email"].startswith("nasray-node@")


def unknown_to_google(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """What in `value` a schema of Google's discovery documents does not have."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    is_count = schema.get("format") == "int64" and isinstance(value, int)
    if not isinstance(value, kinds[schema["type"]]) and not is_count:
        return [f"{value!r} is no {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{value!r} is none of {schema['enum']}"]
    if isinstance(value, list):
        return [
            each for item in value for each in unknown_to_google(item, schema["items"], schemas)
        ]
    if not isinstance(value, dict):
        return []
    known = schema.get("properties", {})
    rest = schema.get("additionalProperties")
    return [
        each
        for key, item in value.items()
        for each in (
            unknown_to_google(item, known.get(key, rest), schemas)
            if key in known or rest
            else [f"unknown key {key}"]
        )
    ]


def test_the_template_of_ray_for_azure_takes_the_parameters_of_every_node_type():
    template = Path(_azure.__file__).with_name("azure-vm-template.json")
    parameters = json.loads(template.read_text())["parameters"]
    kinds = {"string": str, "int": int, "object": dict, "bool": bool}
    types = launcher_config("azure")["available_node_types"]
    for node_type in types.values():
        for key, value in node_type["node_config"]["azure_arm_parameters"].items():
            assert isinstance(value, kinds[parameters[key]["type"]]), key
    spot = {
        name
        for name, node_type in types.items()
        if node_type["node_config"]["azure_arm_parameters"].get("priority") == "Spot"
    }
    assert spot == {"evaluator"}


# KubeRay: the part of its resources that is used here, and no more.


def exactly(*optional: str, **known: Any) -> dict[str, Any]:
    """An object with the keys of `known`, each of which must be there unless it is `optional`."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": known,
        "required": [key for key in known if key not in optional],
    }


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


TEXT, COUNT, YES = {"type": "string"}, {"type": "integer", "minimum": 0}, {"const": True}
TEXTS = {"type": "object", "additionalProperties": TEXT}
MATCH = exactly(key=TEXT, operator=one_of("In", "NotIn"), values=many(TEXT))
AFFINITY = exactly(
    nodeAffinity=exactly(
        requiredDuringSchedulingIgnoredDuringExecution=exactly(
            nodeSelectorTerms=many(exactly(matchExpressions=many(MATCH)))
        )
    )
)
TOLERATION = exactly(
    "value",
    key=TEXT,
    operator=one_of("Exists", "Equal"),
    value=TEXT,
    effect=one_of("NoSchedule"),
)
CONTAINER = exactly(
    "env",
    name=TEXT,
    image={"type": "string", "pattern": "^REGISTRY/nasray:(cpu|gpu)$"},
    env=many(exactly(name=TEXT, value=TEXT)),
    resources=exactly(requests=TEXTS, limits=TEXTS),
    volumeMounts=many(exactly("readOnly", name=TEXT, mountPath=TEXT, readOnly=YES)),
)
VOLUME = exactly(
    "emptyDir",
    "configMap",
    name=TEXT,
    emptyDir=exactly("medium", medium=one_of("Memory"), sizeLimit=TEXT),
    configMap=exactly(name=TEXT),
)
POD = exactly(
    "tolerations",
    serviceAccountName=TEXT,
    affinity=AFFINITY,
    tolerations=many(TOLERATION),
    containers=many(CONTAINER) | {"maxItems": 1},
    volumes=many(VOLUME),
)
GROUP = {"labels": TEXTS, "rayStartParams": TEXTS, "template": exactly(spec=POD)}
CLUSTER_SPEC = exactly(
    rayVersion=TEXT,
    authOptions=exactly(mode=one_of("token")),
    enableInTreeAutoscaling=YES,
    autoscalerOptions=exactly(
        version=one_of("v2"), idleTimeoutSeconds=COUNT, upscalingMode=one_of("Default")
    ),
    headGroupSpec=exactly(**GROUP),
    workerGroupSpecs=many(
        exactly(groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, **GROUP)
    ),
)
JOB_SPEC = exactly(
    entrypoint=TEXT,
    backoffLimit=COUNT | {"minimum": 1},
    shutdownAfterJobFinishes=YES,
    ttlSecondsAfterFinished=COUNT,
    submissionMode=one_of("K8sJobMode"),
    rayClusterSpec=CLUSTER_SPEC,
)
RESOURCE = {
    "apiVersion": one_of("ray.io/v1"),
    "metadata": exactly(name={"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"}),
}
KUBERAY_SCHEMAS = {
    "raycluster": exactly(kind=one_of("RayCluster"), spec=CLUSTER_SPEC, **RESOURCE),
    "rayjob": exactly(kind=one_of("RayJob"), spec=JOB_SPEC, **RESOURCE),
}


@pytest.mark.parametrize("name", KUBERAY)
def test_a_kuberay_file_has_the_fields_that_kuberay_knows(name: str):
    account, resource = kuberay_documents(name)
    jsonschema.validate(resource, KUBERAY_SCHEMAS[name])
    assert (account["kind"], account["metadata"]["name"]) == ("ServiceAccount", "nasray")


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_have_shared_memory_and_limits_and_their_kind_of_node(name: str):
    spec = ray_cluster_spec(name)
    pods = {"head": spec["headGroupSpec"]["template"]["spec"]}
    pods |= {each["groupName"]: each["template"]["spec"] for each in spec["workerGroupSpecs"]}
    for kind, pod in pods.items():
        [container], volumes = pod["containers"], {each["name"]: each for each in pod["volumes"]}
        mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert set(mounts.values()) == set(volumes)
        resources = container["resources"]
        assert resources["limits"] == resources["requests"]
        assert resources["limits"].keys() >= {"cpu", "memory"}
        assert pod["serviceAccountName"] == "nasray"
        # Each cloud's label of spot nodes is asked for or shunned; their taints are tolerated.
        [affinity] = pod["affinity"]["nodeAffinity"].values()
        terms = [each["matchExpressions"] for each in affinity["nodeSelectorTerms"]]
        labels = {each["key"]: each["operator"] for term in terms for each in term}
        assert len(labels) == 4
        assert set(labels.values()) == {"In" if kind == "evaluator" else "NotIn"}
        assert len(terms) == (4 if kind == "evaluator" else 1)  # one will do, or all must hold
        tolerated = {each["key"] for each in pod.get("tolerations", ())}
        assert ("cloud.google.com/gke-spot" in tolerated) == (kind == "evaluator")


def test_the_cluster_of_the_job_is_the_cluster():
    cluster, of_job = ray_cluster_spec("raycluster"), ray_cluster_spec("rayjob")
    assert of_job["workerGroupSpecs"] == cluster["workerGroupSpecs"]
    # The submitter is another pod, so it must reach the dashboard; the job file is a volume.
    assert cluster["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "127.0.0.1"
    pod = of_job["headGroupSpec"]["template"]["spec"]
    assert pod["volumes"].pop() == {"name": "job", "configMap": {"name": "nasray-job"}}
    assert pod["containers"][0]["volumeMounts"].pop()["mountPath"] == "/job"
    assert of_job == cluster
    assert kuberay_documents("rayjob")[-1]["spec"]["entrypoint"].startswith(
        "nasray run /job/job.toml "
    )


# Slurm: the script, with the programs it calls replaced by ones that write down that they were.

SLURM = CLUSTERS / "slurm/nasray.sbatch"
PROGRAMS = {
    "srun": 'echo "srun $*" >>"$LOG"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*" >>"$LOG"; [[ $1 != show ]] || printf "one\\ntwo\\n"',
    "getent": "echo 10.0.0.1 STREAM one; echo 10.0.0.1 DGRAM",
    "python": 'echo "python $*" >>"$LOG"; cat >/dev/null',
    "ray": """echo "ray $* by $RAY_AUTH_MODE" >>"$LOG"
        [[ "$*" == *--block* ]] || exit 0
        trap 'echo "ray ended" >>"$LOG"; exit' TERM
        stat -c "token %a %s" "$RAY_AUTH_TOKEN_PATH" >>"$LOG"
        while :; do sleep 0.05; done""",
    "nasray": """echo "nasray $* at $RAY_ADDRESS" >>"$LOG"
        if [[ $2 == quick.toml ]]; then
            until [[ $(grep -c ^token "$LOG") == 2 ]]; do sleep 0.05; done; exit 3
        fi
        trap 'echo "nasray ended" >>"$LOG"; exit 130' TERM
        while :; do sleep 0.05; done""",
}
Start = Callable[[str], subprocess.Popen]


@pytest.fixture
def start_slurm(tmp_path: Path) -> Start:
    for name, lines in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{lines}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    variables = os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "nodes",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_GPUS_ON_NODE": "4",
    }

    def start(job: str) -> subprocess.Popen:
        return subprocess.Popen(["bash", SLURM, job, "/shared/run"], env=variables)

    return start


@pytest.mark.skipif(sys.platform != "linux", reason="Slurm's nodes have GNU tools")
@pytest.mark.parametrize(("sent", "code"), [(None, 3), (signal.SIGUSR1, 0), (signal.SIGTERM, 143)])
def test_slurm_runs_one_job_ends_everything_and_goes_back_into_the_queue(
    sent: signal.Signals | None, code: int, start_slurm: Start, tmp_path: Path
):
    subprocess.run(["bash", "-n", SLURM], check=True)
    log = tmp_path / "log"
    log.touch()
    process = start_slurm("long.toml" if sent else "quick.toml")
    if sent:
        wait_for(lambda: "nasray run" in log.read_text(), "the run has begun", timeout_s=60)
        process.send_signal(sent)
    assert process.wait(timeout=60) == code
    lines = log.read_text().splitlines()
    assert not list(tmp_path.glob(".nasray-*"))  # the token
    assert lines.count("token 600 64") == lines.count("ray ended") == 2
    assert any(" --head " in line and "--dashboard-host=127.0.0.1" in line for line in lines)
    assert any("--address=10.0.0.1:6379 by token" in line for line in lines)
    job = "long" if sent else "quick"
    assert f"nasray run {job}.toml /shared/run --address auto at 10.0.0.1:6379" in lines
    assert ("nasray ended" in lines) == bool(sent)
    assert ("scontrol requeue 7" in lines) == (sent == signal.SIGUSR1)
