"""The command line that both nodes share."""

import logging
from collections.abc import Callable
from typing import TypeVar

from node.config import NodeConfig
from node.node import Role, serve
from runtime import config as configuration
from runtime import logging as logs
from runtime.errors import TandemError
from runtime.serve import run

ConfigT = TypeVar("ConfigT", bound=NodeConfig)


def run_node(module: str, description: str, kind: type[ConfigT], role_of: Callable[[ConfigT], Role]) -> None:
    """Parse the command line of `python -m <module>`, then serve until told to stop. Exits 1 on an error."""
    parser = configuration.argument_parser(f"python -m {module}", description)
    arguments = parser.parse_args()
    try:
        config = configuration.load(arguments.config, kind, arguments.overrides)
        if arguments.check:
            print(configuration.dump(config), end="")
            return
        role = role_of(config)
        logs.configure(role, config.log_level)
        run(lambda stopping: serve(config, role, stopping))
    except TandemError as error:
        logging.getLogger(module).debug("giving up", exc_info=True)
        raise SystemExit(f"error: {error}") from None
