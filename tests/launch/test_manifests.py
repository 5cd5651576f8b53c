"""What launch/ hands to other machines: manifests against their schemas, scripts against stand-ins."""

import copy
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "launch" / "kubernetes"
JOBSETS = ["gpu", "tpu"]
VERSION = "1.33"


def read(name):
    return yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text(encoding="utf-8"))


def valid(document):
    """Proves a core object by the schemas that Kubernetes publishes; unknown fields are errors."""
    import kubernetes_validate

    kubernetes_validate.validate(document, VERSION, strict=True)


def jobs(jobset):
    """The jobs that a JobSet makes, as objects of their own."""
    for job in jobset["spec"]["replicatedJobs"]:
        yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}


def test_storage_is_a_claim_that_every_pod_can_mount():
    claim = read("storage")
    valid(claim)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("name", JOBSETS)
def test_the_jobs_of_a_jobset_are_valid(name):
    import kubernetes_validate

    for job in jobs(read(name)):
        valid(job)
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, **job["spec"]["template"]}
        valid(pod)
        pod["spec"] = {**pod["spec"], "restartpolicy": "Never"}
        with pytest.raises(kubernetes_validate.ValidationError):
            valid(pod)


@pytest.mark.parametrize("name", JOBSETS)
def test_a_jobset_says_what_its_documentation_asks(name):
    """By hand, after the JobSet API v1alpha2: fields, names, failure policy; and what s2s needs of a Job."""
    jobset = read(name)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    assert set(spec) <= {"network", "failurePolicy", "replicatedJobs"}
    policy = spec["failurePolicy"]
    assert set(policy) == {"maxRestarts", "rules"} and policy["maxRestarts"] > 0
    for rule in policy["rules"]:
        assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    for replicated in spec["replicatedJobs"]:
        assert set(replicated) == {"name", "replicas", "template"} and replicated["replicas"] == 1
        job = replicated["template"]["spec"]
        # Names of pods, JOBSET-NAME-JOB-POD, are names of hosts.
        assert re.fullmatch(
            r"[a-z]([-a-z0-9]*[a-z0-9])?", f"{jobset['metadata']['name']}-{replicated['name']}"
        )
        assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] > 1
        # One pod's end is everybody's: the JobSet starts them together again.
        assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
        codes = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
        (container,) = job["template"]["spec"]["containers"]
        assert codes == [{"containerName": container["name"], "operator": "In", "values": [143]}]
        assert "command" not in container, "the image's entry point gets SIGTERM itself"
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
        claims = [volume.get("persistentVolumeClaim") for volume in job["template"]["spec"]["volumes"]]
        assert {"claimName": read("storage")["metadata"]["name"]} in claims


def test_processes_on_gpus_are_told_of_each_other():
    jobset = read("gpu")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    env = {one["name"]: one for one in container["env"]}
    assert int(env["JAX_NUM_PROCESSES"]["value"]) == job["parallelism"]
    host, port = env["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    name = jobset["metadata"]["name"]
    assert (
        host == f"{name}-{replicated['name']}-0-0.{name}" and jobset["spec"]["network"]["enableDNSHostnames"]
    )
    assert int(port) == container["ports"][0]["containerPort"]
    number = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert number == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def strict(schema):
    """A schema of Kubernetes in which unknown fields are errors, as the API server's strict check has it."""
    schema = copy.deepcopy(schema)

    def walk(node):
        if isinstance(node, dict):
            if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
                node.setdefault("additionalProperties", False)
            for child in list(node.values()):
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(schema["properties"]["spec"])
    return schema


@pytest.mark.parametrize("name", JOBSETS)
def test_a_jobset_fits_the_schema_that_its_project_publishes(name):
    """kubectl get crd jobsets.jobset.x-k8s.io -o yaml > FILE, on a cluster that has JobSet."""
    file = os.environ.get("S2S_JOBSET_CRD")
    if not file:
        pytest.skip("S2S_JOBSET_CRD names no file with JobSet's CustomResourceDefinition")
    import jsonschema

    versions = yaml.safe_load(Path(file).read_text(encoding="utf-8"))["spec"]["versions"]
    (schema,) = [one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1alpha2"]
    validator = jsonschema.Draft7Validator(strict(schema))
    jobset = read(name)
    validator.validate(jobset)
    jobset["spec"]["failurepolicy"] = {}
    assert not validator.is_valid(jobset)


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """A gcloud that notes what it is told, and knows of a pod of three hosts."""
    tool = tmp_path / "bin" / "gcloud"
    tool.parent.mkdir()
    tool.write_text(
        f"""#!/bin/bash
# In one write: several are told at once.
line=$(printf '%q ' "$@")
printf '%s\\n' "$line" >> {tmp_path}/told
case "$*" in
  *describe*) echo '10.0.0.2;10.0.0.3;10.0.0.4' ;;
  *--process=1*) exit 143 ;;
esac
"""
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TPU", "mine")
    monkeypatch.setenv("ZONE", "zone-a")
    return tmp_path / "told"


def pod(*arguments):
    return subprocess.run(["bash", "launch/tpu/pod.sh", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_every_host_of_a_tpu_pod_is_told_its_number(gcloud):
    done = pod("train", "--config", "x.py", "--config.data.vocab.source_separator= ")
    assert done.returncode == 143, done.stderr
    told = [shlex.split(line) for line in gcloud.read_text().splitlines()]
    commands = {words[words.index("--worker") + 1]: words[-1] for words in told if "ssh" in words}
    assert sorted(commands) == ["0", "1", "2"]
    for number, command in commands.items():
        words = shlex.split(command)
        assert words[:2] == ["cd", "s2s"] and "--config.data.vocab.source_separator= " in words
        assert words[-3:] == ["--coordinator=10.0.0.2:8476", "--processes=3", f"--process={number}"]


def test_a_tpu_pod_is_made_and_deleted_as_asked(gcloud, monkeypatch):
    monkeypatch.setenv("TYPE", "v5litepod-16")
    assert pod("create", "--spot").returncode == 0
    assert pod("install").returncode == 0
    assert pod("delete").returncode == 0
    told = gcloud.read_text()
    assert "tpu-vm create mine --zone zone-a --accelerator-type v5litepod-16" in told and "--spot" in told
    assert "tpu-vm delete mine" in told
    wrong = pod("erase")
    assert wrong.returncode == 2 and "none of create, install, train, delete" in wrong.stderr


def test_the_image_copies_what_is_there():
    text = (ROOT / "launch" / "docker" / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()]
    assert copied and all((ROOT / word).exists() for word in copied)
    let_in = (ROOT / "launch" / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    assert {line[1:] for line in let_in.splitlines() if line.startswith("!")} == set(copied)
    assert 'ENTRYPOINT ["python", "-m", "s2s.main"]' in text


@pytest.mark.parametrize("script", ["slurm/train.sbatch", "tpu/pod.sh"])
def test_a_script_is_bash(script):
    done = subprocess.run(["bash", "-n", str(ROOT / "launch" / script)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
