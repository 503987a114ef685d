"""deploy/kubernetes as `kubectl kustomize` renders it: each of its promises. It needs no cluster.

deploy/kubernetes/test.sh has the rest: validators, and the Deployment run by podman.
"""

import json
import math
import os
import re
import shutil
import subprocess
from base64 import b64encode
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import settings
from telemetry import redaction
from tests.harness import ROOT

FOLDER = ROOT / "deploy/kubernetes"
ONE_CLUSTER = "one-cluster"
REGIONS = ["three-regions/beijing", "three-regions/guangzhou", "three-regions/shanghai"]
NAME, COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"
WEB = {NAME: "kuaishang", COMPONENT: "web"}
WHOLE_STOP_SECONDS = 28
"""Of a pod after SIGTERM, as gunicorn.conf.py says: DRAIN_SECONDS, and the requests in flight."""


@cache
def kubectl() -> str:
    path = shutil.which("kubectl")
    if not path:
        pytest.skip("kubectl is not installed; deploy/kubernetes/test.sh brings it")
    version = json.loads(subprocess.run([path, "version", "--client", "-o", "json"], capture_output=True).stdout)
    if not version.get("kustomizeVersion", "").startswith("v5."):
        pytest.skip("kubectl has no kustomize 5; deploy/kubernetes/test.sh brings one")
    return path


