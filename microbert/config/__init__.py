"""Everything between the user and the program: constants, flags, environment variables, the terminal."""

import time

from microbert.config.constants import Config as Config
from microbert.config.flags import read_config as read_config

COMMAND_STARTED = time.perf_counter()  # scripts import this package first
