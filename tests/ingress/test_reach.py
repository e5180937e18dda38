"""Whom a server on a loopback address answers over gRPC, which Serve binds to every address."""

from __future__ import annotations

import grpc
import pytest

from serve_app.errors import ForbiddenError
from serve_app.ingress.protocols.open_inference import messages
from serve_app.ingress.reach import check_peer, is_loopback, serves_this_machine_alone
from tests.ingress.edge import FakeService
from tests.ingress.test_protocols_open_inference import Context, Servicer, request_of, stream_of

HERE = ["ipv4:127.0.0.1:52000", "ipv6:%5B::1%5D:52000", "ipv6:[::1]:52000", "ipv6:[::ffff:127.0.0.1]:5", "unix:/x"]
ELSEWHERE = ["ipv4:10.0.0.7:52000", "ipv6:%5Bfe80::1%5D:52000", "ipv6:[::ffff:10.0.0.7]:5", "", "ipv4:", "127.0.0.1"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "::ffff:127.0.0.1"])
def test_a_loopback_address_means_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "::ffff:10.1.2.3", "example.org", ""])
def test_any_other_may_mean_more(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("peer", HERE)
def test_callers_of_this_machine_are_known(peer: str) -> None:
    check_peer(peer)


@pytest.mark.parametrize("peer", ELSEWHERE)
def test_callers_from_elsewhere_are_refused(peer: str) -> None:
    with pytest.raises(ForbiddenError):
        check_peer(peer)


class From(Context):
    """A call of a peer."""

    def __init__(self, peer: str) -> None:
        super().__init__()
        self._peer = peer

    def peer(self) -> str:
        return self._peer


@pytest.mark.parametrize("local_only", [False, True])
async def test_a_server_of_this_machine_alone_answers_nothing_to_others(service: FakeService, local_only: bool) -> None:
    servicer = Servicer(service)
    servicer.open_inference.local_only = local_only
    near, far = From(HERE[0]), From(ELSEWHERE[0])
    for context in (near, far):
        await servicer.ModelInfer(request_of("a"), context)
    assert near.code is grpc.StatusCode.OK
    assert far.code is (grpc.StatusCode.PERMISSION_DENIED if local_only else grpc.StatusCode.OK)
    assert len(service.requests) == (1 if local_only else 2)
    await servicer.ServerLive(messages.ServerLiveRequest(), far)
    far = From(ELSEWHERE[0])
    streamed = [each async for each in servicer.ModelStreamInfer(stream_of(request_of("a")), far)]
    assert (len(streamed), far.code) == ((0, grpc.StatusCode.PERMISSION_DENIED) if local_only else (1, near.code))


def test_without_a_serve_nothing_is_known() -> None:
    assert not serves_this_machine_alone()
