"""Shell. The local cluster of docker-compose.yml: everything that can be checked without a
container engine, and every command line as a process.

The services' commands and environments are read from docker-compose.yml. Only hosts, ports, paths
and the engine are replaced. Debian packages: docker-compose, prometheus (with promtool). Without
them their tests are skipped, except in CI, where they fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from shared.config.settings_file import load_settings
from tests.harness import ROOT, make_adapter
from tests.store_servers import free_port

DEPLOY = ROOT / "deploy"
CLUSTER = DEPLOY / "cluster"
CONFIG = CLUSTER / "loraplex.yaml"
DASHBOARD = DEPLOY / "grafana/dashboards/loraplex.json"
SECRET = "an-example-link-secret-for-tests"
WAIT_S = 60.0
POLL_S = 0.05
STOP_S = 10.0
SERIES = re.compile(r"\bloraplex_\w+")
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::?[-?](?P<default>[^}]*))?\}")


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is not installed (Debian packages: docker-compose, prometheus)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def run(
    *argv: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        cwd=cwd,
        env=dict(env) if env is not None else None,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


def passed(*argv: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    done = run(*argv, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compose_file() -> dict[str, Any]:
    text = (ROOT / "docker-compose.yml").read_text()
    given = {"LORAPLEX_LINK_SECRET": SECRET}
    file: dict[str, Any] = yaml.safe_load(
        VARIABLE.sub(lambda m: given.get(m["name"], m["default"] or ""), text)
    )
    return file


SERVICES: dict[str, dict[str, Any]] = compose_file()["services"]


def started_by(*names: str) -> set[str]:
    """The services that `docker-compose up NAMES` starts."""
    return set(names).union(*(started_by(*SERVICES[name].get("depends_on", ())) for name in names))


def compose_env() -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "LORAPLEX_LINK_SECRET": SECRET,
    }


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [[], ["--profile", "cpu"]], ids=["gpu", "cpu"])
@pytest.mark.parametrize(
    "command", [["docker-compose"], ["docker", "compose"]], ids=["docker-compose", "docker compose"]
)
def test_compose_accepts_the_file_and_reads_the_same_commands(
    command: list[str], profile: list[str]
) -> None:
    if command == ["docker", "compose"] and (
        not shutil.which("docker") or run("docker", "compose", "version").returncode
    ):
        pytest.skip("the compose plugin is not installed; docker-compose is checked")
    tool(command[0])
    read = yaml.safe_load(passed(*command, *profile, "config", env=compose_env()))
    if profile:
        assert set(read["services"]) == set(SERVICES)
    for name, service in read["services"].items():
        assert service.get("command") == SERVICES[name].get("command"), name


def test_compose_says_how_to_make_the_link_secret_when_there_is_none() -> None:
    done = run(
        tool("docker-compose"),
        "config",
        env={k: v for k, v in compose_env().items() if k != "LORAPLEX_LINK_SECRET"},
    )
    assert done.returncode != 0 and "openssl rand -hex 32" in done.stderr


def test_the_documented_commands_start_gpu_workers_and_with_the_profile_cpu_workers() -> None:
    default = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert started_by(*default) == default == set(SERVICES) - {"worker-cpu-0", "worker-cpu-1"}
    for file in ("docker-compose.yml", "docs/DEPLOY.md"):
        lines = [
            line.partition("up ")[2]
            for line in (ROOT / file).read_text().splitlines()
            if "docker-compose --profile cpu up" in line
        ]
        assert lines, file
        for line in lines:
            named = [word for word in line.partition("   #")[0].split() if not word.startswith("-")]
            assert started_by(*named) == set(SERVICES) - {"worker-0", "worker-1"}, (file, line)


def test_only_gateway_prometheus_and_grafana_publish_ports_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"gateway", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert compose_file()["networks"]["cluster"]["internal"] is True
    assert not {"store", "load-adapters", "worker-0", "worker-1"} & {
        n for n, s in SERVICES.items() if "front" in s["networks"]
    }


def test_compose_waits_as_long_for_our_services_as_they_may_drain() -> None:
    g = load_settings(str(CONFIG)).gateway
    for name, service in SERVICES.items():
        if service["image"].startswith("loraplex/") and name != "load-adapters":
            assert service["stop_grace_period"] == f"{g.drain_s + g.kill_s:g}s", name
            assert service["restart"] == "unless-stopped" and "healthcheck" in service, name


def test_no_secret_stands_in_the_files() -> None:
    lines = [
        *(ROOT / "docker-compose.yml").read_text().splitlines(),
        *(CLUSTER / "example.env").read_text().splitlines(),
    ]
    given = [
        re.split(r": |=", line.strip(), maxsplit=1)
        for line in lines
        if re.match(r"\s*\w*(SECRET|PASSWORD|_KEYS?)\w*(: |=)", line)
    ]
    assert given and all(value == "" or value.startswith("${") for _, value in given), given


def test_every_image_is_pinned_and_every_mounted_file_exists() -> None:
    volumes = compose_file()["volumes"]
    for name, service in SERVICES.items():
        assert re.search(r":v?(RELEASE\.)?\d[\w.-]+$", service["image"]), service["image"]
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in volumes, (
                name,
                mount,
            )


# ---- Dockerfile ----------------------------------------------------------------------------------


def stages() -> dict[str, list[tuple[str, str]]]:
    """Target -> its (instruction, arguments). Those of the stages below it come first."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    found: dict[str, list[tuple[str, str]]] = {}
    steps: list[tuple[str, str]] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, word, stage = rest.split()
            assert word == "AS" and (base in found or re.search(r":v?\d", base)), line
            found[stage] = steps = list(found.get(base, ()))
        else:
            assert instruction in {
                "ARG",
                "CMD",
                "COPY",
                "ENTRYPOINT",
                "ENV",
                "EXPOSE",
                "HEALTHCHECK",
                "RUN",
                "USER",
                "WORKDIR",
            }, line
            steps.append((instruction, rest.strip()))
    return found


