"""The server itself: who may call, where it listens, what leaves it when something breaks."""

from __future__ import annotations

import logging
import shutil
import socket
import subprocess
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from membank.bank_service.rpc.auth import METHOD_ROLES, Role, TokenAuthenticator
from membank.bank_service.rpc.server import (
    BankServer,
    ServerConfig,
    check_port_free,
    is_loopback,
)
from membank.v1 import admin_service_pb2 as admin_pb
from membank.v1 import block_service_pb2 as block_pb
from membank.v1.block_service_pb2_grpc import BlockServiceStub
from membank.wire import convert
from membank.wire.errors import FailedPreconditionError, InternalError, Reason
from membank.wire.steps import Delete
from rpc_rig import ADMIN_SERVICE, BLOCK_SERVICE, RpcRig, error_of
from shard_rig import RIG_SPEC

TOKENS = """
# token       principal  role
reader-token  rita       reader
trainer-token tom        trainer
operator-token olga      operator
admin-token   ada        admin
"""


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(TOKENS)
    return path


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "tls.crt", folder / "tls.key"
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-noenc", "-days", "1", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        *("-keyout", str(key), "-out", str(cert)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def every_method() -> list[str]:
    services = (
        block_pb.DESCRIPTOR.services_by_name["BlockService"],
        admin_pb.DESCRIPTOR.services_by_name["AdminService"],
    )
    return [
        f"/{service.full_name}/{method.name}" for service in services for method in service.methods
    ]


def test_every_method_has_a_role() -> None:
    assert sorted(METHOD_ROLES) == sorted(every_method())


def call(rig: RpcRig, method: str, metadata: tuple[tuple[str, str], ...]) -> Reason | None:
    """Call `method` with an empty request; return the reason of its refusal."""
    invoke: grpc.UnaryStreamMultiCallable[bytes, bytes] = rig.channel.unary_stream(
        method, request_serializer=lambda _: b"", response_deserializer=lambda data: data
    )
    stream = invoke(b"", metadata=metadata, timeout=10)
    if method.endswith("WatchBlocks"):
        stream.initial_metadata()
        stream.cancel()
        return None
    try:
        for _ in stream:
            pass
    except grpc.RpcError as err:
        return error_of(err).reason
    return None


def test_each_role_may_call_what_its_table_says_and_no_more(
    tmp_path: Path, token_file: Path
) -> None:
    denied = {Reason.ROLE_TOO_LOW}
    with RpcRig(tmp_path / "bank", config=ServerConfig(token_file=token_file)) as rig:
        for role in Role:
            metadata = bearer(f"{role.name.lower()}-token")
            for method, needed in METHOD_ROLES.items():
                if method.endswith("WatchBlocks"):
                    continue
                reason = call(rig, method, metadata)
                assert (reason in denied) is (role < needed), (role, method, reason)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), Reason.NO_CREDENTIALS),
        ((("authorization", "Basic abc"),), Reason.NO_CREDENTIALS),
        (bearer("wrong"), Reason.BAD_CREDENTIALS),
        (bearer("reader-token2"), Reason.BAD_CREDENTIALS),
        (bearer("reader-token"), None),
    ],
)
def test_only_known_tokens_pass(
    tmp_path: Path, token_file: Path, metadata: tuple[tuple[str, str], ...], reason: Reason | None
) -> None:
    with RpcRig(tmp_path / "bank", config=ServerConfig(token_file=token_file)) as rig:
        assert call(rig, f"/{BLOCK_SERVICE}/GetBank", metadata) is reason
        assert call(rig, f"/{BLOCK_SERVICE}/GetTree", metadata) is reason


