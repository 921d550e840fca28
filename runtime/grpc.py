"""One way to open gRPC channels and servers: limits, keepalive, mutual TLS.

Every channel pings its peer, so a host that vanished is noticed within `KEEPALIVE_S + KEEPALIVE_TIMEOUT_S` even when
nothing is being said. Proxies from the environment are ignored: cluster traffic never leaves the cluster's network.
"""

from collections.abc import Sequence
from pathlib import Path

import grpc
import grpc.aio
import msgspec

from runtime.errors import ConfigError

KEEPALIVE_S = 5.0
KEEPALIVE_TIMEOUT_S = 5.0
MAX_MESSAGE_BYTES = 64 << 20

Options = Sequence[tuple[str, int | str]]


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mutual TLS: paths of PEM files. Both ends present a certificate signed by `ca`."""

    cert: str
    key: str
    ca: str
    server_name: str = ""
    """Name expected in every server's certificate, where servers are addressed by IP."""

    def read(self) -> tuple[bytes, bytes, bytes]:
        """(certificate chain, private key, authority), or ConfigError naming the file."""
        contents = []
        for field in ("cert", "key", "ca"):
            path = Path(getattr(self, field))
            try:
                contents.append(path.read_bytes())
            except OSError as error:
                raise ConfigError(f"tls.{field}={path}: {error.strerror}") from None
        return contents[0], contents[1], contents[2]


def _common_options() -> list[tuple[str, int | str]]:
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", int(1e3 * KEEPALIVE_S)),
        ("grpc.keepalive_timeout_ms", int(1e3 * KEEPALIVE_TIMEOUT_S)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def channel_options(tls: TlsConfig | None) -> Options:
    options = [
        *_common_options(),
        ("grpc.enable_http_proxy", 0),
        # A restarted server is tried again soon, and channels to one address do not share their fate.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if tls is not None and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def server_options() -> Options:
    return [
        *_common_options(),
        # Two servers on one port must be an error, not a coin toss per connection.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", int(1e3 * KEEPALIVE_S / 2)),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def open_channel(address: str, tls: TlsConfig | None) -> grpc.aio.Channel:
    """A channel to `host:port`. It connects at first use; give every call a timeout."""
    options = channel_options(tls)
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    cert, key, ca = tls.read()
    credentials = grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)
    return grpc.aio.secure_channel(address, credentials, options=options)


def open_server() -> grpc.aio.Server:
    return grpc.aio.server(options=server_options())


def bind(server: grpc.aio.Server, host: str, port: int, tls: TlsConfig | None) -> int:
    """Listen on `host:port` (0: a free one) and return the port; ConfigError if it is taken."""
    address = f"{host}:{port}"
    try:
        if tls is None:
            return server.add_insecure_port(address)
        cert, key, ca = tls.read()
        credentials = grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=True)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: {error}") from None