def test_the_dockerfile_copies_only_what_the_repository_has_and_the_builder_gets() -> None:
    sent = [
        line[1:]
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for stage, steps in stages().items():
        sources = [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]
        for source in sources:
            assert (ROOT / source).exists(), f"{stage}: {source}"
            assert any(source == path or source.startswith(path + "/") for path in sent), (
                f"{stage}: {source} is not sent to the builder"
            )


def imported_by(name: str, found: set[str]) -> set[str]:
    """The files of the benchmarks that a program needs, itself included."""
    path = ROOT / name.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() and not found else path.with_suffix(".py")
    source = file.relative_to(ROOT).as_posix()
    if not file.is_file() or source in found:
        return found
    found.add(source)
    for imported in re.findall(r"^from (bench[.\w]*) import", file.read_text(), re.M):
        imported_by(imported, found)
    return found


def test_every_image_has_the_benchmarks_that_the_command_starts() -> None:
    cli = "".join(p.read_text() for p in (ROOT / "gateway" / "cli").glob("*.py"))
    programs = set(re.findall(r'command\("(bench[.\w]+)"', cli))
    assert {"bench.load", "bench.what_if"} <= programs
    needed = {file for program in programs for file in imported_by(program, set())}
    for stage in ("gateway", "worker-cpu", "worker-gpu"):
        copied = [rest.split()[:-1] for name, rest in stages()[stage] if name == "COPY"]
        sources = tuple(source for some in copied for source in some)
        absent = [f for f in needed if f not in sources and not f.startswith(sources)]
        assert absent == [], stage


def test_every_target_that_compose_builds_runs_as_its_own_user_and_has_its_files() -> None:
    for name, service in SERVICES.items():
        if "build" not in service:
            continue
        steps = stages()[service["build"]["target"]]
        assert [rest for instruction, rest in steps if instruction == "USER"][-1:] == [
            "loraplex"
        ], name
        copied = " ".join(rest for instruction, rest in steps if instruction == "COPY")
        mounted = " ".join(service.get("volumes", ()))
        for word in [*service["command"], *service.get("healthcheck", {}).get("test", ())]:
            if word.startswith("/opt/loraplex/"):
                assert word.removeprefix("/opt/loraplex/") in copied, (name, word)
            elif word.startswith("/"):
                assert f":{word}:ro" in mounted, (name, word)


def test_the_gateway_image_checks_its_health_as_compose_does() -> None:
    check = next(rest for instruction, rest in stages()["gateway"] if instruction == "HEALTHCHECK")
    assert ["CMD", *json.loads(check.partition("CMD ")[2])] == SERVICES["gateway"]["healthcheck"][
        "test"
    ]


# ---- processes -----------------------------------------------------------------------------------


def until(condition: Callable[[], bool], what: str, *services: Service) -> None:
    """Polls, because a foreign process offers no event to wait for."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        for service in services:
            assert service.process.poll() is None, (
                f"{service.name} ended:\n{service.log.read_text()}"
            )
        assert time.monotonic() < deadline, f"{what} did not come true\n" + "\n".join(
            s.log.read_text() for s in services
        )
        time.sleep(POLL_S)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        return str(answer.read().decode())


def answers(url: str) -> bool:
    try:
        get(url)
    except OSError:
        return False
    return True


@dataclasses.dataclass
class Service:
    """A service of the compose file as a process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self, sig: signal.Signals = signal.SIGTERM, timeout_s: float = STOP_S) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(timeout_s)