def test_the_audit_log_names_the_caller(tmp_path: Path, token_file: Path) -> None:
    with RpcRig(tmp_path / "bank", config=ServerConfig(token_file=token_file)) as rig:
        step = convert.step_to_pb(Delete(topic=next(iter(RIG_SPEC.blocks()))))
        request = admin_pb.ApplyTransactionRequest(request_id="r1", steps=[step])
        rig.admin.ApplyTransaction(iter([request]), metadata=bearer("operator-token"))
        assert rig.bank.log.committed.principal == "olga"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no caller"),
        ("a b\n", "write TOKEN"),
        ("a b boss\n", "write TOKEN"),
        ("a b reader\na c admin\n", "repeats"),
    ],
)
def test_a_malformed_token_file_is_refused_without_quoting_it(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(FailedPreconditionError, match=problem):
        TokenAuthenticator.from_file(path)
    path.write_text("s3cret b boss\n")
    with pytest.raises(FailedPreconditionError) as caught:
        TokenAuthenticator.from_file(path)
    assert "s3cret" not in str(caught.value)


def test_a_lone_token_is_an_administrator(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("0123abcd\n")
    principal = TokenAuthenticator.from_file(path).authenticate(bearer("0123abcd"))
    assert (principal.name, principal.role) == ("operator", Role.ADMIN)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_off_loopback_tls_and_tokens_are_needed(host: str, tmp_path: Path) -> None:
    cert, key, tokens = tmp_path / "c", tmp_path / "k", tmp_path / "t"
    with pytest.raises(FailedPreconditionError) as caught:
        ServerConfig(host=host)
    assert caught.value.reason is Reason.INSECURE_ENDPOINT
    with pytest.raises(FailedPreconditionError):
        ServerConfig(host=host, tls_cert=cert, tls_key=key)
    with pytest.raises(FailedPreconditionError):
        ServerConfig(host=host, token_file=tokens)
    ServerConfig(host=host, token_file=tokens, tls_cert=cert, tls_key=key)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_is_loopback(host: str) -> None:
    assert is_loopback(host)


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FailedPreconditionError) as caught:
            BankServer(ServerConfig(port=port), []).start()
        assert caught.value.reason is Reason.PORT_IN_USE
        assert caught.value.metadata["port"] == str(port)


def test_two_servers_never_share_a_port(tmp_path: Path) -> None:
    with RpcRig(tmp_path / "bank") as rig:
        port = int(rig.address.rpartition(":")[2])
        with pytest.raises(FailedPreconditionError) as caught:
            BankServer(ServerConfig(port=port), []).start()
        assert caught.value.reason is Reason.PORT_IN_USE


def test_a_host_of_another_machine_is_refused() -> None:
    # TEST-NET-1: no machine has it.
    with pytest.raises(FailedPreconditionError) as caught:
        check_port_free("192.0.2.77", 7600)
    assert caught.value.reason is Reason.BAD_CONFIG


def test_tls_serves_those_who_trust_the_certificate(
    tmp_path: Path, token_file: Path, tls: tuple[Path, Path]
) -> None:
    cert, key = tls
    config = ServerConfig(tls_cert=cert, tls_key=key, token_file=token_file)
    with RpcRig(tmp_path / "bank", config=config) as rig:
        assert call(rig, f"/{BLOCK_SERVICE}/GetBank", bearer("reader-token")) is None
        with grpc.insecure_channel(rig.address) as plain, pytest.raises(grpc.RpcError):
            BlockServiceStub(plain).GetBank(block_pb.GetBankRequest(), timeout=10)


def test_an_unusable_certificate_is_refused(tmp_path: Path, tls: tuple[Path, Path]) -> None:
    _, key = tls
    with pytest.raises(FailedPreconditionError):
        BankServer(ServerConfig(tls_cert=tmp_path / "none", tls_key=key), []).start()


def test_health_is_told_per_service_and_without_a_token(tmp_path: Path, token_file: Path) -> None:
    with RpcRig(tmp_path / "bank", config=ServerConfig(token_file=token_file)) as rig:
        check = health_pb2_grpc.HealthStub(rig.channel).Check  # type: ignore[attr-defined]  # untyped stub
        for name in ("", BLOCK_SERVICE, ADMIN_SERVICE):
            answer = check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError):
            check(health_pb2.HealthCheckRequest(service="unknown"))


def test_reflection_lists_the_services(tmp_path: Path) -> None:
    with RpcRig(tmp_path / "bank") as rig:
        stub = reflection_pb2_grpc.ServerReflectionStub(rig.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = stub.ServerReflectionInfo(iter([request]))  # type: ignore[operator]  # untyped stub
        answer = next(iter(answers))
        names = {service.name for service in answer.list_services_response.service}
        assert {BLOCK_SERVICE, ADMIN_SERVICE} <= names


def test_a_message_over_the_limit_is_refused(tmp_path: Path) -> None:
    with RpcRig(tmp_path / "bank") as rig:
        request = admin_pb.CreateBankRequest(request_id="a", tree=b"x" * (9 << 20))
        with pytest.raises(grpc.RpcError) as caught:
            rig.admin.CreateBank(request)
        assert error_of(caught.value).reason is Reason.MESSAGE_TOO_LARGE


class _BrokenShard:
    """A shard whose code has a defect."""

    spec = RIG_SPEC
    revision = 0

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> object:
        raise self._error


@pytest.mark.parametrize("error", [ZeroDivisionError, InternalError])
def test_a_defect_leaks_nothing_but_the_id_under_which_it_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    shard = _BrokenShard(error("secret detail"))
    with RpcRig(tmp_path / "bank", shard=shard) as rig, caplog.at_level(logging.ERROR):  # type: ignore[arg-type]  # broken on purpose
        with pytest.raises(grpc.RpcError) as caught:
            list(rig.blocks.FetchBlocks(block_pb.FetchBlocksRequest()))
        seen = error_of(caught.value)
        assert seen.reason is Reason.UNEXPECTED
        assert "secret" not in str(seen)
        assert seen.metadata["request_id"] in caplog.text
        assert "secret detail" in caplog.text
        # The server goes on.
        assert rig.blocks.GetBank(block_pb.GetBankRequest()).spec.name == "rig"