@cache
def _rendered(overlay: str) -> str:
    command = [kubectl(), "kustomize", str(FOLDER / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


class Overlay:
    """The objects that an overlay renders."""

    def __init__(self, name: str) -> None:
        self.objects: list[dict[str, Any]] = list(yaml.safe_load_all(_rendered(name)))

    def __call__(self, kind: str, name: str = "") -> Any:
        """Return the only object of a kind, or the one of this name."""
        (found,) = [one for one in self.objects if one["kind"] == kind and name in ("", one["metadata"]["name"])]
        return found

    @property
    def pods(self) -> dict[str, Any]:
        return {kind: self(kind)["spec"]["template"]["spec"] for kind in ("Deployment", "Job")}

    @property
    def container(self) -> Any:
        (container,) = self.pods["Deployment"]["containers"]
        return container

    @property
    def settings(self) -> dict[str, str]:
        return self("ConfigMap")["data"]  # type: ignore[no-any-return]

    def secret_keys(self, kind: str = "Deployment") -> dict[str, bool]:
        """The settings that come from the Secret, and which of them are optional."""
        (container,) = self.pods[kind]["containers"]
        references = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container["env"]}
        assert all((one["name"], one["key"]) == ("kuaishang", name) for name, one in references.items())
        return {name: one.get("optional", False) for name, one in references.items()}


@pytest.fixture(params=[ONE_CLUSTER, *REGIONS])
def overlay(request: pytest.FixtureRequest) -> Overlay:
    return Overlay(request.param)


def seconds(probe: dict[str, Any]) -> int:
    return probe["periodSeconds"] * probe["failureThreshold"]  # type: ignore[no-any-return]


def test_a_pod_is_ready_by_readyz_every_5_s_out_after_3_and_restarted_only_if_it_does_not_respond(
    overlay: Overlay,
) -> None:
    ready, live, start = (overlay.container[f"{name}Probe"] for name in ("readiness", "liveness", "startup"))
    assert ready["httpGet"] == {"path": "/readyz", "port": "http"}
    assert (ready["periodSeconds"], ready["failureThreshold"], ready["successThreshold"]) == (5, 3, 2)
    assert ready["timeoutSeconds"] >= 2  # the service itself takes up to a second
    assert live["httpGet"] == start["httpGet"] == {"path": "/livez", "port": "http"}
    assert seconds(live) > seconds(ready)
    assert seconds(start) >= 60
    assert overlay.container["ports"] == [
        {"name": "http", "containerPort": settings.Settings().fields["PORT"].load_default}
    ]


def test_pods_are_spread_over_zones_and_nodes_and_leave_a_lost_one_soon(overlay: Overlay) -> None:
    tolerated = {one["key"].partition("/")[2]: one for one in overlay.pods["Deployment"]["tolerations"]}
    assert {*tolerated} == {"unreachable", "not-ready"}
    # NoExecute alone: tainted NoSchedule, too, a lost node does not count below.
    assert {(one["effect"], one["tolerationSeconds"]) for one in tolerated.values()} == {("NoExecute", 30)}
    zones, nodes = overlay.pods["Deployment"]["topologySpreadConstraints"]
    assert (zones["topologyKey"], zones["whenUnsatisfiable"]) == ("topology.kubernetes.io/zone", "DoNotSchedule")
    assert zones["nodeTaintsPolicy"] == "Honor"  # or a zone that is gone would forbid more than one pod in the others
    assert (nodes["topologyKey"], nodes["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    for one in (zones, nodes):
        assert (one["maxSkew"], one["labelSelector"], one["matchLabelKeys"]) == (
            1,
            {"matchLabels": WEB},
            ["pod-template-hash"],
        )


def test_three_or_more_pods_by_the_load_of_the_cpu(overlay: Overlay) -> None:
    scaler = overlay("HorizontalPodAutoscaler")
    assert scaler["apiVersion"] == "autoscaling/v2"
    spec = scaler["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "kuaishang"}
    (metric,) = spec["metrics"]
    target = {"type": "Utilization", "averageUtilization": 65}
    assert metric == {"type": "Resource", "resource": {"name": "cpu", "target": target}}
    assert spec["minReplicas"] == 3 < spec["maxReplicas"]
    assert spec["behavior"]["scaleUp"]["stabilizationWindowSeconds"] == 30
    assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 300
    assert "replicas" not in overlay("Deployment")["spec"]  # or each roll-out would take the autoscaler's pods away


def test_nodes_are_drained_one_pod_at_a_time(overlay: Overlay) -> None:
    budget = overlay("PodDisruptionBudget")["spec"]
    assert budget["selector"] == {"matchLabels": WEB}
    assert budget["maxUnavailable"] == 1 < overlay("HorizontalPodAutoscaler")["spec"]["minReplicas"]
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_a_roll_out_takes_no_pod_away_before_a_new_one_is_ready(overlay: Overlay) -> None:
    spec = overlay("Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": "25%"}
    assert spec.get("strategy", {}).get("type", "RollingUpdate") == "RollingUpdate"
    assert spec["minReadySeconds"] >= 10
    assert spec["selector"] == {"matchLabels": WEB}
    assert spec["template"]["metadata"]["labels"].items() >= WEB.items()


def test_a_pod_has_the_time_that_its_stop_takes(overlay: Overlay) -> None:
    (graceful,) = re.findall(
        r'^graceful_timeout = (\d+) - settings\["DRAIN_SECONDS"\]$', (ROOT / "gunicorn.conf.py").read_text(), re.M
    )
    assert int(graceful) == WHOLE_STOP_SECONDS
    sleep = overlay.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert overlay.pods["Deployment"]["terminationGracePeriodSeconds"] >= sleep + WHOLE_STOP_SECONDS + 5
    assert sleep >= 5
    # What a load balancer outside needs that asks as often as the kubelet does, and takes an answer for it.
    ready = overlay.container["readinessProbe"]
    assert int(overlay.settings["DRAIN_SECONDS"]) >= 2 * ready["periodSeconds"]


def test_a_container_can_do_as_little_as_possible(overlay: Overlay) -> None:
    for kind, pod in overlay.pods.items():
        who = pod["securityContext"]
        assert (who["runAsNonRoot"], who["runAsUser"], who["seccompProfile"]) == (
            True,
            10001,
            {"type": "RuntimeDefault"},
        )
        assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        writable = {"Deployment": [{"name": "shm", "mountPath": "/dev/shm"}], "Job": []}[kind]
        assert [mount for container in pod["containers"] for mount in container.get("volumeMounts", [])] == writable
    (memory,) = overlay.pods["Deployment"]["volumes"]
    assert memory == {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}
    assert overlay("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_nothing_goes_in_or_out_but_what_is_named(overlay: Overlay) -> None:
    everything = overlay("NetworkPolicy", "nothing-else")["spec"]
    assert everything == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    web, data = (overlay("NetworkPolicy", name)["spec"] for name in ("web", "data"))
    assert web["podSelector"] == {"matchLabels": WEB}
    assert data["podSelector"] == {"matchLabels": {NAME: "kuaishang"}}  # the migration, too

    def ports(rule: dict[str, Any]) -> set[Any]:
        return {port["port"] for port in rule["ports"]}

    (way_in,) = web["ingress"]
    assert ports(way_in) == {"http"}
    sources = [one["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for one in way_in["from"]]
    assert sources == ["haproxy-controller", "monitoring"]
    assert [ports(rule) for rule in web["egress"]] == [{443}, {6379, 26379}]
    assert [ports(rule) for rule in data["egress"]] == [{53}, {3306}]
    assert "ingress" not in data
    (wechat,) = web["egress"][0]["to"]
    assert "10.0.0.0/8" in wechat["ipBlock"]["except"]
    assert "169.254.0.0/16" in wechat["ipBlock"]["except"]  # where clouds hand out credentials
    for rule in (web["egress"][1], data["egress"][1]):
        assert all(re.fullmatch(r"10\.\d+\.\d+\.0/24", one["ipBlock"]["cidr"]) for one in rule["to"])


def test_every_setting_that_is_required_is_given_and_every_secret_by_reference(overlay: Overlay) -> None:
    fields = settings.Settings().fields
    required = {name for name, field in fields.items() if field.required}
    keys = overlay.secret_keys()
    assert required <= {*overlay.settings, *keys}
    assert {*overlay.settings} & {*keys} == set()
    assert {*overlay.settings, *keys} <= {*fields, "OTEL_RESOURCE_ATTRIBUTES"}
    secret = {name for name in fields if redaction._SECRET_NAME.search(name)} | {"REDIS_URL", "DATABASE_URL"}
    assert {*keys} == secret
    assert {name for name, optional in keys.items() if not optional} == required & secret | {"METRICS_TOKEN"}
    assert overlay.container["envFrom"] == [{"configMapRef": {"name": overlay("ConfigMap")["metadata"]["name"]}}]
    assert overlay.secret_keys("Job") == {"DATABASE_URL": False}

    made_up = dict.fromkeys(("WECHAT_APP_SECRET", "SECRET_KEY"), "abcdefghijklmnopqrstuvwxyz0123456789")
    made_up |= {"ENCRYPTION_KEYS": b64encode(bytes(32)).decode(), "REDIS_URL": "redis://redis/0"}
    made_up |= {"DATABASE_URL": "mysql://user:password@database/kuaishang"}
    loaded = settings.load(overlay.settings | made_up)
    assert {
        name: str(loaded[name]) for name in ("DRAIN_SECONDS", "WEB_CONCURRENCY")
    }.items() <= overlay.settings.items()


def test_no_secret_is_in_the_files(overlay: Overlay) -> None:
    assert "Secret" not in {one["kind"] for one in overlay.objects}
    written = [path for path in FOLDER.rglob("*") if path.suffix in (".yaml", ".env", ".sh")]
    assert len(written) > 10
    names = "|".join(overlay.secret_keys())
    for path in written:
        assert not re.search(rf"\b({names}): *[^ \n{{]|://[^/\s]*@", path.read_text()), path
        assert not re.search(rf"^({names})=", path.read_text(), re.MULTILINE), path


def test_a_pod_has_a_core_for_each_worker_and_the_memory_at_which_the_alarm_comes(overlay: Overlay) -> None:
    resources = overlay.container["resources"]
    workers = int(overlay.settings["WEB_CONCURRENCY"])
    assert resources["limits"]["cpu"] == str(workers)
    assert "cpu" in resources["requests"]  # the autoscaler's measure
    rules = (ROOT / "deploy/prometheus/rules.yml").read_text()
    (alarm,) = re.findall(r"kuaishang_process_resident_memory_bytes\) > (\S+)$", rules, re.MULTILINE)
    assert int(resources["limits"]["memory"].removesuffix("Mi")) * 2**20 > workers * float(alarm) + 100e6


def test_the_image_is_the_same_for_all_and_named_by_its_digest(overlay: Overlay) -> None:
    images = {container["image"] for pod in overlay.pods.values() for container in pod["containers"]}
    (image,) = images
    assert re.fullmatch(r"registry\.example\.com/kuaishang@sha256:[0-9a-f]{64}", image)
    assert overlay.pods["Job"]["containers"][0]["command"] == ["alembic", "upgrade", "head"]


def test_the_alarms_are_those_of_prometheus_and_the_targets_are_scraped_as_it_does(overlay: Overlay) -> None:
    prometheus = ROOT / "deploy/prometheus"
    rules = yaml.safe_load((prometheus / "rules.yml").read_text())
    assert overlay("PrometheusRule")["spec"] == rules, "run deploy/kubernetes/rules.sh"
    monitor = overlay("ServiceMonitor")["spec"]
    service = overlay("Service")
    assert monitor["selector"] == {"matchLabels": WEB}
    assert service["metadata"]["labels"].items() >= WEB.items()
    assert service["metadata"]["labels"][monitor["jobLabel"]].startswith("kuaishang")
    (endpoint,) = monitor["endpoints"]
    config = yaml.safe_load((prometheus / "prometheus.yml").read_text())
    assert (endpoint["path"], endpoint["interval"]) == ("/metrics", config["global"]["scrape_interval"])
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["authorization"]["credentials"] == {"name": "kuaishang", "key": "METRICS_TOKEN"}
    assert [one["targetLabel"] for one in endpoint["relabelings"]] == ["instance"]


def test_the_rules_are_written_by_the_script(tmp_path: Path) -> None:
    for name in ("kubernetes/rules.sh", "prometheus/rules.yml"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / "deploy" / name, tmp_path / name)
    (tmp_path / "kubernetes/base").mkdir()
    subprocess.run([tmp_path / "kubernetes/rules.sh"], check=True)
    written = (tmp_path / "kubernetes/base/rules.yaml").read_text()
    assert written == (FOLDER / "base/rules.yaml").read_text(), "run deploy/kubernetes/rules.sh"


def test_the_way_in_leads_to_the_pods(overlay: Overlay) -> None:
    service = overlay("Service")["spec"]
    assert service["selector"] == WEB
    (port,) = service["ports"]
    assert port["targetPort"] == overlay.container["ports"][0]["name"]
    ingress = overlay("Ingress", "kuaishang")["spec"]
    (rule,), (tls,) = ingress["rules"], ingress["tls"]
    assert tls["hosts"] == [rule["host"]]
    assert overlay.settings["PUBLIC_URL"] == f"https://{rule['host']}"
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {
        "name": overlay("Service")["metadata"]["name"],
        "port": {"name": port["name"]},
    }


def for_the_controller() -> dict[str, str]:
    """The Service's annotations for HAProxy's ingress controller, read without kubectl."""
    objects = yaml.safe_load_all((FOLDER / "base/network.yaml").read_text())
    (service,) = [one for one in objects if one["kind"] == "Service"]
    return {name.removeprefix("haproxy.org/"): value for name, value in service["metadata"]["annotations"].items()}


def test_the_controller_asks_pods_as_the_kubelet_does(overlay: Overlay) -> None:
    ready = overlay.container["readinessProbe"]
    # Without a method it asks by OPTIONS, to which every route answers 204.
    assert for_the_controller()["check-http"] == f"GET {ready['httpGet']['path']}"
    assert for_the_controller()["check-interval"] == f"{ready['periodSeconds']}s"


def test_all_ingresses_share_what_the_service_says_of_its_backend(overlay: Overlay) -> None:
    assert {f"haproxy.org/{name}" for name in for_the_controller()} <= {*overlay("Service")["metadata"]["annotations"]}
    for ingress in [one for one in overlay.objects if one["kind"] == "Ingress"]:  # the last one would win
        assert {name.partition("ssl-redirect")[0] for name in ingress["metadata"]["annotations"]} == {"haproxy.org/"}


def test_the_ingress_repeats_and_refuses_what_deploy_haproxy_does() -> None:
    ours = (ROOT / "deploy/haproxy/haproxy.cfg").read_text()
    about = r"^ *((?:acl|retries|retry-on|option redispatch|timeout server) .+"
    about += r"|http-request .*(?:wait-for-body|set-timeout|l7-retry|X-Forwarded-Host|metrics/).*)$"
    assert sorted(for_the_controller()["backend-config-snippet"].splitlines()) == sorted(
        re.findall(about, ours, re.MULTILINE)
    )


def test_the_plain_port_of_the_ingress_leads_to_tls_as_that_of_deploy_haproxy_does(overlay: Overlay) -> None:
    ours = (ROOT / "deploy/haproxy/haproxy.cfg").read_text()
    [code] = re.findall(r"redirect location https://\S+ code (\d+)$", ours, re.MULTILINE)
    annotations = overlay("Ingress", "kuaishang")["metadata"]["annotations"]
    asked = {name.removeprefix("haproxy.org/ssl-redirect"): value for name, value in annotations.items()}
    assert asked == {"": "true", "-code": code, "-port": "443"}


def test_haproxy_accepts_what_the_controller_adds_to_its_configuration(tmp_path: Path) -> None:
    haproxy = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    if not haproxy:
        pytest.skip("haproxy is not installed")
    added = [f"option httpchk {for_the_controller()['check-http']}"]
    added += for_the_controller()["backend-config-snippet"].splitlines()
    config = "defaults\n  mode http\n" + "".join(f"  timeout {side} 1s\n" for side in ("connect", "client", "server"))
    config += "listen kuaishang\n  bind :80\n"
    (tmp_path / "haproxy.cfg").write_text(config + "".join(f"  {line}\n" for line in added))
    done = subprocess.run([haproxy, "-c", "-f", tmp_path / "haproxy.cfg"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_region_has_its_own_addresses_and_all_the_same_host_and_image() -> None:
    assert sorted(
        str(path.parent.relative_to(FOLDER / "overlays"))
        for path in FOLDER.glob("overlays/three-regions/*/kustomization.yaml")
    ) == [
        REGIONS[0],
        "three-regions/common",
        *REGIONS[1:],
    ]
    seen = []
    for name in REGIONS:
        overlay, region = Overlay(name), name.rpartition("/")[2]
        assert {one["metadata"]["labels"]["region"] for one in overlay.objects} == {region}
        for kind in ("Deployment", "Job"):
            assert overlay(kind)["spec"]["template"]["metadata"]["labels"]["region"] == region
        given = overlay.settings
        assert given["OTEL_RESOURCE_ATTRIBUTES"] == f"cloud.region={region}"
        assert overlay("NetworkPolicy", "data")["spec"]["egress"][1]["to"].__len__() == len(REGIONS)
        # Two regions of three may be gone.
        alone = Overlay(ONE_CLUSTER)("HorizontalPodAutoscaler")["spec"]["maxReplicas"]
        assert overlay("HorizontalPodAutoscaler")["spec"]["maxReplicas"] == len(REGIONS) * alone
        seen.append(
            (
                given["TRUSTED_PROXIES"],
                overlay("Ingress", "kuaishang")["spec"]["rules"][0]["host"],
                overlay.container["image"],
            )
        )
    proxies, hosts, images = ({*values} for values in zip(*seen, strict=True))
    assert (len(proxies), len(hosts), len(images)) == (len(REGIONS), 1, 1)


def test_the_name_server_can_ask_each_region_whether_it_can_serve() -> None:
    config = (ROOT / "deploy/dns/config").read_text()
    asked = dict(re.findall(r"^    (port|url_path) => (\S+)$", config, re.MULTILINE))
    for name in REGIONS:
        overlay = Overlay(name)
        ingress = overlay("Ingress", "readyz")
        (rule,) = ingress["spec"]["rules"]
        (path,) = rule["http"]["paths"]
        assert ({"port": "80", "url_path": path["path"]}, path["pathType"]) == (asked, "Exact")
        assert {*rule} == {"http"}  # it names no host
        assert "tls" not in ingress["spec"]
        assert ingress["metadata"]["annotations"] == {"haproxy.org/ssl-redirect": "false"}
        assert path["backend"] == overlay("Ingress", "kuaishang")["spec"]["rules"][0]["http"]["paths"][0]["backend"]


def test_the_documents_say_how_many_connections_the_database_must_take() -> None:
    def most(overlay: Overlay) -> int:
        pods = overlay("HorizontalPodAutoscaler")["spec"]["maxReplicas"]
        surge = overlay("Deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
        pods += math.ceil(pods * int(surge.removesuffix("%")) / 100)  # as the Deployment's controller rounds
        workers, default = int(overlay.settings["WEB_CONCURRENCY"]), settings.Settings().fields["DATABASE_CONNECTIONS"]
        return pods * workers * int(overlay.settings.get("DATABASE_CONNECTIONS", default.load_default))  # type: ignore[no-any-return]

    for name in ("README.md", "README.zh-CN.md"):
        text = (FOLDER / name).read_text()
        assert f"{most(Overlay(ONE_CLUSTER)):,}" in text
        assert f"{sum(most(Overlay(region)) for region in REGIONS):,}" in text


class Kubectl:
    """Stands in for kubectl: writes down what it is asked, and exits with 1 for what a test has fail."""

    def __init__(self, folder: Path, failing: str) -> None:
        self._asked = folder / "asked"
        self._folder = folder
        program = f'#!/bin/sh\necho "$*" >>{self._asked}\n! echo "$*" | grep -Eq -- "{failing}"\n'
        (folder / "kubectl").write_text(program)
        (folder / "kubectl").chmod(0o755)

    def roll_out(self) -> tuple[int, list[str]]:
        command = [FOLDER / "roll-out.sh", "overlays/one-cluster", "--context=beijing"]
        env = {**os.environ, "PATH": f"{self._folder}:{os.environ['PATH']}"}
        done = subprocess.run(command, env=env, capture_output=True, timeout=60)
        return done.returncode, self._asked.read_text().splitlines()


def test_nothing_is_rolled_out_before_the_migration_is_complete(tmp_path: Path) -> None:
    ours, apply = "--namespace=kuaishang --context=beijing", "--context=beijing apply --kustomize=overlays/one-cluster"
    before = [f"{ours} delete job migrate --ignore-not-found", f"{apply} --selector={COMPONENT}=migration"]
    complete = f"{ours} wait job/migrate --for=condition=complete --timeout=5s"
    failed = f"{ours} wait job/migrate --for=condition=failed --timeout=0"
    for folder in ("complete", "failed", "refused", "stuck"):
        (tmp_path / folder).mkdir()
    after = [apply, f"{ours} rollout status deployment/kuaishang --timeout=15m"]
    assert Kubectl(tmp_path / "complete", "=failed").roll_out() == (0, [*before, complete, *after])
    logs = f"{ours} logs job/migrate"
    assert Kubectl(tmp_path / "failed", "=complete").roll_out() == (1, [*before, complete, failed, logs])
    assert Kubectl(tmp_path / "refused", "=migration").roll_out() == (1, before)
    status, asked = Kubectl(tmp_path / "stuck", "=complete|=failed").roll_out()
    assert (status, asked[-1], asked.count(complete)) == (1, logs, 130)
    assert apply not in asked


def test_the_migration_needs_nothing_of_the_roll_out(overlay: Overlay) -> None:
    first = {
        (one["kind"], one["metadata"]["name"])
        for one in overlay.objects
        if one["metadata"].get("labels", {}).get(COMPONENT) == "migration"
    }
    assert first == {("Job", "migrate"), ("NetworkPolicy", "data")}
    job = overlay("Job")["spec"]
    assert job["template"]["metadata"]["labels"][COMPONENT] == "migration"  # not one of the pods that serve
    assert "envFrom" not in overlay.pods["Job"]["containers"][0]
    assert overlay.pods["Job"]["restartPolicy"] == "Never"
    assert job["activeDeadlineSeconds"] < 130 * 5  # of roll-out.sh


def test_both_languages_have_the_same_commands_and_name_every_key_of_the_secret() -> None:
    english, chinese = ((FOLDER / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    lines = r"^    .+$"
    assert re.findall(lines, english, re.MULTILINE) == re.findall(lines, chinese, re.MULTILINE)
    optional = [name for name, optional in Overlay(ONE_CLUSTER).secret_keys().items() if optional]
    required = [name for name, optional in Overlay(ONE_CLUSTER).secret_keys().items() if not optional]
    assert sorted(re.findall(r"^    ([A-Z_]+)=", english, re.MULTILINE)) == sorted(required)
    assert [name for name in optional if f"`{name}`" not in english] == []
    english, chinese = (re.sub(lines, "", text, flags=re.MULTILINE) for text in (english, chinese))
    assert sorted(re.findall("`[^`]+`", english)) == sorted(re.findall("`[^`]+`", chinese))
