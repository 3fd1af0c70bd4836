"""The lengths of training rows, and how many rows of each length are a step.

With rows = "packed", all rows have max_seq_len tokens. With rows = "documents", a row is a document or a piece of one,
and a step has rows of one of several lengths, about batch_size x max_seq_len tokens in all.
"""

from microbert.config.constants import ROTARY, Config, ResolvedConfig, tokens_per_step
from microbert.config.terminal import counted
from microbert.data.shards import LONGEST_ROW

# shares of the tokens, by row length, with which lengths are drawn. Long ones often do not fit, and the ends of
# documents need short ones
DRAWN_SHARES = {8: 0.002, 16: 0.015, 32: 0.04, 64: 0.08, 128: 0.18, 256: 0.213, LONGEST_ROW: 0.47}
# measured on IMDB, for estimates: the shares that rows have then, tokens of text a row, and their share of all tokens
USUAL_SHARES = {8: 0.02, 16: 0.04, 32: 0.09, 64: 0.16, 128: 0.31, 256: 0.25, LONGEST_ROW: 0.13}
TEXT_OF_ROW, TEXT_SHARE = 68, 0.95


def most_positions(config: Config) -> int:
    """Return the length of the longest row: the number of positions of the run's model."""
    if config.rows == "documents" and config.arch in ROTARY:
        return max(LONGEST_ROW, config.max_seq_len)
    return config.max_seq_len


def row_lengths(config: Config) -> tuple[int, ...]:
    """Return the lengths of training rows, in ascending order."""
    longest = most_positions(config)
    if config.rows == "packed":
        return (longest,)
    return (*(length for length in DRAWN_SHARES if length < longest), longest)


def draw_weights(lengths: tuple[int, ...]) -> list[float]:
    """Return how often pieces are drawn for rows of each length, relative to each other."""
    return [_share(length, DRAWN_SHARES) / length for length in lengths]


def usual_shares(lengths: tuple[int, ...]) -> list[float]:
    """Return the expected share of the tokens that rows of each length have."""
    shares = [_share(length, USUAL_SHARES) for length in lengths]
    return [share / sum(shares) for share in shares]


def _share(length: int, shares: dict[int, float]) -> float:
    """Return the share of a length, or of the next longer one, or of the longest."""
    return next((share for known, share in shares.items() if known >= length), shares[LONGEST_ROW])


def rows_of_step(config: ResolvedConfig) -> dict[int, int]:
    """Return the rows of a step of all processes together by their length: at least one."""
    return {length: max(1, tokens_per_step(config) // length) for length in row_lengths(config)}


def describe_rows(n_sequences: int, config: Config) -> str:
    """Return the size of rows computed at a time, for the user. n_sequences: of max_seq_len tokens."""
    if config.rows == "documents":
        return f"{n_sequences * config.max_seq_len:,} tokens"
    return f"{counted(n_sequences, 'sequence')} of {config.max_seq_len} tokens"


def smaller_constants(config: Config) -> str:
    """Return which constants make a single row smaller, for the advice after running out of memory."""
    if most_positions(config) > config.max_seq_len:
        return 'n_embed, n_layers or vocab_size, or set rows = "packed"'
    return "n_embed, n_layers, vocab_size or max_seq_len"


def describe_step(config: ResolvedConfig) -> str:
    """Return the size of a step of all processes together, for the user."""
    if config.rows == "documents":
        return f"{tokens_per_step(config):,} tokens"
    return f"{config.global_batch_size} sequences"


def rows_of_process(config: ResolvedConfig) -> dict[int, int]:
    """Return the rows of a step of each process by their length, rounded up."""
    if config.rows == "packed":
        return {config.max_seq_len: config.batch_size}
    n_processes = config.global_batch_size // config.batch_size
    return {length: -(-n_rows // n_processes) for length, n_rows in rows_of_step(config).items()}


def rows_at_a_time(n_rows: int, micro_batch_size: int, config: ResolvedConfig) -> int:
    """Return how many of a process's n_rows of one length are computed at a time.

    That is the share of them that micro_batch_size is of the batch, so steps of all lengths have the same number of
    parts.
    """
    if config.rows == "packed":
        return micro_batch_size
    return -(-n_rows * micro_batch_size // config.batch_size)
