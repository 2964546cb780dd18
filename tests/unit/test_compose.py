"""docker-compose.yml is valid, holds no secret, and confines every container.

Validity is `docker compose config`'s word where the plugin is installed, and always the compose
specification's own JSON schema, as check-jsonschema ships it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.stack.state import REPOSITORY
from vsql_shared.config.load import parse_settings

COMPOSE = REPOSITORY / "docker-compose.yml"
DOCKERFILES = [REPOSITORY / "producers" / "Dockerfile", REPOSITORY / "consumers" / "Dockerfile"]
OURS = ("producer-a", "producer-b", "consumer-a", "consumer-b", "syncctl-a", "syncctl-b")


def _compose() -> dict[str, Any]:
    loaded = yaml.safe_load(COMPOSE.read_text())
    assert isinstance(loaded, dict)
    return loaded


SERVICES: dict[str, dict[str, Any]] = _compose()["services"]


def _has_compose_plugin() -> bool:
    try:
        done = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def test_the_file_follows_the_compose_specification() -> None:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(COMPOSE),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_misspelt_key_would_be_found(tmp_path: Path) -> None:
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE.read_text().replace("cap_drop:", "cap_dorp:"))
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(broken),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cap_dorp" in done.stdout + done.stderr


@pytest.mark.skipif(not _has_compose_plugin(), reason="docker compose is not installed")
def test_docker_compose_accepts_the_file() -> None:
    command = ["docker", "compose", "--file", str(COMPOSE), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_without_root_capabilities_and_writable_image(name: str) -> None:
    service = SERVICES[name]
    if name not in OURS:  # the user of ours is set in the image
        assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ulimits"]["core"] == 0


@pytest.mark.parametrize("name", [name for name in SERVICES if name not in OURS])
def test_every_server_says_when_it_is_healthy(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"]


def test_no_secret_stands_in_the_file() -> None:
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|TOKEN|PIN|KEY", variable):
                assert str(value).startswith("/run/secrets/"), variable
    assert all(set(secret) == {"file"} for secret in _compose()["secrets"].values())


def test_nothing_listens_beyond_this_machine() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_kafka_reaches_no_database() -> None:
    databases = set(SERVICES["postgres-a"]["networks"]) | set(SERVICES["postgres-b"]["networks"])
    assert not set(SERVICES["kafka"]["networks"]) & databases


def test_every_file_and_volume_the_services_mount_is_there() -> None:
    volumes = set(_compose()["volumes"])
    for name, service in SERVICES.items():
        for source in (mount.split(":")[0] for mount in service.get("volumes", [])):
            assert (REPOSITORY / source).exists() if source.startswith(".") else source in volumes, name


@pytest.mark.parametrize(("letter", "number"), [("a", 1), ("b", 2)])
def test_the_nodes_configuration_is_valid_and_fits_the_services(letter: str, number: int) -> None:
    path = REPOSITORY / "compose" / f"node-{letter}.toml"
    settings = parse_settings(path.read_bytes(), source=path, env={})
    assert (settings.cluster.node_id, settings.cluster.node_name) == (number, f"node-{letter}")
    assert settings.connection.host in SERVICES
    assert settings.kafka.bootstrap_servers == "kafka:9092"
    assert str(settings.connection.password_file) == f"/run/secrets/postgres_{letter}_password"
    assert settings.metrics.producer_addr.endswith(":9464")
    assert settings.metrics.consumer_addr.endswith(":9465")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_the_images_run_one_service_without_root(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["10001:10001"]
    package = f"vsql_{path.parent.name}"
    assert f'ENTRYPOINT ["python", "-m", "{package}"]' in text
    port = "9464" if package == "vsql_producers" else "9465"
    assert f"http://127.0.0.1:{port}/healthz" in text


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_the_images_copy_only_what_the_build_context_lets_in(path: Path) -> None:
    allowed = set(re.findall(r"^!(.+)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE))
    for line in re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.MULTILINE):
        assert set(line.split()[:-1]) <= allowed, line
