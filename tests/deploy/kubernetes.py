"""The Deployment and the migration of deploy/kubernetes, run by podman: the schema, a login, an order, a crash, a stop.

Not part of `make test`, as it needs podman, root and an image: deploy/kubernetes/test.sh. This test does what a kubelet
does and `podman play kube` of Debian 12 does not: it asks the probes, and runs a Job as the pod that it describes.
"""

import copy
import json
import os
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from dev.redis_server import RedisServer
from dev.run import free_port
from tests.blueprints.callers import ORDER
from tests.databases import MariaDB
from tests.deploy.image import IMAGE, podman
from tests.deploy.test_kubernetes import ONE_CLUSTER, Overlay
from tests.harness import WAIT_SECONDS, Simulator, bearer, bound_to_this_process, wait_until


class Pod:
    """What `podman play kube` makes of the pod of a Deployment or a Job, on the network of this machine.

    :param spec: the pod's, as it is in the manifest.
    :param config: the settings that are no secrets.
    :param folder: stands for the memory at /dev/shm.
    """

    def __init__(self, name: str, spec: dict[str, Any], config: dict[str, str], folder: Path) -> None:
        self.name, self.spec, self.port = name, spec, int(config["PORT"])
        played = copy.deepcopy(spec)
        (container,) = played["containers"]
        container |= {"image": f"{IMAGE}:latest", "imagePullPolicy": "Never"}
        # podman 4.3 publishes ports, which host networking cannot, and knows no named ones.
        container.pop("ports", None)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            container.pop(probe, None)
        # Its emptyDir is root's; the kubelet's is open to all.
        folder.mkdir()
        folder.chmod(0o1777)
        for volume in played.get("volumes", []):
            del volume["emptyDir"]
            volume["hostPath"] = {"path": str(folder), "type": "Directory"}
        settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kuaishang"}, "data": config}
        for source in container.get("envFrom", []):
            source["configMapRef"]["name"] = "kuaishang"
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": played}
        manifest = folder.with_suffix(".yaml")
        manifest.write_text(yaml.safe_dump_all([settings, pod]))
        podman("play", "kube", "--network=host", str(manifest))
        self.container = f"{name}-{container['name']}"

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

    def remove(self) -> None:
        podman("pod", "rm", "--force", "--time=0", self.name)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database of MariaDB, over TCP."""
    port = free_port("MariaDB's port", "0")
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
    port = free_port("Redis's port", "0")
    with closing(RedisServer(tmp_path / "redis", bound_to_this_process(), port=str(port))) as server:
        server.start()
        yield f"redis://127.0.0.1:{port}/0"


def test_the_deployment_waits_for_the_schema_serves_outlives_a_crash_and_stops_without_losing_a_request(
    environ: dict[str, str], database: str, redis_url: str, simulator: Simulator, tmp_path: Path
) -> None:
    overlay = Overlay(ONE_CLUSTER)
    values = {**environ, "DATABASE_URL": database, "REDIS_URL": redis_url}
    secret = {name: b64encode(values[name].encode()).decode() for name in overlay.secret_keys() if name in values}
    config = overlay.settings | {"PORT": str(free_port("PORT", "0")), "WECHAT_API_BASE_URL": simulator.url}
    config |= {name: environ[name] for name in ("WECHAT_APP_ID", "WECHAT_ACCOUNT_APP_ID")}
    deployed, job = (overlay.pods[kind] for kind in ("Deployment", "Job"))
    name = f"kuaishang-test-{os.getpid()}"
    with ExitStack() as stack:
        # podman's own form of a Secret.
        subprocess.run(["podman", "secret", "rm", "kuaishang"], capture_output=True)
        (tmp_path / "secret").write_text(json.dumps(secret))
        podman("secret", "create", "kuaishang", str(tmp_path / "secret"))
        stack.callback(podman, "secret", "rm", "kuaishang")
        pod = Pod(name, deployed, config, tmp_path / "shm")
        stack.callback(pod.remove)
        wait_until(lambda: pod.probe("startup"))
        assert pod.probe("liveness")
        assert not pod.probe("readiness")  # so that the old pods stay, whatever order somebody applies things in

        migration = Pod(f"{name}-migration", job, config, tmp_path / "migration")
        stack.callback(migration.remove)
        wait_until(lambda: migration.state()["Status"] == "exited")
        assert migration.state()["ExitCode"] == 0, podman("logs", migration.container)
        wait_until(lambda: pod.probe("readiness"))

        url = f"http://127.0.0.1:{pod.port}/api/v1"

        def log_in() -> requests.Response:
            return requests.post(f"{url}/auth/wechat", json={"code": simulator.code()}, timeout=WAIT_SECONDS)

        headers = bearer(log_in().json()["data"]["token"])
        ordered = requests.post(f"{url}/orders", json=ORDER, headers=headers, timeout=WAIT_SECONDS)
        assert ordered.status_code == 201, ordered.text

        _can_do_as_little_as_the_manifest_says(pod)

        left = {path.name for path in (tmp_path / "shm").iterdir()}
        psutil.Process(pod.state()["Pid"]).kill()
        wait_until(lambda: {path.name for path in (tmp_path / "shm").iterdir()}.isdisjoint(left))  # or it would fill up
        wait_until(lambda: pod.probe("readiness"))
        again = requests.get(f"{url}/orders/{ordered.json()['data']['id']}", headers=headers, timeout=WAIT_SECONDS)
        assert again.status_code == 200, again.text

        simulator.forget()
        simulator.fault("slow", seconds=3)
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            grace = deployed["terminationGracePeriodSeconds"]
            # Not the pod, whose process 1 would take all others along at once; a kubelet ends that one last, too.
            stopped = pool.submit(podman, "stop", f"--time={grace}", pod.container)
            wait_until(lambda: not pod.probe("readiness"))
            assert log_in().status_code == 200  # while it drains
            stopped.result()
        sleep = deployed["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert int(config["DRAIN_SECONDS"]) <= time.monotonic() - began < grace - sleep
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
