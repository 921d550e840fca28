"""Where a rank queues its work on a GPU: a stream of its own, which waits for nobody and nobody waits for.

The default stream belongs to the libraries of the process. The transfer engine copies on it, and what it queues there
would come behind all steps that were launched ahead, and steps behind its copies.
"""

import time

import torch


def enter(device: torch.device) -> None:
    """Make a GPU the calling thread's device, and all it launches from now on work of a stream that is not the default
    one. To be called on the thread that will run the steps, before it allocates anything: memory is reused in the order
    of the stream it was made on. Does nothing the second time, and on a CPU."""
    if device.type != "cuda":
        return
    if device.index is not None:
        torch.cuda.set_device(device)
    default = torch.cuda.default_stream(device)
    if torch.cuda.current_stream(device) == default:
        own = torch.cuda.Stream(device)
        own.wait_stream(default)
        torch.cuda.set_stream(own)


def wait_until_quiet(device: torch.device, timeout_s: float) -> bool:
    """Whether all that the calling thread has launched ends within the time. True also of a device that has failed: it
    runs nothing any more."""
    if device.type != "cuda":
        return True
    until = time.monotonic() + timeout_s
    try:
        end = torch.cuda.Event()
        end.record(torch.cuda.current_stream(device))
        while not end.query():
            if time.monotonic() > until:
                return False
            time.sleep(0.001)
    except RuntimeError:
        return True
    return True
