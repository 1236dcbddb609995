"""Joining a cluster: addresses, and ends that do not answer. Starting one: it is closed to everybody else."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from support.jobs import make_photos, write_manifest
from typer.testing import CliRunner

import smsbatch as sb
from smsbatch.cli.app import app
from smsbatch.cluster import connect as connecting
from smsbatch.cluster.connect import check_answers, cluster_address, connect, disconnect
from smsbatch.commands.doctor import doctor
from smsbatch.manifest import Compute

INTRUDER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("ran", ray.get(ray.remote(lambda: 6 * 7).remote()), flush=True)
"""
IMPATIENT = {  # so that Ray tries once; and that an address on the loopback interface is not replaced
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "where"),
        [
            ("local", None),
            ("head", "head:6379"),
            ("head:7000", "head:7000"),
            ("10.1.2.3:6379", "10.1.2.3:6379"),
            ("[::1]", "[::1]:6379"),
            ("[fd00::7]:7000", "[fd00::7]:7000"),
            ("ray://head", "ray://head:10001"),
            ("ray://head:7000", "ray://head:7000"),
            ("ray://[::1]", "ray://[::1]:10001"),
        ],
    )
    def test_each_has_its_port(self, address: str, where: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        assert cluster_address(Compute(address=address)) == where
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert cluster_address(Compute()) == where

    @pytest.mark.parametrize(("variable", "where"), [(None, None), ("", None), ("auto", "auto")])
    def test_auto_is_what_the_environment_says(
        self, variable: str | None, where: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if variable is not None:
            monkeypatch.setenv("RAY_ADDRESS", variable)
        assert cluster_address(Compute()) == where

    @pytest.mark.parametrize(
        ("address", "told"),
        [
            ("http://head:8265", "but of its dashboard and job server"),
            ("https://head", "but of its dashboard and job server"),
            ("grpc://head:6379", "take host:6379, or ray://host:10001"),
            ("://head:6379", "take host"),
            ("head:port", "take host"),
            ("head:0", "it has no port 0"),
            ("head:70000", "it has no port 70000"),
            ("head:-1", "take host"),
            ("head:6379:1", "take host"),
            ("head:6379/x", "take host"),
            ("a head:6379", "take host"),
            (":6379", "take host"),
            ("", "take host"),
            ("ray://", "take host"),
            ("ray://:10001", "take host"),
            ("ray://me@head", "take host"),
            ("::1", "take host"),
            ("[::1", "take host"),
            ("[]:6379", "take host"),
        ],
    )
    def test_others_are_refused_by_name(self, address: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(sb.RequestError, match=r"compute\.address: .* is no address of a Ray cluster") as refused:
            cluster_address(Compute(address=address))
        assert told in str(refused.value)
        if address:
            monkeypatch.setenv("RAY_ADDRESS", address)
            with pytest.raises(sb.RequestError, match="RAY_ADDRESS: "):
                cluster_address(Compute())

    def test_before_anything_is_planned(self, tmp_path: Path, model: Path, lora: Path) -> None:
        job = write_manifest(tmp_path, model, lora, tmp_path, compute={"pool": "ray", "address": "http://head:8265"})
        with pytest.raises(sb.RequestError, match="http://head:8265 is no address of a Ray cluster"):
            sb.run(sb.load(job))
        assert not (tmp_path / "out").exists()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], str]]:
    """A function that makes a server, which greets with some bytes, and returns its address."""
    monkeypatch.setattr(connecting, "_DEADLINE_S", 0.3)
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr("ray._private.services.resolve_ip_for_localhost", lambda host: host)
    opened: list[socket.socket] = []

    def greet(listening: socket.socket, greeting: bytes) -> None:
        with suppress(OSError):  # the test is over
            while True:
                opened.append(listening.accept()[0])
                opened[-1].sendall(greeting)

    def make(greeting: bytes) -> str:
        opened.append(listening := socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=greet, args=(listening, greeting), daemon=True).start()
        return f"127.0.0.1:{listening.getsockname()[1]}"

    yield make
    for one in opened:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)  # ends `accept`
        one.close()


SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # an empty one, as a gRPC server sends it