class Local:
    """The cluster on loopback. `hosts` maps words of the compose command lines to what they are
    here.
    """

    def __init__(self, folder: Path, store_url: str, link_host: str = "127.0.0.1") -> None:
        self.folder = folder
        self.port, self.control, self.data = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        config = yaml.safe_load(CONFIG.read_text())
        (model,) = config["llm_configs"]
        model |= {
            "llm_engine": "sim",
            "engine_kwargs": {"max_loras": model["engine_kwargs"]["max_loras"]},
        }
        model["lora_config"]["store"]["endpoint_url"] = store_url
        config["gateway"] |= {"host": "127.0.0.1", "port": self.port}
        config["gateway"]["link"] |= {
            "control": f"tcp://{link_host}:{self.control}",
            "data": f"tcp://{link_host}:{self.data}",
        }
        self.config = folder / "loraplex.yaml"
        self.config.write_text(yaml.safe_dump(config))
        self.hosts = {
            "loraplex": str(Path(sys.executable).with_name("loraplex")),
            "python3": sys.executable,
            "/etc/loraplex/loraplex.yaml": str(self.config),
            "/opt/loraplex/healthy.py": str(CLUSTER / "healthy.py"),
            "/opt/loraplex/load_adapters.py": str(CLUSTER / "load_adapters.py"),
            "/adapters": str(folder / "adapters"),
            "http://store:9000": store_url,
            "tcp://gateway:9750": f"tcp://127.0.0.1:{self.control}",
            "http://gateway:8000": self.url,
            "http://127.0.0.1:8000": self.url,
        }

    def argv(self, words: Sequence[str]) -> list[str]:
        return [self.hosts.get(word, word) for word in words]

    def env(self, name: str) -> dict[str, str]:
        # AWS_*: nothing of this host's but what compose gives.
        given = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder / name),
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        return given | {
            key: str(value) for key, value in SERVICES[name].get("environment", {}).items()
        }

    @contextlib.contextmanager
    def service(self, name: str, argv: Sequence[str] | None = None) -> Iterator[Service]:
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            command = argv or self.argv(SERVICES[name]["command"])
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.env(name),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        service = Service(name, process, log)
        try:
            yield service
        finally:
            service.stop(signal.SIGKILL)

    def run_once(self, name: str) -> str:
        return passed(*self.argv(SERVICES[name]["command"]), cwd=self.folder, env=self.env(name))

    def is_healthy(self, name: str) -> bool:
        check = SERVICES[name]["healthcheck"]["test"]
        assert check[0] == "CMD"
        return run(*self.argv(check[1:]), env=self.env(name)).returncode == 0

    def chat(self, model: str) -> str:
        body = json.dumps(
            {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}
        ).encode()
        asked = urllib.request.Request(
            self.url + "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(asked, timeout=WAIT_S) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as exc:
            said, logs = exc.read().decode(), sorted(self.folder.glob("*.log"))
            lines = (f"{log.stem}: {line}" for log in logs for line in log.read_text().splitlines())
            raise AssertionError("\n".join((f"{model}: {exc.code} {said}", *lines))) from exc


@dataclasses.dataclass
class Cluster:
    local: Local
    gateway: Service
    workers: tuple[Service, ...]


@contextlib.contextmanager
def running(local: Local, workers: Sequence[str]) -> Iterator[Cluster]:
    """The init job, the gateway and the workers, in the order of `depends_on`."""
    for name in ("pirate", "haiku"):
        make_adapter(local.folder / "adapters", name)
    local.run_once("load-adapters")
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(local.service("gateway"))
        until(lambda: answers(local.url + "/health"), "/health", gateway)
        started = tuple(stack.enter_context(local.service(name)) for name in workers)
        for worker in started:
            until(
                lambda worker=worker: local.is_healthy(worker.name),
                f"the health of {worker.name}",
                gateway,
                worker,
            )  # type: ignore[misc]
        yield Cluster(local, gateway, started)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, moto_url: str) -> Iterator[Cluster]:
    """Both pairs of workers. Every command line of an image of ours runs."""
    local = Local(tmp_path_factory.mktemp("cluster"), moto_url)
    with running(local, ["worker-0", "worker-1", "worker-cpu-0", "worker-cpu-1"]) as cluster:
        yield cluster


