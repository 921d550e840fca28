"""Check every YAML file of configs/ against the process it is for and the machines described. No hardware needed.

    python -m tools.check_configs [FOLDER ...]

Prints what each process of each deployment would run with, then the problems. Exits 1 if there are any.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from model.config import ModelConfig
from model.presets import PRESETS
from node.config import NodeConfig
from runtime import config as configuration
from runtime.errors import ConfigError
from tools.config_rules import listening_ports, plan_of, problems
from tools.memory_plan import GIB
from tools.topology import Process, kind_of_file, load_processes, load_topology

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def check_folder(directory: Path) -> tuple[list[str], list[str]]:
    """(report lines, problems) of one folder."""
    report: list[str] = []
    found: list[str] = []
    placed: set[Path] = set()
    if not directory.is_dir():
        return report, [f"{directory} is not a folder"]
    try:
        topology = load_topology(directory)
    except ConfigError as error:
        return report, [str(error)]
    if topology is not None and topology.model not in PRESETS:
        return report, [f"{directory}: model {topology.model!r} is not one of {sorted(PRESETS)}"]
    for deployment in topology.deployments if topology is not None else ():
        assert topology is not None
        model = PRESETS[topology.model]()
        report.append(f"{directory.name}: {deployment.name}")
        placed.update(directory / place.config for place in deployment.processes)
        try:
            processes = load_processes(topology, deployment, directory)
        except ConfigError as error:
            found.append(f"{deployment.name}: {error}")
            continue
        report.extend(f"  {line}" for line in describe(processes, model))
        found.extend(f"{directory.name}: {deployment.name}: {problem}" for problem in problems(processes, model))
    for path in sorted(directory.glob("*.y*ml")):
        if path not in placed:
            try:
                configuration.load(path, kind_of_file(path))
            except ConfigError as error:
                found.append(str(error))
    return report, found


def describe(processes: Sequence[Process], model: ModelConfig) -> list[str]:
    """One line a process: where it listens and, on GPUs, what its memory holds."""
    lines = []
    for process in processes:
        ports = (f"{purpose} {port}" for purpose, port in listening_ports(process).items() if "rank" not in purpose)
        line = f"{process.place.config:16} {process.host.name:10} {', '.join(ports)}"
        if isinstance(process.config, NodeConfig) and process.place.gpus:
            memory = plan_of(process, process.config, model)
            line += (
                f"; GPUs {list(process.place.gpus)}, {memory.budget / GIB:.0f} GiB each: weights "
                f"{memory.weights / GIB:.1f}, workspace {memory.workspace / GIB:.1f}, {memory.num_slots} slots "
                f"{memory.slots / GIB:.1f}, {memory.num_pages} pages {memory.pages / GIB:.1f} "
                f"({memory.tokens / 1e6:.1f}M tokens)"
            )
        lines.append(line)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.check_configs", description="Check the files of configs/.")
    parser.add_argument("folders", nargs="*", type=Path, help="folders to check; default: all of configs/")
    folders = parser.parse_args(arguments).folders or sorted(path for path in CONFIGS.iterdir() if path.is_dir())
    failed = False
    for folder in folders:
        report, found = check_folder(folder)
        print("\n".join(report))
        for problem in found:
            print(f"  PROBLEM {problem}")
        failed |= bool(found)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
