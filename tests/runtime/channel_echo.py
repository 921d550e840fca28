"""A child process at the engine's end of a channel: answers each Submit, follows Drain and Shutdown, or dies."""

from runtime.channel import ChannelAddress, EngineChannel
from runtime.errors import ProcessDied
from runtime.process import ignore_terminal_signals
from runtime.requests import Drain, Drained, Shutdown, StepOutput, Submit, Tokens


def main(address: ChannelAddress) -> None:
    ignore_terminal_signals()
    channel = EngineChannel(address)
    channel.send(Drained(address.rank))
    try:
        while True:
            for message in channel.receive(timeout_s=30):
                if isinstance(message, Submit):
                    channel.send(
                        StepOutput((Tokens(message.request_id, tuple(message.prompt_ids), finish_reason="length"),))
                    )
                elif isinstance(message, Drain):
                    raise SystemExit(7)
                elif isinstance(message, Shutdown):
                    return
    except ProcessDied:
        return
    finally:
        channel.close()


def never_ready(address: ChannelAddress) -> None:
    ignore_terminal_signals()
    EngineChannel(address).receive(timeout_s=60)