def test_the_init_job_waits_for_a_store_that_starts_later_and_gives_up_on_a_folder_without_adapters(
    tmp_path: Path, moto_url: str
) -> None:
    local = Local(tmp_path, moto_url)
    (tmp_path / "adapters").mkdir()
    empty = run(*local.argv(SERVICES["load-adapters"]["command"]), env=local.env("load-adapters"))
    assert empty.returncode == 1 and "no folder with an adapter_config.json" in empty.stdout
    make_adapter(tmp_path / "adapters", "pirate")
    port = free_port()
    late = Local(tmp_path, f"http://127.0.0.1:{port}")
    moto = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with late.service("load-adapters") as job:
        until(lambda: "waiting for the store" in job.log.read_text(), "waiting", job)
        with late.service("store", moto):
            assert job.process.wait(WAIT_S) == 0, job.log.read_text()
    assert "made the bucket adapters" in job.log.read_text()


def test_the_adapters_that_the_init_job_loads_are_served_from_the_store(cluster: Cluster) -> None:
    local = cluster.local
    until(
        lambda: len(json.loads(get(local.url + "/v1/models"))["data"]) == 3,
        "the listing",
        cluster.gateway,
    )
    assert {model["id"] for model in json.loads(get(local.url + "/v1/models"))["data"]} == {
        "demo",
        "demo:pirate",
        "demo:haiku",
    }
    assert get(local.url + "/ready")
    for model, label in (
        ("demo", "[base=demo adapter=- "),
        ("demo:pirate", "[base=demo adapter=pirate "),
        ("demo:haiku", "[base=demo adapter=haiku "),
    ):
        assert local.chat(model).startswith(label), local.chat(model)


def test_loading_the_adapters_again_changes_none_of_them(cluster: Cluster) -> None:
    before = cluster.local.chat("demo:pirate")
    assert "made the bucket" not in cluster.local.run_once("load-adapters")
    assert cluster.local.chat("demo:pirate") == before  # the text names the adapter's digest


def test_a_worker_that_the_gateway_does_not_know_is_unhealthy(cluster: Cluster) -> None:
    check = [*cluster.local.argv(SERVICES["worker-0"]["healthcheck"]["test"][1:-1]), "worker-9"]
    assert run(*check).returncode == 1
    assert run(*check[:-2], f"http://127.0.0.1:{free_port()}").returncode == 1


def test_sigterm_ends_gateway_and_worker_in_order_within_the_grace_period(
    tmp_path: Path, moto_url: str
) -> None:
    grace_s = float(SERVICES["gateway"]["stop_grace_period"].removesuffix("s"))
    with running(Local(tmp_path, moto_url), ["worker-0"]) as c:
        assert [s.stop(timeout_s=grace_s) for s in (*c.workers, c.gateway)] == [0, 0], (
            c.gateway.log.read_text()
        )


def test_a_worker_reaches_the_data_socket_at_the_address_it_was_given_for_the_gateway(
    tmp_path: Path, moto_url: str
) -> None:
    """A gateway that is bound to 0.0.0.0 cannot tell its workers where it is. To them 0.0.0.0 is
    their own host.
    """
    local = Local(tmp_path, moto_url, link_host="0.0.0.0")
    local.hosts["tcp://gateway:9750"] = f"tcp://127.0.0.2:{local.control}"
    with running(local, ["worker-0"]) as c:
        assert local.chat("demo")
        found = psutil.Process(c.workers[0].process.pid).net_connections(kind="tcp")
        assert {
            link.raddr.ip for link in found if link.raddr and link.raddr.port == local.data
        } == {"127.0.0.2"}


# ---- metrics -------------------------------------------------------------------------------------


def exported(metrics: str) -> set[str]:
    """Every series name of an exposition, even those without a sample yet."""
    suffixes = {
        "counter": ("",),
        "gauge": ("",),
        "histogram": ("_bucket", "_count", "_sum"),
        "summary": ("", "_count", "_sum"),
    }
    types = re.findall(r"^# TYPE (\w+) (\w+)$", metrics, re.MULTILINE)
    return {name + suffix for name, kind in types for suffix in suffixes[kind]}


def dashboard_exprs() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def alert_exprs() -> list[str]:
    groups = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def test_dashboard_and_alerts_name_only_series_that_the_gateway_exports(cluster: Cluster) -> None:
    series = exported(get(cluster.local.url + "/metrics"))
    variables = [v["definition"] for v in json.loads(DASHBOARD.read_text())["templating"]["list"]]
    named = {
        name
        for expr in [*dashboard_exprs(), *alert_exprs(), *variables]
        for name in SERIES.findall(expr)
    }
    assert len(named) > 10 and named <= series, named - series