class TestEndsThatDoNotAnswer:
    @pytest.mark.parametrize("scheme", ["", "ray://"])
    @pytest.mark.parametrize(
        ("greeting", "told"),
        [
            (None, "refused"),
            (b"", "no answer in 0.3 s"),
            (b"HTTP/1.1 400 Bad Request\r\n", "something else than Ray"),
            (b"SSH-2.0-OpenSSH_9.6\r\n", "something else than Ray"),
        ],
    )
    def test_are_told_within_seconds(
        self, scheme: str, greeting: bytes | None, told: str, server: Callable[[bytes], str]
    ) -> None:
        if greeting is None:
            with socket.create_server(("127.0.0.1", 0)) as closed:
                address = f"{scheme}127.0.0.1:{closed.getsockname()[1]}"
        else:
            address = scheme + server(greeting)
        begun = time.monotonic()
        with pytest.raises(sb.RequestError) as refused:
            connect(Compute(address=address))
        assert time.monotonic() - begun < 5
        message = str(refused.value)
        assert message.startswith(f"compute.address: no Ray cluster at {address} (")
        assert told in message
        assert "--set compute.pool=local" in message

    def test_a_greeting_is_enough_for_a_client(self, server: Callable[[bytes], str]) -> None:
        check_answers(f"ray://{server(SETTINGS)}")

    def test_a_cluster_with_tls_greets_otherwise(
        self, server: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAY_USE_TLS", "1")
        check_answers(f"ray://{server(b'')}")

    def test_no_cluster_on_this_machine(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def none(*_: object) -> str:
            raise ConnectionError("Could not find any running Ray instance.")

        monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", none)
        with pytest.raises(sb.RequestError, match=r"no Ray cluster at auto \(Could not find"):
            check_answers("auto")

    def test_who_waits_is_told_what_for(self, server: Callable[[bytes], str], caplog: pytest.LogCaptureFixture) -> None:
        address = server(b"")
        with caplog.at_level(logging.INFO, "smsbatch"), pytest.raises(sb.RequestError):
            connect(Compute(address=address))
        assert caplog.messages == [f"joining Ray at {address} ..."]

    @pytest.mark.parametrize("as_json", [False, True])
    def test_on_the_command_line_before_the_error(
        self, as_json: bool, server: Callable[[bytes], str], tmp_path: Path, model: Path, lora: Path
    ) -> None:
        address, photos = server(b""), make_photos(tmp_path / "photos", ["a"])
        job = write_manifest(tmp_path, model, lora, photos, compute={"pool": "ray", "address": address})
        done = CliRunner().invoke(app, ["run", str(job), *(["--json"] if as_json else [])])
        assert done.exit_code == 2
        joining = f"joining Ray at {address} ..."
        *before, last = done.stderr.splitlines()
        assert (json.dumps({"message": joining}) if as_json else f"smsbatch: {joining}") in before
        assert f"no Ray cluster at {address}" in last
        assert logging.getLogger("smsbatch").handlers == []

    def test_doctor_says_the_same(
        self, server: Callable[[bytes], str], tmp_path: Path, model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for address in (f"ray://{server(b'')}", server(b"HTTP/1.1 400"), "http://head:8265"):
            job = write_manifest(tmp_path, model, lora, tmp_path, compute={"pool": "ray", "address": address})
            (found,) = (check for check in doctor(sb.load(job)) if check.name == "ray")
            with pytest.raises(sb.RequestError) as refused:
                check_answers(cluster_address(Compute(address=address)) or "")
            assert found.state == "fail"
            assert f"{found.found}; {found.do}" == str(refused.value)


JOINING = """
import sys, smsbatch as sb
from smsbatch.cluster.connect import connect
from smsbatch.manifest import Compute
try:
    connect(Compute(address=sys.argv[1]))
except sb.RequestError as error:
    print(error)
"""


def start(code: str, address: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, address],
        env=os.environ | IMPATIENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class TestACluster:
    """A Ray of our own: who does not know its token runs nothing in it, and the network does not reach it."""

    @pytest.fixture
    def token(self, monkeypatch: pytest.MonkeyPatch) -> str:
        token = secrets.token_hex(32)
        monkeypatch.setattr(connecting.secrets, "token_hex", lambda length: token)
        return token

    def test_is_closed_to_others(
        self, token: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Of two that try to run a task the one with the token can, which shows that the other one has tried."""
        import ray

        monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
        assert connect(Compute())
        try:
            address = ray.get_runtime_context().gcs_address
            knows = start(INTRUDER, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
            others = [start(INTRUDER, address, RAY_AUTH_MODE="token"), start(JOINING, address)]
            ours = psutil.Process().children(recursive=True)
            listening, arguments = set(), ""
            for process in (psutil.Process(), *(one for one in ours if one.pid not in {knows.pid, others[0].pid})):
                listening |= {one.laddr.ip for one in process.net_connections() if one.status == "LISTEN"}
                arguments += " ".join(process.cmdline())
            said = [intruder.communicate(timeout=60) for intruder in (knows, *others)]
            assert said[0][0] == "ran 42\n"
            assert said[1][0] == ""
            assert "InvalidAuthToken" in said[1][1]
            refused, noise = said[2]
            assert f"no Ray cluster at {address} (it does not accept our token); set RAY_AUTH_MODE=token" in refused
            assert noise == ""
            assert ray.get(ray.remote(lambda: 1).remote()) == 1
        finally:
            disconnect()
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
        assert not any(token in text for text in (arguments, *capfd.readouterr()))
        assert os.environ["RAY_AUTH_TOKEN"] == "of another cluster"
        assert "RAY_AUTH_MODE" not in os.environ

    @pytest.mark.slow
    def test_a_run_finishes_beside_intruders(
        self,
        token: str,
        tmp_path: Path,
        model: Path,
        lora: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """None of them has the token; a second run of this process has a Ray of its own."""
        import ray

        known = tmp_path / "home/.ray/auth_token"  # Ray's default, known to all programs of the user
        known.parent.mkdir(parents=True)
        known.write_text("0" * 64)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        intruders: list[subprocess.Popen[str]] = []

        def look(now: object) -> None:
            if not intruders and ray.is_initialized():
                address = ray.get_runtime_context().gcs_address
                intruders.append(start(INTRUDER, address, RAY_AUTH_MODE="disabled"))
                intruders.append(start(INTRUDER, address, RAY_AUTH_MODE="token"))
                intruders.append(start(INTRUDER, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="1" * 64))

        photos = make_photos(tmp_path / "photos", ["a", "b"])
        job = write_manifest(tmp_path, model, lora, photos, compute={"pool": "ray", "workers": 1})
        assert sb.run(sb.load(job), look).succeeded == 2
        assert [intruder.communicate(timeout=60)[0] for intruder in intruders] == [""] * 3
        assert all(intruder.returncode for intruder in intruders)
        assert sb.run(sb.load(job, [f"output.path={tmp_path / 'again'}"])).succeeded == 2
        texts = (file.read_text("latin-1") for file in tmp_path.rglob("*") if file.is_file())
        assert not any(token in text for text in (*texts, *capfd.readouterr()))
