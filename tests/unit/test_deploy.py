"""deploy/ as far as it can be checked without Docker, Grafana or a Prometheus."""

import asyncio
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from steer_server.api.tls import TlsFiles
from steer_server.config import resolve
from steer_server.metrics import Metrics
from tests.prometheus import promql
from tests.unit.certificates import Authority
from tests.unit.serving import serving

REPO = Path(__file__).parents[2]
DEPLOY = REPO / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
OF_VLLM_IMAGE = {"msgspec", "numba", "numpy", "prometheus-client", "safetensors", "uvloop"}


def package_name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower()


def mounts(service: str) -> dict[str, str]:
    """Host path by path in the container, for the service's bind mounts; defaults in."""
    found = {}
    for entry in COMPOSE["services"][service]["volumes"]:
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", entry)
        host, inside, *mode = text.split(":")
        if host.startswith("."):
            assert mode == ["ro"], f"{entry} can be written to"
            found[inside] = host
    return found


def test_the_dashboard_is_what_its_script_makes() -> None:
    command = [sys.executable, str(DEPLOY / "grafana" / "make_dashboard.py"), "--check"]

    result = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert result.returncode == 0, result.stderr


def test_queries_ask_only_for_steer_and_grpc_metrics_that_are_defined() -> None:
    defined = {metric.name for metric in Metrics("model", [], {}).registry.collect()}
    queries = promql.panel_queries() + promql.variable_queries() + promql.rules()
    used = {name for query in queries for name in promql.metric_names(query.expression)}

    ours = {promql.family(name) for name in used if name.startswith(("steer_", "grpc_"))}

    assert len(ours) > 10
    assert ours - defined == set()


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (le, job) (rate(a_bucket{job=~"$job", x="y(z)"}[5m])) > 0', {"a_bucket"}),
        ("a / on (b, c) group_left (d) e or vllm:f_perc * 2", {"a", "e", "vllm:f_perc"}),
        ('histogram_quantile(0.5, up{x="[1m]"}) and absent(steer:g)', {"up", "steer:g"}),
    ],
)
def test_metric_names_are_found_in_promql(expression: str, names: set[str]) -> None:
    assert promql.metric_names(expression) == names


def test_the_servers_configuration_is_valid_and_its_paths_are_mounted() -> None:
    config = resolve({"config": str(DEPLOY / "server.toml")}, {})
    inside = mounts("server")

    folders = [Path(config.model), *(source.folder for source in config.dictionaries)]
    assert [folder for folder in folders if str(folder.parent) not in inside] == []
    names = {source.name for source in config.dictionaries}
    assert {dictionary for dictionary, _ in config.watch} == names
    assert COMPOSE["services"]["server"]["environment"]["STEER_CONFIG"] in inside


def test_compose_publishes_the_servers_ports_on_loopback_only_and_prometheus_scrapes_one() -> None:
    config = resolve({"config": str(DEPLOY / "server.toml")}, {})
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())

    published = [port for service in COMPOSE["services"].values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert config.insecure, "nobody outside this machine reaches the ports"
    for port in (config.port, config.metrics_port):
        assert f"127.0.0.1:{port}:{port}" in COMPOSE["services"]["server"]["ports"]
    assert f"EXPOSE {config.port} {config.metrics_port}" in DOCKERFILE
    (job,) = scrape["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{config.metrics_port}"]}]
    assert job["sample_limit"] > 0


@pytest.mark.parametrize("client_ca", [False, True])
async def test_the_health_check_speaks_tls_with_a_certificate_for_another_name(
    tmp_path: Path, client_ca: bool
) -> None:
    authority = Authority(tmp_path)
    server, client = authority.issue("server", "steer.example"), authority.issue("client")
    environ = {"STEER_HEALTH_CA": str(authority.cert), "STEER_HEALTH_NAME": "steer.example"}
    if client_ca:
        environ |= {"STEER_HEALTH_CERT": str(client.cert), "STEER_HEALTH_KEY": str(client.key)}
    files = TlsFiles(server.cert, server.key, authority.cert if client_ca else None)

    async with serving(tls=files) as service:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(DEPLOY / "healthcheck.py"), service.target),
            env={**os.environ, **environ},
        )
        assert await process.wait() == 0


def test_what_compose_mounts_from_deploy_is_there() -> None:
    for service in COMPOSE["services"]:
        for host in mounts(service).values():
            if not host.startswith(".."):
                assert (DEPLOY / host).exists(), host


def test_grafana_reads_the_dashboard_and_the_prometheus_of_compose() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((provisioning / "dashboards/steer.yaml").read_text())["providers"]

    assert source["url"] == "http://prometheus:9090"
    folder = mounts("grafana")[provider["options"]["path"]]
    assert (DEPLOY / folder / "features.json").is_file()


def test_images_have_versions_and_containers_wait_long_enough_to_drain() -> None:
    images = [service["image"] for service in COMPOSE["services"].values()]
    images += re.findall(r"^ARG \w+_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    config: dict[str, Any] = tomllib.loads((DEPLOY / "server.toml").read_text())

    assert len(images) == 5
    assert [image for image in images if not re.search(r":v?[0-9]+\.[0-9]+", image)] == []
    grace = int(COMPOSE["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert grace > resolve({"config": str(DEPLOY / "server.toml")}, {}).drain_seconds
    assert "drain_seconds" not in config


def test_the_build_context_has_what_the_dockerfile_copies() -> None:
    ignore = (REPO / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
        for name in line.split()
    }

    assert copied == let_in
    assert [name for name in copied if not (REPO / name).exists()] == []


def test_the_cuda_image_gets_every_dependency_that_it_lacks() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["server"]]
    lines = (DEPLOY / "cuda.txt").read_text().splitlines()
    pinned = {package_name(line) for line in lines if "==" in line}

    assert {package_name(entry) for entry in needed} - OF_VLLM_IMAGE <= pinned
    lock = (REPO / "requirements" / "cpu.lock").read_text().splitlines()
    assert {line.split()[0] for line in lines if "==" in line} <= set(lock)
