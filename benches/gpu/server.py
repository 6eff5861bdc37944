"""`candela serve` as a process, and its completions."""

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

START_SECONDS_MAX = 180
STOP_SECONDS_MAX = 20
REQUEST_SECONDS_MAX = 120
LOG_CHARACTERS_MAX = 2000


def flags_of(binary, command="serve"):
    """The help text, which says what a build takes."""
    return subprocess.run([binary, command, "--help"], capture_output=True, text=True).stdout


def device_flags(binary, at, dtype="bf16", graphs=True):
    """What says where to run; a build without a GPU knows some of it not."""
    known = flags_of(binary)
    flags = ["--device", str(at)]
    if at.type == "cuda":
        flags += ["--dtype", dtype]
        flags += [] if graphs else ["--no-cuda-graphs"]
    missing = [flag for flag in flags if flag.startswith("--") and flag not in known]
    if missing:
        raise SystemExit(f"{binary} has no {' '.join(missing)}: is it built with --features cuda?")
    return flags


class Server:
    """Serves from entering to leaving; what it logs is in `log`."""

    def __init__(self, binary, model, flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [str(binary), "serve", "--model", str(model), "--served-model-name", "m",
                        "--port", str(self.port), "--offline", *flags]

    def __enter__(self):
        self.directory = tempfile.TemporaryDirectory()
        self.log = open(f"{self.directory.name}/log", "w+")
        kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        command = [*self.command, "--data-dir", f"{self.directory.name}/data"]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment,
                                        cwd=self.directory.name)
        deadline = time.monotonic() + START_SECONDS_MAX
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self.said()
                self.__exit__()
                raise AssertionError(f"{' '.join(self.command)} does not start: {said}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        self.directory.cleanup()

    def said(self):
        self.log.flush()
        self.log.seek(0)
        return self.log.read()[-LOG_CHARACTERS_MAX:]

    def answers(self):
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def complete(self, prompt, **parameters):
        """The choices; `prompt` is token ids, or a list of such."""
        body = json.dumps({"model": "m", "prompt": prompt, **parameters}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body,
                                         {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS_MAX) as answer:
                return json.load(answer)["choices"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error.code}: {error.read().decode()}") from error
        except OSError as error:
            raise AssertionError(f"{error}; the server says: {self.said()}") from error
