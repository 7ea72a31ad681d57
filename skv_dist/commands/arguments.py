"""The command line of all commands."""

import argparse
from typing import NoReturn

from skv_dist.parallel.processes.report import report_once


class ArgumentParser(argparse.ArgumentParser):
    """As argparse's; where a launcher has started several processes, one of each host says what is wrong."""

    def error(self, message: str) -> NoReturn:
        report_once(f"{self.format_usage()}{self.prog}: error: {message}")
        raise SystemExit(2)
