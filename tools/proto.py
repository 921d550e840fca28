"""Generate the code in proto/ from proto/*.proto: `python -m tools.proto` rewrites it, `--check` only compares."""

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generate(out: Path) -> list[Path]:
    """Run protoc for every proto/*.proto; the files lie under `out`/proto."""
    sources = sorted((ROOT / "proto").glob("*.proto"))
    arguments = [
        "protoc",
        f"--proto_path={ROOT}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
    ]
    if protoc.main([*arguments, *(str(source) for source in sources)]):
        raise SystemExit("protoc failed")
    return [out / "proto" / f"{source.stem}{suffix}" for source in sources for suffix in SUFFIXES]


def stale() -> list[str]:
    """Names in proto/ that differ from what the .proto files generate, missing and surplus ones included."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        differing = {
            path.name
            for path in fresh
            if not (ROOT / "proto" / path.name).exists()
            or not filecmp.cmp(path, ROOT / "proto" / path.name, shallow=False)
        }
        present = {path.name for suffix in SUFFIXES for path in (ROOT / "proto").glob(f"*{suffix}")}
        return sorted(differing | (present - {path.name for path in fresh}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the checked-in code is stale; write nothing")
    if parser.parse_args().check:
        names = stale()
        print("\n".join(names) if names else "proto/ is up to date")
        return 1 if names else 0
    with tempfile.TemporaryDirectory() as scratch:
        for path in generate(Path(scratch)):
            shutil.copyfile(path, ROOT / "proto" / path.name)
            print(f"proto/{path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
