"""Everything between the user and the program: constants, flags, environment variables, the terminal."""

from microbert.config.constants import Config as Config
from microbert.config.flags import read_config as read_config
