"""Two network namespaces as two hosts, joined by one cable: a veth pair. Nothing but the cable leads from one to the
other, and each has a loopback device of its own."""

import functools
import shutil
import subprocess
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """One namespace, alive as long as its holder process."""

    address: str
    device: str
    within: tuple[str, ...]
    """Begins a command line that runs there."""

    def run(self, *command: str) -> str:
        done = subprocess.run([*self.within, *command], capture_output=True, text=True, timeout=30)
        if done.returncode != 0:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def received_bytes(self) -> int:
        """What came in over the cable."""
        for line in self.run("cat", "/proc/net/dev").splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == self.device:
                return int(counts.split()[0])
        raise OSError(f"no device {self.device}")

    def plug(self, *, in_: bool) -> None:
        """The cable, at this host's end. Unplugged, the other side's packets vanish without an answer."""
        self.run("ip", "link", "set", self.device, "up" if in_ else "down")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Raises OSError where the machine does not allow it."""
    failures = []
    # As root, or inside a user namespace of our own, where everybody is root.
    for first, enter in (((), ("-n",)), (("-U", "-r"), ("-U", "--preserve-credentials", "-n"))):
        try:
            hosts = _made(first, enter)
            made = next(hosts)
        except OSError as error:
            failures.append(str(error))
            continue
        try:
            yield made
        finally:
            hosts.close()
        return
    raise OSError("; ".join(failures))


def _made(first: Sequence[str], enter: Sequence[str]) -> Generator[tuple[Host, Host], None, None]:
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            raise OSError(f"{tool} is not installed")
    holders: list[subprocess.Popen[bytes]] = []
    try:
        holders.append(_hold(["unshare", *first, "-n"]))
        inside_first = ("nsenter", "-t", str(holders[0].pid), *enter)
        holders.append(_hold([*inside_first, "unshare", "-n"]))
        hosts = [
            Host(f"10.77.0.{number}", f"cable{number}", ("nsenter", "-t", str(holder.pid), *enter))
            for number, holder in enumerate(holders, start=1)
        ]
        left, right = hosts
        left.run("ip", "link", "add", left.device, "type", "veth", "peer", "name", right.device)
        left.run("ip", "link", "set", right.device, "netns", str(holders[1].pid))
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", host.device)
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "link", "set", host.device, "up")
        yield left, right
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _hold(command: Sequence[str]) -> "subprocess.Popen[bytes]":
    """A process that does nothing in the namespace it makes, and says when it is there."""
    holder = subprocess.Popen(
        [*command, "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stderr is not None
    if holder.stdout.readline():
        return holder
    holder.wait()
    raise OSError(f"{command[0]}: {holder.stderr.read().decode().strip()}")


@functools.cache
def why_not() -> str:
    """Empty if this machine can do it."""
    try:
        with two_hosts():
            return ""
    except OSError as error:
        return str(error)
