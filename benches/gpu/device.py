"""What a stage runs on, and the builds that it tests."""

import hashlib
import platform
import shutil
import subprocess
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
REHEARSAL = "rehearsal-cpu"


def facts(device):
    """The device's name and what its numbers depend on."""
    common = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cpu":
        return {"name": REHEARSAL, **common}
    if not torch.cuda.is_available():
        raise SystemExit(f"{device}: torch sees no CUDA device")
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        **common,
    }


def driver_version():
    if not shutil.which("nvidia-smi"):
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0].strip()


def fingerprint(paths):
    """Of files' contents: results of another build do not count for this one."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def binary(options):
    """The program to test, and its fingerprint."""
    path = Path(options.binary)
    if not path.is_file():
        raise SystemExit(f"no binary at {path}: name it with --binary or CANDELA_BINARY")
    return path.resolve(), fingerprint([path])
