"""Our kernels through the CUDA driver's own interface, in the context that torch uses."""

import ctypes

import torch

# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, and what needs no asking.
MAX_DYNAMIC_SHARED = 8
SHARED_BYTES_DEFAULT = 48 << 10

POINTER, INT, UNSIGNED = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
SIGNATURES = {
    "cuInit": [UNSIGNED],
    "cuDeviceGet": [ctypes.POINTER(INT), INT],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(POINTER), INT],
    "cuCtxSetCurrent": [POINTER],
    "cuModuleLoadData": [ctypes.POINTER(POINTER), ctypes.c_char_p],
    "cuModuleGetFunction": [ctypes.POINTER(POINTER), POINTER, ctypes.c_char_p],
    "cuFuncSetAttribute": [POINTER, INT, INT],
    "cuLaunchKernel": [POINTER] + [UNSIGNED] * 7 + [POINTER] + [ctypes.POINTER(POINTER)] * 2,
    "cuGetErrorString": [INT, ctypes.POINTER(ctypes.c_char_p)],
}


class Driver:
    """Fat binaries in a directory, loaded as they are wanted."""

    def __init__(self, device, fatbins):
        self.device, self.fatbins = device, fatbins
        self.library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, INT
        self.modules, self.functions = {}, {}
        # Makes torch's context, which is the device's primary one.
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
        ordinal, context = INT(), POINTER()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(ordinal), device.index or 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
        self.call("cuCtxSetCurrent", context)

    def call(self, name, *arguments):
        code = getattr(self.library, name)(*arguments)
        if code == 0:
            return
        text = ctypes.c_char_p()
        self.library.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'').decode()} ({code})")

    def function(self, file, kernel, shared_bytes):
        key = kernel, shared_bytes
        if key not in self.functions:
            if file not in self.modules:
                module = POINTER()
                image = (self.fatbins / f"{file}.fatbin").read_bytes()
                self.call("cuModuleLoadData", ctypes.byref(module), image)
                self.modules[file] = module
            function = POINTER()
            self.call("cuModuleGetFunction", ctypes.byref(function), self.modules[file],
                      kernel.encode())
            if shared_bytes > SHARED_BYTES_DEFAULT:
                self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared_bytes)
            self.functions[key] = function
        return self.functions[key]

    def launch(self, file, kernel, grid, threads, shared_bytes, arguments):
        function = self.function(file, kernel, shared_bytes)
        # The driver copies the struct before it returns.
        struct = ctypes.create_string_buffer(arguments, len(arguments))
        parameters = (POINTER * 1)(ctypes.addressof(struct))
        stream = POINTER(torch.cuda.current_stream(self.device).cuda_stream)
        self.call("cuLaunchKernel", function, *grid, threads, 1, 1, shared_bytes, stream,
                  parameters, None)

    def synchronize(self):
        torch.cuda.synchronize(self.device)