def test_dashboard_panels_use_the_provisioned_datasource_and_do_not_overlap() -> None:
    provisioned = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"]
    uids = {source["uid"] for source in provisioned}
    cells: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        assert {
            panel["datasource"]["uid"],
            *(t["datasource"]["uid"] for t in panel["targets"]),
        } <= uids
        at = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & mine and at["x"] + at["w"] <= 24, panel["title"]
        cells |= mine


def test_promtool_accepts_config_and_rules_and_sees_every_alert_fire() -> None:
    promtool = tool("promtool")
    folder = DEPLOY / "prometheus"
    passed(promtool, "check", "config", "prometheus.yml", cwd=folder)
    passed(promtool, "check", "rules", "alerts.yml", cwd=folder)
    passed(promtool, "test", "rules", "alerts.test.yml", cwd=folder)
    alerts = set(re.findall(r"alert: (\w+)", (folder / "alerts.yml").read_text()))
    fired = yaml.safe_load((folder / "alerts.test.yml").read_text())["tests"]
    assert alerts == {
        case["alertname"]
        for test in fired
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real Prometheus that runs the compose service's command line and scrapes the
    running gateway.
    """
    program = tool("prometheus")
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    text = (DEPLOY / "prometheus/prometheus.yml").read_text()
    assert "gateway:8000" in text and "127.0.0.1:9090" in text
    text = text.replace("gateway:8000", cluster.local.url.removeprefix("http://")).replace(
        "127.0.0.1:9090", f"127.0.0.1:{port}"
    )
    (folder / "prometheus.yml").write_text(
        re.sub(r"(scrape|evaluation)_interval: \d+s", r"\1_interval: 1s", text)
    )
    shutil.copy(DEPLOY / "prometheus/alerts.yml", folder)
    paths = {"/etc/prometheus": str(folder), "/prometheus": str(folder / "data")}
    words = [
        re.sub(r"=(/etc/prometheus|/prometheus)", lambda m: "=" + paths[m[1]], word)
        for word in SERVICES["prometheus"]["command"]
    ]
    with cluster.local.service(
        "prometheus", [program, *words, f"--web.listen-address=127.0.0.1:{port}"]
    ) as service:
        until(lambda: answers(f"http://127.0.0.1:{port}/-/ready"), "Prometheus", service)
        yield f"http://127.0.0.1:{port}"


def query(prometheus: str, expr: str) -> list[dict[str, Any]]:
    reply = json.loads(get(f"{prometheus}/api/v1/query?query={urllib.parse.quote(expr)}"))
    assert reply["status"] == "success", reply
    result = reply["data"]["result"]
    assert isinstance(result, list)
    return result


def test_prometheus_scrapes_the_gateway_and_sees_its_workers(
    cluster: Cluster, prometheus: str
) -> None:
    until(
        lambda: any(r["value"][1] == "1" for r in query(prometheus, 'up{job="loraplex-gateway"}')),
        "up",
        cluster.gateway,
    )
    until(
        lambda: (
            len(query(prometheus, 'loraplex_worker_up{base="demo", state="serving"} == 1')) == 4
        ),
        "the workers",
        cluster.gateway,
    )
    assert [r["metric"]["base"] for r in query(prometheus, "loraplex_queue_depth == 0")] == ["demo"]


def test_prometheus_can_evaluate_every_expression_of_dashboard_and_alerts(
    cluster: Cluster, prometheus: str
) -> None:
    cluster.local.chat("demo:pirate")
    until(
        lambda: bool(query(prometheus, "loraplex_requests_total")),
        "the first request",
        cluster.gateway,
    )
    for expr in [*dashboard_exprs(), *alert_exprs()]:
        query(prometheus, expr.replace("$base", ".*").replace("$__rate_interval", "1m"))

    def rules() -> list[dict[str, Any]]:
        groups = json.loads(get(f"{prometheus}/api/v1/rules"))["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    until(
        lambda: all(rule["health"] != "unknown" for rule in rules()),
        "the evaluation of the rules",
        cluster.gateway,
    )
    assert [(rule["name"], rule["health"]) for rule in rules() if rule["health"] != "ok"] == []


def test_a_command_line_in_the_operators_guide_names_only_what_exists() -> None:
    text = (ROOT / "docs/DEPLOY.md").read_text()
    for path in re.findall(r"(?<![\w/])(?:deploy|examples|docs)/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"^(loraplex [^\n#]+)", text, re.MULTILINE):
        words = shlex.split(command)
        done = run(str(Path(sys.executable).with_name("loraplex")), *words[1:], "--help")
        assert done.returncode == 0, (command, done.stderr)
