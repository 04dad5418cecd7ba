"""Where randomness comes from: a seed and what it is for, never the order in which things happen."""

import hashlib


def turn_seed(seed: int, problem_id: str, sample: int, turn: int) -> int:
    """The seed of one turn of one episode, in [0, 2^63), from the seed of the run."""
    key = f"{seed}\0{problem_id}\0{sample}\0{turn}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
