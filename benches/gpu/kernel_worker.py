"""The worker of the stage kernels: DEVICE LIBRARIES."""

import sys

import cases
import speeds
import workers
from place import Place


def main():
    device, libraries = sys.argv[1:]
    place = Place(device, libraries)
    runs = {case.name: case.run for case in [*cases.table(place.is_gpu), *speeds.table(place.is_gpu)]}

    def run(name):
        measured = runs[name](place)
        place.synchronize()
        return measured

    workers.serve(run)


main()
