"""``python -m bench.first_contact``: as ``python -m bench first-contact``, and needs no pytest."""

import argparse
import os
import sys

from . import command

parser = argparse.ArgumentParser(prog="python -m bench.first_contact", description=command.__doc__)
command.add_arguments(parser)
if __name__ == "__main__":
    status = command.main(parser.parse_args())
    sys.stdout.flush()
    os._exit(status)  # a child that a hung kernel keeps from dying is not waited for
