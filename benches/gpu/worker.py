"""Runs the cases that it reads as a JSON list on stdin, in a process that a faulty kernel may end.

One JSON object a line on stdout: {"begin": case}, then the case's result.
"""

import argparse
import json
import os
import sys
import time

import cases
import speeds
from place import Place


def say(**line):
    print(json.dumps(line), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("libraries")
    options = parser.parse_args()
    place = Place(options.device, options.libraries)
    runs = {case.name: case.run for case in cases.table(place.is_gpu)}
    runs |= {case.name: case.run for case in speeds.table(place.is_gpu)}
    for name in json.load(sys.stdin):
        say(begin=name)
        begun, found = time.monotonic(), {}
        try:
            measured = runs[name](place)
            place.synchronize()
            found = {"ok": True, **(measured or {})}
        except AssertionError as wrong:
            found = {"ok": False, "error": str(wrong)}
        except RuntimeError as error:
            # Of the driver, after which a context may not be used any more.
            say(case=name, seconds=time.monotonic() - begun, ok=False, error=str(error))
            os._exit(1)
        say(case=name, seconds=time.monotonic() - begun, **found)


main()
