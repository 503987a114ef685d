"""The Deployment and the migration of deploy/kubernetes, run by podman: the schema, a login, an order, a crash, a stop.

Not part of `make test`, as it needs podman, root and an image: deploy/kubernetes/test.sh. This test does what a kubelet
does and `podman play kube` of Debian 12 does not: it asks the probes, and runs a Job as the pod that it describes.
"""

import copy
import json
import os
import re
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from bench.waiting import KILOBYTES
from dev.redis_server import RedisServer
from settings import Settings
from tests.blueprints.callers import ORDER
from tests.databases import MariaDB
from tests.deploy.image import IMAGE, podman
from tests.deploy.test_kubernetes import ONE_CLUSTER, Overlay
from tests.harness import WAIT_SECONDS, Simulator, bearer, bound_to_this_process, free_port, wait_until


class Pod:
    """What `podman play kube` makes of a Deployment, or of the pod of a Job, on the network of this machine.

    :param manifest: as it is rendered.
    :param config: the settings that are no secrets.
    :param folder: stands for the memory at /dev/shm.
    """

    def __init__(self, manifest: dict[str, Any], config: dict[str, str], folder: Path) -> None:
        self.spec, self.port, self.memory = manifest["spec"]["template"]["spec"], int(config["PORT"]), folder
        played = copy.deepcopy(manifest)
        if manifest["kind"] == "Job":  # which podman 4.3 does not know
            played = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": played["spec"]["template"]["spec"]}
        name = played["metadata"]["name"] = f"kuaishang-test-{os.getpid()}-{manifest['kind'].lower()}"
        self.name = name + "-pod-0" * (played["kind"] == "Deployment")
        pod = played["spec"] if played["kind"] == "Pod" else played["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        container |= {"image": f"{IMAGE}:latest", "imagePullPolicy": "Never"}
        # It publishes ports, which host networking cannot, and knows no named ones.
        for part in ("ports", "startupProbe", "readinessProbe", "livenessProbe"):
            container.pop(part, None)
        # Its emptyDir is root's; the kubelet's is open to all.
        folder.mkdir()
        folder.chmod(0o1777)
        for volume in pod.get("volumes", []):
            del volume["emptyDir"]
            volume["hostPath"] = {"path": str(folder), "type": "Directory"}
        for source in container.get("envFrom", []):
            source["configMapRef"]["name"] = "kuaishang"
        settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kuaishang"}, "data": config}
        file = folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump_all([settings, played]))
        podman("play", "kube", "--network=host", str(file))
        self.container = f"{self.name}-{container['name']}"

    def state(self) -> dict[str, Any]:
        (described,) = json.loads(podman("inspect", self.container))
        return described["State"]  # type: ignore[no-any-return]

    def probe(self, name: str) -> bool:
        """Ask as the kubelet does."""
        (container,) = self.spec["containers"]
        probe = container[f"{name}Probe"]
        url = f"http://127.0.0.1:{self.port}{probe['httpGet']['path']}"
        try:
            return 200 <= requests.get(url, timeout=probe["timeoutSeconds"]).status_code < 400
        except requests.RequestException:
            return False

    def run(self, code: str) -> str:
        return podman("exec", self.container, "python", "-c", code)

    def occupied(self) -> int:
        """Return the most memory that it has occupied, with the files that it has read, in bytes."""
        groups = Path(f"/proc/{self.state()['Pid']}/cgroup").read_text()
        if found := re.search("^[0-9]+:memory:(.*)$", groups, re.MULTILINE):
            return int(Path(f"/sys/fs/cgroup/memory{found[1]}/memory.max_usage_in_bytes").read_text())
        return int(Path(f"/sys/fs/cgroup{groups.strip().removeprefix('0::')}/memory.peak").read_text())


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database of MariaDB, over TCP."""
    port = free_port()
    with closing(
        MariaDB(tmp_path / "mariadb", "--skip-networking=0", "--bind-address=127.0.0.1", f"--port={port}")
    ) as server:
        server.start()
        server.execute("CREATE DATABASE kuaishang CHARACTER SET utf8mb4")
        server.execute("CREATE USER kuaishang@'127.0.0.1' IDENTIFIED BY 'kuaishang'")
        server.execute("GRANT ALL ON kuaishang.* TO kuaishang@'127.0.0.1'")
        yield f"mysql://kuaishang:kuaishang@127.0.0.1:{port}/kuaishang"


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    with closing(RedisServer(tmp_path / "redis", bound_to_this_process(), port=str(port))) as server:
        server.start()
        yield f"redis://127.0.0.1:{port}/0"


class Namespace:
    """The objects of deploy/kubernetes with made-up secrets, and the pods that are played from them.

    :param values: the settings, of which each pod gets what its manifest names.
    """

    def __init__(self, values: dict[str, str], folder: Path) -> None:
        self.overlay, self.folder = Overlay(ONE_CLUSTER), folder
        own = ("PORT", "WECHAT_APP_ID", "WECHAT_ACCOUNT_APP_ID", "WECHAT_API_BASE_URL")
        self.config = self.overlay.settings | {name: values[name] for name in own}
        self.url = f"http://127.0.0.1:{values['PORT']}"
        self.pods: list[Pod] = []
        # podman's own form of a Secret.
        secret = {
            name: b64encode(values[name].encode()).decode() for name in self.overlay.secret_keys() if name in values
        }
        (folder / "secret").write_text(json.dumps(secret))
        subprocess.run(["podman", "secret", "rm", "kuaishang"], capture_output=True)
        podman("secret", "create", "kuaishang", str(folder / "secret"))

    def play(self, kind: str) -> Pod:
        self.pods.append(Pod(self.overlay(kind), self.config, self.folder / kind))
        return self.pods[-1]

    def migrate(self) -> None:
        job = self.play("Job")
        wait_until(lambda: job.state()["Status"] == "exited")
        assert job.state()["ExitCode"] == 0, podman("logs", job.container)

    def close(self) -> None:
        for pod in self.pods:
            podman("pod", "rm", "--force", "--time=0", pod.name)
        podman("secret", "rm", "kuaishang")


@pytest.fixture
def namespace(
    environ: dict[str, str], database: str, redis_url: str, simulator: Simulator, tmp_path: Path
) -> Iterator[Namespace]:
    values = {**environ, "DATABASE_URL": database, "REDIS_URL": redis_url, "PORT": str(free_port())}
    with closing(Namespace(values, tmp_path)) as namespace:
        yield namespace


def test_the_deployment_waits_for_the_schema_serves_outlives_a_crash_and_drains(
    namespace: Namespace, simulator: Simulator
) -> None:
    pod = namespace.play("Deployment")
    wait_until(lambda: pod.probe("startup"))
    assert pod.probe("liveness")
    assert not pod.probe("readiness")  # so that the old pods stay, whatever order somebody applies things in
    namespace.migrate()
    wait_until(lambda: pod.probe("readiness"))

    def log_in() -> requests.Response:
        url = f"{namespace.url}/api/v1/auth/wechat"
        return requests.post(url, json={"code": simulator.code()}, timeout=WAIT_SECONDS)

    headers = bearer(log_in().json()["data"]["token"])
    orders = f"{namespace.url}/api/v1/orders"
    ordered = requests.post(orders, json=ORDER, headers=headers, timeout=WAIT_SECONDS)
    assert ordered.status_code == 201, ordered.text

    _can_do_as_little_as_the_manifest_says(pod)
    _has_room_for_the_logins_that_may_wait(pod, int(namespace.config["WEB_CONCURRENCY"]))

    left = {path.name for path in pod.memory.iterdir()}
    psutil.Process(pod.state()["Pid"]).kill()
    wait_until(lambda: {path.name for path in pod.memory.iterdir()}.isdisjoint(left))  # or it would fill up
    wait_until(lambda: pod.probe("readiness"))
    again = requests.get(f"{orders}/{ordered.json()['data']['id']}", headers=headers, timeout=WAIT_SECONDS)
    assert again.status_code == 200, again.text

    began, grace = time.monotonic(), pod.spec["terminationGracePeriodSeconds"]
    with ThreadPoolExecutor(1) as pool:
        # Not the pod, whose process 1 would take all others along at once; a kubelet ends that one last, too.
        stopped = pool.submit(podman, "stop", f"--time={grace}", pod.container)
        wait_until(lambda: not pod.probe("readiness"))
        assert log_in().status_code == 200
        stopped.result()
    sleep = pod.spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert int(namespace.config["DRAIN_SECONDS"]) <= time.monotonic() - began < grace - sleep
    assert pod.state()["ExitCode"] == 0


def _can_do_as_little_as_the_manifest_says(pod: Pod) -> None:
    status = Path(f"/proc/{pod.state()['Pid']}/status").read_text()
    found = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    user = str(pod.spec["securityContext"]["runAsUser"])
    assert found["Uid"].split() == found["Gid"].split() == [user] * 4
    assert [int(found[f"Cap{kind}"], 16) for kind in ("Prm", "Eff", "Bnd", "Amb")] == [0] * 4
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    looked = "import os; print([path for path in {} if os.access(path, os.W_OK)])"
    assert (
        pod.run(looked.format(["/", "/app", "/data", "/tmp", "/var/tmp", "/run", "/dev/shm"])).strip() == "['/dev/shm']"
    )
    (described,) = json.loads(podman("inspect", pod.container))
    limits = pod.spec["containers"][0]["resources"]["limits"]
    assert described["HostConfig"]["Memory"] == int(limits["memory"].removesuffix("Mi")) * 2**20
    assert described["HostConfig"]["NanoCpus"] == int(limits["cpu"]) * 10**9


def _has_room_for_the_logins_that_may_wait(pod: Pod, workers: int) -> None:
    waiting = workers * Settings().fields["WECHAT_CONCURRENCY"].load_default * KILOBYTES * 1024
    requested = int(pod.spec["containers"][0]["resources"]["requests"]["memory"].removesuffix("Mi")) * 2**20
    print(f"{pod.occupied() / 1e6:.0f} MB, and {waiting / 1e6:.0f} MB of logins that wait, of {requested / 1e6:.0f} MB")
    assert pod.occupied() + waiting < requested
