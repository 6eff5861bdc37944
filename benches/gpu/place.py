"""Where kernels run, as the cases see it: a GPU, or the CPU that emulates one."""

import struct
from pathlib import Path

import torch

from driver import Driver
from emulator import Emulator

# Of an emulated GPU: few, so that small rows have several splits in decode attention.
EMULATED_MULTIPROCESSORS = 2


class U64(int):
    """An argument of 64 bits that is no address."""


class Place:
    """`libraries` has the compiled kernels: NAME.fatbin, or NAME.so on the CPU."""

    def __init__(self, device, libraries):
        libraries = Path(libraries)
        self.device = torch.device(device)
        self.is_gpu = self.device.type == "cuda"
        self.files = sorted((path.stem for path in libraries.iterdir()), key=len)
        self.machine = (Driver if self.is_gpu else Emulator)(*([self.device] * self.is_gpu), libraries)
        self.multiprocessors = EMULATED_MULTIPROCESSORS
        if self.is_gpu:
            properties = torch.cuda.get_device_properties(self.device)
            self.multiprocessors = properties.multi_processor_count

    def launch(self, kernel, grid, threads, arguments, shared_bytes=0):
        """`arguments` are the fields of the kernel's struct, in its order: tensors and None are
        addresses, floats 32 bits, and so are integers that are not U64."""
        # The file whose name the kernel's begins with, the longest of them, as the engine has it.
        file = [file for file in self.files if kernel.startswith(file)][-1]
        grid = [*grid, 1, 1][:3]
        self.machine.launch(file, kernel, grid, threads, shared_bytes, laid_out(arguments))

    def synchronize(self):
        self.machine.synchronize()

    def words(self, values):
        """Unsigned words; torch has their bits as signed ones."""
        signed = [value - (1 << 32) if value >= 1 << 31 else value for value in values]
        return torch.tensor(signed, dtype=torch.int32, device=self.device)


def laid_out(arguments):
    """A struct as C lays it out."""
    data, most = b"", 1
    for value in arguments:
        if value is None or isinstance(value, torch.Tensor):
            part = struct.pack("<Q", 0 if value is None else value.data_ptr())
        elif isinstance(value, U64):
            part = struct.pack("<Q", value)
        else:
            part = struct.pack("<f" if isinstance(value, float) else "<I", value)
        most = max(most, len(part))
        data += bytes(-len(data) % len(part)) + part
    return data + bytes(-len(data) % most)
