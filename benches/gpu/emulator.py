"""Our kernels as C++ on memory of this process: the rehearsal on a machine without a GPU."""

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import device

KERNELS = device.REPOSITORY / "kernels"
# Those of `Emulator::library` in tests/kernels/emulator.rs.
FLAGS = ["-x", "c++", "-std=c++17", "-Wno-unknown-pragmas", "-O2", "-fno-strict-aliasing", "-shared",
         "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-DEMULATE_LIBRARY"]


def sources():
    return [path for end in ("*.cu", "*.cuh", "emulate/*.h") for path in KERNELS.glob(end)]


def build(directory):
    """A library for each kernel file, by its name, in a directory of this state of the sources."""
    directory = directory / f"emulated-{device.fingerprint(sources())}"
    directory.mkdir(parents=True, exist_ok=True)

    def compiled(source):
        library = directory / f"{source.stem}.so"
        if not library.exists():
            beside = library.with_suffix(".new")
            command = ["g++", *FLAGS, "-I", KERNELS, source, "-o", beside]
            subprocess.run(command, check=True)
            os.replace(beside, library)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, sorted(KERNELS.glob("*.cu"))))
    return directory


class Emulator:
    """Libraries of a directory, opened as they are wanted."""

    def __init__(self, libraries):
        self.libraries, self.open = libraries, {}

    def launch(self, file, kernel, grid, threads, shared_bytes, arguments):
        if file not in self.open:
            run = ctypes.CDLL(str(self.libraries / f"{file}.so")).emulate_launch
            run.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.c_char_p,
                            ctypes.c_uint64]
            run.restype = None
            self.open[file] = run
        shape = (ctypes.c_uint32 * 7)(*grid, threads, 1, 1, shared_bytes)
        self.open[file](kernel.encode(), shape, arguments, len(arguments))

    def synchronize(self):
        pass
