"""Whether OpenRLHF is installed. This imports nothing of it."""

from importlib.util import find_spec

from turnwise.environments.errors import InputError


def require_openrlhf() -> None:
    """Raises InputError, which says what is missing and how to install it."""
    if missing := [name for name in ("openrlhf", "deepspeed", "ray") if find_spec(name) is None]:
        raise InputError(
            f"the backend openrlhf needs OpenRLHF, and {missing[0]} is not installed: where there are GPUs, "
            "pip install vllm==0.29.0 wheel ninja packaging setuptools, then "
            "pip install --no-build-isolation 'openrlhf[vllm]==0.11.2'; "
            "else make openrlhf and .venv-openrlhf/bin/turnwise"
        )
