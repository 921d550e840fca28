"""`python -m router`: the process clients talk to."""

import argparse
import sys

from router.config import RouterConfig
from runtime import config as configuration
from runtime import logging as logs
from runtime import serve
from runtime.errors import ConfigError

DESCRIPTION = """\
Tandem's router: clients speak OpenAI's (or Anthropic's) HTTP API to it; prefill and decode nodes register with it over
gRPC, or are listed with --prefill and --decode. It picks a pair of ranks per request, sends both legs, streams the
answer, and sees to it that every transfer ends."""


def main(arguments: list[str] | None = None) -> int:
    parser = configuration.argument_parser("python -m router", DESCRIPTION)
    parser.add_argument("--host", help="address clients connect to (server.host)")
    parser.add_argument("--port", type=int, help="port clients connect to (server.port); 0: any free one")
    parser.add_argument(
        "--prefill",
        nargs="+",
        action="append",
        default=[],
        metavar=("URL", "BOOTSTRAP_PORT"),
        help="a prefill node that does not register, e.g. http://10.0.0.1:8000 (repeatable)",
    )
    parser.add_argument(
        "--decode",
        action="append",
        default=[],
        metavar="URL",
        help="a decode node that does not register (repeatable)",
    )
    options = parser.parse_args(arguments)
    try:
        config = configuration.load(options.config, RouterConfig, [*options.overrides, *_overrides(options)])
    except ConfigError as error:
        print(f"router: {error}", file=sys.stderr)
        return 2
    if options.check:
        print(configuration.dump(config), end="")
        return 0
    logs.configure("router", config.log_level)
    return _serve(config)


def _overrides(options: argparse.Namespace) -> list[str]:
    """The short options as overrides of the keys they stand for."""
    overrides = []
    if options.host is not None:
        overrides.append(f"server.host={options.host}")
    if options.port is not None:
        overrides.append(f"server.port={options.port}")
    if options.prefill:
        nodes = []
        for url, *port in options.prefill:
            if len(port) > 1 or (port and not port[0].isdigit() and port[0] != "none"):
                raise ConfigError(f"--prefill {url} {' '.join(port)}: expected a URL and perhaps a bootstrap port")
            nodes.append(f"{{url: '{url}', bootstrap_port: {port[0] if port and port[0] != 'none' else 'null'}}}")
        overrides.append(f"nodes.prefill=[{', '.join(nodes)}]")
    if options.decode:
        nodes = [f"{{url: '{url}'}}" for url in options.decode]
        overrides.append(f"nodes.decode=[{', '.join(nodes)}]")
    return overrides


def _serve(config: RouterConfig) -> int:
    # Imported late: --help and --check need none of it.
    import asyncio

    from router.service import RouterService
    from runtime.process import calm_garbage_collector

    calm_garbage_collector((10_000, 20, 50))

    async def run(stopping: asyncio.Event) -> None:
        await RouterService(config).run(stopping)

    status = 0
    try:
        serve.run(run)
    except* ConfigError as errors:
        status = 2
        for error in errors.exceptions:
            print(f"router: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
